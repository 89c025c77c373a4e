"""What the cells of all grids leave in one folder, and who is computing which of them.

    results = Results("runs")
    results.record(address)         # what a finished cell says of itself, or None
    results.run_path(cell)          # its recording, if it was kept
    with results.locked(address):   # nobody else computes it meanwhile
        ...

Recordings lie in the folder as any others. Beside them, in `.cells`, a cell leaves ADDRESS.json,
and ADDRESS.png and ADDRESS.npz where its recording is not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from probe.errors import ProbeError, RecordingBusy
from probe.format.study import CELLS, CellRecord
from probe.reading.files import read_json
from probe.settings.fields import expand_home
from probe.settings.grid import Keep
from probe.studies.cells import Cell
from probe.system import exists
from probe.writing.files import check_output_folder, make_folders, remove, replace, storing
from probe.writing.locks import Lock

ROOT = "zarr.json"  # without it a folder is no recording
PATIENCE = 0.1  # seconds between two looks at a cell that somebody else computes
MAX_RECORD = 10**7  # bytes of what a cell says of itself


class Results:
    """What the cells of all grids leave in one folder."""

    def __init__(self, root: str | Path):
        self.root = expand_home(root)
        self.cells = self.root / CELLS

    def prepare(self) -> None:
        """Make the folders. Raise ExperimentError if nothing can be written there, StoreError."""
        check_output_folder(self.cells)
        with storing(self.cells):
            make_folders(self.cells, False)

    def run_path(self, cell: Cell) -> Path:
        """Return the path of a cell's recording, which is there if the cell was kept."""
        return self.root / f"{cell.run_name}.zarr"

    def file(self, address: str, ending: str) -> Path:
        """Return the path of what a cell leaves beside its recording: .json, .png, .npz."""
        return self.cells / f"{address}{ending}"

    def record(self, address: str) -> dict[str, Any] | None:
        """Return what a finished cell says of itself, or None if there is nothing to be read."""
        record = self._read(address, ".json")
        try:
            CellRecord.model_validate(record)
        except ValidationError:
            return None
        return record if record["address"] == address else None

    def write(self, record: Mapping[str, Any]) -> None:
        """Write what a cell says of itself. Raise StoreError."""
        path = self.file(record["address"], ".json")
        with storing(path):
            replace(path, [json.dumps(record, allow_nan=False).encode()], False)

    def found(self, cell: Cell, keep: Keep, measures: Sequence[str]) -> dict[str, Any] | None:
        """Return what a cell says of itself if nothing is missing of it that a grid wants."""
        record = self.record(cell.address)
        if record is None or record.get("status") != "complete":
            return None
        if unmeasured(measures, record.get("measures") or {}):
            return None
        there = keep == "metrics"
        there = there or (bool(record.get("run")) and exists(self.run_path(cell) / ROOT))
        there = there or (keep == "summary" and exists(self.file(cell.address, ".npz")))
        return record if there else None

    @contextlib.contextmanager
    def locked(self, address: str) -> Iterator[None]:
        """Hold a cell: nobody else computes it meanwhile. Wait for whoever does."""
        lock = Lock(self.file(address, ".json"))
        while True:
            try:
                with storing(self.cells):
                    lock.acquire()
                break
            except RecordingBusy:
                time.sleep(PATIENCE)
        try:
            yield
        finally:
            lock.release()

    # --- workers that died ---

    def begin_try(self, address: str, launch: str) -> int:
        """Note that a launch begins a cell. Return how often it began it and never ended it."""
        path, tries = self.file(address, ".tries"), self._read(address, ".tries")
        before = int(tries.get("count", 0)) if tries.get("launch") == launch else 0
        with storing(path):
            replace(path, [json.dumps({"launch": launch, "count": before + 1}).encode()], False)
        return before

    def tries(self, address: str, launch: str) -> int:
        """Return how often a launch began a cell and never ended it."""
        tries = self._read(address, ".tries")
        return int(tries.get("count", 0)) if tries.get("launch") == launch else 0

    def end_try(self, address: str) -> None:
        """Note that a cell has ended, well or not."""
        with contextlib.suppress(OSError):
            remove(self.file(address, ".tries"), False)

    def _read(self, address: str, ending: str) -> dict[str, Any]:
        name = f"{address}{ending}"
        if not os.path.lexists(self.cells / name):
            return {}
        try:
            value = read_json(self.cells, name, MAX_RECORD)
        except (OSError, ValueError, ProbeError):
            return {}
        return value if isinstance(value, dict) else {}


def unmeasured(names: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the measures that a cell lacks, and those that failed."""
    return [name for name in names if name not in values or failed(values[name])]


def failed(value: Any) -> bool:
    """Return whether a measure's value says why there is none."""
    return isinstance(value, Mapping) and "cause" in value
