"""Count what a run keeps in the memory of a GPU, without one: its skeleton makes the same calls.

    needed = device_memory(model, plan)
    needed.weights, needed.call, needed.recording, needed.graphs, needed.decoding, needed.most

A skeleton has shapes and no values. Every tensor that it makes counts from its birth to its end,
with all hooks on, in the blocks that torch's allocator gives. Attention is taken for a fused
kernel, which keeps no scores: a model with other processors, and bfloat16 on a GPU older than 2020,
take more. Not counted are:

* what CUDA itself takes: its context, and the workspaces of its libraries;
* LoRAs, and what edits compute;
* values that wait for a slow disk, up to 48 MiB of them;
* a float16 VAE that overflows, and decodes once more in float32: about twice its decoding.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probe.diffusion.family import Arguments, Family
from probe.diffusion.loading import pick_device
from probe.running.graphs import Inside, in_graphs, inside
from probe.running.planning import captures_of
from probe.running.transfer import Transfer
from probe.watching.interface import Plan, Values, hooked
from probe.watching.rehearsal import tiling

BLOCK = 512  # bytes: torch's allocator gives multiples of it
ON_THEIR_WAY = 2  # steps whose values are being copied to the host


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a run's tensors on its device, each part at its greatest.

    `weights` are all of the model's. `call` is what a call of the denoiser keeps beside them, and
    `recording` what captures and CUDA graphs add to that. `graphs` is the pool that graphs hold
    until the last step, 0 without any. `decoding` is what decoding all pictures of the run keeps
    beside the weights, with what is recorded of it. With `decode_every` the pool is there
    meanwhile, and counts.
    """

    weights: int
    call: int
    recording: int
    graphs: int
    decoding: int

    @property
    def most(self) -> int:
        """The greatest sum of those that are there together."""
        return self.weights + max(self.call + self.recording, self.decoding)


def device_memory(model: Family, plan: Plan) -> DeviceMemory:
    """Count what a plan keeps on a GPU.

    It takes about as long as eight rehearsals of a call.
    """
    skeleton = model.skeleton()
    calls = Calls(skeleton, replace(plan, captures=tuple(captures_of(skeleton, plan))))
    weights = sum(_bytes(module) for module in skeleton.components().values())
    bare = most_of(calls.call)
    with counted() as seen:
        on_their_way = calls.steps()
        eager, stays = seen.most, seen.now
        del on_their_way
    pool, replayed = calls.graphs(in_graphs(model, calls.plan))
    wordless = most_of(calls.without_words) + pool + stays if plan.words else 0
    between, last = decoding_of(skeleton, model, calls.plan)
    return DeviceMemory(
        weights=weights,
        call=bare,
        recording=max(bare, eager, replayed, wordless) - bare,
        graphs=pool,
        decoding=max(last, between + pool + stays if plan.decoded else 0),
    )


def free_on_cuda(device: str) -> int | None:
    """Return the free bytes of a CUDA device; None where there is no CUDA.

    Raise DeviceError for one that this machine lacks.
    """
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(pick_device(device))[0]


