"""The sample recording: unpacked whole or not at all, found by its name, read without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from probe.errors import RecordingNotFound
from probe.reading import sample
from probe.reading.recording import open_run
from probe.verify import verify

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
    assert [path.name for path in run.path.parent.iterdir()] == [run.path.name], "nothing else is left"


def test_a_first_look_needs_no_torch() -> None:
    code = "import sys, probe; run = probe.open_run('sample'); run.words(); run.denoised(); assert 'torch' not in sys.modules, 'torch'; print(run)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False, timeout=120)
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


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RecordingNotFound, match="cannot be unpacked"):
        open_run("sample")
