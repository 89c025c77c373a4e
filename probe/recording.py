"""Reading recordings: lazily, labelled, and without torch or the model.

    run = open_run("latest")                 # or a path, or the beginning of a run's name
    run.tree                                 # the whole recording, an xarray DataTree
    run.latents, run.denoised()              # (step, image, channel, y, x), only steps that were committed
    run.attention("16x16")                   # (step, token, branch, image, layer, head, y, x) as probabilities

What is derived (eps, v, denoised) is computed from the latents and predictions when it is read.
"""

from __future__ import annotations

import functools
import html
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from probe import sample
from probe.analysis import probabilities, resize, word_maps
from probe.conversions import denoised_from, eps_from, v_from, variance_preserving
from probe.errors import RecordingDamaged, RecordingNotFound
from probe.experiment import Experiment, load_experiment
from probe.recomputed import recomputed
from probe.schema import BRANCHES, FORMAT_VERSION, near
from probe.strict_yaml import printable


@dataclass(frozen=True)
class Run:
    """A recording, opened. Nothing is read until it is asked for. Raises RecordingNotFound or RecordingDamaged."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        _ = self.attributes

    @functools.cached_property
    def attributes(self) -> dict[str, Any]:
        """The recording's attributes: experiment, environment, model, scheduler, status."""
        return root_attributes(self.path)

    @functools.cached_property
    def tree(self) -> xr.DataTree:
        """Everything, lazily, as stock `xarray.open_datatree(path, engine="zarr")` opens it."""
        try:
            return xr.open_datatree(self.path, engine="zarr", chunks=None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordingDamaged(f"{self.path.name} cannot be read: {error}", "Look at its status with probe ls, or record it again.") from error

    @functools.cached_property
    def experiment(self) -> Experiment:
        """What was asked."""
        return load_experiment(self.attributes["experiment"])

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".zarr")

    @property
    def status(self) -> str:
        """complete, interrupted, failed or running; a run whose writer died is interrupted."""
        return _status(root_attributes(self.path))

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Indices of the committed steps."""
        return np.flatnonzero(self.variable("committed").values)

    def variable(self, path: str) -> xr.DataArray:
        """One variable or coordinate, lazily: "latents/latents", "attention/16x16/cross". Raises RecordingNotFound."""
        group, _, name = path.rpartition("/")
        try:
            return self.tree[group or "/"].dataset[name]
        except KeyError as error:
            found = [f"{node.path}/{n}".strip("/") for node in self.tree.subtree for n in node.dataset.data_vars]
            raise RecordingNotFound(f"{self.name} has no variable {path}.", near(path, found)) from error

    # --- latents and what follows from them ---

    @property
    def latents(self) -> xr.DataArray:
        """What went into each call. *Shape:* (step, image, channel, y, x)."""
        return self._latent("latents")

    def prediction(self, branch: str | None = None) -> xr.DataArray:
        """The model's output for `branch` ("cond", "uncond"), or what the scheduler got (None). *Shape:* as latents."""
        return self._latent("prediction" if branch is None else f"prediction_{branch}")

    def eps(self, branch: str | None = None) -> xr.DataArray:
        """The predicted noise."""
        return self._derive(eps_from, branch, "eps")

    def v(self, branch: str | None = None) -> xr.DataArray:
        """The predicted velocity."""
        return self._derive(v_from, branch, "v")

    def denoised(self, branch: str | None = None) -> xr.DataArray:
        """The predicted clean latents x0."""
        return self._derive(denoised_from, branch, "denoised")

    def preview(self, latents: xr.DataArray | None = None) -> xr.DataArray:
        """Clean latents as small pictures, by the linear map fitted for this VAE. *Shape:* (..., y, x, rgb) uint8."""
        latents = self.denoised() if latents is None else latents
        slope, bias = self.variable("preview/latent_to_rgb").load(), self.variable("preview/bias").load()
        colour: xr.DataArray = xr.dot(latents.astype("float32"), slope, dim="channel") + bias
        order = [d for d in latents.dims if d not in ("channel", "y", "x")]
        bright: xr.DataArray = (colour.fillna(0).clip(0, 1) * 255).round().astype("uint8")  # on_nan: record leaves NaN
        return bright.transpose(*order, "y", "x", "rgb")

    @property
    def images(self) -> xr.DataArray:
        """The finished pictures. *Shape:* (image, y, x, rgb) uint8."""
        return self.variable("images/final")

    @property
    def source(self) -> xr.DataArray | None:
        """The picture that an image-to-image run or a noising began from, (y, x, rgb) uint8; None where there was none."""
        return self.variable("source/picture") if "source" in self.tree.children else None

    # --- attention ---

    @property
    def grids(self) -> list[str]:
        """Grids with attention maps, the largest first: ["64x64", "32x32", ...]."""
        if "attention" not in self.tree.children:
            return []
        return sorted(self.tree["attention"].children, key=lambda g: -int(np.prod([int(n) for n in g.split("x")])))

    def attention(self, grid: str | None = None) -> xr.DataArray:
        """Cross-attention maps at one grid (default: the largest), still lazy, in their stored type.

        *Shape:* (step, token, branch, image, layer, head, y, x). Of a pixel's attention, each token's share; use
        `probe.analysis.probabilities` on the values of a `sqrt_u8` recording. Maps of a `queries` recording are computed
        when they are read, in float32; those of a `summary` recording are the mean over heads, with a head axis of 1.
        """
        if not self.grids:
            raise RecordingNotFound(f"{self.name} has no attention maps.", "Record with capture.attention: maps.")
        grid = grid or self.grids[0]
        if grid not in self.grids:
            raise RecordingNotFound(f"{self.name} has no attention maps at {grid}.", near(grid, self.grids))
        group = f"attention/{grid}"
        if "query" in self.tree[group].data_vars:
            maps = recomputed(self.variable(f"{group}/query"), self.variable(f"{group}/key"))
        else:
            maps = self.variable(f"{group}/cross")
        kept = self.variable(f"attention/{grid}/recorded").values.astype(bool) & self.variable("committed").values.astype(bool)
        return maps.isel(step=np.flatnonzero(kept))

    def overview(self) -> xr.DataArray:
        """Where each token was looked at: mean over images, layers of all grids and heads of the last branch.

        *Shape:* (step, token, y, x) float32 on the largest grid. Computed from the maps where a run did not come to it.
        """
        maps = self.attention()
        stored = self.variable(f"attention/{self.grids[0]}/overview").transpose("step", ...).sel(step=maps.step).load()
        if np.isfinite(stored.values).all():
            return stored
        size = (maps.sizes["y"], maps.sizes["x"])
        total = np.zeros((maps.sizes["step"], maps.sizes["token"], *size), np.float32)
        layers = 0
        for grid in self.grids:
            found = self.attention(grid)
            layers += found.sizes["layer"]
            for index in range(found.sizes["step"]):
                one = probabilities(found.isel(step=index, branch=-1).values)
                total[index] += resize(one.mean(axis=(1, 3)).sum(axis=1), size)
        coords = {name: value for name, value in maps.isel(branch=-1).coords.items() if set(value.dims) <= {"step", "token"}}
        return xr.DataArray(total / layers, dims=("step", "token", "y", "x"), coords=coords, name="overview")

    def words(self) -> xr.DataArray:
        """The overview, averaged over steps and merged to words. *Shape:* (word, y, x) float32."""
        labels = self.tree[f"attention/{self.grids[0]}"].dataset.isel(branch=-1)
        return word_maps(self.overview().mean("step"), labels["word"].values, labels["word_index"].values)

    def tokens(self, branch: str = "cond") -> list[str]:
        """The 77 tokens of the prompt, as text."""
        for group in ("text/text_encoder", *(f"attention/{grid}" for grid in self.grids)):
            if group in self.tree.groups or f"/{group}" in self.tree.groups:
                labels = self.variable(f"{group}/token_text")
                if branch in labels["branch"].values:
                    return [str(text) for text in labels.sel(branch=branch).values]
        raise RecordingNotFound(f"{self.name} has no tokens of the {branch} branch.", "Record with capture.text: true.")

    # --- inside ---

    def _latent(self, name: str) -> xr.DataArray:
        if name not in self.tree["latents"].data_vars:
            found = ", ".join(str(n) for n in self.tree["latents"].data_vars)
            raise RecordingNotFound(f"{self.name} has no {name}: it ran without guidance.", f"It has: {found}.")
        return self.variable(f"latents/{name}").isel(step=self.steps)

    def _derive(self, formula: Any, branch: str | None, name: str) -> xr.DataArray:
        if branch not in (None, *BRANCHES):
            raise ValueError(f"branch is {branch!r}; it may be None (guided), 'cond' or 'uncond'")
        root = self.tree.to_dataset().isel(step=self.steps)
        x = self.latents.astype("float32")
        if self.attributes["latent_convention"] == "variance_exploding":
            x = variance_preserving(x, root["sigma"])
        found: xr.DataArray = formula(self.prediction(branch).astype("float32"), x, root["alpha_bar"], self.attributes["prediction_type"])
        return found.astype("float32").rename(name)

    def summary(self) -> dict[str, str]:
        """The run in a few labelled words."""
        asked, at = self.attributes["experiment"], self.attributes["environment"]
        guidance = f", guidance {asked['guidance_scale']:g}" if asked["guidance_scale"] > 1 else ""
        sampling = f"{self.attributes['scheduler']['class']}, {asked['steps']} steps{guidance}, seed {asked['seed']}"
        if asked.get("image"):
            sampling += f", strength {asked['strength']:g}"
        if "noising" in self.attributes:
            sampling = f"no sampling: noised at {asked['steps']} timesteps, {asked['images']} draws of noise, seed {asked['seed']}"
        lines = {
            "prompt": asked["prompt"],
            "negative prompt": asked["negative_prompt"],
            "model": f"{self.attributes['model']['name']} ({self.attributes['model']['dtype']}, {at['device']})",
            "picture": str((self.attributes.get("noising") or {}).get("picture") or asked.get("image") or ""),
            "sampling": sampling,
            "status": f"{self.status}, {len(self.steps)} of {self.tree.sizes['step']} model calls",
            "attention": ", ".join(self.grids) or "none",
            "created": self.attributes["created"],
        }
        return {name: text for name, text in lines.items() if text}

    def __repr__(self) -> str:
        return f"<Run {self.name}>\n" + "\n".join(f"  {name:16}{printable(' '.join(text.split()))}" for name, text in self.summary().items())

    def _repr_html_(self) -> str:
        import base64

        rows = "".join(f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in self.summary().items())
        sheet = self.path / "contact-sheet.png"
        picture = ""
        if sheet.is_file():
            code = base64.b64encode(sheet.read_bytes()).decode()
            picture = f"<img alt='contact sheet' style='max-width:100%' src='data:image/png;base64,{code}'>"
        return f"<b>{html.escape(self.name)}</b><table>{rows}</table>{picture}"


