"""Stable Diffusion as its parts: text encoder, UNet, scheduler and VAE, described by their configs.

    model = StableDiffusion.of(pipeline)              # an in-memory diffusers pipeline; probe.diffusion.loading.load gets others
    conditioning = model.condition("An astronaut scuba diving")

Constants (downsampling factor f, scaling factor, prediction type, grid size) come from the model's own configs.
`skeleton()` is the same model without weights, on the meta device: it tells every shape and cost before anything is computed.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch

from probe.diffusion.schedulers import another_scheduler, check_own
from probe.diffusion.support import refuse_other_pipelines, refuse_unsupported
from probe.errors import ExperimentError, PromptError
from probe.fields import from_home


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it: 77 tokens, their texts, and which word each belongs to (-1: none)."""

    text: str
    ids: torch.Tensor
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    word_of: tuple[int, ...]
    end: int
    cut: str = ""

    @property
    def spans(self) -> dict[int, list[int]]:
        """Token positions of each word, by word index."""
        return {w: [i for i, of in enumerate(self.word_of) if of == w] for w in range(len(self.words))}


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

    `vae` is None for a model that works on pixels. A second text encoder (SDXL) will sit beside the first.
    """

    name: str
    unet: Any
    vae: Any | None
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    revision: str | None = None
    vocabulary: frozenset[str] | None = None

    @classmethod
    def of(cls, pipeline: Any, name: str | None = None, *, scheduler: str = "default", options: Mapping[str, Any] | None = None) -> StableDiffusion:
        """The parts of a diffusers `StableDiffusionPipeline`, with its own scheduler or another made from it.

        Raises ModelError for other pipelines, and for parts that are missing, of another kind or do not fit together.
        """
        refuse_other_pipelines(pipeline)
        parts = {part: getattr(pipeline, part, None) for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
        name = name or from_home(str(pipeline.config.get("_name_or_path") or type(pipeline).__name__))
        refuse_unsupported(name, {part: value for part, value in parts.items() if part != "scheduler"})
        return cls(name=name, **parts).with_scheduler(scheduler, options or {})

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

    def read(self, text: str, over_long: Literal["error", "cut"] = "error") -> Prompt:
        """Tokenize a prompt. Raises PromptError when it is too long, or has words that the model never saw."""
        limit = int(self.tokenizer.model_max_length)
        known = self.vocabulary
        if known is not None and (unknown := [w for w in dict.fromkeys(re.findall(r"\w+", text.lower())) if w not in known]):
            raise PromptError(
                f"{self.name} never saw {', '.join(map(repr, unknown))} in its training.",
                f"Its words: {' '.join(sorted(known))}. Another model (model: ...) knows more.",
            )
        whole = self.tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        cut = ""
        if len(whole.input_ids) > limit:
            cut = text[whole["offset_mapping"][limit - 1][0] :]
            if over_long == "error":
                raise PromptError(
                    f"The prompt has {len(whole.input_ids)} tokens, {limit} is the most; it would lose {cut[:80]!r}.",
                    "Shorten it, or set over_long: cut.",
                )
        encoded = self.tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        end = min(len(whole.input_ids), limit) - 1
        words, word_of = _words(text, offsets, end)
        pieces = self.tokenizer.convert_ids_to_tokens(encoded.input_ids[0].tolist())
        tokens = tuple(piece.removesuffix("</w>") for piece in pieces)
        return Prompt(text, encoded.input_ids, tokens, words, word_of, end, cut)

    def encode(self, prompt: Prompt) -> torch.Tensor:
        """The text encoder's output, (1, token, feature)."""
        mask = None
        if getattr(self.text_encoder.config, "use_attention_mask", None):
            mask = (torch.arange(prompt.ids.shape[1]) <= prompt.end)[None].long().to(self.device)
        with torch.no_grad():
            return cast(torch.Tensor, self.text_encoder(prompt.ids.to(self.device), attention_mask=mask)[0]).to(self.dtype)

    def condition(self, prompt: str, negative_prompt: str = "", *, guided: bool = True, over_long: Literal["error", "cut"] = "error") -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt, each in a call of its own as diffusers does."""
        cond, uncond = self.read(prompt, over_long), self.read(negative_prompt, over_long)
        return Conditioning(cond, uncond, self.encode(cond), self.encode(uncond) if guided else None)

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Latents to pixels, (image, y, x, rgb) uint8 on the CPU, and whether the VAE had to be run again in float32.

        Stable Diffusion's VAE overflows in float16 on some latents; they are decoded once more, never shown black.
        """
        if self.vae is None:
            return to_uint8(latents), False
        with torch.no_grad():
            pixels = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
            again = self.dtype == torch.float16 and not bool(torch.isfinite(pixels).all())
            if again:
                self.vae.float()
                try:
                    pixels = self.vae.decode(latents.float() / self.scaling_factor, return_dict=False)[0]
                finally:
                    self.vae.to(self.dtype)
        return to_uint8(pixels), again

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


def _words(text: str, offsets: list[list[int]], end: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The words that the tokens between BOS and EOS (at `end`) spell, and the word of each token; punctuation has none."""
    words: list[str] = []
    word_of = [-1] * len(offsets)
    stop = None  # where the word being read ended, None after a space or punctuation
    for position in range(1, end):
        start, finish = offsets[position]
        piece = text[start:finish].strip()
        joined = stop is not None and start <= stop
        if not any(c.isalnum() for c in piece) and not (joined and piece[:1] in ("'", "\u2019")):
            stop = None
            continue
        if not joined:
            words.append("")
            stop = start
        words[-1] += text[max(start, cast(int, stop)) : finish]
        word_of[position], stop = len(words) - 1, max(finish, cast(int, stop))
    return tuple(words), tuple(word_of)


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1], (image, rgb, y, x), to (image, y, x, rgb) uint8, rounded as diffusers' image processor does."""
    scaled = (pixels * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu()
    return (scaled * 255).round().nan_to_num(0).to(torch.uint8)
