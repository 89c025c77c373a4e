"""How exact the recorded maps are: P13.

    python -m benchmarks.exactness --model bundled

They are compared with a softmax in float64 of what each layer multiplies, in a run of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import models
from probe.analysis.maps import probabilities
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.running.recorder import record
from probe.watching.hooks import Hooks
from probe.watching.rehearsal import cross_attention

WORST = {"float16": 3e-5, "float32": 1e-6, "sqrt_u8": 4e-3}


def reference(model: StableDiffusion, steps: int) -> list[dict[str, np.ndarray]]:
    """Return the conditional branch's maps by step and layer.

    *Shape:* (head, token, pixel) float64.
    """
    layers = cross_attention(model.unet)
    seen: dict[str, dict[str, torch.Tensor]] = {path: {} for path in layers}

    def keep(path: str, side: str) -> Callable[[Any], None]:
        return lambda output: seen[path].update(
            {side: output[-1].double().unflatten(-1, (layers[path].heads, -1)).transpose(0, 1)}
        )

    found = []
    watches = [
        (getattr(module, f"to_{side}"), "output", keep(path, side))
        for path, module in layers.items()
        for side in "qk"
    ]
    with Hooks(watches):  # type: ignore[arg-type]
        for _ in denoise(
            model.with_scheduler("DDIM", {}),
            model.condition(models.PROMPT),
            steps=steps,
            guidance_scale=7.5,
        ):
            scores = {
                path: both["k"] @ both["q"].transpose(1, 2) * layers[path].scale
                for path, both in seen.items()
            }
            found.append({path: score.softmax(1).cpu().numpy() for path, score in scores.items()})
    return found


def main() -> None:
    parser = models.parser(__doc__, rounds=1)
    parser.add_argument("--steps", type=int, default=2)
    asked = parser.parse_args()
    pipe = models.pipeline(asked.model, getattr(torch, asked.dtype), asked.device)
    print(f"P13 {asked.model}, {asked.dtype}, {asked.steps} steps; {models.machine()}", flush=True)
    exact = reference(StableDiffusion.of(pipe), asked.steps)
    request = {
        "prompt": models.PROMPT,
        "steps": asked.steps,
        "guidance_scale": 7.5,
        "scheduler": "DDIM",
    }
    for dtype, goal in WORST.items():
        worst = small = rows = 0.0
        with tempfile.TemporaryDirectory() as output:
            run = record(
                {**request, "output": output, "capture": {"dtype": dtype, "statistics": False}},
                pipe,
                progress=False,
            )
            for grid in run.grids:
                maps = run.attention(grid)
                values = probabilities(maps.values).astype(np.float64)
                rows = max(rows, float(np.abs(values.sum(1) - 1).max()))
                for step in range(asked.steps):
                    for number, layer in enumerate(maps["layer"].values):
                        whole = exact[step][str(layer)].transpose(1, 0, 2)
                        kept = values.shape[1] - 1
                        wanted = np.concatenate([whole[:kept], whole[kept:].sum(0, keepdims=True)])
                        off = np.abs(values[step, :, 0, 0, number].reshape(wanted.shape) - wanted)
                        worst = max(worst, float(off.max()))
                        small = max(small, float(off[wanted < 1 / 16].max(initial=0)))
        print(
            f"   stored as {dtype:8} off by {worst:.1e} at most, {small:.1e} where p < 1/16 (goal "
            f"{goal:.0e}); sums off by {rows:.1e} (goal 5e-4)"
        )


if __name__ == "__main__":
    main()
