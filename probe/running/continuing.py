"""Whether an interrupted recording can go on to the bits that it would have had.

refuse_gaps(run)                              # complete in name alone?
check_continuable(run, model, planned, here)      # the conditions that are not as they were
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probe.diffusion.family import Family
from probe.errors import ModelError, RecordingDamaged
from probe.reading.compare import changed_files, differing_conditions
from probe.reading.recording import Run
from probe.settings.fields import from_home
from probe.system import exists
from probe.text import shown
from probe.watching.interface import Plan
from probe.writing.store import MANIFEST

LEVELS = ("step", "timestep", "sigma", "alpha_bar", "latents/scheduler_sigmas")
RECORD_AGAIN = "Record it again: probe rerun."


def refuse_gaps(run: Run) -> None:
    """Raise RecordingDamaged if a recording says that it is complete, and is not."""
    done, calls = len(run.steps), run.variable("committed").size
    if done < calls:
        lack = f"only {done} of {calls} steps are committed"
    elif not exists(run.path / MANIFEST):
        lack = f"it has no {MANIFEST}"
    else:
        return
    raise RecordingDamaged(f"{run.name} says that it is complete, and {lack}.", RECORD_AGAIN)


def check_continuable(run: Run, model: Family, planned: Plan, here: Mapping[str, Any]) -> list[str]:
    """Check that a run can go on to the same bits, and return the conditions that changed.

    `here` are the attributes that it would have now. Raise ModelError for another dtype or other
    weights, RecordingDamaged where the recording contradicts itself.
    """
    there = run.attributes
    dtype, weights = there.model.dtype, there.model.weights
    if here["model"]["dtype"] != dtype:
        raise ModelError(
            f"{run.name} was begun in {dtype}, and this model is in {here['model']['dtype']}.",
            "Bring the model in that number format, or leave the model out: probe run "
            "--resume loads it so.",
        )
    not_yet = weights == "unknown" and not len(run.steps)  # killed before anybody knew it
    if here["model"]["weights"] != weights and not not_yet:
        raise ModelError(
            f"{run.name} was begun with other weights of {model.name}.",
            "Bring those back, or record it again: probe rerun.",
        )
    if changed_paths := changed_files(there, here):
        raise ModelError(
            f"{run.name} was begun with another {changed_paths[0]} than is there now.",
            "Bring that file back, or record it again: probe rerun.",
        )
    # An older version has an experiment with fewer fields, and so another identity.
    same_experiment = here["experiment"] == there["experiment"]
    if same_experiment and here["identity"] != there.get("identity"):
        raise RecordingDamaged(
            f"The experiment in {run.name} is not the one it was begun with.",
            "Record it again: probe run.",
        )
    changed = differing_conditions(there, here)
    _hold(run, planned, here, bool(changed))
    return changed


def _hold(run: Run, planned: Plan, here: Mapping[str, Any], changed: bool) -> None:
    """Compare a recording's model and noise levels with those that would go on.

    Settings that only one version of diffusers has are skipped. Where conditions `changed`, levels
    may differ by rounding. Raise RecordingDamaged, by field.
    """
    for field, (recorded, own) in said_of_model(run, here).items():
        if type(recorded) is not type(own) or recorded != own:
            difference = f"its {field} is {shown(recorded)}, and {shown(own)} would go on"
            raise RecordingDamaged(f"{run.name}: {difference}.", RECORD_AGAIN)
    tolerance = 1e-4 if changed else 0
    for spec in planned.arrays:
        if spec.value is None or spec.path not in LEVELS:
            continue
        recorded, own = run.variable(spec.path).values, np.asarray(spec.value, spec.dtype)
        if recorded.shape != own.shape or not np.allclose(
            recorded, own, rtol=tolerance, atol=0, equal_nan=True
        ):
            scheduler = run.attributes["scheduler"]["class"]
            raise RecordingDamaged(
                f"{run.name}: its {spec.path} is not that of the {scheduler} that would go on.",
                RECORD_AGAIN,
            )


def said_of_model(run: Run, here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return pairs by field: what a recording says of its model, and what this one has (`here`)."""
    there = run.attributes
    pairs = {name: (there[name], here[name]) for name in ("prediction_type", "latent_convention")}
    pairs["scheduler.class"] = there["scheduler"]["class"], here["scheduler"]["class"]
    config, own = there["scheduler"]["config"], here["scheduler"]["config"]
    shared = [key for key in own if key in config and not key.startswith("_")]
    pairs |= {f"scheduler.config.{key}": (config[key], own[key]) for key in shared}
    pairs |= {
        f"model.{key}": (there["model"][key], here["model"][key])
        for key in ("f", "scaling_factor")
        if key in there["model"]
    }
    pairs["model.name"] = from_home(there["model"]["name"]), from_home(run.recipe.model)
    return pairs
