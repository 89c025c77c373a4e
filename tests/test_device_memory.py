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
from lora_files import save_peft
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
from probe.watching.interface import hooked

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


@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 64, 128)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_weights_counts_what_torch_makes_of_it(bias: bool, shape: Any) -> None:
    layer, x = torch.nn.Linear(128, 256, bias=bias, device="meta"), torch.empty(shape)
    with counted() as seen:
        ours = layer(x.to("meta"))
    on_a_cpu = torch.nn.Linear(128, 256, bias=bias)
    with torch.no_grad():
        theirs = on_a_cpu(x)
        given = peak_of_a_cpu(lambda: on_a_cpu(x))
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert seen.most - x.nbytes == given == theirs.nbytes


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


VAE_OUTPUTS = {"capture": {"activations": ["vae.decoder.up_blocks.*"]}}
WITHOUT = {"capture": {"statistics": False}}


@pytest.mark.parametrize("more", [{}, WITHOUT, VAE_OUTPUTS], ids=["statistics", "off", "outputs"])
def test_decoding_counts_what_the_model_itself_makes(more: Any, tmp_path: Path) -> None:
    """The hooks are on: in float16 they measure a copy in float32, and keep copies of outputs."""
    pipe = tiny.pipeline().to(torch.float16)
    model = family_of(pipe)
    planned = plan(model, ask(tmp_path, scheduler="DDIM", **more))
    watching = [capture for capture in planned.captures if capture.component == "vae"]
    latents = torch.zeros(planned.latent_shape, dtype=torch.float16)
    bare = most_of(lambda: pipe.vae.decode(latents))
    with hooked(*watching):
        made = most_of(lambda: pipe.vae.decode(latents))
    assert made == needed(pipe, tmp_path, **more).decoding > 0
    assert (made > bare) == (more != WITHOUT)


def test_outputs_of_the_vae_count_what_the_allocator_of_a_cpu_gives_out(tmp_path: Path) -> None:
    model = family_of(pipeline())
    planned = plan(model, ask(tmp_path, scheduler="DDIM", height=128, width=128, **VAE_OUTPUTS))
    watching = [capture for capture in planned.captures if capture.component == "vae"]
    latents = torch.zeros(planned.latent_shape)
    with torch.no_grad(), hooked(*watching):
        given = peak_of_a_cpu(lambda: model.vae.decode(latents))
    assert 0.97 < given / device_memory(model, planned).decoding < 1.03


# --- what it says of Stable Diffusion v1 ----------------------------------------------------------


@pytest.fixture(scope="module")
def sd1() -> Any:
    """Its configuration, in float16 and without weights."""
    return models.pipeline("sd1", torch.float16, "meta", whole=True).to(torch.float16)


