"""What every recording is asked for: the model, its device, what is recorded, and where."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator
from pydantic.fields import FieldInfo

from probe.errors import ExperimentError
from probe.settings.capture import CaptureOptions
from probe.settings.fields import Line, Loras, Place, Revision, Strict
from probe.settings.strict_yaml import LARGEST

LATER = (
    "loras",
    "clip_skip",
    "prompt_embeds",
)  # fields that were added after recordings had been made
# Fields that change nothing that is recorded.
UNRECORDED = ("name", "output", "durability", "graphs")


class Recipe(Strict):
    """What every recording is asked for: the model, where it runs, what is recorded, and where to.

    The kinds of recipes are `Experiment`, which draws pictures, and `Noising`, which adds noise to
    one.
    """

    kind: ClassVar[str]  # as the attribute `kind` of a recording
    across: ClassVar[str]  # the dimension of what the model is given side by side

    name: str = Field(
        default="",
        pattern=r"^[a-z0-9-]{0,60}$",
        description="Name of the recording: up to 60 of a-z, 0-9 and -; empty: made of the text.",
    )
    model: Place = Field(
        default="emojiworld",
        description="The model: emojiworld, emojiworld-pixels or emojiworld-latents (bundled), a "
        "Hugging Face id, a diffusers directory, or one .safetensors file.",
    )
    revision: Revision = Field(
        default=None,
        description="Commit, tag or branch of a Hugging Face model; none: its main branch.",
    )
    variant: Line | None = Field(
        default=None,
        description="Which of a model's weight files, such as fp16; none: the plain ones.",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Number format: float32, float16 or bfloat16; auto: float16 on CUDA, float32 "
        "elsewhere.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
        description="Where the model runs: auto, cpu, cuda, cuda:N or mps.",
    )
    loras: Loras = Field(
        default=(),
        max_length=100,
        description="LoRAs on the model, a list of path (a .safetensors file) and scale (1 as "
        "trained, 0 as without it); in a file, not on the command line.",
    )
    clip_skip: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="How many of the text encoder's last layers the prompt skips; the negative "
        "prompt skips none, as in diffusers; none, or 0: all are used.",
    )
    prompt_embeds: Place | None = Field(
        default=None,
        description="A .safetensors file of text embeddings in place of the encoded text, by "
        "diffusers' names; the text then only labels them, and none is written by default.",
    )
    over_long: Literal["error", "cut"] = Field(
        default="error",
        description="A text with more tokens than the model reads: error, or cut what does not "
        "fit.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=LARGEST,
        description="Seed of the first noise: the same seed and fields, the same bits. Picture or "
        "draw i, from 0, has seed + i.",
    )
    height: int | None = Field(
        default=None,
        ge=8,
        le=4096,
        description="Height of the picture in pixels; none: the model's own.",
    )
    width: int | None = Field(
        default=None,
        ge=8,
        le=4096,
        description="Width of the picture in pixels; none: the model's own.",
    )
    capture: CaptureOptions = Field(
        default_factory=CaptureOptions, description="What is recorded on the way."
    )
    on_nan: Literal["stop", "record"] = Field(
        default="stop",
        description="When a number is not finite: stop and keep the steps, or record it (a pixel "
        "as 0).",
    )
    durability: Literal["step", "run", "none"] = Field(
        default="run",
        description="What stays after a power cut: step, every step once it is written; run, a "
        "complete recording; none, what the system wrote by then.",
    )
    graphs: Literal["auto", "off"] = Field(
        default="auto",
        description="CUDA graphs: auto, where a run on CUDA is long enough to gain by them, and "
        "only with the same bits; or off.",
    )
    output: Place = Field(default="runs", description="Folder that recordings are written to.")

    @model_validator(mode="after")
    def _embeds_fit(self) -> Self:
        """Raise ExperimentError for what needs a text encoder, where none reads the text."""
        if self.prompt_embeds is not None:
            for name, asked in self.needs_text.items():
                if asked:
                    raise ExperimentError(
                        f"{name}: prompt_embeds are given, so no text encoder reads the text.",
                        f"Leave out {name}, or prompt_embeds.",
                    )
        return self

    @property
    def needs_text(self) -> dict[str, bool]:
        """The settings that need a text encoder to read the text, and whether they are set."""
        inside = any(glob.startswith("text_encoder") for glob in self.capture.activations)
        return {
            "clip_skip": bool(self.clip_skip),
            "capture.counterfactual": bool(self.capture.counterfactual),
            "capture.activations of a text encoder": inside,
        }

    @property
    @abstractmethod
    def texts(self) -> dict[str, str]:
        """The text of each branch that the model predicts, uncond first."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many latents the model is given at once: their length along `across`."""

    @property
    @abstractmethod
    def sampler(self) -> tuple[str, dict[str, Any]]:
        """The scheduler by our name, and its options by diffusers' names."""

    @property
    @abstractmethod
    def guidance(self) -> tuple[float, float]:
        """Scale and rescale of guidance; (1, 0) is none."""

    @property
    @abstractmethod
    def decoded_every(self) -> int:
        """Decode the latents of every so many steps; 0: of none."""

    @property
    def named_by(self) -> str:
        """The text that its name is made of."""
        return self.texts["cond"]

    @property
    def run_name(self) -> str:
        """`name`, or else the prompt as a slug: an-astronaut-scuba-diving.

        A slug has at most 40 characters.
        """
        decomposed = unicodedata.normalize("NFKD", self.named_by)
        plain = decomposed.encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
        if len(slug) > 40:
            slug = slug[:41].rpartition("-")[0] or slug[:40]
        return self.name or slug or "run"

    def resolved(self) -> dict[str, JsonValue]:
        """Return every field as plain JSON. The same kind of recipe made from it is equal."""
        return self.model_dump(mode="json")

    def identity(self) -> str:
        """Return 8 hex characters: a hash of every field that changes what is recorded."""
        fields = self.resolved()
        relevant = {name: fields[name] for name in fields if name not in self.not_asked}
        text = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def not_asked(self) -> tuple[str, ...]:
        """Fields that change nothing that is recorded, such as its name.

        A field of `LATER` that is not set counts as none: recipes of older versions keep their
        identity.
        """
        unset = tuple(name for name in LATER if not getattr(self, name))
        return (*UNRECORDED, *unset)

    @classmethod
    def ordered_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields of this kind alone, then those that every kind has."""
        fields = cls.model_fields
        own = {name: fields[name] for name in fields if name not in Recipe.model_fields}
        return own | fields
