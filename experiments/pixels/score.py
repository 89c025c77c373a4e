"""Score what `experiments.pixels.train` has trained so far, and write it for docs and dashboard.

    python -m experiments.pixels.score                # writes probe/pixels/trained.json
    python -m experiments.pixels.score --folder training/pixels --out trained.json

Of each kept checkpoint 192 pictures are drawn, each of one emoji in one setting, taken at random;
prompts, seeds and the number of calls are the same in every space. Two networks look at them
(`experiments.emojiworld.judge`, trained on other scenes, of different architecture): `report` says
whether it recognises what was asked for, `tuning` gives the features in which the pictures are held
against 1,920 fresh scenes: KID (Binkowski et al. 2018) and the Frechet distance (Heusel et al.
2017). What the autoencoder alone loses is scored in the same way: fresh scenes after a round trip.

What was scored is kept beside the checkpoint; a second call scores only what is new. The
photographs of the round trips are scikit-image's: pip install scikit-image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from experiments.emojiworld import world
from experiments.emojiworld.judge import FOLDER as JUDGES
from experiments.emojiworld.judge import Judge, load_judge
from experiments.emojiworld.report import interval
from experiments.pixels.spaces import SPACES, Space, build_autoencoder, build_scheduler, build_unet
from experiments.pixels.train import (
    BATCH,
    FOLDER,
    RATES,
    as_pixels,
    autoencoder_flops,
    denoiser_flops,
    embeddings,
    notes,
    pictures_of,
    ready,
)
from probe.analysis.pictures import psnr, ssim

OUT = Path("probe/pixels/trained.json")
CALLS, GUIDANCE = 20, 3.0
FIRST_FRESH, FIRST_TRIP, FRESH, MOST = 60_000_000, 65_000_000, 1920, 768
COUNTS = (48, 96, 192, 384, MOST)
PICTURES = 192  # of each checkpoint
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # of scikit-image; they come with it


# --- pictures -------------------------------------------------------------------------------------


def pairs_at_random(seed: int, count: int) -> list[tuple[str, str]]:
    """Return pairs of a subject and a setting, all equally likely, also those left out."""
    rng = np.random.default_rng([6, seed])
    subjects, settings = list(world.SUBJECTS), list(world.SETTINGS)
    return [(str(rng.choice(subjects)), str(rng.choice(settings))) for _ in range(count)]


ASKED = pairs_at_random(0, MOST)


def fresh_scenes(first: int, count: int) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Return fresh scenes, (picture, rgb, 64, 64) uint8, and the pair that each shows."""
    pairs = pairs_at_random(first, count)
    scenes = [
        world.draw_scene(first + i, (subject,), setting, allow_held_out=True)
        for i, (subject, setting) in enumerate(pairs)
    ]
    return pictures_of(scenes), pairs


