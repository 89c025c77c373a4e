"""A capture: self-attention maps of the layers that `capture.self_attention` names.

They say which pixel looks at which, and are large.
"""

from __future__ import annotations

from typing import Any

import torch

from probe.diffusion.family import Family
from probe.format.schema import ArraySpec, spec
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Grid, Plan, Values, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of
from probe.watching.measures import storage_dtype, storage_note, to_storage
from probe.watching.projections import Projections, Shapes
from probe.watching.rehearsal import self_attention
from probe.watching.together import rows_of


class SelfAttention(Capture):
    """Maps (branch, image, layer, head, y, x, key_y, key_x) in the storage dtype.

    Each is the softmax over keys of q k^T / sqrt(d).
    """

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._storage = plan, plan.recipe.capture.dtype
        self._projections = Projections(
            self_attention(model.unet),
            plan.self_layers,
            plan.rows,
            self._shapes,
            self._read,
            late=measures_late(model.device),
        )

    def arrays(self) -> list[ArraySpec]:
        plan, note, specs = self._plan, storage_note(self._storage), list[ArraySpec]()
        for grid, layers in plan.self_grids.items():
            group, (flat, _, _) = f"self_{grid_group(grid)}", self._shapes(grid)["self"]
            shape = (plan.calls, *flat[:-2], *grid, *grid)
            specs += [
                spec(group, "branch", value=list(plan.kept_branches)),
                spec(group, "layer", value=layers),
                spec(group, "self", shape, note.dtype, **note.attributes),
            ]
        return specs

    def watches(self) -> list[Watch]:
        return self._projections.watches()

    def wants(self, index: int, first: bool) -> bool:
        return index in self._plan.recorded

    def forget(self) -> None:
        self._projections.forget()

    def take(self, step: Any) -> Values:
        filled = self._projections.take().items()
        return {
            f"self_{grid_group(grid)}/self": parts["self"].unflatten(-1, grid).unflatten(-3, grid)
            for grid, parts in filled
        }

    def _shapes(self, grid: Grid) -> Shapes:
        plan, layers, pixels = self._plan, self._plan.self_grids[grid], grid[0] * grid[1]
        heads = heads_of(plan, layers, grid)
        lead = (len(plan.kept_branches), plan.rows.images, len(layers), heads)
        return {"self": ((*lead, pixels, pixels), storage_dtype(self._storage), 2)}

    def _read(
        self, path: str, query: torch.Tensor, key: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> None:
        module, rows = self._projections.modules[path], self._plan.rows
        q = rows_of(query, rows.kept).float().unflatten(-1, (module.heads, -1)).transpose(1, 2)
        k = rows_of(key, rows.kept).float().unflatten(-1, (module.heads, -1)).permute(0, 2, 3, 1)
        maps = to_storage(torch.matmul(q * module.scale, k).softmax(dim=-1), self._storage)
        parts["self"].copy_(maps.unflatten(0, (-1, rows.images)))
