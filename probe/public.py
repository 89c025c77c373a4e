"""Public names: imported when they are first used. An old name works for two minor versions.

    warn_renamed("Run.said()", "run.attributes", since="0.1")     # gone in 0.3

A public name of a package is never the name of one of its modules. `probe.verify` is the module
that `python -m probe.verify` runs, so a recording is checked by `run.verify()`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

MINOR_VERSIONS = 2  # a renamed name is kept as long


def gone_in(since: str) -> str:
    """Return the version without the old name, for one that was renamed in version `since`."""
    major, minor = since.split(".")[:2]
    return f"{major}.{int(minor) + MINOR_VERSIONS}"


def warn_renamed(old: str, new: str, since: str, level: int = 2) -> None:
    """Warn that `old` was renamed in version `since`.

    `level` 2 blames the caller of the function that warns.
    """
    text = f"{old} was renamed in {since} and is gone in {gone_in(since)}. Write {new}."
    warnings.warn(text, DeprecationWarning, stacklevel=level + 1)


def public_name(
    package: str,
    name: str,
    homes: Mapping[str, str],
    renamed: Mapping[str, tuple[str, str]],
) -> Any:
    """Return a package's public name, for its `__getattr__`.

    `homes` gives the module in which each name lives; a module is its own home. `renamed` gives for
    each old name the new one, and the version that renamed it.
    """
    if name in renamed:
        new, since = renamed[name]
        warn_renamed(f"{package}.{name}", f"{package}.{new}", since, level=3)
        name = new
    try:
        home = importlib.import_module(homes[name])
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("probe"):
            error.add_note(f"{package}.{name} needs it: pip install 'diffusion-probe[record]'")
        raise
    return home if homes[name] == f"{package}.{name}" else getattr(home, name)
