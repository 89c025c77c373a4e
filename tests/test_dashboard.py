"""The dashboard without a browser: which recordings it serves, to whom, and what its pages show."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest
from views import open_view

from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.routes import MIDDLEWARE, ROUTES
from probe.errors import RecordingNotFound
from probe.figures.bundle import payload
from probe.figures.page import page as whole_page
from probe.figures.payload import unpack
from probe.testing import synthetic
from probe.testing.synthetic import synthetic_recording
from probe.view import begin

PAGES = Path(libraries.__file__).with_name("pages.py")
FIXTURES = Path(__file__).parent / "format_1"
BASE = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    runs.mkdir()
    synthetic_recording(runs / "one.zarr", prompt="a red cat", seed=1)
    synthetic_recording(runs / "two.zarr", prompt="a red cat", seed=2)
    synthetic_recording(runs / "broken.zarr", prompt="a red cat", seed=3)
    (runs / "broken.zarr" / "zarr.json").write_text("{")
    return runs


@pytest.fixture
def library(folder: Path) -> Iterator[Library]:
    made = Library(folder)
    configure(made)
    yield made
    libraries._library.clear()


@pytest.fixture
def client(library: Library) -> TestClient:
    library.rows()
    return TestClient(Starlette(routes=ROUTES, middleware=MIDDLEWARE), base_url=BASE)


# --- what is served ------------------------------------------------------------------------------


def test_recordings_are_served_by_name_alone(client: TestClient, folder: Path) -> None:
    answer = client.get("/probe/run?run=one")
    assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    head, found = unpack(answer.content)
    assert head["meta"]["prompt"] == "a red cat" and found["maps"].shape[0] == 6
    for name in (str(folder / "one.zarr"), "../one", "one.zarr", "", "three", "%00", "one/../two"):
        answer = client.get("/probe/run", params={"run": name})
        assert answer.status_code == 404 and "No recording has this id" in answer.text, name
    assert client.get("/probe/run?run=broken").status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "run?image=-1",
        "run?image=1e3",
        "heads?channel=99",
        "heads?branch=left",
        "maps?of=looking",
        "maps?branch=%3Cimg%3E",
        "run?image=7",
        "maps?per=letters",
        "latents?channel=9",
        "latents?channel=x",
        "places?row=1",
        "places?row=-1",
    ],
)
def test_wrong_requests_are_refused(query: str, client: TestClient) -> None:
    what, _, rest = query.partition("?")
    answer = client.get(f"/probe/{what}?run=one&{rest}")
    assert answer.status_code in (400, 404) and answer.headers["content-type"].startswith(
        "text/plain"
    )


@pytest.mark.parametrize("query", ["heads?run=one&image=1", "heads?run=bare&channel=0"])
def test_what_a_recording_does_not_have_is_not_found(
    query: str, client: TestClient, folder: Path
) -> None:
    synthetic_recording(folder / "bare.zarr", prompt="")
    shutil.rmtree(folder / "bare.zarr" / "attention")
    root = json.loads((folder / "bare.zarr" / "zarr.json").read_text())
    nodes = root["consolidated_metadata"]["metadata"]
    root["consolidated_metadata"]["metadata"] = {
        name: node for name, node in nodes.items() if not name.startswith("attention")
    }
    (folder / "bare.zarr" / "zarr.json").write_text(json.dumps(root))
    answer = client.get(f"/probe/{query}")
    assert answer.status_code == 404
    assert ("It has 0 to 0" if "image" in query else "capture.attention") in answer.text


def test_a_layers_name_that_would_be_code_is_refused(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands between quotation marks in the Python that a reader copies."""
    evil = "down_blocks.0'),__import__('os').system('id')or('"
    monkeypatch.setattr(synthetic, "LAYERS", (evil, "else.1"))
    synthetic_recording(folder / "evil.zarr")
    monkeypatch.setattr(synthetic, "LAYERS", ("else.2", "else.1"))
    synthetic_recording(folder / "other.zarr")
    answer = client.get("/probe/heads?run=evil&channel=0")
    assert answer.status_code == 404 and "8x8/layer has names that no module has" in answer.text
    meta = unpack(client.get("/probe/heads?run=other&channel=0").content)[0]["meta"]
    assert meta["layers"] == [synthetic.MIDDLE, "else.1", "else.2"]


