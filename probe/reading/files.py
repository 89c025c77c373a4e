"""Files that somebody else made, opened without following a link or waiting for a pipe.

    read_file(root, "latents/zarr.json", check)     # `check` sees the size before a byte is read
    read_json(root, "zarr.json", most=2**20)

A file that is not what it should be raises RecordingDamaged. A file that the system does not read
raises RecordingUnreadable.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from probe.errors import RecordingDamaged, RecordingLinked
from probe.system import OF_THE_FILE, kind_of, reading
from probe.text import printable

REMEDY = "Record it again, or remove it."
UNLINKED = "Its files are links: copy it with cp -rL, and read the copy."
MAX_PARTS = 400_000  # values in a JSON file
REPARSE_POINT = 0x400  # FILE_ATTRIBUTE_REPARSE_POINT of Windows
READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
FOLDER, NO_LINK, NO_WAIT = (
    getattr(os, f"O_{name}", 0) for name in ("DIRECTORY", "NOFOLLOW", "NONBLOCK")
)
# Else, as on Windows, a file is looked at before and after it is opened.
GUARDED = bool(FOLDER and NO_LINK and NO_WAIT) and os.open in os.supports_dir_fd
# Of more bytes, in one file or in many, 1 in 64 must take room on the disk.
LARGE, MOST_HOLES = 16 * 2**20, 64
Check = Callable[[os.stat_result], None]
# The pictures that are drawn of a recording, beside its zarr.json.
DRAWN = re.compile(r"(picture(-[0-9]+)?|contact-sheet|words|ask-[^/]*)\.png", re.DOTALL)


def refuse(path: Path, what: str, remedy: str = REMEDY) -> RecordingDamaged:
    """Return the error for a recording that is not to be trusted. `what` ends its sentence."""
    return RecordingDamaged(f"{printable(str(path))} is damaged: {what}.", remedy)


def refuse_link(root: Path, name: str) -> RecordingLinked:
    """Return the error for a recording with a link in it: none is followed out of it."""
    return RecordingLinked(
        f"{printable(str(root))} is not read: {printable(name)} is behind a link.", UNLINKED
    )


@contextlib.contextmanager
def opened(root: Path, name: str, check: Check) -> Iterator[io.BufferedReader]:
    """Open a plain file below `root`. No part of `name` may be a link.

    `check` gets the file's stat before a byte is read. Raises FileNotFoundError, RecordingDamaged
    for a link, a pipe or a device, RecordingUnreadable.
    """
    with reading(root):
        descriptor = (_descend if GUARDED else _look_twice)(root, name)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise refuse(root, f"{printable(name)} is not a file")
            check(found)
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)


def _descend(root: Path, name: str) -> int:
    """Open each folder inside the one before: no link is followed, even if files are moved."""
    *folders, last = name.split("/")
    at = os.open(root, READ | FOLDER)
    try:
        for part in folders:
            below = os.open(part, READ | FOLDER | NO_LINK, dir_fd=at)
            os.close(at)
            at = below
        part = last
        return os.open(last, READ | NO_LINK | NO_WAIT, dir_fd=at)
    except OSError as error:
        if error.errno not in OF_THE_FILE or error.errno == errno.ENOENT:
            raise
        with contextlib.suppress(OSError):
            if stat.S_ISLNK(os.lstat(part, dir_fd=at).st_mode):
                raise refuse_link(root, name) from error
        raise refuse(root, f"{printable(name)} is not a file") from error
    finally:
        os.close(at)


def _look_twice(root: Path, name: str) -> int:
    """Open a file after a look at each part, and check that it is still the same file."""
    at, found = Path(root), Path(root).stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    for part in name.split("/"):
        if not stat.S_ISDIR(found.st_mode):
            raise refuse(root, f"{printable(name)} is not a file")
        at /= part
        found = os.lstat(at)
        if is_link(found):
            raise refuse_link(root, name)
    if not stat.S_ISREG(found.st_mode):
        raise refuse(root, f"{printable(name)} is not a file")
    descriptor = os.open(at, READ | NO_WAIT)
    if not os.path.samestat(found, os.fstat(descriptor)):
        os.close(descriptor)
        raise refuse_link(root, name)
    return descriptor


def open_plain(path: Path) -> io.BufferedReader | str:
    """Open a plain file, through links too. Raises OSError.

    Of anything else return what it is, "a pipe", without waiting for it.
    """
    if not stat.S_ISREG((found := path.stat()).st_mode):
        return kind_of(found)
    descriptor = os.open(path, READ | NO_WAIT)
    if not stat.S_ISREG((found := os.fstat(descriptor)).st_mode):
        os.close(descriptor)
        return kind_of(found)
    return os.fdopen(descriptor, "rb")


def is_hole(found: os.stat_result) -> bool:
    """Tell whether a large file takes next to no room: nothing was ever written into it."""
    blocks = getattr(found, "st_blocks", found.st_size)  # Windows does not say
    return found.st_size > LARGE and blocks * 512 * MOST_HOLES < found.st_size


def entry_is_link(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry of `os.scandir` is a link; see `is_link`."""
    return entry.is_symlink() or (os.name == "nt" and is_link(entry.stat(follow_symlinks=False)))


def may_be_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry of `os.scandir` is a folder or a link to one.

    A link is also one if nobody can tell where it leads: who opens it says why.
    """
    try:
        return entry.is_dir() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:  # a loop of links, or one into a folder that this account may not see
        return True


def is_link(found: os.stat_result) -> bool:
    """Tell whether `lstat` found a link, or what Windows has for one."""
    attributes = getattr(found, "st_file_attributes", 0)
    return stat.S_ISLNK(found.st_mode) or bool(attributes & REPARSE_POINT)


def read_file(root: Path, name: str, check: Check, part: slice = slice(None)) -> bytes:
    """Return the bytes of a plain file below `root`, or a part of them; see `opened`."""
    with opened(root, name, check) as file:
        start, end, _ = part.indices(os.fstat(file.fileno()).st_size)
        file.seek(start)
        return file.read(max(0, end - start))


def no_longer(root: Path, name: str, most: int) -> Check:
    """Return a check for `opened` that refuses a file of more than `most` bytes."""

    def check(found: os.stat_result) -> None:
        if found.st_size > most:
            raise refuse(
                root, f"{printable(name)} has {found.st_size} bytes, where {most} would be many"
            )

    return check


def read_json(root: Path, name: str, most: int) -> Any:
    """Return the contents of a small JSON file below `root`.

    NaN and Infinity are no JSON. They are accepted only where an older version wrote a scheduler's
    settings.
    """
    return parse_json(root, name, read_file(root, name, no_longer(root, name, most)))


def parse_json(root: Path, name: str, raw: bytes) -> Any:
    """Return what a JSON file says.

    Raises RecordingDamaged if it has too many values, or none that can be read.
    """
    not_finite: list[float] = []

    def constant(word: str) -> float:
        not_finite.append(float(word))
        return not_finite[-1]

    if sum(map(raw.count, (b"{", b"[", b","))) > MAX_PARTS:
        raise refuse(root, f"{printable(name)} has too many parts")
    try:
        parsed = json.loads(raw.decode(), parse_constant=constant)
        if not_finite:
            settings = parsed["attributes"]["scheduler"]["config"].values()
            numbers = [value for value in settings if isinstance(value, float)]
            if len(not_finite) != sum(not isfinite(number) for number in numbers):
                raise ValueError
        return parsed
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise refuse(root, f"{printable(name)} is not JSON that can be read") from error
