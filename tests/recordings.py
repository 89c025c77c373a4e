"""Recordings for tests, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from probe.digests import DIGESTS, read_lines
from probe.experiment import Experiment
from probe.proof.checks import digest_now
from probe.reading.recording import Run
from probe.reading.untrusted import nodes_of, read_root
from probe.schema import array
from probe.store import MANIFEST, RunWriter, manifest

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


def recording(path: Path) -> Path:
    """A small recording with one variable of every kind."""
    draw = np.random.default_rng(5)
    words = {"token_text": [["<|startoftext|>", "cat", ""]], "word": [["", "cat", ""]]}
    step = [
        array("latents", "latents", (CALLS, 1, 4, 8, 8), "float32"),
        array("latents", "prediction", (CALLS, 1, 4, 8, 8), "float32"),
        array(GRID, "cross", (CALLS, 3, 1, 1, 2, 2, 4, 4), "float16"),
    ]
    arrays = [
        array("", "step", value=np.arange(CALLS)),
        array("", "timestep", value=np.linspace(999, 1, CALLS)),
        array("", "sigma", value=np.linspace(14.6, 0.03, CALLS)),
        array("", "alpha_bar", value=np.linspace(0.01, 0.99, CALLS)),
        array("", "committed", (CALLS,)),
        *step,
        array("images", "final", value=draw.integers(0, 255, (1, 6, 9, 3), dtype=np.uint8)),
        array("preview", "latent_to_rgb", value=draw.random((4, 3), dtype=np.float32)),
        array("preview", "bias", value=draw.random(3, dtype=np.float32)),
        array(GRID, "branch", value=["cond"]),
        array(GRID, "token", value=np.array([0, 1, -1])),
        array(GRID, "layer", value=["down_blocks.0", "up_blocks.0"]),
        *(array(GRID, name, value=value) for name, value in words.items()),
        array(GRID, "word_index", value=np.array([[-1, 0, -1]])),
        array(GRID, "recorded", value=np.ones(CALLS, np.uint8)),
        array(GRID, "overview", (3, CALLS, 4, 4)),
        array("cost", "component", value=["text_encoder", "unet", "vae"]),
        array("cost", "seconds", value=np.array([1.0, 2.0, 3.0])),
        array("cost", "flops", value=np.array([1, 2, 3])),
        array("cost", "peak_memory", value=np.array(7)),
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
        lines = [f"{digest_now(run, arrays, what)} {what}\n" for what in read_lines((path / DIGESTS).read_bytes())]
        (path / DIGESTS).write_text("".join(lines))
    (path / MANIFEST).write_text(json.dumps(manifest(path)))
    return path
