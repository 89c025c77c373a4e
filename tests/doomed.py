"""Record in processes that are killed, interrupted or refused by the disk at a chosen moment.

    with Doomed(asked, Fault("kill", at=120)) as child:    # at the 120th operation on its files
        ended = child.end()                                # exit code, words, acknowledged steps

They are forked from one clean process that has imported torch and built the tiny model, so each
starts at once. They record with the real recorder. An audit hook, below everything that is tested,
sees operations on files. It does not see what goes into an open file: there the write of a step's
part counts, and `Torn` kills inside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from tiny_runs import ask, model_for, pipeline
from tqdm.auto import tqdm

from probe.running import recorder
from probe.running.planning import plan
from probe.running.recorder import record
from probe.settings.experiment import load_experiment
from probe.terminal import guarded
from probe.watching import hooks
from probe.writing.chunks import StepFiles
from probe.writing.store import RunWriter

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC = 0x20000, 0x10000000, 1 << 18, 1 << 14


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`th operation on the recording's files: "kill", "interrupt", or an
    error's name, "ENOSPC".
    """

    act: str = ""
    at: int = 0
    forever: bool = False


@dataclass(frozen=True)
class Torn:
    """While the array number `part` of `step` is written, its file may not grow beyond `size`
    bytes.

    The system then ends the process in the middle of that write, or refuses the rest of it if it is
    to `survive`.
    """

    step: int
    part: int
    size: int
    survive: bool = False


@dataclass
class Ended:
    """How a child ended. `seconds` passed between the signal that it got and its end."""

    code: int
    said: str
    acknowledged: int
    operations: list[
        tuple[int, str]
    ]  # of each: how many steps were acknowledged before, and what it was
    seconds: float = 0.0
    marks: list[str] = field(default_factory=list)


class Doomed:
    """A child that records.

    `pause` are seconds that each call of the UNet takes longer, so that there is time to look.
    """

    def __init__(
        self,
        asked: dict[str, Any],
        fault: Fault | Torn | None = None,
        *,
        pause: float = 0.0,
        room: int = 0,
        unseen: bool = False,
    ):
        self._reports, reporting = CONTEXT.Pipe(duplex=False)
        self._speech, speaking = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(
            target=_live, args=(asked, fault, pause, room, unseen, reporting, speaking), daemon=True
        )
        self.process.start()
        reporting.close()
        speaking.close()
        self._ended = Ended(0, "", 0, [])
        self._signalled = 0.0

    def __enter__(self) -> Doomed:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self._reports.close()
        self._speech.close()

    def wait_for(self, what: str, step: int) -> bool:
        """Wait until it reports that a step is "begun" or "acknowledged"; False if it ended
        before.
        """
        while (report := self._next()) is not None:
            if report == (what, step):
                return True
        return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        self._signalled = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(self.process.pid, number)

    def alive(self) -> bool:
        """Whether it still runs; hears what it reports, so that it need not wait."""
        while self._reports.poll() and self._next() is not None:
            pass
        return self.process.is_alive()

    def end(self) -> Ended:
        """Wait for its end."""
        while self._next() is not None:
            pass
        self.process.join(60)
        done = time.monotonic()
        assert self.process.exitcode is not None, "it hangs"
        said = b""
        while part := os.read(self._speech.fileno(), 65536):
            said += part
        ended = self._ended
        ended.code, ended.said = self.process.exitcode, said.decode()
        ended.seconds = done - self._signalled if self._signalled else 0.0
        return ended

    def _next(self) -> Any:
        try:
            assert self._reports.poll(120), "it hangs"
            report = self._reports.recv()
        except (EOFError, OSError):  # it has ended, perhaps in the middle of its last words
            return None
        what, value = report
        if what == "acknowledged":
            self._ended.acknowledged = value + 1
        elif what == "operations":
            self._ended.operations = value
        elif what == "struck":
            self._ended.marks.append(value)
        elif what == "signalled":
            self._signalled = value
        return report


# --- inside the child -----------------------------------------------------------------------------


