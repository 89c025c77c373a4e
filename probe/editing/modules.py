"""Edits of what modules of the UNet put out, of its skip connections, and steering."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.editing.donors import Beside, refuse_other_run
from probe.editing.targets import chosen_skips, modules_of, rows_of
from probe.editing.values import ablated, blended, random_like
from probe.errors import CaptureError, ExperimentError, RecordingNotFound
from probe.reading.recording import Run, open_run
from probe.settings.edits import Output, Skip, Steer
from probe.settings.fields import expand_home
from probe.watching.hooks import Change
from probe.watching.interface import Plan

ModuleEdit = Output | Skip | Steer


@dataclass(frozen=True)
class InModules:
    """One edit of modules, found in this run. `modules` has the channels of each skip, else 0."""

    edit: ModuleEdit
    steps: tuple[int, ...]
    rows: list[int]
    modules: dict[str, int]
    donor: Beside | None = None
    toward: Run | None = None
    away: Run | None = None

    def sets(self) -> Iterator[tuple[Any, ...]]:
        """Yield what the whole edit determines, so that no other edit can as well."""
        if not isinstance(self.edit, Steer):
            part = "skip" if isinstance(self.edit, Skip) else "output"
            yield from ((part, path, row) for path in self.modules for row in self.rows)


def found(model: Family, plan: Plan, edit: ModuleEdit, donor: Beside | None) -> InModules:
    """Find an edit's modules and rows. Raise ExperimentError where there are none."""
    steps, rows = edit.steps_of(plan.schedule.sigmas), rows_of(plan, edit.branch)
    if isinstance(edit, Skip):
        return InModules(edit, steps, rows, chosen_skips(model, plan, edit.modules), donor)
    modules = dict.fromkeys(modules_of(plan, edit.modules), 0)
    if isinstance(edit, Output):
        _refuse_mean(plan, edit, modules)
        return InModules(edit, steps, rows, modules, donor)
    runs = [_steering(model, edit, name, plan, modules) for name in ("toward", "away")]
    return InModules(edit, steps, rows, modules, None, *runs)


def _refuse_mean(plan: Plan, edit: Output, modules: Iterable[str]) -> None:
    """Raise ExperimentError for the mean over the places of an output that has none."""
    for path in modules:
        shape = plan.rehearsal.outputs[f"unet.{path}"]
        if edit.how == "mean" and len(shape) < 3:
            raise ExperimentError(
                f"how: the output of {path} has shape {shape}: no places to take a mean over.",
                "Write how: zero or resample, or name another module.",
            )


def _steering(model: Family, edit: Steer, field: str, plan: Plan, modules: dict[str, int]) -> Run:
    """Open a recording that steers. Raise ExperimentError if it has not what is needed."""
    path = expand_home(str(getattr(edit, field)))
    run = open_run(path, expand_home(plan.recipe.output))
    refuse_other_run(field, run, model, plan)
    captured = run.recipe.capture.steps_of(len(run.steps))
    if lacking := set(edit.steps_of(plan.schedule.sigmas)) - set(captured):
        raise ExperimentError(
            f"{field}: {run.name} holds no outputs of step {min(lacking)}.",
            "Let the edit act at steps that it holds, or record it with capture.steps: all.",
        )
    for module in modules:
        try:
            recorded = run.variable(_variable(module))
        except RecordingNotFound:
            raise ExperimentError(
                f"{field}: {run.name} holds no output of {module}.",
                f'Record it with capture.activations: ["unet.{module}"].',
            ) from None
        shape = plan.rehearsal.outputs[f"unet.{module}"][1:]
        branches = [str(branch) for branch in recorded["branch"].values]
        if recorded.shape[3:] != shape or branches != list(plan.computed_branches):
            raise ExperimentError(
                f"{field}: {run.name} has outputs of {module} of another shape or branch.",
                "Take recordings of the same model and size, with or without guidance as here.",
            )
    return run


def _variable(module: str) -> str:
    return f"unet/{module}/activation"


class ModuleEdits:
    """All edits of modules of a run: the changes at each step."""

    def __init__(self, model: Family, plan: Plan, edits: Sequence[InModules]):
        self._modules: dict[str, Any] = dict(model.unet.named_modules())
        self._plan, self._edits = plan, list(edits)
        for one in self._edits:
            when = "input" if isinstance(one.edit, Skip) else "output"
            for path in one.modules if one.donor is not None else ():
                assert one.donor is not None
                watch = self._modules[path], when, lambda _: None
                one.donor.watch((path, when), watch, one.steps)  # type: ignore[arg-type]

    def changes(self, step: int) -> Iterator[tuple[str, Change]]:
        """Yield the changes of a step, each with a name, in the order in which they are made."""
        for one in self._edits:
            for path, channels in one.modules.items() if step in one.steps else ():
                module = self._modules[path]
                if isinstance(one.edit, Steer):
                    yield path, (module, "output", self._steer(path, one, step))
                elif isinstance(one.edit, Skip):
                    yield path, (module, "input", self._skip(path, one, step, channels))
                else:
                    yield path, (module, "output", self._output(path, one, step))

    def _output(
        self, path: str, one: InModules, step: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(output: torch.Tensor) -> torch.Tensor:
            donated = None if one.donor is None else one.donor.values[path, "output"][one.rows]
            edited = output.clone()
            edited[one.rows] = _edited(output[one.rows], one, donated, step, path)
            return edited

        return change

    def _skip(
        self, path: str, one: InModules, step: int, channels: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(given: torch.Tensor) -> torch.Tensor:
            donated = None
            if one.donor is not None:
                donated = one.donor.values[path, "input"][one.rows, -channels:]
            edited = given.clone()
            own = given[one.rows, -channels:]
            edited[one.rows, -channels:] = _edited(own, one, donated, step, path)
            return edited

        return change

    def _steer(
        self, path: str, one: InModules, step: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        assert one.toward is not None and one.away is not None
        sides = [run.variable(_variable(path)).isel(step=step) for run in (one.toward, one.away)]
        # The mean over images: (branch, ...), the same for every image of this run.
        toward, away = (side.mean("image", dtype=np.float32).values for side in sides)
        direction = torch.from_numpy(toward - away)
        if not direction.isfinite().all():
            raise CaptureError(
                f"steer: what the recordings hold of {path} at step {step} is not finite.",
                "Take recordings that hold the outputs of this step.",
            )
        images = self._plan.rows.images

        def change(output: torch.Tensor) -> torch.Tensor:
            move = direction.repeat_interleave(images, dim=0).to(output)[one.rows]
            edited = output.clone()
            edited[one.rows] += one.edit.amount * move
            return edited

        return change


def _edited(
    own: torch.Tensor, one: InModules, donated: torch.Tensor | None, step: int, path: str
) -> torch.Tensor:
    edit = one.edit
    assert isinstance(edit, Output | Skip)
    places = (2, 3) if own.ndim == 4 else tuple(range(1, own.ndim - 1))
    other = ablated(own, edit.how, places, donated)
    if edit.control == "random":
        other = random_like(own, other, edit.control_seed, step, path)
    return blended(own, other, edit.amount)
