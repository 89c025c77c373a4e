"""How far apart two runs are at each noise level, and where they part.

    distance(one, two)                # of latents, at the noise levels of `one`
    parting(far, threshold)           # the first step at which it is more than a threshold

Schedulers keep latents by two conventions: they are rescaled to variance-preserving ones first.
Predicted clean latents need no scale, but at much noise they magnify every difference.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import xarray as xr

from probe.arguments import one_of
from probe.conversions import variance_preserving
from probe.errors import ExperimentError
from probe.reading.recording import Run

Latents = Literal["latents", "denoised"]


def matched(sigmas: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each noise level the index of the nearest of `others`, by its logarithm.

    It is -1 where the nearest is farther than half of the way to the next of `sigmas`: the other
    run has no such level. A level of 0, or one that is not finite, is matched by itself alone. A
    scheduler may call the model twice at a level (Heun, PNDM): the second is that of the second.
    """
    found = np.full(len(sigmas), -1)
    for index, sigma in enumerate(sigmas):
        before = int(np.count_nonzero(sigmas[:index] == sigma))
        if not (np.isfinite(sigma) and sigma > 0):
            same = np.flatnonzero(others == sigma)
            found[index] = same[min(before, len(same) - 1)] if len(same) else -1
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            gaps = np.abs(np.log(others) - np.log(sigma))
            own = np.abs(np.log(np.delete(sigmas, index)) - np.log(sigma))
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        reach = max(np.min(own[np.isfinite(own)], initial=np.inf) / 2, 1e-6)
        nearest = int(np.argmin(gaps)) if len(gaps) else 0
        if len(gaps) and gaps[nearest] <= reach:
            same = np.flatnonzero(others == others[nearest])
            found[index] = same[min(before, len(same) - 1)]
    return found


def distance(one: Run, two: Run, of: Latents = "latents", image: int = 0) -> xr.DataArray:
    """Return the root mean square difference of two runs at each noise level of the first.

    *Shape:* (step) float32, in units of latents, with the label `sigma`. NaN where the second run
    has no such noise level, or a value is not defined.

    `of` is latents (rescaled to variance-preserving ones) or denoised (the predicted clean ones).
    Raises ExperimentError for latents of two sizes.
    """
    one_of("of", of, get_args(Latents))
    first, second = (latents_of(run, of, image) for run in (one, two))
    if first.shape[1:] != second.shape[1:]:
        sizes = [" x ".join(map(str, values.shape[1:])) for values in (first, second)]
        raise ExperimentError(
            f"The latents of {one.name} are {sizes[0]}, those of {two.name} {sizes[1]}.",
            "Compare runs of one size and one family of models.",
        )
    sigma, other = (run.variable("sigma").values[run.steps] for run in (one, two))
    at = matched(sigma, other)
    gap = np.full(len(at), np.nan, np.float32)
    there = at >= 0
    difference = first[there] - second[at[there]]
    gap[there] = np.sqrt(np.mean(np.square(difference), axis=(1, 2, 3)))
    coords = {"step": one.steps, "sigma": ("step", sigma)}
    return xr.DataArray(gap, dims="step", coords=coords, name="distance")


def latents_of(run: Run, of: Latents = "latents", image: int | None = None) -> np.ndarray:
    """Return latents on the variance-preserving scale, of one image or (None) of all.

    *Shape:* (step, channel, y, x) float32, or (step, image, channel, y, x).
    """
    values = run.denoised() if of == "denoised" else run.latents
    across = run.attributes.across
    values = values if image is None else values.isel({across: image})
    values = values.astype("float32").load()
    if of == "latents" and run.attributes.latent_convention == "variance_exploding":
        values = variance_preserving(values, run.variable("sigma").sel(step=run.steps))
    dims = [dim for dim in ("step", across, "channel", "y", "x") if dim in values.dims]
    return values.transpose(*dims).values.astype(np.float32)


def parting(far: xr.DataArray, threshold: float | xr.DataArray) -> int | None:
    """Return the first step at which a distance is more than a threshold; None if it never is.

    *Shape:* (step) and a number, or one for each step.
    """
    more = np.asarray(far.values > np.asarray(threshold))
    return int(far["step"].values[np.argmax(more)]) if more.any() else None
