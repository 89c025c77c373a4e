"""Somebody's text as it may stand in a message: short, on one line, without control characters.

shown({"a": 1})        # "{'a': 1}"
printable("a\\x1bb")   # "a?b"
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

SHOWN = 60  # characters of a value in a message
# Control characters, those that turn the direction of text, line separators, byte order marks,
# lone surrogates.
UNCLEAN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def shown(value: object) -> str:
    """A value as it may stand in a message: short, on one line, without control characters."""
    try:
        return shorten(printable(repr(value)))
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"this {type(value).__name__}"


def shorten(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def first_line(error: BaseException) -> str:
    """What an error says first; the name of its class where it says nothing, as a MemoryError
    may.
    """
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def did_you_mean(word: str, spellings: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(word[:SHOWN].casefold(), spellings, n=1)
    return f"Did you mean {spellings[near[0]]}?" if near else ""
