"""Pictures for people, drawn from a recording: the final PNG, a contact sheet that tells the run at a glance, a sheet of its words.

The contact sheet has two rows: the predicted clean picture over the steps (decoded where the run decoded it, else the linear
preview), and for each word of the prompt a heat map of where the picture looked at it. The sheet of words has a row for each
word, over all steps and at each noise level. Every PNG that is saved carries the run's resolved experiment in its metadata,
under the key `experiment`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from probe.analysis.averages import by_sigma, combined
from probe.analysis.heads import by_kind
from probe.analysis.maps import branch_words, word_names
from probe.errors import RecordingNotFound
from probe.reading.recording import Run

CELL, GAP, MARGIN = 152, 12, 28
INK, FAINT, PAPER = (24, 26, 32), (110, 114, 124), (255, 255, 255)
HEAT = np.array([(0, 0, 4), (60, 9, 101), (140, 41, 99), (212, 72, 66), (250, 142, 9), (252, 255, 164)], np.float32)


def save(run: Run) -> list[Path]:
    """Write the final pictures and the contact sheet into the recording's folder, and return their paths."""
    finals = run.images.values
    names = ["picture.png"] if len(finals) == 1 else [f"picture-{index}.png" for index in range(len(finals))]
    named = [*zip(names, map(Image.fromarray, finals), strict=True), ("contact-sheet.png", contact_sheet(run))]
    return [keep(image, run, name) for name, image in named]


def keep(picture: Image.Image, run: Run, name: str, **notes: str) -> Path:
    """Write a picture into the recording's folder, with the experiment and `notes` in its metadata; returns its path."""
    information = PngImagePlugin.PngInfo()
    for key, text in {"experiment": json.dumps(run.attributes["experiment"], ensure_ascii=False), "Software": "probe", **notes}.items():
        information.add_itxt(key, text)
    picture.save(run.path / name, pnginfo=information)
    return run.path / name


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
        sheet.paste(_scale_bar(), (MARGIN, top + 2))
        draw.text((MARGIN + 252, top), "share of a pixel's attention, from each map's least to its greatest value", FAINT, font=_font(12))
    return sheet


def word_sheet(run: Run, bands: int = 4, image: int = 0) -> Image.Image:
    """Where the picture looked at each word of the prompt, and of the negative prompt where that was recorded.

    One row for each word: all steps, then `bands` noise levels of equal width in log sigma, the noisiest first, without those
    that hold no step; the mean over layers and heads of all grids. Below: how much goes to words and how much to BOS, EOS and
    rest, and what was cut from the prompt. A run that was stopped is drawn over its last preview. Raises RecordingNotFound
    without maps, or without that image.
    """
    if image not in range(len(run.images)):
        raise RecordingNotFound(f"{run.name} has no image {image}.", f"It has images 0 to {len(run.images) - 1}.")
    tokens = combined([run.attention(grid).isel(image=[image]) for grid in run.grids] or run.attention()).isel(image=0)
    banded = by_sigma(tokens, bands, run.variable("sigma"))
    banded = banded.isel(band=np.flatnonzero(banded["steps"].values))
    names = ["all steps", *(f"sigma {float(band['sigma_to']):.3g} to {float(band['sigma_from']):.3g}" for band in banded)]
    columns = xr.concat([tokens.mean("step"), *banded.drop_vars(["sigma_from", "sigma_to", "steps"])], "column", coords="minimal", compat="override")
    cut = run.attributes["cut_from_prompt"]
    sections, notes = {}, []
    for branch, words in reversed(branch_words(columns.assign_coords(column=names)).items()):
        prompt = run.attributes["experiment"]["prompt" if branch == "cond" else "negative_prompt"]
        if words.sizes["word"]:
            sections[f"{'Prompt' if branch == 'cond' else 'Negative prompt'}: {_shorten(prompt, 80)}"] = words
        masses = by_kind(tokens.sel(branch=branch)).mean(("step", "y", "x"))
        shares = ", ".join(f"{kind} {float(mass):.1%}" for kind, mass in zip(masses["kind"].values, masses, strict=True))
        notes.append(f"Of all attention to the {'prompt' if branch == 'cond' else 'negative prompt'}: {shares}")
        if cut.get(branch):
            notes.append(f"Cut from it, never read by the model: {_shorten(cut[branch], 90)}")
    shown = run.images.values if run.images.values.any() else run.preview().values[-1]
    return sheet_of_maps(Image.fromarray(shown[image]), sections, notes)


