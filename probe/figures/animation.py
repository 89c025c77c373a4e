"""The picture forming, or a word's map over it, as frames to keep: WebP, GIF or one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from probe.errors import RecordingNotFound
from probe.figures.drawing import HEAT
from probe.figures.payload import COLUMNS
from probe.reading.recording import Run

SIDE = 256  # at least so many pixels high, by whole factors: square pixels stay square


def frames(run: Run, word: str | None = None, image: int = 0) -> list[Image.Image]:
    """Return the predicted clean picture of each step: decoded if every step was, else a preview.

    With `word`, its map lies over it. Raise RecordingNotFound if the recording has no preview, and
    PromptError if it has no such word.
    """
    if not len(run.steps):
        raise RecordingNotFound(f"{run.name} has no finished step.", "Export it when it has one.")
    under = _underlays(run, image)
    if word is None:
        return [_enlarged(picture) for picture in under]
    maps = run.phrase(word).isel(word=0, image=image)
    values = maps.transpose("step", "y", "x").values
    top = float(values.max(initial=0)) or 1.0
    steps = [int(step) for step in maps["step"].values]
    found = []
    for index, step in enumerate(steps):
        back = _enlarged(under[list(run.steps).index(step)])
        heat = Image.fromarray(coloured(values[index] / top)).resize(
            back.size, Image.Resampling.NEAREST
        )
        found.append(Image.blend(back, heat, 0.6))
    return found


def coloured(shares: np.ndarray) -> np.ndarray:
    """Return colours of numbers from 0 to 1. *Shape:* (y, x) -> (y, x, rgb) uint8."""
    at = np.clip(shares, 0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return np.asarray((HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().astype(np.uint8))


def animated(pictures: Sequence[Image.Image], kind: str, per_second: float = 8) -> bytes:
    """Return frames as one WebP or GIF that repeats, and stays on its last frame for 2 seconds."""
    made = io.BytesIO()
    times = [round(1000 / per_second)] * (len(pictures) - 1) + [2000]
    more = {"quality": 85, "method": 4} if kind == "WEBP" else {"disposal": 2}
    pictures[0].save(
        made, kind, save_all=True, append_images=pictures[1:], duration=times, loop=0, **more
    )
    return made.getvalue()


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return frames as one picture, `COLUMNS` in a row, in the order of the steps."""
    columns = min(COLUMNS, len(pictures))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) - 6, rows * (height + 6) - 6), "white")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + 6), index // columns * (height + 6)))
    return sheet


def _underlays(run: Run, image: int) -> list[np.ndarray]:
    """Return a picture for each committed step, decoded if every step was."""
    if "decoded" in run.tree.children:
        decoded = run.variable("decoded/picture").isel(image=image)
        if set(map(int, run.steps)) <= {int(step) for step in decoded["decoded_step"].values}:
            return list(decoded.sel(decoded_step=run.steps).values)
    if "preview" not in run.tree.children:
        raise RecordingNotFound(
            f"{run.name} has no preview of its latents.", "Record with decode_every: 1."
        )
    return list(run.preview(run.denoised().isel(image=image)).values)


def _enlarged(picture: np.ndarray) -> Image.Image:
    factor = max(1, -(-SIDE // picture.shape[0]))
    made = Image.fromarray(picture)
    return made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)
