"""The model that this process holds, and what else decides the bits of a cell here.

model, weights = held(experiment)     # loaded once; the next cell of this model has it too
conditions(experiment)                # weights, versions, device, dtype: part of an address
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.loading import load, pick_device
from probe.errors import ModelError
from probe.format.schema import FORMAT_VERSION
from probe.settings.experiment import Experiment
from probe.words import RULES

# The fields by which a model is loaded. Everything else of it is switched from cell to cell.
OF_MODEL = ("model", "revision", "variant", "dtype", "device")

_held: dict[str, tuple[Family, str]] = {}


def model_key(experiment: Experiment) -> str:
    """Return what tells the models of two experiments apart."""
    return json.dumps([getattr(experiment, field) for field in OF_MODEL])


def held(experiment: Experiment) -> tuple[Family, str]:
    """Return an experiment's model with its own scheduler, and the digest of its weights.

    A process holds one model. Raise as `load` does.
    """
    key = model_key(experiment)
    if key not in _held:
        _held.clear()
        gc.collect()  # a second model may find no room
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model = _loaded(experiment)
        _held[key] = model, model.digest()
    return _held[key]


def _loaded(experiment: Experiment) -> Family:
    fields = {field: getattr(experiment, field) for field in OF_MODEL}
    name = fields.pop("model")
    try:
        return load(name, **fields)
    except ModelError:
        scheduler, options = experiment.sampler
        if scheduler == "default":
            raise
        # Its own scheduler is not supported, and another one is made from its betas.
        return load(name, **fields, scheduler=scheduler, options=options)


def conditions(experiment: Experiment) -> dict[str, Any]:
    """Return what decides the bits of a cell beside its experiment: all that is true here."""
    model, weights = held(experiment)
    return {
        "model": experiment.model,
        "weights": weights,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": pick_device(experiment.device).type,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions that decide bits."""
    import diffusers
    import transformers

    try:
        own = importlib.metadata.version("diffusion-probe")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        own = "unknown"
    return {
        "probe": own,
        "format": str(FORMAT_VERSION),
        "text_rules": str(RULES),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
