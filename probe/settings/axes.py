"""What an axis of a grid varies over: lists, ranges, and other prompts made of one prompt.

    axis("guidance_scale", "1-10(1)", 3.0)       # from 1 to 10 in steps of 1, both ends in
    axis("guidance_scale", "1-10[5]", 3.0)       # five values: 1, 3.25, 5.5, 7.75, 10
    axis("seed", [0, 1, 5], 0)
    axis("prompt", {"replace": {"cat": ["cat", "fox"]}}, "A cat")
    axis("prompt", {"order": ["a cat", "a hat"]}, "a cat and a hat")     # every order of these
    axis("prompt", {"file": "prompts.txt"}, "A cat")                     # one prompt a line
    axis("edits", [[], [{"kind": "mask", "words": ["cat"]}]], [])        # "none", and what it does
    axis("steps", [{"label": "few", "value": 8}, 50], 50)                # a value with its label

An axis has as many labels as values. A label is text, and no two of an axis are the same.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from probe.errors import ExperimentError
from probe.settings.edit_sentences import describe_edit
from probe.settings.edits import AnyEdit
from probe.settings.fields import Strict, expand_home
from probe.settings.strict_yaml import read_text
from probe.text import printable, shorten, shown

MOST_VALUES = 10_000
MOST_ORDERED = 5  # 120 orders
MOST_OF_A_LABEL = 20_000  # letters, as in study.json
# Ranges are computed as fractions, and those of a number without bounds have no end.
MOST_OF_A_RANGE = 200  # letters
NUMBER = r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?"
RANGE = re.compile(
    rf"\s*({NUMBER})\s*-\s*({NUMBER})\s*(?:\(\s*({NUMBER})\s*\)|\[\s*([0-9]+)\s*\])\s*"
)
HOW = "Write a list such as [1, 2, 5], or a range: 1-10(1) in steps of 1, 1-10[5] five values."
OF_TEXT = ("replace", "order", "file")
LABELLED = {"label", "value"}
EDITS: TypeAdapter[list[AnyEdit]] = TypeAdapter(list[AnyEdit])
TEXTS = ("prompt", "negative_prompt")


class Axis(Strict):
    """One field and the values that it takes, each with a label."""

    name: str
    labels: tuple[str, ...]
    values: tuple[JsonValue, ...]

    def as_written(self) -> list[JsonValue]:
        """Return the values as a grid's file may have them, each with its label if it has one."""
        return [
            value
            if label in (_label(value), edits_label(value))
            else {"label": label, "value": value}
            for label, value in zip(self.labels, self.values, strict=True)
        ]


def axis(name: str, written: object, current: object, folder: Path = Path()) -> Axis:
    """Return an axis from what a grid says of it.

    `current` is what the field has without the axis; prompts are made of it. Files are looked for
    in `folder`. Raise ExperimentError.
    """
    if isinstance(written, Mapping):
        pairs = _prompts(name, written, current, folder)
    elif isinstance(written, str):
        pairs = [(_label(value), value) for value in _range(name, written)]
    elif isinstance(written, list | tuple):
        pairs = [_labelled(name, value) for value in written]
        if name == "edits":
            pairs = [
                (edits_label(value) or label if label == _label(value) else label, value)
                for label, value in pairs
            ]
    else:
        raise ExperimentError(f"axes.{name}: {shown(written)} is not a list of values", HOW)
    if not pairs:
        raise ExperimentError(f"axes.{name}: there is no value in it", HOW)
    _check(name, pairs)
    return Axis(
        name=name,
        labels=tuple(_distinct([label for label, _ in pairs])),
        values=tuple(value for _, value in pairs),
    )