class Calls:
    """The calls of a plan, made by a skeleton: the captures of the plan watch it."""

    def __init__(self, skeleton: Family, plan: Plan):
        self.plan, self._skeleton, self._transfer = plan, skeleton, Transfer()
        self._arguments = skeleton.blank(plan.rows.batch, plan.kept.tokens)
        self._sets = inside(plan, 0)

    def call(self, captures: Inside = (), index: int = 0) -> tuple[torch.Tensor, Values]:
        """Call the denoiser while captures watch. Return its output, and what they saw."""
        for capture in captures:
            capture.expect(index)
        with hooked(*captures):
            output = self._called(self._arguments, self.plan.rows.batch)
        values: Values = {}
        for capture in captures:
            values |= capture.take(None)  # type: ignore[arg-type]  # they look at the call alone
        return output, values

    def without_words(self) -> torch.Tensor:
        """Call the denoiser as the counterfactual does: with the prompt, and without each word."""
        rows = (1 + len(self.plan.words)) * self.plan.rows.images
        return self._called(self._skeleton.blank(rows, self.plan.kept.tokens), rows)

    def _called(self, arguments: Arguments, rows: int) -> torch.Tensor:
        batch = (rows, *self.plan.latent_shape[1:])
        x = torch.empty(batch, dtype=self._skeleton.dtype, device="meta")
        t = torch.empty((), dtype=torch.long, device="meta")
        return self._skeleton.call(x, t, arguments)

    def step(self, index: int) -> tuple[Any, ...]:
        """Record a step. Return what is kept until its values are on the host."""
        output, values = self.call(self._sets[index], index)
        for capture in self.plan.captures:
            capture.seen(index, values)
        return output, values, self._transfer.start(values)

    def steps(self) -> deque[Any]:
        """Record two steps of each set of captures: the first one teaches them what changes.

        Return the values that are on their way to the host at the end.
        """
        on_their_way: deque[Any] = deque(maxlen=ON_THEIR_WAY)
        for captures in dict.fromkeys(self._sets.values()):
            of_it = [index for index, own in self._sets.items() if own == captures]
            on_their_way.extend(self.step(index)[-1] for index in of_it[:2])
        return on_their_way

    def graphs(self, sets: Sequence[Inside]) -> tuple[int, int]:
        """Return the bytes of the graphs' pool, and the most that there is beside the weights.

        A pool is as large as the greatest call in it, beside what the graphs before left there, and
        never shrinks. The call that is captured was computed eagerly, and that is there too.
        """
        pool = left = most = 0
        graphs = list[Any]()
        for captures in sets:
            index = next(index for index, own in self._sets.items() if own == captures)
            with counted() as seen:
                eager = self.step(index)
                before = seen.now
                seen.most = before
                graphs.append(self.call(captures, index))
                called, stays = seen.most - before, seen.now - before
            pool = max(pool, left + called)
            left += stays
            # A replay's values are packed before they are copied.
            most = max(most, pool + before + eager[0].nbytes, pool + ON_THEIR_WAY * stays)
        return pool, most


def decoding_of(skeleton: Family, model: Family, plan: Plan) -> tuple[int, int]:
    """Return what decoding all pictures keeps beside the weights: between steps, and at the end.

    The captures of the plan watch the skeleton. They see what is decoded at the end.
    """
    vae = skeleton.vae
    if vae is None:
        return 0, 0
    vars(vae).update(tiling(model.vae))
    narrow = _bytes(vae)
    nn.Module.to(vae, model.decoding_dtype)
    wider = _bytes(vae) - narrow
    latents = torch.empty(plan.latent_shape, dtype=model.decoding_dtype, device="meta")
    between = most_of(lambda: vae.decode(latents, return_dict=False))
    with hooked(*(capture for capture in plan.captures if capture.component == "vae")):
        last = most_of(lambda: vae.decode(latents, return_dict=False))
    return wider + between, wider + last


def _bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_blocks(tensor.nbytes) for tensor in tensors.values())


def most_of(work: Callable[[], Any]) -> int:
    """Return the most bytes that some work keeps at once."""
    with counted() as seen:
        work()
    return seen.most


@contextmanager
def counted() -> Iterator[_Counted]:
    """Count the tensors that are made in the `with` block."""
    with torch.no_grad(), _Fused(), _Counted() as seen:
        yield seen


class _Counted(TorchDispatchMode):
    """Bytes that are in memory `now`, and the `most` that were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = set[int]()

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for given in _tensors((args, kwargs)):
            self._add(given.untyped_storage(), 0)  # made before, or by no operation
        outputs = func(*args, **(kwargs or {}))
        for output in _tensors(outputs):
            storage = output.untyped_storage()
            self._add(storage, _blocks(storage.nbytes()))
        return outputs

    def _add(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel does it: what it puts out, heads behind pixels in memory.

    Products with weights too are one kernel each. To work them out is a third of the time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.linear and len(args) == 3 and args[0].is_contiguous():
            return args[0].new_empty((*args[0].shape[:-1], len(args[1])))
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        *batch, heads, pixels, _ = given["query"].shape
        shape = (*batch, pixels, heads, given["value"].shape[-1])
        return given["query"].new_empty(shape).transpose(-3, -2)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
