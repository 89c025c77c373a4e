"""Every command explains itself: what it does, options and defaults, the version, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from probe import cli
from probe.format.schema import FORMAT_VERSION
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
    assert head.startswith("usage: ") and re.match(r"[A-Z`p]", options), (
        "it says what the command does, before its options"
    )
    # those write into their `output`; cost and web read no recording
    if verb not in ("run", "noising", "sweep", "cost", "web"):
        assert re.search(r"folder of recordings \[runs\]", re.sub(r"\s+", " ", out)), (
            "where it looks if nothing is said"
        )


def test_the_overview_teaches(said: object) -> None:
    for arguments in ((), ("help",), ("--help",)):
        code, out, err = said(*arguments)  # type: ignore[operator]
        assert (code, err) == (0, "")
        for word in (
            "--version",
            "VERB --help",
            "Exit codes: 0 done",
            "130",
            "sample",
            "latest",
            *(f"probe {verb}" for verb in cli.VERBS),
        ):
            assert word in re.sub(r"\s+", " ", out), word


def test_the_version(said: object) -> None:
    for word in ("--version", "-V", "version"):
        code, out, err = said(word)  # type: ignore[operator]
        assert (code, err) == (0, "") and re.fullmatch(
            rf"probe \S+.*format {FORMAT_VERSION} \(draft\) and reads 1 and 2\n", out
        )


def test_a_usage_line_is_what_was_called(said: object) -> None:
    for verb in cli.VERBS:
        out = said(verb, "--help")[1]  # type: ignore[operator]
        assert out.startswith(f"usage: probe {verb} ") and "python -m probe." not in out
    for module in ("run", "noising", "verify"):
        command = [sys.executable, "-m", f"probe.{module}", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (
            done.stdout.startswith(f"usage: python -m probe.{module} ")
            and f"\npython -m probe.{module} " in done.stdout
        )


@pytest.mark.parametrize("verb", ["show", "verify", "ask", "diff", "rerun"])
def test_a_recording_is_named_in_every_way(verb: str, said: object) -> None:
    assert "a path, the beginning of a name, latest, or sample" in re.sub(
        r"\s+", " ", said(verb, "--help")[1]
    )  # type: ignore[operator]


@pytest.mark.parametrize("verb", ["run", "noising", "ls", "show", "verify", "rerun", "gc"])
def test_a_verb_says_who_tells_the_version(verb: str, said: object) -> None:
    code, _, err = said(verb, "--version")  # type: ignore[operator]
    assert code == 2 and err.endswith("\n       See probe --version.\n")


def test_the_version_needs_no_numpy() -> None:
    """OpenBLAS stops the process, as Ctrl-C does, where the system limits its memory."""
    code = (
        "import sys; sys.modules['numpy'] = None; from probe import cli; "
        "sys.exit(cli.dispatch(['--version']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("probe "), done.stderr


@pytest.mark.parametrize(("option", "code"), [("-O", 0), ("-OO", 2)])
def test_help_is_whole_or_refused(option: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, option, "-m", "probe", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and ("probe gc" in done.stdout) == (not code)
    assert not code or (
        done.stderr.startswith("error: python -OO takes away texts")
        and "Leave out -OO" in done.stderr
    )


@pytest.mark.parametrize("arguments", [("helpp",), ("help", "lss"), ("--halp",), ("lss", "--help")])
def test_a_verb_that_is_none(arguments: tuple[str, ...], said: object) -> None:
    code, out, err = said(*arguments)  # type: ignore[operator]
    assert (code, out) == (2, "") and re.fullmatch(
        r"error: There is no verb '\S+'\.\n       \S[^\n]+\n", err
    )


@pytest.mark.parametrize(
    "where",
    [("ls", "there"), ("ls", "--runs", "there"), ("gc", "there"), ("gc", "--runs", "there")],
)
def test_a_folder_is_named_either_way(
    where: tuple[str, ...], said: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(*where)  # type: ignore[operator]
    assert code == 0 and "in there" in out


def test_python_m_probe_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "probe", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("probe ")
