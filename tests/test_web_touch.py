"""In a real browser: a run from a picture, its noise nudged, and the forward process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import yaml
from browsers import asked, complaints, look, press, serious
from PIL import Image
from web_pages import FEW, WEB, drawn, opened, until

import probe

pytestmark = WEB

PIXELS = (
    "const c = document.querySelector(arguments[0]);"
    "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
)
GIVEN = """
const [kind, part, bytes] = arguments;
const given = new DataTransfer();
given.items.add(new File([Uint8Array.from(bytes)], "square.png", { type: "image/png" }));
const kinds = { drop: ["dataTransfer", DragEvent], paste: ["clipboardData", ClipboardEvent] };
const [name, made] = kinds[kind];
const event = new made(kind, { [name]: given, bubbles: true, cancelable: true });
document.querySelector(part).dispatchEvent(event);
"""
PANEL = "#start canvas"
FINAL = ".card canvas"  # the last that was drawn


@pytest.fixture(autouse=True)
def saved_here(browser: Any, tmp_path: Path) -> None:
    """Let the browser save a test's files in its own folder."""
    browser.folder = tmp_path
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)


def pixels(browser: Any, canvas: str) -> np.ndarray:
    """Return a square canvas as (y, x, rgb) levels."""
    values = np.array(browser.execute_script(PIXELS, canvas), np.uint8)
    side = int((values.size / 4) ** 0.5)
    return values.reshape(side, side, 4)[..., :3]


def button(browser: Any, part: str, text: str) -> Any:
    (found,) = [
        one
        for one in browser.find_elements("css selector", f"{part} button")
        if one.get_attribute("textContent") == text
    ]
    return found


def saved(browser: Any, name: str) -> Path:
    """Wait until a file was saved, whole."""
    file = browser.folder / name
    for _ in range(300):
        if file.exists() and file.stat().st_size:
            return Path(file)
        time.sleep(0.1)
    raise AssertionError(f"{name} was not saved: {list(browser.folder.iterdir())}")


def slide(browser: Any, control: str, value: float) -> None:
    browser.execute_script(
        "const c = document.querySelector(arguments[0]); c.value = arguments[1];"
        "for (const kind of ['input', 'change']) c.dispatchEvent(new Event(kind, {bubbles: true}))",
        control,
        str(value),
    )


def recorded(browser: Any, part: str) -> dict[str, Any]:
    """Return the fields of the YAML that a part of the page shows, with its picture's path."""
    text = browser.execute_script(f"return document.querySelector('{part} pre').textContent")
    fields: dict[str, Any] = yaml.safe_load(text)
    for name in ("image", "picture"):
        if name in fields:
            fields[name] = str(browser.folder / fields[name])
    return fields


