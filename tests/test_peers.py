"""Maps equal those of attention-map-diffusers 1.0.0, which swaps the attention processors.

It is an independent implementation. They agree also with adapters, and with a processor that
multiplies eagerly. It refuses sliced attention: there, ours are compared with diffusers' own
`get_attention_scores`. Both refuse fused projections. `tasks.py test` installs it without its
requirements, because one is a torchvision that breaks a CPU build of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from altered import WORKS
from attention_map_diffusers import AttentionCapture
from tiny_runs import ask, pipeline
from true_maps import EVERYTHING, assert_maps, assert_the_same, peer_maps, scores

from probe.errors import CaptureError
from probe.running.recorder import record


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": 2, "negative_prompt": "the hat", "height": 40, "width": 24},
        *(
            pytest.param(changes, marks=pytest.mark.slow)  # each change alone
            for changes in (
                {"images": 2, "negative_prompt": "the hat"},
                {"height": 40, "width": 24},
                {"guidance_scale": 1, "images": 2},
            )
        ),
    ],
    ids=["plain", "all", "two images, a negative prompt", "not square", "no guidance"],
)
def test_every_map_of_every_call_layer_head_and_branch_is_the_same(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    branches = "both" if changes.get("guidance_scale", 3) > 1 else "cond"
    asked = ask(tmp_path, capture={**EVERYTHING, "branches": branches}, **changes)
    assert_the_same(record(asked, pipeline(), progress=False), peer_maps(asked, pipeline()))


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
def test_sliced_attention_which_it_refuses_has_diffusers_own_scores(
    name: str, tmp_path: Path
) -> None:
    pipe = tiny.pipeline()
    WORKS[name](pipe)
    asked = ask(tmp_path, steps=2, images=2, capture=EVERYTHING)
    with (
        pytest.raises(RuntimeError, match=r"unsupported denoiser processor.*SlicedAttnProcessor"),
        AttentionCapture(pipe),
    ):
        pass
    assert_maps(record(asked, pipe, progress=False), scores(pipe, asked), 1e-6)


def test_fused_projections_are_refused_by_both(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with (
        pytest.raises(RuntimeError, match=r"unsupported denoiser processor.*FusedAttnProcessor2_0"),
        AttentionCapture(pipe),
    ):
        pass
    with pytest.raises(CaptureError, match="has fused QKV projections") as caught:
        record(ask(tmp_path, steps=2, capture=EVERYTHING), pipe, progress=False)
    assert "unfuse_qkv_projections" in caught.value.remedy


def test_meta_a_difference_would_be_seen(tmp_path: Path) -> None:
    asked = ask(tmp_path, capture=EVERYTHING)
    theirs = peer_maps(asked, pipeline())
    assert (
        max(np.abs(theirs[0, path] - theirs[1, path]).max() for index, path in theirs if index == 0)
        > 1e-5
    )
    assert all(np.abs(maps[:, 0] - maps[:, 1]).max() > 1e-5 for maps in theirs.values())
