"""Get a model safely: bundled, from a local directory, a single file, or the Hugging Face hub.

Only safetensors are read, and no code that comes with a model is ever run. A hub model is fetched
once and resolved to the commit it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from probe.diffusion.defaults import plain_defaults
from probe.diffusion.families import FAMILIES, AnyFamily
from probe.diffusion.known_configs import KNOWN, OTHER_NAMES
from probe.diffusion.model_configs import (
    MOST_PARAMETERS,
    class_of,
    diffusers_config,
    text_config,
    words,
)
from probe.diffusion.model_files import TEXT, ModelFolder, Weight, fill, fit
from probe.diffusion.schedulers import (
    FORCED,
    another_scheduler,
    check_settings,
    is_supported,
    own_scheduler,
)
from probe.diffusion.single_file import (
    CONFIGS,
    INDEX,
    SETTINGS,
    clip_tokenizer,
    config_folder,
    is_single_file,
    refuse_larger,
    split,
)
from probe.diffusion.support import (
    KINDS_OF,
    ORDINARY,
    SAME_PARTS,
    XL,
    refuse_other_kinds,
    refuse_unet,
)
from probe.diffusion.tokenizers import read_tokenizer
from probe.errors import DeviceError, ModelError
from probe.settings.bundled import BUNDLED, bundled_folder, models_there
from probe.settings.fields import expand_home, from_home
from probe.system import check_here
from probe.text import did_you_mean, first_line, printable, shorten, shown

WHOLE_MODEL = "Is it a whole diffusers directory?"


def pick_device(name: str) -> torch.device:
    """Return a device by name; `auto` is CUDA where there is one, else the CPU.

    Raise DeviceError for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(
            f"device: {name} is not on this machine ({torch.cuda.device_count()} CUDA devices).",
            "Use device: cpu or device: auto (--device cpu).",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            "device: mps is not on this machine.", "Use device: cpu or device: auto (--device cpu)."
        )
    return device


def on_cuda(name: str) -> bool:
    """Return whether a device is CUDA's by name; `auto` is where there is one."""
    return name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())


@plain_defaults()
def load(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    weights: bool = True,
    scheduler: str = "default",
    options: Mapping[str, Any] | None = None,
) -> AnyFamily:
    """Load a bundled model, a local diffusers directory, a hub id or a single file.

    With `weights=False` the parts are on the meta device. `scheduler` and its `options` are an
    experiment's. If they name another scheduler, the model's own may be one that is not supported.
    Raise ModelError if the model is missing, unsafe, not whole, or of no family.
    """
    check_here()
    what = (
        _single_file(name, variant) if is_single_file(name) else _directory(name, revision, variant)
    )
    target = torch.device("meta") if not weights else pick_device(device)
    if dtype == "auto":
        dtype = "float16" if on_cuda(device) else "float32"
    kind = getattr(torch, dtype)
    family = FAMILIES.get(what.kind, FAMILIES[ORDINARY])
    parts: dict[str, Any] = {
        part: _part(what, part, kind, target) if part in what.configs else None
        for part in KINDS_OF[what.kind]
    }
    model: AnyFamily = family(
        name=from_home(name),
        **what.tokenizers,
        scheduler=None,
        revision=what.commit,
        vocabulary=words(what.folder.json("words.json"), what.folder.refuse)
        if (what.folder.path / "words.json").exists()
        else None,
        **parts,
        **what.settings_of_pipeline,
    )
    forced = {} if what.kind == XL else FORCED
    own = what.index.get("scheduler")
    if scheduler == "default" or is_supported(own):
        return replace(
            model, scheduler=own_scheduler(name, own, what.settings, forced)
        ).with_scheduler(scheduler, options or {})
    check_settings(f"{name}: scheduler/scheduler_config.json", what.settings)
    another = another_scheduler(name, scheduler, what.settings, shown(own), options or {}, forced)
    return replace(model, scheduler=another).checked()


