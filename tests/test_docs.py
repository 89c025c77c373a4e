"""The README is true: its code runs, its tables are those of the code, and every option and verb is in it or in --help."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from probe import cli, experiment, noising

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def between(marker: str, text: str = README) -> str:
    found = re.search(rf"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", text, re.S)
    assert found, f"README.md has no part between <!-- {marker} --> and <!-- /{marker} -->"
    return found[1].strip()


@pytest.mark.parametrize(("marker", "table"), [("fields", experiment.table), ("noising", noising.table)])
def test_tables_are_those_of_the_code(marker: str, table: object) -> None:
    printed = {"fields": "-m probe.experiment", "noising": "-c 'from probe import noising; print(noising.table())'"}
    assert between(marker) == table(), f"paste the output of python {printed[marker]} between the markers"  # type: ignore[operator]


def test_the_comparison_can_fail() -> None:
    assert between("fields").replace("steps", "stepss") != experiment.table()


def docs_make() -> ModuleType:
    """docs/make.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("document", ["format.md"])
def test_generated_parts_of_a_document_are_those_of_the_code(document: str) -> None:
    make = docs_make()
    text = (ROOT / "docs" / document).read_text()
    assert make.made(document, text) == text, "run python docs/make.py"
    assert document in make.PARTS and make.PARTS.keys() == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_a_document_that_is_out_of_date_is_found() -> None:
    make, text = docs_make(), (ROOT / "docs" / "format.md").read_text()
    assert make.made("format.md", text.replace("| `/sigma` |", "| `/sgima` |")) == text
    with pytest.raises(ValueError, match="needs the markers <!-- schema -->"):
        make.made("format.md", text.replace("<!-- schema -->", ""))


def test_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert list((tmp_path / "runs").glob("*.zarr"))


def test_verbs_are_documented() -> None:
    for verb in cli.VERBS:
        assert f"probe {verb}" in (cli.__doc__ or ""), verb
        assert f"probe {verb}" in README or f"probe.{verb}" in README or verb == "rm", verb


def test_files_named_exist() -> None:
    for path in re.findall(r"(?:experiments|tests|probe|docs)/[\w./-]+\.(?:yaml|py|md|png)", README):
        assert (ROOT / path).exists(), path


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == project["version"] and citation["authors"] == project["authors"]
    assert citation["license"] in project["license"].split(" AND ") and citation["keywords"] == project["keywords"]


def test_what_contributing_names_is_there() -> None:
    text, tasks = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "tasks.py").read_text()
    commands = re.findall(r"^    python3 tasks.py (\w+)(?: (--\w+))?", text, re.M)
    assert {name for name, _ in commands} == {"test", "check", "release"}
    for name, option in commands:
        assert f"python3 tasks.py {name} {option}".rstrip() in tasks and f"def {name}(" in tasks
    for path in re.findall(r"`([\w/]+\.(?:py|md|toml|txt))`", text):
        assert (ROOT / path).exists(), path


def test_the_map_of_modules_is_whole() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    for module in (ROOT / "probe").rglob("*.py"):
        if not module.name.startswith("__"):
            name = module.relative_to(ROOT / "probe").with_suffix("").as_posix()
            assert f"| `{name}` |" in architecture or name in ("cli", "run", "noising", "verify"), name
