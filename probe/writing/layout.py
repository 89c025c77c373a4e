"""How variables lie on a disk: types, chunks, checksums, and how much room they take."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import VLenUTF8  # type: ignore[import-untyped]
from zarr.storage import LocalStore

from probe.format.schema import ArraySpec
from probe.writing import files
from probe.writing.chunks import Layout, StepFiles, checked
from probe.writing.digests import DIGESTS, line, marks

BLOCK = 4096  # of a file on nearly every disk: it takes a whole number of these


def create(folder: Path, arrays: Sequence[ArraySpec], attributes: dict[str, Any]) -> None:
    """Create every variable of a recording in an empty folder, and write those with a value."""
    nodes: dict[str, dict[str, Any]] = {}
    for a, described in attributes_in_files(arrays):
        parts = a.path.split("/")
        for depth in range(1, len(parts)):
            nodes.setdefault("/".join(parts[:depth]), group({}))
        nodes[a.path] = metadata(a, described)
    nodes = dict(sorted(nodes.items(), key=lambda node: (node[0].count("/"), node[0])))
    texts = {path: json.dumps(node, indent=2) for path, node in nodes.items()}
    for path, text in texts.items():
        os.mkdir(f"{folder}/{path}")  # noqa: PTH102
        files.put_new(f"{folder}/{path}/zarr.json", [text.encode()], False)
    consolidated = _consolidated(attributes, nodes, texts)
    files.put_new(folder / "zarr.json", [consolidated.encode()], False)
    known = [a for a in arrays if a.value is not None]
    digests = [line(a.path, {a.path: _write_value(folder, a)}) for a in known]
    for a in arrays:
        if a.path == "committed" and a.value is None:
            # Not as zarr would write it, for zeros are its fill value: a missing file is damage.
            flags = checked(bytes(a.shape[0]))
            files.put_new(folder / a.path / "c.0", [flags], False)
    files.put_new(folder / DIGESTS, digests, False)


def _consolidated(
    attributes: dict[str, Any], nodes: Mapping[str, dict[str, Any]], texts: Mapping[str, str]
) -> str:
    """Return `group(attributes, nodes)` as JSON. `texts` are the nodes as JSON, made once."""
    before, empty, after = json.dumps(group(attributes, {}), indent=2).rpartition('"metadata": {}')
    inside = []
    for path, node in nodes.items():
        is_group = node["node_type"] == "group"
        text = json.dumps(group(node["attributes"], {}), indent=2) if is_group else texts[path]
        inside.append(f"{json.dumps(path)}: {text}".replace("\n", "\n      "))
    listed = ",\n      ".join(inside)
    block = f'"metadata": {{\n      {listed}\n    }}' if inside else empty
    return f"{before}{block}{after}"


def group(
    attributes: dict[str, Any], nodes: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return a group's metadata, as zarr writes it.

    `nodes` are all groups and arrays below it, if it is to list them ("consolidated").
    """
    listed = {}
    if nodes is not None:
        inside = {
            path: group(node["attributes"], {}) if node["node_type"] == "group" else node
            for path, node in nodes.items()
        }
        block = {"kind": "inline", "must_understand": False, "metadata": inside}
        listed = {"consolidated_metadata": block}
    return {"attributes": attributes, "zarr_format": 3, **listed, "node_type": "group"}


