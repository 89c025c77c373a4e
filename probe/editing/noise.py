"""Edits of the first noise: that of another seed or of a file, mixed in or added."""

from __future__ import annotations

import numpy as np
import torch

from probe.diffusion.draws import noise
from probe.errors import ExperimentError
from probe.settings.edits import Noise
from probe.settings.fields import expand_home


def noise_of(edit: Noise, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the noise that an edit names, (image, channel, y, x), on the CPU.

    Raise ExperimentError if its file does not fit.
    """
    if edit.file is None:
        assert edit.seed is not None
        return noise(edit.seed, shape, dtype)[0]
    return read_noise(edit.file, shape)


def mixed_noise(own: torch.Tensor, other: torch.Tensor, edit: Noise) -> torch.Tensor:
    """Return a first noise with another mixed in, at the same variance, or added."""
    amount = edit.amount
    keep = (1 - amount * amount) ** 0.5 if edit.method == "mix" else 1.0
    return keep * own + amount * other


def read_noise(file: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a first noise from a .npy file. Raise ExperimentError if it does not fit."""
    path = expand_home(file)
    fitting = f"Write an array of shape {shape} with numpy.save."
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ExperimentError(f"file: there is no {file}.", fitting) from None
    except (OSError, ValueError) as problem:
        raise ExperimentError(f"file: {file} is no .npy file of numbers.", fitting) from problem
    if values.shape != shape or values.dtype.kind != "f":
        raise ExperimentError(
            f"file: {file} has shape {values.shape} and type {values.dtype}.", fitting
        )
    numbers = np.array(values, np.float32)
    if not np.isfinite(numbers).all():
        raise ExperimentError(f"file: {file} holds values that are not finite.", fitting)
    return torch.from_numpy(numbers)
