"""Write a trained denoiser as an ordinary diffusers directory, and pictures of what was trained.

    python -m experiments.pixels.export               # f = 1 and f = 4, into probe/, with pictures

The directory on pixels has no VAE. That on latents has the latents' centre and scale folded into
its VAE, so that the UNet meets mean 0 and spread 1, as it did in training. Text encoder, tokenizer
and words are emojiworld's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from experiments.pixels.score import Painter, fresh_scenes, kept_steps, photograph_crops
from experiments.pixels.spaces import SPACES, Space, build_autoencoder, build_scheduler, build_unet
from experiments.pixels.train import FOLDER, ready
from probe.diffusion.loading import BUNDLED

NAMES = {1: "emojiworld-pixels", 4: "emojiworld-latents"}
SHIPPED = Path("probe")
ROUND_TRIPS = Path("probe/pixels/round-trips.webp")
DRAWN = Path("experiments/pixels/drawn.webp")
SHOWN_PROMPTS, SHOWN_SCENES = [0, 1], 4
SHOWN_CROPS = (16, 26, 39)  # of the photographs
ZOOM, LINE = 2, 16


def export(folder: Path, space: Space, seed: int, target: Path) -> None:
    """Write the last kept checkpoint of a space and seed as a diffusers directory."""
    step = kept_steps(folder, space.f, seed)[-1]
    target.mkdir(parents=True, exist_ok=True)
    for part in target.iterdir():
        if part.is_dir():  # a card stays
            shutil.rmtree(part)
    emojiworld = BUNDLED["emojiworld"]
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(emojiworld / part, target / part)
    shutil.copyfile(emojiworld / "words.json", target / "words.json")
    unet = ready(build_unet(space), folder / f"denoiser-f{space.f}-seed{seed}-{step}.safetensors")
    unet.half().save_pretrained(target / "unet")
    build_scheduler(space.side).save_pretrained(target / "scheduler")
    index = json.loads((emojiworld / "model_index.json").read_text(encoding="utf-8"))
    if space.f == 1:
        index["vae"] = [None, None]
    else:
        folded(folder, space).half().save_pretrained(target / "vae")
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"wrote {target}: step {step}, {size / 1e6:.1f} MB")


@torch.no_grad()
def folded(folder: Path, space: Space) -> torch.nn.Module:
    """Return the autoencoder of a space with the latents' centre and scale inside it."""
    vae = ready(build_autoencoder(space), folder / f"autoencoder-f{space.f}.safetensors")
    saved = torch.load(folder / f"latents-f{space.f}.pt", weights_only=True)
    centre = saved["centre"]
    vae.quant_conv.bias[: len(centre)] -= centre
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ centre
    vae.register_to_config(scaling_factor=round(float(saved["scale"]), 4))
    return vae


# --- pictures -------------------------------------------------------------------------------------


def page(rows: list[tuple[str, torch.Tensor]], columns: list[str]) -> Image.Image:
    """Return rows of pictures with a heading each. *Shape:* (picture, rgb, 64, 64) uint8."""
    side, margin = 64 * ZOOM, 120
    width = margin + max(len(pictures) for _, pictures in rows) * (side + 2)
    sheet = Image.new("RGB", (width, LINE + len(rows) * (side + 2)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, name in enumerate(columns):
        pen.text((margin + column * (side + 2) + 2, 1), name, fill="black", font=font)
    for row, (heading, pictures) in enumerate(rows):
        y = LINE + row * (side + 2)
        pen.multiline_text((4, y + side // 2 - 14), heading, fill="black", font=font)
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            large = image.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (margin + column * (side + 2), y))
    return sheet


def round_trips(folder: Path, device: str) -> Image.Image:
    """Return scenes and photographs beside what each autoencoder gives back of them."""
    scenes, _ = fresh_scenes(66_000_000, SHOWN_SCENES)
    shown = torch.cat([scenes, photograph_crops()[list(SHOWN_CROPS)]])
    rows = [("as it is", shown)]
    for f, space in SPACES.items():
        if f > 1 and (folder / f"autoencoder-f{f}.safetensors").exists():
            numbers = space.channels * space.side**2
            heading = f"f = {f}\n{space.channels} x {space.side} x {space.side}\n"
            heading += f"{3 * 64 * 64 / numbers:.0f} times fewer"
            rows.append((heading, Painter(folder, space, device).round_trip(shown)))
    return page(rows, [""] * len(shown))


def drawn(folder: Path, seed: int) -> Image.Image:
    """Return what each space's denoiser draws at each of its kept steps, for one prompt a column.

    Two prompts a step.
    """
    columns: list[int] = []
    rows = []
    for f, space in SPACES.items():
        pictures = []
        for step in space.steps[2:]:
            path = folder / f"pictures-denoiser-f{f}-seed{seed}-{step}.pt"
            if path.exists():
                pictures.append(torch.load(path, weights_only=True)[SHOWN_PROMPTS])
                columns = max(columns, [*space.steps[2:]][: len(pictures)], key=len)
        if pictures:
            heading = f"f = {f}\n{space.channels} x {space.side} x {space.side}"
            rows.append((heading, torch.cat(pictures)))
    return page(rows, [text for step in columns for text in (f"step {step}", "")])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what was trained")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="where the directories go")
    parser.add_argument("--only", type=int, nargs="+", choices=list(SPACES), default=list(NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    for f in options.only:
        name = NAMES.get(f, f"emojiworld-f{f}")
        export(options.folder, SPACES[f], options.seed, options.out / name)
    if options.pictures:
        ROUND_TRIPS.parent.mkdir(parents=True, exist_ok=True)
        round_trips(options.folder, "cpu").save(ROUND_TRIPS, quality=90)
        drawn(options.folder, options.seed).save(DRAWN, quality=90)
        print(f"wrote {ROUND_TRIPS} and {DRAWN}")


if __name__ == "__main__":
    main()
