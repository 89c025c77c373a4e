"""Run a grid: look at every cell first, then compute what is missing, and write what came of it.

    study = run_study("experiments/guidance-grid.yaml", workers=2)

    plan = plan_study(load_grid("experiments/guidance-grid.yaml"), Here())
    plan.missing, plan.calls, plan.bytes       # nothing has run yet

What a study is made of lies in the grid's folder `output`: recordings, `.cells/` with what each
cell says of itself, and NAME-HASH.study/study.json with the axes and the address of every cell.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probe.arguments import check_options
from probe.errors import ExperimentError, TooLarge
from probe.format.study import ENDING, STUDY
from probe.output import tell
from probe.reading.study import Study, open_study
from probe.running.planning import free_room, size_text
from probe.settings.grid import Grid, GridCell, Keep, Wrong, load_grid
from probe.stopping import breakable, cleanly
from probe.studies.cells import Cell, addressed, in_order
from probe.studies.compute import RETRIES, Job
from probe.studies.models import model_key
from probe.studies.results import Results, failed
from probe.studies.survey import OF_RECORD, Size, survey
from probe.studies.workers import Here, Processes, Workers, error_of
from probe.terminal import without_home
from probe.text import shown
from probe.writing import files

WHOLE = (1, 1)
Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyPlan:
    """A grid about to be computed: its cells, which of them are missing, and how large they are.

    `cells` has the parents that are in no cell of the grid too. Only those of this shard count.
    """

    grid: Grid
    results: Results
    cells: tuple[Cell, ...]
    missing: tuple[Cell, ...]
    sizes: Mapping[str, Size]
    conditions: Mapping[str, Any]
    parents: frozenset[str]
    seconds: Mapping[str, float] = field(default_factory=dict)  # a call, by finished cell

    @property
    def own(self) -> int:
        """Return how many cells of this shard there are, with the parents that it needs."""
        return len(self.missing) + len(self.seconds)

    @property
    def path(self) -> Path:
        """Return the folder of the study, named after the grid and the addresses of its cells."""
        whole = [[cell.index, cell.address] for cell in self.cells if cell.index is not None]
        digest = hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:8]
        return self.results.root / f"{self.grid.name}-{digest}{ENDING}"

    @property
    def calls(self) -> int:
        """Return how many model calls are to be made."""
        return sum(self.sizes[cell.address].calls for cell in self.missing)

    @property
    def bytes(self) -> int:
        """Return about how many bytes are to be written."""
        return sum(self.bytes_of(cell) for cell in self.missing)

    def keep_of(self, cell: Cell) -> Keep:
        """Return what a cell leaves behind. Parents stay: others are compared with them."""
        return "all" if cell.address in self.parents else self.grid.keep

    def measures_of(self, cell: Cell) -> tuple[str, ...]:
        """Return what is measured of a cell: nothing of a parent that is in no cell."""
        return () if cell.index is None else self.grid.measures

    def bytes_of(self, cell: Cell) -> int:
        """Return about how many bytes a cell leaves behind."""
        size, keep = self.sizes[cell.address], self.keep_of(cell)
        return {"all": size.bytes, "summary": size.summary, "metrics": OF_RECORD}[keep]

    def jobs(self, launch: str, retries: int) -> list[dict[str, Any]]:
        """Return what the workers are given, in order."""
        by_address = {cell.address: cell for cell in self.cells}

        def job(cell: Cell) -> Job:
            parent = None if cell.parent is None else job(by_address[cell.parent])
            return Job(
                cell,
                self.conditions[model_key(cell.experiment)],
                self.keep_of(cell),
                self.measures_of(cell),
                parent,
                launch,
                retries,
            )

        return [job(cell).plain() for cell in self.missing]


def plan_study(grid: Grid, workers: Workers, shard: tuple[int, int] = WHOLE) -> StudyPlan:
    """Look at every cell of a grid, and find those that are missing.

    `shard` (i, n) is the i-th of n parts, counted from 1. Raise UserError, with the cells that
    cannot be, before anything runs.
    """
    cells = grid.cells()
    plain = [cell.experiment.resolved() for cell in cells]
    surveyed = workers.call(survey, plain, list(grid.measures))
    sizes = _sizes(cells, surveyed["sizes"])
    whole = addressed(cells, surveyed["conditions"])
    by_address = {cell.address: sizes[cell.index] for cell in whole if cell.index is not None}
    for cell in whole:
        if cell.parent is not None:  # the same run, without edits
            by_address.setdefault(cell.parent, by_address[cell.address])
    plan = StudyPlan(
        grid,
        Results(grid.experiment.output),
        tuple(whole),
        (),
        by_address,
        surveyed["conditions"],
        frozenset(cell.parent for cell in whole if cell.parent is not None),
    )
    missing, seconds = [], {}
    for cell in _part(in_order(whole), *shard):
        record = plan.results.found(cell, plan.keep_of(cell), plan.measures_of(cell))
        if record is None:
            missing.append(cell)
        else:
            seconds[cell.address] = (record.get("seconds") or 0.0) / by_address[cell.address].calls
    return replace(plan, missing=tuple(missing), seconds=seconds)


def _sizes(cells: Sequence[GridCell], sizes: Sequence[Any]) -> dict[Any, Size]:
    """Return the size of each cell by its index. Raise UserError, with the cells that cannot be."""
    wrong, by_index = Wrong(), {}
    for cell, size in zip(cells, sizes, strict=True):
        if "error" in size:
            wrong.add(cell.title, error_of(*size["error"]))
        else:
            by_index[cell.index] = Size(**size)
    wrong.raise_first()
    return by_index


def _part(cells: Sequence[Cell], number: int, among: int) -> Sequence[Cell]:
    return cells[len(cells) * (number - 1) // among : len(cells) * number // among]


def read_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of a shard that is written i/n. Raise ExperimentError."""
    number, slash, among = text.partition("/")
    fits = slash and number.isdecimal() and among.isdecimal()
    if not fits or not 1 <= int(number) <= int(among):
        raise ExperimentError(
            f"shard: {shown(text)} is no part of a grid", "Write 1/4 to 4/4 for four parts."
        )
    return int(number), int(among)


