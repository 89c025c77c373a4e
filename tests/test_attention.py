"""What a run says of its attention equals what `probe.analysis` gives by hand.

What is not there is said in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr

from probe import analysis
from probe.analysis import (
    against_others,
    by_kind,
    by_sigma,
    combined,
    content_words,
    contribution,
    normalised,
    phrase,
    word_maps,
)
from probe.cli import dispatch
from probe.errors import ExperimentError, PromptError, RecordingNotFound
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.terminal import guarded

PROMPT = "a cat, on the hat of a cat"


def take(folder: Path, capture: dict[str, Any] | None = None, **asked: Any) -> Run:
    plain = {
        "prompt": PROMPT,
        "negative_prompt": "an astronaut",
        "steps": 4,
        "images": 2,
        "height": 24,
        "width": 48,
        "scheduler": "DDIM",
    }
    settings = {
        "branches": "both",
        "dtype": "float32",
        "text": False,
        "statistics": False,
        **(capture or {}),
    }
    return record(
        {**plain, "output": str(folder), "capture": settings, **asked},
        pipeline=tiny.pipeline(),
        progress=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("runs"), {"counterfactual": ["cat", "hat"]})


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Recordings with a part of what the one above has."""
    folder = tmp_path_factory.mktemp("others")
    return {
        "off": take(folder / "off", {"attention": "off"}),
        "queries": take(folder / "queries", {"attention": "queries"}),
        "summary": take(folder / "summary", {"attention": "summary"}),
        "cond": take(folder / "cond", {"branches": "cond", "steps": "0,2"}),
        "unguided": take(folder / "unguided", {"branches": "cond"}, guidance_scale=1),
        "empty": take(folder / "empty", prompt="", steps=1, images=1),
        "split": take(
            folder / "split",
            prompt="cat " * 73 + "zebra of a hat",
            over_long="cut",
            steps=1,
            images=1,
        ),
        "cut": take(
            folder / "cut", prompt="a cat " * 40 + "hat", over_long="cut", steps=1, images=1
        ),
    }


# --- the same as by hand --------------------------------------------------------------------------


def test_tokens_and_words_are_those_of_the_analysis(run: Run) -> None:
    every = [run.attention(grid) for grid in run.grids]
    for branch in ("uncond", "cond"):
        words = word_maps(combined(every).sel(branch=branch))
        xr.testing.assert_allclose(
            run.token_maps(branch=branch), combined(every).sel(branch=branch, drop=True)
        )
        found = run.word_maps(branch=branch)
        np.testing.assert_allclose(found.transpose(*words.dims).values, words.values, atol=1e-7)
        assert found["word"].values.tolist() == words["word"].values.tolist()
    assert run.word_maps()["word"].values.tolist() == "a cat on the hat of a cat".split(), (
        "words that are there twice stay apart"
    )
    assert run.word_maps(branch="uncond")["word"].values.tolist() == ["an", "astronaut"], (
        "the negative prompt's own"
    )
    np.testing.assert_allclose(
        run.word_maps().mean(("step", "image")).values, run.word_overview().values, atol=1e-6
    )


def test_daam_in_one_line(run: Run) -> None:
    found = run.word_maps(over=("step", "layer", "head"), method="bicubic", merge="mean")
    maps = [run.attention(grid) for grid in run.grids]
    by_hand = word_maps(
        combined(maps, over=("step", "layer", "head"), method="bicubic").sel(branch="cond"),
        merge="mean",
    )
    np.testing.assert_allclose(found.values, by_hand.values, atol=1e-7)
    assert found.dims == ("word", "image", "y", "x")


@pytest.mark.parametrize("of", ["attention", "contribution"])
def test_a_choice_is_a_part(of: Any, run: Run) -> None:
    grid = run.grids[1]
    maps = getattr(run, of)(grid)
    layer = str(maps["layer"].values[-1])
    part = run.token_maps(of=of, layers=layer, heads=[1], steps=[1, -1], over=())
    by_hand = maps.sel(branch="cond", layer=[layer]).isel(step=[1, 3], head=[1])
    np.testing.assert_allclose(part.transpose(*by_hand.dims).values, by_hand.values, rtol=1e-5)
    assert part["step"].values.tolist() == [1, 3] and part.name == of
    one = run.token_maps(of=of, layers=grid, heads=0, steps=slice(2, None), grid=(5, 7))
    expected = combined(maps.sel(branch="cond").isel(step=slice(2, None), head=[0]), grid=(5, 7))
    np.testing.assert_allclose(one.values, expected.values, rtol=1e-5)
    np.testing.assert_array_equal(
        run.token_maps(of=of, images=[1]).values, run.token_maps(of=of).isel(image=[1]).values
    )
    assert (
        run.token_maps(of=of, layers=["mid_block.*", "up_blocks.*"]).sizes
        == run.token_maps(of=of).sizes
    )


