"""A remedy names only options, commands, modules and fields that exist.

All strings in the code that can reach a person are read, also those that no test happens to see.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe import cli, errors
from probe.settings import experiment
from probe.settings.capture import CaptureOptions
from probe.settings.cost import Cost
from probe.settings.edits import EDIT_KINDS
from probe.settings.experiment import Experiment
from probe.settings.noising import Noising
from probe.terminal import guarded
from tasks import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "probe").rglob("*.py")), ROOT / "tasks.py"]
FOREIGN = re.compile(
    r"\b(pip|cp|chmod|ulimit|apt install|uv|git|ruff|pytest|mypy)\b[^.;]*"
)  # what other programs' options stand behind
ERRORS = {
    name
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.ProbeError)
}
OF_EDITS = {name for kind in EDIT_KINDS.values() for name in kind.model_fields}
FIELDS = {
    *Experiment.model_fields,
    *Noising.model_fields,
    *Cost.model_fields,
    *CaptureOptions.model_fields,
    *OF_EDITS,
}
VALUES = (
    "cut|fp16|cond|queries|maps|summary|off|sqrt_u8|float16|float32|none|true|false|record|default"
    "|auto|cpu|fixed"
)
SETTING = re.compile(
    rf"(?:set|use|with|write|or|and) ((?:capture\.)?[a-z_]+): (?:{VALUES})\b", re.I
)


def literal(node: ast.expr) -> str:
    """The text of a string, with {} where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
        )  # type: ignore[misc]
    if isinstance(node, ast.BinOp | ast.IfExp | ast.BoolOp):
        return " ".join(
            literal(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)
        )
    return ""


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        statement = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if statement:
            inside.add(id(node.value))  # type: ignore[attr-defined]
        elif (
            isinstance(node, ast.Constant | ast.JoinedStr)
            and id(node) not in inside
            and (text := literal(node))
        ):
            yield node.lineno, text


def messages(path: Path) -> Iterator[tuple[int, str, str]]:
    """Cause and remedy of every error of ours that a module makes from plain text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and (
            name := getattr(node.func, "id", getattr(node.func, "attr", ""))
        ) in {*ERRORS, "fail", "stop", "refuse"}:
            parts = [literal(argument) for argument in node.args]
            if name == "refuse":
                parts = ["", *parts[1:]]
            cause, remedy = [*parts, "", ""][:2]
            yield node.lineno, cause, remedy


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """What each verb takes, as its --help says it."""
    found: dict[str, set[str]] = {}
    for verb in cli.VERBS:
        spoken: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("probe.terminal.say", lambda *lines, spoken=spoken: spoken.extend(lines))
            with pytest.raises(SystemExit):
                guarded(cli.dispatch, [verb, "--help"])
        found[verb] = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", "\n".join(spoken))) | {"--debug"}
    assert (
        {"--resume", "--capture.layers"} <= found["run"]
        and "--yes" in found["rm"]
        and "--yes" not in found["run"]
    )
    return found


def wrong_names(text: str, options: dict[str, set[str]]) -> list[str]:
    """What a text names and is not there."""
    text = FOREIGN.sub("", text)
    every = set().union(
        *options.values(), {"--version", "--help", "--all", "--no-tests", "--check"}
    )
    found = [
        name
        for name in re.findall(r"(?<![\w{}-])--[a-z][\w.-]*", text)
        if name.rstrip(".") not in every
    ]
    for verb, rest in re.findall(r"\bprobe ([a-z]+)\b([^.;,)]*)", text):
        if verb not in options and re.search(rf"(?:: |`|^|\(|Run |run )probe {verb}\b", text):
            found.append(f"probe {verb}")
        found += [
            f"probe {verb} {name}"
            for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)
            if verb in options and name not in options[verb]
        ]
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        if importlib.util.find_spec(module.rstrip(".")) is None:
            found.append(module)
    found += [
        f"tasks.py {word}"
        for word in re.findall(r"python3? tasks\.py ([a-z]+)", text)
        if word not in COMMANDS
    ]
    found += [
        name
        for name in re.findall(r"\bcapture\.([a-z_]+)", text)
        if name not in CaptureOptions.model_fields
    ]
    found += [
        name
        for name in SETTING.findall(text)
        if name.removeprefix("capture.") not in FIELDS and not of_a_scheduler(name)
    ]
    return found


def of_a_scheduler(name: str) -> bool:
    """Whether some scheduler of diffusers has a setting of that name, by its source: importing it
    takes seconds.
    """
    spec = importlib.util.find_spec("diffusers")
    assert spec and spec.origin
    files = (Path(spec.origin).parent / "schedulers").glob("scheduling_*.py")
    return any(
        re.search(rf"^        {name}: ", file.read_text(encoding="utf-8"), re.MULTILINE)
        for file in files
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_message_names_is_there(path: Path, options: dict[str, set[str]]) -> None:
    findings = [
        f"{path.name}:{line}: {name} in {text!r}"
        for line, text in strings(path)
        if " " in text
        for name in wrong_names(text, options)
    ]
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Give --ja to go on.", "--ja"),
        ("Look: probe lists", "probe lists"),
        ("Clear it: probe gc --yes", "probe gc --yes"),
        ("Run it with python -m probe.noise FILE.", "probe.noise"),
        ("python3 tasks.py install", "tasks.py install"),
        ("Set capture.attentions: queries.", "attentions"),
        ("Shorten it, or set overlong: cut.", "overlong"),
    ],
)
def test_the_search_can_fail(text: str, name: str, options: dict[str, set[str]]) -> None:
    assert name in wrong_names(text, options)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cause_and_remedy_are_a_line_each(path: Path) -> None:
    for line, cause, remedy in messages(path):
        assert "\n" not in cause + remedy, f"{path.name}:{line}"


def test_messages_are_found() -> None:
    assert sum(1 for path in SOURCES for _ in messages(path)) > 150 and experiment.table()
