"""A grid of experiments: one that all cells share, and axes over which its fields vary.

    grid = load_grid("experiments/guidance-grid.yaml")
    [cell.experiment.seed for cell in grid.cells()]

A grid's file has an experiment's fields, and these:

    base: astronaut.yaml      # another experiment or grid, beside this file; own fields override it
    name: guidance-grid
    axes:                     # any field; probe/settings/axes.py lists what an axis may be
      guidance_scale: 1-10(1)
      seed: [0, 1, 2]
    zip: [[guidance_scale, steps]]    # axes that move together are one dimension
    keep: all                 # what a cell leaves behind: all, summary or metrics
    measures: [l2, psnr]      # what is measured of each cell; module:function is your own
    quick: {steps: 8}         # what --quick changes

Every cell is a checked `Experiment` before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, StringConstraints

from probe.errors import ExperimentError
from probe.settings.axes import Axis, axis
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment
from probe.settings.fields import Line, Strict, expand_home
from probe.settings.loading import OTHER_NAMES, load_settings, merge, validate
from probe.settings.recipe import UNRECORDED
from probe.settings.strict_yaml import read_text, read_yaml
from probe.text import did_you_mean, printable, shorten, shown

MOST_CELLS = 25_000
OWN = ("base", "name", "axes", "zip", "keep", "measures", "quick")
MOST_BASES = 20  # files, each the base of another
SHOWN_CELLS = 3  # in a message

Keep: TypeAlias = Literal["all", "summary", "metrics"]
Measure: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]*$|^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
]


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _tuples(value: object) -> object:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class GridCell:
    """One experiment of a grid, and where it stands: its place along each dimension."""

    index: tuple[int, ...]
    labels: Mapping[str, str]  # by axis
    experiment: Experiment

    @property
    def title(self) -> str:
        """Return the cell as people name it: guidance_scale=3, seed=0."""
        return title(self.labels)


def title(labels: Mapping[str, str]) -> str:
    """Return a cell as people name it, from its label on each axis."""
    return ", ".join(f"{name}={shorten(label, 40)}" for name, label in labels.items()) or "the cell"


class Grid(Strict):
    """An experiment, the axes over which it varies, and what its cells leave behind."""

    name: str = Field(
        default="grid",
        pattern=r"^[a-z0-9-]{1,60}$",
        description="Name of the study: up to 60 of a-z, 0-9 and -.",
    )
    experiment: Experiment = Field(
        default_factory=Experiment,
        description="What all cells share, where no axis says otherwise.",
    )
    axes: tuple[Axis, ...] = Field(default=(), description="The fields that vary, in their order.")
    zip: Annotated[tuple[tuple[Line, ...], ...], BeforeValidator(_tuples)] = Field(
        default=(), description="Groups of axes that move together: each is one dimension."
    )
    keep: Keep = Field(
        default="all",
        description="What a cell leaves behind: all, its recording; summary, its pictures and mean "
        "maps; metrics, its measures alone.",
    )
    measures: Annotated[tuple[Measure, ...], BeforeValidator(_tuple)] = Field(
        default=(), description="What is measured of each cell: names, or your own module:function."
    )

    @property
    def dimensions(self) -> list[list[Axis]]:
        """Return the axes of each dimension: one, or those that are zipped."""
        by_name = {axis.name: axis for axis in self.axes}
        groups = {names[0]: names for names in map(self._in_order, self.zip)}
        zipped = {name for names in groups.values() for name in names}
        return [
            [by_name[other] for other in groups.get(name, (name,))]
            for name in by_name
            if name in groups or name not in zipped
        ]

    def _in_order(self, names: Sequence[str]) -> list[str]:
        return [axis.name for axis in self.axes if axis.name in names]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return how many cells lie along each dimension."""
        return tuple(len(axes[0].values) for axes in self.dimensions)

    @property
    def count(self) -> int:
        """Return how many cells there are."""
        return math.prod(self.shape)

    def cells(self) -> list[GridCell]:
        """Return every cell, the last dimension the fastest.

        Raise ExperimentError if one is no experiment. It names the cells and the cause.
        """
        dimensions, base = self.dimensions, self.experiment.resolved()
        # A whole field first, then what lies inside of one.
        order = sorted(
            ((axis, d) for d, axes in enumerate(dimensions) for axis in axes),
            key=lambda pair: pair[0].name.count("."),
        )
        cells, wrong = [], Wrong()
        for index in places(self.shape):
            labels = {
                axis.name: axis.labels[at]
                for axes, at in zip(dimensions, index, strict=True)
                for axis in axes
            }
            try:
                fields = base
                for one, dimension in order:
                    fields = _set(fields, one.name, one.values[index[dimension]])
                cells.append(GridCell(index, labels, validate(Experiment, fields)))
            except ExperimentError as error:
                wrong.add(title(labels), error)
        wrong.raise_first()
        return cells

    def resolved(self) -> dict[str, JsonValue]:
        """Return the grid as its file might be, with nothing left to look up."""
        own = self.model_dump(mode="json", include={"name", "zip", "keep", "measures"})
        axes: dict[str, JsonValue] = {axis.name: axis.as_written() for axis in self.axes}
        return {**self.experiment.resolved(), **own, "axes": axes}


