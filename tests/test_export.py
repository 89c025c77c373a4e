"""`probe export`: a recording as one page, an animation or a strip of frames."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import probe
from probe.errors import ExperimentError, PromptError, RecordingNotFound, StoreError
from probe.export import main
from probe.figures.animation import animated, coloured, frames, strip
from probe.figures.bundle import payload
from probe.figures.drawing import HEAT
from probe.figures.page import page
from probe.figures.payload import unpack
from probe.testing.synthetic import synthetic_recording


@pytest.fixture(scope="module")
def run() -> probe.Run:
    return probe.open_run("sample")


@pytest.mark.parametrize("kind", ["webp", "gif", "png", "html"])
def test_each_kind_of_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / f"run.{kind}"
    assert (
        main(
            [
                "sample",
                f"--{kind}",
                str(target),
                *(["--word", "astronaut"] if kind == "gif" else []),
            ]
        )
        == 0
    )
    assert f"run.{kind} (" in capsys.readouterr().out
    if kind == "html":
        text = target.read_text()
        assert text.startswith("<!doctype html>") and "default-src 'none'" in text
        assert not re.search(r"(src|href)=[\"']?http", text), "nothing is fetched"
    else:
        with Image.open(target) as picture:
            assert picture.format == kind.upper() and min(picture.size) >= 256
            assert getattr(picture, "n_frames", 1) == (1 if kind == "png" else 20)


def test_frames_are_the_predicted_pictures_in_square_pixels(run: probe.Run) -> None:
    made = frames(run)
    preview = run.preview(run.denoised()).isel(image=0).values
    assert len(made) == 20 and made[7].size == (256, 256)
    np.testing.assert_array_equal(np.asarray(made[7])[8::16, 8::16], preview[7])
    plain, seen = np.asarray(made[7], float), np.asarray(frames(run, "astronaut")[7], float)
    bright = run.phrase("astronaut").isel(word=0, image=0, step=7)
    y, x = np.unravel_index(int(bright.values.argmax()), bright.shape)
    darker = (seen - plain).mean(axis=2)[8::16, 8::16]
    assert darker[y, x] > darker.mean(), "its brightest place is brighter than the rest of the map"


def test_colours_are_those_of_the_sheets() -> None:
    np.testing.assert_array_equal(coloured(np.array([[0.0, 1.0]])), [[HEAT[0], HEAT[-1]]])


def test_an_animation_rests_on_its_last_frame(run: probe.Run) -> None:
    made = Image.open(io.BytesIO(animated(frames(run)[:3], "GIF", 10)))
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(made)] == [100, 100, 2000]
    assert strip(frames(run)[:12]).size == (10 * 262 - 6, 2 * 262 - 6)


def test_a_page_has_a_title_and_notes_as_plain_text(run: probe.Run) -> None:
    text = page([run], False, title="<b>Lesson</b>", notes=["x < y & <script>z</script>", "two"])
    assert "<h1>&lt;b&gt;Lesson&lt;/b&gt;</h1>" in text
    assert "<p>x &lt; y &amp; &lt;script&gt;z&lt;/script&gt;</p>\n<p>two</p>\n</section>" in text
    assert 'class="notes"' not in page([run], False)


def test_runs_side_by_side_and_pages_without_heads(run: probe.Run) -> None:
    both, small = page([run, run]), page([run], everything=False)
    assert both.count('id="run1-heads-') == 7 and 'data-runs="2"' in both
    assert "-heads-" not in small.split('<script type="module">')[0] and len(small) < len(both) / 3


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no file to write"):
        main(["sample"])
    with pytest.raises(ExperimentError, match="another ending"):
        main(["sample", "--gif", str(tmp_path / "run.png")])
    with pytest.raises(ExperimentError, match="one recording"):
        main(["sample", "sample", "--gif", str(tmp_path / "run.gif")])
    with pytest.raises(PromptError, match="unicorn"):
        main(["sample", "--gif", str(tmp_path / "run.gif"), "--word", "unicorn"])
    with pytest.raises(StoreError, match="could not be written"):
        main(["sample", "--png", str(tmp_path / "none" / "run.png")])
    assert not [*tmp_path.iterdir()]


def test_an_unfinished_recording_is_exported_as_far_as_it_is(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "half.zarr", steps=4, status="interrupted")
    assert main([str(path), "--html", str(tmp_path / "half.html")]) == 0
    head, _ = unpack(payload(probe.open_run(path)))
    assert (
        "painted after the last step" in head["meta"]["missing"]["final"]
        and head["meta"]["calls"] == 4
    )
    assert len(frames(probe.open_run(path))) == 2
    with pytest.raises(RecordingNotFound):
        main(["none", "--html", str(tmp_path / "x.html"), "--runs", str(tmp_path)])
