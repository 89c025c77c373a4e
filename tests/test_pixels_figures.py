"""Pixels against latents: figures show the tables' own numbers, and say what may be said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest
from trained import STEPS, made_up
from views import open_view

from experiments.pixels import figure
from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.views import pixels as view
from probe.figures import pixels, pixels_trained
from probe.figures.pixels_looks import Shown, flops_text, times_text
from probe.figures.pixels_tables import beside_paper, table_html, trained_table
from probe.reading.pixels import (
    WHY_THEY_DIFFER,
    Cell,
    Law,
    Machine,
    Measured,
    counts,
    paper,
)

TRAINED = made_up()


def cell(f: int, seconds: float, attention: str = "full", size: int = 256) -> Cell:
    side = size // f
    return Cell(
        model="sd14",
        f=f,
        size=(size, size),
        attention=attention,  # type: ignore[arg-type]
        shape=(4, side, side),
        flops=10**9,
        rounds=5,
        seconds=seconds,
        low=seconds * 0.9,
        high=seconds * 1.2,
        peak_bytes=10**9,
        call_bytes=10**8,
    )


TIMES = Measured(
    made_by="python -m experiments.cost_tables --measure",
    machine=Machine(
        device="a CPU",
        threads=1,
        torch="2",
        diffusers="0",
        dtype="float32",
        clock="processor time",
    ),
    cells=(cell(1, 12.0), cell(1, 6.0, "coarse"), cell(4, 0.5), cell(8, 0.1)),
    laws=(
        Law(
            model="sd14",
            attention="full",
            quantity="seconds",
            coefficients=(0.0, 1e-4, 1e-9),
            least=1024,
            most=65536,
            worst=0.1,
        ),
    ),
)


def lines(drawn: go.Figure) -> dict[str, Any]:
    return {trace.name: trace for trace in drawn.data}


# --- counted --------------------------------------------------------------------------------------


def test_lines_have_the_counts() -> None:
    shown = pixels.cost_by_size(counts(), "sd14")
    found = lines(shown.figure)
    assert list(found)[:3] == ["pixels", "pixels, attention up to 64 x 64", "latents, f = 2"]
    sides = [256, 384, 512, 768, 1024]
    assert list(found["latents, f = 8"].x) == sides
    assert list(found["latents, f = 8"].y) == [
        counts().of("sd14", "denoiser", 8, side).total for side in sides
    ]
    assert found["pixels, attention up to 64 x 64"].line.dash == "dash"
    assert shown.figure.layout.xaxis.type == shown.figure.layout.yaxis.type == "log"
    by_f = lines(pixels.cost_by_f(counts(), "sd14", (512, 512)).figure)
    assert list(by_f["one call of the denoiser"].x) == [1, 2, 4, 8, 16, 32]
    assert by_f["decode"].y[2] == counts().of("sd14", "vae_decode", 8, 512).total
    assert 1 not in by_f["decode"].x, "pixels are not decoded"


@pytest.mark.parametrize("model", counts().models)
def test_no_factor_stands_alone(model: str) -> None:
    size = pixels.usual_size(counts(), model)
    shown = pixels.factors(counts(), model, 8, size)
    names = [trace.y[0] for trace in shown.figure.data]
    assert len(names) == 4 and "the paper" in names[3] and WHY_THEY_DIFFER in shown.caption
    if model == "sd14":
        assert [trace.text[1] for trace in shown.figure.data] == [
            "x679",
            "x34",
            "x64",
            "x2.7 to x4.9",
        ]


def test_both_networks_of_a_factor_attend_on_the_same_grids() -> None:
    found = counts().factors("sd14", 2, 512)
    one, two = (counts().of("sd14", "denoiser", f, 512, "coarse").total for f in (1, 2))
    assert found.coarse == one / two and 3 < found.coarse < 4, "not less than latents"


def test_the_names_of_factors_leave_a_narrow_page_its_room() -> None:
    figure = pixels.factors(counts(), "sd14", 8, (512, 512)).figure
    assert not figure.layout.yaxis.showticklabels
    assert [note.text for note in figure.layout.annotations] == [
        trace.y[0] for trace in figure.data
    ]


def test_shares_add_up_and_matrices_are_bytes() -> None:
    figure = pixels.shares_by_size(counts(), "sd14", 8).figure
    for column in zip(*(trace.y for trace in figure.data), strict=True):
        assert sum(column) == pytest.approx(100)
    matrices = lines(pixels.attention_bytes(counts(), "sd14").figure)
    assert matrices["pixels"].y[2] == counts().of("sd14", "denoiser", 1, 512).attention_bytes


# --- measured -------------------------------------------------------------------------------------


def test_what_was_not_measured_is_dotted_and_called_so() -> None:
    shown = pixels.law(TIMES, "sd14", "seconds")
    found = lines(shown.figure)
    fitted, beyond = found["law, the same UNet"], found["extrapolated, the same UNet"]
    assert fitted.line.dash == "solid" and beyond.line.dash == "dot"
    assert max(fitted.x) == pytest.approx(65536) == min(beyond.x) < max(beyond.x)
    assert found["pixels, the same UNet"].marker.symbol == "square"
    assert list(found["latents, the same UNet"].x) == [64 * 64, 32 * 32]
    assert found["pixels, the same UNet"].error_y.array[0] == pytest.approx(12 * 0.2)
    assert "one thread" in shown.caption and shown.command == TIMES.made_by
    assert "a blue square is a UNet for pixels" in shown.caption


def test_shares_of_a_run_beside_those_counted() -> None:
    parts = {"text": 1.0, "steps": 8.0, "decode": 1.0}
    figure = pixels.shares({"<b>mine</b>": parts}, counts()).figure
    text, steps, decode = figure.data
    assert (text.x[0], steps.x[0], decode.x[0]) == (10, 80, 10)
    assert text.y[0] == "&lt;b&gt;mine&lt;/b&gt; (measured here)"
    assert decode.x[2] == 0 and "pixels" in decode.y[2]


# --- trained --------------------------------------------------------------------------------------


def test_an_autoencoder_is_charged_in_three_ways() -> None:
    run = next(run for run in TRAINED["runs"] if run["f"] == 4)
    own = run["points"][0]["seconds"]
    costs = [
        pixels_trained.cost_of(TRAINED, run, run["points"][0], "seconds", charge)
        for charge in ("charged", "amortised", "free")
    ]
    assert costs == pytest.approx([own + 104, own + 10.4, own])
    free = pixels_trained.cost_of(TRAINED, run, run["points"][0], "pictures", "charged")
    assert free == STEPS[0] * 16, "in pictures nothing is charged"
    on_pixels = TRAINED["runs"][0]
    assert on_pixels["f"] == 1
    assert pixels_trained.cost_of(
        TRAINED, on_pixels, on_pixels["points"][0], "flops", "charged"
    ) == (STEPS[0] * 3_000_000_000)


def test_one_seed_is_said_and_has_its_interval() -> None:
    shown = pixels_trained.quality(TRAINED, "recognised", "flops", "charged")
    found = lines(shown.figure)
    assert shown.figure.layout.title.text.startswith("At 64 pixels, emoji")
    assert "autoencoder charged" in shown.figure.layout.title.text
    curve = found["latents, f = 8"]
    assert curve.mode == "lines+markers" and curve.y[-1] == pytest.approx(60)
    assert curve.error_y.array[-1] == pytest.approx(5)
    assert found["round trip alone, f = 8"].y[0] == pytest.approx(94)
    assert "the scenes themselves" in found
    said = pixels_trained.said(TRAINED, "recognised", "flops", "charged")
    assert said[0].startswith("One seed") and "8 x 8 latents" in said[1] and len(said) == 2


def test_three_seeds_are_points_and_nothing_is_ranked() -> None:
    trained = made_up((0, 1, 2))
    figure = pixels_trained.quality(trained, "kid", "steps", "free").figure
    curves = [trace for trace in figure.data if trace.customdata is not None]
    assert len(curves) == 12 and {trace.mode for trace in curves} == {"markers"}
    assert sum(bool(trace.showlegend) for trace in curves) == 4
    said = pixels_trained.said(trained, "kid", "steps", "free")
    assert said[0].startswith("3 seeds: each is a point") and "less" not in " ".join(said)


def test_more_seeds_have_the_interval_of_the_paired_difference() -> None:
    trained = made_up(range(5))
    for run in trained["runs"]:
        if run["f"] == 4:  # differences that vary: 20 points, and 0, 1, -1, 2, -2
            off = (0.0, 0.01, -0.01, 0.02, -0.02)[run["seed"]]
            for name in ("both",):
                for point in run["points"]:
                    point[name] = [value + off for value in point[name]]
    found = pixels_trained.paired_difference(trained, 1, 4, "recognised", "steps", "free")
    assert found is not None and found.value == pytest.approx(20)
    half = 2.776 * (2.5**0.5) / 5**0.5  # Student's t of 4, sd of 0, 1, -1, 2, -2
    assert (found.low, found.high) == pytest.approx((20 - half, 20 + half))
    said = pixels_trained.said(trained, "recognised", "steps", "free")
    assert f"f = 4 less f = 1: +20 points ({20 - half:+.3g} to {20 + half:+.3g})" in said[2:][1]
    assert "f = 4 is better than f = 1" in said[3]
    level = made_up(range(5), last={2: 0.3})
    for run in level["runs"]:
        if run["f"] == 2:
            for point in run["points"]:
                point["both"] = [value + 0.02 * (-1) ** run["seed"] for value in point["both"]]
    assert "not told apart" in pixels_trained.said(level, "recognised", "steps", "free")[2]


def test_at_equal_cost_scores_lie_between_checkpoints() -> None:
    trained = made_up(range(4))
    cost = pixels_trained.common_cost(trained, "flops", "free")
    assert cost == 500 * 3_000_000_000 // 8
    run = trained["runs"][0]
    score = pixels_trained.score_at(trained, run, "recognised", "flops", "free", cost)
    assert score is None, "f = 1 is scored first at twice that"
    assert "not all of them reached" in "".join(
        pixels_trained.said(trained, "recognised", "flops", "free")
    )
    middle = pixels_trained.score_at(
        trained, run, "recognised", "steps", "free", (125 * 250) ** 0.5
    )
    first, second = (100 * point["both"][0] for point in run["points"][:2])
    assert middle == pytest.approx((first + second) / 2)


def test_a_score_at_its_ceiling_is_no_difference() -> None:
    trained = made_up(range(4), last={8: 0.93, 4: 0.9})
    said = pixels_trained.said(trained, "recognised", "steps", "free")
    ceilings = [text for text in said if "ceiling" in text]
    assert [text.split(":")[0] for text in ceilings] == ["Latents, f = 4", "Latents, f = 8"]
    differences = [text for text in said if " less " in text]
    assert [text.split(":")[0] for text in differences] == ["f = 2 less f = 1"]


def test_distances_by_count_and_what_is_kept() -> None:
    found = lines(pixels_trained.by_count(TRAINED, "kid").figure)
    assert list(found["pixels"].x) == [48, 96, 192] and found["pixels"].y[0] == pytest.approx(0.011)
    assert found["round trip, latents, f = 8"].line.dash == "dot"
    kept = lines(pixels_trained.distortion(TRAINED, "psnr").figure)
    assert list(kept["scenes"].x) == [2, 4, 8] and list(kept["photographs"].y) == [18, 16, 12]


# --- tables ---------------------------------------------------------------------------------------


def test_the_paper_and_ours_are_in_the_same_rows() -> None:
    table = beside_paper(counts(), TIMES, paper(), TRAINED)
    assert table.heads[1:5] == ["paper", "counted", "measured here", "extrapolated"]
    sampling, large, epoch, fid, gap = table.rows
    assert "0.26 to 0.97 samples/s: x3.73 (Table 6)" in sampling[1]
    factors = counts().factors("sd14", 4, 256)
    assert times_text(factors.full) in sampling[2] and times_text(factors.coarse) in sampling[2]
    assert "x24 (Stable Diffusion 1.x, the same UNet)" in sampling[3]
    assert "x12 (Stable Diffusion 1.x, coarse attention)" in sampling[3]
    assert sampling[4] == "-", "both grids were measured"
    law = TIMES.laws[0]
    assert large[4].startswith(times_text(law.at(512**2) / law.at(128**2)))
    assert large[3].startswith("at 256 px: x24") and epoch[2].startswith("x4 ")
    assert "KID after 500 steps, one seed: 0.03 to 0.022" in fid[3]
    assert fid[5].startswith("Agrees, in the one seed that was trained: latents are better")
    assert sampling[5].startswith("Disagrees: ours is more. The paper timed other networks")
    assert "38 FID better (section 4.1)" in gap[1] and "8 x 8 latents" in gap[5]
    worse = beside_paper(counts(), TIMES, paper(), made_up(last={1: 0.9}))
    assert worse.rows[3][5].startswith("Disagrees")
    same = beside_paper(counts(), TIMES, paper(), made_up(last={4: 0.3}))
    assert same.rows[3][5].startswith("Not told apart here, in the one seed")
    slow = beside_paper(
        counts(), TIMES.model_copy(update={"cells": TIMES.cells[1:]}), paper(), None
    )
    assert slow.rows[0][5].startswith("Disagrees: ours is more.")
    less = [cell(1, 0.6), cell(4, 0.5)], [cell(1, 0.6), cell(1, 6.0, "coarse"), cell(4, 0.5)]
    for cells, said in zip(less, ("Disagrees: ours is less.", "Theirs lies between"), strict=True):
        times = TIMES.model_copy(update={"cells": tuple(cells)})
        assert beside_paper(counts(), times, paper(), None).rows[0][5].startswith(said)
    bare = beside_paper(counts(), None, paper(), None)
    assert {row[3] for row in bare.rows} == {"-"} == {row[4] for row in bare.rows}


def test_beside_the_paper_three_seeds_are_shown_and_more_are_ranked() -> None:
    three, five = (beside_paper(counts(), TIMES, paper(), made_up(range(n))) for n in (3, 5))
    assert ", 3 seeds: 0.03 to 0.022; " in three.rows[3][3] and three.rows[3][3].count(";") == 2
    assert three.rows[3][5].startswith("3 seeds: too few to rank.")
    assert five.rows[3][5].startswith("Agrees, over 5 seeds: latents are better")
    other = beside_paper(counts(), TIMES, paper(), made_up(range(5), last={1: 0.9}))
    assert other.rows[3][5].startswith("Disagrees, over 5 seeds: pixels are better")


def test_a_table_is_html_with_its_texts_escaped() -> None:
    table = trained_table(TRAINED)
    assert [row[0] for row in table.rows] == ["1", "2", "4", "8"]
    assert table.rows[3][1] == "4 x 8 x 8" and table.rows[0][3] == "3,900,000"
    hostile = table._replace(title="<b>'\"", heads=["<i>"], rows=[["<img src=x>"]])
    text = table_html(hostile)
    assert "<img" not in text and "<i>" not in text and "&lt;b&gt;&#x27;&quot;" in text


def test_numbers_are_written_short() -> None:
    assert [times_text(value) for value in (679.2, 34.1, 2.7, 0.21)] == [
        "x679",
        "x34",
        "x2.7",
        "x0.21",
    ]
    assert flops_text(803.3e9) == "803 GFLOP" and flops_text(545.1e12) == "545 TFLOP"


def every_figure() -> Iterator[Shown]:
    yield pixels.cost_by_size(counts(), "sdxl")
    yield pixels.cost_by_f(counts(), "emojiworld", (128, 128))
    yield pixels.factors(counts(), "sd14", 4, (256, 256))
    yield pixels.shares_by_size(counts(), "sd14", 1)
    yield pixels.attention_bytes(counts(), "small")
    yield pixels.law(TIMES, "sd14", "call_bytes")
    yield pixels.shares({}, counts())
    yield pixels_trained.quality(TRAINED, "kid", "seconds", "amortised")
    yield pixels_trained.by_count(TRAINED, "fd")
    yield pixels_trained.distortion(TRAINED, "ssim")


def test_every_figure_explains_itself() -> None:
    for shown in every_figure():
        assert len(shown.caption) > 80 and "python -m" in shown.command, shown.name
        assert shown.figure.layout.title.text and shown.figure.data
        json.loads(shown.figure.to_json())


def test_the_figure_of_the_document_is_drawn_from_the_counts(tmp_path: Path) -> None:
    figure.main(["--out", str(tmp_path / "pixels.webp")])
    assert figure.OUT.stat().st_size < 150_000
    drawn, kept = (
        np.asarray(Image.open(path).convert("RGB"), np.float32)
        for path in (tmp_path / "pixels.webp", figure.OUT)
    )
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 2


# --- the view -------------------------------------------------------------------------------------


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "trained", lambda: TRAINED)
    monkeypatch.setattr(view, "measured_here", lambda: TIMES)


def texts(app: AppTest) -> str:
    return "\n".join(element.value for element in [*app.text, *app.info, *app.code])


def charts(app: AppTest) -> list[Any]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_the_view_without_a_demonstration_says_how_to_train_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(view, "trained", lambda: None)
    monkeypatch.setattr(view, "measured_here", lambda: None)
    app = open_view("pixels", part="Quality")
    assert "python -m experiments.pixels.train" in texts(app) and not charts(app)
    assert len(charts(open_view("pixels", part="Time and memory"))) == 1
    app = open_view("pixels", part="Beside the paper")
    assert "samples/s" in app.get("html")[0].proto.body


def test_every_widget_of_the_view_moves_what_is_shown(trained_here: None) -> None:
    moves: dict[str, dict[str, Any]] = {
        "Cost": {"cost_model": "sdxl", "cost_f": 4, "cost_size": (1024, 1024), "kinds_f": 8},
        "Quality": {"quality": "kid", "against": "flops", "charge": "free"},
    }
    drawn = {}
    for part, widgets in moves.items():
        app = open_view("pixels", part=part)
        drawn[part] = len(charts(app))
        for key, value in widgets.items():
            before = charts(app)
            app.selectbox(key).set_value(value).run()
            assert not app.exception, key
            assert charts(app) != before, key
    assert drawn == {"Cost": 5, "Quality": 5} and "One seed" in texts(app)
    assert 'alt="What is lost, as pictures: ' in app.get("html")[-1].proto.body
    app.radio("part").set_value("Time and memory").run()
    assert len(charts(app)) == 3 and app.selectbox("time_model").value == "sd14"
    app.radio("part").set_value("Cost").run()
    assert len(charts(app)) == 5 and not app.exception


@pytest.mark.parametrize("value", ["../x", "<img>", "9" * 400, ""])
def test_an_address_with_nonsense_falls_to_the_defaults(value: str, trained_here: None) -> None:
    keys = ("part", "cost_model", "cost_f", "cost_size", "kinds_f", "time_model", "quality")
    app = open_view("pixels", **dict.fromkeys(keys, value))
    assert app.selectbox("cost_model").value == "sd14" and app.selectbox("cost_f").value == 8
    app = open_view("pixels", **dict.fromkeys(keys, value) | {"part": "Quality"})
    assert app.selectbox("quality").value == "recognised"


def test_two_runs_of_another_f_are_played_in_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, trained_here: None
) -> None:
    from probe.testing.synthetic import synthetic_recording

    configure(Library(tmp_path / "nothing"))
    app = open_view("pixels", part="Two runs")
    assert "emojiworld-pixels" in texts(app) and not app.get("bidi_component")
    path = synthetic_recording(tmp_path / "runs" / "pixels.zarr", steps=3)
    root = json.loads((path / "zarr.json").read_text("utf-8"))
    root["attributes"]["model"]["f"] = 1
    (path / "zarr.json").write_text(json.dumps(root), "utf-8")
    configure(Library(tmp_path / "runs"))
    try:
        app = open_view("pixels", part="Two runs", runs=["pixels"])
        assert app.selectbox("pixel_run").options == ["pixels"]
        assert "sample" in app.selectbox("latent_run").options
        (player,) = app.get("bidi_component")
        assert "pixels sample" in player.proto.json
        bars = charts(open_view("pixels", part="Time and memory"))[-1]["data"]
        assert [bar.split(" (")[0] for bar in bars[0]["y"][:2]] == ["sample", "pixels"]
    finally:
        libraries._library.clear()
