"""Handle Ctrl-C, from a command's first line to its last: exit code 130, no traceback.

    begin()                      # a command's first line, before its slow imports
    with cleanly():              # what begins here has to be ended in order: a press waits,
        with breakable():        # and stops the work here, as KeyboardInterrupt
            ...

`begin` imports nothing slow before it has taken over Ctrl-C: until then a press ends in Python's
own traceback. Outside of `cleanly` a press ends the process at once. A second press changes
nothing. LIMIT seconds after the first press the process ends in any case. Without `begin`, as in a
notebook, Python's own Ctrl-C stays and these do nothing.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # typing is slow to import
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import NoReturn

LIMIT = 20.0  # seconds to end in order, for a disk that does not answer

_begun = _breakable = _pressed = _raised = False
_depth = 0


def begin() -> None:
    """Take over Ctrl-C for this process.

    Where it is ignored, as in a job in the background, it stays ignored.
    """
    global _begun
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _press)
        _begun = True
    for number in (0, 1, 2):  # what is opened next must not become the standard output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    import threading  # noqa: F401, here, for a press in a later import would find half of it


def ignore() -> None:
    """Let no further press change anything: the end has begun, and is said once."""
    import contextlib

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end(code: int) -> NoReturn:
    """Exit with this code.

    After Ctrl-C exit at once: torch takes seconds to shut down, and there is nothing left to do.
    """
    ignore()
    if _begun and code == 130:
        os._exit(code)
    raise SystemExit(code)


class cleanly:
    """A block that is ended in order: Ctrl-C waits for its end, or for `breakable` inside it."""

    def __enter__(self) -> None:
        global _depth, _breakable
        self._outer = _breakable
        _breakable = False
        _depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        global _depth, _breakable, _raised
        _depth -= 1
        _breakable = self._outer
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if _pressed and not interrupted and (_depth == 0 or (_breakable and not _raised)):
            _raised = True
            raise KeyboardInterrupt


class breakable:
    """A block inside of `cleanly` in which Ctrl-C stops the work at once, as KeyboardInterrupt."""

    def __enter__(self) -> None:
        global _breakable, _raised
        if _pressed and not _raised:
            _raised = True
            raise KeyboardInterrupt
        _breakable = _depth > 0

    def __exit__(self, *_: object) -> None:
        global _breakable
        _breakable = False


def _press(_number: int, frame: FrameType | None) -> None:
    global _pressed, _raised
    if not _depth:
        _stop(frame)
    if not _pressed:
        import threading

        _pressed = True
        last = threading.Timer(LIMIT, _stop, (frame,))
        last.daemon = True
        last.start()
        if _breakable:
            _raised = True
            raise KeyboardInterrupt


def _stop(frame: FrameType | None) -> NoReturn:
    where = ""
    if "--debug" in sys.argv:
        import traceback

        where = "".join(traceback.format_stack(frame))
    try:
        os.write(2, f"{where}\nStopped.\n".encode(errors="replace"))
    finally:
        os._exit(130)
