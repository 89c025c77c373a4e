"""The dashboard looks at recordings. It reads them through `probe.analysis` and never imports torch."""
