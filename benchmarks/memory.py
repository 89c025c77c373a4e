"""Peak memory of a loop, bare and recorded: P5.

    python -m benchmarks.memory --model small

Each mode and number of steps has a fresh process. Its resident memory is sampled every 5 ms, from
the loop's first step until the last step is on disk (on CUDA: torch.cuda.max_memory_allocated).
There is no guidance: that halves the time, and recording keeps the same.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from benchmarks import models
from benchmarks.loop import Took, stopwatch
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.running.recorder import record


class Peak:
    """The most resident memory between `begin` and `end`, in bytes above that at `begin`."""

    def __init__(self, cuda: bool):
        self._cuda, self._process, self._done = cuda, psutil.Process(), threading.Event()
        self.start = self.most = 0

    def begin(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = self.most = self._now()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, torch.cuda.max_memory_allocated() if self._cuda else self._now())

    def _now(self) -> int:
        return int(torch.cuda.memory_allocated() if self._cuda else self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self._now())


@contextlib.contextmanager
def peak(cuda: bool) -> Iterator[Peak]:
    found = Peak(cuda)
    found.begin()
    yield found
    found.end()


def child(asked: Any) -> None:
    """Run one loop after one warm-up step, in this process, and print its peak."""
    pipe = models.pipeline(asked.model, getattr(torch, asked.dtype), asked.device)
    model, cuda = StableDiffusion.of(pipe).with_scheduler("DDIM", {}), asked.device == "cuda"
    conditioning = model.condition(models.PROMPT, guided=False)
    for _ in denoise(model, conditioning, steps=1, guidance_scale=1):
        pass
    if asked.child == "bare":
        with peak(cuda) as found:
            for _ in denoise(model, conditioning, steps=asked.steps[0], guidance_scale=1):
                pass
    else:
        found = Peak(cuda)
        tokens = "all" if asked.child == "all tokens" else "prompt"
        request = {
            "prompt": models.PROMPT,
            "steps": asked.steps[0],
            "guidance_scale": 1,
            "scheduler": "DDIM",
            "capture": {"tokens": tokens},
        }
        with tempfile.TemporaryDirectory() as output, stopwatch(Took(), found.begin, found.end):
            record({**request, "output": output}, pipe, progress=False)
    print(json.dumps([found.most, found.most - found.start]))


def main() -> None:
    parser = models.parser(__doc__, rounds=1)
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[10, 50],
        help="the two lengths that the slope is taken between",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=("default", "all tokens"), default=["default", "all tokens"]
    )
    parser.add_argument("--child", help="for its own use: run one mode")
    asked = parser.parse_args()
    if asked.child:
        child(asked)
        return
    print(f"{asked.model}, {asked.dtype}, {asked.device}; {models.machine()}", flush=True)
    peaks: dict[tuple[str, int], float] = {}
    for mode in ("bare", *asked.modes):
        for steps in asked.steps:
            found = []
            for _ in range(asked.rounds):
                same = ["--model", asked.model, "--dtype", asked.dtype, "--device", asked.device]
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.memory",
                    *same,
                    "--steps",
                    str(steps),
                    "--child",
                    mode,
                ]
                found.append(
                    json.loads(
                        subprocess.run(
                            command, check=True, capture_output=True, text=True
                        ).stdout.splitlines()[-1]
                    )[0]
                )
            peaks[mode, steps] = statistics.median(found) / 1e6
            print(f"{mode:12} {steps:3} steps: peak {peaks[mode, steps]:7.0f} MB", flush=True)
    short, long = min(asked.steps), max(asked.steps)
    for mode in asked.modes:
        extra = {steps: peaks[mode, steps] - peaks["bare", steps] for steps in asked.steps}
        slope = (extra[long] - extra[short]) / max(long - short, 1)
        print(
            f"P5 {mode:12} extra {extra[short]:6.1f} MB at {short} steps, {extra[long]:6.1f} MB at "
            f"{long} (goal 128); {slope:+.2f} MB a step (goal 1)"
        )


if __name__ == "__main__":
    main()
