"""A stopwatch on the loop of `probe.record`: how much is the model's, how much is recording's.

It stands in for two names, `denoise` of `probe.running.perform` and `hooked` of
`probe.running.session`, and passes everything on.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from probe.diffusion.sampling import denoise
from probe.running import perform, session
from probe.watching.hooks import Hooks
from probe.watching.interface import hooked
from probe.writing.store import RunWriter


@dataclass
class Took:
    """Seconds of a loop without its first step: CPU of all threads, wall, and CPU of recording.

    The latter is split by where it is spent. `once` is what recording adds to the first step, which
    also reads what the text offers.
    """

    cpu: float = 0.0
    wall: float = 0.0
    hooks: float = 0.0
    handing_over: float = 0.0
    writing: float = 0.0
    once: float = 0.0

    @property
    def own(self) -> float:
        return self.hooks + self.handing_over + self.writing


def now() -> tuple[float, float, float]:
    """Return CPU time of the process, CPU time of this thread, and wall time."""
    return time.process_time(), time.thread_time(), time.perf_counter()


def timed_hooks(took: Took, *captures: Any) -> Hooks:
    """Return the hooks of some captures, timed if they are those of the loop."""
    if took.cpu or not any(capture.component == "unet" for capture in captures):
        return hooked(*captures)

    def timed(callback: Callable[[Any], None]) -> Callable[[Any], None]:
        def watch(value: Any) -> None:
            start = time.thread_time()
            callback(value)
            took.hooks += time.thread_time() - start

        return watch

    return Hooks(
        (module, when, timed(callback))
        for capture in captures
        for module, when, callback in capture.watches()
    )


def nothing() -> None:
    pass


@contextlib.contextmanager
def stopwatch(
    took: Took, begin: Callable[[], None] = nothing, end: Callable[[], None] = nothing
) -> Iterator[None]:
    """Time the loop of a `record` in this block, from its second step until all is on disk.

    `begin` is called before its first step, `end` after its last.
    """
    begun: list[tuple[float, float, float]] = []
    inside = 0.0

    def steps(*args: Any, **named: Any) -> Iterator[Any]:
        nonlocal inside
        loop = denoise(*args, **named)
        begin()
        first = now()
        for number in range(10**6):
            start = time.thread_time()
            step = next(loop, None)
            inside += time.thread_time() - start
            if step is None:
                return
            yield step
            if number == 0:
                begun.append(now())
                took.once = took.hooks + begun[0][0] - first[0] - inside
                took.hooks = inside = 0.0

    flush = RunWriter.flush

    def flushed(writer: RunWriter) -> None:
        flush(writer)
        if begun and not took.cpu:
            took.cpu, thread, took.wall = (
                after - before for after, before in zip(now(), begun[0], strict=True)
            )
            took.handing_over, took.writing = thread - inside, took.cpu - thread
            end()

    with (
        mock.patch.object(session, "hooked", functools.partial(timed_hooks, took)),
        mock.patch.object(perform, "denoise", steps),
        mock.patch.object(RunWriter, "flush", flushed),
    ):
        yield
