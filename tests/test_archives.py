"""A recording that comes as a zip file, as links, or by an address is read or refused.

A refusal says what helps.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recordings import recording

from probe.cli import dispatch
from probe.errors import (
    ExperimentError,
    ProbeError,
    RecordingDamaged,
    RecordingLinked,
    RecordingNotFound,
)
from probe.proof.verdict import verify
from probe.reading.finding import find_run
from probe.reading.recording import open_run
from probe.running.recorder import rerun, resume


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recording(tmp_path_factory.mktemp("good") / "mine.zarr")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion-probe"


def zipped(path: Path, good: Path, inside: str = "mine.zarr/", **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for file in sorted(good.rglob("*")):
            made.write(file, f"{inside}{file.relative_to(good).as_posix()}")
        for name, content in more.items():
            made.writestr(name, content)
    return path


@pytest.mark.parametrize("inside", ["mine.zarr/", "", "results/today/mine.zarr/"])
def test_a_zip_is_opened_as_the_folder_would_be(
    inside: str, good: Path, tmp_path: Path, cache: Path, capsys: Any
) -> None:
    path = zipped(tmp_path / "mine.zarr.zip", good, inside)
    run = open_run(path)
    assert run.name == "mine" and {c.name: c.verdict for c in verify(run)} == {
        c.name: c.verdict for c in verify(open_run(good))
    }
    first = run.path.stat().st_mtime_ns
    assert open_run(str(path)).path == run.path and run.path.stat().st_mtime_ns == first, (
        "unpacked once"
    )
    assert dispatch(["show", str(path)]) == 0 and "latents/prediction" in capsys.readouterr().out
    assert len(list(cache.iterdir())) == 1, "nothing else is left"
    shutil.rmtree(run.path)
    assert open_run(path).status == "complete", "unpacked again, where the copy was removed"


def test_each_zip_has_a_copy_of_its_own(good: Path, tmp_path: Path, cache: Path) -> None:
    """Also one that has the name of another, and one that is the same under another name."""
    first, second = zipped(tmp_path / "mine.zip", good), tmp_path / "again" / "mine.zip"
    second.parent.mkdir()
    zipped(second, good, **{"mine.zarr/words.png": b"another"})
    shutil.copy(second, tmp_path / "copy.zip")
    marks = [
        f"zip-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        for path in (first, second, tmp_path / "copy.zip")
    ]
    paths = [open_run(path).path for path in (first, second, tmp_path / "copy.zip")]
    assert [path.parent.name for path in paths] == marks and marks[0] != marks[1] == marks[2]
    for path, extra in zip(paths, ([], ["words.png"], ["words.png"]), strict=True):
        there = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in path.rglob("*")
            if file.is_file() and file.name not in extra
        }
        assert there == {
            file.relative_to(good).as_posix(): file.read_bytes()
            for file in good.rglob("*")
            if file.is_file()
        }
        assert [(path / name).read_bytes() for name in extra] == [b"another"] * len(extra)


def test_a_copy_has_the_name_of_its_zip(good: Path, tmp_path: Path) -> None:
    first = zipped(tmp_path / "first.zip", good)
    for name, shown in (
        ("first.zip", "first"),
        ("second.zip", "second"),
        ("..zip", "recording"),
        (".hidden.zarr.zip", "hidden"),
    ):
        if name != "first.zip":
            shutil.copy(first, tmp_path / name)
        assert open_run(tmp_path / name).name == shown


def test_a_stray_file_in_the_cache_changes_nothing(good: Path, tmp_path: Path) -> None:
    path = zipped(tmp_path / "mine.zip", good)
    run = open_run(path)
    (run.path.parent / ".DS_Store").write_bytes(b"of a file browser")
    assert open_run(path).path == run.path
    shutil.rmtree(run.path)
    assert open_run(path).status == "complete", "unpacked again"
    shutil.rmtree(run.path)
    run.path.mkdir()
    assert open_run(path).status == "complete", "all files of the copy were removed"


def test_only_pictures_that_are_drawn_are_unpacked(good: Path, tmp_path: Path) -> None:
    more = {
        f"mine.zarr/{name}": b"x"
        for name in ("holiday.png", "latents/picture.png", "ask-a-cat.png", "picture-1.png")
    }
    assert {
        file.name
        for file in open_run(zipped(tmp_path / "mine.zip", good, **more)).path.rglob("*.png")
    } == {"ask-a-cat.png", "picture-1.png"}


def entry(name: str, content: bytes = b"{}", mode: int = 0) -> Callable[[Path, Path], None]:
    def add(path: Path, good: Path) -> None:
        zipped(path, good)
        with zipfile.ZipFile(path, "a") as made:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            made.writestr(info, content)

    return add


def bomb(path: Path, good: Path) -> None:
    zipped(path, good)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as made,
        made.open("mine.zarr/c.9", "w") as file,
    ):
        for _ in range(300):
            file.write(bytes(2**20))


def lying(path: Path, good: Path) -> None:
    """An entry that is longer than it says."""
    zipped(path, good, **{"mine.zarr/c.9": bytes(10**6)})
    raw = bytearray(path.read_bytes())
    for at in (raw.rfind(b"PK\1\2") + 24, raw.rfind(b"PK\3\4") + 22):
        raw[at : at + 4] = struct.pack("<I", 10)
    path.write_bytes(bytes(raw))


def long_list(path: Path, good: Path) -> None:
    zipped(path, good)
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"PK\5\6")
    raw[at + 12 : at + 16] = struct.pack("<I", 2**31)
    path.write_bytes(bytes(raw))


HOSTILE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a name out of it": (entry("../../elsewhere"), "which no recording has"),
    "an absolute name": (entry("/tmp/elsewhere"), "which no recording has"),
    "a name that moves the cursor": (entry("mine.zarr/\x1b[2J"), "which no recording has"),
    "a link": (entry("mine.zarr/link", b"/etc/passwd", 0o120777), "which no recording has"),
    "a device": (entry("mine.zarr/pipe", b"", 0o010666), "which no recording has"),
    "a file in a file": (entry("mine.zarr/zarr.json/c.0"), "cannot be unpacked"),
    "a bomb": (bomb, "would grow from"),
    "a file that is longer than it says": (lying, "mine.zip"),
    "a list without end": (long_list, "is not a zip file"),
    "no zip": (lambda path, good: path.write_bytes(b"hello"), "is not a zip file"),
    "a zip that is cut": (
        lambda path, good: os.truncate(zipped(path, good), 5000),
        "is not a zip file",
    ),
    "nothing in it": (lambda path, good: zipfile.ZipFile(path, "w").close(), "holds no recording"),
    "two recordings": (
        lambda path, good: zipped(path, good, **{"other.zarr/zarr.json": b"{}"}),
        "holds 2 recordings",
    ),
    "a flipped byte": (
        lambda path, good: path.write_bytes(
            (raw := zipped(path, good).read_bytes())[:2000] + bytes([raw[2000] ^ 0x55]) + raw[2001:]
        ),
        "mine.zip",
    ),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_zip_is_refused_and_leaves_nothing(
    what: str, good: Path, tmp_path: Path, cache: Path
) -> None:
    plant, expected = HOSTILE[what]
    plant(tmp_path / "mine.zip", good)
    with pytest.raises(ProbeError) as caught:
        open_run(tmp_path / "mine.zip")
    assert (
        isinstance(caught.value, RecordingDamaged | RecordingNotFound)
        and expected in caught.value.cause
    )
    assert caught.value.remedy and f"{caught.value}".replace("\n", "").isprintable()
    assert not cache.exists() or list(cache.iterdir()) == []
    assert (
        sorted(path.name for path in tmp_path.iterdir() if path.name not in ("cache", "mine.zip"))
        == []
    )


def test_a_recording_of_links_is_to_be_copied(good: Path, tmp_path: Path, capsys: Any) -> None:
    """As git-annex, DVC and cp -rs leave it: whole, and not damaged."""
    runs = tmp_path / "runs"
    shutil.copytree(good, runs / "links.zarr", copy_function=os.symlink)
    shutil.copytree(good, runs / "chunks.zarr")
    for file in (runs / "chunks.zarr").rglob("c.*"):
        file.rename(tmp_path / file.as_posix().replace("/", "_"))
        file.symlink_to(tmp_path / file.as_posix().replace("/", "_"))
    shutil.copytree(good, runs / "gone.zarr")
    (runs / "gone.zarr/zarr.json").unlink()
    (runs / "gone.zarr/zarr.json").symlink_to(".git/annex/objects/nowhere")
    for name in ("links", "gone", "chunks"):
        with pytest.raises(RecordingLinked) as caught:
            open_run(runs / f"{name}.zarr").latents.load()
        assert (
            "cp -rL" in caught.value.remedy
            and "damaged" not in f"{caught.value}"
            and "remove" not in f"{caught.value}"
        )
    assert dispatch(["ls", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "cp -rL" in shown and "damaged" not in shown
    shutil.copytree(runs / "links.zarr", tmp_path / "copy.zarr")  # what cp -rL does
    assert not [
        check
        for check in verify(open_run(tmp_path / "copy.zarr"))
        if check.name == "manifest" and check.verdict == "failed"
    ]


def test_every_way_to_name_a_path(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = tmp_path / "a b.zarr" / "a b.zarr"
    shutil.copytree(good, nested)
    for name, path in (
        (f"{good}/", good),
        (f"{good}/zarr.json", good),
        (good.as_uri(), good),
        (nested.as_uri(), nested),
        (f"file://localhost{good}", good),
        (str(nested.parent), nested),
    ):
        assert find_run(name) == path, name
    for address in (
        "s3://bucket/mine.zarr",
        "https://example.org/mine.zarr",
        "gs://a/b",
        "file://elsewhere/mine.zarr",
        Path("s3://bucket/mine.zarr"),
    ):
        with pytest.raises(RecordingNotFound, match="is an address") as caught:
            find_run(address)
        assert "Copy it here" in caught.value.remedy


def test_nothing_is_added_to_the_copy_of_a_zip_or_removed_with_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copy(
        Path(__file__).parent / "format_1" / "interrupted.zip", tmp_path / "half.zip"
    )
    monkeypatch.chdir(tmp_path)
    run = open_run(path)
    with pytest.raises(ExperimentError, match=r"copy of a zip file(?s:.)*Unpack it"):
        resume(run, progress=False)
    with pytest.raises(
        ExperimentError, match=r"is read from a copy(?s:.)*Remove a zip file yourself"
    ):
        dispatch(["rm", str(path), "--yes"])
    assert run.path.is_dir() and len(run.steps) == 2
    again = rerun(run, progress=False)
    assert again.path.parent == Path("runs") and again.status == "complete"
    assert [found.name for found in cache.rglob("*.zarr")] == [run.path.name], (
        "what was recorded again lies in runs, not in the cache"
    )
    assert open_run(path).path == run.path
