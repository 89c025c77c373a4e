"""A recording in memory has the bits of one in files, and leaves nothing on the disk.

Saved, it verifies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr

from probe.errors import ExperimentError, PromptError, RecordingBusy
from probe.figures import sheets
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.ask import read_out
from probe.running.recorder import record, rerun, resume
from probe.upgrade import upgrade
from probe.writing.digests import DIGESTS

ASKED: dict[str, Any] = {
    "prompt": "a cat on the hat",
    "steps": 3,
    "images": 2,
    "scheduler": "EulerAncestral",
    "decode_every": 2,
    "capture": {
        "steps": "::2",
        "self_attention": ["*"],
        "counterfactual": ["*"],
        "activations": ["unet.mid_block"],
    },
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def on_disk(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(ASKED, pipe, output=str(tmp_path_factory.mktemp("runs")), progress=False)


@pytest.fixture(scope="module")
def run(pipe: Any) -> Run:
    return record(ASKED, pipe, output=None, progress=False)


def test_a_mapping_may_say_it_too(pipe: Any, run: Run) -> None:
    assert compare(run, record({**ASKED, "output": None}, pipe, progress=False)).same
    assert compare(run, record({**ASKED, "output": "runs"}, pipe, output=None, progress=False)).same


def assert_the_same(one: Run, other: Run) -> None:
    """Every group but the measured costs has the same variables, labels, attributes and bits."""
    assert {node.path for node in one.tree.subtree} == {node.path for node in other.tree.subtree}
    for node in one.tree.subtree:
        if node.path != "/cost":
            mine, theirs = (r.tree[node.path].to_dataset(inherit=False) for r in (one, other))
            mine.attrs = theirs.attrs = {}
            xr.testing.assert_identical(mine, theirs)
            for name, variable in mine.variables.items():
                assert variable.dtype == theirs[name].dtype, name
                if variable.dtype.kind not in "OT":
                    assert variable.values.tobytes() == theirs[name].values.tobytes(), name


def test_the_bits_of_a_recording_on_the_disk(run: Run, on_disk: Run) -> None:
    assert_the_same(run, on_disk)
    new = {"created", "writer", "digests"}
    mine, theirs = (
        {name: value for name, value in dict(r.attributes).items() if name not in new}
        for r in (run, on_disk)
    )
    assert {**mine, "experiment": 0} == {**theirs, "experiment": 0}
    assert (
        compare(run, on_disk).same
        and compare(on_disk, run).same
        and compare(run, on_disk).variables > 50
    )


def test_every_reading_function_works_on_it(run: Run, on_disk: Run) -> None:
    assert (run.status, run.steps.tolist()) == ("complete", [0, 1, 2])
    for read in (
        lambda r: r.denoised(),
        lambda r: r.eps("cond"),
        lambda r: r.preview(),
        lambda r: r.attention("8x8"),
        lambda r: r.overview(),
        lambda r: r.word_maps(),
        lambda r: r.contribution("8x8"),
        lambda r: r.images,
    ):
        xr.testing.assert_identical(read(run), read(on_disk))
    assert (
        run.summary().keys() == on_disk.summary().keys()
        and run._repr_html_()
        and sheets.contact_sheet(run).size
    )
    value = run.latents.values
    value[:] = 0
    assert run.latents.values.any(), "what is read is a copy"


def test_a_word_that_was_not_in_the_prompt_is_asked_for(pipe: Any, tmp_path: Path) -> None:
    asked = {**ASKED, "images": 1, "decode_every": 0, "capture": {"attention": "queries"}}
    here, there = (
        record(asked, pipe, output=None, progress=False),
        record(asked, pipe, output=str(tmp_path), progress=False),
    )
    with pytest.raises(PromptError) as caught:
        here.phrase("astronaut")
    assert "probe.read_out(run, 'astronaut')" in caught.value.remedy
    xr.testing.assert_equal(
        read_out(here, "astronaut", pipeline=pipe), read_out(there, "astronaut", pipeline=pipe)
    )


def test_nothing_is_written(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[Any] = []
    real = os.open
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def noted(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & writes:
            opened.append(path)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", noted)
    found = record({**ASKED, "steps": 1, "capture": {"steps": "all"}}, pipe, output=None)
    assert not opened and not list(tmp_path.iterdir()) and not found.path.exists()
    said = capsys.readouterr()
    assert (
        not said.out
        and "Recording 1 model calls to memory (about" in said.err
        and ".zarr" not in said.err + repr(found)
    )
    assert "runs" not in said.err


def test_it_is_saved_as_a_recording_that_verifies(
    run: Run, on_disk: Run, pipe: Any, tmp_path: Path
) -> None:
    saved = run.save(tmp_path / "runs" / "mine.zarr")
    assert saved.path == tmp_path / "runs" / "mine.zarr" and saved.status == "complete"
    assert_the_same(saved, on_disk)
    checks = {check.name: check for check in verify(saved, model=pipe)}
    assert {name: check.detail for name, check in checks.items() if check.verdict == "failed"} == {}
    assert {name for name, check in checks.items() if check.verdict == "not checked"} == set()
    lines = [
        {line.split(maxsplit=1)[1] for line in (r.path / DIGESTS).read_text().splitlines()}
        for r in (saved, on_disk)
    ]
    assert lines[0] == lines[1], "the same is proved of both"
    assert {path.name for path in saved.path.glob("*.png")} == {
        path.name for path in on_disk.path.glob("*.png")
    }
    files = [
        {p.relative_to(r.path).as_posix() for p in r.path.rglob("*") if p.is_file()}
        for r in (saved, on_disk)
    ]
    assert files[0] == files[1], "what was not recorded is in no file"
    with pytest.raises(RecordingBusy, match="exists already"):
        run.save(saved.path)
    assert resume(saved, pipe, progress=False).path == saved.path


@pytest.mark.parametrize(
    "needs", [resume, rerun, verify, upgrade, sheets.save], ids=lambda needs: needs.__name__
)
def test_what_needs_files_is_refused_by_name(needs: Any, run: Run) -> None:
    with pytest.raises(
        ExperimentError, match=f"{run.name} is in memory alone, and this needs its files"
    ) as caught:
        needs(run)
    assert caught.value.remedy == 'Save it first: run.save("runs/mine.zarr").'


def test_only_what_is_in_memory_is_saved_and_only_as_a_recording(
    run: Run, on_disk: Run, tmp_path: Path
) -> None:
    with pytest.raises(ExperimentError, match="is in files already"):
        on_disk.save(tmp_path / "again.zarr")
    for path in (tmp_path / "mine", 3, None):
        with pytest.raises(ExperimentError, match="which is no name of a recording"):
            run.save(path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_nothing(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tiny.pipeline()
    broken.unet.conv_out.bias.data[:] = float("nan")
    with pytest.raises(Exception, match="NaN"):
        record(ASKED, broken, output=None, progress=False)
    assert not list(tmp_path.iterdir())
    assert np.isfinite(record(ASKED, pipe, output=None, progress=False).latents.values).all()
