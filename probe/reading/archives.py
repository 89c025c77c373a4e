"""A recording in a zip file, read from a copy that is unpacked once into the user's cache folder: whole, or not at all.

The file is somebody else's: the names in it are relative and plain, it holds one recording, and the sizes it claims are checked
before anything is written, and while it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from probe.errors import ProbeError, RecordingDamaged, RecordingNotFound, TooLarge
from probe.reading.files import NO_WAIT, READ
from probe.stopping import cleanly
from probe.strict_yaml import printable
from probe.system import trouble_in, unreadable

MOST_ENTRIES, MOST_RATIO, SMALL = 200_000, 100, 64 * 2**20  # files; bytes for one packed byte, beyond this size
MOST_LISTED, DEPTH = 32 * 2**20, 16  # bytes of the list of files; folders in each other
MANUALLY = "Unpack it yourself, and read the folder."


def unpacked(archive: Path, cache: Path) -> Path:
    """The recording in a zip file, as a folder below `cache`. Nothing is unpacked twice.

    Raises RecordingNotFound where none is in it, RecordingDamaged for a file that is no sound zip, TooLarge where the disk has
    not the room, RecordingUnreadable.
    """
    try:
        with os.fdopen(os.open(archive, READ | NO_WAIT), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RecordingNotFound(f"{printable(str(archive))} is not a file.", "probe ls lists the recordings there are.")
            mark = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            folder = cache / "diffusion-probe" / f"zip-{mark}"
            with contextlib.suppress(OSError):
                folder.rmdir()  # where the copy was removed
            if not folder.exists():
                _check_list(archive, file)
                with zipfile.ZipFile(file) as opened:
                    _unpack(archive, opened, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError, OverflowError) as error:
        raise RecordingDamaged(
            f"{printable(str(archive))} is not a zip file that can be read: {printable(str(error))}.", "Take it from a copy."
        ) from error
    except RuntimeError as error:  # as zipfile says that a file in it has a password
        raise RecordingDamaged(f"{printable(str(archive))} cannot be read: {printable(str(error))}.", MANUALLY) from error
    except OSError as error:
        if isinstance(error, ProbeError):
            raise
        if (trouble := trouble_in(error)) is not None:
            raise unreadable(archive, trouble) from error
        raise RecordingDamaged(f"{printable(str(archive))} cannot be unpacked: {printable(str(error))}.", MANUALLY) from error
    (found,) = folder.iterdir()
    return found


def _check_list(archive: Path, file: BinaryIO) -> None:
    """Refuse a zip whose list of files is too long to be read, before it is."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**17))
    end = file.read()
    at, large = end.rfind(b"PK\5\6"), end.rfind(b"PK\6\6")
    listed = int.from_bytes(end[large + 40 : large + 48] if large >= 0 else end[at + 12 : at + 16], "little")
    if at >= 0 and listed > MOST_LISTED:
        raise RecordingDamaged(f"{printable(str(archive))} has a list of files of {listed} bytes.", MANUALLY)


def _unpack(archive: Path, opened: zipfile.ZipFile, folder: Path) -> None:
    entries = opened.infolist()
    top = _top(archive, entries)
    total, packed = sum(entry.file_size for entry in entries), sum(entry.compress_size for entry in entries)
    if len(entries) > MOST_ENTRIES or total > max(SMALL, MOST_RATIO * packed):
        raise RecordingDamaged(f"{printable(str(archive))} would grow from {packed} to {total} bytes, in {len(entries)} files.", MANUALLY)
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder.parent)
    if room.total and total > room.free:
        raise TooLarge(
            f"{printable(str(archive))} holds {total} bytes, and its cache folder has room for {room.free}.", "Set XDG_CACHE_HOME to another disk."
        )
    with cleanly(), tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        made = Path(partial) / "made"
        root = made / f"{archive.name.removesuffix('.zip').removesuffix('.zarr') or 'recording'}.zarr"
        root.mkdir(parents=True)
        for entry in entries:
            inside = PurePosixPath(entry.filename).relative_to(top) if _is_below(entry.filename, top) else None
            if inside is None or entry.is_dir():
                continue
            target = root.joinpath(*inside.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, target.open("xb") as file:
                for block in _blocks(source, entry.file_size):
                    file.write(block)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise


def _blocks(source: IO[bytes], size: int) -> Iterator[bytes]:
    left = size
    while block := source.read(min(2**20, left + 1)):
        left -= len(block)
        if left < 0:
            raise zipfile.BadZipFile("a file in it is longer than it says")
        yield block


def _is_below(name: str, top: str) -> bool:
    return top == "." or PurePosixPath(name).is_relative_to(top)


def _top(archive: Path, entries: list[zipfile.ZipInfo]) -> str:
    """The folder in the zip that is the recording: the one with the uppermost zarr.json. Check every name on the way."""
    names = [entry.filename for entry in entries]
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        kind = entry.external_attr >> 16
        plain = not kind or stat.S_IFMT(kind) in (0, stat.S_IFREG, stat.S_IFDIR)
        windows = any(character in entry.filename for character in '\\:*?"<>|') and os.name == "nt"
        if not plain or ".." in parts or entry.filename[:1] in ("/", "\\") or len(parts) > DEPTH or not entry.filename.isprintable() or windows:
            raise RecordingDamaged(f"{printable(str(archive))} has an entry {printable(entry.filename)[:60]!r}, which no recording has.", MANUALLY)
    if len(set(names)) < len(names):
        raise RecordingDamaged(f"{printable(str(archive))} has two entries of one name.", MANUALLY)
    roots = sorted(
        {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "zarr.json"},
        key=lambda name: (name != ".", len(PurePosixPath(name).parts)),
    )
    if not roots:
        raise RecordingNotFound(f"{printable(str(archive))} holds no recording.", "It should hold a folder with a zarr.json.")
    depth = len(PurePosixPath(roots[0]).parts)
    beside = [name for name in roots if len(PurePosixPath(name).parts) == depth]
    if len(beside) > 1 and roots[0] != ".":
        raise RecordingNotFound(f"{printable(str(archive))} holds {len(beside)} recordings.", "Unpack it, and name one of them.")
    return roots[0]
