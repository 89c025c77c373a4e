"""Measure a whole call of the model in a few large operations: pure functions of kept tensors.

A GPU spends longer on a launch than on what it computes. So layers of one grid are multiplied
together, and all outputs of modules are measured together. What is small is finished on the host.

    maps        softmax(q k) of the layers of a grid, cut into groups of `SCORES` bytes
    statistics  mean, variance, least and greatest of equally long rows of all outputs
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from probe.format.schema import STATISTICS
from probe.watching.interface import Derived, Grid, Plan, Values
from probe.watching.measures import pixel_plane

SCORES = 64 * 2**20  # bytes of the scores that are in memory together
OUTPUTS = 96 * 2**20  # bytes of the outputs, in float32, that are in memory together
ROW = 4096  # values of a row of outputs, at most

Sides = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Layers of one grid that are multiplied together; `first` is the number of the first one."""

    grid: Grid
    first: int
    paths: tuple[str, ...]
    heads: int

    @property
    def layers(self) -> slice:
        """Return which layers of their grid they are."""
        return slice(self.first, self.first + len(self.paths))


def groups_of(plan: Plan) -> list[Group]:
    """Return the layers of a plan in groups: one grid and width, and at most `SCORES` bytes."""
    groups = []
    for grid, paths in plan.grids.items():
        heads = plan.rehearsal.heads[paths[0]]
        scores = 4 * len(plan.rows.kept) * heads * plan.kept.tokens * math.prod(grid)
        most, first = max(1, SCORES // scores), 0
        widths = (plan.rehearsal.outputs[f"unet.{path}.to_q"][-1] for path in paths)
        for _, same in groupby(zip(widths, paths, strict=True), key=lambda pair: pair[0]):
            alike = tuple(path for _, path in same)
            for start in range(0, len(alike), most):
                part = alike[start : start + most]
                groups.append(Group(grid, first, part, heads))
                first += len(part)
    return groups


class MapsTogether:
    """Maps of all recorded layers of a call, from what `Kept` holds of their queries and keys."""

    def __init__(self, modules: Mapping[str, Any], plan: Plan):
        self._modules, self._plan, self.groups = modules, plan, groups_of(plan)
        self._planes: dict[Grid, torch.Tensor] = {}
        self._scales: dict[Group, torch.Tensor] = {}

    def maps(self, sides: Sides) -> Iterator[tuple[Group, torch.Tensor]]:
        """Yield the maps of each group, (map, token, pixel) float32.

        Its maps are (layer, branch, image, head) in this order. The tokens behind the kept ones
        are summed into one.
        """
        rows, rest = self._plan.rows.kept, self._plan.kept.end + 1
        for group in self.groups:
            queries, keys = (
                torch.cat([by_head(sides[path][side], rows, group.heads) for path in group.paths])
                for side in (0, 1)
            )
            scaled = keys * self._scale(group, keys.device)  # float32, which the scale is
            scores = torch.bmm(scaled.flatten(0, 1), queries.float().flatten(0, 1).mT)
            del queries, keys, scaled
            shares = scores.softmax(1)
            del scores
            if rest < shares.shape[1]:
                shares[:, rest] = shares[:, rest:].sum(1)
            yield group, shares[:, : rest + 1]

    def moments(self, group: Group, maps: torch.Tensor) -> torch.Tensor:
        """Return the mean of each map, and of each map times y and x: (map, token, moment)."""
        if group.grid not in self._planes:
            self._planes[group.grid] = pixel_plane(group.grid, maps.device)
        return torch.bmm(maps, self._planes[group.grid].expand(len(maps), -1, -1))

    def apart(self, group: Group, maps: torch.Tensor) -> torch.Tensor:
        """Return maps with axes of their own.

        *Shape:* (map, token, ...) -> (token, branch, image, layer, head, ...).
        """
        images = self._plan.rows.images
        lead = (len(group.paths), -1, images, group.heads)
        axes: torch.Tensor = maps.unflatten(0, lead)
        return axes.movedim((4, 0), (0, 3))

    def whole(self, grid: Grid, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return the numbers of all maps of a grid, from those of its groups, on the host.

        *Shape:* each (map, token, number) -> (token, branch, image, layer, head, number).
        """
        groups = [group for group in self.groups if group.grid == grid]
        images, joined = self._plan.rows.images, []
        for group, part in zip(groups, parts, strict=True):
            lead = (len(group.paths), -1, images, group.heads)
            joined.append(part.reshape(*lead, *part.shape[1:]).transpose(4, 1, 2, 0, 3, 5))
        return np.concatenate(joined, axis=3)

    def _scale(self, group: Group, device: torch.device) -> torch.Tensor:
        """Return the scale of every row of a group: (row, 1, 1, 1) float32."""
        if group not in self._scales:
            each = [float(self._modules[path].scale) for path in group.paths]
            scales = np.repeat(np.asarray(each, np.float32), len(self._plan.rows.kept))
            self._scales[group] = torch.from_numpy(scales).to(device)[:, None, None, None]
        return self._scales[group]


def by_head(side: torch.Tensor, rows: Sequence[int], heads: int) -> torch.Tensor:
    """Return some rows of queries or keys, a view where they follow one another.

    *Shape:* (batch, any, inner) -> (row, head, any, feature).
    """
    apart: torch.Tensor = rows_of(side, rows).unflatten(-1, (heads, -1))
    return apart.transpose(1, 2)


def rows_of(side: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return some rows, a view where they follow one another: no index goes to the device."""
    first, last = rows[0], rows[-1]
    adjacent = list(rows) == list(range(first, last + 1))
    return side[first : last + 1] if adjacent else side[list(rows)]


def moments_from(means: np.ndarray) -> np.ndarray:
    """Return mass and centroid from means of a map and of its products with y and x.

    *Shape:* (..., moment), both.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([means[..., :1], means[..., 1:] / means[..., :1]], axis=-1)


class Flat:
    """One tensor for several variables: they go to the host in one copy."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._shapes, self._places, size = shapes, dict[str, slice](), 0
        for path, shape in shapes.items():
            self._places[path] = slice(size, size + math.prod(shape))
            size += math.prod(shape)
        self._whole = torch.empty(size, dtype=dtype, device=device)

    def part(self, path: str) -> torch.Tensor:
        """Return the place of a variable, to be filled."""
        return self._whole[self._places[path]].view(self._shapes[path])

    def values(self) -> Values:
        """Return the variables."""
        return {
            path: Derived(
                (self._whole,), functools.partial(_cut, self._places[path], shape), whole=True
            )
            for path, shape in self._shapes.items()
        }


def _cut(place: slice, shape: tuple[int, ...], whole: np.ndarray) -> np.ndarray:
    return whole[place].reshape(shape)


# --- statistics -----------------------------------------------------------------------------------


def statistics_together(outputs: Sequence[torch.Tensor], rows: tuple[int, ...]) -> Derived:
    """Return the `STATISTICS` of outputs of modules, of each batch element.

    *Shape:* each (batch, ...) -> (statistic, *rows, module) float32, on the host.
    """
    tensors: list[torch.Tensor] = []
    sizes = [output.numel() // len(output) for output in outputs]
    length = _row_length(math.gcd(*sizes))
    for part in _parts(outputs):
        values = torch.cat([_in_memory_order(output) for output in part]).float()
        variances, means = torch.var_mean(values.view(-1, length), dim=1, correction=0)
        tensors += [means, variances, *values.view(-1, length).aminmax(dim=1)]
        del values
    counts = [size // length for size, output in zip(sizes, outputs, strict=True) for _ in output]
    return Derived(tuple(tensors), functools.partial(_statistics, counts, rows))


def _row_length(common: int) -> int:
    """Return the greatest divisor of a number that is no greater than `ROW`."""
    return next(n for n in range(min(common, ROW), 0, -1) if common % n == 0)


def _parts(outputs: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Yield outputs in their order, as many together as are `OUTPUTS` bytes in float32."""
    part, held = list[torch.Tensor](), 0
    for output in outputs:
        if part and held + 4 * output.numel() > OUTPUTS:
            yield part
            part, held = [], 0
        part.append(output)
        held += 4 * output.numel()
    yield part


def _in_memory_order(output: torch.Tensor) -> torch.Tensor:
    """Return the values of each batch element, one after the other, without a copy if possible."""
    if output.ndim == 4 and not output.is_contiguous():
        output = output.permute(0, 2, 3, 1)  # channels_last
    return output.reshape(-1)


def _statistics(counts: Sequence[int], rows: tuple[int, ...], *parts: np.ndarray) -> np.ndarray:
    """Return statistics of `counts` parts each, from those of equally long parts."""
    means, variances, low, high = (
        np.concatenate(parts[number::4]).astype(np.float64) for number in range(4)
    )
    starts = np.cumsum([0, *counts[:-1]])
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(means, starts) / counts
        apart = variances + (means - np.repeat(mean, counts)) ** 2
        found = {
            "mean": mean,
            "std": np.sqrt(np.add.reduceat(apart, starts) / counts),
            "min": np.minimum.reduceat(low, starts),
            "max": np.maximum.reduceat(high, starts),
        }
        stacked = np.stack([found[name] for name in STATISTICS]).astype(np.float32)
    return np.moveaxis(stacked.reshape(len(STATISTICS), -1, *rows), 1, -1)