def blueprint(name: str) -> AnyFamily:
    """Return a model on the meta device, from configs alone: no weights, no download.

    It has neither tokenizer nor scheduler. `name` is one of `KNOWN`, a bundled model or a local
    diffusers directory. Raise ModelError.
    """
    check_here()
    if name in KNOWN:
        kind, configs = KNOWN[name]
        folder = ModelFolder(Path(name), name)  # nothing is read from it
        index: Mapping[str, Any] = {"_class_name": kind}
    elif name in BUNDLED or expand_home(name).is_dir():
        folder = ModelFolder(bundled_folder(name) if name in BUNDLED else expand_home(name), name)
        index, configs, _ = _configs(folder)
    else:
        names = (*KNOWN, *models_there())
        raise ModelError(
            f"model: {shown(name)} is no config that is known, and no local diffusers folder.",
            did_you_mean(name, {known: known for known in names} | OTHER_NAMES)
            or f"Write {', '.join(names)}, or the path of a folder.",
        )
    what = _Description(folder, index, configs, {}, {}, None, lambda _: {})
    parts: dict[str, Any] = dict.fromkeys(KINDS_OF[what.kind])
    parts |= {part.replace("text_encoder", "tokenizer"): None for part in configs if part in TEXT}
    parts |= {part: _part(what, part, torch.float32, torch.device("meta")) for part in configs}
    family = FAMILIES.get(what.kind, FAMILIES[ORDINARY])
    return family(name=from_home(name), scheduler=None, **parts)


@dataclass(frozen=True)
class _Description:
    """What a model's files say, before any part is made. `weights` reads a part's headers."""

    folder: ModelFolder
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    commit: str | None
    weights: Callable[[str], Mapping[str, Weight]]

    @property
    def kind(self) -> str:
        """The class of the model's pipeline."""
        return str(self.index["_class_name"])

    @property
    def settings_of_pipeline(self) -> dict[str, bool]:
        """The settings in model_index.json that hold for the whole family."""
        if self.kind != XL:
            return {}
        zeros = self.index.get("force_zeros_for_empty_prompt", True)
        if not isinstance(zeros, bool):
            raise self.folder.refuse(
                f"model_index.json: force_zeros_for_empty_prompt is {shown(zeros)}, not true or "
                "false."
            )
        return {"zeros_for_empty": zeros}


def _directory(name: str, revision: str | None, variant: str | None) -> _Description:
    """Describe a diffusers directory: bundled, local, or of the hub."""
    path, commit = _folder(name, revision, variant)
    folder = ModelFolder(path, name)
    index, configs, settings = _configs(folder)
    return _Description(
        folder,
        index,
        configs,
        settings,
        _tokenizers(folder, index, configs),
        commit,
        lambda part: folder.weights(part, variant),
    )


def _single_file(name: str, variant: str | None) -> _Description:
    """Describe a checkpoint in one file, with configs beside it or those known to us."""
    if variant is not None:
        raise ModelError(f"{name}: a single file has no variants.", "Leave variant out.")
    beside = config_folder(name)
    if beside is not None:
        folder = ModelFolder(beside, name)
        index, configs, settings = _configs(folder)
        tokenizers = _tokenizers(folder, index, configs)
    else:
        folder = ModelFolder(
            expand_home(name).parent / expand_home(name).stem, name
        )  # not there: no words.json
        index, configs, settings = INDEX, CONFIGS, SETTINGS
        refuse_larger(name)
        clip, inside = clip_tokenizer(name)
        tokenizers = {
            "tokenizer": read_tokenizer(
                clip, index, text_config(configs["text_encoder"], folder.refuse), inside
            )
        }
    parts: dict[str, dict[str, Weight]] = {}

    def weights(part: str) -> dict[str, Weight]:
        parts.update(parts or split(name, configs, beside is None))
        return parts[part]

    return _Description(folder, index, configs, settings, tokenizers, None, weights)


