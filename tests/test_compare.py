"""What differs between two recordings is found and named, down to one bit, and nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from recordings import change_root, cut
from tiny_runs import take

from probe.reading.compare import Comparison, Difference, compare
from probe.reading.recording import Run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("whole"), scheduler="DDIM", images=2, decode_every=2)


@pytest.fixture
def copy(whole: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(whole.path, tmp_path / "copy.zarr")))


def change(run: Run, variable: str, at: Any, to: Callable[[Any], Any]) -> Run:
    array = zarr.open_array(run.path, path=variable, mode="r+")
    array[at] = to(np.asarray(array[at]))
    return Run(run.path)


def only(found: Comparison) -> Difference:
    assert not found.same and not found.asked and not found.conditions
    (difference,) = found.differences
    return difference


def test_a_run_is_the_same_as_itself_and_as_one_of_the_same_experiment(
    whole: Run, copy: Run, tmp_path: Path
) -> None:
    again = take(tmp_path / "again", scheduler="DDIM", images=2, decode_every=2)
    for other in (whole, copy, again):
        found = compare(whole, other)
        assert found.same and found.differences == found.asked == found.conditions == []
        names = {
            f"{node.path}/{name}"
            for node in whole.tree.subtree
            for name in node.to_dataset(inherit=False).variables
        }
        assert (
            found.variables == len([name for name in names if not name.startswith("/cost/")]) - 1
        ), "all but committed and times"


def test_one_ulp_is_found_and_where(whole: Run, copy: Run) -> None:
    found = only(
        compare(
            whole,
            change(
                copy,
                "latents/prediction",
                (2, 1, 3, 4, 5),
                lambda value: np.nextafter(value, np.float32(9)),
            ),
        )
    )
    value = float(whole.prediction().values[2, 1, 3, 4, 5])
    assert (found.variable, found.problem, found.count, found.at) == (
        "latents/prediction",
        "values differ",
        1,
        2,
    )
    assert found.total == whole.latents.size and found.greatest == pytest.approx(
        float(np.spacing(np.float32(abs(value)))), rel=0.51
    )


@pytest.mark.parametrize("steps", [slice(1, 2), slice(3, 4), slice(0, 4)])
def test_the_first_step_is_named_however_much_is_read_at_once(
    whole: Run, copy: Run, steps: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(copy, "attention/8x8/cross", steps, lambda value: value + np.float16(0.5))
    found = only(compare(whole, copy))
    assert found.at == steps.start and found.greatest == pytest.approx(0.5, abs=1e-3)
    assert found.count == found.total * (steps.stop - steps.start) // 4
    for size in (1, whole.tree["attention/8x8/cross"].nbytes // 2):
        monkeypatch.setattr("probe.reading.compare.AT_ONCE", size)
        assert compare(whole, copy).differences == [found]


def test_steps_are_counted_where_step_is_not_the_first_axis(whole: Run, copy: Run) -> None:
    assert whole.tree["attention/8x8/overview"].dims[1] == "step"
    assert (
        only(
            compare(whole, change(copy, "attention/8x8/overview", (0, 2), lambda value: value + 1))
        ).at
        == 2
    )


def test_numbers_that_are_equal_and_bits_that_are_not(whole: Run, tmp_path: Path) -> None:
    """0 and -0 are the same number; NaN is none, and the same as NaN."""

    def holding(value: float) -> Run:
        path = Path(shutil.copytree(whole.path, tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"))
        return change(Run(path), "latents/final_latents", (0, 0, 0, 0), lambda _: value)

    zero = holding(0.0)
    found = only(compare(zero, holding(-0.0)))
    assert (found.count, found.greatest, found.at) == (1, 0.0, None)
    assert only(compare(zero, holding(float("nan")))).greatest > 1e300
    assert (
        compare(holding(float("nan")), holding(float("nan"))).same
        and compare(zero, holding(0.0)).same
    )


def test_texts_and_whole_numbers_are_compared_too(whole: Run, copy: Run) -> None:
    found = only(
        compare(whole, change(copy, "images/final", (1, 0, 0, 0), lambda value: value ^ 128))
    )
    assert (found.variable, found.count, found.greatest, found.at) == ("images/final", 1, 128, None)
    change(copy, "images/final", (1, 0, 0, 0), lambda value: value ^ 128)
    found = only(
        compare(whole, change(copy, "text/text_encoder/token_text", (0, 1), lambda value: "dog"))
    )
    assert (found.variable, found.count, found.greatest) == ("text/text_encoder/token_text", 1, 0)


def test_a_variable_that_only_one_has(whole: Run, tmp_path: Path) -> None:
    other = take(
        tmp_path, scheduler="DDIM", images=2, decode_every=2, capture={"statistics": False}
    )
    found = compare(whole, other)
    assert found.asked == ["capture.statistics: True and False"]
    assert {d.problem for d in found.differences} == {"only in the first"}
    assert {d.variable.split("/")[0] for d in found.differences} == {"unet", "vae"}
    assert {d.problem for d in compare(other, whole).differences} == {"only in the second"}


def test_what_was_asked_differs(whole: Run, tmp_path: Path) -> None:
    other = take(tmp_path, scheduler="DDIM", images=2, decode_every=2, seed=4)
    found = compare(whole, other)
    assert found.asked == ["seed: 3 and 4"] and not found.conditions
    differing = {d.variable: d for d in found.differences}
    assert differing["latents/latents"].at == 0 and differing["images/final"].at is None
    assert (
        not {"sigma", "timestep", "text/text_encoder/output", "latents/scheduler_sigmas"}
        & differing.keys()
    )
    images = whole.tree["latents/latents"].values[:, 1], other.tree["latents/latents"].values[:, 0]
    assert np.array_equal(images[0][0], images[1][0]), (
        "image 1 of seed 3 begins as image 0 of seed 4"
    )


def test_another_dtype_is_a_condition_and_other_types(whole: Run, tmp_path: Path) -> None:
    other = take(
        tmp_path, tiny.pipeline().to(torch.float16), scheduler="DDIM", images=2, decode_every=2
    )
    found = compare(whole, other)
    weights = [run.attributes["model"]["weights"] for run in (whole, other)]
    assert (
        found.conditions
        == ["dtype: float32 and float16", f"weights: {weights[0]} and {weights[1]}"]
        and weights[0] != weights[1]
    )
    assert {d.variable: d.problem for d in found.differences}[
        "latents/latents"
    ] == "types float32 and float16"


def test_other_sizes_are_said(whole: Run, tmp_path: Path) -> None:
    other = take(tmp_path, scheduler="DDIM", images=2, decode_every=2, steps=6)
    found = compare(whole, other)
    problems = {d.variable: d.problem for d in found.differences}
    assert found.asked == ["steps: 4 and 6"]
    assert (
        problems["sigma"] == "sizes {'step': 4} and {'step': 6}"
        and problems["committed"] == "4 steps and 6 steps"
    )


def test_of_unfinished_runs_the_steps_that_both_have_are_compared(
    whole: Run, tmp_path: Path
) -> None:
    found = compare(whole, cut(whole, tmp_path, 2))
    problems = {d.variable: d for d in found.differences}
    assert problems["committed"].problem == "4 steps and 2 steps"
    assert problems.keys() == {
        "committed",
        "decoded/picture",
        "images/final",
        "latents/final_latents",
        "vae/statistics",
        *(f"attention/{grid}/time_sum" for grid in whole.grids),
        "attention/8x8/overview",
    }
    shorter, longer = cut(whole, tmp_path, 1), cut(whole, tmp_path, 3)
    assert {d.variable for d in compare(shorter, longer).differences} == {
        "committed",
        "decoded/picture",
    }


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda a: a["environment"].update(device="cuda", threads=8),
            ["device: cpu and cuda", "threads: 1 and 8"],
        ),
        (
            lambda a: a["environment"].pop("attention_backend"),
            ["attention_backend: AttnProcessor2_0 and None"],
        ),
        (lambda a: a["model"].update(weights="0123"), ["weights: {weights} and 0123"]),
        (lambda a: a["environment"].update(python="2.7", platform="PDP-11"), []),
        (
            lambda a: a["experiment"].update(
                name="other", output="elsewhere", durability="none", device="cuda:1"
            ),
            [],
        ),
    ],
)
def test_conditions_that_decide_bits(
    whole: Run, copy: Run, edit: Callable[[dict[str, Any]], object], said: list[str]
) -> None:
    found = compare(whole, change_root(copy, edit))
    assert found.conditions == [
        line.format(weights=whole.attributes["model"]["weights"]) for line in said
    ]
    assert found.same and not found.asked
