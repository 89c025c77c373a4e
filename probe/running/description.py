"""Make the attributes of a recording before its first step."""

from __future__ import annotations

import json
import platform
from typing import Any

import numpy as np
import torch

from probe.conversions import clipping, clipping_text
from probe.diffusion.family import Family
from probe.format.attributes import MIXED
from probe.format.schema import FORMAT_STATUS, FORMAT_VERSION
from probe.settings.experiment import Experiment
from probe.settings.noising import Noising
from probe.system import processor
from probe.watching.interface import Plan
from probe.watching.kept import measures_late
from probe.words import RULES


def describe(
    model: Family, plan: Plan, weights: str | None = None, how: str = MIXED
) -> dict[str, Any]:
    """Return a recording's attributes: its recipe, its model, and where it ran.

    `weights` is the digest of the weights, if it is known; empty, it is left out. `how` names its
    algorithm.
    """
    weights = model.digest(how) if weights is None else weights
    exploding = plan.schedule.variance_exploding
    prompts = plan.prompts.items()
    read_as = {branch: p.read_as for branch, p in prompts if p.read_as != p.text}
    return {
        "format_version": FORMAT_VERSION,
        "format_status": FORMAT_STATUS,
        "family": model.family,
        "guidance_rule": model.guidance_rule(plan.recipe.guidance[0]),
        "kind": plan.recipe.kind,
        "noising" if isinstance(plan.recipe, Noising) else "experiment": plan.recipe.resolved(),
        "identity": plan.recipe.identity(),
        **_of_edits(plan),
        "environment": _environment(model),
        "model": {
            "name": model.name,
            "revision": model.revision,
            "f": model.f,
            "scaling_factor": model.scaling_factor,
            "dtype": str(model.dtype).removeprefix("torch."),
            **({"weights": weights} if weights else {}),
            "weights_digest": how,
            **({"files": dict(model.files)} if model.files else {}),
        },
        "scheduler": {
            "class": type(model.scheduler).__name__,
            "config": scheduler_config(model.scheduler),
        },
        "prediction_type": model.prediction_type,
        "latent_convention": "variance_exploding" if exploding else "variance_preserving",
        "text_rules": RULES,
        "read_as": read_as,
        **_of_denoised(model, plan),
        "cut_from_prompt": {branch: prompt.cut for branch, prompt in prompts if prompt.cut},
        **({"zeroed_branches": list(plan.zeroed_branches)} if plan.zeroed_branches else {}),
        "decoded_in_float32": model.decoding_dtype == torch.float32 != model.dtype,
    }


def _of_edits(plan: Plan) -> dict[str, Any]:
    """Return of an edited run whose child it is, and the texts that an edit gave all of it."""
    recipe = plan.recipe
    if not isinstance(recipe, Experiment) or not recipe.edits:
        return {}
    own = recipe.unedited.texts
    texts = {branch: text for branch, text in recipe.texts.items() if text != own[branch]}
    return {
        "parent_identity": recipe.unedited.identity(),
        **({"edited_texts": texts} if texts else {}),
    }


def _environment(model: Family) -> dict[str, Any]:
    """Return versions, device and threads: whatever may change the last bits."""
    import diffusers
    import transformers

    device = model.device
    on_cuda = device.type == "cuda"
    cpu = processor(torch.backends.cpu.get_cpu_capability())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(terse=True),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_cuda else cpu,
        "threads": torch.get_num_threads(),
        "attention_backend": type(next(iter(model.unet.attn_processors.values()))).__name__,
        "branches_batched": True,
        **({"measured": "after the call"} if measures_late(device) else {}),
    }


def _of_denoised(model: Family, plan: Plan) -> dict[str, Any]:
    """Return how the scheduler clips `denoised`, and the steps at which it is not defined.

    Most runs have neither.
    """
    how = clipping(type(model.scheduler).__name__, model.scheduler.config)
    undefined = list(plan.schedule.undefined(model.prediction_type))
    clips: dict[str, Any] = {} if how is None else {"scheduler_clips": clipping_text(how)}
    return {**clips, **({"denoised_not_defined": undefined} if undefined else {})}


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's settings, as JSON can hold them.

    Infinity becomes text, "-inf": DPMSolverMultistepScheduler has one.
    """
    settings: dict[str, Any] = json.loads(
        scheduler.to_json_string(), parse_constant=lambda word: str(float(word))
    )
    return settings
