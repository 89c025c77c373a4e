"""Record time, memory and size of each part of a run. Hooks take the time; no device waits."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.sampling import Step
from probe.format.schema import ArraySpec, spec
from probe.system import peak_memory
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Plan, Store


class Cost(Capture):
    """Seconds of the components and of each step, FLOPs, sizes and peak memory.

    On CUDA, device events time the components. A parameter that two components share counts once in
    each of them. Buffers do not count.
    """

    component = "all"

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._model = plan, model
        self._cuda = model.device if model.device.type == "cuda" else None
        decoder = [] if model.vae is None else [("vae", model.vae.decoder)]
        encoders = [(name, encoder) for name, (encoder, _) in model.text_encoders().items()]
        self._parts = [*encoders, ("unet", model.unet), *decoder]
        self._marks: dict[str, list[Any]] = {name: [] for name, _ in self._parts}
        self._steps: list[float] = []
        self._began = time.perf_counter()
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def arrays(self) -> list[ArraySpec]:
        flops, components = self._plan.rehearsal.flops, self._model.components()
        parameters = {part: list(components[part].parameters()) for part in flops}
        counts = [sum(p.numel() for p in parameters[part]) for part in flops]
        weight_bytes = [
            sum(p.numel() * p.element_size() for p in parameters[part]) for part in flops
        ]
        return [
            spec("cost", "component", value=list(flops)),
            spec("cost", "unet_seconds", (self._plan.calls,)),
            spec("cost", "step_seconds", (self._plan.calls,)),
            spec("cost", "seconds", (len(flops),)),
            spec("cost", "flops", value=np.array(list(flops.values()))),
            spec("cost", "parameters", value=np.array(counts)),
            spec("cost", "weight_bytes", value=np.array(weight_bytes)),
            spec("cost", "peak_memory", ()),
        ]

    def watches(self) -> list[Watch]:
        return [
            (module, when, functools.partial(self._mark, name))
            for name, module in self._parts
            for when in ("input", "output")
        ]

    def _mark(self, component: str, _: Any) -> None:
        if self._cuda is None:
            self._marks[component].append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._cuda))  # it may be another than GPU 0
            self._marks[component].append(event)

    def expect(self, call: int | str) -> None:
        self._began = time.perf_counter()

    def passed(self, step: Step, store: Store) -> None:
        self._steps.append(time.perf_counter() - self._began)

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        for marks in self._marks.values() if self._cuda is not None else ():
            for event in marks[-1:]:
                event.synchronize()  # of the whole device, it would break a capture elsewhere
        seconds = {name: self._seconds(marks) for name, marks in self._marks.items()}
        # Another process computed these steps.
        before = [math.nan] * (self._plan.calls - len(seconds["unet"]))
        store.write("cost/unet_seconds", before + seconds["unet"])
        store.write("cost/step_seconds", before + self._steps[len(before) :])
        store.write(
            "cost/seconds", [sum(seconds.get(part, [])) for part in self._plan.rehearsal.flops]
        )
        memory = torch.cuda.max_memory_allocated(self._cuda) if self._cuda else peak_memory()
        store.write("cost/peak_memory", memory)
        return []

    def _seconds(self, marks: list[Any]) -> list[float]:
        pairs = zip(marks[::2], marks[1::2], strict=True)
        return [b - a if self._cuda is None else a.elapsed_time(b) / 1000 for a, b in pairs]
