"""What a recording costs on disk: P6 (writing), P7 (size), P8 (opening), P9 (reading).

    python -m benchmarks.store --model sd1

No model runs: a plan on the meta device says which arrays there are, and they are filled with
random probabilities. Writing is compared with numpy's `tofile` of the same bytes into as many files
in the same folders, in turn.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from benchmarks import models
from probe.diffusion.sd import StableDiffusion
from probe.format.schema import FORMAT_VERSION
from probe.reading.recording import Run
from probe.running.planning import Plan, plan
from probe.settings.experiment import load_experiment
from probe.writing.store import RunWriter

LONG = "a photograph of an astronaut riding a horse on the moon"
Figures = list[tuple[float, ...]]


def planned(model: str, steps: int, prompt: str = models.PROMPT, **capture: Any) -> Plan:
    """Return the plan of a guided run on a model without weights.

    The scheduler is that of Stable Diffusion v1-4, with one call more.
    """
    pipe = models.pipeline(model, device="meta", whole=True)
    asked = {
        "prompt": prompt,
        "steps": steps,
        "guidance_scale": 7.5,
        "scheduler": "PNDM",
        "capture": capture,
    }
    experiment = load_experiment(asked)
    return plan(
        StableDiffusion.of(pipe).with_scheduler(experiment.scheduler, {"skip_prk_steps": True}),
        experiment,
    )


def one_step(run: Plan) -> dict[str, np.ndarray]:
    """Return a step's arrays with random content: probabilities where maps are."""
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {}
    for a in run.arrays:
        if a.per_step and a.value is None and a.dims[0] == "step" and len(a.shape) > 1:
            found = rng.standard_normal(a.shape[1:], np.float32)
            if a.variable.name == "cross":
                found = np.exp(found)
                found /= found.sum(0)
                found = np.round(255 * np.sqrt(found)) if a.dtype == "uint8" else found
            values[a.path] = found.astype(a.dtype)
    return values


def attributes(run: Plan) -> dict[str, Any]:
    """Return what a reader insists on."""
    return {
        **{
            "format_version": FORMAT_VERSION,
            "created": "2026-01-01T00:00:00.000+00:00",
            "experiment": run.experiment.resolved(),
        },
        **{"environment": {"device": "meta"}, "model": {"name": "benchmark", "dtype": "float32"}},
        **{"scheduler": {"class": "PNDMScheduler", "config": {}}},
        **{"prediction_type": "epsilon", "latent_convention": "variance_preserving"},
    }


def written(run: Plan, path: Path, values: Mapping[str, np.ndarray]) -> None:
    with RunWriter(path, run.arrays, attributes(run), "none") as writer:
        for step in range(run.calls):
            writer.write_step(step, lambda: values, sum(value.nbytes for value in values.values()))
        writer.flush()


