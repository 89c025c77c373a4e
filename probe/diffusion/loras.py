"""LoRAs on a loaded model: read as diffusers reads them, switched without loading the model again.

    model = with_loras(model, [Lora(path="ink.safetensors", scale=0.8)])
    model = with_loras(model, [])              # the model's own modules again

Hu et al. 2021 (arXiv:2106.09685): a layer's output gets scale * B(A(x)) added to it. The layers
are peft's, as in diffusers' `load_lora_weights`. The model's own weights stay as they are, so a
scale of 0 adds nothing, and `to_q` and `to_k` put out what they are with the LoRA. Fusing a LoRA
into the weights would round them, and could not be undone.

A file is held against the model before anything is changed: every tensor has its place and shape.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from probe.diffusion.family import Family
from probe.diffusion.tensor_file import TensorFile, read_tensors
from probe.diffusion.text import hushed
from probe.diffusion.weights import ON
from probe.errors import ModelError
from probe.text import first_line, printable, shorten, shown

Model = TypeVar("Model", bound=Family)
OURS = "recipe_"  # the names of our adapters begin with it
OTHER_MODEL = "Use a LoRA that was trained for this model, or the model that it was trained for."
NO_LORA = (
    "Give a LoRA that diffusers' load_lora_weights reads: saved by pipeline.save_lora_weights, or "
    "by kohya's scripts."
)
OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "magnitude": "DoRA"}
SETTINGS = "lora_adapter_metadata"  # diffusers' entry in a file's header: settings, as JSON
USED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
NOT_PLAIN = ("use_dora", "lora_bias", "layer_replication", "modules_to_save", "target_parameters")


class Wanted(Protocol):
    """A LoRA as a recipe asks for it."""

    @property
    def path(self) -> str: ...
    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a model, under diffusers' names: `unet.<layer>.lora_A.weight` and the like.

    `alphas` are by layer. `settings` are what the file's header says of each part of the model.
    """

    file: TensorFile
    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float] | None
    settings: dict[str, dict[str, Any]]

    def of(self, part: str) -> list[str]:
        """Return the names of the tensors of a part of the model."""
        return [key for key in self.tensors if key.startswith(f"{part}.")]


@dataclass(frozen=True)
class On:
    """What is on a module: the digests of the LoRAs, and which of its weights wanted gradients."""

    digests: tuple[str, ...]
    trainable: tuple[nn.Parameter, ...]


def with_loras(model: Model, wanted: Sequence[Wanted]) -> Model:
    """Return the model with these LoRAs on it and no others; its `files` are their digests.

    The modules are shared: the LoRAs are then on the model that was given, too. Those that are on
    it already only get their scales. Raise ModelError for a file that does not fit the model.
    """
    if not wanted:
        remove_loras(model)
        return cast(Model, replace(cast(Any, model), files={}))
    parts = lora_parts(model)
    _refuse_foreign(parts)
    loras = [read_lora(model, each.path) for each in wanted]
    files = {each.path: lora.file.digest for each, lora in zip(wanted, loras, strict=True)}
    if model.device.type != "meta":
        digests = tuple(lora.file.digest for lora in loras)
        names = [f"{OURS}{number}" for number in range(len(loras))]
        if _on(model) != digests:
            remove_loras(model)
            _put_on(model, parts, names, loras, digests)
        _scale(parts, names, [each.scale for each in wanted])
    return cast(Model, replace(cast(Any, model), files=files))


def remove_loras(model: Family) -> None:
    """Give a model back its own modules. LoRAs that are not ours stay."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    for component in lora_parts(model).values():
        on: On | None = vars(component).pop(ON, None)
        if on is not None:
            recurse_remove_peft_layers(component)
            for name in ("peft_config", "_hf_peft_config_loaded"):
                vars(component).pop(name, None)
            for weight in on.trainable:
                weight.requires_grad_(True)


@contextlib.contextmanager
def borrowed(model: Family) -> Iterator[None]:
    """Take our LoRAs off a pipeline in memory when the block ends: it is its owner's."""
    try:
        yield
    finally:
        if model.pipeline is not None:
            remove_loras(model)


def lora_parts(model: Family) -> dict[str, nn.Module]:
    """Return the parts of a model that a LoRA may change, by diffusers' names: not the VAE."""
    return {name: part for name, part in model.components().items() if name != "vae"}


