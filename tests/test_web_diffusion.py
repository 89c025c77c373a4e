"""The page's own model code computes what torch, diffusers and our own loop compute."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from probe.diffusion.draws import noise
from probe.diffusion.family import Predictions
from probe.diffusion.guidance import guide
from probe.diffusion.loading import load
from probe.diffusion.sampling import Start, sample, started, step_options
from probe.diffusion.schedule import Schedule, first_call
from probe.diffusion.sd import StableDiffusion

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "web_diffusion.test.mjs"
NODE = shutil.which("node")
SHAPE = (1, 4, 3, 5)
SCHEDULERS = ("DDIM", "Euler", "EulerAncestral", "DPM++2M", "PNDM")
STEPS = (1, 2, 3, 5, 20, 30, 50, 120)
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def flat(tensor: torch.Tensor) -> list[float]:
    return [float(value) for value in tensor.flatten()]


def draws(seed: int, counts: Sequence[int]) -> dict[str, Any]:
    """What one generator of torch draws, one time after another."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [flat(torch.randn(count, generator=generator)) for count in counts]
    return {"seed": str(seed), "draws": numbers}


def random_numbers() -> dict[str, Any]:
    generators = [draws(seed, [1024, 1024]) for seed in range(20)]
    generators += [draws(seed, [1024, 16]) for seed in (2**31, 2**32 - 1, 2**32 + 7, 2**64 - 1)]
    generators.append(draws(5, [1, 5, 15, 16, 3, 17, 40, 1, 1, 31, 624, 1000]))
    generators.append(draws(0, [100_003]))
    return {"exact": EXACT, "generators": generators}


def prompts(model: StableDiffusion) -> list[dict[str, Any]]:
    """Random prompts of the words that the model knows, as Python reads them."""
    words = sorted(model.vocabulary or ())
    drawn = random.Random(0)
    texts = ["", " ", "a fox on the moon", "A FOX, on the Moon!", "fox-fox_moon...", "'the turtle'"]
    texts.append("a fox\u2019")
    for _ in range(400):
        some = drawn.choices(words, k=drawn.randint(1, 20))
        cased = [drawn.choice([str.lower, str.upper, str.title])(word) for word in some]
        between = drawn.choices([" ", "  ", ", ", "-", "_", "/", " & ", "; ", " '", "\u00a0"], k=99)
        texts.append("".join(word + gap for word, gap in zip(cased, between, strict=False)))
    rows = []
    for text in texts:
        prompt = model.read(text)
        ids, spans = prompt.ids[0].tolist(), list(prompt.spans.values())
        words_read = list(prompt.words)
        row = {"text": text, "ids": ids, "words": words_read, "spans": spans, "end": prompt.end}
        rows.append({**row, "tokens": prompt.tokens})
    return rows


def run_of(model: StableDiffusion, name: str, steps: int, strength: float) -> dict[str, Any]:
    """A run of random predictions by diffusers' scheduler, in our own loop."""
    model = model.with_scheduler(name, {})
    begin = first_call(model.scheduler, steps, strength) if strength < 1 else 0
    schedule = Schedule.of(model.scheduler, steps, begin)
    scheduler = model.scheduled(steps)
    first, _ = noise(3, SHAPE, torch.float32)
    clean, _ = noise(4, SHAPE, torch.float32)
    generator = torch.Generator().manual_seed(7)
    predictions = [noise(100 + i, SHAPE, torch.float32)[0] for i in range(len(schedule.timesteps))]
    latents = first * scheduler.init_noise_sigma
    if begin:
        latents = started(scheduler, Start(clean, first, strength, [generator]), begin)

    def predict(index: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        return Predictions({"cond": predictions[index]}, predictions[index])

    options = step_options(scheduler, 0.0, [generator])
    done = list(sample(scheduler, schedule, latents, predict, **options))
    return {
        "name": name,
        "steps": steps,
        "begin": begin,
        "seed": 7,
        "noise": flat(first),
        "clean": flat(clean),
        "predictions": [flat(prediction) for prediction in predictions],
        "initSigma": float(scheduler.init_noise_sigma),
        "schedule": {
            "timesteps": schedule.timesteps,
            "sigmas": schedule.sigmas,
            "exploding": schedule.variance_exploding,
        },
        "alphaBars": schedule.alpha_bars,
        "inputs": [flat(step.model_input) for step in done],
        "denoised": [flat(step.denoised) for step in done],
        "latents": [flat(step.next_latents) for step in done],
    }


def guided() -> list[dict[str, Any]]:
    uncond, cond = (noise(seed, SHAPE, torch.float32)[0] for seed in (1, 2))
    return [
        {
            "uncond": flat(uncond),
            "cond": flat(cond),
            "scale": scale,
            "rescale": rescale,
            "guided": flat(guide(uncond, cond, scale, rescale)),
        }
        for scale in (1.1, 3.0, 7.5, 12.3)
        for rescale in (0.0, 0.3, 0.7, 1.0)
    ]


@pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs")
def test_the_page_computes_what_python_computes(tmp_path: Path) -> None:
    model = load("emojiworld", dtype="float32", device="cpu")
    assert isinstance(model, StableDiffusion)
    runs = [run_of(model, name, steps, 1.0) for name in SCHEDULERS for steps in STEPS]
    runs += [run_of(model, name, 20, strength) for name in SCHEDULERS for strength in (0.3, 0.75)]
    vectors = {
        "randn": random_numbers(),
        "prompts": prompts(model),
        "schedulers": runs,
        "guidance": guided(),
    }
    (tmp_path / "vectors").write_text(json.dumps(vectors), encoding="utf-8")
    done = subprocess.run(
        [str(NODE), "--test", str(TEST)],
        env={**os.environ, "VECTORS": str(tmp_path / "vectors")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout, done.stdout
