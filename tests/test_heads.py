"""Single heads: known shapes, the properties of each measure, and a recording's statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probe.analysis.averages import combined
from probe.analysis.heads import (
    KINDS,
    by_kind,
    contribution,
    head_statistics,
    overlap,
    ranked_heads,
    token_kinds,
)
from probe.analysis.maps import normalised, numbers, word_maps
from probe.reading.recording import Run

MAPS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    elements=st.floats(0, 1, width=32, allow_subnormal=False),
)


def record(folder: Path, **changes: object) -> Run:
    from probe.running.recorder import record

    asked = {
        "prompt": "a cat, on the hat",
        "negative_prompt": "astronaut",
        "steps": 3,
        "images": 2,
        "height": 24,
        "width": 48,
        "output": str(folder),
        "capture": {"branches": "both", "dtype": "float32", "text": False, "statistics": False},
        **changes,
    }
    return record(asked, pipeline=tiny.pipeline(), progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, with each of the 77 tokens kept, at one grid."""
    capture = {
        "branches": "both",
        "dtype": "float32",
        "tokens": "all",
        "layers": ["3x6"],
        "text": False,
        "statistics": False,
    }
    return record(tmp_path_factory.mktemp("runs"), capture=capture)


def plain(values: object, *dims: str) -> xr.DataArray:
    return xr.DataArray(np.asarray(values, np.float32), dims=(*dims, "y", "x"))


# --- shape ----------------------------------------------------------------------------------------


def test_an_even_map_a_point_and_nothing() -> None:
    point = np.zeros((4, 6))
    point[1, 2] = 0.3
    found = head_statistics(plain([np.full((4, 6), 0.5), point, np.zeros((4, 6))], "head"))
    assert all(
        variable.dims == ("head",) and variable.dtype == np.float32 for variable in found.values()
    )
    np.testing.assert_allclose(found["mass"], [0.5, 0.3 / 24, 0], rtol=1e-6)
    np.testing.assert_allclose(found["entropy"], [np.log(24), 0, np.nan], atol=1e-6)
    np.testing.assert_allclose(found["concentration"], [0, 23 / 24, np.nan], atol=1e-6)
    half = np.zeros((4, 6))
    half[:, :3] = 0.1
    assert float(head_statistics(plain(half))["entropy"]) == pytest.approx(np.log(12), abs=1e-5)
    assert float(head_statistics(plain(half))["concentration"]) == pytest.approx(0.5, abs=1e-6)


@given(MAPS)
def test_concentration_is_the_mean_difference_of_two_pixels(values: np.ndarray) -> None:
    """The other definition of the Gini index: the mean absolute difference of two values, over
    twice their mean.
    """
    if values.sum() < 1e-6:
        return
    pairs = np.abs(values.reshape(-1, 1).astype(float) - values.reshape(1, -1))
    found = head_statistics(plain(values))["concentration"]
    assert float(found) == pytest.approx(pairs.mean() / 2 / values.mean(dtype=float), abs=1e-5)


@given(MAPS, st.floats(0.01, 1))
def test_shape_knows_no_scale_no_place_and_no_grid(values: np.ndarray, scale: float) -> None:
    if values.sum() < 1e-3:
        return
    one = head_statistics(plain(values))
    turned, scaled = (
        head_statistics(plain(values[::-1].T)),
        head_statistics(plain(values * np.float32(scale))),
    )
    finer = head_statistics(plain(np.kron(values, np.ones((2, 2)))))
    for name in ("entropy", "concentration"):
        np.testing.assert_allclose(turned[name], one[name], atol=2e-5)
        np.testing.assert_allclose(scaled[name], one[name], atol=2e-5)
    np.testing.assert_allclose(finer["concentration"], one["concentration"], atol=2e-5)
    np.testing.assert_allclose(finer["entropy"], one["entropy"] + np.log(4), atol=2e-5)


