"""Step a fresh scheduler over small latents of which everything is known.

What its sigma, alpha_bar and denoised say must be what it does. The latents are
x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020), or x0 + sigma eps (Karras et al.
2022, arXiv:2206.00364). The prediction is that of a model that knows x0 and eps. At every call,
with clipping and thresholding off:

* `scale_model_input` divides by sqrt(sigma^2 + 1), or does nothing.
* The scheduler's own x0 is x0. Some keep eps instead: those are stepped again with v, which tells
  the level too. PNDM gives neither: its step keeps the variance at one, and its `add_noise` has
  the same level.
* Its step leads to the level of the next call.

Where clipping or thresholding is on, the clipped x0 is held against `probe.conversions.clipped`
too. The scheduler has to be stepped: Heun, KDPM2 and Euler count their own calls. No global random
number is drawn.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probe.conversions import PREDICTION_TYPES, clipped, clipping, eps_from_denoised, target
from probe.diffusion.sampling import Start, started, step_options
from probe.diffusion.schedule import Schedule, fresh, set_steps
from probe.text import first_line

# Two images with opposite x0 and the same noise: in their difference, the noise of a step is gone.
SHAPE = (2, 4, 2, 2)
EXACT = 1e-3  # how far a number may be off, relative to it
ROUNDING = 1e-5  # how far, relative to the largest number in its formula (float32 has 6e-8)
OFF = {"clip_sample": False, "thresholding": False}
WRONG = "does not do what its noise levels say:"


@dataclass(frozen=True)
class Stepped:
    """What a scheduler did at each call.

    *Shape:* factors (call); own, after (call, image, value); NaN where it gives no x0.
    """

    factors: np.ndarray
    own: np.ndarray
    after: np.ndarray


class Disagrees(Exception):
    """A scheduler does not do what its schedule says; the text says how."""


def held(scheduler: Any, steps: int, begin: int, finite: bool = True) -> Schedule:
    """Return the schedule of a scheduler. Raise Disagrees if it is not what the scheduler does."""
    state = torch.get_rng_state()
    try:
        bare = fresh(scheduler, **OFF)
        schedule = Schedule.read(bare, steps, begin)
        _compare(scheduler, bare, schedule, steps, begin, finite)
    except Disagrees:
        raise
    except Exception as problem:  # any class of diffusers may come here, with whatever it raises
        raise Disagrees(
            f"cannot run in Stable Diffusion's loop ({type(problem).__name__}: "
            f"{first_line(problem)[:200]})"
        ) from problem
    finally:
        drawn = not torch.equal(state, torch.get_rng_state())
        torch.set_rng_state(state)
    if drawn:
        raise Disagrees("draws global random numbers, so that a seed would not say what it makes")
    return schedule


def _compare(
    scheduler: Any, bare: Any, schedule: Schedule, steps: int, begin: int, finite: bool = False
) -> None:
    """Raise Disagrees unless `schedule` is what the scheduler does.

    `bare` is a fresh one without clipping. With `finite`, its steps must give finite latents.
    """
    kind = str(scheduler.config.get("prediction_type"))
    _check_levels(kind, schedule)
    clean, eps = _latents()
    stepped = _stepped(bare, schedule, steps, begin, clean, eps)
    if finite and not schedule.undefined(kind):
        _check_finite(stepped)
    _check_scale(schedule, stepped)

    undefined = (np.array(schedule.alpha_bars) == 0) & (kind == "epsilon")
    blind = np.isnan(stepped.own).all(axis=(1, 2)) & ~undefined
    x0, noise, left = _parts(stepped.own, clean, eps)
    is_x0, is_eps = _told_apart(kind, schedule, x0, noise, left)
    if kind == "epsilon" and not blind.all() and is_eps[~blind & ~undefined].all():
        as_v = {**OFF, "prediction_type": "v_prediction"}
        _compare(fresh(scheduler, **as_v), fresh(scheduler, **as_v), schedule, steps, begin)
    else:
        fits = blind | undefined | is_x0 | (is_eps & (kind != "epsilon"))
        text = "its own x0 is {:.4g} x0 {:+.3g} noise, though the prediction is right"
        _agree(schedule, fits, text, x0, noise)
    if begin:
        _begins(fresh(scheduler), schedule, steps, begin, clean, eps)
    if begin and blind.any():
        # Begun in its middle, PNDM goes twice over its first step, as in diffusers. `remarks` says
        # so.
        return _compare(scheduler, fresh(scheduler, **OFF), Schedule.of(scheduler, steps), steps, 0)
    if blind.any():
        if kind == "v_prediction":
            # PNDM remembers v of other levels; eps is the same at all levels.
            as_eps = fresh(scheduler, **OFF, prediction_type="epsilon")
            stepped = _stepped(as_eps, schedule, steps, begin, clean, eps)
        _marginal(bare, schedule, blind, stepped, clean, eps)
    if not schedule.variance_exploding:
        _lands(schedule, stepped, clean, eps, undefined)
    clips = clipping(type(scheduler).__name__, scheduler.config)
    if clips or any(scheduler.config.get(name) for name in OFF):
        _clips(scheduler, schedule, steps, begin, clean, eps, blind | undefined)


def _check_levels(kind: str, schedule: Schedule) -> None:
    """Raise Disagrees for levels that are no numbers or rise, and for another prediction type."""
    if kind not in PREDICTION_TYPES:
        raise Disagrees(f"{WRONG} its prediction type is {kind}")
    sigmas, alpha_bars = np.array(schedule.sigmas), np.array(schedule.alpha_bars)
    numbers = (sigmas >= 0) & (alpha_bars >= 0) & (alpha_bars <= 1)
    numbers &= np.isfinite(sigmas) | (not schedule.variance_exploding)
    _agree(schedule, numbers, "they are not numbers")
    if (rising := np.flatnonzero(sigmas[1:] > sigmas[:-1] * (1 + EXACT))).size:
        raise Disagrees(
            f"makes noise of pictures: its noise grows from call {rising[0]} to the next"
        )


def _check_finite(stepped: Stepped) -> None:
    """Raise Disagrees if a step gives NaN or infinity."""
    if (lost := np.flatnonzero(~np.isfinite(stepped.after).all(axis=(1, 2)))).size:
        raise Disagrees(
            f"does not work: its step {lost[0]} makes NaN or infinity of a finite prediction"
        )


def _check_scale(schedule: Schedule, stepped: Stepped) -> None:
    """Raise Disagrees if `scale_model_input` does not give the latents variance one."""
    sigmas = np.array(schedule.sigmas)
    exploding = schedule.variance_exploding
    scale = 1 / np.sqrt(sigmas**2 + 1) if exploding else np.ones(len(sigmas))
    fits = np.abs(stepped.factors - scale) <= EXACT * scale
    text = "scale_model_input multiplies by {:.4g}, not {:.4g}"
    _agree(schedule, fits, text, stepped.factors, scale)


def _told_apart(
    kind: str, schedule: Schedule, x0: np.ndarray, noise: np.ndarray, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return at which calls a scheduler's own value is x0, and at which it is eps.

    `x0` and `noise` are how much of each is in the value, `left` what else is.
    """
    sigmas, alpha_bars = np.array(schedule.sigmas), np.array(schedule.alpha_bars)
    if kind == "epsilon":
        slope = np.where(alpha_bars > 0, sigmas, 0)
    else:
        slope = np.sqrt(alpha_bars * (1 - alpha_bars))
    as_x0 = np.maximum(np.abs(x0 - 1) - EXACT, np.maximum(np.abs(noise) - EXACT * slope, left))
    as_eps = np.maximum(np.abs(noise - 1) - EXACT, np.maximum(np.abs(x0) - EXACT * slope, left))
    floor_eps = ROUNDING / np.sqrt(np.maximum(1 - alpha_bars, 1e-12))
    return as_x0 <= ROUNDING * np.maximum(1, slope), as_eps <= floor_eps


