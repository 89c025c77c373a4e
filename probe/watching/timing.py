"""Time one call of a denoiser with random weights, and weigh it, in a process of its own.

    measured([settings], rounds=5, threads=1, device="cpu", most_seconds=60)

Time and memory do not depend on what a network has learned. On a CPU it is processor time, which
other programs hardly lengthen; on CUDA, device events. Each call is first refused if it would not
fit into the memory that is free, and left out if it would take too long.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from probe.analysis.fits import LEAST_POINTS, fit_law
from probe.diffusion.loading import blueprint, pick_device
from probe.diffusion.variants import coarse, remade, unet_at
from probe.errors import TooLarge
from probe.reading.pixels import Attention, Cell, Law, LeftOut, Machine, Measured
from probe.settings.cost import Cost
from probe.system import free_memory, is_out_of_memory, peak_memory, processor
from probe.watching.counting import Counter, LayerCount, counted, tokens_of

MOST_IN_ALL, FEWEST = 30.0, 3  # seconds of all rounds; above that, only so many are timed
AT_ONCE = 8  # the largest outputs that a call holds at the same time, more than were ever measured
IDLE = 700_000_000  # bytes of a process that has imported torch and diffusers


@dataclass(frozen=True)
class Call:
    """A call that is to be measured: which network, on which input."""

    model: str
    f: int
    size: tuple[int, int]
    attention: Attention
    shape: tuple[int, int, int]
    flops: int
    needs: int
    device: str
    dtype: str
    attention_up_to: int

    @property
    def places(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def title(self) -> str:
        grid = "x".join(map(str, self.shape))
        return f"{self.model}, {self.attention} attention, {grid}"


class Taken(NamedTuple):
    """What a process of its own measured."""

    seconds: list[float]
    peak_bytes: int
    call_bytes: int


def needed(layers: Sequence[LayerCount], number: int) -> int:
    """Return about how many bytes a process needs for a call: itself, weights, and what is kept.

    Kept are the outputs of the blocks on the way down, and a few of the largest at a time. Fused
    attention keeps no matrix.
    """
    weights = sum(layer.parameters for layer in layers)
    skips = sum(
        layer.numbers
        for layer in layers
        if layer.path.startswith("down_blocks.") and layer.path.endswith(("conv2", ".conv"))
    )
    largest = max(layer.numbers for layer in layers)
    return IDLE + number * (weights + skips + AT_ONCE * largest)


def calls_of(settings: Cost, device: str, dtype: str) -> list[Call]:
    """Return the calls that settings ask for, each once, those with the fewest FLOPs first."""
    counter = Counter(blueprint(settings.model), settings)
    number = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    calls = []
    for size, f in itertools.product(settings.sizes, settings.f):
        shape = counter.shape(f, size)
        kinds: list[Attention] = ["full", "coarse"] if counter.is_wide(shape) else ["full"]
        for attention in kinds:
            layers = counter.unet(f, shape, attention)
            flops = counted(settings, "denoiser", layers, shape=shape).total
            place = (settings.model, f, size, attention, shape)
            calls.append(
                Call(*place, flops, needed(layers, number), device, dtype, settings.attention_up_to)
            )
    once = {(call.shape, call.attention): call for call in reversed(calls)}
    return sorted(once.values(), key=lambda call: call.flops)


def measured(
    asked: Sequence[Cost],
    *,
    made_by: str,
    rounds: int = 5,
    threads: int = 1,
    device: str = "auto",
    most_seconds: float = 60.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Return times and memory of the calls that settings ask for, and laws fitted to them.

    Raise TooLarge, before anything is allocated, if not even the smallest call fits.
    """
    import diffusers

    where = pick_device(device)
    on_cuda, load = where.type == "cuda", _load()
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    dtype = "float32"
    for settings in asked:
        dtype = settings.dtype if on_cuda else "float32"
        calls = calls_of(settings, str(where), dtype)
        refuse(calls[0], where)
        for call in calls:
            known = [cell for cell in cells if _same_network(cell, call)]
            if not (why := too_much(call, where) or too_long(call, known, most_seconds)):
                progress(f"{call.title}: {call.flops / 1e9:,.1f} GFLOP")
                taken = in_a_process(call, rounds, threads)
                why = taken if isinstance(taken, str) else ""
            if why or isinstance(taken, str):
                left_out.append(_left_out(call, why))
            else:
                cells.append(_cell(call, taken))
    return Measured(
        made_by=made_by,
        machine=Machine(
            device=torch.cuda.get_device_name(where) if on_cuda else processor(),
            threads=threads,
            torch=torch.__version__,
            diffusers=diffusers.__version__,
            dtype=dtype,
            clock="device events" if on_cuda else "processor time",
            load=load,
        ),
        cells=tuple(cells),
        laws=tuple(laws(cells)),
        left_out=tuple(left_out),
    )


def refuse(call: Call, where: torch.device) -> None:
    """Raise TooLarge if a call does not fit into the memory that is free."""
    if why := too_much(call, where):
        raise TooLarge(
            f"{call.title}: {why}.",
            "Take smaller sizes, a larger f, or model: small; or close other programs.",
        )


