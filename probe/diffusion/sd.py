"""Stable Diffusion as its parts: text encoder, UNet, scheduler and VAE, described by their configs.

    model = StableDiffusion.of(pipeline)              # an in-memory diffusers pipeline; probe.diffusion.loading.load gets others
    conditioning = model.condition("An astronaut scuba diving")

Constants (downsampling factor f, scaling factor, prediction type, grid size) come from the model's own configs.
`skeleton()` is the same model without weights, on the meta device: it tells every shape and cost before anything is computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from probe.diffusion import parts
from probe.diffusion.family import (
    COND,
    TEXT,
    UNCOND,
    Arguments,
    Conditioning,
    Predict,
    Tokens,
    batched,
)
from probe.diffusion.prompts import Convert, OverLong, Prompt, read_prompt, words_to_know
from probe.diffusion.schedulers import another_scheduler, check_own
from probe.diffusion.support import refuse_other_pipelines, refuse_unsupported
from probe.errors import ModelError, PromptError
from probe.fields import from_home
from probe.words import RULES

ENCODER = "text_encoder"
PARTS = ("unet", "vae", ENCODER, "tokenizer")
UNDO = "Undo what was changed in its tokenizer or text encoder (prompt weights, clip skip, dropout), or load the pipeline anew."


@dataclass(frozen=True)
class StableDiffusion:
    """The components of a Stable Diffusion 1.x or 2.x model, and what their configs say.

    `vae` is None for a model that works on pixels. `pipeline` is the one that the parts were taken from, which says how it
    reads a prompt.
    """

    name: str
    unet: Any
    vae: Any | None
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    revision: str | None = None
    vocabulary: frozenset[str] | None = None
    pipeline: Any | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, pipeline: Any, name: str | None = None, *, scheduler: str = "default", options: Mapping[str, Any] | None = None) -> StableDiffusion:
        """The parts of a diffusers `StableDiffusionPipeline`, with its own scheduler or another made from it.

        Raises ModelError for other pipelines, and for parts that are missing, of another kind or do not fit together.
        """
        refuse_other_pipelines(pipeline)
        refuse_other_readers(pipeline)
        found = {part: getattr(pipeline, part, None) for part in (*PARTS, "scheduler")}
        name = name or from_home(str(pipeline.config.get("_name_or_path") or type(pipeline).__name__))
        refuse_unsupported(name, {part: value for part, value in found.items() if part != "scheduler"})
        return cls(name=name, pipeline=pipeline, **found).with_scheduler(scheduler, options or {})

    @property
    def device(self) -> torch.device:
        return parts.device(self)

    @property
    def dtype(self) -> torch.dtype:
        return parts.dtype(self)

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per latent, along one side."""
        return parts.downsampling(self.vae)

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's output times this, so that their variance is about one."""
        return 1.0 if self.vae is None else float(self.vae.config.scaling_factor)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.prediction_type)

    def components(self) -> dict[str, Any]:
        """Return every module with weights, by name."""
        vae = {} if self.vae is None else {"vae": self.vae}
        return {"unet": self.unet, **vae, ENCODER: self.text_encoder}

    def text_encoders(self) -> dict[str, tuple[Any, Any]]:
        """Return the text encoder and its tokenizer, by name."""
        return {ENCODER: (self.text_encoder, self.tokenizer)}

    latent_shape = parts.latent_shape
    attention_layers = parts.attention_layers
    digest = parts.digest
    skeleton = parts.skeleton
    decode = parts.decode

    def with_scheduler(self, name: str, options: Mapping[str, Any]) -> StableDiffusion:
        """The same model with another scheduler (`default`: its own), built from its own schedule plus `options`."""
        if name == "default" and not options:
            return self.checked()
        own = self.scheduler
        made = another_scheduler(self.name, name, {} if own is None else own.config, type(own), options, latent=self.vae is not None)
        return replace(self, scheduler=made).checked()

    def read(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Prompt:
        """Tokenize a prompt as the pipeline does. Raises PromptError when it is too long, or has words that the model never saw."""
        known = self.vocabulary
        if known is not None and (unknown := [word for word in words_to_know(text, self.tokenizer) if word not in known]):
            raise PromptError(
                f"{self.name} never saw {', '.join(map(repr, unknown))} in its training.",
                f"Its words: {' '.join(sorted(known))}. Another model (model: ...) knows more.",
            )
        prompt = read_prompt(self.tokenizer, text, over_long, self._converter(), rules)
        self._refuse_unknown(prompt)
        return prompt

    def text_mask(self, prompt: Prompt) -> torch.Tensor | None:
        """The attention mask that the text encoder is given, (1, token); None for most models, whose config asks for none."""
        return prompt.mask if getattr(self.text_encoder.config, "use_attention_mask", None) else None

    def encode(self, prompt: Prompt) -> torch.Tensor:
        """The text encoder's output, (1, token, feature)."""
        mask = self.text_mask(prompt)
        with torch.no_grad():
            encoded = self.text_encoder(prompt.ids.to(self.device), attention_mask=None if mask is None else mask.to(self.device))
        return cast(torch.Tensor, encoded[0]).to(self.dtype)

    def tokens(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Tokens:
        """Tokenize a text for the text encoder, as the pipeline does."""
        return {ENCODER: self.read(text, over_long, rules)}

    def encode_prompt(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Return the UNet's text input, `encoder_hidden_states`. *Shape:* (1, token, feature)."""
        return {TEXT: self.encode(tokens[ENCODER])}

    def condition(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        guided: bool = True,
        over_long: OverLong = "error",
    ) -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt, each in a call of its own as diffusers does."""
        texts = {COND: prompt, UNCOND: negative_prompt} if guided else {COND: prompt}
        tokens = {branch: self.tokens(text, over_long) for branch, text in texts.items()}
        self.check_reading({branch: read[ENCODER] for branch, read in tokens.items()})
        arguments = {branch: self.encode_prompt(read) for branch, read in tokens.items()}
        return Conditioning(arguments, tokens)

    def blank(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return a text input of zeros, for texts of `tokens` tokens."""
        width = int(self.unet.config.cross_attention_dim)
        return {TEXT: torch.zeros((rows, tokens, width), dtype=self.dtype, device=self.device)}

    def call(self, model_input: torch.Tensor, t: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Call the UNet once. *Shape:* (row, channel, y, x), and as many rows of arguments."""
        output: torch.Tensor = self.unet(model_input, t, **arguments, return_dict=False)[0]
        return output

    def predictor(
        self,
        conditioning: Conditioning,
        images: int,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
    ) -> Predict:
        """Return the model as a `Predict`: both branches in one batch, guided as its pipeline does."""
        return batched(self, conditioning, images, guidance_scale, guidance_rescale)

    def check_reading(self, prompts: Mapping[str, Prompt]) -> None:
        """Hold the embeddings of prompts, by branch, against those of the pipeline that this model is part of, if there is one.

        Raises ModelError if a bit differs: the pipeline then reads text in a way of its own. Prompts that the first rules read are
        not held against it.
        """
        pipeline = self.pipeline
        if pipeline is None or pipeline.text_encoder is not self.text_encoder or pipeline.tokenizer is not self.tokenizer:
            return
        if self.device.type == "meta" or prompts["cond"].rules != RULES:
            return
        guided = "uncond" in prompts
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _hushed(any(prompt.cut for prompt in prompts.values())):
            try:
                cond, uncond = pipeline.encode_prompt(prompts["cond"].text, self.device, 1, guided, prompts["uncond"].text if guided else None)
            except (TypeError, ValueError, AttributeError, LookupError) as problem:
                raise ModelError(f"{self.name}: its own encode_prompt fails ({type(problem).__name__}: {problem}).", UNDO) from problem
            for branch, prompt in prompts.items():
                ours, theirs = self.encode(prompt), cond if branch == "cond" else uncond
                if ours.shape != theirs.shape or not torch.allclose(ours, theirs.to(ours.dtype), rtol=0, atol=0, equal_nan=True):
                    which = "prompt" if branch == "cond" else "negative prompt"
                    raise ModelError(
                        f"{self.name}: the pipeline makes another embedding of the {which} than its tokenizer and text encoder do here.",
                        UNDO,
                    )

    def _refuse_unknown(self, prompt: Prompt) -> None:
        """Raises ModelError for a token that the text encoder has no embedding for."""
        position = int(prompt.ids.argmax())
        if int(prompt.ids[0, position]) >= self.text_encoder.get_input_embeddings().num_embeddings:
            raise ModelError(
                f"{self.name}: its tokenizer has the token {prompt.tokens[position]!r}, and its text encoder no embedding of it.",
                "Load tokenizer and text encoder of one model; textual inversion, with pipeline.load_textual_inversion.",
            )

    def _converter(self) -> Convert:
        """What a pipeline makes of a prompt before it is tokenized: textual inversion writes a word once for each of its vectors."""
        from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

        converter: Any = self.pipeline or TextualInversionLoaderMixin()
        return cast(Convert, converter.maybe_convert_prompt)

    def pixels(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What the VAE makes of latents, (image, rgb, y, x), about -1 to 1, and whether it had to be run again in float32.

        Stable Diffusion's VAE overflows in float16 on some latents; they are decoded once more, never shown black.
        """
        if self.vae is None:
            return latents, False
        with torch.no_grad():
            pixels = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
            again = self.dtype == torch.float16 and not bool(torch.isfinite(pixels).all())
            if again:
                self.vae.float()
                try:
                    pixels = self.vae.decode(latents.float() / self.scaling_factor, return_dict=False)[0]
                finally:
                    self.vae.to(self.dtype)
        return pixels, again

    def checked(self) -> StableDiffusion:
        """The model itself. Raises ModelError if it, or its scheduler, is of a kind that is not supported."""
        refuse_unsupported(self.name, {part: getattr(self, part) for part in PARTS}, pixels=self.vae is None)
        check_own(self.name, self.scheduler)
        return self


@contextlib.contextmanager
def _hushed(hush: bool) -> Iterator[None]:
    """What the libraries warn of a prompt that is too long is not said: it is told already, in the experiment's words."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers") if hush]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def refuse_other_readers(pipeline: Any) -> None:
    """Raises ModelError for a pipeline whose `encode_prompt` is not diffusers' own: it reads prompts in a way that is not known here."""
    from diffusers import StableDiffusionPipeline

    own = getattr(pipeline.encode_prompt, "__func__", pipeline.encode_prompt)
    if own is not StableDiffusionPipeline.encode_prompt:
        where = f"{own.__module__}.{own.__qualname__}" if hasattr(own, "__qualname__") else type(own).__name__
        raise ModelError(
            f"{type(pipeline).__name__}: its encode_prompt was replaced (by {where}), so it reads prompts in a way of its own.",
            "Give a StableDiffusionPipeline with diffusers' own encode_prompt.",
        )
