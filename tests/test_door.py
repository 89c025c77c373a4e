"""Nothing that somebody else wrote reaches a terminal as an escape or a control character.

Nor does a mark that turns text around.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from probe import cli, noising, run, verify
from probe.errors import StoreError
from probe.output import harmless_streams, say, say_json, tell
from probe.reading.sample import unpacked
from probe.terminal import guarded

HOSTILE = (
    "x\x1b[31mred\x1b]0;title\x07\x9b2J\u202eevil\u2066\u200f\u061c\r\nfake line\x7f\ufeff\u2028z"
)
STEERS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.chdir(tmp_path)

    def called(
        *arguments: object, main: Callable[[list[str]], int] = cli.dispatch
    ) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            guarded(main, [str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert not STEERS.search(out + err), (arguments, STEERS.search(out + err))
        assert "fake line" not in (out + err).split("\n"), (
            "a line break of a value is no line break of ours"
        )
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return called


def poisoned(value: Any, leave: tuple[str, ...] = ()) -> Any:
    """Every text in a value made hostile, but for the names in `leave`."""
    if isinstance(value, dict):
        return {
            key: item if key in leave else poisoned(item, leave) for key, item in value.items()
        } | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [poisoned(item, leave) for item in value]
    return HOSTILE if isinstance(value, str) else value


def copy(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    path = Path(shutil.copytree(unpacked(), folder / f"{name}.zarr"))
    root = json.loads((path / "zarr.json").read_text())
    change(root)
    (path / "zarr.json").write_text(json.dumps(root))
    return path


def of_the_environment(root: dict[str, Any]) -> None:
    """What a reader takes as it comes: conditions, and fields of an experiment that this version
    does not know.
    """
    attributes = root["attributes"]
    attributes["environment"] = poisoned(attributes["environment"], ("device", "device_name"))
    attributes["experiment"]["unlisted"] = HOSTILE
    attributes["model"] = poisoned(attributes["model"], ("name", "revision", "dtype", "weights"))


def of_the_nodes(root: dict[str, Any]) -> None:
    for node in root["consolidated_metadata"]["metadata"].values():
        node["attributes"] = poisoned(node.get("attributes", {}))


def of_everything(root: dict[str, Any]) -> None:
    root["attributes"] = poisoned(root["attributes"], ("status",))


COMMANDS: list[tuple[object, ...]] = [
    *(
        ("ls",),
        ("show", "evil"),
        ("verify", "evil"),
        ("verify", "evil", "--json"),
        ("diff", "evil", "good"),
        ("diff", "good", "evil"),
    ),
    *(
        ("ask", "evil", "cat"),
        ("ask", "evil", HOSTILE),
        ("show", "evil", "--words"),
        ("run", "--resume", "evil"),
        ("rerun", "evil"),
    ),
    *(
        ("rm", "evil"),
        ("gc",),
        ("show", HOSTILE),
        ("ls", HOSTILE),
        ("ls", "--runs", HOSTILE),
        ("gc", HOSTILE),
        (HOSTILE,),
        ("help", HOSTILE),
    ),
    *(
        ("ls", "--debug", f"--{HOSTILE}"),
        ("show", "--debug", "evil", HOSTILE),
        ("diff", "evil", HOSTILE, "--debug"),
        ("run", HOSTILE),
    ),
    *(
        ("run", "--prompt", HOSTILE),
        ("run", "--model", HOSTILE),
        ("run", f"--{HOSTILE}", "1"),
        ("run", "--max-bytes", HOSTILE),
    ),
    *(
        ("noising", HOSTILE),
        ("noising", "--picture", HOSTILE, "--dry-run"),
        ("verify", "evil", "--model", "--steps", HOSTILE),
    ),
]


@pytest.mark.parametrize(
    "change", [of_the_environment, of_the_nodes, of_everything], ids=lambda change: change.__name__
)
def test_no_command_prints_what_a_recording_says_as_it_is(
    call: Command, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    evil = copy(tmp_path / "runs", "evil-11111111", change)
    copy(tmp_path / "runs", "good-22222222", lambda _: None)
    heard = ""
    for arguments in COMMANDS if change is of_the_environment else COMMANDS[:12]:
        _, out, err = call(*arguments)
        heard += out + err
    if change is of_the_environment:
        assert "?[31mred" in heard, "the hostile text was shown, made harmless"
        _, out, _ = call("diff", "evil", "good")
        assert (
            "torch: x?[31mred" in out
            and "diffusers: x?[31mred" in out
            and "unlisted: x?[31mred" in out
        )
    assert evil.is_dir()


@pytest.mark.parametrize(("part", "name"), [("environment", "device_name"), ("model", "weights")])
def test_what_is_checked_on_opening_is_refused_by_its_name(
    call: Command, tmp_path: Path, part: str, name: str
) -> None:
    copy(
        tmp_path / "runs",
        "evil-11111111",
        lambda root: root["attributes"][part].update({name: HOSTILE}),
    )
    code, out, err = call("show", "evil")
    assert code == 2 and out == "" and f"its {part}.{name} is not what a recording has there" in err


def test_labels_and_file_names(call: Command, tmp_path: Path) -> None:
    evil = copy(tmp_path / "runs", "evil-11111111", lambda _: None)
    for path in ("text/text_encoder/word", "text/text_encoder/token_text"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array: Any = zarr.open_array(evil, path=path, mode="r+")
            array[...] = HOSTILE
    (evil / f"{HOSTILE.replace('/', '')}.png").write_bytes(b"")
    (tmp_path / "runs" / f"{HOSTILE}.zarr").mkdir()
    for arguments in (("ls",), ("show", "evil"), ("verify", "evil"), ("show", HOSTILE)):
        call(*arguments)


def test_the_own_commands_too(call: Command) -> None:
    for main in (run.main, noising.main, verify.main):
        assert call(HOSTILE, main=main)[0] == 2
        assert call("--debug", f"--{HOSTILE}", main=main)[0] == 2


def test_json_is_json_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({HOSTILE: [HOSTILE, "\U000e0001", "中文"]})
    out = capsys.readouterr().out
    assert (
        not STEERS.search(out)
        and json.loads(out) == {HOSTILE: [HOSTILE, "\U000e0001", "中文"]}
        and "中文" in out
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "gbk", "utf-16"])
def test_a_terminal_of_another_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    say("中文 é 😀 \udce4", "b")
    say_json(["中文 😀"])
    sys.stdout.flush()
    text = raw.getvalue().decode(encoding)
    assert text.split("\n")[1] == "b" and ("\\u4e2d" in text or "中文" in text)
    assert json.loads(text[text.index("[") :]) == ["中文 😀"]


def test_what_libraries_print_passes_too(capsys: pytest.CaptureFixture[str]) -> None:
    with harmless_streams():
        sys.stderr.write(HOSTILE)
        sys.stdout.writelines([HOSTILE, "\t|"])
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, HOSTILE, 1))
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": HOSTILE}))
    out, err = capsys.readouterr()
    assert err.count("red") == 4 and not STEERS.search((out + err).replace("\r", "")), (
        "\\r is a progress bar's"
    )


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, os.strerror(28))


def test_nobody_need_hear_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, Full()):
        monkeypatch.setattr(sys, "stderr", stream)
        tell("how far")
        with harmless_streams():
            tell("how far")
            sys.stderr.write("a library")
            sys.stderr.flush()
            assert not sys.stderr.isatty()


def test_a_result_that_cannot_be_printed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody listens")
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(StoreError, match="could not be written: No space left"):
        say("the result")
