"""A capture: the image side of cross-attention. With the text side it gives the map of any token.

    map = softmax over tokens of key . query

(Vaswani et al. 2017.) Keys are stored with their factor 1 / sqrt(d).
"""

from __future__ import annotations

from typing import Any

import torch

from probe.diffusion.family import Family
from probe.errors import ExperimentError
from probe.format.schema import ArraySpec, spec
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Grid, Plan, Values, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of
from probe.watching.projections import Projections, Shapes
from probe.watching.rehearsal import cross_attention
from probe.watching.together import Flat, Sides, by_head


class Queries(Capture):
    """Queries (branch, image, layer, head, key_feature, y, x) in float16.

    They are float32 if that is the storage dtype.
    """

    def __init__(self, model: Family, plan: Plan):
        self._plan = plan
        # A query is no probability: it has a sign and no bound, so sqrt_u8 cannot hold it.
        self._dtype = torch.float32 if plan.recipe.capture.dtype == "float32" else torch.float16
        self._late = measures_late(model.device)
        self._projections = Projections(
            cross_attention(model.unet),
            plan.layers,
            plan.rows,
            self._shapes,
            self._read,
            plan.kept.tokens,
            self._late,
        )

    def arrays(self) -> list[ArraySpec]:
        kind = str(self._dtype).removeprefix("torch.")
        shapes = {grid: self._shapes(grid)["query"][0] for grid in self._plan.grids}
        return [
            spec(grid_group(grid), "query", (self._plan.calls, *shape[:-1], *grid), kind)
            for grid, shape in shapes.items()
        ]

    def watches(self) -> list[Watch]:
        return self._projections.watches()

    def wants(self, index: int, first: bool) -> bool:
        return index in self._plan.recorded

    def forget(self) -> None:
        self._projections.forget()

    def take(self, step: Any) -> Values:
        if self._late:
            return self._stacked(self._projections.sides())
        filled = self._projections.take().items()
        return {
            f"{grid_group(grid)}/query": parts["query"].unflatten(-1, grid)
            for grid, parts in filled
        }

    @torch.no_grad()
    def _stacked(self, sides: Sides) -> Values:
        """Return the queries of all layers, which were kept."""
        shapes = {grid: (*self._shapes(grid)["query"][0][:-1], *grid) for grid in self._plan.grids}
        names = {grid: f"{grid_group(grid)}/query" for grid in shapes}
        device = next(iter(sides.values()))[0].device
        flat = Flat({names[grid]: shape for grid, shape in shapes.items()}, self._dtype, device)
        rows, images = self._plan.rows.kept, self._plan.rows.images
        for grid, layers in self._plan.grids.items():
            heads = heads_of(self._plan, layers, grid)
            stacked = torch.cat([by_head(sides[path][0], rows, heads) for path in layers])
            apart = stacked.unflatten(0, (len(layers), -1, images))
            place = flat.part(names[grid]).flatten(-2)
            place.copy_(apart.permute(1, 2, 0, 3, 5, 4))
        return flat.values()

    def _shapes(self, grid: Grid) -> Shapes:
        plan, layers = self._plan, self._plan.grids[grid]
        heads = heads_of(plan, layers, grid)
        lead = (len(plan.kept_branches), plan.rows.images, len(layers), heads)
        return {"query": ((*lead, width_of(plan, grid), grid[0] * grid[1]), self._dtype, 2)}

    def _read(
        self, path: str, query: torch.Tensor, _: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> None:
        heads, images = self._projections.modules[path].heads, self._plan.rows.images
        rows = query[self._plan.rows.kept].unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
        parts["query"].copy_(rows.unflatten(0, (-1, images)))


def width_of(plan: Plan, grid: Grid) -> int:
    """Return the features of a head's query on a grid. Raise ExperimentError if layers differ."""
    paths = plan.grids[grid]
    heads = heads_of(plan, paths, grid)
    widths = {plan.rehearsal.outputs[f"unet.{path}.to_q"][-1] // heads for path in paths}
    if len(widths) > 1:
        raise ExperimentError(
            f"capture.layers: the layers at {grid_group(grid)} differ in their width.",
            "Choose layers of one kind, or capture.attention: maps.",
        )
    return widths.pop()
