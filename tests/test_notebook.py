"""`run.player()` is a page in a frame that a notebook shows, without IPython."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import probe
from probe.errors import ExperimentError
from probe.figures.notebook import Player
from probe.figures.page import page
from probe.testing.synthetic import synthetic_recording

ROOT = Path(__file__).resolve().parent.parent
FRAME = re.compile(
    r'<iframe title="probe player" sandbox="allow-scripts" srcdoc="([^"<>]*)" '
    r'style="width: 100%; height: (\d+)px; border: 0"></iframe>'
)


def framed(player: Player) -> tuple[str, int]:
    """Return the page in a player's frame, and the height."""
    whole = FRAME.fullmatch(player._repr_html_())
    assert whole is not None
    return html.unescape(whole[1]), int(whole[2])


def test_the_frame_holds_the_exported_page() -> None:
    first, second = (probe.open_run(name) for name in ("sample", "sample-guidance-8"))
    player = first.player()
    assert framed(player) == (page([first]), 900) and len(player._repr_html_()) < 600_000
    assert repr(player) == f"<Player of {first.name}, which a notebook shows>"
    both = first.player(second, height=1400)
    assert framed(both) == (page([first, second]), 1400)
    assert 'data-runs="2"' in both.page and second.name in repr(both)
    assert len(first._repr_html_()) < 5_000, "a run itself stays small"


def test_a_prompt_stays_text(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "cat.zarr", prompt='"><script>alert(1)</script>')
    inside, _ = framed(probe.open_run(path).player())
    assert "<script>alert" not in inside and "&lt;script&gt;alert" in inside


def test_what_cannot_be_shown_is_refused() -> None:
    run = probe.open_run("sample")
    with pytest.raises(ExperimentError, match="'sample' is no recording") as caught:
        run.player("sample")  # type: ignore[arg-type]
    assert caught.value.remedy == "Open it first: probe.open_run(path)."
    with pytest.raises(ExperimentError, match="4 recordings at most"):
        run.player(run, run, run, run)
    with pytest.raises(ExperimentError, match="height"):
        run.player(height=0)


def test_it_needs_neither_ipython_nor_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('IPython', 'torch', 'streamlit', 'plotly'): sys.modules[name] = None\n"
        "import probe; print(probe.open_run('sample').player()._repr_html_()[:7])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "<iframe\n"), done.stderr
