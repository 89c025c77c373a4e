"""Time and memory of calls: measured apart from each other, refused before they are too large."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused

from probe import cost
from probe.errors import TooLarge
from probe.reading.pixels import Cell, Measured, measured
from probe.settings.cost import Cost, load_cost
from probe.system import free_memory, is_out_of_memory
from probe.watching import timing
from probe.watching.timing import Call, Taken, calls_of, fill, laws, take, too_long, too_much

CPU = torch.device("cpu")
SMALL = {"model": "emojiworld", "sizes": [64], "f": [1, 8]}


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return calls_of(load_cost({**SMALL, "attention_up_to": 32}), "cpu", "float32")


def test_calls_are_sorted_and_each_is_made_once(calls: list[Call]) -> None:
    told = [(call.f, call.attention, call.shape) for call in calls]
    assert told == [
        (8, "full", (4, 8, 8)),
        (1, "coarse", (3, 64, 64)),
        (1, "full", (3, 64, 64)),
    ]
    twice = load_cost({"model": "emojiworld", "sizes": [64, 128], "f": [8, 16]})
    assert [call.shape for call in calls_of(twice, "cpu", "float32")] == [
        (4, 4, 4),
        (4, 8, 8),
        (4, 16, 16),
    ]


def test_a_call_is_timed_and_weighed(calls: list[Call]) -> None:
    taken = take(calls[0], 3, 1)
    assert len(taken.seconds) == 3 and all(second > 0 for second in taken.seconds)
    assert taken.peak_bytes > taken.call_bytes >= 0
    assert taken.peak_bytes > 100e6, "a process that has imported torch"


def test_what_would_not_fit_is_refused_before_it_is_made(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "free_memory", lambda: 300_000_000)
    monkeypatch.setattr(timing, "in_a_process", lambda *_: pytest.fail("it was begun"))
    small = ("--model", "emojiworld", "--sizes", "64", "--f", "8", "--quiet", "--measure")
    got = refused(call, *small, "--device", "cpu", main=cost.main)
    wanted = "emojiworld, full attention, 4x8x8: it would need about 0.7 GB, and 0.3 GB are free."
    assert got[0] == wanted and got[1].startswith("Take smaller sizes, a larger f")
    with pytest.raises(TooLarge):
        timing.measured([load_cost(SMALL)], made_by="test", device="cpu")


def test_memory_grows_with_the_network_and_the_grid(calls: list[Call]) -> None:
    assert calls[0].needs < calls[2].needs
    assert not too_much(calls[0], CPU)
    huge = replace(calls[0], needs=10**18)
    assert too_much(huge, CPU).startswith("it would need about 1000000000.0 GB, and ")


def test_free_memory_is_known_here() -> None:
    assert 10**8 < free_memory() < 10**14


def cell(places: int, seconds: float, flops: int = 10**9) -> Cell:
    return Cell(
        model="emojiworld",
        f=8,
        size=(64, 64),
        attention="full",
        shape=(4, places, 1),
        flops=flops,
        rounds=3,
        seconds=seconds,
        low=seconds,
        high=seconds,
        peak_bytes=10**9,
        call_bytes=10**6,
    )


def test_what_would_take_too_long_is_left_out(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(calls[0], flops=100 * 10**9)
    assert too_long(slow, [cell(64, 2.0)], 60) == "it would take about 200 s"
    assert too_long(slow, [cell(64, 2.0)], 300) == too_long(slow, [], 0) == ""
    monkeypatch.setattr(timing, "in_a_process", lambda *_: Taken([4.0, 2.0, 3.0], 10**9, 10**6))
    found = timing.measured(
        [load_cost(SMALL)], made_by="test", device="cpu", rounds=3, most_seconds=5
    )
    (only,), (left,) = found.cells, found.left_out
    assert (only.seconds, only.low, only.high, only.rounds) == (3.0, 2.0, 4.0, 3)
    assert left.places == 64 * 64 and left.why.startswith("it would take about ")
    assert found.machine.clock == "processor time" and found.machine.threads == 1
    assert any("not measured: it would take" in line for line in cost.measured_lines(found))


def test_a_process_that_is_ended_is_a_cause(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = "the system ended its process, probably for its memory"
    monkeypatch.setattr(timing, "in_a_process", lambda *_: ended)
    found = timing.measured([load_cost(SMALL)], made_by="test", device="cpu")
    assert not found.cells and {left.why for left in found.left_out} == {ended}


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("the grids do not fit"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_memory_that_does_not_suffice_is_a_cause(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, error: Exception, is_memory: bool
) -> None:
    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> Any:
            raise error

    monkeypatch.setattr(timing.concurrent.futures, "ProcessPoolExecutor", lambda *_, **__: Pool())
    assert is_out_of_memory(error) == is_memory
    if is_memory:
        assert timing.in_a_process(calls[0], 1, 1) == "the memory did not suffice"
    else:
        with pytest.raises(type(error)):
            timing.in_a_process(calls[0], 1, 1)


def test_a_law_needs_four_grids() -> None:
    cells = [cell(places, 0.5 + places / 100) for places in (16, 32, 64, 256)]
    assert laws(cells[:3]) == [], "three coefficients pass through any three points"
    seconds, memory = laws(cells)
    assert (seconds.quantity, memory.quantity) == ("seconds", "call_bytes")
    assert seconds.at(1000) == pytest.approx(10.5) and seconds.worst < 1e-6
    assert (seconds.source(64), seconds.source(1000)) == ("measured here", "extrapolated")


def test_weights_are_filled(calls: list[Call]) -> None:
    layer = torch.nn.Linear(2000, 2000, device="meta").to_empty(device="cpu")
    fill(layer)
    assert layer.weight.isfinite().all() and 0.015 < float(layer.weight.detach().std()) < 0.025


@pytest.mark.slow
def test_the_command_measures_in_processes_of_their_own(call: Any, tmp_path: Path) -> None:
    code, out, _ = call(
        cost.main,
        *("--model", "emojiworld", "--sizes", "64", "--f", "2,4,8,16", "--device", "cpu"),
        *("--measure", "--rounds", "2", "--output", tmp_path / "measured.json", "--quiet"),
    )
    assert code == 0 and "fitted to N = 16 to 1,024 places" in out and "measured here" in out
    found = Measured.model_validate_json((tmp_path / "measured.json").read_bytes())
    assert [found.shape[1] for found in found.cells] == [4, 8, 16, 32] and len(found.laws) == 2
    for cell in found.cells:
        (fitting,) = calls_of(_settings(cell), "cpu", "float32")
        assert cell.peak_bytes < fitting.needs, "the estimate is never too small"


def _settings(cell: Cell) -> Cost:
    return load_cost({"model": cell.model, "sizes": [cell.size], "f": [cell.f]})


# --- what ships -----------------------------------------------------------------------------------


def test_the_measurements_that_ship() -> None:
    found = measured()
    assert found.machine.threads == 1 and found.machine.clock == "processor time"
    for cell in found.cells:
        assert 0 < cell.low <= cell.seconds <= cell.high and cell.rounds >= 3
    assert {"emojiworld", "small", "sd14"} == {cell.model for cell in found.cells}
    factor, label = found.factor("emojiworld", 8, 128) or (0, "")
    assert factor > 10 and label == "measured here"
    law = found.law("small")
    assert law is not None and law.source(512 * 512) == "extrapolated"
    json.dumps(found.model_dump(mode="json"), allow_nan=False)


@pytest.mark.slow
def test_the_estimate_of_memory_was_never_too_small() -> None:
    for cell in measured().cells:
        asked = _settings(cell)
        needs = {call.attention: call.needs for call in calls_of(asked, "cpu", "float32")}
        assert cell.peak_bytes < needs[cell.attention], cell
