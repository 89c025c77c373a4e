"""Grids: axes and ranges, other prompts of one prompt, zips, bases, and every cell checked."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from probe.errors import ExperimentError
from probe.settings.axes import axis
from probe.settings.experiment import Experiment
from probe.settings.grid import MOST_CELLS, Grid, load_grid, places

CAT = "A cat on a hat"
MASK = {"kind": "mask", "words": ["cat"]}


def values(name: str, written: object, current: object = None) -> list[Any]:
    return list(axis(name, written, current).values)


def refused(**written: Any) -> tuple[str, str]:
    with pytest.raises(ExperimentError) as error:
        load_grid({"prompt": CAT, **written}).cells()
    return error.value.cause, error.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-10(3)", [1, 4, 7, 10]),
        ("1-9(3)", [1, 4, 7]),
        ("10-1(-3)", [10, 7, 4, 1]),
        ("-2-2(2)", [-2, 0, 2]),
        ("-3--1(1)", [-3, -2, -1]),
        ("0-0.3(0.1)", [0.0, 0.1, 0.2, 0.3]),
        ("0 - 1 (.5)", [0.0, 0.5, 1.0]),
        ("1-10[5]", [1.0, 3.25, 5.5, 7.75, 10.0]),
        ("1-10[4]", [1, 4, 7, 10]),
        ("1e-3-3e-3(1e-3)", [0.001, 0.002, 0.003]),
        ("7-7(1)", [7]),
    ],
)
def test_a_range(text: str, expected: list[float]) -> None:
    got = values("guidance_scale", text)
    assert got == expected
    assert [type(value) for value in got] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        *((text, "1-10(1)") for text in ("1-10", "a-b(1)", "1-2[x]")),
        *((text, "10-1(-1)") for text in ("1-10(0)", "1-10(-1)", "10-1(1)")),
        ("1-10[1]", "2 or more"),
        ("0-100000(1)", "larger step"),
        *(
            (text, "1-10(1)")
            for text in ("1e999999999-2(1)", "1-2(1e-999999999)", "1e308-2e308[3]")
        ),
        *((text, "1-10(1)") for text in (f"1-2[{'9' * 5000}]", f"{'9' * 5000}-2(1)")),
    ],
)
def test_what_is_no_range_says_how_one_is_written(text: str, remedy: str) -> None:
    cause, how = refused(axes={"seed": text})
    assert cause.startswith("grid: axes.seed: ") and remedy in how


def test_axes_may_be_labelled_and_no_two_labels_are_the_same() -> None:
    few = axis("steps", [{"label": "few", "value": 8}, 50], 50)
    assert (few.labels, few.values) == (("few", "50"), (8, 50))
    assert axis("scheduler_options.x", [True, None, [1, 2]], None).labels == (
        ("true", "none", "1, 2")
    )
    edits = axis(
        "edits", [[], [MASK], [{**MASK, "label": "hide it"}], [{**MASK, "steps": "0"}]], []
    )
    assert edits.labels[:1] == ("none",) and edits.labels[2] == "hide it"
    assert "'cat'" in edits.labels[1] and len(set(edits.labels)) == 4
    twice = axis("edits", [{"label": "a", "value": []}, {"label": "a", "value": [MASK]}], [])
    assert twice.labels == ("a", "a (2)")
    named = [{"label": label, "value": at} for at, label in enumerate(("a (2)", "a", "a"))]
    assert axis("seed", named, 0).labels == ("a (2)", "a", "a (3)")
    assert "not a value with a label" in refused(axes={"steps": [{"label": "few", "values": 8}]})[0]


def test_other_prompts_of_one_prompt(tmp_path: Path) -> None:
    assert values("prompt", {"replace": {"cat": ["cat", "fox"], "hat": ["mat"]}}, CAT) == [
        "A cat on a mat",
        "A fox on a mat",
    ]
    assert values("prompt", {"replace": {"cat": ["cat", ""]}}, CAT)[1] == "A on a hat"
    orders = axis("prompt", {"order": ["cat", "hat"]}, CAT)
    assert orders.values == (CAT, "A hat on a cat") and orders.labels[1] == "hat, cat"
    assert len(values("prompt", {"order": ["A", "cat", "hat"]}, CAT)) == 6
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a fox  \n")
    (tmp_path / "grid.yaml").write_text("axes: {prompt: {file: prompts.txt}}\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "grid.yaml").write_text("base: ../grid.yaml\n")
    for file in ("grid.yaml", "more/grid.yaml"):
        assert load_grid(tmp_path / file).axes[0].values == ("a cat", "a fox")


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"replace": {"dog": ["cat"]}}, "'dog' is not in"),
        ({"replace": {"ca": ["cat"]}}, "'ca' is not in"),
        ({"replace": {"cat": []}}, "replaced by what"),
        ({"replace": {"cat": ["fox"], "A cat": ["a dog"]}}, "overlap"),
        ({"order": ["cat"]}, "2 to 5 different parts"),
        ({"order": ["cat", "A cat"]}, "overlap"),
        ({"order": "cat"}, "not a list of words"),
        ({"file": "nowhere.txt"}, "does not exist"),
        ({"swap": ["cat"]}, "how the text varies"),
        ({"replace": {word: ["x"] * 10**4 for word in ("cat", "hat")}}, "100000000 values"),
        ({}, "how the text varies"),
    ],
)
def test_prompts_that_cannot_be_made(how: object, what: str) -> None:
    cause, remedy = refused(axes={"prompt": how})
    assert what in cause and remedy
    assert "makes other texts" in refused(axes={"seed": {"order": ["a", "b"]}})[0]


def test_cells_are_experiments_in_the_order_of_the_axes() -> None:
    grid = load_grid({"steps": 4, "axes": {"guidance_scale": [1, 3], "seed": "0-2(1)"}})
    cells = grid.cells()
    assert grid.shape == (2, 3) and grid.count == len(cells) == 6
    assert [cell.index for cell in cells] == list(itertools.product(range(2), range(3)))
    assert [cell.index for cell in cells] == list(places(grid.shape))
    assert cells[4].experiment == Experiment(steps=4, guidance_scale=3, seed=1)
    assert cells[4].title == "guidance_scale=3, seed=1"
    assert [cell.index for cell in load_grid({}).cells()] == [()]


def test_zipped_axes_move_together() -> None:
    axes = {"steps": [4, 8], "seed": [0, 1, 2], "guidance_scale": [1, 3]}
    grid = load_grid({"axes": axes, "zip": [["guidance_scale", "steps"]]})
    assert grid.shape == (2, 3)
    assert [[axis.name for axis in axes] for axes in grid.dimensions] == [
        ["steps", "guidance_scale"],
        ["seed"],
    ]
    pairs = {(cell.experiment.steps, cell.experiment.guidance_scale) for cell in grid.cells()}
    assert pairs == {(4, 1.0), (8, 3.0)}
    assert "as many values each" in refused(axes=axes, zip=[["steps", "seed"]])[0]
    assert "Did you mean steps?" in refused(axes=axes, zip=[["step", "seed"]])[1]
    assert "written twice" in refused(axes=axes, zip=[["steps", "steps"]])[0]


def test_axes_reach_into_fields() -> None:
    grid = load_grid(
        {
            "prompt": CAT,
            "edits": [MASK, {"kind": "reweight", "words": ["hat"], "scale": 2}],
            "axes": {
                "edits.0.amount": [0, 0.5],
                "edits.1.words": [["cat"], ["hat"]],
                "capture.text": [True, False],
                "scheduler_options.use_karras_sigmas": [True],
            },
        }
    )
    last = grid.cells()[-1].experiment
    assert last.edits[0].amount == 0.5 and last.edits[1].words == ("hat",)  # type: ignore[union-attr]
    assert not last.capture.text and last.scheduler_options == {"use_karras_sigmas": True}
    whole = load_grid(
        {
            "prompt": CAT,
            "axes": {"edits.0.amount": [0, 1], "edits": [[MASK], [{**MASK, "words": ["hat"]}]]},
        }
    )
    assert "there is no edits[0]" in refused(axes={"edits.0.amount": [0, 1]})[0]
    for number in ("00", "\u0660"):  # two names of one field would be two axes
        assert "there is no" in refused(edits=[MASK], axes={f"edits.{number}.amount": [0]})[0]
    inside = refused(edits=[MASK], axes={"edits.0.words.0.x": ["hat"]})[0]
    assert "nothing inside of words[0]" in inside
    assert whole.cells()[-1].experiment.edits[0].amount == 1
    captures = load_grid({"capture": {"text": False}, "axes": {"capture": [{"steps": "0"}]}})
    assert captures.cells()[0].experiment.capture.text is False


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("guidence_scale", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("capture.txt", "capture.text"),
        ("sed", "seed"),
    ],
)
def test_an_axis_that_is_no_field_names_the_nearest(name: str, near: str) -> None:
    assert refused(axes={name: [1]}) == (
        f"grid: axes.{name}: unknown field",
        f"Did you mean {near}?",
    )


def test_cells_that_cannot_be_are_named_with_their_cause() -> None:
    cause, remedy = refused(axes={"steps": "0-3(1)", "seed": [0, 1, 2, 3]})
    assert cause == (
        "steps=0, seed=0; steps=0, seed=1; steps=0, seed=2 and 1 more cell: steps: 0 is less than 1"
    )
    assert remedy == "Write a number from 1 to 1000."
    remove = {"kind": "remove", "words": ["cat"]}
    cause, _ = refused(edits=[remove], axes={"prompt": ["a cat", "a fox", "a fox and a cat"]})
    assert cause.startswith("prompt=a fox: ") and "cat" in cause
    cause, _ = refused(axes={"steps": [0, 1001]})
    assert "1 other cause besides" in cause


@pytest.mark.parametrize(
    ("written", "what", "how"),
    [
        ({"axes": {"output": ["a"]}}, "changes nothing that is recorded", "outside of axes"),
        ({"axes": [1]}, "not a mapping", "field: values"),
        ({"axes": {"seed": 3}}, "not a list", "[1, 2, 5]"),
        ({"axes": {"seed": []}}, "no value", "[1, 2, 5]"),
        ({"axes": {"seed": [1, 1]}}, "written twice", "Keep one"),
        ({"axis": {"seed": [1]}}, "axis: unknown field", "Did you mean axes?"),
        ({"keep": "everything"}, "keep", "Write one of them"),
        ({"measures": ["L2!"]}, "measures[0]", ""),
        ({"name": "My Grid"}, "name", "a-z"),
        ({"axes": {"guidance_scale": [float("nan")]}}, "not finite", "a number"),
        ({"axes": {"seed": [{"label": "x" * 20_001, "value": 1}]}}, "20001 letters", "label: TEXT"),
        ({"axes": {"seed": [1]}, "zip": [[]]}, "a group has no axis", "zip: [[seed, steps]]"),
        ({"base": 3}, "base: 3 is not a file", "Name another"),
        ({"base": "nowhere.yaml"}, "does not exist", ""),
    ],
)
def test_bad_grids(written: dict[str, Any], what: str, how: str) -> None:
    cause, remedy = refused(**written)
    assert what in cause and how in remedy


def test_too_many_cells_are_refused_before_they_are_made() -> None:
    cause, _ = refused(axes={"seed": "0-999(1)", "guidance_scale": "1-100.9(0.1)"})
    assert str(MOST_CELLS) in cause and "1000000" in cause


def test_a_base_may_be_an_experiment_or_a_grid(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("prompt: a cat\nsteps: 20\ncapture: {text: false}\n")
    (tmp_path / "two.yaml").write_text(
        "base: one.yaml\nname: two\nsteps: 10\naxes: {seed: [0, 1], guidance_scale: [1, 2]}\n"
        "capture: {statistics: false}\nquick: {steps: 2, axes: {seed: [0]}}\n"
    )
    (tmp_path / "a Third.yaml").write_text("base: two.yaml\naxes: {seed: [5]}\n")
    grid = load_grid(tmp_path / "a Third.yaml")
    assert grid.name == "a-third" and grid.shape == (1, 2)
    assert (grid.experiment.prompt, grid.experiment.steps) == ("a cat", 10)
    assert not grid.experiment.capture.text and not grid.experiment.capture.statistics
    quick = load_grid(tmp_path / "two.yaml", quick=True)
    assert quick.name == "two" and quick.shape == (1, 2) and quick.experiment.steps == 2
    with pytest.raises(ExperimentError, match="quick"):
        load_grid(tmp_path / "one.yaml", quick=True)
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    with pytest.raises(ExperimentError, match="20 files below one another"):
        load_grid(tmp_path / "0.yaml")
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    with pytest.raises(ExperimentError, match="based on this very file"):
        load_grid(tmp_path / "two.yaml")


def test_changes_from_a_command_line() -> None:
    written = {"axes": {"seed": [0, 1]}}
    grid = load_grid(
        written, steps=3, keep="metrics", **{"axes.seed": "4-6(1)", "capture.text": False}
    )
    assert grid.axes[0].values == (4, 5, 6) and grid.keep == "metrics"
    assert grid.experiment.steps == 3 and not grid.experiment.capture.text
    with pytest.raises(ExperimentError, match=r"axes\.seed="):
        load_grid(written, seed=3)


def test_a_grid_is_read_back_from_what_it_resolves_to() -> None:
    grid = load_grid(
        {
            "prompt": CAT,
            "axes": {
                "prompt": {"replace": {"cat": ["cat", "fox"]}},
                "edits": [[], [MASK], {"label": "x", "value": [{**MASK, "words": ["hat"]}]}],
                "steps": [4, 8],
            },
            "zip": [["prompt", "steps"]],
            "measures": ["l2", "my.module:function"],
        }
    )
    assert load_grid(json.loads(json.dumps(grid.resolved()))) == grid == load_grid(grid)
    assert isinstance(grid, Grid)
