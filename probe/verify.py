"""python -m probe.verify RUN: is a recording what it says it is? Without the model: nothing is predicted again.

Checks, each with what it found:

    manifest     every file is there, none is new, each has the digest it was written with; every chunk's checksum holds
    committed    every step is there
    softmax      at each pixel, the attention to all tokens sums to one
    guidance     the scheduler's input follows from the two branches, bit for bit
    scheduler    the seed's noise, and the predictions replayed through a fresh scheduler, give the recorded latents
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from probe.analysis import probabilities
from probe.errors import RecordingDamaged
from probe.recording import Run, open_run
from probe.store import MANIFEST, manifest
from probe.terminal import Parser, guarded

ROW_TOLERANCE = {"float16": 5e-4, "float32": 1e-5}
REPLAY_TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-1}


@dataclass(frozen=True)
class Check:
    """One finding. `verdict` is "exact", "within tolerance", "failed" or "not checked"."""

    name: str
    verdict: str
    detail: str


def verify(run: Run) -> list[Check]:
    """All checks of a recording. Reads all of it, one step at a time."""
    checks: list[tuple[str, Callable[[Run], Check]]] = [
        ("manifest", check_manifest),
        ("committed", check_committed),
        ("softmax", check_softmax),
        ("guidance", check_guidance),
        ("scheduler", check_scheduler),
    ]
    found = []
    for name, check in checks:
        try:
            found.append(check(run))
        except ImportError as missing:
            found.append(Check(name, "not checked", f"needs {missing.name}: pip install 'diffusion-probe[record]'"))
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:  # whatever a damaged file makes of itself
            found.append(Check(name, "failed", f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:160]}"))
    return found


def check_manifest(run: Run) -> Check:
    file = run.path / MANIFEST
    if not file.exists():
        told = f"the run is {run.status}: its manifest is written at the end; the checksums of {read_all(run)} variables hold"
        return Check("manifest", "not checked" if run.status != "complete" else "failed", told)
    written, present = json.loads(file.read_text()), manifest(run.path)
    wrong = sorted(name for name in written.keys() & present.keys() if written[name] != present[name])
    missing, new = sorted(written.keys() - present.keys()), sorted(present.keys() - written.keys())
    for problem, names in (("changed", wrong), ("missing", missing), ("new", new)):
        if names:
            return Check("manifest", "failed", f"{len(names)} files {problem}: {names[0]}")
    return Check("manifest", "exact", f"{len(written)} files have the digests they were written with, {read_all(run)} variables their checksums")


def read_all(run: Run) -> int:
    """Decode every chunk of every variable, one step at a time, which checks their checksums. Raises ValueError where one is wrong."""
    count = 0
    for node in run.tree.subtree:
        for name, variable in node.to_dataset(inherit=False).variables.items():
            count += 1
            try:
                for index in range(variable.sizes["step"]) if "step" in variable.dims and variable.ndim > 1 else [None]:
                    _ = (variable if index is None else variable.isel(step=index)).values
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"{node.path.strip('/')}/{name}: {error}") from error
    return count


def check_committed(run: Run) -> Check:
    calls = run.tree.sizes["step"]
    if len(run.steps) == calls:
        return Check("committed", "exact", f"all {calls} steps")
    verdict = "failed" if run.status == "complete" else "within tolerance"
    return Check("committed", verdict, f"{len(run.steps)} of {calls} steps; the run is {run.status}")


def check_softmax(run: Run) -> Check:
    if not run.grids:
        return Check("softmax", "not checked", "no attention maps were recorded")
    worst, where, allowed = 0.0, "", 0.0
    for grid in run.grids:
        maps = run.attention(grid)
        tokens = maps.sizes["token"]
        allowed = ROW_TOLERANCE.get(str(maps.dtype), 1.05 * math.sqrt(tokens) / 255)
        for index in range(maps.sizes["step"]):
            sums = probabilities(maps.isel(step=index).values).sum(axis=0)
            off = float(np.abs(sums - 1).max())
            if not off <= worst:
                worst, where = off, f"step {int(maps.step[index])} at {grid}"
            if not off <= allowed:
                return Check("softmax", "failed", f"rows sum to 1 only within {off:.2g} at {where}; {allowed:.2g} is allowed for {maps.dtype}")
    return Check("softmax", "within tolerance", f"rows sum to 1 within {worst:.2g} ({where}); {allowed:.2g} is allowed for their type")


def check_guidance(run: Run) -> Check:
    asked = run.experiment
    cond = run.prediction("cond")
    if asked.guidance_scale <= 1:
        same = np.array_equal(run.prediction().values, cond.values, equal_nan=True)
        return Check(
            "guidance",
            "exact" if same else "failed",
            "no guidance: the scheduler got the conditional prediction" + ("" if same else ", but not here"),
        )
    import torch

    from probe.sampling import guide

    pairs = []
    for index in range(len(run.steps)):
        uncond, own, given = (_torch(run, a.isel(step=index).values) for a in (run.prediction("uncond"), cond, run.prediction()))
        with torch.no_grad():
            pairs.append((int(run.steps[index]), guide(uncond, own, asked.guidance_scale, asked.guidance_rescale), given))
    return _compare("guidance", run, pairs, f"uncond + {asked.guidance_scale:g} (cond - uncond)")


def check_scheduler(run: Run) -> Check:
    import torch

    asked = run.experiment
    latents, predictions = run.latents, run.prediction()
    if not len(run.steps):
        return Check("scheduler", "not checked", "no step was committed")
    from probe.sampling import noise, step_options

    scheduler = rebuild_scheduler(run)
    scheduler.set_timesteps(asked.steps)
    kind = getattr(torch, run.attributes["model"]["dtype"])
    start, generators = noise(asked.seed, tuple(latents.shape[1:]), kind)
    options = step_options(scheduler, asked.eta, generators)

    def replay() -> Iterator[tuple[int, Any, Any]]:
        current = start * scheduler.init_noise_sigma
        for index, t in enumerate(scheduler.timesteps[: len(run.steps)]):
            recorded = _torch(run, latents.isel(step=index).values)
            yield index, current, recorded
            scheduler.scale_model_input(recorded, t)
            current = scheduler.step(_torch(run, predictions.isel(step=index).values), t, recorded, **options, return_dict=False)[0]
        if run.status == "complete":
            yield len(run.steps), current, _torch(run, run.variable("latents/final_latents").values)

    with torch.no_grad():
        return _compare("scheduler", run, list(replay()), f"{run.attributes['scheduler']['class']} replayed from the seed's noise")


def rebuild_scheduler(run: Run) -> Any:
    """A fresh scheduler as the run had it, from the recording alone."""
    import diffusers

    kind = getattr(diffusers, str(run.attributes["scheduler"]["class"]), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise RecordingDamaged(f"{run.name} names a scheduler that diffusers does not have.", "Use the version of diffusers that recorded it.")
    config = run.attributes["scheduler"]["config"]
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def _compare(name: str, run: Run, pairs: list[tuple[int, Any, Any]], what: str) -> Check:
    """Bit-equal; or close, where the recording was made under conditions that this machine does not share."""
    import torch

    worst, at = 0.0, 0
    for step, found, recorded in pairs:
        if not bool(((found == recorded) | (found.isnan() & recorded.isnan())).all()):  # on_nan: record writes NaN down
            off = float((found.double() - recorded.double()).abs().max() / max(float(recorded.double().abs().max()), 1e-12))
            off = math.inf if math.isnan(off) else off
            if off > worst:
                worst, at = off, step
    if worst == 0.0:
        return Check(name, "exact", f"{what}: the same bits at all {len(pairs)} places")
    here = {"device": "cpu", "torch": torch.__version__}
    there = run.attributes["environment"]
    differing = [f"{key} {there[key]} there, {here[key]} here" for key in here if there[key] != here[key]]
    allowed = REPLAY_TOLERANCE[run.attributes["model"]["dtype"]]
    if differing and worst <= allowed:
        return Check(
            name,
            "within tolerance",
            f"{what}: within {worst:.2g} of its greatest value at step {at} ({'; '.join(differing)}); {allowed:g} is allowed",
        )
    return Check(name, "failed", f"{what}: off by {worst:.2g} of its greatest value at step {at}")


def _torch(run: Run, value: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(value)).to(getattr(torch, run.attributes["model"]["dtype"]))


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m probe.verify", description=__doc__)
    made.add_argument("run", nargs="?", default="latest", help="a recording: a path, the beginning of its name, or latest")
    made.add_argument("--runs", default="runs", help="folder of recordings [runs]")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    run = open_run(options.run, options.runs)
    print(f"{run.name} ({run.status})")
    found = verify(run)
    for check in found:
        print(f"  {check.name:10} {check.verdict:17} {check.detail}")
    return 1 if any(check.verdict == "failed" for check in found) else 0


if __name__ == "__main__":
    guarded(main)
