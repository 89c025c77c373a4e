"""Stable Diffusion XL by its parts: what captures and proofs ask of a family.

What does not fit is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from parity import PROMPT
from tiny_xl import base

from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError
from probe.watching.rehearsal import rehearse


def test_each_text_encoder_reads_the_prompt_with_its_own_tokenizer() -> None:
    model = StableDiffusionXL.of(base())
    tokens = model.tokens(PROMPT)
    assert list(tokens) == list(model.text_encoders()) == ["text_encoder", "text_encoder_2"]
    first, second = tokens.values()
    assert first.words == second.words == tuple(PROMPT.split()) and first.spans == second.spans
    assert first.tokens[-1] == "<|endoftext|>" and second.tokens[-1] == "!", "they pad differently"
    told = model.encode_prompt(tokens)
    assert told["encoder_hidden_states"].shape == (1, 77, 40) and told["text_embeds"].shape == (
        1,
        12,
    )


def test_the_skeleton_computes_the_same_shapes() -> None:
    model = StableDiffusionXL.of(base("ssd-1b"))
    bare = model.skeleton()
    assert bare.components().keys() == model.components().keys() and bare.device.type == "meta"
    for name, module in model.components().items():
        assert {k: v.shape for k, v in module.state_dict().items()} == {
            k: v.shape for k, v in bare.components()[name].state_dict().items()
        }
    with torch.device("meta"):
        x, t = torch.zeros((2, *model.latent_shape(1)[1:])), torch.zeros((), dtype=torch.long)
    assert bare.call(x, t, bare.blank(2, 77)).shape == x.shape


def test_attention_layers_are_those_of_the_unet() -> None:
    for shape, cross in (("base", 11), ("ssd-1b", 14)):
        model = StableDiffusionXL.of(base(shape))
        layers = model.attention_layers()
        kinds = [layer.kind for layer in layers.values()]
        processors = {name.removesuffix(".processor") for name in model.unet.attn_processors}
        assert layers.keys() == processors and kinds.count("cross") == kinds.count("self") == cross
        assert {
            path.rpartition(".")[2] for path, layer in layers.items() if layer.kind == "cross"
        } == {"attn2"}
    assert not any(path.startswith("mid_block") for path in layers), "SSD-1B has none there"


def test_a_rehearsal_sees_every_component_and_layer() -> None:
    model = StableDiffusionXL.of(base("ssd-1b"))
    found = rehearse(model, model.latent_shape(2, 32, 48), branches=2, tokens=77)
    assert list(found.flops) == ["text_encoder", "text_encoder_2", "unet", "vae"] and all(
        found.flops.values()
    )
    assert (
        {*found.grids, *found.self_grids} == model.attention_layers().keys() == found.heads.keys()
    )
    assert set(found.grids.values()) == {(4, 6), (2, 3)}
    assert found.outputs["unet.conv_out"] == (4, 4, 8, 12)
    assert found.outputs["text_encoder_2.text_projection"] == (1, 12)


def drop_second(pipeline: Any) -> None:
    pipeline.text_encoder_2 = None


def other_second(pipeline: Any) -> None:
    pipeline.register_modules(text_encoder_2=pipeline.text_encoder)


def half_second(pipeline: Any) -> None:
    pipeline.text_encoder_2.half()


def replaced(pipeline: Any) -> None:
    pipeline.encode_prompt = lambda *args, **named: None


def other_width(pipeline: Any) -> None:
    pipeline.register_modules(unet=tiny.pipeline(cross_attention_dim=40).unet)


def short_second(pipeline: Any) -> None:
    shorter = copy.deepcopy(pipeline.tokenizer_2)
    shorter.model_max_length = 70
    pipeline.register_modules(tokenizer_2=shorter)


FORMATS = (
    "its parts are of different number formats: unet float32, vae float32, text_encoder float32, "
    "text_encoder_2 float16."
)
WRONG: dict[str, Callable[[Any], None]] = {
    "the pipeline has no text_encoder_2.": drop_second,
    "its text_encoder_2 is a CLIPTextModel, which is not supported.": other_second,
    FORMATS: half_second,
    "its encode_prompt was replaced": replaced,
    "its tokenizers make prompts of 77 and 70 tokens.": short_second,
    "a UNet without SDXL's added conditions is not supported yet.": other_width,
}


@pytest.mark.parametrize("problem", WRONG)
def test_what_does_not_fit_is_refused_by_name(problem: str) -> None:
    pipeline = tiny.xl_pipeline()
    WRONG[problem](pipeline)
    with pytest.raises(ModelError) as caught:
        StableDiffusionXL.of(pipeline)
    assert problem in caught.value.cause and caught.value.remedy


def test_a_pipeline_that_reads_in_its_own_way_is_noticed() -> None:
    pipeline = tiny.xl_pipeline()
    model = StableDiffusionXL.of(pipeline)
    right = pipeline.text_encoder_2.forward

    def shifted(*args: Any, **named: Any) -> Any:
        said = right(*args, **named)
        said.text_embeds = said.text_embeds + 1 / (1 + shifted.calls)  # type: ignore[attr-defined]
        shifted.calls += 1  # type: ignore[attr-defined]
        return said

    shifted.calls = 0  # type: ignore[attr-defined]
    pipeline.text_encoder_2.forward = shifted
    with pytest.raises(ModelError, match="the pipeline makes another embedding of the prompt"):
        model.condition(PROMPT)
