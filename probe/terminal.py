"""How the commands speak: cause and remedy, a line each, exit codes, and options made of fields.

Exit codes: 0 done, 1 failed or something differs, 2 a request that cannot be met, 130 stopped with
Ctrl-C. A traceback is shown only with --debug.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import inspect
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from probe import output, stopping
from probe.errors import ProbeError
from probe.output import say, tell
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment
from probe.settings.fields import home
from probe.settings.recipe import Recipe
from probe.settings.strict_yaml import read_yaml
from probe.system import REMEDY, check_here


class Parser(argparse.ArgumentParser):
    """argparse, with a guess at what a misspelled option meant."""

    def __init__(self, **options: Any):
        if sys.version_info >= (3, 14):
            options["color"] = False
        options["description"] = inspect.cleandoc(options.get("description") or "")
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        given = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        wrong = given if "unrecognized" in message else []
        if "--version" in wrong:
            fail(message, "See probe --version.")
            raise SystemExit(2)
        guess = difflib.get_close_matches(wrong[0], options, n=1, cutoff=0.5) if wrong else []
        fail(message, f"Did you mean {guess[0]}?" if guess else f"See {self.prog} --help.")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        speak = tell if file is not None and file is sys.stderr else say
        speak(*message.removesuffix("\n").split("\n"))


def folder(text: str) -> str:
    """Return a folder's name, for argparse. Raise ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("no folder is named; write one, or leave it out for runs")
    return text


RECORDING = (
    "a path, the beginning of a name, latest, or sample (also sample-guidance-8, sample-noising)"
)


