"""Pixel vs latent: what a compressed space saves, counted, measured, trained, and published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from probe.dashboard.library import library
from probe.dashboard.player import player
from probe.dashboard.views.pick import is_noising, recordings
from probe.errors import ProbeError
from probe.figures import pixels as figures
from probe.figures import pixels_trained as of_training
from probe.figures.pixels_looks import Shown, name_of, size_text, space_text
from probe.figures.pixels_page import (
    LESSON,
    OF_ROUND_TRIPS,
    OF_RUNS,
    RECORD,
    ROUND_TRIPS,
    measured_here,
    round_trips,
)
from probe.figures.pixels_tables import Table, beside_paper, table_html, trained_table
from probe.figures.plots import CONFIG
from probe.reading.pixels import counts, paper, shares_of, trained
from probe.reading.sample import NAMES

EXPORT = "probe export --pixels pixels.html"


def show() -> None:
    st.text(LESSON)
    if st.session_state.get("part") not in PARTS:
        st.session_state.pop("part", None)
    PARTS[st.radio("Part", list(PARTS), horizontal=True, key="part", bind="query-params")]()
    st.text("All of this as one page that others can open:")
    st.code(EXPORT, language=None)


@st.fragment
def _costs() -> None:
    """Show what was counted, of the model, f and size that the reader chooses."""
    left, middle, right = st.columns(3)
    model = _one("Model", counts().models, "cost_model", name_of, left)
    spaces = [f for f in counts().factors_of(model) if f > 1]
    f = _one("Latents", spaces, "cost_f", space_text, middle, default=8)
    usual = figures.usual_size(counts(), model)
    sizes = figures.squares(counts(), model)
    size = _one("Pixels", sizes, "cost_size", size_text, right, default=usual)
    _chart(figures.factors(counts(), model, f, size))
    left, right = st.columns(2)
    _chart(figures.cost_by_size(counts(), model), left)
    _chart(figures.cost_by_f(counts(), model, size), right)
    st.subheader("What it is spent on")
    space = _one("Space", counts().factors_of(model), "kinds_f", space_text, default=1)
    left, right = st.columns(2)
    _chart(figures.shares_by_size(counts(), model, space), left)
    _chart(figures.attention_bytes(counts(), model), right)


@st.fragment
def _times() -> None:
    """Show what was measured, and the parts of a whole run."""
    measured = measured_here()
    if measured is not None:
        models = list(dict.fromkeys(cell.model for cell in measured.cells))
        model = _one("Measured model", models, "time_model", name_of)
        left, right = st.columns(2)
        _chart(figures.law(measured, model, "seconds"), left)
        _chart(figures.law(measured, model, "call_bytes"), right)
    _chart(figures.shares(_recorded(), counts()))


def _recorded() -> dict[str, dict[str, float]]:
    """Return the seconds of the parts of the sample, and of runs in the library.

    These are the first on pixels and on latents, and those that the view was opened with. A
    recording without times is left out.
    """
    found = {}
    first = [keys[0] for keys in _by_space().values() if keys]
    for key in dict.fromkeys([*NAMES[:1], *first, *st.query_params.get_all("runs")]):
        try:
            found[key] = shares_of(library().run(key))
        except ProbeError:
            continue
    return found


def _by_space() -> dict[str, list[str]]:
    """Return the runs in the library that are on pixels, and those on latents."""
    found: dict[str, list[str]] = {"pixels": [], "latents": []}
    for key, row in recordings():
        model = (row.attributes or {}).get("model")
        f = model.get("f") if isinstance(model, Mapping) else None
        if isinstance(f, int) and not is_noising(row):
            found["pixels" if f == 1 else "latents"].append(key)
    return found


def _two_runs() -> None:
    """Play a run on pixels beside one on latents, or say how to record them."""
    st.text(OF_RUNS)
    found = _by_space()
    if not all(found.values()):
        st.info("There is no recording on pixels yet. These two are alike in all but the space:")
        st.code(RECORD, language=None)
        return
    left, right = st.columns(2)
    one = _one("On pixels", found["pixels"], "pixel_run", str, left)
    two = _one("On latents", found["latents"], "latent_run", str, right)
    player([one, two], key="pixels")


def _demonstration() -> None:
    """Show what the trained demonstration gave, or how it is trained."""
    found = trained()
    if found is None:
        st.info(of_training.MISSING)
        st.code(of_training.TRAIN, language=None)
        return
    _quality(found)
    _lost(found)


def _beside() -> None:
    _table(beside_paper(counts(), measured_here(), paper(), trained()))


@st.fragment
def _quality(found: Mapping[str, Any]) -> None:
    """Show quality against cost, what may be said of it, and what was trained."""
    left, middle, right = st.columns(3)
    y = _one("Quality", list(of_training.QUALITIES), "quality", of_training.QUALITIES.get, left)
    x = _one("Against", list(of_training.AXES), "against", of_training.AXES.get, middle)
    charge: of_training.Charge = "free"
    if x in of_training.COSTLY:
        charges = list(of_training.CHARGES)
        charge = _one(
            "The autoencoder", charges, "charge", lambda one: of_training.CHARGES[one][0], right
        )
    _chart(of_training.quality(found, y, x, charge))
    for sentence in of_training.said(found, y, x, charge):
        st.text(sentence)
    _table(trained_table(found))
    left, right = st.columns(2)
    _chart(of_training.by_count(found, "kid"), left)
    _chart(of_training.by_count(found, "fd"), right)


def _lost(found: Mapping[str, Any]) -> None:
    st.subheader("What is lost")
    left, right = st.columns(2)
    _chart(of_training.distortion(found, "psnr"), left)
    _chart(of_training.distortion(found, "ssim"), right)
    if ROUND_TRIPS.is_file():
        st.html(round_trips())
        st.text(OF_ROUND_TRIPS)


def _one(
    label: str, options: list[Any], key: str, text: Any, where: Any = st, default: Any = None
) -> Any:
    """Ask for one of some options, kept in the address. Anything else falls to the default."""
    if key in st.session_state and st.session_state[key] not in options:
        del st.session_state[key]
    at = options.index(default) if default in options else 0
    return where.selectbox(label, options, index=at, key=key, bind="query-params", format_func=text)


def _chart(shown: Shown, where: Any = st) -> None:
    where.plotly_chart(shown.figure, key=f"chart_{shown.name}", config=CONFIG)
    where.text(shown.caption)
    where.code(shown.command, language=None)


def _table(table: Table) -> None:
    st.html(table_html(table))
    st.text(table.caption)
    st.code(table.command, language=None)


PARTS = {
    "Cost": _costs,
    "Time and memory": _times,
    "Two runs": _two_runs,
    "Quality": _demonstration,
    "Beside the paper": _beside,
}
