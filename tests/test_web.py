"""`probe web` serves a folder to this machine alone, or says how to build it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from probe import web
from probe.errors import ExperimentError


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("web")
    (folder / "secret.txt").write_text("outside")
    site = folder / "site"
    (site / "files").mkdir(parents=True)
    (site / "index.html").write_text("<p>the page</p>")
    (site / "page.js").write_text("export {};")
    (site / "files" / "unet.gz").write_bytes(b"\x1f\x8b")
    with web.server(web.site(str(site))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_page_is_served_so_that_it_may_use_threads(port: int) -> None:
    answer, content = get(port, "/?prompt=a+fox")
    assert (answer.status, content) == (200, b"<p>the page</p>")
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert get(port, "/page.js")[0].headers["Content-Type"] == "text/javascript"
    packed, content = get(port, "/files/unet.gz")
    assert (packed.headers["Content-Type"], content) == ("application/gzip", b"\x1f\x8b")
    assert packed.headers["Content-Encoding"] is None, "the page unpacks it"


def test_nobody_else_is_answered_and_nothing_else_is_told(port: int) -> None:
    assert get(port, "/", host="evil.example")[0].status == 403
    for path in ("/files/", "/../secret.txt", "/%2e%2e/secret.txt", "/none.html"):
        answer, content = get(port, path)
        assert answer.status == 404 and b"outside" not in content and b"unet" not in content


def test_a_page_that_was_not_built_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExperimentError, match=r"python3 tasks\.py web\. Then name its folder"):
        web.site(str(tmp_path))
    monkeypatch.setattr(web, "BUILT", tmp_path / "build")
    with pytest.raises(ExperimentError, match=r"not in .*build.*\n.*python3 tasks\.py web$"):
        web.site(None)


def test_a_port_that_is_taken_is_named(port: int, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="cannot be used"):
        web.server(tmp_path, port)
