"""Cells: experiments addressed by what decides their bits, and the order of computing them.

    address(experiment, conditions)              # 16 hex characters
    cells = addressed(grid.cells(), conditions)  # with the unedited runs that edits compare with

Two grids with the same experiment have the same cell, and compute it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from probe.errors import ExperimentError
from probe.reading.finding import find_run
from probe.settings.experiment import Experiment
from probe.settings.fields import expand_home
from probe.settings.grid import GridCell
from probe.studies.models import model_key

# Fields in the order of what it costs to change them.
COSTLY = ("model", "revision", "variant", "dtype", "device", "loras", "height", "width", "images")
# Fields that name a file, whose content decides bits.
OF_FILES = ("image", "prompt_embeds")

DECIDING = ("weights", "device", "dtype", "versions")


@dataclass(frozen=True)
class Cell:
    """An experiment with its address. `parent` is the address of the same run without edits."""

    address: str
    experiment: Experiment
    title: str = ""
    index: tuple[int, ...] | None = None  # None: a parent that is in no cell of the grid
    parent: str | None = None

    @property
    def run_name(self) -> str:
        """Return the name of its recording, without its ending."""
        return f"{self.experiment.run_name}-{self.address}"


def address(experiment: Experiment, conditions: Mapping[str, Any]) -> str:
    """Return 16 hex characters: a hash of all that decides what is recorded.

    `conditions` are weights, device type, dtype and versions. Raise ExperimentError for a file of
    the experiment that cannot be read.
    """
    fields = experiment.resolved()
    left_out = (*experiment.not_asked, "device", "dtype")
    relevant = {name: value for name, value in fields.items() if name not in left_out}
    if "edits" in relevant:
        relevant["edits"] = [_unlabelled(edit) for edit in relevant["edits"]]  # type: ignore[union-attr]
    files = {name: _digest_of(path) for name, path in _files(experiment)}
    there = {name: conditions[name] for name in DECIDING}
    text = json.dumps([relevant, there, files], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unlabelled(edit: Any) -> dict[str, JsonValue]:
    return {name: value for name, value in edit.items() if name != "label"}


def _files(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield the files that an experiment names, each with a name of its own."""
    for field in OF_FILES:
        if path := getattr(experiment, field, None):
            yield field, path
    for number, lora in enumerate(getattr(experiment, "loras", ())):
        yield f"loras.{number}", lora.path
    for number, edit in enumerate(experiment.edits):
        if path := getattr(edit, "file", None):
            yield f"edits.{number}.file", path
        donor = getattr(getattr(edit, "donor", None), "run", None)
        runs = (donor, getattr(edit, "toward", None), getattr(edit, "away", None))
        for at, run in enumerate(runs):
            if run:
                path = find_run(expand_home(run), expand_home(experiment.output))
                yield f"edits.{number}.run.{at}", str(path / "zarr.json")


_digests: dict[tuple[str, int, int], str] = {}  # by path, time and size: a file is read once


def _digest_of(name: str) -> str:
    path = expand_home(name)
    try:
        status = path.stat()
        key = str(path.absolute()), status.st_mtime_ns, status.st_size
        if key not in _digests:
            with path.open("rb") as file:
                _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return _digests[key]
    except OSError as error:
        raise ExperimentError(
            f"{name}: cannot be read ({error.strerror or error})", "Name a file that is there."
        ) from error


def addressed(cells: Sequence[GridCell], conditions: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of a grid with their addresses, then the parents that it lacks.

    `conditions` are those of each model, by its key. Raise ExperimentError for two cells that are
    the same run.
    """
    made: dict[str, Cell] = {}
    parents: dict[str, Cell] = {}
    for cell in cells:
        there, parent = conditions[model_key(cell.experiment)], None
        if cell.experiment.edits:
            unedited = cell.experiment.unedited
            parent = address(unedited, there)
            parents.setdefault(parent, Cell(parent, unedited, f"{cell.title}, without edits"))
        own = address(cell.experiment, there)
        made.setdefault(own, Cell(own, cell.experiment, cell.title, cell.index, parent))
        if made[own].index != cell.index:
            raise ExperimentError(
                f"{made[own].title}; {cell.title}: these two cells are the same run",
                "Change an axis so that each of its values changes what is recorded.",
            )
    return [*made.values(), *(parents[one] for one in parents if one not in made)]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Return cells in the order in which they are computed.

    What costs most to change is outermost: the model, then its LoRAs, then sizes. Parents come
    before what is compared with them.
    """
    ranks: dict[str, dict[str, int]] = {field: {} for field in COSTLY}

    def place(cell: Cell) -> tuple[Any, ...]:
        costs = []
        for field, known in ranks.items():
            value = repr(getattr(cell.experiment, field, None))
            costs.append(known.setdefault(value, len(known)))
        return (*costs, cell.parent is not None)

    return sorted(cells, key=place)
