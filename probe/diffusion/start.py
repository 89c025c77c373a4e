"""Where a run begins that begins from a picture: the VAE's posterior of it, a sample of that, and the noise to mix in.

Every draw is made on the CPU, by one generator an image, in diffusers' order: the sample of the VAE's posterior, then the
noise, then whatever the scheduler draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.sampling import Start, draw
from probe.errors import NotFinite
from probe.experiment import Experiment


def encode(model: Family, picture: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the VAE's posterior for one picture, (y, x, rgb) uint8. *Shape:* each (1, channel, y, x).

    Not yet scaled to latents. A model on pixels has no VAE: the picture itself, and no spread. Raises NotFinite.
    """
    # Not made contiguous: diffusers leaves the colours last in memory, and a convolution's last bits depend on that.
    pixels = 2.0 * torch.from_numpy(picture[None].astype(np.float32) / 255.0).permute(0, 3, 1, 2) - 1.0
    pixels = pixels.to(model.device, model.dtype)
    if model.vae is None:
        return pixels, torch.zeros_like(pixels)
    with torch.no_grad():
        posterior = model.vae.encode(pixels).latent_dist
    if not bool(torch.isfinite(posterior.mean).all()):
        remedy = "Try another picture, or another model." if model.dtype == torch.float32 else "Try --dtype float32."
        raise NotFinite("What the VAE made of the picture is not finite.", remedy)
    return posterior.mean, posterior.std


def memory_formats(attributes: Mapping[str, Any]) -> dict[str, str]:
    """How `clean` latents and each `prediction` of a run lay in memory; what its attributes do not say was contiguous."""
    return {"clean": "contiguous", "prediction": "contiguous", **attributes.get("memory_format", {})}


def sampled(
    model: Family, asked: Experiment, mean: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Generator]]:
    """Latents drawn from the VAE's posterior, one of each image, then their noise, and the generators after both."""
    shape = (asked.images, *mean.shape[1:])
    sample, eps, generators = _draws(asked, shape, model.dtype, encoded=model.vae is not None)
    return model.scaling_factor * (mean + deviation * sample.to(model.device)), eps.to(model.device), generators


def restart(asked: Experiment, clean: torch.Tensor, encoded: bool) -> Start:
    """Where a recorded run began: its latents as they are, its noise drawn anew; `encoded` is whether a VAE made the latents."""
    _, eps, generators = _draws(asked, tuple(clean.shape), clean.dtype, encoded)
    return Start(clean, eps.to(clean.device), asked.strength, generators)


def _draws(asked: Experiment, shape: tuple[int, ...], dtype: torch.dtype, encoded: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Generator]]:
    """The sample of the posterior (nothing, without a VAE), then the noise, and the generators after both."""
    generators = [torch.Generator().manual_seed(asked.seed + i) for i in range(asked.images)]
    sample = draw(generators, shape, dtype) if encoded else torch.zeros(shape, dtype=dtype)
    return sample, draw(generators, shape, dtype), generators
