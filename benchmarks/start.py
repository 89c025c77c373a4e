"""How long it takes to begin, and whole commands on the bundled model: P15.

    python -m benchmarks.start

Each command runs in a fresh process, imports and loading included, with its own choice of threads.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

EXAMPLE = "experiments/astronaut.yaml"
EVERYTHING = [
    "--capture.branches",
    "both",
    "--capture.tokens",
    "all",
    "--capture.statistics",
    "true",
    "--capture.text",
    "true",
]
NOTHING = [
    "--capture.attention",
    "off",
    "--capture.text",
    "false",
    "--capture.statistics",
    "false",
    "--decode-every",
    "0",
]


def timed(command: list[str], threads: int | None = None) -> tuple[float, float]:
    """Return wall and CPU seconds of a fresh Python."""
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS")
    chosen = {} if threads is None else dict.fromkeys(names, str(threads))
    environment = {key: value for key, value in os.environ.items() if key not in names} | chosen
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def row(name: str, command: list[str], rounds: int, goal: str, threads: int | None = None) -> None:
    found = [timed(command, threads) for _ in range(rounds)]
    wall, cpu = ([taken[clock] for taken in found] for clock in (0, 1))
    print(
        f"{name:44} wall {min(wall):6.2f} s at least, {statistics.median(wall):6.2f} median; CPU "
        f"{statistics.median(cpu):6.2f} s   {goal}",
        flush=True,
    )


def main() -> None:
    print(f"P15, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    loaded = "import sys; from probe import cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", loaded], check=True)  # exit code 1 if torch was imported
    row("probe --help, without torch", ["-m", "probe.cli", "--help"], 7, "goal 0.6 s")
    row("probe run --help", ["-m", "probe.run", "--help"], 7, "")
    with tempfile.TemporaryDirectory() as output:
        run = ["-m", "probe.run", EXAMPLE, "--steps", "30", "--output", output, "--quiet"]
        row("30 steps on the bundled model, all captured", [*run, *EVERYTHING], 2, "goal 30 s")
        row("the same, one thread", [*run, *EVERYTHING], 2, "", threads=1)
        row("the same, nothing captured", [*run, *NOTHING], 2, "")


if __name__ == "__main__":
    main()
