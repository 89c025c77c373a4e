"""All edits of a run, found in its plan and made while it runs.

    editing = Editing(model, plan)         # refuses what cannot be, before anything runs
    editing.bind(conditioning)
    denoise(..., editing=editing)

The loop asks it for the first noise, for the latents that go into a step, and for what the model
says (`probe.diffusion.sampling.Editing`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from probe.diffusion.family import (
    Conditioning,
    Family,
    Predictions,
    ask_branches,
    repeated,
    stacked,
)
from probe.diffusion.guidance import guided
from probe.editing import attention, modules
from probe.editing.attention import AttentionEdits, InLayers
from probe.editing.donors import Beside
from probe.editing.modules import InModules, ModuleEdits
from probe.editing.noise import mixed_noise, noise_of
from probe.editing.targets import naming, rows_of
from probe.editing.text import Texts, refuse_texts
from probe.editing.values import blended
from probe.errors import CaptureError, ExperimentError
from probe.settings.edits import (
    Donor,
    Edit,
    Guidance,
    Head,
    Latents,
    Map,
    Mask,
    Noise,
    OtherPrompt,
    Output,
    Remove,
    Reweight,
    Skip,
    Steer,
    Value,
    guidance_by_step,
)
from probe.watching.hooks import editing_hooks
from probe.watching.interface import Plan


class Editing:
    """The edits of a plan, for one run of it.

    Raise ExperimentError for an edit that matches nothing or contradicts another, ModelError for a
    donor of another model.
    """

    def __init__(self, model: Family, plan: Plan):
        self._model, self._plan = model, plan
        self._edits = plan.experiment.edits
        self._donors: list[tuple[Donor, Beside]] = []
        self.texts = Texts(model, plan, self._edits)
        refuse_texts(self.texts, plan)
        if plan.words:
            raise ExperimentError(
                "capture.counterfactual: what a word did is not measured in an edited run yet.",
                "Leave capture.counterfactual out, or compare with a run without the word.",
            )
        in_layers, in_modules = list[InLayers](), list[InModules]()
        self._entering: list[tuple[Latents, tuple[int, ...], Beside]] = []
        self._set: dict[tuple[Any, ...], int] = {}
        for number, edit in enumerate(self._edits):
            with naming(number, edit):
                donor = self._donor(edit)
                if isinstance(edit, Value | Mask | Reweight | Map | Head):
                    layers = attention.found(model, plan, edit, self.texts, donor)
                    in_layers.append(layers)
                    self._refuse_contradiction(number, edit, layers.steps, list(layers.sets()))
                elif isinstance(edit, Output | Skip | Steer):
                    found = modules.found(model, plan, edit, donor)
                    in_modules.append(found)
                    self._refuse_contradiction(number, edit, found.steps, list(found.sets()))
                else:
                    self._check_other(number, edit, donor)
        self._attention = AttentionEdits(model, in_layers)
        self._modules = ModuleEdits(model, plan, in_modules)
        scale, rescale = plan.experiment.guidance
        self.guidance = guidance_by_step(scale, rescale, self._edits, plan.schedule.sigmas)

    def _donor(self, edit: Edit) -> Beside | None:
        """Return the run that an edit takes values from. Equal donors are one."""
        if not edit.donating or getattr(edit, "how", "resample") != "resample":
            return None
        asked: Donor = getattr(edit, "donor")  # noqa: B009 - of those kinds that have one
        for known, beside in self._donors:
            if known == asked and not isinstance(edit, Latents):
                return beside
        beside = Beside(self._model, self._plan, asked, isinstance(edit, Latents))
        if not isinstance(edit, Latents):
            self._donors.append((asked, beside))
        return beside

    def _check_other(self, number: int, edit: Edit, donor: Beside | None) -> None:
        """Check an edit of texts, guidance, first noise or latents."""
        sigmas, plan = self._plan.schedule.sigmas, self._plan
        steps = edit.steps_of(sigmas)
        if isinstance(edit, Latents):
            assert donor is not None
            self._entering.append((edit, steps, donor))
            self._refuse_contradiction(number, edit, steps, [("the latents",)])
        elif isinstance(edit, Guidance):
            if plan.experiment.guidance_scale <= 1:
                raise ExperimentError(
                    "there is no guidance at guidance_scale "
                    f"{plan.experiment.guidance_scale:g}: the negative prompt is not read.",
                    "Set the experiment's guidance_scale above 1. An edit can make it 1 at some "
                    "steps.",
                )
            names = [name for name in ("scale", "rescale") if getattr(edit, name) is not None]
            self._refuse_contradiction(number, edit, steps, [(f"guidance {n}",) for n in names])
        elif isinstance(edit, Noise):
            if plan.experiment.image is not None:
                raise ExperimentError(
                    "a run that begins from a picture has no first noise of its own to edit yet.",
                    "Leave image out.",
                )
            if edit.seed == plan.experiment.seed and edit.method == "mix" and 0 < edit.amount < 1:
                raise ExperimentError(
                    f"seed: {edit.seed} is this run's own, and mixed with itself noise gains "
                    "variance.",
                    "Write another seed, or method: add.",
                )
            noise_of(edit, plan.latent_shape, self._model.dtype)
            self._refuse_contradiction(number, edit, (0,), [("the first noise",)])
        elif isinstance(edit, Remove | OtherPrompt):
            rows_of(plan, edit.branch)
            text = ("the text", edit.branch)
            if isinstance(edit, OtherPrompt):
                self._refuse_contradiction(number, edit, steps, [text])
            elif edit.amount == 1:  # a later prompt would undo it; words may go one by one
                for step in steps:
                    self._set.setdefault((step, *text), number)

    def _refuse_contradiction(
        self, number: int, edit: Edit, steps: tuple[int, ...], sets: list[tuple[Any, ...]]
    ) -> None:
        """Raise ExperimentError if an earlier edit determines the same thing at the same step."""
        if edit.amount != 1:
            return
        for step in steps:
            for what in sets:
                before = self._set.setdefault((step, *what), number)
                if before != number:
                    raise ExperimentError(
                        f"it determines {_named(what)} at step {step}, as edits[{before}] does.",
                        "Give one of them other steps, or an amount below 1.",
                    )

    @property
    def edited_layers(self) -> dict[str, set[int]]:
        """The steps at which each attention layer's output is not its softmax(q k) v."""
        return self._attention.layers

    @property
    def entered(self) -> set[int]:
        """The steps whose latents are not those that the scheduler made."""
        return {step for edit, steps, _ in self._entering for step in steps if edit.amount}

    def bind(self, conditioning: Conditioning) -> None:
        """Take what the unedited run is told."""
        self.texts.bind(conditioning)

    def asks_donors(self, index: int, replayed: bool = False) -> bool:
        """Return whether a donor has to be at a step; of a replayed one only its latents count."""
        entering = any(index in steps for _, steps, _ in self._entering)
        inside = any(donor.wants(index) for _, donor in self._donors)
        return entering or (inside and not replayed)

    def prepare(self, index: int) -> None:
        """Bring the donors to a step, while nobody watches the model."""
        for _, donor in self._donors:
            if donor.wants(index):
                donor.at(index)
        for _, steps, donor in self._entering:
            if index in steps:
                donor.at(index)

    # --- what the loop asks ---

    def begin(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the first noise after its edits. *Shape:* (image, channel, y, x)."""
        for edit in self._edits:
            if isinstance(edit, Noise):
                other = noise_of(edit, self._plan.latent_shape, self._model.dtype)
                noise = mixed_noise(noise, other.to(noise), edit)
        return noise

    def enter(self, index: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents that go into a step. *Shape:* (image, channel, y, x)."""
        for edit, steps, donor in self._entering:
            if index in steps:
                latents = blended(latents, donor.latents, edit.amount)
        return latents

    def predict(self, index: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        """Return what the edited model says at a step."""
        rows, told = self._plan.rows, self.texts.at(index)
        branches = rows.computed_branches
        arguments = stacked([repeated(told[branch], rows.images) for branch in branches])
        with self._changing(index):
            said = ask_branches(self._model.call, branches, model_input, t, arguments)
        return Predictions(said, guided(said, *self.guidance[index]))

    @contextlib.contextmanager
    def _changing(self, index: int) -> Iterator[None]:
        """Have the changes of a step on. Raise CaptureError if one was not made once."""
        named = [*self._attention.changes(index), *self._modules.changes(index)]
        made = [0] * len(named)
        changes = [
            (module, when, _counted(change, made, number))
            for number, (_, (module, when, change)) in enumerate(named)
        ]
        with editing_hooks(changes):
            yield
        for (name, _), times in zip(named, made, strict=True):
            if times != 1:
                raise CaptureError(
                    f"{name} was to be edited once in step {index}, and was {times} times.",
                    "A module that is fused, shared or re-entered cannot be edited: leave it out.",
                )


def _named(what: tuple[Any, ...]) -> str:
    """Return in words what a whole edit determines."""
    kind, *rest = what
    if kind in ("head", "map"):
        return f"{'' if kind == 'head' else 'the map of '}head {rest[1]} of {rest[0]}"
    if kind in ("output", "skip"):
        return f"the output of {rest[0]}" if kind == "output" else f"the skip into {rest[0]}"
    return " of ".join([kind, *rest])


def _counted(
    change: Callable[[torch.Tensor], torch.Tensor], made: list[int], number: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    def counted(value: torch.Tensor) -> torch.Tensor:
        made[number] += 1
        return change(value)

    return counted


def edited(model: Family, plan: Plan) -> Editing | None:
    """Return the edits of a plan; None if it has none."""
    edits = getattr(plan.recipe, "edits", ())
    return Editing(model, plan) if edits else None
