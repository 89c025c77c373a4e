"""Maps are those of attention-map-diffusers 1.0.0, an independent implementation that swaps the attention processors.

Also with adapters, and with a processor that multiplies eagerly. Sliced attention it refuses: there, ours are held against
diffusers' own `get_attention_scores`. Fused projections both refuse. It is installed by `tasks.py test` without its
requirements, one of which is a torchvision that breaks a CPU build of torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from attention_map_diffusers import AttentionCapture
from test_capture import assert_maps, scores
from test_conditions import WORKS
from test_recorder import ask, pipeline

from probe.errors import CaptureError
from probe.experiment import Experiment
from probe.reading.recording import Run
from probe.running.recorder import record

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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": 2, "negative_prompt": "the hat"},
        {"height": 40, "width": 24},
        {"guidance_scale": 1, "images": 2},
    ],
    ids=["plain", "two images, a negative prompt", "not square", "no guidance"],
)
def test_every_map_of_every_call_layer_head_and_branch_is_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    branches = "both" if changes.get("guidance_scale", 3) > 1 else "cond"
    asked = ask(tmp_path, capture={**EVERYTHING, "branches": branches}, **changes)
    assert_the_same(record(asked, pipeline(), progress=False), peer_maps(asked, pipeline()))


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


@pytest.mark.parametrize("name", ["lora", "two loras", "merged lora", "plain processor"])
def test_what_was_done_to_the_model_is_in_both(name: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    WORKS[name](pipe)
    asked = ask(tmp_path, steps=2, images=2, capture=EVERYTHING)
    run, theirs = record(asked, pipe, progress=False), peer_maps(asked, pipe)
    assert_the_same(run, theirs)
    if "lora" in name:
        with pytest.raises(AssertionError):
            assert_the_same(run, peer_maps(asked, pipeline()))


@pytest.mark.parametrize("name", ["sliced attention", "sliced into many heads"])
def test_sliced_attention_which_it_refuses_has_diffusers_own_scores(name: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    WORKS[name](pipe)
    asked = ask(tmp_path, steps=2, images=2, capture=EVERYTHING)
    with pytest.raises(RuntimeError, match=r"unsupported denoiser processor.*SlicedAttnProcessor"), AttentionCapture(pipe):
        pass
    assert_maps(record(asked, pipe, progress=False), scores(pipe, asked), 1e-6)


def test_fused_projections_are_refused_by_both(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(RuntimeError, match=r"unsupported denoiser processor.*FusedAttnProcessor2_0"), AttentionCapture(pipe):
        pass
    with pytest.raises(CaptureError, match="has fused QKV projections") as caught:
        record(ask(tmp_path, steps=2, capture=EVERYTHING), pipe, progress=False)
    assert "unfuse_qkv_projections" in caught.value.remedy


def test_meta_a_difference_would_be_seen(tmp_path: Path) -> None:
    asked = ask(tmp_path, capture=EVERYTHING)
    theirs = peer_maps(asked, pipeline())
    assert max(np.abs(theirs[0, path] - theirs[1, path]).max() for index, path in theirs if index == 0) > 1e-5
    assert all(np.abs(maps[:, 0] - maps[:, 1]).max() > 1e-5 for maps in theirs.values())
