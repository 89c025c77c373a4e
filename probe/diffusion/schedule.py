"""The noise level of every call, known before the first one, read from a scheduler."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from probe.conversions import alpha_bar_from_sigma, sigma_from_alpha_bar
from probe.errors import ExperimentError
from probe.output import unsaid

MOST_UNTOUCHED = 64  # schedulers that are kept to be copied
_UNTOUCHED: dict[tuple[Any, str], Any] = {}


@dataclass(frozen=True)
class Schedule:
    """The noise level of every model call: tuples with one float per call.

    `sigmas` are those of Karras et al. 2022 (arXiv:2206.00364). There may be more calls than steps
    (PNDM: one more; Heun and KDPM2: nearly twice as many). Timesteps may repeat or be fractional.
    `variance_exploding` tells whether latents grow with sigma or keep variance one.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    alpha_bars: tuple[float, ...]
    variance_exploding: bool

    def undefined(self, prediction_type: str) -> tuple[int, ...]:
        """Return the calls at which x0 is not defined.

        Without any signal, predicted noise says nothing of it (Lin et al. 2023, section 3.3).
        """
        if prediction_type != "epsilon":
            return ()
        return tuple(i for i, alpha_bar in enumerate(self.alpha_bars) if alpha_bar == 0)

    @classmethod
    def of(cls, scheduler: Any, steps: int, begin: int = 0) -> Schedule:
        """Return a diffusers scheduler's schedule for `steps` steps, from call `begin` on.

        The scheduler itself does not change.
        """
        return cls.read(fresh(scheduler), steps, begin)

    @classmethod
    def read(cls, scheduler: Any, steps: int, begin: int = 0) -> Schedule:
        """Return a schedule as `of` does, by setting the timesteps of the scheduler itself."""
        set_steps(scheduler, steps)
        timesteps = [float(t) for t in scheduler.timesteps]
        ones = torch.ones(1)
        exploding = not torch.equal(scheduler.scale_model_input(ones, scheduler.timesteps[0]), ones)
        if hasattr(scheduler, "sigmas"):
            sigmas = [float(s) for s in scheduler.sigmas[: len(timesteps)]]
            if hasattr(scheduler, "sigmas_interpol"):
                # KDPM2: every second call happens between two noise levels.
                back = 1 if "Ancestral" in type(scheduler).__name__ else 0
                for index in range(1, len(sigmas), 2):
                    sigmas[index] = float(scheduler.sigmas_interpol[index - back])
            alpha_bars = [alpha_bar_from_sigma(s) for s in sigmas]
            times, alpha_bars = timesteps[begin:], alpha_bars[begin:]
            return cls(tuple(times), tuple(sigmas[begin:]), tuple(alpha_bars), exploding)
        return cls.at(scheduler, timesteps[begin:])

    @classmethod
    def at(cls, scheduler: Any, timesteps: Sequence[float]) -> Schedule:
        """Return the noise levels at which a model was trained, at some timesteps.

        The scheduler has to be one that keeps variance one.
        """
        alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in timesteps]
        sigmas = map(sigma_from_alpha_bar, alpha_bars)
        return cls(tuple(map(float, timesteps)), tuple(sigmas), tuple(alpha_bars), False)


def first_call(scheduler: Any, steps: int, strength: float) -> int:
    """Return the first call of a run that does only the share `strength` of its steps.

    It is counted as diffusers counts it. Raise ExperimentError if that share is not one whole step.
    """
    run = min(int(steps * strength), steps)
    if run < 1:
        raise ExperimentError(
            f"strength: {strength:g} of {steps} steps is not one whole step.",
            "Use more steps, or a greater strength.",
        )
    return (steps - run) * int(getattr(scheduler, "order", 1))


def fresh(scheduler: Any, **changes: Any) -> Any:
    """Return a scheduler of the same class and config without any state.

    `changes` replace settings that its config has; others are ignored.
    """
    # With this entry `from_config` would go back to the class's defaults where a pipeline has
    # changed them (clip_sample).
    config = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    known = {key: value for key, value in changes.items() if key in config}
    return _copied(type(scheduler), {**config, **known})


def _copied(kind: Any, config: dict[str, Any]) -> Any:
    """Return a copy of a scheduler that nobody has touched: KDPM2 takes 0.2 s to be made."""
    try:
        key = kind, json.dumps(config, sort_keys=True)
    except TypeError:  # an array among its settings
        return kind.from_config(config)
    made = _UNTOUCHED.get(key)
    if made is None:
        if len(_UNTOUCHED) >= MOST_UNTOUCHED:
            _UNTOUCHED.clear()  # another thread may do so too
        made = _UNTOUCHED[key] = kind.from_config(config)
    return copy.deepcopy(made)


def set_steps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> None:
    """Set a scheduler's timesteps, for `steps` steps."""
    # With an odd number of steps, DPM++2S logs each time that it keeps to its config.
    logger = "diffusers.schedulers.scheduling_dpmsolver_singlestep"
    where = {} if device is None else {"device": device}
    with unsaid(logger, "to handle uneven amount of inference steps"):
        scheduler.set_timesteps(steps, **where)
