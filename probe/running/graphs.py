"""Launch the denoiser's call, with all that hooks measure in it, as one CUDA graph.

A GPU computes a step faster than Python can ask for its kernels. So the kernels of one call, and
those that measure it, are captured once and launched together from then on: the same kernels, hence
the same bits. That is proven where it begins: the first call that is replayed is computed eagerly
too, and every bit of its output and of what was measured is compared. What cannot be captured, or
differs, runs eagerly, and the recording says why.

    graphs = Graphs(model, plan, first)
    graphs.expect(index)                   # what call `index` is wanted for
    output = graphs.call(x, t, arguments)  # in place of model.call
    values = graphs.take(capture, step)    # in place of capture.take
    graphs.settle(step)                    # after the last `take`, with all hooks off

A replay runs no Python: hooks fire while a graph is captured, and never after. It fills the same
buffers every time. `call` gives a copy; what `take` gives is copied before the next call.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from probe.diffusion.family import Arguments, Family
from probe.diffusion.sampling import Step, memory_format
from probe.diffusion.streams import stream_of
from probe.settings.experiment import Experiment
from probe.text import first_line, printable
from probe.watching.conditions import METHODS, is_plain
from probe.watching.hooks import count
from probe.watching.interface import Capture, Derived, Plan, Values, hooked

# Capturing takes as long as some eager calls: for fewer replays than this it does not pay.
LEAST_CALLS = 16
# The first call teaches captures what the model changes in place; the second is captured.
EAGER = 2


class Graph(Protocol):
    """Kernels that are captured once, and launched together as often as wanted."""

    def __init__(self, device: torch.device, pool: Any): ...

    @staticmethod
    def shared() -> Any:
        """Return a pool of memory for several graphs."""

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Capture what is launched in the `with` block. Nothing is computed there."""

    def replay(self) -> None:
        """Launch it all."""


_ONE_CAPTURE = threading.Lock()  # torch holds no more of them in a process
_BROKEN: list[torch.cuda.CUDAGraph] = []  # torch goes on asking them for what they were


class CudaGraph:
    """A CUDA graph. Those of one `pool` share the memory of what is freed while they run."""

    def __init__(self, device: torch.device, pool: Any):
        self._device, self._pool, self._graph = device, pool, torch.cuda.CUDAGraph()

    @staticmethod
    def shared() -> Any:
        return torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        # torch's own stream for this is that of the first GPU that captured anything: on another
        # one, a graph would stay empty.
        stream = stream_of(self._device, "graphs")
        # Another thread writes the recording meanwhile, and may ask CUDA for what it likes.
        captured = torch.cuda.graph(
            self._graph, self._pool, stream, capture_error_mode="thread_local"
        )
        with (
            _ONE_CAPTURE,
            torch.cuda.device(self._device),
            # What breaks a capture leaves its stream the current one: this puts ours back.
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
        ):
            try:
                captured.__enter__()
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # it fails too, and does not say why
                    self._end(captured)
                raise
            self._end(captured)

    def _end(self, captured: torch.cuda.graph) -> None:
        try:
            captured.__exit__(None, None, None)
        except BaseException:
            # torch leaves its allocator at the graph's pool: nothing would be freed any more.
            _BROKEN.append(self._graph)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                torch._C._cuda_releasePool(self._device.index, self._pool)
            raise

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


KINDS: dict[str, type[Graph]] = {"cuda": CudaGraph}  # by the kind of device


