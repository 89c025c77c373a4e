"""Get a model safely: bundled, from a local diffusers directory, or from the Hugging Face hub.

Only safetensors are read, and no code that comes with a model is ever run. A hub model is fetched once and resolved to
the commit it came from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from probe.diffusion.models import FORCED, StableDiffusion, refuse_other_pipelines
from probe.errors import DeviceError, ModelError
from probe.fields import from_home, place

CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
BUNDLED = {"emojiworld": Path(__file__).parent.parent / "emojiworld"}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises DeviceError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(f"device: {name} is not on this machine ({torch.cuda.device_count()} CUDA devices).", "Use --device cpu, or --device auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device: mps is not on this machine.", "Use --device cpu, or --device auto.")
    return device


def load(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    weights: bool = True,
) -> StableDiffusion:
    """Load a bundled model, a local diffusers directory or a hub id. With `weights=False` the parts are on the meta device.

    Raises ModelError when it is missing, unsafe (pickled weights only) or not a Stable Diffusion 1.x or 2.x model.
    """
    import diffusers
    from safetensors import SafetensorError
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder, commit = _folder(name, revision, variant)
    index = _json(folder, "model_index.json", name)
    refuse_other_pipelines(str(index.get("_class_name")))
    unet_config, vae_config, *_ = [_json(folder, file, name) for file in CONFIGS]
    if not (folder / "tokenizer").is_dir():
        raise ModelError(f"{name}: tokenizer/ is missing.", "Is it a diffusers directory (model_index.json, unet/, vae/, ...)?")
    target = torch.device("meta") if not weights else pick_device(device)
    if dtype == "auto":
        on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        dtype = "float16" if on_cuda else "float32"
    kind = getattr(torch, dtype)
    scheduler_name = str((index.get("scheduler") or [None])[-1])
    scheduler_class = getattr(diffusers, scheduler_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ModelError(f"{name}: its scheduler {scheduler_name!r} is not one of diffusers'.", "Name another: --scheduler DDIM.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
        scheduler.register_to_config(**{key: value for key, value in FORCED.items() if key in scheduler.config})
        if weights:
            for part in ("unet", "vae", "text_encoder"):
                _check_weights(folder / part, name, variant)
            safe: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "variant": variant}
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=kind, low_cpu_mem_usage=False, **safe)
            vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=kind, low_cpu_mem_usage=False, **safe)
            text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=kind, **safe)
        else:
            with torch.device("meta"):
                unet = diffusers.UNet2DConditionModel.from_config(unet_config)
                vae = diffusers.AutoencoderKL.from_config(vae_config)
                text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder", local_files_only=True))
        words = folder / "words.json"
        vocabulary = frozenset(json.loads(words.read_text())) if words.exists() else None
    except ModelError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, SafetensorError) as problem:
        raise ModelError(f"{name}: {str(problem).splitlines()[0][:300]}", "Is it a whole diffusers directory?") from problem
    return StableDiffusion(
        name=from_home(name),
        unet=torch.nn.Module.to(unet, target, kind).eval(),
        vae=torch.nn.Module.to(vae, target, kind).eval(),
        text_encoder=torch.nn.Module.to(text_encoder, target, kind).eval(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        revision=commit,
        vocabulary=vocabulary,
    ).checked()


def _folder(name: str, revision: str | None, variant: str | None) -> tuple[Path, str | None]:
    """The local directory of a model, and the commit it was resolved to when it came from the hub."""
    if name in BUNDLED:
        return BUNDLED[name], None
    if place(name).is_dir():
        return place(name), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise ModelError(
            f"model: {name!r} is no directory, no hub id (owner/name) and no bundled model.",
            f"Bundled: {', '.join(BUNDLED)}. Try --model emojiworld.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    suffix = f".{variant}" if variant else ""
    weights = [f"{part}/{stem}{suffix}*.safetensors" for part in ("unet", "vae") for stem in ("diffusion_pytorch_model",)]
    wanted = ["model_index.json", "*/*.json", "tokenizer/*", *weights, f"text_encoder/model{suffix}*.safetensors"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as problem:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model: {name}{at} is not on this machine and could not be fetched ({type(problem).__name__}).",
            "Check the name and the connection, give a local diffusers directory, or use the bundled model: --model emojiworld.",
        ) from problem
    return folder, folder.name


def _check_weights(folder: Path, name: str, variant: str | None) -> None:
    safe = [file.name for file in folder.glob("*.safetensors")]
    variants = sorted({file.split(".")[1].split("-")[0] for file in safe if file.count(".") > 1})
    plain = [file for file in safe if not (file.count(".") > 1)]
    if plain if variant is None else variant in variants:
        return
    if safe:
        wanted = "weights without a variant" if variant is None else f"weights of variant {variant!r}"
        choices = [f"set variant: {there}" for there in variants] + ["leave variant out"] * bool(plain)
        remedy = ", or ".join(choices)
        raise ModelError(
            f"{name}: {folder.name} has no {wanted} (variants there: {', '.join(variants) or 'none'}).", f"{remedy[0].upper()}{remedy[1:]}."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.ckpt")):
        raise ModelError(
            f"{name}: {folder.name} has only pickled weights, which can run code when they are read.",
            "Convert them once where you trust them: DiffusionPipeline.from_pretrained(...).save_pretrained(folder, safe_serialization=True).",
        )
    raise ModelError(f"{name}: {folder.name} has no weights.", "Fetch the model whole, or use the bundled one: --model emojiworld.")


def _json(folder: Path, file: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / file).read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found
    except FileNotFoundError as problem:
        raise ModelError(f"{name}: {file} is missing.", "Is it a diffusers directory (model_index.json, unet/, vae/, ...)?") from problem
    except ValueError as problem:
        raise ModelError(f"{name}: {file} is not a valid JSON object.", "Fetch the model again.") from problem
