"""Metrics on answers known by hand, and against their definitions written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probe.analysis.maps import on_grid
from probe.analysis.masks import (
    area_threshold,
    argmax_masks,
    average_precision,
    interval,
    iou,
    mean_iou,
    pixel_accuracy,
    threshold,
)

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
TRUE = [[True, True, False], [False, False, False]]


def grid(values: object, *dims: str) -> xr.DataArray:
    return xr.DataArray(np.asarray(values), dims=(*dims, "y", "x"))


@st.composite
def scored(draw: st.DrawFn) -> tuple[xr.DataArray, xr.DataArray]:
    """A map with many ties, and a truth."""
    shape = draw(SHAPES)
    levels = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 4)))
    return grid(levels / np.float32(7)), grid(draw(hnp.arrays(bool, shape)))


# --- masks ----------------------------------------------------------------------------------------


def test_a_threshold_is_reached_and_not_passed() -> None:
    maps = grid([[0.2, 0.7, np.nan], [0.7, 0.8, 0.0]]).astype("float32")
    assert threshold(maps, 0.7).values.tolist() == [[False, True, False], [True, True, False]]


def test_a_threshold_of_its_own_for_each_map_goes_by_name() -> None:
    maps = grid(np.arange(12.0).reshape(2, 2, 3), "word").assign_coords(word=["cat", "hat"])
    levels = xr.DataArray(
        [[4.0, 9.0], [0.0, 20.0]], dims=("scene", "word"), coords={"word": ["cat", "hat"]}
    )
    found = threshold(maps, levels)
    assert found.sum(("y", "x")).transpose("scene", "word").values.tolist() == [
        [2, 3],
        [6, 0],
    ] and found.dims[-2:] == ("y", "x")
    with pytest.raises(ValueError, match="exact"):
        threshold(maps, levels.assign_coords(word=["cat", "dog"]))


def test_the_greatest_word_takes_the_pixel_and_the_first_of_equals() -> None:
    maps = grid([[[0.1, 0.5, 0.3, np.nan]], [[0.2, 0.5, np.nan, np.nan]]], "word").astype("float32")
    assert argmax_masks(maps).values.tolist() == [
        [[False, True, True, False]],
        [[True, False, False, False]],
    ]
    assert argmax_masks(maps, least=0.25).values.tolist() == [
        [[False, True, True, False]],
        [[False, False, False, False]],
    ]
    moved = maps.transpose("y", "word", "x")
    assert argmax_masks(moved).dims == moved.dims
    xr.testing.assert_equal(argmax_masks(moved).transpose(*maps.dims), argmax_masks(maps))
    assert argmax_masks(maps.isel(word=[])).shape == (0, 1, 4)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_every_pixel_belongs_to_one_word(values: np.ndarray) -> None:
    found = argmax_masks(grid(values, "word"))
    assert (found.sum("word") == 1).all()
    assert (values.max(axis=0) == (values * found.values).max(axis=0)).all()


@given(scored())
def test_the_mask_at_the_true_area_has_the_true_area_but_for_ties(
    both: tuple[xr.DataArray, xr.DataArray],
) -> None:
    maps, truth = both
    level, area = area_threshold(maps, truth), int(truth.sum())
    mask = threshold(maps, level)
    assert int(mask.sum()) >= area
    assert int((maps > level).sum()) < max(area, 1), "without those that tie it is smaller"
    if area == 0:
        assert not mask.any()


def test_the_true_area_of_maps_without_ties_is_met() -> None:
    maps = grid(
        np.random.default_rng(0).permutation(60).reshape(3, 4, 5).astype("float32"), "layer"
    )
    truth = grid(np.random.default_rng(1).random((2, 4, 5)) < 0.3, "scene")
    found = threshold(maps, area_threshold(maps, truth)).sum(("y", "x"))
    assert (found == truth.sum(("y", "x"))).all() and set(found.dims) == {"layer", "scene"}


# --- agreement ------------------------------------------------------------------------------------


def test_iou_of_known_masks() -> None:
    masks = grid(
        [
            TRUE,
            [[False, True, True], [False, False, False]],
            [[False] * 3] * 2,
            [[False, False, True], [False] * 3],
        ],
        "mask",
    )
    assert iou(masks, grid(TRUE)).values.tolist() == [1, 1 / 3, 0, 0]
    assert np.isnan(iou(grid([[False]]), grid([[False]])))


@given(hnp.arrays(bool, (2, 4, 3, 5)))
def test_iou_is_the_jaccard_index_of_sets_of_pixels(values: np.ndarray) -> None:
    masks, truth = grid(values[0], "scene"), grid(values[1], "scene")
    sets = [[{int(i) for i in np.flatnonzero(one)} for one in side] for side in values]
    wanted = [len(a & b) / len(a | b) if a | b else np.nan for a, b in zip(*sets, strict=True)]
    np.testing.assert_allclose(iou(masks, truth).values, wanted)
    xr.testing.assert_equal(iou(masks, truth), iou(truth, masks))
    both, either = (
        sum(len(f(a, b)) for a, b in zip(*sets, strict=True)) for f in (set.intersection, set.union)
    )
    np.testing.assert_allclose(
        float(iou(masks, truth, pool=["scene"])), both / either if either else np.nan
    )
    np.testing.assert_allclose(
        float(mean_iou(masks, truth, ["scene"])),
        np.nanmean(wanted) if np.isfinite(wanted).any() else np.nan,
    )


def test_mean_iou_by_scene_and_by_pixel() -> None:
    """One small object found whole, one large object found by half: pooled, the large one counts
    more.
    """
    truth = np.zeros((2, 10, 10), bool)
    truth[0, 0, :2], truth[1, :8] = True, True
    found = truth.copy()
    found[1, 4:] = False
    masks, true = grid(found, "scene"), grid(truth, "scene")
    assert float(mean_iou(masks, true, ["scene"])) == 0.75
    assert float(iou(masks, true, pool=["scene"])) == 42 / 82


def test_pixel_accuracy_of_each_mask_and_of_classes() -> None:
    truth = grid([[[True, False, False, False]], [[False, True, False, False]]], "word")
    masks = grid([[[True, False, False, True]], [[False, True, True, True]]], "word")
    assert pixel_accuracy(masks, truth).values.tolist() == [0.75, 0.5]
    assert float(pixel_accuracy(masks, truth, classes="word")) == 0.5


def test_masks_and_truth_go_by_name_and_fit() -> None:
    rng = np.random.default_rng(0)
    masks, truth = (
        grid(rng.random((2, 3, 4, 5)) < 0.5, "layer", "scene"),
        grid(rng.random((3, 4, 5)) < 0.5, "scene"),
    )
    turned = masks.transpose("y", "scene", "x", "layer")
    xr.testing.assert_equal(
        iou(masks, truth),
        iou(turned, truth.transpose("x", "y", "scene")).transpose("layer", "scene"),
    )
    with pytest.raises(ValueError, match="no common grid"):
        iou(masks, grid(np.zeros((8, 8), bool)))
    with pytest.raises(ValueError, match="make masks of it first"):
        iou(masks.astype(float), truth)
    with pytest.raises(ValueError, match="make masks of it first"):
        average_precision(masks.astype(float), truth.astype("uint8"))
    with pytest.raises(ValueError, match="exact"):
        iou(masks.assign_coords(scene=[0, 1, 2]), truth.assign_coords(scene=[0, 1, 9]))


# --- average precision ----------------------------------------------------------------------------


def slow_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The definition: over falling levels, precision of all at or above it times the growth of
    recall.
    """
    total, recall = 0.0, 0.0
    for level in sorted(set(scores.ravel().tolist()), reverse=True):
        found = scores >= level
        hits = int((found & truth).sum())
        total += hits / int(found.sum()) * (hits / int(truth.sum()) - recall)
        recall = hits / int(truth.sum())
    return total


