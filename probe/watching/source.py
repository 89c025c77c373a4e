"""Captures: the picture that a run or a noising starts from, its latents, and their noise.

A noising's capture also says how well the model tells the noise from the picture.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from probe.conversions import target
from probe.diffusion.draws import seeded
from probe.diffusion.family import Family
from probe.diffusion.sampling import Start, Step, arranged, memory_format
from probe.diffusion.schedule_check import unclipped_note
from probe.diffusion.start import begun, memory_formats, restart
from probe.format.schema import ArraySpec, spec
from probe.watching.interface import Capture, Plan, Store, Values, as_numpy, dtype_note, numpy_dtype


class Source(Capture):
    """The picture that a run starts from, a sample of its latents, and the noise mixed into them.

    `start` is known after `begin`.
    """

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._model, self._plan = model, plan
        self.start: Start | None = None

    def arrays(self) -> list[ArraySpec]:
        return source_arrays(self._model, self._plan)

    def begin(self, store: Store) -> None:
        model, experiment = self._model, self._plan.experiment
        if store.committed:
            clean = torch.from_numpy(store.read("forward/clean")).to(model.device, model.dtype)
            clean = arranged(clean, memory_formats(store.attributes)["clean"])
            self.start = restart(experiment, clean, encoded=model.f > 1)
            return
        self.start = begun(model, experiment, store.read("source/picture"))
        store.write("forward/clean", as_numpy(self.start.clean))
        store.write("forward/noise", as_numpy(self.start.noise))
        note_memory_format("clean", self.start.clean, store)


class Noised(Capture):
    """A noising's picture, masks and noise, and at each timestep how good the prediction is.

    `clean` is the mean of the VAE's posterior, in latents, for each draw of `noise`. *Shape:* each
    (draw, channel, y, x).
    """

    component = ""

    def __init__(self, model: Family, plan: Plan):
        self._model, self._plan = model, plan
        self.clean = self.noise = torch.empty(0)

    def arrays(self) -> list[ArraySpec]:
        plan, latents = self._plan, (self._plan.calls, *self._plan.latent_shape)
        specs = [
            *source_arrays(self._model, plan),
            spec("source", "psnr", ()),
            spec("forward", "denoised", latents, **unclipped_note(self._model.scheduler)),
            spec("forward", "difference", latents),
            *(spec("forward", name, latents[:2]) for name in ("loss", "noise_loss")),
            *(spec("forward", name, latents[:1]) for name in ("loss_mean", "loss_spread")),
        ]
        if masks := plan.masks:
            specs.append(spec("source", "masked", value=list(masks)))
            specs.append(spec("source", "mask", value=np.stack(list(masks.values()))))
        return specs

    def begin(self, store: Store) -> None:
        assert self._plan.picture is not None
        self.clean, self.noise = noised(
            self._model, self._plan.picture, self._plan.rows.images, self._plan.recipe.seed
        )
        store.write("forward/clean", as_numpy(self.clean))
        store.write("forward/noise", as_numpy(self.noise))
        note_memory_format("clean", self.clean, store)

    def take(self, step: Step) -> Values:
        wide = replace(step, latents=step.latents.float(), prediction=step.prediction.float())
        clean, eps = self.clean.float(), self.noise.float()
        wanted = target(clean, eps, step.alpha_bar, step.prediction_type)
        difference = wide.eps - eps
        loss = (wide.prediction - wanted).square().mean(dim=(1, 2, 3))
        # Apple's GPUs have no float64.
        each = loss.to("cpu" if loss.device.type == "mps" else loss.device).double()
        spread = each.std() if len(each) > 1 else torch.full_like(each[0], torch.nan)
        return {
            "forward/denoised": wide.denoised,
            "forward/difference": difference,
            "forward/loss": loss,
            "forward/noise_loss": difference.square().mean(dim=(1, 2, 3)),
            "forward/loss_mean": each.mean(),
            "forward/loss_spread": spread,
        }

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        assert self._plan.picture is not None
        store.write("source/psnr", psnr(self._plan.picture, store.read("images/final")[0]))
        return []


def source_arrays(model: Family, plan: Plan) -> list[ArraySpec]:
    """Return the specs of the picture, its latents and their noise."""
    dtype, note = numpy_dtype(model.dtype), dtype_note(model.dtype)
    latents = [
        spec("forward", name, plan.latent_shape, dtype, **note) for name in ("clean", "noise")
    ]
    return [spec("source", "picture", value=plan.picture), *latents]


def noised(
    model: Family, picture: np.ndarray, noises: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a picture's mean latents, once for each draw of noise, and the draws.

    Draws are seeded `seed`, `seed + 1` and so on. *Shape:* picture (y, x, rgb) uint8; each result
    (draw, channel, y, x).
    """
    clean = model.encode_picture(picture).repeat(noises, 1, 1, 1)
    return clean, model.begin(seeded(seed, noises), *picture.shape[:2])


def note_memory_format(name: str, tensor: torch.Tensor, store: Store) -> None:
    """Record a tensor's layout in memory if it differs from that of what is read from a disk.

    A resumed run and a proof have to arrange it so again.
    """
    if (how := memory_format(tensor)) != "contiguous":
        store.annotate(memory_format={name: how})


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 pictures in dB, over all their values.

    It is infinite if they are the same.
    """
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
