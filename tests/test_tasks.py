"""tasks.py installs into its own environment alone, whatever pip and Python were told before.

It says what it lacks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tasks.py"

# A checkout with nothing to download: its build backend lies beside it, and `probe.run` says where
# it runs.
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "diffusion-probe"
version = "1"
"""
BACKEND = """
import zipfile
from pathlib import Path

def build_editable(folder, config_settings=None, metadata_directory=None):
    name, about = "diffusion_probe-1-py3-none-any.whl", "diffusion_probe-1.dist-info/"
    texts = {
        "checkout.pth": str(Path.cwd()),
        about + "METADATA": "Metadata-Version: 2.1\\nName: diffusion-probe\\nVersion: 1\\n"
        "Provides-Extra: record\\n",
        about + "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\n"
        "Tag: py3-none-any\\n",
    }
    texts[about + "RECORD"] = "".join(f"{file},,\\n" for file in [*texts, about + "RECORD"])
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        for file, text in texts.items():
            wheel.writestr(file, text)
    return name
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder with spaces"
    (folder / "probe").mkdir(parents=True)
    shutil.copy(TASKS, folder)
    texts = {
        "pyproject.toml": PROJECT,
        "backend.py": BACKEND,
        "constraints.txt": "",
        "probe/__init__.py": "",
    }
    texts["probe/run.py"] = "import sys\nprint('ran', sys.argv[1:], 'in', sys.prefix)\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def call(tasks: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Call it with another Python of this machine, and without what this test run was told."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PROBE_", "PYTHON"))
    }
    environment, command = {**kept, **changes}, [sys.executable, str(tasks), *arguments]
    return subprocess.run(
        command,
        env=environment,
        cwd=tasks.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.slow
def test_nothing_is_installed_elsewhere(checkout: Path, tmp_path: Path) -> None:
    """The shell was set up for something else: packages would go to other folders, or nowhere."""
    elsewhere = tmp_path / "elsewhere"
    set_up = {
        "PIP_TARGET": str(elsewhere),
        "PIP_PREFIX": str(elsewhere),
        "PIP_USER": "1",
        "PIP_DRY_RUN": "1",
        "PIP_NO_DEPS": "1",
    }
    done = call(
        checkout / "tasks.py", "record", "some.yaml", PYTHONPATH=os.pathsep.join(sys.path), **set_up
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ran ['some.yaml'] in {checkout / '.venv'}" in done.stdout and not elsewhere.exists()
    again = call(checkout / "tasks.py", "record")
    assert again.stdout == f"ran [] in {checkout / '.venv'}\n"  # nothing is left to install


@pytest.mark.slow
def test_an_environment_without_the_package_is_not_called_finished(
    checkout: Path, tmp_path: Path
) -> None:
    (tmp_path / "pip.conf").write_text("[install]\ndry-run = true\n")
    for _ in range(2):
        done = call(checkout / "tasks.py", "record", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
        assert done.returncode == 1 and "ran" not in done.stdout.split()
        assert done.stderr.endswith(
            f"pip ended well, but {checkout / '.venv'} lacks diffusion-probe.\n"
            "Remove target, prefix, root, dry-run and no-deps from pip's settings (see `pip config "
            "list`), then call again.\n"
        )
    (tmp_path / "pip.conf").write_text("")
    assert (
        call(checkout / "tasks.py", "record", PIP_CONFIG_FILE=str(tmp_path / "pip.conf")).returncode
        == 0
    )


@pytest.mark.slow
def test_a_python_without_ssl_is_named(checkout: Path) -> None:
    """pip then says this, and that it found no version of anything."""
    said = (
        "WARNING: pip is configured with locations that require TLS/SSL, however the ssl module in "
        "Python is not available."
    )
    said += "ERROR: Could not find a version that satisfies the requirement x (from versions: none)"
    (checkout / "backend.py").write_text(f"raise SystemExit({said!r})\n")
    done = call(checkout / "tasks.py", "record")
    assert done.returncode == 1 and done.stderr.endswith(
        "one where python3 -c 'import ssl' says nothing.\n"
    ), done.stderr
    assert "PIP_INDEX_URL" not in done.stderr


def test_a_python_that_makes_no_environments_names_the_package(checkout: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['ensurepip'] = None; sys.argv = [sys.argv[1], 'record']; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkout / "tasks.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1 and not (checkout / ".venv").exists()
    assert done.stderr == (
        "This Python cannot make environments: its venv or ensurepip module is missing.\n"
        "On Debian or Ubuntu: apt install python3-venv. Or, with uv: uv venv --seed "
        f"'{checkout / '.venv'}'. Then call again.\n"
    )
    assert "apt install python3-venv" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_is_something_else_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    (other / "mine.txt").write_text("mine")
    done = call(checkout / "tasks.py", "record", PROBE_VENV=str(other))
    assert done.returncode == 1 and [file.name for file in other.iterdir()] == ["mine.txt"]
    assert done.stderr == (
        f"{other} exists and is not a Python environment.\n"
        "Name an empty or a new folder with PROBE_VENV.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reccord"], "tasks.py has no 'reccord'.\nDid you mean 'record'?\n"),
        (
            ["release"],
            "release only checks: it publishes nothing.\nCall it with --check: python3 tasks.py "
            "release --check.\n",
        ),
        (
            ["check", "--fast"],
            "check takes --all, --no-tests or nothing, not ['--fast'].\nTo run some tests only: "
            "python3 tasks.py test <",
        ),
    ],
)
def test_a_mistake_in_the_call_is_said_before_anything_is_made(
    checkout: Path, arguments: list[str], said: str
) -> None:
    done = call(checkout / "tasks.py", *arguments)
    assert (
        done.returncode == 2 and done.stderr.startswith(said) and not (checkout / ".venv").exists()
    )


def test_the_page_is_built_into_a_folder_of_its_own_and_needs_node(tmp_path: Path) -> None:
    def web(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TASKS), "web", *arguments]
        nowhere = {"PATH": str(tmp_path)}
        return subprocess.run(command, env=nowhere, capture_output=True, text=True, check=False)

    (tmp_path / "mine").write_text("kept")
    mistake, other, missing = web("--open"), web(str(tmp_path)), web(str(tmp_path / "new"))
    assert mistake.returncode == 2 and "takes a folder or nothing" in mistake.stderr
    assert other.returncode == 2 and "has other things in it" in other.stderr
    assert missing.returncode == 1 and "apt install nodejs npm" in missing.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_packages_of_the_page_are_fetched_again_if_one_is_new_or_another(tmp_path: Path) -> None:
    def there(**versions: str) -> bool:
        packages = {f"node_modules/{name}": {"version": v} for name, v in versions.items()}
        own.write_text(json.dumps({"packages": packages}))
        return bool(loaded(TASKS).modules_are_there(tmp_path))

    own = tmp_path / "node_modules" / ".package-lock.json"
    own.parent.mkdir()
    root = {"dependencies": {"a": "1"}, "devDependencies": {"b": "1"}}
    wanted = {f"node_modules/{name}": {"version": "1"} for name in "abc"}  # c: of another machine
    (tmp_path / "package-lock.json").write_text(json.dumps({"packages": {"": root, **wanted}}))
    assert there(a="1", b="1") and there(a="1", b="1", c="1")
    assert not there(a="1") and not there(a="2", b="1") and not there(a="1", b="1", d="1")


def test_the_smoke_tier_is_of_every_kind() -> None:
    """One test of each promise that a newcomer meets; the marker says which, tasks.py finds their
    files.
    """
    tasks = loaded(TASKS)
    names = {Path(file).name for file in tasks.smoke_files()}
    assert {"test_house.py", "test_parity.py", "test_sample.py", "test_smoke.py"} <= names and len(
        names
    ) < 10


def loaded(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ON_THE_INDEX = {
    "one": ["2.10", "1.4", "1.4.1", "1.3", "0.9"],
    "two": ["3.0", "2.1.0"],
    "old": ["1.0"],
}


def test_the_lowest_version_is_one_that_the_index_has() -> None:
    lowest = loaded(ROOT / ".ci" / "release.py").lowest
    assert lowest(["one>=1.4,<3", "two>=2"], ON_THE_INDEX.__getitem__) == ["one==1.4", "two==2.1.0"]
    assert lowest(["one>=1.5"], ON_THE_INDEX.__getitem__) == ["one==2.10"], (
        "versions are no decimals"
    )
    with pytest.raises(ValueError, match="one has no lower bound"):
        lowest(["one<3"], ON_THE_INDEX.__getitem__)
    with pytest.raises(ValueError, match="no wheel that fits old>=2"):
        lowest(["old>=2"], ON_THE_INDEX.__getitem__)


def test_every_direct_dependency_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [
        *project["dependencies"],
        *project["optional-dependencies"]["record"],
        *project["optional-dependencies"]["dashboard"],
    ]
    assert [line for line in asked if ">=" not in line] == []


def test_pythons_are_found_by_their_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that does not run, as pyenv's shims, is passed over; the first of one version is
    taken.
    """
    for name, text in (
        ("python3.12", "exit 127"),
        ("python3.11", "echo 3.11"),
        ("python3.13", "echo 2.7"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert loaded(ROOT / ".ci" / "release.py").pythons_here() == {"3.11": tmp_path / "python3.11"}


def test_ci_does_what_the_readme_says() -> None:
    """.ci/run installs packages that the README names, builds the page that the README opens with,
    and runs the two commands of its start.
    """
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    start = (ROOT / "README.md").read_text(encoding="utf-8").split("## Start")[1].split("##")[0]
    commands = [
        line.strip() for line in start.splitlines() if line.startswith("    python3 tasks.py")
    ][:2]
    assert len(commands) == 2 and all(command in script for command in commands)
    (unset,) = [
        line.split("#")[0].split() for line in script.splitlines() if line.startswith("unset ")
    ]
    assert {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"} <= set(unset), (
        "a reader's machine does not set them"
    )
    assert script.count("apt-get install") == 1
    named = re.findall(r"missing\+=\(([a-z0-9 -]+)\)", script)
    assert named == ["python3-venv", "chromium chromium-driver", "nodejs", "npm"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "`python3 tasks.py web`" in readme and "python3 tasks.py web " in script
    for package in " ".join(named).split():
        assert any(package in line for line in start.splitlines() if "`apt install" in line)
