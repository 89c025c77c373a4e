"""`streamlit run dashboard/app.py` serves what `probe view` does, to this machine alone."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe.figures.payload import unpack
from probe.view import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "dashboard" / "app.py"
STARTS = 60  # seconds, on a busy machine


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    """Return status and body of what a browser would ask, under any name of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "streamlit", "run", str(APP), "--server.port", str(port)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    log = elsewhere / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(elsewhere)}
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=elsewhere, env=environment, stdout=output, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            until = time.monotonic() + STARTS
            while time.monotonic() < until and server.poll() is None:
                try:
                    get(port, "/_stcore/health")
                    break
                except OSError:
                    time.sleep(0.2)
            assert server.poll() is None, log.read_text()
            yield port
            server.send_signal(signal.SIGINT)
            assert server.wait(10) in (0, 1), log.read_text()  # 1: as Streamlit ends by Ctrl-C
        finally:
            server.kill()
    assert "Traceback" not in log.read_text()
    assert "0.0.0.0" not in log.read_text() and "External URL" not in log.read_text()


def test_its_options_are_those_of_probe_view() -> None:
    text = (APP.parent / ".streamlit" / "config.toml").read_text(encoding="utf-8")
    options = {
        f"{section}.{name}": value
        for section, values in tomllib.loads(text).items()
        for name, value in values.items()
    }
    assert options == OPTIONS


def test_it_serves_the_pages_and_the_routes(port: int) -> None:
    status, page = get(port, "/")
    assert status == 200 and b"<title>" in page
    status, content = get(port, "/probe/run?run=sample")
    assert status == 200 and unpack(content)[0]["meta"]["prompt"] == "An astronaut scuba diving"
    assert get(port, "/probe/run?run=../sample")[0] == 404


def test_only_this_machine_is_served(port: int) -> None:
    for path in ("/", "/probe/run?run=sample", "/_stcore/health"):
        assert get(port, path, host="elsewhere.invalid")[0] == 403
    addresses = {
        entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    }
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as door:
            assert door.connect_ex((str(address), port)) != 0, "it listens on this address too"
