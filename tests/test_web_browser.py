"""The page in a real browser: it draws, shows, compares, and asks nobody."""

from __future__ import annotations

import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import yaml
from browsers import asked, complaints, ink, look, press, serious, started
from PIL import Image
from recordings import change_root, recording
from web_pages import FEW, WEB, drawn, opened, until

import probe
from probe.reading.sample import pack
from probe.settings.experiment import load_experiment

HOSTILE = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=2</script>'
SAID = "return document.getElementById('said').textContent"
BRIGHTEST = """
const canvas = [...arguments[0].querySelectorAll("canvas")].at(-1);
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
return data.reduce((most, value, i) => (i % 4 < 3 ? Math.max(most, value) : most), 0);
"""  # of the finished pictures' difference
# Keep what the page says while it loads.
WATCH = """
addEventListener('DOMContentLoaded', () => {
  const said = document.getElementById('said');
  self.texts = new Set();
  new MutationObserver(() => texts.add(said.textContent)).observe(said, {childList: true});
})
"""
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
)

pytestmark = WEB


def test_a_picture_is_drawn_looked_at_and_compared(browser: Any, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, 1280)
    player = opened(browser, f"{address}?prompt=a+fox+on+the+moon&{FEW}&step=2&word=1")
    assert "Drawn in" in browser.execute_script(SAID)
    assert browser.execute_script("return self.crossOriginIsolated")
    assert player.get_attribute("data-step") == "2"
    assert "Attention to “fox”" in player.text and "Finished picture" in player.text
    parts = [f".{part} canvas" for part in ("latents", "denoised", "maps", "final")]
    before = [ink(browser, player, part) for part in parts]
    browser.execute_script("arguments[0].focus()", player)
    press(browser, Keys.ARROW_RIGHT)
    assert player.get_attribute("data-step") == "3"
    after = [ink(browser, player, part) for part in parts]
    assert [one != other for one, other in zip(before, after, strict=True)] == [True] * 3 + [False]
    until(browser, "document.querySelector('.heads canvas').height > 1")
    until(browser, "location.search.includes('step=3')")
    assert serious(browser) == []

    browser.find_element("id", "keep").click()
    box = browser.find_element("css selector", "#prompt input")
    box.send_keys(Keys.BACKSPACE, "beach")
    browser.find_element("id", "draw").click()
    player = drawn(browser, 2)
    rows = player.find_elements("css selector", ".row")
    assert len(rows) == 3, "two runs and their difference"
    until(browser, "location.search.includes('beach')")
    query = parse_qs(urlsplit(browser.current_url).query)
    assert (query["prompt"], query["num_steps"]) == (["a fox on the beach"], ["5"])
    assert serious(browser) == []
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


def test_a_first_prompt_of_ones_own(browser: Any, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, 390, 844)
    watch = {"source": WATCH}
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", watch)
    opened(browser, f"{address}?prompt=a+fox+on+the+moon&{FEW}")
    assert "Opening the model …" in browser.execute_script("return [...self.texts]")
    box = browser.find_element("css selector", "#prompt input")
    box.send_keys(Keys.CONTROL, "a", Keys.NULL, "an owl at the beach", Keys.ENTER)
    player = drawn(browser, 2)
    until(browser, "!document.body.classList.contains('busy')")
    chips = browser.find_elements("css selector", "#prompt .chip")
    assert [one.text.split()[0] for one in chips] == "an owl at the beach".split()
    assert "Attention to “owl”" in player.text
    top = "document.querySelector('#pictures').getBoundingClientRect().top"
    assert 0 < browser.execute_script(f"return {top}") < 200, "a small screen shows what is drawn"
    before = player.get_attribute("data-step")
    press(browser, Keys.ARROW_LEFT)  # the focus is still in the prompt
    assert int(player.get_attribute("data-step")) == int(before) - 1
    browser.execute_script("document.activeElement.blur()")
    press(browser, Keys.ARROW_RIGHT)
    assert player.get_attribute("data-step") == before

    browser.find_element("css selector", "#prompt .empty").click()
    assert browser.find_elements("css selector", "#prompt .chip") == []
    box.send_keys("a cat", Keys.CONTROL, "a", Keys.NULL, Keys.END, Keys.BACKSPACE)
    assert box.get_attribute("value") == "a ca", "what is half deleted stays text"
    assert browser.find_element("id", "mistake").text == "" and complaints(browser) == []