def _live(
    asked: dict[str, Any],
    fault: Fault | Torn | None,
    pause: float,
    room: int,
    unseen: bool,
    reports: Connection,
    speech: Connection,
) -> NoReturn:
    assert len(list(Path("/proc/self/task").iterdir())) == 1, (
        "a fork of a process with threads may hang"
    )
    tqdm.set_lock(
        threading.RLock()
    )  # else a killed child leaves one of the system's semaphores behind
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = os.fstat  # what a process wrote outlives it without; not so in test_power_cut.py
    for number in (1, 2):
        os.dup2(speech.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    speech.close()
    if room:
        _small_disk(Path(asked["output"]), room)
    if unseen:  # as where others fill the disk meanwhile
        recorder.free_room = lambda _: None  # type: ignore[assignment]
    steps = _report_steps(reports)
    operations = _watch_files(asked["output"], fault, reports, steps)
    if isinstance(fault, Torn):
        _tear(fault)
    unet = pipeline().unet

    def main(_: list[str]) -> int:
        with hooks.Hooks([(unet, "input", lambda _: time.sleep(pause))] if pause else []):
            record(load_experiment(asked), pipeline())
        return 0

    try:
        guarded(main, [])
    finally:
        _tell(reports, "operations", operations)
        if room:  # the mount is gone with this process
            shutil.copytree(asked["output"], f"{asked['output']}-seen", dirs_exist_ok=True)


_telling = threading.Lock()


def _tell(reports: Connection, what: str, value: Any) -> None:
    with _telling:  # zarr's threads meet the disk at the same time
        reports.send((what, value))


def _report_steps(reports: Connection) -> list[int]:
    """Report when the writing of each step begins, and when it is acknowledged; returns the list of
    these.
    """
    acknowledged: list[int] = []
    write_step = RunWriter._write_step

    def write(self: RunWriter, item: Any) -> None:
        _tell(reports, "begun", item[0])
        write_step(self, item)
        acknowledged.append(item[0])
        _tell(reports, "acknowledged", item[0])

    RunWriter._write_step = write  # type: ignore[method-assign]
    return acknowledged


def _watch_files(
    folder: str, fault: Fault | Torn | None, reports: Connection, acknowledged: list[int]
) -> list[tuple[int, str]]:
    operations: list[tuple[int, str]] = []
    number = itertools.count(1)

    def operation(what: str) -> None:
        operations.append((len(acknowledged), what))
        at = next(number)
        if not isinstance(fault, Fault) or not (
            at == fault.at or (fault.forever and at > fault.at)
        ):
            return
        if fault.act == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.act == "interrupt":
            _tell(reports, "signalled", time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
        else:
            _tell(reports, "struck", what)
            code = getattr(errno, fault.act)
            raise OSError(code, os.strerror(code))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event not in OPERATIONS
            or not isinstance(arguments[0], str)
            or not arguments[0].startswith(folder)
        ):
            return
        only_reads = event == "open" and arguments[2] & os.O_ACCMODE == os.O_RDONLY
        does_nothing = (
            event == "os.mkdir" and Path(arguments[0]).is_dir()
        )  # zarr makes sure of a folder before each write
        if not only_reads and not does_nothing:
            operation(f"{event} {arguments[0].removeprefix(folder)}")

    real_write = StepFiles.write

    def write(own: StepFiles, step: int, value: np.ndarray) -> bytes:
        operation(f"write {own.path}")
        return real_write(own, step, value)

    StepFiles.write = write  # type: ignore[method-assign, assignment]
    sys.addaudithook(audit)
    return operations


def _tear(fault: Torn) -> None:
    if not fault.survive:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    real_write, parts = StepFiles.write, itertools.count()

    def write(own: StepFiles, step: int, value: np.ndarray) -> bytes:
        if step == fault.step and next(parts) == fault.part:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY))
        return real_write(own, step, value)

    StepFiles.write = write  # type: ignore[method-assign, assignment]


def _small_disk(folder: Path, room: int) -> None:
    """Put a file system with so many bytes of room in a folder, which this process alone sees."""
    folder.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    private = libc.unshare(CLONE_NEWNS) == 0
    if not private and libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0:
        private = True  # a user with no number in there may mount, but not make files: EOVERFLOW
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            Path("/proc/self", name).write_text(line)
    mounted = private and libc.mount(None, b"/", None, MS_PRIVATE | MS_REC, None) == 0
    mounted = (
        mounted
        and libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={room}".encode()) == 0
    )
    if not mounted:
        print("no mount:", os.strerror(ctypes.get_errno()), flush=True)
        os._exit(99)


# --- before the fork ------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "doomed", "probe.figures.sheets", "xarray.backends.zarr", "PIL.PngImagePlugin"]
)

# Whoever imports this has the model built and rehearsed, without starting a thread.
plan(model_for(pipeline(), ask(Path("runs"))), ask(Path("runs")))


def start() -> None:
    """Start the process that children are forked from; of the paths in `sys.path` it would know
    nothing by itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
