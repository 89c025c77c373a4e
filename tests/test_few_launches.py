"""Where launches are dear, recording adds few: counted on a CPU that is taken for a GPU.

What is recorded is the same, up to the last bits, and the model's bits are the model's own.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import FULL, ask, assert_neutral, at_call, bare, loop, pipeline, take, throw
from torch.autograd import DeviceType

from benchmarks import cuda, models
from benchmarks.cuda import Counted
from probe.diffusion.families import family_of
from probe.errors import CaptureError
from probe.proof.checks import variables
from probe.proof.verdict import verify
from probe.reading.compare import NEW_EACH_TIME, compare
from probe.reading.recording import Run
from probe.running.device_memory import Calls
from probe.running.planning import captures_of, plan
from probe.running.recorder import record, resume
from probe.running.transfer import Transfer
from probe.settings.experiment import load_experiment
from probe.watching import kept, timing, together
from probe.watching.cost import Cost
from probe.watching.hooks import Hooks
from probe.watching.interface import Derived
from probe.watching.kept import Kept
from probe.watching.measures import statistics_of

BOTH = ("cuda", "cpu")
ALL = {**FULL, "dtype": "float32"}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that is bound by launches."""
    monkeypatch.setattr(kept, "LAUNCH_BOUND", BOTH)


# --- how many ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd1_shaped() -> Any:
    """SD v1's topology: 16 cross-attention layers on 4 grids, 47 measured modules."""
    return models.pipeline("small")


def operations(pipe: Any, capture: dict[str, Any] | None, folder: Path) -> collections.Counter[str]:
    """Return the operations of a guided step: the second of three; of a bare one without capture.

    How many there are does not depend on the size of the picture, as long as scores are few.
    """
    asked = load_experiment(
        {
            "prompt": models.PROMPT,
            "steps": 3,
            "height": 64,
            "width": 64,
            "scheduler": "DDIM",
            "output": str(folder),
            "capture": {"text": False, **(capture or {})},
        }
    )
    at: list[collections.Counter[str]] = []
    counted = Counted()
    stop = at_call(2, throw(KeyboardInterrupt()))  # what comes after it is not counted

    def called(latents: Any) -> None:
        at.append(counted.calls.copy())
        stop(latents)

    watched = Hooks([(pipe.unet, "input", called)])
    with watched, counted, contextlib.suppress(KeyboardInterrupt):
        if capture is None:
            collections.deque(loop(pipe, asked), maxlen=0)
        else:
            record(asked, pipe, progress=False)
    return at[2] - at[1]


@pytest.fixture(scope="module")
def own(sd1_shaped: Any, tmp_path_factory: pytest.TempPathFactory) -> collections.Counter[str]:
    """The operations of a step that nobody watches."""
    return operations(sd1_shaped, None, tmp_path_factory.mktemp("bare"))


EVERY_TOKEN = {"branches": "both", "tokens": "all"}


@pytest.mark.parametrize(
    ("capture", "most"),
    [({}, 60), pytest.param(EVERY_TOKEN, 80, marks=pytest.mark.slow)],
    ids=["default", "all tokens"],
)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_a_step_of_stable_diffusion_at_512_pixels_has_few_operations_more(
    dtype: torch.dtype, capture: dict[str, Any], most: int, tmp_path: Path
) -> None:
    """At this size grids are cut: scores and outputs are measured in several parts."""
    model = family_of(models.pipeline("sd1", dtype, "meta").to(dtype))
    planned = plan(model, ask(tmp_path, scheduler="DDIM", capture=capture))
    skeleton = model.skeleton()
    planned = replace(planned, captures=tuple(captures_of(skeleton, planned)))
    calls, found = Calls(skeleton, planned), list[int]()
    with torch.no_grad():
        calls.step(0)  # the first one learns what is changed in place
        for call in (lambda: calls.call((), 1), lambda: calls.step(1)):
            with Counted() as counted:
                call()
            found.append(counted.calls.total())
    bare, recorded = found
    assert 0 < recorded - bare <= most


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("capture", "most"),
    [
        ({}, 60),
        (EVERY_TOKEN, 80),
        pytest.param({"attention": "off"}, 12, marks=pytest.mark.slow),
        pytest.param({"statistics": False}, 52, marks=pytest.mark.slow),
        pytest.param({"attention": "queries"}, 80, marks=pytest.mark.slow),
        pytest.param({"attention": "summary"}, 80, marks=pytest.mark.slow),
    ],
    ids=["default", "all tokens of both branches", "statistics", "maps", "queries", "summary"],
)
def test_a_step_has_few_operations_more(
    capture: dict[str, Any],
    most: int,
    sd1_shaped: Any,
    own: collections.Counter[str],
    tmp_path: Path,
) -> None:
    assert own.total() == pytest.approx(764, abs=10)
    recorded = operations(sd1_shaped, capture, tmp_path)
    assert 0 < recorded.total() - own.total() <= most, recorded - own
    assert recorded["aten::_local_scalar_dense"] == own["aten::_local_scalar_dense"]


