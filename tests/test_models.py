"""Models are loaded safely, or refused in words that help; prompts; pictures from latents."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

from probe.diffusion.loading import load, pick_device
from probe.diffusion.parts import to_uint8
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.errors import DeviceError, ExperimentError, ModelError, PromptError
from probe.watching import hooks

HAT = "An astronaut's hat, scuba diving zebra!"
PARTS = ("unet", "vae", "text_encoder")
ONE_OF_OURS = "Stable Diffusion 1.x, 2.x and XL text-to-image models are."
WHOLE = "Is it a diffusers directory (model_index.json, unet/, vae/, ...)?"


@functools.cache
def memory() -> StableDiffusion:
    return StableDiffusion.of(tiny.pipeline())


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "half"
    tiny.pipeline().to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


def draw(model: StableDiffusion, steps: int = 4) -> torch.Tensor:
    return list(denoise(model, model.condition("a cat on the hat"), steps=steps, seed=3))[
        -1
    ].next_latents


def refused(call: Callable[[], Any], kind: type[Any] = ModelError) -> Any:
    """The error of a call that must fail as a user's mistake does: two lines at most, exit code
    2.
    """
    with pytest.raises(kind) as caught:
        call()
    error: Any = caught.value
    assert error.exit_code == 2 and error.remedy and "\n" not in error.cause + error.remedy
    return error


def load_cpu(folder: Path | str, **options: Any) -> StableDiffusion:
    return load(str(folder), device="cpu", **options)


# --- loading --------------------------------------------------------------------------------------


def test_a_saved_model_draws_the_same_bits(saved: Path) -> None:
    model = load_cpu(saved)
    assert (model.name, model.revision, model.vocabulary) == (str(saved), None, None)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert (model.f, model.scaling_factor, model.prediction_type) == (4, 0.3, "epsilon")
    assert not any(part.training for part in (model.unet, model.vae, model.text_encoder))
    latents = draw(model)
    assert torch.equal(latents, draw(memory()))
    assert torch.equal(model.decode(latents)[0], memory().decode(latents)[0])


def test_a_saved_model_draws_what_diffusers_draws_from_the_same_folder(saved: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat on the hat",
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert torch.equal(theirs, draw(load_cpu(saved)))


@pytest.mark.filterwarnings("ignore:(?s)The configuration file of this scheduler:FutureWarning")
def test_an_outdated_scheduler_config_is_mended_as_diffusers_mends_it(copy: Path) -> None:
    """`clip_sample` and `steps_offset` have defaults that are wrong for latents; the pipeline
    overrules them, and so do we.
    """
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]})
    )
    stored = json.loads((copy / "scheduler/scheduler_config.json").read_text())
    assert (stored["clip_sample"], stored["steps_offset"]) == (True, 0)
    model = load_cpu(copy)
    assert (model.scheduler.config.clip_sample, model.scheduler.config.steps_offset) == (False, 1)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(copy, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat on the hat",
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
    ).images
    assert torch.equal(theirs, draw(model))


def test_a_variant_is_loaded_and_auto_is_float32_on_a_cpu(half: Path) -> None:
    names = sorted(file.name for file in half.glob("*/*.safetensors"))
    assert names == ["diffusion_pytorch_model.fp16.safetensors"] * 2 + ["model.fp16.safetensors"]
    model = load_cpu(half, variant="fp16")
    assert model.dtype == torch.float32
    own = tiny.pipeline().unet.state_dict()
    assert all(
        torch.equal(weight, own[key].half().float())
        for key, weight in model.unet.state_dict().items()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_is_that_of_every_part_and_of_what_they_make(saved: Path, dtype: str) -> None:
    kind, model = getattr(torch, dtype), load_cpu(saved, dtype=dtype)
    assert {weight.dtype for part in PARTS for weight in getattr(model, part).parameters()} == {
        kind
    }
    conditioning = model.condition("cat")
    assert conditioning.cond_embedding.dtype == kind
    step = next(denoise(model, conditioning, steps=2))
    assert step.latents.dtype == step.prediction.dtype == step.next_latents.dtype == kind


def test_bundled_words_come_with_a_model(copy: Path) -> None:
    (copy / "words.json").write_text('["cat", "hat"]')
    assert load_cpu(copy).vocabulary == {"cat", "hat"}


def shapes(model: StableDiffusion) -> dict[str, tuple[int, ...]]:
    return {
        f"{part}.{key}": tuple(weight.shape)
        for part in PARTS
        for key, weight in getattr(model, part).named_parameters()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_weights_the_shapes_are_the_same(saved: Path, dtype: str) -> None:
    whole = load_cpu(saved, dtype=dtype)
    bare = load_cpu(saved, dtype=dtype, weights=False)
    for model in (bare, whole.skeleton(), bare.skeleton()):
        assert shapes(model) == shapes(whole)
        assert {
            weight.device.type for part in PARTS for weight in getattr(model, part).parameters()
        } == {"meta"}
        assert model.dtype == whole.dtype and model.device.type == "meta"
        assert (model.f, model.scaling_factor, model.latent_shape(2)) == (
            whole.f,
            whole.scaling_factor,
            (2, 4, 8, 8),
        )
        assert not any(getattr(model, part).training for part in PARTS)
        assert model.read(HAT).words == whole.read(HAT).words
    assert whole.device.type == "cpu"  # a skeleton is another model


def test_without_weights_no_weights_are_needed(copy: Path) -> None:
    for file in copy.glob("*/*.safetensors"):
        file.unlink()
    assert shapes(load_cpu(copy, weights=False)) == shapes(memory())


def test_a_skeleton_without_a_vae() -> None:
    assert replace(memory(), vae=None).skeleton().vae is None


# --- models that cannot be loaded -----------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_pickled_weights_are_never_read(copy: Path, part: str) -> None:
    """The file is no pickle at all: whoever reads it says so in another way."""
    weights = copy / part / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    error = refused(lambda: load_cpu(copy))
    assert (
        error.cause
        == f"{copy}: {part} has only pickled weights, which can run code when they are read."
    )
    assert (
        error.remedy.startswith("Convert them once where you trust them: ")
        and "safe_serialization=True" in error.remedy
    )


def test_real_pickles_are_refused(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("unet/*.bin"))
    assert "unet has only pickled weights" in refused(lambda: load_cpu(tmp_path)).cause


def test_a_missing_variant_names_those_there_are(half: Path, saved: Path) -> None:
    error = refused(lambda: load_cpu(half, variant="ema"))
    assert (error.cause, error.remedy) == (
        f"{half}: unet has no weights of variant 'ema' (variants there: fp16).",
        "Set variant: fp16.",
    )
    error = refused(lambda: load_cpu(half))
    assert (error.cause, error.remedy) == (
        f"{half}: unet has no weights without a variant (variants there: fp16).",
        "Set variant: fp16.",
    )
    error = refused(lambda: load_cpu(saved, variant="fp16"))
    assert (error.cause, error.remedy) == (
        f"{saved}: unet has no weights of variant 'fp16' (variants there: none).",
        "Leave variant out.",
    )


def test_variants_in_several_files(copy: Path) -> None:
    for file in (
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    ):
        (copy / "unet" / file).write_bytes(b"")
    error = refused(lambda: load_cpu(copy, variant="ema"))
    assert (
        error.cause.endswith("(variants there: fp16).")
        and error.remedy == "Set variant: fp16, or leave variant out."
    )


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "./nope",
        "../nope",
        "/no/such/model",
        "a/b/c",
        "https://example.com/x",
        "a b/c",
        "emojiwrld",
    ],
)
def test_a_name_that_is_nothing(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(lambda: load_cpu(name))
    assert (
        error.cause
        == f"model: {name!r} is no directory, no hub id (owner/name) and no bundled model."
    )
    bundled = "emojiworld, emojiworld-pixels, emojiworld-latents"
    assert error.remedy == f"Bundled: {bundled}. Try --model emojiworld."


@pytest.mark.parametrize("name", ["n" * 1000, "a\0b", "models/v1-5.safetensors", "v1-5.ckpt"])
def test_a_name_that_no_file_can_have_or_has(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: load_cpu(name)).cause.startswith(
        ("model: ", f"model: {name!r}: there is no such file")
    )


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_id_without_a_network(
    revision: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # conftest sets it, for whoever runs this file alone
    error = refused(lambda: load_cpu("nobody/nothing", revision=revision))
    at = f" at revision {revision}" if revision else ""
    assert error.cause == (
        f"model: nobody/nothing{at} is not on this machine and could not be fetched "
        "(LocalEntryNotFoundError)."
    )
    assert error.remedy.endswith("or use the bundled model: --model emojiworld.")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("part", [*PARTS, "scheduler", "tokenizer", "model_index.json"])
def test_a_missing_part(copy: Path, part: str, weights: bool) -> None:
    file = {
        "scheduler": "scheduler/scheduler_config.json",
        "tokenizer": "tokenizer/",
        "model_index.json": part,
    }.get(part, f"{part}/config.json")
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    error = refused(lambda: load_cpu(copy, weights=weights))
    assert (error.cause, error.remedy) == (f"{copy}: {file} is missing.", WHOLE)


@pytest.mark.parametrize("part", PARTS)
def test_missing_weights(copy: Path, part: str) -> None:
    for file in copy.glob(f"{part}/*.safetensors"):
        file.unlink()
    error = refused(lambda: load_cpu(copy))
    assert error.cause == f"{copy}: {part} has no weights." and error.remedy.endswith(
        "--model emojiworld."
    )


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("content", [b"{", b"[]", b'"nobody/nothing"', b"\xff\xfe\x00", b""])
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        *(f"{part}/config.json" for part in PARTS),
        "scheduler/scheduler_config.json",
    ],
)
def test_broken_json(copy: Path, file: str, content: bytes, weights: bool) -> None:
    (copy / file).write_bytes(content)
    error = refused(lambda: load_cpu(copy, weights=weights))
    assert (error.cause, error.remedy) == (
        f"{copy}: {file} is not a valid JSON object.",
        "Fetch the model again.",
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
@pytest.mark.parametrize("file", ["words.json", "tokenizer/tokenizer.json"])
def test_other_broken_files_are_a_model_error_too(copy: Path, file: str, content: str) -> None:
    (copy / file).write_text(content)
    if (file, content) == ("words.json", "[]"):
        assert load_cpu(copy).vocabulary == frozenset()
    else:
        assert file.split("/")[0] in refused(lambda: load_cpu(copy)).cause


@pytest.mark.parametrize("part", PARTS)
def test_weights_cut_short(copy: Path, part: str) -> None:
    (file,) = copy.glob(f"{part}/*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    assert refused(lambda: load_cpu(copy)).cause.startswith(f"{copy}: ")


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "unet/config.json").read_text())
    (copy / "unet/config.json").write_text(json.dumps({**config, "block_out_channels": [16, 64]}))
    assert refused(lambda: load_cpu(copy)).cause.startswith(f"{copy}: ")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("StableDiffusionXLImg2ImgPipeline", "SDXL"),
        ("StableDiffusionXLInpaintPipeline", "SDXL"),
        ("StableDiffusion3Pipeline", "SD 3"),
        ("StableDiffusionInpaintPipeline", "inpainting"),
        ("StableDiffusionControlNetPipeline", "ControlNet"),
        ("FluxPipeline", "Flux"),
        ("PixArtAlphaPipeline", "PixArt"),
        ("WuerstchenDecoderPipeline", "WuerstchenDecoderPipeline"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_other_kinds_of_model_are_refused_by_name(
    copy: Path, kind: str, named: str, weights: bool
) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
    error = refused(lambda: load_cpu(copy, weights=weights))
    assert (error.cause, error.remedy) == (f"{named} ({kind}) is not supported yet.", ONE_OF_OURS)


def test_a_folder_of_an_image_to_image_pipeline_is_the_same_model(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"})
    )
    assert load_cpu(copy).digest() == memory().digest()


def test_an_image_to_image_pipeline_in_memory_is_told_the_field_of_the_picture() -> None:
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny.pipeline().components, requires_safety_checker=False
    )
    error = refused(lambda: StableDiffusion.of(other))
    assert error.cause == (
        "A StableDiffusionImg2ImgPipeline is recorded as an ordinary pipeline that is given a "
        "picture."
    )
    assert error.remedy == (
        "Pass StableDiffusionPipeline.from_pipe(pipeline), and name the picture in the "
        "experiment: image: FILE."
    )
    ordinary = StableDiffusion.of(diffusers.StableDiffusionPipeline.from_pipe(other))
    assert ordinary.digest() == memory().digest(), "the remedy helps"


@pytest.mark.parametrize(
    "scheduler", [["diffusers", "UNet2DConditionModel"], ["evil", "MyScheduler"], None, []]
)
def test_a_scheduler_that_is_none_of_diffusers(copy: Path, scheduler: Any) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "scheduler": scheduler}))
    name = str(scheduler[-1] if scheduler else None)
    cause = refused(lambda: load_cpu(copy)).cause
    assert cause == f"{copy}: its scheduler {name!r} is not one of diffusers'."


UNETS: dict[str, dict[str, Any]] = {
    "a UNet with added conditions (SDXL)": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
    "a UNet that takes the guidance scale as an input (a distilled LCM)": {"time_cond_proj_dim": 8},
    "a UNet with extra input channels (inpainting or depth)": {"in_channels": 9},
}


@pytest.mark.parametrize("problem", UNETS)
def test_unets_that_need_more_than_a_prompt_are_refused(problem: str, tmp_path: Path) -> None:
    pipeline = tiny.pipeline(**UNETS[problem])
    for_memory = refused(lambda: StableDiffusion.of(pipeline, name="odd"))
    assert (for_memory.cause, for_memory.remedy) == (
        f"odd: {problem} is not supported yet.",
        ONE_OF_OURS,
    )
    pipeline.save_pretrained(tmp_path)
    for weights in (True, False):
        assert (
            refused(lambda w=weights: load_cpu(tmp_path, weights=w)).cause
            == f"{tmp_path}: {problem} is not supported yet."
        )


def test_a_prediction_type_that_is_not_supported() -> None:
    assert (
        refused(lambda: StableDiffusion.of(tiny.pipeline("sample"), name="odd")).cause
        == "odd: prediction type 'sample' is not supported yet."
    )


# --- devices --------------------------------------------------------------------------------------


def test_auto_is_what_the_machine_has() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_machine_without_cuda(saved: Path, name: str) -> None:
    error = refused(lambda: load(str(saved), device=name), DeviceError)
    assert (error.cause, error.remedy) == (
        f"device: {name} is not on this machine (0 CUDA devices).",
        "Use device: cpu or device: auto (--device cpu).",
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_a_cuda_device_too_many() -> None:
    assert (
        "cuda:99 is not on this machine"
        in refused(lambda: pick_device("cuda:99"), DeviceError).cause
    )


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_a_machine_without_mps() -> None:
    assert (
        refused(lambda: pick_device("mps"), DeviceError).cause
        == "device: mps is not on this machine."
    )


# --- sizes and schedulers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((None, None), (8, 8)), ((32, 48), (8, 12)), ((48, None), (12, 8)), ((4, 4), (1, 1))],
)
def test_latent_shapes(size: tuple[int | None, int | None], wanted: tuple[int, int]) -> None:
    assert memory().latent_shape(3, *size) == (3, 4, *wanted)


@pytest.mark.parametrize(
    ("pixels", "good"),
    [(33, (32, 36)), (35, (32, 36)), (127, (124, 128)), (3, (4, 8)), (0, (4, 8)), (-5, (4, 8))],
)
@pytest.mark.parametrize("side", ["height", "width"])
def test_a_size_between_two_latents_names_the_two_good_ones(
    side: str, pixels: int, good: tuple[int, int]
) -> None:
    error = refused(lambda: memory().latent_shape(1, **{side: pixels}), ExperimentError)
    assert error.cause.startswith(f"{side}: {pixels} is not a multiple of f = 4, ")
    assert error.remedy == f"Use {side}: {good[0]} or {good[1]}."
    for pixels_again in good:
        memory().latent_shape(1, **{side: pixels_again})


def test_an_unknown_scheduler_option_lists_the_real_ones() -> None:
    error = refused(lambda: memory().with_scheduler("DDIM", {"karras": True}), ExperimentError)
    assert error.cause == "scheduler_options: DDIMScheduler has no option 'karras'."
    listed = error.remedy.removeprefix("It has: ").removesuffix(".").split(", ")
    assert {"beta_start", "clip_sample", "timestep_spacing"} <= set(listed) and listed == sorted(
        listed
    )
    assert not {"self", "kwargs"} & set(listed)
    refused(lambda: memory().with_scheduler("DDIM", {"self": 1}), ExperimentError)
    assert (
        "PNDMScheduler has no option"
        in refused(
            lambda: memory().with_scheduler("default", {"karras": True}), ExperimentError
        ).cause
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIM", {"beta_schedule": "spiral"}),
        ("DPM++2M", {"algorithm_type": "magic"}),
        ("Euler", {"use_karras_sigmas": True, "use_beta_sigmas": True}),
    ],
)
def test_what_a_scheduler_refuses_is_an_experiments_mistake(
    name: str, options: dict[str, Any]
) -> None:
    assert (
        "refuses these options: "
        in refused(lambda: memory().with_scheduler(name, options), ExperimentError).cause
    )


def test_a_prediction_type_by_option_is_checked() -> None:
    assert (
        memory().with_scheduler("DDIM", {"prediction_type": "v_prediction"}).prediction_type
        == "v_prediction"
    )
    with pytest.raises((ModelError, ExperimentError), match="prediction type 'sample'"):
        memory().with_scheduler("DDIM", {"prediction_type": "sample"})


def test_the_default_scheduler_is_the_models_own() -> None:
    model = memory()
    assert model.with_scheduler("default", {}) is model
    other = model.with_scheduler("Euler", {})
    assert other.unet is model.unet and type(model.scheduler).__name__ == "PNDMScheduler"


# --- prompts --------------------------------------------------------------------------------------


def test_words_and_their_tokens() -> None:
    prompt = memory().read(HAT)
    assert prompt.words == ("An", "astronaut's", "hat", "scuba", "diving", "zebra")
    texts = {
        word: [prompt.tokens[i] for i in prompt.spans[w]] for w, word in enumerate(prompt.words)
    }
    assert (
        texts["astronaut's"] == ["astronaut", "'", "s"]
        and texts["zebra"] == list("zebra")
        and texts["scuba"] == ["scuba"]
    )
    without = [token for token, of in zip(prompt.tokens, prompt.word_of, strict=True) if of == -1]
    assert set(without) == {"<|startoftext|>", ",", "!", "<|endoftext|>"}
    assert (
        prompt.tokens[0] == "<|startoftext|>"
        and prompt.tokens[prompt.end] == "<|endoftext|>"
        and prompt.end == 15
    )
    assert len(prompt.tokens) == len(prompt.word_of) == prompt.ids.shape[1] == 77
    assert set(prompt.word_of[prompt.end :]) == {-1} and prompt.cut == ""


def test_a_word_written_twice_is_two_words() -> None:
    prompt = memory().read("cat cat, Cat")
    assert prompt.words == ("cat", "cat", "Cat")
    assert prompt.spans == {0: [1], 1: [2], 2: [4]}
    assert prompt.tokens[1] == prompt.tokens[2] == prompt.tokens[4] == "cat"


@pytest.mark.parametrize("text", ["", "   ", "\n", "!?"])
def test_a_prompt_without_words(text: str) -> None:
    prompt = memory().read(text)
    assert prompt.words == () and prompt.spans == {} and set(prompt.word_of) == {-1}
    assert memory().condition(text).cond_embedding.shape == (1, 77, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't  stop", ("don't", "stop")),
        ("well-known 3.5", ("well", "known", "3", "5")),
        ("caf\u00e9 \u732b cat", ("caf\u00e9", "\u732b", "cat")),
        ("a \U0001f642 cat", ("a", "\U0001f642", "cat")),
        ("\u2019s hat \u2019", ("s", "hat")),
        ("(cat:1.2), [hat]", ("cat", "1", "2", "hat")),
    ],
)
def test_words_of_odd_prompts(text: str, words: tuple[str, ...]) -> None:
    prompt = memory().read(text)
    assert prompt.words == words
    tokens = [i for span in prompt.spans.values() for i in span]
    assert tokens == sorted(set(tokens)) and all(
        prompt.spans.values()
    )  # every word has tokens, no token two words


def test_a_prompt_as_long_as_can_be() -> None:
    prompt = memory().read(" ".join(["cat"] * 75))
    assert len(prompt.words) == 75 and prompt.end == 76 and prompt.cut == ""


def test_a_prompt_too_long_is_an_error_that_says_what_would_go() -> None:
    text = " ".join(["cat"] * 75) + " the hat"
    error = refused(lambda: memory().read(text), PromptError)
    assert error.cause == "The prompt has 79 tokens, 77 is the most; it would lose 'the hat'."
    assert error.remedy == "Shorten it, or set over_long: cut."
    assert (
        refused(lambda: memory().condition("cat", text), PromptError).cause == error.cause
    )  # a negative prompt too


def test_a_prompt_too_long_can_be_cut_and_says_what_went() -> None:
    text = " ".join(["cat"] * 75) + " the hat"
    prompt = memory().read(text, "cut")
    assert prompt.cut == "the hat" and prompt.words == ("cat",) * 75 and prompt.end == 76
    assert torch.equal(prompt.ids, memory().read(" ".join(["cat"] * 75)).ids)
    assert memory().condition(text, over_long="cut").cond.cut == "the hat"


def test_cutting_inside_a_word() -> None:
    prompt = memory().read("cat " * 73 + "zebra", "cut")
    assert prompt.cut == "bra" and prompt.words[-1] == "ze" and len(prompt.spans[73]) == 2


def test_words_the_model_never_saw() -> None:
    model = replace(memory(), name="little", vocabulary=frozenset({"cat", "hat", "a"}))
    assert model.read("A cat, a HAT!").words == ("A", "cat", "a", "HAT")
    error = refused(lambda: model.read("a zebra and a cat, zebra"), PromptError)
    assert error.cause == "little never saw 'zebra', 'and' in its training."
    assert error.remedy == "Its words: a cat hat. Another model (model: ...) knows more."
    assert "'zebra'" in refused(lambda: model.condition("cat", "zebra"), PromptError).cause


def test_embeddings_are_those_of_diffusers() -> None:
    pipeline, model = tiny.pipeline(), memory()
    cond, uncond = pipeline.encode_prompt(HAT, "cpu", 1, True, "cat")
    conditioning = model.condition(HAT, "cat")
    assert torch.equal(conditioning.cond_embedding, cond) and torch.equal(
        conditioning.uncond_embedding, uncond
    )
    both, one = conditioning.rows(("uncond", "cond"), 2), conditioning.rows(("cond",), 2)
    assert torch.equal(both["encoder_hidden_states"], torch.cat([uncond, uncond, cond, cond]))
    assert torch.equal(one["encoder_hidden_states"], torch.cat([cond, cond]))


def test_guidance_needs_its_branch() -> None:
    conditioning = memory().condition("cat", guided=False)
    assert conditioning.uncond_embedding is None
    assert conditioning.rows(("cond",), 1)["encoder_hidden_states"].shape == (1, 77, 16)
    with pytest.raises(ValueError, match="without its unconditional branch"):
        conditioning.rows(("uncond", "cond"), 1)


# --- pictures -------------------------------------------------------------------------------------


def overflowing() -> StableDiffusion:
    """A float16 model whose VAE overflows in its last layer: finite weights, infinite sums."""
    model = StableDiffusion.of(tiny.pipeline())
    with torch.no_grad():
        model.vae.decoder.conv_out.weight.mul_(1e5)
    for part in PARTS:
        getattr(model, part).half()
    assert all(bool(torch.isfinite(weight).all()) for weight in model.vae.parameters())
    return model


def some_latents(images: int = 1) -> torch.Tensor:
    return torch.randn(images, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def dtypes(model: StableDiffusion) -> set[torch.dtype]:
    return {weight.dtype for weight in model.vae.parameters()}


def test_a_vae_that_overflows_in_float16_is_run_again_in_float32() -> None:
    model, latents = overflowing(), some_latents().half()
    before = {key: value.clone() for key, value in model.vae.state_dict().items()}
    with torch.no_grad():
        assert not bool(
            torch.isfinite(
                model.vae.decode(latents / model.scaling_factor, return_dict=False)[0]
            ).all()
        )
    pixels, again = model.decode(latents)
    assert again is True and pixels.shape == (1, 32, 48, 3) and pixels.dtype == torch.uint8
    assert dtypes(model) == {torch.float16} and model.dtype == torch.float16
    assert all(torch.equal(value, before[key]) for key, value in model.vae.state_dict().items())
    single = StableDiffusion.of(tiny.pipeline())
    single.vae.load_state_dict({key: value.float() for key, value in before.items()})
    assert torch.equal(pixels, single.decode(latents.float())[0])


def test_a_vae_is_half_again_even_if_the_second_run_fails() -> None:
    model = overflowing()

    def fail(x: torch.Tensor) -> None:
        if x.dtype == torch.float32:
            raise MemoryError("no room")

    with hooks.Hooks([(model.vae.decoder, "input", fail)]), pytest.raises(MemoryError):
        model.decode(some_latents().half())
    assert dtypes(model) == {torch.float16} and hooks.count(model.vae) == 0


def test_a_vae_that_does_not_overflow_is_run_once() -> None:
    for dtype in (torch.float32, torch.float16):
        model, calls = StableDiffusion.of(tiny.pipeline()), []
        for part in PARTS:
            getattr(model, part).to(dtype)
        with hooks.Hooks([(model.vae.decoder, "output", calls.append)]):
            assert model.decode(some_latents(2).to(dtype))[1] is False
        assert len(calls) == 1 and dtypes(model) == {dtype}


def test_pixels_are_rounded_as_diffusers_rounds_them() -> None:
    pixels = torch.linspace(-1.2, 1.2, 3 * 64 * 64).reshape(1, 3, 64, 64)
    processor = diffusers.image_processor.VaeImageProcessor()
    assert np.array_equal(
        to_uint8(pixels)[0].numpy(), np.asarray(processor.postprocess(pixels, output_type="pil")[0])
    )


def test_pixels_that_are_no_numbers_become_black_without_a_warning() -> None:
    assert to_uint8(
        torch.tensor([float("nan"), float("inf"), -float("inf")]).reshape(1, 3, 1, 1)
    ).tolist() == [[[[0, 255, 0]]]]


def test_a_model_of_pixels_has_no_vae() -> None:
    model = replace(memory(), vae=None)
    assert (model.f, model.scaling_factor, model.latent_shape(1, 7, 9)) == (1, 1.0, (1, 4, 7, 9))
    pixels = some_latents()[:, :3]
    assert (
        torch.equal(model.decode(pixels)[0], to_uint8(pixels)) and model.decode(pixels)[1] is False
    )
