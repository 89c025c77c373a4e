"""What users import and call: names that say what they do, and renamed names that warn.

A run's properties and methods follow one rule.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import pickle
import pkgutil
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import probe
from probe import cli, verify
from probe.errors import ExperimentError, RecordingNotFound
from probe.public import gone_in, warn_renamed
from probe.reading.recording import Run, open_run
from probe.testing.synthetic import NOT_PROVEN, synthetic_recording

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(synthetic_recording(tmp_path_factory.mktemp("api") / "cat.zarr", prompt="a red cat"))


# --- the listing ----------------------------------------------------------------------------------

API = runpy.run_path(str(ROOT / "docs" / "api.py"))
PACKAGES = [importlib.import_module(name) for name in API["PACKAGES"]]


def test_the_public_api_is_the_one_that_is_listed() -> None:
    listed, there = (ROOT / "docs" / "api.txt").read_text(encoding="utf-8"), API["listing"]()
    assert listed == there, "\n" + API["difference"](listed, there)


def test_a_change_is_shown_with_how_to_accept_it() -> None:
    before = API["listing"]()
    after = (
        before.replace("def resume(run: Run", "def go_on(run: Run")
        .replace("    --save FILE\n", "", 1)
        .replace("2: a req", "3: a req")
    )
    told = API["difference"](before, after)
    assert (
        "\n-def resume(run: Run" in told
        and "\n+def go_on(run: Run" in told
        and "python docs/make.py" in told
    )
    assert (
        "Gone: 2: a request that cannot be met, probe show --save, probe.resume. Keep the old name"
        in told
    )
    assert API["removed"](after, before + "class Other\n") == [
        "3: a request that cannot be met",
        "probe.go_on",
    ]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_names_are_those_that_dir_and_types_see(package: ModuleType) -> None:
    assert list(package.__all__) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None, name
    if hasattr(package, "_HOMES"):
        assert [name for name in dir(package) if name[0] != "_"] == package.__all__
        tree = ast.parse(Path(package.__file__ or "").read_text(encoding="utf-8"))
        (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
        imported = {
            alias.name: node.module
            for node in typed.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        modules = {
            name: f"{package.__name__}.{name}"
            for name in imported
            if imported[name] == package.__name__
        }
        assert {
            name: home for name, home in (imported | modules).items() if home != "typing"
        } == package._HOMES
        assert set(package._HOMES) == set(package.__all__)
    with pytest.raises(
        AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"
    ):
        _ = package.nothing


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_module_shadows_a_public_name(package: ModuleType) -> None:
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules, "the check looks at an empty folder"
    shadowed = {
        name
        for name in modules & set(package.__all__)
        if not isinstance(getattr(package, name), ModuleType)
    }
    assert shadowed == set()


def test_to_import_probe_costs_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import probe; dir(probe); "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["__future__", "probe"]


# --- renamed names --------------------------------------------------------------------------------


@pytest.mark.parametrize(("since", "gone"), [("0.1", "0.3"), ("0.9", "0.11"), ("2.0.1", "2.2")])
def test_an_old_name_works_for_two_minor_versions(since: str, gone: str) -> None:
    assert gone_in(since) == gone
    with pytest.warns(
        DeprecationWarning, match=f"^f was renamed in {since} and is gone in {gone}. Write g.$"
    ) as caught:
        warn_renamed("f", "g", since, level=1)
    assert caught[0].filename == __file__, "the line that has to change is blamed"


def test_a_renamed_name_of_the_package_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe._RENAMED, "find", ("open_run", "0.1"))
    with pytest.warns(
        DeprecationWarning,
        match=r"^probe\.find was renamed in 0\.1 and is gone in 0\.3\. Write probe\.open_run\.$",
    ) as caught:
        assert probe.find is open_run
    assert caught[0].filename == __file__ and "find" not in dir(probe)


def test_a_renamed_function_of_a_module_warns() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"Write probe\.testing\.synthetic_recording"
    ) as caught:
        assert probe.testing.synthetic.synthetic is probe.testing.synthetic_recording
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = probe.testing.synthetic.nothing


def versions_of_renamings(text: str) -> list[str]:
    """Since which versions a source warns."""
    calls = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warn_renamed"
    ]
    return [
        word.value.value
        for call in calls
        for word in call.keywords
        if word.arg == "since" and isinstance(word.value, ast.Constant)
    ]


def test_no_old_name_outlives_its_time() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "probe").rglob("*.py"))]
    since = [
        *(since for text in sources for since in versions_of_renamings(text)),
        *(since for _, since in probe._RENAMED.values()),
    ]
    assert (
        len(since) >= 3
        and [one for one in since if as_numbers(gone_in(one)) <= as_numbers(version)] == []
    )
    assert versions_of_renamings('warn_renamed("a", "b", since="0.1")') == ["0.1"] and as_numbers(
        "0.10"
    ) > as_numbers("0.9.1")


def as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def test_said_still_works(run: Run) -> None:
    with pytest.warns(DeprecationWarning, match=r"run\.attributes\.model\.dtype") as caught:
        assert run.said("model", "dtype") == run.attributes.model.dtype
    assert caught[0].filename == __file__


def test_words_are_text_and_their_maps_another_name(run: Run) -> None:
    assert run.words == ("a", "red", "cat") == tuple(run.word_maps()["word"].values)
    with pytest.warns(DeprecationWarning, match=r"run\.word_overview\(\)") as caught:
        assert run.words().identical(run.word_overview())
    assert caught[0].filename == __file__
    for copied in (copy.deepcopy(run.words), pickle.loads(pickle.dumps(run.words))):
        assert type(copied) is tuple and copied == run.words


@pytest.mark.parametrize(("gone", "there"), [("text", True), ("attention", True), ("/", False)])
def test_words_are_read_where_they_were_recorded(run: Run, gone: str, there: bool) -> None:
    less = Run(run.path)
    less.__dict__["tree"] = run.tree.drop_nodes(["text", "attention"] if gone == "/" else gone)
    if there:
        assert less.words == run.words
    else:
        with pytest.raises(RecordingNotFound, match="has no tokens of the cond branch"):
            _ = less.words


def test_a_property_takes_no_choice_and_a_method_computes_or_takes_one(run: Run) -> None:
    computed = {
        "overview",
        "word_overview",
        "summary",
        "counterfactual",
    }  # the last is what only some recordings have
    parts = {name: inspect.getattr_static(Run, name) for name in dir(Run) if name[0] != "_"}
    without = {
        name
        for name, part in parts.items()
        if inspect.isfunction(part) and len(inspect.signature(part).parameters) == 1
    }
    assert without == computed
    properties = {
        name
        for name, part in parts.items()
        if isinstance(part, property | functools.cached_property)
    }
    assert {
        "words",
        "latents",
        "status",
        "attributes",
        "grids",
        "images",
    } <= properties and "A property names" in (Run.__doc__ or "")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for name in properties - {"noising"}:  # of a noising alone, as `experiment` is of a generation
        getattr(Run(run.path), name)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


# --- verify and diff ------------------------------------------------------------------------------


def test_verify_and_diff_are_what_the_commands_print(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Run(synthetic_recording(tmp_path / "dog.zarr", prompt="a red dog"))
    found, compared = run.verify(), run.diff(other)
    assert verify.main([str(run.path)]) == bool(found.failed)
    assert capsys.readouterr().out == f"{found}\n"
    assert cli.dispatch(["diff", str(run.path), str(other.path)]) == 1
    assert capsys.readouterr().out == f"cat  and  dog\n{compared}\n"
    assert (
        not compared.same
        and "values" in str(compared)
        and "prompt: a red cat and a red dog" in compared.asked
    )
    assert run.diff(Run(run.path)).same
    with pytest.raises(ExperimentError, match="other is 'latest', which is no recording"):
        run.diff("latest")  # type: ignore[arg-type]


def test_a_verdict_is_the_worst(run: Run, tmp_path: Path) -> None:
    found = run.verify()
    assert len(found) == len(list(found)) and found.verdict == found.as_json()["verdict"] != "exact"
    assert {check.name for check in found.failed} <= set(NOT_PROVEN)
    damaged = Run(synthetic_recording(tmp_path / "cat.zarr"))
    (damaged.path / "picture.png").write_bytes(b"")
    (damaged.path / "latents" / "latents" / "zarr.json").write_bytes(b"")
    found = Run(damaged.path).verify()
    assert found.verdict == "failed" and str(found).splitlines()[-1].startswith("FAILED: ")


def test_without_torch_a_recording_is_verified_and_recording_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["torch"] = None
import probe
run = probe.open_run("sample")
unchecked = {check.name for check in run.verify() if "needs torch" in check.detail}
print(run.words, run.verify().verdict, run.diff(run).same, unchecked)
probe.record({})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.startswith("('An', 'astronaut', 'scuba', 'diving') within tolerance True {")
    assert done.stderr.endswith("\nprobe.record needs it: pip install 'diffusion-probe[record]'\n")


def test_a_run_that_verifies_loads_torch_only_then() -> None:
    code = (
        "import sys, probe; run = probe.open_run('sample'); print('torch' in sys.modules, "
        "'probe.proof.verdict' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
