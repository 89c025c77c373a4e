"""How long each part of a run takes, and how much memory: measured without making the device wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from probe.system import peak_memory
from probe.watching.hooks import Hooks


class Clock:
    """Times of the components and steps. On CUDA the UNet is timed by events, so that the loop never waits for the device."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self._seconds: dict[str, float] = {}
        self._steps: list[float] = []
        self._marks: list[Any] = []
        self.resting = False  # while true, calls of the UNet are not timed

    def reset_memory(self) -> None:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    @contextlib.contextmanager
    def measure(self, component: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        self._seconds[component] = self._seconds.get(component, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._steps.append(time.perf_counter() - start)

    def watching(self, unet: Any) -> Hooks:
        return Hooks([(unet, "input", self._mark), (unet, "output", self._mark)])

    def _mark(self, _: Any) -> None:
        if self.resting:
            return
        if self._cuda is None:
            self._marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)

    def read(self) -> tuple[list[float], list[float], dict[str, float], int]:
        """Seconds of each UNet call and of each step, seconds of each component, and the peak memory in bytes."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        unet = [b - a if self._cuda is None else a.elapsed_time(b) / 1000 for a, b in pairs]
        self._seconds["unet"] = sum(unet)
        memory = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else peak_memory()
        return unet, self._steps, self._seconds, memory