def test_no_page_elsewhere_may_hold_ours_or_what_it_fetches(client: TestClient) -> None:
    headers = client.get("/probe/run?run=one").headers
    assert headers["content-security-policy"] == "frame-ancestors 'self'"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_threads_that_come_at_once_see_one_id(folder: Path) -> None:
    library, start = Library(folder), threading.Barrier(8)

    def ask(_: int) -> str:
        start.wait()
        return library.add(folder / "one.zarr")

    for _ in range(50):
        library._ids.clear()
        library._paths.clear()
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(ask, range(8))) == {"one"}


@pytest.mark.skipif(sys.platform != "linux", reason="names there are UTF-8")
def test_a_name_that_is_no_text_hides_no_other_recording(library: Library, folder: Path) -> None:
    odd = synthetic_recording(folder / "odd.zarr", prompt="")
    odd.rename(folder / "odd\udcff.zarr")
    key = {row.path.name: key for key, row in library.rows()}["odd\udcff.zarr"]
    for page in ("runs", "trajectories"):
        open_view(page, runs=key)
    assert "<h1>odd?</h1>" in whole_page([library.run(key)])


def test_what_did_not_change_is_not_sent_again(client: TestClient, folder: Path) -> None:
    first = client.get("/probe/heads?run=one&channel=1")
    again = client.get(
        "/probe/heads?run=one&channel=1", headers={"if-none-match": first.headers["etag"]}
    )
    assert again.status_code == 304 and again.content == b""
    root = folder / "one.zarr" / "zarr.json"
    root.write_text(root.read_text() + " ")
    changed = client.get(
        "/probe/heads?run=one&channel=1", headers={"if-none-match": first.headers["etag"]}
    )
    assert changed.status_code == 200 and changed.headers["etag"] != first.headers["etag"]


def test_only_this_machine_is_served(library: Library) -> None:
    library.rows()
    app = Starlette(routes=ROUTES, middleware=MIDDLEWARE)
    for host, status in (
        ("127.0.0.1:8000", 200),
        ("localhost:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1:8000@evil.example", 403),
        ("[::1]:8000", 200),
        ("127.0.0.1.evil.example", 403),
    ):
        assert (
            TestClient(app, base_url=BASE)
            .get("/probe/run?run=one", headers={"host": host})
            .status_code
            == status
        )
    far = TestClient(app, base_url=BASE, client=("192.0.2.1", 5000))
    assert far.get("/probe/run?run=one").status_code == 403


