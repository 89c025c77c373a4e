"""What a word did: the same as asking the UNet twice by hand, and no trace of it in the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import PROMPT, ask, assert_neutral, assert_no_hooks, bare, model_for, pipeline, take

from probe.errors import ExperimentError
from probe.reading.compare import compare
from probe.running.recorder import record
from probe.watching.counterfactual import chosen_words


@pytest.mark.parametrize("scheduler", ["PNDM", "Euler"])
def test_a_change_is_the_difference_of_two_predictions(scheduler: str, tmp_path: Path) -> None:
    asked = ask(tmp_path, scheduler=scheduler, images=2, capture={"counterfactual": ("cat", "hat")})
    steps, model = bare(pipeline(), asked), model_for(pipeline(), asked)
    run = record(asked, pipeline(), progress=False)
    assert_neutral(run, steps)
    assert_no_hooks(pipeline())
    found = run.variable("counterfactual/change")
    assert list(found["masked_word"].values) == ["cat", "hat"]
    prompt = model.read(PROMPT)
    position = prompt.spans[prompt.words.index("hat")]
    ids = prompt.ids.clone()
    ids[0, position] = model.tokenizer.pad_token_id
    with torch.no_grad():
        texts = [model.text_encoder(i)[0].repeat(2, 1, 1) for i in (prompt.ids, ids)]
        one = steps[2]
        whole, other = (
            model.unet(
                one.model_input, one.timestep, encoder_hidden_states=text, return_dict=False
            )[0]
            for text in texts
        )
    np.testing.assert_allclose(
        found.sel(masked_word="hat").isel(step=2).values,
        (whole - other).abs().mean(1).numpy(),
        atol=1e-5,
    )
    assert float(found.isel(step=2).max()) > 1e-4, "these words do something"


def test_everything_else_is_recorded_as_without_it(tmp_path: Path) -> None:
    capture = {
        "branches": "both",
        "tokens": "all",
        "activations": ("unet.mid_block",),
        "self_attention": ("*",),
    }
    plain = take(tmp_path, capture=capture)
    asked = take(tmp_path, capture={**capture, "counterfactual": ("*",)})
    differing = [
        d for d in compare(plain, asked).differences if not d.variable.startswith("counterfactual/")
    ]
    assert differing == []
    assert (
        np.isfinite(asked.tree["cost"]["unet_seconds"].values).all()
        and asked.tree["cost"].sizes["step"] == plain.tree["cost"].sizes["step"]
    )


def test_words_are_chosen_by_text(tmp_path: Path) -> None:
    prompt = model_for(pipeline(), ask(tmp_path)).read("a cat in the hat of a cat")
    assert list(chosen_words(prompt, ("*",))) == ["a", "cat", "in", "the", "hat", "of"]
    assert [len(places) for places in chosen_words(prompt, ("Cat", "hat")).values()] == [2, 1]
    capital = model_for(pipeline(), ask(tmp_path)).read("A cat in the hat of a Cat")
    for wanted in (("*",), ("a", "CAT", "in", "the", "hat", "of"), ("cat", "Cat", "*")):
        assert sorted(chosen_words(capital, wanted).items()) == sorted(
            {"A": [1, 7], "cat": [2, 8], "in": [3], "the": [4], "hat": [5], "of": [6]}.items()
        ), "the same tokens are the same word"
    with pytest.raises(
        ExperimentError, match=r"capture\.counterfactual: 'bat' is not a word of"
    ) as caught:
        chosen_words(prompt, ("bat",))
    assert "cat" in caught.value.remedy and "hat" in caught.value.remedy
    for wanted in ("cat", "*"):
        with pytest.raises(ExperimentError, match="the prompt has no words to leave out") as caught:
            chosen_words(model_for(pipeline(), ask(tmp_path)).read(""), (wanted,))
        assert caught.value.remedy == "Write a prompt, or leave capture.counterfactual out."


def test_a_part_of_the_steps(tmp_path: Path) -> None:
    run = take(tmp_path, capture={"counterfactual": ("cat",), "steps": "0,2"})
    change = run.variable("counterfactual/change").values
    assert np.isfinite(change[[0, 2]]).all() and np.isnan(change[[1, 3, 4]]).all()