def test_one_number_is_a_list_of_one(run: Run) -> None:
    wanted = run.token_maps(heads=[1], images=[0], steps=[2], over="layer")
    for kind in (int, np.int64, np.uint8):
        xr.testing.assert_identical(
            run.token_maps(heads=kind(1), images=kind(0), steps=kind(2), over=("layer",)), wanted
        )
    xr.testing.assert_identical(run.word_maps(steps=0), run.word_maps(steps=[0]))
    xr.testing.assert_identical(run.word_maps(bands=np.int64(2)), run.word_maps(bands=2))
    edges = run.word_maps(bands=np.array([0.01, 1, 100]))
    xr.testing.assert_identical(edges, run.word_maps(bands=[0.01, 1, 100]))


def test_contribution_is_attention_times_what_is_written(run: Run, others: dict[str, Run]) -> None:
    for one in (run, others["queries"]):
        for grid in one.grids:
            by_hand = contribution(
                one.attention(grid), one.variable(f"attention/{grid}/value_size")
            )
            np.testing.assert_array_equal(one.contribution(grid).values, by_hand.values)
    np.testing.assert_allclose(
        run.word_maps(of="contribution").values,
        others["queries"].word_maps(of="contribution").values,
        atol=1e-6,
    )


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_chosen_words_are_a_part_of_all(branch: str, run: Run) -> None:
    every = run.word_maps(branch=branch)
    words = [str(word) for word in every["word"].values]
    text = {"cond": "cat", "uncond": "astronaut"}[branch]
    kept = [index for index, word in enumerate(words) if word == text]
    xr.testing.assert_identical(run.word_maps(branch=branch, words=text), every.isel(word=kept))
    if branch == "cond":
        several = run.word_maps(words=["the hat", "of"], merge="mean")
        assert several["word"].values.tolist() == ["the", "hat", "of"]
        xr.testing.assert_identical(run.phrase("THE hat"), phrase(every, "the hat"))
        with pytest.raises(PromptError, match="'dog' is not in the prompt"):
            run.word_maps(words=["cat", "dog"])
        with pytest.raises(ExperimentError, match="words and tokens exclude each other"):
            run.word_maps(words="cat", tokens=[1])


def test_chosen_tokens_are_a_part_of_all(run: Run) -> None:
    every = run.token_maps()
    xr.testing.assert_identical(run.token_maps(tokens=[0, 3]), every.isel(token=[0, 3]))
    xr.testing.assert_identical(run.token_maps(tokens=2), every.isel(token=[2]))
    with pytest.raises(RecordingNotFound, match="no token 99"):
        run.token_maps(tokens=99)


def test_tokens_that_are_not_chosen_are_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = analysis.combined

    def watched(maps: list[xr.DataArray], *rest: Any) -> xr.DataArray:
        read.extend(part.sizes["token"] for part in maps)
        return real(maps, *rest)

    monkeypatch.setattr(analysis, "combined", watched)
    run.word_maps(words="hat")
    assert read and set(read) == {1}


def test_noise_levels_and_scales(run: Run) -> None:
    found = run.word_maps(bands=2, normalise="space")
    words = word_maps(by_sigma(run.token_maps(), 2, run.variable("sigma")))
    np.testing.assert_allclose(found.values, normalised(words, "space").values, atol=1e-7)
    assert (
        found["steps"].values.sum() == 4
        and found["sigma_from"].values[0] > found["sigma_from"].values[1]
    )
    np.testing.assert_allclose(found.sum(("y", "x")).values, 1, atol=1e-5)


def test_a_phrase_and_a_word_against_the_others(run: Run) -> None:
    both = run.phrase("the hat", bands=2)
    xr.testing.assert_allclose(both, phrase(run.word_maps(bands=2), "the hat"))
    assert run.phrase("Cat").sizes["word"] == 2, "at both of its places"
    np.testing.assert_allclose(run.phrase("hat", normalise="min-max").max(("y", "x")).values, 1)
    found = run.against_others()
    xr.testing.assert_allclose(found, against_others(content_words(run.word_maps())))
    assert found["word"].values.tolist() == ["cat", "hat", "cat"]


def test_no_attention_is_dropped(run: Run, others: dict[str, Run]) -> None:
    found = run.mass()
    assert found["kind"].values.tolist() == [
        "BOS",
        "words",
        "other",
        "EOS",
        "rest",
    ] and found.dims == ("step", "kind", "image")
    np.testing.assert_allclose(found.sum("kind").values, 1, atol=1e-5)
    assert (found.values > 0).all(), "the comma is `other`"
    xr.testing.assert_allclose(found, by_kind(run.token_maps().mean(("y", "x"))))
    np.testing.assert_allclose(run.mass(branch="uncond").sum("kind").values, 1, atol=1e-5)
    written = run.mass(of="contribution")
    assert abs(written.sum("kind").values - 1).max() > 1e-3, "what is written is no share"


