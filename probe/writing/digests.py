"""Digests that a recording keeps of itself while it is written: one of every committed step.

`digests.txt` lies beside the root's zarr.json. Each line is a SHA-256 and what it is a digest of:
`step 3`, a variable, or an entry of one, `decoded/picture[2]`. Lines are only ever added.

A step's line is written before its flag is set, so a flag without a line is damage. A variable's
line is written after its files. Before a variable is written again, a line of dashes takes its line
back. A torn last line, which a killed writer may leave, does not count.

A digest is over names and the marks of chunks. A chunk's mark is the CRC-32C that is stored with
it. A chunk of nothing but fill values has no file; its mark says so, and a deleted file is seen.

A PNG carries its own digest: the last chunk before its end is the SHA-256 of everything else in the
file.
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
# Variables along the steps that are written once, for all of them.
WITH_STEPS = re.compile(r"step|timestep|sigma|alpha_bar|committed|cost/.*|attention/[^/]*/recorded")
EMPTY = b"\0"
KEY = b"sha256\0"  # the name of the text in a PNG that holds its digest
END = 12  # bytes of a PNG's last chunk


def of_a_step(path: str, dims: tuple[str, ...]) -> bool:
    """Tell whether a variable is written step by step: then the steps' digests are over it too."""
    return dims[:1] == ("step",) and not WITH_STEPS.fullmatch(path)


# --- values ---------------------------------------------------------------------------------------


def pieces(
    value: np.ndarray, chunk: tuple[int, ...], fill: Any
) -> Iterator[tuple[tuple[int, ...], np.ndarray, bool]]:
    """Yield each chunk of an array: its index, its values, and whether any differs from `fill`."""
    counts = [size // part for size, part in zip(value.shape, chunk, strict=True)]
    indices = itertools.product(*map(range, counts))
    for index, part in zip(indices, _parts(value, chunk, counts), strict=True):
        yield index, part, not _is_empty(part, fill)


def _parts(value: np.ndarray, chunk: tuple[int, ...], counts: list[int]) -> Iterable[np.ndarray]:
    """Return each chunk of an array as one row."""
    behind = prod(chunk) * prod(counts) != value.size  # what no chunk holds
    split = max((axis for axis, count in enumerate(counts) if count > 1), default=0)
    if not behind and all(part == 1 for part in chunk[:split]):  # they lie one after the other
        return np.ascontiguousarray(value).reshape(prod(counts), -1)
    return (_part(value, chunk, index) for index in itertools.product(*map(range, counts)))


def _part(value: np.ndarray, chunk: tuple[int, ...], index: tuple[int, ...]) -> np.ndarray:
    where = tuple(slice(at * n, (at + 1) * n) for at, n in zip(index, chunk, strict=True))
    return np.ascontiguousarray(value[where]).reshape(-1)


def _is_empty(values: np.ndarray, fill: Any) -> bool:
    if fill != fill:
        return bool(values[0] != values[0]) and bool(np.all(values != values))
    return bool(values[0] == fill) and bool(np.all(values == fill))


def checksum(content: Any) -> bytes:
    """Return the CRC-32C of bytes or of contiguous values, as it stands at a chunk's end."""
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def mark(crc: bytes) -> bytes:
    """Return the mark of a chunk with this checksum. That of a chunk of fill values is `EMPTY`."""
    return b"\1" + crc


def marks(value: np.ndarray, chunk: tuple[int, ...] | None, fill: Any) -> bytes:
    """Return the marks of an array in chunks. Without `chunk` it is one chunk.

    Text is one chunk, whatever its chunks are.
    """
    if value.dtype.kind in "OTU":
        return mark(checksum(json.dumps(value.tolist()).encode()))
    if not prod(value.shape):
        return b""
    parts = pieces(value, value.shape if chunk is None else chunk, fill)
    return b"".join(mark(checksum(part)) if full else EMPTY for _, part, full in parts)


def digest(of: Mapping[str, bytes]) -> str:
    """Return the SHA-256 over names and marks.

    A variable of nothing but fill values is left out, as if it were not there.
    """
    sha = hashlib.sha256()
    for name in sorted(of):
        if of[name].strip(EMPTY):
            sha.update(f"{name}\n{len(of[name])}\n".encode() + of[name])
    return sha.hexdigest()


# --- lines ----------------------------------------------------------------------------------------


def line(what: str, of: Mapping[str, bytes]) -> bytes:
    """Return the line of `what` for the file of digests."""
    return f"{digest(of)} {what}\n".encode()


class Ledger:
    """A recording's file of digests, being written. After a line failed, no other is written."""

    def __init__(self, recording: Path, written: Iterable[str] = ()):
        self._file, self._lock = recording / DIGESTS, threading.Lock()
        self._written = set(written)
        self._error: OSError | None = None

    def add(self, what: str, of: Mapping[str, bytes], sync: bool = False) -> None:
        """Add the line of something that was written."""
        self._written.add(what)
        self._append(line(what, of), sync)

    def take_back(self, what: str) -> None:
        """Write that something is about to be written again, if there is a line of it."""
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
    """Return the digests that hold, by what they are of. Raise ValueError for any other line."""
    *lines, _ = raw.decode().split("\n")
    digests: dict[str, str] = {}
    for number, text in enumerate(lines, 1):
        parts = LINE.fullmatch(text)
        if parts is None:
            raise ValueError(f"line {number} of {DIGESTS} is no digest")
        sha, what = parts[1], parts[2]
        if sha.startswith("-"):
            digests.pop(what, None)
        else:
            digests[what] = sha
    return digests


def step_of(what: str) -> int | None:
    """Return which step a line is of, or None."""
    return int(what[5:]) if re.fullmatch(r"step [0-9]{1,9}", what) else None


def flags_are_lost(recording: Path, attributes: Mapping[str, Any]) -> bool:
    """Tell whether the file of a recording's flags is gone.

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
    """Return a PNG with the SHA-256 of its bytes in it, as a text that picture viewers ignore."""
    return png[:-END] + _seal(png[:-END], png[-END:]) + png[-END:]


def seal_holds(png: bytes) -> bool:
    """Tell whether every byte of a PNG is as it was when it was sealed."""
    content, size = memoryview(png), len(_seal(b"", b""))
    return _seal(content[: -END - size], content[-END:]) == content[-END - size : -END]


def _seal(start: Any, end: Any) -> bytes:
    """Return a PNG's chunk that holds the SHA-256 of what stands before and after it."""
    sha = hashlib.sha256(start)
    sha.update(end)
    body = b"tEXt" + KEY + sha.hexdigest().encode()
    return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
