"""Pure functions of recorded maps, against torch where torch has the same thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probe.analysis.averages import by_sigma, combined
from probe.analysis.heads import overlap
from probe.analysis.maps import (
    Method,
    against_others,
    content_words,
    normalised,
    numbers,
    on_grid,
    phrase,
    probabilities,
    resize,
    steps_of,
    word_maps,
)
from probe.errors import ExperimentError, PromptError, RecordingNotFound
from probe.reading.recording import Run
from probe.watching.measures import to_storage
from probe.words import split_word

SIDES = st.integers(1, 40)


def torchs(maps: np.ndarray, grid: tuple[int, int], method: str = "bilinear") -> np.ndarray:
    """torch's own: pixel centres aligned, and no antialiasing when it shrinks."""
    flat = torch.from_numpy(maps.reshape(-1, 1, *maps.shape[-2:]).astype(np.float64))
    made = torch.nn.functional.interpolate(
        flat, size=grid, mode=method, align_corners=False, antialias=False
    )
    return made.numpy().reshape(*maps.shape[:-2], *grid)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@given(SIDES, SIDES, SIDES, SIDES)
def test_resize_is_torchs_interpolation(
    method: Method, y: int, x: int, to_y: int, to_x: int
) -> None:
    maps = np.random.default_rng([y, x]).random((3, 2, y, x), np.float32)
    found = resize(maps, (to_y, to_x), method)
    assert found.shape == (3, 2, to_y, to_x) and found.dtype == np.float32
    np.testing.assert_allclose(found, torchs(maps, (to_y, to_x), method), rtol=0, atol=2e-6)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_area_is_the_mean_over_what_is_covered(y: int, x: int, times_y: int, times_x: int) -> None:
    maps = np.random.default_rng([y, x]).random((3, y * times_y, x * times_x), np.float32)
    wanted = maps.reshape(3, y, times_y, x, times_x).mean(axis=(2, 4))
    np.testing.assert_allclose(resize(maps, (y, x), "area"), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        resize(wanted, maps.shape[1:], "area"),
        np.kron(wanted, np.ones((times_y, times_x))),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "grids",
    [
        ((8, 8), (64, 64)),
        ((64, 64), (8, 8)),
        ((5, 7), (13, 9)),
        ((13, 9), (5, 7)),
        ((1, 1), (4, 6)),
        ((6, 9), (1, 1)),
    ],
)
def test_resize_up_and_down(grids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    source, target = grids
    maps = np.random.default_rng(0).random((4, *source), np.float32)
    np.testing.assert_allclose(resize(maps, target), torchs(maps, target), rtol=0, atol=1e-6)


def test_resize_of_the_same_grid_changes_no_bit() -> None:
    maps = np.random.default_rng(0).random((2, 7, 5), np.float32)
    np.testing.assert_array_equal(resize(maps, (7, 5)), maps)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "area"])
@given(SIDES, SIDES, SIDES, SIDES)
def test_what_summed_to_one_still_does(
    method: Method, y: int, x: int, to_y: int, to_x: int
) -> None:
    maps = (
        np.random.default_rng([x, y])
        .dirichlet(np.ones(5), (y, x))
        .astype(np.float32)
        .transpose(2, 0, 1)
    )
    np.testing.assert_allclose(resize(maps, (to_y, to_x), method).sum(axis=0), 1, rtol=0, atol=4e-6)


def test_a_constant_map_stays_constant_and_extremes_do_not_grow() -> None:
    np.testing.assert_allclose(
        resize(np.full((3, 4), 0.3, np.float32), (17, 5)), 0.3, rtol=0, atol=1e-7
    )
    maps = np.random.default_rng(0).random((6, 6), np.float32)
    found = resize(maps, (31, 2))
    assert maps.min() - 1e-6 <= found.min() and found.max() <= maps.max() + 1e-6


def test_floats_are_probabilities_as_they_are() -> None:
    for kind in (np.float16, np.float32):
        stored = np.array([0, 0.25, 0.3333, 1], kind)
        found = probabilities(stored)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, stored.astype(np.float32))


