"""The pages of the dashboard. Streamlit runs this file anew for each visit and change."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.views import (
    anatomy,
    compare,
    grids,
    guidance,
    learn,
    pixels,
    record,
    replay,
    runs,
    trajectories,
)

st.set_page_config(page_title="probe", layout="wide")
st.html(
    "<style>.stMainBlockContainer{padding-top:3.2rem;padding-bottom:3rem}"
    "h1.name{font-size:1.25rem;margin:0;padding:.3rem 0}"
    ".group{font-size:.8rem;opacity:.75;padding-left:1rem}"
    # In dark, Streamlit's own colour of this number has a contrast of 3.9.
    "[data-testid=stSliderThumbValue] *{color:light-dark(#000,#fff)}</style>"
)

GROUPS = {
    "Learn": {
        "learn": st.Page(learn.show, title="How diffusion works", url_path="learn"),
        "anatomy": st.Page(anatomy.show, title="Anatomy", url_path="anatomy"),
        "pixels": st.Page(pixels.show, title="Pixel vs latent", url_path="pixels"),
    },
    "Explore": {
        "runs": st.Page(runs.show, title="Runs", url_path="runs"),
        "record": st.Page(record.show, title="Record", url_path="record"),
        "replay": st.Page(replay.show, title="Replay", url_path="replay", default=True),
        "guidance": st.Page(guidance.show, title="Guidance", url_path="guidance"),
        "trajectories": st.Page(trajectories.show, title="Trajectories", url_path="trajectories"),
    },
    "Compare": {
        "compare": st.Page(compare.show, title="Compare", url_path="compare"),
        "grids": st.Page(grids.show, title="Grids", url_path="grids"),
    },
}
PAGES = {key: page for group in GROUPS.values() for key, page in group.items()}
st.session_state["pages"] = PAGES
chosen = st.navigation(list(PAGES.values()), position="hidden")
keep = {key: st.query_params.get_all(key) for key in ("runs", "step") if key in st.query_params}
with st.container(horizontal=True, vertical_alignment="center", gap="small"):
    st.html('<h1 class="name">probe</h1>', width="content")
    for group, pages in GROUPS.items():
        if group not in (page.title for page in pages.values()):
            st.html(f'<span class="group">{group}</span>', width="content")
        for page in pages.values():
            st.page_link(page, query_params=keep, width="content")
chosen.run()
