"""What is derived from a scheduler is what it does, or the scheduler is refused by name.

Nothing is written before. Every pair of options of each of the 14 schedulers is met in a covering
array. What is accepted is computed again in another way than `probe.diffusion.schedule_check` does.
Two thousand random combinations run with `-m slow`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from PIL import Image

from probe.analysis import by_sigma
from probe.conversions import (
    clipped,
    clipping,
    denoised_from,
    sigma_from_alpha_bar,
    variance_preserving,
)
from probe.diffusion import sampling
from probe.diffusion.schedule import Schedule, first_call, fresh
from probe.diffusion.schedule_check import _culprit, proven
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, ModelError, UserError
from probe.figures.sheets import contact_sheet
from probe.proof.replay import check_schedule
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.recorder import record
from probe.settings.experiment import Experiment
from probe.settings.fields import SCHEDULERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning",
    "ignore:(?s)algorithm_type .*dpmsolver is deprecated:FutureWarning",
)

FLAG = (False, True)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "trained_betas": (None, tuple(np.linspace(1e-3, 2e-2, 1000).tolist())),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "steps_offset": (0, 1),
    "rescale_betas_zero_snr": FLAG,
    "sigmas": (
        "plain",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
    ),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    "solver_type": ("midpoint", "heun", "bh1", "bh2", "logrho"),
    "solver_order": (2, 1, 3),
    "lower_order_final": (True, False),
    "euler_at_final": FLAG,
    "predict_x0": (True, False),
    "thresholding": FLAG,
    "clip_sample": FLAG,
    "clip_sample_range": (1.0, 2.0),
    "sample_max_value": (1.0, 3.0),
    "dynamic_thresholding_ratio": (0.995, 0.8),
    "variance_type": (
        None,
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "use_dynamic_shifting": FLAG,
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
    "original_inference_steps": (50, 20),
    "timestep_scaling": (10.0, 1.0),
    "lambda_min_clipped": (None, -5.1),
    "sigma_max": (None, 5.0),
}
ELSEWHERE = {  # options that have a test of their own or no values of their own, by name
    *(
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "sigma_min",
        "solver_p",
        "disable_corrector",
        "shift_terminal",
        "flow_shift",
    ),
    *(
        "time_shift_type",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
    ),
}
SLOW = (
    "KDPM2",
    "KDPM2Ancestral",
    "Heun",
    "LMS",
)  # to build one takes 0.1 s for 1000 timesteps of training
STEPS = 8
Case = dict[str, Any]


def options_of(name: str) -> dict[str, tuple[Any, ...]]:
    known = inspect.signature(getattr(diffusers, SCHEDULERS[name][0]).__init__).parameters
    assert set(known) <= {"self", *OPTIONS, *ELSEWHERE}, f"{name} has options that are never tried"
    kinds = {option: values for option, values in OPTIONS.items() if option in known}
    if name in SLOW:
        kinds |= {
            "num_train_timesteps": (100,),
            "trained_betas": (None, tuple(np.linspace(1e-2, 2e-1, 100).tolist())),
        }
    if "use_karras_sigmas" in known:
        kinds["sigmas"] = tuple(
            kind for kind in OPTIONS["sigmas"] if kind == "plain" or kind in known
        )
    return kinds


def pairs(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)}


@functools.cache
def all_pairs(name: str) -> frozenset[tuple[str, int, str, int]]:
    sizes = {option: range(len(values)) for option, values in options_of(name).items()}
    return frozenset(
        (a, x, b, y)
        for a, b in itertools.combinations(sizes, 2)
        for x in sizes[a]
        for y in sizes[b]
    )


@functools.cache
def pairwise(name: str) -> list[dict[str, int]]:
    """Rows of indices that meet every pair of options: each begins with a missing pair, and of some
    random ones is that which meets most.
    """
    options, rng = options_of(name), random.Random(0)
    missing, rows = set(all_pairs(name)), []
    while missing:
        a, x, b, y = min(missing)
        drawn = [
            {**{key: rng.randrange(len(values)) for key, values in options.items()}, a: x, b: y}
            for _ in range(20)
        ]
        rows.append(max(drawn, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


@functools.cache
def model_of(prediction: str) -> StableDiffusion:
    return StableDiffusion.of(tiny.pipeline(prediction))


def asked(case: Case) -> tuple[str, dict[str, Any]]:
    """A case's prediction type, and its options as somebody would write them."""
    options = {
        key: value
        for key, value in case.items()
        if key not in ("prediction_type", "sigmas") and value is not None
    }
    if (sigmas := case.get("sigmas", "plain")) != "plain":
        options[sigmas] = True
    return case["prediction_type"], options


