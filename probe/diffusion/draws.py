"""Random numbers: one generator an image, drawn on the CPU.

A seed thus means the same picture on every device, and an image does not depend on how many are
drawn beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def seeded(seed: int, images: int) -> list[torch.Generator]:
    """Return a generator for each image: that of image i is seeded `seed + i`."""
    return [torch.Generator().manual_seed(seed + i) for i in range(images)]


def draw(
    generators: Sequence[torch.Generator], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return what each image's generator gives next, on the CPU. *Shape:* `shape`, (image, ...)."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g, dtype=dtype) for g in generators])


def noise(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Return Gaussian noise on the CPU, (image, ...), and the generators that drew it."""
    generators = seeded(seed, shape[0])
    return draw(generators, shape, dtype), generators
