"""Recorded maps as numbers, on a grid, and merged to words: pure functions, without torch.

    words = word_maps(run.attention("16x16").sel(branch="cond"))
    phrase(words, "scuba diving")                 # its words together, wherever it occurs
    normalised(content_words(words), "words")     # each pixel's shares over the content words
    against_others(content_words(words))          # a word's map less the mean of the others'

Plain arrays come first (`probabilities`, `maps_of`, `resize`), then labelled ones. Those address
dimensions by name and keep their labels. Maps are read one step at a time, and may be given as they
lie on the disk. For means see `averages`, for single heads `heads`, for comparison with the truth
`masks`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import numpy as np
import xarray as xr

from probe.arguments import grid_size, in_words, labelled, one_of
from probe.arguments import text as text_of
from probe.errors import ExperimentError, PromptError, RecordingNotFound
from probe.words import STUMP, alike, occurrences, runs, spelt

Method = Literal["bilinear", "bicubic", "area"]
Normalisation = Literal["none", "min-max", "words", "space"]

# English words that carry grammar and no content; a list like any other: `content_words` takes
# another one.
FUNCTION_WORDS = frozenset(
    "a an the this that these those and or but nor of in on at to from by with without into onto "
    "over under above below beside next near for as "
    "is are was were be been being it its his her their my your our he she they we you i who which "
    "there some any no not very while during "
    "between behind before after through across around against along up down off out".split()
)

# --- plain arrays ---------------------------------------------------------------------------------


def probabilities(stored: np.ndarray) -> np.ndarray:
    """Return stored maps as float32 probabilities.

    Floats stay as they are; uint8 are `sqrt_u8` codes, p = (code / 255)^2.
    """
    if not isinstance(stored, np.ndarray | xr.DataArray) or stored.dtype.kind not in "buif":
        raise ExperimentError(
            f"stored is {in_words(stored)}, which is no array of numbers.",
            "Give the values of maps: maps.values.",
        )
    if stored.dtype == np.uint8:
        return np.square(stored.astype(np.float32) / 255)
    return stored.astype(np.float32)


def maps_of(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the maps of a layer's two sides: softmax over tokens of key . query, in float32.

    *Shape:* query (branch, image, layer, head, key_feature, y, x), key (branch, token, layer, head,
    key_feature) -> (token, branch, image, layer, head, y, x).
    """
    rows = np.ascontiguousarray(key.transpose(0, 2, 3, 1, 4), dtype=np.float32)[
        :, None
    ]  # (branch, 1, layer, head, token, feature)
    logits = rows @ query.astype(np.float32).reshape(*query.shape[:5], -1)
    logits -= logits.max(axis=-2, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-2, keepdims=True)
    return np.moveaxis(logits.reshape(*logits.shape[:-1], *query.shape[-2:]), 4, 0)


def resize(maps: np.ndarray, grid: tuple[int, int], method: Method = "bilinear") -> np.ndarray:
    """Return maps with the last two axes brought to `grid`, (y, x), in float32.

    "bilinear" and "bicubic" interpolate between pixel centres, as torch does with
    align_corners=False and no antialiasing; bicubic can over- and undershoot. "area" is the mean
    over what each new pixel covers. The weights of each method sum to one. Raises ExperimentError
    for another method.
    """
    one_of("method", method, list(_WEIGHTS))
    if maps.shape[-2:] == tuple(grid):
        return maps.astype(np.float32)
    rows, columns = (
        _WEIGHTS[method](source, target)
        for source, target in zip(maps.shape[-2:], grid, strict=True)
    )
    return np.asarray(rows @ maps.astype(np.float32, copy=False) @ columns.T, dtype=np.float32)


def _bilinear(source: int, target: int) -> np.ndarray:
    """Return the (target, source) matrix of one axis."""
    at = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(at).astype(int)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(target), np.minimum(low + 1, source - 1)), at - low)
    return matrix


def _bicubic(source: int, target: int) -> np.ndarray:
    a = -0.75  # torch's; Keys (1981) has -0.5
    at = (np.arange(target) + 0.5) * source / target - 0.5
    low = np.floor(at).astype(int)
    matrix = np.zeros((target, source), np.float32)
    for place in range(-1, 3):
        d = np.abs(at - (low + place))
        weight = np.where(
            d <= 1, ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
        )
        np.add.at(matrix, (np.arange(target), np.clip(low + place, 0, source - 1)), weight)
    return matrix


