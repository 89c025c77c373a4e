"""What is not supported is refused by name before anything is written, with a remedy that helps.

What can be recorded, is.
"""

from __future__ import annotations

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
from PIL import Image

from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.diffusion.support import NEWEST_TESTED
from probe.errors import ExperimentError, ModelError, UserError
from probe.proof.verdict import verify
from probe.reading.recording import open_run
from probe.running.recorder import record, record_noising, resume
from probe.settings.experiment import load_experiment

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def ask(tmp_path: Path) -> dict[str, Any]:
    return {
        "prompt": "a cat",
        "steps": 1,
        "output": str(tmp_path / "runs"),
        "device": "cpu",
        "capture": {"attention": "off"},
    }


def refused(asked: dict[str, Any], pipeline: Any, **changes: Any) -> UserError:
    """The error of a recording that must not be begun, with nothing left behind."""
    with pytest.raises(UserError) as caught:
        record(asked, pipeline, progress=False, **changes)
    assert not Path(asked["output"]).exists() and caught.value.remedy
    return caught.value


# --- schedulers -----------------------------------------------------------------------------------

ODD = [
    "IPNDMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "KarrasVeScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "ScoreSdeVeScheduler",
    "DDIMInverseScheduler",
    "VQDiffusionScheduler",
]


