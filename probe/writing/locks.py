"""A recording's lock: a file beside it. Whoever holds it writes the recording, and nobody else.

When its holder dies, the system frees it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import stat
import time
from pathlib import Path

import filelock

from probe.errors import RecordingBusy, RecordingDamaged, StoreError
from probe.system import kind_of, lives
from probe.text import printable

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
EXITING, KILLED = 0x4, 1 << 8  # Linux: in the flags of a process, and among its pending signals


class Lock:
    """The lock of the recording at a path. Nothing is done before `acquire`."""

    def __init__(self, recording: Path):
        self._recording = recording
        self.file = recording.with_name(f".{recording.name}.lock")
        self._lock = filelock.FileLock(self.file)

    def acquire(self, remedy: str = "Stop its writer first.", patience: float = 0) -> None:
        """Take the lock, or wait up to `patience` seconds for a killed writer to die.

        Raise RecordingBusy with that remedy if somebody has it, StoreError if the disk has no
        locks, RecordingDamaged if its file is a link, a folder or a pipe, OSError.
        """
        until = time.monotonic() + patience
        while not self._take():
            if time.monotonic() > until or not self._holder_is_dying():
                raise RecordingBusy(
                    f"{printable(self._recording.name)} is being written {self._holder()}.", remedy
                )
            time.sleep(0.05)

    def _take(self) -> bool:
        for _ in range(10):
            before = self._check()
            try:
                self._lock.acquire(timeout=0)
                return True
            except filelock.Timeout:
                if before is not None and before == self._check():
                    return False  # else its holder has just taken it away
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise StoreError(
                    f"The disk of {printable(str(self._recording))} has no locks "
                    f"({os.strerror(error.errno)}): two writers could meet.",
                    "Record on another disk: --output FOLDER. What is complete can be moved here.",
                ) from error
        return False

    def release(self, keep: bool = False) -> None:
        """Let go, and take the lock's file away unless it is to stay."""
        try:
            if not keep:
                # Before the release: a writer that waits for the old file sees that it is gone.
                self.file.unlink(missing_ok=True)
        except OSError:  # it stays, held by nobody: probe gc takes it
            pass
        finally:
            self._lock.release()

    def _check(self) -> tuple[int, int] | None:
        """Return which file the lock is, or None. Raise RecordingDamaged if it is no plain file."""
        try:
            status = os.lstat(self.file)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            what = "a link" if stat.S_ISREG(status.st_mode) else kind_of(status)  # a hard one
            raise RecordingDamaged(
                f"{printable(str(self.file))} is no lock: it is {what}.",
                f"Remove it yourself, then try again: rm{' -r' * stat.S_ISDIR(status.st_mode)} "
                f"{shlex.quote(printable(str(self.file)))}",
            )
        return status.st_dev, status.st_ino

    def _writer(self) -> tuple[int, str]:
        """Return the process that the recording names as its writer, and its host.

        Raise what Python raises if it names none.
        """
        writer = json.loads((self._recording / "zarr.json").read_text())["attributes"]["writer"]
        return int(writer["pid"]), str(writer["host"])

    def _holder(self) -> str:
        try:
            pid, host = self._writer()
            return f"by process {pid} on {printable(host)}"
        except (OSError, ValueError, LookupError, TypeError):
            return "by another process"

    def _holder_is_dying(self) -> bool:
        """Tell whether the writer is dead, or was killed and has not ended yet.

        A killed process frees its memory first and its lock last.
        """
        try:
            pid, host = self._writer()
            if host != socket.gethostname():
                return False
            if not lives(pid):
                return True
            process = Path(f"/proc/{pid}")
            state, *_, flags = (process / "stat").read_text().rpartition(")")[2].split()[:7]
            status = (process / "status").read_text()
            pending = re.findall(r"(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", status)
            killed = any(int(signals, 16) & KILLED for signals in pending)
            return state in "ZX" or bool(int(flags) & EXITING) or killed
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            return False
