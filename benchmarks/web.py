"""How fast the page draws that needs no install: opening, a step, a decode, memory, bytes.

    python -m benchmarks.web              # builds the page; needs node, npm, chromium and selenium
    python -m benchmarks.web --rounds 5 --page build/web

Times are JavaScript's own, in headless Chromium, from the beginning of the navigation. Every
opening has a browser of its own, so nothing is kept from an earlier one. The folder is served by
`probe web`, which lets the page use several threads; the file is read from the disk, where a
browser gives it one. Steps and decodes are timed in the page's own worker. Memory is the greatest
that the page's process ever held (VmHWM).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.models import machine
from probe.web import server, site

ROOT = Path(__file__).resolve().parent.parent
QUERY = "?prompt=a+fox+on+the+moon&seed=5&guidance=3&num_steps=30&scheduler=DDIM"
FLAGS = (
    "--headless=new --no-sandbox --disable-dev-shm-usage --disable-gpu --no-first-run "
    "--disable-background-networking --disable-component-update"
).split()

# Notes when the page says that the model is open, and that a picture is drawn.
WATCH = """
self.noted = {};
const watch = setInterval(() => {
  const { ready, seconds } = document.body?.dataset ?? {};
  if (ready && !noted.ready) noted.ready = performance.now() / 1000;
  if (!seconds) return;
  noted.picture = performance.now() / 1000;
  clearInterval(watch);
}, 10);
"""

# Starts a worker of the page and times what it answers.
TIMED = """
const [threads, steps, done] = arguments;
const listed = JSON.parse(document.getElementById("files").textContent);
const files = Object.entries(listed).map(([name, { address }]) =>
  [name, new URL(address, location.href).href]);
const worker = new Worker(new URL("worker.js", location.href), { type: "module" });
const times = { guided: [], alone: [], decode: [] };
let last = 0, latents = null, run = "warm";
const draw = (name, guidanceScale, count) => {
  run = name;
  worker.postMessage({ kind: "draw", run, prompt: "a fox on the moon", seed: 5, guidanceScale,
                       steps: count, scheduler: "DDIM", decodeEvery: 0 });
};
const decode = () => {
  last = performance.now();
  worker.postMessage({ kind: "decode", run, index: 0, latents });
};
worker.onmessage = ({ data }) => {
  const now = performance.now();
  if (data.kind === "error") return done({ error: data.message });
  if (data.kind === "ready") draw("warm", 3, 5);
  if (data.kind === "begun") last = 0;
  if (data.kind === "step") {
    if (last && times[run]) times[run].push(now - last); // the first holds the text encoder too
    [last, latents] = [now, data.denoised];
  }
  if (data.kind === "done" && run === "warm") draw("guided", 3, steps);
  else if (data.kind === "done" && run === "guided") draw("alone", 1, steps);
  else if (data.kind === "done") decode();
  if (data.kind === "picture") {
    times.decode.push(now - last);
    if (times.decode.length < 5) return decode();
    worker.terminate();
    done(times);
  }
};
worker.postMessage({ kind: "load", ort: new URL("ort.mjs", location.href).href, threads,
                     files: Object.fromEntries(files) });
"""


def built(folder: Path) -> None:
    """Build the page into a folder. Raise SystemExit with what the build said."""
    command = [sys.executable, str(ROOT / "tasks.py"), "web", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


@contextmanager
def browsing() -> Iterator[Any]:
    """Yield a browser of its own, which is asked and gone afterwards."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    browser.set_script_timeout(600)
    try:
        yield browser
    finally:
        browser.quit()


def most_memory(browser: Any) -> float:
    """Return the greatest memory, in MB, that a page's process of this browser has held."""
    import psutil

    tree = psutil.Process(browser.service.process.pid).children(recursive=True)
    held = [0]
    for process in tree:
        if "--type=renderer" in process.cmdline():
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            held += [int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line]
    return max(held) * 1024 / 1e6