def test_change_is_how_much_of_a_map_moved_since_the_step_before() -> None:
    maps = plain(np.zeros((5, 2, 1, 4)), "step", "head").assign_coords(step=[0, 1, 2, 3, 7])
    maps[:, 0] = [[[1, 1, 0, 0]], [[2, 2, 0, 0]], [[np.nan] * 4], [[0, 1, 1, 0]], [[0, 0, 1, 1]]]
    maps[:, 1] = [[[1, 0, 0, 0]], [[0, 0, 0, 5]], [[np.nan] * 4], [[0, 0, 0, 0]], [[1, 1, 1, 1]]]
    found = head_statistics(maps)["change"]
    assert found["step"].values.tolist() == [0, 1, 2, 3, 7]
    np.testing.assert_allclose(found.sel(head=0), [np.nan, 0, np.nan, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.sel(head=1), [np.nan, 1, np.nan, np.nan, np.nan])
    assert np.isnan(head_statistics(maps.isel(step=0))["change"]).all()


def test_a_recording_says_the_same_of_itself(run: Run, tmp_path: Path) -> None:
    """Its moments were taken in the hook, before storage; so were the statistics of every head in a
    summary.
    """
    summary = record(
        tmp_path,
        capture={"branches": "both", "attention": "summary", "text": False, "statistics": False},
    )
    for grid in run.grids:
        maps = run.attention(grid)
        found = head_statistics(maps)
        assert found["mass"].dims == maps.dims[:-2] and set(found.coords) == set(maps.coords)
        mass = run.variable(f"attention/{grid}/moments").sel(moment="mass")
        np.testing.assert_allclose(found["mass"], mass, rtol=1e-4, atol=1e-7)
        stored = (
            summary.variable(f"attention/{grid}/head_statistics")
            .sel(head_statistic="entropy")
            .rename(each_head="head")
        )
        np.testing.assert_allclose(
            found["entropy"], stored.transpose(*found["entropy"].dims), atol=1e-4
        )
        for name in found:
            assert np.isfinite(found[name].isel(step=slice(1, None))).all()


# --- overlap --------------------------------------------------------------------------------------


def test_overlap_of_known_maps() -> None:
    maps = plain(
        [[[1, 1, 0, 0]], [[2, 2, 0, 0]], [[0, 0, 3, 3]], [[0, 1, 1, 0]]], "word"
    ).assign_coords(word=["cat", "cat", "hat", "sea"])
    same, apart = [1, 1, 0, 0.5], [0, 0, 1, 0.5]
    np.testing.assert_allclose(overlap(maps), [same, same, apart, [0.5, 0.5, 0.5, 1]], atol=1e-6)
    third = [1 / 3, 1 / 3, 1 / 3, 1]
    np.testing.assert_allclose(
        overlap(maps, "iou"),
        [[1, 1, 0, 1 / 3], [1, 1, 0, 1 / 3], [0, 0, 1, 1 / 3], third],
        atol=1e-6,
    )
    assert overlap(maps)["other_word"].values.tolist() == maps["word"].values.tolist()


@pytest.mark.parametrize("how", ["cosine", "iou"])
@given(
    hnp.arrays(np.float32, (3, 3, 4), elements=st.floats(0.0625, 1, width=32)),
    st.permutations(range(3)),
)
def test_overlap_is_symmetric_and_knows_no_order(
    how: str, values: np.ndarray, order: list[int]
) -> None:
    maps = plain(values, "word").assign_coords(word=list("abc"))
    found = overlap(maps, how)
    np.testing.assert_allclose(found, found.transpose(), atol=1e-5)
    np.testing.assert_allclose(
        overlap(maps.isel(word=order), how), found.isel(word=order, other_word=order), atol=1e-5
    )
    own = np.diag(found.values)
    assert ((own > 0.9999) | np.isnan(own)).all() and not (found > 1).any()
    if how == "iou":
        spread = normalised(maps, "min-max").values
        wanted = np.minimum(spread[0], spread[1]).sum() / max(
            np.maximum(spread[0], spread[1]).sum(), 1e-30
        )
        assert np.isnan(found[0, 1]) or float(found[0, 1]) == pytest.approx(wanted, abs=1e-5)


def test_overlap_of_a_recording_is_by_head(run: Run) -> None:
    words = word_maps(run.attention(run.grids[-1]).sel(branch="cond"))
    found = overlap(words)
    assert found.dims[-1] == "other_word" and set(found.dims) == {
        "step",
        "word",
        "image",
        "layer",
        "head",
        "other_word",
    }
    one = {"step": 1, "image": 1, "layer": 0, "head": 1}
    a, b = (words.isel(**one, word=i).values.ravel() for i in (1, 4))
    assert float(found.isel(**one, word=1, other_word=4)) == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5
    )
    assert overlap(words.isel(word=[])).sizes["word"] == 0