def metadata(a: ArraySpec, attributes: dict[str, Any]) -> dict[str, Any]:
    """Return an array's metadata, as zarr writes it."""
    how = layout(a)
    codecs = _encoded(how.dtype)
    if how.shards is not None:
        shards = {
            "chunk_shape": list(how.chunks),
            "codecs": codecs,
            "index_codecs": _encoded(np.dtype(np.uint64)),
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": shards}]
    fill = np.asarray(how.fill_value).item()
    grid = {"chunk_shape": list(how.shards or how.chunks)}
    return {
        "shape": list(how.shape),
        "data_type": "string" if how.dtype is None else how.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if fill != fill else fill,
        "codecs": codecs,
        "attributes": attributes,
        **({"dimension_names": list(a.dims)} if a.dims else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _encoded(dtype: np.dtype[Any] | None) -> list[dict[str, Any]]:
    """Return the codecs of values of a type, as zarr writes them: text has no type here."""
    if dtype is None:
        values: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
    else:
        order = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
        values = {"name": "bytes", **order}
    return [values, {"name": "crc32c"}]


def _write_value(folder: Path, a: ArraySpec) -> bytes:
    """Write a variable whose value is known; return what its digest takes of it."""
    how = layout(a)
    if how.dtype is not None:
        return StepFiles(folder, how, hidden=True).write_all(a.value)
    text = np.asarray(a.value, object).reshape(-1)
    if any(text):  # like zarr: nothing but empty text has no file
        name = ".".join(["c", *["0"] * len(a.shape)])
        files.put_new(folder / a.path / name, [checked(bytes(VLenUTF8().encode(text)))], False)
    return marks(np.asarray(a.value), how.chunks, how.fill_value)


def open_array(path: Path, a: ArraySpec) -> Any:
    """Return a variable as a zarr array.

    Variables with a chunk a step go through the Rust codecs, all others through zarr-python.
    """
    pipeline = (
        "zarrs.ZarrsCodecPipeline"
        if a.per_step
        else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    )
    with zarr.config.set({"codec_pipeline.path": pipeline}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        return zarr.open_array(LocalStore(path), path=a.path, mode="r+")


def attributes_in_files(arrays: Sequence[ArraySpec]) -> Iterator[tuple[ArraySpec, dict[str, Any]]]:
    """Yield each variable with its attributes, the names of its coordinates included."""
    coordinates: dict[str, list[ArraySpec]] = {}
    for a in arrays:
        if a.variable.coordinate and a.dims != (a.variable.name,):
            coordinates.setdefault(a.group, []).append(a)
    for a in arrays:
        beside = [
            c.variable.name for c in coordinates.get(a.group, []) if set(c.dims) <= set(a.dims)
        ]
        attached = {"coordinates": " ".join(beside)} if beside and not a.variable.coordinate else {}
        named = {"long_name": a.variable.long_name, "units": a.variable.units}
        yield a, {**named, **a.attributes, **attached}


def fill_value(a: ArraySpec) -> float:
    """Return what stands where nothing was written yet: NaN or 0."""
    return float("nan") if np.dtype(a.dtype).kind == "f" else 0


def layout(a: ArraySpec) -> Layout:
    """Return how a variable's values lie in files.

    Each step is one file; of maps, each token is a chunk in that file. Nothing is compressed: on
    noise and probabilities that costs more than it saves. A checksum catches what a disk gets
    wrong.
    """
    if a.dtype == "str":
        return Layout(a.path, a.shape, None, tuple(max(1, n) for n in a.shape), None, "")
    dtype = np.dtype(a.dtype)
    whole = tuple(1 if a.per_step and axis == 0 else max(1, n) for axis, n in enumerate(a.shape))
    inner = tuple(
        1 if dim in a.variable.chunked else n for dim, n in zip(a.dims, whole, strict=True)
    )
    shards = whole if a.per_step and inner != whole else None
    is_known = a.value is not None or a.variable.coordinate
    fill = dtype.type(0 if is_known else fill_value(a))
    return Layout(a.path, a.shape, dtype, inner, shards, fill)


def room(arrays: Sequence[ArraySpec], sizes: Mapping[str, int]) -> int:
    """Return the bytes that a recording takes on a disk, with metadata and pictures.

    Files are counted in whole blocks. `sizes` holds the bytes written of each variable, by path.
    """
    total = number = 0
    for a in arrays:
        how = layout(a)
        chunks = prod(-(-n // most) for n, most in zip(a.shape, how.chunks, strict=True))
        files_of = prod(
            -(-n // most) for n, most in zip(a.shape, how.shards or how.chunks, strict=True)
        )
        written = -(-files_of * sizes[a.path] // max(a.nbytes, 1))
        number += written
        total += written * _blocks(
            -(-a.nbytes // max(files_of, 1)) + 20 * -(-chunks // max(files_of, 1))
        )
        if a.path == "images/final":
            picture = a.nbytes // max(a.shape[0], 1)
            labels = [w.value for w in arrays if w.variable.name == "word" and w.value is not None]
            words = {text for value in labels for text in np.ravel(value)}
            total += a.shape[0] * _blocks(picture + BLOCK) + _blocks(
                24_000 + 8 * min(picture, 70_000) + 40_000 * len(words)
            )
    groups = {
        "/".join(a.group.split("/")[:depth])
        for a in arrays
        for depth in range(a.group.count("/") + 2)
    }
    folders = len(arrays) + len(groups)
    metadata = _blocks(700 * folders)
    manifest, digests = _blocks(120 * (number + folders)), _blocks(100 * number)
    return total + folders * 2 * BLOCK + metadata + manifest + digests


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