def test_every_code_is_the_square_of_its_share() -> None:
    codes = np.arange(256, dtype=np.uint8)
    found = probabilities(codes)
    assert (
        found.dtype == np.float32
        and found[0] == 0
        and found[255] == 1
        and (np.diff(found) > 0).all()
    )
    np.testing.assert_allclose(found, (codes / 255.0) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(to_storage(torch.from_numpy(found), "sqrt_u8").numpy(), codes)


def test_codes_are_off_by_4_thousandths_at_most() -> None:
    p = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) ** 4
    assert np.abs(probabilities(to_storage(p, "sqrt_u8").numpy()) - p.numpy()).max() <= 4e-3


# --- words ----------------------------------------------------------------------------------------

# "a cat, a catfish": BOS a cat , a cat fish EOS rest
WORDS = np.array(["", "a", "cat", "", "a", "catfish", "catfish", "", ""], dtype=object)
NUMBERS = np.array([-1, 0, 1, -1, 2, 3, 3, -1, -1])


def token_maps(*dims: str) -> xr.DataArray:
    sizes = {"step": 2, "token": len(WORDS), "y": 3, "x": 4}
    values = np.random.default_rng(0).random([sizes[d] for d in dims]).astype(np.float32)
    coords = {
        "token": np.array([0, 1, 2, 3, 4, 5, 6, 7, -1]),
        "word": ("token", WORDS),
        "word_index": ("token", NUMBERS),
    }
    return xr.DataArray(values, dims=dims, coords=coords, name="overview")


@pytest.mark.parametrize(
    "dims", [("token", "y", "x"), ("step", "token", "y", "x"), ("y", "x", "token")]
)
def test_words_are_the_sums_of_their_tokens(dims: tuple[str, ...]) -> None:
    maps = token_maps(*dims)
    found = word_maps(maps, WORDS, NUMBERS)
    assert (
        found.dims == tuple("word" if d == "token" else d for d in dims)
        and found.dtype == np.float32
        and found.name == "overview"
    )
    assert found["word"].values.tolist() == ["a", "cat", "a", "catfish"], (
        "repeated words stay apart, in the prompt's order"
    )
    assert found["word_index"].values.tolist() == [0, 1, 2, 3]
    xr.testing.assert_identical(found, word_maps(maps))  # by the maps' own labels
    np.testing.assert_allclose(
        word_maps(maps, merge="mean").isel(word=3), found.isel(word=3) / 2, rtol=1e-6
    )
    for index, positions in enumerate(([1], [2], [4], [5, 6])):
        wanted = maps.isel(token=positions).sum("token")
        np.testing.assert_allclose(found.isel(word=index).values, wanted.values, rtol=1e-6)


def test_other_coordinates_stay() -> None:
    maps = token_maps("step", "token", "y", "x").assign_coords(step=[4, 9], branch="cond")
    found = word_maps(maps, WORDS, NUMBERS)
    assert found["step"].values.tolist() == [4, 9] and str(found["branch"].values) == "cond"
    assert set(found.coords) == {"step", "branch", "word", "word_index"}, (
        "what told of tokens is gone"
    )


def test_a_prompt_without_words_has_no_maps() -> None:
    maps = token_maps("token", "y", "x")
    found = word_maps(maps, np.full(len(WORDS), "", dtype=object), np.full(len(WORDS), -1))
    assert found.sizes == {"word": 0, "y": 3, "x": 4} and found.dtype == np.float32
    assert list(found) == []


def test_a_word_that_was_not_kept_is_left_out() -> None:
    kept = [0, 1, 5, 6]
    found = word_maps(token_maps("token", "y", "x").isel(token=kept), WORDS[kept], NUMBERS[kept])
    assert found["word"].values.tolist() == ["a", "catfish"]


# --- a recording's maps, made by hand -------------------------------------------------------------

GRIDS = {"4x6": (4, 6), "2x3": (2, 3)}
LAYERS = {"4x6": ["down", "up"], "2x3": ["mid"]}
NEGATIVE = np.array(
    ["", "hat", "", "", "", "", "", "", ""], dtype=object
)  # BOS hat EOS and padding
SIGMA = xr.DataArray([10.0, 4.0, 1.0, 0.1], dims="step", coords={"step": [0, 1, 2, 5]})


