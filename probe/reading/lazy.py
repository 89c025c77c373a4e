"""A recording's arrays as a labelled tree, like that of stock xarray, but with every read checked.

    tree = open_tree(path)        # as xr.open_datatree(path, engine="zarr")
    tree["latents/latents"].isel(step=3).values

What is laid out as we write it is read by `probe.reading.shards`, and everything else by zarr. Its
store hands out only plain files that are as large as their values. What goes wrong becomes a
`RecordingDamaged` that names the variable.

A chunk without a file reads as its fill value, as always in zarr. No more than `UNBACKED` bytes are
made up that way: a few bytes of metadata could claim terabytes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import xarray as xr
import zarr
from xarray.backends.common import BackendArray
from xarray.core import indexing
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from probe.errors import RecordingDamaged, RecordingUnreadable
from probe.format.schema import spec
from probe.reading.files import LARGE, read_file, refuse
from probe.reading.limits import check_chunk, check_text, takes_no_room
from probe.reading.shards import TEXT, chosen, read_text, read_values
from probe.reading.untrusted import Stored, Table, nodes_of, read_root
from probe.system import exists, reading, trouble_in, unreadable
from probe.text import first_line, printable

MAX_ALL_TEXT = 16 * 2**20  # bytes of all variables of text
UNBACKED = 64 * 2**20  # bytes that are made up for one read
MAX_ABSENT = 4096  # chunks without a file that are read at all
CHOOSE = "Choose steps that were recorded: run.steps."
FAULTS = (  # what zarr makes of a damaged chunk
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    AssertionError,
    MemoryError,
)
# Stock xarray keeps each variable that was read. Here only small ones are kept.
MODULES, MODULE = frozenset({"layer", "module"}), re.compile(r"[\w.]*", re.ASCII)
SMALL, MAX_KEPT = 10_000, 2**21  # values of one variable, and of all that are kept


# --- the store ------------------------------------------------------------------------------------


class CheckedStore(Store):
    """The arrays of a checked recording as a read-only zarr store.

    It hands out plain files of the right size, and nothing else.
    """

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, root: Path, arrays: Mapping[str, Stored]):
        super().__init__(read_only=True)
        self.root, self._arrays = root, arrays
        self._absent: set[str] = set()
        self._made_up = self._weight = self._files = self._bytes = 0
        self._text: dict[str, int] = {}
        self._roomless = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckedStore) and self.root == other.root

    def __hash__(self) -> int:
        return hash(self.root)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
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
                self.absent(stored, key)
                return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content)

    def _chunk(self, stored: Stored, key: str, byte_range: ByteRequest | None) -> bytes:
        part = slice(None)
        if isinstance(byte_range, RangeByteRequest):
            part = slice(byte_range.start, byte_range.end)
        elif isinstance(byte_range, OffsetByteRequest):
            part = slice(byte_range.offset, None)
        elif isinstance(byte_range, SuffixByteRequest):
            part = slice(-byte_range.suffix, None)
        content = read_file(self.root, key, functools.partial(self.check, stored, key), part)
        if (
            isinstance(byte_range, RangeByteRequest)
            and len(content) != byte_range.end - byte_range.start
        ):
            raise refuse(self.root, f"a chunk of {stored.path} is cut off")
        if stored.dtype is None:
            self._text[key] = check_text(self.root, stored, content)
            if sum(self._text.values()) > MAX_ALL_TEXT:
                raise refuse(self.root, f"it has more than {MAX_ALL_TEXT} bytes of text")
        return content

    def read(self, stored: Stored, key: tuple[Any, ...]) -> np.ndarray | None:
        """Return values without zarr's fixed cost, or None: zarr then reads them, or says why not.

        Raises what the checks of a file raise.
        """
        if stored.dtype is not None:
            return read_values(self.root, stored, key, functools.partial(self.check, stored))
        try:
            name = ".".join([f"{stored.path}/c", *["0"] * len(stored.shape)])
            text = read_text(stored, self._chunk(stored, name, None))
        except FileNotFoundError:
            return None
        return None if text is None else np.asarray(chosen(text, key), TEXT)

    def absent(self, stored: Stored, key: str, weight: int = 1) -> None:
        """Count a chunk that is in no file. Raise RecordingDamaged if there are too many.

        What is made up for such chunks takes time. For each file that is read, a few are allowed.
        """
        if key not in self._absent:
            self._absent.add(key)
            self._weight += weight
            self._made_up += min(stored.chunk_bytes, UNBACKED)
            if (
                self._weight > MAX_ABSENT + 50 * self._files
                or self._made_up > 16 * UNBACKED + 50 * self._bytes
            ):
                raise RecordingDamaged(
                    f"{printable(self.root.name)}: {len(self._absent)} chunks were asked for that "
                    "are in no file.",
                    CHOOSE,
                )

    def check(self, stored: Stored, key: str, found: os.stat_result) -> None:
        """Refuse a chunk's file of another size than its values, or one that is a hole."""
        check_chunk(self.root, stored, found)
        self._files, self._bytes = self._files + 1, self._bytes + found.st_size
        if takes_no_room(self.root / key, found):
            self._roomless += found.st_size
            if self._roomless > LARGE:
                what = (
                    f"a chunk of {stored.path} is a hole of {found.st_size} bytes"
                    if found.st_size > LARGE
                    else "its chunks share their bytes, or are holes"
                )
                raise refuse(self.root, what, "Copy it with cp -r, and read the copy.")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
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


