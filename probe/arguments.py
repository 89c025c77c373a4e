"""Check what people give to a method, before anything is computed: indices, text, labelled arrays.

    chosen("heads", [0, 2], 8)          # [0, 2]; a mask of 8 truth values gives where it is true
    labelled("maps", maps, "y", "x")    # an xarray array with these dimensions
    branch_name("uncond")

A value of the wrong kind raises an `ExperimentError` that says what to give. It is never converted
silently.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence, Set
from typing import Any

import numpy as np
import xarray as xr

from probe.errors import ExperimentError
from probe.format.schema import BRANCHES, near
from probe.settings.fields import steps_in
from probe.text import printable

LARGEST_GRID = 8192  # pixels a side
LARGEST_NUMBER = 1e6


def in_words(value: object) -> str:
    """Return a value for a message: on one line, and short."""
    if isinstance(value, np.ndarray | xr.DataArray):
        return f"an array of {value.dtype} of shape {value.shape}"
    try:
        return printable(" ".join(reprlib.repr(value).split()))
    except Exception:  # somebody's own __repr__
        return f"a {type(value).__name__}"


def one_of(setting: str, value: object, choices: Sequence[str]) -> None:
    """Raise ExperimentError, which lists the choices, if the value is none of them."""
    if not isinstance(value, str) or value not in choices:
        raise ExperimentError(
            f"{setting} is {in_words(value)}, which is no choice.",
            f"Choose from: {', '.join(choices)}.",
        )


def truth_value(setting: str, value: object) -> bool:
    """Return a truth value as a bool, also numpy's. Raise ExperimentError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ExperimentError(
            f"{setting} is {in_words(value)}, which is no truth value.", "Give True or False."
        )
    return bool(value)


