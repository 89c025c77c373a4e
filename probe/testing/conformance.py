"""Tests of other programs' writers and readers. pytest collects them from a subclass.

class TestMyWriter(WriterConformance):
    def write(self, folder):
        return my_writer.record(folder / "cat.zarr")

class TestMyReader(ReaderConformance):
    def read(self, path):  # {"latents/latents": array of the committed steps, ...}
        return my_reader.values(path)
"""

from __future__ import annotations

import json
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from probe.format.attributes import problem_of
from probe.format.dimensions import broken
from probe.format.schema import FORMAT_VERSION, FORMATS_READ
from probe.proof.checks import files_of
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording


def stored_values(path: Path) -> dict[str, np.ndarray]:
    """Return every variable by its path, as stock xarray reads it: the committed steps."""
    with xr.open_datatree(path, engine="zarr") as tree:
        steps = np.flatnonzero(tree.dataset["committed"].values)
        values = {}
        for node in tree.subtree:
            for name, variable in node.to_dataset(inherit=False).variables.items():
                part = variable.isel(step=steps) if "step" in variable.dims else variable
                values[f"{node.path}/{name}".strip("/")] = np.asarray(part.values)
    return values


def same(one: Any, other: Any) -> bool:
    """Tell whether two arrays have the same values; text may be of any numpy type."""
    a, b = np.asarray(one), np.asarray(other)
    if "O" in a.dtype.kind + b.dtype.kind or a.dtype.kind in "UT" or b.dtype.kind in "UT":
        return a.shape == b.shape and a.astype(object).tolist() == b.astype(object).tolist()
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


class WriterConformance:
    """What every writer has to keep.

    `not_proven` names checks of `probe verify` that it does not claim.
    """

    not_proven: ClassVar[tuple[str, ...]] = ()
    _path: ClassVar[Path | None] = None

    @abstractmethod
    def write(self, folder: Path) -> Path:
        """Write a complete recording into a folder and return its path."""

    def _recording(self, tmp_path_factory: Any) -> Path:
        """Return the recording under test, written once for each class."""
        own = type(self)
        if "_path" not in vars(own) or own._path is None:
            own._path = self.write(tmp_path_factory.mktemp(own.__name__))
        return own._path

    def test_stock_xarray_opens_it_without_a_warning(self, tmp_path_factory: Any) -> None:
        path = self._recording(tmp_path_factory)
        with warnings.catch_warnings(action="error"), xr.open_datatree(path, engine="zarr") as tree:
            assert tree["committed"].dims == ("step",)

    def test_it_is_named_as_a_recording(self, tmp_path_factory: Any) -> None:
        path = self._recording(tmp_path_factory)
        assert path.is_dir() and not path.is_symlink() and path.suffix == ".zarr"
        assert files_of(path), "files that are not plain are refused"

    def test_its_attributes_are_those_of_the_format(self, tmp_path_factory: Any) -> None:
        root = json.loads((self._recording(tmp_path_factory) / "zarr.json").read_text())
        assert problem_of(root["attributes"]) is None
        assert root["attributes"]["format_version"] == FORMAT_VERSION
        assert root["attributes"]["status"] == "complete"

    def test_a_checking_reader_reads_what_stock_xarray_reads(self, tmp_path_factory: Any) -> None:
        run = Run(self._recording(tmp_path_factory))
        for path, expected in stored_values(run.path).items():
            found = run.variable(path)
            part = found.isel(step=run.steps) if "step" in found.dims else found
            assert same(part.values, expected), path

    def test_its_groups_fit_together(self, tmp_path_factory: Any) -> None:
        run = Run(self._recording(tmp_path_factory))
        nodes = {node.path.strip("/"): node.to_dataset(inherit=False) for node in run.tree.subtree}
        sizes = {
            group: {str(name): size for name, size in data.sizes.items()}
            for group, data in nodes.items()
        }
        labels = {
            group: {str(name): c.values for name, c in data.coords.items()}
            for group, data in nodes.items()
        }
        assert list(broken(sizes, labels, run.attributes.model.f or 1)) == []

    def test_it_verifies(self, tmp_path_factory: Any) -> None:
        verification = verify(Run(self._recording(tmp_path_factory)))
        failed = {check.name: check.detail for check in verification if check.verdict == "failed"}
        assert {
            name: detail for name, detail in failed.items() if name not in self.not_proven
        } == {}
        proven = {
            check.name for check in verification if check.verdict in ("exact", "within tolerance")
        }
        assert {"manifest", "committed", "schema", "labels"} <= proven

    def test_a_flipped_bit_is_found(self, tmp_path_factory: Any, tmp_path: Path) -> None:
        """The checksums and digests are really there."""
        copy = shutil.copytree(self._recording(tmp_path_factory), tmp_path / "copy.zarr")
        chunk = min((copy / "latents" / "latents").glob("c*"))
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
        assert "manifest" in [
            check.name for check in verify(Run(copy)) if check.verdict == "failed"
        ]
        try:
            _ = Run(copy).variable("latents/latents").values
        except ValueError:
            return
        raise AssertionError("its chunks have no checksum")


class ReaderConformance:
    """What every reader has to keep."""

    @abstractmethod
    def read(self, path: Path) -> Mapping[str, Any]:
        """Return every variable that the reader knows by path: the committed steps.

        Raise an error of any kind for a recording that is refused.
        """

    def _agrees(self, path: Path) -> None:
        values, expected = self.read(path), stored_values(path)
        assert {"latents/latents", "latents/prediction"} <= values.keys()
        for name, value in values.items():
            assert name in expected, f"{name} is not in the recording"
            assert same(value, expected[name]), f"{name} has other values than the recording"

    def test_a_complete_recording(self, tmp_path: Path) -> None:
        self._agrees(synthetic_recording(tmp_path / "complete.zarr"))

    def test_pictures_that_are_not_square_and_several(self, tmp_path: Path) -> None:
        self._agrees(
            synthetic_recording(
                tmp_path / "wide.zarr", images=2, size=(6, 10), negative_prompt="a blue dog"
            )
        )

    def test_a_run_without_guidance(self, tmp_path: Path) -> None:
        path = synthetic_recording(tmp_path / "unguided.zarr", guidance_scale=1)
        self._agrees(path)
        assert "latents/prediction_uncond" not in self.read(path)

    def test_only_committed_steps_are_read(self, tmp_path: Path) -> None:
        for status in ("interrupted", "failed", "running"):
            path = synthetic_recording(tmp_path / f"{status}.zarr", status=status)
            self._agrees(path)
            assert len(self.read(path)["latents/latents"]) == 2

    def test_what_it_does_not_know_is_passed_over(self, tmp_path: Path) -> None:
        self._agrees(synthetic_recording(tmp_path / "unknown.zarr", unknown=True))

    def test_another_format_is_refused(self, tmp_path: Path) -> None:
        path = synthetic_recording(tmp_path / "future.zarr")
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"]["format_version"] = max(FORMATS_READ) + 1
        (path / "zarr.json").write_text(json.dumps(root))
        self._refuses(path, "a format that it does not know")

    def test_a_damaged_chunk_is_refused(self, tmp_path: Path) -> None:
        path = synthetic_recording(tmp_path / "damaged.zarr")
        chunk = min((path / "latents" / "latents").glob("c*"))
        chunk.write_bytes(chunk.read_bytes()[:-8] + bytes(8))
        self._refuses(path, "values that do not hold their checksum")

    def _refuses(self, path: Path, what: str) -> None:
        try:
            self.read(path)
        except Exception:
            return
        raise AssertionError(f"it reads {what}")
