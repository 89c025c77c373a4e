"""Before a run, hold its schedule against its scheduler, and say what its noise levels mean.

    schedule = proven(scheduler, steps=50)

The result is the schedule. Where it would not be true, the ExperimentError names the scheduler and
the option that is to blame. What is compared is in `probe.diffusion.scheduler_trial`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from probe.conversions import UNCLIPPED, clipping, clipping_text
from probe.diffusion.family import Family
from probe.diffusion.schedule import Schedule, first_call, fresh
from probe.diffusion.scheduler_trial import Disagrees, held
from probe.errors import ExperimentError
from probe.settings.experiment import Experiment

# Options that belong to the model, and not to its scheduler.
KEPT = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
UNDEFINED = "there is no signal (alpha_bar 0), and the model predicts noise."


def proven(
    scheduler: Any,
    steps: int,
    begin: int = 0,
    given: Mapping[str, Any] = MappingProxyType({}),
    finite: bool = True,
) -> Schedule:
    """Return the schedule of `steps` steps from call `begin` on, proven against the scheduler.

    `given` are the options that the experiment sets. With `finite`, steps from finite predictions
    must give finite latents. Raise ExperimentError, which names the scheduler and the option that
    is the cause.
    """
    kind = type(scheduler).__name__
    try:
        return held(scheduler, steps, begin, finite)
    except Disagrees as problem:
        disagreement, cause = problem, problem.__cause__
    refused = cause if isinstance(cause, ValueError | IndexError) else None
    if steps > int(scheduler.config.get("num_train_timesteps") or steps):
        raise too_many(scheduler, steps, refused or disagreement) from disagreement
    option = _culprit(scheduler, steps, begin, [name for name in given if name not in KEPT], given)
    if (
        option is None
        and refused
        and any(_holds(scheduler, fewer, 0) for fewer in (steps // 2, 10, 2) if 0 < fewer < steps)
    ):
        raise too_many(scheduler, steps, refused) from disagreement
    if option is None:
        others = [name for name in _defaults(scheduler) if name not in (*given, *KEPT)]
        option = _culprit(scheduler, steps, begin, others, given)
    named = ""
    if option is not None:
        named = f" with {option}: {json.dumps(scheduler.config[option], default=str)}"
    raise ExperimentError(
        f"scheduler: {kind}{named} {disagreement}.", _remedy(scheduler, option, given)
    ) from disagreement


def _culprit(
    scheduler: Any, steps: int, begin: int, options: Collection[str], given: Mapping[str, Any]
) -> str | None:
    """Return the first of some options without which the schedule holds; None if there is none.

    The others stay as they were `given`: a scheduler may keep one under another name (deis).
    """
    defaults = _defaults(scheduler)
    changed = [name for name in options if scheduler.config.get(name) != defaults.get(name)]
    return next(
        (
            name
            for name in changed
            if _holds(scheduler, steps, begin, **{**given, name: defaults[name]})
        ),
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
    """Return whether the schedule would hold with other options."""
    try:
        held(fresh(scheduler, **changes), steps, begin)
    except Exception:  # diffusers may not take these options together
        return False
    return True


def held_schedule(model: Family, experiment: Experiment, begin: int) -> Schedule:
    """Return the schedule of a run to come, proven against its scheduler.

    Raise ExperimentError if it is not true, or the latents would be infinite.
    """
    schedule = proven(
        model.scheduler,
        experiment.steps,
        begin,
        experiment.scheduler_options,
        experiment.on_nan == "stop",
    )
    _refuse_infinity(model, experiment, schedule)
    return schedule


def recorded_schedule(model: Family, experiment: Experiment) -> Schedule:
    """Return the schedule of a recording, which may be older than today's check.

    Raise ExperimentError if the scheduler does not take so many steps.
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
    """Return the error for a number of steps that a scheduler does not take."""
    trained = scheduler.config.get("num_train_timesteps")
    most = scheduler.config.get("original_inference_steps") or steps  # of LCM
    why: object = problem
    remedy = (
        f"Use fewer: this model was trained on {trained} timesteps, and some schedulers need a few "
        "to spare."
    )
    if steps > most:
        why = f"its original_inference_steps are {most}"
        own = f"{{original_inference_steps: {steps}}}"
        remedy = f"Write at most {most}, or set scheduler_options: {own}."
    return ExperimentError(f"steps: {type(scheduler).__name__} refuses {steps} ({why}).", remedy)


def _refuse_infinity(model: Family, experiment: Experiment, schedule: Schedule) -> None:
    """Raise ExperimentError for a run whose latents would be infinite after its first step."""
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
    """Return what people should know of a run's noise levels before it begins."""
    lines: list[str] = []
    if begin and type(model.scheduler).__name__ == "PNDMScheduler":
        # It takes the second of these calls for its own second of the first step.
        lines.append(
            "PNDM, begun from a picture, goes over its first step twice: from step 2 on, the "
            "latents hold the noise of the step before."
        )
    if model.prediction_type != "epsilon":
        return tuple(lines)
    lines += [
        f"At step {index}, denoised is not defined: {UNDEFINED}"
        for index in schedule.undefined("epsilon")
    ]
    # At zero terminal SNR, some schedulers put alpha_bar 2^-24 in the place of 0 (Lin et al. 2023,
    # arXiv:2305.08891).
    lines += [
        f"At step {index}, sigma is {sigma:.0f}: denoised is what is left of the latents without "
        "the predicted noise, times that."
        for index, sigma in enumerate(schedule.sigmas)
        if 1000 < sigma < float("inf")
    ]
    return tuple(lines)


def unclipped_note(scheduler: Any) -> dict[str, str]:
    """Return the attribute of variables made of an x0 that the scheduler clips before it goes on.

    Raise ExperimentError for a clipping that is not known.
    """
    try:
        how = clipping(type(scheduler).__name__, scheduler.config)
    except ValueError as problem:
        raise ExperimentError(
            f"scheduler: {type(scheduler).__name__}: {problem}.",
            "Set thresholding: false in its config.",
        ) from problem
    return {} if how is None else {"unclipped": UNCLIPPED.format(clipping_text(how))}
