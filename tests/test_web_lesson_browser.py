"""The lesson in a real browser: its figures compute, and it keeps out of the drawing view's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browsers import asked, complaints, ink, look, press, serious
from web_pages import FEW, WEB, drawn, opened, until

pytestmark = WEB
SAID = "return document.getElementById('said').textContent"
CHAPTERS = ("line", "text", "steps", "noise", "latents", "model")
NARROW = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"

# Drop a picture on the lesson's text. Return whether it went nowhere.
DROP = """
let heard = 0;
for (const kind of ['dragover', 'drop']) document.body.addEventListener(kind, () => heard++);
const data = new DataTransfer();
data.items.add(new File(['x'], 'x.png', {type: 'image/png'}));
return ['dragover', 'drop'].every((kind) => !document.querySelector('#lesson h1').dispatchEvent(
  new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}))) && heard === 0
"""
SLIDE = """
const [slider, value] = arguments;
slider.value = value;
for (const kind of ['input', 'change']) slider.dispatchEvent(new Event(kind, {bubbles: true}));
"""
HEARD = "document.querySelector('#{lang}-{chapter}-figure [role=status]').textContent"


def figure(browser: Any, lang: str, chapter: str) -> Any:
    """Bring a figure of the lesson into view, wait until it is computed and return it."""
    found = f"document.getElementById('{lang}-{chapter}-figure')"
    until(browser, found)
    browser.execute_script(f"{found}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    until(browser, f"['computed', 'failed', 'stopped'].includes({found}.dataset.state)")
    element = browser.execute_script(f"return {found}")
    assert element.get_attribute("data-state") == "computed", element.text
    return element


def ask(browser: Any, element: Any, *texts: str) -> None:
    """Type into a figure's fields, send them and wait until it is computed."""
    for field, text in zip(
        element.find_elements("css selector", "[type=text]"), texts, strict=True
    ):
        field.clear()
        field.send_keys(text)
    element.find_element("css selector", ".main").click()
    waiting = "document.querySelector('.live[data-state=computing]') === null"
    until(browser, waiting)


def texts(element: Any, which: str) -> list[str]:
    return [one.text for one in element.find_elements("css selector", which)]


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_every_figure_of_the_lesson_computes(browser: Any, address: str, lang: str) -> None:
    look(browser, 1280)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(f"{address}#{lang}")
    for chapter in CHAPTERS:
        element = figure(browser, lang, chapter)
        assert any(letter.isdigit() for letter in element.find_element("class name", "facts").text)
        assert len({ink(browser, element, "canvas"), 0}) == 2, chapter
    root = browser.find_element("tag name", "html")
    assert root.get_attribute("lang") == lang and "{" not in root.text
    links = texts(browser.find_element("id", "views"), "a[aria-current]")
    assert links == [{"en": "Lesson", "ko": "수업"}[lang]]
    assert serious(browser) == [] and not browser.find_element("id", "drawing").is_displayed()
    assert not browser.find_elements("class name", "card"), "nothing is drawn for a hidden view"
    look(browser, 320, dark=True)
    assert until(browser, NARROW) and serious(browser) == []

    assert browser.execute_script(DROP), "no picture reaches the hidden view"
    ask(browser, figure(browser, lang, "text"), "a fox on the moon", "a car on the moon")
    alike = texts(figure(browser, lang, "text"), ".position:not(.names) .alike")
    assert alike[:2] == ["1", "1"], "a vector looks back alone"
    assert len(alike) == 7 and all(float(one) < 1 for one in alike[2:])

    for chapter, value in (("steps", "0"), ("noise", "900")):
        element = figure(browser, lang, chapter)
        facts = element.find_element("class name", "facts").text
        slider = element.find_element("css selector", "[type=range]")
        browser.execute_script(SLIDE, slider, value)
        until(browser, f"{HEARD.format(lang=lang, chapter=chapter)} !== {facts!r}")
        heard = browser.execute_script(f"return {HEARD.format(lang=lang, chapter=chapter)}")
        assert heard.startswith(element.find_element("class name", "facts").text), "and heard"
    assert asked(browser) <= {"127.0.0.1"} and complaints(browser) == []


def test_the_lesson_and_the_drawing_view_keep_out_of_each_others_way(
    browser: Any, address: str
) -> None:
    look(browser, 1280)
    opened(browser, f"{address}?prompt=an+owl&{FEW}&step=2")
    until(browser, "location.search.includes('step=2')")
    browser.find_element("css selector", "#views [href='#en']").click()
    line = figure(browser, "en", "line")
    term = browser.find_element("css selector", "button.term")
    term.click()
    until(browser, "document.querySelector('.meaning:popover-open')")
    assert "One call of the model" in browser.find_element("css selector", ":popover-open").text
    press(browser, "\ue00c")  # escape
    assert not browser.find_elements("css selector", ":popover-open")
    ask(browser, line, "an astronaut scuba diving")
    assert "The same picture as before" in line.find_element("class name", "facts").text
    browser.back()
    assert "#" not in browser.current_url and "step=2" in browser.current_url
    assert browser.find_element("class name", "probe").get_attribute("data-step") == "2"
    assert len(browser.find_elements("class name", "card")) == 1, "what the lesson drew is its own"

    browser.forward()
    line.find_element("class name", "open").click()
    drawn(browser, 2)
    until(browser, "location.search.includes('astronaut')")
    assert browser.find_element("id", "drawing").is_displayed()
    browser.back()
    until(browser, "!document.getElementById('lesson').hidden")

    line.find_element("css selector", "[type=number]").send_keys("7")
    line.find_element("class name", "main").click()
    until(browser, "document.querySelector('[data-state=computing] progress').value > 0")
    browser.find_element("css selector", "#views [href='#drawing']").click()
    browser.find_element("id", "draw").click()
    drawn(browser, 3)
    until(browser, "!document.querySelector('[data-state=computing]')")
    # "computed" where it had drawn its last step already
    assert line.get_attribute("data-state") in ("stopped", "computed")
    assert "Drawn in" in browser.execute_script(SAID) and complaints(browser) == []


def test_the_lesson_is_in_the_one_file(browser: Any, built: Path) -> None:
    look(browser, 390)
    browser.get_log("performance")
    browser.get_log("browser")
    browser.get(f"{(built / 'diffusion.html').as_uri()}?prompt=an+owl&{FEW}#ko-latents")
    element = figure(browser, "ko", "latents")
    painted = float(element.get_attribute("data-psnr"))
    element.find_elements("css selector", ".chips button")[1].click()
    until(browser, f"document.querySelector('[data-psnr]').dataset.psnr !== '{painted}'")
    assert float(element.get_attribute("data-psnr")) < painted - 5, "as the answer says"
    assert until(browser, NARROW)
    browser.find_element("css selector", "#views [href='#drawing']").click()
    drawn(browser, 1)
    assert asked(browser) == {""} and complaints(browser) == []