def test_what_words_did(run: Run) -> None:
    found = run.counterfactual()
    assert found.dims == ("step", "masked_word", "image", "y", "x") and found[
        "masked_word"
    ].values.tolist() == ["cat", "hat"]
    assert np.isfinite(found.values).all() and float(found.max()) > 0


def test_what_was_cut_is_said_aloud(others: dict[str, Run]) -> None:
    run = others["cut"]
    assert (
        run.word_maps().attrs["cut_from_prompt"].endswith("hat")
        and "cut_from_prompt" not in run.word_maps(branch="uncond").attrs
    )
    with pytest.raises(
        PromptError, match="'hat' was cut from the prompt: the model never read"
    ) as caught:
        run.phrase("hat")
    assert caught.value.remedy == "Shorten the prompt and record it again."


def test_a_word_that_was_cut_in_its_middle_is_said_aloud(others: dict[str, Run]) -> None:
    run = others["split"]
    assert run.cut() == ("bra of a hat", "zebra") and run.cut("uncond") == ("", "")
    for words in (run.word_maps(), run.word_maps(of="contribution"), run.word_overview()):
        assert words["word"].values.tolist() == ["cat"] * 73 + ["ze\u2026"]
    for text in ("zebra", "ze", "cat zebra"):
        with pytest.raises(
            PromptError, match="'zebra' was cut in its middle: the model read only 'ze' of it"
        ) as caught:
            run.phrase(text)
        assert caught.value.remedy == "Shorten the prompt and record it again."
    with pytest.raises(
        PromptError, match="'a hat' was cut from the prompt: the model never read 'bra of a hat'"
    ):
        run.phrase("a hat")
    assert others["cut"].cut()[1] == "" and others["cut"].word_maps()["word"].values[-1] == "a", (
        "cut between two words"
    )


