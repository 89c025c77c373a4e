"""What users import and call: names that promise something, one rule for a run's properties and methods, and renamed names that warn."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from probe import cli, verify
from probe.deprecation import gone_in, warn_renamed
from probe.errors import ExperimentError, RecordingNotFound
from probe.reading.recording import Run
from probe.testing.synthetic import NOT_PROVEN, synthetic


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(synthetic(tmp_path_factory.mktemp("api") / "cat.zarr", prompt="a red cat"))


# --- renamed names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("since", "gone"), [("0.1", "0.3"), ("0.9", "0.11"), ("2.0.1", "2.2")])
def test_an_old_name_works_for_two_minor_versions(since: str, gone: str) -> None:
    assert gone_in(since) == gone
    with pytest.warns(DeprecationWarning, match=f"^f was renamed in {since} and is gone in {gone}. Write g.$") as caught:
        warn_renamed("f", "g", since, level=1)
    assert caught[0].filename == __file__, "the line that has to change is blamed"


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


# --- verify and diff -------------------------------------------------------------------------------------------------


def test_verify_and_diff_are_what_the_commands_print(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Run(synthetic(tmp_path / "dog.zarr", prompt="a red dog"))
    found, compared = run.verify(), run.diff(other)
    assert verify.main([str(run.path)]) == bool(found.failed)
    assert capsys.readouterr().out == f"{found}\n"
    assert cli.dispatch(["diff", str(run.path), str(other.path)]) == 1
    assert capsys.readouterr().out == f"cat  and  dog\n{compared}\n"
    assert not compared.same and "values" in str(compared) and "prompt: a red cat and a red dog" in compared.asked
    assert run.diff(Run(run.path)).same
    with pytest.raises(ExperimentError, match="other is 'latest', which is no recording"):
        run.diff("latest")  # type: ignore[arg-type]


def test_a_verdict_is_the_worst(run: Run, tmp_path: Path) -> None:
    found = run.verify()
    assert len(found) == len(list(found)) and found.verdict == found.as_json()["verdict"] != "exact"
    assert {check.name for check in found.failed} <= set(NOT_PROVEN)
    damaged = Run(synthetic(tmp_path / "cat.zarr"))
    (damaged.path / "picture.png").write_bytes(b"")
    (damaged.path / "latents" / "latents" / "zarr.json").write_bytes(b"")
    found = Run(damaged.path).verify()
    assert found.verdict == "failed" and str(found).splitlines()[-1].startswith("FAILED: ")


def test_a_run_that_verifies_loads_torch_only_then() -> None:
    code = "import sys, probe; run = probe.open_run('sample'); print('torch' in sys.modules, 'probe.proof.verdict' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
