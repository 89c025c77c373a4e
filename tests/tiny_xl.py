"""The tiny Stable Diffusion XL: its pipelines, its pictures by diffusers and by our loop."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import parity
import pytest
import tiny
import torch
from parity import PROMPT, SEED, assert_bits

from probe.diffusion.sampling import Step
from probe.diffusion.sdxl import StableDiffusionXL
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import SCHEDULERS
from probe.watching import hooks

STEPS = 3


@functools.cache
def base(shape: str = "base", prediction: str = "epsilon", zeros: bool = True) -> Any:
    return tiny.xl_pipeline(shape, prediction, zeros)


def around(parts: Any, scheduler: str = "Euler", **options: Any) -> Any:
    """A pipeline of the same networks, with a scheduler made from the same config in diffusers' own
    way.
    """
    kind, extra = SCHEDULERS[scheduler]
    made = diffusers.StableDiffusionXLPipeline(
        **{
            name: part
            for name, part in parts.components.items()
            if name not in ("scheduler", "image_encoder", "feature_extractor")
        },
        scheduler=getattr(diffusers, kind).from_config(
            parts.scheduler.config, **{**extra, **options}
        ),
        force_zeros_for_empty_prompt=parts.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def model_of(shape: str, scheduler: str) -> StableDiffusionXL:
    return StableDiffusionXL.of(base(shape)).with_scheduler(scheduler, {})


@functools.cache
def peer_of(shape: str, scheduler: str) -> Any:
    return around(base(shape), scheduler)


ENCODERS = ("text_encoder", "text_encoder_2")
INSIDE = (
    "unet.mid_block*",
    "vae.decoder.mid_block",
    "text_encoder.encoder.layers.0",
    "text_encoder_2.text_projection",
)
SMALL = {"statistics": False, "attention": "off"}

theirs = functools.partial(parity.theirs, steps=STEPS)
ours = functools.partial(parity.ours, steps=STEPS, guidance_scale=5.0)


def assert_same(
    model: StableDiffusionXL, pipeline: Any, mine: dict[str, Any] | None = None, **how: Any
) -> torch.Tensor:
    """Latents and pictures, bit for bit."""
    return assert_bits(
        model, ours(model, **(how if mine is None else mine)), *theirs(pipeline, **how)
    )


def ask(folder: Path, **changes: Any) -> Experiment:
    return load_experiment(
        {
            "prompt": PROMPT,
            "seed": SEED,
            "steps": STEPS,
            "output": str(folder),
            "device": "cpu",
            "durability": "none",
            **changes,
        }
    )


def take(folder: Path, pipeline: Any = None, **changes: Any) -> Run:
    return record(ask(folder, **changes), pipeline or base(), progress=False)


def failed(run: Run, model: Any = None) -> dict[str, str]:
    return {check.name: check.detail for check in verify(run, model) if check.verdict == "failed"}


def assert_neutral(run: Run, steps: list[Step], model: StableDiffusionXL) -> None:
    """The recording holds the bits of `steps`, which nobody watched, and their picture."""
    for index, step in enumerate(steps):
        said = {
            "latents": step.latents,
            "prediction": step.prediction,
            "prediction_cond": step.prediction_cond,
        }
        for name, tensor in said.items():
            assert np.array_equal(run.variable(f"latents/{name}").values[index], tensor.numpy()), (
                f"{name} of step {index}"
            )
    assert np.array_equal(
        run.variable("images/final").values, model.decode(steps[-1].next_latents)[0].numpy()
    )
    assert hooks.count(model.unet) == hooks.count(model.vae) == 0


def cut_short(folder: Path, pipeline: Any, after: int, **how: Any) -> Run:
    """A recording that was interrupted after some steps."""
    calls = iter(range(100))
    with (
        pytest.raises(KeyboardInterrupt),
        hooks.Hooks(
            [(pipeline.unet, "input", lambda _: interrupt() if next(calls) == after else None)]
        ),
    ):
        take(folder, pipeline, **how)
    cut = next(Run(path) for path in folder.glob("*.zarr"))
    assert cut.status == "interrupted" and len(cut.steps) == after
    return cut


def interrupt() -> None:
    raise KeyboardInterrupt


def full(folder: Path) -> Run:
    """Two images that are not square, of an empty negative prompt, with everything on."""
    capture = {
        "branches": "both",
        "activations": INSIDE,
        "counterfactual": ["*"],
        "self_attention": ["*"],
    }
    return take(folder, images=2, height=32, width=48, decode_every=2, capture=capture)
