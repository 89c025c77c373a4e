"""What follows from a model's parts alone: device, sizes, skeleton, pictures.

A family takes these functions as its methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch

from probe.diffusion.draws import draw
from probe.diffusion.family import AttentionLayer, Family
from probe.diffusion.schedule import Schedule, fresh, set_steps
from probe.errors import ExperimentError, NotFinite

Model = TypeVar("Model", bound=Family)


def device(model: Family) -> torch.device:
    """Return the device of the denoiser."""
    return cast(torch.device, next(model.unet.parameters()).device)


def dtype(model: Family) -> torch.dtype:
    """Return the number format of the denoiser."""
    return cast(torch.dtype, next(model.unet.parameters()).dtype)


def downsampling(vae: Any | None) -> int:
    """Return f, the pixels per latent along one side; 1 without a VAE."""
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def latent_shape(
    model: Family, images: int, height: int | None = None, width: int | None = None
) -> tuple[int, int, int, int]:
    """Return (image, channel, y, x) of the latents for a picture of `height` x `width` pixels.

    Raise ExperimentError for a side that is not a multiple of f.
    """
    size = model.unet.config.sample_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    sides = []
    for name, pixels, default in (("height", height, own[0]), ("width", width, own[1])):
        if pixels is not None and (pixels % model.f or pixels < 1):
            below = max(pixels // model.f, 1) * model.f
            raise ExperimentError(
                f"{name}: {pixels} is not a multiple of f = {model.f}, the pixels that one latent "
                f"of {model.name} stands for.",
                f"Use {name}: {below} or {below + model.f}.",
            )
        sides.append(default if pixels is None else pixels // model.f)
    return (images, int(model.unet.config.in_channels), sides[0], sides[1])


def begin(
    model: Family,
    generators: Sequence[torch.Generator],
    height: int | None = None,
    width: int | None = None,
) -> torch.Tensor:
    """Return the noise that a run begins from, (image, channel, y, x), of variance one."""
    shape = model.latent_shape(len(generators), height, width)
    return draw(generators, shape, model.dtype).to(model.device)


def schedule(
    model: Family,
    steps: int,
    height: int | None = None,  # noqa: ARG001
    width: int | None = None,  # noqa: ARG001
    begin: int = 0,
) -> Schedule:
    """Return the noise level of every call from `begin` on: the scheduler's, whatever the size."""
    return Schedule.of(model.scheduler, steps, begin)


def scheduled(
    model: Family,
    steps: int,
    height: int | None = None,  # noqa: ARG001
    width: int | None = None,  # noqa: ARG001
) -> Any:
    """Return a fresh scheduler whose timesteps are set on the model's device."""
    scheduler = fresh(model.scheduler)
    set_steps(scheduler, steps, model.device)
    return scheduler


