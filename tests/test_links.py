"""Nothing outside of a recording is ever written, renamed or removed through a link in it.

In each recording one file or folder is not its own: a symbolic link, or another name of a file
elsewhere. Every command is given it in turn, and the file elsewhere stays, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from recordings import ATTRIBUTES

from probe.cli import dispatch
from probe.errors import ProbeError, RecordingBusy, RecordingDamaged, RecordingLinked, StoreError
from probe.figures.sheets import keep
from probe.figures.word_sheet import ask_name, ask_sheet, word_sheet
from probe.format.schema import spec
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.ask import read_out
from probe.running.recorder import record, rerun, resume
from probe.watching import hooks
from probe.writing.files import append, check_own, remove, replace
from probe.writing.locks import Lock
from probe.writing.store import RunWriter
from probe.writing.upkeep import clear_orphans, held

NAME = "a-11111111.zarr"
SAMPLE = (  # one file of each kind that a command may write, add to, draw or remove
    "zarr.json digests.txt committed/c.0 latents/latents/c.2.0.0.0.0 "
    "latents/latents/left.0123abcd.partial attention/8x8/key/c.0.0.0.0.0 words.png"
).split()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    """A recording whose writer died within its third step, with a sheet of words that was drawn
    afterwards.
    """
    folder, calls = tmp_path_factory.mktemp("left"), iter(range(9))

    def stop(_: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    asked = {
        "prompt": "a cat",
        "steps": 4,
        "scheduler": "DDIM",
        "capture": {"attention": "queries"},
        "output": str(folder),
    }
    with hooks.Hooks([(pipe.unet, "input", stop)]), pytest.raises(KeyboardInterrupt):
        record(asked, pipe, progress=False)
    (path,) = folder.glob("*.zarr")
    path = path.rename(folder / NAME)
    keep(word_sheet(Run(path)), Run(path), "words.png")
    for of, to in (
        ("latents/latents/c.1.0.0.0.0", "latents/latents/c.2.0.0.0.0"),
        ("zarr.json", "latents/latents/left.0123abcd.partial"),
    ):
        shutil.copy(path / of, path / to)
    return path


@pytest.mark.parametrize("name", ["", "latents", "latents/prediction", "attention/8x8"])
def test_a_folder_that_becomes_a_link_while_it_is_written(
    name: str, tmp_path: Path, pipe: Any
) -> None:
    """Somebody puts a link to the same folder of another recording in a folder's place: nothing is
    written through it.
    """
    asked = {"prompt": "a cat", "steps": 5, "scheduler": "DDIM"}
    other = record(
        {**asked, "seed": 1, "output": str(tmp_path / "elsewhere")}, pipe, progress=False
    )
    before, calls = outside(other.path), iter(range(99))

    def swap(_: object) -> None:
        if next(calls) == 3:
            time.sleep(
                0.5
            )  # the steps before are written: who swaps within a step has a moment's chance
            (path,) = (tmp_path / "runs").glob("*.zarr")
            (path / name).rename(tmp_path / "aside")
            (path / name).symlink_to(other.path / name)

    with hooks.Hooks([(pipe.unet, "input", swap)]), pytest.raises(ProbeError, match="is a link"):
        record({**asked, "output": str(tmp_path / "runs")}, pipe, progress=False)
    assert outside(other.path) == before


def outside(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def ask(run: Run, pipe: Any) -> None:
    maps = read_out(run, "hat", pipeline=pipe)
    keep(ask_sheet(run, maps), run, ask_name(maps))


def every_command(
    path: Path, pipe: Any, *, heavy: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    runs = path.parent
    yield "ls", lambda: dispatch(["ls", str(runs)])
    yield "show", lambda: dispatch(["show", str(path)])
    yield "show --words", lambda: dispatch(["show", "--words", str(path)])
    yield "verify", lambda: verify(Run(path))
    yield "diff", lambda: dispatch(["diff", str(path), str(path)])
    yield "ask", lambda: ask(Run(path), pipe)
    if heavy:
        yield "rerun", lambda: rerun(Run(path), pipe, progress=False)
    yield "gc", lambda: dispatch(["gc", str(runs)])
    yield "resume", lambda: resume(Run(path), pipe, progress=False)
    yield "rm", lambda: dispatch(["rm", "--yes", str(path)])


def walk(
    left: Path,
    folder: Path,
    pipe: Any,
    name: str,
    how: Callable[[Path, Path], object],
    *,
    heavy: bool = False,
) -> None:
    """Make one file a link to a file outside, and give the recording to every command."""
    path, elsewhere = folder / "runs" / NAME, folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    shutil.copytree(left, path)
    (path / name).rename(elsewhere / "file")
    how(path / name, elsewhere / "file")
    before = outside(elsewhere)
    for command, call in every_command(path, pipe, heavy=heavy):
        with contextlib.suppress(ProbeError):
            call()
        assert outside(elsewhere) == before, f"{name}: {command} wrote outside"
    shutil.rmtree(folder)


def symbolic(link: Path, target: Path) -> None:
    link.symlink_to(target)


def hard(link: Path, target: Path) -> None:
    link.hardlink_to(target)


@pytest.mark.parametrize("how", [symbolic, pytest.param(hard, marks=pytest.mark.slow)])
def test_no_command_writes_through_a_link(
    how: Callable[[Path, Path], None], left: Path, pipe: Any, tmp_path: Path
) -> None:
    for name in SAMPLE if how is symbolic else SAMPLE[1:]:
        walk(left, tmp_path / "case", pipe, name, how, heavy=name == SAMPLE[1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("how", [symbolic, hard])
def test_no_command_writes_through_any_file_that_is_a_link(
    how: Callable[[Path, Path], None], left: Path, pipe: Any, tmp_path: Path
) -> None:
    for index, file in enumerate(sorted(file for file in left.rglob("*") if file.is_file())):
        walk(left, tmp_path / "case", pipe, str(file.relative_to(left)), how, heavy=index % 25 == 0)


@pytest.mark.parametrize(
    "name", ["latents", "latents/latents", "committed", "text", "attention/8x8/key"]
)
def test_no_command_writes_into_a_folder_that_is_a_link(
    name: str, left: Path, pipe: Any, tmp_path: Path
) -> None:
    path, elsewhere = tmp_path / "runs" / NAME, tmp_path / "elsewhere"
    shutil.copytree(left, path)
    (path / name).rename(elsewhere)
    (elsewhere / "c.9.0123abcd.partial").write_text("somebody else's")
    (path / name).symlink_to(elsewhere)
    before = outside(elsewhere)
    for command, call in every_command(path, pipe, heavy=False):
        with contextlib.suppress(ProbeError):
            call()
        assert outside(elsewhere) == before, command


def test_what_the_walk_relies_on(left: Path, pipe: Any, tmp_path: Path) -> None:
    """Without a link every command does its work: the recording above is one that goes on, and is
    drawn, asked and removed.
    """
    path = tmp_path / "runs" / NAME
    shutil.copytree(left, path)
    done = [
        name
        for name, call in every_command(path, pipe, heavy=False)
        if call() is not None or name == "ask"
    ]
    assert (
        done == ["ls", "show", "show --words", "verify", "diff", "ask", "gc", "resume", "rm"]
        and not path.exists()
    )


# --- taking over ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["zarr.json", "latents/latents/c.2.0.0.0.0", "text", "digests.txt"]
)
def test_a_recording_with_a_link_is_not_taken_over(name: str, left: Path, tmp_path: Path) -> None:
    """Nothing in it is written before all of it was looked at, and it is said what helps."""
    path = Path(shutil.copytree(left, tmp_path / NAME))
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    before = outside(path)
    with pytest.raises(RecordingLinked) as caught:
        RunWriter(path, [], {}, resume=True)
    assert f"{name} is a link" in caught.value.cause and "cp -rL" in caught.value.remedy
    assert outside(path) == before and sorted(file.name for file in tmp_path.iterdir()) == [
        NAME,
        "elsewhere",
    ]
    copy = tmp_path / "copy.zarr"
    assert os.system(f"cp -rL {path} {copy}") == 0
    check_own(copy)


def test_a_recording_that_is_a_link_is_not_written(left: Path, tmp_path: Path) -> None:
    shutil.copytree(left, tmp_path / "real.zarr")
    link = tmp_path / NAME
    link.symlink_to(tmp_path / "real.zarr")
    before = outside(tmp_path / "real.zarr")
    sheet = word_sheet(Run(link))
    for write in (
        lambda: RunWriter(link, [], {}, resume=True),
        lambda: keep(sheet, Run(link), "words.png"),
        lambda: dispatch(["rm", "--yes", str(link)]),
    ):
        with pytest.raises(RecordingLinked) as caught:
            write()
        assert (
            "is a link" in caught.value.cause and str(tmp_path / "real.zarr") in caught.value.remedy
        )
    assert outside(tmp_path / "real.zarr") == before and link.is_symlink()


# --- gc, and locks --------------------------------------------------------------------------------


def test_gc_follows_no_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording that is a link, leftovers that are links, locks that are links of both kinds; and
    it comes to its end.
    """
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    for folder in (runs, elsewhere / "inside"):
        folder.mkdir(parents=True)
    for name in ("a.partial", "inside/b.0123abcd.partial", "c.lock", "d.lock"):
        (elsewhere / name).write_text("somebody else's")
    (runs / "evil.zarr").symlink_to(elsewhere)
    (runs / "whole.zarr").mkdir()
    (runs / "whole.zarr" / "below").symlink_to(elsewhere)
    (runs / "whole.zarr" / "x.0123abcd.partial").symlink_to(elsewhere / "a.partial")
    (runs / ".b.zarr.0123abcd.partial").symlink_to(elsewhere)
    (runs / ".c.zarr.0123abcd.partial").symlink_to(elsewhere / "a.partial")
    (runs / ".c.zarr.lock").symlink_to(elsewhere / "c.lock")
    (runs / ".d.zarr.lock").hardlink_to(elsewhere / "d.lock")
    (runs / ".e.zarr.lock").mkdir()
    (runs / ".f.zarr.0123abcd.partial").mkdir()
    (runs / ".f.zarr.0123abcd.partial" / "below").symlink_to(elsewhere)
    (runs / ".g.zarr.backup.partial").mkdir()  # no name of ours
    before, there = outside(elsewhere), sorted(runs.rglob("*"))
    assert dispatch(["gc", "--dry-run", str(runs)]) == 0 and sorted(runs.rglob("*")) == there
    assert dispatch(["gc", str(runs)]) == 0 and outside(elsewhere) == before
    assert sorted(path.name for path in runs.iterdir()) == [
        ".e.zarr.lock",
        ".g.zarr.backup.partial",
        "evil.zarr",
        "whole.zarr",
    ]
    assert [path.name for path in (runs / "whole.zarr").iterdir()] == ["below"]
    assert clear_orphans(runs) == [] and "Nothing to remove" not in capsys.readouterr().out


