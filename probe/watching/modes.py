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
from math import prod
from typing import Any

import torch
from torch import nn

from probe.errors import CaptureError
from probe.watching.capture import AttentionCapture, Kept, Tray, refuse_unreadable
from probe.watching.conditions import Witness
from probe.watching.hooks import Watch
from probe.watching.measures import to_storage
from probe.watching.rehearsal import cross_attention, self_attention


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

    def _read(self, query: torch.Tensor, key: torch.Tensor, module: Any, path: str) -> tuple[torch.Tensor, ...]:
        grid = self.layers[path]
        maps = self._maps(query, key, module)
        over_space = maps / maps.sum(-1, keepdim=True)
        entropy = -torch.xlogy(over_space, over_space).sum(-1, keepdim=True)
        statistics = torch.cat([self._moments(maps, grid), entropy, maps.amax(-1, keepdim=True)], dim=-1)
        mean = maps.mean(dim=3, keepdim=True)
        return to_storage(mean, self._dtype), self._moments(mean, grid), statistics

    def _moments(self, maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        sums = maps @ self._plane(grid, maps.device)
        return torch.cat([sums[..., :1], sums[..., 1:] / sums[..., :1]], dim=-1)


def check_watched(path: str, module: Any, watched: Any, sides: Sequence[torch.Tensor], batch: int, pixels: int) -> None:
    """Raises CaptureError where a layer's projections were replaced, or what they put out is not one row for each pixel."""
    if watched != (module.to_q, module.to_k):
        raise CaptureError(f"{path}: to_q or to_k was replaced while recording (a LoRA?).", "Change the model before the run begins.")
    for side in sides:
        if side.shape[:2] != (batch, pixels):
            raise CaptureError(
                f"{path} multiplies {tuple(side.shape[:2])} queries or keys, not {(batch, pixels)}.",
                "Something merges or adds tokens (token merging): undo it, or leave the layer out.",
            )


class QueryCapture:
    """The image side of some layers: `take()` gives each layer's queries (branch, image, head, key_feature, pixel) in the storage dtype."""

    def __init__(self, unet: nn.Module, layers: dict[str, tuple[int, int]], images: int, called: Sequence[str], branches: Sequence[str], dtype: str):
        modules = cross_attention(unet)
        self.layers, self._images, self._dtype = layers, images, dtype
        self._modules = {path: modules[path] for path in layers}
        self._rows = [called.index(branch) * images + image for branch in branches for image in range(images)]
        self._batch = len(called) * images
        self._tray = Tray(list(layers))
        self._watched: dict[str, Any] = {}
        self.resting = False
        self._witness = Witness(self._modules, self._rows, lambda: self.resting)
        for path, module in self._modules.items():
            refuse_unreadable(path, module)

    def watches(self) -> list[Watch]:
        self._watched = {path: (module.to_q, module.to_k) for path, module in self._modules.items()}
        found: list[Watch] = [(module.to_q, "output", self._keep(path, module)) for path, module in self._modules.items()]
        return found + self._witness.watches()

    def take(self) -> dict[str, tuple[torch.Tensor, ...]]:
        if self.resting:
            return {}
        found: dict[str, tuple[torch.Tensor, ...]] = {path: (query,) for path, query in self._tray.take().items()}
        self._witness.take()
        return found

    def take_whole(self) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
        return {}  # each layer is apart

    def _keep(self, path: str, module: Any) -> Callable[[Any], None]:
        def hook(query: torch.Tensor) -> None:
            if not self.resting:
                check_watched(path, module, self._watched[path], (query,), self._batch, prod(self.layers[path]))
                rows = query.detach()[self._rows].unflatten(-1, (module.heads, -1)).permute(0, 2, 3, 1).unflatten(0, (-1, self._images))
                self._tray.put(path, rows.to(torch.float32 if self._dtype == "float32" else torch.float16).contiguous())

        return hook


class SelfCapture:
    """Self-attention of some layers: `take()` gives each layer's maps (branch, image, head, pixel, key pixel) in the storage dtype."""

    def __init__(self, unet: nn.Module, layers: dict[str, tuple[int, int]], images: int, called: Sequence[str], branches: Sequence[str], dtype: str):
        modules = self_attention(unet)
        self._modules = {path: modules[path] for path in layers}
        self.layers, self._images, self._dtype, self._batch = layers, images, dtype, len(called) * images
        self._rows = [called.index(branch) * images + image for branch in branches for image in range(images)]
        self._tray = Tray(list(layers))
        self._queries: dict[str, torch.Tensor] = {}
        self._watched: dict[str, Any] = {}
        self.resting = False
        self._witness = Witness(self._modules, self._rows, lambda: self.resting)
        for path, module in self._modules.items():
            refuse_unreadable(path, module)

    def watches(self) -> list[Watch]:
        found: list[Watch] = []
        for path, module in self._modules.items():
            self._watched[path] = module.to_q, module.to_k
            found += [(module.to_q, "output", self._query(path)), (module.to_k, "output", self._key(path, module))]
        return found + self._witness.watches()

    def take(self) -> dict[str, torch.Tensor]:
        if self.resting:
            return {}
        found = self._tray.take()
        self._witness.take()
        return found

    def _query(self, path: str) -> Callable[[Any], None]:
        def hook(query: torch.Tensor) -> None:
            if not self.resting:
                self._queries[path] = query.detach()

        return hook

    def _key(self, path: str, module: Any) -> Callable[[Any], None]:
        def hook(key: torch.Tensor) -> None:
            if not self.resting:
                query = self._queries.pop(path)
                check_watched(path, module, self._watched[path], (query, key), self._batch, prod(self.layers[path]))
                q = query[self._rows].float().unflatten(-1, (module.heads, -1)).transpose(1, 2)
                k = key.detach()[self._rows].float().unflatten(-1, (module.heads, -1)).permute(0, 2, 3, 1)
                maps = torch.matmul(q * module.scale, k).softmax(dim=-1)
                self._tray.put(path, to_storage(maps, self._dtype).unflatten(0, (-1, self._images)))

        return hook
