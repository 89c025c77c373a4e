"""How a pipeline reads a prompt, for every family.

This module has the pipeline's conversions of a prompt, and the proof that our reading is the same.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

from probe.diffusion.family import COND, Arguments, Family, Tokens
from probe.diffusion.prompts import Convert, OverLong, Prompt, read_prompt, words_to_know
from probe.errors import ModelError, PromptError
from probe.words import RULES

UNDO = (
    "Undo what was changed in its tokenizer or text encoder (prompt weights, clip skip, dropout), "
    "or load the pipeline anew."
)
LOAD_TOGETHER = (
    "Load tokenizer and text encoder of one model; textual inversion, with "
    "pipeline.load_textual_inversion."
)


def read(
    model: Family, encoder: str, text: str, over_long: OverLong = "error", rules: int = RULES
) -> Prompt:
    """Return a text's tokens for one of a model's text encoders, as its pipeline makes them.

    Raise PromptError for a text that is too long or has words that the model never saw. Raise
    ModelError for a token without an embedding in the text encoder.
    """
    encoders, known = model.text_encoders(), model.vocabulary
    module, tokenizer = encoders[encoder]
    if known is not None:
        unknown = [word for word in words_to_know(text, tokenizer) if word not in known]
        if unknown:
            raise PromptError(
                f"{model.name} never saw {', '.join(map(repr, unknown))} in its training.",
                f"Its words: {' '.join(sorted(known))}. Another model (model: ...) knows more.",
            )
    converter, is_first = _converter(model.pipeline), encoder == next(iter(encoders))
    prompt = read_prompt(tokenizer, text, over_long, converter, rules, padding_is_word=is_first)
    position = int(prompt.ids.argmax())
    if int(prompt.ids[0, position]) >= module.get_input_embeddings().num_embeddings:
        raise ModelError(
            f"{model.name}: its tokenizer has the token {prompt.tokens[position]!r}, and its text "
            "encoder no embedding of it.",
            LOAD_TOGETHER,
        )
    return prompt


def _converter(pipeline: Any | None) -> Convert:
    """Return the pipeline's own conversion.

    Textual inversion writes a word once for each of its vectors.
    """
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    return cast(Convert, (pipeline or TextualInversionLoaderMixin()).maybe_convert_prompt)


Theirs = Callable[[Any, Mapping[str, Prompt]], Mapping[str, Arguments]]


def check_reading(model: Family, tokens: Mapping[str, Tokens], theirs: Theirs) -> None:
    """Compare our arguments of prompts, by branch, with those of the model's own pipeline.

    `theirs` returns the pipeline's, given the prompts by branch. Raise ModelError if a bit differs:
    the pipeline then reads text in its own way. Prompts that were read by the first rules are not
    compared; nor are those of a model without a pipeline.
    """
    pipeline = model.pipeline
    prompts = {branch: next(iter(readings.values())) for branch, readings in tokens.items()}
    if pipeline is None or model.device.type == "meta" or prompts[COND].rules != RULES:
        return
    for name, (encoder, tokenizer) in model.text_encoders().items():
        own = name.replace("text_encoder", "tokenizer")
        if getattr(pipeline, name) is not encoder or getattr(pipeline, own) is not tokenizer:
            return
    devices = [model.device] if model.device.type == "cuda" else []
    cut = any(prompt.cut for prompt in prompts.values())
    with torch.no_grad(), torch.random.fork_rng(devices), hushed(cut):
        try:
            wanted = theirs(pipeline, prompts)
        except (TypeError, ValueError, AttributeError, LookupError) as problem:
            why = f"{type(problem).__name__}: {problem}"
            cause = f"{model.name}: its own encode_prompt fails ({why})."
            raise ModelError(cause, UNDO) from problem
        for branch, reading in tokens.items():
            ours = model.encode_prompt(reading, branch)
            if not all(_same(ours[name], value) for name, value in wanted[branch].items()):
                which = "prompt" if branch == COND else "negative prompt"
                raise ModelError(
                    f"{model.name}: the pipeline makes another embedding of the {which} than its "
                    "tokenizer and text encoder do here.",
                    UNDO,
                )


def normed(encoder: Any, state: torch.Tensor) -> torch.Tensor:
    """Return a state of a text encoder after its last norm.

    The norm's module is not called: each module then runs once for a text, and hooks see it once.
    """
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return torch.nn.functional.layer_norm(
        state, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )


@contextlib.contextmanager
def with_text_model(encoder: Any) -> Iterator[None]:
    """Give a text encoder the attribute `text_model`, which diffusers' clip_skip looks for.

    CLIPTextModel of transformers 5 has its parts without that wrapper.
    """
    if hasattr(encoder, "text_model"):
        yield
        return
    vars(encoder)["text_model"] = encoder  # no submodule: nothing else sees it
    try:
        yield
    finally:
        del vars(encoder)["text_model"]


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    return torch.allclose(ours, theirs.to(ours.dtype), rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def hushed(hush: bool = True) -> Iterator[None]:
    """Silence the libraries' warnings: what matters of them we say ourselves."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers") if hush]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def refuse_other_readers(pipeline: Any, kind: type[Any]) -> None:
    """Raise ModelError for a pipeline whose `encode_prompt` is not that of its class."""
    own = getattr(pipeline.encode_prompt, "__func__", pipeline.encode_prompt)
    if own is not kind.encode_prompt:
        name = f"{getattr(own, '__module__', '')}.{getattr(own, '__qualname__', '')}"
        other = name if hasattr(own, "__qualname__") else type(own).__name__
        raise ModelError(
            f"{type(pipeline).__name__}: its encode_prompt was replaced (by {other}), so it reads "
            "prompts in a way of its own.",
            f"Give a {kind.__name__} with diffusers' own encode_prompt.",
        )
