"""Recordings of format 1, made by the code at commit fc5c2b4, open, read and verify for ever.

`format_1/` holds three: a default one, a noising, and one whose writer was killed after two of four
steps. The last goes on where it was killed. Beside each lie the verdicts that `probe verify` gave
then, and a digest of every variable's values as stock xarray read them.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from machines import resumed

from probe.proof.verdict import verify
from probe.reading.recording import Run, open_run

FOLDER = Path(__file__).parent / "format_1"
KINDS = ("default", "noising", "interrupted")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("format-1")
    for kind in KINDS:
        with zipfile.ZipFile(FOLDER / f"{kind}.zip") as archive:
            archive.extractall(folder)
    return {kind: folder / f"{kind}.zarr" for kind in KINDS}


def said(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text())
    return found


def digests(tree: xr.DataTree, steps: int) -> dict[str, str]:
    """The first 16 digits of the SHA-256 of each variable's values, of the first `steps` steps."""
    found = {}
    for node in tree.subtree:
        for name, variable in node.to_dataset(inherit=False).variables.items():
            values = (
                variable.isel(step=slice(steps)) if "step" in variable.dims else variable
            ).values
            raw = (
                json.dumps(values.tolist()).encode()
                if values.dtype.kind in "OTU"
                else np.ascontiguousarray(values).tobytes()
            )
            found[f"{node.path}/{name}".strip("/")] = hashlib.sha256(raw).hexdigest()[:16]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_and_every_value_is_what_it_was(recordings: dict[str, Path], kind: str) -> None:
    run = open_run(recordings[kind])
    assert len(run.steps) == said(kind)["steps"]
    assert digests(run.tree, len(run.steps)) == said(kind)["values"]
    assert (
        digests(xr.open_datatree(run.path, engine="zarr"), len(run.steps)) == said(kind)["values"]
    ), "stock xarray reads the same"
    assert run.status == ("interrupted" if kind == "interrupted" else "complete")
    assert run.word_overview().sizes["word"] and repr(run)


def test_draws_of_noise_are_called_so(recordings: dict[str, Path]) -> None:
    """Format 1 called them images, and said what was asked as an experiment too."""
    run = open_run(recordings["noising"])
    raw = json.loads((run.path / "latents" / "latents" / "zarr.json").read_text())
    assert (
        raw["dimension_names"] == ["step", "image", "channel", "y", "x"]
        and "kind" not in run.attributes
    )
    assert (
        run.latents.dims == ("step", "draw", "channel", "y", "x")
        and run.latents.sizes["draw"] == run.noising.noises
    )
    assert not [
        path
        for node in run.tree.subtree
        for path, found in node.dataset.variables.items()
        if "image" in found.dims
    ]
    assert (
        run.kind == "noising"
        and run.recipe is run.noising
        and run.noising.timesteps == tuple(run.variable("timestep").values)
    )
    other = open_run(recordings["default"])
    assert (
        other.kind == "generation"
        and other.recipe is other.experiment
        and other.latents.dims[1] == "image"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "model", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "model"]
)
def test_it_verifies(recordings: dict[str, Path], kind: str, model: bool) -> None:
    then = said(kind)["verify"]["with the model" if model else "without the model"]
    now = {check.name: check for check in verify(open_run(recordings[kind]), model=model)}
    assert {name: check.detail for name, check in now.items() if check.verdict == "failed"} == {}
    assert then.keys() <= now.keys(), "no check was dropped"
    assert [
        name
        for name, verdict in then.items()
        if verdict != "not checked" and now[name].verdict == "not checked"
    ] == []
    lost = [
        name
        for name, verdict in then.items()
        if verdict == "exact" and now[name].verdict != "exact" and not now[name].because
    ]
    assert lost == [], "exact then, and less now without a reason in this machine's conditions"


def test_a_flipped_bit_in_one_is_found(recordings: dict[str, Path], tmp_path: Path) -> None:
    """The verdicts above are worth something: the same check fails where one value differs."""
    with zipfile.ZipFile(FOLDER / "default.zip") as archive:
        archive.extractall(tmp_path)
    file = tmp_path / "default.zarr" / "latents" / "prediction" / "c.1.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    assert "manifest" in [
        check.name for check in verify(Run(tmp_path / "default.zarr")) if check.verdict == "failed"
    ]


def test_the_interrupted_one_goes_on_to_its_end(tmp_path: Path) -> None:
    with zipfile.ZipFile(FOLDER / "interrupted.zip") as archive:
        archive.extractall(tmp_path)
    run = resumed(open_run(tmp_path / "interrupted.zarr"))
    assert run.status == "complete" and len(run.steps) == 4
    assert {check.name: check.detail for check in verify(run) if check.verdict == "failed"} == {}
