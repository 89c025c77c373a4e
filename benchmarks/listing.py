"""python -m benchmarks.listing [COUNT]: how long it takes to list many recordings, twice.

It makes COUNT folders (10,000) with the sample's root file, changed in name, time and prompt. It
lists them in fresh processes, the first time and again: CPU seconds of `list_runs` alone, and wall
seconds of the whole command `probe ls`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from probe.reading import sample

LISTS = """
import json, sys, time
import probe
probe.list_runs
began, cpu = time.perf_counter(), time.process_time()
rows = probe.list_runs(sys.argv[1])
print(json.dumps([len(rows), time.process_time() - cpu, time.perf_counter() - began]))
"""
PARSES = """
import json, sys, time
from pathlib import Path
from probe.reading.listing import root_attributes
began, cpu = time.perf_counter(), time.process_time()
rows = [root_attributes(path) for path in Path(sys.argv[1]).iterdir()]
print(json.dumps([len(rows), time.process_time() - cpu, time.perf_counter() - began]))
"""


def make(folder: Path, count: int) -> None:
    """Make recordings that have nothing but a root file, as a writer leaves it."""
    root = json.loads((sample.unpacked() / "zarr.json").read_text())
    for index in range(count):
        root["attributes"]["created"] = (
            f"2026-01-02T{index // 3600 % 24:02}:{index // 60 % 60:02}:{index % 60:02}.000+00:00"
        )
        root["attributes"]["experiment"]["prompt"] = f"An astronaut scuba diving, number {index}"
        path = folder / f"astronaut-{index:08x}.zarr"
        path.mkdir()
        (path / "zarr.json").write_text(json.dumps(root))
        old = time.time() - 60 - index
        os.utime(path / "zarr.json", (old, old))


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as made:
        runs, cache = Path(made) / "runs", Path(made) / "cache"
        runs.mkdir()
        make(runs, count)
        time.sleep(2.5)  # what was written just now is not kept in the index
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        print(
            f"{count} recordings, root files of "
            f"{(next(runs.iterdir()) / 'zarr.json').stat().st_size / 1000:.0f} kB\n"
        )
        print(f"{'':32}{'CPU':>8}{'wall':>8}")
        for what, code in (
            ("each root file parsed whole", PARSES),
            ("list_runs, the first time", LISTS),
            ("list_runs, again", LISTS),
        ):
            shown = subprocess.run(
                [sys.executable, "-c", code, str(runs)],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            rows, cpu, wall = json.loads(shown)
            assert rows == count
            print(f"{what:32}{cpu:6.2f} s{wall:6.2f} s")
        for file in cache.rglob("listing-*"):
            print(f"\nthe index has {file.stat().st_size / 1e6:.1f} MB")
            file.unlink()
        for what in ("probe ls, the first time", "probe ls, again"):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "probe.cli", "ls", str(runs)],
                env=environment,
                capture_output=True,
                check=True,
            )
            print(f"{what:32}{'':8}{time.perf_counter() - began:6.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
