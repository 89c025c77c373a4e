"""Sums of maps grow while a run is written beside a GPU: nothing is read back, and they are exact.

A CPU is taken for a GPU here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_runs import at_call, pipeline, take, throw

from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.recorder import resume
from probe.watching import kept, sums
from probe.watching.hooks import Hooks
from probe.writing.store import RunWriter

CAPTURE = {"branches": "both", "steps": "0,2,3"}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that is bound by launches."""
    monkeypatch.setattr(kept, "LAUNCH_BOUND", ("cuda", "cpu"))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what a writer reads back."""
    paths, own = list[str](), RunWriter.read

    def seen(self: RunWriter, path: str, at: Any = ...) -> np.ndarray:
        paths.append(path)
        return own(self, path, at)

    monkeypatch.setattr(RunWriter, "read", seen)
    return paths


def sums_of(run: Run) -> dict[str, np.ndarray]:
    found = {grid: run.variable(f"attention/{grid}/time_sum").values for grid in run.grids}
    return {**found, "overview": run.overview().values}


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("attention", ["maps", "summary"])
def test_sums_grow_and_nothing_is_read_back(
    attention: str, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"capture": {**CAPTURE, "attention": attention}, "images": 2}
    grown = take(tmp_path, **asked)
    assert not any(path.endswith("/cross") for path in read), read
    checks = {check.name: check.verdict for check in verify(grown)}
    assert checks["sums"] == "exact" and "failed" not in checks.values()
    monkeypatch.setattr(sums, "GROWING", 0)
    again = take(tmp_path, **asked)
    assert any(path.endswith("/cross") for path in read), "too large to grow, and not read back"
    for name, value in sums_of(grown).items():
        assert value.tobytes() == sums_of(again)[name].tobytes(), name


@pytest.mark.usefixtures("late")
def test_sums_of_a_resumed_run_begin_with_the_steps_that_it_has(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    whole = take(tmp_path, pipe, capture=CAPTURE)
    with (
        pytest.raises(KeyboardInterrupt),
        Hooks([(pipe.unet, "input", at_call(3, throw(KeyboardInterrupt())))]),
    ):
        take(tmp_path, pipe, capture=CAPTURE)
    cut = next(Run(path) for path in tmp_path.glob("*.zarr") if Run(path).status == "interrupted")
    assert 0 < len(cut.steps) < len(whole.steps)
    finished = resume(cut, pipe, progress=False)
    assert compare(whole, finished).same
    assert {check.name: check.verdict for check in verify(finished)}["sums"] == "exact"


def test_on_a_cpu_maps_are_read_back(tmp_path: Path, read: list[str]) -> None:
    """Its loop has no time for more: P2."""
    run = take(tmp_path, steps=1, scheduler="DDIM")
    assert any(path.endswith("/cross") for path in read)
    assert run.overview().notnull().all()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("dtype", ["float16", pytest.param("float32", marks=pytest.mark.slow)])
def test_sums_of_queries_grow_where_they_are_computed(
    dtype: str, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the queries as they are stored; a few layers at once give the same."""
    capture = {**CAPTURE, "attention": "queries", "dtype": dtype}
    grown = take(tmp_path, capture=capture, images=2)
    assert not any(path.endswith(("/query", "/key")) for path in read), read
    checks = {check.name: check for check in verify(grown)}
    assert checks["sums"].verdict in ("exact", "within tolerance"), checks["sums"]
    assert "failed" not in {check.verdict for check in checks.values()}
    monkeypatch.setattr(sums, "GROWING_THERE", 0)
    again = take(tmp_path, capture=capture, images=2)
    assert any(path.endswith("/query") for path in read), "too large to grow, and not read back"
    monkeypatch.setattr(sums, "GROWING_THERE", 2**28)
    monkeypatch.setattr(sums, "SCORES", 1)
    alone = take(tmp_path, capture=capture, images=2)
    for name, value in sums_of(again).items():
        for other in (grown, alone):
            np.testing.assert_allclose(sums_of(other)[name], value, rtol=1e-5, atol=1e-6)
    moved = sums_of(grown)["overview"].copy()
    moved[0] += 1e-3
    assert not np.allclose(moved, sums_of(again)["overview"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("late")
def test_sums_of_queries_of_a_resumed_run_begin_with_the_steps_that_it_has(tmp_path: Path) -> None:
    pipe, capture = tiny.pipeline(), {**CAPTURE, "attention": "queries"}
    whole = take(tmp_path, pipe, capture=capture)
    with (
        pytest.raises(KeyboardInterrupt),
        Hooks([(pipe.unet, "input", at_call(3, throw(KeyboardInterrupt())))]),
    ):
        take(tmp_path, pipe, capture=capture)
    cut = next(Run(path) for path in tmp_path.glob("*.zarr") if Run(path).status == "interrupted")
    assert 0 < len(cut.steps) < len(whole.steps)
    finished = resume(cut, pipe, progress=False)
    assert compare(whole, finished).same


def test_on_a_cpu_queries_are_read_back(tmp_path: Path, read: list[str]) -> None:
    run = take(tmp_path, pipeline(), steps=2, capture={"attention": "queries"})
    assert any(path.endswith("/query") for path in read)
    assert run.overview().notnull().all()
