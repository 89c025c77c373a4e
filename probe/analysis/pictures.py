"""How much two pictures are alike: PSNR and SSIM.

    psnr(one.images, two.images)     # (image), in dB: inf where two are the same
    ssim(one.images, two.images)     # (image), 1 where two are the same

Both say how far values are apart, not what a person sees: a picture moved by one pixel scores low.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe.arguments import labelled
from probe.errors import ExperimentError

WIDEST = 255.0  # the greatest difference of two values of a picture
WINDOW, SIGMA = 11, 1.5  # of the Gaussian: Wang et al. 2004, section III-C
K1, K2 = 0.01, 0.03


def psnr(one: xr.DataArray, two: xr.DataArray) -> xr.DataArray:
    """Return the peak signal-to-noise ratio of pictures: 10 log10(255² / mean square difference).

    *Shape:* two of (..., y, x, rgb) uint8 -> (...) float64, in dB. It is inf where two are the
    same. Raises ExperimentError for pictures of two sizes.
    """
    first, second = _pair(one, two)
    with np.errstate(divide="ignore"):
        square = np.mean(np.square(first - second), axis=(-3, -2, -1))
        return _named("psnr", one, 10 * np.log10(WIDEST**2 / square))


def ssim(one: xr.DataArray, two: xr.DataArray) -> xr.DataArray:
    """Return the structural similarity of pictures, the mean over places and colours.

    *Shape:* two of (..., y, x, rgb) uint8 -> (...) float64, 1 where two are the same.

    The windows are the Gaussian ones of Wang et al. 2004, doi:10.1109/TIP.2003.819861, wherever
    they lie inside the picture. It is `structural_similarity` of scikit-image with
    `gaussian_weights=True, use_sample_covariance=False`. Raises ExperimentError for pictures of two
    sizes, and for those smaller than a window.
    """
    first, second = _pair(one, two)
    if min(first.shape[-3:-1]) < WINDOW:
        raise ExperimentError(
            f"SSIM looks at windows of {WINDOW} x {WINDOW} pixels, and the pictures are smaller.",
            "Use psnr.",
        )
    mean_first, mean_second = _blurred(first), _blurred(second)
    across = mean_first * mean_second
    squares = mean_first**2 + mean_second**2
    covariance = _blurred(first * second) - across
    variances = _blurred(first**2) + _blurred(second**2) - squares
    c1, c2 = (K1 * WIDEST) ** 2, (K2 * WIDEST) ** 2
    similar = (2 * across + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return _named("ssim", one, similar.mean(axis=(-3, -2, -1)))


def _pair(one: xr.DataArray, two: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    first, second = (labelled("pictures", array, "y", "x", "rgb") for array in (one, two))
    if dict(first.sizes) != dict(second.sizes):
        sizes = [f"{array.sizes['x']} x {array.sizes['y']}" for array in (first, second)]
        raise ExperimentError(
            f"The pictures are {sizes[0]} and {sizes[1]}, or not equally many.",
            "Compare pictures of one size, and as many of one as of the other.",
        )
    values = (array.transpose(..., "y", "x", "rgb").values for array in (first, second))
    left, right = (np.asarray(value, np.float64) for value in values)
    return left, right


def _named(name: str, like: xr.DataArray, values: np.ndarray) -> xr.DataArray:
    dims = [dim for dim in like.dims if dim not in ("y", "x", "rgb")]
    return xr.DataArray(values, dims=dims, name=name)


def _blurred(values: np.ndarray) -> np.ndarray:
    """Return the weighted mean of each window that lies inside. *Shape:* (..., y, x, rgb)."""
    at = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (at / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (-3, -2):
        inside = values.shape[axis] - WINDOW + 1
        part = np.moveaxis(values, axis, -1)
        blurred = sum(w * part[..., k : k + inside] for k, w in enumerate(weights))
        values = np.moveaxis(np.asarray(blurred), -1, axis)
    return values
