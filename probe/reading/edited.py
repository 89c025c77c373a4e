"""What is said of an edited run: its edits in sentences, and of which run it is the child.

edit_sentences(run.attributes.recipe)      # ["'cat' removed from the text"]
edits_in_short(run.attributes)             # "1 edit of 1a2b3c4d"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probe.settings.edit_sentences import describe_edit
from probe.settings.edits import AnyEdit, Edit
from probe.text import shorten

UNKNOWN = "an edit that this version does not know"
LONGEST = 80  # letters of a parent's name

_EDIT: TypeAdapter[Edit] = TypeAdapter(AnyEdit)


def edits_in(recipe: Mapping[str, Any]) -> list[Any]:
    """Return the edits of a recipe, as they are in the file."""
    edits = recipe.get("edits")
    return edits if isinstance(edits, list) else []


def edit_sentences(recipe: Mapping[str, Any]) -> list[str]:
    """Return each edit of a recipe as a sentence, in their order."""
    sentences = []
    for edit in edits_in(recipe):
        try:
            sentences.append(describe_edit(_EDIT.validate_python(edit)))
        except (ValidationError, TypeError, ValueError):
            sentences.append(UNKNOWN)
    return sentences


def edits_in_short(attributes: Mapping[str, Any], parent: str = "") -> str:
    """Return how many edits a run has and whose child it is: "2 edits of 1a2b3c4d".

    The parent is called by the identity that its name ends in, unless its name is given. The text
    is empty for a run without edits.
    """
    count = len(edits_in(attributes.get("experiment") or {}))
    if not count:
        return ""
    identity = attributes.get("parent_identity")
    whose = parent or (identity if isinstance(identity, str) else "a run that it does not name")
    return f"{count} edit{'s' * (count > 1)} of {shorten(whose, LONGEST)}"
