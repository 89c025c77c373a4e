"""The player as a Streamlit component. It is given ids; what it draws comes by our own routes."""

from __future__ import annotations

from importlib import resources

import streamlit as st

from probe.figures.page import asset, script

_home = resources.files("probe.dashboard").joinpath("home.js").read_text(encoding="utf-8")
_component = st.components.v2.component(
    "probe_player", js=script() + _home, css=asset("player.css")
)


def player(runs: list[str], key: str) -> None:
    """Show one to four recordings, by their ids, side by side."""
    _component(key=key, data={"id": " ".join(runs), "runs": runs}, height="content")
