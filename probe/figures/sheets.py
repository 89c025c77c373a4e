"""Pictures of a recording, for people: the final PNG, and a contact sheet of the whole run.

The contact sheet has two rows: the predicted clean picture over the steps (decoded where the run
decoded it, else the linear preview), and for each word of the prompt a heat map of where the
picture looked at it. Every PNG that is saved carries the run's resolved experiment in its metadata,
under the key `experiment`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

from probe.figures.drawing import (
    CELL,
    FAINT,
    GAP,
    INK,
    MARGIN,
    PAPER,
    fit,
    font,
    overlay,
    scale_bar,
    shorten,
)
from probe.reading.edited import additions, edits_in, edits_in_short
from probe.reading.recording import Run, with_files
from probe.writing import files
from probe.writing.digests import sealed

Cell: TypeAlias = tuple[Image.Image, str, str]  # a picture, its label, and a note beside it


def save(run: Run) -> list[Path]:
    """Write the final pictures and the contact sheet into the recording's folder.

    Return their paths.
    """
    finals = [Image.fromarray(picture) for picture in run.images.values]
    pictures = {f"picture-{index}.png": picture for index, picture in enumerate(finals)}
    if len(finals) == 1:
        pictures = {"picture.png": finals[0]}
    pictures["contact-sheet.png"] = contact_sheet(run)
    return [keep(picture, run, name) for name, picture in pictures.items()]


def keep(
    picture: Image.Image,
    run: Run,
    name: str,
    target: Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a picture with the run's recipe and `notes` in its metadata.

    It goes to `target`, or to `name` in the recording's folder. Return its path. Raise OSError, or
    RecordingLinked for a recording that is a link.
    """
    kind = "noising" if run.kind == "noising" else "experiment"
    recipe = json.dumps(run.attributes.recipe, ensure_ascii=False)
    return keep_png(picture, run, target or run.path / name, {kind: recipe, **(notes or {})})


def keep_png(picture: Image.Image, run: Run, path: Path, notes: Mapping[str, str]) -> Path:
    """Write a picture with `notes` in its metadata and a digest of its bytes for `probe verify`.

    Return its path. Raise as `keep` does.
    """
    if path.parent == run.path:
        with_files(run)
        files.check_no_link(run.path)
    information = PngImagePlugin.PngInfo()
    for key, text in {**notes, "Software": "probe"}.items():
        information.add_itxt(key, text)
    png = io.BytesIO()
    picture.save(png, "PNG", pnginfo=information)
    files.replace(path, [sealed(png.getvalue())], False)
    return path