# --- what is not there ----------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[Run], object], str, str]] = {
    "a word": (
        "cond",
        lambda run: run.phrase("green fish"),
        "'green fish' is not in the prompt.",
        "Its words: a, cat, on, the, hat, of. For any other word: record with capture.attention: "
        "queries, then probe ask latest 'green fish'",
    ),
    "nearly a word": (
        "queries",
        lambda run: run.phrase("hut"),
        "'hut' is not in the prompt.",
        "Did you mean hat? Its words: a, cat, on, the, hat, of. For any other word: probe ask "
        "{path} hut",
    ),
    "an empty prompt": (
        "empty",
        lambda run: run.phrase("cat"),
        "'cat' is not in the prompt.",
        "The prompt has no words. For any other word: record with capture.attention: queries, "
        "then probe ask latest cat",
    ),
    "nothing to set against": (
        "empty",
        lambda run: run.against_others(),
        "A word is set against the others, and there are no two content words: none.",
        "Look at its own map.",
    ),
    "a glob": (
        "cond",
        lambda run: run.word_maps(layers="up_block.*"),
        "'up_block.*' matches no layer whose attention {name} has.",
        "Did you mean up_blocks.* or ",
    ),
    "a grid": (
        "cond",
        lambda run: run.word_maps(layers="64x64"),
        "'64x64' matches no layer",
        "Did you mean 3x6 or 6x12?",
    ),
    "the grid of an array": (
        "cond",
        lambda run: run.contribution("6x13"),
        "{name} has no attention maps at 6x13.",
        "Did you mean 6x12",
    ),
    "a branch": (
        "cond",
        lambda run: run.word_maps(branch="uncond"),
        "{name} has no attention maps of the uncond branch.",
        "Record with capture.branches: both.",
    ),
    "a branch without guidance": (
        "unguided",
        lambda run: run.mass(branch="uncond"),
        "{name} has no attention maps of the uncond branch.",
        "Record with capture.branches: both and guidance_scale above 1.",
    ),
    "a branch that is none": (
        "cond",
        lambda run: run.word_maps(branch="uncnd"),
        "There is no branch 'uncnd'.",
        "Did you mean uncond",
    ),
    "the prediction of a branch": (
        "unguided",
        lambda run: run.prediction("uncond"),
        "{name} has no prediction_uncond: it ran without guidance.",
        "Record with guidance_scale above 1. It has: ",
    ),
    "any maps": (
        "off",
        lambda run: run.word_maps(),
        "{name} has no attention maps.",
        "Record with capture.attention: maps.",
    ),
    "any words": (
        "off",
        lambda run: run.phrase("cat"),
        "{name} has no attention maps.",
        "Record with capture.attention: maps.",
    ),
    "single heads": (
        "summary",
        lambda run: run.contribution(),
        "{name} holds means over heads, and a contribution is that of each head.",
        "Record with capture.attention: maps or queries.",
    ),
    "one head": (
        "summary",
        lambda run: run.word_maps(heads=0),
        "{name} holds means over heads, and single heads were asked for.",
        "Record with capture.attention: maps or queries.",
    ),
    "a head": (
        "cond",
        lambda run: run.word_maps(heads=[0, 9]),
        "{name} has no head 9 at 6x12.",
        "It has heads 0 to ",
    ),
    "an image": (
        "cond",
        lambda run: run.word_maps(images=[2]),
        "{name} has no image 2 at 6x12.",
        "It has images 0 to 1.",
    ),
    "a step": (
        "cond",
        lambda run: run.word_maps(steps=[1]),
        "{name} has no attention maps of step 1.",
        "It has steps 0, 2; see capture.steps.",
    ),
    "no step of those there are": (
        "queries",
        lambda run: run.word_maps(steps=slice(10, 20)),
        "{name} has attention maps of none of these steps.",
        "It has steps 0 to 3; see capture.steps.",
    ),
    "no step": (
        "cond",
        lambda run: run.word_maps(steps=[]),
        "{name} has attention maps of none of these steps.",
        "It has steps 0, 2; see capture.steps.",
    ),
    "no layer": (
        "cond",
        lambda run: run.mass(layers=[]),
        "layers is []: there is nothing to take the mean of.",
        "Leave layers out for all of them.",
    ),
    "no image": (
        "cond",
        lambda run: run.mass(images=[]),
        "images is []: there is nothing to take the mean of.",
        "Leave images out for all of them.",
    ),
    "what is read": (
        "cond",
        lambda run: run.word_maps(of="contributions"),  # type: ignore[arg-type]
        "of is 'contributions', which is no choice.",
        "Choose from: attention, contribution.",
    ),
    "what a phrase reads": (
        "cond",
        lambda run: run.phrase("cat", of="value"),  # type: ignore[arg-type]
        "of is 'value', which is no choice.",
        "Choose from: attention, contribution.",
    ),
    "what the mean is over": (
        "cond",
        lambda run: run.word_maps(over=("heads", "steps")),
        "over is 'heads', which is no choice.",
        "Choose from: step, image, draw, layer, head.",
    ),
    "a way to resize": (
        "cond",
        lambda run: run.word_maps(method="nearest"),  # type: ignore[arg-type]
        "method is 'nearest', which is no choice.",
        "Choose from: bilinear, bicubic, area.",
    ),
    "a scale": (
        "cond",
        lambda run: run.phrase("cat", normalise="minmax"),  # type: ignore[arg-type]
        "normalise is 'minmax', which is no choice.",
        "Choose from: none, min-max, words, space.",
    ),
    "a way to merge": (
        "cond",
        lambda run: run.word_maps(merge="max"),  # type: ignore[arg-type]
        "merge is 'max', which is no choice.",
        "Choose from: sum, mean.",
    ),
    "noise levels of all steps at once": (
        "cond",
        lambda run: run.word_maps(bands=4, over=("step", "layer", "head")),
        'bands and "step" in over exclude each other: either takes the mean over steps.',
        'Leave out bands, or "step" in over.',
    ),
    "what words did": (
        "cond",
        lambda run: run.counterfactual(),
        "{name} has no counterfactual maps.",
        'Record with capture.counterfactual: ["*"], or a list of words.',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_one_line_of_cause_and_one_of_remedy(what: str, others: dict[str, Run]) -> None:
    which, question, cause, remedy = REFUSED[what]
    run = others[which]
    with pytest.raises((ExperimentError, PromptError, RecordingNotFound)) as caught:
        question(run)
    assert caught.value.cause.startswith(cause.format(name=run.name, path=run.path))
    assert caught.value.remedy.startswith(remedy.format(name=run.name, path=run.path))
    assert caught.value.exit_code == 2 and "\n" not in caught.value.cause + caught.value.remedy


def test_from_the_command_line(others: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    off, cond = others["off"], others["cond"]
    for arguments, cause, remedy in (
        (
            ["show", str(off.path), "--words"],
            f"{off.name} has no attention maps.",
            "Record with capture.attention: maps.",
        ),
        (
            ["ask", str(off.path), "fish"],
            f"{off.name} holds no queries to ask.",
            "Record with capture.attention: queries.",
        ),
        (
            ["ask", str(cond.path), "fish"],
            f"{cond.name} holds no queries to ask.",
            "Record with capture.attention: queries.",
        ),
        (
            ["ask", str(cond.path), " "],
            "There is no word to ask for.",
            "Name one: probe ask latest fish",
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            guarded(dispatch, arguments)
        assert end.value.code == 2
        assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
            f"error: {cause}",
            remedy,
        ]
