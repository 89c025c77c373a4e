"""Stable Diffusion XL, the second family: the loop gives the bits of diffusers' `StableDiffusionXLPipeline`.

Every pair of settings is met in a covering array; the whole product runs with `-m slow`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from originals import original
from safetensors.torch import save_file

from probe.diffusion.loading import load
from probe.diffusion.sampling import Step, denoise
from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError
from probe.fields import SCHEDULERS
from probe.noising import record_noising
from probe.running.recorder import record
from probe.watching.rehearsal import rehearse

# A scheduler whose class clips by default: this pipeline says so and leaves it.
pytestmark = pytest.mark.filterwarnings("ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning")

PROMPT, SEED, STEPS = "a cat on the hat", 3, 3
FACTORS: dict[str, tuple[Any, ...]] = {
    "scheduler": tuple(SCHEDULERS),
    "guidance_scale": (5.0, 1.0),
    "size": ((32, 32), (32, 48)),
    "images": (1, 2),
    "negative": ("", "cat"),
    "shape": tuple(tiny.XL_UNETS),
    "guidance_rescale": (0.0, 0.3),
}
Case = tuple[Any, ...]
PRODUCT: list[Case] = list(itertools.product(*FACTORS.values()))


def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


@functools.cache
def pairwise() -> list[Case]:
    """Greedy: always the first case that covers the most pairs not yet covered."""
    missing, rows = set().union(*map(pairs, PRODUCT)), []
    while missing:
        rows.append(max(PRODUCT, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(rows[-1])
    return rows


@functools.cache
def base(shape: str = "base", prediction: str = "epsilon", zeros: bool = True) -> Any:
    return tiny.xl_pipeline(shape, prediction, zeros)


def around(parts: Any, scheduler: str = "Euler", **options: Any) -> Any:
    """A pipeline of the same networks, with a scheduler made from the same config in diffusers' own way."""
    kind, extra = SCHEDULERS[scheduler]
    made = diffusers.StableDiffusionXLPipeline(
        **{name: part for name, part in parts.components.items() if name not in ("scheduler", "image_encoder", "feature_extractor")},
        scheduler=getattr(diffusers, kind).from_config(parts.scheduler.config, **{**extra, **options}),
        force_zeros_for_empty_prompt=parts.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def theirs(pipeline: Any, *, images: int = 1, negative: str = "", **how: Any) -> tuple[torch.Tensor, np.ndarray]:
    """The latents of the pipeline's last step and its uint8 pictures."""
    kept: list[torch.Tensor] = []

    def keep(_: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept.append(tensors["latents"])
        return tensors

    pictures = pipeline(
        PROMPT,
        negative_prompt=negative or None,
        num_images_per_prompt=images,
        num_inference_steps=how.pop("steps", STEPS),
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(images)],
        callback_on_step_end=keep,
        **how,
    ).images
    return kept[-1], np.stack([np.asarray(picture) for picture in pictures])


def ours(model: StableDiffusionXL, *, negative: str = "", size_ids: Any = None, **how: Any) -> list[Step]:
    conditioning = model.condition(PROMPT, negative, guided=how.get("guidance_scale", 5.0) > 1, size_ids=size_ids)
    return list(denoise(model, conditioning, seed=SEED, **{"steps": STEPS, "guidance_scale": 5.0, **how}))


def assert_same(model: StableDiffusionXL, pipeline: Any, mine: dict[str, Any] | None = None, **how: Any) -> torch.Tensor:
    """Latents and pictures, bit for bit."""
    latents, pictures = theirs(pipeline, **how)
    last = ours(model, **how)[-1].next_latents if mine is None else ours(model, **mine)[-1].next_latents
    assert bool(torch.isfinite(last).all())
    assert torch.equal(latents, last), f"latents differ by up to {(latents - last).abs().max()}"
    assert torch.equal(torch.from_numpy(pictures), model.decode(last)[0]), "the pictures differ"
    return last


@functools.cache
def model_of(shape: str, scheduler: str) -> StableDiffusionXL:
    return StableDiffusionXL.of(base(shape)).with_scheduler(scheduler, {})


@functools.cache
def peer_of(shape: str, scheduler: str) -> Any:
    return around(base(shape), scheduler)


def check(case: Case) -> None:
    named = dict(zip(FACTORS, case, strict=True))
    scheduler, shape, (height, width) = named.pop("scheduler"), named.pop("shape"), named.pop("size")
    last = assert_same(model_of(shape, scheduler), peer_of(shape, scheduler), height=height, width=width, **named)
    assert last.shape == (named["images"], 4, height // 4, width // 4)


# --- parity ----------------------------------------------------------------------------------------------------------


def test_every_pair_of_settings_is_covered() -> None:
    covered = set().union(*map(pairs, pairwise()))
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert all((i, a, j, b) in covered for a, b in itertools.product(first, second))
    assert len(FACTORS["scheduler"]) == 14 and len(pairwise()) <= 50


@pytest.mark.parametrize("case", pairwise(), ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
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
    assert torch.equal(latents, last) and torch.equal(torch.from_numpy(pictures), model.decode(last)[0])
    assert last.shape[-1] == (16 if shape == "turbo" else 8)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("negative", ["", " ", "cat"])
def test_an_empty_negative_prompt_is_zeros_only_where_the_model_says_so(prediction: str, zeros: bool, negative: str) -> None:
    pipeline = base("base", prediction, zeros)
    model = StableDiffusionXL.of(pipeline)
    assert_same(model, pipeline, negative=negative, guidance_scale=5.0)
    told = model.condition(PROMPT, negative).arguments["uncond"]
    empty = zeros and not negative
    assert all(bool((told[name] == 0).all()) is empty for name in ("encoder_hidden_states", "text_embeds"))


@pytest.mark.parametrize("sizes", [(64, 48, 0, 0, 32, 32), (32, 32, 4, 8, 32, 32), (16, 16, 0, 0, 1024, 512)])
def test_size_ids_are_what_the_pipeline_tells_its_unet(sizes: tuple[int, ...]) -> None:
    pipeline = base()
    model = StableDiffusionXL.of(pipeline)
    told = {"original_size": sizes[:2], "crops_coords_top_left": sizes[2:4], "target_size": sizes[4:]}
    last = assert_same(model, pipeline, {"size_ids": sizes}, guidance_scale=5.0, **told)
    assert not torch.equal(last, ours(model)[-1].next_latents), "the sizes change the picture"


def test_without_size_ids_the_model_is_told_of_the_pictures_own_size() -> None:
    model = StableDiffusionXL.of(base())
    own = ours(model, height=32, width=48)[-1].next_latents
    assert torch.equal(own, ours(model, height=32, width=48, size_ids=(32, 48, 0, 0, 32, 48))[-1].next_latents)
    assert not torch.equal(own, ours(model, height=32, width=48, size_ids=(48, 32, 0, 0, 48, 32))[-1].next_latents)


def test_each_text_encoder_reads_the_prompt_with_its_own_tokenizer() -> None:
    model = StableDiffusionXL.of(base())
    tokens = model.tokens(PROMPT)
    assert list(tokens) == list(model.text_encoders()) == ["text_encoder", "text_encoder_2"]
    first, second = tokens.values()
    assert first.words == second.words == tuple(PROMPT.split()) and first.spans == second.spans
    assert first.tokens[-1] == "<|endoftext|>" and second.tokens[-1] == "!", "they pad differently"
    told = model.encode_prompt(tokens)
    assert told["encoder_hidden_states"].shape == (1, 77, 40) and told["text_embeds"].shape == (1, 12)


# --- the VAE ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_runs_in_float32_where_the_model_says_so(dtype: torch.dtype, upcast: bool, recwarn: Any) -> None:
    pipeline = tiny.xl_pipeline()
    pipeline.vae.register_to_config(force_upcast=upcast)
    pipeline.to(dtype=dtype)
    model = StableDiffusionXL.of(pipeline)
    before = model.digest()
    assert_same(model, pipeline, guidance_scale=1.0, steps=1)
    latents = torch.randn((1, 4, 8, 8), dtype=dtype, generator=torch.Generator().manual_seed(0))
    pixels, again = model.pixels(latents)
    assert not again and pixels.dtype == (torch.float32 if upcast and dtype == torch.float16 else dtype)
    assert model.vae.dtype == dtype and model.digest() == before


def test_a_vae_with_a_mean_and_a_spread_of_its_latents() -> None:
    pipeline = tiny.xl_pipeline()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 1.0, 2.0])
    assert_same(StableDiffusionXL.of(pipeline), pipeline, guidance_scale=1.0, steps=1)


# --- its parts -------------------------------------------------------------------------------------------------------


def test_the_skeleton_computes_the_same_shapes() -> None:
    model = StableDiffusionXL.of(base("ssd-1b"))
    bare = model.skeleton()
    assert bare.components().keys() == model.components().keys() and bare.device.type == "meta"
    for name, module in model.components().items():
        assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in bare.components()[name].state_dict().items()}
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
        assert {path.rpartition(".")[2] for path, layer in layers.items() if layer.kind == "cross"} == {"attn2"}
    assert not any(path.startswith("mid_block") for path in layers), "SSD-1B has none there"


