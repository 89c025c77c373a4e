"""Two recordings compared: their recipes, their conditions, and by how much values differ.

    found = compare(open_run("a"), open_run("b"))
    found.same           # True: every value of both is the same, bit for bit
    found.asked          # fields of the recipe that differ
    found.conditions     # device, threads, versions, weights ... that differ
    found.differences    # variables that differ, with how many values and by how much

The bits of a run depend on the device's kind, the number of threads, the attention backend, whether
the branches are one batch, the versions and the weights. If those agree, two runs of one experiment
are expected to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probe.format.attributes import SHA256
from probe.output import rows
from probe.reading.edited import edit_sentences, edits_in
from probe.reading.lazy import has_files, in_files
from probe.reading.recording import Run
from probe.settings.recipe import UNRECORDED

CONDITIONS = (
    "device",
    "device_name",
    "threads",
    "attention_backend",
    "branches_batched",
    "measured",
    "torch",
    "diffusers",
    "transformers",
)
AT_ONCE, VALUES = 2**23, 2**20  # bytes that are read together, values compared together
NEW_EACH_TIME = ("cost",)  # groups that are measured anew and never the same


@dataclass(frozen=True)
class Difference:
    """A variable that differs.

    `count` of `total` values differ, by at most `greatest`. `at` is the first such step.
    """

    variable: str
    problem: str
    count: int = 0
    total: int = 0
    greatest: float = 0.0
    at: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What two recordings do not share. `variables` counts those that both have."""

    asked: list[str]
    conditions: list[str]
    differences: list[Difference]
    variables: int

    @property
    def same(self) -> bool:
        """Tell whether all values of both are the same, bit for bit."""
        return not self.differences

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the comparison for people."""
        lines = []
        for title, parts in (("asked", self.asked), ("conditions", self.conditions)):
            lines += [
                f"  {title:11} {'the same' if not parts else parts[0]}",
                *(f"              {part}" for part in parts[1:]),
            ]
        if self.same:
            return [*lines, f"  values      the same bits in all {self.variables} variables"]
        table = [
            (
                f"/{d.variable}",
                d.problem,
                f"{d.count} of {d.total}" if d.count else "",
                f"{d.greatest:.3g}" if d.greatest else "",
                "" if d.at is None else str(d.at),
            )
            for d in self.differences
        ]
        apart = sum(d.problem.startswith("only in") for d in self.differences)
        shared = sum(d.variable != "committed" for d in self.differences) - apart
        lines += [
            f"  values      {shared} of {self.variables} variables "
            f"differ{f', and {apart} are not in both' if apart else ''}",
            "",
        ]
        return lines + rows(table, ("variable", "", "values", "by at most", "first at step"))


def differing_conditions(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the conditions that decide bits and differ: ["threads: 2 and 1"].

    `there` and `here` are attributes of two recordings.
    """
    differing = [
        f"{name}: {there['environment'].get(name)} and {here['environment'].get(name)}"
        for name in CONDITIONS
        if there["environment"].get(name) != here["environment"].get(name)
    ]
    if not comparable_weights(there, here):
        differing.append("weights: digests by two algorithms, which cannot be compared")
    return differing + [
        f"{name}: {there['model'].get(name)} and {here['model'].get(name)}"
        for name in ("dtype", "weights", "files")
        if there["model"].get(name) != here["model"].get(name)
        and (name != "weights" or comparable_weights(there, here))
    ]


