"""Train two judges that say which subjects and which setting a generated picture shows.

    python -m experiments.emojiworld.judge     # trains both, about ten minutes each on one core
    python -m experiments.emojiworld.judge --help

`tuning` is there to choose training and sampling settings by. `report` only ever scores a finished
model, so that nothing was chosen to please it. The two differ in all that could make them agree for
the wrong reason: architecture (a residual network with batch normalisation; a ConvNeXt), scenes and
seed. Both see every subject x setting pair, also the left-out ones.

They are to judge what a picture shows and not how sharp it is. A third of what they learn from went
through the VAE (some with noise on its latent). All of it is blurred, shifted, recoloured and made
noisy at random. One picture in eight shows emoji that are no subject of the world ("strangers"), so
that a shape in the right colours is not yet a subject. An answer less sure than 99 of 100 true ones
on separate scenes is "unsure". Everything goes to `training/judges/` and resumes. The two that
score `experiments.pixels` lie in `judges/` beside this file, in half precision.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from experiments.emojiworld import world
from experiments.emojiworld.train import Trainer, generator
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion

FOLDER = Path("training/judges")
SHIPPED = Path(__file__).with_name("judges")
SUBJECTS, SETTINGS = list(world.SUBJECTS), [*world.SETTINGS, None]  # None: a plain backdrop
# The model's training uses seeds from 0, its report from 10,000,000.
FIRST_SEED = {"tuning": 20_000_000, "report": 30_000_000}
STEPS = {"tuning": 2000, "report": 3000}
APART = 1_000_000  # from a judge's training scenes to those its thresholds are chosen on
TEST_SEED = 40_000_000
SIDE = 64  # judges look at pictures of half the size
STRANGERS = {  # emoji that are no subject of the world: to learn from, and to test on
    "training": "\U0001f42e \U0001f437 \U0001f42f \U0001f430 \U0001f435 \U0001f414 \U0001f433 "
    "\U0001f41d \U0001f98b \U0001f383 "
    "\U0001f921 \U0001f47d \U0001f68c \U0001f6b2 \U0001f34e \U0001f354 \U0001f3ba \U0001f3c0 "
    "\U0001f3a9 \U0001f9f8",
    "test": "\U0001f42d \U0001f43b \U0001f986 \U0001f40c \U0001f988 \U0001f47e \U0001f69c "
    "\U0001f349 \U0001f941 \U0001f3c8 "
    "\U0001f43a \U0001f428 \U0001f985 \U0001f41e \U0001f42c \U0001f479 \U0001f681 \U0001f353 "
    "\U0001f3bb \U0001f3be",
}


# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """Pictures (picture, rgb, 64, 64) uint8 with the subjects and the setting that each shows.

    `subjects` (picture, 24) are 0 or 1. `settings` (picture,) are indices into `SETTINGS`.
    """

    pictures: torch.Tensor
    subjects: torch.Tensor
    settings: torch.Tensor


def stranger(seed: int, kind: str) -> tuple[np.ndarray, str]:
    """Return a scene with one or two emoji that are no subject, and its setting.

    *Shape:* (128, 128, 3) uint8.
    """
    rng = np.random.default_rng([7, seed])
    setting = str(rng.choice(list(world.SETTINGS)))
    canvas = world._Canvas(rng)
    world._PAINTERS[setting](canvas, 1)
    relation = str(rng.choice(world.RELATIONS)) if rng.random() < 0.35 else None
    low, high = (60, 88) if relation is None else (44, 58)
    emoji = rng.choice(STRANGERS[kind].split(), size=1 if relation is None else 2, replace=False)
    stamps = [world.glyph(str(one), int(rng.integers(low, high + 1))) for one in emoji]
    for stamp, (x, y) in zip(stamps, world._places(rng, stamps, relation), strict=True):
        canvas.paste(stamp, x, y, 1)
        if setting == "scuba diving":
            world._dive(canvas, (x, y, x + stamp.width, y + stamp.height), 1)
    return np.asarray(canvas.image), setting


@torch.no_grad()
def round_trip(
    model: StableDiffusion, pixels: torch.Tensor, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what the VAE makes of pictures, (picture, rgb, y, x) in [-1, 1].

    `noise` is added to its latents, which have spread one.
    """
    assert model.vae is not None
    with torch.autocast("cpu", torch.bfloat16):  # half the time, and enough for eight-bit pixels
        latents = model.vae.encode(pixels).latent_dist.mean
        if noise is not None:
            latents = latents + noise / model.scaling_factor
        return model.vae.decode(latents).sample.float().clamp(-1, 1)  # type: ignore[no-any-return]


