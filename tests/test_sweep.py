"""`probe sweep`: what would run, what ran, what failed, and options that cannot be met."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command, process, refused

import probe
from probe import cli, sweep
from probe.sweep import changes, parser

GRID = """
name: cats
model: {model}
prompt: a cat on the hat
steps: 2
durability: none
capture: {{attention: "off", text: false, statistics: false}}
axes:
  guidance_scale: [1, 3]
  seed: 0-1(1)
quick: {{axes: {{guidance_scale: [3]}}}}
"""


@pytest.fixture
def grid(saved: Path, tmp_path: Path, own_folder: None) -> str:
    (tmp_path / "grid.yaml").write_text(GRID.format(model=saved))
    return "grid.yaml"


def test_a_grid_from_its_plan_to_its_study(grid: str, call: Command, tmp_path: Path) -> None:
    code, out, err = call(sweep.main, grid, "--dry-run")
    assert code == 0 and not (tmp_path / "runs").exists()
    assert "guidance_scale  2       1, 3" in out and "seed" in out
    assert "4 cells. There already: 0. To be computed: 4, with 12 model calls" in out
    assert "A model call takes" in out
    code, out, err = call(sweep.main, grid, "--quick", "--shard", "1/2")
    assert code == 0 and "1 cell computed, 0 failed, 0 there already" in out
    code, out, err = call(lambda words: cli.dispatch(["sweep", *words]), grid)
    assert code == 0 and "3 cells computed, 0 failed, 1 there already" in out
    assert err.count("left") == 2 and "[3/3] guidance_scale=3, seed=1: " in err
    code, out, err = call(sweep.main, grid, "--quiet")
    assert (code, err) == (0, "")
    study = probe.open_study(out.strip())
    assert study.counts() == {"complete": 4} and study.shape == (2, 2)
    assert study.open(guidance_scale=3, seed=1).experiment.guidance_scale == 3
    assert study.dataset["status"].sel(seed=0).values.tolist() == ["complete", "complete"]
    code, out, _ = call(sweep.main, grid, "--dry-run")
    assert "There already: 4. To be computed: 0, with 0 model calls" in out


def test_measures_that_stay_empty_are_said(grid: str, call: Command) -> None:
    said = "Empty will be l2, psnr: they compare an edited cell with the run unedited."
    measured = [grid, "--dry-run", "--set", "measures=[l2, psnr]"]
    assert said in call(sweep.main, *measured)[1].splitlines()
    edited = ["--set", "edits=[{kind: mask, words: [cat]}]"]
    assert "Empty will be" not in call(sweep.main, *measured, *edited)[1]


def test_a_cell_that_fails_is_said_and_the_exit_code_is_1(
    grid: str, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probe.studies import compute

    record_as: Callable[..., Any] = compute.record_as

    def broken(model: Any, experiment: Any, *rest: Any, **options: Any) -> Any:
        if experiment.seed == 1:
            raise ValueError("seven")
        return record_as(model, experiment, *rest, **options)

    monkeypatch.setattr(compute, "record_as", broken)
    code, out, err = call(sweep.main, grid, "--set", "name=dogs", "--keep", "metrics")
    assert code == 1 and "2 cells computed, 2 failed" in out and "dogs-" in out
    assert err.count("error: guidance_scale=") == 2 and "seed=1: ValueError: seven" in err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_a_grid_and_the_same_command_goes_on(
    grid: str, tmp_path: Path, workers: str
) -> None:
    words = "probe.sweep", tmp_path / grid, "--set", "steps=40", "--workers", workers
    started = process(*words, cwd=tmp_path, start_new_session=True)
    assert started.stderr is not None
    lines = [next(started.stderr) for _ in range(2)]
    assert lines[1].startswith("[1/4] ")
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130 and "the same command goes on from there" in err
    assert "Traceback" not in err and err.endswith("Stopped.\n")
    again = process(*words, cwd=tmp_path)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    there = re.search(r"([0-9]) cells? computed, 0 failed, ([0-9]) there already", out)
    assert there and int(there[1]) + int(there[2]) == 4 and int(there[2]) >= 1
    study = next((tmp_path / "runs").glob("*.study"))
    assert probe.open_study(study).counts() == {"complete": 4}
    assert len(list((tmp_path / "runs").glob("*.zarr"))) == 4


def test_options_that_cannot_be_met(grid: str, call: Command, tmp_path: Path) -> None:
    for words, what in (
        (("--set", "stepz=3"), "stepz: unknown field"),
        (("--set", "steps"), "sets nothing"),
        (("--set", "seed=3"), "it is an axis"),
        (("--set", "axes.seed=0-3"), "not a range"),
        (("--set", "steps=0"), "steps: 0 is less than 1"),
        (("--shard", "3/2"), "shard"),
        (("--workers", "0"), "workers"),
        (("--workers", "2", "--cluster", "tcp://127.0.0.1:1"), "both given"),
        (("--cluster", "tcp://192.0.2.1:1"), "another machine"),
        (("--max-bytes", "1kB"), "more than --max-bytes"),
    ):
        cause, remedy = refused(call, grid, "--quiet", *words, main=sweep.main)
        assert what in cause and remedy, words
    cause, _ = refused(call, "gird.yaml", main=sweep.main)
    assert "does not exist" in cause
    assert not (tmp_path / "runs").exists()


def test_values_on_the_command_line_are_read_as_yaml() -> None:
    options = parser().parse_args(
        ["g.yaml", "--set", "axes.seed=[0, 1]", "--set", "prompt=a = b", "--set", "image=none"]
    )
    assert changes(options) == {"axes.seed": [0, 1], "prompt": "a = b", "image": "none"}
    assert changes(parser().parse_args(["g.yaml", "--keep", "summary"])) == {"keep": "summary"}
