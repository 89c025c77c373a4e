"""Everything that needs a GPU, for whoever has one for minutes: the tests, then what it costs.

    python -m benchmarks.gpu                 # about 5 minutes on one large GPU
    python -m benchmarks.gpu --device cpu    # the same code where it runs on a CPU, to try it first

The tests are those marked `gpu`; on a CPU, those that take the CPU for a GPU. Then comes
`benchmarks.cuda`, with 2 rounds. The exit code is 1 if either failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

TESTS = {
    "cuda": ["-m", "gpu", "tests/test_gpu.py"],
    "cpu": ["tests/test_graphs.py", "tests/test_few_launches.py"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    measured = ["benchmarks.cuda", "--device", asked.device, "--rounds", str(asked.rounds)]
    codes = []
    for command in (["pytest", "-q", "--durations=10", *TESTS[asked.device]], measured):
        started = time.perf_counter()
        root = Path(__file__).resolve().parent.parent
        codes.append(subprocess.run([sys.executable, "-m", *command], cwd=root).returncode)
        print(f"{command[0]}: {time.perf_counter() - started:.0f} s", flush=True)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
