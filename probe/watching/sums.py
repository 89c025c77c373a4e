"""A capture: what a first look at a recording reads, the maps' sum over time and an overview."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from probe.analysis.maps import maps_of, probabilities, resize
from probe.diffusion.family import Family
from probe.errors import RecordingDamaged
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Grid, Plan, Store, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of

AT_ONCE = 2**25  # bytes of the overview that are in memory together, if it is read back
GROWING = 2**30  # bytes of the host that may grow beside a GPU's loop


class Sums(Capture):
    """`time_sum` (token, branch, image, layer, head, y, x) of each grid, and one `overview`.

    The first is the sum of the maps over time. `overview` (token, step, y, x) is their mean over
    layers, heads and images, on the largest grid.

    Beside a GPU they grow from what is written, step by step, and nothing is read back. Those of a
    resumed run begin with the steps that it has. On a CPU, which the model needs for itself, maps
    are read back at the end; so are queries, and what is too large to grow.
    """

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._mode = plan, plan.recipe.capture.attention
        beside = measures_late(model.device) and self._mode != "queries"
        self._grows = beside and self._nbytes() <= GROWING
        self.finishing = "" if self._grows else "Summing up the attention maps"
        self._sums: dict[Grid, np.ndarray] = {}
        self._overview: list[np.ndarray] = []  # (token, y, x) of each recorded step

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

    def _nbytes(self) -> int:
        """Return the bytes of everything that would grow."""
        plan, largest = self._plan, next(iter(self._plan.grids))
        overview = len(plan.kept.positions) * len(plan.recorded) * math.prod(largest)
        return 4 * (overview + sum(math.prod(self._shape(grid)) for grid in plan.grids))

    def begin(self, store: Store) -> None:
        if self._grows:
            for index in self._plan.recorded:
                if index < store.committed:
                    self._add({grid: self._maps(store, grid, index) for grid in self._plan.grids})

    def arrived(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self._grows and index in self._plan.recorded:
            stored = {grid: arrays[f"{grid_group(grid)}/cross"] for grid in self._plan.grids}
            self._add({grid: probabilities(maps) for grid, maps in stored.items()})

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        plan, steps = self._plan, list(self._plan.recorded)
        if self._grows:
            self._write_overview(store, steps)
        else:
            # A token's steps are one file: few writes of many steps.
            of_a_step = 4 * len(plan.kept.positions) * math.prod(next(iter(plan.grids)))
            together = max(1, AT_ONCE // of_a_step)
            for first in range(0, len(steps), together):
                for index in steps[first : first + together]:
                    self._add({grid: self._maps(store, grid, index) for grid in plan.grids})
                self._write_overview(store, steps[first : first + together])
        for grid in plan.grids:
            total = self._sums.pop(grid, None)
            zeros = np.zeros(self._shape(grid), np.float32)
            store.write(f"{grid_group(grid)}/time_sum", zeros if total is None else total)
        return []

    def _add(self, of_a_step: Mapping[Grid, np.ndarray]) -> None:
        """Add the maps of one step, as float32 probabilities: the steps in their order."""
        largest = next(iter(of_a_step))
        overview = np.zeros((len(self._plan.kept.positions), *largest), np.float32)
        for grid, maps in of_a_step.items():
            if grid not in self._sums:
                self._sums[grid] = np.zeros(self._shape(grid), np.float32)
            self._sums[grid] += maps
            kept = maps[:, -1]  # the last branch: cond, if it was kept
            overview += resize(kept.mean(axis=(1, 3)).sum(axis=1), largest)
        self._overview.append(overview)

    def _write_overview(self, store: Store, steps: list[int]) -> None:
        """Write the overview of these steps, which were added last."""
        if not steps:
            return
        means, self._overview = np.stack(self._overview, axis=1), []
        means /= len(self._plan.layers)
        largest = next(iter(self._plan.grids))
        store.write(f"{grid_group(largest)}/overview", means, at=(slice(None), steps))

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
