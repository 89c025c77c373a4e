"""probe: see inside Stable Diffusion.

import probe

run = probe.record("experiments/astronaut.yaml")     # needs torch
run = probe.open_run("latest")                       # does not

The names below are imported when they are first used, so that importing probe costs milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a command takes over Ctrl-C first, and typing is slow to import
if TYPE_CHECKING:
    from typing import Any

    from probe.experiment import CaptureOptions, Experiment, load_experiment
    from probe.noising import record_noising
    from probe.reading.listing import list_runs
    from probe.reading.recording import Run, open_run
    from probe.running.recorder import record, resume

_HOMES = {
    "CaptureOptions": "probe.experiment",
    "Experiment": "probe.experiment",
    "load_experiment": "probe.experiment",
    "Run": "probe.reading.recording",
    "list_runs": "probe.reading.listing",
    "open_run": "probe.reading.recording",
    "record": "probe.running.recorder",
    "record_noising": "probe.noising",
    "resume": "probe.running.recorder",
}
__all__ = ["CaptureOptions", "Experiment", "Run", "list_runs", "load_experiment", "open_run", "record", "record_noising", "resume"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'probe' has no attribute {name!r}")
