"""A capture: what a first look at a recording reads, the maps' sum over time and an overview."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from probe.analysis.maps import maps_of, probabilities, resize
from probe.diffusion.family import Family
from probe.errors import RecordingDamaged
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Derived, Grid, Plan, Store, Values, grid_group
from probe.watching.kept import measures_late
from probe.watching.labels import heads_of
from probe.watching.together import SCORES

AT_ONCE = 2**25  # bytes of the overview that are in memory together, if it is read back
GROWING = 2**30  # bytes of the host that may grow beside a GPU's loop
GROWING_THERE = 2**28  # bytes of the GPU, for each image


class Sums(Capture):
    """`time_sum` (token, branch, image, layer, head, y, x) of each grid, and one `overview`.

    The first is the sum of the maps over time. `overview` (token, step, y, x) is their mean over
    layers, heads and images, on the largest grid.

    Beside a GPU they grow from what is written, step by step, and nothing is read back; those of
    queries grow on the GPU, where maps are computed from them. Those of a resumed run begin with
    the steps that it has. On a CPU, which the model needs for itself, maps and queries are read
    back at the end; so is what is too large to grow.
    """

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._mode = plan, plan.recipe.capture.attention
        late, nbytes = measures_late(model.device), self._nbytes()
        self._grows = late and self._mode != "queries" and nbytes <= GROWING
        there = late and self._mode == "queries" and nbytes <= GROWING_THERE * plan.rows.images
        self._there = SumsOfQueries(plan, model.device) if there else None
        grows = self._grows or self._there is not None
        self.finishing = "" if grows else "Summing up the attention maps"
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
        stop = self._plan.recipe.on_nan == "stop"
        for index in self._plan.recorded if self._grows or self._there else ():
            if index >= store.committed:
                break
            if self._there is None:
                self._add({grid: self._maps(store, grid, index) for grid in self._plan.grids})
                continue
            groups = {grid: grid_group(grid) for grid in self._plan.grids}
            self._there.add(
                {grid: read_step(store, f"{g}/query", index, stop) for grid, g in groups.items()},
                {grid: store.read(f"{g}/key") for grid, g in groups.items()},
            )

    def seen(self, index: int, values: Values) -> None:
        if self._there is not None and index in self._plan.recorded:
            sides: list[dict[Grid, torch.Tensor]] = [{}, {}]
            for side, name in zip(sides, ("query", "key"), strict=True):
                for grid in self._plan.grids:
                    if (value := values.get(f"{grid_group(grid)}/{name}")) is not None:
                        side[grid] = _on_the_device(value)
            self._there.add(*sides)

    def arrived(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self._grows and index in self._plan.recorded:
            stored = {grid: arrays[f"{grid_group(grid)}/cross"] for grid in self._plan.grids}
            self._add({grid: probabilities(maps) for grid, maps in stored.items()})

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        plan, steps = self._plan, list(self._plan.recorded)
        if self._there is not None:
            self._sums, self._overview = self._there.take()
        if self._grows or self._there is not None:
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


class SumsOfQueries:
    """Sums of maps that grow where queries are: on a GPU.

    The maps are those of the queries as they are stored, in float32, a few layers at once.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self._plan, self._device = plan, device
        self._keys: dict[Grid, torch.Tensor] = {}
        self._sums: dict[Grid, torch.Tensor] = {}
        self._overview: list[torch.Tensor] = []
        largest = next(iter(plan.grids))
        smaller = [grid for grid in plan.grids if grid != largest]
        self._resized = {grid: _resizing(grid, largest, device) for grid in smaller}

    @torch.no_grad()
    def add(self, queries: Mapping[Grid, Any], keys: Mapping[Grid, Any]) -> None:
        """Add the maps of one step. `keys` may be left out after the first time.

        *Shape:* queries (branch, image, layer, head, key_feature, y, x), keys (branch, token,
        layer, head, key_feature).
        """
        for grid, given in keys.items():
            key = torch.as_tensor(given, device=self._device)
            self._keys[grid] = key.permute(0, 2, 3, 1, 4).clone(
                memory_format=torch.contiguous_format
            )
        means = []
        for grid, given in queries.items():
            mean = self._add(grid, torch.as_tensor(given, device=self._device).flatten(-2))
            mean = mean.unflatten(-1, grid)
            if grid in self._resized:
                rows, columns = self._resized[grid]
                mean = rows @ mean @ columns
            means.append(mean)
        self._overview.append(torch.stack(means).sum(0))

    def _add(self, grid: Grid, queries: torch.Tensor) -> torch.Tensor:
        """Add the maps of a grid. Return their sum over layers of means: (token, pixel)."""
        keys = self._keys[grid]
        branches, images, layers, heads, _, pixels = queries.shape
        lead, tokens = (branches, images, layers, heads), keys.shape[-2]
        if grid not in self._sums:
            self._sums[grid] = torch.zeros((*lead, tokens, pixels), device=self._device)
        most = max(1, SCORES // (4 * branches * images * heads * tokens * pixels))
        means = []
        for first in range(0, layers, most):
            part = slice(first, first + most)
            maps = (keys[:, None, part] @ queries[:, :, part].float()).softmax(-2)
            self._sums[grid][:, :, part] += maps
            means.append(maps[-1].mean(dim=(0, 2)).sum(0))  # the last branch: cond, if it was kept
        return torch.stack(means).sum(0)

    def take(self) -> tuple[dict[Grid, np.ndarray], list[np.ndarray]]:
        """Return the sum of each grid, as it is stored, and (token, y, x) of each step."""
        sums = {
            grid: total.movedim(4, 0).unflatten(-1, grid).cpu().numpy()
            for grid, total in self._sums.items()
        }
        overview = list(torch.stack(self._overview).cpu().numpy()) if self._overview else []
        return sums, overview


def _on_the_device(value: torch.Tensor | Derived) -> Any:
    """Return a value where it was computed: its tensor, or its part of one."""
    return value.make(*value.tensors) if isinstance(value, Derived) else value


def _resizing(grid: Grid, to: Grid, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices between which a map is put to have another size, as `resize` does it."""
    rows, columns = (
        torch.from_numpy(resize(np.eye(n, dtype=np.float32)[..., None], (m, 1))[..., 0]).to(device)
        for n, m in zip(grid, to, strict=True)
    )
    return rows.mT.contiguous(), columns


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
