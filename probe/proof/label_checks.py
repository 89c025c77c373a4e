"""Whether labels mean what they say, without torch and without the model.

Tokens have to spell the prompt, and to be the same in every group. Layers have to stand in the
order in which they run.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import xarray as xr

from probe.format.dimensions import TEXT_ENCODERS
from probe.format.schema import REST
from probe.proof.checks import Check, variables
from probe.reading.recording import Run
from probe.words import spelt

LONGEST = 400  # characters, of a word of textual inversion with the space between two of it
LABELS = ("token_text", "word", "word_index")
END = "<|endoftext|>"
TokenLabel = tuple[str, str, int]  # its text, its word and the word's number
Labels = dict[tuple[str, int], TokenLabel]


def check_labels(run: Run) -> Check:
    """Check branches, tokens, words and layers."""
    recorded = dict(variables(run))
    texts = [path.removesuffix("/token_text") for path in recorded if path.endswith("/token_text")]
    problems = [*_wrong_branches(run, recorded), *_misread(run)]
    labels = {
        group: _labels(run, group)
        for group in sorted(texts, key=lambda group: not group.startswith("text/"))
    }
    others = {
        f"text/{encoder}" for encoder in TEXT_ENCODERS.get(run.attributes.family, ())[1:]
    }  # each reads in its own way
    for (group_there, there), (group_here, here) in itertools.permutations(labels.items(), 2):
        if not {group_there, group_here} & others:
            problems += _unlike_labels(here, there, group_here, group_there)
    for group, here in labels.items():
        problems += _misspelt(run, group, here, first=group not in others)
    problems += _misplaced_layers(run, recorded)
    if problems:
        return Check(
            "labels",
            "failed",
            problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else ""),
        )
    layers = sum(
        variable.size
        for path, variable in recorded.items()
        if re.fullmatch(r"attention/[^/]+/layer", path)
    )
    sides = [
        (branch, here)
        for here in labels.values()
        for branch in dict.fromkeys(branch for branch, _ in here)
    ]
    if unknown := dict.fromkeys(
        branch for branch, here in sides if _end(_rows(here, branch)) is None
    ):
        if run.recipe.prompt_embeds is not None:
            detail = "embeddings from a file have no tokens: a branch has no text beside them"
            return Check("labels", "not checked", detail)
        detail = (
            f"the tokens of {' and '.join(unknown)} do not begin and end as CLIP's do: what they "
            "spell, only the model can say"
        )
        return Check("labels", "not checked", detail)
    return Check(
        "labels",
        "exact",
        f"tokens and words of {len(texts)} groups spell the prompt; {layers} layers in the order "
        "in which they run",
    )


def _wrong_branches(run: Run, recorded: dict[str, xr.Variable]) -> Iterator[str]:
    """Yield groups whose branches are not those of the recipe."""
    recipe = run.recipe
    computed_branches = tuple(recipe.texts)
    kept_branches = tuple(b for b in computed_branches if recipe.capture.branches in ("both", b))
    for path, variable in recorded.items():
        if path.rpartition("/")[2] == "branch":
            wanted = kept_branches if "attention/" in path else computed_branches
            if tuple(map(str, variable.values)) != wanted:
                yield f"{path} is {', '.join(map(str, variable.values))}, not {', '.join(wanted)}"


def _labels(run: Run, group: str) -> Labels:
    """Return text, word and word number by branch and token position."""
    data = run.tree[group].dataset
    columns = [data[name].transpose("branch", "token").values for name in LABELS]
    return {
        (str(branch), int(token)): (
            str(columns[0][b, t]),
            str(columns[1][b, t]),
            int(columns[2][b, t]),
        )
        for b, branch in enumerate(data["branch"].values)
        for t, token in enumerate(data["token"].values)
    }


def _unlike_labels(here: Labels, there: Labels, group: str, other: str) -> Iterator[str]:
    """Yield tokens that another group labels differently."""
    for at, label in here.items():
        if at in there and there[at] != label:
            (branch, position), (text, word, _), (its_text, its_word, _) = at, label, there[at]
            yield (
                f"{group}: token {position} of {branch} is {text!r} in the word {word!r}, "
                f"in {other} {its_text!r} in {its_word!r}"
            )


def _misread(run: Run) -> Iterator[str]:
    """Yield what was read or cut and does not follow from what was typed."""
    recipe, typed = run.recipe, run.attributes.texts
    for branch, read in run.attributes.read_as.items():
        if (
            run.attributes.text_rules == 1
            or branch not in typed
            or not _is_written_out(typed[branch], read)
        ):
            wrote = typed.get(branch, "")[:60]
            yield f"read_as: {read[:60]!r} is not how {wrote!r} of {branch[:10]} is read"
    for branch, cut in run.attributes.cut_from_prompt.items():
        if (
            branch not in typed
            or recipe.over_long != "cut"
            or not cut
            or not run.read_as(branch).endswith(cut)
        ):
            yield f"cut_from_prompt: {cut[:60]!r} was not cut from the end of {branch[:10]}"


def _is_written_out(typed: str, read: str) -> bool:
    """Tell whether a prompt is as typed, but for words of textual inversion.

    Such a word is written once for each of its vectors: "cat" as "cat cat_1 cat_2", everywhere, as
    in diffusers' `maybe_convert_prompt`.
    """
    words = set()
    for vector in re.finditer("_1", read):
        before = read[max(vector.start() - LONGEST, 0) : vector.start()]
        gaps = [
            at
            for at, character in enumerate(before)
            if character == " " and before[:at].endswith(before[at + 1 :]) and before[at + 1 :]
        ]
        words |= {before[at + 1 :] for at in gaps}
    longer = {}
    for word in words:
        written_out, number = word, 1
        while f"{written_out} {word}_{number}" in read:
            written_out, number = f"{written_out} {word}_{number}", number + 1
        if 0 < typed.count(word) <= read.count(written_out):  # else it was typed like that
            longer[word] = written_out
    for order in (sorted(longer, key=len), sorted(longer, key=len, reverse=True)):
        written = typed
        for word in order:
            written = written.replace(word, longer[word])
        if written == read != typed:
            return True
    return False


def _rows(labels: Labels, branch: str) -> list[TokenLabel]:
    """Return the labels of a branch's tokens, without `rest`."""
    return [label for (of, position), label in labels.items() if of == branch and position != REST]


