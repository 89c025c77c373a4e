"""Measure `emojiworld` on scenes it never saw, score what it draws, and show it.

    # the bundled model, by the judge that is kept for reports
    python -m experiments.emojiworld.report
    # a model in training, by the other judge
    python -m experiments.emojiworld.report --model training/emojiworld/model --judge tuning \\
        --guidance 3 --pairs 24 --seeds 4
    # only the pictures
    python -m experiments.emojiworld.report --judge none \\
        --sheet experiments/emojiworld/sheet.webp --nearest experiments/emojiworld/nearest.png

It prints the VAE's round trip (PSNR) and the UNet's error in predicting the noise at ten timesteps,
for seen and for left-out subject x setting pairs. Then it prints how often a judge recognises in a
generated picture what its prompt asked for (`experiments.emojiworld.judge` trains judges). A
picture is recognised if just the asked subjects lead among all 24, and each is sure. Intervals are
95%, from resampling whole prompts, since pictures of one prompt fail together.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from experiments.emojiworld import world
from experiments.emojiworld.judge import FOLDER, Answer, load_judge, small, table
from probe.diffusion.loading import load
from probe.diffusion.sampling import denoise
from probe.diffusion.schedule import fresh
from probe.diffusion.sd import StableDiffusion
from probe.settings.experiment import Experiment
from probe.settings.fields import SCHEDULERS

FIRST_FRESH_SEED = 10_000_000  # training uses seeds from 0 up
TIMESTEPS = list(range(50, 1000, 100))


# --- the VAE and the noise prediction -------------------------------------------------------------


def fresh_scenes(count: int, held_out: bool) -> list[world.Scene]:
    """Return scenes that training never drew, with seen pairs or with left-out pairs.

    Left-out pairs are those of the development set.
    """
    if not held_out:
        return [world.draw_scene(FIRST_FRESH_SEED + i) for i in range(count)]
    pairs = sorted(world.HELD_OUT_DEVELOPMENT)
    drawn = []
    for i in range(count):
        subject, setting = pairs[i % len(pairs)]
        drawn.append(
            world.draw_scene(FIRST_FRESH_SEED + i, (subject,), setting, allow_held_out=True)
        )
    return drawn


def pixels_of(scenes: list[world.Scene]) -> torch.Tensor:
    """Return scenes as pixels (scene, rgb, y, x) in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


