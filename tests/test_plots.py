"""Figures of plotly hold the numbers they were given, and show text as it was written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from probe.figures.plots import CURSOR, curves, plain, profile, square_map, step_text


@pytest.mark.parametrize(
    ("step", "calls", "text"),
    [
        (0, 20, "step 0 (1st of 20)"),
        (6, 20, "step 6 (7th of 20)"),
        (10, 51, "step 10 (11th of 51)"),
        (11, 51, "step 11 (12th of 51)"),
        (21, 51, "step 21 (22nd of 51)"),
        (22, 51, "step 22 (23rd of 51)"),
    ],
)
def test_a_step_is_said_in_one_way(step: int, calls: int, text: str) -> None:
    assert step_text(step, calls) == text


def test_somebodys_text_is_no_markup() -> None:
    text = "<b>x</b> <a href='http://evil.invalid'>&amp;</a>"
    assert (
        plain(text)
        == "&lt;b&gt;x&lt;/b&gt; &lt;a href='http://evil.invalid'&gt;&amp;amp;&lt;/a&gt;"
    )
    values = np.ones((2, 2), np.float16)
    for figure in (
        square_map(values, [text, "b"], ["a", text], "title", "unit"),
        profile([text], np.ones(1), np.ones(1), "title", "unit"),
        curves([0, 1], {text: np.ones(2)}, "title", "unit", 1, 2),
    ):
        written = figure.to_json()
        assert "<b>" not in written and "<a " not in written and "&lt;b&gt;" in written


def test_curves_hold_their_numbers_and_the_cursor() -> None:
    values = np.array([1.0, np.nan, 3.0], np.float16)
    figure = curves([0, 1, 2], {"cond": values, "other": values * 2}, "title", "unit", 2, 3)
    first, second = figure.data
    assert list(first.x) == [0, 1, 2] and first.y[2] == 3 and np.isnan(first.y[1])
    assert second.y[2] == 6 and first.line.color != second.line.color
    (cursor,) = figure.layout.shapes
    assert cursor.x0 == cursor.x1 == 2 and cursor.line.color == CURSOR
    assert not curves([0], {"a": np.ones(1)}, "", "", None, 1).layout.shapes
    assert "NaN" not in json.dumps(json.loads(figure.to_json())["data"][0]["x"])


def test_a_spread_is_a_band_around_the_first_line() -> None:
    mean, spread = np.array([1.0, 2.0]), np.array([0.5, 0.25])
    band = curves([3, 7], {"mean": mean}, "", "", None, 9, spread).data[0]
    assert list(band.x) == [3, 7, 7, 3] and list(band.y) == [1.5, 2.25, 1.75, 0.5]


def test_a_map_lies_as_it_is_with_a_range_from_zero() -> None:
    values = np.array([[0.5, 0.25], [0.125, 0.0]], np.float16)
    figure = square_map(values, ["a", "b"], ["c", "d"], "title", "share")
    (heat,) = figure.data
    assert np.asarray(heat.z).dtype == np.float32 and np.array_equal(heat.z, values)
    assert (heat.zmin, heat.zmax, heat.zsmooth) == (0, 0.5, False)
    assert figure.layout.yaxis.autorange == "reversed" and figure.layout.yaxis.scaleanchor == "x"
    assert heat.colorbar.title.text == "share" and heat.customdata[1][0] == "b at c"
    assert square_map(np.zeros((1, 1)), ["a"], ["b"], "", "").data[0].zmax == 1
