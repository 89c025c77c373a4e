"""Record the levels of noise, and the latents and predictions of every step."""

from __future__ import annotations

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.sampling import Step
from probe.diffusion.schedule import fresh, set_steps
from probe.format.schema import ArraySpec, spec
from probe.settings.experiment import Experiment
from probe.watching.interface import Capture, Plan, Store, Values, as_numpy, dtype_note, numpy_dtype
from probe.watching.kept import measures_late


class Levels(Capture):
    """The coordinates of a step: index, timestep, sigma, alpha_bar, and whether it is committed.

    Beside them the scheduler's whole table of sigmas is recorded.
    """

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._scheduler = plan, model.scheduler

    def arrays(self) -> list[ArraySpec]:
        schedule, scheduler = self._plan.schedule, fresh(self._scheduler)
        if isinstance(self._plan.recipe, Experiment):
            set_steps(scheduler, self._plan.recipe.steps)
        table = np.array([float(s) for s in getattr(scheduler, "sigmas", schedule.sigmas)])
        return [
            spec("", "step", value=np.arange(self._plan.calls)),
            spec("", "timestep", value=np.array(schedule.timesteps)),
            spec("", "sigma", value=np.array(schedule.sigmas)),
            spec("", "alpha_bar", value=np.array(schedule.alpha_bars)),
            spec("", "committed", (self._plan.calls,)),
            spec("latents", "scheduler_sigmas", value=table),
        ]


class Latents(Capture):
    """Latents and predictions (image, channel, y, x) of each step, and the final latents."""

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._dtype = plan, model.dtype
        self._late = measures_late(model.device)  # then it is copied at once, with everything else

    def arrays(self) -> list[ArraySpec]:
        shape = self._plan.latent_shape
        dtype, note = numpy_dtype(self._dtype), dtype_note(self._dtype)
        branches = [f"prediction_{branch}" for branch in self._plan.computed_branches]
        names = ["latents", *branches, "prediction"]
        return [
            *(spec("latents", name, (self._plan.calls, *shape), dtype, **note) for name in names),
            spec("latents", "final_latents", shape, dtype, **note),
        ]

    def take(self, step: Step) -> Values:
        branches = {f"prediction_{branch}": output for branch, output in step.branches.items()}
        values = {"latents": step.latents, **branches, "prediction": step.prediction}
        # The caller may change what the loop yielded.
        kept = {name: value if self._late else value.clone() for name, value in values.items()}
        return {f"latents/{name}": value for name, value in kept.items()}

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        store.write("latents/final_latents", as_numpy(latents))
        return []
