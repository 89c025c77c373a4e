"""What is said of an edited run: its edits in sentences, and of which run it is the child.

What a recipe adds to the model and the text is said here too: LoRAs, clip_skip, embeddings.

edit_sentences(run.attributes.recipe)      # ["'cat' removed from the text"]
edits_in_short(run.attributes)             # "1 edit of 1a2b3c4d"
additions(run.attributes.recipe)           # "LoRA ink at 0.8, clip_skip 1"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from probe.settings.edit_sentences import describe_edit
from probe.settings.edits import AnyEdit, Edit
from probe.text import printable, shorten

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


def additions(recipe: Mapping[str, Any]) -> str:
    """Return what a recipe adds to its model and text: "LoRA ink at 0.8, clip_skip 1".

    The text is empty for a recipe that adds nothing. Files are called by their names alone.
    """
    loras = recipe.get("loras")
    parts = [
        f"LoRA {_file(lora.get('path'))} at {lora.get('scale', 1.0)}"
        for lora in (loras if isinstance(loras, list) else [])
        if isinstance(lora, dict)
    ]
    if skip := recipe.get("clip_skip"):
        parts.append(f"clip_skip {skip}")
    if (path := recipe.get("prompt_embeds")) is not None:
        parts.append(f"embeddings from {_file(path)}")
    return printable(", ".join(shorten(part, LONGEST) for part in parts))


def _file(path: object) -> str:
    return str(path).replace("\\", "/").rpartition("/")[2].removesuffix(".safetensors")


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
