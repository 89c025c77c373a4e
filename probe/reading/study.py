"""Studies: the cells of a grid, opened as one, also while some are missing.

    study = open_study("runs/guidance-grid-1a2b3c4d.study")
    study.dataset                               # xarray: axes as dimensions, measures as variables
    study.open(guidance_scale=5, seed=0)        # the recording of one cell
    study.save("guidance.csv")                  # or .parquet, .zarr

A study is somebody else's file: sizes are limited, and nothing outside of its folder is opened.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from PIL import Image
from pydantic import BaseModel, ValidationError

from probe.arguments import in_words
from probe.errors import (
    ExperimentError,
    ProbeError,
    RecordingDamaged,
    RecordingNotFound,
)
from probe.format.schema import near
from probe.format.study import CELLS, ENDING, MOST_CELLS, STUDY, CellFile, CellRecord, StudyFile
from probe.reading.files import entry_is_link, no_longer, read_file, refuse_link
from probe.reading.recording import Run
from probe.settings.fields import expand_home
from probe.system import exists, reading
from probe.text import printable, shorten

AGAIN = "Run its grid again, or remove its folder."
MOST_BYTES, MOST_PARTS = 64 * 2**20, 2_000_000  # of study.json
MOST_OF_A_CELL = 2**20  # bytes of what a cell says of itself
MOST_OF_A_PICTURE, MOST_PIXELS = 64 * 2**20, 64 * 2**20
Model = TypeVar("Model", bound=BaseModel)
Index = tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """A cell of a study, as it is now.

    `status` is complete, failed, missing, or unreadable; `cause` and `remedy` say why it is not
    complete. `record` is what it says of itself.
    """

    index: Index
    labels: dict[str, str]
    planned: CellFile
    status: str
    cause: str = ""
    remedy: str = ""
    record: CellRecord | None = None

    @property
    def title(self) -> str:
        """Return the cell as people name it: guidance_scale=3, seed=0."""
        return ", ".join(f"{name}={shorten(label, 60)}" for name, label in self.labels.items())

    @property
    def run_name(self) -> str | None:
        """Return the file name of its recording, if it was kept."""
        return None if self.record is None else self.record.run


@dataclass(frozen=True)
class Study:
    """A study, opened. Cells that are finished later are seen when it is opened again."""

    path: Path
    file: StudyFile

    @property
    def name(self) -> str:
        """Return the name of the grid."""
        return self.file.name

    @property
    def folder(self) -> Path:
        """Return the folder in which the recordings of the cells lie."""
        return self.path.parent

    @functools.cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Return the labels of each axis that is a dimension, in the order of the grid."""
        return {axis.name: tuple(axis.labels) for axis in self.file.axes}

    @property
    def shape(self) -> tuple[int, ...]:
        """Return how many labels each axis has."""
        return tuple(len(labels) for labels in self.axes.values())

    @functools.cached_property
    def planned(self) -> dict[Index, CellFile]:
        """Return the cells as they were planned, by their place on the axes."""
        return {tuple(cell.index or ()): cell for cell in self.file.cells}

    @functools.cached_property
    def cells(self) -> dict[Index, Cell]:
        """Return every cell as it is now, by its place on the axes."""
        return {index: self.cell(index) for index in sorted(self.planned)}

    def parent_of(self, cell: Cell) -> Cell | None:
        """Return the run without edits that a cell is compared with, or None if it has no edits.

        It may be a cell of the grid. If not, its `index` is empty.
        """
        for planned in (*self.file.cells, *self.file.parents):
            if planned.address == cell.planned.parent:
                return self._now(tuple(planned.index or ()), {}, planned)
        return None

    def cell(self, index: Index) -> Cell:
        """Return one cell as it is now."""
        labels = {
            one.name: one.labels[at]
            for axis, at in zip(self.file.axes, index, strict=True)
            for one in (axis, *axis.zipped)
        }
        return self._now(index, labels, self.planned[index])

    def parent_outside(self, index: Index) -> Cell | None:
        """Return the unedited run that a cell is compared with, if it is no cell of the study."""
        planned = self._outside.get(self.planned[index].parent or "")
        return None if planned is None else self._now((), {}, planned)

    @functools.cached_property
    def _outside(self) -> dict[str, CellFile]:
        return {cell.address: cell for cell in self.file.parents}

    def _now(self, index: Index, labels: dict[str, str], planned: CellFile) -> Cell:
        record: CellRecord | None = None
        try:
            record = self._record(planned.address)
            status = record.status
        except FileNotFoundError:
            return Cell(index, labels, planned, "missing", "It was not computed yet.", AGAIN)
        except ProbeError as error:
            return Cell(index, labels, planned, "unreadable", error.cause, AGAIN)
        return Cell(index, labels, planned, status, record.cause or "", record.remedy or "", record)

    def _record(self, address: str) -> CellRecord:
        name = f"{CELLS}/{address}.json"
        raw = read_file(self.folder, name, no_longer(self.folder, name, MOST_OF_A_CELL))
        record = _valid(CellRecord, raw, self.folder / name)
        if record.address != address:
            raise _refuse(self.folder / name, "it speaks of another cell")
        return record

    # --- one cell ---

    def place(self, where: Mapping[str, Any] | None = None, **labels: Any) -> Index:
        """Return the place of a cell by the label or the value on each axis.

        An axis with one label may be left out. Dotted names go into a mapping:
        `study.place({"edits.0.amount": 0.5}, seed=0)`. Raise ExperimentError.
        """
        index: dict[int, int] = {}
        for name, wanted in {**(where or {}), **labels}.items():
            axis, at = self.position(name, wanted)
            if index.get(axis, at) != at:
                raise self._never(name, wanted)
            index[axis] = at
        left = [
            axis.name
            for position, axis in enumerate(self.file.axes)
            if position not in index and len(axis.labels) > 1
        ]
        if left:
            raise ExperimentError(
                f"{', '.join(left)}: no label is given.", "Give one for each axis: seed=0."
            )
        return tuple(index.get(position, 0) for position in range(len(self.file.axes)))

    def position(self, name: str, wanted: Any) -> tuple[int, int]:
        """Return the number of an axis, and where a label or a value lies on it.

        `name` may be that of an axis that moves with another. Raise ExperimentError.
        """
        known = {
            one.name: (number, one)
            for number, axis in enumerate(self.file.axes)
            for one in (axis, *axis.zipped)
        }
        if name not in known:
            raise ExperimentError(
                f"{self.name} has no axis {in_words(name)}.", near(str(name), list(known))
            )
        number, axis = known[name]
        at = _position(wanted, axis.labels, axis.values)
        if at is None:
            raise self._never(name, wanted)
        return number, at

    def _never(self, name: str, wanted: Any) -> ExperimentError:
        axes = [one for axis in self.file.axes for one in (axis, *axis.zipped)]
        labels = next(one.labels for one in axes if one.name == name)
        return ExperimentError(
            f"{name} is never {in_words(wanted)} there.",
            f"Choose from: {shorten(', '.join(labels), 200)}.",
        )

    def open(self, where: Mapping[str, Any] | None = None, **labels: Any) -> Run:
        """Return the recording of a cell, by its label or its value on each axis; see `place`.

        Raise ExperimentError for a label that is none, RecordingNotFound if there is no recording:
        the error says whether the cell is missing, failed, or was not kept.
        """
        return self.run_of(self.cell(self.place(where, **labels)))

    def run_of(self, cell: Cell) -> Run:
        """Return the recording of a cell. Raise RecordingNotFound, RecordingDamaged."""
        title = cell.title or "the cell"
        if cell.status != "complete":
            raise RecordingNotFound(f"{title} is {cell.status}: {cell.cause}", cell.remedy)
        if cell.run_name is None:
            keep = cell.record.keep if cell.record is not None else ""
            raise RecordingNotFound(
                f"{title} left no recording (keep: {keep}).", "Run its grid with keep: all."
            )
        path = self.folder / cell.run_name
        if path.is_symlink():
            raise refuse_link(self.folder, cell.run_name)
        if not exists(path):
            raise RecordingNotFound(f"The recording of {title} is gone.", AGAIN)
        return Run(path)

    def picture(self, cell: Cell) -> np.ndarray | None:
        """Return the pictures of a cell side by side, or None if it left none.

        *Shape:* (y, x, rgb) uint8. Raise RecordingDamaged.
        """
        if cell.status != "complete":
            return None
        if cell.run_name is None:
            return self._drawn(f"{CELLS}/{cell.planned.address}.png")
        if (drawn := self._drawn(f"{cell.run_name}/picture.png")) is not None:
            return drawn
        try:
            images = self.run_of(cell).images.values
        except RecordingNotFound:
            return None
        return np.concatenate(list(images), axis=1)

    def _drawn(self, name: str) -> np.ndarray | None:
        """Return a PNG file below the folder as pixels, or None if it is not there."""
        try:
            raw = read_file(self.folder, name, no_longer(self.folder, name, MOST_OF_A_PICTURE))
        except FileNotFoundError:
            return None
        try:
            with Image.open(io.BytesIO(raw), formats=("PNG",)) as picture:
                if math.prod(picture.size) > MOST_PIXELS:
                    raise ValueError
                return np.asarray(picture.convert("RGB"))
        except Exception as error:  # Pillow raises what it likes of a file that is no picture
            raise _refuse(self.folder / name, "it is no picture that can be read") from error

    # --- all of them ---

    @functools.cached_property
    def dataset(self) -> xr.Dataset:
        """Return the study as one dense dataset: axes as dimensions, labels as coordinates.

        The variables are the measures, `status`, `cause`, `seconds` and `run`. A measure is NaN
        where its cell is missing or failed, or the measure failed; `cause` says why. A measure by
        step has the dimension `step` too, one by label `word`, or a dimension of its own. Raise
        RecordingDamaged.
        """
        from probe.reading.study_dataset import dataset_of

        return dataset_of(self)

    def save(self, path: str | Path) -> Path:
        """Write the dataset into a file: `.zarr`, `.csv` (a row a cell) or `.parquet`.

        Raise ExperimentError for another ending and a zarr store that is there, StoreError.
        """
        from probe.reading.study_dataset import save

        return save(self, path)

    def counts(self) -> dict[str, int]:
        """Return how many cells there are by status."""
        found: dict[str, int] = {}
        for cell in self.cells.values():
            found[cell.status] = found.get(cell.status, 0) + 1
        return found

    def __repr__(self) -> str:
        axes = ", ".join(f"{printable(name)}: {len(labels)}" for name, labels in self.axes.items())
        counted = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        return f"<Study {printable(self.name)} ({axes or 'no axes'}; {counted})>"