def check_total(plan: StudyPlan, limit: int | None) -> None:
    """Raise TooLarge if what is missing takes more than a limit, or than the disk has room for."""
    if not plan.missing:
        return
    largest = max(plan.missing, key=plan.bytes_of)
    free = free_room(plan.results.root)
    for most, what in ((limit, "--max-bytes"), (free, "the room on the disk")):
        if most is not None and plan.bytes > most:
            raise TooLarge(
                f"The {len(plan.missing)} cells would take {size_text(plan.bytes)}, more than "
                f"{what}: {size_text(most)}.",
                f"The largest is {largest.title} with {size_text(plan.bytes_of(largest))}, most of "
                f"it {plan.sizes[largest.address].largest}: capture less, or keep a summary.",
            )


def write_study(plan: StudyPlan) -> Path:
    """Write the study's own file, and return its folder. Raise ExperimentError, StoreError."""
    plan.results.prepare()
    grid, conditions = plan.grid, list(plan.conditions.values())
    described = {
        "format": 1,
        "name": grid.name,
        "grid": grid.resolved(),
        "axes": [
            {
                **first.model_dump(mode="json"),
                "zipped": [axis.model_dump(mode="json") for axis in others],
            }
            for first, *others in grid.dimensions
        ],
        "cells": [_described(cell) for cell in plan.cells if cell.index is not None],
        "parents": [_described(cell) for cell in plan.cells if cell.index is None],
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "versions": conditions[0]["versions"],
        "weights": {one["model"]: one["weights"] for one in conditions},
    }
    with files.storing(plan.path):
        files.make_folders(plan.path, False)
        text = json.dumps(described, ensure_ascii=False, allow_nan=False)
        files.replace(plan.path / STUDY, [text.encode()], False)
    return plan.path


