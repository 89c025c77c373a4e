"""Some chunks of a variable's shards, read without zarr's fixed cost of a millisecond a call.

The values are those that zarr reads. What is laid out differently is left to zarr.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from probe.reading.files import opened
from probe.reading.untrusted import Stored

ENTRY, CHECKSUM = 16, 4  # bytes: where a chunk begins and how long it is; a CRC-32C


def read_shards(
    root: Path, stored: Stored, key: tuple[Any, ...], check: Callable[[str, os.stat_result], None]
) -> np.ndarray | None:
    """Return the values at `key`, of a variable with one shard a step and one chunk a token.

    `key` has an int, a slice or an array of indices for each axis. `check` gets each shard's file,
    its name and its stat, before it is read.

    Returns None if a file is missing, laid out differently or fails its checksum; zarr then reads
    it and reports why. Raises RecordingDamaged, RecordingUnreadable.
    """
    steps, tokens, *rest = stored.shape if len(stored.shape) > 2 else (0, 0)
    if stored.dtype is None or stored.inner != (1, 1, *rest) or stored.chunks != (1, tokens, *rest):
        return None
    dtype, size = stored.dtype.newbyteorder("<"), prod(rest) * stored.dtype.itemsize
    asked = [
        np.atleast_1d(np.arange(count)[which])
        for count, which in zip((steps, tokens), key[:2], strict=True)
    ]
    values = np.empty((len(asked[0]), len(asked[1]), *rest), dtype)
    for place, step in enumerate(asked[0]):
        name = ".".join([f"{stored.path}/c.{step}", *["0"] * (len(rest) + 1)])
        try:
            with opened(root, name, functools.partial(check, name)) as file:
                descriptor, index_size = file.fileno(), ENTRY * tokens + CHECKSUM
                index = _checked(descriptor, index_size, os.fstat(descriptor).st_size - index_size)
                if not index:
                    return None
                entries = np.frombuffer(index, "<u8").reshape(tokens, 2)
                for number, token in enumerate(asked[1]):
                    begin, length = entries[token].tolist()
                    if length != size + CHECKSUM or begin >= 2**62:
                        return None
                    chunk = _checked(descriptor, length, begin)
                    if not chunk:
                        return None
                    values[place, number] = np.frombuffer(chunk, dtype).reshape(rest)
        except FileNotFoundError:
            return None
    for axis in reversed(range(len(key))):  # each axis by itself, as zarr's oindex does it
        values = values[(slice(None),) * axis + (_remaining(axis, key[axis]),)]
    return values


def _remaining(axis: int, which: Any) -> Any:
    """Return the index that is left to apply: steps and tokens were chosen when they were read."""
    if axis > 1:
        return which
    return 0 if np.ndim(which) == 0 and not isinstance(which, slice) else slice(None)


def _checked(file: int, length: int, begin: int) -> bytes:
    """Return a part of a file without the checksum at its end; nothing if that fails."""
    content = _part(file, length, begin) if begin >= 0 else b""
    if not len(content) == length > CHECKSUM:
        return b""
    values, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    sound = google_crc32c.value(values).to_bytes(CHECKSUM, "little") == checksum
    return values if sound else b""


def _part(file: int, length: int, begin: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, length, begin)
    os.lseek(file, begin, os.SEEK_SET)  # Windows has no pread; nobody else has this descriptor
    return os.read(file, length)
