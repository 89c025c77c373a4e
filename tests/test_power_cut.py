"""What a power cut leaves, on paper: only contents and names that were forced to the disk.

`Disk` notes what each fsync makes durable: of a file its content then, of a folder the names in it
then. `worst` rebuilds a folder from that alone. A name that was never forced is missing, a file
that was never forced is empty.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr
from recordings import ATTRIBUTES, recording

from probe.format.schema import spec
from probe.proof.checks import check_digests
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.recorder import record, resume
from probe.writing.store import RunWriter

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="asks Linux which file a handle is"
)
STEPS = 3


class Disk:
    """What has reached the disk.

    Every inode that was forced is held open, so that its number means one file.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, known: Path):
        self.known, self._held = known, []
        self._contents: dict[tuple[int, int], bytes] = {}
        self._names: dict[tuple[int, int], dict[str, tuple[int, int]]] = {}
        self.order: list[str] = []
        real = os.fsync

        def fsync(handle: int) -> None:
            real(handle)
            self._held.append(os.dup(handle))
            path, found = Path(f"/proc/self/fd/{handle}").readlink(), os.fstat(handle)
            self.order.append(str(path))
            if stat.S_ISDIR(found.st_mode):
                self._names[found.st_dev, found.st_ino] = {
                    entry.name: self._inode(entry.stat(follow_symlinks=False))
                    for entry in os.scandir(path)
                }
            else:
                self._contents[found.st_dev, found.st_ino] = Path(
                    f"/proc/self/fd/{handle}"
                ).read_bytes()

        monkeypatch.setattr(os, "fsync", fsync)

    @staticmethod
    def _inode(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def worst(self, to: Path) -> Path:
        """The folder `known` as it is after the power is back.

        The folder itself was there before.
        """
        self._rebuild(self._inode(self.known.stat()), to)
        return to

    def _rebuild(self, folder: tuple[int, int], to: Path) -> None:
        to.mkdir()
        for name, inode in self._names.get(folder, {}).items():
            if inode in self._names:
                self._rebuild(inode, to / name)
            elif inode in self._contents:
                (to / name).write_bytes(self._contents[inode])
            else:
                (to / name).touch()  # a file, or a folder with nothing in it: nobody knows

    def close(self) -> None:
        for handle in self._held:
            os.close(handle)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "disk").mkdir()
    made = Disk(monkeypatch, tmp_path / "disk")
    yield made
    made.close()


def asked(folder: Path, durability: str) -> dict[str, Any]:
    capture = {"layers": ("4x4",), "branches": "both"}
    fields = {
        "prompt": "a cat on the hat",
        "steps": STEPS,
        "scheduler": "DDIM",
        "decode_every": 1,
        "height": 32,
        "width": 32,
    }
    return {**fields, "output": str(folder), "durability": durability, "capture": capture}


def test_every_acknowledged_step_is_there_after_a_power_cut(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability: step.

    In folders that did not exist before; with stock xarray, whole, and with the digests of its
    steps.
    """
    write_step, seen = RunWriter._write_step, []

    def acknowledge(own: RunWriter, item: Any) -> None:
        write_step(own, item)
        seen.append(disk.worst(tmp_path / f"after {item[0]}"))

    monkeypatch.setattr(RunWriter, "_write_step", acknowledge)
    run = record(asked(disk.known / "new" / "runs", "step"), tiny.pipeline(), progress=False)
    assert len(seen) == STEPS
    for step, folder in enumerate(seen):
        (path,) = folder.glob("new/runs/*.zarr")
        tree = xr.open_datatree(path, engine="zarr", chunks=None).load()
        assert tree["committed"].values.tolist() == [1] * (step + 1) + [0] * (STEPS - step - 1)
        left = Run(path)
        assert (
            left.steps.tolist() == list(range(step + 1)) and check_digests(left).verdict == "exact"
        ), check_digests(left)
        for name in (
            "latents/latents",
            "latents/prediction",
            "attention/4x4/cross",
            "attention/4x4/moments",
        ):
            np.testing.assert_array_equal(
                tree[name].values[: step + 1], run.variable(name).values[: step + 1]
            )
        assert (
            tree["attention/4x4/value_size"].notnull().all()
            and tree["preview/bias"].notnull().all()
        ), "what is written once"
    monkeypatch.setattr(RunWriter, "_write_step", write_step)
    again = resume(Run(next(seen[0].glob("new/runs/*.zarr"))), tiny.pipeline(), progress=False)
    assert again.status == "complete" and np.array_equal(again.images, run.images)


@pytest.mark.parametrize("durability", ["run", "step"])
def test_a_complete_recording_is_complete_after_a_power_cut(
    disk: Disk, durability: str, tmp_path: Path
) -> None:
    """And before its status says so, the status of what is left says something else."""
    run = record(asked(disk.known / "runs", durability), tiny.pipeline(), progress=False)
    (path,) = disk.worst(tmp_path / "left").glob("runs/*.zarr")
    assert Run(path).status == "complete" and not [
        check for check in verify(Run(path)) if check.verdict == "failed"
    ]
    assert {file.name for file in path.iterdir()} == {file.name for file in run.path.iterdir()}
    own = [
        name.removeprefix(str(run.path)) for name in disk.order if name.startswith(str(run.path))
    ]
    last = next(number for number, name in enumerate(own) if name.startswith("/manifest.json."))
    assert [name.split(".")[0] for name in own[last:]] == ["/manifest", "", "/zarr", ""], (
        "the manifest, its name, the status, its name"
    )
    data = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()} - {
        "zarr.json",
        "manifest.json",
    }
    assert data <= {name.strip("/") for name in own[:last]}, "everything else came before"


def test_without_durability_nothing_waits_for_the_disk(disk: Disk) -> None:
    recording(disk.known / "a.zarr")
    assert disk.order == []


def test_the_test_sees_what_was_not_forced(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that forgets the names in a folder loses the step, and that is seen."""
    monkeypatch.setattr("probe.writing.files.sync_folder", lambda _: None)
    with RunWriter(disk.known / "a.zarr", [spec("", "committed", (2,))], ATTRIBUTES, "step"):
        pass
    assert not list(disk.worst(tmp_path / "left").iterdir())
