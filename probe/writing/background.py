"""One background thread that works through a queue, so that the denoising loop never waits for the
disk.

The queue is bounded by the bytes that it holds: a slow disk makes the loop wait, and memory stays
what it was. An error in the thread stops the run: it is raised by the next call from outside.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from probe.errors import OutOfMemory, ProbeError, StoreError


class Queue:
    """Items for one background thread, from one producer, bounded by the bytes they hold. Its first
    error is raised by the next call.

    Ctrl-C may strike between any two instructions of the producer, and the queue can still be
    closed. With a condition it could not: struck just after it has taken the lock, a thread keeps
    it, and the other waits for ever. `SimpleQueue` is in C.
    """

    def __init__(self, work: Callable[[Any], None], limit: int):
        self._work, self._limit = work, limit
        self._items: SimpleQueue[tuple[Any, int] | None] = SimpleQueue()
        self._done: SimpleQueue[int | ProbeError] = (
            SimpleQueue()
        )  # the bytes of each finished item; an error is the last
        self._held = 0
        self._error: ProbeError | None = None
        self._thread = threading.Thread(target=self._run, name="probe-writer", daemon=True)
        self._thread.start()

    def put(self, item: Any, nbytes: int) -> None:
        self._wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
        self._held += nbytes
        self._items.put((item, nbytes))

    def join(self) -> None:
        self._wait_for(lambda: self._held == 0)

    def close(self) -> None:
        """Let the thread finish what is queued, and end it."""
        self._items.put(None)
        self._thread.join()
        self._wait_for(lambda: True)

    def _wait_for(self, enough: Callable[[], bool]) -> None:
        while not self._error and not (self._done.empty() and enough()):
            told = self._done.get()
            if isinstance(told, ProbeError):
                self._error = told
            else:
                self._held -= told
        if self._error:
            raise self._error

    def _run(self) -> None:
        while (queued := self._items.get()) is not None:
            item, nbytes = queued
            try:
                self._work(item)
            except BaseException as error:
                self._done.put(_as_ours(error))
                return
            del queued, item
            self._done.put(nbytes)


def _as_ours(error: BaseException) -> ProbeError:
    if isinstance(error, ProbeError):
        return error
    if isinstance(error, MemoryError):
        ours: ProbeError = OutOfMemory(
            "Out of memory while a step was being written.",
            "Fewer images, or fewer capture.layers.",
        )
    else:
        ours = StoreError(
            f"Writing a step failed: {error!r}.", "Run again with --debug for the traceback."
        )
    ours.__cause__ = error
    return ours
