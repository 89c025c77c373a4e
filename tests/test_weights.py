"""All weights are there and no others, whoever saved them: old names, several files, variants.

Other weights are refused by name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.errors import ModelError

FILES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def digest() -> str:
    return StableDiffusion.of(tiny.pipeline()).digest()


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{FILES[part]}.safetensors"


def rename(file: Path, new: Callable[[str], str], **more: torch.Tensor) -> None:
    held = {new(key): tensor for key, tensor in load_file(file).items()}
    save_file({**held, **more}, file)


def split(folder: Path, part: str, names: tuple[str, str], index: str) -> None:
    """Put the weights of a part into two files, and write their index."""
    held = load_file(weights(folder, part))
    weights(folder, part).unlink()
    halves: tuple[dict[str, torch.Tensor], ...] = ({}, {})
    for number, (key, tensor) in enumerate(held.items()):
        halves[number % 2][key] = tensor
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / part / name)
    listed = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / part / index).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": listed})
    )


def load_cpu(folder: Path, **options: Any) -> StableDiffusion:
    return load(str(folder), device="cpu", **options)


def refused(folder: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_cpu(folder, **options)
    return caught.value


# --- saved by others, or long ago -----------------------------------------------------------------


def old_attention(key: str) -> str:
    for new, old in OLD_ATTENTION.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def test_an_old_vae_whose_attention_has_other_names(copy: Path, digest: str) -> None:
    rename(weights(copy, "vae"), old_attention)
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in load_file(weights(copy, "vae"))
    model = load_cpu(copy)
    assert model.digest() == digest
    theirs, ours = (
        diffusers.AutoencoderKL.from_pretrained(copy / "vae", local_files_only=True).state_dict(),
        model.vae.state_dict(),
    )
    assert theirs.keys() == ours.keys() and all(
        torch.equal(value, ours[key]) for key, value in theirs.items()
    )


@pytest.mark.parametrize("wrapper", ["", "text_model."])
@pytest.mark.parametrize("positions", [False, True])
def test_an_old_text_encoder_with_a_wrapper_or_its_positions(
    wrapper: str, positions: bool, copy: Path, digest: str
) -> None:
    more = {f"{wrapper}embeddings.position_ids": torch.arange(77)[None]} if positions else {}
    rename(
        weights(copy, "text_encoder"), lambda key: wrapper + key.removeprefix("text_model."), **more
    )
    model = load_cpu(copy)
    assert model.digest() == digest
    assert torch.equal(model.text_encoder.embeddings.position_ids, torch.arange(77)[None])


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(part: str, variant: str | None, copy: Path, digest: str) -> None:
    stem, end = FILES[part], f".{variant}" if variant else ""
    names = (f"{stem}{end}-00001-of-00002.safetensors", f"{stem}{end}-00002-of-00002.safetensors")
    split(copy, part, names, f"{stem}.safetensors.index{end}.json")
    for other in FILES:
        if variant and other != part:
            weights(copy, other).rename(copy / other / f"{FILES[other]}.{variant}.safetensors")
    assert load_cpu(copy, variant=variant).digest() == digest


def test_weights_in_several_files_as_diffusers_writes_them(tmp_path: Path, digest: str) -> None:
    tiny.pipeline().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*/*-of-*.safetensors"))) > 4
    assert load_cpu(tmp_path).digest() == digest


def test_several_files_in_the_hubs_cache(copy: Path, tmp_path: Path, digest: str) -> None:
    split(
        copy,
        "unet",
        ("a.safetensors", "b.safetensors"),
        "diffusion_pytorch_model.safetensors.index.json",
    )
    snapshot = tmp_path / "hub/models--a--b/snapshots" / ("0" * 40)
    for number, file in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        blob, link = (
            tmp_path / "hub/models--a--b/blobs" / f"{number:064x}",
            snapshot / file.relative_to(copy),
        )
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert load_cpu(snapshot).digest() == digest


@pytest.mark.parametrize(
    "elsewhere", ["hub/models--c--d/blobs", "blobs", "hub/models--a--b/snapshots/blobs"]
)
@pytest.mark.parametrize("snapshot", ["hub/models--a--b/snapshots/0", "mine/model"])
def test_a_link_into_another_repository_is_refused(
    snapshot: str, elsewhere: str, copy: Path, tmp_path: Path
) -> None:
    folder, blob = tmp_path / snapshot, tmp_path / elsewhere / "0"
    shutil.copytree(copy, folder)
    blob.parent.mkdir(parents=True)
    file = weights(folder, "unet")
    file.rename(blob)
    file.symlink_to(blob)
    with pytest.raises(ModelError, match="is a link that leads out of the model's folder"):
        load_cpu(folder)


def test_every_value_is_a_copy_in_memory(saved: Path) -> None:
    """A file that changes after it was read changes nothing."""
    model = load_cpu(saved)
    assert not any(
        tensor.is_meta for part in FILES for tensor in getattr(model, part).state_dict().values()
    )
    assert all(
        tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in model.unet.parameters()
    )


# --- not whole ------------------------------------------------------------------------------------

KEYS = {
    "unet": "mid_block.attentions.0.proj_in.weight",
    "vae": "encoder.conv_in.bias",
    "text_encoder": "embeddings.token_embedding.weight",
}


@pytest.mark.parametrize("part", FILES)
def test_a_tensor_that_is_not_there_is_named(part: str, copy: Path) -> None:
    held = load_file(weights(copy, part))
    key = next(key for key in held if key.removeprefix("text_model.") == KEYS[part])
    shape = tuple(held.pop(key).shape)
    save_file(held, weights(copy, part))
    error = refused(copy)
    assert (
        error.cause
        == f"{copy}: {part}: {KEYS[part]} ({', '.join(map(str, shape))}) is not in its weights."
    )
    assert (
        error.remedy
        == f"Fetch the model again, and check that {part}/config.json is that of these weights."
    )


@pytest.mark.parametrize("part", FILES)
def test_a_tensor_that_has_no_place_is_named(part: str, copy: Path) -> None:
    rename(weights(copy, part), str, **{"something.else": torch.zeros(2, 3)})
    assert refused(copy).cause == (
        f"{copy}: {part}: its weights hold 'something.else' (2, 3), which has no place in the "
        "model."
    )


@pytest.mark.parametrize("part", FILES)
def test_a_tensor_of_another_shape_is_named_with_both(part: str, copy: Path) -> None:
    held = load_file(weights(copy, part))
    key = next(key for key in held if key.removeprefix("text_model.") == KEYS[part])
    right = ", ".join(map(str, held[key].shape))
    held[key] = torch.zeros(5, 5)
    save_file(held, weights(copy, part))
    assert refused(copy).cause == (
        f"{copy}: {part}: {KEYS[part]} has shape (5, 5), and {part}/config.json makes it ({right})."
    )


def test_weights_of_another_model_are_counted(copy: Path) -> None:
    shutil.copy(weights(copy, "unet"), weights(copy, "vae"))
    assert ", and " in refused(copy).cause and refused(copy).cause.endswith(" more like it.")


def test_several_files_of_which_one_is_not_there(copy: Path) -> None:
    split(
        copy,
        "unet",
        ("a.safetensors", "b.safetensors"),
        "diffusion_pytorch_model.safetensors.index.json",
    )
    (copy / "unet/b.safetensors").unlink()
    assert refused(copy).cause == f"{copy}: unet/b.safetensors is missing."
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    assert (
        refused(copy).cause == f"{copy}: unet has weights in several files, and no index of them."
    )


def test_the_name_of_a_variant_is_no_path(saved: Path) -> None:
    assert "is not the name of a variant" in refused(saved, variant="/../../vae/x").cause


# --- what decides which code runs -----------------------------------------------------------------


@pytest.mark.parametrize("word", ["eager", "flash_attention_2", "sdpa"])
def test_attention_is_our_choice(word: str, copy: Path, digest: str) -> None:
    config = json.loads((copy / "text_encoder/config.json").read_text())
    (copy / "text_encoder/config.json").write_text(
        json.dumps({**config, "attn_implementation": word, "_attn_implementation": word})
    )
    model = load_cpu(copy)
    assert model.text_encoder.config._attn_implementation == "sdpa" and model.digest() == digest


def test_settings_of_a_tokenizer_that_name_files_are_not_followed(copy: Path, saved: Path) -> None:
    """Whatever a tokenizer's config names, what is read is tokenizer.json, or vocab.json and
    merges.txt.
    """
    named = {
        **dict.fromkeys(("vocab_file", "gguf_file", "vocab"), "/etc/passwd"),
        "fast_tokenizer_files": ["/etc/passwd"],
        "init_inputs": ["/etc/passwd"],
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": "evil.Evil"},
        "tokenizer_object": 3,
    }
    config = copy / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    for text in ("a cat on the hat, zebra!", "in and of"):
        assert torch.equal(load_cpu(copy).read(text).ids, load_cpu(saved).read(text).ids)


def test_a_tokenizer_without_a_length_has_the_text_encoders(copy: Path, saved: Path) -> None:
    config = copy / "tokenizer/tokenizer_config.json"
    settings = json.loads(config.read_text())
    for length in ({}, {"model_max_length": 10**30}):
        config.write_text(
            json.dumps(
                {key: value for key, value in settings.items() if key != "model_max_length"}
                | length
            )
        )
        assert torch.equal(load_cpu(copy).read("a cat").ids, load_cpu(saved).read("a cat").ids)


def test_a_tokenizer_of_a_vocabulary_and_merges_alone(copy: Path, saved: Path) -> None:
    """As transformers saved it before 5: vocab.json, merges.txt, special_tokens_map.json."""
    model = json.loads((copy / "tokenizer/tokenizer.json").read_text())["model"]
    for file in (copy / "tokenizer").iterdir():
        file.unlink()
    (copy / "tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (copy / "tokenizer/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    token = {
        "content": "<|startoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    (copy / "tokenizer/special_tokens_map.json").write_text(
        json.dumps({"bos_token": token, "pad_token": "<|endoftext|>"})
    )
    assert torch.equal(
        load_cpu(copy).read("a cat on the hat").ids, load_cpu(saved).read("a cat on the hat").ids
    )
