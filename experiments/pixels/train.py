"""Train one UNet in four spaces: pixels, and latents of f = 2, 4 and 8, at 64 pixels, on emoji.

    python -m experiments.pixels.train                 # everything; about 3 hours of one CPU core
    python -m experiments.pixels.train --only 1 4 --seeds 0 1 2
    python -m experiments.pixels.score                 # scores what is trained so far

Stages, each resumed where it was interrupted when the command is started again:

    scenes       20,000 scenes of one emoji each, drawn once
    autoencoder  one for each f above 1: L1 + MSE + L1 of the gradients + a little KL; on crops of
                 32 pixels, and on whole pictures for the last fifth
    latents      every scene encoded once, centred, scaled to a standard deviation of one
    rate         three learning rates, 80 steps each, in every space; the best one is taken
    denoiser     the UNet, on the prediction of v, with a constant rate and a moving average of its
                 weights, which is kept at every step that is scored

All denoisers read the text that emojiworld's own text encoder makes, which does not change. The
batch of step k is the same in every space: the same scenes, captions, and timesteps. A seed decides
the weights, batches and noises of a denoiser. The autoencoders are trained once, with seed 0.

Each stage notes the seconds that it took: of the processor on a CPU with one thread, so that other
programs hardly lengthen them; of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiments.emojiworld import world
from experiments.emojiworld.judge import small
from experiments.emojiworld.train import Trainer, autoencoder_loss, clock, generator
from experiments.pixels.spaces import (
    SIDE,
    SPACES,
    TEXT_WIDTH,
    TIMESTEPS,
    Space,
    build_autoencoder,
    build_unet,
    signal_levels,
)
from probe.diffusion.loading import load

FOLDER = Path("training/pixels")
BATCH = 16
CAPTION_DROPOUT = 0.1
AUTOENCODER_STEPS, CROP = 1500, 32
RATES, RATE_STEPS = (4e-4, 8e-4, 1.6e-3), 80
FIRST_SCENE, FIRST_CHECK, CHECKS = (
    50_000_000,
    55_000_000,
    256,
)  # no seed of emojiworld or its judges
CHECKED_TIMESTEPS = torch.arange(62, TIMESTEPS, 125)


# --- scenes ---------------------------------------------------------------------------------------


def drawn(seed: int) -> world.Scene:
    """Draw a scene of one subject in one setting or, one time in twelve, before a plain backdrop.

    No pair is drawn that is left out of emojiworld's training.
    """
    rng = np.random.default_rng([64, seed])
    while True:
        subject = str(rng.choice(list(world.SUBJECTS)))
        setting = None if rng.random() < 1 / 12 else str(rng.choice(list(world.SETTINGS)))
        if (subject, setting) not in world.HELD_OUT:
            return world.draw_scene(seed, (subject,), setting)


def pictures_of(scenes: list[world.Scene]) -> torch.Tensor:
    """Return scenes at half their size: (picture, rgb, 64, 64) uint8."""
    images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
    return small(images.permute(0, 3, 1, 2).float() / 127.5 - 1)


def training_set(folder: Path, count: int) -> tuple[torch.Tensor, list[str]]:
    """Return the training pictures, (picture, rgb, 64, 64) uint8, and their captions."""
    path = folder / "scenes.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if len(saved["captions"]) == count:
            return saved["pictures"], saved["captions"]
    pictures, captions = [], []
    for start in tqdm(range(0, count, 100), desc="scenes", unit="x 100", mininterval=5):
        scenes = [drawn(FIRST_SCENE + i) for i in range(start, min(start + 100, count))]
        pictures.append(pictures_of(scenes))
        captions += [scene.caption for scene in scenes]
    whole = {"pictures": torch.cat(pictures), "captions": captions}
    torch.save(whole, path)
    return whole["pictures"], captions


def as_pixels(pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Turn uint8 pictures into pixels in [-1, 1]."""
    return pictures.to(device).float() / 127.5 - 1


