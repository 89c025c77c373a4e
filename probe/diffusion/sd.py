"""Stable Diffusion as its parts: text encoder, UNet, scheduler and VAE, described by their configs.

    model = StableDiffusion.of(pipeline)              # an in-memory diffusers pipeline; probe.diffusion.loading.load gets others
    conditioning = model.condition("An astronaut scuba diving")

Constants (downsampling factor f, scaling factor, prediction type, grid size) come from the model's own configs.
`skeleton()` is the same model without weights, on the meta device: it tells every shape and cost before anything is computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from probe.diffusion.prompts import Convert, OverLong, Prompt, read_prompt, words_to_know
from probe.diffusion.schedulers import another_scheduler, check_own
from probe.diffusion.support import refuse_other_pipelines, refuse_unsupported
from probe.errors import ExperimentError, ModelError, NotFinite, PromptError
from probe.fields import from_home
from probe.words import RULES

UNDO = "Undo what was changed in its tokenizer or text encoder (prompt weights, clip skip, dropout), or load the pipeline anew."


@dataclass(frozen=True)
class Conditioning:
    """What the text encoder made of the prompt, and of the negative prompt. *Shape:* each embedding (1, token, feature)."""

    cond: Prompt
    uncond: Prompt
    cond_embedding: torch.Tensor
    uncond_embedding: torch.Tensor | None

    def embeddings(self, images: int, guided: bool) -> torch.Tensor:
        """The UNet's text input, (branch x image, token, feature), the unconditional branch first."""
        branches = [self.cond_embedding.repeat(images, 1, 1)]
        if guided:
            if self.uncond_embedding is None:
                raise ValueError("this conditioning was made without its unconditional branch")
            branches.insert(0, self.uncond_embedding.repeat(images, 1, 1))
        return torch.cat(branches)


@dataclass(frozen=True)
class StableDiffusion:
    """The components of a Stable Diffusion 1.x or 2.x model, and what their configs say.

    `vae` is None for a model that works on pixels. A second text encoder (SDXL) will sit beside the first. `pipeline` is the
    one that the parts were taken from, which says how it reads a prompt.
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
        parts = {part: getattr(pipeline, part, None) for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
        name = name or from_home(str(pipeline.config.get("_name_or_path") or type(pipeline).__name__))
        refuse_unsupported(name, {part: value for part, value in parts.items() if part != "scheduler"})
        return cls(name=name, pipeline=pipeline, **parts).with_scheduler(scheduler, options or {})

    @property
    def device(self) -> torch.device:
        return cast(torch.device, next(self.unet.parameters()).device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, next(self.unet.parameters()).dtype)

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per latent, along one side."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's output times this, so that their variance is about one."""
        return 1.0 if self.vae is None else float(self.vae.config.scaling_factor)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.prediction_type)

    def latent_shape(self, images: int, height: int | None = None, width: int | None = None) -> tuple[int, int, int, int]:
        """(image, channel, y, x) of the latents for a picture of `height` x `width` pixels."""
        size = self.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        sides = []
        for name, pixels, default in (("height", height, own[0]), ("width", width, own[1])):
            if pixels is not None and (pixels % self.f or pixels < 1):
                below = max(pixels // self.f, 1) * self.f
                raise ExperimentError(
                    f"{name}: {pixels} is not a multiple of f = {self.f}, the pixels that one latent of {self.name} stands for.",
                    f"Use {name}: {below} or {below + self.f}.",
                )
            sides.append(default if pixels is None else pixels // self.f)
        return (images, int(self.unet.config.in_channels), sides[0], sides[1])

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

    def condition(self, prompt: str, negative_prompt: str = "", *, guided: bool = True, over_long: OverLong = "error") -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt, each in a call of its own as diffusers does."""
        cond, uncond = self.read(prompt, over_long), self.read(negative_prompt, over_long)
        self.check_reading({"cond": cond, "uncond": uncond} if guided else {"cond": cond})
        return Conditioning(cond, uncond, self.encode(cond), self.encode(uncond) if guided else None)

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

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Latents to pixels, (image, y, x, rgb) uint8 on the CPU, and whether the VAE had to be run again in float32.

        What is not finite is 0 in them: `pixels` tells.
        """
        made, again = self.pixels(latents)
        return to_uint8(made), again

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

    def digest(self) -> str:
        """SHA-256 of every weight and buffer, 16 hex characters: two models with one digest have the same bits."""
        found = hashlib.sha256()
        for part in ("unet", "vae", "text_encoder"):
            for name, tensor in (getattr(self, part).state_dict() if getattr(self, part) is not None else {}).items():
                found.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    def skeleton(self) -> StableDiffusion:
        """The same model on the meta device: shapes without weights or work."""
        with torch.device("meta"):
            unet = _again(self.unet)
            vae = None if self.vae is None else _again(self.vae)
            text_encoder = type(self.text_encoder)(self.text_encoder.config)
        parts = {"unet": unet.eval(), "vae": vae and vae.eval(), "text_encoder": text_encoder.eval()}
        return replace(self, **{name: part and torch.nn.Module.to(part, self.dtype) for name, part in parts.items()})

    def checked(self) -> StableDiffusion:
        """The model itself. Raises ModelError if it, or its scheduler, is of a kind that is not supported."""
        refuse_unsupported(self.name, {part: getattr(self, part) for part in ("unet", "vae", "text_encoder", "tokenizer")}, pixels=self.vae is None)
        check_own(self.name, self.scheduler)
        return self


def _again(module: Any) -> Any:
    """A module of the same class and config, without the entries that diffusers adds to a config for other classes."""
    kind, known = type(module), inspect.signature(type(module).__init__).parameters
    return kind(**{key: value for key, value in module.config.items() if key in known})


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


def count_not_finite(what: str, values: torch.Tensor, on_nan: str) -> int:
    """How many values of what a part of the model makes are NaN or infinite. Raises NotFinite where a run stops at them."""
    count = int((~torch.isfinite(values)).sum())
    if count and on_nan == "stop":
        raise NotFinite(
            f"{what} holds {count} values of {values.numel()} that are not finite: the model's weights are not, or its number format is too small.",
            "Fetch the model again, or try --dtype float32; on_nan: record goes on, and such a pixel is 0.",
        )
    return count


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], (image, rgb, y, x), to (image, y, x, rgb) uint8, rounded as diffusers' image processor does."""
    scaled = (pixels * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu()
    return (scaled * 255).round().nan_to_num(0).to(torch.uint8)


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
