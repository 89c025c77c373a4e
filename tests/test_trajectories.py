"""Paths of latents as numbers: principal components, random walks, neighbours kept, UMAP's maps."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe import analysis
from probe.analysis.trajectories import compared_neighbours
from probe.errors import ExperimentError, UserError
from probe.figures.plots import plain, step_text
from probe.figures.trajectories import explained, path_map, table
from probe.testing.synthetic import synthetic_recording

NO_UMAP = "it is not installed: pip install 'diffusion-probe[umap]'"


def points_of(values: np.ndarray, runs: int = 1) -> xr.DataArray:
    """Return values (point, feature) as the points of runs of one length, one after the other."""
    steps = len(values) // runs
    along = {
        "run": ("point", np.repeat([f"run {index}" for index in range(runs)], steps)),
        "step": ("point", np.tile(np.arange(steps), runs)),
        "sigma": ("point", np.tile(np.geomspace(10, 0.1, steps), runs)),
    }
    return xr.DataArray(values, along, ("point", "feature"))


@pytest.fixture
def cloud() -> xr.DataArray:
    return points_of(np.random.default_rng(0).standard_normal((40, 30)).cumsum(axis=0), runs=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[probe.Run]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        probe.open_run(
            str(synthetic_recording(folder / f"cat-{seed}.zarr", steps=8, images=2, seed=seed))
        )
        for seed in (1, 2)
    ]


# --- principal components -------------------------------------------------------------------------


def test_components_are_those_of_the_singular_values(cloud: xr.DataArray) -> None:
    found = analysis.pca(cloud, 3)
    centred = cloud.values - cloud.values.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found["explained"], (sizes**2 / (sizes**2).sum())[:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(found["position"]), np.abs(left * sizes)[:, :3], atol=1e-4)
    position = found["position"].values
    assert (position[np.abs(position).argmax(axis=0), range(3)] > 0).all()
    assert analysis.pca(cloud.isel(point=slice(4)), 10).sizes["component"] == 3


@pytest.mark.parametrize(("values", "what"), [(2, "2 points"), (np.nan, "not finite")])
def test_what_makes_no_path_is_said(values: float, what: str, cloud: xr.DataArray) -> None:
    wrong = cloud.isel(point=slice(2)) if values == 2 else cloud.where(cloud["step"] != 3)
    with pytest.raises(ExperimentError, match=what):
        analysis.pca(wrong)


def test_a_random_walk_explains_what_its_theory_says() -> None:
    """Shares as 1 / (1 - cos(pi k / n)), positions as cosines: arXiv:1806.08805."""
    count, features = 60, 20_000
    points = points_of(np.zeros((count, features), np.float32))
    points.values[:, 0] = np.arange(count)  # steps of size 1
    walks = analysis.random_walks(points, components=4, walks=3, seed=7)
    shares = 1 / (1 - np.cos(np.pi * np.arange(1, count) / count))
    expected = (shares / shares.sum())[:4]
    np.testing.assert_allclose(walks["explained"], np.tile(expected, (3, 1)), rtol=0.05)
    np.testing.assert_allclose(expected, 6 / (np.pi * np.arange(1, 5)) ** 2, rtol=0.02)
    for component in (1, 2, 3):
        wave = np.cos(np.pi * component * (np.arange(count) + 0.5) / count)
        of_walk = walks["position"].values[:, component - 1]
        assert abs(np.corrcoef(wave, of_walk)[0, 1]) > 0.99
    straight = analysis.pca(points)["explained"].values
    assert straight[0] > 0.999 > walks["explained"].values.max(), "a straight path is no walk"


def test_walks_keep_starts_and_sizes_of_steps_and_obey_their_seed(cloud: xr.DataArray) -> None:
    from probe.analysis.trajectories import _walk

    values = cloud.values.astype(np.float32)
    walked = _walk(cloud, values, 3)
    for rows in (slice(0, 20), slice(20, 40)):
        np.testing.assert_array_equal(walked[rows][0], values[rows][0])
        sizes = [np.linalg.norm(np.diff(one[rows], axis=0), axis=1) for one in (walked, values)]
        np.testing.assert_allclose(*sizes, rtol=1e-5)
    first, again = (analysis.random_walks(cloud, walks=3, seed=5) for _ in range(2))
    xr.testing.assert_identical(first, again)
    second = analysis.random_walks(cloud, walks=2, seed=6)
    np.testing.assert_array_equal(first["explained"][1:], second["explained"])


# --- neighbours -----------------------------------------------------------------------------------


def test_a_map_that_keeps_all_keeps_all(cloud: xr.DataArray) -> None:
    perfect = cloud.rename(feature="axis")
    kept = analysis.preservation(cloud, perfect, 5)
    assert kept["kept"] == kept["kept_within"] == kept["trustworthiness"] == 1
    assert kept["by_chance"] == 5 / 39 and kept["within_by_chance"] == 5 / 19
    noise = perfect.copy(data=np.random.default_rng(1).standard_normal(perfect.shape))
    blind = analysis.preservation(cloud, noise, 5)
    assert abs(blind["kept"] - blind["by_chance"]) < 0.08
    with pytest.raises(ExperimentError, match="map has 10 points"):
        analysis.preservation(cloud, perfect.isel(point=slice(10)))


def test_trustworthiness_is_that_of_scikit_learn(cloud: xr.DataArray) -> None:
    manifold = pytest.importorskip("sklearn.manifold", reason=NO_UMAP)
    flat = analysis.pca(cloud, 2)["position"].rename(component="axis")
    expected = manifold.trustworthiness(cloud.values, flat.values, n_neighbors=7)
    assert analysis.preservation(cloud, flat, 7)["trustworthiness"] == pytest.approx(expected)


def test_at_most_half_of_the_others_are_compared() -> None:
    assert [compared_neighbours(count, 15) for count in (3, 5, 20, 40)] == [1, 2, 9, 15]


# --- recordings as points -------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["latents", "denoised"])
def test_every_step_of_every_run_is_a_point(of: str, runs: list[probe.Run]) -> None:
    points = probe.trajectories(runs, of=of, image=1)
    assert points.sizes == {"point": 16, "feature": 4 * 8 * 8}
    recorded = runs[1].denoised() if of == "denoised" else runs[1].latents
    expected = recorded.isel(image=1, step=3).transpose("channel", "y", "x").values.ravel()
    np.testing.assert_allclose(points.values[8 + 3], expected, rtol=1e-6)
    assert points["run"].values[11] == "cat-2" and int(points["step"][11]) == 3
    assert float(points["sigma"][11]) == float(runs[1].variable("sigma")[3])


def test_latents_of_another_convention_come_on_the_same_scale(
    runs: list[probe.Run], tmp_path: Path
) -> None:
    path = shutil.copytree(runs[0].path, tmp_path / "exploding.zarr")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["latent_convention"] = "variance_exploding"
    (path / "zarr.json").write_text(json.dumps(root))
    points = probe.trajectories([runs[0], probe.open_run(str(path))])
    kept, exploding = points.values[:8], points.values[8:]
    scale = (points["sigma"].values[:8, None] ** 2 + 1) ** 0.5
    np.testing.assert_allclose(exploding * scale, kept, rtol=1e-5)


def test_two_runs_of_one_name_stay_two(runs: list[probe.Run], tmp_path: Path) -> None:
    twin = probe.open_run(str(shutil.copytree(runs[0].path, tmp_path / "cat-1.zarr")))
    points = probe.trajectories([runs[0], twin])
    assert list(dict.fromkeys(points["run"].values)) == ["cat-1", "cat-1 (2)"]


def test_runs_without_a_common_space_are_refused(runs: list[probe.Run], tmp_path: Path) -> None:
    wide = synthetic_recording(tmp_path / "wide.zarr", size=(8, 12))
    short = synthetic_recording(tmp_path / "short.zarr", steps=2)
    for others, said in (
        ([*runs, probe.open_run(str(wide))], "no common space"),
        ([probe.open_run(str(short))], "2 steps, and a path has 3"),
        ([], "not some recordings"),
    ):
        with pytest.raises(ExperimentError, match=said):
            probe.trajectories(others)
    with pytest.raises(ExperimentError, match="no image 2"):
        probe.trajectories(runs, image=2)
    with pytest.raises(ExperimentError, match="no choice"):
        probe.trajectories(runs, of="noise")


# --- figures --------------------------------------------------------------------------------------


def test_a_map_has_a_line_and_three_marks_for_each_run(cloud: xr.DataArray) -> None:
    hostile = cloud.assign_coords(run=("point", np.repeat(['<b>a</b> <a href="x">', "two"], 20)))
    flat = analysis.pca(hostile, 2)["position"].values
    figure = path_map(hostile, flat, ("one", "two"), step=6)
    assert [trace.name for trace in figure.data[:4]] == [
        '&lt;b&gt;a&lt;/b&gt; &lt;a href="x"&gt;',
        "first step",
        "last step",
        "chosen step",
    ]
    line, first, last, chosen = figure.data[:4]
    np.testing.assert_array_equal(np.transpose([line.x, line.y]), flat[:20])
    for mark, row in ((first, 0), (last, 19), (chosen, 6)):
        np.testing.assert_array_equal([*mark.x, *mark.y], flat[row])
    assert "step 6 (7th of 20)" in line.text[6] and "<b>" not in line.text[6]
    looks = {(t.line.color, t.line.dash) for t in figure.data if t.mode == "lines+markers"}
    assert len(looks) == 2 and figure.layout.yaxis.scaleanchor == "x"
    unnumbered = path_map(hostile, flat, step=99, small=True)
    assert not unnumbered.layout.xaxis.showticklabels and not len(unnumbered.data[3].x)


def test_no_two_of_42_runs_look_alike() -> None:
    points = points_of(np.random.default_rng(0).standard_normal((126, 4)), runs=42)
    figure = path_map(points, points.values[:, :2])
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len({(t.line.color, t.line.dash, t.marker.symbol) for t in lines}) == 42


def test_the_band_of_walks_goes_from_least_to_greatest() -> None:
    walks = np.array([[0.6, 0.2], [0.7, 0.1]])
    bars, band = explained(np.array([0.8, 0.1]), walks).data
    np.testing.assert_allclose(bars.y, [0.8, 0.1])
    np.testing.assert_allclose(band.y - band.error_y.array, [0.6, 0.1])
    np.testing.assert_allclose(band.y + band.error_y.array, [0.7, 0.2])


def test_rows_for_a_spreadsheet_compute_nothing(cloud: xr.DataArray) -> None:
    hostile = cloud.assign_coords(run=("point", np.repeat(["=1+1", "two"], 20)))
    lines = table(hostile, pca=cloud.values[:, :2]).splitlines()
    assert lines[0] == "run,step,sigma,pca_0,pca_1" and len(lines) == 41
    assert lines[1].startswith("'=1+1,0,10.0,") and lines[40].startswith("two,19,")


def test_steps_are_said_in_one_way() -> None:
    said = [step_text(step, 30) for step in (0, 1, 2, 6, 10, 20, 21)]
    assert [text.split("(")[1] for text in said] == [
        f"{place} of 30)" for place in ("1st", "2nd", "3rd", "7th", "11th", "21st", "22nd")
    ]
    assert plain("a\n<i>&") == "a &lt;i&gt;&amp;"


# --- UMAP -----------------------------------------------------------------------------------------


def test_where_umap_is_missing_its_name_is_said(
    cloud: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match=r"pip install 'diffusion-probe\[umap\]'"):
        analysis.umap_map(cloud)
    with pytest.raises(ExperimentError, match="aligned with nothing"):
        analysis.aligned_map(cloud.isel(point=slice(20)))
    with pytest.raises(ExperimentError, match="3 points are too few"):
        analysis.umap_map(cloud.isel(point=slice(3)))


def test_steps_are_aligned_by_their_noise_level() -> None:
    from probe.analysis.trajectories import _same_level

    assert _same_level(np.array([9.0, 3, 1]), np.array([9.0, 3, 1])) == {0: 0, 1: 1, 2: 2}
    pairs = _same_level(np.array([np.inf, 1.0]), np.array([50, 8.0, 1.1, 0.2]))
    assert pairs == {0: 0, 1: 2}


def test_a_path_in_pieces_gets_more_neighbours() -> None:
    from probe.analysis.trajectories import _in_one_piece

    line = np.arange(8.0)[:, None]
    assert _in_one_piece(line, 2) == 2 and _in_one_piece(line, 5) == 5
    assert _in_one_piece(np.where(line < 4, line, line + 1000), 2) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)  # UMAP compiles itself
def test_maps_by_umap_keep_neighbours_and_obey_their_seed(tmp_path: Path) -> None:
    pytest.importorskip("umap", reason=NO_UMAP)
    threads = torch.get_num_threads()
    draw = np.random.default_rng(2)
    steps = draw.standard_normal((3, 12, 64)) * 0.5
    far_apart = 20 * draw.standard_normal((3, 1, 64)) + steps.cumsum(axis=1)
    far_apart[1, 6:] += 300  # a path in two pieces
    points = points_of(far_apart.reshape(36, 64), 3)
    for make in (analysis.umap_map, analysis.aligned_map):
        first, other = (make(points, 5, seed) for seed in (0, 1))
        assert not np.array_equal(first, other), "another seed draws another map"
        kept = analysis.preservation(points, first, 5)
        assert kept["kept_within"] > 0.2 + kept["within_by_chance"], make
        np.save(tmp_path / f"{make.__name__}.npy", first.values)
    assert analysis.preservation(points, analysis.umap_map(points, 5), 5)["kept"] > 0.5
    assert torch.get_num_threads() == threads
    (tmp_path / "points").write_bytes(pickle.dumps(points))
    again = """
import pickle, sys, numpy as np; from pathlib import Path; from probe import analysis
place = Path(sys.argv[1])
points = pickle.loads((place / "points").read_bytes())
for make in (analysis.umap_map, analysis.aligned_map):
    before = np.load(place / f"{make.__name__}.npy")
    np.testing.assert_array_equal(make(points, 5, 0).values, before)
"""
    subprocess.run([sys.executable, "-c", again, str(tmp_path)], check=True)
