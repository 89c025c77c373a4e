"""A recording's arrays as a labelled tree: what stock xarray makes of it, but nothing is read before it is asked for and checked.

    tree = open_tree(path)        # an xarray DataTree; the same as xr.open_datatree(path, engine="zarr")
    tree["latents/latents"].isel(step=3).values

Of the files, zarr reads the chunks, but for those of sound shards (`probe.reading.shards`), through a store that hands out only
plain files as large as their values are. Whatever goes wrong when values are read is a `RecordingDamaged` that names the
variable. A chunk without a file reads as its fill value, as always in zarr, but no more than `UNBACKED` bytes are made up that
way: a few bytes could claim terabytes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xarray as xr
import zarr
from numcodecs import Zstd  # type: ignore[import-untyped]
from xarray.backends.common import BackendArray
from xarray.core import indexing
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync

from probe.errors import RecordingDamaged, RecordingUnreadable
from probe.reading.files import read_file, refuse
from probe.reading.shards import read_shards
from probe.reading.untrusted import Stored, nodes_of, read_root
from probe.strict_yaml import printable
from probe.system import reading, trouble_in, unreadable

MAX_TEXT = 4 * 2**20  # bytes of a variable of text
UNBACKED = 256 * 2**20
FAULTS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError, MemoryError)  # what zarr makes of a damaged chunk
SMALL = 10_000  # values of a variable that is kept once it was read, as stock xarray keeps every variable
TEXT = np.dtypes.StringDType()
LARGE, MOST_HOLES = 64 * 2**20, 64  # of a larger file, 1 byte in 64 must take room on the disk


# --- chunks ----------------------------------------------------------------------------------------------------------


def sizes_of(stored: Stored) -> tuple[int, int]:
    """The least and the greatest size that a chunk's file can have, in bytes."""
    if stored.dtype is None:
        return 1, MAX_TEXT
    if stored.inner is None:
        return stored.chunk_bytes + 4, stored.chunk_bytes + 4
    count = prod(stored.chunks) // prod(stored.inner)
    return 16 * count + 4, 20 * count + 4 + stored.chunk_bytes


def check_chunk(root: Path, stored: Stored, found: os.stat_result) -> None:
    """Refuse a chunk's file that is not as large as its values are, or that is a hole."""
    least, most = sizes_of(stored)
    if not least <= found.st_size <= most:
        raise refuse(root, f"a chunk of {stored.path} has {found.st_size} bytes, and not {least if least == most else f'{least} to {most}'}")
    if is_hole(found):
        raise refuse(root, f"a chunk of {stored.path} is a hole of {found.st_size} bytes")


def is_hole(found: os.stat_result) -> bool:
    """Whether a large file takes next to no room on the disk, because nothing was ever written into it."""
    blocks = getattr(found, "st_blocks", found.st_size)  # Windows does not say
    return found.st_size > LARGE and blocks * 512 * MOST_HOLES < found.st_size


def _check_text(root: Path, stored: Stored, raw: bytes) -> None:
    """Refuse a chunk of text that would grow beyond measure, or that says that it holds more texts than its shape has."""
    names = [codec["name"] for codec in stored.metadata["codecs"]]
    try:
        if names[-1] == "crc32c":
            raw = raw[:-4]
        if "zstd" in names:
            size = _zstd_size(raw)
            if not 0 < size <= MAX_TEXT:
                raise ValueError
            raw = bytes(Zstd().decode(raw, np.empty(size, np.uint8)))
        if int.from_bytes(raw[:4], "little") != prod(stored.chunks) or len(raw) < 4 + 4 * prod(stored.chunks):
            raise ValueError
    except (ValueError, RuntimeError, IndexError) as error:
        raise refuse(root, f"{stored.path} is not the text that it should be") from error


