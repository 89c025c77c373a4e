"""What recording costs on a GPU: P4.

    python -m benchmarks.cuda                                # Stable Diffusion v1's size, float16
    python -m benchmarks.cuda --rounds 5 --steps 50
    python -m benchmarks.cuda --device cpu --rounds 1        # the same code, to try it: `small`

Every way is timed beside the bare loop, in turn, every other round in reversed order. `bare` is our
own loop with eager calls and nobody watching, `bare again` is the control. The columns:

    time      of the loop against the bare one: median, least and greatest round; by device events
    waits     at which the host waited for the device, and those of the bare loop
    launches  a step, by the profiler: kernels, copies and graphs; on a CPU, operations
    device    milliseconds a step that the device works
    memory    MB of the device that the loop keeps beside the weights, at most; and as counted
              without a GPU (probe/running/device_memory.py)
    around    seconds of the whole `record` without its loop; weights in memory

Waits, launches, device time and memory are taken in a round of their own, which also warms up.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from benchmarks.loop import Took, stopwatch
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.running import graphs
from probe.running.device_memory import device_memory
from probe.running.planning import plan
from probe.running.recorder import record
from probe.settings.experiment import load_experiment
from probe.watching import kept

LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
WAITED = "called a synchronizing"  # of torch's warning
VIEWS = ("aten::_unsafe_view", "aten::detach")
NOTHING = {"attention": "off", "statistics": False, "text": False}
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {  # graphs, capture
    "recorded": ("off", {}),
    "recorded, graphs": ("auto", {}),
    "statistics alone": ("auto", {"attention": "off", "text": False}),
    "maps alone": ("auto", {"statistics": False, "text": False}),
    "queries": ("auto", {"attention": "queries"}),
    "summary": ("auto", {"attention": "summary"}),
    "both branches, all tokens": ("auto", {"branches": "both", "tokens": "all"}),
}
PEER = "attention-map-diffusers"


class Counted(TorchDispatchMode):
    """How often each operation was called; views compute nothing, and are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not (func.is_view or func._schema.name in VIEWS):
            self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Found:
    """What was found of one loop: its seconds, or what was counted in it."""

    seconds: float = 0.0
    whole: float = 0.0
    waits: int = 0
    launches: int = 0
    device_seconds: float = 0.0
    memory: int = 0


class Watch:
    """Between `begin` and `end`: a stopwatch, or everything that is counted."""

    def __init__(self, on_cuda: bool, counting: bool):
        self._on_cuda, self._counting = on_cuda, counting
        self._until_end = contextlib.ExitStack()
        self.found, self._there = Found(), 0

    def begin(self) -> None:
        self._synchronize()
        if self._counting:
            self._until_end.enter_context(self._counted())
            if self._on_cuda:
                torch.cuda.reset_peak_memory_stats()
                self._there = torch.cuda.memory_allocated()
        self._start = self._now()

    def end(self) -> None:
        stop = self._now()
        self._until_end.close()
        self._synchronize()
        if self._on_cuda and self._counting:
            self.found.memory = torch.cuda.max_memory_allocated() - self._there
        elapsed = self._start.elapsed_time(stop) / 1000 if self._on_cuda else stop - self._start
        self.found.seconds = elapsed

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if not self._on_cuda:
            with Counted() as counted:
                yield
            self.found.launches = counted.calls.total()
            return
        with (
            warnings.catch_warnings(record=True) as log,
            profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
        ):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        self.found.waits = sum(WAITED in str(warning.message) for warning in log)
        for event in profiler.key_averages():
            if event.device_type == DeviceType.CUDA:  # operations of the host have their share too
                self.found.device_seconds += event.self_device_time_total / 1e6
            if any(name in event.key for name in LAUNCHES):
                self.found.launches += event.count