def test_payloads_are_kept_within_their_room(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.rows()
    made: list[str] = []

    def make(run: Any) -> bytes:
        made.append(run.name)
        return payload(run)

    for _ in range(2):
        for key in ("one", "two"):
            library.payload(key, ("run",), make)
    assert made == ["one", "two"]
    monkeypatch.setattr(libraries, "ROOM", 1)
    for key in ("one", "two", "one"):
        library.payload(key, ("again",), make)
    assert made == ["one", "two", "one", "two", "one"] and len(library._kept) == 1
    with pytest.raises(RecordingNotFound):
        library.run("unknown")


def test_a_payload_that_many_ask_for_at_once_is_made_once(library: Library) -> None:
    library.rows()
    begun, made = threading.Barrier(8), []
    found: list[tuple[bytes, str]] = []

    def make(run: Any) -> bytes:
        made.append(run.name)
        time.sleep(0.2)  # the others ask meanwhile
        return b"content"

    def ask() -> None:
        begun.wait()
        found.append(library.payload("one", ("slow",), make))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["one"] and len(found) == 8 and len(set(found)) == 1

    def fail(run: Any) -> bytes:
        raise ValueError(run.name)

    for _ in range(2):  # one that failed keeps nobody waiting
        with pytest.raises(ValueError, match="one"):
            library.payload("one", ("fails",), fail)
    assert library.payload("one", ("fails",), make)[0] == b"content" and not library._making


def test_a_recording_of_the_same_name_elsewhere_has_an_id_of_its_own(
    library: Library, folder: Path, tmp_path: Path
) -> None:
    library.rows()
    shutil.copytree(folder / "one.zarr", tmp_path / "elsewhere" / "one.zarr")
    assert library.add(tmp_path / "elsewhere" / "one.zarr") not in ("one", "two")
    assert library.add(folder / "one.zarr") == "one"


# --- pages ---------------------------------------------------------------------------------------


def page(**query: Any) -> AppTest:
    """Return the page that opens first, with the bar above it."""
    from probe.dashboard.views import pick

    pick.rows.clear()  # type: ignore[attr-defined]
    app = AppTest.from_file(str(PAGES), default_timeout=30)
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception
    return app


def shown(app: AppTest) -> list[str]:
    """Return the ids that the player on a page was given."""
    (player,) = app.get("bidi_component")
    import json

    return list(json.loads(player.proto.json)["runs"])


def test_replay_opens_the_newest_and_shows_what_is_picked(library: Library) -> None:
    app = page()
    newest = app.multiselect("runs").value
    assert shown(app) == newest and len(newest) == 1
    app.multiselect("runs").set_value(["one"]).run()
    assert shown(app) == ["one"] and not app.exception
    app.multiselect("runs").set_value([]).run()
    assert [info.value for info in app.info] == ["Pick a run above."]
    assert "broken" not in app.multiselect("runs").options


def test_an_unknown_run_in_the_address_falls_to_the_default(library: Library) -> None:
    for hostile in ("<img src=x>", "../one", "x" * 5000):
        assert shown(page(runs=hostile))[0] in ("one", "two", "sample")


def test_a_link_to_a_recording_that_was_begun_just_now_is_followed(
    library: Library, folder: Path
) -> None:
    assert "new" not in page().multiselect("runs").options
    synthetic_recording(folder / "new.zarr", prompt="a red cat", status="running")
    app = AppTest.from_file(str(PAGES), default_timeout=30)
    app.query_params["runs"] = "new"
    app.run()
    assert shown(app) == ["new"]


def test_an_empty_folder_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Library(tmp_path)
    monkeypatch.setattr(empty, "rows", lambda: [])
    configure(empty)
    try:
        app = page()
        assert app.code[0].value == "python -m probe.run experiments/astronaut.yaml"
    finally:
        libraries._library.clear()


def test_the_process_of_the_dashboard_never_imports_torch() -> None:
    views = sorted(file.stem for file in PAGES.parent.glob("views/[a-z]*.py"))
    assert {"anatomy", "compare", "guidance", "record", "replay", "trajectories"} <= set(views)
    code = (
        "import sys; import probe.view, probe.export, probe.figures.page, probe.dashboard.routes;"
        f"from probe.dashboard.views import {', '.join(views)};"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what the command line names -----------------------------------------------------------------


def test_a_named_recording_opens_on_the_page_that_shows_it(folder: Path) -> None:
    with zipfile.ZipFile(FIXTURES / "noising.zip") as packed:
        packed.extractall(folder.parent / "fixture")
    roots = sorted((folder.parent / "fixture").rglob("zarr.json"), key=lambda file: len(file.parts))
    noising = shutil.copytree(roots[0].parent, folder.parent / "noising.zarr")
    library = Library(folder, [str(noising)])
    assert begin(library, []) == "" and begin(library, ["one"]) == "?runs=one"
    assert begin(library, ["one", "two"]) == "compare?runs=one&runs=two"
    assert begin(library, ["noising"]) == "learn?runs=noising"


def test_a_named_recording_that_is_damaged_is_a_row_that_says_why(folder: Path) -> None:
    library = Library(folder.parent, [str(folder / "broken.zarr")])
    (row,) = [row for _, row in library.rows() if row.path.name == "broken.zarr"]
    assert row.attributes is None and row.error is not None


def test_compare_moves(library: Library, folder: Path) -> None:
    synthetic_recording(folder / "three.zarr", prompt="a red cat", seed=4)
    app = open_view("compare", runs=["one", "two"])
    text = [element.value for element in app.text]
    assert any("of its greatest distance" in line for line in text)
    app.multiselect("seeds").set_value(["three"]).run()
    text = [element.value for element in app.text]
    assert any("of the mean distance of 1 other seeds" in line for line in text)
    before = app.dataframe[-1].value["distance"].tolist()
    app.selectbox("of").set_value("denoised").run()
    assert app.dataframe[-1].value["distance"].tolist() != before and not app.exception
