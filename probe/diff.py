"""probe diff A B: say what differs between two recordings: what was asked, conditions, values.

probe diff A B                 # bit for bit, over the steps that both have
probe diff --pair RUN          # where an edited run parts from its parent, and by how much
probe diff --pair RUN PARENT   # another run in the place of the parent; --json prints JSON

A pair is compared in its latents, pictures, words, heads and modules:

step     root mean square difference of latents and predictions
word     absolute difference of its mean map, as a share of the parent's, and its share of attention
head     share of its attention that goes to other tokens
module   relative change of its output's standard deviation

Exit code 0: the same; 1: something differs.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
from typing import TYPE_CHECKING

from probe.errors import ExperimentError
from probe.output import say, say_json
from probe.terminal import RECORDING, Parser, add_runs, described, guarded

if TYPE_CHECKING:
    from probe.reading.compare import Comparison


def parser(prog: str = "probe diff") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "probe diff", prog))
    parser.add_argument("a", help=RECORDING)
    parser.add_argument("b", nargs="?", help="another [with --pair: the parent of the first]")
    parser.add_argument("--pair", action="store_true", help="compare an edited run and its parent")
    parser.add_argument("--json", action="store_true", help="print JSON (with --pair)")
    add_runs(parser)
    return parser


def main(arguments: list[str], prog: str = "probe diff") -> int:
    """Compare two recordings. Return the exit code."""
    from probe.reading.compare import compare
    from probe.reading.recording import open_run

    command = parser(prog)
    options = command.parse_args(arguments)
    if options.json and not options.pair:
        raise ExperimentError("--json prints a pair.", "Add --pair, or leave out --json.")
    if options.b is None and not options.pair:
        command.error("the following arguments are required: b")
    a = open_run(options.a, options.runs)
    b = None if options.b is None else open_run(options.b, options.runs)
    if not options.pair:
        assert b is not None
        return say_difference(compare(a, b), a.name, b.name)
    pair = a.against_parent(b)
    if options.json:
        say_json(pair.as_json())
    else:
        say(*pair.lines())
    return 0 if pair.same else 1


def say_difference(comparison: Comparison, a: str, b: str) -> int:
    """Print what differs between two recordings of these names. Return the exit code."""
    say(f"{a}  and  {b}", *comparison.lines())
    return 0 if comparison.same else 1


if __name__ == "__main__":
    guarded(main)
