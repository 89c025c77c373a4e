"""The page Grids without a browser: every widget moved, cells picked, studies that are damaged."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest
from studies import change_cell, change_study, write_study
from views import open_view

from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.views import grids
from probe.dashboard.views.grids import added, picture_of, snippet
from probe.reading.study import Study, open_study

AXES: dict[str, Any] = {"prompt": ["a cat", "a fox"], "guidance_scale": [1.5, 3, 5], "seed": [0, 1]}
HOSTILE = '**b** <img src=x onerror="a()"> :red[r] $x$ ![p](http://evil.invalid/p.png)'


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    runs = tmp_path_factory.mktemp("runs")
    path = write_study(runs, AXES, parent={"seed": 7}, missing=[(0, 1, 1)], failed=[(1, 2, 0)])
    return open_study(path)


@pytest.fixture(autouse=True)
def library(study: Study) -> Iterator[Library]:
    library = Library(study.folder)
    configure(library)
    yield library
    libraries._library.clear()


def page(folder: Path | None = None, **query: Any) -> AppTest:
    if folder is not None:
        configure(Library(folder))
    return open_view("grids", **query)


def texts(app: AppTest) -> str:
    return "\n".join([*(text.value for text in app.text), *(code.value for code in app.code)])


def table(app: AppTest) -> Any:
    return next(frame.value for frame in app.dataframe if "cells_table" in frame.proto.id)


def pixels(address: str) -> np.ndarray:
    content = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), float)


def test_it_opens_with_pictures_in_their_places(study: Study) -> None:
    app = page()
    assert [app.selectbox(key).value for key in ("rows", "columns", "show", "axis_0")] == [
        "guidance_scale",
        "seed",
        "pictures",
        "a cat",
    ]
    assert "12 cells: 10 complete, 1 missing, 1 failed." in texts(app)
    shown = table(app)
    assert shown.index.tolist() == ["1.5", "3", "5"] and shown.columns.tolist() == ["0", "1"]
    picture = study.picture(study.cells[0, 0, 1])
    assert picture is not None
    drawn = pixels(shown.iloc[0, 1])
    small = np.asarray(Image.fromarray(picture).resize(drawn.shape[1::-1]), float)
    assert np.abs(drawn - small).mean() < 12
    assert shown.iloc[1, 1] == picture_of("missing")
    assert "study = probe.open_study(" in texts(app) and str(study.path) in texts(app)


def test_every_widget_moves_what_is_shown(study: Study) -> None:
    app = page()
    app.selectbox("rows").set_value("prompt").run()
    assert table(app).index.tolist() == ["a cat", "a fox"] and not app.exception
    app.selectbox("columns").set_value("guidance_scale").run()
    assert table(app).columns.tolist() == ["1.5", "3", "5"]
    app.selectbox("axis_2").set_value("1").run()
    app.selectbox("show").set_value("l2").run()
    wanted = study.dataset["l2"].sel(seed=1).values
    np.testing.assert_array_equal(table(app).values.astype(float), wanted)
    (chart,) = app.get("plotly_chart")
    (trace,) = json.loads(chart.proto.spec)["data"]
    drawn = [[np.nan if value is None else value for value in row] for row in trace["z"]]
    np.testing.assert_allclose(drawn, wanted)
    app.selectbox("show").set_value("word_change[cat]").run()
    app.selectbox("columns").set_value("none").run()
    assert table(app).shape == (2, 1) and not app.exception
    app.selectbox("rows").set_value("none").run()
    assert table(app).shape == (1, 1) and not app.exception


def test_picked_cells_go_on_to_their_runs(study: Study) -> None:
    app = page()
    assert not app.button and "Pick one cell" in texts(app)
    app.multiselect("cells").set_value(["0-0-0"]).run()
    assert [button.label for button in app.button] == [
        "Replay",
        "Compare with the run without edits",
    ]
    app.multiselect("cells").set_value(["0-0-0", "0-0-1"]).run()
    assert [button.label for button in app.button] == ["Replay the last", "Compare"]
    (measures,) = [frame.value for frame in app.dataframe if "measure" in frame.value]
    titles = [study.cells[0, 0, seed].title for seed in (0, 1)]
    assert measures.columns.tolist() == ["measure", *titles]
    assert measures[titles[0]][0] == f"{float(study.dataset['l2'][0, 0, 0]):.5g}"
    app.multiselect("cells").set_value(["1-2-0", "0-1-1"]).run()
    assert not app.button
    assert "seed=0 is failed: OutOfMemory: the device is out of memory\nMake it smaller." in texts(
        app
    )
    assert "seed=1 is missing: It was not computed yet." in texts(app)


def test_a_click_adds_a_cell() -> None:
    assert added([], ["1"]) == ["1"] and added(["1"], ["2"]) == ["1", "2"]
    assert added(["1", "2"], ["1"]) == ["2", "1"] and added(["1"], []) == ["1"]
    assert added(list("1234"), ["5"]) == list("2345") and added(["1"], list("23456")) == list(
        "2345"
    )


def test_an_address_opens_the_same_page_and_nonsense_falls_to_the_defaults() -> None:
    app = page(rows="prompt", columns="seed", show="psnr", axis_1="5")
    assert table(app).index.tolist() == ["a cat", "a fox"] and len(app.get("plotly_chart")) == 1
    app = page(rows="<b>", columns="../x", show="y", axis_0="7", study="../../etc", cells="9-9")
    assert app.selectbox("rows").value == "guidance_scale" and not app.exception


def test_many_rows_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "A_PAGE", 4)
    write_study(tmp_path, {"seed": [0, 1, 2, 3, 4], "guidance_scale": [1.5, 3]}, keep="metrics")
    app = page(tmp_path)
    assert table(app).index.tolist() == ["0", "1"] and app.selectbox("from").value == "0"
    app.selectbox("from").set_value("4").run()
    assert table(app).index.tolist() == ["4"] and table(app).iloc[0, 0] == picture_of("not kept")
    app.multiselect("cells").set_value(["0-0"]).run()
    assert "seed=0, guidance_scale=1.5 left no recording to replay." in texts(app)


def test_of_two_studies_the_other_is_chosen(tmp_path: Path) -> None:
    write_study(tmp_path, {"seed": [0, 1]}, name="one")
    write_study(tmp_path, {"guidance_scale": [1.5, 3]}, name="two")
    app = page(tmp_path)
    for name in app.selectbox("study").options:
        app.selectbox("study").set_value(name).run()
        assert not app.exception
        assert table(app).columns.tolist() == (["0", "1"] if "one" in name else ["1.5", "3"])


def test_no_study_or_one_that_cannot_be_read(tmp_path: Path) -> None:
    app = page(tmp_path)
    assert "There is no study" in app.info[0].value
    path = write_study(tmp_path, {"seed": [0, 1]})
    change_study(path, lambda study: study.update(format=9))
    app = page(tmp_path)
    assert "its format is not what a study has there" in app.code[0].value and not app.exception


def test_hostile_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    path = write_study(
        tmp_path,
        {"prompt": ["a cat", "a fox"], "seed": [0, 1]},
        labels={"prompt": [HOSTILE, "x"]},
        parent={"seed": 7},
    )

    def rename(study: dict[str, Any]) -> None:
        study["axes"][1]["name"] = HOSTILE
        study["name"] = HOSTILE

    change_study(path, rename)
    address = open_study(path).planned[0, 0].address
    change_cell(path, address, status="failed", cause=HOSTILE, remedy=HOSTILE)
    app = page(tmp_path)
    app.selectbox("rows").set_value("prompt").run()
    app.multiselect("cells").set_value(["0-0", "0-1"]).run()
    assert not app.exception and HOSTILE in texts(app)
    said = [*app.markdown, *app.get("html"), *app.caption, *app.info, *app.error]
    assert not any("evil" in str(element) for element in said)
    widgets = [*app.selectbox, *app.multiselect, *app.button]
    assert not any("evil" in widget.label for widget in widgets), "labels are Markdown"
    app.selectbox("show").set_value("psnr").run()
    for chart in app.get("plotly_chart"):
        assert "<img" not in chart.proto.spec and "&lt;img" in chart.proto.spec


def test_the_code_opens_the_study(study: Study) -> None:
    said: dict[str, Any] = {}
    exec(snippet(study).rpartition("\n")[0], said)
    assert said["study"].file == study.file
