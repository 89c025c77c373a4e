"""Reading latents, a part of `Run`: as recorded, and what follows from them.

    run.latents, run.prediction("cond")      # (step, image, channel, y, x), committed steps only
    run.denoised()                           # the clean latents that each step expects
    run.denoised(guidance_scale=8, steps=6)  # what step 6 alone would say at scale 8
    run.preview()                            # the same as small pictures

Noise, velocity and clean latents (eps, v, denoised) are not stored. They are computed from the
latents and predictions when they are read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from probe import analysis
from probe.arguments import branch_name, labelled, truth_value
from probe.conversions import (
    UNCLIPPED,
    clipping,
    clipping_text,
    denoised_from,
    eps_from,
    v_from,
    variance_preserving,
)
from probe.conversions import clipped as clip
from probe.errors import ExperimentError, RecordingNotFound
from probe.format.attributes import Attributes
from probe.reading.choice import Indices, chosen_positions, slice_of
from probe.reading.files import refuse

if TYPE_CHECKING:
    from probe.settings.recipe import Recipe


class Latents:
    """What a `Run` can do with latents."""

    if TYPE_CHECKING:  # what a Run has

        @property
        def path(self) -> Path: ...
        @property
        def name(self) -> str: ...
        @property
        def attributes(self) -> Attributes: ...
        @property
        def tree(self) -> xr.DataTree: ...
        @property
        def steps(self) -> np.ndarray: ...
        @property
        def recipe(self) -> Recipe: ...
        def variable(self, path: str) -> xr.DataArray: ...

    @property
    def latents(self) -> xr.DataArray:
        """Return what went into each call of the model.

        *Shape:* (step, image, channel, y, x). A noising has `draw` in the place of `image`.
        """
        return self._latent("latents")

    def prediction(self, branch: str | None = None) -> xr.DataArray:
        """Return the model's output for `branch`, or what the scheduler got (None).

        *Shape:* as latents. `branch` is "cond" or "uncond". Raises RecordingNotFound.
        """
        _check_branch(branch)
        return self._latent("prediction" if branch is None else f"prediction_{branch}")

    def eps(self, branch: str | None = None) -> xr.DataArray:
        """Return the predicted noise. *Shape:* as latents."""
        return self._derive(eps_from, branch, "eps")

    def v(self, branch: str | None = None) -> xr.DataArray:
        """Return the predicted velocity. *Shape:* as latents."""
        return self._derive(v_from, branch, "v")

    def denoised(
        self,
        branch: str | None = None,
        clipped: bool = False,
        *,
        guidance_scale: float | Sequence[float] | None = None,
        steps: Indices | str = slice(None),
    ) -> xr.DataArray:
        """Return the predicted clean latents x0. *Shape:* as latents.

        With `guidance_scale` they are what each step alone would say at that scale, computed from
        both recorded branches; several are a dimension in front. `steps` are indices of model
        calls, or text as in capture.steps.

        Some schedulers limit x0 before they go on. The values are those before that, or with
        `clipped` those after; the attributes say so if the two differ.

        At alpha_bar 0 there is no signal, and predicted noise says nothing of x0 (Lin et al. 2023,
        arXiv:2305.08891). The attribute `not_defined_at_step` lists these steps. Raises
        RecordingNotFound, RecordingDamaged, ExperimentError.
        """
        truth_value("clipped", clipped)
        at = chosen_positions(
            self.name, self.steps.tolist(), steps, self.variable("committed").size, "latents"
        )
        denoised = self._derive(denoised_from, branch, "denoised", guidance_scale, at)
        try:
            how = clipping(self.attributes.scheduler.kind, self.attributes.scheduler.config)
        except ValueError as error:
            raise refuse(self.path, f"the scheduler's settings are none ({error})") from error
        notes: dict[str, Any] = {"long_name": "predicted clean latents", "units": "1"}
        if how is not None and clipped:
            axes = [["channel", "y", "x"]]
            limit = functools.partial(clip, how=how)
            limited = xr.apply_ufunc(limit, denoised, input_core_dims=axes, output_core_dims=axes)
            denoised = limited.transpose(*denoised.dims)
            notes["clipped"] = f"x0 as the scheduler goes on with it: {clipping_text(how)}"
        elif how is not None:
            notes["unclipped"] = UNCLIPPED.format(clipping_text(how))
        if len(steps := self.undefined_steps):
            notes["not_defined_at_step"] = [int(step) for step in steps]
        return denoised.assign_attrs(notes)

    @property
    def undefined_steps(self) -> np.ndarray:
        """Return the committed steps at which `denoised` is not defined.

        These are steps without any signal, of a model that predicts noise.
        """
        no_signal = self.variable("alpha_bar").isel(step=self.steps).values == 0
        if self.attributes.prediction_type != "epsilon":
            return self.steps[:0]
        undefined: np.ndarray = self.steps[no_signal]
        return undefined

    def preview(self, latents: xr.DataArray | None = None) -> xr.DataArray:
        """Return latents as small pictures, by the linear map fitted for this VAE.

        *Shape:* (..., channel, y, x) -> (..., y, x, rgb) uint8. None: the latents of `denoised()`.
        """
        if latents is None:
            latents = self.denoised()
        latents = labelled("latents", latents, "channel", "y", "x")
        slope = self.variable("preview/latent_to_rgb").load()
        bias = self.variable("preview/bias").load()
        if latents.sizes["channel"] != slope.sizes["channel"]:
            raise ExperimentError(
                f"latents has {latents.sizes['channel']} channels.",
                f"Give latents of {slope.sizes['channel']} channels.",
            )
        with np.errstate(invalid="ignore"):  # on_nan: record leaves NaN and infinities
            colour: xr.DataArray = xr.dot(
                latents.astype("float32"), slope, dim="channel", optimize=True
            )
        colour = colour + bias
        order = [d for d in latents.dims if d not in ("channel", "y", "x")]
        colour = colour.fillna(0).clip(0, 1) * 255
        return colour.round().astype("uint8").transpose(*order, "y", "x", "rgb")

    # --- inside ---

    def _latent(self, name: str) -> xr.DataArray:
        recorded = self.tree["latents"].data_vars if "latents" in self.tree.children else {}
        if name not in recorded:
            names = ", ".join(map(str, recorded)) or "no latents at all"
            raise RecordingNotFound(
                f"{self.name} has no {name}: it ran without guidance.",
                f"Record with guidance_scale above 1. It has: {names}.",
            )
        return self.variable(f"latents/{name}").isel(step=slice_of(self.steps))

    def _derive(
        self,
        formula: Any,
        branch: str | None,
        name: str,
        guidance_scale: float | Sequence[float] | None = None,
        at: list[int] | None = None,
    ) -> xr.DataArray:
        _check_branch(branch)
        chosen = {"step": slice(None) if at is None else slice_of(np.array(at, int))}
        sigma, alpha_bar = (
            self.variable(path).isel(step=self.steps).isel(chosen)
            for path in ("sigma", "alpha_bar")
        )
        x = self.latents.isel(chosen).astype("float32")
        if self.attributes.latent_convention == "variance_exploding":
            x = variance_preserving(x, sigma)
        if guidance_scale is None:
            prediction = self.prediction(branch).isel(chosen).astype("float32")
        else:
            prediction = self._guided(branch, guidance_scale, chosen)
        derived: xr.DataArray = formula(prediction, x, alpha_bar, self.attributes.prediction_type)
        return derived.astype("float32").transpose(*prediction.dims).rename(name)

    def _guided(self, branch: str | None, scale: Any, chosen: dict[str, Any]) -> xr.DataArray:
        if branch is not None:
            raise ExperimentError(
                f"branch is {branch}, and guidance_scale takes both branches.",
                "Leave out branch, or guidance_scale.",
            )
        uncond, cond = (self.prediction(name).isel(chosen) for name in ("uncond", "cond"))
        return analysis.guided(uncond, cond, scale, self.recipe.guidance[1])


def _check_branch(branch: object) -> None:
    if branch is not None:
        branch_name(branch, "None (what the scheduler got), ")
