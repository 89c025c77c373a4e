"""With Stable Diffusion XL the loop gives the bits of diffusers' `StableDiffusionXLPipeline`.

Every pair of settings is met in a covering array; the whole product runs with `-m slow`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from parity import PROMPT, Case, assert_every_pair_is_covered, label, pairwise
from tiny_xl import assert_same, base, model_of, ours, peer_of, theirs

from probe.diffusion.sdxl import StableDiffusionXL
from probe.settings.fields import SCHEDULERS

# A scheduler whose class clips by default: this pipeline says so and leaves it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning"
)


FACTORS: dict[str, tuple[Any, ...]] = {
    "scheduler": tuple(SCHEDULERS),
    "guidance_scale": (5.0, 1.0),
    "size": ((32, 32), (32, 48)),
    "images": (1, 2),
    "negative": ("", "cat"),
    "shape": tuple(tiny.XL_UNETS),
    "guidance_rescale": (0.0, 0.3),
}


PRODUCT: list[Case] = list(itertools.product(*FACTORS.values()))


def check(case: Case) -> None:
    named = dict(zip(FACTORS, case, strict=True))
    scheduler, shape, (height, width) = (
        named.pop("scheduler"),
        named.pop("shape"),
        named.pop("size"),
    )
    last = assert_same(
        model_of(shape, scheduler), peer_of(shape, scheduler), height=height, width=width, **named
    )
    assert last.shape == (named["images"], 4, height // 4, width // 4)


def test_every_pair_of_settings_is_covered() -> None:
    assert_every_pair_is_covered(*FACTORS.values())
    assert len(FACTORS["scheduler"]) == 14 and len(pairwise(*FACTORS.values())) <= 50


def marked(number: int, case: Case) -> Any:
    """A case for pytest: the first 16, which cover the most pairs.

    The others are slow, and so are those of KDPM2 at each step.
    """
    return pytest.param(
        case, marks=[pytest.mark.slow] if number >= 16 or case[0].startswith("KDPM2") else []
    )


@pytest.mark.parametrize(
    "case",
    [marked(*numbered) for numbered in enumerate(pairwise(*FACTORS.values()))],
    ids=lambda case: "-".join(map(label, case)),
)
def test_bits_equal_diffusers(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_bits_equal_diffusers_for_every_combination(name: str) -> None:
    cases = [case for case in PRODUCT if case[0] == name]
    assert len(cases) == 96
    for case in cases:
        check(case)


@pytest.mark.parametrize("shape", tiny.XL_UNETS)
def test_bits_equal_diffusers_with_the_models_own_scheduler_and_size(shape: str) -> None:
    pipeline = base(shape)
    guidance = 0.0 if shape == "turbo" else 5.0
    latents, pictures = theirs(pipeline, guidance_scale=guidance, steps=4)
    model = StableDiffusionXL.of(pipeline)
    last = ours(model, guidance_scale=guidance, steps=4)[-1].next_latents
    assert torch.equal(latents, last) and torch.equal(
        torch.from_numpy(pictures), model.decode(last)[0]
    )
    assert last.shape[-1] == (16 if shape == "turbo" else 8)


@pytest.mark.parametrize(
    "prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", ["", " ", "cat"])
def test_an_empty_negative_prompt_is_zeros_only_where_the_model_says_so(
    prediction: str, zeros: bool, negative: str
) -> None:
    pipeline = base("base", prediction, zeros)
    model = StableDiffusionXL.of(pipeline)
    assert_same(model, pipeline, negative=negative, guidance_scale=5.0)
    told = model.condition(PROMPT, negative).arguments["uncond"]
    empty = zeros and not negative
    assert all(
        bool((told[name] == 0).all()) is empty for name in ("encoder_hidden_states", "text_embeds")
    )


@pytest.mark.parametrize(
    "sizes", [(64, 48, 0, 0, 32, 32), (32, 32, 4, 8, 32, 32), (16, 16, 0, 0, 1024, 512)]
)
def test_size_ids_are_what_the_pipeline_tells_its_unet(sizes: tuple[int, ...]) -> None:
    pipeline = base()
    model = StableDiffusionXL.of(pipeline)
    told = {
        "original_size": sizes[:2],
        "crops_coords_top_left": sizes[2:4],
        "target_size": sizes[4:],
    }
    last = assert_same(model, pipeline, {"size_ids": sizes}, guidance_scale=5.0, **told)
    assert not torch.equal(last, ours(model)[-1].next_latents), "the sizes change the picture"


def test_without_size_ids_the_model_is_told_of_the_pictures_own_size() -> None:
    model = StableDiffusionXL.of(base())
    own = ours(model, height=32, width=48)[-1].next_latents
    assert torch.equal(
        own, ours(model, height=32, width=48, size_ids=(32, 48, 0, 0, 32, 48))[-1].next_latents
    )
    assert not torch.equal(
        own, ours(model, height=32, width=48, size_ids=(48, 32, 0, 0, 48, 32))[-1].next_latents
    )


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_runs_in_float32_where_the_model_says_so(
    dtype: torch.dtype, upcast: bool, recwarn: Any
) -> None:
    pipeline = tiny.xl_pipeline()
    pipeline.vae.register_to_config(force_upcast=upcast)
    pipeline.to(dtype=dtype)
    model = StableDiffusionXL.of(pipeline)
    before = model.digest()
    assert_same(model, pipeline, guidance_scale=1.0, steps=1)
    latents = torch.randn((1, 4, 8, 8), dtype=dtype, generator=torch.Generator().manual_seed(0))
    pixels, again = model.pixels(latents)
    assert not again and pixels.dtype == (
        torch.float32 if upcast and dtype == torch.float16 else dtype
    )
    assert model.vae.dtype == dtype and model.digest() == before


def test_a_vae_with_a_mean_and_a_spread_of_its_latents() -> None:
    pipeline = tiny.xl_pipeline()
    pipeline.vae.register_to_config(
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0]
    )
    assert_same(StableDiffusionXL.of(pipeline), pipeline, guidance_scale=1.0, steps=1)