def posterior(model: Family, picture: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the VAE's posterior for a picture, not yet scaled.

    *Shape:* picture (y, x, rgb) uint8; each result (1, channel, y, x). A model on pixels has no
    VAE: the picture itself, and no spread. Raise NotFinite.
    """
    # Not made contiguous: diffusers leaves the colours last in memory, and a convolution's last
    # bits depend on that.
    pixels = (
        2.0 * torch.from_numpy(picture[None].astype(np.float32) / 255.0).permute(0, 3, 1, 2) - 1.0
    )
    pixels = pixels.to(model.device, model.dtype)
    if model.vae is None:
        return pixels, torch.zeros_like(pixels)
    with torch.no_grad():
        encoded = model.vae.encode(pixels).latent_dist
    if not bool(torch.isfinite(encoded.mean).all()):
        again = "Try another picture, or another model."
        remedy = again if model.dtype == torch.float32 else "Try --dtype float32."
        raise NotFinite("What the VAE made of the picture is not finite.", remedy)
    return encoded.mean, encoded.std


def encode_picture(
    model: Family, picture: np.ndarray, generators: Sequence[torch.Generator] = ()
) -> torch.Tensor:
    """Encode a picture, (y, x, rgb) uint8, to latents of the model's scale, (image, channel, y, x).

    Return a sample of the VAE's posterior for each generator; without any, the posterior's mean.
    A model without a VAE draws nothing. Raise NotFinite.
    """
    mean, deviation = posterior(model, picture)
    if not generators:
        return model.scaling_factor * mean
    shape = (len(generators), *mean.shape[1:])
    sample = (
        torch.zeros(shape, dtype=model.dtype)
        if model.vae is None
        else draw(generators, shape, model.dtype)
    )
    return model.scaling_factor * (mean + deviation * sample.to(model.device))


def skeleton(model: Model) -> Model:
    """Return the same model on the meta device: shapes without weights or work."""
    with torch.device("meta"):
        modules = {name: _again(module) for name, module in model.components().items()}
    to, dtype = torch.nn.Module.to, model.dtype
    bare = {name: to(module.eval(), dtype) for name, module in modules.items()}
    return cast(Model, replace(cast(Any, model), **bare))


def _again(module: Any) -> Any:
    """Make a module of the same class and config, without its weights."""
    if not hasattr(type(module), "load_config"):  # of transformers: its config is an object
        return type(module)(module.config)
    # A config of diffusers may hold entries for other classes.
    known = inspect.signature(type(module).__init__).parameters
    return type(module)(**{key: value for key, value in module.config.items() if key in known})


def attention_layers(model: Family) -> dict[str, AttentionLayer]:
    """Return the attention layers of a UNet by dotted path."""
    layers: dict[str, AttentionLayer] = {}
    for path, module in model.unet.named_modules():
        crossing = getattr(module, "is_cross_attention", None)
        if crossing is not None:
            layers[path] = AttentionLayer("cross" if crossing else "self", module)
    return layers


def decoded(
    vae: Any,
    latents: torch.Tensor,
    unscaled: Callable[[torch.Tensor], torch.Tensor],
    upcast: bool = False,
) -> tuple[torch.Tensor, bool]:
    """Decode latents to (image, rgb, y, x), about -1 to 1.

    Return beside them whether the VAE had to run again in float32.

    The VAE overflows in float16 on some latents: these are decoded once more, never shown black.
    With `upcast`, a float16 VAE runs in float32 in the first place.
    """
    half = vae.dtype == torch.float16
    with torch.no_grad():
        if not (half and upcast):
            pixels = vae.decode(unscaled(latents), return_dict=False)[0]
            if not half or bool(torch.isfinite(pixels).all()):
                return pixels, False
        vae.float()
        try:
            return vae.decode(unscaled(latents.float()), return_dict=False)[0], not upcast
        finally:
            vae.to(torch.float16)


def decode(model: Family, latents: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Decode latents to (image, y, x, rgb) uint8 on the CPU.

    Return beside them whether the VAE ran again in float32.

    A value that is not finite becomes 0: `pixels` shows it.
    """
    pixels, again = model.pixels(latents)
    return to_uint8(pixels), again


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Turn pixels in [-1, 1], (image, rgb, y, x), into (image, y, x, rgb) uint8.

    They are rounded as diffusers does.
    """
    scaled = (pixels * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu()
    return (scaled * 255).round().nan_to_num(0).to(torch.uint8)


def count_not_finite(what: str, values: torch.Tensor, on_nan: str) -> int:
    """Count the values of a part's output that are NaN or infinite.

    Raise NotFinite where a run stops at them.
    """
    count = int((~torch.isfinite(values)).sum())
    if count and on_nan == "stop":
        raise NotFinite(
            f"{what} holds {count} values of {values.numel()} that are not finite: the model's "
            "weights are not, or its number format is too small.",
            "Fetch the model again, or try --dtype float32; on_nan: record goes on, and such a "
            "pixel is 0.",
        )
    return count
