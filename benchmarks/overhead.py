"""Measure what recording costs the loop.

P1 (nothing changes), P2, P2b, P3 (self time), P13 (exactness), and on CUDA P4.

    python -m benchmarks.overhead --model small
    python -m benchmarks.overhead --model sd1 --rounds 3 --steps 2          # long
    python -m benchmarks.overhead --model sd1 --dtype float16 --device cuda  # P4

All is one process with one thread. Variants are taken in turn, every other round in reversed order,
and ratios round by round. A whole run is `probe.record`, with a stopwatch on what recording adds.

*Self time* is CPU time, divided by that of the bare loop. It is the time of the loop's thread in
everything that is not model or scheduler (hooks, and handing a step over), plus that of all other
threads until the last step is on disk (writer and zarr; torch has one thread here, the loop's). A
shared machine disturbs CPU times far less than wall time.

*CPU ratio* is the loop's whole CPU time, recorded against bare: the cross-check, as good as its
spread in `bare again`. The first step of each loop is a warm-up and not counted. `once` is what
recording adds to it, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import models
from benchmarks.loop import Took, stopwatch
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.running.recorder import record

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


class Bench:
    """One model, and the loops that are compared on it."""

    def __init__(self, pipe: Any, steps: int, folder: str):
        self.pipe, self.model, self.folder = pipe, StableDiffusion.of(pipe), folder
        self.steps = steps
        self.asked = {
            "prompt": models.PROMPT,
            "steps": steps,
            "guidance_scale": 7.5,
            "scheduler": "DDIM",
        }
        self.final: dict[str, np.ndarray] = {}

    def bare(self, name: str) -> Took:
        model = self.model.with_scheduler("DDIM", {})
        conditioning = model.condition(models.PROMPT)
        cpu = wall = 0.0
        for step in denoise(model, conditioning, steps=self.steps, guidance_scale=7.5):
            final = step.next_latents
            if step.index == 0:
                cpu, wall = time.process_time(), time.perf_counter()
        took = Took(time.process_time() - cpu, time.perf_counter() - wall)
        self.final[name] = final.float().cpu().numpy()
        return took

    def recorded(self, name: str) -> Took:
        took = Took()
        with tempfile.TemporaryDirectory(dir=self.folder) as output, stopwatch(took):
            run = record(
                {**self.asked, "output": output, "capture": CAPTURES[name][1]},
                self.pipe,
                progress=False,
            )
            self.final[name] = run.variable("latents/final_latents").values.astype(np.float32)
        return took


def spread(values: list[float], unit: str = "%") -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.2f}{unit} ({low:.2f}, {high:.2f})"


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="steps of each loop, the first not counted (default: 4)",
    )
    parser.add_argument("--variants", nargs="+", choices=list(CAPTURES), default=list(CAPTURES))
    asked = parser.parse_args()
    print(
        f"{asked.model}, {asked.dtype}, {asked.steps} guided steps, {asked.rounds} rounds; "
        f"{models.machine()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            models.pipeline(asked.model, getattr(torch, asked.dtype)), asked.steps, folder
        )
        ways: dict[str, Callable[[str], Took]] = {
            "bare": bench.bare,
            "bare again": bench.bare,
            **dict.fromkeys(asked.variants, bench.recorded),
        }
        rounds: list[dict[str, Took]] = []
        for index in range(asked.rounds):
            order = list(ways)[:: 1 if index % 2 == 0 else -1]
            rounds.append({name: ways[name](name) for name in order})
            print(
                f"round {index + 1} of {asked.rounds}: bare {rounds[-1]['bare'].cpu:.1f} s CPU",
                flush=True,
            )
    report(asked, rounds, bench.final)


def report(
    asked: argparse.Namespace, rounds: list[dict[str, Took]], final: dict[str, np.ndarray]
) -> None:
    """Print what each way of recording costs, as a table."""
    heads = f"{'hooks':>7} {'hand over':>9} {'writing':>8} {'once':>6}   bits"
    print(f"\n{'':34} {'self time':24} {'goal':>6}   {'CPU ratio':26} {heads}")
    bare = [took["bare"].cpu for took in rounds]
    for name in [name for name in rounds[0] if name != "bare"]:
        ratio = spread([100 * (took[name].cpu / took["bare"].cpu - 1) for took in rounds])
        differing = int(np.sum(final[name] != final["bare"]))
        bits = f"{differing} DIFFER" if differing else "equal"
        if name == "bare again":
            print(f"{name + ' (control)':34} {'':24} {'':>6}   {ratio:26} {'':33}   {bits}")
            continue
        shares = {
            part: [
                100 * getattr(took[name], part) / cpu
                for took, cpu in zip(rounds, bare, strict=True)
            ]
            for part in ("hooks", "handing_over", "writing", "own")
        }
        own = spread(shares.pop("own"))
        hooks, over, writing = map(statistics.median, shares.values())
        once = 1000 * statistics.median(took[name].once for took in rounds)
        goal = GOALS.get((asked.model, asked.dtype), {}).get(name)
        limit = "" if goal is None else f"{goal:g}%"
        costs = f"{hooks:6.2f}% {over:8.2f}% {writing:7.2f}% {once:6.0f}"
        print(f"{CAPTURES[name][0]:34} {own:24} {limit:>6}   {ratio:26} {costs}   {bits}")


if __name__ == "__main__":
    main()
