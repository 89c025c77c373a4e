"""Refuse models that are not supported, each by name and with a remedy.

It is done before a recording is begun: for a part that is missing or of another class, number
formats or devices that do not fit together, a UNet that needs more than a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from probe.errors import ModelError
from probe.text import printable, shorten, shown

SUPPORTED = "Stable Diffusion 1.x, 2.x and XL text-to-image models are."
LATER = {
    "XL": "SDXL",
    "3Pipeline": "SD 3",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "ControlNet": "ControlNet",
    "Adapter": "T2I-Adapter",
    "GLIGEN": "GLIGEN",
    "AnimateDiff": "AnimateDiff",
    "Inpaint": "inpainting",
}
ORDINARY = "StableDiffusionPipeline"
# Pipelines of the same parts as the ordinary one: a folder of one is a model like any other.
SAME_PARTS = (ORDINARY, "StableDiffusionImg2ImgPipeline")
XL = "StableDiffusionXLPipeline"
KINDS: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
}
XL_KINDS = {**KINDS, "vae": ("AutoencoderKL",), "text_encoder_2": ("CLIPTextModelWithProjection",)}
# The modules of a folder, and their classes, by the class of the pipeline that it names.
KINDS_OF = {**dict.fromkeys(SAME_PARTS, KINDS), XL: XL_KINDS}
Kinds = Mapping[str, tuple[str, ...]]
COLOURS = 3  # the channels of a UNet that works on pixels
PIPELINE = "Load the pipeline whole: StableDiffusionPipeline.from_pretrained(...)."
NEWEST_TESTED = "0.42.1"  # of diffusers: the one in constraints.txt


def remarks_on_version() -> tuple[str, ...]:
    """Return what a recording says of a diffusers newer than any that was tested."""
    import diffusers

    version = diffusers.__version__
    if _release(version) <= _release(NEWEST_TESTED):
        return ()
    return (
        f"diffusers {version} is newer than the newest that probe was tested with "
        f"({NEWEST_TESTED}). "
        f"Check the recording with probe verify --model, or install diffusers {NEWEST_TESTED}.",
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def refuse_other_pipelines(pipeline: Any, wanted: str = ORDINARY) -> None:
    """Raise ModelError for a pipeline in memory that is not of the `wanted` class."""
    kind = type(pipeline).__name__
    if kind == wanted:
        return
    if kind == "StableDiffusionImg2ImgPipeline":
        cause = f"A {kind} is recorded as an ordinary pipeline that is given a picture."
        raise ModelError(
            cause,
            f"Pass {ORDINARY}.from_pipe(pipeline), and name the picture in the experiment: image: "
            "FILE.",
        )
    if not hasattr(pipeline, "unet") and not hasattr(pipeline, "components"):
        raise ModelError(f"pipeline: {kind} is not a pipeline of diffusers.", PIPELINE)
    if kind in KINDS_OF:
        raise ModelError(
            f"A {kind} is no {wanted}.",
            "Use probe.diffusion.families.family_of(pipeline): it knows both.",
        )
    refuse_other_kinds(kind)


def refuse_other_kinds(kind: str) -> None:
    """Raise ModelError for the name of a pipeline's class if its parts are of no family."""
    if kind in KINDS_OF:
        return
    kind = shorten(printable(kind))
    named = next((label for part, label in LATER.items() if part in kind), kind)
    raise ModelError(f"{named} ({kind}) is not supported yet.", SUPPORTED)


def refuse_unsupported(name: str, parts: Mapping[str, Any], *, kinds: Kinds = KINDS) -> None:
    """Raise ModelError for parts that are missing, of another kind, or do not fit together.

    `kinds` are the classes of each module of the family. Only a model of pixels has no VAE.
    """
    for part, value in parts.items():
        if value is None and not (part == "vae" and kinds is KINDS and _colours(parts["unet"])):
            raise ModelError(f"{name}: the pipeline has no {part}.", PIPELINE)
    modules = {part: parts[part] for part in kinds if parts[part] is not None}
    encoders = [part for part in modules if part.startswith("text_encoder")]
    _refuse_kinds(name, modules, kinds)
    refuse_unet(name, parts["unet"], "text_time" if kinds is XL_KINDS else None)
    _refuse_widths(name, modules, [modules[part] for part in encoders])
    for part in encoders:
        _refuse_tokenizer(name, part.replace("text_encoder", "tokenizer"), parts, modules[part])
    lengths = [
        parts[part.replace("text_encoder", "tokenizer")].model_max_length for part in encoders
    ]
    if len(set(lengths)) > 1:
        cause = f"{name}: its tokenizers make prompts of {' and '.join(map(str, lengths))} tokens."
        raise ModelError(cause, "Set their model_max_length to one number.")
    _refuse_mixtures(name, modules)
    for part, module in modules.items():
        if module.training and _drops(module):
            raise ModelError(
                f"{name}: {part} is in training mode and drops values at random.",
                f"Call pipeline.{part}.eval().",
            )


