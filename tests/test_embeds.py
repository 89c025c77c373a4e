"""Embeddings from a file: what the pipeline draws with them, and labels that claim no more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import tiny
import tiny_runs
import tiny_xl
import torch
from parity import PROMPT
from recordings import assert_same, cut
from safetensors.torch import load_file, save_file

from probe.diffusion.families import family_of
from probe.diffusion.preparing import prepared
from probe.errors import ExperimentError, ModelError
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.run import say_forecast
from probe.running.recorder import record, record_noising, rerun, resume
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.noising import Noising

MODELS = {"sd": tiny.pipeline, "sdxl": tiny_xl.base}
KEYS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def encoded(pipe: Any, prompt: str = PROMPT) -> dict[str, torch.Tensor]:
    """What the pipeline makes of a prompt, under diffusers' names."""
    with torch.no_grad():
        values = pipe.encode_prompt(
            prompt,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="scuba",
        )
    return {key: value.contiguous() for key, value in zip(KEYS, values, strict=False)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Embeddings that no prompt has: twice as long as those of the prompt."""
    folder = tmp_path_factory.mktemp("embeds")
    for family, make in MODELS.items():
        values = {key: 2 * value for key, value in encoded(make()).items()}
        save_file(values, folder / f"{family}.safetensors")
    return {family: folder / f"{family}.safetensors" for family in MODELS}


def take(folder: Path, pipe: Any, path: Path, **changes: Any) -> Run:
    changes = {"prompt": "", "guidance_scale": 4.0, **changes}
    return record(
        tiny_runs.ask(folder, steps=3, prompt_embeds=str(path), **changes), pipe, progress=False
    )


def theirs(pipe: Any, path: Path, images: int = 1) -> torch.Tensor:
    """The pipeline's latents after its last step."""
    return pipe(
        **load_file(path),
        num_images_per_prompt=images,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(parity.SEED + i) for i in range(images)],
        output_type="latent",
    ).images


def latents(run: Run) -> np.ndarray:
    return np.asarray(run.variable("latents/final_latents").values)


@pytest.mark.parametrize(
    ("family", "images"),
    [
        ("sd", 1),
        ("sdxl", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("sd", 2), ("sdxl", 1))),
    ],
)
def test_the_latents_are_those_of_the_pipeline(
    family: str, images: int, files: dict[str, Path], tmp_path: Path
) -> None:
    pipe, path = MODELS[family](), files[family]
    run = take(tmp_path, pipe, path, images=images)
    assert_same(latents(run), theirs(pipe, path, images).numpy(), "final_latents")
    checks = verify(run, pipe)
    assert not checks.failed, str(checks)
    assert list(run.attributes.model.files) == [str(path)]
    assert run.diff(rerun(run, pipe, progress=False)).same


@pytest.mark.parametrize("family", MODELS)
def test_embeddings_of_a_prompt_are_the_run_of_that_prompt(family: str, tmp_path: Path) -> None:
    pipe, path = MODELS[family](), tmp_path / "own.safetensors"
    save_file(encoded(pipe), path)
    texts = {"prompt": PROMPT, "negative_prompt": "scuba"}
    without_text = {"text": False}
    wanted = record(
        tiny_runs.ask(
            tmp_path / "text", steps=3, guidance_scale=4.0, capture=without_text, **texts
        ),
        pipe,
        progress=False,
    )
    run = take(tmp_path / "runs", pipe, path, capture=without_text, **texts)
    assert run.diff(wanted).same, "labels, too: the prompt is theirs"
    labelled = verify(run, pipe)
    assert not labelled.failed and run.words == wanted.words


