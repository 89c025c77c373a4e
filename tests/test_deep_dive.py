"""The lesson runs as a notebook and as a script to the same pictures, and asserts what it claims.

Its assertions can fail.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import html
import io
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from trained import made_up

import probe
from experiments import lesson_pages
from probe.reading.pixels import WHY_THEY_DIFFER

ROOT = Path(__file__).resolve().parent.parent
LESSON = ROOT / "experiments" / "deep_dive.py"
SOURCE = LESSON.read_text(encoding="utf-8")
SHORT = {"steps": 6, "noises": 2}  # the default suite asks for less of everything

pytestmark = pytest.mark.timeout(
    900
)  # 20 seconds of one quiet core each, many times that on one that others share

# --- its form -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    kind: str  # markdown or code
    line: int
    text: str


def cells_of(source: str) -> list[Cell]:
    """The percent cells, as jupytext, VS Code and Spyder read them."""
    cells: list[Cell] = []
    lines = source.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("# %%")]
    assert starts and starts[0] == 0, "what stands before the first cell would be lost"
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        kind = {"# %%": "code", "# %% [markdown]": "markdown"}[lines[start]]
        cells.append(Cell(kind, start + 1, "\n".join(lines[start + 1 : end])))
    return cells


# What may hold a digit and is no result: code in backticks, a formula, the number of a heading, a
# year, a version, a name.
NAMES = re.compile(
    r"`[^`]*`|\$+[^$]+\$+|^# #+ \d\.|et al\. \d{4}|\bv1\b|\bx_?0\b|^# {5}.*$|\d-[a-z-]+$|channel 0",
    re.M,
)


def misshapen(source: str) -> list[str]:
    """What is wrong with a lesson's form: prose without code after it, results typed by hand."""
    findings = []
    cells = cells_of(source)
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        if cell.kind == "code":
            tree = ast.parse(cell.text)
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ("print", "show", "Row", "table", "Cost", "Line")
                ):
                    texts = [
                        part
                        for part in ast.walk(node)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                    ]
                    specs = {
                        id(part)
                        for spec in ast.walk(node)
                        if isinstance(spec, ast.FormattedValue) and spec.format_spec
                        for part in ast.walk(spec.format_spec)
                    }
                    keys = {
                        id(part.slice) for part in ast.walk(node) if isinstance(part, ast.Subscript)
                    }
                    findings += [
                        f"{cell.line + text.lineno}: {text.value!r} has a number typed into it"
                        for text in texts
                        if id(text) not in specs | keys
                        and re.search(r"\d", NAMES.sub("", text.value))
                    ]
            if not tree.body:
                findings.append(f"{cell.line}: an empty cell")
            continue
        if following is None or following.kind != "code":
            findings.append(f"{cell.line}: prose that no code follows")
        for offset, line in enumerate(cell.text.splitlines(), 1):
            if line and not line.startswith("#"):
                findings.append(f"{cell.line + offset}: code in a cell of prose")
            elif re.search(r"\d", NAMES.sub("", line)):
                findings.append(f"{cell.line + offset}: a number typed into the prose: {line}")
    return findings


def test_its_cells_are_well_formed() -> None:
    assert misshapen(SOURCE) == []
    assert [cell.kind for cell in cells_of(SOURCE)].count("markdown") >= 10


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        (
            "so nothing is estimated",
            "so the 297 times are not estimated",
            "a number typed into the prose",
        ),
        ("by hand and by one line agree", "all 31 steps agree", "has a number typed into it"),
        (
            'print(f"recorded: {run.path}")',
            'print(f"recorded in {3.1} s: {run.path} 3 s")',
            "has a number typed into it",
        ),
        ("# # A deep dive", "x = 1\n# # A deep dive", "code in a cell of prose"),
        (
            "# %% [markdown]\n# ## 2.",
            "# %% [markdown]\n# More.\n\n# %% [markdown]\n# ## 2.",
            "prose that no code follows",
        ),
    ],
)
def test_the_check_of_the_form_can_fail(old: str, new: str, finding: str) -> None:
    assert old in SOURCE
    found = misshapen(SOURCE.replace(old, new, 1))
    assert len(found) == 1 and finding in found[0], found


# --- run as a notebook ----------------------------------------------------------------------------

