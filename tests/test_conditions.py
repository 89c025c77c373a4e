"""Whatever people do to a pipeline, recording it is exact, or is refused by name.

There is never a wrong map in silence. The reference is what the layers hand to torch:
`scaled_dot_product_attention` and diffusers' `get_attention_scores` are listened to during a run
without hooks. So an error in where our hooks are, or when, cannot be in the reference too.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import numpy as np
import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from altered import OTHER_MAPS, TOKENS, WORKS, Own, Swapped, everywhere, lora, merging
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from tiny_runs import OFF, ask, assert_neutral, assert_no_hooks, bare, model_for, take
from torch.nn import functional
from true_maps import DOWN, EVERYTHING, MIDDLE, Scores, assert_maps

from probe.errors import CaptureError, ExperimentError, ModelError
from probe.running.planning import plan
from probe.settings.experiment import Experiment
from probe.watching import conditions
from probe.watching.conditions import PLAIN, ProcessorWitness, is_plain
from probe.watching.cross_attention import CrossAttention
from probe.watching.interface import hooked
from probe.watching.rehearsal import cross_attention

ASKED = {
    "steps": 2,
    "images": 2,
    "width": 48,
    "negative_prompt": "scuba diving",
    "capture": EVERYTHING,
}


@contextlib.contextmanager
def listening() -> Iterator[list[torch.Tensor]]:
    """Every softmax(q k^T) over tokens that is computed inside the block, in order.

    *Shape:* (batch x head, pixel, token) float64.
    """
    heard: list[torch.Tensor] = []
    fused, plain = functional.scaled_dot_product_attention, Attention.get_attention_scores

    def hear_fused(
        query: torch.Tensor, key: torch.Tensor, *args: Any, **named: Any
    ) -> torch.Tensor:
        if (
            key.shape[-2] == TOKENS and query.shape[-2] != TOKENS
        ):  # neither self-attention nor the text encoder
            assert named.get("attn_mask") is None and not named.get("is_causal")
            scale = named.get("scale") or query.shape[-1] ** -0.5
            heard.append(
                (query.double() @ key.double().transpose(-1, -2) * scale).softmax(-1).flatten(0, 1)
            )
        return fused(query, key, *args, **named)

    def hear_plain(
        attn: Any, query: torch.Tensor, key: torch.Tensor, mask: Any = None
    ) -> torch.Tensor:
        shares = plain(attn, query, key, mask)
        if key.shape[-2] == TOKENS:
            heard.append(shares.double())
        return shares

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", hear_fused),
        mock.patch.object(Attention, "get_attention_scores", hear_plain),
    ):
        yield heard


def attended(pipe: Any, asked: Experiment) -> Scores:
    """By step and layer, what the layers multiplied.

    *Shape:* (branch, image, head, pixel, token).
    """
    settled = plan(model_for(pipe, asked), asked)
    with listening() as heard:
        steps = bare(pipe, asked)
    calls = iter(heard)  # a sliced layer is heard in several parts

    def layer(path: str, grid: tuple[int, int]) -> torch.Tensor:
        heads = settled.rehearsal.heads[path]
        count, parts = len(settled.computed_branches) * asked.images * heads, []
        while sum(len(part) for part in parts) < count:
            parts.append(next(calls))
        assert parts[0].shape[1] == grid[0] * grid[1]
        return torch.cat(parts).unflatten(0, (len(settled.computed_branches), asked.images, heads))

    found = [
        {path: layer(path, grid) for path, grid in settled.rehearsal.grids.items()} for _ in steps
    ]
    assert next(calls, None) is None
    return found


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_it_is_recorded_exactly(name: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    untouched = copy.deepcopy(pipe.unet) if name in OTHER_MAPS else None
    WORKS[name](pipe)
    run = take(tmp_path, pipe, **ASKED)
    assert_neutral(run, bare(pipe, run.experiment))
    expected = attended(pipe, run.experiment)
    assert_maps(run, expected, 1e-6)
    assert_no_hooks(pipe)
    if untouched is not None:  # it matters where the hooks sit: the maps are other ones
        pipe.unet = untouched
        with pytest.raises(AssertionError):
            assert_maps(run, attended(pipe, run.experiment), 1e-3)


@pytest.mark.slow
def test_vae_tiling_leaves_out_the_statistics_of_what_runs_tile_by_tile(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    whole = take(tmp_path / "whole", pipe, steps=1)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 16
    run = take(tmp_path / "tiled", pipe, steps=1)
    assert not np.array_equal(run.images.values, whole.images.values), "nothing was tiled"
    assert "statistics" in whole.tree["vae"] and "statistics" not in run.tree.get("vae", {})
    with pytest.raises(ExperimentError, match=r"vae\.decoder\.mid_block runs \d+ times a call"):
        take(
            tmp_path / "refused", pipe, steps=1, capture={"activations": ("vae.decoder.mid_block",)}
        )


# --- what is refused ------------------------------------------------------------------------------


class Masked(Own):
    """Hides the last tokens, as processors for regional prompts do."""

    def multiply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(key.shape[2]) < key.shape[2] - 2
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[None, None, None]
        )


class Sharper(Own):
    """A temperature on the scores."""

    def multiply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(20 * query, key, value)


class Rotated(Own):
    """Position codes on the queries."""

    def multiply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query.flip(-1), key, value)


class Unchecked(Own):
    """Multiplies with the output weights by hand: what it computed cannot be seen."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        out, attn_out = attn.to_out[0], mock.Mock(wraps=attn)
        attn_out.heads, attn_out.to_out = (
            attn.heads,
            [lambda x: functional.linear(x, out.weight, out.bias), attn.to_out[1]],
        )
        return super().__call__(attn_out, hidden_states, encoder_hidden_states)


