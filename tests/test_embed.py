"""`probe embed` writes whole or not at all, and somebody else's embedding is read with care."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

import probe
from probe import cli, embed
from probe.dashboard.library import Library
from probe.errors import ExperimentError, ProbeError, RecordingDamaged, UserError
from probe.format import embedding as layout
from probe.reading.embedding import attributes_of, changed_since, embeddings_in
from probe.testing.synthetic import synthetic_recording
from probe.writing.embedding import write_embedding


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two recordings and an embedding of them. Not to be changed."""
    folder = tmp_path_factory.mktemp("embed") / "runs"
    for seed in (1, 2):
        synthetic_recording(folder / f"cat-{seed}.zarr", steps=6, seed=seed)
    assert run(folder, "cat-1", "cat-2") == 0
    return folder


def run(folder: Path, *words: str) -> int:
    return embed.main([*words, "--runs", str(folder), "--method", "pca", "--quiet"])


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "runs")


def the_one(folder: Path) -> Path:
    (path,) = embeddings_in(folder)
    return path


def rewritten(path: Path, name: str, change: Any) -> None:
    """Change what a JSON file says."""
    file = path / name
    root = json.loads(file.read_text())
    change(root)
    file.write_text(json.dumps(root))


# --- what is written ------------------------------------------------------------------------------


def test_it_opens_with_stock_xarray_and_says_what_it_is(made: Path) -> None:
    path = the_one(made)
    stock = xr.open_zarr(path, chunks=None)
    assert stock.attrs["kind"] == "embedding" and stock.attrs["of"] == "latents"
    assert stock.attrs["seeds"] == [0, 1, 2] and "numpy" in stock.attrs["versions"]
    runs = [(run["name"], run["steps"]) for run in stock.attrs["runs"]]
    assert runs == [("cat-1", 6), ("cat-2", 6)]
    assert stock["position"].dims == ("map", "point", "axis")
    assert set(layout.VARIABLES) == set(stock.variables)
    for name, variable in stock.variables.items():
        assert variable.attrs["long_name"] and variable.attrs["units"], name
    points = probe.trajectories([probe.open_run(str(made / f"cat-{i}.zarr")) for i in (1, 2)])
    parts = probe.analysis.pca(points)
    np.testing.assert_array_equal(stock["position"][0], parts["position"][:, :2])
    np.testing.assert_allclose(stock["explained"], parts["explained"])
    ours = probe.open_embedding(path)
    for name in stock.variables:
        np.testing.assert_array_equal(ours[name].values, stock[name].values)


def test_the_same_command_writes_the_same_name_and_values(folder: Path) -> None:
    before = probe.open_embedding(path := the_one(folder))
    assert run(folder, "cat-1", "cat-2") == 0 and the_one(folder) == path
    xr.testing.assert_equal(probe.open_embedding(path), before)
    assert run(folder, "cat-1", "cat-2", "--of", "denoised") == 0
    assert run(folder, "cat-2") == 0 and len(embeddings_in(folder)) == 3


