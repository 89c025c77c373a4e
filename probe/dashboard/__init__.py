"""The dashboard looks at recordings.

It reads them through `probe.analysis.maps` and never imports torch.
"""
