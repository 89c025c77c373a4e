"""What the store creates and writes are the bytes that zarr would write."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from stored import ATTRIBUTES, contents, layout
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from probe.format.schema import ArraySpec, spec
from probe.writing.digests import DIGESTS
from probe.writing.layout import attributes_in_files, create
from probe.writing.layout import layout as lie
from probe.writing.store import RunWriter

pytestmark = pytest.mark.usefixtures("no_thread_left")

KNOWN = [
    spec("", "step", value=np.arange(1)),  # nothing but zeros, zarr's fill value
    spec("", "sigma", value=np.array([14.6])),
    spec("", "timestep", (1,)),
    spec("attention/4x4", "token", value=np.array([0, 1, -1])),
    spec("attention/4x4", "token_text", value=[["<|startoftext|>", "é ☃ \U0001f419", ""]]),
    spec("attention/4x4", "word", value=[["", "", ""]]),
    spec("text/text_encoder", "embedding", None, "float16", np.ones((1, 2, 3)), note="ü"),
    spec("latents", "latents", None, "float32", np.ones((1, 1, 4, 8, 8))),
    spec("attention/4x4", "cross", None, "uint8", np.ones((1, 3, 1, 1, 2, 2, 4, 4))),
    spec("cost", "peak_memory", value=7),
    spec("cost", "flops", (0,)),
]


def test_what_is_created_is_what_zarr_would_create(tmp_path: Path) -> None:
    """Metadata, consolidated too, and what is known from the beginning: byte for byte."""
    arrays = [*BY_STEP, *NOT_BY_STEP]
    for number, specs in enumerate((layout(), KNOWN, arrays)):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"zarr{number}"
        ours.mkdir()
        create(ours, specs, ATTRIBUTES)
        by_zarr(theirs, specs)
        for name in (DIGESTS, "committed/c.0"):  # of our own: zarr writes no file of zeros
            (ours / name).unlink(missing_ok=True)
        assert contents(ours) == contents(theirs) and len(contents(ours)) > len(specs)


def by_zarr(folder: Path, arrays: list[ArraySpec]) -> None:
    """Create a recording with zarr alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        root = zarr.create_group(LocalStore(folder), zarr_format=3, attributes=ATTRIBUTES)
        for a, attributes in attributes_in_files(arrays):
            how = lie(a)
            stored = root.create_array(
                a.path,
                shape=how.shape,
                dtype=how.dtype or str,
                chunks=how.chunks,
                shards=how.shards,
                fill_value=None if how.dtype is None else how.fill_value,
                chunk_key_encoding={"name": "default", "separator": "."},
                compressors=[Crc32cCodec()],
                dimension_names=a.dims,
                attributes=attributes,
            )
            if a.value is not None:
                stored[...] = a.value
        zarr.consolidate_metadata(LocalStore(folder))


BY_STEP = [
    spec("latents", "latents", (6, 1, 4, 8, 8), "float32"),
    spec("latents", "prediction", (6, 1, 4, 8, 8), "float16"),
    spec("attention/4x4", "cross", (6, 3, 1, 1, 2, 2, 4, 4), "float16"),
    spec("attention/4x5", "cross", (6, 3, 1, 1, 2, 2, 4, 5), "float32"),
    spec("attention/4x6", "cross", (6, 3, 1, 1, 2, 2, 4, 6), "uint8"),
    spec("attention/4x4", "moments", (6, 3, 1, 1, 2, 2, 3)),
    spec("forward", "loss_mean", (6,)),
    spec("unet", "statistics", (6, 4, 2, 1, 0)),
]

NOT_BY_STEP = [
    spec("latents", "final_latents", (1, 4, 8, 8), "float32"),
    spec("attention/4x4", "overview", (3, 6, 4, 4)),
    spec("decoded", "picture", (3, 1, 6, 9, 3)),
    spec("cost", "flops", (3,)),
    spec("cost", "peak_memory", ()),
    spec("source", "psnr", ()),
]


def value_of_step(
    step: int, shape: tuple[int, ...], dtype: str, fill: Any, rng: np.random.Generator
) -> np.ndarray:
    """Draw a step's value, with chunks that hold nothing but fill values at some steps."""
    value = np.asarray(rng.integers(1, 250, shape) / 8).astype(dtype)
    if step == 1 and value.ndim:  # one chunk of a shard is nothing but fill values, or almost
        value[..., :1] = fill
        value[:1] = fill
    if step in (2, 5):
        value[...] = fill
    if step == 3 and value.ndim:  # as a view, and of another type
        value = np.moveaxis(np.moveaxis(value, -1, 0).copy(), 0, -1).astype(np.float64)
    return value


def chunk_files(root: Path) -> dict[str, bytes]:
    files = [file for file in root.rglob("c*") if file.is_file()]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def test_what_is_written_are_the_bytes_that_zarr_would_write(tmp_path: Path) -> None:
    """As chunks and as shards, of every type, with values that are nothing but fill, here and there
    or all over; whole and in part.
    """
    rng = np.random.default_rng(3)
    arrays = [*BY_STEP, *NOT_BY_STEP]
    both = (RunWriter(tmp_path / name, arrays, ATTRIBUTES) for name in ("ours.zarr", "zarr"))
    with next(both) as ours, next(both) as theirs:
        stock = zarr.open_group(theirs.path, mode="r+")
        for a in BY_STEP:
            for step in range(6):
                fill = stock[a.path].fill_value
                value = value_of_step(step, a.shape[1:], a.dtype, fill, rng)
                if step == 5:  # after a first writer, who was killed
                    ours._files[a.path].write(step, np.ones_like(value))
                ours._files[a.path].write(step, value)
                stock[a.path][step] = value
        for a in NOT_BY_STEP:
            value = np.asarray(rng.integers(1, 250, a.shape)).astype(a.dtype)
            parts = {"overview": (slice(None), 2), "picture": 1, "flops": slice(1, 3)}
            for at in (..., parts.get(a.variable.name, ...)):
                ours.write(a.path, value[at], at)
                stock[a.path][at] = value[at]
                value = value + (0 if a.variable.name == "overview" else 1)
        for path in ("decoded/picture", "cost/flops", "attention/4x4/overview"):  # nothing again
            ours.write(path, stock[path].fill_value)
            stock[path][...] = stock[path].fill_value
            ours.write(path, 7, at=0)
            stock[path][0] = 7
        expected = chunk_files(theirs.path)
        assert chunk_files(ours.path) == expected and len(expected) == 29