def comparable_weights(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Return whether the digests of the weights of two recordings are by one algorithm."""
    one, other = (side["model"].get("weights_digest", SHA256) for side in (there, here))
    return bool(one == other)


def changed_files(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return the paths of files, such as LoRAs, that are not those of a recording (`there`)."""
    recorded, own = (side["model"].get("files", {}) for side in (there, here))
    return [path for path in {**recorded, **own} if recorded.get(path) != own.get(path)]


def differing_settings(a: Run, b: Run) -> list[str]:
    """Return the settings of two recipes that differ: ["steps: 20 and 30"].

    Edits come first, as sentences. What was captured comes last: it changes no picture.
    """
    one, other = (dict(_flat({"kind": run.kind, **run.attributes.recipe})) for run in (a, b))
    ignored = (*UNRECORDED, "device")
    return differing_edits(a, b) + [
        f"{key}: {one.get(key)} and {other.get(key)}"
        for key in sorted({**one, **other}, key=lambda key: key.startswith("capture."))
        if key not in (*ignored, "edits") and one.get(key) != other.get(key)
    ]


def differing_edits(a: Run, b: Run) -> list[str]:
    """Return the edits that one of two runs has and the other has not, as sentences."""
    first, second = (edit_sentences(run.attributes.recipe) for run in (a, b))
    if edits_in(a.attributes.recipe) == edits_in(b.attributes.recipe):
        return []
    both = [sentence for sentence in first if sentence in second]
    return [
        f"edited, {which} alone: {sentence}"
        for which, sentences in (("the first", first), ("the second", second))
        for sentence in sentences
        if sentence not in both
    ] or ["edits: the same ones in another order"]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted names."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def compare(a: Run, b: Run) -> Comparison:
    """Compare everything that two recordings hold, over the steps that both have committed.

    A few steps are read at a time.
    """
    asked = differing_settings(a, b)
    first, second = _variables(a), _variables(b)
    differences = [Difference(name, "only in the first") for name in first if name not in second]
    differences += [Difference(name, "only in the second") for name in second if name not in first]
    shared = [name for name in first if name in second]
    steps = min(len(a.steps), len(b.steps))
    if len(a.steps) != len(b.steps):
        differences.append(
            Difference("committed", f"{len(a.steps)} steps and {len(b.steps)} steps")
        )
    for name in shared:
        if (difference := _difference(a, b, name, first[name], second[name], steps)) is not None:
            differences.append(difference)
    return Comparison(
        asked, differing_conditions(a.attributes, b.attributes), differences, len(shared)
    )


def _variables(run: Run) -> dict[str, xr.Variable]:
    return {
        f"{node.path}/{name}".strip("/"): variable
        for node in run.tree.subtree
        if node.path.strip("/").split("/")[0] not in NEW_EACH_TIME
        for name, variable in node.to_dataset(inherit=False).variables.items()
        if name != "committed"
    }


def _steps_there(run: Run, name: str, variable: xr.Variable, steps: int) -> list[int]:
    """Return the steps of which a recording may hold something."""
    return (
        in_files(run.path, name, variable, range(steps))
        if run.memory is None
        else list(range(steps))
    )


def _difference(
    a: Run, b: Run, name: str, one: xr.Variable, other: xr.Variable, steps: int
) -> Difference | None:
    if one.dims != other.dims or one.shape != other.shape:
        return Difference(name, f"sizes {dict(one.sizes)} and {dict(other.sizes)}")
    if one.dtype != other.dtype:
        return Difference(name, f"types {one.dtype} and {other.dtype}")
    stepped = "step" in one.dims and one.ndim > 1
    same_fill = repr(one.encoding.get("fill_value")) == repr(other.encoding.get("fill_value"))
    chosen = list(range(steps)) if stepped else [0]
    if stepped and same_fill:  # a step that neither has a file of is the same in both
        chosen = sorted({*_steps_there(a, name, one, steps), *_steps_there(b, name, other, steps)})
    elif (
        same_fill
        and one.ndim
        and not any(run.memory or has_files(run.path, name) for run in (a, b))
    ):
        chosen = []
    block = max(1, AT_ONCE * one.sizes["step"] // max(1, one.nbytes)) if stepped else 1
    count, greatest, at = 0, 0.0, None
    for begin in range(0, len(chosen), block):
        part = {"step": chosen[begin : begin + block]} if stepped else {}
        left, right = (np.asarray(v.isel(part).values) for v in (one, other))
        if stepped:
            left, right = (
                np.moveaxis(values, one.get_axis_num("step"), 0) for values in (left, right)
            )
        for row, (mine, theirs) in enumerate(
            zip(left, right, strict=True) if stepped else [(left, right)]
        ):
            wrong, off = _unlike(mine, theirs)
            if wrong and stepped and at is None:
                at = chosen[begin + row]
            count, greatest = count + wrong, max(greatest, off)
    total = one.size // one.sizes["step"] * steps if stepped else one.size
    return Difference(name, "values differ", count, total, greatest, at) if count else None


def _unlike(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """Return how many values differ in their bits, and by how much at most.

    The values are compared in parts, for they may be many.
    """
    count, greatest = 0, 0.0
    one, other = one.reshape(-1), other.reshape(-1)
    for begin in range(0, one.size, VALUES):
        left, right = one[begin : begin + VALUES], other[begin : begin + VALUES]
        unlike = left != right
        if left.dtype.kind == "f":
            unlike |= np.signbit(left) != np.signbit(right)  # 0 and -0 have different bits
            unlike &= ~(np.isnan(left) & np.isnan(right))
        if wrong := int(unlike.sum()):
            count += wrong
            if left.dtype.kind in "fiu":
                off = np.abs(left[unlike].astype(np.float64) - right[unlike].astype(np.float64))
                greatest = max(greatest, float(np.nan_to_num(off, nan=np.inf).max()))
    return count, greatest
