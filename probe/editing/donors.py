"""A donor: another run of the same model, a step at a time, whose values an edited run takes.

It runs beside the edited run, or follows the latents and predictions of a recording; the values
inside the model are always computed here, never read as they were stored. So a recording donates
what it never recorded, and to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Conditioning, Family, Predict, Predictions, Tokens
from probe.diffusion.sampling import Step, arranged, denoise
from probe.diffusion.start import memory_formats
from probe.editing.text import told
from probe.errors import ExperimentError, ModelError
from probe.reading.compare import changed_files
from probe.reading.recording import Run, open_run
from probe.settings.edits import Donor
from probe.settings.experiment import Experiment
from probe.settings.fields import expand_home
from probe.watching.hooks import Hooks, Watch
from probe.watching.interface import Plan

# The fields of an experiment that the loop takes.
SAMPLING = "steps guidance_scale guidance_rescale eta seed images height width".split()


class Beside:
    """A donor's run. `at(step)` brings it to a step; `values` and `latents` are those of it.

    `watch` says what is kept, and at which steps, before the run begins.
    """

    def __init__(self, model: Family, plan: Plan, donor: Donor, latents_alone: bool = False):
        own = plan.experiment
        if own.image is not None:
            raise ExperimentError(
                "donor: a run that begins from a picture takes nothing from another run yet.",
                "Leave image out, or use how: zero or mean.",
            )
        self._model, self._plan = model, plan
        self._run = opened_donor(donor, model, plan, latents_alone) if donor.run else None
        self.experiment = self._run.experiment if self._run else _changed(own, donor)
        self.tokens: dict[str, Tokens] = {
            branch: model.tokens(text, self.experiment.over_long)
            for branch, text in self.experiment.texts.items()
        }
        if tuple(self.tokens) != plan.computed_branches:
            raise ExperimentError(
                f"donor: at guidance_scale {self.experiment.guidance_scale:g} it has other "
                "branches than this run.",
                "Both need a guidance_scale above 1, or neither.",
            )
        self._watches: dict[Any, Watch] = {}
        self._wanted = set[int]()
        self._steps: Iterator[Step] | None = None
        self._live: Predict | None = None
        self.values: dict[Any, torch.Tensor] = {}
        self.step: Step | None = None

    def watch(self, key: Any, watch: Watch, steps: Iterable[int]) -> None:
        """Keep, under a key, what a watch sees at some steps."""
        module, when, _ = watch
        self._watches[key] = module, when, lambda value: self._keep(key, value)
        self._wanted.update(steps)

    def _keep(self, key: Any, value: Any) -> None:
        tensor = value if isinstance(value, torch.Tensor) else value[0]
        self.values[key] = tensor.detach()

    def wants(self, index: int) -> bool:
        """Return whether something inside the model is kept at a step."""
        return index in self._wanted

    def at(self, index: int) -> None:
        """Bring the donor to a step."""
        if self._steps is None:
            self._begin()
        assert self._steps is not None
        while self.step is None or self.step.index < index:
            self.values.clear()
            self.step = next(self._steps)

    @property
    def latents(self) -> torch.Tensor:
        """The latents that went into the donor's step. *Shape:* (image, channel, y, x)."""
        assert self.step is not None
        return self.step.latents

    def _begin(self) -> None:
        conditioning: Conditioning = told(self._model, self.tokens)
        recipe, images = self.experiment, self.experiment.images
        self._live = self._model.predictor(
            conditioning, images, recipe.guidance_scale, recipe.guidance_rescale
        )
        how: dict[str, Any] = {name: getattr(recipe, name) for name in SAMPLING}
        self._steps = denoise(self._model, conditioning, **how, editing=self)

    # --- what the loop asks (probe.diffusion.sampling.Editing) ---

    def begin(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def enter(self, index: int, latents: torch.Tensor) -> torch.Tensor:
        if self._run is None:
            return latents
        return self._recorded("latents", index).to(latents)

    def predict(self, index: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        assert self._live is not None
        if self._run is None or index in self._wanted:
            with Hooks(self._watches.values() if index in self._wanted else ()):
                said = self._live(index, model_input, t)
            if self._run is None:
                return said
        given = self._recorded("prediction", index)
        return Predictions({"cond": given}, given)

    def _recorded(self, name: str, index: int) -> torch.Tensor:
        assert self._run is not None
        values: np.ndarray = self._run.variable(f"latents/{name}").isel(step=index).values
        how = memory_formats(self._run.attributes)["prediction"]
        tensor = torch.from_numpy(np.array(values)).to(self._model.device, self._model.dtype)
        return arranged(tensor, how) if name == "prediction" else tensor


def _changed(own: Experiment, donor: Donor) -> Experiment:
    """Return the donor's experiment: this one without edits, with other fields.

    Where no field is named, it has another seed: the first that no image of this run has.
    """
    changes = donor.changes or {"seed": own.seed + own.images}
    return own.unedited.model_copy(update=changes)


def opened_donor(donor: Donor, model: Family, plan: Plan, latents_alone: bool) -> Run:
    """Open a recording to take values from. Raise ExperimentError or ModelError if it cannot give.

    Where only its latents are taken, it may be an edited run.
    """
    own = plan.experiment
    run = open_run(expand_home(str(donor.run)), expand_home(own.output))
    refuse_other_run("donor", run, model, plan)
    other = run.experiment
    if run.latents.isel(step=0).shape != plan.latent_shape:
        raise ExperimentError(
            f"donor: the latents of {run.name} have shape {run.latents.isel(step=0).shape}, and "
            f"those of this run {plan.latent_shape}.",
            "Take a recording with the same size and number of images.",
        )
    if latents_alone:
        return run
    if other.edits:
        raise ExperimentError(
            f"donor: {run.name} was edited itself, and its insides would be computed without that.",
            f"Take its parent, {run.attributes.parent_run or 'the run without edits'}.",
        )
    # Its insides are computed with the model as it is here, from its text.
    for field in ("loras", "clip_skip", "prompt_embeds"):
        theirs, ours = (getattr(one, field) or None for one in (other, own))
        if theirs != ours or (field == "prompt_embeds" and theirs):
            raise ExperimentError(
                f"donor: {run.name} and this run differ in {field}, so its insides would not be "
                "those that it had.",
                f"Take a recording with the same {field}, or its latents alone.",
            )
    if changed := changed_files(run.attributes, {"model": {"files": dict(model.files)}}):
        raise ModelError(
            f"donor: {run.name} was recorded with another {changed[0]} than is there now.",
            "Bring that file back, or take another recording.",
        )
    return run


def refuse_other_run(field: str, run: Run, model: Family, plan: Plan) -> None:
    """Raise ExperimentError for a recording whose steps are not those of this run.

    Raise ModelError for one of another model.
    """
    if run.kind != "generation":
        raise ExperimentError(f"{field}: {run.name} is a {run.kind}.", "Name a run of a picture.")
    calls, sigmas = len(plan.schedule.sigmas), np.asarray(plan.schedule.sigmas)
    if run.status != "complete" or len(run.steps) != calls:
        raise ExperimentError(
            f"{field}: {run.name} has {len(run.steps)} steps, and this run has {calls}.",
            "Take a complete recording with the same steps and scheduler.",
        )
    if not np.allclose(run.variable("sigma").values, sigmas, rtol=1e-4):
        raise ExperimentError(
            f"{field}: {run.name} has other noise levels than this run.",
            "Take a recording with the same scheduler and its options.",
        )
    said = run.attributes.model
    weights, here = said.weights, model.digest(said.weights_digest)
    if weights != here:
        raise ModelError(
            f"{field}: {run.name} was recorded with other weights (digest {weights}) than "
            f"{model.name} has here ({here}).",
            "Take a recording of the same model.",
        )