# --- autoencoders ---------------------------------------------------------------------------------


def train_autoencoder(
    options: argparse.Namespace, space: Space, pictures: torch.Tensor
) -> AutoencoderKL:
    """Return the autoencoder of a space, trained, centred and scaled."""
    torch.manual_seed(space.f)
    vae = build_autoencoder(space).to(options.device)
    done = options.folder / f"autoencoder-f{space.f}.safetensors"
    if done.exists():
        return ready(vae, done)
    trainer = Trainer(
        f"autoencoder-f{space.f}",
        torch.nn.ModuleDict({"vae": vae}),
        options.autoencoder_steps,
        1.5e-3,
        options.folder,
        0.998,
    )

    def loss_of(step: int) -> torch.Tensor:
        draw = generator(90 + space.f, step)
        which = torch.randint(len(pictures), (BATCH,), generator=draw)
        y, x = torch.randint(SIDE - CROP + 1, (2,), generator=draw).tolist()
        shown = pictures[which]
        if step < 0.8 * trainer.steps:
            shown = shown[:, :, y : y + CROP, x : x + CROP]
        side = shown.shape[-1] // space.f
        noise = torch.randn((BATCH, space.channels, side, side), generator=draw)
        return autoencoder_loss(vae, as_pixels(shown, options.device), noise.to(options.device))

    trainer.run(loss_of)
    trainer.averaged()
    note(options.folder, f"autoencoder-f{space.f}", seconds=trainer.seconds, steps=trainer.step)
    save(vae, done)
    return vae