def whole_number(setting: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Return a whole number as an int, also numpy's. Raise ExperimentError if out of bounds."""
    if not _is_whole(value) or int(value) < least or (most is not None and int(value) > most):  # type: ignore[call-overload]
        raise ExperimentError(
            f"{setting} is {in_words(value)}.",
            f"Give a whole number from {least} {'up' if most is None else f'to {most}'}.",
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(setting: str, value: object) -> float:
    """A finite number, also numpy's. A truth value is none."""
    if (
        isinstance(value, bool | np.bool_)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not abs(float(value)) < LARGEST_NUMBER
    ):
        raise ExperimentError(
            f"{setting} is {in_words(value)}, which is no number.", "Give a number: 7.5."
        )
    return float(value)


def check_options(max_bytes: object, **switches: object) -> int | None:
    """Check a limit in bytes and the truth values given beside it. Return the limit, or None.

    Raise ExperimentError.
    """
    for setting, value in switches.items():
        truth_value(setting, value)
    return None if max_bytes is None else whole_number("max_bytes", max_bytes)


def text(setting: str, value: object) -> str:
    """Return a text. Raise ExperimentError for anything else."""
    if not isinstance(value, str):
        raise ExperimentError(
            f"{setting} is {in_words(value)}, which is no text.", f'Give {setting} as text: "...".'
        )
    return value


def texts(setting: str, value: object) -> list[str]:
    """Return one text, or several, as a list. Raise ExperimentError for anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, np.ndarray | xr.DataArray):
        value = value.values.tolist() if isinstance(value, xr.DataArray) else value.tolist()
    if (
        not isinstance(value, Collection)
        or isinstance(value, bytes)
        or not all(isinstance(item, str) for item in value)
    ):
        raise ExperimentError(
            f"{setting} is {in_words(value)}, which is neither text nor several texts.",
            f'Give text, or a list of it: ["..."] as {setting}.',
        )
    return [str(item) for item in value]


def branch_name(branch: object, other: str = "") -> str:
    """Return the name of a branch. Raise ExperimentError, which lists both.

    `other` names further choices in that message.
    """
    if isinstance(branch, str) and branch in BRANCHES:
        return branch
    guess = near(branch, BRANCHES) if isinstance(branch, str) else ""
    if not guess.startswith("Did"):
        guess = f"branch may be {other}'cond' or 'uncond'."
    raise ExperimentError(f"There is no branch {in_words(branch)}.", guess)


def grid_size(grid: object) -> tuple[int, int]:
    """Return (y, x): two whole numbers from 1 to `LARGEST_GRID`. Raise ExperimentError."""
    is_array = isinstance(grid, np.ndarray) and grid.ndim > 0
    sides = list(grid) if is_array or isinstance(grid, tuple | list) else []  # type: ignore[call-overload]
    if len(sides) != 2 or not all(_is_whole(side) and 1 <= side <= LARGEST_GRID for side in sides):
        raise ExperimentError(
            f"grid is {in_words(grid)}.",
            f"Give (y, x), two whole numbers from 1 to {LARGEST_GRID}, such as (64, 64).",
        )
    return int(sides[0]), int(sides[1])


def chosen(setting: str, given: object, size: int) -> list[int] | slice:
    """Return the chosen indices of `size` things: from a number, several, a slice, or a mask.

    A mask is an array of `size` truth values. Indices may be negative; whether they exist is not
    checked here. Raise ExperimentError, also for a fraction and for a single truth value.
    """
    if isinstance(given, slice):
        parts = given.start, given.stop, given.step
        if given.step == 0 or not all(part is None or _is_whole(part) for part in parts):
            raise _no_indices(setting, given)
        return given
    if _is_whole(given):
        return [int(given)]  # type: ignore[call-overload]
    if isinstance(given, np.ndarray | xr.DataArray):
        array = np.asarray(given)
        if array.dtype == bool:
            if array.shape != (size,):
                raise ExperimentError(
                    f"{setting} is a mask of shape {array.shape}.",
                    f"Give one truth value for each of the {size}, or indices.",
                )
            return [int(index) for index in np.flatnonzero(array)]
        is_row = array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
        given = array.tolist() if is_row else None
    if (
        not isinstance(given, Sequence | Set)
        or isinstance(given, str | bytes)
        or not all(map(_is_whole, given))
    ):
        raise _no_indices(setting, given)
    return [int(index) for index in (sorted(given) if isinstance(given, Set) else given)]


def chosen_steps(given: object, size: int) -> list[int] | slice:
    """Return the chosen steps, as `chosen` does: also from text, in the syntax of capture.steps."""
    if isinstance(given, str):
        try:
            return steps_in(given)
        except ExperimentError as error:
            raise ExperimentError(f"steps: {error.cause}.", error.remedy) from None
    return chosen("steps", given, size)


def _no_indices(setting: str, given: object) -> ExperimentError:
    return ExperimentError(
        f"{setting} is {in_words(given)}, which is no choice of indices.",
        "Give whole numbers from 0: 3, [0, 2], or slice(0, 4).",
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def labelled(name: str, array: object, *dims: str) -> xr.DataArray:
    """Return an xarray array of numbers or truth values that has these dimensions.

    Raise ExperimentError.
    """
    if not isinstance(array, xr.DataArray):
        raise ExperimentError(
            f"{name}: {in_words(array)} is no xarray.DataArray.",
            f"Give an array with labels{_with(dims)}, as the methods of a run return.",
        )
    if array.dtype.kind not in "buif":
        raise ExperimentError(
            f"{name}: values of type {array.dtype} are no numbers.", "Give an array of numbers."
        )
    if missing := [dim for dim in dims if dim not in array.dims]:
        raise ExperimentError(
            f"{name} has no dimension {printable(missing[0])}: it has "
            f"{', '.join(map(str, array.dims)) or 'none'}.",
            f"Give an array{_with(dims)}.",
        )
    return array


def _with(dims: Sequence[str]) -> str:
    return f" over {printable(', '.join(dims))}" if dims else ""


def mask(name: str, given: object, maps: xr.DataArray) -> xr.DataArray:
    """Return a mask over y and x: one with labels, or a plain (y, x) array of the size of `maps`.

    Raise ExperimentError.
    """
    if isinstance(given, np.ndarray) and not isinstance(given, np.ma.MaskedArray):
        if given.shape != (size := (maps.sizes["y"], maps.sizes["x"])):
            raise ExperimentError(
                f"{name} is an array of shape {given.shape}, and the maps have {size[0]} x "
                f"{size[1]} pixels (y, x).",
                "Bring the maps to its size with on_grid, or label its dimensions: "
                "xarray.DataArray(mask, dims=...).",
            )
        given = xr.DataArray(given, dims=("y", "x"))
    if not isinstance(given, xr.DataArray):
        raise ExperimentError(
            f"{name}: {in_words(given)} is no mask.", "Give a (y, x) array of truth values."
        )
    return labelled(name, given, "y", "x")
