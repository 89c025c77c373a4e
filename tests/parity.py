"""Ask the loop and diffusers' own pipeline for the same picture, in all pairs of settings."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from probe.diffusion.family import Family
from probe.diffusion.sampling import Step, denoise

PROMPT, SEED = "a cat on the hat", 3
Case = tuple[Any, ...]


def pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


@functools.cache
def pairwise(*factors: tuple[Any, ...]) -> list[Case]:
    """A covering array.

    Greedy: always the first case that covers the most pairs not yet covered.
    """
    cases = list(itertools.product(*factors))
    missing, rows = set().union(*map(pairs, cases)), []
    while missing:
        rows.append(max(cases, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(rows[-1])
    return rows


def product(*factors: tuple[Any, ...]) -> list[Any]:
    """Return every combination for `parametrize`; those that `pairwise` leaves out are slow."""
    quick = pairwise(*factors)
    return [
        case if case in quick else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(*factors)
    ]


def assert_every_pair_is_covered(*factors: tuple[Any, ...]) -> None:
    covered = set().union(*map(pairs, pairwise(*factors)))
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        for a, b in itertools.product(first, second):
            assert (i, a, j, b) in covered, f"{a} with {b} is never tried"


def label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).replace(" ", "")


def theirs(
    pipeline: Any, *, steps: int, images: int = 1, negative: str = "", **how: Any
) -> tuple[torch.Tensor, np.ndarray]:
    """The latents of the pipeline's last step and its uint8 pictures, from one call."""
    kept: list[torch.Tensor] = []

    def keep(
        _: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        kept.append(tensors["latents"])
        return tensors

    pictures = pipeline(
        PROMPT,
        negative_prompt=negative or None,
        num_images_per_prompt=images,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(SEED + i) for i in range(images)],
        output_type="pil",
        callback_on_step_end=keep,
        **how,
    ).images
    return kept[-1], np.stack([np.asarray(picture) for picture in pictures])


def ours(
    model: Family, *, guidance_scale: float, negative: str = "", size_ids: Any = None, **how: Any
) -> list[Step]:
    told = {} if size_ids is None else {"size_ids": size_ids}
    conditioning = model.condition(PROMPT, negative, guided=guidance_scale > 1, **told)
    return list(denoise(model, conditioning, seed=SEED, guidance_scale=guidance_scale, **how))


def assert_bits(
    model: Family, steps: list[Step], latents: torch.Tensor, pictures: np.ndarray
) -> torch.Tensor:
    """The last latents, which are those of the pipeline, as is their picture: bit for bit."""
    last = steps[-1].next_latents
    assert bool(torch.isfinite(last).all())
    assert torch.equal(latents, last), f"latents differ by up to {(latents - last).abs().max()}"
    assert torch.equal(torch.from_numpy(pictures), model.decode(last)[0]), "the pictures differ"
    return last
