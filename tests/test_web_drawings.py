"""The page's code draws the pictures that recordings hold: at most one level of 255 apart."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import probe
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "web_drawings.mjs"
NODE, NPM = shutil.which("node"), shutil.which("npm")
DDIM: dict[str, Any] = {"scheduler": "DDIM", "steps": 30, "guidance_scale": 5.0}
SHARE, WHOLE = {"seed": 7, "amount": 0.3}, {"seed": 9, "amount": 1.0}  # of another seed's noise
TABLE: list[dict[str, Any]] = [
    {**DDIM, "prompt": "An astronaut scuba diving", "seed": 5},
    {**DDIM, "prompt": "a fox on the moon", "seed": 0, "guidance_scale": 8.0},
    {**DDIM, "prompt": "a picture of a crab at the beach", "seed": 2**32 + 7},
    {**DDIM, "prompt": "a dragon above a city", "negative_prompt": "a car", "seed": 1},
    {**DDIM, "prompt": "", "seed": 3, "guidance_scale": 1.0},
    {**DDIM, "prompt": "an owl in the forest", "seed": 4, "guidance_rescale": 0.7},
    {**DDIM, "prompt": "a cat next to a dog", "seed": 6, "scheduler": "Euler"},
    {**DDIM, "prompt": "a pizza party", "seed": 7, "scheduler": "EulerAncestral"},
    {**DDIM, "prompt": "a robot in the desert", "seed": 8, "scheduler": "DPM++2M", "steps": 20},
    {**DDIM, "prompt": "a penguin on the snow", "seed": 9, "scheduler": "PNDM", "steps": 20},
    {**DDIM, "prompt": "a fox on the moon", "seed": 3, "noises": [SHARE]},
    {**DDIM, "prompt": "a lion", "seed": 2, "scheduler": "Euler", "noises": [WHOLE]},
]
FROM_A_PICTURE: list[dict[str, Any]] = [
    {**DDIM, "prompt": "a fox on the moon", "seed": 3, "strength": 0.6},
    {**DDIM, "prompt": "a cat", "seed": 2, "scheduler": "Euler", "steps": 20, "strength": 0.35},
    {**DDIM, "prompt": "", "seed": 1, "guidance_scale": 1.0, "scheduler": "PNDM", "strength": 1.0},
]
KEYS = {
    "negative_prompt": "negativePrompt",
    "guidance_scale": "guidanceScale",
    "guidance_rescale": "guidanceRescale",
}

pytestmark = pytest.mark.slow


def the_pages(row: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment as the page names its fields."""
    return {"negativePrompt": ""} | {KEYS.get(key, key): value for key, value in row.items()}


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    loaded = load("emojiworld", dtype="float32", device="cpu")
    assert isinstance(loaded, StableDiffusion)
    return loaded


@pytest.fixture(scope="module", autouse=True)
def _onnxruntime_web() -> None:
    """Fetch it in the version of the lock, where it is not there."""
    if NODE is None or NPM is None:
        pytest.skip("needs node and npm: apt install nodejs npm")
    if not (ROOT / "web" / "node_modules" / "onnxruntime-web").is_dir():
        command = [NPM, "ci", "--ignore-scripts", "--prefix", str(ROOT / "web")]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode:
            pytest.skip("needs a registry of npm: cd web && npm ci --ignore-scripts")