def read_lora(model: Family, path: str) -> Lora:
    """Return the LoRA in a file, with each of its tensors held against its layer.

    Raise ModelError if it is none, or is of another model.
    """
    file = read_tensors("loras", path)
    for key in file.tensors:
        if kind := next((kind for mark, kind in OTHER_KINDS.items() if mark in key), None):
            raise file.refuse(f"it is a {kind}, which is not supported.", "Use a plain LoRA.")
    unet: Any = model.unet
    more = {"unet_config": unet.config} if model.family == "sdxl" else {}
    try:
        with hushed():
            tensors, alphas = _loader(model).lora_state_dict(dict(file.tensors), **more)
    except Exception as problem:  # of a library, about keys that it was not made for
        raise _no_lora(file, problem) from problem
    if alphas and not all(math.isfinite(alpha) for alpha in alphas.values()):
        raise file.refuse("one of its alphas is not finite.")
    parts = lora_parts(model)
    if stray := [key for key in tensors if key.split(".")[0] not in parts]:
        raise file.refuse(
            f"it holds {shown(stray[0])}, which is of no part of this model.", NO_LORA
        )
    if not tensors:
        raise file.refuse("it holds no tensors.", NO_LORA)
    lora = Lora(file, tensors, alphas or None, {} if alphas else _settings(file, tensors))
    for part, component in parts.items():
        if lora.of(part):
            _fit(lora, part, component)
    return lora


def _loader(model: Family) -> Any:
    """Return the class by which diffusers' pipeline of this family loads LoRAs."""
    from diffusers.loaders.lora_pipeline import (
        StableDiffusionLoraLoaderMixin,
        StableDiffusionXLLoraLoaderMixin,
    )

    xl = model.family == "sdxl"
    return StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin


def _no_lora(file: TensorFile, problem: Exception) -> ModelError:
    why = shorten(printable(first_line(problem)))
    return file.refuse(f"it is no LoRA that diffusers reads ({why}).", NO_LORA)


def _fit(lora: Lora, part: str, component: nn.Module) -> None:
    """Raise ModelError unless every tensor of a part has a layer, of its shape."""
    file, layers = lora.file, dict(component.named_modules())
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in _as_peft_names(lora, part, component).items():
        layer, _, side = key.rpartition(".lora_")
        if not layer or side not in ("A.weight", "B.weight"):
            raise file.refuse(f"it holds {_layer_name(part, key)}, which is no LoRA's.", NO_LORA)
        sides.setdefault(layer, {})[side[0]] = tensor
    for layer, pair in sides.items():
        name, module = _layer_name(part, layer), layers.get(layer)
        base = getattr(module, "base_layer", module)
        if not isinstance(base, nn.Linear | nn.Conv2d):
            raise file.refuse(f"it changes {name}, which this model does not have.", OTHER_MODEL)
        if len(pair) < 2 or not pair["A"].ndim or not pair["A"].shape[0]:
            raise file.refuse(f"it has only a part of what changes {name}.")
        rank, weight = pair["A"].shape[0], base.weight
        ones = [1] * (weight.ndim - 2)
        wanted = {"A": (rank, *weight.shape[1:]), "B": (weight.shape[0], rank, *ones)}
        for side, shape in wanted.items():
            if tuple(pair[side].shape) != shape:
                raise file.refuse(
                    f"its lora_{side} of {name} has shape {tuple(pair[side].shape)}, and this "
                    f"model's layer takes {shape}.",
                    OTHER_MODEL,
                )


def _layer_name(part: str, layer: str) -> str:
    """Return a layer's dotted path for a message; the long ones of a UNet fit."""
    return shorten(printable(f"{part}.{layer}"), 160)


