"""Attention maps that follow from recorded queries and keys, computed when they are read.

    maps = recomputed(query, key)      # labelled like recorded maps; nothing is computed yet
    maps.sel(step=3, token=5).values   # computes step 3

One step at a time is computed, so that memory stays small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from xarray.backends.common import BackendArray
from xarray.core import indexing

from probe.analysis.maps import maps_of

# `image` or, of a noising, `draw` is the fourth.
DIMS = ("step", "token", "branch", "image", "layer", "head", "y", "x")


class _Maps(BackendArray):
    """The maps as an array that xarray reads lazily."""

    def __init__(self, query: xr.DataArray, key: np.ndarray):
        self._query, self._key = query.rename(draw="image") if "draw" in query.dims else query, key
        sizes = {**self._query.sizes, "token": key.shape[1]}
        self.shape = tuple(sizes[dim] for dim in DIMS)
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._compute
        )

    def _compute(self, key: tuple[Any, ...]) -> np.ndarray:
        which = dict(zip(DIMS, key, strict=True))
        steps = np.atleast_1d(np.arange(self.shape[0])[which["step"]])
        rows = {
            dim: np.atleast_1d(np.arange(size)[which[dim]])
            for dim, size in zip(DIMS, self.shape, strict=True)
        }
        few = {dim: rows[dim] for dim in ("branch", "image", "layer", "head")}
        text = self._key[
            np.ix_(few["branch"], np.arange(self.shape[1]), few["layer"], few["head"])
        ]  # every token: the softmax is over all
        parts = []
        for step in steps:
            query = self._query.isel({"step": int(step), **few}).transpose(
                "branch", "image", "layer", "head", "key_feature", "y", "x"
            )
            parts.append(
                maps_of(query.values, text)[
                    np.ix_(
                        rows["token"], *map(np.arange, map(len, few.values())), rows["y"], rows["x"]
                    )
                ]
            )
        stacked = (
            np.stack(parts)
            if parts
            else np.zeros((0, *map(len, list(rows.values())[1:])), np.float32)
        )
        return stacked[
            tuple(0 if isinstance(which[dim], int | np.integer) else slice(None) for dim in DIMS)
        ]


def recomputed(query: xr.DataArray, key: xr.DataArray) -> xr.DataArray:
    """Return maps from both sides of attention, lazily.

    *Shape:* query (step, branch, image, layer, head, key_feature, y, x) and key (branch, token,
    layer, head, key_feature) -> (step, token, branch, image, layer, head, y, x) float32.
    """
    sides = key.transpose("branch", "token", "layer", "head", "key_feature").values
    coords = {
        str(name): value
        for side in (query, key)
        for name, value in side.coords.items()
        if "key_feature" not in value.dims
    }
    lazy = indexing.LazilyIndexedArray(_Maps(query, sides))
    dims = ["draw" if dim == "image" and "draw" in query.dims else dim for dim in DIMS]
    return xr.DataArray(
        xr.Variable(dims, lazy),
        coords=coords,
        name="cross",
        attrs={"long_name": "cross-attention, computed from query and key"},
    )
