"""What single heads do: how narrow their maps are, what they look at, which find a word.

    found = head_statistics(run.attention("16x16"))   # (step, token, ..., layer, head)
    by_kind(found["mass"])         # shares of BOS, words, other, EOS and rest
    overlap(word_maps(maps))       # (step, word, other_word, ...): do two words share a place?
    ranked_heads(scores)           # chosen on half of the scenes, reported on the others
    contribution(maps, sizes)      # attention times the size of what a token writes

Maps are read one step at a time. BOS, EOS and rest are in every result that has tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import xarray as xr
from xarray.backends.common import BackendArray
from xarray.core import indexing

from probe.analysis.maps import missing, normalised, numbers, stacked, steps_of, stepwise
from probe.arguments import labelled, one_of, whole_number
from probe.errors import ExperimentError
from probe.format.schema import REST

END = "<|endoftext|>"
KINDS = ("BOS", "words", "other", "EOS", "rest")

# --- the shape of a map ---------------------------------------------------------------------------


def head_statistics(maps: xr.DataArray) -> xr.Dataset:
    """Return what each map is like, in four numbers.

    *Shape:* (..., y, x) -> each (...), float32.

    `mass` is the mean over pixels, a token's share of all attention. Over all tokens it sums to 1.

    `entropy` is that of the map as a distribution over space, in nats: from 0 (one pixel) to ln of
    the number of pixels (even).

    `concentration` is the Gini index, from 0 (even) to nearly 1 (one pixel). It stays the same when
    a map is scaled or each pixel becomes four, so that grids can be compared (Hurley and Rickard
    2009, arXiv:0811.4706).

    `change` is how much of the distribution moved since the recorded step before, from 0 to 1
    (total variation). It is NaN at the first step.

    A map that is 0 everywhere has no shape: all but its mass are NaN.
    """
    rows: dict[str, list[xr.DataArray]] = {
        "mass": [],
        "entropy": [],
        "concentration": [],
        "change": [],
    }
    before: xr.DataArray | None = None
    labelled("maps", maps, "y", "x")
    for one in steps_of(maps):
        mass = one.mean(("y", "x"), skipna=False)
        share = normalised(one, "space").where(mass > 0)
        rows["mass"].append(mass)
        rows["entropy"].append(_entropy(share))
        rows["concentration"].append(_gini(share))
        rows["change"].append(
            mass * np.nan
            if before is None
            else abs(share - before.values).sum(("y", "x"), skipna=False) / 2
        )
        if not missing(one):
            before = share
    return xr.Dataset(
        {name: stacked(parts, maps).astype("float32").rename(name) for name, parts in rows.items()}
    )


def _entropy(share: xr.DataArray) -> xr.DataArray:
    values = share.values
    logs = np.log(values, out=np.zeros_like(values), where=~(values <= 0))
    entropy: xr.DataArray = -(share * logs).sum(("y", "x"), skipna=False)
    return entropy.clip(min=0)


def _gini(share: xr.DataArray) -> xr.DataArray:
    """Return the Gini index of maps that each sum to 1.

    It is the weighted sum of their values in rising order.
    """
    last = share.transpose(..., "y", "x")
    rising = np.sort(last.values.reshape(*last.shape[:-2], -1), axis=-1)
    n = rising.shape[-1]
    weights = (2 * np.arange(1, n + 1) - n - 1) / n
    return last.isel(y=0, x=0, drop=True).copy(
        data=(rising @ weights.astype(np.float32)).clip(0, 1)
    )


def overlap(words: xr.DataArray, how: Literal["cosine", "iou"] = "cosine") -> xr.DataArray:
    """Return how much the maps of two words are in one place, for each two, from 0 to 1.

    *Shape:* (word, ..., y, x) -> (word, ..., other_word).

    "cosine" is that of the angle between them; it is high for any two maps that are nearly even.
    "iou" scales both by "min-max", and divides the sum of the lesser by that of the greater (the
    Jaccard index of fuzzy sets). NaN for a map that is 0 everywhere, and for "iou" of two constant
    maps. Raises ExperimentError for another measure.
    """
    one_of("how", how, ("cosine", "iou"))
    labelled("words", words, "word", "y", "x")

    def of_step(one: xr.DataArray) -> xr.DataArray:
        maps = (normalised(one, "min-max") if how == "iou" else one).transpose(
            "word", ..., "y", "x"
        )
        values, space = maps.values, (-2, -1)
        size = values.sum(space) if how == "iou" else np.sqrt(np.square(values).sum(space))
        shared = np.zeros((*size.shape, len(values)), np.float32)
        for index, other in enumerate(values):
            both = (np.minimum(values, other) if how == "iou" else values * other).sum(space)
            either = size + size[index] - both if how == "iou" else size * size[index]
            shared[..., index] = np.divide(
                both, either, out=np.full_like(both, np.nan), where=either > 0
            ).clip(0, 1)
        return xr.DataArray(
            shared,
            dims=(*maps.dims[:-2], "other_word"),
            coords=maps.isel(y=0, x=0, drop=True).coords,
        )

    return stepwise(of_step, words).assign_coords(other_word=words["word"].values).rename("overlap")


# --- what tokens are ------------------------------------------------------------------------------


def token_kinds(maps: xr.DataArray) -> xr.DataArray:
    """Return what each token is, one of `KINDS`.

    *Shape:* that of the label `word_index`: (token) or (branch, token).

    BOS is the first token, EOS the first end of the text. "words" have a word. "other" is between
    BOS and EOS and has none, as punctuation. "rest" is all after EOS: the padding, one by one or
    summed.
    """
    if lost := [
        name
        for name in ("word_index", "token_text", "token")
        if name not in labelled("maps", maps, "token").coords
    ]:
        raise ExperimentError(
            f"maps has no label {lost[0]}: nothing says what its tokens are.",
            "Give maps as the methods of a run return them.",
        )
    number = maps["word_index"].transpose(..., "token")
    texts, places = maps["token_text"].transpose(*number.dims).values, maps["token"].values
    kinds = np.full(number.shape, "other", dtype=object)
    for row, numbers_, names in zip(
        kinds.reshape(-1, len(places)),
        *(a.reshape(-1, len(places)) for a in (number.values, texts)),
        strict=True,
    ):
        ends = [
            place
            for place, n, text in zip(places, numbers_, names, strict=True)
            if place > 0 and n < 0 and str(text) == END
        ]
        row[numbers_ >= 0] = "words"
        row[places == 0] = "BOS"
        row[places == REST] = "rest"
        if ends:
            row[places == min(ends)] = "EOS"
            row[places > min(ends)] = "rest"
    return xr.DataArray(
        kinds,
        dims=number.dims,
        coords={dim: maps[dim] for dim in number.dims if dim in maps.coords},
        name="kind",
    )


def by_kind(values: xr.DataArray, kinds: xr.DataArray | None = None) -> xr.DataArray:
    """Return values added up by kind of token: masses, or whole maps.

    *Shape:* (token, ...) -> (kind, ...), with all of `KINDS`. `kinds` says what each token is, if
    `values` has lost its labels. Masses of all kinds sum to 1.
    """
    labelled("values", values, "token")
    kinds = token_kinds(values) if kinds is None else kinds
    if not isinstance(kinds, xr.DataArray) or "token" not in kinds.dims:
        raise ExperimentError("kinds has no tokens.", "Give what token_kinds returned.")

    def added(one: xr.DataArray) -> xr.DataArray:
        parts = [
            one.where(kinds == kind, 0)
            .sum("token", skipna=False)
            .transpose(*(d for d in one.dims if d != "token"))
            for kind in KINDS
        ]
        coords = {name: value for name, value in one.coords.items() if "token" not in value.dims}
        axis = one.get_axis_num("token")
        dims = [*(d for d in one.dims if d != "token")]
        dims.insert(axis, "kind")
        return xr.DataArray(
            np.stack([part.values for part in parts], axis=axis),
            dims=dims,
            coords=coords,
            name=values.name,
        )

    return (
        stepwise(added, values)
        .assign_coords(kind=list(KINDS))
        .transpose(*("kind" if d == "token" else d for d in values.dims))
    )


# --- which heads find a word ----------------------------------------------------------------------


def ranked_heads(scores: xr.DataArray, seed: int = 0) -> xr.Dataset:
    """Return the best heads on one half of the scenes, and their scores on the other half.

    *Shape:* (scene, layer, head) -> `chosen` (rank) and `reported` (rank), means over each half,
    with each rank's `layer` and `head`; and `reported_scores` (reported_scene, rank), for an
    interval. Every dimension but `scene` is ranked, the best first.

    `seed` draws the halves. The labels `chosen_scene` and `reported_scene` and the attribute
    `split` tell them. NaN scores (a scene without the word) do not count. Heads without any score
    in the choosing half are left out. Raises ExperimentError for fewer than two scenes, and for
    scores without the dimension `scene`.
    """
    if not isinstance(scores, xr.DataArray) or "scene" not in scores.dims:
        raise ExperimentError(
            "scores is no array over scenes.",
            'Join the scores of each scene: xarray.concat([...], dim="scene").',
        )
    labelled("scores", scores)
    seed = whole_number("seed", seed)
    if scores.sizes["scene"] < 2:
        raise ExperimentError(
            "With fewer than two scenes there are no two halves.",
            "Give more: one half chooses heads, the other reports on them.",
        )
    dims = [dim for dim in scores.dims if dim != "scene"]
    labels = {
        dim: scores[dim].values if dim in scores.coords else np.arange(size)
        for dim, size in scores.sizes.items()
    }
    rows = scores.transpose("scene", *dims).values.reshape(scores.sizes["scene"], -1)
    order = np.random.default_rng(seed).permutation(len(rows))
    choosing, reporting = (np.sort(half) for half in np.split(order, [len(order) // 2]))
    chosen, reported = (_mean_of_finite(rows[half]) for half in (choosing, reporting))
    best = np.argsort(-chosen, kind="stable")[: np.isfinite(chosen).sum()]  # NaN comes last
    places = np.unravel_index(best, [scores.sizes[dim] for dim in dims])
    return xr.Dataset(
        {
            "chosen": ("rank", chosen[best]),
            "reported": ("rank", reported[best]),
            "reported_scores": (("reported_scene", "rank"), rows[reporting][:, best]),
        },
        coords={
            **{dim: ("rank", labels[dim][place]) for dim, place in zip(dims, places, strict=True)},
            "chosen_scene": labels["scene"][choosing],
            "reported_scene": labels["scene"][reporting],
        },
        attrs={
            "split": f"{len(choosing)} scenes chose, {len(reporting)} others report; drawn with "
            f"seed {seed}",
            "seed": seed,
        },
    )


def _mean_of_finite(rows: np.ndarray) -> np.ndarray:
    there = np.isfinite(rows)
    total = np.where(there, rows, 0).sum(axis=0, dtype=float)
    return np.asarray(
        np.divide(
            total, there.sum(axis=0), out=np.full(total.shape, np.nan), where=there.any(axis=0)
        )
    )


# --- what is written ------------------------------------------------------------------------------


def contribution(maps: xr.DataArray, sizes: xr.DataArray) -> xr.DataArray:
    """Return attention times |v W_O|: the size of what each token writes into a pixel. Lazy.

    *Shape:* maps (..., token, ..., layer, head, y, x), sizes (branch, token, layer, head) -> as
    maps, float32, in the units of the layer's output.

    The size of `rest` is the mean over its tokens: its contribution is exact only if they write
    alike. What tokens write are vectors, so these lengths do not add up to that of the sum
    (Kobayashi et al. 2020, arXiv:2004.10102, for language models).

    Raises ExperimentError for maps without the layers, heads or tokens of `sizes`: multiply before
    you take the mean.
    """
    labelled("maps", maps)
    labelled("sizes", sizes)
    chosen = sizes
    for dim in sizes.dims:
        if dim in maps.coords and dim in sizes.coords:
            try:
                chosen = chosen.sel(
                    {dim: maps[dim].values if dim in maps.dims else maps[dim].item()}
                )
            except KeyError as problem:
                raise ExperimentError(
                    f"The sizes have no {dim} {problem}: they are of another recording or grid.",
                    "Give value_size of the grid of these maps.",
                ) from problem
        elif dim not in maps.dims or maps.sizes[dim] != sizes.sizes[dim]:
            raise ExperimentError(
                f"These maps have not each {dim} that the sizes tell apart.",
                f"They have to be whole: multiply before the mean over {dim}s is taken.",
            )
    lazy = indexing.LazilyIndexedArray(_Product(maps, numbers(chosen).variable))
    what = "attention times the size of what a token writes"
    return xr.DataArray(
        xr.Variable(maps.dims, lazy),
        coords=maps.coords,
        name="contribution",
        attrs={"long_name": what},
    )


class _Product(BackendArray):
    """Maps times sizes, computed where it is read."""

    def __init__(self, maps: xr.DataArray, sizes: xr.Variable):
        self._maps, self._sizes = maps, sizes
        self.shape, self.dtype = maps.shape, np.dtype(np.float32)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._compute
        )

    def _compute(self, key: tuple[Any, ...]) -> np.ndarray:
        which = dict(zip(self._maps.dims, key, strict=True))
        maps = numbers(self._maps.isel(which))
        sizes = self._sizes.isel({dim: which[dim] for dim in self._sizes.dims})
        return np.asarray((maps.variable * sizes).transpose(*maps.dims).values, dtype=np.float32)
