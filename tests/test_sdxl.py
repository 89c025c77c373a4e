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
import zarr
from originals import original
from PIL import Image
from recordings import with_its_digests
from safetensors.torch import save_file
from true_maps import EVERYTHING, assert_the_same, peer_maps

from probe.cli import dispatch
from probe.diffusion.loading import load
from probe.diffusion.sampling import Step, denoise
from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError
from probe.experiment import Experiment, load_experiment
from probe.fields import SCHEDULERS
from probe.noising import record_noising
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.ask import ask as asking
from probe.running.ask import read_out
from probe.running.recorder import record, rerun, resume
from probe.verify import verify
from probe.watching import hooks
from probe.watching.counterfactual import chosen_words, embeddings_without
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


def marked(number: int, case: Case) -> Any:
    """A case for pytest: the first 16, which cover the most pairs. The others are slow, and so are those of KDPM2 at each step."""
    return pytest.param(case, marks=[pytest.mark.slow] if number >= 16 or case[0].startswith("KDPM2") else [])


@pytest.mark.parametrize(
    "case", [marked(*numbered) for numbered in enumerate(pairwise())], ids=lambda case: "-".join(map(str, case)).replace(" ", "")
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
    assert torch.equal(latents, last) and torch.equal(torch.from_numpy(pictures), model.decode(last)[0])
    assert last.shape[-1] == (16 if shape == "turbo" else 8)


@pytest.mark.parametrize("prediction", ["epsilon", pytest.param("v_prediction", marks=pytest.mark.slow)])
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


@pytest.mark.slow
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

ENCODERS = ("text_encoder", "text_encoder_2")
INSIDE = ("unet.mid_block*", "vae.decoder.mid_block", "text_encoder.encoder.layers.0", "text_encoder_2.text_projection")
SMALL = {"statistics": False, "attention": "off"}


def ask(folder: Path, **changes: Any) -> Experiment:
    return load_experiment({"prompt": PROMPT, "seed": SEED, "steps": STEPS, "output": str(folder), "device": "cpu", "durability": "none", **changes})


def take(folder: Path, pipeline: Any = None, **changes: Any) -> Run:
    return record(ask(folder, **changes), pipeline or base(), progress=False)


def failed(run: Run, model: Any = None) -> dict[str, str]:
    return {check.name: check.detail for check in verify(run, model) if check.verdict == "failed"}


def assert_neutral(run: Run, steps: list[Step], model: StableDiffusionXL) -> None:
    """The recording holds the bits of `steps`, which nobody watched, and their picture."""
    for index, step in enumerate(steps):
        said = {"latents": step.latents, "prediction": step.prediction, "prediction_cond": step.prediction_cond}
        for name, tensor in said.items():
            assert np.array_equal(run.variable(f"latents/{name}").values[index], tensor.numpy()), f"{name} of step {index}"
    assert np.array_equal(run.variable("images/final").values, model.decode(steps[-1].next_latents)[0].numpy())
    assert hooks.count(model.unet) == hooks.count(model.vae) == 0


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two images that are not square, of an empty negative prompt, with everything on."""
    capture = {"branches": "both", "activations": INSIDE, "counterfactual": ["*"], "self_attention": ["*"]}
    return take(tmp_path_factory.mktemp("runs"), images=2, height=32, width=48, decode_every=2, capture=capture)


def test_recording_changes_no_bit(full: Run) -> None:
    model = StableDiffusionXL.of(base())
    how = {"images": 2, "height": 32, "width": 48, "guidance_scale": full.experiment.guidance_scale}
    assert_neutral(full, ours(model, **how), model)
    latents, pictures = theirs(base(), **how)
    assert np.array_equal(full.variable("latents/final_latents").values, latents.numpy())
    assert np.array_equal(full.variable("images/final").values, pictures)


def test_what_a_recording_says_of_its_model(full: Run) -> None:
    assert (full.attributes.family, full.attributes.guidance_rule) == ("sdxl", "classifier_free")
    assert full.attributes["decoded_in_float32"] is False
    assert list(full.variable("cost/component").values) == [*ENCODERS, "unet", "vae"]
    assert (full.variable("cost/seconds").values > 0).all()
    assert full.variable("text_encoder_2/text_projection/activation").dims == ("branch", "feature")


@pytest.mark.parametrize("negative", ["", "cat"])
def test_the_inside_of_each_text_encoder_is_its_own(negative: str, tmp_path: Path) -> None:
    model = StableDiffusionXL.of(base())
    model.condition(PROMPT)  # transformers leaves hooks of its own, which collect hidden states
    before = [hooks.count(encoder) for encoder, _ in model.text_encoders().values()]
    run = take(tmp_path, steps=1, negative_prompt=negative, capture=SMALL)
    assert [hooks.count(encoder) for encoder, _ in model.text_encoders().values()] == before
    assert run.attributes.zeroed_branches == ([] if negative else ["uncond"])
    for name, tokenizer in zip(ENCODERS, (base().tokenizer, base().tokenizer_2), strict=True):
        encoder = copy.deepcopy(getattr(base(), name))
        encoder.set_attn_implementation("eager")
        for branch, text in (("cond", PROMPT), ("uncond", negative)):
            ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
            found = run.tree[f"text/{name}"].dataset.sel(branch=branch)
            assert list(found["token_id"].values) == ids[0].tolist()
            with torch.no_grad():
                said = encoder(ids, output_hidden_states=True, output_attentions=True)
            expected = {
                "embedding": said.hidden_states[0],
                "hidden": torch.stack(said.hidden_states[1:]),
                "output": said.last_hidden_state,
                "attention": torch.stack(said.attentions),
                **({"pooled": said.text_embeds} if name == "text_encoder_2" else {}),
            }
            assert set(found.data_vars) == {"token_id", *expected}
            for what, value in expected.items():
                rows = value[:, 0] if value.ndim > 3 and what in ("hidden", "attention") else value[0]
                wanted = rows.numpy() if text else np.zeros_like(rows.numpy())
                np.testing.assert_allclose(found[what].values, wanted, atol=6e-4 if what == "attention" else 2e-6)
    if negative:
        assert_zeros_are_not_claimed(run)


def assert_zeros_are_not_claimed(run: Run) -> None:
    """Zeros may stand for an empty negative prompt alone."""
    root = json.loads((run.path / "zarr.json").read_text())
    root["attributes"]["zeroed_branches"] = ["uncond"]
    (run.path / "zarr.json").write_text(json.dumps(root))
    found = failed(Run(with_its_digests(run.path)))
    assert "only an empty negative prompt of SDXL may be zeros" in found["schema"] and "is not zero in a branch" in found["softmax"]


def test_what_the_unet_is_told_is_in_the_recording(full: Run) -> None:
    """The last but one state of both encoders, side by side, and the pooled embedding of the second."""
    told = StableDiffusionXL.of(base()).condition(PROMPT).arguments
    for branch in ("cond", "uncond"):
        states = [full.variable(f"text/{name}/hidden").sel(branch=branch).values[-2] for name in ENCODERS]
        assert np.array_equal(np.concatenate(states, axis=-1), told[branch]["encoder_hidden_states"][0].numpy())
        assert np.array_equal(full.variable("text/text_encoder_2/pooled").sel(branch=branch).values, told[branch]["text_embeds"][0].numpy())


def test_words_are_those_of_each_encoder_and_maps_have_those_of_the_first(full: Run) -> None:
    first, second = (full.tree[f"text/{name}"].dataset.sel(branch="cond") for name in ENCODERS)
    assert list(first["word"].values) == list(second["word"].values) and set(first["word"].values) == {*PROMPT.split(), ""}
    end = len(PROMPT.split()) + 1
    assert set(first["token_text"].values[end:]) == {"<|endoftext|>"} and set(second["token_text"].values[end + 1 :]) == {"!"}
    maps = full.attention()
    assert list(maps["token"].values) == [*range(end + 1), -1]
    assert list(maps["token_text"].sel(branch="cond").values[:-1]) == list(first["token_text"].values[: end + 1])
    assert set(full.word_maps()["word"].values) >= set(PROMPT.split())


def test_maps_of_a_negative_prompt_that_is_zeros_say_nothing(full: Run) -> None:
    maps = full.attention().sel(branch="uncond", token=slice(0, None)).values
    np.testing.assert_allclose(maps[:, :-1], 1 / 77, atol=1e-5)
    assert not full.variable("attention/4x6/value_size").sel(branch="uncond").values.any()


def test_a_prompt_with_the_padding_of_the_second_tokenizer(tmp_path: Path) -> None:
    run = take(tmp_path, prompt="a cat ! !", negative_prompt="!", steps=1, capture=SMALL)
    assert failed(run) == {}
    first, second = (list(run.variable(f"text/{name}/word").sel(branch="cond").values) for name in ENCODERS)
    assert first == second and first[:4] == ["", "a", "cat", ""]
    assert list(run.variable("text/text_encoder_2/token_text").sel(branch="cond").values[3:5]) == ["!", "!"]


def test_it_is_verified_with_and_without_the_model(full: Run) -> None:
    found = {check.name: check.verdict for check in verify(full, base())}
    assert "failed" not in found.values() and failed(full) == {}
    assert found["text"] == found["predictions"] == found["inside"] == found["plan"] == found["weights"] == "exact"


CHANGES: tuple[tuple[str, Any, Any, set[str]], ...] = (
    ("text/text_encoder_2/pooled", (1, 0), 0.5, {"text"}),
    ("text/text_encoder_2/pooled", (0, 0), 0.5, {"text", "softmax"}),
    ("text/text_encoder/hidden", (1, 0, 2, 3), 1.0, {"text", "softmax"}),
    ("text/text_encoder_2/word_index", (1, 2), 0, {"labels", "plan"}),
    ("text/text_encoder_2/token_id", (1, 2), 3, {"plan"}),
)
WITHOUT_THE_MODEL = {"labels", "softmax"}


@pytest.mark.parametrize(("path", "at", "value", "names"), [change for change in CHANGES if change[3] & WITHOUT_THE_MODEL][1:])
def test_what_is_changed_in_an_encoder_is_noticed_without_the_model(
    path: str, at: Any, value: Any, names: set[str], full: Run, tmp_path: Path
) -> None:
    shutil.copytree(full.path, tmp_path / "copy.zarr")
    zarr.open_group(tmp_path / "copy.zarr", mode="r+", use_consolidated=False)[path][at] = value
    assert failed(Run(with_its_digests(tmp_path / "copy.zarr"))).keys() == names & WITHOUT_THE_MODEL


@pytest.mark.slow
@pytest.mark.parametrize(("path", "at", "value", "names"), CHANGES)
def test_what_is_changed_in_an_encoder_is_noticed_with_the_model(path: str, at: Any, value: Any, names: set[str], full: Run, tmp_path: Path) -> None:
    shutil.copytree(full.path, tmp_path / "copy.zarr")
    zarr.open_group(tmp_path / "copy.zarr", mode="r+", use_consolidated=False)[path][at] = value
    assert names <= failed(Run(with_its_digests(tmp_path / "copy.zarr")), base()).keys()


@pytest.mark.slow
def test_another_second_text_encoder_is_noticed(full: Run) -> None:
    other = copy.deepcopy(base())
    other.text_encoder_2.text_projection.weight.data *= 1.5
    assert {"weights", "text", "predictions"} <= failed(full, other).keys()


def cut_short(folder: Path, pipeline: Any, after: int, **how: Any) -> Run:
    """A recording that was interrupted after some steps."""
    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt), hooks.Hooks([(pipeline.unet, "input", lambda _: interrupt() if next(calls) == after else None)]):
        take(folder, pipeline, **how)
    cut = next(Run(path) for path in folder.glob("*.zarr"))
    assert cut.status == "interrupted" and len(cut.steps) == after
    return cut


def test_a_recording_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    how = {"scheduler": "EulerAncestral", "images": 2, "capture": {"statistics": False}}
    cut = cut_short(tmp_path / "cut", base(), 2, **how)
    assert failed(cut) == {}
    assert compare(take(tmp_path / "whole", **how), resume(cut, base(), progress=False)).same


@pytest.mark.slow
@pytest.mark.parametrize("shape", tiny.XL_UNETS)
def test_every_shape_is_recorded_resumed_and_recorded_again(shape: str, tmp_path: Path) -> None:
    pipeline, how = base(shape), {"guidance_scale": 0.0 if shape == "turbo" else 3.0, "images": 2}
    whole = take(tmp_path / "whole", pipeline, **how)
    resumed = resume(cut_short(tmp_path / "cut", pipeline, 2, **how), pipeline, progress=False)
    assert compare(whole, resumed).same and compare(whole, rerun(whole, pipeline, progress=False)).same
    assert failed(whole, pipeline) == failed(resumed, pipeline) == {}
    model = StableDiffusionXL.of(pipeline)
    assert_neutral(whole, ours(model, images=2, guidance_scale=how["guidance_scale"]), model)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("base", {"images": 2, "height": 32, "width": 48, "negative_prompt": "the hat"}),
        pytest.param("ssd-1b", {}, marks=pytest.mark.slow),
        pytest.param("turbo", {"guidance_scale": 0.0, "images": 2}, marks=pytest.mark.slow),
    ],
)
def test_maps_are_those_of_an_independent_implementation(shape: str, changes: dict[str, Any], tmp_path: Path) -> None:
    capture = {**EVERYTHING, "branches": "cond" if shape == "turbo" else "both", "statistics": False, "text": False}
    asked = ask(tmp_path, steps=2, capture=capture, **changes)
    assert_the_same(record(asked, base(shape), progress=False), peer_maps(asked, base(shape)))


def test_without_a_word_every_encoder_reads_the_prompt_without_it(full: Run) -> None:
    """By hand: in both token lists the word's token is the padding of that tokenizer."""
    pipeline, words = base(), list(full.variable("counterfactual/masked_word").values)
    assert words == ["a", "cat", "on", "the", "hat"]
    states, pooled = [], torch.empty(0)
    for encoder, tokenizer in ((pipeline.text_encoder, pipeline.tokenizer), (pipeline.text_encoder_2, pipeline.tokenizer_2)):
        ids = tokenizer([PROMPT] * 2, padding="max_length", max_length=77, return_tensors="pt").input_ids
        ids[1, 2] = tokenizer.pad_token_id
        with torch.no_grad():
            said = encoder(ids, output_hidden_states=True)
        states.append(said.hidden_states[-2])
        pooled = said.text_embeds if "text_embeds" in said else pooled
    assert not torch.equal(pooled[0], pooled[1])
    added = {"text_embeds": pooled.repeat_interleave(2, 0), "time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(4, 1)}
    text = torch.cat(states, -1).repeat_interleave(2, 0)
    latents = StableDiffusionXL.of(pipeline).with_scheduler("default", {})
    step = ours(latents, images=2, height=32, width=48, guidance_scale=full.experiment.guidance_scale)[1]
    with torch.no_grad():
        said = pipeline.unet(step.model_input.repeat(2, 1, 1, 1), step.timestep, encoder_hidden_states=text, added_cond_kwargs=added).sample
    expected = (said[:2] - said[2:]).abs().mean(1).numpy()
    np.testing.assert_allclose(full.counterfactual().sel(step=1, masked_word="cat").values, expected, atol=1e-5)
    assert expected.max() > 1e-4


def test_a_padding_that_would_end_the_prompt_is_refused(tmp_path: Path) -> None:
    pipeline = copy.copy(base())
    pipeline.tokenizer_2 = tiny.tokenizer()
    with pytest.raises(ModelError, match="text_encoder_2 would take that padding for the end of the prompt"):
        take(tmp_path, pipeline, capture={"counterfactual": ["cat"]})


def test_tokenizers_that_put_words_in_different_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is recorded as it is, maps are labelled as the first reads, and of each the word itself is left out."""
    pipeline = copy.deepcopy(base())
    pipeline.tokenizer.add_tokens("astro")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    asked = ask(tmp_path, prompt="an astrolabe cat", steps=1, capture={"statistics": False})
    with pytest.raises(ModelError, match="its text encoders read other words of 'an astrolabe cat'"):
        record(asked, pipeline, progress=False, **{"capture.counterfactual": ["cat"]})
    assert not list(tmp_path.iterdir())
    run = record(asked, pipeline)
    assert "maps are labelled as the first one reads it" in capsys.readouterr().err and failed(run) == {}
    assert "astro" in run.variable("attention/4x4/word").values and "astrolabe" in run.variable("text/text_encoder_2/word").values

    model = StableDiffusionXL.of(base())
    tokens = model.tokens("a !!! cat")
    words = chosen_words(tokens["text_encoder"], ("cat",))
    tokens["text_encoder"] = model.read("a cat")  # as of a tokenizer that reads "!!!" as nothing
    told = embeddings_without(model, tokens, {"cat": [2]})
    assert words == {"cat": [5]} and told["text_embeds"].shape[0] == 2
    ids = tokens["text_encoder_2"].ids.repeat(2, 1)
    ids[1, 5] = base().tokenizer_2.pad_token_id
    with torch.no_grad():
        assert torch.equal(told["text_embeds"], torch.cat([base().text_encoder_2(row[None]).text_embeds for row in ids]))


@pytest.mark.slow
def test_a_config_that_asks_for_a_mask_is_passed_over_as_by_the_pipeline(tmp_path: Path) -> None:
    pipeline = copy.deepcopy(base())
    pipeline.text_encoder.config.use_attention_mask = True
    run = take(tmp_path, pipeline, steps=1, capture=SMALL)
    assert run.status == "complete" and np.isfinite(run.variable("text/text_encoder/attention").values).all()


@pytest.mark.parametrize("upcast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_that_the_vae_ran_in_float32_is_told(upcast: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny.xl_pipeline().to(dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=upcast)
    asked = ask(tmp_path, steps=1, decode_every=1, capture={**SMALL, "text": False, "activations": ["vae.decoder.conv_out"]})
    run = record(asked, pipeline)
    assert run.attributes["decoded_in_float32"] is upcast and "overflowed" not in capsys.readouterr().err
    inside = run.variable("vae/decoder.conv_out/activation")
    assert (str(inside.dtype), inside.attrs["recorded_dtype"]) == (("float32",) * 2 if upcast else ("float16",) * 2)
    assert pipeline.vae.dtype == torch.float16 and failed(run) == {}
    if not upcast:
        assert failed(run, pipeline) == {}


def test_a_picture_to_begin_from_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    for call in (
        lambda: take(tmp_path / "runs", image=str(tmp_path / "cat.png")),
        lambda: record_noising(np.zeros((32, 32, 3), np.uint8), PROMPT, pipeline=base(), progress=False, output=str(tmp_path / "runs")),
    ):
        with pytest.raises(ModelError, match="a Stable Diffusion XL model does not begin from a picture here yet"):
            call()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_commands_know_a_recording_of_a_model_in_a_folder(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how = [f"--model={saved['base']}", "--device=cpu", f"--prompt={PROMPT}", "--steps=2", "--capture.attention=queries", "--durability=none"]
    assert dispatch(["run", *how, "--dry-run"]) == 0
    assert "/text/text_encoder_2/hidden" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert dispatch(["run", *how, "--quiet"]) == 0
    name = capsys.readouterr().out.strip()
    assert dispatch(["show", "latest"]) == dispatch(["ask", "latest", "astronaut"]) == dispatch(["verify", "latest", "--model"]) == 0
    assert dispatch(["rerun", "latest", "--quiet"]) == 0
    assert dispatch(["diff", Path(name).name, "latest"]) == 0
    shown = capsys.readouterr().out
    assert "text_encoder_2" in shown and "astronaut" in shown


def test_a_word_that_was_not_in_the_prompt(tmp_path: Path) -> None:
    """The answer of the recorded prompt itself is its own maps, whose keys were recorded."""
    run = take(tmp_path, steps=2, capture={"attention": "queries", "statistics": False, "text": False, "dtype": "float32"})
    assert read_out(run, "astronaut", pipeline=base()).values.any()
    for grid, maps in asking(run, PROMPT, base()).items():
        expected = run.attention(grid).sel(branch="cond")
        np.testing.assert_allclose(maps.transpose(*expected.dims).values, expected.values, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_recorded_resumed_and_verified(name: str, tmp_path: Path) -> None:
    """With and without guidance, not square, one image and two, of each shape."""
    for number, (guidance, size, images, shape) in enumerate(itertools.product((5.0, 1.0), ((32, 32), (32, 48)), (1, 2), tiny.XL_UNETS)):
        how = {"guidance_scale": guidance, "height": size[0], "width": size[1], "images": images}
        pipeline, model = peer_of(shape, name), model_of(shape, name)
        branches = "both" if guidance > 1 else "cond"
        run = take(tmp_path / f"{number}", pipeline, scheduler=name, **how, capture={"branches": branches})
        assert_neutral(run, ours(model, **how), model)
        latents, pictures = theirs(pipeline, **how)
        assert np.array_equal(run.variable("latents/final_latents").values, latents.numpy())
        assert np.array_equal(run.variable("images/final").values, pictures)
        cut = cut_short(tmp_path / f"{number}-cut", pipeline, 1, scheduler=name, **how, capture={"branches": branches})
        assert compare(run, resume(cut, pipeline, progress=False)).same
        assert failed(run, pipeline) == {}
