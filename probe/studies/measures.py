"""What is measured of each cell of a study: distances to its parent, and your own.

    check_measures(["l2", "my.module:function"])            # before anything runs
    measure(run, parent, ["l2", "psnr", "my.module:function"])
    # {"l2": 3.1, "psnr": 24.0, "my.module:function": {"cause": "ValueError: no cat in it"}}

The values are plain JSON: a number, a list of numbers (one each step), or numbers by label. A
number that is not defined is None, and the texts "inf" and "-inf" stand for infinite ones. A
measure that fails is `{"cause": ...}`, and the others are measured all the same.

A measure of one's own is a function of the run. If it takes two arguments, the second is the
parent, None for a cell without edits.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import xarray as xr

from probe.errors import ExperimentError, ProbeError
from probe.format.schema import near
from probe.reading.apart import (
    first_difference,
    parts_at,
    pictures_apart,
    steps_apart,
    words_apart,
)
from probe.reading.recording import Run
from probe.text import first_line, printable, shorten

Number: TypeAlias = float | str | None
Values = TypeVar("Values", list[Number], dict[str, Number])
Value: TypeAlias = Number | list[Number] | dict[str, Number]
OWN = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)
MOST_VALUES = 10_000  # of one measure of one cell
MOST_LETTERS = 300  # of a cause


def _of_pictures(name: str) -> Callable[[Run, Run], Any]:
    return lambda run, parent: pictures_apart(run, parent)[name].mean("image")


def _l2_by_step(run: Run, parent: Run) -> xr.DataArray:
    values = run.variable("latents/latents")
    count = math.prod(values.sizes[dim] for dim in ("channel", "y", "x"))
    return steps_apart(run, parent)["latents"] * math.sqrt(count)


def _word_change(run: Run, parent: Run) -> xr.DataArray:
    return words_apart(run, parent)["change"]


MEASURES: dict[str, tuple[Callable[[Run, Run], Any], str]] = {
    "l2": (_of_pictures("l2"), "Euclidean distance of the final latents, the mean over images"),
    "l2_by_step": (_l2_by_step, "the same of the latents of each step, root mean square of images"),
    "psnr": (_of_pictures("psnr"), "peak signal-to-noise ratio of the pictures in dB"),
    "ssim": (_of_pictures("ssim"), "structural similarity of the pictures, 1 where they are equal"),
    "differs_at": (first_difference, "first step whose latents differ in a bit"),
    "parts_at": (
        lambda run, parent: parts_at(steps_apart(run, parent)["latents"]),
        "first step at more than half of the greatest distance of the latents",
    ),
    "word_change": (_word_change, "share of each word's mean map that moved"),
}


def check_measures(names: Sequence[str]) -> None:
    """Raise ExperimentError for a measure that is not there. One's own are imported."""
    for name in names:
        if name not in MEASURES:
            _own(name)


def measure(run: Run, parent: Run | None, names: Sequence[str]) -> dict[str, Any]:
    """Return what is measured of a run, by name, as plain JSON.

    Without a parent, the measures that compare with it are None. No error is raised: it is the
    value of the measure that failed.
    """
    return {name: _measured(run, parent, name) for name in names}


def _measured(run: Run, parent: Run | None, name: str) -> Any:
    try:
        if name in MEASURES:
            return None if parent is None else plain(MEASURES[name][0](run, parent))
        function = _own(name)
        takes_parent = _takes_two(function)
        return plain(function(run, parent) if takes_parent else function(run))
    except ProbeError as error:
        return _failed(error.cause)
    except Exception as error:  # somebody's own code may raise anything
        return _failed(f"{type(error).__name__}: {first_line(error)}")


def _failed(cause: str) -> dict[str, str]:
    return {"cause": shorten(printable(" ".join(cause.split())), MOST_LETTERS)}


def _own(name: str) -> Callable[..., Any]:
    """Return somebody's own measure. Raise ExperimentError if it is not there."""
    found = OWN.fullmatch(name)
    if found is None:
        raise ExperimentError(
            f"measures: there is no measure {printable(name)!r}.",
            f"{near(name, list(MEASURES))} Your own is package.module:function.",
        )
    module, attribute = found.groups()
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs somebody's own code
        raise ExperimentError(
            f"measures: {name} cannot be imported ({type(error).__name__}: {first_line(error)}).",
            "Set PYTHONPATH to the folder that has the module, or install its package.",
        ) from error
    if not callable(function):
        raise ExperimentError(f"measures: {name} is no function.", "Name a function of the run.")
    return function  # type: ignore[no-any-return]


def _takes_two(function: Callable[..., Any]) -> bool:
    """Tell whether a function has two arguments without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # built in, without a signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2


def plain(value: Any) -> Value:
    """Return a measure's value as plain JSON. Raise ExperimentError for what is none.

    A labelled array of one dimension gives numbers by label, unless its dimension is `step`.
    """
    if isinstance(value, xr.DataArray) and value.ndim == 1:
        dim = str(value.dims[0])
        if dim in value.coords and dim != "step":
            labels = [str(label) for label in value[dim].values]
            return _few(dict(zip(labels, map(_number, value.values), strict=True)))
    if isinstance(value, Mapping):
        return _few({str(label): _number(number) for label, number in value.items()})
    if value is None:
        return None
    array = np.asarray(value)
    if array.ndim > 1:
        raise ExperimentError(
            f"It returned an array of shape {array.shape}.",
            "Return a number, a list of them, or numbers by label.",
        )
    if array.ndim == 0:
        return _number(value)
    return _few([_number(item) for item in array])


def _few(values: Values) -> Values:
    if len(values) > MOST_VALUES:
        raise ExperimentError(
            f"It returned {len(values)} values; {MOST_VALUES} is the most.", "Return fewer."
        )
    return values


def _number(value: Any) -> Number:
    array = np.asarray(value)
    if value is None or array.ndim or array.dtype.kind not in "biuf":
        if value is None:
            return None
        raise ExperimentError(
            f"It returned {type(value).__name__}, which is no number.", "Return a number."
        )
    number = float(array)
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else ("inf" if number > 0 else "-inf")


def table() -> str:
    """Return the measures that ship as a Markdown table."""
    rows = [f"| `{name}` | {text} |" for name, (_, text) in MEASURES.items()]
    return "\n".join(["| measure | what it is |", "|---|---|", *rows])
