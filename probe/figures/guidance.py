"""Guidance for people: what each step alone would say at other scales, as pictures and as HTML.

No model is asked: both branches were recorded. Words are ours and numbers are the run's; of the
run's own text only the name is used, in a snippet.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr
from PIL import Image

from probe import analysis
from probe.reading.recording import Run
from probe.reading.sample import called

SCALES = (0.0, 1.0, 3.0, 5.0, 8.0, 12.0)
MOST = 20.0
LARGE, SMALL = 256, 128  # pixels a side of the pictures, at most
COLOURS = " Colours are those of the preview, cut off at black and white."
NOTE = "What this step alone would say, not the picture at that scale."


class Missing(NamedTuple):
    """Why something is not shown, and the setting that records it."""

    cause: str
    remedy: str


def missing(run: Run) -> Missing | None:
    """Return why guidance cannot be shown, or None."""
    latents = run.tree["latents"].data_vars if "latents" in run.tree.children else {}
    if not len(run.steps):
        return Missing(
            "No step of this run is written yet.", "Wait for its first step, then reload."
        )
    names = ("prediction_uncond", "prediction_cond", "prediction")
    absent = [f"latents/{name}" for name in names if name not in latents]
    if not absent:
        return None
    if run.attributes.is_guided:
        return Missing(
            f"Not recorded: {', '.join(absent)}.",
            "Both branches of a run are recorded where its guidance_scale is above 1.",
        )
    return Missing(
        "This run was made without guidance: the model was asked once a step, with the prompt, "
        "so nothing says what it would have predicted without. The setting is guidance_scale; "
        "above 1, both are recorded:",
        "python -m probe.run experiments/astronaut.yaml --guidance-scale 3",
    )


def curves_of(run: Run, image: int = 0) -> xr.Dataset:
    """Return the curves of `analysis.guidance_curves` for one image. *Shape:* (step)."""
    branches = [run.prediction(name).isel(image=image) for name in ("uncond", "cond", None)]
    curves = analysis.guidance_curves(*branches).load()
    sigma = run.variable("sigma").isel(step=run.steps)
    return curves.assign_coords(step=run.steps, sigma=("step", sigma.values))


def table(curves: xr.Dataset) -> list[dict[str, float]]:
    """Return curves as rows, one a step."""
    names = ["sigma", *map(str, curves.data_vars)]
    return [
        {"step": int(step), **{name: float(curves[name][row]) for name in names}}
        for row, step in enumerate(curves["step"].values)
    ]


def csv_of(curves: xr.Dataset) -> str:
    """Return curves as comma-separated values, one line a step."""
    rows = table(curves)
    lines = [",".join(rows[0])] if rows else []
    lines += [",".join(f"{value:.9g}" for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def has_preview(run: Run) -> bool:
    """Return whether latents of this run can be shown as colour."""
    if "preview" not in run.tree.children:
        return False
    return bool(np.isfinite(run.variable("preview/latent_to_rgb").values).all())


def scales_of(run: Run) -> list[float]:
    """Return the scales of the strip, the recorded one among them."""
    return sorted({*SCALES, float(run.recipe.guidance[0])})


def estimates(run: Run, step: int, scales: Sequence[float], image: int = 0) -> np.ndarray:
    """Return what a step alone would say at some scales, as small pictures.

    *Shape:* (scale, y, x, rgb) uint8, one pixel a latent.
    """
    denoised = run.denoised(guidance_scale=list(scales), steps=int(step))
    return run.preview(denoised.isel(step=0, image=image)).values


def snippets(run: Run, step: int, scale: float, image: int = 0) -> dict[str, str]:
    """Return Python that yields the arrays shown: `curves` and `picture`."""
    opened = f"import probe\n\nrun = probe.open_run({called(run.path)!r})\n"
    return {
        "curves": f"{opened}uncond, cond = run.prediction('uncond'), run.prediction('cond')\n"
        "curves = probe.analysis.guidance_curves(uncond, cond, run.prediction())"
        f".isel(image={image})\n",
        "picture": f"{opened}denoised = run.denoised(guidance_scale={scale:g}, steps={step})"
        f".isel(step=0, image={image})\npicture = run.preview(denoised)\n",
    }


# --- pictures, as HTML ---------------------------------------------------------------------------


def magnification(picture: np.ndarray, side: int) -> int:
    """Return how many pixels a side each latent gets, so that a picture (y, x, rgb) fits."""
    return max(1, side // int(max(picture.shape[:2])))


def png(picture: np.ndarray) -> bytes:
    """Return a picture (y, x, rgb) uint8 as PNG, one pixel a latent."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def strip(
    pictures: np.ndarray,
    scales: Sequence[float],
    recorded: float,
    side: int = SMALL,
    of: str = "latent",
) -> str:
    """Return pictures with their scales as HTML, the recorded scale framed.

    Each latent is a square of whole pixels, and the magnification is said; `of` is "pixel" for a
    model of pixels. Shape of `pictures`: (scale, y, x, rgb) uint8.
    """
    times = magnification(pictures[0], side)
    height, width = pictures.shape[1:3]
    cells = []
    for picture, scale in zip(pictures, scales, strict=True):
        own = scale == recorded
        label = f"scale {scale:g}" + (", as recorded" if own else "")
        label += {0.0: ", without the prompt", 1.0: ", with the prompt alone"}.get(scale, "")
        frame = "3px solid #D55E00" if own else "3px solid transparent"
        code = base64.b64encode(png(picture)).decode()
        cells.append(
            f"<figure style='margin:0;width:{width * times + 6}px'>"
            f"<img alt='{html.escape(label)}: estimate of the clean picture' "
            f"src='data:image/png;base64,{code}' style='display:block;border:{frame};"
            f"width:{width * times}px;height:{height * times}px;image-rendering:pixelated;"
            "box-sizing:content-box'>"
            f"<figcaption style='font-size:.85rem;line-height:1.3'>{html.escape(label)}"
            "</figcaption></figure>"
        )
    return (
        "<div style='display:flex;flex-wrap:wrap;gap:.4rem'>" + "".join(cells) + "</div>"
        f"<p style='font-size:.8rem;opacity:.8;margin:.4rem 0 0'>Each {of} is a square of "
        f"{times} x {times} pixels.{COLOURS if len(scales) > 1 else ''}</p>"
    )
