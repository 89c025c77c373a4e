"""The digest of a model's weights, and how it is computed beside a run.

    digest(model)                        # 16 hex characters
    with DigestBeside(model) as beside:  # a thread computes it
        ...
        beside.result()                  # waits for it

It is computed where the weights are, by integer arithmetic, so that a GPU and a CPU agree to the
bit. How (`MIXED`):

1. The bytes of every tensor, in the order of its dimensions, are filled up with zeros to rows of
   1024 words of 64 bits.
2. Each word is xored with a key of its place in the row, and mixed by a fixed permutation of 64-bit
   words. The mixed words of a row are added, modulo 2^64.
3. The digest is the SHA-256, cut to 64 bits, of every tensor's name, type and shape, in the order
   of names, and of all rows' sums in that order.

What it promises: one changed word always changes its row's sum. Any other accident (words swapped,
rows or tensors swapped, other values) stays unseen with a probability of about 2^-64. It is no
promise against an attacker, who can make other weights of the same digest. Neither was the digest
of older recordings, the SHA-256 of all bytes cut to 64 bits, against one with 2^64 tries to spend
(`SHA256`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
import torch

from probe.diffusion.family import Family
from probe.diffusion.streams import stream_of
from probe.errors import ModelError, OutOfMemory, ProbeError
from probe.format.attributes import MIXED, SHA256
from probe.text import first_line, shown

ON = "loras_of_a_recipe"  # the attribute of a module that has them, of `probe.diffusion.loras`
WORDS = 1024  # of a row
ROW = 8 * WORDS  # bytes
# Rows at once. A CPU's fit its cache, and are as many as torch computes in the calling thread.
AT_ONCE = {"cpu": 32, "cuda": 2048}
COPIED = 2**24  # bytes at once of a tensor that is not contiguous
KEYS = np.frombuffer(hashlib.shake_256(b"weights").digest(ROW), "<u8")
FACTORS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)  # MurmurHash3's, fmix64

Going = Callable[[], bool]


def digest(model: Family, how: str = MIXED) -> str:
    """Return the digest of every weight and buffer, 16 hex characters.

    It is that of the model alone, also while LoRAs of a recipe are on it. `how` names the
    algorithm. Raise ModelError for one that is not known.
    """
    weights = own_weights(model)
    if how == MIXED:
        return mixed(weights)
    if how != SHA256:
        raise ModelError(
            f"The recording's digest of weights, {shown(how)}, is not known here.",
            "Take a newer version of probe: pip install -U diffusion-probe.",
        )
    sha = hashlib.sha256()
    for name, tensor in weights.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def own_weights(model: Family) -> dict[str, torch.Tensor]:
    """Return every weight and buffer, as they are without the LoRAs of a recipe."""
    weights = {}
    for part, module in model.components().items():
        on = ON in vars(module)
        for name, tensor in module.state_dict().items():
            if not on:
                weights[f"{part}.{name}"] = tensor
            elif ".lora_" not in name:
                weights[f"{part}.{name.replace('.base_layer.', '.')}"] = tensor
    return weights


def mixed(weights: Mapping[str, torch.Tensor], going: Going = lambda: True) -> str:
    """Return the digest of tensors by name (`MIXED`).

    Raise InterruptedError when `going` says no.
    """
    ordered = sorted(weights)
    sha = hashlib.sha256()
    for name in ordered:
        tensor = weights[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    sums: list[torch.Tensor] = []
    together: list[torch.Tensor] = []  # tensors that are on one device, one after the other
    for name in ordered:
        tensor = weights[name].detach()
        if together and tensor.device != together[0].device:
            sums.append(_row_sums(together, going))
            together = []
        together.append(tensor)
    if together:
        sums.append(_row_sums(together, going))
    for of_a_device in sums:
        sha.update(_on_the_host(of_a_device).numpy().astype("<i8", copy=False).data)
    return sha.hexdigest()[:16]


def _on_the_host(sums: torch.Tensor) -> torch.Tensor:
    """Return numbers on the host. Wait for their own stream alone, as no other copy here waits."""
    if sums.device.type != "cuda":
        return sums.cpu()
    with torch.cuda.device(sums.device):
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        host.copy_(sums, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        arrived.synchronize()
    return host


@torch.no_grad()
def _row_sums(tensors: Sequence[torch.Tensor], going: Going) -> torch.Tensor:
    """Return the sums of the rows of tensors on one device, in their order, int64."""
    device = tensors[0].device
    if device.type not in AT_ONCE:  # not every kind of device has these operations
        device = torch.device("cpu")
    most = AT_ONCE[device.type]
    summed = _by_numpy(most) if device.type == "cpu" else _by_torch(most, device)
    sums = [torch.empty(0, dtype=torch.int64, device=device)]
    for rows in _rows(tensors, most, device):
        if not going():
            raise InterruptedError("stopped")
        sums.append(summed(rows))
    return torch.cat(sums)


def _by_torch(most: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that mixes and sums `most` rows, (row, word) int64, or fewer."""
    keys = torch.from_numpy(KEYS.astype(np.uint64).view(np.int64))
    keys = keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys
    scratch = torch.empty((most, WORDS), dtype=torch.int64, device=device)

    def summed(rows: torch.Tensor) -> torch.Tensor:
        words = scratch[: len(rows)]
        torch.bitwise_xor(rows, keys, out=words)
        low, high = words.view(torch.int32).view(len(rows), WORDS, 2).unbind(-1)
        low.bitwise_xor_(high)
        for factor in FACTORS:
            words.mul_(factor - 2**64)
            low.bitwise_xor_(high)
        return words.sum(1)

    return summed


