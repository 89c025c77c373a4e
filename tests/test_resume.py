"""An interrupted run goes on to the same bits: every array equals that of a run nobody stopped.

Most interruptions here are made from a complete recording: `cut` takes away what a kill at that
moment leaves unwritten (tests/test_faults.py compares it with real kills). No UNet is called for
what is committed; a hook counts.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from diffusers import StableDiffusionPipeline
from recordings import change_root, cut, flag, only
from tiny_runs import FULL, OFF, at_call, pipeline, take, throw

from probe.diffusion.loading import BUNDLED, load
from probe.diffusion.sd import StableDiffusion
from probe.errors import (
    ModelError,
    NotFinite,
    ProbeError,
    RecordingBusy,
    RecordingDamaged,
    RecordingNotFound,
    StoreError,
)
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running import recorder
from probe.running.planning import plan
from probe.running.recorder import record, rerun, resume
from probe.settings.experiment import load_experiment
from probe.settings.fields import SCHEDULERS
from probe.watching import hooks
from probe.writing.store import MANIFEST, RunWriter


@functools.cache
def bundled() -> Any:
    return StableDiffusionPipeline.from_pretrained(
        BUNDLED["emojiworld"],
        dtype=torch.float32,
        use_safetensors=True,
        safety_checker=None,
        requires_safety_checker=False,
    )


def go_on(run: Run, pipe: Any = None) -> tuple[Run, int]:
    """Resume a recording; returns it, and how often the UNet was called for it."""
    pipe, calls = pipe or pipeline(), []
    with hooks.Hooks([(pipe.unet, "input", calls.append)]):
        resumed = resume(Run(run.path), pipe, progress=False)
    return resumed, len(calls)


def listed(run: Run) -> set[str]:
    """The files in its manifest, times left out: those of steps that were not measured are NaN,
    which has no file.
    """
    return {
        name
        for name in json.loads((run.path / MANIFEST).read_text())
        if not name.startswith("cost/")
    }


def assert_as_if_nothing_had_happened(resumed: Run, whole: Run) -> None:
    found = compare(whole, resumed)
    assert found.same and found.variables > 12, found.differences
    assert not found.asked and not found.conditions
    assert resumed.status == resumed.attributes["status"] == "complete"
    assert listed(resumed) == listed(whole)
    assert {file.name for file in resumed.path.glob("*.png")} == {
        file.name for file in whole.path.glob("*.png")
    }
    assert not list(resumed.path.rglob("*.partial"))


def assert_resumes(whole: Run, folder: Path, step: int, pipe: Any = None) -> Run:
    """Cut a recording after `step` steps and go on: the same arrays, and no call of the UNet for
    what is committed.
    """
    resumed, calls = go_on(cut(whole, folder, step), pipe)
    assert calls == whole.tree.sizes["step"] - step
    assert_as_if_nothing_had_happened(resumed, whole)
    return resumed


def failed_checks(run: Run) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in verify(run) if check.verdict == "failed"]


# --- the same bits --------------------------------------------------------------------------------

# Schedulers without a history, with one of each kind, and with random numbers.
OFTEN = ("DDIM", "EulerAncestral", "Heun", "PNDM", "DPM++2M", "UniPC", "LMS")


@pytest.mark.parametrize(
    ("scheduler", "step"),
    [
        *((scheduler, 4) for scheduler in OFTEN),
        ("DPM++2M", 1),
        *(
            pytest.param(scheduler, step, marks=pytest.mark.slow)
            for scheduler in SCHEDULERS
            for step in (4, 1)
            if (scheduler, step) != ("DPM++2M", 1) and not (step == 4 and scheduler in OFTEN)
        ),
    ],
)
def test_every_scheduler_goes_on_to_the_same_bits(
    scheduler: str, step: int, tmp_path: Path
) -> None:
    """After the first step, and where the scheduler has a history: cheap, with latents alone, of a
    model with few timesteps.
    """
    pipe = copy.copy(pipeline())
    pipe.scheduler = pipe.scheduler.from_config(
        pipe.scheduler.config, num_train_timesteps=100
    )  # KDPM2's constructor visits each
    whole = take(tmp_path, pipe, steps=6, scheduler=scheduler, capture=OFF)
    assert_resumes(whole, tmp_path, step, pipe)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what: (the experiment, the pipeline)
    "everything, two images": (
        {
            "images": 2,
            "width": 48,
            "decode_every": 2,
            "negative_prompt": "hat",
            "guidance_rescale": 0.4,
            "capture": {**FULL, "dtype": "sqrt_u8"},
        },
        {},
    ),
    "v-prediction, random scheduler, some steps": (
        {"scheduler": "DDIM", "eta": 0.7, "steps": 6, "capture": {"steps": "1::2"}},
        {"prediction": "v_prediction"},
    ),
    "bfloat16 without guidance": (
        {"guidance_scale": 1, "scheduler": "EulerAncestral"},
        {"dtype": torch.bfloat16},
    ),
    "queries, self-attention, a masked word": (
        {
            "capture": {
                "attention": "queries",
                "self_attention": ("8x8",),
                "counterfactual": ("cat",),
            }
        },
        {},
    ),
    "a summary": ({"capture": {"attention": "summary", "branches": "both"}}, {}),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_whatever_is_recorded_goes_on_to_the_same_bits(what: str, tmp_path: Path) -> None:
    asked, made = VARIANTS[what]
    pipe = pipeline(**made)
    whole = take(tmp_path, pipe, **asked)
    resumed, calls = go_on(cut(whole, tmp_path, 2), pipe)
    per_step = 2 if "counterfactual" in asked.get("capture", {}) else 1
    assert calls == (whole.tree.sizes["step"] - 2) * per_step
    assert_as_if_nothing_had_happened(resumed, whole)
    assert not failed_checks(resumed)


def test_a_model_that_computes_with_the_channels_last(tmp_path: Path) -> None:
    pipe = copy.deepcopy(pipeline())
    pipe.unet.to(memory_format=torch.channels_last)
    whole = take(tmp_path, pipe, guidance_rescale=0.4)
    resumed = assert_resumes(whole, tmp_path, 2, pipe)
    verdicts = {check.name: check.verdict for check in verify(resumed, pipe)}
    assert [
        verdicts[name] for name in ("guidance", "scheduler", "predictions", "inside", "decode")
    ] == ["exact"] * 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("whole"), scheduler="DPM++2M", steps=6, decode_every=3)


@pytest.mark.parametrize("step", ["before the first", "after the last"])
def test_a_run_killed_outside_its_loop(step: str, whole: Run, tmp_path: Path) -> None:
    """Committed steps may be none, or all of them: then only what comes at the end is missing."""
    resumed = assert_resumes(
        whole, tmp_path, 0 if step == "before the first" else whole.tree.sizes["step"]
    )
    assert np.isnan(resumed.variable("cost/unet_seconds").values).all() == (
        step == "after the last"
    )


def test_what_was_interrupted_may_be_interrupted_again(whole: Run, tmp_path: Path) -> None:
    run, pipe, calls = cut(whole, tmp_path, 1), tiny.pipeline(), whole.tree.sizes["step"]
    stops: list[tuple[Any, int, BaseException, type[BaseException], str]] = [
        (pipe.unet, 1, KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
        (
            pipe.text_encoder,
            4,
            RuntimeError("no"),
            RuntimeError,
            "failed",
        ),  # four calls hold it against the pipeline's own reading
        (pipe.unet, 0, SystemExit(1), SystemExit, "interrupted"),
        (
            pipe.vae.decoder,
            3,
            RuntimeError("no"),
            RuntimeError,
            "failed",
        ),  # the preview, two decoded steps, the picture
    ]
    for module, call, raised, seen, status in stops:
        with hooks.Hooks([(module, "input", at_call(call, throw(raised)))]), pytest.raises(seen):
            resume(Run(run.path), pipe, progress=False)
        assert Run(run.path).status == status and not (run.path / MANIFEST).exists()
        assert [file.name for file in tmp_path.iterdir()] == [run.path.name], "no lock is left"
    assert Run(run.path).steps.tolist() == list(range(calls)), "the last one failed at its end"
    resumed, called = go_on(run, pipe)
    assert called == 0
    assert_as_if_nothing_had_happened(resumed, whole)
    assert [entry["changed"] for entry in resumed.attributes["resumed"]] == [[]] * 5
    moments = [entry["at"] for entry in resumed.attributes["resumed"]]
    assert moments == sorted(moments) and moments[0] > resumed.attributes["created"]


def test_recorded_nan_goes_on_as_nan(tmp_path: Path) -> None:
    pipe = tiny.pipeline()

    def spoil() -> None:
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("nan"))

    with hooks.Hooks([(pipe.unet, "input", at_call(2, spoil))]):
        whole = take(tmp_path, pipe, scheduler="DDIM", steps=6, on_nan="record")
    assert (
        np.isfinite(whole.prediction().values[:2]).all()
        and np.isnan(whole.prediction().values[2:]).all()
    )
    assert_resumes(
        whole, tmp_path, 4
    )  # from step 3 on the latents themselves are NaN, and so is what any weights make of them


def test_flags_with_a_hole_count_up_to_the_hole(whole: Run, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, 3)
    flag(run, [1, 0, 1, *[0] * (whole.tree.sizes["step"] - 3)])
    resumed, calls = go_on(run)
    assert calls == whole.tree.sizes["step"] - 1
    assert_as_if_nothing_had_happened(resumed, whole)


def test_what_a_killed_writer_left_is_cleared(whole: Run, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, 2)
    left = [
        run.path / name
        for name in (
            "zarr.json.0123abcd.partial",
            "committed/c.0123.partial",
            "latents/latents/zarr.partial",
        )
    ]
    for file in (*left, run.path / MANIFEST):
        file.write_text("half of it")
    torn = run.path / "latents" / "prediction" / "c.2.0.0.0.0"
    torn.write_bytes(b"torn")
    (tmp_path / f".{run.path.name}.lock").write_text("")
    resumed, _ = go_on(run)
    assert_as_if_nothing_had_happened(resumed, whole)
    assert not failed_checks(resumed)


def test_a_complete_run_is_returned_as_it_is(
    whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.path.rglob("*")}
    assert resume(Run(whole.path)).path == whole.path  # with no pipeline: nothing is loaded
    assert capsys.readouterr().err == f"{whole.name} is complete already.\n"
    assert {file: file.stat().st_mtime_ns for file in whole.path.rglob("*")} == before


@pytest.mark.slow
def test_the_model_is_loaded_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the number format that "auto" was then, and of the commit that "main" was: by resume and
    by rerun.
    """
    whole = take(
        tmp_path,
        load("emojiworld", dtype="bfloat16", device="cpu"),
        prompt="a cat on the moon",
        steps=3,
        capture=OFF,
    )
    assert whole.experiment.dtype == "auto" and whole.attributes["model"]["dtype"] == "bfloat16"
    assert_as_if_nothing_had_happened(resume(cut(whole, tmp_path, 2), progress=False), whole)
    assert compare(whole, rerun(whole, progress=False)).same
    left = change_root(
        cut(whole, tmp_path, 1), lambda attributes: attributes["model"].update(revision="0123abc")
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        recorder,
        "load",
        lambda _, *, revision, dtype, **__: (
            asked.append((revision, dtype)) or load("emojiworld", dtype=dtype)
        ),
    )
    for again in (resume, rerun):
        again(left, progress=False)
    assert asked == [("0123abc", "bfloat16")] * 2


