"""What an edit makes of a value: mixed with another, ablated, or changed at random.

*Shape:* every value has one row an image and branch first.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch


def blended(own: torch.Tensor, other: torch.Tensor, amount: float) -> torch.Tensor:
    """Return (1 - amount) own + amount other: exactly `own` at 0, exactly `other` at 1."""
    return torch.lerp(own, other.to(own), amount)


def ablated(
    own: torch.Tensor, how: str, places: Sequence[int], donated: torch.Tensor | None
) -> torch.Tensor:
    """Return zeros, the mean over some dimensions (`places`), or the donor's value."""
    if how == "zero":
        return torch.zeros_like(own)
    if how == "mean":
        return own.mean(dim=list(places), keepdim=True).expand_as(own)
    if donated is None:
        raise ValueError("resample needs a donor's value")
    return donated


def number_of(*names: object) -> int:
    """Return a seed made of names: the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def random_like(own: torch.Tensor, other: torch.Tensor, *seed: object) -> torch.Tensor:
    """Return `own` changed as far as `other` is from it, in a random direction.

    The change of every row has the norm that the change to `other` has.
    """
    generator = torch.Generator().manual_seed(number_of(*seed))
    direction = torch.randn(own.shape, generator=generator, dtype=torch.float32).to(own.device)
    size = (other.float() - own.float()).flatten(1).norm(dim=1)
    scale = size / direction.flatten(1).norm(dim=1)
    change = direction * scale.view(-1, *[1] * (own.ndim - 1))
    changed: torch.Tensor = (own.float() + change).to(own.dtype)
    return changed


def other_heads(
    targets: Sequence[tuple[str, int]], every: Sequence[tuple[str, int]], seed: int
) -> list[tuple[str, int]] | None:
    """Return as many random heads as `targets`, from those of `every` that are no targets.

    Return None if there are too few.
    """
    left = [head for head in every if head not in set(targets)]
    if len(left) < len(targets):
        return None
    return random.Random(number_of("other_head", seed)).sample(left, len(targets))
