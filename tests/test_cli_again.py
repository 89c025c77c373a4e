"""A run goes on, is recorded again, is compared with another, and what is left over goes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
import zarr
from commands import Command, cause_and_remedy, copied, damaged, refused
from recordings import change_root, cut

from probe import cli, run
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.settings.experiment import Experiment
from probe.terminal import shell_path
from probe.writing.store import RunWriter

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="session")
def from_disk(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording of the saved model, which can be loaded again.

    Not to be changed: `cut` it, or take a copy.
    """
    folder = tmp_path_factory.mktemp("disk")
    asked = {
        "name": "mine",
        "model": str(saved),
        "prompt": "a cat",
        "steps": 4,
        "scheduler": "DDIM",
        "device": "cpu",
        "output": str(folder),
    }
    return record(asked, progress=False)


def test_an_interrupted_run_goes_on(call: Command, from_disk: Run, tmp_path: Path) -> None:
    left = cut(from_disk, tmp_path, 2)
    code, out, err = call(run.main, "--resume", "latest", "--output", tmp_path)
    assert code == 0 and "Traceback" not in err
    assert (
        f"Resuming {left.path}: 2 of 4 model calls are there" in err and "Not as it was" not in err
    )
    for part in (
        f"Recording  {left.path}",
        "Pictures   contact-sheet.png, picture.png",
        f"probe verify {left.name} --runs {tmp_path}",
    ):
        assert part in out
    assert compare(from_disk, Run(left.path)).same and Run(left.path).status == "complete"
    code, out, err = call(cli.dispatch, "run", "--resume", left.path)
    assert (
        code == 0
        and err.endswith(f"{left.name} is complete already.\n")
        and f"Recording  {left.path}" in out
    )
    code, out, err = call(cli.dispatch, "run", "--quiet", "--resume", left.path)
    assert (code, out, err) == (0, f"{left.path}\n", "")


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (
            ["--resume", "mine", "mine.yaml"],
            "goes on as it was asked: no experiment, no other option",
            "Give --resume RUN alone",
        ),
        (["--resume", "mine", "--seed", "7"], "goes on as it was asked", "Give --resume RUN alone"),
        (
            ["--resume", "mine", "--capture.text", "false"],
            "goes on as it was asked",
            "Give --resume RUN alone",
        ),
        (["--resume", "mine", "--dry-run"], "goes on as it was asked", "Give --resume RUN alone"),
        (
            ["--resume", "mine", "--max-bytes", "1GB"],
            "goes on as it was asked",
            "Give --resume RUN alone",
        ),
        (["--resume"], "--resume: expected one argument", "--help"),
        (["--resume", ""], "No recording in runs begins with ''", "mine"),
        (["--resume", "nime"], "No recording in runs begins with 'nime'", "There are: mine-"),
        (
            ["--resume", "mine", "--output", "nowhere"],
            "There is no recording in nowhere.",
            "Make one",
        ),
    ],
)
def test_going_on_takes_a_recording_and_nothing_else(
    call: Command, from_disk: Run, tmp_path: Path, arguments: list[str], cause: str, remedy: str
) -> None:
    left = cut(from_disk, tmp_path / "runs", 2)
    before = (left.path / "zarr.json").read_bytes()
    found = refused(call, *arguments)
    assert cause in found[0] and remedy in found[1]
    assert (left.path / "zarr.json").read_bytes() == before and Run(
        left.path
    ).status == "interrupted"


def test_going_on_with_other_weights_is_refused(
    call: Command, from_disk: Run, model: Path, tmp_path: Path
) -> None:
    tiny.pipeline(seed=1).save_pretrained(model)
    left = cut(from_disk, tmp_path / "runs", 2)
    change_root(left, lambda attributes: attributes["experiment"].update(model=str(model)))
    cause, remedy = cause_and_remedy(call(run.main, "--resume", left.path)[2])
    assert (
        cause.startswith(f"{left.name} was begun with other weights of {model}")
        and "probe rerun" in remedy
    )


