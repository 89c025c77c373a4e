"""Pixels against latents as one page: `probe export --pixels FILE`. It fetches nothing.

It has what the dashboard's view has. What a reader chooses there is chosen here from figures that
the page holds already.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from plotly.offline import get_plotlyjs

from probe.figures import pixels, pixels_trained
from probe.figures.page import STYLE, asset, head, player_script
from probe.figures.pixels_looks import Shown, name_of, space_text
from probe.figures.pixels_tables import Table, beside_paper, table_html, trained_table
from probe.figures.pixels_trained import AXES, CHARGES, COSTLY, QUALITIES, Trained
from probe.figures.plots import CONFIG
from probe.reading.pixels import FOLDER, Counts, Measured, measured, paper
from probe.reading.recording import Run

TITLE = "Pixels against latents"
LESSON = (
    "Stable Diffusion does not diffuse pixels. An autoencoder squeezes the picture first, by f "
    "along each side; the denoiser works on what is left, and the decoder paints once at the end. "
    "What that saves is counted, measured and trained here, beside what the paper measured."
)
OF_RUNS = (
    "A run on pixels beside one on latents, at the same noise level. On pixels what is diffused is "
    "the picture itself, and nothing is decoded."
)
RECORD = (
    "python -m probe.run experiments/astronaut.yaml --model emojiworld-pixels\n"
    "python -m probe.run experiments/astronaut.yaml --model emojiworld-latents"
)
ROUND_TRIPS = FOLDER / "round-trips.webp"
OF_ROUND_TRIPS = (
    "What is lost, as pictures: as they are, and below through encoder and decoder of f = 2, 4 "
    "and 8. The autoencoders were trained on emoji alone; of a photograph they keep colours and "
    "large shapes."
)
PAGE_STYLE = """
h2 { font-size: 20px; margin: 34px 0 6px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 18px 28px; }
figure { margin: 0; min-width: 0; }
figcaption, .note { margin: 6px 0; }
pre { font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
select { font: inherit; max-width: 100%; }
label { display: inline-block; margin-right: 14px; }
.scroll { overflow-x: auto; }
.scroll img { width: 100%; min-width: 720px; image-rendering: pixelated; }
.plot text:not(.hoverlayer text) { fill: currentColor !important; }
"""
DRAW = """
const config = JSON.parse(document.getElementById("config").textContent);
for (const figure of document.querySelectorAll("figure.chart")) {
  const choices = JSON.parse(figure.querySelector("script").textContent);
  const selects = [...figure.querySelectorAll("select")];
  const draw = () => {
    const chosen = choices[selects.map((select) => select.value).join(" ")];
    Plotly.react(figure.querySelector(".plot"), chosen.data, chosen.layout, config);
    figure.querySelector("figcaption").textContent = chosen.caption;
    figure.querySelector("pre").textContent = chosen.command;
  };
  for (const select of selects) select.addEventListener("change", draw);
  draw();
}
"""


def measured_here() -> Measured | None:
    """Return what was measured, or None if the package has no measurements."""
    return measured() if (FOLDER / "measured.json").is_file() else None


Figures: TypeAlias = dict[tuple[str, ...], Shown]


class Switch(NamedTuple):
    """Figures of which a reader sees one at a time: its controls, and a figure for each choice.

    `controls` are a label and the values with their texts; a key of `figures` is one value of each.
    """

    controls: Sequence[tuple[str, Mapping[str, str]]]
    figures: Figures


def only(shown: Shown) -> Switch:
    """Return one figure without a choice."""
    return Switch((), {(): shown})


def pixels_page(
    counts: Counts,
    times: Measured | None,
    trained: Trained | None,
    recorded: Mapping[str, Mapping[str, float]],
    runs: Sequence[Run] = (),
) -> str:
    """Return the page. `recorded` has the seconds of the parts of runs; `runs` are played in it."""
    beside = beside_paper(counts, times, paper(), trained)
    parts = [
        _section("What a call costs", _plots(_of_cost(counts))),
        _section("What it is spent on", _plots(_of_kinds(counts))),
        _section("Time and memory", _plots(_of_time(counts, times, recorded))),
        _section("Two runs in step", _of_runs(runs)),
        _section("Quality against cost", _of_training(trained)),
        _section("What is lost", _of_loss(trained)),
        _section(beside.title, _table(beside)),
    ]
    style = STYLE + PAGE_STYLE + (asset("player.css") if runs else "")
    player = player_script(runs) if runs else ""
    return f"""{head(TITLE, style)}
<body data-runs="{len(runs)}">
<main>
<h1>{TITLE}</h1>
<p class="note">{html.escape(LESSON)}</p>
{"".join(parts)}</main>
<script type="application/json" id="config">{_json({**CONFIG, "responsive": True})}</script>
<script>{get_plotlyjs()}</script>
<script type="module">{DRAW}</script>
{player}</body>
</html>
"""


# --- sections -------------------------------------------------------------------------------------


def _of_cost(counts: Counts) -> list[Switch]:
    models = {model: name_of(model) for model in counts.models}
    of_model = [("Model", models)]
    spaces = {str(f): space_text(f) for f in _common_factors(counts) if f > 1}
    sizes = {model: pixels.usual_size(counts, model) for model in models}
    by_size: Figures = {(model,): pixels.cost_by_size(counts, model) for model in models}
    by_f: Figures = {(model,): pixels.cost_by_f(counts, model, sizes[model]) for model in models}
    factors: Figures = {
        (model, f): pixels.factors(counts, model, int(f), sizes[model])
        for model, f in itertools.product(models, spaces)
    }
    return [
        Switch([*of_model, ("Latents", spaces)], factors),
        Switch(of_model, by_size),
        Switch(of_model, by_f),
    ]


def _common_factors(counts: Counts) -> list[int]:
    """Return the f that were counted of every model, that of Stable Diffusion first."""
    found = set.intersection(*(set(counts.factors_of(model)) for model in counts.models))
    return sorted(found, key=lambda f: (f != 8, f))


def _of_kinds(counts: Counts) -> list[Switch]:
    models = {model: name_of(model) for model in counts.models}
    spaces = {str(f): space_text(f) for f in _common_factors(counts)}
    shares: Figures = {
        (model, f): pixels.shares_by_size(counts, model, int(f))
        for model, f in itertools.product(models, spaces)
    }
    matrices: Figures = {(model,): pixels.attention_bytes(counts, model) for model in models}
    return [
        Switch([("Model", models), ("Space", spaces)], shares),
        Switch([("Model", models)], matrices),
    ]


def _of_time(
    counts: Counts, times: Measured | None, recorded: Mapping[str, Mapping[str, float]]
) -> list[Switch]:
    shares = only(pixels.shares(recorded, counts))
    if times is None:
        return [shares]
    models = {cell.model: name_of(cell.model) for cell in times.cells}
    seconds: Figures = {(model,): pixels.law(times, model, "seconds") for model in models}
    memory: Figures = {(model,): pixels.law(times, model, "call_bytes") for model in models}
    control = [("Model", models)]
    return [Switch(control, seconds), Switch(control, memory), shares]


def _of_runs(runs: Sequence[Run]) -> str:
    text = f'<p class="note">{html.escape(OF_RUNS)}</p>\n'
    if runs:
        return f'{text}<div id="player"></div>\n'
    return (
        f'{text}<p class="note">No runs were named. These record two; name both before '
        f"<code>--pixels</code>:</p>\n<pre>{html.escape(RECORD)}</pre>\n"
    )


def _of_training(trained: Trained | None) -> str:
    if trained is None:
        text, command = html.escape(pixels_trained.MISSING), html.escape(pixels_trained.TRAIN)
        return f'<p class="note">{text}</p>\n<pre>{command}</pre>\n'
    figures: Figures = {}
    for y, x, charge in itertools.product(QUALITIES, AXES, CHARGES):
        if x not in COSTLY and charge != "charged":  # nothing is charged in steps
            figures[y, x, charge] = figures[y, x, "charged"]
            continue
        shown = pixels_trained.quality(trained, y, x, charge)
        notes = " ".join(pixels_trained.said(trained, y, x, charge))
        figures[y, x, charge] = shown._replace(caption=f"{shown.caption} {notes}")
    charges = {charge: text for charge, (text, _) in CHARGES.items()}
    controls: list[tuple[str, Any]] = [
        ("Quality", QUALITIES),
        ("Against", AXES),
        ("The autoencoder", charges),
    ]
    plots = [
        only(pixels_trained.by_count(trained, "kid")),
        only(pixels_trained.by_count(trained, "fd")),
    ]
    table = trained_table(trained)
    return _plots([Switch(controls, figures)]) + _table(table) + _plots(plots)


def _of_loss(trained: Trained | None) -> str:
    parts = []
    if trained is not None:
        plots = [only(pixels_trained.distortion(trained, what)) for what in ("psnr", "ssim")]
        parts.append(_plots(plots))
    if ROUND_TRIPS.is_file():
        text = html.escape(OF_ROUND_TRIPS)
        parts.append(
            f'<figure><div class="scroll" tabindex="0" role="region" aria-label="What is lost">'
            f"{round_trips()}</div><figcaption>{text}</figcaption></figure>\n"
        )
    if not parts:
        return f'<p class="note">{html.escape(pixels_trained.MISSING)}</p>\n'
    return "".join(parts)


def round_trips() -> str:
    """Return the picture of what is lost as an element, with its text for who does not see it."""
    picture = base64.b64encode(ROUND_TRIPS.read_bytes()).decode()
    return f'<img src="data:image/webp;base64,{picture}" alt="{html.escape(OF_ROUND_TRIPS)}">'


# --- HTML -----------------------------------------------------------------------------------------


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{content}</section>\n"


def _plots(switches: Iterable[Switch]) -> str:
    return f'<div class="plots">\n{"".join(map(_chart, switches))}</div>\n'


def _chart(switch: Switch) -> str:
    """Return figures with their controls. Each figure lies beside them as JSON."""
    selects = "".join(
        f"<label>{html.escape(label)} <select>"
        + "".join(
            f'<option value="{html.escape(value)}">{html.escape(text)}</option>'
            for value, text in values.items()
        )
        + "</select></label>\n"
        for label, values in switch.controls
    )
    figures = {
        " ".join(key): {
            **json.loads(shown.figure.to_json()),
            "caption": shown.caption,
            "command": shown.command,
        }
        for key, shown in switch.figures.items()
    }
    for figure in figures.values():
        figure["layout"].pop("template", None)
    return (
        f'<figure class="chart">\n{selects}<div class="plot"></div>\n<figcaption></figcaption>\n'
        f'<pre></pre>\n<script type="application/json">{_json(figures)}</script>\n</figure>\n'
    )


def _table(table: Table) -> str:
    caption, command = html.escape(table.caption), html.escape(table.command)
    return (
        f"<figure>\n{table_html(table)}\n<figcaption>{caption}</figcaption>\n"
        f"<pre>{command}</pre>\n</figure>\n"
    )


def _json(value: Any) -> str:
    """Return JSON that cannot end the element that it stands in."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
