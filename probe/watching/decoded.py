"""Record pictures: the finished ones, those on the way, and the linear map for quick previews."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.parts import count_not_finite, to_uint8
from probe.diffusion.sampling import Step
from probe.diffusion.schedule_check import unclipped_note
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Plan, Store


class Decoded(Capture):
    """Final pictures, and with decode_every those of `denoised` at some steps.

    *Shape:* each (image, y, x, rgb) uint8.
    """

    component, finishing = "", "Decoding the picture"

    def __init__(self, model: Family, plan: Plan):
        self._model, self._plan = model, plan
        self.not_finite: Counter[str] = Counter()
        self._whose = "The picture" if model.vae is None else "The VAE's picture"
        self.in_float32 = False

    def arrays(self) -> list[ArraySpec]:
        images, channels, y, x = self._plan.latent_shape
        pixels = (images, y * self._model.f, x * self._model.f, 3)
        variables = [
            spec("images", "final", pixels),
            spec("preview", "latent_to_rgb", (channels, 3)),
            spec("preview", "bias", (3,)),
        ]
        if steps := self._plan.decoded:
            note = unclipped_note(self._model.scheduler)
            variables.append(spec("decoded", "decoded_step", value=np.array(steps)))
            variables.append(spec("decoded", "picture", (len(steps), *pixels), **note))
        return variables

    def begin(self, store: Store) -> None:
        slope, bias = fit_preview(self._model)
        store.write("preview/latent_to_rgb", slope)
        store.write("preview/bias", bias)

    def passed(self, step: Step, store: Store) -> None:
        if step.index not in self._plan.decoded:
            return
        shown, again = self._model.pixels(step.denoised.to(self._model.dtype))
        if torch.isfinite(step.denoised).all():
            self._count("decoded/picture", f"{self._whose} at step {step.index}", shown)
        store.write(
            "decoded/picture", to_uint8(shown).numpy(), at=self._plan.decoded.index(step.index)
        )
        self.in_float32 |= again

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        shown, again = self._model.pixels(latents)
        self._count("images/final", self._whose, shown)
        store.write("images/final", to_uint8(shown).numpy())
        self.in_float32 |= again
        lines = []
        if spoilt := +self.not_finite:  # those above 0
            store.annotate(decoded_not_finite=dict(spoilt))
            made = "The picture holds" if self._model.vae is None else "The VAE made"
            lines.append(
                f"{made} {spoilt.total()} values that are not finite: they are 0 in the pictures."
            )
        if self.in_float32:
            store.annotate(decoded_in_float32=True)
            lines.append("The VAE overflowed in float16: decoded again in float32.")
        return lines

    def _count(self, path: str, what: str, pixels: torch.Tensor) -> None:
        self.not_finite[path] += count_not_finite(what, pixels, self._plan.recipe.on_nan)


def fit_preview(model: Family) -> tuple[np.ndarray, np.ndarray]:
    """Return the linear map from denoised latents to colour (0 to 1) that fits this VAE best.

    It is fitted by least squares on decoded smooth noise. Latent previews elsewhere use constants
    that were measured for one model. *Shape:* slope (channel, rgb), bias (rgb).
    """
    channels = int(model.unet.config.in_channels)
    if model.vae is None:
        slope = np.full((channels, 3), 0.5, np.float32) * np.eye(channels, 3, dtype=np.float32)
        return slope, np.full(3, 0.5, np.float32)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((3, channels, 4, 4), generator=generator)
    latents = 1.2 * torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    pixels, _ = model.decode(latents.to(model.device, model.dtype))
    colour = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255, model.f)
    x = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    wanted = colour.permute(0, 2, 3, 1).reshape(-1, 3).double()
    solution = torch.linalg.lstsq(design, wanted).solution.float().numpy()
    return solution[:-1], solution[-1]
