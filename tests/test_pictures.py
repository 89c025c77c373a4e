"""The PNGs of a recording: what is on them, where, and what is written into them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image, ImageDraw, ImageFont

from probe.figures import sheets
from probe.figures.drawing import CELL, FAINT, GAP, HEAT, INK, MARGIN, PAPER, heat, overlay, shorten
from probe.figures.sheets import contact_sheet
from probe.figures.word_sheet import word_sheet
from probe.reading.recording import Run
from probe.running.recorder import record

HEAD = MARGIN + 74  # where the first row's title begins
WIDTH = 2 * MARGIN + 8 * CELL + 7 * GAP


def drawn(folder: Path, pipeline: Any = None, **asked: Any) -> Run:
    return record(
        {"prompt": "An astronaut scuba diving", "steps": 3, "output": str(folder), **asked},
        pipeline=pipeline or tiny.pipeline(),
        progress=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return drawn(tmp_path_factory.mktemp("runs"), decode_every=1)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def cell(sheet: Image.Image, column: int, top: int, height: int = CELL) -> np.ndarray:
    x = MARGIN + column * (CELL + GAP)
    return pixels(sheet)[top : top + height, x : x + CELL]


# --- heat and overlay -----------------------------------------------------------------------------


def test_heat_goes_through_its_colours() -> None:
    assert heat(np.linspace(0, 1, len(HEAT))).tolist() == HEAT.astype(int).tolist()
    assert heat(np.array([-5.0, 7.0])).tolist() == [HEAT[0].tolist(), HEAT[-1].tolist()], (
        "beyond the ends: the ends"
    )
    assert heat(np.zeros((2, 3, 4))).shape == (2, 3, 4, 3) and heat(np.zeros(1)).dtype == np.uint8
    middle = heat(np.array([0.1]))[0]
    assert middle.tolist() == ((HEAT[0] + HEAT[1]) / 2).round().astype(int).tolist()
    brightness = heat(np.linspace(0, 1, 200)).astype(int).sum(axis=1)
    assert (np.diff(brightness) >= 0).all(), "more is brighter"


def test_an_overlay_is_hot_where_the_map_is_and_grey_elsewhere() -> None:
    picture = Image.new("RGB", (64, 48), (0, 200, 40))
    maps = np.zeros((6, 8), np.float32)
    maps[0, 0] = 0.02  # small numbers, spread from the least to the greatest
    made = pixels(overlay(picture, maps))
    assert made.shape == (48, 64, 3)
    grey = int(pixels(picture.convert("L"))[0, 0, 0])
    np.testing.assert_allclose(made[40, 60], grey * 0.75 + np.array(HEAT[0]) * 0.25, atol=1)
    assert made[1, 1].astype(int).sum() > made[40, 60].astype(int).sum() + 200


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 1e-30])
def test_a_constant_map_is_no_division_by_zero(value: float) -> None:
    made = pixels(
        overlay(Image.new("RGB", (20, 10), (90, 90, 90)), np.full((3, 3), value, np.float32))
    )
    assert made.shape == (10, 20, 3) and len(np.unique(made.reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_drawn_without_a_warning(bad: float) -> None:
    maps = np.array([[bad, 0.1], [0.2, 0.3]], np.float32)
    picture = Image.new("RGB", (20, 20), (90, 90, 90))
    assert len(np.unique(pixels(overlay(picture, maps)))) > 5, "the rest of it is still told"
    assert overlay(picture, np.full((2, 2), bad, np.float32)).size == (20, 20)


# --- files ----------------------------------------------------------------------------------------


def test_the_picture_is_the_picture_and_knows_its_experiment(run: Run) -> None:
    assert sorted(file.name for file in run.path.glob("*.png")) == [
        "contact-sheet.png",
        "picture.png",
    ]
    with Image.open(run.path / "picture.png") as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"
        np.testing.assert_array_equal(pixels(picture), run.images.values[0])
    for name in ("picture.png", "contact-sheet.png"):
        with Image.open(run.path / name) as picture:
            picture.load()
            assert json.loads(picture.text["experiment"]) == run.experiment.resolved()
            assert picture.text["Software"] == "probe"


def test_several_images_are_several_files_and_any_language_survives(tmp_path: Path) -> None:
    prompt = "a cat ☃ \U0001f419 日本"
    run = drawn(tmp_path, prompt=prompt, images=2, height=24, width=64)
    assert sorted(file.name for file in run.path.glob("*.png")) == [
        "contact-sheet.png",
        "picture-0.png",
        "picture-1.png",
    ]
    for index in range(2):
        with Image.open(run.path / f"picture-{index}.png") as picture:
            assert picture.size == (64, 24)
            np.testing.assert_array_equal(pixels(picture), run.images.values[index])
            assert json.loads(picture.text["experiment"])["prompt"] == prompt
    assert (run.images.values[0] != run.images.values[1]).any()


def test_they_can_be_drawn_again(run: Run) -> None:
    before = {file.name: file.read_bytes() for file in run.path.glob("*.png")}
    assert [path.name for path in sheets.save(Run(run.path))] == [
        "picture.png",
        "contact-sheet.png",
    ]
    assert {
        file.name: pixels(Image.open(file)).tobytes() for file in run.path.glob("*.png")
    }.keys() == before.keys()
    for name, content in before.items():
        assert (run.path / name).read_bytes() == content, (
            f"{name}: the same recording, the same picture"
        )


# --- the contact sheet ----------------------------------------------------------------------------


def test_the_sheet_has_every_part_in_its_place(run: Run) -> None:
    sheet = contact_sheet(run)
    line = CELL + 34
    assert sheet.size == (WIDTH, HEAD + 2 * (34 + line) + 30 + MARGIN // 2) and sheet.mode == "RGB"
    assert sheet.getpixel((1, 1)) == sheet.getpixel((sheet.width - 2, sheet.height - 2)) == PAPER

    final = Image.fromarray(run.images.values[0]).resize((CELL, CELL), Image.Resampling.NEAREST)
    calls = run.tree.sizes["step"]
    result = cell(sheet, calls, HEAD + 28)
    np.testing.assert_array_equal(result, pixels(final), "the result comes after the steps")
    assert result.std() > 1, "and is not blank"

    decoded = run.variable("decoded/picture").values[:, 0]
    for index in range(calls):
        wanted = Image.fromarray(decoded[index]).resize((CELL, CELL), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cell(sheet, index, HEAD + 28), pixels(wanted))
    assert (cell(sheet, calls + 1, HEAD + 28) == PAPER).all(), "nothing beyond it"

    words = run.word_overview()
    assert words["word"].values.tolist() == ["An", "astronaut", "scuba", "diving"]
    for index, word in enumerate(words):
        np.testing.assert_array_equal(
            cell(sheet, index, HEAD + 34 + line + 28), pixels(overlay(final, word.values))
        )
    bar = pixels(sheet)[
        HEAD + 2 * (34 + line) + 2 : HEAD + 2 * (34 + line) + 14, MARGIN : MARGIN + 240
    ]
    np.testing.assert_array_equal(bar, heat(np.linspace(0, 1, 240)[None].repeat(12, 0)))


def test_the_sheet_is_written_on(run: Run) -> None:
    """Ink at the title, at the row's title and under each cell: the words themselves are the font's
    business.
    """
    sheet = pixels(contact_sheet(run)).astype(int)

    def inked(top: int, bottom: int, left: int = 0, right: int = WIDTH) -> bool:
        return bool((sheet[top:bottom, left:right].sum(axis=-1) < 500).any())

    assert (
        inked(MARGIN - 6, MARGIN + 30)
        and inked(MARGIN + 32, MARGIN + 50)
        and inked(HEAD, HEAD + 20)
    )
    assert inked(HEAD + 28 + CELL + 2, HEAD + 28 + CELL + 30, MARGIN, MARGIN + CELL)


def test_what_is_written_can_be_read_without_a_font_of_the_system(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own font is all that a bare machine has; what it lacks would be an empty box."""
    font, write, written = ImageFont.load_default(40), ImageDraw.ImageDraw.text, set()

    def noted(draw: ImageDraw.ImageDraw, at: Any, text: str, *args: Any, **settings: Any) -> None:
        written.update(text)
        write(draw, at, text, *args, **settings)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    contact_sheet(run)
    word_sheet(run)
    box = bytes(font.getmask("\uffff"))
    assert len(written) > 30 and bytes(font.getmask("\u2192")) == box, (
        "an arrow is one that it lacks"
    )
    assert {
        letter for letter in written if not letter.isspace() and bytes(font.getmask(letter)) == box
    } == set()