def test_without_a_prompt_no_place_has_a_word(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tiny_runs.ask(tmp_path, steps=2, prompt_embeds=str(files["sd"]), prompt="")
    run = record(asked, tiny.pipeline(), progress=True)
    said = capsys.readouterr().err
    assert "No text encoder reads the prompt" in said and "its places have no words" in said
    maps = run.attention(run.grids[0])
    assert set(maps["word"].values.ravel()) == {""} and "text" not in run.tree.children
    assert -1 not in maps["token"].values, "nobody knows where the text would end"
    (labels,) = [check for check in verify(run).checks if check.name == "labels"]
    assert labels.verdict == "not checked" and "have no tokens" in labels.detail
    assert not verify(run).failed


def test_the_default_prompt_labels_nothing() -> None:
    assert load_experiment({"prompt_embeds": "a.safetensors"}).prompt == ""
    assert load_experiment(Experiment(), prompt_embeds="a.safetensors").prompt == ""
    assert load_experiment({"steps": 3}, prompt_embeds="a.safetensors").prompt == ""
    assert load_experiment({"prompt": "a cat"}, prompt_embeds="a.safetensors").prompt == "a cat"
    again = load_experiment({"prompt_embeds": "a.safetensors"})
    assert load_experiment(again.resolved()) == again
    plain = Experiment()
    assert load_experiment(plain, prompt_embeds=None).identity() == plain.identity()
    assert load_experiment(plain, prompt=plain.prompt, prompt_embeds="a").identity() != (
        plain.identity()
    )


def test_a_noising_is_told_them_too(files: dict[str, Path], tmp_path: Path) -> None:
    pipe, path = tiny.pipeline(), tmp_path / "own.safetensors"
    values = {key: value for key, value in encoded(pipe, "a cat").items() if key == KEYS[0]}
    save_file(values, path)
    picture = np.full((32, 32, 3), 90, np.uint8)
    how: dict[str, Any] = {
        "pipeline": pipe,
        "progress": False,
        "noises": 2,
        "timesteps": "100,500",
        "capture": {"text": False},
    }
    wanted = record_noising(picture, "a cat", output=str(tmp_path / "text"), **how)
    run = record_noising(
        picture, "a cat", output=str(tmp_path / "runs"), prompt_embeds=str(path), **how
    )
    assert run.diff(wanted).same and not verify(run, pipe).failed
    assert Noising(prompt_embeds="a").caption == ""


def test_an_interrupted_run_goes_on_and_a_changed_file_is_named(
    files: dict[str, Path], tmp_path: Path
) -> None:
    pipe, path = tiny.pipeline(), tmp_path / "mine.safetensors"
    shutil.copy(files["sd"], path)
    whole = take(tmp_path / "whole", pipe, path)
    finished = resume(cut(whole, tmp_path / "cut", 1), pipe, progress=False)
    assert finished.diff(whole).same
    save_file({key: 3 * value for key, value in load_file(path).items()}, path)
    (failed,) = [check for check in verify(whole, pipe).checks if check.name == "weights"]
    assert failed.detail == f"{path} is not the file that it was recorded with: bring that back"
    with pytest.raises(ModelError, match=f"was begun with another {path}"):
        resume(cut(whole, tmp_path / "again", 1), pipe, progress=False)
    path.unlink()
    with pytest.raises(ModelError, match=r"prompt_embeds: .* there is no such file"):
        verify(whole, pipe)


# --- what does not fit ----------------------------------------------------------------------------

CHANGES: dict[str, tuple[Any, str]] = {
    "no prompt": (lambda t: t.pop(KEYS[0]), "it has no prompt_embeds"),
    "no negative prompt": (lambda t: t.pop(KEYS[1]), "it has no negative_prompt_embeds"),
    "no pooled": (lambda t: t.pop(KEYS[3]), "it has no negative_pooled_prompt_embeds"),
    "a longer text": (
        lambda t: t.update({KEYS[0]: torch.zeros(1, 154, 40)}),
        r"its prompt_embeds has shape \(1, 154, 40\), and .* takes \(1, 77, 40\)",
    ),
    "another key": (
        lambda t: t.update({"prompt": torch.zeros(1)}),
        "it holds 'prompt'; the keys for this model are negative_pooled_prompt_embeds, negative_",
    ),
    "not finite": (
        lambda t: t.update({KEYS[0]: torch.full((1, 77, 40), torch.inf)}),
        "holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_does_not_fit_is_refused(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    change, cause = CHANGES[name]
    values, path = load_file(files["sdxl"]), tmp_path / "odd.safetensors"
    change(values)
    save_file(values, path)
    with pytest.raises(ModelError, match=cause) as refused:
        take(tmp_path / "runs", tiny_xl.base(), path)
    assert refused.value.remedy and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_guidance_no_negative_prompt_is_needed(
    files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    save_file({KEYS[0]: load_file(files["sd"])[KEYS[0]]}, path)
    pipe = tiny.pipeline()
    assert not verify(take(tmp_path, pipe, path, guidance_scale=1.0), pipe).failed
    with pytest.raises(ModelError) as refused:
        take(tmp_path, pipe, path)
    assert "or set guidance_scale: 1" in refused.value.remedy
    with pytest.raises(ModelError, match="the keys for this model"):
        prepared(family_of(pipe), Experiment(prompt_embeds=str(files["sdxl"])))


def test_a_forecast_checks_the_file(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    how = {"model": str(tmp_path / "model"), "steps": 2}
    experiment = load_experiment({**how, "prompt_embeds": str(files["sd"])})
    assert say_forecast(experiment, None) == 0
    assert "its places have no words" in capsys.readouterr().out
    with pytest.raises(ModelError, match="the keys for this model"):
        say_forecast(load_experiment({**how, "prompt_embeds": str(files["sdxl"])}), None)


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "clip_skip": {"clip_skip": 1},
    "capture.counterfactual": {"capture": {"counterfactual": ["cat"]}},
    "capture.activations of a text encoder": {"capture": {"activations": ["text_encoder.*"]}},
    "edits of texts, or with a donor beside": {"edits": [{"kind": "remove", "words": ["cat"]}]},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_needs_a_text_encoder_is_refused_beside_them(name: str) -> None:
    asked = {"prompt": "a cat", **CONTRADICTIONS[name]}
    load_experiment(asked)
    with pytest.raises(ExperimentError) as refused:
        load_experiment({**asked, "prompt_embeds": "a.safetensors"})
    assert f"{name}: prompt_embeds are given" in refused.value.cause
    assert refused.value.remedy == f"Leave out {name}, or prompt_embeds."