@pytest.mark.usefixtures("late")
def test_the_loop_never_waits_for_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first call of the model and the last, only the writing thread reads values."""
    running, waits = [False], list[str]()
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        own = getattr(torch.Tensor, name)

        def seen(self: Any, *args: Any, name: str = name, own: Any = own, **named: Any) -> Any:
            if running[0] and threading.current_thread() is threading.main_thread():
                waits.append(name)
            return own(self, *args, **named)

        monkeypatch.setattr(torch.Tensor, name, seen)
    pipe = pipeline()
    experiment = ask(tmp_path, scheduler="DDIM", capture=FULL)
    calls = iter(range(1, 100))

    def entered(_: Any) -> None:
        running[0] = next(calls) < experiment.steps

    with Hooks([(pipe.unet, "input", entered)]):
        collections.deque(loop(pipe, experiment), maxlen=0)
        own_waits, calls = list(waits), iter(range(1, 100))
        waits.clear()
        record(experiment, pipe, progress=False)
    assert waits == own_waits


# --- the same values ------------------------------------------------------------------------------


def pair(folder: Path, monkeypatch: pytest.MonkeyPatch, pipe: Any, **changes: Any) -> list[Run]:
    """Return a recording that was measured in the hooks, and one measured after each call."""
    runs = [take(folder, pipe, **changes)]
    with monkeypatch.context() as patch:
        patch.setattr(kept, "LAUNCH_BOUND", BOTH)
        runs.append(take(folder, pipe, **changes))
    assert [run.attributes["environment"].get("measured") for run in runs] == [
        None,
        "after the call",
    ]
    return runs


def assert_close(at_once: Run, after: Run) -> None:
    """Float32 arithmetic may differ in its order; everything else has the same bits."""
    one, other = dict(variables(at_once)), dict(variables(after))
    assert one.keys() == other.keys()
    for path in one:
        a, b = one[path].values, other[path].values
        if path.split("/")[0] in NEW_EACH_TIME:
            continue
        assert a.dtype == b.dtype and one[path].dims == other[path].dims, path
        if path.startswith(("attention/", "self_attention/")) or path.endswith("/statistics"):
            if a.dtype == np.uint8:
                assert np.abs(a.astype(int) - b).max() <= 1, path
            elif a.dtype.kind == "f":
                # Sums are of stored maps, which may be neighbours.
                rounded = a.dtype == np.float16 or path.endswith(("/time_sum", "/overview"))
                step = 1e-3 if rounded and at_once.recipe.capture.dtype == "float16" else 0
                np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5 + step, err_msg=path)
            else:
                assert np.array_equal(a, b), path
        else:
            assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), path


@pytest.mark.parametrize(
    "capture",
    [
        pytest.param(
            {"branches": "both", "tokens": "all", "dtype": "float32", "self_attention": ("*",)},
            id="everything",
        ),
        pytest.param({"attention": "queries", "branches": "both"}, id="queries"),
        pytest.param({"branches": "uncond"}, id="uncond", marks=pytest.mark.slow),
        pytest.param(
            {"dtype": "sqrt_u8", "layers": ("8x8",), "steps": "1::2"},
            id="codes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"attention": "summary", "dtype": "float32", "branches": "both"},
            id="summary",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"attention": "summary", "dtype": "sqrt_u8"},
            id="summary in codes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_measured_after_a_call_is_the_same(
    capture: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations = ("unet.mid_block", "unet.up_blocks.*")
    asked = {"capture": {"activations": activations, **capture}, "images": 2}
    at_once, after = pair(tmp_path, monkeypatch, pipeline(), **asked)
    assert_close(at_once, after)
    assert_neutral(after, bare(pipeline(), after.experiment))


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_half_precision_is_widened_before_it_is_multiplied(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(dtype)
    at_once, after = pair(tmp_path, monkeypatch, pipe, steps=2, capture=ALL)
    assert_close(at_once, after)
    assert_neutral(after, bare(pipe, after.experiment))


def test_groups_of_layers_and_of_outputs_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"steps": 2, "capture": ALL, "images": 2}
    monkeypatch.setattr(kept, "LAUNCH_BOUND", BOTH)
    whole = take(tmp_path, **asked)
    monkeypatch.setattr(together, "SCORES", 1)
    monkeypatch.setattr(together, "OUTPUTS", 1)
    assert_close(whole, take(tmp_path, **asked))


@pytest.mark.usefixtures("late")
def test_it_verifies_and_resumes_to_its_own_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline()
    asked = {"capture": {"branches": "both", "activations": ("unet.mid_block",)}}
    whole = take(tmp_path, **asked)
    with (
        pytest.raises(KeyboardInterrupt),
        Hooks([(pipe.unet, "input", at_call(2, throw(KeyboardInterrupt())))]),
    ):
        take(tmp_path, **asked)
    cut = next(Run(path) for path in tmp_path.glob("*.zarr") if Run(path).status == "interrupted")
    assert compare(whole, resume(cut, pipe, progress=False)).same
    own = {check.name: check.verdict for check in verify(whole, pipe)}
    assert own["inside"] == own["plan"] == "exact" and "failed" not in own.values()
    monkeypatch.setattr(kept, "LAUNCH_BOUND", ("cuda",))
    elsewhere = {check.name: check.verdict for check in verify(whole, pipe)}
    assert elsewhere["inside"] == "within tolerance" and "failed" not in elsewhere.values()


# --- what is changed in place ---------------------------------------------------------------------


def test_what_freeu_changes_in_place_is_seen_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FreeU scales a part of what a block put out, where it lies."""
    pipe = tiny.pipeline()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    changed = set[str]()
    own = Kept.take

    def watched(self: Kept) -> dict[str, Any]:
        found = own(self)
        changed.update(self._changed or ())
        return found

    monkeypatch.setattr(Kept, "take", watched)
    activations = ("unet.mid_block", "unet.up_blocks.*")
    at_once, after = pair(tmp_path, monkeypatch, pipe, capture={"activations": activations})
    assert changed, "nothing was changed in place: this test sees nothing"
    assert_close(at_once, after)
    assert_neutral(after, bare(pipe, after.experiment))


