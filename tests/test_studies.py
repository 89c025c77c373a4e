"""Studies: cells that are found again, resumed, sharded, kept in part, and that may fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import tiny
import torch

import probe
from probe.errors import (
    ExperimentError,
    ModelError,
    PromptError,
    RecordingUnreadable,
    StoreError,
    TooLarge,
)
from probe.reading.recording import Run
from probe.settings.experiment import Experiment
from probe.settings.grid import load_grid
from probe.studies import compute as computing
from probe.studies import models
from probe.studies.cells import address, in_order
from probe.studies.compute import Job
from probe.studies.results import Results
from probe.studies.study import (
    Outcome,
    StudyPlan,
    carry_out,
    check_total,
    duration,
    plan_study,
    read_shard,
    run_study,
    workers_for,
    write_study,
)
from probe.studies.survey import seconds_a_call, survey
from probe.studies.workers import Here, Processes
from probe.writing.upkeep import clear_orphans

CAT = "a cat on the hat"
LEAN = {"attention": "off", "text": False, "statistics": False}
MASK = [{"kind": "mask", "words": ["cat"]}]


@pytest.fixture
def model(saved: Path) -> str:
    return str(saved)


@pytest.fixture
def grid(model: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a grid of two seeds, as a mapping."""

    def made(**changes: Any) -> dict[str, Any]:
        return {
            "name": "cats",
            "model": model,
            "prompt": CAT,
            "steps": 2,
            "durability": "none",
            "output": str(tmp_path / "runs"),
            "capture": LEAN,
            "axes": {"seed": [0, 1]},
            **changes,
        }

    return made


def carried(grid: dict[str, Any], shard: tuple[int, int] = (1, 1)) -> tuple[StudyPlan, Outcome]:
    plan = plan_study(load_grid(grid), Here(), shard)
    write_study(plan)
    return plan, carry_out(plan, Here(), lambda _: None)


