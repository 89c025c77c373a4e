"""What a recipe asks of a loaded model: `clip_skip` is that of diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import tiny
import tiny_runs
import tiny_xl
import torch
from parity import PROMPT, assert_bits
from recordings import assert_same

from probe.diffusion.families import family_of
from probe.diffusion.family import COND, TEXT, UNCOND
from probe.diffusion.preparing import prepared
from probe.diffusion.text import with_text_model
from probe.errors import ExperimentError, ModelError
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.ask import ask
from probe.running.recorder import record, rerun
from probe.settings.experiment import Experiment, load_experiment

MODELS = {"sd": (tiny.pipeline, 2), "sdxl": (tiny_xl.base, 1)}  # with the most layers to skip
NEGATIVE = "scuba diving"
SKIPPED = [(family, skip) for family, (_, most) in MODELS.items() for skip in range(most + 1)]


def theirs(pipe: Any, **how: Any) -> tuple[torch.Tensor, np.ndarray]:
    """The pipeline's own latents and pictures, with `text_model` where diffusers looks for it."""
    with with_text_model(pipe.text_encoder):
        return parity.theirs(pipe, steps=3, guidance_scale=4.0, **how)


def latents(run: Run) -> np.ndarray:
    return np.asarray(run.variable("latents/final_latents").values)


def ask_for(folder: Path, **changes: Any) -> Experiment:
    return tiny_runs.ask(folder, steps=3, guidance_scale=4.0, device="cpu", **changes)


def take(folder: Path, pipe: Any, **changes: Any) -> Run:
    return record(ask_for(folder, **changes), pipe, progress=False)


@pytest.mark.parametrize(("family", "skip"), SKIPPED)
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_skipped_layers_give_the_bits_of_the_pipeline(
    family: str, skip: int, negative: str
) -> None:
    pipe = MODELS[family][0]()
    model = prepared(family_of(pipe), Experiment(clip_skip=skip))
    steps = parity.ours(model, guidance_scale=4.0, negative=negative, steps=3)
    assert_bits(model, steps, *theirs(pipe, negative=negative, clip_skip=skip))


@pytest.mark.parametrize("family", MODELS)
def test_no_layer_skipped_is_no_setting(family: str) -> None:
    model = family_of(MODELS[family][0]())
    tokens = {COND: model.tokens(PROMPT), UNCOND: model.tokens("")}
    for branch, read_as in tokens.items():
        plain = model.encode_prompt(read_as, branch)
        for skip in (None, 0):
            again = prepared(model, Experiment(clip_skip=skip)).encode_prompt(read_as, branch)
            assert all(torch.equal(plain[name], again[name]) for name in plain)
    other = prepared(model, Experiment(clip_skip=1))
    assert not torch.equal(
        other.encode_prompt(tokens[COND])[TEXT], model.encode_prompt(tokens[COND])[TEXT]
    )


@pytest.mark.parametrize("family", MODELS)
def test_it_is_recorded_as_it_is_drawn_and_verified(family: str, tmp_path: Path) -> None:
    pipe = MODELS[family][0]()
    run = take(tmp_path, pipe, clip_skip=1, negative_prompt=NEGATIVE)
    drawn, _ = theirs(pipe, negative=NEGATIVE, clip_skip=1)
    assert_same(latents(run), drawn.numpy(), "final_latents")
    checks = verify(run, pipe)
    assert not checks.failed, str(checks)
    again = rerun(run, pipe, progress=False)
    assert run.diff(again).same


def test_the_output_that_is_recorded_is_what_the_unet_is_given(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    everything = {"activations": ("text_encoder.*",)}
    run = take(tmp_path, pipe, clip_skip=1, negative_prompt=NEGATIVE, capture=everything)
    model = prepared(family_of(pipe), run.recipe)
    output = run.variable("text/text_encoder/output")
    for branch, text in run.recipe.texts.items():
        given = model.encode_prompt(model.tokens(text), branch)[TEXT][0]
        assert_same(output.sel(branch=branch).values, given.numpy(), branch)


def test_a_word_that_is_asked_for_afterwards_skips_the_same_layers(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    run = take(tmp_path, pipe, clip_skip=1, capture={"attention": "queries"})
    for grid, maps in ask(run, PROMPT, pipe).items():
        recorded = run.attention(grid).sel(branch="cond")
        np.testing.assert_allclose(maps.values, recorded.transpose(*maps.dims).values, atol=1e-6)


@pytest.mark.parametrize(("family", "most"), [(name, most) for name, (_, most) in MODELS.items()])
def test_more_layers_than_there_are_cannot_be_skipped(family: str, most: int) -> None:
    with pytest.raises(ExperimentError, match=r"clip_skip: .* cannot be skipped") as refused:
        prepared(family_of(MODELS[family][0]()), Experiment(clip_skip=most + 1))
    assert refused.value.remedy == f"Write a number from 0 to {most}."


def test_a_pipeline_that_skips_otherwise_is_refused() -> None:
    pipe = tiny.pipeline()
    inner = pipe.text_encoder.final_layer_norm
    model = prepared(family_of(pipe), Experiment(clip_skip=1))
    tokens = {COND: model.tokens(PROMPT)}
    model.check_reading(tokens)
    hook = inner.register_forward_hook(lambda module, given, output: output + 1)
    with pytest.raises(ModelError, match="another embedding of the prompt"):
        model.check_reading(tokens)
    hook.remove()
    assert "text_model" not in vars(pipe.text_encoder)


def test_a_setting_that_is_not_set_changes_no_identity() -> None:
    plain = Experiment()
    assert plain.identity() == "6c42ff8a"
    assert load_experiment(plain, clip_skip=0).identity() == plain.identity()
    assert load_experiment(plain, clip_skip=1).identity() != plain.identity()
