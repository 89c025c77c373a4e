"""Tables of pixels against latents: beside the paper, and what was trained; as rows, and as HTML.

beside_paper(counts(), measured(), paper(), trained())
table_html(table)                          # every text escaped; it looks right in light and dark
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from probe.figures.pixels_looks import name_of, times_text
from probe.figures.pixels_trained import TRAIN, Trained, score_of, trained_rows
from probe.reading.pixels import Cell, Counts, Measured, Paper, PaperRow

EMPTY = "-"
STYLE = """<style>
.px-table{overflow-x:auto;font-size:.875rem;line-height:1.4}
.px-table table{border-collapse:collapse;width:100%}
.px-table th,.px-table td{text-align:left;vertical-align:top;padding:.3rem .7rem .3rem 0;
min-width:4.6rem;border-bottom:1px solid color-mix(in srgb,currentColor 22%,transparent)}
.px-table td:last-child{padding-right:0}
.px-table .long{min-width:16rem}
</style>"""
NETWORKS = (
    "The paper timed other networks, with a decoder and all that takes time beside the denoiser, "
    "on one GPU; we count or time one call of one UNet at both sizes."
)
SMALL = "Ours are pictures of 64 pixels of emoji and 4 million parameters, trained for minutes."


class Table(NamedTuple):
    """A table that explains itself. Cells are plain text."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    command: str


