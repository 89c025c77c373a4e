"""Edits of the first noise: that of another seed or of a file, mixed in or added."""

from __future__ import annotations

import io
import math
from typing import Literal

import numpy as np
import torch

from probe.diffusion.draws import noise
from probe.errors import ExperimentError
from probe.reading.files import open_plain
from probe.settings.edits import Noise
from probe.settings.fields import expand_home

HEADER = 1000  # bytes of what a .npy file says of its array: numpy writes 128


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
    """Return a first noise from a .npy file. Raise ExperimentError if it does not fit.

    No more of it is read than an array of this shape takes, and nothing in it is run.
    """
    fitting = f"Write an array of shape {shape} with numpy.save."
    try:
        opened = open_plain(expand_home(file))
        if isinstance(opened, str):
            raise ExperimentError(f"file: {file} is {opened}.", fitting)
        with opened:
            data = io.BytesIO(opened.read(HEADER + 8 * math.prod(shape)))
        version = np.lib.format.read_magic(data)
        header = np.lib.format.read_array_header_1_0
        found, by_column, dtype = (
            header if version == (1, 0) else np.lib.format.read_array_header_2_0
        )(data)
    except FileNotFoundError:
        raise ExperimentError(f"file: there is no {file}.", fitting) from None
    except ExperimentError:
        raise
    except Exception as problem:  # numpy raises what it likes of a header that is none
        raise ExperimentError(f"file: {file} is no .npy file of numbers.", fitting) from problem
    if found != shape or dtype.kind != "f":
        raise ExperimentError(f"file: {file} has shape {found} and type {dtype}.", fitting)
    rest = data.read()
    if len(rest) != dtype.itemsize * math.prod(shape):
        raise ExperimentError(f"file: {file} is cut short, or holds more than an array.", fitting)
    order: Literal["C", "F"] = "F" if by_column else "C"
    values = np.frombuffer(rest, dtype).reshape(shape, order=order)
    numbers = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(numbers).all():
        raise ExperimentError(f"file: {file} holds values that are not finite.", fitting)
    return torch.from_numpy(numbers.copy())
