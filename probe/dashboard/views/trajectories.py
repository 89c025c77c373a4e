"""Trajectories: where the latents of runs go, step by step, and how much of it a map can show."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import streamlit as st
import xarray as xr

from probe.analysis.trajectories import pca, random_walks
from probe.dashboard.library import changed, library
from probe.dashboard.views.pick import pick, recordings
from probe.dashboard.views.replay import RECORD
from probe.errors import ProbeError
from probe.figures.plots import step_text
from probe.figures.trajectories import explained, path_map, table
from probe.reading.embedding import attributes_of, changed_since, embeddings_in, open_embedding
from probe.reading.sample import called
from probe.reading.trajectories import OF, trajectories
from probe.text import encodable

PICTURE = {"displaylogo": False, "toImageButtonOptions": {"format": "png", "scale": 2}}
WHAT = {
    "latents": "the latents that went into each call of the model, their variance kept",
    "denoised": "the clean latents that the model expected at each step",
}
TITLES = {"latents": "Where the latents go", "denoised": "Where the expected picture goes"}
METHODS = {
    "pca": "PCA: the two directions of greatest variance. Distances on it are true distances, cut "
    "down to two directions; a curve may be chance, as random walks show.",
    "umap": "UMAP: near points stay near. Read off which points are neighbours. Do not read off "
    "distances, sizes or loops: they mean nothing, and another seed draws others.",
    "aligned": "AlignedUMAP: a map of each run by itself, pulled together at the same noise "
    "levels. Read off which steps of one run are neighbours, and compare shapes. Do not read off "
    "that runs are near, for they were pulled; nor distances, sizes or loops.",
}


def show() -> None:
    chosen = pick(record=RECORD)
    left, right = st.columns([1, 2])
    of = left.radio("What each step gives", OF, horizontal=True, key="of", bind="query-params")
    try:
        maps = computed(tuple(chosen), str(of), str([changed(_path(key)) for key in chosen]))
    except ProbeError as error:
        st.code(str(error), language=None)
    else:
        _principal(chosen, str(of), maps, _step(right, maps))
    st.subheader("Stored maps: UMAP and AlignedUMAP")
    _stored(chosen, str(of))


@st.cache_data(max_entries=32, show_spinner="Computing the principal components")
def computed(keys: tuple[str, ...], of: str, state: str) -> xr.Dataset:
    """Return points, components and random walks of runs in a `state` of their files."""
    assert state
    points = trajectories([library().run(key) for key in keys], of)
    parts, walks = pca(points), random_walks(points)
    return parts.assign(
        walk_position=walks["position"], walk_explained=walks["explained"]
    ).assign_attrs(seed=walks.attrs["seed"])


def _path(key: str) -> Path:
    return library().run(key).path


def _step(where: Any, maps: xr.Dataset) -> int:
    last = int(maps["step"].max())
    step = int(where.slider("Step", 0, last, last // 3, key="step", bind="query-params"))
    where.text(f"The large ring marks {step_text(step, last + 1)}.")
    return step


def _principal(chosen: list[str], of: str, maps: xr.Dataset, step: int) -> None:
    """Show principal components of the runs that were picked, beside random walks."""
    shares, walks = maps["explained"].values, maps["walk_explained"].values
    walking = st.toggle(
        "Draw a random walk in the place of each run", key="walk", bind="query-params"
    )
    where, beside = st.columns([3, 2])
    where.subheader("Random walks" if walking else TITLES[of])
    shown = walks[0] if walking else shares
    position = maps["walk_position" if walking else "position"].values[:, :2]
    figure = path_map(maps, position, axes_of(shown), step)
    where.plotly_chart(figure, config=PICTURE, key="pca")
    beside.subheader("Is that more than chance?")
    beside.plotly_chart(explained(shares, walks), config=PICTURE, key="explained")
    st.text(reading_of(shares, walks))
    st.text(f"Each point is one step: {WHAT[of]}. A ring marks the first step, a star the last.")
    csv = table(maps, pca=maps["position"].values[:, :2])
    st.download_button("Download as CSV", csv, "trajectories.csv", "text/csv", key="csv")
    with st.expander("Copy as Python"):
        st.code(snippet(_names(chosen), str(library().folder), of), language=None)


def axes_of(shares: Any) -> list[str]:
    """Return what lies along the axes of a map by PCA. *Shape:* (component)."""
    return [f"component {place + 1}, {shares[place]:.0%} of the variance" for place in range(2)]


def reading_of(shares: Any, walks: Any) -> str:
    """Return what the shares of the variance say, in words. *Shape:* (component), (walk, c)."""
    first, chance = shares[:2].sum(), walks[:, :2].sum(axis=1)
    if first > chance.max():
        verdict = "More than any walk: these paths keep their direction."
    elif first < chance.min():
        verdict = "Less than any walk: more directions matter than a map has."
    else:
        verdict = (
            "No more and no less: the shape of these curves says nothing that chance does not."
        )
    return (
        f"Components 1 and 2 hold {first:.1%} of the variance. In {len(walks)} random walks with "
        f"the same starts and as many steps of the same sizes they hold {chance.min():.1%} to "
        f"{chance.max():.1%}, and such walks draw smooth loops as well (Antognini and "
        f"Sohl-Dickstein 2018). {verdict}"
    )


def snippet(names: list[str], folder: str, of: str) -> str:
    """Return Python that yields what the figures show."""
    return (
        "import probe\n\n"
        f"runs = [probe.open_run(name, {folder!r}) for name in {names!r}]\n"
        f"points = probe.trajectories(runs, of={of!r})  # (point, feature)\n"
        "parts = probe.analysis.pca(points)  # .position (point, component), .explained\n"
        "walks = probe.analysis.random_walks(points)  # .explained (walk, component)\n"
    )


def _names(keys: list[str]) -> list[str]:
    """Return what commands call recordings: their name, or their path outside of the folder."""
    folder = library().folder.absolute()
    return [
        path.name.removesuffix(".zarr") if path.parent.absolute() == folder else called(path)
        for path in map(_path, keys)
    ]


# --- what was computed before ---------------------------------------------------------------------


@st.cache_data(max_entries=16, show_spinner=False)
def opened(path: str, state: int) -> xr.Dataset:
    """Return an embedding, read again when its root file has a new time, `state`."""
    assert state
    return open_embedding(path)


def _stored(chosen: list[str], of: str) -> None:
    """Show the maps of an embedding, or teach how to compute one."""
    folder = library().folder
    words = ["probe", "embed", *_names(chosen), "--of", of, "--runs", str(folder)]
    command = encodable(shlex.join(words if of != OF[0] else [*words[:-4], *words[-2:]]))
    try:
        there = {path.name.removesuffix(".zarr"): path for path in embeddings_in(folder)}
    except ProbeError as error:
        st.code(str(error), language=None)
        return
    if not there:
        st.info(
            "UMAP takes a minute, so it is computed once, by a command. This one has your runs:"
        )
        st.code(command, language=None)
        return
    name = st.selectbox("Embedding", list(there), key="embedding", bind="query-params")
    path = there[str(name)]
    try:
        embedding = opened(str(path), (path / "zarr.json").stat().st_mtime_ns)
        paths = [row.path for _, row in recordings()]
        _maps(path, embedding, changed_since(embedding, paths))
    except (ProbeError, OSError) as error:
        st.code(str(error), language=None)
    st.text("This computes maps of the runs that are picked above:")
    st.code(command, language=None)


def _maps(path: Path, embedding: xr.Dataset, altered: list[str]) -> None:
    attributes = attributes_of(embedding)
    if altered:
        st.warning("Since it was computed, these recordings have changed. Compute it again.")
        st.code("\n".join(altered), language=None)
    st.text(f"{WHAT[attributes.of].capitalize()}. Computed {attributes.created[:10]}.")
    step = st.session_state.get("step")
    methods = embedding["method"].values.tolist()
    for method in dict.fromkeys(methods):
        which = [place for place, of_map in enumerate(methods) if of_map == method]
        if method == "pca":
            columns = st.columns([3, 2])
            shares, walks = embedding["explained"].values, embedding["walk_explained"].values
            columns[1].text(METHODS[method])
            columns[1].text(reading_of(shares, walks))
        else:
            st.text(METHODS[method])
            columns = st.columns(max(3, len(which)))
        for place, column in zip(which, columns, strict=False):
            values, large = embedding["position"].values[place], method == "pca"
            axes = axes_of(embedding["explained"].values) if large else ()
            figure = path_map(embedding, values, axes, step, small=not large)
            column.plotly_chart(figure, config=PICTURE, key=f"map-{place}")
            column.text(preserved(embedding, place, attributes.compared_neighbours))
    positions = {
        method if method == "pca" else f"{method}_seed{seed}": embedding["position"].values[place]
        for place, (method, seed) in enumerate(
            zip(methods, embedding["seed"].values.tolist(), strict=True)
        )
    }
    st.download_button(
        "Download these maps as CSV", table(embedding, **positions), "maps.csv", key="maps-csv"
    )
    with st.expander("Copy as Python"):
        st.code(stored_snippet(path), language=None)


def preserved(embedding: xr.Dataset, place: int, neighbours: int) -> str:
    """Return how well one map keeps neighbours, in words."""
    of_map = embedding.isel(map=place)
    seed = int(of_map["seed"])
    return (
        f"{f'Seed {seed}: ' if seed >= 0 else ''}{float(of_map['kept']):.0%} of the {neighbours} "
        f"nearest neighbours kept (by chance {float(of_map['by_chance']):.0%}); among the steps of "
        f"one run {float(of_map['kept_within']):.0%} (by chance "
        f"{float(of_map['within_by_chance']):.0%}); trustworthiness "
        f"{float(of_map['trustworthiness']):.3f}"
    )


def stored_snippet(path: Path) -> str:
    """Return Python that yields the maps of an embedding."""
    return (
        "import xarray\n\n"
        f"embedding = xarray.open_zarr({str(path)!r}).load()\n"
        "maps = embedding.position  # (map, point, axis); .method and .seed of each map\n"
        "embedding.kept, embedding.trustworthiness  # of each map\n"
    )
