"""Edits in the model: nothing at amount 0, by hand at amount 1, refused where they cannot be."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import tiny
import torch
from edited import EACH, asked, same, steps_of
from parity import product
from tiny_runs import model_for, pipeline

from probe.diffusion.families import family_of
from probe.editing.attention import InLayers, edited_map
from probe.errors import ExperimentError, ProbeError
from probe.settings.edits import EDIT_KINDS, Mask
from probe.settings.fields import SCHEDULERS
from probe.watching.hooks import count, editing_hooks

PLAIN = ("EulerAncestral", "Heun")
OTHERS = [name for name in SCHEDULERS if name not in PLAIN]
HOWS = [
    ("head", {"how": "zero"}),
    ("head", {"how": "mean", "attention": "self"}),
    ("head", {"how": "zero", "control": "random"}),
    ("head", {"how": "zero", "control": "other_head", "layers": ["down_blocks.0.*"]}),
    ("output", {"how": "zero"}),
    ("output", {"how": "mean", "control": "random"}),
    ("skip", {"how": "zero"}),
    ("map", {"method": "refine"}),
    ("map", {"attention": "self"}),
    ("noise", {"method": "add"}),
    ("guidance", {"rescale": 0.7}),
    ("guidance", {"to": 2.0}),
]


def unedited(scheduler: str, scale: float) -> Any:
    key = scheduler, scale
    if key not in _RUNS:
        _RUNS[key] = steps_of(asked(scheduler=scheduler, guidance_scale=scale))
    return _RUNS[key]


_RUNS: dict[Any, Any] = {}


def check_zero(kind: str, fields: dict[str, Any], scheduler: str, scale: float) -> None:
    edit = {"kind": kind, **EACH[kind], **fields, "amount": 0.0}
    experiment = asked(edit, scheduler=scheduler, guidance_scale=scale)
    if kind == "guidance" and scale <= 1:
        with pytest.raises(ExperimentError, match="there is no guidance"):
            steps_of(experiment)
        return
    assert same(steps_of(experiment), unedited(scheduler, scale))


@pytest.mark.parametrize(("kind", "scheduler", "scale"), product(tuple(EACH), PLAIN, (1.0, 3.0)))
def test_at_amount_0_every_kind_changes_no_bit(kind: str, scheduler: str, scale: float) -> None:
    check_zero(kind, {}, scheduler, scale)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", OTHERS)
@pytest.mark.parametrize("kind", EACH)
def test_at_amount_0_every_kind_changes_no_bit_of_any_scheduler(
    kind: str, scheduler: str, scale: float
) -> None:
    check_zero(kind, {}, scheduler, scale)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(("kind", "fields"), HOWS)
def test_at_amount_0_every_way_changes_no_bit(
    kind: str, fields: dict[str, Any], scale: float
) -> None:
    check_zero(kind, fields, "DDIM", scale)


@pytest.mark.parametrize("kind", EACH)
def test_at_amount_1_every_kind_changes_the_picture(kind: str) -> None:
    steps = steps_of(asked({"kind": kind, **EACH[kind]}))
    assert not torch.equal(steps[-1].next_latents, unedited("default", 3.0)[-1].next_latents)
    assert all(torch.isfinite(step.prediction).all() for step in steps)
    assert count(pipeline().unet) == 0


def test_every_kind_is_tested_here() -> None:
    assert {*EACH, "steer"} == set(EDIT_KINDS)


# --- by hand ---


def test_a_word_removed_from_the_text_is_the_prompt_without_it() -> None:
    edited = steps_of(asked({"kind": "remove", "words": ["astronaut"]}))
    assert same(edited, steps_of(asked(prompt="an scuba diving")))


def test_another_prompt_of_the_whole_run_is_that_prompt() -> None:
    for steps in ({}, {"steps": "0:"}):
        edited = steps_of(asked({"kind": "prompt", "text": "a cat", **steps}))
        assert same(edited, steps_of(asked(prompt="a cat")))


def test_a_prompt_switched_at_a_step_goes_on_as_the_other_run_from_these_latents() -> None:
    switched = steps_of(asked({"kind": "prompt", "text": "a cat", "steps": "2:"}))
    assert same(switched[:2], unedited("default", 3.0)[:2])
    whole = steps_of(
        asked(
            {"kind": "latents", "donor": {"prompt": "an astronaut scuba diving"}, "steps": "2"},
            prompt="a cat",
        )
    )
    assert torch.equal(switched[2].prediction, whole[2].prediction)


def test_a_head_zeroed_is_the_weight_zeroed_by_hand() -> None:
    edit = {"kind": "head", "layers": ["*"], "heads": [1], "how": "zero"}
    pipe = copy.deepcopy(pipeline())
    for module in pipe.unet.modules():
        if getattr(module, "is_cross_attention", False):
            width = module.inner_dim // module.heads
            module.to_out[0].weight.data[:, width : 2 * width] = 0
    assert same(steps_of(asked(edit)), steps_of(asked(), pipe))


def test_an_output_zeroed_is_the_module_that_puts_out_zeros() -> None:
    pipe = pipeline()
    with editing_hooks([(pipe.unet.mid_block, "output", torch.zeros_like)]):
        by_hand = steps_of(asked(), pipe)
    assert same(
        steps_of(asked({"kind": "output", "modules": ["mid_block"], "how": "zero"})), by_hand
    )


def test_a_skip_zeroed_is_zeroed_in_the_channels_that_the_down_block_gave() -> None:
    pipe = pipeline()
    resnet = pipe.unet.up_blocks[1].resnets[1]  # takes what conv_in put out
    width = pipe.unet.conv_in.out_channels
    seen: list[torch.Tensor] = []

    def by_hand(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return torch.cat([given[:, :-width], torch.zeros_like(given[:, -width:])], dim=1)

    outs: list[torch.Tensor] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *x: outs.append(x[2]))
    with editing_hooks([(resnet, "input", by_hand)]):
        expected = steps_of(asked(), pipe)
    handle.remove()
    assert torch.equal(seen[0][:, -width:], outs[0])
    edit = {"kind": "skip", "modules": ["up_blocks.1.resnets.1"], "how": "zero"}
    assert same(steps_of(asked(edit)), expected)


def test_guidance_switched_off_by_an_interval_is_the_conditional_prediction() -> None:
    steps = steps_of(asked({"kind": "guidance", "scale": 0, "steps": "1"}))
    assert torch.equal(steps[1].prediction, steps[1].branches["uncond"])
    assert same(
        steps_of(asked({"kind": "guidance", "scale": 7.5})), steps_of(asked(guidance_scale=7.5))
    )


def test_the_first_noise_of_another_seed_is_that_seed() -> None:
    assert same(steps_of(asked({"kind": "noise", "seed": 11})), steps_of(asked(seed=11)))


def test_an_embedding_of_all_words_is_the_other_prompt_at_these_places() -> None:
    edit = {"kind": "embedding", "words": ["astronaut"], "text": "an astronaut scuba diving"}
    assert same(steps_of(asked(edit)), unedited("default", 3.0))


def test_values_of_a_word_zeroed_are_zeroed_by_hand() -> None:
    pipe = pipeline()
    model = model_for(pipe, asked())
    prompt = model.read("an astronaut scuba diving")
    places = [i for i, of in enumerate(prompt.word_of) if of == 1]

    def by_hand(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[1, places] = 0
        return value

    crossing = [m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False)]
    with editing_hooks([(module.to_v, "output", by_hand) for module in crossing]):
        expected = steps_of(asked(), pipe)
    assert same(steps_of(asked({"kind": "value", "words": ["astronaut"]})), expected)


# --- the algebra of maps ---


@pytest.mark.parametrize("attention", ["cross", "self"])
def test_maps_replaced_with_their_own_change_no_bit(attention: str) -> None:
    edit = {"kind": "map", "attention": attention, "donor": {"seed": 3}}
    assert same(steps_of(asked(edit)), unedited("default", 3.0))
    refine = {"kind": "map", "method": "refine", "donor": {"seed": 3}}
    assert same(steps_of(asked(refine)), unedited("default", 3.0))


def test_maps_are_paired_with_the_text_of_their_step() -> None:
    text, donor = "a diving astronaut in a hat", {"prompt": "a cat in the hat"}
    edit = {"kind": "map", "method": "refine", "donor": donor}
    switched = steps_of(asked({"kind": "prompt", "text": text, "steps": "0:"}, edit))
    assert same(switched, steps_of(asked(edit, prompt=text)))


def test_attention_reweighted_by_1_changes_no_bit_and_by_2_then_a_half_nearly_none() -> None:
    word = {"kind": "reweight", "words": ["astronaut"]}
    own = unedited("default", 3.0)
    assert same(steps_of(asked({**word, "scale": 1.0})), own)
    assert same(steps_of(asked({**word, "scale": 2.0}, {**word, "scale": 0.5})), own)


def test_reweighted_by_0_is_what_the_value_zeroed_says() -> None:
    word = {"words": ["astronaut"]}
    zero = steps_of(asked({"kind": "reweight", "scale": 0.0, **word}))
    value = steps_of(asked({"kind": "value", **word}))
    torch.testing.assert_close(zero[-1].next_latents, value[-1].next_latents, rtol=1e-3, atol=1e-4)


def test_a_mask_is_the_mask_that_torch_knows() -> None:
    pipe = pipeline()
    model = model_for(pipe, asked())
    prompt = model.read("an astronaut scuba diving")
    places = [i for i, of in enumerate(prompt.word_of) if of == 1]
    mask = torch.ones(2, 77)
    mask[1, places] = 0
    own = pipe.unet.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        return own(*args, encoder_attention_mask=mask, **kwargs)

    pipe.unet.forward = masked
    try:
        expected = steps_of(asked(), pipe)
    finally:
        del pipe.unet.forward
    edited = steps_of(asked({"kind": "mask", "words": ["astronaut"]}))
    torch.testing.assert_close(
        edited[-1].next_latents, expected[-1].next_latents, rtol=1e-3, atol=1e-4
    )


def test_a_mask_of_all_that_a_place_attends_to_leaves_nothing_and_no_nan() -> None:
    shares = torch.zeros(1, 1, 2, 3)
    shares[..., 0, 1], shares[..., 1, :] = 1, 1 / 3
    edit = asked({"kind": "mask", "words": ["astronaut"]}).edits[0]
    assert isinstance(edit, Mask)
    one = InLayers(edit, (0,), [0], {"layer": (0,)}, {0: [1]})
    masked = edited_map(None, "layer", one, 0, shares)
    assert masked[0, 0].tolist() == [[0, 0, 0], [0.5, 0, 0.5]]
    assert torch.equal(torch.lerp(shares, masked, 0.0), shares)


def test_maps_swapped_twice_come_back() -> None:
    """A donor's maps, then this run's own over them: what the first put in, the second takes."""
    first = {"kind": "map", "donor": {"prompt": "a cat scuba diving"}, "amount": 0.999}
    second = {"kind": "map", "donor": {"seed": 3}}
    assert torch.allclose(
        steps_of(asked(first, second))[0].prediction,
        unedited("default", 3.0)[0].prediction,
        rtol=1e-4,
        atol=1e-5,
    )


# --- donors ---


def test_everything_resampled_from_another_seed_is_that_seeds_prediction() -> None:
    """With the donor's conv_in and time the UNet sees the donor's input alone."""
    edits = [
        {"kind": "output", "modules": ["conv_in"], "donor": {"seed": 8}, "steps": "0"},
    ]
    edited = steps_of(asked(*edits))
    other = steps_of(asked(seed=8))
    assert torch.equal(edited[0].prediction, other[0].prediction)


def test_latents_of_a_donor_are_the_donors_from_there_on() -> None:
    edited = steps_of(
        asked({"kind": "latents", "donor": {"seed": 8}, "steps": "0"}, scheduler="DDIM")
    )
    assert same(edited, steps_of(asked(seed=8, scheduler="DDIM")))


def test_a_random_control_has_the_norm_of_the_change() -> None:
    from probe.editing.values import other_heads, random_like

    own, other = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    changed = random_like(own, other, 0, 1, "mid_block")
    norms = [(x - own).flatten(1).norm(dim=1) for x in (changed, other)]
    torch.testing.assert_close(*norms)
    assert torch.equal(changed, random_like(own, other, 0, 1, "mid_block"))
    assert not torch.equal(changed, random_like(own, other, 1, 1, "mid_block"))
    assert torch.equal(random_like(own, own, 0), own)
    every = [("a", 0), ("a", 1), ("b", 0)]
    assert set(other_heads([("a", 0)], every, 0) or ()) <= {("a", 1), ("b", 0)}
    assert other_heads(every[:2], every, 0) is None


# --- what cannot be ---


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ([{"kind": "mask", "words": ["astronat"]}], "'astronat' is not a word|astronaut"),
        (
            [{"kind": "mask", "words": ["hat"], "branch": "uncond"}],
            "'hat' is not a word of ''|This prompt has no words",
        ),
        ([{"kind": "mask", "words": ["astronaut"], "layers": ["x.*"]}], "'x.*' matches no|"),
        ([{"kind": "head", "layers": ["*"], "heads": [9], "how": "zero"}], "has no head 9|0 to 1"),
        ([{"kind": "head", "layers": ["*"], "how": "zero", "steps": "7"}], "step 7 is not|0 to 3"),
        ([{"kind": "output", "modules": ["mid_blok"], "how": "zero"}], "matches no module|mid_b"),
        ([{"kind": "skip", "modules": ["mid_block"], "how": "zero"}], "matches no skip|up_blocks"),
        ([{"kind": "map", "donor": {"prompt": "zzz", "guidance_scale": 1}}], "other branches|abo"),
        ([{"kind": "map", "donor": {"run": "none.zarr"}}], "no recording|"),
        (
            [{"kind": "prompt", "text": "a cat"}, {"kind": "prompt", "text": "a hat"}],
            "determines the text of cond at step 0, as edits[0] does|",
        ),
        (
            [
                {"kind": "remove", "words": ["astronaut"]},
                {"kind": "prompt", "text": "a hat", "steps": "1:"},
            ],
            "determines the text of cond at step 1, as edits[0] does|",
        ),
        ([{"kind": "noise", "file": "none.npy"}], "there is no none.npy|numpy.save"),
        (
            [{"kind": "guidance", "scale": 1}, {"kind": "guidance", "scale": 2, "steps": "1:"}],
            "determines guidance scale at step 1, as edits[0] does|other steps",
        ),
        (
            [
                {"kind": "head", "layers": ["*"], "heads": [0], "how": "zero"},
                {"kind": "head", "layers": ["*"], "how": "mean"},
            ],
            "edits[1] (head): it determines head 0 of down_blocks|amount below 1",
        ),
        (
            [
                {"kind": "prompt", "text": "a cat", "steps": "1:"},
                {"kind": "mask", "words": ["astronaut"]},
            ],
            "edits[1] (mask): words: 'astronaut' is not a word of 'a cat'|There are: a, cat.",
        ),
        (
            [{"kind": "head", "layers": ["*"], "how": "zero", "control": "other_head"}],
            "too few for|control: random",
        ),
        (
            [{"kind": "output", "modules": ["time_embedding"], "how": "mean"}],
            "no places to take a mean over|zero or resample",
        ),
        ([{"kind": "noise", "seed": 3, "amount": 0.5}], "3 is this run's own|another seed"),
        (
            [
                {"kind": "prompt", "text": "a hat", "steps": "1:"},
                {"kind": "map", "donor": {"prompt": "a cat scuba diving"}},
            ],
            "replace pairs words, and 'a hat' has 2 of them|as many words",
        ),
    ],
)
def test_what_matches_nothing_or_contradicts_is_refused(edits: Any, says: str) -> None:
    with pytest.raises(ProbeError) as error:
        steps_of(asked(*edits))
    cause, remedy = says.split("|")
    assert cause in error.value.cause and error.value.cause.startswith("edits["), error.value.cause
    assert remedy in error.value.remedy


def test_a_text_that_no_branch_reads_is_not_edited_in_silence() -> None:
    edit = {"kind": "prompt", "text": "a cat", "branch": "uncond"}
    with pytest.raises(ExperimentError, match="there is no uncond branch at guidance_scale 1"):
        steps_of(asked(edit, guidance_scale=1.0))


# --- the same for Stable Diffusion XL ---


@functools.cache
def xl() -> Any:
    return family_of(tiny.xl_pipeline())


@functools.cache
def unedited_xl(scale: float) -> Any:
    return steps_of(asked(guidance_scale=scale), model=xl())


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("kind", EACH)
def test_of_sdxl_too_nothing_changes_at_0_and_something_at_1(kind: str, scale: float) -> None:
    if kind == "guidance" and scale <= 1:
        return  # refused, as shown above
    edit = {"kind": kind, **EACH[kind]}
    own = unedited_xl(scale)
    assert same(steps_of(asked({**edit, "amount": 0.0}, guidance_scale=scale), model=xl()), own)
    edited = steps_of(asked(edit, guidance_scale=scale), model=xl())
    assert not torch.equal(edited[-1].next_latents, own[-1].next_latents)


def test_of_sdxl_the_pooled_text_is_edited_with_the_prompt() -> None:
    removed = steps_of(asked({"kind": "remove", "words": ["astronaut"]}), model=xl())
    assert same(removed, steps_of(asked(prompt="an scuba diving"), model=xl()))
    switched = steps_of(asked({"kind": "prompt", "text": "a cat", "steps": "0:"}), model=xl())
    assert same(switched, steps_of(asked(prompt="a cat"), model=xl()))


@functools.cache
def unedited_in(dtype: torch.dtype) -> Any:
    return steps_of(asked(), pipeline(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", EACH)
def test_in_half_precision_nothing_changes_at_0(kind: str, dtype: torch.dtype) -> None:
    edit = {"kind": kind, **EACH[kind], "amount": 0.0}
    assert same(steps_of(asked(edit), pipeline(dtype)), unedited_in(dtype))
