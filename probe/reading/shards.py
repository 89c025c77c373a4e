"""A variable's chunks and shards, read without zarr's fixed cost of a millisecond a call.

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
from numcodecs import VLenUTF8  # type: ignore[import-untyped]

from probe.reading.files import opened
from probe.reading.untrusted import Stored

ENTRY, CHECKSUM = 16, 4  # bytes: where a chunk begins and how long it is; a CRC-32C
TEXT = np.dtypes.StringDType()


Check = Callable[[str, os.stat_result], None]


def read_values(
    root: Path, stored: Stored, key: tuple[Any, ...], check: Check
) -> np.ndarray | None:
    """Return the values of a variable at `key`: an int, a slice or an array for each axis.

    `check` gets each file, its name and its stat, before it is read.

    Returns None if a file is missing, laid out differently or fails its checksum; zarr then reads
    it and reports why. Raises RecordingDamaged, RecordingUnreadable.
    """
    try:
        return (read_chunks if stored.inner is None else read_shards)(root, stored, key, check)
    except FileNotFoundError:
        return None


def read_chunks(
    root: Path, stored: Stored, key: tuple[Any, ...], check: Check
) -> np.ndarray | None:
    """Return the values of a variable that is one chunk, or one a step."""
    shape, dtype = stored.shape, stored.dtype
    by_step = stored.chunks == (1, *shape[1:]) and len(shape) > 0
    if dtype is None or not (by_step or stored.chunks == shape):
        return None
    steps = np.atleast_1d(np.arange(shape[0])[key[0]]) if by_step else np.zeros(1, int)
    if not len(steps):
        return None
    rest = key[1:] if by_step else key
    size = shape[1:] if by_step else shape
    every = all(map(_is_all, rest, size))
    read = np.empty((len(steps) if every else 1, *size), dtype.newbyteorder("<"))
    parts = []
    for place, step in enumerate(steps):
        name = ".".join([f"{stored.path}/c", *map(str, [step, *[0] * len(shape)][: len(shape)])])
        into = read[place if every else 0, ...]  # the dots keep a single number an array
        with opened(root, name, functools.partial(check, name)) as file:
            if os.fstat(file.fileno()).st_size != stored.chunk_bytes + CHECKSUM or not _read_into(
                into, file.fileno(), 0
            ):
                return None
        if not every:
            parts.append(chosen(into, rest).copy())
    values = read if every else np.stack(parts)
    return values[0, ...] if not by_step or _is_one(key[0]) else values


def read_text(stored: Stored, content: bytes) -> np.ndarray | None:
    """Return all of a variable of text, from what is in its file; None as `read_values` does."""
    values, checksum = content[:-CHECKSUM], content[-CHECKSUM:]
    names = [codec["name"] for codec in stored.metadata["codecs"]]
    if names != ["vlen-utf8", "crc32c"] or _crc(values) != checksum:
        return None
    try:
        return np.asarray(VLenUTF8().decode(values), TEXT).reshape(stored.chunks)
    except (ValueError, RuntimeError):
        return None


def read_shards(
    root: Path, stored: Stored, key: tuple[Any, ...], check: Check
) -> np.ndarray | None:
    """Return the values of a variable with one shard a step, which has one chunk a token."""
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
        with opened(root, name, functools.partial(check, name)) as file:
            descriptor, index_size = file.fileno(), ENTRY * tokens + CHECKSUM
            index = _checked(descriptor, index_size, os.fstat(descriptor).st_size - index_size)
            if not len(index):
                return None
            entries = index.view("<u8").reshape(tokens, 2)
            for number, token in enumerate(asked[1]):
                begin, length = entries[token].tolist()
                if length != size + CHECKSUM or begin >= 2**62:
                    return None
                if not _read_into(values[place, number], descriptor, begin):
                    return None
    return chosen(values, (*map(_remaining, key[:2]), *key[2:]))


def chosen(values: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """Return the values at `key`, each axis by itself, as zarr's oindex does it."""
    for axis in reversed(range(len(key))):
        values = values[(slice(None),) * axis + (key[axis],)]
    return values


def _remaining(which: Any) -> Any:
    """Return the index that is left to apply where only what `which` names was read."""
    return 0 if _is_one(which) else slice(None)


def _is_all(which: Any, size: int) -> bool:
    return isinstance(which, slice) and which.indices(size) == (0, size, 1)


def _is_one(which: Any) -> bool:
    return not isinstance(which, slice) and np.ndim(which) == 0


def _checked(file: int, length: int, begin: int) -> np.ndarray:
    """Return a part of a file, as bytes without the checksum at its end; none if that fails."""
    content = np.frombuffer(_part(file, length, begin) if begin >= 0 else b"", np.uint8)
    if not len(content) == length > CHECKSUM:
        return content[:0]
    values, checksum = content[:-CHECKSUM], content[-CHECKSUM:].tobytes()
    return values if _crc(values) == checksum else content[:0]


def _read_into(values: np.ndarray, file: int, begin: int) -> bool:
    """Fill an array with a part of a file, and tell whether the checksum behind it holds."""
    if not hasattr(os, "preadv"):
        content = _checked(file, values.nbytes + CHECKSUM, begin)
        if len(content):
            values[...] = content.view(values.dtype).reshape(values.shape)
        return len(content) > 0
    bytes_ = values.reshape(-1).view(np.uint8)
    checksum = bytearray(CHECKSUM)
    count = os.preadv(file, [bytes_.data, checksum], begin)  # without a copy: half of the time
    return count == len(bytes_) + CHECKSUM and _crc(bytes_) == checksum


def _crc(values: Any) -> bytes:
    return int(google_crc32c.value(values)).to_bytes(CHECKSUM, "little")


def _part(file: int, length: int, begin: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, length, begin)
    os.lseek(file, begin, os.SEEK_SET)  # Windows has no pread; nobody else has this descriptor
    return os.read(file, length)
