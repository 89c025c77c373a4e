"""One background thread that works through a queue: the denoising loop never waits for the disk.

The queue is bounded by the bytes that it holds. A slow disk makes the loop wait, and memory does
not grow. The thread's first error stops the run: the next call from outside raises it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from probe.errors import DeviceFailed, OutOfMemory, ProbeError, StoreError
from probe.system import A_NEW_PROCESS, is_device_failure, is_out_of_memory
from probe.text import first_line


class Queue:
    """Items from one producer for one background thread, bounded by the bytes that they hold.

    Every method raises the thread's first error. Ctrl-C may strike between any two instructions of
    the producer, and the queue can still be closed. So it has no condition: a thread that is struck
    just after it took a lock keeps it, and the other waits for ever. `SimpleQueue` is written in C.
    """

    def __init__(self, work: Callable[[Any], None], limit: int):
        self._work, self._limit = work, limit
        self._items: SimpleQueue[tuple[Any, int] | None] = SimpleQueue()
        # The bytes of each finished item. An error is the last entry.
        self._done: SimpleQueue[int | ProbeError] = SimpleQueue()
        self._held = 0
        self._error: ProbeError | None = None
        self._thread = threading.Thread(target=self._run, name="probe-writer", daemon=True)
        self._thread.start()

    def put(self, item: Any, nbytes: int) -> None:
        """Add an item of that many bytes. Wait until there is room for it."""
        self._wait_for(lambda: self._held == 0 or self._held + nbytes <= self._limit)
        self._held += nbytes
        self._items.put((item, nbytes))

    def join(self) -> None:
        """Wait until the thread has done everything that was queued."""
        self._wait_for(lambda: self._held == 0)

    def close(self) -> None:
        """Let the thread finish what is queued, and end it."""
        self._items.put(None)
        self._thread.join()
        self._wait_for(lambda: True)

    def _wait_for(self, enough: Callable[[], bool]) -> None:
        while not self._error and not (self._done.empty() and enough()):
            done = self._done.get()
            if isinstance(done, ProbeError):
                self._error = done
            else:
                self._held -= done
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
    if is_out_of_memory(error):
        ours: ProbeError = OutOfMemory(
            "Out of memory while a step was being written.",
            "Draw fewer images, or record fewer capture.layers.",
        )
    elif is_device_failure(error):  # it is waited for here
        ours = DeviceFailed(f"The device failed: {first_line(error)[:200]}", A_NEW_PROCESS)
    else:
        ours = StoreError(
            f"Writing a step failed: {error!r}.", "Run again with --debug for the traceback."
        )
    ours.__cause__ = error
    return ours
