"""A recording as one page that plays by itself: `probe export RUN --html FILE`.

The page holds the player, its looks and the payloads. It fetches nothing and plays from a disk,
offline.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from importlib import resources

from probe.figures.bundle import facts, payload, prompt_of
from probe.figures.channels import layers_and_heads
from probe.figures.payload import unpack
from probe.reading.recording import Run

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: "
    "blob:; "
    "base-uri 'none'; form-action 'none'"
)
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 1240px; margin: 28px auto 60px; padding: 0 24px;
  font: 15px/1.5 system-ui, sans-serif;
  color: light-dark(#1b1d22, #e9e9ec); background: light-dark(#fff, #15161a); }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
.facts { opacity: .8; margin: 0 0 18px; overflow-wrap: anywhere; }
.notes { columns: 2 380px; column-gap: 32px; margin: 0 0 22px; }
.notes p { margin: 0 0 10px; overflow-wrap: anywhere; break-inside: avoid; }
"""
START = """
const raw = (name) => {
  const text = document.getElementById(name)?.textContent;
  return text ? Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)) : null;
};
const count = Number(document.body.dataset.runs);
const ask = async (run, what) => raw(`run${run}-${what.what}-${what.channel ?? what.of}`);
const runs = [];
for (let i = 0; i < count; i++) runs.push(await open(raw(`run${i}`)));
const { steps } = runs[0].meta;
const changed = (now) => {
  if (location.protocol === "about:") return; // in a notebook there is no address to keep it in
  history.replaceState(null, "", toAddress(location.search, now, steps) + location.hash);
};
const options = { ask, changed, full: false, state: fromAddress(location.search, steps) };
mount(document.getElementById("player"), runs, options);
"""


def asset(name: str) -> str:
    """Return the text of a file of the player, such as player.css."""
    return resources.files("probe.figures").joinpath(name).read_text(encoding="utf-8")


def head(title: str, style: str) -> str:
    """Return the head of a page that fetches nothing. `title` is escaped already."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>"""


def script() -> str:
    """Return the player as one module: its three files without their imports of each other."""
    lines = "".join(asset(f"{name}.js") for name in ("payload", "drawing", "player")).splitlines()
    return "\n".join(line for line in lines if not line.startswith("import ")) + "\n"


def page(
    runs: Sequence[Run], everything: bool = True, title: str = "", notes: Sequence[str] = ()
) -> str:
    """Return a page with one to four runs, side by side.

    With `everything` it has every word in every layer and head. The title is the first run's prompt
    unless another is given. `notes` are paragraphs above the player. Both are shown as plain text.
    Raise RecordingDamaged, RecordingUnreadable.
    """
    heading = html.escape(title or prompt_of(runs[0]) or runs[0].name)
    text = "".join(f"<p>{html.escape(note)}</p>\n" for note in notes)
    beside = f'<section class="notes">\n{text}</section>\n' if text else ""
    made = html.escape("  ·  ".join(facts(run) for run in runs))
    return f"""{head(heading, STYLE + asset("player.css"))}
<body data-runs="{len(runs)}">
<main>
<h1>{heading}</h1>
<p class="facts">{made}</p>
{beside}<div id="player"></div>
</main>
{player_script(runs, everything)}</body>
</html>
"""


def player_script(runs: Sequence[Run], everything: bool = True) -> str:
    """Return what plays runs in the element `player` of a page whose body has `data-runs`."""
    data = "".join(
        _held(f"run{index}{name}", content)
        for index, run in enumerate(runs)
        for name, content in _payloads(run, everything)
    )
    code = script().replace("</", "<\\/")
    return f"""{data}<script type="module">
{code}
{START}</script>
"""


def _held(name: str, content: bytes) -> str:
    """Return bytes as an element that a page holds and no browser runs."""
    text = base64.b64encode(content).decode()
    return f'<script type="application/octet-stream" id="{name}">{text}</script>\n'


def _payloads(run: Run, everything: bool) -> list[tuple[str, bytes]]:
    """Return what the player may ask of a run, by the name that it asks with."""
    whole = payload(run)
    head, _ = unpack(whole)
    found = [("", whole)]
    if everything and "channels" in head["meta"]:
        count = len(head["meta"]["channels"])
        found += [(f"-heads-{index}", layers_and_heads(run, index)) for index in range(count)]
    return found
