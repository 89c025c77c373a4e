"""Masks from maps, and how well either agrees with the truth.

    masks = threshold(normalised(maps, "min-max"), 0.4)   # or argmax_masks(maps)
    masks = threshold(maps, area_threshold(maps, truth))
    iou(masks, truth), mean_iou(masks, truth), pixel_accuracy(masks, truth)
    average_precision(maps, truth)                        # needs no threshold
    interval(scores, over="scene")                        # the mean, and how far to trust it

Maps and truth meet on one grid: `analysis.on_grid` brings maps to pixels, and masks to a grid by
the mean over areas. Other dimensions (step, layer, head, word, scene) are matched by name, and
stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe.analysis.maps import numbers
from probe.arguments import in_words, labelled, mask, text, texts, whole_number
from probe.errors import ExperimentError

SPACE = ("y", "x")
BLOCK = 1 << 20  # values that are sorted at once, which takes 50 MB

# --- masks ----------------------------------------------------------------------------------------


def threshold(maps: xr.DataArray, at: float | xr.DataArray) -> xr.DataArray:
    """Return where a map reaches a level. NaN reaches nothing.

    *Shape:* maps (..., y, x), `at` a number or (...) -> bool (..., y, x).
    """
    decoded = numbers(labelled("maps", maps, *SPACE))
    _check_level("at", at)
    if isinstance(at, xr.DataArray):
        decoded, at = _aligned(decoded, at)
    return (decoded >= at).transpose(..., *SPACE)


def argmax_masks(words: xr.DataArray, least: float | xr.DataArray | None = None) -> xr.DataArray:
    """Return for each word the pixels where it has the greatest value of all words.

    *Shape:* (word, ..., y, x) -> bool, as it was. Of equals the first word wins; NaN never does.
    Pixels where no word reaches `least` are nobody's.
    """
    decoded = numbers(labelled("words", words, "word", *SPACE))
    if least is not None:
        _check_level("least", least)
    filled = decoded.fillna(-np.inf)
    axis = decoded.get_axis_num("word")
    first = np.expand_dims(filled.values.argmax(axis), axis) if words.sizes["word"] else np.zeros(1)
    place = np.arange(words.sizes["word"]).reshape([-1 if d == "word" else 1 for d in words.dims])
    mine = decoded.copy(data=(place == first) & np.isfinite(filled.values))
    if isinstance(least, xr.DataArray):
        decoded, least = _aligned(decoded, least)
    return (mine & (decoded >= least)).transpose(*words.dims) if least is not None else mine


def _check_level(name: str, level: object) -> None:
    if isinstance(level, xr.DataArray):
        labelled(name, level)
    elif not isinstance(level, int | float | np.integer | np.floating) or isinstance(level, bool):
        raise ExperimentError(
            f"{name} is {in_words(level)}, which is no level.",
            "Give a number, or an array with labels.",
        )


def area_threshold(maps: xr.DataArray, truth: xr.DataArray) -> xr.DataArray:
    """Return the level at which a map's mask has the area of the truth.

    *Shape:* (..., y, x) and (..., y, x) -> (...). With n true pixels it is the n-th greatest value,
    or infinity if n is 0. If values tie at that level, the mask is larger than the truth: of a
    constant map it is the whole picture. This uses the truth's size: say so beside the result.
    """
    scores, true = _rows(maps, truth)
    levels = np.full(len(scores.rows), np.inf, scores.rows.dtype)
    area = true.rows.sum(axis=1)
    for block in _blocks(scores.rows):
        falling = -np.sort(-scores.rows[block], axis=1)
        nth = np.take_along_axis(falling, np.maximum(area[block], 1)[:, None] - 1, axis=1)[:, 0]
        levels[block] = np.where(area[block] > 0, nth, np.inf)
    return scores.labelled(levels, "level")


# --- agreement of masks ---------------------------------------------------------------------------


def iou(masks: xr.DataArray, truth: xr.DataArray, pool: Sequence[str] = ()) -> xr.DataArray:
    """Return the intersection over union.

    *Shape:* bool (..., y, x) and bool (..., y, x) -> (...), without `pool`.

    `pool` names dimensions over which intersections and unions are added up first. Pascal VOC does
    so over scenes: large objects then count more. Without it every mask counts the same. NaN if
    both are empty.
    """
    a, b = _masks(masks, truth)
    over = (*SPACE, *_dims("pool", pool, a, b))
    either = (a | b).sum(over)
    return ((a & b).sum(over) / either.where(either > 0)).rename("iou")


def mean_iou(
    masks: xr.DataArray,
    truth: xr.DataArray,
    over: Sequence[str] = ("word",),
    pool: Sequence[str] = (),
) -> xr.DataArray:
    """Return the mean of `iou` over some dimensions (mIoU). Pairs of empty masks do not count.

    *Shape:* (..., y, x) -> (...).
    """
    scores = iou(masks, truth, pool)
    return scores.mean(_dims("over", over, scores), skipna=True).rename("mean_iou")


def pixel_accuracy(
    masks: xr.DataArray, truth: xr.DataArray, classes: str | None = None
) -> xr.DataArray:
    """Return the share of pixels where mask and truth say the same.

    *Shape:* bool (..., y, x) and bool (..., y, x) -> (...).

    `classes` is a dimension ("word") over which all have to say the same; without it each mask is
    judged by itself. Even an empty mask of a small thing scores high: look at `iou` too.
    """
    a, b = _masks(masks, truth)
    same = a == b
    if classes is not None:
        _dims("classes", text("classes", classes), same)
    return (same.all(classes) if classes else same).mean(SPACE).rename("pixel_accuracy")


def _dims(name: str, given: object, *arrays: xr.DataArray) -> list[str]:
    """Return names of dimensions. Raise ExperimentError for one that no array has."""
    named = list(dict.fromkeys(texts(name, given)))
    known = [
        str(dim)
        for dim in dict.fromkeys(dim for array in arrays for dim in array.dims)
        if dim not in SPACE
    ]
    if wrong := [dim for dim in named if dim not in known]:
        raise ExperimentError(
            f"{name}: there is no dimension {wrong[0]!r}.",
            f"There are: {', '.join(known) or 'none'}.",
        )
    return named


def _masks(masks: xr.DataArray, truth: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    truth = mask("truth", truth, labelled("masks", masks, *SPACE))
    for name, one in (("masks", masks), ("truth", truth)):
        if one.dtype != bool:
            raise ExperimentError(
                f"{name} has the type {one.dtype}: make masks of it first.",
                "Use threshold or argmax_masks, or write mask > 0.",
            )
    _same_grid(masks, truth)
    return _aligned(masks, truth)


def _aligned(a: xr.DataArray, b: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Return both arrays. Raise ExperimentError if their labels differ."""
    try:
        left, right = xr.align(a, b, join="exact", copy=False)
    except xr.AlignmentError as problem:
        raise ExperimentError(
            f"Two arrays do not fit together: {str(problem).splitlines()[0]}.",
            "Select the same labels of both.",
        ) from problem
    return left, right


