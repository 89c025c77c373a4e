"""Noise levels and the three things a model may predict, each conversion written once.

With x the model's variance-preserving input, x0 the clean latent and eps the noise (Ho et al. 2020; Salimans & Ho 2022):

    x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps          sigma = sqrt((1 - alpha_bar) / alpha_bar)
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0

The functions take floats, numpy arrays, torch tensors or labelled xarray arrays alike; `alpha_bar` broadcasts.
"""

from __future__ import annotations

from typing import Any

PREDICTION_TYPES = ("epsilon", "v_prediction")


def sigma_from_alpha_bar(alpha_bar: Any) -> Any:
    """The noise level sigma of Karras et al. 2022: noise's standard deviation beside a clean signal of scale one."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def alpha_bar_from_sigma(sigma: Any) -> Any:
    """The cumulative signal fraction alpha_bar of Ho et al. 2020, between 0 (all noise) and 1 (no noise)."""
    return 1 / (sigma**2 + 1)


def variance_preserving(latents: Any, sigma: Any) -> Any:
    """The model's input for variance-exploding latents (those of Euler, LMS, Heun and KDPM2 schedulers)."""
    return latents / (sigma**2 + 1) ** 0.5


def eps_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted noise. `x` is variance-preserving; `prediction_type` is "epsilon" or "v_prediction"."""
    _check(prediction_type)
    return prediction if prediction_type == "epsilon" else alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x


def denoised_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted clean latent x0. `x` is variance-preserving."""
    _check(prediction_type)
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * prediction


def v_from(prediction: Any, x: Any, alpha_bar: Any, prediction_type: str) -> Any:
    """The predicted velocity. `x` is variance-preserving."""
    _check(prediction_type)
    if prediction_type == "v_prediction":
        return prediction
    clean = denoised_from(prediction, x, alpha_bar, prediction_type)
    return alpha_bar**0.5 * prediction - (1 - alpha_bar) ** 0.5 * clean


def _check(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction type {prediction_type!r} is not one of {PREDICTION_TYPES}")
