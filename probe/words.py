"""Split a text into words, by one rule for those who record words and those who look for them.

    spelt("Don't, CAFE\u0301 \U0001f431!")                       # ["don't", "café", "🐱"]
    occurrences("scuba-diving", ["a", "Scuba", "diving"])    # [range(1, 3)]

A word is a run of letters and digits. Combining marks and invisible joiners belong to the word
before them, an apostrophe to the letters on both sides of it. A symbol, such as an emoji with all
its modifiers, is a word of its own. Everything else, hyphens and underscores too, lies between
words. Case, normal forms of Unicode and the kind of apostrophe make no difference. `RULES` is the
version of these rules; each recording says by which its words were found.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

RULES = 2
STUMP = "\u2026"  # after what was read of a word that the cut went through
APOSTROPHES = "'\u2019"
JOINER, EMOJI_STYLE, ZERO_WIDTH_SPACE = "\u200d", "\ufe0f", "\u200b"
FIRST_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]*)*")  # a word by the rules of version 1

# What other programs read in a prompt, and Stable Diffusion as plain text.
OTHER_SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet|embedding):[^<>]*>|\([^()]*:\s*-?[0-9.]+\s*\)|\(\([^()]*\)\)|\[[^\[\]]*\]|\{[^{}]*\}"
    r"|\b(?:BREAK|AND)\b|\bembedding:\S+|\w\w+\+\++(?=[\s,.]|$)|\w+::-?[0-9.]*|(?<=\s)--[a-z]+\b"
)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where each word begins and ends."""
    spans: list[tuple[int, int]] = []
    at = 0
    while at < len(text):
        end = _end_of_word(text, at)
        if end > at:
            spans.append((at, end))
        at = max(end, at + 1)
    return spans


def spelt(text: str) -> list[str]:
    """Return the words of a text as they are compared: none without letters, digits and symbols."""
    return [alike(text[start:end]) for start, end in word_spans(text)]


def alike(text: str) -> str:
    """Return the one form of all texts that count as the same.

    It has small letters, composed, without invisible characters.
    """
    small = unicodedata.normalize("NFD", text).casefold().replace(APOSTROPHES[1], APOSTROPHES[0])
    return unicodedata.normalize("NFC", "".join(c for c in small if not _is_invisible(c)))


def occurrences(text: str, labels: Sequence[str]) -> list[range]:
    """Return each place where the words of `text` follow one another among a prompt's words.

    A label may be no single word by the rules, such as `<cat-toy>` or the stump `ze…` of a word
    that was cut: it is found as it is written. Words that an older recording found by older rules
    are found by those rules too.
    """
    if not (whole := alike(text.strip())):
        return []
    parts = [
        [alike(label)] if label.endswith(STUMP) else spelt(label) or [alike(label)]
        for label in labels
    ]
    same = [i for i, label in enumerate(labels) if alike(label) == whole]
    odd = [range(i, i + 1) for i in same if parts[i] != [whole] or labels[i].endswith(STUMP)]
    return (
        odd
        or _runs_of_parts(spelt(text) or [whole], parts)
        or _runs_of_parts(FIRST_WORD.findall(whole), parts)
    )


def runs(wanted: list[str], words: list[str]) -> list[int]:
    """Return each index of `words` at which all of `wanted` follow one another."""
    return [
        i
        for i in range(len(words) - len(wanted) + 1)
        if wanted and words[i : i + len(wanted)] == wanted
    ]


def split_word(prompt: str, cut: str) -> str:
    """Return the word that is split where `cut` was cut off the end of a prompt, or "".

    Nothing is split between two words. An embedding of several vectors, `<toy>_1` and `<toy>_2`, is
    one word.
    """
    at = len(prompt) - len(cut)
    if vector := re.match(r"\s*((\S+)_([1-9][0-9]*))", cut):
        before = vector[2] if vector[3] == "1" else f"{vector[2]}_{int(vector[3]) - 1}"
        if prompt[:at].rstrip().endswith(before):
            return vector[2]
    return next((prompt[start:end] for start, end in word_spans(prompt) if start < at < end), "")


def other_syntax(text: str) -> list[str]:
    """Return, each once, the parts of a prompt that mean something to other programs alone.

    These are weights as in (cat:1.2), BREAK, <lora:...> and the like.
    """
    parts = list(dict.fromkeys(OTHER_SYNTAX.findall(text)))
    shouted = text.upper() == text
    return [part for part in parts if not (shouted and part in ("AND", "BREAK"))]


def read_plainly(prompts: Sequence[str]) -> str:
    """Return one line that lists the parts of prompts that only other programs understand.

    It is "" if there are none.
    """
    parts = list(dict.fromkeys(part for prompt in prompts for part in other_syntax(prompt)))
    if not parts:
        return ""
    shown = ", ".join(part if len(part) <= 40 else f"{part[:40]}..." for part in parts[:5])
    shown += ", ..." if parts[5:] else ""
    return (
        f"Read as plain text, as diffusers reads it: {shown}. Weights, BREAK, AND and the like are "
        "the syntax of other programs."
    )


def _end_of_word(text: str, at: int) -> int:
    """Return where the word ends that begins at `at`, or `at` if none begins there."""
    end = at + 1
    if text[at].isalnum():
        while end < len(text) and (
            text[end].isalnum() or _joins(text[end]) or _apostrophe_inside(text, end)
        ):
            end += 1
        return end
    if not _is_symbol(text, at):
        return at
    if _is_regional(text[at]) and end < len(text) and _is_regional(text[end]):
        end += 1  # two make a flag
    while end < len(text) and (
        _joins(text[end])
        or "\U0001f3fb" <= text[end] <= "\U0001f3ff"
        or (text[end - 1] == JOINER and _is_symbol(text, end))
    ):
        end += 1
    return end


def _joins(c: str) -> bool:
    """Tell whether a character continues a word without being a letter: a mark or a joiner."""
    return unicodedata.category(c)[0] == "M" or _is_invisible(c)


def _is_invisible(c: str) -> bool:
    return (unicodedata.category(c) == "Cf" and c != ZERO_WIDTH_SPACE) or "\ufe00" <= c <= "\ufe0f"


def _apostrophe_inside(text: str, at: int) -> bool:
    return text[at] in APOSTROPHES and text[at + 1 : at + 2].isalnum()


def _is_symbol(text: str, at: int) -> bool:
    """Tell whether a character is a picture of its own.

    It may be of private use, newer than this Unicode, or made a picture by a variation selector.
    """
    return unicodedata.category(text[at]) in ("So", "Co", "Cn") or (
        text[at + 1 : at + 2] == EMOJI_STYLE and not text[at].isspace()
    )


def _is_regional(c: str) -> bool:
    return "\U0001f1e6" <= c <= "\U0001f1ff"


def _runs_of_parts(wanted: list[str], parts: list[list[str]]) -> list[range]:
    """Return the ranges of whole labels whose parts spell what is wanted."""
    flat = [part for label in parts for part in label]
    label_of = [label for label, its in enumerate(parts) for _ in its]
    begins = {label_of.index(label) for label in set(label_of)}
    ends = begins | {len(flat)}
    places = [(first, first + len(wanted)) for first in runs(wanted, flat)]
    return [
        range(label_of[first], label_of[last - 1] + 1)
        for first, last in places
        if first in begins and last in ends
    ]
