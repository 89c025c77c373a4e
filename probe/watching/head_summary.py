"""A capture: cross-attention averaged over each layer's heads, and each head in numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.format.schema import HEAD_STATISTICS, MOMENTS, ArraySpec, spec
from probe.watching.cross_attention import shares_of
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Derived, Grid, Plan, Values, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of
from probe.watching.measures import moments_of, storage_dtype, storage_note, to_storage
from probe.watching.projections import Projections, Shapes
from probe.watching.rehearsal import cross_attention
from probe.watching.together import Flat, MapsTogether, Sides, moments_from


class HeadSummary(Capture):
    """Mean maps (token, branch, image, layer, 1, y, x), their moments, and statistics of heads.

    `HEAD_STATISTICS` are those of every head. Moments and statistics are float32.
    """

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._storage = plan, plan.recipe.capture.dtype
        modules, late = cross_attention(model.unet), measures_late(model.device)
        self._projections = Projections(
            modules, plan.layers, plan.rows, self._shapes, self._read, plan.kept.tokens, late
        )
        self._together = MapsTogether(self._projections.modules, plan) if late else None

    def arrays(self) -> list[ArraySpec]:
        specs = []
        for grid, layers in self._plan.grids.items():
            group, calls, note = grid_group(grid), self._plan.calls, storage_note(self._storage)
            maps, moments, statistics = (shape for shape, _, _ in self._shapes(grid).values())
            shape = (calls, *maps[:-1], *grid)
            about = {**note.attributes, "heads": f"mean of {heads_of(self._plan, layers, grid)}"}
            specs += [
                spec(group, "moment", value=list(MOMENTS)),
                spec(group, "cross", shape, note.dtype, **about),
                spec(group, "moments", (calls, *moments)),
                spec(group, "head_statistic", value=list(HEAD_STATISTICS)),
                spec(group, "head_statistics", (calls, *statistics)),
            ]
        return specs

    def watches(self) -> list[Watch]:
        return self._projections.watches()

    def wants(self, index: int, first: bool) -> bool:
        return index in self._plan.recorded

    def forget(self) -> None:
        self._projections.forget()

    def take(self, step: Any) -> Values:
        if self._together is not None:
            return self._measured(self._together, self._projections.sides())
        values: Values = {}
        for grid, parts in self._projections.take().items():
            group = grid_group(grid)
            values[f"{group}/cross"] = parts["cross"].unflatten(-1, grid)
            values |= {f"{group}/{name}": parts[name] for name in ("moments", "head_statistics")}
        return values

    def _shapes(self, grid: Grid) -> Shapes:
        plan, layers = self._plan, self._plan.grids[grid]
        lead = (len(plan.kept.positions), len(plan.kept_branches), plan.rows.images, len(layers))
        each_head = (*lead, heads_of(plan, layers, grid), len(HEAD_STATISTICS))
        return {
            "cross": ((*lead, 1, grid[0] * grid[1]), storage_dtype(self._storage), 3),
            "moments": ((*lead, 1, len(MOMENTS)), torch.float32, 3),
            "head_statistics": (each_head, torch.float32, 3),
        }

    @torch.no_grad()
    def _measured(self, together: MapsTogether, sides: Sides) -> Values:
        """Return all three of all layers, from queries and keys that were kept."""
        names = {grid: f"{grid_group(grid)}/cross" for grid in self._plan.grids}
        shapes = {
            names[grid]: (*self._shapes(grid)["cross"][0][:-1], *grid) for grid in self._plan.grids
        }
        device = next(iter(sides.values()))[0].device
        flat = Flat(shapes, storage_dtype(self._storage), device)
        parts: dict[Grid, list[torch.Tensor]] = {grid: [] for grid in self._plan.grids}
        for group, maps in together.maps(sides):
            logs = torch.xlogy(maps, maps).sum(-1, keepdim=True)
            numbers = [together.moments(group, maps), logs, maps.amax(-1, keepdim=True)]
            parts[group.grid].append(torch.cat(numbers, dim=-1))
            mean = together.apart(group, maps).mean(dim=4, keepdim=True)
            place = flat.part(names[group.grid])[:, :, :, group.layers].flatten(-2)
            stored = to_storage(mean, self._storage) if place.dtype == torch.uint8 else mean
            place.copy_(stored)
        values = flat.values()
        for grid, of_grid in parts.items():
            whole = functools.partial(together.whole, grid)
            for name, make in (("moments", _mean_moments), ("head_statistics", _each_head(grid))):
                derived = Derived(
                    tuple(of_grid), lambda *n, make=make, all_of=whole: make(all_of(n))
                )
                values[f"{grid_group(grid)}/{name}"] = derived
        return values

    def _read(
        self, path: str, query: torch.Tensor, key: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> None:
        plan, module, grid = self._plan, self._projections.modules[path], self._plan.layers[path]
        lead = (len(plan.kept.positions), len(plan.kept_branches), plan.rows.images)
        maps = query.new_empty((*lead, module.heads, query.shape[1]), dtype=torch.float32)
        for at, shares in shares_of(query, key, module, plan):
            maps[at] = shares.transpose(0, 1)
        over_space = maps / maps.sum(-1, keepdim=True)
        entropy = -torch.xlogy(over_space, over_space).sum(-1, keepdim=True)
        mean = maps.mean(dim=3, keepdim=True)
        parts["cross"].copy_(to_storage(mean, self._storage))
        parts["moments"].copy_(moments_of(mean, grid))
        greatest = maps.amax(-1, keepdim=True)
        statistics = torch.cat([moments_of(maps, grid), entropy, greatest], dim=-1)
        parts["head_statistics"].copy_(statistics)


def _mean_moments(numbers: np.ndarray) -> np.ndarray:
    """Return the moments of the mean over heads, from the numbers of each."""
    return moments_from(numbers[..., : len(MOMENTS)].mean(axis=-2, keepdims=True))


def _each_head(grid: Grid) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes the statistics of each head from its numbers.

    They are the means of the map and its products with y and x, the sum of p log p, and the
    greatest value. Over space, p / sum p has the entropy log(sum p) - sum(p log p) / sum p.
    """

    def made(numbers: np.ndarray) -> np.ndarray:
        means, logs, greatest = numbers[..., :-2], numbers[..., -2:-1], numbers[..., -1:]
        total = means[..., :1].astype(np.float64) * math.prod(grid)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = (np.log(total) - logs / total).astype(np.float32)
        return np.concatenate([moments_from(means), entropy, greatest], axis=-1)

    return made
