"""Noise levels and the three things a model may predict, each conversion written once.

With x the model's variance-preserving input, x0 the clean latent and eps the noise (Ho et al. 2020;
Salimans & Ho 2022):

    x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    sigma = sqrt((1 - alpha_bar) / alpha_bar)
    SNR = alpha_bar / (1 - alpha_bar) = 1 / sigma^2

The functions take floats, numpy arrays, torch tensors or labelled xarray arrays alike; `alpha_bar`
broadcasts. The ends are numbers too: alpha_bar 0 (a schedule of zero terminal SNR) is sigma inf,
SNR 0, log-SNR -inf; alpha_bar 1 is the other way round. Where both ends matter, go through the
log-SNR (Kingma et al. 2021), which keeps its digits at either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction")

# --- noise levels ---------------------------------------------------------------------------------


def sigma_from_alpha_bar(alpha_bar: Any) -> Any:
    """The noise level sigma of Karras et al. 2022: noise's standard deviation beside a clean signal
    of scale one.
    """
    return _over(1 - alpha_bar, alpha_bar) ** 0.5


def alpha_bar_from_sigma(sigma: Any) -> Any:
    """The cumulative signal fraction alpha_bar of Ho et al. 2020, between 0 (all noise) and 1 (no
    noise).
    """
    return 1 / (sigma**2 + 1)


def snr_from_alpha_bar(alpha_bar: Any) -> Any:
    """The signal-to-noise ratio, of variances: what min-SNR weighting (Hang et al. 2023) weighs
    with.
    """
    return _over(alpha_bar, 1 - alpha_bar)


def alpha_bar_from_snr(snr: Any) -> Any:
    """alpha_bar of a signal-to-noise ratio."""
    return 1 / (1 + _over(1, snr))


def log_snr_from_alpha_bar(alpha_bar: Any) -> Any:
    """The natural logarithm of the signal-to-noise ratio."""
    return _log(_over(alpha_bar, 1 - alpha_bar))


def alpha_bar_from_log_snr(log_snr: Any) -> Any:
    """alpha_bar of a log-SNR: its logistic function."""
    return 1 / (1 + _exp(-log_snr))


def log_snr_from_sigma(sigma: Any) -> Any:
    """The log-SNR of a noise level: -2 log sigma."""
    return -2 * _log(sigma)


def sigma_from_log_snr(log_snr: Any) -> Any:
    """The noise level sigma of a log-SNR."""
    return _exp(-log_snr / 2)


def log_snr_from_snr(snr: Any) -> Any:
    """The log-SNR of a signal-to-noise ratio."""
    return _log(snr)


def snr_from_log_snr(log_snr: Any) -> Any:
    """The signal-to-noise ratio of a log-SNR."""
    return _exp(log_snr)


def variance_preserving(latents: Any, sigma: Any) -> Any:
    """The model's input for variance-exploding latents (those of Euler, LMS, Heun and KDPM2
    schedulers).
    """
    return latents / (sigma**2 + 1) ** 0.5


# --- noise, clean latents, velocity ---------------------------------------------------------------


def noised(clean: Any, eps: Any, alpha_bar: Any) -> Any:
    """The forward process: clean latents with noise mixed in, variance-preserving (diffusers'
    `add_noise`).
    """
    return alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * eps


def target(clean: Any, eps: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """What a model that knew everything would predict: the noise, or the velocity (diffusers'
    `get_velocity`).
    """
    _check(prediction_type)
    return (
        eps
        if prediction_type == "epsilon"
        else alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * clean
    )


def eps_from_denoised(denoised: Any, x: Any, alpha_bar: Any) -> Any:
    """The noise in `x`, if what is clean in it is `denoised`.

    Not defined at alpha_bar 1, where there is none.
    """
    return (x - alpha_bar**0.5 * denoised) / (1 - alpha_bar) ** 0.5


def eps_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted noise.

    `x` is variance-preserving; `prediction_type` is "epsilon" or "v_prediction".
    """
    _check(prediction_type)
    return (
        prediction
        if prediction_type == "epsilon"
        else alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x
    )