def _end(rows: Sequence[TokenLabel]) -> int | None:
    """Return where the prompt's tokens end; None if another tokenizer than CLIP's made them."""
    if rows[0][0] != "<|startoftext|>":
        return None
    return next((i for i, row in enumerate(rows) if i and row[0] == END and row[2] < 0), None)


def _misspelt(run: Run, group: str, labels: Labels, first: bool) -> Iterator[str]:
    """Yield how the tokens of a group do not spell the prompt.

    What was cut is known of the `first` text encoder alone.
    """
    first_rules = run.attributes.text_rules == 1
    decode = _decode if first_rules else _together
    is_word = str.__eq__ if first_rules else _reads
    for branch in dict.fromkeys(branch for branch, _ in labels):
        positions = [position for at, position in labels if at == branch]
        kept = [position for position in positions if position != REST]
        if kept != list(range(len(kept))) or positions not in (kept, [*kept, REST]):
            yield f"{group}: its tokens are not 0, 1, 2, ..."
            continue
        if REST in positions and labels[branch, REST] != ("rest", "", -1):
            yield f"{group}: what is not kept is called {labels[branch, REST][0]!r}, not 'rest'"
        rows = _rows(labels, branch)
        end = _end(rows)
        cut = run.attributes.cut_from_prompt.get(branch, "")
        prompt = run.read_as(branch)
        prompt = prompt[: len(prompt) - len(cut)] if first else prompt
        if end is not None:
            spelling = _plain(decode([row[0] for row in rows[1:end]]))
            typed = _plain(prompt)
            wanted = _plain(typed)
            if spelling != wanted and (first or not cut or not wanted.startswith(spelling)):
                yield (
                    f"{group}: the tokens of {branch} spell {spelling[:60]!r}, not {typed[:60]!r}"
                )
            if first and cut and (REST in positions or end != kept[-1]):
                yield f"{group}: {cut[:60]!r} was cut from {branch}, and there is room for it"
            if len({row[0] for row in rows[end + 1 :]}) > 1:
                yield f"{group}: after the end of {branch} are more tokens"
        for problem in _wrong_words(rows, prompt, decode, is_word, end is None):
            yield f"{group}: {branch} has {problem}"