def test_a_rerun_has_the_same_bits_and_says_so(
    call: Command, from_disk: Run, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(from_disk.path, runs / from_disk.path.name)
    code, out, err = call(cli.dispatch, "rerun", "mine")
    assert code == 0 and "Denoising" in err
    (path,) = (path for path in runs.iterdir() if path.name != from_disk.path.name)
    again = Run(path)
    assert again.status == "complete" and again.attributes["parent_run"] == from_disk.name
    assert out.splitlines() == [
        f"Recorded runs/{path.name}",
        f"{from_disk.name}  and  {again.name}",
        "  asked       the same",
        "  conditions  the same",
        f"  values      the same bits in all {compare(from_disk, again).variables} variables",
    ]
    code, out, err = call(cli.dispatch, "rerun", path, "--quiet")
    assert (
        code == 0
        and "Denoising" not in err
        and "the same bits" in out
        and len(list(runs.iterdir())) == 3
    )


def test_a_rerun_under_other_conditions_names_them(
    call: Command, from_disk: Run, model: Path, tmp_path: Path
) -> None:
    tiny.pipeline(seed=1).save_pretrained(model)
    copy = Run(Path(shutil.copytree(from_disk.path, tmp_path / "runs" / from_disk.path.name)))
    change_root(copy, lambda attributes: attributes["experiment"].update(model=str(model)))
    change_root(
        copy, lambda attributes: attributes["environment"].update(threads=64, device="cuda")
    )
    code, out, _ = call(cli.dispatch, "rerun", "mine", "--quiet")
    assert code == 1
    assert re.search(
        r"^  conditions  device: cuda and cpu\n +threads: 64 and 1\n +weights: [0-9a-f]+ and "
        r"[0-9a-f]+$",
        out,
        re.MULTILINE,
    )
    assert re.search(
        r"^/latents/prediction +values differ +\d+ of 1024 +[\d.e-]+ +0$", out, re.MULTILINE
    )


def test_diff_tells_what_differs_and_where(call: Command, runs: Path) -> None:
    first = next(runs.glob("small-*.zarr")).name.removesuffix(".zarr")
    twin = copied(runs, "twin-11111111")
    code, out, err = call(cli.dispatch, "diff", "small", "twin")
    assert (
        (code, err) == (0, "")
        and "the same bits in all" in out
        and out.startswith(f"{first}  and  twin-11111111\n")
    )
    latents = zarr.open_array(twin, path="latents/latents", mode="r+")
    latents[1, 0, 0, 0, 0] += 0.25
    code, out, err = call(cli.dispatch, "diff", "twin", "small")
    assert (code, err) == (1, "") and "  values      1 of " in out
    assert re.search(r"^variable +values +by at most +first at step$", out, re.MULTILINE)
    assert re.search(r"^/latents/latents +values differ +1 of 768 +0.25 +1$", out, re.MULTILINE)


def test_diff_of_unlike_runs(call: Command, runs: Path) -> None:
    """Another seed, another number of steps, another type: what was asked, and the sizes and
    types.
    """
    base = {"name": "other", "prompt": "a cat on\nthe hat", "output": str(runs)}
    for name, changes, pipe in (
        ("seed", {"steps": 2, "seed": 9}, tiny.pipeline()),
        ("steps", {"steps": 3}, tiny.pipeline()),
        ("dtype", {"steps": 2}, tiny.pipeline().to(torch.float16)),
    ):
        record({**base, "name": name, **changes}, pipeline=pipe, progress=False)
    code, out, _ = call(cli.dispatch, "diff", "small", "seed")
    assert (
        code == 1
        and "  asked       seed: 0 and 9\n  conditions  the same\n" in out
        and re.search(r"^/images/final +values differ", out, re.MULTILINE)
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "steps")
    assert (
        code == 1
        and "  asked       steps: 2 and 3\n" in out
        and "sizes {'step': 3, " in out
        and "/committed " in out
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "dtype")
    assert (
        code == 1
        and "  conditions  dtype: float32 and float16\n" in out
        and "types float32 and float16" in out
    )


@pytest.mark.parametrize("folder", ["runs", "two words", "~not-home", "it's", "漢"])
def test_paths_in_commands_to_copy_are_what_a_shell_takes(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home of mine"))
    for path in (
        tmp_path / folder / "a.zarr",
        tmp_path / "home of mine" / folder / "a.zarr",
        Path(folder) / "a.zarr",
    ):
        said = subprocess.run(
            ["bash", "-c", f"printf %s {shell_path(path)}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said == str(path) and ("home of mine" not in shell_path(path))


def test_diff_counts_shared_variables_apart_from_the_others(call: Command, runs: Path) -> None:
    record(
        {
            "name": "queries",
            "prompt": "a cat on\nthe hat",
            "steps": 3,
            "output": str(runs),
            "capture": {"attention": "queries"},
        },
        tiny.pipeline(),
    )
    code, out, _ = call(cli.dispatch, "diff", "small", "queries")
    (counted,) = re.findall(
        r"^  values      (\d+) of (\d+) variables differ, and (\d+) are not in both$",
        out,
        re.MULTILINE,
    )
    differ, shared, alone = map(int, counted)
    assert (
        code == 1
        and 0 < differ <= shared
        and alone == len(re.findall(r"^/\S+ +only in the (?:first|second)$", out, re.MULTILINE))
    )
    assert differ + alone + 1 == len(re.findall(r"^/", out, re.MULTILINE)), (
        "and one row for the steps that are committed"
    )


@pytest.mark.parametrize("gone", ["environment", "model"])
def test_diff_of_one_that_does_not_say_where_it_ran(call: Command, runs: Path, gone: str) -> None:
    root = copied(runs, "odd-11111111") / "zarr.json"
    content = json.loads(root.read_text())
    del content["attributes"][gone]
    root.write_text(json.dumps(content))
    cause, remedy = refused(call, "diff", "small", "odd", main=cli.dispatch)
    assert (
        cause.endswith(f"odd-11111111.zarr is damaged: its {gone} is missing.")
        and remedy == "Record it again, or remove it."
    )


def test_diff_names_what_it_cannot_find(call: Command, runs: Path) -> None:
    damaged(runs)
    assert "begins with 'samll'" in refused(call, "diff", "samll", "small", main=cli.dispatch)[0]
    assert (
        "broken-00000000.zarr is damaged"
        in refused(call, "diff", "small", "broken", main=cli.dispatch)[0]
    )
    assert (
        "the following arguments are required: b"
        in refused(call, "diff", "small", main=cli.dispatch)[0]
    )


def test_gc_removes_what_dead_writers_left_and_no_recording(call: Command, runs: Path) -> None:
    from probe.format.schema import spec

    kept = sorted(runs.iterdir())
    attributes = {
        "format_version": 1,
        "created": "2026-01-01",
        "experiment": Experiment().resolved(),
    }
    code, out, err = call(cli.dispatch, "gc")
    assert (code, out, err) == (0, "Nothing to remove in runs.\n", "")
    left = [
        runs / ".dead-11111111.zarr.0123abcd.partial",
        runs / ".dead-11111111.zarr.lock",
        kept[0] / "zarr.json.0123abcd.partial",
    ]
    left[0].mkdir()
    for file in left[1:]:
        file.write_text("")
    with RunWriter(runs / "live-11111111.zarr", [spec("", "committed", (2,))], attributes):
        living = [runs / "live-11111111.zarr", runs / ".live-11111111.zarr.lock"]
        code, out, err = call(cli.dispatch, "gc", "--dry-run")
        assert (
            (code, err) == (0, "")
            and out.endswith("\nWould remove 3 left by writers that died.\n")
            and all(path.exists() for path in left)
        )
        assert {Path(line) for line in out.splitlines()[:-1]} == {
            path.relative_to(runs.parent) for path in left
        }
        code, out, err = call(cli.dispatch, "gc", runs)
        assert (
            (code, err) == (0, "")
            and out.endswith("\nRemoved 3 left by writers that died.\n")
            and not any(path.exists() for path in left)
        )
        assert sorted(runs.iterdir()) == sorted(kept + living)
    assert call(cli.dispatch, "gc", "nowhere")[:2] == (0, "Nothing to remove in nowhere.\n")
