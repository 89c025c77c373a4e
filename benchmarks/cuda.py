"""What recording costs on a GPU: P4.

    python -m benchmarks.cuda --model sd1 --dtype float16 --steps 50

The loop is timed by device events: bare against recorded (default capture, to disk), in turn, every
other round in reversed order. In a run of its own, the times are counted at which the host waits
for the device. Needs CUDA.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models
from benchmarks.loop import Took, stopwatch
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.running.recorder import record


class Events:
    """Device seconds between `begin` and `end`, or the number of times that the host waited."""

    def __init__(self, counting: bool):
        self._counting, self._waits = counting, warnings.catch_warnings(record=True)
        self.found = 0.0

    def begin(self) -> None:
        torch.cuda.synchronize()
        if self._counting:
            self._log: list[Any] = self._waits.__enter__() or []
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        self._start = torch.cuda.Event(enable_timing=True)
        self._start.record()

    def end(self) -> None:
        stop = torch.cuda.Event(enable_timing=True)
        stop.record()
        if self._counting:
            torch.cuda.set_sync_debug_mode("default")
            self._waits.__exit__(None, None, None)
            self.found = sum("synchroniz" in str(warning.message) for warning in self._log)
        torch.cuda.synchronize()
        if not self._counting:
            self.found = self._start.elapsed_time(stop) / 1000


def main() -> int:
    parser = models.parser(__doc__, rounds=10)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("P4 was not measured: there is no CUDA device here.")
        return 1
    pipe = models.pipeline(asked.model, getattr(torch, asked.dtype), "cuda")
    model = StableDiffusion.of(pipe).with_scheduler("DDIM", {})
    print(
        f"P4 {asked.model}, {asked.dtype}, {asked.steps} steps on {torch.cuda.get_device_name()}; "
        f"{models.machine()}",
        flush=True,
    )

    def bare(events: Events) -> None:
        conditioning = model.condition(models.PROMPT)
        events.begin()
        for _ in denoise(model, conditioning, steps=asked.steps, guidance_scale=7.5):
            pass
        events.end()

    def recorded(events: Events) -> None:
        request = {
            "prompt": models.PROMPT,
            "steps": asked.steps,
            "guidance_scale": 7.5,
            "scheduler": "DDIM",
        }
        with tempfile.TemporaryDirectory() as output, stopwatch(Took(), events.begin, events.end):
            record({**request, "output": output}, pipe, progress=False)

    ways: dict[str, Callable[[Events], None]] = {
        "bare": bare,
        "bare again": bare,
        "recorded": recorded,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    waits = {}
    for index in range(asked.rounds + 1):
        for name in list(ways)[:: 1 if index % 2 == 0 else -1]:
            events = Events(counting=index == 0)  # the warm-up counts
            ways[name](events)
            if index:
                times[name].append(events.found)
            else:
                waits[name] = int(events.found)
    for name in ("bare again", "recorded"):
        ratios = sorted(a / b for a, b in zip(times[name], times["bare"], strict=True))
        print(
            f"   {name:10} {statistics.median(ratios):.3f}x ({ratios[0]:.3f}, {ratios[-1]:.3f}), "
            f"goal 1.03; {waits[name]} waits, bare {waits['bare']}"
        )
    print(f"   bare: {1000 * statistics.median(times['bare']) / asked.steps:.1f} ms a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
