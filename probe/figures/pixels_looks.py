"""What figures of pixels against latents share: their looks, their words, and how they explain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

NAMES = {
    "sd14": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.1",
    "sdxl": "SDXL",
}
# f -> colour, symbol; the colours are those of Okabe & Ito
LOOKS = {
    1: ("#D55E00", "square"),
    2: ("#E69F00", "diamond"),
    4: ("#009E73", "circle"),
    8: ("#0072B2", "triangle-up"),
    16: ("#CC79A7", "cross"),
    32: ("#56B4E9", "x"),
}
GRID = "rgba(128,128,128,.25)"


class Shown(NamedTuple):
    """A figure that explains itself: what is seen and how it was made, and the command for it."""

    name: str
    figure: go.Figure
    caption: str
    command: str


def name_of(model: str) -> str:
    """Return what people call a model."""
    return NAMES.get(model, model)


def size_text(size: tuple[int, int]) -> str:
    """Return a size in pixels, its height first: "512 x 512"."""
    return f"{size[0]} x {size[1]}"


def space_text(f: int) -> str:
    """Return the name of a space: "pixels", or "latents, f = 8"."""
    return "pixels" if f == 1 else f"latents, f = {f}"


def times_text(times: float) -> str:
    """Return a factor as it is written: x679, x2.7."""
    return f"x{times:.0f}" if times >= 10 else f"x{times:.2g}"


def flops_text(flops: float) -> str:
    """Return FLOPs with a unit that makes them short."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:,.3g} {unit}"
    return f"{flops / 1e6:,.3g} MFLOP"


def line(
    x: Sequence[float], y: Sequence[float], name: str, f: int, dash: str, said: Sequence[str]
) -> go.Scatter:
    colour, symbol = LOOKS[f]
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines+markers",
        line={"color": colour, "dash": dash, "width": 2},
        marker={"size": 8, "symbol": symbol, "color": colour},
        customdata=list(said),
        hovertemplate="%{customdata}<extra>" + name + "</extra>",
    )


def pattern_of(shape: str) -> dict[str, object]:
    """Return the pattern of a bar, drawn in white over its colour."""
    return {"shape": shape, "fillmode": "overlay", "fgcolor": "rgba(255,255,255,.75)", "size": 7}


def log_axes(figure: go.Figure, x: str, y: str, sizes: Sequence[tuple[int, int]] | None) -> None:
    figure.update_xaxes(type="log", title_text=x)
    figure.update_yaxes(type="log", title_text=y, exponentformat="power", dtick=1)
    if sizes:
        sides = [size[0] for size in sizes]
        figure.update_xaxes(tickvals=sides, ticktext=[str(side) for side in sides])


def laid_out(figure: go.Figure, title: str, height: int = 420) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0.02, "xref": "container"},
        height=height,
        margin={"l": 8, "r": 8, "t": 62 if "<br>" in title else 44, "b": 8},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(automargin=True, gridcolor=GRID, zeroline=False, title_standoff=6)
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False)
    return figure


def shape_text(shape: tuple[int, int, int] | None) -> str:
    return "none" if shape is None else f"{shape[0]} x {shape[1]} x {shape[2]}"


def bytes_text(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1e3:,.3g} kB"
