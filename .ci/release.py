"""Check what would be released: build it, install it as a stranger would, and use it there.

    python3 tasks.py release --check                         every Python here, both versions
    python3 tasks.py release --check --python 3.12           one of them
    python3 tasks.py release --check --versions lowest       the lowest direct dependencies alone
    python3 tasks.py release --check --hold torch==2.13.0    one package at this version

A row of the table is an environment of its own. The wheel with its base dependencies reads the
sample. With the extra `record` it records, resumes and verifies, and has diffusers' bits on the
CPU. The sdist's wheel has the same files. Lowest: of every direct dependency the lowest version
that pyproject.toml allows and the index has as a wheel for that Python; what those need in turn is
the newest. Packages come from where pip's settings say.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MINORS = range(11, 15)  # Python 3.11 to 3.14
TOOLS = ("hypothesis", "pytest", "pytest-timeout")
COLUMNS = ("python", "versions", "wheel", "reads", "records", "parity", "sdist")


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tasks.py release --check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="3.N",
        help="only this Python; may be repeated",
    )
    parser.add_argument(
        "--versions", choices=("lowest", "latest"), help="only these direct dependencies [both]"
    )
    parser.add_argument(
        "--hold",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="keep a package at a version; may be repeated",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = options_of(arguments)
    pythons = {
        minor: path
        for minor, path in pythons_here().items()
        if not options.python or minor in options.python
    }
    sought = options.python or [f"3.{minor}" for minor in MINORS]
    missing = [minor for minor in sought if minor not in pythons]
    if not pythons:
        print(
            f"Not here: Python {', '.join(missing)}.\nInstall one of them, or name another with "
            "--python.",
            file=sys.stderr,
        )
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = Path(tempfile.mkdtemp(prefix="probe-release-"))
    wheel, sdist = build(folder)
    cells = []
    for minor, python in pythons.items():
        for versions in (options.versions,) if options.versions else ("lowest", "latest"):
            say(f"Python {minor}, {versions} dependencies")
            own = folder / f"{minor}-{versions}"
            cell = Cell(minor, versions, python, own, project, options.hold)
            cells.append(cell)
            cell.check(wheel, sdist)
            shutil.rmtree(cell.venv, ignore_errors=True)
    print(*table(cells), sep="\n")
    if missing:
        print(f"Not here, so not tried: Python {', '.join(missing)}.")
    failed = [cell for cell in cells if cell.failed]
    for cell in failed:
        print(
            f"Python {cell.minor}, {cell.versions}: {cell.failed} failed; its output is in "
            f"{cell.log}"
        )
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def pythons_here() -> dict[str, Path]:
    """Return the interpreters from 3.11, by version: those on the PATH, then pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    named = [shutil.which(f"python3.{minor}") for minor in MINORS]
    candidates = [Path(path) for path in named if path] + sorted(
        pyenv.glob("versions/*/bin/python")
    )
    found: dict[str, Path] = {}
    for path in candidates:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        except OSError:
            continue
        minor = done.stdout.strip()
        if done.returncode == 0 and minor in {f"3.{minor}" for minor in MINORS}:
            found.setdefault(minor, path)
    return dict(sorted(found.items()))


def build(folder: Path) -> tuple[Path, Path]:
    """Build both distributions; refuse a wheel with another top-level name than probe."""
    say("Building the wheel and the sdist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True
    )
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    names = {name.split("/")[0] for name in contents(wheel)}
    if names != {"probe"}:
        raise SystemExit(
            f"The wheel holds {', '.join(sorted(names))}, and not probe alone.\nSee "
            "tool.hatch.build in pyproject.toml."
        )
    return wheel, sdist


def contents(wheel: Path) -> dict[str, int]:
    """Return the CRC of every file of the package in a wheel."""
    with zipfile.ZipFile(wheel) as packed:
        return {
            entry.filename: entry.CRC
            for entry in packed.infolist()
            if ".dist-info/" not in entry.filename
        }


def lowest(requirements: Iterable[str], versions_of: Callable[[str], Iterable[str]]) -> list[str]:
    """Return a pin of the lowest version for each requirement that it allows and that the index
    has.

    `versions_of` returns the versions of a package. Raise ValueError where a requirement has no
    lower bound, or none fits.
    """
    pins = []
    for requirement in map(Requirement, requirements):
        if not any(bound.operator == ">=" for bound in requirement.specifier):
            raise ValueError(f"{requirement.name} has no lower bound in pyproject.toml.")
        fitting = [
            version
            for version in versions_of(requirement.name)
            if requirement.specifier.contains(version)
        ]
        if not fitting:
            raise ValueError(f"The index has no wheel that fits {requirement}.")
        pins.append(f"{requirement.name}=={min(fitting, key=Version)}")
    return pins