def contact_sheet(run: Run, columns: int = 8) -> Image.Image:
    """Return the run's story on one sheet, for the first of its images."""
    final = Image.fromarray(run.images.values[0])
    rows = _rows(run, final, columns)
    cell_height = fit(final, CELL).height
    line = cell_height + 34
    lines = [-(-len(cells) // columns) for _, cells in rows]
    scale = 30 if len(rows) > 1 else 0  # the row of words needs its scale of colours below
    height = MARGIN + 74 + sum(34 + n * line for n in lines) + scale + MARGIN // 2
    sheet = Image.new("RGB", (2 * MARGIN + columns * CELL + (columns - 1) * GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    edited = " (edited)" if edits_in(run.attributes.recipe) else ""
    title = shorten(run.attributes.recipe["prompt"], 80 - len(edited)) + edited
    draw.text((MARGIN, MARGIN - 6), title, INK, font(28))
    draw.text((MARGIN, MARGIN + 32), _subtitle(run, final), FAINT, font(15))
    top = MARGIN + 74
    for (title, cells), count in zip(rows, lines, strict=True):
        draw.text((MARGIN, top), title, INK, font(15))
        for index, (picture, label, note) in enumerate(cells):
            x = MARGIN + index % columns * (CELL + GAP)
            y = top + 28 + index // columns * line
            sheet.paste(picture, (x, y))
            draw.text((x, y + cell_height + 4), shorten(label, 14), INK, font(14))
            draw.text((x + CELL, y + cell_height + 5), note, FAINT, font(12), anchor="ra")
        top += 34 + count * line
    if scale:
        sheet.paste(scale_bar(), (MARGIN, top + 2))
        span = "share of a pixel's attention, from each map's least to its greatest value"
        draw.text((MARGIN + 252, top), span, FAINT, font(12))
    return sheet


def _rows(run: Run, final: Image.Image, columns: int) -> list[tuple[str, list[Cell]]]:
    """Return title and cells of each row: the steps, and the words if maps were recorded."""
    steps = [*_steps(run, columns - 1), (fit(final, CELL), "result", "")]
    pictures = run.attributes.model.on_pixels or _are_decoded(run, columns - 1)
    what = "predicted clean picture" if pictures else "predicted clean latents, as colours,"
    title = (
        f"From noise to picture: the {what} at {len(steps) - 1} of "
        f"{run.tree.sizes['step']} model calls, and the result"
    )
    rows = [(title, steps)]
    if words := _words(run, final):
        images = len(run.images)
        over = (
            "layers, heads and steps"
            if images == 1
            else f"layers, heads, steps and {images} images"
        )
        title = f"Where the picture looked at each word: cross-attention, mean over {over}"
        rows.append((title, words))
    return rows


def _subtitle(run: Run, final: Image.Image) -> str:
    """Return model, scheduler, guidance, seed and size on one line."""
    recipe = run.attributes.recipe
    scheduler = run.attributes["scheduler"]["class"].removesuffix("Scheduler")
    scale = recipe["guidance_scale"]
    facts = [
        run.attributes.model.name + ", on pixels" * run.attributes.model.on_pixels,
        f"{scheduler}, {recipe['steps']} steps",
        f"guidance {scale:g}" if scale > 1 else "no guidance",
        f"seed {recipe['seed']}",
        f"{final.width} x {final.height} pixels",
    ]
    more = additions(run.attributes.recipe), edits_in_short(dict(run.attributes))
    return "   ".join([*facts, *filter(None, more)])


def _steps(run: Run, columns: int) -> list[Cell]:
    """Return the predicted clean picture at that many steps, spread evenly over the run."""
    sigmas = run.variable("sigma").values
    decoded = _are_decoded(run, columns)
    steps = run.variable("decoded/decoded_step").values if decoded else run.steps
    chosen = np.unique(np.linspace(0, len(steps) - 1, columns).round().astype(int))
    clean = run.denoised().isel(image=0).reindex(step=steps[chosen])
    if decoded:
        pictures = run.variable("decoded/picture").values[chosen, 0]
    else:
        pictures = run.preview(clean).values
    finite = np.isfinite(clean.values).reshape(len(chosen), -1).all(axis=1)
    cells = []
    for step, picture, defined in zip(steps[chosen], pictures, finite, strict=True):
        frame = fit(Image.fromarray(picture), CELL)
        shown = frame if defined else _not_defined(frame.size)
        cells.append((shown, f"step {step}", f"sigma {sigmas[step]:.2f}"))
    return cells


def _are_decoded(run: Run, columns: int) -> bool:
    """Return whether enough steps were decoded for that many columns."""
    decoded = run.tree["decoded"].sizes["decoded_step"] if "decoded" in run.tree.children else -1
    return decoded >= columns // 2


def _not_defined(size: tuple[int, int]) -> Image.Image:
    """Return the frame for latents that are not finite: a picture of them would be black."""
    frame = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=FAINT)
    middle = size[0] // 2, size[1] // 2
    text = "not defined\nat this step"
    draw.multiline_text(middle, text, FAINT, font(12), anchor="mm", align="center")
    return frame


def _words(run: Run, final: Image.Image) -> list[Cell]:
    """Return the map of each word over the picture, with its range; none without maps."""
    if not run.grids:
        return []
    small = fit(final, CELL)
    cells = []
    for word_map in run.word_overview():
        span = f"{float(word_map.min()):.0%} to {float(word_map.max()):.0%}"
        cells.append((overlay(small, word_map.values), str(word_map["word"].values), span))
    return cells