def test_it_is_no_recording(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = the_one(folder)
    assert cli.dispatch(["ls", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert "cat-1" in listed and "embedding" not in listed
    assert not any("latents" in row.path.name for _, row in Library(folder).rows())
    assert cli.dispatch(["ls", str(path.parent)]) == 0
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert row.split()[:2] == [path.name.removesuffix(".zarr"), "embedding"]
    assert "pca: latents of 2 runs" in row and "created" in header
    rewritten(path, "zarr.json", lambda root: root["attributes"].update(embedding_version=9))
    assert cli.dispatch(["ls", str(path.parent)]) == 0
    assert "damaged" in capsys.readouterr().out, "one that cannot be read"
    rewritten(path, "zarr.json", lambda root: root["attributes"].update(embedding_version=1))
    assert cli.dispatch(["gc", str(folder)]) == 0 and path.is_dir()
    for read in (probe.open_run, lambda name: cli.dispatch(["verify", name])):
        with pytest.raises(RecordingDamaged, match="is an embedding of recordings"):
            read(str(path))
    with pytest.raises(RecordingDamaged, match="does not say that it is an embedding"):
        probe.open_embedding(folder / "cat-1.zarr")


def test_what_a_killed_writer_left_is_cleared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = the_one(folder)
    left = path.with_name(f".{path.name}.0a1b2c3d.partial")
    shutil.copytree(path, left)
    assert embeddings_in(folder) == [path]
    assert cli.dispatch(["gc", str(folder)]) == 0 and "Removed 1" in capsys.readouterr().out
    assert path.is_dir() and not left.exists()


def test_a_failure_leaves_nothing_and_what_was_there_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, names = the_one(folder), sorted((folder / "embeddings").iterdir())
    before = probe.open_embedding(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probe.writing.files.put_new", full)
    for words in (["cat-1", "cat-2"], ["cat-1"]):
        with pytest.raises(ProbeError, match="No space left"):
            run(folder, *words)
    assert sorted((folder / "embeddings").iterdir()) == names
    xr.testing.assert_identical(probe.open_embedding(path), before)


def test_what_is_no_embedding_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    for place in (folder / "cat-1.zarr", tmp_path / "mine.zarr"):
        place.mkdir(exist_ok=True)
        with pytest.raises(ExperimentError, match="is no embedding"):
            run(folder, "cat-1", "--output", str(place))
    assert len(probe.open_run(str(folder / "cat-1.zarr")).steps) == 6
    with pytest.raises(ExperimentError, match="another ending"):
        run(folder, "cat-1", "--output", str(tmp_path / "maps"))
    assert run(folder, "cat-1", "--output", str(tmp_path / "maps.zarr")) == 0
    with pytest.raises(ExperimentError, match="exists already"):
        write_embedding(tmp_path / "maps.zarr", {}, {})


def test_what_cannot_be_computed_is_said_before_anything_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("probe.embed.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'diffusion-probe\[umap\]'"):
        embed.main(["cat-1", "cat-2", "--runs", str(folder), "--method", "umap"])
    assert embed.chosen_methods(None, 2) == ["pca"] and "[umap]" in capsys.readouterr().err
    monkeypatch.setattr("probe.embed.importlib.util.find_spec", lambda _: "there")
    assert embed.chosen_methods(None, 2) == ["pca", "umap", "aligned"]
    assert embed.chosen_methods(None, 1) == ["pca", "umap"]
    assert embed.chosen_methods(["umap"], 1) == ["pca", "umap"]
    with pytest.raises(ExperimentError, match="aligned with nothing"):
        embed.main(["cat-1", "--runs", str(folder), "--method", "aligned"])
    with pytest.raises(ExperimentError, match="neighbours is 1"):
        run(folder, "cat-1", "--neighbours", "1")
    for words in (["--seeds", "0,x"], ["--of", "noise"]):
        with pytest.raises(SystemExit):
            run(folder, "cat-1", *words)


def test_umaps_maps_come_with_their_seeds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """UMAP itself is in test_trajectories.py: it takes a minute."""

    def stand_in(points: xr.DataArray, neighbours: int, seed: int) -> xr.DataArray:
        return points[:, :2].rename(feature="axis") * (seed + 1)

    monkeypatch.setattr("probe.embed.importlib.util.find_spec", lambda _: "there")
    for name in ("umap_map", "aligned_map"):
        monkeypatch.setattr(f"probe.analysis.trajectories.{name}", stand_in)
    monkeypatch.setattr("probe.analysis.trajectories.umap_library", lambda: None)
    assert embed.main(["cat-1", "cat-2", "--runs", str(folder), "--seeds", "4,7"]) == 0
    found = probe.open_embedding(embeddings_in(folder)[0])
    assert found["method"].values.tolist() == ["pca", "umap", "umap", "aligned", "aligned"]
    assert found["seed"].values.tolist() == [-1, 4, 7, 4, 7]
    np.testing.assert_allclose(found["position"][2], found["position"][1] * 8 / 5, rtol=1e-6)
    heard = capsys.readouterr()
    assert "umap, seed 4 (1 of 2)" in heard.err and "aligned  7" in heard.out


# --- an embedding of somebody else ----------------------------------------------------------------


def test_a_run_that_changed_is_named(folder: Path) -> None:
    embedding = probe.open_embedding(the_one(folder))
    paths = [folder / "cat-1.zarr", folder / "cat-2.zarr"]
    assert [run.name for run in attributes_of(embedding).runs] == ["cat-1", "cat-2"]
    elsewhere = embedding.assign_attrs(
        runs=[
            {**run, "path": str(path)}
            for run, path in zip(embedding.attrs["runs"], paths, strict=True)
        ]
    )
    assert changed_since(elsewhere, paths) == []
    with (folder / "cat-2.zarr" / "digests.txt").open("a") as file:
        file.write("one more\n")
    assert changed_since(elsewhere, paths) == ["cat-2"]
    assert changed_since(elsewhere, paths[:1]) == [], "only known recordings are looked at"


def _claim(root: Any) -> None:
    root["attributes"]["runs"][0]["steps"] = 5


def _codec(root: Any) -> None:
    root["consolidated_metadata"]["metadata"]["position"]["codecs"] = [{"name": "pickle"}]


def _dims(root: Any) -> None:
    root["consolidated_metadata"]["metadata"]["kept"]["dimension_names"] = ["point"]


def _size(root: Any) -> None:
    grid = root["consolidated_metadata"]["metadata"]["walk_explained"]
    grid["shape"] = grid["chunk_grid"]["configuration"]["chunk_shape"] = [10**6, 10**6]


def _text(root: Any) -> None:
    root["attributes"]["runs"][0]["name"] = "cat\u202e1"


def _gone(root: Any) -> None:
    del root["consolidated_metadata"]["metadata"]["kept"]


@pytest.mark.parametrize("change", [_claim, _codec, _dims, _size, _text, _gone])
def test_a_root_file_that_lies_is_refused(change: Any, folder: Path) -> None:
    path = the_one(folder)
    rewritten(path, "zarr.json", change)
    nodes = {_codec: "position", _dims: "kept", _size: "walk_explained"}
    if change in nodes:  # the variable's own file says the same

        def own(node: Any) -> None:
            root = json.loads((path / "zarr.json").read_text())
            node.update(root["consolidated_metadata"]["metadata"][nodes[change]])

        rewritten(path, f"{nodes[change]}/zarr.json", own)
    with pytest.raises(RecordingDamaged) as caught:
        probe.open_embedding(path)
    assert "probe embed" in caught.value.remedy


def test_links_flips_and_other_methods_are_refused(folder: Path) -> None:
    path = the_one(folder)
    shutil.copytree(path, good := folder / "embeddings" / "good.zarr")
    (chunk,) = [file for file in (path / "position").iterdir() if file.name.startswith("c")]
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(RecordingDamaged):
        probe.open_embedding(path)
    chunk.unlink()
    chunk.symlink_to(good / "position" / chunk.name)
    with pytest.raises(RecordingDamaged, match="link"):
        probe.open_embedding(path)
    array = zarr.open_array(good, path="method", mode="r+")
    array[...] = "t-SNE"
    with pytest.raises(RecordingDamaged, match="none that this version draws"):
        probe.open_embedding(good)
    (folder / "embeddings" / "linked.zarr").symlink_to(good)
    assert good in embeddings_in(folder) and len(embeddings_in(folder)) == 3


def test_a_folder_without_embeddings_has_none(tmp_path: Path) -> None:
    assert embeddings_in(tmp_path) == []
    with pytest.raises(ProbeError, match="probe embed RUN"):
        probe.open_embedding(tmp_path / "none.zarr")