@given(scored())
def test_average_precision_is_its_definition(both: tuple[xr.DataArray, xr.DataArray]) -> None:
    maps, truth = both
    found = float(average_precision(maps, truth))
    if truth.any():
        assert found == pytest.approx(slow_average_precision(maps.values, truth.values), abs=1e-12)
    else:
        assert np.isnan(found)


def test_average_precision_of_known_maps() -> None:
    truth = grid(TRUE)
    perfect, worst = (
        grid([[0.9, 0.8, 0.1], [0.2, 0.1, 0.0]]),
        grid([[0.0, 0.1, 0.5], [0.5, 0.5, 0.5]]),
    )
    assert float(average_precision(perfect, truth)) == 1
    assert float(average_precision(worst, truth)) == pytest.approx((1 / 5 + 2 / 6) / 2)
    assert float(average_precision(grid(np.full((2, 3), 0.4)), truth)) == pytest.approx(2 / 6), (
        "a constant map: the share of what is true"
    )
    assert float(
        average_precision(grid([[0.9, 0.1, 0.5], [0.2, 0.1, 0.0]]), truth)
    ) == pytest.approx((1 + 2 / 5) / 2), "the tie at 0.1"
    assert np.isnan(average_precision(grid([[0.9, np.nan, 0.5], [0.2, 0.1, 0.0]]), truth))


@given(scored(), st.integers(0, 2**32))
def test_average_precision_knows_no_place_and_no_scale(
    both: tuple[xr.DataArray, xr.DataArray], seed: int
) -> None:
    maps, truth = both
    order = np.random.default_rng(seed).permutation(maps.size)
    moved = [grid(one.values.ravel()[order].reshape(one.shape)) for one in both]
    np.testing.assert_allclose(
        average_precision(*moved), average_precision(maps, truth), equal_nan=True
    )
    np.testing.assert_allclose(
        average_precision(maps**3 * 5 - 2, truth), average_precision(maps, truth), equal_nan=True
    )