def test_a_run_is_changed_and_saved(browser: Any, address: str, tmp_path: Path) -> None:
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    look(browser)
    opened(browser, f"{address}?prompt=a+fox&{FEW}&off=value+fox+2")
    assert "“fox” off from step 2" in browser.execute_script(
        "return document.querySelector('.card small').textContent"
    )
    touch = browser.find_element("id", "touch")
    until(browser, "!document.getElementById('touch').hidden")
    assert '"words":["fox"],"steps":"2:"' in touch.find_element("css selector", "pre").text
    touch.find_element("css selector", "[aria-label='Draw without “a”']").click()
    player = drawn(browser, 2)
    until(browser, "location.search.includes('beside=')")
    assert "not in this prompt" not in player.text
    opened(browser, browser.current_url)
    player = drawn(browser, 2)
    assert len(player.find_elements("css selector", ".row")) == 3, "the address holds both"
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    until(browser, "!document.getElementById('touch').hidden")
    for button in browser.find_elements("css selector", "#touch button"):
        if button.text.startswith(("Recording", "Picture")):
            button.click()
    files = [tmp_path / "a-fox-1.zarr.zip", tmp_path / "a-fox-1.png"]
    while not all(file.exists() for file in files):
        time.sleep(0.2)
    with Image.open(files[1]) as picture:
        read = load_experiment(yaml.safe_load(picture.text["experiment"]))
    run = probe.open_run(files[0])
    assert (run.experiment.prompt, read.prompt, read.steps) == ("a fox", "a fox", 5)
    checks = run.verify(model=True).checks
    assert not [check for check in checks if check.verdict == "failed"], checks
    proven = {check.name for check in checks if check.verdict in ("exact", "within tolerance")}
    assert {"manifest", "digests", "schedule", "scheduler", "predictions", "decode"} <= proven


def test_a_changed_run_is_saved_proven_and_opened(
    browser: Any, address: str, tmp_path: Path
) -> None:
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    look(browser)
    changes = "off=value+fox+2&off=head+1.1+0&noise=7+0.3"
    opened(browser, f"{address}?prompt=a+fox&{FEW}&{changes}")
    until(browser, "!document.getElementById('touch').hidden")
    for button in browser.find_elements("css selector", "#touch button"):
        if button.text.startswith("Recording"):
            button.click()
    while not (file := tmp_path / "a-fox-1.zarr.zip").exists():
        time.sleep(0.2)
    run = probe.open_run(file)
    assert [edit.kind for edit in run.experiment.edits] == ["value", "head", "noise"]
    checks = run.verify(model=True).checks
    assert not [check for check in checks if check.verdict == "failed"], checks
    proven = {check.name for check in checks if check.verdict in ("exact", "within tolerance")}
    assert {"schema", "schedule", "scheduler", "predictions", "decode"} <= proven
    browser.find_element("id", "open-file").send_keys(str(file))
    until(browser, "!document.getElementById('opened').hidden")
    line = browser.find_element("id", "opened").text
    assert "a-fox-1: emojiworld, DDIM, 5 steps, guidance 3, seed 5, 3 edits" in line
    assert "It cannot be drawn here, for it is edited" in line
    assert complaints(browser) == []


def test_one_file_draws_from_a_disk(browser: Any, built: Path) -> None:
    file = built / "diffusion.html"
    assert file.stat().st_size <= 36 * 2**20
    for width, dark in ((1280, False), (320, True)):
        look(browser, width, dark=dark)
        if width == 1280:
            player = opened(browser, f"{file.as_uri()}?prompt=an+owl&{FEW}")
        until(browser, f"document.documentElement.scrollWidth <= {width}")
        assert serious(browser) == []
    assert player.get_attribute("data-step") == "4"
    assert asked(browser) == {""} and complaints(browser) == []


class Plain(SimpleHTTPRequestHandler):
    """A host that sends no headers of its own."""

    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""


