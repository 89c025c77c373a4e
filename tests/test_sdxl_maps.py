"""Maps and words of Stable Diffusion XL: two text encoders, each with a tokenizer of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from parity import PROMPT
from tiny_xl import ENCODERS, SMALL, ask, base, failed, ours, take
from true_maps import EVERYTHING, assert_the_same, peer_maps

from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError
from probe.reading.recording import Run
from probe.running.ask import ask as asking
from probe.running.ask import read_out
from probe.running.recorder import record
from probe.watching.counterfactual import chosen_words, embeddings_without


def test_words_are_those_of_each_encoder_and_maps_have_those_of_the_first(full_xl: Run) -> None:
    first, second = (full_xl.tree[f"text/{name}"].dataset.sel(branch="cond") for name in ENCODERS)
    assert list(first["word"].values) == list(second["word"].values) and set(
        first["word"].values
    ) == {*PROMPT.split(), ""}
    end = len(PROMPT.split()) + 1
    assert set(first["token_text"].values[end:]) == {"<|endoftext|>"} and set(
        second["token_text"].values[end + 1 :]
    ) == {"!"}
    maps = full_xl.attention()
    assert list(maps["token"].values) == [*range(end + 1), -1]
    assert list(maps["token_text"].sel(branch="cond").values[:-1]) == list(
        first["token_text"].values[: end + 1]
    )
    assert set(full_xl.word_maps()["word"].values) >= set(PROMPT.split())


def test_maps_of_a_negative_prompt_that_is_zeros_say_nothing(full_xl: Run) -> None:
    maps = full_xl.attention().sel(branch="uncond", token=slice(0, None)).values
    np.testing.assert_allclose(maps[:, :-1], 1 / 77, atol=1e-5)
    assert not full_xl.variable("attention/4x6/value_size").sel(branch="uncond").values.any()


def test_a_prompt_with_the_padding_of_the_second_tokenizer(tmp_path: Path) -> None:
    run = take(tmp_path, prompt="a cat ! !", negative_prompt="!", steps=1, capture=SMALL)
    assert failed(run) == {}
    first, second = (
        list(run.variable(f"text/{name}/word").sel(branch="cond").values) for name in ENCODERS
    )
    assert first == second and first[:4] == ["", "a", "cat", ""]
    assert list(run.variable("text/text_encoder_2/token_text").sel(branch="cond").values[3:5]) == [
        "!",
        "!",
    ]


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("base", {"images": 2, "height": 32, "width": 48, "negative_prompt": "the hat"}),
        pytest.param("ssd-1b", {}, marks=pytest.mark.slow),
        pytest.param("turbo", {"guidance_scale": 0.0, "images": 2}, marks=pytest.mark.slow),
    ],
)
def test_maps_are_those_of_an_independent_implementation(
    shape: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    capture = {
        **EVERYTHING,
        "branches": "cond" if shape == "turbo" else "both",
        "statistics": False,
        "text": False,
    }
    asked = ask(tmp_path, steps=2, capture=capture, **changes)
    assert_the_same(record(asked, base(shape), progress=False), peer_maps(asked, base(shape)))


def test_without_a_word_every_encoder_reads_the_prompt_without_it(full_xl: Run) -> None:
    """By hand: in both token lists the word's token is the padding of that tokenizer."""
    pipeline, words = base(), list(full_xl.variable("counterfactual/masked_word").values)
    assert words == ["a", "cat", "on", "the", "hat"]
    states, pooled = [], torch.empty(0)
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        ids = tokenizer(
            [PROMPT] * 2, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        ids[1, 2] = tokenizer.pad_token_id
        with torch.no_grad():
            said = encoder(ids, output_hidden_states=True)
        states.append(said.hidden_states[-2])
        pooled = said.text_embeds if "text_embeds" in said else pooled
    assert not torch.equal(pooled[0], pooled[1])
    added = {
        "text_embeds": pooled.repeat_interleave(2, 0),
        "time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(4, 1),
    }
    text = torch.cat(states, -1).repeat_interleave(2, 0)
    latents = StableDiffusionXL.of(pipeline).with_scheduler("default", {})
    step = ours(
        latents, images=2, height=32, width=48, guidance_scale=full_xl.experiment.guidance_scale
    )[1]
    with torch.no_grad():
        said = pipeline.unet(
            step.model_input.repeat(2, 1, 1, 1),
            step.timestep,
            encoder_hidden_states=text,
            added_cond_kwargs=added,
        ).sample
    expected = (said[:2] - said[2:]).abs().mean(1).numpy()
    np.testing.assert_allclose(
        full_xl.counterfactual().sel(step=1, masked_word="cat").values, expected, atol=1e-5
    )
    assert expected.max() > 1e-4


def test_a_padding_that_would_end_the_prompt_is_refused(tmp_path: Path) -> None:
    pipeline = copy.copy(base())
    pipeline.tokenizer_2 = tiny.tokenizer()
    with pytest.raises(
        ModelError, match="text_encoder_2 would take that padding for the end of the prompt"
    ):
        take(tmp_path, pipeline, capture={"counterfactual": ["cat"]})


def test_tokenizers_that_put_words_in_different_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is recorded as it is, maps are labelled as the first reads, and of each the word itself
    is left out.
    """
    pipeline = copy.deepcopy(base())
    pipeline.tokenizer.add_tokens("astro")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    asked = ask(tmp_path, prompt="an astrolabe cat", steps=1, capture={"statistics": False})
    with pytest.raises(
        ModelError, match="its text encoders read other words of 'an astrolabe cat'"
    ):
        record(asked, pipeline, progress=False, **{"capture.counterfactual": ["cat"]})
    assert not list(tmp_path.iterdir())
    run = record(asked, pipeline)
    assert (
        "maps are labelled as the first one reads it" in capsys.readouterr().err
        and failed(run) == {}
    )
    assert (
        "astro" in run.variable("attention/4x4/word").values
        and "astrolabe" in run.variable("text/text_encoder_2/word").values
    )

    model = StableDiffusionXL.of(base())
    tokens = model.tokens("a !!! cat")
    words = chosen_words(tokens["text_encoder"], ("cat",))
    tokens["text_encoder"] = model.read("a cat")  # as of a tokenizer that reads "!!!" as nothing
    told = embeddings_without(model, tokens, {"cat": [2]})
    assert words == {"cat": [5]} and told["text_embeds"].shape[0] == 2
    ids = tokens["text_encoder_2"].ids.repeat(2, 1)
    ids[1, 5] = base().tokenizer_2.pad_token_id
    with torch.no_grad():
        assert torch.equal(
            told["text_embeds"],
            torch.cat([base().text_encoder_2(row[None]).text_embeds for row in ids]),
        )


def test_a_word_that_was_not_in_the_prompt(tmp_path: Path) -> None:
    """The answer of the recorded prompt itself is its own maps, whose keys were recorded."""
    run = take(
        tmp_path,
        steps=2,
        capture={"attention": "queries", "statistics": False, "text": False, "dtype": "float32"},
    )
    assert read_out(run, "astronaut", pipeline=base()).values.any()
    for grid, maps in asking(run, PROMPT, base()).items():
        expected = run.attention(grid).sel(branch="cond")
        np.testing.assert_allclose(
            maps.transpose(*expected.dims).values, expected.values, atol=1e-5
        )
