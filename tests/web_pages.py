"""The page of web/ for tests in a browser: built, served, and waited for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsers import MARKS

from probe.web import server, site

ROOT = Path(__file__).resolve().parent.parent
NODE, NPM = shutil.which("node"), shutil.which("npm")
FEW = "seed=5&guidance=3&num_steps=5&scheduler=DDIM"

# A draw computes the model in the browser: seconds on two free cores.
WEB = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    *MARKS,
    pytest.mark.skipif(not (NODE and NPM), reason="needs node and npm: apt install nodejs npm"),
]


def build(folder: Path) -> None:
    """Build the page into a folder; skip the test where npm has no registry."""
    command = [sys.executable, str(ROOT / "tasks.py"), "web", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "npm could not fetch" in done.stderr:
        pytest.skip("needs a registry of npm: cd web && npm ci --ignore-scripts")
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a built page as `probe web` does, and give its address."""
    with server(site(str(folder / "site"))) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_address[1]}/"
        pages.shutdown()
        thread.join()


def until(browser: Any, code: str, seconds: float = 300) -> Any:
    """Wait until JavaScript gives something true, and return it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda one: one.execute_script(f"return {code}"))


def opened(browser: Any, address: str) -> Any:
    """Open the page, wait for its first picture and return the player."""
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(address)
    return drawn(browser, 1)


def drawn(browser: Any, number: int) -> Any:
    """Wait until so many pictures are on the shelf, and return the player."""
    until(browser, f"document.querySelectorAll('.card').length >= {number}")
    return browser.execute_script("return document.querySelector('.probe')")
