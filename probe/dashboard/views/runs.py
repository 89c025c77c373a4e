"""Runs: the recordings there are, the newest first; pick some to look at."""

from __future__ import annotations

from typing import Any

import streamlit as st

from probe.dashboard.views.pick import MOST, is_noising, recordings
from probe.dashboard.views.replay import RECORD
from probe.reading.listing import Listed
from probe.text import encodable


def show() -> None:
    found = recordings()
    if not found:
        st.info("There is no recording yet. This makes one:")
        st.code(RECORD, language=None)
        return
    event = st.dataframe(
        [_row(row) for _, row in found],
        key="table",
        hide_index=True,
        selection_mode="multi-row",
        on_select="rerun",
        height="content" if len(found) < 18 else 640,
    )
    picked = [found[index] for index in event.selection.rows if found[index][1].error is None]
    if not picked:
        st.text(f"Select one run to look at it, or up to {MOST} to compare them.")
        return
    pages = st.session_state["pages"]
    left, right = st.columns([1, 1])
    (key, row), *_ = picked
    page = pages["learn" if is_noising(row) else "replay"]
    if left.button("Look at it", key="to_one", type="primary"):
        st.switch_page(page, query_params={"runs": [key]})
    if len(picked) > 1 and right.button("Compare", key="to_compare"):
        st.switch_page(pages["compare"], query_params={"runs": [key for key, _ in picked[:MOST]]})


def _row(row: Listed) -> dict[str, Any]:
    """Return a recording as a row of the table; a damaged one says why."""
    name = encodable(row.path.name.removesuffix(".zarr"))
    if row.attributes is None:
        return {"name": name, "prompt": f"cannot be read: {row.error}", "status": "damaged"}
    said = row.attributes
    asked = said.get("noising") or said.get("experiment") or {}
    return {
        "name": name,
        "prompt": str(asked.get("caption") or asked.get("prompt", "")),
        "model": str(said.get("model", {}).get("name", "")),
        "scheduler": str(said.get("scheduler", {}).get("class", "")).removesuffix("Scheduler"),
        "kind": "noising" if is_noising(row) else "generation",
        "steps": asked.get("steps") or len(asked.get("timesteps", ())),
        "guidance": asked.get("guidance_scale"),
        "seed": asked.get("seed"),
        "status": str(said.get("status", "")),
        "date": str(said.get("created", ""))[:16].replace("T", " "),
    }
