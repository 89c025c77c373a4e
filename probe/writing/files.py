"""Write a recording's files, each whole or not at all: under another name, then moved into place.

    replace(file, [content], sync=True)    # also where a link is: the link is replaced
    check_own(recording)                   # before it is taken over: plain files of its own alone

A reader sees the old content or the new. A writer that is killed leaves a name that ends in
`.partial`, which no reader opens. With `sync`, a call returns when content and name have reached
the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from probe.errors import ExperimentError, ProbeError, RecordingDamaged, RecordingLinked, StoreError
from probe.system import FULL, kind_of
from probe.text import printable

PARTIAL = ".partial"
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # which follows no link
NEW |= getattr(os, "O_BINARY", 0)
AT_ONCE = 2**17  # bytes that do not wait for more
BUFFERS = 1024  # of one write: no system in use takes fewer
MORE = (
    os.O_WRONLY
    | os.O_APPEND
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
LONGEST_NAME = 255  # bytes, on nearly every disk
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Names that only files have in a recording.
A_FILE = re.compile(r"zarr\.json|manifest\.json|digests\.txt|c(\.[0-9]+)*")
# This system or this disk cannot force a folder's names.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the disk's errors into StoreError."""
    try:
        yield
    except ProbeError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        remedy = "Check the disk and its permissions."
        if error.errno in FULL:
            remedy = "Free some room, or record less (probe run --dry-run shows every size)."
        elif error.errno in REFUSED and not os.path.lexists(path):  # a recording that was to begin
            remedy = f"Name another folder: --output {elsewhere('runs')}"
        raise StoreError(f"{path} could not be written: {reason}.", remedy) from error


def elsewhere(name: str) -> str:
    """Return a path that can nearly always be written, as a shell takes it."""
    try:
        return shlex.quote(str(Path(tempfile.gettempdir()) / name))
    except OSError:  # nowhere on this machine
        return f"FOLDER/{name}"


def replace(file: str | Path, parts: Iterable[bytes | memoryview], sync: bool) -> None:
    """Write a file's parts under another name, then move it into its place. Raise OSError.

    A part that is a memoryview is one of bytes.
    """
    file = os.fspath(file)  # a step has many small files, and a Path takes as long as a system call
    partial = f"{file}.{os.urandom(4).hex()}{PARTIAL}"
    try:
        _put(partial, parts, sync)
        os.replace(partial, file)  # noqa: PTH105
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise
    if sync:
        sync_folder(Path(file).parent)


def put_new(file: str | Path, parts: Iterable[bytes | memoryview], sync: bool) -> None:
    """Write a file that nobody can see yet: in a hidden folder, which is renamed as a whole.

    Raise OSError, also if it is there already.
    """
    _put(file, parts, sync)