def ask_sheet(run: Run, maps: xr.DataArray, bands: int = 4) -> Image.Image:
    """A word that was asked after the run, by noise level. *Shape:* maps (step, y, x), as `probe.running.ask.read_out` gives them."""
    banded = by_sigma(maps, bands, maps["sigma"])
    banded = banded.isel(band=np.flatnonzero(banded["steps"].values))
    names = ["all steps", *(f"sigma {float(band['sigma_to']):.3g} to {float(band['sigma_from']):.3g}" for band in banded)]
    columns = np.stack([maps.mean("step").values, *(band.transpose("y", "x").values for band in banded)])
    section = xr.DataArray(columns[None], dims=("word", "column", "y", "x"), coords={"word": [maps.attrs["word"]], "column": names})
    shown = run.images.values if run.images.values.any() else run.preview().values[-1]
    notes = [f"Read in: {_shorten(maps.attrs['context'], 90)}", f"A {maps.attrs['read_out']}"]
    return sheet_of_maps(Image.fromarray(shown[0]), {f"Asked afterwards: {maps.attrs['word']}": section}, notes)


def sheet_of_maps(picture: Image.Image, sections: Mapping[str, xr.DataArray], notes: Sequence[str] = ()) -> Image.Image:
    """Maps over a picture: in each section, a title and its maps, a row for each word.

    *Shape:* each section (word, column, y, x), labelled by `word` and `column`. The colours of a row span the least to the
    greatest value in it, so that its columns can be compared; below each map stands its own range. NaN is drawn as 0.
    """
    small = _fit(picture, CELL)
    columns = max((maps.sizes["column"] for maps in sections.values()), default=0)
    row, head = small.height + 26, 62
    height = MARGIN + sum(head + row * maps.sizes["word"] + 16 for maps in sections.values()) + 34 + 20 * len(notes) + MARGIN // 2
    sheet = Image.new("RGB", (2 * MARGIN + max(5, columns + 1) * (CELL + GAP) - GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for title, maps in sections.items():
        draw.text((MARGIN, top), title, INK, font=_font(18))
        for column, label in enumerate(maps["column"].values):
            draw.text((MARGIN + (column + 1) * (CELL + GAP), top + 34), str(label), FAINT, font=_font(13))
        top += head
        for name, cells in zip(word_names(maps), maps.transpose("word", "column", "y", "x").values, strict=True):
            draw.text((MARGIN, top + small.height // 2 - 10), _shorten(name, 16), INK, font=_font(17))
            finite = cells[np.isfinite(cells)]
            bounds = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
            for column, cell in enumerate(cells):
                x = MARGIN + (column + 1) * (CELL + GAP)
                sheet.paste(overlay(small, cell, bounds), (x, top))
                draw.text((x, top + small.height + 4), f"{float(cell.min()):.1%} to {float(cell.max()):.1%}", FAINT, font=_font(12))
            top += row
        top += 16
    sheet.paste(_scale_bar(), (MARGIN, top + 2))
    draw.text((MARGIN + 252, top), "share of a pixel's attention, from the least to the greatest value of the row", FAINT, font=_font(12))
    for index, note in enumerate(notes):
        draw.text((MARGIN, top + 26 + 20 * index), note, INK, font=_font(13))
    return sheet


def overlay(picture: Image.Image, heat_map: np.ndarray, bounds: tuple[float, float] | None = None) -> Image.Image:
    """A heat map (y, x) over a greyed picture; its colours span `bounds`, by default its least to its greatest value."""
    heat_map = np.nan_to_num(heat_map, posinf=0, neginf=0)  # a run may have recorded NaN
    least, greatest = bounds or (heat_map.min(), heat_map.max())
    scaled = (heat_map - least) / max(float(greatest - least), 1e-12)
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


def _scale_bar() -> Image.Image:
    return Image.fromarray(heat(np.linspace(0, 1, 240)[None].repeat(12, 0)))


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
