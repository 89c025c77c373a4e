"""The recordings in the package: whole or not at all, found by name, read without torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from probe.cli import dispatch
from probe.errors import RecordingNotFound
from probe.format.schema import FORMAT_VERSION
from probe.proof.verdict import verify
from probe.reading import sample
from probe.reading.recording import open_run
from probe.testing.synthetic import synthetic_recording

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.smoke
@pytest.mark.parametrize("name", sample.NAMES)
def test_each_verifies_and_is_in_the_newest_format(name: str) -> None:
    run = open_run(name)
    assert run.status == "complete" and run.attributes.format_version == FORMAT_VERSION
    assert {check.name: check.detail for check in verify(run) if check.verdict == "failed"} == {}
    assert open_run(name).path == run.path, "unpacked once"
    cost = run.tree["cost"].dataset.sel(component="unet")
    assert int(cost["parameters"]) > 8e6 and int(cost["weight_bytes"]) > 3e7
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name], (
        "nothing else is left"
    )


def test_they_are_small() -> None:
    assert sum(archive.stat().st_size for archive in sample.ARCHIVES.values()) <= 4_000_000


def test_the_second_differs_in_its_guidance_alone() -> None:
    first, second = (open_run(name).experiment for name in ("sample", "sample-guidance-8"))
    ignored = {"name", "capture"}
    asked = [recipe.model_dump(exclude=ignored) for recipe in (first, second)]
    assert asked[0] | {"guidance_scale": 8.0} == asked[1] and first.guidance_scale == 3
    assert first.prompt == "An astronaut scuba diving"
    assert second.capture.attention == first.capture.attention == "maps"


def test_the_noising_has_a_loss_with_a_spread() -> None:
    run = open_run("sample-noising")
    forward = run.tree["forward"].dataset
    at = {int(t): step for step, t in enumerate(run.variable("timestep").values)}
    mean, spread = (forward[name].values for name in ("loss_mean", "loss_spread"))
    assert {50, 500} <= set(at) and run.noising.noises >= 3 and (spread > 0).all()
    assert mean[at[50]] - spread[at[50]] > mean[at[500]] + spread[at[500]]


def test_ls_and_a_wrong_name_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["ls", str(tmp_path)]) == 0
    assert "sample, sample-guidance-8, sample-noising" in capsys.readouterr().out
    synthetic_recording(tmp_path / "mine.zarr", prompt="a red cat")
    with pytest.raises(RecordingNotFound, match="Did you mean sample-noising"):
        open_run("sample-noise", tmp_path)


def test_a_first_look_needs_no_torch() -> None:
    code = (
        "import sys, probe; run = probe.open_run('sample'); run.word_maps(); run.words; assert "
        "'torch' not in sys.modules, 'torch'; print(run)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert "An astronaut scuba diving" in shown.stdout


def test_packing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = open_run("sample").path
    sample.pack(path, "sample", tmp_path / "a.zip")
    (path / "zarr.json").touch()
    sample.pack(path, "sample", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert all(name.startswith("sample.zarr/") for name in archive.namelist())


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RecordingNotFound, match="cannot be unpacked"):
        open_run("sample")


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [("ENOSPC", "with room"), ("EDQUOT", "with room"), ("EROFS", "that can be written")],
)
def test_a_cache_disk_that_takes_nothing(
    kind: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    def full(*_: object, **__: object) -> Any:
        raise trouble

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(RecordingNotFound) as caught:
        open_run("sample")
    assert str(tmp_path / "cache") in caught.value.cause and trouble.strerror in caught.value.cause
    assert (
        caught.value.remedy == f"Set XDG_CACHE_HOME to a folder {remedy}."
        and not (tmp_path / "cache").exists()
    )


@pytest.mark.parametrize("name", ["sample", str(sample.ARCHIVES["sample"])], ids=["sample", "zip"])
def test_a_limit_on_files_is_no_fault_of_the_zip(name: str, tmp_path: Path) -> None:
    command = f"ulimit -f 20; exec {sys.executable} -m probe show {name}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        done.returncode == 2 and f"cannot be unpacked into {tmp_path / 'cache'}" in done.stderr
    ), done.stderr
    assert (
        done.stderr.endswith("Set XDG_CACHE_HOME to a folder with room.\n")
        and not (tmp_path / "cache").exists()
    )


def test_a_recording_is_called_by_what_opens_it(tmp_path: Path) -> None:
    assert [sample.called(sample.unpacked(name)) for name in sample.NAMES] == list(sample.NAMES)
    assert [open_run(name).name for name in sample.NAMES] == list(sample.NAMES)
    assert sample.name_of(tmp_path / "sample-12345678.zarr") == "sample-12345678"
    assert sample.called(tmp_path / "sample-12345678.zarr") == str(
        tmp_path / "sample-12345678.zarr"
    )