def test_many_maps_at_once_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    maps = grid(
        rng.random((5, 3, 4, 6)).round(1).astype("float16"), "scene", "layer"
    ).assign_coords(layer=["a", "b", "c"])
    truth = grid(rng.random((5, 4, 6)) < 0.4, "scene")
    whole, levels = average_precision(maps, truth), area_threshold(maps, truth)
    assert whole.dims == ("scene", "layer") and whole["layer"].values.tolist() == ["a", "b", "c"]
    for scene in range(5):
        for layer in range(3):
            wanted = slow_average_precision(maps[scene, layer].values, truth[scene].values)
            assert float(whole[scene, layer]) == pytest.approx(wanted)
    monkeypatch.setattr("probe.analysis.masks.BLOCK", 50)
    xr.testing.assert_equal(average_precision(maps, truth), whole)
    xr.testing.assert_equal(area_threshold(maps, truth), levels)


def test_codes_of_one_byte_score_as_what_they_stand_for() -> None:
    codes = grid(np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8))
    truth = grid(np.random.default_rng(1).random((8, 8)) < 0.3)
    plain = grid(np.square(codes.values.astype("float32") / 255))
    assert float(average_precision(codes, truth)) == float(average_precision(plain, truth))
    xr.testing.assert_equal(threshold(codes, 0.25), threshold(plain, 0.25))


# --- grids ----------------------------------------------------------------------------------------


@given(SHAPES, SHAPES)
def test_the_mean_over_areas_keeps_the_area(
    source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    mask = grid(np.random.default_rng(source).random(source) < 0.5)
    found = on_grid(mask, (target[0], target[1]), "area")
    assert found.dims == ("y", "x") and found.dtype == np.float32
    assert float(found.mean()) == pytest.approx(float(mask.mean()), abs=1e-6)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-6


def test_a_mask_on_a_coarser_grid_is_the_share_that_is_covered() -> None:
    mask = grid([[True, True, False, False], [True, False, False, False]])
    assert on_grid(mask, (1, 2), "area").values.tolist() == [[0.75, 0.0]]
    np.testing.assert_allclose(
        on_grid(mask, (1, 3), "area").values, [[0.875, 0.25, 0]], atol=1e-7
    )  # by 1 1/3 pixels each


# --- intervals ------------------------------------------------------------------------------------


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    scores = xr.DataArray(rng.normal(0.5, 0.2, (60, 400)), dims=("scene", "experiment"))
    found = interval(scores, level=0.9, resamples=500)
    covered = float(((found["low"] <= 0.5) & (found["high"] >= 0.5)).mean())
    assert 0.84 <= covered <= 0.94, "400 experiments whose mean is 0.5"
    width = float((found["high"] - found["low"]).mean())
    assert width == pytest.approx(2 * 1.645 * 0.2 / 60**0.5, rel=0.06)


def test_an_interval_is_seeded_and_leaves_out_what_is_not_there() -> None:
    scores = xr.DataArray(
        [[0.1, np.nan], [0.5, np.nan], [np.nan, 0.3], [0.9, np.nan]],
        dims=("scene", "word"),
        coords={"word": ["cat", "hat"]},
    )
    found = interval(scores)
    np.testing.assert_allclose(found["mean"].values, [0.5, 0.3])
    assert found["scenes"].values.tolist() == [3, 1] and found["word"].values.tolist() == [
        "cat",
        "hat",
    ]
    assert 0.1 <= float(found["low"][0]) < 0.5 < float(found["high"][0]) <= 0.9
    assert np.isnan(found["low"][1]) and np.isnan(found["high"][1]), "one scene has no interval"
    xr.testing.assert_identical(found, interval(scores))
    many = xr.DataArray(np.random.default_rng(0).random(30), dims="scene")
    assert len({float(interval(many, seed=seed)["low"]) for seed in range(3)}) == 3
    same = interval(scores * 0 + 0.4)
    assert float(same["low"][0]) == pytest.approx(0.4) == float(same["high"][0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval(scores, level=95)
    with pytest.raises(ValueError, match="no scene"):
        interval(scores.isel(scene=[]))


@settings(max_examples=30)
@given(st.permutations(range(6)))
def test_scores_side_by_side_are_drawn_alike(order: list[int]) -> None:
    """What pairs scores is their scene: the interval of a difference is that of the differences,
    and words do not mix.
    """
    scores = xr.DataArray(
        np.random.default_rng(0).random((9, 6)),
        dims=("scene", "word"),
        coords={"word": list("abcdef")},
    )
    xr.testing.assert_allclose(interval(scores.isel(word=order)), interval(scores).isel(word=order))
    constant = interval(scores - (scores - 0.25))
    np.testing.assert_allclose(constant["low"], 0.25)