def test_a_rehearsal_sees_every_component_and_layer() -> None:
    model = StableDiffusionXL.of(base("ssd-1b"))
    found = rehearse(model, model.latent_shape(2, 32, 48), branches=2, tokens=77)
    assert list(found.flops) == ["text_encoder", "text_encoder_2", "unet", "vae"] and all(found.flops.values())
    assert {*found.grids, *found.self_grids} == model.attention_layers().keys() == found.heads.keys()
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


WRONG: dict[str, Callable[[Any], None]] = {
    "the pipeline has no text_encoder_2.": drop_second,
    "its text_encoder_2 is a CLIPTextModel, which is not supported.": other_second,
    "its parts are of different number formats: unet float32, vae float32, text_encoder float32, text_encoder_2 float16.": half_second,
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


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each shape, and one whose weights are a float16 variant alone."""
    root = tmp_path_factory.mktemp("models")
    for shape in tiny.XL_UNETS:
        base(shape).save_pretrained(root / shape)
    tiny.xl_pipeline(zeros=False).to(dtype=torch.float16).save_pretrained(root / "fp16", variant="fp16")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("shape", tiny.XL_UNETS)
def test_a_local_folder_is_the_same_model(shape: str, saved: dict[str, Path]) -> None:
    model, pipeline = load(str(saved[shape]), device="cpu"), StableDiffusionXL.of(base(shape))
    assert isinstance(model, StableDiffusionXL) and model.digest() == pipeline.digest() and model.zeros_for_empty
    assert type(model.scheduler) is type(pipeline.scheduler)
    assert torch.equal(ours(model, steps=2)[-1].next_latents, ours(pipeline, steps=2)[-1].next_latents)


def test_a_local_folder_gives_the_bits_of_diffusers_from_the_same_folder(saved: dict[str, Path]) -> None:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(saved["base"], local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert_same(load(str(saved["base"]), device="cpu", scheduler="DDIM"), around(pipeline, "DDIM"), guidance_scale=5.0)


def test_a_float16_variant(saved: dict[str, Path]) -> None:
    folder = str(saved["fp16"])
    with pytest.raises(ModelError, match="unet has no weights without a variant"):
        load(folder, device="cpu")
    model = load(folder, device="cpu", dtype="float16", variant="fp16")
    assert isinstance(model, StableDiffusionXL) and model.dtype == torch.float16 and not model.zeros_for_empty
    assert model.digest() == StableDiffusionXL.of(tiny.xl_pipeline(zeros=False).to(dtype=torch.float16)).digest()


def test_a_hub_snapshot(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the hub's cache, as `snapshot_download` leaves it: by its id and its commit, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--xl/snapshots" / ("0" * 40)
    shutil.copytree(saved["turbo"], snapshot)
    (tmp_path / "models--somebody--xl/refs").mkdir()
    (tmp_path / "models--somebody--xl/refs/main").write_text("0" * 40)
    model = load("somebody/xl", device="cpu")
    assert (model.revision, model.digest()) == ("0" * 40, StableDiffusionXL.of(base("turbo")).digest())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_part_that_is_missing_from_a_folder_is_named(part: str, saved: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved["base"], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    with pytest.raises(ModelError, match=f"{part}/(config.json)? ?is missing"):
        load(str(tmp_path / "copy"), device="cpu")


def test_a_single_file_is_the_same_model(saved: dict[str, Path], tmp_path: Path) -> None:
    """In the original layout, with the configs and the tokenizers of its diffusers directory beside it."""
    shutil.copytree(saved["base"], tmp_path / "xl", ignore=shutil.ignore_patterns("*.safetensors"))
    held = original(base())
    save_file(held, tmp_path / "xl.safetensors")
    model = load(str(tmp_path / "xl.safetensors"), device="cpu")
    assert isinstance(model, StableDiffusionXL) and model.digest() == StableDiffusionXL.of(base()).digest()
    key = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    save_file({**held, key: held[key][:-1]}, tmp_path / "xl.safetensors")
    with pytest.raises(
        ModelError, match=r"text_encoder_2: .*v_proj\.weight has shape \(23, 24\), and text_encoder_2/config\.json makes it \(24, 24\)"
    ):
        load(str(tmp_path / "xl.safetensors"), device="cpu")
    shutil.rmtree(tmp_path / "xl")
    with pytest.raises(ModelError, match="this file is of Stable Diffusion XL") as caught:
        load(str(tmp_path / "xl.safetensors"), device="cpu")
    assert "Put its configs and tokenizers" in caught.value.remedy


WRONG_FILES: dict[str, tuple[str, str, Any]] = {
    "force_zeros_for_empty_prompt is 'no', not true or false.": ("model_index.json", "force_zeros_for_empty_prompt", "no"),
    "it has no text_encoder_2 (model_index.json).": ("model_index.json", "text_encoder_2", [None, None]),
    "its tokenizer_2 is ['transformers', 'BertTokenizer'], which is not": ("model_index.json", "tokenizer_2", ["transformers", "BertTokenizer"]),
    "text_encoder_2: text_projection.weight has shape (12, 24), and text_encoder_2/config.json makes it (16, 24)": (
        "text_encoder_2/config.json", "projection_dim", 16),
    "a UNet without SDXL's added conditions is not supported": ("unet/config.json", "addition_embed_type", None),
}  # fmt: skip


@pytest.mark.parametrize("problem", WRONG_FILES)
def test_a_folder_that_does_not_fit_is_refused_by_name(problem: str, saved: dict[str, Path], tmp_path: Path) -> None:
    file, key, value = WRONG_FILES[problem]
    shutil.copytree(saved["base"], tmp_path / "copy")
    path = tmp_path / "copy" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "copy"), device="cpu")
    assert problem in caught.value.cause and caught.value.remedy


# --- recording -------------------------------------------------------------------------------------------------------


def test_a_recording_that_would_leave_a_part_out_is_refused_by_name(saved: dict[str, Path], tmp_path: Path) -> None:
    asked = {"prompt": PROMPT, "steps": 1, "output": str(tmp_path / "runs"), "device": "cpu"}
    for call in (
        lambda: record(asked, base(), progress=False),
        lambda: record(asked, StableDiffusionXL.of(base()), progress=False),
        lambda: record(asked, progress=False, model=str(saved["base"])),
        lambda: record_noising(np.zeros((32, 32, 3), np.uint8), PROMPT, pipeline=base(), progress=False, output=str(tmp_path / "runs")),
    ):
        with pytest.raises(ModelError) as caught:
            call()
        assert caught.value.cause.endswith(": StableDiffusionXL is not recorded yet: its text_encoder_2 would be left out.")
    assert not (tmp_path / "runs").exists()