def test_without_decoded_steps_the_preview_is_shown(tmp_path: Path) -> None:
    run = drawn(tmp_path)
    sheet = contact_sheet(run)
    preview = run.preview().values[:, 0]
    assert preview.shape == (4, 8, 8, 3) and preview.dtype == np.uint8
    for index in range(4):
        wanted = Image.fromarray(preview[index]).resize((CELL, CELL), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cell(sheet, index, HEAD + 28), pixels(wanted))


def test_the_heading_says_whether_pictures_or_latents_are_shown(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    text = ImageDraw.ImageDraw.text

    def noted(self: ImageDraw.ImageDraw, at: Any, said: str, *more: Any, **options: Any) -> None:
        written.append(said)
        text(self, at, said, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    for one, what in (
        (run, "clean picture at"),
        (drawn(tmp_path), "clean latents, as colours, at"),
    ):
        written.clear()
        contact_sheet(one)
        assert any(
            said.startswith(f"From noise to picture: the predicted {what}") for said in written
        )


def test_a_run_without_attention_has_one_row(tmp_path: Path) -> None:
    run = drawn(tmp_path, capture={"attention": "off"})
    sheet = contact_sheet(run)
    assert sheet.height == HEAD + 34 + CELL + 34 + MARGIN // 2
    assert (run.path / "contact-sheet.png").is_file()


def test_a_prompt_without_words_has_one_row(tmp_path: Path) -> None:
    assert contact_sheet(drawn(tmp_path, prompt="")).height == HEAD + 34 + CELL + 34 + MARGIN // 2


@pytest.mark.parametrize(("height", "width"), [(24, 64), (64, 24)])
def test_a_picture_that_is_not_square_keeps_its_shape(
    tmp_path: Path, height: int, width: int
) -> None:
    run = drawn(tmp_path, height=height, width=width, decode_every=1)
    sheet = contact_sheet(run)
    high = round(height * CELL / width)
    final = Image.fromarray(run.images.values[0]).resize((CELL, high), Image.Resampling.NEAREST)
    assert sheet.size == (WIDTH, HEAD + 2 * (34 + high + 34) + 30 + MARGIN // 2)
    np.testing.assert_array_equal(cell(sheet, 4, HEAD + 28, high), pixels(final))
    first = cell(sheet, 0, HEAD + 34 + high + 34 + 28, high)
    np.testing.assert_array_equal(first, pixels(overlay(final, run.word_overview()[0].values)))


def test_many_steps_are_thinned_out_and_many_words_take_more_lines(tmp_path: Path) -> None:
    run = drawn(
        tmp_path,
        prompt="a cat and an astronaut in a hat and a cat on a hat",
        steps=12,
        capture={"layers": ["4x4"]},
    )
    sheet = contact_sheet(run)
    assert run.word_overview().sizes["word"] == 14
    assert sheet.height == HEAD + (34 + CELL + 34) + (34 + 2 * (CELL + 34)) + 30 + MARGIN // 2
    final = Image.fromarray(run.images.values[0]).resize((CELL, CELL), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(
        cell(sheet, 7, HEAD + 28),
        pixels(final),
        "seven steps, first and last among them, and the result",
    )
    preview = run.preview().values[:, 0]
    for column, step in ((0, 0), (6, 12)):
        wanted = Image.fromarray(preview[step]).resize((CELL, CELL), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(cell(sheet, column, HEAD + 28), pixels(wanted))


@pytest.mark.parametrize(
    "prompt", ["a cat on a hat, " * 12, "an astronaut\nscuba diving\n\nin a hat"]
)
def test_long_and_broken_prompts_stay_on_one_line(tmp_path: Path, prompt: str) -> None:
    run = drawn(tmp_path, prompt=prompt, steps=1, guidance_scale=1, capture={"attention": "off"})
    sheet = pixels(contact_sheet(run)).astype(int)
    assert (sheet[:, WIDTH - MARGIN // 2 :] == PAPER).all(), "nothing runs over the edge"
    shade = sheet[MARGIN - 6 : HEAD - 20]
    rows = np.flatnonzero((shade.sum(axis=-1) < 600).any(axis=1))
    assert rows.size and (np.diff(rows) > 1).sum() <= 2, "two lines of text, with room between them"
    faint = np.abs(sheet[MARGIN + 34 : MARGIN + 48] - FAINT).sum(axis=-1).min()
    dark = np.abs(sheet[MARGIN + 34 : MARGIN + 48] - INK).sum(axis=-1).min()
    assert faint < 30 < dark, "the second line is not written over"
    assert shorten("x" * 100, 80) == "x" * 79 + "…" and shorten("a\n b", 80) == "a b"


def test_a_run_that_recorded_nan_still_ends_and_has_its_pictures(tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    pipeline.unet.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = drawn(tmp_path, pipeline, on_nan="record", decode_every=2)
    assert run.status == "complete" and np.isnan(run.prediction().values).any()
    assert sorted(file.name for file in run.path.glob("*.png")) == [
        "contact-sheet.png",
        "picture.png",
    ]
