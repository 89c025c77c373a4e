"""The recipe of a noising: a picture, its caption, and where and how often it is noised.

    noising = load_noising("experiments/noising.yaml", timesteps="100:1000:100")
    run = probe.record(noising)

A `Noising` is a recipe beside `Experiment`: strict, frozen, and stored whole in its recording. Its
steps are the timesteps, the noisiest first. Its draws of noise lie along the dimension `draw`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field

from probe.errors import ExperimentError
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.experiment import table as fields_table
from probe.settings.fields import Place, Places, Prompt
from probe.settings.loading import load_settings
from probe.settings.recipe import Recipe
from probe.text import shown


def _timesteps(value: object) -> object:
    """Return a list, or a text of numbers ("100,500") or of a range ("100:1000:100"), as a tuple.

    The noisiest timestep comes first. Raise ExperimentError.
    """
    timesteps: Any = value
    remedy = (
        "Write whole numbers from 0 up, such as 100,500,900, or a range that rises, such as "
        "100:1000:100."
    )
    if isinstance(value, np.ndarray):
        timesteps = value.tolist()
    elif isinstance(value, int) and not isinstance(value, bool):
        timesteps = [value]
    elif isinstance(value, str):
        spaceless = "".join(value.split())
        if bracketed := re.fullmatch(r"\[([0-9,]*)\]", spaceless):  # as YAML writes a list
            spaceless = bracketed[1]
        parts = spaceless.split(":" if ":" in value else ",")
        if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts) or (
            ":" in value and not 2 <= len(parts) <= 3
        ):
            raise ExperimentError(f"{shown(value)} is no choice of timesteps", remedy)
        timesteps = [int(part) for part in parts]
        if ":" in value:
            timesteps = list(range(*timesteps)) if timesteps[2:] != [0] else []
    is_list = isinstance(timesteps, list | tuple | range) and len(timesteps) > 0
    if not is_list or not all(type(t) is int and 0 <= t < 10**5 for t in timesteps):
        raise ExperimentError(f"{shown(value)} is no choice of timesteps", remedy)
    return tuple(sorted(set(timesteps), reverse=True))


Timesteps: TypeAlias = Annotated[tuple[int, ...], BeforeValidator(_timesteps)]


class Noising(Recipe):
    """The forward process: a picture, its caption, and where and how often it is noised."""

    kind: ClassVar[str] = "noising"
    across: ClassVar[str] = "draw"

    picture: Place | None = Field(
        default=None,
        description="The picture, a PNG or JPEG file: scaled to cover the size, cut to its "
        "centre; a path from the folder you are in.",
    )
    caption: Prompt = Field(
        default="",
        description="What is in the picture, for the UNet to read; empty: nothing is said.",
    )
    masks: Places = Field(
        default=(),
        max_length=100,
        description="Where things are, kept beside the picture: .npz files (arrays by word) or "
        ".png files (named by word).",
    )
    timesteps: Timesteps = Field(
        default=tuple(range(950, 0, -100)),
        max_length=1000,
        description="How much noise, by the model's t: a list in any order, or a range "
        '"50:1000:100"; 0 is the least.',
    )
    noises: int = Field(
        default=4,
        ge=1,
        le=64,
        description="How many draws of noise; the loss has its mean and spread over them.",
    )
    decode: bool = Field(
        default=True,
        description="Decode what the model takes for the clean picture, at every timestep.",
    )

    @property
    def texts(self) -> dict[str, str]:
        return {"cond": self.caption}

    @property
    def count(self) -> int:
        return self.noises

    @property
    def sampler(self) -> tuple[str, dict[str, Any]]:
        return "DDPM", {}  # it keeps variance one, and has every schedule: the model's own betas

    @property
    def guidance(self) -> tuple[float, float]:
        return 1.0, 0.0

    @property
    def decoded_every(self) -> int:
        return int(self.decode)


def load_noising(source: str | Path | Mapping[str, Any] | Noising, **changes: Any) -> Noising:
    """Return the settings in a YAML file or mapping, with changes on top. Raise ExperimentError.

    They are given as to `load_experiment`.
    """
    return load_settings(Noising, source, "noising", **changes)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, **changes: Any
) -> Experiment | Noising:
    """Return a recipe with changes on top. A file or a mapping is taken for an experiment.

    Raise ExperimentError.
    """
    if isinstance(source, Noising):
        return load_noising(source, **changes)
    if isinstance(source, Recipe) and not isinstance(source, Experiment):
        raise TypeError(f"{type(source).__name__} is no kind of recipe that is known")
    return load_experiment(source, **changes)


def table() -> str:
    """Return every field as a Markdown table."""
    return fields_table(Noising)
