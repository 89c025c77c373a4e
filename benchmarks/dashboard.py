"""How fast recordings are to look at: a scrub (P10), a changed word (P11), a payload (P12).

    python -m benchmarks.dashboard                 # the sample, and two of Stable Diffusion's size
    python -m benchmarks.dashboard --no-browser    # without what needs chromium and selenium

First paint and many sessions at once are measured too. `large` is filled with random probabilities
(see `benchmarks.store`), which hardly compress. `real` is drawn by the bundled model at 512 x 512:
trained attention on a grid of 64 x 64, 50 steps, 16 words. It takes a minute to record. Times in
the browser are JavaScript's own, headless; a frame is painted by software here.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import machine
from benchmarks.store import LONG, attributes, measured, one_step, planned
from probe.figures.bundle import payload
from probe.figures.channels import layers_and_heads
from probe.figures.page import page
from probe.reading.recording import Run, open_run
from probe.running.recorder import record
from probe.writing.store import RunWriter

REAL = "A fox next to a penguin and an owl in the snow forest above a car"  # 16 words
SCRUB = """
const done = arguments[0];
const box = document.querySelector('.probe') ?? [...document.querySelectorAll('*')]
  .map(e => e.shadowRoot).map(r => r && r.querySelector('.probe')).find(Boolean);
const slider = box.querySelector('.time input');
const times = [];
function one(i) {
  slider.value = String(i % Number(slider.max));
  const began = performance.now();
  slider.dispatchEvent(new Event('input'));
  times.push(performance.now() - began);
  if (i < 200) requestAnimationFrame(() => one(i + 1)); else done(times);
}
one(0);
"""


CLICKS = """
const done = arguments[1];
const box = document.querySelector('.probe') ?? [...document.querySelectorAll('*')]
  .map(e => e.shadowRoot).map(r => r && r.querySelector('.probe')).find(Boolean);
const chips = [...box.querySelectorAll('.chip.word[aria-pressed="false"]')].reverse();
const heads = box.querySelector('.heads canvas');
const turn = () => new Promise((on) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = on;
  port2.postMessage(0);
});
const rest = arguments[0];
(async () => {
  const times = [];
  const words = new Set();
  for (const chip of chips) {
    const word = chip.textContent;
    if (words.has(word)) continue; // the label does not tell the second one from the first
    words.add(word);
    const began = performance.now();
    chip.click();
    while (!heads.getAttribute('aria-label').includes(`“${word}”`)) await turn();
    times.push(performance.now() - began);
    if (rest) await new Promise((on) => setTimeout(on, 100)); // nobody clicks faster
  }
  done(times);
})();
"""


def quantiles(times: list[float]) -> str:
    ordered = sorted(times)
    return (
        f"{statistics.median(ordered):6.2f} ms median, "
        f"{ordered[int(len(ordered) * 0.95)]:6.2f} p95, {ordered[-1]:6.2f} most"
    )


def large(folder: Path) -> Path:
    """Write a recording of Stable Diffusion v1's size: 51 calls, 16 layers, 8 heads."""
    plan, path = planned("sd1", 50, LONG), folder / "large.zarr"
    values = one_step(plan)
    size = sum(value.nbytes for value in values.values())
    with RunWriter(path, plan.arrays, attributes(plan), "none") as writer:
        for step in range(plan.calls):
            writer.write_step(step, lambda: values, size)
        writer.flush()
        rng = np.random.default_rng(0)
        for one in plan.arrays:  # what a run that ended has: the mean maps, and a preview
            if one.path.endswith("/overview"):
                writer.write(one.path, rng.random(one.shape, np.float32) / one.shape[0])
            elif one.path.startswith("preview/"):
                writer.write(one.path, rng.random(one.shape, np.float32) / 4)
    return path


def drawn(folder: Path) -> Path:
    """Record the bundled model on latents as large as Stable Diffusion's. Return the path."""
    run = record(
        {"prompt": REAL, "steps": 50, "seed": 5, "guidance_scale": 3},
        name="real",
        height=512,
        width=512,
        output=str(folder),
        progress=False,
    )
    return run.path


