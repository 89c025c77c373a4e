"""The player as a Streamlit component. It is given ids; what it draws comes by our own routes."""

from __future__ import annotations

from importlib import resources

import streamlit as st

from probe.figures.page import asset, script


def home_script() -> str:
    """Return the player's home as JavaScript, without its imports: they stand before it."""
    files = resources.files("probe.dashboard")
    texts = [files.joinpath(f"{name}.js").read_text("utf-8") for name in ("following", "home")]
    rows = "".join(texts).splitlines()
    return "\n".join(row for row in rows if not row.startswith("import ")) + "\n"


def home_style() -> str:
    """Return how what the home says looks."""
    return resources.files("probe.dashboard").joinpath("home.css").read_text("utf-8")


_component = st.components.v2.component(
    "probe_player", js=script() + home_script(), css=asset("player.css") + home_style()
)


def player(runs: list[str], key: str) -> None:
    """Show one to four recordings, by their ids, side by side; one that grows is followed."""
    _component(key=key, data={"id": " ".join(runs), "runs": runs}, height="content")
