"""A recording that somebody else made is untrusted input: it is checked before it is decoded.

    root = read_root(path)                  # its zarr.json, with the attributes of a recording
    groups, arrays = nodes_of(path, root)   # every node: name, types, sizes, codecs

Each problem is a `RecordingDamaged`: one line of cause, one of remedy. Links are never followed,
and pipes and devices never waited for. Chunks are checked when they are read
(`probe.reading.lazy`), so that opening costs the same for any number of steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from probe.errors import RecordingDamaged, RecordingNotFound
from probe.format.attributes import kind_of, problem_of
from probe.format.embedding import KIND as EMBEDDING
from probe.format.schema import FORMATS_READ, ArraySpec, spec
from probe.reading.files import (
    entry_is_link,
    no_longer,
    parse_json,
    read_file,
    read_json,
    refuse,
    refuse_link,
)
from probe.system import OF_THE_FILE, reading
from probe.text import UNCLEAN, printable, shorten

MAX_ROOT, MAX_NODE = 8 * 2**20, 2**20  # bytes of the root file, of any other zarr.json
MAX_ALL_NODES = 16 * 2**20  # bytes of all of them
MAX_NODES, MAX_DEPTH, MAX_CHUNKS, MAX_LABELS, MAX_ALL_LABELS = 2000, 8, 10_000, 100_000, 300_000

DTYPES = {
    name: np.dtype(name)
    for name in "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split()
}
FLOATS = ("float16", "float32", "float64")
KINDS = {
    "run": FLOATS,
    "map": ("float16", "float32", "uint8"),
    "any": tuple(DTYPES),
    "str": ("string",),
}
SEGMENT = re.compile(r"(?!\.+$|__)[A-Za-z0-9_.+-]{1,200}")
GRIDDED = re.compile(r"(?:self_)?attention/(?![0-9]{1,5}x[0-9]{1,5}$)[^/]*")
NODE_KEYS = frozenset(
    "zarr_format node_type attributes shape data_type chunk_grid chunk_key_encoding fill_value "
    "codecs dimension_names".split()
)
KEYS = {"name": "default", "configuration": {"separator": "."}}  # how chunks' files are named
Refusal = Callable[[str], NoReturn]
Table = Callable[[str, str, Sequence[int]], ArraySpec]  # group, name and shape; KeyError if unknown


# --- the root -------------------------------------------------------------------------------------


def read_root(path: Path) -> dict[str, Any]:
    """Return the root zarr.json of a recording.

    Raises RecordingNotFound if there is none, RecordingDamaged if it cannot be trusted, or if it is
    that of an embedding.
    """
    root = read_group(path)
    if root["attributes"].get("kind") == EMBEDDING:
        raise RecordingDamaged(
            f"{printable(str(path))} is an embedding of recordings, and none itself.",
            "Look at it on the page Trajectories of probe view, or open it with xarray.open_zarr.",
        )
    check_attributes(path, root["attributes"])
    return root


def read_group(path: Path) -> dict[str, Any]:
    """Return the root zarr.json of a zarr group with attributes, whatever they say.

    Raises as `read_root`.
    """
    try:
        root = read_json(path, "zarr.json", MAX_ROOT)
    except OSError as error:
        if error.errno not in OF_THE_FILE:  # a loop of links is of the file
            raise
        raise RecordingNotFound(
            f"{printable(str(path))} is not a recording.",
            "probe ls lists the recordings there are.",
        ) from error
    if (
        not isinstance(root, dict)
        or root.get("zarr_format") != 3
        or root.get("node_type") != "group"
        or not isinstance(root.get("attributes"), dict)
    ):
        raise refuse(path, "its zarr.json is not that of a recording")
    return root


def check_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Refuse attributes that are not those of a recording, or of a format that is not read.

    Raises RecordingDamaged.
    """
    version = attributes.get("format_version")
    if type(version) is int and version not in FORMATS_READ:
        known = " and ".join(map(str, FORMATS_READ))
        cause = (
            f"{printable(str(path))} has format {shorten(str(version))}, this version reads "
            f"{known}."
        )
        raise RecordingDamaged(cause, "Use the version of probe that wrote it.")
    if (problem := problem_of(attributes)) is not None:
        raise refuse(path, problem)


# --- nodes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One array as its metadata describes it, after every check.

    `dtype` is None for text; `inner` is the shape of a shard's chunks.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    inner: tuple[int, ...] | None
    dims: tuple[str, ...]
    dtype: np.dtype[Any] | None
    attributes: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def fill(self) -> float:
        """Return the value that is read where there is no file."""
        return float(self.metadata.get("fill_value") or 0) if self.dtype is not None else 0.0

    @property
    def is_labels(self) -> bool:
        """Tell whether these are labels of a dimension, or other text."""
        return self.dtype is None or self.dims == (self.path.rpartition("/")[2],)

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of one chunk's values; 0 for text, whose chunks have any size."""
        return prod(self.chunks) * self.dtype.itemsize if self.dtype is not None else 0