def _by_numpy(most: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the same for a CPU, where numpy multiplies such words in a third of the time."""
    keys, half = KEYS.astype(np.uint64), np.uint64(32)
    scratch, above = (np.empty((most, WORDS), np.uint64) for _ in range(2))

    def summed(rows: torch.Tensor) -> torch.Tensor:
        words, high = scratch[: len(rows)], above[: len(rows)]
        np.bitwise_xor(rows.numpy().view(np.uint64), keys, out=words)
        np.bitwise_xor(words, np.right_shift(words, half, out=high), out=words)
        for factor in FACTORS:
            np.multiply(words, np.uint64(factor), out=words)
            np.bitwise_xor(words, np.right_shift(words, half, out=high), out=words)
        return torch.from_numpy(words.sum(1, dtype=np.uint64).view(np.int64))

    return summed


def _rows(
    tensors: Sequence[torch.Tensor], most: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield the rows of tensors, (row, word) int64, `most` at once."""
    zeros = torch.zeros(ROW, dtype=torch.uint8, device=device)
    waiting: list[torch.Tensor] = []
    space = most * ROW
    for tensor in tensors:
        for given in itertools.chain(_pieces(tensor), [zeros[: -tensor.nbytes % ROW]]):
            piece = given.to(device)
            while len(piece):
                waiting.append(piece[:space])
                piece = piece[space:]
                space -= len(waiting[-1])
                if not space:
                    yield _joined(waiting)
                    waiting, space = [], most * ROW
    if waiting:
        yield _joined(waiting)


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return bytes that are a whole number of rows as rows, (row, word) int64."""
    piece = torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
    if piece.storage_offset() % 8 or piece.data_ptr() % 8:
        piece = piece.clone()
    return piece.view(torch.int64).view(-1, WORDS)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the bytes of a tensor, in the order of its dimensions."""
    if tensor.is_contiguous() or tensor.nbytes <= COPIED:
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8)
    elif len(tensor) == 1:
        yield from _pieces(tensor[0])
    else:
        for part in tensor.split(max(1, len(tensor) * COPIED // tensor.nbytes)):
            yield from _pieces(part)


class DigestBeside:
    """The digest of a model's weights (`MIXED`), computed in a thread: a context manager.

    Its tensors are taken at once; nothing may change their values until the block ends. On a GPU
    it has a stream beside, which waits for what was launched before.
    """

    def __init__(self, model: Family):
        self._weights = own_weights(model)
        self._streams: list[torch.cuda.Stream] = []
        for device in {tensor.device for tensor in self._weights.values()}:
            if device.type == "cuda":
                stream = stream_of(device, "digest")
                stream.wait_stream(torch.cuda.current_stream(device))
                self._streams.append(stream)
        # `SimpleQueue` is written in C: Ctrl-C can strike between any two of its calls.
        self._found: SimpleQueue[str | ProbeError] = SimpleQueue()
        self._result: str | ProbeError | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="probe-digest", daemon=True)

    def __enter__(self) -> DigestBeside:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._thread.join()
        self._weights = {}

    def result(self) -> str:
        """Wait for the digest and return it. Raise ModelError, OutOfMemory."""
        if self._result is None:
            self._result = self._found.get()
        if isinstance(self._result, ProbeError):
            raise self._result
        return self._result

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as streams:
                for stream in self._streams:
                    streams.enter_context(torch.cuda.stream(stream))
                self._found.put(mixed(self._weights, lambda: not self._stopped))
        except BaseException as problem:
            self._found.put(_as_ours(problem))


def _as_ours(problem: BaseException) -> ProbeError:
    what = f"The digest of the weights could not be computed: {first_line(problem)[:120]}"
    memory: tuple[Any, ...] = (MemoryError, torch.OutOfMemoryError)
    if isinstance(problem, memory) or "not enough memory" in str(problem):
        ours: ProbeError = OutOfMemory(what, "Free some memory, or draw fewer images.")
    else:
        ours = ModelError(what, "Fetch the model again, or report this with --debug.")
    ours.__cause__ = problem
    return ours
