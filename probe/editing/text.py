"""Edits of texts: what the denoiser is told of each branch, step by step.

texts = Texts(model, plan, edits)      # refuses what cannot be
texts.bind(conditioning)
texts.at(step)                         # the arguments of each branch
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from probe.diffusion.family import COND, TEXT, Arguments, Conditioning, Family, Tokens
from probe.diffusion.prompts import Prompt
from probe.editing.targets import naming, rows_of, tokens_of
from probe.editing.values import blended
from probe.errors import ExperimentError
from probe.settings.edits import (
    Edit,
    Embedding,
    OtherPrompt,
    Remove,
    other_text,
    other_text_steps,
    whole_text,
)
from probe.watching.interface import Plan


class Texts:
    """What each branch is told at each step, after the edits of texts.

    An edit that gives the whole run another text is in the plan's tokens already.
    """

    def __init__(self, model: Family, plan: Plan, edits: Sequence[Edit]):
        self._model, self._plan = model, plan
        self._read = dict[str, Tokens]()  # other texts, as the model reads them
        self._encoded = dict[tuple[str, str], Arguments]()
        self._own: Mapping[str, Arguments] = {}
        # By step and branch: each edit's text, its amount, and the places it acts at (None: all).
        self._changes = dict[tuple[int, str], list[tuple[str, float, list[int] | None]]]()
        self._prompts = dict[tuple[int, str], Prompt]()
        sigmas = plan.schedule.sigmas
        for number, edit in enumerate(edits):
            if whole_text(edit) or not isinstance(edit, Remove | OtherPrompt | Embedding):
                continue
            with naming(number, edit):
                rows_of(plan, edit.branch)
                for step in edit.steps_of(sigmas):
                    self._add(step, edit)

    def _add(self, step: int, edit: Remove | OtherPrompt | Embedding) -> None:
        key = step, edit.branch
        prompt = self.prompt(step, edit.branch)
        if isinstance(edit, Embedding):
            text, places = edit.text, tokens_of(prompt, edit.words)
        else:
            text, places = other_text(edit, prompt.text), None
        if text not in self._read:
            self._read[text] = self._model.tokens(text, self._plan.recipe.over_long)
        self._changes.setdefault(key, []).append((text, edit.amount, places))
        if places is None and edit.amount == 1:
            self._prompts[key] = next(iter(self._read[text].values()))

    def prompt(self, step: int, branch: str) -> Prompt:
        """Return the text that a branch is told at a step, as the first text encoder reads it."""
        return self._prompts.get((step, branch), self._plan.prompts[branch])

    @property
    def steps(self) -> set[int]:
        """The steps at which a branch whose attention is recorded is told of another text."""
        plan = self._plan
        if not plan.layers:
            return set()
        edits = plan.experiment.edits
        return other_text_steps(edits, plan.kept_branches, plan.schedule.sigmas)

    @property
    def vary(self) -> bool:
        """Whether what the recorded branches are told differs from step to step."""
        steps = range(len(self._plan.schedule.sigmas))
        return any(
            self._changes.get((step, branch)) != self._changes.get((0, branch))
            for step in steps
            for branch in self._plan.kept_branches
        )

    def bind(self, conditioning: Conditioning) -> None:
        """Take what the unedited run is told, and encode the other texts."""
        self._own = conditioning.arguments
        for (_, branch), changes in self._changes.items():
            for text, _, _ in changes:
                if (branch, text) not in self._encoded:
                    encoded = self._model.encode_prompt(self._read[text], branch)
                    self._encoded[branch, text] = encoded

    def at(self, step: int) -> dict[str, Arguments]:
        """Return what the denoiser is told of each branch at a step, one row each."""
        told = dict(self._own)
        for branch in told:
            for text, amount, places in self._changes.get((step, branch), ()):
                told[branch] = self._changed(told[branch], branch, text, amount, places)
        return told

    def _changed(
        self, own: Arguments, branch: str, text: str, amount: float, places: list[int] | None
    ) -> Arguments:
        other = self._encoded[branch, text]
        if places is None:
            return {name: blended(value, other[name], amount) for name, value in own.items()}
        rows = own[TEXT].clone()
        rows[:, places] = blended(own[TEXT][:, places], other[TEXT][:, places], amount)
        return {**own, TEXT: rows}


def refuse_texts(texts: Texts, plan: Plan) -> None:
    """Raise ExperimentError for edits of texts with which attention would be recorded wrongly."""
    if plan.recipe.capture.attention == "queries" and texts.vary:
        raise ExperimentError(
            "capture.attention: queries are read with one set of keys, and these edits give the "
            "text other keys at some steps.",
            "Record capture.attention: maps, or let the edits act at every step.",
        )
    if texts.steps and texts.steps >= set(plan.recorded):
        raise ExperimentError(
            "edits: another text is read at every recorded step, so no map would have its word.",
            "Leave steps out of that edit (amount 1), so that the words are those of its text.",
        )


def told(model: Family, texts: Mapping[str, Tokens]) -> Conditioning:
    """Encode the texts of a donor: the prompt first, then the negative prompt."""
    arguments = {branch: model.encode_prompt(texts[branch], branch) for branch in sorted(texts)}
    assert COND in arguments
    return Conditioning(arguments, texts)


# Of one token here: the tokens there whose maps it gets, and by what their sum is divided.
Share = tuple[int, list[int], int]


def shared_places(own: Prompt, other: Prompt) -> list[Share]:
    """Return the token places that two prompts share, as in prompt-to-prompt's refinement.

    Tokens are aligned in order; start, end and padding are shared.
    """
    ids, others = own.ids[0].tolist(), other.ids[0].tolist()
    matcher = difflib.SequenceMatcher(None, ids[: own.end], others[: other.end], autojunk=False)
    pairs: list[Share] = [
        (match.a + offset, [match.b + offset], 1)
        for match in matcher.get_matching_blocks()
        for offset in range(match.size)
    ]
    return pairs + _ends(own, other)


def replaced_places(own: Prompt, other: Prompt) -> list[Share]:
    """Return for each token place of a prompt those of another that has a word for each of its own.

    Words of as many tokens are paired token by token. Otherwise every token gets an equal share of
    the other word, as in prompt-to-prompt. Raise ExperimentError for another number of words.
    """
    ours, theirs = _units(own), _units(other)
    if len(ours) != len(theirs):
        raise ExperimentError(
            f"method: replace pairs words, and {own.text!r} has {len(ours) - 1} of them and signs, "
            f"{other.text!r} {len(theirs) - 1}.",
            "Write a prompt of as many words, or method: refine.",
        )
    pairs: list[Share] = []
    for here, there in zip(ours, theirs, strict=True):
        if len(here) == len(there):
            pairs += [(a, [b], 1) for a, b in zip(here, there, strict=True)]
        else:
            pairs += [(a, there, len(here)) for a in here]
    return pairs + _ends(own, other)


def _units(prompt: Prompt) -> list[list[int]]:
    """Return the places of each word's tokens, and of each other token, before the end."""
    units: list[list[int]] = []
    for place in range(prompt.end):
        of = prompt.word_of[place]
        if of >= 0 and units and prompt.word_of[units[-1][0]] == of:
            units[-1].append(place)
        else:
            units.append([place])
    return units


def _ends(own: Prompt, other: Prompt) -> list[Share]:
    """Return the places of the end, and of padding that both prompts have at the same place."""
    padding = range(max(own.end, other.end) + 1, own.ids.shape[1])
    return [(own.end, [other.end], 1), *((place, [place], 1) for place in padding)]
