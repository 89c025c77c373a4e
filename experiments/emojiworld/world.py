"""The world that `emojiworld` is trained on: small scenes of emoji, with captions and exact masks.

A scene is one or two subjects in a setting, 128 x 128 pixels:

    scene = draw_scene(seed=7)
    scene.caption    "a robot next to a penguin in the snow"
    scene.image      (128, 128, 3) uint8
    scene.masks      {"robot": (128, 128) bool, "penguin": ..., "snow": ...}

The masks of a scene never overlap, and together they cover it: a pixel belongs to the noun that was
painted on it last. (A picture of a subject without a setting has a plain backdrop, which belongs to
no noun.) That makes them the ground truth for attention maps.

Some subject x setting pairs are never drawn in training: see `HELD_OUT`. The emoji lie in
`glyphs.webp`, so a seed is the same scene on every machine. No font is needed. `glyphs.py` made
that sheet from Noto Color Emoji; LICENSES has its terms.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128
GLYPHS = Path(__file__).with_name(
    "glyphs.webp"
)  # every emoji in its own colours, cropped to its ink, never rescaled
GLYPH_NAMES = Path(__file__).with_name(
    "glyphs.json"
)  # the emoji of each cell, row by row, by their code points
GLYPH_CELL = 128  # a cell's side; the ink begins in its upper left corner
GLYPH_COLUMNS = 10

SUBJECTS = {
    "astronaut": "\U0001f9d1\u200d\U0001f680",
    "robot": "\U0001f916",
    "cat": "\U0001f431",
    "dog": "\U0001f436",
    "fox": "\U0001f98a",
    "lion": "\U0001f981",
    "panda": "\U0001f43c",
    "penguin": "\U0001f427",
    "owl": "\U0001f989",
    "frog": "\U0001f438",
    "turtle": "\U0001f422",
    "fish": "\U0001f420",
    "octopus": "\U0001f419",
    "crab": "\U0001f980",
    "unicorn": "\U0001f984",
    "dragon": "\U0001f432",
    "ghost": "\U0001f47b",
    "snowman": "\u26c4",
    "rocket": "\U0001f680",
    "car": "\U0001f697",
    "balloon": "\U0001f388",
    "guitar": "\U0001f3b8",
    "pizza": "\U0001f355",
    "football": "\u26bd",
}

SETTINGS = {
    "scuba diving": "scuba diving",
    "moon": "on the moon",
    "forest": "in the forest",
    "snow": "in the snow",
    "desert": "in the desert",
    "beach": "on the beach",
    "city": "in the city",
    "party": "at a party",
}

DECORATIONS = {  # what stands about in the settings; no noun of its own
    "herb": "\U0001f33f",
    "earth": "\U0001f30d",
    "fir": "\U0001f332",
    "tree": "\U0001f333",
    "snowflake": "\u2744\ufe0f",
    "sun": "\u2600\ufe0f",
    "cactus": "\U0001f335",
    "palm": "\U0001f334",
    "parasol": "\u26f1\ufe0f",
    "office": "\U0001f3e2",
    "store": "\U0001f3ec",
    "popper": "\U0001f389",
}

RELATIONS = ("next to", "above")

# Pairs left out of training, so that drawing them shows a new combination of known concepts. The
# first set may be looked at while the model is being made; the second is scored once, for a report.
HELD_OUT_DEVELOPMENT = frozenset(
    {
        ("astronaut", "scuba diving"),
        ("penguin", "desert"),
        ("cat", "moon"),
        ("robot", "forest"),
        ("car", "snow"),
        ("unicorn", "city"),
        ("owl", "beach"),
        ("pizza", "party"),
    }
)
HELD_OUT_SEALED = frozenset(
    {
        ("fox", "scuba diving"),
        ("dragon", "moon"),
        ("turtle", "forest"),
        ("lion", "snow"),
        ("frog", "desert"),
        ("guitar", "beach"),
        ("panda", "city"),
        ("crab", "party"),
    }
)
HELD_OUT = HELD_OUT_DEVELOPMENT | HELD_OUT_SEALED


@dataclass(frozen=True)
class Scene:
    """One picture of the world.

    `masks` maps each noun of the caption to a (128, 128) bool array.
    """

    caption: str
    image: np.ndarray
    masks: dict[str, np.ndarray]
    subjects: tuple[str, ...]
    setting: str | None
    relation: str | None


# --- glyphs ---------------------------------------------------------------------------------------


@functools.cache
def _sheet() -> dict[str, Image.Image]:
    """Return every emoji of the sheet as an RGBA image, cropped to its ink."""
    with Image.open(GLYPHS) as file:
        sheet = file.convert("RGBA")
    inks = {}
    for index, name in enumerate(json.loads(GLYPH_NAMES.read_text(encoding="utf-8"))):
        row, column = divmod(index, GLYPH_COLUMNS)
        corner = column * GLYPH_CELL, row * GLYPH_CELL
        cell = sheet.crop((*corner, corner[0] + GLYPH_CELL, corner[1] + GLYPH_CELL))
        inks["".join(chr(int(point, 16)) for point in name.split())] = cell.crop(cell.getbbox())
    return inks


@functools.cache
def glyph(text: str, size: int) -> Image.Image:
    """Return the emoji `text` as an RGBA image, cropped to its ink, its longer side `size` pixels.

    Raise KeyError if the sheet does not have it.
    """
    if text not in _sheet():
        raise KeyError(
            f"{GLYPHS.name} has no {text!r}: list it in glyphs.py's `wanted`, then run python -m "
            "experiments.emojiworld.glyphs"
        )
    ink = _sheet()[text]
    scale = size / max(ink.size)
    return ink.resize(
        (max(1, round(ink.width * scale)), max(1, round(ink.height * scale))),
        Image.Resampling.LANCZOS,
    )


# --- painting: every stroke also claims its pixels in the ownership map ---------------------------


class _Canvas:
    """A picture and, for every pixel, the index of the noun that painted it last (0 is nobody)."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.image = Image.new("RGB", (SIZE, SIZE))
        self.owner = np.zeros((SIZE, SIZE), np.uint8)

    def backdrop(self, *bands: tuple[float, str], noun: int) -> None:
        """Fill horizontal bands, each from a height (0 is the top) down. Colours vary a little."""
        draw = ImageDraw.Draw(self.image)
        shift = int(self.rng.integers(-7, 8))
        for start, colour in bands:
            base = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
            jitter = self.rng.integers(-8, 9, size=3)
            rgb = tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(base, jitter, strict=True))
            top = round(start * SIZE) + (shift if start else 0)
            draw.rectangle((0, top, SIZE, SIZE), fill=rgb)
        self.owner[:] = noun

    def paste(self, stamp: Image.Image, x: int, y: int, noun: int) -> None:
        """Paste an RGBA stamp with its upper left corner at (x, y).

        Its opaque pixels now belong to `noun`.
        """
        self.image.paste(stamp, (x, y), stamp)
        layer = Image.new("L", (SIZE, SIZE))
        layer.paste(stamp.getchannel("A"), (x, y))
        self.owner[np.asarray(layer) > 127] = noun

    def scatter(
        self,
        emoji: str,
        count: tuple[int, int],
        sizes: tuple[int, int],
        rows: tuple[float, float],
        noun: int,
    ) -> None:
        """Paste small copies of an emoji, between `count` many, their feet between two heights."""
        for _ in range(int(self.rng.integers(count[0], count[1] + 1))):
            stamp = glyph(emoji, int(self.rng.integers(sizes[0], sizes[1] + 1)))
            x = int(self.rng.integers(-4, SIZE - stamp.width + 5))
            y = int(self.rng.uniform(*rows) * SIZE) - stamp.height
            self.paste(stamp, x, y, noun)

    def dots(
        self,
        colours: tuple[str, ...],
        count: tuple[int, int],
        radius: tuple[float, float],
        rows: tuple[float, float],
    ) -> None:
        draw = ImageDraw.Draw(self.image)
        for _ in range(int(self.rng.integers(count[0], count[1] + 1))):
            x, y = self.rng.uniform(0, SIZE), self.rng.uniform(*rows) * SIZE
            r = self.rng.uniform(*radius)
            colour = colours[int(self.rng.integers(len(colours)))]
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _scuba_diving(canvas: _Canvas, noun: int) -> None:
    bands = [
        (i / 8, f"#{20 + 8 * (7 - i):02x}{90 + 13 * (7 - i):02x}{170 + 8 * (7 - i):02x}")
        for i in range(8)
    ]
    canvas.backdrop(*bands, (0.9, "#c9b27c"), noun=noun)
    canvas.scatter(DECORATIONS["herb"], (1, 4), (18, 30), (0.92, 1.0), noun)


