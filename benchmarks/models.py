"""The models that are measured, and what their command lines share.

    bundled   the model that comes with the toolkit: 16x16 latents, 7 cross-attention layers
    small     Stable Diffusion v1's topology with channels 64/128/256/256: 37,522,628 parameters
              and, at 512 pixels, its full volume of attention (16 layers of 8 heads), at a seventh
              of its compute
    sd1       Stable Diffusion v1's exact configuration, 859,520,964 parameters

The last two have random weights: time, memory and size do not depend on what a model has learned.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from probe.diffusion.known_configs import KNOWN
from probe.diffusion.loading import BUNDLED

NAMES = ("small", "bundled", "sd1")
PROMPT = "An astronaut scuba diving"
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
KNOWN_AS = {"small": "small", "sd1": "sd14"}
THIN_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
THIN_TEXT = {"num_hidden_layers": 2}
PARAMETERS = {"small": 37_522_628, "sd1": 859_520_964}


def pipeline(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", *, whole: bool = False
) -> Any:
    """Return a Stable Diffusion pipeline. On the "meta" device it has no weights.

    Text encoder and VAE are outside of the loop that is measured. Those of `small` and `sd1` are
    thin, unless `whole`.
    """
    if name == "bundled":
        loaded = StableDiffusionPipeline.from_pretrained(
            BUNDLED["emojiworld"], dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
        return _quiet(loaded.to(device))
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(BUNDLED["emojiworld"] / "tokenizer")
    _, configs = KNOWN[KNOWN_AS[name]]
    with torch.device("meta" if device == "meta" else "cpu"):
        unet = UNet2DConditionModel(**configs["unet"])
        vae = AutoencoderKL(**configs["vae"] | ({} if whole else THIN_VAE))
        text = configs["text_encoder"] | ({} if whole else THIN_TEXT)
        encoder = CLIPTextModel(CLIPTextConfig(**text))
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[name]
    made = StableDiffusionPipeline(
        vae,
        encoder,
        words,
        unet,
        DDIMScheduler(**SCHEDULE),
        None,
        None,
        requires_safety_checker=False,
    )
    return _quiet(made if device == "meta" else made.to(device, dtype))


def parser(about: str | None, rounds: int = 7, **options: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share.

    A model of 860 million parameters gets 3 rounds.
    """
    made = argparse.ArgumentParser(description=(about or "").split("\n")[0], **options)
    made.add_argument("--model", choices=NAMES, default="small")
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rounds", type=int, default=rounds)
    return made


def machine() -> str:
    """Return what ran it, for the table's head."""
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def _quiet(made: Any) -> Any:
    made.set_progress_bar_config(disable=True)
    return made
