"""Guidance as numbers: the prediction at any scale, and what the prompt changes in it.

    uncond, cond = run.prediction("uncond"), run.prediction("cond")
    guided(uncond, cond, 8)                           # what a scale of 8 would have predicted
    guidance_curves(uncond, cond, run.prediction())   # how far apart, which way, how large

Both branches were recorded at every step. So the prediction at another scale needs no model. It
holds for that step alone: at another scale the steps before would have gone elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe.arguments import labelled, number

_PICTURE = ("channel", "y", "x")


def guided(
    uncond: xr.DataArray,
    cond: xr.DataArray,
    guidance_scale: float | Sequence[float],
    guidance_rescale: float = 0.0,
) -> xr.DataArray:
    """Return uncond + guidance_scale * (cond - uncond), rescaled: classifier-free guidance.

    Ho & Salimans 2022 (w = guidance_scale - 1); the rescale is that of Lin et al. 2023, section
    3.4. At scale 1 it is `cond`, at 0 `uncond`. The order of operations is diffusers', in float32.
    *Shape:* all (..., channel, y, x); several scales are a dimension `guidance_scale` in front.
    Raises ExperimentError.
    """
    uncond = labelled("uncond", uncond, *_PICTURE).astype("float32")
    cond = labelled("cond", cond, *_PICTURE).astype("float32")
    scale, rescale = _scale(guidance_scale), number("guidance_rescale", guidance_rescale)
    prediction: xr.DataArray = uncond + scale * (cond - uncond)
    if rescale > 0:
        # The unbiased standard deviation of each image, as torch computes it.
        ratio = cond.std(_PICTURE, ddof=1) / prediction.std(_PICTURE, ddof=1)
        prediction = rescale * (prediction * ratio) + (1 - rescale) * prediction
    return prediction.transpose(*scale.dims, *uncond.dims).rename("prediction")


def _scale(given: object) -> xr.DataArray:
    """Return one scale, or several along a dimension. Raises ExperimentError."""
    if not isinstance(given, list | tuple | np.ndarray) or np.ndim(given) != 1:
        return xr.DataArray(np.float32(number("guidance_scale", given)))
    values = [number("guidance_scale", value) for value in given]
    return xr.DataArray(
        np.array(values, np.float32), dims="guidance_scale", coords={"guidance_scale": values}
    )


def guidance_curves(
    uncond: xr.DataArray, cond: xr.DataArray, prediction: xr.DataArray
) -> xr.Dataset:
    """Return how far apart two branches are, whether they point the same way, and their sizes.

    `difference` is the root mean square of cond - uncond. `cosine` is that of the angle between the
    two, NaN if one is all zeros. `uncond`, `cond` and `guided` are root mean squares; for predicted
    noise 1 is the size of true noise. *Shape:* (..., channel, y, x) -> (...). Raises
    ExperimentError.
    """
    branches = {"uncond": uncond, "cond": cond, "guided": prediction}
    values = {
        name: labelled(name, branch, *_PICTURE).astype("float64")
        for name, branch in branches.items()
    }
    apart = values["cond"] - values["uncond"]
    product = (values["cond"] * values["uncond"]).mean(_PICTURE)
    sizes = {name: _size(branch) for name, branch in values.items()}
    both = sizes["cond"] * sizes["uncond"]
    curves = {"difference": _size(apart), "cosine": product / both.where(both > 0), **sizes}
    names = {
        "difference": "root mean square of cond - uncond",
        "cosine": "cosine of the angle between cond and uncond",
        "uncond": "root mean square of the prediction without the prompt",
        "cond": "root mean square of the prediction with the prompt",
        "guided": "root mean square of what the scheduler got",
    }
    return xr.Dataset(
        {
            name: curve.assign_attrs(long_name=names[name], units="1")
            for name, curve in curves.items()
        }
    )


def _size(values: xr.DataArray) -> xr.DataArray:
    """Return the root mean square over channels and places. NaN stays NaN."""
    root: xr.DataArray = (values**2).mean(_PICTURE, skipna=False) ** 0.5
    return root
