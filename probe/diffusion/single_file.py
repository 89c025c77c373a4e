"""Read Stable Diffusion from one file in the original layout, such as `v1-5.safetensors`.

Its configs come from the folder of the same name beside it: `v1-5/`, a diffusers directory without
weights. Without that folder they are those of Stable Diffusion 1.x, with CLIP's tokenizer from the
hub's cache or the hub. Nothing is unpickled. diffusers' own table translates the names of the
tensors, and their shapes are compared with the model's, as a folder's are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.diffusion.model_files import ModelFolder, Weight, header
from probe.errors import ModelError
from probe.settings.fields import expand_home
from probe.text import shown

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
MOST_TENSORS, MOST_BLOCKS = 10_000, 64
WIDTH = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
INPUT = "model.diffusion_model.input_blocks.0.0.weight"
OURS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
# Of Stable Diffusion XL: its second text encoder is OpenCLIP's, named and laid out in its own way.
SECOND, XL_ONLY = (
    "conditioner.embedders.1.model.",
    "conditioner.embedders.1.model.positional_embedding",
)
# Of the training: losses, moving averages.
NOT_OURS = re.compile(
    r"first_stage_model\.(loss|model_ema)\..*|(cond_stage_model|conditioner)\.(.*\.)?(position_ids|logit_scale)"
)
INDEX = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
CLIP = (
    ("openai/clip-vit-large-patch14", "."),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def is_single_file(name: str) -> bool:
    """Return whether a model's name is that of one file with weights.

    Raise ModelError if they are pickled.
    """
    path = expand_home(name)
    try:
        there, folder = path.exists(), path.is_dir()
    except (
        OSError,
        ValueError,
    ) as problem:  # a name that is too long, a folder that may not be read
        raise ModelError(
            f"model: {shown(name)} cannot be looked up ({why_not(problem)}).",
            "Check the path and its permissions.",
        ) from problem
    if not there and path.suffix in (".safetensors", ".ckpt"):
        raise ModelError(
            f"model: {shown(name)}: there is no such file.",
            "Check the path, or name another model: --model emojiworld.",
        )
    if path.suffix in PICKLED and there and not folder:
        raise ModelError(
            f"{name}: this checkpoint is pickled, and can run code when it is read.",
            "Convert it once where you trust it: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER).",
        )
    return path.suffix == ".safetensors" and there and not folder


def why_not(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or "no path looks like this"


def config_folder(name: str) -> Path | None:
    """Return the folder beside a single file with its name and its configs, if there is one."""
    beside = expand_home(name).with_suffix("")
    return beside if beside.is_dir() else None


def refuse_larger(name: str) -> None:
    """Raise ModelError for Stable Diffusion XL without configs: nobody knows its sizes then."""
    path = expand_home(name)
    folder = ModelFolder(path.parent, name)
    if XL_ONLY in header(folder, path.name):
        remedy = (
            "Put its configs and tokenizers (a diffusers directory, without weights) into "
            f"{path.with_suffix('')}."
        )
        raise folder.refuse(
            "this file is of Stable Diffusion XL, and the configs of its parts are not beside it.",
            remedy,
        )


def split(
    name: str, configs: Mapping[str, Mapping[str, Any]], known: bool
) -> dict[str, dict[str, Weight]]:
    """Return the tensors of each part of a single file, by the names that diffusers has for them.

    `known` says that the configs are ours, for Stable Diffusion 1.x. Raise ModelError for other
    kinds of checkpoints.
    """
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )

    path = expand_home(name)
    folder = ModelFolder(path.parent, name)
    weights = header(folder, path.name)
    blocks = {
        key.split(".")[3]
        for key in weights
        if key.count(".") > 3 and key.startswith("model.diffusion_model.")
    }
    if len(weights) > MOST_TENSORS or len(blocks) > MOST_BLOCKS or INPUT not in weights:
        raise folder.refuse(
            "this file is not laid out as Stable Diffusion's original checkpoints.", other_way(path)
        )
    width = weights[WIDTH].shape[-1:] if WIDTH in weights else ()
    channels = weights[INPUT].shape[1:2]
    if known and (width, channels) != ((768,), (4,)):
        raise folder.refuse(
            "this file is not Stable Diffusion 1.x (text of width "
            f"{shown(width[0] if width else None)}).",
            other_way(path),
        )
    unet_config = {"layers_per_block": 2, **configs["unet"]}
    try:
        parts = {
            "unet": convert_ldm_unet_checkpoint(weights, unet_config),
            "vae": convert_ldm_vae_checkpoint(weights, configs["vae"]),
            "text_encoder": convert_ldm_clip_checkpoint(weights),
        }
        if "text_encoder_2" in configs:
            parts["text_encoder_2"] = convert_open_clip_checkpoint(None, weights, SECOND)
    except Exception as problem:  # of a library, about keys that it was not made for
        raise folder.refuse(
            "this file is not laid out as Stable Diffusion's original checkpoints.", other_way(path)
        ) from problem
    used = {weight.key for part in parts.values() for weight in part.values()}
    if over := [
        key
        for key in weights
        if key.startswith(OURS) and key not in used and not NOT_OURS.fullmatch(key)
    ]:
        raise folder.refuse(
            f"it holds {shown(over[0])}, which has no place in the model.", other_way(path)
        )
    return parts


def clip_tokenizer(name: str) -> tuple[ModelFolder, str]:
    """Return the folder of CLIP's tokenizer, and where in it.

    Raise ModelError if it is neither here nor on the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for here, (repository, inside) in [*((True, each) for each in CLIP), (False, CLIP[0])]:
        wanted = [file if inside == "." else f"{inside}/{file}" for file in TOKENIZER_FILES]
        try:
            folder = Path(
                snapshot_download(repository, allow_patterns=wanted, local_files_only=here)
            )
        except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError):
            continue
        if (folder / inside / "vocab.json").exists() or (
            folder / inside / "tokenizer.json"
        ).exists():
            return ModelFolder(folder, name), inside
    beside = expand_home(name).with_suffix("")
    raise ModelError(
        f"{name}: CLIP's tokenizer is not on this machine and could not be fetched.",
        "Put the model's configs and tokenizer (a diffusers directory, without weights) into "
        f"{beside}, or connect once.",
    )


def other_way(path: Path) -> str:
    return (
        f"In Python: pass StableDiffusionPipeline.from_single_file({path.name!r}) to "
        "probe.record(...) as pipeline."
    )