class Painter:
    """Turns latents of one space into pictures; on pixels there is nothing to decode."""

    def __init__(self, folder: Path, space: Space, device: str):
        self.vae, self.device = None, device
        if space.f > 1:
            vae = build_autoencoder(space)
            self.vae = ready(vae, folder / f"autoencoder-f{space.f}.safetensors").to(device)
            saved = torch.load(folder / f"latents-f{space.f}.pt", weights_only=True)
            self.centre, self.scale = saved["centre"].to(device), saved["scale"].to(device)

    @torch.no_grad()
    def paint(self, latents: torch.Tensor) -> torch.Tensor:
        """Return pictures (picture, rgb, 64, 64) uint8."""
        if self.vae is not None:
            latents = self.vae.decode(latents / self.scale + self.centre[:, None, None]).sample
        return (latents.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu()

    @torch.no_grad()
    def round_trip(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return pictures as the autoencoder gives them back. *Shape:* as they came, uint8."""
        if self.vae is None:
            return pictures
        parts = []
        for part in pictures.split(64):
            mean = self.vae.encode(as_pixels(part, self.device)).latent_dist.mean
            decoded = self.vae.decode(mean).sample.clamp(-1, 1)
            parts.append((decoded * 127.5 + 127.5).round().byte().cpu())
        return torch.cat(parts)


@torch.no_grad()
def draw(
    unet: torch.nn.Module, space: Space, text: torch.Tensor, empty: torch.Tensor, first: int
) -> torch.Tensor:
    """Return the latents of one picture for each row of `text`, from seeds `first` on.

    DDIM (Song et al. 2021) with `CALLS` steps, two calls each for guidance. The UNet multiplies in
    bfloat16, as in training.
    """
    scheduler = build_scheduler(space.side)
    scheduler.set_timesteps(CALLS)
    seeds = [torch.Generator().manual_seed(first + i) for i in range(len(text))]
    latents = torch.stack([torch.randn(space.shape, generator=seed) for seed in seeds])
    latents, both = latents.to(text.device), torch.cat([empty.expand_as(text), text])
    for t in scheduler.timesteps:
        with torch.autocast(text.device.type, torch.bfloat16):
            said = unet(torch.cat([latents] * 2), t, encoder_hidden_states=both).sample
        without, given = said.float().chunk(2)
        guided = without + GUIDANCE * (given - without)
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


# --- scores ---------------------------------------------------------------------------------------


@torch.no_grad()
def features(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """Return what a network sees in pictures, averaged over places. *Shape:* (picture, 128)."""
    parts = []
    for part in pictures.split(128):
        pixels = part.float() / 127.5 - 1
        parts.append(judge.body(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    return torch.cat(parts).double()


def kid(drawn: torch.Tensor, true: torch.Tensor) -> tuple[float, float, float]:
    """Return the KID of pictures, and its 95% interval from resampling the drawn ones.

    It is the unbiased MMD^2 with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, equation 4).
    """

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(drawn), len(true)
    own, cross, theirs = kernel(drawn, drawn), kernel(drawn, true).mean(dim=1), kernel(true, true)
    of_true = (theirs.sum() - theirs.trace()) / (m * (m - 1))
    value = (own.sum() - own.trace()) / (n * (n - 1)) + of_true - 2 * cross.mean()
    random, values = torch.Generator().manual_seed(0), []
    diagonal = own.diagonal()
    for _ in range(400):
        times = torch.bincount(torch.randint(n, (n,), generator=random), minlength=n).double()
        # A picture that was taken twice is no pair with itself.
        pairs = times @ own @ times - times.square() @ diagonal
        count = n * n - float(times.square().sum())
        values.append(pairs / count + of_true - 2 * (times @ cross) / n)
    spread = torch.stack(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(value), float(spread[0]), float(spread[1])


def frechet(drawn: torch.Tensor, true: torch.Tensor) -> float:
    """Return the Frechet distance of two sets of features (Heusel et al. 2017, equation 6)."""
    a, b = torch.cov(drawn.T), torch.cov(true.T)
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((drawn.mean(0) - true.mean(0)).square().sum() + a.trace() + b.trace() - 2 * roots)


class Scorer:
    """The two networks, and the true scenes that pictures are held against."""

    def __init__(self, judges: Path):
        self.recogniser, self.eye = load_judge("report", judges), load_judge("tuning", judges)
        self.true = features(self.eye, fresh_scenes(FIRST_FRESH, FRESH)[0])

    def score(self, pictures: torch.Tensor, pairs: list[tuple[str, str]]) -> dict[str, Any]:
        """Return the scores of pictures of which these pairs were asked."""
        answer = self.recogniser.judge(pictures)
        subject = answer.shows([(subject,) for subject, _ in pairs])
        setting = answer.set_in([setting for _, setting in pairs])
        seen = torch.tensor([pair not in world.HELD_OUT for pair in pairs])
        right = {"subject": subject, "setting": setting, "both": subject & setting}
        scores: dict[str, Any] = {"pictures": len(pictures)}
        for name, hits in right.items():
            scores[name] = rounded(interval(hits[seen].float()[:, None]))
            scores[f"{name}_left_out"] = rounded(interval(hits[~seen].float()[:, None]))
        scores["kid"] = rounded(kid(features(self.eye, pictures), self.true))
        return scores

    def by_count(self, pictures: torch.Tensor) -> dict[str, list[float]]:
        """Return FD and KID of the first n pictures, by n."""
        seen = features(self.eye, pictures)
        found: dict[str, list[float]] = {"count": [], "fd": [], "kid": []}
        for count in COUNTS:
            if count <= len(seen):
                found["count"].append(count)
                found["fd"].append(float(f"{frechet(seen[:count], self.true):.4g}"))
                found["kid"].append(float(f"{kid(seen[:count], self.true)[0]:.4g}"))
        return found


def rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


# --- what is scored -------------------------------------------------------------------------------


def score_checkpoints(options: argparse.Namespace, scorer: Scorer) -> list[dict[str, Any]]:
    """Return a record for every denoiser, with a point for each of its kept checkpoints."""
    prompts = [world.caption_of((subject,), setting, None) for subject, setting in ASKED]
    texts, empty = embeddings(prompts).to(options.device), embeddings([""]).to(options.device)
    noted, runs = notes(options.folder), []
    for f, space in SPACES.items():
        of_call, of_step = denoiser_flops(space)
        for seed in range(100):
            points = []
            steps = kept_steps(options.folder, f, seed)
            for step in steps:
                name = f"denoiser-f{f}-seed{seed}-{step}"
                more = options.most if step == space.steps[-1] and seed == 0 else PICTURES
                scores = scored(options, scorer, space, name, texts, empty, more)
                training = {"step": step, "seconds": round(noted[name]["seconds"], 1)}
                points.append({**training, "flops": step * of_step, **scores})
            if points:
                runs.append(
                    {
                        "f": f,
                        "seed": seed,
                        "grid": space.side,
                        "channels": space.channels,
                        "attention_grids": space.attention_grids,
                        "parameters": sum(p.numel() for p in build_unet(space).parameters()),
                        "call_flops": of_call,
                        "training_step_flops": of_step,
                        "batch": BATCH,
                        "learning_rate": noted[f"rate-f{f}"]["rate"],
                        "points": points,
                    }
                )
    return runs


def kept_steps(folder: Path, f: int, seed: int) -> list[int]:
    """Return the training steps of which a denoiser's weights were kept, in order."""
    kept = folder.glob(f"denoiser-f{f}-seed{seed}-*.safetensors")
    return sorted(int(path.stem.rsplit("-", 1)[1]) for path in kept)


def scored(
    options: argparse.Namespace,
    scorer: Scorer,
    space: Space,
    name: str,
    texts: torch.Tensor,
    empty: torch.Tensor,
    count: int,
) -> dict[str, Any]:
    """Return the scores of a checkpoint, and draw its pictures if that was not done before."""
    path = options.folder / f"score-{name}.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if "by_count" in known or count <= PICTURES:
            return known  # type: ignore[no-any-return]
    unet = ready(build_unet(space), options.folder / f"{name}.safetensors").to(options.device)
    unet.to(memory_format=torch.channels_last)
    painter = Painter(options.folder, space, options.device)
    drawn, started = [], time.process_time()
    for start in tqdm(range(0, count, 48), desc=name, unit="x 48 pictures"):
        part = texts[start : min(start + 48, count)]
        drawn.append(painter.paint(draw(unet, space, part, empty, start)))
    seconds = (time.process_time() - started) / count
    pictures = torch.cat(drawn)
    torch.save(pictures[:PICTURES], options.folder / f"pictures-{name}.pt")
    scores = scorer.score(pictures[:PICTURES], ASKED[:PICTURES])
    scores["sampling_seconds"] = float(f"{seconds:.3g}")
    if count > PICTURES:
        scores["by_count"] = scorer.by_count(pictures)
    path.write_text(json.dumps(scores) + "\n", encoding="utf-8")
    return scores


def score_autoencoders(options: argparse.Namespace, scorer: Scorer) -> list[dict[str, Any]]:
    """Return what each autoencoder costs and loses; f = 1 stands for the scenes themselves."""
    noted, found = notes(options.folder), []
    (scenes, pairs), photographs = fresh_scenes(FIRST_TRIP, MOST), photograph_crops()
    for f, space in SPACES.items():
        if f > 1 and not (options.folder / f"latents-f{f}.pt").exists():
            continue
        painter = Painter(options.folder, space, options.device)
        back = painter.round_trip(scenes)
        scores = scorer.score(back[:PICTURES], pairs[:PICTURES])
        record: dict[str, Any] = {"f": f, **scores, "by_count": scorer.by_count(back)}
        if painter.vae is not None:
            trip = painter.round_trip(photographs)
            training, encoding = noted[f"autoencoder-f{f}"], noted[f"latents-f{f}"]
            counts = autoencoder_flops(space)
            record |= {
                "parameters": sum(p.numel() for p in painter.vae.parameters()),
                "steps": training["steps"],
                "seconds": round(training["seconds"] + encoding["seconds"], 1),
                "flops": training["steps"] * counts["training_step"]
                + options.scenes * counts["encode"],
                "encode_flops": counts["encode"],
                "decode_flops": counts["decode"],
                "scenes": distortion(scenes, back),
                "photographs": distortion(photographs, trip),
            }
        found.append(record)
    return found


def distortion(pictures: torch.Tensor, back: torch.Tensor) -> dict[str, Any]:
    """Return how far pictures are from their round trips: median PSNR in dB, and SSIM."""
    dims = ("image", "y", "x", "rgb")
    one, two = (
        xr.DataArray(part.permute(0, 2, 3, 1).numpy(), dims=dims) for part in (pictures, back)
    )
    return {
        "pictures": len(pictures),
        "psnr": round(float(psnr(one, two).median()), 2),
        "ssim": round(float(ssim(one, two).median()), 4),
    }


def photograph_crops() -> torch.Tensor:
    """Return crops of photographs, at 64 pixels: (picture, rgb, 64, 64) uint8."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit(
            "The photographs are scikit-image's, which is not installed.\n"
            "Install it: pip install scikit-image"
        ) from None
    crops = []
    for name in PHOTOGRAPHS:
        photograph = torch.from_numpy(np.array(getattr(data, name)())).permute(2, 0, 1)
        for zoom in (2, 4):  # a side of 64 pixels shows 128, then 256 of the photograph
            side = 64 * zoom
            for y in range(0, photograph.shape[1] - side + 1, side):
                for x in range(0, photograph.shape[2] - side + 1, side):
                    crop = photograph[None, :, y : y + side, x : x + side].float()
                    crops.append(torch.nn.functional.avg_pool2d(crop, zoom).round().byte())
    return torch.cat(crops)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what was trained")
    parser.add_argument("--judges", type=Path, default=JUDGES, help="the trained judges")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--scenes", type=int, default=20_000, help="that were trained on")
    parser.add_argument(
        "--most",
        type=int,
        default=MOST,
        help="pictures of a finished denoiser, for FD and KID against their number",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    scorer = Scorer(options.judges)
    runs = score_checkpoints(options, scorer)
    found = {
        "title": "At 64 pixels, emoji",
        "pixels": 64,
        "calls": 2 * CALLS,
        "guidance_scale": GUIDANCE,
        "seeds": sorted({run["seed"] for run in runs}),
        "scenes": options.scenes,
        "learning_rates": list(RATES),
        "device": options.device,
        "runs": runs,
        "autoencoders": score_autoencoders(options, scorer),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.out}: {len(runs)} denoisers, seeds {found['seeds']}")
    for run in runs:
        last = run["points"][-1]
        both, distance = last["both"][0], last["kid"][0]
        print(f"f = {run['f']}, {last['step']} steps: {both:.0%} recognised, KID {distance:.1f}")


if __name__ == "__main__":
    main()
