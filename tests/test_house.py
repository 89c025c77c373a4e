"""The rules of this house that a program can check: imports, what stays out, how long a module is.

Each rule is a function from a source tree to its findings, `path:line: what`. Each is used twice:
on this checkout, where it must find nothing, and on a small tree made to break it, where it must
find that. A check that cannot fail checks nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500  # of a module of probe
MAX_LINES_OF_A_FUNCTION = 60

# The order of the layers, from the bottom up. A module may import from the lines above its own line
# in this table, and from nothing else in probe. Modules on one line do not know each other.
LAYERS = [
    # below the torch line: what reads recordings, and what a viewer needs
    (
        "probe.errors",
        "probe.public",
        "probe.conversions",
        "probe.text",
        "probe.words",
        "probe.stopping",
    ),
    (
        "probe.format",
        "probe.settings",
        "probe.writing",
        "probe.reading",
        "probe.figures",
        "probe.proof",
        "probe.studies",
        "probe.testing",
    ),  # their docstrings
    ("probe.settings.strict_yaml",),
    ("probe.system", "probe.output"),
    ("probe.reading.files",),
    ("probe.reading.archives",),
    ("probe.format.variables", "probe.format.attributes"),
    ("probe.format.schema",),
    ("probe.format.dimensions", "probe.format.embedding", "probe.format.study"),
    ("probe.settings.fields",),
    ("probe.settings.pictures", "probe.settings.bundled", "probe.arguments"),
    ("probe.settings.capture", "probe.settings.edits"),
    ("probe.settings.edit_sentences",),
    ("probe.settings.recipe", "probe.settings.loading"),
    ("probe.settings.experiment",),
    ("probe.settings.axes", "probe.settings.noising", "probe.settings.cost"),
    ("probe.settings.grid",),
    ("probe.writing.background", "probe.writing.files"),
    ("probe.writing.digests", "probe.writing.locks"),
    ("probe.writing.chunks",),
    ("probe.writing.layout",),
    ("probe.writing.store",),
    ("probe.writing.upkeep",),
    ("probe.writing.embedding",),
    ("probe.analysis.maps", "probe.reading.sample"),
    (
        "probe.analysis.recomputed",
        "probe.analysis.averages",
        "probe.analysis.heads",
        "probe.analysis.guidance",
        "probe.analysis.masks",
        "probe.analysis.trajectories",
        "probe.analysis.pictures",
        "probe.analysis.fits",
    ),
    ("probe.analysis",),
    ("probe.reading.untrusted",),
    (
        "probe.reading.shards",
        "probe.reading.limits",
        "probe.reading.listing",
        "probe.reading.choice",
        "probe.reading.edited",
    ),
    (
        "probe.reading.lazy",
        "probe.reading.attention",
        "probe.reading.latents",
        "probe.reading.finding",
    ),
    ("probe.reading.memory",),
    ("probe.reading.embedding",),
    ("probe.reading.recording",),
    ("probe.reading.trajectories", "probe.reading.distances", "probe.reading.pixels"),
    ("probe.reading.apart",),
    ("probe.studies.measures", "probe.reading.study"),
    ("probe.reading.study_dataset",),
    ("probe.figures.drawing", "probe.figures.payload", "probe.figures.following"),
    ("probe.figures.channels",),
    (
        "probe.figures.sheets",
        "probe.figures.word_sheet",
        "probe.terminal",
        "probe.reading.compare",
        "probe.proof.checks",
    ),
    ("probe.figures.bundle", "probe.reading.pair"),
    ("probe.figures.page", "probe.figures.animation", "probe.figures.grid"),
    ("probe.figures.grid_page",),
    ("probe.figures.plots", "probe.figures.guidance", "probe.figures.anatomy"),
    (
        "probe.figures.anatomy_page",
        "probe.figures.trajectories",
        "probe.figures.distance",
        "probe.figures.grid_plot",
        "probe.figures.pixels_looks",
    ),
    ("probe.figures.pixels", "probe.figures.pixels_trained"),
    ("probe.figures.pixels_tables",),
    ("probe.figures.pixels_page",),
    (
        "probe.figures.notebook",
        "probe.figures.noising_sheet",
        "probe.proof.map_checks",
        "probe.proof.schema_checks",
        "probe.proof.label_checks",
        "probe.proof.unknown",
    ),
    ("probe.testing.synthetic",),
    ("probe",),  # probe/__init__.py: the public reading API
    # ================= the torch line =================
    ("probe.diffusion", "probe.watching", "probe.editing", "probe.running"),  # their docstrings
    ("probe.watching.hooks",),
    (
        "probe.diffusion.prompts",
        "probe.diffusion.support",
        "probe.diffusion.model_configs",
        "probe.diffusion.model_files",
    ),
    (
        "probe.diffusion.schedulers",
        "probe.diffusion.tokenizers",
        "probe.diffusion.single_file",
        "probe.diffusion.tensor_file",
        "probe.diffusion.guidance",
    ),
    (
        "probe.diffusion.defaults",
        "probe.diffusion.streams",
        "probe.diffusion.draws",
        "probe.diffusion.schedule",
    ),
    ("probe.diffusion.family",),
    ("probe.diffusion.parts", "probe.diffusion.text", "probe.diffusion.weights"),
    ("probe.diffusion.loras", "probe.diffusion.embeds"),
    ("probe.diffusion.sd", "probe.diffusion.sdxl"),
    ("probe.diffusion.families", "probe.diffusion.known_configs", "probe.diffusion.variants"),
    ("probe.diffusion.loading", "probe.diffusion.preparing"),
    ("probe.watching.conditions", "probe.watching.measures", "probe.watching.kept"),
    ("probe.watching.rehearsal",),
    ("probe.watching.counting",),
    ("probe.watching.timing",),
    ("probe.watching.selection",),
    ("probe.diffusion.sampling",),
    ("probe.diffusion.scheduler_trial",),
    ("probe.diffusion.schedule_check", "probe.diffusion.start"),
    ("probe.watching.interface",),
    (
        "probe.watching.projections",
        "probe.watching.labels",
        "probe.watching.source",
        "probe.watching.together",
    ),
    (
        "probe.watching.cross_attention",
        "probe.watching.queries",
        "probe.watching.self_attention",
    ),  # the captures
    (
        "probe.watching.head_summary",
        "probe.watching.text_side",
        "probe.watching.text_encoder",
        "probe.watching.outputs",
    ),
    (
        "probe.watching.latents",
        "probe.watching.decoded",
        "probe.watching.counterfactual",
        "probe.watching.sums",
        "probe.watching.cost",
    ),
    ("probe.editing.values", "probe.editing.noise", "probe.editing.targets"),
    ("probe.editing.text",),
    ("probe.editing.donors",),
    ("probe.editing.attention", "probe.editing.modules"),
    ("probe.editing.editing",),
    ("probe.running.planning",),
    ("probe.running.graphs", "probe.running.transfer"),
    ("probe.running.device_memory",),
    ("probe.running.session", "probe.running.description"),
    ("probe.running.perform",),
    ("probe.running.continuing", "probe.running.model"),
    ("probe.running.recorder", "probe.running.ask"),
    ("probe.proof.replay",),
    ("probe.proof.forward_checks",),
    ("probe.proof.attention_witness", "probe.proof.compared_store"),
    ("probe.proof.repredict",),
    ("probe.studies.models",),
    ("probe.studies.cells",),
    ("probe.studies.results",),
    ("probe.studies.survey",),
    ("probe.studies.compute",),
    ("probe.studies.workers", "probe.studies.cluster"),
    ("probe.studies.study",),
    # ================= the doors: torch only inside functions =================
    ("probe.proof.verdict",),
    ("probe.run", "probe.verify", "probe.view", "probe.export", "probe.embed", "probe.diff"),
    ("probe.web",),
    ("probe.upgrade", "probe.testing.conformance"),
    ("probe.noising", "probe.sweep", "probe.cost"),
    ("probe.cli",),
    ("probe.__main__",),
]
TORCH_LINE = "probe"  # the topmost line without torch
DOORS = "probe.proof.verdict"  # the lowest line of the doors

# Two methods of a `Run` look up: users find them there. Nothing above is imported before they are
# called.
LOOKS_UP = {
    ("probe.reading.recording", "probe.reading.compare"),  # run.diff(other)
    ("probe.reading.recording", "probe.reading.pair"),  # run.against_parent()
    ("probe.reading.study", "probe.reading.study_dataset"),  # study.dataset, study.save(path)
    ("probe.reading.recording", "probe.proof.verdict"),  # run.verify()
    ("probe.reading.recording", "probe.figures.sheets"),  # run.save(path)
    ("probe.reading.recording", "probe.figures.noising_sheet"),  # of a noising
    ("probe.reading.recording", "probe.figures.notebook"),  # run.player()
}

# Some that could import downwards still must not know each other: (who, whom), packages from
# outside included.
STRANGERS = [
    ("probe.diffusion.sd", "probe.watching.hooks"),
    ("probe.diffusion.sampling", "probe.watching.hooks"),
    ("probe.diffusion.sampling", "probe.writing.store"),
    ("probe.watching.interface", "probe.writing.store"),
    ("probe.watching.interface", "zarr"),
    ("probe.watching.interface", "xarray"),
    ("probe.editing.editing", "probe.writing.store"),
    ("probe.dashboard.figures", "streamlit"),
    *(
        (f"probe.figures.{name}", "plotly")
        for name in ("guidance", "anatomy", "anatomy_page", "grid", "grid_page")
    ),
]
TORCH = ("torch", "diffusers", "transformers")
OUTSIDERS = ("experiments", "tests", "benchmarks", "tasks")  # probe imports none of them
# a room beside the layers: it reads what is below the torch line, and the doors may start it
DASHBOARD = "probe.dashboard"

REGISTERS = re.compile(r"register_\w*hook\w*")

RANK = {module: rank for rank, line in enumerate(LAYERS) for module in line}


When = Literal["at once", "in a function", "for types only"]


@dataclass(frozen=True)
class Import:
    """One import statement's target: a dotted name, its line, and when it runs."""

    name: str
    line: int
    when: When

    def is_from(self, package: str) -> bool:
        return within(package, self.name)


