"""Recordings that another machine made: what this processor can repeat of them, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probe.errors import StoreError
from probe.reading.recording import Run
from probe.running.recorder import resume


def roots_are_the_nearest() -> bool:
    """Tell whether torch's square roots are the nearest numbers, as where the recordings were made.

    They are those of MKL, which on processors of some makers are one unit off at places. DDIM's
    step takes roots, so its last bits follow.
    """
    numbers = torch.linspace(0.001, 1, 1000)
    nearest = torch.from_numpy(np.sqrt(numbers.numpy()))
    each = torch.stack([number.sqrt() for number in numbers])  # alone, as a scheduler takes them
    return torch.equal(numbers.sqrt(), nearest) and torch.equal(each, nearest)


def resumed(run: Run) -> Run:
    """Go on with a recording of another machine; skip where this processor has other last bits."""
    try:
        return resume(run, progress=False)
    except StoreError as error:
        said, remedy = str(error), error.remedy
    assert "come out otherwise than they were recorded" in said and "another processor" in remedy
    assert not roots_are_the_nearest()
    pytest.skip("this processor's roots have other last bits than the recording's")