def test_one_leftover_that_cannot_be_removed_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f".{name}.zarr.0123abcd.partial").mkdir()
    real = shutil.rmtree

    def refuse(path: Path) -> None:
        if ".b." in path.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        clear_orphans(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".b.zarr.0123abcd.partial"]


@pytest.mark.parametrize("how", [symbolic, hard])
def test_a_lock_that_is_a_link_is_not_touched(
    how: Callable[[Path, Path], None], left: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(left, tmp_path / NAME))
    (tmp_path / "elsewhere").write_text("somebody else's")
    how(tmp_path / f".{NAME}.lock", tmp_path / "elsewhere")
    for take in (
        lambda: RunWriter(path, [], {}, resume=True),
        lambda: held(path).__enter__(),
        lambda: dispatch(["rm", "--yes", str(path)]),
    ):
        with pytest.raises(RecordingDamaged, match="is no lock: it is a link"):
            take()
    assert (tmp_path / "elsewhere").read_text() == "somebody else's" and path.is_dir()


def test_a_killed_writer_has_a_moment_to_die(left: Path, tmp_path: Path) -> None:
    """It frees its memory first and its lock last: whoever goes on at once waits for that, and for
    no writer that lives.
    """
    path = Path(shutil.copytree(left, tmp_path / NAME))
    hold = (
        f"import sys, filelock; lock = filelock.FileLock({str(tmp_path / f'.{NAME}.lock')!r}); "
        "lock.acquire(); print(1, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin and holder.stdout and holder.stdout.readline()

    def named(pid: int) -> None:
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"]["writer"] = {"pid": pid, "host": socket.gethostname()}
        (path / "zarr.json").write_text(json.dumps(root))

    named(holder.pid)
    with pytest.raises(RecordingBusy, match=f"by process {holder.pid} on"):
        Lock(path).acquire(patience=20)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(
        os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT
    )  # nobody has asked how it ended: the system still knows it
    named(dead.pid)
    timer = threading.Timer(0.3, holder.stdin.close)
    timer.start()
    lock = Lock(path)
    lock.acquire(patience=20)
    lock.release()
    assert holder.wait() == 0 == dead.wait()
    holder.stdout.close()
    timer.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for take in (
        Lock(tmp_path / "a.zarr").acquire,
        lambda: RunWriter(tmp_path / "a.zarr", [spec("", "committed", (2,))], ATTRIBUTES),
    ):
        with pytest.raises(StoreError) as caught:
            take()
        assert "has no locks" in caught.value.cause and "--output" in caught.value.remedy


# --- the one way to write -------------------------------------------------------------------------


def test_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    for number, how in enumerate((symbolic, hard)):
        elsewhere, file = tmp_path / f"elsewhere {number}", tmp_path / f"file {number}"
        elsewhere.write_bytes(b"somebody else's")
        for write in (
            lambda file=file: replace(file, [b"a", np.frombuffer(b"b", np.uint8).data], True),
            lambda file=file: remove(file, True),
        ):
            how(file, elsewhere)
            with pytest.raises((RecordingLinked, OSError)):
                append(file, b"more", False)
            write()
            assert elsewhere.read_bytes() == b"somebody else's"
            assert not file.exists() or (file.read_bytes() == b"ab" and not file.is_symlink())
            file.unlink(missing_ok=True)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("most", [None, 0, 3, 70_000])
def test_every_byte_is_written_however_few_the_system_takes(
    most: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most so many at once; None: on a system without writev."""
    real = os.writev

    def writev(handle: int, buffers: list[bytes]) -> int:
        assert len(buffers) <= os.sysconf("SC_IOV_MAX")
        return real(handle, [b"".join(buffers)[:most]])

    if most is None:
        monkeypatch.delattr(os, "writev")
    elif most:
        monkeypatch.setattr(os, "writev", writev)
    large = os.urandom(300_000)
    small = [bytes([number % 251]) for number in range(5_000)]
    for parts in ([], [b""], [b"", b"a", b""], small, [large], [*small, large, b"end", large]):
        replace(tmp_path / "file", [memoryview(part) for part in parts], False)
        assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_name_that_is_taken_is_not_written_through(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody guessed the name under which a file is written first, and put a link there."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    for number, how in enumerate((symbolic, hard)):
        elsewhere, file = tmp_path / f"elsewhere {number}", tmp_path / f"file {number}"
        elsewhere.write_bytes(b"somebody else's")
        how(Path(f"{file}.00000000.partial"), elsewhere)
        with pytest.raises(FileExistsError):
            replace(file, [b"ours"], False)
        assert elsewhere.read_bytes() == b"somebody else's" and not file.exists()
