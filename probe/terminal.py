"""How the commands speak: one line of cause and one of remedy, exit codes, and command lines made from the schema of an experiment.

Exit codes: 0 done, 1 a run that failed, 2 a request that cannot be met, 130 stopped with Ctrl-C. A traceback is shown
only with --debug.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from probe.errors import ProbeError
from probe.experiment import CaptureOptions, Experiment
from probe.fields import Strict
from probe.strict_yaml import printable, read_yaml


class Parser(argparse.ArgumentParser):
    """argparse, with a guess at what a misspelled option meant."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        wrong = [word.split("=")[0] for word in message.split() if word.startswith("--")] if "unrecognized" in message else []
        guess = difflib.get_close_matches(wrong[0], options, n=1, cutoff=0.5) if wrong else []
        fail(message, f"Did you mean {guess[0]}?" if guess else f"See {self.prog} --help.")
        raise SystemExit(2)


def fail(cause: str, remedy: str = "") -> None:
    """Print a cause and a remedy, each as one line, whatever is in them."""
    for head, text in (("error:", cause), ("      ", remedy)):
        if text:
            print(head, printable(without_home(" ".join(text.split()))), file=sys.stderr)


def without_home(text: str) -> str:
    """A text for a log, in which paths in the home folder begin with ~: a shell still takes them, and nobody's name is told."""
    home = str(Path.home())
    return re.sub(rf"(?<![^\s\"'(=:]){re.escape(home)}(?=/)", "~", text) if len(home) > 1 else text


def shell_path(path: Path) -> str:
    """A path as a shell takes it, in a command that people copy: quoted where it must be, with ~ for the home folder."""
    text = without_home(str(path))
    start = "~/" if text.startswith("~/") else ""
    return start + shlex.quote(text[len(start) :])


def harmless(text: str) -> str:
    """Lines without characters that would move the cursor or turn the direction of text, wherever they come from."""
    return "\n".join(map(printable, text.split("\n")))


def quieten(quiet: bool) -> None:
    """Without the libraries' own chatter, before they are imported: what matters of it, probe says itself."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() and not quiet else "1")


def guarded(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command's `main`, turn its errors into lines and exit codes, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        code = main([word for word in given if word != "--debug"])
        sys.stdout.flush()
    except ProbeError as error:
        if debug:
            traceback.print_exc()
        fail(error.cause, error.remedy)
        code = error.exit_code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who presses it again gets no traceback of how Python ends
        if debug:
            traceback.print_exc()
        print("\nStopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python would complain of what is left at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(f"{type(error).__name__}: {error}", "This is a fault of probe itself: run again with --debug, and report what it prints.")
        code = 1
    raise SystemExit(code)


# --- an experiment's fields as options -------------------------------------------------------------------------------


def add_fields(parser: argparse.ArgumentParser, settings: type[Strict] = Experiment) -> None:
    """An option for every field of an experiment, or of other settings: --guidance-scale, --capture.dtype, ..."""
    for prefix, model, title in (
        ("", settings, f"{settings.__name__.lower()} (each overrides the file)"),
        ("capture.", CaptureOptions, "capture (what is recorded)"),
    ):
        group = parser.add_argument_group(title)
        for name, field in model.model_fields.items():
            if name in ("capture", "scheduler_options"):
                continue
            choices = [str(c) for c in get_args(field.annotation)] if str(field.annotation).startswith("typing.Literal") else None
            default = field.get_default(call_default_factory=True)
            shown = (
                "none"
                if default is None
                else ",".join(map(str, default))
                if isinstance(default, tuple)
                else str(default).lower()
                if isinstance(default, bool)
                else default
            )
            help_text = f"{field.description} [{shown}]".replace("%", "%%")
            metavar = "{" + ",".join(choices) + "}" if choices else _metavar(field.annotation)
            group.add_argument(f"--{(prefix + name).replace('_', '-')}", dest=f"field {prefix}{name}", metavar=metavar, help=help_text)


def overrides(options: argparse.Namespace, settings: type[Strict] = Experiment) -> dict[str, Any]:
    """What was given on the command line, by dotted field name, each text read as its field's type."""
    found = {}
    for name, text in vars(options).items():
        if name.startswith("field ") and text is not None:
            path = name.removeprefix("field ")
            model, last = (CaptureOptions, path.split(".")[1]) if "." in path else (settings, path)
            found[path] = _value(model.model_fields[last].annotation, text)
    return found


def _value(annotation: Any, text: str) -> Any:
    kind = _metavar(annotation)
    if kind == "GLOBS":
        return [part for part in text.split(",") if part]
    if text.lower() == "none" and type(None) in get_args(annotation):
        return None
    return read_yaml(f"value: {text}", "command line").get("value") if kind in ("INT", "FLOAT", "BOOL") else text


def _metavar(annotation: Any) -> str:
    text = str(annotation)
    for kind, word in (("tuple[int, ...]", "LIST"), ("tuple", "GLOBS"), ("bool", "BOOL"), ("float", "FLOAT"), ("int", "INT")):
        if (annotation.__class__ is type and annotation.__name__ == kind) or f"{kind}[" in text or f"{kind} " in text or text.startswith(kind):
            return word
    return "TEXT"


def rows(table: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A plain table with aligned columns, of printable characters."""
    lines = [list(header), *([printable(cell) for cell in line] for line in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