def table_html(table: Table) -> str:
    """Return a table as HTML that scrolls by itself where the page is narrow."""
    heads = "".join(f"<th scope='col'>{html.escape(head)}</th>" for head in table.heads)
    body = "".join(
        "<tr>" + "".join(f"<td{_wide(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    name = html.escape(table.title, quote=True)
    return (
        f"{STYLE}<div class='px-table' tabindex='0' role='region' aria-label='{name}'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _wide(cell: str) -> str:
    return " class='long'" if len(cell) > 60 else ""


# --- beside the paper -----------------------------------------------------------------------------


def beside_paper(
    counts: Counts, measured: Measured | None, paper: Paper, trained: Trained | None
) -> Table:
    """Return the paper's comparisons, ours in the same rows, and why they differ.

    The head of a column is the label of its cells.
    """
    heads = ["how many times better", "paper", "counted", "measured here", "extrapolated", "why"]
    rows = [
        [
            f"{row.what}, f = {row.f}",
            _published(row),
            _counted(row, counts, trained),
            _measured(row, measured, trained),
            _extrapolated(row, measured),
            _why(row, trained),
        ]
        for row in paper.rows
    ]
    caption = (
        f"{paper.source}. {paper.note} A cell is what the head of its column says: taken from the "
        "paper, counted without weights, measured here, or a law drawn beyond what was measured."
    )
    title = "Beside the paper"
    command = "\n".join([counts.made_by, *([measured.made_by] if measured else []), TRAIN])
    return Table("beside_paper", title, heads, rows, caption, command)


def _published(row: PaperRow) -> str:
    if row.pixels is None or row.latents is None:
        return f"{row.gap:g} {row.unit} better ({row.where})"
    times = "" if row.times is None else f": x{row.times:.2f}"
    return f"{row.pixels:g} to {row.latents:g} {row.unit}{times} ({row.where})"


def _counted(row: PaperRow, counts: Counts, trained: Trained | None) -> str:
    if row.size is not None and row.of_time:
        if not all(counts.has("sd14", f, row.size) for f in (1, row.f)):
            return EMPTY
        found = counts.factors("sd14", row.f, row.size)
        return (
            f"{times_text(found.full)} the same UNet, {times_text(found.coarse)} with attention up "
            f"to {counts.attention_up_to} x {counts.attention_up_to} alone, "
            f"{times_text(found.convolution)} convolution (a call of SD 1.x)"
        )
    pair = _pair(trained, row.f) if row.name == "epoch" else None
    if pair is None:
        return EMPTY
    times = pair[0]["training_step_flops"] / pair[1]["training_step_flops"]
    return f"{times_text(times)} (a training step at 64 pixels)"


def _measured(row: PaperRow, measured: Measured | None, trained: Trained | None) -> str:
    if row.size is not None and row.of_time:
        return _cells(row, measured)
    pair = _pair(trained, row.f)
    if pair is None:
        return EMPTY
    if row.of_time:
        seconds = [run["points"][-1]["seconds"] / run["points"][-1]["step"] for run in pair]
        return f"{times_text(seconds[0] / seconds[1])} (seconds of a training step at 64 pixels)"
    step, (pixels, latents) = _common(pair)
    one, two = score_of(pixels, "kid"), score_of(latents, "kid")
    return (
        f"KID after {step:,} steps: {one.value:.3g} to {two.value:.3g} (95 %: {one.low:.3g} "
        f"to {one.high:.3g}, {two.low:.3g} to {two.high:.3g})"
    )


def _cells(row: PaperRow, measured: Measured | None) -> str:
    """Return the ratios of measured times of calls on pixels and on latents of the same size.

    At another size than the paper's, the largest one, if it was not measured at that.
    """
    if measured is None:
        return EMPTY
    seconds = {(cell.size[0], *_network(cell), cell.f): cell.seconds for cell in measured.cells}
    found: dict[int, list[str]] = {}
    for (size, model, attention, f), pixels in seconds.items():
        same, full = (seconds.get((size, model, kind, row.f)) for kind in (attention, "full"))
        latents = same or full
        if f == 1 and latents:
            network = "the same UNet" if attention == "full" else "coarse attention"
            text = f"{times_text(pixels / latents)} ({name_of(model)}, {network})"
            found.setdefault(size, []).append(text)
    if not found:
        return EMPTY
    size = row.size if row.size in found else max(found)
    return f"at {size} px: {'; '.join(found[size])}"


def _network(cell: Cell) -> tuple[str, str]:
    return cell.model, cell.attention


def _extrapolated(row: PaperRow, measured: Measured | None) -> str:
    """Return the ratio of the laws of time at both grids, where one was not measured."""
    if measured is None or row.size is None or not row.of_time:
        return EMPTY
    pixels, latents = row.size**2, (row.size // row.f) ** 2
    parts = []
    for fitted in measured.laws:
        beyond = "extrapolated" in (fitted.source(pixels), fitted.source(latents))
        if fitted.quantity == "seconds" and fitted.attention == "full" and beyond:
            low = fitted.at(latents)
            if low > 0 and fitted.at(pixels) > 0:
                parts.append(f"{times_text(fitted.at(pixels) / low)} ({name_of(fitted.model)})")
    return "; ".join(parts) or EMPTY


def _why(row: PaperRow, trained: Trained | None) -> str:
    if row.of_time:
        return NETWORKS if row.size is not None else f"{NETWORKS} {SMALL}"
    pair = _pair(trained, row.f)
    if pair is None:
        return "Ours is not trained yet."
    _, (pixels, latents) = _common(pair)
    one, two = score_of(pixels, "kid"), score_of(latents, "kid")
    if two.high < one.low:
        verdict = "Agrees: latents are better after as many steps."
    elif one.high < two.low:
        verdict = "Disagrees: here pixels are better after as many steps."
    else:
        verdict = "Not told apart here."
    room = " f = 8 leaves 8 x 8 latents." if row.f == 8 else ""
    return f"{verdict} {SMALL}{room} KID and FID are different numbers: only the sign compares."


def _pair(trained: Trained | None, f: int) -> tuple[Any, Any] | None:
    """Return the pixel denoiser and that of an f, both of the first seed; None without both."""
    if trained is None or not trained["seeds"]:
        return None
    runs = {run["f"]: run for run in trained["runs"] if run["seed"] == trained["seeds"][0]}
    return (runs[1], runs[f]) if 1 in runs and f in runs else None


def _common(pair: tuple[Any, Any]) -> tuple[int, tuple[Any, Any]]:
    """Return the last step at which both denoisers were scored, and their points there."""
    points = [{point["step"]: point for point in run["points"]} for run in pair]
    step = max(points[0].keys() & points[1].keys())
    return step, (points[0][step], points[1][step])


# --- what was trained -----------------------------------------------------------------------------


def trained_table(trained: Trained) -> Table:
    """Return what was trained in each space: its sizes, its costs, and those of the autoencoder."""
    heads, rows = trained_rows(trained)
    caption = (
        "Everything but the space is the same: blocks, text, batches. The grids on which the UNet "
        "attends differ, for they follow from the space. The noise schedule is shifted with the "
        "grid, and each learning rate is the best of "
        f"{', '.join(f'{rate:g}' for rate in trained['learning_rates'])}, with the same small "
        f"budget. Seconds are of the device {trained['device']}."
    )
    title = f"{trained['title']}: what was trained"
    return Table("trained", title, heads, rows, caption, TRAIN)
