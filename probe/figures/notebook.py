"""Recordings that play in a cell of a notebook: `run.player()`.

A notebook asks a value for its HTML and shows it, so neither IPython nor a server is needed.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from probe.arguments import in_words, whole_number
from probe.errors import ExperimentError
from probe.figures.page import page
from probe.reading.recording import Run

MOST = 4
HEIGHT = 900  # pixels: pictures, slider and film strip of one run


class Player:
    """One to four recordings side by side, as the last value of a notebook's cell.

    `page` is the HTML of the whole page, as `probe export` writes it. The notebook keeps all of it,
    some 0.4 MB for 20 steps.
    """

    def __init__(self, runs: Sequence[Run], height: int = HEIGHT) -> None:
        for run in runs:
            if not isinstance(run, Run):
                raise ExperimentError(
                    f"{in_words(run)} is no recording.", "Open it first: probe.open_run(path)."
                )
        if len(runs) > MOST:
            raise ExperimentError(f"A player shows {MOST} recordings at most.", "Give fewer.")
        self.height = whole_number("height", height, 200, 10_000)
        self.names = [run.name for run in runs]
        self.page = page(runs)

    def __repr__(self) -> str:
        return f"<Player of {', '.join(self.names)}, which a notebook shows>"

    def _repr_html_(self) -> str:
        """Return the page in a frame that may run its own script and reach nothing else."""
        return (
            '<iframe title="probe player" sandbox="allow-scripts" '
            f'srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )
