"""A recording that grows is followed: what is said of it, what is sent again, and when."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from recordings import change_root, cut, finish, grow, growing
from starlette.applications import Starlette
from starlette.testclient import TestClient

from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.routes import MIDDLEWARE, ROUTES
from probe.figures.following import following
from probe.figures.payload import unpack
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording

ROOT = Path(__file__).resolve().parent.parent
NODE = shutil.which("node")


@pytest.fixture
def whole(tmp_path: Path) -> Run:
    return Run(synthetic_recording(tmp_path / "whole.zarr", steps=6))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "runs").mkdir()
    configure(Library(tmp_path / "runs"))
    app = Starlette(routes=ROUTES, middleware=MIDDLEWARE)
    yield TestClient(app, base_url="http://127.0.0.1:8000")
    libraries._library.clear()


def test_a_recording_is_followed_from_before_its_first_step_to_its_end(
    client: TestClient, whole: Run, tmp_path: Path
) -> None:
    run = growing(whole, tmp_path / "runs", 0)
    tags: list[str] = []
    said: list[tuple[str, str]] = []
    steps: list[list[int]] = []

    def look() -> None:
        headers = {"if-none-match": tags[-1]} if tags else {}
        answer = client.get("/probe/run", params={"run": run.name}, headers=headers)
        assert answer.status_code == 200, "it has changed"
        meta = unpack(answer.content)[0]["meta"]
        tags.append(answer.headers["etag"])
        said.append((meta["following"]["state"], meta["following"]["text"]))
        steps.append(meta["steps"])
        again = client.get(
            "/probe/run", params={"run": run.name}, headers={"if-none-match": tags[-1]}
        )
        assert again.status_code == 304

    look()
    for count in (2, 6):
        grow(run, whole, count)
        look()
    finish(run, whole)
    look()
    assert said == [
        ("recording", "recording: the first of 6 steps is not finished yet"),
        ("recording", "recording: 2 of 6 steps"),
        ("finishing", "finishing: all 6 steps are here, the picture is made"),
        ("complete", ""),
    ]
    assert steps == [[], [0, 1], list(range(6)), list(range(6))]
    assert len(set(tags)) == 4


def test_a_writer_that_dies_is_noticed_though_no_file_changes(
    client: TestClient, whole: Run, tmp_path: Path
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run = growing(whole, tmp_path / "runs", 2)
    change_root(run, lambda attributes: attributes["writer"].update(pid=child.pid))
    before = client.get("/probe/run", params={"run": run.name})
    assert unpack(before.content)[0]["meta"]["following"]["state"] == "recording"
    child.kill()
    child.wait()
    after = client.get(
        "/probe/run", params={"run": run.name}, headers={"if-none-match": before.headers["etag"]}
    )
    told = unpack(after.content)[0]["meta"]["following"]
    assert told["state"] == "interrupted" and "after 2 of 6 steps" in told["text"]
    assert told["command"] == f"python -m probe.run --resume {run.path}"


def test_the_command_is_one_word_for_a_shell(whole: Run, tmp_path: Path) -> None:
    run = cut(whole, tmp_path / "it's a; rm -rf ~" / "x", 2)
    told = following(run)
    assert told["state"] == "interrupted"
    done = subprocess.run(
        f"printf '%s\n' {told['command'].partition('--resume ')[2]}",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{run.path}\n"


def test_one_that_failed_says_so(tmp_path: Path) -> None:
    run = Run(synthetic_recording(tmp_path / "failed.zarr", steps=4, status="failed"))
    told = following(run)
    assert told["state"] == "failed" and told["text"].startswith("Ended by an error after 2 of 4")


def test_a_step_that_comes_while_a_payload_is_made_is_sent_next_time(
    whole: Run, tmp_path: Path
) -> None:
    """The tag is that of the state before: else the last steps would never be asked for."""
    (tmp_path / "runs").mkdir()
    library = Library(tmp_path / "runs")
    run = growing(whole, tmp_path / "runs", 2)

    def slow(opened: Run) -> bytes:
        seen = len(opened.steps)
        grow(run, whole, seen + 2)
        return bytes([seen])

    first, tag = library.payload(run.name, ("run",), slow)
    second, later = library.payload(run.name, ("run",), lambda opened: bytes([len(opened.steps)]))
    assert (first, second) == (b"\2", b"\4") and tag != later


def test_what_is_kept_of_a_growing_recording_does_not_grow_with_its_steps(
    whole: Run, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    library = Library(tmp_path / "runs")
    run = growing(whole, tmp_path / "runs", 0)
    for count in range(1, 7):
        grow(run, whole, count)
        library.payload(run.name, ("run", 0), lambda opened: bytes(100))
    assert len(library._kept) == 1 and library.run(run.name).steps.tolist() == list(range(6))


def test_damaged_and_removed_while_it_is_followed(
    client: TestClient, whole: Run, tmp_path: Path
) -> None:
    run = growing(whole, tmp_path / "runs", 2)
    assert client.get("/probe/run", params={"run": run.name}).status_code == 200
    (run.path / "zarr.json").write_text("{")
    answer = client.get("/probe/run", params={"run": run.name})
    assert answer.status_code == 404 and "zarr.json" in answer.text
    shutil.rmtree(run.path)
    answer = client.get("/probe/run", params={"run": run.name})
    assert answer.status_code == 404 and run.name in answer.text


@pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs")
def test_when_it_is_asked_for_and_what_is_shown_then(tmp_path: Path) -> None:
    from probe.dashboard.player import home_script
    from probe.figures.page import script

    test = ROOT / "tests" / "following.test.mjs"
    done = subprocess.run(
        [str(NODE), "--test", str(test)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and "# pass 5" in done.stdout, done.stdout + done.stderr
    (tmp_path / "one.mjs").write_text(script() + home_script())
    check = [str(NODE), "--check", str(tmp_path / "one.mjs")]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
