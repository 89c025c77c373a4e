"""How diffusion works: a picture, noised at many levels, and what the model makes of each."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.player import player
from probe.dashboard.views.pick import pick

RECORD = "python -m probe.noising experiments/noising.yaml"
LESSON = (
    "Training shows the model a picture with noise mixed in, and asks which part is noise. "
    "Move through the noise levels below: with much noise the model sees all of the noise and "
    "little of the picture, so its guess of the picture is a blur. With little noise its guess is "
    "sharp, but noise and fine detail are hard to tell apart, so the loss is larger."
)


def show() -> None:
    st.text(LESSON)
    player(pick(most=1, noisings=True, record=RECORD), key="learn")
