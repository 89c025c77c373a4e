"""Tidy a folder of recordings: clear what dead writers left, and hold what is to be removed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from probe.errors import ProbeError, RecordingBusy, RecordingDamaged, StoreError
from probe.system import may_change, reading
from probe.writing import files
from probe.writing.files import storing
from probe.writing.locks import Lock

# Of a cell of a grid: what it says of itself is as a recording to its lock.
OF_A_CELL = re.compile(
    r"\.?([0-9a-f]{16}\.)(?:json\.lock|tries|(?:json|png|npz|tries)\.[0-9a-f]+\.partial)"
)
LEFT = re.compile(r"\.(.+\.zarr)\.(?:lock|[0-9a-f]+\.partial)", re.DOTALL)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a recording's lock, as its writer does: meanwhile nobody else writes it.

    Raise RecordingBusy, or RecordingDamaged if the recording or its lock is a link.
    """
    files.check_no_link(path)
    lock = Lock(path)
    with storing(path):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_removable(recording: Path) -> None:
    """Raise StoreError if the system would keep a part of a recording.

    Half of a recording is worth nothing to anybody.
    """
    with reading(recording):
        _check_entry(recording, recording)
        for entry in files.entries(recording):
            _check_entry(recording, Path(entry.path))


def _check_entry(recording: Path, path: Path) -> None:
    """Raise StoreError unless this account may remove a file or a folder from its folder."""
    folder = path.parent
    status, owner = folder.stat(), path.lstat().st_uid
    user = os.geteuid() if hasattr(os, "geteuid") else 0
    sticky = status.st_mode & stat.S_ISVTX and user not in (0, status.st_uid, owner)
    if may_change(folder) and not sticky:
        return
    if sticky:
        cause = f"{path} belongs to another user"
        remedy = f"Ask its owner to remove it: rm -r {shlex.quote(str(path))}"
    elif status.st_uid == user:
        cause = f"nothing may be removed from {folder}"
        remedy = f"Allow it, then try again: chmod u+rwx {shlex.quote(str(folder))}"
    else:
        cause = f"nothing may be removed from {folder}, which belongs to another user"
        remedy = "Ask its owner to remove it, or to let you."
    raise StoreError(f"{recording.name} stays as it is: {cause}.", remedy)


def remove(recording: Path) -> None:
    """Remove a recording under its lock.

    It is out of sight at once. `clear_orphans` finds what a kill leaves of it.
    """
    aside = recording.with_name(f".{recording.name}.{uuid.uuid4().hex[:8]}{files.PARTIAL}")
    try:
        recording.rename(aside)
    except OSError as error:
        raise StoreError(
            f"{recording.name} stays as it is: {error.strerror}.",
            f"Check the permissions of {recording.parent}.",
        ) from error
    try:
        shutil.rmtree(aside)
    except OSError as error:
        remedy = f"Remove the rest: rm -r {shlex.quote(str(aside))}"
        raise StoreError(
            f"{recording.name} is gone, but not all of its files: {error.filename}: "
            f"{error.strerror}.",
            remedy,
        ) from error


def clear_orphans(folder: Path, dry_run: bool = False) -> list[Path]:
    """Remove what dead writers left in a folder of recordings, and return it.

    These are half-made hidden folders, lock files and parts of files, also of the cells of grids
    if it is the folder of these. What belongs to a living
    writer holds its lock, and stays. A link or a pipe among them is removed; what a link leads to
    stays. A recording that is itself a link is passed over. With `dry_run` nothing is removed. What
    cannot be removed keeps nothing else from being removed; its StoreError is raised at the end.
    """
    left: dict[str, list[Path]] = {}
    with storing(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            own_folder = path.is_dir() and not path.is_symlink()
            if name := LEFT.fullmatch(path.name):
                if not (own_folder and path.name.endswith(".lock")):  # a folder is no lock of ours
                    left.setdefault(name[1], []).append(path)
            elif (cell := OF_A_CELL.fullmatch(path.name)) and not own_folder:
                left.setdefault(f"{cell[1]}json", []).append(path)
            elif own_folder and path.name.endswith(".zarr") and not path.name.startswith("."):
                left[path.name] = [*left.get(path.name, []), *files.partials(path)]
    removed: list[Path] = []
    problem: ProbeError | None = None
    for recording, paths in sorted(item for item in left.items() if item[1]):
        try:
            with storing(folder):
                removed += _clear(Lock(folder / recording), sorted(paths), dry_run)
        except RecordingBusy:
            continue
        except (StoreError, RecordingDamaged) as error:
            problem = problem or error
    if problem:
        raise problem
    return removed


def _is_no_writers(lock: os.stat_result) -> bool:
    """Tell whether a lock's file is a link or a pipe: no writer made it, and none can hold it.

    A folder is left to whoever made it.
    """
    return not stat.S_ISDIR(lock.st_mode) and (not stat.S_ISREG(lock.st_mode) or lock.st_nlink > 1)


def _clear(lock: Lock, paths: list[Path], dry_run: bool) -> list[Path]:
    """Remove what the dead writer of one recording left, under its lock."""
    new = not os.path.lexists(lock.file)
    if not new and _is_no_writers(os.lstat(lock.file)):
        if dry_run:
            return paths
        lock.file.unlink()
    lock.acquire()
    try:
        for path in () if dry_run else paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != lock.file:
                path.unlink(missing_ok=True)
    finally:
        lock.release(keep=dry_run and not new)
    return paths
