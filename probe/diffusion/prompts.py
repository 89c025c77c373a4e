"""A prompt as a model reads it: token ids, their texts, and the words that they spell.

    prompt = read_prompt(tokenizer, "a cat's hat", convert=pipeline.maybe_convert_prompt)
    prompt.words                                   # ("a", "cat's", "hat")
    prompt.spans                                   # {0: [1], 1: [2, 3], 2: [4]}

The words are those of `probe.words`, each with every token that reads a part of it. A token that
was added to a tokenizer, as textual inversion does, is a word of its own, with all its vectors:
`<toy> <toy>_1 <toy>_2` is the word `<toy>`.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from probe.errors import PromptError
from probe.output import unsaid
from probe.words import APOSTROPHES, RULES, word_spans

Convert = Callable[[str, Any], str]
OverLong = Literal["error", "cut"]
Token = tuple[int, int]  # where in the text a token begins and ends

# The characters by which byte-level tokenizers show bytes (the alphabet of GPT-2).
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(byte): byte for byte in _SHOWN} | {
    chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in _SHOWN)
}


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it: its tokens, their texts and their words.

    `word_of` is the index of each token's word, -1 for none. `end` is the position of the token
    that ends the prompt. `text` is what was typed, `read_as` what the tokenizer got: textual
    inversion writes one word as several. `cut` is the end of `read_as` that did not fit. `mask` is
    1 for each token up to the end. `rules` are those by which words were found.

    *Shape:* ids and mask (1, token).
    """

    text: str
    ids: torch.Tensor
    tokens: tuple[str, ...]
    words: tuple[str, ...]
    word_of: tuple[int, ...]
    end: int
    cut: str
    read_as: str
    mask: torch.Tensor
    rules: int

    @property
    def spans(self) -> dict[int, list[int]]:
        """The token positions of each word, by the word's index."""
        return {
            w: [i for i, of in enumerate(self.word_of) if of == w] for w in range(len(self.words))
        }