@pytest.mark.parametrize(
    "capture",
    [
        {},
        pytest.param({"branches": "both", "tokens": "all"}, marks=pytest.mark.slow),
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
    more: dict[str, Any] = {"steps": LONG, "capture": {"statistics": False}}
    last, between = (needed(pipeline(), tmp_path, decode_every=n, **more) for n in (0, 5))
    assert 0 < between.decoding - last.decoding - last.graphs < last.graphs  # and values
    assert between.most > last.most


@pytest.mark.slow
def test_each_word_left_out_is_a_row_of_another_call(tmp_path: Path) -> None:
    """That call is computed while what the step showed, and its graphs, are there."""
    asked = {"steps": LONG, "images": 3}
    none = needed(pipeline(), tmp_path, **asked)
    every = needed(pipeline(), tmp_path, **asked, capture={"counterfactual": ["*"]})
    rows = 1 + len(ask(tmp_path).prompt.split())
    least = none.graphs + 0.9 * none.call * rows / 2
    assert none.call + none.recording < least < every.call + every.recording
    assert (none.call, none.graphs) == (every.call, every.graphs)


@pytest.mark.slow
def test_more_pictures_and_more_captured_take_more(tmp_path: Path) -> None:
    one = needed(pipeline(), tmp_path)
    two = needed(pipeline(), tmp_path, images=2)
    assert two.weights == one.weights and two.call > one.call and two.decoding > one.decoding
    bare = needed(pipeline(), tmp_path, capture={"attention": "off", "statistics": False})
    assert bare.recording < one.recording


@pytest.mark.slow
def test_a_vae_that_decodes_in_float32_is_there_in_float32(tmp_path: Path) -> None:
    pipe = tiny.xl_pipeline().to(torch.float16)
    bare = {"capture": {"statistics": False}}
    pipe.vae.register_to_config(force_upcast=False)
    narrow = needed(pipe, tmp_path, **bare)
    pipe.vae.register_to_config(force_upcast=True)
    wide = needed(pipe, tmp_path, **bare)
    own = sum(parameter.nbytes for parameter in pipe.vae.parameters())
    assert wide.weights == narrow.weights
    blocks = BLOCK * len(list(pipe.vae.parameters()))
    assert own - blocks < wide.decoding - 2 * narrow.decoding < own + blocks + narrow.decoding / 10
    assert next(pipe.vae.parameters()).dtype == torch.float16  # nothing happened to the model


def test_a_model_of_pixels_decodes_nothing(tmp_path: Path) -> None:
    model = family_of(models.pipeline("bundled"))
    bare = plan(model, ask(tmp_path, scheduler="DDIM"))
    assert device_memory(model, bare).decoding > 0
    assert decoding_of(replace(model.skeleton(), vae=None), model, bare) == (0, 0)


# --- what is said ---------------------------------------------------------------------------------


def said(call: Command, *options: str) -> str:
    """Return what a dry run on CUDA says of memory, each run of spaces as one."""
    code, out, _ = call(run.main, "--dry-run", "--device", "cuda", *options)
    assert code == 0
    return " ".join(out[out.index("On the GPU at most ") :].split())


def test_a_dry_run_says_what_a_gpu_must_hold(call: Command) -> None:
    out = said(call, "--steps", "30", "--decode-every", "5")
    assert "weights 23.6 MB the whole run a call of the denoiser" in out
    assert "MB between steps, and after the last step CUDA graphs hold " in out
    plain = said(call, "--graphs", "off")
    assert "CUDA graphs" not in plain and "MB after the last step" in plain
    code, whole, _ = call(run.main, "--dry-run", "--device", "cpu")
    assert code == 0 and "GPU" not in whole


@pytest.mark.slow  # the words alone
def test_a_dry_run_says_what_it_did_not_count(call: Command, tmp_path: Path) -> None:
    assert "not counted" not in said(call)
    assert "decoding" not in said(call, "--model", "emojiworld-pixels")
    lora = save_peft(models.pipeline("bundled"), tmp_path / "ink.safetensors")
    for edits, loras, words in (
        ("[{kind: noise, seed: 9}]", "[]", "What edits take comes on top"),
        ("[]", f"[{{path: {lora}}}]", "What LoRAs take comes on top"),
        ("[{kind: noise, seed: 9}]", f"[{{path: {lora}}}]", "What edits and LoRAs take comes"),
    ):
        (tmp_path / "asked.yaml").write_text(f"edits: {edits}\nloras: {loras}\n")
        assert words in said(call, str(tmp_path / "asked.yaml"))


def test_a_dry_run_says_whether_it_fits(call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**7, 10**9))
    out = said(call)
    assert "Free there: 10.0 MB. It does not fit. Fewer images, a smaller height" in out
    little = DeviceMemory(weights=10**6, call=10**6, recording=0, graphs=0, decoding=0)
    monkeypatch.setattr("probe.running.device_memory.device_memory", lambda *_: little)
    out = said(call)
    assert "Free there: 10.0 MB." in out and "not fit" not in out
    code, _, err = call(run.main, "--dry-run", "--device", "cuda:3")
    assert code == 2 and "device: cuda:3 is not on this machine (1 CUDA devices)." in err
