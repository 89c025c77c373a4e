"""A recording in a zip file, read from a copy that is unpacked once into the user's cache folder.

The file is somebody else's. It has to hold one recording, under relative and plain names. The sizes
it claims are checked before anything is written, and again meanwhile. Files that no recording has
are left in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from probe.errors import ProbeError, RecordingDamaged, RecordingNotFound, TooLarge
from probe.reading.files import DRAWN, is_hole, open_plain
from probe.stopping import cleanly
from probe.system import FULL, trouble_in, unreadable
from probe.text import printable

MOST_ENTRIES = 50_000  # files, as of 5 variables at their longest
MOST_RATIO, SMALL = 100, 64 * 2**20  # bytes for one packed byte, in archives beyond this size
MOST_LISTED, DEPTH = 16 * 2**20, 16  # bytes of the list of files; folders in each other
# The files that a recording has, beside its pictures.
OURS = re.compile(r"zarr\.json|manifest\.json|digests\.txt|c(\.[0-9]+)*")
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others, Python unpacks without a bound
NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, *FULL)
MANUALLY = "Unpack it yourself, and read the folder."


def unpacked(archive: Path, cache: Path) -> Path:
    """Return the recording in a zip file, as a folder below `cache`.

    The same contents are unpacked only once. Raises RecordingNotFound if no recording is in it,
    RecordingDamaged if it is no sound zip, TooLarge if the disk is too full, RecordingUnreadable.
    """
    try:
        file = open_plain(archive)
        if isinstance(file, str):
            raise RecordingNotFound(
                f"{printable(str(archive))} is {file}, not a file.",
                "probe ls lists the recordings there are.",
            )
        with file:
            if is_hole(os.fstat(file.fileno())):
                raise RecordingDamaged(
                    f"{printable(str(archive))} has next to nothing in it: nearly all of it was "
                    "never written.",
                    "Take it from a copy.",
                )
            opened = Zip(file, MOST_LISTED)
            mark = opened.digest()[:16]
            folder = cache / "diffusion-probe" / f"zip-{mark}"
            root = folder / f"{_name(archive)}.zarr"
            with contextlib.suppress(OSError):
                root.rmdir()  # where all of the copy was removed
            if not root.is_dir():
                with into_cache(printable(str(archive)), folder.parent):
                    _unpack(archive, opened, root)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        UnicodeDecodeError,
        OverflowError,
    ) as error:
        raise RecordingDamaged(
            f"{printable(str(archive))} is not a zip file that can be read: "
            f"{printable(str(error))}.",
            "Take it from a copy.",
        ) from error
    except RuntimeError as error:  # as zipfile says that a file in it has a password
        raise RecordingDamaged(
            f"{printable(str(archive))} cannot be read: {printable(str(error))}.", MANUALLY
        ) from error
    except OSError as error:
        if isinstance(error, ProbeError):
            raise
        if (trouble := trouble_in(error)) is not None:
            raise unreadable(archive, trouble) from error
        raise RecordingDamaged(
            f"{printable(str(archive))} cannot be unpacked: {printable(str(error))}.", MANUALLY
        ) from error
    return root


def _name(archive: Path) -> str:
    """Return the name of the recording in a zip file: that of the file."""
    return archive.name.removesuffix(".zip").removesuffix(".zarr").lstrip(".") or "recording"


@contextlib.contextmanager
def into_cache(what: str, folder: Path) -> Iterator[None]:
    """Make a cache folder for what is unpacked into it. Leave no empty folder if that fails.

    Raises RecordingNotFound if the disk takes nothing.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            better = "with room" if error.errno in FULL else "that can be written"
            raise RecordingNotFound(
                f"{what} cannot be unpacked into {folder}: {error.strerror}.",
                f"Set XDG_CACHE_HOME to a folder {better}.",
            ) from error
        raise


class _Listed(io.BufferedReader):
    """A file that refuses to read more than `most` bytes at once.

    zipfile reads the list of a zip's files in one go.
    """

    most = sys.maxsize

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise zipfile.BadZipFile(f"its list of files has {size} bytes")
        return super().read(size)


