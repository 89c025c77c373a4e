"""How long the bundled model takes: bare, recorded by default, and with everything captured, side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.bundled

One process, one warm-up, the variants in turn and in reversed order every other round; `bare again` is the control
(bare against bare). The ratio to bare is taken round by round; median, least and greatest are printed. Then whole
commands, each in a fresh process, imports and loading included. It decides no test.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

EVERYTHING = {"branches": "both", "tokens": "all"}
NOTHING = ["--capture.attention", "off", "--capture.text", "false", "--capture.statistics", "false"]
EXAMPLE = "experiments/astronaut.yaml"


def variants(output: str) -> dict[str, Callable[[], Any]]:
    import torch
    from diffusers import StableDiffusionPipeline

    from probe.loading import BUNDLED
    from probe.models import StableDiffusion
    from probe.recorder import record
    from probe.sampling import denoise

    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED["emojiworld"], dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    model = StableDiffusion.of(pipeline)
    asked = {"steps": 30, "guidance_scale": 3, "output": output}

    def bare() -> None:
        for step in denoise(model, model.condition("An astronaut scuba diving"), steps=30, guidance_scale=3):
            final = step.next_latents
        model.decode(final)

    return {
        "bare": bare,
        "bare again": bare,
        "recorded": lambda: record(asked, pipeline, progress=False),
        "everything": lambda: record({**asked, "capture": EVERYTHING, "decode_every": 5}, pipeline, progress=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as output:
        ways = variants(output)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way()
        for index in range(rounds):
            for name in list(ways)[:: 1 if index % 2 == 0 else -1]:
                start = time.perf_counter()
                ways[name]()
                times[name].append(time.perf_counter() - start)
        print(f"{'30 steps, guidance 3':22} {'seconds':>8}   ratio to bare: median (least, greatest) of {rounds} rounds")
        for name, taken in times.items():
            ratios = sorted(a / b for a, b in zip(taken, times["bare"], strict=True))
            print(f"{name:22} {statistics.median(taken):8.2f}   {statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})")
        for name, command in {
            "probe.run --help": ["-m", "probe.run", "--help"],
            "probe.run, everything": ["-m", "probe.run", EXAMPLE, "--output", output, "--quiet"],
            "probe.run, uncaptured": ["-m", "probe.run", EXAMPLE, "--output", output, "--quiet", "--decode-every", "0", *NOTHING],
        }.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            print(f"{name:22} {time.perf_counter() - start:8.2f}   a fresh process")


if __name__ == "__main__":
    main()
