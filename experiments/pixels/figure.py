"""Draw docs/pixels.webp: what latents save, by four counts and measurements, and by size.

python -m experiments.pixels.figure
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from experiments.drawing import FAINT, INK, PAPER, RULE
from probe.figures.pixels_looks import LOOKS, space_text, times_text
from probe.reading.pixels import counts

OUT = Path(__file__).parents[2] / "docs" / "pixels.webp"
SIZE, F = 512, 8
SIDES = (256, 384, 512, 768, 1024)
WIDTH, HEIGHT = 2120, 900  # drawn at double size, and reduced


class Panel:
    """A rectangle with log axes."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        box: tuple[int, int, int, int],
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        self.draw, self.box, self.x, self.y = draw, box, x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        along, up = (
            math.log(value / low) / math.log(high / low)
            for value, (low, high) in ((x, self.x), (y, self.y))
        )
        return left + along * (right - left), bottom - up * (bottom - top)

    def write(
        self, at: tuple[float, float], text: str, size: int = 26, fill: object = INK, to: str = "la"
    ) -> None:
        self.draw.text(at, text, fill, font=ImageFont.load_default(size), anchor=to)  # type: ignore[arg-type]


def factors(draw: ImageDraw.ImageDraw) -> None:
    """Draw by what factor pixels are dearer, four times over."""
    found = counts().factors("sd14", F, SIZE)
    side = counts().attention_up_to
    rows = [
        ("the same UNet, counted", found.full, found.full, 1),
        (f"attention up to {side} x {side} on both, counted", found.coarse, found.coarse, 2),
        ("convolution alone, counted", found.convolution, found.convolution, 4),
        ("time, at f = 4, measured in the paper", *found.paper, 8),
    ]
    panel = Panel(draw, (60, 210, 980, 780), (1, 1500), (1, 10))
    title = "How many times as much on pixels"
    panel.write((60, 40), title, 40)
    panel.write((60, 96), f"Stable Diffusion 1.x, {SIZE} x {SIZE} pixels, f = {F}", 28, FAINT)
    for decade in (1, 10, 100, 1000):
        here, _ = panel.at(decade, 1)
        draw.line([(here, 190), (here, 780)], RULE, 2)
        panel.write((here, 792), f"{decade}", 26, FAINT, "ma")
    for number, (name, least, most, f) in enumerate(rows):
        y, colour = 268 + 148 * number, ImageColor.getrgb(LOOKS[f][0])
        (first, _), (last, _) = panel.at(least, 1), panel.at(most, 1)
        draw.line([(first, y), (last, y)], colour, 12)
        for here in (first, last):
            draw.ellipse((here - 13, y - 13, here + 13, y + 13), colour)
        text = times_text(least) if least == most else f"{times_text(least)} to {times_text(most)}"
        panel.write((last + 28, y), text, 32, INK, "lm")
        panel.write((76, y - 62), name, 28)


def by_size(draw: ImageDraw.ImageDraw) -> None:
    """Draw FLOPs of one call against the size, a line for each f."""
    panel = Panel(draw, (1200, 210, 1830, 780), (SIDES[0], SIDES[-1]), (1e10, 1e16))
    panel.write((1110, 40), "FLOPs of one call of the UNet, by size", 40)
    panel.write(
        (1110, 96), "a line for each f; dashed: pixels, attention on coarse grids alone", 28, FAINT
    )
    for decade in range(10, 17):
        (left, y), (right, _) = panel.at(SIDES[0], 10**decade), panel.at(SIDES[-1], 10**decade)
        draw.line([(left, y), (right, y)], RULE, 2)
        panel.write((left - 14, y), f"1e{decade}", 26, FAINT, "rm")
    for side in SIDES:
        panel.write((panel.at(side, 1e10)[0], 792), str(side), 26, FAINT, "ma")
    panel.write((1830, 840), "side of the picture in pixels", 28, INK, "ra")
    for f, (name, _) in LOOKS.items():
        colour = ImageColor.getrgb(name)
        points = [panel.at(side, counts().of("sd14", "denoiser", f, side).total) for side in SIDES]
        draw.line(points, colour, 6, joint="curve")
        for x, y in points:
            draw.ellipse((x - 9, y - 9, x + 9, y + 9), colour)
        panel.write((1850, points[-1][1]), space_text(f), 28, INK, "lm")
    coarse = [
        panel.at(side, counts().of("sd14", "denoiser", 1, side, "coarse").total) for side in SIDES
    ]
    colour = ImageColor.getrgb(LOOKS[1][0])
    for (x, y), (right, low) in itertools.pairwise(coarse):
        for part in range(0, 10, 2):  # dashes
            ends = [(x + (right - x) * at / 10, y + (low - y) * at / 10) for at in (part, part + 1)]
            draw.line(ends, colour, 6)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    page = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(page)
    factors(draw)
    by_size(draw)
    page = page.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS)
    page.save(options.out, "WEBP", quality=88)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
