"""Names that were renamed: the old one works for two minor versions, and warns of what to write instead.

warn_renamed("Run.said()", "run.attributes", since="0.1")     # works in 0.1 and 0.2, is gone in 0.3
"""

from __future__ import annotations

import warnings

MINOR_VERSIONS = 2  # a renamed name is kept as long


def gone_in(since: str) -> str:
    """Return the version without the old name, for one that was renamed in version `since`."""
    major, minor = since.split(".")[:2]
    return f"{major}.{int(minor) + MINOR_VERSIONS}"


def warn_renamed(old: str, new: str, since: str, level: int = 2) -> None:
    """Warn that `old` was renamed in version `since`. `level` 2 blames the caller of the function that warns."""
    text = f"{old} was renamed in {since} and is gone in {gone_in(since)}. Write {new}."
    warnings.warn(text, DeprecationWarning, stacklevel=level + 1)
