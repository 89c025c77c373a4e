"""The emoji's licences lie beside the sheet and in the wheel, and the package names them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "experiments" / "emojiworld"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXPRESSION = "MIT AND Apache-2.0 AND OFL-1.1"


def test_each_licence_of_the_package_is_there_whole() -> None:
    files = {path for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}
    assert files == {ROOT / "LICENSE", *(WORLD / "LICENSES").iterdir()}
    heads = {
        "LICENSE": "MIT License",
        "Apache-2.0.txt": "Apache License Version 2.0, January 2004",
        "OFL-1.1.txt": "Copyright 2022 Google Inc.",
    }
    ends = {
        "LICENSE": "OTHER DEALINGS IN THE SOFTWARE.",
        "Apache-2.0.txt": "limitations under the License.",
        "OFL-1.1.txt": "DEALINGS IN THE FONT SOFTWARE.",
    }
    for file in files - {WORLD / "LICENSES" / "NOTICE.md"}:
        text = " ".join(file.read_text(encoding="utf-8").split())
        assert text.startswith(heads[file.name]) and text.endswith(ends[file.name]), file
    named = PROJECT["license"].split(" AND ")
    assert PROJECT["license"] == EXPRESSION and {f"{name}.txt" for name in named[1:]} <= {
        file.name for file in files
    }


def test_the_notice_says_what_was_taken() -> None:
    notice = (WORLD / "LICENSES" / "NOTICE.md").read_text(encoding="utf-8")
    count = len(json.loads((WORLD / "glyphs.json").read_text(encoding="utf-8")))
    assert f"`glyphs.webp` holds {count} emoji of Noto Color Emoji" in notice
    assert all(f"`{name}`" in notice for name in ("Apache-2.0.txt", "OFL-1.1.txt", "glyphs.py"))


@pytest.mark.slow
def test_the_wheel_holds_the_licences(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        inside = {Path(name).name: name for name in packed.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(packed.read(inside["METADATA"]).decode())
        assert metadata["License-Expression"] == EXPRESSION
        for file in (ROOT / "LICENSE", *(WORLD / "LICENSES").iterdir()):
            assert (
                "/licenses/" in inside[file.name]
                and packed.read(inside[file.name]) == file.read_bytes()
            )