def _described(cell: Cell) -> dict[str, Any]:
    return {
        "index": None if cell.index is None else list(cell.index),
        "address": cell.address,
        "parent": cell.parent,
        "run": f"{cell.run_name}.zarr",
        "experiment": cell.experiment.resolved(),
    }


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of the cells that were missing."""

    computed: int = 0
    failed: list[tuple[str, str, str]] = field(default_factory=list)  # the cell, cause, remedy
    seconds: float = 0.0


def carry_out(plan: StudyPlan, workers: Workers, say: Say, retries: int = RETRIES) -> Outcome:
    """Compute what is missing. A cell that fails is listed, and does not stop the others.

    A KeyboardInterrupt leaves finished cells, and one that the same call goes on with.
    """
    outcome, began, calls = Outcome(), time.monotonic(), 0
    titles = {cell.address: cell for cell in plan.missing}
    jobs = plan.jobs(uuid.uuid4().hex[:8], retries)
    with cleanly(), breakable():
        for address in workers.each(jobs, str(plan.results.root)):
            cell, record = titles[address], plan.results.record(address)
            calls += plan.sizes[address].calls
            outcome.seconds = time.monotonic() - began
            done = outcome.computed + len(outcome.failed) + 1
            cause, remedy = _problem(record)
            if not cause:
                outcome.computed += 1
                what = duration(record["seconds"] if record else 0)
            else:
                outcome.failed.append((cell.title, cause, remedy))
                what = f"failed: {cause}"
            left = outcome.seconds / calls * (plan.calls - calls)
            more = f"; {duration(left)} left" if done < len(plan.missing) else ""
            say(f"[{done}/{len(plan.missing)}] {cell.title}: {what}{more}")
    return outcome


def _problem(record: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return cause and remedy of what went wrong with a cell, or empty texts."""
    if record is None:
        return (
            "its worker says it is there, and nothing is to be seen of it.",
            "Give workers and this machine the same folder: --set output=FOLDER.",
        )
    if record["status"] != "complete":
        return record["cause"], record["remedy"]
    for name, value in record["measures"].items():
        if failed(value):
            again = "Correct the measure; the same command measures again."
            return f"measure {name}: {value['cause']}", again
    return "", ""


def duration(seconds: float) -> str:
    """Return a time as people read it: 3.1 s, 4 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def workers_for(count: int, cluster: str | None, insecure: bool) -> Workers:
    """Return who computes: this process, several, or a cluster's. Raise ExperimentError."""
    if count < 1:
        raise ExperimentError(f"workers: there cannot be {count}.", "Write 1 or more.")
    if cluster is not None:
        if count > 1:
            raise ExperimentError(
                "workers and cluster are both given: a cluster has workers of its own.",
                "Leave one of them out.",
            )
        from probe.studies.cluster import Cluster

        crew: Workers = Cluster(cluster, insecure)
        return crew
    return Here() if count == 1 else Processes(count)


def run_study(
    grid: Grid | str | Path | Mapping[str, Any],
    *,
    quick: bool = False,
    shard: str = "1/1",
    workers: int = 1,
    cluster: str | None = None,
    insecure: bool = False,
    max_bytes: int | None = None,
    retries: int = RETRIES,
    progress: bool = True,
    **changes: Any,
) -> Study:
    """Compute every cell of a grid that is missing, and return the study.

    A grid is a YAML file, a mapping or a `Grid`; `quick` takes the smaller one that it names, and
    `changes` are fields or axes (`**{"axes.seed": [0, 1]}`). `shard` i/n computes one part of n.
    `workers` are processes of this machine, `cluster` the address or the file of a dask scheduler.
    Cells that fail say so in the study.

    Raise UserError before anything runs.
    """
    most = check_options(max_bytes, progress=progress, quick=quick, insecure=insecure)
    loaded, part = load_grid(grid, quick=quick, **changes), read_shard(shard)
    say = (lambda line: tell(without_home(line))) if progress else (lambda _: None)
    with workers_for(workers, cluster, insecure) as crew:
        plan = plan_study(loaded, crew, part)
        check_total(plan, most)
        path = write_study(plan)
        carry_out(plan, crew, say, retries)
    return open_study(path)
