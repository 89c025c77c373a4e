"""Replay: one run, step by step, and where each word was looked at."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.player import player
from probe.dashboard.views.pick import pick

RECORD = "python -m probe.run experiments/astronaut.yaml"
LESSON = (
    "A picture begins as noise. At every step the model reads the prompt, says which part of the "
    "latents is noise, and a little of it is taken away. Move through the steps below."
)


def show() -> None:
    st.text(LESSON)
    player(pick(most=1, record=RECORD), key="replay")
