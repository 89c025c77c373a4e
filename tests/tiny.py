"""Tiny, real, random Stable Diffusion models, built from configs: the shapes and code paths of the large ones."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = "a an the astronaut scuba diving cat hat on in and of".split()


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges for a dozen words; everything else falls to letters."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 324)]
    vocabulary = dict.fromkeys([*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)])
    vocabulary |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        files[0].write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        files[1].write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        return CLIPTokenizer(str(files[0]), str(files[1]), model_max_length=77)


def pipeline(prediction_type: str = "epsilon", seed: int = 0, **unet_options: Any) -> StableDiffusionPipeline:
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
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=0.3,
    )
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "prediction_type": prediction_type}
    scheduler = PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **schedule)
    made = StableDiffusionPipeline(vae, text, words, unet, scheduler, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