class Wrong:
    """The cells that cannot be, by their cause: one error names one cause and all of its cells."""

    def __init__(self) -> None:
        self._cells: dict[tuple[type[ExperimentError], str, str], list[str]] = {}

    def add(self, cell: str, error: Any) -> None:
        """Keep that a cell cannot be."""
        self._cells.setdefault((type(error), error.cause, error.remedy), []).append(cell)

    def raise_first(self) -> None:
        """Raise the first cause, and say how many others there are."""
        if not self._cells:
            return
        (kind, cause, remedy), cells = next(iter(self._cells.items()))
        others = len(self._cells) - 1
        more = f" ({others} other {'cause' if others == 1 else 'causes'} besides)" * bool(others)
        raise kind(f"{some_of(cells)}: {cause}{more}", remedy)


def some_of(cells: Sequence[str]) -> str:
    """Return a few cells by name, and how many more there are."""
    left = len(cells) - SHOWN_CELLS
    more = f" and {left} more {'cell' if left == 1 else 'cells'}" * (left > 0)
    return "; ".join(cells[:SHOWN_CELLS]) + more


def places(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the places of an array of this shape, the last dimension the fastest."""
    for number in range(math.prod(shape)):
        place = []
        for length in reversed(shape):
            number, at = divmod(number, length)
            place.append(at)
        yield tuple(reversed(place))


def _set(fields: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of the fields with another value at a dotted path."""
    first, dot, rest = path.partition(".")
    inside = fields.get(first)
    if not dot:
        both = first == "capture" and isinstance(value, Mapping) and isinstance(inside, Mapping)
        return {**fields, first: {**inside, **value} if both else value}  # type: ignore[dict-item]
    if isinstance(inside, list):
        number, more, below = rest.partition(".")
        if not number.isdecimal() or number != str(int(number)) or int(number) >= len(inside):
            raise ExperimentError(
                f"{path}: there is no {first}[{shorten(printable(number))}]; {first} has "
                f"{len(inside)}",
                f"Count from 0, and write the {first} that the axis varies.",
            )
        at = int(number)
        if more and not isinstance(inside[at], Mapping):
            raise ExperimentError(
                f"{path}: there is nothing inside of {first}[{at}]", f"Write {first}.{at}."
            )
        item = _set(inside[at], below, value) if more else value
        return {**fields, first: [*inside[:at], item, *inside[at + 1 :]]}
    below_it = inside if isinstance(inside, Mapping) else {}
    # An option of a scheduler may have any name.
    changed = {**below_it, rest: value} if first in FLAT else _set(below_it, rest, value)
    return {**fields, first: changed}


FLAT = ("capture", "scheduler_options")


def _get(fields: Mapping[str, Any], path: str) -> Any:
    """Return what stands at a dotted path, or None."""
    value: Any = fields
    for part in path.split("."):
        if isinstance(value, list):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


# --- from a file ----------------------------------------------------------------------------------


def load_grid(
    source: str | Path | Mapping[str, Any] | Grid, *, quick: bool = False, **changes: Any
) -> Grid:
    """Return the grid in a YAML file or mapping.

    `quick` takes the smaller grid that it names. `changes` are fields, `steps=8`, dotted fields,
    `**{"capture.text": False}`, or axes, `**{"axes.seed": "0-3(1)"}`. Raise ExperimentError,
    whatever is wrong.
    """
    if isinstance(source, Grid):
        written, where, folder = source.resolved(), "grid", Path()
    elif isinstance(source, Mapping):
        written, where, folder = _with_base(dict(source), Path(), "grid", ()), "grid", Path()
    else:
        path = Path(str(source))
        where, folder = printable(str(path)), path.parent
        written = _with_base(_read(path), folder, where, (path.absolute(),))
        written.setdefault("name", _name_of(path))
    try:
        smaller = written.pop("quick", None)
        if quick:
            if not isinstance(smaller, Mapping):
                raise ExperimentError(
                    "quick: the grid does not say what is quick",
                    "Write quick: {steps: 8, axes: {seed: [0]}}, or leave out --quick.",
                )
            written = _over(written, _absolute(dict(smaller), folder))
        return _made(_changed(written, changes))
    except ExperimentError as error:
        raise ExperimentError(f"{where}: {error.cause}", error.remedy) from None


def _read(path: Path) -> dict[str, Any]:
    return read_yaml(read_text(path), str(path))


def _name_of(path: Path) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in path.stem.lower())
    return plain.strip("-")[:60] or "grid"


