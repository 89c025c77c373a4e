"""The manifest sees every change; annotations and pictures leave it true."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from stored import ATTRIBUTES, CALLS, check_prefix, contents, layout, put, recorded

from probe.proof.checks import files_of
from probe.writing import layout as laid_out
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


def test_files_may_be_hashed_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no step's file is read back, and the manifest is the same."""
    path, read, own = tmp_path / "a.zarr", list[str](), Path.read_bytes

    def seen(self: Path) -> bytes:
        read.append(self.as_posix())
        return own(self)

    with RunWriter(path, layout(), ATTRIBUTES, hashing=True) as writer:
        for step in range(CALLS):
            put(writer, step)
        for value in (3.0, np.nan, 5.0):  # written, removed, and written again
            writer.write("latents/final_latents", np.full((1, 4, 8, 8), value))
        writer.write("cost/peak_memory", 7)
        writer.write("cost/peak_memory", 0)  # its fill value: no file
        monkeypatch.setattr(Path, "read_bytes", seen)
        writer.complete()
        monkeypatch.undo()
    assert not [name for name in read if "/c." in name and "latents" in name], read
    listed = json.loads((path / MANIFEST).read_text())
    assert listed == manifest(path) and list(listed) == list(manifest(path))
    assert set(listed) == {name for name in contents(path) if name != MANIFEST}


def test_what_changed_after_it_was_written_is_found_where_files_are_hashed(tmp_path: Path) -> None:
    path, name = tmp_path / "a.zarr", "latents/latents/c.1.0.0.0.0"
    with RunWriter(path, layout(), ATTRIBUTES, hashing=True) as writer:
        for step in range(CALLS):
            put(writer, step)
        writer.flush()
        (path / name).write_bytes((path / name).read_bytes()[::-1])
        writer.complete()
    listed = json.loads((path / MANIFEST).read_text())
    assert {each for each in listed if listed[each] != manifest(path)[each]} == {name}


def test_the_root_lists_every_node_as_json_does(tmp_path: Path) -> None:
    """Each node is made into text once, and put into the root's."""
    attributes: dict[str, Any] = {**ATTRIBUTES, "odd": {'"metadata": {}': "a\n b"}}
    (tmp_path / "b").mkdir()
    laid_out.create(tmp_path / "b", layout(), attributes)
    text = (tmp_path / "b" / "zarr.json").read_text()
    root = json.loads(text)
    assert text == json.dumps(root, indent=2) and root["attributes"] == attributes
    nodes = root["consolidated_metadata"]["metadata"]
    below = {file.parent for file in (tmp_path / "b").rglob("zarr.json")} - {tmp_path / "b"}
    assert set(nodes) == {os.path.relpath(folder, tmp_path / "b") for folder in below}
    for name, node in nodes.items():
        own = json.loads((tmp_path / "b" / name / "zarr.json").read_text())
        node.pop("consolidated_metadata", None)
        assert own == node, name
    (tmp_path / "c").mkdir()
    laid_out.create(tmp_path / "c", [], {})
    text = (tmp_path / "c" / "zarr.json").read_text()
    assert text == json.dumps(laid_out.group({}, {}), indent=2)
