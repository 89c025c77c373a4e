"""Every command can be learnt from itself: what it does, its options and their defaults, the version, the exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from probe import cli
from probe.schema import FORMAT_VERSION
from probe.terminal import guarded

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> object:
    def called(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            guarded(cli.dispatch, arguments)
        return int(str(end.value.code)), *capsys.readouterr()

    return called


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb(verb: str, said: object) -> None:
    code, out, err = said(verb, "--help")  # type: ignore[operator]
    assert (code, err) == (0, "") and said("help", verb) == (code, out, err)  # type: ignore[operator]
    head, _, options = out.partition("\n\n")
    assert head.startswith("usage: ") and re.match(r"[A-Z`p]", options), "it says what the command does, before its options"
    if verb not in ("run", "noising"):  # those write into --output
        assert re.search(r"folder of recordings \[runs\]", re.sub(r"\s+", " ", out)), "where it looks if nothing is said"


def test_the_overview_teaches(said: object) -> None:
    for arguments in ((), ("help",), ("--help",)):
        code, out, err = said(*arguments)  # type: ignore[operator]
        assert (code, err) == (0, "")
        for word in ("--version", "VERB --help", "Exit codes: 0 done", "130", "sample", "latest", *(f"probe {verb}" for verb in cli.VERBS)):
            assert word in re.sub(r"\s+", " ", out), word


def test_the_version(said: object) -> None:
    for word in ("--version", "-V", "version"):
        code, out, err = said(word)  # type: ignore[operator]
        assert (code, err) == (0, "") and re.fullmatch(rf"probe \S+.*format {FORMAT_VERSION} \(draft\) and reads 1 and 2\n", out)


@pytest.mark.parametrize("arguments", [("helpp",), ("help", "lss"), ("--halp",), ("lss", "--help")])
def test_a_verb_that_is_none(arguments: tuple[str, ...], said: object) -> None:
    code, out, err = said(*arguments)  # type: ignore[operator]
    assert (code, out) == (2, "") and re.fullmatch(r"error: There is no verb '\S+'\.\n       \S[^\n]+\n", err)


@pytest.mark.parametrize("where", [("ls", "there"), ("ls", "--runs", "there"), ("gc", "there"), ("gc", "--runs", "there")])
def test_a_folder_is_named_either_way(where: tuple[str, ...], said: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(*where)  # type: ignore[operator]
    assert code == 0 and "in there" in out


def test_python_m_probe_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "probe", "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("probe ")