def test_kept_outputs_are_as_they_were_when_they_were_put() -> None:
    outputs = Kept(["steady", "scaled"])
    for call in range(3):
        steady, scaled = torch.full((2,), float(call)), torch.full((2,), float(call))
        outputs.put("steady", steady)
        outputs.put("scaled", scaled)
        scaled.mul_(10).add_(1)
        found = outputs.take()
        assert found["steady"].tolist() == found["scaled"].tolist() == [call] * 2
        assert found["steady"].data_ptr() == steady.data_ptr(), "it was copied"
        assert found["scaled"].data_ptr() != scaled.data_ptr()


def test_a_change_in_place_after_the_first_call_is_refused_by_name() -> None:
    outputs = Kept(["mid_block"])
    outputs.put("mid_block", torch.ones(2))
    outputs.take()
    late_change = torch.ones(2)
    outputs.put("mid_block", late_change)
    late_change[0] = 2
    with pytest.raises(CaptureError, match="mid_block: its output was changed in place"):
        outputs.take()


def test_tensors_without_a_count_of_changes_are_copied() -> None:
    outputs = Kept(["out"])
    for _ in range(2):
        with torch.inference_mode():
            tensor = torch.ones(2)
            outputs.put("out", tensor)
            tensor.add_(1)
        assert outputs.take()["out"].tolist() == [1, 1]


# --- its parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_of_all_outputs_together_are_those_of_each(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 32, 16, 16), (2, 64, 8, 8), (2, 96, 4, 4), (2, 5, 7)]
    outputs = [(torch.randn(shape, generator=draw) * 3 + 40).to(dtype) for shape in shapes]
    outputs[1] = outputs[1].contiguous(memory_format=torch.channels_last)
    outputs.append(torch.full((2, 8, 4, 4), 6e4).to(dtype))
    derived = together.statistics_together(outputs, (2, 1))
    found = derived.make(*(part.float().numpy() for part in derived.tensors))
    expected = torch.stack([statistics_of(output) for output in outputs], dim=-1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.unflatten(1, (2, 1)).numpy(), rtol=1e-5, atol=1e-6)
    assert not found[1, ..., -1].any(), "a constant has no deviation"


