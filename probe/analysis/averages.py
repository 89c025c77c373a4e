"""Maps of many steps, layers, heads and grids as few: means that never hold more than one step.

    maps = [run.attention(grid) for grid in run.grids]       # (step, token, branch, image, layer, head, y, x), one for each grid
    tokens = combined(maps)                                  # (step, token, branch, image, y, x): the mean over layers and heads
    by_sigma(tokens, 4, run.variable("sigma"))               # (band, token, branch, image, y, x): at which noise level
    word_maps(tokens.sel(branch="cond"))                     # (step, word, image, y, x)

The mean over layers and heads is one definition everywhere: first over the heads in each layer,
then over the layers of all grids.

DAAM's global map (Tang et al. 2022, arXiv:2210.04885) weighs every head alike. Its code (castorini/daam) leaves out the mid block, and
grids an eighth of the latents' size. Given the maps of the other layers, it is
    word_maps(combined(maps, over=("step", "layer", "head"), method="bicubic", weigh="heads").sel(branch="cond"), merge="mean")
for each step; the code sums over steps, the paper also over layers and heads: multiply by their number. It needs the maps of every
head, which a `summary` recording has not: each is clipped where bicubic interpolation undershoots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import xarray as xr

from probe.analysis.maps import Method, missing, on_grid, stacked, steps_of, unrecorded
from probe.arguments import grid_size, labelled, one_of, texts, told
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
    """Maps of all grids as one: each brought to `grid`, (y, x), default the largest given; then the
    mean over `over`.

    *Shape:* (step, token, branch, image, layer, head, y, x) -> the same without what is in `over`
    ("step", "image", "layer", "head"; of a noising "draw" for "image"), float32. A step that was
    not recorded stays NaN, and does not count where "step" is in `over`.

    `weigh` says what counts the same. "layers": each layer, as the mean over its heads. "heads":
    each head, so that a layer with more heads counts more. They are the same where all layers have
    as many heads. The maps of a `summary` recording are means over heads already: their coordinate
    `heads` says of how many.

    The attribute `terms` is the number of maps: mean times `terms` is the sum, which DAAM's paper
    has. It is left out where layers have unlike numbers of heads and `weigh` is "layers": no
    multiple of that mean is the sum. Bicubic maps are clipped at 0 after the sum over steps and
    before all others, as DAAM's code does it; of a `summary`, after the mean over heads.

    Raises RecordingNotFound when no step was recorded, and ExperimentError for another dimension or
    weight, for grids of unlike steps, and for grids whose layers or heads cannot be kept apart,
    since they differ.
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
    """Whether maps of several grids can become one."""
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
    """How many heads each layer has: those there are, times those that each is the mean of."""
    behind = np.unique(maps["heads"].values) if "heads" in maps.coords else np.array([1])
    if len(behind) > 1 and weigh == "heads":
        raise ExperimentError(
            "These maps are means over different numbers of heads in one array.",
            "Give one array for each number of heads.",
        )
    return int(behind[-1]) * maps.sizes.get("head", 1)


def _brought(
    one: xr.DataArray, size: tuple[int, int], method: Method, inner: Sequence[str]
) -> xr.DataArray:
    """A step's maps at another grid, summed over `inner`: before, where that is the same and less
    work.
    """
    dims = [dim for dim in inner if dim in one.dims]
    if method == "bicubic":
        return on_grid(one, size, method).clip(min=0).sum(dims, skipna=False)
    return on_grid(one.sum(dims, skipna=False), size, method)


def _over_steps(maps: xr.DataArray, inner: Sequence[str]) -> tuple[Iterable[xr.DataArray], int]:
    """The sum over the steps that were recorded, and over `inner`; and how many steps there
    were.
    """
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
    """The mean over the steps of each band of noise levels, the noisiest first: maps resolved in
    time.

    *Shape:* (step, ...) -> (band, ...), labelled by `sigma_from` and `sigma_to` (from <= sigma <
    to; the noisiest band has its upper end too) and by `steps`, the number of steps in it. `bands`:
    how many, of equal width in log sigma, or their edges, rising; a step outside of the edges is in
    no band. `sigma`: over `step`, where `maps` has no such coordinate. A band without steps is NaN.
    Raises RecordingNotFound when no step was recorded, and ExperimentError for edges that do not
    rise, for maps without a step axis, and for maps without noise levels.
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
    whole = xr.DataArray(
        np.stack(means[::-1]),
        dims=("band", *like.dims),
        coords=like.coords,
        name=maps.name,
        attrs=maps.attrs,
    )
    return whole.assign_coords({name: ("band", values[::-1]) for name, values in labels.items()})


def _edges(levels: np.ndarray, bands: int | Sequence[float]) -> np.ndarray:
    """The edges of the bands, rising; 0 and infinity, which have no logarithm, are in the
    outermost.
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
    """Bands as a number from 1, or as edges that rise. Raises ExperimentError for anything else."""
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
        f"bands is {told(bands)}.",
        f"Give a number of bands from 1 to {MOST_BANDS}, or at least two edges that rise.",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
