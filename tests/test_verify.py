"""A recording that is what it says it is passes; each thing planted on disk is caught by the check that is there for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from test_recorder import FULL, OFF, ROOT, at_call, only, pipeline, take, throw

from probe import hooks
from probe.errors import RecordingNotFound
from probe.recording import Run
from probe.store import MANIFEST, manifest
from probe.verify import Check, main, verify

NAMES = ["manifest", "committed", "softmax", "guidance", "scheduler"]


def verdicts(run: Run) -> dict[str, str]:
    return {check.name: check.verdict for check in verify(run)}


def found(run: Run, name: str) -> Check:
    return next(check for check in verify(run) if check.name == name)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("intact"), scheduler="DDIM", images=2, capture={"branches": "both"})


@pytest.fixture
def copy(intact: Run, tmp_path: Path) -> Run:
    """A recording to plant things in."""
    shutil.copytree(intact.path, tmp_path / intact.path.name)
    return Run(tmp_path / intact.path.name)


def rewrite(run: Run, variable: str, change: Callable[[np.ndarray], Any], consistent: bool = True) -> Run:
    """Change values of a variable through zarr, checksums and all, and write a manifest that agrees."""
    array: Any = zarr.open_array(run.path, path=variable, mode="r+")
    values = np.array(array[:])
    change(values)
    array[:] = values
    if consistent:
        (run.path / MANIFEST).write_text(json.dumps(manifest(run.path)))
    return Run(run.path)


def put(at: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(at, value)


def one_ulp(values: np.ndarray) -> None:
    values[2].flat[7] = np.nextafter(values[2].flat[7], np.inf, dtype=values.dtype)


def add(at: Any, value: float) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(at, values[at] + np.float32(value))


# --- what is in order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduler": "DDIM", "eta": 0.5},
        {"scheduler": "EulerAncestral"},
        {"scheduler": "DPM++2M", "scheduler_options": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}},
        {"scheduler": "Heun"},
        {"scheduler": "DDPM"},
        {"scheduler": "KDPM2Ancestral"},
        {"scheduler": "LMS"},
        {"scheduler": "LCM"},
    ],
    ids=lambda changes: changes.get("scheduler", "PNDM"),
)
def test_a_fresh_run_verifies_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    run = take(tmp_path, images=2, guidance_rescale=0.3, steps=5, capture=OFF, **changes)
    kinds = {"manifest": "exact", "committed": "exact", "softmax": "not checked", "guidance": "exact", "scheduler": "exact"}
    assert verdicts(run) == kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheduler", ["default", "EulerAncestral"])
def test_half_precision_verifies_to_the_bit_too(scheduler: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run = take(tmp_path, pipeline(dtype), scheduler=scheduler, guidance_rescale=0.3, capture=OFF)
    assert {check.verdict for check in verify(run)} == {"exact", "not checked"}


def test_maps_of_every_kind_verify(intact: Run, tmp_path: Path) -> None:
    assert verdicts(intact) == dict.fromkeys(NAMES, "exact") | {"softmax": "within tolerance"}
    for dtype in ("float32", "sqrt_u8"):
        run = take(tmp_path, steps=2, capture={**FULL, "dtype": dtype}, guidance_scale=2.0)
        assert verdicts(run)["softmax"] == "within tolerance", dtype


def test_a_run_without_guidance_verifies(tmp_path: Path) -> None:
    assert found(take(tmp_path, guidance_scale=1.0, capture=OFF), "guidance").verdict == "exact"


def test_nan_that_was_recorded_on_purpose_is_no_fault(tmp_path: Path) -> None:
    pipe = pipeline()
    bias = pipe.unet.conv_out.bias.detach().clone()

    def spoil() -> None:
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("nan"))

    try:
        with hooks.Hooks([(pipe.unet, "input", at_call(2, spoil))]):
            run = take(tmp_path, scheduler="DDIM", on_nan="record", capture=OFF)
    finally:
        with torch.no_grad():
            pipe.unet.conv_out.bias.copy_(bias)
    assert {check.verdict for check in verify(run)} == {"exact", "not checked"}
    planted = rewrite(run, "latents/latents", put((1, 0, 0, 0, 0), np.nan))
    assert found(planted, "scheduler").verdict == "failed"


def test_an_interrupted_run_verifies_its_prefix(tmp_path: Path) -> None:
    pipe = pipeline()
    with hooks.Hooks([(pipe.unet, "input", at_call(3, throw(KeyboardInterrupt())))]), pytest.raises(KeyboardInterrupt):
        take(tmp_path, scheduler="EulerAncestral", images=2)
    run = only(tmp_path)
    kinds = {"manifest": "not checked", "committed": "within tolerance", "softmax": "within tolerance", "guidance": "exact", "scheduler": "exact"}
    assert verdicts(run) == kinds
    assert "3 of 4 steps; the run is interrupted" in found(run, "committed").detail
    planted = rewrite(run, "latents/latents", add((2, 0, 0, 0, 0), 0.1), consistent=False)
    assert found(planted, "scheduler").verdict == "failed"


def test_a_run_that_was_stopped_at_once_verifies(tmp_path: Path) -> None:
    pipe = pipeline()
    with hooks.Hooks([(pipe.unet, "input", at_call(0, throw(KeyboardInterrupt())))]), pytest.raises(KeyboardInterrupt):
        take(tmp_path)
    assert "failed" not in verdicts(only(tmp_path)).values()


# --- what is planted: the files ---------------------------------------------------------------------------------------

CHUNK = "latents/prediction/c.1.0.0.0.0"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def edit(file: Path, keys: list[str], value: Any) -> None:
    root = json.loads(file.read_text())
    at = root
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    file.write_text(json.dumps(root))


PLANTS: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    # what: (how, what the manifest says, which other checks fail)
    "a flipped bit in a prediction": (lambda path: flip(path / CHUNK, 7), f"1 files changed: {CHUNK}", ["guidance", "scheduler"]),
    "a flipped bit in a map": (
        lambda path: flip(path / "attention/8x8/cross/c.1.0.0.0.0.0.0.0", 9),
        "1 files changed: attention/8x8/cross",
        ["softmax"],
    ),
    "a flipped bit in the picture": (lambda path: flip(path / "images/final/c.0.0.0.0", 9), "1 files changed: images/final", []),
    "a deleted chunk": (lambda path: (path / CHUNK).unlink(), f"1 files missing: {CHUNK}", ["guidance", "scheduler"]),
    "a deleted map": (lambda path: (path / "attention/4x4/cross/c.2.0.0.0.0.0.0.0").unlink(), "1 files missing: attention/4x4/cross", ["softmax"]),
    "a truncated chunk": (
        lambda path: (path / CHUNK).write_bytes((path / CHUNK).read_bytes()[:-9]),
        f"1 files changed: {CHUNK}",
        ["guidance", "scheduler"],
    ),
    "an empty chunk": (lambda path: (path / CHUNK).write_bytes(b""), f"1 files changed: {CHUNK}", ["guidance", "scheduler"]),
    "a committed flag": (
        lambda path: rewrite(Run(path), "committed", put(2, 0), consistent=False),
        "1 files changed: committed/c.0",
        ["committed", "scheduler"],
    ),
    "a new file": (lambda path: (path / "latents/note.txt").write_text("mine"), "1 files new: latents/note.txt", []),
    "another guidance scale": (
        lambda path: edit(path / "zarr.json", ["attributes", "experiment", "guidance_scale"], 7.25),
        "1 files changed: zarr.json",
        ["guidance"],
    ),
    "another seed": (lambda path: edit(path / "zarr.json", ["attributes", "experiment", "seed"], 4), "1 files changed: zarr.json", ["scheduler"]),
    "another prompt": (lambda path: edit(path / "zarr.json", ["attributes", "experiment", "prompt"], "a hat"), "1 files changed: zarr.json", []),
    "another scheduler": (
        lambda path: edit(path / "zarr.json", ["attributes", "scheduler", "class"], "torch"),
        "1 files changed: zarr.json",
        ["scheduler"],
    ),
    "a dtype of fancy": (
        lambda path: edit(path / "zarr.json", ["attributes", "model", "dtype"], "nonsense"),
        "1 files changed: zarr.json",
        ["guidance", "scheduler"],
    ),
    "attributes of an array": (
        lambda path: edit(path / "latents/latents/zarr.json", ["attributes", "long_name"], "x"),
        "1 files changed: latents/latents/zarr.json",
        [],
    ),
}


@pytest.mark.parametrize("what", PLANTS)
def test_what_is_done_to_a_file_is_caught(what: str, copy: Run) -> None:
    plant, said, others = PLANTS[what]
    plant(copy.path)
    checks = {check.name: check for check in verify(Run(copy.path))}
    assert checks["manifest"].verdict == "failed" and checks["manifest"].detail.startswith(said)
    assert [name for name, check in checks.items() if check.verdict == "failed" and name != "manifest"] == others


def test_pictures_and_the_status_are_not_in_the_manifest(copy: Run) -> None:
    (copy.path / "picture-0.png").unlink()
    (copy.path / "contact-sheet.png").write_bytes(b"mine")
    edit(copy.path / "zarr.json", ["attributes", "status"], "failed")
    assert found(Run(copy.path), "manifest").verdict == "exact"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"zarr.json": 3}'])
def test_a_manifest_that_is_none_fails(text: str, copy: Run) -> None:
    (copy.path / MANIFEST).write_text(text)
    assert found(Run(copy.path), "manifest").verdict == "failed"


def test_a_complete_run_without_a_manifest_fails(copy: Run) -> None:
    (copy.path / MANIFEST).unlink()
    assert found(Run(copy.path), "manifest").verdict == "failed"


# --- what is planted: the values, with a manifest that agrees ---------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "change", "caught"),
    [
        ("committed", put(2, 0), {"committed", "scheduler"}),
        ("committed", put(-1, 0), {"committed", "scheduler"}),
        ("latents/latents", add((2, 1, 0, 0, 0), 1e-5), {"scheduler"}),
        ("latents/latents", add((0, 0, 0, 0, 0), 1e-5), {"scheduler"}),
        ("latents/latents", one_ulp, {"scheduler"}),
        ("latents/prediction_cond", lambda values: values.__setitem__(2, values[2, ::-1].copy()), {"guidance"}),
        ("latents/final_latents", add((0, 0, 0, 0), 1e-4), {"scheduler"}),
        ("latents/prediction", add((1, 0, 2, 3, 3), 1e-4), {"guidance", "scheduler"}),
        ("latents/prediction_cond", add((1, 0, 2, 3, 3), 1e-4), {"guidance"}),
        ("latents/prediction_uncond", add((1, 0, 2, 3, 3), 1e-4), {"guidance"}),
        ("latents/prediction_uncond", put((1, 0, 2, 3, 3), np.nan), {"guidance"}),
        ("attention/8x8/cross", lambda values: values.__imul__(np.float16(1.002)), {"softmax"}),
        ("attention/4x4/cross", put((1, 2, 1, 0, 0, 0, 0, 0), 0.3), {"softmax"}),
        ("attention/4x4/cross", put((1, 2, 1, 0, 0, 0, 0, 0), np.nan), {"softmax"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_changed_values_are_caught_by_what_must_hold_between_them(
    variable: str, change: Callable[[np.ndarray], Any], caught: set[str], copy: Run
) -> None:
    planted = verdicts(rewrite(copy, variable, change))
    assert planted["manifest"] == "exact"
    assert {name for name, verdict in planted.items() if verdict == "failed"} == caught


def test_meta_rewriting_without_a_change_is_no_fault(copy: Run) -> None:
    for variable in ("committed", "latents/latents", "attention/8x8/cross"):
        assert "failed" not in verdicts(rewrite(copy, variable, lambda values: None)).values()


# --- another machine, and the command ---------------------------------------------------------------------------------


def test_a_recording_of_another_machine_may_differ_a_little(copy: Run) -> None:
    rewrite(copy, "latents/prediction", add((1, 0, 2, 3, 3), 1e-5))
    edit(copy.path / "zarr.json", ["attributes", "environment", "device"], "cuda")
    for name in ("guidance", "scheduler"):
        check = found(Run(copy.path), name)
        assert check.verdict == "within tolerance" and "device cuda there, cpu here" in check.detail
    rewrite(copy, "latents/prediction", add((1, 0, 2, 3, 3), 10))
    assert found(Run(copy.path), "guidance").verdict == found(Run(copy.path), "scheduler").verdict == "failed"


def test_the_command_says_what_it_found(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy.path)]) == main(["latest", "--runs", str(copy.path.parent)]) == main([copy.name[:12], "--runs", str(copy.path.parent)]) == 0
    said = capsys.readouterr().out
    assert f"{copy.name} (complete)" in said and all(name in said for name in NAMES)
    flip(copy.path / CHUNK, 7)
    assert main([str(copy.path)]) == 1
    assert f"manifest   failed            1 files changed: {CHUNK}" in capsys.readouterr().out
    with pytest.raises(RecordingNotFound):
        main(["no-such-run", "--runs", str(copy.path.parent)])


def test_the_exit_code_of_the_process(copy: Run) -> None:
    flip(copy.path / CHUNK, 7)
    failed = subprocess.run([sys.executable, "-m", "probe.verify", str(copy.path)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert failed.returncode == 1 and "failed" in failed.stdout and "Traceback" not in failed.stderr