# --- finding ---------------------------------------------------------------------------------------------------------


def root_attributes(path: Path) -> dict[str, Any]:
    """The attributes of a recording, from its root file alone. Raises RecordingNotFound or RecordingDamaged."""
    file = Path(path) / "zarr.json"
    try:
        root = json.loads(file.read_text())
        attributes: dict[str, Any] = root["attributes"]
        version, asked = attributes["format_version"], attributes["experiment"]
        texts = (attributes["status"], attributes["created"], asked["prompt"], asked["negative_prompt"], asked["model"])
        numbers = (asked["steps"], asked["seed"], asked["guidance_scale"])
        if root["zarr_format"] != 3 or not all(isinstance(t, str) for t in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordingNotFound(f"{path} is not a recording.", "probe ls lists the recordings there are.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordingDamaged(f"{path} is damaged: its zarr.json is not that of a recording.", "Record it again, or remove it.") from error
    if version != FORMAT_VERSION:
        raise RecordingDamaged(f"{path} has format {version}, this version reads {FORMAT_VERSION}.", "Use the version of probe that wrote it.")
    return attributes


def _status(attributes: dict[str, Any]) -> str:
    status, writer = str(attributes["status"]), attributes.get("writer")
    if status == "running" and isinstance(writer, dict) and writer.get("host") == socket.gethostname():
        try:
            os.kill(int(writer["pid"]), 0)
        except ProcessLookupError:
            return "interrupted"
        except (PermissionError, ValueError, KeyError, TypeError, OverflowError):
            pass
    return status


def list_runs(folder: str | Path = "runs") -> list[tuple[Path, dict[str, Any] | None]]:
    """Every recording in a folder, the newest first, with its attributes (None for one that is damaged)."""
    found: list[tuple[Path, dict[str, Any] | None]] = []
    if Path(folder).is_dir():
        with os.scandir(folder) as entries:
            paths = [Path(entry.path) for entry in entries if entry.is_dir() and entry.name.endswith(".zarr") and not entry.name.startswith(".")]
        for path in paths:
            try:
                attributes = root_attributes(path)
                found.append((path, {**attributes, "status": _status(attributes)}))
            except (RecordingNotFound, RecordingDamaged):
                found.append((path, None))
    return sorted(found, key=lambda row: (row[1] or {}).get("created", ""), reverse=True)


def find_run(name: str | Path, runs: str | Path = "runs") -> Path:
    """The path of a recording: a path itself, "latest", "sample", or the beginning of a name in `runs`. Raises RecordingNotFound."""
    path = Path(name)
    if (path / "zarr.json").is_file():
        return path
    if str(name) == sample.NAME:
        return sample.unpacked()
    rows = list_runs(runs)
    if not rows:
        raise RecordingNotFound(f"There is no recording in {runs}.", "Make one: python -m probe.run experiments/astronaut.yaml")
    if str(name) == "latest":
        return next((path for path, attributes in rows if attributes), rows[0][0])
    start = str(path.relative_to(runs) if path.is_relative_to(runs) else path)
    found = [row[0] for row in rows if row[0].name.startswith(start)]
    if len(found) == 1:
        return found[0]
    names = [row[0].name.removesuffix(".zarr") for row in rows]
    if not found:
        raise RecordingNotFound(f"No recording in {runs} begins with {str(name)!r}.", near(str(name), names))
    raise RecordingNotFound(f"{len(found)} recordings begin with {str(name)!r}.", f"Say more of the name: {', '.join(p.name for p in found[:4])}.")


def open_run(name: str | Path = "latest", runs: str | Path = "runs") -> Run:
    """Open a recording: a path, the beginning of its name in the folder `runs`, or "latest"."""
    return Run(find_run(name, runs))
