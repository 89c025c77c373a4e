"""A flipped bit in a finished recording is always seen.

Verify sees it in any file, reading in any chunk.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny_runs import take
from xarray.core import indexing

from probe.errors import RecordingDamaged, RecordingNotFound
from probe.format.variables import SCHEMA
from probe.proof.checks import DAMAGE, check_manifest
from probe.proof.verdict import verify
from probe.reading.lazy import CheckedStore, LazyArray
from probe.reading.recording import Run
from probe.reading.untrusted import Stored, nodes_of, read_root
from probe.writing.store import MANIFEST

SMALL, LARGE = (
    (200, 50),
    (2_000, 500),
)  # flips in chunks and in metadata: by default, and where time does not matter
COUNTS = [pytest.param(SMALL, id="some"), pytest.param(LARGE, id="all", marks=pytest.mark.slow)]
EVERYTHING: dict[str, Any] = {
    "branches": "both",
    "counterfactual": ["cat"],
    "self_attention": ["4x4"],
    "activations": ["unet.mid_block", "vae.decoder.mid_block", "text_encoder.encoder.layers.0"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Finished recordings that hold, together, every kind of array that a run can record."""
    folder = tmp_path_factory.mktemp("flips")
    modes = ("maps", "queries", "summary")
    return [
        take(
            folder,
            steps=2,
            scheduler="DDIM",
            decode_every=1,
            name=mode,
            capture={**EVERYTHING, "attention": mode},
        )
        for mode in modes
    ]


@contextlib.contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """A file with one bit the other way round."""
    before = file.read_bytes()
    content = bytearray(before)
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def arrays(run: Run) -> dict[str, Stored]:
    return nodes_of(run.path, read_root(run.path))[1]


def chunks(run: Run, name: str) -> list[Path]:
    return sorted(
        file
        for file in (run.path / name).iterdir()
        if file.name == "c" or file.name.startswith("c.")
    )


def test_the_recordings_hold_every_kind_of_array(runs: list[Run]) -> None:
    found = {name.rpartition("/")[2] for run in runs for name in arrays(run) if chunks(run, name)}
    elsewhere = {"pooled"}  # of SDXL: a chunk like any other
    assert (
        found
        >= {variable.name for variable in SCHEMA if variable.group not in ("source", "forward")}
        - elsewhere
    )


@pytest.mark.parametrize("counts", COUNTS)
def test_a_flipped_bit_in_a_chunk_is_seen(counts: tuple[int, int], runs: list[Run]) -> None:
    """By the manifest, and by whoever reads the value: its checksum does not agree."""
    draw = random.Random(7)
    known = [arrays(run) for run in runs]
    places = [
        (run, name, stored)
        for run, found in zip(runs, known, strict=True)
        for name, stored in found.items()
        if chunks(run, name)
    ]
    draw.shuffle(places)
    unseen = []
    for index in range(counts[0]):
        run, name, stored = places[
            index % len(places)
        ]  # every variable as often as any other, however large it is
        file = draw.choice(chunks(run, name))
        bit = draw.randrange(8 * file.stat().st_size)
        what = f"bit {bit} of {file.relative_to(run.path.parent)}"
        values = xr.Variable(
            stored.dims,
            indexing.LazilyIndexedArray(
                LazyArray(CheckedStore(run.path, known[runs.index(run)]), stored)
            ),
        )
        with flipped(file, bit):
            found = check_manifest(run)
            assert (found.verdict, found.detail) == (
                "failed",
                f"1 files changed: {file.relative_to(run.path)}",
            ), what
            said = refusal(lambda values=values: np.asarray(values))
        if said is None:
            unseen.append((name, what))
        else:
            assert (
                f"{run.path.name}: {name} cannot be read" in said
                or f"{name} is not the text" in said
            ), (what, said)
    assert not {
        what
        for name, what in unseen
        if any(
            "crc32c" in json.dumps(found[name].metadata["codecs"])
            for found in known
            if name in found
        )
    }


@pytest.mark.parametrize("counts", COUNTS)
def test_a_flipped_bit_in_metadata_is_seen(counts: tuple[int, int], runs: list[Run]) -> None:
    """By whoever opens the recording, in one line, or by the manifest."""
    draw = random.Random(8)
    files = [
        [run.path / "zarr.json", run.path / MANIFEST, *sorted(run.path.glob("*/**/zarr.json"))]
        for run in runs
    ]
    refused = 0
    for index in range(counts[1]):
        run, which = runs[index % len(runs)], files[index % len(runs)]
        file = draw.choice(which[:2] if index % 2 else which)  # half of them where most is said
        bit = draw.randrange(8 * file.stat().st_size)
        what = f"bit {bit} of {file.relative_to(run.path.parent)}"
        before = json.loads(file.read_text())
        with flipped(file, bit):
            said = refusal(lambda path=run.path: Run(path).tree)
            refused += said is not None
            if said is None and manifest_of(Run(run.path)) != "failed":
                assert json.loads(file.read_text()) == before, what  # 1e-05 and 1E-05 say the same
    assert 0 < refused < counts[1]


def refusal(read: Callable[[], Any]) -> str | None:
    """The cause for which something cannot be read, in one line; None where it can."""
    try:
        read()
    except (RecordingDamaged, RecordingNotFound) as error:
        for line in (error.cause, error.remedy):
            if not line.strip() or not line.isprintable():
                raise AssertionError(f"not one clean line: {line!r}") from error
        return error.cause
    return None


def manifest_of(run: Run) -> str:
    """What verify says of a manifest."""
    try:
        return check_manifest(run).verdict
    except DAMAGE:  # as verify takes it
        return "failed"


@pytest.mark.parametrize(
    "name",
    [
        "latents/prediction",
        "attention/8x8/cross",
        "attention/8x8/token_text",
        "step",
        "cost/peak_memory",
        "zarr.json",
    ],
)
def test_verify_as_a_whole_sees_it(name: str, runs: list[Run]) -> None:
    """And says so of that check, whatever the others make of it."""
    run = runs[0]
    file = run.path / name if name == "zarr.json" else chunks(run, name)[0]
    bit = 8 * file.read_bytes().index(b"torch") if name == "zarr.json" else 40
    with flipped(file, bit):
        checks = {check.name: check for check in verify(Run(run.path))}
    assert checks["manifest"].verdict == "failed" and checks["manifest"].detail.startswith(
        f"1 files changed: {file.relative_to(run.path)}"
    )
    assert all(
        check.verdict == "exact"
        for check in verify(Run(run.path))
        if check.name in ("manifest", "committed", "schema")
    )
