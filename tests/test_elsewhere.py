"""The same promises on a system without POSIX's own names, such as Windows, by other means.

A child takes the names away before it imports probe. It imports the libraries first: they have
their own ways there.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from recordings import GRID, recording

from probe import system

ROOT = Path(__file__).parent.parent
WITHOUT = """
import builtins, io, contextlib, os, signal, sys
import filelock, google_crc32c, numpy, PIL.Image, pydantic, xarray, zarr, zarrs
import shutil, subprocess, tempfile, zipfile
{libraries}
for name in '''
    O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC SEEK_HOLE pread pwrite preadv writev getuid geteuid
    getgid getpgid killpg uname mkfifo fork sysconf sched_getaffinity posix_fallocate
'''.split():
    delattr(os, name)
for name in '''
    SIGKILL SIGHUP SIGALRM SIGUSR1 alarm setitimer pthread_kill pthread_sigmask
'''.split():
    delattr(signal, name)
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
"""
READS = """
from pathlib import Path
import numpy as np, xarray as xr
import probe
from probe.cli import dispatch
from probe.errors import RecordingDamaged, RecordingLinked, RecordingNotFound
from probe.reading import files
from probe.proof.verdict import verify

runs = Path(sys.argv[1])
assert not files.GUARDED
run = probe.open_run(runs / "good.zarr")
with xr.open_datatree(runs / "good.zarr", engine="zarr", chunks=None) as stock:
    xr.testing.assert_identical(run.tree.load(), stock)
one = run.attention().isel(step=1, token=1)
assert one.shape == (1, 1, 2, 2, 4, 4) and np.isfinite(one.values.astype("f4")).all()
listed = {path.stem for path, attributes in probe.list_runs(runs) if attributes}
assert listed == {"good", "link", "pipe", "deep", "flip"}
for name in ("link", "deep", "root", "pipe", "flip"):
    error = RecordingDamaged if name in ("pipe", "flip") else RecordingLinked
    try:
        probe.open_run(runs / f"{name}.zarr").tree.load()
    except error as caught:
        assert type(caught) is error, caught
    else:
        raise AssertionError(name)
try:
    probe.open_run(runs / "nowhere.zarr")
except RecordingNotFound:
    pass
good = str(runs / "good.zarr")
for command in (["ls", str(runs)], ["show", good], ["diff", good, good]):
    assert dispatch(command) == 0, command
verdicts = {check.name: check.verdict for check in verify(run)}
assert verdicts["manifest"] == "exact" and verdicts["committed"] == "exact", verdicts
print("done")
"""
RECORDS = """
# it chose another when it was imported; on Windows it has a third
filelock.FileLock = filelock.SoftFileLock
import probe
from probe.proof.verdict import verify
size = {"height": 32, "width": 32}
run = probe.record(size, pipeline, steps=3, output=sys.argv[1], durability="step")
assert run.status == "complete" and len(run.steps) >= 3
failed = [check for check in verify(run) if check.verdict == "failed"]
assert not failed, failed
print("done")
"""


def in_a_child(code: str, *arguments: str, libraries: str = "") -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT.format(libraries=libraries) + code, *arguments]
    shown = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert shown.returncode == 0 and shown.stdout.endswith("done\n"), (
        shown.stderr[-6000:] + shown.stdout[-1000:]
    )


def test_reading_keeps_its_promises_without_posix(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    good = recording(runs / "good.zarr")
    for name in ("link", "deep", "root", "pipe", "flip"):
        shutil.copytree(good, runs / f"{name}.zarr")
    chunk = f"{GRID}/cross/c.1.0.0.0.0.0.0.0"
    for name, place in (("link", chunk), ("deep", "latents/latents"), ("root", "zarr.json")):
        there = runs / f"{name}.zarr" / place
        elsewhere = there.rename(tmp_path / name)
        there.symlink_to(elsewhere)
    (runs / "pipe.zarr" / chunk).unlink()
    os.mkfifo(runs / "pipe.zarr" / chunk)
    raw = bytearray((runs / "flip.zarr" / chunk).read_bytes())
    raw[10] ^= 1
    (runs / "flip.zarr" / chunk).write_bytes(bytes(raw))
    in_a_child(READS, str(runs))


@pytest.mark.slow
def test_recording_works_without_posix(tmp_path: Path) -> None:
    in_a_child(
        RECORDS,
        str(tmp_path / "runs"),
        str(ROOT / "tests"),
        libraries="sys.path.insert(0, sys.argv[2]); import tiny, tqdm; pipeline = tiny.pipeline()",
    )


def test_a_file_that_changes_under_the_eyes_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the opening it becomes a link."""
    from probe.errors import RecordingLinked
    from probe.reading import files

    path = recording(tmp_path / "a.zarr")
    (tmp_path / "secret").write_text("{}")
    monkeypatch.setattr(files, "GUARDED", False)
    real = os.open

    def swapped(name: Any, *rest: Any, **more: Any) -> int:
        if str(name).endswith("a.zarr/zarr.json"):
            (path / "zarr.json").unlink()
            (path / "zarr.json").symlink_to(tmp_path / "secret")
        return real(name, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(RecordingLinked):
        files.read_json(path, "zarr.json", 2**20)


@pytest.mark.parametrize(
    ("handle", "code", "lives"), [(7, 259, True), (7, 0, False), (0, 0, False)]
)
def test_windows_is_asked_whether_a_process_lives_and_ends_none(
    handle: int, code: int, lives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There os.kill(process, 0) ends it."""

    class Kernel:
        OpenProcess = staticmethod(lambda *_: handle)
        CloseHandle = staticmethod(lambda *_: 1)

        @staticmethod
        def GetExitCodeProcess(_: Any, place: Any) -> int:
            ctypes.cast(place, ctypes.POINTER(ctypes.c_ulong)).contents.value = code
            return 1

    def killed(*_: Any) -> None:
        raise AssertionError("a process was ended")

    monkeypatch.setattr(system, "sys", types.SimpleNamespace(platform="win32"))
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: Kernel, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 87, raising=False)
    monkeypatch.setattr(os, "kill", killed)
    assert system.lives(1234) is lives