def recorded(dtype: str = "float32", heads: int = 2, images: int = 2) -> list[xr.DataArray]:
    """Maps of two grids as `Run.attention` gives them: shares over tokens."""
    found = []
    for grid, (y, x) in GRIDS.items():
        shares = np.random.default_rng([y, x]).dirichlet(
            np.ones(len(WORDS)) / 2, (4, 2, images, len(LAYERS[grid]), heads, y, x)
        )
        maps = np.moveaxis(shares, -1, 1).astype(np.float32)
        values = (
            to_storage(torch.from_numpy(maps), dtype).numpy()
            if dtype == "sqrt_u8"
            else maps.astype(dtype)
        )
        coords = {
            "step": SIGMA["step"].values,
            "token": [0, 1, 2, 3, 4, 5, 6, 7, -1],
            "branch": ["uncond", "cond"],
            "layer": LAYERS[grid],
            "word": (("branch", "token"), np.stack([NEGATIVE, WORDS])),
            "word_index": (
                ("branch", "token"),
                np.stack([np.where(NEGATIVE == "hat", 0, -1), NUMBERS]),
            ),
        }
        found.append(
            xr.DataArray(
                values,
                dims=("step", "token", "branch", "image", "layer", "head", "y", "x"),
                coords=coords,
                name="cross",
            )
        )
    return found


def by_hand(maps: list[xr.DataArray], method: str = "bilinear") -> np.ndarray:
    """The mean over steps, layers and heads of every map brought to 4 x 6, one after the other,
    with torch.
    """
    found = []
    for one in maps:
        for layer in range(one.sizes["layer"]):
            for head in range(one.sizes["head"]):
                whole = probabilities(one.values)[..., layer, head, :, :].astype(float).sum(axis=0)
                found.append(torchs(whole, (4, 6), method).clip(0) / maps[0].sizes["step"])
    return np.mean(found, axis=0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "sqrt_u8"])
def test_the_global_map_is_the_mean_of_all_maps_on_one_grid(dtype: str) -> None:
    maps = recorded(dtype)
    found = combined(maps, over=("step", "layer", "head"))
    assert (
        found.dims == ("token", "branch", "image", "y", "x")
        and found.sizes["y"] == 4
        and found.dtype == np.float32
    )
    np.testing.assert_allclose(found.values, by_hand(maps), atol=1e-6)
    assert found.attrs["terms"] == 4 * 3 * 2, "DAAM's sum is this many times as large"
    if dtype != "sqrt_u8":
        np.testing.assert_allclose(found.sum("token"), 1, atol=2e-3)


def test_the_global_map_of_daam_in_one_line() -> None:
    """As castorini/daam computes it: maps summed over steps, bicubic, clipped, the mean over layers
    and heads, then over a word's tokens.
    """
    maps = recorded()
    daam = word_maps(
        combined(maps, over=("step", "layer", "head"), method="bicubic").sel(branch="cond"),
        merge="mean",
    )
    wanted = by_hand(maps, "bicubic")[[5, 6], 1].mean(axis=0)  # the tokens of "catfish"
    np.testing.assert_allclose(daam.sel(word="catfish").values, wanted, atol=1e-6)
    assert daam.attrs["terms"] == 4 * 3 * 2, "of which the paper has the sum"


def test_a_mean_over_some_dimensions_keeps_the_others() -> None:
    maps = recorded()
    steps = combined(maps)
    assert steps.dims == ("step", "token", "branch", "image", "y", "x") and steps.name == "cross"
    np.testing.assert_allclose(steps.mean("step").values, by_hand(maps), atol=1e-6)
    assert steps["step"].values.tolist() == [0, 1, 2, 5] and steps["branch"].values.tolist() == [
        "uncond",
        "cond",
    ]
    one = combined(maps[0].sel(layer="up"), over=("head", "image"), grid=(8, 5))
    assert one.dims == ("step", "token", "branch", "y", "x") and str(one["layer"].values) == "up"
    np.testing.assert_allclose(
        one.isel(step=2).values,
        torchs(maps[0].sel(layer="up").isel(step=2).mean(("head", "image")).values, (8, 5)),
        atol=1e-6,
    )
    apart = combined(maps[1], over=(), method="area", grid=(1, 1))
    np.testing.assert_allclose(apart.values[..., 0, 0], maps[1].mean(("y", "x")).values, atol=1e-6)
    turned = [
        one.transpose("x", "head", "token", "image", "step", "y", "layer", "branch") for one in maps
    ]
    xr.testing.assert_allclose(combined(turned).transpose(*steps.dims), steps)


