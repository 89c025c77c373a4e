"""A graph of operations on the CPU, for tests: what a CUDA graph does, where there is no CUDA.

Operations are noted while it records, and what they put out is spoilt afterwards, for a real graph
computes nothing then. `replay` computes them all again into the same buffers. As in a real one, a
value that goes to the host or comes from there while it records is refused. A real graph knows
addresses and keeps nothing alive that was there before: `replay` refuses where that is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = ("aten::_local_scalar_dense", "aten::nonzero")  # a value, on the host
BRINGS = "aten::lift_fresh"  # numbers from there; a single one is an argument of a kernel


Log = list[tuple[Any, Any, Any, Any]]  # operation, arguments, keywords, and what it gives


class StandIn:
    """See above. `made` counts the graphs, `replays` the replays of all."""

    made = replays = 0

    def __init__(self, device: torch.device, pool: Any):
        assert device.type == "cpu" and pool == "shared"
        self._log = Log()
        type(self).made += 1

    @staticmethod
    def shared() -> Any:
        return "shared"

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with _Noting(self._log):
            yield
        self._log = _without_what_was_there(self._log)
        for *_, outputs in self._log:
            for output in outputs:
                if output.is_floating_point():
                    output.fill_(float("nan"))

    def replay(self) -> None:
        type(self).replays += 1
        for func, args, kwargs, outputs in self._log:
            again = func(*_found(args), **_found(kwargs))
            for old, new in zip(outputs, _tensors(again) if outputs else (), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass(frozen=True)
class _Address:
    """A tensor that was there before, which nobody keeps alive by knowing where it is."""

    storage: StorageWeakRef
    dtype: torch.dtype
    layout: tuple[Any, ...]  # size, stride, and where it begins

    def found(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a graph reads what was freed"
        size, stride, first = self.layout
        return torch.empty(0, dtype=self.dtype).set_(storage, first, size, stride)


def _without_what_was_there(log: Log) -> Log:
    """Return a log that holds the tensors which its operations made, and addresses of others.

    Views are left out: they show the same memory.
    """
    made, kept = set[int](), Log()

    def lent(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
            return leaf  # a single number is an argument of a kernel
        if leaf.untyped_storage()._cdata in made:
            return leaf
        layout = (leaf.size(), leaf.stride(), leaf.storage_offset())
        return _Address(StorageWeakRef(leaf.untyped_storage()), leaf.dtype, layout)

    for func, args, kwargs, outputs in log:
        if func.is_view:
            continue
        given = tree_map(lent, (args, kwargs))
        new = [] if func._schema.is_mutable else _tensors(outputs)
        made |= {tensor.untyped_storage()._cdata for tensor in new}
        kept.append((func, *given, new))
    return kept


def _found(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.found() if isinstance(leaf, _Address) else leaf, tree)


class _Noting(TorchDispatchMode):
    def __init__(self, log: Log):
        super().__init__()
        self._log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in READS or (name == BRINGS and args[0].ndim):
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self._log.append((func, args, kwargs, outputs))
        return outputs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
