"""Read settings of any kind from a YAML file, a mapping or a value, with changes on top.

What does not fit raises an `ExperimentError` that names the field, its value, and the remedy.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from probe.errors import ExperimentError
from probe.settings.capture import CaptureOptions
from probe.settings.edits import EDIT_KINDS, Donor, Edit
from probe.settings.fields import Lora, Strict
from probe.settings.strict_yaml import read_text, read_yaml
from probe.text import UNCLEAN, did_you_mean, printable, shorten, shown

Settings = TypeVar("Settings", bound=Strict)


def load_settings(
    kind: type[Settings],
    source: str | Path | Mapping[str, Any] | Settings,
    where: str,
    **overrides: Any,
) -> Settings:
    """Return settings of a kind, read as `load_experiment` reads an experiment.

    Errors call a mapping `where`. Raise ExperimentError.
    """
    if isinstance(source, kind):
        settings = source
    elif isinstance(source, Mapping):
        settings = validate(kind, merge({}, source), where)
    else:
        path = Path(str(source))
        settings = validate(kind, read_yaml(read_text(path), str(path)), printable(str(path)))
    if not overrides:
        return settings
    return validate(kind, merge(settings.model_dump(mode="json", exclude_unset=True), overrides))


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base`, changed in place: fields, dotted fields, and what `capture` names."""
    for name, value in changes.items():
        if not isinstance(name, str) or UNCLEAN.search(name):
            raise ExperimentError(
                f"{shown(name)}: this is not a field's name", "Fields are named by plain text."
            )
        first, dot, rest = name.partition(".")
        if dot and not (first and rest):
            raise ExperimentError(
                f"{shown(name)}: this is not a field's name",
                "Write the group and the field, such as capture.text.",
            )
        nested = {rest: value} if rest else value
        if rest or (name == "capture" and isinstance(value, Mapping)):
            below = _as_dict(base.get(first))
            # Only fields of `capture` are dotted further: a scheduler's option may have any name.
            nested = merge(below, nested) if first == "capture" else below | nested
        base[first] = nested
    return base


def _as_dict(value: object) -> dict[str, Any]:
    if isinstance(value, BaseModel):
        return value.model_dump()
    return dict(value) if isinstance(value, Mapping) else {}


def validate(kind: type[Settings], data: Mapping[str, Any], where: str = "") -> Settings:
    """Return settings made of a mapping. Raise ExperimentError, which calls the mapping `where`."""
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        every = problem.errors(include_input=False, include_url=False)
        # A list with a bad item is also "too short": keep the errors with none below them.
        above = {error["loc"][:-1] for error in every if error["loc"]}
        errors = [error for error in every if error["loc"] not in above]
        # An unknown field comes first: a misspelled name often causes the other errors.
        first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
        cause, remedy = _explain(kind, first, data)
        start = f"{where}: " if where else ""
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ExperimentError(f"{start}{cause}{more}", remedy) from None


# What others call a field, and its name here.
OTHER_NAMES = {
    "num_inference_steps": "steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
}

