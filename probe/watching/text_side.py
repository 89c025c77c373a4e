"""The text side of cross-attention: what each token offers. It is read once a run.

It depends on the prompt alone. Attention says how much of a token a place takes. |v W_O| says how
large that is: the length of the token's value after the layer's output matrix (Kobayashi et al.
2020, "Attention is not only a weight").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from probe.diffusion.family import Family
from probe.format.schema import ArraySpec, spec
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Plan, Values, grid_group
from probe.watching.kept import Tray
from probe.watching.labels import heads_of
from probe.watching.queries import width_of
from probe.watching.rehearsal import cross_attention


class TextSide(Capture):
    """The size of each token's value; with `capture.attention: queries`, also every token's key.

    *Shape:* (branch, token, layer, head) float32, keys with (key_feature) last.
    """

    def __init__(self, model: Family, plan: Plan):
        modules = cross_attention(model.unet)
        self._modules = {path: modules[path] for path in plan.layers}
        self._plan, self._mode = plan, plan.recipe.capture.attention
        self._rows = [plan.rows.of(branch)[0] for branch in plan.kept_branches]
        self._tray = Tray([f"{side} {path}" for path in plan.layers for side in ("key", "value")])

    def arrays(self) -> list[ArraySpec]:
        plan, specs = self._plan, list[ArraySpec]()
        for grid, layers in plan.grids.items():
            group, heads = grid_group(grid), heads_of(plan, layers, grid)
            lead = (len(plan.kept_branches), len(plan.kept.positions), len(layers))
            specs.append(
                spec(group, "value_size", (*lead, 1 if self._mode == "summary" else heads))
            )
            if self._mode == "queries":
                specs.append(spec(group, "key", (*lead, heads, width_of(plan, grid))))
        return specs

    def watches(self) -> list[Watch]:
        watches: list[Watch] = []
        for path, module in self._modules.items():
            watches.append((module.to_k, "output", self._keep("key", path)))
            watches.append((module.to_v, "output", self._keep("value", path)))
        return watches

    def wants(self, index: int, first: bool) -> bool:
        return first

    def forget(self) -> None:
        self._tray.forget()

    @torch.no_grad()
    def take(self, step: Any) -> Values:
        seen, values = self._tray.take(), Values()
        for grid, layers in self._plan.grids.items():
            sizes = [
                self._merged(written_sizes(seen[f"value {path}"], self._modules[path]))
                for path in layers
            ]
            stacked = torch.stack(sizes, dim=2)
            if self._mode == "summary":
                stacked = stacked.mean(dim=-1, keepdim=True)
            values[f"{grid_group(grid)}/value_size"] = stacked
            if self._mode == "queries":
                keys = [scaled_keys(seen[f"key {path}"], self._modules[path]) for path in layers]
                values[f"{grid_group(grid)}/key"] = torch.stack(keys, dim=2)
        return values

    def _keep(self, side: str, path: str) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            self._tray.put(f"{side} {path}", output.detach()[self._rows])

        return hook

    def _merged(self, sizes: torch.Tensor) -> torch.Tensor:
        """Return the sizes of the kept tokens; `rest` has the mean size of its tokens."""
        end = self._plan.kept.end
        if end + 1 >= self._plan.kept.tokens:
            return sizes
        return torch.cat([sizes[:, : end + 1], sizes[:, end + 1 :].mean(1, keepdim=True)], dim=1)


def scaled_keys(key: torch.Tensor, module: Any) -> torch.Tensor:
    """Return keys by head, times 1 / sqrt(key_feature).

    *Shape:* (n, token, inner) -> (n, token, head, key_feature) float32.
    """
    scaled: torch.Tensor = key.float().unflatten(-1, (module.heads, -1)) * module.scale
    return scaled


def written_sizes(value: torch.Tensor, module: Any) -> torch.Tensor:
    """Return |v W_O| of each token and head: the length of what it adds to the picture.

    *Shape:* (n, token, inner) -> (n, token, head).
    """
    wide = value.float().unflatten(-1, (module.heads, -1))
    output = module.to_out[0]
    if not any(getattr(output, "scaling", {None: True}).values()):
        output = output.base_layer  # LoRAs of scale 0 are on it
    if type(output) is nn.Linear:
        weight = output.weight.float().unflatten(1, (module.heads, -1))  # (out, head, feature)
        written: torch.Tensor = torch.einsum("nthd,ohd->ntho", wide, weight)
        return written.square().sum(-1).sqrt()
    # An adapter sits on the matrix (LoRA): its output for one head alone, less that for nothing.
    one_head = torch.eye(module.heads, device=value.device)[:, :, None]
    alone = (wide[:, :, None] * one_head).flatten(-2).to(value.dtype)  # (n, token, head, inner)
    added: torch.Tensor = output.forward(alone) - output.forward(torch.zeros_like(alone))
    return added.float().square().sum(-1).sqrt()
