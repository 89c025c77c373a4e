"""Convert noise levels, and the three things that a model may predict: each formula once.

With x the model's variance-preserving input, x0 the clean latent and eps the noise (Ho et al. 2020;
Salimans & Ho 2022):

    x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    sigma = sqrt((1 - alpha_bar) / alpha_bar)
    SNR = alpha_bar / (1 - alpha_bar) = 1 / sigma^2

The functions take floats, numpy arrays, torch tensors or labelled xarray arrays alike; `alpha_bar`
broadcasts. The ends are numbers too. alpha_bar 0 (a schedule of zero terminal SNR) is sigma inf,
SNR 0 and log-SNR -inf; alpha_bar 1 is sigma 0, SNR inf and log-SNR inf. Where both ends matter, go
through the log-SNR (Kingma et al. 2021), which keeps its digits at either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction")

# --- noise levels ---------------------------------------------------------------------------------


def sigma_from_alpha_bar(alpha_bar: Any) -> Any:
    """Return the noise level sigma of Karras et al. 2022.

    It is the noise's standard deviation beside a clean signal of scale one.
    """
    return _over(1 - alpha_bar, alpha_bar) ** 0.5


def alpha_bar_from_sigma(sigma: Any) -> Any:
    """Return the cumulative signal fraction alpha_bar of Ho et al. 2020.

    It is 0 for pure noise and 1 without noise.
    """
    return 1 / (sigma**2 + 1)


def snr_from_alpha_bar(alpha_bar: Any) -> Any:
    """Return the signal-to-noise ratio: a ratio of variances.

    Min-SNR weighting (Hang et al. 2023) is a function of it.
    """
    return _over(alpha_bar, 1 - alpha_bar)


def alpha_bar_from_snr(snr: Any) -> Any:
    """Return alpha_bar of a signal-to-noise ratio."""
    return 1 / (1 + _over(1, snr))


def log_snr_from_alpha_bar(alpha_bar: Any) -> Any:
    """Return the natural logarithm of the signal-to-noise ratio."""
    return _log(_over(alpha_bar, 1 - alpha_bar))


def alpha_bar_from_log_snr(log_snr: Any) -> Any:
    """Return alpha_bar of a log-SNR: its logistic function."""
    return 1 / (1 + _exp(-log_snr))


def log_snr_from_sigma(sigma: Any) -> Any:
    """Return the log-SNR of a noise level: -2 log sigma."""
    return -2 * _log(sigma)


def sigma_from_log_snr(log_snr: Any) -> Any:
    """Return the noise level sigma of a log-SNR."""
    return _exp(-log_snr / 2)


def log_snr_from_snr(snr: Any) -> Any:
    """Return the log-SNR of a signal-to-noise ratio."""
    return _log(snr)


def snr_from_log_snr(log_snr: Any) -> Any:
    """Return the signal-to-noise ratio of a log-SNR."""
    return _exp(log_snr)


def variance_preserving(latents: Any, sigma: Any) -> Any:
    """Return the model's input for variance-exploding latents.

    The schedulers Euler, LMS, Heun and KDPM2 keep their latents so.
    """
    return latents / (sigma**2 + 1) ** 0.5


# --- noise, clean latents, velocity ---------------------------------------------------------------


def noised(clean: Any, eps: Any, alpha_bar: Any) -> Any:
    """Return clean latents with noise mixed in, variance-preserving: the forward process.

    Diffusers calls it `add_noise`.
    """
    return alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * eps


def target(clean: Any, eps: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """Return what a perfect model would predict: the noise, or the velocity.

    Diffusers calls the latter `get_velocity`.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return eps
    return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * clean


def eps_from_denoised(denoised: Any, x: Any, alpha_bar: Any) -> Any:
    """Return the noise in `x`, if `denoised` is what is clean in it.

    It is not defined at alpha_bar 1, where there is no noise.
    """
    return (x - alpha_bar**0.5 * denoised) / (1 - alpha_bar) ** 0.5


def eps_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """Return the predicted noise.

    `x` is variance-preserving; `prediction_type` is "epsilon" or "v_prediction".
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x


def denoised_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """Return the predicted clean latent x0. `x` is variance-preserving.

    For a model that predicts noise it is not defined at alpha_bar 0.
    """
    _check(prediction_type)
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * prediction


def v_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """Return the predicted velocity. `x` is variance-preserving."""
    _check(prediction_type)
    if prediction_type == "v_prediction":
        return prediction
    denoised = denoised_from(prediction, x, alpha_bar, prediction_type)
    return target(denoised, prediction, alpha_bar, "v_prediction")


# --- what a scheduler does to x0 ------------------------------------------------------------------

CLIPS = (  # by range or by threshold
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    "LCMScheduler",
)
THRESHOLDS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)

UNCLIPPED = "x0 as the model says it, without the scheduler's {}"


def clipping(kind: str, config: Mapping[str, Any]) -> dict[str, float] | None:
    """Return how a scheduler of diffusers' class `kind` limits x0, as `clipped` takes it, or None.

    Raise ValueError if the limits are no numbers, or a quantile outside of 0 to 1.
    """
    thresholds = config.get("thresholding") and config.get("predict_x0", True)
    if thresholds and kind in (*CLIPS, *THRESHOLDS):
        limits = {
            "quantile": config.get("dynamic_thresholding_ratio", 0.995),
            "most": config.get("sample_max_value", 1.0),
        }
    elif config.get("clip_sample") and kind in (*CLIPS, "HeunDiscreteScheduler"):
        limits = {"range": config.get("clip_sample_range", 1.0)}
    else:
        return None
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in limits.values())
    if not finite or not 0 <= limits.get("quantile", 0) <= 1:
        raise ValueError(f"{limits} are no limits of x0")
    return {name: float(value) for name, value in limits.items()}


def clipping_text(how: Mapping[str, float]) -> str:
    """Return the limits that `clipping` returns, in words."""
    if "range" in how:
        return f"clip_sample, to {-how['range']:g} to {how['range']:g}"
    return f"dynamic thresholding, at quantile {how['quantile']:g} and at most {how['most']:g}"


def clipped(denoised: np.ndarray, how: Mapping[str, float] | None) -> np.ndarray:
    """Return x0 as a scheduler goes on with it, each image by itself.

    It is clipped to `range`, or by dynamic thresholding (Imagen, Saharia et al. 2022,
    arXiv:2205.11487, section 2.3; diffusers' `_threshold_sample`). The latter clips at the
    `quantile` of the absolute values, no less than 1 and no more than `most`, and divides by that
    limit. *Shape:* (..., channel, y, x).
    """
    if how is None:
        return denoised
    if "range" in how:
        return denoised.clip(-how["range"], how["range"])
    sizes = np.abs(denoised).reshape(*denoised.shape[:-3], -1)
    # As torch's clamp, whose upper limit wins.
    limit = np.minimum(np.maximum(np.quantile(sizes, how["quantile"], axis=-1), 1), how["most"])
    limit = limit[..., None, None, None].astype(denoised.dtype)
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
        log = np.log(value)
    return float(log) if isinstance(value, int | float) else log


def _exp(value: Any) -> Any:
    if hasattr(value, "exp"):
        return value.exp()
    with np.errstate(over="ignore"):
        power = np.exp(value)
    return float(power) if isinstance(value, int | float) else power