def add_run(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", default="latest", help=f"{RECORDING} [latest]")
    add_runs(parser)


def add_runs(parser: Parser) -> None:
    parser.add_argument("--runs", type=folder, default="runs", help="folder of recordings [runs]")


def add_folder(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", type=folder, help="folder of recordings [runs]")
    parser.add_argument(
        "--runs", type=folder, default="runs", help="the same, as other commands name it [runs]"
    )


def add_save(parser: Parser) -> None:
    parser.add_argument(
        "--save", metavar="FILE", type=Path, help="write the picture there [into the recording]"
    )


def fail(cause: str, remedy: str = "") -> None:
    """Print a cause and a remedy, each as one line, whatever is in them."""
    for head, text in (("error:", cause), ("      ", remedy)):
        if text:
            tell(f"{head} {without_home(' '.join(text.split()))}")


def described(doc: str | None, module: str, prog: str) -> str:
    """Return a module's docstring as a command's description, under the name it was called by."""
    return (doc or "").replace(module, prog)


def without_home(text: str) -> str:
    """Return a text in which paths in the home folder begin with ~.

    A shell still takes them, and a log does not tell the user's name.
    """
    own = home()
    return re.sub(rf"(?<![^\s\"'(=:]){re.escape(str(own))}(?=/)", "~", text) if own else text


def shell_path(path: Path) -> str:
    """Return a path for a command that people copy: quoted, with ~ for the home folder."""
    text = without_home(str(path))
    start = "~/" if text.startswith("~/") else ""
    return start + shlex.quote(text[len(start) :])


def called() -> tuple[str, str]:
    """Return what a shell calls probe and Python by.

    It is their names, or the path of this Python if `probe` is not on PATH.
    """
    if shutil.which("probe"):
        return "probe", "python"
    python = Path(sys.executable)
    if python.is_relative_to(here := Path.cwd()):
        python = python.relative_to(here)
    return f"{shell_path(python)} -m probe", shell_path(python)


def before_torch(quiet: bool) -> None:
    """Check what torch needs of the current folder, and silence the libraries' own messages.

    Call it before they are imported.
    """
    check_here()
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() and not quiet else "1"
    )


def guarded(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command's `main`, turn its errors into lines and exit codes, and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    if sys.flags.optimize > 1:  # help is made of docstrings, and so are parts of the libraries
        main = _without_docstrings
    with output.harmless_streams():
        try:
            code = _code_of(main, [word for word in given if word != "--debug"], debug)
        except KeyboardInterrupt:
            stopping.ignore()
            if debug:
                _show_traceback()
            tell("", "Stopped.")
            code = 130
    output.close()
    stopping.end(code)


def _code_of(main: Callable[[list[str]], int], arguments: list[str], debug: bool) -> int:
    try:
        try:
            code = main(arguments)
        except SystemExit as done:  # argparse's, after --help or a wrong option
            code = done.code if isinstance(done.code, int) else 0
        output.flush(sys.stdout)
        return code
    except ProbeError as error:
        if debug:
            _show_traceback()
        fail(error.cause, error.remedy)
        code = error.exit_code
    except Exception as error:
        if debug:
            _show_traceback()
        fail(*_condition(error))
        code = 1
    return code


def _without_docstrings(_: list[str]) -> int:
    fail(
        "python -OO takes away texts that probe and its libraries need.",
        "Leave out -OO, or PYTHONOPTIMIZE=2; -O will do.",
    )
    return 2


def _show_traceback() -> None:
    tell(*traceback.format_exc().rstrip("\n").split("\n"))


def _condition(error: Exception) -> tuple[str, str]:
    """Return cause and remedy of an error that is not ours.

    It is one of the system, of a package that is missing, or a fault of probe.
    """
    package = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if isinstance(error, ModuleNotFoundError) and package in OF_RECORD:
        cause = f"This needs {package}, which is not installed."
        return cause, "pip install 'diffusion-probe[record]'"
    if isinstance(error, MemoryError):
        cause = "The machine has no memory left."
        return cause, "Close other programs, or take a smaller recording."
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{shown_path(error.filename)}: " if error.filename is not None else ""
        remedy = SYSTEM.get(error.errno, "Check the disk and its permissions, then try again.")
        return f"{where}{os.strerror(error.errno)}.", remedy
    return (
        f"{type(error).__name__}: {error}",
        "This is a fault of probe itself: run again with --debug, and report what it prints.",
    )


# Packages of the extra `record`.
OF_RECORD = "torch diffusers transformers huggingface_hub safetensors scipy tqdm peft".split()
SYSTEM = REMEDY | {
    errno.ENOSPC: "Free some room on that disk.",
    errno.EDQUOT: "Free some room on that disk.",
    errno.EROFS: "Nothing can be written there: name another place.",
    errno.EACCES: "Ask its owner for permission, or name another place.",
    errno.EPERM: "Ask its owner for permission, or name another place.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOENT: "Check that it exists, and that the folder you are in still does.",
    errno.ENOTDIR: "A file is where a folder should be: name another place.",
    errno.EISDIR: "A folder is where a file should be: name another place.",
}


def shown_path(path: object) -> str:
    """Return a path for a message: a long one without its middle."""
    text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else str(path)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


# --- an experiment's fields as options ------------------------------------------------------------


def add_fields(parser: argparse.ArgumentParser, settings: type[Recipe] = Experiment) -> None:
    """Add an option for every field of an experiment, or of other settings.

    They are called --guidance-scale, --capture.dtype and so on.
    """
    for prefix, fields, title in (
        ("", settings.ordered_fields(), f"{settings.__name__.lower()} (each overrides the file)"),
        ("capture.", CaptureOptions.model_fields, "capture (what is recorded)"),
    ):
        group = parser.add_argument_group(title)
        for name, field in fields.items():
            if name in ("capture", "scheduler_options", "edits", "loras"):
                continue
            choices = ",".join(map(str, get_args(field.annotation)))
            is_choice = str(field.annotation).startswith("typing.Literal")
            default = _as_typed(field.get_default(call_default_factory=True))
            group.add_argument(
                f"--{(prefix + name).replace('_', '-')}",
                dest=f"field {prefix}{name}",
                metavar=f"{{{choices}}}" if is_choice else _metavar(field.annotation),
                help=f"{field.description} [{default}]".replace("%", "%%"),
            )


def _as_typed(default: object) -> str:
    """Return a field's default as it is typed on a command line."""
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def overrides(options: argparse.Namespace, settings: type[Recipe] = Experiment) -> dict[str, Any]:
    """Return what was given on the command line, by dotted field name.

    Each text is read as its field's type.
    """
    changes = {}
    for name, text in vars(options).items():
        if name.startswith("field ") and text is not None:
            path = name.removeprefix("field ")
            model, last = (CaptureOptions, path.split(".")[1]) if "." in path else (settings, path)
            changes[path] = _value(model.model_fields[last].annotation, text)
    return changes


def _value(annotation: Any, text: str) -> Any:
    kind = _metavar(annotation)
    if kind == "GLOBS":
        return [part for part in text.split(",") if part]
    if text.lower() == "none" and type(None) in get_args(annotation):
        return None
    if kind in ("INT", "FLOAT", "BOOL"):
        return read_yaml(f"value: {text}", "command line").get("value")
    return text


METAVARS = (
    *(("tuple[int, ...]", "LIST"), ("tuple", "GLOBS")),
    *(("bool", "BOOL"), ("float", "FLOAT"), ("int", "INT")),
)


def _metavar(annotation: Any) -> str:
    text = str(annotation)
    plain = annotation.__name__ if annotation.__class__ is type else None
    for kind, word in METAVARS:
        if kind == plain or f"{kind}[" in text or f"{kind} " in text or text.startswith(kind):
            return word
    return "TEXT"
