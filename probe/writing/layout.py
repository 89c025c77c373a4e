"""How variables lie on a disk: types, chunks, checksums, and how much room they take."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from probe.format.schema import ArraySpec
from probe.writing import files
from probe.writing.chunks import checked
from probe.writing.digests import DIGESTS, line, marks

BLOCK = 4096  # of a file on nearly every disk: it takes a whole number of these


def create(folder: Path, arrays: Sequence[ArraySpec], attributes: dict[str, Any]) -> None:
    """Create every variable of a recording in an empty folder, and write those with a value."""
    told: list[bytes] = []
    flags = b""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*[Cc]onsolidated metadata.*"
        )  # a draft of the v3 specification; xarray reads it
        warnings.filterwarnings(
            "ignore", message=".*does not have a Zarr V3 specification.*"
        )  # variable-length text
        root = zarr.create_group(LocalStore(folder), zarr_format=3, attributes=attributes)
        for a, described in attributes_in_files(arrays):
            made = root.create_array(
                a.path, **layout(a), dimension_names=a.dims, attributes=described
            )
            if a.value is not None:
                made[...] = a.value
                value = np.asarray(a.value, None if a.dtype == "str" else a.dtype)
                told.append(line(a.path, {a.path: marks(value, made.chunks, made.fill_value)}))
            elif a.path == "committed":
                flags = checked(bytes(made.shape[0]))
        zarr.consolidate_metadata(LocalStore(folder))
    if (
        flags
    ):  # as zarr would not write it: zeros are its fill value, and a missing file is to be damage
        files.replace(folder / "committed" / "c.0", [flags], False)
    files.replace(folder / DIGESTS, told, False)


def open_array(path: Path, a: ArraySpec) -> Any:
    """Return a variable as a zarr array to write into.

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
        told = {"long_name": a.variable.long_name, "units": a.variable.units}
        yield a, {**told, **a.attributes, **attached}


def fill_value(a: ArraySpec) -> float:
    """Return what stands where nothing was written yet: NaN or 0."""
    return float("nan") if np.dtype(a.dtype).kind == "f" else 0


def layout(a: ArraySpec) -> dict[str, Any]:
    """Return type, chunks and checksums of a variable, as zarr's `create_array` takes them.

    Each step is one file; of maps, each token is a chunk in that file. Nothing is compressed: on
    noise and probabilities that costs more than it saves. A checksum catches what a disk gets
    wrong.
    """
    keys = {
        "name": "default",
        "separator": ".",
    }  # flat names: nested directories double the cost of a write
    if a.dtype == "str":
        whole = tuple(max(1, n) for n in a.shape)
        return {
            "shape": a.shape,
            "dtype": str,
            "chunks": whole,
            "chunk_key_encoding": keys,
            "compressors": [Crc32cCodec()],
        }
    dtype = np.dtype(a.dtype)
    whole = tuple(1 if a.per_step and axis == 0 else max(1, n) for axis, n in enumerate(a.shape))
    inner = tuple(
        1 if dim in a.variable.chunked else n for dim, n in zip(a.dims, whole, strict=True)
    )
    described: dict[str, Any] = {
        "shape": a.shape,
        "dtype": dtype,
        "chunk_key_encoding": keys,
        "compressors": [Crc32cCodec()],
        "chunks": inner,
    }
    if a.per_step and inner != whole:
        described["shards"] = whole
    if a.value is None and not a.variable.coordinate:
        described["fill_value"] = fill_value(a)
    return described


def room(arrays: Sequence[ArraySpec], sizes: Mapping[str, int]) -> int:
    """Return the bytes that a recording takes on a disk, with metadata and pictures.

    Files are counted in whole blocks. `sizes` holds the bytes written of each variable, by path.
    """
    total = number = 0
    for a in arrays:
        chunking = layout(a)
        chunks = prod(-(-n // most) for n, most in zip(a.shape, chunking["chunks"], strict=True))
        files_of = prod(
            -(-n // most)
            for n, most in zip(a.shape, chunking.get("shards", chunking["chunks"]), strict=True)
        )
        written = -(-files_of * sizes[a.path] // max(a.nbytes, 1))
        number += written
        total += written * _blocks(
            -(-a.nbytes // max(files_of, 1)) + 20 * -(-chunks // max(files_of, 1))
        )
        if a.path == "images/final":
            picture = a.nbytes // max(a.shape[0], 1)
            words = {
                text
                for found in arrays
                if found.variable.name == "word" and found.value is not None
                for text in np.ravel(found.value)
            }
            total += a.shape[0] * _blocks(picture + BLOCK) + _blocks(
                24_000 + 8 * min(picture, 70_000) + 40_000 * len(words)
            )
    folders = len(arrays) + len(
        {
            "/".join(a.group.split("/")[:depth])
            for a in arrays
            for depth in range(a.group.count("/") + 2)
        }
    )
    return (
        total
        + folders * 2 * BLOCK
        + _blocks(700 * folders)
        + _blocks(120 * (number + folders))
        + _blocks(100 * number)
    )


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
