"""Reading attention, a part of `Run`: maps as recorded, or as few, by token, word and phrase.

    run.attention("16x16")          # (step, token, branch, image, layer, head, y, x), lazily
    run.contribution("16x16")       # attention times the size of what a token writes
    run.word_maps()                 # (step, word, image, y, x): mean over layers, heads, grids
    run.word_maps(branch="uncond", layers="up_blocks.*", heads=3)       # one head
    run.word_maps(bands=4)          # (band, word, image, y, x): at four noise levels
    run.phrase("scuba diving")      # words that follow one another, together
    run.against_others(), run.mass(), run.counterfactual()

A noising has the dimension `draw` in the place of `image`; `images` and "image" in `over` then
choose draws of noise. Each method is a few lines over `probe.analysis`, which describes what is
computed. For what has no setting use xarray: `.sel(image=0)`, `.mean("step")`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

import numpy as np
import xarray as xr

from probe import analysis
from probe.analysis.averages import Weigh, checked_bands
from probe.analysis.maps import Method, Normalisation
from probe.analysis.recomputed import recomputed
from probe.arguments import branch_name, grid_size, in_words, one_of, texts
from probe.arguments import text as text_of
from probe.errors import ExperimentError, RecordingNotFound
from probe.format.attributes import Attributes
from probe.format.schema import near
from probe.public import warn_renamed
from probe.reading.choice import (
    Indices,
    check_there,
    chosen_layers,
    chosen_positions,
    nothing_chosen,
    several,
    slice_of,
)
from probe.words import STUMP, split_word

Read = Literal["attention", "contribution"]


class Choice(TypedDict, total=False):
    """Which maps, and over what to take the mean: the settings of `token_maps`."""

    of: Read
    branch: str
    steps: Indices | str
    layers: str | Sequence[str]
    heads: Indices | None
    images: Indices | None
    tokens: Indices | None
    over: Sequence[str]
    grid: tuple[int, int]
    method: Method
    weigh: Weigh


class Words(tuple[str, ...]):
    """The words of a prompt. Calling them is the old name of `Run.word_overview`."""

    _maps: Callable[[], xr.DataArray]

    def __new__(cls, words: Iterable[str], maps: Callable[[], xr.DataArray]) -> Words:
        self = super().__new__(cls, words)
        self._maps = maps
        return self

    def __reduce__(self) -> tuple[type[tuple[Any, ...]], tuple[Any, ...]]:
        """Copy and pickle as a plain tuple."""
        return tuple, (tuple(self),)

    def __call__(self) -> xr.DataArray:
        """Return the maps of `Run.word_overview`, and warn of the new name."""
        warn_renamed(
            "Run.words()", "run.word_overview(), or run.word_maps() for every step", since="0.1"
        )
        return self._maps()


class Attention:
    """What a `Run` can do with attention."""

    if TYPE_CHECKING:  # what a Run has

        @property
        def path(self) -> Path: ...
        @property
        def memory(self) -> object | None: ...
        @property
        def name(self) -> str: ...
        @property
        def attributes(self) -> Attributes: ...
        @property
        def tree(self) -> xr.DataTree: ...
        @property
        def steps(self) -> np.ndarray: ...
        def variable(self, path: str) -> xr.DataArray: ...

    # --- as recorded ---

    @property
    def grids(self) -> list[str]:
        """Return the grids with attention maps, the largest first: ["64x64", "32x32", ...]."""
        if "attention" not in self.tree.children:
            return []
        return sorted(
            self.tree["attention"].children, key=lambda g: -math.prod(int(n) for n in g.split("x"))
        )

    def attention(self, grid: str | None = None) -> xr.DataArray:
        """Return the cross-attention maps at one grid, lazily. Default: the largest grid.

        *Shape:* (step, token, branch, image, layer, head, y, x), in the stored type. Each value is
        the share of a pixel's attention that a token gets.

        A `sqrt_u8` recording stores codes: `probe.analysis.probabilities` turns them into shares.
        Of a `queries` recording the maps are computed when they are read, in float32. A `summary`
        recording has means over heads: the head axis is 1, and the label `heads` says of how many.
        Raises RecordingNotFound, ExperimentError.
        """
        if not self.grids:
            raise RecordingNotFound(
                f"{self.name} has no attention maps.", "Record with capture.attention: maps."
            )
        grid = self.grids[0] if grid is None else grid
        if not isinstance(grid, str):
            raise ExperimentError(
                f"grid is {in_words(grid)}, which is no text.",
                f"Give one of: {', '.join(self.grids)}.",
            )
        if grid not in self.grids:
            raise RecordingNotFound(
                f"{self.name} has no attention maps at {in_words(grid)[1:-1]}.",
                near(grid, self.grids),
            )
        group = f"attention/{grid}"
        if "query" in self.tree[group].data_vars:
            maps = recomputed(self.variable(f"{group}/query"), self.variable(f"{group}/key"))
        else:
            maps = self.variable(f"{group}/cross")
        if "head_statistics" in self.tree[group].data_vars:
            heads = self.variable(f"{group}/head_statistics").sizes["each_head"]
            maps = maps.assign_coords(heads=("layer", np.full(maps.sizes["layer"], heads)))
        recorded = np.flatnonzero(self.variable(f"{group}/recorded").values)
        # `self.steps` is read once: the same steps at each call, even while more are written.
        return maps.isel(step=slice_of(np.intersect1d(recorded, self.steps)))

    def contribution(self, grid: str | None = None) -> xr.DataArray:
        """Return attention times |v W_O|, the size of what each token writes, lazily.

        *Shape:* (step, token, branch, image, layer, head, y, x) float32, in the units of the
        layer's output. See `analysis.contribution`. Raises RecordingNotFound.
        """
        maps = self.attention(grid)
        grid = self.grids[0] if grid is None else grid
        self._check_heads(grid, "a contribution is that of each head")
        return analysis.contribution(maps, self.variable(f"attention/{grid}/value_size"))

    def counterfactual(self) -> xr.DataArray:
        """Return what each word did: |prediction - prediction without it|, mean over channels.

        *Shape:* (step, masked_word, image, y, x) float32, on the grid of the latents, in the units
        of the prediction. NaN at steps where it was not recorded. Raises RecordingNotFound.
        """
        if "counterfactual" not in self.tree.children:
            raise RecordingNotFound(
                f"{self.name} has no counterfactual maps.",
                'Record with capture.counterfactual: ["*"], or a list of words.',
            )
        return self.variable("counterfactual/change").isel(step=slice_of(self.steps))

    def tokens(self, branch: str = "cond") -> list[str]:
        """Return the tokens of the prompt as text, 77 for CLIP."""
        return [str(text) for text in self._labels(branch)["token_text"].values]

    @property
    def words(self) -> Words:
        """Return the words of the prompt, in their order: `("a", "cat", "on", "a", "mat")`.

        They are the labels of `word_maps()`. If the prompt was cut inside a word, that one ends in
        "…".
        """
        labels = self._labels("cond")
        by_number = {
            int(number): str(word)
            for number, word in zip(labels["word_index"].values, labels["word"].values, strict=True)
        }
        words = [by_number[number] for number in sorted(by_number) if number >= 0]
        if words and self.cut()[1]:
            words[-1] += STUMP
        return Words(words, self.word_overview)

    def cut(self, branch: str = "cond") -> tuple[str, str]:
        """Return what was cut from the end of a long prompt, and the word that was split.

        Each is "" if there is none. The split word is given whole.
        """
        cut = self.attributes.cut_from_prompt.get(branch_name(branch), "")
        return cut, split_word(self.read_as(branch), cut)

    def read_as(self, branch: str = "cond") -> str:
        """Return the prompt as the tokenizer got it.

        Textual inversion writes a word once for each of its vectors.
        """
        return self.attributes.read_as.get(branch, self.attributes.texts[branch_name(branch)])

    # --- as few ---

    def token_maps(
        self,
        *,
        of: Read = "attention",
        branch: str = "cond",
        steps: Indices | str = slice(None),
        layers: str | Sequence[str] = "*",
        heads: Indices | None = None,
        images: Indices | None = None,
        tokens: Indices | None = None,
        over: Sequence[str] = ("layer", "head"),
        grid: tuple[int, int] | None = None,
        method: Method = "bilinear",
        weigh: Weigh = "layers",
    ) -> xr.DataArray:
        """Return maps of every token: brought to one grid, then the mean `over` what is named.

        *Shape:* (step, token, image, y, x) float32. "layer" and "head" stay if they are not in
        `over`; "step" goes if it is. BOS, EOS and `rest` are tokens like any other.

        `of` is attention or contribution. `branch` is cond (the prompt's tokens) or uncond (the
        negative prompt's). `steps` are indices of model calls, or text as in capture.steps.
        `layers` are globs or grids as in capture.layers. `heads`, `images` and `tokens` (BOS first)
        are indices; an array of truth values chooses too. What is not chosen is not read. `grid` is
        (y, x), default the largest recorded.

        The mean is first over the heads in a layer, then over layers. With weigh="heads" every head
        counts the same (see `analysis.combined`).

        Raises RecordingNotFound for what was not recorded, ExperimentError for a setting without
        such a choice.
        """
        one_of("of", of, get_args(Read))
        branch_name(branch)
        grid = None if grid is None else grid_size(grid)
        if not (patterns := texts("layers", layers)):
            raise nothing_chosen("layers", layers)
        across = self.attributes.across
        numbers = {"head": heads, across: images, "token": tokens}
        maps = [
            self._chosen(name, paths, of, branch, steps, numbers)
            for name, paths in self._layers(patterns).items()
        ]
        over = [across if dim == "image" else dim for dim in texts("over", over)]
        return analysis.combined(maps, over, grid, method, weigh).rename(of)

    def word_maps(
        self,
        *,
        normalise: Normalisation = "none",
        bands: int | Sequence[float] = 0,
        merge: Literal["sum", "mean"] = "sum",
        words: str | Sequence[str] | None = None,
        **choice: Unpack[Choice],
    ) -> xr.DataArray:
        """Return maps of every word, or of the chosen `words`: the sum (or mean) of its tokens.

        *Shape:* (step, word, image, y, x) float32, as `token_maps`. A word that is there twice
        stays two, told apart by `word_index`. With `bands`, their number or edges: (band, word,
        image, y, x), means over noise levels, the noisiest first (`analysis.by_sigma`).

        `words` are words or phrases of the prompt, each as often as it is there. The tokens of
        others are not read.

        `normalise` is "none", "min-max", "words" or "space" (`analysis.normalised`). The attribute
        `cut_from_prompt` says what was cut from a prompt that is too long. A word that was split by
        the cut is labelled by what was read of it and "…".

        With layers=("down_blocks.*", "up_blocks.*"), over=("step", "layer", "head"),
        method="bicubic", weigh="heads", merge="mean" it is DAAM's global map.
        """
        banded = not (type(bands) is int and bands == 0)
        bands = checked_bands(bands) if banded else 0
        if banded and "step" in texts("over", choice.get("over", ())):
            raise ExperimentError(
                'bands and "step" in over exclude each other: either takes the mean over steps.',
                'Leave out bands, or "step" in over.',
            )
        branch = choice.get("branch", "cond")
        cut, split = self.cut(branch)
        if words is not None:
            chosen, last = self._tokens_of(texts("words", words), branch, choice.get("tokens"))
            choice["tokens"], split = chosen, split if last else ""
        maps = self.token_maps(**choice)
        if banded:
            maps = analysis.by_sigma(maps, bands, self.variable("sigma"))
        return analysis.normalised(
            analysis.word_maps(maps, merge=merge, cut=cut, split=split), normalise
        )

    def phrase(
        self,
        text: str,
        *,
        normalise: Normalisation = "none",
        bands: int | Sequence[float] = 0,
        **choice: Unpack[Choice],
    ) -> xr.DataArray:
        """Return maps of words that follow one another, one for each time they are there.

        *Shape:* as `word_maps`. Raises PromptError, with the words there are, if `text` is not in
        the prompt or was cut from it.
        """
        text_of("text", text)
        maps = self.word_maps(bands=bands, words=text, **choice)
        words = analysis.phrase(maps, text, self._asking(text))
        return analysis.normalised(words, normalise)

    def against_others(
        self, *, bands: int | Sequence[float] = 0, **choice: Unpack[Choice]
    ) -> xr.DataArray:
        """Return each content word's map less the mean of the other content words' maps.

        *Shape:* as `word_maps`. Raises PromptError for fewer than two.
        """
        return analysis.against_others(
            analysis.content_words(self.word_maps(bands=bands, **choice))
        )

    def mass(self, **choice: Unpack[Choice]) -> xr.DataArray:
        """Return how much of all attention goes to BOS, words, other tokens, EOS and rest.

        *Shape:* (step, kind, image). The kinds of attention sum to 1.
        """
        return analysis.by_kind(self.token_maps(**choice).mean(("y", "x"), skipna=False))

    # --- at a glance ---

    def overview(self) -> xr.DataArray:
        """Return where each token was looked at: mean over images and heads, then over layers.

        *Shape:* (step, token, y, x) float32 on the largest grid, of the last branch. It is stored
        at the end of a run; before that it is computed from the maps.
        """
        maps = self.attention()
        steps = slice_of(maps["step"].values)
        stored = self.variable(f"attention/{self.grids[0]}/overview").isel(step=steps)
        # Load, then transpose: zarr reads 60 times slower what is transposed lazily.
        stored = stored.load().transpose("step", ...)
        if np.isfinite(stored.values).all():
            return stored
        tokens = self.token_maps(branch=str(maps["branch"].values[-1]))
        mean = tokens.mean(self.attributes.across, skipna=False)
        mean = mean.transpose("step", "token", "y", "x")
        others = [n for n, label in mean.coords.items() if not {"step", "token"} >= {*label.dims}]
        return mean.drop_vars(others).rename("overview")

    def word_overview(self) -> xr.DataArray:
        """Return the overview, averaged over steps and merged to words.

        *Shape:* (word, y, x) float32.
        """
        word, number = (
            self.variable(f"attention/{self.grids[0]}/{name}").isel(branch=-1)
            for name in ("word", "word_index")
        )
        cut, split = self.cut(str(word["branch"].item()))
        return analysis.word_maps(
            self.overview().mean("step"), word.values, number.values, cut=cut, split=split
        )

    # --- inside ---

    def _labels(self, branch: str) -> xr.Dataset:
        """Return token_text, word and word_index of a branch's tokens.

        They are read from the first group that has them.
        """
        branch_name(branch)
        for group in ("text/text_encoder", *(f"attention/{grid}" for grid in self.grids)):
            if (
                f"/{group}" in self.tree.groups
                and branch in self.variable(f"{group}/token_text")["branch"].values
            ):
                labels = {
                    name: self.variable(f"{group}/{name}").variable
                    for name in ("branch", "token_text", "word", "word_index")
                }
                return xr.Dataset(coords=labels).sel(branch=branch)
        raise RecordingNotFound(
            f"{self.name} has no tokens of the {branch} branch.", "Record with capture.text: true."
        )

    def _tokens_of(
        self, phrases: Sequence[str], branch: str, tokens: object
    ) -> tuple[list[int], bool]:
        """Return the indices of the tokens of some words, and whether the last word is among them.

        Raises PromptError for a phrase that is not in the prompt.
        """
        if tokens is not None:
            raise ExperimentError("words and tokens exclude each other.", "Give one of them.")
        self._check_branch(branch, [str(name) for name in self.attention()["branch"].values])
        numbers = self.variable(f"attention/{self.grids[0]}/word_index").sel(branch=branch)
        names = self.variable(f"attention/{self.grids[0]}/word").sel(branch=branch)
        cut, split = self.cut(branch)
        none_read = xr.DataArray(np.zeros(numbers.size, np.float32), dims="token")
        every = analysis.word_maps(none_read, names.values, numbers.values, cut=cut, split=split)
        places = every["word_index"].values
        chosen = {
            int(place)
            for phrase in phrases
            for at in analysis.occurring_in(every, phrase, self._asking(phrase))
            for place in places[at.start : at.stop]
        }
        kept = np.flatnonzero(np.isin(numbers.values, sorted(chosen)))
        return kept.tolist(), int(places[-1]) in chosen

    def _layers(self, patterns: Sequence[str]) -> dict[str, list[str]]:
        """Return the layers that globs and grids select, by grid."""
        self.attention()  # raises an error if there are no maps
        recorded = {
            grid: [str(path) for path in self.variable(f"attention/{grid}/layer").values]
            for grid in self.grids
        }
        return chosen_layers(self.name, recorded, patterns)

    def _chosen(
        self,
        grid: str,
        layers: list[str],
        of: Read,
        branch: str,
        steps: Indices | str,
        numbers: Mapping[str, Indices | None],
    ) -> xr.DataArray:
        """Return the chosen maps of one grid, still lazy. `numbers` chooses heads and images."""
        maps = self.contribution(grid) if of == "contribution" else self.attention(grid)
        self._check_branch(branch, [str(name) for name in maps["branch"].values])
        recorded = [int(step) for step in maps["step"].values]
        paths = [str(path) for path in maps["layer"].values]
        kept = {
            "step": chosen_positions(self.name, recorded, steps, self.variable("committed").size),
            "layer": [paths.index(path) for path in layers],
        }
        for dim, given in numbers.items():
            if given is None:
                continue
            kept[dim] = several(dim, given, maps.sizes[dim])
            if dim == "head":
                self._check_heads(grid, "single heads were asked for")
            check_there(f"{self.name} has no {dim}", grid, dim, kept[dim], maps.sizes[dim])
        indexers = {dim: slice_of(np.array(index, int)) for dim, index in kept.items()}
        return maps.isel(indexers).sel(branch=branch, drop=True)

    def _check_heads(self, grid: str, why: str) -> None:
        if "head_statistics" in self.tree[f"attention/{grid}"].data_vars:
            raise RecordingNotFound(
                f"{self.name} holds means over heads, and {why}.",
                "Record with capture.attention: maps or queries.",
            )

    def _check_branch(self, branch: str, recorded: list[str]) -> None:
        if branch in recorded:
            return
        guided = "" if self.attributes.is_guided else " and guidance_scale above 1"
        raise RecordingNotFound(
            f"{self.name} has no attention maps of the {branch} branch.",
            f"Record with capture.branches: both{guided}.",
        )

    def _asking(self, text: str) -> str:
        """Return the command that looks for a word that was not in the prompt."""
        word = shlex.quote(" ".join(text.split()))
        if "query" in self.tree[f"attention/{self.grids[0]}"].data_vars:
            if self.memory is not None:
                return f"probe.read_out(run, {text!r})"
            return f"probe ask {shlex.quote(str(self.path))} {word}"
        return f"record with capture.attention: queries, then probe ask latest {word}"
