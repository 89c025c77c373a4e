"""Curves and square maps as plotly figures. Only the dashboard's views import this module.

Somebody's text goes through `plain`: plotly reads titles, labels and legends as HTML. Colours are
those of Okabe & Ito, which the colour-blind tell apart; each line has a dash pattern as well.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from probe.figures.drawing import HEAT

# name of a line -> colour, dash pattern
STYLES = {
    "cond": ("#E69F00", "solid"),
    "uncond": ("#56B4E9", "dash"),
    "guided": ("#CC79A7", "dot"),
    "greatest": ("#E69F00", "solid"),
    "least": ("#56B4E9", "dash"),
}
OTHER = ("#009E73", "solid")
CURSOR = "#D55E00"
CONFIG = {"displaylogo": False, "modeBarButtons": [["toImage"]]}  # of plotly's own buttons


def plain(text: object) -> str:
    """Return somebody's text so that plotly shows it as it was written, on one line."""
    return html.escape(str(text), quote=False).replace("\n", " ")


def step_text(step: int, steps: int) -> str:
    """Return a step in words, as the arrays count it and as people do: "step 6 (7th of 20)"."""
    place = step + 1
    ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10 if place % 100 not in (11, 12, 13) else 0)
    return f"step {step} ({place}{ending or 'th'} of {steps})"


def curves(
    steps: Sequence[int],
    lines: Mapping[str, np.ndarray],
    title: str,
    unit: str,
    cursor: int | None,
    calls: int,
    spread: np.ndarray | None = None,
) -> go.Figure:
    """Return lines over the steps, with a cursor at one. NaN leaves a gap.

    *Shape:* each line (step). `spread`, of one line's name, is drawn as a band around the first
    line. `title` and `unit` are our own words.
    """
    figure = go.Figure()
    x = [int(step) for step in steps]
    labels = [step_text(step, calls) for step in x]
    if spread is not None:
        middle = np.asarray(next(iter(lines.values())), np.float64)
        edges = [*(middle + spread), *(middle - spread)[::-1]]
        figure.add_trace(
            go.Scatter(
                x=[*x, *x[::-1]],
                y=[float(edge) for edge in edges],
                fill="toself",
                mode="none",
                fillcolor="rgba(128,128,128,.3)",
                name="one standard deviation",
                hoverinfo="skip",
            )
        )
    for name, values in lines.items():
        colour, dash = STYLES.get(name, OTHER)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[float(value) for value in values],
                name=plain(name),
                mode="lines+markers" if len(x) < 3 else "lines",
                line={"color": colour, "dash": dash, "width": 2},
                customdata=labels,
                hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
            )
        )
    if cursor is not None:
        figure.add_vline(x=cursor, line={"color": CURSOR, "width": 2, "dash": "dot"})
    return _laid_out(figure, title, "step", unit, legend=len(figure.data) > 1)


def profile(
    names: Sequence[str], middle: np.ndarray, spread: np.ndarray, title: str, unit: str
) -> go.Figure:
    """Return a mean and a standard deviation for each of some names, from top to bottom."""
    figure = go.Figure(
        go.Scatter(
            x=[float(value) for value in middle],
            y=[plain(name) for name in names],
            mode="markers",
            marker={"color": OTHER[0], "size": 8},
            error_x={"type": "data", "array": [float(value) for value in spread]},
            hovertemplate="%{y}: %{x:.4g} ± %{error_x.array:.4g}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    laid_out = _laid_out(figure, title, unit, "", legend=False)
    return laid_out.update_layout(height=120 + 22 * len(names))


def square_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, unit: str
) -> go.Figure:
    """Return a map as squares, the first row on top, from 0 to its greatest value.

    *Shape:* (row, column).
    """
    stops = np.linspace(0, 1, len(HEAT))
    scale = [
        [float(at), f"rgb({red:.0f},{green:.0f},{blue:.0f})"]
        for at, (red, green, blue) in zip(stops, HEAT, strict=True)
    ]
    values = np.asarray(values, np.float32)  # plotly writes float16 as text
    greatest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    hover = [[f"{plain(row)} at {plain(column)}" for column in columns] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            zmin=0,
            zmax=greatest or 1.0,
            colorscale=scale,
            zsmooth=False,
            customdata=hover,
            hovertemplate="%{customdata}: %{z:.3g}<extra></extra>",
            colorbar={"title": {"text": unit, "side": "right"}, "thickness": 12},
        )
    )
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False}
    figure.update_xaxes(
        tickvals=list(range(len(columns))),
        ticktext=[plain(name) for name in columns],
        constrain="domain",
        tickangle=-90,
        **ticks,
    )
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[plain(name) for name in rows],
        autorange="reversed",
        scaleanchor="x",
        constrain="domain",
        **ticks,
    )
    return _laid_out(figure, title, "", "", legend=False).update_layout(height=420)


def _laid_out(figure: go.Figure, title: str, x: str, y: str, legend: bool) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0.02, "xref": "container"},
        height=270,
        margin={"l": 8, "r": 8, "t": 62 if "<br>" in title else 44, "b": 8},
        showlegend=legend,
        legend={"orientation": "h", "y": -0.38, "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(title_text=x, automargin=True)
    figure.update_yaxes(title_text=y, automargin=True)
    return figure