class Bench:
    """The ways, on one model."""

    def __init__(self, asked: argparse.Namespace):
        dtype = getattr(torch, asked.dtype)
        self.pipe = models.pipeline(asked.model, dtype, asked.device)
        self.model = StableDiffusion.of(self.pipe).with_scheduler("DDIM", {})
        self.request: dict[str, Any] = {
            "prompt": models.PROMPT,
            "steps": asked.steps,
            "guidance_scale": 7.5,
            "scheduler": "DDIM",
            "seed": 0,
        }
        self.ways: dict[str, Callable[[Watch], None]] = {
            "bare": self.bare,
            "bare again": self.bare,
            "bare, graphs": self.bare_graphs,
            **{name: self._recorded(name) for name in RECORDED},
        }
        with contextlib.suppress(ImportError):
            import attention_map_diffusers  # noqa: F401

            self.ways[PEER] = self.peer

    def needed(self, name: str) -> int | None:
        """Return the bytes that a way's loop keeps beside the weights, as counted without a GPU."""
        if name not in RECORDED and name not in ("bare", "bare again"):
            return None
        how, capture = RECORDED.get(name, ("off", NOTHING))
        asked = load_experiment({**self.request, "graphs": how, "capture": capture})
        found = device_memory(self.model, plan(self.model, asked))
        return found.call + found.recording

    def bare(self, watch: Watch) -> None:
        conditioning = self.model.condition(models.PROMPT)
        watch.begin()
        for _ in denoise(self.model, conditioning, steps=self.request["steps"], guidance_scale=7.5):
            pass
        watch.end()

    def bare_graphs(self, watch: Watch) -> None:
        conditioning = self.model.condition(models.PROMPT)
        planned = plan(self.model, load_experiment({**self.request, "capture": NOTHING}))
        replayed = graphs.Graphs(self.model, planned, 0)
        steps = denoise(
            self.model,
            conditioning,
            steps=self.request["steps"],
            guidance_scale=7.5,
            call=replayed.call,
        )
        watch.begin()
        for index in range(planned.calls):
            replayed.expect(index)
            replayed.settle(next(steps))
        watch.end()
        replayed.close()

    def _recorded(self, name: str) -> Callable[[Watch], None]:
        how, capture = RECORDED[name]

        def recorded(watch: Watch) -> None:
            with tempfile.TemporaryDirectory() as output:
                request = {**self.request, "graphs": how, "capture": capture, "output": output}
                started = time.perf_counter()
                with stopwatch(Took(), watch.begin, watch.end):
                    record(request, self.pipe, progress=False)
                watch.found.whole = time.perf_counter() - started

        return recorded

    def peer(self, watch: Watch) -> None:
        from attention_map_diffusers import AttentionCapture

        how = {"relations": "image->text", "timesteps": "all", "heads": "all", "offload": None}
        with AttentionCapture(self.pipe, **how, dtype="float32") as capture:
            conditioning = self.model.condition(models.PROMPT)
            watch.begin()
            for _ in denoise(
                self.model, conditioning, steps=self.request["steps"], guidance_scale=7.5
            ):
                pass
            capture.compute()
            watch.end()


def main(argv: list[str] | None = None) -> int:
    parser = models.parser(__doc__, rounds=3)
    parser.set_defaults(model=None, dtype=None, device="cuda")
    parser.add_argument("--steps", type=int, default=None, help="30 on a GPU, 2 on a CPU")
    asked = parser.parse_args(argv)
    on_cuda = asked.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        print("P4 was not measured: there is no CUDA device here. Try it with --device cpu.")
        return 1
    asked.model = asked.model or ("sd1" if on_cuda else "small")
    asked.dtype = asked.dtype or ("float16" if on_cuda else "float32")
    asked.steps = asked.steps or (30 if on_cuda else 2)
    bench, where = Bench(asked), torch.cuda.get_device_name() if on_cuda else "a CPU"
    print(f"P4 {asked.model}, {asked.dtype}, {asked.steps} steps on {where}; {models.machine()}")
    if not on_cuda:
        kept.LAUNCH_BOUND = (*kept.LAUNCH_BOUND, "cpu")
        print("   A CPU has no graphs: every call is eager. It is recorded as on a GPU, operations")
        print("   are counted, and its times say nothing of a GPU's.")
    print(f"   {PEER} is not installed, and left out." * (PEER not in bench.ways), flush=True)
    counted: dict[str, Found] = {}
    times: dict[str, list[Found]] = {name: [] for name in bench.ways}
    for index in range(asked.rounds + 1):
        for name in list(bench.ways)[:: 1 if index % 2 == 0 else -1]:
            watch = Watch(on_cuda, counting=index == 0)
            bench.ways[name](watch)
            if index:
                times[name].append(watch.found)
            else:
                counted[name] = watch.found
    memory = {name: _megabytes(counted[name].memory, bench.needed(name)) for name in bench.ways}
    print(*table(times, counted, memory, asked.steps), sep="\n")
    return 0


def _megabytes(measured: int, counted: int | None) -> str:
    """Return memory as a cell of the table: as measured, which only a GPU is, and as counted."""
    cells = [f"{measured / 1e6:.0f}"] * (measured > 0)
    return " and ".join([*cells, *([] if counted is None else [f"{counted / 1e6:.0f} counted"])])


def table(
    times: dict[str, list[Found]], counted: dict[str, Found], memory: dict[str, str], steps: int
) -> Iterator[str]:
    """Return the lines of the table, in Markdown."""
    yield "| way | time | waits | launches a step | device, ms a step | memory, MB | around, s |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in times.items():
        pairs = zip(found, times["bare"], strict=True)
        ratios = sorted(one.seconds / bare.seconds for one, bare in pairs)
        median = statistics.median(one.seconds for one in found)
        time_text = (
            f"{1000 * median / steps:.1f} ms a step"
            if name == "bare"
            else f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f}, {ratios[-1]:.2f})"
        )
        around = statistics.median(max(one.whole - one.seconds, 0) for one in found)
        one = counted[name]
        yield (
            f"| {name} | {time_text} | {one.waits} | {one.launches / steps:.0f} | "
            f"{1000 * one.device_seconds / steps:.1f} | {memory[name]} | "
            f"{f'{around:.2f}' if around else ''} |"
        )


if __name__ == "__main__":
    sys.exit(main())
