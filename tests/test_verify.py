"""A true recording passes, and each fault planted on disk is caught by its check.

test_planted.py has faults that are planted in the recorder itself.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from recordings import only, with_its_digests
from tiny_runs import OFF, ask, at_call, pipeline, take, throw

from probe.analysis.maps import probabilities
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, ModelError, RecordingNotFound
from probe.proof.checks import Check, Tally
from probe.proof.map_checks import ROUNDED, apart, moments_of, relative, rounding, unlike_moments
from probe.proof.replay import rebuild_scheduler
from probe.proof.schema_checks import expected_variables, only_the_model_knows
from probe.proof.verdict import WITH_MODEL, verify
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.verify import main
from probe.watching import hooks
from probe.watching.measures import to_storage
from probe.writing.store import MANIFEST, manifest

ROOT = Path(__file__).parent.parent
NAMES = [
    *("manifest", "digests", "committed", "schema", "labels", "softmax"),
    *("moments", "sums", "picture", "schedule", "guidance", "scheduler"),
]
TOLERANT = {"softmax", "moments"}  # maps are rounded when they are stored


def verdicts(run: Run) -> dict[str, str]:
    return {check.name: check.verdict for check in verify(run)}


def found(run: Run, name: str) -> Check:
    return next(check for check in verify(run) if check.name == name)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(
        tmp_path_factory.mktemp("intact"), scheduler="DDIM", images=2, capture={"branches": "both"}
    )


@pytest.fixture
def copy(intact: Run, tmp_path: Path) -> Run:
    """A recording to plant things in."""
    shutil.copytree(intact.path, tmp_path / intact.path.name)
    return Run(tmp_path / intact.path.name)


def rewrite(
    run: Run, variable: str, change: Callable[[np.ndarray], Any], consistent: bool = True
) -> Run:
    """Change values of a variable through zarr, checksums and all, and write a manifest that
    agrees.
    """
    array: Any = zarr.open_array(run.path, path=variable, mode="r+")
    values = np.array(array[:])
    change(values)
    array[:] = values
    if consistent:
        with_its_digests(run.path)
    return Run(run.path)


def put(at: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(at, value)


def one_ulp(values: np.ndarray) -> None:
    values[2].flat[7] = np.nextafter(values[2].flat[7], np.inf, dtype=values.dtype)


def add(at: Any, value: float) -> Callable[[np.ndarray], None]:
    return lambda values: values.__setitem__(at, values[at] + np.float32(value))


# --- what is in order -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "dtype"),
    [("default", torch.bfloat16), pytest.param("DDPM", torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_fresh_run_verifies_to_the_bit(
    scheduler: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    run = take(
        tmp_path, pipeline(dtype), images=2, guidance_rescale=0.3, scheduler=scheduler, capture=OFF
    )
    assert verdicts(run) == dict.fromkeys(NAMES, "exact") | dict.fromkeys(
        ("softmax", "moments", "sums"), "not checked"
    )


def test_maps_verify_within_the_rounding_of_their_type_which_is_named(intact: Run) -> None:
    found = {check.name: check for check in verify(intact)}
    assert {name: check.verdict for name, check in found.items()} == dict.fromkeys(
        NAMES, "exact"
    ) | dict.fromkeys(TOLERANT, "within tolerance")
    assert {name for name, check in found.items() if check.because == (ROUNDED,)} == TOLERANT


def test_nan_that_was_recorded_on_purpose_is_no_fault(tmp_path: Path) -> None:
    pipe = pipeline()
    bias = pipe.unet.conv_out.bias.detach().clone()

    def spoil() -> None:
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("nan"))

    try:
        with hooks.Hooks([(pipe.unet, "input", at_call(2, spoil))]):
            run = take(
                tmp_path,
                scheduler="DDIM",
                on_nan="record",
                capture={"text": False, "statistics": False},
            )
    finally:
        with torch.no_grad():
            pipe.unet.conv_out.bias.copy_(bias)
    assert [check for check in verify(run) if check.verdict == "failed"] == []
    planted = rewrite(run, "latents/latents", put((1, 0, 0, 0, 0), np.nan))
    assert found(planted, "scheduler").verdict == "failed"
    planted = rewrite(run, "attention/8x8/cross", put((1, 0, 0, 0, 0, 0, 0, 0), np.nan))
    assert {check.name for check in verify(planted) if check.verdict == "failed"} == {
        "softmax",
        "moments",
        "sums",
        "scheduler",
    }


def test_an_interrupted_run_verifies_its_prefix(tmp_path: Path) -> None:
    pipe = pipeline()
    with (
        hooks.Hooks([(pipe.unet, "input", at_call(3, throw(KeyboardInterrupt())))]),
        pytest.raises(KeyboardInterrupt),
    ):
        take(tmp_path, scheduler="EulerAncestral", images=2)
    run = only(tmp_path)
    unknown = dict.fromkeys(("manifest", "sums", "picture"), "not checked")
    assert (
        verdicts(run)
        == dict.fromkeys(NAMES, "exact") | dict.fromkeys(TOLERANT, "within tolerance") | unknown
    )
    assert [check.name for check in verify(run, pipe) if check.verdict == "failed"] == []
    assert "3 of 4 steps; the run is interrupted" in found(run, "committed").detail
    planted = rewrite(run, "latents/latents", add((2, 0, 0, 0, 0), 0.1), consistent=False)
    assert found(planted, "scheduler").verdict == "failed"


def test_a_run_that_was_stopped_at_once_verifies(tmp_path: Path) -> None:
    pipe = pipeline()
    with (
        hooks.Hooks([(pipe.unet, "input", at_call(0, throw(KeyboardInterrupt())))]),
        pytest.raises(KeyboardInterrupt),
    ):
        take(tmp_path)
    assert "failed" not in verdicts(only(tmp_path)).values()


def not_json(word: str) -> Any:
    raise AssertionError(f"{word} is no JSON")


@pytest.mark.parametrize("older", [False, True])
def test_what_is_no_number_is_text_in_a_schedulers_settings(older: bool, tmp_path: Path) -> None:
    """DPMSolverMultistepScheduler clips at minus infinity, which JSON does not have.

    Older versions wrote it all the same.
    """
    run = take(tmp_path, scheduler="DPM++2M", capture=OFF)
    for file in [*run.path.rglob("*.json")]:
        json.loads(file.read_text(), parse_constant=not_json)
    assert run.attributes["scheduler"]["config"]["lambda_min_clipped"] == "-inf"
    if older:
        edit(
            run.path / "zarr.json",
            ["attributes", "scheduler", "config", "lambda_min_clipped"],
            float("-inf"),
        )
        assert "-Infinity" in (run.path / "zarr.json").read_text()
        (run.path / MANIFEST).write_text(json.dumps(manifest(run.path)))
        run = Run(run.path)
    assert rebuild_scheduler(run).config.lambda_min_clipped == float("-inf")
    assert {name for name, verdict in verdicts(run).items() if verdict != "exact"} == {
        "softmax",
        "moments",
        "sums",
    }, "no map was recorded"


@pytest.mark.parametrize("setting", ["num_train_timesteps", "solver_order"])
def test_a_scheduler_that_would_take_all_memory_is_not_built(setting: str, copy: Run) -> None:
    kind = "DPMSolverMultistepScheduler"
    edit(copy.path / "zarr.json", ["attributes", "scheduler", "class"], kind)
    edit(copy.path / "zarr.json", ["attributes", "scheduler", "config", setting], 10**10)
    for name in ("schedule", "scheduler"):
        check = found(Run(copy.path), name)
        assert check.verdict == "failed"
        assert f"its {kind}: {setting} is 10000000000, not a whole number from" in check.detail


def test_noise_is_not_drawn_for_sizes_that_no_file_has(copy: Run) -> None:
    """Latents said to be of 40 GB an image: refused before noise of that size is made for them."""
    for file in (copy.path / "latents").glob("*/zarr.json"):
        own = json.loads(file.read_text())
        if "y" not in own["dimension_names"]:
            continue
        sizes = {"y": 50_000, "x": 50_000}
        for at in (own["shape"], own["chunk_grid"]["configuration"]["chunk_shape"]):
            at[:] = [
                sizes.get(dim, size) for dim, size in zip(own["dimension_names"], at, strict=True)
            ]
        file.write_text(json.dumps(own))
        edit(
            copy.path / "zarr.json",
            ["consolidated_metadata", "metadata", f"latents/{file.parent.name}"],
            own,
        )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check = found(Run(copy.path), "scheduler")
    assert check.verdict == "failed" and "a chunk of latents/latents has" in check.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024


# --- what is planted: the files -------------------------------------------------------------------

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
    "a flipped bit in a prediction": (
        lambda path: flip(path / CHUNK, 7),
        f"1 files changed: {CHUNK}",
        ["guidance", "scheduler"],
    ),
    "a flipped bit in a map": (
        lambda path: flip(path / "attention/8x8/cross/c.1.0.0.0.0.0.0.0", 9),
        "1 files changed: attention/8x8/cross",
        ["softmax", "moments", "sums"],
    ),
    "a flipped bit in the picture": (
        lambda path: flip(path / "images/final/c.0.0.0.0", 9),
        "1 files changed: images/final",
        ["picture"],
    ),
    "a deleted chunk": (
        lambda path: (path / CHUNK).unlink(),
        f"1 files missing: {CHUNK}",
        ["guidance", "scheduler"],
    ),
    "a deleted map": (
        lambda path: (path / "attention/4x4/cross/c.2.0.0.0.0.0.0.0").unlink(),
        "1 files missing: attention/4x4/cross",
        ["softmax", "moments", "sums"],
    ),
    "a truncated chunk": (
        lambda path: (path / CHUNK).write_bytes((path / CHUNK).read_bytes()[:-9]),
        f"1 files changed: {CHUNK}",
        ["guidance", "scheduler"],
    ),
    "an empty chunk": (
        lambda path: (path / CHUNK).write_bytes(b""),
        f"1 files changed: {CHUNK}",
        ["guidance", "scheduler"],
    ),
    "a committed flag": (
        lambda path: rewrite(Run(path), "committed", put(2, 0), consistent=False),
        "1 files changed: committed/c.0",
        ["committed", "sums", "scheduler"],
    ),
    "a new file": (
        lambda path: (path / "latents/note.txt").write_text("mine"),
        "1 files new: latents/note.txt",
        [],
    ),
    "another guidance scale": (
        lambda path: edit(path / "zarr.json", ["attributes", "experiment", "guidance_scale"], 7.25),
        "1 files changed: zarr.json",
        ["schema", "picture", "guidance"],
    ),
    "another seed": (
        lambda path: edit(path / "zarr.json", ["attributes", "experiment", "seed"], 4),
        "1 files changed: zarr.json",
        ["schema", "picture", "scheduler"],
    ),
    "another prompt": (
        lambda path: edit(path / "zarr.json", ["attributes", "experiment", "prompt"], "a hat"),
        "1 files changed: zarr.json",
        ["schema", "labels", "picture"],
    ),
    "another scheduler": (
        lambda path: edit(path / "zarr.json", ["attributes", "scheduler", "class"], "torch"),
        "1 files changed: zarr.json",
        ["schedule", "scheduler"],
    ),
    "a dtype of fancy": (
        lambda path: edit(path / "zarr.json", ["attributes", "model", "dtype"], "nonsense"),
        "1 files changed: zarr.json",
        ["schema", "guidance", "scheduler"],
    ),
    "attributes of an array": (
        lambda path: edit(path / "latents/latents/zarr.json", ["attributes", "long_name"], "x"),
        "1 files changed: latents/latents/zarr.json",
        [],
    ),
}


# The four that were promised, and the flag that is the only truth about a step; the others are
# slow.
FIRST = [
    "a flipped bit in a map",
    "a deleted chunk",
    "a truncated chunk",
    "another seed",
    "a committed flag",
]


@pytest.mark.parametrize(
    "what",
    [*FIRST, *(pytest.param(what, marks=pytest.mark.slow) for what in PLANTS if what not in FIRST)],
)
def test_what_is_done_to_a_file_is_caught(what: str, copy: Run) -> None:
    plant, said, others = PLANTS[what]
    plant(copy.path)
    checks = {check.name: check for check in verify(Run(copy.path))}
    assert checks["manifest"].verdict == "failed" and checks["manifest"].detail.startswith(said)
    assert [
        name
        for name, check in checks.items()
        if check.verdict == "failed" and name not in ("manifest", "digests")
    ] == others


def test_pictures_and_the_status_are_not_in_the_manifest(copy: Run) -> None:
    (copy.path / "picture-0.png").unlink()
    (copy.path / "contact-sheet.png").write_bytes(b"mine")
    edit(
        copy.path / "zarr.json", ["attributes", "status"], "running"
    )  # as a writer leaves it that dies at the very end
    assert found(Run(copy.path), "manifest").verdict == "exact"


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_whole_recording_whose_status_was_edited(copy: Run, status: str) -> None:
    """A writer that ends so takes the manifest away, so this is somebody's doing, and it hides what
    only a complete run is asked.
    """
    edit(copy.path / "zarr.json", ["attributes", "status"], status)
    check = found(Run(copy.path), "manifest")
    assert (check.verdict, check.detail) == (
        "failed",
        f"there is one, as a complete run has; the status is {status}",
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"zarr.json": 3}'])
def test_a_manifest_that_is_none_fails(text: str, copy: Run) -> None:
    (copy.path / MANIFEST).write_text(text)
    assert found(Run(copy.path), "manifest").verdict == "failed"


def test_a_complete_run_without_a_manifest_fails(copy: Run) -> None:
    (copy.path / MANIFEST).unlink()
    assert found(Run(copy.path), "manifest").verdict == "failed"


# --- what is planted: the values, with a manifest that agrees -------------------------------------


Case = tuple[str, Callable[[np.ndarray], Any], set[str]]
CHANGES: list[Case] = [
    ("committed", put(2, 0), {"committed", "sums", "scheduler"}),
    ("latents/latents", one_ulp, {"scheduler"}),
    (
        "latents/prediction_cond",
        lambda values: values.__setitem__(2, values[2, ::-1].copy()),
        {"guidance"},
    ),
    ("latents/prediction_cond", add((1, 0, 2, 3, 3), 1e-4), {"guidance"}),
    ("attention/4x4/cross", put((1, 2, 1, 0, 0, 0, 0, 0), 0.3), {"softmax", "moments", "sums"}),
    ("attention/4x4/moments", put((1, 2, 1, 0, 0, 0, 1), 0.4), {"moments"}),
    ("attention/4x4/token", put(3, 9), {"labels"}),
    ("images/final", put((1, 2, 3, 0), 77), {"picture"}),
]
MORE_CHANGES: list[Case] = [
    ("committed", put(-1, 0), {"committed", "sums", "scheduler"}),
    ("latents/latents", add((2, 1, 0, 0, 0), 1e-5), {"scheduler"}),
    ("latents/latents", add((0, 0, 0, 0, 0), 1e-5), {"scheduler"}),
    ("latents/final_latents", add((0, 0, 0, 0), 1e-4), {"scheduler"}),
    ("latents/prediction", add((1, 0, 2, 3, 3), 1e-4), {"guidance", "scheduler"}),
    ("latents/prediction_uncond", add((1, 0, 2, 3, 3), 1e-4), {"guidance"}),
    ("latents/prediction_uncond", put((1, 0, 2, 3, 3), np.nan), {"guidance"}),
    (
        "attention/8x8/cross",
        lambda values: values.__imul__(np.float16(1.002)),
        {"softmax", "moments", "sums"},
    ),
    ("attention/4x4/cross", put((1, 2, 1, 0, 0, 0, 0, 0), np.nan), {"softmax", "moments", "sums"}),
    ("attention/4x4/moments", put((1, 2, 1, 0, 0, 0, 1), np.nan), {"moments"}),
    ("attention/4x4/recorded", put(2, 0), {"committed", "sums"}),
    ("attention/4x4/time_sum", add((2, 1, 0, 0, 0, 0, 0), 1e-3), {"sums"}),
    ("attention/8x8/overview", add((2, 1, 0, 0), 1e-3), {"sums"}),
    ("text/text_encoder/attention", put((1, 0, 1, 4, 4), 0.5), {"softmax"}),
    ("text/text_encoder/word_index", put((1, 3), 0), {"labels"}),
    ("timestep", put(1, 3.5), {"schedule"}),
    ("alpha_bar", add(1, 1e-5), {"schedule"}),
    ("step", put(1, 2), {"schedule", "moments", "sums"}),
]


@pytest.mark.parametrize(
    ("variable", "change", "caught"),
    [*CHANGES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CHANGES)],
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


# --- another machine ------------------------------------------------------------------------------


def elsewhere(run: Run, *keys: str, value: Any) -> Run:
    """The recording as another machine would have made it, manifest and all."""
    edit(run.path / "zarr.json", ["attributes", *keys], value)
    (run.path / MANIFEST).write_text(json.dumps(manifest(run.path)))
    return Run(run.path)


def test_a_recording_of_another_machine_may_differ_a_little_and_the_reason_is_named(
    copy: Run,
) -> None:
    rewrite(copy, "latents/prediction", add((1, 0, 2, 3, 3), 1e-5))
    run = elsewhere(copy, "environment", "device", value="cuda")
    for name in ("guidance", "scheduler"):
        check = found(run, name)
        assert (
            check.verdict == "within tolerance"
            and check.because == ("device: cuda and cpu",)
            and "0.0001 is allowed" in check.detail
        )
    assert "failed" not in verdicts(run).values()
    rewrite(copy, "latents/prediction", add((1, 0, 2, 3, 3), 10))
    assert (
        found(Run(copy.path), "guidance").verdict
        == found(Run(copy.path), "scheduler").verdict
        == "failed"
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 64_000),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("torch", "2.1"), ("diffusers", "0.1"), ("device_name", "an abacus"))
        ),
    ],
    ids=str,
)
def test_whatever_decides_bits_is_named(name: str, value: Any, copy: Run) -> None:
    rewrite(copy, "latents/latents", one_ulp)
    assert found(Run(copy.path), "scheduler").verdict == "failed"
    check = found(elsewhere(copy, "environment", name, value=value), "scheduler")
    assert check.verdict == "within tolerance" and [
        reason.split(":")[0] for reason in check.because
    ] == [name]


def test_as_many_threads_as_the_run_had_are_no_difference(
    copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    check = found(elsewhere(copy, "environment", "threads", value=2), "scheduler")
    assert (check.verdict, check.because) == ("exact", ()) and torch.get_num_threads() == before


# --- with the model -------------------------------------------------------------------------------


def test_with_the_model_everything_is_asked_again(intact: Run) -> None:
    checks = verify(intact, pipeline())
    assert [check.name for check in checks] == NAMES + [
        name for name in WITH_MODEL if name != "encode"
    ]  # which is of runs from a picture
    assert {check.name for check in checks if check.verdict == "within tolerance"} == TOLERANT | {
        "maps",
        "attention",
    }
    assert checks.verdict == "within tolerance"


def test_some_steps_are_enough_if_asked(copy: Run) -> None:
    rewrite(copy, "latents/prediction_cond", add((1, 0, 2, 3, 3), 1e-4))
    assert {
        check.name: check.detail
        for check in verify(copy, pipeline(), steps=[0, -1])
        if check.name == "predictions"
    } == {"predictions": "the UNet's answers at 2 steps: the same at all 6 places"}
    (check,) = [
        check for check in verify(copy, pipeline(), steps=[1]) if check.name == "predictions"
    ]
    assert check.verdict == "failed" and "latents/prediction_cond, step 1" in check.detail
    with pytest.raises(ExperimentError, match="steps: 9 is not a committed step"):
        verify(copy, pipeline(), steps=[9])


@pytest.mark.parametrize(("factor", "verdict"), [(1.0005, "within tolerance"), (1.01, "failed")])
def test_a_recording_of_another_cpu_may_differ_by_roundings_alone(
    factor: float, verdict: str, copy: Run
) -> None:
    rewrite(copy, "latents/prediction_uncond", lambda values: values.__imul__(np.float32(factor)))
    run = elsewhere(copy, "environment", "device_name", value="an abacus")
    checks = {check.name: check for check in verify(run, pipeline(), steps=[1])}
    assert checks["predictions"].verdict == verdict
    assert "0.002 is allowed" in checks["predictions"].detail


def test_a_recording_of_cuda_is_asked_again_on_a_laptop(copy: Run) -> None:
    rewrite(copy, "latents/prediction_uncond", lambda values: values.__imul__(np.float32(1.001)))
    rewrite(copy, "attention/8x8/cross", lambda values: values.__imul__(np.float16(0.999)))
    run = elsewhere(copy, "environment", "device", value="cuda")
    checks = {
        check.name: check
        for check in verify(run, pipeline(), steps=[1])
        if check.name in WITH_MODEL
    }
    assert [name for name, check in checks.items() if check.verdict == "failed"] == []
    for name, allowed in (("predictions", "0.02"), ("maps", "0.04")):
        assert checks[name].verdict == "within tolerance" and checks[name].because == (
            "device: cuda and cpu",
        )
        assert f"{allowed} is allowed" in checks[name].detail
    rewrite(
        copy, "latents/prediction_uncond", lambda values: values.__setitem__(1, values[2].copy())
    )
    rewrite(
        copy,
        "attention/8x8/cross",
        lambda values: values.__setitem__(1, np.flip(values[1], axis=4).copy()),
    )
    failed = {
        check.name
        for check in verify(Run(run.path), pipeline(), steps=[1])
        if check.name in WITH_MODEL and check.verdict == "failed"
    }
    assert "predictions" in failed


def test_other_weights_are_named_and_fail(intact: Run) -> None:
    checks = {check.name: check for check in verify(intact, tiny.pipeline(seed=1))}
    assert {name for name, check in checks.items() if check.verdict == "failed"} >= {
        "weights",
        "text",
        "predictions",
        "decode",
    }
    assert any(reason.startswith("weights: ") for reason in checks["predictions"].because)


@pytest.mark.parametrize(
    ("variable", "change", "caught"),
    [
        ("text/text_encoder/output", add((1, 2, 3), 1e-5), "text"),
        ("text/text_encoder/token_id", put((1, 2), 3), "plan"),
        ("attention/4x4/value_size", add((1, 2, 0, 1), 1e-4), "inside"),
        ("unet/statistics", add((1, 0, 1, 0, 2), 1e-4), "inside"),
        ("vae/statistics", add((0, 1, 2), 1e-4), "decode"),
        ("preview/bias", add(1, 1e-3), "decode"),
        ("images/final", put((1, 2, 3, 0), 77), "decode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.slow
def test_what_only_the_model_knows(
    variable: str, change: Callable[[np.ndarray], Any], caught: str, copy: Run
) -> None:
    checks = verify(rewrite(copy, variable, change), pipeline(), steps=[1])
    assert {check.name for check in checks if check.verdict == "failed"} - {"picture"} == {caught}


SAID: dict[tuple[str, ...], Any] = {
    ("model", "scaling_factor"): 0.6,
    ("model", "name"): "another",
    ("scheduler", "config", "clip_sample_range"): 1.125,
    ("scheduler", "config", "sample_max_value"): 2.0,
    ("cut_from_prompt",): {"cond": "hat"},
    ("read_as",): {"cond": "a hat"},
}


def test_what_a_recording_says_of_its_model_is_held_against_it(copy: Run) -> None:
    """Each edited field is named; the revision of a model in memory is unknown, and not held."""
    pipe = pipeline()
    edit(copy.path / "zarr.json", ["attributes", "model", "revision"], "x")
    for place, value in SAID.items():
        before = (copy.path / "zarr.json").read_text()
        edit(copy.path / "zarr.json", ["attributes", *place], value)
        checks = {check.name: check for check in verify(Run(copy.path), pipe, steps=[])}
        assert (
            checks["plan"].verdict == "failed" and f"{'.'.join(place)} is " in checks["plan"].detail
        ), place
        (copy.path / "zarr.json").write_text(before)
    plan = next(check for check in verify(Run(copy.path), pipe, steps=[]) if check.name == "plan")
    assert plan.verdict == "exact"
    loaded = replace(StableDiffusion.of(pipe), pipeline=None)
    plan = next(check for check in verify(Run(copy.path), loaded, steps=[]) if check.name == "plan")
    assert plan.verdict == "failed" and "model.revision is 'x', not None" in plan.detail
    edit(copy.path / "zarr.json", ["attributes", "model", "revision"], None)
    edit(
        copy.path / "zarr.json",
        ["attributes", "environment", "attention_backend"],
        "XFormersAttnProcessor",
    )
    for given, verdict in ((loaded, "failed"), (pipe, "exact")):
        plan = next(
            check for check in verify(Run(copy.path), given, steps=[]) if check.name == "plan"
        )
        assert plan.verdict == verdict and ("attention_backend" in plan.detail) == (
            verdict == "failed"
        )


def test_a_decoding_in_float32_that_was_not_is_named(copy: Run) -> None:
    edit(copy.path / "zarr.json", ["attributes", "decoded_in_float32"], True)
    checks = {check.name: check for check in verify(Run(copy.path), pipeline(), steps=[])}
    assert "decoded_in_float32 is True, and the VAE does not overflow" in checks["decode"].detail


def test_the_class_in_a_schedulers_config_is_its_own(copy: Run) -> None:
    edit(
        copy.path / "zarr.json",
        ["attributes", "scheduler", "config", "_class_name"],
        "PNDMScheduler",
    )
    assert "its config is of 'PNDMScheduler'" in found(Run(copy.path), "schedule").detail


def test_a_model_that_cannot_be_had_is_an_error_with_a_remedy(copy: Run) -> None:
    edit(copy.path / "zarr.json", ["attributes", "experiment", "model"], "nowhere-at-all")
    with pytest.raises(ModelError, match="nowhere-at-all"):
        verify(Run(copy.path), model=True)


# --- how tolerances follow from rounding ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "sqrt_u8"])
def test_rounding_bounds_what_storing_does(dtype: str) -> None:
    p = torch.cat(
        [
            torch.rand(20_000, generator=torch.Generator().manual_seed(0)).pow(6),
            torch.tensor([0.0, 1.0, 2.0**-14, 2.0**-25]),
        ]
    )
    stored = to_storage(p, dtype).numpy()
    off, bound = np.abs(probabilities(stored) - p.numpy()), rounding(stored)
    assert (off <= bound * (1 + 1e-5) + 1e-9).all()
    assert dtype == "float32" or off.max() > 0.9 * bound[off.argmax()], (
        "and not by much more than is needed"
    )


@pytest.mark.parametrize("dtype", ["float16", "float32", "sqrt_u8"])
def test_moments_are_bounded_and_tell_a_transposed_map(dtype: str) -> None:
    maps = torch.rand((7, 3, 8, 8), generator=torch.Generator().manual_seed(1)).pow(8) / 20
    measured, stored = moments_of(maps.numpy()), to_storage(maps, dtype).numpy()
    assert unlike_moments(stored, measured).max() <= 1
    assert (unlike_moments(np.swapaxes(stored, -1, -2).copy(), measured).max((-1, -2)) > 1).all()
    assert (
        np.abs(
            moments_of(np.eye(4)[None, :, :1] * np.ones((1, 4, 6)))[0] - [1 / 4, 1 / 8, 1 / 2]
        ).max()
        < 1e-12
    )


@pytest.mark.parametrize("measure", [relative, apart])
def test_a_difference_of_nothing_is_nothing_and_nan_is_not(
    measure: Callable[[np.ndarray, np.ndarray], float],
) -> None:
    a = np.array([1.0, np.nan, -3.0, np.inf])
    assert measure(a, a.copy()) == 0 and 0 < measure(a, np.array([1.0, np.nan, -3.1, np.inf])) < 0.1
    assert (
        not measure(a, np.array([1.0, 2.0, -3.0, np.inf])) < np.inf
        and not measure(a, np.array([1.0, np.nan, -3.0, -np.inf])) < np.inf
    )


def test_a_tally_grants_a_tolerance_only_for_a_reason() -> None:
    for because, off, verdict in (
        ((), 0.0, "exact"),
        ((), 0.1, "failed"),
        (("device",), 0.1, "within tolerance"),
        (("device",), 0.3, "failed"),
    ):
        tally = Tally("x", "this", 0.2, because)
        tally.add(off, "there")
        assert tally.check().verdict == verdict
    assert Tally("x", "this").check().verdict == "not checked"
    tally = Tally("x", "this", 0.2, ("device",))
    tally.add(float("nan"), "there")
    assert tally.check().verdict == "failed"


def test_the_expected_variables_are_those_that_are_there(intact: Run) -> None:
    there = {
        f"{node.path}/{name}".strip("/")
        for node in intact.tree.subtree
        for name in node.to_dataset(inherit=False).variables
    }
    assert expected_variables(intact) == there
    assert intact.attributes["identity"] == intact.experiment.identity()


# --- the command ----------------------------------------------------------------------------------


def test_the_command_says_what_it_found(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(copy.path)])
        == main(["latest", "--runs", str(copy.path.parent)])
        == main([copy.name[:12], "--runs", str(copy.path.parent)])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == f"{copy.name} (complete)" and [line.split()[0] for line in lines[1:13]] == NAMES
    )
    unheld = "cost, images, preview, text, unet, vae, value_size"
    assert lines[13] == (
        "Verified: 10 exact, 2 within tolerance. Add --model to let the model predict again: only "
        f"it can check {unheld}."
    )
    flip(copy.path / CHUNK, 7)
    assert main([str(copy.path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"  manifest   failed            1 files changed: {CHUNK}" in lines
    assert lines[-1] == "FAILED: 4 of 12 checks: manifest, digests, guidance, scheduler."
    with pytest.raises(RecordingNotFound):
        main(["no-such-run", "--runs", str(copy.path.parent)])
    with pytest.raises(ExperimentError, match="--steps chooses where the model predicts again"):
        main([str(copy.path), "--steps", "0"])


@pytest.mark.slow
def test_what_is_edited_and_not_checked_without_the_model_is_named_as_such(copy: Run) -> None:
    """Whatever of the model's numbers can be changed without a check that fails."""
    named = only_the_model_knows(copy)
    for node in copy.tree.subtree:
        for name, variable in node.dataset.data_vars.items():
            path, group = f"{node.path}/{name}".strip("/"), node.path.split("/")[1]
            if group in ("cost", "attention") and name not in ("value_size",):
                continue  # times, and what the checks of maps hold
            before = variable.values.copy()
            run = rewrite(copy, path, add((0,) * variable.ndim, 3))
            held = any(
                check.verdict == "failed" for check in verify(run) if check.name != "picture"
            )
            assert held != (
                (name in named or group in named) and (group, name) != ("text", "attention")
            ), path
            rewrite(run, path, put(..., before))


