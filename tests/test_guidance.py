"""Guidance read again from a recording: its curves, and the step's own estimate at any scale.

At the recorded scale the estimate has to be the recorded one. It is not always so to the bit: a
model in float16 rounded the difference, the product and the sum of guidance to 11 bits each, and
here they are float32. `bound` follows from that, and the noise level carries it into x0.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from parity import product
from PIL import Image
from recordings import recording
from tiny_runs import take

import probe
from probe import analysis
from probe.diffusion.guidance import guide
from probe.errors import ExperimentError, RecordingNotFound
from probe.figures import guidance as figures
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALL: dict[str, Any] = {"capture": {"attention": "off", "text": False, "statistics": False}}
DIMS = ("image", "channel", "y", "x")


@pytest.fixture(scope="module")
def sample() -> Run:
    return probe.open_run("sample")


def bound(run: Run, unit: float) -> xr.DataArray:
    """How far the estimates may be apart at each place, by the roundings of the run."""
    scale, rescale = run.experiment.guidance
    uncond, cond = (run.prediction(branch).astype("float64") for branch in ("uncond", "cond"))
    guided = np.abs(run.prediction().astype("float64"))
    apart = unit * (2 * scale * np.abs(cond - uncond) + guided)
    if rescale:  # three products more, and two standard deviations, of values of the same size
        apart = 4 * apart + 8 * unit * (guided + np.abs(guided).max())
    alpha_bar = run.variable("alpha_bar").isel(step=run.steps)
    lever = (1 - alpha_bar) ** 0.5
    if run.attributes.prediction_type == "epsilon":
        lever = lever / alpha_bar**0.5
    return 1.01 * lever * apart + 4 * UNIT[torch.float32] * (1 + np.abs(run.denoised())) * 16


@pytest.mark.parametrize(
    ("dtype", "prediction", "scheduler", "rescale"),
    product(tuple(UNIT), ("epsilon", "v_prediction"), ("DDIM", "Euler"), (0.0, 0.7)),
)
def test_at_the_recorded_scale_it_is_the_recorded_estimate(
    dtype: torch.dtype, prediction: str, scheduler: str, rescale: float, tmp_path: Path
) -> None:
    run = take(
        tmp_path,
        tiny.pipeline(prediction).to(dtype),
        scheduler=scheduler,
        guidance_scale=7.3,
        guidance_rescale=rescale,
        images=2,
        **SMALL,
    )
    recorded = run.denoised()
    again = run.denoised(guidance_scale=7.3)
    assert recorded.dims == again.dims and np.isfinite(recorded.values).all()
    assert (np.abs(again - recorded) <= bound(run, UNIT[dtype])).all()
    other = run.denoised(guidance_scale=5)
    assert not (np.abs(other - recorded) <= bound(run, UNIT[dtype])).all()


def test_in_float32_without_rescale_every_bit_is_the_recorded_one(sample: Run) -> None:
    scale = sample.experiment.guidance_scale
    assert sample.denoised(guidance_scale=scale).equals(sample.denoised())
    alone = sample.denoised(guidance_scale=1)
    assert np.allclose(alone, sample.denoised("cond"), atol=1e-5)
    assert sample.denoised(guidance_scale=0).equals(sample.denoised("uncond"))


def test_numpy_guides_as_torch_does() -> None:
    draw = np.random.default_rng(0)
    uncond, cond = draw.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
    for scale in (0.0, 1.0, 7.5, 20.0):
        found = analysis.guided(
            xr.DataArray(uncond, dims=DIMS), xr.DataArray(cond, dims=DIMS), scale
        )
        torchs = guide(torch.from_numpy(uncond), torch.from_numpy(cond), scale).numpy()
        assert np.array_equal(found.values, torchs)
        rescaled = analysis.guided(
            xr.DataArray(uncond, dims=DIMS), xr.DataArray(cond, dims=DIMS), scale, 0.7
        )
        torchs = guide(torch.from_numpy(uncond), torch.from_numpy(cond), scale, 0.7).numpy()
        assert np.allclose(rescaled.values, torchs, rtol=1e-5, atol=1e-5)
        assert not np.allclose(rescaled.values, found.values, atol=1e-3) or scale == 1


def test_a_choice_of_steps_gives_the_same_values(sample: Run) -> None:
    every = sample.denoised(guidance_scale=8)
    for steps in (6, [0, 3, 19], slice(2, 5), "0,-1"):
        some = sample.denoised(guidance_scale=8, steps=steps)
        assert some.equals(every.sel(step=some["step"].values))
    assert sample.denoised(steps=6).equals(sample.denoised().isel(step=[6]))
    with pytest.raises(RecordingNotFound, match="has no latents of step 20"):
        sample.denoised(steps=20)


def test_a_scale_needs_both_branches(sample: Run, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="takes both branches"):
        sample.denoised("cond", guidance_scale=3)
    with pytest.raises(ExperimentError, match="no number"):
        sample.denoised(guidance_scale="3")  # type: ignore[arg-type]
    bare = Run(synthetic_recording(tmp_path / "bare.zarr", guidance_scale=1.0))
    with pytest.raises(RecordingNotFound, match="ran without guidance"):
        bare.denoised(guidance_scale=3)


def test_the_curves_are_what_their_names_say(sample: Run) -> None:
    uncond, cond = (sample.prediction(branch) for branch in ("uncond", "cond"))
    curves = analysis.guidance_curves(uncond, cond, sample.prediction())
    assert set(curves.data_vars) == {"difference", "cosine", "uncond", "cond", "guided"}
    for step in (0, 7, 19):
        u, c, g = (
            values.values[step, 0].astype(np.float64).ravel()
            for values in (uncond, cond, sample.prediction())
        )
        expected = {
            "difference": np.linalg.norm(c - u) / np.sqrt(u.size),
            "cosine": c @ u / np.linalg.norm(c) / np.linalg.norm(u),
            "uncond": np.linalg.norm(u) / np.sqrt(u.size),
            "cond": np.linalg.norm(c) / np.sqrt(u.size),
            "guided": np.linalg.norm(g) / np.sqrt(u.size),
        }
        found = {name: float(curves[name][step, 0]) for name in expected}
        assert found == pytest.approx(expected, rel=1e-9)
    same = analysis.guidance_curves(cond, cond, cond)
    assert np.all(same["difference"] == 0) and np.allclose(same["cosine"], 1)
    zeros = analysis.guidance_curves(cond * 0, cond, cond)
    assert np.isnan(zeros["cosine"]).all()


def test_several_scales_are_a_dimension_in_front(sample: Run) -> None:
    scales = [0.0, 3.0, 7.3]
    several = sample.denoised(guidance_scale=scales, steps=[2, 6])
    assert several.dims == ("guidance_scale", *sample.latents.dims)
    for scale in scales:
        one = sample.denoised(guidance_scale=scale, steps=[2, 6])
        assert np.array_equal(several.sel(guidance_scale=scale).values, one.values)
    with pytest.raises(ExperimentError, match="no number"):
        sample.denoised(guidance_scale=[1.0, float("nan")])


# --- figures -------------------------------------------------------------------------------------


def test_pictures_are_what_the_snippet_yields(sample: Run) -> None:
    pictures = figures.estimates(sample, 6, [5.0, 3.0])
    codes = figures.snippets(sample, 6, 5.0)
    found: dict[str, Any] = {}
    exec(codes["picture"], found)
    assert np.array_equal(found["picture"].values, pictures[0])
    assert np.array_equal(pictures[1], sample.preview().sel(step=6).isel(image=0).values)
    exec(codes["curves"], found)
    shown = figures.curves_of(sample)
    for name in shown.data_vars:
        assert np.array_equal(found["curves"][name].values, shown[name].values)


def test_the_csv_holds_the_curves(sample: Run) -> None:
    shown = figures.curves_of(sample)
    lines = figures.csv_of(shown).splitlines()
    names = ["step", "sigma", "difference", "cosine", "uncond", "cond", "guided"]
    assert lines[0].split(",") == names and len(lines) == 21
    row = [float(value) for value in lines[8].split(",")]
    expected = [7, *(float(shown[name].values[7]) for name in names[1:])]
    assert row == pytest.approx(expected, rel=1e-8)


def test_a_strip_frames_the_recorded_scale_and_says_the_magnification(sample: Run) -> None:
    scales = figures.scales_of(sample)
    assert scales == [0, 1, 3, 5, 8, 12]
    html = figures.strip(figures.estimates(sample, 6, scales), scales, 3.0)
    frames = [cell.count("solid #D55E00") for cell in html.split("<figure")[1:]]
    assert frames == [0, 0, 1, 0, 0, 0] and "scale 3, as recorded" in html
    assert html.count("image-rendering:pixelated") == 6 and "8 x 8 pixels" in html
    codes = re.findall(r"base64,([^']+)'", html)
    first = np.asarray(Image.open(io.BytesIO(base64.b64decode(codes[0]))))
    assert np.array_equal(first, figures.estimates(sample, 6, [0.0])[0])
    assert figures.magnification(np.zeros((300, 64, 3)), 256) == 1


def test_what_is_missing_is_named(sample: Run, tmp_path: Path) -> None:
    assert figures.missing(sample) is None and figures.has_preview(sample)
    bare = Run(synthetic_recording(tmp_path / "bare.zarr", guidance_scale=1.0))
    absent = figures.missing(bare)
    assert absent is not None and "guidance_scale" in absent.cause
    assert "--guidance-scale 3" in absent.remedy
    little = figures.missing(Run(recording(tmp_path / "little.zarr")))
    assert little is not None and "latents/prediction_uncond" in little.cause
    with_odd_scale = Run(synthetic_recording(tmp_path / "odd.zarr", guidance_scale=7.3))
    assert 7.3 in figures.scales_of(with_odd_scale)