def test_grids_that_do_not_belong_together() -> None:
    maps = recorded()
    with pytest.raises(ValueError, match="different steps"):
        combined([maps[0], maps[1].isel(step=[0, 1])])
    with pytest.raises(ValueError, match="different layers"):
        combined(maps, over=("head",))


def test_a_misspelt_setting_is_not_passed_over() -> None:
    maps = recorded()
    words = sentence("a cat")
    for setting, choices, misspelt in (
        ("over", "step, image, draw, layer, head", lambda: combined(maps, over=("layer", "heads"))),
        ("method", "bilinear, bicubic, area", lambda: resize(np.ones((2, 2)), (2, 2), "nearest")),  # type: ignore[arg-type]
        ("normalise", "none, min-max, words, space", lambda: normalised(words, "minmax")),  # type: ignore[arg-type]
        ("merge", "sum, mean", lambda: word_maps(token_maps("token", "y", "x"), merge="max")),  # type: ignore[arg-type]
        ("how", "cosine, iou", lambda: overlap(words, "dice")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ExperimentError) as caught:
            misspelt()
        assert caught.value.cause.startswith(f"{setting} is '") and caught.value.cause.endswith(
            "', which is no choice."
        )
        assert caught.value.remedy == f"Choose from: {choices}."


@pytest.mark.parametrize("dtype", ["float16", "sqrt_u8"])
def test_steps_that_were_not_recorded_do_not_count(dtype: str) -> None:
    whole = recorded(dtype)
    holed = [one.copy(deep=True) for one in whole]
    for one in holed:
        one[{"step": 1}] = 0 if dtype == "sqrt_u8" else np.nan
    kept = [one.isel(step=[0, 2, 3]) for one in whole]
    over = ("step", "layer", "head")
    xr.testing.assert_identical(combined(holed, over=over), combined(kept, over=over))
    each = combined(holed)
    assert np.isnan(each.isel(step=1)).all() and np.isfinite(each.isel(step=[0, 2, 3])).all()
    xr.testing.assert_allclose(by_sigma(each, 1, SIGMA), by_sigma(combined(kept), [0.1, 10], SIGMA))
    words = word_maps(holed[0].sel(branch="cond"))
    assert np.isnan(words.isel(step=1)).all() and np.isfinite(words.isel(step=0)).all()
    for none in (whole[0].isel(step=[]), holed[0].isel(step=[1])):
        with pytest.raises(RecordingNotFound, match="no step was recorded"):
            combined(none, over=over)
    for function in (
        combined,
        lambda one: by_sigma(one, 2, SIGMA),
        lambda one: word_maps(one.sel(branch="cond")),
    ):
        with pytest.raises(RecordingNotFound, match="no step was recorded"):
            function(whole[0].isel(step=[]))


def test_one_bad_value_is_not_swallowed() -> None:
    maps = recorded()
    maps[0][
        {"step": 1, "token": 2, "branch": 1, "image": 0, "layer": 0, "head": 0, "y": 1, "x": 1}
    ] = np.nan
    found = combined(maps, over=("step", "layer", "head"))
    assert (
        np.isnan(found.isel(token=2, branch=1, image=0)).any()
        and np.isfinite(found.isel(image=1)).all()
    )


def test_only_one_step_is_read_at_a_time() -> None:
    """What is behind the labels is asked for each step once, and never for two together."""
    from xarray.backends.common import BackendArray
    from xarray.core import indexing

    asked: list[int] = []

    class Watched(BackendArray):
        def __init__(self, values: np.ndarray):
            self.values, self.shape, self.dtype = values, values.shape, values.dtype

        def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
            return indexing.explicit_indexing_adapter(
                key, self.shape, indexing.IndexingSupport.OUTER, self.read
            )

        def read(self, key: tuple) -> np.ndarray:
            asked.append(np.arange(self.shape[0])[key[0]])
            return self.values[key[0]][
                np.ix_(
                    *(
                        np.atleast_1d(np.arange(n)[k])
                        for n, k in zip(self.shape[1:], key[1:], strict=True)
                    )
                )
            ]

    maps = recorded()[0]
    lazy = xr.DataArray(
        xr.Variable(maps.dims, indexing.LazilyIndexedArray(Watched(maps.values))),
        coords=maps.coords,
    )
    for function in (
        combined,
        lambda one: combined(one, ("step", "head")),
        lambda one: by_sigma(one, 2, SIGMA),
        lambda one: word_maps(one, WORDS, NUMBERS),
    ):
        asked.clear()
        found = function(lazy)
        assert asked == [0, 1, 2, 3]
        xr.testing.assert_allclose(found, function(maps))


# --- bands of noise -------------------------------------------------------------------------------


def test_bands_are_means_over_their_steps_the_noisiest_first() -> None:
    maps = combined(recorded())
    found = by_sigma(maps, [0.1, 1, 5, 20], SIGMA)
    assert found.dims == ("band", *maps.dims[1:]) and "step" not in found.coords
    for band, steps in enumerate(([0], [1, 2], [3])):
        np.testing.assert_allclose(
            found.isel(band=band), maps.isel(step=steps).mean("step"), atol=1e-7
        )
    assert found["sigma_from"].values.tolist() == [5, 1, 0.1] and found[
        "sigma_to"
    ].values.tolist() == [20, 5, 1]
    assert found["steps"].values.tolist() == [1, 2, 1]
    xr.testing.assert_identical(by_sigma(maps.assign_coords(sigma=SIGMA), [0.1, 1, 5, 20]), found)


def test_bands_of_equal_width_in_log_sigma_hold_every_step() -> None:
    maps = combined(recorded())
    found = by_sigma(maps, 2, SIGMA)
    assert found["steps"].values.tolist() == [3, 1], "10, 4 and 1 are above 1"
    np.testing.assert_allclose(found["sigma_from"].values, [1, 0.1])
    np.testing.assert_allclose(
        (found * found["steps"]).sum("band") / 4, maps.mean("step"), atol=1e-6
    )
    empty = by_sigma(maps, 20, SIGMA)
    assert (
        int(empty["steps"].sum()) == 4
        and np.isnan(empty.isel(band=empty["steps"].values == 0)).all()
    )


def test_noise_without_a_logarithm_is_in_the_outermost_bands() -> None:
    maps = combined(recorded())
    found = by_sigma(maps, 2, SIGMA.copy(data=[np.inf, 4.0, 1.0, 0.0]))
    assert (
        found["steps"].values.tolist() == [2, 2]
        and found["sigma_to"].values[0] == np.inf
        and found["sigma_from"].values[-1] == 0
    )
    assert by_sigma(maps, 3, SIGMA * 0 + 2)["steps"].values.sum() == 4, "one noise level, one band"
    outside = by_sigma(maps, [0.5, 5], SIGMA)
    assert outside["steps"].values.tolist() == [2], "a step outside of the edges is in no band"


def test_bands_that_make_no_sense() -> None:
    maps = combined(recorded())
    for bands in (0, -1, [1.0], [3.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match="edges that rise"):
            by_sigma(maps, bands, SIGMA)
    with pytest.raises(ValueError, match="no noise levels"):
        by_sigma(maps, 3)
    with pytest.raises(ValueError, match="no noise levels"):
        by_sigma(maps.mean("step"), 3, SIGMA)
    with pytest.raises(ValueError, match="between 0 and infinity"):
        by_sigma(maps, 3, SIGMA * 0)


# --- words of two branches, phrases ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "sqrt_u8"])
def test_words_of_stored_maps_are_sums_of_shares(dtype: str) -> None:
    maps = recorded(dtype)[0]
    found = word_maps(maps.sel(branch=["cond"]))
    assert (
        found.dims == ("step", "word", "branch", "image", "layer", "head", "y", "x")
        and found.dtype == np.float32
    )
    wanted = probabilities(maps.values)[:, [5, 6], 1:].sum(axis=1)
    np.testing.assert_allclose(found.isel(word=3).values, wanted, rtol=1e-6)


def test_the_words_of_two_branches_stay_apart() -> None:
    maps = recorded()[0]
    with pytest.raises(ValueError, match="different tokens"):
        word_maps(maps)
    found = {
        branch: word_maps(maps.sel(branch=branch), cut=cut)
        for branch, cut in (("uncond", ""), ("cond", "and more"))
    }
    assert found["uncond"]["word"].values.tolist() == ["hat"] and found["cond"][
        "word"
    ].values.tolist() == ["a", "cat", "a", "catfish"]
    np.testing.assert_array_equal(found["uncond"].isel(word=0), maps.sel(branch="uncond", token=1))
    assert (
        found["cond"].attrs["cut_from_prompt"] == "and more"
        and "cut_from_prompt" not in found["uncond"].attrs
    )
    np.testing.assert_array_equal(
        word_maps(maps.sel(branch=["cond"])).isel(branch=0), found["cond"]
    )


def sentence(text: str) -> xr.DataArray:
    words = text.split()
    values = np.random.default_rng(0).random((3, len(words), 2, 2)).astype("float32")
    coords = {"word": np.array(words, dtype=object), "word_index": ("word", np.arange(len(words)))}
    return xr.DataArray(values, dims=("step", "word", "y", "x"), coords=coords)


def test_a_phrase_is_its_words_together_each_time_it_occurs() -> None:
    words = sentence("Scuba diving cat and a cat scuba Diving")
    found = phrase(words, "scuba diving")
    assert (
        found.dims == words.dims
        and found["word"].values.tolist() == ["Scuba diving", "scuba Diving"]
        and found["word_index"].values.tolist() == [0, 6]
    )
    for index, start in enumerate((0, 6)):
        np.testing.assert_allclose(
            found.isel(word=index), words.isel(word=[start, start + 1]).sum("word")
        )
    assert phrase(words, "CAT")["word_index"].values.tolist() == [2, 5]
    np.testing.assert_array_equal(phrase(words, "cat"), words.isel(word=[2, 5]))
    assert phrase(words, "cat, and")["word"].values.tolist() == ["cat and"], (
        "punctuation does not count"
    )
    assert phrase(sentence("the cat's hat"), "cat's hat").sizes["word"] == 1
    assert phrase(words.transpose("y", "step", "x", "word"), "cat and").dims == (
        "y",
        "step",
        "x",
        "word",
    )


def test_a_phrase_that_is_not_there() -> None:
    words = sentence("a cat on the hat")
    with pytest.raises(PromptError, match="'hut' is not in the prompt") as caught:
        phrase(words, "hut")
    assert "Did you mean hat?" in caught.value.remedy and "probe ask" in caught.value.remedy
    for absent in ("cat the", "hat a", "", "!"):
        with pytest.raises(PromptError, match="is not in the prompt"):
            phrase(words, absent)
    with pytest.raises(PromptError, match="is not in the prompt"):
        phrase(content_words(words), "cat hat")  # not one after the other
    cut = words.assign_attrs(cut_from_prompt=" of a Green, astronaut")
    with pytest.raises(PromptError, match="'green astronaut' was cut from the prompt"):
        phrase(cut, "green astronaut")
    with pytest.raises(PromptError, match="is not in the prompt"):
        phrase(cut, "naut")
    with pytest.raises(PromptError, match="was cut from the prompt"):
        phrase(cut, "hat of a")  # read in part
    with pytest.raises(PromptError, match="is not in the prompt"):
        phrase(words.isel(word=[]), "cat")


def test_a_word_that_was_cut_in_its_middle_is_no_word_of_the_prompt() -> None:
    prompt = "a, cat. a catfish's hat"
    for cut, split in (
        ("fish's hat", "catfish's"),
        ("'s hat", "catfish's"),
        ("catfish's hat", ""),
        (" hat", ""),
        ("at", "hat"),
        ("", ""),
    ):
        assert split_word(prompt, cut) == split
    found = word_maps(token_maps("token", "y", "x"), cut="let of a dog", split="Catfishlet")
    assert found["word"].values.tolist() == ["a", "cat", "a", "catfish\u2026"]
    for text in ("catfishlet", "CATFISH", "a catfish", "a catfishlet of"):
        with pytest.raises(PromptError) as caught:
            phrase(found, text)
        assert (
            caught.value.cause
            == "'catfishlet' was cut in its middle: the model read only 'catfish' of it."
        )
        assert caught.value.remedy == "Shorten the prompt and record it again."
    with pytest.raises(
        PromptError, match="'a dog' was cut from the prompt: the model never read 'let of a dog'"
    ):
        phrase(found, "a dog")
    with pytest.raises(PromptError, match="'let of' is not in the prompt"):
        phrase(found, "let of")
    assert phrase(found, "a").sizes["word"] == 2


def test_content_words() -> None:
    words = sentence("A cat next to the Guitar on THE moon and a cat")
    found = content_words(words)
    assert found["word"].values.tolist() == ["cat", "Guitar", "moon", "cat"] and found[
        "word_index"
    ].values.tolist() == [1, 5, 8, 11]
    assert content_words(words, leave_out=["cat"]).sizes["word"] == 10
    assert content_words(sentence("of the")).sizes["word"] == 0


# --- scales ---------------------------------------------------------------------------------------

MAPS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=5),
    elements=st.floats(0, 1, width=32, allow_subnormal=False),
)


