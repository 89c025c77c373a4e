"""Show somebody's text in a message: short, on one line, without control characters.

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
    """Return a value for a message: short, on one line, without control characters."""
    try:
        return shorten(printable(repr(value)))
    except (ValueError, RecursionError):  # a number of thousands of digits
        return f"this {type(value).__name__}"


def shorten(text: str, most: int = SHOWN) -> str:
    """Return a text of at most `most` characters; "..." stands for what is left out."""
    return text if len(text) <= most else text[: most - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return an error's first line; its class's name if it says nothing, as a MemoryError may."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """Return a text with "?" for every character that cannot be shown."""
    return "".join(character if character.isprintable() else "?" for character in text)


def encodable(text: str) -> str:
    """Return a text with "?" for what UTF-8 does not hold: bytes of a file's name that are none."""
    return text.encode("utf-8", "replace").decode()


def did_you_mean(word: str, spellings: Mapping[str, str]) -> str:
    """Return a remedy that guesses a misspelled word, or "".

    `spellings` gives for each way to write a word the one to suggest.
    """
    near = difflib.get_close_matches(word[:SHOWN].casefold(), spellings, n=1)
    return f"Did you mean {spellings[near[0]]}?" if near else ""