def drawn(table: list[dict[str, Any]], folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the pictures and final latents that the page's code draws."""
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
    command = [str(NODE), str(SCRIPT), str(folder / "table.json"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return [
        (
            np.fromfile(folder / f"{i}.rgb", np.uint8).reshape(128, 128, 3),
            np.fromfile(folder / f"{i}.latents", np.float32).reshape(4, 16, 16),
        )
        for i in range(len(table))
    ]


def check_same(run: probe.Run, picture: np.ndarray, latents: np.ndarray) -> None:
    recorded = run.images.isel(image=0).transpose("y", "x", "rgb").values
    final = run.variable("latents/final_latents").isel(image=0).values
    assert abs(final - latents).max() <= 1e-4
    assert abs(recorded.astype(int) - picture.astype(int)).max() <= 1


def recorded(model: StableDiffusion, row: dict[str, Any]) -> probe.Run:
    capture = {"attention": "off", "text": False, "statistics": False}
    edits = [{"kind": "noise", **noise} for noise in row.get("noises", ())]
    recipe = {"edits": edits, **row, "model": "emojiworld", "dtype": "float32", "capture": capture}
    recipe.pop("noises", None)
    return probe.record(recipe, model, output=None, progress=False)


@pytest.mark.timeout(1800)
def test_prompts_seeds_and_schedulers(model: StableDiffusion, tmp_path: Path) -> None:
    pages = drawn([the_pages(row) for row in TABLE], tmp_path)
    for row, page in zip(TABLE, pages, strict=True):
        check_same(recorded(model, row), *page)


@pytest.mark.timeout(900)
def test_a_picture_to_begin_from_and_a_word_that_nobody_reads(
    model: StableDiffusion, tmp_path: Path
) -> None:
    edited = {**DDIM, "prompt": "a fox on the moon", "seed": 3}
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = picture.repeat(16, 0).repeat(16, 1)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    opaque = np.full((128, 128, 1), 255, np.uint8)
    np.concatenate([picture, opaque], 2).tofile(tmp_path / "picture.rgba")
    off = {"token": 2, "from": 6}
    table = [
        {**the_pages(edited), "off": off},
        the_pages(edited),
        *({**the_pages(row), "picture": "picture.rgba"} for row in FROM_A_PICTURE),
    ]
    without_fox, as_ever, *from_picture = drawn(table, tmp_path)
    for row, page in zip(FROM_A_PICTURE, from_picture, strict=True):
        check_same(recorded(model, {**row, "image": str(tmp_path / "picture.png")}), *page)
    edits = [{"kind": "value", "words": ["fox"], "steps": "6:"}]
    check_same(recorded(model, {**edited, "edits": edits}), *without_fox)
    assert abs(without_fox[0].astype(int) - as_ever[0].astype(int)).max() > 30


def flat(values: Any) -> list[float]:
    return [float(value) for value in np.asarray(values).flatten()]


def noisings(model: StableDiffusion, picture: np.ndarray, caption: str) -> dict[str, Any]:
    """What a noising records of two draws of noise at three timesteps, and of its caption."""
    capture = {"attention": "off", "text": False, "statistics": False}
    how: dict[str, Any] = {"timesteps": [900, 400, 0], "noises": 2, "seed": 2**32 - 2}
    how |= {"dtype": "float32", "device": "cpu", "capture": capture}
    run = probe.record_noising(picture, caption, output=None, progress=False, **how)
    names = {"noisy": "latents/latents", "prediction": "latents/prediction"}
    names |= {"denoised": "forward/denoised", "loss": "forward/loss"}
    values = {name: run.variable(path).transpose("step", ...) for name, path in names.items()}
    asked = model.read(caption)
    return {
        "prompt": caption,
        "picture": flat(np.dstack([picture, np.full((128, 128), 255, np.uint8)])),
        "tokens": list(asked.tokens),
        "ids": asked.ids[0].tolist(),
        "end": asked.end,
        "cond": flat(model.condition(caption).cond_embedding),
        "clean": flat(run.variable("forward/clean").values[0]),
        "rows": [
            {
                "timestep": int(run.variable("timestep").values[step]),
                "seed": how["seed"] + draw,
                "alphaBar": float(run.variable("alpha_bar").values[step]),
                "noise": flat(run.variable("forward/noise").values[draw]),
                **{name: flat(value.values[step, draw]) for name, value in values.items()},
                "picture": flat(run.variable("decoded/picture").values[step, draw]),
            }
            for step in range(3)
            for draw in range(2)
        ],
    }


@pytest.mark.timeout(900)
def test_the_worker(model: StableDiffusion, tmp_path: Path) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    vectors = noisings(model, picture.repeat(16, 0).repeat(16, 1), "a fox, on the moon \u2019")
    (tmp_path / "vectors").write_text(json.dumps(vectors), encoding="utf-8")
    done = subprocess.run(
        [str(NODE), "--test", str(ROOT / "tests" / "web_worker.test.mjs")],
        env={**os.environ, "VECTORS": str(tmp_path / "vectors")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout


def test_the_graphics_card_computes_only_what_agrees_and_is_faster() -> None:
    command = [str(NODE), "--test", str(ROOT / "tests" / "web_webgpu.test.mjs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout
