"""probe.testing makes recordings without torch, and its tests find a wrong writer or reader."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from recordings import with_its_digests

from probe.proof.verdict import verify
from probe.reading.recording import Run, open_run
from probe.testing.conformance import ReaderConformance, WriterConformance, stored_values
from probe.testing.synthetic import NOT_PROVEN, synthetic_recording


class TestSynthetic(WriterConformance):
    """The makers of small recordings are themselves a writer."""

    not_proven = NOT_PROVEN

    def write(self, folder: Path) -> Path:
        return synthetic_recording(
            folder / "cat.zarr", images=2, size=(6, 10), negative_prompt="a dog", pictures=True
        )


class TestUnknown(WriterConformance):
    """One that adds what nobody knows is a writer all the same."""

    not_proven = NOT_PROVEN

    def write(self, folder: Path) -> Path:
        return synthetic_recording(folder / "cat.zarr", unknown=True, guidance_scale=1, steps=2)


class TestOurReader(ReaderConformance):
    def read(self, path: Path) -> dict[str, np.ndarray]:
        run = Run(path)
        found = {}
        for node in run.tree.subtree:
            for name, variable in node.to_dataset(inherit=False).variables.items():
                part = variable.isel(step=run.steps) if "step" in variable.dims else variable
                found[f"{node.path}/{name}".strip("/")] = part.values
        return found


# --- the tests find what is wrong -----------------------------------------------------------------


def run_tests(suite: Any, tmp_path: Path, only: Collection[str] = ()) -> dict[str, str]:
    """Call every test of a conformance class by hand, or some; return the names of those that fail,
    and why.
    """

    class Factory:
        def mktemp(self, name: str) -> Path:
            (tmp_path / name).mkdir()
            return tmp_path / name

    failed = {}
    for name in [
        name for name in dir(suite) if name.startswith("test_") and (name in only or not only)
    ]:
        (own := tmp_path / name).mkdir()
        function = getattr(suite, name)
        wanted = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        given = {"tmp_path": own, "tmp_path_factory": Factory()}
        try:
            function(**{key: given[key] for key in wanted})
        except Exception as error:
            failed[name] = str(error)
    return failed


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        root = json.loads((path / "zarr.json").read_text())
        change(root)
        (path / "zarr.json").write_text(json.dumps(root))

    return spoil


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no attributes": (
        edited(lambda root: root["attributes"].pop("model")),
        "test_its_attributes_are_those_of_the_format",
    ),
    "an older format": (
        edited(lambda root: root["attributes"].update(format_version=1)),
        "test_its_attributes_are_those_of_the_format",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "test_it_verifies"),
    "no consolidated metadata": (
        edited(lambda root: root.pop("consolidated_metadata")),
        "test_it_verifies",
    ),
    "a step that is not committed": (
        lambda path: (path / "committed" / "c.0").unlink(),
        "test_it_verifies",
    ),
    "a link": (lambda path: (path / "more").symlink_to(path), "test_it_is_named_as_a_recording"),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_writer_that_is_wrong_is_found(what: str, tmp_path: Path) -> None:
    spoil, expected = WRITERS[what]

    class Wrong(WriterConformance):
        not_proven = NOT_PROVEN

        def write(self, folder: Path) -> Path:
            path = synthetic_recording(folder / "cat.zarr", steps=2)
            spoil(path)
            return path

    assert expected in run_tests(Wrong(), tmp_path)


def naive(path: Path) -> dict[str, np.ndarray]:
    """A reader that believes everything."""
    with xr.open_datatree(path, engine="zarr") as tree:
        return {
            f"latents/{name}": found.values for name, found in tree["latents"].data_vars.items()
        }


def half(path: Path) -> dict[str, np.ndarray]:
    """A reader that loses precision."""
    return {
        name: value.astype(np.float16) if value.dtype == np.float32 else value
        for name, value in stored_values(path).items()
    }


def test_a_reader_that_is_wrong_is_found(tmp_path: Path) -> None:
    for believes, expected in (
        (naive, {"test_only_committed_steps_are_read", "test_another_format_is_refused"}),
        (half, {"test_a_complete_recording", "test_another_format_is_refused"}),
        (lambda _: {}, {"test_a_complete_recording", "test_a_damaged_chunk_is_refused"}),
    ):

        class Wrong(ReaderConformance):
            def read(self, path: Path, believes: Any = believes) -> Any:
                return believes(path)

        (folder := tmp_path / f"{len(list(tmp_path.iterdir()))}").mkdir()
        assert run_tests(Wrong(), folder, expected).keys() == expected


# --- what another version adds --------------------------------------------------------------------


def test_what_another_version_adds_is_not_checked_and_nothing_fails_for_it(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "a.zarr", unknown=True)
    edited(lambda root: root["attributes"].update(family="flux", guidance_rule="distilled"))(path)
    checks = {check.name: check for check in verify(Run(with_its_digests(path)))}
    assert {name for name, check in checks.items() if check.verdict == "failed"} <= set(NOT_PROVEN)
    assert checks["unknown"].verdict == checks["guidance"].verdict == "not checked"
    assert checks["guidance"].detail == "this version does not know the rule distilled"
    for what in (
        "future/mystery",
        "the attribute of_the_future",
        "the family flux",
        "the guidance rule distilled",
    ):
        assert what in checks["unknown"].detail


def test_nothing_is_said_where_all_is_known(tmp_path: Path) -> None:
    assert "unknown" not in {
        check.name for check in verify(Run(synthetic_recording(tmp_path / "a.zarr", steps=1)))
    }


# --- the recordings -------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_values(tmp_path: Path) -> None:
    one, other, third = (
        synthetic_recording(tmp_path / f"{name}.zarr", seed=seed, steps=2)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    values = [stored_values(path) for path in (one, other, third)]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])
    assert not np.array_equal(values[0]["latents/latents"], values[2]["latents/latents"])


@pytest.mark.parametrize("status", ["complete", "interrupted", "failed", "running"])
def test_every_status(status: str, tmp_path: Path) -> None:
    run = open_run(synthetic_recording(tmp_path / "a.zarr", status=status))
    assert run.status == status and len(run.steps) == (4 if status == "complete" else 2)
    assert run.word_overview().sizes["word"] == 3 and run.denoised().sizes["step"] == len(run.steps)
    assert run.phrase("red cat").sizes["step"] == len(run.steps)


def test_they_are_made_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from probe.testing.synthetic import "
        "synthetic_recording; "
        f"synthetic_recording(Path({str(tmp_path)!r}) / 'a.zarr', steps=1); assert not {{'torch', "
        f"'diffusers', 'pytest'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
