"""Tiny, real, random Stable Diffusion models, with the shapes and code paths of the large ones."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

COMMIT, OLDER = (
    "0123456789abcdef0123456789abcdef01234567",
    "fedcba9876543210fedcba9876543210fedcba98",
)
WORDS = "a an the astronaut scuba diving cat hat on in and of".split()


# Of the real models' UNets: base and Turbo, and the distilled SSD-1B, whose blocks differ from
# layer to layer.
XL_UNETS: dict[str, dict[str, Any]] = {
    "base": {"transformer_layers_per_block": (1, 1, 2)},
    "turbo": {"transformer_layers_per_block": (1, 2, 2), "sample_size": 16},
    "ssd-1b": {
        "transformer_layers_per_block": (1, (2, 1), (1, 2)),
        "reverse_transformer_layers_per_block": ((1, 1, 2), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": 2,
    },
}


@functools.cache
def tokenizer(**special: str) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges for a dozen words; everything else falls to
    letters.
    """
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 324)]
    vocabulary = dict.fromkeys(
        [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    )
    vocabulary |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        files[0].write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        files[1].write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        return CLIPTokenizer(str(files[0]), str(files[1]), model_max_length=77, **special)


def autoencoder(blocks: int = 3, channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16)[-blocks:],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.3,
    )


def text_config(words: CLIPTokenizer, width: int = 16, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **more,
    )


def pipeline(
    prediction_type: str = "epsilon", seed: int = 0, **unet_options: Any
) -> StableDiffusionPipeline:
    """A random two-block Stable Diffusion for 32 x 32 pixels, f = 4: latents of (4, 8, 8)."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **unet_options,
        }
    )
    vae = autoencoder()
    words = tokenizer()
    text = CLIPTextModel(text_config(words))
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    scheduler = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule)
    made = StableDiffusionPipeline(
        vae, text, words, unet, scheduler, None, None, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def pixel_pipeline(
    prediction_type: str = "v_prediction", seed: int = 0, size: int = 16
) -> StableDiffusionPipeline:
    """A random Stable Diffusion without a VAE: it draws `size` x `size` pixels of three colours.

    Its betas are listed, as those of a schedule that was shifted for its size.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    words = tokenizer()
    scheduler = DDIMScheduler(
        trained_betas=shifted_betas(4.0),
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    made = StableDiffusionPipeline(
        None,
        CLIPTextModel(text_config(words)),
        words,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def shifted_betas(shift: float, timesteps: int = 1000) -> list[float]:
    """The betas of Stable Diffusion's schedule with every sigma `shift` times as large."""
    own = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alpha_bar = own.alphas_cumprod[:timesteps].double()
    alpha_bar = alpha_bar / (alpha_bar + shift**2 * (1 - alpha_bar))
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return [float(beta) for beta in 1 - alpha_bar / before]


def xl_pipeline(
    shape: str = "base", prediction_type: str = "epsilon", zeros: bool = True, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A random Stable Diffusion XL for 32 x 32 pixels (Turbo: 64 x 64), f = 4, of the `shape` of a
    real one.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (1, 2, 4),
            "cross_attention_dim": 40,
            "use_linear_projection": True,
            "norm_num_groups": 8,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 12,
            **XL_UNETS[shape],
        }
    )
    first, second = tokenizer(), tokenizer(pad_token="!")
    text = CLIPTextModel(text_config(first))
    text_2 = CLIPTextModelWithProjection(
        text_config(second, 24, projection_dim=12, hidden_act="gelu")
    )
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    turbo = shape == "turbo"
    scheduler = (EulerAncestralDiscreteScheduler if turbo else EulerDiscreteScheduler)(
        timestep_spacing="trailing" if turbo else "leading", **schedule
    )
    made = StableDiffusionXLPipeline(
        autoencoder(),
        text,
        text_2,
        first,
        second,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def hub_cache(folder: Path, model: Path, refs: dict[str, str]) -> Path:
    """A model as the hub's client keeps it: blobs, links to them in a folder for each commit, and
    names of commits.
    """
    repository = folder / "models--somebody--tiny"
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        for commit in sorted(set(refs.values())):
            link = repository / "snapshots" / commit / file.relative_to(model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    for name, commit in refs.items():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return folder
