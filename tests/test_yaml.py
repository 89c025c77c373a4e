"""Damaged or hostile experiment files are read, or refused in two lines, within a second."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from probe.errors import ExperimentError
from probe.settings.experiment import Experiment, load_experiment

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
SECONDS = 1
MARKS = """- |: |? |&a |*a|!!|!x |%YAML 9.9
|---
|...
|>-
  |{|}|[|]|,|#|'|"|"\\x|"\\u202e|"\\ud800|\\|@|`|<<: |~|.inf|.nan|1e999|-0|0x1F|1_000|010|1:30|yes|\
2026-01-02|= |capture:
|  steps: 1
|prompt:|seed: """.split("|")
BYTES = [
    b"|\n",
    b"\t",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\0",
    b"\x1b[2J",
    b"\x85",
    b"\xe2\x80\xa8",
    b"\xe2\x80\xae",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xc3",
]
LONG = [
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc2\xa0",
    b"9" * 50,
    b" " * 200,
    b"[" * 30,
    b"{a: " * 25,
]
PIECES = [*(mark.encode() for mark in MARKS), *BYTES, *LONG]


def outcome(path: Path) -> Experiment | ExperimentError:
    """What a file comes to.

    Any other exception, and any time over a second, is the test's failure.
    """
    began = time.process_time()
    try:
        return load_experiment(path)
    except ExperimentError as error:
        return error
    finally:
        assert time.process_time() - began <= SECONDS


def assert_clean(found: Experiment | ExperimentError, what: object) -> None:
    if isinstance(found, ExperimentError):
        for line in (found.cause, found.remedy):
            assert line.strip() and line.isprintable() and len(line) < 1500, (what, line)
    else:
        assert load_experiment(found.resolved()) == found, what


def mutated(draw: random.Random, text: bytes) -> bytes:
    """One to four things done to a text: bits flipped, pieces put in, moved, doubled, cut out or
    cut off.
    """
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 20, 100)))
        at, piece = draw.randrange(len(text) + 1), draw.choice(PIECES)
        flipped = bytes(byte ^ (1 << draw.randrange(8)) for byte in text[a : a + 1])
        text = draw.choice(
            [
                text[:a] + flipped + text[a + 1 :],
                text[:at] + piece + text[at:],
                text[:a] + piece + text[b:],
                text[:at] + text[a:b] + text[at:],
                text[:a] + text[b:],
                text[:b] + text[a:b] * draw.choice((1, 2, 50)) + text[b:],
                text[:at]
                + bytes(draw.randrange(256) for _ in range(draw.choice((1, 2, 8))))
                + text[at:],
                text[:at] if draw.random() < 0.2 else text[a:b] + text,
            ]
        )
    return text


@pytest.mark.parametrize("count", [500, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_mutated_experiment_is_read_or_refused(count: int, tmp_path: Path) -> None:
    draw = random.Random(11)
    texts = [file.read_bytes() for file in FILES]
    file = tmp_path / "mutated.yaml"
    kinds = set()
    for index in range(count):
        text = mutated(draw, texts[index % len(texts)])
        file.write_bytes(text)
        found = outcome(file)
        assert_clean(found, text)
        kinds.add(type(found))
    assert kinds == {Experiment, ExperimentError}, "the mutations are all harmless, or all deadly"


BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(8)
)
REFUSED, READ = ExperimentError, Experiment
MADE: dict[str, tuple[bytes | Callable[[Path], Any], type, str]] = {
    # what: (the file, what it comes to, words of the cause or a field's value)
    "an alias bomb": (BOMB, REFUSED, "anchors (&) and aliases (*)"),
    "an alias bomb in a list": (b"capture: {layers: [&a [" + b"x," * 99 + b"], *a, *a]}", REFUSED,
        "anchors"),
    "a list that holds itself": (b"prompt: &a [*a]", REFUSED, "anchors"),
    "a mapping that holds itself": (b"&a capture: {text: *a}", REFUSED, "anchors"),
    "a merge key": (b"<<: {steps: 5}\nseed: 1", REFUSED, "merge keys"),
    "an anchor alone": (b"prompt: &p a cat", REFUSED, "anchors"),
    "a tag that runs code": (b"prompt: !!python/object/apply:os.system ['touch owned']", REFUSED,
        "tags (!)"),
    "a tag that makes an object": (
        b"!!python/object:probe.settings.experiment.Experiment {steps: 5}", REFUSED, "tags (!)"),
    "a tag that names a module": (b"prompt: !!python/name:os.system", REFUSED, "tags (!)"),
    "a tag of one's own": (b"prompt: !mine a cat", REFUSED, "tags (!)"),
    "a tag that is none": (b"prompt: !!", REFUSED, ""),
    "binary": (b"prompt: !!binary aGVsbG8=", REFUSED, "tags (!)"),
    "a set": (b"capture: !!set {layers, dtype}", REFUSED, "tags (!)"),
    "an ordered mapping": (b"capture: !!omap [layers: x]", REFUSED, "tags (!)"),
    "a key that is a question": (b"? [steps, seed]\n: 5", REFUSED, "plain text"),
    "a set without a tag": (b"? steps\n? seed", REFUSED, "seed: None"),
    "a huge integer": (b"seed: " + b"9" * 60_000, REFUSED, "a number of 60000 characters"),
    "an integer of 40 digits": (b"seed: " + b"9" * 40, REFUSED, "is more than"),
    "a huge float": (b"guidance_scale: 1e999", REFUSED, "not finite"),
    "a float of many digits": (b"guidance_scale: 3." + b"0" * 5000, REFUSED, "characters"),
    "an exponent of many digits": (b"guidance_scale: 1e-" + b"9" * 30, READ, "guidance_scale=0.0"),
    "not a number": (b"guidance_scale: .nan", REFUSED, "not finite"),
    "a hexadecimal number": (b"seed: 0x1F", REFUSED, "'0x1F' is not a whole number"),
    "an octal number": (b"steps: 010", REFUSED, "'010' is not a whole number"),
    "a new octal number": (b"steps: 0o10", REFUSED, "'0o10' is not a whole number"),
    "a sexagesimal number": (b"steps: 1:30", REFUSED, "'1:30' is not a whole number"),
    "an underscored number": (b"steps: 1_000", REFUSED, "'1_000' is not a whole number"),
    "other digits": ("steps: ٣".encode(), REFUSED, "is not a whole number"),
    "yes": (b"steps: yes", REFUSED, "'yes' is not a whole number"),
    "no, in Norway": (b"prompt: no", READ, "prompt='no'"),
    "a date": (b"prompt: 2026-01-02", READ, "prompt='2026-01-02'"),
    "a moment": (b"prompt: 2026-01-02 03:04:05", READ, "prompt='2026-01-02 03:04:05'"),
    "depth": (b"prompt: " + b"[" * 20_000, REFUSED, "deep"),
    "depth of mappings": (b"{a: " * 10_000 + b"}" * 10_000, REFUSED, "deep"),
    "depth by indents": (b"\n".join(b" " * i + b"a:" for i in range(300)), REFUSED, "deep"),
    "depth of questions": (b"? " * 20_000, REFUSED, "plain text"),
    "NUL": (b"prompt: a\0cat", REFUSED, "U+0000"),
    "an escape character": (b"prompt: \x1b[2J", REFUSED, "U+001B"),
    "text that turns around": ("prompt: a \u202etac".encode(), REFUSED, "U+202E"),
    "text that turns around, escaped": (b'prompt: "a \\u202etac"', REFUSED, "U+202E"),
    "isolated text": ("prompt: \u2066a cat\u2069".encode(), REFUSED, "U+2066"),
    "a line separator": ("prompt: a\u2028seed: 5".encode(), REFUSED, "U+2028"),
    "a next line": ("prompt: a\u0085seed: 5".encode(), REFUSED, "U+0085"),
    "half a character": (b'prompt: "\\ud800"', REFUSED, "U+D800"),
    "half a character, in bytes": (b"prompt: \xed\xa0\x80", REFUSED, "is not UTF-8"),
    "a character beyond the last": (b'prompt: "\\U00110000"', REFUSED, "cannot be read"),
    "a byte order mark": (b"\xef\xbb\xbfsteps: 5", READ, "steps=5"),
    "two byte order marks": (b"\xef\xbb\xbf\xef\xbb\xbfsteps: 5", REFUSED, "U+FEFF"),
    "UTF-16": ("steps: 5".encode("utf-16"), REFUSED, "is not UTF-8"),
    "UTF-16 without its mark": ("steps: 5".encode("utf-16-le"), REFUSED, "U+0000"),
    "UTF-32": ("steps: 5".encode("utf-32"), REFUSED, "is not UTF-8"),
    "Latin-1": ("prompt: café".encode("latin-1"), REFUSED, "is not UTF-8"),
    "a field twice": (b"steps: 5\nsteps: 6", REFUSED, "line 2: steps is written twice"),
    "a field twice, once in quotes": (b"steps: 5\n'steps': 6", REFUSED,
        "line 2: steps is written twice"),
    "a tab": (b"capture:\n\ttext: true", REFUSED, "line 2"),
    "a tab behind a colon": (b"steps:\t5", REFUSED, "line 1"),
    "a very long line": (b"prompt: " + b"x" * 60_000, REFUSED, "too long"),
    "a very long name": (b"x" * 60_000 + b": 5", REFUSED, "not YAML"),
    "a very long name in quotes": (b'? "' + b"x" * 60_000 + b'"\n: 5', REFUSED, "unknown field"),
    "many fields": (b"".join(b"f%d: 1\n" % i for i in range(6_000)), REFUSED,
        "unknown field (and 5999 more)"),
    "many layers": (b"capture: {layers: [" + b"a," * 30_000 + b"]}", REFUSED,
        "more than 10000 values"),
    "a few layers too many": (b"capture: {layers: [" + b"a," * 201 + b"]}", REFUSED, "is too long"),
    "many options": (
        b"scheduler_options: {" + b",".join(b"o%d: 1" % i for i in range(5_000)) + b"}", REFUSED,
        "is too long"),
    "70 KB": (b"#" * 70_000 + b"\nsteps: 5", REFUSED, "longer than 64 KB"),
    "a file of 100 MB": (lambda path: path.touch() or os.truncate(path, 10**8), REFUSED,
        "longer than 64 KB"),
    "a file of 4 TB": (lambda path: path.touch() or os.truncate(path, 2**42), REFUSED,
        "longer than 64 KB"),
    "a folder": (Path.mkdir, REFUSED, "Is a directory"),
    "a link to itself": (lambda path: path.symlink_to(path.name), REFUSED, "cannot be read"),
    "a device without end": (lambda path: path.symlink_to("/dev/zero"), REFUSED,
        "longer than 64 KB"),
    "a pipe that nobody writes to": (os.mkfifo, REFUSED, "is not a file"),
    "nothing": (b"", REFUSED, "empty"),
    "only a comment": (b"# nothing", REFUSED, "empty"),
    "a second document": (b"steps: 5\n---\nsteps: 6", REFUSED, "second document"),
    "an end, and more": (b"steps: 5\n...\nsteps: 6", REFUSED, ""),
    "a directive": (b"%YAML 1.1\n---\nsteps: 5", READ, "steps=5"),
    "a directive of another YAML": (b"%YAML 3.0\n---\nsteps: 5", REFUSED, "not YAML"),
    "a directive of 5000 digits": (b"%YAML " + b"9" * 5000 + b".1\n---\nsteps: 5", REFUSED,
        "not YAML"),
    "a directive for tags": (b"%TAG ! tag:evil,2026:\n---\nprompt: !x cat", REFUSED, "tags (!)"),
    "old Mac lines": (b"steps: 5\rseed: 6\r", REFUSED, "U+000D"),
    "Windows lines": (b"steps: 5\r\nseed: 6\r\n", READ, "seed=6"),
    "a list": (b"- steps: 5", REFUSED, "is not a mapping"),
    "a number": (b"5", REFUSED, "5 is not a mapping"),
    "a block without an end": (b'prompt: "a cat', REFUSED, "not YAML"),
    "a folded prompt": (b"prompt: >-\n  a cat\n  on the moon", READ, "prompt='a cat on the moon'"),
    "a format string": (b"prompt: '{0.__class__} %s %n ${HOME}'", READ, "${HOME}"),
}  # fmt: skip


@pytest.mark.parametrize("what", MADE)
def test_a_file_made_to_harm_is_read_or_refused(what: str, tmp_path: Path) -> None:
    make, kind, words = MADE[what]
    file = tmp_path / "made.yaml"
    if isinstance(make, bytes):
        file.write_bytes(make)
    else:
        make(file)
    found = outcome(file)
    assert type(found) is kind, found
    assert_clean(found, what)
    assert words in (found.cause if isinstance(found, ExperimentError) else repr(found))
    assert not (tmp_path / "owned").exists() and not Path("owned").exists()


def test_a_thousand_errors_are_told_in_one_line(tmp_path: Path) -> None:
    """The one most likely meant, and how many more there are; none of them prints what was in the
    file.
    """
    file = tmp_path / "made.yaml"
    file.write_text("capture: {" + ", ".join(f"x{i}: {'y' * 20}" for i in range(1000)) + "}")
    found = outcome(file)
    assert (
        isinstance(found, ExperimentError)
        and "(and 999 more)" in found.cause
        and "yyy" not in found.cause
    )