def words_of(values: np.ndarray) -> xr.DataArray:
    names = np.array([f"word{i}" for i in range(len(values))], dtype=object)
    return xr.DataArray(
        values,
        dims=("word", "y", "x"),
        coords={"word": names, "word_index": ("word", np.arange(len(values)))},
    )


@given(MAPS)
def test_scales_are_what_they_say(values: np.ndarray) -> None:
    maps = words_of(values)
    xr.testing.assert_equal(normalised(maps, "none"), maps)
    np.testing.assert_allclose(normalised(maps, "words").sum("word"), 1, rtol=1e-5)
    np.testing.assert_allclose(normalised(maps, "space").sum(("y", "x")), 1, rtol=1e-5)
    spread = normalised(maps, "min-max")
    for one, found in zip(values, spread.values, strict=True):
        assert (found.min(), found.max()) == ((0, 1) if one.max() > one.min() else (0, 0))
        np.testing.assert_array_equal(
            np.sign(np.diff(one.ravel().astype(float))) * np.diff(found.ravel()) >= 0, True
        )


@settings(max_examples=30)
@given(MAPS, st.integers(0, 2**32))
def test_scales_and_differences_do_not_depend_on_the_order_of_words(
    values: np.ndarray, seed: int
) -> None:
    maps = words_of(values)
    order = np.random.default_rng(seed).permutation(len(values))
    for how in ("none", "min-max", "words", "space"):
        xr.testing.assert_allclose(
            normalised(maps.isel(word=order), how), normalised(maps, how).isel(word=order)
        )
    if len(values) > 1:
        xr.testing.assert_allclose(
            against_others(maps.isel(word=order)), against_others(maps).isel(word=order), atol=1e-6
        )


