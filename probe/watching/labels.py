"""Label the axes of attention: branches, tokens, words, layers, and the steps that were read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from probe.diffusion.family import Family
from probe.diffusion.prompts import Prompt
from probe.errors import ExperimentError
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Grid, Plan, grid_group


def token_labels(
    group: str,
    plan: Plan,
    branches: Sequence[str],
    positions: Sequence[int],
    encoder: str | None = None,
) -> list[ArraySpec]:
    """Return the coordinates branch, token, token_text, word and word_index of a group.

    They are as a text encoder reads the prompts (default: the first).
    """
    prompts = (
        plan.prompts
        if encoder is None
        else {branch: tokens[encoder] for branch, tokens in plan.tokens.items()}
    )

    def rows(of: Callable[[Prompt, int], Any], rest: Any) -> list[list[Any]]:
        return [[rest if p < 0 else of(prompts[b], p) for p in positions] for b in branches]

    def word(prompt: Prompt, position: int) -> str:
        return prompt.words[prompt.word_of[position]] if prompt.word_of[position] >= 0 else ""

    return [
        spec(group, "branch", value=list(branches)),
        spec(group, "token", value=np.array(positions)),
        spec(group, "token_text", value=rows(lambda prompt, p: prompt.tokens[p], "rest")),
        spec(group, "word", value=rows(word, "")),
        spec(group, "word_index", value=np.array(rows(lambda prompt, p: prompt.word_of[p], -1))),
    ]


def heads_of(plan: Plan, layers: Sequence[str], grid: Grid) -> int:
    """Return the number of heads of a grid's layers. Raise ExperimentError if they differ."""
    heads = {plan.rehearsal.heads[path] for path in layers}
    if len(heads) > 1:
        raise ExperimentError(
            f"capture.layers: the layers at {grid_group(grid)} differ in their number of heads.",
            "Choose layers of one kind.",
        )
    return heads.pop()


class GridLabels(Capture):
    """The coordinates of cross-attention on each grid."""

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._plan = plan

    def arrays(self) -> list[ArraySpec]:
        plan, specs = self._plan, list[ArraySpec]()
        recorded = np.zeros(plan.calls, np.uint8)
        recorded[list(plan.recorded)] = 1
        for grid, layers in plan.grids.items():
            group = grid_group(grid)
            specs += token_labels(group, plan, plan.kept_branches, plan.kept.positions)
            specs += [spec(group, "layer", value=layers), spec(group, "recorded", value=recorded)]
        return specs
