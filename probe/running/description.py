"""What a recording says of itself: its attributes, made before the first step."""

from __future__ import annotations

import json
import platform
from typing import Any

import numpy as np
import torch

from probe.conversions import clipping, clipping_text
from probe.diffusion.family import Family
from probe.format.schema import FORMAT_STATUS, FORMAT_VERSION
from probe.settings.noising import Noising
from probe.watching.interface import Plan
from probe.words import RULES


def describe(model: Family, run: Plan, weights: str | None = None) -> dict[str, Any]:
    """The recording's attributes: what was asked, of which model (`weights`: its digest, if it is
    known), and where it ran.
    """
    import diffusers
    import transformers

    device = model.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "format_version": FORMAT_VERSION,
        "format_status": FORMAT_STATUS,
        "family": model.family,
        "guidance_rule": model.guidance_rule(run.recipe.guidance[0]),
        "kind": run.recipe.kind,
        "noising" if isinstance(run.recipe, Noising) else "experiment": run.recipe.resolved(),
        "identity": run.recipe.identity(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(terse=True),
            "device": device.type,
            "device_name": name,
            "threads": torch.get_num_threads(),
            "attention_backend": type(next(iter(model.unet.attn_processors.values()))).__name__,
            "branches_batched": True,
        },
        "model": {
            "name": model.name,
            "revision": model.revision,
            "f": model.f,
            "scaling_factor": model.scaling_factor,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": weights or model.digest(),
        },
        "scheduler": {
            "class": type(model.scheduler).__name__,
            "config": scheduler_config(model.scheduler),
        },
        "prediction_type": model.prediction_type,
        "latent_convention": "variance_exploding"
        if run.schedule.variance_exploding
        else "variance_preserving",
        "text_rules": RULES,
        "read_as": {
            branch: prompt.read_as
            for branch, prompt in run.prompts.items()
            if prompt.read_as != prompt.text
        },
        **_of_denoised(model, run),
        "cut_from_prompt": {
            branch: prompt.cut for branch, prompt in run.prompts.items() if prompt.cut
        },
        **({"zeroed_branches": list(run.zeroed_branches)} if run.zeroed_branches else {}),
        "decoded_in_float32": model.decoding_dtype == torch.float32 != model.dtype,
    }


def _of_denoised(model: Family, run: Plan) -> dict[str, Any]:
    """Where denoised is not what the scheduler goes on with, and where it is not defined; nothing,
    in most runs.
    """
    how = clipping(type(model.scheduler).__name__, model.scheduler.config)
    undefined = list(run.schedule.undefined(model.prediction_type))
    found: dict[str, Any] = {} if how is None else {"scheduler_clips": clipping_text(how)}
    return {**found, **({"denoised_not_defined": undefined} if undefined else {})}


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's settings.

    JSON has no infinity, which DPMSolverMultistepScheduler's are not without: as text, "-inf".
    """
    found: dict[str, Any] = json.loads(
        scheduler.to_json_string(), parse_constant=lambda word: str(float(word))
    )
    return found