def hold(name: str, case: Case, steps: int = STEPS) -> str:
    """Whether a case is accepted; if so its numbers are right, and if not it is refused by name,
    with a remedy.
    """
    prediction, options = asked(case)
    kind = SCHEDULERS[name][0]
    try:
        scheduler = model_of(prediction).with_scheduler(name, options).scheduler
        schedule = proven(scheduler, steps, 0, options)
    except ExperimentError as error:
        said = error.cause + error.remedy
        assert kind in said and error.remedy and "\n" not in said, said  # noqa: PT017
        if found := re.match(r"Set (\w+): (\S+) in scheduler_options", error.remedy):
            proven(
                model_of(prediction)
                .with_scheduler(name, {**options, found[1]: json.loads(found[2])})
                .scheduler,
                steps,
            )
        return "refused"
    independently(scheduler, schedule, steps, prediction)
    return "accepted"


def independently(scheduler: Any, schedule: Schedule, steps: int, prediction: str) -> None:
    """Hold a schedule against random latents and predictions, which no model would make, and
    against the training's betas.
    """
    second = fresh(scheduler, clip_sample=False, thresholding=False)
    second.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    extra = sampling.step_options(second, 0.0, [torch.Generator().manual_seed(1)])
    if "order" in inspect.signature(second.step).parameters:
        extra["order"] = 1  # of LMS, which integrates for each; x0 is the same
    signal = np.cumprod(1 - second.betas.double().numpy()).clip(1e-9)
    trained = np.log(((1 - signal) / signal).clip(1e-12)) / 2
    for index, t in enumerate(second.timesteps):
        sigma, alpha_bar = schedule.sigmas[index], schedule.alpha_bars[index]
        x, p = torch.randn((2, 1, 4, 2, 2), generator=generator)
        latents = x * math.sqrt(1 + sigma**2) if schedule.variance_exploding else x
        x = variance_preserving(latents, sigma) if schedule.variance_exploding else x
        torch.testing.assert_close(second.scale_model_input(latents, t), x, rtol=1e-4, atol=1e-6)
        made = second.step(p, t, latents, **extra)
        if alpha_bar == 0 and prediction == "epsilon":
            assert index in schedule.undefined(prediction)
            continue
        x0 = denoised_from(p, x, alpha_bar, prediction)
        own = getattr(made, "pred_original_sample", None)
        if hasattr(made, "denoised"):
            skip, whole = second.get_scalings_for_boundary_condition_discrete(t)
            own, x0 = made.denoised, whole * x0 + skip * latents
        elif own is None and hasattr(second, "model_outputs"):
            own = second.model_outputs[-1]
            keeps_eps = second.config.get("algorithm_type") in (
                "dpmsolver",
                "sde-dpmsolver",
                "deis",
            ) or not second.config.get("predict_x0", True)
            if keeps_eps or "DEIS" in type(second).__name__:
                x0 = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        if own is not None:
            torch.testing.assert_close(own, x0, rtol=2e-3, atol=2e-3 * float(x0.abs().max()))
        else:  # PNDM: the same alphas as DDIM
            assert alpha_bar == float(second.alphas_cumprod[int(t)])
        # Zero terminal SNR is some other large number in some schedulers; and two options of
        # Euler's have timesteps that are no places in the table.
        if (
            sigma < 1000
            and "snr_shift_scale" not in second.config
            and second.config.get("timestep_type") != "continuous"
            and second.config.get("interpolation_type") != "log_linear"
        ):
            # the model's t is that of the noise: to one timestep, for some schedulers round it;
            # beyond both ends there is none
            at = float(t)
            least, greatest = (
                np.interp(at + by, np.arange(len(trained)), trained) for by in (-1.01, 1.01)
            )
            inside = trained[0] < math.log(max(sigma, 1e-12)) < trained[-1]
            assert not inside or least - 1e-3 <= math.log(sigma) <= greatest + 1e-3, (
                index,
                at,
                sigma,
            )


