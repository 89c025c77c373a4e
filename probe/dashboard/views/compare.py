"""Compare: two to four runs, each at the same noise level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import streamlit as st

from probe.dashboard.library import library
from probe.dashboard.player import player
from probe.dashboard.views.pick import pick
from probe.dashboard.views.replay import RECORD
from probe.reading.recording import Run

UNIMPORTANT = ("name", "output", "durability", "device")


def show() -> None:
    chosen = pick(at_least=2, record=f"{RECORD} --guidance-scale 8")
    runs = [library().run(key) for key in chosen]
    asked = asked_differently(runs)
    if asked:
        st.text("Asked differently:")
        st.dataframe(asked, key="asked", hide_index=True)
    else:
        st.text("The same was asked of all of them.")
    player(chosen, key="compare")


def asked_differently(runs: list[Run]) -> list[dict[str, str]]:
    """Return the settings that are not the same in all runs, one row each: `capture.tokens`."""
    asked = [dict(_flat(run.recipe.model_dump(mode="json"))) for run in runs]
    names = dict.fromkeys(name for settings in asked for name in settings)
    return [
        {
            "setting": name,
            **{run.name: str(one.get(name)) for run, one in zip(runs, asked, strict=True)},
        }
        for name in names
        if name not in UNIMPORTANT and any(one.get(name) != asked[0].get(name) for one in asked)
    ]


def _flat(settings: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