def _check(name: str, pairs: Sequence[tuple[str, Any]]) -> None:
    """Raise ExperimentError for too many values, one that is there twice, and what is no value."""
    _check_count(name, len(pairs))
    seen: set[str] = set()
    for label, value in pairs:
        if len(label) > MOST_OF_A_LABEL:
            raise ExperimentError(
                f"axes.{name}: a label has {len(label)} letters, and {MOST_OF_A_LABEL} is the most",
                "Write label: TEXT and value: VALUE.",
            )
        try:
            text = json.dumps(value, sort_keys=True, default=str, allow_nan=False)
        except ValueError:
            raise ExperimentError(
                f"axes.{name}: {shown(value)} is not finite", "Write a number."
            ) from None
        if text in seen:
            raise ExperimentError(
                f"axes.{name}: {shown(value)} is written twice", "Keep one of the two."
            )
        seen.add(text)


def _check_count(name: str, count: int) -> None:
    if count > MOST_VALUES:
        raise ExperimentError(
            f"axes.{name}: it has {count} values, and {MOST_VALUES} is the most",
            "Write fewer, or several grids.",
        )


def _range(name: str, text: str) -> list[int | float]:
    """Return the numbers of a range, exact where decimals are."""
    if len(text) > MOST_OF_A_RANGE or not (parts := RANGE.fullmatch(text)):
        raise ExperimentError(f"axes.{name}: {shown(text)} is not a range", HOW)
    first, last = Fraction(parts[1]), Fraction(parts[2])
    whole = all("." not in part and "e" not in part.lower() for part in (parts[1], parts[2]))
    if parts[3]:
        step = Fraction(parts[3])
        if not step or (last - first) / step < 0:
            raise ExperimentError(
                f"axes.{name}: {shown(text)} leads nowhere: its step is {parts[3]}",
                "Write a step that leads from the first to the last: 1-10(1), 10-1(-1).",
            )
        count = (last - first) // step + 1
        whole = whole and step.denominator == 1
    else:
        count = int(parts[4])
        step = (last - first) / (count - 1) if count > 1 else Fraction(0)
        if count < 2:
            raise ExperimentError(
                f"axes.{name}: {shown(text)} asks for {count} values", "Ask for 2 or more."
            )
    if count > MOST_VALUES:
        raise ExperimentError(
            f"axes.{name}: {shown(text)} has {count} values, and {MOST_VALUES} is the most",
            "Write a larger step, or fewer values.",
        )
    numbers = [first + index * step for index in range(count)]
    if whole and all(number.denominator == 1 for number in numbers):
        return [int(number) for number in numbers]
    return [float(number) for number in numbers]


def _labelled(name: str, value: Any) -> tuple[str, Any]:
    """Return label and value of one item of a list."""
    if not (isinstance(value, Mapping) and "label" in value):
        return _label(value), value
    label = value["label"]
    if set(value) != LABELLED or not isinstance(label, str) or not label.strip():
        raise ExperimentError(
            f"axes.{name}: {shown(value)} is not a value with a label",
            "Write label: TEXT and value: VALUE, and nothing else.",
        )
    return label, value["value"]


def edits_label(value: Any) -> str:
    """Return what a list of edits is called: their labels, or what they do; "" if it is no such."""
    if not isinstance(value, list) or not value:
        return ""
    try:
        edits = EDITS.validate_python(value)
    except (ValidationError, ExperimentError):  # said of the cells
        return ""
    return "; ".join(edit.label or describe_edit(edit) for edit in edits)


def _label(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.12g}"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and not any(isinstance(v, list | dict) for v in value):
        return ", ".join(map(_label, value)) or "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return labels of which no two are the same: a second one ends in (2)."""
    counts: dict[str, int] = {}
    written, distinct = set(labels), []
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
        own = label
        while counts[label] > 1 and (own := f"{label} ({counts[label]})") in written:
            counts[label] += 1
        distinct.append(own)
    return distinct


# --- prompts that are made of a prompt ------------------------------------------------------------


def _prompts(
    name: str, written: Mapping[Any, Any], current: object, folder: Path
) -> list[tuple[str, Any]]:
    """Return label and text of each prompt: words replaced, in another order, or from a file."""
    kind = next(iter(written), None)
    if len(written) != 1 or kind not in OF_TEXT:
        raise ExperimentError(
            f"axes.{name}: {shown(dict(written))} does not say how the text varies",
            "Write one of replace: {word: [other, ...]}, order: [a, b], file: prompts.txt.",
        )
    if not isinstance(current, str):
        raise ExperimentError(
            f"axes.{name}: {kind} makes other texts of a text, and {name} is none",
            f"Write a list. Fields with text are {', '.join(TEXTS)}.",
        )
    how = written[kind]
    if kind == "file":
        return _from_file(name, how, folder)
    return (_replaced if kind == "replace" else _ordered)(name, how, current)


