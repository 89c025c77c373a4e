"""Stable Diffusion XL is loaded from a folder, a variant, the hub's cache and a single file.

Anything else is refused by name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from originals import original
from parity import PROMPT
from safetensors.torch import save_file
from tiny_xl import around, assert_same, base, ours

from probe.cli import dispatch
from probe.diffusion.loading import load
from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each shape, and one whose weights are a float16 variant alone."""
    root = tmp_path_factory.mktemp("models")
    for shape in tiny.XL_UNETS:
        base(shape).save_pretrained(root / shape)
    tiny.xl_pipeline(zeros=False).to(dtype=torch.float16).save_pretrained(
        root / "fp16", variant="fp16"
    )
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("shape", tiny.XL_UNETS)
def test_a_local_folder_is_the_same_model(shape: str, saved: dict[str, Path]) -> None:
    model, pipeline = load(str(saved[shape]), device="cpu"), StableDiffusionXL.of(base(shape))
    assert (
        isinstance(model, StableDiffusionXL)
        and model.digest() == pipeline.digest()
        and model.zeros_for_empty
    )
    assert type(model.scheduler) is type(pipeline.scheduler)
    assert torch.equal(
        ours(model, steps=2)[-1].next_latents, ours(pipeline, steps=2)[-1].next_latents
    )


def test_a_local_folder_gives_the_bits_of_diffusers_from_the_same_folder(
    saved: dict[str, Path],
) -> None:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        saved["base"], local_files_only=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    assert_same(
        load(str(saved["base"]), device="cpu", scheduler="DDIM"),
        around(pipeline, "DDIM"),
        guidance_scale=5.0,
    )


def test_a_float16_variant(saved: dict[str, Path]) -> None:
    folder = str(saved["fp16"])
    with pytest.raises(ModelError, match="unet has no weights without a variant"):
        load(folder, device="cpu")
    model = load(folder, device="cpu", dtype="float16", variant="fp16")
    assert (
        isinstance(model, StableDiffusionXL)
        and model.dtype == torch.float16
        and not model.zeros_for_empty
    )
    assert (
        model.digest()
        == StableDiffusionXL.of(tiny.xl_pipeline(zeros=False).to(dtype=torch.float16)).digest()
    )


def test_a_hub_snapshot(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the hub's cache, as `snapshot_download` leaves it: by its id and its commit,
    without a network.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--xl/snapshots" / ("0" * 40)
    shutil.copytree(saved["turbo"], snapshot)
    (tmp_path / "models--somebody--xl/refs").mkdir()
    (tmp_path / "models--somebody--xl/refs/main").write_text("0" * 40)
    model = load("somebody/xl", device="cpu")
    assert (model.revision, model.digest()) == (
        "0" * 40,
        StableDiffusionXL.of(base("turbo")).digest(),
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_part_that_is_missing_from_a_folder_is_named(
    part: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(saved["base"], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(ModelError, match=f"{part}/(config.json)? ?is missing"):
        load(str(tmp_path / "copy"), device="cpu")


@pytest.mark.slow
def test_a_single_file_is_the_same_model(saved: dict[str, Path], tmp_path: Path) -> None:
    """In the original layout, with the configs and the tokenizers of its diffusers directory beside
    it.
    """
    shutil.copytree(saved["base"], tmp_path / "xl", ignore=shutil.ignore_patterns("*.safetensors"))
    held = original(base())
    save_file(held, tmp_path / "xl.safetensors")
    model = load(str(tmp_path / "xl.safetensors"), device="cpu")
    assert (
        isinstance(model, StableDiffusionXL)
        and model.digest() == StableDiffusionXL.of(base()).digest()
    )
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    save_file({**held, key: held[key][:-1]}, tmp_path / "xl.safetensors")
    with pytest.raises(
        ModelError,
        match=r"text_encoder_2: .*v_proj\.weight has shape \(23, 24\), and "
        r"text_encoder_2/config\.json makes it \(24, 24\)",
    ):
        load(str(tmp_path / "xl.safetensors"), device="cpu")
    shutil.rmtree(tmp_path / "xl")
    with pytest.raises(ModelError, match="this file is of Stable Diffusion XL") as caught:
        load(str(tmp_path / "xl.safetensors"), device="cpu")
    assert "Put its configs and tokenizers" in caught.value.remedy


WRONG_FILES: dict[str, tuple[str, str, Any]] = {
    "force_zeros_for_empty_prompt is 'no', not true or false.": (
        "model_index.json", "force_zeros_for_empty_prompt", "no"),
    "it has no text_encoder_2 (model_index.json).": (
        "model_index.json", "text_encoder_2", [None, None]),
    "its tokenizer_2 is ['transformers', 'BertTokenizer'], which is not": (
        "model_index.json", "tokenizer_2", ["transformers", "BertTokenizer"]),
    "text_projection.weight has shape (12, 24), and text_encoder_2/config.json makes it (16": (
        "text_encoder_2/config.json", "projection_dim", 16),
    "a UNet without SDXL's added conditions is not supported": (
        "unet/config.json", "addition_embed_type", None),
}  # fmt: skip


@pytest.mark.parametrize("problem", WRONG_FILES)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    problem: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    file, key, value = WRONG_FILES[problem]
    shutil.copytree(saved["base"], tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "copy"), device="cpu")
    assert problem in caught.value.cause and caught.value.remedy


@pytest.mark.slow
def test_the_commands_know_a_recording_of_a_model_in_a_folder(
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    how = [
        f"--model={saved['base']}",
        "--device=cpu",
        f"--prompt={PROMPT}",
        "--steps=2",
        "--capture.attention=queries",
        "--durability=none",
    ]
    assert dispatch(["run", *how, "--dry-run"]) == 0
    assert (
        "/text/text_encoder_2/hidden" in capsys.readouterr().out
        and not (tmp_path / "runs").exists()
    )
    assert dispatch(["run", *how, "--quiet"]) == 0
    name = capsys.readouterr().out.strip()
    assert (
        dispatch(["show", "latest"])
        == dispatch(["ask", "latest", "astronaut"])
        == dispatch(["verify", "latest", "--model"])
        == 0
    )
    assert dispatch(["rerun", "latest", "--quiet"]) == 0
    assert dispatch(["diff", Path(name).name, "latest"]) == 0
    shown = capsys.readouterr().out
    assert "text_encoder_2" in shown and "astronaut" in shown
