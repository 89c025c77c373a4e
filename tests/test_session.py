"""A session records whatever loop drives it, with captures that probe never heard of.

Such a capture is planned, written, resumed, verified and shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch

from probe.cli import dispatch
from probe.diffusion.family import Family, Predictions
from probe.diffusion.sampling import Step
from probe.diffusion.sd import StableDiffusion
from probe.format import schema
from probe.format.schema import ArraySpec, spec
from probe.format.variables import SCHEMA, Variable
from probe.proof import schema_checks
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running import planning
from probe.running.description import describe
from probe.running.planning import plan
from probe.running.recorder import record, resume
from probe.running.session import Session
from probe.settings.experiment import Experiment, load_experiment
from probe.watching import hooks
from probe.watching.hooks import Watch
from probe.watching.interface import Capture, Plan, Values
from probe.watching.kept import Tray
from probe.writing.store import RunWriter

STEPS = 4


def asked(folder: Path, **changes: Any) -> Experiment:
    return load_experiment(
        {
            "prompt": "a cat on the hat",
            "seed": 3,
            "steps": STEPS,
            "scheduler": "DDIM",
            "output": str(folder),
            **changes,
        }
    )


def test_a_loop_of_ones_own_is_recorded_with_the_same_bits(tmp_path: Path) -> None:
    """The loop below is written over `unet` and `scheduler` alone, as anybody's would be."""
    pipe, experiment = tiny.pipeline(), asked(tmp_path)
    model = StableDiffusion.of(pipe).with_scheduler("DDIM", {})
    settled, path = plan(model, experiment), tmp_path / "own.zarr"
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(STEPS)
    attributes = {
        **describe(model, settled),
        "created": "2026-01-01T00:00:00+00:00",
        "parent_run": None,
    }
    with (
        RunWriter(path, settled.arrays, attributes, "none") as writer,
        Session(model, settled, writer) as session,
    ):
        text = session.begin().rows(("uncond", "cond"), 1)
        latents = torch.randn(settled.latent_shape, generator=torch.Generator().manual_seed(3))
        for index, t in enumerate(scheduler.timesteps):
            with session.watching(index), torch.no_grad():
                uncond, cond = pipe.unet(torch.cat([latents] * 2), t, **text, return_dict=False)[
                    0
                ].chunk(2)
            guided = uncond + experiment.guidance_scale * (cond - uncond)
            following = scheduler.step(guided, t, latents).prev_sample
            said = Predictions({"uncond": uncond, "cond": cond}, guided)
            session.record(Step.of(settled.schedule, index, latents, said, following, "epsilon"))
            latents = following
        session.finish(latents)
        writer.complete()
    assert hooks.count(pipe.unet) == hooks.count(pipe.vae) == hooks.count(pipe.text_encoder) == 0
    assert compare(record(experiment, pipe, progress=False), Run(path)).same


def test_no_hook_is_left_when_a_loop_breaks(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    model = StableDiffusion.of(pipe).with_scheduler("DDIM", {})
    settled = plan(model, asked(tmp_path))

    def broken() -> None:
        with (
            RunWriter(
                tmp_path / "own.zarr", settled.arrays, describe(model, settled), "none"
            ) as writer,
            Session(model, settled, writer) as session,
        ):
            session.begin()
            with session.watching(0):
                assert hooks.count(pipe.unet) > 0
                interrupt()

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert hooks.count(pipe.unet) == hooks.count(pipe.vae) == hooks.count(pipe.text_encoder) == 0


# --- a capture that nobody knew: its class, its entry in the schema, its line in the list ---------


class TimeEmbedding(Capture):
    """What the UNet makes of t, at each step: the first row of its time embedding."""

    def __init__(self, model: Family, settled: Plan):
        self._module, self._plan = model.unet.time_embedding, settled
        self._tray = Tray(["time"])

    def arrays(self) -> list[ArraySpec]:
        width = self._plan.rehearsal.outputs["unet.time_embedding"][-1]
        return [spec("clock", "embedding", (self._plan.calls, width))]

    def watches(self) -> list[Watch]:
        return [
            (
                self._module,
                "output",
                lambda output: self._tray.put("time", output[0].detach().clone()),
            )
        ]

    def take(self, step: Step) -> Values:
        return {"clock/embedding": self._tray.take()["time"]}


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Variable(
        "clock", "embedding", ("step", "feature"), "float32", "what the UNet makes of t"
    )
    for module in (schema, schema_checks):
        monkeypatch.setattr(module, "SCHEMA", (*SCHEMA, entry))
    monkeypatch.setitem(schema._BY_NAME, ("clock", "embedding"), entry)
    monkeypatch.setattr(planning, "CAPTURES", (*planning.CAPTURES, (TimeEmbedding, lambda _: True)))


@pytest.mark.usefixtures("clocked")
def test_a_new_capture_is_planned_written_resumed_verified_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, experiment = tiny.pipeline(), asked(tmp_path)
    width = pipe.unet.time_embedding.linear_2.out_features
    model = StableDiffusion.of(pipe).with_scheduler("DDIM", {})
    assert plan(model, experiment).forecast()["clock/embedding"] == STEPS * width * 4

    whole = record(experiment, pipe, progress=False)
    seen = []
    with (
        hooks.Hooks(
            [(pipe.unet.time_embedding, "output", lambda output: seen.append(output[0].numpy()))]
        ),
        torch.no_grad(),
    ):
        for t in whole.variable("timestep").values:
            pipe.unet(
                torch.zeros(1, 4, 8, 8),
                torch.tensor(t),
                encoder_hidden_states=torch.zeros(1, 77, 16),
            )
    np.testing.assert_allclose(whole.variable("clock/embedding").values, np.stack(seen), atol=1e-6)

    calls = iter(range(100))
    with (
        pytest.raises(KeyboardInterrupt),
        hooks.Hooks([(pipe.unet, "input", lambda _: interrupt() if next(calls) == 2 else None)]),
    ):
        record(experiment, pipe, progress=False)
    cut = next(Run(path) for path in tmp_path.glob("*.zarr") if Run(path).status == "interrupted")
    assert compare(whole, resume(cut, pipe, progress=False)).same

    found = {check.name: check.verdict for check in verify(whole, pipe)}
    assert (
        found["schema"] == found["plan"] == found["inside"] == "exact"
        and "failed" not in found.values()
    )
    pipe.unet.time_embedding.linear_2.bias.data += 1
    assert {check.name: check.verdict for check in verify(whole, pipe)}["inside"] == "failed"

    assert dispatch(["show", str(whole.path)]) == 0
    assert "clock" in capsys.readouterr().out


def interrupt() -> None:
    raise KeyboardInterrupt