# --- reading source -------------------------------------------------------------------------------


def sources(root: Path, *packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted(
            path for path in (root / package).rglob("*.py") if "__pycache__" not in path.parts
        )


def within(package: str, module: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_of(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_of(root: Path, path: Path) -> list[Import]:
    """Every import at any depth, as full dotted names; `from probe import x` is probe.x where that
    is a module.
    """
    package = module_of(root, path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def is_module(name: str) -> bool:
        place = root.joinpath(*name.split("."))
        return name in RANK or place.with_suffix(".py").exists() or place.is_dir()

    found: dict[Import, None] = {}  # in order, each once

    def visit(node: ast.AST, when: When) -> None:
        match node:
            case ast.Import(names=names):
                found.update({Import(alias.name, node.lineno, when): None for alias in names})
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package[: len(package) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                for alias in names:
                    full = f"{base}.{alias.name}"
                    found[Import(full if is_module(full) else base, node.lineno, when)] = None
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found[Import(name, node.lineno, when)] = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            when = "in a function"
        typed: list[ast.stmt] = []
        if isinstance(node, ast.If):
            condition = ast.unparse(node.test)
            typed = node.body if condition in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else []
        for child in ast.iter_child_nodes(node):
            visit(child, "for types only" if child in typed else when)

    visit(parse(path), "at once")
    return list(found)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def at(root: Path, path: Path, line: int = 1) -> str:
    return f"{path.relative_to(root).as_posix()}:{line}"


# --- the rules ------------------------------------------------------------------------------------


def imports_that_point_up(root: Path) -> list[str]:
    findings = []
    for path in sources(root, "probe"):
        module = module_of(root, path)
        if within(DASHBOARD, module):
            continue  # judged below
        if module not in RANK:
            findings.append(
                f"{at(root, path)}: {module} has no place among the layers: add it to LAYERS in "
                "tests/test_house.py"
            )
            continue
        for target in imports_of(root, path):
            where = f"{at(root, path, target.line)}: {module} imports {target.name}"
            if any(target.is_from(outsider) for outsider in OUTSIDERS):
                findings.append(f"{where}, which is outside of probe")
            if target.is_from(DASHBOARD):
                if RANK[module] < RANK[DOORS]:
                    findings.append(f"{where}: only a door starts the dashboard")
                continue
            # a public package names, for types, what it imports when it is first used
            named = module in ("probe", "probe.testing") and target.when == "for types only"
            if named or not target.is_from("probe"):
                continue
            if target.name not in RANK:
                findings.append(
                    f"{where}, which has no place among the layers: add it to LAYERS in "
                    "tests/test_house.py"
                )
            elif (module, target.name) in LOOKS_UP and target.when != "at once":
                continue
            elif target.name != module and RANK[target.name] >= RANK[module]:
                findings.append(f"{where}: imports point down only (LAYERS in tests/test_house.py)")
    return findings + [
        f"{at(root, path, target.line)}: the dashboard imports {target.name}, which is above the "
        "torch line"
        for path in sources(root, "probe/dashboard")
        for target in imports_of(root, path)
        if target.is_from("probe")
        and not target.is_from(DASHBOARD)
        and RANK.get(target.name, len(LAYERS)) > RANK[TORCH_LINE]
    ]


def strangers_that_met(root: Path) -> list[str]:
    return [
        f"{at(root, path, target.line)}: {who} must not know {whom}"
        for path in sources(root, "probe")
        for target in imports_of(root, path)
        for who, whom in STRANGERS
        if module_of(root, path) == who and target.is_from(whom)
    ]


def torch_below_the_line(root: Path) -> list[str]:
    """Below the line no torch at all; at the doors none (and nothing that needs it) outside of
    functions.
    """
    findings = []
    for path in sources(root, "probe"):
        module = module_of(root, path)
        below = within(DASHBOARD, module) or RANK.get(module, len(LAYERS)) <= RANK[TORCH_LINE]
        door = RANK.get(module, -1) >= RANK[DOORS]
        for target in imports_of(root, path):
            torch_side = any(target.is_from(name) for name in TORCH)
            needs_torch = torch_side or RANK[TORCH_LINE] < RANK.get(target.name, -1) < RANK[DOORS]
            if below and torch_side:
                findings.append(
                    f"{at(root, path, target.line)}: {module} is below the torch line and imports "
                    f"{target.name}"
                )
            if door and needs_torch and target.when == "at once":
                findings.append(
                    f"{at(root, path, target.line)}: {module} imports {target.name} at once: do it "
                    "inside the function that needs it"
                )
    return findings


def modules_loaded_by(statement: str, root: Path) -> list[str]:
    """Which of torch and its friends a fresh process has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({TORCH!r}) & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def hooks_elsewhere(root: Path) -> list[str]:
    """One module registers hooks, and nobody replaces a forward or a processor (a string counts:
    getattr, setattr).
    """
    findings = []
    for path in sources(root, "probe", "experiments"):
        elsewhere = module_of(root, path) != "probe.watching.hooks"
        for node in ast.walk(parse(path)):
            match node:
                case (
                    ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name))
                ) if elsewhere and REGISTERS.fullmatch(name):
                    findings.append(
                        f"{at(root, path, node.lineno)}: {name} belongs into "
                        "probe/watching/hooks.py"
                    )
                case ast.Attribute(
                    attr="forward" | "processor" as name, ctx=ast.Store() | ast.Del()
                ):
                    findings.append(
                        f"{at(root, path, node.lineno)}: .{name} is assigned: observe with hooks "
                        "only"
                    )
                case ast.Call(
                    func=ast.Name(id="setattr"),
                    args=[_, ast.Constant(value="forward" | "processor" as name), _],
                ):
                    findings.append(
                        f"{at(root, path, node.lineno)}: .{name} is assigned: observe with hooks "
                        "only"
                    )
                case (
                    ast.Attribute(attr="set_attn_processor" | "set_processor" as name)
                    | ast.Constant(value="set_attn_processor" as name)
                ):
                    findings.append(
                        f"{at(root, path, node.lineno)}: {name} replaces a processor: observe with "
                        "hooks only"
                    )
    return findings


def constants_of_models(root: Path) -> list[str]:
    """The noise schedule is read in one place, and the VAE's scaling factor comes from its
    config.
    """
    findings = []
    for path in sources(root, "probe"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "alphas_cumprod" in line and module_of(root, path) != "probe.diffusion.schedule":
                findings.append(
                    f"{at(root, path, number)}: alphas_cumprod belongs into "
                    "probe/diffusion/schedule.py"
                )
            if "0.18215" in line:
                findings.append(f"{at(root, path, number)}: 0.18215 is vae.config.scaling_factor")
    return findings


def words_beside_the_door(root: Path) -> list[str]:
    """What is printed below probe/ goes through probe/output.py, which makes it harmless."""
    findings = []
    for path in sources(root, "probe"):
        if module_of(root, path) == "probe.output":
            continue
        for node in ast.walk(parse(path)):
            match node:
                case ast.Call(func=ast.Name(id="print" | "input" as name)):
                    found = name
                case ast.Attribute(
                    value=ast.Attribute(
                        value=ast.Name(id="sys"), attr="stdout" | "stderr" as stream
                    ),
                    attr="write" | "writelines" | "buffer",
                ):
                    found = f"sys.{stream}"
                case ast.Attribute(
                    value=ast.Name(id="traceback"),
                    attr="print_exc" | "print_exception" | "print_stack" | "print_tb" as name,
                ):
                    found = f"traceback.{name}"
                case ast.ImportFrom(module="sys", names=names) if {"stdout", "stderr"} & {
                    alias.name for alias in names
                }:
                    found = "sys.stdout"
                case _:
                    continue
            findings.append(
                f"{at(root, path, node.lineno)}: {found} goes past the door: say it with "
                "probe.output"
            )
    return findings


def shapeless_modules(root: Path) -> list[str]:
    findings = []
    for path in sources(root, "probe", "experiments", "benchmarks", "tests", "web"):
        inside = path.relative_to(root)
        rooms = {"common", "utils", "helpers"} & set(inside.parts[:-1])
        if rooms or path.stem in ("utils", "util", "helpers", "misc"):
            findings.append(f"{at(root, path)}: this name says nothing of what is inside")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if inside.parts[0] == "probe" and lines > MAX_LINES:
            findings.append(
                f"{at(root, path)}: {lines} lines, over {MAX_LINES}: which two ideas does it hold?"
            )
    return findings


def long_functions(root: Path) -> list[str]:
    """A function is seen whole on one screen, from its name to its end."""
    findings = []
    scripts = [path for path in (root / "tasks.py",) if path.exists()]
    for path in [*sources(root, "probe", "experiments", "benchmarks", "tests", "web"), *scripts]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_LINES_OF_A_FUNCTION:
                    findings.append(
                        f"{at(root, path, node.lineno)}: {node.name} has {lines} lines, over "
                        f"{MAX_LINES_OF_A_FUNCTION}: give a part a name of its own"
                    )
    return findings


def undocumented_modules(root: Path) -> list[str]:
    return [
        f"{at(root, path)}: no docstring"
        for path in sources(root, "probe")
        if not (ast.get_docstring(parse(path)) or "").strip()
    ]


def untyped_packages(root: Path) -> list[str]:
    """The wheel ships the one package whole, and py.typed lies in it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    packages = wheel.get("packages")
    findings = []
    if packages != ["probe"]:
        findings.append(f"pyproject.toml: the wheel holds {packages}, and not probe alone")
    findings += [
        f"pyproject.toml: the wheel must ship its packages whole, without {key!r}"
        for key in ("include", "only-include", "exclude")
        if key in wheel
    ]
    return findings + ([] if (root / "probe/py.typed").is_file() else ["probe/py.typed is missing"])


def imports_of_tests(root: Path) -> list[str]:
    """What tests share lies in modules that are no tests: a test file can be read, run, split and
    renamed by itself.
    """
    return [
        f"{at(root, path, found.line)}: imports a test module, {found.name}: move what is shared, "
        "to tests/recordings.py say"
        for path in sources(root, "tests")
        for found in imports_of(root, path)
        if found.name.removeprefix("tests.").startswith("test_")
    ]


# Written in pieces, so that this file does not hold what it forbids.
MACHINE = re.compile(
    r"(?<![\w.~<>)}\]*-])/" + r"(?:wo" + r"rk|ro" + r"ot|op" + r"t)(?=/|[\s\"'`:;,)\]]|$)"
)
REGISTRY = re.compile(r"py" + r"pi\.org|python" + r"hosted\.org|download\." + r"pytorch\.org")
CACHES = (".git .venv __pycache__ .pytest_cache .mypy_cache .ruff_cache .hypothesis").split()
NOT_OURS = frozenset({*CACHES, "build", "dist", "node_modules", "runs", "training"})


def text_files(root: Path) -> Iterator[Path]:
    """What git holds or would take; outside of a checkout, all but caches and outputs."""
    listed = None
    if (root / ".git").exists():
        what = ["-z", "--cached", "--others", "--exclude-standard"]
        try:
            listed = subprocess.run(
                ["git", "-C", str(root), "ls-files", *what],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError:  # no git here
            listed = None
    if listed is not None and listed.returncode == 0:
        paths = [root / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path
            for path in root.rglob("*")
            if not NOT_OURS.intersection(path.relative_to(root).parts)
        ]
    for path in sorted(paths):
        if path.is_file() and b"\0" not in path.read_bytes()[:8192]:
            yield path


def words_of_this_machine(root: Path) -> list[str]:
    return [
        f"{at(root, path, number)}: {found.group()} is a place of one machine"
        for path in text_files(root)
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        )
        for pattern in (MACHINE, REGISTRY)
        if (found := pattern.search(line))
    ]


# --- this checkout keeps them ---------------------------------------------------------------------

RULES = [
    imports_that_point_up,
    strangers_that_met,
    torch_below_the_line,
    hooks_elsewhere,
    constants_of_models,
    words_beside_the_door,
    shapeless_modules,
    long_functions,
    undocumented_modules,
    untyped_packages,
    imports_of_tests,
    words_of_this_machine,
]


@pytest.mark.smoke
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_checkout_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert list(sources(ROOT, "probe")), "the checks look at an empty folder"
    findings = rule(ROOT)
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize("module", ["probe", "probe.cli", "probe.dashboard"])
def test_a_fresh_process_imports_it_without_torch(module: str) -> None:
    assert modules_loaded_by(f"import {module}", ROOT) == []


# --- each of them can fail ------------------------------------------------------------------------

GOOD = {
    "pyproject.toml": '[tool.hatch.build.targets.wheel]\npackages = ["probe"]\n',
    "probe/py.typed": "",
    "probe/__init__.py": '"""Reads recordings."""\n'
    "if TYPE_CHECKING:\n    from probe.running.recorder import record\n",
    "probe/errors.py": '"""Errors."""\n',
    "probe/writing/store.py": '"""Stores."""\nimport zarr\nfrom probe.errors import ProbeError\n',
    "probe/watching/hooks.py": '"""Hooks."""\nfrom torch import nn\n'
    "def on(module, hook):\n    return module.register_forward_hook(hook)\n",
    "probe/diffusion/schedule.py": '"""The loop."""\nimport torch\nfrom . import errors\n'
    "x = scheduler.alphas_cumprod\n",
    "probe/cli.py": '"""The door."""\nfrom probe import analysis\n'
    "def main():\n    import torch\n    from probe.running.recorder import record\n",
    "probe/dashboard/__init__.py": '"""Looks."""\nimport probe\nfrom ..analysis.maps import Run\n',
    "probe/dashboard/views/maps.py": '"""A view."""\nfrom ... import schema\n'
    "from ..figures import draw\nimport streamlit\n",
    "tests/recordings.py": "",
    "tests/test_a.py": "import recordings\nfrom tests.recordings import x\n",
    "tests/test_b.py": "import pytest\n",
    "tasks.py": "def f():\n" + "    x = 1\n" * (MAX_LINES_OF_A_FUNCTION - 1),
    "experiments/own.py": "place = '.../home/here', 'root/x', 'a/opt', '/workflows/x', "
    "'/options'\n",
}

LONG = '"""A module."""\nclass A:\n    def f(self):\n' + "        x = 1\n" * MAX_LINES_OF_A_FUNCTION

BREAKS = [
    # (rule, file, its text, what the finding must say)
    (
        torch_below_the_line,
        "probe/cli.py",
        '""""""\nclass A:\n    import torch',
        "probe/cli.py:3: probe.cli imports torch at once",
    ),
    (
        imports_that_point_up,
        "probe/writing/store.py",
        '""""""\nfrom probe.running.recorder import record',
        "probe/writing/store.py:2: probe.writing.store imports probe.running.recorder: imports "
        "point down",
    ),
    (
        imports_that_point_up,
        "probe/errors.py",
        '""""""\ndef f():\n    from probe.format import schema',
        "probe/errors.py:3: probe.errors imports probe.format.schema: imports",
    ),
    (
        imports_that_point_up,
        "probe/errors.py",
        '""""""\ndef f():\n    from .format.schema import near',
        "probe/errors.py:3: probe.errors imports probe.format.schema: imports",
    ),
    (
        imports_that_point_up,
        "probe/errors.py",
        '""""""\nfrom .format import schema as s',
        "probe/errors.py:2: probe.errors imports probe.format.schema: imports",
    ),
    (
        imports_that_point_up,
        "probe/writing/store.py",
        '""""""\nfrom probe import Run',
        "probe.writing.store imports probe: imports point down only",
    ),
    (
        imports_that_point_up,
        "probe/__init__.py",
        '""""""\ndef f():\n    from probe.running.recorder import record',
        "probe imports probe.running.recorder: imports point",
    ),
    (
        imports_that_point_up,
        "probe/writing/store.py",
        '""""""\nif TYPE_CHECKING:\n    import probe.running.recorder',
        "probe.writing.store imports probe.running.recorder: imports point",
    ),
    (
        imports_that_point_up,
        "probe/diffusion/draws.py",
        '""""""\nimport probe.watching.interface',
        "probe.diffusion.draws imports probe.watching.interface: imports point down only",
    ),
    (
        imports_that_point_up,
        "probe/editing/targets.py",
        '""""""\nimport_module("probe.sweep")',
        "probe.editing.targets imports probe.sweep: imports point down only",
    ),
    (
        imports_that_point_up,
        "probe/reading/recording.py",
        '""""""\nfrom probe.proof.verdict import verify',
        "probe.reading.recording imports probe.proof.verdict: imports point down only",
    ),
    (
        imports_that_point_up,
        "probe/magic.py",
        '""""""\n',
        "probe.magic has no place among the layers: add it to LAYERS in tests/test_house.py",
    ),
    (
        imports_that_point_up,
        "probe/sweep.py",
        '""""""\nfrom probe.magic.deep import x',
        "probe.magic.deep, which has no place among the layers",
    ),
    (
        imports_that_point_up,
        "probe/sweep.py",
        '""""""\nimport experiments.own',
        "imports experiments.own, which is outside of probe",
    ),
    (
        imports_that_point_up,
        "probe/studies/study.py",
        '""""""\nfrom probe.dashboard import app',
        "probe.studies.study imports probe.dashboard: only a door starts",
    ),
    (
        imports_that_point_up,
        "probe/dashboard/views/maps.py",
        '""""""\nfrom probe.watching.hooks import on',
        "probe/dashboard/views/maps.py:2: the dashboard imports probe.watching.hooks",
    ),
    (
        imports_that_point_up,
        "probe/dashboard/app.py",
        '""""""\nfrom .. import cli',
        "the dashboard imports probe.cli, which is above the torch line",
    ),
    (
        strangers_that_met,
        "probe/diffusion/sampling.py",
        '""""""\nfrom probe.watching.hooks import on',
        "probe.diffusion.sampling must not know probe.watching.hooks",
    ),
    (
        strangers_that_met,
        "probe/watching/interface.py",
        '""""""\ndef f():\n    import zarr.storage',
        "probe/watching/interface.py:3: probe.watching.interface must not know zarr",
    ),
    (
        strangers_that_met,
        "probe/dashboard/figures.py",
        '""""""\nimport streamlit as st',
        "probe.dashboard.figures must not know streamlit",
    ),
    (
        torch_below_the_line,
        "probe/writing/store.py",
        '""""""\ndef f():\n    import torch',
        "probe/writing/store.py:3: probe.writing.store is below the torch line and imports torch",
    ),
    (
        torch_below_the_line,
        "probe/__init__.py",
        '""""""\nimport diffusers',
        "probe is below the torch line and imports diffusers",
    ),
    (
        torch_below_the_line,
        "probe/dashboard/views/maps.py",
        '""""""\nfrom transformers import x',
        "probe.dashboard.views.maps is below the torch line",
    ),
    (
        torch_below_the_line,
        "probe/cli.py",
        '""""""\ntry:\n    import torch.nn\nfinally: ...',
        "probe/cli.py:3: probe.cli imports torch.nn at once",
    ),
    (
        torch_below_the_line,
        "probe/run.py",
        '""""""\nfrom probe.running.recorder import record',
        "probe.run imports probe.running.recorder at once: do it inside the function",
    ),
    (
        hooks_elsewhere,
        "probe/watching/interface.py",
        '""""""\nm.register_forward_hook(f)',
        "probe/watching/interface.py:2: register_forward_hook belongs into probe/watching/hooks.py",
    ),
    (
        hooks_elsewhere,
        "probe/editing/targets.py",
        '""""""\ngetattr(m, "register_forward_pre_hook")',
        "register_forward_pre_hook belongs into",
    ),
    (
        hooks_elsewhere,
        "probe/editing/targets.py",
        '""""""\nregister_module_forward_hook(f)',
        "register_module_forward_hook belongs into",
    ),
    (
        hooks_elsewhere,
        "experiments/own.py",
        "m.register_full_backward_hook(f)",
        "experiments/own.py:1: register_full_backward_hook belongs into",
    ),
    (
        hooks_elsewhere,
        "probe/watching/hooks.py",
        '""""""\nm.forward = f',
        "probe/watching/hooks.py:2: .forward is assigned",
    ),
    (
        hooks_elsewhere,
        "probe/editing/targets.py",
        '""""""\na, m.processor = f',
        ".processor is assigned",
    ),
    (
        hooks_elsewhere,
        "probe/editing/targets.py",
        '""""""\nsetattr(m, "forward", f)',
        ".forward is assigned",
    ),
    (
        hooks_elsewhere,
        "probe/editing/targets.py",
        '""""""\nunet.set_attn_processor(p)',
        "set_attn_processor replaces a processor",
    ),
    (
        constants_of_models,
        "probe/analysis/maps.py",
        '"""alphas_cumprod"""',
        "probe/analysis/maps.py:1: alphas_cumprod belongs into probe/diffusion/schedule.py",
    ),
    (
        constants_of_models,
        "probe/dashboard/data.py",
        '""""""\nx = 1 / 0.18215',
        "probe/dashboard/data.py:2: 0.18215 is vae.config.scaling_factor",
    ),
    (
        words_beside_the_door,
        "probe/cli.py",
        '""""""\nprint(x)',
        "probe/cli.py:2: print goes past the door",
    ),
    (
        words_beside_the_door,
        "probe/cli.py",
        '""""""\ninput("x")',
        "probe/cli.py:2: input goes past the door",
    ),
    (
        words_beside_the_door,
        "probe/cli.py",
        '""""""\nimport sys\nsys.stdout.write(x)',
        "probe/cli.py:3: sys.stdout goes past the door",
    ),
    (
        words_beside_the_door,
        "probe/cli.py",
        '""""""\nfrom sys import stderr',
        "probe/cli.py:2: sys.stdout goes past the door",
    ),
    (
        words_beside_the_door,
        "probe/cli.py",
        '""""""\ntraceback.print_exc()',
        "probe/cli.py:2: traceback.print_exc goes past the door",
    ),
    (shapeless_modules, "probe/utils.py", "", "probe/utils.py:1: this name says nothing"),
    (
        shapeless_modules,
        "probe/dashboard/helpers.py",
        "",
        "probe/dashboard/helpers.py:1: this name says nothing",
    ),
    (
        shapeless_modules,
        "experiments/common/x.py",
        "",
        "experiments/common/x.py:1: this name says nothing",
    ),
    (
        shapeless_modules,
        "probe/writing/store.py",
        "\n" * (MAX_LINES + 1),
        f"probe/writing/store.py:1: {MAX_LINES + 1} lines",
    ),
    *(
        (
            long_functions,
            name,
            LONG,
            f"{name}:3: f has {MAX_LINES_OF_A_FUNCTION + 1} lines, over {MAX_LINES_OF_A_FUNCTION}",
        )
        for name in ("probe/editing/targets.py", "experiments/own.py", "benchmarks/bits.py")
    ),
    (
        long_functions,
        "tests/test_b.py",
        LONG.replace("def", "async def"),
        "tests/test_b.py:3: f has 61 lines",
    ),
    (long_functions, "tasks.py", LONG, "tasks.py:3: f has 61 lines"),
    (
        undocumented_modules,
        "probe/editing/targets.py",
        "x = 1",
        "probe/editing/targets.py:1: no docstring",
    ),
    (
        undocumented_modules,
        "probe/dashboard/views/maps.py",
        '"""  """',
        "probe/dashboard/views/maps.py:1: no docstring",
    ),
    (untyped_packages, "probe/py.typed", None, "probe/py.typed is missing"),
    (
        untyped_packages,
        "pyproject.toml",
        '[tool.hatch.build.targets.wheel]\npackages = ["probe", "dashboard"]',
        "and not probe alone",
    ),
    (
        untyped_packages,
        "pyproject.toml",
        GOOD["pyproject.toml"] + 'exclude = ["*.typed"]',
        "without 'exclude'",
    ),
    (
        imports_of_tests,
        "tests/test_a.py",
        "from test_b import c",
        "tests/test_a.py:1: imports a test module, test_b: move",
    ),
    (
        imports_of_tests,
        "tests/test_a.py",
        "def f():\n    import tests.test_b",
        "tests/test_a.py:2: imports a test module, tests.test_b",
    ),
    (
        imports_of_tests,
        "tests/helper.py",
        "from tests import test_b",
        "tests/helper.py:1: imports a test module, tests.test_b",
    ),
    (
        imports_of_tests,
        "tests/helper.py",
        "from .test_b import c",
        "tests/helper.py:1: imports a test module, tests.test_b",
    ),
    (
        words_of_this_machine,
        "notes.md",
        "see " + "/wo" + "rk/x",
        "notes.md:1: " + "/wo" + "rk is a place of one machine",
    ),
    (
        words_of_this_machine,
        ".ci/run",
        "\ncd '" + "/ro" + "ot'",
        ".ci/run:2: " + "/ro" + "ot is a place",
    ),
    (
        words_of_this_machine,
        "a.yaml",
        "path: " + "/op" + "t/models",
        "a.yaml:1: " + "/op" + "t is a place",
    ),
    (words_of_this_machine, "b.txt", "https://py" + "pi.org/simple", "b.txt:1: "),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_finds_nothing_in_a_good_tree(
    rule: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    assert rule(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("rule", "name", "text", "finding"),
    BREAKS,
    ids=[f"{rule.__name__}-{index}" for index, (rule, *_) in enumerate(BREAKS)],
)
def test_a_rule_can_fail(
    rule: Callable[[Path], list[str]], name: str, text: str | None, finding: str, tmp_path: Path
) -> None:
    plant(tmp_path, GOOD)
    if text is None:
        (tmp_path / name).unlink()
    else:
        plant(tmp_path, {name: text})
    found = rule(tmp_path)
    assert len(found) == 1, found
    assert finding in found[0]


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, *_ in BREAKS} == set(RULES)


def test_git_is_asked_where_there_is_a_checkout(tmp_path: Path) -> None:
    """What git ignores is not ours to judge, and without git the same tree is walked."""
    plant(
        tmp_path,
        {"notes.md": "/wo" + "rk/x", "secret.txt": "/wo" + "rk/y", ".gitignore": "secret.txt\n"},
    )
    assert [path.name for path in text_files(tmp_path)] == [".gitignore", "notes.md", "secret.txt"]
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, capture_output=True)
    except OSError:
        pytest.skip("no git here")
    assert [path.name for path in text_files(tmp_path)] == [".gitignore", "notes.md"]


def test_the_fresh_process_can_fail(tmp_path: Path) -> None:
    plant(tmp_path, {"torch.py": "", "probe/__init__.py": "import torch\n"})
    assert modules_loaded_by("import probe", tmp_path) == ["torch"]


def test_benchmarks_and_experiments_import_what_is_there() -> None:
    """No test runs most of them, so a name that moved would be missed there."""
    missing = []
    for file in sorted(
        [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    ):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probe":
                module = importlib.import_module(str(node.module))
                missing += [
                    f"{file.name}: {node.module}.{name.name}"
                    for name in node.names
                    if not _has(module, name.name)
                ]
    assert missing == []


def _has(module: Any, name: str) -> bool:
    return (
        hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None
    )