def _latents() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, eps = torch.randn((2, 1, *SHAPE[1:]), generator=generator)
    return torch.cat([clean, -clean]), torch.cat([eps, eps])


def _stepped(
    scheduler: Any,
    schedule: Schedule,
    steps: int,
    begin: int,
    clean: torch.Tensor,
    eps: torch.Tensor,
) -> Stepped:
    """Step a fresh scheduler through the calls of `schedule`.

    Each call has latents of its own level, and the prediction of a model that knows x0 and eps.
    """
    set_steps(scheduler, steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generators = [torch.Generator().manual_seed(0) for _ in range(len(clean))]
    options = step_options(scheduler, 0.0, generators)
    if "order" in inspect.signature(scheduler.step).parameters:
        options["order"] = 1  # LMS: x0 is the same, and quick
    kind, nothing = str(scheduler.config["prediction_type"]), torch.full(clean.shape, torch.nan)
    factors, own, after = [], [], []
    for t, sigma, alpha_bar in zip(
        scheduler.timesteps[begin:], schedule.sigmas, schedule.alpha_bars, strict=True
    ):
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if schedule.variance_exploding:
            signal, noise = 1.0, sigma
        latents = signal * clean + noise * eps
        scaled = scheduler.scale_model_input(latents, t)
        out = scheduler.step(target(clean, eps, alpha_bar, kind), t, latents, **options)
        value = _own(scheduler, out, t, latents)
        flat = latents.flatten()
        factors.append((scaled.flatten() @ flat) / (flat @ flat))
        own.append(nothing if value is None else value)
        after.append(out.prev_sample if hasattr(out, "prev_sample") else out[0])
    shape = (len(own), len(clean), -1)
    return Stepped(
        *(
            torch.stack(values).reshape(*shape[: 1 if i == 0 else 3]).double().numpy()
            for i, values in enumerate((factors, own, after))
        )
    )


def _own(scheduler: Any, out: Any, t: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """Return the scheduler's own x0 at the last call, or the eps that it keeps, if any."""
    x0: torch.Tensor | None = getattr(out, "pred_original_sample", None)
    if x0 is not None:
        return x0
    if hasattr(out, "denoised"):  # LCM: between x0 and what went in
        skip, share = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (out.denoised - skip * latents) / share if float(share) > EXACT else None
    # The multistep solvers keep what `convert_model_output` gave.
    kept = getattr(scheduler, "model_outputs", None)
    return kept[-1] if kept else None


def _parts(
    values: np.ndarray, clean: torch.Tensor, eps: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how much x0 and how much eps are in some values, and the most that is left over.

    *Shape:* (call, image, value) -> each (call).
    """
    signal, other = (part[0].double().numpy().ravel() for part in (clean, eps))
    with np.errstate(invalid="ignore"):
        x0 = (values[:, 0] - values[:, 1]) @ signal / (2 * signal @ signal)
        noise = (values[:, 0] + values[:, 1]) @ other / (2 * other @ other)
        left = values[:, 0] - x0[:, None] * signal - noise[:, None] * other
    return x0, noise, np.abs(left).max(axis=1)


def _agree(schedule: Schedule, fits: np.ndarray, text: str, *values: np.ndarray) -> None:
    wrong = np.flatnonzero(~fits)
    if wrong.size:
        i = int(wrong[0])
        calls = "" if wrong.size == 1 else f" and {wrong.size - 1} more of {fits.size}"
        raise Disagrees(
            f"{WRONG} at call {i}{calls} (sigma {schedule.sigmas[i]:.4g}) "
            f"{text.format(*(value[i] for value in values))}"
        )


def _marginal(
    scheduler: Any,
    schedule: Schedule,
    blind: np.ndarray,
    stepped: Stepped,
    clean: torch.Tensor,
    eps: torch.Tensor,
) -> None:
    """Check `add_noise` and the steps of a scheduler that gives no x0."""
    if schedule.variance_exploding:
        raise Disagrees(f"{WRONG} it gives no x0 to hold ours against")
    x0, noise, left = _parts(stepped.after, clean, eps)
    unit = np.abs(x0**2 + noise**2 - 1)
    _agree(
        schedule,
        ~blind | ((unit <= EXACT) & (left <= EXACT)),
        "its step gives variance {:.4g} more or less than one",
        unit,
    )
    for i in np.flatnonzero(blind):
        t = torch.tensor([int(schedule.timesteps[i])] * len(clean))
        signal = _parts(
            scheduler.add_noise(clean, eps, t).reshape(1, len(clean), -1).double().numpy(),
            clean,
            eps,
        )[0]
        wanted = np.array([schedule.alpha_bars[i] ** 0.5])
        _agree(
            schedule,
            np.abs(signal - wanted) <= EXACT * wanted + ROUNDING,
            "its add_noise keeps {:.4g} of x0, not {:.4g}",
            signal,
            wanted,
        )


def _begins(
    scheduler: Any,
    schedule: Schedule,
    steps: int,
    begin: int,
    clean: torch.Tensor,
    eps: torch.Tensor,
) -> None:
    """Check that a run from a picture begins at the level of its first call."""
    set_steps(scheduler, steps)
    sigma, alpha_bar = np.array(schedule.sigmas[:1]), np.array(schedule.alpha_bars[:1])
    latents = started(scheduler, Start(clean, eps, 1.0, []), begin)
    mixed = latents.reshape(1, len(clean), -1).double().numpy()
    signal, noise, _ = _parts(mixed, clean, eps)
    wanted = (
        (np.ones(1), sigma)
        if schedule.variance_exploding
        else (np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    )
    fits = (np.abs(signal - wanted[0]) <= EXACT) & (
        np.abs(noise - wanted[1]) <= EXACT * np.maximum(1, wanted[1])
    )
    _agree(schedule, fits, "its add_noise begins at {:.4g} x0 {:+.3g} noise", signal, noise)


def _lands(
    schedule: Schedule,
    stepped: Stepped,
    clean: torch.Tensor,
    eps: torch.Tensor,
    undefined: np.ndarray,
) -> None:
    """Check that each step ends near the level of the next call.

    diffusers rounds timesteps, by less than half a step.
    """
    levels = np.sqrt(np.array(schedule.alpha_bars))
    reached = _parts(stepped.after, clean, eps)[0][:-1]
    off, room = np.abs(reached - levels[1:]), EXACT + 0.51 * np.abs(levels[1:] - levels[:-1])
    _agree(
        schedule,
        undefined | np.append(off <= room, True),
        "its step ends at {:.4g} of x0, the next call begins at {:.4g}",
        reached,
        levels[1:],
    )


def _clips(
    scheduler: Any,
    schedule: Schedule,
    steps: int,
    begin: int,
    clean: torch.Tensor,
    eps: torch.Tensor,
    unseen: np.ndarray,
) -> None:
    """Check that the scheduler's x0 is that of `clipped`, or that its eps follows from that."""
    clean = 4 * clean
    own = _stepped(fresh(scheduler), schedule, steps, begin, clean, eps).own
    signal = np.sqrt(np.array(schedule.alpha_bars)).reshape(-1, 1, 1, 1, 1)
    noise = np.sqrt(1 - signal**2)
    x0 = clipped(clean.double().numpy(), clipping(type(scheduler).__name__, scheduler.config))
    with np.errstate(divide="ignore", invalid="ignore"):
        as_eps = eps_from_denoised(
            x0, signal * clean.double().numpy() + noise * eps.double().numpy(), signal**2
        )
        off, off_eps = (
            np.abs(own - value.reshape(-1, *own.shape[1:])).max(axis=(1, 2))
            for value in (x0[None], as_eps)
        )
        size = np.maximum(1, np.sqrt(1 - signal**2) / signal).ravel()
    fits = (off <= EXACT + 10 * ROUNDING * size) | (off_eps <= EXACT * size)
    _agree(schedule, unseen | fits, "its clipped x0 is off by {:.3g}", off)