def payloads(run: Run) -> None:
    for name, make in (
        ("payload", lambda: payload(run)),
        ("one word, layers x heads", lambda: layers_and_heads(run, 1)),
    ):
        make()
        times = [measured(make) for _ in range(5)]
        cpu = 1000 * statistics.median(time[1] for time in times)
        print(f"P12 {run.name[:12]:12} {name:26} {cpu:7.0f} ms of CPU {len(make()) / 1e3:8.0f} kB")


@contextmanager
def serving(runs: Path, *names: str) -> Iterator[str]:
    """Serve a folder of recordings, and yield the address."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "probe.view",
        *names,
        "--runs",
        str(runs),
        "--no-browser",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        address = child.stdout.readline().removeprefix("Look at ").split("?")[0].rstrip("/\n")
        try:
            yield address
        finally:
            child.send_signal(2)
            child.wait(10)


def fetched(address: str) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        answer.read()
    return 1000 * (time.perf_counter() - began)


def moves(address: str, run: str) -> None:
    words = [f"{address}/probe/heads?run={run}&channel={index}" for index in range(8)]
    first = [fetched(word) for word in words]
    again = [fetched(word) for _ in range(6) for word in words]
    print(f"P11 a changed word, made for the first time: {quantiles(first)}")
    print(f"P11 a changed word, again:                   {quantiles(again)}")
    times: list[float] = []

    def session(number: int) -> None:
        rng = np.random.default_rng(number)
        times.extend(fetched(words[rng.integers(8)]) for _ in range(50))

    threads = [threading.Thread(target=session, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"20 sessions x 50 moves at once:              {quantiles(times)}")


def browser() -> Any:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    made = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    made.set_window_size(1280, 1100)
    return made


def painted(driver: Any, address: str) -> float:
    """Return how many seconds pass until the player of a page has drawn."""
    began = time.perf_counter()
    driver.get(address)
    ready = (
        "return [document, ...[...document.querySelectorAll('*')].map(e => e.shadowRoot)]"
        ".some(r => r && r.querySelector('.probe')?.dataset.step !== undefined)"
    )
    while not driver.execute_script(ready):
        time.sleep(0.02)
    return time.perf_counter() - began


def clicks(runs: Path, name: str) -> None:
    """Print how long a click on a word takes, on a server that has made nothing yet."""
    for wait in (0, 2):
        with serving(runs, "sample") as address:
            driver = browser()
            driver.set_window_size(1280, 1700)  # layers and heads, for which the server is asked
            painted(driver, f"{address}/?runs=sample")  # the pages are warm, the run is not
            painted(driver, f"{address}/?runs={name}")
            time.sleep(wait)
            driver.set_script_timeout(60)
            times = driver.execute_async_script(CLICKS, wait)
            when = f"{wait} s after the first paint" if wait else "at once"
            print(f"P11 a click on a word of {name}, {when}: {times[0]:.0f} ms, then all others")
            print(f"    one after the other: {quantiles(times[1:])}")
            driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-browser", action="store_true", help="leave the browser out")
    asked = parser.parse_args()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, real = large(folder), drawn(folder)
        for run in (open_run("sample"), Run(path), Run(real)):
            payloads(run)
        text = page([open_run("sample")])
        print(f"the page of the sample: {len(text.encode()) / 1e3:.0f} kB (goal 450)")
        (folder / "page.html").write_text(text, encoding="utf-8")
        with serving(folder, "sample") as address:
            moves(address, "large")
            if asked.no_browser:
                return
            driver = browser()
            for name in ("large", "sample"):
                times = [painted(driver, f"{address}/?runs={name}") for _ in range(4)]
                later = statistics.median(times[1:])
                print(
                    f"first paint of {name:6}: {times[0]:.2f} s (goal 2), again {later:.2f} s (0.6)"
                )
                time.sleep(1)
                found = driver.execute_async_script(SCRUB)
                print(f"P10 a scrub of {name:6}: {quantiles(found)} (goal 1)")
            driver.quit()
        for name in ("large", real.stem):
            clicks(folder, name)


if __name__ == "__main__":
    main()
