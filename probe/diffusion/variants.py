"""The same network for another input: on pixels, on other latents, with attention left out.

Everything is made on the meta device, from the configs of a model's own parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from probe.diffusion.parts import downsampling
from probe.diffusion.support import COLOURS
from probe.errors import ModelError

WITHOUT_ATTENTION = {"CrossAttnDownBlock2D": "DownBlock2D", "CrossAttnUpBlock2D": "UpBlock2D"}
MID_WITHOUT_ATTENTION = "UNetMidBlock2D"
Changes = dict[str, Any]


def remade(module: Any, changes: Changes) -> Any:
    """Return a diffusers model with some of its settings changed, on the meta device."""
    from diffusers.models.modeling_utils import no_init_weights

    own = {name: value for name, value in module.config.items() if not name.startswith("_")}
    with torch.device("meta"), no_init_weights():
        return type(module)(**own | changes).eval()


def levels(unet: Any) -> int:
    """Return on how many grids a UNet works, each half as wide as the one before."""
    return len(unet.config.block_out_channels)


def channels_at(unet: Any, f: int) -> int:
    """Return how many channels a UNet is given: three colours at f = 1, else those of its latents.

    Autoencoders with another f often have more or fewer; a UNet hardly costs more for that.
    """
    return COLOURS if f == 1 else int(unet.config.in_channels)


def unet_at(unet: Any, f: int) -> Changes:
    """Return the changes that make a UNet work at another f."""
    channels = channels_at(unet, f)
    return {"in_channels": channels, "out_channels": channels}


def coarse(unet: Any, grid: tuple[int, int], widest: int) -> Changes:
    """Return the changes that leave out attention on grids wider than `widest`; {} for none.

    `grid` is (y, x) of the UNet's input.
    """
    count = levels(unet)
    wide = [level for level in range(count) if math.ceil(max(grid) / 2**level) > widest]
    down, up = list(unet.config.down_block_types), list(unet.config.up_block_types)
    for level in wide:
        down[level] = WITHOUT_ATTENTION.get(down[level], down[level])
        last = count - 1 - level
        up[last] = WITHOUT_ATTENTION.get(up[last], up[last])
    changes: Changes = {"down_block_types": tuple(down), "up_block_types": tuple(up)}
    if count - 1 in wide:
        changes["mid_block_type"] = MID_WITHOUT_ATTENTION
    same = all(_same(unet.config.get(name), value) for name, value in changes.items())
    return {} if same else changes


def _same(one: Any, other: Any) -> bool:
    return tuple(one) == other if isinstance(one, list | tuple) else bool(one == other)


def vae_at(vae: Any, f: int) -> Changes:
    """Return the changes that give a VAE another f: levels left out, or the last one repeated.

    Raise ModelError for a VAE of which that cannot be made.
    """
    if downsampling(vae) == f:
        return {}
    count = int(math.log2(f)) + 1
    if type(vae).__name__ != "AutoencoderKL":
        raise ModelError(
            f"Its VAE is an {type(vae).__name__}, of which none with f = {f} can be made.",
            f"Count it with f: [1, {downsampling(vae)}].",
        )
    changes: Changes = {}
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        own = tuple(vae.config[name])
        changes[name] = (own + own[-1:] * count)[:count]
    return changes
