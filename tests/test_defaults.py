"""A notebook may set torch's defaults: what is recorded, proven and asked does not follow them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ask, pipeline

from probe.diffusion.defaults import plain_defaults
from probe.diffusion.loading import load
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.running.ask import read_out
from probe.running.recorder import record

# The meta device stands for a GPU: what lands on it by mistake has no values.
OTHERS = {"device": torch.device("meta"), "dtype": torch.float16}


@contextmanager
def others(kind: str) -> Iterator[None]:
    """Have another default of torch in a block, as a notebook sets it."""
    change: Any = getattr(torch, f"set_default_{kind}")
    change(OTHERS[kind])
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_is_recorded_proven_and_asked_as_ever(kind: str, tmp_path: Path) -> None:
    pipe, asked = pipeline(), ask(tmp_path, capture={"attention": "queries"})
    plain = record(asked, pipe, progress=False)
    of_cat = read_out(plain, "cat", pipeline=pipe)
    with others(kind):
        run = record(asked, pipe, progress=False)
        assert compare(plain, run).same
        assert not verify(run, pipe).failed and not verify(run).failed
        assert read_out(run, "cat", pipeline=pipe).equals(of_cat)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_is_loaded_as_ever(kind: str, saved: Path) -> None:
    plain = load(str(saved), device="cpu")
    with others(kind):
        model = load(str(saved), device="cpu")
    assert torch.equal(model.scheduler.alphas_cumprod, plain.scheduler.alphas_cumprod)
    assert model.digest() == plain.digest()


@pytest.mark.parametrize("kind", OTHERS)
def test_they_are_back_after_a_block(kind: str) -> None:
    with others(kind):
        before = torch.empty(1).device, torch.empty(1).dtype
        with plain_defaults():
            inside = torch.empty(1).device, torch.empty(1).dtype
        assert inside == (torch.device("cpu"), torch.float32) != before
        assert (torch.empty(1).device, torch.empty(1).dtype) == before