def open_study(path: str | Path) -> Study:
    """Open a study: its folder, or the study.json in it. Cells may be missing.

    Raise RecordingNotFound if there is none, RecordingDamaged if it cannot be trusted.
    """
    if not isinstance(path, str | os.PathLike):
        raise ExperimentError(
            f"path is {in_words(path)}, which is no path.", "Give the folder of a study."
        )
    folder = expand_home(str(path))
    folder = (folder.parent if folder.name == STUDY else folder).absolute()
    with reading(folder, "The study is"):
        try:
            raw = read_file(folder, STUDY, no_longer(folder, STUDY, MOST_BYTES))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RecordingNotFound(
                f"{printable(str(path))} is no study.",
                "Name a folder that ends in .study, beside the recordings of its cells.",
            ) from error
        except RecordingDamaged as error:
            raise RecordingDamaged(error.cause, AGAIN) from error
    if sum(map(raw.count, (b"{", b"[", b","))) > MOST_PARTS:
        raise _refuse(folder, f"{STUDY} has too many parts")
    file = _valid(StudyFile, raw, folder / STUDY)
    _check(folder, file)
    return Study(folder, file)


def find_study(name: str | Path, runs: str | Path = "runs") -> Path | None:
    """Return the path of a study by its path, or the beginning of its name in the folder `runs`.

    Return None if there is none, or if several begin so.
    """
    path = Path(name)
    if path.name == STUDY or exists(path / STUDY):
        return path
    matching = [one for one in studies_in(runs) if one.name.startswith(str(name))]
    return matching[0] if len(matching) == 1 else None


