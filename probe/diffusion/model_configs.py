"""The configs of a model, checked before a library sees them: which classes, which types, how
large.

A config says numbers only. What decides which code runs (classes, attention, code from elsewhere)
is chosen by us. Sizes are bounded before anything of such a size is made: a schedule of betas, or a
model's skeleton with a million layers.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from probe.errors import UserError
from probe.text import shown

Refuse = Callable[[str], UserError]

# The most that a size may be: many times what the largest Stable Diffusion has.
MOST_SIZE, MOST_ITEMS, MOST_TEXT, MOST_LAYERS = 65_536, 64, 1000, 500
MOST_VOCABULARY, MOST_PARAMETERS = 1_000_000, 4_000_000_000
# Stable Diffusion was trained with 1000 timesteps. KDPM2 takes a time that grows with their square:
# 1 s for 2000.
MOST_TIMESTEPS, MOST_NUMBER = 2000, 10**6
SCHEDULER_SIZES = {
    "num_train_timesteps": (2, MOST_TIMESTEPS),
    "original_inference_steps": (1, MOST_TIMESTEPS),
    "steps_offset": (-MOST_TIMESTEPS, MOST_TIMESTEPS),
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order"), (1, 10)),
}
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Code of their own, which is never run; and what diffusers writes itself for other classes, in an
# AutoencoderTiny's config.
NEVER_READ = ("auto_map", "custom_pipelines")
WRITTEN_FOR_OTHERS = {"AutoencoderTiny": ("block_out_channels",)}
TEXT_SIZES = {
    "vocab_size": MOST_VOCABULARY,
    "hidden_size": MOST_SIZE,
    "intermediate_size": MOST_SIZE,
    "projection_dim": MOST_SIZE,
    "num_hidden_layers": MOST_LAYERS,
    "num_attention_heads": 1024,
    "max_position_embeddings": 8192,
}
TEXT_OTHERS: dict[str, tuple[type, ...]] = {
    "hidden_act": (str,),
    "layer_norm_eps": (int, float),
    "attention_dropout": (int, float),
    "initializer_range": (int, float),
    "initializer_factor": (int, float),
    "pad_token_id": (int,),
    "bos_token_id": (int,),
    "eos_token_id": (int,),
    "use_attention_mask": (bool,),
}
# Zero is allowed of these alone.
FREE = (
    "freq_shift",
    "downsample_padding",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "latent_shift",
)
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")


def class_of(part: str, index: Mapping[str, Any], config: Mapping[str, Any], refuse: Refuse) -> str:
    """Return the class of a part, as model_index.json and its config name it.

    Raises ModelError for a class that is not supported.
    """
    entry = index.get(part, [None, config.get("_class_name", CLASSES[part][0])])
    named = entry[-1] if isinstance(entry, list) and len(entry) == 2 else entry
    if entry is None or named is None:
        raise refuse(f"it has no {part} (model_index.json).")
    own = config.get("_class_name", named)
    for kind in (named, own):
        if kind not in CLASSES[part]:
            raise refuse(f"its {part} is {shown(kind)}, which is not supported.")
    if named != own:
        raise refuse(f"its {part} is {named} in model_index.json and {own} in {part}/config.json.")
    return str(named)


def diffusers_config(
    part: str, config: Mapping[str, Any], kind: type[Any], refuse: Refuse
) -> dict[str, Any]:
    """Return what a UNet or VAE is made from: the arguments of its class, each of its type and of
    sane size.
    """
    if config.get("quantization_config"):
        raise refuse(f"{part}/config.json: quantized weights are not supported.")
    known = inspect.signature(kind.__init__).parameters
    found: dict[str, Any] = {}
    for key, value in config.items():
        if (
            key.startswith("_")
            or key in NEVER_READ
            or (key not in known and value in (None, False))
        ):
            continue
        if key in WRITTEN_FOR_OTHERS.get(kind.__name__, ()):
            continue
        if key not in known or key in ("self", "kwargs"):
            raise refuse(
                f"{part}/config.json has {shown(key)}, which {kind.__name__} does not know."
            )
        where = f"{part}/config.json: {key}"
        _check_type(where, value, known[key], refuse)
        for number in _numbers(value):
            if number < 0 and key not in FREE:
                raise refuse(f"{where} is {shown(value)}, which is less than zero.")
            if number == 0 and key == "scaling_factor":
                raise refuse(f"{where} is zero, and latents are divided by it.")
            if (
                number == 0
                and isinstance(known[key].default, (int, tuple))
                and key not in FREE
                and not isinstance(value, bool)
            ):
                raise refuse(f"{where} is {shown(value)}, and zero is no size.")
        found[key] = value
    layers = _layers(found)
    if layers > MOST_LAYERS:
        raise refuse(f"{part}/config.json makes {layers} layers, and {MOST_LAYERS} is the most.")
    return found


def text_config(
    config: Mapping[str, Any], refuse: Refuse, part: str = "text_encoder"
) -> dict[str, Any]:
    """Return what a CLIP text encoder is made from, each of its type and of sane size; attention is
    our choice.
    """
    where = f"{part}/config.json"
    if config.get("quantization_config"):
        raise refuse(f"{where}: quantized weights are not supported.")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if config.get(key) not in ATTENTION:
            raise refuse(
                f"{where}: {key} is {shown(config[key])}, and no code from elsewhere is run."
            )
    if (kind := config.get("model_type", "clip_text_model")) != "clip_text_model":
        raise refuse(f"its {part} is of type {shown(kind)}, which is not supported.")
    found: dict[str, Any] = {}
    for key, most in TEXT_SIZES.items():
        if (value := config.get(key)) is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise refuse(f"{where}: {key} is {shown(value)}, not a whole number from 1 to {most}.")
        found[key] = value
    for key, kinds in TEXT_OTHERS.items():
        if (value := config.get(key)) is None:
            continue
        if type(value) not in kinds or any(
            abs(number) > MOST_VOCABULARY or number != number for number in _numbers(value)
        ):
            raise refuse(f"{where}: {key} is {shown(value)}, which it cannot be.")
        found[key] = value
    return found


def scheduler_config(where: str, config: Mapping[str, Any], refuse: Refuse) -> None:
    """Check a scheduler's settings, or options for one: no number with which it would run or
    allocate without end.
    """
    scheduler_sizes(where, config, refuse)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        most = MOST_TIMESTEPS if key == "trained_betas" else MOST_SIZE
        flat = value if isinstance(value, list | tuple) else [value]
        if len(flat) > most or not all(
            item is None or isinstance(item, bool | int | float | str) for item in flat
        ):
            raise refuse(f"{where}: {key} is {shown(value)}, which no scheduler takes.")
        for number in _numbers(list(flat)):
            if isinstance(number, int) and abs(number) > MOST_NUMBER:
                raise refuse(f"{where}: {key} is {shown(number)}, which is too large.")
            if math.isnan(number):
                raise refuse(f"{where}: {key} is not a number.")
        if any(isinstance(item, str) and len(item) > MOST_TEXT for item in flat):
            raise refuse(f"{where}: {key} is too long.")
    betas(where, config, config.get("num_train_timesteps"), refuse)


def scheduler_sizes(where: str, config: Mapping[str, Any], refuse: Refuse) -> None:
    """Check the settings that say how long a scheduler's tables are, and how long it takes to make
    them.
    """
    for key, (least, most) in SCHEDULER_SIZES.items():
        value = config.get(key, least)
        if not (type(value) is int and least <= value <= most):
            raise refuse(
                f"{where}: {key} is {shown(value)}, not a whole number from {least} to {most}."
            )


def betas(where: str, config: Mapping[str, Any], timesteps: Any, refuse: Refuse) -> None:
    """Check the betas of a scheduler's settings: each from 0 to 1, and of `trained_betas` one for
    each timestep, if their number is known.
    """
    for key in ("beta_start", "beta_end"):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
            raise refuse(f"{where}: {key} is {shown(value)}, not between 0 and 1.")
    trained = config.get("trained_betas")
    if not isinstance(trained, list | tuple):
        return
    if (
        wrong := next(
            (beta for beta in trained if type(beta) not in (int, float) or not 0 <= beta <= 1), None
        )
    ) is not None:
        raise refuse(f"{where}: trained_betas holds {shown(wrong)}, not a number from 0 to 1.")
    if type(timesteps) is int and len(trained) != timesteps:
        raise refuse(
            f"{where}: trained_betas has {len(trained)} values, and num_train_timesteps is "
            f"{timesteps}."
        )


def words(value: Any, refuse: Refuse) -> frozenset[str]:
    """Return the words of words.json."""
    if (
        not isinstance(value, list)
        or len(value) > 100_000
        or not all(isinstance(w, str) and re.fullmatch(r"\w{1,100}", w) for w in value)
    ):
        raise refuse("words.json is not a list of words.")
    return frozenset(value)


def _check_type(where: str, value: Any, parameter: inspect.Parameter, refuse: Refuse) -> None:
    """Check a value against the argument that will take it: a number where it takes numbers, lists
    of sane length.
    """
    text, default = str(parameter.annotation), parameter.default
    kinds = {
        kind for kind in ("bool", "int", "float", "str", "tuple") if re.search(rf"\b{kind}\b", text)
    }
    kinds |= {"int"} if "float" in kinds else set()
    if value is None:
        if default is not None and "None" not in text and not isinstance(default, bool):
            raise refuse(f"{where} is null, which it cannot be.")
        return
    kind = {
        bool: "bool",
        int: "int",
        float: "float",
        str: "str",
        list: "tuple",
        tuple: "tuple",
    }.get(type(value), "")
    if kind not in kinds and not (kind == "tuple" and "sample_size" in where):
        raise refuse(f"{where} is {shown(value)}, which it cannot be.")
    if isinstance(value, list | tuple):
        items = [
            item
            for inner in value
            for item in (inner if isinstance(inner, list | tuple) else [inner])
        ]
        if not 1 <= len(value) <= MOST_ITEMS or len(items) > MOST_ITEMS:
            raise refuse(f"{where} is {shown(value)}: a list of 1 to {MOST_ITEMS} belongs there.")
        wanted = (
            {type(item) for item in default}
            if isinstance(default, tuple)
            else {bool, int, float, str}
        )
        if any(
            type(item) not in wanted | ({int} if float in wanted else set()) and item is not None
            for item in items
        ):
            raise refuse(f"{where} is {shown(value)}, which it cannot be.")
    elif isinstance(value, str) and len(value) > MOST_TEXT:
        raise refuse(f"{where} is too long.")
    for number in _numbers(value):
        if not math.isfinite(number) or abs(number) > MOST_SIZE:
            raise refuse(f"{where} is {shown(value)}, which is too large.")


def _numbers(value: Any) -> Iterable[int | float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _layers(config: Mapping[str, Any]) -> int:
    """Return about how many layers a config makes: blocks, times layers in each, times transformers
    in each of these.
    """
    blocks = [
        len(value)
        for key, value in config.items()
        if "block" in key and isinstance(value, list | tuple)
    ]
    per = [
        max((int(number) for number in _numbers(config.get(key, 1))), default=1)
        for key in ("layers_per_block", "transformer_layers_per_block")
    ]
    tiny = sum(
        int(number)
        for key in ("num_encoder_blocks", "num_decoder_blocks")
        for number in _numbers(config.get(key, 0))
    )
    return max(blocks, default=4) * (per[0] + 1) * per[1] + tiny
