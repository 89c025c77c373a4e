"""The workers of an existing dask cluster compute cells.

    with Cluster("tcp://127.0.0.1:8786") as workers: ...     # or tls://..., or a scheduler file

Every worker needs probe with its extra `record`, and the folder `output` under the same path. Where
workers have the resource GPU, each cell takes one: `dask worker ... --resources "GPU=1"`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Self, TypeAlias
from urllib.parse import urlsplit

from probe.errors import ExperimentError, ProbeError, RunFailed, UserError
from probe.settings.fields import expand_home
from probe.text import first_line, printable, shorten, shown

PATIENCE = 60.0  # seconds without a scheduler or a worker
LOOK = 1.0  # seconds between two looks at the scheduler
TRANSIENT = 2  # how often dask repeats a call that raised, such as on a full disk
INSTALL = "pip install 'diffusion-probe[cluster]'"

Task: TypeAlias = tuple[str, Callable[..., Any], tuple[Any, ...]]  # key, function, arguments


class Cluster:
    """A dask cluster that somebody else started: its workers, one cell in each at a time."""

    def __init__(self, address: str, insecure: bool = False):
        self.address = scheduler_address(address)
        check_secure(self.address, insecure)
        self._client: Any = None
        self._calls = 0
        self._news = threading.Event()

    def __enter__(self) -> Self:
        try:
            from distributed import Client
        except ImportError as error:
            raise UserError("dask.distributed is not installed.", INSTALL) from error
        try:
            self._client = Client(self.address, timeout=PATIENCE / 6, set_as_default=False)
        except (OSError, ValueError, RuntimeError) as error:  # also of TLS, and of a wrong port
            raise UserError(
                f"The scheduler {self.address} does not answer ({_line(error)}).",
                "Start it (dask scheduler), or check the address; tls:// needs dask's own "
                "settings of certificates.",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # a scheduler that is gone
            self._client.close(timeout=5)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on one of the workers."""
        self._wait_for_workers()
        return next(self._results([(self._key(), function, arguments)], 0))[1]

    def each(self, jobs: Sequence[dict[str, Any]], root: str) -> Iterator[str]:
        """Compute cells, as many at a time as there are workers."""
        from probe.studies.compute import compute

        folder = str(Path(root).absolute())
        tasks = [(self._key(job["address"]), compute, (job, folder)) for job in jobs]
        for _, address in self._results(tasks, TRANSIENT):
            yield address

    def _key(self, name: str = "survey") -> str:
        self._calls += 1
        return f"probe-{name}-{id(self):x}-{self._calls}"

    def _results(self, tasks: Sequence[Task], retries: int) -> Iterator[tuple[str, Any]]:
        """Yield key and result of each task as it ends. Raise what a task raises.

        A task whose workers died is given out again: the cell counts how often it was begun.
        """
        from distributed.scheduler import KilledWorker

        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        gpu, last_worker = self._has_gpus(), time.monotonic()
        while waiting or running:
            slots = self._slots(gpu)
            last_worker = time.monotonic() if slots else last_worker
            if time.monotonic() - last_worker > PATIENCE:
                raise _gone("has no worker any more")
            while waiting and len(running) < max(1, slots):
                task = waiting.pop()
                running[self._submit(task, gpu, retries)] = task
            for future in self._ended(list(running)):
                task = running.pop(future)
                try:
                    yield task[0], future.result(timeout=PATIENCE)
                except KilledWorker:
                    waiting.append((self._key(), *task[1:]))
                except ProbeError:
                    raise
                except (CancelledError, TimeoutError, OSError) as error:
                    raise _gone("does not answer any more") from error

    def _submit(self, task: Task, gpu: bool, retries: int) -> Any:
        key, function, arguments = task
        future = self._client.submit(
            function,
            *arguments,
            key=key,
            pure=False,
            retries=retries,
            resources={"GPU": 1} if gpu else None,
        )
        future.add_done_callback(lambda _: self._news.set())
        return future

    def _ended(self, futures: Sequence[Any]) -> list[Any]:
        """Return the futures that ended within a second, well or not."""
        if not any(future.status != "pending" for future in futures):
            self._news.wait(LOOK)
        self._news.clear()
        if self._client.status not in ("running", "connecting"):
            raise _gone("does not answer any more")
        return [future for future in futures if future.status != "pending"]

    def _workers(self) -> list[dict[str, Any]]:
        """Return what the scheduler knows of its workers. Raise RunFailed if it is gone."""
        try:
            return list(self._client.scheduler_info(n_workers=-1)["workers"].values())
        except (OSError, TimeoutError, RuntimeError) as error:
            raise _gone("does not answer any more") from error

    def _slots(self, gpu: bool) -> int:
        if not gpu:
            return len(self._workers())
        return int(sum(worker["resources"].get("GPU", 0) for worker in self._workers()))

    def _has_gpus(self) -> bool:
        return any(worker["resources"].get("GPU", 0) for worker in self._workers())

    def _wait_for_workers(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise UserError(
                f"The cluster {self.address} has no worker.",
                f"Start one: dask worker {self.address}",
            ) from error


def _gone(what: str) -> RunFailed:
    return RunFailed(
        f"The cluster {what}. Cells that were complete stay.",
        "Start it again, then the same command: it computes only what is missing.",
    )


def _line(error: BaseException) -> str:
    return shorten(printable(first_line(error)), 120)


# --- where a scheduler is -------------------------------------------------------------------------


def scheduler_address(text: str) -> str:
    """Return the address of a scheduler, from an address or a scheduler file. Raise UserError."""
    if text.startswith(("tcp://", "tls://")):
        address = text
    elif "://" in text:
        raise ExperimentError(
            f"cluster: {shown(text)} is neither tcp:// nor tls://.",
            "Write tcp://HOST:PORT, tls://HOST:PORT, or the path of a scheduler file.",
        )
    else:
        try:
            address = json.loads(expand_home(text).read_text(encoding="utf-8"))["address"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExperimentError(
                f"cluster: {shown(text)} is no scheduler file ({_line(error)}).",
                "Write tcp://HOST:PORT, or the path of a scheduler file.",
            ) from error
    parts = urlsplit(str(address))
    if parts.scheme not in ("tcp", "tls") or not parts.hostname or not _port(parts):
        raise ExperimentError(
            f"cluster: {shown(address)} is no address of a scheduler.",
            "Write host and port: tcp://127.0.0.1:8786.",
        )
    return str(address)


def _port(parts: Any) -> int | None:
    try:
        return int(parts.port or 0)
    except ValueError:
        return None


def check_secure(address: str, insecure: bool) -> None:
    """Raise ExperimentError for a scheduler on another machine that is reached in plain text.

    Whoever can read or change what travels there can run anything on the workers.
    """
    parts = urlsplit(address)
    if parts.scheme == "tls" or insecure or is_here(parts.hostname or ""):
        return
    raise ExperimentError(
        f"cluster: {address} is another machine, and tcp:// is neither encrypted nor "
        "authenticated.",
        "Use tls://, or give --insecure where everybody on that network may run code as you.",
    )


def is_here(host: str) -> bool:
    """Return whether a host is this machine: all its addresses are of the loopback or our own."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = _own_addresses()
    return bool(addresses) and all(
        ipaddress.ip_address(str(one).partition("%")[0]).is_loopback or one in own
        for one in addresses
    )


def _own_addresses() -> set[str]:
    """Return the addresses of this machine's own interfaces."""
    try:
        import psutil
    except ImportError:  # it comes with distributed
        return set()
    return {one.address for several in psutil.net_if_addrs().values() for one in several}
