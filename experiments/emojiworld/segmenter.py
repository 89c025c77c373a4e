"""Train a small network that says which pixels of a picture show which subject.

    python -m experiments.emojiworld.segmenter    # trains it, tests it on scenes it never saw
    python -m experiments.emojiworld.segmenter --help

A generated picture has no mask, so its maps are scored against what this network sees in it. It
learns from fresh scenes of all pairs. A third of them went through the VAE, half of those with
noise on their latents. All are blurred, recoloured and made noisy at random, so that it knows its
subjects also in pictures that are not sharp. Its own score, on scenes and on their round trips, is
measured and belongs beside every score made with it. It looks at 64 x 64 pixels. Checkpoints and
weights go to `training/segmenter/`, resume, and ship nowhere.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import nn
from tqdm import tqdm

from experiments.emojiworld import world
from experiments.emojiworld.judge import SIDE, SUBJECTS, round_trip, small, table
from experiments.emojiworld.train import Trainer, generator
from probe.analysis.masks import interval, iou
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion

FOLDER = Path("training/segmenter")
# The model's training uses seeds 0 to 39,999; reports and judges use others.
FIRST_SEED, TEST_SEED = 60_000_000, 61_000_000
SCENES, STEPS, BATCH, RATE = 4500, 900, 32, 4e-3
LEAST = 0.005  # share of a picture: a subject with less is not there


@dataclass(frozen=True)
class Segmented:
    """Pictures (picture, rgb, 64, 64) uint8, and for each pixel the subject that it shows.

    A subject is its index in `SUBJECTS` + 1; 0 is none.
    """

    pictures: torch.Tensor
    classes: torch.Tensor


def classes_of(scene: world.Scene) -> torch.Tensor:
    """Return for each pixel the subject that covers at least half of it. *Shape:* (64, 64) uint8.

    It is the subject's index + 1, or 0.
    """
    classes = torch.zeros((SIDE, SIDE), dtype=torch.uint8)
    for subject in scene.subjects:
        mask = torch.from_numpy(scene.masks[subject])[None].float()
        share = F.avg_pool2d(mask, world.SIZE // SIDE)[0]
        classes[share >= 0.5] = SUBJECTS.index(subject) + 1
    return classes


def draw(
    first: int,
    count: int,
    *,
    trips: int = 0,
    noisy: bool = False,
    model: StableDiffusion | None = None,
) -> Segmented:
    """Return `count` scenes of all pairs, from seed `first` on.

    The first `trips` went through the VAE. With `noisy`, half of those have noise on their latents.
    """
    parts = []
    for start in tqdm(
        range(0, count, 50),
        desc="scenes for the segmenter",
        unit="x 50",
        mininterval=5,
        disable=count < 1000,
    ):
        scenes = [
            world.draw_scene(first + i, allow_held_out=True)
            for i in range(start, min(start + 50, count))
        ]
        pixels = (
            torch.from_numpy(np.stack([scene.image for scene in scenes]))
            .permute(0, 3, 1, 2)
            .float()
            / 127.5
            - 1
        )
        if start < trips:
            assert model is not None
            random = generator(first, start)
            strength = (torch.rand(len(pixels), generator=random) - 0.5).clamp(min=0)[
                :, None, None, None
            ]
            noise = strength * torch.randn(
                (len(pixels), *model.latent_shape(1)[1:]), generator=random
            )
            pixels = round_trip(model, pixels, noise if noisy else None)
        parts.append((small(pixels), torch.stack([classes_of(scene) for scene in scenes])))
    pictures, classes = (torch.cat(part) for part in zip(*parts, strict=True))
    return Segmented(pictures, classes)


def varied(pictures: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return each picture recoloured, blurred and made noisy by its own chance, and nothing moved.

    *Shape:* uint8 -> (picture, rgb, y, x).
    """

    def uniform(low: float, high: float, channels: int = 1) -> torch.Tensor:
        return low + (high - low) * torch.rand((len(pictures), channels, 1, 1), generator=random)

    x = pictures.float() / 127.5 - 1
    x = torch.where(uniform(0, 1) < 0.4, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x)
    x = x.lerp(x.mean(dim=1, keepdim=True), uniform(-0.5, 0.3))  # colours stronger or weaker
    x = x * uniform(0.75, 1.3) + uniform(-0.12, 0.12, 3)
    return (x + uniform(0, 0.1) * torch.randn(x.shape, generator=random)).clamp(-1, 1)


def _block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
    )


