"""An error of the system is never called damage.

The message says what the system said, that the recording is probably whole, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import resource
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recordings import GRID, recording

from probe.cli import dispatch
from probe.errors import RecordingUnreadable
from probe.proof.verdict import verify
from probe.reading import sample
from probe.reading.compare import compare
from probe.reading.finding import find_run
from probe.reading.listing import list_runs, listing
from probe.reading.recording import Run

TROUBLES = "EACCES EPERM EIO ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN EMFILE ENFILE ENOMEM EBUSY".split()
READS: dict[str, Callable[[Path], Any]] = {
    "open": lambda path: Run(path),
    "tree": lambda path: Run(path).tree,
    "latents": lambda path: Run(path).latents.values,
    "pictures": lambda path: Run(path).images.values,
    "a step's maps": lambda path: Run(path).attention().isel(step=0).values,
    "a map": lambda path: Run(path).attention().isel(step=1, token=1).values,
    "words": lambda path: Run(path).word_overview(),
    "find": lambda path: find_run(path),
    "find by name": lambda path: Run(find_run("mine", path.parent)),
    "verify": lambda path: verify(Run(path)),
    "compare": lambda path: compare(Run(path), Run(path)),
    "show": lambda path: dispatch(["show", str(path)]),
    "diff": lambda path: dispatch(["diff", str(path), str(path)]),
    "rm": lambda path: dispatch(["rm", "--yes", "--runs", str(path.parent), "mine"]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("good") / "runs" / "mine.zarr")


@contextlib.contextmanager
def failing(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    chosen: Callable[[str], bool],
    calls: str = "open scandir lstat",
) -> Iterator[list[str]]:
    """The system refuses what `chosen` picks by name; the names that it refused."""
    refused: list[str] = []

    def stand_in(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **more: Any) -> Any:
            if isinstance(path, str | os.PathLike) and chosen(os.fspath(path)):
                refused.append(os.fspath(path))
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *rest, **more)

        return call

    with monkeypatch.context() as patch:
        for name in calls.split():
            patch.setattr(os, name, stand_in(getattr(os, name)))
        yield refused


def trouble_of(read: Callable[[], Any]) -> RecordingUnreadable | None:
    """What the system did not let it read; None where it read all that it wanted.

    Every other error is raised.
    """
    try:
        read()
    except RecordingUnreadable as error:
        return error
    return None


PLACES: dict[str, Callable[[str], bool]] = {
    "the root file": lambda name: name.endswith("zarr.json"),
    "the recording": lambda name: name.endswith("mine.zarr") or "mine.zarr/" in name,
    "its chunks": lambda name: Path(name).name.startswith("c."),
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("place", PLACES)
def test_what_the_system_refuses_is_never_called_damaged(
    place: str, trouble: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, met = getattr(errno, trouble), set()
    for way, read in READS.items():
        if way == "verify" and trouble not in ("EIO", "EMFILE"):  # it takes longest
            continue
        with (
            failing(monkeypatch, number, PLACES[place]) as refused,
            contextlib.redirect_stdout(io.StringIO()) as shown,
        ):
            error = trouble_of(lambda read=read: read(good))  # type: ignore[misc]
        if error is None:
            assert not refused or way in ("rm", "find by name"), (
                f"{way} saw nothing of it: {refused[:3]}"
            )
        else:
            met.add(way)
            assert error.exit_code == 2 and error.errno == number
            assert (
                os.strerror(number) in error.cause
                and "The recording is probably whole." in error.cause
            )
            assert "remove" not in error.remedy and "damaged" not in f"{error}"
        assert "damaged" not in shown.getvalue()
        if way == "rm" and not good.exists():  # nothing that it looked at was refused
            assert place == "its chunks"
            recording(good)
    assert good.exists() and len(met) >= 5, met


@pytest.mark.parametrize("trouble", ["EIO", "EACCES", "ESTALE"])
def test_a_listing_says_unreadable_and_why(
    trouble: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(good, tmp_path / "whole.zarr")
    shutil.copytree(good, tmp_path / "far.zarr")
    real = os.open

    def stand_in(path: Any, *rest: Any, **more: Any) -> int:
        if "far.zarr" in str(path):
            raise OSError(getattr(errno, trouble), os.strerror(getattr(errno, trouble)))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", stand_in)
    assert dispatch(["ls", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^far +unreadable$", shown, re.MULTILINE)
    assert (
        os.strerror(getattr(errno, trouble)) in shown
        and "probably whole" in shown
        and "damaged" not in shown
    )
    assert {path.name: attributes is None for path, attributes in list_runs(tmp_path)} == {
        "whole.zarr": False,
        "far.zarr": True,
    }
    (far,) = [row for row in listing(tmp_path) if row.path.name == "far.zarr"]
    assert isinstance(far.error, RecordingUnreadable)
    with pytest.raises(RecordingUnreadable):
        dispatch(["rm", "--yes", "--runs", str(tmp_path), "far"])
    assert (tmp_path / "far.zarr").is_dir()


def test_a_folder_that_cannot_be_listed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        failing(monkeypatch, errno.ESTALE, lambda name: name == str(tmp_path)),
        pytest.raises(RecordingUnreadable, match="network share") as caught,
    ):
        listing(tmp_path)
    assert "Mount" in caught.value.remedy


@pytest.mark.parametrize("call", ["pread", "preadv"])  # of a shard's index, of a chunk
def test_a_read_that_fails_in_the_middle_is_the_systems(
    call: str, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file opens, and the disk gives up on its bytes."""
    run = Run(good)
    maps = run.attention()

    def fails(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(RecordingUnreadable, match="Input/output error"):
        _ = maps.isel(step=0).values


def test_what_is_damaged_stays_damaged(good: Path, tmp_path: Path, capsys: Any) -> None:
    path = Path(shutil.copytree(good, tmp_path / "bad.zarr"))
    (path / "zarr.json").write_text("{")
    assert dispatch(["ls", str(tmp_path)]) == 0 and "damaged" in capsys.readouterr().out
    path = Path(shutil.copytree(good, tmp_path / "worse.zarr"))
    (path / "latents/latents/c.1.0.0.0.0").unlink()
    assert {check.name: check.verdict for check in verify(Run(path))}["manifest"] == "failed"


# --- the real thing -------------------------------------------------------------------------------


def in_a_child(task: Callable[[], None], prepare: Callable[[], Any]) -> str:
    """What a task in a fork of this process ends in: "", or a traceback."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        said = ""
        try:
            prepare()
            task()
        except BaseException:
            said = traceback.format_exc()
        os.write(theirs, said.encode()[-60_000:])
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


def test_too_many_open_files_is_said(good: Path) -> None:
    Run(good).attention().isel(step=0).load()  # what is imported late is imported

    def task() -> None:
        for way in ("open", "tree", "a step's maps", "pictures", "find by name", "show", "diff"):
            held = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            error = trouble_of(lambda way=way: READS[way](good))  # type: ignore[misc]
            for number in held:
                os.close(number)
            assert error and error.errno == errno.EMFILE and "ulimit -n" in error.remedy, (
                way,
                error,
            )

    said = in_a_child(task, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert said == ""


def test_what_may_not_be_read_is_said(good: Path) -> None:
    """As somebody who is not root."""
    runs = Path(tempfile.mkdtemp())  # pytest's own folder is closed to others
    runs.chmod(0o755)
    closed = Path(shutil.copytree(good, runs / "closed.zarr"))
    file = Path(shutil.copytree(good, runs / "file.zarr"))
    chunk = Path(shutil.copytree(good, runs / "chunk.zarr"))
    closed.chmod(0)
    (file / "zarr.json").chmod(0)
    (chunk / f"{GRID}/cross/c.1.0.0.0.0.0.0.0").chmod(0)

    def task() -> None:
        rows = {row.path.name: row for row in listing(runs)}
        assert isinstance(rows["closed.zarr"].error, RecordingUnreadable) and isinstance(
            rows["file.zarr"].error, RecordingUnreadable
        )
        assert rows["chunk.zarr"].attributes is not None
        for path, way in (
            (closed, "find"),
            (closed, "open"),
            (file, "open"),
            (chunk, "verify"),
            (chunk, "diff"),
        ):
            error = trouble_of(lambda way=way, path=path: READS[way](path))  # type: ignore[misc]
            assert error and error.errno == errno.EACCES and "chmod" in error.remedy, (
                path.name,
                way,
                error,
            )

    def become_nobody() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    try:
        assert in_a_child(task, become_nobody) == ""
    finally:
        closed.chmod(0o755)
        shutil.rmtree(runs)


def test_a_sample_that_cannot_be_unpacked_names_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (
        failing(monkeypatch, errno.EIO, lambda name: "cache" in name, "mkdir"),
        pytest.raises(RecordingUnreadable, match="Input/output"),
    ):
        sample.unpacked()