def _colours(unet: Any) -> bool:
    """Tell whether a UNet takes red, green and blue, so that it may work on pixels."""
    return unet is not None and int(unet.config.in_channels) == COLOURS


def _refuse_kinds(name: str, modules: Mapping[str, Any], kinds: Kinds) -> None:
    import diffusers
    import transformers

    for part, module in modules.items():
        module = getattr(
            module, "_orig_mod", module
        )  # a compiled one is refused by name where hooks are looked for
        named = kinds[part]
        library = transformers if part.startswith("text_encoder") else diffusers
        if not isinstance(module, tuple(getattr(library, kind) for kind in named)):
            raise ModelError(
                f"{name}: its {part} is a {type(module).__name__}, which is not supported.",
                f"A {' or '.join(named)} is.",
            )


def refuse_unet(name: str, unet: Any, added: str | None = None) -> None:
    """Raise ModelError for a UNet that wants more than a prompt and the conditions `added`.

    The UNet may be without weights.
    """
    config = unet.config
    problem, remedy = "", SUPPORTED
    if config.get("time_cond_proj_dim") is not None:
        problem = "a UNet that takes the guidance scale as an input (a distilled LCM)"
    elif config.get("addition_embed_type") != added:
        problem = (
            "a UNet with added conditions (SDXL)"
            if added is None
            else "a UNet without SDXL's added conditions"
        )
    elif int(config.in_channels) != int(config.out_channels):
        problem = "a UNet with extra input channels (inpainting or depth)"
    elif getattr(unet, "class_embedding", None) is not None:
        problem = "a UNet with class embeddings"
    elif getattr(unet, "encoder_hid_proj", None) is not None:
        problem = "a UNet whose text goes through another projection (an IP-Adapter, or Kandinsky)"
        remedy = "Call pipeline.unload_ip_adapter() if an IP-Adapter is loaded."
    elif config.get("attention_type", "default") != "default":
        problem = "a UNet with gated attention (GLIGEN)"
    elif not _is_size(config.get("sample_size")):
        problem = (
            "a UNet whose config gives no size of its latents (sample_size: "
            f"{shown(config.get('sample_size'))})"
        )
    if problem:
        raise ModelError(f"{name}: {problem} is not supported yet.", remedy)


def _refuse_widths(name: str, modules: Mapping[str, Any], encoders: Sequence[Any]) -> None:
    unet, vae = (modules[part].config if part in modules else None for part in ("unet", "vae"))
    assert unet is not None
    wanted, width = (
        unet.cross_attention_dim,
        sum(encoder.config.hidden_size for encoder in encoders),
    )
    makes = "its text encoder makes" if len(encoders) == 1 else "its text encoders make"
    if not isinstance(wanted, int) or wanted != width:
        cause = f"{name}: its UNet reads text of width {shown(wanted)}, and {makes} {width}."
        raise ModelError(cause, "Bring the two that belong together.")
    if unet.get("addition_embed_type") == "text_time":
        numbers = 6 * unet.addition_time_embed_dim + encoders[-1].config.projection_dim
        takes = unet.projection_class_embeddings_input_dim
        if numbers != takes:
            cause = (
                f"{name}: its UNet takes {shown(takes)} numbers of sizes and pooled text, and its "
                f"text encoders make {numbers}."
            )
            raise ModelError(cause, "Bring the two that belong together.")
    if vae is not None and int(vae.latent_channels) != int(unet.in_channels):
        cause = (
            f"{name}: its VAE has latents of {vae.latent_channels} channels, and its UNet "
            f"{unet.in_channels}."
        )
        raise ModelError(cause, "Bring the two that belong together.")
    if vae is not None and len(vae.block_out_channels) == 1:
        # f = 1 is how a recording says that its latents are pixels
        raise ModelError(
            f"{name}: its VAE has one block, so it compresses nothing (f = 1).",
            "Use a VAE of two blocks or more, or a model without one.",
        )


