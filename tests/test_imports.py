"""What a run imports before its first step: in a fresh process, beside what diffusers imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, sys
import tiny
pipe = tiny.pipeline()                      # torch, diffusers and transformers
theirs = set(sys.modules)
from probe import run                       # the command
from probe.running import recorder, session

def first_step(self, index):
    ours = set(sys.modules) - theirs
    outside = set(sys.stdlib_module_names) | {"probe", "__mp_main__"}
    print("packages", *sorted({name.split(".")[0] for name in ours} - outside))
    print("probe", *sorted(name for name in ours if name.startswith("probe.")))
    sys.stdout.flush()
    os._exit(0)

session.Session.watching = first_step
recorder.record({"prompt": "a cat", "steps": 1, "output": sys.argv[1]}, pipe, progress=False)
"""
# What the recording is written and read with, and what these import themselves; more of torch and
# diffusers.
PACKAGES = set(
    """torch diffusers xarray pandas pyarrow dateutil pytz six tzdata zarr numcodecs donfig yaml
    msgpack google_crc32c crc32c pydantic pydantic_core annotated_types typing_inspection
    typing_extensions PIL filelock packaging cloudpickle""".split()
)
# Rooms and modules that other commands have.
OTHERS = ("dashboard", "studies", "proof", "testing", "cost", "sweep", "view", "embed", "export")


def test_a_run_imports_what_it_needs_before_its_first_step(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = {line.split()[0]: set(line.split()[1:]) for line in told.splitlines() if line}
    assert lines["packages"] <= PACKAGES, sorted(lines["packages"] - PACKAGES)
    assert "probe.running.recorder" in lines["probe"]
    others = {name for name in lines["probe"] if name.split(".")[1] in OTHERS}
    assert not others, sorted(others)
    pages = {name for name in lines["probe"] if name.startswith("probe.figures.")}
    sheets = {"drawing", "sheets", "noising_sheet", "word_sheet"}
    assert pages <= {f"probe.figures.{name}" for name in sheets}, sorted(pages)
