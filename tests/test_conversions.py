"""Noise levels and predictions: the schedulers' own formulas, every kind of array, both ways."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from probe.conversions import (
    PREDICTION_TYPES,
    alpha_bar_from_log_snr,
    alpha_bar_from_sigma,
    alpha_bar_from_snr,
    denoised_from,
    eps_from,
    eps_from_denoised,
    log_snr_from_alpha_bar,
    log_snr_from_sigma,
    log_snr_from_snr,
    noised,
    sigma_from_alpha_bar,
    sigma_from_log_snr,
    snr_from_alpha_bar,
    snr_from_log_snr,
    target,
    v_from,
    variance_preserving,
)

SHAPE = (2, 4, 3, 5)
DIMS = ("image", "channel", "y", "x")
TIMESTEPS = (0, 1, 37, 500, 900, 999)
# Every beta schedule of diffusers' training schedulers, by the classes that have it.
SCHEDULES = {
    "DDPMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
    "DDIMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "LCMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "PNDMScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "EulerDiscreteScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "DPMSolverMultistepScheduler": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
RESCALE = "rescale_betas_zero_snr"  # an option of all of them but PNDM
CASES = [
    (kind, schedule, rescaled)
    for kind, schedules in SCHEDULES.items()
    for schedule in schedules
    for rescaled in ((False,) if kind == "PNDMScheduler" else (False, True))
]
CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler(kind: str, prediction_type: str) -> Any:
    made = getattr(diffusers, kind)(**CONFIG, prediction_type=prediction_type)
    made.alphas_cumprod = (
        made.alphas_cumprod.double()
    )  # the same numbers, so that the comparison is one of formulas
    return made


def floats(value: torch.Tensor) -> Any:
    return float(value.flatten()[3])


def labelled(value: torch.Tensor) -> Any:
    return xr.DataArray(value.numpy(), dims=DIMS)


KINDS = {
    "float": floats,
    "numpy": lambda value: value.numpy(),
    "torch": lambda value: value,
    "xarray": labelled,
}


def as_numpy(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_conversions_undo_what_the_scheduler_does(
    kind: str, prediction_type: str, name: str
) -> None:
    """`add_noise` makes x and `get_velocity` v from a known x0 and eps: each must come back out."""
    clean, eps, made, convert = draw(0), draw(1), scheduler(kind, prediction_type), KINDS[name]
    for t in TIMESTEPS:
        at = torch.tensor([t, t])
        x, v = made.add_noise(clean, eps, at), made.get_velocity(clean, eps, at)
        a, prediction = (
            float(made.alphas_cumprod[t]),
            {"epsilon": eps, "v_prediction": v}[prediction_type],
        )
        for function, wanted in ((eps_from, eps), (denoised_from, clean), (v_from, v)):
            found = function(convert(prediction), convert(x), a, prediction_type)
            assert type(found) is type(convert(wanted))
            np.testing.assert_allclose(
                as_numpy(found), as_numpy(convert(wanted)), rtol=1e-9, atol=1e-11
            )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
def test_denoised_is_what_the_scheduler_predicts(kind: str, prediction_type: str) -> None:
    made = scheduler(kind, prediction_type)
    made.set_timesteps(10)
    prediction, x = draw(2), draw(3)
    for t in made.timesteps:
        theirs = made.step(
            prediction, int(t), x, generator=torch.Generator().manual_seed(0)
        ).pred_original_sample
        mine = denoised_from(prediction, x, made.alphas_cumprod[int(t)], prediction_type)
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_sigma_and_alpha_bar_are_each_others_inverse(name: str) -> None:
    convert = KINDS[name]
    alpha_bar = torch.linspace(1e-3, 1, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    there = sigma_from_alpha_bar(convert(alpha_bar))
    assert type(there) is type(convert(alpha_bar))
    np.testing.assert_allclose(
        as_numpy(alpha_bar_from_sigma(there)), as_numpy(convert(alpha_bar)), rtol=1e-12
    )
    sigma = torch.logspace(-2, 2, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    back = sigma_from_alpha_bar(alpha_bar_from_sigma(convert(sigma)))
    np.testing.assert_allclose(as_numpy(back), as_numpy(convert(sigma)), rtol=1e-11)


def test_noise_levels_that_can_be_done_by_hand() -> None:
    assert sigma_from_alpha_bar(1.0) == 0.0 and alpha_bar_from_sigma(0.0) == 1.0
    assert sigma_from_alpha_bar(0.5) == 1.0 and alpha_bar_from_sigma(1.0) == 0.5
    assert alpha_bar_from_sigma(math.inf) == 0.0
    assert sigma_from_alpha_bar(0.1) == pytest.approx(3.0) and alpha_bar_from_sigma(
        3.0
    ) == pytest.approx(0.1)


@pytest.mark.parametrize("name", KINDS)
def test_variance_preserving_is_the_scale_model_input_of_euler(name: str) -> None:
    euler = diffusers.EulerDiscreteScheduler(
        **{key: value for key, value in CONFIG.items() if key != "clip_sample"}
    )
    euler.set_timesteps(5)
    convert, latents = KINDS[name], draw(4)
    for index, t in enumerate(euler.timesteps):
        euler._step_index = None  # looked up anew from the timestep
        found = variance_preserving(convert(latents), float(euler.sigmas[index]))
        np.testing.assert_allclose(
            as_numpy(found), as_numpy(convert(euler.scale_model_input(latents, t))), rtol=1e-6
        )
    clean, eps, a = draw(5), draw(6), 0.2
    exploding = clean + sigma_from_alpha_bar(a) * eps
    np.testing.assert_allclose(
        variance_preserving(exploding, sigma_from_alpha_bar(a)),
        a**0.5 * clean + (1 - a) ** 0.5 * eps,
        rtol=1e-12,
        atol=1e-14,
    )


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
        denoised_from(through, x, alpha_bar, second),
        denoised_from(prediction, x, alpha_bar, first),
        rtol=1e-12,
        atol=1e-12 / alpha_bar,
    )
    clean, eps = (
        denoised_from(prediction, x, alpha_bar, first),
        eps_from(prediction, x, alpha_bar, first),
    )
    torch.testing.assert_close(
        alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * eps, x, rtol=1e-12, atol=1e-12
    )


def test_one_alpha_bar_for_every_step_broadcasts_by_name() -> None:
    steps = xr.DataArray(np.array([0.1, 0.5, 0.9]), dims="step")
    x = xr.DataArray(draw(9).numpy(), dims=DIMS).expand_dims(step=3)
    prediction = xr.DataArray(draw(10).numpy(), dims=DIMS)
    found = denoised_from(prediction, x, steps, "epsilon")
    assert set(found.dims) == {"step", *DIMS}
    for index, alpha_bar in enumerate(steps.values):
        one = denoised_from(prediction, x.isel(step=index), float(alpha_bar), "epsilon")
        np.testing.assert_allclose(
            found.isel(step=index).transpose(*DIMS).values, one.values, rtol=1e-14
        )


def test_one_alpha_bar_for_every_image_broadcasts() -> None:
    prediction, x = draw(11), draw(12)
    alpha_bar = torch.tensor([0.2, 0.8], dtype=torch.float64)
    found = v_from(prediction, x, alpha_bar.view(2, 1, 1, 1), "epsilon")
    for image in range(2):
        torch.testing.assert_close(
            found[image],
            v_from(prediction[image], x[image], float(alpha_bar[image]), "epsilon"),
            rtol=1e-14,
            atol=1e-14,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_float_alpha_bar_keeps_the_tensors_dtype(dtype: torch.dtype) -> None:
    prediction, x = draw(13).to(dtype), draw(14).to(dtype)
    for function, prediction_type in itertools.product(
        (eps_from, v_from, denoised_from), PREDICTION_TYPES
    ):
        assert function(prediction, x, 0.3, prediction_type).dtype == dtype


@pytest.mark.parametrize("function", [eps_from, v_from, denoised_from])
@pytest.mark.parametrize("bad", ["sample", "eps", "", "EPSILON"])
def test_a_prediction_type_that_is_none(function: Any, bad: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^prediction type '{bad}' is not one of \('epsilon', 'v_prediction'\)$"
    ):
        function(1.0, 1.0, 0.5, bad)


# --- every schedule -------------------------------------------------------------------------------


def of_schedule(kind: str, beta_schedule: str, rescaled: bool) -> Any:
    """A scheduler whose table is in float64 and which has not begun: then formulas are compared,
    not rounding.
    """
    made = getattr(diffusers, kind)(
        beta_schedule=beta_schedule, **({RESCALE: True} if rescaled else {})
    )
    made.alphas_cumprod = made.alphas_cumprod.double()
    return made


@pytest.mark.parametrize(("kind", "beta_schedule", "rescaled"), CASES)
def test_noise_and_velocity_of_every_schedule(
    kind: str, beta_schedule: str, rescaled: bool
) -> None:
    made, clean, eps = of_schedule(kind, beta_schedule, rescaled), draw(20), draw(21)
    if hasattr(made, "sigmas"):  # it makes noise from sigmas, in float32
        made.sigmas, made.timesteps = (
            ((1 - made.alphas_cumprod) / made.alphas_cumprod) ** 0.5,
            torch.arange(1000.0),
        )
    for t in TIMESTEPS:
        at, alpha_bar = torch.tensor([t, t]), float(made.alphas_cumprod[t])
        if alpha_bar < 1e-6 and hasattr(made, "sigmas"):
            continue  # sigma is infinite; what these classes put in its place is theirs
        theirs = made.add_noise(clean, eps, at)
        if kind == "EulerDiscreteScheduler":
            theirs = variance_preserving(theirs, sigma_from_alpha_bar(alpha_bar))
        x = noised(clean, eps, alpha_bar)
        torch.testing.assert_close(x, theirs, rtol=1e-9, atol=1e-9)
        if hasattr(made, "get_velocity"):
            at = at.double() if hasattr(made, "sigmas") else at
            torch.testing.assert_close(
                target(clean, eps, alpha_bar, "v_prediction"),
                made.get_velocity(clean, eps, at),
                rtol=1e-9,
                atol=1e-9,
            )
        assert target(clean, eps, alpha_bar, "epsilon") is eps
        for prediction_type in PREDICTION_TYPES:
            perfect = target(clean, eps, alpha_bar, prediction_type)
            torch.testing.assert_close(
                eps_from(perfect, x, alpha_bar, prediction_type), eps, rtol=1e-9, atol=1e-9
            )
            if alpha_bar > 0 or prediction_type == "v_prediction":
                found = denoised_from(perfect, x, alpha_bar, prediction_type)
                torch.testing.assert_close(
                    found, clean, rtol=1e-9, atol=1e-9 / max(alpha_bar, 1e-9) ** 0.5
                )
                wanted = target(clean, eps, alpha_bar, "v_prediction")
                torch.testing.assert_close(
                    v_from(perfect, x, alpha_bar, prediction_type),
                    wanted,
                    rtol=1e-9,
                    atol=1e-9 / max(alpha_bar, 1e-9) ** 0.5,
                )


@pytest.mark.parametrize("beta_schedule", SCHEDULES["DDIMScheduler"])
def test_zero_terminal_snr_is_reached_and_converted(beta_schedule: str) -> None:
    made = of_schedule("DDIMScheduler", beta_schedule, True)
    last = made.alphas_cumprod[-1]
    assert float(last) == 0.0
    for kind in (
        float,
        lambda value: value,
        lambda value: value.numpy(),
        lambda value: xr.DataArray(value.numpy()),
    ):
        assert float(sigma_from_alpha_bar(kind(last))) == math.inf
        assert float(snr_from_alpha_bar(kind(last))) == 0.0
        assert float(log_snr_from_alpha_bar(kind(last))) == -math.inf
        assert float(alpha_bar_from_snr(snr_from_alpha_bar(kind(last)))) == 0.0
        assert float(alpha_bar_from_log_snr(log_snr_from_alpha_bar(kind(last)))) == 0.0


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_sigmas_are_the_schedulers_own(kind: str) -> None:
    made = getattr(diffusers, kind)(beta_schedule="scaled_linear")
    euler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=made.config.beta_start,
        beta_end=made.config.beta_end,
    )
    table = euler.sigmas.flip(0)[
        1:
    ]  # of every timestep, from the least; before it, the zero at the end
    np.testing.assert_allclose(
        sigma_from_alpha_bar(made.alphas_cumprod).numpy(), table.numpy(), rtol=1e-5
    )


# --- there and back again -------------------------------------------------------------------------

log_snrs = st.floats(-30, 30)
levels = st.floats(1e-6, 1 - 1e-6)
values = st.floats(-100, 100)


@given(log_snrs)
def test_noise_levels_there_and_back(log_snr: float) -> None:
    sigma, snr, alpha_bar = (
        sigma_from_log_snr(log_snr),
        snr_from_log_snr(log_snr),
        alpha_bar_from_log_snr(log_snr),
    )
    assert log_snr_from_sigma(sigma) == pytest.approx(log_snr, abs=1e-9)
    assert log_snr_from_snr(snr) == pytest.approx(log_snr, abs=1e-9)
    assert snr == pytest.approx(1 / sigma**2, rel=1e-9)
    assert alpha_bar_from_sigma(sigma) == pytest.approx(alpha_bar, rel=1e-9)
    assert alpha_bar_from_snr(snr) == pytest.approx(alpha_bar, rel=1e-9)
    if abs(log_snr) < 15:  # beyond it, alpha_bar is so near one that its digits are gone
        assert log_snr_from_alpha_bar(alpha_bar) == pytest.approx(log_snr, abs=1e-6)
        assert snr_from_alpha_bar(alpha_bar) == pytest.approx(snr, rel=1e-6)
        assert sigma_from_alpha_bar(alpha_bar) == pytest.approx(sigma, rel=1e-6)


@given(st.lists(log_snrs, min_size=2, max_size=8, unique=True))
def test_more_signal_is_less_noise_in_every_measure(found: list[float]) -> None:
    rising = np.sort(np.array(found))
    assert (np.diff(alpha_bar_from_log_snr(rising)) >= 0).all() and (
        np.diff(snr_from_log_snr(rising)) >= 0
    ).all()
    assert (np.diff(sigma_from_log_snr(rising)) <= 0).all()


@given(values, values, levels)
def test_what_a_perfect_model_says_gives_back_everything(
    clean: float, eps: float, alpha_bar: float
) -> None:
    x = noised(clean, eps, alpha_bar)
    close = {"rel": 1e-6, "abs": 1e-6}
    for prediction_type in PREDICTION_TYPES:
        prediction = target(clean, eps, alpha_bar, prediction_type)
        assert eps_from(prediction, x, alpha_bar, prediction_type) == pytest.approx(eps, **close)
        assert denoised_from(prediction, x, alpha_bar, prediction_type) == pytest.approx(
            clean, rel=1e-6, abs=1e-6 / alpha_bar**0.5
        )
        assert v_from(prediction, x, alpha_bar, prediction_type) == pytest.approx(
            target(clean, eps, alpha_bar, "v_prediction"), rel=1e-6, abs=1e-6 / alpha_bar**0.5
        )
    assert eps_from_denoised(clean, x, alpha_bar) == pytest.approx(
        eps, rel=1e-6, abs=1e-6 / (1 - alpha_bar) ** 0.5
    )


@given(values, values, levels)
def test_wrong_formulas_would_be_found(clean: float, eps: float, alpha_bar: float) -> None:
    """The round trip above is not one that any pair of formulas passes: with the signs of v
    changed, it fails.
    """
    x, other = noised(clean, eps, alpha_bar), -target(clean, eps, alpha_bar, "v_prediction")
    off = denoised_from(other, x, alpha_bar, "v_prediction") - clean
    assert off == pytest.approx(
        2 * (1 - alpha_bar) ** 0.5 * target(clean, eps, alpha_bar, "v_prediction"),
        rel=1e-6,
        abs=1e-6,
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_array_through_the_log_snr(name: str) -> None:
    convert = KINDS[name]
    log_snr = torch.linspace(-8, 8, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    for there, back in (
        (sigma_from_log_snr, log_snr_from_sigma),
        (snr_from_log_snr, log_snr_from_snr),
        (alpha_bar_from_log_snr, log_snr_from_alpha_bar),
        (
            lambda value: alpha_bar_from_snr(snr_from_log_snr(value)),
            lambda value: log_snr_from_snr(snr_from_alpha_bar(value)),
        ),
    ):
        found = back(there(convert(log_snr)))
        assert type(found) is type(convert(log_snr))
        np.testing.assert_allclose(as_numpy(found), as_numpy(convert(log_snr)), atol=1e-9)
