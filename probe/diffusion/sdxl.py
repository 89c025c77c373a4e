"""Stable Diffusion XL as its parts: two text encoders, UNet, scheduler and VAE.

SDXL-Turbo and SSD-1B are of this family.

    model = StableDiffusionXL.of(pipeline)          # a diffusers StableDiffusionXLPipeline
    conditioning = model.condition("An astronaut scuba diving")

Podell et al. 2023 (arXiv:2307.01952). The UNet reads the last but one state of both text encoders,
side by side. It is also told the pooled embedding of the second, and six numbers: the size that
the training picture had, where it was cut, and the size that is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from probe.diffusion import parts, weights
from probe.diffusion.family import (
    COND,
    TEXT,
    UNCOND,
    Arguments,
    Call,
    Conditioning,
    Predict,
    Tokens,
    batched,
)
from probe.diffusion.guidance import rule_of
from probe.diffusion.loras import with_loras
from probe.diffusion.prompts import OverLong, Prompt
from probe.diffusion.schedulers import another_scheduler, check_own
from probe.diffusion.support import (
    XL_KINDS,
    refuse_other_pipelines,
    refuse_unsupported,
    xl_without_pictures,
)
from probe.diffusion.text import check_reading, read, refuse_other_readers
from probe.settings.fields import from_home
from probe.words import RULES

FIRST, SECOND = "text_encoder", "text_encoder_2"
PARTS = ("unet", "vae", FIRST, SECOND, "tokenizer", "tokenizer_2")
POOLED, SIZES = "text_embeds", "time_ids"  # as diffusers' UNet calls them


@dataclass(frozen=True)
class StableDiffusionXL:
    """The components of a Stable Diffusion XL model, and what their configs say.

    `zeros_for_empty`: the model was trained with zeros in place of an empty negative prompt.
    `pipeline` is the one that the parts were taken from; it says how it reads a prompt. The prompt
    skips the last `clip_skip` layers of both text encoders, beside the one that is never used.
    `embeds` are given embeddings, by branch. `files` are the digests of its LoRAs and of the
    embeddings' file, by path.
    """

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    scheduler: Any
    zeros_for_empty: bool = True
    revision: str | None = None
    vocabulary: frozenset[str] | None = None
    clip_skip: int | None = None
    files: Any = field(default_factory=dict, compare=False)
    embeds: Any = field(default=None, repr=False, compare=False)
    pipeline: Any | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        pipeline: Any,
        name: str | None = None,
        *,
        scheduler: str = "default",
        options: Mapping[str, Any] | None = None,
    ) -> StableDiffusionXL:
        """Take the parts of a diffusers pipeline, with its own scheduler or another made from it.

        Raise ModelError for other pipelines, and for parts that are missing, of another kind or do
        not fit together.
        """
        from diffusers import StableDiffusionXLPipeline

        refuse_other_pipelines(pipeline, StableDiffusionXLPipeline.__name__)
        refuse_other_readers(pipeline, StableDiffusionXLPipeline)
        parts = {part: getattr(pipeline, part, None) for part in PARTS}
        name = name or from_home(
            str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
        )
        refuse_unsupported(name, parts, kinds=XL_KINDS)
        zeros = bool(pipeline.config.get("force_zeros_for_empty_prompt", True))
        model = cls(
            name, **parts, scheduler=pipeline.scheduler, zeros_for_empty=zeros, pipeline=pipeline
        )
        return model.with_scheduler(scheduler, options or {})

    @property
    def device(self) -> torch.device:
        return parts.device(self)

    @property
    def dtype(self) -> torch.dtype:
        return parts.dtype(self)

    @property
    def family(self) -> str:
        return "sdxl"

    @property
    def decoding_dtype(self) -> torch.dtype:
        """The number format in which the VAE decodes: float32 if its config has `force_upcast`."""
        upcast = self.dtype == torch.float16 and bool(self.vae.config.force_upcast)
        return torch.float32 if upcast else self.dtype

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per latent, along one side."""
        return parts.downsampling(self.vae)

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's output times this, so that their variance is about one."""
        return float(self.vae.config.scaling_factor)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.prediction_type)

    def components(self) -> dict[str, Any]:
        """Return every module with weights, by name."""
        return {
            "unet": self.unet,
            "vae": self.vae,
            FIRST: self.text_encoder,
            SECOND: self.text_encoder_2,
        }

    def text_encoders(self) -> dict[str, tuple[Any, Any]]:
        """Return each text encoder and its tokenizer, by name."""
        return {
            FIRST: (self.text_encoder, self.tokenizer),
            SECOND: (self.text_encoder_2, self.tokenizer_2),
        }

    latent_shape = parts.latent_shape
    attention_layers = parts.attention_layers
    digest = weights.digest
    with_loras = with_loras
    skeleton = parts.skeleton
    decode = parts.decode
    begin = parts.begin
    schedule = parts.schedule
    scheduled = parts.scheduled

    def with_scheduler(self, name: str, options: Mapping[str, Any]) -> StableDiffusionXL:
        """Return the same model with another scheduler (`default`: its own) and its `options`.

        Unlike that of Stable Diffusion 1 and 2, its pipeline takes a scheduler as it is.
        """
        if name == "default" and not options:
            return self.checked()
        own = self.scheduler
        config = {} if own is None else own.config
        another = another_scheduler(self.name, name, config, type(own), options, forced={})
        return replace(self, scheduler=another).checked()

    # --- text ---

    def read(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Prompt:
        """Tokenize a prompt for the first text encoder."""
        return read(self, FIRST, text, over_long, rules)

    def tokens(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Tokens:
        """Tokenize a text for both text encoders, as the pipeline does."""
        return {encoder: read(self, encoder, text, over_long, rules) for encoder in (FIRST, SECOND)}

    def encode_prompt(self, tokens: Tokens, branch: str = COND) -> dict[str, torch.Tensor]:
        """Return the UNet's `encoder_hidden_states` and `text_embeds`, one row each.

        An empty negative prompt is zeros where the model was trained with them. Only the prompt
        skips layers, as in diffusers.
        """
        skip = (self.clip_skip or 0) if branch == COND else 0
        if not self.reads(tokens, branch):
            return self.blank(1, tokens[FIRST].ids.shape[1])
        states: list[torch.Tensor] = []
        for name, (encoder, _) in self.text_encoders().items():
            with torch.no_grad():
                said = encoder(tokens[name].ids.to(self.device), output_hidden_states=True)
            states.append(said.hidden_states[-(skip + 2)])
        return {TEXT: torch.cat(states, dim=-1).to(self.dtype), POOLED: said.text_embeds}

    def reads(self, tokens: Tokens, branch: str) -> bool:
        """Return whether a text encoder reads this branch.

        It does not if the negative prompt is empty and the model was trained with zeros for it.
        """
        return not (branch == UNCOND and self.zeros_for_empty and not tokens[FIRST].text)

    def text_mask(self, prompt: Prompt) -> torch.Tensor | None:  # noqa: ARG002
        """Return None: the pipeline masks no token, whatever the text encoders' configs say."""
        return None

    def condition(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        guided: bool = True,
        over_long: OverLong = "error",
        size_ids: Sequence[int] | None = None,
    ) -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt.

        `size_ids` are height and width of the training picture, top and left of its cut, height
        and width of the picture. Without them the model is told of a picture of its own size,
        uncut.
        """
        texts = {COND: prompt, UNCOND: negative_prompt} if guided else {COND: prompt}
        tokens = {branch: self.tokens(text, over_long) for branch, text in texts.items()}
        self.check_reading(tokens)
        sizes = {} if size_ids is None else {SIZES: self._sizes(size_ids)}
        arguments = {
            branch: {**self.encode_prompt(read_as, branch), **sizes}
            for branch, read_as in tokens.items()
        }
        return Conditioning(arguments, tokens)

    def blank(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return arguments of zeros, for texts of `tokens` tokens."""
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        width = int(self.unet.config.cross_attention_dim)
        pooled = int(self.text_encoder_2.config.projection_dim)
        return {
            TEXT: torch.zeros((rows, tokens, width), **like),
            POOLED: torch.zeros((rows, pooled), **like),
        }

    def check_reading(self, tokens: Mapping[str, Tokens]) -> None:
        """Hold our arguments of prompts, by branch, against the pipeline's.

        Raise ModelError if a bit differs.
        """
        check_reading(self, tokens, functools.partial(_theirs, clip_skip=self.clip_skip))

    # --- the UNet ---

    def call(
        self, model_input: torch.Tensor, t: torch.Tensor, arguments: Arguments
    ) -> torch.Tensor:
        """Call the UNet once. *Shape:* (row, channel, y, x), and as many rows of arguments."""
        sizes = arguments.get(SIZES)
        if sizes is None:
            height, width = (side * self.f for side in model_input.shape[2:])
            sizes = self._sizes((height, width, 0, 0, height, width)).repeat(len(model_input), 1)
        output: torch.Tensor = self.unet(
            model_input,
            t,
            encoder_hidden_states=arguments[TEXT],
            added_cond_kwargs={POOLED: arguments[POOLED], SIZES: sizes},
            return_dict=False,
        )[0]
        return output

    def _sizes(self, size_ids: Sequence[int]) -> torch.Tensor:
        return _on_device(tuple(size_ids), self.dtype, self.device)

    def guidance_rule(self, guidance_scale: float) -> str:
        return rule_of(guidance_scale)

    def predictor(
        self,
        conditioning: Conditioning,
        images: int,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        call: Call | None = None,
    ) -> Predict:
        """Return the model as a `Predict`: both branches in one batch, guided."""
        return batched(self, conditioning, images, guidance_scale, guidance_rescale, call)

    # --- pictures ---

    def encode_picture(
        self,
        picture: np.ndarray,  # noqa: ARG002
        generators: Sequence[torch.Generator] = (),  # noqa: ARG002
    ) -> torch.Tensor:
        """Raise ModelError: this family does not begin from a picture yet."""
        raise xl_without_pictures(self)

    def pixels(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Decode latents to (image, rgb, y, x), about -1 to 1.

        Return beside them whether the VAE ran again in float32.

        Where its config says so (`force_upcast`), a float16 VAE runs in float32 in the first
        place.
        """
        return parts.decoded(self.vae, latents, self._unscaled, bool(self.vae.config.force_upcast))

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return latents / self.scaling_factor
        centre, spread = (torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in (mean, deviation))
        return latents * spread / self.scaling_factor + centre

    def checked(self) -> StableDiffusionXL:
        """Return the model itself. Raise ModelError if it, or its scheduler, is not supported."""
        refuse_unsupported(self.name, {part: getattr(self, part) for part in PARTS}, kinds=XL_KINDS)
        check_own(self.name, self.scheduler)
        return self


@functools.lru_cache(maxsize=16)
def _on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a row of numbers, copied to a device once: a CUDA graph cannot hold such a copy."""
    return torch.tensor([numbers], dtype=dtype, device=device)


def _theirs(
    pipeline: Any, prompts: Mapping[str, Prompt], clip_skip: int | None = None
) -> dict[str, Arguments]:
    """Ask the pipeline for what the UNet is told of prompts, by branch."""
    guided = UNCOND in prompts
    cond, uncond, pooled, pooled_uncond = pipeline.encode_prompt(
        prompts[COND].text,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=guided,
        negative_prompt=(prompts[UNCOND].text or None) if guided else None,
        clip_skip=clip_skip,
    )
    return {COND: {TEXT: cond, POOLED: pooled}, UNCOND: {TEXT: uncond, POOLED: pooled_uncond}}
