"""A recording without a manifest is proved by digests: of every step, and of what is written once.

Whatever is deleted, changed or swapped in an interrupted recording is found. What a killed writer
may leave is not called damage. Every byte of a picture is accounted for.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr
from PIL import Image
from recordings import ATTRIBUTES

from probe.errors import RecordingDamaged
from probe.figures.sheets import keep
from probe.figures.word_sheet import word_sheet
from probe.format.schema import spec
from probe.proof.checks import check_committed, check_digests, check_manifest, check_picture
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.recorder import record, resume
from probe.watching import hooks
from probe.writing.chunks import checked
from probe.writing.digests import DIGESTS, digest, marks, read_lines, sealed
from probe.writing.store import RunWriter

ASKED: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 4,
    "scheduler": "DDIM",
    "images": 2,
    "decode_every": 1,
    "capture": {"branches": "both"},
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, pipe: Any) -> Path:
    """A recording that ended after three of its four steps, with a sheet of its words."""
    folder, calls = tmp_path_factory.mktemp("left"), iter(range(9))

    def stop(_: object) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with hooks.Hooks([(pipe.unet, "input", stop)]), pytest.raises(KeyboardInterrupt):
        record({**ASKED, "output": str(folder)}, pipe, progress=False)
    (path,) = folder.glob("*.zarr")
    keep(word_sheet(Run(path)), Run(path), "words.png")
    return path


@pytest.fixture
def run(left: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(left, tmp_path / left.name)))


def failed(path: Path) -> list[str]:
    return [check.name for check in verify(Run(path)) if check.verdict == "failed"]


def test_an_interrupted_recording_is_proved(left: Path) -> None:
    found = check_digests(Run(left))
    assert found.verdict == "exact" and found.detail.startswith("3 steps and "), found
    assert failed(left) == []
    with warnings.catch_warnings(action="error"):
        xr.open_datatree(left, engine="zarr", chunks=None).load()


@pytest.mark.parametrize(
    "number", [30, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_every_file_that_is_deleted_is_missed(number: int, run: Run) -> None:
    """All but those of the step that was being written, and what is drawn for people."""
    unseen = []
    files = sorted(file for file in run.path.rglob("*") if file.is_file() and file.suffix != ".png")
    for file in random.Random(number).sample(files, min(number, len(files))):
        content = file.read_bytes()
        file.unlink()
        try:
            checks = [check_digests(Run(run.path)), check_committed(Run(run.path))]
            seen = any(check.verdict == "failed" for check in checks)
        except (RecordingDamaged, OSError, ValueError):
            seen = True
        if not seen:
            unseen.append(str(file.relative_to(run.path)))
        file.write_bytes(content)
    assert unseen == []


def rewrite(file: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change a chunk's values, and its checksum with them."""
    values = np.frombuffer(file.read_bytes()[:-4], np.float32).copy()
    change(values)
    file.write_bytes(checked(values.tobytes()))


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def lines_of(path: Path, change: Callable[[list[str]], object]) -> None:
    lines = (path / DIGESTS).read_text().splitlines(keepends=True)
    change(lines)
    (path / DIGESTS).write_text("".join(lines))


def at(lines: list[str], what: str) -> int:
    return next(number for number, line in enumerate(lines) if line.endswith(f" {what}\n"))


