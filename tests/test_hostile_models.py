"""An enemy's model is refused by name: quickly, in little memory, inside of its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
UNET_CONFIG, VAE_CONFIG = "unet/config.json", "vae/config.json"
TEXT_CONFIG = "text_encoder/config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
SCHEDULER = "scheduler/scheduler_config.json"
Change = Callable[[Path], Any]


def says(file: str, **changes: Any) -> Change:
    """A JSON file that says something else."""

    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return change


def holds(file: str, content: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def pipe(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return change


def in_place_of(file: str, make: Callable[[Path], Any]) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def hole(file: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / file, size)


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def changed(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file({key: value.contiguous() for key, value in held.items()}, folder / file)

    return changed


def without(key: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda held: held.pop(key)


def index(file: str, content: Any, *more: str) -> Change:
    """An index of weights, with files beside it."""

    def change(folder: Path) -> None:
        (folder / file).write_text(json.dumps(content))
        for name in more:
            torch.save({"weight": torch.zeros(1)}, folder / name)

    return change


def held_in(file: object) -> dict[str, Any]:
    """What an index says if `file` holds the one tensor that it names."""
    return {"weight_map": {"conv_in.bias": file}}


def header_of(size: int) -> bytes:
    return size.to_bytes(8, "little") + b"{" + b" " * 100


NEST = "[" * 100_000 + "]" * 100_000
SHARD = "unet/diffusion_pytorch_model.safetensors.index.json"
TEXT_SHARD = "text_encoder/model.safetensors.index.json"
CASES: dict[str, tuple[Change, str]] = {
    # tensors
    "a tensor of the UNet is missing": (tensors(UNET, without("conv_in.weight")),
        "unet: conv_in.weight (16, 4, 3, 3) is not in its weights"),
    "a tensor of the VAE is missing": (tensors(VAE, without("decoder.conv_out.bias")),
        "vae: decoder.conv_out.bias (3) is not in its weights"),
    "a tensor of the text encoder is missing": (tensors(TEXT, without("final_layer_norm.weight")),
        "text_encoder: final_layer_norm.weight"),
    "a tensor too many": (tensors(UNET, lambda h: h.update(evil=torch.zeros(3))),
        "unet: its weights hold 'evil' (3), which has no place"),
    "a tensor of another shape": (
        tensors(UNET, lambda h: h.update({"conv_in.bias": torch.zeros(7)})),
        "conv_in.bias has shape (7), and unet/config"),
    "a tensor of whole numbers": (
        tensors(UNET, lambda h: h.update({"conv_in.bias": torch.zeros(16, dtype=torch.int8)})),
        "is of type 'I8'"),
    "a header longer than its file": (holds(UNET, header_of(1 << 40)), "is cut short"),
    "a header of gigabytes": (
        lambda f: (holds(UNET, header_of(1 << 33))(f), hole(UNET, 1 << 34)(f)), "is cut short"),
    "weights full of holes": (hole(UNET, 1 << 40), "is cut short"),
    "weights of zero bytes": (holds(VAE, b""),
        "vae/diffusion_pytorch_model.safetensors is not a safetensors file"),
    "weights are a pipe": (pipe(UNET),
        "unet/diffusion_pytorch_model.safetensors is not a plain file"),
    "weights are a folder": (in_place_of(TEXT, Path.mkdir), "is not a plain file"),
    "weights are a link out": (
        in_place_of(UNET, lambda p: p.symlink_to(ROOT / "probe/emojiworld/unet" / p.name)),
        "a link that leads out of the"),
    "weights are a loop of links": (in_place_of(UNET, lambda p: p.symlink_to(p)),
        "could not be read"),
    # indices
    "an index names a pickle": (index(SHARD, held_in("w.bin"), "unet/w.bin"),
        "names 'w.bin', and only safetensors files"),
    "an index of a text encoder names a pickle": (
        index(TEXT_SHARD, held_in("w.bin"), "text_encoder/w.bin"),
        "names 'w.bin', and only safetensors files"),
    "an index leads out": (index(SHARD, held_in("../vae/diffusion_pytorch_model.safetensors")),
        "only safetensors files of"),
    "an index leads to the root": (index(SHARD, held_in("/etc/x.safetensors")),
        "only safetensors files of that folder"),
    "an index without a map": (index(SHARD, {"weight_map": []}), "has no weight_map"),
    "an index of numbers": (index(SHARD, held_in(3)), "has no weight_map"),
    "an index of files that are not there": (index(SHARD, held_in("no.safetensors")),
        "no.safetensors is missing"),
    "an index that forgets": (index(SHARD, held_in("diffusion_pytorch_model.safetensors")),
        "do not agree on 'conv_in"),
    "an index is a pipe": (pipe(SHARD), "is not a plain file"),
    # configs
    "nested without end": (holds("model_index.json", NEST), "is nested too deeply"),
    "nested in a config": (holds(UNET_CONFIG, '{"a": ' * 50_000 + "1" + "}" * 50_000),
        "is nested too deeply"),
    "a config of a gigabyte": (hole(VAE_CONFIG, 1 << 30), "bytes, and may have 1048576 at most"),
    "a config is a pipe": (pipe(UNET_CONFIG), "unet/config.json is not a plain file"),
    "a config is a folder": (in_place_of(VAE_CONFIG, Path.mkdir),
        "vae/config.json is not a plain file"),
    "a config is a device": (in_place_of(TEXT_CONFIG, lambda p: p.symlink_to("/dev/zero")),
        "a link that leads out"),
    "a config is a link to nothing": (in_place_of(UNET_CONFIG, lambda p: p.symlink_to("nowhere")),
        "is a link to nothing"),
    "a key twice": (holds(UNET_CONFIG, '{"in_channels": 4, "in_channels": 4}'),
        "says 'in_channels' twice"),
    "not a number": (holds(SCHEDULER, '{"beta_start": NaN}'), "holds NaN"),
    "infinity by another way": (holds(VAE_CONFIG, '{"scaling_factor": 1e999}'),
        "scaling_factor is inf, which is too large"),
    "a number of thousands of digits": (holds(UNET_CONFIG, '{"in_channels": ' + "9" * 5000 + "}"),
        "is not a valid JSON object"),
    "timesteps without end": (says(SCHEDULER, num_train_timesteps=500_000_000),
        "num_train_timesteps is 500000000, not a whole number from 2 to"),
    "timesteps in a float": (says(SCHEDULER, num_train_timesteps=1e9),
        "num_train_timesteps is 1000000000.0"),
    "no channels": (says(UNET_CONFIG, block_out_channels=[]),
        "block_out_channels is []: a list of 1 to 64 belongs there"),
    "channels of text": (says(UNET_CONFIG, block_out_channels=["16", "32"]),
        "block_out_channels is ['16', '32'], which it cannot be"),
    "channels without end": (says(UNET_CONFIG, block_out_channels=[10**12, 32]),
        "which is too large"),
    "channels that are many": (says(UNET_CONFIG, block_out_channels=[65536, 65536]),
        "weights, and 4000000000 is the most"),
    "channels of zero": (says(VAE_CONFIG, block_out_channels=[0, 8, 16]), "zero is no size"),
    "blocks without end": (says(UNET_CONFIG, layers_per_block=60_000), "and 500 is the most"),
    "transformers without end": (says(UNET_CONFIG, transformer_layers_per_block=[60_000, 1]),
        "and 500 is the most"),
    "a text encoder without end": (says(TEXT_CONFIG, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000, not a whole number"),
    "a vocabulary without end": (says(TEXT_CONFIG, vocab_size=10**15),
        "vocab_size is 1000000000000000, not a whole number"),
    "positions without end": (says(TEXT_CONFIG, max_position_embeddings=10**10),
        "max_position_embeddings is 10000000000"),
    "positions of text": (says(TEXT_CONFIG, max_position_embeddings="77"),
        "max_position_embeddings is '77', not a whole number"),
    "a vocabulary that is a list": (says(TEXT_CONFIG, vocab_size=[1]),
        "vocab_size is [1], not a whole number"),
    "heads that do not divide": (says(TEXT_CONFIG, num_attention_heads=5),
        "text_encoder/config.json makes no CLIPTextModel"),
    "a hub's kernel": (says(TEXT_CONFIG, attn_implementation="owner/kernel"),
        "attn_implementation is 'owner/kernel'"),
    "a hub's kernel, hidden": (says(TEXT_CONFIG, _attn_implementation="owner/kernel:f"),
        "_attn_implementation is 'owner/kernel:f'"),
    "quantized": (says(UNET_CONFIG, quantization_config={"quant_method": "gguf"}),
        "quantized weights are not supported"),
    "quantized text": (says(TEXT_CONFIG, quantization_config={"quant_method": "bnb"}),
        "quantized weights are not supported"),
    "a class of its own": (says(UNET_CONFIG, _class_name="Evil"),
        "its unet is 'Evil', which is not supported"),
    "a class that is a list": (says(VAE_CONFIG, _class_name=["os", "system"]),
        "its vae is ['os', 'system'], which is not supported"),
    "another class in the index": (says("model_index.json", vae=["evil", "Evil"]),
        "its vae is 'Evil', which is not supported"),
    "a setting nobody knows": (says(UNET_CONFIG, evil={"a": 1}),
        "has 'evil', which UNet2DConditionModel does not know"),
    "latents divided by zero": (says(VAE_CONFIG, scaling_factor=0.0),
        "scaling_factor is zero, and latents are divided by it"),
    # schedulers
    "a pipeline as a scheduler": (
        says("model_index.json", scheduler=["diffusers", "StableDiffusionPipeline"]),
        "is not one of diffusers'"),
    "a scheduler that is text": (says("model_index.json", scheduler="DDIMScheduler"),
        "its scheduler 'DDIMScheduler' is not one of diffusers'"),
    "a scheduler that is a mapping": (says("model_index.json", scheduler={"a": 1}),
        "is not one of diffusers'"),
    "a scheduler of a number": (says("model_index.json", scheduler=["diffusers", 3]),
        "its scheduler '3' is not one of diffusers'"),
    "a scheduler without betas": (
        says("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "is not supported"),
    "settings of a scheduler that are lists of lists": (says(SCHEDULER, trained_betas=[[1]]),
        "which no scheduler takes"),
    # tokenizers
    "an empty tokenizer": (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()],
        "tokenizer/ has neither tokenizer.json"),
    "a tokenizer that is a file": (
        lambda f: (shutil.rmtree(f / "tokenizer"), (f / "tokenizer").write_text("x")),
        "tokenizer/ is missing"),
    "a tokenizer is a pipe": (pipe(TOKENIZER), "tokenizer/tokenizer.json is not a plain file"),
    "a tokenizer of gigabytes": (hole(TOKENIZER, 1 << 33), "bytes, and may have"),
    "a tokenizer nested without end": (holds(TOKENIZER, NEST), "is nested too deeply"),
    "a tokenizer of another kind": (
        says(TOKENIZER, model={"type": "WordLevel", "vocab": [], "unk_token": 3}),
        "tokenizer/ holds no CLIP tokenizer"),
    "a tokenizer with a hostile pattern": (
        says(TOKENIZER, added_tokens=[{"id": -5, "content": 7}]), "tokenizer/"),
    "a tokenizer's setting of another type": (says(TOKENIZER_CONFIG, bos_token=[1]),
        "bos_token is [1], which it cannot be"),
    "prompts without end": (says(TOKENIZER_CONFIG, model_max_length=10**8),
        "makes prompts of 100000000 tokens"),
    "tokens beyond the text encoder": (says(TEXT_CONFIG, vocab_size=100),
        "tokenizer/ has a token number"),
    "tokens without end": (
        says(TOKENIZER, added_tokens=[{"id": i, "content": f"<{i}>"} for i in range(600, 150_600)]),
        "at most 10000 tokens"),
    # words
    "words that are numbers": (holds("words.json", "[1, 2]"), "words.json is not a list of words"),
    "words nested without end": (holds("words.json", NEST), "words.json is nested too deeply"),
    "words are a pipe": (pipe("words.json"), "words.json is not a plain file"),
    "words of a megabyte": (holds("words.json", json.dumps(["a" * 900_000])),
        "words.json is not a list of words"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How the load of each hostile folder ended, by case."""
    place = tmp_path_factory.mktemp("hostile")
    good = place / "good"
    tiny.pipeline().save_pretrained(good)
    folders = {"good": good}
    for number, (case, (change, _)) in enumerate(CASES.items()):
        folders[case] = Path(shutil.copytree(good, place / str(number)))
        change(folders[case])
    command = [sys.executable, str(ROOT / "tests/hostile_models.py"), *map(str, folders.values())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_good_model_loads_within_the_limits(ended: dict[str, dict[str, Any]]) -> None:
    assert (ended["good"]["kind"], ended["good"]["broken"]) == ("NoneType", [])


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_model_is_refused_by_name(case: str, ended: dict[str, dict[str, Any]]) -> None:
    end = ended[case]
    assert (end["kind"], end.get("code")) == ("ModelError", 2), end
    assert (
        CASES[case][1] in end["cause"]
        and "\n" not in end["cause"] + end["remedy"]
        and end["remedy"]
    ), end
    assert len(end["cause"]) < 500 and end["cause"].isprintable()
    assert end["broken"] == [], "it unpickles, writes, removes, starts or calls nothing"
    assert end["seconds"] < 5 and end["megabytes"] < 256, end
