"""A pipe, a device or a bomb instead of a picture, masks, a zip, a chunk or a lock is named.

It is named at once, and never waited for.
"""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recordings import recording

from probe.cli import dispatch
from probe.errors import ExperimentError, RecordingDamaged, RecordingNotFound
from probe.reading.recording import open_run
from probe.settings.pictures import MOST_MASKS, read_masks, read_picture
from probe.writing.files import append, check_own
from probe.writing.locks import Lock
from probe.writing.store import RunWriter


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What hangs fails: a pipe that is opened is waited for inside the system, where only a signal
    ends it.
    """

    def late(*_: Any) -> None:
        raise AssertionError("it waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("good") / "mine.zarr")


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


ODD: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": listening,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


# --- pictures and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_file_is_no_picture_and_no_mask(what: str, tmp_path: Path) -> None:
    for name, read in (
        ("f.png", lambda path: read_picture(path, 32, 32)),
        ("g.png", lambda path: read_masks([path], 32, 32)),
        ("h.npz", lambda path: read_masks([path], 32, 32)),
    ):
        ODD[what](tmp_path / name)
        with pytest.raises(ExperimentError, match=rf"{name} is {what}, not a file\.") as caught:
            read(tmp_path / name)
        assert caught.value.remedy.startswith("Name a ")


def test_a_picture_through_a_link_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    assert (read_picture(tmp_path / "link.png", 32, 32) == (255, 0, 0)).all()


def held(**members: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
            for name, content in members.items():
                made.writestr(name, content)

    return make


def says(header: str, content: bytes = b"") -> bytes:
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + content


def claims(shape: str, dtype: str = "|u1", content: bytes = b"\1" * 64) -> bytes:
    return says(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}", content)


def pickled() -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([[{}]]), allow_pickle=True)
    return made.getvalue()


def endless_list(path: Path) -> None:
    held(**{"cat.npy": claims("(8, 8)")})(path)
    end = bytearray(path.read_bytes()[-22:])
    end[12:16], end[16:20] = (2**28).to_bytes(4, "little"), bytes(4)
    with path.open("r+b") as file:
        file.truncate(2**28)
        file.seek(0, os.SEEK_END)
        file.write(end)


MASKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parentheses": (
        held(**{"cat.npy": says("(" * 5000)}),
        "'cat' in .* is not an array that can be read",
    ),
    "short parentheses": (held(**{"cat.npy": says("(" * 500)}), "is not an array that can be read"),
    "minus signs": (held(**{"cat.npy": says("-" * 900 + "1")}), "is not an array that can be read"),
    "an open text": (held(**{"cat.npy": says("'''")}), "is not an array that can be read"),
    "a header of version 2 without end": (
        held(**{"cat.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 10**6}),
        "is not an array",
    ),
    "a bomb": (
        held(**{"cat.npy": claims("(20000, 20000)", content=bytes(2**22))}),
        "'cat' in .* is 20000 x 20000 pixels",
    ),
    "a long line": (
        held(**{"cat.npy": claims("(10000000000000,)")}),
        r"is uint8 of shape \(10000000000000,\)",
    ),
    "a large claim": (
        held(**{"cat.npy": claims("(10000000000000, 8)")}),
        "is 10000000000000 x 8 pixels",
    ),
    "a claim beyond its end": (held(**{"cat.npy": claims("(80, 80)")}), "not as long as it says"),
    "more than it claims": (
        held(**{"cat.npy": claims("(8, 8)", content=bytes(9000))}),
        "not as long as it says",
    ),
    "a side below 0": (held(**{"cat.npy": claims("(-8, -8)")}), r"shape \(-8, -8\)"),
    "objects": (held(**{"cat.npy": pickled()}), "is object of shape"),
    "fields": (
        held(
            **{
                "cat.npy": says(
                    "{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (8, 8), }"
                )
            }
        ),
        "of shape",
    ),
    "no array": (held(**{"cat.txt": b"hello"}), "is not an array that can be read"),
    "no mask": (held(), "has no mask in it"),
    "very many": (held(**{f"{i}.npy": b"" for i in range(MOST_MASKS + 1)}), "has 1001 masks"),
    "a list without end": (endless_list, "cannot be read .*its list of files has 268435456 bytes"),
    "no zip": (lambda path: path.write_bytes(b"hello"), "cannot be read"),
    "one array alone": (lambda path: path.write_bytes(claims("(8, 8)")), "cannot be read"),
}


@pytest.mark.parametrize("what", MASKS)
def test_hostile_masks_are_refused_before_they_are_unpacked(what: str, tmp_path: Path) -> None:
    make, expected = MASKS[what]
    make(tmp_path / "m.npz")
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ExperimentError, match=f"masks: .*{expected}") as caught:
        read_masks([tmp_path / "m.npz"], 8, 8)
    assert caught.value.remedy and caught.value.exit_code == 2 and "\n" not in caught.value.cause
    assert (
        time.process_time() - since < 1
        and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )


def test_many_masks_that_are_too_large_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "m.npz", *[np.ones((8, 8), np.uint8)] * 5)
    assert len(read_masks([tmp_path / "m.npz"], 8, 8)) == 5
    monkeypatch.setattr("probe.settings.pictures.MOST_BYTES", 500)
    with pytest.raises(ExperimentError, match="has 5 masks of 960 bytes together"):
        read_masks([tmp_path / "m.npz"], 8, 8)


def test_packed_by_another_method_is_refused(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python unpacks bzip2 without a bound: 45 bytes become 45 million."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("m.npz", "mine.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_BZIP2) as made:
            made.writestr("mine.zarr/zarr.json", bytes(10**6))
    with pytest.raises(ExperimentError, match="packed in a way that is not read"):
        read_masks([tmp_path / "m.npz"], 8, 8)
    with pytest.raises(RecordingDamaged, match="packed in a way that is not read"):
        open_run(tmp_path / "mine.zip")


@pytest.mark.parametrize("dtype", ["bool", "u1", "<i8", ">i4"])
def test_masks_are_what_numpy_reads(dtype: str, tmp_path: Path) -> None:
    cat = (np.random.default_rng(0).random((40, 30)) < 0.5).astype(dtype)
    for save in (np.savez, np.savez_compressed):
        save(
            tmp_path / "m.npz",
            cat=cat,
            hat=np.asfortranarray(cat),
            part=np.ones((400, 300), dtype)[::10, ::10],
        )
        found = read_masks([tmp_path / "m.npz"], 40, 30)
        assert list(found) == ["cat", "hat", "part"] and found["part"].all()
        assert np.array_equal(found["cat"], cat != 0) and np.array_equal(found["hat"], cat != 0)


# --- recordings in zip files ----------------------------------------------------------------------


def zipped(path: Path, good: Path, more: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for file in sorted(good.rglob("*")):
            made.write(file, f"mine.zarr/{file.relative_to(good).as_posix()}")
        for name, content in more.items():
            made.writestr(name, content)
    return path


@pytest.mark.parametrize("how", ["nothing", "a zip at its end"])
def test_a_hole_is_no_zip(how: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    path.write_bytes(b"")
    os.truncate(path, 20 * 2**30)
    if how != "nothing":
        with zipfile.ZipFile(path, "a") as made:
            made.writestr("mine.zarr/zarr.json", b"{}")
    with pytest.raises(RecordingDamaged, match="never written"):
        open_run(path)


def test_what_is_no_zip_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large.zip").write_bytes(b"x" * 2**20)
    monkeypatch.setattr("hashlib.file_digest", None)
    with pytest.raises(RecordingDamaged, match="is not a zip file"):
        open_run(tmp_path / "large.zip")


@pytest.mark.parametrize("what", ["a pipe", "a socket", "a folder", "a device"])
def test_what_is_no_file_is_no_zip(what: str, tmp_path: Path) -> None:
    ODD[what](tmp_path / "mine.zip")
    with pytest.raises(RecordingNotFound, match=f"is {what}, not a file"):
        open_run(tmp_path / "mine.zip")


def test_what_no_recording_has_stays_in_the_zip(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = [
        "x0",
        "a/x1",
        ".DS_Store",
        "run.sh",
        "c.x",
        "words.png",
        "latents/latents/c.0.0.0.0.0.0123abcd.partial",
    ]
    run = open_run(
        zipped(tmp_path / "mine.zip", good, {f"mine.zarr/{name}": b"x" for name in more})
    )
    there = {file.relative_to(good).as_posix() for file in good.rglob("*") if file.is_file()}
    assert {
        file.relative_to(run.path).as_posix() for file in run.path.rglob("*") if file.is_file()
    } == {*there, "words.png"}


def test_more_files_than_recordings_have(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("probe.reading.archives.MOST_ENTRIES", 500)
    with pytest.raises(RecordingDamaged, match=r"in [0-9]{3,4} files"):
        open_run(zipped(tmp_path / "mine.zip", good, {f"mine.zarr/c.{i}": b"" for i in range(500)}))
    assert not (tmp_path / "cache").exists()


# --- recordings and locks -------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a pipe", "a socket", "a device"])
@pytest.mark.parametrize("name", ["latents/latents/c.9.0.0.0.0", "it's new"])
def test_what_is_no_file_is_named_before_a_recording_is_taken_over(
    what: str, name: str, good: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(good, tmp_path / "mine.zarr"))
    if what == "a device":
        try:
            os.mknod(path / name, 0o020600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    else:
        ODD[what](path / name)
    with pytest.raises(RecordingDamaged, match=f"is {what}, where only a file can be") as caught:
        RunWriter(path, [], {}, resume=True)
    assert name in caught.value.cause and caught.value.remedy.startswith(
        "Remove it, then try again: rm "
    )
    assert os.system(caught.value.remedy.partition(": ")[2]) == 0
    check_own(path)


@pytest.mark.parametrize(
    "name",
    ["latents/latents/c.1.0.0.0.0", "cost/peak_memory/c", "latents/zarr.json", "digests.txt"],
)
def test_a_folder_under_the_name_of_a_file(name: str, good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(good, tmp_path / "mine.zarr"))
    (path / name).unlink()
    (path / name).mkdir()
    before = sorted((file, file.stat().st_mtime_ns) for file in path.rglob("*"))
    with pytest.raises(RecordingDamaged, match="is a folder, where only a file can be") as caught:
        RunWriter(path, [], {}, resume=True)
    assert (
        name in caught.value.cause
        and sorted((file, file.stat().st_mtime_ns) for file in path.rglob("*")) == before
    )
    assert os.system(caught.value.remedy.partition(": ")[2]) == 0
    check_own(path)


def test_nothing_is_added_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "digests.txt")
    with pytest.raises(OSError, match="No such device"):
        append(tmp_path / "digests.txt", b"x", False)


@pytest.mark.parametrize("what", ["a pipe", "a socket", "a folder"])
def test_a_lock_that_is_none_says_what_it_is(what: str, tmp_path: Path) -> None:
    ODD[what](tmp_path / ".mine.zarr.lock")
    with pytest.raises(RecordingDamaged, match=f"is no lock: it is {what}") as caught:
        Lock(tmp_path / "mine.zarr").acquire()
    assert os.system(caught.value.remedy.partition(": ")[2]) == 0
    Lock(tmp_path / "mine.zarr").acquire()


def test_gc_takes_locks_that_are_none(tmp_path: Path, capsys: Any) -> None:
    for what, name in zip(("a pipe", "a socket", "a folder"), "abc", strict=True):
        ODD[what](tmp_path / f".{name}.zarr.lock")
    (tmp_path / ".d.zarr.0123abcd.partial").mkdir()
    os.mkfifo(tmp_path / ".e.zarr.0123abcd.partial")
    assert dispatch(["gc", "--dry-run", str(tmp_path)]) == 0 and len(list(tmp_path.iterdir())) == 5
    assert dispatch(["gc", str(tmp_path)]) == 0 and [path.name for path in tmp_path.iterdir()] == [
        ".c.zarr.lock"
    ]
