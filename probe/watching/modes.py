"""Other ways to record attention than map by map: its two sides apart, a summary of the heads, and self-attention.

The image side of cross-attention (queries) changes at every step and is large; the text side (keys, and what each token
writes) depends on the prompt only, so it is read once in a run. With both, the map of any token can be computed when a
recording is read, and even that of a word which was not in the prompt:

    map = softmax over tokens of key . query          (Vaswani et al. 2017; keys are stored with their factor 1 / sqrt(d))

Attention says how much of a token a place takes, |v W_O| how large that is which it takes: the length of the token's value
through the layer's output matrix (Kobayashi et al. 2020, "Attention is not only a weight").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from probe.watching.capture import AttentionCapture, Projections, Tray
from probe.watching.hooks import Watch
from probe.watching.measures import to_storage
from probe.watching.rehearsal import cross_attention, self_attention
from probe.watching.selection import Kept


class TextSide:
    """Keys and |v W_O| of some cross-attention layers, read at the first call that `take` is asked about.

    `take()` gives for each layer its scaled keys (branch, token, head, key_feature) and the sizes of what its tokens
    write (branch, kept token, head), both float32; `rest` has the mean size of its tokens.
    """

    def __init__(self, unet: nn.Module, layers: Sequence[str], kept: Kept, images: int, called: Sequence[str], branches: Sequence[str]):
        modules = cross_attention(unet)
        self._modules = {path: modules[path] for path in layers}
        self._kept, self._rows = kept, [called.index(branch) * images for branch in branches]
        self._tray = Tray([f"{side} {path}" for path in layers for side in ("key", "value")])
        self.resting = False

    def watches(self) -> list[Watch]:
        found: list[Watch] = []
        for path, module in self._modules.items():
            found += [(module.to_k, "output", self._keep("key", path)), (module.to_v, "output", self._keep("value", path))]
        return found

    def take(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        values = self._tray.take()
        with torch.no_grad():
            return {
                path: (scaled_keys(values[f"key {path}"], module), self._merged(written_sizes(values[f"value {path}"], module)))
                for path, module in self._modules.items()
            }

    def _keep(self, side: str, path: str) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            if not self.resting:
                self._tray.put(f"{side} {path}", output.detach()[self._rows])

        return hook

    def _merged(self, sizes: torch.Tensor) -> torch.Tensor:
        end = self._kept.end
        return sizes if end + 1 >= self._kept.tokens else torch.cat([sizes[:, : end + 1], sizes[:, end + 1 :].mean(1, keepdim=True)], dim=1)


def scaled_keys(key: torch.Tensor, module: Any) -> torch.Tensor:
    """*Shape:* (n, token, inner) -> (n, token, head, key_feature) float32, times 1 / sqrt(key_feature)."""
    scaled: torch.Tensor = key.float().unflatten(-1, (module.heads, -1)) * module.scale
    return scaled


def written_sizes(value: torch.Tensor, module: Any) -> torch.Tensor:
    """|v W_O| of each token and head: the length of what it adds to the picture. *Shape:* (n, token, inner) -> (n, token, head)."""
    wide = value.float().unflatten(-1, (module.heads, -1))
    output = module.to_out[0]
    if type(output) is nn.Linear:
        weight = output.weight.float().unflatten(1, (module.heads, -1))  # (out, head, feature)
        written: torch.Tensor = torch.einsum("nthd,ohd->ntho", wide, weight)
        return written.square().sum(-1).sqrt()
    # An adapter sits on the matrix (LoRA): what the whole of it makes of one head alone, less what it makes of nothing.
    one_head = torch.eye(module.heads, device=value.device)[:, :, None]
    alone = (wide[:, :, None] * one_head).flatten(-2).to(value.dtype)  # (n, token, head, inner)
    whole: torch.Tensor = output.forward(alone) - output.forward(torch.zeros_like(alone))
    return whole.float().square().sum(-1).sqrt()


class SummaryCapture(AttentionCapture):
    """Maps averaged over heads, and what each head did in a few numbers.

    `take()` gives for each layer the mean maps (token, branch, image, 1, pixel) in the storage dtype, their moments, and
    the statistics of every head (token, branch, image, head, head_statistic) in float32: see `HEAD_STATISTICS`.
    """

    def _read(self, path: str, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grid = self.layers[path]
        maps = self._maps(query, key, self._modules[path])
        over_space = maps / maps.sum(-1, keepdim=True)
        entropy = -torch.xlogy(over_space, over_space).sum(-1, keepdim=True)
        statistics = torch.cat([self._moments(maps, grid), entropy, maps.amax(-1, keepdim=True)], dim=-1)
        mean = maps.mean(dim=3, keepdim=True)
        return to_storage(mean, self._dtype), self._moments(mean, grid), statistics

    def _moments(self, maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        sums = maps @ self._plane(grid, maps.device)
        return torch.cat([sums[..., :1], sums[..., 1:] / sums[..., :1]], dim=-1)


class QueryCapture(Projections):
    """The image side of some layers: `take()` gives each layer's queries (branch, image, head, key_feature, pixel) in the storage dtype."""

    def __init__(
        self, unet: nn.Module, layers: dict[str, tuple[int, int]], kept: Kept, images: int, called: Sequence[str], branches: Sequence[str], dtype: str
    ):
        super().__init__(cross_attention(unet), layers, images, called, branches, dtype, kept.tokens)

    def take_whole(self) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
        return {}  # each layer is apart

    def _read(self, path: str, query: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = query[self._all_rows].unflatten(-1, (self._modules[path].heads, -1)).permute(0, 2, 3, 1).unflatten(0, (-1, self._images))
        return (rows.to(torch.float32 if self._dtype == "float32" else torch.float16).contiguous(),)


class SelfCapture(Projections):
    """Self-attention of some layers: `take()` gives each layer's maps (branch, image, head, pixel, key pixel) in the storage dtype."""

    def __init__(self, unet: nn.Module, layers: dict[str, tuple[int, int]], images: int, called: Sequence[str], branches: Sequence[str], dtype: str):
        super().__init__(self_attention(unet), layers, images, called, branches, dtype)

    def _read(self, path: str, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        module = self._modules[path]
        q = query[self._all_rows].float().unflatten(-1, (module.heads, -1)).transpose(1, 2)
        k = key[self._all_rows].float().unflatten(-1, (module.heads, -1)).permute(0, 2, 3, 1)
        maps: torch.Tensor = to_storage(torch.matmul(q * module.scale, k).softmax(dim=-1), self._dtype).unflatten(0, (-1, self._images))
        return maps
