"""The README and docs/ are true: their code runs, and their tables are the code's own."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from probe import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
DOCUMENTS = README + "".join(PAGES.values())


def docs_make() -> ModuleType:
    """docs/make.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("edits", "experiment", "format", "grids", "pixels")


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{name}.md" for name in NAMES)])
def test_generated_parts_of_a_document_are_those_of_the_code(document: str) -> None:
    make = docs_make()
    text = (ROOT / document).read_text()
    assert make.made(document, text) == text, "run python docs/make.py"
    assert set(re.findall(r"<!-- (\w+) -->", text)) == make.PARTS[document].keys()


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 150
    for name in PAGES:
        assert f"(docs/{name})" in README, name
    for name, page in {
        "README.md": README,
        **{f"docs/{name}": page for name, page in PAGES.items()},
    }.items():
        for target in re.findall(r"\]\(([\w./-]+)\)", page):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_a_document_that_is_out_of_date_is_found() -> None:
    make, text = docs_make(), (ROOT / "docs" / "format.md").read_text()
    assert make.made("docs/format.md", text.replace("| `/sigma` |", "| `/sgima` |")) == text
    with pytest.raises(ValueError, match="needs the markers <!-- schema -->"):
        make.made("docs/format.md", text.replace("<!-- schema -->", ""))


def test_code_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for name, text in {
        "README.md": README,
        **PAGES,
    }.items():  # a page goes on where the README ended
        blocks = re.findall(r"```python\n(.*?)```", text, re.S)
        assert len(blocks) >= {"README.md": 2, "attention.md": 1}.get(name, 0)
        for block in blocks:
            exec(compile(block, name, "exec"), names)
    assert list((tmp_path / "runs").glob("*.zarr"))


def test_verbs_are_documented() -> None:
    for verb in cli.VERBS:
        assert f"probe {verb}" in (cli.__doc__ or ""), verb
        assert f"probe {verb}" in DOCUMENTS or f"probe.{verb}" in DOCUMENTS, verb


def test_files_named_exist() -> None:
    for path in re.findall(
        r"(?:experiments|tests|probe|docs)/[\w./-]+\.(?:yaml|py|md|png)", DOCUMENTS
    ):
        assert (ROOT / path).exists(), path


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == project["version"] and citation["authors"] == project["authors"]
    assert (
        citation["license"] in project["license"].split(" AND ")
        and citation["keywords"] == project["keywords"]
    )


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
            assert f"| `{name}` |" in architecture or name in ("cli", "run", "noising", "verify"), (
                name
            )
