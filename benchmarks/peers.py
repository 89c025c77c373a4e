"""P14: what recording attention costs beside other ways of getting the same maps, all in one run.

    export OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 BLOSC_NTHREADS=1
    python -m benchmarks.peers --model small
    python -m benchmarks.peers --model bundled

Variants are taken in turn, every other round in reversed order; `bare again` is the control. The
first step of each loop is a warm-up. Everything is CPU time of one thread. Ours is written to disk,
in float16; the others' maps stay in memory, in float32.

*Attention time* is what the maps alone cost. Ours is self time (hooks, handing over and writing
threads, see `overhead.py`), less that of a recording with `capture.attention: off`; both record
latents and predictions. attention-map-diffusers 1.0.0 keeps queries and keys and makes the maps
afterwards: its time is that in its collector, and of `compute()`. It keeps both branches and all 77
tokens, so it stands beside our default, and beside the same amount from us. A processor that
multiplies eagerly, in cross-attention alone, is shown without a goal. Its cost is in its CPU ratio
only, because it replaces torch's own attention, which changes the bits.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from attention_map_diffusers import AttentionCapture

from benchmarks import models
from benchmarks.loop import Took, stopwatch
from benchmarks.overhead import Bench, spread
from probe.diffusion.sampling import Step, denoise
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.watching.rehearsal import cross_attention

MAPS_ONLY = {"statistics": False, "text": False}
OURS: dict[str, dict[str, Any]] = {
    "off": {"attention": "off"},
    "maps": {},
    "queries": {"attention": "queries"},
    "summary": {"attention": "summary"},
    "maps, as much": {"branches": "both", "tokens": "all"},
}
PEER, EAGER = "attention-map-diffusers", "eager processor"
GOAL = 0.6


@dataclass
class Cost(Took):
    """What a way costs.

    `attention` are CPU seconds of the maps alone, if they can be told apart. `megabytes` are kept
    for each counted step.
    """

    attention: float = 0.0
    megabytes: float = 0.0
    layers: int = 0


@dataclass
class Eager:
    """Cross-attention that multiplies eagerly and keeps its map.

    *Shape:* (branch x image x head, pixel, token).
    """

    kept: list[torch.Tensor] = field(default_factory=list)

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        sides = (
            attn.to_q(hidden_states),
            attn.to_k(encoder_hidden_states),
            attn.to_v(encoder_hidden_states),
        )
        query, key, value = (attn.head_to_batch_dim(side) for side in sides)
        shares = attn.get_attention_scores(query, key)
        self.kept.append(shares)
        out: torch.Tensor = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(shares @ value)))
        return out


class Peers(Bench):
    """The loops that are compared, on one model."""

    def loop(self) -> Iterator[Step]:
        model = self.model.with_scheduler("DDIM", {})
        return denoise(model, model.condition(models.PROMPT), steps=self.steps, guidance_scale=7.5)

    def plain(self, name: str) -> Cost:
        took = self.bare(name)
        return Cost(took.cpu, took.wall)

    def ours(self, name: str) -> Cost:
        took = Cost()
        with tempfile.TemporaryDirectory(dir=self.folder) as output, stopwatch(took):
            run = record(
                {**self.asked, "output": output, "capture": {**MAPS_ONLY, **OURS[name]}},
                self.pipe,
                progress=False,
            )
            self.final[name] = run.variable("latents/final_latents").values.astype("float32")
            took.megabytes = attention_bytes(run) / self.steps / 1e6
            took.layers = sum(run.attention(grid).sizes["layer"] for grid in run.grids)
        return took

    def peer(self, name: str) -> Cost:
        took = Cost()
        with AttentionCapture(
            self.pipe,
            relations="image->text",
            timesteps="all",
            heads="all",
            offload=None,
            dtype="float32",
        ) as capture:
            collect = capture.collector.capture_qk

            def timed(*args: Any, **named: Any) -> Any:
                start = time.thread_time()
                found = collect(*args, **named)
                took.attention += time.thread_time() - start
                return found

            def begin() -> None:
                capture.clear()
                took.attention = 0.0

            def made() -> list[torch.Tensor]:
                start = time.process_time()
                found = [one.data for one in capture.compute().records]
                took.attention += time.process_time() - start
                return found

            capture.collector.capture_qk = timed
            self.measure(name, took, begin, made)
        return took

    def eager(self, name: str) -> Cost:
        took, eager = Cost(), Eager()
        layers = cross_attention(self.pipe.unet)
        before = {path: module.processor for path, module in layers.items()}
        try:
            for module in layers.values():
                module.set_processor(eager)
            self.measure(name, took, eager.kept.clear, lambda: eager.kept)
        finally:
            for path, module in layers.items():
                module.set_processor(before[path])
        return took

    def measure(
        self,
        name: str,
        took: Cost,
        begin: Callable[[], None],
        made: Callable[[], list[torch.Tensor]],
    ) -> None:
        """Time a bare loop from its second step on, with what somebody else does in it.

        It ends when `made` has their maps.
        """
        cpu = wall = 0.0
        for step in self.loop():
            final = step.next_latents
            if step.index == 0:
                begin()
                cpu, wall = time.process_time(), time.perf_counter()
        maps = made()
        took.cpu, took.wall = time.process_time() - cpu, time.perf_counter() - wall
        took.megabytes = sum(one.nbytes for one in maps) / (self.steps - 1) / 1e6
        took.layers = len(maps) // (self.steps - 1)
        self.final[name] = final.float().numpy()


def attention_bytes(run: Run) -> int:
    """Return the bytes that attention takes on the disk."""
    return sum(
        file.stat().st_size for file in (Path(run.path) / "attention").rglob("*") if file.is_file()
    )


def row_of(name: str, rounds: Sequence[Mapping[str, Cost]], steps: int, differing: int) -> str:
    """Return a way's line of the table."""
    ratio = spread([100 * (took[name].cpu / took["bare"].cpu - 1) for took in rounds])
    own = [1000 * cost / (steps - 1) for cost in attention_time(name, rounds)]
    hooks = 1000 * statistics.median(took[name].hooks for took in rounds) / (steps - 1)
    last = rounds[-1][name]
    kept = f"{last.megabytes:6.1f} MB {last.layers:6}" if last.layers else ""
    costs = f"{spread(own, ' ms') if any(own) else '':30} {f'{hooks:.1f} ms' if hooks else '':>9}"
    return (
        f"{name:26} {costs}  {ratio:28} {kept:18} "
        f"{'equal' if not differing else f'{differing} DIFFER'}"
    )


