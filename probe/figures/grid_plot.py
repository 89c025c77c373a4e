"""The measures of a study as heat maps over two axes, with plotly: in the dashboard, or as a page.

heat_map(study, lay_out(study), "l2")
plot_page(study, lay_out(study))       # one page with every measure, which fetches nothing
"""

from __future__ import annotations

import html
import itertools

import numpy as np
import plotly.graph_objects as go

from probe.errors import ExperimentError
from probe.figures.drawing import HEAT
from probe.figures.grid import Layout, block_title, labels_of, name_of
from probe.figures.grid_page import numbers_of
from probe.figures.plots import CONFIG, plain
from probe.reading.study import Study
from probe.text import encodable, shorten

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: "
    "blob:; base-uri 'none'; form-action 'none'"
)
MOST = 50  # heat maps of one page
LETTERS = 40  # of a label


def measures_of(study: Study) -> list[str]:
    """Return the names of the measures that are numbers, those by label each by itself."""
    return list(
        dict.fromkeys(
            name
            for cell in study.cells.values()
            for name, value in numbers_of(cell).items()
            if isinstance(value, int | float)
        )
    )


def values_of(study: Study, layout: Layout, measure: str, block: int = 0) -> np.ndarray:
    """Return a measure of the cells of a block, NaN where there is none. *Shape:* (row, column)."""
    down, across = layout.size
    values = np.full((down, across), np.nan)
    for row, column in itertools.product(range(down), range(across)):
        index = layout.place(layout.blocks[block], row, column)
        value = numbers_of(study.cells[index]).get(measure) if index in study.cells else None
        if isinstance(value, int | float):
            values[row, column] = value
    return values


def heat_map(study: Study, layout: Layout, measure: str, block: int = 0) -> go.Figure:
    """Return a measure of a study as a heat map: rows and columns as in the grid of pictures.

    The colours span the least to the greatest value of all blocks. A cell without a number is left
    empty.
    """
    values = values_of(study, layout, measure, block)
    every = np.stack([values_of(study, layout, measure, at) for at in range(len(layout.blocks))])
    there = every[np.isfinite(every)]
    least, greatest = (float(there.min()), float(there.max())) if there.size else (0.0, 1.0)
    rows, columns = (
        [plain(shorten(label, LETTERS)) for label in labels_of(study, axis)] for axis in layout.axes
    )
    stops = np.linspace(0, 1, len(HEAT))
    scale = [
        [float(at), f"rgb({red:.0f},{green:.0f},{blue:.0f})"]
        for at, (red, green, blue) in zip(stops, HEAT, strict=True)
    ]
    down, across = (plain(name_of(study, axis)) for axis in layout.axes)
    hover = [[f"{down} {row}, {across} {column}" for column in columns] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            z=values.tolist(),
            zmin=least,
            zmax=greatest if greatest > least else least + 1,
            colorscale=scale,
            customdata=hover,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            texttemplate="%{z:.3g}" if values.size <= 200 else None,
            hoverongaps=False,
            xgap=2,
            ygap=2,
            colorbar={"thickness": 12},
        )
    )
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False, "automargin": True}
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=columns, title_text=across, **ticks
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=rows,
        title_text=down,
        autorange="reversed",
        **ticks,
    )
    title = f"{measure}, {block_title(study, layout.blocks[block])}".removesuffix(", ")
    return figure.update_layout(
        title={"text": plain(shorten(title, 120)), "font": {"size": 14}, "x": 0.02},
        height=150 + 34 * len(rows),
        margin={"l": 8, "r": 8, "t": 44, "b": 8},
    )


def plot_page(study: Study, layout: Layout) -> str:
    """Return a page with a heat map of every measure in every block, and plotly in it.

    Raise ExperimentError if nothing was measured, or for too many heat maps.
    """
    measures = measures_of(study)
    count = len(measures) * len(layout.blocks)
    if not count:
        raise ExperimentError(
            f"{study.name} has no measure with a number.",
            "Name measures in its grid: [l2, psnr]. These compare an edited cell with its parent; "
            "of cells without edits, measure with a function of your own.",
        )
    if count > MOST:
        raise ExperimentError(
            f"{count} heat maps are too many for one page; {MOST} is the most.",
            "Show fewer: --where AXIS=LABEL.",
        )
    parts = [
        heat_map(study, layout, measure, block).to_html(
            full_html=False, include_plotlyjs=not (at or block), config=CONFIG
        )
        for at, measure in enumerate(measures)
        for block in range(len(layout.blocks))
    ]
    name = html.escape(encodable(study.name))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>body {{ max-width: 1100px; margin: 24px auto; padding: 0 16px;
  font: 15px/1.5 system-ui, sans-serif; }}</style>
<body>
<h1>{name}</h1>
{"".join(parts)}
</body>
</html>
"""