@dataclass
class Cell:
    """One row: a Python and its versions of the direct dependencies."""

    minor: str
    versions: str
    base: Path
    folder: Path
    project: dict[str, Any]
    hold: list[str]
    results: dict[str, str] = field(default_factory=dict)
    failed: str = ""

    @property
    def venv(self) -> Path:
        return self.folder / "venv"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def check(self, wheel: Path, sdist: Path) -> None:
        """Go through the columns until one fails."""
        self.folder.mkdir()
        steps: dict[str, Callable[[], None]] = {
            "wheel": lambda: self.install(str(wheel)),
            "reads": self.reads,
            "records": lambda: self.records(wheel, sdist),
            "parity": self.parity,
            "sdist": lambda: self.same(wheel, sdist),
        }
        for name, step in steps.items():
            began = time.monotonic()
            try:
                step()
            except (subprocess.CalledProcessError, ValueError) as problem:
                self.write(str(problem))
                self.results[name], self.failed = "FAILED", name
                return
            finally:
                say(
                    f"  {name}: {self.results.get(name, 'passed')} after "
                    f"{time.monotonic() - began:.0f} s"
                )
            self.results[name] = f"{time.monotonic() - began:.0f} s"

    def install(self, wheel: str) -> None:
        subprocess.run([self.base, "-m", "venv", self.venv], check=True)
        self.pip("install", "--upgrade", "pip")
        asked = [*self.requirements(), *self.extra("record")]
        if self.versions == "lowest":
            held = {Requirement(line).name for line in self.hold}
            pins = lowest(
                [line for line in asked if Requirement(line).name not in held], self.on_the_index
            )
        else:
            pins = []
        (self.folder / "pins.txt").write_text("\n".join([*pins, *self.hold]) + "\n")
        self.pip("install", "-c", str(self.folder / "pins.txt"), wheel)

    def reads(self) -> None:
        absent = (
            "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'diffusers', "
            "'tqdm', 'streamlit')))"
        )
        self.call("python", "-c", absent)
        for words in (["show"], ["show", "--words", "--save", "words.png"], ["verify"]):
            self.call("probe", words[0], "sample", *words[1:])

    def records(self, wheel: Path, sdist: Path) -> None:
        tools = [line for line in self.extra("test") if Requirement(line).name in TOOLS]
        self.pip("install", "-c", str(self.folder / "pins.txt"), f"{wheel}[record]", *tools)
        self.pip("check")
        with tarfile.open(
            sdist
        ) as packed:  # tests and pytest's settings; the package is the installed one
            packed.extractall(self.folder, filter="data")
        (source,) = self.folder.glob("*/pyproject.toml")
        source.rename(self.folder / source.name)
        (source.parent / "tests").rename(self.folder / "tests")
        self.tests("tests/test_smoke.py")

    def parity(self) -> None:
        self.tests("tests/test_parity.py")

    def tests(self, file: str) -> None:
        """Run tests.

        Warnings of other versions are no failures here; the check with constraints.txt judges them.
        """
        self.call("python", "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", file)

    def same(self, wheel: Path, sdist: Path) -> None:
        """Build a wheel out of the sdist, as pip does, and compare their files."""
        self.pip("wheel", "--no-deps", "-w", str(self.folder), str(sdist))
        (other,) = self.folder.glob("*.whl")
        if contents(other) != contents(wheel):
            raise ValueError("The sdist's wheel has other files than the wheel.")
        self.pip("install", "--no-deps", "--force-reinstall", str(other))
        self.call("probe", "verify", "sample")

    def requirements(self) -> list[str]:
        return list(self.project["dependencies"])

    def extra(self, name: str) -> list[str]:
        return list(self.project["optional-dependencies"][name])

    def on_the_index(self, name: str) -> list[str]:
        """Return the versions of a package that have a wheel for this Python."""
        listed = self.pip("index", "versions", "--only-binary=:all:", name)
        found = re.search(r"^\s*Available versions: (.+)$", listed, re.M)
        return found[1].split(", ") if found else []

    def pip(self, *arguments: str) -> str:
        return self.call("python", "-m", "pip", "--disable-pip-version-check", *arguments)

    def call(self, program: str, *arguments: str) -> str:
        """Run a program of the environment, far from the checkout.

        Raise CalledProcessError if it fails.
        """
        settings = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
        }
        settings["XDG_CACHE_HOME"] = str(self.folder / "cache")
        command = [str(self.venv / "bin" / program), *arguments]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.write(f"$ {' '.join(command)}\n{done.stdout}")
        done.check_returncode()
        return done.stdout

    def write(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def table(cells: Iterable[Cell]) -> list[str]:
    rows = [
        COLUMNS,
        *(
            (cell.minor, cell.versions, *(cell.results.get(name, "-") for name in COLUMNS[2:]))
            for cell in cells
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def say(what: str) -> None:
    print("== " + what, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
