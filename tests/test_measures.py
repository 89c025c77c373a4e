"""Measures of a cell: numbers against its parent, your own functions, and causes, no crash."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import probe
from probe.errors import ExperimentError
from probe.reading.apart import pictures_apart, words_apart
from probe.reading.recording import Run
from probe.studies.measures import MEASURES, check_measures, measure, plain
from probe.testing.synthetic import synthetic_recording


@pytest.fixture(scope="module")
def pair() -> tuple[Run, Run]:
    return probe.open_run("sample-guidance-8"), probe.open_run("sample")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with measures of one's own."""
    (tmp_path / "own_measures_of_a_test.py").write_text(
        "import numpy as np\n"
        "def brightness(run): return run.images.mean()\n"
        "def brighter(run, parent): return float(run.images.mean() - parent.images.mean())\n"
        "def by_word(run, scale=2): return {word: scale for word in run.words}\n"
        "def raises(run): raise KeyError('no\\x1b[31m cat\\nhere')\n"
        "def exits(run): raise MemoryError\n"
        "def text(run): return 'bright'\n"
        "def square(run): return np.zeros((2, 2))\n"
        "def many(run): return [0.0] * 10_001\n"
        "NUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_measures_of_a_test"


def test_every_measure_that_ships(pair: tuple[Run, Run]) -> None:
    run, parent = pair
    found = measure(run, parent, list(MEASURES))
    json.dumps(found, allow_nan=False)
    pictures, words = pictures_apart(run, parent), words_apart(run, parent)
    assert all(found[name] == float(pictures[name][0]) for name in ("l2", "psnr", "ssim"))
    assert found["word_change"] == dict(
        zip(words["word"].values.tolist(), words["change"].values.tolist(), strict=True)
    )
    gap = run.latents.values[:, 0] - parent.latents.values[:, 0]
    by_hand = np.sqrt((gap**2).sum((1, 2, 3)))
    np.testing.assert_allclose(found["l2_by_step"], by_hand, rtol=1e-5)
    assert found["differs_at"] == 1
    half = int(np.flatnonzero(by_hand > by_hand.max() / 2)[0])
    assert found["parts_at"] == half


def test_a_run_and_itself_and_a_run_without_a_parent(pair: tuple[Run, Run]) -> None:
    found = measure(pair[0], pair[0], list(MEASURES))
    assert (found["l2"], found["psnr"], found["ssim"]) == (0, "inf", 1)
    assert found["differs_at"] is None and found["parts_at"] is None
    assert set(found["word_change"].values()) == {0} and not any(found["l2_by_step"])
    assert measure(pair[0], None, list(MEASURES)) == dict.fromkeys(MEASURES)


def test_measures_of_ones_own(pair: tuple[Run, Run], own: str) -> None:
    run, parent = pair
    found = measure(run, parent, [f"{own}:brightness", f"{own}:brighter", f"{own}:by_word"])
    bright = float(run.images.mean()), float(parent.images.mean())
    assert list(found.values()) == [
        pytest.approx(bright[0]),
        pytest.approx(bright[0] - bright[1]),
        dict.fromkeys(run.words, 2),
    ]
    check_measures([*MEASURES, *found])


def test_one_that_raises_is_a_cause_and_the_others_are_measured(
    pair: tuple[Run, Run], own: str
) -> None:
    names = [f"{own}:{name}" for name in ("raises", "exits", "text", "square", "many", "none")]
    found = measure(*pair, [*names, "l2"])
    causes = [found[name]["cause"] for name in names]
    assert causes[0].startswith("KeyError") and all(cause.isprintable() for cause in causes)
    assert causes[1:4] == [
        "MemoryError: MemoryError",
        "It returned str, which is no number.",
        "It returned an array of shape (2, 2).",
    ]
    assert causes[4].startswith("It returned 10001 values") and "cannot be imported" in causes[5]
    assert found["l2"] > 0


def test_a_parent_that_does_not_fit_is_a_cause(tmp_path: Path, pair: tuple[Run, Run]) -> None:
    small = Run(synthetic_recording(tmp_path / "small.zarr", size=(4, 4)))
    found = measure(small, pair[1], ["l2", "parts_at", "ssim"])
    assert "are not of one size and number" in found["l2"]["cause"]
    assert "The latents of small are 1 x 4 x 4 x 4" in found["parts_at"]["cause"]


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("l3", "there is no measure 'l3'", "l2"),
        ("os.system", "there is no measure 'os.system'", "package.module:function"),
        ("no_such_module:x", "ModuleNotFoundError", "Set PYTHONPATH"),
        ("{own}:none", "AttributeError", "Set PYTHONPATH"),
        ("{own}:NUMBER", "is no function", "Name a function"),
        ("..:x", "there is no measure", "package.module:function"),
    ],
)
def test_what_is_no_measure_is_refused(own: str, name: str, cause: str, remedy: str) -> None:
    with pytest.raises(ExperimentError) as raised:
        check_measures([name.format(own=own)])
    assert cause in raised.value.cause and remedy in raised.value.remedy


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (True, 1.0),
        (np.float16(2), 2.0),
        (math.nan, None),
        (-math.inf, "-inf"),
        ([1, math.inf], [1.0, "inf"]),
        (xr.DataArray([1.0, 2.0], dims="step", coords={"step": [0, 1]}), [1.0, 2.0]),
        (xr.DataArray([1.0], dims="head", coords={"head": [3]}), {"3": 1.0}),
        (xr.DataArray(4), 4.0),
        ({"a": None}, {"a": None}),
    ],
)
def test_values_are_plain_json(value: Any, wanted: Any) -> None:
    assert plain(value) == wanted
