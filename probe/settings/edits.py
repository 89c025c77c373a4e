"""What is changed inside the model while it draws: the list `edits` of an experiment, as data.

    edits:
      - {kind: mask, words: [astronaut], layers: ["up_blocks.*"], steps: "0:10"}
      - {kind: head, layers: ["mid_block.*"], heads: [3], how: zero, amount: 0.5}

Each edit has a kind, an `amount`, and says where it acts. At amount 0 nothing changes, to the bit;
at 1 the edit is whole. Between them the value is mixed: (1 - amount) unedited + amount edited.
Within one step the parts of the model come in the order in which they run; edits of one part are
made in the order in which they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from probe.errors import ExperimentError
from probe.settings.fields import Globs, Line, Place, Prompt, StepsChoice, Strict, steps_in
from probe.settings.strict_yaml import LARGEST
from probe.text import did_you_mean, shown
from probe.words import alike, occurrences, word_spans


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Branch: TypeAlias = Literal["cond", "uncond"]
Branches: TypeAlias = Literal["cond", "uncond", "both"]
Words: TypeAlias = Annotated[
    tuple[Line, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=77)
]
Heads: TypeAlias = Annotated[
    tuple[Annotated[int, Field(ge=0, le=1000)], ...], BeforeValidator(_tuple), Field(max_length=200)
]
Modules: TypeAlias = Annotated[Globs, Field(min_length=1, max_length=200)]
How: TypeAlias = Literal["resample", "mean", "zero"]
HOW = "zero; mean, over the places of the picture; or resample: as in the donor."


class Donor(Strict):
    """Another run of the same model, whose values are put into this one, step by step.

    It is this experiment without edits, with other fields; or a recording, whose latents are
    followed.
    """

    run: Place | None = Field(
        default=None, description="A recording, by its path; none: a run beside this one."
    )
    seed: int | None = Field(default=None, ge=0, le=LARGEST, description="Its seed.")
    prompt: Prompt | None = Field(default=None, description="Its prompt.")
    negative_prompt: Prompt | None = Field(default=None, description="Its negative prompt.")
    guidance_scale: float | None = Field(
        default=None, ge=0, le=1000, description="Its guidance scale."
    )

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Donor:
        if self.run is not None and self.changes:
            raise ExperimentError(
                "run: a recording has its own seed and prompt", "Name a run, or fields, not both."
            )
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The fields in which it differs from the run that it gives to."""
        fields = self.model_dump(exclude={"run"})
        return {name: value for name, value in fields.items() if value is not None}


