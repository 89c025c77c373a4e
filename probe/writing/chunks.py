"""Write a variable's files as zarr would, byte for byte, without its fixed cost of 0.4 ms a call.

A chunk is its values, little-endian, and their CRC-32C. A shard is its chunks one after the other,
then the offset and length of each, then the CRC-32C of those (zarr v3 specification, sharding codec
1.0). A chunk of nothing but fill values is left out: it has no file, and its offset in a shard is
2^64 - 1. Each file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from probe.writing import files
from probe.writing.digests import EMPTY, checksum, mark, marks, pieces

NOWHERE = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """How a variable's values lie in files. The names are those of a zarr.Array.

    `dtype` is None for text. With `shards`, each file holds one, and `chunks` are those inside it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill_value: Any


class StepFiles:
    """The files of a stored array, written step by step.

    `array` is its Layout, or its zarr.Array. With `sync`, a call returns when the disk has what was
    written. `hidden`: nobody sees the folder yet, and it holds no such file. `hashes` takes the
    SHA-256 of each file that is written, by its path below `root`.
    """

    def __init__(
        self,
        root: Path,
        array: Any,
        sync: bool = False,
        *,
        hidden: bool = False,
        hashes: dict[str, str] | None = None,
    ):
        self.path, self._sync, self._hashes = str(array.path), sync, hashes
        self._replace = files.put_new if hidden else None
        self._start = str(root / self.path / "c")  # of the name of each of its files
        self._dtype = np.dtype(array.dtype).newbyteorder("<")
        self._shape, self._chunk = tuple(array.shape), tuple(array.chunks)
        self.fill = np.asarray(array.fill_value, self._dtype)
        self._sharded, self._index = array.shards is not None, b""
        # Whether `write` leaves other steps' files alone.
        self.by_step = len(self._shape) > 1 and (array.shards or self._chunk)[0] == 1
        if self._sharded:
            count = prod(self._shape[1:]) // prod(self._chunk[1:])
            lengths = np.full(count, prod(self._chunk) * self._dtype.itemsize + 4, "<u8")
            offsets = np.arange(count, dtype="<u8") * lengths
            self._index = checked(np.stack([offsets, lengths], axis=1).tobytes())
        self._along: np.ndarray | None = None  # of one number a step: all of them

    def file(self, step: int) -> Path:
        """Return the file of a step's values. One number a step: all lie in one file."""
        if not self._shape:
            return Path(self._start)
        return Path(self._at([step if len(self._shape) > 1 else 0, *[0] * len(self._shape[1:])]))

    def write(self, step: int, value: np.ndarray) -> bytes:
        """Write one step. Return its marks for the digest (`probe.writing.digests.mark`).

        Raise OSError.
        """
        if len(self._shape) == 1:
            if self._along is None:
                self._along = self._read()
            along = self._along
            along[step] = value
            self.write_all(along)
            self._along = along
            return marks(along[step : step + 1], None, self.fill)
        value = np.asarray(value, self._dtype)
        if value.shape != self._shape[1:]:
            value = np.broadcast_to(value, self._shape[1:])
        if not value.size:
            return b""
        chunks = pieces(value, self._chunk[1:], self.fill)
        parts = [part if full else None for _, part, full in chunks]
        return self._put([step, *[0] * value.ndim], parts)

    def write_all(self, value: np.ndarray) -> bytes:
        """Write all steps, as `write` writes one. Return their marks."""
        value = np.broadcast_to(np.asarray(value, self._dtype), self._shape)
        if self._sharded:
            return b"".join(self.write(step, part) for step, part in enumerate(value))
        self._along = None
        parts = pieces(value, self._chunk, self.fill) if value.size else ()
        return b"".join(self._put(index, [part if full else None]) for index, part, full in parts)

    def _read(self) -> np.ndarray:
        """Return what is there of one number a step. Raise OSError, ValueError."""
        try:
            content = self.file(0).read_bytes()
        except FileNotFoundError:
            return np.full(self._shape, self.fill)
        if checked(content[:-4]) != content:
            raise ValueError(f"{self.path} does not hold its checksum")
        return np.frombuffer(content[:-4], self._dtype).reshape(self._shape).copy()

    def _put(self, index: Sequence[int], parts: Sequence[np.ndarray | None]) -> bytes:
        """Write one file with these chunks, of which None are empty. Return their marks."""
        marked: list[bytes] = []
        if any(part is not None for part in parts):
            self._write(index, self._content(parts, marked))
            return b"".join(marked)
        if self._replace is None:
            files.remove(self._at(index), self._sync)
        return EMPTY * len(parts)

    def _write(self, index: Sequence[int], content: Iterator[bytes | memoryview]) -> None:
        file, replace = self._at(index), self._replace or files.replace
        if self._hashes is None:
            replace(file, content, self._sync)
            return
        sha = hashlib.sha256()
        replace(file, _hashed(content, sha), self._sync)
        self._hashes[f"{self.path}/{file[len(self._start) - 1 :]}"] = sha.hexdigest()

    def _content(
        self,
        parts: Sequence[np.ndarray | None],
        marked: list[bytes],
    ) -> Iterator[bytes | memoryview]:
        """Yield what goes into the file, and add each chunk's mark to `marked`.

        A chunk is summed after it was written, while it is in the cache.
        """
        for part in parts:
            if part is None:
                marked.append(EMPTY)
                continue
            yield part.view(np.uint8).data
            crc = checksum(part)
            marked.append(mark(crc))
            yield crc
        if self._sharded:
            yield self._index_of([part is not None for part in parts])

    def _at(self, index: Sequence[int]) -> str:
        return ".".join([self._start, *map(str, index)])

    def _index_of(self, there: list[bool]) -> bytes:
        """Return a shard's index: the offset and length of each chunk."""
        if all(there):
            return self._index
        length = prod(self._chunk) * self._dtype.itemsize + 4
        rows = np.full((len(there), 2), NOWHERE, "<u8")
        rows[there] = [(number * length, length) for number in range(sum(there))]
        return checked(rows.tobytes())


def _hashed(
    content: Iterable[bytes | memoryview], sha: hashlib._Hash
) -> Iterator[bytes | memoryview]:
    """Yield parts of a file, and hash each after it was written."""
    for part in content:
        yield part
        sha.update(part)


def checked(content: bytes) -> bytes:
    """Return bytes with their CRC-32C after them, as a chunk is stored."""
    return content + checksum(content)
