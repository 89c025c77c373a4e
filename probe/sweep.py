"""python -m probe.sweep GRID.yaml: run a grid of experiments, and only the cells that are missing.

A grid is an experiment's YAML file with axes. Every combination of their values is a cell:

    base: astronaut.yaml                # another file, whose fields are taken over
    axes:
      guidance_scale: 1-10(1)           # from 1 to 10 in steps of 1; 1-10[5]: five values
      seed: [0, 1, 2, 3]
      prompt: {replace: {astronaut: [astronaut, fox]}}
    keep: all                           # or summary, or metrics: what a cell leaves behind

    python -m probe.sweep GRID.yaml --dry-run        # what would run: cells, bytes, time
    python -m probe.sweep GRID.yaml                  # run it; the same again goes on
    python -m probe.sweep GRID.yaml --set steps=8 --set axes.seed=0-9(1)
    python -m probe.sweep GRID.yaml --workers 2      # two processes, each with its model
    python -m probe.sweep GRID.yaml --shard 3/8      # the third of eight parts: for array jobs
    python -m probe.sweep GRID.yaml --cluster tcp://127.0.0.1:8786      # a dask scheduler's

Every cell is checked before the first one runs. A kept cell is an ordinary recording in the grid's
folder `output`. A cell is known by what decides its bits: experiment, weights, versions. What is
there already, from whatever grid, is not computed again. Stop with Ctrl-C at any time. A cell that
fails is listed with its cause; the others go on, and the exit code is 1.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ExperimentError
from probe.format.schema import counted
from probe.output import rows, say, tell
from probe.run import add_talk, size
from probe.settings.grid import load_grid
from probe.settings.strict_yaml import read_yaml
from probe.terminal import (
    Parser,
    before_torch,
    called,
    described,
    fail,
    guarded,
    shell_path,
    without_home,
)

if TYPE_CHECKING:
    from probe.studies.study import Outcome, StudyPlan
    from probe.studies.workers import Workers

RETRIES = 3
SHOWN = 10  # failed cells


def parser(prog: str = "python -m probe.sweep") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "python -m probe.sweep", prog))
    parser.add_argument("grid", type=Path, help="a YAML file with axes")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check every cell and time one model call, but write nothing",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smaller grid that the file has below quick"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the file, or an axis: steps=8, axes.seed=0-9(1); may be repeated",
    )
    parser.add_argument(
        "--keep",
        choices=("all", "summary", "metrics"),
        help="what a cell leaves behind: its recording; pictures and mean maps; measures alone",
    )
    parser.add_argument(
        "--max-bytes",
        type=size,
        metavar="SIZE",
        help="refuse to begin if all cells together take more than this (bytes, or 300MB, 2GB)",
    )
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="only the I-th of N parts, from 1/N to N/N"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes of this machine [1]"
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="a dask scheduler: tcp://HOST:PORT, tls://HOST:PORT, or its scheduler file",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="let cells travel unencrypted to a tcp:// scheduler on another machine",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=RETRIES,
        metavar="N",
        help=f"how often a cell is begun again after its worker died [{RETRIES}]",
    )
    add_talk(parser)
    return parser


def main(arguments: list[str], prog: str = "python -m probe.sweep") -> int:
    """Run the grid that the command line asks for. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    grid = load_grid(options.grid, quick=options.quick, **changes(options))
    before_torch(options.quiet)
    from probe.studies.study import (
        carry_out,
        check_total,
        plan_study,
        read_shard,
        workers_for,
        write_study,
    )

    part = read_shard(options.shard)
    with workers_for(options.workers, options.cluster, options.insecure) as workers:
        if not options.quiet:
            tell(f"Looking at {counted(grid.count, 'cell')} ...")
        plan = plan_study(grid, workers, part)
        if options.dry_run:
            say(*forecast(plan, measured(plan, workers)))
            check_total(plan, options.max_bytes)
            return 0
        check_total(plan, options.max_bytes)
        path = write_study(plan)
        if not options.quiet:
            say(*forecast(plan, None), "")
        progress = (lambda _: None) if options.quiet else (lambda line: tell(without_home(line)))
        try:
            outcome = carry_out(plan, workers, progress, options.retries)
        except KeyboardInterrupt:
            tell("", "Cells that were complete stay; the same command goes on from there.")
            raise
    return say_outcome(plan, outcome, path, options.quiet)


def changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line changes in a grid, each text read as YAML."""
    changed = {} if options.keep is None else {"keep": options.keep}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ExperimentError(
                f"--set: {text} sets nothing.", "Write a field and its value: --set steps=8."
            )
        changed[name.strip()] = read_yaml(f"value: {value}", f"--set {name}").get("value")
    return changed


def measured(plan: StudyPlan, workers: Workers) -> float:
    """Return the seconds of one model call: of cells that are there, else measured now."""
    from probe.studies.survey import seconds_a_call

    if plan.seconds:
        return sum(plan.seconds.values()) / len(plan.seconds)
    if not plan.missing:
        return 0.0
    return float(workers.call(seconds_a_call, plan.missing[0].experiment.resolved()))


def forecast(plan: StudyPlan, seconds: float | None) -> list[str]:
    """Return what is about to run, as lines. `seconds` are those of one model call."""
    from probe.running.planning import size_text
    from probe.studies.study import duration

    table = [
        (axis.name, str(len(axis.values)), _few(axis.labels))
        for axes in plan.grid.dimensions
        for axis in axes
    ]
    parents = sum(cell.index is None for cell in plan.cells)
    more = f", and {parents} unedited to compare with" if parents else ""
    lines = [
        *(rows(table, ("axis", "values", "")) if table else ["No axes: one cell."]),
        "",
        f"{counted(plan.grid.count, 'cell')}{more}. There already: "
        f"{plan.own - len(plan.missing)}. To be computed: {len(plan.missing)}, with "
        f"{counted(plan.calls, 'model call')} and {size_text(plan.bytes)}.",
    ]
    if remark := _unmeasured(plan):
        lines.append(remark)
    if seconds is None and plan.seconds:
        seconds = sum(plan.seconds.values()) / len(plan.seconds)
    if seconds and plan.missing:
        lines.append(
            f"A model call takes {seconds:.2g} s here: about {duration(seconds * plan.calls)} with "
            "one worker."
        )
    return [without_home(line) for line in (*lines, f"Study  {plan.path}")]


def _unmeasured(plan: StudyPlan) -> str:
    """Return a remark on measures that stay empty: they need a parent, and no cell has one."""
    from probe.studies.measures import MEASURES

    empty = [name for name in plan.grid.measures if name in MEASURES]
    if not empty or any(cell.parent is not None for cell in plan.cells):
        return ""
    return f"Empty will be {', '.join(empty)}: they compare an edited cell with the run unedited."


def _few(labels: tuple[str, ...]) -> str:
    return ", ".join(labels) if len(labels) <= 6 else ", ".join((*labels[:5], "...", labels[-1]))


def say_outcome(plan: StudyPlan, outcome: Outcome, path: Path, quiet: bool) -> int:
    """Say what came of a grid. Return the exit code: 1 if a cell failed."""
    for cell, cause, remedy in outcome.failed[:SHOWN]:
        fail(f"{cell}: {cause}", remedy)
    if len(outcome.failed) > SHOWN:
        tell(f"and {len(outcome.failed) - SHOWN} more that failed: study.json lists every cell.")
    probe, _ = called()
    if quiet:
        say(without_home(str(path)))
    else:
        say(
            "",
            f"{counted(outcome.computed, 'cell')} computed, {len(outcome.failed)} failed, "
            f"{plan.own - len(plan.missing)} there already.",
            "",
            f"Study    {without_home(str(path))}",
            f"Pictures {probe} export {shell_path(path)} --html grid.html",
            f"Look     {probe} view --runs {shell_path(path.parent)}",
        )
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    guarded(main)
