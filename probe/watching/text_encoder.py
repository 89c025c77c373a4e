"""Record the inside of a text encoder: embeddings, layers, their attention, and the output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from probe.diffusion.family import COND, Family
from probe.diffusion.text import normed
from probe.errors import CaptureError
from probe.format.schema import ArraySpec, spec
from probe.watching.conditions import FINITE, NOT_FINITE
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Plan, Store, as_numpy, numpy_dtype
from probe.watching.kept import Tray
from probe.watching.labels import token_labels
from probe.watching.rehearsal import first_tensor

LAYERED = ("hidden", "attention")  # variables whose first axis counts the layers


class TextEncoder(Capture):
    """What a text encoder makes of each branch's prompt.

    For a branch that no text encoder reads, zeros are recorded, as the denoiser gets zeros. Each
    layer's attention is proven: softmax(q k^T) v must be what it writes. Raise CaptureError if it
    is not. With `clip_skip`, `output` is the state that the denoiser is given, after the last norm.
    """

    def __init__(self, model: Family, plan: Plan, component: str = "text_encoder"):
        self.component, self._model, self._plan = component, model, plan
        text_encoder, _ = model.text_encoders()[component]
        self._config = text_encoder.config
        self._root: Any = getattr(text_encoder, "text_model", text_encoder)
        self._layers = list(self._root.encoder.layers)
        self._branch, self._mask = "", cast("torch.Tensor | None", None)
        self._pooled = getattr(text_encoder, "text_projection", None)
        self._names = [
            "embedding",
            "hidden",
            "output",
            "attention",
            *(["pooled"] if self._pooled is not None else []),
        ]
        layered = [f"{part} {i}" for part in LAYERED for i in range(len(self._layers))]
        parts = [*(name for name in self._names if name not in LAYERED), *layered]
        self._read = [
            branch for branch in plan.computed_branches if branch not in plan.zeroed_branches
        ]
        self._tray = Tray([f"{branch} {part}" for branch in self._read for part in parts])
        self._sides: dict[tuple[str, int], torch.Tensor] = {}

    def arrays(self) -> list[ArraySpec]:
        plan, config, group = self._plan, self._config, f"text/{self.component}"
        branches, tokens, layers = (
            len(plan.computed_branches),
            plan.kept.tokens,
            int(config.num_hidden_layers),
        )
        state, dtype = (branches, tokens, int(config.hidden_size)), numpy_dtype(self._model.dtype)
        ids = np.stack(
            [
                plan.tokens[branch][self.component].ids[0].numpy()
                for branch in plan.computed_branches
            ]
        )
        pooled = (
            []
            if self._pooled is None
            else [spec(group, "pooled", (branches, int(config.projection_dim)), dtype)]
        )
        return [
            *token_labels(group, plan, plan.computed_branches, range(tokens), self.component),
            spec(group, "token_id", value=ids),
            spec(group, "embedding", state, dtype),
            spec(group, "hidden", (layers, *state), dtype),
            spec(group, "output", state, dtype),
            spec(
                group,
                "attention",
                (layers, branches, int(config.num_attention_heads), tokens, tokens),
            ),
            *pooled,
        ]

    def watches(self) -> list[Watch]:
        watches: list[Watch] = [
            (self._root.embeddings, "output", functools.partial(self._put, "embedding")),
            (self._root.final_layer_norm, "output", functools.partial(self._put, "output")),
        ]
        if self._pooled is not None:
            watches.append((self._pooled, "output", functools.partial(self._put, "pooled")))
        for index, layer in enumerate(self._layers):
            watches.append((layer, "output", functools.partial(self._put, f"hidden {index}")))
            watches.append((layer.self_attn.q_proj, "output", self._keep("query", index)))
            watches.append((layer.self_attn.k_proj, "output", self._attend(index, layer.self_attn)))
            watches.append((layer.self_attn.v_proj, "output", self._keep("value", index)))
            watches.append((layer.self_attn.out_proj, "input", self._prove(index)))
        return watches

    def expect(self, call: int | str) -> None:
        prompt = self._plan.tokens[str(call)][self.component]
        self._branch, self._mask = str(call), self._model.text_mask(prompt)

    def begin(self, store: Store) -> None:
        seen, group = self._tray.take(), f"text/{self.component}"
        for name in self._names:
            read = {branch: self._whole(seen, branch, name) for branch in self._read}
            rows = [
                read[branch] if branch in read else torch.zeros_like(read["cond"])
                for branch in self._plan.computed_branches
            ]
            store.write(
                f"{group}/{name}", as_numpy(torch.stack(rows, dim=1 if name in LAYERED else 0))
            )

    def _whole(self, seen: dict[str, torch.Tensor], branch: str, name: str) -> torch.Tensor:
        """Return what was seen of one branch.

        *Shape:* embedding and output (token, feature), pooled (feature), hidden (layer, token,
        feature), attention (layer, head, token, key).
        """
        prefix, skip = f"{branch} {name}", self._model.clip_skip
        if name == "output" and branch == COND and skip and self._pooled is None:
            states = ["embedding", *(f"hidden {index}" for index in range(len(self._layers)))]
            with torch.no_grad():
                return normed(self._root, seen[f"{branch} {states[-(skip + 1)]}"])[0]
        if name not in LAYERED:
            return seen[prefix][0]
        return torch.stack([seen[f"{prefix} {index}"][0] for index in range(len(self._layers))])

    def _put(self, name: str, output: Any) -> None:
        self._tray.put(f"{self._branch} {name}", first_tensor(output))

    def _keep(self, side: str, index: int) -> Callable[[Any], None]:
        return functools.partial(self._sides.__setitem__, (side, index))

    def _attend(self, index: int, module: Any) -> Callable[[Any], None]:
        @torch.no_grad()
        def hook(key: torch.Tensor) -> None:
            query = self._sides.pop(("query", index))
            q, k = (by_head(side, module.num_heads) for side in (query, key))
            products = q @ k.transpose(-1, -2) * module.scale
            hidden = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).triu(
                1
            )
            if self._mask is not None:
                hidden = hidden | (self._mask.to(products.device) == 0)
            shares = products.masked_fill(hidden, float("-inf")).softmax(-1)
            self._sides["shares", index] = shares
            self._put(f"attention {index}", shares)

        return hook

    def _prove(self, index: int) -> Callable[[Any], None]:
        @torch.no_grad()
        def hook(written: torch.Tensor) -> None:
            shares, values = self._sides.pop(("shares", index)), self._sides.pop(("value", index))
            parts = by_head(values, shares.shape[1])
            expected, size = (
                (shares @ value).transpose(1, 2).flatten(2) for value in (parts, parts.abs())
            )
            off = float((written.float() - expected).norm() / size.norm())
            if off <= max(1e-3, torch.finfo(written.dtype).eps / 2):
                return
            why = (
                f"does not attend to the tokens before each token (off by {off:.1%}), so its maps "
                "would be wrong."
            )
            remedy = "Load the text encoder anew, or leave it out: capture.text: false."
            why, remedy = (why, remedy) if off == off else (NOT_FINITE, FINITE)
            raise CaptureError(f"{self.component}: layer {index} {why}", remedy)

        return hook


def by_head(side: torch.Tensor, heads: int) -> torch.Tensor:
    """*Shape:* (batch, token, feature) -> (batch, head, token, head_feature) float32."""
    apart: torch.Tensor = side.float().unflatten(-1, (heads, -1))
    return apart.transpose(1, 2)
