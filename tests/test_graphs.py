"""The denoiser's call as one graph: the same bits, and eager calls wherever it cannot be had.

There is no CUDA here. A stand-in (standin_graph.py) does on the CPU what a CUDA graph does:
it computes the operations of one call again, into the same buffers, without any Python of ours.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from standin_graph import StandIn
from tiny_runs import FULL, ask, assert_neutral, assert_no_hooks, at_call, bare, pipeline, throw

from probe.diffusion import streams
from probe.proof.checks import variables
from probe.proof.verdict import verify
from probe.reading.compare import NEW_EACH_TIME
from probe.reading.recording import Run
from probe.running import graphs
from probe.running.recorder import record, record_noising, resume
from probe.settings.noising import load_noising
from probe.watching import kept
from probe.watching.hooks import Hooks

STEPS = 5  # eager, eager, captured, replayed, replayed


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that is bound by launches, and graphs pay at once."""
    monkeypatch.setattr(kept, "LAUNCH_BOUND", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "KINDS", {"cpu": StandIn})
    monkeypatch.setattr(graphs, "LEAST_CALLS", 1)


def take(folder: Path, pipe: Any = None, in_files: bool = False, **changes: Any) -> Run:
    """Record a short run, in memory or `in_files`."""
    asked = ask(folder, **{"steps": STEPS, "scheduler": "DDIM", **changes})
    where = {} if in_files else {"output": None}
    return record(asked, pipe or pipeline(), progress=False, **where)


def replayed(run: Run) -> int:
    noted = run.attributes["cuda_graphs"]
    assert "refusal" not in noted, noted
    return int(noted["replayed"])


def refused(run: Run) -> str:
    return str(run.attributes["cuda_graphs"]["refusal"])


def assert_same_bits(one: Run, other: Run) -> None:
    a, b = dict(variables(one)), dict(variables(other))
    assert a.keys() == b.keys()
    for path in a:
        if path.split("/")[0] not in NEW_EACH_TIME:
            floating = a[path].dtype.kind == "f"
            assert np.array_equal(a[path].values, b[path].values, equal_nan=floating), path


# --- the same bits --------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {"capture": {**FULL, "self_attention": ("*",)}, "images": 2},
    "queries": {"capture": {"attention": "queries", "branches": "both"}},
    "summary": {"capture": {"attention": "summary"}},
    "codes": {"capture": {"dtype": "sqrt_u8"}},
    "nothing inside": {"capture": {"attention": "off", "text": False, "statistics": False}},
    "without guidance": {"guidance_scale": 1.0, "scheduler": "PNDM"},
    "a scheduler with a history": {"scheduler": "DPM++2M", "guidance_rescale": 0.7},
    "fresh noise": {"scheduler": "EulerAncestral"},
    "decoded between": {"decode_every": 2},
    "calls of the model between": {"capture": {"counterfactual": ("cat",)}},
}


OFTEN = ("everything", "without guidance", "calls of the model between")


