"""The configs of a model, checked before a library sees them: classes, types and sizes.

A config gives numbers only. What decides which code runs (classes, attention, code from elsewhere)
is our own choice. Sizes are bounded before anything of such a size is made, such as a schedule of
betas or a model's skeleton with a million layers.
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
# Stable Diffusion was trained with 1000 timesteps. KDPM2's time grows with their square: 1 s for
# 2000.
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
NEVER_READ = ("auto_map", "custom_pipelines")  # code of the model's own, which is never run
# What diffusers itself writes into a class's config for other classes.
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
# Only these may be zero or less.
FREE = (
    *("freq_shift", "downsample_padding"),
    *("shift_factor", "latents_mean", "latents_std", "latent_shift"),
)
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")


def class_of(part: str, index: Mapping[str, Any], config: Mapping[str, Any], refuse: Refuse) -> str:
    """Return the class of a part, as model_index.json and its config name it.

    Raise ModelError for a class that is not supported.
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
    """Return the arguments that a UNet or VAE is made from, each of its type and of sane size.

    Raise ModelError for any other.
    """
    if config.get("quantization_config"):
        raise refuse(f"{part}/config.json: quantized weights are not supported.")
    known = inspect.signature(kind.__init__).parameters
    ignored = (*NEVER_READ, *WRITTEN_FOR_OTHERS.get(kind.__name__, ()))
    arguments: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key in ignored or (key not in known and value in (None, False)):
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
            is_size = isinstance(known[key].default, (int, tuple)) and key not in FREE
            if number == 0 and is_size and not isinstance(value, bool):
                raise refuse(f"{where} is {shown(value)}, and zero is no size.")
        arguments[key] = value
    layers = _layers(arguments)
    if layers > MOST_LAYERS:
        raise refuse(f"{part}/config.json makes {layers} layers, and {MOST_LAYERS} is the most.")
    return arguments


def text_config(
    config: Mapping[str, Any], refuse: Refuse, part: str = "text_encoder"
) -> dict[str, Any]:
    """Return the config that a CLIP text encoder is made from: types and sizes are checked.

    Attention is our choice. Raise ModelError for any other value.
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
    values: dict[str, Any] = {}
    for key, most in TEXT_SIZES.items():
        if (value := config.get(key)) is None:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise refuse(f"{where}: {key} is {shown(value)}, not a whole number from 1 to {most}.")
        values[key] = value
    for key, kinds in TEXT_OTHERS.items():
        if (value := config.get(key)) is None:
            continue
        sane = all(abs(number) <= MOST_VOCABULARY for number in _numbers(value))  # NaN is not
        if type(value) not in kinds or not sane:
            raise refuse(f"{where}: {key} is {shown(value)}, which it cannot be.")
        values[key] = value
    return values


def scheduler_config(where: str, config: Mapping[str, Any], refuse: Refuse) -> None:
    """Check a scheduler's settings, or options for one: none may make it run or allocate for ever.

    Raise ModelError.
    """
    scheduler_sizes(where, config, refuse)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        most = MOST_TIMESTEPS if key == "trained_betas" else MOST_SIZE
        flat = value if isinstance(value, list | tuple) else [value]
        plain = all(item is None or isinstance(item, bool | int | float | str) for item in flat)
        if len(flat) > most or not plain:
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
    """Check the settings that decide how long a scheduler's tables are. Raise ModelError."""
    for key, (least, most) in SCHEDULER_SIZES.items():
        value = config.get(key, least)
        if not (type(value) is int and least <= value <= most):
            raise refuse(
                f"{where}: {key} is {shown(value)}, not a whole number from {least} to {most}."
            )


def betas(where: str, config: Mapping[str, Any], timesteps: Any, refuse: Refuse) -> None:
    """Check the betas in a scheduler's settings: each from 0 to 1. Raise ModelError.

    `trained_betas` has one for each timestep, if their number is known.
    """
    for key in ("beta_start", "beta_end"):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < 1:
            raise refuse(f"{where}: {key} is {shown(value)}, not between 0 and 1.")
    trained = config.get("trained_betas")
    if not isinstance(trained, list | tuple):
        return
    for beta in trained:
        if type(beta) not in (int, float) or not 0 <= beta <= 1:
            raise refuse(f"{where}: trained_betas holds {shown(beta)}, not a number from 0 to 1.")
    if type(timesteps) is int and len(trained) != timesteps:
        raise refuse(
            f"{where}: trained_betas has {len(trained)} values, and num_train_timesteps is "
            f"{timesteps}."
        )


def words(value: Any, refuse: Refuse) -> frozenset[str]:
    """Return the words of words.json. Raise ModelError for anything else."""
    listed = value if isinstance(value, list) and len(value) <= 100_000 else [None]
    if not all(isinstance(word, str) and re.fullmatch(r"\w{1,100}", word) for word in listed):
        raise refuse("words.json is not a list of words.")
    return frozenset(listed)


KINDS = {bool: "bool", int: "int", float: "float", str: "str", list: "tuple", tuple: "tuple"}


def _check_type(where: str, value: Any, parameter: inspect.Parameter, refuse: Refuse) -> None:
    """Check a value against the argument that will take it: its type, and a list's length."""
    text, default = str(parameter.annotation), parameter.default
    kinds = {kind for kind in KINDS.values() if re.search(rf"\b{kind}\b", text)}
    kinds |= {"int"} if "float" in kinds else set()
    if value is None:
        if default is not None and "None" not in text and not isinstance(default, bool):
            raise refuse(f"{where} is null, which it cannot be.")
        return
    kind = KINDS.get(type(value), "")
    if kind not in kinds and not (kind == "tuple" and "sample_size" in where):
        raise refuse(f"{where} is {shown(value)}, which it cannot be.")
    if isinstance(value, list | tuple):
        rows = [inner if isinstance(inner, list | tuple) else [inner] for inner in value]
        items = [item for row in rows for item in row]
        if not 1 <= len(value) <= MOST_ITEMS or len(items) > MOST_ITEMS:
            raise refuse(f"{where} is {shown(value)}: a list of 1 to {MOST_ITEMS} belongs there.")
        wanted: set[type] = {bool, int, float, str}
        if isinstance(default, tuple):
            wanted = {type(item) for item in default}
        wanted |= {int} if float in wanted else set()
        if any(type(item) not in wanted and item is not None for item in items):
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
    """Return about how many layers a config makes.

    That is blocks, times the layers in each, times the transformers in each of these.
    """
    lists = [value for key, value in config.items() if "block" in key]
    blocks = max((len(value) for value in lists if isinstance(value, list | tuple)), default=4)
    layers, transformers = (
        max((int(number) for number in _numbers(config.get(key, 1))), default=1)
        for key in ("layers_per_block", "transformer_layers_per_block")
    )
    tiny = sum(
        int(number)
        for key in ("num_encoder_blocks", "num_decoder_blocks")
        for number in _numbers(config.get(key, 0))
    )
    return blocks * (layers + 1) * transformers + tiny
