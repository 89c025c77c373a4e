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


def pick(
    at_least: int = 1, most: int = MOST, noisings: bool = False, record: str = ""
) -> list[str]:
    """Ask for runs and return their ids; stop the page, with a word why, while there are too few.

    `record` is a command that makes such a run: it is shown where there is none.
    """
    there = [
        key
        for key, row in recordings()
        if row.attributes is not None and is_noising(row) == noisings
    ]
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