def records(plan: StudyPlan) -> dict[str, dict[str, Any]]:
    files = sorted(plan.results.cells.glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def test_a_study_is_its_cells_and_each_is_an_ordinary_recording(
    grid: Callable[..., dict[str, Any]],
) -> None:
    written = grid(axes={"guidance_scale": [1, 3], "seed": "0-1(1)"}, capture={})
    plan, outcome = carried(written)
    assert (outcome.computed, outcome.failed) == (4, [])
    study = json.loads((plan.path / "study.json").read_text())
    assert study["format"] == 1 and study["name"] == "cats" and plan.path.name.startswith("cats-")
    assert [axis["name"] for axis in study["axes"]] == ["guidance_scale", "seed"]
    assert study["axes"][1] == {
        "name": "seed",
        "labels": ["0", "1"],
        "values": [0, 1],
        "zipped": [],
    }
    assert load_grid(study["grid"]) == plan.grid
    assert [cell["index"] for cell in study["cells"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for cell in study["cells"]:
        record = records(plan)[cell["address"]]
        assert record["status"] == "complete" and record["seconds"] > 0
        run = Run(plan.results.root / record["run"])
        assert record["run"] == cell["run"] and cell["address"] in run.name
        assert run.verify().verdict != "failed" and (run.path / "picture.png").is_file()
    # A cell's bits do not depend on the grid: the same run alone.
    alone = probe.record(Experiment.model_validate(cell["experiment"]), progress=False)
    assert run.diff(alone).same


def test_a_second_launch_computes_nothing_and_other_grids_find_the_cells(
    grid: Callable[..., dict[str, Any]],
) -> None:
    first, _ = carried(grid())
    before = {path: path.stat().st_mtime_ns for path in first.results.cells.iterdir()}
    again, outcome = carried(grid())
    assert again.missing == () and outcome.computed == 0 and again.path == first.path
    assert before == {path: path.stat().st_mtime_ns for path in first.results.cells.iterdir()}
    larger, outcome = carried(grid(name="more", axes={"seed": [0, 1, 2]}))
    assert outcome.computed == 1 and larger.path != first.path
    assert [cell.title for cell in larger.missing] == ["seed=2"]
    # What is not kept any more is missing.
    other = first.results.run_path(first.missing[0])
    other.rename(other.with_suffix(".gone"))
    assert len(plan_study(load_grid(grid()), Here()).missing) == 1


def test_an_address_is_of_all_that_decides_bits(model: str, tmp_path: Path) -> None:
    experiment = Experiment(model=model, prompt=CAT)
    there = models.conditions(experiment)
    one = address(experiment, there)
    assert len(one) == 16 and one == address(experiment, json.loads(json.dumps(there)))

    def other(**changes: Any) -> str:
        return address(probe.load_experiment(experiment, **changes), there)

    assert other(name="x", output="elsewhere", durability="step", device="cpu", strength=0.1) == one
    for changes in ({"seed": 1}, {"capture.text": False}, {"steps": 9}, {"prompt": "a cat"}):
        assert other(**changes) != one
    for name, value in (("weights", "0"), ("device", "cuda"), ("dtype", "float16")):
        assert address(experiment, {**there, name: value}) != one
    assert address(experiment, {**there, "versions": {**there["versions"], "torch": "1"}}) != one
    assert other(edits=MASK) != one
    assert other(edits=[{**MASK[0], "label": "x"}]) == other(edits=MASK)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    before = other(image=str(picture))
    picture.write_bytes(b"another")
    assert other(image=str(picture)) != before
    with pytest.raises(ExperimentError, match="cannot be read"):
        other(image=str(tmp_path / "nowhere.png"))


def test_every_cell_is_looked_at_before_the_first_one_runs(
    grid: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    words = {"prompt": {"replace": {"cat": ["cat", "fox"]}}, "seed": [0, 1]}
    counterfactual = {"capture": {**LEAN, "counterfactual": ["cat"]}}
    with pytest.raises(ExperimentError) as error:
        run_study(grid(axes=words, **counterfactual), progress=False)
    assert error.value.cause.startswith("prompt=fox, seed=0; prompt=fox, seed=1: ")
    assert "cat" in error.value.cause and error.value.remedy
    with pytest.raises(PromptError, match="prompt=cat cat"):
        run_study(grid(axes={"prompt": [CAT, "cat " * 99]}), progress=False)
    with pytest.raises(ModelError, match=r"^model=.*: model: "):
        run_study(grid(axes={"model": [str(tmp_path / "nothing")]}), progress=False)
    with pytest.raises(ExperimentError, match="there is no measure 'l3'"):
        run_study(grid(measures=["l3"]), progress=False)
    with pytest.raises(ExperimentError, match="the same run"):
        run_study(grid(axes={"strength": [0.1, 0.2]}), progress=False)
    assert not (tmp_path / "runs").exists()


def test_too_large_in_all_is_refused(grid: Callable[..., dict[str, Any]]) -> None:
    plan = plan_study(load_grid(grid(capture={})), Here())
    lean = plan_study(load_grid(grid(keep="metrics")), Here())
    summary = plan_study(load_grid(grid(keep="summary")), Here())
    assert lean.bytes < summary.bytes < plan.bytes and plan.calls == lean.calls == 2 * 3  # PNDM
    check_total(plan, plan.bytes)
    with pytest.raises(TooLarge, match=r"2 cells would take .* more than --max-bytes") as error:
        check_total(plan, plan.bytes - 1)
    assert "seed=0" in error.value.remedy
    with pytest.raises(TooLarge):
        run_study(grid(capture={}), max_bytes=1000, progress=False)


def test_shards_are_parts_that_make_the_whole(grid: Callable[..., dict[str, Any]]) -> None:
    written = grid(axes={"seed": "0-6(1)"})
    parts = [
        [cell.address for cell in plan_study(load_grid(written), Here(), (i, 3)).missing]
        for i in (1, 2, 3)
    ]
    assert (
        sorted(map(len, parts)) == [2, 2, 3] and len({one for part in parts for one in part}) == 7
    )
    _, outcome = carried(written, (2, 3))
    assert outcome.computed == len(parts[1])
    left = plan_study(load_grid(written), Here())
    assert {cell.address for cell in left.missing} == {*parts[0], *parts[2]}
    assert read_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "3", "a/b", "1/0", "-1/2"):
        with pytest.raises(ExperimentError, match="shard"):
            read_shard(text)


def test_what_costs_most_is_outermost_and_parents_come_first(
    grid: Callable[..., dict[str, Any]],
) -> None:
    written = grid(axes={"edits": [MASK, []], "width": [32, 64], "scheduler": ["DDIM", "Euler"]})
    plan = plan_study(load_grid(written), Here())
    widths = [cell.experiment.width for cell in plan.missing]
    assert widths == [32] * 4 + [64] * 4
    assert [bool(cell.experiment.edits) for cell in plan.missing[:4]] == [False, False, True, True]
    assert in_order(plan.missing) == list(plan.missing)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded, in their order."""
    names: list[str] = []
    load = models.load

    def counted(name: str, **options: Any) -> Any:
        names.append(name)
        return load(name, **options)

    monkeypatch.setattr(models, "load", counted)
    models._held.clear()
    return names


def test_a_model_is_loaded_once_and_its_scheduler_switched(
    grid: Callable[..., dict[str, Any]], loads: list[str]
) -> None:
    axes = {"scheduler": ["DDIM", "default", "Euler"], "clip_skip": [None, 1]}
    plan, outcome = carried(grid(axes=axes))
    assert outcome.computed == 6 and len(loads) == 1
    for cell in plan.missing:
        run = Run(plan.results.run_path(cell))
        alone = probe.record(cell.experiment, output=None, progress=False)
        assert np.array_equal(run.images.values, alone.images.values), cell.title
        assert run.attributes["scheduler"]["class"] == alone.attributes["scheduler"]["class"]


@pytest.mark.slow
def test_loras_are_switched_and_not_loaded_with_the_model(
    grid: Callable[..., dict[str, Any]], loads: list[str], tmp_path: Path
) -> None:
    ink = {"path": str(lora_files.save_peft(tiny.pipeline(), tmp_path / "ink.safetensors"))}
    axes = {"loras": [[], [{**ink, "scale": 0}], [ink]], "seed": [0, 1]}
    plan, outcome = carried(grid(axes=axes, keep="metrics"))
    assert outcome.computed == 6 and len(loads) == 1
    assert [cell.title[-6:] for cell in plan.missing] == ["seed=0", "seed=1"] * 3  # LoRAs outermost
    kept, _ = carried(grid(axes=axes))
    images = [Run(kept.results.run_path(cell)).images.values for cell in kept.missing]
    assert np.array_equal(images[0], images[2]) and not np.array_equal(images[0], images[4])
    before = [cell.address for cell in kept.cells]
    Path(ink["path"]).unlink()
    lora_files.save_peft(tiny.pipeline(), Path(ink["path"]), seed=6)  # another file of this name
    after = [cell.address for cell in plan_study(load_grid(grid(axes=axes)), Here()).cells]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True] * 2 + [
        False
    ] * 4


def test_an_axis_over_how_much_of_an_edit(grid: Callable[..., dict[str, Any]]) -> None:
    written = grid(
        edits=MASK,
        axes={"edits.0.amount": [0, 0.5, 1], "edits.0.words": [["cat"], ["hat"]]},
        measures=["l2"],
        keep="metrics",
    )
    plan, outcome = carried(written)
    assert outcome.failed == [] and outcome.computed == 6 + 1
    study = json.loads((plan.path / "study.json").read_text())
    l2 = [records(plan)[cell["address"]]["measures"]["l2"] for cell in study["cells"]]
    assert l2[:2] == [0, 0] and 0 < l2[2] < l2[4] and 0 < l2[3] < l2[5]
    with pytest.raises(ExperimentError, match=r"edits.0.words=dog.*dog"):
        plan_study(load_grid({**written, "axes": {"edits.0.words": [["cat"], ["dog"]]}}), Here())


@pytest.mark.parametrize("keep", ["summary", "metrics"])
def test_what_a_cell_leaves_behind(grid: Callable[..., dict[str, Any]], keep: str) -> None:
    written = grid(keep=keep, images=2, measures=["l2"], capture={})
    plan, outcome = carried(written)
    assert outcome.computed == 2 and not list(plan.results.root.glob("*.zarr"))
    assert all(record["run"] is None for record in records(plan).values())
    assert plan_study(load_grid(written), Here()).missing == ()
    endings = {path.suffix for path in plan.results.cells.iterdir()}
    assert endings == ({".json", ".png", ".npz"} if keep == "summary" else {".json"})
    if keep == "summary":
        one = plan.missing[0]
        alone = probe.record(one.experiment, output=None, progress=False)
        with np.load(plan.results.file(one.address, ".npz")) as left:
            assert np.array_equal(left["images"], alone.images.values)
            assert left["final_latents"].shape == (2, 4, 8, 8)
            assert left["words"].tolist() == list(alone.words)
            assert np.array_equal(left["word_maps"], alone.word_overview().values)
    # More is wanted: what was not kept is computed, and then less is there already.
    _, outcome = carried({**written, "keep": "all"})
    assert outcome.computed == 2 and len(list(plan.results.root.glob("*.zarr"))) == 2
    assert plan_study(load_grid({**written, "keep": "metrics"}), Here()).missing == ()


def test_edited_cells_are_measured_against_their_parents(
    grid: Callable[..., dict[str, Any]],
) -> None:
    remove = [{"kind": "remove", "words": ["cat"]}]
    axes = {"edits": [[{**remove[0], "amount": 0}], remove]}
    written = grid(axes=axes, keep="metrics", measures=["l2", "psnr"])
    plan, outcome = carried(written)
    assert outcome.computed == 3 and len(plan.parents) == 1
    recordings = list(plan.results.root.glob("*.zarr"))
    assert len(recordings) == 1 and not Run(recordings[0]).experiment.edits  # the parent stays
    study = json.loads((plan.path / "study.json").read_text())
    assert [one["address"] for one in study["parents"]] == [*plan.parents]
    at = [records(plan)[cell["address"]]["measures"] for cell in study["cells"]]
    assert at[0]["l2"] == 0 and at[0]["psnr"] == "inf" and at[1]["l2"] > 0
    # Another measure of cells that were kept computes no cell again.
    kept, _ = carried({**written, "keep": "all"})
    seconds = {name: one["seconds"] for name, one in records(kept).items()}
    more, outcome = carried({**written, "keep": "all", "measures": ["l2", "psnr", "ssim"]})
    assert outcome.computed == 2
    assert {name: one["seconds"] for name, one in records(more).items()} == seconds
    assert "ssim" in records(more)[more.missing[0].address]["measures"]


def test_a_cell_that_fails_is_listed_and_stops_nobody(
    grid: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    record_as, errors = computing.record_as, list[Exception]()

    def broken(model: Any, experiment: Experiment, *rest: Any, **options: Any) -> Run:
        if errors and experiment.seed == 1:
            raise errors[-1]
        return record_as(model, experiment, *rest, **options)

    monkeypatch.setattr(computing, "record_as", broken)
    written = grid(axes={"seed": [0, 1, 2]})
    for error, cause in (
        (ValueError("seven\nlines"), "ValueError: seven"),
        (MemoryError(), "The worker has no memory left."),
        (TooLarge("Too much.", "Less."), "Too much."),
    ):
        errors.append(error)
        plan, outcome = carried(written)
        assert [(cell, what) for cell, what, _ in outcome.failed] == [("seed=1", cause)]
        record = records(plan)[plan.missing[0 if len(plan.missing) == 1 else 1].address]
        assert record["status"] == "failed" and record["cause"] == cause and record["remedy"]
    assert outcome.computed == 0  # the two others were there
    errors.clear()
    _, outcome = carried(written)
    assert outcome.computed == 1 and outcome.failed == []


def test_a_parent_that_fails_fails_its_children(
    grid: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, experiment: Experiment, *rest: Any, **options: Any) -> Run:
        raise ValueError("no")

    monkeypatch.setattr(computing, "record_as", broken)
    _, outcome = carried(grid(edits=MASK, axes={"seed": [0]}, measures=["l2"]))
    assert [cell for cell, _, _ in outcome.failed] == ["seed=0, without edits", "seed=0"]
    assert "that it is compared with failed: ValueError: no" in outcome.failed[1][1]


def test_a_measure_that_fails_is_listed_and_measured_again(
    grid: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own_measure_of_studies.py"
    own.write_text("def bright(run):\n    raise KeyError('cat')\n")
    monkeypatch.syspath_prepend(tmp_path)
    written = grid(measures=["own_measure_of_studies:bright"])
    plan, outcome = carried(written)
    assert [cell for cell, _, _ in outcome.failed] == ["seed=0", "seed=1"]
    assert "measure own_measure_of_studies:bright: KeyError" in outcome.failed[0][1]
    import own_measure_of_studies as module

    monkeypatch.setattr(module, "bright", lambda run: run.images.values.mean())
    again, outcome = carried(written)
    assert outcome.computed == 2 and len(again.missing) == 2
    assert all(record["measures"] for record in records(plan).values())


def test_what_a_killed_worker_left_is_gone_on_with(grid: Callable[..., dict[str, Any]]) -> None:
    plan, _ = carried(grid(steps=4))
    cell = plan.missing[0]
    path = plan.results.run_path(cell)
    whole = Run(path).variable("latents/final_latents").values
    plan.results.file(cell.address, ".json").unlink()
    # As it is between the last step and the end.
    text = json.loads((path / "zarr.json").read_text())
    text["attributes"]["status"] = "running"
    (path / "zarr.json").write_text(json.dumps(text))
    _, outcome = carried(grid(steps=4))
    assert outcome.computed == 1 and Run(path).status == "complete"
    assert np.array_equal(Run(path).variable("latents/final_latents").values, whole)
    # Half of a recording that nobody can go on with is made anew.
    plan.results.file(cell.address, ".json").unlink()
    (path / "zarr.json").write_text("{}")
    _, outcome = carried(grid(steps=4))
    assert outcome.computed == 1 and Run(path).verify().verdict != "failed"


def test_a_worker_that_dies_too_often_fails_its_cell_by_name(
    grid: Callable[..., dict[str, Any]],
) -> None:
    plan = plan_study(load_grid(grid()), Here())
    plan.results.prepare()
    job = plan.jobs("launch", 1)[0]
    assert [plan.results.begin_try(job["address"], "launch") for _ in range(2)] == [0, 1]
    computing.compute(job, str(plan.results.root))
    record = plan.results.record(job["address"])
    assert record is not None and record["status"] == "failed"
    assert "died twice" in record["cause"].replace("2 times", "twice") and record["remedy"]
    computing.compute({**job, "launch": "another"}, str(plan.results.root))
    record = plan.results.record(job["address"])
    assert record is not None and record["status"] == "complete"


def test_a_worker_with_other_conditions_refuses(grid: Callable[..., dict[str, Any]]) -> None:
    plan = plan_study(load_grid(grid()), Here())
    plan.results.prepare()
    job = plan.jobs("launch", 1)[0]
    versions = {**job["conditions"]["versions"], "torch": "1.0"}
    job["conditions"] = {**job["conditions"], "versions": versions}
    computing.compute(job, str(plan.results.root))
    record = plan.results.record(job["address"])
    assert record is not None and "planned with 1.0" in record["cause"]
    assert Job.of(json.loads(json.dumps(job))).plain() == job


@pytest.mark.slow
def test_two_processes_compute_every_cell_once_and_replace_one_that_dies(
    grid: Callable[..., dict[str, Any]],
) -> None:
    plan = plan_study(load_grid(grid(axes={"seed": "0-3(1)"})), Here())
    write_study(plan)
    lines: list[str] = []
    with Processes(2) as workers:
        assert len(workers.call(survey, [plan.missing[0].experiment.resolved()])["sizes"]) == 1
        with pytest.raises(ExperimentError, match="no measure"):
            workers.call(survey, [], ["l3"])

        def say(line: str) -> None:
            if not lines:
                workers._live[0]._process.kill()
            lines.append(line)

        outcome = carry_out(plan, workers, say)
    assert outcome.computed == 4 and outcome.failed == [] and len(lines) == 4
    assert all(
        Run(plan.results.run_path(cell)).verify().verdict != "failed" for cell in plan.missing
    )
    assert plan_study(load_grid(grid(axes={"seed": "0-3(1)"})), Here()).missing == ()


def test_who_computes() -> None:
    assert isinstance(workers_for(1, None, False), Here)
    assert isinstance(workers_for(2, None, False), Processes)
    with pytest.raises(ExperimentError, match="workers"):
        workers_for(0, None, False)
    with pytest.raises(ExperimentError, match="both given"):
        workers_for(2, "tcp://127.0.0.1:1", False)


def test_a_call_is_timed_without_a_file(model: str, tmp_path: Path) -> None:
    fields = Experiment(model=model, prompt=CAT, output=str(tmp_path / "runs")).resolved()
    assert 0 < seconds_a_call(fields) < 60
    assert not (tmp_path / "runs").exists()
    assert (duration(3.14), duration(240), duration(7500)) == ("3.1 s", "4 min", "2 h 5 min")


def test_results_that_are_damaged_count_as_missing(tmp_path: Path) -> None:
    results, one, other = Results(tmp_path), 16 * "a", 16 * "b"
    results.prepare()
    for text in ("", "[]", "{", f'{{"address": "{other}", "status": "complete"}}'):
        results.file(one, ".json").write_text(text)
        assert results.record(one) is None
    results.write({"address": one, "status": "complete"})
    assert results.record(one) == {"address": one, "status": "complete"}
    assert results.tries(one, "x") == 0
    results.begin_try(one, "x")
    assert (results.tries(one, "x"), results.tries(one, "y")) == (1, 0)
    results.end_try(one)
    assert results.tries(one, "x") == 0


def test_a_cell_that_cannot_be_is_found_behind_one_that_can(
    grid: Callable[..., dict[str, Any]],
) -> None:
    """An amount of 0 may be where a part of an edit may not, and noise where it is the own."""
    other = {"kind": "prompt", "text": "a cat", "steps": "0:"}
    amounts = grid(edits=[other], axes={"edits.0.amount": [0, 0.5]}, capture={})
    with pytest.raises(ExperimentError, match=r"edits\.0\.amount=0\.5: .*no map would have"):
        plan_study(load_grid(amounts), Here())
    noise = {"kind": "noise", "seed": 1, "amount": 0.5}
    with pytest.raises(ExperimentError, match=r"seed=1: .*this run's own"):
        plan_study(load_grid(grid(edits=[noise])), Here())


def test_what_dead_workers_left_is_cleared_and_what_lives_stays(tmp_path: Path) -> None:
    results, name = Results(tmp_path), "0123456789abcdef"
    results.prepare()
    results.write({"address": name})
    results.begin_try(name, "x")
    left = [results.cells / f".{name}.json.lock", results.cells / f"{name}.json.0a1b2c3d.partial"]
    for path in left:
        path.touch()
    with results.locked(name):
        assert clear_orphans(results.cells) == []
    left[0].touch()
    left.append(results.file(name, ".tries"))
    assert clear_orphans(results.cells, dry_run=True) == sorted(left) and left[2].exists()
    assert clear_orphans(results.cells) == sorted(left)
    assert [path.name for path in results.cells.iterdir()] == [f"{name}.json"]


def test_a_record_that_is_none_is_made_again_and_a_folder_without_its_root_is_no_recording(
    grid: Callable[..., dict[str, Any]],
) -> None:
    first, _ = carried(grid(measures=["l2"]))
    cell = first.missing[0]
    record, run = first.results.file(cell.address, ".json"), first.results.run_path(cell)
    whole = json.loads(record.read_text())
    for wrong in ({"measures": ["l2"]}, {"seconds": "long"}, {"run": "../x.zarr"}):
        record.write_text(json.dumps({**whole, **wrong}))
        assert first.results.record(cell.address) is None
    record.write_text(json.dumps({**whole, "seconds": None}))
    assert plan_study(load_grid(grid(measures=["l2"])), Here()).missing == ()
    (run / "zarr.json").unlink()
    assert carried(grid(measures=["l2"]))[1].computed == 1
    assert Run(run).status == "complete"


def test_a_recording_that_the_system_does_not_read_or_write_is_not_removed(
    grid: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = carried(grid(axes={"seed": [0]}))
    run, record = (first.results.run_path(first.missing[0]), first.missing[0].address)
    first.results.file(record, ".json").unlink()
    full = StoreError("it could not be written: no space left on device.", "Make room.")
    full.__cause__ = OSError(28, "No space left on device")
    for error in (RecordingUnreadable("The system does not read it.", ""), full):

        def fail(_: Path, error: Exception = error) -> Run:
            raise error

        monkeypatch.setattr(computing, "Run", fail)
        assert carried(grid(axes={"seed": [0]}))[1].failed[0][1] == error.cause
        assert (run / "zarr.json").is_file()
    monkeypatch.undo()
    before = (run / "zarr.json").stat().st_mtime_ns
    assert carried(grid(axes={"seed": [0]}))[1].failed == []
    assert (run / "zarr.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_edited_cell_has_the_threads_of_its_parent(grid: Callable[..., dict[str, Any]]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        plain, _ = carried(grid(axes={"seed": [0]}, height=64, width=64))
        torch.set_num_threads(1)
        nothing = [{**MASK[0], "amount": 0}]
        same = grid(edits=nothing, axes={"seed": [0]}, height=64, width=64, measures=["differs_at"])
        plan, outcome = carried(same)
        assert outcome.computed == 1 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    parent, child = (Run(one.results.run_path(one.missing[0])) for one in (plain, plan))
    assert child.attributes["environment"]["threads"] == parent.attributes["environment"]["threads"]
    assert records(plan)[plan.missing[0].address]["measures"] == {"differs_at": None}