class Edit(Strict):
    """What every edit has: how much of it, and when it acts."""

    part: ClassVar[str]  # of the run: text, attention, module, start, guidance
    donating: ClassVar[bool] = False  # whether it takes values from a donor

    amount: float = Field(
        default=1.0,
        ge=-100,
        le=100,
        description="0: nothing changes; 1: the whole edit; between: mixed; above 1, below 0: "
        "beyond it, or the other way.",
    )
    label: str = Field(default="", max_length=80, description="What a grid calls it.")
    steps: StepsChoice = Field(
        default="all", description='At which steps: all, "start:stop:step", or "0,5,-1".'
    )
    sigmas: Annotated[tuple[float, float], BeforeValidator(_tuple)] | None = Field(
        default=None, description="At which noise levels: [largest, smallest], both ends in."
    )

    @property
    def always(self) -> bool:
        """Whether it acts at every step, whatever the schedule."""
        return self.steps == "all" and self.sigmas is None

    def steps_of(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """Return the steps at which it acts, in a run of these noise levels."""
        calls = range(len(sigmas))
        choice = steps_in(self.steps)
        chosen = list(calls)[choice] if isinstance(choice, slice) else choice
        if outside := [step for step in chosen if not -len(sigmas) <= step < len(sigmas)]:
            raise ExperimentError(
                f"steps: step {outside[0]} is not one of the {len(sigmas)} of this run",
                f"Write indices from 0 to {len(sigmas) - 1}, or from -{len(sigmas)} to -1.",
            )
        high, low = self.sigmas or (float("inf"), 0.0)
        at = {step % len(sigmas) for step in chosen}
        steps = tuple(step for step in sorted(at) if low <= sigmas[step] <= high)
        if not steps:
            levels = f"{max(sigmas):.4g} to {min(sigmas):.4g}"
            raise ExperimentError(
                f"{self._when()}: no step of the run is among these",
                f"It has steps 0 to {len(sigmas) - 1}, with sigmas from {levels}.",
            )
        return steps

    def _when(self) -> str:
        """Return which of `steps` and `sigmas` were given, as they are written."""
        named = [] if self.steps == "all" else [f'steps "{self.steps}"']
        if self.sigmas is not None:
            named.append(f"sigmas [{self.sigmas[0]:g}, {self.sigmas[1]:g}]")
        return " and ".join(named)


class _OfWords(Edit):
    words: Words = Field(description="Which words, as the recording names them.")
    branch: Branch = Field(default="cond", description="In the prompt, or uncond: the negative.")


class _InAttention(_OfWords):
    part: ClassVar[str] = "attention"
    layers: Globs = Field(
        default=("*",), min_length=1, max_length=200, description="Cross-attention of which layers."
    )
    heads: Heads = Field(default=(), description="Which heads, from 0; none named: all.")


class Remove(_OfWords):
    """Words taken out of the text, before the text encoder reads it."""

    part: ClassVar[str] = "text"
    kind: Literal["remove"]


class OtherPrompt(Edit):
    """Another text in place of the prompt, or of the negative prompt."""

    part: ClassVar[str] = "text"
    kind: Literal["prompt"]
    text: Prompt = Field(description="The text that is read instead.")
    branch: Branch = Field(default="cond", description="The prompt, or uncond: the negative one.")


class Embedding(_OfWords):
    """The text encoder's output at the words' places, as another text has it at these places."""

    part: ClassVar[str] = "text"
    kind: Literal["embedding"]
    text: Prompt = Field(default="", description="The other text; empty: a prompt of no words.")


class Mask(_InAttention):
    """Words that no place attends to: masked before the softmax, the others take their share."""

    kind: Literal["mask"]


class Value(_InAttention):
    """Words whose value is zeroed: they are attended to, and say nothing."""

    kind: Literal["value"]


class Reweight(_InAttention):
    """Attention to words times `scale`, after the softmax (Hertz et al. 2022, section 4)."""

    kind: Literal["reweight"]
    scale: float = Field(ge=-100, le=100, description="The factor: 2 doubles what they say.")


class _OfValues(Edit):
    donating: ClassVar[bool] = True
    branch: Branches = Field(default="both", description="In which branch: cond, uncond or both.")
    how: How = Field(default="resample", description=HOW)
    donor: Donor = Field(default_factory=Donor, description="Of resample: another run.")


class Head(_OfValues):
    """What attention heads write: zeroed, made a mean, or taken from another run."""

    part: ClassVar[str] = "attention"
    kind: Literal["head"]
    layers: Modules = Field(description="Of which layers: globs, or grids such as 16x16.")
    heads: Heads = Field(default=(), description="Which heads, from 0; none named: all.")
    attention: Literal["cross", "self"] = Field(
        default="cross", description="Attention to the text, or of the picture to itself."
    )
    control: Literal["none", "random", "other_head"] = Field(
        default="none",
        description="A control to pair with: a random change of the same norm, or the same edit of "
        "random other heads of the grid.",
    )
    control_seed: int = Field(default=0, ge=0, le=LARGEST, description="Seed of the control.")


class _OfModules(_OfValues):
    part: ClassVar[str] = "module"
    control: Literal["none", "random"] = Field(
        default="none", description="A control to pair with: a random change of the same norm."
    )
    control_seed: int = Field(default=0, ge=0, le=LARGEST, description="Seed of the control.")


class Output(_OfModules):
    """Outputs of modules of the UNet, such as mid_block or up_blocks.1.attentions.0."""

    kind: Literal["output"]
    modules: Modules = Field(description="Which modules of the UNet: globs of dotted paths.")


class Skip(_OfModules):
    """Skip connections of the UNet, named by the resnet that takes them: up_blocks.1.resnets.0."""

    kind: Literal["skip"]
    modules: Modules = Field(description="The skips into which resnets of the up blocks: globs.")


class Map(Edit):
    """Attention maps of another run in place of this one's (Hertz et al. 2022).

    `replace` pairs the words of both prompts; `refine` takes the maps of tokens that both share.
    """

    part: ClassVar[str] = "attention"
    donating: ClassVar[bool] = True
    kind: Literal["map"]
    method: Literal["replace", "refine"] = Field(default="replace", description="Of which tokens.")
    attention: Literal["cross", "self"] = Field(
        default="cross", description="Attention to the text, or of the picture to itself."
    )
    layers: Globs = Field(
        default=("*",), min_length=1, max_length=200, description="Of which layers."
    )
    heads: Heads = Field(default=(), description="Which heads, from 0; none named: all.")
    branch: Branches = Field(default="cond", description="In which branch: cond, uncond or both.")
    donor: Donor = Field(description="The run that the maps are taken from.")


class Latents(Edit):
    """Latents of another run that go into a step in place of this one's."""

    part: ClassVar[str] = "start"
    donating: ClassVar[bool] = True
    kind: Literal["latents"]
    donor: Donor = Field(description="The run that the latents are taken from.")


class Noise(Edit):
    """Another first noise: mixed in, variance kept, or added."""

    part: ClassVar[str] = "start"
    kind: Literal["noise"]
    seed: int | None = Field(default=None, ge=0, le=LARGEST, description="Seed of that noise.")
    file: Place | None = Field(
        default=None, description="Or a .npy file, (image, channel, y, x), of variance one."
    )
    method: Literal["mix", "add"] = Field(
        default="mix",
        description="mix: sqrt(1 - amount^2) own + amount other; add: own + amount other.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Noise:
        if (self.seed is None) == (self.file is None):
            raise ExperimentError("it names no noise, or two", "Write a seed, or a file.")
        if self.method == "mix" and not 0 <= self.amount <= 1:
            raise ExperimentError(
                f"amount: {self.amount:g} cannot be mixed", "Write 0 to 1, or method: add."
            )
        if not self.always:
            raise ExperimentError("steps: the first noise is before all steps", "Leave them out.")
        return self


class Guidance(Edit):
    """Another guidance at some steps: a scale, one that moves from `scale` to `to`, a rescale."""

    part: ClassVar[str] = "guidance"
    kind: Literal["guidance"]
    scale: float | None = Field(default=None, ge=0, le=1000, description="The guidance scale.")
    to: float | None = Field(
        default=None, ge=0, le=1000, description="The scale at its last step; between: a line."
    )
    rescale: float | None = Field(default=None, ge=0, le=1, description="The guidance rescale.")

    @model_validator(mode="after")
    def _something(self) -> Guidance:
        if self.scale is None and (self.rescale is None or self.to is not None):
            raise ExperimentError("it changes nothing", "Write a scale, or a rescale.")
        if self.rescale is not None and not 0 <= self.amount <= 1:
            raise ExperimentError(
                f"amount: {self.amount:g} of a rescale would be less than none, or more than all",
                "Write 0 to 1.",
            )
        return self


class Steer(Edit):
    """Outputs of modules moved along a direction: what one recording has there, less another's.

    Both were recorded with `capture.activations` of these modules.
    """

    part: ClassVar[str] = "module"
    kind: Literal["steer"]
    modules: Modules = Field(description="Which modules of the UNet: globs of dotted paths.")
    toward: Place = Field(description="The recording to move toward, by its path.")
    away: Place = Field(description="The recording to move away from, by its path.")
    branch: Branches = Field(default="cond", description="In which branch: cond, uncond or both.")


AnyEdit: TypeAlias = Annotated[
    Remove
    | OtherPrompt
    | Embedding
    | Mask
    | Value
    | Reweight
    | Head
    | Output
    | Skip
    | Map
    | Latents
    | Noise
    | Guidance
    | Steer,
    Field(discriminator="kind"),
]
Edits: TypeAlias = Annotated[tuple[AnyEdit, ...], BeforeValidator(_tuple), Field(max_length=100)]
EDIT_KINDS: dict[str, type[Edit]] = {
    "remove": Remove,
    "prompt": OtherPrompt,
    "embedding": Embedding,
    "mask": Mask,
    "value": Value,
    "reweight": Reweight,
    "head": Head,
    "output": Output,
    "skip": Skip,
    "map": Map,
    "latents": Latents,
    "noise": Noise,
    "guidance": Guidance,
    "steer": Steer,
}


def mixed(own: float, other: float, amount: float) -> float:
    """Return (1 - amount) own + amount other, exact at both ends."""
    if amount < 0.5:
        return own + amount * (other - own)
    return other - (other - own) * (1 - amount)


def without_words(text: str, words: Sequence[str]) -> str:
    """Return a text without some of its words, each with the space before it.

    Raise ExperimentError for a word that is not in it.
    """
    for word in words:
        spans = word_spans(text)
        labels = [text[start:end] for start, end in spans]
        places = occurrences(word, labels)
        if not places:
            known = {alike(label): label for label in labels}
            raise ExperimentError(
                f"words: {shown(word)} is not a word of {shown(text)}",
                did_you_mean(alike(word), known) or f"Its words are {', '.join(labels) or 'none'}.",
            )
        for place in reversed(places):
            start, end = spans[place[0]][0], spans[place[-1]][1]
            text = text[:start].rstrip(" ") + text[end:] if start else text[end:].lstrip(" ")
    return text


def whole_text(edit: Edit) -> bool:
    """Return whether an edit gives the whole run another text, as if that had been written."""
    return isinstance(edit, Remove | OtherPrompt) and edit.always and edit.amount == 1


def other_text(edit: Edit, text: str) -> str:
    """Return the text that an edit of texts makes of another. Raise as `without_words` does."""
    if isinstance(edit, OtherPrompt):
        return edit.text
    assert isinstance(edit, Remove)
    return without_words(text, edit.words)


def edited_texts(texts: dict[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """Return each branch's text after the edits that give the whole run another one."""
    texts = dict(texts)
    for edit in edits:
        if whole_text(edit) and (branch := getattr(edit, "branch", "")) in texts:
            texts[branch] = other_text(edit, texts[branch])
    return texts


def other_text_steps(
    edits: Sequence[Edit], branches: Sequence[str], sigmas: Sequence[float]
) -> set[int]:
    """Return the steps at which one of some branches is told of another text than the run's own."""
    return {
        step
        for edit in edits
        if isinstance(edit, Remove | OtherPrompt) and not whole_text(edit)
        if edit.amount and edit.branch in branches
        for step in edit.steps_of(sigmas)
    }


def guidance_by_step(
    scale: float, rescale: float, edits: Sequence[Edit], sigmas: Sequence[float]
) -> list[tuple[float, float]]:
    """Return scale and rescale of guidance at every step."""
    levels = [(scale, rescale)] * len(sigmas)
    for edit in edits:
        if not isinstance(edit, Guidance):
            continue
        steps = edit.steps_of(sigmas)
        for number, step in enumerate(steps):
            own, own_rescale = levels[step]
            if edit.scale is not None:
                share = number / max(1, len(steps) - 1)
                last = edit.scale if edit.to is None else edit.to
                own = mixed(own, mixed(edit.scale, last, share), edit.amount)
            if edit.rescale is not None:
                own_rescale = mixed(own_rescale, edit.rescale, edit.amount)
            levels[step] = own, own_rescale
    return levels
