"""Maps of attention-map-diffusers 1.0.0, an independent implementation, and how ours are held against them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from attention_map_diffusers import AttentionCapture

from probe.experiment import Experiment
from probe.reading.recording import Run

EVERYTHING = {"branches": "both", "tokens": "all", "dtype": "float32"}


def peer_maps(asked: Experiment, pipe: Any) -> dict[tuple[int, str], np.ndarray]:
    """By call and layer, (branch x image, head, pixel, token), from the same prompt, noise and scheduler."""
    with AttentionCapture(pipe, relations="image->text", timesteps="all", heads="all", offload=None, dtype="float32") as capture:
        pipe(
            asked.prompt,
            negative_prompt=asked.negative_prompt or None,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            num_images_per_prompt=asked.images,
            height=asked.height,
            width=asked.width,
            generator=[torch.Generator().manual_seed(asked.seed + i) for i in range(asked.images)],
            output_type="latent",
        )
    calls: Counter[str] = Counter()  # its records come in the order of the calls; timesteps repeat, so they tell no call
    found = {}
    for made in capture.compute().records:
        path = made.layer_id.removeprefix("unet.")
        found[calls[path], path] = made.data.numpy()
        calls[path] += 1
    return found


def assert_the_same(run: Run, theirs: dict[tuple[int, str], np.ndarray]) -> None:
    compared = 0
    for grid in run.grids:
        ours = run.attention(grid)
        for path in ours["layer"].values:
            for index in range(run.tree.sizes["step"]):
                one = ours.sel(layer=path).isel(step=index).transpose("branch", "image", "head", "y", "x", "token").values
                expected = theirs[index, str(path)]
                assert np.abs(one.reshape(expected.shape) - expected).max() <= 1e-6
                compared += 1
    assert compared == len(theirs) > 0
