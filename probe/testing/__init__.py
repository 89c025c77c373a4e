"""Small recordings without torch, and tests for whoever writes or reads recordings.

from probe.testing.conformance import ReaderConformance, WriterConformance
from probe.testing.synthetic import synthetic

path = synthetic(folder / "cat.zarr", prompt="a red cat", status="interrupted")
"""
