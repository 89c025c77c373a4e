"""Read what attention layers multiply: queries and keys, as `to_q` and `to_k` put them out.

The layer's own fused attention stays untouched. A reader gets both sides layer by layer, while the
model works. They must be what the layer uses: fused, replaced and merged layers are refused, and
unknown processors proven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from probe.errors import CaptureError
from probe.watching.conditions import ProcessorWitness
from probe.watching.hooks import Watch
from probe.watching.interface import Grid, Rows, by_grid
from probe.watching.kept import SHARED, Kept, Tray

SIDES = ("to_q", "to_k")
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype, int]]


class Projections:
    """Queries and keys of some attention layers.

    `read(path, query, key, parts)` is called when a layer has made both. It fills `parts`, the
    layer's part of each variable in `shapes`; `take` gives these variables.

    *Shape:* query (batch, pixel, inner), key (batch, token, inner). Without `tokens`, the keys are
    those of the pixels: self-attention. With `late`, layers are read when the model has answered:
    by `take`, or all together by whoever asks for their `sides`. Raise CaptureError if they are not
    what the layer multiplies, or not of the planned shape.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        layers: Mapping[str, Grid],
        rows: Rows,
        shapes: Callable[[Grid], Shapes],
        read: Callable[[str, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], None],
        tokens: int | None = None,
        late: bool = False,
    ):
        self.modules = {path: modules[path] for path in layers}
        self._layers, self._rows, self._read, self._tokens = layers, rows, read, tokens
        self._buffers, self._tray = GridBuffers(layers, shapes), Tray(list(layers))
        self._kept = Kept([f"{path}.{side}" for path in layers for side in SIDES]) if late else None
        self._queries: dict[str, torch.Tensor] = {}
        self._watched: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._witness = ProcessorWitness(self.modules, rows.kept)
        for path, module in self.modules.items():
            refuse_unreadable(path, module)

    def watches(self) -> list[Watch]:
        watches: list[Watch] = []
        for path, module in self.modules.items():
            self._watched[path] = module.to_q, module.to_k
            watches.append((module.to_q, "output", self._query(path)))
            watches.append((module.to_k, "output", self._key(path, module)))
        return watches + self._witness.watches()

    def take(self) -> dict[Grid, dict[str, torch.Tensor]]:
        """Return the variables of each grid.

        Raise CaptureError if a layer was not read once since the last time.
        """
        if self._kept is None:
            self._check_all()
        else:
            for path, (query, key) in self.sides().items():
                with torch.no_grad():
                    self._read(path, query, key, self._buffers.of(path, query))
        return self._buffers.take()

    def sides(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return query and key of every layer that is read late. Raise as `take` does."""
        self._check_all()
        assert self._kept is not None
        kept = self._kept.take()
        return {path: (kept[f"{path}.to_q"], kept[f"{path}.to_k"]) for path in self.modules}

    def forget(self) -> None:
        """Forget what was read of a call that was broken off."""
        self._queries.clear()
        self._tray.forget()
        self._buffers.take()
        if self._kept is not None:
            self._kept.forget()

    def _check_all(self) -> None:
        self._queries.clear()
        self._tray.take()
        self._witness.take()

    def _query(self, path: str) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            if path in self._queries:
                raise CaptureError(f"{path}.to_q fired twice in one step.", SHARED)
            self._queries[path] = output

        return hook

    def _key(self, path: str, module: Any) -> Callable[[Any], None]:
        def hook(key: torch.Tensor) -> None:
            if path not in self._queries:
                raise CaptureError(
                    f"{path}.to_q fired 0 times in a step.",
                    "Its keys were computed without queries: is it fused?",
                )
            query = self._queries.pop(path)
            self._check(path, query, key, module)
            self._tray.put(path, True)
            if self._kept is not None:
                self._kept.put(f"{path}.to_q", query)
                self._kept.put(f"{path}.to_k", key)
                return
            with torch.no_grad():
                self._read(path, query, key, self._buffers.of(path, query))

        return hook

    def _check(self, path: str, query: torch.Tensor, key: torch.Tensor, module: Any) -> None:
        """Raise CaptureError for replaced modules, or another shape than planned."""
        if self._watched[path] != (module.to_q, module.to_k):
            raise CaptureError(
                f"{path}: to_q or to_k was replaced while recording (a LoRA?).",
                "Change the model before the run begins.",
            )
        pixels = prod(self._layers[path])
        queries, keys = (self._rows.batch, pixels), (self._rows.batch, self._tokens or pixels)
        if query.shape[:2] != queries or key.shape[:2] != keys:
            raise CaptureError(
                f"{path} multiplies {tuple(query.shape[:2])} queries with {tuple(key.shape[:2])} "
                f"keys, not {queries} with {keys}.",
                "Something merges or adds tokens (token merging, an image prompt): undo it, or "
                "leave the layer out of what is captured.",
            )


def refuse_unreadable(path: str, module: Any) -> None:
    """Raise CaptureError for a layer that multiplies other than what to_q and to_k put out."""
    # Not module.fused_projections: unfusing leaves it true.
    if "Fused" in type(module.processor).__name__:
        raise CaptureError(
            f"{path} has fused QKV projections, whose queries cannot be read.",
            "Call pipeline.unfuse_qkv_projections() first.",
        )
    if module.norm_q is not None or module.norm_k is not None:
        raise CaptureError(
            f"{path} normalises its queries or keys, which is not supported yet.",
            "Leave it out of capture.layers.",
        )


class GridBuffers:
    """Tensors for all layers of a grid, made when a step's first layer is read.

    So nothing has to be copied together later.
    """

    def __init__(self, layers: Mapping[str, Grid], shapes: Callable[[Grid], Shapes]):
        self._layers = layers
        self._shapes = {grid: shapes(grid) for grid in set(layers.values())}
        self._index = {
            path: i for paths in by_grid(dict(layers)).values() for i, path in enumerate(paths)
        }
        self._filling: dict[Grid, dict[str, torch.Tensor]] = {}

    def of(self, path: str, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """A layer's part of each variable, to be filled."""
        grid = self._layers[path]
        shapes = self._shapes[grid]
        if grid not in self._filling:
            self._filling[grid] = {
                name: like.new_empty(shape, dtype=dtype)
                for name, (shape, dtype, _) in shapes.items()
            }
        index = self._index[path]
        return {
            name: whole.select(shapes[name][2], index)
            for name, whole in self._filling[grid].items()
        }

    def take(self) -> dict[Grid, dict[str, torch.Tensor]]:
        """The filled tensors of each grid."""
        filled, self._filling = self._filling, {}
        return filled
