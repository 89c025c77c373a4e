"""Pictures for people, drawn from a recording: the final PNG, a contact sheet that tells the run at
a glance, a sheet of its words.

The contact sheet has two rows: the predicted clean picture over the steps (decoded where the run
decoded it, else the linear preview), and for each word of the prompt a heat map of where the
picture looked at it. The sheet of words has a row for each word, over all steps and at each noise
level: its attention, and beside it contribution and counterfactual maps where they were recorded.
Every PNG that is saved carries the run's resolved experiment in its metadata, under the key
`experiment`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from probe.analysis import by_kind, by_sigma, word_maps
from probe.analysis.maps import word_names
from probe.errors import RecordingNotFound
from probe.reading.recording import Run, with_files
from probe.words import STUMP, alike, spelt
from probe.writing import files
from probe.writing.digests import sealed

CELL, GAP, MARGIN = 152, 12, 28
HEAD, BETWEEN = (
    78,
    20,
)  # of a section of maps: above its first row, and between what is side by side
INK, FAINT, PAPER = (24, 26, 32), (110, 114, 124), (255, 255, 255)
HEAT = np.array(
    [(0, 0, 4), (60, 9, 101), (140, 41, 99), (212, 72, 66), (250, 142, 9), (252, 255, 164)],
    np.float32,
)
UNITS = {
    "attention": "share of a pixel's attention",
    "contribution": "attention times the length of what the token writes, |v W_O|, in units of "
    "the layers' outputs",
    "counterfactual": "|prediction - prediction without the word|, mean over channels, in units "
    "of the prediction",
}


def save(run: Run) -> list[Path]:
    """Write the final pictures and the contact sheet into the recording's folder, and return their
    paths.
    """
    finals = run.images.values
    names = (
        ["picture.png"]
        if len(finals) == 1
        else [f"picture-{index}.png" for index in range(len(finals))]
    )
    named = [
        *zip(names, map(Image.fromarray, finals), strict=True),
        ("contact-sheet.png", contact_sheet(run)),
    ]
    return [keep(image, run, name) for name, image in named]


def keep(
    picture: Image.Image,
    run: Run,
    name: str,
    target: Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a picture, with the experiment and `notes` in its metadata; return its path: `target`,
    or `name` in the recording.

    Raises OSError, RecordingLinked for a recording that is a link.
    """
    asked = "noising" if run.kind == "noising" else "experiment"
    told = {asked: json.dumps(run.attributes.recipe, ensure_ascii=False), **(notes or {})}
    return keep_png(picture, run, target or run.path / name, told)


def keep_png(picture: Image.Image, run: Run, path: Path, notes: Mapping[str, str]) -> Path:
    """As `keep`, with `notes` alone in its metadata, and a digest of all its bytes, which `probe
    verify` looks at.
    """
    if path.parent == run.path:
        with_files(run)
        files.check_no_link(run.path)
    information = PngImagePlugin.PngInfo()
    for key, text in {**notes, "Software": "probe"}.items():
        information.add_itxt(key, text)
    made = io.BytesIO()
    picture.save(made, "PNG", pnginfo=information)
    files.replace(path, [sealed(made.getvalue())], False)
    return path