def test_scales_keep_labels_and_nan() -> None:
    maps = words_of(np.array([[[0.1, np.nan]], [[0.3, 0.5]]], np.float32)).assign_coords(
        branch="cond"
    )
    for how in ("min-max", "words", "space"):
        found = normalised(maps, how)
        assert (
            set(found.coords) == set(maps.coords)
            and found.dims == maps.dims
            and found.dtype == np.float32
        )
        assert np.isnan(found.isel(word=0, x=1))
    np.testing.assert_allclose(normalised(maps, "words").isel(x=0).values.ravel(), [0.25, 0.75])
    assert (
        normalised(words_of(np.zeros((4, 2, 2), np.float32)), "words").values.tolist()
        == np.full((4, 2, 2), 0.25).tolist()
    )
    assert normalised(maps.isel(word=[]), "words").sizes["word"] == 0


@given(MAPS.filter(lambda values: len(values) > 1))
def test_against_others_is_the_difference_to_their_mean(values: np.ndarray) -> None:
    found = against_others(words_of(values))
    for index in range(len(values)):
        others = [value for i, value in enumerate(values) if i != index]
        np.testing.assert_allclose(
            found.isel(word=index), values[index] - np.mean(others, axis=0), atol=1e-5
        )
    np.testing.assert_allclose(found.sum("word"), 0, atol=1e-5)