# --- the tree -------------------------------------------------------------------------------------


class LazyArray(BackendArray):
    """The values of one stored array, read when they are indexed."""

    def __init__(self, store: CheckedStore, stored: Stored):
        self._store, self._stored = store, stored
        self.shape = stored.shape
        self.dtype = TEXT if stored.dtype is None else stored.dtype

    @functools.cached_property
    def _array(self) -> Any:
        return zarr.open_array(self._store, path=self._stored.path, mode="r", zarr_format=3)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> Any:
        try:
            self._check_size(key)
            found = self._store.read(self._stored, key)
            if found is not None:
                return found
            if self._is_absent(key):
                return np.full(
                    [
                        _count(size, which)
                        for size, which in zip(self.shape[1:], key[1:], strict=True)
                        if not _is_one(which)
                    ],
                    self._fill,
                )
            with np.errstate(
                over="ignore"
            ):  # zarr adds up what a shard's index says, whatever it says
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
            raise RecordingDamaged(
                f"{name}: {self._stored.path} cannot be read: {why}",
                "Take it from a copy, or record it again.",
            ) from error

    def _is_absent(self, key: tuple[Any, ...]) -> bool:
        """Tell whether one step is asked for whose file is missing.

        Asking zarr would take a millisecond.
        """
        if (
            self._stored.dtype is None
            or self._stored.chunks != (1, *self.shape[1:])
            or not _is_one(key[0])
            or not 0 <= key[0] < self.shape[0]
        ):
            return False
        name = ".".join(["c", str(int(key[0])), *["0"] * (len(self.shape) - 1)])
        if exists(self._store.root / self._stored.path / name):
            return False
        self._store.absent(self._stored, f"{self._stored.path}/{name}", weight=2)  # one at a time
        return True

    @functools.cached_property
    def _fill(self) -> Any:
        return np.asarray(self._array.fill_value, self.dtype)

    def _check_size(self, key: tuple[Any, ...]) -> None:
        """Refuse to make up a large amount of values that no file holds."""
        stored = self._stored
        asked = (
            prod(_count(size, which) for size, which in zip(stored.shape, key, strict=True))
            * self.dtype.itemsize
        )
        if asked <= UNBACKED:
            return
        rows = [
            _chunks(size, which, part)
            for size, which, part in zip(stored.shape, key, stored.chunks, strict=True)
        ]
        held = 0
        for place in itertools.product(*rows):
            name = f"{stored.path}/{'.'.join(['c', *map(str, place)])}"
            with contextlib.suppress(FileNotFoundError):
                found = (self._store.root / name).lstat()
                self._store.check(stored, name, found)
                held += found.st_size
        missing = asked * (1 - held / (prod(map(len, rows)) * max(1, stored.chunk_bytes)))
        if missing > UNBACKED and missing > self._largest():
            what = f"{missing / 1e6:.0f} MB of {stored.path} are claimed, and in no file"
            raise RecordingDamaged(f"{printable(self._store.root.name)}: {what}.", CHOOSE)

    def _largest(self) -> int:
        """Return the size of the largest chunk there is: another may well be as large."""
        with reading(self._store.root), os.scandir(self._store.root / self._stored.path) as entries:
            return max(
                (
                    entry.stat(follow_symlinks=False).st_size
                    for entry in entries
                    if entry.name.startswith("c.")
                ),
                default=0,
            )


def _count(size: int, which: Any) -> int:
    """Return how many of `size` positions an index selects.

    By arithmetic alone: `size` is what a stranger claims.
    """
    return len(range(*which.indices(size))) if isinstance(which, slice) else int(np.size(which))


def _is_one(which: Any) -> bool:
    return not isinstance(which, slice) and np.ndim(which) == 0


