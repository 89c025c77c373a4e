"""Tidying a folder of recordings: what dead writers left is cleared, what is to go is held so that nobody writes it meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from probe import files
from probe.errors import ProbeError, RecordingBusy, RecordingDamaged, StoreError
from probe.files import storing
from probe.locks import Lock

LEFT = re.compile(r"\.(.+\.zarr)\.(?:lock|[0-9a-f]+\.partial)", re.DOTALL)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a recording's lock, as its writer does: nobody else writes it, whatever its status says.

    Raises RecordingBusy, RecordingDamaged where the recording or its lock is a link.
    """
    files.check_no_link(path)
    lock = Lock(path)
    with storing(path):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def clear_orphans(folder: Path, dry_run: bool = False) -> list[Path]:
    """Remove what dead writers left in a folder of recordings: half-made hidden folders, lock files, parts of files.

    Whatever belongs to a living writer holds its lock, and stays. A link or a pipe among them goes; what a link leads to stays
    as it is, and a recording that is itself a link is passed over. Returns what was removed; with `dry_run` nothing is. What cannot be removed
    keeps nothing else from going: its StoreError comes at the end.
    """
    found: dict[str, list[Path]] = {}
    with storing(folder):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            own_folder = path.is_dir() and not path.is_symlink()
            if left := LEFT.fullmatch(path.name):
                if not (own_folder and path.name.endswith(".lock")):  # a folder is no lock of ours
                    found.setdefault(left[1], []).append(path)
            elif own_folder and path.name.endswith(".zarr") and not path.name.startswith("."):
                found[path.name] = [*found.get(path.name, []), *files.partials(path)]
    removed: list[Path] = []
    problem: ProbeError | None = None
    for name, paths in sorted((name, paths) for name, paths in found.items() if paths):
        try:
            with storing(folder):
                removed += _clear(Lock(folder / name), sorted(paths), dry_run)
        except RecordingBusy:
            continue
        except (StoreError, RecordingDamaged) as error:
            problem = problem or error
    if problem:
        raise problem
    return removed


def _is_no_writers(lock: os.stat_result) -> bool:
    """Whether a lock is a link or a pipe: no writer made that, and none can hold it. A folder is left to whoever made it."""
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
