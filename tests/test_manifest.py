"""The manifest sees every change; annotations and pictures leave it true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xarray as xr
from stored import ATTRIBUTES, CALLS, check_prefix, contents, layout, recorded

from probe.proof.checks import files_of
from probe.writing.store import MANIFEST, RunWriter, manifest

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_the_manifest_sees_every_change(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.zarr")
    listed = json.loads((path / MANIFEST).read_text())
    assert set(listed) == {name for name in contents(path) if name != MANIFEST}
    for name, content in contents(path).items():
        if name == MANIFEST:
            continue
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        (path / name).write_bytes(flipped)
        try:
            assert manifest(path)[name] != listed[name], name
        except ValueError:
            assert name == "zarr.json"  # it is not even JSON any more
        (path / name).write_bytes(content)
    chunk = path / "latents/latents/c.2.0.0.0.0"
    content = chunk.read_bytes()
    chunk.unlink()
    assert listed.keys() - manifest(path).keys() == {"latents/latents/c.2.0.0.0.0"}
    chunk.write_bytes(content)
    (path / "latents/new").write_text("")
    assert manifest(path).keys() - listed.keys() == {"latents/new"}
    (path / "latents/new").unlink()
    assert manifest(path) == listed
    for name in ("holiday.png", "latents/picture.png"):
        (path / name).write_bytes(b"not drawn of it")
        assert manifest(path).keys() - listed.keys() == {name} == files_of(path) - listed.keys()
        (path / name).unlink()


def test_pictures_and_leftovers_are_not_in_the_manifest_and_leftovers_are_removed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.zarr"
    with RunWriter(path, layout(), ATTRIBUTES) as writer:
        (path / "picture.png").write_bytes(b"a picture")
        (path / "latents" / "zarr.json.0123.partial").write_bytes(b"half")
        (path / "zarr.json.4567.partial").write_bytes(b"half")
        writer.complete()
    names = contents(path)
    assert not [name for name in names if name.endswith(".partial")] and "picture.png" in names
    listed = json.loads((path / MANIFEST).read_text())
    assert not [name for name in listed if name.endswith((".png", ".partial"))]
    (path / "picture.png").write_bytes(b"another")
    (path / "latents" / "x.partial").write_bytes(b"of a later writer")
    assert manifest(path) == listed
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["status"] = "failed"
    (path / "zarr.json").write_text(json.dumps(root))
    assert manifest(path) == listed, "the status changes after the manifest"
    root["attributes"]["experiment"]["seed"] = 1
    (path / "zarr.json").write_text(json.dumps(root))
    assert manifest(path) != listed


def test_annotations_keep_the_consolidated_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with RunWriter(path, layout(), ATTRIBUTES) as writer:
        before = json.loads((path / "zarr.json").read_text())
        writer.annotate(decoded_in_float32=True, note="é ☃")
        after = json.loads((path / "zarr.json").read_text())
        assert (
            after["consolidated_metadata"] == before["consolidated_metadata"]
            and after["consolidated_metadata"]["metadata"]
        )
        assert after["attributes"] == {
            **before["attributes"],
            "decoded_in_float32": True,
            "note": "é ☃",
        }
        writer.complete()
    root = json.loads((path / "zarr.json").read_text())
    assert set(root["consolidated_metadata"]["metadata"]) >= {made.path for made in layout()}
    assert root["attributes"]["note"] == "é ☃"


def test_a_flipped_bit_in_a_chunk_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.zarr")
    for name in (
        "latents/latents",
        "attention/4x4/cross",
        "attention/4x4/moments",
        "committed",
        "sigma",
    ):
        chunk = next(file for file in sorted((path / name).iterdir()) if file.name.startswith("c"))
        content = bytearray(chunk.read_bytes())
        content[5] ^= 4
        chunk.write_bytes(content)
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)checksum|crc"):
            _ = xr.open_datatree(path, engine="zarr", chunks=None)[name].values
        content[5] ^= 4
        chunk.write_bytes(content)
    assert check_prefix(path) == CALLS
