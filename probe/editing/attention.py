"""Edits inside attention layers: values of words, maps, and what heads write.

In a layer they come in the order in which it works: values, then maps, then heads. A map is changed
by adding the difference (P' - P) v before `to_out`: the layer's own fused attention stays, and
where P' is P nothing changes, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from probe.diffusion.family import Family
from probe.editing.donors import Beside
from probe.editing.targets import HeadsOf, heads_of, rows_of, tokens_of
from probe.editing.text import Share, Texts, replaced_places, shared_places
from probe.editing.values import ablated, blended, other_heads, random_like
from probe.errors import ExperimentError
from probe.settings.edits import Edit, Head, Map, Mask, Reweight, Value
from probe.watching.hooks import Change
from probe.watching.interface import Plan

AttentionEdit = Value | Mask | Reweight | Map | Head
Places = dict[int, list[int]]  # of a word's tokens, by step
ORDER: dict[type[Edit], int] = {Value: 0, Mask: 1, Reweight: 1, Map: 1, Head: 2}


@dataclass(frozen=True)
class InLayers:
    """One edit of attention, found in this run."""

    edit: AttentionEdit
    steps: tuple[int, ...]
    rows: list[int]
    heads: HeadsOf
    places: Places = field(default_factory=dict)
    donor: Beside | None = None
    shared: dict[int, list[Share]] = field(default_factory=dict)  # by step

    @property
    def kind(self) -> str:
        return getattr(self.edit, "attention", "cross")

    def sets(self) -> Iterator[tuple[Any, ...]]:
        """Yield what the whole edit determines, so that no other edit can as well."""
        if isinstance(self.edit, Head | Map):
            part = "head" if isinstance(self.edit, Head) else "map"
            for path, heads in self.heads.items():
                yield from ((part, path, head, row) for head in heads for row in self.rows)


def found(
    model: Family, plan: Plan, edit: AttentionEdit, texts: Texts, donor: Beside | None
) -> InLayers:
    """Find an edit's layers, heads, rows and tokens. Raise ExperimentError where there are none."""
    steps, rows = edit.steps_of(plan.schedule.sigmas), rows_of(plan, edit.branch)
    kind = getattr(edit, "attention", "cross")
    heads = heads_of(model, plan, kind, edit.layers, edit.heads)
    places: Places = {}
    if isinstance(edit, Value | Mask | Reweight):
        places = {step: tokens_of(texts.prompt(step, edit.branch), edit.words) for step in steps}
    if isinstance(edit, Head) and edit.control == "other_head":
        heads = _others(model, plan, edit, heads)
    shared: dict[int, list[Share]] = {}
    if isinstance(edit, Map):
        shared = {step: _shared(plan, edit, donor, texts, step) for step in steps}
    return InLayers(edit, steps, rows, heads, places, donor, shared)


def _shared(plan: Plan, edit: Map, donor: Beside | None, texts: Texts, step: int) -> list[Share]:
    """Return which tokens get which of the donor's maps at a step; none for self-attention."""
    assert donor is not None
    if edit.attention == "self":
        if edit.method == "refine":
            raise ExperimentError(
                "method: refine is of tokens, and self-attention has none.", "Write replace."
            )
        return []
    pair = replaced_places if edit.method == "replace" else shared_places
    branches = plan.computed_branches if edit.branch == "both" else (edit.branch,)
    every = [
        pair(texts.prompt(step, branch), next(iter(donor.tokens[branch].values())))
        for branch in branches
    ]
    if any(places != every[0] for places in every):
        raise ExperimentError(
            "branch: both branches' words are not paired in the same way.",
            "Write two edits, one for each branch.",
        )
    return every[0]


