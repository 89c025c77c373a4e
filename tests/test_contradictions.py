"""What contradicts the pipeline, the scheduler or the disk is refused before anything is written.

Nothing is loaded either, and the remedy does not lead back to the same error.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from probe import cli
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, NotFinite, OutOfMemory, PromptError, StoreError, TooLarge
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.planning import check_size, free_room, plan
from probe.running.recorder import failures_named, record, record_noising, rerun, resume
from probe.running.session import check_finite
from probe.settings.experiment import Experiment, load_experiment
from probe.terminal import guarded
from probe.text import first_line
from probe.writing.files import storing
from probe.writing.layout import room

PICTURE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture
def ask(tmp_path: Path) -> dict[str, Any]:
    return {"prompt": "a cat", "steps": 2, "output": str(tmp_path / "runs")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished recording. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return record(
        {"prompt": "a cat", "steps": 2, "output": str(folder)}, tiny.pipeline(), progress=False
    )


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded, and no pipeline taken apart."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("probe.running.model.load", load)
    monkeypatch.setattr("probe.diffusion.loading.load", load)


# --- a pipeline in memory -------------------------------------------------------------------------

CONTRADICTIONS = [
    (
        {"dtype": "float16"},
        "dtype: float16 is asked for, and the pipeline is in float32.",
        "pipeline.to(torch.float16), or leave dtype out",
    ),
    (
        {"device": "cuda"},
        "device: cuda is asked for, and the pipeline is on cpu.",
        'pipeline.to("cuda"), or leave device out',
    ),
    ({"variant": "fp16"}, "variant: 'fp16' says which files to load", "Leave variant out"),
    ({"revision": "v1"}, "revision: 'v1' says which files to load", "Leave revision out"),
]


@pytest.mark.parametrize(
    ("fields", "cause", "remedy"),
    CONTRADICTIONS,
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_pipeline_that_is_not_as_asked_is_refused(
    fields: dict[str, Any], cause: str, remedy: str, ask: dict[str, Any]
) -> None:
    pipe = tiny.pipeline()
    for given in (pipe, StableDiffusion.of(pipe)):
        with pytest.raises(ExperimentError) as caught:
            record(ask, given, progress=False, **fields)
        assert caught.value.cause.startswith(cause) and remedy in caught.value.remedy
    with pytest.raises(ExperimentError) as caught:
        record_noising(
            PICTURE,
            "a cat",
            pipeline=pipe,
            progress=False,
            output=ask["output"],
            timesteps=[500],
            **fields,
        )
    assert caught.value.cause.startswith(cause) and remedy in caught.value.remedy
    assert not Path(ask["output"]).exists(), "nothing was written"


def test_what_agrees_with_a_pipeline_is_recorded(
    ask: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = record({**ask, "dtype": "float32", "device": "cpu", "model": "x"}, tiny.pipeline())
    assert (
        "x is not loaded: the pipeline that was given is StableDiffusionPipeline"
        in capsys.readouterr().err
    )
    assert run.experiment.model == "StableDiffusionPipeline" == run.attributes["model"]["name"]
    assert (run.experiment.dtype, run.experiment.device) == (
        "float32",
        "cpu",
    ) and run.latents.dtype == np.float32
    noised = record_noising(
        PICTURE,
        pipeline=tiny.pipeline(),
        progress=False,
        output=ask["output"],
        timesteps=[500],
        model="x",
        sheet=False,
    )
    assert noised.attributes["noising"]["model"] == "StableDiffusionPipeline" == noised.recipe.model


def test_what_is_done_again_with_a_pipeline_is_as_it_was(
    ask: dict[str, Any], tmp_path: Path
) -> None:
    run = record({**ask, "dtype": "float32"}, tiny.pipeline(), progress=False)
    half = tiny.pipeline().to(dtype=torch.bfloat16)
    with pytest.raises(
        ExperimentError, match="dtype: float32 is asked for, and the pipeline is in bfloat16"
    ) as caught:
        rerun(run, half, progress=False)
    assert 'probe.record(run.recipe, pipeline, dtype="auto")' in caught.value.remedy
    (run.path / "zarr.json").write_text(
        (run.path / "zarr.json").read_text().replace('"complete"', '"interrupted"')
    )
    with pytest.raises(ExperimentError, match="dtype: float32 is asked for"):
        resume(Run(run.path), half, progress=False)


def test_other_weights_are_recorded_as_what_they_are(whole: Run, tmp_path: Path) -> None:
    again = rerun(whole, tiny.pipeline(seed=1), output=tmp_path, progress=False)
    assert again.experiment.variant is None and again.experiment.model == "StableDiffusionPipeline"


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [(MemoryError(), "MemoryError"), (ValueError("\n"), "ValueError"), (ValueError("\na\nb"), "a")],
)
def test_an_error_without_words_is_named(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_running_out_of_memory_without_a_word(error: Exception) -> None:
    with (
        pytest.raises(OutOfMemory, match=r"Out of memory on (cpu|cuda): (MemoryError|can't start)"),
        failures_named(Experiment()),
    ):
        raise error


@pytest.mark.parametrize(
    ("dtype", "scale", "remedy"),
    [
        ("float32", 3.0, "Try a smaller guidance_scale; on_nan"),
        ("float32", 1.0, "Try another model; on_nan"),
        ("float16", 3.0, "Try --dtype float32 or a smaller guidance_scale; on_nan"),
        ("bfloat16", 1.0, "Try --dtype float32; on_nan"),
    ],
)
def test_a_remedy_is_none_that_is_taken_already(dtype: str, scale: float, remedy: str) -> None:
    with pytest.raises(NotFinite) as caught:
        check_finite(
            "latents",
            1,
            np.full(1, np.nan, np.float32),
            Experiment(guidance_scale=scale),
            getattr(torch, dtype),
        )
    assert caught.value.remedy.startswith(remedy)


# --- schedulers -----------------------------------------------------------------------------------

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"predict_x0": False}, "predict_x0"),
    ({"solver_type": "bh1", "solver_order": 3}, "solver_type"),
]


@pytest.mark.parametrize(
    ("options", "named"), BROKEN, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_scheduler_that_makes_nan_is_refused_by_its_option(
    options: dict[str, Any], named: str, ask: dict[str, Any]
) -> None:
    pipe, asked = (
        tiny.pipeline(),
        {**ask, "steps": 4, "scheduler": "UniPC", "scheduler_options": options},
    )
    with pytest.raises(
        ExperimentError, match=f"UniPCMultistepScheduler with {named}: .* its step 3 makes NaN"
    ) as caught:
        record(asked, pipe, progress=False)
    assert caught.value.remedy.startswith(f"Set {named}: ") and not Path(ask["output"]).exists()
    rest = {name: value for name, value in options.items() if name != named}
    assert (
        plan(
            StableDiffusion.of(pipe, scheduler="UniPC", options=rest),
            load_experiment(asked, scheduler_options=rest),
        ).calls
        == 4
    )
    run = record(asked, pipe, progress=False, on_nan="record")
    assert not np.isfinite(run.variable("latents/final_latents").values).all()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"trained_betas": [0.01] * 400 + [1.0] * 600}, "Change trained_betas in"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "Set rescale_betas_zero_snr: false in",
        ),
    ],
)
def test_an_option_that_was_set_is_the_one_to_change(
    options: dict[str, Any], remedy: str, ask: dict[str, Any]
) -> None:
    with pytest.raises(ExperimentError, match="divides by 0") as caught:
        record(
            {**ask, "scheduler": "DDIM", "scheduler_options": options},
            tiny.pipeline(),
            progress=False,
        )
    assert caught.value.remedy.startswith(remedy)


def test_two_messages_of_libraries_are_not_heard(
    ask: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    pipe = tiny.pipeline()
    model = StableDiffusion.of(pipe, scheduler="DPM++2S")
    asked = load_experiment(ask, steps=3, scheduler="DPM++2S")
    plan(model, asked)
    with pytest.raises(PromptError, match="has 202 tokens"):
        plan(model, load_experiment(asked, prompt="a cat " * 100))
    assert caplog.text == ""
    model.scheduler.set_timesteps(3)
    pipe.tokenizer.deprecation_warnings.clear()
    pipe.tokenizer("a cat " * 100)
    assert "uneven amount" in caplog.text and "indexing errors" in caplog.text, (
        "whoever calls them otherwise hears them"
    )


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loads_nothing")
def test_a_folder_that_cannot_be_written_is_told_before_the_model_is_loaded(
    whole: Run,
    ask: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = os.access  # root may write everywhere

    def access(path: Any, mode: int, **named: Any) -> bool:
        return Path(path) not in (whole.path.parent, tmp_path) and real(path, mode, **named)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = tmp_path / "tmp" / "runs"
    for begin in (
        lambda: record(ask),
        lambda: rerun(whole),
        lambda: record_noising(PICTURE, output=ask["output"]),
    ):
        with pytest.raises(ExperimentError, match="output: nothing can be written in") as caught:
            begin()
        assert caught.value.remedy == f"Name another folder: --output {folder}"
    with pytest.raises(SystemExit):
        guarded(cli.dispatch, ["rerun", str(whole.path)])
    assert f"--output {folder}" in capsys.readouterr().err
    folder.mkdir(parents=True)
    assert free_room(folder)


def test_a_recording_is_made_again_elsewhere(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = rerun(whole, tiny.pipeline(), output=tmp_path / "mine", progress=False)
    assert again.path.parent == tmp_path / "mine" and compare(whole, again).same
    noised = record_noising(
        PICTURE,
        pipeline=tiny.pipeline(),
        progress=False,
        output=str(tmp_path),
        timesteps=[500],
        sheet=False,
    )
    with pytest.raises(ExperimentError, match="is a file"):
        rerun(noised, output=noised.path / "zarr.json", progress=False)
    again = rerun(noised, tiny.pipeline(), output=tmp_path / "mine", progress=False)
    assert again.path.parent == tmp_path / "mine" and compare(noised, again).same
    told: dict[str, Any] = {}

    def once(run: Run, **options: Any) -> Run:
        told.update(options)
        return run

    monkeypatch.setattr("probe.running.recorder.rerun", once)
    with pytest.raises(SystemExit):
        guarded(cli.dispatch, ["rerun", str(whole.path), "--output", "there"])
    assert told["output"] == "there"


def test_what_the_disk_refuses_is_told_with_another_place(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/my tmp")
    for number, path, remedy in (
        (errno.EROFS, tmp_path / "new.zarr", "Name another folder: --output '/my tmp/runs'"),
        (errno.EROFS, whole.path, "Check the disk and its permissions."),
        (errno.ENOSPC, tmp_path / "new.zarr", "Free some room, or record less"),
    ):
        with pytest.raises(StoreError) as caught, storing(path):
            raise OSError(number, os.strerror(number))
        assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_picture_that_has_no_room(
    named: bool,
    number: int,
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("probe.writing.files.replace", refuse)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with pytest.raises(SystemExit):
        guarded(
            cli.dispatch,
            [
                "show",
                str(whole.path),
                "--words",
                *(["--save", str(tmp_path / "x.png")] if named else []),
            ],
        )
    remedy = capsys.readouterr().err.strip().split("\n")[-1].strip()
    assert remedy.startswith("Free some room there") == (number != errno.EROFS)
    assert "--save /tmp/words.png" in remedy or (named and number != errno.EROFS)


# --- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"steps": 9, "decode_every": 2},
        {"images": 3, "capture.attention": "queries"},
        {"capture.attention": "off"},
        {"capture.steps": "0", "steps": 9},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_the_room_is_that_of_files_in_blocks(fields: dict[str, Any], ask: dict[str, Any]) -> None:
    pipe = tiny.pipeline()
    run = record(load_experiment(ask, **fields), pipe, progress=False)
    settled = plan(StableDiffusion.of(pipe), run.experiment)
    needed = sum(
        max(4096, -(-path.stat().st_size // 4096) * 4096)
        for path in [run.path, *run.path.rglob("*")]
    )
    said = room(settled.arrays, settled.forecast())
    assert needed <= said <= 1.35 * needed, (needed, said)
    with pytest.raises(
        TooLarge,
        match=r"more than the room on the disk(.|\n)*Free some room, or name another disk: "
        r"--output FOLDER",
    ):
        check_size(settled, None, needed - 4096 * 8 - (said - needed))
    check_size(settled, sum(settled.forecast().values()), said)
