"""A disk that refuses any operation ends in a StoreError and a readable beginning."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from stored import ATTRIBUTES, another_process, check_prefix, layout, recorded, writers

from probe.errors import StoreError
from probe.reading.recording import Run
from probe.writing import files
from probe.writing.store import RunWriter

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Disk:
    """Counts what is asked of the disk, and refuses from the Nth time on, or the Nth time only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.at, self.forever, self.number = 0, 0, False, errno.ENOSPC
        self._lock = threading.Lock()
        for name in ("replace", "put_new"):
            monkeypatch.setattr(files, name, self._counted(getattr(files, name)))

    def _counted(self, write: Any) -> Any:
        def counted(*arguments: Any) -> None:
            self.operation()
            write(*arguments)

        return counted

    def operation(self) -> None:
        with self._lock:
            self.count += 1
            refuse = self.at and (self.count == self.at or (self.forever and self.count > self.at))
        if refuse:
            raise OSError(self.number, os.strerror(self.number))

    def break_at(self, at: int, forever: bool, number: int = errno.ENOSPC) -> None:
        self.count, self.at, self.forever, self.number = 0, at, forever, number


@pytest.mark.parametrize("forever", [False, True])
def test_an_error_of_any_operation_ends_in_a_store_error_and_a_readable_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forever: bool
) -> None:
    disk = Disk(monkeypatch)
    recorded(tmp_path / "whole.zarr", durability="none")
    operations = disk.count
    assert operations > 5 * 4 + 20
    for at in range(1, operations + 1, 3 if forever else 1):
        path = tmp_path / f"{at}.zarr"
        disk.break_at(at, forever)
        with pytest.raises(StoreError) as caught:
            recorded(path, durability="none")
        assert (
            caught.value.cause == f"{path} could not be written: No space left on device."
            and "Free some room" in caught.value.remedy
        )
        disk.break_at(0, False)
        if path.exists():
            check_prefix(path)
            kept = Run(path).attributes["status"]
            assert kept == "failed" or (forever and kept == "running"), at
        assert not [file for file in tmp_path.iterdir() if file.name.endswith(".partial")], at
        assert not writers()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_the_remedy_fits_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = Disk(monkeypatch)
    disk.break_at(15, True, number)
    with pytest.raises(StoreError) as caught:
        recorded(tmp_path / "a.zarr")
    assert os.strerror(number) in caught.value.cause
    remedies = {errno.EIO: "Check the disk", errno.EDQUOT: "Free some room"}
    assert caught.value.remedy.startswith(remedies.get(number, "Name another folder: --output ")), (
        "nothing is there yet"
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        RunWriter(tmp_path / "file" / "a.zarr", layout(), ATTRIBUTES)
    assert not writers()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Not a stand-in: the system refuses every file beyond 20 kB, and the Rust writer of bulk gets
    to feel it.
    """
    script = """
        import resource
        arrays = [
            spec("", "step", value=np.arange(3)),
            spec("", "committed", (3,)),
            spec("latents", "latents", (3, 1, 4, 64, 64), "float32"),
        ]
        try:
            with RunWriter(Path(sys.argv[1]), arrays, ATTRIBUTES) as writer:
                value = {"latents/latents": np.ones((1, 4, 64, 64), "f4")}
                writer.write_step(0, lambda: value, 1)
                writer.flush()
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                writer.write_step(1, lambda: value, 1)
                writer.complete()
        except StoreError as error:
            print(json.dumps([error.cause, error.remedy]))
    """
    path = tmp_path / "a.zarr"
    out, err = another_process(script, path).communicate(timeout=60)
    cause, remedy = json.loads(out or f'"{err}"')
    assert cause == f"{path} could not be written: File too large." and remedy.startswith(
        "Free some room"
    )
    run = Run(path)
    assert run.status == "failed" and run.steps.tolist() == [0] and (run.latents == 1).all()
