"""probe view [RUN ...]: look at recordings in a browser, on this machine alone.

probe view                       # the recordings in the folder runs
probe view sample                # the recording that comes along: no model, no torch
probe view --allow-record        # recordings can be made there too
probe view A B --no-browser      # begin with these; print the address and open nothing
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import importlib
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from probe.errors import ExperimentError, UserError
from probe.output import say
from probe.terminal import Parser, add_runs, described, guarded

if TYPE_CHECKING:
    from probe.dashboard.library import Library

OPTIONS = {
    "server.address": "127.0.0.1",
    "server.headless": True,
    "server.fileWatcherType": "none",
    "server.enableStaticServing": False,
    "browser.gatherUsageStats": False,
    "browser.serverAddress": "127.0.0.1",
    "client.showErrorDetails": "none",
    "client.showErrorLinks": False,
    "client.toolbarMode": "minimal",
    "runner.magicEnabled": False,
    "runner.postScriptGC": False,  # with it, each change takes three times as long
}


def parser(prog: str = "probe view") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "probe view", prog))
    parser.add_argument(
        "names",
        nargs="*",
        metavar="RUN",
        help="recordings to begin with: paths, beginnings of names, latest or sample",
    )
    add_runs(parser)
    parser.add_argument(
        "--port", type=int, default=0, help="the port on this machine; 0: one that is free"
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address and open nothing"
    )
    parser.add_argument(
        "--allow-record",
        action="store_true",
        help="let the page Record write recordings into the folder, one at a time",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def listening(port: int) -> socket.socket:
    """Return a socket on this machine's own address. Raise ExperimentError if the port is taken."""
    door = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # there it would let two servers share a port
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        door.bind(("127.0.0.1", port))
        door.listen(128)  # a browser that comes before the server is up waits
    except (OSError, OverflowError) as error:
        door.close()
        raise ExperimentError(
            f"Port {port} cannot be used ({error}).", "Leave --port out for a free one."
        ) from error
    return door


def begin(library: Library, names: list[str]) -> str:
    """Return the page that shows the recordings that were named, with its query."""
    if not names:
        return ""
    noised = library.run(names[0]).kind == "noising"
    page = "learn" if noised else "compare" if len(names) > 1 else ""
    return f"{page}?{urlencode({'runs': names}, doseq=True)}"


def main(arguments: list[str], prog: str = "probe view") -> int:
    """Serve the pages until Ctrl-C. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    try:
        import streamlit as st
        import uvicorn
        from streamlit import config
    except ImportError as error:
        raise UserError(
            "The dashboard is not installed.", "pip install 'diffusion-probe[dashboard]'"
        ) from error
    from probe.dashboard.library import Library, configure
    from probe.dashboard.recorder import Recorder, allow, ending
    from probe.dashboard.routes import MIDDLEWARE, ROUTES
    from probe.figures.bundle import payload

    library = Library(options.runs, options.names)
    configure(library)
    first = [library.add(path) for path in library.named]
    door = listening(options.port)
    port = door.getsockname()[1]
    for name, value in {**OPTIONS, "server.port": port, "browser.serverPort": port}.items():
        config.set_option(name, value)
    pages = Path(__file__).with_name("dashboard") / "pages.py"
    if options.allow_record:
        allow(Recorder(options.runs))
    app = st.App(pages, lifespan=ending, routes=ROUTES, middleware=MIDDLEWARE)
    settings = uvicorn.Config(
        app,
        ws="websockets-sansio",
        ws_max_size=64 * 2**20,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    address = f"http://127.0.0.1:{port}/{begin(library, first)}"
    for key in first[:1]:  # what is seen first is ready before the browser asks
        library.payload(key, ("run", 0), payload)
    say(f"Look at {address}", "Ctrl-C ends it.")
    if not options.no_browser:
        threading.Timer(0.3, webbrowser.open, [address]).start()
    later = threading.Timer(2, importlib.import_module, ["plotly.graph_objects"])
    later.daemon = True  # the next page's figures are ready sooner, the first page is not later
    later.start()
    server = uvicorn.Server(settings)
    server.run(sockets=[door])
    return 130 if server.started else 1  # only Ctrl-C ends it, also where a shell has it ignored


if __name__ == "__main__":
    guarded(main)
