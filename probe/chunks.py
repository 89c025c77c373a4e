"""One step of a variable as the file that zarr would write, byte for byte, without zarr's fixed cost of 0.4 ms a call.

A chunk is its values, little-endian, and their CRC-32C. A shard is its chunks one after the other, then where each of them
begins and how long it is, and the CRC-32C of that (zarr v3 specification, sharding codec 1.0).
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np


class StepFiles:
    """A stored array's files, where each step is one file. `array` is its zarr.Array, opened for writing."""

    def __init__(self, root: Path, array: Any):
        self.path, self._array, self._folder = str(array.path), array, root / str(array.path)
        self._dtype = np.dtype(array.dtype).newbyteorder("<")
        self._shape, whole = array.shape[1:], array.shards or array.chunks
        self._count = self._shape[0] if array.shards else 1
        a_step = array.ndim > 1 and whole == (1, *self._shape) and prod(self._shape) > 0
        self._plain = a_step and (not array.shards or array.chunks == (1, 1, *self._shape[1:]))
        self._fill, self._index = np.asarray(array.fill_value, self._dtype), b""
        if self._plain and array.shards:
            size = prod(array.chunks) * self._dtype.itemsize + 4
            lengths = np.full(self._count, size, "<u8")
            self._index = checked(np.stack([np.arange(self._count, dtype="<u8") * lengths, lengths], axis=1).tobytes())

    def file(self, step: int) -> Path:
        """Where a step's values are: of one number a step, all are in one file."""
        if not self._shape:
            return self._folder / "c.0"
        return self._folder / ".".join(["c", str(step), *["0"] * len(self._shape)])

    def write(self, step: int, value: np.ndarray) -> None:
        """Write one step. What zarr would leave out, because it is nothing but fill values, zarr writes. Raises OSError."""
        if not self._plain or value.shape != self._shape:
            self._array[step] = value
            return
        chunks = np.ascontiguousarray(value, self._dtype).reshape(self._count, -1)
        if any(self._is_empty(chunk) for chunk in chunks):
            self._array[step] = value
            return
        with self.file(step).open("wb") as file:
            for chunk in chunks.view(np.uint8):
                file.write(chunk.data)
                file.write(_checksum(chunk))
            file.write(self._index)

    def _is_empty(self, chunk: np.ndarray) -> bool:
        return self._same(chunk[0]) and bool(np.all(self._same(chunk)))

    def _same(self, values: Any) -> Any:
        return values != values if self._fill != self._fill else values == self._fill


def checked(content: bytes) -> bytes:
    """Bytes as a chunk of them is stored: with their CRC-32C after them."""
    return content + _checksum(content)


def _checksum(content: Any) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")