def _with_base(
    written: dict[str, Any], folder: Path, where: str, seen: tuple[Path, ...]
) -> dict[str, Any]:
    """Return what a file says on top of what its base says."""
    written = _absolute(written, folder)
    base = written.pop("base", None)
    if base is None:
        return written
    if not isinstance(base, str):
        raise ExperimentError(
            f"{where}: base: {shown(base)} is not a file", "Name another YAML file beside this one."
        )
    path = folder / expand_home(base)
    if len(seen) > MOST_BASES:
        raise ExperimentError(
            f"{where}: base: there are {MOST_BASES} files below one another, and more",
            "Name a file with fewer below it.",
        )
    if path.absolute() in seen:
        raise ExperimentError(
            f"{where}: base: {shown(base)} is based on this very file", "Name another file."
        )
    below = _with_base(_read(path), path.parent, printable(str(path)), (*seen, path.absolute()))
    below.pop("name", None)  # that of another study
    return _over(below, written)


def _absolute(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what is written, with the files of prompts named from the folder they lie in."""
    axes = written.get("axes")
    if not isinstance(axes, Mapping):
        return written
    return {**written, "axes": {name: _placed(how, folder) for name, how in axes.items()}}


def _placed(how: Any, folder: Path) -> Any:
    named = isinstance(how, Mapping) and isinstance(how.get("file"), str)
    return {**how, "file": str(folder / expand_home(how["file"]))} if named else how


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return one grid's settings on top of another's: axes one by one, fields as ever."""
    own = {name: value for name, value in above.items() if name in OWN and name != "axes"}
    merged = {**below, **own}
    if isinstance(above.get("axes"), Mapping):
        axes = below.get("axes")
        merged["axes"] = {**(axes if isinstance(axes, Mapping) else {}), **above["axes"]}
    elif "axes" in above:
        merged["axes"] = above["axes"]
    return merge(merged, {name: value for name, value in above.items() if name not in OWN})


def _changed(written: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with changes from a call or a command line."""
    axes = written.get("axes")
    axes = dict(axes) if isinstance(axes, Mapping) else {}
    fields: dict[str, Any] = {}
    for name, value in changes.items():
        if name.startswith("axes."):
            axes[name.removeprefix("axes.")] = value
        elif name in axes:
            raise ExperimentError(
                f"{name}: it is an axis of this grid, and is set to {shown(value)}",
                f"Set the axis: axes.{name}=[...].",
            )
        else:
            fields[name] = value
    return _over(written, {**fields, **({"axes": axes} if axes else {})})


def _made(written: Mapping[str, Any]) -> Grid:
    fields = {name: value for name, value in written.items() if name not in OWN}
    for name in fields:
        if str(name).partition(".")[0] not in Experiment.model_fields:
            _refuse_unknown(str(name), (*OWN, *Experiment.model_fields))
    experiment = load_settings(Experiment, fields, "")
    axes = _axes(written.get("axes"), experiment.resolved())
    own = {name: written[name] for name in ("name", "zip", "keep", "measures") if name in written}
    grid = validate(Grid, {**own, "experiment": experiment, "axes": axes})
    _check_zip(grid)
    if (count := grid.count) > MOST_CELLS:
        raise ExperimentError(
            f"axes: together they make {count} cells, and {MOST_CELLS} is the most",
            "Shorten an axis, or write several grids.",
        )
    return grid


def _axes(written: object, base: Mapping[str, Any]) -> tuple[Axis, ...]:
    if written is None:
        return ()
    if not isinstance(written, Mapping):
        raise ExperimentError(
            f"axes: {shown(written)} is not a mapping", "Write one `field: values` a line below it."
        )
    for name in written:
        _check_field(str(name))
    return tuple(axis(name, how, _get(base, name)) for name, how in written.items())


def _check_field(name: str) -> None:
    """Raise ExperimentError for an axis that is no field, or whose field changes nothing."""
    first, _, rest = name.partition(".")
    known = first in Experiment.model_fields
    if not known or (first == "capture" and rest and rest not in CaptureOptions.model_fields):
        captures = [f"capture.{field}" for field in CaptureOptions.model_fields]
        _refuse_unknown(name, (*Experiment.model_fields, *captures), "axes.")
    if name in UNRECORDED:
        raise ExperimentError(
            f"axes.{name}: it changes nothing that is recorded", "Set it outside of axes."
        )


def _refuse_unknown(name: str, known: Sequence[str], where: str = "") -> None:
    spellings = {field.rpartition(".")[2]: field for field in reversed(known)}
    spellings |= {field: field for field in known}
    spellings |= {word: field for word, field in OTHER_NAMES.items() if field in known}
    remedy = did_you_mean(name, spellings) or did_you_mean(name.rpartition(".")[2], spellings)
    raise ExperimentError(
        f"{where}{printable(name)}: unknown field",
        remedy or f"The fields are {', '.join(known)}.",
    )


def _check_zip(grid: Grid) -> None:
    """Raise ExperimentError for zipped axes that are no axes, or of different lengths."""
    by_name = {axis.name: axis for axis in grid.axes}
    seen: set[str] = set()
    for names in grid.zip:
        if not names:
            raise ExperimentError("zip: a group has no axis", "Name axes: zip: [[seed, steps]].")
        for name in names:
            if name not in by_name:
                raise ExperimentError(
                    f"zip: {shown(name)} is no axis of this grid",
                    did_you_mean(name, {axis: axis for axis in by_name})
                    or f"Its axes are {', '.join(by_name) or 'none'}.",
                )
            if name in seen:
                raise ExperimentError(f"zip: {name} is written twice", "Keep one of the two.")
            seen.add(name)
        lengths = {name: len(by_name[name].values) for name in names}
        if len(set(lengths.values())) > 1:
            several = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ExperimentError(
                f"zip: axes that move together have as many values each, and {several}",
                "Make them as long as each other, or take one out of zip.",
            )
