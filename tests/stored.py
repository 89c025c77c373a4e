"""Recordings of synthetic numbers: the store knows nothing of torch or of a model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np

from probe.format.schema import ArraySpec, spec
from probe.reading.recording import Run
from probe.settings.experiment import Experiment
from probe.writing.store import RunWriter

ROOT = Path(__file__).parent.parent
NAMES = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from probe.errors import RecordingBusy, StoreError
from probe.format.schema import spec
from probe.writing.store import RunWriter
from stored import ATTRIBUTES, layout, put
"""
CALLS = 5
ATTRIBUTES: dict[str, Any] = {
    "format_version": 1,
    "created": "2026-01-02T03:04:05.678+00:00",
    "experiment": Experiment().resolved(),
    "environment": {"device": "cpu"},
    "model": {"name": "emojiworld", "dtype": "float32"},
    "scheduler": {"class": "DDIMScheduler", "config": {}},
    "prediction_type": "epsilon",
    "latent_convention": "variance_preserving",
}


def layout(maps: str = "float16") -> list[ArraySpec]:
    """Return a variable of every type and of every way of being written.

    They are written at once, a step at a time, or at the end.
    """
    grid = "attention/4x4"
    return [
        spec("", "step", value=np.arange(CALLS)),
        spec("", "sigma", value=np.linspace(14.6, 0.03, CALLS)),
        spec("", "committed", (CALLS,)),
        spec("latents", "latents", (CALLS, 1, 4, 8, 8), "float32"),
        spec("latents", "final_latents", (1, 4, 8, 8), "float32"),
        spec("images", "final", (1, 6, 9, 3)),
        spec(grid, "branch", value=["cond"]),
        spec(grid, "token", value=np.array([0, 1, -1])),
        spec(grid, "token_text", value=[["<|startoftext|>", "é ☃ \U0001f419", ""]]),
        spec(grid, "cross", (CALLS, 3, 1, 1, 2, 2, 4, 4), maps),
        spec(grid, "moments", (CALLS, 3, 1, 1, 2, 2, 3)),
        spec("cost", "peak_memory", ()),
    ]


def numbers(step: int, maps: str = "float16") -> dict[str, np.ndarray]:
    """Return a step's values by path."""
    draw = np.random.default_rng(step)
    cross = draw.random((3, 1, 1, 2, 2, 4, 4))
    return {
        "latents/latents": draw.standard_normal((1, 4, 8, 8)).astype("f4"),
        "attention/4x4/cross": (cross * 255).astype("u1")
        if maps == "uint8"
        else cross.astype(maps),
        "attention/4x4/moments": draw.random((3, 1, 1, 2, 2, 3)).astype("f4"),
    }


def put(writer: RunWriter, step: int, maps: str = "float16") -> None:
    """Write a step."""
    values = numbers(step, maps)
    writer.write_step(step, lambda: values, sum(value.nbytes for value in values.values()))


def recorded(path: Path, steps: int = CALLS, **options: Any) -> Path:
    """Write a recording: a complete one, or one that ends after some steps. Return its path."""
    with RunWriter(path, layout(), ATTRIBUTES, **options) as writer:
        for step in range(steps):
            put(writer, step)
        if steps == CALLS:
            writer.complete()
    return path


def check_prefix(path: Path, least: int = 0, maps: str = "float16") -> int:
    """Check that a recording opens and that every committed step holds what was written.

    Return how many steps are committed.
    """
    run = Run(path)
    committed = run.tree["committed"].values
    steps = int(committed.sum())
    assert committed.tolist() == [1] * steps + [0] * (CALLS - steps) and steps >= least
    for step in range(steps):
        for name, value in numbers(step, maps).items():
            np.testing.assert_array_equal(run.tree[name].isel(step=step).values, value)
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder, by path."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def writers() -> list[threading.Thread]:
    """Return the writing threads that run now."""
    return [thread for thread in threading.enumerate() if thread.name == "probe-writer"]


def another_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Run a script in a process of its own, with the names in `NAMES`."""
    code = f"{NAMES}\n{textwrap.dedent(script)}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
