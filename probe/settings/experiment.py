"""The recipe of a picture: one run of Stable Diffusion as a frozen, strict value.

    experiment = load_experiment("experiments/astronaut.yaml", steps=20)
    experiment.steps, experiment.capture.branches, experiment.identity()

An `Experiment` is stored whole in its recording. Each field has a description: `--help` and the
table in docs/experiment.md are made of these. A misspelled field, a value out of bounds or a YAML
surprise (`yes`, `010`, a key written twice) raises an `ExperimentError` before anything runs. It
names the file, the field and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from probe.output import say
from probe.settings.capture import CaptureOptions
from probe.settings.edits import Edits, edited_texts
from probe.settings.fields import SCHEDULERS, Line, Option, Place, Prompt, SchedulerName
from probe.settings.loading import load_settings, validate
from probe.settings.recipe import Recipe
from probe.settings.strict_yaml import read_yaml
from probe.text import printable

TEXT_KINDS = ("remove", "prompt", "embedding")  # edits that have another text encoded


class Experiment(Recipe):
    """One run: the model, what to draw, how to get there, and what is recorded on the way."""

    kind: ClassVar[str] = "generation"
    across: ClassVar[str] = "image"

    prompt: Prompt = Field(default="An astronaut scuba diving", description="What to draw.")
    negative_prompt: Prompt = Field(
        default="",
        description="What guidance steers away from; empty: a picture of nothing in particular.",
    )
    image: Place | None = Field(
        default=None,
        description="A picture to begin from (PNG or JPEG), scaled to cover the size and cut to "
        "its centre; none: pure noise.",
    )
    strength: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="With an image: how much of it noise replaces, and the share of the steps "
        "that are run; 1: all.",
    )
    images: int = Field(
        default=1,
        ge=1,
        le=64,
        description="How many pictures to draw from this prompt: picture i, counted from 0, with "
        "seed + i.",
    )
    scheduler: SchedulerName = Field(
        default="default",
        description=f"What turns predictions into the next latents: {', '.join(SCHEDULERS)}; "
        "default: the model's own.",
    )
    scheduler_options: dict[Line, Option] = Field(
        default_factory=dict,
        max_length=100,
        description="Settings of the scheduler by diffusers' names, such as use_karras_sigmas.",
    )
    steps: int = Field(
        default=50,
        ge=1,
        le=1000,
        description="How many denoising steps; some schedulers call the model more often (Heun, "
        "PNDM).",
    )
    guidance_scale: float = Field(
        default=3.0,
        ge=0,
        le=1000,
        description="How strongly the prompt pulls (diffusers' s): 3 suits emojiworld, 7.5 Stable "
        "Diffusion; up to 1: no guidance.",
    )
    guidance_rescale: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How far guidance's excess contrast is taken back: 0 not at all, 1 fully.",
    )
    eta: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Fresh noise at each DDIM step: 0 none (deterministic), 1 as much as DDPM.",
    )
    decode_every: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Decode the latents to a picture every so many steps; 0: never.",
    )

    edits: Edits = Field(
        default=(),
        description="What is changed inside the model: a list of edits, each of a kind; see "
        "docs/edits.md.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_text_beside_embeds(cls, data: object) -> object:
        """Where embeddings are given, the default prompt is not theirs: it is empty."""
        if isinstance(data, Mapping) and data.get("prompt_embeds") is not None:
            return {"prompt": "", **data}
        return data

    @property
    def needs_text(self) -> dict[str, bool]:
        reads = any(
            edit.kind in TEXT_KINDS or (donor is not None and donor.run is None)
            for edit in self.edits
            for donor in (getattr(edit, "donor", None),)
        )
        return {**super().needs_text, "edits of texts, or with a donor beside": reads}

    @model_validator(mode="after")
    def _edits_fit(self) -> Experiment:
        edited_texts(self._unedited_texts(), self.edits)  # a word that is not there is refused
        return self

    def _unedited_texts(self) -> dict[str, str]:
        guided = self.guidance_scale > 1
        return {**({"uncond": self.negative_prompt} if guided else {}), "cond": self.prompt}

    @property
    def texts(self) -> dict[str, str]:
        return edited_texts(self._unedited_texts(), self.edits)

    @property
    def unedited(self) -> Experiment:
        """The same experiment without edits: the parent of an edited run."""
        return self.model_copy(update={"edits": ()})

    @property
    def count(self) -> int:
        return self.images

    @property
    def sampler(self) -> tuple[str, dict[str, Any]]:
        return self.scheduler, self.scheduler_options

    @property
    def guidance(self) -> tuple[float, float]:
        return self.guidance_scale, self.guidance_rescale

    @property
    def decoded_every(self) -> int:
        return self.decode_every

    @property
    def not_asked(self) -> tuple[str, ...]:
        unset = [name for name in ("edits",) if not getattr(self, name)]
        return (*super().not_asked, *unset, *(() if self.image else ("image", "strength")))

    @property
    def named_by(self) -> str:
        return self.prompt


def load_experiment(
    source: str | Path | Mapping[str, Any] | Experiment, **overrides: Any
) -> Experiment:
    """Return the experiment in a YAML file or mapping, with `overrides` on top.

    They are fields, `steps=20`, or dotted fields, `**{"capture.text": False}`. A mapping for
    `capture` changes the fields that it names and no others. Raise ExperimentError, whatever is
    wrong.
    """
    return load_settings(Experiment, source, "experiment", **overrides)


def parse_experiment(text: str, where: str = "experiment") -> Experiment:
    """Return the experiment in a YAML text. Its errors call the text `where`."""
    return validate(Experiment, read_yaml(text, where), printable(where))


def table(kind: type[Recipe] = Experiment) -> str:
    """Return every field as a Markdown table.

    The fields of `capture`, which all recipes share, are in the table of `Experiment` alone.
    """
    lines = ["| field | default | what it is |", "|---|---|---|"]
    kinds: tuple[tuple[str, dict[str, FieldInfo]], ...] = (
        ("", kind.ordered_fields()),
        ("capture.", CaptureOptions.model_fields),
    )
    for prefix, fields in kinds[: 2 if kind is Experiment else 1]:
        for name, field in fields.items():
            if name != "capture":
                default = json.dumps(field.get_default(call_default_factory=True))
                lines.append(f"| `{prefix}{name}` | `{default}` | {field.description} |")
    return "\n".join(lines)


if __name__ == "__main__":
    say(*table().split("\n"))