class Segmenter(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of 0.4M parameters on grids of 64, 32, 16 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                _block(3, 16),
                nn.Sequential(_block(16, 32, 2), _block(32, 32)),
                nn.Sequential(_block(32, 64, 2), _block(64, 64)),
            ]
        )
        self.middle = nn.Sequential(_block(64, 96, 2), _block(96, 96), _block(96, 96))
        self.up = nn.ModuleList([_block(96 + 64, 64), _block(64 + 32, 48), _block(48 + 16, 24)])
        self.vote = nn.Conv2d(24, len(SUBJECTS) + 1, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return votes. *Shape:* (picture, rgb, 64, 64) in [-1, 1] -> (picture, 1 + 24, 64, 64)."""
        x, kept = pictures.contiguous(memory_format=torch.channels_last), []
        for down in self.down:
            x = down(x)
            kept.append(x)
        x = self.middle(x)
        for up, beside in zip(self.up, reversed(kept), strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2.0), beside], dim=1))
        return self.vote(x)  # type: ignore[no-any-return]

    @torch.no_grad()
    def classes(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return for each pixel the subject that it shows, as index + 1, or 0.

        *Shape:* (picture, rgb, 64, 64) uint8 -> (picture, 64, 64).
        """
        return torch.cat(
            [self(part.float() / 127.5 - 1).argmax(dim=1) for part in pictures.split(64)]
        )

    def masks(self, picture: np.ndarray, subjects: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the mask of each subject that a picture shows at all.

        *Shape:* (128, 128, rgb) uint8 -> (64, 64) bool.
        """
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        classes = self.classes(small(pixels))[0].numpy()
        masks = {subject: classes == SUBJECTS.index(subject) + 1 for subject in subjects}
        return {subject: mask for subject, mask in masks.items() if mask.mean() >= LEAST}


def train(
    model: StableDiffusion, scenes: int = SCENES, steps: int = STEPS, folder: Path = FOLDER
) -> Segmenter:
    """Return a segmenter ready for use.

    It is trained, goes on from its last checkpoint, or is taken if it is finished.
    """
    segmenter, path = Segmenter(), folder / "segmenter-done.pt"
    if path.exists():
        segmenter.load_state_dict(torch.load(path, weights_only=True))
        return segmenter.eval().requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    trips = scenes // 3
    data = draw(FIRST_SEED, scenes, trips=trips, noisy=True, model=model)
    torch.manual_seed(FIRST_SEED)
    modules = nn.ModuleDict({"segmenter": segmenter})
    trainer = Trainer("segmenter", modules, steps, RATE, folder, 0.995)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(FIRST_SEED, step)
        which = torch.randint(scenes, (BATCH,), generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            votes = segmenter(varied(data.pictures[which], random))
        return F.cross_entropy(votes.float(), data.classes[which].long())

    trainer.run(loss_of)
    trainer.averaged()
    torch.save(segmenter.state_dict(), path)
    return segmenter


def own_scores(
    segmenter: Segmenter, model: StableDiffusion, count: int
) -> dict[tuple[str, int], xr.Dataset]:
    """Return its own mIoU on scenes that it never saw, and on their round trips.

    It is the mean and its interval, by (what was shown, number of subjects).
    """
    scenes = [world.draw_scene(TEST_SEED + i, allow_held_out=True) for i in range(count)]
    intervals = {}
    for label, trips in (("scenes", 0), ("VAE round trips", count)):
        data = draw(TEST_SEED, count, trips=trips, model=model)
        seen = segmenter.classes(data.pictures)
        for subjects in (1, 2):
            scores = []
            for scene, mine, true in zip(scenes, seen, data.classes, strict=True):
                if len(scene.subjects) == subjects:
                    numbers = [SUBJECTS.index(subject) + 1 for subject in scene.subjects]
                    masks, truth = (
                        xr.DataArray(
                            np.stack([one.numpy() == n for n in numbers]), dims=("word", "y", "x")
                        )
                        for one in (mine, true)
                    )
                    scores.append(float(iou(masks, truth).mean()))
            intervals[label, subjects] = interval(xr.DataArray(scores, dims="scene"))
    return intervals


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="its checkpoint, and its weights at the end"
    )
    parser.add_argument(
        "--model",
        default="emojiworld",
        help="whose VAE the round trips go through: a diffusers directory, or the bundled model",
    )
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes that it learns from")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"training steps of {BATCH} scenes"
    )
    parser.add_argument(
        "--test-scenes", type=int, default=300, help="fresh scenes that it is tested on"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(argv)
    model = load(options.model, dtype="float32", device="cpu")
    segmenter = train(model, options.scenes, options.steps, options.folder)
    rows = [
        {
            "shown": label,
            "subjects": n,
            "n": int(one.scenes),
            "mIoU": f"{one.mean():.3f} ({one.low:.3f} to {one.high:.3f})",
        }
        for (label, n), one in own_scores(segmenter, model, options.test_scenes).items()
    ]
    print(table(rows, options.markdown))


if __name__ == "__main__":
    main()
