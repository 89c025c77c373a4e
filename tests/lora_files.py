"""LoRA files for the tiny models, as diffusers and kohya's scripts write them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

UNET = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def tensors_of(pipe: Any, rank: int = 2, seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    """Random LoRA tensors for each part of a pipeline, by peft's names. The pipeline is changed."""
    torch.manual_seed(seed)
    parts = {}
    for part in KOHYA:
        module = getattr(pipe, part, None)
        if module is None:
            continue
        config = peft.LoraConfig(
            r=rank, target_modules=list(UNET if part == "unet" else TEXT), init_lora_weights=False
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            peft.inject_adapter_in_model(config, module)
        state = get_peft_model_state_dict(module)
        parts[part] = {
            key: (torch.randn(value.shape) * 0.3).to(value.dtype) for key, value in state.items()
        }
    return parts


def save_peft(pipe: Any, path: Path, *, alpha: float | None = None, **how: Any) -> Path:
    """Write a LoRA as `save_lora_weights` does, with an alpha in its header if one is given."""
    parts = tensors_of(pipe, **how)
    rank = how.get("rank", 2)
    flat = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    settings = {
        f"{part}.{name}": value
        for part in parts
        for name, value in {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(UNET if part == "unet" else TEXT),
            "lora_dropout": 0.0,
        }.items()
    }
    header = {} if alpha is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file(flat, path, metadata={"format": "pt", **header})
    return path


def save_kohya(pipe: Any, path: Path, *, alpha: float = 1.0, **how: Any) -> Path:
    """Write a LoRA as kohya's scripts do."""
    flat = {}
    first = "lora_te1" if getattr(pipe, "text_encoder_2", None) is not None else "lora_te"
    for part, state in tensors_of(pipe, **how).items():
        start = first if part == "text_encoder" else KOHYA[part]
        for key, value in state.items():
            layer, _, side = key.partition(".lora_")
            wrapped = "" if part == "unet" or layer.startswith("text_model.") else "text_model."
            name = f"{start}_{(wrapped + layer).replace('.', '_')}"
            flat[f"{name}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = value
            flat[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(flat, path, metadata={"ss_network_dim": "2"})
    return path