def _moon(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#0c0c1c"), (0.62, "#9a9aa2"), noun=noun)
    canvas.dots(("#ffffff", "#ffffcc"), (8, 18), (0.7, 1.4), (0, 0.55))
    draw = ImageDraw.Draw(canvas.image)
    for _ in range(int(canvas.rng.integers(3, 7))):
        x, y, r = (
            canvas.rng.uniform(0, SIZE),
            canvas.rng.uniform(0.72, 0.98) * SIZE,
            canvas.rng.uniform(4, 10),
        )
        draw.ellipse((x - r, y - r / 2.5, x + r, y + r / 2.5), fill="#6f6f78")
    canvas.scatter(DECORATIONS["earth"], (1, 1), (18, 26), (0.2, 0.4), noun)


def _forest(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#7fb069"), (0.55, "#2f5d34"), noun=noun)
    canvas.scatter(DECORATIONS["fir"], (4, 7), (30, 46), (0.55, 0.75), noun)
    canvas.scatter(DECORATIONS["tree"], (1, 3), (28, 40), (0.6, 0.95), noun)


def _snow(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#b9d6ee"), (0.65, "#f4f8fc"), noun=noun)
    canvas.scatter(DECORATIONS["snowflake"], (3, 6), (12, 20), (0.15, 0.95), noun)
    canvas.dots(("#ffffff",), (15, 30), (1.0, 2.2), (0, 0.65))


def _desert(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#f7d58a"), (0.6, "#dd9a4a"), noun=noun)
    canvas.scatter(DECORATIONS["sun"], (1, 1), (22, 30), (0.22, 0.32), noun)
    canvas.scatter(DECORATIONS["cactus"], (2, 4), (22, 36), (0.65, 0.98), noun)


def _beach(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#9fdcff"), (0.42, "#2f8fd0"), (0.66, "#f3dca0"), noun=noun)
    canvas.scatter(DECORATIONS["palm"], (1, 3), (36, 50), (0.7, 0.85), noun)
    canvas.scatter(DECORATIONS["parasol"], (1, 2), (22, 32), (0.85, 1.0), noun)


def _city(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#f2b48c"), (0.78, "#5a5a62"), noun=noun)
    canvas.scatter(DECORATIONS["office"], (3, 5), (38, 56), (0.76, 0.8), noun)
    canvas.scatter(DECORATIONS["store"], (1, 2), (34, 46), (0.76, 0.82), noun)


def _party(canvas: _Canvas, noun: int) -> None:
    canvas.backdrop((0, "#e58fc4"), (0.8, "#8e4aa8"), noun=noun)
    canvas.dots(
        ("#ffe14d", "#5ad1ff", "#7dff8a", "#ffffff", "#ff5a5a"), (14, 22), (2.0, 3.5), (0, 1)
    )
    canvas.scatter(DECORATIONS["popper"], (1, 3), (20, 30), (0.2, 1.0), noun)


_PAINTERS: dict[str, Callable[[_Canvas, int], None]] = {
    "scuba diving": _scuba_diving,
    "moon": _moon,
    "forest": _forest,
    "snow": _snow,
    "desert": _desert,
    "beach": _beach,
    "city": _city,
    "party": _party,
}


@functools.cache
def _diving_mask(width: int) -> Image.Image:
    """Return a diving mask with a snorkel, `width` pixels wide.

    It is drawn four times too large and scaled down.
    """
    w, h = 4 * width, round(2.4 * width)
    stamp = Image.new("RGBA", (w, h), (0, 0, 0, 0))
    draw = ImageDraw.Draw(stamp)
    line = max(4, w // 14)
    lens = (line, round(0.35 * h), round(0.82 * w), h - line)
    draw.rounded_rectangle(
        lens, radius=h // 4, fill=(120, 215, 250, 150), outline=(24, 28, 44, 255), width=line
    )
    tube = (round(0.88 * w), 0, round(0.88 * w) + line, round(0.85 * h))
    draw.rounded_rectangle(tube, radius=line // 2, fill=(255, 96, 20, 255))
    draw.rectangle(
        (round(0.8 * w), round(0.75 * h), round(0.88 * w) + line, round(0.85 * h)),
        fill=(255, 96, 20, 255),
    )
    return stamp.resize((width, h // 4), Image.Resampling.LANCZOS)


def _dive(canvas: _Canvas, box: tuple[int, int, int, int], noun: int) -> None:
    """Put the diving mask over a subject's upper half, and let bubbles rise beside it."""
    x0, y0, x1, y1 = box
    stamp = _diving_mask(max(20, round(0.68 * (x1 - x0))))
    x = round((x0 + x1) / 2 - 0.42 * stamp.width)
    canvas.paste(stamp, x, round(y0 + 0.2 * (y1 - y0)), noun)
    draw = ImageDraw.Draw(canvas.image)
    claim = Image.new("L", (SIZE, SIZE))
    claim_draw = ImageDraw.Draw(claim)
    for _ in range(int(canvas.rng.integers(4, 8))):
        r = canvas.rng.uniform(2, 4.5)
        cx = canvas.rng.uniform(min(x1, SIZE - 12), min(x1 + 16, SIZE))
        cy = canvas.rng.uniform(0, max(y0 + 20, 24))
        circle = (cx - r, cy - r, cx + r, cy + r)
        draw.ellipse(circle, fill="#cdeeff", outline="#ffffff")
        claim_draw.ellipse(circle, fill=255)
    canvas.owner[np.asarray(claim) > 127] = noun


def _places(
    rng: np.random.Generator, stamps: list[Image.Image], relation: str | None
) -> list[tuple[int, int]]:
    """Return the upper left corner of one subject, low enough, or of two.

    Two are side by side, or one above the other.
    """
    if relation is None:
        (stamp,) = stamps
        return [
            (
                round(rng.uniform(0.15, 0.85) * (SIZE - stamp.width)),
                round(rng.uniform(0.35, 0.95) * (SIZE - stamp.height)),
            )
        ]
    if relation == "above":
        middle = rng.uniform(0.35, 0.65) * SIZE
        upper, lower = stamps
        return [
            (
                round(middle - upper.width / 2 + rng.uniform(-8, 8)),
                round(rng.uniform(1, 60 - upper.height)),
            ),
            (
                round(middle - lower.width / 2 + rng.uniform(-8, 8)),
                round(rng.uniform(66, SIZE - 1 - lower.height)),
            ),
        ]
    ground = rng.uniform(0.6, 0.95) * SIZE
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    corners: list[tuple[int, int]] = [(0, 0), (0, 0)]
    for place, which in enumerate(order):
        stamp = stamps[which]
        x = (
            rng.uniform(1, 63 - stamp.width)
            if place == 0
            else rng.uniform(65, SIZE - 1 - stamp.width)
        )
        corners[which] = (round(x), round(ground - stamp.height))
    return corners


# --- words ----------------------------------------------------------------------------------------


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def caption_of(
    subjects: tuple[str, ...], setting: str | None, relation: str | None, opening: str = ""
) -> str:
    """Return the sentence that describes a scene: "a robot next to a penguin in the snow"."""
    words = [opening] if opening else []
    words += [_article(subjects[0]), subjects[0]]
    if relation is not None:
        words += [relation, _article(subjects[1]), subjects[1]]
    if setting is not None:
        words.append(SETTINGS[setting])
    return " ".join(words)


def draw_scene(
    seed: int,
    subjects: tuple[str, ...] | None = None,
    setting: str | None = None,
    relation: str | None = None,
    *,
    allow_held_out: bool = False,
) -> Scene:
    """Draw one scene. `seed` chooses what is not given; a held-out pair only if that is allowed.

    Raise ValueError for unknown nouns, for a relation without two subjects, and for a held-out pair
    that is given.
    """
    rng = np.random.default_rng([20_221_112, seed])
    if subjects is None:
        names = list(SUBJECTS)
        relation = str(rng.choice(RELATIONS)) if rng.random() < 0.35 else None
        while True:
            picked = rng.choice(len(names), size=1 if relation is None else 2, replace=False)
            subjects = tuple(names[int(i)] for i in picked)
            setting = None if rng.random() < 0.08 else str(rng.choice(list(SETTINGS)))
            if allow_held_out or not any((subject, setting) in HELD_OUT for subject in subjects):
                break
    elif not allow_held_out and any((subject, setting) in HELD_OUT for subject in subjects):
        raise ValueError(
            f"{subjects} x {setting} is held out of training; pass allow_held_out=True"
        )
    _refuse_unknown(subjects, setting, relation)

    canvas = _Canvas(rng)
    nouns = [*subjects, *([setting] if setting else [])]
    place = len(subjects) + 1
    if setting is None:
        canvas.backdrop((0, str(rng.choice(["#ffffff", "#f3efe4", "#e8eef5"]))), noun=0)
    else:
        _PAINTERS[setting](canvas, place)
    low, high = (60, 88) if relation is None else (44, 58)
    stamps = [glyph(SUBJECTS[subject], int(rng.integers(low, high + 1))) for subject in subjects]
    for index, (stamp, (x, y)) in enumerate(
        zip(stamps, _places(rng, stamps, relation), strict=True)
    ):
        canvas.paste(stamp, x, y, index + 1)
        if setting == "scuba diving":
            _dive(canvas, (x, y, x + stamp.width, y + stamp.height), place)
    opening = "a picture of" if rng.random() < 0.1 else ""
    return Scene(
        caption=caption_of(subjects, setting, relation, opening),
        image=np.asarray(canvas.image),
        masks={noun: canvas.owner == index + 1 for index, noun in enumerate(nouns)},
        subjects=subjects,
        setting=setting,
        relation=relation,
    )


def _refuse_unknown(subjects: tuple[str, ...], setting: str | None, relation: str | None) -> None:
    unknown = [subject for subject in subjects if subject not in SUBJECTS]
    if setting is not None and setting not in SETTINGS:
        unknown.append(setting)
    if unknown:
        raise ValueError(
            f"unknown nouns {unknown}; subjects: {sorted(SUBJECTS)}; settings: {sorted(SETTINGS)}"
        )
    if (relation is not None) != (len(subjects) == 2) or relation not in (None, *RELATIONS):
        raise ValueError(
            "two subjects need a relation ('next to' or 'above'), and one subject has none"
        )


def vocabulary() -> list[str]:
    """Return every word that a caption can contain, sorted."""
    words = {"a", "an", "the", "and", "picture", "of", *SUBJECTS}
    for phrase in (*SETTINGS.values(), *RELATIONS):
        words.update(phrase.split())
    return sorted(words)


def contact_sheet(scenes: list[Scene], columns: int = 8) -> Image.Image:
    """Return the pictures of several scenes side by side."""
    rows = math.ceil(len(scenes) / columns)
    sheet = Image.new("RGB", (columns * SIZE, rows * SIZE), "white")
    for index, scene in enumerate(scenes):
        sheet.paste(Image.fromarray(scene.image), (index % columns * SIZE, index // columns * SIZE))
    return sheet