@torch.no_grad()
def vae_psnr(model: StableDiffusion, pixels: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of a round trip through the VAE, in dB, over scenes."""
    assert model.vae is not None
    back = model.vae.decode(model.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    error = ((back - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def noise_losses(
    model: StableDiffusion, scenes: list[world.Scene], timesteps: list[int]
) -> list[float]:
    """Return the mean squared error of the predicted noise at each timestep, one noise a scene.

    See Ho et al. 2020, equation 14.
    """
    assert model.vae is not None
    latents = model.vae.encode(pixels_of(scenes)).latent_dist.mean * model.scaling_factor
    text = torch.cat([model.encode(model.read(scene.caption)) for scene in scenes])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler = fresh(model.scheduler)
    losses = []
    for t in timesteps:
        at = torch.full((len(scenes),), t)
        predicted = model.unet(
            scheduler.add_noise(latents, noise, at), at, encoder_hidden_states=text
        ).sample
        losses.append(float((predicted - noise).square().mean()))
    return losses


# --- what it draws --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What one prompt asks for. Groups: seen, left out (development or sealed), two subjects."""

    group: str
    subjects: tuple[str, ...]
    setting: str
    relation: str | None = None

    @property
    def prompt(self) -> str:
        return world.caption_of(self.subjects, self.setting, self.relation)


DEFAULT = Asked("default prompt, seeds 0 to 9", ("astronaut",), "scuba diving")


def asked_for(pairs: int, sealed: bool) -> list[Asked]:
    """Return `pairs` seen pairs, as many scenes of two subjects, and the left-out pairs.

    Seen pairs have every subject equally often. No scene of two subjects holds a left-out pair.
    Sealed pairs are returned only with `sealed`.
    """
    rng = np.random.default_rng(1)
    settings = list(world.SETTINGS)
    seen: list[Asked] = []
    while len(seen) < pairs:
        for subject in rng.permutation(list(world.SUBJECTS)).tolist():
            free = [
                s
                for s in settings
                if (subject, s) not in world.HELD_OUT
                and Asked("seen pairs", (subject,), s) not in seen
            ]
            if free and len(seen) < pairs:
                seen.append(Asked("seen pairs", (subject,), str(rng.choice(free))))
    two: list[Asked] = []
    while len(two) < pairs:
        subjects = tuple(str(name) for name in rng.choice(list(world.SUBJECTS), 2, replace=False))
        setting = str(rng.choice(settings))
        if not any((subject, setting) in world.HELD_OUT for subject in subjects):
            two.append(Asked("two subjects", subjects, setting, world.RELATIONS[len(two) % 2]))
    left_out = [
        Asked("left out, development", (subject,), setting)
        for subject, setting in sorted(world.HELD_OUT_DEVELOPMENT)
    ]
    if sealed:
        left_out += [
            Asked("left out, sealed", (subject,), setting)
            for subject, setting in sorted(world.HELD_OUT_SEALED)
        ]
    return [*seen, *left_out, *two]


def draw(
    model: StableDiffusion,
    prompt: str,
    images: int,
    *,
    steps: int,
    guidance: float,
    rescale: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Return pictures of one prompt from seeds `seed` up: (picture, y, x, rgb) uint8."""
    conditioning = model.condition(prompt)
    *_, last = denoise(
        model,
        conditioning,
        steps=steps,
        guidance_scale=guidance,
        guidance_rescale=rescale,
        seed=seed,
        images=images,
    )
    return model.decode(last.next_latents)[0]


def interval(right: torch.Tensor) -> tuple[float, float, float]:
    """Return the mean of true or false values, and its 95% interval. *Shape:* (prompt, picture).

    NaN stands for what was not asked. The interval is from 10,000 resamplings of prompts. If all
    prompts agree, resampling says nothing: then it is the exact binomial one for that many prompts.
    Of a single prompt, the pictures are resampled.
    """
    if len(right) == 1:
        right = right.T
    right = right[~right.isnan().all(dim=1)]
    n = len(right)
    if n == 0:
        return math.nan, math.nan, math.nan
    known, hits = (~right.isnan()).sum(dim=1).float(), right.nansum(dim=1)
    mean = float(hits.sum() / known.sum())
    if mean in (0.0, 1.0):
        bound = 0.025 ** (1 / n)
        return mean, mean * bound, 1 - (1 - mean) * bound
    again = torch.randint(n, (10_000, n), generator=torch.Generator().manual_seed(0))
    means = hits[again].sum(dim=1) / known[again].sum(dim=1)
    return mean, float(means.quantile(0.025)), float(means.quantile(0.975))


def score(asked: list[Asked], answer: Answer, images: int) -> dict[str, torch.Tensor]:
    """Return what is right in the pictures of prompts, each (prompt, picture) of 0, 1 or NaN.

    `answer` lists pictures prompt by prompt.
    """
    each = [one for one in asked for _ in range(images)]
    subject = answer.shows([one.subjects for one in each])
    setting = answer.set_in([one.setting for one in each])
    scores = {
        "subject": subject,
        "setting": setting,
        "all asked": subject & setting,
        "unsure of subject": answer.unsure[0],
    }
    if asked[0].relation is not None:
        related = answer.related(
            [one.subjects for one in each], [one.relation for one in each]
        ).float()
        scores["relation"] = related.where(subject, torch.nan)
    return {name: value.float().reshape(len(asked), images) for name, value in scores.items()}


def recognition(
    model: StableDiffusion, judges: list[str], folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return rows of a table: how often each judge recognises what each group asked for."""
    listed = [(one, options.seeds) for one in asked_for(options.pairs, options.sealed)] + [
        (DEFAULT, 10)
    ]
    loaded = [load_judge(name, folder) for name in judges]
    drawn: dict[str, list[torch.Tensor]] = {}
    with tqdm(
        total=sum(images for _, images in listed), desc="pictures", unit="picture", mininterval=5
    ) as bar:
        for one, images in listed:
            pictures = draw(
                model,
                one.prompt,
                images,
                steps=options.steps,
                guidance=options.guidance,
                rescale=options.guidance_rescale,
            )
            drawn.setdefault(one.group, []).append(
                small(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
            )
            bar.update(images)
    rows = []
    for judge in loaded:
        for group, of_prompts in drawn.items():
            asked = [one for one, _ in listed if one.group == group]
            images = len(of_prompts[0])
            scores = score(asked, judge.judge(torch.cat(of_prompts)), images)
            row = {
                "judge": judge.name,
                "asked": group,
                "prompts": len(asked),
                "pictures": len(asked) * images,
            }
            for name in ("subject", "setting", "all asked", "relation", "unsure of subject"):
                mean, low, high = interval(scores[name]) if name in scores else (math.nan,) * 3
                row[name] = (
                    ""
                    if math.isnan(mean)
                    else f"{100 * mean:.0f}% ({100 * low:.0f} to {100 * high:.0f})"
                )
            rows.append(row)
    return rows


# --- pictures to look at --------------------------------------------------------------------------


def prompts() -> list[str]:
    """Return 64 prompts: left-out pairs of the development set, seen pairs, two subjects.

    They are 8, 40 and 16.
    """
    left_out = [
        ("astronaut", "scuba diving"),
        *sorted(world.HELD_OUT_DEVELOPMENT - {("astronaut", "scuba diving")}),
    ]
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


def sheet(
    model: StableDiffusion,
    listed: list[str],
    *,
    steps: int,
    guidance: float,
    rescale: float = 0.0,
    seed: int = 0,
) -> Image.Image:
    """Return a page with a picture for each prompt, its prompt below, eight a row."""
    size, line = world.SIZE, 11
    page = Image.new("RGB", (8 * size, math.ceil(len(listed) / 8) * (size + 2 * line + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=9)
    for index, prompt in enumerate(tqdm(listed, desc="sheet", unit="picture", mininterval=5)):
        x, y = index % 8 * size, index // 8 * (size + 2 * line + 4)
        picture = draw(
            model, prompt, 1, steps=steps, guidance=guidance, rescale=rescale, seed=seed
        )[0]
        page.paste(Image.fromarray(picture.numpy()), (x, y))
        for row, words in enumerate(textwrap.wrap(prompt, 27)):
            pen.text((x + 2, y + size + row * line), words, fill="black", font=font)
    return page


def nearest(model: StableDiffusion, count: int) -> tuple[Image.Image, str]:
    """Return the default picture beside the training scene nearest to it, and a sentence.

    The sentence tells their distance: the root mean square over pixels of half size, on a scale of
    0 to 255. It compares that with 50 true scenes of the same pair, which was left out: how far
    they are from the training scenes nearest to them.
    """
    asked = Experiment()
    picture = draw(
        model, asked.prompt, 1, steps=asked.steps, guidance=asked.guidance_scale, seed=asked.seed
    )
    true = [
        world.draw_scene(
            FIRST_FRESH_SEED + i, DEFAULT.subjects, DEFAULT.setting, allow_held_out=True
        )
        for i in range(50)
    ]
    wanted = torch.cat([picture.permute(0, 3, 1, 2).float() / 127.5 - 1, pixels_of(true)])
    queries = small(wanted).flatten(1).float()
    least, which = (
        torch.full((len(queries),), math.inf),
        torch.zeros(len(queries), dtype=torch.long),
    )
    for start in tqdm(range(0, count, 250), desc="training scenes", unit="x 250", mininterval=5):
        scenes = small(
            pixels_of([world.draw_scene(seed) for seed in range(start, min(start + 250, count))])
        )
        found, at = (
            torch.cdist(queries, scenes.flatten(1).float()) / math.sqrt(queries.shape[1])
        ).min(dim=1)
        which = torch.where(found < least, start + at, which)
        least = torch.minimum(found, least)
    scene = world.draw_scene(int(which[0]))
    pair = Image.new("RGB", (2 * world.SIZE + 4, world.SIZE), "white")
    pair.paste(Image.fromarray(picture[0].numpy()), (0, 0))
    pair.paste(Image.fromarray(scene.image), (world.SIZE + 4, 0))
    others = least[1:]
    return pair, (
        f"nearest of {count} training scenes: number {int(which[0])}, {scene.caption!r}, at "
        f"distance {least[0]:.1f}; true scenes of the pair: {others.median():.1f} (median of 50), "
        f"at least {others.min():.1f}"
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", default="emojiworld", help="a diffusers directory, or the bundled model"
    )
    parser.add_argument("--scenes", type=int, default=96, help="fresh scenes a measurement")
    parser.add_argument(
        "--judge",
        choices=["report", "tuning", "both", "none"],
        default="report",
        help="who scores the pictures; report: finished models only",
    )
    parser.add_argument("--judges", type=Path, default=FOLDER, help="where the trained judges are")
    parser.add_argument(
        "--guidance",
        type=float,
        default=5.0,
        help="guidance scale of all pictures, except the default one",
    )
    parser.add_argument("--guidance-rescale", type=float, default=0.0)
    parser.add_argument("--scheduler", choices=["default", *SCHEDULERS], default="default")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--pairs", type=int, default=48, help="seen pairs to ask for, and scenes of two subjects"
    )
    parser.add_argument("--seeds", type=int, default=8, help="pictures a prompt, from seeds 0 up")
    parser.add_argument(
        "--sealed",
        action="store_true",
        help="score the sealed left-out pairs too: once, for the final report of a finished model",
    )
    parser.add_argument("--sheet", type=Path, help="also draw 64 prompts into this picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sheet's pictures")
    parser.add_argument(
        "--nearest",
        type=Path,
        help="also save the default picture beside the training scene nearest to it",
    )
    parser.add_argument(
        "--training-scenes", type=int, default=40_000, help="scenes that the model was trained on"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    model = load(options.model, dtype="float32", device="cpu").with_scheduler(options.scheduler, {})
    rows: list[dict[str, Any]] = []
    if options.scenes:
        for label, held_out in (("seen", False), ("left out", True)):
            scenes = fresh_scenes(options.scenes, held_out)
            losses = noise_losses(model, scenes, TIMESTEPS)
            psnr = f"{vae_psnr(model, pixels_of(scenes)):.1f} dB"
            by_t = {f"t = {t}": f"{loss:.3f}" for t, loss in zip(TIMESTEPS, losses, strict=True)}
            rows.append({"scenes": label, "n": len(scenes), "PSNR": psnr, **by_t})
        print(table(rows, options.markdown) + "\n", flush=True)
    if options.judge != "none":
        names = ["tuning", "report"] if options.judge == "both" else [options.judge]
        rows = recognition(model, names, options.judges, options)
        print(
            f"{options.steps} steps of {type(model.scheduler).__name__}, guidance "
            f"{options.guidance:g}, rescaled by {options.guidance_rescale:g}\n"
        )
        print(table(rows, options.markdown) + "\n", flush=True)
    if options.sheet:
        sampling = {
            "steps": options.steps,
            "guidance": options.guidance,
            "rescale": options.guidance_rescale,
        }
        sheet(model, prompts(), **sampling, seed=options.seed).save(options.sheet)
        print(f"wrote {options.sheet}", flush=True)
    if options.nearest:
        pair, distances = nearest(model, options.training_scenes)
        pair.save(options.nearest)
        print(f"wrote {options.nearest}: {distances}")


if __name__ == "__main__":
    main()
