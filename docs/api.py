#!/usr/bin/env python3
"""Print the public API, which docs/api.txt holds: names, signatures, options, exit codes.

python docs/api.py              print it
python docs/make.py             write it, with the other documents

Signatures are read from the source: nothing heavy is imported, and every Python writes the same.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

from probe import cli, errors
from probe.terminal import Parser

HEAD = """\
# What probe promises: a change of these lines is a change of the public API.
# Made by docs/make.py; a test compares it. A name that goes keeps working for two minor versions,
# and warns (probe/public.py). A new name, or a new argument with a default, breaks nobody."""
PACKAGES = ("probe", "probe.analysis", "probe.testing")


def listing() -> str:
    """Return the public API as text, one promise a line."""
    parts = [HEAD]
    for package in PACKAGES:
        names = importlib.import_module(package).__all__
        parts += [f"\n[{package}]", *(line for name in names for line in described(package, name))]
    parts += ["\n[commands]", *(line for verb in cli.VERBS for line in command(verb))]
    parts += ["\n[exit codes]", *exit_codes()]
    return "\n".join(parts) + "\n"


def names_of(text: str) -> set[str]:
    """Return each name, member, command and option of a listing, under what it belongs to."""
    found, section, above = set[str](), "", ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line
        elif line.startswith("    "):
            word = line.strip().removeprefix("def ")
            found.add(f"{above} {re.split('[(: ,]', word)[0]}")
        elif line and line[0] != "#":
            whole = section == "[commands]"
            kind = re.match(r"(?:class|def|module) (\w+)", line)
            above = line if whole or kind is None else f"{section[1:-1]}.{kind[1]}"
            found.add(above)
    return found


def removed(old: str, new: str) -> list[str]:
    """Return what one listing has and the next lacks."""
    return sorted(names_of(old) - names_of(new))


def difference(old: str, new: str) -> str:
    """Return what a change does to the listing, and how to accept it."""
    names = ("docs/api.txt", "the code")
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="", n=1)
    accept = "To accept it: python docs/make.py, and a line in CHANGELOG.md."
    told = [*lines, accept]
    if gone := removed(old, new):
        remedy = "Keep the old name for two minor versions: probe/public.py."
        told.append(f"Gone: {', '.join(gone)}. {remedy}")
    return "\n".join(told)


# --- names -------------------------------------------------------------------------------------


@functools.cache
def source_of(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def home_of(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Return where a name of `module` is defined, and its definition: None for a module itself."""
    spec = importlib.util.find_spec(module)
    package = spec is not None and spec.submodule_search_locations is not None
    if package and importlib.util.find_spec(f"{module}.{name}") is not None:
        return f"{module}.{name}", None
    for node in ast.walk(source_of(module)):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return home_of(str(node.module), name)
    for node in source_of(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return module, node
    raise LookupError(f"{module} has no {name}")


def described(package: str, name: str) -> Iterator[str]:
    """Yield a name's line, and those of a class's members."""
    module, node = home_of(package, name)
    if node is None:
        yield f"module {name}"
    elif isinstance(node, ast.FunctionDef):
        yield f"def {signature(node)}"
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        code = f": exit code {getattr(errors, name).exit_code}" if module == errors.__name__ else ""
        yield f"class {name}({bases}){code}" if bases else f"class {name}{code}"
        yield from (f"    {line}" for line in dict.fromkeys(members(module, node)))


def members(module: str, node: ast.ClassDef) -> Iterator[str]:
    """Yield fields, properties and methods of a class, its bases' first."""
    for base in node.bases:
        if isinstance(base, ast.Name):
            try:
                home, of = home_of(module, base.id)
            except (LookupError, ModuleNotFoundError):
                continue  # a builtin, or another library's
            if isinstance(of, ast.ClassDef) and home.startswith("probe."):
                yield from members(home, of)
    for part in node.body:
        match part:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind) if name[0] != "_":
                yield f"{name}: {ast.unparse(kind)}{default(part.value)}"
            case ast.FunctionDef(name=name) if name[0] != "_" or name == "__init__":
                decorators = {ast.unparse(one).split(".")[-1] for one in part.decorator_list}
                if decorators & {"property", "cached_property"}:
                    yield f"{name}: {ast.unparse(part.returns) if part.returns else 'Any'}"
                else:
                    yield f"def {signature(part)}{renamed(part)}"


def default(value: ast.expr | None) -> str:
    """Return a field's default as source; pydantic's `Field` holds it in its arguments."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {word.arg: word.value for word in value.keywords}
        first = value.args[0] if value.args else None
        value = given.get("default", given.get("default_factory", first))
    return "" if value is None else f" = {ast.unparse(value)}"


def signature(node: ast.FunctionDef) -> str:
    arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def renamed(node: ast.FunctionDef) -> str:
    """Return a note for an old name that warns."""
    return "  # renamed: warns" if "warn_renamed(" in ast.unparse(node) else ""


# --- commands ----------------------------------------------------------------------------------


class _Found(Exception):
    """A command's parser, before it parses."""


def parser_of(verb: str) -> ArgumentParser:
    def stop(self: Parser, *_: object) -> NoReturn:
        raise _Found(self)

    with mock.patch.object(Parser, "parse_args", stop):
        try:
            cli.VERBS[verb]([])
        except _Found as found:
            return found.args[0]  # type: ignore[no-any-return]
    raise LookupError(f"probe {verb} parses nothing")


def command(verb: str) -> Iterator[str]:
    """Yield a command, its arguments and its options."""
    yield f"probe {verb}"
    for action in parser_of(verb)._actions:
        if "--help" not in action.option_strings:
            yield f"    {option(action)}"


def option(action: Action) -> str:
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    value = str(action.metavar or action.dest.upper())
    value = {"?": f"[{value}]", "+": f"{value} ..."}.get(str(action.nargs), value)
    return f"{names} {value}".strip()


def exit_codes() -> list[str]:
    """Return the sentence of `probe --help` about them, one a line."""
    found = re.search(r"Exit codes: (.*?)\.\s*$", cli.__doc__ or "", re.S)
    assert found is not None, "probe/cli.py says nothing of exit codes"
    codes = re.findall(r"(\d+) (.*?)(?=, \d+ |$)", " ".join(found[1].split()))
    return [f"{code}: {meaning}" for code, meaning in codes]


if __name__ == "__main__":
    print(listing(), end="")
