"""A folder with a study in it, as a grid leaves it, of synthetic recordings: no torch, no model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from probe.reading.recording import Run
from probe.settings.experiment import load_experiment
from probe.studies.measures import measure
from probe.testing.synthetic import synthetic_recording

MEASURES = ("l2", "psnr", "l2_by_step", "parts_at", "word_change")
AXES: dict[str, Sequence[Any]] = {"guidance_scale": [1.5, 3, 5], "seed": [0, 1]}
PROMPT = "a red cat"


def address_of(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_study(
    folder: Path,
    axes: Mapping[str, Sequence[Any]] = AXES,
    *,
    name: str = "guidance-grid",
    prompt: str = PROMPT,
    parent: Mapping[str, Any] | None = None,
    missing: Sequence[tuple[int, ...]] = (),
    failed: Sequence[tuple[int, ...]] = (),
    keep: str = "all",
    labels: Mapping[str, Sequence[str]] | None = None,
    measures: Sequence[str] = MEASURES,
    steps: int = 3,
    size: tuple[int, int] = (8, 8),
) -> Path:
    """Write the cells of a grid and its study.json, and return the study's folder.

    `parent` is what the parent of each cell has in the place of the cell's own settings.
    """
    cells = folder / ".cells"
    cells.mkdir(parents=True, exist_ok=True)
    planned, parents = [], {}

    def recorded(settings: Mapping[str, Any]) -> tuple[str, Run]:
        settings = {"prompt": prompt, "steps": steps, "size": size, **settings}
        address = address_of(settings)
        path = folder / f"run-{address}.zarr"
        if not path.exists():
            synthetic_recording(path, pictures=False, **settings)
        return address, Run(path)

    for index in itertools.product(*(range(len(values)) for values in axes.values())):
        at = zip(axes.items(), index, strict=True)
        settings = {name: values[position] for (name, values), position in at}
        address, run = recorded(settings)
        its_parent = None if parent is None else recorded({**settings, **parent})
        if its_parent is not None:
            parents[its_parent[0]] = _parent(cells, *its_parent)
        planned.append(
            {
                "index": list(index),
                "address": address,
                "parent": None if its_parent is None else its_parent[0],
                "run": run.path.name,
                "experiment": load_experiment({"prompt": prompt, **settings}).resolved(),
            }
        )
        if index not in missing:
            values = measure(run, None if its_parent is None else its_parent[1], measures)
            record = _record(run, address, keep, values, index in failed)
            (cells / f"{address}.json").write_text(json.dumps(record, allow_nan=False))
            if keep == "summary":
                Image.fromarray(run.images.values[0]).save(cells / f"{address}.png")
    study = {"format": 1, "name": name, "grid": {"name": name}, "cells": planned}
    study |= {"parents": [*parents.values()]}
    study |= {"axes": _axes(axes, labels or {}), "created": "2026-01-02T03:04:05.678+00:00"}
    path = folder / f"{name}-{address_of(study)[:8]}.study"
    path.mkdir()
    (path / "study.json").write_text(json.dumps(study))
    return path


def _parent(cells: Path, address: str, run: Run) -> dict[str, Any]:
    """Write what a parent says of itself, and return what the study says of it."""
    (cells / f"{address}.json").write_text(json.dumps(_record(run, address, "all", {}, False)))
    return {"index": None, "run": run.path.name, "address": address, "experiment": {}}


def _record(
    run: Run, address: str, keep: str, measures: dict[str, Any], failed: bool
) -> dict[str, Any]:
    """Return what a cell says of itself."""
    record: dict[str, Any] = {
        "address": address,
        "status": "complete",
        "cause": "",
        "remedy": "",
        "run": run.path.name if keep == "all" else None,
        "seconds": 1.5,
        "keep": keep,
        "measures": measures,
    }
    cause = "OutOfMemory: the device is out of memory"
    why: dict[str, Any] = {
        "cause": cause,
        "remedy": "Make it smaller.",
        "run": None,
        "measures": {},
    }
    return {**record, "status": "failed", **why} if failed else record


def _axes(
    axes: Mapping[str, Sequence[Any]], labels: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": axis,
            "labels": list(labels.get(axis, [str(value) for value in values])),
            "values": list(values),
            "zipped": [],
        }
        for axis, values in axes.items()
    ]


def change_study(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a study.json, and return the study's folder."""
    study = json.loads((path / "study.json").read_text())
    change(study)
    (path / "study.json").write_text(json.dumps(study))
    return path


def change_cell(path: Path, cell: str, **changes: Any) -> None:
    """Change what a cell says of itself."""
    file = path.parent / ".cells" / f"{cell}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
