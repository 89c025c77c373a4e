"""The dashboard as Streamlit starts it: the views and routes of `probe view`, for this machine.

streamlit run dashboard/app.py       # the recordings in the folder runs, and those that come along

Its options are in `.streamlit/config.toml` beside this file. `probe view` is faster to the first
picture: it opens a recording before the browser asks.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

import probe.dashboard
from probe.dashboard.routes import MIDDLEWARE, ROUTES

PAGES = Path(probe.dashboard.__file__).with_name("pages.py")
app = st.App(PAGES, routes=ROUTES, middleware=MIDDLEWARE)
