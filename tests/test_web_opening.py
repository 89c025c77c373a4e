"""The page shows of a recording what Python's player shows, and refuses what Python refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from recordings import cut, recording

import probe
from probe.errors import RecordingNotFound
from probe.figures.bundle import payload
from probe.figures.channels import layers_and_heads
from probe.figures.payload import unpack
from probe.reading.recording import Run
from probe.reading.sample import ARCHIVES, pack

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "web_opening.test.mjs"
NODE = shutil.which("node")
MODULES = ROOT / "web" / "node_modules" / "zarrita"
BOTH = {"branches": "both", "tokens": "all"}

pytestmark = [
    pytest.mark.slow,  # and it needs what npm fetches
    pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs"),
    pytest.mark.skipif(
        not MODULES.is_dir(), reason="needs zarrita: cd web && npm ci --ignore-scripts"
    ),
]


def recordings(folder: Path) -> dict[str, Run]:
    """Recordings of every kind: of the bundled model, of tiny ones, whole and not, new and old."""

    def take(name: str, pipe: Any = None, **changes: Any) -> Run:
        return tiny_runs.take(folder / name, pipe, **changes)

    old = {}
    for name in ("default", "interrupted", "noising"):
        shutil.unpack_archive(ROOT / "tests" / "format_1" / f"{name}.zip", folder / "old")
        old[f"format-1-{name}"] = probe.open_run(folder / "old" / f"{name}.zarr")
    whole = take("whole")
    float32 = {"dtype": "float32"}
    velocity = tiny_runs.pipeline(prediction="v_prediction")
    return {
        "sample": probe.open_run("sample"),
        "sample-noising": probe.open_run("sample-noising"),
        **old,
        "whole": whole,
        "cut": cut(whole, folder, 2),
        "none-yet": cut(whole, folder / "none", 0),
        "codes": take("codes", capture={"dtype": "sqrt_u8", **BOTH}),
        "several": take("several", images=2, capture=float32),
        "wide": take("wide", capture=float32, width=48, height=32, scheduler="Euler"),
        "velocity": take("velocity", velocity, capture=BOTH, guidance_scale=1.0),
        "queries": take("queries", capture={"attention": "queries"}),
        "summary": take("summary", capture={"attention": "summary"}),
        "without": take("without", capture=tiny_runs.OFF),
        "decoded": take("decoded", decode_every=2, capture={"steps": "1:3"}),
    }


def described(run: Run, folder: Path) -> None:
    """Write what Python's player is given of a recording."""
    folder.mkdir()
    head, parts = unpack(payload(run))
    shapes = {name: part["shape"] for name, part in head["parts"].items()}
    about = {"meta": head["meta"], "shapes": shapes, "name": folder.name}
    if "maps" in parts:
        parts["maps"].astype(np.float32).tofile(folder / "maps.f32")
        channel = min(1, len(head["meta"]["channels"]) - 1)
        branch = head["meta"]["branch"]
        try:
            heads, maps = unpack(layers_and_heads(run, channel, branch=branch))
            maps["maps"].astype(np.float32).tofile(folder / "heads.f32")
            about["heads"] = {**heads["meta"], "shape": heads["parts"]["maps"]["shape"]}
        except RecordingNotFound:
            pass
        words = run.word_maps(branch=branch).isel({run.attributes.across: 0})
        words.transpose("word", "y", "x", "step").values.astype(np.float32).tofile(
            folder / "words.f32"
        )
        about["words"] = [str(word) for word in words["word"].values]
    if "latents" in parts or "latents" in shapes:
        one = {run.attributes.across: 0}
        clean = run.denoised().isel(one)
        run.preview(clean).values.astype(np.float32).tofile(folder / "denoised.f32")
    if "final" in shapes:
        picture = run.images.isel({run.attributes.across: 0})
        picture.values.astype(np.float32).tofile(folder / "final.f32")
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings as zip files, each with what Python says of it beside it."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("opened")
    for name, run in recordings(made).items():
        described(run, folder / name)
        pack(run.path, name, folder / f"{name}.zarr.zip")
    pack(recording(made / "small.zarr"), "small", folder / "small.zarr.zip")
    shutil.copy(ARCHIVES["sample"], folder / "packed.zip")
    with (
        zipfile.ZipFile(folder / "whole.zarr.zip") as whole,
        zipfile.ZipFile(folder / "stored.zarr.zip", "w") as stored,
    ):
        for name in whole.namelist():
            stored.writestr(name, whole.read(name))
    return folder


def run_node(folder: Path, pattern: str) -> None:
    """Run the node tests of a name on a folder of recordings."""
    environment = os.environ | {"OPENED": str(folder)}
    command = [str(NODE), "--test", f"--test-name-pattern={pattern}", str(TEST)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# pass 0" not in done.stdout


def test_the_page_shows_of_a_recording_what_python_shows(opened: Path) -> None:
    run_node(opened, "^shows")


def test_what_no_recording_is_ends_in_a_sentence_and_in_bounded_memory(opened: Path) -> None:
    run_node(opened, "^refuses")