@pytest.mark.parametrize("kind", ODD)
def test_a_scheduler_that_is_not_supported_is_named(kind: str, ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    options = {"num_vec_classes": 4} if "VQ" in kind else {}
    pipeline.scheduler = getattr(diffusers, kind)(**options)
    error = refused(ask, pipeline)
    assert (
        error.cause.endswith(f": its scheduler {kind} is not supported.")
        and error.remedy == "Name another: --scheduler DDIM."
    )


def test_another_scheduler_helps_where_the_pipeline_knows_its_betas(ask: dict[str, Any]) -> None:
    plain, odd = tiny.pipeline(), tiny.pipeline()
    odd.scheduler = diffusers.IPNDMScheduler.from_config(odd.scheduler.config)
    runs = [
        record({**ask, "scheduler": "DDIM"}, pipeline, progress=False) for pipeline in (plain, odd)
    ]
    assert np.array_equal(*(run.variable("latents/latents").values for run in runs))


def test_where_nobody_knows_the_betas_they_are_asked_for(ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    error = refused({**ask, "scheduler": "DDIM"}, pipeline)
    assert error.cause.endswith(
        "its scheduler FlowMatchEulerDiscreteScheduler does not say with which betas the model was "
        "trained."
    )
    assert (
        "scheduler_options: {beta_start: 0.00085, beta_end: 0.012, beta_schedule: scaled_linear}"
        in error.remedy
    )
    assert (
        record(
            {**ask, "scheduler": "DDIM", "scheduler_options": BETAS}, pipeline, progress=False
        ).status
        == "complete"
    )


@pytest.mark.parametrize("entry", [["diffusers", "DPMSolverSDEScheduler"], "DDIMScheduler"])
def test_a_folder_whose_own_scheduler_is_not_supported_runs_with_another(
    entry: Any, tmp_path: Path, ask: dict[str, Any]
) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": entry}))
    asked = {**ask, "model": str(tmp_path / "model")}
    assert refused(asked, None).remedy == "Name another: --scheduler DDIM."
    run = record({**asked, "scheduler": "DDIM"}, progress=False)
    assert np.array_equal(
        run.variable("latents/latents"),
        record({**ask, "scheduler": "DDIM"}, tiny.pipeline(), progress=False).variable(
            "latents/latents"
        ),
    )


def test_options_of_a_scheduler_are_bounded(ask: dict[str, Any]) -> None:
    for options in (
        {"num_train_timesteps": 500_000_000},
        {"num_train_timesteps": 0},
        {"steps_offset": 10**12},
    ):
        error = refused({**ask, "scheduler": "DDIM", "scheduler_options": options}, tiny.pipeline())
        assert isinstance(error, ExperimentError) and error.cause.startswith(
            f"scheduler_options: {next(iter(options))} is "
        )


# --- parts of a pipeline --------------------------------------------------------------------------


def half_unet(pipeline: Any) -> None:
    pipeline.unet.half()


def half_text(pipeline: Any) -> None:
    pipeline.text_encoder.half()


def half_block(pipeline: Any) -> None:
    pipeline.unet.mid_block.half()


@pytest.mark.parametrize("change", [half_unet, half_text, half_block, lambda p: p.vae.bfloat16()])
def test_parts_of_different_number_formats_are_refused_and_the_remedy_helps(
    change: Callable[[Any], Any], ask: dict[str, Any]
) -> None:
    pipeline = tiny.pipeline()
    change(pipeline)
    error = refused(ask, pipeline)
    assert "its parts are of different number formats: unet float" in error.cause
    assert error.remedy == "Call pipeline.to(dtype=torch.float32)."
    assert record(ask, pipeline.to(dtype=torch.float32), progress=False).status == "complete"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_a_part_that_is_missing_is_named(part: str, ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    setattr(pipeline, part, None)
    assert refused(ask, pipeline).cause.endswith(f": the pipeline has no {part}.")


def test_a_pipeline_without_a_scheduler_is_given_one(ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    pipeline.scheduler = None
    assert refused(ask, pipeline).cause.endswith(": it has no scheduler.")
    assert "does not say with which betas" in refused({**ask, "scheduler": "DDIM"}, pipeline).cause


def test_a_part_on_another_device_is_named(ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    pipeline.text_encoder.to("meta")
    assert (
        "its parts are on different devices: unet on cpu, vae on cpu, text_encoder on meta"
        in refused(ask, pipeline).cause
    )


@pytest.mark.parametrize("length", [10**30, 500, 1])
def test_a_tokenizer_whose_length_does_not_fit(length: int, ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline()
    try:
        pipeline.tokenizer.model_max_length = length
        assert refused(ask, pipeline).remedy == "Set pipeline.tokenizer.model_max_length = 77."
        pipeline.tokenizer.model_max_length = 77
        assert record(ask, pipeline, progress=False).status == "complete"
    finally:
        pipeline.tokenizer.model_max_length = 77  # tiny's tokenizer is one for all


def test_parts_of_other_classes_are_named(ask: dict[str, Any]) -> None:
    from transformers import (
        BertConfig,
        BertModel,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
    )

    pipeline = tiny.pipeline()
    bert = BertModel(
        BertConfig(
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=pipeline.tokenizer.backend_tokenizer)
    asymmetric = diffusers.AsymmetricAutoencoderKL(
        norm_num_groups=1, down_block_out_channels=(8,), up_block_out_channels=(8,)
    )
    plain_unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    others: list[tuple[str, Any]] = [
        ("text_encoder", bert),
        ("text_encoder", CLIPTextModelWithProjection(pipeline.text_encoder.config)),
        ("tokenizer", fast),
        ("vae", asymmetric),
        ("vae", diffusers.ConsistencyDecoderVAE.__new__(diffusers.ConsistencyDecoderVAE)),
        ("unet", plain_unet),
    ]
    for part, other in others:
        own = getattr(pipeline, part)
        if isinstance(other, diffusers.ConsistencyDecoderVAE):
            torch.nn.Module.__init__(other)
        pipeline.register_modules(**{part: other})
        assert (
            f"its {part} is a {type(other).__name__}, which is not supported."
            in refused(ask, pipeline).cause
        )
        pipeline.register_modules(**{part: own})


UNETS: dict[str, dict[str, Any]] = {
    "a UNet with class embeddings": {"num_class_embeds": 4},
    "a UNet whose text goes through another projection": {
        "encoder_hid_dim": 16,
        "encoder_hid_dim_type": "text_proj",
    },
    "a UNet with gated attention (GLIGEN)": {"attention_type": "gated"},
    "its UNet reads text of width 24": {"cross_attention_dim": 24},
    "a UNet whose config gives no size of its latents": {"sample_size": None},
    "its VAE has latents of 4 channels, and its UNet 8": {"in_channels": 8, "out_channels": 8},
}


@pytest.mark.parametrize("problem", UNETS)
def test_unets_that_want_more_or_fit_no_other_part_are_named(
    problem: str, ask: dict[str, Any]
) -> None:
    assert problem in refused(ask, tiny.pipeline(**UNETS[problem])).cause


def test_an_ip_adapter_is_named_and_the_remedy_helps(ask: dict[str, Any]) -> None:
    from diffusers.models.embeddings import (
        IPAdapterFullImageProjection,
        MultiIPAdapterImageProjection,
    )

    pipeline = tiny.pipeline()
    plain = pipeline.unet.attn_processors
    pipeline.unet.encoder_hid_proj = MultiIPAdapterImageProjection(
        [IPAdapterFullImageProjection(16, 16)]
    )
    pipeline.unet.config.encoder_hid_dim_type = "ip_image_proj"
    error = refused(ask, pipeline)
    assert "(an IP-Adapter, or Kandinsky) is not supported yet" in error.cause
    assert error.remedy == "Call pipeline.unload_ip_adapter() if an IP-Adapter is loaded."
    pipeline.unload_ip_adapter()
    assert pipeline.unet.attn_processors.keys() == plain.keys()
    assert record(ask, pipeline, progress=False).status == "complete"


def test_a_model_that_drops_values_at_random_is_named(ask: dict[str, Any]) -> None:
    pipeline = tiny.pipeline(dropout=0.5)
    pipeline.unet.train()
    assert refused(ask, pipeline).remedy == "Call pipeline.unet.eval()."
    pipeline.unet.eval()
    assert record(ask, pipeline, progress=False).status == "complete"


def test_training_leaves_no_trace(ask: dict[str, Any]) -> None:
    """Training mode without dropout, gradients asked for, gradient checkpointing: the same bits."""
    plain, trained = tiny.pipeline(), tiny.pipeline()
    trained.unet.train().requires_grad_(True)
    trained.unet.enable_gradient_checkpointing()
    assert np.array_equal(
        *(
            record(ask, each, progress=False).variable("latents/latents").values
            for each in (plain, trained)
        )
    )


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionControlNetPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionUpscalePipeline",
    ],
)
def test_other_pipelines_are_named(kind: str, ask: dict[str, Any]) -> None:
    other = object.__new__(getattr(diffusers, kind))
    other.unet = None
    assert (
        f"({kind}) is not supported yet." in refused(ask, other).cause
        or kind in refused(ask, other).cause
    )


@pytest.mark.parametrize("what", ["a name", 3, {"unet": 1}])
def test_what_is_no_pipeline_is_told_so(what: Any, ask: dict[str, Any]) -> None:
    assert (
        refused(ask, what).cause
        == f"pipeline: {type(what).__name__} is not a pipeline of diffusers."
    )


# --- a tiny autoencoder ---------------------------------------------------------------------------


def tiny_autoencoder() -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    pipeline = tiny.pipeline()
    pipeline.register_modules(vae=vae)
    pipeline.vae_scale_factor = 4
    return pipeline


def test_a_tiny_autoencoder_decodes_what_the_pipeline_decodes(
    ask: dict[str, Any], tmp_path: Path
) -> None:
    pipeline = tiny_autoencoder()
    run = record(ask, pipeline, progress=False)
    same = {
        "num_inference_steps": 1,
        "guidance_scale": run.experiment.guidance_scale,
        "generator": [torch.Generator().manual_seed(0)],
    }
    theirs = pipeline("a cat", **same, output_type="np").images
    with Image.open(run.path / "picture.png") as picture:
        assert np.array_equal(np.asarray(picture), (theirs[0] * 255).round().astype(np.uint8))
    pipeline.save_pretrained(tmp_path / "model")
    assert (
        load(str(tmp_path / "model"), device="cpu").digest()
        == StableDiffusion.of(pipeline).digest()
    )


def test_a_tiny_autoencoder_is_not_asked_for_a_distribution(
    ask: dict[str, Any], tmp_path: Path
) -> None:
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "cat.png")
    error = refused(
        {**ask, "image": str(tmp_path / "cat.png"), "strength": 1.0}, tiny_autoencoder()
    )
    assert (
        "its VAE is an AutoencoderTiny, which makes no distribution of a picture's latents."
        in error.cause
    )


# --- arguments of a pipeline ----------------------------------------------------------------------


def test_arguments_of_a_pipeline_that_have_no_field_are_named(ask: dict[str, Any]) -> None:
    error = refused(ask, tiny.pipeline(), pooled_prompt_embeds=torch.zeros(1, 12))
    cause = "pooled_prompt_embeds: this argument of diffusers' pipelines has no field here"
    assert error.cause == cause
    assert error.remedy.startswith("Save it beside prompt_embeds in one .safetensors file")
    for name in (
        "negative_prompt_embeds",
        "ip_adapter_image",
        "latents",
        "generator",
        "callback_on_step_end",
    ):
        for call in (
            lambda n=name: refused(ask, tiny.pipeline(), **{n: 1}),
            lambda n=name: refused({**ask, n: 1}, tiny.pipeline()),
        ):
            assert f"{name}: this argument" in call().cause and "Did you mean" not in call().remedy
    assert "unknown field" in refused(ask, tiny.pipeline(), colour="red").cause
    assert record(ask, tiny.pipeline(), progress=False, steps=1).experiment == load_experiment(
        ask, steps=1, model=StableDiffusion.of(tiny.pipeline()).name
    )


def test_an_error_of_a_model_is_a_users(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent.parent / "probe/emojiworld", tmp_path / "model")
    (tmp_path / "model/unet/config.json").unlink()
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "model"))
    assert caught.value.exit_code == 2


def test_a_model_that_cannot_run_is_told_so_before_anything_is_written(ask: dict[str, Any]) -> None:
    error = refused(ask, tiny.pipeline(conv_in_kernel=2))
    assert (
        ": its unet does not run on latents of 8 x 8: " in error.cause
        and error.remedy.startswith("Set another height and width")
    )


# --- versions of diffusers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "lines"),
    [
        (NEWEST_TESTED, 0),
        pytest.param("0.37.0", 0, marks=pytest.mark.slow),
        ("0.99.0.dev0", 1),
    ],
)
def test_a_newer_diffusers_is_said_once_when_recording(
    version: str,
    lines: int,
    ask: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(diffusers, "__version__", version)
    cause = (
        f"diffusers {version} is newer than the newest that probe was tested with "
        f"({NEWEST_TESTED}). Check the recording with"
    )
    pipeline = tiny.pipeline()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipeline.unet.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        record(ask, pipeline)
    hook.remove()
    said = capsys.readouterr()
    assert said.err.count(cause) == lines and cause not in said.out
    run = resume(open_run("latest", ask["output"]), pipeline)
    assert capsys.readouterr().err.count(cause) == lines
    record_noising(
        np.zeros((64, 64, 3), np.uint8),
        "a cat",
        pipeline=pipeline,
        timesteps=[500],
        noises=1,
        output=ask["output"],
    )
    assert capsys.readouterr().err.count(cause) == lines

    opened = open_run(run.path)
    assert "a cat" in str(opened) and opened.images.size and verify(opened, model=pipeline)
    said = capsys.readouterr()
    assert "newer" not in said.err + said.out, "reading says nothing of it"


def test_the_newest_tested_is_the_one_of_the_constraints() -> None:
    constraints = (
        (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    )
    assert f"diffusers=={NEWEST_TESTED}" in constraints
