"""Recordings are found by path, by the beginning of a name or as the latest, and listed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stored import ATTRIBUTES

from probe.errors import RecordingDamaged, RecordingNotFound
from probe.reading.finding import find_run
from probe.reading.listing import list_runs
from probe.reading.recording import Run, open_run

pytestmark = pytest.mark.usefixtures("no_thread_left")


def fake(path: Path, **attributes: Any) -> Path:
    """The root file of a recording, without the recording."""
    path.mkdir(parents=True)
    about = {**ATTRIBUTES, "status": "complete", **attributes}
    (path / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": about})
    )
    return path


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no root file": lambda file: file.unlink(),
    "nothing in it": lambda file: file.write_text(""),
    "half of it": lambda file: file.write_text(file.read_text()[:100]),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda file: file.write_text("[]"),
    "nested without end": lambda file: file.write_text("[" * 100_000),
    "no attributes": lambda file: file.write_text('{"zarr_format": 3, "node_type": "group"}'),
    "another format": lambda file: file.write_text(
        file.read_text().replace('"format_version": 1', '"format_version": 99')
    ),
    "no experiment": lambda file: file.write_text(
        file.read_text().replace('"experiment": {', '"experiment": 3, "other": {')
    ),
    "an empty experiment": lambda file: file.write_text(
        file.read_text().replace('"experiment": {', '"experiment": {}, "other": {')
    ),
    "a prompt that is a number": lambda file: file.write_text(
        file.read_text().replace('"prompt": "', '"prompt": 3, "_": "')
    ),
    "created that is a number": lambda file: file.write_text(
        file.read_text().replace('"created": "', '"created": 3, "_": "')
    ),
    "a status that is a list": lambda file: file.write_text(
        file.read_text().replace('"status": "', '"status": [], "_": "')
    ),
    "zarr 2": lambda file: file.write_text(
        file.read_text().replace('"zarr_format": 3', '"zarr_format": 2')
    ),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_is_a_row_and_hides_no_other(tmp_path: Path, damage: str) -> None:
    good, bad = fake(tmp_path / "good.zarr"), fake(tmp_path / "bad.zarr")
    DAMAGES[damage](bad / "zarr.json")
    rows = list_runs(tmp_path)
    assert [(path, attributes is None) for path, attributes in rows] == [(good, False), (bad, True)]
    with pytest.raises((RecordingDamaged, RecordingNotFound)) as caught:
        Run(bad)
    assert caught.value.remedy and "\n" not in caught.value.cause


@pytest.mark.parametrize(
    "writer",
    [
        {},
        {"pid": 1},
        {"pid": "x", "host": socket.gethostname()},
        {"pid": None, "host": socket.gethostname()},
        7,
        None,
    ],
)
def test_a_writer_that_makes_no_sense_is_not_asked(tmp_path: Path, writer: Any) -> None:
    fake(tmp_path / "a.zarr", status="running", writer=writer)
    fake(tmp_path / "b.zarr", status="running", writer={"pid": 2**70, "host": socket.gethostname()})
    assert {attributes and attributes["status"] for _, attributes in list_runs(tmp_path)} <= {
        "running",
        "interrupted",
        None,
    }


def test_a_running_one_whose_writer_died_is_interrupted(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = fake(tmp_path / "dead.zarr", status="running", writer={"pid": gone.pid, "host": host})
    alive = fake(
        tmp_path / "alive.zarr", status="running", writer={"pid": os.getpid(), "host": host}
    )
    away = fake(
        tmp_path / "away.zarr",
        status="running",
        writer={"pid": gone.pid, "host": "another-machine"},
    )
    statuses = {
        path: attributes["status"] for path, attributes in list_runs(tmp_path) if attributes
    }
    assert statuses == {dead: "interrupted", alive: "running", away: "running"}


def test_listing_many_is_fast_and_newest_first(tmp_path: Path) -> None:
    for index in range(200):
        fake(
            tmp_path / f"run-{index:03}.zarr",
            created=f"2026-01-01T00:{index // 60:02}:{index % 60:02}.000+00:00",
            consolidated={"x": "y" * 20_000},
        )
    (tmp_path / "run-100.zarr" / "zarr.json").write_text("{")
    fake(tmp_path / ".hidden.zarr.partial")
    fake(tmp_path / ".hidden.zarr")
    fake(tmp_path / "something-else")
    (tmp_path / "file.zarr").write_text("")
    start = time.perf_counter()
    rows = list_runs(tmp_path)
    seconds = time.perf_counter() - start
    assert (
        len(rows) == 200
        and rows[0][0].name == "run-199.zarr"
        and rows[-1] == (tmp_path / "run-100.zarr", None)
    )
    assert seconds < 0.5, f"{seconds:.2f} s"
    print(f"200 recordings listed in {seconds:.3f} s")


def test_a_run_is_found_by_its_path_the_beginning_of_its_name_or_as_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake(tmp_path / "runs" / "cat-11111111.zarr", created="2026-01-01")
    new = fake(tmp_path / "runs" / "cat-22222222.zarr", created="2026-01-03")
    dog = fake(tmp_path / "runs" / "dog-33333333.zarr", created="2026-01-02")
    runs = tmp_path / "runs"
    assert find_run("latest", runs) == new
    for name in (
        old,
        str(old),
        f"{old}/",
        "cat-1",
        "cat-11111111",
        "cat-11111111.zarr",
        f"{runs}/cat-1",
    ):
        assert find_run(name, runs) == old, name
    assert find_run("d", str(runs)) == dog
    monkeypatch.chdir(tmp_path)
    assert (
        find_run("runs/cat-1", "runs")
        == find_run("runs/cat-1", "runs/")
        == Path("runs/cat-11111111.zarr")
    )
    assert open_run("d").name == "dog-33333333"
    with pytest.raises(RecordingNotFound) as caught:
        find_run("cat", runs)
    assert caught.value.cause == "2 recordings begin with 'cat'."
    assert "cat-11111111" in caught.value.remedy and "cat-22222222" in caught.value.remedy
    with pytest.raises(RecordingNotFound) as caught:
        find_run("dgo-33333333", runs)
    assert (
        "begins with 'dgo-33333333'" in caught.value.cause
        and "Did you mean dog-33333333" in caught.value.remedy
    )
    for folder in (tmp_path / "nothing", tmp_path / "runs" / "cat-11111111.zarr" / "zarr.json"):
        with pytest.raises(RecordingNotFound) as caught:
            find_run("latest", folder)
        assert (
            "There is no recording in" in caught.value.cause and "probe.run" in caught.value.remedy
        )


def test_no_name_is_no_choice(tmp_path: Path) -> None:
    """An empty variable of a shell must not choose what `probe rm` removes."""
    fake(tmp_path / "only-11111111.zarr")
    for name in ("", " "):
        with pytest.raises(RecordingNotFound):
            find_run(name, tmp_path)


def test_the_latest_is_one_that_can_be_read(tmp_path: Path) -> None:
    good, bad = fake(tmp_path / "good.zarr"), fake(tmp_path / "bad.zarr")
    (bad / "zarr.json").write_text("{")
    assert find_run("latest", tmp_path) == good
