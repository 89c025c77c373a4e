"""What a demonstration trained, of a few numbers and of the shape that `score.py` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STEPS = (125, 250, 500)


def made_up(
    seeds: Sequence[int] = (0,),
    *,
    factors: Sequence[int] = (1, 2, 4, 8),
    last: Mapping[int, float] | None = None,
    spread: float = 0.01,
) -> dict[str, Any]:
    """Return scores that rise with the steps to `last` of each f, a little more for each seed."""
    ends = {1: 0.3, 2: 0.4, 4: 0.5, 8: 0.6} | dict(last or {})
    return {
        "title": "At 64 pixels, emoji",
        "pixels": 64,
        "calls": 40,
        "guidance_scale": 3.0,
        "seeds": list(seeds),
        "scenes": 20_000,
        "learning_rates": [4e-4, 8e-4, 1.6e-3],
        "device": "cpu",
        "runs": [_run(f, seed, ends[f] + spread * seed) for f in factors for seed in seeds],
        "autoencoders": [_autoencoder(f) for f in factors],
    }


def _scores(recognised: float) -> dict[str, Any]:
    low, high = max(0.0, recognised - 0.05), min(1.0, recognised + 0.05)
    distance = 0.04 * (1.05 - recognised)
    return {
        "pictures": 192,
        **{f"{name}": [recognised, low, high] for name in ("subject", "setting", "both")},
        **{f"{name}_left_out": [recognised, low, high] for name in ("subject", "setting", "both")},
        "kid": [distance, distance * 0.9, distance * 1.1],
    }


def _by_count() -> dict[str, list[float]]:
    return {"count": [48, 96, 192], "fd": [3.0, 2.0, 1.5], "kid": [0.011, 0.01, 0.0105]}


def _run(f: int, seed: int, last: float) -> dict[str, Any]:
    side, step_flops = 64 // f, 3_000_000_000 // f
    points: list[dict[str, Any]] = [
        {
            "step": step,
            "seconds": step * 0.8 / f,
            "flops": step * step_flops,
            **_scores(last * (0.5 + 0.5 * step / STEPS[-1])),
            "sampling_seconds": 0.4 / f,
        }
        for step in STEPS
    ]
    if seed == 0:
        points[-1]["by_count"] = _by_count()
    return {
        "f": f,
        "seed": seed,
        "grid": side,
        "channels": 3 if f == 1 else 4,
        "attention_grids": [side // 4],
        "parameters": 3_900_000,
        "call_flops": step_flops // 40,
        "training_step_flops": step_flops,
        "batch": 16,
        "learning_rate": 8e-4,
        "points": points,
    }


def _autoencoder(f: int) -> dict[str, Any]:
    record: dict[str, Any] = {"f": f, **_scores(0.98 - 0.005 * f), "by_count": _by_count()}
    if f > 1:
        kept = {"pictures": 4, "psnr": 40.0 - 2 * f, "ssim": 1 - 0.01 * f}
        record |= {
            "parameters": 500_000,
            "steps": 1500,
            "seconds": 100.0 + f,
            "flops": 400_000_000_000,
            "encode_flops": 1_000_000,
            "decode_flops": 2_000_000,
            "scenes": kept,
            "photographs": {**kept, "psnr": 20.0 - f},
        }
    return record