def test_a_run_begins_from_what_is_painted(browser: Any, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    look(browser, 1280)
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    browser.find_element("css selector", "#start summary").click()
    canvas = browser.find_element("css selector", PANEL)
    browser.find_element("css selector", "#start [aria-label='orange']").click()
    chain = ActionChains(browser).move_to_element(canvas).click_and_hold()
    chain.move_by_offset(40, 30).move_by_offset(-70, 10).release().perform()
    painted = pixels(browser, PANEL)
    assert (painted[0, 0] == 255).all() and tuple(painted[64, 64]) == (242, 140, 40)
    button(browser, "#start", "Fill").click()
    assert (pixels(browser, PANEL) == painted[64, 64]).all()
    button(browser, "#start", "Undo").click()
    assert (pixels(browser, PANEL) == painted).all()
    assert serious(browser) == []

    button(browser, "#start", "Draw from this picture").click()
    drawn(browser, 2)
    until(browser, "location.search.includes('start=')")
    query = parse_qs(urlsplit(browser.current_url).query)
    assert query["strength"] == ["0.6"]
    assert query["start"][0].startswith("drawing-") and "<" not in query["start"][0]
    card = browser.find_element("css selector", ".card small").text
    assert "from a picture at strength 0.6" in card
    button(browser, "#touch", "The picture it began from (PNG)").click()
    fields = recorded(browser, "#touch")
    with Image.open(saved(browser, Path(fields["image"]).name)) as read:
        assert (np.asarray(read.convert("RGB")) == painted).all()
    run = probe.record(fields, output=None, progress=False)
    assert len(run.steps) == 3, "0.6 of 5 steps"
    page = pixels(browser, FINAL).astype(int)
    assert abs(run.images.values[0].astype(int) - page).max() <= 1, "the same picture as Python"

    browser.get(browser.current_url)
    drawn(browser, 1)
    said = browser.find_element("css selector", "#start [role='status']").text
    assert "no address can hold" in said and query["start"][0] in said
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []


def test_a_run_begins_from_a_run_whose_address_draws_both(browser: Any, address: str) -> None:
    look(browser, 320)
    opened(browser, f"{address}?prompt=an+owl&{FEW}")
    browser.find_element("css selector", "#start summary").click()
    until(browser, "document.documentElement.scrollWidth <= 320")
    assert serious(browser) == []
    button(browser, "#start", "The picture I look at").click()
    assert (pixels(browser, PANEL) == pixels(browser, FINAL)).all()
    slide(browser, "#strength", 0.45)
    button(browser, "#start", "Draw from this picture").click()
    drawn(browser, 2)
    until(browser, "location.search.includes('start=prompt')")
    picture = pixels(browser, FINAL)
    browser.get(browser.current_url)
    drawn(browser, 2)
    until(browser, "!document.body.classList.contains('busy')")
    assert (pixels(browser, FINAL) == picture).all(), "the address draws the owl, then from it"
    until(browser, "!document.getElementById('touch').hidden")
    assert "no first noise" in browser.find_element("id", "touch").text
    assert complaints(browser) == []


def test_files_are_read_or_refused_in_words(browser: Any, address: str, tmp_path: Path) -> None:
    look(browser)
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    browser.find_element("css selector", "#start summary").click()
    file = browser.find_element("css selector", "#start input[type=file]")
    said = browser.find_element("css selector", "#start [role='status']")

    def chosen(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        browser.execute_script("arguments[0].textContent = ''", said)
        file.send_keys(str(tmp_path / name))
        until(browser, "document.querySelector('#start [role=status]').textContent")
        return str(said.text)

    before = pixels(browser, PANEL)
    svg = (
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.pwned=1'><script>1</script></svg>"
    )
    none = "This is no PNG, JPEG or WebP picture. Save it as one of them."
    assert chosen("text<img src=x>.png", b"just text") == none
    assert chosen("drawing.png", svg) == none
    assert chosen("nothing.png", b"") == none
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    huge = head + (100_000).to_bytes(4, "big") * 2 + b"\x08\x06\0\0\0"
    assert "100000 x 100000 pixels" in chosen("huge.png", huge)
    cut = head + (64).to_bytes(4, "big") * 2 + b"\x08\x06\0\0\0"
    assert "cannot be read" in chosen("cut.png", cut)
    assert (pixels(browser, PANEL) == before).all(), "what was there stays"
    wide = np.zeros((100, 300, 4), np.uint8)
    wide[:, 100:200] = (250, 10, 20, 255)
    wide[:, 120] = 0  # transparent: white shines through
    Image.fromarray(wide).save(tmp_path / "wide-source.png")
    text = chosen("wide.png", (tmp_path / "wide-source.png").read_bytes())
    assert (
        text
        == "Its middle, 100 x 100 of 300 x 100 pixels, is scaled to the model’s size, 128 x 128."
    )
    middle = pixels(browser, PANEL)
    assert tuple(middle[64, 100]) == (250, 10, 20) and middle[64, 26].min() > 150
    square = np.full((128, 128, 3), 200, np.uint8)
    square[5, 7] = (1, 2, 3)
    Image.fromarray(square).save(tmp_path / "square.png")
    for number, (kind, part) in enumerate([("drop", "main"), ("paste", "#prompt input")]):
        button(browser, "#start", "Clear").click()
        browser.execute_script(GIVEN, kind, part, list((tmp_path / "square.png").read_bytes()))
        until(browser, "document.querySelector('#start [role=status]').textContent")
        assert said.text == "It has the model’s size, 128 x 128 pixels.", number
        assert (pixels(browser, PANEL) == square).all(), kind
    assert browser.execute_script("return window.pwned ?? 0") == 0
    assert complaints(browser) == []


def test_noise_is_nudged(browser: Any, address: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    look(browser, 1280)
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    until(browser, "!document.getElementById('touch').hidden")
    draw = button(browser, "#touch", "Draw from the nudged noise")
    slide(browser, "#touch input[type=number]", 5)
    assert not draw.is_enabled(), "its own noise"
    slide(browser, "#touch input[type=number]", 7)
    slide(browser, "#nudge", 0.4)
    draw.click()
    player = drawn(browser, 2)
    until(browser, "location.search.includes('noise=7+0.4')")
    assert len(player.find_elements("css selector", ".row")) == 3, "beside the one it came from"
    assert "0.4 of the noise of seed 7" in browser.find_element("css selector", ".card small").text
    fields = recorded(browser, "#touch")
    assert fields["edits"] == [{"kind": "noise", "seed": 7, "amount": 0.4}]
    run = probe.record(fields, output=None, progress=False)
    page = pixels(browser, FINAL).astype(int)
    assert abs(run.images.values[0].astype(int) - page).max() <= 1

    places = browser.find_element("css selector", "#touch .places")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", places)
    ActionChains(browser).move_to_element(places).click().perform()
    browser.execute_script("arguments[0].focus()", places)
    press(browser, Keys.ARROW_RIGHT, Keys.ENTER)
    assert "changed at 6 of 256 places" in browser.find_element("id", "touch").text
    assert serious(browser) == []
    draw.click()
    drawn(browser, 3)
    until(browser, "document.querySelector('#touch pre').textContent.includes('.npy')")
    assert "noise of seed 7 at 6 places" in browser.find_element("css selector", ".card small").text
    (edit,) = recorded(browser, "#touch")["edits"]
    button(browser, "#touch", "Its first noise (.npy)").click()
    edit["file"] = str(saved(browser, edit["file"]))
    run = probe.record(
        {**recorded(browser, "#touch"), "edits": [edit]}, output=None, progress=False
    )
    picture = pixels(browser, FINAL).astype(int)
    assert abs(run.images.values[0].astype(int) - picture).max() <= 1
    assert abs(picture - page).max() > 10
    assert complaints(browser) == []


def test_a_picture_is_noised(browser: Any, address: str) -> None:
    look(browser, 1280)
    opened(browser, f"{address}?prompt=a+fox&{FEW}")
    until(browser, "!document.getElementById('noising').hidden")
    section = browser.find_element("id", "noising")
    loss = "document.querySelector('#noising .loss').textContent"
    assert browser.execute_script(f"return {loss}") == "", "nothing is computed out of sight"
    browser.execute_script("arguments[0].scrollIntoView()", section)
    until(browser, f"{loss}.startsWith('Loss')")
    slide(browser, "#noising input[type=number]", -3)
    until(browser, f"{loss}.startsWith('A seed is a whole number')")
    slide(browser, "#noising input[type=number]", 3)
    slide(browser, "#timestep", 300)
    until(browser, "document.querySelector('#noising output').textContent.startsWith('300:')")
    until(browser, "document.querySelector('#noising pre').textContent.includes('seed: 3')")
    until(browser, "document.getElementById('noising').dataset.decoded === 'true'")
    text = browser.execute_script(f"return {loss}")
    guess = pixels(browser, "#noising figure:nth-of-type(5) canvas").astype(int)
    button(browser, "#noising", "Loss at twelve timesteps").click()
    until(browser, "document.querySelector('.curve canvas').getAttribute('aria-label')")
    losses = browser.find_element("css selector", ".curve canvas").get_attribute("aria-label")
    assert serious(browser) == []
    browser.find_element("css selector", "#noising summary").click()
    button(browser, "#noising", "The picture (PNG)").click()
    fields = recorded(browser, "#noising")
    saved(browser, Path(fields["picture"]).name)

    run = probe.record_noising(output=None, progress=False, **fields)
    measured = run.variable("forward/loss").values[:, 0]
    told = losses.split(". ")[0].removeprefix("Loss with the words: ").split(", ")
    assert [int(one.split(" at ")[1]) for one in told] == run.variable("timestep").values.tolist()
    assert [float(one.split(" at ")[0]) for one in told] == pytest.approx(measured, rel=6e-3)
    at = fields["timesteps"].index(300)
    assert float(text.split(":")[0].removeprefix("Loss ")) == pytest.approx(measured[at], rel=6e-3)
    assert abs(run.variable("decoded/picture").values[at, 0].astype(int) - guess).max() <= 1
    look(browser, 320)
    until(browser, "document.documentElement.scrollWidth <= 320")
    assert serious(browser) == []
    assert asked(browser) == {"127.0.0.1"} and complaints(browser) == []
