"""Whether what was recorded of the forward process follows from the picture, the seed and the predictions. Without the model.

forward      noise is that of the seeds; of a noising, every noised latent, difference and loss follows, and the VAE's round trip
noised       of a noising, in place of the check of a schedule: its timesteps are those asked for, its noise levels the model's
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from probe.checks import Check, Tally
from probe.conversions import denoised_from, eps_from, target
from probe.forward import psnr, restart
from probe.map_checks import relative
from probe.recording import Run
from probe.replay import TOLERANCE, conditions, numbers, rebuild_scheduler, run_dtype, tensor
from probe.sampling import Schedule, noise

ROUNDED = 1e-5  # of the greatest value, where the same float32 formula is computed by another library


def check_noised(run: Run) -> Check:
    """Timesteps and noise levels of a noising."""
    scheduler, asked = rebuild_scheduler(run), run.attributes["noising"]
    tally = Tally("schedule", "timesteps as asked for, their noise levels the model's", 1e-6, conditions(run))
    schedule = Schedule.at(scheduler, asked["timesteps"])
    for name, values in {"timestep": schedule.timesteps, "sigma": schedule.sigmas, "alpha_bar": schedule.alpha_bars}.items():
        recorded = run.variable(name).values
        if recorded.shape != (len(values),):
            tally.fail(f"{name} has {recorded.size} values, {len(values)} were asked for")
        else:
            tally.add(relative(np.array(values), recorded), name)
    if run.attributes["prediction_type"] != scheduler.config.prediction_type:
        tally.fail(f"prediction_type is {run.attributes['prediction_type']}, the scheduler's is {scheduler.config.prediction_type}")
    return tally.check()


def check_forward(run: Run) -> Check:
    """The true noise, and all that follows from it."""
    if "noising" in run.attributes:
        return _check_noising(run)
    if run.experiment.image is None:
        return Check("forward", "not checked", "the run began from pure noise")
    clean = tensor(run, run.variable("forward/clean").values)
    start = restart(run.experiment, clean, encoded=int(run.attributes["model"]["f"]) > 1)
    tally = Tally("forward", "noise is that of the seeds", TOLERANCE[str(clean.dtype).removeprefix("torch.")], conditions(run))
    tally.add(relative(numbers(start.noise), run.variable("forward/noise").values), "noise")
    return tally.check()


def _check_noising(run: Run) -> Check:
    asked, dtype = run.experiment, run_dtype(run)
    bits = TOLERANCE[str(dtype).removeprefix("torch.")]
    tally = Tally("forward", "noise, noised latents, differences and losses follow", max(ROUNDED, bits), ("rounding", *conditions(run)))
    clean, eps = (tensor(run, run.variable(f"forward/{name}").values) for name in ("clean", "noise"))
    if not np.array_equal(numbers(noise(asked.seed, tuple(clean.shape), dtype)[0]), numbers(eps)):
        tally.fail("noise is not that of the seeds")
    if not bool((clean == clean[:1]).all()):
        tally.fail("the draws of noise have not the same clean latents")
    if run.status == "complete" and not np.array_equal(run.variable("latents/final_latents").values, numbers(clean)):
        tally.fail("final_latents are not the clean latents")
    scheduler = rebuild_scheduler(run)
    for step in run.steps:
        at = f"step {step}"
        t, alpha_bar = int(run.variable("timestep").values[step]), float(run.variable("alpha_bar").values[step])
        x = run.variable("latents/latents").isel(step=step).values
        made = scheduler.add_noise(clean, eps, torch.tensor([t] * len(clean)))
        tally.add(relative(numbers(made), x), f"latents, {at}")
        for name, value in _measured(run, step, x.astype(np.float32), clean, eps, alpha_bar).items():
            tally.add(relative(value, run.variable(f"forward/{name}").isel(step=step).values), f"{name}, {at}")
    if run.status == "complete":
        loss = run.variable("forward/loss").values.astype(np.float64)
        tally.add(relative(loss.mean(axis=1), run.variable("forward/loss_mean").values), "loss_mean")
        spread = loss.std(axis=1, ddof=1) if asked.images > 1 else np.full(len(loss), np.nan)
        tally.add(relative(spread, run.variable("forward/loss_spread").values), "loss_spread")
        trip = psnr(run.variable("source/picture").values, run.images.values[0])
        tally.add(relative(np.array(trip), run.variable("source/psnr").values), "psnr")
    return tally.check()


def _measured(run: Run, step: int, x: np.ndarray, clean: torch.Tensor, eps: torch.Tensor, alpha_bar: float) -> dict[str, Any]:
    kind = str(run.attributes["prediction_type"])
    prediction = run.variable("latents/prediction").isel(step=step).values.astype(np.float32)
    true_clean, true_eps = (value.float().numpy() for value in (clean, eps))
    wanted = target(true_clean, true_eps, alpha_bar, kind)
    difference = eps_from(prediction, x, alpha_bar, kind) - true_eps
    with np.errstate(divide="ignore", invalid="ignore"):
        denoised = denoised_from(prediction, x, alpha_bar, kind)
    axes = (1, 2, 3)
    return {
        "denoised": denoised,
        "difference": difference,
        "loss": ((prediction - wanted) ** 2).mean(axis=axes),
        "noise_loss": (difference**2).mean(axis=axes),
    }
