"""Tidying a folder of recordings: what dead writers left is cleared, what is to go is held so that nobody writes it meanwhile."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from probe.errors import RecordingBusy
from probe.store import storing


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a recording's lock, as its writer does: nobody else writes it, whatever its status says. Raises RecordingBusy."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with storing(path):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as busy:
            raise RecordingBusy(f"{path.name} is being written.", "Stop its writer first.") from busy
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def clear_orphans(folder: Path, dry_run: bool = False) -> list[Path]:
    """Remove what dead writers left in a folder of recordings: half-made hidden folders, lock files, parts of files.

    Whatever belongs to a living writer holds its lock, and stays. Returns what was removed; with `dry_run` nothing is.
    """
    found: dict[str, list[Path]] = {}
    for path in (*folder.glob(".*.zarr.lock"), *folder.glob(".*.zarr.*.partial"), *folder.glob("[!.]*.zarr/**/*.partial")):
        name = re.sub(r"^\.(.*\.zarr)\.(lock|[0-9a-f]+\.partial)$", r"\1", path.relative_to(folder).parts[0])
        found.setdefault(name, []).append(path)
    removed: list[Path] = []
    for name, paths in sorted(found.items()):
        lock = filelock.FileLock(folder / f".{name}.lock")
        new = not Path(lock.lock_file).exists()
        with storing(folder):
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                continue
            try:
                removed += sorted(paths)
                for path in () if dry_run else paths:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            finally:
                if new:
                    Path(lock.lock_file).unlink(missing_ok=True)
                lock.release()
    return removed
