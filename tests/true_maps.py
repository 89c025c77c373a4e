"""The maps that a recording must hold, by two other implementations.

They are diffusers' own scores, and those of attention-map-diffusers 1.0.0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny_runs import condition, loop

from probe.analysis.maps import probabilities
from probe.reading.recording import Run
from probe.settings.experiment import Experiment
from probe.watching import hooks
from probe.watching.rehearsal import cross_attention

Scores = list[dict[str, torch.Tensor]]
EVERYTHING = {"branches": "both", "tokens": "all", "dtype": "float32"}
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"


def scores(pipe: Any, asked: Experiment) -> Scores:
    """By step and layer, diffusers' own `get_attention_scores` of what enters each layer.

    *Shape:* (branch, image, head, pixel, token) float32.
    """
    guided = asked.guidance_scale > 1
    text = condition(pipe, asked).rows(("uncond", "cond") if guided else ("cond",), asked.images)[
        "encoder_hidden_states"
    ]
    found: Scores = []
    now: dict[str, torch.Tensor] = {}

    def watch(path: str, module: Any) -> Callable[[torch.Tensor], None]:
        def callback(hidden: torch.Tensor) -> None:
            with torch.no_grad():
                query, key = (
                    module.head_to_batch_dim(tensor.float())
                    for tensor in (module.to_q(hidden), module.to_k(text))
                )
                rows = module.get_attention_scores(query, key, None)
            now[path] = (
                rows.unflatten(0, (2 if guided else 1, asked.images, module.heads)).float().cpu()
            )

        return callback

    with hooks.Hooks(
        [
            (module, "input", watch(path, module))
            for path, module in cross_attention(pipe.unet).items()
        ]
    ):
        for _ in loop(pipe, asked):
            found.append(dict(now))
            now.clear()
    return found


def assert_maps(run: Run, expected: Scores, absolute: float, relative: float = 0.0) -> None:
    """Every map of the recording is the expected one, and `rest` the sum of those that were not
    kept.
    """
    called = ["uncond", "cond"] if run.experiment.guidance_scale > 1 else ["cond"]
    compared: set[str] = set()
    for grid in run.grids:
        maps = run.attention(grid)
        values, positions = probabilities(maps.values), maps["token"].values
        kept = positions[positions >= 0]
        of = [called.index(branch) for branch in maps["branch"].values]
        for at, step in enumerate(maps["step"].values):
            for number, layer in enumerate(maps["layer"].values):
                whole = expected[step][layer][of].permute(4, 0, 1, 2, 3).numpy()
                wanted = whole[kept]
                if len(kept) < len(positions):
                    assert positions[-1] == -1
                    wanted = np.concatenate(
                        [wanted, np.delete(whole, kept, axis=0).sum(axis=0, keepdims=True)]
                    )
                found = values[at][:, :, :, number].reshape(wanted.shape)
                np.testing.assert_allclose(
                    found, wanted, atol=absolute, rtol=relative, err_msg=f"{layer}, step {step}"
                )
                compared.add(str(layer))
        np.testing.assert_allclose(
            values.sum(axis=1), 1, atol=absolute * values.shape[1] + relative
        )
    assert compared, "nothing was compared"


def peer_maps(asked: Experiment, pipe: Any) -> dict[tuple[int, str], np.ndarray]:
    """By call and layer, (branch x image, head, pixel, token), from the same prompt, noise and
    scheduler.
    """
    from attention_map_diffusers import AttentionCapture  # only here: its users may do without

    with AttentionCapture(
        pipe, relations="image->text", timesteps="all", heads="all", offload=None, dtype="float32"
    ) as capture:
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
    calls: Counter[str] = (
        Counter()
    )  # its records come in the order of the calls; timesteps repeat, so they tell no call
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
                one = (
                    ours.sel(layer=path)
                    .isel(step=index)
                    .transpose("branch", "image", "head", "y", "x", "token")
                    .values
                )
                expected = theirs[index, str(path)]
                assert np.abs(one.reshape(expected.shape) - expected).max() <= 1e-6
                compared += 1
    assert compared == len(theirs) > 0
