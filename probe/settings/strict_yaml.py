"""Read the plain part of YAML, without surprises.

Only true and false are bool, only decimal digits are numbers. Anchors, aliases, merge keys, tags,
keys written twice, second documents, control and direction-changing characters raise errors that
name their line.
"""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from probe.errors import ExperimentError
from probe.text import UNCLEAN, did_you_mean, printable, shorten, shown

MAX_BYTES, MAX_DEPTH, MAX_VALUES, MAX_DIGITS = 64 * 1024, 20, 10_000, 40
LARGEST = 2**63 - 1


def too_long(where: str) -> ExperimentError:
    """Return the error for a file that is too long to be an experiment."""
    return ExperimentError(
        f"{where}: longer than {MAX_BYTES // 1024} KB",
        "An experiment is a short text: is this the right file?",
    )


NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(
    ("false", "False", "FALSE"), False
)
NOTHING = ("", "~", "null", "Null", "NULL")


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds, read without YAML 1.1's surprises.

    Only true and false are bool, only decimal digits are numbers (`1e-3` is one; `010`, `0x1F`,
    `1_000`, `1:30` are text). Raise ExperimentError, also for anchors, aliases, merge keys, tags,
    keys written twice and a second document.
    """
    where, text = printable(where), text.replace("\r\n", "\n")
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise too_long(where)
    if unclean := UNCLEAN.search(text):
        line = text.count("\n", 0, unclean.start()) + 1
        raise ExperimentError(
            f"{where}: line {line}: the character U+{ord(unclean[0]):04X} is not allowed",
            "Delete it: such characters hide what a file says.",
        )
    try:
        return _Document(yaml.parse(text, Loader=yaml.SafeLoader), where).read()
    except ExperimentError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as problem:  # ValueError: a bad escape
        mark = getattr(problem, "problem_mark", None)
        at = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(problem, "problem", None) or "a character that cannot be read"
        raise ExperimentError(
            f"{where}: {at}not YAML ({shorten(printable(reason))})",
            "Write one `field: value` a line, and text with : or # in quotes.",
        ) from None


class _Document:
    """One document of plain values, read from the events of a YAML parser."""

    def __init__(self, events: Iterator[yaml.Event], where: str) -> None:
        self.events, self.where = events, where
        self.count = itertools.count(1)

    def read(self) -> dict[str, Any]:
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise ExperimentError(
                f"{self.where}: this file is empty",
                "Write `field: value` lines, such as prompt: An astronaut scuba diving.",
            )
        top = next(self.events)
        data = self.node(top, 1)
        next(self.events)  # the document's end
        if not isinstance(after := next(self.events), yaml.StreamEndEvent):
            remedy = "Keep one experiment a file: delete the --- line."
            raise self.refuse(after, "a second document begins", remedy)
        if not isinstance(data, dict):
            cause = f"{shown(data)} is not a mapping"
            raise self.refuse(top, cause, "Write one `field: value` a line.")
        return data

    def refuse(self, event: Any, cause: str, remedy: str) -> ExperimentError:
        return ExperimentError(f"{self.where}: line {event.start_mark.line + 1}: {cause}", remedy)

    def until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self.events), end):
            yield event

    def plain(self, event: Any) -> Any:
        """Return the event. Raise ExperimentError if it has an anchor or a tag."""
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise self.refuse(
                event,
                "anchors (&) and aliases (*) are not read here",
                "Write the value out, and text with & or * in quotes.",
            )
        if event.tag:
            remedy = "Delete the tag, and put text with ! in quotes."
            raise self.refuse(event, "tags (!) are not read here", remedy)
        return event

    def node(self, event: yaml.Event, depth: int) -> Any:
        self.plain(event)
        if next(self.count) > MAX_VALUES:
            remedy = "An experiment is a short text: is this the right file?"
            raise self.refuse(event, f"more than {MAX_VALUES} values", remedy)
        if depth > MAX_DEPTH:
            cause = f"nested more than {MAX_DEPTH} deep"
            raise self.refuse(event, cause, "An experiment is at most 3 deep.")
        if isinstance(event, yaml.SequenceStartEvent):
            return [self.node(item, depth + 1) for item in self.until(yaml.SequenceEndEvent)]
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(depth)
        return self.scalar(event)

    def mapping(self, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key in self.until(yaml.MappingEndEvent):
            if not isinstance(self.plain(key), yaml.ScalarEvent):
                cause = "a field's name must be plain text"
                raise self.refuse(key, cause, "Write one `field: value` a line.")
            name = self.text_of(key)
            if name == "<<":
                raise self.refuse(key, "merge keys (<<) are not read here", "Write the fields out.")
            if name in mapping:
                cause = f"{shorten(printable(name))} is written twice"
                raise self.refuse(key, cause, "Keep one of the two.")
            mapping[name] = self.node(next(self.events), depth + 1)
        return mapping

    def text_of(self, event: Any) -> str:
        if unclean := UNCLEAN.search(event.value):  # from an escape such as "\u202e"
            cause = f"the character U+{ord(unclean[0]):04X} is not allowed"
            raise self.refuse(event, cause, "Delete it: such characters hide what a file says.")
        return str(event.value)

    def scalar(self, event: Any) -> Any:
        value = self.text_of(event)
        if not event.implicit[0]:  # in quotes or a block: text
            return value
        if value in NOTHING:
            return None
        if NOT_FINITE.fullmatch(value):
            return float(value.replace(".", ""))
        if not NUMBER.fullmatch(value):
            return WORDS.get(value, value)
        if len(value) > MAX_DIGITS:
            remedy = f"No number here is larger than {LARGEST}."
            raise self.refuse(event, f"a number of {len(value)} characters", remedy)
        return int(value) if value.lstrip("+-").isdigit() else float(value)


def read_text(path: Path) -> str:
    """Return the text of a small UTF-8 file.

    Raise ExperimentError; for a file that does not exist, it names similar ones.
    """
    where = printable(str(path))
    try:
        if path.is_fifo():  # it would be waited for
            raise OSError(errno.EINVAL, "it is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise too_long(where)
        return data.decode("utf-8-sig")
    except ExperimentError:
        raise
    except FileNotFoundError:
        folders = (path.parent, path.parent / "experiments", Path("experiments"))
        others = {
            file.stem.casefold(): printable(str(file))
            for folder in folders
            for file in sorted(folder.glob("*.yaml"))
        }
        some = ", ".join(sorted(others.values())[:5])
        remedy = did_you_mean(path.stem, others) or (f"There is {some}." if some else "")
        cause = f"{where}: this file does not exist"
        raise ExperimentError(cause, remedy or "Check the path.") from None
    except UnicodeDecodeError as problem:
        raise ExperimentError(
            f"{where}: byte {problem.start} is not UTF-8 text", "Save the file as UTF-8."
        ) from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ExperimentError(
            f"{where}: cannot be read ({printable(reason)})", "Name a YAML file that you may read."
        ) from None
