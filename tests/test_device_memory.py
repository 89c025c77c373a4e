"""What a run keeps in a GPU's memory, counted without one: a skeleton makes the calls.

How well it counts is held against torch's own profiler, which sees the allocator of a CPU.
`tests/test_gpu.py` holds the same against a GPU's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import Command
from tiny_runs import ask, pipeline
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from probe import run
from probe.diffusion.families import family_of
from probe.running.device_memory import (
    BLOCK,
    Calls,
    DeviceMemory,
    counted,
    decoding_of,
    device_memory,
    most_of,
)
from probe.running.graphs import EAGER, LEAST_CALLS
from probe.running.planning import plan

LONG = EAGER + LEAST_CALLS  # steps: the fewest that graphs are captured for
MB = 1e6


def needed(pipe: Any, folder: Path, **changes: Any) -> DeviceMemory:
    model = family_of(pipe)
    return device_memory(model, plan(model, ask(folder, scheduler="DDIM", **changes)))


def peak_of_a_cpu(work: Any) -> int:
    """Return the most bytes that torch's allocator gives out while some work is done."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    given = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(given, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# --- how well it counts ---------------------------------------------------------------------------


def test_a_tensor_counts_from_its_birth_to_its_end() -> None:
    given = torch.empty(1000, device="meta")  # there before
    with counted() as seen:
        one = given + 1
        assert (seen.now, seen.most) == (4096, 4096)  # 4000 bytes in blocks of 512
        view, two = one[:10].view(2, 5), given * 2
        assert seen.now == 8192
        del one
        assert seen.now == 8192, view  # a view keeps it
        del view, two
        assert (seen.now, seen.most) == (0, 8192)
        given.add_(1)
        given.t()
        assert seen.now == 0, "what was there before is no tensor of the work"


@pytest.mark.parametrize("name", ["tiny", "bundled", pytest.param("small", marks=pytest.mark.slow)])
def test_a_call_counts_what_the_allocator_of_a_cpu_gives_out(name: str, tmp_path: Path) -> None:
    pipe = pipeline() if name == "tiny" else models.pipeline(name)
    model = family_of(pipe)
    planned = plan(model, ask(tmp_path, scheduler="DDIM"))
    ours = most_of(Calls(model.skeleton(), planned).call)
    x = torch.zeros(planned.rows.batch, *planned.latent_shape[1:])
    t, arguments = torch.tensor(5), model.blank(planned.rows.batch, planned.kept.tokens)
    with torch.no_grad():
        given = peak_of_a_cpu(lambda: model.call(x, t, arguments))
    assert 0.97 < given / ours <= 1  # we count blocks


def test_decoding_counts_what_the_model_itself_makes(tmp_path: Path) -> None:
    pipe = pipeline()
    latents = torch.zeros(family_of(pipe).latent_shape(1))
    with torch.no_grad():
        made = most_of(lambda: pipe.vae.decode(latents))
    assert made == needed(pipe, tmp_path).decoding > 0


# --- what it says of Stable Diffusion v1 ----------------------------------------------------------


@pytest.fixture(scope="module")
def sd1() -> Any:
    """Its configuration, in float16 and without weights."""
    return models.pipeline("sd1", torch.float16, "meta", whole=True).to(torch.float16)


@pytest.mark.parametrize(
    "capture",
    [
        {},
        {"branches": "both", "tokens": "all"},
        pytest.param({"attention": "queries"}, marks=pytest.mark.slow),
        pytest.param({"attention": "summary"}, marks=pytest.mark.slow),
    ],
    ids=["default", "all tokens of both branches", "queries", "summary"],
)
def test_recording_takes_at_most_350_mb(capture: Any, sd1: Any, tmp_path: Path) -> None:
    found = needed(sd1, tmp_path, steps=50, capture=capture)
    parameters = 859_520_964 + 83_653_863 + 123_060_480
    assert found.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert 50 * MB < found.recording <= 350 * MB
    assert 50 * MB < found.graphs <= found.call + found.recording
    assert found.most == found.weights + max(found.call + found.recording, found.decoding)


# --- what decides it ------------------------------------------------------------------------------


def test_graphs_are_counted_where_a_run_has_them(tmp_path: Path) -> None:
    pipe = pipeline()
    assert needed(pipe, tmp_path, steps=LONG).graphs > 0
    edit = {"kind": "noise", "seed": 9}
    for asked in ({"steps": LONG - 1}, {"graphs": "off"}, {"edits": [edit]}):
        assert needed(pipe, tmp_path, **{"steps": LONG, **asked}).graphs == 0, asked


def test_two_graphs_hold_more_than_one(tmp_path: Path) -> None:
    often = {"capture": {"branches": "both", "tokens": "all"}}
    every = needed(pipeline(), tmp_path, steps=2 * LONG, **often)
    often["capture"]["steps"] = "::2"
    assert needed(pipeline(), tmp_path, steps=2 * LONG, **often).graphs > every.graphs


def test_a_picture_decoded_between_finds_the_graphs_there(tmp_path: Path) -> None:
    last = needed(pipeline(), tmp_path, steps=LONG)
    between = needed(pipeline(), tmp_path, steps=LONG, decode_every=5)
    assert between.decoding == last.decoding + last.graphs
    assert between.most >= last.most


def test_more_pictures_and_more_captured_take_more(tmp_path: Path) -> None:
    one = needed(pipeline(), tmp_path)
    two = needed(pipeline(), tmp_path, images=2)
    assert two.weights == one.weights and two.call > one.call and two.decoding > one.decoding
    bare = needed(pipeline(), tmp_path, capture={"attention": "off", "statistics": False})
    assert bare.recording < one.recording


def test_a_vae_that_decodes_in_float32_is_there_in_float32(tmp_path: Path) -> None:
    pipe = tiny.xl_pipeline().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    narrow = needed(pipe, tmp_path)
    pipe.vae.register_to_config(force_upcast=True)
    wide = needed(pipe, tmp_path)
    own = sum(parameter.nbytes for parameter in pipe.vae.parameters())
    assert wide.weights == narrow.weights
    blocks = BLOCK * len(list(pipe.vae.parameters()))
    assert own - blocks < wide.decoding - 2 * narrow.decoding < own + blocks + narrow.decoding / 10
    assert next(pipe.vae.parameters()).dtype == torch.float16  # nothing happened to the model


def test_a_model_of_pixels_decodes_nothing(tmp_path: Path) -> None:
    model = family_of(models.pipeline("bundled"))
    bare = plan(model, ask(tmp_path, scheduler="DDIM"))
    assert device_memory(model, bare).decoding > 0
    assert decoding_of(replace(model.skeleton(), vae=None), model, bare) == 0


# --- what is said ---------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_gpu_must_hold(call: Command) -> None:
    code, out, _ = call(run.main, "--dry-run", "--device", "cuda", "--steps", "30")
    assert code == 0
    assert "On the GPU at most " in out and "weights 23.6 MB, a call of the denoiser" in out
    assert "CUDA graphs hold " in out
    code, out, _ = call(run.main, "--dry-run", "--device", "cuda", "--graphs", "off")
    assert code == 0 and "On the GPU at most " in out and "CUDA graphs" not in out
    code, out, _ = call(run.main, "--dry-run", "--device", "cpu")
    assert code == 0 and "GPU" not in out
