"""No scheduler runs long on settings that a recording, a model or an experiment may have."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from recordings import recording

from probe.diffusion.model_configs import MOST_NUMBER, MOST_TIMESTEPS, SCHEDULER_SIZES
from probe.diffusion.model_configs import scheduler_config as check_settings
from probe.diffusion.schedulers import own_scheduler
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, ModelError, RecordingDamaged, UserError
from probe.proof.replay import rebuild_scheduler
from probe.reading.recording import Run
from probe.settings.experiment import Experiment

STEPS = Experiment.model_fields["steps"].metadata[1].le  # the most that may be asked for
LIMIT = 2.0  # seconds of this process
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = {  # not of `dir(diffusers)` alone: to get each name there imports every pipeline
    name: kind
    for name in sorted({*dir(diffusers)} & {*dir(diffusers.schedulers)})
    if isinstance(kind := getattr(diffusers, name, None), type)
    and issubclass(kind, diffusers.SchedulerMixin)
    and kind is not diffusers.SchedulerMixin
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of settings that make no sense
SLOW = (
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)  # near the limit, for each setting


def at_their_bounds(kind: type[Any]) -> Iterator[dict[str, Any]]:
    """The most timesteps alone, then with each other setting at its bound."""
    known = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    most = {"num_train_timesteps": MOST_TIMESTEPS} if "num_train_timesteps" in known else {}
    yield most
    for name, parameter in known.items():
        if name == "trained_betas":
            yield {**most, name: [0.01] * MOST_TIMESTEPS}
        elif isinstance(parameter.default, bool):
            yield {**most, name: not parameter.default}
        elif name in SCHEDULER_SIZES:
            yield from ({**most, name: bound} for bound in SCHEDULER_SIZES[name])
        elif isinstance(parameter.default, int | float) and name not in ("beta_start", "beta_end"):
            yield from ({**most, name: bound} for bound in (MOST_NUMBER, -MOST_NUMBER))


def seconds(kind: type[Any], settings: dict[str, Any]) -> float:
    """The time that a scheduler takes to be made and to set its timesteps, or to refuse."""
    check_settings("x", settings, lambda cause: AssertionError(cause))  # type: ignore[arg-type, return-value]
    start = time.process_time()
    with contextlib.suppress(Exception):
        kind.from_config(settings).set_timesteps(STEPS)  # type: ignore[attr-defined]
    return time.process_time() - start


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in sorted(KINDS)
    ],
)
def test_each_setting_at_its_bound(name: str) -> None:
    slow = {
        str(settings)[:80]: took
        for settings in at_their_bounds(KINDS[name])
        if (took := seconds(KINDS[name], settings)) > LIMIT
    }
    assert not slow


@pytest.mark.parametrize("name", SLOW)
def test_the_slowest_with_the_most_timesteps(name: str) -> None:
    assert seconds(KINDS[name], next(at_their_bounds(KINDS[name]))) < LIMIT


OVER: dict[str, int] = {name: most + 1 for name, (_, most) in SCHEDULER_SIZES.items()} | {
    "a_setting_of_tomorrow": MOST_NUMBER + 1
}


@pytest.mark.parametrize("setting", OVER)
def test_over_its_bound_it_is_refused_by_name_wherever_it_is_written(
    setting: str, tmp_path: Path
) -> None:
    settings = {setting: OVER[setting]}
    told = f": {setting} is {OVER[setting]}, "
    path = recording(tmp_path / "a.zarr")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["scheduler"] = {"class": "KDPM2DiscreteScheduler", "config": settings}
    (path / "zarr.json").write_text(json.dumps(root))
    run = Run(path)
    start, kind = time.process_time(), "KDPM2DiscreteScheduler"
    with pytest.raises(RecordingDamaged, match=told):
        rebuild_scheduler(run)
    with pytest.raises(ModelError, match=told):
        own_scheduler("x", ["diffusers", kind], {**BETAS, **settings})
    assert time.process_time() - start < LIMIT
    if setting in inspect.signature(diffusers.DPMSolverMultistepScheduler.__init__).parameters:
        with pytest.raises(ExperimentError, match=told):
            StableDiffusion.of(tiny.pipeline(), scheduler="DPM++2M", options=settings)


def test_a_scheduler_in_memory_is_bounded_too() -> None:
    pipe = tiny.pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(num_train_timesteps=MOST_TIMESTEPS + 1, **BETAS)
    with pytest.raises(UserError, match=f"num_train_timesteps is {MOST_TIMESTEPS + 1}"):
        StableDiffusion.of(pipe)
