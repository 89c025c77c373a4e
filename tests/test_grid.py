"""The grids of a study: each picture in its place, on a sheet, in a page and as a heat map."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command, cause_and_remedy
from PIL import Image
from studies import change_cell, change_study, write_study

from probe import export
from probe.errors import ExperimentError
from probe.figures.grid import Layout, block_title, labels_of, lay_out, name_of, sheet, thumbnail
from probe.figures.grid_page import grid_page, numbers_of
from probe.figures.grid_plot import heat_map, measures_of, plot_page, values_of
from probe.reading.study import Study, find_study, open_study

AXES: dict[str, Any] = {"prompt": ["a cat", "a fox"], "guidance_scale": [1.5, 3, 5], "seed": [0, 1]}
HOSTILE = '<img src=x onerror="window.__pwn=1"></script><script>window.__pwn=2</script>'


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    runs = tmp_path_factory.mktemp("runs")
    return open_study(
        write_study(runs, AXES, parent={"seed": 7}, missing=[(0, 1, 1)], failed=[(1, 2, 0)])
    )


@pytest.mark.parametrize(
    ("rows", "columns", "where", "axes", "blocks"),
    [
        (None, None, {}, (1, 2), [{0: 0}, {0: 1}]),
        ("prompt", None, {}, (0, 2), [{1: 0}, {1: 1}, {1: 2}]),
        (None, "prompt", {}, (2, 0), [{1: 0}, {1: 1}, {1: 2}]),
        ("seed", "prompt", {"guidance_scale": 3}, (2, 0), [{1: 1}]),
        (None, None, {"seed": "1"}, (0, 1), [{2: 1}]),
        (None, None, {"seed": 1, "prompt": "a fox"}, (None, 1), [{0: 1, 2: 1}]),
    ],
)
def test_axes_become_rows_columns_and_blocks(
    study: Study, rows: str, columns: str, where: dict[str, Any], axes: Any, blocks: Any
) -> None:
    layout = lay_out(study, rows, columns, where)
    assert (layout.axes, list(layout.blocks)) == (axes, blocks)
    down, across = layout.size
    places = {
        layout.place(block, row, column)
        for block in layout.blocks
        for row in range(down)
        for column in range(across)
    }
    assert len(places) == layout.pictures and places <= set(study.cells)


@pytest.mark.parametrize(
    ("rows", "columns", "where", "cause"),
    [
        ("guidance", None, {}, "has no axis 'guidance'"),
        ("seed", "seed", {}, "seed cannot be rows and columns"),
        ("seed", None, {"seed": 0}, "seed is fixed to one label"),
        (None, None, {"seed": 5}, "seed is never 5"),
    ],
)
def test_what_is_no_layout_is_refused(
    study: Study, rows: str, columns: str, where: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ExperimentError, match=cause):
        lay_out(study, rows, columns, where)


def test_each_picture_stands_in_its_place(tmp_path: Path) -> None:
    axes = {"prompt": ["cat", "a cat", "a red cat"], "seed": [0, 1]}
    study = open_study(write_study(tmp_path, axes, missing=[(1, 1)], failed=[(2, 0)]))
    drawn = np.asarray(sheet(study, lay_out(study), width=64))
    found = {}
    for index in [(0, 0), (0, 1), (1, 0), (2, 1)]:
        picture = thumbnail(study, study.cells[index], 64)
        assert isinstance(picture, Image.Image)
        wanted = np.asarray(picture)
        corner = np.argwhere((drawn[:-63, :-63] == wanted[0, 0]).all(-1))
        (found[index],) = [
            (y, x) for y, x in corner.tolist() if (drawn[y : y + 64, x : x + 64] == wanted).all()
        ]
    (y0, x0), step = found[0, 0], found[0, 1][1] - found[0, 0][1]
    assert step > 64
    for (row, column), (y, x) in found.items():
        assert (y, x) == (y0 + row * step, x0 + column * step)
    assert thumbnail(study, study.cells[1, 1]) == "missing"
    assert thumbnail(study, study.cells[2, 0]) == "failed"


@pytest.mark.slow
def test_the_unedited_run_of_a_row_stands_before_it(tmp_path: Path) -> None:
    path = write_study(tmp_path, parent={"guidance_scale": 4.0})
    study = open_study(path)
    (tmp_path / "bare.study").mkdir()
    (tmp_path / "bare.study" / "study.json").write_bytes((path / "study.json").read_bytes())
    bare = open_study(change_study(tmp_path / "bare.study", lambda one: one.update(parents=[])))
    assert bare.parent_outside((0, 0)) is None  # no parent is listed
    lone = sheet(bare, lay_out(bare, rows="seed", columns="guidance_scale"), width=64)

    parent = study.parent_outside((0, 1))
    assert parent is not None and study.run_of(parent).experiment.guidance_scale == 4.0
    drawn = sheet(study, lay_out(study, rows="seed", columns="guidance_scale"), width=64)
    assert drawn.width > lone.width + 64
    picture = thumbnail(study, parent, 64)
    assert isinstance(picture, Image.Image)
    wanted, pixels = np.asarray(picture), np.asarray(drawn)
    left, added = [np.asarray(one).shape[1] for one in (lone, drawn)]
    corners = np.argwhere((pixels[:-63, : added - left] == wanted[0, 0]).all(-1))
    places = [
        (y, x) for y, x in corners.tolist() if (pixels[y : y + 64, x : x + 64] == wanted).all()
    ]
    assert len(places) == 1  # before the second row
    turned = [sheet(one, lay_out(one, "guidance_scale", "seed"), 64) for one in (bare, study)]
    assert turned[0].size == turned[1].size  # rows of several parents have no such column


def test_zipped_axes_are_named_together(tmp_path: Path) -> None:
    zipped = [{"name": "steps", "labels": ["10", "20"], "values": [10, 20], "zipped": []}]
    path = change_study(
        write_study(tmp_path, {"seed": [0, 1]}), lambda s: s["axes"][0].update(zipped=zipped)
    )
    study = open_study(path)
    assert name_of(study, 0) == "seed · steps" and labels_of(study, 0) == ["0 · 10", "1 · 20"]
    assert block_title(study, {0: 1}) == "seed · steps=1 · 20"
    assert sheet(study, lay_out(study)).width > 0


def test_a_page_holds_every_picture_and_number(study: Study) -> None:
    page = grid_page(study, lay_out(study))
    data = json.loads(re.search(r'id="study">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    assert len(data["cells"]) == 12 and page.count('id="picture') == 10
    assert (data["rows"], data["columns"]) == (1, 2)
    assert data["axes"][0] == {"name": "prompt", "labels": ["a cat", "a fox"]}
    cell = next(cell for cell in data["cells"] if cell["place"] == [0, 1, 0])
    assert cell["measures"] == numbers_of(study.cells[0, 1, 0]) and cell["measures"]["l2"] > 0
    assert "http" not in page.replace("http-equiv", ""), "it fetches nothing"
    one = grid_page(study, lay_out(study, where={"prompt": "a fox"}))
    data = json.loads(re.search(r'id="study">(.*?)</script>', one, re.S)[1])  # type: ignore[index]
    assert len(data["cells"]) == 6 and [a["name"] for a in data["axes"]] == [
        "guidance_scale",
        "seed",
    ]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    path = write_study(
        tmp_path, {"prompt": ["a cat"], "seed": [0, 1]}, labels={"prompt": [HOSTILE]}
    )
    study = open_study(path)
    change_cell(path, study.planned[0, 0].address, measures={"l2": {"cause": HOSTILE}})
    study = open_study(path)
    layout = lay_out(study, rows="prompt")
    page = grid_page(study, layout)
    assert "__pwn" in page and "<img" not in page
    assert page.count("<script") == page.count("</script>") == 2 + 2, "two pictures"
    figure = heat_map(study, layout, "psnr")
    assert (
        "<" not in figure.layout.yaxis.ticktext[0] and "&lt;img" in figure.layout.yaxis.ticktext[0]
    )
    assert sheet(study, layout).width > 0


def test_a_heat_map_shows_a_measure(study: Study) -> None:
    layout = lay_out(study)
    values = values_of(study, layout, "l2", 0)
    wanted = study.dataset["l2"].isel(prompt=0).values
    np.testing.assert_array_equal(values, wanted)
    assert np.isnan(values[1, 1]) and np.isfinite(values).sum() == 5
    figure = heat_map(study, layout, "l2", 0)
    np.testing.assert_array_equal(figure.data[0].z, wanted)
    every = study.dataset["l2"]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (float(every.min()), float(every.max()))
    assert list(figure.layout.xaxis.ticktext) == ["0", "1"]
    assert measures_of(study)[0] == "l2" and "word_change[cat]" in measures_of(study)
    page = plot_page(study, lay_out(study, where={"prompt": "a cat"}))
    assert page.count("Plotly.newPlot(") >= len(measures_of(study))


def test_too_much_is_refused(study: Study) -> None:
    large = Layout(1, 2, ({0: 0},) * 2000, study.shape, {})
    for make in (sheet, grid_page, plot_page):
        with pytest.raises(ExperimentError, match=r"are too many for one (sheet|page)"):
            make(study, large)


def test_a_study_is_found_by_the_beginning_of_its_name(study: Study) -> None:
    assert find_study(study.path) == study.path
    assert find_study("guidance", study.folder) == study.path
    assert find_study("run-", study.folder) is None and find_study("x", "nowhere") is None


def test_export_writes_a_study(call: Command, study: Study, tmp_path: Path) -> None:
    for option, name in (
        ("html", "g.html"),
        ("png", "g.png"),
        ("plot", "p.html"),
        ("table", "t.csv"),
    ):
        target = tmp_path / name
        code, out, err = call(export.main, study.path, f"--{option}", target)
        assert (code, err) == (0, "") and str(target) in out and target.stat().st_size > 500
    arguments = ["--rows", "prompt", "--columns", "seed", "--where", "guidance_scale=3"]
    target = tmp_path / "small.png"
    code, _, _ = call(export.main, "guidance", "--runs", study.folder, "--png", target, *arguments)
    with Image.open(target) as small, Image.open(tmp_path / "g.png") as whole:
        assert code == 0 and small.height < whole.height


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--gif", "x.gif"], "--gif is for recordings"),
        (["--html", "x.html", "--word", "cat"], "--word is for recordings"),
        (["--png", "x.png", "--where", "seed"], "--where seed: there is no ="),
        (["--table", "x.txt"], "--table: x.txt has another ending"),
        (["--png", "x.png", "--rows", "colour"], "has no axis 'colour'"),
    ],
)
def test_what_a_study_is_not_exported_as(
    call: Command, study: Study, arguments: list[str], cause: str
) -> None:
    code, out, err = call(export.main, study.path, *arguments)
    assert code == 2 and not out and cause in cause_and_remedy(err)[0]


def test_a_recording_has_no_table(call: Command) -> None:
    code, _, err = call(export.main, "sample", "--table", "x.csv")
    assert code == 2 and cause_and_remedy(err)[0] == "--table is for studies, and sample is none."
