"""What the file of a chunk may be, checked before it is decoded.

Its size, the room it takes on the disk, and the size of the text it grows to.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import numpy as np
from numcodecs import Zstd  # type: ignore[import-untyped]

from probe.reading.files import MOST_HOLES, NO_LINK, NO_WAIT, READ, refuse
from probe.reading.untrusted import Stored

MAX_TEXT = 4 * 2**20  # bytes of a variable of text


def sizes_of(stored: Stored) -> tuple[int, int]:
    """Return the least and the greatest size that a chunk's file can have, in bytes."""
    if stored.dtype is None:
        return 1, MAX_TEXT
    if stored.inner is None:
        return stored.chunk_bytes + 4, stored.chunk_bytes + 4
    count = prod(stored.chunks) // prod(stored.inner)
    return 16 * count + 4, 20 * count + 4 + stored.chunk_bytes


def check_chunk(root: Path, stored: Stored, found: os.stat_result) -> None:
    """Refuse a chunk's file that is not as large as its values are."""
    least, most = sizes_of(stored)
    if not least <= found.st_size <= most:
        raise refuse(
            root,
            f"a chunk of {stored.path} has {found.st_size} bytes, and not "
            f"{least if least == most else f'{least} to {most}'}",
        )


def takes_no_room(path: Path, found: os.stat_result) -> bool:
    """Tell whether a file is a hole, or one of very many names of the same bytes.

    Some disks count a file's room only later: then the file itself is asked.
    """
    if found.st_nlink >= MOST_HOLES:
        return True
    if getattr(
        found, "st_blocks", found.st_size
    ) * 512 * MOST_HOLES >= found.st_size or not hasattr(os, "SEEK_HOLE"):
        return False
    descriptor = os.open(path, READ | NO_LINK | NO_WAIT)
    try:
        return os.lseek(descriptor, 0, os.SEEK_HOLE) * MOST_HOLES < found.st_size
    except OSError:  # this disk knows no holes
        return False
    finally:
        os.close(descriptor)


def check_text(root: Path, stored: Stored, raw: bytes) -> int:
    """Return the size of a chunk of text, in bytes.

    Refuse one that would grow too large, or that claims more texts than its shape has.
    """
    names = [codec["name"] for codec in stored.metadata["codecs"]]
    try:
        if names[-1] == "crc32c":
            raw = raw[:-4]
        if "zstd" in names:
            size = _zstd_size(raw)
            if not 0 < size <= MAX_TEXT:
                raise ValueError
            raw = bytes(Zstd().decode(raw, np.empty(size, np.uint8)))
        count, end = prod(stored.chunks), 4
        if int.from_bytes(raw[:4], "little") != count or len(raw) < 4 + 4 * count:
            raise ValueError
        for _ in range(count):  # each text with its length before it
            end += 4 + int.from_bytes(raw[end : end + 4], "little")
        if end != len(raw):
            raise ValueError
        return len(raw)
    except (ValueError, RuntimeError, IndexError) as error:
        raise refuse(root, f"{stored.path} is not the text that it should be") from error


def _zstd_size(raw: bytes) -> int:
    """Return the size of what a zstd frame holds, from its header (RFC 8878, section 3.1.1.1).

    Return 0 if the header does not say.
    """
    if raw[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    flags = raw[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[flags >> 6]
    return int.from_bytes(raw[start : start + length], "little") + (256 if length == 2 else 0)