def contact_sheet(run: Run, columns: int = 8) -> Image.Image:
    """The run's story on one sheet, for the first of its images."""
    final = Image.fromarray(run.images.values[0])
    steps, words = _steps(run, columns - 1), _words(run, final)
    title = (
        f"From noise to picture: the predicted clean picture at {len(steps)} of "
        f"{run.tree.sizes['step']} model calls, and the result"
    )
    rows = [(title, [*steps, (_fit(final, CELL), "result", "")])]
    if words:
        over = (
            "layers, heads and steps"
            if len(run.images) == 1
            else f"layers, heads, steps and {len(run.images)} images"
        )
        rows.append(
            (f"Where the picture looked at each word: cross-attention, mean over {over}", words)
        )
    lines = [-(-len(cells) // columns) for _, cells in rows]
    shape = _fit(final, CELL).height
    line = shape + 34
    height = MARGIN + 74 + sum(34 + n * line for n in lines) + (30 if words else 0) + MARGIN // 2
    sheet = Image.new("RGB", (2 * MARGIN + columns * CELL + (columns - 1) * GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    asked = run.attributes["experiment"]
    draw.text((MARGIN, MARGIN - 6), _shorten(asked["prompt"], 80), INK, font=_font(28))
    guidance = (
        f"guidance {asked['guidance_scale']:g}" if asked["guidance_scale"] > 1 else "no guidance"
    )
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
        draw.text(
            (MARGIN + 252, top),
            "share of a pixel's attention, from each map's least to its greatest value",
            FAINT,
            font=_font(12),
        )
    return sheet


def word_sheet(run: Run, bands: int = 4, image: int = 0) -> Image.Image:
    """Where the picture looked at each word of the prompt, and of the negative prompt where that
    was recorded; and what it did.

    One row for each word, and side by side: attention, contribution, and the counterfactual map
    where they were recorded. Of each: all steps, then `bands` noise levels of equal width in log
    sigma, the noisiest first, without those that hold no step; the mean over layers and heads of
    all grids. Below: how much goes to words and how much to BOS, EOS and rest, and what was cut
    from the prompt. A run that was stopped is drawn over its last preview. Raises RecordingNotFound
    without maps, or without that image.
    """
    if image not in range(len(run.images)):
        raise RecordingNotFound(
            f"{run.name} has no image {image}.", f"It has images 0 to {len(run.images) - 1}."
        )
    sigma, reads = run.variable("sigma"), _reads(run)
    sections: dict[str, list[xr.DataArray]] = {}
    notes: list[str] = []
    for branch in reversed([str(name) for name in run.attention()["branch"].values]):
        which = "prompt" if branch == "cond" else "negative prompt"
        tokens = [
            run.token_maps(of=of, branch=branch, images=[image]).isel({run.attributes.across: 0})
            for of in reads
        ]
        cut, split = run.cut(branch)
        blocks = [word_maps(_columns(maps, bands, sigma), cut=cut, split=split) for maps in tokens]
        if blocks[0].sizes["word"]:
            if branch == "cond" and "counterfactual" in run.tree.children:
                change = (
                    run.counterfactual()
                    .isel({run.attributes.across: image})
                    .sel(step=tokens[0]["step"])
                )
                blocks.append(_of_words(_columns(change, bands, sigma), blocks[0]))
                if again := _again(blocks[-1]):
                    notes.append(
                        f"Counterfactual: {', '.join(again)}: left out at all places at once, so "
                        "that all rows of such a word show the same map"
                    )
            sections[f"{which.capitalize()}: {_shorten(run.attributes.texts[branch], 80)}"] = blocks
        else:
            notes.append(f"The {which} has no words: there is no map to draw.")
        for of, maps in zip(reads, tokens, strict=True):
            masses = by_kind(maps.mean(("step", "y", "x"), skipna=False))
            shares = ", ".join(
                f"{kind} {float(mass / masses.sum()):.1%}"
                for kind, mass in zip(masses["kind"].values, masses, strict=True)
            )
            notes.append(
                f"Of all {of} to the {which}: {shares}"
                if of == "attention"
                else f"Of all {of} of the {which}: {shares}"
            )
        if split:
            stump = str(blocks[0]["word"].values[-1])
            notes.append(
                f"Cut in its middle: {_shorten(split, 60)}, of which the model read only "
                f"{_shorten(stump, 60)}"
            )
        if cut:
            notes.append(f"Cut from it, never read by the model: {_shorten(cut, 90)}")
    return sheet_of_maps(_shown(run, image), sections, notes)


def ask_sheet(run: Run, maps: xr.DataArray, bands: int = 4) -> Image.Image:
    """A word that was asked after the run, by noise level.

    *Shape:* maps (step, y, x), as `probe.running.ask.read_out` gives them.
    """
    section = (
        _columns(maps, bands, maps["sigma"])
        .expand_dims(word=[maps.attrs["word"]])
        .rename("attention")
    )
    notes = [f"Read in: {_shorten(maps.attrs['context'], 90)}", f"A {maps.attrs['read_out']}"]
    return sheet_of_maps(
        _shown(run, 0), {f"Asked afterwards: {_shorten(maps.attrs['word'], 80)}": [section]}, notes
    )


def ask_name(maps: xr.DataArray) -> str:
    """The file name for `ask_sheet`: the words, shortened, and where they do not tell the whole
    question, a digest of it.

    The same question has the same name; capital letters make no other one, as the text encoder
    reads small letters.
    """
    words, context = spelt(maps.attrs["word"]), " ".join(maps.attrs["context"].lower().split())
    slug = "-".join(words)[:40]
    if context == f"a {slug.replace('-', ' ')}":
        return f"ask-{slug}.png"
    return f"ask-{slug}-{hashlib.sha256(f'{words} {context}'.encode()).hexdigest()[:8]}.png"


def sheet_of_maps(
    picture: Image.Image, sections: Mapping[str, Sequence[xr.DataArray]], notes: Sequence[str] = ()
) -> Image.Image:
    """Maps over a picture: in each section a row for each word, and side by side what can be said
    of it, by the names in `UNITS`.

    *Shape:* each of a section's arrays (word, column, y, x), labelled by `word` and `column`, the
    same words in all of them. The colours of a row span the least to the greatest value of one
    array in it, so that its columns can be compared; below each map stands its own range. NaN is
    drawn as 0, and a map that is nothing else is left out.
    """
    small = _fit(picture, CELL)
    row, head, block = small.height + 26, HEAD, CELL + GAP
    widths = [
        sum(maps.sizes["column"] * block + BETWEEN for maps in blocks)
        for blocks in sections.values()
    ]
    units = list(
        dict.fromkeys(str(maps.name) for blocks in sections.values() for maps in blocks)
    ) or ["attention"]
    height = (
        MARGIN
        + sum(head + row * blocks[0].sizes["word"] + 16 for blocks in sections.values())
        + 20 * (len(units) + len(notes))
        + 20
        + MARGIN // 2
    )
    sheet = Image.new(
        "RGB",
        (
            2 * MARGIN + max(5 * block, *(block + width - BETWEEN for width in widths), 0) - GAP,
            height,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for title, blocks in sections.items():
        draw.text((MARGIN, top), title, INK, font=_font(18))
        for index, name in enumerate(word_names(blocks[0])):
            draw.text(
                (MARGIN, top + head + index * row + small.height // 2 - 10),
                _shorten(name, 16),
                INK,
                font=_font(17),
            )
        left = MARGIN + block
        for maps in blocks:
            draw.text((left, top + 32), str(maps.name).capitalize(), INK, font=_font(15))
            for column, label in enumerate(maps["column"].values):
                draw.text((left + column * block, top + 54), str(label), FAINT, font=_font(13))
            for index, cells in enumerate(maps.transpose("word", "column", "y", "x").values):
                _draw_row(
                    sheet, draw, (left, top + head + index * row), small, cells, str(maps.name)
                )
            left += maps.sizes["column"] * block + BETWEEN
        top += head + row * blocks[0].sizes["word"] + 16
    sheet.paste(_scale_bar(), (MARGIN, top + 2))
    draw.text(
        (MARGIN + 252, top),
        "from the least to the greatest value in a row's maps of one kind",
        FAINT,
        font=_font(12),
    )
    for index, unit in enumerate(units):
        draw.text(
            (MARGIN, top + 20 + 20 * index),
            f"{unit.capitalize()}: {UNITS[unit]}",
            FAINT,
            font=_font(12),
        )
    for index, note in enumerate(notes):
        draw.text((MARGIN, top + 20 + 20 * (len(units) + index)), note, INK, font=_font(13))
    return sheet


def _draw_row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    picture: Image.Image,
    cells: np.ndarray,
    kind: str,
) -> None:
    """Maps of one word side by side, with their ranges. *Shape:* cells (column, y, x)."""
    finite = cells[np.isfinite(cells)]
    if not finite.size:
        draw.text((at[0], at[1] + picture.height // 2 - 8), "not recorded", FAINT, font=_font(12))
        return
    bounds = float(finite.min()), float(finite.max())
    for column, cell in enumerate(cells):
        x = at[0] + column * (CELL + GAP)
        sheet.paste(overlay(picture, cell, bounds), (x, at[1]))
        least, greatest = (
            f"{float(value):.1%}" if kind == "attention" else f"{float(value):.3g}"
            for value in (cell.min(), cell.max())
        )
        draw.text((x, at[1] + picture.height + 4), f"{least} to {greatest}", FAINT, font=_font(12))


def _reads(run: Run) -> list[Literal["attention", "contribution"]]:
    """What a run can say of its tokens."""
    try:
        run.contribution()
    except RecordingNotFound:
        run.attention()
        return ["attention"]
    return ["attention", "contribution"]


def _columns(maps: xr.DataArray, bands: int, sigma: xr.DataArray) -> xr.DataArray:
    """The mean over all steps, then over each noise level that has one.

    *Shape:* (step, ...) -> (column, ...), labelled by `column`.
    """
    banded = by_sigma(maps, bands, sigma)
    banded = banded.isel(band=np.flatnonzero(banded["steps"].values))
    names = [
        "all steps",
        *(
            f"sigma {float(band['sigma_to']):.3g} to {float(band['sigma_from']):.3g}"
            for band in banded
        ),
    ]
    levels = [*banded.drop_vars(["sigma_from", "sigma_to", "steps"])]
    made: xr.DataArray = xr.concat(
        [maps.mean("step"), *levels], "column", coords="minimal", compat="override"
    )
    return made.assign_coords(column=names)


def _of_words(change: xr.DataArray, words: xr.DataArray) -> xr.DataArray:
    """Counterfactual maps in the rows of `words`; NaN for a word without one.

    *Shape:* (masked_word, ...) -> (word, ...).
    """
    there = [alike(str(word)) for word in change["masked_word"].values]
    texts = _read_alike(words)
    first = change.isel(masked_word=0, drop=True)
    rows = [
        change.isel(masked_word=there.index(word), drop=True) if word in there else first * np.nan
        for word in texts
    ]
    made: xr.DataArray = xr.concat(rows, "word", coords="minimal", compat="override")
    return made.assign_coords(word=words["word"].values).rename("counterfactual")


def _read_alike(words: xr.DataArray) -> list[str]:
    """The texts of words by which the text encoder cannot tell them apart.

    *Shape:* (word, ...) -> one for each word.
    """
    return [alike(str(word).removesuffix(STUMP)) for word in words["word"].values]


def _again(changes: xr.DataArray) -> list[str]:
    """The words with counterfactual maps that have several rows. *Shape:* (word, ...)."""
    texts = _read_alike(changes)
    shown = np.isfinite(changes.transpose("word", ...).values).reshape(len(texts), -1).any(axis=1)
    return [
        text for text in dict.fromkeys(texts) if texts.count(text) > 1 and shown[texts.index(text)]
    ]


def _shown(run: Run, image: int) -> Image.Image:
    """A run's picture, or its last preview where it was stopped before."""
    return Image.fromarray(
        (run.images.values if run.images.values.any() else run.preview().values[-1])[image]
    )


def overlay(
    picture: Image.Image, heat_map: np.ndarray, bounds: tuple[float, float] | None = None
) -> Image.Image:
    """A heat map (y, x) over a greyed picture; its colours span `bounds`, by default its least to
    its greatest value.
    """
    heat_map = np.nan_to_num(heat_map, posinf=0, neginf=0)  # a run may have recorded NaN
    least, greatest = bounds or (heat_map.min(), heat_map.max())
    scaled = (heat_map - least) / max(float(greatest - least), 1e-12)
    value = np.asarray(
        Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    ).clip(0, 1)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    weight = 0.25 + 0.65 * value[..., None]
    return Image.fromarray((grey * (1 - weight) + heat(value) * weight).round().astype(np.uint8))


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers in 0..1 as colours from black over red to light yellow.

    *Shape:* (...) -> (..., rgb) uint8.
    """
    at = values.clip(0, 1) * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return np.asarray(HEAT[low] * (1 - part) + HEAT[low + 1] * part).round().astype(np.uint8)


def _scale_bar() -> Image.Image:
    return Image.fromarray(heat(np.linspace(0, 1, 240)[None].repeat(12, 0)))


def _steps(run: Run, columns: int) -> list[tuple[Image.Image, str, str]]:
    sigmas = run.variable("sigma").values
    if "decoded" in run.tree.children and run.tree["decoded"].sizes["decoded_step"] >= columns // 2:
        of, pictures = (
            run.variable("decoded/decoded_step").values,
            run.variable("decoded/picture").values[:, 0],
        )
    else:
        of, pictures = run.steps, run.preview().values[:, 0]
    chosen = np.unique(np.linspace(0, len(of) - 1, columns).round().astype(int))
    clean = run.denoised().reindex(step=of[chosen]).isel(image=0).values
    finite = np.isfinite(clean).reshape(len(chosen), -1).all(axis=1)
    frames = [_fit(Image.fromarray(pictures[i]), CELL) for i in chosen]
    shown = [
        frame if good else _not_defined(frame.size)
        for frame, good in zip(frames, finite, strict=True)
    ]
    return [
        (frame, f"step {of[i]}", f"sigma {sigmas[of[i]]:.2f}")
        for frame, i in zip(shown, chosen, strict=True)
    ]


def _not_defined(size: tuple[int, int]) -> Image.Image:
    """A frame for a picture that there is not, where one of latents that are not finite would be
    black.
    """
    frame = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=FAINT)
    draw.multiline_text(
        (size[0] // 2, size[1] // 2),
        "not defined\nat this step",
        FAINT,
        font=_font(12),
        anchor="mm",
        align="center",
    )
    return frame


def _words(run: Run, final: Image.Image) -> list[tuple[Image.Image, str, str]]:
    if not run.grids:
        return []
    small = _fit(final, CELL)
    return [
        (
            overlay(small, m.values),
            str(m["word"].values),
            f"{float(m.min()):.0%} to {float(m.max()):.0%}",
        )
        for m in run.word_overview()
    ]


def _fit(picture: Image.Image, width: int) -> Image.Image:
    """The picture at a width; a preview, one pixel a latent, keeps its squares."""
    resample = Image.Resampling.NEAREST if picture.width < width / 2 else Image.Resampling.LANCZOS
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), resample)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "\u2026"
