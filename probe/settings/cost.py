"""What is counted or measured of a model: at which sizes, at which f, and of which run.

    settings = load_cost("experiments/cost-sd14.yaml", sizes="512,1024")

A `Cost` is read as an experiment is: strict, each error with its remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from probe.errors import ExperimentError
from probe.settings.fields import Place, Strict
from probe.settings.loading import load_settings
from probe.text import shown

FACTORS = (1, 2, 4, 8, 16, 32)
MOST_SIDE, MOST_LISTED = 4096, 20
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _listed(value: object) -> list[Any]:
    """Return a list, a text "1,8" or one value as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[] ").split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def _factors(value: object) -> object:
    remedy = f"Write some of {', '.join(map(str, FACTORS))}: f: [1, 8]"
    factors = []
    for item in _listed(value):
        number = int(item) if isinstance(item, str) and re.fullmatch("[0-9]{1,3}", item) else item
        if type(number) is not int or number not in FACTORS:
            raise ExperimentError(f"{shown(item)} is no f of an autoencoder here", remedy)
        factors.append(number)
    if not factors:
        raise ExperimentError("no f is given", remedy)
    return tuple(sorted(set(factors)))


def _sizes(value: object) -> object:
    remedy = f"Write sides in pixels, up to {MOST_SIDE}, or heights and widths: [512, 512x768]"
    sizes = []
    for item in _listed(value):
        if isinstance(item, list | tuple):
            sides = [str(side) for side in item]
        else:
            sides = re.split(r"\s*[x×]\s*", str(item))
        sides = sides * 2 if len(sides) == 1 else sides
        plain = len(sides) == 2 and all(re.fullmatch("[1-9][0-9]{0,5}", side) for side in sides)
        if isinstance(item, bool) or not plain:
            raise ExperimentError(f"{shown(item)} is no size", remedy)
        if max(map(int, sides)) > MOST_SIDE:
            raise ExperimentError(f"{shown(item)} is larger than {MOST_SIDE} pixels", remedy)
        sizes.append((int(sides[0]), int(sides[1])))
    if not sizes:
        raise ExperimentError("no size is given", remedy)
    return tuple(dict.fromkeys(sizes))


Factors: TypeAlias = Annotated[
    tuple[int, ...], BeforeValidator(_factors), Field(max_length=MOST_LISTED)
]
Sizes: TypeAlias = Annotated[
    tuple[tuple[int, int], ...], BeforeValidator(_sizes), Field(max_length=MOST_LISTED)
]


class Cost(Strict):
    """What is counted of a model, in pixels and in latents."""

    model: Place = Field(
        default="sd14",
        description="sd14, sd21, sdxl, small or emojiworld, or a local diffusers folder; only its "
        "configs are read.",
    )
    f: Factors = Field(
        default=FACTORS,
        description="Pixels per latent along one side: some of 1, 2, 4, 8, 16, 32; at 1 the same "
        "network works on pixels.",
    )
    sizes: Sizes = Field(
        default=((512, 512),),
        description="Sizes of pictures in pixels: a side, or a height and a width, 512x768.",
    )
    steps: int = Field(default=50, ge=1, le=1000, description="Calls of the denoiser in a run.")
    guidance: bool = Field(
        default=True, description="Whether each step asks with and without the prompt."
    )
    batch: int = Field(default=1, ge=1, le=1024, description="Pictures that are drawn at once.")
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="Number format, for what is counted in bytes."
    )
    attention_up_to: int = Field(
        default=64,
        ge=1,
        le=MOST_SIDE,
        description="The widest grid on which the cheaper pixel network attends.",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Cost:
        for height, width in self.sizes:
            for f in self.f:
                if height % f or width % f:
                    fitting = tuple(max(f, side // f * f) for side in (height, width))
                    raise ExperimentError(
                        f"sizes: {height} x {width} pixels are no whole number of latents at "
                        f"f = {f}",
                        f"Take {fitting[0]}x{fitting[1]}, or leave {f} out of f.",
                    )
        return self

    @property
    def bytes_per_number(self) -> int:
        return BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Return how many rows the denoiser is given at each step."""
        return self.batch * (2 if self.guidance else 1)


def load_cost(source: str | Path | Mapping[str, Any] | Cost, **changes: Any) -> Cost:
    """Return the settings in a YAML file or mapping, with changes on top. Raise ExperimentError."""
    return load_settings(Cost, source, "cost", **changes)


def table() -> str:
    """Return every field as a Markdown table."""
    lines = ["| field | default | what it is |", "|---|---|---|"]
    for name, field in Cost.model_fields.items():
        lines.append(f"| `{name}` | `{json.dumps(field.default)}` | {field.description} |")
    return "\n".join(lines)