def measured(act: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds, of all threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


def write_benchmark(run: Plan, folder: Path, rounds: int, steps: int) -> None:
    """Compare a store with `tofile`: the same bytes, the same folders, in turn.

    Each way begins with nothing left to write back, so that none pays for another. A ratio is of
    one round; the first round is not counted. `tofile and flags` writes one small file more a
    step, over the last one, as the store does: some disks take longer over that than over a step.
    """
    values = one_step(run)
    flags = np.zeros(steps + 4, np.uint8)
    size = steps * sum(value.nbytes for value in values.values())

    def with_store(to: Path) -> tuple[float, float]:
        with RunWriter(to, run.arrays, attributes(run), "none") as writer:

            def act() -> None:
                for step in range(steps):
                    writer.write_step(step, lambda: values, size // steps)
                writer.flush()

            return settled(act)

    def with_tofile(to: Path, *, flagged: bool = False) -> tuple[float, float]:
        for path in (*values, "committed"):
            (to / path).mkdir(parents=True)
        flags.tofile(to / "committed" / "c.0")

        def act() -> None:
            for step in range(steps):
                for path, value in values.items():
                    value.tofile(to / path / f"c.{step}{'.0' * value.ndim}")
                if flagged:
                    flags.tofile(to / "committed" / "c.new")
                    (to / "committed" / "c.new").replace(to / "committed" / "c.0")

        return settled(act)

    ways: dict[str, Callable[[Path], tuple[float, float]]] = {
        "tofile": with_tofile,
        "tofile again": with_tofile,
        "tofile and flags": functools.partial(with_tofile, flagged=True),
        "store": with_store,
    }
    times: dict[str, Figures] = {name: [] for name in ways}
    for index in range(rounds + 1):
        for name in list(ways)[:: 1 if index % 2 == 0 else -1]:
            found = ways[name](folder / "written.zarr")
            shutil.rmtree(folder / "written.zarr")
            if index:
                times[name].append(found)
    print(
        f"P6 writing {steps} steps of {size / steps / 1e6:.1f} MB in {len(values)} files each, "
        f"{rounds} rounds; throughput against tofile (goal 0.8, limit 0.6)"
    )
    for name in ways:
        for number, clock in enumerate(("wall", "CPU")):
            pairs = zip(times[name], times["tofile"], strict=True)
            ratios = sorted(there[number] / here[number] for here, there in pairs)
            rates = sorted(size / found[number] / 1e6 for found in times[name])
            shown = f"{spread(ratios, 2)}x   {spread(rates, 0)} MB/s"
            print(f"   {name:16} {clock:4} {shown}", flush=True)


def settled(act: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds, begun with nothing left to write back."""
    os.sync()
    return measured(act)


def spread(found: list[float], digits: int) -> str:
    """Return the median of sorted figures, and the least and the greatest."""
    median = statistics.median(found)
    return f"{median:5.{digits}f} ({found[0]:.{digits}f}, {found[-1]:.{digits}f})"


def sizes(model: str, steps: int, folder: Path) -> None:
    print(
        f"P7 size of {steps} steps, {model}, 512 pixels, forecast without weights (goals 370 MB, "
        "sqrt_u8 170 MB)"
    )
    for prompt in (LONG, models.PROMPT):
        for name, capture in {
            "default": {},
            "sqrt_u8": {"dtype": "sqrt_u8"},
            "all tokens": {"tokens": "all"},
        }.items():
            run = planned(model, steps, prompt, **capture)
            forecast, values = run.forecast(), one_step(run)
            maps = sum(count for path, count in forecast.items() if path.endswith("/cross"))
            line = (
                f"   {len(run.kept.positions):2} positions, {name:11} "
                f"{sum(forecast.values()) / 1e6:7.1f} MB, of which maps {maps / 1e6:7.1f} MB"
            )
            if name == "default":
                path = folder / "sized.zarr"
                written(run, path, values)
                found = sum(
                    file.stat().st_size
                    for array in values
                    for file in (path / array).iterdir()
                    if file.name != "zarr.json"
                )
                more = 100 * found / sum(forecast[array] for array in values) - 100
                line += f"; on disk {more:+.2f}% (checksums, indices)"
                shutil.rmtree(path)
            print(line, flush=True)


def milliseconds(act: Callable[[], Any], rounds: int = 15) -> str:
    act()
    times = [measured(act) for _ in range(rounds)]
    wall, cpu = ([1000 * found[clock] for found in times] for clock in (0, 1))
    return (
        f"{min(wall):7.2f} ms at least, {statistics.median(wall):7.2f} median, "
        f"{statistics.median(cpu):7.2f} ms of CPU"
    )


def read_benchmark(model: str, folder: Path) -> None:
    def opening(path: Path, steps: int) -> None:
        ways: dict[str, Callable[[], Any]] = {
            "probe, the root      (goal  3)": lambda: Run(path).attributes,
            "probe, the tree      (goal 40)": lambda: Run(path).tree,
            "stock zarr, the root          ": lambda: zarr.open_group(path, mode="r"),
            "stock xarray, the tree        ": lambda: xr.open_datatree(
                path, engine="zarr", chunks=None
            ),
        }
        for name, way in ways.items():
            print(f"P8 opening {steps:2} steps: {name} {milliseconds(way)}", flush=True)

    for steps in (5, 50):
        run = planned(model, steps)
        written(run, folder / f"read-{steps}.zarr", one_step(run))
        opening(folder / f"read-{steps}.zarr", run.calls)
    found = Run(folder / "read-50.zarr")
    token = 2

    def maps(**at: int) -> list[np.ndarray]:
        return [
            found.variable(f"attention/{grid}/cross").isel(token=token, **at).values
            for grid in found.grids
        ]

    overview = f"attention/{found.grids[0]}/overview"
    print(
        f"P9 one token, all layers and heads: one step  {milliseconds(lambda: maps(step=7))} "
        "(goal 3)",
        flush=True,
    )
    print(
        f"                                    all steps {milliseconds(maps)} (goal 130)", flush=True
    )
    word = found.words[0]
    ways = {
        "one word's maps, mean over layers and heads   ": lambda: found.word_maps(words=word),
        "one token's maps, the same                    ": lambda: found.token_maps(tokens=token),
        "the overview, all tokens                      ": found.overview,
    }
    for name, way in ways.items():
        print(f"   {name}{milliseconds(lambda way=way: way().values)}", flush=True)
    print(
        "                                its overview  "
        f"{milliseconds(lambda: found.variable(overview).isel(token=token).values)} (goal 1.5)",
        flush=True,
    )


def main() -> None:
    parser = models.parser(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="steps that are written in P6")
    asked = parser.parse_args()
    print(f"{asked.model}; zarr {zarr.__version__}; {models.machine()}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes(asked.model, 50, folder)
        write_benchmark(planned(asked.model, asked.steps), folder, asked.rounds, asked.steps)
        read_benchmark(asked.model, folder)


if __name__ == "__main__":
    main()
