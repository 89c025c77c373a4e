"""The loop gives the bits of diffusers' `StableDiffusionPipeline`, step by step.

What a `Step` says of itself is true. Every pair of settings is met in a covering array of about 30
cases. The whole product (896) runs with `-m slow`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from typing import Any

import diffusers
import parity
import pytest
import tiny
import torch
from parity import PROMPT, SEED, Case, assert_bits, assert_every_pair_is_covered, label, pairwise

from probe.conversions import sigma_from_alpha_bar
from probe.diffusion import guidance, sampling
from probe.diffusion.sampling import denoise
from probe.diffusion.schedule import Schedule, fresh
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError
from probe.settings.fields import SCHEDULERS
from probe.watching import hooks

# Building a pipeline around a scheduler whose class clips by default; the pipeline turns that off,
# and so do we.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning"
)

STEPS = 4
FACTORS: dict[str, tuple[Any, ...]] = {
    "scheduler": tuple(SCHEDULERS),
    "guidance_scale": (7.5, 1.0),
    "negative": ("", "cat"),
    "size": ((32, 32), (32, 48)),
    "images": (1, 2),
    "guidance_rescale": (0.0, 0.3),
    "prediction": ("epsilon", "v_prediction"),
}
PRODUCT: list[Case] = list(itertools.product(*FACTORS.values()))
OFTEN = {"DDIM", "Euler", "DPM++2M", "UniPC"}  # with both kinds of prediction in the quick tests
EXPLODING = {"LMS", "Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral"}
CALLS_OF_20 = {
    "PNDM": 21,
    "Heun": 39,
    "KDPM2": 39,
    "KDPM2Ancestral": 39,
}  # every other scheduler: 20

# Scheduler options that move the noise levels or bring in randomness: (scheduler, options, eta,
# prediction type).
OPTIONS: list[tuple[str, dict[str, Any], float, str]] = [
    ("DDIM", {}, 0.5, "epsilon"),
    ("DDIM", {}, 0.5, "v_prediction"),
    ("DDIM", {}, 1.0, "epsilon"),
    ("DDIM", {"timestep_spacing": "trailing"}, 0.0, "epsilon"),
    ("DDIM", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 0.0, "v_prediction"),
    ("DDIM", {"clip_sample": False, "thresholding": True}, 0.0, "epsilon"),
    ("Euler", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    (
        "Euler",
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        0.0,
        "v_prediction",
    ),
    ("Euler", {"timestep_spacing": "leading"}, 0.0, "epsilon"),
    ("DPM++2M", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("DPM++2M", {"use_karras_sigmas": True}, 0.0, "v_prediction"),
    ("DPM++2M", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, 0.0, "epsilon"),
    ("DPM++2M", {"final_sigmas_type": "sigma_min"}, 0.0, "epsilon"),
    ("DPM++2S", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("LMS", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("Heun", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("KDPM2", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("KDPM2Ancestral", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("UniPC", {"use_karras_sigmas": True}, 0.0, "epsilon"),
    ("DEIS", {"use_karras_sigmas": True}, 0.0, "epsilon"),
]
CLIPPING = {"thresholding", "clip_sample"}


@functools.cache
def base(prediction: str) -> diffusers.StableDiffusionPipeline:
    return tiny.pipeline(prediction)


def peer(name: str, prediction: str, **options: Any) -> diffusers.StableDiffusionPipeline:
    """diffusers' pipeline around the same networks, with a scheduler made from the same config in
    diffusers' own way.
    """
    kind, extra = SCHEDULERS[name]
    parts = base(prediction)
    scheduler = getattr(diffusers, kind).from_config(parts.scheduler.config, **{**extra, **options})
    made = diffusers.StableDiffusionPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def model_of(name: str, prediction: str) -> StableDiffusion:
    return StableDiffusion.of(base(prediction)).with_scheduler(name, {})


cached_peer = functools.cache(peer)
theirs = functools.partial(parity.theirs, steps=STEPS)
ours = functools.partial(parity.ours, steps=STEPS, guidance_scale=7.5)


def check(case: Case) -> None:
    """Latents and pictures of one case, bit for bit."""
    named = dict(zip(FACTORS, case, strict=True))
    name, prediction, (height, width) = (
        named.pop("scheduler"),
        named.pop("prediction"),
        named.pop("size"),
    )
    named |= {"height": height, "width": width}
    model = model_of(name, prediction)
    last = assert_bits(model, ours(model, **named), *theirs(cached_peer(name, prediction), **named))
    assert last.shape == (named["images"], 4, height // 4, width // 4)


# --- parity ---------------------------------------------------------------------------------------


def test_every_pair_of_settings_is_covered() -> None:
    assert_every_pair_is_covered(*FACTORS.values())
    assert (
        len(FACTORS["scheduler"]) == 14
        and len(PRODUCT) == 896
        and len(pairwise(*FACTORS.values())) <= 45
    )


@pytest.mark.parametrize(
    "case", pairwise(*FACTORS.values()), ids=lambda case: "-".join(map(label, case))
)
def test_bits_equal_diffusers(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_bits_equal_diffusers_for_every_combination(name: str) -> None:
    cases = [case for case in PRODUCT if case[0] == name]
    assert len(cases) == 64
    for case in cases:
        check(case)


@pytest.mark.parametrize(
    ("name", "options", "eta", "prediction"),
    OPTIONS,
    ids=lambda value: label(value) if value else "-",
)
def test_bits_equal_diffusers_with_scheduler_options(
    name: str, options: dict[str, Any], eta: float, prediction: str
) -> None:
    model, how = (
        StableDiffusion.of(base(prediction)).with_scheduler(name, options),
        {"eta": eta, "steps": 6, "images": 2},
    )
    assert_bits(model, ours(model, **how), *theirs(peer(name, prediction, **options), **how))


@pytest.mark.parametrize("steps", [7, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_bits_equal_diffusers_at_more_steps_and_for_a_model_of_the_pipeline_itself(
    name: str, steps: int
) -> None:
    pipeline = peer(name, "epsilon")
    latents, _ = theirs(pipeline, steps=steps)
    assert torch.equal(latents, ours(model_of(name, "epsilon"), steps=steps)[-1].next_latents)
    # `of` takes over what the pipeline changed in its scheduler's config after building it (DDIM,
    # DDPM: clip_sample).
    assert torch.equal(latents, ours(StableDiffusion.of(pipeline), steps=steps)[-1].next_latents)


@pytest.mark.smoke
def test_the_pipelines_latent_output_is_its_last_step() -> None:
    pipeline = peer("DDIM", "epsilon")
    made = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(SEED)],
        output_type="latent",
    ).images
    assert torch.equal(made, theirs(pipeline)[0])


def test_default_size_is_the_models_own_as_in_diffusers() -> None:
    pipeline = peer("DDIM", "epsilon")
    made = pipeline(
        PROMPT,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(SEED)],
        output_type="latent",
    ).images
    assert torch.equal(
        made, ours(model_of("DDIM", "epsilon"), steps=2, height=None, width=None)[-1].next_latents
    )


@pytest.mark.parametrize("how", ["everywhere", "one element"])
def test_meta_one_ulp_in_the_guidance_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in PRODUCT if case[0] == "DDIM")
    check(case)
    right = guidance.guide

    def wrong(*args: Any) -> torch.Tensor:
        guided = right(*args)
        nudged = torch.nextafter(guided, torch.tensor(math.inf))
        return (
            nudged
            if how == "everywhere"
            else torch.cat([nudged.flatten()[:1], guided.flatten()[1:]]).reshape(guided.shape)
        )

    monkeypatch.setattr(guidance, "guide", wrong)
    with pytest.raises(AssertionError, match="latents differ"):
        check(case)


def test_schedulers_without_an_option_refuse_it() -> None:
    """No combination above is left out; these are the options that diffusers itself does not
    have.
    """
    for name in ("DDIM", "DDPM", "PNDM", "LCM", "EulerAncestral"):
        with pytest.raises(ExperimentError, match="has no option 'use_karras_sigmas'"):
            StableDiffusion.of(base("epsilon")).with_scheduler(name, {"use_karras_sigmas": True})


# --- the number of calls --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "guidance_scale"),
    [
        *((name, 1.0) for name in SCHEDULERS),
        ("DDIM", 7.5),
        *(pytest.param(name, 7.5, marks=pytest.mark.slow) for name in SCHEDULERS if name != "DDIM"),
    ],
)
def test_one_unet_call_and_one_scheduler_step_per_yield(
    name: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counts = model_of(name, "epsilon"), Counter[str]()
    kind = type(model.scheduler)
    right = kind.step

    @functools.wraps(right)  # its signature tells the loop which options it takes
    def counted(*args: Any, **options: Any) -> Any:
        counts["step"] += 1
        return right(*args, **options)

    monkeypatch.setattr(kind, "step", counted)
    scheduler = fresh(model.scheduler)
    scheduler.set_timesteps(20)
    conditioning = model.condition(PROMPT, guided=guidance_scale > 1)
    with hooks.Hooks([(model.unet, "output", lambda _: counts.update(["unet"]))]):
        for index, step in enumerate(
            denoise(model, conditioning, steps=20, guidance_scale=guidance_scale)
        ):
            assert step.index == index
            assert counts == {"unet": index + 1, "step": index + 1}
            assert step.timestep == float(scheduler.timesteps[index])
    assert (
        counts["unet"]
        == len(scheduler.timesteps)
        == len(Schedule.of(model.scheduler, 20).timesteps)
        == CALLS_OF_20.get(name, 20)
    )


# --- what a step says of itself -------------------------------------------------------------------


def cases_with_options() -> list[Any]:
    plain = [(name, {}, prediction) for name in SCHEDULERS for prediction in FACTORS["prediction"]]
    more = [
        (name, options, prediction)
        for name, options, eta, prediction in OPTIONS
        if options and not eta
    ]
    seldom = [case for case in plain if case[2] == "v_prediction" and case[0] not in OFTEN]
    return [
        pytest.param(
            *case,
            id="-".join(map(label, case)),
            marks=[pytest.mark.slow] if case in seldom else [],
        )
        for case in plain + more
    ]


MANY = pytest.mark.parametrize("calls", [6, pytest.param(10, marks=pytest.mark.slow)])


@MANY
@pytest.mark.parametrize(("name", "options", "prediction"), cases_with_options())
def test_sigmas_are_those_of_the_scheduler_at_every_call(
    name: str, options: dict[str, Any], prediction: str, calls: int
) -> None:
    model = StableDiffusion.of(base(prediction)).with_scheduler(name, options)
    schedule = Schedule.of(model.scheduler, calls)
    assert schedule.variance_exploding == (name in EXPLODING)
    assert len(schedule.timesteps) == len(schedule.sigmas) == len(schedule.alpha_bars)
    seen: list[torch.Tensor] = []
    with hooks.Hooks([(model.unet, "input", seen.append)]):
        steps = ours(model, steps=calls, guidance_scale=1.0)
    for step, fed in zip(steps, seen, strict=True):
        assert (step.timestep, step.sigma, step.alpha_bar) == (
            schedule.timesteps[step.index],
            schedule.sigmas[step.index],
            schedule.alpha_bars[step.index],
        )
        if schedule.variance_exploding:
            torch.testing.assert_close(step.model_input, fed, rtol=1e-4, atol=1e-6)
            # the factor itself, which is what says sigma: latents = sqrt(sigma^2 + 1) model_input
            factor = float((step.latents * fed).sum() / (fed * fed).sum())
            assert factor == pytest.approx(math.sqrt(step.sigma**2 + 1), rel=1e-4)
        else:
            assert torch.equal(step.model_input, fed) and torch.equal(step.latents, fed)
        assert step.sigma == pytest.approx(
            sigma_from_alpha_bar(step.alpha_bar) if step.alpha_bar else math.inf, rel=1e-6
        )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_alpha_bars_are_the_training_schedule_at_those_timesteps(name: str) -> None:
    model = model_of(name, "epsilon")
    schedule, trained = Schedule.of(model.scheduler, 10), model.scheduler.alphas_cumprod
    whole = [
        (t, a) for t, a in zip(schedule.timesteps, schedule.alpha_bars, strict=True) if t == int(t)
    ]
    assert len(whole) >= 10 // 2  # KDPM2's calls between two levels have fractional timesteps
    for timestep, alpha_bar in whole:
        assert alpha_bar == pytest.approx(float(trained[int(timestep)]), rel=1e-3)
    assert all(
        later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(schedule.sigmas)
    )


@MANY
@pytest.mark.parametrize(
    ("name", "options", "prediction"),
    [case for case in cases_with_options() if not CLIPPING & set(case.values[1])],
)
def test_denoised_is_the_schedulers_own(
    name: str, options: dict[str, Any], prediction: str, calls: int
) -> None:
    """A second scheduler gets the same inputs: `step` must not be called twice on one."""
    model = StableDiffusion.of(base(prediction)).with_scheduler(name, options)
    second = fresh(model.scheduler)
    second.set_timesteps(calls)
    extra = sampling.step_options(second, 0.0, [torch.Generator().manual_seed(SEED)])
    ddim = model_of("DDIM", prediction).scheduler if name == "PNDM" else None
    for step, t in zip(ours(model, steps=calls), second.timesteps, strict=True):
        second.scale_model_input(step.latents, t)  # LMS wants to have been asked
        made = second.step(step.prediction, t, step.latents, **extra)
        mine, own = step.denoised, getattr(made, "pred_original_sample", None)
        if name == "LCM":  # gives x0 only after its boundary condition
            skip, out = second.get_scalings_for_boundary_condition_discrete(t)
            mine, own = out * step.denoised + skip * step.latents, made.denoised
        elif name in ("DPM++2M", "DPM++2S", "UniPC"):  # keep x0 of the last calls
            own = second.model_outputs[-1]
        elif name == "DEIS":  # keeps eps
            mine, own = step.eps, second.model_outputs[-1]
        elif ddim is not None:  # PNDM has no x0; DDIM's is the same formula on the same alphas
            ddim = fresh(ddim)
            ddim.set_timesteps(calls)
            own = ddim.step(step.prediction, int(t), step.latents).pred_original_sample
        assert own is not None
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


@pytest.mark.parametrize("prediction", FACTORS["prediction"])
@pytest.mark.parametrize("name", ["DDIM", "Euler"])
def test_eps_v_and_denoised_agree_with_each_other(name: str, prediction: str) -> None:
    for step in ours(model_of(name, prediction), steps=10):
        a, x = step.alpha_bar, step.model_input
        torch.testing.assert_close(
            a**0.5 * step.denoised + (1 - a) ** 0.5 * step.eps, x, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(
            a**0.5 * step.eps - (1 - a) ** 0.5 * step.denoised, step.v, rtol=1e-3, atol=1e-3
        )
        assert torch.equal(step.prediction, step.eps if prediction == "epsilon" else step.v)


def test_no_signal_at_all_is_an_infinite_sigma() -> None:
    model = StableDiffusion.of(base("v_prediction")).with_scheduler(
        "DDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    )
    first = ours(model)[0]
    assert (first.alpha_bar, first.sigma) == (0.0, math.inf)
    assert torch.equal(first.denoised, -first.prediction) and torch.equal(first.eps, first.latents)


def test_without_guidance_there_is_no_unconditional_prediction() -> None:
    for step in ours(model_of("DDIM", "epsilon"), guidance_scale=1.0, guidance_rescale=0.3):
        assert step.prediction_uncond is None and torch.equal(step.prediction, step.prediction_cond)


def test_each_steps_latents_are_what_the_step_before_made() -> None:
    steps = ours(model_of("EulerAncestral", "epsilon"), images=2)
    for before, after in itertools.pairwise(steps):
        assert torch.equal(before.next_latents, after.latents)
        assert not torch.equal(after.latents, after.next_latents)


# --- seeds, gradients, leaving early --------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDIM", "EulerAncestral", "DDPM"])
def test_an_image_does_not_depend_on_its_neighbours(name: str) -> None:
    model = model_of(name, "epsilon")
    conditioning = model.condition(PROMPT)
    both = list(denoise(model, conditioning, steps=STEPS, seed=7, images=2))
    alone = list(denoise(model, conditioning, steps=STEPS, seed=8, images=1))
    assert torch.equal(both[0].latents[1:], alone[0].latents)
    assert not torch.equal(both[0].latents[:1], alone[0].latents)
    largest = float(
        alone[-1].next_latents.abs().max()
    )  # batching changes bits, so from here on only closeness
    torch.testing.assert_close(
        both[-1].next_latents[1:], alone[-1].next_latents, rtol=1e-3, atol=1e-4 * largest
    )


def test_the_same_seed_is_the_same_picture_and_another_is_not() -> None:
    model = model_of("DDPM", "epsilon")
    first, again = ours(model)[-1].next_latents, ours(model)[-1].next_latents
    other = list(denoise(model, model.condition(PROMPT), steps=STEPS, seed=SEED + 1))[
        -1
    ].next_latents
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    state = torch.get_rng_state()
    first = ours(model_of("EulerAncestral", "epsilon"))[-1].next_latents
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1234)
    assert torch.equal(first, ours(model_of("EulerAncestral", "epsilon"))[-1].next_latents)


@pytest.mark.parametrize("mode", [True, False])
def test_the_callers_gradient_mode_is_the_callers(mode: bool) -> None:
    model = model_of("Heun", "epsilon")
    conditioning = model.condition(PROMPT)
    with torch.set_grad_enabled(mode):
        for step in denoise(model, conditioning, steps=STEPS):
            assert torch.is_grad_enabled() is mode
            assert not step.prediction.requires_grad and not step.next_latents.requires_grad
            assert (
                step.latents.requires_grad_().sum().requires_grad
            ) is mode  # the caller may differentiate, or not
            step.latents.requires_grad_(False)
        assert torch.is_grad_enabled() is mode


@pytest.mark.parametrize("name", ["PNDM", "DPM++2M", "KDPM2", "EulerAncestral"])
def test_leaving_early_leaves_nothing_behind(name: str) -> None:
    model = model_of(name, "epsilon")
    config, state = dict(model.scheduler.config), str(vars(model.scheduler))
    whole = ours(model)[-1].next_latents
    weights = {key: value.clone() for key, value in model.unet.state_dict().items()}
    for step in denoise(model, model.condition(PROMPT), steps=STEPS, seed=99):
        if step.index == 1:
            break
    loop = denoise(model, model.condition(PROMPT), steps=STEPS, seed=99)
    next(loop)
    loop.close()
    assert torch.is_grad_enabled() and hooks.count(model.unet) == 0
    assert dict(model.scheduler.config) == config and str(vars(model.scheduler)) == state
    assert all(torch.equal(value, weights[key]) for key, value in model.unet.state_dict().items())
    assert torch.equal(whole, ours(model)[-1].next_latents)


def test_asking_for_the_schedule_changes_no_scheduler() -> None:
    for name in SCHEDULERS:
        scheduler = model_of(name, "epsilon").scheduler
        state = str(vars(scheduler))
        Schedule.of(scheduler, 7)
        assert str(vars(scheduler)) == state


def test_what_is_done_to_a_fresh_scheduler_is_not_seen_in_the_next() -> None:
    scheduler = model_of("KDPM2", "epsilon").scheduler
    first = fresh(scheduler)
    untouched = str(vars(fresh(scheduler)))
    first.set_timesteps(3)
    first.alphas_cumprod.zero_()
    first.sigmas.zero_()
    assert str(vars(fresh(scheduler))) == untouched
    assert type(fresh(scheduler)) is type(scheduler) and fresh(scheduler).config == first.config


def test_another_class_takes_what_was_set_but_not_this_classs_defaults() -> None:
    """As diffusers' `from_config`: Euler keeps its own linspace although PNDM's default is
    leading.
    """
    model = StableDiffusion.of(base("epsilon"))
    assert model.scheduler.config.timestep_spacing == "leading"
    assert model.with_scheduler("Euler", {}).scheduler.config.timestep_spacing == "linspace"
    assert (
        model.with_scheduler(
            "Euler", {"timestep_spacing": "leading"}
        ).scheduler.config.timestep_spacing
        == "leading"
    )
    assert (
        model.with_scheduler(
            "default", {"set_alpha_to_one": True}
        ).scheduler.config.timestep_spacing
        == "leading"
    )
    assert model.with_scheduler("DDIM", {}).scheduler.config.clip_sample is False
    assert model.with_scheduler("DDIM", {"clip_sample": True}).scheduler.config.clip_sample is True
