"""Recording from the dashboard: what is asked, how it is run, stopped and ended; who may ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recordings import only
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect
from streamlit.testing.v1 import AppTest
from views import open_view

from probe.dashboard import library as libraries
from probe.dashboard import recorder as recorders
from probe.dashboard.library import Library, configure
from probe.dashboard.recorder import (
    Recorder,
    allow,
    as_yaml,
    bounds,
    chosen,
    command,
    options,
    unknown,
    vocabulary,
)
from probe.dashboard.routes import MIDDLEWARE
from probe.errors import RecordingBusy
from probe.run import parser
from probe.settings.experiment import Experiment, load_experiment, parse_experiment
from probe.terminal import overrides

PAGES = Path(libraries.__file__).with_name("pages.py")
HOSTILE = 'a "cat"; $(touch /tmp/pwned) `x` --resume=latest\n- yaml: [*] # \\ é 猫 {}'
SLEEPS = "import time; print('Loading emojiworld ...', flush=True); time.sleep(60)"
FAILS = "print('error: The disk is full.'); print('       Free some room.'); raise SystemExit(1)"


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it takes too long"
        time.sleep(0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    runs = tmp_path / "runs"
    runs.mkdir()
    configure(Library(runs))
    # As under a server: a shell may have begun the tests with Ctrl-C ignored, for children too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield runs
    signal.signal(signal.SIGINT, before)
    libraries._library.clear()
    for recorder in recorders._recorder:
        recorder.end()
    recorders._recorder.clear()


def recording(folder: Path, code: str = "") -> Recorder:
    """Return the recorder of this process; with `code`, that stands for probe.run."""
    recorder = Recorder(folder, [sys.executable, "-c", code]) if code else Recorder(folder)
    allow(recorder)
    return recorder


def page(**query: str) -> AppTest:
    return open_view("record", **query)


def texts(app: AppTest) -> str:
    return "\n".join([str(one.value) for one in (*app.text, *app.code, *app.info)])


# --- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["An astronaut", "--prompt=x", "-", "none", HOSTILE, "'", "%s"])
def test_what_is_typed_reaches_the_experiment_as_it_is(prompt: str, tmp_path: Path) -> None:
    given = {"prompt": prompt, "negative_prompt": prompt, "guidance_scale": 0.001, "steps": 7}
    asked = load_experiment({**given, "seed": 2**53 - 1, "scheduler": "DPM++2M"})
    read = overrides(parser().parse_args(options(asked, tmp_path)))
    assert read.pop("output") == str(tmp_path)
    assert load_experiment(read) == asked
    assert parse_experiment(as_yaml(asked)) == asked


def test_a_shell_reads_the_command_as_it_was_run(tmp_path: Path) -> None:
    asked = load_experiment({"prompt": HOSTILE})
    code = "import sys; print(sys.argv[1:])"
    line = command(asked, tmp_path).replace("python -m probe.run", f"{sys.executable} -c '{code}'")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == f"{options(asked, tmp_path)}\n"
    assert "--output" not in command(asked, Path("runs"))


def test_only_what_differs_is_said() -> None:
    assert chosen(Experiment()) == {"prompt": Experiment().prompt}
    assert chosen(load_experiment({"steps": 3})) == {"prompt": Experiment().prompt, "steps": 3}


def test_bounds_are_those_of_the_settings() -> None:
    assert bounds("steps") == (1, 1000) and bounds("guidance_scale") == (0, 1000)


def test_words_that_the_model_never_saw_are_found_before_it_is_loaded() -> None:
    assert len(vocabulary("emojiworld")) == 45
    assert unknown("A CAT, on the moon; next-to an owl.") == []
    assert unknown("a cat's dolphin and a dolphin 🐱") == ["s", "dolphin", "🐱"]


# --- the process ---------------------------------------------------------------------------------


def test_one_at_a_time_and_it_stops(folder: Path) -> None:
    recorder = recording(folder, SLEEPS)
    assert recorder.job() is None
    recorder.stop()  # nothing to stop
    recorder.begin(Experiment())
    until(lambda: bool(recorder.job().said))  # type: ignore[union-attr]
    with pytest.raises(RecordingBusy):
        recorder.begin(Experiment())
    recorder.stop()
    until(lambda: recorder.job().ended)  # type: ignore[union-attr]
    assert recorder.job().state == "stopped"  # type: ignore[union-attr]
    recorder.begin(Experiment())
    assert recorder.job().state == "loading"  # type: ignore[union-attr]
    recorder.end()
    assert recorder.job().ended  # type: ignore[union-attr]


def test_one_that_does_not_end_is_killed(folder: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" + SLEEPS
    recorder = recording(folder, deaf)
    recorder.begin(Experiment())
    until(lambda: bool(recorder.job().said))  # type: ignore[union-attr]
    recorder.end(patience=0.3)
    assert recorder.job().ended  # type: ignore[union-attr]


def test_what_it_says_is_kept_within_bounds(folder: Path) -> None:
    recorder = recording(folder, "for i in range(500): print(f'\\x1b[31m{i}\\r', end='\\n\\n')")
    recorder.begin(Experiment())
    until(lambda: recorder.job().ended and "499" in recorder.job().said[-1])  # type: ignore[union-attr]
    assert len(recorder.job().said) == recorders.LINES  # type: ignore[union-attr]


# --- the page ------------------------------------------------------------------------------------


def test_without_the_option_the_page_teaches_it(folder: Path) -> None:
    app = page()
    assert "probe view --allow-record" in texts(app) and "python -m probe.run" in texts(app)
    assert not app.button and not app.text_area


def test_without_torch_the_page_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording(folder)
    monkeypatch.setattr("probe.dashboard.views.record.missing", lambda: "torch")
    app = page()
    assert "pip install 'diffusion-probe[record]'" in texts(app) and not app.button


def test_each_field_changes_what_would_be_run(folder: Path) -> None:
    recording(folder, SLEEPS)
    app = page()
    assert "octopus" in texts(app)
    app.text_area("prompt").set_value("A cat on the moon").run()
    app.text_input("negative").set_value("a dog").run()
    app.number_input("seed").set_value(7).run()
    app.number_input("guidance").set_value(4.5).run()
    app.number_input("steps").set_value(3).run()
    app.selectbox("scheduler").set_value("Euler").run()
    said = texts(app)
    for option in ("--seed=7", "--guidance-scale=4.5", "--steps=3", "--scheduler=Euler"):
        assert option in said
    for row in ('prompt: "A cat on the moon"', 'negative_prompt: "a dog"', "steps: 3"):
        assert row in said
    app.text_area("prompt").set_value("A <b>dolphin</b>").run()
    assert "The bundled model never saw 'b', 'dolphin'." in texts(app)
    assert app.button("begin").disabled and not app.exception
    app.text_area("prompt").set_value("a cat\u202e").run()
    assert "U+202E" in texts(app) and app.button("begin").disabled
    assert not app.markdown or "dolphin" not in str([one.value for one in app.markdown])


def test_an_address_full_of_nonsense_falls_to_the_defaults_and_begins_nothing(folder: Path) -> None:
    recorder = recording(folder, SLEEPS)
    names = ("seed", "guidance", "steps", "scheduler", "begin", "stop")
    picture = "![a](http://evil.invalid/p.png)"
    app = page(prompt=picture, **dict.fromkeys(names, "<img src=x>"))
    assert app.number_input("steps").value == 30 and app.text_area("prompt").value == picture
    assert picture not in str([one.value for one in app.markdown])
    assert recorder.job() is None


def test_a_failure_is_shown_as_it_was_said(folder: Path) -> None:
    recorder = recording(folder, FAILS)
    app = page()
    app.button("begin").click().run()
    until(lambda: recorder.job().ended)  # type: ignore[union-attr]
    app.run()
    assert "error: The disk is full.\n       Free some room." in [code.value for code in app.code]
    assert not app.button("begin").disabled


def test_stop_ends_it(folder: Path) -> None:
    recorder = recording(folder, SLEEPS)
    app = page()
    app.button("begin").click().run()
    assert "Loading the model" in texts(app)
    assert [button.key for button in app.button] == ["stop"], "one at a time"
    until(lambda: bool(recorder.job().said))  # type: ignore[union-attr]
    app.button("stop").click().run()
    until(lambda: recorder.job().ended)  # type: ignore[union-attr]
    app.run()
    assert "Stopped before the recording began." in texts(app)


def test_the_bundled_model_is_recorded_and_shown(folder: Path) -> None:
    recorder = recording(folder)
    app = page()
    app.text_area("prompt").set_value("A cat on the moon").run()
    app.number_input("steps").set_value(2).run()
    app.button("begin").click().run()
    until(lambda: recorder.job().ended, 120)  # type: ignore[union-attr]
    app.run()
    job = recorder.job()
    assert job is not None and job.state == "done", texts(app)
    run = only(folder)
    assert (run.name, run.status, len(run.steps)) == (job.run, "complete", 2)
    assert run.experiment.prompt == "A cat on the moon"
    (player,) = app.get("bidi_component")
    assert json.loads(player.proto.json)["runs"] == [run.name]
    assert f"Recorded {run.name}" in texts(app)


def test_it_is_among_the_pages(folder: Path) -> None:
    app = AppTest.from_file(str(PAGES), default_timeout=60).run()
    assert not app.exception and "record" in app.session_state["pages"]


# --- who may ask, and the end of the server ------------------------------------------------------


async def greet(socket_: WebSocket) -> None:
    await socket_.accept()
    await socket_.send_text("welcome")
    await socket_.close()


@pytest.mark.parametrize(
    ("origin", "welcome"),
    [
        (None, True),
        ("http://127.0.0.1:8000", True),
        ("http://127.0.0.1:9000", False),
        ("http://localhost:8000", False),
        ("https://127.0.0.1:8000", False),
        ("http://evil.example", False),
        ("http://127.0.0.1:8000.evil.example", False),
        ("null", False),
        ("", False),
    ],
)
def test_only_our_own_page_opens_a_websocket(origin: str | None, welcome: bool) -> None:
    app = Starlette(routes=[WebSocketRoute("/_stcore/stream", greet)], middleware=MIDDLEWARE)
    client = TestClient(app, base_url="http://127.0.0.1:8000")
    headers = {"host": "127.0.0.1:8000"} | ({} if origin is None else {"origin": origin})
    if welcome:
        with client.websocket_connect("/_stcore/stream", headers=headers) as opened:
            assert opened.receive_text() == "welcome"
    else:
        with (
            pytest.raises(WebSocketDisconnect),
            client.websocket_connect("/_stcore/stream", headers=headers),
        ):
            pass


def handshake(port: int, origin: str) -> str:
    """Return the first line that the real server answers to a websocket's handshake."""
    rows = [
        "GET /_stcore/stream HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        f"Origin: {origin}",
    ]
    with socket.create_connection(("127.0.0.1", port), 20) as door:
        door.sendall("\r\n".join([*rows, "", ""]).encode())
        return door.recv(200).decode("latin-1").splitlines()[0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.slow  # it waits for a server and for what that waits for
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_server_ends_what_it_records(end: int, tmp_path: Path) -> None:
    """Also by SIGTERM, and refuses a websocket from elsewhere until then."""
    starts = (
        "import sys; from probe.dashboard import recorder; from probe import view, stopping;"
        "from probe.settings.experiment import Experiment; from probe.terminal import guarded;"
        f"old = recorder.allow; code = {SLEEPS!r}\n"
        "def allow(made):\n"
        "    made._program = (sys.executable, '-c', code); old(made); made.begin(Experiment())\n"
        "    print(made._child.pid, flush=True)\n"
        "recorder.allow = allow; stopping.begin(); guarded(view.main)"
    )
    arguments = ["--allow-record", "--no-browser", "--runs", str(tmp_path)]
    environment: dict[str, Any] = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", starts, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as server:
        assert server.stdout is not None
        child = int(server.stdout.readline())
        address = server.stdout.readline().removeprefix("Look at http://127.0.0.1:")
        port = int(address.split("/")[0])
        assert " 101 " in handshake(port, f"http://127.0.0.1:{port}")
        assert " 403 " in handshake(port, "http://evil.example")
        os.kill(child, 0)
        server.send_signal(end)
        assert server.wait(30) in (130, -signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
