"""Pixel space against latent space as plotly figures: what was counted, and what was measured.

cost_by_size(counts, "sd14")               # a line for each f, log axes
factors(counts, "sd14", 8, (512, 512))     # x679 beside x34, x64 and what the paper measured
law(measured, "sd14", "seconds")           # measured points, and the fitted law beyond them

Each is a `Shown`: a figure, what is seen in it and how it was made, and the command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from probe.figures.pixels_looks import (
    LOOKS,
    Shown,
    bytes_text,
    flops_text,
    laid_out,
    line,
    log_axes,
    name_of,
    pattern_of,
    shape_text,
    size_text,
    space_text,
    times_text,
)
from probe.figures.plots import plain
from probe.reading.pixels import (
    KINDS,
    WHY_THEY_DIFFER,
    Attention,
    Cell,
    Counts,
    Kind,
    Law,
    Machine,
    Measured,
)

RUN = "python -m probe.run experiments/astronaut.yaml"
USUAL = {"sdxl": 1024, "sd21": 768, "emojiworld": 128}
KIND_LOOKS: dict[Kind, tuple[str, str, str]] = {
    "convolution": ("#0072B2", "", "convolution"),
    "linear": ("#56B4E9", ".", "linear"),
    "self_attention": ("#D55E00", "/", "self-attention"),
    "cross_attention": ("#E69F00", "x", "cross-attention"),
}
PART_LOOKS = {
    "text": ("#56B4E9", "."),
    "steps": ("#D55E00", ""),
    "decode": ("#009E73", "/"),
}
COARSE_DASH, BEYOND_DASH = "dash", "dot"


# --- counted --------------------------------------------------------------------------------------


def squares(counts: Counts, model: str) -> list[tuple[int, int]]:
    """Return the square sizes that were counted of a model at every f, the smallest first."""
    factors = counts.factors_of(model)
    return [
        size
        for size in counts.sizes(model)
        if size[0] == size[1] and all(counts.has(model, f, size) for f in factors)
    ]


def usual_size(counts: Counts, model: str) -> tuple[int, int]:
    """Return the size that a model was made for, or the middle one of those counted."""
    sizes = squares(counts, model)
    usual = (USUAL.get(model, 512),) * 2
    return usual if usual in sizes else sizes[len(sizes) // 2]


def cost_by_size(counts: Counts, model: str) -> Shown:
    """Return FLOPs of one call of the denoiser against the size, a line for each f."""
    figure = go.Figure()
    sizes = squares(counts, model)
    for f in counts.factors_of(model):
        for attention in ("full", "coarse") if f == 1 else ("full",):
            calls = [counts.of(model, "denoiser", f, size, attention) for size in sizes]
            name = space_text(f)
            if f == 1 and attention == "coarse":
                name += f", attention up to {counts.attention_up_to} x {counts.attention_up_to}"
            figure.add_trace(
                line(
                    [size[0] for size in sizes],
                    [call.total for call in calls],
                    name,
                    f,
                    COARSE_DASH if attention == "coarse" else "solid",
                    [f"{flops_text(call.total)}, grid {shape_text(call.shape)}" for call in calls],
                )
            )
    log_axes(figure, "side of the picture in pixels", "FLOPs of one call", sizes)
    title = f"One call of the denoiser, by size<br>{name_of(model)}"
    caption = (
        "Each line is the same UNet at another f: pixels per latent along one side. Pixels cost "
        "most and rise fastest, for attention grows with the square of the places. The dashed line "
        f"is a UNet for pixels that attends on grids of at most {counts.attention_up_to} x "
        f"{counts.attention_up_to} alone. Counted on the meta device, without weights; a "
        "multiply-add is 2."
    )
    return Shown("cost_by_size", laid_out(figure, title), caption, counts.made_by)


def cost_by_f(counts: Counts, model: str, size: tuple[int, int]) -> Shown:
    """Return FLOPs against f at one size: one call, the VAE's two halves, and the text encoder."""
    factors = counts.factors_of(model)
    figure = go.Figure()
    lines: list[tuple[str, str, list[int], str, Attention]] = [
        ("one call of the denoiser", "denoiser", factors, "solid", "full"),
        ("decode", "vae_decode", factors[1:] if factors[0] == 1 else factors, "dash", "full"),
        ("encode", "vae_encode", factors[1:] if factors[0] == 1 else factors, "dot", "full"),
    ]
    colours = ("#D55E00", "#009E73", "#0072B2")
    for (name, component, these, dash, attention), colour in zip(lines, colours, strict=True):
        calls = [counts.of(model, component, f, size, attention) for f in these]  # type: ignore[arg-type]
        trace = line(
            these,
            [call.total for call in calls],
            name,
            1,
            dash,
            [f"f = {f}: {flops_text(call.total)}" for f, call in zip(these, calls, strict=True)],
        )
        figure.add_trace(trace.update(line_color=colour, marker_color=colour))
    if 1 in factors:
        coarse = counts.of(model, "denoiser", 1, size, "coarse")
        name = f"one call, attention up to {counts.attention_up_to} x {counts.attention_up_to}"
        figure.add_trace(
            go.Scatter(
                x=[1],
                y=[coarse.total],
                name=name,
                mode="markers",
                marker={"size": 11, "symbol": "square-open", "color": "#D55E00"},
                customdata=[f"f = 1: {flops_text(coarse.total)}"],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    log_axes(figure, "f: pixels per latent along one side", "FLOPs", None)
    figure.update_xaxes(tickvals=factors, ticktext=[str(f) for f in factors])
    title = f"Cost against f, at {size_text(size)} pixels<br>{name_of(model)}"
    caption = (
        "From pixels (f = 1) to the right, the denoiser's call becomes cheaper. A run calls it a "
        "hundred times (50 steps, with and without the prompt), and decodes once. The open square "
        "is a UNet for pixels that attends on coarse grids alone. Counted."
    )
    return Shown("cost_by_f", laid_out(figure, title), caption, counts.made_by)


def factors(counts: Counts, model: str, f: int, size: tuple[int, int]) -> Shown:
    """Return by what factor pixels are dearer: the same UNet, another, convolutions, the paper."""
    found = counts.factors(model, f, size)
    side = counts.attention_up_to
    rows = [
        ("the same UNet (counted)", found.full, found.full),
        (f"attention up to {side} x {side} on both (counted)", found.coarse, found.coarse),
        ("convolution alone (counted)", found.convolution, found.convolution),
        ("the paper's time, at f = 4 (measured there)", *found.paper),
    ]
    figure = go.Figure()
    for (name, least, most), (colour, symbol) in zip(rows, LOOKS.values(), strict=False):
        text = times_text(least) if least == most else f"{times_text(least)} to {times_text(most)}"
        figure.add_trace(
            go.Scatter(
                x=[least, most],
                y=[name, name],
                mode="lines+markers+text",
                line={"color": colour, "width": 5},
                marker={"size": 12, "symbol": symbol},
                text=["", text],
                textposition="middle right",
                hovertemplate=f"{name}: {text}<extra></extra>",
                showlegend=False,
            )
        )
        figure.add_annotation(  # an axis of names would leave a narrow page no room
            x=0, xref="x domain", xanchor="left", y=name, yshift=17, text=name, showarrow=False
        )
    most = max(most for _, _, most in rows)
    figure.update_xaxes(type="log", range=[0, float(np.log10(most)) + 0.6], dtick=1)
    figure.update_yaxes(range=[3.5, -0.9], showticklabels=False)
    title = f"How many times as much on pixels<br>{name_of(model)}, {size_text(size)}, f = {f}"
    figure = laid_out(figure, title, height=320)
    figure.update_xaxes(title_text="times, log axis")
    return Shown(
        "factors", figure, f"None of these stands alone. {WHY_THEY_DIFFER}", counts.made_by
    )


def shares_by_size(counts: Counts, model: str, f: int) -> Shown:
    """Return what part of a call's FLOPs each kind of layer has, against the size."""
    sizes = [size for size in counts.sizes(model) if counts.has(model, f, size)]
    calls = [counts.of(model, "denoiser", f, size) for size in sizes]
    figure = go.Figure()
    for kind in KINDS:
        colour, pattern, name = KIND_LOOKS[kind]
        figure.add_trace(
            go.Bar(
                x=[size_text(size) for size in sizes],
                y=[100 * call.shares[kind] for call in calls],
                name=name,
                marker={"color": colour, "pattern": pattern_of(pattern)},
                customdata=[flops_text(call.flops[kind]) for call in calls],
                hovertemplate=f"%{{x}}, {name}: %{{y:.1f}} % (%{{customdata}})<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_xaxes(title_text="size in pixels", type="category")
    figure.update_yaxes(title_text="% of the FLOPs of one call", range=[0, 100])
    title = f"What a call spends its FLOPs on<br>{name_of(model)}, {space_text(f)}"
    caption = (
        "Convolution, linear layers and cross-attention grow with the number of places, "
        "self-attention with its square, so its share rises with the size. Linear layers include "
        "those inside attention; attention here is its two products alone. Counted, with full "
        "attention."
    )
    return Shown("shares_by_size", laid_out(figure, title), caption, counts.made_by)


def attention_bytes(counts: Counts, model: str) -> Shown:
    """Return the bytes of all attention matrices of a call against the size, a line for each f."""
    figure = go.Figure()
    sizes = squares(counts, model)
    for f in counts.factors_of(model):
        calls = [counts.of(model, "denoiser", f, size) for size in sizes]
        values = [call.attention_bytes for call in calls]
        pairs = [(call.attention_bytes, call.largest_attention_bytes) for call in calls]
        said = [f"{bytes_text(all_of)}, the largest {bytes_text(one)}" for all_of, one in pairs]
        sides = [size[0] for size in sizes]
        figure.add_trace(line(sides, values, space_text(f), f, "solid", said))
    log_axes(figure, "side of the picture in pixels", "bytes", sizes)
    title = f"All attention matrices of one call<br>{name_of(model)}"
    caption = (
        "Heads x queries x keys, over all layers, "
        f"{counts.bytes_per_number} bytes a number. A fused kernel never holds them whole; whoever "
        "wants to look at attention does. Counted."
    )
    return Shown("attention_bytes", laid_out(figure, title), caption, counts.made_by)


# --- measured -------------------------------------------------------------------------------------

Quantity = Literal["seconds", "call_bytes"]
MEASURED = {"seconds": ("seconds of one call", "Time"), "call_bytes": ("bytes", "Memory")}


def law(measured: Measured, model: str, quantity: Quantity) -> Shown:
    """Return what calls of a denoiser took against its places, and the law fitted to them."""
    figure = go.Figure()
    looks: tuple[tuple[Attention, str], ...] = (("full", "#D55E00"), ("coarse", "#0072B2"))
    for attention, colour in looks:
        cells = [
            cell
            for cell in measured.cells
            if cell.model == model and cell.attention == attention and getattr(cell, quantity) > 0
        ]
        name = "the same UNet" if attention == "full" else "coarse attention alone"
        for pixels in (True, False):
            points = [cell for cell in cells if (cell.f == 1) == pixels]
            if points:
                figure.add_trace(_points(points, quantity, name, colour, pixels))
        fitted = measured.law(model, quantity, attention)
        if fitted is not None:
            figure.add_traces(_law_lines(fitted, colour, name))
    unit, what = MEASURED[quantity]
    log_axes(figure, "places of the denoiser's grid", unit, None)
    figure.update_xaxes(dtick=1, exponentformat="power")
    machine = measured.machine
    title = f"{what} of one call, measured here<br>{name_of(model)}, {machine.dtype}"
    caption = (
        f"Points were measured: the median of several calls, with quartiles; {machine.clock} on "
        f"{machine.device}, {_threads(machine.threads)}, random weights{_loaded(machine)}. "
        "Squares are pixels, circles latents; a blue square is a UNet for pixels that attends on "
        "coarse grids alone. The line is a + b N + c N^2 in N places, fitted to the others. Where "
        "it is dotted, nothing was measured: it is an extrapolation."
    )
    return Shown(f"law_{quantity}", laid_out(figure, title), caption, measured.made_by)


def _loaded(machine: Machine) -> str:
    return f", beside other programs (load {machine.load:.3g})" if (machine.load or 0) > 1.5 else ""


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _points(
    cells: Sequence[Cell], quantity: Quantity, name: str, colour: str, pixels: bool
) -> go.Scatter:
    timed = quantity == "seconds"
    values = [float(getattr(cell, quantity)) for cell in cells]
    spread = {
        "type": "data",
        "array": [cell.high - cell.seconds for cell in cells],
        "arrayminus": [cell.seconds - cell.low for cell in cells],
    }
    return go.Scatter(
        x=[cell.places for cell in cells],
        y=values,
        error_y=spread if timed else None,
        name=f"{'pixels' if pixels else 'latents'}, {name}",
        mode="markers",
        marker={"size": 9, "color": colour, "symbol": "square" if pixels else "circle"},
        customdata=[
            f"f = {cell.f}, {size_text(cell.size)}: "
            + (f"{value:.3g} s" if timed else bytes_text(value))
            for cell, value in zip(cells, values, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _law_lines(fitted: Law, colour: str, name: str) -> list[go.Scatter]:
    """Return a law where it was measured, and beyond, up to 512 x 512 places, as two lines."""
    most = max(fitted.most, 512 * 512)
    parts = (
        (fitted.least, fitted.most, "solid", f"law, {name}"),
        (fitted.most, most, BEYOND_DASH, f"extrapolated, {name}"),
    )
    lines = []
    for first, last, dash, said in parts:
        if last <= first:
            continue
        places = np.geomspace(first, last, 40)
        values = [fitted.at(float(at)) for at in places]
        lines.append(
            go.Scatter(
                x=[float(at) for at in places],
                y=[value if value > 0 else None for value in values],
                name=said,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2},
                hovertemplate=f"{said}: %{{y:.3g}}<extra></extra>",
            )
        )
    return lines


def shares(recorded: Mapping[str, Mapping[str, float]], counts: Counts) -> Shown:
    """Return what part of a whole run text, steps and decoding have: recorded, and counted.

    `recorded` has the seconds of each part by the name of a recording, as `shares_of` returns them.
    """
    rows: list[tuple[str, Mapping[str, float]]] = [
        (f"{plain(name)} (measured here)", parts) for name, parts in recorded.items()
    ]
    for f in (8, 1):
        if counts.has("sd14", f, 512):
            run = counts.whole_run("sd14", f, 512)
            rows.append((f"SD 1.x, {space_text(f)} (counted)", run._asdict()))
    figure = go.Figure()
    for part, (colour, pattern) in PART_LOOKS.items():
        values = [100 * parts.get(part, 0.0) / sum(parts.values()) for _, parts in rows]
        figure.add_trace(
            go.Bar(
                x=values,
                y=[name for name, _ in rows],
                name=part,
                orientation="h",
                marker={"color": colour, "pattern": pattern_of(pattern)},
                hovertemplate=f"%{{y}}, {part}: %{{x:.3g}} %<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", legend_traceorder="normal")
    figure.update_xaxes(title_text="% of the run", range=[0, 100])
    figure.update_yaxes(autorange="reversed", automargin=True)
    caption = (
        "A run reads the prompt once, calls the denoiser at every step, and decodes once; on "
        "pixels there is nothing to decode. Of recordings the bar shows the time in /cost, of "
        "Stable Diffusion 1.x counted FLOPs of 50 guided steps at 512 x 512 pixels."
    )
    title = "A whole run: text, steps and decoding"
    return Shown("shares", laid_out(figure, title, height=170 + 40 * len(rows)), caption, RUN)
