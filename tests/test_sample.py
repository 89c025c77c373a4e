"""The sample recording: unpacked whole or not at all, found by its name, read without torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from probe.errors import RecordingNotFound
from probe.proof.verdict import verify
from probe.reading import sample
from probe.reading.recording import open_run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.smoke
def test_it_is_small_and_verifies() -> None:
    assert sample.ARCHIVE.stat().st_size < 3_000_000
    run = open_run("sample")
    assert run.status == "complete" and run.experiment.prompt == "An astronaut scuba diving"
    assert {check.name: check.detail for check in verify(run) if check.verdict == "failed"} == {}
    assert open_run("sample").path == run.path, "unpacked once"
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name], (
        "nothing else is left"
    )


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
    sample.pack(path, tmp_path / "a.zip")
    (path / "zarr.json").touch()
    sample.pack(path, tmp_path / "b.zip")
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


@pytest.mark.parametrize("name", ["sample", str(sample.ARCHIVE)], ids=["sample", "zip"])
def test_a_limit_on_files_is_no_fault_of_the_zip(name: str, tmp_path: Path) -> None:
    command = f"ulimit -f 20; exec {sys.executable} -m probe show {name}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
