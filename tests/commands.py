"""Commands called as people call them, in this process and in one of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from probe import run
from probe.diffusion.loading import BUNDLED

ROOT = Path(__file__).parent.parent
BLOCK = "error: (?P<cause>[^\n]+)\n       (?P<remedy>[^\n]+)\n"
Command = Callable[..., tuple[int, str, str]]

needs_the_bundled_model = pytest.mark.skipif(
    not (BUNDLED["emojiworld"] / "model_index.json").is_file(),
    reason="probe/emojiworld is not there",
)


def process(*command: object, **options: Any) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)
    full = [sys.executable, "-m", *map(str, command)]
    return subprocess.Popen(
        full, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def cause_and_remedy(err: str) -> tuple[str, str]:
    """Return cause and remedy: the last two lines of stderr."""
    assert "Traceback" not in err
    block = re.search(BLOCK + r"\Z", err)
    assert block and err.count("error: ") == 1, err
    assert len(block["cause"]) < 400
    return block["cause"], block["remedy"]


def refused(
    call: Command, *arguments: object, main: Callable[[list[str]], int] = run.main, code: int = 2
) -> tuple[str, str]:
    """Call a command that is refused. Return cause and remedy."""
    got, out, err = call(main, *arguments)
    assert got == code, (got, err)
    assert out == ""
    return cause_and_remedy(err)


def damaged(folder: Path, name: str = "broken-00000000") -> Path:
    """Write a recording whose root file is torn. Return its path."""
    path = folder / f"{name}.zarr"
    path.mkdir(parents=True)
    (path / "zarr.json").write_text('{"zarr_format": 3, "attrib')
    return path


def copied(runs: Path, name: str, **attributes: Any) -> Path:
    """Copy the small recording under another name, with other attributes. Return its path."""
    source = next(runs.glob("small-*.zarr"))
    path = Path(shutil.copytree(source, runs / f"{name}.zarr"))
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attributes
    (path / "zarr.json").write_text(json.dumps(root))
    return path