def read_prompt(
    tokenizer: Any,
    text: str,
    over_long: OverLong = "error",
    convert: Convert | None = None,
    rules: int = RULES,
    padding_is_word: bool = True,
) -> Prompt:
    """Tokenize a prompt as a pipeline does, after its `convert`.

    A padding token that is typed, as the "!" of some models, is a word of its own, unless
    `padding_is_word` is false. `rules` 1 gives tokens and words as the first recordings have them,
    which never converted a prompt. Raise PromptError for a prompt that is too long or no text.
    """
    limit = int(tokenizer.model_max_length)
    _refuse_half_characters(text)
    # The conversion warns of "indexing errors" where there are many tokens: they are cut or refused
    # below.
    with unsaid(
        "transformers.tokenization_utils_base",
        "Running this sequence through the model will result in indexing errors",
    ):
        read_as = text if convert is None or rules == 1 else convert(text, tokenizer)
    uncut = tokenizer(read_as, return_offsets_mapping=True, truncation=False, verbose=False)
    cut = ""
    if len(uncut.input_ids) > limit:
        cut = read_as[uncut["offset_mapping"][limit - 1][0] :]
        if over_long == "error":
            raise PromptError(
                f"The prompt has {len(uncut.input_ids)} tokens, {limit} is the most; it would "
                f"lose {cut[:80]!r}.",
                "Shorten it, or set over_long: cut.",
            )
    encoded = tokenizer(
        read_as,
        padding="max_length",
        max_length=limit,
        truncation=True,
        return_offsets_mapping=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    end = min(len(uncut.input_ids), limit) - 1
    ids = encoded.input_ids[0].tolist()
    pieces = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
    if rules == 1:
        words, word_of = _first_words(read_as, offsets, end)
    else:
        added = _added(tokenizer, ids[:end], pieces, padding_is_word)
        uncut_text = read_as[: len(read_as) - len(cut)]
        words, word_of = _words(uncut_text, read_as, offsets, end, added)
        pieces = _readable(tokenizer, ids, pieces)
    tokens, mask = tuple(pieces), encoded.attention_mask
    return Prompt(text, encoded.input_ids, tokens, words, word_of, end, cut, read_as, mask, rules)


def _added(
    tokenizer: Any, ids: Sequence[int], pieces: Sequence[str], padding_is_word: bool
) -> dict[int, str]:
    """Return the tokens that were added to a tokenizer, by position; each is a word of its own."""
    added = set(tokenizer.added_tokens_decoder)
    if not padding_is_word:
        added.discard(tokenizer.pad_token_id)
    return {at: pieces[at] for at in range(1, len(ids)) if ids[at] in added}


def _readable(tokenizer: Any, ids: Sequence[int], pieces: list[str]) -> list[str]:
    """Return the texts of tokens, where a tokenizer of bytes shows each byte as a character."""
    if not _is_of_bytes(tokenizer):
        return pieces
    added = tokenizer.added_tokens_decoder
    return [
        piece if number in added else token_text(piece)
        for number, piece in zip(ids, pieces, strict=True)
    ]


def token_text(piece: str) -> str:
    r"""Return the text of a byte-level token.

    Bytes that are only part of a character are shown as Python does: \xf0\x9f.
    """
    if not all(c in BYTES for c in piece):
        return piece
    return bytes(BYTES[c] for c in piece).decode(errors="backslashreplace")


def words_to_know(text: str, tokenizer: Any) -> list[str]:
    """Return the words of a text that must be in a model's vocabulary, in small letters, each once.

    "cat's" gives cat and s. Words that were added to the tokenizer are left out.
    """
    added = [
        token.content for token in tokenizer.added_tokens_decoder.values() if not token.special
    ]
    if added:
        any_of_them = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        text = re.sub(any_of_them, " ", text, flags=re.IGNORECASE)
    words = [text[start:end].lower() for start, end in word_spans(text)]
    parts = [part for word in words for part in re.split(f"[{APOSTROPHES}]", word)]
    return list(dict.fromkeys(parts))


def _refuse_half_characters(text: str) -> None:
    if half := re.search("[\ud800-\udfff]", text):
        raise PromptError(
            f"The prompt holds half a character, U+{ord(half[0]):04X}, which is no text.",
            "Delete it, or decode the prompt as UTF-8.",
        )


def _is_of_bytes(tokenizer: Any) -> bool:
    backend = tokenizer.backend_tokenizer
    return "ByteLevel" in f"{backend.pre_tokenizer} {backend.decoder}"


def _trimmed(text: str, token: Sequence[int]) -> Token:
    """Return where a token's text begins and ends, without the spaces around it."""
    start, end = token
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def _words(
    read: str, text: str, offsets: Sequence[Sequence[int]], end: int, added: dict[int, str]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the words that the tokens before `end` read, and the index of each token's word.

    `read` is the part of `text` that was not cut. `added` are the tokens that are words of their
    own. Words that one token reads together are one word. A word of which no whole character was
    read is none.
    """
    tokens = {position: _trimmed(text, offsets[position]) for position in range(1, end)}
    rest = list(text)
    for position in added:
        start, stop = tokens[position]
        rest[start:stop] = " " * (stop - start)
    spans = word_spans("".join(rest))
    starts, ends = [start for start, _ in spans], [stop for _, stop in spans]
    first = list(range(len(spans)))  # for each span, the first of those that are one word with it
    last = list(range(len(spans)))  # and for a first one, the last of them
    touched: dict[int, int] = {}
    for position, (start, stop) in tokens.items():
        together = range(bisect.bisect_right(ends, start), bisect.bisect_left(starts, stop))
        if position not in added and start < stop and together:
            touched[position] = together[0]
            for span in together[1:]:
                first[span] = first[together[0]]
                last[first[span]] = max(span, last[first[span]])
    words: list[str] = []
    word_of = [-1] * len(offsets)
    number: dict[int, int] = {}
    vectors: list[str] = []  # of the word that the token before belongs to, if it was added
    for position, (start, stop) in tokens.items():
        if position in added:
            if not vectors or added[position] != f"{vectors[0]}_{len(vectors)}":
                words.append(text[start:stop])
                vectors = []
            vectors.append(added[position])
            word_of[position] = len(words) - 1
            continue
        vectors = []
        if position not in touched:
            continue
        span = first[touched[position]]
        label = read[starts[span] : ends[last[span]]]
        if span not in number and label:
            number[span] = len(words)
            words.append(label)
        word_of[position] = number.get(span, -1)
    return tuple(words), tuple(word_of)


def _first_words(
    text: str, offsets: Sequence[Sequence[int]], end: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return words by the first version of the rules, and the index of each token's word.

    A word is what letters, digits and apostrophes spell without a gap between tokens.
    """
    words: list[str] = []
    word_of = [-1] * len(offsets)
    stop = None  # where the word being read ended, None after a space or punctuation
    for position in range(1, end):
        start, finish = offsets[position]
        piece = text[start:finish].strip()
        joined = stop is not None and start <= stop
        if not any(c.isalnum() for c in piece) and not (joined and piece[:1] in ("'", "\u2019")):
            stop = None
            continue
        if not joined:
            words.append("")
            stop = start
        words[-1] += text[max(start, cast(int, stop)) : finish]
        word_of[position], stop = len(words) - 1, max(finish, cast(int, stop))
    return tuple(words), tuple(word_of)
