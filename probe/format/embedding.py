"""What an embedding holds: maps of the paths of runs, in a small zarr group of their own.

An embedding is no recording. It lies in `runs/embeddings/`, and `xarray.open_zarr` opens it. Its
variables are in the table `VARIABLES`, its attributes are those of `EmbeddingAttributes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from probe.format.attributes import Count, Part, Text, Texts, Whole
from probe.format.schema import ArraySpec
from probe.format.variables import Variable

KIND, VERSION = "embedding", 1
FOLDER = "embeddings"  # in a folder of recordings
METHODS = ("pca", "umap", "aligned")
NO_SEED = -1  # of a map that nothing was drawn for
Names = Annotated[list[Text], Field(min_length=1, max_length=1000)]
Seeds = Annotated[list[Whole], Field(max_length=100)]


class EmbeddedRun(Part):
    """A run of an embedding."""

    name: Text = Field(description="its name on the maps, which no other run has there")
    path: Text = Field(description="where it was, ~ for the home folder")
    mark: Text = Field(description="SHA-256 of its digests.txt, or of its zarr.json without one")
    steps: Count = Field(description="number of its steps on the maps")


class EmbeddingAttributes(Part):
    """The attributes of an embedding."""

    kind: Literal["embedding"] = Field(description="says that it is no recording")
    embedding_version: Literal[1] = Field(description="version of this layout")
    of: Literal["latents", "denoised"] = Field(description="what each step gives to the maps")
    image: Whole = Field(description="index of the image in each recording")
    features: Count = Field(description="number of values of the latents of one step")
    runs: Annotated[list[EmbeddedRun], Field(min_length=1, max_length=1000)] = Field(
        description="the runs, in the order in which they were aligned"
    )
    methods: Names = Field(description="methods of the maps: pca, umap, aligned")
    seeds: Seeds = Field(description="seeds of the maps by UMAP and AlignedUMAP")
    walk_seed: Whole = Field(description="seed of random walk 0; walk i has this + i")
    neighbours: Whole = Field(description="neighbours that UMAP was asked to keep")
    compared_neighbours: Count = Field(description="neighbours that `kept` counts")
    versions: Texts = Field(description="versions of the libraries that computed it")
    created: Text = Field(description="when it was computed: ISO 8601, UTC")


def _row(name: str, dims: str, dtype: str, text: str, coordinate: bool = False) -> Variable:
    return Variable("", name, tuple(dims.split()), dtype, text, "1", coordinate)


VARIABLES = {
    row.name: row
    for row in (
        _row("run", "point", "str", "name of the run that a point is of", True),
        _row("step", "point", "int64", "index of the model call that a point is of", True),
        _row("sigma", "point", "float64", "noise level sqrt((1 - alpha_bar) / alpha_bar)", True),
        _row("method", "map", "str", "how a map was made: pca, umap or aligned", True),
        _row("seed", "map", "int64", f"seed of a map; {NO_SEED} where nothing was drawn", True),
        _row("position", "map point axis", "float32", "where each point lies on each map"),
        _row("kept", "map", "float64", "share of nearest neighbours that a map keeps"),
        _row("by_chance", "map", "float64", "the share that a map without sense keeps"),
        _row("kept_within", "map", "float64", "the same among the steps of one run"),
        _row("within_by_chance", "map", "float64", "the share that a map without sense keeps"),
        _row("trustworthiness", "map", "float64", "1 where no far point came near on the map"),
        _row("explained", "component", "float64", "share of the variance of a component"),
        _row("walk_explained", "walk component", "float64", "the same of random walks"),
        _row("walk_position", "point axis", "float32", "components 1 and 2 of random walk 0"),
    )
}


def specs(values: Mapping[str, Any]) -> list[ArraySpec]:
    """Return the variables of an embedding with their values, in the order of the table."""
    made = []
    for name, row in VARIABLES.items():
        value = np.asarray(values[name], dtype=object if row.dtype == "str" else row.dtype)
        made.append(ArraySpec("", row, value.shape, row.dtype, value))
    return made


def spec(group: str, name: str, shape: Sequence[int]) -> ArraySpec:
    """Return the variable of a name, for a shape. Raise KeyError for one that is not in the table.

    It has the arguments of `probe.format.schema.spec`.
    """
    if group:
        raise KeyError(f"an embedding has no group {group!r}")
    return ArraySpec("", VARIABLES[name], tuple(shape), VARIABLES[name].dtype)


def problem_of(attributes: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the attributes of an embedding, or None."""
    try:
        EmbeddingAttributes.model_validate(dict(attributes))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1])
        return f"its {place} is not what an embedding has there"
    return None