# --- kinds of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["run", "every"])
def test_every_token_is_of_one_kind_and_all_masses_sum_to_one(
    which: str, request: pytest.FixtureRequest
) -> None:
    maps = request.getfixturevalue(which).attention("3x6")
    kinds = token_kinds(maps)
    cond, uncond = (kinds.sel(branch=branch).values.tolist() for branch in ("cond", "uncond"))
    assert cond[:8] == ["BOS", "words", "words", "other", "words", "words", "words", "EOS"] and set(
        cond[8:]
    ) == {"rest"}
    assert uncond[:3] == ["BOS", "words", "EOS"] and set(uncond[3:]) == {"rest"}
    mass = by_kind(head_statistics(maps)["mass"])
    assert mass["kind"].values.tolist() == list(KINDS) and mass.dims == (
        "step",
        "kind",
        "branch",
        "image",
        "layer",
        "head",
    )
    np.testing.assert_allclose(mass.sum("kind"), 1, atol=1e-5)
    assert float(abs(mass.sel(kind="other", branch="uncond")).max()) == 0
    whole = by_kind(combined(maps).sel(branch="cond"))
    np.testing.assert_allclose(
        whole.sel(kind="words"),
        combined(maps).sel(branch="cond", token=[1, 2, 4, 5, 6]).sum("token"),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        whole.mean(("y", "x")), mass.sel(branch="cond").mean(("layer", "head")), atol=1e-5
    )


def test_kinds_of_the_padding_agree_however_it_was_kept(run: Run, every: Run) -> None:
    few, all_ = (by_kind(head_statistics(one.attention("3x6"))["mass"]) for one in (run, every))
    np.testing.assert_allclose(few, all_, atol=1e-5)


def test_kinds_can_be_given_and_none_is_dropped(run: Run) -> None:
    kinds = token_kinds(run.attention()).sel(branch="cond")
    values = run.overview()
    assert "token_text" not in values.coords
    found = by_kind(values, kinds)
    np.testing.assert_allclose(found.sum("kind"), 1, atol=1e-5)
    some = by_kind(run.attention().sel(token=[1, 2], branch="cond"))
    assert (
        some["kind"].values.tolist() == list(KINDS)
        and float(some.sel(kind=["BOS", "EOS", "rest"]).sum()) == 0
    )


# --- ranking --------------------------------------------------------------------------------------


def scores(scenes: int = 40, signal: float = 0.3) -> xr.DataArray:
    """Scores of six heads, of which the one at ("up", 1) is better."""
    values = np.random.default_rng(0).normal(0.4, 0.1, (scenes, 2, 3))
    values[:, 1, 1] += signal
    return xr.DataArray(
        values,
        dims=("scene", "layer", "head"),
        coords={"layer": ["down", "up"], "scene": [f"s{i}" for i in range(scenes)]},
    )


def test_heads_are_chosen_on_one_half_and_reported_on_the_other() -> None:
    given_, found = scores(), ranked_heads(scores())
    assert (str(found["layer"].values[0]), int(found["head"].values[0])) == (
        "up",
        1,
    ) and found.sizes["rank"] == 6
    assert (np.diff(found["chosen"]) <= 0).all()
    chose, report = found["chosen_scene"].values.tolist(), found["reported_scene"].values.tolist()
    assert (
        len(chose) == len(report) == 20
        and set(chose) | set(report) == set(given_["scene"].values.tolist())
        and not set(chose) & set(report)
    )
    for rank in range(6):
        place = {"layer": found["layer"].values[rank], "head": found["head"].values[rank]}
        np.testing.assert_allclose(found["chosen"][rank], given_.sel(scene=chose, **place).mean())
        np.testing.assert_allclose(
            found["reported"][rank], given_.sel(scene=report, **place).mean()
        )
        np.testing.assert_allclose(
            found["reported_scores"].isel(rank=rank), given_.sel(scene=report, **place)
        )
    assert found.attrs["split"] == "20 scenes chose, 20 others report; drawn with seed 0"
    assert ranked_heads(scores(), seed=1)["chosen_scene"].values.tolist() != chose
    xr.testing.assert_identical(ranked_heads(scores()), found)


