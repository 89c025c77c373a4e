"""A word asked after the run gives the maps that it would have had in the prompt.

That holds where the queries are the same.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from PIL import Image
from tiny import COMMIT, hub_cache
from tiny_runs import PROMPT, pipeline, take
from tiny_runs import ask as ask_experiment

from probe.analysis import combined, word_maps
from probe.cli import dispatch
from probe.errors import ExperimentError, ModelError, RecordingNotFound
from probe.figures.word_sheet import ask_name
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.ask import READ_OUT, ask, read_out
from probe.running.recorder import record
from probe.watching.hooks import Hooks

QUERIES = {"attention": "queries", "branches": "both", "dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("runs"), capture=QUERIES, images=2)


def test_asked_about_its_own_prompt_a_recording_gives_its_own_maps(run: Run) -> None:
    """The one case whose answer is known: the same text, the same keys."""
    found = ask(run, PROMPT, pipeline())
    assert list(found) == run.grids
    for grid, maps in found.items():
        expected = run.attention(grid).sel(branch="cond")
        assert maps.dims == expected.dims
        np.testing.assert_allclose(maps.values, expected.values, atol=1e-6)
        assert maps.attrs["read_out"] == READ_OUT and maps.attrs["context"] == PROMPT


def test_the_maps_of_another_sentence_are_those_of_its_keys(run: Run) -> None:
    """By hand: diffusers' own scores of the recorded queries against the new sentence."""
    from probe.diffusion.sd import StableDiffusion
    from probe.watching.rehearsal import cross_attention

    model = StableDiffusion.of(pipeline())
    text = model.encode(model.read("an astronaut"))
    grid = run.grids[0]
    query = run.variable(f"attention/{grid}/query").sel(branch="cond").isel(step=1, image=1)
    found = ask(run, "an astronaut", pipeline())[grid].isel(step=1, image=1)
    for path in found["layer"].values:
        module = cross_attention(model.unet)[str(path)]
        with torch.no_grad():
            q = (
                torch.from_numpy(query.sel(layer=path).values).flatten(2).transpose(1, 2)
            )  # (head, pixel, feature)
            k = module.head_to_batch_dim(module.to_k(text))
            scores = (
                module.get_attention_scores(q, k)
                .transpose(1, 2)
                .unflatten(2, (found.sizes["y"], found.sizes["x"]))
            )
        np.testing.assert_allclose(
            found.sel(layer=path).transpose("head", "token", "y", "x").values,
            scores.numpy(),
            atol=1e-6,
        )
    assert (
        "astronaut" in found["word"].values and found["token_text"].values[0] == "<|startoftext|>"
    )


def test_one_map_a_step_and_its_context_with_it(run: Run) -> None:
    found = read_out(run, "astronaut", pipeline=pipeline())
    assert found.dims == ("step", "y", "x") and found.sizes["step"] == len(run.steps)
    assert found.attrs == {"read_out": READ_OUT, "context": "a astronaut", "word": "astronaut"}
    assert (found.values > 0).all() and (found.values < 1).all()
    own = read_out(run, "cat", PROMPT, pipeline())
    np.testing.assert_allclose(
        own.mean("step").values, run.word_overview().sel(word="cat").values, atol=1e-6
    )
    phrase = read_out(run, "the hat", PROMPT, pipeline())
    parts = [read_out(run, word, PROMPT, pipeline()).values for word in ("the", "hat")]
    np.testing.assert_allclose(phrase.values, sum(parts), atol=1e-6)


def test_asked_words_merge_as_recorded_ones(run: Run) -> None:
    asked = word_maps(combined(list(ask(run, PROMPT, pipeline()).values())))
    xr.testing.assert_allclose(
        asked.drop_attrs(), run.word_maps().drop_attrs().rename(asked.name), atol=1e-6
    )
    both = word_maps(combined(list(ask(run, "a hat in a hat", pipeline()).values())))
    assert both["word"].values.tolist() == "a hat in a hat".split(), (
        "words that are there twice stay apart"
    )


def test_words_are_spelt_as_in_a_prompt(run: Run) -> None:
    wanted = read_out(run, "scuba diving", "a cat scuba-diving!", pipeline())
    for text in ("scuba-diving", "Scuba diving!", "(scuba) diving"):
        np.testing.assert_array_equal(
            read_out(run, text, "a cat scuba-diving!", pipeline()).values, wanted.values
        )
    for text in ("scuba-diving", "hat!", "the cat's hat"):  # in the sentence that is made of it
        assert read_out(run, text, pipeline=pipeline()).attrs["context"] == f"a {text}"


def test_a_word_that_was_cut_from_the_sentence(tmp_path: Path) -> None:
    run = take(tmp_path, capture=QUERIES, steps=1, over_long="cut")
    with pytest.raises(ExperimentError) as caught:
        read_out(run, "hat", "a cat " * 40 + "hat", pipeline())
    assert caught.value.cause.startswith(
        "'hat' was not read: the sentence was cut before 'cat a cat a"
    )
    assert (
        caught.value.remedy == "Ask in a shorter one, with --context."
        and len(caught.value.cause) < 200
    )


