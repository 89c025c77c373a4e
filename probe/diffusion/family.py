"""The seam to a model: what the loop, the captures and the proofs may ask of any family of models.

    conditioning = family.condition("a cat", "")
    predict = family.predictor(conditioning, images=2, guidance_scale=7.5)
    predict(index, model_input, t)                  # Predictions

A family is one file: `probe.diffusion.sd` (Stable Diffusion 1 and 2), `probe.diffusion.sdxl`. Its
name is the attribute `family` of its recordings; `probe.format.dimensions` says what readers have
to know of it without the model. The loop (`probe.diffusion.sampling`) scales the latents and calls
a `Predict`, nothing else of the model. Recorded predictions are another `Predict` (`replaying`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch

from probe.diffusion.guidance import guided
from probe.diffusion.prompts import OverLong, Prompt
from probe.diffusion.schedule import Schedule
from probe.format.attributes import MIXED
from probe.words import RULES

# What the denoiser is given beside latents and t, by the names of its arguments.
Arguments = Mapping[str, torch.Tensor]
# A text as each text encoder reads it, by the encoder's name.
Tokens = Mapping[str, Prompt]
UNCOND, COND = "uncond", "cond"
TEXT = "encoder_hidden_states"  # the argument that cross-attention reads


@dataclass(frozen=True)
class Predictions:
    """What a model said at one call.

    `branches` holds its output for each branch, in the order in which it computed them;
    `prediction` is the guided one, which the scheduler gets. *Shape:* each (image, channel, y, x).
    """

    branches: Mapping[str, torch.Tensor]
    prediction: torch.Tensor


# (model_input, t, arguments): what `Family.call` takes and gives.
Call = Callable[[torch.Tensor, torch.Tensor, Arguments], torch.Tensor]
# (index, model_input, t): `model_input` is scaled already, and has one row an image.
Predict = Callable[[int, torch.Tensor, torch.Tensor], Predictions]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told, by branch: its arguments, one row each, and their tokens."""

    arguments: Mapping[str, Arguments]
    tokens: Mapping[str, Tokens]

    def rows(self, branches: Sequence[str], images: int) -> dict[str, torch.Tensor]:
        """Return the arguments of one batch, (branch x image, ...).

        Raise ValueError for a branch that is missing.
        """
        if UNCOND in branches and UNCOND not in self.arguments:
            raise ValueError("this conditioning was made without its unconditional branch")
        return stacked([repeated(self.arguments[branch], images) for branch in branches])

    @property
    def cond(self) -> Prompt:
        """The prompt, as the first text encoder reads it."""
        return next(iter(self.tokens[COND].values()))

    @property
    def cond_embedding(self) -> torch.Tensor:
        """What cross-attention reads of the prompt. *Shape:* (1, token, feature)."""
        return self.arguments[COND][TEXT]

    @property
    def uncond_embedding(self) -> torch.Tensor | None:
        """What cross-attention reads of the negative prompt; None without guidance.

        *Shape:* (1, token, feature).
        """
        return self.arguments[UNCOND][TEXT] if UNCOND in self.arguments else None


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of the denoiser.

    Cross-attention reads the text, self-attention the picture.
    """

    kind: Literal["cross", "self"]
    module: Any

    @property
    def heads(self) -> int:
        return int(self.module.heads)


class Family(Protocol):
    """A model as its parts, and everything that the rest of this package asks of it.

    `vae` is None for a model that works on pixels. `pipeline` is the one that the parts were taken
    from, if any.
    """

    @property
    def family(self) -> str:
        """The attribute `family` of its recordings: `sd` or `sdxl`."""
        ...

    @property
    def name(self) -> str: ...
    @property
    def unet(self) -> Any: ...
    @property
    def vae(self) -> Any | None: ...
    @property
    def scheduler(self) -> Any: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The only words that the model knows; None for a model of many words."""
        ...

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoders' last layers the prompt skips; None: none."""
        ...

    @property
    def files(self) -> Mapping[str, str]:
        """The digests of what decides bits beside the model's own files, by path.

        They are LoRAs, and embeddings.
        """
        ...

    @property
    def embeds(self) -> Mapping[str, Arguments] | None:
        """What the denoiser is told of each branch, from a file; None: the texts are encoded."""
        ...

    @property
    def pipeline(self) -> Any | None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def decoding_dtype(self) -> torch.dtype:
        """The number format in which the VAE decodes; `dtype`, but for a VAE that is upcast."""
        ...

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per latent, along one side."""
        ...

    @property
    def scaling_factor(self) -> float:
        """Latents are the VAE's output times this, so that their variance is about one."""
        ...

    @property
    def prediction_type(self) -> str: ...

    # --- its parts ---

    def components(self) -> dict[str, torch.nn.Module]:
        """Return every module with weights, by name: `unet`, `vae`, and each text encoder."""
        ...

    def text_encoders(self) -> dict[str, tuple[Any, Any]]:
        """Return each text encoder and its tokenizer, by name."""
        ...

    def attention_layers(self) -> dict[str, AttentionLayer]:
        """Return the denoiser's attention layers by dotted path."""
        ...

    def skeleton(self) -> Self:
        """Return the same model on the meta device: shapes without weights or work."""
        ...

    def digest(self, how: str = MIXED) -> str:
        """Return the digest of every weight and buffer, 16 hex characters.

        `how` names the algorithm, as a recording does. Raise ModelError for an unknown one.
        """
        ...

    def with_loras(self, wanted: Sequence[Any]) -> Self:
        """Return the model with these LoRAs (`path`, `scale`) on it, and no others.

        They are put on the modules that it shares with the model it was made from.
        """
        ...

    def with_scheduler(self, name: str, options: Mapping[str, Any]) -> Self:
        """Return the same model with another scheduler (`default`: its own) and its `options`."""
        ...

    def latent_shape(
        self, images: int, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Return (image, channel, y, x) of the latents for a size in pixels."""
        ...

    # --- text ---

    def tokens(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Tokens:
        """Tokenize a text for each text encoder, as the pipeline does."""
        ...

    def read(self, text: str, over_long: OverLong = "error", rules: int = RULES) -> Prompt:
        """Tokenize a text for the first text encoder."""
        ...

    def encode_prompt(self, tokens: Tokens, branch: str = COND) -> dict[str, torch.Tensor]:
        """Return the denoiser's arguments for the text of a branch: one row each."""
        ...

    def reads(self, tokens: Tokens, branch: str) -> bool:
        """Return whether the text encoders read the text of a branch.

        Where they do not, the denoiser is given zeros.
        """
        ...

    def text_mask(self, prompt: Prompt) -> torch.Tensor | None:
        """Return a prompt's attention mask for the text encoder, (1, token), if it takes one."""
        ...

    def condition(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        guided: bool = True,
        over_long: OverLong = "error",
    ) -> Conditioning:
        """Encode the prompt and, for guidance, the negative prompt."""
        ...

    def check_reading(self, tokens: Mapping[str, Tokens]) -> None:
        """Hold each branch's encoded text against what the pipeline makes of it.

        Raise ModelError if a bit differs.
        """
        ...

    def blank(self, rows: int, tokens: int) -> dict[str, torch.Tensor]:
        """Return arguments of the right shapes and no meaning, for texts of `tokens` tokens."""
        ...

    # --- the denoiser ---

    def call(
        self, model_input: torch.Tensor, t: torch.Tensor, arguments: Arguments
    ) -> torch.Tensor:
        """Call the denoiser once. *Shape:* (row, channel, y, x), and as many rows of arguments."""
        ...

    def guidance_rule(self, guidance_scale: float) -> str:
        """Return how branches become the prediction, by its name in `probe.format.dimensions`."""
        ...

    def predictor(
        self,
        conditioning: Conditioning,
        images: int,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        call: Call | None = None,
    ) -> Predict:
        """Return the model as a `Predict`.

        It is guided, by the rule of this family, where `guidance_scale` is above 1. `call` is
        asked in place of the model's own.
        """
        ...

    # --- where a run begins, and its noise levels ---

    def begin(
        self,
        generators: Sequence[torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> torch.Tensor:
        """Return the noise that a run begins from, of variance one, for a size in pixels.

        Each image's noise is what its generator gives next. *Shape:* (image, channel, y, x), on
        the model's device.
        """
        ...

    def encode_picture(
        self, picture: np.ndarray, generators: Sequence[torch.Generator] = ()
    ) -> torch.Tensor:
        """Encode a picture, (y, x, rgb) uint8, to latents of the model's scale.

        Return a sample of the VAE's posterior for each generator; without any, the posterior's
        mean. *Shape:* (image, channel, y, x). Raise NotFinite, and ModelError if the family does
        not begin from a picture.
        """
        ...

    def schedule(
        self, steps: int, height: int | None = None, width: int | None = None, begin: int = 0
    ) -> Schedule:
        """Return the noise level of every call from `begin` on, for a size in pixels."""
        ...

    def scheduled(self, steps: int, height: int | None = None, width: int | None = None) -> Any:
        """Return a fresh scheduler whose timesteps are set on the model's device."""
        ...

    # --- pictures ---

    def pixels(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Decode latents to (image, rgb, y, x), about -1 to 1.

        Return beside them whether the VAE ran again in float32.
        """
        ...

    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Decode latents to (image, y, x, rgb) uint8 on the CPU.

        Return beside them whether the VAE ran again in float32.
        """
        ...


def repeated(arguments: Arguments, images: int) -> dict[str, torch.Tensor]:
    """Return the arguments of one row for several images."""
    return {
        name: value.repeat(images, *[1] * (value.ndim - 1)) for name, value in arguments.items()
    }


def stacked(several: Sequence[Arguments]) -> dict[str, torch.Tensor]:
    """Return the rows of several arguments in one batch, in their order."""
    return {name: torch.cat([arguments[name] for arguments in several]) for name in several[0]}


def replaying(recorded: Iterable[Predictions], predict: Predict) -> Predict:
    """Return a `Predict` that gives the recorded predictions first, and then asks `predict`."""
    left = iter(recorded)

    def replay(index: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        recording = next(left, None)
        return predict(index, model_input, t) if recording is None else recording

    return replay


def batched(
    family: Family,
    conditioning: Conditioning,
    images: int,
    guidance_scale: float,
    guidance_rescale: float,
    call: Call | None = None,
) -> Predict:
    """Return a `Predict` that asks for all branches in one batch, unconditional first.

    `call` is asked in place of the family's own.
    """
    branches = (UNCOND, COND) if guidance_scale > 1.0 else (COND,)
    arguments = conditioning.rows(branches, images)

    def predict(_: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        said = ask_branches(call or family.call, branches, model_input, t, arguments)
        return Predictions(said, guided(said, guidance_scale, guidance_rescale))

    return predict


def ask_branches(
    call: Call,
    branches: Sequence[str],
    model_input: torch.Tensor,
    t: torch.Tensor,
    arguments: Arguments,
) -> dict[str, torch.Tensor]:
    """Return what the denoiser says for each branch, asked in one batch: (branch x image, ...)."""
    batch = model_input if len(branches) == 1 else torch.cat([model_input] * len(branches))
    outputs = call(batch, t, arguments).chunk(len(branches))
    return dict(zip(branches, outputs, strict=True))
