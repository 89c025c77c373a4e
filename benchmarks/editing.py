"""Measure what an edit costs the loop: CPU time of a step, edited against bare.

    python -m benchmarks.editing --model small            # a head zeroed: aim at most 1%
    python -m benchmarks.editing --model bundled --rounds 9

All is one process with one thread. Variants are taken in turn, every other round in reversed order,
and ratios round by round; `bare again` is the control. The first step of each loop is a warm-up and
not counted. An edit with a donor runs a second trajectory, so it costs at least another step.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks import models
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.editing.editing import edited
from probe.running.planning import plan
from probe.settings.experiment import load_experiment

HEAD: dict[str, Any] = {"kind": "head", "layers": ["mid_block.*"], "heads": [0], "how": "zero"}
EDITS: dict[str, list[dict[str, Any]]] = {
    "bare": [],
    "bare again": [],
    "one head zeroed": [HEAD],
    "a head of every layer zeroed": [{**HEAD, "layers": ["*"]}],
    "value of a word zeroed": [{"kind": "value", "words": ["astronaut"]}],
    "a word masked": [{"kind": "mask", "words": ["astronaut"]}],
    "guidance by step": [{"kind": "guidance", "scale": 1, "to": 8}],
    "maps of another prompt": [{"kind": "map", "donor": {"prompt": "A fox scuba diving"}}],
}
AIM = 0.01


def cpu_of(model: StableDiffusion, steps: int, edits: list[dict[str, Any]]) -> float:
    """Return the CPU seconds of a loop after its first step."""
    experiment = load_experiment(
        {
            "prompt": models.PROMPT,
            "steps": steps,
            "guidance_scale": 7.5,
            "capture": {"attention": "off", "text": False, "statistics": False},
            "edits": edits,
        }
    )
    conditioning = model.condition(models.PROMPT)
    editing = edited(model, plan(model, experiment)) if edits else None
    if editing is not None:
        editing.bind(conditioning)
    loop = denoise(model, conditioning, steps=steps, guidance_scale=7.5, editing=editing)
    began = 0.0
    for index in range(steps):
        if editing is not None:
            editing.prepare(index)
        next(loop)
        if index == 0:
            began = time.process_time()
    return time.process_time() - began


def main() -> int:
    parser = models.parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = models.pipeline(options.model, getattr(torch, options.dtype), options.device)
    model = StableDiffusion.of(pipe).with_scheduler("DDIM", {})
    print(f"{options.model}, {options.dtype}, {models.machine()}")
    ratios: dict[str, list[float]] = {name: [] for name in EDITS}
    for number in range(options.rounds):
        names = list(EDITS)[:: -1 if number % 2 else 1]
        took = {name: cpu_of(model, options.steps, EDITS[name]) for name in names}
        for name in EDITS:
            ratios[name].append(took[name] / took["bare"])
    for name, values in ratios.items():
        if name != "bare":
            middle, least, most = statistics.median(values), min(values), max(values)
            aim = f"  aim {AIM:+.0%}" if name == "one head zeroed" else ""
            print(f"{name:30s} {middle - 1:+7.2%} ({least - 1:+.2%}, {most - 1:+.2%}){aim}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
