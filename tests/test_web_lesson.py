"""The lesson of the page: its texts agree, its numbers are ours, its requests are kept apart."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from experiments.emojiworld.world import HELD_OUT_DEVELOPMENT, RELATIONS, SETTINGS, draw_scene
from probe.conversions import denoised_from
from probe.diffusion.draws import noise
from probe.diffusion.loading import load
from probe.diffusion.sampling import denoise
from probe.reading.pixels import counts, trained

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "web" / "lesson"
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs")
def test_the_texts_agree_and_requests_are_kept_apart() -> None:
    command = [str(NODE), "--test", str(ROOT / "tests" / "web_lesson.test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout


def test_the_numbers_of_the_text_are_those_of_the_project() -> None:
    stored = json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))
    made = runpy.run_path(str(FOLDER / "numbers.py"))["numbers"]()
    assert stored == made, "run python docs/make.py"
    assert stored["factor_full"] == round(counts().factors("sd14", f=8, size=512).full)
    weights = counts().of("sd14", "denoiser", f=8, size=512).parameters
    assert stored["sd_weights_unet"] == weights
    shown = trained()
    assert shown is not None
    pixels = next(run for run in shown["runs"] if run["f"] == 1)["points"][-1]
    assert stored["demo_pixels"] == pixels["both"][0]


def test_what_the_lesson_says_of_the_training_is_true() -> None:
    assert {("astronaut", "scuba diving"), ("cat", "moon")} <= HELD_OUT_DEVELOPMENT
    assert RELATIONS == ("next to", "above") and "moon" in SETTINGS
    captions = [draw_scene(seed).caption for seed in range(60)]
    assert any("above" in caption for caption in captions)
    assert not any("and" in caption.split() for caption in captions)


@pytest.mark.slow
def test_the_answers_are_true_of_the_bundled_model() -> None:
    model = load("emojiworld", dtype="float32", device="cpu")
    fox, car, beach = (
        model.condition(text)
        for text in ("a fox on the moon", "a car on the moon", "a penguin on the beach")
    )
    alike = cosine_similarity(fox.cond_embedding[0], car.cond_embedding[0], dim=1)
    assert (alike[:2] > 1 - 1e-6).all(), "a vector looks back alone"
    assert (alike[2:] < 1 - 1e-6).all()

    steps = list(denoise(model, fox, steps=30, guidance_scale=3, seed=5))
    again = list(denoise(model, fox, steps=30, guidance_scale=3, seed=5))[-1]
    clean = steps[-1].next_latents
    assert torch.equal(clean, again.next_latents), "chance comes in with the first noise alone"
    changes = [step.prediction_cond - step.prediction_uncond for step in steps]
    moved = [
        step.sigma * float(change.square().mean().sqrt())
        for step, change in zip(steps, changes, strict=True)
    ]
    assert moved == sorted(moved, reverse=True), "the words matter most at the first steps"

    eps = noise(1, tuple(clean.shape), clean.dtype)[0]
    bars = model.scheduler.alphas_cumprod

    def loss(timestep: int, text: torch.Tensor) -> tuple[float, float]:
        """Return the loss at a timestep, and how far what remains is from the picture."""
        x = bars[timestep].sqrt() * clean + (1 - bars[timestep]).sqrt() * eps
        with torch.no_grad():
            guess = model.unet(x, timestep, encoder_hidden_states=text).sample
        left = denoised_from(guess, x, float(bars[timestep]), model.prediction_type)
        return float(mse_loss(guess, eps)), float(mse_loss(left, clean))

    right, wrong = fox.cond_embedding, beach.cond_embedding
    (low, blurred), (high, sharp) = loss(999, right), loss(200, right)
    assert low < high / 10 and blurred > 10 * sharp, "a low loss there says little of the picture"
    assert loss(999, wrong)[0] > 2 * low