def _same_grid(maps: xr.DataArray, truth: xr.DataArray) -> None:
    sizes = [tuple(one.sizes[d] for d in SPACE) for one in (maps, truth)]
    if sizes[0] != sizes[1]:
        raise ExperimentError(
            f"maps of {sizes[0]} and truth of {sizes[1]} pixels (y, x) have no common grid.",
            "Bring one to the other with analysis.on_grid.",
        )


# --- agreement of maps ----------------------------------------------------------------------------


def average_precision(maps: xr.DataArray, truth: xr.DataArray) -> xr.DataArray:
    """Return the average precision of each map as a score of its pixels.

    *Shape:* (..., y, x) and bool (..., y, x) -> (...), float64. `truth` may be a plain (y, x)
    array.

    It is the sum over levels of precision times the growth of recall, without interpolation, as
    scikit-learn's `average_precision_score`. Equal values are one level, so a constant map scores
    the share of true pixels. Any rising function of a map scores the same. NaN if nothing is true,
    or the map is not finite.
    """
    scores, true = _rows(maps, truth)
    precisions = np.empty(len(scores.rows))
    for block in _blocks(scores.rows):
        precisions[block] = _precision(scores.rows[block], true.rows[block])
    return scores.labelled(precisions, "average_precision")


def _precision(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    order = np.argsort(-scores, axis=1)
    falling = np.take_along_axis(scores, order, axis=1)
    hits = np.take_along_axis(true, order, axis=1)
    pixels = falling.shape[1]
    ends = np.append(
        falling[:, 1:] != falling[:, :-1], np.ones((len(scores), 1), bool), axis=1
    )  # the last of each level
    of = np.minimum.accumulate(np.where(ends, np.arange(pixels), pixels)[:, ::-1], axis=1)[:, ::-1]
    precision = np.take_along_axis(hits.cumsum(axis=1), of, axis=1) / (of + 1)
    count = hits.sum(axis=1)
    mean = (precision * hits).sum(axis=1) / np.maximum(count, 1)
    return np.where((count > 0) & np.isfinite(scores).all(axis=1), mean, np.nan)


class _Rows:
    """An array as (map, pixel), and the way back to labels for one number a map."""

    def __init__(self, array: xr.DataArray):
        last = array.transpose(..., *SPACE)
        self.rows = last.values.reshape(-1, last.sizes["y"] * last.sizes["x"])
        self._like = last.isel(y=0, x=0, drop=True)

    def labelled(self, values: np.ndarray, name: str) -> xr.DataArray:
        return self._like.copy(data=values.reshape(self._like.shape)).rename(name).drop_attrs()


def _rows(maps: xr.DataArray, truth: xr.DataArray) -> tuple[_Rows, _Rows]:
    truth = mask("truth", truth, labelled("maps", maps, *SPACE))
    if truth.dtype != bool:
        raise ExperimentError(
            f"truth has the type {truth.dtype}: make masks of it first.",
            "Use threshold, or write mask > 0.",
        )
    _same_grid(maps, truth)
    a, b = xr.broadcast(*_aligned(numbers(maps), truth))
    return _Rows(a), _Rows(b.transpose(*a.dims))


def _blocks(rows: np.ndarray) -> list[slice]:
    step = max(1, BLOCK // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


# --- how far a mean can be trusted ----------------------------------------------------------------


def interval(
    scores: xr.DataArray,
    over: str = "scene",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Return the mean over scenes and its bootstrap interval.

    *Shape:* (scene, ...) -> `mean`, `low`, `high` and `scenes` (how many counted), each (...).

    Scenes are drawn again with replacement, the same ones for all scores. The ends are percentiles
    of the resampled means (Efron and Tibshirani 1993, chapter 13). NaN scores do not count; fewer
    than two scenes give NaN. To compare two methods, give their difference on the same scenes. The
    interval says how the result varies with the scenes, and nothing about the seed of the training.
    """
    text("over", over)
    resamples, seed = whole_number("resamples", resamples, 1, 10**6), whole_number("seed", seed)
    if not isinstance(level, float | np.floating) or not 0 < level < 1:
        raise ExperimentError(f"level is {in_words(level)}.", "It lies between 0 and 1: 0.95.")
    if not labelled("scores", scores, over).sizes[over]:
        raise ExperimentError(f"There is no {over} to take the mean of.", "Give scores of some.")
    rows = scores.transpose(over, ...)
    n = rows.sizes[over]
    values = rows.values.reshape(n, -1).astype(float)
    finite = np.isfinite(values)
    filled = np.where(finite, values, 0)
    counts = finite.sum(axis=0)
    drawn = (
        np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    )
    weight = drawn @ finite
    means = np.divide(drawn @ filled, weight, out=np.full(weight.shape, np.nan), where=weight > 0)
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.full((2, values.shape[1]), np.nan)
    enough = counts > 1
    if enough.any():
        low[enough], high[enough] = np.nanquantile(means[:, enough], tails, axis=0)
    mean = np.divide(
        filled.sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0
    )
    like = rows.isel({over: 0}, drop=True)
    parts = {
        name: like.copy(data=of.reshape(like.shape))
        for name, of in (("mean", mean), ("low", low), ("high", high), ("scenes", counts))
    }
    return xr.Dataset(parts, attrs={"level": level, "resamples": resamples, "seed": seed})
