"""How far runs are from the first of them, over the noise levels, and where they part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe.errors import ExperimentError
from probe.figures.plots import plain
from probe.reading.distances import Latents, distance, parting
from probe.reading.recording import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito
DASHES = ("solid", "dash", "dot", "dashdot")
UNITS = {
    "denoised": "root mean square difference of the predicted clean latents",
    "latents": "root mean square difference of the latents, variance-preserving",
}


@dataclass(frozen=True)
class Distances:
    """How far runs are from the first; `spread` is that of other seeds, if some were given."""

    first: str
    far: dict[str, xr.DataArray]
    spread: xr.DataArray | None  # (seed, step)
    left_out: list[str]  # what could not be compared, and why


def distances(
    runs: Mapping[str, Run], seeds: Mapping[str, Run] | None = None, of: Latents = "latents"
) -> Distances:
    """Return how far runs, by their names, are from the first, and how far its other seeds are."""
    left_out: list[str] = []
    first, *rest = runs

    def measured(others: Mapping[str, Run]) -> dict[str, xr.DataArray]:
        found = {}
        for name, other in others.items():
            try:
                found[name] = distance(runs[first], other, of)
            except ExperimentError as error:
                left_out.append(str(error))
        return found

    far = measured({name: runs[name] for name in rest})
    others = list(measured(seeds or {}).values())
    return Distances(first, far, xr.concat(others, "seed") if others else None, left_out)


def said(found: Distances, share: float = 0.5) -> list[str]:
    """Return in a sentence for each run where it parts from the first.

    With other seeds the threshold is `share` of their mean distance. Without, it is `share` of the
    run's own greatest distance.
    """
    sentences = []
    for name, far in found.far.items():
        if not np.isfinite(far.values).any():
            sentences.append(f"{name}: no noise level is in both runs.")
            continue
        if found.spread is None:
            own = f"{share:.0%} of its greatest distance ({float(far.max()):.3g})"
            threshold: float | xr.DataArray = share * float(far.max())
        else:
            own = f"{share:.0%} of the mean distance of {found.spread.sizes['seed']} other seeds"
            threshold = share * found.spread.mean("seed")
        step = parting(far, threshold)
        if not float(far.max()):
            sentences.append(f"{name} is the same as {found.first} at every step.")
        elif step is None:
            sentences.append(f"{name} never parts from {found.first}: not by {own}.")
        else:
            sigma = float(far.sel(step=step)["sigma"])
            sentences.append(
                f"{name} parts from {found.first} at step {step} (sigma {sigma:.3g}): there it is "
                f"more than {own} away."
            )
    return sentences


def figure(found: Distances, of: Latents = "latents", share: float = 0.5) -> go.Figure:
    """Return the distances over the noise levels, the noisiest on the left."""
    drawn = go.Figure()
    if found.spread is not None:
        low, mean, high = (
            getattr(found.spread, how)("seed").values for how in ("min", "mean", "max")
        )
        sigma = found.spread["sigma"].values
        band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        drawn.add_scatter(x=sigma, y=high, showlegend=False, **band)
        drawn.add_scatter(
            x=sigma,
            y=low,
            fill="tonexty",
            fillcolor="rgba(128,128,128,0.25)",
            name=f"{found.spread.sizes['seed']} other seeds, least to most",
            **band,
        )
        drawn.add_scatter(
            x=sigma,
            y=share * mean,
            mode="lines",
            name=f"threshold: {share:.0%} of their mean",
            line={"color": "#888", "dash": "dot"},
        )
    for index, (name, far) in enumerate(found.far.items()):
        drawn.add_scatter(
            x=far["sigma"].values,
            y=far.values,
            name=plain(name),
            mode="lines+markers",
            line={"color": COLOURS[index % 4], "dash": DASHES[index % 4]},
            customdata=far["step"].values,
            hovertemplate="step %{customdata}, sigma %{x:.3g}: %{y:.3g}<extra></extra>",
        )
    drawn.update_xaxes(type="log", autorange="reversed", title="sigma (noise over signal)")
    drawn.update_yaxes(rangemode="tozero", title="distance, in units of latents")
    drawn.update_layout(
        height=340,
        margin={"l": 60, "r": 10, "t": 50, "b": 50},
        hovermode="x",
        title={"text": UNITS[of], "font": {"size": 14}},
        legend={"orientation": "h", "y": -0.28},
    )
    return drawn