def _chunks(size: int, which: Any, part: int) -> Sequence[int]:
    """Return the chunks of `part` positions that an index selects."""
    if not isinstance(which, slice):
        places = np.atleast_1d(which)
        return [
            int(chunk) for chunk in np.unique(np.where(places < 0, places + size, places) // part)
        ]
    chosen = range(*which.indices(size))
    ends = sorted((chosen[0] // part, chosen[-1] // part)) if chosen else (0, -1)
    return (
        range(ends[0], ends[1] + 1)
        if abs(chosen.step) <= part
        else sorted({place // part for place in chosen})
    )


def open_tree(path: Path) -> xr.DataTree:
    """Open a recording as stock `xr.open_datatree(path, engine="zarr")` does.

    Raises what `read_root` and `nodes_of` raise.
    """
    with reading(path):
        return tree_of(path, read_root(path))


def tree_of(path: Path, root: Mapping[str, Any], table: Table = spec) -> xr.DataTree:
    """Return what a root file lists as a lazy tree; see `nodes_of`."""
    groups, arrays = nodes_of(path, root, table)
    store = CheckedStore(path, arrays)
    labels = _labels(
        store,
        [stored for name, stored in arrays.items() if stored.dims == (name.rpartition("/")[2],)],
    )
    inside: dict[str, dict[str, xr.Variable]] = {group: {} for group in groups}
    kept = 0
    for name, stored in arrays.items():
        group, _, last = name.rpartition("/")
        values: Any = (
            labels[name]
            if name in labels
            else indexing.LazilyIndexedArray(LazyArray(store, stored))
        )
        if (
            name not in labels
            and prod(stored.shape) <= SMALL
            and kept + prod(stored.shape) <= MAX_KEPT
        ):
            kept += prod(stored.shape)
            values = indexing.MemoryCachedArray(indexing.CopyOnWriteArray(values))  # type: ignore[no-untyped-call]
        layout = {"chunks": stored.chunks, "fill_value": stored.metadata.get("fill_value")}
        inside[group][last] = xr.Variable(stored.dims, values, dict(stored.attributes), layout)
    try:
        tree = xr.DataTree.from_dict(
            {
                f"/{group}": dataset(variables, root["attributes"] if not group else {})
                for group, variables in inside.items()
            }
        )
    except RecordingDamaged:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise refuse(
            path, f"its variables do not fit together ({printable(first_line(error))})"
        ) from error
    for node in tree.subtree:
        for name in MODULES & node.coords.keys():
            # They stand in the Python that readers copy, so none may hold a quotation mark.
            if not all(MODULE.fullmatch(str(label)) for label in node.coords[name].values):
                raise refuse(path, f"{node.path[1:]}/{name} has names that no module has")
    return tree


def in_files(root: Path, name: str, variable: xr.Variable, steps: Iterable[int]) -> list[int]:
    """Return those of `steps` for which a variable has a file.

    The others hold nothing but the fill value. The variable is one of `open_tree`.
    """
    if variable.dims[:1] != ("step",) or variable.encoding.get("chunks") != (
        1,
        *variable.shape[1:],
    ):
        return [int(step) for step in steps]
    rest = ".0" * (variable.ndim - 1)
    return [int(step) for step in steps if exists(root / name / f"c.{step}{rest}")]


def has_files(root: Path, name: str) -> bool:
    """Tell whether anything of a variable was written."""
    with reading(root), os.scandir(root / name) as entries:
        return any(entry.name[:1] == "c" for entry in entries)


def _labels(store: CheckedStore, which: Sequence[Stored]) -> dict[str, np.ndarray]:
    """Return the labels of dimensions, as far as zarr is not needed; xarray reads the others."""
    labels: dict[str, np.ndarray] = {}
    with contextlib.suppress(*FAULTS):  # reading that one alone then says why
        for stored in which:
            values = store.read(stored, (slice(None),) * len(stored.shape))
            if values is not None:
                labels[stored.path] = values
    return labels


def dataset(variables: dict[str, xr.Variable], attributes: dict[str, Any]) -> xr.Dataset:
    """Return variables with their coordinates, as xarray decodes them.

    Coordinates have a dimension's name, or are named by the attribute `coordinates`.
    """
    coordinates = {name for name, variable in variables.items() if variable.dims == (name,)}
    for variable in variables.values():
        named = variable.attrs.get("coordinates")
        if isinstance(named, str) and set(named.split()) <= variables.keys():
            coordinates |= set(named.split())
            variable.encoding["coordinates"] = variable.attrs.pop("coordinates")
    data = {name: variable for name, variable in variables.items() if name not in coordinates}
    return xr.Dataset(
        data, {name: variables[name] for name in variables if name in coordinates}, attributes
    )