def nodes_of(
    path: Path, root: Mapping[str, Any], table: Table = spec
) -> tuple[list[str], dict[str, Stored]]:
    """Return the groups and arrays that a recording's root file lists.

    Each is compared with its own file and with the schema, or with another `table` of variables. A
    variable that this does not know may be a newer version's: it is accepted if it is harmless.
    Raises RecordingDamaged.
    """
    noising = kind_of(root["attributes"]) == "noising"
    block = root.get("consolidated_metadata")
    nodes = (
        block.get("metadata") if isinstance(block, dict) and block.get("kind") == "inline" else None
    )
    if not isinstance(nodes, dict):
        raise refuse(
            path, "its zarr.json does not list what is in it (zarr.consolidate_metadata does that)"
        )
    if len(nodes) > MAX_NODES:
        raise refuse(path, f"it lists {len(nodes)} variables and groups")
    groups, arrays, left, labels = [""], {}, MAX_ALL_NODES, 0
    for name, node in sorted(nodes.items()):
        shown = shorten(printable(name))
        parent, _, last = name.rpartition("/")
        if (
            not SEGMENT.fullmatch(last)
            or GRIDDED.fullmatch(name)
            or name.count("/") >= MAX_DEPTH
            or parent not in groups
            or name[:1] == "/"
        ):
            raise refuse(
                path,
                f"it lists {shown!r}, which is no name of a variable or group, or is in no group",
            )
        try:
            raw = read_file(
                path, f"{name}/zarr.json", no_longer(path, f"{name}/zarr.json", min(MAX_NODE, left))
            )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise refuse(path, f"{shown} has no zarr.json that can be read") from error
        left -= len(raw)
        own = parse_json(path, f"{name}/zarr.json", raw)
        if not (isinstance(node, dict) and isinstance(own, dict)) or _bare(own) != _bare(node):
            raise refuse(path, f"{shown}/zarr.json and the root's zarr.json disagree")
        if node.get("zarr_format") != 3 or not isinstance(node.get("attributes"), dict):
            raise refuse(path, f"{shown} is not of zarr's third format")
        if node.get("node_type") == "group":
            groups.append(name)
        else:
            arrays[name] = stored = _stored(path, name, node, noising, table)
            labels += prod(stored.shape) if stored.is_labels else 0
            if labels > MAX_ALL_LABELS:
                raise refuse(path, f"it has more than {MAX_ALL_LABELS} labels")
    for group in groups:
        _no_links(path, group)
    return groups, arrays