def _area(source: int, target: int) -> np.ndarray:
    edges = np.arange(target + 1) * source / target
    pixels = np.arange(source)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(covered, 0, None) * target / source, dtype=np.float32)


_WEIGHTS: dict[Method, Callable[[int, int], np.ndarray]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "area": _area,
}

# --- reading --------------------------------------------------------------------------------------


def numbers(maps: xr.DataArray) -> xr.DataArray:
    """Return stored maps read and decoded: the same labels, float32 (float64 stays)."""
    values = maps.values
    decoded = maps.copy(
        deep=False, data=values if values.dtype == np.float64 else probabilities(values)
    )
    decoded.attrs = {
        name: value for name, value in maps.attrs.items() if name != "encoding"
    }  # which these numbers have no more
    return decoded


def steps_of(maps: xr.DataArray) -> Iterator[xr.DataArray]:
    """Yield maps read and decoded, one step at a time; without a step axis, all at once.

    A step that was not recorded is NaN.
    """
    for index in range(maps.sizes["step"]) if "step" in maps.dims else [None]:
        stored = maps if index is None else maps.isel(step=index)
        decoded = numbers(stored)
        if (
            stored.dtype == np.uint8
            and stored.sizes.get("token", 1) > 1
            and not decoded.values.any()
        ):
            decoded = decoded.where(
                False
            )  # codes have no NaN; but shares of nothing at all were never written
        yield decoded


def stepwise(function: Callable[[xr.DataArray], xr.DataArray], maps: xr.DataArray) -> xr.DataArray:
    """Return a function of the maps of one step, applied to each step.

    *Shape:* (step, ...) -> (step, ...); without steps, the function's own.
    """
    return stacked([function(one) for one in steps_of(maps)], maps)


def stacked(parts: Sequence[xr.DataArray], maps: xr.DataArray) -> xr.DataArray:
    """Return what was computed of each step of `maps`, put together: steps first, labelled.

    Raises RecordingNotFound if there is none.
    """
    if "step" not in maps.dims:
        return parts[0]
    if not parts:
        raise unrecorded()
    of_steps = {name: value for name, value in maps.coords.items() if "step" in value.dims}
    coords = {name: value for name, value in parts[0].coords.items() if name not in of_steps}
    joined = xr.DataArray(
        np.stack([part.values for part in parts]),
        dims=("step", *parts[0].dims),
        coords=coords,
        name=maps.name,
    )
    return joined.assign_coords(of_steps).assign_attrs(parts[0].attrs)


def unrecorded() -> RecordingNotFound:
    """Return the error for maps without a single step."""
    return RecordingNotFound(
        "There are no maps to read: no step was recorded.",
        "Record it again, with capture.steps: all.",
    )


def missing(maps: xr.DataArray) -> bool:
    """Tell whether a step's maps are NaN everywhere, as those that were not recorded are."""
    values = maps.values
    return bool(values.size and np.isnan(values.flat[0]) and np.isnan(values).all())


def on_grid(maps: xr.DataArray, grid: tuple[int, int], method: Method = "bilinear") -> xr.DataArray:
    """Return maps brought to another grid, (y, x).

    *Shape:* (..., y, x) -> (..., y, x). Of masks, "area" gives each pixel's covered share.
    """
    grid = grid_size(grid)
    last = (
        numbers(labelled("maps", maps, "y", "x"))
        .transpose(..., "y", "x")
        .drop_vars([name for name, value in maps.coords.items() if {"y", "x"} & set(value.dims)])
    )
    resized = xr.DataArray(
        resize(last.values, grid, method),
        dims=last.dims,
        coords=last.coords,
        name=maps.name,
        attrs=maps.attrs,
    )
    return resized.transpose(*maps.dims)


# --- words ----------------------------------------------------------------------------------------


