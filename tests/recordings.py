"""Recordings for tests, made without torch, and what is done to them: damaged, cut, compared."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from probe.format.schema import spec
from probe.proof.checks import digest_now, variables
from probe.reading.recording import Run
from probe.reading.untrusted import nodes_of, read_root
from probe.settings.experiment import Experiment
from probe.writing.chunks import checked
from probe.writing.digests import DIGESTS, read_lines
from probe.writing.store import MANIFEST, RunWriter, manifest

CALLS = 3
GRID = "attention/4x4"
ATTRIBUTES: dict[str, Any] = {
    "format_version": 1,
    "experiment": Experiment(steps=CALLS).resolved(),
    "environment": {"device": "cpu"},
    "model": {"name": "emojiworld", "dtype": "float32"},
    "scheduler": {"class": "DPMSolverMultistepScheduler", "config": {"lambda_min_clipped": "-inf"}},
    "prediction_type": "epsilon",
    "latent_convention": "variance_preserving",
    "created": "2026-01-02T03:04:05.678+00:00",
}


AT_THE_FIRST_STEP = r"attention/.*/(key|value_size)"
AT_THE_END = "|".join(
    (
        r"latents/final_latents|images/final|vae/statistics|vae/.*/activation",
        r"cost/(.*seconds|peak_memory)|attention/.*/(overview|time_sum)",
    )
)


def recording(path: Path) -> Path:
    """A small recording with one variable of every kind."""
    draw = np.random.default_rng(5)
    words = {"token_text": [["<|startoftext|>", "cat", ""]], "word": [["", "cat", ""]]}
    step = [
        spec("latents", "latents", (CALLS, 1, 4, 8, 8), "float32"),
        spec("latents", "prediction", (CALLS, 1, 4, 8, 8), "float32"),
        spec(GRID, "cross", (CALLS, 3, 1, 1, 2, 2, 4, 4), "float16"),
    ]
    arrays = [
        spec("", "step", value=np.arange(CALLS)),
        spec("", "timestep", value=np.linspace(999, 1, CALLS)),
        spec("", "sigma", value=np.linspace(14.6, 0.03, CALLS)),
        spec("", "alpha_bar", value=np.linspace(0.01, 0.99, CALLS)),
        spec("", "committed", (CALLS,)),
        *step,
        spec("images", "final", value=draw.integers(0, 255, (1, 6, 9, 3), dtype=np.uint8)),
        spec("preview", "latent_to_rgb", value=draw.random((4, 3), dtype=np.float32)),
        spec("preview", "bias", value=draw.random(3, dtype=np.float32)),
        spec(GRID, "branch", value=["cond"]),
        spec(GRID, "token", value=np.array([0, 1, -1])),
        spec(GRID, "layer", value=["down_blocks.0", "up_blocks.0"]),
        *(spec(GRID, name, value=value) for name, value in words.items()),
        spec(GRID, "word_index", value=np.array([[-1, 0, -1]])),
        spec(GRID, "recorded", value=np.ones(CALLS, np.uint8)),
        spec(GRID, "overview", (3, CALLS, 4, 4)),
        spec("cost", "component", value=["text_encoder", "unet", "vae"]),
        spec("cost", "seconds", value=np.array([1.0, 2.0, 3.0])),
        spec("cost", "flops", value=np.array([1, 2, 3])),
        spec("cost", "peak_memory", value=np.array(7)),
    ]
    with RunWriter(path, arrays, ATTRIBUTES, "none") as writer:
        for index in range(CALLS):
            values = {a.path: draw.random(a.shape[1:]).astype(a.dtype) for a in step}
            writer.write_step(index, lambda values=values: values, 1)
        writer.flush()
        writer.write(f"{GRID}/overview", draw.random((3, CALLS, 4, 4), dtype=np.float32))
        writer.complete()
    return path


def with_its_digests(path: Path) -> Path:
    """Make the digests and the manifest of a recording agree with what somebody planted in it."""
    run, arrays = Run(path), nodes_of(path, read_root(path))[1]
    if (path / DIGESTS).exists():
        lines = [
            f"{digest_now(run, arrays, what)} {what}\n"
            for what in read_lines((path / DIGESTS).read_bytes())
        ]
        (path / DIGESTS).write_text("".join(lines))
    (path / MANIFEST).write_text(json.dumps(manifest(path)))
    return path


@functools.cache
def nobody() -> int:
    """The process id of a process that is no more."""
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    return gone.pid


def change_root(run: Run, change: Callable[[dict[str, Any]], object]) -> Run:
    """Change the attributes of a recording on disk."""
    file = run.path / "zarr.json"
    root = json.loads(file.read_text())
    change(root["attributes"])
    file.write_text(json.dumps(root))
    return Run(run.path)


def flag(run: Run, flags: list[int]) -> None:
    (run.path / "committed" / "c.0").write_bytes(checked(bytes(flags)))


def cut(whole: Run, folder: Path, step: int) -> Run:
    """What a kill -9 leaves of a recording of which `step` steps were committed."""
    path = Path(shutil.copytree(whole.path, folder / f"{whole.name}-{step}.zarr"))
    calls = whole.tree.sizes["step"]
    late = AT_THE_END if step else f"{AT_THE_END}|{AT_THE_FIRST_STEP}"
    for name, variable in variables(whole):
        if name == "decoded/picture":  # in one file, rewritten whenever one more picture is there
            zarr.open_array(path, path=name, mode="r+")[
                (whole.variable("decoded/decoded_step").values < step).sum() :
            ] = 0
            gone = []
        elif variable.dims[:1] == ("step",) and variable.ndim > 1:
            gone = [f"c.{index}.*" for index in range(step, calls)]
        else:
            gone = ["c", "c.*"] if re.fullmatch(late, name) else []
        for file in [file for pattern in gone for file in (path / name).glob(pattern)]:
            file.unlink()
    for file in (*path.glob("*.png"), path / MANIFEST):
        file.unlink()
    lines = (path / DIGESTS).read_text().splitlines(keepends=True)
    until = next(
        (at for at, line in enumerate(lines) if line.endswith(f" step {step}\n")), len(lines)
    )
    (path / DIGESTS).write_text(
        "".join(line for line in lines[:until] if not re.fullmatch(late, line[65:-1]))
    )
    run = change_root(
        Run(path),
        lambda attributes: attributes.update(
            status="running", writer={"pid": nobody(), "host": socket.gethostname()}
        ),
    )
    flag(run, [1] * step + [0] * (calls - step))
    return run


def assert_same(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape, what
    assert np.array_equal(found, expected, equal_nan=True), (
        f"{what} differ by up to {np.abs(found - expected).max()}"
    )


def assert_prefix(run: Run, whole: Run, count: int | None = None) -> None:
    """What was committed is a prefix, and equals that of the run that nothing stopped."""
    committed = run.tree["committed"].values
    steps = int(committed.sum())
    assert list(run.steps) == list(range(steps)) and (count is None or steps == count)
    for group in ("latents", *(f"attention/{grid}" for grid in whole.grids), "unet"):
        for name, variable in whole.tree[group].data_vars.items():
            if variable.dims[0] == "step" and variable.ndim > 1:
                assert_same(
                    run.tree[group][name].values[:steps], variable.values[:steps], f"{group}/{name}"
                )


def only(folder: Path) -> Run:
    """The one thing in a folder, hidden files included, is a recording."""
    (path,) = folder.iterdir()
    return Run(path)


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step, as a writer does."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


def growing(whole: Run, folder: Path, steps: int) -> Run:
    """A recording of which `steps` steps are committed, and whose writer is this process."""
    run = cut(whole, folder, steps)
    writer = {"pid": os.getpid(), "host": socket.gethostname()}
    return change_root(run, lambda attributes: attributes.update(writer=writer))


def grow(run: Run, whole: Run, steps: int) -> None:
    """Commit more steps of a growing recording, in the order in which a writer does."""
    for name, variable in variables(whole):
        stepwise = variable.dims[:1] == ("step",) and variable.ndim > 1
        patterns = [f"c.{index}.*" for index in range(steps)] if stepwise else []
        if name == "decoded/picture":
            patterns = ["c.*"]
        for file in [file for pattern in patterns for file in (whole.path / name).glob(pattern)]:
            here = run.path / name / file.name
            if not here.exists() or name == "decoded/picture":
                replace(here, file.read_bytes())
    flags = [1] * steps + [0] * (len(whole.steps) - steps)
    replace(run.path / "committed" / "c.0", checked(bytes(flags)))


def finish(run: Run, whole: Run) -> None:
    """Write what comes after the last step of a growing recording; its status last."""
    for file in whole.path.rglob("*"):
        here = run.path / file.relative_to(whole.path)
        if file.is_file() and not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, here)
    replace(run.path / "zarr.json", (whole.path / "zarr.json").read_bytes())
