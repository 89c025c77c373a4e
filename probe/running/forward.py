"""The forward process: a picture's latents with noise mixed in, from which a run may begin, or which the model is asked about.

    start = begin(model, experiment, writer)             # image to image: where `denoise` begins
    loop = Noised.of(model, picture, noises=4, seed=0)   # noising: the same latents and noise, at any timesteps
    for step in loop.steps(conditioning, schedule):
        loop.measures(step)                              # difference from the true noise, loss, ...

Every draw is made on the CPU, by one generator an image, in diffusers' order: the sample of the VAE's posterior, then the
noise, then whatever the scheduler draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from probe.conversions import target
from probe.diffusion.models import Conditioning, StableDiffusion
from probe.diffusion.sampling import Schedule, Start, Step, arranged, draw, fresh, memory_format, noise
from probe.diffusion.schedule_check import recorded_schedule, unclipped_note
from probe.errors import NotFinite
from probe.experiment import Experiment
from probe.reading.listing import root_attributes
from probe.reading.recording import Run
from probe.running.planning import Plan, plan
from probe.schema import array
from probe.store import RunWriter
from probe.words import RULES


def encode(model: StableDiffusion, picture: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
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


def begin(model: StableDiffusion, asked: Experiment, writer: RunWriter) -> Start | None:
    """Where a run begins that has an `image`, and None for one that has not; latents and noise are written down.

    When a run is resumed, its latents are those that were recorded.
    """
    if asked.image is None:
        return None
    if writer.committed:
        clean = torch.from_numpy(writer.read("forward/clean")).to(model.device, model.dtype)
        clean = arranged(clean, memory_formats(root_attributes(writer.path))["clean"])
        return restart(asked, clean, encoded=model.vae is not None)
    mean, deviation = encode(model, writer.read("source/picture"))
    clean, eps, generators = sampled(model, asked, mean, deviation)
    start = Start(clean, eps, asked.strength, generators)
    writer.write("forward/clean", _numpy(start.clean))
    writer.write("forward/noise", _numpy(start.noise))
    return start


def note_memory_formats(clean: torch.Tensor | None, prediction: torch.Tensor, writer: RunWriter) -> None:
    """Write down what does not lie in memory as it will come from the disk: a resumed run and a proof have to arrange it."""
    tensors = {"prediction": prediction} if clean is None else {"prediction": prediction, "clean": clean}
    found = {name: how for name, tensor in tensors.items() if (how := memory_format(tensor)) != "contiguous"}
    if found != root_attributes(writer.path).get("memory_format", {}):
        writer.annotate(memory_format=found)


def memory_formats(attributes: Mapping[str, Any]) -> dict[str, str]:
    """How `clean` latents and each `prediction` of a run lay in memory; what its attributes do not say was contiguous."""
    return {"clean": "contiguous", "prediction": "contiguous", **attributes.get("memory_format", {})}


def sampled(
    model: StableDiffusion, asked: Experiment, mean: torch.Tensor, deviation: torch.Tensor
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


def plan_forward(
    model: StableDiffusion,
    asked: Experiment,
    picture: np.ndarray,
    timesteps: tuple[int, ...],
    masks: Mapping[str, np.ndarray],
    rules: int = RULES,
) -> Plan:
    """What a noising records: as a run of `asked` whose steps are the timesteps, and what is measured. Raises as `plan` does."""
    settled = plan(model, asked, picture, Schedule.at(model.scheduler, timesteps), rules)
    calls, shape = settled.calls, settled.latent_shape
    arrays = [
        array("source", "psnr", ()),
        array("forward", "denoised", (calls, *shape), **unclipped_note(model.scheduler)),
        array("forward", "difference", (calls, *shape)),
        *(array("forward", name, (calls, shape[0])) for name in ("loss", "noise_loss")),
        *(array("forward", name, (calls,)) for name in ("loss_mean", "loss_spread")),
    ]
    if masks:
        arrays += [array("source", "masked", value=list(masks)), array("source", "mask", value=np.stack(list(masks.values())))]
    return replace(settled, arrays=(*settled.arrays, *arrays))


def replan(model: StableDiffusion, run: Run) -> Plan:
    """The plan by which a recording was made, of whatever kind, with the picture and the masks that it holds."""
    picture = None if run.source is None else run.source.values
    rules = int(run.attributes.get("text_rules", 1))
    if picture is None or "noising" not in run.attributes:
        return plan(model, run.experiment, picture, recorded_schedule(model, run.experiment), rules)
    return plan_forward(model, run.experiment, picture, tuple(run.attributes["noising"]["timesteps"]), recorded_masks(run), rules)


def recorded_masks(run: Run) -> dict[str, np.ndarray]:
    """The masks that a noising holds, (y, x) uint8 by word."""
    if run.source is None or "mask" not in run.tree["source"].dataset:
        return {}
    return {str(mask["masked"].item()): mask.values for mask in run.variable("source/mask")}


@dataclass(frozen=True)
class Noised:
    """A loop like `denoise`, in which nothing is denoised: at each timestep the model predicts the same picture with known noise.

    `clean` is the mean of the VAE's posterior, in latents, for each draw of `noise`. *Shape:* each (image, channel, y, x).
    """

    model: StableDiffusion
    clean: torch.Tensor
    noise: torch.Tensor

    @classmethod
    def of(cls, model: StableDiffusion, picture: np.ndarray, noises: int, seed: int) -> Noised:
        """A picture, (y, x, rgb) uint8, with `noises` draws of noise, seeded `seed`, `seed + 1`, ..."""
        mean, _ = encode(model, picture)
        clean = (model.scaling_factor * mean).repeat(noises, 1, 1, 1)
        return cls(model, clean, noise(seed, tuple(clean.shape), model.dtype)[0].to(model.device))

    def steps(self, conditioning: Conditioning, schedule: Schedule) -> Iterator[Step]:
        """Yield one `Step` a timestep of `schedule`, each on its own; its `next_latents` are the clean ones."""
        scheduler, images = fresh(self.model.scheduler), len(self.clean)
        predict = self.model.predictor(conditioning, images)
        for index, timestep in enumerate(schedule.timesteps):
            t = torch.tensor(int(timestep), device=self.model.device)
            with torch.no_grad():
                x = scheduler.add_noise(self.clean, self.noise, t.repeat(images))
                said = predict(index, x, t)
            yield Step.of(schedule, index, x, said, self.clean, self.model.prediction_type)

    def stored(self) -> dict[str, np.ndarray]:
        """Latents and noise by the schema's paths, as they are stored."""
        return {"forward/clean": _numpy(self.clean), "forward/noise": _numpy(self.noise)}

    def measures(self, step: Step) -> dict[str, torch.Tensor]:
        """What the prediction of a step is worth, in float32, by the schema's paths: denoised, difference, losses; their mean in float64."""
        exact = replace(step, latents=step.latents.float(), prediction=step.prediction.float())
        clean, eps = self.clean.float(), self.noise.float()
        wanted = target(clean, eps, step.alpha_bar, step.prediction_type)
        difference = exact.eps - eps
        loss = (exact.prediction - wanted).square().mean(dim=(1, 2, 3))
        each = loss.to("cpu" if loss.device.type == "mps" else loss.device).double()  # Apple's GPUs have no float64
        return {
            "forward/denoised": exact.denoised,
            "forward/difference": difference,
            "forward/loss": loss,
            "forward/noise_loss": difference.square().mean(dim=(1, 2, 3)),
            "forward/loss_mean": each.mean(),
            "forward/loss_spread": each.std() if len(each) > 1 else torch.full_like(each[0], torch.nan),
        }


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB, over all their values; infinite when they are the same."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
