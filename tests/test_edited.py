"""Every command says which field of an edited zarr.json, or of a model's files, is wrong.

None says that all is well.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr

from probe.cli import show
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.errors import CaptureError, ModelError, NotFinite, ProbeError, RecordingDamaged
from probe.proof.checks import check_digests
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.recorder import record, resume
from probe.settings.experiment import load_experiment
from probe.watching.hooks import Hooks
from probe.writing.store import MANIFEST

OFF = {"attention": "off", "text": False, "statistics": False}
ASKED: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 4,
    "scheduler": "DDIM",
    "durability": "none",
    "capture": OFF,
    "decode_every": 1,
}
SCHEDULER, TEXT = "scheduler/scheduler_config.json", "text_encoder/config.json"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording that was interrupted in its third step."""
    folder, pipe, seen = tmp_path_factory.mktemp("stopped"), tiny.pipeline(), []

    def stop(_: Any) -> None:
        seen.append(0)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with Hooks([(pipe.unet, "input", stop)]), pytest.raises(KeyboardInterrupt):
        record(ASKED, pipe, output=str(folder), progress=False)
    return next(folder.glob("*.zarr"))


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / stopped.name))


def edit(run: Path, field: str, value: Any) -> None:
    root = json.loads((run / "zarr.json").read_text())
    place = root["attributes"]
    *outer, last = field.split(".")
    for name in outer:
        place = place[name]
    place[last] = value
    (run / "zarr.json").write_text(json.dumps(root))


# --- recordings -----------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "scheduler.class": "PNDMScheduler",
    "scheduler.config.beta_end": 0.02,
    "scheduler.config.timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "latent_convention": "variance_exploding",
    "model.name": "another",
    "model.scaling_factor": 0.5,
}


@pytest.mark.parametrize("field", FIELDS)
def test_an_edited_field_is_named_before_anything_is_written(field: str, run: Path) -> None:
    edit(run, field, FIELDS[field])
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(RecordingDamaged, match=f"its {field} is"):
        resume(Run(run), tiny.pipeline(), progress=False)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_edited_noise_levels_are_named(run: Path) -> None:
    zarr.open_array(run, path="sigma", mode="r+")[2] = 3.0
    with pytest.raises(RecordingDamaged, match="its sigma is not that of the DDIMScheduler"):
        resume(Run(run), tiny.pipeline(), progress=False)


def test_a_setting_that_another_version_knows_is_no_edit(run: Path) -> None:
    edit(run, "scheduler.config.of_another_version", True)
    edit(run, "scheduler.config._diffusers_version", "0.1")
    resumed = resume(Run(run), tiny.pipeline(), progress=False)
    assert resumed.status == "complete" and check_digests(resumed).verdict == "exact"


@pytest.mark.parametrize("field", ["environment", "model", "scheduler"])
def test_what_all_commands_need_is_asked_for_when_a_recording_is_opened(
    field: str, run: Path
) -> None:
    edit(run, field, {"torch": "2"})
    with pytest.raises(RecordingDamaged, match=rf"its {field}\.\w+ is missing"):
        Run(run)


def test_complete_with_steps_missing_is_a_contradiction(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, "status", "complete")
    with pytest.raises(
        RecordingDamaged, match="says that it is complete, and only 2 of 4 steps are committed"
    ):
        resume(Run(run), progress=False)
    assert show([str(run)]) == 0
    assert "nan s" not in (told := capsys.readouterr().out) and "2 of 4 model calls" in told


def test_complete_without_a_manifest_is_a_contradiction(run: Path) -> None:
    whole = resume(Run(run), tiny.pipeline(), progress=False)
    (whole.path / MANIFEST).unlink()
    with pytest.raises(RecordingDamaged, match=rf"it has no {MANIFEST}"):
        resume(Run(run), progress=False)


PLANTS: dict[str, tuple[str, int, str]] = {
    "a picture": ("decoded/picture", 3, "decoded/picture has values in row 3"),
    "a step": ("latents/latents", 3, "latents/latents has values at step 3"),
}


@pytest.mark.parametrize("what", PLANTS)
def test_what_is_planted_where_no_step_was_is_found(what: str, run: Path) -> None:
    variable, row, told = PLANTS[what]
    assert check_digests(Run(run)).verdict == "exact"
    zarr.open_array(run, path=variable, mode="r+")[row] = 7
    assert (found := check_digests(Run(run))).verdict == "failed" and told in found.detail


