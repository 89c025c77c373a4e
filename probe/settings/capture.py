"""What is recorded: the settings below `capture` in every recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from probe.errors import ExperimentError
from probe.settings.fields import Globs, StepsChoice, Strict, Words, steps_in
from probe.text import shown


class CaptureOptions(Strict):
    """What is recorded while the model draws.

    Recording less makes a smaller file, never another picture.
    """

    attention: Literal["maps", "queries", "summary", "off"] = Field(
        default="maps",
        description="Cross-attention: maps (of every layer, head and token), queries (any token's "
        "map, even later), summary (head means) or off.",
    )
    self_attention: Globs = Field(
        default=(),
        max_length=200,
        description="Self-attention of which layers, which is large: globs such as "
        '"mid_block.*", or grids such as "8x8".',
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
        description='Attention of which layers: globs such as "up_blocks.*", or grids '
        '(height x width) such as "16x16".',
    )
    steps: StepsChoice = Field(
        default="all",
        description="Attention, statistics and activations at which steps: all, "
        '"start:stop:step", or "0,5,-1".',
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
        description="Record whole block outputs, which are large: globs such as "
        '"unet.mid_block.*" or "vae.decoder.*".',
    )

    def steps_of(self, calls: int) -> tuple[int, ...]:
        """Return the indices that `steps` chooses among `calls` model calls: ascending, each once.

        Raise ExperimentError if there is none, or one that the run does not have.
        """
        choice = steps_in(self.steps)
        chosen = list(range(calls))[choice] if isinstance(choice, slice) else choice
        remedy = (
            f"This run calls its model {calls} times: write indices from 0 to {calls - 1}, or from "
            f"-{calls} to -1."
        )
        if outside := [index for index in chosen if not -calls <= index < calls]:
            raise ExperimentError(f"capture.steps: {outside[0]} is not a step of this run", remedy)
        if not chosen:
            cause = f"capture.steps: {shown(self.steps)} chooses no step of this run"
            raise ExperimentError(cause, remedy)
        return tuple(sorted({index % calls for index in chosen}))
