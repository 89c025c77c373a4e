"""The families of models, by the class of their pipeline in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.diffusion.family import Family
from probe.diffusion.sd import StableDiffusion
from probe.diffusion.sdxl import StableDiffusionXL
from probe.diffusion.support import ORDINARY, XL
from probe.errors import ModelError

AnyFamily = StableDiffusion | StableDiffusionXL
FAMILIES: dict[str, type[StableDiffusion] | type[StableDiffusionXL]] = {
    ORDINARY: StableDiffusion,
    XL: StableDiffusionXL,
}


def family_of(pipeline: Any, *, scheduler: str = "default", options: Mapping[str, Any] | None = None) -> AnyFamily:
    """Return the model of a diffusers pipeline, or a model itself, with a scheduler.

    Raise ModelError for a pipeline of no family.
    """
    if isinstance(pipeline, StableDiffusion | StableDiffusionXL):
        return pipeline.with_scheduler(scheduler, options or {})
    family = FAMILIES.get(type(pipeline).__name__, StableDiffusion)
    return family.of(pipeline, scheduler=scheduler, options=options)


def recordable(model: Family) -> StableDiffusion:
    """Return a model that is recorded whole.

    Raise ModelError for a family of which a part would be left out.
    """
    if isinstance(model, StableDiffusion):
        return model
    parts = " and ".join(list(model.text_encoders())[1:])
    raise ModelError(
        f"{model.name}: {type(model).__name__} is not recorded yet: its {parts} would be left out.",
        "Draw with it unrecorded: probe.diffusion.sampling.denoise(model, model.condition(prompt)).",
    )
