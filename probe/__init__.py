"""probe: see inside Stable Diffusion.

    import probe

    run = probe.record("experiments/astronaut.yaml")     # needs torch
    run = probe.open_run("latest")                       # needs no torch

The names below are public; docs/api.txt lists their signatures. Each is imported when it is first
used, so that importing probe costs milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False  # a command takes over Ctrl-C first, and typing is slow to import
if TYPE_CHECKING:
    from typing import Any

    from probe import analysis, testing
    from probe.errors import (
        CaptureError,
        DeviceError,
        DeviceFailed,
        ExperimentError,
        ModelError,
        NotFinite,
        OutOfMemory,
        ProbeError,
        PromptError,
        RecordingBusy,
        RecordingDamaged,
        RecordingLinked,
        RecordingNotFound,
        RecordingUnreadable,
        RunFailed,
        StoreError,
        TooLarge,
        UserError,
    )
    from probe.proof.checks import Check
    from probe.proof.verdict import Verification
    from probe.reading.compare import (
        Comparison,
        Difference,
    )
    from probe.reading.distances import distance
    from probe.reading.embedding import open_embedding
    from probe.reading.listing import list_runs
    from probe.reading.pair import Pair
    from probe.reading.recording import (
        Run,
        open_run,
    )
    from probe.reading.study import Study, open_study
    from probe.reading.trajectories import trajectories
    from probe.running.ask import read_out
    from probe.running.recorder import (
        record,
        record_noising,
        rerun,
        resume,
    )
    from probe.running.session import Session
    from probe.settings.capture import CaptureOptions
    from probe.settings.experiment import (
        Experiment,
        load_experiment,
    )
    from probe.settings.noising import (
        Noising,
        load_noising,
    )
    from probe.studies.study import run_study

_HOMES = {
    "analysis": "probe.analysis",
    "CaptureError": "probe.errors",
    "DeviceError": "probe.errors",
    "DeviceFailed": "probe.errors",
    "ExperimentError": "probe.errors",
    "ModelError": "probe.errors",
    "NotFinite": "probe.errors",
    "OutOfMemory": "probe.errors",
    "ProbeError": "probe.errors",
    "PromptError": "probe.errors",
    "RecordingBusy": "probe.errors",
    "RecordingDamaged": "probe.errors",
    "RecordingLinked": "probe.errors",
    "RecordingNotFound": "probe.errors",
    "RecordingUnreadable": "probe.errors",
    "RunFailed": "probe.errors",
    "StoreError": "probe.errors",
    "TooLarge": "probe.errors",
    "UserError": "probe.errors",
    "CaptureOptions": "probe.settings.capture",
    "Experiment": "probe.settings.experiment",
    "load_experiment": "probe.settings.experiment",
    "Noising": "probe.settings.noising",
    "load_noising": "probe.settings.noising",
    "Check": "probe.proof.checks",
    "Verification": "probe.proof.verdict",
    "Comparison": "probe.reading.compare",
    "Difference": "probe.reading.compare",
    "distance": "probe.reading.distances",
    "list_runs": "probe.reading.listing",
    "Pair": "probe.reading.pair",
    "Run": "probe.reading.recording",
    "open_embedding": "probe.reading.embedding",
    "open_run": "probe.reading.recording",
    "open_study": "probe.reading.study",
    "Study": "probe.reading.study",
    "read_out": "probe.running.ask",
    "record": "probe.running.recorder",
    "record_noising": "probe.running.recorder",
    "rerun": "probe.running.recorder",
    "resume": "probe.running.recorder",
    "run_study": "probe.studies.study",
    "Session": "probe.running.session",
    "testing": "probe.testing",
    "trajectories": "probe.reading.trajectories",
}
_RENAMED: dict[str, tuple[str, str]] = {}  # old name: its new name, and the version that renamed it
__all__ = [
    "CaptureError",
    "CaptureOptions",
    "Check",
    "Comparison",
    "DeviceError",
    "DeviceFailed",
    "Difference",
    "Experiment",
    "ExperimentError",
    "ModelError",
    "Noising",
    "NotFinite",
    "OutOfMemory",
    "Pair",
    "ProbeError",
    "PromptError",
    "RecordingBusy",
    "RecordingDamaged",
    "RecordingLinked",
    "RecordingNotFound",
    "RecordingUnreadable",
    "Run",
    "RunFailed",
    "Session",
    "StoreError",
    "Study",
    "TooLarge",
    "UserError",
    "Verification",
    "analysis",
    "distance",
    "list_runs",
    "load_experiment",
    "load_noising",
    "open_embedding",
    "open_run",
    "open_study",
    "read_out",
    "record",
    "record_noising",
    "rerun",
    "resume",
    "run_study",
    "testing",
    "trajectories",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _RENAMED:  # also asked for before Ctrl-C is taken over
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from probe.public import public_name

    return public_name(__name__, name, _HOMES, _RENAMED)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
