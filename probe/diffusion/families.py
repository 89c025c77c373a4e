"""The families of models, by the class of their pipeline in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.diffusion.sd import StableDiffusion
from probe.diffusion.sdxl import StableDiffusionXL
from probe.diffusion.support import ORDINARY, XL

AnyFamily = StableDiffusion | StableDiffusionXL
FAMILIES: dict[str, type[StableDiffusion] | type[StableDiffusionXL]] = {
    ORDINARY: StableDiffusion,
    XL: StableDiffusionXL,
}


def family_of(
    pipeline: Any, *, scheduler: str = "default", options: Mapping[str, Any] | None = None
) -> AnyFamily:
    """Return the model of a diffusers pipeline, or a model itself, with a scheduler.

    Raise ModelError for a pipeline of no family.
    """
    if isinstance(pipeline, StableDiffusion | StableDiffusionXL):
        return pipeline.with_scheduler(scheduler, options or {})
    family = FAMILIES.get(type(pipeline).__name__, StableDiffusion)
    return family.of(pipeline, scheduler=scheduler, options=options)