def _wrong_words(
    rows: Sequence[TokenLabel],
    prompt: str,
    decode: Callable[[Sequence[str]], str],
    is_word: Callable[[str, str], bool],
    loosely: bool,
) -> Iterator[str]:
    """Yield words that are out of order, not in the prompt, or unlike their tokens."""
    numbers = [row[2] for row in rows if row[2] >= 0]
    if list(dict.fromkeys(numbers)) != list(range(len(set(numbers)))) or sorted(numbers) != numbers:
        yield f"words numbered {numbers}"
    at = 0
    for number, members in itertools.groupby(
        (row for row in rows if row[2] >= 0), key=lambda row: row[2]
    ):
        pieces = list(members)
        word = _plain(decode([row[0] for row in pieces]))
        for label in dict.fromkeys(row[1] for row in pieces):
            alike = loosely and (not label.isascii() or _letters(_plain(label)) == _letters(word))
            if not alike and not is_word(_plain(_plain(label)), word):
                yield f"a word {number} {label!r}, its tokens spell {word!r}"
        start = prompt.find(pieces[0][1], at)
        if start < 0:
            yield f"a word {number} {pieces[0][1]!r}, which is not in its place in {prompt[:60]!r}"
        at = max(at, start + len(pieces[0][1]))
    if stray := [row[1] for row in rows if row[2] < 0 and row[1]]:
        yield f"a word without a number, {stray[0]!r}"


def _letters(text: str) -> str:
    """Return only letters and digits: tokenizers mark pieces of words with different signs."""
    return re.sub(r"[\W_]+", "", text)


def _plain(text: str) -> str:
    """Return text as CLIP reads it: composed, in small letters, without spaces."""
    return re.sub(r"\s+", "", "".join(c.lower() for c in unicodedata.normalize("NFC", text)))


def _together(tokens: Sequence[str]) -> str:
    """Return the text of some tokens, without bytes of characters that are not whole."""
    parts = [
        re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), token.encode())
        for token in tokens
    ]
    return b"".join(parts).decode(errors="ignore")


def _reads(label: str, tokens: str) -> bool:
    """Tell whether tokens read a word.

    They may have punctuation around it. A word with several vectors reads word, word_1, word_2.
    """
    return (label in tokens and spelt(label) == spelt(tokens)) or bool(
        re.fullmatch(rf"{re.escape(label)}({re.escape(label)}_[0-9]+)*", tokens)
    )


def _decode(pieces: Sequence[str]) -> str:
    """Return the text of CLIP's tokens by the first rules.

    Each byte is shown as a character there (the byte alphabet of GPT-2).
    """
    tokens = "".join(pieces)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
    return (
        bytes(table[c] for c in tokens).decode(errors="replace")
        if all(c in table for c in tokens)
        else tokens
    )


def _misplaced_layers(run: Run, recorded: dict[str, xr.Variable]) -> Iterator[str]:
    """Yield layers that are in a wrong place, were not asked for, or are there twice.

    Layers run down, through the middle and up. A block's grid follows from its place.
    """
    capture = run.recipe.capture
    sizes = recorded["latents/latents"].sizes
    for kind, patterns in (
        ("attention", capture.layers),
        ("self_attention", capture.self_attention),
    ):
        grids = {
            path.split("/")[1]: [str(v) for v in recorded[path].values]
            for path in recorded
            if re.fullmatch(rf"{kind}/[^/]+/layer", path)
        }
        for grid, layers in grids.items():
            if layers != sorted(layers, key=_running_order):
                order = ", ".join(layers)
                yield f"{kind}/{grid}/layer is not in the order in which layers run: {order}"
            for layer in layers:
                if not any(grid == pattern or fnmatchcase(layer, pattern) for pattern in patterns):
                    yield f"{kind}/{grid}/layer holds {layer}, which was not asked for"
                if (level := re.match(r"down_blocks\.(\d+)\.", layer)) and grid != "x".join(
                    str(-(-sizes[d] // 2 ** int(level[1]))) for d in "yx"
                ):
                    yield f"{kind}/{grid}/layer holds {layer}, which works on another grid"
        every = [layer for layers in grids.values() for layer in layers]
        if len(every) != len(set(every)):
            yield f"{kind}: a layer is there twice"
        blocks = {
            (grid, ".".join(layer.split(".")[:2]))
            for grid, layers in grids.items()
            for layer in layers
            if "_blocks." in layer
        }
        if len({block for _, block in blocks}) != len(blocks):
            yield f"{kind}: layers of one block are on two grids"
    if "unet/module" in recorded and (
        modules := [str(v) for v in recorded["unet/module"].values]
    ) != sorted(modules, key=_stage):
        yield "unet/module is not in the order in which modules run"


def _stage(path: str) -> tuple[int, int]:
    part = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(path.split(".")[0], -1)
    number = path.split(".")[1:2]
    return part, int(number[0]) if part in (0, 2) and number and number[0].isdigit() else 0


def _running_order(path: str) -> tuple[Any, ...]:
    return _stage(path), [int(n) for n in re.findall(r"\.(\d+)", path)]