def studies_in(folder: str | Path = "runs") -> list[Path]:
    """Return the paths of the studies in a folder, the newest first. Links are left out.

    Raise RecordingUnreadable if the system does not list the folder.
    """
    with reading(folder, "The studies in it are"):
        if not Path(folder).is_dir():
            return []
        with os.scandir(folder) as entries:
            there = [
                (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
                for entry in entries
                if entry.name.endswith(ENDING)
                and entry.name[0] != "."
                and not entry_is_link(entry)
                and entry.is_dir(follow_symlinks=False)
            ]
    return [Path(folder) / name for _, name in sorted(there, reverse=True)]


def _check(folder: Path, file: StudyFile) -> None:
    """Raise RecordingDamaged unless axes and cells fit each other."""
    names = [one.name for axis in file.axes for one in (axis, *axis.zipped)]
    if len(set(names)) != len(names):
        raise _refuse(folder, "two of its axes have one name")
    for axis in file.axes:
        for one in (axis, *axis.zipped):
            if len(set(axis.labels)) != len(axis.labels) or not (
                len(one.labels) == len(one.values) == len(axis.labels)
            ):
                raise _refuse(folder, f"the labels of {printable(one.name)} do not fit its values")
            if one.zipped and one is not axis:
                raise _refuse(folder, "an axis that is zipped has zipped axes of its own")
    shape = [len(axis.labels) for axis in file.axes]
    if math.prod(shape) > MOST_CELLS:
        raise _refuse(folder, f"it claims more than {MOST_CELLS} cells")
    places = {tuple(cell.index or ()) for cell in file.cells}
    if len(places) != len(file.cells):
        raise _refuse(folder, "two of its cells lie in one place")
    for place in places:
        if len(place) != len(shape) or not all(
            0 <= at < most for at, most in zip(place, shape, strict=True)
        ):
            raise _refuse(folder, "a cell lies outside of its axes")


def _position(wanted: Any, labels: list[str], values: list[Any]) -> int | None:
    """Return where a label or a value is on an axis, or None."""
    if isinstance(wanted, np.generic):
        wanted = wanted.item()
    if isinstance(wanted, str) and wanted in labels:
        return labels.index(wanted)
    for at, value in enumerate(values):
        if value == wanted and isinstance(value, bool) == isinstance(wanted, bool):
            return at
    return None


def _valid(model: type[Model], raw: bytes, path: Path) -> Model:
    """Return a JSON file as what it should be. Raise RecordingDamaged."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        what = f"its {shorten(printable(where))} is not what a study has there" * bool(where)
        raise _refuse(path, what or "it is not JSON that can be read") from error


def _refuse(path: Path, what: str) -> RecordingDamaged:
    return RecordingDamaged(f"{printable(str(path))} is damaged: {what}.", AGAIN)
