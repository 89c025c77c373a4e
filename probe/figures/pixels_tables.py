"""Tables of pixels against latents: beside the paper, and what was trained; as rows, and as HTML.

beside_paper(counts(), measured(), paper(), trained())
table_html(table)                          # every text escaped; it looks right in light and dark
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from probe.figures.pixels_looks import name_of, times_text
from probe.figures.pixels_trained import (
    TO_RANK,
    TRAIN,
    Trained,
    paired_difference,
    score_of,
    seeds_of,
    trained_rows,
)
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
            _why(row, measured, trained),
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
    pairs = _pairs(trained, row.f) if row.name == "epoch" else []
    if not pairs:
        return EMPTY
    pixels, latents = (run["training_step_flops"] for run in pairs[0])
    times = pixels / latents
    return f"{times_text(times)} (a training step at 64 pixels)"


def _measured(row: PaperRow, measured: Measured | None, trained: Trained | None) -> str:
    if row.size is not None and row.of_time:
        return _cells(row, measured)
    pairs = _pairs(trained, row.f)
    if not pairs:
        return EMPTY
    if row.of_time:
        return f"{times_text(_step_times(pairs[0]))} (seconds of a training step at 64 pixels)"
    step = _common_step(pairs)
    scores = [[score_of(_at(run, step), "kid") for run in pair] for pair in pairs]
    values = "; ".join(f"{one.value:.3g} to {two.value:.3g}" for one, two in scores)
    if len(pairs) > 1:
        return f"KID after {step:,} steps, {len(pairs)} seeds: {values}"
    ((one, two),) = scores
    return (
        f"KID after {step:,} steps, one seed: {values} (95 % over pictures: {one.low:.3g} "
        f"to {one.high:.3g}, {two.low:.3g} to {two.high:.3g})"
    )


def _cells(row: PaperRow, measured: Measured | None) -> str:
    size, ratios = _ratios(row, measured)
    if not ratios:
        return EMPTY
    texts = (f"{times_text(times)} ({network})" for network, times in ratios)
    return f"at {size} px: {'; '.join(texts)}"


def _ratios(row: PaperRow, measured: Measured | None) -> tuple[int, list[tuple[str, float]]]:
    """Return the ratios of measured times of calls on pixels and on latents, by network.

    Both are of the paper's size, or of the largest one that was measured.
    """
    cells = () if measured is None else measured.cells
    seconds = {(cell.size[0], *_network(cell), cell.f): cell.seconds for cell in cells}
    found: dict[int, list[tuple[str, float]]] = {}
    for (size, model, attention, f), pixels in seconds.items():
        same, full = (seconds.get((size, model, kind, row.f)) for kind in (attention, "full"))
        latents = same or full
        if f == 1 and latents:
            network = "the same UNet" if attention == "full" else "coarse attention"
            times = pixels / latents
            found.setdefault(size, []).append((f"{name_of(model)}, {network}", times))
    size = row.size if row.size in found else max(found, default=0)
    return size, found.get(size, [])


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


def _why(row: PaperRow, measured: Measured | None, trained: Trained | None) -> str:
    """Return where ours disagrees with the paper, and why the set-ups differ."""
    pairs = _pairs(trained, row.f)
    if row.of_time:
        if row.size is not None:
            times = [times for _, times in _ratios(row, measured)[1]]
            return f"{_beside_theirs(row, times)}{NETWORKS}"
        verdict = _beside_theirs(row, [_step_times(pair) for pair in pairs])
        return f"{verdict}{NETWORKS} {SMALL}"
    if not pairs or trained is None:
        return "Ours is not trained yet."
    room = " f = 8 leaves 8 x 8 latents." if row.f == 8 else ""
    which = "KID and FID are different numbers: only the sign compares."
    return f"{_verdict(trained, row.f, pairs)} {SMALL}{room} {which}"


def _beside_theirs(row: PaperRow, ours: Sequence[float]) -> str:
    """Return whether the paper's factor is more or less than ours, which were measured."""
    if row.times is None or not ours:
        return ""
    if min(ours) > row.times:
        return "Disagrees: ours is more. "
    return "Disagrees: ours is less. " if max(ours) < row.times else "Theirs lies between ours. "


def _verdict(trained: Trained, f: int, pairs: Sequence[Pair]) -> str:
    """Return which space has the better KID after as many steps, and of how many seeds."""
    if len(pairs) == 1:
        step = _common_step(pairs)
        one, two = (score_of(_at(run, step), "kid") for run in pairs[0])
        latents, pixels = two.high < one.low, one.high < two.low
        where = "in the one seed that was trained"
    elif len(pairs) < TO_RANK:
        return f"{len(pairs)} seeds: too few to rank."
    else:
        found = paired_difference(trained, 1, f, "kid", "steps", "free")
        latents, pixels = found is not None and found.high < 0, found is not None and found.low > 0
        where = f"over {len(pairs)} seeds"
    if not latents and not pixels:
        return f"Not told apart here, {where}."
    better = "latents" if latents else "pixels"
    start = "Agrees" if latents else "Disagrees"
    return f"{start}, {where}: {better} are better after as many steps."


Pair: TypeAlias = tuple[Trained, Trained]


def _pairs(trained: Trained | None, f: int) -> list[Pair]:
    """Return the pixel denoiser and that of an f, of each seed that has both."""
    if trained is None:
        return []
    runs = {(run["f"], run["seed"]): run for run in trained["runs"]}
    pairs = [((1, seed), (f, seed)) for seed in seeds_of(trained)]
    return [(runs[one], runs[two]) for one, two in pairs if one in runs and two in runs]


def _common_step(pairs: Sequence[Pair]) -> int:
    """Return the last step at which all these denoisers were scored."""
    steps = [{point["step"] for point in run["points"]} for pair in pairs for run in pair]
    return int(max(set.intersection(*steps)))


def _at(run: Trained, step: int) -> Mapping[str, Any]:
    return next(point for point in run["points"] if point["step"] == step)


def _step_times(pair: Pair) -> float:
    """Return how many times as long a training step on pixels takes."""
    one, two = (run["points"][-1]["seconds"] / run["points"][-1]["step"] for run in pair)
    return float(one / two)


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
