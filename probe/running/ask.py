"""Ask a finished recording about any word: where would the picture have looked at it?

    maps = ask(open_run("latest"), "a fish")        # one array for each grid, like Run.attention
    maps = read_out(open_run("latest"), "fish")     # one map a step

A recording with `capture.attention: queries` holds what the picture asked at every step. The text
encoder reads a new sentence, each layer's `to_k` makes keys of it, and the softmax runs over the
new sentence's 77 tokens; the UNet is never called. It is a read-out: the word did not influence the
picture. What came out says what those queries respond to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from probe.analysis.maps import resize
from probe.analysis.recomputed import recomputed
from probe.diffusion.defaults import plain_defaults
from probe.diffusion.families import family_of
from probe.diffusion.family import TEXT, Family, Tokens
from probe.diffusion.loading import load
from probe.diffusion.loras import borrowed
from probe.diffusion.preparing import prepared
from probe.errors import ExperimentError, ModelError, RecordingNotFound
from probe.format.schema import near
from probe.reading.compare import changed_files
from probe.reading.recording import Run
from probe.watching.rehearsal import cross_attention
from probe.watching.text_side import scaled_keys
from probe.words import occurrences, spelt

READ_OUT = "read-out: this word did not influence the picture"


@plain_defaults()
def ask(run: Run, context: str, pipeline: Any | None = None) -> dict[str, xr.DataArray]:
    """Return maps of every token of a new sentence, by grid, the largest first.

    They are computed when they are read, and labelled like recorded maps, so that
    `analysis.word_maps` merges them. Each has the attributes `read_out` and `context`. `pipeline`
    is the model if it is in memory. *Shape:* (step, token, image, layer, head, y, x). Raise
    RecordingNotFound for a recording without queries, ModelError for other weights.
    """
    return _maps(run, *_read(run, context, pipeline))


@plain_defaults()
def read_out(
    run: Run, word: str, context: str | None = None, pipeline: Any | None = None
) -> xr.DataArray:
    """Return where the picture would have looked at `word`, at each step.

    It is the share of the word's tokens, a mean over layers of all grids, heads and images.
    `context` is the sentence that the text encoder reads (default: "a <word>"), and must contain
    the word. *Shape:* (step, y, x) float32 on the largest grid. Raise ExperimentError for a text
    without letters, digits or symbols, and for a word that is not in the context; else as `ask`.
    """
    name_one = "Name one: probe ask latest fish"
    if not word.strip():
        raise ExperimentError("There is no word to ask for.", name_one)
    model, read_as = _read(run, f"a {word}" if context is None else context, pipeline)
    prompt = next(iter(read_as.values()))
    places = occurrences(word, prompt.words)
    if not places and not spelt(word):
        raise ExperimentError(f"{word!r} is no word: there are no letters in it.", name_one)
    if not places and prompt.cut:
        raise ExperimentError(
            f"{word[:80]!r} was not read: the sentence was cut before {prompt.cut[:80]!r}.",
            "Ask in a shorter one, with --context.",
        )
    if not places:
        raise ExperimentError(
            f"{word!r} is not in {prompt.text!r}.", near(word, list(prompt.words) or ["a fish"])
        )
    tokens = [t for t, of in enumerate(prompt.word_of) if any(of in place for place in places)]
    grids = _maps(run, model, read_as)
    largest = next(iter(grids.values()))
    size = (largest.sizes["y"], largest.sizes["x"])
    total = np.zeros((largest.sizes["step"], *size), np.float32)
    for maps in grids.values():
        for index in range(len(total)):
            share = maps.isel(step=index, token=tokens).sum("token")
            share = share.mean((run.attributes.across, "head")).sum("layer")
            total[index] += resize(share.transpose("y", "x").values, size)
    layers = sum(maps.sizes["layer"] for maps in grids.values())
    sigma = run.variable("sigma").sel(step=largest["step"])
    return xr.DataArray(
        total / layers,
        dims=("step", "y", "x"),
        coords={"step": largest["step"].values, "sigma": ("step", sigma.values)},
        name="read_out",
        attrs={"read_out": READ_OUT, "context": prompt.text, "word": word},
    )


def _read(run: Run, context: str, pipeline: Any | None) -> tuple[Family, Tokens]:
    grids = run.grids
    if not grids or "query" not in run.tree[f"attention/{grids[0]}"].data_vars:
        raise RecordingNotFound(
            f"{run.name} holds no queries to ask.", "Record with capture.attention: queries."
        )
    if "cond" not in run.variable(f"attention/{grids[0]}/branch").values:
        raise RecordingNotFound(
            f"{run.name} holds no queries of the cond branch.",
            "Record with capture.branches: cond or both.",
        )
    recipe, (scheduler, options) = run.recipe, run.recipe.sampler
    if pipeline is not None:
        model = family_of(pipeline, scheduler=scheduler, options=options)
    else:
        where: dict[str, Any] = {
            # The commit: a name like main may have moved on since.
            "revision": run.attributes["model"]["revision"] or recipe.revision,
            "variant": recipe.variant,
            "dtype": run.attributes["model"]["dtype"],
            "device": "cpu",
        }
        model = load(recipe.model, **where, scheduler=scheduler, options=options)
    model = prepared(model, recipe)
    here = {"model": {"files": dict(model.files)}}
    said = run.attributes.model
    other = model.digest(said.weights_digest) != said.weights
    if other or changed_files(run.attributes, here):
        raise ModelError(
            f"{run.name} was recorded with other weights of {model.name}, or other LoRAs.",
            "Bring those back, or record it again: probe rerun.",
        )
    return model, model.tokens(context, recipe.over_long)


def _maps(run: Run, model: Family, tokens_of: Tokens) -> dict[str, xr.DataArray]:
    with borrowed(model):
        return _computed_maps(run, model, tokens_of)


def _computed_maps(run: Run, model: Family, tokens_of: Tokens) -> dict[str, xr.DataArray]:
    embedding, prompt = model.encode_prompt(tokens_of)[TEXT], next(iter(tokens_of.values()))
    modules = cross_attention(model.unet)
    tokens = np.arange(len(prompt.tokens))
    words = [prompt.words[of] if of >= 0 else "" for of in prompt.word_of]
    found = {}
    for grid in run.grids:
        kept = run.attention(grid)["step"]
        query = run.variable(f"attention/{grid}/query").sel(step=kept, branch=["cond"])
        with torch.no_grad():
            keys = [
                scaled_keys(modules[str(path)].to_k(embedding), modules[str(path)]).cpu()
                for path in query["layer"].values
            ]
        key = xr.DataArray(
            np.stack([k.numpy() for k in keys], axis=2),
            dims=("branch", "token", "layer", "head", "key_feature"),
            coords={
                "token": tokens,
                "token_text": ("token", list(prompt.tokens)),
                "word": ("token", words),
                "word_index": ("token", np.array(prompt.word_of)),
            },
        )
        query = query.drop_vars(
            [name for name, value in query.coords.items() if "token" in value.dims]
        )
        maps = recomputed(query, key).isel(branch=0, drop=True)
        found[grid] = maps.assign_attrs(read_out=READ_OUT, context=prompt.text)
    return found
