"""The same promises on CUDA, in float16, with Stable Diffusion v1's full configuration.

Its weights are random. Run these tests with `pytest -m gpu`. Without CUDA they fail; they are not
skipped. What they assert is the code that other tests run on the CPU (tiny_runs.py, true_maps.py).
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from edited import EACH, asked, same, steps_of
from tiny_runs import ask, assert_neutral, assert_no_hooks, at_call, bare, throw
from transformers import CLIPTextConfig, CLIPTextModel
from true_maps import assert_maps, scores

from benchmarks import models
from probe.diffusion.draws import noise
from probe.diffusion.families import family_of
from probe.diffusion.weights import mixed, own_weights
from probe.errors import ModelError
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running import graphs
from probe.running.device_memory import device_memory
from probe.running.planning import plan
from probe.running.recorder import record, rerun, resume
from probe.watching import together
from probe.watching.hooks import Hooks

pytestmark = pytest.mark.gpu


def stable_diffusion_v1() -> Any:
    """859,520,964 UNet parameters, 16 cross-attention layers, 512 x 512 pixels; random weights."""
    torch.manual_seed(0)
    words = tiny.tokenizer()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    ends = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, **ends)
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    with torch.device("cpu"):  # as one from a file; its numbers round otherwise on a GPU
        scheduler = PNDMScheduler(
            **betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        )
    pipe = StableDiffusionPipeline(
        vae, text, words, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> Any:
    assert torch.cuda.is_available(), "tests marked gpu need a CUDA device"
    with torch.device("cuda"):  # made where it runs: seconds, not minutes
        made = stable_diffusion_v1()
    return made.to("cuda", torch.float16)


def test_the_loop_has_the_bits_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    asked = ask(tmp_path, guidance_scale=7.5)
    seeds = [torch.Generator().manual_seed(asked.seed)]
    one_line = pipe(
        asked.prompt,
        num_inference_steps=asked.steps,
        guidance_scale=7.5,
        generator=seeds,
        output_type="latent",
    ).images
    assert torch.equal(bare(pipe, asked)[-1].next_latents, one_line)


def test_the_digest_of_weights_is_that_of_a_cpu(pipe: Any) -> None:
    there = own_weights(family_of(pipe))
    assert {tensor.device.type for tensor in there.values()} == {"cuda"}
    assert mixed(there) == mixed({name: tensor.cpu() for name, tensor in there.items()})


def test_recording_changes_no_bit(pipe: Any, tmp_path: Path) -> None:
    asked = ask(
        tmp_path, capture={"branches": "both", "tokens": "all", "activations": ("unet.mid_block",)}
    )
    before = bare(pipe, asked)
    run = record(asked, pipe, progress=False)
    assert_neutral(run, before)
    assert_neutral(run, bare(pipe, asked))
    assert_no_hooks(pipe)


def test_a_seed_means_the_same_noise_on_every_device(pipe: Any, tmp_path: Path) -> None:
    asked = ask(tmp_path)
    drawn, _ = noise(asked.seed, (1, 4, 64, 64), torch.float16)
    first = bare(pipe, asked)[0].latents
    assert first.is_cuda
    assert torch.equal(first.cpu(), drawn * pipe.scheduler.init_noise_sigma)


def test_maps_are_diffusers_own(pipe: Any, tmp_path: Path) -> None:
    run = record(
        ask(tmp_path, steps=2, capture={"branches": "both", "tokens": "all", "dtype": "float32"}),
        pipe,
        progress=False,
    )
    assert_maps(run, scores(pipe, run.experiment), 1e-5)


def test_an_offloaded_model_is_refused_by_name_and_the_remedy_works(tmp_path: Path) -> None:
    """`enable_model_cpu_offload` leaves the weights on the CPU until a part is called: a run cannot
    tell where they will be.
    """
    asked = ask(
        tmp_path, steps=2, capture={"branches": "both", "tokens": "all", "dtype": "float32"}
    )
    moved = models.pipeline("small", torch.float16, "cuda")
    stays = record(asked, moved, progress=False)
    moved.to("cpu").enable_model_cpu_offload()
    with pytest.raises(
        ModelError, match=r"^unet is off-loaded: accelerate moves its weights to cuda"
    ) as caught:
        record(asked, moved, progress=False)
    assert (
        caught.value.remedy
        == "Call pipeline.remove_all_hooks(), then pipeline.to(device), if the model fits there."
    )
    assert len(list(tmp_path.glob("*.zarr"))) == 1
    moved.remove_all_hooks()
    run = record(asked, moved.to("cuda"), progress=False)
    for grid in stays.grids:
        np.testing.assert_array_equal(run.attention(grid).values, stays.attention(grid).values)
    assert_no_hooks(moved)


EVERYTHING = {"branches": "both", "tokens": "all", "activations": ("unet.mid_block",)}


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"capture": EVERYTHING, "images": 2, "scheduler": "DDIM", "height": 256, "width": 256},
        {"capture": {"attention": "queries"}, "scheduler": "DDIM"},
        {"capture": {"attention": "summary"}, "guidance_scale": 1.0},
        {"capture": {"counterfactual": ("cat",), "steps": "::2"}, "steps": 10},
    ],
    ids=["default", "everything", "queries", "without guidance", "two sets of captures"],
)
def test_calls_replayed_as_a_graph_have_the_bits_of_eager_ones(
    asked: dict[str, Any], pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_CALLS", 1)
    monkeypatch.setattr(together, "SCORES", 2**24)  # so that grids are cut
    asked = {"steps": 7, "guidance_scale": 7.5, **asked}
    run, eager = (
        record(ask(tmp_path, graphs=how, **asked), pipe, progress=False) for how in ("auto", "off")
    )
    noted = run.attributes["cuda_graphs"]
    assert "refusal" not in noted and noted["replayed"] >= 3, noted
    assert "cuda_graphs" not in eager.attributes
    assert compare(run, eager).same
    assert_neutral(run, bare(pipe, run.experiment))
    assert "failed" not in {check.verdict for check in verify(run, pipe, steps=(0, 6))}
    assert compare(run, rerun(run, pipe, progress=False)).same


def test_a_run_with_graphs_resumes_to_its_own_bits(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "LEAST_CALLS", 1)
    whole = record(ask(tmp_path, steps=7), pipe, progress=False)
    stop = at_call(2, throw(KeyboardInterrupt()))
    with Hooks([(pipe.unet, "input", stop)]), pytest.raises(KeyboardInterrupt):
        record(ask(tmp_path, steps=7, name="stopped"), pipe, progress=False)
    run = resume(next(map(Run, tmp_path.glob("stopped*.zarr"))), pipe, progress=False)
    assert run.attributes["cuda_graphs"]["replayed"] > 0
    assert compare(whole, run).same


def test_the_memory_that_was_counted_is_what_it_takes(pipe: Any, tmp_path: Path) -> None:
    """Of a loop of eager calls, beside the weights. Workspaces of cuDNN come on top, uncounted."""
    asked, model = ask(tmp_path, graphs="off"), family_of(pipe)
    needed = device_memory(model, plan(model, asked))
    gc.collect()  # what earlier tests left
    torch.cuda.empty_cache()
    there, most = torch.cuda.memory_allocated(), list[int]()
    watched = Hooks(
        [(pipe.vae.decoder, "input", lambda _: most.append(torch.cuda.max_memory_allocated()))]
    )
    with watched:  # it decodes to fit its preview, before the first step, and the picture
        record(asked, pipe, progress=False)
    taken = most[-1] - there
    assert 0.8 < taken / (needed.call + needed.recording) < 2
    assert there == pytest.approx(needed.weights, rel=0.1)


def test_a_recording_made_on_cuda_verifies_on_the_cpu(pipe: Any, tmp_path: Path) -> None:
    found = {check.name: check for check in verify(record(ask(tmp_path), pipe, progress=False))}
    assert {check.verdict for check in found.values()} <= {"exact", "within tolerance"}, found


@pytest.mark.parametrize("kind", EACH)
def test_on_cuda_too_an_edit_at_amount_0_changes_no_bit(kind: str) -> None:
    small = tiny.pipeline().to("cuda", torch.float16)
    own = steps_of(asked(), small)
    edit = {"kind": kind, **EACH[kind]}
    assert same(steps_of(asked({**edit, "amount": 0.0}), small), own)
    edited = steps_of(asked(edit), small)
    assert not torch.equal(edited[-1].next_latents, own[-1].next_latents)
