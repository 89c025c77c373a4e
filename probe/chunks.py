"""A variable's files as zarr would write them, byte for byte, each whole or not at all, without zarr's fixed cost of 0.4 ms a call.

A chunk is its values, little-endian, and their CRC-32C. A shard is its chunks one after the other, then where each of them
begins and how long it is, and the CRC-32C of that (zarr v3 specification, sharding codec 1.0). A chunk of nothing but fill
values is left out: it has no file, and in a shard it begins at 2^64 - 1.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from probe import files
from probe.digests import checksum, mark, pieces

NOWHERE = 2**64 - 1


class StepFiles:
    """A stored array's files. `array` is its zarr.Array; with `sync`, what is written has reached the disk when a call returns."""

    def __init__(self, root: Path, array: Any, sync: bool = False):
        self.path, self._array, self._folder, self._sync = str(array.path), array, root / str(array.path), sync
        self._dtype, self._sharded = np.dtype(array.dtype).newbyteorder("<"), array.shards is not None
        self._shape, self._chunk = tuple(array.shape), tuple(array.chunks)
        self.fill = np.asarray(array.fill_value, self._dtype)
        self._index = b""
        if self._sharded:
            lengths = np.full(prod(self._shape[1:]) // prod(self._chunk[1:]), prod(self._chunk) * self._dtype.itemsize + 4, "<u8")
            self._index = checked(np.stack([np.arange(len(lengths), dtype="<u8") * lengths, lengths], axis=1).tobytes())
        self._along: np.ndarray | None = None  # of one number a step: all of them

    def file(self, step: int) -> Path:
        """Where a step's values are: of one number a step, all are in one file."""
        return self._at(() if not self._shape else (step if len(self._shape) > 1 else 0, *[0] * (len(self._shape) - 1)))

    def write(self, step: int, value: np.ndarray) -> bytes:
        """Write one step; returns what its digest takes of it (`probe.digests.mark`). Raises OSError."""
        if len(self._shape) == 1:
            if self._along is None:
                self._along = np.array(self._array[...], self._dtype)
            self._along[step] = value
            self._put((0,), self._along, next(pieces(self._along, self._shape, self.fill))[2])
            return mark(next(pieces(self._along[step : step + 1], (1,), self.fill))[2])
        value = np.broadcast_to(np.asarray(value, self._dtype), self._shape[1:])
        if not value.size:
            return b""
        found = [(part, crc) for _, part, crc in pieces(value, self._chunk[1:], self.fill)]
        marks = b"".join(mark(crc) for _, crc in found)
        if not self._sharded:
            self._put((step, *[0] * value.ndim), *found[0])
        elif any(crc for _, crc in found):
            parts = [content for part, crc in found if crc for content in (part.data, crc)]
            files.replace(self.file(step), [*parts, self._index_of([bool(crc) for _, crc in found])], self._sync)
        else:
            files.remove(self.file(step), self._sync)
        return marks

    def write_all(self, value: np.ndarray) -> bytes:
        """Write all of it, as `write` does a step."""
        value = np.broadcast_to(np.asarray(value, self._dtype), self._shape)
        if self._sharded:
            return b"".join(self.write(step, part) for step, part in enumerate(value))
        self._along, marks = None, []
        for index, part, crc in pieces(value, self._chunk, self.fill) if value.size else ():
            self._put(index, part, crc)
            marks.append(mark(crc))
        return b"".join(marks)

    def _put(self, index: tuple[int, ...], part: np.ndarray, crc: bytes) -> None:
        if crc:
            files.replace(self._at(index), [part.data, crc], self._sync)
        else:
            files.remove(self._at(index), self._sync)

    def _at(self, index: tuple[int, ...]) -> Path:
        return self._folder / ".".join(["c", *map(str, index)])

    def _index_of(self, there: list[bool]) -> bytes:
        """Where in a shard each of its chunks is."""
        if all(there):
            return self._index
        length = prod(self._chunk) * self._dtype.itemsize + 4
        rows = np.full((len(there), 2), NOWHERE, "<u8")
        rows[there] = [(place * length, length) for place in range(sum(there))]
        return checked(rows.tobytes())


def checked(content: bytes) -> bytes:
    """Bytes as a chunk of them is stored: with their CRC-32C after them."""
    return content + checksum(content)
