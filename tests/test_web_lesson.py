"""The lesson of the page: its texts agree, its numbers are ours, its requests are kept apart."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

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
