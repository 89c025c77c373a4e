"""Bring a step's values to the host without waiting for them.

Where launches are dear, small values are packed into one tensor, and all copies run beside the
model: on a stream of their own, into pinned memory, which torch keeps and gives again. A tensor
lives until its copy is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from probe.diffusion.streams import stream_of
from probe.watching.interface import Derived, Values, as_numpy
from probe.watching.kept import measures_late

Arrays = dict[str, np.ndarray]
# What gives a value, and the numbers of the tensors that it is made of.
Maker = tuple[Callable[..., np.ndarray], list[int]]


class Transfer:
    """Copies to the host, one step after the other."""

    def start(self, values: Values) -> tuple[Callable[[], Arrays], int]:
        """Start copying. Return a function that waits and gives arrays, and the bytes they hold.

        The caller may change any tensor as soon as this returns, but for those that are `whole`.
        """
        numbers: dict[int, int] = {}  # of each tensor, by its identity: some values share one
        tensors, whole, makers = list[torch.Tensor](), set[int](), dict[str, Maker]()
        for path, value in values.items():
            parts = value.tensors if isinstance(value, Derived) else (value,)
            for tensor in parts:
                if id(tensor) not in numbers:
                    numbers[id(tensor)] = len(tensors)
                    tensors.append(tensor)
            own = [numbers[id(tensor)] for tensor in parts]
            makers[path] = (value.make if isinstance(value, Derived) else _itself, own)
            whole |= {*own} if isinstance(value, Derived) and value.whole else set()
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if tensors and measures_late(tensors[0].device):
            hosts = self._beside(tensors, whole)
        else:
            hosts = functools.partial(list, tensors)

        def arrays() -> Arrays:
            there = [as_numpy(tensor) for tensor in hosts()]
            return {path: make(*(there[n] for n in own)) for path, (make, own) in makers.items()}

        return arrays, nbytes

    def _beside(
        self, tensors: list[torch.Tensor], whole: set[int]
    ) -> Callable[[], list[torch.Tensor]]:
        """Start copying: what is not `whole` is packed, the widest numbers first."""
        apart = sorted(whole)
        order = [number for number in range(len(tensors)) if number not in whole]
        order.sort(key=lambda number: -tensors[number].element_size())
        kinds = [(tensors[number].dtype, tensors[number].shape) for number in order]
        moved = [tensors[number] for number in apart]
        if order:
            moved.append(torch.cat([_as_bytes(tensors[number]) for number in order]))
        count, arrived = len(tensors), self._copied(moved)

        def hosts() -> list[torch.Tensor]:
            copies, first = arrived(), 0
            there = [copies[-1]] * count
            for number, copy in zip(apart, copies, strict=False):
                there[number] = copy
            for number, (dtype, shape) in zip(order, kinds, strict=True):
                last = first + dtype.itemsize * shape.numel()
                there[number] = copies[-1][first:last].view(dtype).view(shape)
                first = last
            return there

        return hosts

    def _copied(self, tensors: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        """Start copying tensors. Return a function that waits for the copies and gives them."""
        device = tensors[0].device
        if device.type == "meta":  # a skeleton's: there is nothing to copy
            return lambda: tensors
        on_cuda = device.type == "cuda"
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_cuda) for t in tensors]
        if not on_cuda:
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor)
            return lambda: copies
        stream, event = stream_of(device, "transfer"), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            event.record(stream)

        def arrived() -> list[torch.Tensor]:
            event.synchronize()
            tensors.clear()  # until now they were not to be freed
            return copies

        return arrived


def _itself(array: np.ndarray) -> np.ndarray:
    return array


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