LATENTS = "latents/latents/c.{}.0.0.0.0"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a changed value": lambda path: rewrite(
        path / LATENTS.format(1), lambda values: values.__setitem__(5, 1.5)
    ),
    "two steps swapped": lambda path: swap(path / LATENTS.format(0), path / LATENTS.format(1)),
    "a later step as an earlier": lambda path: shutil.copy(
        path / LATENTS.format(2), path / LATENTS.format(0)
    ),
    "two variables swapped": lambda path: swap(
        path / LATENTS.format(1), path / "latents/prediction/c.1.0.0.0.0"
    ),
    "a label swapped": lambda path: swap(path / "sigma/c.0", path / "alpha_bar/c.0"),
    "an older flag": lambda path: (path / "committed/c.0").write_bytes(
        checked(bytes([1, 0, 0, 0]))
    ),
    "no flags": lambda path: (path / "committed/c.0").unlink(),
    "no digests": lambda path: (path / DIGESTS).unlink(),
    "empty digests": lambda path: (path / DIGESTS).write_text(""),
    "a missing line": lambda path: lines_of(path, lambda lines: lines.pop(at(lines, "step 1"))),
    "a missing last line": lambda path: lines_of(
        path, lambda lines: lines.pop(at(lines, "step 2"))
    ),
    "lines swapped": lambda path: lines_of(
        path,
        lambda lines: lines.__setitem__(
            at(lines, "step 1"), lines[at(lines, "step 0")][:64] + " step 1\n"
        ),
    ),
    "a line that says nothing": lambda path: lines_of(
        path, lambda lines: lines.insert(2, "nothing\n")
    ),
    "a line of what is not there": lambda path: lines_of(
        path, lambda lines: lines.append(f"{'0' * 64} latents/other\n")
    ),
    "a flip in the digests": lambda path: lines_of(
        path,
        lambda lines: lines.__setitem__(3, ("1" if lines[3][0] != "1" else "2") + lines[3][1:]),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_found(what: str, run: Run) -> None:
    """And what verify finds broken in the steps is not gone on with in silence, where the steps are
    what is broken.
    """
    DAMAGES[what](run.path)
    assert failed(run.path), what
    if what == "no flags":
        with pytest.raises(RecordingDamaged, match=r"committed/c\.0"):
            _ = Run(run.path).steps
    if what in (
        "no flags",
        "no digests",
        "empty digests",
        "a missing line",
        "a missing last line",
        "a line that says nothing",
    ):
        with pytest.raises(RecordingDamaged) as caught:
            RunWriter(run.path, [spec("", "committed", (4,))], {}, resume=True)
        assert (
            "committed/c.0" if what == "no flags" else DIGESTS
        ) in caught.value.cause and "probe rerun" in caught.value.remedy


def test_what_a_killed_writer_leaves_is_no_damage(run: Run, pipe: Any) -> None:
    """A step without its flag, half a line, a file under its other name; and what is resumed has
    the digests of a run nobody stopped.
    """
    with (run.path / DIGESTS).open("a") as file:
        file.write(f"{'0' * 64} step 3\n{'1' * 30}")
    (run.path / "latents/latents/c.3.0.0.0.0.0123abcd.partial").write_bytes(b"half")
    assert failed(run.path) == []
    assert (run.path / DIGESTS).read_text().endswith("1" * 30)
    again = resume(run, pipe, progress=False)
    assert (
        failed(again.path) == []
        and check_digests(again).verdict == check_manifest(again).verdict == "exact"
    )
    lines = read_lines((again.path / DIGESTS).read_bytes())
    assert {f"step {step}" for step in range(4)} < lines.keys() and not list(
        again.path.rglob("*.partial")
    )
    assert DIGESTS in json.loads((again.path / "manifest.json").read_text())


def test_a_recording_that_is_being_written_is_proved_at_every_moment(tmp_path: Path) -> None:
    arrays = [
        spec("", "step", value=np.arange(3)),
        spec("", "committed", (3,)),
        spec("latents", "latents", (3, 1, 4, 8, 8), "float32"),
        spec("forward", "loss_mean", (3,)),
        spec("forward", "loss_spread", (3,)),
        spec("preview", "bias", (3,)),
        spec("decoded", "picture", (2, 1, 4, 4, 3)),
        spec("cost", "step_seconds", (3,)),
    ]
    with RunWriter(tmp_path / "a.zarr", arrays, ATTRIBUTES) as writer:
        for step in range(3):
            assert check_digests(Run(tmp_path / "a.zarr")).verdict == "exact"
            writer.write("preview/bias", np.full(3, step))  # again: the line before is taken back
            writer.write("decoded/picture", 7 * step, at=step % 2)
            values = {
                "latents/latents": np.full((1, 4, 8, 8), float(step)),
                "forward/loss_mean": np.array(0.5),
                "forward/loss_spread": np.array(np.nan),
            }
            writer.write_step(step, lambda values=values: values, 1)
            writer.flush()
        writer.write("cost/step_seconds", [1, 2, 3])
        found = check_digests(Run(tmp_path / "a.zarr"))
        assert (
            found.verdict == "exact"
            and found.detail == "3 steps and 5 other parts are what was written"
        )
        writer.complete()


def test_an_older_recording_says_that_it_was_not_checked(run: Run) -> None:
    """And where nothing was ever committed, a missing flag is none that was lost."""
    root = json.loads((run.path / "zarr.json").read_text())
    del root["attributes"]["digests"]
    (run.path / "zarr.json").write_text(json.dumps(root))
    (run.path / DIGESTS).unlink()
    assert check_digests(Run(run.path)).verdict == "not checked" and failed(run.path) == []
    (run.path / "committed/c.0").unlink()
    with pytest.raises(RecordingDamaged, match=r"committed/c\.0"):
        _ = Run(run.path).steps
    for step in (1, 2):
        (run.path / LATENTS.format(step)).unlink()
    assert Run(run.path).steps.tolist() == []


def test_a_digest_is_of_names_and_values() -> None:
    one, other = (
        marks(np.full((2, 3), value, np.float32), (1, 3), np.float32("nan")) for value in (1, 2)
    )
    assert (
        len(
            {
                digest(of)
                for of in (
                    {"a": one},
                    {"b": one},
                    {"a": other},
                    {"a": one, "b": other},
                    {"a": other, "b": one},
                    {},
                )
            }
        )
        == 6
    )
    nothing = marks(np.full((2, 3), np.nan, np.float32), (1, 3), np.float32("nan"))
    assert digest({"a": one, "b": nothing}) == digest({"a": one}), (
        "nothing but fill values is no file"
    )
    assert marks(np.array([["a", ""]], object), None, "") != marks(
        np.array([["", "a"]], object), None, ""
    )


# --- pictures -------------------------------------------------------------------------------------


def test_every_flip_in_a_picture_is_seen(pipe: Any, tmp_path: Path) -> None:
    """Also in its metadata and where PNG keeps no checksum; in sheets that are drawn later too."""
    run = record({**ASKED, "images": 1, "steps": 2, "output": str(tmp_path)}, pipe, progress=False)
    keep(word_sheet(run), run, "words.png")
    assert check_picture(run).verdict == "exact" and check_manifest(run).verdict == "exact"
    rng = random.Random(4)
    for name in ("picture.png", "contact-sheet.png", "words.png"):
        content = (run.path / name).read_bytes()
        places = [
            *range(0, 8 * 40, 9),
            *rng.sample(range(8 * len(content)), 30),
            *range(8 * (len(content) - 100), 8 * len(content), 13),
        ]
        for bit in places:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (run.path / name).write_bytes(flipped)
            found = check_picture(run)
            assert (found.verdict, found.detail) == (
                "failed",
                f"{name} is not as it was written",
            ), bit
        (run.path / name).write_bytes(content[:-7])
        assert check_picture(run).verdict == "failed"
        (run.path / name).write_bytes(content)
    assert failed(run.path) == []
    for name in ("mine.png", "latents/picture.png"):
        (run.path / name).write_bytes(b"no picture of ours")
        check = check_manifest(run)
        assert (check.verdict, check.detail) == ("failed", f"1 files new: {name}")
        (run.path / name).unlink()


def test_a_sealed_picture_is_a_picture_like_another(left: Path) -> None:
    made = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(made, "PNG")
    with Image.open(io.BytesIO(sealed(made.getvalue()))) as shown:
        assert shown.getpixel((2, 2)) == (1, 2, 3) and len(shown.text["sha256"]) == 64  # type: ignore[attr-defined]
    assert "every byte as it was written" in check_picture(Run(left)).detail
