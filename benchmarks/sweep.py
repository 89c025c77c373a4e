"""What a grid costs beside its cells: workers, the engine, and the bookkeeping of many cells.

python -m benchmarks.sweep             # all three, two to five minutes
python -m benchmarks.sweep workers     # cells a minute with one worker and with two
python -m benchmarks.sweep engine      # a cell of a grid, beside the same run by itself
python -m benchmarks.sweep books       # 10,000 cells by simulation: planned, and found again
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CELLS = 12  # of the grid that is run
MANY = 100  # squared: cells of the simulation
LEAN = {"attention": "off", "text": False, "statistics": False}


def grid(folder: Path, **changes: Any) -> Any:
    """Return a grid of the bundled model."""
    from probe.settings.grid import load_grid

    fields: dict[str, Any] = {
        "prompt": "An astronaut scuba diving",
        "steps": 8,
        "output": str(folder),
        "durability": "none",
        "axes": {"seed": list(range(CELLS))},
    }
    return load_grid({**fields, **changes})


def workers() -> None:
    """Print cells a minute with one worker and with two, each warm."""
    from probe.studies.study import carry_out, plan_study, write_study
    from probe.studies.workers import Processes

    rates = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder, Processes(count) as crew:
            first = {"axes": {"seed": list(range(100, 100 + count))}}
            for changes in (first, {}):  # the first loads the model in each process
                plan = plan_study(grid(Path(folder), **changes), crew)
                write_study(plan)
                outcome = carry_out(plan, crew, lambda _: None)
                assert not outcome.failed, outcome.failed
            rates[count] = 60 * outcome.computed / outcome.seconds
            print(f"{count} worker(s): {rates[count]:.1f} cells a minute")
    print(f"two workers: {rates[2] / rates[1]:.2f} times one")


def engine() -> None:
    """Print what the engine adds to a cell: the same runs with it and without, in turn."""
    from probe.running.recorder import record_as
    from probe.studies.compute import compute
    from probe.studies.models import held
    from probe.studies.study import plan_study, write_study
    from probe.studies.workers import Here

    with tempfile.TemporaryDirectory() as folder:
        plan = plan_study(grid(Path(folder), steps=2, capture=LEAN), Here())
        write_study(plan)
        model, weights = held(plan.missing[0].experiment)
        record_as(model, plan.missing[0].experiment, "warm", weights=weights)
        added, alone = [], []
        for job, cell in zip(plan.jobs("launch", 3), plan.missing, strict=True):
            began = time.perf_counter()
            record_as(model, cell.experiment, f"alone-{cell.address}", weights=weights)
            alone.append(time.perf_counter() - began)
            began = time.perf_counter()
            compute(job, folder)
            record = plan.results.record(cell.address)
            assert record is not None and record["status"] == "complete"
            added.append(time.perf_counter() - began - record["seconds"])
        print(f"a run alone: {statistics.median(alone) * 1000:.0f} ms")
        print(f"the engine adds {statistics.median(added) * 1000:.1f} ms a cell (the median)")


def books() -> None:
    """Print how long planning 10,000 cells takes, and finding all of them again."""
    from probe.studies.study import plan_study, write_study
    from probe.studies.workers import Here

    axes = {"guidance_scale": f"1-10[{MANY}]", "seed": f"0-{MANY - 1}(1)"}
    with tempfile.TemporaryDirectory() as folder:
        plan_study(grid(Path(folder)), Here())  # imports, and the model
        many = grid(Path(folder), axes=axes, keep="metrics")
        plan, seconds = timed(lambda: plan_study(many, Here()))
        print(f"{len(plan.missing)} cells planned in {seconds:.2f} s")
        _, seconds = timed(lambda: write_study(plan))
        print(f"study.json written in {seconds:.2f} s")
        for cell in plan.missing:
            own = {"address": cell.address, "status": "complete", "seconds": 1.0, "run": None}
            plan.results.write({**own, "measures": {}, "cause": "", "remedy": ""})
        again, seconds = timed(lambda: plan_study(many, Here()))
        assert not again.missing
        print(f"{len(again.seconds)} cells found again in {seconds:.2f} s")


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


PARTS = {"workers": workers, "engine": engine, "books": books}

if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()
