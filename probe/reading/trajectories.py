"""The latents of every step of one run or several, as points in one space.

    points = trajectories([run, other], of="denoised")    # (point, feature)

`probe.analysis` has what is computed of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe.arguments import in_words, one_of, whole_number
from probe.conversions import variance_preserving
from probe.errors import ExperimentError
from probe.format.schema import counted
from probe.reading.recording import Run
from probe.text import printable

OF = ("latents", "denoised")
LONG_NAMES = {
    "latents": "latents that went into each call, their variance kept",
    "denoised": "predicted clean latents",
}
LEAST = 3  # steps of a path


def trajectories(runs: Run | Sequence[Run], of: str = "latents", image: int = 0) -> xr.DataArray:
    """Return each committed step of each run as a point.

    *Shape:* (point, feature) float32; `point` has the coordinates `run` (a name), `step` and
    `sigma`. A feature is one value of the latents, in the order (channel, y, x).

    `of` is "latents", what went into each call of the model, or "denoised", the clean latents that
    it expected at that step. Latents are brought to the scale on which their variance is kept, for
    schedulers differ in theirs. Steps at which `denoised` is not defined are left out.

    Raises ExperimentError for a noising, for fewer than three steps, for latents of different
    shapes, and for values that are not finite.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    one_of("of", of, OF)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise ExperimentError(
            f"runs is {in_words(runs)}, and not some recordings.",
            "Open each: probe.open_run(path).",
        )
    paths = [_path(run, of, whole_number("image", image)) for run in runs]
    shapes = {path.shape[1:]: run.name for path, run in zip(paths, runs, strict=True)}
    if len(shapes) > 1:
        (one, first), (other, second), *_ = shapes.items()
        raise ExperimentError(
            f"Latents of {_by(one)} ({printable(first)}) and of {_by(other)} "
            f"({printable(second)}) lie in no common space.",
            "Give runs whose latents have one shape: the same model, the same size of picture.",
        )
    rows = [path.values.reshape(len(path), -1) for path in paths]
    names = [
        name
        for name, path in zip(unique([r.name for r in runs]), paths, strict=True)
        for _ in range(len(path))
    ]
    return xr.DataArray(
        np.concatenate(rows),
        {
            "run": ("point", np.array(names, dtype=object)),
            "step": ("point", np.concatenate([path["step"].values for path in paths])),
            "sigma": ("point", np.concatenate([path["sigma"].values for path in paths])),
        },
        ("point", "feature"),
        of,
        {"long_name": LONG_NAMES[of], "units": "1"},
    )


def unique(names: Sequence[str]) -> list[str]:
    """Return names of which no two are the same: the second `cat` is `cat (2)`."""
    return [
        name if name not in names[:index] else f"{name} ({names[:index].count(name) + 1})"
        for index, name in enumerate(names)
    ]


def _path(run: Run, of: str, image: int) -> xr.DataArray:
    """Return one run's path, (step, channel, y, x) float32."""
    name = printable(run.name)
    if run.kind != "generation":
        raise ExperimentError(
            f"{name} is a {run.kind}: its noise levels are no path.",
            "Give runs that draw a picture.",
        )
    values = run.denoised() if of == "denoised" else run.latents
    if image >= values.sizes["image"]:
        raise ExperimentError(
            f"{name} has {counted(values.sizes['image'], 'image')}, and no image {image}.",
            f"Give one from 0 to {values.sizes['image'] - 1}.",
        )
    sigma = run.variable("sigma").isel(step=run.steps).values
    values = values.assign_coords(step=run.steps, sigma=("step", sigma))
    if of == "denoised":
        values = values.isel(step=np.isin(run.steps, run.undefined_steps, invert=True))
    path = values.isel(image=image).transpose("step", "channel", "y", "x")
    if path.sizes["step"] < LEAST:
        raise ExperimentError(
            f"{name} has {counted(path.sizes['step'], 'step')}, and a path has {LEAST} or more.",
            "Wait for more steps, or leave this run out.",
        )
    path = path.astype("float32").load()
    if of == "latents" and run.attributes.latent_convention == "variance_exploding":
        path = variance_preserving(path, path["sigma"]).astype("float32")
    if (wrong := ~np.isfinite(path.values).all(axis=(1, 2, 3))).any():
        steps = ", ".join(map(str, path["step"].values[wrong][:5]))
        raise ExperimentError(
            f"{name} has {of} that are not finite, at step {steps}.", "Leave this run out."
        )
    return path


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