# What is broken, by what, and what the lesson then says. Each is planted in its cell, after the
# cells before it ran as they are.
FAULTS = {
    "another seed": (
        "guidance_scale=GUIDANCE, seed=SEED)",
        "guidance_scale=GUIDANCE, seed=SEED + 1)",
        "other latents than the one line",
    ),
    "another decoding": (
        "model.decode(latents)[0]  # the decoder",
        "model.decode(latents * 1.01)[0]",
        "another picture than the one line",
    ),
    "the word elsewhere": (
        'f"a picture of {words[place]}"',
        "words[place]",
        "the word at the same place",
    ),
    "no square roots": (
        "alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps",
        "alpha_bar[t] * x0 + (1 - alpha_bar[t]) * eps",
        "not what the scheduler does",
    ),
    "branches swapped": (
        "eps_uncond, eps_cond = model.unet",
        "eps_cond, eps_uncond = model.unet",
        "the loop written out came to other latents",
    ),
    "guidance swapped": (
        "guide(step.prediction_uncond, step.prediction_cond,",
        "guide(step.prediction_cond, step.prediction_uncond,",
        "guidance is not",
    ),
    "another recording": ('"seed": SEED', '"seed": SEED + 1', "recording changed the picture"),
    "attention uncounted": (
        'layer.kind.endswith("attention")',
        'layer.kind.endswith("attentive")',
        "does not see attention",
    ),
}


