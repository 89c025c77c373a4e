"""A sheet of a run's words: where the picture looked at each, and what it did.

It has a row for each word, over all steps and at each noise level: its attention, and beside it
contribution and counterfactual maps where they were recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw

from probe.analysis import by_kind, by_sigma, word_maps
from probe.analysis.maps import word_names
from probe.errors import RecordingNotFound
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
from probe.reading.recording import Run
from probe.words import STUMP, alike, spelt

HEAD = 78  # pixels of a section above its first row
BETWEEN = 20  # between maps of two kinds
UNITS = {
    "attention": "share of a pixel's attention",
    "contribution": "attention times the length of what the token writes, |v W_O|, in units of "
    "the layers' outputs",
    "counterfactual": "|prediction - prediction without the word|, mean over channels, in units "
    "of the prediction",
}


def word_sheet(run: Run, bands: int = 4, image: int = 0) -> Image.Image:
    """Return a sheet of the words of the prompt, and of the negative prompt if it was recorded.

    Each word has one row. Side by side stand its attention, its contribution and its counterfactual
    map, where they were recorded. Each is drawn for all steps, then for `bands` noise levels of
    equal width in log sigma, the noisiest first; a level without a step is left out. Maps are the
    mean over the layers and heads of all grids. Below stands how much goes to words and how much to
    BOS, EOS and rest, and what was cut from the prompt. A run that was stopped is drawn over its
    last preview. Raise RecordingNotFound without maps, or without that image.
    """
    if image not in range(len(run.images)):
        raise RecordingNotFound(
            f"{run.name} has no image {image}.", f"It has images 0 to {len(run.images) - 1}."
        )
    kinds = _kinds(run)
    sections: dict[str, list[xr.DataArray]] = {}
    notes: list[str] = []
    for branch in reversed([str(name) for name in run.attention()["branch"].values]):
        prompt = "prompt" if branch == "cond" else "negative prompt"
        tokens = [
            run.token_maps(of=kind, branch=branch, images=[image]).isel({run.attributes.across: 0})
            for kind in kinds
        ]
        cut, split = run.cut(branch)
        sigma = run.variable("sigma")
        blocks = [word_maps(_columns(maps, bands, sigma), cut=cut, split=split) for maps in tokens]
        words = blocks[0]
        if words.sizes["word"]:
            if branch == "cond" and "counterfactual" in run.tree.children:
                steps = tokens[0]["step"]
                change = run.counterfactual().isel({run.attributes.across: image}).sel(step=steps)
                blocks.append(_of_words(_columns(change, bands, sigma), words))
                notes += _notes_on_changes(blocks[-1])
            sections[f"{prompt.capitalize()}: {shorten(run.attributes.texts[branch], 80)}"] = blocks
        else:
            notes.append(f"The {prompt} has no words: there is no map to draw.")
        notes += [
            _note_on_shares(kind, prompt, maps) for kind, maps in zip(kinds, tokens, strict=True)
        ]
        notes += _notes_on_cuts(cut, split, words)
    return sheet_of_maps(_shown(run, image), sections, notes)


def _note_on_shares(kind: str, prompt: str, maps: xr.DataArray) -> str:
    """Return what part of all attention goes to words, BOS, EOS and rest.

    *Shape:* maps (step, token, y, x).
    """
    masses = by_kind(maps.mean(("step", "y", "x"), skipna=False))
    shares = ", ".join(
        f"{name} {float(mass / masses.sum()):.1%}"
        for name, mass in zip(masses["kind"].values, masses, strict=True)
    )
    return f"Of all {kind} {'to' if kind == 'attention' else 'of'} the {prompt}: {shares}"


def _notes_on_changes(changes: xr.DataArray) -> list[str]:
    """Return a note if a word with counterfactual maps has several rows. *Shape:* (word, ...)."""
    texts = _read_alike(changes)
    drawn = np.isfinite(changes.transpose("word", ...).values).reshape(len(texts), -1).any(axis=1)
    several = [
        text for text in dict.fromkeys(texts) if texts.count(text) > 1 and drawn[texts.index(text)]
    ]
    if not several:
        return []
    return [
        f"Counterfactual: {', '.join(several)}: left out at all places at once, so that all rows "
        "of such a word show the same map"
    ]


def _notes_on_cuts(cut: str, split: str, words: xr.DataArray) -> list[str]:
    """Return what of a prompt was too long for the model."""
    notes = []
    if split:
        stump = str(words["word"].values[-1])
        notes.append(
            f"Cut in its middle: {shorten(split, 60)}, of which the model read only "
            f"{shorten(stump, 60)}"
        )
    if cut:
        notes.append(f"Cut from it, never read by the model: {shorten(cut, 90)}")
    return notes


def ask_sheet(run: Run, maps: xr.DataArray, bands: int = 4) -> Image.Image:
    """Return a sheet of one word that was asked for after the run, by noise level.

    *Shape:* maps (step, y, x), as `probe.running.ask.read_out` returns them.
    """
    word = maps.attrs["word"]
    block = _columns(maps, bands, maps["sigma"]).expand_dims(word=[word]).rename("attention")
    notes = [f"Read in: {shorten(maps.attrs['context'], 90)}", f"A {maps.attrs['read_out']}"]
    return sheet_of_maps(_shown(run, 0), {f"Asked afterwards: {shorten(word, 80)}": [block]}, notes)


def ask_name(maps: xr.DataArray) -> str:
    """Return the file name for `ask_sheet`: the words, shortened.

    Where they do not tell the whole question, a digest of the question follows. Capital letters
    change nothing, for the text encoder reads small letters.
    """
    words, context = spelt(maps.attrs["word"]), " ".join(maps.attrs["context"].lower().split())
    slug = "-".join(words)[:40]
    if context == f"a {slug.replace('-', ' ')}":
        return f"ask-{slug}.png"
    digest = hashlib.sha256(f"{words} {context}".encode()).hexdigest()[:8]
    return f"ask-{slug}-{digest}.png"


def sheet_of_maps(
    picture: Image.Image, sections: Mapping[str, Sequence[xr.DataArray]], notes: Sequence[str] = ()
) -> Image.Image:
    """Return maps drawn over a picture, with a row for each word.

    A section holds arrays whose names are keys of `UNITS`; they are drawn side by side. In a row,
    the colours of one array span its least to its greatest value, so that its columns compare.
    Below each map stands its own range. NaN is drawn as 0; a map of NaN alone is left out.

    *Shape:* arrays (word, column, y, x), labelled by `word` and `column`, with the same words in
    all arrays of a section.
    """
    small = fit(picture, CELL)
    kinds = dict.fromkeys(str(maps.name) for blocks in sections.values() for maps in blocks)
    units = [f"{kind.capitalize()}: {UNITS[kind]}" for kind in kinds or ["attention"]]
    row = small.height + 26
    heights = [HEAD + row * blocks[0].sizes["word"] + 16 for blocks in sections.values()]
    foot = 20 * (len(units) + len(notes)) + 20 + MARGIN // 2
    size = _width(sections), MARGIN + sum(heights) + foot
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for (title, blocks), height in zip(sections.items(), heights, strict=True):
        draw.text((MARGIN, top), title, INK, font=font(18))
        _draw_section(sheet, top, small, blocks)
        top += height
    sheet.paste(scale_bar(), (MARGIN, top + 2))
    scale = "from the least to the greatest value in a row's maps of one kind"
    draw.text((MARGIN + 252, top), scale, FAINT, font=font(12))
    for index, unit in enumerate(units, 1):
        draw.text((MARGIN, top + 20 * index), unit, FAINT, font=font(12))
    for index, note in enumerate(notes, 1 + len(units)):
        draw.text((MARGIN, top + 20 * index), note, INK, font=font(13))
    return sheet


def _width(sections: Mapping[str, Sequence[xr.DataArray]]) -> int:
    """Return the width in pixels: names, then the widest section; at least five cells."""
    block = CELL + GAP
    widths = [
        block + sum(maps.sizes["column"] * block + BETWEEN for maps in blocks) - BETWEEN
        for blocks in sections.values()
    ]
    return 2 * MARGIN + max(5 * block, *widths, 0) - GAP


def _draw_section(
    sheet: Image.Image, top: int, picture: Image.Image, blocks: Sequence[xr.DataArray]
) -> None:
    """Draw the names of the words, and beside them the maps of each kind."""
    draw, block, row = ImageDraw.Draw(sheet), CELL + GAP, picture.height + 26
    for index, name in enumerate(word_names(blocks[0])):
        middle = top + HEAD + index * row + picture.height // 2 - 10
        draw.text((MARGIN, middle), shorten(name, 16), INK, font=font(17))
    left = MARGIN + block
    for maps in blocks:
        draw.text((left, top + 32), str(maps.name).capitalize(), INK, font=font(15))
        for column, label in enumerate(maps["column"].values):
            draw.text((left + column * block, top + 54), str(label), FAINT, font=font(13))
        for index, cells in enumerate(maps.transpose("word", "column", "y", "x").values):
            at = left, top + HEAD + index * row
            _draw_row(sheet, at, picture, cells, str(maps.name))
        left += maps.sizes["column"] * block + BETWEEN


def _draw_row(
    sheet: Image.Image, at: tuple[int, int], picture: Image.Image, cells: np.ndarray, kind: str
) -> None:
    """Draw the maps of one word side by side, with their ranges. *Shape:* cells (column, y, x)."""
    draw = ImageDraw.Draw(sheet)
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        draw.text((at[0], at[1] + picture.height // 2 - 8), "not recorded", FAINT, font=font(12))
        return
    bounds = float(finite.min()), float(finite.max())
    form = ".1%" if kind == "attention" else ".3g"
    for column, cell in enumerate(cells):
        x = at[0] + column * (CELL + GAP)
        sheet.paste(overlay(picture, cell, bounds), (x, at[1]))
        span = f"{float(cell.min()):{form}} to {float(cell.max()):{form}}"
        draw.text((x, at[1] + picture.height + 4), span, FAINT, font=font(12))


def _kinds(run: Run) -> list[Literal["attention", "contribution"]]:
    """Return the kinds of maps that a run has of its tokens. Raise RecordingNotFound for none."""
    try:
        run.contribution()
    except RecordingNotFound:
        run.attention()
        return ["attention"]
    return ["attention", "contribution"]


def _columns(maps: xr.DataArray, bands: int, sigma: xr.DataArray) -> xr.DataArray:
    """Return the mean over all steps, then over each noise level that has a step.

    *Shape:* (step, ...) -> (column, ...), labelled by `column`.
    """
    banded = by_sigma(maps, bands, sigma)
    banded = banded.isel(band=np.flatnonzero(banded["steps"].values))
    spans = [
        f"sigma {float(band['sigma_to']):.3g} to {float(band['sigma_from']):.3g}" for band in banded
    ]
    levels = [*banded.drop_vars(["sigma_from", "sigma_to", "steps"])]
    columns: xr.DataArray = xr.concat(
        [maps.mean("step"), *levels], "column", coords="minimal", compat="override"
    )
    return columns.assign_coords(column=["all steps", *spans])


def _of_words(change: xr.DataArray, words: xr.DataArray) -> xr.DataArray:
    """Return counterfactual maps in the rows of `words`; NaN for a word without one.

    *Shape:* (masked_word, ...) -> (word, ...).
    """
    masked = [alike(str(word)) for word in change["masked_word"].values]
    nothing = change.isel(masked_word=0, drop=True) * np.nan
    rows = [
        change.isel(masked_word=masked.index(word), drop=True) if word in masked else nothing
        for word in _read_alike(words)
    ]
    maps: xr.DataArray = xr.concat(rows, "word", coords="minimal", compat="override")
    return maps.assign_coords(word=words["word"].values).rename("counterfactual")


def _read_alike(words: xr.DataArray) -> list[str]:
    """Return each word as the text encoder reads it: words that it cannot tell apart are equal.

    *Shape:* (word, ...) -> one text for each word.
    """
    return [alike(str(word).removesuffix(STUMP)) for word in words["word"].values]


def _shown(run: Run, image: int) -> Image.Image:
    """Return a run's picture, or its last preview if it was stopped before."""
    finals = run.images.values
    return Image.fromarray((finals if finals.any() else run.preview().values[-1])[image])
