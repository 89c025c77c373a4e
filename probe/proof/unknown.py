"""What a recording holds that this version does not know is named, and its meaning not judged.

The manifest still proves that its files are as they were written.
"""

from __future__ import annotations

from collections.abc import Iterator

from probe.format.attributes import MIXED, SHA256, Attributes
from probe.format.dimensions import FAMILIES, GUIDANCE_RULES
from probe.format.schema import spec
from probe.proof.checks import Check, variables
from probe.reading.recording import Run

# Attributes that no reader relies on: notes of the writer.
NOTES = {"writer", "digests", "decoded_in_float32", "scheduler_clips", "denoised_not_defined"}


def check_unknown(run: Run) -> Check:
    """Name the variables, attributes and rules that this version does not know."""
    unknown = [*_variables(run), *_attributes(run)]
    if not unknown:
        return Check(
            "unknown", "exact", "every variable and attribute is one that this version knows"
        )
    more = f" and {len(unknown) - 5} more" if unknown[5:] else ""
    return Check(
        "unknown", "not checked", f"this version does not know {', '.join(unknown[:5])}{more}"
    )


def _variables(run: Run) -> Iterator[str]:
    for path, variable in variables(run):
        group, _, name = path.rpartition("/")
        try:
            spec(group, name, variable.shape)
        except KeyError:
            yield path


def _attributes(run: Run) -> Iterator[str]:
    named = {field.alias or name for name, field in Attributes.model_fields.items()} | NOTES
    for name in run.attributes:
        if name not in named:
            yield f"the attribute {name}"
    if run.attributes.family not in FAMILIES:
        yield f"the family {run.attributes.family}"
    how = run.attributes.model.weights_digest
    if how not in (MIXED, SHA256):
        yield f"the digest of weights {how}"
    rule = run.attributes.guidance_rule
    if rule is not None and rule not in GUIDANCE_RULES:
        yield f"the guidance rule {rule}"
