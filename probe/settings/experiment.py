"""What was asked: one run of Stable Diffusion as a frozen, strict value that a YAML file can hold.

    experiment = load_experiment("experiments/astronaut.yaml", steps=20, **{"capture.dtype":
    "float32"}) experiment.steps, experiment.capture.branches, experiment.identity()

An `Experiment` is stored whole in its recording, so a field means one thing and says it in its
description: `--help` and the table in docs/experiment.md are made of these. A field misspelled, a
value out of bounds or a YAML surprise (`yes`, `010`, a key written twice) is an `ExperimentError`
that names the file, the field and the remedy, and nothing runs.

Inside: `CaptureOptions`; `Recipe`, what any recording is asked for; `Experiment`; `load_experiment`
and `parse_experiment`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from probe.errors import ExperimentError
from probe.output import say
from probe.settings.fields import (
    SCHEDULERS,
    Globs,
    Line,
    Option,
    Place,
    Prompt,
    Revision,
    SchedulerName,
    StepsChoice,
    Strict,
    Words,
    steps_in,
)
from probe.settings.strict_yaml import LARGEST, read_text, read_yaml
from probe.text import UNCLEAN, did_you_mean, printable, shorten, shown

Settings = TypeVar("Settings", bound=Strict)


class CaptureOptions(Strict):
    """What is written down while the model draws.

    Less of it makes a smaller recording, never another picture.
    """

    attention: Literal["maps", "queries", "summary", "off"] = Field(
        default="maps",
        description="Cross-attention: maps (of every layer, head and token), queries (any token's "
        "map, even later), summary (head means) or off.",
    )
    self_attention: Globs = Field(
        default=(),
        max_length=200,
        description='Self-attention of which layers, which is large: globs such as "mid_block.*", or grids such as "8x8".',
    )
    branches: Literal["cond", "uncond", "both"] = Field(
        default="cond",
        description="Attention of which branch: cond (reads the prompt), uncond (reads the "
        "negative prompt) or both.",
    )
    tokens: Literal["prompt", "all"] = Field(
        default="prompt",
        description="Attention to which tokens: prompt (start, prompt, first end, one sum of the "
        "rest) or all of the model's.",
    )
    counterfactual: Words = Field(
        default=(),
        max_length=77,
        description="What each of these words did: the prediction with and without it, one more "
        "UNet call a step; * for every word.",
    )
    layers: Globs = Field(
        default=("*",),
        min_length=1,
        max_length=200,
        description='Attention of which layers: globs such as "up_blocks.*", or grids (height x width) such as "16x16".',
    )
    steps: StepsChoice = Field(
        default="all",
        description='Attention, statistics and activations at which steps: all, "start:stop:step", or "0,5,-1".',
    )
    dtype: Literal["float16", "float32", "sqrt_u8"] = Field(
        default="float16",
        description="How attention is stored: float16, float32, or sqrt_u8 (one byte: the square "
        "root in 255 levels).",
    )
    text: bool = Field(
        default=True,
        description="Record the text encoder: what each of its layers makes of the prompt, and "
        "its attention.",
    )
    statistics: bool = Field(
        default=True,
        description="Record statistics (mean, spread, extremes) of what each UNet and VAE block "
        "puts out.",
    )
    activations: Globs = Field(
        default=(),
        max_length=200,
        description='Record whole block outputs, which are large: globs such as "unet.mid_block.*" or "vae.decoder.*".',
    )

    def steps_of(self, calls: int) -> tuple[int, ...]:
        """The indices that `steps` chooses in a run of that many model calls, ascending, each
        once.
        """
        parts = steps_in(self.steps)
        chosen = list(range(calls))[parts] if isinstance(parts, slice) else parts
        allowed = (
            f"This run calls its model {calls} times: write indices from 0 to {calls - 1}, or from "
            f"-{calls} to -1."
        )
        if outside := [index for index in chosen if not -calls <= index < calls]:
            raise ExperimentError(f"capture.steps: {outside[0]} is not a step of this run", allowed)
        if not chosen:
            raise ExperimentError(
                f"capture.steps: {shown(self.steps)} chooses no step of this run", allowed
            )
        return tuple(sorted({index % calls for index in chosen}))


class Recipe(Strict):
    """What is asked of any recording: the model, where it runs, what is recorded, and where that is
    written.

    Final kinds are `Experiment`, which draws pictures, and `probe.settings.noising.Noising`, which
    adds noise to one.
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
        description="The model: emojiworld (bundled), a Hugging Face id, a diffusers directory, "
        "or one .safetensors file.",
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
        "complete recording; none, what the system likes.",
    )
    output: Place = Field(default="runs", description="Folder that recordings are written to.")

    @property
    @abstractmethod
    def texts(self) -> dict[str, str]:
        """The text of each branch that the model computes, uncond first."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many latents the model is given side by side: their length along `across`."""

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
    def run_name(self) -> str:
        """`name`, or else the prompt as a slug of at most 40 characters:
        "an-astronaut-scuba-diving".
        """
        ascii_only = (
            unicodedata.normalize("NFKD", self.texts["cond"])
            .encode("ascii", "ignore")
            .decode()
            .lower()
        )
        slug = re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")
        return (
            self.name
            or (slug if len(slug) <= 40 else slug[:41].rpartition("-")[0] or slug[:40])
            or "run"
        )

    def resolved(self) -> dict[str, JsonValue]:
        """Every field as plain JSON; the same kind of recipe, made from it, is equal."""
        return self.model_dump(mode="json")

    def identity(self) -> str:
        """8 hex characters of what was asked, whatever the run is called and wherever it is
        written.
        """
        asked = {key: value for key, value in self.resolved().items() if key not in self.not_asked}
        return hashlib.sha256(
            json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()[:8]

    @property
    def not_asked(self) -> tuple[str, ...]:
        """Fields that change nothing that is recorded."""
        return ("name", "output", "durability")

    @classmethod
    def ordered_fields(cls) -> dict[str, FieldInfo]:
        """The fields of one kind alone, then those that every kind has."""
        own = {
            name: field
            for name, field in cls.model_fields.items()
            if name not in Recipe.model_fields
        }
        return own | cls.model_fields


class Experiment(Recipe):
    """One run: the model, what it is asked to draw, how it gets there, and what is recorded on the
    way.
    """

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
        description="With an image: how much of it is given up to noise, and the share of the "
        "steps that are run; 1: all.",
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
        description=f"Who turns predictions into the next latents: {', '.join(SCHEDULERS)}; "
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

    @property
    def texts(self) -> dict[str, str]:
        guided = self.guidance_scale > 1
        return {**({"uncond": self.negative_prompt} if guided else {}), "cond": self.prompt}

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
        return (*super().not_asked, *(() if self.image else ("image", "strength")))


def load_experiment(
    source: str | Path | Mapping[str, Any] | Experiment, **overrides: Any
) -> Experiment:
    """The experiment in a YAML file or mapping, with `overrides` on top: `steps=20`,
    `capture={"text": False}` or `"capture.text"`.

    A mapping for `capture` changes the fields it names and no other. Every failure is an
    `ExperimentError`.
    """
    return load_settings(Experiment, source, "experiment", **overrides)


def load_settings(
    kind: type[Settings],
    source: str | Path | Mapping[str, Any] | Settings,
    where: str,
    **overrides: Any,
) -> Settings:
    """Settings of any kind, as `load_experiment` reads an experiment; `where` is what errors call a
    mapping.
    """
    if isinstance(source, kind):
        found = source
    elif isinstance(source, Mapping):
        found = _validate(kind, _merge({}, source), where)
    else:
        path = Path(str(source))
        found = _validate(kind, read_yaml(read_text(path), str(path)), printable(str(path)))
    return _validate(kind, _merge(found.model_dump(mode="json"), overrides)) if overrides else found


def parse_experiment(text: str, where: str = "experiment") -> Experiment:
    """The experiment in a YAML text; `where` is what its errors call it."""
    return _validate(Experiment, read_yaml(text, where), printable(where))


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        if not isinstance(name, str) or UNCLEAN.search(name):
            raise ExperimentError(
                f"{shown(name)}: this is not a field's name", "Fields are named by plain text."
            )
        first, dot, rest = name.partition(".")
        if dot and not (first and rest):
            raise ExperimentError(
                f"{shown(name)}: this is not a field's name",
                "Write the group and the field, such as capture.text.",
            )
        nested = {rest: value} if rest else value
        if rest or (name == "capture" and isinstance(value, Mapping)):
            below = base.get(first)
            below = (
                below.model_dump()
                if isinstance(below, BaseModel)
                else dict(below)
                if isinstance(below, Mapping)
                else {}
            )
            # Only the fields of `capture` are dotted further: a scheduler's option may have any
            # name.
            nested = _merge(below, nested) if first == "capture" else below | nested
        base[first] = nested
    return base


def _validate(kind: type[Settings], data: Mapping[str, Any], where: str = "") -> Settings:
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        every = problem.errors(include_input=False, include_url=False)
        # A list with a bad item is also "too short": keep the errors with none below them.
        above = {one["loc"][:-1] for one in every}
        errors = [one for one in every if one["loc"] not in above]
        # An unknown field comes first: it is a likelier slip than a wrong value, and the reason for
        # others.
        first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
        cause, remedy = _explain(kind, first, data)
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ExperimentError(
            f"{where}: {cause}{more}" if where else f"{cause}{more}", remedy
        ) from None


# Arguments of a diffusers pipeline that no experiment has, and what to do instead.
NOT_HERE = {
    **dict.fromkeys(
        ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds"),
        "Write the text as prompt: embeddings have no words.",
    ),
    **dict.fromkeys(
        ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        "Write the text as negative_prompt: embeddings have no words.",
    ),
    **dict.fromkeys(("latents", "generator"), "Set seed: the noise is drawn from it."),
    **dict.fromkeys(
        ("ip_adapter_image", "ip_adapter_image_embeds"),
        "Leave it out: IP-Adapters are not recorded.",
    ),
    **dict.fromkeys(
        ("clip_skip", "cross_attention_kwargs", "sigmas"), "Leave it out: it is not supported."
    ),
    **dict.fromkeys(
        ("callback_on_step_end", "callback", "output_type", "return_dict"),
        "Leave it out: every step is in the recording.",
    ),
    "num_images_per_prompt": "Write images.",
}

KINDS = {
    "int_type": ("a whole number", "Write a whole number, without quotes or a point."),
    "float_type": ("a number", "Write a number, without quotes."),
    "finite_number": ("finite", "Write a finite number."),
    "bool_type": ("true or false", "Write true or false."),
    "string_type": ("text", 'Write text, in quotes: "..."'),
    "string_unicode": ("text", 'Write text, in quotes: "..."'),
    "tuple_type": ("a list", 'Write a list: ["..."]'),
    "dict_type": ("a mapping", "Write names and values below it, or delete it."),
    "model_type": ("a mapping", "Write its fields below it, or delete it."),
}


def _explain(settings: type[Strict], error: Any, data: Mapping[str, Any]) -> tuple[str, str]:
    """A pydantic error as one line of cause and one of remedy."""
    kind, place, context = (
        error["type"],
        tuple(key for key in error["loc"] if key != "[key]"),
        error.get("ctx", {}),
    )
    field = "".join(
        f"[{key}]" if isinstance(key, int) else f".{shorten(printable(key))}" for key in place
    ).removeprefix(".")
    if isinstance(context.get("error"), ExperimentError):
        return f"{field}: {context['error'].cause}", context["error"].remedy
    names = [*settings.model_fields, *(f"capture.{name}" for name in CaptureOptions.model_fields)]
    if kind == "extra_forbidden":
        if settings is Experiment and "timesteps" in data and "caption" in data:
            return (
                f"{field}: this is a noising, not an experiment",
                "Run it with python -m probe.noising FILE.",
            )
        inside = place[0] == "capture" and len(place) > 1
        spellings = {
            name.rpartition(".")[2]: name
            for name in sorted(names, key=lambda name: ("." in name) == inside)
        }
        here = (CaptureOptions if inside else settings).model_fields
        if not inside and (instead := NOT_HERE.get(str(place[-1]))):
            return f"{field}: this argument of diffusers' pipelines has no field here", instead
        elsewhere = {
            "num_inference_steps": "steps",
            "cfg": "guidance_scale",
            "cfg_scale": "guidance_scale",
            "sampler": "scheduler",
        }
        elsewhere = {word: name for word, name in elsewhere.items() if name in names}
        return f"{field}: unknown field", did_you_mean(
            str(place[-1]), elsewhere | spellings
        ) or f"The fields here are {', '.join(here)}."
    value: Any = data
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        for key in place:
            value = getattr(value, key) if isinstance(value, BaseModel) else value[key]
    given = shown(value)
    model, name = (
        (CaptureOptions, place[1])
        if place[0] == "capture" and len(place) > 1
        else (settings, place[0])
    )
    declared = model.model_fields[str(name)]
    if kind in KINDS:
        return f"{field}: {given} is not {KINDS[kind][0]}", KINDS[kind][1]
    if kind in ("greater_than_equal", "less_than_equal"):
        bounds = {
            key: getattr(item, key)
            for item in declared.metadata
            for key in ("ge", "le")
            if hasattr(item, key)
        }
        problem = "less than {ge}" if kind == "greater_than_equal" else "more than {le}"
        return (
            f"{field}: {given} is {problem.format(**context)}",
            "Write a number from {ge} to {le}.".format(**bounds),
        )
    if kind == "literal_error":
        options = re.findall(r"'(\w+)'", context["expected"])
        meant = did_you_mean(given.strip("'"), {item: item for item in options})
        return f"{field}: {given} is not one of {', '.join(options)}", meant or "Write one of them."
    if kind.endswith("too_long"):
        return f"{field}: {given} is too long", f"At most {context['max_length']} fit here."
    return f"{field}: {given} does not fit", declared.description or ""


def table(kind: type[Recipe] = Experiment) -> str:
    """Every field as a Markdown table; those of `capture`, which others share, with the
    experiment's only.
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
