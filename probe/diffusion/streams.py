"""Streams of a GPU beside the one that computes: one for each purpose."""

from __future__ import annotations

import functools
from typing import Literal

import torch


@functools.cache
def stream_of(
    device: torch.device,
    purpose: Literal["graphs", "transfer", "digest"],  # noqa: ARG001
) -> torch.cuda.Stream:
    """Return a device's stream for a purpose.

    torch has 32 streams for a device and gives them in turn. Where each run took new ones, a later
    run would compute its digest on the stream that a graph is captured on.
    """
    return torch.cuda.Stream(device)
