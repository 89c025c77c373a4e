"""Reading chunks and shards directly gives zarr's values. Everything unusual is left to zarr."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from recordings import ATTRIBUTES

from probe.errors import RecordingDamaged
from probe.format.schema import spec
from probe.reading import lazy
from probe.reading.recording import Run
from probe.writing.store import RunWriter

SHAPE = (3, 5, 2, 1, 2, 2, 4, 3)  # step, token, branch, image, layer, head, y, x
CROSS = "attention/4x3/cross"


@pytest.fixture(autouse=True, params=["preadv", "pread", "seek"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system reads with: on some there is no preadv, on Windows no pread either."""
    for name in ("preadv", "pread")[: ("preadv", "pread", "seek").index(request.param)]:
        monkeypatch.delattr(os, name, raising=False)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two of three steps are written; one token of the second has nothing but zeros, which zarr
    leaves out.
    """
    arrays = [
        spec("", "step", value=np.arange(3)),
        spec("", "committed", SHAPE[:1]),
        spec("attention/4x3", "cross", SHAPE, "float16"),
        spec("attention/4x3", "moments", (*SHAPE[:-2], 3), "float32"),
        spec("latents", "final_latents", (2, 4, 6, 5), "float32"),
        spec(
            "attention/4x3",
            "token_text",
            value=[["<|startoftext|>", "é ☃ \U0001f419", "", "b", "c"]] * 2,
        ),
        spec("cost", "flops", (3,)),
        spec("cost", "peak_memory", ()),
    ]
    values = np.random.default_rng(0).random(SHAPE).astype(np.float16)
    values[1, 3] = 0
    moments = np.random.default_rng(1).random((*SHAPE[:-2], 3)).astype(np.float32)
    with RunWriter(tmp_path / "a.zarr", arrays, ATTRIBUTES) as writer:
        for step in range(2):
            of_step = {CROSS: values[step], "attention/4x3/moments": moments[step]}
            writer.write_step(step, lambda of_step=of_step: of_step, 1)  # type: ignore[misc]
        writer.flush()
        writer.write("latents/final_latents", np.arange(240).reshape(2, 4, 6, 5))
        writer.write("cost/flops", np.arange(3))
        writer.write("cost/peak_memory", 7)
    return Run(tmp_path / "a.zarr")


def some_key(dice: random.Random, size: int) -> Any:
    return dice.choice(
        [
            dice.randrange(size),
            slice(None),
            slice(dice.randrange(size), None, dice.choice([1, 2])),
            slice(None, None, -1),
            np.array([dice.randrange(size) for _ in range(dice.randrange(1, 4))]),
        ]
    )


@pytest.mark.parametrize(
    ("path", "least"),
    {
        CROSS: 30,
        "attention/4x3/moments": 10,
        "latents/final_latents": 50,
        "attention/4x3/token_text": 50,
        "cost/flops": 50,
        "cost/peak_memory": 50,
    }.items(),
)
def test_any_selection_has_the_values_that_zarr_reads(
    run: Run, monkeypatch: pytest.MonkeyPatch, path: str, least: int
) -> None:
    monkeypatch.setattr(lazy, "SMALL", 0)  # else what was read once would be kept
    dice, variable, real, direct = random.Random(0), run.variable(path), lazy.CheckedStore.read, 0

    def counted(*asked: Any) -> np.ndarray | None:
        nonlocal direct
        found = real(*asked)
        direct += found is not None
        return found

    for _ in range(50 if path != CROSS else 150):
        key = {dim: some_key(dice, size) for dim, size in variable.sizes.items()}
        with monkeypatch.context() as patch:
            patch.setattr(lazy.CheckedStore, "read", counted)
            ours = variable.isel(key).values
            patch.setattr(lazy.CheckedStore, "read", lambda *_: None)
            theirs = variable.isel(key).values
        assert (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.tobytes() == theirs.tobytes()
        ), key
    assert direct >= least, "hardly any was read directly"


def test_stock_zarr_agrees(run: Run) -> None:
    stored: Any = zarr.open_array(run.path / CROSS, mode="r")
    assert np.array_equal(run.variable(CROSS).isel(step=0, token=2).values, stored[0, 2])


@pytest.mark.parametrize(
    ("path", "place"),
    [
        pytest.param(CROSS, 0, id="a value"),
        pytest.param(CROSS, 40, id="the checksum's neighbour"),
        pytest.param(CROSS, -1, id="the index's checksum"),
        pytest.param(CROSS, -30, id="the index"),
        pytest.param("attention/4x3/moments", 0, id="a value of a chunk"),
        pytest.param("latents/final_latents", -1, id="the checksum of a chunk"),
    ],
)
def test_a_flipped_bit_is_refused(run: Run, path: str, place: int) -> None:
    file = next((run.path / path).glob("c.0.*"))
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises(RecordingDamaged):
        Run(run.path).variable(path)[:1].values  # noqa: B018


def test_what_was_never_written_reads_as_nothing(run: Run) -> None:
    assert (
        not run.variable(CROSS).isel(step=2).values.any()
        or np.isnan(run.variable(CROSS).isel(step=2).values).all()
    )
    assert not run.variable(CROSS).isel(step=1, token=3).values.any()


def test_a_link_is_refused(run: Run, tmp_path: Path) -> None:
    file = next((run.path / CROSS).glob("c.0.*"))
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    with pytest.raises(RecordingDamaged, match="behind a link"):
        Run(run.path).variable(CROSS).isel(step=0, token=1).values  # noqa: B018
