"""probe export RUN [RUN ...]: write a recording, or a study, as one file that others can open.

probe export RUN --html run.html           # a page that plays by itself, offline
probe export A B --html compare.html       # two to four runs, side by side
probe export RUN --webp forming.webp       # the predicted clean picture over the steps
probe export RUN --gif map.gif --word cat  # where one word was looked at, over the steps
probe export RUN --png steps.png           # the same frames in one picture

probe export STUDY --html grid.html        # every cell as a picture, in a page with every number
probe export STUDY --png grid.png --rows guidance_scale --columns seed
probe export STUDY --plot measures.html    # heat maps of the measures
probe export STUDY --table study.csv       # a row a cell; also .parquet and .zarr

probe export --pixels pixels.html          # pixels against latents: counted, measured, trained
probe export A B --pixels pixels.html      # with two runs in it, one on pixels, one on latents
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from probe import stopping
from probe.errors import ExperimentError, ProbeError, StoreError
from probe.output import say
from probe.terminal import RECORDING, Parser, add_runs, described, guarded, without_home
from probe.writing import files

if TYPE_CHECKING:
    from PIL.Image import Image

    from probe.figures.grid import Layout
    from probe.reading.recording import Run
    from probe.reading.study import Study

MOST = 4
KINDS = {
    "html": (".html", ".htm"),
    "webp": (".webp",),
    "gif": (".gif",),
    "png": (".png",),
    "plot": (".html", ".htm"),
    "table": (".csv", ".parquet", ".zarr"),
    "pixels": (".html", ".htm"),
}
OF_STUDIES = ("html", "png", "plot", "table")


def parser(prog: str = "probe export") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "probe export", prog))
    parser.add_argument("names", nargs="*", metavar="RUN", help=RECORDING)
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
        "--png",
        type=Path,
        metavar="FILE",
        help="the frames of the animation as one picture; of a study the grid of its pictures",
    )
    where.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="of a study: a page with heat maps of its measures",
    )
    where.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="of a study: its numbers, .csv, .parquet or .zarr",
    )
    where.add_argument(
        "--pixels",
        type=Path,
        metavar="FILE",
        help="a page about pixels against latents: needs no recording, plays those that are named",
    )
    parser.add_argument("--rows", metavar="AXIS", help="of a study: the axis that runs down")
    parser.add_argument("--columns", metavar="AXIS", help="of a study: the axis that runs across")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="AXIS=LABEL",
        help="of a study: show one label of an axis alone (several times: of several axes)",
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
    if kind == "pixels":
        return _write(target, _pixels(options).encode())
    if not options.names:
        raise ExperimentError(
            "No recording is named.", f"Name one: probe export sample --{kind} {target}"
        )
    if (study := _study_of(options)) is not None:
        return _export_study(study, kind, target, options)
    if kind not in ("html", "webp", "gif", "png"):
        raise ExperimentError(
            f"--{kind} is for studies, and {options.names[0]} is none.",
            "Name a study: a .study folder.",
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
    return _write(target, content)


def _write(target: Path, content: bytes) -> int:
    """Write a file, and say how large it is. Raise StoreError."""
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


def _pixels(options: argparse.Namespace) -> str:
    """Return the page about pixels against latents. Raise ExperimentError without plotly."""
    from probe.reading.pixels import counts, shares_of, trained
    from probe.reading.recording import open_run

    if len(options.names) > MOST:
        raise ExperimentError(f"--pixels takes {MOST} recordings at most.", "Name fewer.")
    runs = [open_run(name, options.runs) for name in options.names]
    try:
        from probe.figures.pixels_page import measured_here, pixels_page
    except ModuleNotFoundError as error:
        raise ExperimentError(
            "Figures need plotly.", "pip install 'diffusion-probe[dashboard]'"
        ) from error
    recorded = {}
    for run in runs or [open_run("sample")]:
        with contextlib.suppress(ProbeError):  # one that does not say how long its parts took
            recorded[run.name] = shares_of(run)
    return pixels_page(counts(), measured_here(), trained(), recorded, runs)


def _study_of(options: argparse.Namespace) -> Study | None:
    """Return the study that is named, or None if a recording is."""
    from probe.reading.study import find_study, open_study

    path = find_study(options.names[0], options.runs)
    if path is None or len(options.names) > 1:
        return None
    return open_study(path)


def _export_study(study: Study, kind: str, target: Path, options: argparse.Namespace) -> int:
    """Write a study as a page, a picture or a table. Return the exit code."""
    from probe.figures.grid import lay_out, sheet

    if kind not in OF_STUDIES or options.word:
        given = "word" if options.word else kind
        raise ExperimentError(
            f"--{given} is for recordings, and {study.name} is a study.",
            "Write one of --html, --png, --plot, --table.",
        )
    where = {}
    for text in options.where:
        name, equals, label = text.partition("=")
        if not equals:
            raise ExperimentError(f"--where {text}: there is no =.", "Write --where seed=0.")
        where[name] = label
    if kind == "table":
        with stopping.cleanly():
            say(without_home(str(study.save(target))))
        return 0
    layout = lay_out(study, options.rows, options.columns, where)
    if kind == "html":
        from probe.figures.grid_page import grid_page

        return _write(target, grid_page(study, layout).encode())
    if kind == "plot":
        return _write(target, _plotted(study, layout).encode())
    return _write(target, _as_png(sheet(study, layout)))


def _plotted(study: Study, layout: Layout) -> str:
    """Return a page of heat maps. Raise ExperimentError without plotly."""
    try:
        from probe.figures.grid_plot import plot_page
    except ModuleNotFoundError as error:
        raise ExperimentError(
            "Heat maps need plotly.", "pip install 'diffusion-probe[dashboard]', or write --html."
        ) from error
    return plot_page(study, layout)


def _pictures(run: Run, kind: str, word: str | None, image: int) -> bytes:
    """Return the bytes of an animation, or of its frames in one picture."""
    from probe.figures.animation import animated, frames, strip

    pictures = frames(run, word, image)
    if kind != "png":
        return animated(pictures, kind.upper())
    return _as_png(strip(pictures))


def _as_png(picture: Image) -> bytes:
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue()


if __name__ == "__main__":
    guarded(main)