def _zstd_size(raw: bytes) -> int:
    """The size of what a zstd frame holds, as its header says it, or 0 (RFC 8878, section 3.1.1.1)."""
    if raw[:4] != b"\x28\xb5\x2f\xfd":
        return 0
    flags = raw[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[flags >> 6]
    return int.from_bytes(raw[start : start + length], "little") + (256 if length == 2 else 0)


class Untrusting(Store):
    """The arrays of a checked recording as a zarr store to read from: plain files of the right size, and nothing else."""

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, root: Path, arrays: Mapping[str, Stored]):
        super().__init__(read_only=True)
        self.root, self._arrays = root, arrays

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Untrusting) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    async def get(self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        path, _, file = key.rpartition("/")
        stored = self._arrays.get(path)
        if stored is None:
            return None
        if file == "zarr.json":
            content = json.dumps(stored.metadata).encode()
        else:
            try:
                content = self._chunk(stored, key, byte_range)
            except FileNotFoundError:
                return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    def _chunk(self, stored: Stored, key: str, byte_range: ByteRequest | None) -> bytes:
        def check(found: os.stat_result) -> None:
            check_chunk(self.root, stored, found)

        part = slice(None)
        if isinstance(byte_range, RangeByteRequest):
            part = slice(byte_range.start, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            part = slice(byte_range.offset, None)
        elif isinstance(byte_range, SuffixByteRequest):
            part = slice(-byte_range.suffix, None)
        content = read_file(self.root, key, check, part)
        if isinstance(byte_range, RangeByteRequest) and len(content) != byte_range.end - byte_range.start:
            raise refuse(self.root, f"a chunk of {stored.path} is cut off")
        if stored.dtype is None:
            _check_text(self.root, stored, content)
        return content

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await self.get(key) is not None

    async def set(self, *_: object) -> NoReturn:
        raise PermissionError("a recording that is read is not written")

    async def delete(self, *_: object) -> NoReturn:
        raise PermissionError("a recording that is read is not written")

    def list(self, *_: object) -> NoReturn:
        raise NotImplementedError("what there is stands in the metadata")

    def list_prefix(self, *_: object) -> NoReturn:
        raise NotImplementedError("what there is stands in the metadata")

    def list_dir(self, *_: object) -> NoReturn:
        raise NotImplementedError("what there is stands in the metadata")


# --- the tree --------------------------------------------------------------------------------------------------------


class Values(BackendArray):
    """The values of one stored array, read when they are indexed."""

    def __init__(self, store: Untrusting, stored: Stored):
        self._store, self._stored = store, stored
        self.shape = stored.shape
        self.dtype = TEXT if stored.dtype is None else stored.dtype

    @functools.cached_property
    def _array(self) -> Any:
        return zarr.open_array(self._store, path=self._stored.path, mode="r", zarr_format=3)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        try:
            self._check_size(key)
            found = read_shards(self._store.root, self._stored, key, functools.partial(check_chunk, self._store.root, self._stored))
            if found is not None:
                return found
            with np.errstate(over="ignore"):  # zarr adds up what a shard's index says, whatever it says
                if any(isinstance(which, np.ndarray) for which in key):
                    return self._array.oindex[key]
                return self._array[key]
        except (RecordingDamaged, RecordingUnreadable):
            raise
        except FAULTS as error:
            if (trouble := trouble_in(error)) is not None:
                raise unreadable(self._store.root, trouble) from error
            why = printable(" ".join(str(error).split())) or type(error).__name__
            name = printable(self._store.root.name)
            raise RecordingDamaged(f"{name}: {self._stored.path} cannot be read: {why}", "Take it from a copy, or record it again.") from error

    def _check_size(self, key: tuple[Any, ...]) -> None:
        """Refuse to make up a large amount of values that no file holds."""
        stored = self._stored
        rows = [np.unique(np.arange(size)[which] // part) for size, which, part in zip(stored.shape, key, stored.chunks, strict=True)]
        asked = prod(np.size(np.arange(size)[which]) for size, which in zip(stored.shape, key, strict=True)) * self.dtype.itemsize
        if asked <= UNBACKED:
            return
        held = 0
        for place in itertools.product(*rows):
            try:
                found = (self._store.root / stored.path / ".".join(["c", *map(str, place)])).lstat()
            except FileNotFoundError:
                continue
            check_chunk(self._store.root, stored, found)
            held += found.st_size
        missing = asked * (1 - held / (prod(map(len, rows)) * stored.chunk_bytes))
        if missing > UNBACKED and missing > self._largest():
            what = f"{missing / 1e6:.0f} MB of {stored.path} are claimed, and in no file"
            raise RecordingDamaged(f"{printable(self._store.root.name)}: {what}.", "Choose steps that were recorded: run.steps.")

    def _largest(self) -> int:
        """The size of the largest chunk that there is: another may well be as large."""
        with reading(self._store.root), os.scandir(self._store.root / self._stored.path) as entries:
            return max((entry.stat(follow_symlinks=False).st_size for entry in entries if entry.name.startswith("c.")), default=0)


def open_tree(path: Path) -> xr.DataTree:
    """A recording as stock `xr.open_datatree(path, engine="zarr")` gives it. Raises what `read_root` and `nodes_of` raise."""
    with reading(path):
        return _tree(path)


def _tree(path: Path) -> xr.DataTree:
    root = read_root(path)
    groups, arrays = nodes_of(path, root)
    store = Untrusting(path, arrays)
    labels = _labels(store, [stored for name, stored in arrays.items() if stored.dims == (name.rpartition("/")[2],)])
    inside: dict[str, dict[str, xr.Variable]] = {group: {} for group in groups}
    for name, stored in arrays.items():
        group, _, last = name.rpartition("/")
        values: Any = labels[name] if name in labels else indexing.LazilyIndexedArray(Values(store, stored))
        if name not in labels and prod(stored.shape) <= SMALL:
            values = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(values))  # type: ignore[no-untyped-call]
        inside[group][last] = xr.Variable(stored.dims, values, dict(stored.attributes))
    try:
        return xr.DataTree.from_dict(
            {f"/{group}": _dataset(variables, root["attributes"] if not group else {}) for group, variables in inside.items()}
        )
    except RecordingDamaged:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise refuse(path, f"its variables do not fit together ({printable(str(error).splitlines()[0])})") from error


def _labels(store: Untrusting, which: Sequence[Stored]) -> dict[str, np.ndarray]:
    """The labels of dimensions, which xarray wants at once, in one go; none where one cannot be read, which then says so itself."""

    async def values(stored: Stored) -> Any:
        array = await zarr.api.asynchronous.open_array(store=store, path=stored.path, mode="r", zarr_format=3)
        return await array.getitem(...)

    async def every() -> Sequence[Any]:
        return await asyncio.gather(*map(values, which))

    try:
        return dict(zip([stored.path for stored in which], sync(every()), strict=True))
    except FAULTS:
        return {}


def _dataset(variables: dict[str, xr.Variable], attributes: dict[str, Any]) -> xr.Dataset:
    """Variables with their coordinates, as xarray decodes them: those with a dimension's name, and those that others name."""
    coordinates = {name for name, variable in variables.items() if variable.dims == (name,)}
    for variable in variables.values():
        named = variable.attrs.get("coordinates")
        if isinstance(named, str) and set(named.split()) <= variables.keys():
            coordinates |= set(named.split())
            variable.encoding["coordinates"] = variable.attrs.pop("coordinates")
    data = {name: variable for name, variable in variables.items() if name not in coordinates}
    return xr.Dataset(data, {name: variables[name] for name in variables if name in coordinates}, attributes)
