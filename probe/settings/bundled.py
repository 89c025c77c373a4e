"""The models that come with probe, by name: where they lie, and which of them are there.

`emojiworld` draws scenes of 128 pixels. `emojiworld-pixels` and `emojiworld-latents` are one UNet
trained twice at 64 pixels: on pixels without a VAE, and on latents of f = 4.
"""

from __future__ import annotations

import json
from pathlib import Path

from probe.errors import ModelError

HERE = Path(__file__).parent.parent
BUNDLED = {name: HERE / name for name in ("emojiworld", "emojiworld-pixels", "emojiworld-latents")}
MAKE = "python -m experiments.pixels.train, then python -m experiments.pixels.export"


def is_there(name: str) -> bool:
    """Return whether a bundled model is part of this installation."""
    return (BUNDLED[name] / "model_index.json").is_file()


def models_there() -> list[str]:
    """Return the names of the bundled models that are part of this installation."""
    return [name for name in BUNDLED if is_there(name)]


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled model. Raise ModelError if it is not there."""
    if is_there(name):
        return BUNDLED[name]
    cause = f"model: {name} comes with probe, but its folder probe/{name} is not there."
    if name == "emojiworld":
        raise ModelError(cause, "Install probe again.")
    raise ModelError(cause, f"From a checkout: {MAKE}. Or use --model emojiworld.")


def words_of(name: str) -> tuple[str, ...]:
    """Return the words that a bundled model knows."""
    return tuple(json.loads((bundled_folder(name) / "words.json").read_text("utf-8")))
