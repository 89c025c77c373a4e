"""python -m probe.run EXPERIMENT.yaml: record a run.

The experiment is a YAML file (see experiments/astronaut.yaml). Every field can be overridden on the
command line:

    python -m probe.run experiments/astronaut.yaml
    python -m probe.run experiments/astronaut.yaml --guidance-scale 2 --seed 7
    python -m probe.run experiments/astronaut.yaml --prompt "A cat on the moon" --dry-run
    python -m probe.run edited.yaml --unedited    # the parent of an edited run, to compare with
    python -m probe.run --resume latest    # go on with a run, to the same bits

Only edits, loras and scheduler_options stand in the file alone: see docs/edits.md.
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
from probe.system import LESS_MEMORY
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
    from probe.diffusion.family import Family
    from probe.reading.recording import Run
    from probe.watching.interface import Plan

EXAMPLE = "experiments/astronaut.yaml"


def parser(prog: str = "python -m probe.run") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "python -m probe.run", prog))
    parser.add_argument(
        "experiment", nargs="?", type=Path, help="a YAML file; without one, the default experiment"
    )
    parser.add_argument(
        "--unedited", action="store_true", help="leave the edits of the file out: the parent run"
    )
    add_limits(parser)
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with an unfinished recording: a path, the beginning of a name, or latest",
    )
    add_talk(parser)
    add_fields(parser)
    return parser


def add_talk(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much is printed."""
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but the recording's path"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that keep a recording from being begun."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be recorded, how large it would be, and with --device cuda what it "
        "takes of a GPU's memory, without weights, work or a GPU",
    )
    parser.add_argument(
        "--max-bytes",
        type=size,
        metavar="SIZE",
        help="refuse to begin a recording larger than this (bytes, or 300MB, 2GB)",
    )


def main(arguments: list[str], prog: str = "python -m probe.run") -> int:
    """Record what the command line asks for. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    if options.resume is not None:
        return _resume(options)
    experiment = load_experiment(options.experiment or Experiment())
    if changes := overrides(options) | ({"edits": []} if options.unedited else {}):
        experiment = load_experiment(experiment, **changes)
    before_torch(options.quiet)
    if options.dry_run:
        return say_forecast(experiment, options.max_bytes)
    from probe.running.recorder import record

    run = record(experiment, max_bytes=options.max_bytes, progress=not options.quiet)
    return say_where(run, options.quiet)


def _resume(options: argparse.Namespace) -> int:
    changes = overrides(options)
    folder = changes.pop("output", "runs")
    more = options.experiment or options.unedited or options.dry_run
    if more or changes or options.max_bytes is not None:
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
    """Say where a recording is, and how to look at it: the last words of a run. Return 0."""
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
    say(f"Look       {probe} show {run.name}{where}")
    say(f"Check      {probe} verify {run.name}{where}")
    if dict(run.attributes).get("parent_identity"):
        say(f"Compare    {probe} diff --pair {run.name}{where}  # its parent: probe run --unedited")
    code = "import probe, sys; print(probe.open_run(sys.argv[1]).tree)"  # a shell expands ~
    say(f"Read       {python} -c '{code}' {path}")
    return 0


def say_forecast(recipe: Recipe, limit: int | None) -> int:
    """Say what a recipe would record, and how large that would be. Return 0.

    Raise TooLarge if it is over the limit.
    """
    from probe.diffusion.loading import load, on_cuda
    from probe.diffusion.preparing import prepared
    from probe.running.planning import check_size, plan

    scheduler, options = recipe.sampler
    model = load(
        recipe.model,
        revision=recipe.revision,
        variant=recipe.variant,
        dtype=recipe.dtype,
        device=recipe.device,
        weights=False,
        scheduler=scheduler,
        options=options,
    )
    model = prepared(model, recipe)
    planned = plan(model, recipe)
    say_json(recipe.resolved())
    _say_sizes(planned)
    if on_cuda(recipe.device):
        _say_memory(model, planned)
    check_size(planned, limit, None)
    return 0


def _say_sizes(plan: Plan) -> None:
    """Say which variables a plan would record, the largest first."""
    from probe.running.planning import size_text

    sizes = plan.forecast()
    table, small, total = [], 0, sum(sizes.values())
    for spec in sorted(plan.arrays, key=lambda spec: -sizes[spec.path]):
        if sizes[spec.path] >= 1000:
            lengths = zip(spec.dims, spec.shape, strict=True)
            shape = " x ".join(f"{name} {length}" for name, length in lengths)
            table.append((f"/{spec.path}", spec.dtype, shape, size_text(sizes[spec.path])))
        else:
            small += sizes[spec.path]
    if plainly := read_plainly([prompt.text for prompt in plan.prompts.values()]):
        tell(plainly)
    of = "latents" if plan.rehearsal.has_vae else "pixels"
    latents = f"{of} {' x '.join(map(str, plan.latent_shape))}"
    branches = ", ".join(plan.computed_branches)
    say("", f"{plan.calls} model calls, {latents}, branches: {branches}", "")
    say(*rows(table, ("variable", "type", "shape", "size")), "")
    say(
        f"and {len(sizes) - len(table)} smaller ones, {size_text(small)}. Together "
        f"{size_text(total)} ({total} bytes).",
        *plan.remarks,
    )


def _say_memory(model: Family, plan: Plan) -> None:
    """Say what a plan would keep in the memory of a GPU, and what is free there."""
    from probe.running.device_memory import device_memory, free_on_cuda
    from probe.running.planning import size_text

    recipe = plan.recipe
    needed, free = device_memory(model, plan), free_on_cuda(recipe.device)
    edits = isinstance(recipe, Experiment) and bool(recipe.edits)
    parts = [
        ("weights", needed.weights, "the whole run"),
        ("a call of the denoiser", needed.call, "at each step"),
        ("recording it", needed.recording, "at each step"),
    ]
    if needed.decoding:
        between = "between steps, and " * bool(plan.decoded)
        parts.append(("decoding", needed.decoding, f"{between}after the last step"))
    say(
        "",
        f"On the GPU at most {size_text(needed.most)} at once, and what CUDA itself takes: some "
        "hundred MB for its context, more for the workspaces of its libraries.",
        "",
        *rows([(name, size_text(n), when) for name, n, when in parts], ("what", "size", "when")),
        "",
    )
    if needed.graphs:
        say(f"CUDA graphs hold {size_text(needed.graphs)} of that until the last step.")
    if others := [name for name, there in (("edits", edits), ("LoRAs", recipe.loras)) if there]:
        say(f"What {' and '.join(others)} take comes on top: it is not counted.")
    if free is not None:
        say(f"Free there: {size_text(free)}.")
        if free < needed.most:
            say(f"It does not fit. {LESS_MEMORY}")


def size(text: str) -> int:
    """Return the bytes of a text such as 300MB, for argparse. Raise ArgumentTypeError."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    number = text.lower().rstrip("bkmgt").strip()
    try:
        return int(float(number) * units[text.lower()[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError) as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 300MB or 2GB") from problem


if __name__ == "__main__":
    guarded(main)