def attention_time(name: str, rounds: Sequence[Mapping[str, Cost]]) -> list[float]:
    """Return CPU seconds of the maps alone, round by round; 0 if they cannot be told apart."""
    if name in OURS and name != "off":
        return [took[name].own - took["off"].own for took in rounds]
    return [took[name].attention for took in rounds]


def main() -> None:
    parser = models.parser(__doc__, rounds=5)
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="steps of each loop, the first not counted (default: 2)",
    )
    asked = parser.parse_args()
    print(
        f"{asked.model}, {asked.dtype}, {asked.steps} guided steps, {asked.rounds} rounds; "
        f"{models.machine()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Peers(
            models.pipeline(asked.model, getattr(torch, asked.dtype)), asked.steps, folder
        )
        ways: dict[str, Callable[[str], Cost]] = {
            "bare": bench.plain,
            "bare again": bench.plain,
            **dict.fromkeys(OURS, bench.ours),
        }
        ways |= {PEER: bench.peer, EAGER: bench.eager}
        rounds: list[dict[str, Cost]] = []
        for index in range(asked.rounds):
            order = list(ways)[:: 1 if index % 2 == 0 else -1]
            rounds.append({name: ways[name](name) for name in order})
            print(
                f"round {index + 1} of {asked.rounds}: bare {rounds[-1]['bare'].cpu:.2f} s CPU",
                flush=True,
            )
    print(
        f"\n{'':26} {'attention time a step':30} {'hooks':>9}  {'CPU ratio':28} {'kept':>9} "
        f"{'layers':>6}   bits"
    )
    for name in list(ways)[1:]:
        print(
            row_of(name, rounds, asked.steps, int((bench.final[name] != bench.final["bare"]).sum()))
        )
    print("\nExtra attention time against attention-map-diffusers, same layers")
    theirs = attention_time(PEER, rounds)
    for name in [way for way in OURS if way != "off"]:
        ratios = [a / b for a, b in zip(attention_time(name, rounds), theirs, strict=True)]
        goal = (
            f"   goal <= {GOAL}x: {'met' if statistics.median(ratios) <= GOAL else 'missed'}"
            if name == "maps"
            else ""
        )
        print(f"{name:26} {spread(ratios, 'x')}{goal}")


if __name__ == "__main__":
    main()
