"""Edited runs of a tiny model, in memory: one edit of each kind, and what the loop gave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_runs import model_for, pipeline

from probe.diffusion.family import Family
from probe.diffusion.sampling import Step, denoise
from probe.editing.editing import edited
from probe.running.planning import plan
from probe.settings.experiment import Experiment, load_experiment

FOLDER = Path("nowhere")  # nothing is written: the loop alone runs
SAMPLING = "steps guidance_scale guidance_rescale eta seed images height width".split()

# One of each kind but `steer`, which needs recordings. Names are those of tests/tiny.py's UNet.
EACH: dict[str, dict[str, Any]] = {
    "remove": {"words": ["astronaut"], "steps": "1:"},
    "prompt": {"text": "a cat on the hat", "steps": "1:"},
    "embedding": {"words": ["astronaut"], "text": "a cat"},
    "mask": {"words": ["astronaut"]},
    "value": {"words": ["astronaut"], "heads": [1]},
    "reweight": {"words": ["astronaut"], "scale": 3.0},
    "head": {"layers": ["*"], "heads": [0]},
    "output": {"modules": ["mid_block"]},
    "skip": {"modules": ["up_blocks.1.resnets.0"]},
    "map": {"donor": {"prompt": "a cat scuba diving"}},
    "latents": {"donor": {"seed": 9}, "steps": "1"},
    "noise": {"seed": 9},
    "guidance": {"scale": 9.0, "steps": ":2"},
}


def asked(*edits: Mapping[str, Any], **changes: Any) -> Experiment:
    """A run of three steps with some edits; attention is not recorded."""
    fields = {
        "prompt": "an astronaut scuba diving",
        "seed": 3,
        "steps": 3,
        "capture": {"attention": "off", "text": False, "statistics": False},
        "output": str(FOLDER),
        **changes,
    }
    return load_experiment({**fields, "edits": list(edits)})


def steps_of(experiment: Experiment, pipe: Any = None, model: Family | None = None) -> list[Step]:
    """The steps of a run, by our own loop, edited as it asks."""
    model = model or model_for(pipe or pipeline(), experiment)
    planned = plan(model, experiment)
    texts = experiment.texts
    conditioning = model.condition(texts["cond"], texts.get("uncond", ""), guided="uncond" in texts)
    editing = edited(model, planned)
    if editing is not None:
        editing.bind(conditioning)
    how: dict[str, Any] = {name: getattr(experiment, name) for name in SAMPLING}
    steps: list[Step] = []
    loop = denoise(model, conditioning, **how, editing=editing)
    for index in range(planned.calls):
        if editing is not None:
            editing.prepare(index)
        steps.append(next(loop))
    return steps


def same(one: list[Step], other: list[Step]) -> bool:
    """Whether two runs have the same bits at every step."""
    return (
        len(one) == len(other)
        and all(
            torch.equal(getattr(a, name), getattr(b, name))
            for a, b in zip(one, other, strict=True)
            for name in ("latents", "prediction", "next_latents")
        )
        and all(
            torch.equal(a.branches[branch], b.branches[branch])
            for a, b in zip(one, other, strict=True)
            for branch in a.branches
        )
    )