def denoised_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted clean latent x0. `x` is variance-preserving.

    Of predicted noise it is not defined at alpha_bar 0.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * prediction


def v_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted velocity. `x` is variance-preserving."""
    _check(prediction_type)
    if prediction_type == "v_prediction":
        return prediction
    return target(
        denoised_from(prediction, x, alpha_bar, prediction_type),
        prediction,
        alpha_bar,
        "v_prediction",
    )


# --- what a scheduler does to x0 ------------------------------------------------------------------

CLIPS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "LCMScheduler",
)  # both ways
THRESHOLDS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)

UNCLIPPED = "x0 as the model says it, without the scheduler's {}"


def clipping(kind: str, config: Mapping[str, Any]) -> dict[str, float] | None:
    """How a scheduler of diffusers' class `kind` limits x0 before it goes on with it, as `clipped`
    takes it; None where it does not.

    Raises ValueError where the limits are no numbers, or none that limit.
    """
    if (
        config.get("thresholding")
        and kind in (*CLIPS, *THRESHOLDS)
        and config.get("predict_x0", True)
    ):
        how = {
            "quantile": config.get("dynamic_thresholding_ratio", 0.995),
            "most": config.get("sample_max_value", 1.0),
        }
    elif config.get("clip_sample") and kind in (*CLIPS, "HeunDiscreteScheduler"):
        how = {"range": config.get("clip_sample_range", 1.0)}
    else:
        return None
    if (
        not all(type(value) in (int, float) and math.isfinite(value) for value in how.values())
        or not 0 <= how.get("quantile", 0) <= 1
    ):
        raise ValueError(f"{how} are no limits of x0")
    return {name: float(value) for name, value in how.items()}


def clipping_text(how: Mapping[str, float]) -> str:
    """What `clipping` found, for people."""
    if "range" in how:
        return f"clip_sample, to {-how['range']:g} to {how['range']:g}"
    return f"dynamic thresholding, at quantile {how['quantile']:g} and at most {how['most']:g}"


def clipped(denoised: np.ndarray, how: Mapping[str, float] | None) -> np.ndarray:
    """x0 as a scheduler goes on with it. *Shape:* (..., channel, y, x), each image by itself.

    Clipped to `range`, or by dynamic thresholding (Imagen, Saharia et al. 2022, arXiv:2205.11487,
    section 2.3; diffusers' `_threshold_sample`): clipped to the `quantile` of its absolute values,
    no less than 1 and no more than `most`, and divided by that.
    """
    if how is None:
        return denoised
    if "range" in how:
        return denoised.clip(-how["range"], how["range"])
    sizes = np.abs(denoised).reshape(*denoised.shape[:-3], -1)
    # As torch's clamp, whose upper limit wins.
    limit = np.minimum(np.maximum(np.quantile(sizes, how["quantile"], axis=-1), 1), how["most"])[
        ..., None, None, None
    ].astype(denoised.dtype)
    return np.asarray(denoised.clip(-limit, limit) / limit)


def _check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is not one of {PREDICTION_TYPES}")


# --- the same for numbers and arrays, with their ends ---------------------------------------------


def _over(top: Any, bottom: Any) -> Any:
    if isinstance(bottom, int | float) and bottom == 0:
        return math.inf
    with np.errstate(divide="ignore"):
        return top / bottom


def _log(value: Any) -> Any:
    if hasattr(value, "log"):  # a torch tensor
        return value.log()
    with np.errstate(divide="ignore"):
        found = np.log(value)
    return float(found) if isinstance(value, int | float) else found


def _exp(value: Any) -> Any:
    if hasattr(value, "exp"):
        return value.exp()
    with np.errstate(over="ignore"):
        found = np.exp(value)
    return float(found) if isinstance(value, int | float) else found