SELDOM = ("KDPM2", "KDPM2Ancestral", "Heun", "DPM++2S", "DEIS", "LMS")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in SCHEDULERS],
)
def test_every_pair_of_options_is_right_or_refused_by_name(name: str) -> None:
    assert all_pairs(name) == set().union(*map(pairs, pairwise(name)))
    options = options_of(name)
    outcomes = [
        hold(name, {key: options[key][index] for key, index in row.items()})
        for row in pairwise(name)
    ]
    assert "accepted" in outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_random_combinations_are_right_or_refused_by_name(name: str) -> None:
    rng = random.Random(name)
    for _ in range(40 if "KDPM2" in name else 200):
        case = {key: rng.choice(values) for key, values in options_of(name).items()}
        hold(name, case, rng.choice((1, 2, 3, 7, 20, 50)))


def test_a_remedy_is_tried_with_the_options_that_were_given() -> None:
    """diffusers keeps `deis` as `dpmsolver++`, which takes what `deis` does not."""
    options = {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"}
    scheduler = model_of("epsilon").with_scheduler("DPM++2M", options).scheduler
    assert scheduler.config.algorithm_type == "dpmsolver++"
    tried = _culprit(scheduler, 10, 0, ["final_sigmas_type"], options)
    assert tried is None
    assert _culprit(scheduler, 10, 0, ["final_sigmas_type"], {}) == "final_sigmas_type"


# --- what is refused, and when --------------------------------------------------------------------

LIGHT: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 4,
    "height": 32,
    "width": 32,
    "capture": {"attention": "off", "text": False, "statistics": False},
}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@functools.cache
def pipe(prediction: str = "epsilon") -> Any:
    return tiny.pipeline(prediction)


def recorded(folder: Path, prediction: str = "epsilon", **asked: Any) -> Run:
    return record(
        {**LIGHT, "output": str(folder), **asked}, pipeline=pipe(prediction), progress=False
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["DPM++2M", "DPM++2S", "UniPC", "DEIS"])
def test_flow_sigmas_are_refused_before_anything_is_written(
    name: str, prediction: str, tmp_path: Path
) -> None:
    with pytest.raises(ExperimentError) as refusal:
        recorded(tmp_path, prediction, scheduler=name, scheduler_options={"use_flow_sigmas": True})
    assert (
        f"{SCHEDULERS[name][0]} with use_flow_sigmas: true does not do what its noise levels say: "
        "at call 0 and 3 more of 4" in refusal.value.cause
    )
    assert "Set use_flow_sigmas: false in scheduler_options" in refusal.value.remedy
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_too(tmp_path: Path) -> None:
    from probe.run import main

    file = tmp_path / "flow.yaml"
    file.write_text("prompt: a cat\nscheduler: UniPC\nscheduler_options: {use_flow_sigmas: true}\n")
    with pytest.raises(
        ExperimentError,
        match="UniPCMultistepScheduler with use_flow_sigmas: true does not do what its noise "
        "levels say",
    ):
        main([str(file), "--dry-run"])