def word_maps(
    maps: xr.DataArray,
    words: np.ndarray | None = None,
    numbers: np.ndarray | None = None,
    *,
    merge: Literal["sum", "mean"] = "sum",
    cut: str = "",
    split: str = "",
) -> xr.DataArray:
    """Return token maps merged to words: each the sum of its tokens (DAAM takes the mean).

    *Shape:* (token, ...) -> (word, ...). Labels: `word`, its text, and `word_index`, its place in
    the prompt. A word that is there twice stays two. Tokens without a word (BOS, EOS, punctuation,
    `rest`) are left out; `heads.by_kind` says how much they hold.

    `words` and `numbers` give each token's word and its place; default: the maps' own labels. `cut`
    is the end of the prompt that the model never read; it becomes the attribute `cut_from_prompt`.
    `split` is the word that the cut went through; what was read of it is labelled "su…".

    Raises ExperimentError for another `merge`, and for maps of two branches: choose one with
    .sel(branch=...).
    """
    one_of("merge", merge, ("sum", "mean"))
    labelled("maps", maps, "token")
    if words is None or numbers is None:
        words, numbers = _own_words(maps)
    tokens_of_words = [
        np.flatnonzero(numbers == number)
        for number in sorted({int(number) for number in numbers if number >= 0})
    ]

    def merged(one: xr.DataArray) -> xr.DataArray:
        axis = one.get_axis_num("token")
        values = one.values
        parts = [
            getattr(values.take(tokens, axis=axis), merge)(axis=axis, keepdims=True)
            for tokens in tokens_of_words
        ]
        joined = np.concatenate(parts, axis=axis) if parts else values.take([], axis=axis)
        coords = {name: value for name, value in one.coords.items() if "token" not in value.dims}
        return xr.DataArray(
            joined,
            dims=["word" if d == "token" else d for d in one.dims],
            coords=coords,
            name=maps.name,
            attrs=one.attrs,
        )

    of_words = stepwise(merged, maps).transpose(*("word" if d == "token" else d for d in maps.dims))
    firsts = [tokens[0] for tokens in tokens_of_words]
    texts = np.array([str(words[first]) for first in firsts], dtype=object)
    if split and len(texts):
        texts[-1] += STUMP
    places = np.array([int(numbers[first]) for first in firsts], int)
    of_words = of_words.assign_coords(word=texts, word_index=("word", places))
    return of_words.assign_attrs({"cut_from_prompt": cut} if cut else {})


