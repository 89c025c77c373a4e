"""Noise levels and predictions: the schedulers' own formulas, every kind of array, and there and back again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import xarray as xr

from probe.conversions import (
    PREDICTION_TYPES,
    alpha_bar_from_sigma,
    denoised_from,
    eps_from,
    sigma_from_alpha_bar,
    v_from,
    variance_preserving,
)

SHAPE = (2, 4, 3, 5)
DIMS = ("image", "channel", "y", "x")
TIMESTEPS = (0, 1, 37, 500, 900, 999)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler(kind: str, prediction_type: str) -> Any:
    made = getattr(diffusers, kind)(**CONFIG, prediction_type=prediction_type)
    made.alphas_cumprod = made.alphas_cumprod.double()  # the same numbers, so that the comparison is one of formulas
    return made


def floats(value: torch.Tensor) -> Any:
    return float(value.flatten()[3])


def labelled(value: torch.Tensor) -> Any:
    return xr.DataArray(value.numpy(), dims=DIMS)


KINDS = {"float": floats, "numpy": lambda value: value.numpy(), "torch": lambda value: value, "xarray": labelled}


def as_numpy(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_conversions_undo_what_the_scheduler_does(kind: str, prediction_type: str, name: str) -> None:
    """`add_noise` makes x and `get_velocity` v from a known x0 and eps: each must come back out."""
    clean, eps, made, convert = draw(0), draw(1), scheduler(kind, prediction_type), KINDS[name]
    for t in TIMESTEPS:
        at = torch.tensor([t, t])
        x, v = made.add_noise(clean, eps, at), made.get_velocity(clean, eps, at)
        a, prediction = float(made.alphas_cumprod[t]), {"epsilon": eps, "v_prediction": v}[prediction_type]
        for function, wanted in ((eps_from, eps), (denoised_from, clean), (v_from, v)):
            found = function(convert(prediction), convert(x), a, prediction_type)
            assert type(found) is type(convert(wanted))
            np.testing.assert_allclose(as_numpy(found), as_numpy(convert(wanted)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_denoised_is_what_the_scheduler_predicts(kind: str, prediction_type: str) -> None:
    made = scheduler(kind, prediction_type)
    made.set_timesteps(10)
    prediction, x = draw(2), draw(3)
    for t in made.timesteps:
        theirs = made.step(prediction, int(t), x, generator=torch.Generator().manual_seed(0)).pred_original_sample
        mine = denoised_from(prediction, x, made.alphas_cumprod[int(t)], prediction_type)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_sigma_and_alpha_bar_are_each_others_inverse(name: str) -> None:
    convert = KINDS[name]
    alpha_bar = torch.linspace(1e-3, 1, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    there = sigma_from_alpha_bar(convert(alpha_bar))
    assert type(there) is type(convert(alpha_bar))
    np.testing.assert_allclose(as_numpy(alpha_bar_from_sigma(there)), as_numpy(convert(alpha_bar)), rtol=1e-12)
    sigma = torch.logspace(-2, 2, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    back = sigma_from_alpha_bar(alpha_bar_from_sigma(convert(sigma)))
    np.testing.assert_allclose(as_numpy(back), as_numpy(convert(sigma)), rtol=1e-11)


def test_noise_levels_that_can_be_done_by_hand() -> None:
    assert sigma_from_alpha_bar(1.0) == 0.0 and alpha_bar_from_sigma(0.0) == 1.0
    assert sigma_from_alpha_bar(0.5) == 1.0 and alpha_bar_from_sigma(1.0) == 0.5
    assert alpha_bar_from_sigma(math.inf) == 0.0
    assert sigma_from_alpha_bar(0.1) == pytest.approx(3.0) and alpha_bar_from_sigma(3.0) == pytest.approx(0.1)


@pytest.mark.parametrize("name", KINDS)
def test_variance_preserving_is_the_scale_model_input_of_euler(name: str) -> None:
    euler = diffusers.EulerDiscreteScheduler(**{key: value for key, value in CONFIG.items() if key != "clip_sample"})
    euler.set_timesteps(5)
    convert, latents = KINDS[name], draw(4)
    for index, t in enumerate(euler.timesteps):
        euler._step_index = None  # looked up anew from the timestep
        found = variance_preserving(convert(latents), float(euler.sigmas[index]))
        np.testing.assert_allclose(as_numpy(found), as_numpy(convert(euler.scale_model_input(latents, t))), rtol=1e-6)
    clean, eps, a = draw(5), draw(6), 0.2
    exploding = clean + sigma_from_alpha_bar(a) * eps
    np.testing.assert_allclose(variance_preserving(exploding, sigma_from_alpha_bar(a)), a**0.5 * clean + (1 - a) ** 0.5 * eps, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha_bar", [0.0047, 0.25, 0.5, 0.9, 0.9991])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PREDICTION_TYPES, repeat=2)))
def test_round_trips(first: str, second: str, alpha_bar: float) -> None:
    """eps -> v -> eps and v -> eps -> v give back what went in; x0 and eps together give back x."""
    prediction, x = draw(7), draw(8)
    to = {"epsilon": eps_from, "v_prediction": v_from}
    through = to[second](prediction, x, alpha_bar, first)
    back = to[first](through, x, alpha_bar, second)
    torch.testing.assert_close(back, prediction, rtol=1e-12, atol=1e-12 / alpha_bar**0.5)
    torch.testing.assert_close(
        denoised_from(through, x, alpha_bar, second), denoised_from(prediction, x, alpha_bar, first), rtol=1e-12, atol=1e-12 / alpha_bar
    )
    clean, eps = denoised_from(prediction, x, alpha_bar, first), eps_from(prediction, x, alpha_bar, first)
    torch.testing.assert_close(alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * eps, x, rtol=1e-12, atol=1e-12)


def test_one_alpha_bar_for_every_step_broadcasts_by_name() -> None:
    steps = xr.DataArray(np.array([0.1, 0.5, 0.9]), dims="step")
    x = xr.DataArray(draw(9).numpy(), dims=DIMS).expand_dims(step=3)
    prediction = xr.DataArray(draw(10).numpy(), dims=DIMS)
    found = denoised_from(prediction, x, steps, "epsilon")
    assert set(found.dims) == {"step", *DIMS}
    for index, alpha_bar in enumerate(steps.values):
        one = denoised_from(prediction, x.isel(step=index), float(alpha_bar), "epsilon")
        np.testing.assert_allclose(found.isel(step=index).transpose(*DIMS).values, one.values, rtol=1e-14)


def test_one_alpha_bar_for_every_image_broadcasts() -> None:
    prediction, x = draw(11), draw(12)
    alpha_bar = torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = v_from(prediction, x, alpha_bar.view(2, 1, 1, 1), "epsilon")
    for image in range(2):
        torch.testing.assert_close(found[image], v_from(prediction[image], x[image], float(alpha_bar[image]), "epsilon"), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_float_alpha_bar_keeps_the_tensors_dtype(dtype: torch.dtype) -> None:
    prediction, x = draw(13).to(dtype), draw(14).to(dtype)
    for function, prediction_type in itertools.product((eps_from, v_from, denoised_from), PREDICTION_TYPES):
        assert function(prediction, x, 0.3, prediction_type).dtype == dtype


@pytest.mark.parametrize("function", [eps_from, v_from, denoised_from])
@pytest.mark.parametrize("bad", ["sample", "eps", "", "EPSILON"])
def test_a_prediction_type_that_is_none(function: Any, bad: str) -> None:
    with pytest.raises(ValueError, match=rf"^prediction type '{bad}' is not one of \('epsilon', 'v_prediction'\)$"):
        function(1.0, 1.0, 0.5, bad)