@torch.no_grad()
def encode(
    options: argparse.Namespace, space: Space, vae: AutoencoderKL, pictures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of every picture's latents, each (picture, 4, y, x).

    The VAE's own latents have neither mean 0 nor spread 1. `centre` and `scale` are kept beside
    them, and the exported model has both folded into its VAE.
    """
    path = options.folder / f"latents-f{space.f}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if len(saved["mean"]) == len(pictures):
            return saved["mean"], saved["std"]
    started, means, stds = clock(options.device), [], []
    for start in tqdm(range(0, len(pictures), 100), desc=f"latents f = {space.f}", mininterval=5):
        with torch.autocast(torch.device(options.device).type, torch.bfloat16):
            posterior = vae.encode(
                as_pixels(pictures[start : start + 100], options.device)
            ).latent_dist
        means.append(posterior.mean.float().cpu())
        stds.append(posterior.std.float().cpu())
    mean, std = torch.cat(means), torch.cat(stds)
    centre = mean.mean(dim=(0, 2, 3))
    scale = 1 / (mean - centre[:, None, None]).std()
    mean, std = (mean - centre[:, None, None]) * scale, std * scale
    torch.save({"mean": mean, "std": std, "centre": centre, "scale": scale}, path)
    note(options.folder, f"latents-f{space.f}", seconds=clock(options.device) - started)
    return mean, std


# --- denoisers ------------------------------------------------------------------------------------


class Batches:
    """The batches of one space: what a denoiser is shown at each step."""

    def __init__(
        self,
        options: argparse.Namespace,
        space: Space,
        clean: tuple[torch.Tensor, torch.Tensor | None],
        captions: list[str],
    ):
        self.space, self.device, self.clean = space, options.device, clean
        known = sorted({*captions, ""})
        number = {caption: index for index, caption in enumerate(known)}
        self.captions = torch.tensor([number[caption] for caption in captions])
        self.empty = number[""]
        self.texts = embeddings(known).to(options.device)
        self.levels = signal_levels(space.side).float()

    def draw(self, seed: int, step: int) -> tuple[torch.Tensor, ...]:
        """Return clean samples, noise, timesteps and text of a step's batch.

        The scenes, captions and timesteps do not depend on the space.
        """
        draw = generator(seed, step)
        which = torch.randint(len(self.captions), (BATCH,), generator=draw)
        t = torch.randint(TIMESTEPS, (BATCH,), generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < CAPTION_DROPOUT
        text = self.texts[torch.where(dropped, self.empty, self.captions[which])]
        noise = torch.randn((BATCH, *self.space.shape), generator=draw)
        mean, std = self.clean
        if std is None:
            return as_pixels(mean[which], self.device), noise.to(self.device), t, text
        spread = torch.randn((BATCH, *self.space.shape), generator=draw)
        clean = mean[which] + std[which] * spread
        return clean.to(self.device), noise.to(self.device), t, text


def v_loss(
    unet: torch.nn.Module,
    levels: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
) -> torch.Tensor:
    """Return the mean squared error of the predicted v (Salimans & Ho 2022, appendix D)."""
    level = levels[t].to(clean.device)[:, None, None, None]
    signal, sigma = level.sqrt(), (1 - level).sqrt()
    noisy = signal * clean + sigma * noise
    with torch.autocast(clean.device.type, torch.bfloat16):
        said = unet(noisy, t.to(clean.device), encoder_hidden_states=text).sample
    return F.mse_loss(said.float(), signal * noise - sigma * clean)


def train_denoiser(
    options: argparse.Namespace,
    batches: Batches,
    seed: int,
    rate: float,
    steps: tuple[int, ...],
    name: str,
) -> torch.nn.ModuleDict:
    """Train a denoiser, and keep its averaged weights at every one of `steps`."""
    space = batches.space
    torch.manual_seed(seed)
    unet = build_unet(space).to(options.device)
    # Of attention's three ways, the plain one is the fastest to train on these small grids.
    unet.set_default_attn_processor()
    unet.to(memory_format=torch.channels_last)
    modules = torch.nn.ModuleDict({"unet": unet})
    trainer = Trainer(name, modules, steps[-1], rate, options.folder, 0.999, cycle=False)

    def loss_of(step: int) -> torch.Tensor:
        return v_loss(unet, batches.levels, *batches.draw(seed, step))

    for step in steps:
        kept = options.folder / f"{name}-{step}.safetensors"
        trainer.run(loss_of, until=step)
        if trainer.step == step and not kept.exists():
            half = {key: value.half().contiguous() for key, value in trainer.average.items()}
            save_file({key.removeprefix("unet."): value for key, value in half.items()}, kept)
            note(options.folder, f"{name}-{step}", seconds=trainer.seconds, rate=rate)
    return trainer.averaged()


def best_rate(options: argparse.Namespace, batches: Batches) -> float:
    """Return the learning rate whose denoiser errs least on fresh scenes after a few steps."""
    space = batches.space
    known = notes(options.folder).get(f"rate-f{space.f}")
    if known is not None:
        return float(known["rate"])
    errors = {}
    for rate in RATES:
        name = f"rate-f{space.f}-{rate:g}"
        modules = train_denoiser(options, batches, 1000, rate, (options.rate_steps,), name)
        errors[f"{rate:g}"] = checked_loss(modules["unet"], batches)
        for path in options.folder.glob(f"{name}*"):
            path.unlink()
    rate = min(RATES, key=lambda rate: errors[f"{rate:g}"])
    note(options.folder, f"rate-f{space.f}", rate=rate, errors=errors)
    return rate


@torch.no_grad()
def checked_loss(unet: torch.nn.Module, batches: Batches) -> float:
    """Return the loss over timesteps on batches that no denoiser is trained on."""
    losses = []
    for index, t in enumerate(CHECKED_TIMESTEPS):
        for part in range(2):
            clean, noise, _, text = batches.draw(777, 2 * index + part)
            losses.append(float(v_loss(unet, batches.levels, clean, noise, t.repeat(BATCH), text)))
    return sum(losses) / len(losses)


@torch.no_grad()
def embeddings(captions: list[str]) -> torch.Tensor:
    """Return what emojiworld's text encoder makes of captions. *Shape:* (caption, 77, 128)."""
    model = load("emojiworld", dtype="float32", device="cpu")
    return torch.cat(
        [model.condition(caption, guided=False).cond_embedding for caption in captions]
    )


# --- what it costs --------------------------------------------------------------------------------


def training_flops(make: Callable[[], torch.Tensor]) -> int:
    """Count the operations of one training step on the meta device: forwards and backwards."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make().backward()
    return int(counter.get_total_flops())


def denoiser_flops(space: Space) -> tuple[int, int]:
    """Return the FLOPs of one call of a denoiser for one picture, and of one training step."""

    def call(unet: torch.nn.Module, rows: int) -> torch.Tensor:
        x, text = torch.zeros(rows, *space.shape), torch.zeros(rows, 77, TEXT_WIDTH)
        return unet(x, torch.zeros(rows), encoder_hidden_states=text).sample

    with torch.device("meta"):
        unet = build_unet(space)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        call(unet, 1)
    return int(counter.get_total_flops()), training_flops(lambda: call(unet, BATCH).square().mean())


def autoencoder_flops(space: Space) -> dict[str, int]:
    """Return the FLOPs of encoding and decoding one picture, and of a training step.

    It is the mean training step: four of five see crops.
    """
    with torch.device("meta"):
        vae = build_autoencoder(space)
        picture, latents = torch.zeros(1, 3, 64, 64), torch.zeros(1, *space.shape)
        batch, crops = (torch.zeros(BATCH, 3, side, side) for side in (SIDE, CROP))
    parts: dict[str, Callable[[], Any]] = {
        "encode": partial(vae.encode, picture),
        "decode": partial(vae.decode, latents),
    }
    counts = {}
    for name, part in parts.items():
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            part()
        counts[name] = int(counter.get_total_flops())

    def trip(pictures: torch.Tensor) -> torch.Tensor:
        return vae.decode(vae.encode(pictures).latent_dist.mean).sample.square().mean()

    whole, part = (training_flops(partial(trip, pictures)) for pictures in (batch, crops))
    return {**counts, "training_step": round(0.8 * part + 0.2 * whole)}


# --- files ----------------------------------------------------------------------------------------


def save(module: torch.nn.Module, path: Path) -> None:
    save_file({key: value.cpu().contiguous() for key, value in module.state_dict().items()}, path)


def ready(module: Any, path: Path) -> Any:
    """Return a module with weights from a file, for use alone."""
    weights = {key: value.float() for key, value in load_file(path).items()}
    module.load_state_dict(weights)
    return module.eval().requires_grad_(False)


def notes(folder: Path) -> dict[str, Any]:
    """Return what the stages noted: seconds, steps and rates, by stage."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }


def note(folder: Path, stage: str, **values: Any) -> None:
    """Note what a stage came to. Each has a file of its own: several processes may train."""
    (folder / f"{stage}.json").write_text(json.dumps(values) + "\n", encoding="utf-8")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="checkpoints and notes")
    parser.add_argument("--only", type=int, nargs="+", choices=list(SPACES), help="these f alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the denoisers")
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--autoencoder-steps", type=int, default=AUTOENCODER_STEPS)
    parser.add_argument("--rate-steps", type=int, default=RATE_STEPS)
    parser.add_argument(
        "--most-steps", type=int, default=100_000, help="no denoiser is trained for more"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    pictures, captions = training_set(options.folder, options.scenes)
    for f in options.only or SPACES:
        space = SPACES[f]
        clean: tuple[torch.Tensor, torch.Tensor | None] = pictures, None
        if f > 1:
            clean = encode(options, space, train_autoencoder(options, space, pictures), pictures)
        batches = Batches(options, space, clean, captions)
        rate = best_rate(options, batches)
        last = min(options.most_steps, space.steps[-1])
        steps = (*(step for step in space.steps if step < last), last)
        for seed in options.seeds:
            train_denoiser(options, batches, seed, rate, steps, f"denoiser-f{f}-seed{seed}")


if __name__ == "__main__":
    main()
