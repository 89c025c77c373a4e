"""How far runs are apart: at the same noise level, whatever their schedulers' steps and scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from tiny_runs import take

import probe
from probe.dashboard.views.compare import asked_differently, snippet
from probe.errors import ExperimentError
from probe.figures.distance import distances, figure, said
from probe.reading.distances import distance, matched, parting
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording


@pytest.fixture(scope="module")
def pair() -> dict[str, Run]:
    return {name: probe.open_run(name) for name in ("sample", "sample-guidance-8")}


def test_noise_levels_are_matched_by_their_logarithm() -> None:
    ten = np.array([10.0, 1.0, 0.1])
    assert matched(ten, ten).tolist() == [0, 1, 2]
    assert matched(ten, np.array([0.11, 0.9])).tolist() == [-1, 1, 0], "10 is in one run alone"
    assert matched(np.array([np.inf, 2.0, 0.0]), np.array([0.0, 2.1, np.inf])).tolist() == [2, 1, 0]
    assert matched(np.array([3.0]), np.array([])).tolist() == [-1]
    twice, once = np.array([4.0, 2.0, 2.0, 1.0, 1.0]), np.array([4.0, 2.0, 1.0])
    assert matched(twice, twice).tolist() == [0, 1, 2, 3, 4], "Heun calls twice at a level"
    assert matched(twice, once).tolist() == [0, 1, 1, 2, 2]
    assert matched(once, twice).tolist() == [0, 1, 3]


def test_a_distance_is_the_root_mean_square(pair: dict[str, Run]) -> None:
    one, two = pair.values()
    far = distance(one, two)
    by_hand = one.latents.isel(image=0).values - two.latents.isel(image=0).values
    np.testing.assert_allclose(far, np.sqrt((by_hand**2).mean(axis=(1, 2, 3))), rtol=1e-5)
    assert far[0] == 0 and far[-1] > 0.1, "one noise to begin with"
    assert not distance(one, one).any() and not distance(one, one, of="denoised").any()
    clean = one.denoised().isel(image=0) - two.denoised().isel(image=0)
    wanted = np.sqrt((clean.astype("float32") ** 2).mean(("channel", "y", "x")))
    np.testing.assert_allclose(distance(one, two, of="denoised"), wanted, rtol=1e-5)


def test_two_schedulers_are_compared_on_one_scale(tmp_path: Path) -> None:
    """Euler's latents are sqrt(1 + sigma^2) times as large as DPM++'s at the same noise."""
    one, two = (take(tmp_path, scheduler=name, steps=3) for name in ("DPM++2M", "Euler"))
    assert two.attributes.latent_convention == "variance_exploding"
    sigma = two.variable("sigma").values
    assert abs(np.log(sigma[0] / one.variable("sigma").values[0])) < 0.2
    far = distance(two, one)
    assert np.isfinite(far[0]) and far[0] < 0.2, "nearly the same noise, nearly one scale"
    assert float(np.abs(two.latents[0].values).max()) > 10


def test_latents_of_two_sizes_are_refused(tmp_path: Path, pair: dict[str, Run]) -> None:
    small = Run(synthetic_recording(tmp_path / "small.zarr"))
    with pytest.raises(ExperimentError, match="The latents of small are 4 x 8 x 8"):
        distance(small, pair["sample"])
    found = distances({"small": small, **pair})
    assert not found.far and len(found.left_out) == 2


def test_runs_part_where_the_threshold_is_passed(pair: dict[str, Run]) -> None:
    far = xr.DataArray([0, 0.1, 0.4, 0.3], dims="step", coords={"step": [0, 2, 4, 6]})
    assert parting(far, 0.3) == 4 and parting(far, 0.5) is None
    assert parting(far, xr.DataArray([0, 0.05, 1, 1], dims="step")) == 2
    (sentence,) = said(distances(pair))
    assert sentence == (
        "sample-guidance-8 parts from sample at step 4 (sigma 4.12): there it is more than 50% of "
        "its greatest distance (0.352) away."
    )
    again = distances({"one": pair["sample"], "same": pair["sample"]})
    assert said(again) == ["same is the same as one at every step."]


def test_other_seeds_give_the_threshold(pair: dict[str, Run]) -> None:
    one, two = pair.values()
    found = distances(pair, {"a": two, "b": two})
    assert found.spread is not None and found.spread.sizes["seed"] == 2
    assert "of the mean distance of 2 other seeds" in said(found)[0]
    names = [trace.name for trace in figure(found).data]
    assert names[1:3] == ["2 other seeds, least to most", "threshold: 50% of their mean"]
    assert [trace.name for trace in figure(distances(pair)).data] == ["sample-guidance-8"]
    hostile = distances({"one": one, "<b>two</b>": two})
    assert figure(hostile).data[0].name == "&lt;b&gt;two&lt;/b&gt;"


def test_what_was_asked_differently_is_listed(pair: dict[str, Run]) -> None:
    rows = {row["setting"]: row for row in asked_differently(pair)}
    assert rows["guidance_scale"] == {
        "setting": "guidance_scale",
        "sample": "3.0",
        "sample-guidance-8": "8.0",
    }
    assert "output" not in rows and not any("{" in row["sample"] for row in rows.values())


def test_the_snippet_gives_the_distances(pair: dict[str, Run]) -> None:
    one, two = pair.values()
    *before, last = snippet(one, two, "latents").split("\n")
    scope: dict[str, object] = {}
    exec("\n".join(before), scope)
    xr.testing.assert_identical(eval(last, scope), distance(one, two))