# Arguments of a diffusers pipeline that no experiment has, and what to do instead.
NOT_HERE = {
    **dict.fromkeys(
        ("pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        "Save it beside prompt_embeds in one .safetensors file, and name that: prompt_embeds.",
    ),
    "prompt_attention_mask": "Leave it out: it is not supported.",
    **dict.fromkeys(("latents", "generator"), "Set seed: the noise is drawn from it."),
    **dict.fromkeys(
        ("ip_adapter_image", "ip_adapter_image_embeds"),
        "Leave it out: IP-Adapters are not recorded.",
    ),
    **dict.fromkeys(("cross_attention_kwargs", "sigmas"), "Leave it out: it is not supported."),
    **dict.fromkeys(
        ("callback_on_step_end", "callback", "output_type", "return_dict"),
        "Leave it out: every step is in the recording.",
    ),
    "num_images_per_prompt": "Write images.",
}

KINDS = {
    "int_type": ("a whole number", "Write a whole number, without quotes or a point."),
    "float_type": ("a number", "Write a number, without quotes."),
    "finite_number": ("finite", "Write a finite number."),
    "bool_type": ("true or false", "Write true or false."),
    "string_type": ("text", 'Write text, in quotes: "..."'),
    "string_unicode": ("text", 'Write text, in quotes: "..."'),
    "tuple_type": ("a list", 'Write a list: ["..."]'),
    "dict_type": ("a mapping", "Write names and values below it, or delete it."),
    "model_type": ("a mapping", "Write its fields below it, or delete it."),
}


def _explain(settings: type[Strict], error: Any, data: Mapping[str, Any]) -> tuple[str, str]:
    """Return a pydantic error as one line of cause and one of remedy."""
    kind, context = error["type"], error.get("ctx", {})
    keys = tuple(key for key in error["loc"] if key != "[key]")
    of_edit = _edit_of(keys, data) if keys[:1] == ("edits",) and len(keys) > 1 else None
    if of_edit is not None and len(keys) > 2:
        keys = (*keys[:2], *keys[3:])  # pydantic names the kind between index and field
    field = "".join(
        f"[{key}]" if isinstance(key, int) else f".{shorten(printable(key))}" for key in keys
    ).removeprefix(".")
    if isinstance(context.get("error"), ExperimentError):
        cause = context["error"].cause
        return f"{field}: {cause}" if field else cause, context["error"].remedy
    if keys[:1] == ("loras",) and len(keys) > 1:
        cause, remedy = _wrong_lora(error, keys, data)
        return f"{field}: {cause}", remedy
    if of_edit is not None:
        cause, remedy = _wrong_edit(of_edit, error, keys)
        return f"{field}: {cause}", remedy
    if kind == "extra_forbidden":
        cause, remedy = _unknown_field(settings, keys, data)
        return f"{field}: {cause}", remedy
    value: Any = data
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        for key in keys:
            value = getattr(value, key) if isinstance(value, BaseModel) else value[key]
    inside = keys[0] == "capture" and len(keys) > 1
    model, name = (CaptureOptions, keys[1]) if inside else (settings, keys[0])
    cause, remedy = _wrong_value(kind, context, shown(value), model.model_fields[str(name)])
    return f"{field}: {cause}", remedy


def _edit_of(keys: tuple[Any, ...], data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was written as the edit that an error is about."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        edit = data["edits"][keys[1]]
        return edit.model_dump() if isinstance(edit, BaseModel) else dict(edit)
    return {}


def _wrong_edit(edit: Mapping[str, Any], error: Any, keys: tuple[Any, ...]) -> tuple[str, str]:
    """Return cause and remedy for an edit, or a field of one, that does not fit."""
    kinds = ", ".join(EDIT_KINDS)
    if error["type"] == "union_tag_not_found":
        return "it has no kind", f"Write kind: one of {kinds}."
    if error["type"] == "union_tag_invalid":
        named = shown(edit.get("kind"))
        meant = did_you_mean(str(edit.get("kind")), {name: name for name in EDIT_KINDS})
        return f"{named} is no kind of edit", meant or f"The kinds are {kinds}."
    settings: type[Strict] = EDIT_KINDS.get(str(edit.get("kind")), Edit)
    value: Any = edit
    if len(keys) < 3:
        return "this is no edit", 'Write a mapping, such as {kind: mask, words: ["cat"]}.'
    last = str(keys[2])
    if last == "donor" and len(keys) > 3:
        settings, last, value = Donor, str(keys[3]), value.get("donor")
    fields = settings.model_fields
    if error["type"] == "extra_forbidden":
        meant = did_you_mean(last, {name: name for name in fields})
        return "unknown field", meant or f"The fields here are {', '.join(fields)}."
    if error["type"] == "missing":
        return "it is missing", fields[last].description or ""
    with contextlib.suppress(LookupError, TypeError, AttributeError):
        for key in keys[3 if settings is Donor else 2 :]:
            value = value[key]
    return _wrong_value(error["type"], error.get("ctx", {}), shown(value), fields[last])


def _wrong_lora(error: Any, keys: tuple[Any, ...], data: Mapping[str, Any]) -> tuple[str, str]:
    """Return cause and remedy for one of the LoRAs that does not fit."""
    fields, example = Lora.model_fields, "{path: ink.safetensors, scale: 0.8}"
    if len(keys) < 3:
        return "this is no LoRA", f"Write a mapping, such as {example}."
    name = str(keys[2])
    if error["type"] == "extra_forbidden":
        return "unknown field", f"The fields here are {', '.join(fields)}."
    if error["type"] == "missing":
        return "it is missing", f"Write it, as in {example}."
    value: Any = None
    with contextlib.suppress(LookupError, TypeError):
        value = data["loras"][keys[1]][name]
    return _wrong_value(error["type"], error.get("ctx", {}), shown(value), fields[name])


def _unknown_field(
    settings: type[Strict], keys: tuple[Any, ...], data: Mapping[str, Any]
) -> tuple[str, str]:
    """Return cause and remedy for a field that does not exist."""
    generation = getattr(settings, "kind", "") == "generation"
    if generation and "timesteps" in data and "caption" in data:
        cause = "this is a noising, not an experiment"
        return cause, "Run it with python -m probe.noising FILE."
    word, inside = str(keys[-1]), keys[0] == "capture" and len(keys) > 1
    if not inside and (instead := NOT_HERE.get(word)):
        return "this argument of diffusers' pipelines has no field here", instead
    names = [*settings.model_fields, *(f"capture.{name}" for name in CaptureOptions.model_fields)]
    near_first = sorted(names, key=lambda name: ("." in name) == inside)
    known = {word: name for word, name in OTHER_NAMES.items() if name in names}
    known |= {name.rpartition(".")[2]: name for name in near_first}
    here = (CaptureOptions if inside else settings).model_fields
    return "unknown field", did_you_mean(word, known) or f"The fields here are {', '.join(here)}."


def _wrong_value(
    kind: str, context: Mapping[str, Any], given: str, declared: FieldInfo
) -> tuple[str, str]:
    """Return cause and remedy for a value, shown as `given`, that its field does not take."""
    if kind in KINDS:
        return f"{given} is not {KINDS[kind][0]}", KINDS[kind][1]
    if kind in ("greater_than_equal", "less_than_equal"):
        bounds = {
            key: getattr(item, key)
            for item in declared.metadata
            for key in ("ge", "le")
            if hasattr(item, key)
        }
        problem = "less than {ge}" if kind == "greater_than_equal" else "more than {le}"
        cause = f"{given} is {problem.format(**context)}"
        return cause, "Write a number from {ge} to {le}.".format(**bounds)
    if kind == "literal_error":
        options = re.findall(r"'(\w+)'", context["expected"])
        meant = did_you_mean(given.strip("'"), {item: item for item in options})
        return f"{given} is not one of {', '.join(options)}", meant or "Write one of them."
    if kind.endswith("too_long"):
        return f"{given} is too long", f"At most {context['max_length']} fit here."
    return f"{given} does not fit", declared.description or ""