def xl_without_pictures(model: Any) -> ModelError:
    """Return what to raise where Stable Diffusion XL is to begin from a picture."""
    return ModelError(
        f"{model.name}: a Stable Diffusion XL model does not begin from a picture here yet.",
        "Leave the picture out, or use a Stable Diffusion 1.x or 2.x model.",
    )


def refuse_pictures(model: Any) -> None:
    """Raise ModelError for a model that cannot begin from a picture."""
    if model.family == "sdxl":
        raise xl_without_pictures(model)
    if type(model.vae).__name__ == "AutoencoderTiny":
        raise ModelError(
            f"{model.name}: its VAE is an AutoencoderTiny, which makes no distribution of a "
            "picture's latents.",
            "Use the model's AutoencoderKL, or leave the picture out.",
        )


def _is_size(size: Any) -> bool:
    sides = [size] if isinstance(size, int) else size
    return (
        isinstance(sides, list | tuple)
        and len(sides) in (1, 2)
        and all(isinstance(side, int) and side > 0 for side in sides)
    )


def _refuse_tokenizer(name: str, part: str, parts: Mapping[str, Any], text_encoder: Any) -> None:
    from transformers import CLIPTokenizer

    tokenizer = parts[part]
    if not isinstance(tokenizer, CLIPTokenizer) or not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{name}: its {part} is a {type(tokenizer).__name__}, which is not supported.",
            "A CLIPTokenizer is.",
        )
    most, length = int(text_encoder.config.max_position_embeddings), tokenizer.model_max_length
    if (
        length > 10**9
    ):  # transformers' way to say that it does not know; the pipeline itself fails then
        raise ModelError(
            f"{name}: its {part} does not say how many tokens a prompt has (model_max_length).",
            f"Set pipeline.{part}.model_max_length = {most}.",
        )
    if not 3 <= length <= most:
        raise ModelError(
            f"{name}: its {part} makes prompts of {length} tokens, and its text encoder takes 3 "
            f"to {most}.",
            f"Set pipeline.{part}.model_max_length = {most}.",
        )
    if tokenizer.padding_side != "right" or tokenizer.truncation_side != "right":
        raise ModelError(
            f"{name}: its {part} pads or cuts prompts on the left, which is not supported.",
            'Set its padding_side = "right".',
        )
    known = int(text_encoder.config.vocab_size)
    special = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_id,
        "pad_token": tokenizer.pad_token_id,
    }
    for token, number in special.items():
        if number is None or not 0 <= number < known:
            raise ModelError(
                f"{name}: its {part}'s {token} is number {number}, and its text encoder knows "
                f"{known}.",
                "Bring the two that belong together.",
            )


def _refuse_mixtures(name: str, modules: Mapping[str, Any]) -> None:
    """Raise ModelError if number formats or devices differ: torch would stop during a run."""
    if any(
        {"_hf_hook", "_diffusers_hook"} & vars(owner).keys()
        for module in modules.values()
        for owner in module.modules()
    ):
        # weights that are moved or cast for each call: refused by name where hooks are looked for
        return
    formats: dict[str, list[str]] = {}
    for part, module in modules.items():
        dtypes = {
            weight.dtype
            for key, weight in module.named_parameters()
            if "lora" not in key and weight.dtype.is_floating_point
        }
        quantized = [
            key for key, weight in module.named_parameters() if not weight.dtype.is_floating_point
        ]
        if quantized:
            raise ModelError(
                f"{name}: {part} is quantized ({quantized[0]}), which is not supported.",
                "Load it without a quantization_config.",
            )
        formats[part] = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    kinds = sorted({kind for each in formats.values() for kind in each})
    if len(kinds) > 1:
        parts = ", ".join(f"{part} {' and '.join(each)}" for part, each in formats.items())
        raise ModelError(
            f"{name}: its parts are of different number formats: {parts}.",
            f"Call pipeline.to(dtype=torch.{kinds[-1]}).",
        )
    devices = {part: next(module.parameters()).device for part, module in modules.items()}
    if len(set(devices.values())) > 1:
        parts = ", ".join(f"{part} on {device}" for part, device in devices.items())
        raise ModelError(
            f"{name}: its parts are on different devices: {parts}.",
            f'Call pipeline.to("{devices["unet"]}").',
        )


def _drops(module: torch.nn.Module) -> bool:
    if any(
        isinstance(owner, torch.nn.modules.dropout._DropoutNd) and owner.training and owner.p > 0
        for owner in module.modules()
    ):
        return True
    return bool(getattr(getattr(module, "config", None), "attention_dropout", 0))
