"""python -m probe.run EXPERIMENT.yaml: record a run.

What is asked is a YAML file (see experiments/astronaut.yaml), and every field can be overridden on
the command line:

    python -m probe.run experiments/astronaut.yaml
    python -m probe.run experiments/astronaut.yaml --guidance-scale 2 --seed 7
    python -m probe.run experiments/astronaut.yaml --prompt "A cat on the moon" --dry-run
    python -m probe.run --resume latest    # go on with a run, to the same bits
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from probe.errors import ExperimentError
from probe.output import rows, say, say_json, tell
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.recipe import Recipe
from probe.terminal import (
    Parser,
    add_fields,
    before_torch,
    called,
    described,
    guarded,
    overrides,
    shell_path,
    without_home,
)
from probe.words import read_plainly

if TYPE_CHECKING:
    from probe.reading.recording import Run
    from probe.watching.interface import Plan

EXAMPLE = "experiments/astronaut.yaml"


def parser(prog: str = "python -m probe.run") -> argparse.ArgumentParser:
    made = Parser(prog=prog, description=described(__doc__, "python -m probe.run", prog))
    made.add_argument(
        "experiment", nargs="?", type=Path, help="a YAML file; without one, the default experiment"
    )
    add_limits(made)
    made.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an unfinished recording: a path, the beginning of a name, or latest",
    )
    made.add_argument("--quiet", action="store_true", help="print nothing but the recording's path")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_fields(made)
    return made


def add_limits(made: argparse.ArgumentParser) -> None:
    """Add the options that keep a recording from being begun."""
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be recorded, and how large it would be, without weights or work",
    )
    made.add_argument(
        "--max-bytes",
        type=size,
        metavar="SIZE",
        help="refuse to begin a recording larger than this (bytes, or 300MB, 2GB)",
    )


def main(arguments: list[str], prog: str = "python -m probe.run") -> int:
    options = parser(prog).parse_args(arguments)
    if options.resume is not None:
        return _resume(options)
    asked = load_experiment(options.experiment or Experiment())
    if changes := overrides(options):
        asked = load_experiment(asked, **changes)
    before_torch(options.quiet)
    if options.dry_run:
        return forecast(asked, options.max_bytes)
    from probe.running.recorder import record

    return say_where(
        record(asked, max_bytes=options.max_bytes, progress=not options.quiet), options.quiet
    )


def _resume(options: argparse.Namespace) -> int:
    changes = overrides(options)
    folder = changes.pop("output", "runs")
    if options.experiment or changes or options.dry_run or options.max_bytes is not None:
        raise ExperimentError(
            "A resumed run goes on as it was asked: no experiment, no other option.",
            "Give --resume RUN alone (and --output FOLDER, if it is not in runs).",
        )
    before_torch(options.quiet)
    from probe.reading.recording import open_run

    run = open_run(options.resume, folder)
    from probe.running.recorder import resume

    return say_where(resume(run, progress=not options.quiet), options.quiet)


def say_where(run: Run, quiet: bool) -> int:
    """The last words of a run that was recorded: where it is, and how to look at it."""
    if quiet:
        say(str(run.path))
        return 0
    probe, python = called()
    pictures = ", ".join(sorted(file.name for file in run.path.glob("*.png")))
    path, folder = shell_path(run.path), shell_path(run.path.parent)
    where = "" if run.path.parent == Path("runs") else f" --runs {folder}"
    say(
        "",
        *f"{run!r}".split("\n"),
        "",
        f"Recording  {without_home(str(run.path))}",
        f"Pictures   {pictures} (inside it)",
        "",
    )
    say(
        f"Look       {probe} show {run.name}{where}", f"Check      {probe} verify {run.name}{where}"
    )
    say(
        f"Read       {python} -c 'import probe, sys; print(probe.open_run(sys.argv[1]).tree)' "
        f"{path}"
    )  # the shell knows what ~ is
    return 0


def forecast(asked: Recipe, limit: int | None) -> int:
    """Tell what a recipe will record, and how large that is.

    Raise TooLarge when it is over the limit.
    """
    from probe.diffusion.loading import load
    from probe.running.planning import plan

    scheduler, options = asked.sampler
    model = load(
        asked.model,
        revision=asked.revision,
        variant=asked.variant,
        dtype=asked.dtype,
        device=asked.device,
        weights=False,
        scheduler=scheduler,
        options=options,
    )
    settled = plan(model, asked)
    say_json(asked.resolved())
    return tell_forecast(settled, limit)


def tell_forecast(settled: Plan, limit: int | None) -> int:
    """What a plan will record, and how large that is. Raises TooLarge when it is over the limit."""
    from probe.running.planning import check_size, size_text

    sizes = settled.forecast()
    shapes = {
        a.path: " x ".join(f"{name} {n}" for name, n in zip(a.dims, a.shape, strict=True))
        for a in settled.arrays
    }
    kinds = {a.path: a.dtype for a in settled.arrays}
    large = sorted((path for path in sizes if sizes[path] >= 1000), key=lambda path: -sizes[path])
    if plainly := read_plainly([prompt.text for prompt in settled.prompts.values()]):
        tell(plainly)
    latents = " x ".join(map(str, settled.latent_shape))
    say(
        "",
        f"{settled.calls} model calls, latents {latents}, branches: "
        f"{', '.join(settled.computed_branches)}",
        "",
    )
    say(
        *rows(
            [(f"/{path}", kinds[path], shapes[path], size_text(sizes[path])) for path in large],
            ("variable", "type", "shape", "size"),
        )
    )
    rest = sum(sizes[path] for path in sizes if path not in large)
    total = sum(sizes.values())
    say(
        "",
        f"and {len(sizes) - len(large)} smaller ones, {size_text(rest)}. Together "
        f"{size_text(total)} ({total} bytes).",
        *settled.remarks,
    )
    check_size(settled, limit, None)
    return 0


def size(text: str) -> int:
    """Bytes of a text such as 300MB, for argparse."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    number = text.lower().rstrip("bkmgt").strip()
    try:
        return int(float(number) * units[text.lower()[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 300MB or 2GB") from problem


if __name__ == "__main__":
    guarded(main)