def small(pixels: torch.Tensor) -> torch.Tensor:
    """Return pictures as the judges take them.

    *Shape:* (picture, rgb, 128, 128) in [-1, 1] -> (picture, rgb, 64, 64) uint8.
    """
    return (F.avg_pool2d(pixels, world.SIZE // SIDE) * 127.5 + 127.5).round().byte()


def draw(
    first: int,
    count: int,
    *,
    strangers: str | None = None,
    every: int = 1,
    trips: int = 0,
    model: StableDiffusion | None = None,
) -> Labelled:
    """Return `count` scenes of all pairs from seed `first` on.

    The first `trips` of them went through the VAE of `model`. Half of these carry noise on their
    latents, up to half of their spread, as an unfinished picture does. With `strangers`, one scene
    in `every` shows emoji of that kind in place of subjects.
    """
    subjects, settings = torch.zeros(count, len(SUBJECTS)), torch.zeros(count, dtype=torch.long)
    pictures = torch.empty((count, 3, SIDE, SIDE), dtype=torch.uint8)
    for start in tqdm(
        range(0, count, 50), desc="scenes for a judge", mininterval=5, disable=count < 1000
    ):
        images = []
        for i in range(start, min(start + 50, count)):
            if strangers is not None and i % every == 0:
                image, setting = stranger(first + i, strangers)
                settings[i] = SETTINGS.index(setting)
            else:
                scene = world.draw_scene(first + i, allow_held_out=True)
                image, settings[i] = scene.image, SETTINGS.index(scene.setting)
                subjects[i, [SUBJECTS.index(subject) for subject in scene.subjects]] = 1
            images.append(image)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if start < trips:
            assert model is not None
            random = generator(first, start)
            strength = (torch.rand(len(pixels), generator=random) - 0.5).clamp(min=0)[
                :, None, None, None
            ]
            noise = strength * torch.randn(
                (len(pixels), *model.latent_shape(1)[1:]), generator=random
            )
            pixels = round_trip(model, pixels, noise)
        pictures[start : start + len(pixels)] = small(pixels)
    return Labelled(pictures, subjects, settings)


def vary(pictures: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return each picture moved, scaled, recoloured, blurred and made noisy by its own chance.

    *Shape:* uint8 -> (picture, rgb, y, x).
    """
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand((n, *shape), generator=random)

    x = pictures.float() / 127.5 - 1
    frame = torch.zeros(n, 2, 3)
    frame[:, 0, 0] = frame[:, 1, 1] = uniform(0.85, 1.12)
    frame[:, :, 2] = uniform(-0.1, 0.1, 2)
    x = F.grid_sample(
        x,
        F.affine_grid(frame, [n, 3, SIDE, SIDE], align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    once = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    twice = F.avg_pool2d(once, 3, 1, 1, count_include_pad=False)
    blur = uniform(0, 1, 1, 1, 1)
    x = torch.where(blur < 0.3, twice, torch.where(blur < 0.55, once, x))
    grey = x.mean(dim=1, keepdim=True)
    x = x.lerp(grey, uniform(-0.5, 0.3, 1, 1, 1))  # colours stronger or weaker
    x = x * uniform(0.75, 1.3, 1, 1, 1) + uniform(-0.12, 0.12, 3, 1, 1)
    return (x + uniform(0, 0.12, 1, 1, 1) * torch.randn(x.shape, generator=random)).clamp(-1, 1)


# --- the networks ---------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions and a way around them (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.around = (
            nn.Identity() if stride == 1 else nn.Conv2d(inside, outside, 1, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.around(x))


class NextBlock(nn.Module):
    """A convolution inside each channel, then a small network at each pixel, as in ConvNeXt.

    Its convolution is 3x3 (Liu et al. 2022 have 7x7).
    """

    def __init__(self, width: int):
        super().__init__()
        self.across = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.widen, self.narrow = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(F.gelu(self.widen(self.norm(self.across(x)))))  # type: ignore[no-any-return]


def body_of(name: str) -> tuple[nn.Module, int]:
    """Return the layers of a judge up to an 8x8 grid of features, and how many features."""
    if name == "tuning":
        stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        return nn.Sequential(
            *stem,
            Residual(32, 32, 1),
            Residual(32, 64, 2),
            Residual(64, 64, 1),
            Residual(64, 128, 2),
            Residual(128, 128, 1),
        ), 128
    stem = [
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        *(NextBlock(64) for _ in range(3)),
    ]
    return nn.Sequential(
        *stem,
        nn.GroupNorm(1, 64),
        nn.Conv2d(64, 144, 2, 2),
        *(NextBlock(144) for _ in range(4)),
        nn.GroupNorm(1, 144),
    ), 144


@dataclass(frozen=True)
class Answer:
    """What a judge says of some pictures; less than its `sure_*` is "unsure".

    `subjects` (picture, 24): the probability that each is there. `settings` (picture, 9):
    probabilities, the last for none. `places` (picture, 24, xy): where each would be, in [0, 1]
    from the upper left corner.
    """

    subjects: torch.Tensor
    settings: torch.Tensor
    places: torch.Tensor
    sure_subject: float
    sure_setting: float

    def shows(self, subjects: list[tuple[str, ...]]) -> torch.Tensor:
        """Return whether just the asked subjects lead, and each is sure.

        *Shape:* (picture,) bool.
        """
        index = [[SUBJECTS.index(name) for name in names] for names in subjects]
        ranked = self.subjects.argsort(dim=1, descending=True)
        leading = [
            set(ranked[i, : len(asked)].tolist()) == set(asked) for i, asked in enumerate(index)
        ]
        sure = [
            bool((self.subjects[i, asked] >= self.sure_subject).all())
            for i, asked in enumerate(index)
        ]
        return torch.tensor(leading) & torch.tensor(sure)

    def set_in(self, settings: list[str | None]) -> torch.Tensor:
        """Return whether the asked setting leads, and is sure. *Shape:* (picture,) bool."""
        asked = torch.tensor([SETTINGS.index(name) for name in settings])
        best, leading = self.settings.max(dim=1)
        return (leading == asked) & (best >= self.sure_setting)

    def related(self, subjects: list[tuple[str, ...]], relations: list[str | None]) -> torch.Tensor:
        """Return whether the first of two subjects is above the second, or they are side by side.

        *Shape:* (picture,) bool.
        """
        fits = []
        for places, (first, second), relation in zip(self.places, subjects, relations, strict=True):
            dx, dy = (places[SUBJECTS.index(second)] - places[SUBJECTS.index(first)]).tolist()
            fits.append(dy > abs(dx) if relation == "above" else abs(dx) > abs(dy))
        return torch.tensor(fits)

    @property
    def unsure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether no subject is sure, and whether no setting is.

        *Shape:* each (picture,) bool.
        """
        subject, setting = self.subjects.amax(dim=1), self.settings.amax(dim=1)
        return subject < self.sure_subject, setting < self.sure_setting


class Judge(nn.Module):
    """A body, and a vote on subjects and setting at every cell of its 8x8 grid.

    The votes are averaged.
    """

    sure: torch.Tensor  # the thresholds for a subject and for a setting

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.body, width = body_of(name)
        self.vote = nn.Conv2d(width, len(SUBJECTS) + len(SETTINGS), 1)
        self.register_buffer("sure", torch.zeros(2))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # three times as fast to train

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return votes. *Shape:* (picture, rgb, 64, 64) in [-1, 1] -> (picture, 24 + 9, 8, 8)."""
        return self.vote(self.body(pictures.contiguous(memory_format=torch.channels_last))).float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def judge(self, pictures: torch.Tensor) -> Answer:
        """Return the answer for pictures (picture, rgb, 64, 64) uint8, see `small`."""
        votes = torch.cat([self(part.float() / 127.5 - 1) for part in pictures.split(128)])
        of_subjects, of_settings = votes.mean(dim=(2, 3)).split(
            [len(SUBJECTS), len(SETTINGS)], dim=1
        )
        # Zhou et al. 2016: with averaged votes, the votes of a class say where it is.
        weight = votes[:, : len(SUBJECTS)].relu().square() + 1e-6
        ticks = (torch.arange(votes.shape[-1]) + 0.5) / votes.shape[-1]
        x, y = (weight.sum(dim=over) @ ticks / weight.sum(dim=(2, 3)) for over in (2, 3))
        sure_subject, sure_setting = self.sure.tolist()
        return Answer(
            of_subjects.sigmoid(),
            of_settings.softmax(dim=1),
            torch.stack([x, y], dim=-1),
            sure_subject,
            sure_setting,
        )


# --- training and its test ------------------------------------------------------------------------


def train(name: str, model: StableDiffusion, scenes: int, steps: int, folder: Path) -> Judge:
    """Return a judge with its thresholds.

    It is trained, goes on from its last checkpoint, or is taken if it is finished.
    """
    if (folder / f"{name}-judge.pt").exists():
        return load_judge(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    first, batch, cache = FIRST_SEED[name], 64, folder / f"{name}-scenes.pt"
    trips = scenes // 5
    if cache.exists():
        data = Labelled(**torch.load(cache, weights_only=True))
    else:
        data = draw(first, scenes, strangers="training", every=8, trips=trips, model=model)
        torch.save(vars(data), cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    torch.manual_seed(first)
    judge = Judge(name)
    rate, modules = 3e-3 if name == "tuning" else 2e-3, nn.ModuleDict({"judge": judge})
    trainer = Trainer(name, modules, steps, rate, folder, 0.998)

    def loss_of(step: int) -> torch.Tensor:
        random = generator(first, step)
        which = torch.randint(len(data.pictures), (batch,), generator=random)
        which = torch.where(torch.rand(batch, generator=random) < 1 / 3, which % trips, which)
        with torch.autocast("cpu", torch.bfloat16):
            votes = judge(vary(data.pictures[which], random))
        of_subjects, of_settings = votes.mean(dim=(2, 3)).split(
            [len(SUBJECTS), len(SETTINGS)], dim=1
        )
        subjects = (
            F.binary_cross_entropy_with_logits(of_subjects, data.subjects[which], reduction="none")
            .sum(dim=1)
            .mean()
        )
        return subjects + F.cross_entropy(of_settings, data.settings[which])

    trainer.run(loss_of)
    trainer.averaged()
    judge.sure.copy_(torch.tensor(thresholds(judge, model)))
    torch.save(judge.state_dict(), folder / f"{name}-judge.pt")
    cache.unlink()
    return judge


def thresholds(judge: Judge, model: StableDiffusion) -> tuple[float, float]:
    """Return the confidence that 99% of the subjects, and 99% of the settings, reach.

    It is measured on 800 separate scenes, half of them round trips, and is at least a half.
    """
    data = draw(FIRST_SEED[judge.name] + APART, 800, trips=400, model=model)
    answer = judge.judge(data.pictures)
    subject = answer.subjects[data.subjects.bool()].quantile(0.01)
    setting = answer.settings.gather(1, data.settings[:, None]).quantile(0.01)
    return max(0.5, float(subject)), max(0.5, float(setting))


def load_judge(name: str, folder: Path = FOLDER) -> Judge:
    """Return a trained judge, ready for use: the one in `folder`, else the one that ships.

    Exit with the command that trains it if there is none.
    """
    path, shipped = folder / f"{name}-judge.pt", SHIPPED / f"{name}.safetensors"
    if not path.exists() and not shipped.exists():
        raise SystemExit(
            f"There is no judge at {path}.\nTrain it: python -m experiments.emojiworld.judge "
            f"--only {name}"
        )
    judge = Judge(name)
    judge.load_state_dict(
        torch.load(path, weights_only=True) if path.exists() else load_file(shipped)
    )
    judge.requires_grad_(False)
    return judge.eval()


def own_accuracy(judge: Judge, model: StableDiffusion, count: int) -> list[dict[str, Any]]:
    """Return rows of a table: how often the judge is right.

    It is shown fresh scenes, their round trips through the VAE, and strangers.
    """
    rows = []
    scenes = [world.draw_scene(TEST_SEED + i, allow_held_out=True) for i in range(count)]
    pixels = (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    one, two = ([i for i, scene in enumerate(scenes) if len(scene.subjects) == n] for n in (1, 2))
    tripped = torch.cat([round_trip(model, part) for part in pixels.split(32)])
    for label, shown in (("scenes", pixels), ("VAE round trips", tripped)):
        answer = judge.judge(small(shown))
        right = answer.shows([scene.subjects for scene in scenes])
        setting = answer.set_in([scene.setting for scene in scenes])
        both = [i for i in two if right[i]]
        placed = Answer(
            answer.subjects[both],
            answer.settings[both],
            answer.places[both],
            answer.sure_subject,
            answer.sure_setting,
        )
        related = placed.related(
            [scenes[i].subjects for i in both], [scenes[i].relation for i in both]
        )
        no_subject, no_setting = answer.unsure
        row = {
            "judge": judge.name,
            "shown": label,
            "n": count,
            "subject": right[one],
            "setting": setting,
            "both": right[two],
        }
        rows.append(
            {**row, "relation": related, "unsure of subject": no_subject, "of setting": no_setting}
        )
    strangers = judge.judge(
        draw(TEST_SEED + count, count, strangers="test", trips=count // 2, model=model).pictures
    )
    rows.append(
        {
            "judge": judge.name,
            "shown": "strangers, half round trips",
            "n": count,
            "unsure of subject": strangers.unsure[0],
        }
    )
    return rows


def table(rows: list[dict[str, Any]], markdown: bool = False) -> str:
    """Return rows as aligned columns or as Markdown. Bool tensors become percentages.

    No row has a key that the first lacks.
    """

    def text(value: Any) -> str:
        return (
            f"{100 * value.float().mean():.1f}%" if isinstance(value, torch.Tensor) else str(value)
        )

    names = list(rows[0])
    cells = [names, *([text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=list(FIRST_SEED), help="one judge; by default both")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="checkpoints, and the judges at the end"
    )
    parser.add_argument(
        "--model",
        default="emojiworld",
        help="whose VAE the round trips go through: a diffusers directory, or the bundled model",
    )
    parser.add_argument(
        "--scenes", type=int, default=12_000, help="scenes that each judge learns from"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=argparse.SUPPRESS,
        help=f"training steps of 64 scenes (default: {STEPS})",
    )
    parser.add_argument(
        "--test-scenes", type=int, default=600, help="fresh scenes that the judges are tested on"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of their accuracy as Markdown"
    )
    options = parser.parse_args(argv)
    model = load(options.model, dtype="float32", device="cpu")
    rows = []
    for name in [options.only] if options.only else list(FIRST_SEED):
        judge = train(
            name, model, options.scenes, getattr(options, "steps", STEPS[name]), options.folder
        )
        print(
            f"{name}: sure from {judge.sure[0]:.3f} for a subject, {judge.sure[1]:.3f} for a "
            "setting",
            flush=True,
        )
        rows += own_accuracy(judge, model, options.test_scenes)
    print(table(rows, options.markdown))


if __name__ == "__main__":
    main()