def _put(file: str | Path, parts: Iterable[bytes | memoryview], sync: bool) -> None:
    handle = os.open(file, NEW, 0o666)
    try:
        _write(handle, parts)
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def _write(handle: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write parts one after the other, small ones together.

    A large one is written before the next is asked for: its checksum then finds it in the cache.
    """
    waiting: list[bytes | memoryview] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= AT_ONCE or len(waiting) == BUFFERS:
            _write_out(handle, waiting, size)
            waiting, size = [], 0
    _write_out(handle, waiting, size)


def _write_out(handle: int, waiting: list[bytes | memoryview], size: int) -> None:
    """Write all of these buffers. The system may take fewer bytes than it is given."""
    written = os.writev(handle, waiting) if size and hasattr(os, "writev") else 0
    if written < size:
        left = memoryview(b"".join(waiting))[written:]
        while left:
            left = left[os.write(handle, left) :]


def remove(file: str | Path, sync: bool) -> None:
    """Remove a file, or the link in its place. It need not exist. Raise OSError."""
    file = Path(file)
    with contextlib.suppress(FileNotFoundError):
        file.unlink()
        if sync:
            sync_folder(file.parent)


def append(file: Path, content: bytes, sync: bool) -> None:
    """Add to the end of an existing plain file. Raise OSError, or RecordingLinked for a link."""
    handle = os.open(file, MORE)
    try:
        if problem := _not_own(os.fstat(handle)):
            raise foreign(file.parent, file.name, problem)
        while content:
            content = content[os.write(handle, content) :]
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


# --- what reaches the disk ------------------------------------------------------------------------


def sync_file(file: str | Path) -> None:
    """Force a file's content to the disk. Raise OSError."""
    # Windows syncs only what may be written.
    handle = os.open(file, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: str | Path) -> None:
    """Force a folder's names to the disk, if this system and this disk can."""
    if sys.platform == "win32":
        return
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_all(folder: Path) -> None:
    """Force everything in a folder to the disk: contents first, then names, the deepest first."""
    folders = [str(folder)]
    for entry in entries(folder):
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif entry.is_file(follow_symlinks=False):
            sync_file(entry.path)
    for path in sorted(folders, key=lambda path: -path.count(os.sep)):
        sync_folder(path)


def make_folders(folder: Path, sync: bool) -> None:
    """Make a folder and those above it. Raise OSError.

    With `sync`, the name of each new one reaches the disk.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new if sync else ():
        sync_folder(path.parent)


def check_output_folder(folder: Path) -> Path:
    """Return the lowest folder on the way to `folder` that exists already.

    Raise ExperimentError if no folder can be made there, or nothing can be written.
    """
    wanted = folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ExperimentError(
            f"output: {folder} is a file, not a folder.",
            f"Name a folder: --output {'runs' * (wanted.name != 'runs') or 'mine'}.",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ExperimentError(
            f"output: nothing can be written in {folder}.",
            f"Name another folder: --output {elsewhere('runs')}",
        )
    longest = max(len(os.fsencode(part)) for part in wanted.parts)
    if longest > LONGEST_NAME:
        raise ExperimentError(
            f"output: a name in it has {longest} bytes; {LONGEST_NAME} is the most.",
            "Name another folder: --output runs.",
        )
    return folder


# --- whose files they are -------------------------------------------------------------------------


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a folder, and follow no link. Raise OSError."""
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as listed:
            for entry in listed:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)


def partials(folder: Path) -> list[Path]:
    """Return what killed writers left half-written below a folder.

    These are files, and links in their place.
    """
    return sorted(
        Path(e.path)
        for e in entries(folder)
        if e.name.endswith(PARTIAL) and not e.is_dir(follow_symlinks=False)
    )


def check_own(recording: Path) -> None:
    """Raise RecordingLinked unless all of a recording is its own: no links, no hard links.

    Raise RecordingDamaged for a pipe or a device, and for a folder under the name of a file.
    """
    check_no_link(recording)
    for entry in entries(recording):
        status = entry.stat(follow_symlinks=False)
        name, is_folder = os.path.relpath(entry.path, recording), stat.S_ISDIR(status.st_mode)
        if problem := _not_own(status):
            raise foreign(recording, name, problem)
        if not stat.S_ISREG(status.st_mode) and (not is_folder or A_FILE.fullmatch(entry.name)):
            raise RecordingDamaged(
                f"{printable(recording.name)}: {printable(name)} is {kind_of(status)}, where only "
                "a file can be.",
                f"Remove it, then try again: rm{' -r' * is_folder} "
                f"{shlex.quote(printable(entry.path))}",
            )


def check_no_link(recording: Path) -> None:
    """Raise RecordingLinked for a recording that is itself a link.

    Nothing is written or removed through a link.
    """
    if recording.is_symlink():
        raise RecordingLinked(
            f"{printable(str(recording))} is a link, and through a link nothing is written.",
            f"Name the folder itself: {printable(os.path.realpath(recording))}",
        )


def check_folders(recording: Path, folders: Iterable[str]) -> None:
    """Raise RecordingLinked if one of a recording's folders became a link since it was opened."""
    for folder in folders:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise foreign(
                recording, os.path.relpath(folder, recording), "is a link, or a folder no more"
            )


def foreign(recording: Path, name: str, problem: str) -> RecordingLinked:
    """Return the error for a file of a recording that belongs to something else too."""
    return RecordingLinked(
        f"{printable(recording.name)}: {printable(name)} {problem}, so nothing is written there.",
        "Make a copy with files of its own, cp -rL, and use that one.",
    )


def _not_own(status: os.stat_result) -> str:
    """Return why a file belongs to something else too, or ""."""
    if stat.S_ISLNK(status.st_mode):
        return "is a link"
    if stat.S_ISREG(status.st_mode):
        return "has another name elsewhere (a hard link)" if status.st_nlink > 1 else ""
    return ""
