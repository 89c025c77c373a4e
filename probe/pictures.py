"""Pictures for people, drawn from a recording: the final PNG, and a contact sheet that tells the run at a glance.

The sheet has two rows: the predicted clean picture over the steps (decoded where the run decoded it, else the linear
preview), and for each word of the prompt a heat map of where the picture looked at it. Every PNG carries the run's
resolved experiment in its metadata, under the key `experiment`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from probe.recording import Run

CELL, GAP, MARGIN = 152, 12, 28
INK, FAINT, PAPER = (24, 26, 32), (110, 114, 124), (255, 255, 255)
HEAT = np.array([(0, 0, 4), (60, 9, 101), (140, 41, 99), (212, 72, 66), (250, 142, 9), (252, 255, 164)], np.float32)


def save(run: Run) -> list[Path]:
    """Write the final pictures and the contact sheet into the recording's folder, and return their paths."""
    information = PngImagePlugin.PngInfo()
    information.add_itxt("experiment", json.dumps(run.attributes["experiment"], ensure_ascii=False))
    information.add_text("Software", "probe")
    finals = run.images.values
    names = ["picture.png"] if len(finals) == 1 else [f"picture-{index}.png" for index in range(len(finals))]
    written = []
    for name, image in [*zip(names, map(Image.fromarray, finals), strict=True), ("contact-sheet.png", contact_sheet(run))]:
        image.save(run.path / name, pnginfo=information)
        written.append(run.path / name)
    return written


def contact_sheet(run: Run, columns: int = 8) -> Image.Image:
    """The run's story on one sheet, for the first of its images."""
    final = Image.fromarray(run.images.values[0])
    steps, words = _steps(run, columns - 1), _words(run, final)
    title = f"From noise to picture: the predicted clean picture at {len(steps)} of {run.tree.sizes['step']} model calls, and the result"
    rows = [(title, [*steps, (_fit(final, CELL), "result", "")])]
    if words:
        over = "layers, heads and steps" if len(run.images) == 1 else f"layers, heads, steps and {len(run.images)} images"
        rows.append((f"Where the picture looked at each word: cross-attention, mean over {over}", words))
    lines = [-(-len(cells) // columns) for _, cells in rows]
    shape = _fit(final, CELL).height
    line = shape + 34
    height = MARGIN + 74 + sum(34 + n * line for n in lines) + (30 if words else 0) + MARGIN // 2
    sheet = Image.new("RGB", (2 * MARGIN + columns * CELL + (columns - 1) * GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    asked = run.attributes["experiment"]
    draw.text((MARGIN, MARGIN - 6), _shorten(asked["prompt"], 80), INK, font=_font(28))
    guidance = f"guidance {asked['guidance_scale']:g}" if asked["guidance_scale"] > 1 else "no guidance"
    kind = run.attributes["scheduler"]["class"].removesuffix("Scheduler")
    told = [
        run.attributes["model"]["name"],
        f"{kind}, {asked['steps']} steps",
        guidance,
        f"seed {asked['seed']}",
        f"{final.width} x {final.height} pixels",
    ]
    draw.text((MARGIN, MARGIN + 32), "   ".join(told), FAINT, font=_font(15))
    top = MARGIN + 74
    for (title, cells), count in zip(rows, lines, strict=True):
        draw.text((MARGIN, top), title, INK, font=_font(15))
        for index, (picture, label, note) in enumerate(cells):
            x = MARGIN + index % columns * (CELL + GAP)
            y = top + 28 + index // columns * line
            sheet.paste(picture, (x, y))
            draw.text((x, y + shape + 4), _shorten(label, 14), INK, font=_font(14))
            draw.text((x + CELL, y + shape + 5), note, FAINT, font=_font(12), anchor="ra")
        top += 34 + count * line
    if words:
        bar = heat(np.linspace(0, 1, 240)[None].repeat(12, 0))
        sheet.paste(Image.fromarray(bar), (MARGIN, top + 2))
        draw.text((MARGIN + 252, top), "share of a pixel's attention, from each map's least to its greatest value", FAINT, font=_font(12))
    return sheet


def overlay(picture: Image.Image, heat_map: np.ndarray) -> Image.Image:
    """A heat map (y, x), from its least to its greatest value, over a greyed picture."""
    heat_map = np.nan_to_num(heat_map, posinf=0, neginf=0)  # a run may have recorded NaN
    least = heat_map.min()
    scaled = (heat_map - least) / max(float(heat_map.max() - least), 1e-12)
    value = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    weight = 0.25 + 0.65 * value[..., None]
    return Image.fromarray((grey * (1 - weight) + heat(value) * weight).round().astype(np.uint8))


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 as colours from black over red to light yellow. *Shape:* (...) -> (..., rgb) uint8."""
    at = values.clip(0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return np.asarray(HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().astype(np.uint8)


def _steps(run: Run, columns: int) -> list[tuple[Image.Image, str, str]]:
    sigmas = run.variable("sigma").values
    if "decoded" in run.tree.children and run.tree["decoded"].sizes["decoded_step"] >= columns // 2:
        of, pictures = run.variable("decoded/decoded_step").values, run.variable("decoded/picture").values[:, 0]
    else:
        of, pictures = run.steps, run.preview().values[:, 0]
    chosen = np.unique(np.linspace(0, len(of) - 1, columns).round().astype(int))
    return [(_fit(Image.fromarray(pictures[i]), CELL), f"step {of[i]}", f"sigma {sigmas[of[i]]:.2f}") for i in chosen]


def _words(run: Run, final: Image.Image) -> list[tuple[Image.Image, str, str]]:
    if not run.grids:
        return []
    small = _fit(final, CELL)
    return [(overlay(small, m.values), str(m["word"].values), f"{float(m.min()):.0%} to {float(m.max()):.0%}") for m in run.words()]


def _fit(picture: Image.Image, width: int) -> Image.Image:
    """The picture at a width; a preview, one pixel a latent, keeps its squares."""
    resample = Image.Resampling.NEAREST if picture.width < width / 2 else Image.Resampling.LANCZOS
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), resample)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "\u2026"
