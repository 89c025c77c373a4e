"""The kinds of values that settings take: text without hidden characters, globs, choices of steps.

A value that is not of its kind raises an `ExperimentError` that says what to write instead. The
module holds `SCHEDULERS` (our names for diffusers' classes), `Strict` (the base of all settings),
and the annotated types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from probe.errors import ExperimentError
from probe.settings.strict_yaml import LARGEST
from probe.text import UNCLEAN, did_you_mean, shown

SCHEDULERS: dict[str, tuple[str, dict[str, str | bool]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    # As Stable Diffusion ships it: no Runge-Kutta warm-up.
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM++2S": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2Ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}


def _clean(text: str) -> str:
    if unclean := UNCLEAN.search(text):
        # Python keeps bytes that the locale cannot read as these characters.
        if "\udc80" <= unclean[0] <= "\udcff":
            raise ExperimentError(
                "these bytes are no text in this terminal's encoding",
                "Set PYTHONUTF8=1, or write it in a UTF-8 file.",
            )
        raise ExperimentError(
            f"the character U+{ord(unclean[0]):04X} is not allowed",
            "Delete it: such characters hide what a text says.",
        )
    return text


def _line(text: str) -> str:
    if space := re.search(r"[\n\t]", text):
        name = "newline" if space[0] == "\n" else "tab"
        raise ExperimentError(
            f"{shown(text)} has a {name} (U+{ord(space[0]):04X}), which is not allowed here",
            f"Delete the {name}.",
        )
    if not text:
        raise ExperimentError("the text is empty", "Write something, or leave the field out.")
    return text


def _plain(value: object, depth: int = 2) -> object:
    """Return other packages' whole numbers, such as numpy's, as Python's own.

    Those in lists and in mappings of lists are changed too.
    """
    if type(value) is not bool and isinstance(value, Integral):
        return int(value)
    if type(value) in (list, tuple) and depth:
        return type(value)([_plain(item, depth - 1) for item in value])  # type: ignore[call-arg, attr-defined]
    if isinstance(value, dict) and depth:
        return {name: _plain(item, depth - 1) for name, item in value.items()}
    return value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _scalar(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    value = _tuple(value)
    items = value if isinstance(value, tuple) else (value,)
    try:
        if all(type(item) is not int or abs(item) <= LARGEST for item in items):
            return validate(value)
    except ValidationError:  # one sentence for all members of the union
        pass
    raise ExperimentError(
        f"{shown(value)} is not an option's value",
        "Write a number, true, false, text or a list of numbers.",
    )


def _steps_text(value: object) -> object:
    indices = value if isinstance(value, list | tuple) else (value,)
    if indices and all(type(index) is int and abs(index) < 10**6 for index in indices):
        return ",".join(map(str, indices))
    return value


def _steps_syntax(text: str) -> str:
    text = re.sub(r"\s*([,:])\s*", r"\1", text.strip())
    index = r"-?[0-9]{1,6}"
    if not re.fullmatch(
        rf"all|{index}(,{index})*|({index})?:({index})?(:(-?(?!0+$)[0-9]{{1,6}})?)?", text
    ):
        raise ExperimentError(
            f"{shown(text)} is not a choice of steps",
            'Write all, a slice such as "0:50:5", or indices such as "0,5,-1".',
        )
    return text


def steps_in(text: str) -> slice | list[int]:
    """Return what a choice of steps chooses: "all" and "0:50:5" as a slice, "0,5,-1" as indices.

    Raise ExperimentError.
    """
    text = _steps_syntax(text)
    if text == "all":
        return slice(None)
    if ":" in text:
        return slice(*(int(part) if part else None for part in text.split(":")))
    return [int(part) for part in text.split(",")]


def _layer(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.*?\[\]!-]{1,200}", text):
        raise ExperimentError(
            f"{shown(text)} is not a glob of layers",
            'Write dotted paths such as "up_blocks.*", or a grid such as "16x16".',
        )
    return text


def _scheduler(name: str) -> str:
    if name == "default" or name in SCHEDULERS:
        return name
    spellings = {"default": "default"} | {
        word.casefold(): key for key, (kind, _) in SCHEDULERS.items() for word in (key, kind)
    }
    raise ExperimentError(
        f"{shown(name)} is not a scheduler",
        did_you_mean(name, spellings) or f"Write default, {', '.join(SCHEDULERS)}.",
    )


def _revision(name: str | None) -> str | None:
    if name == "fp16":
        raise ExperimentError("'fp16' is not a revision any more", "Write variant: fp16 instead.")
    return name


def home() -> Path | None:
    """Return the user's home folder; None in a container that has none."""
    try:
        folder = Path.home()
    except RuntimeError:  # no HOME, and an account that is in no list
        return None
    return folder if folder.is_absolute() and len(folder.parts) > 1 else None


def from_home(text: str) -> str:
    """Return a path with the home folder as `~`: a shared recording hides the user's name."""
    own = home()
    if own is None or not Path(text).is_absolute():
        return text
    path = Path(re.sub("^/+", "/", text))
    if not path.is_relative_to(own):
        return text
    return "/".join(("~", *path.relative_to(own).parts))


def expand_home(text: str | Path) -> Path:
    """Return the path that a text names; a leading `~` is the user's home folder.

    A leading `~name` is that of another user. Raise ExperimentError if there is no home folder.
    """
    first, _, rest = str(text).partition("/")
    if not first.startswith("~"):
        return Path(text)
    try:
        folder = home() if first == "~" else Path(first).expanduser()
    except RuntimeError:  # nobody of that name: a folder is called so
        return Path(text)
    if folder is None:
        raise ExperimentError(
            f"{shown(str(text))}: you have no home folder here.", "Write the whole path, without ~."
        )
    return folder / rest.lstrip("/")


Text: TypeAlias = Annotated[str, AfterValidator(_clean)]
Line: TypeAlias = Annotated[Text, AfterValidator(_line), StringConstraints(max_length=1000)]
Place: TypeAlias = Annotated[Line, AfterValidator(from_home)]
Prompt: TypeAlias = Annotated[Text, Field(max_length=10_000)]
Globs: TypeAlias = Annotated[
    tuple[Annotated[str, AfterValidator(_layer)], ...], BeforeValidator(_tuple)
]
Words: TypeAlias = Annotated[tuple[Line, ...], BeforeValidator(_tuple)]
Places: TypeAlias = Annotated[tuple[Place, ...], BeforeValidator(_tuple)]
Option: TypeAlias = Annotated[
    bool | int | float | Text | tuple[int | float, ...], WrapValidator(_scalar)
]


StepsChoice: TypeAlias = Annotated[str, BeforeValidator(_steps_text), AfterValidator(_steps_syntax)]
SchedulerName: TypeAlias = Annotated[str, AfterValidator(_scheduler)]
Revision: TypeAlias = Annotated[Line | None, AfterValidator(_revision)]


class Strict(BaseModel):
    """The base of all settings: no unknown field, no guess at a type.

    A ValidationError never prints its input.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, data: object) -> object:
        if isinstance(data, Mapping):
            return {name: _plain(value) for name, value in data.items()}
        return data


class Lora(Strict):
    """A LoRA, and how strongly it acts."""

    path: Place = Field(description="Its .safetensors file, from the folder you are in.")
    scale: float = Field(
        default=1.0,
        ge=-100,
        le=100,
        description="How strongly it acts: 0 not at all, 1 as trained.",
    )


Loras: TypeAlias = Annotated[tuple[Lora, ...], BeforeValidator(_tuple)]