class Added(torch.nn.Module):
    """An image prompt: more keys and values than the text has."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(torch.cat([text, text[:, :4]], dim=1))
        return found


def added_tokens(pipe: Any) -> None:
    for module in cross_attention(pipe.unet).values():
        module.to_k, module.to_v = Added(module.to_k), Added(module.to_v)


def other_scale(pipe: Any) -> None:
    """AttnProcessor2_0 lets torch choose the scale; one that is set on the module is read by nobody
    but us.
    """
    for module in cross_attention(pipe.unet).values():
        module.scale *= 20


def new_forward(pipe: Any) -> None:
    """The older way of prompt-to-prompt: the module's forward is replaced, its processor stays as
    it is.
    """
    for module in cross_attention(pipe.unet).values():
        module.forward = lambda *args, attn=module, **named: Swapped()(attn, *args, **named)


def sequential_offload(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


def offload_elsewhere(pipe: Any) -> None:
    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="meta", place_submodules=False))
    pipe.unet.to("cpu")


def compiled_unet(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_forward(pipe: Any) -> None:
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")


def compiled_decode(pipe: Any) -> None:
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


def casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


WRONG = rf"^{DOWN} does not compute softmax\(q k\^T\) v"
REFUSED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "fused": (
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        rf"^{DOWN} has fused QKV projections",
        "unfuse_qkv_projections",
    ),
    "compiled": (compiled_unet, r"^unet is compiled", "pipeline.unet._orig_mod"),
    "compiled in place": (
        lambda pipe: pipe.unet.compile(backend="eager"),
        r"^unet is compiled",
        "before compiling",
    ),
    "compiled forward": (compiled_forward, r"^unet is compiled", "before compiling"),
    "compiled blocks": (
        lambda pipe: pipe.unet.compile_repeated_blocks(backend="eager"),
        r"^unet\.down_blocks\.0\S+ is compiled",
        "before compiling",
    ),
    "compiled decoder": (compiled_decode, r"^vae is compiled", "before compiling"),
    "sequential offload": (sequential_offload, r"^unet\S* is off-loaded", "remove_all_hooks"),
    "offload elsewhere": (
        offload_elsewhere,
        r"^unet is off-loaded: accelerate moves its weights to meta",
        "remove_all_hooks",
    ),
    "layerwise casting": (
        casting,
        r"^unet\S* is wrapped by diffusers' layerwise_casting hook",
        "without it",
    ),
    "masked": (everywhere(Masked), WRONG, "set_default_attn_processor"),
    "sharper": (everywhere(Sharper), WRONG, "set_default_attn_processor"),
    "rotated": (everywhere(Rotated), WRONG, "set_default_attn_processor"),
    "swapped": (everywhere(Swapped), WRONG, "leave the layer out"),
    "unchecked": (
        everywhere(Unchecked),
        rf"{DOWN} does not compute.*could not be checked",
        "leave the layer out",
    ),
    "other scale": (other_scale, WRONG, "leave the layer out"),
    "new forward": (new_forward, WRONG, "leave the layer out"),
    "merging": (merging, rf"^{DOWN} multiplies \(4, 48\) queries", "token merging"),
    "added tokens": (
        added_tokens,
        rf"^{DOWN} multiplies .* with \(4, 81\) keys, not .* with \(4, 77\)",
        "image prompt",
    ),
}
NOT_RUN = (
    "sequential offload",
    "offload elsewhere",
    "layerwise casting",
)  # nor does our loop, whose latents go where the weights are


@pytest.mark.parametrize("name", REFUSED)
def test_it_stops_the_run_by_name(name: str, tmp_path: Path) -> None:
    change, cause, remedy = REFUSED[name]
    pipe = tiny.pipeline()
    change(pipe)
    with pytest.raises((CaptureError, ModelError), match=cause) as caught:
        take(tmp_path, pipe, **ASKED)
    assert remedy in caught.value.remedy and "\n" not in caught.value.cause
    assert_no_hooks(pipe)
    for path in tmp_path.glob("*.zarr"):
        assert '"complete"' not in (path / "zarr.json").read_text()
    if "compiled" in name:
        torch._dynamo.reset()
    elif name not in NOT_RUN:
        with torch.no_grad():  # without us it runs: what is refused is the recording
            assert bare(pipe, ask(tmp_path, steps=1))[0].next_latents.isfinite().all()


def test_such_a_model_is_recorded_without_the_attention(tmp_path: Path) -> None:
    """The remedy holds: what is refused are maps."""
    pipe = tiny.pipeline()
    pipe.unet.set_attn_processor(Swapped())
    run = take(tmp_path, pipe, steps=2, capture={**OFF, "statistics": True})
    assert_neutral(run, bare(pipe, run.experiment))


def test_only_the_layer_that_differs_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    cross_attention(pipe.unet)[MIDDLE].set_processor(Masked())
    with pytest.raises(CaptureError, match=rf"^{MIDDLE} does not compute"):
        take(tmp_path / "all", pipe, **ASKED)
    run = take(
        tmp_path / "others", pipe, **{**ASKED, "capture": {**EVERYTHING, "layers": ("8x12",)}}
    )
    assert run.status == "complete"


def test_a_lora_that_comes_after_the_hooks_is_noticed(tmp_path: Path) -> None:
    """The hooks then sit on its base layers, and would give the maps of the model without it."""
    pipe = tiny.pipeline()
    asked = ask(tmp_path, steps=1)
    settled = plan(model_for(pipe, asked), asked)
    reader = next(capture for capture in settled.captures if isinstance(capture, CrossAttention))
    with hooked(reader):
        lora(pipe)
        with pytest.raises(
            CaptureError, match=rf"^{DOWN}: to_q or to_k was replaced while recording"
        ):
            bare(pipe, asked)


# --- the checks can fail --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_witness_believes_the_usual_processor_in_any_dtype_and_no_other(
    dtype: torch.dtype,
) -> None:
    """All that `is_plain` lets through unproven would also be proven."""
    pipe = tiny.pipeline().to(dtype)
    asked = ask(Path(), steps=1)
    for processor, fails in (
        (AttnProcessor2_0(), False),
        (AttnProcessor(), False),
        (Own(), False),
        (Sharper(), True),
        (Masked(), True),
    ):
        pipe.unet.set_attn_processor(processor)
        with mock.patch.object(conditions, "is_plain", return_value=False):
            witness = ProcessorWitness(cross_attention(pipe.unet), [1])
        with hooked(witness):
            if fails:
                with pytest.raises(CaptureError, match="does not compute"):
                    bare(pipe, asked)
            else:
                bare(pipe, asked)
                witness.take()
                with pytest.raises(CaptureError, match="could not be checked"):
                    witness.take()


def test_without_the_witness_a_wrong_map_would_be_recorded(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.unet.set_attn_processor(Sharper())
    with mock.patch.object(conditions, "is_plain", return_value=True):
        run = take(tmp_path, pipe, **ASKED)
    with pytest.raises(AssertionError):
        assert_maps(run, attended(pipe, run.experiment), 1e-3)


def test_known_processors_are_those_of_diffusers_and_cost_nothing() -> None:
    from diffusers.models import attention_processor

    for name in PLAIN:
        source = inspect.getsource(getattr(attention_processor, name))
        assert source.count("attn.to_q(") == source.count("attn.to_k(") == 1
    layers = cross_attention(tiny.pipeline().unet)
    assert all(is_plain(module) for module in layers.values())
    assert ProcessorWitness(layers, [0]).watches() == []
    for module in layers.values():
        module.set_processor(type("AttnProcessor2_0", (AttnProcessor2_0,), {})())
        assert not is_plain(module), "a class of the same name from elsewhere"


@pytest.mark.slow
def test_parts_of_any_size_make_the_same_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps are computed in parts of a few heads: one at a time, all at once, and with a last part
    that is smaller.
    """
    pipe = tiny.pipeline(attention_head_dim=4)
    for heads in (1, 3, 100):
        monkeypatch.setattr("probe.watching.cross_attention.IN_CACHE", heads * TOKENS * 96)
        run = take(tmp_path / str(heads), pipe, **ASKED)
        assert_maps(run, attended(pipe, run.experiment), 1e-6)