@dataclass
class Walk:
    """What running the cells one after the other gave."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    displayed: list[Image.Image] = field(default_factory=list)
    printed: str = ""
    caught: dict[str, BaseException | None] = field(default_factory=dict)


def run_cell(text: str, line: int, names: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + text, str(LESSON), "exec"), names)
    return printed.getvalue()


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """The lesson in a notebook, as far as it can tell: cells in one namespace, `get_ipython` and
    `display` in builtins.
    """
    done = Walk(tmp_path_factory.mktemp("notebook"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "get_ipython", lambda: None, raising=False)
        patch.setattr(builtins, "display", done.displayed.append, raising=False)
        patch.setattr(
            sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"]
        )  # what a kernel has there
        patch.chdir(done.folder)
        for cell in cells_of(SOURCE):
            if cell.kind == "markdown":
                continue
            text = cell.text
            for option, value in SHORT.items():  # as a reader would, in the cell
                default = rf'("--{option}",\s+type=int,\s+default=)\d+'
                text = re.sub(default, rf"\g<1>{value}", text)
            text = text.replace(
                "side = one_line.width\n", "side = one_line.width // 2\n"
            )  # the script runs the whole size
            for fault, (old, new, _) in FAULTS.items():
                if old in text:
                    shown = len(done.displayed)
                    try:
                        run_cell(text.replace(old, new, 1), cell.line, dict(done.names))
                        done.caught[fault] = None
                    except AssertionError as error:
                        done.caught[fault] = error
                    del done.displayed[shown:]
            done.printed += run_cell(text, cell.line, done.names)
        yield done


def test_its_recordings_are_pages_with_its_text(walk: Walk, tmp_path: Path) -> None:
    run, options = walk.names["run"], walk.names["options"]
    assert options.html is None and not list(walk.folder.glob("**/*.html")), "only where asked for"
    noised = probe.record(
        probe.Noising(
            picture=str(walk.folder / "runs" / "deep_dive" / "1-one-line.png"),
            caption="an astronaut",
            timesteps=(500, 50),
            noises=2,
        ),
        output=None,
        progress=False,
    )
    paths = lesson_pages.write_pages(tmp_path / "pages", LESSON, noised, run)
    assert [path.name for path in paths] == ["forward.html", "backward.html"]
    for path, said in zip(
        paths, ("we know the answer", "guidance exaggerates it s times"), strict=True
    ):
        text = path.read_text(encoding="utf-8")
        notes = html.unescape(
            text[text.index('<section class="notes">') : text.index("</section>")]
        )
        assert said in notes and not re.search(r"[\\$*`]", notes), notes
        assert "default-src 'none'" in text and not re.search(r"(src|href)=[\"']?http", text)
        assert path.stat().st_size < 1_000_000


def test_every_heading_of_a_page_is_in_the_lesson() -> None:
    for heading, count in {**lesson_pages.FORWARD, **lesson_pages.BACKWARD}.items():
        assert len(lesson_pages.explanation(SOURCE, heading)) >= count
    with pytest.raises(ValueError, match="no heading"):
        lesson_pages.explanation(SOURCE, "Sideways")


def test_its_cells_run_one_by_one(walk: Walk) -> None:
    names = pictures_named()
    assert len(walk.displayed) == len(names)
    assert not_blank(walk.folder / "runs" / "deep_dive") == names, (
        "the default folder has them, too"
    )
    assert "agree in every bit" in walk.printed
    assert (
        walk.names["STEPS"] == SHORT["steps"] and walk.names["losses"].shape[1] == SHORT["noises"]
    )
    run = probe.open_run(walk.names["run"].path)
    assert run.status == "complete"


@pytest.mark.parametrize("fault", FAULTS)
def test_its_assertions_can_fail(fault: str, walk: Walk) -> None:
    assert FAULTS[fault][2] in str(walk.caught[fault])


def test_what_it_prints_is_true_of_the_model(walk: Walk) -> None:
    """Its shapes and counts, by another way: from the configs, and attention's products by their
    formula.
    """
    model = walk.names["model"]
    text, unet = model.text_encoder.config, model.unet.config
    assert f"{text.max_position_embeddings} x {text.hidden_size} " in walk.printed
    for shape in (
        "77 x 768",
        "4 x 64 x 64",
        "3 x 512 x 512",
        "859.5 million",
    ):  # Stable Diffusion v1, from its paper and card
        assert shape in walk.printed
    for channels, side in ((unet.in_channels, unet.sample_size), (3, unet.sample_size * model.f)):
        layers = walk.names["Counter"](
            walk.names["blueprint"]("emojiworld"), walk.names["load_cost"]({})
        ).unet(unet.sample_size * model.f // side, (channels, side, side))
        total, part, matrix = walk.names["operations"](layers)
        assert round(total * part) == attention_products(model, side)
        assert matrix == unet.attention_head_dim * side**4, "heads x places x places"


def test_no_factor_of_the_cost_stands_alone(walk: Walk) -> None:
    """How many times the same UNet costs is said beside what one with coarse attention costs, and
    beside how many places there are.
    """
    models = {
        "emojiworld": walk.names["model"].unet,
        "Stable Diffusion v1": walk.names["sd1"]["UNet"],
    }
    factors = {}
    for name, unet in models.items():
        cheap, (whole, wide) = (
            attention_layers(unet, unet.config.in_channels, 1)[0],
            attention_layers(unet, 3, 8),
        )
        factors[name] = [f"{n:.0f}" for n in (whole / cheap, (whole - wide) / cheap)]
    for cost, (name, (same, coarse)) in zip(walk.names["costs"], factors.items(), strict=True):
        assert cost.label == f"{name}: {same} times"
        assert cost.note.endswith(
            f"\n{coarse} times with attention only up to 64 x 64; 64 times the places"
        )
        rows = [
            line.split()
            for line in walk.printed.splitlines()
            if line.startswith(f"  {name} ") and "GB" in line
        ]
        assert [row[-2:] for row in rows] == [["1", "1"], [same, "64"], [coarse, "64"]]
    same, coarse = factors["emojiworld"]
    said = walk.printed[
        walk.printed.index(f"one call of the same UNet on pixels has {same} times") :
    ]
    assert said.splitlines()[1].startswith(
        f"({coarse} times with attention only up to 64 x 64; 64 times the places)"
    )


def test_what_the_paper_measured_and_what_was_trained_are_told_apart(walk: Walk) -> None:
    assert "The paper measured 2.7 to 4.9 times" in walk.printed
    assert WHY_THEY_DIFFER in walk.printed
    cell = next(cell for cell in cells_of(SOURCE) if "def trained_rows" in cell.text)
    printed = run_cell(cell.text, cell.line, walk.names | {"demonstration": lambda: made_up((0,))})
    rows = [line.split("   ") for line in printed.splitlines() if re.match(r"  \d", line)]
    assert printed.startswith("At 64 pixels, emoji, one seed: [0]") and len(rows) == 4
    assert "f = 8 leaves 8 x 8 latents of these pictures,\nand 64 x 64 of those of" in printed
    text = "   ".join(rows[3])
    for part in ("4 x 8 x 8", "500", "158 s", "60% (55% to 65%)", "94% (89% to 99%)"):
        assert part in text, part
    assert "python -m experiments.pixels.train" in run_cell(
        cell.text, cell.line, walk.names | {"demonstration": lambda: None}
    )


def attention_layers(unet: Any, channels: int, times: int, widest: int = 64) -> tuple[int, int]:
    """FLOPs of a call of the same UNet on inputs `times` as wide: of all of it, and of what is in
    transformers on wider grids than `widest`.
    """
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    side, wide = unet.config.sample_size * times, []
    own = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    with torch.device("meta"), torch.no_grad():
        made = type(unet)(
            **own | {"in_channels": channels, "out_channels": channels, "sample_size": side}
        )
        for path, part in made.named_modules():
            if isinstance(part, Transformer2DModel):
                part.register_forward_hook(
                    lambda _, given, __, path=path: (
                        wide.append(path) if given[0].shape[-1] > widest else None
                    )
                )
        with FlopCounterMode(display=False) as counter:
            made(
                torch.zeros(1, channels, side, side),
                500,
                encoder_hidden_states=torch.zeros(1, 77, unet.config.cross_attention_dim),
            )
    counts = counter.get_flop_counts()
    of = {path: sum(counts[f"{type(unet).__name__}.{path}"].values()) for path in wide}
    return sum(counts["Global"].values()), sum(of.values())


def test_it_says_how_its_model_was_trained_where_it_shows_attention(walk: Walk) -> None:
    attention = SOURCE[SOURCE.index("# ### How the words get in") : SOURCE.index("# ## 5.")]
    assert "trained to bind nouns to words" in attention.split("# %%\n")[0].replace(
        "\n# ", " "
    ).replace("**", "")
    assert re.search(
        r"of all attention, [^.]*\nin a model that was trained to bind nouns to words", walk.printed
    )
    assert all(
        "trained to bind nouns to words" in note
        for note in re.findall(r"^note = .*", attention, re.M)
    ), "in the picture"
    assert "has no question" not in SOURCE


def attention_products(model: Any, side: int) -> int:
    """FLOPs of all q k^T and of all weighted sums of v: two products of 2 x places x keys x width
    each, in every layer.
    """
    from probe.watching.rehearsal import rehearse

    tokens = model.text_encoder.config.max_position_embeddings
    square = rehearse(
        model, (1, model.unet.config.in_channels, side, side), 1, tokens
    )  # grids follow from the side, not from the channels
    modules = dict(model.unet.named_modules())
    grids = [
        *((path, grid, tokens) for path, grid in square.grids.items()),
        *((path, grid, grid[0] * grid[1]) for path, grid in square.self_grids.items()),
    ]
    assert grids
    return sum(
        2 * 2 * grid[0] * grid[1] * keys * modules[path].inner_dim for path, grid, keys in grids
    )


# --- run as a script ------------------------------------------------------------------------------


def pictures_named() -> set[str]:
    return set(re.findall(r'show\(\s*"([\w-]+)"', SOURCE))


def not_blank(folder: Path) -> set[str]:
    """The names of the pictures in a folder that show something."""
    found = set()
    for path in folder.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"), np.float32)
        if pixels.std() > 10 and len(np.unique(pixels)) > 16:
            found.add(path.stem)
    return found


def script(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # the same cells once more, as one file
def test_it_runs_as_a_script_to_the_same_pictures(walk: Walk, tmp_path: Path) -> None:
    printed = script(
        LESSON,
        "--out",
        tmp_path / "out",
        "--html",
        tmp_path / "pages",
        *(part for option, value in SHORT.items() for part in (f"--{option}", value)),
    )
    assert not_blank(tmp_path / "out") == pictures_named()
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {
        "forward.html",
        "backward.html",
    }
    for name in pictures_named():
        here, there = (
            np.asarray(Image.open(folder / f"{name}.png"))
            for folder in (tmp_path / "out", walk.folder / "runs" / "deep_dive")
        )
        assert np.array_equal(here, there), name
        assert f"{name}.png" in printed
    assert "agree in every bit" in printed and f"in {tmp_path / 'out'}." in printed


def test_a_blank_picture_is_seen(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "1-one-line.png")
    assert not_blank(tmp_path) == set()


@pytest.mark.slow
def test_it_runs_whole_as_a_module(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script("-m", "experiments.deep_dive", "--out", tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not_blank(tmp_path) == pictures_named()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60, (
        "it promises a minute of one core"
    )
