"""Write the sheet of emoji that the world is drawn from. Only this script needs the font.

    # writes glyphs.webp and glyphs.json
    python -m experiments.emojiworld.glyphs --font NotoColorEmoji.ttf
    # compares the sheet with the font
    python -m experiments.emojiworld.glyphs --font NotoColorEmoji.ttf --check

The font is Noto Color Emoji 2.042, Debian's package fonts-noto-color-emoji. `apt-get download` and
`dpkg-deb -x` unpack it without installing it. Pillow also needs raqm, which joins code points into
one emoji: its wheels have it where the system has libfribidi0.

Each glyph is drawn at the font's own size and cropped to its ink. Nothing is rescaled; the sheet is
lossless.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from experiments.emojiworld import world
from experiments.emojiworld.judge import STRANGERS

DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the one size at which this bitmap font can be drawn


def wanted() -> list[str]:
    """Return every emoji that a script draws: subjects, decorations, and the judges' strangers."""
    strangers = [emoji for kind in STRANGERS.values() for emoji in kind.split()]
    return list(dict.fromkeys([*world.SUBJECTS.values(), *world.DECORATIONS.values(), *strangers]))


def drawn(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return one emoji as the font draws it, RGBA, cropped to its ink."""
    canvas = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SystemExit(
            f"The font draws nothing for {emoji!r}.\nName Noto Color Emoji with --font."
        )
    return canvas.crop(box)


def write(inks: dict[str, Image.Image]) -> None:
    """Write the sheet and its list of names."""
    cell, columns = world.GLYPH_CELL, world.GLYPH_COLUMNS
    sheet = Image.new("RGBA", (columns * cell, math.ceil(len(inks) / columns) * cell), (0, 0, 0, 0))
    for index, ink in enumerate(inks.values()):
        row, column = divmod(index, columns)
        sheet.paste(ink, (column * cell, row * cell))
    sheet.save(world.GLYPHS, lossless=True, exact=True, quality=100, method=6)
    names = [" ".join(f"{ord(point):x}" for point in emoji) for emoji in inks]
    world.GLYPH_NAMES.write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--font", type=Path, default=DEBIAN_FONT, help="NotoColorEmoji.ttf (default: %(default)s)"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the sheet with the font; write nothing"
    )
    options = parser.parse_args(argv)
    if not options.font.is_file():
        raise SystemExit(
            f"There is no font at {options.font}.\nUnpack Debian's fonts-noto-color-emoji and name "
            "its file with --font."
        )
    if not features.check("raqm"):
        raise SystemExit(
            "Pillow has no raqm here, which joins emoji such as the astronaut.\nInstall "
            "libfribidi0, and Pillow from its wheel."
        )
    font = ImageFont.truetype(str(options.font), FONT_SIZE)
    inks = {emoji: drawn(emoji, font) for emoji in wanted()}
    if not options.check:
        write(inks)
    sheet = world._sheet()
    unlike = [
        emoji
        for emoji, ink in inks.items()
        if emoji not in sheet
        or (sheet[emoji].size, sheet[emoji].tobytes()) != (ink.size, ink.tobytes())
    ]
    if unlike or len(sheet) != len(inks):
        raise SystemExit(
            f"The sheet is not the font's: {' '.join(unlike) or 'it has more'}.\nWrite it again, "
            "without --check."
        )
    print(
        f"{world.GLYPHS}: {len(inks)} emoji, {world.GLYPHS.stat().st_size:,} bytes, each the "
        "font's own pixels"
    )


if __name__ == "__main__":
    main()
