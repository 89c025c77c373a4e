"""probe export RUN [RUN ...]: write a recording as one file that others can open.

probe export RUN --html run.html           # a page that plays by itself, offline probe export A B
--html compare.html       # two to four runs, side by side probe export RUN --webp forming.webp
# the predicted clean picture over the steps probe export RUN --gif map.gif --word cat  # where one
word was looked at, over the steps probe export RUN --png steps.png           # the same frames in
one picture
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from probe import stopping
from probe.errors import ExperimentError, StoreError
from probe.output import say
from probe.terminal import RECORDING, Parser, add_runs, described, guarded, without_home
from probe.writing import files

if TYPE_CHECKING:
    from probe.reading.recording import Run

MOST = 4
KINDS = {"html": (".html", ".htm"), "webp": (".webp",), "gif": (".gif",), "png": (".png",)}


def parser(prog: str = "probe export") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "probe export", prog))
    parser.add_argument("names", nargs="+", metavar="RUN", help=RECORDING)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--html", type=Path, metavar="FILE", help="one self-contained page with the player"
    )
    where.add_argument(
        "--webp", type=Path, metavar="FILE", help="an animation: small, for browsers and slides"
    )
    where.add_argument(
        "--gif", type=Path, metavar="FILE", help="an animation that opens everywhere"
    )
    where.add_argument(
        "--png", type=Path, metavar="FILE", help="the frames of the animation as one picture"
    )
    parser.add_argument("--word", help="show where this word or phrase was looked at")
    parser.add_argument(
        "--image", type=int, default=0, metavar="I", help="which image of the recording, from 0"
    )
    parser.add_argument(
        "--small", action="store_true", help="leave single layers and heads out of a page"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_runs(parser)
    return parser


def main(arguments: list[str], prog: str = "probe export") -> int:
    """Write the file that the command line asks for. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    kind = next((name for name in KINDS if getattr(options, name) is not None), None)
    if kind is None:
        raise ExperimentError("There is no file to write.", "Name one: --html run.html")
    target: Path = getattr(options, kind)
    if target.suffix.lower() not in KINDS[kind]:
        raise ExperimentError(
            f"--{kind}: {target} has another ending.",
            f"Name a file like {target.with_suffix(KINDS[kind][0])}",
        )
    if len(options.names) > (MOST if kind == "html" else 1):
        most = f"{MOST} recordings" if kind == "html" else "one recording"
        raise ExperimentError(f"--{kind} takes {most} at most.", "Name fewer.")
    from probe.reading.recording import open_run

    runs = [open_run(name, options.runs) for name in options.names]
    if kind == "html":
        from probe.figures.page import page

        content = page(runs, everything=not options.small).encode()
    else:
        content = _pictures(runs[0], kind, options.word, options.image)
    try:
        with stopping.cleanly():
            files.replace(target, [content], False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"{target} could not be written: {reason}.",
            "Name a folder that exists and can be written.",
        ) from error
    say(f"{without_home(str(target))} ({len(content) / 1000:.0f} kB)")
    return 0


def _pictures(run: Run, kind: str, word: str | None, image: int) -> bytes:
    """Return the bytes of an animation, or of its frames in one picture."""
    import io

    from probe.figures.animation import animated, frames, strip

    pictures = frames(run, word, image)
    if kind != "png":
        return animated(pictures, kind.upper())
    png = io.BytesIO()
    strip(pictures).save(png, "PNG")
    return png.getvalue()


if __name__ == "__main__":
    guarded(main)
