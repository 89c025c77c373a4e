"""What a recording says of itself while it is being written: a digest of every committed step, and
of what is written once.

`digests.txt` lies beside the root's zarr.json. Each line is a SHA-256 and what it is of: `step 3`,
a variable, or an entry of one, `decoded/picture[2]`. Lines are only ever added. A line is there
before its step's flag is set, so a flag without a line is damage. A variable's line is there after
its files; where it is written again, a line of dashes takes it back first. What a killed writer
left of a last line does not count.

A digest is over names and, for each chunk, the CRC-32C that is stored with it. A chunk of nothing
but fill values has no file; it counts as empty, so a file that was deleted does not go unseen.

A PNG carries its own: the last chunk before its end is the SHA-256 of everything else in the file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from probe.system import exists, reading
from probe.writing import files

DIGESTS = "digests.txt"
LINE = re.compile(r"([0-9a-f]{64}|-{64}) (.{1,2000})")
WITH_STEPS = re.compile(
    r"step|timestep|sigma|alpha_bar|committed|cost/.*|attention/[^/]*/recorded"
)  # along the steps, and not of one
EMPTY = b"\0"
KEY, END = (
    b"sha256\0",
    12,
)  # of a PNG: the text that holds its digest, and the bytes of its last chunk


def of_a_step(path: str, dims: tuple[str, ...]) -> bool:
    """Whether a variable is written step by step, and so is part of the steps' digests."""
    return dims[:1] == ("step",) and not WITH_STEPS.fullmatch(path)


# --- values ---------------------------------------------------------------------------------------


def pieces(
    value: np.ndarray, chunk: tuple[int, ...], fill: Any
) -> Iterator[tuple[tuple[int, ...], np.ndarray, bool]]:
    """Each chunk of an array: where it is, its values, and whether they are anything but fill
    values.
    """
    counts = [size // part for size, part in zip(value.shape, chunk, strict=True)]
    places = itertools.product(*map(range, counts))
    for index, found in zip(places, _parts(value, chunk, counts), strict=True):
        yield index, found, not _is_empty(found, fill)


def _parts(value: np.ndarray, chunk: tuple[int, ...], counts: list[int]) -> Iterable[np.ndarray]:
    """Each chunk of an array, as one row."""
    behind = prod(chunk) * prod(counts) != value.size  # what no chunk holds
    split = max((axis for axis, count in enumerate(counts) if count > 1), default=0)
    if not behind and all(part == 1 for part in chunk[:split]):  # they lie one after the other
        return np.ascontiguousarray(value).reshape(prod(counts), -1)
    return (_part(value, chunk, place) for place in itertools.product(*map(range, counts)))


def _part(value: np.ndarray, chunk: tuple[int, ...], place: tuple[int, ...]) -> np.ndarray:
    where = tuple(slice(at * n, (at + 1) * n) for at, n in zip(place, chunk, strict=True))
    return np.ascontiguousarray(value[where]).reshape(-1)


def _is_empty(values: np.ndarray, fill: Any) -> bool:
    if fill != fill:
        return bool(values[0] != values[0]) and bool(np.all(values != values))
    return bool(values[0] == fill) and bool(np.all(values == fill))


def checksum(content: Any) -> bytes:
    """The CRC-32C of bytes or of contiguous values, as a chunk has it at its end."""
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def mark(crc: bytes) -> bytes:
    """What a digest takes of one chunk, by its checksum; of one that is nothing but fill values, it
    is `EMPTY`.
    """
    return b"\1" + crc


def marks(value: np.ndarray, chunk: tuple[int, ...] | None, fill: Any) -> bytes:
    """What a digest takes of an array in chunks; without `chunk`, it is one.

    Text is one, whatever its chunks are.
    """
    if value.dtype.kind in "OTU":
        return mark(checksum(json.dumps(value.tolist()).encode()))
    if not prod(value.shape):
        return b""
    parts = pieces(value, value.shape if chunk is None else chunk, fill)
    return b"".join(mark(checksum(found)) if full else EMPTY for _, found, full in parts)


def digest(of: Mapping[str, bytes]) -> str:
    """SHA-256 over names and marks; a variable that holds nothing but fill values is left out, as
    if it were not there.
    """
    made = hashlib.sha256()
    for name in sorted(of):
        if of[name].strip(EMPTY):
            made.update(f"{name}\n{len(of[name])}\n".encode() + of[name])
    return made.hexdigest()


# --- lines ----------------------------------------------------------------------------------------


def line(what: str, of: Mapping[str, bytes]) -> bytes:
    return f"{digest(of)} {what}\n".encode()


class Ledger:
    """A recording's digests, being written. After a line that could not be written, none is."""

    def __init__(self, recording: Path, written: Iterable[str] = ()):
        self._file, self._lock = recording / DIGESTS, threading.Lock()
        self._written = set(written)
        self._error: OSError | None = None

    def add(self, what: str, of: Mapping[str, bytes], sync: bool = False) -> None:
        """Add the line of something that was written."""
        self._written.add(what)
        self._append(line(what, of), sync)

    def take_back(self, what: str) -> None:
        """Say of something that it is about to be written again, if there is a line of it."""
        if what in self._written:
            self._written.remove(what)
            self._append(f"{'-' * 64} {what}\n".encode(), False)

    def _append(self, content: bytes, sync: bool) -> None:
        with self._lock:
            if self._error:
                raise OSError(self._error.errno, self._error.strerror)
            try:
                files.append(self._file, content, sync)
            except OSError as error:
                self._error = error
                raise


def read_lines(raw: bytes) -> dict[str, str]:
    """The digests that hold, by what they are of. Raises ValueError for what no writer left."""
    *lines, _ = raw.decode().split("\n")
    found: dict[str, str] = {}
    for number, text in enumerate(lines, 1):
        parts = LINE.fullmatch(text)
        if parts is None:
            raise ValueError(f"line {number} of {DIGESTS} is no digest")
        if parts[1].startswith("-"):
            found.pop(parts[2], None)
        else:
            found[parts[2]] = parts[1]
    return found


def step_of(what: str) -> int | None:
    """Which step a line is of, or None."""
    return int(what[5:]) if re.fullmatch(r"step [0-9]{1,9}", what) else None


def flags_are_lost(recording: Path, attributes: Mapping[str, Any]) -> bool:
    """Whether the file of a recording's flags is gone.

    An older version wrote none before the first step was committed.
    """
    if exists(recording / "committed" / "c.0"):
        return False
    if "digests" in attributes:
        return True
    latents = recording / "latents" / "latents"
    with reading(recording):
        return latents.is_dir() and any(latents.glob("c.1.*"))


# --- pictures -------------------------------------------------------------------------------------


def sealed(png: bytes) -> bytes:
    """A PNG with the SHA-256 of its bytes in it, as a text that picture viewers pass over."""
    return png[:-END] + _seal(png[:-END], png[-END:]) + png[-END:]


def seal_holds(png: bytes) -> bool:
    """Whether every byte of a PNG is as it was when it was sealed."""
    whole, size = memoryview(png), len(_seal(b"", b""))
    return _seal(whole[: -END - size], whole[-END:]) == whole[-END - size : -END]


def _seal(start: Any, end: Any) -> bytes:
    made = hashlib.sha256(start)
    made.update(end)
    body = b"tEXt" + KEY + made.hexdigest().encode()
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
