"""Measure `emojiworld` on scenes it never saw, and draw what it makes of 64 prompts.

    python -m experiments.emojiworld.report                              # the bundled model
    python -m experiments.emojiworld.report --model training/emojiworld/model --sheet sheet.png

Prints the VAE's round trip (PSNR) and the UNet's error in predicting the noise at ten timesteps, each with its number
of scenes, for seen and for left-out subject x setting pairs. The first prompts of the sheet are the left-out pairs of
the development set, then come seen pairs and scenes of two subjects.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from experiments.emojiworld import world
from probe.loading import load
from probe.models import StableDiffusion
from probe.sampling import denoise, fresh

FIRST_FRESH_SEED = 10_000_000  # training uses seeds from 0 up


def fresh_scenes(count: int, held_out: bool) -> list[world.Scene]:
    """Scenes that training never drew: with seen pairs, or with the left-out pairs of the development set."""
    if not held_out:
        return [world.draw_scene(FIRST_FRESH_SEED + i) for i in range(count)]
    pairs = sorted(world.HELD_OUT_DEVELOPMENT)
    drawn = []
    for i in range(count):
        subject, setting = pairs[i % len(pairs)]
        drawn.append(world.draw_scene(FIRST_FRESH_SEED + i, (subject,), setting, allow_held_out=True))
    return drawn


def pixels_of(scenes: list[world.Scene]) -> torch.Tensor:
    """(scene, rgb, y, x) in [-1, 1]."""
    return torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def vae_psnr(model: StableDiffusion, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of a round trip through the VAE, in dB, averaged over scenes."""
    assert model.vae is not None
    back = model.vae.decode(model.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = ((back - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def noise_losses(model: StableDiffusion, scenes: list[world.Scene], timesteps: list[int]) -> list[float]:
    """Mean squared error of the predicted noise at each timestep (Ho et al. 2020, equation 14), one noise a scene."""
    assert model.vae is not None
    latents = model.vae.encode(pixels_of(scenes)).latent_dist.mean * model.scaling_factor
    text = torch.cat([model.encode(model.read(scene.caption)) for scene in scenes])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler = fresh(model.scheduler)
    losses = []
    for t in timesteps:
        at = torch.full((len(scenes),), t)
        predicted = model.unet(scheduler.add_noise(latents, noise, at), at, encoder_hidden_states=text).sample
        losses.append(float((predicted - noise).square().mean()))
    return losses


def prompts() -> list[str]:
    """64 prompts: the development set's left-out pairs, 40 seen pairs, 16 scenes of two subjects."""
    left_out = [("astronaut", "scuba diving"), *sorted(world.HELD_OUT_DEVELOPMENT - {("astronaut", "scuba diving")})]
    listed = [world.caption_of((subject,), setting, None) for subject, setting in left_out]
    rng = np.random.default_rng(1)
    subjects, settings = list(world.SUBJECTS), list(world.SETTINGS)
    while len(listed) < 48:
        pair = subjects[len(listed) % len(subjects)], settings[int(rng.integers(len(settings)))]
        if pair not in world.HELD_OUT:
            listed.append(world.caption_of(pair[:1], pair[1], None))
    while len(listed) < 64:
        two = tuple(subjects[int(i)] for i in rng.choice(len(subjects), 2, replace=False))
        setting = settings[int(rng.integers(len(settings)))]
        if not any((subject, setting) in world.HELD_OUT for subject in two):
            listed.append(world.caption_of(two, setting, world.RELATIONS[len(listed) % 2]))
    return listed


def sheet(model: StableDiffusion, listed: list[str], seed: int = 0, steps: int = 30, guidance_scale: float = 3.0) -> Image.Image:
    """One picture for each prompt, eight a row."""
    pictures = []
    for prompt in listed:
        for step in denoise(model, model.condition(prompt), steps=steps, guidance_scale=guidance_scale, seed=seed):
            final = step.next_latents
        pictures.append(model.decode(final)[0][0].numpy())
    size = world.SIZE
    page = Image.new("RGB", (8 * size, math.ceil(len(pictures) / 8) * size), "white")
    for index, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), (index % 8 * size, index // 8 * size))
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="emojiworld", help="a diffusers directory, or the bundled model")
    parser.add_argument("--scenes", type=int, default=96, help="fresh scenes a measurement")
    parser.add_argument("--sheet", type=Path, help="also draw 64 prompts into this picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sheet's pictures")
    options = parser.parse_args(argv)
    model = load(options.model, dtype="float32", device="cpu")
    timesteps = list(range(50, 1000, 100))
    print(f"{'scenes':12} {'n':>4} {'PSNR':>8}   noise loss at t = " + "  ".join(f"{t:5}" for t in timesteps))
    for label, held_out in (("seen", False), ("left out", True)):
        scenes = fresh_scenes(options.scenes, held_out)
        losses = noise_losses(model, scenes, timesteps)
        print(f"{label:12} {len(scenes):4} {vae_psnr(model, pixels_of(scenes)):5.1f} dB   {' ' * 18}" + "  ".join(f"{loss:.3f}" for loss in losses))
    if options.sheet:
        sheet(model, prompts(), options.seed).save(options.sheet)
        print(f"wrote {options.sheet}")


if __name__ == "__main__":
    main()