def too_much(call: Call, where: torch.device) -> str:
    """Return why a call does not fit into memory, with the estimate; "" if it fits."""
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else free_memory()
    if free and call.needs > free:
        return f"it would need about {call.needs / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return ""


def too_long(call: Call, known: Sequence[Cell], most_seconds: float) -> str:
    """Return why a call is left out for its time, judged by the last measured; "" if it is not."""
    if not known:
        return ""
    last = max(known, key=lambda cell: cell.flops)
    seconds = last.seconds * call.flops / last.flops
    return f"it would take about {seconds:,.0f} s" if seconds > most_seconds else ""


def _same_network(cell: Cell, call: Call) -> bool:
    return (cell.model, cell.attention) == (call.model, call.attention)


def in_a_process(call: Call, rounds: int, threads: int) -> Taken | str:
    """Measure a call in a fresh process. Return why nothing came back if the system ended it."""
    fresh = _fresh_processes()
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
            return pool.submit(take, call, rounds, threads).result()
    except BrokenProcessPool:
        return "the system ended its process, probably for its memory"
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            return "the memory did not suffice"
        raise


def _fresh_processes() -> Any:
    """Return where new processes come from: a server that has imported this module and run nothing.

    Windows has none; a process imports everything anew there.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "diffusers", "transformers"])
    return server


def take(call: Call, rounds: int, threads: int) -> Taken:
    """Make the network with random weights, call it, and return what it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where, dtype = torch.device(call.device), getattr(torch, call.dtype)
    model = blueprint(call.model)
    changes = unet_at(model.unet, call.f)
    if call.attention == "coarse":
        changes |= coarse(model.unet, call.shape[1:], call.attention_up_to)
    unet = torch.nn.Module.to(remade(model.unet, changes), dtype).to_empty(device=where)
    fill(unet)
    model = replace(model, unet=unet)
    latents = torch.randn((1, *call.shape), dtype=dtype, device=where)
    t, arguments = torch.tensor(500, device=where), model.blank(1, tokens_of(model))

    def once() -> None:
        model.call(latents, t, arguments)

    before = _begin_memory(where)
    with torch.no_grad():
        first = _seconds(once, where)  # this call also plans convolutions
        several = rounds if first * rounds < MOST_IN_ALL else min(rounds, FEWEST)
        seconds = [_seconds(once, where) for _ in range(several)]
    if where.type == "cuda":
        peak = int(torch.cuda.max_memory_allocated(where))
    else:
        peak = _peak()
    return Taken(seconds, peak, max(peak - before, 0) if before else 0)


def fill(module: torch.nn.Module) -> None:
    """Give a module's weights random values: the same million again and again."""
    values = 0.02 * torch.randn(1 << 20)
    for weight in module.parameters():
        flat = weight.data.view(-1)
        for part in flat.split(len(values)):
            part.copy_(values[: len(part)])


def _seconds(call: Callable[[], None], where: torch.device) -> float:
    if where.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(where)  # it may be another than GPU 0
        begin.record(stream)
        call()
        end.record(stream)
        torch.cuda.synchronize(where)
        return float(begin.elapsed_time(end)) / 1000
    start = time.process_time()
    call()
    return time.process_time() - start


def _begin_memory(where: torch.device) -> int:
    """Return the bytes that are held now, and forget the peak where the system can."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        return int(torch.cuda.memory_allocated(where))
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return peak_memory()
    return _peak()


def _peak() -> int:
    """Return the most memory that this process has held; Linux's count begins with the process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return peak_memory()


def _load() -> float:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0


def _left_out(call: Call, why: str) -> LeftOut:
    place: dict[str, Any] = {"model": call.model, "f": call.f, "size": call.size}
    return LeftOut(**place, attention=call.attention, places=call.places, why=why)


def _cell(call: Call, taken: Taken) -> Cell:
    seconds = sorted(taken.seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Cell(
        model=call.model,
        f=call.f,
        size=call.size,
        attention=call.attention,
        shape=call.shape,
        flops=call.flops,
        rounds=len(seconds),
        seconds=statistics.median(seconds),
        low=max(low, seconds[0]),
        high=min(high, seconds[-1]),
        peak_bytes=taken.peak_bytes,
        call_bytes=taken.call_bytes,
    )


def laws(cells: Sequence[Cell]) -> list[Law]:
    """Return a law for each network and quantity of which enough was measured.

    A network with coarse attention is another network at each f: its cells follow no one law.
    """
    fitted = []
    for name in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if (cell.model, cell.attention) == (name, "full")]
        for quantity in ("seconds", "call_bytes"):
            points = {cell.places: float(getattr(cell, quantity)) for cell in own}
            points = {places: value for places, value in points.items() if value > 0}
            if len(points) < LEAST_POINTS:
                continue
            coefficients, worst = fit_law(list(points), list(points.values()))
            fitted.append(
                Law(
                    model=name,
                    attention="full",
                    quantity=quantity,
                    coefficients=coefficients,
                    least=min(points),
                    most=max(points),
                    worst=worst,
                )
            )
    return fitted
