"""`verify` calls a sound recording sound, and names the right check for each thing that is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from test_recorder import at_call, pipeline, take, throw

from probe import hooks
from probe.recording import Run
from probe.store import MANIFEST, manifest
from probe.verify import Check, main, verify

ASKED = {"steps": 5, "images": 2, "guidance_rescale": 0.3, "capture": {"branches": "both"}}


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def failed(path: Path) -> set[str]:
    return {name for name, verdict in verdicts(verify(Run(path))).items() if verdict == "failed"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return take(tmp_path_factory.mktemp("sound"), **ASKED).path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "EulerAncestral", "DPM++2M", "Heun", "LCM"])
def test_a_sound_recording_is_exact(scheduler: str, tmp_path: Path) -> None:
    run = take(tmp_path, **{**ASKED, "scheduler": scheduler})
    assert verdicts(verify(run)) == {
        "manifest": "exact",
        "committed": "exact",
        "softmax": "within tolerance",
        "guidance": "exact",
        "scheduler": "exact",
    }


@pytest.mark.parametrize("changes", [{"guidance_scale": 1.0}, {"capture": {"attention": "off"}}, {"capture": {"dtype": "sqrt_u8"}}, {"eta": 0.7}])
def test_other_requests_are_sound_too(changes: dict[str, object], tmp_path: Path) -> None:
    asked = {**ASKED, "scheduler": "DDIM", "capture": {"branches": "cond"}, **changes}
    assert not failed(take(tmp_path, **asked).path)


# --- planted on disk: the manifest says it ---------------------------------------------------------------------------


def flip(path: Path) -> None:
    file = next(path.glob("latents/prediction/c.2.*"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))


def drop(path: Path) -> None:
    next(path.glob("attention/8x8/cross/c.1.*")).unlink()


def truncate(path: Path) -> None:
    file = next(path.glob("attention/8x8/cross/c.1.*"))
    file.write_bytes(file.read_bytes()[:-50])


def edit(path: Path) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["experiment"]["seed"] += 1
    (path / "zarr.json").write_text(json.dumps(root))


def uncommit(path: Path) -> None:
    zarr.open_array(path, path="committed", mode="r+")[2] = 0


def add(path: Path) -> None:
    (path / "latents/new.json").write_text("{}")


@pytest.mark.parametrize("plant", [flip, drop, truncate, edit, uncommit, add])
def test_the_manifest_sees_what_changed_on_disk(plant: Callable[[Path], None], copy: Path) -> None:
    plant(copy)
    assert "manifest" in failed(copy)


def test_pictures_for_people_may_change(copy: Path) -> None:
    (copy / "picture.png").write_bytes(b"another")
    assert not failed(copy)


# --- planted consistently, digests and checksums included: the other checks say it -----------------------------------


def change(path: Path, variable: str, alter: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite step 2 of a variable, and the manifest with it, as a faulty recorder would have written them."""
    array = zarr.open_array(path, path=variable, mode="r+")
    array[2] = alter(np.asarray(array[2]))
    (path / MANIFEST).write_text(json.dumps(manifest(path)))


def one_ulp(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flat[7] = np.nextafter(values.flat[7], np.inf, dtype=values.dtype)
    return values


@pytest.mark.parametrize(
    ("variable", "alter", "check"),
    [
        ("latents/latents", one_ulp, {"scheduler"}),
        ("latents/prediction", one_ulp, {"guidance", "scheduler"}),
        ("latents/prediction_cond", lambda p: p[::-1], {"guidance"}),
        ("latents/prediction_uncond", one_ulp, {"guidance"}),
        ("attention/8x8/cross", lambda maps: maps * np.float16(1.01), {"softmax"}),
        ("attention/8x8/cross", lambda maps: np.where(maps == maps.max(), np.nan, maps), {"softmax"}),
    ],
    ids=["latent", "prediction", "images swapped", "uncond", "maps scaled", "maps NaN"],
)
def test_what_a_faulty_recorder_would_write_is_seen(variable: str, alter: Callable[[np.ndarray], np.ndarray], check: set[str], copy: Path) -> None:
    change(copy, variable, alter)
    found = failed(copy)
    # one ulp of an input may round away in the guided sum of that one value, never the check it is for
    assert found & check and "manifest" not in found, found


def test_the_seed_is_part_of_what_is_checked(copy: Path) -> None:
    edit(copy)
    (copy / MANIFEST).write_text(json.dumps(manifest(copy)))
    assert failed(copy) == {"scheduler"}


def test_an_interrupted_run_verifies_its_prefix(tmp_path: Path) -> None:
    pipe = pipeline()
    with pytest.raises(KeyboardInterrupt), hooks.Hooks([(pipe.unet, "input", at_call(4, throw(KeyboardInterrupt())))]):
        take(tmp_path, pipe, **ASKED)
    (path,) = tmp_path.glob("*.zarr")
    found = {check.name: check for check in verify(Run(path))}
    assert found["committed"].detail.startswith("4 of 6 steps")
    assert (found["guidance"].verdict, found["scheduler"].verdict, found["manifest"].verdict) == ("exact", "exact", "not checked")


def test_another_machine_is_named_and_has_a_tolerance(copy: Path) -> None:
    """A recording that says it was made on CUDA, one value off by little: within tolerance; off by much: failed."""
    root = json.loads((copy / "zarr.json").read_text())
    root["attributes"]["environment"]["device"] = "cuda"
    (copy / "zarr.json").write_text(json.dumps(root))
    change(copy, "latents/prediction", lambda values: values * np.float32(1.00001))
    found = {check.name: check for check in verify(Run(copy))}
    assert (found["guidance"].verdict, found["scheduler"].verdict) == ("within tolerance", "within tolerance")
    assert "device cuda there, cpu here" in found["guidance"].detail
    change(copy, "latents/prediction", lambda values: values + np.float32(0.1))
    assert {"guidance", "scheduler"} <= failed(copy)


def test_the_command_says_it_with_its_exit_code(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy)]) == 0
    assert "the same bits" in capsys.readouterr().out
    flip(copy)
    assert main([str(copy)]) == 1
    assert "manifest   failed" in capsys.readouterr().out