def test_a_torn_step_is_no_plant(run: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    edit(run, "status", "running")
    edit(run, "writer", {"pid": gone.pid, "host": socket.gethostname()})
    zarr.open_array(run, path="latents/latents", mode="r+")[2] = 7
    zarr.open_array(run, path="decoded/picture", mode="r+")[2] = 7
    assert Run(run).status == "interrupted" and check_digests(Run(run)).verdict == "exact"


@pytest.mark.parametrize("name", ["flops", "parameters", "weight_bytes"])
def test_the_plan_counts_operations_and_weights_again(name: str, run: Path) -> None:
    pipe = tiny.pipeline()
    whole = resume(Run(run), pipe, progress=False)
    counted: Any = zarr.open_array(run, path=f"cost/{name}", mode="r+")
    counted[1] = 5
    found = {check.name: check for check in verify(Run(whole.path), pipe, [0])}
    assert found["plan"].verdict == "failed" and f"cost/{name}" in found["plan"].detail


# --- a VAE that makes no colours ------------------------------------------------------------------


def spoilt() -> Any:
    pipe = tiny.pipeline()
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    return pipe


@pytest.mark.parametrize(("every", "kept"), [(0, 4), (4, 1)])
def test_pixels_that_are_not_finite_stop_a_run_and_its_steps_stay(
    every: int, kept: int, tmp_path: Path
) -> None:
    with pytest.raises(
        NotFinite, match=r"The VAE's picture.* holds 1024 values of 3072 that are not finite"
    ) as caught:
        record(ASKED, spoilt(), output=str(tmp_path), decode_every=every, progress=False)
    assert "on_nan: record" in caught.value.remedy
    (path,) = tmp_path.glob("*.zarr")
    assert (
        Run(path).status == "failed"
        and len(Run(path).steps) == kept
        and np.isfinite(Run(path).latents.values).all()
    )


def test_pixels_that_are_not_finite_are_told_of_where_they_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = record(ASKED, pipe := spoilt(), output=str(tmp_path), decode_every=0, on_nan="record")
    assert "The VAE made 1024 values that are not finite" in capsys.readouterr().err
    assert "1024 values of images/final, shown as 0" in repr(made)
    decode = {check.name: check for check in verify(made, pipe, [0])}["decode"]
    assert (
        decode.verdict != "failed" and "1024 values of images/final are not finite" in decode.detail
    )
    edit(made.path, "decoded_not_finite", {})
    decode = {check.name: check for check in verify(Run(made.path), pipe, [0])}["decode"]
    assert decode.verdict == "failed" and "the recording says 0" in decode.detail


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny.pipeline().save_pretrained(made)
    return made


def says(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda model: (
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | changes))
        and None
    )


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    # what: (done to a model's folder, what is said of it, with weights and without)
    "a huge beta": (says(SCHEDULER, beta_start=1e308), "beta_start is 1e+308, not between 0 and 1"),
    "a beta below zero": (says(SCHEDULER, beta_end=-0.5), "beta_end is -0.5, not between 0 and 1"),
    "too few betas": (
        says(SCHEDULER, trained_betas=[0.1] * 10),
        "trained_betas has 10 values, and num_train_timesteps is 1000",
    ),
    "a trained beta of 2": (
        says(SCHEDULER, trained_betas=[2.0] * 1000),
        "trained_betas holds 2.0, not a number from 0 to 1",
    ),
    "one timestep": (
        says(SCHEDULER, num_train_timesteps=1),
        "num_train_timesteps is 1, not a whole number from 2",
    ),
    "a list of ends": (
        says(TEXT, eos_token_id=[544]),
        "text_encoder/config.json: eos_token_id is [544]",
    ),
    "gated attention": (
        says("unet/config.json", attention_type="gated"),
        "gated attention (GLIGEN) is not supported yet",
    ),
    "more channels": (
        says("unet/config.json", out_channels=8),
        "extra input channels (inpainting or depth) is not supported yet",
    ),
    "classes": (
        says("unet/config.json", class_embed_type="timestep"),
        "class embeddings is not supported yet",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_models_edited_file_is_named_with_weights_and_without(
    what: str, folder: Path, tmp_path: Path
) -> None:
    change, told = EDITS[what]
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    change(model)
    for weights in (True, False):
        for scheduler in ("default", "DDIM"):
            with pytest.raises(ModelError) as caught:
                load(str(model), device="cpu", weights=weights, scheduler=scheduler)
            assert told in caught.value.cause and "--scheduler" not in caught.value.remedy


def test_more_steps_than_timesteps_are_told_as_that() -> None:
    pipe = tiny.pipeline()
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, num_train_timesteps=5)
    with pytest.raises(ProbeError) as caught:
        plan(
            StableDiffusion.of(pipe, scheduler="DDIM"),
            load_experiment({"prompt": "a cat", "steps": 50}),
        )
    assert "Use fewer: this model was trained on 5 timesteps" in caught.value.remedy


def test_a_text_encoder_that_is_not_finite_is_told_as_that(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.fill_(float("inf"))
    for text, kind in ((True, CaptureError), (False, NotFinite)):
        with pytest.raises(kind, match=r"text_encoder: .*weights are not, or its number format"):
            record(ASKED, pipe, output=str(tmp_path), capture={**OFF, "text": text}, progress=False)
