"""torch's defaults as they are in a new process: tensors on the CPU, numbers in float32.

A notebook may have set others (`torch.set_default_device("cuda")`, `torch.set_default_dtype`).
Schedulers, skeletons and random numbers would follow them, and a sound recording would not verify.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Have torch's own defaults in a block, or in a function that this decorates."""
    dtype = torch.get_default_dtype()
    with ExitStack() as until_end:
        if torch.get_default_device().type != "cpu":  # a context costs every operation a little
            until_end.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            until_end.callback(torch.set_default_dtype, dtype)
        yield
