"""The denoising loop, by hand: model and scheduler, as a generator that yields its state.

    for step in denoise(model, conditioning, steps=50, guidance_scale=7.5, seed=0):
        step.latents, step.sigma, step.eps, step.denoised, ...

Nothing here knows of hooks, recordings or progress bars: the recorder, the tests and a notebook
read the same iterator. With the same seed it gives the bits of diffusers' `StableDiffusionPipeline`
(tests/test_parity.py).

Inside: `sample`, the loop itself, over a scheduler and a `Predict` (`probe.diffusion.family`);
`denoise`, the loop of a model; `Step`, what they yield; `Start`, another beginning: a picture with
noise in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from probe.conversions import denoised_from, eps_from, v_from, variance_preserving
from probe.diffusion.draws import seeded
from probe.diffusion.family import Call, Conditioning, Family, Predict, Predictions, replaying
from probe.diffusion.schedule import Schedule, first_call


@dataclass(frozen=True)
class Step:
    """One call of the model. Every tensor is (image, channel, y, x) in the run's dtype.

    `latents` went in and `next_latents` is what the scheduler made of them. `branches` holds the
    model's output for each branch that it computed, `prediction` is what the scheduler got (guided
    and rescaled).
    """

    index: int
    timestep: float
    sigma: float
    alpha_bar: float
    latents: torch.Tensor
    branches: Mapping[str, torch.Tensor]
    prediction: torch.Tensor
    next_latents: torch.Tensor
    prediction_type: str
    variance_exploding: bool

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        index: int,
        latents: torch.Tensor,
        said: Predictions,
        next_latents: torch.Tensor,
        prediction_type: str,
    ) -> Step:
        """Put together call `index` of a schedule."""
        return cls(
            index=index,
            timestep=schedule.timesteps[index],
            sigma=schedule.sigmas[index],
            alpha_bar=schedule.alpha_bars[index],
            latents=latents,
            branches=said.branches,
            prediction=said.prediction,
            next_latents=next_latents,
            prediction_type=prediction_type,
            variance_exploding=schedule.variance_exploding,
        )

    @property
    def prediction_uncond(self) -> torch.Tensor | None:
        """The unconditional prediction; None without guidance."""
        return self.branches.get("uncond")

    @property
    def prediction_cond(self) -> torch.Tensor:
        """The conditional prediction."""
        return self.branches["cond"]

    @property
    def model_input(self) -> torch.Tensor:
        """The latents as the model sees them: variance-preserving, for every scheduler."""
        if self.variance_exploding:
            return variance_preserving(self.latents, self.sigma)  # type: ignore[no-any-return]
        return self.latents

    @property
    def eps(self) -> torch.Tensor:
        """The guided noise prediction."""
        return eps_from(self.prediction, self.model_input, self.alpha_bar, self.prediction_type)  # type: ignore[no-any-return]

    @property
    def v(self) -> torch.Tensor:
        """The guided velocity."""
        return v_from(self.prediction, self.model_input, self.alpha_bar, self.prediction_type)  # type: ignore[no-any-return]

    @property
    def denoised(self) -> torch.Tensor:
        """The guided prediction of the clean latents x0, before the scheduler clips them."""
        clean: torch.Tensor = denoised_from(
            self.prediction, self.model_input, self.alpha_bar, self.prediction_type
        )
        return clean


class Editing(Protocol):
    """What a run does otherwise than its experiment without edits: see `probe.editing`."""

    def begin(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the first noise, of variance one. *Shape:* (image, channel, y, x)."""

    def enter(self, index: int, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents that go into a step. *Shape:* (image, channel, y, x)."""

    def predict(self, index: int, model_input: torch.Tensor, t: torch.Tensor) -> Predictions:
        """Return what the model says at a step: a `Predict`."""


@dataclass(frozen=True)
class Start:
    """A beginning that is not pure noise: clean latents, and the noise to mix into them.

    `strength` is the share of the steps that is run. `generators` are those of the images, after
    the noise was drawn. *Shape:* each (image, channel, y, x).
    """

    clean: torch.Tensor
    noise: torch.Tensor
    strength: float
    generators: list[torch.Generator]


def started(scheduler: Any, start: Start, begin: int) -> torch.Tensor:
    """Return the latents that go into call `begin`, the first of a run.

    The scheduler, whose timesteps are set, is told that it begins there.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    at = scheduler.timesteps[begin : begin + 1].repeat(len(start.clean))
    return scheduler.add_noise(start.clean, start.noise, at)  # type: ignore[no-any-return]


def memory_format(tensor: torch.Tensor) -> str:
    """Return how a tensor lies in memory: "contiguous", or "channels_last".

    The last bits of convolutions and sums depend on it.
    """
    last = (
        not tensor.is_contiguous()
        and tensor.ndim == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return "channels_last" if last else "contiguous"


def arranged(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """Return the same values, laid out in memory as `memory_format` said."""
    return tensor.contiguous(
        memory_format=torch.channels_last
        if how == "channels_last" and tensor.ndim == 4
        else torch.contiguous_format
    )


def step_options(scheduler: Any, eta: float, generators: list[torch.Generator]) -> dict[str, Any]:
    """Return the optional arguments that this scheduler's `step` understands."""
    accepted = inspect.signature(scheduler.step).parameters
    return {
        name: value for name, value in (("eta", eta), ("generator", generators)) if name in accepted
    }


def sample(
    scheduler: Any,
    schedule: Schedule,
    latents: torch.Tensor,
    predict: Predict,
    enter: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Yield a `Step` after every call of `predict` and the scheduler, whose timesteps are set.

    `schedule` has the noise levels of its last calls: those that are made. `enter` may change the
    latents that go into a step. `options` are of the scheduler's `step`.
    """
    prediction_type = str(scheduler.config.prediction_type)
    for index, t in enumerate(scheduler.timesteps[-len(schedule.timesteps) :]):
        with torch.no_grad():  # never across the yield: the caller's gradient mode is the caller's
            latents = latents if enter is None else enter(index, latents)
            said = predict(index, scheduler.scale_model_input(latents, t), t)
            following = scheduler.step(said.prediction, t, latents, **options, return_dict=False)[0]
        yield Step.of(schedule, index, latents, said, following, prediction_type)
        latents = following


def denoise(
    model: Family,
    conditioning: Conditioning,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    seed: int = 0,
    images: int = 1,
    height: int | None = None,
    width: int | None = None,
    known: Iterable[Predictions] = (),
    start: Start | None = None,
    editing: Editing | None = None,
    call: Call | None = None,
) -> Iterator[Step]:
    """Draw `images` pictures, yielding a `Step` after every call of the model and the scheduler.

    `height` and `width` are in pixels (default: the model's own). Guidance is on when
    `guidance_scale > 1`. The last step's `next_latents` are the result.

    `known` holds recorded predictions of the first calls, for which the model is not called. They
    give a fresh scheduler the history and the random numbers that the interrupted run had.

    With a `start`, the last steps are run, from its latents. It has the images and their size, and
    `seed` is not used. With `editing`, that is asked in place of the model; `call` is asked in
    place of `model.call`.
    """
    if start is not None:
        height, width = (model.f * side for side in start.clean.shape[2:])
    begin = 0 if start is None else first_call(model.scheduler, steps, start.strength)
    schedule = model.schedule(steps, height, width, begin)
    scheduler = model.scheduled(steps, height, width)
    if start is None:
        generators = seeded(seed, images)
        noise = model.begin(generators, height, width)
        latents = (editing.begin(noise) if editing else noise) * scheduler.init_noise_sigma
    else:
        generators = [generator.clone_state() for generator in start.generators]
        latents = started(scheduler, start, begin)
    if editing is None:
        guidance = guidance_scale, guidance_rescale
        predict = model.predictor(conditioning, len(latents), *guidance, call)
        enter = None
    else:
        predict, enter = editing.predict, editing.enter
    options = step_options(scheduler, eta, generators)
    predict = replaying(known, predict)
    yield from sample(scheduler, schedule, latents, predict, enter, **options)
