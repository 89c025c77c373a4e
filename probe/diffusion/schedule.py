"""The noise level of every call, known before the first one, and the schedulers that it is read
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probe.conversions import alpha_bar_from_sigma, sigma_from_alpha_bar
from probe.errors import ExperimentError
from probe.output import unsaid


@dataclass(frozen=True)
class Schedule:
    """The noise level of every model call, each a tuple with one float per call: sigma as Karras et
    al. 2022 (arXiv:2206.00364) have it.

    There may be more calls than steps asked for (PNDM: one more; Heun and KDPM2: nearly twice as
    many), and timesteps may repeat or be fractional. `variance_exploding` tells whether latents
    grow with sigma or keep variance one.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    alpha_bars: tuple[float, ...]
    variance_exploding: bool

    def undefined(self, prediction_type: str) -> tuple[int, ...]:
        """The calls at which x0 is not defined: without any signal, predicted noise says nothing of
        it (Lin et al. 2023, section 3.3).
        """
        return tuple(
            i
            for i, alpha_bar in enumerate(self.alpha_bars)
            if alpha_bar == 0 and prediction_type == "epsilon"
        )

    @classmethod
    def of(cls, scheduler: Any, steps: int, begin: int = 0) -> Schedule:
        """The schedule of a diffusers scheduler for `steps` steps, from call `begin` on; the
        scheduler itself stays untouched.
        """
        return cls.read(fresh(scheduler), steps, begin)

    @classmethod
    def read(cls, scheduler: Any, steps: int, begin: int = 0) -> Schedule:
        """As `of`, by setting the timesteps of a scheduler that is nobody else's."""
        set_steps(scheduler, steps)
        timesteps = [float(t) for t in scheduler.timesteps]
        ones = torch.ones(1)
        exploding = not torch.equal(scheduler.scale_model_input(ones, scheduler.timesteps[0]), ones)
        if hasattr(scheduler, "sigmas"):
            sigmas = [float(s) for s in scheduler.sigmas[: len(timesteps)]]
            if hasattr(
                scheduler, "sigmas_interpol"
            ):  # KDPM2: every second call happens between two noise levels
                back = 1 if "Ancestral" in type(scheduler).__name__ else 0
                for index in range(1, len(sigmas), 2):
                    sigmas[index] = float(scheduler.sigmas_interpol[index - back])
            alpha_bars = [alpha_bar_from_sigma(s) for s in sigmas]
            return cls(
                tuple(timesteps[begin:]),
                tuple(sigmas[begin:]),
                tuple(alpha_bars[begin:]),
                exploding,
            )
        return cls.at(scheduler, timesteps[begin:])

    @classmethod
    def at(cls, scheduler: Any, timesteps: Sequence[float]) -> Schedule:
        """The noise levels at which a model was trained at some timesteps, by a scheduler that
        keeps variance one.
        """
        alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in timesteps]
        return cls(
            tuple(float(t) for t in timesteps),
            tuple(map(sigma_from_alpha_bar, alpha_bars)),
            tuple(alpha_bars),
            False,
        )


def first_call(scheduler: Any, steps: int, strength: float) -> int:
    """Which of a run's calls is the first when only the share `strength` of its steps is run, as
    diffusers counts it.

    Raises ExperimentError where that is not one whole step.
    """
    if int(steps * strength) < 1:
        raise ExperimentError(
            f"strength: {strength:g} of {steps} steps is not one whole step.",
            "Use more steps, or a greater strength.",
        )
    return max(steps - min(int(steps * strength), steps), 0) * int(getattr(scheduler, "order", 1))


def fresh(scheduler: Any, **changes: Any) -> Any:
    """A scheduler of the same class and config without any state; of `changes`, what its config has
    is set otherwise.
    """
    # Without this entry `from_config` would go back to the class's defaults where a pipeline has
    # changed them (clip_sample).
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    return type(scheduler).from_config(
        {**config, **{key: value for key, value in changes.items() if key in config}}
    )


def set_steps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> None:
    """Set a scheduler's timesteps, for `steps` steps."""
    # DPM++2S says with an odd number of steps, each time, that it is as its recorded config says:
    # "Changing scheduler {self.config} ..."
    with unsaid(
        "diffusers.schedulers.scheduling_dpmsolver_singlestep",
        "to handle uneven amount of inference steps",
    ):
        scheduler.set_timesteps(steps, **({} if device is None else {"device": device}))
