"""A graph of operations on the CPU, for tests: what a CUDA graph does, where there is no CUDA.

Operations are noted while it records, and what they put out is spoilt afterwards, for a real graph
computes nothing then. `replay` computes them all again into the same buffers. As in a real one, a
value that goes to the host or comes from there while it records is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("aten::_local_scalar_dense", "aten::nonzero")  # a value, on the host
BRINGS = "aten::lift_fresh"  # numbers from there; a single one is an argument of a kernel


class StandIn:
    """See above. `made` counts the graphs, `replays` the replays of all."""

    made = replays = 0

    def __init__(self, device: torch.device, pool: Any):
        assert device.type == "cpu" and pool == "shared"
        self._log: list[tuple[Any, Any, Any, Any]] = []
        type(self).made += 1

    @staticmethod
    def shared() -> Any:
        return "shared"

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with _Noting(self._log):
            yield
        for func, _, _, outputs in self._log:
            for output in _tensors(outputs):
                if not func.is_view and output.is_floating_point() and not _mutates(func):
                    output.fill_(float("nan"))

    def replay(self) -> None:
        type(self).replays += 1
        for func, args, kwargs, outputs in self._log:
            if func.is_view:
                continue  # it shows the same buffer
            again = func(*args, **kwargs)
            if not _mutates(func):
                for old, new in zip(_tensors(outputs), _tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Noting(TorchDispatchMode):
    def __init__(self, log: list[tuple[Any, Any, Any, Any]]):
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


def _mutates(func: Any) -> bool:
    return bool(func._schema.is_mutable)
