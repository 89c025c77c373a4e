"""probe web [FOLDER]: serve the page that draws by itself, on this machine alone.

probe web                        # what `python3 tasks.py web` built in this checkout
probe web site --port 8000       # a folder that was built elsewhere

The page computes in the browser. The server sends it files, and the headers by which browsers let
it use several threads.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import threading
import webbrowser
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from probe.errors import ExperimentError
from probe.output import say
from probe.terminal import Parser, described, guarded

BUILT = Path(__file__).resolve().parent.parent / "build" / "web" / "site"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next: threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def parser(prog: str = "probe web") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "probe web", prog))
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="the folder site that was built [of this checkout]",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="the port on this machine; 0: one that is free"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and open nothing"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class Pages(SimpleHTTPRequestHandler):
    """Answers with files of one folder, to those who ask this machine by its own address."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".html": "text/html; charset=utf-8",
        ".gz": "application/gzip",
    }

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        host, _, _ = self.headers.get("Host", "").partition(":")
        if host in ("127.0.0.1", "localhost"):
            return True
        self.send_error(HTTPStatus.FORBIDDEN)  # another name that leads here: DNS rebinding
        return False

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: object) -> None:  # noqa: ARG002
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


def site(folder: str | None) -> Path:
    """Return the folder of the page. Raise ExperimentError if it was not built."""
    place = BUILT if folder is None else Path(folder).expanduser()
    if not (place / "index.html").is_file():
        remedy = "Build it in a checkout: python3 tasks.py web"
        if folder is not None:
            remedy += ". Then name its folder site."
        raise ExperimentError(f"The page is not in {place}.", remedy)
    return place


def server(place: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a folder on loopback. Raise ExperimentError if the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Pages, directory=str(place)))
    except (OSError, OverflowError) as error:
        raise ExperimentError(
            f"Port {port} cannot be used ({error}).", "Leave --port out for a free one."
        ) from error


def main(arguments: list[str], prog: str = "probe web") -> int:
    """Serve the page until Ctrl-C. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    with server(site(options.folder), options.port) as pages:
        address = f"http://127.0.0.1:{pages.server_address[1]}/"
        say(f"Look at {address}", "Ctrl-C ends it.")
        if not options.no_browser:
            threading.Timer(0.3, webbrowser.open, [address]).start()
        pages.serve_forever()
    return 0


if __name__ == "__main__":
    guarded(main)
