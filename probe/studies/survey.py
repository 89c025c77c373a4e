"""Look at every cell before the first one runs: can it be, how many model calls, how many bytes.

    result = survey([cell.experiment.resolved() for cell in cells], measures)

A survey is made where the cells are computed: there the model is, and the versions. Cells that
differ in seed or strength of guidance alone are planned once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from probe.errors import UserError
from probe.running.model import model_for
from probe.running.planning import plan
from probe.running.recorder import record_as
from probe.settings.experiment import Experiment
from probe.settings.recipe import UNRECORDED
from probe.studies.measures import check_measures
from probe.studies.models import conditions, held, model_key
from probe.watching.interface import Plan

# Fields that change no shape, and that a plan does not look at.
SHAPELESS = ("seed", "eta", "guidance_rescale", "on_nan", *UNRECORDED)
FEW = 2  # steps of the cell that is timed
SUMMARY = ("latents/final_latents", "images/final")
OF_RECORD = 2000  # bytes of what a cell says of itself


@dataclass(frozen=True)
class Size:
    """How much work one cell is, and how much it leaves behind."""

    calls: int
    bytes: int
    summary: int
    largest: str  # the variable that takes most


def survey(experiments: Sequence[dict[str, Any]], measures: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is known of experiments before they run, as plain values.

    `sizes` are those of `Size`, in the order of the experiments; `conditions` decide bits, by
    model.
    For an experiment that cannot be, also for want of its model, its size is the error's kind,
    cause and remedy. Raise ExperimentError for a measure that is none.
    """
    check_measures(measures)
    keys = [_shape_key(fields) for fields in experiments]
    first: dict[str, Experiment] = {}
    for key, fields in zip(keys, experiments, strict=True):
        if key not in first:
            first[key] = Experiment.model_validate(fields)
    sizes: dict[str, Any] = {}
    found: dict[str, Any] = {}
    refused: dict[str, Any] = {}  # a model that cannot be had is asked for once
    for key, experiment in sorted(first.items(), key=lambda item: model_key(item[1])):
        model = model_key(experiment)
        try:
            if model not in found and model not in refused:
                found[model] = conditions(experiment)
        except UserError as error:
            refused[model] = _refusal(error)
        sizes[key] = refused.get(model) or _size(experiment)
    return {"sizes": [sizes[key] for key in keys], "conditions": found}


def _shape_key(fields: dict[str, Any]) -> str:
    kept = {name: value for name, value in fields.items() if name not in SHAPELESS}
    kept["guidance_scale"] = kept["guidance_scale"] > 1
    # No edit, a whole one and a part of one are refused for different reasons.
    kept["edits"] = [
        {**edit, "label": "", "amount": edit["amount"] if edit["amount"] in (0, 1) else None}
        for edit in kept.get("edits", ())
    ]
    if any(edit["kind"] == "noise" for edit in kept["edits"]):
        kept["seed"] = fields["seed"]  # which the noise is not to be
    return json.dumps(kept, sort_keys=True)


def _size(experiment: Experiment) -> dict[str, Any]:
    model, _ = held(experiment)
    try:
        planned = plan(model_for(experiment, model, lambda _: None), experiment)
    except UserError as error:
        return _refusal(error)
    sizes = planned.forecast()
    return {
        "calls": planned.calls,
        "bytes": sum(sizes.values()) + OF_RECORD,
        "summary": _summary(planned, sizes) + OF_RECORD,
        "largest": max(sizes, key=lambda path: sizes[path]),
    }


def _refusal(error: UserError) -> dict[str, Any]:
    return {"error": [type(error).__name__, error.cause, error.remedy]}


def _summary(planned: Plan, sizes: dict[str, int]) -> int:
    """Return about how many bytes a summary takes: pictures twice, latents, a mean map a word."""
    y, x = max(planned.rehearsal.grids.values(), default=(0, 0)) if planned.layers else (0, 0)
    words = len({word for word in planned.prompts["cond"].words if word}) if planned.layers else 0
    once = sum(size for path, size in sizes.items() if path in SUMMARY)
    return 2 * once + 4 * words * y * x


def seconds_a_call(fields: dict[str, Any]) -> float:
    """Return how long one model call of an experiment takes here, measured in memory.

    A few steps are recorded twice, and the second time counts.
    """
    experiment = Experiment.model_validate({**fields, "steps": FEW})
    experiment = experiment.model_copy(update={"edits": ()})
    model, weights = held(experiment)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        run = record_as(model, experiment, weights=weights, in_files=False)
        seconds = (time.perf_counter() - began) / run.tree.sizes["step"]
    return seconds
