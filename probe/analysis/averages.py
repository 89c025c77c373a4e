"""Means of maps over steps, layers, heads and grids. They never hold more than one step.

    maps = [run.attention(grid) for grid in run.grids]
    tokens = combined(maps)                      # (step, token, branch, image, y, x)
    by_sigma(tokens, 4, run.variable("sigma"))   # (band, token, branch, image, y, x)
    word_maps(tokens.sel(branch="cond"))         # (step, word, image, y, x)

The mean over layers and heads has one definition everywhere: first over the heads in each layer,
then over the layers of all grids.

DAAM's global map (Tang et al. 2022, arXiv:2210.04885) weighs every head alike:

    every = combined(maps, ("step", "layer", "head"), method="bicubic", weigh="heads")
    word_maps(every.sel(branch="cond"), merge="mean")

DAAM's code (castorini/daam) leaves out the mid block, and grids an eighth of the latents' size:
give it the maps of the other layers. The code sums over steps, the paper also over layers and
heads; multiply by their number. Each head's map is clipped where bicubic interpolation undershoots,
so the maps of every head are needed. A `summary` recording does not have them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import xarray as xr

from probe.analysis.maps import Method, missing, on_grid, stacked, steps_of, unrecorded
from probe.arguments import grid_size, in_words, labelled, one_of, texts
from probe.errors import ExperimentError

Weigh = Literal["layers", "heads"]
MOST_BANDS = 1000


def combined(
    maps: xr.DataArray | Sequence[xr.DataArray],
    over: Sequence[str] = ("layer", "head"),
    grid: tuple[int, int] | None = None,
    method: Method = "bilinear",
    weigh: Weigh = "layers",
) -> xr.DataArray:
    """Return maps of all grids as one: each brought to `grid`, then the mean over `over`.

    *Shape:* (step, token, branch, image, layer, head, y, x) -> the same without what is in `over`,
    float32. `over` may have "step", "image" (of a noising "draw"), "layer" and "head". `grid` is
    (y, x), default the largest given. A step that was not recorded stays NaN; a mean over steps
    leaves it out.

    With weigh="layers" each layer counts the same, as the mean over its heads; with "heads" each
    head does. The two agree if all layers have as many heads. A `summary` recording has means over
    heads: their label `heads` says of how many.

    The mean times the attribute `terms` is the sum. It is left out if no number of terms gives it:
    layers have different numbers of heads, and `weigh` is "layers". Bicubic maps are clipped at 0
    after the sum over steps, as in DAAM's code.

    Raises RecordingNotFound if no step was recorded. Raises ExperimentError for a wrong setting,
    and for grids that differ in steps, or in layers or heads that are to be kept.
    """
    over = texts("over", over)
    for dim in over:
        one_of("over", dim, ("step", "image", "draw", "layer", "head"))
    one_of("weigh", weigh, get_args(Weigh))
    one_of("method", method, get_args(Method))
    grids = _grids_in(maps)
    _check_grids(grids, over)
    sizes = [(maps.sizes["y"], maps.sizes["x"]) for maps in grids]
    size = max(sizes, key=math.prod) if grid is None else grid_size(grid)
    heads = [_heads(maps, weigh) if "head" in over else 1 for maps in grids]
    shares = [
        (number if weigh == "heads" else 1) / (maps.sizes.get("head", 1) if "head" in over else 1)
        for maps, number in zip(grids, heads, strict=True)
    ]
    total: list[np.ndarray] = []
    sums: list[xr.DataArray] = []
    weight, terms = 0.0, 0
    for maps, number, share in zip(grids, heads, shares, strict=True):
        inner = [dim for dim in over if dim != "step" and dim in maps.dims]
        sums, count = _sums_of_grid(maps, "step" in over, inner, size, method)
        sums = [one.transpose(*(dim for dim in grids[0].dims if dim in one.dims)) for one in sums]
        part = np.float32(share / max(shares))  # 1 where all layers have as many heads
        weighted = [part * one.values for one in sums]
        total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
        weight += float(part) * math.prod(maps.sizes[dim] for dim in inner) * count
        terms += number * math.prod(maps.sizes[dim] for dim in inner if dim != "head") * count
    means = [
        one.copy(data=values / np.float32(weight)) for one, values in zip(sums, total, strict=True)
    ]
    mean = means[0] if "step" in over else stacked(means, grids[0])
    mean = mean.rename(grids[0].name).assign_attrs(units="1")
    mean.attrs.pop("terms", None)
    return mean.assign_attrs(terms=terms) if weigh == "heads" or len(set(heads)) == 1 else mean


def _grids_in(maps: xr.DataArray | Sequence[xr.DataArray]) -> list[xr.DataArray]:
    """Return the maps of each grid as a list. Raise ExperimentError if there are none."""
    single = isinstance(maps, xr.DataArray | np.ndarray | str | bytes)
    several = [maps] if single or not isinstance(maps, Iterable) else maps
    grids = [labelled("maps", one, "y", "x") for one in several]
    if not grids:
        raise ExperimentError("maps is empty.", "Give the maps of at least one grid.")
    return grids


def _sums_of_grid(
    maps: xr.DataArray,
    over_steps: bool,
    inner: Sequence[str],
    size: tuple[int, int],
    method: Method,
) -> tuple[list[xr.DataArray], int]:
    """Return one grid's maps at `size`, summed over `inner`, and how many steps are in each.

    There is one array a step, or with `over_steps` a single one.
    """
    steps, count = (
        _over_steps(maps, inner if method != "bicubic" else [])
        if over_steps
        else (steps_of(maps), 1)
    )
    return [_brought(one, size, method, inner) for one in steps], count


def _check_grids(grids: Sequence[xr.DataArray], over: Sequence[str]) -> None:
    """Raise ExperimentError if maps of several grids cannot become one."""
    if len(grids) > 1 and "layer" not in over:
        raise ExperimentError(
            "These maps are of several grids, which have different layers.",
            'Choose one grid, or add "layer" to over.',
        )
    if len({one.sizes.get("head", 1) for one in grids}) > 1 and "head" not in over:
        raise ExperimentError(
            "These grids have different numbers of heads.",
            'Choose one grid, choose heads, or add "head" to over.',
        )
    if len({tuple(one["step"].values) for one in grids if "step" in one.dims}) > 1:
        raise ExperimentError(
            "These grids were recorded at different steps.", "Select the steps that they share."
        )


def _heads(maps: xr.DataArray, weigh: Weigh) -> int:
    """Return how many heads each layer has: those there are, times what each is a mean of."""
    averaged = np.unique(maps["heads"].values) if "heads" in maps.coords else np.array([1])
    if len(averaged) > 1 and weigh == "heads":
        raise ExperimentError(
            "These maps are means over different numbers of heads in one array.",
            "Give one array for each number of heads.",
        )
    return int(averaged[-1]) * maps.sizes.get("head", 1)


def _brought(
    one: xr.DataArray, size: tuple[int, int], method: Method, inner: Sequence[str]
) -> xr.DataArray:
    """Return a step's maps at another grid, summed over `inner`.

    The sum comes first where that gives the same: it is less work.
    """
    dims = [dim for dim in inner if dim in one.dims]
    if method == "bicubic":
        return on_grid(one, size, method).clip(min=0).sum(dims, skipna=False)
    return on_grid(one.sum(dims, skipna=False), size, method)


def _over_steps(maps: xr.DataArray, inner: Sequence[str]) -> tuple[Iterable[xr.DataArray], int]:
    """Return the sum over the recorded steps and over `inner`, and how many steps there were."""
    total: xr.DataArray | None = None
    count = 0
    for one in steps_of(maps):
        if not missing(one):
            count += 1
            summed = one.sum(inner, skipna=False)
            total = summed if total is None else total.copy(data=total.values + summed.values)
    if total is None:
        raise unrecorded()
    return [
        total.drop_vars([name for name, value in maps.coords.items() if "step" in value.dims])
    ], count


def by_sigma(
    maps: xr.DataArray, bands: int | Sequence[float] = 3, sigma: xr.DataArray | None = None
) -> xr.DataArray:
    """Return the mean over the steps of each band of noise levels, the noisiest first.

    *Shape:* (step, ...) -> (band, ...). Labels: `sigma_from` and `sigma_to` (from <= sigma < to;
    the noisiest band includes its upper end), and `steps`, the number of steps in the band.

    `bands` is their number, of equal width in log sigma, or their rising edges. A step outside of
    the edges is in no band; a band without steps is NaN. `sigma` gives the level of each step, if
    `maps` has no such label.

    Raises RecordingNotFound if no step was recorded. Raises ExperimentError for edges that do not
    rise, and for maps without steps or noise levels.
    """
    if sigma is not None:
        labelled("sigma", sigma, "step")
    if "step" not in labelled("maps", maps).dims or (sigma is None and "sigma" not in maps.coords):
        raise ExperimentError(
            "These maps have no noise levels.", "Give maps with steps, and `sigma` over step."
        )
    bands = checked_bands(bands)
    if not maps.sizes["step"]:
        raise unrecorded()
    levels = (maps["sigma"] if sigma is None else sigma.sel(step=maps["step"])).values.astype(float)
    edges = _edges(levels, bands)
    of_step = np.searchsorted(edges[1:-1], levels, side="right")
    of_step[~((levels >= edges[0]) & (levels <= edges[-1]))] = -1
    sums: list[np.ndarray | None] = [None] * (len(edges) - 1)
    steps = np.zeros(len(sums), int)
    for band, one in zip(of_step, steps_of(maps), strict=True):
        if band >= 0 and not missing(one):
            steps[band] += 1
            before = sums[band]
            sums[band] = one.values if before is None else before + one.values
    like = maps.isel(step=0, drop=True)
    means = [
        np.full(like.shape, np.nan, np.float32) if of is None else of / np.float32(n)
        for of, n in zip(sums, steps, strict=True)
    ]
    labels = {"sigma_from": edges[:-1], "sigma_to": edges[1:], "steps": steps}
    banded = xr.DataArray(
        np.stack(means[::-1]),
        dims=("band", *like.dims),
        coords=like.coords,
        name=maps.name,
        attrs=maps.attrs,
    )
    return banded.assign_coords({name: ("band", values[::-1]) for name, values in labels.items()})


def _edges(levels: np.ndarray, bands: int | Sequence[float]) -> np.ndarray:
    """Return the edges of the bands, rising.

    0 and infinity have no logarithm, and are in the outermost bands.
    """
    if isinstance(bands, int):
        between = levels[np.isfinite(levels) & (levels > 0)]
        if not between.size:
            raise ExperimentError(
                "No step has a noise level between 0 and infinity.", "Give the edges of the bands."
            )
        edges = np.geomspace(between.min(), between.max(), bands + 1)
        edges[0], edges[-1] = np.nanmin(levels), np.nanmax(levels)
        return edges
    return np.asarray(bands, float)


def checked_bands(bands: int | Sequence[float]) -> int | list[float]:
    """Return bands as a number from 1, or as rising edges. Raises ExperimentError otherwise."""
    if (
        isinstance(bands, int | np.integer)
        and not isinstance(bands, bool)
        and 1 <= bands <= MOST_BANDS
    ):
        return int(bands)
    if isinstance(bands, list | tuple | range | np.ndarray):
        values = np.asarray(bands, dtype=object)
        if (
            values.ndim == 1
            and 2 <= len(values) <= MOST_BANDS + 1
            and all(_is_number(edge) for edge in values)
        ):
            edges = [float(edge) for edge in values]
            if all(low < high for low, high in itertools.pairwise(edges)):
                return edges
    raise ExperimentError(
        f"bands is {in_words(bands)}.",
        f"Give a number of bands from 1 to {MOST_BANDS}, or at least two edges that rise.",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
