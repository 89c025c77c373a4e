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
    steps = np.atleast_1d(np.arange(shape[0])[key[0]]) if by_step else [0]
    parts = []
    for step in steps:
        name = ".".join([f"{stored.path}/c", *map(str, [step, *[0] * len(shape)][: len(shape)])])
        with opened(root, name, functools.partial(check, name)) as file:
            content = _checked(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        if len(content) != stored.chunk_bytes:
            return None
        values = content.view(dtype.newbyteorder("<")).reshape(stored.chunks)
        parts.append(chosen(values, (0, *key[1:]) if by_step else key))
    if not by_step:
        return parts[0].copy()
    if not parts:
        return None
    return parts[0].copy() if _is_one(key[0]) else np.stack(parts)


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
                chunk = _checked(descriptor, length, begin)
                if not len(chunk):
                    return None
                values[place, number] = chunk.view(dtype).reshape(rest)
    return chosen(values, (*map(_remaining, key[:2]), *key[2:]))


def chosen(values: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
    """Return the values at `key`, each axis by itself, as zarr's oindex does it."""
    for axis in reversed(range(len(key))):
        values = values[(slice(None),) * axis + (key[axis],)]
    return values


def _remaining(which: Any) -> Any:
    """Return the index that is left to apply where only what `which` names was read."""
    return 0 if _is_one(which) else slice(None)


def _is_one(which: Any) -> bool:
    return not isinstance(which, slice) and np.ndim(which) == 0


def _checked(file: int, length: int, begin: int) -> np.ndarray:
    """Return a part of a file, as bytes without the checksum at its end; none if that fails."""
    content = np.frombuffer(_part(file, length, begin) if begin >= 0 else b"", np.uint8)
    if not len(content) == length > CHECKSUM:
        return content[:0]
    values, checksum = content[:-CHECKSUM], content[-CHECKSUM:].tobytes()
    return values if _crc(values) == checksum else content[:0]


def _crc(values: Any) -> bytes:
    return int(google_crc32c.value(values)).to_bytes(CHECKSUM, "little")


def _part(file: int, length: int, begin: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, length, begin)
    os.lseek(file, begin, os.SEEK_SET)  # Windows has no pread; nobody else has this descriptor
    return os.read(file, length)
