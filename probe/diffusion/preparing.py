"""A loaded model made ready for a recipe: what a recipe asks of the model beside its files.

    model = prepared(load("emojiworld"), experiment)     # LoRAs, clip_skip, prompt_embeds

A model is loaded once and prepared for each recipe, also for one that asks for nothing: what the
recipe before it asked for is then undone.
"""

from __future__ import annotations

from dataclasses import replace

from probe.diffusion.embeds import read_embeds
from probe.diffusion.families import AnyFamily
from probe.errors import ExperimentError
from probe.settings.recipe import Recipe


def prepared(model: AnyFamily, recipe: Recipe) -> AnyFamily:
    """Return the model as a recipe asks for it. Raise ExperimentError for what it cannot do."""
    _refuse_skip(model, recipe.clip_skip)
    embeds, files = None, {}
    if recipe.prompt_embeds is not None:
        embeds, digest = read_embeds(model, recipe.prompt_embeds, list(recipe.texts))
        files = {recipe.prompt_embeds: digest}
    model = model.with_loras(recipe.loras)
    files = {**model.files, **files}
    return replace(model, clip_skip=recipe.clip_skip, embeds=embeds, files=files)


def _refuse_skip(model: AnyFamily, skip: int | None) -> None:
    """Raise ExperimentError for a `clip_skip` of more layers than the text encoders have."""
    encoders = [encoder for encoder, _ in model.text_encoders().values()]
    layers = min(int(encoder.config.num_hidden_layers) for encoder in encoders)
    most = layers - (model.family == "sdxl")  # its last layer is never used
    if skip is not None and skip > most:
        raise ExperimentError(
            f"clip_skip: {model.name} has {layers} layers in a text encoder, and {skip} cannot be "
            "skipped.",
            f"Write a number from 0 to {most}.",
        )