@pytest.mark.parametrize(
    ("variable", "change", "told"),
    [
        ("committed", put(1, 2), "committed is 2 at step 1, and a flag is 0 or 1"),
        ("cost/component", put(1, "unetx"), "cost/component is text_encoder, unetx, vae: text"),
        (
            "cost/component",
            put([0, 1], ["unet", "text_encoder"]),
            "cost/component is unet, text_encoder, vae: text",
        ),
    ],
)
def test_flags_and_parts_are_those_that_there_are(
    variable: str, change: Callable[[np.ndarray], Any], told: str, copy: Run
) -> None:
    failed = {
        check.name: check.detail
        for check in verify(rewrite(copy, variable, change))
        if check.verdict == "failed"
    }
    assert len(failed) == 1 and told in next(iter(failed.values()))


def test_pictures_on_the_way_are_at_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    run = take(tmp_path, scheduler="DDIM", steps=5, decode_every=2, capture=OFF)
    assert found(run, "schema").verdict == "exact" and "decoded" in only_the_model_knows(run)
    check = found(elsewhere(run, "experiment", "decode_every", value=3), "schema")
    assert (
        check.verdict == "failed"
        and "decoded/decoded_step is 0, 2, 4; decode_every is 3" in check.detail
    )


def test_findings_fit_the_terminal(copy: Run) -> None:
    flip(copy.path / CHUNK, 7)
    checks = verify(Run(copy.path))
    assert all(len(line) <= 90 for line in checks.lines(90))


def test_json_is_for_machines(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = elsewhere(copy, "environment", "torch", value="2.1")
    assert main([str(run.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said == json.loads(json.dumps(verify(run).as_json()))
        and said["verdict"] == "within tolerance"
        and said["status"] == "complete"
    )
    assert [check["name"] for check in said["checks"]] == NAMES and set(said["checks"][0]) == {
        "name",
        "verdict",
        "detail",
        "because",
    }


@pytest.mark.slow
def test_the_command_loads_the_model_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    pipeline().save_pretrained(folder)
    run = record(ask(tmp_path / "runs", model=str(folder), steps=5), progress=False)
    assert main([str(run.path), "--model", "--steps", "1:3"]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"^  predictions +exact +the UNet's answers at 2 steps", out, re.MULTILINE)
        and "Add --model" not in out
    )


@pytest.mark.slow  # test_odd_places.py starts a process that finds damage, too
def test_the_exit_code_of_the_process(copy: Run) -> None:
    flip(copy.path / CHUNK, 7)
    failed = subprocess.run(
        [sys.executable, "-m", "probe.verify", str(copy.path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert failed.returncode == 1 and "failed" in failed.stdout and "Traceback" not in failed.stderr
