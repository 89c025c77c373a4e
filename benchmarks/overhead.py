"""What recording costs the loop: P1 (nothing changes), P2, P2b, P3 (self time), P13 (exactness), and on CUDA P4.

    python -m benchmarks.overhead --model small
    python -m benchmarks.overhead --model sd1 --rounds 3 --steps 2          # long
    python -m benchmarks.overhead --model sd1 --dtype float16 --device cuda  # P4

One process, one thread, one warm-up, the variants in turn and in reversed order every other round, ratios taken round by
round. A whole run is `probe.record`, with a stopwatch on what recording adds to the loop.

*Self time* is CPU time: of the loop's thread in everything that is not model or scheduler (hooks, and handing a step over),
plus that of all other threads until the last step is on disk (writer and zarr; torch has one thread here, the loop's). It is
divided by the CPU time of the bare loop. A shared machine disturbs CPU times far less than wall time. *CPU ratio* is the
loop's whole CPU time, recorded against bare: the cross-check, as good as its spread in `bare again`.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import models
from probe import perform
from probe.capture import hooked
from probe.hooks import Hooks
from probe.models import StableDiffusion
from probe.recorder import record
from probe.sampling import denoise
from probe.store import RunWriter

CAPTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "maps": ("P2: maps of the prompt's tokens", {"statistics": False, "text": False}),
    "default": ("P2b: the same, and statistics", {"text": False}),
    "all tokens": ("P3: maps of all tokens", {"tokens": "all", "statistics": False, "text": False}),
}
GOALS = {
    ("sd1", "float32"): {"maps": 0.40, "default": 2.0, "all tokens": 0.6},
    ("sd1", "bfloat16"): {"maps": 1.2},
    ("small", "float32"): {"maps": 2.5, "all tokens": 4.0},
}


@dataclass
class Took:
    """Seconds of one loop: CPU of all threads, wall; and of what recording adds, by where it is spent."""

    cpu: float = 0.0
    wall: float = 0.0
    hooks: float = 0.0
    handing_over: float = 0.0
    writing: float = 0.0

    @property
    def own(self) -> float:
        return self.hooks + self.handing_over + self.writing


@contextlib.contextmanager
def stopwatch(took: Took) -> Iterator[None]:
    """Time the loop of a `record` inside this block, from its first step to the last step's flush."""
    begun: list[tuple[float, float, float]] = []
    inside = 0.0

    def now() -> tuple[float, float, float]:
        return time.process_time(), time.thread_time(), time.perf_counter()

    def timed(callback: Callable[[Any], None]) -> Callable[[Any], None]:
        def watch(value: Any) -> None:
            start = time.thread_time()
            callback(value)
            took.hooks += time.thread_time() - start

        return watch

    def watching(*captures: Any) -> Hooks:
        if begun:  # the decoder's, after the loop
            return hooked(*captures)
        return Hooks((module, when, timed(callback)) for capture in captures for module, when, callback in capture.watches())

    def steps(*args: Any, **named: Any) -> Iterator[Any]:
        nonlocal inside
        loop = denoise(*args, **named)
        begun.append(now())
        while True:
            start = time.thread_time()
            step = next(loop, None)
            inside += time.thread_time() - start
            if step is None:
                return
            yield step

    flush = RunWriter.flush

    def flushed(writer: RunWriter) -> None:
        flush(writer)
        if begun and not took.cpu:
            took.cpu, thread, took.wall = (after - before for after, before in zip(now(), begun[0], strict=True))
            took.handing_over, took.writing = thread - inside, took.cpu - thread

    with (
        mock.patch.object(perform, "hooked", watching),
        mock.patch.object(perform, "denoise", steps),
        mock.patch.object(RunWriter, "flush", flushed),
    ):
        yield


class Bench:
    """One model, and the loops that are compared on it."""

    def __init__(self, pipe: Any, steps: int, folder: str):
        self.pipe, self.model, self.folder = pipe, StableDiffusion.of(pipe), folder
        self.asked = {"prompt": models.PROMPT, "steps": steps, "guidance_scale": 7.5, "scheduler": "DDIM"}
        self.final: dict[str, np.ndarray] = {}

    def bare(self, name: str) -> Took:
        model = self.model.with_scheduler("DDIM", {})
        conditioning = model.condition(models.PROMPT)
        cpu, wall = time.process_time(), time.perf_counter()
        for step in denoise(model, conditioning, steps=self.asked["steps"], guidance_scale=7.5):
            final = step.next_latents
        took = Took(time.process_time() - cpu, time.perf_counter() - wall)
        self.final[name] = final.float().cpu().numpy()
        return took

    def recorded(self, name: str) -> Took:
        took = Took()
        with tempfile.TemporaryDirectory(dir=self.folder) as output, stopwatch(took):
            run = record({**self.asked, "output": output, "capture": CAPTURES[name][1]}, self.pipe, progress=False)
            self.final[name] = run.variable("latents/final_latents").values.astype(np.float32)
        return took


def spread(values: list[float], unit: str = "%") -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f}{unit} ({low:.2f}, {high:.2f})"


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="steps of each loop (default: 3)")
    parser.add_argument("--variants", nargs="+", choices=list(CAPTURES), default=list(CAPTURES))
    asked = parser.parse_args()
    print(f"{asked.model}, {asked.dtype}, {asked.steps} guided steps, {asked.rounds} rounds; {models.machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(models.pipeline(asked.model, getattr(torch, asked.dtype)), asked.steps, folder)
        ways: dict[str, Callable[[str], Took]] = {"bare": bench.bare, "bare again": bench.bare, **dict.fromkeys(asked.variants, bench.recorded)}
        rounds: list[dict[str, Took]] = []
        for index in range(asked.rounds + 1):
            order = list(ways)[:: 1 if index % 2 == 0 else -1]
            rounds.append({name: ways[name](name) for name in order})
            print(f"round {index} of {asked.rounds}{' (warm-up)' if index == 0 else ''}: bare {rounds[-1]['bare'].cpu:.1f} s CPU", flush=True)
        rounds = rounds[1:]
        print(f"\n{'':34} {'self time':24} {'goal':>6}   {'CPU ratio':26} {'hooks':>7} {'hand over':>9} {'writing':>8}   bits")
        for name in list(ways)[1:]:
            ratio = [100 * (took[name].cpu / took["bare"].cpu - 1) for took in rounds]
            differing = int(np.sum(bench.final[name] != bench.final["bare"]))
            bits = "equal" if not differing else f"{differing} DIFFER"
            if name == "bare again":
                print(f"{name + ' (control)':34} {'':24} {'':>6}   {spread(ratio):26} {'':>7} {'':>9} {'':>8}   {bits}")
                continue
            parts = [
                100 * statistics.median(getattr(took[name], part) / took["bare"].cpu for took in rounds)
                for part in ("hooks", "handing_over", "writing")
            ]
            own = spread([100 * took[name].own / took["bare"].cpu for took in rounds])
            goal = GOALS.get((asked.model, asked.dtype), {}).get(name)
            limit = "" if goal is None else f"{goal:g}%"
            print(f"{CAPTURES[name][0]:34} {own:24} {limit:>6}   {spread(ratio):26} {parts[0]:6.2f}% {parts[1]:8.2f}% {parts[2]:7.2f}%   {bits}")


if __name__ == "__main__":
    main()
