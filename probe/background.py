"""One background thread that works through a queue, so that the denoising loop never waits for the disk.

The queue is bounded by the bytes that it holds: a slow disk makes the loop wait, and memory stays what it was. An error
in the thread stops the run: it is raised by the next call from outside.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from probe.errors import OutOfMemory, ProbeError, StoreError


class Queue:
    """Items for one background thread, bounded by the bytes they hold. Its first error is raised by the next call."""

    def __init__(self, work: Callable[[Any], None], limit: int):
        self._work, self._limit = work, limit
        self._items: deque[tuple[Any, int]] = deque()
        self._held = self._busy = 0
        self._error: BaseException | None = None
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="probe-writer", daemon=True)
        self._thread.start()

    def put(self, item: Any, nbytes: int) -> None:
        with self._change:
            self._change.wait_for(lambda: self._error or self._held == 0 or self._held + nbytes <= self._limit)
            self._raise()
            self._items.append((item, nbytes))
            self._held += nbytes
            self._change.notify_all()

    def join(self) -> None:
        with self._change:
            self._change.wait_for(lambda: self._error or self._held == 0)
            self._raise()

    def close(self) -> None:
        """Let the thread finish what is queued, and end it."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._items or self._closed)
                if not self._items or self._error:
                    return
                item, nbytes = self._items[0]
            try:
                self._work(item)
            except BaseException as error:
                with self._change:
                    self._error = error
                    if not isinstance(error, ProbeError):
                        self._error = StoreError(f"Writing a step failed: {error!r}.", "Run again with --debug for the traceback.")
                        if isinstance(error, MemoryError):
                            self._error = OutOfMemory("Out of memory while a step was being written.", "Fewer images, or fewer capture.layers.")
                        self._error.__cause__ = error
                    self._change.notify_all()
                return
            del item
            with self._change:
                self._items.popleft()
                self._held -= nbytes
                self._change.notify_all()