def test_maps_are_the_exact_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P13: float32 maps are off by 1e-6 at most from a softmax in float64."""
    from probe.watching.rehearsal import cross_attention

    pipe, sides = pipeline(), dict[str, torch.Tensor]()
    modules = cross_attention(pipe.unet)
    watches = [
        (getattr(module, side), "output", lambda out, at=f"{path} {side}": sides.update({at: out}))
        for path, module in modules.items()
        for side in ("to_q", "to_k")
    ]
    monkeypatch.setattr(kept, "LAUNCH_BOUND", BOTH)
    with Hooks(watches):
        run = take(tmp_path, pipe, steps=1, scheduler="DDIM", capture=ALL)
    for grid in run.grids:
        maps = run.attention(grid).isel(step=0)
        for path in maps["layer"].values:
            module = modules[str(path)]
            q, k = (
                sides[f"{path} {side}"].double().unflatten(-1, (module.heads, -1)).transpose(1, 2)
                for side in ("to_q", "to_k")
            )
            exact = (q @ k.mT * module.scale).softmax(-1).permute(3, 0, 1, 2).numpy()
            found = maps.sel(layer=path).values.reshape(exact.shape)
            np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.usefixtures("late")
def test_everything_small_goes_to_the_host_in_one_copy() -> None:
    half = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    shared = torch.arange(8.0)
    values = {
        "half": half,
        "across": torch.arange(6.0).reshape(2, 3).T,
        "wide": torch.ones(2, dtype=torch.bfloat16),
        "number": torch.tensor(7.0, dtype=torch.float64),
        "first": Derived((shared,), lambda whole: whole[:3], whole=True),
        "last": Derived((shared,), lambda whole: whole[3:], whole=True),
        "both": Derived((half, shared), lambda a, b: a.sum() + b.sum()),
    }
    counted = Counted()
    with counted:
        arrays, nbytes = Transfer().start(values)
    assert counted.calls == {"aten::cat": 1, "aten::clone": 1, "aten::empty": 2, "aten::copy_": 2}
    expected = {path: value.clone() for path, value in values.items() if path in ("half", "across")}
    half.fill_(-1)  # the caller may
    there = arrays()
    for path, value in expected.items():
        assert np.array_equal(there[path], value.numpy())
    assert there["wide"].tolist() == [1, 1] and there["wide"].dtype == np.float32
    assert there["number"] == 7 and there["both"] == 15 + 28
    assert there["first"].tolist() == [0, 1, 2] and there["last"].tolist() == [3, 4, 5, 6, 7]
    assert nbytes == 12 + 24 + 4 + 8 + 32


def test_a_step_without_values_is_nothing() -> None:
    arrays, nbytes = Transfer().start({})
    assert arrays() == {} and nbytes == 0


# --- what asks CUDA for times, with more GPUs than one and none of them here ----------------------


class Event:
    """An event of a GPU: where it was recorded, and whether it was waited for."""

    made: ClassVar[list[Event]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream, self.waited = "", False
        self.made.append(self)

    def record(self, stream: str = "of GPU 0") -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, _: Event) -> float:
        return 250.0


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(Event, "made", [])
    fakes: dict[str, Any] = {
        "Event": Event,
        "current_stream": lambda device: f"of GPU {device.index}",
        "reset_peak_memory_stats": lambda _: None,
        "max_memory_allocated": lambda _: 7,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Event.made


def test_a_second_gpu_has_its_own_time_taken(
    events: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no device is waited for as a whole: that breaks a graph which another thread captures."""
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda _: pytest.fail("it waits for the whole device")
    )
    own, second = Cost.__init__, torch.device("cuda", 1)

    def there(self: Cost, model: Any, planned: Any) -> None:
        own(self, model, planned)
        self._cuda = second

    monkeypatch.setattr(Cost, "__init__", there)
    run = record(ask(tmp_path), pipeline(), progress=False, output=None)
    assert {event.stream for event in events} == {"of GPU 1"}
    assert sum(event.waited for event in events) == 3  # the last of each part
    seconds = dict(variables(run))["cost/unet_seconds"].values
    assert (seconds == 0.25).all() and len(seconds) == run.tree.sizes["step"]


def test_a_call_on_a_second_gpu_is_timed_there(
    events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert timing._seconds(lambda: None, torch.device("cuda", 1)) == 0.25
    assert [event.stream for event in events] == ["of GPU 1"] * 2


def test_the_benchmark_counts_what_a_gpu_did_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's profiler gives the time of a kernel to the operation that launched it as well."""
    said = [
        ("aten::conv2d", DeviceType.CPU, 0.5e6, 2),
        ("a kernel", DeviceType.CUDA, 0.5e6, 2),
        ("cudaLaunchKernel", DeviceType.CPU, 0, 2),
        ("cudaGraphLaunch", DeviceType.CPU, 0, 1),
    ]
    names = ("key", "device_type", "self_device_time_total", "count")
    averages = [SimpleNamespace(**dict(zip(names, row, strict=True))) for row in said]

    @contextlib.contextmanager
    def profiler(**_: Any) -> Any:
        yield SimpleNamespace(key_averages=lambda: averages)

    def debug(mode: str) -> None:
        if mode == "warn":  # as torch says once in a process
            warnings.warn("prototype: does not detect all synchronizing operations", stacklevel=1)

    monkeypatch.setattr(cuda, "profile", profiler)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", debug)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    watch = cuda.Watch(on_cuda=True, counting=True)
    with watch._counted():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    found = watch.found
    assert (found.device_seconds, found.launches, found.waits) == (0.5, 3, 1)
