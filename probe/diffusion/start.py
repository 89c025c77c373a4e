"""Where a run from a picture begins: latents of the picture, and the noise to mix into them.

Every draw is made on the CPU, by one generator an image, in diffusers' order: the sample of the
VAE's posterior, then the noise, then whatever the scheduler draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from probe.diffusion.draws import draw, seeded
from probe.diffusion.family import Family
from probe.diffusion.sampling import Start
from probe.settings.experiment import Experiment


def memory_formats(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return how `clean` latents and each `prediction` of a run lay in memory.

    What its attributes do not name was contiguous.
    """
    return {
        "clean": "contiguous",
        "prediction": "contiguous",
        **attributes.get("memory_format", {}),
    }


def begun(model: Family, experiment: Experiment, picture: np.ndarray) -> Start:
    """Return where a run begins: sampled latents of the picture and noise, for each image."""
    generators = seeded(experiment.seed, experiment.images)
    clean = model.encode_picture(picture, generators)
    eps = model.begin(generators, *picture.shape[:2])
    return Start(clean, eps, experiment.strength, generators)


def restart(experiment: Experiment, clean: torch.Tensor, encoded: bool) -> Start:
    """Return where a recorded run began: its latents as they are, its noise drawn anew.

    `encoded` is whether a VAE made the latents: its sample is drawn first, and dropped.
    """
    generators = seeded(experiment.seed, experiment.images)
    shape = tuple(clean.shape)
    if encoded:
        draw(generators, shape, clean.dtype)
    eps = draw(generators, shape, clean.dtype)
    return Start(clean, eps.to(clean.device), experiment.strength, generators)