def test_each_question_has_a_picture_of_its_own() -> None:
    def name(word: str, context: str | None = None) -> str:
        return ask_name(xr.DataArray(0, attrs={"word": word, "context": context or f"a {word}"}))

    assert (
        name("fish") == name("Fish") == name("fish", "A  fish") == "ask-fish.png"
        and name("scuba diving") == "ask-scuba-diving.png"
    )
    long = "fish and " * 400
    others = [
        ("fish", "a fish on a cat"),
        ("fish", "one fish"),
        ("cat", "a fish on a cat"),
        ("fish!", None),
        ("scuba-diving", None),
    ]
    others += [
        (long, None),
        (long + "cat", None),
        ("stra\u00dfe", None),
        ("strasse", None),
        ("\U00010400" * 90, None),
        ("\u732b" * 90, None),
    ]
    names = [name(*other) for other in others]
    assert len({"ask-fish.png", "ask-scuba-diving.png", *names}) == len(names) + 2
    assert max(len(one.encode()) for one in names) < 200 and not any("/" in one for one in names)
    assert name("FISH", "One fish") == name("fish", "one fish")


def test_a_model_of_the_hub_is_read_at_the_commit_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tiny.pipeline().save_pretrained(tmp_path / "model")
    hub_cache(tmp_path / "hub", tmp_path / "model", {"main": COMMIT})
    asked = {
        "model": "somebody/tiny",
        "revision": "main",
        "device": "cpu",
        "steps": 1,
        "capture": QUERIES,
    }
    run = record(ask_experiment(tmp_path / "runs", **asked), progress=False)
    (main,) = (tmp_path / "hub").rglob("refs/main")
    main.write_text("f" * 40)  # where main has moved to since
    np.testing.assert_array_equal(
        read_out(run, "cat").values, read_out(run, "cat", pipeline=pipeline()).values
    )


def test_the_unet_is_never_called(run: Run) -> None:
    pipe, calls = pipeline(), []
    with Hooks([(pipe.unet, "input", calls.append)]):
        read_out(run, "astronaut", pipeline=pipe)
    assert calls == []


def test_what_cannot_be_asked(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="'catt' is not in 'a cat on the hat'") as caught:
        read_out(run, "catt", PROMPT, pipeline())
    assert "cat" in caught.value.remedy
    for nothing in ("+", "...", "_", " '"):
        with pytest.raises(ExperimentError) as empty:
            read_out(run, nothing, pipeline=pipeline())
        assert (empty.value.cause, empty.value.remedy) == (
            f"{nothing!r} is no word: there are no letters in it.",
            "Name one: probe ask latest fish",
        )
    for nothing in ("", " "):
        with pytest.raises(ExperimentError, match="There is no word to ask for") as empty:
            read_out(run, nothing, pipeline=pipeline())
        assert empty.value.remedy == "Name one: probe ask latest fish"
    with pytest.raises(RecordingNotFound, match="holds no queries to ask") as missing:
        read_out(take(tmp_path), "cat", pipeline=pipeline())
    assert "capture.attention: queries" in missing.value.remedy
    with pytest.raises(ModelError, match="other weights"):
        read_out(run, "cat", pipeline=tiny.pipeline(seed=1))
    with pytest.raises(RecordingNotFound, match="the cond branch"):
        read_out(
            take(tmp_path, capture={**QUERIES, "branches": "uncond"}), "cat", pipeline=pipeline()
        )


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    made = record(
        ask_experiment(
            tmp_path / "runs", model=str(tmp_path / "model"), device="cpu", capture=QUERIES
        ),
        progress=False,
    )
    assert (
        dispatch(["ask", str(made.path), "astronaut", "--context", "an astronaut in the hat"]) == 0
    )
    told = capsys.readouterr().out
    assert READ_OUT in told and "'an astronaut in the hat'" in told and "sigma" in told
    (drawn,) = made.path.glob("ask-astronaut-*.png")
    assert told.strip().endswith(str(drawn))
    with Image.open(drawn) as picture:
        assert (
            picture.text["context"] == "an astronaut in the hat"
            and picture.text["read_out"] == READ_OUT
        )
    for word in ("astronaut", "a cat on " * 20):
        assert dispatch(["ask", str(made.path), word]) == 0
    assert len([*made.path.glob("ask-*.png")]) == 3, (
        "a question in another sentence is another question"
    )
    assert dispatch(["show", str(made.path), "--words"]) == 0
    with Image.open(made.path / "words.png") as picture:
        assert np.asarray(picture).std() > 5, "a blank sheet"
    assert [check.name for check in verify(Run(made.path)) if check.verdict == "failed"] == [], (
        "pictures are not in the manifest"
    )
