"""Recordings of the tiny model, and the same runs with nobody watching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from recordings import assert_same

from probe.diffusion.family import Conditioning
from probe.diffusion.sampling import Step, denoise
from probe.diffusion.sd import StableDiffusion
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.settings.experiment import Experiment, load_experiment
from probe.watching import hooks

PROMPT = "a cat on the hat"
FULL = {
    "branches": "both",
    "tokens": "all",
    "activations": ("unet.mid_block", "vae.decoder.mid_block", "text_encoder.encoder.layers.0"),
}
OFF = {"attention": "off", "text": False, "statistics": False}


def pipeline(dtype: torch.dtype = torch.float32, prediction: str = "epsilon") -> Any:
    return _made(dtype, prediction)


@functools.cache
def _made(dtype: torch.dtype, prediction: str) -> Any:
    return (
        tiny.pipeline(prediction) if dtype == torch.float32 else tiny.pipeline(prediction).to(dtype)
    )


def ask(folder: Path, **changes: Any) -> Experiment:
    """A short run, which does not wait for the disk: how long that takes is a matter of the
    machine.
    """
    return load_experiment(
        {
            "prompt": PROMPT,
            "seed": 3,
            "steps": 4,
            "output": str(folder),
            "durability": "none",
            **changes,
        }
    )


def take(folder: Path, pipe: Any = None, **changes: Any) -> Run:
    return record(ask(folder, **changes), pipe or pipeline(), progress=False)


def model_for(pipe: Any, asked: Experiment) -> StableDiffusion:
    return StableDiffusion.of(pipe).with_scheduler(asked.scheduler, asked.scheduler_options)


def condition(pipe: Any, asked: Experiment) -> Conditioning:
    return StableDiffusion.of(pipe).condition(
        asked.prompt,
        asked.negative_prompt,
        guided=asked.guidance_scale > 1,
        over_long=asked.over_long,
    )


def loop(pipe: Any, asked: Experiment) -> Iterator[Step]:
    fields = "steps guidance_scale guidance_rescale eta seed images height width".split()
    return denoise(
        model_for(pipe, asked),
        condition(pipe, asked),
        **{name: getattr(asked, name) for name in fields},
    )


def bare(pipe: Any, asked: Experiment) -> list[Step]:
    """The same run with nobody watching."""
    return list(loop(pipe, asked))


def stored(tensor: torch.Tensor) -> np.ndarray:
    """As it is stored: bfloat16 widened to float32, everything else as it is."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()


def assert_neutral(run: Run, steps: list[Step]) -> None:
    """The recording holds the bits of `steps`, which were made without it."""
    assert run.tree.sizes["step"] == len(steps)
    for at, index in enumerate(run.steps):
        step = steps[index]
        pairs = {
            "latents": step.latents,
            "prediction": step.prediction,
            "prediction_cond": step.prediction_cond,
        }
        if step.prediction_uncond is not None:
            pairs["prediction_uncond"] = step.prediction_uncond
        for name, tensor in pairs.items():
            assert_same(
                run.tree[f"latents/{name}"].values[run.steps[at]],
                stored(tensor),
                f"{name} of step {index}",
            )
    if run.status == "complete":
        assert len(run.steps) == len(steps)
        assert_same(
            run.tree["latents/final_latents"].values,
            stored(steps[-1].next_latents),
            "final_latents",
        )


def assert_no_hooks(pipe: Any) -> None:
    assert [hooks.count(part) for part in (pipe.unet, pipe.vae, pipe.text_encoder)] == [0, 0, 0]


def at_call(index: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """A hook's callback that acts at one call of its module."""
    calls = iter(range(10**6))

    def callback(_: Any) -> None:
        if next(calls) == index:
            act()

    return callback


def throw(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act