def _others(model: Family, plan: Plan, edit: Head, heads: HeadsOf) -> HeadsOf:
    """Return as many random other heads, each of the grid of the one that it stands for."""
    grids = plan.rehearsal.grids if edit.attention == "cross" else plan.rehearsal.self_grids
    layers, chosen = model.attention_layers(), HeadsOf()
    for grid in sorted({grids[path] for path in heads}, reverse=True):
        targets = [(path, head) for path in heads if grids[path] == grid for head in heads[path]]
        every = [
            (path, head)
            for path, own in grids.items()
            if own == grid
            for head in range(layers[path].heads)
        ]
        others = other_heads(targets, every, edit.control_seed)
        if others is None:
            raise ExperimentError(
                f"control: at {grid[0]}x{grid[1]} there are {len(every)} heads, too few for "
                f"{len(targets)} others.",
                "Edit fewer heads, or use control: random.",
            )
        for path, head in others:
            chosen[path] = (*chosen.get(path, ()), head)
    return {path: tuple(sorted(its)) for path, its in chosen.items()}


class AttentionEdits:
    """All edits of attention of a run: the changes at each step."""

    def __init__(self, model: Family, edits: Sequence[InLayers]):
        self._modules = {path: layer.module for path, layer in model.attention_layers().items()}
        self._edits = sorted(edits, key=lambda one: ORDER[type(one.edit)])  # stable: as written
        for one in self._edits:
            if one.donor is not None:
                for path in one.heads:
                    self._watch(one, path)

    def _watch(self, one: InLayers, path: str) -> None:
        module, donor = self._modules[path], one.donor
        assert donor is not None
        if isinstance(one.edit, Head):
            donor.watch((path, "out"), (module.to_out[0], "input", _nothing), one.steps)
            return
        for name in ("to_q", "to_k"):
            donor.watch((path, name), (getattr(module, name), "output", _nothing), one.steps)

    @property
    def layers(self) -> dict[str, set[int]]:
        """The steps at which each layer's output is no longer its softmax(q k) v."""
        steps: dict[str, set[int]] = {}
        for one in self._edits:
            if not isinstance(one.edit, Value) and one.edit.amount:
                for path in one.heads:
                    steps.setdefault(path, set()).update(one.steps)
        return steps

    def changes(self, step: int) -> Iterator[tuple[str, Change]]:
        """Yield the changes of a step, each with a name, in the order in which they are made."""
        now = [one for one in self._edits if step in one.steps]
        for path in dict.fromkeys(path for one in now for path in one.heads):
            here = [one for one in now if path in one.heads]
            yield from self._of_layer(path, here, step)

    def _of_layer(
        self, path: str, edits: Sequence[InLayers], step: int
    ) -> Iterator[tuple[str, Change]]:
        module = self._modules[path]
        maps = [one for one in edits if ORDER[type(one.edit)] == 1]
        for one in edits:
            if isinstance(one.edit, Value):
                yield f"{path}.to_v", (module.to_v, "output", self._values(path, one, step))
        if maps:
            seen: dict[str, torch.Tensor] = {}
            for name in ("to_q", "to_k", "to_v"):
                yield f"{path}.{name}", (getattr(module, name), "output", _keeping(seen, name))
            change = self._maps(path, maps, step, seen)
            yield f"{path}.to_out.0", (module.to_out[0], "input", change)
        for one in edits:
            if isinstance(one.edit, Head):
                change = self._heads(path, one, step)
                yield f"{path}.to_out.0", (module.to_out[0], "input", change)

    def _values(
        self, path: str, one: InLayers, step: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        heads, rows, places = list(one.heads[path]), one.rows, one.places[step]
        count = int(self._modules[path].heads)

        def change(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            wide = value.unflatten(-1, (count, -1))  # (row, token, head, feature), a view
            at = _grid(rows, places, heads)
            wide[at] = blended(wide[at], torch.zeros_like(wide[at]), one.edit.amount)
            return value

        return change

    def _maps(
        self, path: str, edits: Sequence[InLayers], step: int, seen: dict[str, torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        module = self._modules[path]
        rows = sorted({row for one in edits for row in one.rows})

        def change(mixed: torch.Tensor) -> torch.Tensor:
            shares = attention_map(module, seen["to_q"], seen["to_k"], rows)
            edited = shares
            for one in edits:
                at = _grid([rows.index(row) for row in one.rows], list(one.heads[path]))
                own = edited[at]
                edited = edited.clone()
                edited[at] = blended(own, edited_map(module, path, one, step, own), one.edit.amount)
            value = seen["to_v"][rows].unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
            difference = ((edited - shares) @ value).transpose(1, 2).flatten(2)
            mixed = mixed.clone()
            mixed[rows] += difference.to(mixed.dtype)
            return mixed

        return change

    def _heads(self, path: str, one: InLayers, step: int) -> Callable[[torch.Tensor], torch.Tensor]:
        edit, heads, count = one.edit, list(one.heads[path]), int(self._modules[path].heads)
        assert isinstance(edit, Head)

        def by_head(value: torch.Tensor) -> torch.Tensor:
            wide: torch.Tensor = value.unflatten(-1, (count, -1)).transpose(1, 2)
            return wide  # (row, head, pixel, feature)

        def change(mixed: torch.Tensor) -> torch.Tensor:
            mixed = mixed.clone()
            wide, at = by_head(mixed), _grid(one.rows, heads)
            donated = None if one.donor is None else by_head(one.donor.values[path, "out"])[at]
            other = ablated(wide[at], edit.how, (2,), donated)
            if edit.control == "random":
                other = random_like(wide[at], other, edit.control_seed, step, path)
            wide[at] = blended(wide[at], other, edit.amount)
            return mixed

        return change


def attention_map(
    module: Any, query: torch.Tensor, key: torch.Tensor, rows: Sequence[int]
) -> torch.Tensor:
    """Return softmax(scale q k^T) in float32. *Shape:* (row, head, pixel, key)."""
    q, k = (
        side[rows].unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
        for side in (query, key)
    )
    shares: torch.Tensor = (q @ k.transpose(-1, -2) * module.scale).softmax(-1)
    return shares


def edited_map(module: Any, path: str, one: InLayers, step: int, own: torch.Tensor) -> torch.Tensor:
    """Return a map after the whole of an edit. *Shape:* (row, head, pixel, key)."""
    edit = one.edit
    if isinstance(edit, Mask):
        left = own.clone()
        left[..., one.places[step]] = 0
        # Where the words had all of it, nothing is left to share out.
        least = torch.finfo(left.dtype).tiny
        masked: torch.Tensor = left / left.sum(-1, keepdim=True).clamp_min(least)
        return masked
    if isinstance(edit, Reweight):
        weighted = own.clone()
        weighted[..., one.places[step]] *= edit.scale
        return weighted
    assert isinstance(edit, Map) and one.donor is not None
    values = one.donor.values
    other = attention_map(module, values[path, "to_q"], values[path, "to_k"], one.rows)
    other = other[:, list(one.heads[path])]
    if one.kind == "self":
        return other
    shared = one.shared[step]
    edited, alone = own.clone(), [pair for pair in shared if len(pair[1]) == pair[2] == 1]
    edited[..., [here for here, _, _ in alone]] = other[..., [there[0] for _, there, _ in alone]]
    for here, there, parts in shared:
        if not len(there) == parts == 1:
            edited[..., here] = other[..., there].sum(-1) / parts
    return edited


def _grid(*indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return an index of every combination: rows and heads, or rows, tokens and heads."""
    last = len(indices) - 1
    return tuple(
        torch.tensor(list(index)).view(-1, *[1] * (last - number))
        for number, index in enumerate(indices)
    )


def _keeping(seen: dict[str, torch.Tensor], name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(value: torch.Tensor) -> torch.Tensor:
        seen[name] = value
        return value

    return keep


def _nothing(_: Any) -> None:
    """Stand in a watch for what its owner does with the value."""
