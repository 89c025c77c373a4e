"""Small recordings without torch, and tests for whoever writes or reads recordings.

from probe.testing import ReaderConformance, WriterConformance, synthetic_recording

path = synthetic_recording(folder / "cat.zarr", prompt="a red cat", status="interrupted")
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from probe.testing.conformance import ReaderConformance, WriterConformance
    from probe.testing.synthetic import synthetic_recording

_HOMES = {
    "ReaderConformance": "probe.testing.conformance",
    "WriterConformance": "probe.testing.conformance",
    "synthetic_recording": "probe.testing.synthetic",
}
__all__ = ["ReaderConformance", "WriterConformance", "synthetic_recording"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from probe.public import public_name

    return public_name(__name__, name, _HOMES, {})


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
