"""The runs that a view shows: picked by the reader, kept in the address."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.library import library
from probe.errors import ProbeError
from probe.reading.listing import Listed

MOST = 4


@st.cache_data(ttl=5, show_spinner=False)
def rows(folder: str) -> list[tuple[str, Listed]]:
    """Return the recordings in the library of `folder`. They are read again after five seconds."""
    assert folder == str(library().folder)
    return library().rows()


def recordings() -> list[tuple[str, Listed]]:
    """Return the recordings; stop the page and say why if the folder cannot be read."""
    folder = str(library().folder)
    try:
        listed = rows(folder)
        keys = {key for key, _ in listed}
        new = [key for key in st.query_params.get_all("runs") if key not in keys]
        if any(library().has(key) for key in new):  # a link to one that was begun just now
            rows.clear()
            listed = rows(folder)
        return listed
    except ProbeError as error:
        st.code(str(error), language=None)
        st.stop()


def is_noising(row: Listed) -> bool:
    return bool((row.attributes or {}).get("noising"))


def _say_where(asked: list[str], readable: dict[str, bool], noisings: bool) -> None:
    """Say of recordings of the other kind, which a link brought here, which page shows them."""
    others = [key for key in asked if readable.get(key, noisings) != noisings]
    if not others:
        return
    names = ", ".join(others)
    if noisings:
        st.text(f"No noising, so not shown here: {names}. The page Replay shows it, step by step.")
    else:
        st.text(
            f"A noising, so not shown here: {names}. Its noise levels are tried one by one: no "
            "step follows from another, no scheduler takes part, and no picture is painted."
        )
    if pages := st.session_state.get("pages"):  # not where a test opens one page alone
        page = pages["replay" if noisings else "learn"]
        st.page_link(page, query_params={"runs": others}, width="content")


def pick(
    at_least: int = 1, most: int = MOST, noisings: bool = False, record: str = ""
) -> list[str]:
    """Ask for runs and return their ids; stop the page, with a word why, while there are too few.

    `record` is a command that makes such a run: it is shown where there is none.
    """
    readable = {key: is_noising(row) for key, row in recordings() if row.attributes is not None}
    there = [key for key, noised in readable.items() if noised == noisings]
    _say_where(list(dict.fromkeys(st.query_params.get_all("runs"))), readable, noisings)
    if not there:
        st.info("There is no such recording yet. This makes one:")
        st.code(record, language=None)
        st.stop()
    chosen = st.multiselect(
        "Runs",
        there,
        default=there[:at_least],
        key="runs",
        bind="query-params",
        max_selections=most,
    )
    if len(chosen) < at_least:
        st.info(f"Pick {'a run' if at_least == 1 else f'{at_least} runs'} above.")
        st.stop()
    return [str(key) for key in chosen]
