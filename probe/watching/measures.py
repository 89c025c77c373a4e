"""Take numbers from tensors inside hooks: pure functions, exact, and as cheap as possible.

What was measured to be slow, and is avoided here: passes over scores that have left the cache,
`var_mean` and `aminmax` over a dimension (six times a sum on a CPU), a float32 norm over a million
values (off by 1e-5).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from probe.format.schema import STATISTICS


def attention_maps(query: torch.Tensor, key: torch.Tensor, scale: float, rest: int) -> torch.Tensor:
    """Return the softmax over tokens of the scaled products of keys and queries.

    The shares of tokens `rest` and later are summed into one.

    *Shape:* query (head, pixel, d), key (head, token, d) -> (head, min(token, rest + 1), pixel)
    float32. The scores are made as (token, pixel), so that a map is contiguous from birth, and
    everything after happens in place.
    """
    shares = torch.matmul(key.float() * scale, query.float().transpose(1, 2))
    shares.sub_(shares.amax(1, keepdim=True)).exp_()
    total = shares.sum(1, keepdim=True)
    if rest < shares.shape[1]:
        shares[:, rest] = shares[:, rest:].sum(1)
        shares = shares[:, : rest + 1]
    return shares.div_(total)


def to_storage(maps: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return probabilities as stored: float16, float32 or `sqrt_u8`.

    `sqrt_u8` is round(255 sqrt(p)), which is off by 4e-3 at most.
    """
    if dtype == "sqrt_u8":
        return maps.sqrt().mul_(255).round_().to(torch.uint8)
    return maps.to(getattr(torch, dtype))


def statistics_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return mean, standard deviation, least and greatest value of each batch element.

    *Shape:* (batch, ...) -> (statistic, batch) float32.
    """
    values = tensor.detach().float()
    flat = values.flatten(1)
    mean = flat.mean(1)
    # By channel first: the norm of fewer values is more exact.
    apart = values.sub(mean.view(-1, *[1] * (values.ndim - 1))).flatten(2)
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(apart, dim=-1), dim=-1)
    deviation = norm / math.sqrt(flat.shape[1])
    statistics = {"mean": mean, "std": deviation, "min": flat.amin(1), "max": flat.amax(1)}
    return torch.stack([statistics[name] for name in STATISTICS])


class Stored(NamedTuple):
    """How maps are stored: the type of the variable, and what its attributes say of it."""

    dtype: str
    attributes: dict[str, Any]


def storage_note(dtype: str) -> Stored:
    """Return how maps are stored under `capture.dtype`."""
    if dtype == "sqrt_u8":
        return Stored("uint8", {"encoding": "sqrt_u8: p = (code / 255)^2"})
    return Stored(dtype, {})


def storage_dtype(dtype: str) -> torch.dtype:
    """Return the type of a tensor of maps under `capture.dtype`."""
    kind: torch.dtype = getattr(torch, storage_note(dtype).dtype)
    return kind


def pixel_plane(grid: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return what a map is multiplied with to give its `MOMENTS`: 1, y and x of each pixel.

    *Shape:* (pixel, moment).
    """
    sides = (torch.arange(n, device=device, dtype=torch.float32) + 0.5 for n in grid)
    y, x = torch.meshgrid(*(side / n for side, n in zip(sides, grid, strict=True)), indexing="ij")
    return torch.stack([torch.ones_like(y), y, x], dim=-1).flatten(0, 1) / y.numel()


def moments_of(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return mass and centroid of each map. *Shape:* (..., pixel) -> (..., moment) float32."""
    sums = maps @ pixel_plane(grid, maps.device)
    return torch.cat([sums[..., :1], sums[..., 1:] / sums[..., :1]], dim=-1)
