"""tasks.py installs into its own environment alone, whatever pip and Python were told before, and says what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "tasks.py"

# A checkout with nothing to download: its build backend lies beside it, and `probe.run` says where it runs.
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
        about + "METADATA": "Metadata-Version: 2.1\\nName: diffusion-probe\\nVersion: 1\\nProvides-Extra: record\\n",
        about + "WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
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
    texts = {"pyproject.toml": PROJECT, "backend.py": BACKEND, "constraints.txt": "", "probe/__init__.py": ""}
    texts["probe/run.py"] = "import sys\nprint('ran', sys.argv[1:], 'in', sys.prefix)\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def call(tasks: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Call it with another Python of this machine, and without what this test run was told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PROBE_", "PYTHON"))}
    environment, command = {**kept, **changes}, [sys.executable, str(tasks), *arguments]
    return subprocess.run(command, env=environment, cwd=tasks.parent, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_nothing_is_installed_elsewhere(checkout: Path, tmp_path: Path) -> None:
    """The shell was set up for something else: packages would go to other folders, or nowhere."""
    elsewhere = tmp_path / "elsewhere"
    set_up = {"PIP_TARGET": str(elsewhere), "PIP_PREFIX": str(elsewhere), "PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_NO_DEPS": "1"}
    done = call(checkout / "tasks.py", "record", "some.yaml", PYTHONPATH=os.pathsep.join(sys.path), **set_up)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ran ['some.yaml'] in {checkout / '.venv'}" in done.stdout and not elsewhere.exists()
    again = call(checkout / "tasks.py", "record")
    assert again.stdout == f"ran [] in {checkout / '.venv'}\n"  # nothing is left to install


@pytest.mark.slow
def test_an_environment_without_the_package_is_not_called_finished(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[install]\ndry-run = true\n")
    for _ in range(2):
        done = call(checkout / "tasks.py", "record", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
        assert done.returncode == 1 and "ran" not in done.stdout.split()
        assert done.stderr.endswith(
            f"pip ended well, but {checkout / '.venv'} lacks diffusion-probe.\n"
            "Remove target, prefix, root, dry-run and no-deps from pip's settings (see `pip config list`), then call again.\n"
        )
    (tmp_path / "pip.conf").write_text("")
    assert call(checkout / "tasks.py", "record", PIP_CONFIG_FILE=str(tmp_path / "pip.conf")).returncode == 0


def test_a_python_that_makes_no_environments_names_the_package(checkout: Path) -> None:
    code = "import runpy, sys; sys.modules['ensurepip'] = None; sys.argv = [sys.argv[1], 'record']; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(checkout / "tasks.py")], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and not (checkout / ".venv").exists()
    assert done.stderr == (
        "This Python cannot make environments: its venv or ensurepip module is missing.\n"
        f"On Debian or Ubuntu: apt install python3-venv. Or, with uv: uv venv --seed '{checkout / '.venv'}'. Then call again.\n"
    )
    assert "apt install python3-venv" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_is_something_else_is_left_alone(checkout: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    (other / "mine.txt").write_text("mine")
    done = call(checkout / "tasks.py", "record", PROBE_VENV=str(other))
    assert done.returncode == 1 and [file.name for file in other.iterdir()] == ["mine.txt"]
    assert done.stderr == f"{other} exists and is not a Python environment.\nName an empty or a new folder with PROBE_VENV.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reccord"], "tasks.py has no 'reccord'.\nDid you mean 'record'?\n"),
        (["check", "--fast"], "check takes --all, --no-tests or nothing, not ['--fast'].\nTo run some tests only: python3 tasks.py test <"),
    ],
)
def test_a_mistake_in_the_call_is_said_before_anything_is_made(checkout: Path, arguments: list[str], said: str) -> None:
    done = call(checkout / "tasks.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith(said) and not (checkout / ".venv").exists()


def test_ci_does_what_the_readme_says() -> None:
    """.ci/run installs one package, which the README names, and runs the README's two commands."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    start = (ROOT / "README.md").read_text(encoding="utf-8").split("## Start")[1].split("##")[0]
    commands = [line.strip() for line in start.splitlines() if line.startswith("    python3 tasks.py")][:2]
    assert len(commands) == 2 and all(command in script for command in commands)
    (installed,) = [line.split() for line in script.splitlines() if "apt-get install" in line]
    named = [word for word in installed[2:] if not word.startswith("-")]
    assert named == ["python3-venv"] and f"apt install {named[0]}" in start
