"""A recording's lock, a file beside it: who holds it writes the recording, and nobody else.

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
        """Take it at once. A writer that was killed may need a moment to die: for that, wait up to
        `patience` seconds.

        Raises RecordingBusy with that remedy where somebody has it, StoreError where the disk has
        no locks, RecordingDamaged where it is a link, a folder or a pipe, OSError.
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
        """Take the lock's file away, unless it is to stay, and let go."""
        try:
            if not keep:
                self.file.unlink(
                    missing_ok=True
                )  # before the release: whoever waits for the old file then sees that it is gone
        except OSError:  # it stays, held by nobody: probe gc takes it
            pass
        finally:
            self._lock.release()

    def _check(self) -> tuple[int, int] | None:
        """Which file it is, or None. What is no plain file of its own is not touched."""
        try:
            found = os.lstat(self.file)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            what = "a link" if stat.S_ISREG(found.st_mode) else kind_of(found)  # a hard one
            raise RecordingDamaged(
                f"{printable(str(self.file))} is no lock: it is {what}.",
                f"Remove it yourself, then try again: rm{' -r' * stat.S_ISDIR(found.st_mode)} "
                f"{shlex.quote(printable(str(self.file)))}",
            )
        return found.st_dev, found.st_ino

    def _writer(self) -> tuple[int, str]:
        """The process that the recording names as its writer, and its host.

        Raises what Python raises where it names none.
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
        """Whether the writer is dead, or was killed and is not gone yet: it frees its memory first,
        and its lock last.
        """
        try:
            pid, host = self._writer()
            if host != socket.gethostname():
                return False
            if not lives(pid):
                return True
            state, *_, flags = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:7]
            pending = re.findall(
                r"(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text()
            )
            return (
                state in "ZX"
                or bool(int(flags) & EXITING)
                or any(int(signals, 16) & KILLED for signals in pending)
            )
        except (OSError, ValueError, LookupError, TypeError, OverflowError):
            return False
