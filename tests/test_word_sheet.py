"""The sheet of words: each map in its place, on its row's scale, and what is no word said below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr
from PIL import Image

from probe.analysis.averages import by_sigma, combined
from probe.analysis.maps import word_maps, word_names
from probe.errors import RecordingNotFound
from probe.figures.drawing import CELL, GAP, HEAT, MARGIN, PAPER, overlay
from probe.figures.word_sheet import BETWEEN, HEAD, sheet_of_maps, word_sheet
from probe.reading.recording import Run
from probe.running.recorder import record

FOOT, LINE = (
    20 + MARGIN // 2,
    20,
)  # below the last section: the scale, then lines of units and notes


def drawn(folder: Path, **asked: Any) -> Run:
    plain = {
        "prompt": "a cat on a hat",
        "steps": 3,
        "height": 24,
        "width": 48,
        "output": str(folder),
        "images": 2,
    }
    capture = {"text": False, "statistics": False, **asked.pop("capture", {})}
    return record({**plain, **asked, "capture": capture}, pipeline=tiny.pipeline(), progress=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return drawn(
        tmp_path_factory.mktemp("runs"), negative_prompt="astronaut", capture={"branches": "both"}
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def cell(sheet: Image.Image, column: int, top: int, height: int, block: int = 0) -> np.ndarray:
    x = MARGIN + (column + 1) * (CELL + GAP) + block * BETWEEN
    return pixels(sheet)[top : top + height, x : x + CELL]


def test_every_map_is_in_its_place_on_the_scale_of_its_row(run: Run) -> None:
    sheet = word_sheet(run, bands=2, image=1)
    high = CELL // 2
    row = high + 26
    assert sheet.height == MARGIN + (HEAD + 5 * row + 16) + (HEAD + row + 16) + FOOT + 6 * LINE, (
        "two units, and of two branches how much goes where"
    )
    final = Image.fromarray(run.images.values[1]).resize((CELL, high), Image.Resampling.NEAREST)
    top = MARGIN
    for branch, words in (("cond", "a cat on a hat".split()), ("uncond", ["astronaut"])):
        maps = word_maps(
            combined([run.attention(grid) for grid in run.grids]).sel(branch=branch).isel(image=1)
        )
        assert maps["word"].values.tolist() == words
        written = run.word_maps(of="contribution", branch=branch).isel(image=1)
        for block, read in enumerate((maps, written)):
            columns = [read.mean("step"), *by_sigma(read, 2, run.variable("sigma"))]
            for index in range(len(words)):
                shown = [column.isel(word=index).values for column in columns]
                bounds = (float(np.min(shown)), float(np.max(shown)))
                for column, values in enumerate(shown):
                    found = cell(
                        sheet, column + 3 * block, top + HEAD + index * row, high, block
                    ).astype(int)
                    assert np.abs(found - pixels(overlay(final, values, bounds))).max() <= 2, (
                        "all but rounding"
                    )
        top += HEAD + len(words) * row + 16
    assert (
        pixels(sheet)[:, MARGIN + 7 * (CELL + GAP) + BETWEEN :][MARGIN + HEAD : MARGIN + HEAD + 50]
        == PAPER
    ).all(), "nothing beyond the bands"


def test_it_is_written_on(run: Run) -> None:
    sheet = pixels(word_sheet(run)).astype(int)
    ink = (sheet.sum(axis=-1) < 300).any(axis=1)
    below = np.flatnonzero(ink)[-1]
    assert ink[MARGIN : MARGIN + 20].any(), "the prompt"
    assert (
        sheet[MARGIN + HEAD : MARGIN + HEAD + 76, MARGIN : MARGIN + CELL].sum(axis=-1) < 300
    ).any(), "the word"
    assert len(sheet) - below < MARGIN + 10, "and how much goes to what is no word"


@pytest.mark.slow
def test_without_words_without_guidance_and_from_other_ways_of_recording(
    tmp_path: Path, run: Run
) -> None:
    empty = word_sheet(drawn(tmp_path / "a", prompt="", images=1))
    assert empty.height == MARGIN + FOOT + 4 * LINE, "the shares of BOS, EOS and rest remain"
    plain = word_sheet(
        drawn(tmp_path / "b", guidance_scale=1, capture={"dtype": "sqrt_u8"}), bands=1
    )
    for mode in ("queries", "summary"):
        other = word_sheet(
            drawn(tmp_path / mode, guidance_scale=1, capture={"attention": mode}), bands=1
        )
        assert other.width == plain.width if mode == "queries" else other.width < plain.width, (
            "means over heads have no contribution"
        )
        top, high = MARGIN + HEAD, CELL // 2
        assert (
            np.abs(cell(other, 0, top, high).astype(int) - cell(plain, 0, top, high)).mean() < 12
        ), "the same map, but for storage"


def test_a_prompt_without_words_is_said_on_the_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        "probe.figures.word_sheet.sheet_of_maps",
        lambda *given: notes.extend(given[2]) or sheet_of_maps(*given),
    )
    for number, (prompt, negative) in enumerate((("", ""), ("!?", "a hat"), ("a cat", "..."))):
        notes.clear()
        word_sheet(
            drawn(
                tmp_path / str(number),
                prompt=prompt,
                negative_prompt=negative,
                images=1,
                steps=1,
                capture={"branches": "both"},
            )
        )
        said = [note for note in notes if note.endswith("has no words: there is no map to draw.")]
        assert len(notes) == 4 + len(said), "how much goes where stays"
        wanted = {
            "The prompt": not any(map(str.isalpha, prompt)),
            "The negative prompt": not any(map(str.isalpha, negative)),
        }
        assert said == [
            f"{which} has no words: there is no map to draw."
            for which, none in wanted.items()
            if none
        ]


def test_what_words_did_stands_beside_where_they_were_looked_at(tmp_path: Path) -> None:
    run = drawn(tmp_path, images=1, capture={"counterfactual": ["cat"]})
    sheet = word_sheet(run, bands=2)
    high, row = CELL // 2, CELL // 2 + 26
    final = Image.fromarray(run.images.values[0]).resize((CELL, high), Image.Resampling.NEAREST)
    change = run.counterfactual().sel(masked_word="cat").isel(image=0)
    shown = [
        one.values for one in (change.mean("step"), *by_sigma(change, 2, run.variable("sigma")))
    ]
    for column, values in enumerate(shown):
        found = cell(sheet, column + 6, MARGIN + HEAD + row, high, 2).astype(int)
        assert (
            np.abs(
                found - pixels(overlay(final, values, (float(np.min(shown)), float(np.max(shown)))))
            ).max()
            <= 2
        )
    other = cell(sheet, 7, MARGIN + HEAD + 4 * row, high, 2)
    assert (other == PAPER).all(), "for `hat` it was not recorded, and no map is drawn"


def test_a_word_that_was_left_out_at_all_its_places_has_one_map_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        "probe.figures.word_sheet.sheet_of_maps",
        lambda *given: notes.extend(given[2]) or sheet_of_maps(*given),
    )
    asked: dict[str, Any] = {
        "prompt": "A cat on a Cat on a hat",
        "images": 1,
        "steps": 1,
        "guidance_scale": 1,
    }
    run = drawn(tmp_path / "a", **asked, capture={"counterfactual": ["cat", "a", "hat"]})
    sheet = word_sheet(run, bands=1)
    high, row = CELL // 2, CELL // 2 + 26
    maps = [cell(sheet, 5, MARGIN + HEAD + index * row, high, 2) for index in range(8)]
    for one, other in ((0, 3), (0, 6), (1, 4)):
        assert (maps[one] == maps[other]).all() and (maps[one] != PAPER).any(), (
            "A, a and a; cat and Cat"
        )
    assert (maps[0] != maps[1]).any() and (maps[2] == PAPER).all(), "and `on` was not left out"
    assert notes[0] == (
        "Counterfactual: a, cat: left out at all places at once, so that all rows of such a word "
        "show the same map"
    )
    notes.clear()
    word_sheet(drawn(tmp_path / "b", **asked, capture={"counterfactual": ["hat"]}), bands=1)
    assert notes and not any("places" in note for note in notes), (
        "`a` and `cat` have no maps, `hat` is there once"
    )


def test_what_was_cut_takes_a_line(tmp_path: Path) -> None:
    run = drawn(
        tmp_path,
        prompt="a cat " * 40,
        over_long="cut",
        images=1,
        steps=1,
        guidance_scale=1,
        capture={"layers": ["3x6"]},
    )
    words = run.attention().sel(branch="cond")["word_index"].values.max() + 1
    assert (
        word_sheet(run, bands=1).height
        == MARGIN + (HEAD + words * (CELL // 2 + 26) + 16) + FOOT + 5 * LINE
    )


def test_a_word_that_was_cut_in_its_middle_takes_a_line_and_keeps_its_maps(tmp_path: Path) -> None:
    capture = {"layers": ["3x6"], "counterfactual": ["ze"]}
    asked = {"over_long": "cut", "images": 1, "steps": 1, "guidance_scale": 1, "capture": capture}
    run = drawn(tmp_path, prompt="cat " * 73 + "zebra", **asked)
    assert run.cut() == ("bra", "zebra")
    sheet = word_sheet(run, bands=1)
    words, row = run.word_overview().sizes["word"], CELL // 2 + 26
    assert sheet.height == MARGIN + (HEAD + words * row + 16) + FOOT + 7 * LINE, (
        "three units, of two reads how much goes where, and two of the cut"
    )
    assert (cell(sheet, 4, MARGIN + HEAD + (words - 1) * row, CELL // 2, 2) != PAPER).any(), (
        "what the stump did"
    )


def test_a_run_that_was_stopped_is_drawn_over_its_last_preview(tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    original, calls = pipeline.unet.conv_in.forward, []

    def fails(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    pipeline.unet.conv_in.forward = fails
    with pytest.raises(KeyboardInterrupt):
        record(
            {"prompt": "a cat", "steps": 4, "output": str(tmp_path)},
            pipeline=pipeline,
            progress=False,
        )
    (path,) = tmp_path.glob("*.zarr")
    run = Run(path)
    assert run.status == "interrupted" and not run.images.values.any() and len(run.steps) == 2
    sheet = word_sheet(run, bands=1)
    preview = Image.fromarray(run.preview().values[-1][0]).resize(
        (CELL, CELL), Image.Resampling.NEAREST
    )
    wanted = pixels(overlay(preview, run.overview().isel(token=1).mean("step").values)).astype(int)
    assert np.corrcoef(cell(sheet, 0, MARGIN + HEAD, CELL).ravel(), wanted.ravel())[0, 1] > 0.95, (
        "over both steps that were committed"
    )


def test_what_cannot_be_drawn(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RecordingNotFound, match="has no image 2") as caught:
        word_sheet(run, image=2)
    assert caught.value.remedy == "It has images 0 to 1."
    with pytest.raises(RecordingNotFound, match="no attention maps"):
        word_sheet(drawn(tmp_path, images=1, capture={"attention": "off"}))


def test_arrays_without_a_recording() -> None:
    maps = xr.DataArray(
        np.array([[[[0.0, 0.2]], [[0.4, 0.4]]], [[[np.nan, np.nan]], [[np.nan, np.nan]]]]),
        dims=("word", "column", "y", "x"),
        coords={"word": ["cat", "cat"], "column": ["first", "second"]},
    )
    assert word_names(maps) == ["cat", "cat (2)"]
    sheet = sheet_of_maps(
        Image.new("RGB", (40, 20), (0, 0, 0)), {"Cats": [maps.rename("attention")]}
    )
    assert sheet.height == MARGIN + HEAD + 2 * (CELL // 2 + 26) + 16 + FOOT + LINE
    second = cell(sheet, 1, MARGIN + HEAD, CELL // 2)
    assert len(np.unique(second.reshape(-1, 3), axis=0)) == 1, (
        "constant, and the greatest of its row"
    )
    np.testing.assert_allclose(second[0, 0], HEAT[-1] * 0.9, atol=1)


def test_bounds_of_an_overlay() -> None:
    picture, maps = Image.new("RGB", (20, 10), (90, 90, 90)), np.array([[0.1, 0.3]], np.float32)
    np.testing.assert_array_equal(
        pixels(overlay(picture, maps, (0.1, 0.3))), pixels(overlay(picture, maps))
    )
    dim = pixels(overlay(picture, maps, (0.1, 3.0))).astype(int)
    assert dim.sum() < pixels(overlay(picture, maps)).astype(int).sum()
