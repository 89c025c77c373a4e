"""probe upgrade copies a recording of format 1 into one of format 2 with the same values.

The old one stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from machines import resumed, roots_are_the_nearest

from probe.cli import dispatch
from probe.errors import ExperimentError, RecordingBusy, RecordingDamaged, StoreError, TooLarge
from probe.format.schema import FORMAT_VERSION
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.listing import list_runs
from probe.reading.recording import Run
from probe.testing.conformance import stored_values
from probe.testing.synthetic import synthetic_recording
from probe.upgrade import upgrade

FOLDER = Path(__file__).parent / "format_1"


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = getattr(request, "param", "default")
    with zipfile.ZipFile(FOLDER / f"{kind}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / f"{kind}.zarr"


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("old", ["default", "noising"], indirect=True)
def test_values_stay_and_the_old_one_too(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(old)
    made = upgrade(Run(old))
    assert content(old) == before and "Verifying" in capsys.readouterr().err
    assert made.path.parent == old.parent and made.path != old
    found, told = made.attributes, Run(old).attributes
    assert (found.format_version, found.format_status, found.family) == (
        FORMAT_VERSION,
        "draft",
        "sd",
    )
    assert found.guidance_rule == ("none" if "noising" in found else "classifier_free")
    assert found.parent_run == old.stem and found["upgraded"]["from_format"] == 1
    new = {
        "format_version",
        "format_status",
        "family",
        "guidance_rule",
        "parent_run",
        "kind",
        "upgraded",
    }
    gone = {"experiment", "identity"} if "noising" in found else set()
    assert {**found, "identity": 0} == {
        **{name: told[name] for name in told if name not in gone},
        **{name: found[name] for name in new},
        "identity": 0,
    }
    assert found["identity"] == made.recipe.identity() and found["kind"] == Run(old).kind
    stock = xr.open_datatree(made.path, engine="zarr")
    assert (
        stock["latents/latents"].dims[1]
        == stock["images/final"].dims[0]
        == ("draw" if "noising" in found else "image")
    )
    assert compare(Run(old), made).same and compare(Run(old), made).variables > 50
    assert {path.name for path in made.path.glob("*.png")} == {
        path.name for path in old.glob("*.png")
    }
    checks = {check.name: check for check in verify(made)}
    assert {name: check.detail for name, check in checks.items() if check.verdict == "failed"} == {}
    assert "parameters" not in made.tree["cost"], "a copy has the variables of the older format"
    assert checks["manifest"].verdict == "exact"
    assert checks["scheduler"].verdict == "exact" or not roots_are_the_nearest()
    assert stored_values(made.path).keys() == stored_values(old).keys()
    assert not [path for path in old.parent.iterdir() if path.name.startswith(".")], (
        "nothing is left beside them"
    )


def test_it_is_upgraded_once(old: Path) -> None:
    made = upgrade(Run(old), progress=False)
    with pytest.raises(RecordingBusy, match=f"was upgraded before: .*{made.path.name}"):
        upgrade(Run(old), progress=False)
    assert upgrade(made, progress=False) is made, "it is of the newest format already"


def test_what_does_not_verify_is_refused(old: Path) -> None:
    chunk = old / "latents" / "prediction" / "c.1.0.0.0.0"
    raw = bytearray(chunk.read_bytes())
    raw[50] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(RecordingDamaged, match="does not verify: manifest: ") as caught:
        upgrade(Run(old), progress=False)
    assert caught.value.remedy and len(list(old.parent.glob("*.zarr"))) == 1


@pytest.mark.parametrize("old", ["interrupted"], indirect=True)
def test_what_is_not_complete_is_finished_first(old: Path) -> None:
    with pytest.raises(ExperimentError, match="is interrupted") as caught:
        upgrade(Run(old), progress=False)
    assert caught.value.remedy == "Finish it first: probe run --resume."
    whole = resumed(Run(old))
    assert whole.attributes.format_version == 1, "a recording keeps its format to its end"
    assert upgrade(whole, progress=False).attributes.format_version == FORMAT_VERSION


def test_what_it_does_not_know_is_kept(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "a.zarr", unknown=True, pictures=True)
    run = as_format_1(path)
    unproven = ("schedule", "scheduler")
    with pytest.raises(RecordingDamaged, match="does not verify: schedule"):
        upgrade(run, progress=False)
    assert {check.name for check in verify(run) if check.verdict == "failed"} == set(unproven)


def as_format_1(path: Path) -> Run:
    """Say of a recording that it is of format 1, and make its manifest agree."""
    from probe.writing.store import MANIFEST, manifest

    root = json.loads((path / "zarr.json").read_text())
    for name in ("format_status", "family", "guidance_rule"):
        root["attributes"].pop(name)
    root["attributes"]["format_version"] = 1
    (path / "zarr.json").write_text(json.dumps(root))
    (path / MANIFEST).write_text(json.dumps(manifest(path)))
    return Run(path)


def test_unknown_groups_and_attributes_reach_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = as_format_1(synthetic_recording(tmp_path / "a.zarr", unknown=True, pictures=True))
    proven = [check for check in verify(run) if check.name not in ("schedule", "scheduler")]
    monkeypatch.setattr("probe.upgrade.verify", lambda _: proven)
    made = upgrade(run, tmp_path / "elsewhere", progress=False)
    assert made.path.parent == tmp_path / "elsewhere"
    assert made.attributes["of_the_future"] == {"octaves": 3}
    assert made.variable("future/mystery").values.tolist() == [0, 1, 2]
    found = {check.name: check for check in verify(made)}
    assert (
        found["unknown"].verdict == "not checked"
        and "future/mystery, the attribute of_the_future" in found["unknown"].detail
    )
    assert (
        found["picture"].verdict == "exact"
        and found["digests"].verdict == "exact"
        and found["manifest"].verdict == "exact"
    )


def test_a_file_that_changes_meanwhile_stops_it(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(run: Run) -> list[Any]:
        chunk = run.path / "latents" / "prediction" / "c.0.0.0.0.0"
        chunk.write_bytes(b"x" * chunk.stat().st_size)
        return []

    monkeypatch.setattr("probe.upgrade.verify", late)
    with pytest.raises(
        RecordingDamaged, match=r"latents/prediction/c\.0\.0\.0\.0\.0 changed while it was copied"
    ):
        upgrade(Run(old), progress=False)
    assert [path.name for path in old.parent.iterdir()] == [old.name], "nothing half made is left"


def test_a_disk_without_room(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, 5))
    with pytest.raises(TooLarge, match="0 MB are free") as caught:
        upgrade(Run(old), progress=False)
    assert "--output" in caught.value.remedy


def test_a_disk_that_fails_leaves_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probe.upgrade.files.sync_all", full)
    with pytest.raises(StoreError, match="No space left"):
        upgrade(Run(old), progress=False)
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_the_command(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["upgrade", str(old), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("Upgraded to ")
    newest = [
        path
        for path, attributes in list_runs(old.parent)
        if attributes and attributes["format_version"] == 2
    ]
    assert len(newest) == 1 and out.strip().endswith(newest[0].name)
    assert dispatch(["upgrade", str(newest[0])]) == 0
    assert "has format 2 already" in capsys.readouterr().err