def _from_file(name: str, file: object, folder: Path) -> list[tuple[str, Any]]:
    if not isinstance(file, str):
        raise ExperimentError(
            f"axes.{name}: {shown(file)} is not a file", "Name one: file: prompts.txt."
        )
    lines = [line.strip() for line in read_text(folder / expand_home(file)).splitlines()]
    if not any(lines):
        raise ExperimentError(
            f"axes.{name}: {printable(file)} has no line with text", "Write one prompt a line."
        )
    return [(line, line) for line in lines if line]


def _replaced(name: str, words: object, text: str) -> list[tuple[str, Any]]:
    """Return the text with each word replaced by each of its others, in every combination."""
    fits = isinstance(words, Mapping) and words
    if not fits or not all(
        isinstance(others, list) and others and all(isinstance(other, str) for other in others)
        for others in words.values()  # type: ignore[attr-defined]
    ):
        raise ExperimentError(
            f"axes.{name}: {shown(words)} does not say what is replaced by what",
            "Write replace: {astronaut: [astronaut, fox]}; the first word may be one of the list.",
        )
    assert isinstance(words, Mapping)
    _check_count(name, math.prod(map(len, words.values())))
    places = [_place(name, str(word), text) for word in words]
    _check_apart(name, list(words), sorted(place for of_word in places for place in of_word))
    return [
        (", ".join(others) or "none", _with(text, places, others))
        for others in itertools.product(*words.values())
    ]


def _ordered(name: str, words: object, text: str) -> list[tuple[str, Any]]:
    """Return the text with these parts of it in every order."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ExperimentError(
            f"axes.{name}: {shown(words)} is not a list of words", "Write order: [cat, hat]."
        )
    if not 2 <= len(words) <= MOST_ORDERED or len(set(words)) < len(words):
        raise ExperimentError(
            f"axes.{name}: {shown(words)} has not 2 to {MOST_ORDERED} different parts",
            "Write a few words of the prompt, each once: every order of them is a cell.",
        )
    places = sorted(_place(name, word, text)[0] for word in words)
    _check_apart(name, words, places)
    as_read = [text[begin:end] for begin, end in places]
    return [
        (", ".join(order), _with(text, [[place] for place in places], order))
        for order in itertools.permutations(as_read)
    ]


def _check_apart(name: str, words: Sequence[str], places: Sequence[tuple[int, int]]) -> None:
    """Raise ExperimentError if two of these places in a text overlap."""
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
        raise ExperimentError(
            f"axes.{name}: {shown(words)} overlap in the prompt", "Write parts that lie apart."
        )


def _place(name: str, word: str, text: str) -> list[tuple[int, int]]:
    """Return where a word is in a text. Raise ExperimentError if it is not there."""
    whole = rf"(?<!\w){re.escape(word)}(?!\w)"
    places = [match.span() for match in re.finditer(whole, text)] if word.strip() else []
    if not places:
        raise ExperimentError(
            f"axes.{name}: {shown(word)} is not in {shown(shorten(text))}",
            "Write a word or a phrase as it stands there, capitals included.",
        )
    return places


def _with(text: str, places: Sequence[Sequence[tuple[int, int]]], others: Sequence[str]) -> str:
    """Return a text with other words at these places."""
    spans = sorted(
        (begin, end, other)
        for of_word, other in zip(places, others, strict=True)
        for begin, end in of_word
    )
    parts, after = [], 0
    for begin, end, other in spans:
        parts += [text[after:begin], other]
        after = max(end, after)
    parts.append(text[after:])
    joined = "".join(parts)
    return joined if "" not in others else re.sub(r"  +", " ", joined).strip()
