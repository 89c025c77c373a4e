"""A real browser for tests: how it is started, looked at and asked."""

from __future__ import annotations

import json
import re
import shutil
from importlib import resources, util
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [
    *(["apt install chromium chromium-driver"] if not (CHROMIUM and DRIVER) else []),
    *(
        ["pip install selenium axe-core-python"]
        if not (util.find_spec("selenium") and util.find_spec("axe_core_python"))
        else []
    ),
]
# What a module of tests carries that drives a browser: `pytest -m browser` runs them all.
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"needs a browser: {' and '.join(MISSING)}"),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --force-device-scale-factor=1"
).split()
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
INK = (
    "const c = arguments[0]; const d = c.getContext('2d').getImageData(0, 0, c.width, "
    "c.height).data;"
    "let h = 0; for (let i = 0; i < d.length; i += 53) h = (h * 31 + d[i]) >>> 0; return h"
)


def started(graphics: tuple[str, ...] = ("--disable-gpu",)) -> Any:
    """Start a browser that finds no machine but this one. `graphics` are flags of its GPU."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS, NOWHERE, *graphics]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return webdriver.Chrome(options, Service(DRIVER))


def look(browser: Any, width: int = 1280, height: int = 1200, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def asked(browser: Any) -> set[str]:
    """Return the hosts that a page asked, the empty one for files."""
    rows = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    urls = [
        row["params"]["request"]["url"]
        for row in rows
        if row["method"] == "Network.requestWillBeSent"
    ]
    urls += [row["params"]["url"] for row in rows if row["method"] == "Network.webSocketCreated"]
    return {
        urlsplit(url).hostname or "" for url in urls if urlsplit(url).scheme not in ("data", "blob")
    }


def complaints(browser: Any) -> list[str]:
    """Return the errors of a page's console, less two of Streamlit's own on every page but the
    first.
    """
    own = re.compile(r"/\w+/_stcore/(health|host-config)")
    rows = [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]
    return [row for row in rows if not own.search(row)]


def waiting(browser: Any, seconds: float, *ignored: type[Exception]) -> Any:
    """Return what waits until a condition holds; it looks ten times a second."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, 0.1, ignored or None)


def ink(browser: Any, player: Any, which: str) -> int:
    """Return a number that changes with the pixels of a canvas."""
    canvas = browser.execute_script(
        "return arguments[0].querySelector(arguments[1])", player, which
    )
    return int(browser.execute_script(INK, canvas))


def serious(browser: Any) -> list[Any]:
    """Return what axe-core finds that is serious or worse."""
    browser.execute_script(
        resources.files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    )
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run(document, {resultTypes: ['violations']}).then(r => "
        "done("
        "r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.target.join(' '))])))"
    )
    return [one for one in found if one[0] in ("serious", "critical")]


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()
