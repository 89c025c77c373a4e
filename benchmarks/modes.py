"""What each way of recording attention weighs, and how far its maps are from exact ones.

    OMP_NUM_THREADS=1 python -m benchmarks.modes

Bytes are forecast for Stable Diffusion v1 at 512 pixels and 50 DDIM steps with the prompt "An
astronaut scuba diving", from its configuration alone. Errors are the greatest absolute difference
from maps in float32 of all 77 tokens, over every map of a recording of the bundled model. A
summary's maps are compared with the mean over heads.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from benchmarks.models import PROMPT, pipeline
from probe.analysis.maps import probabilities
from probe.diffusion.sd import StableDiffusion
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.recorder import record
from probe.settings.experiment import load_experiment

EXACT = {"tokens": "all", "dtype": "float32"}
WAYS: dict[str, dict[str, Any]] = {
    "maps, all tokens, float32": EXACT,
    "maps, all tokens, float16": {"tokens": "all"},
    "maps, the prompt's tokens, float16 (default)": {},
    "maps, the prompt's tokens, sqrt_u8": {"dtype": "sqrt_u8"},
    "queries, float32": {"attention": "queries", "dtype": "float32"},
    "queries, float16": {"attention": "queries"},
    "summary, the prompt's tokens, float16": {"attention": "summary"},
    "summary, all tokens, float16": {"attention": "summary", "tokens": "all"},
}


def attention_bytes(capture: dict[str, Any]) -> int:
    asked = load_experiment(
        {
            "prompt": PROMPT,
            "steps": 50,
            "guidance_scale": 7.5,
            "scheduler": "DDIM",
            "capture": capture,
        }
    )
    forecast = plan(StableDiffusion.of(pipeline("sd1", device="meta")), asked).forecast()
    return sum(n for path, n in forecast.items() if path.startswith("attention/"))


def error(found: Run, exact: Run) -> float:
    """Return the greatest error over the tokens that both keep one by one."""
    worst = 0.0
    for grid in exact.grids:
        maps, truth = found.attention(grid), exact.attention(grid)
        tokens = [int(t) for t in maps["token"].values if t >= 0]
        for index in range(truth.sizes["step"]):
            one = probabilities(maps.isel(step=index).sel(token=tokens).values)
            whole = truth.isel(step=index).sel(token=tokens)
            expected = (
                whole.values
                if maps.sizes["head"] == truth.sizes["head"]
                else whole.mean("head", keepdims=True).values
            )
            worst = max(worst, float(np.abs(one - expected).max()))
    return worst


def main() -> None:
    pipe = pipeline("bundled")
    with tempfile.TemporaryDirectory() as output:

        def run(capture: dict[str, Any]) -> Run:
            return record(
                {"prompt": PROMPT, "steps": 30, "seed": 5, "output": output, "capture": capture},
                pipe,
                progress=False,
            )

        exact = run(EXACT)
        default = attention_bytes({})
        print(
            f"{'capture':46} {'SD v1, 512 px, 50 steps':>24} {'of the default':>15} "
            f"{'greatest error':>15}"
        )
        for name, capture in WAYS.items():
            size = attention_bytes(capture)
            print(
                f"{name:46} {size / 1e6:21.0f} MB {size / default:14.1f}x "
                f"{error(run(capture), exact):15.1e}"
            )


if __name__ == "__main__":
    main()
