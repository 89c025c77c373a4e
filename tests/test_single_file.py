"""A checkpoint in one file, in the original layout, is the same model as its diffusers directory; or the way is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig

from probe.diffusion.loading import load
from probe.diffusion.models import StableDiffusion
from probe.errors import ModelError
from probe.running.recorder import record

PLAIN_UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
              "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet(key: str, layers: int) -> str:
    """The original name of a tensor of a UNet in which each block has `layers` layers."""
    stem, _, end = key.rpartition(".")
    if stem in PLAIN_UNET:
        return f"{PLAIN_UNET[stem]}.{end}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        place = f"middle_block.{2 * int(found[2]) + (found[1] == 'attentions')}"
        return f"{place}.{renamed(found[3]) if found[1] == 'resnets' else found[3]}"
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
    assert found, key
    block, kind, number, rest = int(found[2]), found[3], int(found[4]), found[5]
    first = block * (layers + 1) + (1 if found[1] == "down" else 0)
    name = "input_blocks" if found[1] == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{name}.{first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"{name}.{first + layers}.{2 if block else 1}.{rest}"
    return f"{name}.{first + number}.{'0.' + renamed(rest) if kind == 'resnets' else '1.' + rest}"


def renamed(rest: str) -> str:
    stem, _, end = rest.rpartition(".")
    return f"{RESNET[stem]}.{end}"


def original_vae(key: str, blocks: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        stem, _, end = rest.rpartition(".")
        return f"{head}mid.attn_1.{VAE_ATTENTION[stem]}.{end}"
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def original(pipeline: Any) -> dict[str, torch.Tensor]:
    """A pipeline's weights as the first Stable Diffusion named and shaped them, with what else lay in such files."""
    held: dict[str, torch.Tensor] = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}
    for key, tensor in pipeline.unet.state_dict().items():
        held[f"model.diffusion_model.{original_unet(key, 1)}"] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        attention = "attentions" in key and tensor.ndim == 2
        held[f"first_stage_model.{original_vae(key, 3)}"] = tensor[:, :, None, None] if attention else tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        held[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    held["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {key: tensor.contiguous().clone() for key, tensor in held.items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A single file, and beside it the configs and the tokenizer of its diffusers directory, without weights."""
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
    asked = {"prompt": "a cat", "steps": 1, "device": "cpu", "capture": {"attention": "off"}, "output": str(tmp_path / "runs")}
    run = record(asked, progress=False, model=str(file))
    assert run.attributes["model"]["name"] == str(file) and run.attributes["model"]["weights"] == StableDiffusion.of(tiny.pipeline()).digest()


def test_every_tensor_of_a_single_file_is_accounted_for(file: Path) -> None:
    held = original(tiny.pipeline())
    short = {key: tensor for key, tensor in held.items() if key != "model.diffusion_model.out.2.bias"}
    save_file(short, file)
    assert refused(file).cause == f"{file}: unet: conv_out.bias (4) is not in its weights."
    save_file({**held, "model.diffusion_model.evil.weight": torch.zeros(1)}, file)
    assert "it holds 'model.diffusion_model.evil.weight', which has no place in the model." in refused(file).cause
    save_file({**held, "first_stage_model.decoder.conv_in.bias": torch.zeros(3)}, file)
    assert "vae: decoder.conv_in.bias has shape (3), and vae/config.json makes it (16)." in refused(file).cause


def test_without_configs_a_single_file_is_stable_diffusion_1_or_the_way_is_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    tokenizer = shutil.move(tmp_path / "little/tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "little")
    error = refused(file)
    assert error.cause == f"{file}: CLIP's tokenizer is not on this machine and could not be fetched."
    assert f"Put the model's configs and tokenizer (a diffusers directory, without weights) into {tmp_path / 'little'}" in error.remedy
    snapshot = tmp_path / "hub/models--openai--clip-vit-large-patch14/snapshots" / ("0" * 40)
    shutil.copytree(tokenizer, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    error = refused(file)
    assert "this file is not Stable Diffusion 1.x (text of width 16)." in error.cause
    assert error.remedy.startswith("In Python: pass StableDiffusionPipeline.from_single_file('little.safetensors')")
    model = load(str(file), device="cpu", weights=False)  # what is known of Stable Diffusion 1.x
    counted = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("unet", "vae", "text_encoder")}
    assert counted == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert (model.f, model.scaling_factor, model.latent_shape(1)) == (8, 0.18215, (1, 4, 64, 64))
    assert isinstance(model.text_encoder.config, CLIPTextConfig) and model.text_encoder.config.hidden_act == "quick_gelu"


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickled_checkpoint_is_not_read(suffix: str, tmp_path: Path) -> None:
    torch.save({}, tmp_path / f"old{suffix}")
    assert refused(tmp_path / f"old{suffix}").cause.endswith(": this checkpoint is pickled, and can run code when it is read.")


def test_other_files_are_told_what_they_are_not(file: Path) -> None:
    save_file({"lora.weight": torch.zeros(1)}, file)
    assert refused(file).cause.endswith(": this file is not laid out as Stable Diffusion's original checkpoints.")
    file.write_bytes(b"no")
    assert "is not a safetensors file" in refused(file).cause
