"""Who computes cells on this machine: this process, or several of its own.

    with Here() as workers: ...
    with Processes(2) as workers:
        workers.call(survey, experiments)          # one call, where cells are computed
        for address in workers.each(jobs, root):   # as they end, in any order
            ...

A process is told what to do on its standard input, a line of JSON at a time, and answers on its
standard output. One that dies is replaced, and its cell is given out again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from probe import errors
from probe.errors import ProbeError, RunFailed

MOST_DEATHS = 5  # one after the other, without a cell in between: no worker can live here
MODULE = "probe.studies.workers"


class Workers(Protocol):
    """Whoever computes cells."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None: ...

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of probe gives where cells are computed. Raise its errors."""
        ...

    def each(self, jobs: Sequence[dict[str, Any]], root: str) -> Iterator[str]:
        """Compute cells. Yield the address of each as it ends, well or not."""
        ...


class Here:
    """This process: one cell after the other."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function."""
        return function(*arguments)

    def each(self, jobs: Sequence[dict[str, Any]], root: str) -> Iterator[str]:
        """Compute cells one by one, and yield the address of each."""
        from probe.studies.compute import compute

        for job in jobs:
            yield compute(job, root)


class Processes:
    """Several processes of this machine, each with a model and a share of the processors."""

    def __init__(self, count: int):
        self.count = count
        self._live: list[_Process] = []
        self._deaths = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._live:
            process.end()
        self._live.clear()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in one of the processes."""
        if not self._live:
            self._live.append(_Process(self.count))
        answer = self._live[0].ask(function, *arguments)
        if answer is None:
            raise RunFailed("A worker died as it started.", "Run without --workers to see why.")
        return answer

    def each(self, jobs: Sequence[dict[str, Any]], root: str) -> Iterator[str]:
        """Compute cells, one in each process at a time. Yield the address of each as it ends."""
        from probe.studies.compute import compute

        waiting, running = deque(jobs), 0
        with selectors.DefaultSelector() as selector:
            while len(self._live) < min(self.count, len(jobs)):
                self._live.append(_Process(self.count))
            for process in self._live:
                selector.register(process.answers, selectors.EVENT_READ, process)
                process.job = None
            while True:
                for process in self._live:
                    if process.job is None and waiting:
                        process.job = waiting.popleft()
                        process.tell(compute, process.job, root)
                        running += 1
                if not running:
                    return
                for key, _ in selector.select():
                    process = key.data
                    job, answer = process.job, process.answer()
                    running -= 1
                    process.job = None
                    if answer is not None:
                        self._deaths = 0
                        yield str(answer)
                        continue
                    if job is not None:
                        waiting.appendleft(job)
                    selector.unregister(process.answers)
                    self._replace(process)
                    selector.register(self._live[-1].answers, selectors.EVENT_READ, self._live[-1])

    def _replace(self, dead: _Process) -> None:
        self._live.remove(dead)
        dead.end()
        self._deaths += 1
        if self._deaths >= MOST_DEATHS and dead.silent:
            raise RunFailed(
                f"{MOST_DEATHS} workers died one after the other before they could do anything.",
                "Run without --workers to see why.",
            )
        self._live.append(_Process(self.count))


class _Process:
    """One process that does what it is told."""

    def __init__(self, among: int):
        path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))  # noqa: PTH109
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(among)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions, self.answers = self._process.stdin, self._process.stdout
        self.job: dict[str, Any] | None = None
        self.silent = True  # it has answered nothing yet

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Give the process something to do. If it is dead, its answer says so."""
        question = [f"{function.__module__}:{function.__qualname__}", list(arguments)]
        with contextlib.suppress(OSError):
            self._questions.write(json.dumps(question).encode() + b"\n")
            self._questions.flush()

    def answer(self) -> Any | None:
        """Return its answer, or None if it is dead. Raise the error that it raised."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            return None
        self.silent = False
        answer = json.loads(line)
        if "error" in answer:
            raise error_of(*answer["error"])
        return answer["value"]

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any | None:
        """Return what a function gives in the process, or None if it died meanwhile."""
        self.tell(function, *arguments)
        return self.answer()

    def end(self) -> None:
        """End the process. What it was writing can be gone on with."""
        self._process.terminate()
        self._process.wait()
        for stream in (self._questions, self.answers):
            with contextlib.suppress(OSError):
                stream.close()


def error_of(kind: str, cause: str, remedy: str) -> ProbeError:
    """Return the error that was raised in another process."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, ProbeError):
        return known(cause, remedy)
    return RunFailed(cause, remedy)


def serve(among: int) -> None:
    """Do what standard input says until it ends: the life of a process of `Processes`."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that gives the work
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), processors() // among)))
    for line in sys.stdin.buffer:
        name, arguments = json.loads(line)
        module, _, function = name.partition(":")
        try:
            answer = {"value": getattr(importlib.import_module(module), function)(*arguments)}
        except ProbeError as error:
            answer = {"error": [type(error).__name__, error.cause, error.remedy]}
        except Exception as error:
            answer = {"error": ["RunFailed", f"{type(error).__name__}: {error}", ""]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def processors() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


if __name__ == "__main__":
    serve(int(sys.argv[1]))
