"""A checkpoint in one file, in the original layout, is the same model as its diffusers directory.

If it cannot be read, the message says what to do.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny
import torch
from originals import original
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.errors import ModelError
from probe.running.recorder import record


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A single file, and beside it the configs and the tokenizer of its diffusers directory,
    without weights.
    """
    pipeline = tiny.pipeline()
    pipeline.save_pretrained(tmp_path / "little")
    for weights in (tmp_path / "little").glob("*/*.safetensors"):
        weights.unlink()
    save_file(original(pipeline), tmp_path / "little.safetensors")
    return tmp_path / "little.safetensors"


def refused(file: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(str(file), device="cpu")
    assert caught.value.remedy
    return caught.value


def test_a_single_file_is_the_same_model(file: Path, tmp_path: Path) -> None:
    assert load(str(file), device="cpu").digest() == StableDiffusion.of(tiny.pipeline()).digest()
    asked = {
        "prompt": "a cat",
        "steps": 1,
        "device": "cpu",
        "capture": {"attention": "off"},
        "output": str(tmp_path / "runs"),
    }
    run = record(asked, progress=False, model=str(file))
    assert (
        run.attributes["model"]["name"] == str(file)
        and run.attributes["model"]["weights"] == StableDiffusion.of(tiny.pipeline()).digest()
    )


def test_every_tensor_of_a_single_file_is_accounted_for(file: Path) -> None:
    held = original(tiny.pipeline())
    short = {
        key: tensor for key, tensor in held.items() if key != "model.diffusion_model.out.2.bias"
    }
    save_file(short, file)
    assert refused(file).cause == f"{file}: unet: conv_out.bias (4) is not in its weights."
    save_file({**held, "model.diffusion_model.evil.weight": torch.zeros(1)}, file)
    assert (
        "it holds 'model.diffusion_model.evil.weight', which has no place in the model."
        in refused(file).cause
    )
    save_file({**held, "first_stage_model.decoder.conv_in.bias": torch.zeros(3)}, file)
    assert (
        "vae: decoder.conv_in.bias has shape (3), and vae/config.json makes it (16)."
        in refused(file).cause
    )


def test_without_configs_a_single_file_is_stable_diffusion_1_or_the_way_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tokenizer = shutil.move(tmp_path / "little/tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "little")
    error = refused(file)
    assert (
        error.cause == f"{file}: CLIP's tokenizer is not on this machine and could not be fetched."
    )
    assert (
        "Put the model's configs and tokenizer (a diffusers directory, without weights) into "
        f"{tmp_path / 'little'}" in error.remedy
    )
    snapshot = tmp_path / "hub/models--openai--clip-vit-large-patch14/snapshots" / ("0" * 40)
    shutil.copytree(tokenizer, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    error = refused(file)
    assert "this file is not Stable Diffusion 1.x (text of width 16)." in error.cause
    assert error.remedy.startswith(
        "In Python: pass StableDiffusionPipeline.from_single_file('little.safetensors')"
    )
    model = load(str(file), device="cpu", weights=False)  # what is known of Stable Diffusion 1.x
    counted = {
        part: sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("unet", "vae", "text_encoder")
    }
    assert counted == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert (model.f, model.scaling_factor, model.latent_shape(1)) == (8, 0.18215, (1, 4, 64, 64))
    assert (
        isinstance(model.text_encoder.config, CLIPTextConfig)
        and model.text_encoder.config.hidden_act == "quick_gelu"
    )


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickled_checkpoint_is_not_read(suffix: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / f"old{suffix}")
    assert refused(tmp_path / f"old{suffix}").cause.endswith(
        ": this checkpoint is pickled, and can run code when it is read."
    )


def test_other_files_are_told_what_they_are_not(file: Path) -> None:
    save_file({"lora.weight": torch.zeros(1)}, file)
    assert refused(file).cause.endswith(
        ": this file is not laid out as Stable Diffusion's original checkpoints."
    )
    file.write_bytes(b"no")
    assert "is not a safetensors file" in refused(file).cause
