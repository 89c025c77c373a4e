"""A noising on one sheet, for people: what went in, what the model said, what it got wrong, and the
loss over the timesteps.

    save_sheet(run)      # contact-sheet.png in the recording's folder

For the first draw of noise, one column a timestep, the noisiest first. Latents are shown by the
recording's linear map to colour; of noise, around middle grey, two standard deviations to black or
white; of differences, the size, on one scale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw, ImageFont

from probe.figures.sheets import FAINT, INK, PAPER, heat, keep_png
from probe.format.schema import counted
from probe.reading.recording import Run

CELL, GAP, MARGIN, CURVE = 116, 10, 28, 190
BLUE, PALE = (40, 90, 170), (200, 214, 238)

Cell = tuple[
    Image.Image | None, str, str
]  # a picture, or none where there is nothing to see, what it is, and a number of it


def save_sheet(run: Run) -> Path:
    """Write the sheet into the recording's folder, with what was asked in its metadata."""
    told = json.dumps(run.attributes.recipe, ensure_ascii=False)
    return keep_png(noising_sheet(run), run, run.path / "contact-sheet.png", {"noising": told})


def noising_sheet(run: Run, columns: int = 10) -> Image.Image:
    """The sheet of a noising, for at most that many of its timesteps."""
    chosen = np.unique(
        np.linspace(0, len(run.steps) - 1, min(columns, len(run.steps))).round().astype(int)
    )
    steps = run.steps[chosen]
    rows = _rows(run, steps)
    picture = Image.fromarray(run.variable("source/picture").values)
    tall = max(1, round(CELL * picture.height / picture.width))
    across = max(len(steps), 6)
    wide = across * (CELL + GAP) - GAP
    top = MARGIN + 64
    height = top + tall + 40 + len(rows) * (tall + 46) + CURVE + 60
    sheet = Image.new("RGB", (2 * MARGIN + wide, height), PAPER)
    draw, asked = ImageDraw.Draw(sheet), run.attributes.recipe
    draw.text(
        (MARGIN, MARGIN - 6),
        _shorten(asked["caption"] or "(no caption)", wide // 15),
        INK,
        font=_font(26),
    )
    draws = f"{counted(asked['noises'], 'draw')} of noise from seed {asked['seed']}"
    draw.text(
        (MARGIN, MARGIN + 30),
        f"{run.attributes['model']['name']}   the forward process at "
        f"{counted(len(asked['timesteps']), 'timestep')}   {draws}",
        FAINT,
        font=_font(14),
    )
    trip = f"{float(run.variable('source/psnr')):.1f} dB"
    pictures: list[Cell] = [
        (picture, "the picture", ""),
        (Image.fromarray(run.images.values[0]), "after the VAE", trip),
    ]
    if "mask" in run.tree["source"].dataset:
        masks = run.variable("source/mask")
        pictures += [
            (Image.fromarray(one.values * 255), f"mask: {one['masked'].item()}", "")
            for one in masks[: across - 2]
        ]
        if left := [str(word) for word in masks["masked"].values[across - 2 :]]:
            said = (
                f"{len(left)} more mask{'s' if len(left) > 1 else ''}, without room here: "
                f"{', '.join(left)}"
            )
            draw.text((MARGIN, top + tall + 20), _shorten(said, wide // 7), FAINT, font=_font(12))
    _line(sheet, top, tall, pictures)
    top += tall + 40
    labels = [
        (
            f"t = {run.variable('timestep').values[i]:.0f}",
            f"sigma {run.variable('sigma').values[i]:.2g}",
        )
        for i in steps
    ]
    for title, cells in rows:
        draw.text((MARGIN, top), title, INK, font=_font(14))
        _line(sheet, top + 22, tall, [(cell, *labels[i]) for i, cell in enumerate(cells)])
        top += tall + 46
    _curve(draw, run, (MARGIN + 46, top + 30, MARGIN + wide, top + 30 + CURVE - 40), top)
    return sheet


def _rows(run: Run, steps: np.ndarray) -> list[tuple[str, list[Image.Image | None]]]:
    """Each row's title and pictures, one a step, for the first draw of noise; None where a number
    that it shows is not finite.
    """
    one = {"step": steps, "draw": 0}
    slope, bias = run.variable("preview/latent_to_rgb").load(), run.variable("preview/bias").load()

    def defined(pictures: Iterable[np.ndarray], shown: xr.DataArray) -> list[Image.Image | None]:
        finite = (
            np.isfinite(shown.transpose("step", ...).values).reshape(len(steps), -1).all(axis=1)
        )
        return [
            Image.fromarray(one) if good else None
            for one, good in zip(pictures, finite, strict=True)
        ]

    def colours(
        latents: xr.DataArray, around: xr.DataArray | float, scale: float = 1.0
    ) -> list[Image.Image | None]:
        colour: xr.DataArray = (
            xr.dot(latents.astype("float32") * scale, slope, dim="channel") + around
        )
        shown: xr.DataArray = colour.fillna(0).clip(0, 1) * 255
        return defined(
            shown.round().astype("uint8").transpose("step", "y", "x", "rgb").values, latents
        )

    spread = float(
        np.sqrt((slope**2).sum("channel")).max()
    )  # of the colour of noise with standard deviation one
    noise = run.eps().sel(step=steps).isel(draw=0)
    difference = run.variable("forward/difference").isel(one)
    wrong = (difference**2).mean("channel") ** 0.5
    wrong = wrong.where(np.isfinite(wrong), 0)
    greatest = max(float(wrong.max()), 1e-12)
    denoised = run.variable("forward/denoised").isel(one).load()
    if "decoded" in run.tree.children:
        index = [
            int(np.flatnonzero(run.variable("decoded/decoded_step").values == step)[0])
            for step in steps
        ]
        clean = defined(
            run.variable("decoded/picture").isel(decoded_step=index, draw=0).values, denoised
        )
    else:
        clean = colours(denoised, bias)
    return [
        (
            "What the model was given: the picture's latents with noise in them (x_t)",
            colours(run.latents.sel(step=steps).isel(draw=0), bias),
        ),
        ("The noise it predicts", colours(noise, 0.5, 0.25 / max(spread, 1e-12))),
        (
            f"What it got wrong: predicted less true noise, black 0, yellow {greatest:.2g}",
            defined(heat(wrong.values / greatest), difference),
        ),
        ("What it takes for the clean picture", clean),
    ]


def _line(sheet: Image.Image, top: int, tall: int, cells: list[Cell]) -> None:
    draw = ImageDraw.Draw(sheet)
    for index, (picture, label, note) in enumerate(cells):
        x = MARGIN + index * (CELL + GAP)
        draw.rectangle(
            (x - 1, top - 1, x + CELL, top + tall), outline=FAINT
        )  # where a mask is white, so is the sheet
        if picture is None:
            draw.text(
                (x + CELL // 2, top + tall // 2), "not defined", FAINT, font=_font(12), anchor="mm"
            )
        else:
            resample = (
                Image.Resampling.NEAREST if picture.width < CELL / 2 else Image.Resampling.LANCZOS
            )
            sheet.paste(picture.convert("RGB").resize((CELL, tall), resample), (x, top))
        draw.text((x, top + tall + 3), _shorten(label, 18), INK, font=_font(12))
        draw.text((x + CELL, top + tall + 3), note, FAINT, font=_font(11), anchor="ra")


def _curve(draw: ImageDraw.ImageDraw, run: Run, box: tuple[int, int, int, int], top: int) -> None:
    """Mean loss over the timesteps, a dot each, with the spread over the draws of noise, if there
    are several, as a band.
    """
    left, upper, right, lower = box
    steps = run.steps[::-1]  # the least noise first, as time runs in the forward process
    t = run.variable("timestep").values[steps]
    mean, spread = (
        run.variable(f"forward/loss_{name}").values[steps] for name in ("mean", "spread")
    )
    good = np.isfinite(mean) & (mean > 0)
    t, mean, spread = t[good], mean[good], np.nan_to_num(spread[good])
    kind = "noise" if run.attributes["prediction_type"] == "epsilon" else "velocity"
    several = run.attributes.recipe["noises"] > 1
    over = ", over the draws of noise; the band is its spread" if several else ""
    draw.text(
        (MARGIN, top), f"Loss: mean square of predicted less true {kind}{over}", INK, font=_font(14)
    )
    if not len(t):
        return
    low = np.maximum(mean - spread, mean / 10)
    least, most, last = (
        np.log10(low.min()) - 0.05,
        np.log10((mean + spread).max()) + 0.05,
        max(float(t.max()), 1.0),
    )

    def at(when: float, value: float) -> tuple[float, float]:
        return left + (right - left) * when / last, lower - (lower - upper) * float(
            np.log10(value) - least
        ) / (most - least)

    ticks = [digit * 10.0**power for power in range(-12, 7) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if least <= np.log10(tick) <= most]
    if len(shown) > 7:
        shown = [tick for tick in shown if f"{tick:e}".startswith("1")]
    if len(shown) < 2:  # the losses lie too close together for round numbers
        shown = [float(f"{10**power:.3g}") for power in np.linspace(least, most, 5)[1:-1]]
    for tick in shown:
        y = at(0, tick)[1]
        draw.line((left, y, right, y), fill=(228, 230, 234))
        draw.text((left - 8, y), f"{tick:g}", FAINT, font=_font(11), anchor="rm")
    upper_edge = [at(*point) for point in zip(t, mean + spread, strict=True)]
    lower_edge = [at(*point) for point in zip(t, low, strict=True)]
    if len(t) > 1:
        draw.polygon([*upper_edge, *reversed(lower_edge)], fill=PALE)
        draw.line([at(*point) for point in zip(t, mean, strict=True)], fill=BLUE, width=2)
    else:
        (x, y), beside = at(t[0], mean[0]), -1 if t[0] > last / 2 else 1
        draw.rectangle((x - 5, upper_edge[0][1], x + 5, lower_edge[0][1]), fill=PALE)
        told = f"{mean[0]:.3g}" + (f" \u00b1 {spread[0]:.2g}" if several else "")
        draw.text(
            (x + 12 * beside, y), told, INK, font=_font(12), anchor="lm" if beside > 0 else "rm"
        )
    for when, value in zip(t, mean, strict=True):
        x, y = at(when, value)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=BLUE)
    for when in t if len(t) <= 12 else np.linspace(0, last, 6):
        draw.text(
            (at(when, mean[0])[0], lower + 5), f"{when:.0f}", FAINT, font=_font(11), anchor="ma"
        )
    draw.text((right, lower + 20), "timestep t", FAINT, font=_font(11), anchor="ra")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "\u2026"
