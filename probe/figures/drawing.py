"""What sheets are drawn with: sizes, colours, letters, and heat maps over a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFont

CELL, GAP, MARGIN = 152, 12, 28
INK, FAINT, PAPER = (24, 26, 32), (110, 114, 124), (255, 255, 255)
HEAT = np.array(
    [(0, 0, 4), (60, 9, 101), (140, 41, 99), (212, 72, 66), (250, 142, 9), (252, 255, 164)],
    np.float32,
)


def overlay(
    picture: Image.Image, heat_map: np.ndarray, bounds: tuple[float, float] | None = None
) -> Image.Image:
    """Return a heat map over a greyed picture.

    Its colours span `bounds`, by default its least to its greatest value. *Shape:* (y, x).
    """
    heat_map = np.nan_to_num(heat_map, posinf=0, neginf=0)  # a run may have recorded NaN
    least, greatest = bounds or (heat_map.min(), heat_map.max())
    scaled = (heat_map - least) / max(float(greatest - least), 1e-12)
    shares = Image.fromarray(scaled.astype(np.float32))
    value = np.asarray(shares.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    weight = 0.25 + 0.65 * value[..., None]
    return Image.fromarray((grey * (1 - weight) + heat(value) * weight).round().astype(np.uint8))


def heat(values: np.ndarray) -> np.ndarray:
    """Return numbers in 0..1 as colours from black over red to light yellow.

    *Shape:* (...) -> (..., rgb) uint8.
    """
    at = values.clip(0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return np.asarray(HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().astype(np.uint8)


def scale_bar() -> Image.Image:
    """Return the colours of heat maps from least to greatest, 240 x 12 pixels."""
    return Image.fromarray(heat(np.linspace(0, 1, 240)[None].repeat(12, 0)))


def fit(picture: Image.Image, width: int) -> Image.Image:
    """Return a picture at a width in pixels; a preview, one pixel a latent, keeps its squares."""
    resample = Image.Resampling.NEAREST if picture.width < width / 2 else Image.Resampling.LANCZOS
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), resample)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the letters of sheets at a size in pixels."""
    return ImageFont.load_default(size)


def shorten(text: str, most: int) -> str:
    """Return a text on one line, of at most that many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "\u2026"
