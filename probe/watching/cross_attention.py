"""A capture: cross-attention maps of every recorded layer, head and token, at each step.

For a layer with H heads on a grid of N = y * x positions, with q (N, H, d) and k (77, H, d), a
head's map is

    softmax over tokens of (k @ q^T) / sqrt(d)     (77, N): at each pixel, tokens sum to one

(Rombach et al. 2022, section 3.3). q and k are widened to float32 first: float16 would round their
products by 3e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from probe.diffusion.family import Family
from probe.format.schema import MOMENTS, ArraySpec, spec
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Derived, Grid, Plan, Values, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of
from probe.watching.measures import (
    attention_maps,
    pixel_plane,
    storage_dtype,
    storage_note,
    to_storage,
)
from probe.watching.projections import Projections, Shapes
from probe.watching.rehearsal import cross_attention
from probe.watching.together import Flat, MapsTogether, Sides, moments_from

IN_CACHE = 2**18  # scores: 1 MiB


class CrossAttention(Capture):
    """Maps (token, branch, image, layer, head, y, x) in the storage dtype, and their moments.

    Moments are float32: the mass (mean over pixels) and the centroid (y, x in 0..1) of each map
    before it is rounded for storage.
    """

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._storage = plan, plan.recipe.capture.dtype
        modules, late = cross_attention(model.unet), measures_late(model.device)
        self._projections = Projections(
            modules, plan.layers, plan.rows, self._shapes, self._read, plan.kept.tokens, late
        )
        self._together = MapsTogether(self._projections.modules, plan) if late else None
        self._planes: dict[Grid, torch.Tensor] = {}

    def arrays(self) -> list[ArraySpec]:
        specs = []
        for grid in self._plan.grids:
            group, note, calls = grid_group(grid), storage_note(self._storage), self._plan.calls
            maps, moments = (shape for shape, _, _ in self._shapes(grid).values())
            specs += [
                spec(group, "moment", value=list(MOMENTS)),
                spec(group, "cross", (calls, *maps[:-1], *grid), note.dtype, **note.attributes),
                spec(group, "moments", (calls, *moments)),
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
            values[f"{grid_group(grid)}/cross"] = parts["cross"].unflatten(-1, grid)
            values[f"{grid_group(grid)}/moments"] = parts["moments"]
        return values

    def _shapes(self, grid: Grid) -> Shapes:
        plan, layers = self._plan, self._plan.grids[grid]
        rows = (len(plan.kept.positions), len(plan.kept_branches), plan.rows.images)
        lead = (*rows, len(layers), heads_of(plan, layers, grid))
        return {
            "cross": ((*lead, grid[0] * grid[1]), storage_dtype(self._storage), 3),
            "moments": ((*lead, len(MOMENTS)), torch.float32, 3),
        }

    @torch.no_grad()
    def _measured(self, together: MapsTogether, sides: Sides) -> Values:
        """Return maps and moments of all layers, from queries and keys that were kept."""
        shapes = {
            f"{grid_group(grid)}/cross": (*self._shapes(grid)["cross"][0][:-1], *grid)
            for grid in self._plan.grids
        }
        device = next(iter(sides.values()))[0].device
        flat = Flat(shapes, storage_dtype(self._storage), device)
        means: dict[Grid, list[torch.Tensor]] = {grid: [] for grid in self._plan.grids}
        for group, maps in together.maps(sides):
            means[group.grid].append(together.moments(group, maps))
            place = flat.part(f"{grid_group(group.grid)}/cross")[:, :, :, group.layers].flatten(-2)
            stored = to_storage(maps, self._storage) if place.dtype == torch.uint8 else maps
            place.copy_(together.apart(group, stored))
        return flat.values() | {
            f"{grid_group(grid)}/moments": Derived(
                tuple(parts), lambda *found, g=grid: moments_from(together.whole(g, found))
            )
            for grid, parts in means.items()
        }

    def _read(
        self, path: str, query: torch.Tensor, key: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> None:
        module, grid = self._projections.modules[path], self._plan.layers[path]
        maps, moments = parts.values()
        if grid not in self._planes:
            self._planes[grid] = pixel_plane(grid, query.device)
        for at, shares in shares_of(query, key, module, self._plan):
            moments[at] = (shares @ self._planes[grid]).transpose(0, 1)
            stored = to_storage(shares, self._storage) if maps.dtype == torch.uint8 else shares
            maps[at] = stored.transpose(0, 1)
        moments[..., 1:] /= moments[..., :1]


def shares_of(
    query: torch.Tensor, key: torch.Tensor, module: Any, plan: Plan
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield a layer's maps in parts, (head, token, pixel) float32, each with its index.

    The index is one into (token, branch, image, head). On a CPU a part is as many heads as keep
    their scores in the cache; a GPU wants few and large parts.
    """
    heads, on_cpu = module.heads, query.device.type == "cpu"
    together = max(1, IN_CACHE // (query.shape[1] * plan.kept.tokens)) if on_cpu else heads
    for b, branch in enumerate(plan.kept_branches):
        for image, row in enumerate(plan.rows.of(branch)):
            q, k = (side[row].unflatten(-1, (heads, -1)).transpose(0, 1) for side in (query, key))
            for first in range(0, heads, together):
                part = slice(first, first + together)
                maps = attention_maps(q[part], k[part], module.scale, plan.kept.end + 1)
                yield (slice(None), b, image, part), maps
