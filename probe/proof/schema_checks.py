"""Whether a recording's variables are those of the schema, without torch and without the model.

Every variable that was asked for has to be there, with the schema's dimensions, type and unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import xarray as xr

from probe.format.dimensions import FAMILIES, POOLED, TEXT_ENCODERS, ZEROED
from probe.format.schema import HEAD_STATISTICS, MOMENTS, STATISTICS, spec
from probe.format.variables import SCHEMA, Request
from probe.proof.checks import Check, variables
from probe.reading.recording import Run
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.recipe import Recipe
from probe.text import shown

COMPONENT = re.compile(
    r"text_encoder(_[1-9])?|unet|vae"
)  # what runs: text encoders first, the VAE last
# What the model made, and nothing in a recording leads to or from.
ONLY_THE_MODEL = re.compile(
    r"counterfactual/change|text/[^/]*/(?!attention).*|(text_encoder|unet|vae|preview)/.*|cost/(parameters|weight_bytes)|images/final|decoded/picture|attention/[^/]*/(value_size|key)"
)
FIXED = {"moment": MOMENTS, "head_statistic": HEAD_STATISTICS, "statistic": STATISTICS}


def expected_variables(run: Run) -> set[str]:
    """Return what the recipe of a recording asks for, by path.

    Grids and self-attention layers are those that the recording has.
    """
    vae = run.attributes["model"]["f"] > 1
    request, recorded = Request(run.recipe, vae), dict(variables(run))
    family = run.attributes.family
    encoders = TEXT_ENCODERS.get(family) or sorted(
        {path.split("/")[1] for path in recorded if path.startswith("text/")}
    )
    own = {path.split("/")[1]: None for path in recorded if path.startswith("self_attention/")}
    groups = {
        "attention/{grid}": run.grids,
        "self_attention/{grid}": sorted(own),
        "text/{encoder}": list(encoders),
    }
    names = set()
    for variable in SCHEMA:
        if variable.since > run.attributes.recorded_format:
            continue
        first, _, kind = variable.group.partition("/")
        members = groups.get(variable.group, []) or ["(any grid)"] if kind else [""]
        for member in members[:1] if variable.first_grid else members:
            if variable.when(replace(request, pooled=member in POOLED.get(family, ()))):
                names.add("/".join(part for part in (first, member, variable.name) if part))
    return names


def only_the_model_knows(run: Run) -> list[str]:
    """Return what no check can judge without the model, by a part of its path."""
    paths = [
        path
        for node in run.tree.subtree
        for path in (f"{node.path}/{name}".strip("/") for name in node.dataset.data_vars)
    ]
    unproven = [path for path in paths if ONLY_THE_MODEL.fullmatch(path)]
    return sorted(
        {
            path.rpartition("/")[2] if path.startswith("attention/") else path.split("/")[0]
            for path in unproven
        }
    )


def check_schema(run: Run) -> Check:
    """Check that every variable asked for is there and as the schema says, and no other."""
    recorded = dict(variables(run))
    problems = [f"{path} is missing" for path in sorted(expected_variables(run) - recorded.keys())]
    problems += [
        problem
        for path, variable in recorded.items()
        for problem in _unlike_schema(run, path, variable)
    ]
    if not problems:
        problems = list(_unlike_sizes(run, recorded))
    recipe = run.recipe
    if (
        "experiment" in run.attributes
    ):  # so a noising of format 1 says what was asked, and takes its identity from it
        recipe = load_experiment(run.attributes["experiment"])
    identity, written = (
        recipe.identity(),
        run.attributes["experiment" if isinstance(recipe, Experiment) else "noising"],
    )
    if (
        written == recipe.resolved() and run.attributes["identity"] != identity
    ):  # not of one with the fields of another version
        problems.append(
            f"the experiment is not the one that was recorded: its identity is {identity}, not "
            f"{run.attributes['identity']}"
        )
    problems += _unlike_edits(run, recipe) if written == recipe.resolved() else []
    empty = (
        ["uncond"]
        if run.attributes.family in ZEROED and run.recipe.texts.get("uncond") == ""
        else []
    )
    if run.attributes.zeroed_branches not in ([], empty):
        problems.append(
            f"zeroed_branches is {run.attributes.zeroed_branches}, and only an empty negative "
            "prompt of SDXL may be zeros"
        )
    if problems:
        return Check(
            "schema",
            "failed",
            problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else ""),
        )
    return Check(
        "schema",
        "exact",
        f"{len(recorded)} variables with the dimensions, types and units of the schema, all that "
        "was asked for",
    )


def _unlike_edits(run: Run, recipe: Recipe) -> list[str]:
    """Return what the attributes say of edits that the recorded experiment does not."""
    if not isinstance(recipe, Experiment):
        return []
    parent = recipe.unedited.identity() if recipe.edits else None
    typed = recipe.unedited.texts
    texts = {branch: text for branch, text in recipe.texts.items() if text != typed[branch]}
    pairs = (
        ("parent_identity", run.attributes.parent_identity, parent),
        ("edited_texts", run.attributes.edited_texts, texts),
    )
    return [
        f"{name} is {shown(recorded)}, and the experiment's edits make it {shown(expected)}"
        for name, recorded, expected in pairs
        if recorded != expected
    ]


def _unlike_schema(run: Run, path: str, variable: xr.Variable) -> Iterator[str]:
    """Yield how a variable differs from the schema: dimensions, type, unit."""
    group, _, name = path.rpartition("/")
    try:
        known = replace(spec(group, name, variable.shape), across=run.attributes.across)
        dims = known.dims
    except KeyError:
        return  # another writer's: `probe.proof.unknown` tells of it
    dtype, storage = str(run.attributes["model"]["dtype"]), run.recipe.capture.dtype
    run_dtype = "float32" if dtype == "bfloat16" else dtype
    map_dtype = ("float16" if name == "query" else "uint8") if storage == "sqrt_u8" else storage
    upcast = (
        group.startswith("vae/")
        and run.attributes.get("decoded_in_float32") is True
        and variable.attrs.get("recorded_dtype") == "float32"
    )
    kind = {"run": run_dtype, "any": "float32" if upcast else run_dtype, "map": map_dtype}.get(
        known.dtype, known.dtype
    )
    if variable.dims != dims:
        yield f"{path} has the dimensions {variable.dims}, not {dims}"
    if (variable.dtype.kind not in "OT") if kind == "str" else (variable.dtype != np.dtype(kind)):
        yield f"{path} is of type {variable.dtype}, not {kind}"
    if variable.attrs.get("units") != known.variable.units or not variable.attrs.get("long_name"):
        yield f"{path} has no long_name, or another unit than {known.variable.units}"
    if (
        known.dtype == "run"
        and group == "latents"
        and variable.attrs.get("recorded_dtype") != dtype
    ):
        recorded = variable.attrs.get("recorded_dtype")
        yield f"{path} says that it was recorded in {recorded}, the model was {dtype}"
    if (
        known.dtype == "map"
        and name != "query"
        and ("encoding" in variable.attrs) != (storage == "sqrt_u8")
    ):
        encoding = variable.attrs.get("encoding", "nothing of an encoding")
        yield f"{path} says {encoding}, capture.dtype is {storage}"


def _unlike_sizes(run: Run, recorded: dict[str, xr.Variable]) -> Iterator[str]:
    """Yield sizes and labels that do not fit what was asked for."""
    recipe, across, f = run.recipe, run.attributes.across, int(run.attributes["model"]["f"])
    latents = recorded["latents/latents"].sizes
    pixels = recorded["images/final"].sizes
    y, x = pixels["y"], pixels["x"]
    if (y, x) != (f * latents["y"], f * latents["x"]):
        of = f"latents of {latents['y']} x {latents['x']}"
        yield f"pictures of {y} x {x} pixels, {of}, but f = {f}"
    if (recipe.height or y, recipe.width or x) != (y, x):
        yield f"pictures of {y} x {x} pixels; {recipe.height} x {recipe.width} was asked for"
    for path, variable in recorded.items():
        if variable.sizes.get(across, recipe.count) != recipe.count:
            yield f"{path} holds {variable.sizes[across]} {across}s, not {recipe.count}"
        name = path.rpartition("/")[2]
        if name in FIXED and tuple(map(str, variable.values)) != FIXED[name]:
            yield f"{path} is {', '.join(map(str, variable.values))}, not {', '.join(FIXED[name])}"
    parts = (
        [str(part) for part in recorded["cost/component"].values]
        if "cost/component" in recorded
        else []
    )
    known = run.attributes.family not in FAMILIES or all(map(COMPONENT.fullmatch, parts))
    if not known or parts != sorted(set(parts)):
        belong = "text encoders, unet and vae, each once, belong there"
        yield f"cost/component is {', '.join(parts)}: {belong}"
    calls = recorded["step"].size
    if "decoded/decoded_step" in recorded and recipe.decoded_every:
        wanted = sorted({*range(0, calls, recipe.decoded_every), calls - 1})
        decoded = recorded["decoded/decoded_step"].values.tolist()
        if decoded != wanted:
            first = ", ".join(map(str, decoded[:8]))
            yield f"decoded/decoded_step is {first}; decode_every is {recipe.decoded_every}"
    for grid in run.grids:
        maps = next(
            recorded[f"attention/{grid}/{name}"].sizes
            for name in ("cross", "query")
            if f"attention/{grid}/{name}" in recorded
        )
        if f"{maps['y']}x{maps['x']}" != grid:
            yield f"attention/{grid} holds maps of {maps['y']}x{maps['x']}"