def test_one_word_has_no_others() -> None:
    with pytest.raises(PromptError, match="no two content words: 'cat'"):
        against_others(content_words(sentence("a cat")))


def test_another_grid_keeps_labels_and_the_order_of_dimensions() -> None:
    maps = recorded("float16")[0].transpose(
        "y", "token", "x", "step", "branch", "image", "layer", "head"
    )
    found = on_grid(maps, (3, 9))
    assert (
        found.dims == maps.dims
        and found.sizes["y"] == 3
        and found.sizes["x"] == 9
        and set(found.coords) == set(maps.coords)
    )
    np.testing.assert_allclose(
        found.isel(y=1, x=4, step=2), on_grid(maps.isel(step=2), (3, 9)).isel(y=1, x=4)
    )
    np.testing.assert_array_equal(on_grid(maps, (4, 6)), maps)


def test_numbers_are_decoded_and_labelled() -> None:
    maps = recorded("sqrt_u8")[0].assign_attrs(encoding="sqrt_u8", units="1")
    found = numbers(maps)
    assert (
        found.dtype == np.float32
        and set(found.coords) == set(maps.coords)
        and found.attrs == {"units": "1"}
    )
    assert maps.attrs["encoding"] == "sqrt_u8", "what was given is as it was"
    np.testing.assert_array_equal(found.values, probabilities(maps.values))
    assert numbers(found.astype("float64")).dtype == np.float64
    steps = list(steps_of(maps))
    assert len(steps) == 4 and [int(one["step"]) for one in steps] == [0, 1, 2, 5]
    assert len(list(steps_of(maps.isel(step=0)))) == 1


