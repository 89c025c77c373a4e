"""The configs of published models, so that they can be counted without their files.

`sd14` stands for all of Stable Diffusion 1.x. `small` is its topology with narrower channels,
which nobody trained: small enough to be timed on a CPU.
"""

from __future__ import annotations

from typing import Any

from probe.diffusion.single_file import CONFIGS
from probe.diffusion.support import ORDINARY, XL

Configs = dict[str, dict[str, Any]]

_TEXT_21 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_TEXT_XL = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_UNET_XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

KNOWN: dict[str, tuple[str, Configs]] = {
    "sd14": (ORDINARY, CONFIGS),
    "sd21": (
        ORDINARY,
        {
            "unet": {
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
            },
            "vae": CONFIGS["vae"] | {"sample_size": 768},
            "text_encoder": _TEXT_21,
        },
    ),
    "sdxl": (
        XL,
        {
            "unet": _UNET_XL,
            "vae": CONFIGS["vae"] | {"sample_size": 1024},
            "text_encoder": CONFIGS["text_encoder"],
            "text_encoder_2": _TEXT_XL,
        },
    ),
    "small": (
        ORDINARY,
        CONFIGS | {"unet": CONFIGS["unet"] | {"block_out_channels": [64, 128, 256, 256]}},
    ),
}

# What others call them.
OTHER_NAMES = {"sd1": "sd14", "sd15": "sd14", "sd1.5": "sd14", "sd2": "sd21", "sd-xl": "sdxl"}
