"""Before a run, hold its schedule against the scheduler: what sigma, alpha_bar and denoised say
must be what the scheduler does.

    schedule = proven(scheduler, steps=50)     # the schedule; ExperimentError, by name, where it would not be true

A fresh scheduler is stepped through all its calls, over a small latent of which everything is
known: x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020), or x0 + sigma eps (Karras
et al. 2022, arXiv:2206.00364), and the prediction is that of a model that knows x0 and eps. At
every call, with clipping and thresholding off:

* `scale_model_input` divides by sqrt(sigma^2 + 1), or does nothing;
* the scheduler's own x0 is x0. If it keeps eps instead, that is asked again as v, which tells the
  level too. If it gives neither (PNDM), its step keeps the variance at one, and its `add_noise` has
  the same level;
* its step leads to the level of the next call.

Where clipping or thresholding is on, its x0 with them is held against `probe.conversions.clipped`
too. It must be stepped: without, Heun, KDPM2 and Euler do not know at which call they are. No
global random number is drawn.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probe.conversions import (
    PREDICTION_TYPES,
    UNCLIPPED,
    clipped,
    clipping,
    clipping_text,
    eps_from_denoised,
    target,
)
from probe.diffusion.family import Family
from probe.diffusion.sampling import Start, started, step_options
from probe.diffusion.schedule import Schedule, first_call, fresh, set_steps
from probe.errors import ExperimentError
from probe.settings.experiment import Experiment
from probe.text import first_line

SHAPE = (
    2,
    4,
    2,
    2,
)  # two images with opposite x0, and all else alike: their difference is free of the noise that a step adds
EXACT, ROUNDING = (
    1e-3,
    1e-5,
)  # what may differ: relative, and of the largest number in a formula (float32 has 6e-8)
OFF = {"clip_sample": False, "thresholding": False}
KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
)  # the model's, not the scheduler's
UNDEFINED = "there is no signal (alpha_bar 0), and the model predicts noise."
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
    """How a scheduler is not what its schedule says."""


def proven(
    scheduler: Any, steps: int, begin: int = 0, given: Collection[str] = (), finite: bool = True
) -> Schedule:
    """The schedule of `steps` steps from call `begin` on, held against the scheduler. `given` are
    the options that were asked for.

    With `finite`, what its steps make of finite predictions has to be finite too.

    Raises ExperimentError, which names the scheduler and, where one of them is the cause, its
    option.
    """
    kind = type(scheduler).__name__
    try:
        return _held(scheduler, steps, begin, finite)
    except Disagrees as problem:
        found, cause = problem, problem.__cause__
    refused = cause if isinstance(cause, ValueError | IndexError) else None
    if steps > int(scheduler.config.get("num_train_timesteps") or steps):
        raise too_many(scheduler, steps, refused or found) from found
    option = _culprit(scheduler, steps, begin, [name for name in given if name not in KEPT])
    if (
        option is None
        and refused
        and any(_holds(scheduler, fewer, 0) for fewer in (steps // 2, 10, 2) if 0 < fewer < steps)
    ):
        raise too_many(scheduler, steps, refused) from found
    if option is None:
        option = _culprit(
            scheduler,
            steps,
            begin,
            [name for name in _defaults(scheduler) if name not in (*given, *KEPT)],
        )
    named = (
        ""
        if option is None
        else f" with {option}: {json.dumps(scheduler.config[option], default=str)}"
    )
    raise ExperimentError(
        f"scheduler: {kind}{named} {found}.", _remedy(scheduler, option, given)
    ) from found


def _culprit(scheduler: Any, steps: int, begin: int, options: Collection[str]) -> str | None:
    """The first of some options without which the schedule holds."""
    defaults = _defaults(scheduler)
    changed = [name for name in options if scheduler.config.get(name) != defaults.get(name)]
    return next(
        (name for name in changed if _holds(scheduler, steps, begin, **{name: defaults[name]})),
        None,
    )


def _defaults(scheduler: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(scheduler).__init__).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not parameter.empty
    }


def _remedy(scheduler: Any, option: str | None, given: Collection[str]) -> str:
    other = "Euler" if type(scheduler).__name__ == "DDIMScheduler" else "DDIM"
    if option is not None:
        return (
            f"Set {option}: {json.dumps(_defaults(scheduler)[option])} in scheduler_options, or "
            f"use --scheduler {other} without them."
        )
    if "beta_start" not in scheduler.config:
        return (
            "Use another with the noise schedule of its training. Stable Diffusion's: scheduler: "
            f"{other}, and scheduler_options: "
            "{beta_start: 0.00085, beta_end: 0.012, beta_schedule: scaled_linear}."
        )
    return (
        "Use another scheduler: --scheduler "
        f"{other}{', without scheduler_options' if given else ''}."
    )


def _holds(scheduler: Any, steps: int, begin: int, **changes: Any) -> bool:
    """Whether it would hold with other options.

    They may be ones that diffusers does not take together.
    """
    try:
        _held(fresh(scheduler, **changes), steps, begin)
    except Exception:
        return False
    return True


def _held(scheduler: Any, steps: int, begin: int, finite: bool = True) -> Schedule:
    """The schedule, if it holds. Raises Disagrees, whatever it is that diffusers raises."""
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
    """Raise Disagrees unless `schedule` is what the scheduler does; `bare` is a fresh one without
    clipping.
    """
    kind, sigmas = str(scheduler.config.get("prediction_type")), np.array(schedule.sigmas)
    if kind not in PREDICTION_TYPES:
        raise Disagrees(f"{WRONG} its prediction type is {kind}")
    alpha_bars, exploding = np.array(schedule.alpha_bars), schedule.variance_exploding
    numbers = (
        (sigmas >= 0)
        & (alpha_bars >= 0)
        & (alpha_bars <= 1)
        & (np.isfinite(sigmas) | (not exploding))
    )
    _agree(schedule, numbers, "they are not numbers")
    if (rising := np.flatnonzero(sigmas[1:] > sigmas[:-1] * (1 + EXACT))).size:
        raise Disagrees(
            f"makes noise of pictures: its noise grows from call {rising[0]} to the next"
        )

    clean, eps = _latents()
    made = _stepped(bare, schedule, steps, begin, clean, eps)
    if (
        finite
        and not schedule.undefined(kind)
        and (lost := np.flatnonzero(~np.isfinite(made.after).all(axis=(1, 2)))).size
    ):
        raise Disagrees(
            f"does not work: its step {lost[0]} makes NaN or infinity of a finite prediction"
        )
    scale = 1 / np.sqrt(sigmas**2 + 1) if exploding else np.ones(len(sigmas))
    _agree(
        schedule,
        np.abs(made.factors - scale) <= EXACT * scale,
        "scale_model_input multiplies by {:.4g}, not {:.4g}",
        made.factors,
        scale,
    )

    x0, noise, left = _parts(made.own, clean, eps)
    slope = (
        np.where(alpha_bars > 0, sigmas, 0)
        if kind == "epsilon"
        else np.sqrt(alpha_bars * (1 - alpha_bars))
    )
    size = np.maximum(1, slope)
    floor = ROUNDING * size
    level = np.maximum(np.abs(x0 - 1) - EXACT, np.maximum(np.abs(noise) - EXACT * slope, left))
    as_eps = np.maximum(np.abs(noise - 1) - EXACT, np.maximum(np.abs(x0) - EXACT * slope, left))
    floor_eps = ROUNDING / np.sqrt(np.maximum(1 - alpha_bars, 1e-12))
    undefined = (alpha_bars == 0) & (kind == "epsilon")
    blind = np.isnan(made.own).all(axis=(1, 2)) & ~undefined
    if not blind.all() and (as_eps <= floor_eps)[~blind & ~undefined].all() and kind == "epsilon":
        as_v = {**OFF, "prediction_type": "v_prediction"}
        _compare(fresh(scheduler, **as_v), fresh(scheduler, **as_v), schedule, steps, begin)
    else:
        fits = blind | undefined | (level <= floor) | ((as_eps <= floor_eps) & (kind != "epsilon"))
        _agree(
            schedule,
            fits,
            "its own x0 is {:.4g} x0 {:+.3g} noise, though the prediction is right",
            x0,
            noise,
        )
    if begin:
        _begins(fresh(scheduler), schedule, steps, begin, clean, eps)
    if begin and blind.any():
        # begun in its middle, PNDM goes twice over its first step, as in diffusers: `remarks` says
        # so
        return _compare(scheduler, fresh(scheduler, **OFF), Schedule.of(scheduler, steps), steps, 0)
    if (
        blind.any() and kind == "v_prediction"
    ):  # what PNDM remembers is v of other levels; of eps, it is the same at all
        made = _stepped(
            fresh(scheduler, **OFF, prediction_type="epsilon"), schedule, steps, begin, clean, eps
        )
    if blind.any():
        _marginal(bare, schedule, blind, made, clean, eps)
    if not exploding:
        _lands(schedule, made, clean, eps, undefined)
    if clipping(type(scheduler).__name__, scheduler.config) or any(
        scheduler.config.get(name) for name in OFF
    ):
        _clips(scheduler, schedule, steps, begin, clean, eps, blind | undefined)


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
    """Step a fresh scheduler through the calls of `schedule`, each from latents of its level, with
    the prediction that knows them.
    """
    set_steps(scheduler, steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generators = [torch.Generator().manual_seed(0) for _ in range(len(clean))]
    options: dict[str, Any] = (
        {"order": 1} if "order" in inspect.signature(scheduler.step).parameters else {}
    )  # LMS: x0 is the same, and quick
    options.update(step_options(scheduler, 0.0, generators))
    kind, nothing = str(scheduler.config["prediction_type"]), torch.full(clean.shape, torch.nan)
    factors, own, after = [], [], []
    for t, sigma, alpha_bar in zip(
        scheduler.timesteps[begin:], schedule.sigmas, schedule.alpha_bars, strict=True
    ):
        signal, noise = (
            (1.0, sigma)
            if schedule.variance_exploding
            else (alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
        )
        latents = signal * clean + noise * eps
        scaled = scheduler.scale_model_input(latents, t)
        out = scheduler.step(target(clean, eps, alpha_bar, kind), t, latents, **options)
        found = _own(scheduler, out, t, latents)
        factors.append(
            (scaled.flatten() @ latents.flatten()) / (latents.flatten() @ latents.flatten())
        )
        own.append(nothing if found is None else found)
        after.append(out.prev_sample if hasattr(out, "prev_sample") else out[0])
    shape = (len(own), len(clean), -1)
    return Stepped(
        *(
            torch.stack(values).reshape(*shape[: 1 if i == 0 else 3]).double().numpy()
            for i, values in enumerate((factors, own, after))
        )
    )


def _own(scheduler: Any, out: Any, t: Any, latents: torch.Tensor) -> torch.Tensor | None:
    """The scheduler's own x0 at the call just made, or its eps where it keeps that; None where it
    has neither.
    """
    found: torch.Tensor | None = getattr(out, "pred_original_sample", None)
    if found is None and hasattr(out, "denoised"):  # LCM: between x0 and what went in
        skip, whole = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (out.denoised - skip * latents) / whole if float(whole) > EXACT else None
    if found is None and getattr(
        scheduler, "model_outputs", None
    ):  # the multistep solvers keep what `convert_model_output` gave
        return scheduler.model_outputs[-1]  # type: ignore[no-any-return]
    return found


def _parts(
    values: np.ndarray, clean: torch.Tensor, eps: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much x0 and how much eps are in values, and the most that is left over.

    *Shape:* (call, image, value) -> each (call).
    """
    one, other = (part[0].double().numpy().ravel() for part in (clean, eps))
    with np.errstate(invalid="ignore"):
        x0 = (values[:, 0] - values[:, 1]) @ one / (2 * one @ one)
        noise = (values[:, 0] + values[:, 1]) @ other / (2 * other @ other)
        left = values[:, 0] - x0[:, None] * one - noise[:, None] * other
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
    made: Stepped,
    clean: torch.Tensor,
    eps: torch.Tensor,
) -> None:
    """Of a scheduler that gives no x0: its `add_noise` and its steps."""
    if schedule.variance_exploding:
        raise Disagrees(f"{WRONG} it gives no x0 to hold ours against")
    x0, noise, left = _parts(made.after, clean, eps)
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
    """A picture with noise in it, from which a run begins, is at the level of its first call."""
    set_steps(scheduler, steps)
    sigma, alpha_bar = np.array(schedule.sigmas[:1]), np.array(schedule.alpha_bars[:1])
    mixed = (
        started(scheduler, Start(clean, eps, 1.0, []), begin)
        .reshape(1, len(clean), -1)
        .double()
        .numpy()
    )
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
    schedule: Schedule, made: Stepped, clean: torch.Tensor, eps: torch.Tensor, undefined: np.ndarray
) -> None:
    """Each step ends nearer to the level of the next call than to that of this one: diffusers
    rounds timesteps, by less than half a step.
    """
    levels, found = np.sqrt(np.array(schedule.alpha_bars)), _parts(made.after, clean, eps)[0][:-1]
    off, room = np.abs(found - levels[1:]), EXACT + 0.51 * np.abs(levels[1:] - levels[:-1])
    _agree(
        schedule,
        undefined | np.append(off <= room, True),
        "its step ends at {:.4g} of x0, the next call begins at {:.4g}",
        found,
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
    """The scheduler's x0 as it goes on with it is that of `clipped`, or its eps follows from
    that.
    """
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


# --- what a plan says of its schedule -------------------------------------------------------------


def held_schedule(model: Family, experiment: Experiment, begin: int) -> Schedule:
    """The schedule of a run to come, held against its scheduler.

    Raises ExperimentError, also where the latents would be infinite.
    """
    schedule = proven(
        model.scheduler,
        experiment.steps,
        begin,
        tuple(experiment.scheduler_options),
        experiment.on_nan == "stop",
    )
    _refuse_infinity(model, experiment, schedule)
    return schedule


def recorded_schedule(model: Family, experiment: Experiment) -> Schedule:
    """The schedule of a recording, which is what it is: today's check does not refuse what was
    recorded before. Raises ExperimentError.
    """
    begin = (
        0
        if experiment.image is None
        else first_call(model.scheduler, experiment.steps, experiment.strength)
    )
    try:
        return model.schedule(experiment.steps, experiment.height, experiment.width, begin)
    except (ValueError, IndexError) as problem:
        raise too_many(model.scheduler, experiment.steps, problem) from problem


def too_many(scheduler: Any, steps: int, problem: Exception) -> ExperimentError:
    """What to say of a number of steps that a scheduler does not take."""
    trained, most = (
        scheduler.config.get("num_train_timesteps"),
        scheduler.config.get("original_inference_steps") or steps,
    )
    fewer = (
        f"Use fewer: this model was trained on {trained} timesteps, and some schedulers need a few "
        "to spare."
    )
    # LCM
    at_most = (
        f"Write at most {most}, or set scheduler_options: {{original_inference_steps: {steps}}}."
    )
    why = problem if steps <= most else f"its original_inference_steps are {most}"
    return ExperimentError(
        f"steps: {type(scheduler).__name__} refuses {steps} ({why}).",
        fewer if steps <= most else at_most,
    )


def _refuse_infinity(model: Family, experiment: Experiment, schedule: Schedule) -> None:
    """Refuse a run whose latents would be infinite after its first step. Raises ExperimentError."""
    kind, config = type(model.scheduler).__name__, model.scheduler.config
    if (
        experiment.on_nan == "record"
        or clipping(kind, config)
        or not (calls := schedule.undefined(model.prediction_type))
    ):
        return
    given = [name for name in ("trained_betas", *KEPT[:4]) if name in experiment.scheduler_options]
    remedy = (
        "Set rescale_betas_zero_snr: false"
        if config.get("rescale_betas_zero_snr")
        else f"Change {' or '.join(given or ['trained_betas'])}"
    )
    raise ExperimentError(
        f"scheduler: {kind} divides by 0 at step {calls[0]}: {UNDEFINED}",
        f"{remedy} in scheduler_options; on_nan: record writes the infinities down.",
    )


def remarks(model: Family, schedule: Schedule, begin: int) -> tuple[str, ...]:
    """What whoever asks for a run should know of its noise levels before it begins."""
    said: list[str] = []
    if (
        begin and type(model.scheduler).__name__ == "PNDMScheduler"
    ):  # it takes the second of these calls for its own second of the first step
        said.append(
            "PNDM, begun from a picture, goes over its first step twice: from step 2 on, the "
            "latents hold the noise of the step before."
        )
    if model.prediction_type != "epsilon":
        return tuple(said)
    said += [
        f"At step {index}, denoised is not defined: {UNDEFINED}"
        for index in schedule.undefined("epsilon")
    ]
    # At zero terminal SNR, some schedulers put alpha_bar 2^-24 in the place of 0 (Lin et al. 2023,
    # arXiv:2305.08891).
    said += [
        f"At step {index}, sigma is {sigma:.0f}: denoised is what is left of the latents without "
        "the predicted noise, times that."
        for index, sigma in enumerate(schedule.sigmas)
        if 1000 < sigma < float("inf")
    ]
    return tuple(said)


def unclipped_note(scheduler: Any) -> dict[str, str]:
    """The attribute of what is made of x0 as the model says it, where the scheduler limits it
    before it goes on. Raises ExperimentError.
    """
    try:
        how = clipping(type(scheduler).__name__, scheduler.config)
    except ValueError as problem:
        raise ExperimentError(
            f"scheduler: {type(scheduler).__name__}: {problem}.",
            "Set thresholding: false in its config.",
        ) from problem
    return {} if how is None else {"unclipped": UNCLIPPED.format(clipping_text(how))}