def _bare(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node without its attributes and without the nodes below it.

    Of attributes the root's copy counts. Whether a file was edited, the manifest tells.
    """
    return {
        key: value
        for key, value in node.items()
        if key not in ("consolidated_metadata", "attributes")
    }


def _no_links(path: Path, group: str) -> None:
    with reading(path), os.scandir(path / group) as entries:
        for entry in entries:
            name = f"{group}/{entry.name}".strip("/")
            if entry_is_link(entry):
                raise refuse_link(path, name)
            if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                raise refuse(path, f"{printable(name)} is a pipe or a device")


def _stored(path: Path, name: str, node: dict[str, Any], noising: bool, table: Table) -> Stored:
    """Return one array as its metadata describes it. Raise RecordingDamaged for a strange one."""

    def no(what: str) -> NoReturn:
        raise refuse(path, f"{name} {what}")

    if (
        node.get("node_type") != "array"
        or not node.keys() <= NODE_KEYS | {"storage_transformers"}
        or node.get("storage_transformers")
    ):
        no("is neither a group nor a plain array")
    kind, grid, keys = node.get("data_type"), node.get("chunk_grid"), node.get("chunk_key_encoding")
    if not isinstance(kind, str) or (kind != "string" and kind not in DTYPES):
        no("has a type that recordings do not have")
    dtype = DTYPES.get(kind)
    if keys != KEYS or not isinstance(grid, dict) or grid.get("name") != "regular":
        no("is not laid out as recordings are")
    shape = _sizes(node.get("shape"), least=0)
    chunks = _sizes((grid.get("configuration") or {}).get("chunk_shape"))
    if shape is None or chunks is None or len(shape) != len(chunks):
        no("has no shape, or its chunks have none")
    dims = _dimensions(node, len(shape), noising, no)
    try:
        inner = _codecs(node.get("codecs"), dtype)
    except (LookupError, TypeError, AttributeError, ValueError):
        no("is encoded in a way that recordings are not")
    counts = _check_extent(shape, chunks, inner, no)
    strings = [text for pair in node["attributes"].items() for text in pair if type(text) is str]
    if any(UNCLEAN.search(text) or "\n" in text or len(text) > 1000 for text in strings):
        no("is described with characters that hide what they say")
    _check_schema(name, shape, dims, kind, noising, table, no)
    stored = Stored(name, shape, chunks, inner, dims, dtype, node["attributes"], node)
    if stored.is_labels and prod(shape) > MAX_LABELS:
        no("has too many labels")
    if dtype is None and prod(counts) > 1:
        no("is text in more than one chunk")
    return stored


def _dimensions(node: dict[str, Any], count: int, noising: bool, no: Refusal) -> tuple[str, ...]:
    """Return the names of an array's dimensions."""
    dims = node.get("dimension_names") or []
    if noising and isinstance(dims, list):  # format 1 called draws of noise images
        dims = ["draw" if dim == "image" else dim for dim in dims]
    if not isinstance(dims, list) or len(dims) != count or len(set(map(str, dims))) < count:
        no("does not name its dimensions")
    if not all(isinstance(dim, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,60}", dim) for dim in dims):
        no("has dimensions with strange names")
    return tuple(dims)


def _check_extent(
    shape: tuple[int, ...], chunks: tuple[int, ...], inner: tuple[int, ...] | None, no: Refusal
) -> list[int]:
    """Return how many chunks there are along each axis. Refuse what no recording is as large as."""
    if inner is not None and (
        len(inner) != len(chunks)
        or any(size % part for size, part in zip(chunks, inner, strict=True))
    ):
        no("has chunks that do not fit its shards")
    counts = [-(-size // part) for size, part in zip(shape, chunks, strict=True)]
    if (
        prod(counts) > MAX_CHUNKS
        or (inner and prod(chunks) // prod(inner) > MAX_CHUNKS)
        or prod(chunks) * 8 > 2**50
        or prod(shape) * 8 > 2**50
    ):
        no(f"claims a shape of {shorten(' x '.join(map(str, shape)))}, which no recording has")
    return counts


def _check_schema(
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    kind: str,
    noising: bool,
    table: Table,
    no: Refusal,
) -> None:
    """Refuse a variable whose dimensions or type are not those of the schema.

    One that the schema does not know is a newer version's, and nothing here reads it.
    """
    group, _, last = name.rpartition("/")
    try:
        known = replace(table(group, last, shape), across="draw" if noising else "image")
    except KeyError:
        return
    allowed = KINDS.get(known.variable.dtype, (known.variable.dtype,))
    if known.dims != dims or kind not in allowed:
        expected = f"{' or '.join(allowed)} ({', '.join(known.dims)})"
        no(f"is {kind} ({', '.join(dims)}), and not {expected}")


def _sizes(found: object, least: int = 1) -> tuple[int, ...] | None:
    if (
        isinstance(found, list)
        and len(found) <= 16
        and all(type(size) is int and least <= size < 2**48 for size in found)
    ):
        return tuple(found)
    return None


def _codecs(codecs: Any, dtype: np.dtype[Any] | None) -> tuple[int, ...] | None:
    """Return the shape of a shard's chunks, or None if the array has no shards.

    Raises ValueError, or what Python raises, for any codec that is not written here.
    """
    names, settings = (
        [codec["name"] for codec in codecs],
        [codec.get("configuration") or {} for codec in codecs],
    )
    if not all(codec.keys() <= {"name", "configuration"} for codec in codecs):
        raise ValueError
    if dtype is None:
        if (
            names
            not in (
                ["vlen-utf8"],
                ["vlen-utf8", "crc32c"],
                ["vlen-utf8", "zstd"],
                ["vlen-utf8", "zstd", "crc32c"],
            )
            or settings[0]
        ):
            raise ValueError
    elif names == ["sharding_indexed"]:
        shard = settings[0]
        whole = (
            shard.keys() == {"chunk_shape", "codecs", "index_codecs", "index_location"}
            and shard["index_location"] == "end"
        )
        for inside in (shard["codecs"], shard["index_codecs"]):
            whole = whole and inside[0]["name"] == "bytes" and _codecs(inside, dtype) is None
        inner = _sizes(shard["chunk_shape"])
        if not whole or inner is None:
            raise ValueError
        return inner
    elif (
        names != ["bytes", "crc32c"] or settings[0] not in ({}, {"endian": "little"}) or settings[1]
    ):
        raise ValueError
    return None
