"""A pipeline's weights in the layout of the original checkpoints, for tests of single files."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

# diffusers' name: the original name
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
PLAIN_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def original_unet(key: str, layers: int, attending: Collection[int]) -> str:
    """The original name of a tensor of a UNet in which each block has `layers` layers, and the up
    blocks `attending` attention.
    """
    stem, _, end = key.rpartition(".")
    if stem in PLAIN_UNET:
        return f"{PLAIN_UNET[stem]}.{end}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        place = f"middle_block.{2 * int(found[2]) + (found[1] == 'attentions')}"
        return f"{place}.{renamed(found[3]) if found[1] == 'resnets' else found[3]}"
    found = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    )
    assert found, key
    block, kind, number, rest = int(found[2]), found[3], int(found[4]), found[5]
    first = block * (layers + 1) + (1 if found[1] == "down" else 0)
    name = "input_blocks" if found[1] == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{name}.{first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"{name}.{first + layers}.{2 if block in attending else 1}.{rest}"
    return f"{name}.{first + number}.{'0.' + renamed(rest) if kind == 'resnets' else '1.' + rest}"


def renamed(rest: str) -> str:
    stem, _, end = rest.rpartition(".")
    return f"{RESNET[stem]}.{end}"


def original_vae(key: str, blocks: int) -> str:
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    if "mid_block.attentions.0." in key:
        head, rest = key.split("mid_block.attentions.0.")
        stem, _, end = rest.rpartition(".")
        return f"{head}mid.attn_1.{VAE_ATTENTION[stem]}.{end}"
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)",
        lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}",
        key,
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key
    )


def original(pipeline: Any) -> dict[str, torch.Tensor]:
    """A pipeline's weights as the first Stable Diffusion named and shaped them, with what else lay
    in such files.
    """
    held: dict[str, torch.Tensor] = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(1)}
    attending = [
        number
        for number, kind in enumerate(pipeline.unet.config.up_block_types)
        if kind.startswith("CrossAttn")
    ]
    for key, tensor in pipeline.unet.state_dict().items():
        held[f"model.diffusion_model.{original_unet(key, 1, attending)}"] = tensor
    for key, tensor in pipeline.vae.state_dict().items():
        attention = "attentions" in key and tensor.ndim == 2
        held[f"first_stage_model.{original_vae(key, 3)}"] = (
            tensor[:, :, None, None] if attention else tensor
        )
    xl = hasattr(pipeline, "text_encoder_2")
    first = "conditioner.embedders.0.transformer" if xl else "cond_stage_model.transformer"
    for key, tensor in pipeline.text_encoder.state_dict().items():
        held[f"{first}.text_model.{key.removeprefix('text_model.')}"] = tensor
    held[f"{first}.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if xl:
        held |= {
            f"conditioner.embedders.1.model.{key}": tensor
            for key, tensor in open_clip(pipeline.text_encoder_2).items()
        }
    return {key: tensor.contiguous().clone() for key, tensor in held.items()}


def open_clip(encoder: Any) -> dict[str, torch.Tensor]:
    """A text encoder as OpenCLIP names it: queries, keys and values lie in one tensor, and the
    projection is turned around.
    """
    own = encoder.state_dict()
    layer_part = "|".join(map(re.escape, OPEN_CLIP_LAYER))
    held = {"logit_scale": torch.ones(()), "text_projection": own["text_projection.weight"].T}
    for key, tensor in own.items():
        name = key.removeprefix("text_model.")
        if found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [own[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            held[f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}"] = torch.cat(parts)
        elif found := re.fullmatch(rf"encoder\.layers\.(\d+)\.({layer_part})\.(.*)", name):
            part = OPEN_CLIP_LAYER[found[2]]
            held[f"transformer.resblocks.{found[1]}.{part}.{found[3]}"] = tensor
        elif name in OPEN_CLIP:
            held[OPEN_CLIP[name]] = tensor
    return held