def test_another_number_format_is_not_called_other_weights(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"was begun in float32, and this model is in bfloat16\."):
        resume(cut(whole, tmp_path, 2), pipeline(torch.bfloat16), progress=False)


# --- what is said, and what is refused ------------------------------------------------------------


def test_other_conditions_are_said_and_written_down(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cut(whole, tmp_path, 4)
    change_root(run, lambda attributes: attributes["environment"].update(torch="1.0.0", threads=96))
    resumed = resume(Run(run.path), pipeline())
    said = (
        "Not as it was when the run began, so the last bits may differ: threads: 96 and 1; torch: "
        f"1.0.0 and {torch.__version__}"
    )
    err = capsys.readouterr().err
    assert (
        said in err
        and f"Resuming {run.path}: 4 of {whole.tree.sizes['step']} model calls are there" in err
    )
    (entry,) = resumed.attributes["resumed"]
    assert entry["changed"] == ["threads: 96 and 1", f"torch: 1.0.0 and {torch.__version__}"]
    assert (
        resumed.attributes["environment"]["threads"] == 96 and entry["environment"]["threads"] == 1
    )
    assert compare(whole, resumed).same and resumed.status == "complete"


def test_a_run_that_was_not_interrupted_says_nothing_of_conditions(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(cut(whole, tmp_path, 4), pipeline())
    assert "Not as it was" not in capsys.readouterr().err


def chunk(run: Run, variable: str, step: int) -> Path:
    (found,) = (run.path / variable).glob(f"c.{step}.*")
    return found


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def edit(**changes: Any) -> Callable[[Run], object]:
    return lambda run: change_root(run, lambda attributes: attributes["experiment"].update(changes))


DAMAGES: dict[str, tuple[Callable[[Run], object], type[ProbeError], str]] = {
    # what: (done to a recording with 4 committed steps, error, its cause)
    "a flipped bit in a prediction": (
        lambda run: flip(chunk(run, "latents/prediction", 1)),
        RecordingDamaged,
        "latents/prediction cannot be read",
    ),
    "a flipped bit in the latents": (
        lambda run: flip(chunk(run, "latents/latents", 1)),
        RecordingDamaged,
        "latents/latents cannot be read",
    ),
    "a flipped bit in the maps": (
        lambda run: flip(chunk(run, "attention/8x8/cross", 1)),
        RecordingDamaged,
        "attention/8x8/cross cannot be read",
    ),
    "a flipped bit in the flags": (
        lambda run: flip(run.path / "committed" / "c.0"),
        RecordingDamaged,
        "committed cannot be read",
    ),
    "an empty chunk": (
        lambda run: chunk(run, "latents/prediction", 1).write_bytes(b""),
        RecordingDamaged,
        "latents/prediction cannot be read",
    ),
    "a dropped prediction": (
        lambda run: chunk(run, "latents/prediction", 1).unlink(),
        RecordingDamaged,
        "latents/prediction of step 1",
    ),
    "a dropped prediction of the last": (
        lambda run: chunk(run, "latents/prediction", 3).unlink(),
        RecordingDamaged,
        "latents/prediction of step 3",
    ),
    "a dropped branch": (
        lambda run: chunk(run, "latents/prediction_cond", 2).unlink(),
        RecordingDamaged,
        "latents/prediction_cond of step 2",
    ),
    "dropped latents": (
        lambda run: chunk(run, "latents/latents", 2).unlink(),
        RecordingDamaged,
        "latents/latents of step 2",
    ),
    "dropped maps": (
        lambda run: chunk(run, "attention/8x8/cross", 1).unlink(),
        RecordingDamaged,
        "attention/8x8/cross of step 1",
    ),
    "a variable that is gone": (
        lambda run: shutil.rmtree(run.path / "latents" / "prediction"),
        ProbeError,
        "latents/prediction",
    ),
    "other steps": (edit(steps=9), RecordingDamaged, "is not the one it was begun with"),
    "another prompt": (
        edit(prompt="a hat on the cat"),
        RecordingDamaged,
        "is not the one it was begun with",
    ),
    "another seed": (edit(seed=4), RecordingDamaged, "is not the one it was begun with"),
    "another guidance": (
        edit(guidance_scale=4.0),
        RecordingDamaged,
        "is not the one it was begun with",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_recording_is_not_gone_on_with(what: str, whole: Run, tmp_path: Path) -> None:
    damage, kind, cause = DAMAGES[what]
    run = cut(whole, tmp_path, 4)
    damage(run)
    with pytest.raises(kind) as caught:
        resume(Run(run.path), pipeline(), progress=False)
    assert cause in caught.value.cause and "\n" not in caught.value.cause and caught.value.remedy
    assert Run(run.path).status in ("interrupted", "failed") and not (run.path / MANIFEST).exists()
    assert [file.name for file in tmp_path.iterdir()] == [run.path.name], "no lock is left"


def test_latents_that_come_out_otherwise_are_refused_by_step(whole: Run, tmp_path: Path) -> None:
    """Consistently changed on disk, checksums and all: as another version of a scheduler would have
    made them.
    """
    run = cut(whole, tmp_path, 4)
    latents = zarr.open_array(run.path, path="latents/latents", mode="r+")
    latents[2] = np.nextafter(latents[2], np.float32(9))
    with pytest.raises(
        StoreError,
        match=r"The latents of step 2 come out otherwise than they were recorded \(by up to "
        r"[\d.e-]+\)\.",
    ) as caught:
        resume(Run(run.path), pipeline(), progress=False)
    assert "probe rerun" in caught.value.remedy
    assert Run(run.path).steps.tolist() == [0, 1, 2, 3], "what was there is still there"


def test_other_weights_are_refused_by_name(whole: Run, tmp_path: Path) -> None:
    run = cut(whole, tmp_path, 4)
    before = (run.path / "zarr.json").read_bytes()
    with pytest.raises(ModelError) as caught:
        resume(run, tiny.pipeline(seed=1), progress=False)
    assert (
        caught.value.cause.startswith(f"{run.name} was begun with other weights of ")
        and "probe rerun" in caught.value.remedy
    )
    assert (run.path / "zarr.json").read_bytes() == before and run.status == "interrupted"
    assert_as_if_nothing_had_happened(go_on(run)[0], whole)


def test_a_run_whose_writer_lives_is_refused(whole: Run, tmp_path: Path) -> None:
    run, model = cut(whole, tmp_path, 4), StableDiffusion.of(pipeline())
    arrays = plan(model.with_scheduler("DPM++2M", {}), whole.experiment).arrays
    with RunWriter(run.path, arrays, {}, resume=True):
        with pytest.raises(RecordingBusy, match="is being written by process"):
            resume(Run(run.path), pipeline(), progress=False)
        assert Run(run.path).status == "running"
    assert_as_if_nothing_had_happened(go_on(run)[0], whole)


def test_a_name_without_a_recording_is_not_made_one(tmp_path: Path) -> None:
    with pytest.raises(RecordingNotFound, match="is not a recording"):
        RunWriter(tmp_path / "a.zarr", [], {}, resume=True)
    assert not list(tmp_path.iterdir())


def test_a_run_that_met_nan_meets_it_again(tmp_path: Path) -> None:
    """What stopped it is not forgotten: it stops at the same step, with the same words, and can
    still be looked at.
    """
    pipe = tiny.pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("inf"))
    said = set()
    for attempt in (
        lambda: take(tmp_path, pipe, scheduler="DDIM"),
        lambda: resume(only(tmp_path), pipe, progress=False),
    ):
        with pytest.raises(NotFinite) as caught:
            attempt()
        said.add(str(caught.value))
        assert only(tmp_path).status == "failed"
    assert len(said) == 1


# --- every step of 20, on the bundled model -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_step_of_20_on_the_bundled_model(scheduler: str, tmp_path: Path) -> None:
    pipe = bundled()
    asked = load_experiment(
        {
            "prompt": "An astronaut scuba diving",
            "seed": 5,
            "steps": 20,
            "guidance_scale": 3,
            "scheduler": scheduler,
        }
    )
    asked = load_experiment(
        asked, output=str(tmp_path), durability="none", capture={"attention": "off", "text": False}
    )
    whole = record(asked, pipe, progress=False)
    for step in range(whole.tree.sizes["step"] + 1):
        run = cut(whole, tmp_path, step)
        resumed, calls = go_on(run, pipe)
        assert calls == whole.tree.sizes["step"] - step
        assert_as_if_nothing_had_happened(resumed, whole)
        shutil.rmtree(run.path)
