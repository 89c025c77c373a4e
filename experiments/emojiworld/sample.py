"""Record what ships with the package: the default picture twice, and a noising, each small.

python -m experiments.emojiworld.sample

The second picture differs from the first in its guidance alone. It leaves out what the first has
already: the text encoder, and attention of the branch without the prompt. No contact sheet is kept:
`probe show` and the dashboard draw what they need.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from probe.reading.sample import ARCHIVES, pack
from probe.running.recorder import record
from probe.settings.noising import load_noising

ROOT = Path(__file__).resolve().parents[2]
PICTURE = "experiments/fox-and-penguin.png"
SEEN: dict[str, Any] = {"branches": "both", "dtype": "sqrt_u8"}
FIRST: dict[str, Any] = {
    "name": "sample",
    "prompt": "An astronaut scuba diving",
    "seed": 5,
    "steps": 20,
    "guidance_scale": 3,
    "decode_every": 5,
    "device": "cpu",
    "output": "runs",
    "capture": SEEN,
}
SECOND = {
    **FIRST,
    "name": "sample-guidance-8",
    "guidance_scale": 8,
    "capture": {**SEEN, "branches": "cond", "text": False},
}
NOISED: dict[str, Any] = {
    "name": "sample-noising",
    "picture": PICTURE,
    "caption": "A fox next to a penguin in the forest",
    "seed": 5,
    "timesteps": (999, 850, 700, 500, 300, 150, 50, 10),
    "noises": 3,
    "decode": False,
    "device": "cpu",
    "output": "runs",
    "capture": {"attention": "off", "text": False, "statistics": False},
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path(PICTURE).parent.mkdir()
        shutil.copyfile(ROOT / PICTURE, PICTURE)
        for recipe in (FIRST, SECOND, load_noising(NOISED)):
            run = record(recipe)
            name = run.recipe.name
            (run.path / "contact-sheet.png").unlink()
            pack(run.path, name)
            print(f"wrote {ARCHIVES[name]} ({ARCHIVES[name].stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
