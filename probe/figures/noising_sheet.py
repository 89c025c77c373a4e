"""A noising on one sheet: what went in, what the model said, its error, and the loss.

    save_sheet(run)      # contact-sheet.png in the recording's folder

The sheet shows the first draw of noise. A column is a timestep, the noisiest first. Latents are
shown by the recording's linear map to colour. Noise is shown around middle grey: two standard
deviations are black or white. Of differences the size is shown, all on one scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw

from probe.figures.drawing import FAINT, INK, PAPER, font, heat, shorten
from probe.figures.sheets import keep_png
from probe.format.schema import counted
from probe.reading.recording import Run

CELL, GAP, MARGIN, CURVE = 116, 10, 28, 190
BLUE, PALE = (40, 90, 170), (200, 214, 238)

# a picture, or none where there is nothing to see; what it is; a number about it
Cell = tuple[Image.Image | None, str, str]


def save_sheet(run: Run) -> Path:
    """Write the sheet into the recording's folder, with the recipe in its metadata."""
    recipe = json.dumps(run.attributes.recipe, ensure_ascii=False)
    return keep_png(noising_sheet(run), run, run.path / "contact-sheet.png", {"noising": recipe})


def noising_sheet(run: Run, columns: int = 10) -> Image.Image:
    """Return the sheet of a noising, with at most that many of its timesteps."""
    count = min(columns, len(run.steps))
    steps = run.steps[np.unique(np.linspace(0, len(run.steps) - 1, count).round().astype(int))]
    rows = _rows(run, steps)
    picture = Image.fromarray(run.variable("source/picture").values)
    tall = max(1, round(CELL * picture.height / picture.width))
    across = max(len(steps), 6)
    wide = across * (CELL + GAP) - GAP
    top = MARGIN + 64
    height = top + tall + 40 + len(rows) * (tall + 46) + CURVE + 60
    sheet = Image.new("RGB", (2 * MARGIN + wide, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    caption = run.attributes.recipe["caption"] or "(no caption)"
    draw.text((MARGIN, MARGIN - 6), shorten(caption, wide // 15), INK, font(26))
    draw.text((MARGIN, MARGIN + 30), _subtitle(run), FAINT, font(14))
    pictures, left_out = _pictures(run, picture, across)
    draw.text((MARGIN, top + tall + 20), shorten(left_out, wide // 7), FAINT, font(12))
    _line(sheet, top, tall, pictures)
    top += tall + 40
    timesteps, sigmas = run.variable("timestep").values, run.variable("sigma").values
    labels = [(f"t = {timesteps[step]:.0f}", f"sigma {sigmas[step]:.2g}") for step in steps]
    for title, cells in rows:
        draw.text((MARGIN, top), title, INK, font(14))
        _line(sheet, top + 22, tall, [(cell, *labels[i]) for i, cell in enumerate(cells)])
        top += tall + 46
    _curve(draw, run, (MARGIN + 46, top + 30, MARGIN + wide, top + 30 + CURVE - 40), top)
    return sheet


def _subtitle(run: Run) -> str:
    """Return model, number of timesteps, draws of noise and seed on one line."""
    recipe = run.attributes.recipe
    process = f"the forward process at {counted(len(recipe['timesteps']), 'timestep')}"
    draws = f"{counted(recipe['noises'], 'draw')} of noise from seed {recipe['seed']}"
    return "   ".join((run.attributes["model"]["name"], process, draws))


def _pictures(run: Run, picture: Image.Image, across: int) -> tuple[list[Cell], str]:
    """Return the picture, the VAE's round trip and the masks, and a line on masks left out.

    A model of pixels has no VAE.
    """
    cells: list[Cell] = [(picture, "the picture", "")]
    if not run.attributes.model.on_pixels:
        loss = f"{float(run.variable('source/psnr')):.1f} dB"
        cells.append((Image.fromarray(run.images.values[0]), "after the VAE", loss))
    if "mask" not in run.tree["source"].dataset:
        return cells, ""
    masks = run.variable("source/mask")
    room = across - len(cells)
    cells += [
        (Image.fromarray(mask.values * 255), f"mask: {mask['masked'].item()}", "")
        for mask in masks[:room]
    ]
    left = [str(word) for word in masks["masked"].values[room:]]
    if not left:
        return cells, ""
    return cells, f"{counted(len(left), 'more mask')}, without room here: {', '.join(left)}"


def _rows(run: Run, steps: np.ndarray) -> list[tuple[str, list[Image.Image | None]]]:
    """Return each row's title and pictures, one a step, for the first draw of noise.

    A picture is None where a number that it shows is not finite.
    """
    first = {"step": steps, "draw": 0}
    slope, bias = run.variable("preview/latent_to_rgb").load(), run.variable("preview/bias").load()

    def colours(
        latents: xr.DataArray, around: xr.DataArray | float, scale: float = 1.0
    ) -> list[Image.Image | None]:
        scaled = latents.astype("float32") * scale
        colour: xr.DataArray = xr.dot(scaled, slope, dim="channel") + around
        bytes_: xr.DataArray = (colour.fillna(0).clip(0, 1) * 255).round().astype("uint8")
        return _defined(bytes_.transpose("step", "y", "x", "rgb").values, latents)

    # the greatest spread of the colour of noise with standard deviation one
    spread = max(float(np.sqrt((slope**2).sum("channel")).max()), 1e-12)
    noise = run.eps().sel(step=steps).isel(draw=0)
    difference = run.variable("forward/difference").isel(first)
    wrong = (difference**2).mean("channel") ** 0.5
    wrong = wrong.where(np.isfinite(wrong), 0)
    greatest = max(float(wrong.max()), 1e-12)
    denoised = run.variable("forward/denoised").isel(first).load()
    if "decoded" in run.tree.children:
        decoded = run.variable("decoded/decoded_step").values
        index = [int(np.flatnonzero(decoded == step)[0]) for step in steps]
        pictures = run.variable("decoded/picture").isel(decoded_step=index, draw=0).values
        clean = _defined(pictures, denoised)
    else:
        clean = colours(denoised, bias)
    given = "the picture's latents with noise in them"
    if run.attributes.model.on_pixels:
        given = "the picture with noise in it"
    return [
        (
            f"What the model was given: {given} (x_t)",
            colours(run.latents.sel(step=steps).isel(draw=0), bias),
        ),
        ("The noise it predicts", colours(noise, 0.5, 0.25 / spread)),
        (
            f"What it got wrong: predicted less true noise, black 0, yellow {greatest:.2g}",
            _defined(heat(wrong.values / greatest), difference),
        ),
        ("What it takes for the clean picture", clean),
    ]


def _defined(pictures: Iterable[np.ndarray], values: xr.DataArray) -> list[Image.Image | None]:
    """Return the picture of each step, or None where the values behind it are not finite."""
    by_step = values.transpose("step", ...).values.reshape(values.sizes["step"], -1)
    finite = np.isfinite(by_step).all(axis=1)
    return [
        Image.fromarray(picture) if good else None
        for picture, good in zip(pictures, finite, strict=True)
    ]


def _line(sheet: Image.Image, top: int, tall: int, cells: list[Cell]) -> None:
    """Draw a row of cells with their labels and notes."""
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label, note) in enumerate(cells):
        x = MARGIN + index * (CELL + GAP)
        frame = x - 1, top - 1, x + CELL, top + tall
        draw.rectangle(frame, outline=FAINT)  # where a mask is white, so is the sheet
        if picture is None:
            middle = x + CELL // 2, top + tall // 2
            draw.text(middle, "not defined", FAINT, font(12), anchor="mm")
        else:
            small = picture.width < CELL / 2
            resample = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            sheet.paste(picture.convert("RGB").resize((CELL, tall), resample), (x, top))
        draw.text((x, top + tall + 3), shorten(label, 18), INK, font(12))
        draw.text((x + CELL, top + tall + 3), note, FAINT, font(11), anchor="ra")


def _curve(draw: ImageDraw.ImageDraw, run: Run, box: tuple[int, int, int, int], top: int) -> None:
    """Draw the mean loss over the timesteps, a dot each, on a logarithmic scale.

    Of several draws of noise, a band shows the spread.
    """
    left, upper, right, lower = box
    steps = run.steps[::-1]  # the least noise first, as time runs in the forward process
    t = run.variable("timestep").values[steps]
    mean = run.variable("forward/loss_mean").values[steps]
    spread = run.variable("forward/loss_spread").values[steps]
    good = np.isfinite(mean) & (mean > 0)
    t, mean, spread = t[good], mean[good], np.nan_to_num(spread[good])
    kind = "noise" if run.attributes["prediction_type"] == "epsilon" else "velocity"
    several = run.attributes.recipe["noises"] > 1
    over = ", over the draws of noise; the band is its spread" if several else ""
    title = f"Loss: mean square of predicted less true {kind}{over}"
    draw.text((MARGIN, top), title, INK, font(14))
    if not len(t):
        return
    low, high = np.maximum(mean - spread, mean / 10), mean + spread
    least, most = np.log10(low.min()) - 0.05, np.log10(high.max()) + 0.05
    last = max(float(t.max()), 1.0)

    def at(when: float, value: float) -> tuple[float, float]:
        share = (float(np.log10(value)) - least) / (most - least)
        return left + (right - left) * when / last, lower - (lower - upper) * share

    for tick in _ticks(least, most):
        y = at(0, tick)[1]
        draw.line((left, y, right, y), fill=(228, 230, 234))
        draw.text((left - 8, y), f"{tick:g}", FAINT, font(11), anchor="rm")
    lower_edge, line, upper_edge = (
        [at(*point) for point in zip(t, values, strict=True)] for values in (low, mean, high)
    )
    if len(t) > 1:
        draw.polygon([*upper_edge, *reversed(lower_edge)], fill=PALE)
        draw.line(line, fill=BLUE, width=2)
    else:
        x, y = line[0]
        draw.rectangle((x - 5, upper_edge[0][1], x + 5, lower_edge[0][1]), fill=PALE)
        value = f"{mean[0]:.3g}" + (f" \u00b1 {spread[0]:.2g}" if several else "")
        offset, anchor = (-12, "rm") if t[0] > last / 2 else (12, "lm")
        draw.text((x + offset, y), value, INK, font(12), anchor=anchor)
    for x, y in line:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=BLUE)
    for when in t if len(t) <= 12 else np.linspace(0, last, 6):
        x = at(when, mean[0])[0]
        draw.text((x, lower + 5), f"{when:.0f}", FAINT, font(11), anchor="ma")
    draw.text((right, lower + 20), "timestep t", FAINT, font(11), anchor="ra")


def _ticks(least: float, most: float) -> list[float]:
    """Return round numbers between two powers of ten, at most about seven."""
    round_numbers = [digit * 10.0**power for power in range(-12, 7) for digit in (1, 2, 5)]
    ticks = [number for number in round_numbers if least <= np.log10(number) <= most]
    if len(ticks) > 7:
        ticks = [number for number in ticks if f"{number:e}".startswith("1")]
    if len(ticks) < 2:  # the losses lie too close together for round numbers
        ticks = [float(f"{10**power:.3g}") for power in np.linspace(least, most, 5)[1:-1]]
    return ticks
