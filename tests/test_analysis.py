"""Pure functions of recorded maps, against torch where torch has the same thing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from probe.analysis import probabilities, resize, word_maps
from probe.capture import to_storage

SIDES = st.integers(1, 40)


def bilinear(maps: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """torch's own: pixel centres aligned, and no antialiasing when it shrinks."""
    flat = torch.from_numpy(maps.reshape(-1, 1, *maps.shape[-2:]).astype(np.float64))
    made = torch.nn.functional.interpolate(flat, size=grid, mode="bilinear", align_corners=False, antialias=False)
    return made.numpy().reshape(*maps.shape[:-2], *grid)


@given(SIDES, SIDES, SIDES, SIDES)
def test_resize_is_torchs_bilinear_interpolation(y: int, x: int, to_y: int, to_x: int) -> None:
    maps = np.random.default_rng([y, x]).random((3, 2, y, x), np.float32)
    found = resize(maps, (to_y, to_x))
    assert found.shape == (3, 2, to_y, to_x) and found.dtype == np.float32
    np.testing.assert_allclose(found, bilinear(maps, (to_y, to_x)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grids", [((8, 8), (64, 64)), ((64, 64), (8, 8)), ((5, 7), (13, 9)), ((13, 9), (5, 7)), ((1, 1), (4, 6)), ((6, 9), (1, 1))])
def test_resize_up_and_down(grids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    source, target = grids
    maps = np.random.default_rng(0).random((4, *source), np.float32)
    np.testing.assert_allclose(resize(maps, target), bilinear(maps, target), rtol=0, atol=1e-6)


def test_resize_of_the_same_grid_changes_no_bit() -> None:
    maps = np.random.default_rng(0).random((2, 7, 5), np.float32)
    np.testing.assert_array_equal(resize(maps, (7, 5)), maps)


@given(SIDES, SIDES, SIDES, SIDES)
def test_what_summed_to_one_still_does(y: int, x: int, to_y: int, to_x: int) -> None:
    maps = np.random.default_rng([x, y]).dirichlet(np.ones(5), (y, x)).astype(np.float32).transpose(2, 0, 1)
    np.testing.assert_allclose(resize(maps, (to_y, to_x)).sum(axis=0), 1, rtol=0, atol=2e-6)


def test_a_constant_map_stays_constant_and_extremes_do_not_grow() -> None:
    np.testing.assert_allclose(resize(np.full((3, 4), 0.3, np.float32), (17, 5)), 0.3, rtol=0, atol=1e-7)
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
    assert found.dtype == np.float32 and found[0] == 0 and found[255] == 1 and (np.diff(found) > 0).all()
    np.testing.assert_allclose(found, (codes / 255.0) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(to_storage(torch.from_numpy(found), "sqrt_u8").numpy(), codes)


def test_codes_are_off_by_4_thousandths_at_most() -> None:
    p = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) ** 4
    assert np.abs(probabilities(to_storage(p, "sqrt_u8").numpy()) - p.numpy()).max() <= 4e-3


# --- words -----------------------------------------------------------------------------------------------------------

# "a cat, a catfish": BOS a cat , a cat fish EOS rest
WORDS = np.array(["", "a", "cat", "", "a", "catfish", "catfish", "", ""], dtype=object)
NUMBERS = np.array([-1, 0, 1, -1, 2, 3, 3, -1, -1])


def token_maps(*dims: str) -> xr.DataArray:
    sizes = {"step": 2, "token": len(WORDS), "y": 3, "x": 4}
    values = np.random.default_rng(0).random([sizes[d] for d in dims]).astype(np.float32)
    coords = {"token": np.array([0, 1, 2, 3, 4, 5, 6, 7, -1]), "word": ("token", WORDS), "word_index": ("token", NUMBERS)}
    return xr.DataArray(values, dims=dims, coords=coords, name="overview")


@pytest.mark.parametrize("dims", [("token", "y", "x"), ("step", "token", "y", "x"), ("y", "x", "token")])
def test_words_are_the_sums_of_their_tokens(dims: tuple[str, ...]) -> None:
    maps = token_maps(*dims)
    found = word_maps(maps, WORDS, NUMBERS)
    assert found.dims == tuple("word" if d == "token" else d for d in dims) and found.dtype == np.float32 and found.name == "overview"
    assert found["word"].values.tolist() == ["a", "cat", "a", "catfish"], "repeated words stay apart, in the prompt's order"
    for index, positions in enumerate(([1], [2], [4], [5, 6])):
        wanted = maps.isel(token=positions).sum("token")
        np.testing.assert_allclose(found.isel(word=index).values, wanted.values, rtol=1e-6)


def test_other_coordinates_stay() -> None:
    maps = token_maps("step", "token", "y", "x").assign_coords(step=[4, 9], branch="cond")
    found = word_maps(maps, WORDS, NUMBERS)
    assert found["step"].values.tolist() == [4, 9] and set(found.coords) == {"step", "word"}


def test_a_prompt_without_words_has_no_maps() -> None:
    maps = token_maps("token", "y", "x")
    found = word_maps(maps, np.full(len(WORDS), "", dtype=object), np.full(len(WORDS), -1))
    assert found.sizes == {"word": 0, "y": 3, "x": 4} and found.dtype == np.float32
    assert list(found) == []


def test_a_word_that_was_not_kept_is_left_out() -> None:
    kept = [0, 1, 5, 6]
    found = word_maps(token_maps("token", "y", "x").isel(token=kept), WORDS[kept], NUMBERS[kept])
    assert found["word"].values.tolist() == ["a", "catfish"]
