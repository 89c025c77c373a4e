"""Compare: two to four runs, each at the same noise level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import streamlit as st

from probe.dashboard.library import library
from probe.dashboard.player import player
from probe.dashboard.views.pick import is_noising, pick, recordings
from probe.dashboard.views.replay import RECORD
from probe.errors import ProbeError
from probe.figures.distance import distances, figure, said
from probe.reading.distances import Latents
from probe.reading.edited import edit_sentences, edits_in_short
from probe.reading.recording import Run
from probe.reading.sample import called
from probe.settings.recipe import UNRECORDED

NAMES = {"denoised": "the predicted clean latents", "latents": "the latents, rescaled"}
UNIMPORTANT = (*UNRECORDED, "device")


def show() -> None:
    chosen = pick(at_least=2, record=f"{RECORD} --guidance-scale 8")
    runs = _opened(chosen)
    there = {row.attributes.get("identity"): key for key, row in recordings() if row.attributes}
    for sentence in kinship(runs, there):
        st.text(sentence)
    asked = asked_differently(runs)
    if asked:
        st.text("Settings that differ:")
        st.dataframe(asked, key="asked", hide_index=True)
    else:
        st.text("All of them have the same settings.")
    where = st.container()  # the sentence comes first, what it is made of last
    _pair(runs)
    player(chosen, key="compare")
    _distances(runs, where)


def _opened(keys: list[str]) -> dict[str, Run]:
    """Return runs by their ids; stop the page and say why if one cannot be read."""
    try:
        return {key: library().run(key) for key in keys}
    except ProbeError as error:
        st.code(str(error), language=None)
        st.stop()


def _distances(runs: dict[str, Run], where: Any) -> None:
    """Show how far the runs are from the first, and say where they part."""
    st.subheader("Where they part from the first", anchor=False)
    left, right = st.columns([1, 2])
    of: Latents = left.selectbox(
        "Distance of",
        get_args(Latents),
        key="of",
        bind="query-params",
        format_func=NAMES.__getitem__,
    )
    seeds = right.multiselect(
        "Runs of the first with other seeds: how far apart chance alone is",
        [key for key, row in recordings() if row.attributes and not is_noising(row)],
        key="seeds",
        bind="query-params",
        max_selections=16,
    )
    others = _opened([str(key) for key in seeds if key not in runs])
    try:
        found = distances(runs, others, of)
    except ProbeError as error:
        where.code(str(error), language=None)
        return
    for sentence in [*said(found), *found.left_out]:
        where.text(sentence)
    if not found.far:
        return
    st.plotly_chart(figure(found, of), key="distances", config={"displaylogo": False})
    table = [
        {"run": name, "step": int(step), "sigma": float(sigma), "distance": float(value)}
        for name, far in found.far.items()
        for step, sigma, value in zip(far["step"], far["sigma"], far.values, strict=True)
    ]
    with st.expander("Numbers and code"):
        st.dataframe(table, key="numbers", hide_index=True)
        first, second, *_ = runs.values()
        st.code(snippet(first, second, of), language=None)


def snippet(one: Run, two: Run, of: Latents) -> str:
    """Return the Python that gives the distances of two runs."""
    return (
        f"import probe\n\none = probe.open_run({called(one.path)!r})\n"
        f"two = probe.open_run({called(two.path)!r})\n"
        f"probe.distance(one, two, of={of!r})"
    )


def asked_differently(runs: dict[str, Run]) -> list[dict[str, str]]:
    """Return the settings that are not the same in all runs, one row each.

    Edits come first, in sentences. What was captured comes last: it changes no picture.
    """
    asked = []
    for run in runs.values():
        settings = dict(_flat(run.recipe.model_dump(mode="json")))
        edits = "; ".join(edit_sentences(run.attributes.recipe)) or "none"
        asked.append({**settings, "edits": edits})
    names = dict.fromkeys(name for settings in asked for name in settings)
    return [
        {
            "setting": name,
            **{key: str(one.get(name)) for key, one in zip(runs, asked, strict=True)},
        }
        for name in sorted(names, key=_importance)
        if name not in UNIMPORTANT and any(one.get(name) != asked[0].get(name) for one in asked)
    ]


def _importance(name: str) -> int:
    return 0 if name == "edits" else 2 if name.startswith(("capture", "decode")) else 1


def kinship(runs: dict[str, Run], there: Mapping[Any, str]) -> list[str]:
    """Return which of the runs are edited, and which run is the parent.

    `there` gives the names of other recordings by identity.
    """
    identities = {run.attributes.identity: key for key, run in runs.items()}
    sentences = []
    for key, run in runs.items():
        identity = run.attributes.parent_identity
        parent = identities.get(identity)
        edits = edits_in_short(dict(run.attributes), parent or there.get(identity, ""))
        if edits:
            sentences.append(f"{key}: {edits}{'' if parent else ', which is not shown here'}.")
    return sentences


def _pair(runs: dict[str, Run]) -> None:
    """Show, if the reader asks for it, how the first edited run differs from its parent."""
    identities = {run.attributes.identity: run for run in runs.values()}
    pairs = [
        (run, identities[run.attributes.parent_identity])
        for run in runs.values()
        if run.attributes.parent_identity in identities
    ]
    if pairs and st.toggle("The edited run and its parent in numbers", key="pair"):
        try:
            st.code(str(pairs[0][0].against_parent(pairs[0][1])), language=None)
        except ProbeError as error:
            st.code(str(error), language=None)


def _flat(settings: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
