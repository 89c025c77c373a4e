"""The pages of the dashboard. Streamlit runs this file anew for each visit and change."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.views import compare, learn, replay, runs

st.set_page_config(page_title="probe", layout="wide")
st.html(
    "<style>.stMainBlockContainer{padding-top:3.2rem;padding-bottom:3rem}"
    "h1.name{font-size:1.25rem;margin:0;padding:.3rem 0}</style>"
)

PAGES = {
    "replay": st.Page(replay.show, title="Replay", url_path="replay", default=True),
    "runs": st.Page(runs.show, title="Runs", url_path="runs"),
    "learn": st.Page(learn.show, title="How diffusion works", url_path="learn"),
    "compare": st.Page(compare.show, title="Compare", url_path="compare"),
}
st.session_state["pages"] = PAGES
chosen = st.navigation(list(PAGES.values()), position="hidden")
name, *places, _ = st.columns([1, 1, 1, 2, 1, 4], vertical_alignment="center")
name.html('<h1 class="name">probe</h1>')
for place, page in zip(places, PAGES.values(), strict=True):
    keep = {"runs": st.query_params.get_all("runs")} if "runs" in st.query_params else {}
    place.page_link(page, query_params=keep)
chosen.run()
