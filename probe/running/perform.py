"""Run our own loop over a session: denoise to a picture, or predict the noise in a given one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from probe.diffusion.family import Call, Conditioning, Family, Predictions
from probe.diffusion.sampling import Step, arranged, denoise
from probe.diffusion.schedule import Schedule, fresh
from probe.diffusion.start import memory_formats
from probe.editing.editing import Editing, edited
from probe.running.session import Say, Session, StepStore
from probe.settings.noising import Noising
from probe.watching.interface import Plan
from probe.watching.source import Noised, Source
from probe.watching.sums import read_step

# The fields of an experiment that the loop takes.
SAMPLING = "steps guidance_scale guidance_rescale eta seed images height width".split()


def perform(
    model: Family,
    plan: Plan,
    writer: StepStore,
    say: Say,
    progress: bool,
    weights: Callable[[], str] | None = None,
) -> None:
    """Run a plan and record it. Steps that `writer` has already are replayed without the model.

    `weights` gives the digest of the weights, if the recording has none yet.
    """
    noising, final = isinstance(plan.recipe, Noising), None
    with Session(model, plan, writer, say, weights) as session:
        conditioning, editing = session.begin(), edited(model, plan)
        steps = (
            noised_steps(model, conditioning, plan, session.call)
            if noising
            else denoised_steps(model, conditioning, plan, writer, editing, session.call)
        )
        title = "Predicting" if noising else "Denoising"
        with tqdm(total=plan.calls, desc=title, unit="step", disable=not progress) as bar:
            for index in range(plan.calls):
                if editing is not None:
                    session.prepare(editing, index)
                if index < session.first:
                    step = next(steps)
                    session.replay(step)
                else:
                    with session.watching(index):
                        step = next(steps)
                    session.record(step)
                final = step.next_latents
                bar.set_postfix(sigma=f"{step.sigma:.2f}", refresh=False)
                bar.update()
        assert final is not None
        session.finish(final)


def denoised_steps(
    model: Family,
    conditioning: Conditioning,
    plan: Plan,
    writer: StepStore,
    editing: Editing | None = None,
    call: Call | None = None,
) -> Iterator[Step]:
    """Return the steps of a run; committed ones come from their recorded predictions."""
    how: dict[str, Any] = {name: getattr(plan.experiment, name) for name in SAMPLING}
    start = next((capture.start for capture in plan.captures if isinstance(capture, Source)), None)
    known = _recorded(writer, plan, model)
    if editing is not None:
        editing.bind(conditioning)
    where: dict[str, Any] = {"known": known, "start": start, "editing": editing, "call": call}
    return denoise(model, conditioning, **how, **where)


def noised_steps(
    model: Family, conditioning: Conditioning, plan: Plan, call: Call | None = None
) -> Iterator[Step]:
    """Return the steps of a noising, from the draws of noise that its capture holds."""
    capture = next(capture for capture in plan.captures if isinstance(capture, Noised))
    return ask_noised(model, conditioning, plan.schedule, capture.clean, capture.noise, call)


def ask_noised(
    model: Family,
    conditioning: Conditioning,
    schedule: Schedule,
    clean: torch.Tensor,
    noise: torch.Tensor,
    call: Call | None = None,
) -> Iterator[Step]:
    """Predict known noise in latents, at each timestep on its own: nothing is denoised.

    The `next_latents` of every step are the clean ones. `call` is asked in place of `model.call`.
    *Shape:* clean and noise (draw, channel, y, x).
    """
    scheduler, images = fresh(model.scheduler), len(clean)
    predict = model.predictor(conditioning, images, call=call)
    for index, timestep in enumerate(schedule.timesteps):
        t = torch.tensor(int(timestep), device=model.device)
        with torch.no_grad():
            x = scheduler.add_noise(clean, noise, t.repeat(images))
            said = predict(index, x, t)
        yield Step.of(schedule, index, x, said, clean, model.prediction_type)


def _recorded(writer: StepStore, plan: Plan, model: Family) -> Iterator[Predictions]:
    """Yield the predictions of the steps that were committed before."""
    how, stop = memory_formats(writer.attributes)["prediction"], plan.recipe.on_nan == "stop"

    def read(name: str, index: int) -> torch.Tensor:
        value = torch.from_numpy(read_step(writer, f"latents/{name}", index, stop))
        return arranged(value.to(model.device, model.dtype), how)

    for index in range(writer.committed):
        branches = {
            branch: read(f"prediction_{branch}", index) for branch in plan.computed_branches
        }
        yield Predictions(branches, read("prediction", index))