def opened(address: str) -> dict[str, float]:
    """Open the page in a new browser. Return when it was ready and had drawn, and its memory."""
    from selenium.webdriver.support.ui import WebDriverWait

    with browsing() as browser:
        what = {"source": WATCH}
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", what)
        browser.get(address)
        noted = WebDriverWait(browser, 600).until(
            lambda one: one.execute_script("return self.noted.picture && self.noted")
        )
        return {**noted, "memory": most_memory(browser)}


def timed(address: str, threads: int, steps: int) -> dict[str, list[float]]:
    """Return milliseconds of guided steps, of steps without guidance, and of decodes."""
    with browsing() as browser:
        browser.get(f"{address}NOTICES.md")  # of the same host, and without a page's own work
        page = f"{address}index.html"
        browser.execute_async_script(
            "const [page, done] = arguments; fetch(page).then((r) => r.text()).then((text) => {"
            "const files = new DOMParser().parseFromString(text, 'text/html')"
            ".getElementById('files'); document.body.append(files); done(); })",
            page,
        )
        found: dict[str, Any] = browser.execute_async_script(TIMED, threads, steps)
    if "error" in found:
        raise SystemExit(f"The page's worker said: {found['error']}")
    return found


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    with server(site(str(folder))) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_address[1]}/"
        pages.shutdown()
        thread.join()


def line(what: str, values: list[float], unit: str, goal: float | None = None) -> str:
    """Return a line of the table: median, least and most, and what was hoped for."""
    middle = statistics.median(values)
    digits = 2 if unit == "s" else 0
    least, most = (f"{one:.{digits}f}" for one in (min(values), max(values)))
    aim = "" if goal is None else f"  goal {goal:g}: {'met' if middle <= goal else 'missed'}"
    return f"{what:44} {middle:8.{digits}f} {unit:3} ({least} to {most}){aim}"


def sizes(page: Path) -> Iterator[str]:
    import gzip

    files = [path for path in (page / "site").rglob("*") if path.is_file()]
    sent = sum(path.stat().st_size for path in files) / 1e6
    raw = sum(
        len(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path.stat().st_size
        for path in files
    )
    largest = max(files, key=lambda path: path.stat().st_size)
    yield line("the folder, as it is sent", [sent], "MB")
    yield line("the folder, unpacked", [raw / 1e6], "MB")
    size = largest.stat().st_size / 1e6
    yield line(f"its largest file, {largest.name}"[:44], [size], "MB", 30)
    yield line("the one file", [(page / "diffusion.html").stat().st_size / 2**20], "MiB", 36)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="openings of each product [3]")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed [30]")
    parser.add_argument("--page", type=Path, help="a page that was built [builds one]")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as made:
        page = options.page or Path(made)
        if options.page is None:
            built(page)
        for row in sizes(page):
            print(row)
        with serving(page / "site") as address:
            ways = {
                "folder": address + QUERY,
                "file": (page / "diffusion.html").resolve().as_uri() + QUERY,
            }
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for number in range(options.rounds):
                for name in ways if number % 2 == 0 else reversed(ways):
                    rounds[name].append(opened(ways[name]))
            for name, found in rounds.items():
                for what, key, goal in (
                    ("model open", "ready", None),
                    ("first picture", "picture", 8),
                ):
                    print(line(f"{name}: opening to {what}", [r[key] for r in found], "s", goal))
                print(line(f"{name}: most memory", [r["memory"] for r in found], "MB", 600))
            for threads in (1, 2):
                found_times = timed(address, threads, options.steps)
                for what, key, goal in (
                    ("a guided step", "guided", 100),
                    ("a step without guidance", "alone", None),
                    ("a decode", "decode", None),
                ):
                    times = found_times[key]
                    print(line(f"{threads} thread(s): {what}", times, "ms", goal))


if __name__ == "__main__":
    main()
