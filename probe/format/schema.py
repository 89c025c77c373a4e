"""The schema of a recording: its version, the names of its labels, and its variables with sizes.

`spec("attention/16x16", "cross", shape)` looks a variable up in the table of
`probe.format.variables` and gives it a shape, a type and, where it is known, a value.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from probe.format.variables import SCHEMA, Variable

FORMAT_VERSION = 2  # what is written
FORMAT_STATUS = "draft"  # "final" once this version is frozen
FORMATS_READ = (1, 2)
BRANCHES = ("uncond", "cond")
STATISTICS = ("mean", "std", "min", "max")
MOMENTS = ("mass", "centroid_y", "centroid_x")
HEAD_STATISTICS = (*MOMENTS, "entropy", "greatest")
REST = -1  # the token coordinate of the sum of all tokens that are not kept one by one
PICTURE = -2  # reserved for joint attention: the token coordinate of the sum of picture tokens


_BY_NAME = {(variable.group, variable.name): variable for variable in SCHEMA}
_TAIL = {3: ("channel", "y", "x"), 2: ("position", "feature"), 1: ("feature",)}


@dataclass(frozen=True)
class ArraySpec:
    """A variable of one recording, with its shape and type, and its value where that is known."""

    group: str
    variable: Variable
    shape: tuple[int, ...]
    dtype: str
    value: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)
    across: str = "image"  # what lies along this dimension: pictures, or `draw`, draws of noise

    @property
    def path(self) -> str:
        """Group and name: "attention/16x16/cross"."""
        return f"{self.group}/{self.variable.name}".lstrip("/")

    @property
    def dims(self) -> tuple[str, ...]:
        """The name of each dimension; "..." is spelt out by the length of the shape."""
        dims = tuple(self.across if dim == "image" else dim for dim in self.variable.dims)
        if dims[-1:] != ("...",):
            return dims
        return *dims[:-1], *_TAIL[len(self.shape) - len(dims) + 1]

    @property
    def nbytes(self) -> int:
        """Size in bytes before any compression."""
        import numpy as np  # slow: `probe --version` reads this module for one number

        if self.dtype == "str":
            return sum(len(str(text).encode()) + 4 for text in np.asarray(self.value).ravel())
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def per_step(self) -> bool:
        """Whether each step writes one chunk."""
        return self.variable.per_step


def spec(
    group: str,
    name: str,
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    value: Any = None,
    **attributes: Any,
) -> ArraySpec:
    """Return the schema's variable `name` in a recording's `group`, such as "attention/16x16".

    Its shape is `shape`, or that of its `value`. Raise KeyError if the schema does not have it.
    """
    import numpy as np

    variable = _find(group, name)
    if value is not None:
        value = np.asarray(value, dtype=object if variable.dtype == "str" else None)
    size = tuple(value.shape if shape is None else shape)
    return ArraySpec(group, variable, size, dtype or variable.dtype, value, attributes)


def _find(group: str, name: str) -> Variable:
    """Return the variable of this group, or of the pattern with braces that the group fits."""
    room = group.split("/")[0]
    patterns = dict.fromkeys(
        v.group for v in SCHEMA if "{" in v.group and v.group.split("/")[0] == room
    )
    for pattern in (group, *patterns):
        if (pattern, name) in _BY_NAME:
            return _BY_NAME[pattern, name]
    raise KeyError(f"the schema has no variable {name!r} in group {group!r}")


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts: "1 step", "30 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def near(wrong: str, options: Sequence[str]) -> str:
    """Return a remedy that names the options most like a wrong name."""
    alike = difflib.get_close_matches(wrong, options, n=3, cutoff=0.4)
    if alike:
        return f"Did you mean {' or '.join(alike)}?"
    return f"There are: {', '.join(options[:12])}{', ...' if len(options) > 12 else ''}."