@pytest.mark.parametrize(
    "asked",
    # The others go through the same code with other captures and schedulers.
    [
        pytest.param(ASKED[name], id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in ASKED
    ],
)
def test_replayed_calls_have_the_bits_of_eager_ones(asked: dict[str, Any], tmp_path: Path) -> None:
    run = take(tmp_path, **asked)
    # The first call is of its own kind where it shows the text; one more is met, one is captured.
    assert replayed(run) >= run.experiment.steps - 3
    eager = take(tmp_path, graphs="off", **asked)
    assert "cuda_graphs" not in eager.attributes
    assert_same_bits(run, eager)
    assert_neutral(run, bare(pipeline(), run.experiment))
    assert_no_hooks(pipeline())


def test_half_precision_too(tmp_path: Path) -> None:
    pipe = pipeline(torch.bfloat16)
    run = take(tmp_path, pipe)
    assert replayed(run) == STEPS - 3
    assert_same_bits(run, take(tmp_path, pipe, graphs="off"))


def test_of_sdxl_too(tmp_path: Path) -> None:
    pipe = tiny.xl_pipeline()
    run = take(tmp_path, pipe)
    assert replayed(run) == STEPS - 3
    assert_same_bits(run, take(tmp_path, pipe, graphs="off"))


def test_each_set_of_captures_has_a_graph_of_its_own(tmp_path: Path) -> None:
    asked = {"steps": 9, "capture": {"steps": "::2"}}
    made = StandIn.made
    run = take(tmp_path, **asked)
    assert StandIn.made - made == 2
    assert replayed(run) == 4
    assert_same_bits(run, take(tmp_path, graphs="off", **asked))


def test_a_noising_is_replayed(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    asked = {"timesteps": list(range(900, 400, -100)), "noises": 2, "output": str(tmp_path)}
    one, other = (
        record_noising(picture, "a cat", pipeline=pipeline(), progress=False, graphs=how, **asked)
        for how in ("auto", "off")
    )
    assert replayed(one) == 5 - 3
    assert_same_bits(one, other)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = take(tmp_path, steps=7)
    pipe = pipeline()
    stop = at_call(2, throw(KeyboardInterrupt()))
    # Hooks of others are not replayed, so this first part is eager.
    with Hooks([(pipe.unet, "input", stop)]), pytest.raises(KeyboardInterrupt):
        take(tmp_path, pipe, in_files=True, steps=7, name="stopped")
    left = next(run for run in map(Run, tmp_path.glob("stopped*.zarr")))
    run = resume(left, pipe, progress=False)
    assert 0 < replayed(run) < replayed(whole)
    assert_same_bits(whole, run)


def test_it_verifies_with_the_model(tmp_path: Path) -> None:
    run = take(tmp_path, in_files=True, capture=FULL)
    assert replayed(run)
    found = {check.name: check.verdict for check in verify(run, pipeline())}
    assert found["inside"] == "exact" and "failed" not in found.values(), found


def test_what_is_changed_in_place_is_seen_as_it_was(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    activations = {"activations": ("unet.mid_block", "unet.up_blocks.*")}
    run = take(tmp_path, pipe, capture=activations)
    assert replayed(run)
    assert_same_bits(run, take(tmp_path, pipe, capture=activations, graphs="off"))


def test_the_time_of_replayed_calls_is_taken(tmp_path: Path) -> None:
    run = take(tmp_path)
    assert replayed(run)
    seconds = dict(variables(run))["cost/unet_seconds"].values
    assert seconds.shape == (STEPS,) and (seconds > 0).all()


# --- where they cannot be had ---------------------------------------------------------------------


def test_a_short_run_captures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LEAST_CALLS", 16)
    made = StandIn.made
    assert replayed(take(tmp_path)) == 0
    assert StandIn.made == made


def test_an_edited_run_is_eager_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ask(tmp_path, steps=STEPS, edits=[{"kind": "head", "layers": ["8x8"], "heads": [0]}])
    run = record(asked, pipeline())
    assert refused(run) == "the run is edited"
    assert capsys.readouterr().err.count("Ran without CUDA graphs: the run is edited.") == 1


def test_hooks_of_others_are_not_left_out(tmp_path: Path) -> None:
    pipe, calls = pipeline(), itertools.count()
    with Hooks([(pipe.unet.mid_block, "output", lambda _: next(calls))]):
        run = take(tmp_path, pipe)
    assert refused(run) == "1 hooks of others are on the denoiser"
    assert next(calls) == STEPS


def test_a_processor_of_others_is_not_captured(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class Own(type(layer.processor)):  # type: ignore[misc]
        pass

    layer.set_processor(Own())
    run = take(tmp_path, pipe)
    assert refused(run) == (
        "mid_block.attentions.0.transformer_blocks.0.attn2 has a processor that is not diffusers' "
        "own"
    )


def test_a_forward_of_ones_own_is_not_captured(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.unet.mid_block.forward = pipe.unet.mid_block.forward
    assert refused(take(tmp_path, pipe)) == "mid_block has a forward method of its own"


class Counting(torch.nn.Module):
    """Adds more at every call, which is decided in Python: a replay cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls * 1e-3


class Reading(torch.nn.Module):
    """Reads a value on the host: a graph cannot be captured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) else x + 1


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Counting, "replayed, the prediction came out with other bits"),
        (Reading, "capturing failed: operation not permitted when stream is capturing"),
    ],
)
def test_a_model_that_cannot_be_replayed_goes_on_eagerly(
    module: type[torch.nn.Module], why: str, tmp_path: Path
) -> None:
    def changed() -> Any:
        pipe = tiny.pipeline()
        pipe.unet.conv_act = module()
        return pipe

    run = take(tmp_path, changed(), capture=FULL)
    assert refused(run) == why
    assert run.attributes["cuda_graphs"]["replayed"] == 0
    assert run.status == "complete"
    if module is Reading:
        assert_same_bits(run, take(tmp_path, changed(), capture=FULL, graphs="off"))


class Empty(StandIn):
    """Captures nothing, as a graph does while the model computes on another GPU or stream."""

    @contextlib.contextmanager
    def recording(self) -> Any:
        yield

    def replay(self) -> None:
        pass


def test_a_graph_of_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed while it captured lies in its buffers, and is right for that call alone."""
    monkeypatch.setattr(graphs, "KINDS", {"cpu": Empty})
    run = take(tmp_path)
    assert refused(run) == "replayed, the prediction came out with other bits"
    assert_same_bits(run, take(tmp_path, graphs="off"))


class Cuda:
    """What `CudaGraph` asks of torch.cuda, on a machine with two GPUs and none of them here."""

    def __init__(self) -> None:
        self.device_now, self.current = 0, {0: "default 0", 1: "default 1"}
        self.captured: list[tuple[Any, ...]] = []
        self.pools: list[str] = []
        self.breaks = self.capturing = False  # whether a capture ends in an error, and is underway

    CUDAGraph = staticmethod(lambda: "a graph")

    def current_stream(self, device: torch.device) -> str:
        return self.current[device.index]

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Any:
        before, self.device_now = self.device_now, int(device.index)
        try:
            yield
        finally:
            self.device_now = before

    @contextlib.contextmanager
    def stream(self, stream: str) -> Any:
        index = int(stream[-1])
        before, self.current[index] = self.current[index], stream
        try:
            yield
        finally:
            self.current[index] = before

    def graph(self, graph: str, pool: str, stream: str, capture_error_mode: str) -> Any:
        cuda = self

        class Capture:
            def __enter__(self) -> None:
                assert not cuda.capturing, "torch holds one capture in a process"
                cuda.capturing, cuda.current[int(stream[-1])] = True, stream
                cuda.captured.append((graph, pool, stream, capture_error_mode, cuda.device_now))

            def __exit__(self, *_: object) -> None:
                cuda.capturing = False
                if cuda.breaks:  # as torch does: its stream stays the current one
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.current[int(stream[-1])] = f"default {stream[-1]}"

        return Capture()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    for name in ("CUDAGraph", "current_stream", "device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    monkeypatch.setattr(graphs, "stream_of", lambda device, what: f"{what} {device.index}")
    monkeypatch.setattr(graphs, "_BROKEN", [])
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        given = lambda index, pool, name=name: made.pools.append(f"{name} {index} {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, name, given, raising=False)
    return made


def test_a_second_gpu_captures_on_a_stream_of_its_own(cuda: Cuda) -> None:
    for index in (0, 1):
        with graphs.CudaGraph(torch.device("cuda", index), "pool").recording():
            assert cuda.current[index] == f"graphs {index}"
        assert cuda.captured[-1] == ("a graph", "pool", f"graphs {index}", "thread_local", index)
    assert cuda.current == {0: "default 0", 1: "default 1"}
    assert not cuda.pools


@pytest.mark.parametrize("error", [RuntimeError("not permitted"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("breaks", [True, False])
def test_a_capture_that_breaks_leaves_nothing_behind(
    breaks: bool, error: BaseException, cuda: Cuda
) -> None:
    """torch would leave the capture's stream the current one, and its allocator at its pool."""
    cuda.breaks, graph = breaks, graphs.CudaGraph(torch.device("cuda", 1), "pool")
    with pytest.raises(type(error)) as caught, graph.recording():
        raise error
    assert caught.value is error  # what was wrong, and not what came of it
    assert cuda.current == {0: "default 0", 1: "default 1"} and cuda.device_now == 0
    freed = ["_cuda_endAllocateToPool 1 pool", "_cuda_releasePool 1 pool"]
    assert cuda.pools == (freed if breaks else [])
    assert not graphs._ONE_CAPTURE.locked()


def test_a_device_has_one_stream_for_a_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives 32 in turn: one made for each run would be that of a capture some runs later."""
    made = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (next(made) % 32, device))
    streams.stream_of.cache_clear()
    try:
        first, second = torch.device("cuda", 0), torch.device("cuda", 1)
        for _ in range(40):
            found = {
                streams.stream_of(first, "graphs"),
                streams.stream_of(first, "digest"),
                streams.stream_of(first, "transfer"),
                streams.stream_of(second, "graphs"),
            }
            assert len(found) == 4
        assert next(made) == 4
    finally:
        streams.stream_of.cache_clear()


def test_want_of_memory_is_no_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def full(self: StandIn) -> Any:
        with torch.no_grad():
            yield
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(StandIn, "recording", full)
    run = take(tmp_path)
    assert refused(run) == "capturing failed: CUDA out of memory. Tried to allocate 2.00 GiB."
    monkeypatch.setattr(graphs, "KINDS", {})
    assert_same_bits(run, take(tmp_path))


def test_what_was_measured_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that gets the picture right and a map wrong is refused."""
    own = StandIn.replay

    def wrong(self: StandIn) -> None:
        own(self)
        last = next(
            made for func, _, _, made in reversed(self._log) if func._schema.name == "aten::bmm"
        )
        last[0].add_(1)

    monkeypatch.setattr(StandIn, "replay", wrong)
    assert refused(take(tmp_path)).endswith("came out with other bits")


def test_a_graph_that_reads_what_is_gone_is_found_out() -> None:
    """The stand-in holds addresses, as a real graph does: so the tests above hold that, too."""
    held, gone = torch.ones(3), torch.ones(3)
    graph = StandIn(torch.device("cpu"), StandIn.shared())
    with graph.recording():
        total = held + gone
    graph.replay()
    assert total.tolist() == [2, 2, 2]
    held.fill_(5)
    graph.replay()
    assert total.tolist() == [6, 6, 6]
    del gone
    with pytest.raises(AssertionError, match="reads what was freed"):
        graph.replay()


def test_graphs_hold_nothing_while_the_picture_is_decoded(tmp_path: Path) -> None:
    pipe, held = pipeline(), list[int]()
    own = graphs.Graphs.close

    def closed(self: graphs.Graphs) -> None:
        own(self)
        held.append(len(self._captured))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.Graphs, "close", closed)
        with Hooks([(pipe.vae.decoder, "input", lambda _: held.append(-1))]):
            assert replayed(take(tmp_path, pipe)) > 0
    assert held[-3:] == [0, -1, 0]  # closed, decoded, and closed at the end


def test_graphs_change_nothing_that_is_asked_for(tmp_path: Path) -> None:
    assert ask(tmp_path, graphs="off").identity() == ask(tmp_path).identity()
    one, other = load_noising({"graphs": "off"}), load_noising({})
    assert one.identity() == other.identity()
