"""Figures of paths over the steps: maps of them, and how much of the variance a map holds.

    path_map(points, position)         # one line a run, its start and its end marked
    explained(shares, walks)           # components of PCA, beside the band of random walks
    table(points, position)            # the same numbers as rows

Labelled arrays in, plotly figures out. Text of a recording is shown as it is: `plain` escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe.analysis.trajectories import paths
from probe.figures.plots import plain, step_text
from probe.format.schema import counted

# Okabe and Ito's colours that show on white and on black, and grey; they come again with other
# dashes.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#808080")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "cross", "x", "triangle-up")
GREY, GRID = "#808080", "rgba(128,128,128,.25)"
FONT, HEIGHT = 13, 460  # pixels


def path_map(
    points: xr.DataArray | xr.Dataset,
    position: np.ndarray,
    axes: Sequence[str] = (),
    step: int | None = None,
    small: bool = False,
) -> go.Figure:
    """Return a map with a line for each run, from its first step to its last.

    *Shape:* `position` (point, 2), `points` with `run`, `step` and `sigma` along `point`. `axes`
    say what lies along them; without, the axes have no numbers, for they mean nothing. `step` is
    marked on each path that has it. A `small` map has no legend.
    """
    figure = go.Figure()
    for index, (name, rows) in enumerate(paths(points)):
        _add_path(figure, index, plain(name), points.isel(point=rows), position[rows], step, small)
    settings = {"zeroline": False, "showticklabels": bool(axes), "showgrid": bool(axes)}
    titles = axes or ("", "")
    figure.update_xaxes(title=titles[0], gridcolor=GRID, **settings)
    figure.update_yaxes(title=titles[1], gridcolor=GRID, **settings)
    if axes:  # a unit is as long on both
        figure.update_yaxes(scaleanchor="x", constrain="domain")
    more = 20 * max(0, len(figure.data) // 4 - 4)  # a line of the legend for each run after four
    return _laid_out(figure, 300 if small else HEIGHT + more, not small)


def _add_path(
    figure: go.Figure,
    index: int,
    name: str,
    points: xr.DataArray | xr.Dataset,
    position: np.ndarray,
    step: int | None,
    small: bool,
) -> None:
    """Draw one run: its line, and rings and a star on its first, its last and the chosen step."""
    again, which = divmod(index, len(COLOURS))
    colour, kind = COLOURS[which], (which + again) % len(DASHES)
    steps, (x, y) = points["step"].values, position.T
    count = int(steps.max()) + 1
    words = [
        f"{name}<br>{step_text(int(at), count)}<br>sigma {sigma:.3g}"
        for at, sigma in zip(steps, points["sigma"].values, strict=True)
    ]
    common: dict[str, Any] = {"legendgroup": str(index), "hoverinfo": "text"}
    figure.add_scatter(
        x=x,
        y=y,
        text=words,
        mode="lines+markers",
        name=name,
        line={"color": colour, "dash": DASHES[kind], "width": 1 if small else 2},
        marker={"color": colour, "symbol": MARKERS[kind], "size": 4 if small else 6},
        **common,
    )
    for what, at, symbol, size in (
        ("first step", [0], "circle-open", 13),
        ("last step", [len(steps) - 1], "star", 14),
        ("chosen step", np.flatnonzero(steps == step), "circle-open", 22),
    ):
        figure.add_scatter(
            x=x[at],
            y=y[at],
            text=[f"{words[place]}<br>{what}" for place in at],
            mode="markers",
            marker={
                "symbol": symbol,
                "size": size * 0.6 if small else size,
                "color": colour,
                "line": {"width": 2 if small else 3, "color": colour},
            },
            showlegend=False,
            name=what,
            **common,
        )


def explained(shares: np.ndarray, walks: np.ndarray) -> go.Figure:
    """Return the share of the variance of each component, beside that of random walks.

    *Shape:* `shares` (component), `walks` (walk, component), in parts of 1. The band goes from the
    least to the greatest of the walks.
    """
    components = np.arange(1, len(shares) + 1)
    low, high = walks.min(axis=0), walks.max(axis=0)
    figure = go.Figure()
    figure.add_bar(
        x=components,
        y=shares,
        name="these runs",
        marker_color=COLOURS[0],
        hovertemplate="component %{x}: %{y:.1%}<extra></extra>",
    )
    figure.add_scatter(
        x=components,
        y=(low + high) / 2,
        error_y={
            "type": "data",
            "array": (high - low) / 2,
            "color": COLOURS[4],
            "thickness": 2,
            "width": 7,
        },
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 16, "color": COLOURS[4], "line": {"width": 3}},
        name=f"{counted(len(walks), 'random walk')}, least to greatest",
        text=[f"walks: {a:.1%} to {b:.1%}" for a, b in zip(low, high, strict=True)],
        hoverinfo="text",
    )
    figure.update_xaxes(title="component of PCA", dtick=1, showgrid=False)
    figure.update_yaxes(
        title="share of the variance", tickformat=".0%", rangemode="tozero", gridcolor=GRID
    )
    return _laid_out(figure, HEIGHT, True)


def table(points: xr.DataArray | xr.Dataset, **positions: np.ndarray) -> str:
    """Return the points of maps as CSV: run, step, sigma, and two columns for each map.

    A map of the name `pca` (point, 2) has the columns `pca_0` and `pca_1`. A text that a
    spreadsheet would compute begins with an apostrophe.
    """
    names = [f"'{name}" if name[:1] in "=+-@\t" else name for name in points["run"].values]
    columns = {
        "run": ("point", np.array(names, dtype=object)),
        "step": ("point", points["step"].values),
        "sigma": ("point", points["sigma"].values),
        **{
            f"{name}_{axis}": ("point", position[:, axis])
            for name, position in positions.items()
            for axis in range(2)
        },
    }
    return str(xr.Dataset(columns).to_dataframe().to_csv(index=False))


def _laid_out(figure: go.Figure, height: int, legend: bool) -> go.Figure:
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        showlegend=legend,
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": COLOURS[0]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": FONT},
    )
    return figure