def test_the_reported_half_does_not_know_what_was_chosen_by_chance() -> None:
    """Of many heads that are all alike the best of the choosing half looks good there, and ordinary
    on the other half.
    """
    rng = np.random.default_rng(0)
    noise = xr.DataArray(rng.normal(0.5, 0.1, (20, 30, 20)), dims=("scene", "layer", "head"))
    best = ranked_heads(noise).isel(rank=0)
    assert float(best["chosen"]) > 0.57 and abs(float(best["reported"]) - 0.5) < 0.1
    changed = noise.copy(deep=True)
    changed[ranked_heads(noise)["reported_scene"].values] = rng.normal(0, 1, (10, 30, 20))
    xr.testing.assert_equal(ranked_heads(changed)["chosen"], ranked_heads(noise)["chosen"])


def test_scenes_without_the_word_and_heads_that_are_not_there() -> None:
    holed = scores()
    holed[:20, 1, 1] = np.nan
    holed[:, 0, 2] = np.nan
    found = ranked_heads(holed)
    assert found.sizes["rank"] == 5 and (
        str(found["layer"].values[0]),
        int(found["head"].values[0]),
    ) == ("up", 1)
    assert float(found["chosen"][0]) == pytest.approx(
        float(holed.sel(scene=found["chosen_scene"].values, layer="up")[:, 1].mean())
    )
    with pytest.raises(ValueError, match="two halves"):
        ranked_heads(scores(1))
    turned = ranked_heads(scores().transpose("head", "scene", "layer"))
    assert (str(turned["layer"].values[0]), int(turned["head"].values[0])) == ("up", 1)


# --- contribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "sqrt_u8"])
def test_contribution_is_the_product_and_is_computed_when_it_is_read(
    dtype: str, run: Run, tmp_path: Path
) -> None:
    if dtype == "sqrt_u8":
        run = record(tmp_path, capture={"branches": "both", "dtype": dtype, "text": False})
    for grid in run.grids:
        maps, sizes = run.attention(grid), run.variable(f"attention/{grid}/value_size")
        found = contribution(maps, sizes)
        assert not found.variable._in_memory, "lazy"
        assert (
            found.dims == maps.dims
            and set(found.coords) == set(maps.coords)
            and found.dtype == np.float32
        )
        wanted = numbers(maps) * sizes
        np.testing.assert_allclose(
            found.isel(step=1, token=[2, -1], layer=0, y=1).values,
            wanted.isel(step=1, token=[2, -1], layer=0, y=1).values,
            rtol=1e-6,
        )
        np.testing.assert_allclose(
            found.sel(branch="cond").isel(x=slice(1, 4)),
            wanted.sel(branch="cond").isel(x=slice(1, 4)),
            rtol=1e-6,
        )
        np.testing.assert_allclose(found.values, wanted.values, rtol=1e-6)


def test_contribution_of_a_part_goes_by_label(run: Run) -> None:
    grid = run.grids[0]
    maps, sizes = run.attention(grid), run.variable(f"attention/{grid}/value_size")
    whole = contribution(maps, sizes).load()
    some = maps.sel(branch="cond", token=[-1, 2], layer=maps["layer"].values[::-1])
    np.testing.assert_array_equal(
        contribution(some, sizes),
        whole.sel(branch="cond", token=[-1, 2], layer=maps["layer"].values[::-1]),
    )
    for lost, part in (
        ("head", maps.isel(head=0)),
        ("head", maps.isel(head=[1])),
        ("layer", maps.mean("layer")),
    ):
        with pytest.raises(ValueError, match=f"multiply before the mean over {lost}s"):
            contribution(part, sizes)
    with pytest.raises(ValueError, match="of another recording or grid"):
        contribution(maps, sizes.isel(token=slice(0, 2)))


def test_everything_that_reads_maps_reads_contributions(run: Run) -> None:
    parts = [
        contribution(run.attention(grid), run.variable(f"attention/{grid}/value_size"))
        for grid in run.grids
    ]
    found = combined(parts, over=("step", "layer", "head"))
    by_hand = combined([numbers(part) for part in parts], over=("step", "layer", "head"))
    xr.testing.assert_allclose(found, by_hand)
    assert "BOS" in by_kind(found)["kind"].values and found["token"].values[-1] == -1
    assert word_maps(found.sel(branch="uncond"))["word"].values.tolist() == ["astronaut"]
