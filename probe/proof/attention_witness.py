"""Attention computed by hand from what the layers multiply, in a way of its own.

The recorded maps are computed by `probe.watching`, which cannot be its own witness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from probe.proof.map_checks import apart
from probe.proof.replay import numbers
from probe.watching.hooks import Watch


class AttentionWitness:
    """What attention layers multiply, and what leaves them.

    `take` returns a layer's softmax(q k), and how far its output is from it.
    """

    def __init__(self, layers: dict[str, Any]):
        self._layers = layers
        self._seen: dict[str, dict[str, torch.Tensor]] = {path: {} for path in layers}

    def watches(self) -> list[Watch]:
        parts = {
            path: {"q": m.to_q, "k": m.to_k, "v": m.to_v, "out": m.to_out[0]}
            for path, m in self._layers.items()
        }
        return [
            (part, "output", self._keep(path, name))
            for path, named in parts.items()
            for name, part in named.items()
        ]

    def _keep(self, path: str, name: str) -> Any:
        def hook(output: torch.Tensor) -> None:
            self._seen[path][name] = output.detach()

        return hook

    def take(self, path: str, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the maps and queries of a layer, and how far its output is off.

        *Shape:* softmax(q k) (row, head, pixel, key) float32, q (row, head, pixel, feature). The
        output is compared with softmax(q k) v through to_out.
        """
        module, seen = self._layers[path], self._seen[path]
        with torch.no_grad():
            q, k, v = (
                seen[name][rows].unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
                for name in "qkv"
            )
            shares = (q @ k.transpose(-1, -2) * module.scale).softmax(-1)
            mixed = (shares @ v).transpose(1, 2).flatten(2).to(seen["out"].dtype)
            output = module.to_out[0].forward(mixed)  # not a call: that would be seen by the hooks
        off = apart(numbers(output), numbers(seen["out"][rows]))
        return numbers(shares), numbers(q), off
