"""What is read from the model while it works: cross-attention maps, statistics of blocks, text internals, activations.

A capture puts watches on modules and fills a tray; whoever drives the loop empties it after each call with `take()`,
which checks that every watched layer spoke exactly once. A capture has no clock, no step counter and no idea of files.

Attention maps are computed from what `to_q` and `to_k` are about to multiply: the layer's own fused attention stays
untouched. For a layer with H heads on a grid of N = y * x positions, with q (N, H, d) and k (77, H, d):

    map = softmax over tokens of (k @ q^T) / sqrt(d)            (77, N) a head: for each pixel, the tokens sum to one

(cross-attention as in Rombach et al. 2022, section 3.3). q and k are widened to float32 first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from probe.errors import CaptureError
from probe.schema import MOMENTS
from probe.watching.conditions import FINITE, NOT_FINITE, Witness
from probe.watching.hooks import Hooks, Watch
from probe.watching.measures import attention_maps, statistics_of, to_storage
from probe.watching.rehearsal import cross_attention, first_tensor
from probe.watching.selection import Kept

IN_CACHE = 2**18  # scores: 1 MiB


class Watching(Protocol):
    """Anything that says what it watches."""

    def watches(self) -> list[Watch]: ...


class Tray:
    """Values that hooks put down, by name. `take` empties it and insists on exactly one value for every name."""

    def __init__(self, names: Sequence[str], replace: bool = False):
        self._names, self._replace = tuple(names), replace
        self._values: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        if name in self._values and not self._replace:
            raise CaptureError(f"{name} fired twice in one step.", "A module that is shared or re-entered cannot be recorded: leave it out.")
        self._values[name] = value

    def take(self) -> dict[str, Any]:
        values, self._values = self._values, {}
        for name in self._names:
            if name not in values:
                raise CaptureError(
                    f"{name} fired 0 times in a step.",
                    "Fused QKV projections, a compiled UNet or a replaced module hide it: undo that, or leave it out of capture.layers.",
                )
        return values


class Projections:
    """Queries and keys of some attention layers, as their `to_q` and `to_k` put them out.

    `take()` gives for each layer what `_read` has made of the two. Raises CaptureError where they are not what the layer
    multiplies, or not of the shape that was planned. Without `tokens`, keys are those of the pixels: self-attention.
    """

    def __init__(
        self,
        modules: dict[str, Any],
        layers: dict[str, tuple[int, int]],
        images: int,
        called: Sequence[str],
        branches: Sequence[str],
        dtype: str,
        tokens: int | None = None,
    ):
        self.layers, self._images, self._dtype, self._tokens = layers, images, dtype, tokens
        self.resting = False  # while true, the hooks read nothing
        self._modules = {path: modules[path] for path in layers}
        self._batch = len(called) * images
        self._rows = {branch: [called.index(branch) * images + image for image in range(images)] for branch in branches}
        self._all_rows = [row for rows in self._rows.values() for row in rows]
        self._tray = Tray(list(layers))
        self._queries: dict[str, torch.Tensor] = {}
        self._watched: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._witness = Witness(self._modules, self._all_rows, lambda: self.resting)
        for path, module in self._modules.items():
            refuse_unreadable(path, module)

    def watches(self) -> list[Watch]:
        found: list[Watch] = []
        for path, module in self._modules.items():
            self._watched[path] = module.to_q, module.to_k
            found += [(module.to_q, "output", self._query(path)), (module.to_k, "output", self._key(path, module))]
        return found + self._witness.watches()

    def take(self) -> dict[str, Any]:
        self._queries.clear()
        if self.resting:
            return {}
        values = self._tray.take()
        self._witness.take()
        return values

    def _read(self, path: str, query: torch.Tensor, key: torch.Tensor) -> Any:
        raise NotImplementedError

    def _query(self, path: str) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            if path in self._queries:
                raise CaptureError(f"{path}.to_q fired twice in one step.", "A module that is shared or re-entered cannot be recorded: leave it out.")
            if not self.resting:
                self._queries[path] = output

        return hook

    def _key(self, path: str, module: Any) -> Callable[[Any], None]:
        def hook(key: torch.Tensor) -> None:
            if self.resting:
                return
            if path not in self._queries:
                raise CaptureError(f"{path}.to_q fired 0 times in a step.", "Its keys were computed without queries: is it fused?")
            query = self._queries.pop(path)
            self._check(path, query, key, module)
            with torch.no_grad():
                self._tray.put(path, self._read(path, query, key))

        return hook

    def _check(self, path: str, query: torch.Tensor, key: torch.Tensor, module: Any) -> None:
        """Is what was seen what the layer works with, and of the shape that was planned?"""
        if self._watched[path] != (module.to_q, module.to_k):
            raise CaptureError(f"{path}: to_q or to_k was replaced while recording (a LoRA?).", "Change the model before the run begins.")
        pixels = prod(self.layers[path])
        queries, keys = (self._batch, pixels), (self._batch, self._tokens or pixels)
        if query.shape[:2] != queries or key.shape[:2] != keys:
            raise CaptureError(
                f"{path} multiplies {tuple(query.shape[:2])} queries with {tuple(key.shape[:2])} keys, not {queries} with {keys}.",
                "Something merges or adds tokens (token merging, an image prompt): undo it, or leave the layer out of what is captured.",
            )


class AttentionCapture(Projections):
    """Cross-attention maps of some layers, for some branches and tokens.

    `take()` gives for each layer the maps (token, branch, image, head, pixel) in the storage dtype, and their moments
    (token, branch, image, head, moment) in float32: mass (the mean over pixels) and centroid (y, x in 0..1). Both are views of
    what `take_whole()` gives for each grid, as it is stored: with the layers on an axis before the heads.
    """

    def __init__(
        self, unet: nn.Module, layers: dict[str, tuple[int, int]], kept: Kept, images: int, called: Sequence[str], branches: Sequence[str], dtype: str
    ):
        super().__init__(cross_attention(unet), layers, images, called, branches, dtype, kept.tokens)
        self._kept = kept
        self._planes: dict[tuple[int, int], torch.Tensor] = {}
        self._filling: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self._whole: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self._beside = {path: [other for other, its in layers.items() if its == grid] for path, grid in layers.items()}

    def take(self) -> dict[str, tuple[torch.Tensor, ...]]:
        self._whole, self._filling = self._filling, {}
        return super().take()

    def take_whole(self) -> dict[tuple[int, int], tuple[torch.Tensor, ...]]:
        """The maps of each grid, (token, branch, image, layer, head, pixel), and their moments: what `take` gave last."""
        whole, self._whole = self._whole, {}
        return whole

    def _read(self, path: str, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        module, grid, layers = self._modules[path], self.layers[path], self._beside[path]
        if grid not in self._filling:  # a step's first layer of a grid makes room for all, so that nothing is copied together later
            shape = (len(self._kept.positions), len(self._rows), self._images, len(layers), module.heads)
            dtype = torch.uint8 if self._dtype == "sqrt_u8" else getattr(torch, self._dtype)
            self._filling[grid] = query.new_empty((*shape, query.shape[1]), dtype=dtype), query.new_empty((*shape, len(MOMENTS)), dtype=torch.float32)
        maps, moments = (whole[:, :, :, layers.index(path)] for whole in self._filling[grid])
        plane = self._plane(grid, query.device)
        for at, shares in self._shares(query, key, module):
            moments[at] = (shares @ plane).transpose(0, 1)
            maps[at] = (to_storage(shares, self._dtype) if maps.dtype == torch.uint8 else shares).transpose(0, 1)
        moments[..., 1:] /= moments[..., :1]
        return maps, moments

    def _maps(self, query: torch.Tensor, key: torch.Tensor, module: Any) -> torch.Tensor:
        """The asked branches' maps, (token, branch, image, head, pixel) float32."""
        maps = query.new_empty((len(self._kept.positions), len(self._rows), self._images, module.heads, query.shape[1]), dtype=torch.float32)
        for at, shares in self._shares(query, key, module):
            maps[at] = shares.transpose(0, 1)
        return maps

    def _shares(self, query: torch.Tensor, key: torch.Tensor, module: Any) -> Iterator[tuple[Any, torch.Tensor]]:
        """Maps in parts, (head, token, pixel) float32, and their places, (token, head, pixel).

        On a CPU a part is as many heads as keep their scores in the cache; a GPU wants few and large parts.
        """
        heads = module.heads
        together = max(1, IN_CACHE // (query.shape[1] * self._kept.tokens)) if query.device.type == "cpu" else heads
        for b, rows in enumerate(self._rows.values()):
            for image, row in enumerate(rows):
                q, k = (side[row].unflatten(-1, (heads, -1)).transpose(0, 1) for side in (query, key))
                for first in range(0, heads, together):
                    part = slice(first, first + together)
                    yield (slice(None), b, image, part), attention_maps(q[part], k[part], module.scale, self._kept.end + 1)

    def _plane(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """What a map is multiplied with to give its `MOMENTS`: 1, y and x of each pixel. *Shape:* (pixel, moment)."""
        if grid not in self._planes:
            y, x = torch.meshgrid(*((torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n for n in grid), indexing="ij")
            self._planes[grid] = torch.stack([torch.ones_like(y), y, x], dim=-1).flatten(0, 1) / y.numel()
        return self._planes[grid]


def refuse_unreadable(path: str, module: Any) -> None:
    """Raises CaptureError for an attention layer whose queries or keys are not what its to_q and to_k put out."""
    if "Fused" in type(module.processor).__name__:  # not module.fused_projections, which unfusing leaves true
        raise CaptureError(f"{path} has fused QKV projections, whose queries cannot be read.", "Call pipeline.unfuse_qkv_projections() first.")
    if module.norm_q is not None or module.norm_k is not None:
        raise CaptureError(f"{path} normalises its queries or keys, which is not supported yet.", "Leave it out of capture.layers.")


class OutputCapture:
    """Outputs of modules of one component: their statistics, or the whole of them.

    `take()` gives (statistics, activations): a tensor (statistic, batch, module) in float32, or None; and whole
    outputs by path, (batch, ...).
    """

    def __init__(self, component: str, module: nn.Module, statistics: Sequence[str], activations: Sequence[str], replace: bool = False):
        self._modules = {f"{component}.{path}": part for path, part in module.named_modules()}
        self.statistics = list(statistics)
        self.activations = [path for path in activations if path in self._modules]
        self._numbers, self._wholes = Tray(self.statistics, replace), Tray(self.activations, replace)
        self.resting = False

    def watches(self) -> list[Watch]:
        found: list[Watch] = [(self._modules[path], "output", self._measure(path)) for path in self.statistics]
        return found + [(self._modules[path], "output", self._keep(path)) for path in self.activations]

    def take(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        if self.resting:
            return None, {}
        numbers = self._numbers.take()
        return torch.stack([numbers[path] for path in self.statistics], dim=-1) if self.statistics else None, self._wholes.take()

    def _measure(self, path: str) -> Callable[[Any], None]:
        def hook(output: Any) -> None:
            tensor = None if self.resting else first_tensor(output)
            if tensor is not None:
                with torch.no_grad():
                    self._numbers.put(path, statistics_of(tensor))

        return hook

    def _keep(self, path: str) -> Callable[[Any], None]:
        def hook(output: Any) -> None:
            tensor = None if self.resting else first_tensor(output)
            if tensor is not None:
                self._wholes.put(path, tensor.detach().clone())

        return hook


class TextCapture:
    """The text encoder's inside, one `take()` per call: embedding, hidden states, final output, attention of every layer.

    `mask` is the attention mask that the next call is given, (1, token), 0 for tokens that nobody looks at. Each layer's attention
    is proven: softmax(q k^T) v has to be what it writes. Raises CaptureError where it is not.
    """

    def __init__(self, text_encoder: nn.Module, activations: Sequence[str] = ()):
        root: Any = getattr(text_encoder, "text_model", text_encoder)
        self._root, self._layers = root, list(root.encoder.layers)
        names = ["embedding", "output", *(f"hidden {i}" for i in range(len(self._layers)))]
        self._tray = Tray([*names, *(f"attention {i}" for i in range(len(self._layers)))])
        self._queries: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._shares: dict[int, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None
        self.outputs = OutputCapture("text_encoder", text_encoder, (), activations)

    def watches(self) -> list[Watch]:
        put = self._tray.put
        found: list[Watch] = [
            (self._root.embeddings, "output", lambda value: put("embedding", value)),
            (self._root.final_layer_norm, "output", lambda value: put("output", value)),
        ]
        for index, layer in enumerate(self._layers):
            found.append((layer, "output", self._hidden(index)))
            found.append((layer.self_attn.q_proj, "output", functools.partial(self._queries.__setitem__, index)))
            found.append((layer.self_attn.k_proj, "output", self._attention(index, layer.self_attn)))
            found.append((layer.self_attn.v_proj, "output", functools.partial(self._values.__setitem__, index)))
            found.append((layer.self_attn.out_proj, "input", self._prove(index)))
        return found + self.outputs.watches()

    def _hidden(self, index: int) -> Callable[[Any], None]:
        return lambda output: self._tray.put(f"hidden {index}", first_tensor(output))

    def _attention(self, index: int, module: Any) -> Callable[[Any], None]:
        def hook(key: torch.Tensor) -> None:
            with torch.no_grad():
                q, k = (_by_head(side, module.num_heads) for side in (self._queries.pop(index), key))
                products = q @ k.transpose(-1, -2) * module.scale
                hidden = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).triu(1)
                if self.mask is not None:
                    hidden = hidden | (self.mask.to(products.device) == 0)
                self._shares[index] = products.masked_fill(hidden, float("-inf")).softmax(-1)
                self._tray.put(f"attention {index}", self._shares[index])

        return hook

    def _prove(self, index: int) -> Callable[[Any], None]:
        def hook(written: torch.Tensor) -> None:
            shares, values = self._shares.pop(index), self._values.pop(index)
            with torch.no_grad():
                parts = _by_head(values, shares.shape[1])
                expected, size = ((shares @ value).transpose(1, 2).flatten(2) for value in (parts, parts.abs()))
                off = float((written.float() - expected).norm() / size.norm())
            if not off <= max(1e-3, torch.finfo(written.dtype).eps / 2):
                why = f"does not attend to the tokens before each token (off by {off:.1%}), so its maps would be wrong."
                remedy = "Load the text encoder anew, or leave it out: capture.text: false."
                why, remedy = (why, remedy) if off == off else (NOT_FINITE, FINITE)
                raise CaptureError(f"text_encoder: layer {index} {why}", remedy)

        return hook

    def take(self) -> dict[str, torch.Tensor]:
        """embedding and output (token, feature); hidden (text_layer, token, feature); attention (text_layer, head, token, key)."""
        found = self._tray.take()
        layers = range(len(self._layers))
        return {
            "embedding": found["embedding"][0],
            "hidden": torch.stack([found[f"hidden {i}"][0] for i in layers]),
            "output": found["output"][0],
            "attention": torch.stack([found[f"attention {i}"][0] for i in layers]),
        }


def _by_head(side: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, token, feature) -> (batch, head, token, head_feature) float32."""
    apart: torch.Tensor = side.float().unflatten(-1, (heads, -1))
    return apart.transpose(1, 2)


def hooked(*captures: Watching) -> Hooks:
    """All hooks of some captures, on while the `with` block lasts."""
    return Hooks(watch for capture in captures for watch in capture.watches())