# --- a recording ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    from probe.running.recorder import record

    asked = {
        "prompt": "a cat and an astronaut, scuba diving, and a cat",
        "negative_prompt": "a hat",
        "steps": 4,
        "images": 2,
        "height": 24,
        "width": 48,
        "output": str(tmp_path_factory.mktemp("runs")),
        "capture": {"branches": "both", "dtype": "sqrt_u8", "steps": "0,1,3"},
    }
    return record(asked, pipeline=tiny.pipeline(), progress=False)


def test_the_words_of_a_recording(run: Run) -> None:
    maps = [run.attention(grid) for grid in run.grids]
    assert word_maps(combined(maps).sel(branch="uncond"))["word"].values.tolist() == ["a", "hat"]
    cond = word_maps(combined(maps).sel(branch="cond"))
    assert cond["word"].values.tolist() == "a cat and an astronaut scuba diving and a cat".split()
    assert cond.dims == ("step", "word", "image", "y", "x") and cond["step"].values.tolist() == [
        0,
        1,
        3,
    ]
    np.testing.assert_allclose(cond.mean(("step", "image")), run.word_overview(), atol=1e-5)
    assert (
        phrase(cond, "cat")["word_index"].values.tolist() == [1, 9]
        and phrase(cond, "Scuba Diving").sizes["word"] == 1
    )
    bands = by_sigma(cond, 2, run.variable("sigma"))
    assert (
        bands["steps"].values.sum() == 3
        and np.isfinite(bands.isel(band=bands["steps"].values > 0)).all()
    )


def test_all_steps_of_the_file_give_what_its_recorded_steps_give(run: Run) -> None:
    """The file as stock xarray opens it, with the codes of steps that were never written, and its
    own sums over steps.
    """
    over = ("step", "layer", "head")
    raw = [run.variable(f"attention/{grid}/cross") for grid in run.grids]
    assert raw[0].sizes["step"] == 5 and raw[0].dtype == np.uint8
    xr.testing.assert_identical(
        combined(raw, over), combined([run.attention(grid) for grid in run.grids], over)
    )
    for grid, found in zip(run.grids, raw, strict=True):
        sums = run.variable(f"attention/{grid}/time_sum")
        np.testing.assert_allclose(
            combined(found, ["step"]) * 3, sums.transpose(*found.dims[1:]), atol=1e-5
        )


def test_what_was_cut_is_said(tmp_path: Path) -> None:
    from probe.running.recorder import record

    prompt = "a cat " * 40 + "on the hat"
    asked = {
        "prompt": prompt,
        "over_long": "cut",
        "steps": 1,
        "guidance_scale": 1,
        "output": str(tmp_path),
        "capture": {"layers": ["4x4"], "text": False},
    }
    run = record(asked, pipeline=tiny.pipeline(), progress=False)
    words = run.word_maps()
    assert words.sizes["word"] == 75 and words.attrs["cut_from_prompt"].endswith("on the hat")
    with pytest.raises(
        PromptError, match="'the hat' was cut from the prompt: the model never read"
    ):
        phrase(words, "the hat")
    assert phrase(words, "a cat").sizes["word"] == 37
