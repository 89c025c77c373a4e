"""The recordings of the lesson as pages that play by themselves: `deep_dive --html FOLDER`.

Beside each stands what the lesson says about it, read from the lesson itself. A page is one file
that fetches nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from probe.figures.page import page
from probe.reading.recording import Run

# Headings of the lesson, and how many paragraphs below each stand in the page.
FORWARD = {"Forward: ruin a picture, knowingly": 4, "Training: get better at exactly this": 2}
BACKWARD = {"Backward: out of nothing but noise": 2, "How the words get in": 2}
SIGNS = {
    r"\bar\alpha": "ᾱ",
    r"\varepsilon": "ε",
    r"\mathbb{E}_{x_0,t,ε}": "the mean over x_0, t and ε of",
    r"\theta": "θ",
    r"\text{text}": "text",
    "^2": "²",
    r"\,": " ",
    r"\;": " ",
    r"\|": "|",
    "**": "",
    "`": "",
    "$": "",
}


def write_pages(folder: Path, lesson: Path, noised: Run, drawn: Run) -> list[Path]:
    """Write a page of the noising and one of the run into a folder. Return their paths."""
    source = lesson.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"forward": (noised, FORWARD), "backward": (drawn, BACKWARD)}
    paths = []
    for name, (run, headings) in pages.items():
        notes = [
            note
            for heading, count in headings.items()
            for note in explanation(source, heading)[:count]
        ]
        path = folder / f"{name}.html"
        title = next(iter(headings))
        path.write_text(page([run], title=title, notes=notes), encoding="utf-8")
        paths.append(path)
    return paths


def explanation(source: str, heading: str) -> list[str]:
    """Return the paragraphs below a heading of the lesson, as plain text.

    Raise ValueError if there is no such heading.
    """
    _, found, rest = source.partition(f"# ### {heading}\n")
    if not found:
        raise ValueError(f"The lesson has no heading {heading!r}.")
    cell = rest.partition("\n# %%")[0]
    lines = [line.removeprefix("#").strip() for line in cell.splitlines()]
    paragraphs = "\n".join(lines).split("\n\n")
    return [plain(" ".join(text.split())) for text in paragraphs if text.strip()]


def plain(text: str) -> str:
    """Return Markdown with formulas as text: their signs are written out."""
    text = re.sub(r"\\sqrt\{((?:[^{}]|\{[^{}]*\})*)\}", r"√(\1)", text)
    for mark, sign in SIGNS.items():
        text = text.replace(mark, sign)
    return re.sub(r"\*(\w+)\*", r"\1", text)
