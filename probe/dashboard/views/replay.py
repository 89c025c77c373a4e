"""Replay: one run, step by step, and where each word was looked at."""

from __future__ import annotations

from probe.dashboard.player import player
from probe.dashboard.views.pick import pick

RECORD = "python -m probe.run experiments/astronaut.yaml"


def show() -> None:
    player(pick(most=1, record=RECORD), key="replay")
