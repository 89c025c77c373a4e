"""Draw labelled pictures for lessons and reports with PIL: sheets, line charts, areas, tables.

sheet(title, note, heads, rows)          # a grid; a row has its label, captions and colours
chart(title, note, xlabel, ylabel, ...)  # lines with bands
areas(title, ...)                        # costs as squares
table(heads, rows)                       # text, its columns aligned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from probe.figures.drawing import heat

INK, FAINT, RULE, PAPER = (24, 26, 32), (110, 114, 124), (226, 228, 232), (255, 255, 255)
BLUE, RED, ROSE = (33, 102, 172), (178, 24, 43), (240, 190, 180)
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scale:
    """How numbers from `least` to `greatest` become colours, and how these two ends are written."""

    least: float
    greatest: float
    colours: Callable[[np.ndarray], np.ndarray] = heat  # numbers in 0..1 -> rgb
    form: str = "{:.3g}"

    def __call__(self, values: Any) -> np.ndarray:
        """Return the colours of numbers. *Shape:* (...) -> (..., rgb) uint8."""
        spread = max(self.greatest - self.least, 1e-12)
        return self.colours(np.clip((np.asarray(values, np.float32) - self.least) / spread, 0, 1))

    def over(self, picture: Image.Image, values: np.ndarray) -> Image.Image:
        """Return a greyed picture under the numbers (y, x), which are smoothly enlarged."""
        small = Image.fromarray(values.astype(np.float32))
        large = np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC))
        grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
        spread = max(self.greatest - self.least, 1e-12)
        weight = 0.25 + 0.65 * np.clip((large - self.least) / spread, 0, 1)[..., None]
        mixed = grey * (1 - weight) + self(large) * weight
        return Image.fromarray(mixed.round().astype(np.uint8))


def blue_to_red(values: np.ndarray) -> np.ndarray:
    """Return numbers in 0..1 as colours from blue over white (one half) to red.

    *Shape:* (...) -> (..., rgb) uint8.
    """
    part = (2 * values - 1)[..., None]
    blue, red = 255 + part * (255 - np.array(BLUE)), 255 - part * (255 - np.array(RED))
    return np.asarray(np.where(part < 0, blue, red)).round().astype(np.uint8)


def signed(limit: float) -> Scale:
    """Return the scale for numbers from -limit to limit: white at nought."""
    return Scale(-limit, limit, blue_to_red)


@dataclass(frozen=True)
class Row:
    """One row of a sheet: its label, pictures (PIL or rgb arrays) and captions, and its colours."""

    label: str
    pictures: Sequence[Any]
    captions: Sequence[str] = ()
    scale: Scale | None = None


def sheet(
    title: str, note: str, heads: Sequence[str], rows: Sequence[Row], cell: int = 132
) -> Image.Image:
    """Return a grid of pictures under a title. Small ones, such as latents, keep hard edges."""
    left = 168 if any(row.label for row in rows) else 24
    wide, tops = cell + 12, [106]
    for row in rows:
        tops.append(tops[-1] + cell + (34 if row.captions else 14))
    bars = 72 if any(row.scale for row in rows) else 12
    page = Image.new("RGB", (max(left + len(heads) * wide + bars, 420), tops[-1] + 10), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (24, 16), title, 22)
    _write(draw, (24, 46), note, 14, FAINT)
    for column, head in enumerate(heads):
        _write(draw, (left + column * wide + cell / 2, 98), head, 14, anchor="md")
    for row, top in zip(rows, tops, strict=False):
        font = ImageFont.load_default(15)
        draw.multiline_text((24, top + cell / 2), row.label, INK, font, anchor="lm", spacing=5)
        for column, picture in enumerate(row.pictures):
            x = left + column * wide
            if not isinstance(picture, Image.Image):
                picture = Image.fromarray(np.asarray(picture))
            small = picture.width * 4 <= cell
            how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
            page.paste(picture.resize((cell, cell), how), (x, top))
            if row.captions:
                below = (x + cell / 2, top + cell + 4)
                _write(draw, below, row.captions[column], 12, FAINT, "ma")
        if row.scale:
            x, scale = left + len(heads) * wide, row.scale
            numbers = np.linspace(scale.greatest, scale.least, cell)
            page.paste(Image.fromarray(scale(numbers[:, None].repeat(12, 1))), (x, top))
            draw.rectangle((x, top, x + 11, top + cell - 1), outline=RULE)
            _write(draw, (x + 18, top), scale.form.format(scale.greatest), 12, FAINT)
            _write(draw, (x + 18, top + cell), scale.form.format(scale.least), 12, FAINT, "ld")
    return page


@dataclass(frozen=True)
class Line:
    """A line of a chart with its band, from `values` (point, draw).

    The line is the mean over draws, the band goes from the least to the greatest.
    """

    label: str
    colour: Colour
    values: np.ndarray


def chart(
    title: str, note: str, xlabel: str, ylabel: str, x: Sequence[float], lines: Sequence[Line]
) -> Image.Image:
    """Return a chart of lines with bands over x, the vertical axis logarithmic.

    It is drawn at double size and reduced, so that edges are smooth.
    """
    page = Image.new("RGB", (1960, 1040), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (48, 32), title, 44)
    _write(draw, (48, 92), note, 28, FAINT)
    _write(draw, (48, 156), ylabel, 28)
    left, right, low, high = 180, 1560, 900, 220
    logs = [np.log10(line.values) for line in lines]
    bottom, top = min(log.min() for log in logs), max(log.max() for log in logs)

    def at(value: float, log: float) -> tuple[float, float]:
        across = left + (right - left) * (value - min(x)) / (max(x) - min(x))
        return across, low - (low - high) * (log - bottom) / (top - bottom)

    for decade in range(int(np.ceil(bottom)), int(np.floor(top)) + 1):
        draw.line([at(min(x), decade), at(max(x), decade)], RULE, 2)
        _write(draw, (left - 16, at(0, decade)[1]), f"{10.0**decade:g}", 26, FAINT, "rm")
    unit = 10 ** np.floor(np.log10((max(x) - min(x)) / 2))
    for tick in np.arange(np.ceil(min(x) / unit), np.floor(max(x) / unit) + 1) * unit:
        draw.line([(at(tick, 0)[0], low + 6), (at(tick, 0)[0], low + 18)], FAINT, 2)
        _write(draw, (at(tick, 0)[0], low + 26), f"{tick:g}", 26, FAINT, "ma")
    _write(draw, (right, low + 70), xlabel, 28, INK, "ra")
    for line, log in zip(lines, logs, strict=True):
        edge = [*zip(x, log.max(1), strict=True), *reversed([*zip(x, log.min(1), strict=True)])]
        pale = tuple(round(255 - (255 - c) * 0.25) for c in line.colour)
        draw.polygon([at(*point) for point in edge], pale)
    ends = []
    for line in lines:
        mean = [at(*point) for point in zip(x, np.log10(line.values.mean(1)), strict=True)]
        draw.line(mean, line.colour, 6, joint="curve")
        ends.append((mean[-1][1], line.label, line.colour))
    y = -1000.0
    for end, label, colour in sorted(ends):
        y = max(end, y + 36)
        _write(draw, (right + 20, y), label, 28, colour, "lm")
    return page.resize((980, 520), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Cost:
    """Two costs in one unit, a small and a large one. `part` is a share of the large one.

    The note has up to two lines.
    """

    label: str
    note: str
    small: float
    large: float
    part: float


def areas(
    title: str, small: str, part: str, rest: str, costs: Sequence[Cost], edge: int = 400
) -> Image.Image:
    """Return each pair of costs as two squares, the small one inside of the large one.

    Their areas are in proportion.
    """
    page = Image.new("RGB", (24 + len(costs) * (edge + 36), edge + 176), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (24, 16), title, 22)
    x = 24.0
    for label, colour in ((small, BLUE), (part, RED), (rest, ROSE)):
        draw.rectangle((x, 52, x + 13, 65), colour)
        _write(draw, (x + 20, 51), label, 14, FAINT)
        x += 44 + draw.textlength(label, font=ImageFont.load_default(14))
    for number, cost in enumerate(costs):
        left, top = 24 + number * (edge + 36), 86
        draw.rectangle((left, top, left + edge, top + edge), ROSE)
        draw.rectangle((left, top, left + edge, top + edge * cost.part), RED)
        side = max(edge * (cost.small / cost.large) ** 0.5, 1)
        draw.rectangle((left, top + edge - side, left + side, top + edge), BLUE)
        _write(draw, (left, top + edge + 10), cost.label, 16)
        _write(draw, (left, top + edge + 34), cost.note, 14, FAINT)
    return page


def table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Return rows of text below their heads, in aligned columns."""
    cells = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    padded = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in [cells[0], rule, *cells[1:]]
    ]
    return "\n".join(f"  {'   '.join(row)}".rstrip() for row in padded)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: Colour = INK,
    anchor: str = "la",
) -> None:
    draw.text(at, text, fill, font=ImageFont.load_default(size), anchor=anchor)