def _own_words(maps: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the word of each token and its place in the prompt, as the maps' labels say."""
    if lost := [name for name in ("word", "word_index") if name not in maps.coords]:
        raise ExperimentError(
            f"These maps have no label {lost[0]}: nothing says which word a token belongs to.",
            "Give words and numbers.",
        )
    labels = {name: maps.coords[name] for name in ("word", "word_index")}
    if "branch" in labels["word"].dims:
        if maps.sizes["branch"] > 1:
            raise ExperimentError(
                "The two branches have different tokens.", "Choose one with .sel(branch=...)."
            )
        labels = {name: label.isel(branch=0) for name, label in labels.items()}
    return labels["word"].values, labels["word_index"].values


def word_names(words: xr.DataArray) -> list[str]:
    """Return a name of its own for each word, for captions: "cat", "hat", "cat (2)".

    *Shape:* (word, ...) -> one for each word.
    """
    texts = [str(word) for word in words["word"].values]
    times = [texts[: i + 1].count(text) for i, text in enumerate(texts)]
    return [
        text if time == 1 else f"{text} ({time})" for text, time in zip(texts, times, strict=True)
    ]


def content_words(words: xr.DataArray, leave_out: Collection[str] = FUNCTION_WORDS) -> xr.DataArray:
    """Return the words that mean something to the eye: no articles, prepositions and their like.

    *Shape:* (word, ...) -> (word, ...).
    """
    _worded(words)
    return words.isel(
        word=[
            i
            for i, word in enumerate(words["word"].values)
            if str(word).casefold() not in leave_out
        ]
    )


def _worded(words: xr.DataArray) -> xr.DataArray:
    """Return maps whose words are labelled. Raise ExperimentError for others."""
    if lost := [
        name
        for name in ("word", "word_index")
        if name not in labelled("words", words, "word").coords
    ]:
        raise ExperimentError(f"words has no label {lost[0]}.", "Give what word_maps returned.")
    return words


def phrase(words: xr.DataArray, text: str, asking: str = "probe ask") -> xr.DataArray:
    """Return the summed map of words that follow one another, for each time they are there.

    *Shape:* (word, ...) -> (word, ...). Case does not count. Raises PromptError if the phrase is
    not there or was cut away. It lists the words there are, and names the command (`asking`) that
    looks for another.
    """
    occurring = occurring_in(words, text, asking)
    labels = [str(word) for word in words["word"].values]
    sums = [words.isel(word=slice(at[0], at[-1] + 1)).sum("word", skipna=False) for at in occurring]
    joined = words.isel(word=[at[0] for at in occurring])
    values = np.stack(
        [one.transpose(*(d for d in words.dims if d != "word")).values for one in sums],
        axis=words.get_axis_num("word"),
    )
    return joined.copy(data=values).assign_coords(
        word=np.array([" ".join(labels[i] for i in at) for at in occurring], dtype=object)
    )


def occurring_in(words: xr.DataArray, text: str, asking: str = "probe ask") -> list[range]:
    """Return where words that follow one another are, for each time: ranges along `word`.

    Raises PromptError as `phrase` does.
    """
    text_of("text", text)
    labels = [str(word) for word in _worded(words)["word"].values]
    places = words["word_index"].values
    found = [
        at for at in occurrences(text, labels) if places[at[-1]] - places[at[0]] == len(at) - 1
    ]
    if not found:
        raise _not_there(text, labels, str(words.attrs.get("cut_from_prompt", "")), asking)
    return found


def _not_there(text: str, labels: list[str], cut: str, asking: str) -> PromptError:
    """Return the error for a phrase that is not in a prompt, or was cut from it."""
    wanted = spelt(text)
    read = [alike(label) for label in labels]
    stump = read.pop().removesuffix(STUMP) if read and read[-1].endswith(STUMP) else ""
    written = [*read, *spelt(stump + cut)]
    shorten = "Shorten the prompt and record it again."
    if stump and alike(text.strip()) == stump and wanted != [stump]:
        return PromptError(
            f"{text!r} was cut in its middle: the model read only some of its vectors.", shorten
        )
    if stump and (
        runs(wanted, [*read, stump]) or (written[len(read)] in wanted and runs(wanted, written))
    ):
        return PromptError(
            f"{written[len(read)]!r} was cut in its middle: the model read only {stump!r} of it.",
            shorten,
        )
    if cut and runs(wanted, written):
        return PromptError(
            f"{text!r} was cut from the prompt: the model never read {cut[:80]!r}.", shorten
        )
    meant = difflib.get_close_matches(text, labels, n=1)
    words = (
        f"Its words: {', '.join(dict.fromkeys(labels))}." if labels else "The prompt has no words."
    )
    return PromptError(
        f"{text!r} is not in the prompt.",
        f"{f'Did you mean {meant[0]}? ' if meant else ''}{words} For any other word: {asking}",
    )


def normalised(maps: xr.DataArray, how: Normalisation) -> xr.DataArray:
    """Return maps on one of four scales. *Shape:* (..., y, x), as it was.

        "none"      as they are: of a pixel's attention, the share of a word
        "min-max"   each map from 0 at its least to 1 at its greatest value; a constant map is 0
        "words"     each pixel's shares over the given words sum to 1; give `content_words`
        "space"     each map sums to 1

    Shares of nothing are equal. NaN stays NaN. Raises ExperimentError for another scale.
    """
    one_of("normalise", how, ("none", "min-max", "words", "space"))
    labelled("maps", maps, *{"words": ("word",), "none": ()}.get(how, ("y", "x")))
    decoded = numbers(maps)
    if how == "none":
        return decoded
    if how == "min-max":
        least = decoded.min(("y", "x"), skipna=False)
        spread = decoded.max(("y", "x"), skipna=False) - least
        return ((decoded - least) / spread.where(spread != 0, 1)).transpose(*maps.dims)
    over = {"words": ["word"], "space": ["y", "x"]}[how]
    total = decoded.sum(over, skipna=False)
    shares = decoded / total.where(total != 0, 1)
    return shares.where(
        total != 0, 1 / max(1, math.prod(maps.sizes[dim] for dim in over))
    ).transpose(*maps.dims)


def against_others(words: xr.DataArray) -> xr.DataArray:
    """Return each word's map less the mean of the other words' maps. Give `content_words`.

    *Shape:* (word, ...) -> (word, ...), sums to 0 over words. Of a word that is there twice, each
    is among the others of the other. Raises PromptError if there are fewer than two words.
    """
    if labelled("words", words, "word").sizes["word"] < 2:
        there = ", ".join(repr(str(word)) for word in words["word"].values) or "none"
        raise PromptError(
            f"A word is set against the others, and there are no two content words: {there}.",
            "Look at its own map.",
        )
    decoded = numbers(words)
    others = (decoded.sum("word", skipna=False) - decoded) / (words.sizes["word"] - 1)
    return (decoded - others).transpose(*words.dims)
