"""`probe export --pixels`: pixels against latents as one page that fetches nothing."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from trained import made_up

import probe
from probe.errors import ExperimentError, RecordingNotFound
from probe.export import main
from probe.figures import pixels_page
from probe.figures.pixels_trained import MISSING
from probe.reading.pixels import counts, shares_of
from probe.testing.synthetic import synthetic_recording

HOSTILE = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=2</script>'


def charts(text: str) -> list[dict[str, Any]]:
    """Return the figures of each chart of a page, by the reader's choices."""
    found = re.findall(r'<figure class="chart">.*?</figure>', text, re.S)
    return [
        json.loads(re.search(r'application/json">(.*?)</script>', one, re.S)[1])  # type: ignore[index]
        for one in found
    ]


@pytest.fixture(scope="module")
def page() -> str:
    run = probe.open_run("sample")
    return pixels_page.pixels_page(counts(), None, made_up(), {HOSTILE: shares_of(run)}, [run])


def test_it_fetches_nothing_and_has_every_section(page: str) -> None:
    assert page.startswith("<!doctype html>") and "default-src 'none'" in page
    own = page.replace(get_plotlyjs(), "")
    assert len(own) < len(page) and not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "What a call costs",
        "What it is spent on",
        "Time and memory",
        "Two runs in step",
        "Quality against cost",
        "What is lost",
        "Beside the paper",
    ]
    assert 'data-runs="1"' in page and '<div id="player">' in page


def test_every_choice_has_its_figure(page: str) -> None:
    blocks = re.findall(r'<figure class="chart">.*?</figure>', page, re.S)
    for block, figures in zip(blocks, charts(page), strict=True):
        counted = 1
        for select in re.findall(r"<select>(.*?)</select>", block, re.S):
            counted *= select.count("<option")
        assert len(figures) == counted
        for figure in figures.values():
            assert figure["data"] and len(figure["caption"]) > 80 and figure["command"]
    quality = next(one for one in charts(page) if "kid flops charged" in one)
    assert "One seed" in quality["recognised steps free"]["caption"]
    cost = [quality[f"kid flops {charge}"]["data"][1]["x"] for charge in ("charged", "free")]
    assert cost[0][0] > cost[1][0]
    assert quality["kid steps charged"] == quality["kid steps free"]


def test_somebodys_text_stays_text(page: str) -> None:
    assert "<img src=x" not in page and "window.pwned=2</script>" not in page
    told = next(one[""] for one in charts(page) if "" in one and "A whole run" in str(one))
    assert unescape(told["data"][0]["y"][0]) == f"{HOSTILE} (measured here)"


def test_without_a_demonstration_it_says_how_one_is_trained() -> None:
    text = pixels_page.pixels_page(counts(), None, None, {})
    assert MISSING in unescape(text) and "python -m experiments.pixels.train" in text
    assert "No runs were named" in text and 'data-runs="0"' in text


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "pixels.html"
    assert main(["--pixels", str(target)]) == 0
    assert "pixels.html (" in capsys.readouterr().out
    text = target.read_text("utf-8")
    assert "sample (measured here)" in text and 'data-runs="0"' in text


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="another ending"):
        main(["--pixels", str(tmp_path / "x.png")])
    with pytest.raises(ExperimentError, match="at most"):
        main([*["sample"] * 5, "--pixels", str(tmp_path / "x.html")])
    with pytest.raises(RecordingNotFound):
        main(["nowhere", "--pixels", str(tmp_path / "x.html")])
    with pytest.raises(ExperimentError, match="No recording is named"):
        main(["--html", str(tmp_path / "x.html")])
    assert not list(tmp_path.iterdir())


def test_a_run_without_times_is_played_all_the_same(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "bare.zarr", steps=3)
    assert main([str(path), "--pixels", str(tmp_path / "x.html")]) == 0
    assert 'data-runs="1"' in (tmp_path / "x.html").read_text("utf-8")
