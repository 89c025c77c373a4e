"""A recording's numbers computed again without the model: noise levels, guidance, latents.

    schedule     step, timestep, sigma and alpha_bar are those of the recorded scheduler
    guidance     the scheduler's input follows from the two branches, rescale included
    scheduler    the seed's noise and the recorded predictions give every latent

If this machine shares all that decides bits with the one that recorded, only the same bits pass.
Otherwise a small difference passes, and the reasons are named.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probe.diffusion.defaults import plain_defaults
from probe.diffusion.draws import noise
from probe.diffusion.guidance import guided
from probe.diffusion.model_configs import scheduler_config
from probe.diffusion.sampling import arranged, memory_format, started, step_options
from probe.diffusion.schedule import Schedule, first_call, set_steps
from probe.diffusion.start import memory_formats, restart
from probe.editing.noise import mixed_noise, noise_of
from probe.errors import ExperimentError, RecordingDamaged
from probe.format.dimensions import GUIDANCE_RULES
from probe.proof.checks import Check, Tally
from probe.proof.map_checks import relative
from probe.reading.compare import differing_conditions
from probe.reading.recording import Run
from probe.settings.edits import Latents, Noise, guidance_by_step
from probe.settings.experiment import Experiment
from probe.settings.fields import SCHEDULERS
from probe.system import processor
from probe.text import printable, shown

# Of the greatest value of a step. A scheduler divides by sqrt(alpha_bar), 0.07 at first: rounding
# grows some fifteenfold.
TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 4e-1}
NOT_FINITE = ("inf", "-inf", "nan")  # as text, for JSON has no such numbers


@dataclass(frozen=True)
class Call:
    """A call of the model, replayed.

    `replayed` are the latents that the scheduler made of everything before, `latents` those that
    were recorded. `model_input` is scaled and has one row an image. After the last call of a
    complete run comes one more, for the final latents, without `model_input`. Where a donor's
    latents went in, `replayed` are those recorded, and `made` what the scheduler had made.
    """

    index: int
    t: Any
    replayed: torch.Tensor
    latents: torch.Tensor
    stored: np.ndarray
    model_input: torch.Tensor | None
    made: torch.Tensor | None = None


def replayed(run: Run, device: torch.device | str = "cpu") -> Iterator[Call]:
    """Yield the committed calls of a run, each from its recorded latents.

    A fresh scheduler is used, and no model.
    """
    if run.kind == "noising":
        yield from _noised(run, device)
        return
    experiment = run.experiment
    if not len(run.steps):
        return
    scheduler = rebuild_scheduler(run)
    set_steps(scheduler, experiment.steps, device)
    stored, begin = run.latents, _begin(run, scheduler)
    if experiment.image is None:
        shape = stored.isel(
            step=0
        ).values.shape  # read first: sizes are claimed, and noise of that size would be made
        pure, generators = noise(experiment.seed, shape, run_dtype(run))
        pure, known = edited_noise(pure, experiment)
        replayed_latents = pure.to(device) * scheduler.init_noise_sigma
        if not known:  # its file is not here any more
            replayed_latents = tensor(run, stored.isel(step=0).values).to(device)
    else:
        clean = clean_of(run).to(device)
        start = restart(experiment, clean, encoded=int(run.attributes["model"]["f"]) > 1)
        replayed_latents, generators = started(scheduler, start, begin), start.generators
    options, entered = step_options(scheduler, experiment.eta, generators), entered_steps(run)
    for index, t in enumerate(scheduler.timesteps[begin:][: len(run.steps)]):
        values, made = stored.isel(step=index).values, None
        if index in entered:  # a donor's latents went in, which the recording cannot tell
            made, replayed_latents = replayed_latents, tensor(run, values).to(device)
        latents = arranged(tensor(run, values).to(device), memory_format(replayed_latents))
        with torch.no_grad():
            model_input = scheduler.scale_model_input(latents, t)
        yield Call(index, t, replayed_latents, latents, values, model_input, made)
        with torch.no_grad():
            prediction = prediction_of(run, index).to(device)
            replayed_latents = scheduler.step(prediction, t, latents, **options, return_dict=False)[
                0
            ]
    if run.status == "complete":
        values = run.variable("latents/final_latents").values
        yield Call(
            len(run.steps),
            None,
            replayed_latents,
            arranged(tensor(run, values).to(device), memory_format(replayed_latents)),
            values,
            None,
        )


def edited_noise(pure: torch.Tensor, experiment: Experiment) -> tuple[torch.Tensor, bool]:
    """Return a first noise after its edits, and whether it is known: a file may be gone."""
    for edit in experiment.edits:
        if isinstance(edit, Noise):
            try:
                other = noise_of(edit, tuple(pure.shape), pure.dtype)
            except ExperimentError:
                return pure, False
            pure = mixed_noise(pure, other.to(pure), edit)
    return pure, True


def noise_is_here(run: Run) -> bool:
    """Return whether every file that an edit of the first noise names is here, and fits."""
    files = [edit for edit in run.experiment.edits if isinstance(edit, Noise) and edit.file]
    if not files or not len(run.steps):
        return True
    shape = run.latents.isel(step=0).values.shape  # read first: sizes are claimed
    try:
        for edit in files:
            noise_of(edit, shape, torch.float32)
    except ExperimentError:
        return False
    return True


def entered_steps(run: Run) -> set[int]:
    """Return the steps of a run into which another run's latents went."""
    sigmas = run.variable("sigma").values.tolist()
    return {
        step
        for edit in run.experiment.edits
        if isinstance(edit, Latents) and edit.amount
        for step in edit.steps_of(sigmas)
    }


