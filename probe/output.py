"""The one door to the terminal: no text that passes it can steer one.

    say("one line", "another")       # stdout; raises if it cannot be written
    tell("how far it is")            # stderr; nobody need hear it
    say_json(findings)               # JSON, whatever is in it
    with harmless_streams(): ...     # the same for what libraries print

Escape sequences, control characters and marks that turn the direction of text become "?".
Characters that a terminal's encoding lacks are written as \\u4e2d. A stream that is closed, or
whose reader has gone, such as head, drops what it gets. That is no error: the command ends with its
own exit code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

from probe.errors import StoreError
from probe.text import printable

CURSOR_UP = re.compile(r"(\n|\x1b\[A)*")  # what tqdm writes between several bars


def say(*lines: str) -> None:
    """Print lines on stdout. Raise StoreError if they cannot be written."""
    _say("".join(f"{printable(line)}\n" for line in lines))


def say_json(value: Any) -> None:
    """Print a value as JSON. What a terminal could not show is escaped in JSON's own way."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = json.dumps(value, indent=2, ensure_ascii=not encoding.lower().startswith("utf"))
    if encoding.lower().startswith("utf"):
        text = "".join(
            c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1]
            for c in json.dumps(value, indent=2, ensure_ascii=False)
        )
    _say(f"{text}\n")


def tell(*lines: str) -> None:
    """Print lines on stderr, if anybody hears it.

    A run does not end because its terminal went away.
    """
    with contextlib.suppress(OSError, ValueError), _heard(sys.stderr):
        _put(sys.stderr, "".join(f"{printable(line)}\n" for line in lines))
        flush(sys.stderr)


def ask(question: str) -> str | None:
    """Ask on the terminal. Return the answer, or None if there is nobody to ask."""
    if sys.stdin is None or sys.stdin.closed or not sys.stdin.isatty():
        return None
    try:
        return input(printable(question))
    except EOFError:  # Ctrl-D
        _say("\n")
        return ""


def rows(table: Sequence[Sequence[str]], header: Sequence[str]) -> list[str]:
    """Return the lines of a plain table with aligned columns, of printable characters."""
    lines = [list(header), *([printable(cell) for cell in line] for line in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def flush(stream: TextIO | None) -> None:
    """Write out what waits in a stream. Raise as `say`."""
    with _heard(stream):
        if stream is not None and not stream.closed:
            stream.flush()


def close() -> None:
    """Write out what waits in both streams, as a command's last act. Drop what cannot be written.

    Python would try again at its exit, fail, and replace the exit code by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            flush(stream)
        except (OSError, ValueError):
            _mute(stream)


@contextlib.contextmanager
def harmless_streams() -> Iterator[None]:
    """Make this module's door of both streams meanwhile, also for what libraries print."""
    before = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Door(before[0]))
    sys.stderr = cast(TextIO, _Door(before[1], must_arrive=False))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Door:
    """A text stream, or none, behind which no text can steer a terminal."""

    def __init__(self, stream: TextIO | None, must_arrive: bool = True):
        self._stream, self._must_arrive = stream, must_arrive
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.errors = "backslashreplace"
        self.closed = False

    def write(self, text: str) -> int:
        if not (self.isatty() and CURSOR_UP.fullmatch(text)):
            kept = text.replace("\t", "    ")
            text = "".join(c if c.isprintable() or c in "\n\r" else "?" for c in kept)
        with self._arriving():
            _put(self._stream, text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if self._stream is not None and not self._stream.closed:
            with self._arriving():
                self._stream.flush()

    @contextlib.contextmanager
    def _arriving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            _mute(self._stream)
        except (OSError, ValueError):
            if self._must_arrive:
                raise

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("this stream is closed")
        return self._stream.fileno()


@contextlib.contextmanager
def unsaid(logger: str, text: str) -> Iterator[None]:
    """Keep one message of a library out of its log: by its logger, and a part of its text."""

    def passes(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    log = logging.getLogger(logger)
    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)


def _say(text: str) -> None:
    with _heard(sys.stdout):
        _put(sys.stdout, text)


def _put(stream: TextIO | None, text: str) -> None:
    if stream is not None and not stream.closed:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _mute(stream: TextIO | None) -> None:
    """Send nowhere what waits in a stream, and what is still to come."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, cast(TextIO, stream).fileno())
        os.close(nowhere)


@contextlib.contextmanager
def _heard(stream: TextIO | None) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _mute(stream)
    except OSError as error:
        raise StoreError(
            f"What was to be printed could not be written: {error.strerror or error}.",
            "Free some room there, or send it to another place.",
        ) from error
