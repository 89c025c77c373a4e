"""The player and the dashboard in a real browser: what is drawn, by keys and after a reload.

No other machine is asked for anything.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browsers import MARKS, asked, complaints, ink, look, press, serious, waiting
from recordings import cut, finish, grow, growing, replace
from studies import change_cell, change_study, write_study

import probe
from probe.dashboard.library import Library
from probe.export import main as export
from probe.figures.bundle import facts
from probe.reading.recording import Run
from probe.reading.sample import unpacked
from probe.reading.study import open_study
from probe.testing import synthetic
from probe.testing.synthetic import synthetic_recording
from probe.text import UNCLEAN

pytestmark = MARKS
HOSTILE = (
    '<img src=x onerror="window.pwned=1">![a](http://evil.invalid/p.png) :red[red] $x^2$ **b** '
    '<a href="http://evil.invalid">L</a> </script><script>window.pwned=2</script>'
)
BOX = (
    "(document.querySelector('.probe') ?? [...document.querySelectorAll('*')].map(e => "
    "e.shadowRoot)"
    ".map(r => r && r.querySelector('.probe')).find(Boolean))"
)


def opened(browser: Any, address: str, framed: bool = False) -> Any:
    """Open a page and return the player in it, or in its first frame, once it has drawn."""
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(address)
    if framed:
        browser.switch_to.frame(0)
    return waiting(browser, 40).until(
        lambda driver: driver.execute_script(
            f"const b = {BOX}; return b && b.dataset.step !== undefined ? b : null"
        )
    )


# --- an exported page ----------------------------------------------------------------------------


def test_an_exported_page_plays_from_a_disk(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    assert export(["sample", "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size <= 450_000
    address = (tmp_path / "page.html").as_uri()
    for width, dark in ((1280, False), (320, True), (1920, False)):
        look(browser, width, dark=dark)
        player = opened(browser, address)
        assert player.get_attribute("data-step") == "6"
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert serious(browser) == []
        before = [
            ink(browser, player, f".{part} canvas") for part in ("latents", "denoised", "maps")
        ]
        browser.execute_script("arguments[0].focus()", player)
        press(browser, Keys.ARROW_RIGHT)
        assert player.get_attribute("data-step") == "7"
        after = [
            ink(browser, player, f".{part} canvas") for part in ("latents", "denoised", "maps")
        ]
        assert all(one != other for one, other in zip(before, after, strict=True))
        press(browser, Keys.HOME, " ")
        time.sleep(1)
        assert int(player.get_attribute("data-step")) > 2, "it plays"
        press(browser, " ")
        assert asked(browser) == {""} and complaints(browser) == []


def test_a_word_a_head_and_a_place(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    export(["sample", "--html", str(tmp_path / "page.html")])
    look(browser)
    player = opened(browser, (tmp_path / "page.html").as_uri() + "?step=3&word=2")
    pressed = (
        "return [...arguments[0].querySelectorAll('.chip[aria-pressed=true]')].map(c => "
        "c.textContent)"
    )
    assert player.get_attribute("data-step") == "3"
    assert browser.execute_script(pressed, player) == ["scuba"]
    before = ink(browser, player, "figure.maps canvas")
    browser.execute_script("arguments[0].querySelectorAll('.chip')[1].click()", player)
    assert ink(browser, player, "figure.maps canvas") != before
    heads = browser.execute_script("return arguments[0].querySelector('.heads canvas')", player)
    together = ink(browser, player, "figure.maps canvas")
    browser.execute_script("arguments[0].focus()", heads)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert ink(browser, player, "figure.maps canvas") != together, "one head alone"
    canvas = browser.execute_script(
        "return arguments[0].querySelector('figure.maps canvas')", player
    )
    browser.execute_script("arguments[0].focus()", canvas)
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert "Row 1, column 1" in player.find_element("css selector", ".tools .tip").text
    player.find_element("css selector", "summary").click()
    code = player.find_element("css selector", ".code")
    assert "over=()).sel(step=3).isel(word=1)" in code.text and "head=" in code.text
    player.find_element("css selector", ".heads > button").click()
    assert "run.word_maps().sel(step=3).isel(word=1)" in code.text
    assert len(player.find_elements("css selector", ".table tr")) == 16
    time.sleep(0.6)
    assert "step=3" in browser.current_url and "word=1" in browser.current_url


def test_hostile_text_is_shown_as_it_is(browser: Any, tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "hostile.zarr", prompt=HOSTILE)
    export([str(path), "--html", str(tmp_path / "page.html")])
    opened(browser, (tmp_path / "page.html").as_uri())
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.execute_script(
        "return [window.pwned ?? 0, document.images.length, document.links.length]"
    ) == [0, 0, 0]
    assert asked(browser) == {""}


def test_a_player_in_a_notebook_plays_in_its_frame(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    cell = probe.open_run("sample").player()._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><p>Out[1]:</p>{cell}")
    look(browser)
    player = opened(browser, (tmp_path / "notebook.html").as_uri(), framed=True)
    before = ink(browser, player, ".denoised canvas")
    browser.execute_script("arguments[0].focus()", player)
    press(browser, Keys.ARROW_RIGHT)
    assert player.get_attribute("data-step") == "7"
    assert ink(browser, player, ".denoised canvas") != before
    time.sleep(0.6)  # the address would be written now
    browser.switch_to.default_content()
    assert "step" not in browser.current_url
    assert asked(browser) == {""} and complaints(browser) == []


# --- the dashboard -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    synthetic_recording(runs / "hostile.zarr", prompt=HOSTILE, size=(16, 16))
    write_study(runs, {"seed": [0, 1], "guidance_scale": [1.5, 3]}, parent={"guidance_scale": 2})
    with serving(runs) as address:
        yield address


@contextmanager
def serving(runs: Path, *options: str) -> Iterator[str]:
    """Start a dashboard of its own, and end it."""
    command = [sys.executable, "-m", "probe.view", "sample", "--runs", str(runs), "--no-browser"]
    command += options
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith("Look at http://127.0.0.1:"), line
        try:
            yield line.removeprefix("Look at ").split("?")[0].rstrip("/\n")
        finally:
            child.send_signal(2)
            assert child.wait(5) == 130


@pytest.mark.parametrize(
    ("width", "dark"),
    [
        pytest.param(1280, False, id="light"),
        pytest.param(1920, True, id="dark", marks=pytest.mark.slow),
    ],
)
def test_replay_in_the_dashboard(
    width: int, dark: bool, server: str, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, width, dark=dark)
    player = opened(browser, f"{server}/?runs=sample")
    browser.execute_script("arguments[0].focus()", player)
    before = ink(browser, player, "figure.denoised canvas")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (
        player.get_attribute("data-step") == "8"
        and ink(browser, player, "figure.denoised canvas") != before
    )
    time.sleep(0.6)
    assert "step=8" in browser.current_url and "runs=sample" in browser.current_url
    assert opened(browser, browser.current_url).get_attribute("data-step") == "8", (
        "a reload restores it"
    )
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []
    assert browser.save_screenshot(str(tmp_path / "replay.png"))


PICK = (
    "const [box, name, value] = arguments; const s = [...box.querySelectorAll('select')]"
    ".find(s => s.getAttribute('aria-label') === name); s.value = value;"
    "s.dispatchEvent(new Event('change'))"
)


def test_other_readings_in_the_dashboard(server: str, browser: Any) -> None:
    look(browser, 1280)
    player = opened(browser, f"{server}/?runs=sample")
    text = "return [...arguments[0].querySelectorAll(arguments[1])].map(e => e.textContent)"

    def shown(which: str) -> list[str]:
        return [str(one) for one in browser.execute_script(text, player, which)]

    def changed(name: str, value: str, which: str, before: object) -> int:
        """Choose, and return the new picture once it is no longer the one before."""
        browser.execute_script(PICK, player, name, value)
        waiting(browser, 20).until(lambda driver: ink(driver, player, which) != before)
        return ink(browser, player, which)

    maps, latents = "figure.maps canvas", "figure.latents canvas"
    now = ink(browser, player, maps)
    now = changed("Which steps", "all", maps, now)
    assert "mean over 20 steps, sigma 11 to 0.0413" in shown("figure.maps small")[0]
    now = changed("Another word to take away", "2", maps, now)
    assert "“astronaut” (orange) less “scuba” (blue)" in shown("figure.maps small")[0]
    now = changed("What is shown", "contribution", maps, now)
    assert shown(".question .ask")[0] == "Where is something written for"
    browser.execute_script(PICK, player, "Words or single tokens", "tokens")
    waiting(browser, 20).until(lambda _: shown(".chip")[0] == "start")
    assert "overlap" in "".join(shown(".thumb small"))
    changed("Which channel of the latents", "3", latents, ink(browser, player, latents))
    assert "channel 3, from -" in shown("figure.latents small")[0]
    time.sleep(0.6)
    kept = browser.current_url
    assert "reading=contribution" in kept and "per=tokens" in kept and "steps=all" in kept
    player = opened(browser, kept)
    waiting(browser, 20).until(lambda _: shown(".chip")[0] == "start")
    assert serious(browser) == []
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


def test_words_are_there_before_they_are_asked_for(server: str, browser: Any) -> None:
    look(browser, 1280, 2400)
    browser.get("about:blank")
    player = opened(browser, f"{server}/?runs=sample")
    requests = (
        "return performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(e => e.includes('/probe/heads'))"
    )
    waiting(browser, 20).until(lambda driver: len(driver.execute_script(requests)) == 7)
    label = "return arguments[0].querySelector('.heads canvas').getAttribute('aria-label')"
    for word in ("diving", "An"):
        click = (
            "[...arguments[0].querySelectorAll('.chip')].find(c => c.textContent === arguments[1])"
        )
        browser.execute_script(f"{click}.click()", player, word)
        waiting(browser, 5).until(
            lambda driver, word=word: f"“{word}”" in driver.execute_script(label, player)
        )
    assert len(set(browser.execute_script(requests))) == 7, "no word is asked for twice"
    assert len(browser.execute_script(requests)) == 7


@pytest.mark.slow
def test_a_locked_range_stays(server: str, browser: Any) -> None:
    """It stays for words, steps, heads, a reload, another run; keys alone lock and set it."""
    from selenium.webdriver.common.keys import Keys

    def key(player: Any) -> str:
        return str(player.find_element("css selector", ".key").text)

    look(browser, 1280, 2400)
    player = opened(browser, f"{server}/?runs=sample")
    assert "0 to 3.57%, the same for every word and step" in key(player)
    lock = player.find_element("css selector", ".lock")
    browser.execute_script("arguments[0].focus()", lock)
    press(browser, Keys.ENTER)
    assert lock.get_attribute("aria-pressed") == "true" and "%, locked" in key(player)
    ends = player.find_elements("css selector", ".ends input")
    assert [end.get_attribute("value") for end in ends] == ["0", "3.569"]
    chip = "return [...arguments[0].querySelectorAll('.chip')].map(c => (c.click(), 0))"
    browser.execute_script(chip, player)
    assert [end.get_attribute("value") for end in ends] == ["0", "3.569"], "padding has 91%"
    before = ink(browser, player, "figure.maps canvas")
    browser.execute_script("arguments[0].focus()", ends[0])
    press(browser, Keys.TAB, "95", Keys.TAB)
    assert ink(browser, player, "figure.maps canvas") != before, "padding is not white any more"
    browser.execute_script("arguments[0].focus()", ends[0])
    press(browser, Keys.TAB, "0", Keys.TAB)
    assert "The range stays" in player.find_element("css selector", ".tip").text
    assert [end.get_attribute("value") for end in ends] == ["0", "95"]
    assert serious(browser) == []
    time.sleep(0.6)
    kept = browser.current_url
    assert "scale=locked" in kept and "vmin=0" in kept and "vmax=0.95" in kept
    player = opened(browser, kept.replace("runs=sample", "runs=hostile") + "&layer=1&head=1")
    assert "%, locked" in key(player)
    waiting(browser, 20).until(
        lambda _: "alone" in player.find_element("css selector", "figure.maps small").text
    )
    assert "%, locked" in key(player)
    heading = player.find_element("css selector", ".heads h2").text
    assert "all on the locked scale" in heading
    player.find_element("css selector", ".lock").click()
    assert "this head's own" in key(player)
    time.sleep(0.6)
    assert "vmax" not in browser.current_url and "scale=words" in browser.current_url
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


def test_a_ranked_head_and_a_wipe(server: str, browser: Any) -> None:
    look(browser, 1280, 2400)
    player = opened(browser, f"{server}/compare?runs=sample&runs=hostile")
    best = "return [...arguments[0].querySelectorAll('.best button')]"
    buttons = []
    for _ in range(40):
        buttons = browser.execute_script(best, player)
        if buttons:
            break
        time.sleep(0.25)
    assert len(buttons) == 6 and "head" in buttons[0].text
    browser.execute_script("arguments[0].click()", buttons[0])  # the dock may lie over it
    assert "alone" in player.find_element("css selector", "figure.maps small").text
    before = ink(browser, player, ".between ~ .row canvas")
    browser.execute_script(PICK, player, "How the two are compared", "wipe")
    assert ink(browser, player, ".between ~ .row canvas") != before
    assert "Left sample" in player.find_element("css selector", ".between h2").text


def test_hostile_recordings_run_nothing_in_the_dashboard(server: str, browser: Any) -> None:
    look(browser, 1280)
    for page in ("/?runs=hostile", "/compare?runs=hostile&runs=sample"):
        opened(browser, server + page)
        time.sleep(0.3)
        assert browser.execute_script("return window.pwned ?? 0") == 0
        assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []
    browser.get(f"{server}/runs")
    time.sleep(1)
    assert browser.execute_script("return [window.pwned ?? 0, document.images.length]") == [0, 0]
    assert asked(browser) == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["guidance", "anatomy"])
def test_a_page_of_figures_is_whole_and_shows_text_as_it_is(
    page: str, server: str, browser: Any
) -> None:
    look(browser, 1280)
    for run in ("hostile", "sample"):
        asked(browser), complaints(browser)
        browser.get(f"{server}/{page}?runs={run}")
        waiting(browser, 40).until(
            lambda driver: driver.execute_script(
                "return document.querySelectorAll('.js-plotly-plot .main-svg').length"
            )
        )
        time.sleep(0.5)
        assert browser.execute_script("return window.pwned ?? 0") == 0
        assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []
        text = browser.execute_script("return document.body.textContent")
        assert page == "guidance" or run == "sample" or HOSTILE in text
    assert serious(browser) == []
    for width in (390, 1920):
        look(browser, width)
        time.sleep(0.5)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width


@pytest.mark.slow
def test_blocks_and_layers_of_the_drawing_are_pressed(server: str, browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, 1280)
    asked(browser), complaints(browser)
    browser.get(f"{server}/anatomy?runs=sample")
    wait, button = waiting(browser, 40), ".anatomy [data-value='{}']"
    seen = (
        "const b = document.querySelector(arguments[0]), f = b?.closest('.part')"
        "?.querySelector('figure'); return [b?.getAttribute('aria-pressed'), "
        "b === document.activeElement, f?.innerText ?? '']"
    )

    def after(value: str) -> Any:
        """Wait until a button is pressed, keeps the focus and its picture is there."""
        which = button.format(value)
        wait.until(lambda _: browser.execute_script(seen, which)[:2] == ["true", True])
        return browser.execute_script(seen, which)[2]

    wait.until(lambda _: browser.execute_script(seen, button.format("mid_block"))[0] == "true")
    wait.until(partial(_is_there, "document.body.dataset.picks"))
    focus = "document.querySelector(arguments[0]).focus()"
    browser.execute_script(focus, button.format("up_blocks.1"))
    press(browser, Keys.ENTER)
    assert "Output of up_blocks.1, cond" in after("up_blocks.1"), "by keyboard"
    browser.find_element("css selector", button.format("text_encoder 2")).click()
    assert "layer 2, mean of all heads" in after("text_encoder 2"), "by mouse"
    browser.execute_script(focus, button.format("down_blocks.0"))
    press(browser, " ")
    assert "Output of down_blocks.0" in after("down_blocks.0"), "again, the focus goes along"
    wait.until(lambda _: "block=down_blocks.0" in browser.current_url)
    box = "return document.querySelector('[data-testid=stSelectbox] input').value"
    assert "down_blocks.0" in browser.execute_script(box), "the box below says the same"
    browser.get(browser.current_url)
    pressed = "return [...document.querySelectorAll('.anatomy [aria-pressed=true]')].map(b => "
    pressed += "b.dataset.value)"
    wait.until(lambda _: browser.execute_script(pressed) == ["text_encoder 2", "down_blocks.0"])
    assert serious(browser) == []
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


EVERY = {
    "/?runs=sample": "Which places attend to",
    "/learn?runs=sample-noising": "Where it is wrong",
    "/anatomy?runs=sample": "Inside the UNet",
    "/pixels": "None of these stands alone",
    "/pixels?part=Quality": "What is lost, as pictures",
    "/pixels?part=Beside+the+paper": "inpainting",
    "/runs": "Select one run",
    "/record": "--allow-record",
    "/guidance?runs=sample": "Size of the predictions",
    "/trajectories?runs=sample": "Is that more than chance?",
    "/compare?runs=sample&runs=sample-guidance-8": "parts from sample at step 4",
    "/grids": "Pick one cell",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (1920, False), (1920, True), (390, False)]
)
def test_every_page_in_every_look(
    width: int, dark: bool, server: str, browser: Any, tmp_path: Path
) -> None:
    look(browser, width, dark=dark)
    for number, (page, wanted) in enumerate(EVERY.items()):
        browser.get_log("performance")
        browser.get_log("browser")
        browser.get(server + page)
        text = f"return document.body.innerText + ({BOX}?.innerText ?? '')"
        waiting(browser, 40).until(
            lambda driver, text=text, wanted=wanted: wanted in driver.execute_script(text)
        )
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, page
        assert not browser.find_elements("css selector", "[data-testid=stException]"), page
        assert asked(browser) == {"127.0.0.1"} and complaints(browser) == [], page
        assert serious(browser) == [], page
        assert browser.save_screenshot(str(tmp_path / f"{number}.png"))


def test_an_address_full_of_nonsense_falls_to_the_defaults(server: str, browser: Any) -> None:
    query = "runs=sample&step=abc&word=-3&layer=1e9&head=<b>&opacity=9&scale=x&step=9999999999999"
    player = opened(browser, f"{server}/?{query}")
    assert player.get_attribute("data-step") == "6" and complaints(browser) == []


# --- text that somebody else chose ---------------------------------------------------------------

INNER = "zqz"  # what an element holds if a text was read as markup: no text of ours is that
HANDLER = "window.pwned=1"
SOME = (
    f'<img src=x onerror="{HANDLER}">',
    f"<b>{INNER}</b>",
    f'<a href="http://evil.invalid/a">{INNER}</a>',
    f"</script><script>{HANDLER}</script>",
    f"**{INNER}** :red[{INNER}] :material/bolt: :dog: $\\{INNER}$",
    f"![{INNER}](http://evil.invalid/p.png) [{INNER}](http://evil.invalid/l)",
    "%{customdata} %{x} {step} {word} {mean} $& ${0}",
    "'); import os; os.abort(); ('\\",
)
REST = (
    f"<svg onload={HANDLER}></svg>",
    f"<iframe srcdoc='<script>parent.{HANDLER}</script>'></iframe>",
    f"<style>@import 'http://evil.invalid/s.css'</style><i>{INNER}</i>",
    f"<math><mtext>{INNER}</mtext></math>",
    f"<template><script>{HANDLER}</script></template>",
    f"<details open ontoggle={HANDLER}>{INNER}</details>",
    f"javascript:{HANDLER}//",
    f'"onfocus={HANDLER} autofocus="',
    f"'onmouseover={HANDLER} x='",
    f"--><script>{HANDLER}</script><!--",
    f"]]><script>{HANDLER}</script>",
    f"</textarea></title></style><b>{INNER}</b>",
    f"&lt;b&gt;{INNER}&lt;/b&gt; &amp; &#60;",
    f"# {INNER}\n> {INNER}\n- {INNER}\n1. {INNER}",
    f"`{INNER}` ~~{INNER}~~ _{INNER}_ ```{INNER}```",
    f":violet-background[{INNER}] :small[{INNER}] :streamlit:",
    f"<span style='color:red'>{INNER}</span><sub>{INNER}</sub><br>",
    f"{{{{constructor.constructor('{HANDLER}')()}}}} ${{{HANDLER}}}",
    f"<http://evil.invalid/> http://evil.invalid/u mailto:a@evil.invalid {INNER}@",
    "\u2067\u202egnp.exe\u2069 \u0000\u001b[31m\u2028\u2029\ufeff\u0085",  # of labels alone
    "\U000e0041\U0001f468\u200d\U0001f469 e\u0301\u0301\u0301 \ufdfd",
    "w" * 3000,
)
# Every text on a page, of shadow roots too; elements that ours are never; scripts that ran.
FOUND = (
    "const roots = [document, ...[...document.querySelectorAll('*')].map(e => e.shadowRoot)]"
    ".filter(Boolean), texts = [];"
    "for (const r of roots) { const walk = document.createTreeWalker(r, NodeFilter.SHOW_TEXT);"
    "while (walk.nextNode()) if (!walk.currentNode.parentNode.matches('script, style')) "
    "texts.push(walk.currentNode.data); for (const e of r.querySelectorAll('[aria-label], "
    "textarea, input')) texts.push(e.getAttribute('aria-label') ?? '', e.value ?? ''); }"
    "const strange = 'iframe, math, .katex, [onerror], [onload], [onfocus], [href*=evil],"
    " [src*=evil], [src=x], [ontoggle], [onmouseover]';"
    "return [window.pwned ?? 0, roots.flatMap(r => [...r.querySelectorAll(strange)])"
    ".map(e => e.outerHTML.slice(0, 200)), texts]"
)


def harmless(browser: Any, shown: Iterable[str] = ()) -> None:
    """Check that no text was read as anything else, and that some are shown as they are."""
    pwned, strange, texts = browser.execute_script(FOUND)
    assert pwned == 0 and strange == []
    made = {INNER, "bolt", "\U0001f436"}  # inside of markup, the icon, the dog
    assert [text for text in texts if text.strip() in made] == []
    everything = "\n".join(texts)
    assert [text for text in shown if text not in everything] == []


def hostile_recording(
    folder: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str]:
    """Make a recording that holds texts wherever one may stand, and return it and its prompt."""
    clean = [text for text in texts if not UNCLEAN.search(text)]
    prompt = "\n".join(clean)
    name = " ".join(text.replace("/", "\u2215") for text in clean if "\n" not in text)
    made = synthetic._Synthetic.attributes

    def attributes(self: Any) -> dict[str, Any]:
        found = made(self)
        return found | {
            "model": found["model"] | {"name": prompt},
            "scheduler": found["scheduler"] | {"class": prompt},
        }

    with monkeypatch.context() as patch:
        patch.setattr(synthetic._Synthetic, "words", list(texts))
        patch.setattr(synthetic._Synthetic, "attributes", attributes)
        path = synthetic_recording(
            folder / "made.zarr", prompt=prompt, negative_prompt=prompt, size=(16, 16)
        )
    # A name has at most 255 bytes.
    return path.rename(folder / f"{name.encode()[:240].decode(errors='ignore')}.zarr"), prompt


def _is_there(what: str, browser: Any) -> Any:
    return browser.execute_script(f"return {what}")


def hostile_noising(folder: Path, texts: Sequence[str]) -> tuple[Path, str]:
    """Make a noising with texts as caption, picture, model, scheduler and name.

    Return it and its caption.
    """
    clean = [text for text in texts if not UNCLEAN.search(text)]
    caption = "\n".join(clean)
    name = " ".join(text.replace("/", "\u2215") for text in clean if "\n" not in text)
    path = folder / f"{name.encode()[:240].decode(errors='ignore')}.zarr"
    shutil.copytree(unpacked("sample-noising"), path)
    root = json.loads((path / "zarr.json").read_text("utf-8"))
    said = root["attributes"]
    said["noising"] |= {"caption": caption, "picture": " ".join(SOME)[:240]}
    said["model"]["name"] = said["scheduler"]["class"] = caption
    (path / "zarr.json").write_text(json.dumps(root), "utf-8")
    return path, caption


def said_by_the_pages(browser: Any, server: str, run: Run, key: str, words: list[str]) -> None:
    """Open every page with a recording, and check each."""
    query, prompt = urlencode({"runs": key}), run.experiment.prompt
    both = f"{query}&runs=sample"
    pages = {  # what is waited for there, and what is shown there as it is
        f"?{query}&layer=0&head=0": (f"{BOX}?.querySelector('.best button')", [prompt, *words]),
        "runs": ("document.querySelector('[data-testid=stDataFrame]')", []),
        f"compare?{both}": (f"{BOX}?.dataset.step", [f"{run.name}: {facts(run)}"]),
        f"guidance?{query}": ("document.querySelector('.main-svg')", []),
        f"anatomy?{query}": ("document.querySelector('.main-svg')", [prompt[:290], words[0]]),
        f"trajectories?{both}": ("document.querySelector('.main-svg')", [run.name]),
        f"learn?{query}": (f"{BOX}?.dataset.step", []),
        f"record?{urlencode({'prompt': prompt, 'negative': prompt})}": (
            "document.querySelector('textarea')",
            [prompt],
        ),
    }
    for page, (wait, shown) in pages.items():
        asked(browser)
        browser.get(f"{server}/{page}")
        waiting(browser, 40).until(partial(_is_there, wait))
        if not page or page.startswith("?"):
            browser.execute_script(f"{BOX}.querySelector('summary').click()")
            code = browser.execute_script(f"return {BOX}.querySelector('.code').textContent")
            strings = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
            assert str(run.path) in strings, "copied as Python it is the path, and one string"
        time.sleep(0.2)
        harmless(browser, shown)
        assert asked(browser) == {"127.0.0.1"}, page


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param([SOME], id="some"),
        pytest.param([SOME, REST[:8], REST[8:16], REST[16:]], id="all", marks=pytest.mark.slow),
    ],
)
def test_no_text_of_a_recording_is_more_than_text(
    groups: list[tuple[str, ...]], browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({*SOME, *REST}) == 30
    (tmp_path / "runs").mkdir()
    made = [hostile_recording(tmp_path / "runs", texts, monkeypatch) for texts in groups]
    look(browser)
    with serving(tmp_path / "runs", "--allow-record") as server:
        for (path, prompt), texts in zip(made, groups, strict=True):
            key = Library(tmp_path / "runs").add(path)
            words = list(texts)
            said_by_the_pages(browser, server, Run(path), key, words)
            export([str(path), "sample", "--html", str(tmp_path / "page.html")])
            opened(browser, (tmp_path / "page.html").as_uri())
            harmless(browser, [prompt, *words])
            cell = Run(path).player()._repr_html_()
            (tmp_path / "notebook.html").write_text(f"<!doctype html>{cell}", "utf-8")
            opened(browser, (tmp_path / "notebook.html").as_uri(), framed=True)
            harmless(browser, [prompt, *words])
            browser.switch_to.default_content()
            assert asked(browser) == {""}


@pytest.mark.slow
def test_no_caption_of_a_noising_is_more_than_text(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    path, caption = hostile_noising(tmp_path / "runs", [*SOME, *REST])
    look(browser)
    with serving(tmp_path / "runs") as server:
        query = urlencode({"runs": Library(tmp_path / "runs").add(path)})
        pages = {  # what is waited for there, and what is shown there as it is
            f"learn?{query}": (f"{BOX}?.dataset.step", [caption]),
            f"?{query}": (f"{BOX}?.dataset.step", []),  # another run, and where this one belongs
            f"anatomy?{query}": ("document.querySelector('.main-svg')", []),
            "runs": ("document.querySelector('[data-testid=stDataFrame]')", []),
        }
        for page, (wait, shown) in pages.items():
            asked(browser)
            browser.get(f"{server}/{page}")
            waiting(browser, 40).until(partial(_is_there, wait))
            time.sleep(0.2)
            harmless(browser, shown)
            assert asked(browser) == {"127.0.0.1"}, page
        browser.get("about:blank")  # else the last page asks for its server, which ends
    export([str(path), "--html", str(tmp_path / "page.html")])
    opened(browser, (tmp_path / "page.html").as_uri())
    harmless(browser, [caption])
    assert asked(browser) == {""}
    cell = Run(path).player()._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html>{cell}", "utf-8")
    opened(browser, (tmp_path / "notebook.html").as_uri(), framed=True)
    harmless(browser, [caption])
    browser.switch_to.default_content()
    assert asked(browser) == {""}


def hostile_study(folder: Path, texts: Sequence[str]) -> Path:
    """Make a study with texts as its name, axes, labels, causes and measures by label."""
    clean = [text for text in texts if not UNCLEAN.search(text)]
    path = write_study(folder, {"prompt": ["a cat", "a fox"], "seed": [0, 1]}, parent={"seed": 5})

    def rename(study: dict[str, Any]) -> None:
        study["name"] = study["axes"][1]["name"] = clean[0]
        study["axes"][0] |= {"name": clean[-1][:200], "labels": [" ".join(clean[:4]), clean[4]]}
        for number, cell in enumerate(study["cells"][:2]):
            why = {"status": "failed", "cause": " ".join(clean), "remedy": clean[1]}
            own = {"l2": 1.0 + number, "word_change": dict.fromkeys(clean, 0.5)}
            change_cell(path, cell["address"], measures=own, **(why if number else {}))

    change_study(path, rename)
    return path


@pytest.mark.slow
def test_no_text_of_a_study_is_more_than_text(browser: Any, tmp_path: Path) -> None:
    texts = [*SOME, *REST]
    path = hostile_study(tmp_path, texts)
    study = open_study(path)
    titles = [study.cells[0, seed].title for seed in (0, 1)]
    look(browser)
    with serving(tmp_path) as server:
        for show in ("pictures", "l2"):
            asked(browser)
            query = urlencode({"cells": titles, "show": show}, doseq=True)
            browser.get(f"{server}/grids?{query}")
            wait = "document.querySelectorAll('[data-testid=stDataFrame]').length > 1"
            waiting(browser, 40).until(partial(_is_there, wait))
            time.sleep(0.5)
            harmless(browser, study.cells[0, 1].cause.splitlines())
            assert asked(browser) == {"127.0.0.1"} and complaints(browser) == [], show
        browser.get("about:blank")  # else the last page asks for its server, which ends
    for kind in ("html", "plot"):
        export([str(path), f"--{kind}", str(tmp_path / f"{kind}.html")])
        asked(browser)
        browser.get((tmp_path / f"{kind}.html").as_uri())
        waiting(browser, 40).until(partial(_is_there, "document.querySelector('td, .main-svg')"))
        harmless(browser, [study.name])
        assert asked(browser) == {""} and complaints(browser) == []


def is_caught(browser: Any, text: str) -> bool:
    """Tell whether a page that shows a text, and nothing else, is found to be wrong."""
    try:
        harmless(browser, [text])
    except AssertionError:
        return True
    return bool(asked(browser) & {"evil.invalid", "x"})


@pytest.mark.slow
def test_a_page_that_puts_text_into_its_markup_is_caught(browser: Any, tmp_path: Path) -> None:
    """The negative control: as text every one passes, as HTML every one with a tag is caught."""
    texts = [text for text in (*SOME, *REST) if not UNCLEAN.search(text)]
    caught: dict[str, list[str]] = {}
    for kind, shown in {"text": html.escape, "HTML": str}.items():
        caught[kind] = []
        for number, text in enumerate(texts):
            asked(browser)
            page = tmp_path / f"{kind}-{number}.html"
            page.write_text(
                f"<!doctype html><meta charset=utf-8><pre>\n{shown(text)}</pre>", "utf-8"
            )
            browser.get(page.as_uri())
            if is_caught(browser, text):
                caught[kind].append(text)
    assert caught["text"] == []
    assert caught["HTML"] == [text for text in texts if re.search("<[a-z/!]|&[a-z#]", text)]


MARKDOWN = [SOME[4], SOME[5], *REST[13:16]]


@pytest.mark.slow
def test_a_page_that_shows_text_as_markdown_is_caught(browser: Any, tmp_path: Path) -> None:
    """The other control, with Streamlit's own `st.markdown` and `st.text`."""
    from selenium.common.exceptions import WebDriverException

    (tmp_path / "app.py").write_text(
        "import json, streamlit as st\n"
        f"texts = json.loads({json.dumps(MARKDOWN)!r})\n"
        "show = st.text if st.query_params['as'] == 'text' else st.markdown\n"
        "show(texts[int(st.query_params['of'])])\nst.html('<i id=end></i>')\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "server.port": port,
        "server.address": "127.0.0.1",
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
    }
    command = [sys.executable, "-m", "streamlit", "run", str(tmp_path / "app.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as child:
        try:
            for kind in ("text", "markdown"):
                for number, text in enumerate(MARKDOWN):
                    wait = waiting(browser, 40, WebDriverException)
                    address = f"http://127.0.0.1:{port}/?as={kind}&of={number}"
                    wait.until(lambda _, address=address: browser.get(address) is None)
                    wait.until(partial(_is_there, "document.querySelector('#end')"))
                    time.sleep(0.3)
                    assert is_caught(browser, text) == (kind == "markdown"), (kind, text)
        finally:
            child.terminate()
            child.wait(10)


# --- a recording that grows ----------------------------------------------------------------------

SEEN = (
    "const all = [document, ...[...document.querySelectorAll('*')].map(e => e.shadowRoot)]"
    ".filter(Boolean); const one = q => all.map(r => r.querySelector(q)).find(Boolean);"
    "const box = one('.probe:not(.next .probe)'), said = one('.following');"
    "return [box?.dataset.step, said?.textContent, all.map(r => r.activeElement?.getAttribute("
    "'aria-label')).filter(Boolean).pop(),"
    "box?.querySelectorAll('figure.final canvas:not([hidden])').length]"
)
# Counts the moments at which no player is on the page, between any two changes of it.
WATCH = (
    "window.gaps = 0; for (const e of document.querySelectorAll('*')) if (e.shadowRoot) "
    "new MutationObserver(() => { if (!e.shadowRoot.querySelector('.probe:not(.next .probe)')) "
    "window.gaps += 1; }).observe(e.shadowRoot, {childList: true, subtree: true})"
)


def test_a_recording_that_grows_is_followed(
    server: str, runs: Path, browser: Any, tmp_path: Path
) -> None:
    whole = Run(synthetic_recording(tmp_path / "grows.zarr", steps=6, size=(16, 16)))
    run = growing(whole, runs, 0)
    look(browser)
    browser.get("about:blank")  # a page of another server, which is gone, asks no longer
    browser.get_log("browser")
    browser.get(f"{server}/?runs={run.name}")

    def seen(step: str | None, said: str) -> list[Any]:
        """Wait for a step and for what is said, and return what is seen then."""
        wait = waiting(browser, 40)
        wait.until(lambda _: browser.execute_script(SEEN)[:2] == [step, said])
        return list(browser.execute_script(SEEN))

    seen(None, "recording: the first of 6 steps is not finished yet")
    grow(run, whole, 2)
    seen("1", "recording: 2 of 6 steps")  # from the beginning on at the end
    browser.execute_script(WATCH)
    slider = f"{BOX}.querySelector('input[aria-label=Step]')"
    browser.execute_script(f"{slider}.focus()")
    grow(run, whole, 4)
    assert seen("3", "recording: 4 of 6 steps")[2] == "Step", "it keeps the focus"
    browser.execute_script(f"const s = {slider}; s.value = 1; s.oninput()")
    channel = "Which channel of the latents"
    browser.execute_script(PICK, browser.execute_script(f"return {BOX}"), channel, "2")
    grow(run, whole, 6)
    finishing = "finishing: all 6 steps are here, the picture is made"
    assert seen("1", finishing)[2:] == ["Step", 0], "who looks at a step stays there"
    kept = f"return {BOX}.querySelector('select[aria-label=\"{channel}\"]').value"
    assert browser.execute_script(kept) == "2"
    zarr = (run.path / "zarr.json").read_bytes()
    (run.path / "zarr.json").write_bytes(b"{")
    waiting(browser, 40).until(lambda _: "zarr.json" in browser.execute_script(SEEN)[1])
    assert browser.execute_script(SEEN)[0] == "1", "an error is told above the player"
    replace(run.path / "zarr.json", zarr)
    seen("1", finishing)
    finish(run, whole)
    assert seen("1", "")[2:] == ["Step", 1], "the picture has come"
    assert browser.execute_script("return window.gaps") == 0
    time.sleep(2.5)  # the words are fetched ahead
    browser.get_log("performance")
    time.sleep(2.5)
    assert asked(browser) == set(), "nobody is asked for a complete one"
    assert [row for row in complaints(browser) if "404" not in row] == []


def test_one_whose_writer_is_gone_tells_how_to_go_on(
    server: str, runs: Path, browser: Any, tmp_path: Path
) -> None:
    whole = Run(synthetic_recording(tmp_path / "gone.zarr", steps=6, size=(16, 16)))
    run = cut(whole, runs, 3)
    look(browser)
    opened(browser, f"{server}/?runs={run.name}")
    said = browser.execute_script(SEEN)[1]
    assert said.startswith("Interrupted after 3 of 6 steps") and said.endswith(
        f"python -m probe.run --resume {run.path}"
    )
    assert serious(browser) == []


# --- recording on the page Record ----------------------------------------------------------------


def _filled(browser: Any, label: str, value: str) -> None:
    """Write into a field of Streamlit as a person does: all of it anew, then Tab."""
    from selenium.webdriver.common.keys import Keys

    field = browser.find_element("css selector", f"[aria-label='{label}']")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(value, Keys.TAB)


PRESS = (
    "const [text, press] = arguments; const b = [...document.querySelectorAll('button')]"
    ".find(b => b.innerText.trim() === text && !b.disabled); if (b && press) b.click(); return !!b"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_recorded_and_another_is_stopped(browser: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    look(browser, 1280, 1600)
    with serving(runs, "--allow-record") as server:
        wait = waiting(browser, 120)

        def said() -> str:
            return str(browser.execute_script("return document.body.innerText"))

        def record(prompt: str, steps: str) -> None:
            _filled(browser, "Prompt", prompt)
            wait.until(lambda _: f"--prompt={prompt}" in said().replace("'", ""))
            _filled(browser, "Steps", steps)
            wait.until(lambda _: f"--steps={steps}" in said())
            assert browser.execute_script(PRESS, "Record", True)

        browser.get(f"{server}/record")
        wait.until(lambda _: browser.execute_script(PRESS, "Record", False))
        _filled(browser, "Prompt", "A zebrafish")
        wait.until(lambda _: "The bundled model never saw 'zebrafish'" in said())
        assert not browser.execute_script(PRESS, "Record", False), (
            "what it cannot draw is not begun"
        )
        record("A cat on the moon", "4")
        wait.until(lambda _: browser.execute_script(PRESS, "Stop", False))
        wait.until(lambda _: "Recorded a-cat-on-the-moon-" in said())
        wait.until(lambda _: browser.execute_script(SEEN)[:2] == ["3", ""])
        assert browser.execute_script(SEEN)[3] == 1, "the finished picture"
        (path,) = runs.glob("*.zarr")
        run = Run(path)
        assert run.status == "complete" and len(run.steps) == 4
        assert run.experiment.prompt == "A cat on the moon"
        assert serious(browser) == []

        record("A fox in the forest", "400")
        lived: set[str] = set()

        def growing(_: Any) -> bool:
            """Tell whether new steps have come by themselves, three times."""
            step, text, *_ = browser.execute_script(SEEN)
            if step is not None and str(text).startswith("recording: "):
                lived.add(step)
            return len(lived) > 2

        wait.until(growing)
        assert browser.execute_script(PRESS, "Stop", True)
        wait.until(lambda _: "Stopped." in said())
        wait.until(lambda _: str(browser.execute_script(SEEN)[1]).startswith("Interrupted after"))
        (stopped,) = runs.glob("a-fox-*.zarr")
        run = Run(stopped)
        assert run.status == "interrupted" and 3 <= len(run.steps) < 400
        assert f"--resume {stopped}" in browser.execute_script(SEEN)[1]
        assert browser.execute_script(PRESS, "Record", False), "another can be made"
        assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []
