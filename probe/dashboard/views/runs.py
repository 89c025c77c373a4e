"""Runs: the recordings there are, the newest first; pick some to look at."""

from __future__ import annotations

import shlex
from typing import Any

import streamlit as st

from probe.dashboard.views.pick import MOST, is_noising, recordings
from probe.dashboard.views.replay import RECORD
from probe.errors import ExperimentError
from probe.reading.listing import Listed
from probe.reading.sample import name_of
from probe.settings.experiment import load_experiment
from probe.settings.noising import load_noising
from probe.settings.recipe import Recipe
from probe.text import encodable

ALWAYS = ("prompt", "caption", "seed", "steps", "guidance_scale")  # said also as the default


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
        st.text(f"Select one run to look at it and to see its command; up to {MOST}, to compare.")
        return
    pages = st.session_state["pages"]
    left, right = st.columns([1, 5])
    (key, row), *_ = picked
    page = pages["learn" if is_noising(row) else "replay"]
    label = "Look at it" if len(picked) == 1 else "Look at the first"
    if left.button(label, key="to_one", type="primary"):
        st.switch_page(page, query_params={"runs": [key]})
    drawn = [key for key, there in picked if not is_noising(there)]
    if len(drawn) > 1 and right.button("Compare", key="to_compare"):
        st.switch_page(pages["compare"], query_params={"runs": drawn[:MOST]})
    if len(drawn) < len(picked) > 1:
        st.text("Compare shows runs of the kind generation alone.")
    if len(picked) == 1:
        origin(row)


def made_by(row: Listed) -> str:
    """Return a command that makes the same run, or "" if an option cannot say its settings."""
    said = row.attributes or {}
    noised = bool(said.get("noising"))
    try:
        asked: Recipe = (
            load_noising(said["noising"]) if noised else load_experiment(said["experiment"])
        )
    except (ExperimentError, KeyError):
        return ""
    given = _options(asked.model_dump(mode="json"), type(asked)().model_dump(mode="json"))
    if given is None:
        return ""
    return shlex.join(["python", "-m", "probe.noising" if noised else "probe.run", *given])


def _options(settings: dict[str, Any], defaults: dict[str, Any], at: str = "") -> list[str] | None:
    """Return settings as options, mostly those unlike the default; None if one is no option."""
    given: list[str] = []
    for name, value in settings.items():
        if value == defaults[name] and at + name not in ALWAYS:
            continue
        if name == "capture":
            inner = _options(value, defaults[name], "capture.")
            if inner is None:
                return None
            given += inner
            continue
        items = [str(item) for item in value] if isinstance(value, list) else []
        if isinstance(value, dict) or any("," in item for item in items):
            return None
        text = ",".join(items) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        given.append(f"--{at}{name.replace('_', '-')}={text}")
    return given


def origin(row: Listed) -> None:
    """Say which command makes a recording, and which records it again and compares."""
    if command := made_by(row):
        st.text("This command makes the same run, from the folder it began in:")
        st.code(encodable(command), language=None, wrap_lines=True)
    st.text("This records it again with the settings that it keeps, and compares the two:")
    again = ["python", "-m", "probe", "rerun", str(row.path)]
    st.code(encodable(shlex.join(again)), language=None, wrap_lines=True)


def _row(row: Listed) -> dict[str, Any]:
    """Return a recording as a row of the table; a damaged one says why."""
    name = encodable(name_of(row.path))
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
