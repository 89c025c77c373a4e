"""Compute one cell: what a worker does, wherever it is.

    compute(job, root)      # the cell's address; what happened is in ROOT/.cells/ADDRESS.json

It may be called twice, at the same time or after a worker died: the cell is computed once. A job
and what it returns are plain values, so that any kind of worker can be given one.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import JsonValue

from probe.errors import (
    ModelError,
    ProbeError,
    RecordingDamaged,
    RecordingNotFound,
    RunFailed,
    StoreError,
)
from probe.proof.replay import threads_of
from probe.reading.recording import Run
from probe.running.recorder import record_as, resume
from probe.settings.experiment import Experiment
from probe.settings.fields import from_home
from probe.settings.grid import Keep
from probe.studies.cells import DECIDING, Cell
from probe.studies.measures import measure
from probe.studies.models import conditions, held, model_key
from probe.studies.results import Results, unmeasured
from probe.system import exists
from probe.text import first_line, shorten
from probe.writing.files import replace, storing
from probe.writing.upkeep import held as held_recording
from probe.writing.upkeep import remove

# A recording of which one of these is said is made again. What the system does not read is whole.
LOST = (RecordingDamaged, RecordingNotFound, ModelError, StoreError)
RETRIES = 3  # after a worker died, before its cell counts as failed

_one_at_a_time = threading.RLock()  # a worker with several threads has one model
_conditions: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Job:
    """What a worker is given: a cell, what is wanted of it, and under which conditions."""

    cell: Cell
    conditions: Mapping[str, Any]
    keep: Keep = "all"
    measures: tuple[str, ...] = ()
    parent: Job | None = None
    launch: str = ""  # tells the workers that died in this launch from those of others
    retries: int = RETRIES

    def plain(self) -> dict[str, JsonValue]:
        """Return the job as plain values."""
        cell = self.cell
        return {
            "address": cell.address,
            "experiment": cell.experiment.resolved(),
            "title": cell.title,
            "conditions": dict(self.conditions),
            "keep": self.keep,
            "measures": list(self.measures),
            "parent": None if self.parent is None else self.parent.plain(),
            "launch": self.launch,
            "retries": self.retries,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Job:
        """Return the job that plain values describe."""
        parent = None if plain["parent"] is None else cls.of(plain["parent"])
        above = None if parent is None else parent.cell.address
        experiment = Experiment.model_validate(plain["experiment"])
        return cls(
            Cell(plain["address"], experiment, plain["title"], parent=above),
            plain["conditions"],
            plain["keep"],
            tuple(plain["measures"]),
            parent,
            plain["launch"],
            plain["retries"],
        )


def compute(job: Mapping[str, Any], root: str) -> str:
    """Make sure that a cell is there, or that its record says why not. Return its address.

    Raise StoreError if the record itself cannot be written.
    """
    return _computed(Job.of(job), Results(root))


def _computed(job: Job, results: Results) -> str:
    address = job.cell.address
    if job.parent is not None:
        _computed(job.parent, results)
    with _one_at_a_time, results.locked(address):
        if results.found(job.cell, job.keep, job.measures) is not None:
            return address
        began = time.monotonic()
        before = results.begin_try(address, job.launch)
        try:
            if before > job.retries:
                raise died(before)
            record = _Computing(job, results).record()
        except Exception as error:
            cause, remedy = _said(error)
            record = {
                "status": "failed",
                "cause": cause,
                "remedy": remedy,
                "run": _run_of(job.cell, results),
                "seconds": time.monotonic() - began,
                "measures": {},
            }
        results.write({"address": address, "parent": job.cell.parent, "keep": job.keep, **record})
        results.end_try(address)
    return address


def died(times: int) -> RunFailed:
    """Return the error for a cell whose workers died."""
    often = "once" if times == 1 else f"{times} times"
    return RunFailed(
        f"The worker that computed it died {often}: killed from outside, or out of memory.",
        "Make the cell smaller (images, height and width, capture), or give a worker more memory.",
    )


def _said(error: Exception) -> tuple[str, str]:
    """Return cause and remedy of an error."""
    if isinstance(error, ProbeError):
        return error.cause, error.remedy
    if isinstance(error, MemoryError):
        return "The worker has no memory left.", "Make the cell smaller, or take a larger machine."
    return (
        f"{type(error).__name__}: {shorten(first_line(error), 300)}",
        "Record this cell alone with probe run --debug to see where it comes from.",
    )


def _run_of(cell: Cell, results: Results) -> str | None:
    path = results.run_path(cell)
    return path.name if exists(path / "zarr.json") else None


@dataclass
class _Computing:
    """One cell being computed, under its lock."""

    job: Job
    results: Results
    seconds: float = field(default=0.0, init=False)

    def record(self) -> dict[str, Any]:
        """Compute the cell, measure it, and return what its record says."""
        job, results, address = self.job, self.results, self.job.cell.address
        known = results.record(address) or {}
        measured = dict(known.get("measures") or {}) if known.get("status") == "complete" else {}
        parent = self._parent()
        run = self._kept() or self._made(parent)
        kept = exists(results.run_path(job.cell))
        measured |= measure(run, parent, unmeasured(job.measures, measured))
        if job.keep == "summary":
            leave_summary(run, results.file(address, ".png"), results.file(address, ".npz"))
        return {
            "status": "complete",
            "cause": "",
            "remedy": "",
            "run": results.run_path(job.cell).name if kept else None,
            "seconds": self.seconds or known.get("seconds", 0.0),
            "measures": measured,
        }

    def _parent(self) -> Run | None:
        if self.job.parent is None:
            return None
        parent = self.job.parent.cell
        record = self.results.record(parent.address) or {}
        if record.get("status") != "complete":
            cause = str(record.get("cause", "it is not there"))
            raise RunFailed(
                f"The run without edits that it is compared with failed: {cause}",
                str(record.get("remedy", "")),
            )
        return Run(self.results.run_path(parent))

    def _kept(self) -> Run | None:
        """Return the cell's recording: as it is, gone on with, or None if there is none."""
        path = self.results.run_path(self.job.cell)
        if not exists(path):
            return None
        model, _ = self._model()
        try:
            run = Run(path)
            if run.status == "complete":
                return run
            began = time.monotonic()
            with threads_of(run):
                run = resume(run, model, progress=False)
            self.seconds = time.monotonic() - began
            return run
        except LOST as error:  # what a killed worker left, and what cannot go on
            if isinstance(error.__cause__, OSError) and isinstance(error, StoreError):
                raise  # a full disk: what is recorded can go on when there is room
            with held_recording(path):
                remove(path)
            return None

    def _made(self, parent: Run | None) -> Run:
        """Record the cell: into files if it is kept, else in memory.

        It has as many threads as its parent had, with which it is compared: bits depend on them.
        """
        job, in_files = self.job, self.job.keep == "all"
        model, weights = self._model()
        experiment = job.cell.experiment.model_copy(
            update={"output": from_home(str(self.results.root))}
        )
        began = time.monotonic()
        with contextlib.nullcontext() if parent is None else threads_of(parent):
            run = record_as(
                model, experiment, job.cell.run_name, weights=weights, in_files=in_files
            )
        self.seconds = time.monotonic() - began
        return run

    def _model(self) -> tuple[Any, str]:
        """Return the model. Raise RunFailed if this worker would give other bits than planned."""
        experiment = self.job.cell.experiment
        if (key := model_key(experiment)) not in _conditions:
            _conditions[key] = conditions(experiment)
        here = _conditions[key]
        for name in DECIDING:
            planned, own = self.job.conditions[name], here[name]
            if planned != own:
                raise RunFailed(
                    f"This worker has other {name}: {_differing(own, planned)}.",
                    "Give all workers the same versions, model and kind of device.",
                )
        return held(experiment)


def _differing(own: Any, planned: Any) -> str:
    if not isinstance(own, Mapping):
        return f"{own}, and the cell is planned with {planned}"
    parts = [
        f"{name} {own.get(name)}, and the cell is planned with {planned.get(name)}"
        for name in own
        if own.get(name) != planned.get(name)
    ]
    return "; ".join(parts)


def leave_summary(run: Run, picture: Path, arrays: Path) -> None:
    """Write a run's pictures side by side, and its summary: images, last latents, mean maps."""
    images = run.images.values
    values: dict[str, Any] = {
        "images": images,
        "final_latents": run.variable("latents/final_latents").values,
    }
    try:
        maps = run.word_overview()
        values |= {"words": maps["word"].values.astype(str), "word_maps": maps.values}
    except (RecordingNotFound, LookupError):  # attention was not recorded
        pass
    png, npz = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(png, "PNG")
    np.savez_compressed(npz, **values)
    with storing(arrays):
        replace(picture, [png.getvalue()], False)
        replace(arrays, [npz.getvalue()], False)
