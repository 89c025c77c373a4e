"""The model that a recipe is recorded with: loaded, or that of a pipeline in memory."""

from __future__ import annotations

from typing import Any

import torch

from probe.diffusion.families import family_of
from probe.diffusion.family import Family
from probe.diffusion.loading import load
from probe.diffusion.preparing import prepared
from probe.errors import ExperimentError
from probe.reading.compare import changed_files
from probe.reading.recording import Run
from probe.running.session import Say
from probe.settings.recipe import Recipe
from probe.text import shown


def model_for(
    recipe: Recipe, pipeline: Any | None, say: Say, recorded: Run | None = None
) -> Family:
    """Return the recipe's model, or that of a `pipeline` in memory, with the recipe's scheduler.

    For a `recorded` run it is loaded as it was then: the same commit, though "main" may have moved
    on, and the dtype that "auto" became.
    """
    scheduler, options = recipe.sampler
    if pipeline is None:
        say(f"Loading {recipe.model} ...")
        where: dict[str, Any] = {
            "revision": recipe.revision,
            "variant": recipe.variant,
            "dtype": recipe.dtype,
            "device": recipe.device,
        }
        if recorded is not None:
            there = recorded.attributes.model
            where |= {"revision": there.revision or recipe.revision, "dtype": there.dtype}
        model = load(recipe.model, **where, scheduler=scheduler, options=options)
    else:
        model = family_of(pipeline, scheduler=scheduler, options=options)
    if pipeline is not None:
        refuse_contradiction(recipe.dtype, recipe.device, model, recorded)
    return prepared(model, recipe)


def refuse_contradiction(
    dtype: str, device: str, model: Family, recorded: Run | None = None
) -> None:
    """Raise ExperimentError for a pipeline in another dtype, or on another device, than asked for.

    With `recorded`, the dtype and device are those of that run.
    """
    own, where = str(model.dtype).removeprefix("torch."), model.device
    wanted = torch.device(where if device == "auto" else device)
    elsewhere = wanted.type != where.type or (
        wanted.index is not None and wanted.index != (where.index or 0)
    )
    for field, value, actual, differs in (
        ("dtype", dtype, f"in {own}", dtype not in ("auto", own)),
        ("device", device, f"on {where}", elsewhere),
    ):
        if differs:
            to = f'pipeline.to("{value}")' if field == "device" else f"pipeline.to(torch.{value})"
            instead = (
                f"leave {field} out"
                if recorded is None
                else f'record it anew: probe.record(run.recipe, pipeline, {field}="auto")'
            )
            raise ExperimentError(
                f"{field}: {value} is asked for, and the pipeline is {actual}.",
                f"Bring it there, {to}, or {instead}.",
            )


def refuse_unread(variant: str | None, revision: str | None, model: Family) -> None:
    """Raise ExperimentError for fields that choose files: a pipeline has its weights already."""
    for field, value, own in (("variant", variant, None), ("revision", revision, model.revision)):
        if value not in (None, own):
            raise ExperimentError(
                f"{field}: {shown(value)} says which files to load, and the pipeline has its "
                "weights already.",
                f"Leave {field} out, or leave out the pipeline.",
            )


def compare_weights(model: Family, run: Run, say: Say) -> str:
    """Return the digest of a model's weights, and say so if the recording has another.

    It is computed as that of the recording was.
    """
    weights = model.digest(run.attributes.model.weights_digest)
    if weights != (recorded := run.attributes["model"].get("weights", "unknown")):
        say(
            f"{run.name} was recorded with other weights (digest {recorded}) than {model.name} has "
            f"here ({weights}): what comes will differ."
        )
    for path in changed_files(run.attributes, {"model": {"files": dict(model.files)}}):
        say(
            f"{run.name} was recorded with another {path} than is there now: what comes will "
            "differ."
        )
    return weights