# Of diffusers' other schedulers, those whose numbers are what they say; all others are refused.
ALSO_RIGHT = {
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OTHERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and name not in {kind for kind, _ in SCHEDULERS.values()}
)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_another_scheduler_of_a_model_is_proven_or_refused_by_name(kind: str) -> None:
    made = getattr(diffusers, kind)
    required = [
        p.name
        for p in list(inspect.signature(made.__init__).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if required or not issubclass(made, diffusers.SchedulerMixin):
        return  # not installed, or none that can be made of a config alone: loading refuses it
    known = inspect.signature(made.__init__).parameters
    betas = BETAS if kind != "UnCLIPScheduler" else {}
    model = model_of("epsilon")
    scheduler = made(**{name: value for name, value in betas.items() if name in known})
    theirs = replace(model, scheduler=scheduler)
    try:
        schedule = proven(theirs.checked().scheduler, 10)
    except UserError as error:
        kinds = (scheduler.config.get("prediction_type") or kind, kind)
        assert kind not in ALSO_RIGHT, error  # noqa: PT017
        assert any(word in error.cause for word in kinds) and error.remedy  # noqa: PT017
    else:
        assert kind in ALSO_RIGHT, (
            "it was not known to be right: add it to ALSO_RIGHT, if its numbers are"
        )
        if kind != "TCDScheduler":  # it gives no x0
            independently(scheduler, schedule, 10, "epsilon")
    if scheduler.config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        return
    if "beta_start" in scheduler.config:  # then another can be made of it
        assert proven(theirs.with_scheduler("DDIM", {}).scheduler, 10)
    else:
        with pytest.raises(ModelError, match=f"its scheduler {kind} does not say with which betas"):
            theirs.with_scheduler("DDIM", {})
        assert proven(theirs.with_scheduler("DDIM", BETAS).scheduler, 10)


class EverySecond(diffusers.HeunDiscreteScheduler):
    """As DPMSolverSDEScheduler: every second call's input is scaled by another sigma."""

    def scale_model_input(self, sample: Any, timestep: Any) -> Any:
        scaled = super().scale_model_input(sample, timestep)
        return scaled if self.state_in_first_order else 0.97 * scaled


class Nearly(diffusers.DDIMScheduler):
    """Its own x0 is of an alpha_bar that is 0.5% off."""

    def step(
        self,
        model_output: Any,
        timestep: int,
        sample: Any,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        right = self.alphas_cumprod
        self.alphas_cumprod = right * 0.995
        try:
            return super().step(model_output, timestep, sample, eta=eta, generator=generator)
        finally:
            self.alphas_cumprod = right


class Elsewhere(diffusers.DDIMScheduler):
    """Its step ends where the next call does not begin."""

    def step(
        self,
        model_output: Any,
        timestep: int,
        sample: Any,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        made = super().step(model_output, timestep, sample)
        made.prev_sample = sample
        return made


class Global(diffusers.DDIMScheduler):
    """It draws from the global random numbers."""

    def step(
        self,
        model_output: Any,
        timestep: int,
        sample: Any,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        torch.randn(1)
        return super().step(model_output, timestep, sample)


class Shy(diffusers.DDIMScheduler):
    """It gives no x0, and its step is not one of its levels."""

    def step(
        self,
        model_output: Any,
        timestep: int,
        sample: Any,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        return (super().step(model_output, timestep, sample).prev_sample * 1.01,)


class ClipsOtherwise(diffusers.DDIMScheduler):
    """What it clips to is not what its config says."""

    def step(
        self,
        model_output: Any,
        timestep: int,
        sample: Any,
        eta: float = 0.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        made = super().step(model_output, timestep, sample)
        made.pred_original_sample = made.pred_original_sample * (
            0.9 if self.config.clip_sample else 1
        )
        return made


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (EverySecond, {}, "at call 1 and 8 more of 19"),
        (Nearly, {}, "its own x0 is"),
        (Elsewhere, {}, "its step ends at"),
        (Global, {}, "draws global random numbers"),
        (Shy, {}, "its step gives variance"),
        (ClipsOtherwise, {"clip_sample": True}, "its clipped x0 is off by"),
        (diffusers.DDIMInverseScheduler, {}, "its noise grows from call 0 to the next"),
    ],
)
def test_the_check_can_fail(kind: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ExperimentError, match=f"^scheduler: {kind.__name__}.*{told}"):
        proven(
            kind(**BETAS, **{"clip_sample": False, **options} if kind is not EverySecond else {}),
            10,
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedule_of_a_run_that_begins_in_its_middle_is_held_too(name: str) -> None:
    scheduler = model_of("epsilon").with_scheduler(name, {}).scheduler
    begin = first_call(scheduler, 10, 0.6)
    assert proven(scheduler, 10, begin) == Schedule.of(scheduler, 10, begin)


def test_no_global_random_number_is_drawn_and_the_scheduler_stays_as_it_is() -> None:
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    for name in ("EulerAncestral", "DDPM", "LCM", "KDPM2Ancestral", "DPM++2M"):
        scheduler = (
            model_of("epsilon")
            .with_scheduler(
                name, {"algorithm_type": "sde-dpmsolver++"} if name == "DPM++2M" else {}
            )
            .scheduler
        )
        before = str(vars(scheduler))
        proven(scheduler, 5)
        assert str(vars(scheduler)) == before
    assert torch.equal(states[0], torch.get_rng_state()) and states[1:] == (
        str(np.random.get_state()),
        random.getstate(),
    )


def test_a_thousand_steps_are_held_in_a_second() -> None:
    scheduler = (
        model_of("epsilon").with_scheduler("DDPM", {"timestep_spacing": "trailing"}).scheduler
    )
    start = time.process_time()
    assert len(proven(scheduler, 1000).sigmas) == 1000
    assert time.process_time() - start < 1


def test_options_of_a_wrong_kind_are_refused_by_name() -> None:
    for options in (
        {"beta_start": "much"},
        {"trained_betas": (1.0, 2.0)},
        {"num_train_timesteps": 0},
        {"timestep_spacing": "loose"},
    ):
        with pytest.raises(UserError) as refusal:
            proven(model_of("epsilon").with_scheduler("DDIM", options).scheduler, 5, 0, options)
        assert (
            any(word in refusal.value.cause for word in ("DDIMScheduler", *options))
            and refusal.value.remedy
        )


def test_a_recording_from_before_is_verified_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version recorded flow sigmas without a word: what it recorded is not judged by
    today's rules.
    """
    from probe.running import planning

    monkeypatch.setattr(
        planning,
        "held_schedule",
        lambda model, experiment, begin: Schedule.of(model.scheduler, experiment.steps, begin),
    )
    run = recorded(tmp_path, scheduler="DPM++2M", scheduler_options={"use_flow_sigmas": True})
    monkeypatch.undo()
    assert not [check for check in verify(run, pipe()) if check.verdict == "failed"]


# --- clipping and thresholding --------------------------------------------------------------------

CLIPPING = [
    ("DDIM", {"clip_sample": True, "clip_sample_range": 1.5}),
    ("DDIM", {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9}),
    ("DDPM", {"thresholding": True, "sample_max_value": 5.0}),
    ("LCM", {"clip_sample": True}),
    ("Heun", {"clip_sample": True}),
    ("DPM++2M", {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.7}),
    ("DPM++2S", {"thresholding": True}),
    ("UniPC", {"thresholding": True, "sample_max_value": 2.0}),
]


@pytest.mark.parametrize(("name", "options"), CLIPPING)
def test_denoised_is_the_models_and_clipped_the_schedulers(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    run = recorded(tmp_path, scheduler=name, scheduler_options=options, images=2, decode_every=2)
    raw, limited = run.denoised(), run.denoised(clipped=True)
    assert (
        raw.attrs["unclipped"].startswith("x0 as the model says it, without the scheduler's")
        and "clipped" not in raw.attrs
    )
    assert (
        limited.attrs["clipped"].startswith("x0 as the scheduler goes on with it")
        and "unclipped" not in limited.attrs
    )
    assert (
        run.attributes["scheduler_clips"] in raw.attrs["unclipped"]
        and run.variable("decoded/picture").attrs["unclipped"] == raw.attrs["unclipped"]
    )
    assert (
        limited.dims == raw.dims
        and limited.dtype == np.float32
        and not np.array_equal(raw.values, limited.values)
    )
    second = fresh(model_of("epsilon").with_scheduler(name, options).scheduler)
    second.set_timesteps(4)
    extra = sampling.step_options(second, 0.0, [torch.Generator().manual_seed(i) for i in range(2)])
    for index, t in enumerate(second.timesteps):
        latents, prediction = (
            torch.from_numpy(array.isel(step=index).values)
            for array in (run.latents, run.prediction())
        )
        second.scale_model_input(latents, t)
        made = second.step(prediction, t, latents, **extra)
        own, mine = getattr(made, "pred_original_sample", None), limited.isel(step=index).values
        if name == "LCM":
            skip, whole = second.get_scalings_for_boundary_condition_discrete(t)
            own = (made.denoised - skip * latents) / whole
        own = second.model_outputs[-1] if own is None else own
        np.testing.assert_allclose(mine, own.numpy(), rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_where_nothing_is_clipped_nothing_is_said(tmp_path: Path) -> None:
    run = recorded(tmp_path, scheduler="DDIM", decode_every=2)
    assert (
        not {"clipped", "unclipped", "not_defined_at_step"} & set(run.denoised().attrs)
        and "unclipped" not in run.variable("decoded/picture").attrs
    )
    assert not {"scheduler_clips", "denoised_not_defined"} & set(run.attributes)
    xr.testing.assert_identical(run.denoised(), run.denoised(clipped=True))


def test_thresholding_of_each_image_by_itself_as_diffusers_does_it() -> None:
    x0 = 3 * torch.randn((3, 4, 5, 7), generator=torch.Generator().manual_seed(0))
    x0[1] *= 0.01  # below one: it is only clipped
    for ratio, most in ((0.995, 1.0), (0.9, 2.0), (0.5, 100.0)):
        scheduler = diffusers.DDIMScheduler(
            thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most
        )
        how = clipping("DDIMScheduler", scheduler.config)
        np.testing.assert_allclose(
            clipped(x0.numpy(), how), scheduler._threshold_sample(x0).numpy(), rtol=1e-6
        )


@pytest.mark.parametrize("value", ["much", math.nan, True, None, 1.5])
def test_limits_that_are_none_are_not_computed_with(value: Any) -> None:
    with pytest.raises(ValueError, match="no limits of x0"):
        clipping("DDIMScheduler", {"thresholding": True, "dynamic_thresholding_ratio": value})


# --- without any signal ---------------------------------------------------------------------------


def test_latents_that_would_be_infinite_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ExperimentError,
        match=r"DDIMScheduler divides by 0 at step 0: there is no signal \(alpha_bar 0\), and the "
        r"model predicts noise",
    ) as no:
        recorded(tmp_path, scheduler="DDIM", scheduler_options=ZERO)
    assert no.value.remedy.startswith(
        "Set rescale_betas_zero_snr: false in scheduler_options"
    ) and not list(tmp_path.iterdir())
    assert (
        recorded(tmp_path, "v_prediction", scheduler="DDIM", scheduler_options=ZERO)
        .denoised()
        .notnull()
        .all()
    )


@pytest.mark.parametrize(
    ("how", "decode_every"),
    [({"on_nan": "record"}, 1), ({"scheduler_options": {**ZERO, "clip_sample": True}}, 0)],
)
def test_what_is_not_defined_is_said_and_not_drawn_black(
    how: dict[str, Any], decode_every: int, tmp_path: Path, capsys: Any
) -> None:
    asked = {
        **LIGHT,
        "output": str(tmp_path),
        "scheduler": "DDIM",
        "scheduler_options": ZERO,
        "decode_every": decode_every,
        **how,
    }
    remark = (
        "At step 0, denoised is not defined: there is no signal (alpha_bar 0), and the model "
        "predicts noise."
    )
    settled = plan(
        model_of("epsilon").with_scheduler("DDIM", asked["scheduler_options"]), Experiment(**asked)
    )
    assert settled.remarks == (remark,)
    run = record(asked, pipeline=pipe(), progress=True)
    assert remark in capsys.readouterr().err.splitlines()
    assert run.status == "complete" and run.attributes["denoised_not_defined"] == [0]
    assert run.denoised().attrs["not_defined_at_step"] == [0] and list(run.undefined_steps) == [0]
    assert not np.isfinite(run.denoised().values[0]).all()
    assert (
        "denoised is not defined at step 0, where there is no signal" in check_schedule(run).detail
    )
    assert not [check for check in verify(run, pipe()) if check.verdict == "failed"]
    frames = first_frames(run)
    assert (frames[0] > 200).mean() > 0.8 and not (frames[0] == 0).all(
        axis=-1
    ).any()  # white, with words
    assert (
        np.asarray(Image.open(run.path / "contact-sheet.png")).shape
        == np.asarray(contact_sheet(run)).shape
    )


def first_frames(run: Run) -> list[np.ndarray]:
    from probe.figures.sheets import _steps

    return [np.asarray(frame) for frame, _, _ in _steps(run, 7)]


def test_levels_at_both_ends_are_in_the_outermost_bands() -> None:
    sigma = np.array([math.inf, 10.0, 1.0, 0.1, 0.0])
    maps = xr.DataArray(
        np.arange(5.0)[:, None, None] * np.ones((5, 2, 2)),
        dims=("step", "y", "x"),
        coords={"sigma": ("step", sigma)},
    )
    banded = by_sigma(maps, 2)
    assert list(banded["steps"].values) == [3, 2] and list(banded["sigma_to"].values) == [
        math.inf,
        1.0,
    ]
    np.testing.assert_allclose(banded.values[:, 0, 0], [1.0, 3.5])
    assert sigma_from_alpha_bar(0.0) == math.inf and sigma_from_alpha_bar(1.0) == 0


def test_alpha_bar_of_one_is_no_noise_and_everything_is_defined() -> None:
    """trained_betas that begin with 0: at timestep 0 nothing is noise."""
    betas = (0.0, *np.linspace(1e-3, 2e-2, 9).tolist())
    scheduler = (
        model_of("epsilon")
        .with_scheduler(
            "DDIM", {"trained_betas": betas, "num_train_timesteps": 10, "steps_offset": 0}
        )
        .scheduler
    )
    with pytest.raises(ExperimentError, match="its step 9 makes NaN"):  # DDIM divides 0 by 0 there
        proven(scheduler, 10)
    schedule = proven(scheduler, 10, finite=False)
    assert (schedule.sigmas[-1], schedule.alpha_bars[-1]) == (0.0, 1.0) and schedule.undefined(
        "epsilon"
    ) == ()
