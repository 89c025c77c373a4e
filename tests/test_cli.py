"""Looking at recordings from a terminal: list, show, verify and remove; help for every verb."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
import zarr
from commands import ROOT, Command, cause_and_remedy, copied, damaged, process, refused

from probe import cli
from probe.output import rows
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.settings.experiment import Experiment
from probe.writing.store import RunWriter

pytestmark = pytest.mark.usefixtures("own_folder")


def test_words_of_a_prompt_without_any(call: Command, runs: Path) -> None:
    record(
        {"name": "wordless", "prompt": "", "steps": 1, "output": str(runs)},
        tiny.pipeline(),
        progress=False,
    )
    code, out, err = call(cli.dispatch, "show", "wordless", "--words")
    assert (code, err) == (0, "") and out.endswith(
        "words.png\nThe prompt has no words: there is no map to draw.\n"
    )
    assert call(cli.dispatch, "show", "small", "--words")[1].endswith("words.png\n")


def test_ls_of_nothing_says_how_to_begin(call: Command, tmp_path: Path) -> None:
    for folder in ("nowhere", str(tmp_path)):
        code, out, err = call(cli.dispatch, "ls", folder)
        assert (code, err) == (0, "") and out == (
            f"No recording in {folder} yet. Make one: python -m probe.run\n"
            "With probe come: sample, sample-guidance-8, sample-noising.\n"
        )


def test_ls_has_a_row_for_each_also_for_a_damaged_one(call: Command, runs: Path) -> None:
    name = next(runs.glob("small-*.zarr")).name.removesuffix(".zarr")
    damaged(runs)
    experiment = Experiment(prompt="an old cat " + "and a hat " * 20).resolved()
    copied(
        runs,
        "old-11111111",
        created="2020-01-01T00:00:00.000+00:00",
        status="failed",
        experiment=experiment,
    )
    code, out, err = call(cli.dispatch, "ls")
    header, *lines = out.partition("\n\nWith probe come: ")[0].splitlines()
    assert (code, err) == (
        0,
        "",
    ) and header.split() == "recording status model sampling prompt created (UTC)".split()
    assert [line.split()[:2] for line in lines] == [
        [name, "complete"],
        ["old-11111111", "failed"],
        ["broken-00000000", "damaged"],
    ]
    assert "2 steps, guidance 3, seed 0" in lines[0] and "a cat on the hat" in lines[0], (
        "a prompt of two lines is one row"
    )
    assert "an old cat and a hat and a hat and a ..." in lines[1] and lines[1].endswith(
        "2020-01-01 00:00"
    )


def test_what_others_made_does_not_steer_the_terminal(call: Command, runs: Path) -> None:
    hostile = {
        **Experiment().resolved(),
        "prompt": "a \x1b[31mred\x1b[0m cat\x07",
        "model": "m\x1b]0;title\x07",
    }
    copied(runs, "hostile-11111111", experiment=hostile)
    code, out, _ = call(cli.dispatch, "ls")
    assert (
        code == 0 and "hostile-11111111" in out and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)
    )
    code, out, err = call(cli.dispatch, "show", "hostile")
    assert code == 2 and "damaged" in err and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out + err)


def test_show_tells_what_is_inside(call: Command, runs: Path) -> None:
    path = next(runs.glob("small-*.zarr"))
    for arguments in (
        [],
        ["latest"],
        ["small"],
        [path.name],
        [str(path)],
        [path.name.removesuffix(".zarr"), "--runs", str(runs)],
    ):
        code, out, err = call(cli.dispatch, "show", *arguments)
        assert (code, err) == (0, "")
    assert (
        "complete, 3 of 3 model calls" in out
        and "PNDMScheduler, 2 steps, guidance 3, seed 0" in out
    )
    assert re.search(
        r"^/attention/8x8/cross +float16 +step 3 x token \d+ x branch 1 ", out, re.MULTILINE
    )
    of_unet = (
        r"^unet +\d+\.\d\d s +\d+\.\d\d GFLOP a call +\d+\.\d M parameters +\d+\.\d MB of weights$"
    )
    assert re.search(of_unet, out, re.MULTILINE) and re.search(
        r"^peak memory +\d+ MB$", out, re.MULTILINE
    )
    assert str(path / "contact-sheet.png") in out and str(path / "picture.png") in out


def test_show_of_a_run_that_did_not_finish(call: Command, runs: Path) -> None:
    path = copied(runs, "half-11111111", status="interrupted")
    code, out, err = call(cli.dispatch, "show", path)
    assert (
        (code, err) == (0, "")
        and "interrupted, 3 of 3 model calls" in out
        and "peak memory" not in out
    )


def test_show_of_a_recording_of_format_1(call: Command) -> None:
    code, out, err = call(cli.dispatch, "show", str(ROOT / "tests" / "format_1" / "default.zip"))
    assert (code, err) == (0, "")
    assert re.search(r"^unet +\d+\.\d\d s +\d+\.\d\d GFLOP a call$", out, re.MULTILINE)


@pytest.mark.parametrize("gone", ["cost", "cost/flops", "cost/component"])
def test_show_of_a_complete_recording_without_its_costs(
    call: Command, runs: Path, gone: str
) -> None:
    path = next(runs.glob("small-*.zarr"))
    shutil.rmtree(path / gone)
    root = json.loads((path / "zarr.json").read_text())
    nodes = root["consolidated_metadata"]["metadata"]
    for name in [name for name in nodes if name == gone or name.startswith(f"{gone}/")]:
        del nodes[name]
    (path / "zarr.json").write_text(json.dumps(root))
    code, out, err = call(cli.dispatch, "show", path)
    assert (
        (code, err) == (0, "")
        and "complete, 3 of 3 model calls" in out
        and "peak memory" not in out
        and "picture.png" in out
    )


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\x9b31m", "a\n\x07", "a\u202etxt", os.fsdecode(b"a\xff")], ids=ascii
)
def test_the_name_of_a_folder_does_not_steer_the_terminal(
    call: Command, runs: Path, name: str
) -> None:
    one, other, broken = (runs / f"{name}-{tail}.zarr" for tail in ("1", "2", "3"))
    for path in (one, other):
        shutil.copytree(next(runs.glob("small-*.zarr")), path)
    broken.mkdir()
    (one / f"{name}.png").touch()
    (one / "latents" / name).touch()
    half = runs / f".{name}-4.zarr.0a0a0a0a.partial"
    half.mkdir()
    codes = {}
    commands: list[list[Any]] = [
        *(["ls"], ["ls", runs / name], ["gc", runs]),
        *(
            ["show", one],
            ["show", name],
            ["show", broken],
            ["show", f"{name}-9"],
            ["show", "nowhere", "--runs", runs / name],
        ),
        *(
            ["verify", one],
            ["verify", one, "--json"],
            ["diff", one, other],
            ["rm", one, f"{name}-3", "--yes"],
        ),
    ]
    for arguments in commands:
        code, out, err = call(cli.dispatch, *arguments)
        assert (out + err).replace("\n", "").isprintable() and "Traceback" not in err, arguments
        codes[" ".join(map(str, arguments)).replace(str(runs), "").replace(name, "*")] = code
    assert list(codes.values()) == [0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 0, 0], codes
    assert not one.exists() and not broken.exists() and not half.exists() and other.is_dir()


@pytest.mark.parametrize("verb", ["show", "verify", "rm"])
def test_names_that_are_none_or_several(call: Command, runs: Path, verb: str) -> None:
    copied(runs, "twin-11111111")
    copied(runs, "twin-22222222")
    cause, remedy = refused(call, verb, "twin", main=cli.dispatch)
    assert (
        cause == "2 recordings begin with 'twin'."
        and "twin-11111111" in remedy
        and "twin-22222222" in remedy
    )
    cause, remedy = refused(call, verb, "twni-11111111", main=cli.dispatch)
    assert "begins with 'twni-11111111'" in cause and "Did you mean twin-11111111" in remedy
    cause, remedy = refused(call, verb, "latest", "--runs", "nowhere", main=cli.dispatch)
    assert cause == "There is no recording in nowhere." and "python -m probe.run" in remedy
    assert len(list(runs.iterdir())) == 3


@pytest.mark.parametrize("verb", ["show", "verify"])
def test_a_damaged_recording_is_said_to_be(call: Command, runs: Path, verb: str) -> None:
    damaged(runs)
    cause, remedy = refused(call, verb, "broken", main=cli.dispatch)
    assert "broken-00000000.zarr is damaged" in cause and remedy == "Record it again, or remove it."


def test_verify_is_0_for_a_good_one_and_1_for_a_changed_one(call: Command, runs: Path) -> None:
    code, out, err = call(cli.dispatch, "verify")
    assert (code, err) == (0, "") and "failed" not in out
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [
        "manifest",
        "digests",
        "committed",
        "schema",
    ]
    chunk = next(runs.glob("*.zarr/latents/latents/c.1.*"))
    chunk.unlink()
    code, out, err = call(cli.dispatch, "verify")
    assert (code, err) == (1, "") and re.search(
        r"^  manifest +failed +1 files missing: latents/latents/c.1", out, re.MULTILINE
    )


def test_rm_does_nothing_unasked(
    call: Command, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(runs.iterdir())
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, out, err = call(cli.dispatch, "rm", "small")
    assert code == 2 and cause_and_remedy(err) == (
        "Nothing was removed: there is nobody to ask.",
        "Give --yes to remove without asking.",
    )
    assert path.is_dir()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("", "n", "no", "perhaps"):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        code, out, _ = call(cli.dispatch, "rm", "small")
        assert code == 0 and out.endswith("Nothing was removed.\n") and path.is_dir()
    monkeypatch.setattr("builtins.input", lambda question: {"Remove this? [y/N] ": "Y"}[question])
    code, out, _ = call(cli.dispatch, "rm", "small")
    assert code == 0 and out.endswith("Removed 1.\n") and not path.exists()


def test_rm_removes_several_once_each_and_damaged_ones_too(call: Command, runs: Path) -> None:
    kept = copied(runs, "kept-11111111")
    damaged(runs)
    (runs / "empty-22222222.zarr").mkdir()
    code, out, err = call(cli.dispatch, "rm", "small", "small", "broken", "empty", "--yes")
    assert (
        (code, err) == (0, "") and out.endswith("Removed 3.\n") and list(runs.iterdir()) == [kept]
    )
    broken = damaged(runs)
    code, out, err = call(cli.dispatch, "rm", broken.absolute(), "--yes")
    assert (code, err) == (0, "") and list(runs.iterdir()) == [kept], "by its absolute path too"


def test_rm_asks_the_lock_and_not_the_status(call: Command, runs: Path) -> None:
    """A killed writer's number may be somebody else's by now, and a copy's writer is on another
    machine.
    """
    for name, writer in (
        ("reused-11111111", {"pid": os.getpid(), "host": socket.gethostname()}),
        ("away-22222222", {"pid": 1, "host": "elsewhere"}),
    ):
        copied(runs, name, status="running", writer=writer)
    reused = runs / "reused-11111111.zarr"
    assert Run(reused).status == "running"
    code, out, err = call(cli.dispatch, "rm", "reused", reused.absolute(), "away", "--yes")
    assert (
        (code, err) == (0, "") and out.endswith("Removed 2.\n") and len(list(runs.iterdir())) == 1
    )


def test_rm_takes_only_recordings(call: Command, runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    zarr.create_group(other)
    assert "damaged" in refused(call, "rm", other, "--yes", main=cli.dispatch)[0]
    assert refused(call, "rm", tmp_path, "--yes", main=cli.dispatch)[0].startswith(
        "No recording in runs begins with"
    )
    assert refused(call, "rm", "", "--yes", main=cli.dispatch)[0].startswith(
        "No recording in runs begins with"
    )
    assert other.is_dir() and len(list(runs.iterdir())) == 1


def test_rm_refuses_one_that_is_being_written_and_all_that_go_with_it(
    call: Command, runs: Path
) -> None:
    from probe.format.schema import spec

    attributes = {
        "format_version": 1,
        "created": "2026-01-01",
        "experiment": Experiment().resolved(),
    }
    with RunWriter(runs / "live-11111111.zarr", [spec("", "committed", (2,))], attributes):
        cause, remedy = refused(call, "rm", "small", "live", "--yes", main=cli.dispatch)
        assert (
            cause.startswith("live-11111111.zarr is being written by")
            and remedy == "Stop its writer first."
        )
        assert len(list(runs.glob("*.zarr"))) == 2
    assert call(cli.dispatch, "rm", "live", "--yes")[0] == 0


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [
        ("lss", "Did you mean ls?"),
        ("verfy", "Did you mean verify"),
        ("dance", "There are: run, noising"),
    ],
)
def test_an_unknown_verb_suggests(call: Command, verb: str, remedy: str) -> None:
    cause, found = refused(call, verb, main=cli.dispatch)
    assert cause == f"There is no verb {verb!r}." and remedy in found


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_the_overview_names_every_verb(call: Command, arguments: list[str]) -> None:
    code, out, _ = call(cli.dispatch, *arguments)
    assert code == 0
    for verb in cli.VERBS:
        assert re.search(rf"^    probe {verb}\b", out, re.MULTILINE), verb


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help_and_notices_a_misspelled_option(call: Command, verb: str) -> None:
    code, out, _ = call(cli.dispatch, verb, "--help")
    assert code == 0 and out.startswith("usage: ")
    cause, remedy = refused(
        call, verb, *["x"] * (2 if verb in ("ask", "diff") else 1), "--halp", main=cli.dispatch
    )
    assert "--halp" in cause and remedy == "Did you mean --help?"


def test_a_reader_that_has_seen_enough_is_no_error(runs: Path) -> None:
    """`probe ls | head -1`: no complaint, whether the pipe closes while we write or before."""
    for verb in ("ls", "show"):
        running = process("probe.cli", verb)
        assert running.stdout and running.stderr
        running.stdout.close()
        with running.stderr:
            err = running.stderr.read()
        assert (running.wait(60), err) == (0, ""), verb


def test_tables_are_aligned() -> None:
    assert rows([("a", "long one", "x"), ("bbb", "", "")], ("1", "2", "3")) == [
        "1    2         3",
        "a    long one  x",
        "bbb",
    ]