@dataclass(frozen=True)
class Captured:
    """A call in a graph: the buffers that it reads, and those that it fills."""

    graph: Graph
    x: torch.Tensor
    t: torch.Tensor
    arguments: Arguments
    output: torch.Tensor
    values: dict[Capture, Values]

    def replay(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Compute another call. Return a copy of its output."""
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.output.clone()


@dataclass(frozen=True)
class _Eager:
    """A call that was computed eagerly, and is to be captured: what went in, and what came out."""

    x: torch.Tensor
    t: torch.Tensor
    arguments: Arguments
    output: torch.Tensor
    values: dict[Capture, Values]


Inside = tuple[Capture, ...]  # the captures that look inside a call
Key = tuple[Inside, torch.Size, torch.dtype, str]  # and how its input lies in memory


class Graphs:
    """The calls of one run, from call `first` on: replayed where that has the same bits.

    `replayed` counts the calls that were launched as a graph. `refusal` says why no more are, and
    is empty as long as they may be.
    """

    def __init__(self, model: Family, plan: Plan, first: int):
        self._model, self._kind = model, KINDS.get(model.device.type)
        self.considered = plan.recipe.graphs == "auto" and self._kind is not None
        self.refusal = refusal(model, plan) if self.considered else "graphs are off"
        self._inside = inside(plan, first)
        self._left = Counter(self._inside.values())
        # Who watches the denoiser from outside is told of replays too: it takes the time.
        self._outside = [
            (when, callback)
            for capture in plan.captures
            if capture.component == "all"
            for module, when, callback in capture.watches()
            if module is model.unet
        ]
        self._captured: dict[Key, Captured] = {}
        self._met, self._wanted = set[Key](), Inside()
        self._now: Captured | None = None
        self._due: _Eager | None = None
        self._pool: Any = None
        self.replayed = 0

    def expect(self, index: int) -> None:
        """Note which call comes next."""
        self._wanted, self._now, self._due = self._inside[index], None, None
        self._left[self._wanted] -= 1

    @property
    def due(self) -> bool:
        """Whether `settle` has something to do."""
        return self._due is not None

    def call(self, x: torch.Tensor, t: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """Call the denoiser, eagerly or as a graph. Arguments and result are `Family.call`'s."""
        key = self._key(x)
        captured = self._captured.get(key)
        if captured is not None and captured.arguments is arguments:
            self._now = captured
            self._tell("input", x)
            output = captured.replay(x, t)
            self._tell("output", output)
            self.replayed += 1
            return output
        output = self._model.call(x, t, arguments)
        # Only after a first call do captures know what the model changes in place.
        if key in self._met and captured is None and self._left[self._wanted] >= LEAST_CALLS:
            self._due = None if self.refusal else _Eager(x, t, arguments, output, {})
        self._met.add(key)
        return output

    def take(self, capture: Capture, step: Step) -> Values:
        """Return what a capture saw of the last call."""
        if self._now is not None and capture in self._now.values:
            return {path: _lent(value) for path, value in self._now.values[capture].items()}
        values = capture.take(step)
        if self._due is not None and capture in self._wanted:
            self._due.values[capture] = values
        return values

    def settle(self, step: Step) -> None:
        """Capture the last call if that is due, and prove that its replay has the same bits."""
        eager, self._due = self._due, None
        if eager is None:
            return
        try:
            with torch.no_grad():
                captured = self._capture(eager, step)
                captured.output.fill_(float("nan"))  # a graph of nothing would leave it right
                output = captured.replay(eager.x, eager.t)
                differing = _differing(captured, output, eager)
        except Exception as error:
            for capture in self._wanted:
                capture.forget()
            self._refuse(f"capturing failed: {printable(first_line(error))[:200]}")
            return
        if differing:
            self._refuse(f"replayed, {differing} came out with other bits")
        else:
            self._captured[self._key(eager.x)] = captured

    def close(self) -> None:
        """Free all graphs."""
        self._captured.clear()
        self._now, self._due, self._pool = None, None, None

    def _key(self, x: torch.Tensor) -> Key:
        return self._wanted, x.shape, x.dtype, memory_format(x)

    def _tell(self, now: str, value: torch.Tensor) -> None:
        for when, callback in self._outside:
            if when == now:
                callback(value)

    def _capture(self, eager: _Eager, step: Step) -> Captured:
        assert self._kind is not None
        self._pool = self._kind.shared() if self._pool is None else self._pool
        graph = self._kind(self._model.device, self._pool)
        x, t = eager.x.clone(), eager.t.to(self._model.device, copy=True)
        with hooked(*self._wanted), graph.recording():
            output = self._model.call(x, t, eager.arguments)
            values = {capture: capture.take(step) for capture in self._wanted}
        return Captured(graph, x, t, eager.arguments, output, values)

    def _refuse(self, why: str) -> None:
        self.refusal = why
        self.close()


def refusal(model: Family, plan: Plan) -> str:
    """Return why no call of a run may be captured: what a graph would leave out. "" if none."""
    if isinstance(plan.recipe, Experiment) and plan.recipe.edits:
        return "the run is edited"
    for path, layer in model.attention_layers().items():
        if not is_plain(layer.module):
            return f"{path} has a processor that is not diffusers' own"
    for path, module in model.unet.named_modules():
        if any(name in vars(module) for name in METHODS):
            return f"{path or 'unet'} has a forward method of its own"
    hooks = count(model.unet)
    return f"{hooks} hooks of others are on the denoiser" if hooks else ""


def inside(plan: Plan, first: int) -> dict[int, Inside]:
    """Return the captures that look inside each call from `first` on, by its index."""
    watching = [capture for capture in plan.captures if capture.component == "unet"]
    return {
        index: tuple(capture for capture in watching if capture.wants(index, index == first))
        for index in range(first, plan.calls)
    }


def in_graphs(model: Family, plan: Plan) -> list[Inside]:
    """Return the sets of captures whose calls a whole run captures on a GPU, one graph for each."""
    if plan.recipe.graphs == "off" or refusal(model, plan):
        return []
    calls = Counter(inside(plan, 0).values())
    return [captures for captures, count in calls.items() if count >= LEAST_CALLS + EAGER]


def _lent(value: torch.Tensor | Derived) -> torch.Tensor | Derived:
    """Return a value that the next call overwrites: it is to be copied at once."""
    return replace(value, whole=False) if isinstance(value, Derived) else value


def _differing(captured: Captured, output: torch.Tensor, eager: _Eager) -> str:
    """Return what a replay gave other bits than the eager call; "" if nothing."""
    if not _same(output, eager.output):
        return "the prediction"
    for capture, values in eager.values.items():
        for path, value in values.items():
            other = captured.values[capture][path]
            pairs = zip(_tensors(value), _tensors(other), strict=True)
            if not all(_same(a, b) for a, b in pairs):
                return path
    return ""


def _tensors(value: torch.Tensor | Derived) -> tuple[torch.Tensor, ...]:
    return value.tensors if isinstance(value, Derived) else (value,)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits and lie in memory alike."""
    alike = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    return alike and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