def _configs(
    folder: ModelFolder,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    index = folder.json_object("model_index.json")
    kind = str(index.get("_class_name"))
    refuse_other_kinds(kind)
    parts = [part for part in KINDS_OF[kind] if part != "vae" or not _on_pixels(index)]
    configs = {part: folder.json_object(f"{part}/config.json") for part in parts}
    return index, configs, folder.json_object("scheduler/scheduler_config.json")


def _on_pixels(index: Mapping[str, Any]) -> bool:
    """Tell whether model_index.json says that an ordinary model has no VAE: [null, null]."""
    return index["_class_name"] in SAME_PARTS and index.get("vae", "") in (None, [None, None])


def _tokenizers(
    folder: ModelFolder, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the tokenizer of each text encoder, by its name in the folder."""
    tokenizers = {}
    for encoder in [part for part in configs if part in TEXT]:
        part = encoder.replace("text_encoder", "tokenizer")
        tokenizers[part] = read_tokenizer(
            folder, index, text_config(configs[encoder], folder.refuse, encoder), part=part
        )
    return tokenizers


def _part(what: _Description, part: str, kind: torch.dtype, target: torch.device) -> Any:
    """Make one part from its checked config, with its weights if the target is a real device."""
    import diffusers
    import transformers
    from diffusers.models.modeling_utils import no_init_weights

    folder, config = what.folder, what.configs[part]
    name = class_of(part, what.index, config, folder.refuse)
    try:
        with torch.device("meta"), no_init_weights():
            if part in TEXT:
                settings = transformers.CLIPTextConfig(**text_config(config, folder.refuse, part))
                module = getattr(transformers, name)._from_config(
                    settings, attn_implementation="sdpa"
                )
            else:
                module = getattr(diffusers, name)(
                    **diffusers_config(part, config, getattr(diffusers, name), folder.refuse)
                )
    except (ModelError, MemoryError):
        raise
    except Exception as problem:  # of a library, about a config that it is given
        why = shorten(printable(first_line(problem)))
        raise folder.refuse(f"{part}/config.json makes no {name}: {why}", WHOLE_MODEL) from problem
    if (count := sum(weight.numel() for weight in module.parameters())) > MOST_PARAMETERS:
        raise folder.refuse(
            f"{part}/config.json makes {count} weights, and {MOST_PARAMETERS} is the most."
        )
    if part == "unet":
        refuse_unet(folder.name, module, "text_time" if what.kind == XL else None)
    if target.type == "meta":
        return torch.nn.Module.to(module, kind).eval()
    return fill(folder, part, module, fit(folder, part, what.weights(part), module), kind, target)


def _folder(name: str, revision: str | None, variant: str | None) -> tuple[Path, str | None]:
    """Return a model's local directory, and its commit if it came from the hub."""
    if name in BUNDLED:
        return bundled_folder(name), None
    if expand_home(name).is_dir():
        return expand_home(name), None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise ModelError(
            f"model: {name!r} is no directory, no hub id (owner/name) and no bundled model.",
            f"Bundled: {', '.join(BUNDLED)}. Try --model emojiworld.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    suffix = f".{variant}" if variant else ""
    weights = [
        f"{part}/{stem}{suffix}*.safetensors"
        for part in ("unet", "vae")
        for stem in ("diffusion_pytorch_model",)
    ]
    texts = [f"{part}/model{suffix}*.safetensors" for part in TEXT]
    wanted = ["model_index.json", "*/*.json", "tokenizer/*", "tokenizer_2/*", *weights, *texts]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError) as problem:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"model: {name}{at} is not on this machine and could not be fetched "
            f"({type(problem).__name__}).",
            "Check the name and the connection, give a local diffusers directory, or use the "
            "bundled model: --model emojiworld.",
        ) from problem
    return folder, folder.name
