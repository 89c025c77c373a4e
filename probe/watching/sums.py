"""A capture: what a first look at a recording reads, the maps' sum over time and an overview."""

from __future__ import annotations

import math

import numpy as np
import torch

from probe.analysis.maps import maps_of, probabilities, resize
from probe.diffusion.family import Family
from probe.errors import RecordingDamaged
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Grid, Plan, Store, grid_group
from probe.watching.labels import heads_of

AT_ONCE = 2**25  # bytes of the overview that are in memory together


class Sums(Capture):
    """`time_sum` (token, branch, image, layer, head, y, x) of each grid, and one `overview`.

    The first is the sum of the maps over time. `overview` (token, step, y, x) is their mean over
    layers, heads and images, on the largest grid.
    """

    component, finishing = "", "Summing up the attention maps"

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._mode = plan, plan.recipe.capture.attention

    def arrays(self) -> list[ArraySpec]:
        sums = [spec(grid_group(grid), "time_sum", self._shape(grid)) for grid in self._plan.grids]
        largest = next(iter(self._plan.grids))
        overview = (len(self._plan.kept.positions), self._plan.calls, *largest)
        return [*sums, spec(grid_group(largest), "overview", overview)]

    def _shape(self, grid: Grid) -> tuple[int, ...]:
        plan, layers = self._plan, self._plan.grids[grid]
        heads = 1 if self._mode == "summary" else heads_of(plan, layers, grid)
        rows = (len(plan.kept.positions), len(plan.kept_branches), plan.rows.images)
        return (*rows, len(layers), heads, *grid)

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        plan, largest = self._plan, next(iter(self._plan.grids))
        sums = {grid: np.zeros(self._shape(grid), np.float32) for grid in plan.grids}
        tokens = len(plan.kept.positions)
        # A token's steps are one file: few writes of many steps.
        together = max(1, AT_ONCE // (4 * tokens * math.prod(largest)))
        for first in range(0, len(plan.recorded), together):
            steps = list(plan.recorded[first : first + together])
            overview = np.zeros((tokens, len(steps), *largest), np.float32)
            for column, index in enumerate(steps):
                for grid in plan.grids:
                    maps = self._maps(store, grid, index)
                    sums[grid] += maps
                    kept = maps[:, -1]  # the last branch: cond, if it was kept
                    overview[:, column] += resize(kept.mean(axis=(1, 3)).sum(axis=1), largest)
            at = (slice(None), steps)
            store.write(f"{grid_group(largest)}/overview", overview / len(plan.layers), at=at)
        for grid, total in sums.items():
            store.write(f"{grid_group(grid)}/time_sum", total)
        return []

    def _maps(self, store: Store, grid: Grid, index: int) -> np.ndarray:
        group, stop = grid_group(grid), self._plan.recipe.on_nan == "stop"
        if self._mode == "queries":
            queries = read_step(store, f"{group}/query", index, stop)
            return maps_of(queries, store.read(f"{group}/key"))
        return probabilities(read_step(store, f"{group}/cross", index, stop))


def read_step(store: Store, path: str, index: int, stop: bool) -> np.ndarray:
    """Return one committed step of a variable. Raise RecordingDamaged if its file is gone.

    Zarr reads a missing file as NaN. With `stop`, the run stops at NaN, so none can have been
    recorded.
    """
    value = store.read(path, at=index)
    if stop and value.dtype.kind == "f" and np.isnan(value).all():
        raise RecordingDamaged(
            f"{path} of step {index} is not there any more.", "Record it again: probe rerun."
        )
    return value
