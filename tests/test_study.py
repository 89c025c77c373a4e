"""Studies: one dense dataset, also while cells are missing; nothing in a file is trusted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from studies import change_cell, change_study, write_study

import probe
from probe.errors import ExperimentError, RecordingDamaged, RecordingLinked, RecordingNotFound
from probe.reading.recording import Run
from probe.reading.study import Study, open_study, studies_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six cells: one is missing, one failed."""
    runs = tmp_path_factory.mktemp("runs")
    return write_study(runs, parent={"guidance_scale": 2}, missing=[(0, 1)], failed=[(2, 0)])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("two")
    return write_study(runs, {"seed": [0, 1]}, parent={"guidance_scale": 2})


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A study of two cells, to be changed."""
    shutil.copytree(original.parent, tmp_path / "runs")
    return tmp_path / "runs" / original.name


def test_a_partial_study_is_one_dense_dataset(folder: Path) -> None:
    study = probe.open_study(folder)
    data = study.dataset
    assert dict(data["l2"].sizes) == {"guidance_scale": 3, "seed": 2}
    assert data["guidance_scale"].values.tolist() == [1.5, 3, 5]
    assert data["seed"].values.tolist() == [0, 1]
    assert data["status"].values.tolist() == [
        ["complete", "missing"],
        ["complete", "complete"],
        ["failed", "complete"],
    ]
    assert np.isnan(data["l2"]).values.tolist() == [[False, True], [False, False], [True, False]]
    assert str(data["cause"].sel(guidance_scale=5, seed=0).values).startswith("OutOfMemory")
    assert data["word_change"].dims == ("guidance_scale", "seed", "word")
    assert data["word"].values.tolist() == ["a", "red", "cat"]
    assert dict(data["l2_by_step"].sizes) == {"guidance_scale": 3, "seed": 2, "step": 3}
    cell = study.cell((1, 0))
    assert cell.record is not None and float(data["l2"][1, 0]) == cell.record.measures["l2"]
    assert study.counts() == {"complete": 4, "missing": 1, "failed": 1}
    assert repr(study) == (
        "<Study guidance-grid (guidance_scale: 3, seed: 2; 4 complete, 1 missing, 1 failed)>"
    )


def test_a_cell_opens_by_label_or_value(folder: Path) -> None:
    study = open_study(folder / "study.json")
    run = study.open(guidance_scale=3, seed=1)
    assert isinstance(run, Run) and run.experiment.guidance_scale == 3 and run.experiment.seed == 1
    for where in (
        {"guidance_scale": "3"},
        {"guidance_scale": 3.0},
        {"guidance_scale": np.int64(3)},
    ):
        assert study.open(where, seed=np.int64(1)).path == run.path
    picture = study.picture(study.cell((1, 1)))
    assert picture is not None and (picture == run.images.values[0]).all()
    assert study.picture(study.cell((0, 1))) is None

    with pytest.raises(RecordingNotFound, match="seed=1 is missing: It was not computed yet"):
        study.open(guidance_scale=1.5, seed=1)
    with pytest.raises(RecordingNotFound, match="is failed: OutOfMemory") as raised:
        study.open(guidance_scale=5, seed=0)
    assert raised.value.remedy == "Make it smaller."


@pytest.mark.parametrize(
    ("where", "cause", "remedy"),
    [
        ({"seed": 0}, "guidance_scale: no label is given", "seed=0"),
        ({"guidance": 3, "seed": 0}, "has no axis 'guidance'", "guidance_scale"),
        ({"guidance_scale": 4, "seed": 0}, "guidance_scale is never 4", "1.5, 3, 5"),
        ({"guidance_scale": 3, "seed": False}, "seed is never False", "0, 1"),
        ({"guidance_scale": "x", "seed": [0]}, "guidance_scale is never 'x'", "1.5, 3, 5"),
        ({"guidance_scale": 3, "seed": [0]}, "seed is never [0]", "0, 1"),
    ],
)
def test_what_is_no_label_is_refused(
    folder: Path, where: dict[str, Any], cause: str, remedy: str
) -> None:
    with pytest.raises(ExperimentError) as raised:
        open_study(folder).open(where)
    assert cause in raised.value.cause and remedy in raised.value.remedy


def test_dotted_and_zipped_axes(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"seed": [0, 1]})

    def zip_them(study: dict[str, Any]) -> None:
        study["axes"][0]["zipped"] = [
            {"name": "edits.0.amount", "labels": ["none", "half"], "values": [0, 0.5], "zipped": []}
        ]

    study = open_study(change_study(path, zip_them))
    assert study.place({"edits.0.amount": 0.5}) == (1,) == study.place({"edits.0.amount": "half"})
    assert study.place({"edits.0.amount": 0}, seed=0) == (0,)
    with pytest.raises(ExperimentError, match="seed is never 1 there"):
        study.place({"edits.0.amount": 0}, seed=1)
    assert study.dataset["edits.0.amount"].dims == ("seed",)
    assert study.cell((1,)).title == "seed=1, edits.0.amount=half"


def test_text_labels_and_a_study_of_one_cell(tmp_path: Path) -> None:
    study = open_study(
        write_study(tmp_path, {"prompt": ["a red cat", "a fox"]}, labels={"prompt": ["cat", "fox"]})
    )
    assert study.dataset["prompt"].values.tolist() == ["cat", "fox"]
    assert study.open(prompt="fox").path == study.open(prompt="a fox").path
    (tmp_path / "one").mkdir()
    one = open_study(write_study(tmp_path / "one", {}))
    assert one.open().experiment.prompt == "a red cat" and one.dataset["l2"].shape == ()


def test_a_failed_measure_is_a_cause_and_not_a_number(copy: Path) -> None:
    study = open_study(copy)
    address = study.planned[0,].address
    change_cell(copy, address, measures={"l2": {"cause": "no latents"}, "psnr": "inf"})
    data = open_study(copy).dataset
    assert np.isnan(data["l2"][0]) and np.isfinite(data["l2"][1]) and data["psnr"][0] == np.inf
    assert data["cause"].values.tolist() == ["l2: no latents", ""]


def test_what_is_kept_of_a_cell(tmp_path: Path) -> None:
    runs = {
        keep: open_study(write_study(tmp_path / keep, {"seed": [0]}, keep=keep))
        for keep in ("all", "summary", "metrics")
    }
    pictures = {keep: study.picture(study.cell((0,))) for keep, study in runs.items()}
    assert pictures["metrics"] is None and pictures["all"] is not None
    assert (pictures["all"] == pictures["summary"]).all()
    with pytest.raises(RecordingNotFound, match="left no recording \\(keep: summary\\)"):
        runs["summary"].open(seed=0)


# --- in files -------------------------------------------------------------------------------------


def test_it_is_saved_in_three_ways(folder: Path, tmp_path: Path) -> None:
    study = open_study(folder)
    stored = study.save(tmp_path / "study.zarr")
    with xr.open_dataset(stored, engine="zarr") as back:
        assert back["word_change"].equals(study.dataset["word_change"].astype(float))
        assert back["status"].values.tolist() == study.dataset["status"].values.tolist()
    with pytest.raises(ExperimentError, match="exists already"):
        study.save(stored)
    tables = {
        "csv": pd.read_csv(study.save(tmp_path / "study.csv")),
        "parquet": pd.read_parquet(study.save(tmp_path / "study.parquet")),
    }
    for table in tables.values():
        assert len(table) == 6 and table["status"].tolist().count("complete") == 4
        row = table[(table["guidance_scale"] == 3) & (table["seed"] == 1)].iloc[0]
        wanted = study.dataset.sel(guidance_scale=3, seed=1)
        assert row["l2"] == pytest.approx(float(wanted["l2"]))
        assert row["word_change[cat]"] == pytest.approx(
            float(wanted["word_change"].sel(word="cat"))
        )
        assert row["l2_by_step[2]"] == pytest.approx(float(wanted["l2_by_step"][2]))
    with pytest.raises(ExperimentError, match="has another ending"):
        study.save(tmp_path / "study.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "study.csv",
        "study.parquet",
        "study.zarr",
    ], "nothing half-written is left"


def test_a_measure_of_ones_own_goes_into_a_store(copy: Path, tmp_path: Path) -> None:
    for cell in open_study(copy).cells.values():
        change_cell(copy, cell.planned.address, measures={"my.module:bright": {"sky": 1, "sea": 2}})
    study = open_study(copy)
    assert study.dataset["my.module:bright"].dims == ("seed", "my.module:bright_label")
    with xr.open_dataset(study.save(tmp_path / "own.zarr"), engine="zarr") as back:
        assert back["my.module.bright"].values.tolist() == [[1, 2], [1, 2]]


def test_studies_are_listed_the_newest_first(tmp_path: Path) -> None:
    import os

    one, two = (write_study(tmp_path, {"seed": [0]}, name=name) for name in ("one", "two"))
    os.utime(one, (10**9 + 5, 10**9 + 5))
    os.utime(two, (10**9, 10**9))
    (tmp_path / "linked.study").symlink_to(one)
    (tmp_path / "file.study").write_text("")
    assert studies_in(tmp_path) == [one, two] and studies_in(tmp_path / "nowhere") == []


@pytest.mark.slow
def test_ten_thousand_cells_open_in_seconds(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"seed": [0, 1], "guidance_scale": [3]})
    record = next((tmp_path / ".cells").iterdir()).read_text()

    def grow(study: dict[str, Any]) -> None:
        study["axes"][0] |= {"labels": list(map(str, range(100))), "values": list(range(100))}
        study["axes"][1] |= {"labels": list(map(str, range(100))), "values": list(range(100))}
        cell = study["cells"][0]
        study["cells"] = [
            {**cell, "index": [n // 100, n % 100], "address": f"{n:016x}"} for n in range(10_000)
        ]

    change_study(path, grow)
    for n in range(10_000):
        address = f"{n:016x}"
        text = json.dumps({**json.loads(record), "address": address})
        (tmp_path / ".cells" / f"{address}.json").write_text(text)
    began = time.process_time()
    study = open_study(path)
    assert study.dataset["seconds"].sum() == 15_000
    assert time.process_time() - began < 10


# --- what is not to be trusted --------------------------------------------------------------------


def of_axis(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda study: study["axes"][0].update(changes)


def of_cell(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda study: study["cells"][0].update(changes)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (lambda study: study.update(format=2), "its format is not"),
    "no axes": (lambda study: study.pop("axes"), "its axes is not"),
    "text for a number": (of_cell(index=["0"]), "its cells.0.index is not"),
    "a place outside": (of_cell(index=[9]), "lies outside of its axes"),
    "a place before": (of_cell(index=[-1]), "lies outside of its axes"),
    "a place of two": (of_cell(index=[0, 0]), "lies outside of its axes"),
    "one place twice": (of_cell(index=[1]), "lie in one place"),
    "a path for an address": (of_cell(address="../../../etc/pas"), "cells.0.address is not"),
    "a path for a recording": (of_cell(run="../other.zarr"), "cells.0.run is not"),
    "an absolute recording": (of_cell(run="/tmp/other.zarr"), "cells.0.run is not"),
    "a hidden recording": (of_cell(run="..zarr"), "cells.0.run is not"),
    "labels twice": (of_axis(labels=["0", "0"]), "labels of seed do not fit"),
    "few values": (of_axis(values=[0]), "labels of seed do not fit"),
    "an axis in vain": (of_axis(labels=[], values=[]), "its axes.0.labels is not"),
    "a name in vain": (of_axis(name=""), "its axes.0.name is not"),
    "a name that steers": (of_axis(name="a\x1b[31m"), "its axes.0.name is not"),
    "a name of ours": (of_axis(name="status"), "status is the name of an axis"),
    "a name of a measure": (of_axis(name="l2"), "l2 is the name of a measure"),
    "too many cells": (
        lambda study: study.update(
            axes=[
                {"name": f"a{n}", "labels": list(map(str, range(99))), "values": list(range(99))}
                for n in range(9)
            ]
        ),
        "it claims more than 100000 cells",
    ),
    "two axes of one name": (
        lambda study: study["axes"].append(study["axes"][0]),
        "two of its axes have one name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_study_is_refused(copy: Path, case: str) -> None:
    change, cause = HOSTILE[case]
    with pytest.raises(RecordingDamaged) as raised:
        _ = open_study(change_study(copy, change)).dataset
    assert cause in raised.value.cause and raised.value.remedy.startswith("Run its grid again")
    assert raised.value.cause.isprintable()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 10**6, b"\xff", b'{"format": 1}'])
def test_what_is_no_study_is_refused(copy: Path, content: bytes) -> None:
    (copy / "study.json").write_bytes(content)
    with pytest.raises(RecordingDamaged):
        open_study(copy)


def test_a_file_of_many_parts_or_bytes_or_behind_a_link_is_refused(copy: Path) -> None:
    (copy / "study.json").write_bytes(b"[" + b"[]," * 10**6 + b"[]]")
    with pytest.raises(RecordingDamaged, match="too many parts"):
        open_study(copy)
    with (copy / "study.json").open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(RecordingDamaged, match="where 67108864 would be many"):
        open_study(copy)
    (copy / "study.json").rename(copy / "other.json")
    (copy / "study.json").symlink_to(copy / "other.json")
    with pytest.raises(RecordingDamaged, match="behind a link"):
        open_study(copy)
    for nothing in (copy / "nothing", copy.parent / ".cells"):
        with pytest.raises(RecordingNotFound, match="is no study"):
            open_study(nothing)
    with pytest.raises(ExperimentError, match="which is no path"):
        open_study(7)  # type: ignore[arg-type]


CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "a recording elsewhere": ({"run": "../x.zarr"}, "its run is not"),
    "another address": ({"address": "0" * 16}, "it speaks of another cell"),
    "a status of its own": ({"status": "fine"}, "its status is not"),
    "a text for a measure": ({"measures": {"l2": "much"}}, "its measures.l2"),
    "a name that is none": ({"measures": {"<b>": 1}}, "its measures"),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_hostile_cell_is_unreadable_and_the_others_are_not(copy: Path, case: str) -> None:
    changes, cause = CELLS[case]
    change_cell(copy, open_study(copy).planned[0,].address, **changes)
    study = open_study(copy)
    assert study.dataset["status"].values.tolist() == ["unreadable", "complete"]
    assert cause in study.cell((0,)).cause
    with pytest.raises(RecordingNotFound, match="seed=0 is unreadable"):
        study.open(seed=0)
    assert study.open(seed=1).status == "complete"


def test_links_lead_nowhere(copy: Path, tmp_path: Path) -> None:
    study: Study = open_study(copy)
    cell = study.cell((0,))
    path = copy.parent / str(cell.run_name)
    path.rename(tmp_path / "moved.zarr")
    path.symlink_to(tmp_path / "moved.zarr")
    with pytest.raises(RecordingLinked):
        study.open(seed=0)
    record = copy.parent / ".cells" / f"{cell.planned.address}.json"
    record.rename(tmp_path / "moved.json")
    record.symlink_to(tmp_path / "moved.json")
    assert open_study(copy).cell((0,)).status == "unreadable"


def test_a_picture_that_is_none_is_damage(tmp_path: Path) -> None:
    path = write_study(tmp_path, {"seed": [0]}, keep="summary")
    study = open_study(path)
    (tmp_path / ".cells" / f"{study.planned[0,].address}.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(RecordingDamaged, match="no picture that can be read"):
        study.picture(study.cell((0,)))
