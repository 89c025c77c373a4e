"""An edit said in one short sentence: for people who see an edited run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from probe.settings.edits import (
    Donor,
    Edit,
    Embedding,
    Guidance,
    Head,
    Latents,
    Map,
    Mask,
    Noise,
    OtherPrompt,
    Output,
    Remove,
    Reweight,
    Skip,
    Steer,
    Value,
)
from probe.text import shown


def describe_edit(edit: Edit) -> str:
    """Return an edit as one short English sentence without a full stop."""
    return "".join(_sentence(edit))


def _sentence(edit: Edit) -> Iterator[str]:
    yield SAID[type(edit)](edit)
    layers = getattr(edit, "layers", ("*",))
    if layers != ("*",):
        yield f" in {', '.join(layers)}"
    if heads := getattr(edit, "heads", ()):
        yield f" (head {', '.join(map(str, heads))})"
    control = getattr(edit, "control", "none")
    if control != "none":
        yield " (control: " + ("random change of this norm)" if control == "random" else control)
        yield "" if control == "random" else ")"
    if getattr(edit, "branch", "cond") == "uncond":
        yield ", of the negative prompt"
    if edit.steps != "all":
        yield f", at steps {edit.steps}"
    if edit.sigmas is not None:
        yield f", at sigma {edit.sigmas[0]:g} to {edit.sigmas[1]:g}"
    if edit.amount != 1:
        yield f", amount {edit.amount:g}"


def _named(words: Sequence[str]) -> str:
    return " and ".join(f"'{word}'" for word in words)


def _from(donor: Donor) -> str:
    if donor.run is not None:
        return f"recording {donor.run}"
    fields = ", ".join(f"{name} {shown(value)}" for name, value in donor.changes.items())
    return f"a run of {fields or 'another seed'}"


def _valued(edit: Any, what: str) -> str:
    return (
        f"{what} {'zeroed' if edit.how == 'zero' else 'made a mean'}"
        if (edit.how != "resample")
        else f"{what} taken from {_from(edit.donor)}"
    )


def _guided(edit: Any) -> str:
    parts = []
    if edit.scale is not None:
        parts.append(
            f"guidance scale {edit.scale:g}" + ("" if edit.to is None else f" to {edit.to:g}")
        )
    if edit.rescale is not None:
        parts.append(f"guidance rescale {edit.rescale:g}")
    return ", ".join(parts)


SAID: dict[type[Edit], Callable[[Any], str]] = {
    Remove: lambda e: f"{_named(e.words)} removed from the text",
    OtherPrompt: lambda e: f"prompt switched to {shown(e.text)}",
    Embedding: lambda e: f"embedding of {_named(e.words)} as in {shown(e.text)}",
    Mask: lambda e: f"{_named(e.words)} masked in the attention",
    Value: lambda e: f"value of {_named(e.words)} zeroed",
    Reweight: lambda e: f"attention to {_named(e.words)} times {e.scale:g}",
    Head: lambda e: _valued(e, f"{e.attention}-attention heads"),
    Output: lambda e: _valued(e, f"output of {', '.join(e.modules)}"),
    Skip: lambda e: _valued(e, f"skip into {', '.join(e.modules)}"),
    Map: lambda e: f"{e.attention}-attention maps ({e.method}) of {_from(e.donor)}",
    Latents: lambda e: f"latents of {_from(e.donor)}",
    Noise: lambda e: (
        f"first noise of {'seed ' + str(e.seed) if e.file is None else e.file} "
        + ("mixed in" if e.method == "mix" else "added")
    ),
    Guidance: _guided,
    Steer: lambda e: f"{', '.join(e.modules)} steered toward {e.toward}, away from {e.away}",
}