def test_the_page_draws_when_its_server_is_gone(browser: Any, built: Path) -> None:
    handler = partial(Plain, directory=str(built / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        thread = threading.Thread(target=host.serve_forever, args=(0.05,))
        thread.start()
        look(browser)
        opened(browser, f"http://127.0.0.1:{host.server_address[1]}/?prompt=an+owl&{FEW}")
        assert not browser.execute_script("return self.crossOriginIsolated")
        until(browser, "document.body.dataset.offline === 'kept'")
        host.shutdown()
        thread.join()
    browser.refresh()
    drawn(browser, 1)
    assert browser.execute_script("return self.crossOriginIsolated"), "now it has threads"


def test_a_hostile_prompt_and_address_are_text(browser: Any, address: str) -> None:
    look(browser)
    browser.get_log("performance")
    browser.get(f"{address}?prompt={quote(HOSTILE)}&seed=-1&num_steps=1e9&off=head+9.9+1&word=99")
    until(browser, "document.body.dataset.ready")
    mistake = browser.find_element("id", "mistake")
    assert "The model never saw “<img”, “src=x”" in mistake.text and "pwned=2" in mistake.text
    assert not browser.find_element("id", "draw").is_enabled()
    pwned = "return [window.pwned ?? 0, document.images.length]"
    assert browser.execute_script(pwned) == [0, 0]
    assert browser.execute_script("return document.getElementById('seed').value") == "5"
    assert asked(browser) == {"127.0.0.1"}


def test_a_recording_is_opened_and_drawn_again_beside_it(browser: Any, address: str) -> None:
    look(browser)
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    browser.find_element("id", "open-sample").click()
    until(browser, "!document.getElementById('opened').hidden")
    line = browser.find_element("id", "opened")
    assert "sample: emojiworld, DDIM, 20 steps, guidance 3, seed 5" in line.text
    player = browser.find_element("css selector", ".probe")
    assert "Attention to “astronaut”" in player.text
    until(browser, "document.querySelector('.heads canvas').height > 1")
    assert not browser.find_element("id", "touch").is_displayed(), "it is not of this page"
    assert serious(browser) == []
    line.find_element("css selector", "button").click()
    player = drawn(browser, 3)
    rows = player.find_elements("css selector", ".row")
    assert len(rows) == 3 and "sample" in player.text, "the two and their difference"
    assert browser.execute_script(BRIGHTEST, rows[2]) <= 4, "the same picture: a level, four times"
    until(browser, "location.search.includes('astronaut')")
    assert "beside" not in browser.current_url, "no address holds a file"
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


def test_a_file_that_is_no_recording_leaves_the_page_as_it_was(
    browser: Any, built: Path, tmp_path: Path
) -> None:
    look(browser)
    opened(browser, f"{(built / 'diffusion.html').as_uri()}?prompt=an+owl&{FEW}")
    player = browser.find_element("css selector", ".probe")
    (tmp_path / "a.zip").write_bytes(b"PK" * 999)
    box = browser.find_element("id", "open-file")
    box.send_keys(str(tmp_path / "a.zip"))
    until(browser, "document.getElementById('said').textContent.startsWith('a.zip cannot')")
    assert "This is no zip file" in browser.execute_script(SAID)
    assert player.is_displayed() and not browser.find_element("id", "opened").is_displayed()

    run = probe.open_run(recording(tmp_path / "small.zarr"))
    hostile = change_root(run, lambda found: found["experiment"].update(prompt=HOSTILE))
    pack(hostile.path, "small", tmp_path / "small.zarr.zip")
    box.send_keys(str(tmp_path / "small.zarr.zip"))
    until(browser, "!document.getElementById('opened').hidden")
    line = browser.find_element("id", "opened").text
    assert "small: emojiworld" in line and "cannot be drawn here" in line
    cards = browser.find_elements("css selector", ".card .what")
    assert [card.text for card in cards] == [HOSTILE, "an owl"]
    pwned = "return [window.pwned ?? 0, document.images.length]"
    assert browser.execute_script(pwned) == [0, 0]
    cards[1].click()
    until(browser, "document.getElementById('opened').hidden")
    assert serious(browser) == [] and complaints(browser) == []


def test_what_a_reader_draws_takes_the_place_of_what_an_address_wished(
    browser: Any, address: str
) -> None:
    look(browser)
    browser.get(f"{address}?prompt=a+fox&{FEW}&beside={quote('prompt=an owl&num_steps=40')}")
    until(browser, "document.getElementById('said').textContent.startsWith('Drawing')")
    browser.find_element("id", "another").click()
    until(browser, "document.getElementById('said').textContent.startsWith('Drawn in')")
    time.sleep(1)  # the wish would be drawn now
    cards = browser.find_elements("css selector", ".card .what")
    assert [card.text for card in cards] == ["a fox"]
    assert browser.execute_script(SAID).startswith("Drawn in") and complaints(browser) == []


def test_of_two_recordings_the_last_that_was_asked_for_is_looked_at(
    browser: Any, address: str, tmp_path: Path
) -> None:
    look(browser)
    opened(browser, f"{address}?prompt=an+owl&{FEW}")
    small = probe.open_run(recording(tmp_path / "small.zarr"))
    pack(small.path, "small", tmp_path / "small.zarr.zip")
    browser.execute_script(
        "const whole = window.fetch;"
        "const late = () => new Promise((come) => setTimeout(come, 2000));"
        "window.fetch = async (...of) => { await late(); return whole(...of); }"
    )
    browser.find_element("id", "open-sample").click()  # which comes late
    browser.find_element("id", "open-file").send_keys(str(tmp_path / "small.zarr.zip"))
    drawn(browser, 3)
    until(browser, "document.getElementById('opened').textContent.includes('small: emojiworld')")
    cards = browser.find_elements("css selector", ".card .what")
    assert [card.text for card in cards][1:] == ["An astronaut scuba diving", "an owl"]
    assert complaints(browser) == []


def test_a_graphics_card_is_tried_before_it_is_used(browser: Any, address: str) -> None:
    look(browser)
    opened(browser, f"{address}?prompt=an+owl&{FEW}")
    assert not browser.find_elements("id", "gpu"), "here is none"
    software = started(SOFTWARE_GPU)
    try:
        look(software)
        opened(software, f"{address}?prompt=an+owl&{FEW}")
        until(software, "document.getElementById('gpu')")
        assert serious(software) == []
        software.find_element("id", "gpu").click()
        told = "document.querySelector('#graphics p').textContent"
        until(software, f"/processor/.test({told}) && {told}", 600)
        said = software.execute_script(f"return {told}")
        difference = float(re.search(r"differ by ([\d.e-]+) at most", said)[1])
        assert 0 < difference <= 1e-3 and "stays on the processor, which is faster" in said, said
        assert not software.find_element("id", "gpu").is_selected()
        assert asked(software) == {"127.0.0.1"} and complaints(software) == []
    finally:
        software.quit()
