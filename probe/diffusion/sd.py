"""Stable Diffusion 1 and 2 as their parts: text encoder, UNet, scheduler and VAE.

    model = StableDiffusion.of(pipeline)              # a diffusers pipeline in memory
    conditioning = model.condition("An astronaut scuba diving")

`probe.diffusion.loading.load` gets a model from files. Constants (downsampling factor f, scaling
factor, prediction type, grid size) come from the model's own configs. `skeleton()` is the same
model without weights, on the meta device: it tells every shape and cost before anything is
computed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

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
from probe.diffusion.schedulers import FORCED, another_scheduler, check_own
from probe.diffusion.support import refuse_other_pipelines, refuse_unsupported
from probe.diffusion.text import (
    check_reading,
    normed,
    read,
    refuse_other_readers,
    with_text_model,
)
from probe.settings.fields import from_home
from probe.words import RULES

ENCODER = "text_encoder"
PARTS = ("unet", "vae", ENCODER, "tokenizer")


@dataclass(frozen=True)
class StableDiffusion:
    """The components of a Stable Diffusion 1.x or 2.x model, and what their configs say.

    `vae` is None for a model that works on pixels. `pipeline` is the one that the parts were taken
    from, which says how it reads a prompt. The prompt skips the last `clip_skip` layers of the text
    encoder. `embeds` are given embeddings, by branch. `files` are the digests of its LoRAs and of
    the embeddings' file, by path.
    """

    name: str
    unet: Any
    vae: Any | None
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
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
    ) -> StableDiffusion:
        """Take the parts of a diffusers pipeline, with its own scheduler or another made from it.

        Raise ModelError for other pipelines, and for parts that are missing, of another kind or do
        not fit together.
        """
        from diffusers import StableDiffusionPipeline

        refuse_other_pipelines(pipeline)
        refuse_other_readers(pipeline, StableDiffusionPipeline)
        modules = {part: getattr(pipeline, part, None) for part in PARTS}
        path = pipeline.config.get("_name_or_path") or type(pipeline).__name__
        name = name or from_home(str(path))
        refuse_unsupported(name, modules)
        own = getattr(pipeline, "scheduler", None)
        model = cls(name=name, pipeline=pipeline, scheduler=own, **modules)
        return model.with_scheduler(scheduler, options or {})

    @property
    def device(self) -> torch.device:
        return parts.device(self)

    @property
    def dtype(self) -> torch.dtype:
        return parts.dtype(self)

    @property
    def family(self) -> str:
        return "sd"

    @property
    def decoding_dtype(self) -> torch.dtype:
        return self.dtype

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

    def reads(self, tokens: Tokens, branch: str) -> bool:  # noqa: ARG002
        """Return True: an empty prompt is read like any other."""
        return True

    def guidance_rule(self, guidance_scale: float) -> str:
        return rule_of(guidance_scale)

    latent_shape = parts.latent_shape
    attention_layers = parts.attention_layers
    digest = weights.digest
    with_loras = with_loras
    skeleton = parts.skeleton
    decode = parts.decode
    begin = parts.begin
    schedule = parts.schedule
    scheduled = parts.scheduled
    encode_picture = parts.encode_picture

    def with_scheduler(self, name: str, options: Mapping[str, Any]) -> StableDiffusion:
        """Return the same model with another scheduler (`default`: its own) and its `options`.

        The other scheduler has the settings of the model's own, plus `options`.
        """
        if name == "default" and not options:
            return self.checked()
        own = self.scheduler
        config = {} if own is None else own.config
        forced = {} if self.vae is None else FORCED
        scheduler = another_scheduler(self.name, name, config, type(own), options, forced)
        return replace(self, scheduler=scheduler).checked()

    def read(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Prompt:
        """Tokenize a prompt as the pipeline does.

        Raise PromptError if it is too long, or has unknown words.
        """
        return read(self, ENCODER, text, over_long, rules)

    def text_mask(self, prompt: Prompt) -> torch.Tensor | None:
        """Return a prompt's attention mask for the text encoder, (1, token).

        It is None for most models, whose config asks for none.
        """
        return (
            prompt.mask if getattr(self.text_encoder.config, "use_attention_mask", None) else None
        )

    def encode(self, prompt: Prompt, skip: int | None = None) -> torch.Tensor:
        """Return the text encoder's output, (1, token, feature), without its last `skip` layers."""
        mask = self.text_mask(prompt)
        states = {} if skip is None else {"output_hidden_states": True}
        with torch.no_grad():
            encoded = self.text_encoder(
                prompt.ids.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                **states,
            )
            if skip is not None:
                state = encoded.hidden_states[-(skip + 1)]
                return normed(self.text_encoder, state).to(self.dtype)
        return cast(torch.Tensor, encoded[0]).to(self.dtype)

    def tokens(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Tokens:
        """Tokenize a text for the text encoder, as the pipeline does."""
        return {ENCODER: self.read(text, over_long, rules)}

    def encode_prompt(self, tokens: Tokens, branch: str = COND) -> dict[str, torch.Tensor]:
        """Return the UNet's text input, `encoder_hidden_states`. *Shape:* (1, token, feature).

        Only the prompt skips layers: diffusers reads the negative prompt with all of them.
        """
        return {TEXT: self.encode(tokens[ENCODER], self.clip_skip if branch == COND else None)}

    def condition(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        guided: bool = True,
        over_long: OverLong = "error",
    ) -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt.

        Each is a call of its own, as in diffusers.
        """
        texts = {COND: prompt, UNCOND: negative_prompt} if guided else {COND: prompt}
        tokens = {branch: self.tokens(text, over_long) for branch, text in texts.items()}
        self.check_reading(tokens)
        arguments = {
            branch: self.encode_prompt(read_as, branch) for branch, read_as in tokens.items()
        }
        return Conditioning(arguments, tokens)

    def blank(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return a text input of zeros, for texts of `tokens` tokens."""
        width = int(self.unet.config.cross_attention_dim)
        return {TEXT: torch.zeros((rows, tokens, width), dtype=self.dtype, device=self.device)}

    def call(
        self, model_input: torch.Tensor, t: torch.Tensor, arguments: Arguments
    ) -> torch.Tensor:
        """Call the UNet once. *Shape:* (row, channel, y, x), and as many rows of arguments."""
        output: torch.Tensor = self.unet(model_input, t, **arguments, return_dict=False)[0]
        return output

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

    def check_reading(self, tokens: Mapping[str, Tokens]) -> None:
        """Compare the embeddings of prompts, by branch, with those of the pipeline.

        Raise ModelError if a bit differs.
        """
        check_reading(self, tokens, functools.partial(_theirs, clip_skip=self.clip_skip))

    def pixels(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Decode latents to (image, rgb, y, x), about -1 to 1.

        Return beside them whether the VAE ran again in float32.
        """
        if self.vae is None:
            return latents, False
        return parts.decoded(self.vae, latents, lambda scaled: scaled / self.scaling_factor)

    def checked(self) -> StableDiffusion:
        """Return the model itself. Raise ModelError if it, or its scheduler, is not supported."""
        refuse_unsupported(self.name, {part: getattr(self, part) for part in PARTS})
        check_own(self.name, self.scheduler)
        return self


def _theirs(
    pipeline: Any, prompts: Mapping[str, Prompt], clip_skip: int | None = None
) -> dict[str, Arguments]:
    """Ask the pipeline for the embeddings of prompts, by branch."""
    guided = UNCOND in prompts
    negative = prompts[UNCOND].text if guided else None
    encoder = pipeline.text_encoder
    with with_text_model(encoder):
        cond, uncond = pipeline.encode_prompt(
            prompts[COND].text, encoder.device, 1, guided, negative, clip_skip=clip_skip
        )
    return {COND: {TEXT: cond}, UNCOND: {TEXT: uncond}}
