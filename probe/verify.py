"""python -m probe.verify RUN: check a recording against itself and, with --model, its model.

From the recording alone:

    manifest, digests                 files, and what was written step by step (probe.proof.checks)
    committed, picture                flags, and the pictures for people (probe.proof.checks)
    schema, labels                    variables (schema_checks) and their labels (label_checks)
    unknown                           what only another version knows (probe.proof.unknown)
    softmax, moments, sums            attention maps (probe.proof.map_checks)
    schedule, guidance, scheduler     every number that follows from another (probe.proof.replay)
    forward                           what picture and noise lead to (probe.proof.forward_checks)

With --model, from its recorded latents (probe.proof.repredict):

    weights, plan, text, predictions, maps, attention, inside, decode, encode

The verdict of each is "exact"; "within tolerance", with the reason, such as another device; or
"failed", with the place. What cannot be checked says why. Exit code 1 if anything failed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import shutil
import sys

from probe.errors import ExperimentError
from probe.output import say, say_json
from probe.proof.verdict import verify
from probe.reading.recording import Run, open_run
from probe.terminal import Parser, add_run, before_torch, described, guarded


def parser(prog: str = "python -m probe.verify") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "python -m probe.verify", prog))
    add_run(parser)
    parser.add_argument(
        "--model",
        action="store_true",
        help="load the recording's model, and let it predict again from the recorded latents",
    )
    parser.add_argument(
        "--steps",
        default="all",
        help='with --model, at which steps: all, "start:stop:step", or "0,5,-1" [all]',
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str], prog: str = "python -m probe.verify") -> int:
    """Check the recording that the command line names. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    if options.steps != "all" and not options.model:
        raise ExperimentError(
            "--steps chooses where the model predicts again, and it is not asked to.",
            "Add --model.",
        )
    run = open_run(options.run, options.runs)
    before_torch(True)
    verification = verify(run, model=options.model, steps=_steps(run, options.steps))
    if options.json:
        say_json(verification.as_json())
    elif sys.stdout.isatty():
        say(*verification.lines(shutil.get_terminal_size().columns))
    else:
        say(*verification.lines(10_000))  # in a pipe, a finding is a line
    return 1 if verification.failed else 0


def _steps(run: Run, text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    from probe.settings.experiment import load_experiment

    return load_experiment({"capture": {"steps": text}}).capture.steps_of(run.tree.sizes["step"])


if __name__ == "__main__":
    guarded(main)
