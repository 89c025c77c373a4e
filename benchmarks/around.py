"""What a whole command takes, part by part, in fresh processes; beside another checkout's.

    python -m benchmarks.around --model bundled --steps 30
    python -m benchmarks.around --model small --steps 2 --before FOLDER    # an older checkout

CPU seconds of the process come first, then wall time. `digest` is the digest of the weights: its
own time, also where it is computed in a thread; `waited` is how long the first step waited for it.
`loop` holds what the hooks do and what is written meanwhile. The parts but for `digest` are of the
main thread, so other threads' work is in the CPU time of the part that they ran beside.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = "import load plan create digest waited loop sums rest sheet close whole".split()


class Clock:
    """CPU and wall seconds of each part, without what another part inside it took."""

    def __init__(self) -> None:
        self.took = {part: [0.0, 0.0] for part in PARTS}
        self._inside: list[list[float]] = []

    def watch(self, owner: Any, name: str, part: str, thread: bool = False) -> None:
        """Count what a function takes. With `thread`: its own thread's time."""
        own: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            cpu = time.thread_time if thread else time.process_time
            began = cpu(), time.perf_counter()
            if not thread:
                self._inside.append([0.0, 0.0])
            try:
                return own(*given, **named)
            finally:
                took = [cpu() - began[0], time.perf_counter() - began[1]]
                inner = [0.0, 0.0] if thread else self._inside.pop()
                for kind in (0, 1):
                    self.took[part][kind] += took[kind] - inner[kind]
                    if self._inside and not thread:
                        self._inside[-1][kind] += took[kind]

        setattr(owner, name, timed)


def child(model: str, dtype: str, device: str, steps: int) -> None:
    """Record one run, and print what its parts took."""
    began = time.perf_counter()
    from probe.running import perform, recorder

    clock = Clock()
    clock.took["import"] = [time.process_time(), time.perf_counter() - began]
    import torch

    from probe.diffusion import parts
    from probe.watching.sums import Sums

    pipe = None
    if model != "bundled":
        from benchmarks import models

        pipe = models.pipeline(model, getattr(torch, dtype), device)
    for name, part in {"model_for": "load", "plan": "plan", "_see_through": "loop"}.items():
        clock.watch(recorder, name, part)
    clock.watch(recorder.RunWriter, "__init__", "create")
    clock.watch(recorder.RunWriter, "complete", "close")
    clock.watch(recorder.sheets, "save", "sheet")
    clock.watch(perform.Session, "finish", "rest")
    clock.watch(Sums, "finish", "sums")
    try:
        from probe.diffusion import weights
    except ImportError:  # an older checkout
        from probe.diffusion.sd import StableDiffusion

        assert parts.digest
        clock.watch(StableDiffusion, "digest", "digest")
    else:
        clock.watch(weights, "mixed", "digest", thread=True)
        clock.watch(weights.DigestBeside, "result", "waited", thread=True)
    asked = {"prompt": "An astronaut scuba diving", "steps": steps, "scheduler": "DDIM"}
    if model == "bundled":
        asked |= {"dtype": dtype, "device": device}
    before = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        recorder.record({**asked, "output": output}, pipe, progress=False)
    whole = time.process_time() - before[0], time.perf_counter() - before[1]
    clock.took["whole"] = [a + b for a, b in zip(whole, clock.took["import"], strict=True)]
    print(json.dumps(clock.took))


def once(tree: Path, options: list[str]) -> dict[str, list[float]]:
    """Return what the parts took of one run with the code of a checkout."""
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS")
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    environment = {**os.environ, **dict.fromkeys(names, "1"), **quiet, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", __file__, "--child", *options]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, list[float]] = json.loads(told.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    from benchmarks import models

    parser = models.parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    asked = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    trees = {**({"before": asked.before} if asked.before else {}), "now": here}
    options = [asked.model, asked.dtype, asked.device, str(asked.steps)]
    print(f"{asked.model}, {asked.dtype}, {asked.device}, {asked.steps} steps; {models.machine()}")
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in trees}
    for _ in range(asked.rounds):
        for name, tree in trees.items():
            found[name].append(once(tree, options))
    print(f"{'part':8}" + "".join(f"{name + ': CPU s':>16}{'wall s':>10}" for name in trees))
    for part in PARTS:
        row = f"{part:8}"
        for name in trees:
            cpu, wall = (statistics.median(one[part][k] for one in found[name]) for k in (0, 1))
            row += f"{cpu:16.3f}{wall:10.3f}"
        print(row, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