class Zip(zipfile.ZipFile):
    """A zip file whose list of files has at most `most` bytes.

    Raises BadZipFile, and what zipfile raises.
    """

    def __init__(self, file: io.BufferedReader, most: int):
        # `file` and this reader share one position: `file` is not read meanwhile.
        self.contents = _Listed(io.FileIO(file.fileno(), closefd=False))
        self.contents.most = most
        super().__init__(self.contents)
        self.contents.most = sys.maxsize
        if unusual := [entry for entry in self.infolist() if entry.compress_type not in PACKED]:
            raise zipfile.BadZipFile(
                f"{unusual[0].filename[:60]!r} in it is packed in a way that is not read"
            )

    def digest(self) -> str:
        """Return the SHA-256 of the whole file."""
        self.contents.seek(0)
        return hashlib.file_digest(self.contents, "sha256").hexdigest()


def _unpack(archive: Path, opened: zipfile.ZipFile, target: Path) -> None:
    entries = opened.infolist()
    total = sum(entry.file_size for entry in entries)
    packed = sum(entry.compress_size for entry in entries)
    if len(entries) > MOST_ENTRIES or total > max(SMALL, MOST_RATIO * packed):
        raise RecordingDamaged(
            f"{printable(str(archive))} would grow from {packed} to {total} bytes, in "
            f"{len(entries)} files.",
            MANUALLY,
        )
    top = _top(archive, entries)
    cache = target.parent.parent
    room = shutil.disk_usage(cache)
    if room.total and total > room.free:
        raise TooLarge(
            f"{printable(str(archive))} holds {total} bytes, and its cache folder has room for "
            f"{room.free}.",
            "Set XDG_CACHE_HOME to another disk.",
        )
    with cleanly(), tempfile.TemporaryDirectory(dir=cache) as partial:
        root = Path(partial) / "made"
        root.mkdir()
        for entry in entries:
            if entry.is_dir() or not _is_below(entry.filename, top):
                continue
            inside = PurePosixPath(entry.filename).relative_to(top)
            if not (OURS.fullmatch(inside.name) or DRAWN.fullmatch(str(inside))):
                continue
            written = root.joinpath(*inside.parts)
            written.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, written.open("xb") as file:
                for block in _blocks(source, entry.file_size):
                    file.write(block)
        target.parent.mkdir(exist_ok=True)
        try:
            root.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
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
    """Return the folder in the zip that is the recording: the one with the uppermost zarr.json.

    Check every name on the way. Raises RecordingDamaged, RecordingNotFound.
    """
    names = [entry.filename for entry in entries]
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        kind = entry.external_attr >> 16
        plain = not kind or stat.S_IFMT(kind) in (0, stat.S_IFREG, stat.S_IFDIR)
        windows = any(character in entry.filename for character in '\\:*?"<>|') and os.name == "nt"
        if (
            not plain
            or ".." in parts
            or entry.filename[:1] in ("/", "\\")
            or len(parts) > DEPTH
            or not entry.filename.isprintable()
            or windows
        ):
            raise RecordingDamaged(
                f"{printable(str(archive))} has an entry {printable(entry.filename)[:60]!r}, "
                "which no recording has.",
                MANUALLY,
            )
    if len(set(names)) < len(names):
        raise RecordingDamaged(f"{printable(str(archive))} has two entries of one name.", MANUALLY)
    roots = sorted(
        {
            str(PurePosixPath(name).parent)
            for name in names
            if PurePosixPath(name).name == "zarr.json"
        },
        key=lambda name: (name != ".", len(PurePosixPath(name).parts)),
    )
    if not roots:
        raise RecordingNotFound(
            f"{printable(str(archive))} holds no recording.",
            "It should hold a folder with a zarr.json.",
        )
    depth = len(PurePosixPath(roots[0]).parts)
    beside = [name for name in roots if len(PurePosixPath(name).parts) == depth]
    if len(beside) > 1 and roots[0] != ".":
        raise RecordingNotFound(
            f"{printable(str(archive))} holds {len(beside)} recordings.",
            "Unpack it, and name one of them.",
        )
    return roots[0]