def _as_peft_names(lora: Lora, part: str, component: nn.Module) -> dict[str, torch.Tensor]:
    """Return a part's tensors by peft's names, as diffusers' loader translates them."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    tensors = {key.removeprefix(f"{part}."): lora.tensors[key] for key in lora.of(part)}
    try:
        if part == "unet":
            translated = "lora_A" in next(iter(tensors))
            return tensors if translated else dict(convert_unet_state_dict_to_peft(tensors))
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
    except Exception as problem:  # of a library, about keys that it was not made for
        raise _no_lora(lora.file, problem) from problem
    wrapped = "" if hasattr(component, "text_model") else "text_model."
    return {key.removeprefix(wrapped): tensor for key, tensor in tensors.items()}


def _settings(file: TensorFile, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a file's header says of its LoRA, by part: ranks and alphas, nothing else.

    peft takes settings that would import a module by name, or drop values at random.
    """
    raw = file.metadata.get(SETTINGS)
    if not raw:
        return {}
    odd = file.refuse(f"its header's {SETTINGS} is not what diffusers writes.", NO_LORA)
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        raise odd from problem
    if not isinstance(said, dict):
        raise odd
    settings: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        part, _, name = key.partition(".")
        if name in NOT_PLAIN and value:
            raise file.refuse(f"its header asks for {name}, which is not supported.", NO_LORA)
        if name in USED:
            if not _is_setting(name, value):
                raise odd
            settings.setdefault(part, {})[name] = value
    for part, of_part in settings.items():
        names = [key.removeprefix(f"{part}.") for key in tensors if key.startswith(f"{part}.")]
        of_part["target_modules"] = sorted({name.split(".lora")[0] for name in names})
    return settings


def _is_setting(name: str, value: Any) -> bool:
    if name == "use_rslora":
        return isinstance(value, bool)
    if name.endswith("_pattern"):
        return isinstance(value, dict) and all(
            re.fullmatch(r"\^?[\w.]{1,300}", key) and _is_number(each)
            for key, each in value.items()
        )
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _refuse_foreign(parts: Mapping[str, nn.Module]) -> None:
    """Raise ModelError for a pipeline that has adapters of its own already."""
    for part, component in parts.items():
        if any(not name.startswith(OURS) for name in getattr(component, "peft_config", {})):
            raise ModelError(
                f"loras: the pipeline's {part} has LoRAs of its own already.",
                "Call pipeline.unload_lora_weights(), or leave loras out: they are recorded as "
                "a part of its weights.",
            )


def _on(model: Family) -> tuple[str, ...] | None:
    """Return the digests of the LoRAs that are on a model."""
    on: On | None = vars(model.unet).get(ON)
    return None if on is None else on.digests


def _put_on(
    model: Family,
    parts: Mapping[str, nn.Module],
    names: Sequence[str],
    loras: Sequence[Lora],
    digests: tuple[str, ...],
) -> None:
    """Put LoRAs on a model that has none. Raise ModelError, and then it has none either."""
    for component in parts.values():
        trainable = tuple(weight for weight in component.parameters() if weight.requires_grad)
        vars(component)[ON] = On(digests, trainable)
    for name, lora in zip(names, loras, strict=True):
        try:
            with hushed(), _quietly():
                _put(model, parts, name, lora)
        except Exception as problem:  # of a library, about a file that passed our checks
            remove_loras(model)
            raise _no_lora(lora.file, problem) from problem


def _put(model: Family, parts: Mapping[str, nn.Module], name: str, lora: Lora) -> None:
    for part, component in parts.items():
        if not (tensors := lora.of(part)):
            continue
        said = lora.settings.get(part)
        how: dict[str, Any] = {
            "network_alphas": lora.alphas,
            "adapter_name": name,
            "low_cpu_mem_usage": True,
            "metadata": said and {f"{part}.{key}": value for key, value in said.items()},
        }
        if part == "unet":
            _loader(model).load_lora_into_unet(lora.tensors, unet=component, **how)
        else:
            _loader(model).load_lora_into_text_encoder(
                lora.tensors, text_encoder=component, prefix=part, **how
            )
        there = [w for key, w in component.named_parameters() if f".{name}." in key]
        if len(there) != len(tensors) or any(weight.is_meta for weight in there):
            raise ValueError(f"{len(there)} of {len(tensors)} tensors found a place in {part}")


def _scale(parts: Mapping[str, nn.Module], names: list[str], scales: list[float]) -> None:
    """Give each LoRA its scale, as `pipeline.set_adapters` does.

    peft has the model's own weights want no gradients. torch multiplies a batch in another way
    where they do, and the last bits depend on it. So they are as in the pipeline while a LoRA acts,
    and as they were without one while none does.
    """
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    for component in parts.values():
        if getattr(component, "peft_config", None):
            set_weights_and_activate_adapters(component, names, scales)
            for weight in vars(component)[ON].trainable:
                weight.requires_grad_(not any(scales))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' progress bar, and peft's warning that a model has two adapters."""
    from transformers.utils import logging

    shown_before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield
    finally:
        if shown_before:
            logging.enable_progress_bar()