def _noised(run: Run, device: torch.device | str) -> Iterator[Call]:
    """Yield the timesteps of a noising: the noise of its seeds, mixed into its clean latents."""
    scheduler, stored = rebuild_scheduler(run), run.latents
    clean = clean_of(run).to(device)
    eps = noise(run.noising.seed, tuple(clean.shape), run_dtype(run))[0].to(device)
    for index, timestep in enumerate(run.noising.timesteps[: len(run.steps)]):
        values, t = stored.isel(step=index).values, torch.tensor(int(timestep), device=device)
        replayed_latents = scheduler.add_noise(clean, eps, t.repeat(len(clean)))
        latents = arranged(tensor(run, values).to(device), memory_format(replayed_latents))
        yield Call(index, t, replayed_latents, latents, values, latents)
    if run.status == "complete":
        values = run.variable("latents/final_latents").values
        yield Call(
            len(run.steps),
            None,
            clean,
            arranged(tensor(run, values).to(device), memory_format(clean)),
            values,
            None,
        )


def _begin(run: Run, scheduler: Any) -> int:
    """Return which of the scheduler's calls is the run's first."""
    experiment = run.experiment
    return (
        0
        if experiment.image is None
        else first_call(scheduler, experiment.steps, experiment.strength)
    )


def rebuild_scheduler(run: Run) -> Any:
    """Return a fresh scheduler as the run had it, from the recording alone.

    Raises RecordingDamaged if diffusers has none of that name.
    """
    import diffusers

    kind = getattr(diffusers, str(run.attributes["scheduler"]["class"]), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise RecordingDamaged(
            f"{run.name} names a scheduler that diffusers does not have.",
            "Use the version of diffusers that recorded it.",
        )
    config = {
        key: value
        for key, value in run.attributes["scheduler"]["config"].items()
        if not key.startswith("_")
    }
    scheduler_config(
        f"{run.name}: its {kind.__name__}",
        config,
        lambda cause: RecordingDamaged(printable(cause), "Record it again, or remove it."),
    )
    return kind.from_config(
        {key: float(value) if value in NOT_FINITE else value for key, value in config.items()}
    )


def run_dtype(run: Run) -> torch.dtype:
    """Return the number format of the run. Raises ValueError for one that no run has."""
    name = run.attributes["model"]["dtype"]
    if name not in TOLERANCE:
        raise ValueError(f"{name!r} is not a number format of a run")
    kind: torch.dtype = getattr(torch, name)
    return kind


def tensor(run: Run, value: np.ndarray) -> torch.Tensor:
    """Return a recorded value in the run's own number format.

    Raises ValueError if it is not one that this format has.
    """
    stored = torch.from_numpy(np.array(value))
    value_then = stored.to(run_dtype(run))
    if not np.array_equal(numbers(value_then), value, equal_nan=True):
        raise ValueError(f"it holds a value that {run.attributes['model']['dtype']} does not have")
    return value_then


def clean_of(run: Run) -> torch.Tensor:
    """Return the picture's latents, in the memory layout that they had."""
    return arranged(
        tensor(run, run.variable("forward/clean").values), memory_formats(run.attributes)["clean"]
    )


def prediction_of(run: Run, index: int, branch: str | None = None) -> torch.Tensor:
    """Return the model's output at a step, or what the scheduler got (None).

    It has the memory layout that it had.
    """
    return arranged(
        tensor(run, run.prediction(branch).isel(step=index).values),
        memory_formats(run.attributes)["prediction"],
    )


def numbers(value: torch.Tensor) -> np.ndarray:
    """Return a tensor as it would be stored: bfloat16, which numpy lacks, as float32."""
    array: np.ndarray = (
        (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
    )
    return array


@contextlib.contextmanager
def threads_of(run: Run) -> Iterator[None]:
    """Use as many threads as the run had, if this machine has as many cores, and torch's defaults.

    The bits of sums depend on the first, those of schedulers on the others.
    """
    before, wanted = torch.get_num_threads(), run.attributes["environment"].get("threads")
    if isinstance(wanted, int) and 1 <= wanted <= (os.cpu_count() or 1):
        torch.set_num_threads(wanted)
    try:
        with plain_defaults():
            yield
    finally:
        torch.set_num_threads(before)


def conditions(run: Run) -> tuple[str, ...]:
    """Return what decides the bits of scheduler and guidance and is different here."""
    import diffusers

    there = run.attributes
    changed = {
        "device": "cpu",
        "device_name": processor(torch.backends.cpu.get_cpu_capability()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    return tuple(
        differing_conditions(there, {**there, "environment": {**there["environment"], **changed}})
    )


def check_schedule(run: Run) -> Check:
    """Check the noise levels, and that the scheduler is the one that was asked for."""
    recipe, config = run.recipe, run.attributes["scheduler"]["config"]
    scheduler = rebuild_scheduler(run)
    if isinstance(recipe, Experiment):
        schedule = Schedule.of(scheduler, recipe.steps, _begin(run, scheduler))
    else:
        schedule = Schedule.at(scheduler, recipe.timesteps)
    what = f"timestep, sigma and alpha_bar of {type(scheduler).__name__}"
    if calls := schedule.undefined(str(run.attributes["prediction_type"])):
        steps = ", ".join(map(str, calls))
        what += f"; denoised is not defined at step {steps}, where there is no signal"
    tally = Tally("schedule", what, 1e-4, conditions(run))
    if (named := config.get("_class_name", type(scheduler).__name__)) != type(scheduler).__name__:
        tally.fail(f"its config is of {shown(named)}")
    sampler, own = recipe.sampler
    kind, options = SCHEDULERS.get(sampler, (type(scheduler).__name__, {}))
    if type(scheduler).__name__ != kind:
        tally.fail(f"{type(scheduler).__name__} was recorded, {sampler} was asked for")
    for name, value in {**options, **own}.items():
        if (list(value) if isinstance(value, tuple) else value) != config.get(name):
            tally.fail(f"{name} is {config.get(name)!r}, {value!r} was asked for")
    convention = "variance_exploding" if schedule.variance_exploding else "variance_preserving"
    for name, expected in (
        ("latent_convention", convention),
        ("prediction_type", scheduler.config.prediction_type),
    ):
        if run.attributes[name] != expected:
            tally.fail(f"{name} is {run.attributes[name]}, the scheduler's is {expected}")
    if isinstance(recipe, Experiment):
        set_steps(scheduler, recipe.steps)
    table = [float(s) for s in getattr(scheduler, "sigmas", schedule.sigmas)]
    wanted = {
        "step": range(len(schedule.timesteps)),
        "timestep": schedule.timesteps,
        "sigma": schedule.sigmas,
        "alpha_bar": schedule.alpha_bars,
    }
    for name, values in {**wanted, "latents/scheduler_sigmas": table}.items():
        recorded = run.variable(name).values
        if recorded.shape != (len(values),):
            tally.fail(f"{name} has {recorded.size} values, the scheduler {len(values)}")
            continue
        expected = np.array(values, dtype=recorded.dtype)
        wrong = np.flatnonzero(expected != recorded)
        tally.add(relative(expected, recorded), f"{name}, step {wrong[0] if wrong.size else 0}")
    return tally.check()


def check_guidance(run: Run) -> Check:
    """Check uncond + s (cond - uncond), computed with torch in the run's number format."""
    (scale, rescale), rule = run.recipe.guidance, run.attributes.guidance_rule
    edits = run.experiment.edits if isinstance(run.recipe, Experiment) else ()
    levels = guidance_by_step(scale, rescale, edits, run.variable("sigma").values.tolist())
    if rule is not None and rule not in GUIDANCE_RULES:
        return Check("guidance", "not checked", f"this version does not know the rule {rule}")
    what = "no guidance: the scheduler got the conditional prediction"
    if scale > 1:
        rescaled = f", rescaled by {rescale:g}" if rescale else ""
        what = f"uncond + {scale:g} (cond - uncond){rescaled}"
        what += "; edited at some steps" if len(set(levels)) > 1 else ""
    tally = Tally(
        "guidance", what, TOLERANCE[str(run_dtype(run)).removeprefix("torch.")], conditions(run)
    )
    for index, step in enumerate(run.steps):
        given = run.prediction().isel(step=index).values
        names = ("uncond", "cond") if scale > 1 else ("cond",)
        with torch.no_grad():
            branches = {branch: prediction_of(run, index, branch) for branch in names}
            guided_again = guided(branches, *levels[index])
        tally.add(
            relative(numbers(guided_again), given),
            f"step {step}{_image(numbers(guided_again), given)}",
        )
    return tally.check()


def check_scheduler(run: Run) -> Check:
    """Check every latent: it follows from the seed's noise and the recorded predictions."""
    how = f"{run.attributes['scheduler']['class']} replayed from the seed's noise"
    if isinstance(run.recipe, Experiment):
        how += " in the picture's latents" if run.recipe.image is not None else ""
        if entered := entered_steps(run):
            how += (
                f"; a donor gave the latents of {len(entered)} steps, which are taken as recorded"
            )
        if not noise_is_here(run):
            how += "; the file of its first noise is not here, so that is taken as recorded"
    else:
        how = "the seeds' noise in the picture's latents, at every timestep; nothing is denoised"
    tally = Tally(
        "scheduler", how, TOLERANCE[str(run_dtype(run)).removeprefix("torch.")], conditions(run)
    )
    for call in replayed(run):
        latents = numbers(call.replayed)
        where = "final_latents" if call.model_input is None else f"step {call.index}"
        tally.add(relative(latents, call.stored), f"{where}{_image(latents, call.stored)}")
    return tally.check()


def _image(computed: np.ndarray, recorded: np.ndarray) -> str:
    """Return which image, channel and pixel is off the most."""
    same = (computed == recorded) | (np.isnan(computed) & np.isnan(recorded))
    with np.errstate(invalid="ignore"):  # on_nan: record leaves infinities
        off = np.where(same, 0, np.abs(computed.astype(np.float64) - recorded))
    image, channel, y, x = np.unravel_index(int(off.argmax()), off.shape)
    return f", image {image}, channel {channel}, y {y}, x {x}"
