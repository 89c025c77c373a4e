"""Whether a picture with noise in it was recorded right.

    forward      the noise is that of the seeds
                 a noising: its differences, losses and the VAE's round trip follow

The model is not needed. The noised latents are checked by `probe.proof.replay`, as in any run.
"""

from __future__ import annotations

import numpy as np
import torch

from probe.conversions import denoised_from, eps_from, target
from probe.diffusion.draws import noise
from probe.diffusion.start import restart
from probe.proof.checks import Check, Tally
from probe.proof.map_checks import relative
from probe.proof.replay import clean_of, conditions, numbers, run_dtype
from probe.reading.recording import Run
from probe.watching.source import psnr

# of the greatest value: one float32 formula, computed by torch and by numpy, and divided by
# sqrt(alpha_bar)
ROUNDED = 1e-4


def check_forward(run: Run) -> Check:
    """Check the true noise, and all that is measured by it."""
    clean = clean_of(run)
    if run.kind == "noising":
        tally = Tally(
            "forward",
            "noise is that of the seeds; differences, losses and the round trip follow",
            ROUNDED,
            ("rounding", *conditions(run)),
        )
        eps = noise(run.noising.seed, tuple(clean.shape), run_dtype(run))[0]
        _measured(run, tally, clean, eps)
    else:
        tally = Tally("forward", "noise is that of the seeds")
        eps = restart(run.experiment, clean, encoded=int(run.attributes["model"]["f"]) > 1).noise
    if not np.array_equal(numbers(eps), run.variable("forward/noise").values):
        tally.fail("noise is not that of the seeds")
    tally.add(0.0, "noise")
    return tally.check()


def _measured(run: Run, tally: Tally, clean: torch.Tensor, eps: torch.Tensor) -> None:
    """Compare what a noising measured at each timestep with what follows from its latents."""
    kind, count = str(run.attributes["prediction_type"]), len(clean)
    if not bool((clean == clean[:1]).all()):
        tally.fail("the draws of noise have not the same clean latents")
    true_clean, true_eps = (value.float().numpy() for value in (clean, eps))
    axes = (1, 2, 3)
    for step in run.steps:
        alpha_bar = float(run.variable("alpha_bar").values[step])
        x, prediction = (
            run.variable(f"latents/{name}").isel(step=step).values.astype(np.float32)
            for name in ("latents", "prediction")
        )
        difference = eps_from(prediction, x, alpha_bar, kind) - true_eps
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # at alpha_bar 0, noise says nothing of what is clean
            denoised = denoised_from(prediction, x, alpha_bar, kind)
        expected = {
            "denoised": denoised,
            "difference": difference,
            "loss": ((prediction - target(true_clean, true_eps, alpha_bar, kind)) ** 2).mean(
                axis=axes
            ),
            "noise_loss": (difference**2).mean(axis=axes),
        }
        loss = run.variable("forward/loss").isel(step=step).values.astype(np.float64)
        expected |= {
            "loss_mean": loss.mean(),
            "loss_spread": loss.std(ddof=1) if count > 1 else np.array(np.nan),
        }
        for name, value in expected.items():
            tally.add(
                relative(value, run.variable(f"forward/{name}").isel(step=step).values),
                f"forward/{name}, step {step}",
            )
    if run.status == "complete":
        trip = np.array(psnr(run.variable("source/picture").values, run.images.values[0]))
        tally.add(relative(trip, run.variable("source/psnr").values), "source/psnr")
