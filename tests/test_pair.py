"""An edited run beside its parent: where they part, and how far pictures, words and heads are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from commands import Command, cause_and_remedy
from PIL import Image
from recordings import change_root
from tiny_runs import take
from views import open_view

import probe
from probe import cli
from probe.analysis.pictures import psnr, ssim
from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.views.compare import asked_differently, kinship
from probe.errors import ExperimentError, RecordingNotFound
from probe.figures import sheets
from probe.figures.bundle import facts
from probe.reading.apart import (
    first_difference,
    heads_apart,
    modules_apart,
    parts_at,
    pictures_apart,
    steps_apart,
    words_apart,
)
from probe.reading.compare import compare
from probe.reading.edited import edit_sentences, edits_in_short
from probe.reading.pair import compare_pair, find_parent
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording


@pytest.fixture(scope="module")
def pair() -> tuple[Run, Run]:
    return probe.open_run("sample-guidance-8"), probe.open_run("sample")


def with_parent(folder: Path, **said: Any) -> tuple[Run, Run]:
    """Return a recording that says that another is its parent, and that one."""
    parent = Run(synthetic_recording(folder / "parent.zarr", seed=1))
    run = Run(synthetic_recording(folder / "edited.zarr", seed=2))
    identity = parent.attributes["identity"]
    said = {"parent_identity": identity, "parent_run": "parent", **said}
    return change_root(run, lambda attributes: attributes.update(said)), parent


# --- pictures -------------------------------------------------------------------------------------

# What skimage.metrics of scikit-image 0.26.0 gives for `drawn`: structural_similarity with
# gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1,
# and peak_signal_noise_ratio with data_range=255.
BY_SCIKIT_IMAGE: dict[tuple[int, int], tuple[float, float]] = {
    # size: SSIM, PSNR
    (16, 24): (0.7783505362728315, 25.15152752080469),
    (64, 64): (0.7636547886141773, 25.150057047156388),
    (128, 96): (0.7626118616994905, 25.15030614441208),
}


def drawn(height: int, width: int) -> tuple[xr.DataArray, xr.DataArray]:
    """Two pictures of waves, the second with a finer one on top."""
    y, x, rgb = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    one = (127 + 80 * np.sin(y / 5) * np.cos(x / (3 + rgb))).astype(np.uint8)
    two = (one + 20 * np.sin(1.7 * y + 2.3 * x + rgb)).clip(0, 255).astype(np.uint8)
    dims = ("image", "y", "x", "rgb")
    return xr.DataArray(one[None], dims=dims), xr.DataArray(two[None], dims=dims)


@pytest.mark.parametrize("size", BY_SCIKIT_IMAGE)
def test_psnr_and_ssim_are_those_of_scikit_image(size: tuple[int, int]) -> None:
    one, two = drawn(*size)
    similar, noise = BY_SCIKIT_IMAGE[size]
    np.testing.assert_allclose(ssim(one, two), [similar], rtol=1e-12)
    np.testing.assert_allclose(psnr(one, two), [noise], rtol=1e-12)
    assert psnr(one, one).values == np.inf and ssim(one, one).values == 1


def test_pictures_of_two_sizes_or_too_small_are_refused() -> None:
    one, _ = drawn(16, 24)
    with pytest.raises(ExperimentError, match="24 x 16 and 16 x 24"):
        psnr(one, drawn(24, 16)[0])
    with pytest.raises(ExperimentError, match="windows of 11 x 11"):
        ssim(one[:, :10], one[:, :10])


# --- numbers --------------------------------------------------------------------------------------


def test_steps_are_compared_by_the_root_mean_square(pair: tuple[Run, Run]) -> None:
    run, parent = pair
    far = steps_apart(run, parent)
    by_hand = run.prediction().values - parent.prediction().values
    np.testing.assert_allclose(
        far["prediction"], np.sqrt((by_hand**2).mean(axis=(1, 2, 3, 4))), rtol=1e-5
    )
    assert far["latents"][0] == 0 and far["prediction_cond"][0] == 0 and far["prediction"][0] > 0.1
    np.testing.assert_allclose(far["latents"], probe.distance(run, parent), rtol=1e-5)
    assert first_difference(run, parent) == 1 and first_difference(run, run) is None
    assert parts_at(far["latents"]) == int(
        np.flatnonzero(far["latents"] > far["latents"].max() / 2)[0]
    )
    assert parts_at(steps_apart(run, run)["latents"]) is None


def test_one_bit_of_one_step_is_found(tmp_path: Path) -> None:
    import zarr

    one = Run(synthetic_recording(tmp_path / "one.zarr"))
    two = Run(Path(shutil.copytree(one.path, tmp_path / "two.zarr")))
    array = zarr.open_array(two.path, path="latents/latents", mode="r+")
    array[2, 0, 0, 0, 0] = np.nextafter(np.float32(array[2, 0, 0, 0, 0]), np.float32(9))
    assert first_difference(one, Run(two.path)) == 2


def test_pictures_words_heads_and_modules(pair: tuple[Run, Run]) -> None:
    run, parent = pair
    pictures = pictures_apart(run, parent)
    final = [one.variable("latents/final_latents").values.astype(float) for one in pair]
    np.testing.assert_allclose(pictures["l2"], [np.linalg.norm(final[0] - final[1])])
    assert 15 < pictures["psnr"] < 25 and 0.5 < pictures["ssim"] < 1

    words = words_apart(run, parent)
    assert words["word"].values.tolist() == [*run.words]
    mean = [one.word_maps(over=("step", "layer", "head")).isel(image=0) for one in pair]
    by_hand = np.abs(mean[0] - mean[1]).sum(("y", "x")) / mean[1].sum(("y", "x"))
    np.testing.assert_allclose(words["change"], by_hand, rtol=1e-5)

    heads = heads_apart(run, parent)
    first = str(heads["head"].values[0]).partition(" ")[0]
    group = next(grid for grid in run.grids if first in run.attention(grid)["layer"].values)
    masses = [
        one.variable(f"attention/{group}/moments").sel(branch="cond", moment="mass") for one in pair
    ]
    by_hand = (np.abs(masses[0] - masses[1]).sum("token") / 2).mean(("step", "image"))
    np.testing.assert_allclose(heads[:4], by_hand.isel(layer=0), rtol=1e-5)
    assert heads.max() < 1 and not heads_apart(run, run).any()

    modules = modules_apart(run, parent)
    std = [one.variable("unet/statistics").sel(statistic="std", branch="cond") for one in pair]
    other = [one.variable("unet/statistics").sel(statistic="std") for one in pair]
    branches = [b for b in other[0]["branch"].values if b in other[1]["branch"].values]
    assert branches == ["cond"] or len(branches) == 2
    if branches == ["cond"]:
        by_hand = (np.abs(std[0] - std[1]) / std[1]).mean(("step", "image"))
        np.testing.assert_allclose(modules, by_hand, rtol=1e-4)
    assert not modules_apart(run, run).any()


def test_a_word_that_is_there_twice_is_two(tmp_path: Path) -> None:
    one, two = (
        Run(synthetic_recording(tmp_path / f"{i}.zarr", prompt="a cat a fox", seed=i))
        for i in range(2)
    )
    assert words_apart(one, two)["word"].values.tolist() == ["a", "cat", "a (2)", "fox"]


# --- the pair -------------------------------------------------------------------------------------


def test_a_parent_is_found_by_its_identity(tmp_path: Path) -> None:
    run, parent = with_parent(tmp_path)
    shutil.copytree(parent.path, tmp_path / "again.zarr")
    assert find_parent(run).path == parent.path, "the one that is named, of two"
    found = run.against_parent()
    assert found.parent == "parent" and not found.same and found.asked == ["seed: 2 and 1"]
    assert run.against_parent(run).same

    shutil.rmtree(parent.path)
    assert find_parent(run).path.name == "again.zarr", "the name is gone, the identity is there"
    shutil.rmtree(tmp_path / "again.zarr")
    with pytest.raises(RecordingNotFound, match="The parent of edited is not in its folder"):
        run.against_parent()
    plain = Run(synthetic_recording(tmp_path / "plain.zarr"))
    with pytest.raises(RecordingNotFound, match="it was recorded without edits"):
        find_parent(plain)
    with pytest.raises(ExperimentError, match="parent is 'x', which is no recording"):
        run.against_parent("x")  # type: ignore[arg-type]


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    one = Run(synthetic_recording(tmp_path / "one.zarr"))
    two = Run(synthetic_recording(tmp_path / "two.zarr", prompt="two red cats more"))
    found = compare_pair(one, two)
    assert found.heads is None and found.words is not None
    assert found.left_out == ["The heads are not compared: the prompts have 6 and 7 tokens."]
    half = Run(synthetic_recording(tmp_path / "half.zarr", status="interrupted"))
    with pytest.raises(RecordingNotFound, match="half is interrupted"):
        compare_pair(one, half)
    small = Run(synthetic_recording(tmp_path / "small.zarr", size=(4, 4)))
    with pytest.raises(ExperimentError, match="The latents of one are 1 x 4 x 8 x 8"):
        compare_pair(one, small)


def test_diff_pair_prints_it(call: Command, tmp_path: Path) -> None:
    run, parent = with_parent(tmp_path)
    code, out, err = call(cli.dispatch, "diff", "--pair", run.path)
    assert (code, err) == (1, "") and out.startswith("edited  and its parent  parent\n")
    for part in (
        "asked       seed: 2 and 1",
        "they part   differ from step 0",
        "PSNR",
        "of its map",
    ):
        assert part in out, part
    code, out, _ = call(cli.dispatch, "diff", "--pair", "--json", run.path)
    found = json.loads(out)
    assert code == 1 and found["differs_at"] == 0 and found["steps"]["step"] == [0, 1, 2, 3]
    assert found["words"]["word"] == ["a", "red", "cat"] and not found["same"]
    code, out, _ = call(cli.dispatch, "diff", "--pair", parent.path, parent.path)
    assert code == 0 and "they part   never" in out and "PSNR the same" in out


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["diff", "sample"], "the following arguments are required: b"),
        (["diff", "sample", "sample", "--json"], "--json prints a pair."),
        (["diff", "--pair", "sample"], " has no parent: it was"),
    ],
)
def test_what_is_no_pair_is_refused(call: Command, arguments: list[str], cause: str) -> None:
    code, out, err = call(cli.dispatch, *arguments)
    assert code == 2 and not out and cause in cause_and_remedy(err)[0]


# --- a run that says what was changed in it -------------------------------------------------------

LESS_OF_THE_CAT = {"kind": "mask", "words": ["cat"], "amount": 0.5}


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """A run with an edit, and its parent."""
    folder = tmp_path_factory.mktemp("edited")
    parent = take(folder, prompt="a red cat", steps=2)
    return take(folder, prompt="a red cat", steps=2, edits=[LESS_OF_THE_CAT]), parent


def test_an_edited_run_is_held_against_its_parent(edited: tuple[Run, Run]) -> None:
    run, parent = edited
    pair = run.against_parent()
    (sentence,) = edit_sentences(run.attributes.recipe)
    assert "cat" in sentence and "amount 0.5" in sentence
    assert pair.parent == parent.name and pair.asked == [f"edited, the first alone: {sentence}"]
    assert pair.differs_at == 1 and float(pair.steps["latents"][0]) == 0
    assert float(pair.steps["prediction_cond"][0]) > 0 == float(pair.steps["prediction_uncond"][0])
    assert compare(parent, run).asked == [f"edited, the second alone: {sentence}"]
    assert compare(run, run).asked == []


def test_it_says_everywhere_that_it_is_edited(call: Command, edited: tuple[Run, Run]) -> None:
    run, parent = edited
    short = f"1 edit of {parent.attributes.identity}"
    (sentence,) = edit_sentences(run.attributes.recipe)
    assert edits_in_short(dict(run.attributes)) == short and not edits_in_short(parent.attributes)
    assert run.summary()["edited"] == short and run.summary()["edits"] == sentence
    assert "edited" not in parent.summary() and facts(run).endswith(f", {short}: {sentence}")
    assert sheets._subtitle(run, Image.new("RGB", (8, 8))).endswith(short)
    _, shown, _ = call(cli.dispatch, "show", run.path)
    assert f"  parent          {parent.name}\n" in shown and sentence in shown
    _, listed, _ = call(cli.dispatch, "ls", run.path.parent)
    assert f", 1 edit of {parent.name}" in listed and listed.count(" edit of ") == 1


def test_the_page_compare_lists_edits_first(edited: tuple[Run, Run]) -> None:
    run, parent = edited
    runs = {"edited": run, "parent": parent}
    (sentence,) = edit_sentences(run.attributes.recipe)
    assert asked_differently(runs)[0] == {"setting": "edits", "edited": sentence, "parent": "none"}
    assert kinship(runs, {}) == ["edited: 1 edit of parent."]
    alone = kinship({"edited": run}, {})
    assert alone == [f"edited: 1 edit of {parent.attributes.identity}, which is not shown here."]
    named = kinship({"edited": run}, {parent.attributes.identity: "it"})
    assert named == ["edited: 1 edit of it, which is not shown here."]


def test_the_page_compare_shows_the_pair(edited: tuple[Run, Run]) -> None:
    run, parent = edited
    configure(Library(run.path.parent))
    try:
        app = open_view("compare", runs=[run.name, parent.name])
        assert f"{run.name}: 1 edit of {parent.name}." in [text.value for text in app.text]
        app.toggle("pair").set_value(True).run()
        assert not app.exception
        assert str(run.against_parent()) in [code.value for code in app.code]
    finally:
        libraries._library.clear()


def test_an_edit_that_nobody_knows_is_named_as_such(edited: tuple[Run, Run]) -> None:
    recipe = {"edits": [{"kind": "magic"}, 7, LESS_OF_THE_CAT]}
    assert edit_sentences(recipe)[:2] == ["an edit that this version does not know"] * 2
    assert edit_sentences({"edits": "x"}) == [] == edit_sentences({})
    assert edits_in_short({"experiment": recipe}) == "3 edits of a run that it does not name"
