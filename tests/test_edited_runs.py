"""Edited runs are recordings like any other: they verify, resume, and name their parent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from edited import EACH
from lora_files import save_peft
from tiny_runs import at_call, pipeline, throw
from tiny_runs import take as taken

from probe.errors import ExperimentError, ModelError
from probe.proof.verdict import verify
from probe.reading.recording import Run, open_run
from probe.running.recorder import record, rerun, resume
from probe.watching.hooks import Hooks

ACTIVATIONS = {"capture": {"activations": ["unet.mid_block"]}}


def take(folder: Path, pipe: Any = None, **changes: Any) -> Run:
    return taken(folder, pipe, **{"prompt": "an astronaut scuba diving", **changes})


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Unedited runs: one with outputs of the mid block, and one of another prompt."""
    folder = tmp_path_factory.mktemp("parents")
    runs = {
        "own": take(folder, name="own", **ACTIVATIONS),
        "cat": take(folder, name="cat", prompt="a cat on the hat", **ACTIVATIONS),
        "bare": take(folder, name="bare"),
    }
    return runs


def edited(folder: Path, *edits: Any, **changes: Any) -> Run:
    return take(folder, edits=list(edits), **changes)


def edit_of(kind: str, parents: dict[str, Run], **changes: Any) -> dict[str, Any]:
    if kind == "steer":
        own = {
            "modules": ["mid_block"],
            "toward": str(parents["cat"].path),
            "away": str(parents["own"].path),
        }
        return {"kind": kind, **own, **changes}
    return {"kind": kind, **EACH[kind], **changes}


def bits(run: Run) -> dict[str, np.ndarray]:
    names = ("latents", "prediction", "prediction_cond", "final_latents")
    values = {name: run.variable(f"latents/{name}").values for name in names}
    values["picture"] = run.variable("images/final").values
    for grid in run.grids:
        values[f"maps {grid}"] = run.variable(f"attention/{grid}/cross").values
    return values


def differing(one: Run, other: Run) -> list[str]:
    ours, theirs = bits(one), bits(other)
    return [name for name in ours if not np.array_equal(ours[name], theirs[name], equal_nan=True)]


OFTEN = ("prompt", "head", "latents", "steer")


def seldom(*kinds: str) -> list[Any]:
    """Return kinds of edits as parameters that the slow tests alone have."""
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", [*OFTEN, *seldom(*sorted({*EACH} - {*OFTEN}))])
def test_an_edited_run_is_recorded_proved_and_says_so(
    kind: str, tmp_path: Path, parents: dict[str, Run]
) -> None:
    run = edited(tmp_path, edit_of(kind, parents))
    assert run.attributes.parent_identity == parents["bare"].attributes.identity
    assert run.attributes.identity != parents["bare"].attributes.identity
    assert differing(run, parents["bare"])
    found = verify(run, model=pipeline())
    assert not found.failed, found.failed


# That the loop's bits stay at amount 0 is held of every kind in test_editing.py.
@pytest.mark.parametrize("kind", [*OFTEN, *seldom(*sorted({*EACH} - {*OFTEN}))])
def test_recorded_at_amount_0_it_has_the_bits_of_its_parent(
    kind: str, tmp_path: Path, parents: dict[str, Run]
) -> None:
    run = edited(tmp_path, edit_of(kind, parents, amount=0.0))
    assert not differing(run, parents["bare"])


# Of a donor that runs beside; of recordings, a schedule, random numbers.
@pytest.mark.parametrize(
    "kind", ["latents", *seldom("steer", "guidance", "noise", "prompt", "head", "map")]
)
def test_an_interrupted_edited_run_goes_on_to_the_same_bits(
    kind: str, tmp_path: Path, parents: dict[str, Run]
) -> None:
    edit = edit_of(kind, parents)
    whole = edited(tmp_path / "whole", edit)
    pipe = tiny.pipeline()
    calls = 2 if kind not in ("head", "map", "latents") else 5  # a donor calls the UNet as well
    stop = Hooks([(pipe.unet, "input", at_call(calls, throw(KeyboardInterrupt())))])
    with stop, pytest.raises(KeyboardInterrupt):
        take(tmp_path / "cut", pipe, edits=[edit])
    cut = open_run("latest", tmp_path / "cut")
    assert 0 < len(cut.steps) < len(whole.steps)
    done = resume(cut, tiny.pipeline(), progress=False)
    assert not differing(done, whole)
    assert not differing(rerun(done, tiny.pipeline(), progress=False), whole)


def test_a_word_removed_has_no_map_and_the_others_are_those_of_the_shorter_prompt(
    tmp_path: Path,
) -> None:
    run = edited(tmp_path, {"kind": "remove", "words": ["astronaut"]})
    by_hand = take(tmp_path, prompt=run.attributes.texts["cond"])
    assert "astronaut" not in run.words and run.words == by_hand.words
    assert not differing(run, by_hand)
    assert run.experiment.prompt != by_hand.experiment.prompt


def test_maps_of_another_text_are_not_recorded_under_the_words_of_this_one(tmp_path: Path) -> None:
    run = edited(tmp_path, {"kind": "prompt", "text": "a cat", "steps": "2:"})
    grid = run.grids[0]
    assert run.attention(grid)["step"].values.tolist() == [0, 1]
    with pytest.raises(ExperimentError, match="no map would have its word"):
        edited(tmp_path, {"kind": "prompt", "text": "a cat", "steps": "0:"})
    with pytest.raises(ExperimentError, match="queries are read with one set of keys"):
        edited(
            tmp_path,
            {"kind": "prompt", "text": "a cat", "steps": "2:"},
            capture={"attention": "queries"},
        )


# --- donors that are recordings ---


@pytest.mark.slow
def test_a_recording_gives_what_a_live_run_beside_gives(
    tmp_path: Path, parents: dict[str, Run]
) -> None:
    prompt = parents["cat"].experiment.prompt
    for edit in (
        {"kind": "head", "layers": ["*"], "heads": [0]},
        {"kind": "map", "method": "refine"},
        {"kind": "output", "modules": ["mid_block"], "steps": "1:3"},
        {"kind": "latents", "steps": "2"},
    ):
        live = edited(tmp_path, {**edit, "donor": {"prompt": prompt}})
        stored = edited(tmp_path, {**edit, "donor": {"run": str(parents["cat"].path)}})
        assert not differing(live, stored)


def test_patched_with_everything_of_itself_nothing_changes(
    tmp_path: Path, parents: dict[str, Run]
) -> None:
    own = {"run": str(parents["own"].path)}
    run = edited(
        tmp_path,
        {"kind": "map", "donor": own},
        {"kind": "map", "attention": "self", "donor": own},
        {"kind": "head", "layers": ["*"], "donor": own, "steps": "1:"},
        {"kind": "output", "modules": ["mid_block"], "donor": own},
        {"kind": "skip", "modules": ["*"], "donor": own},
        {"kind": "latents", "donor": own, "steps": "2"},
    )
    assert not differing(run, parents["bare"])


def test_what_a_recording_cannot_give_is_refused(tmp_path: Path, parents: dict[str, Run]) -> None:
    own = {"run": str(parents["own"].path)}
    head = {"kind": "head", "layers": ["*"], "donor": own}
    with pytest.raises(ExperimentError, match="steps, and this run has 6"):
        edited(tmp_path, head, steps=5)
    with pytest.raises(ExperimentError, match="the latents of own"):
        edited(tmp_path, head, images=2)
    with pytest.raises(ExperimentError, match="steps, and this run has"):
        edited(tmp_path, head, scheduler="Euler")
    with pytest.raises(ModelError, match="recorded with other weights"):
        take(tmp_path, tiny.pipeline(seed=1), edits=[head])
    steer = {**edit_of("steer", parents), "toward": str(parents["bare"].path)}
    with pytest.raises(ExperimentError) as error:
        edited(tmp_path, steer)
    assert "holds no output of mid_block" in error.value.cause
    assert 'capture.activations: ["unet.mid_block"]' in error.value.remedy
    child = edited(tmp_path, {"kind": "head", "layers": ["*"], "how": "zero"})
    with pytest.raises(ExperimentError, match="was edited itself"):
        edited(tmp_path, {**head, "donor": {"run": str(child.path)}})
    with pytest.raises(ExperimentError, match="counterfactual"):
        edited(tmp_path, head, capture={"counterfactual": ["*"]})


def test_noise_from_a_file_is_that_noise(tmp_path: Path) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    np.save(tmp_path / "noise.npy", noise.numpy())
    edit = {"kind": "noise", "file": str(tmp_path / "noise.npy")}
    run = edited(tmp_path / "runs", edit)
    assert not differing(run, take(tmp_path / "runs", seed=7))
    assert not verify(run, model=pipeline()).failed
    (tmp_path / "noise.npy").unlink()
    found = verify(open_run(run.path))
    assert not found.failed
    assert any("the file of its first noise is not here" in check.detail for check in found)
    np.save(tmp_path / "noise.npy", np.full((1, 4, 8, 8), np.nan, np.float32))
    with pytest.raises(ExperimentError, match="not finite"):
        edited(tmp_path / "runs", edit)
    np.save(tmp_path / "noise.npy", np.zeros((4, 8, 8), np.float32))
    with pytest.raises(ExperimentError, match="has shape"):
        edited(tmp_path / "runs", edit)
    (tmp_path / "noise.npy").write_bytes((tmp_path / "noise.npy").read_bytes() + b"x")
    with pytest.raises(ExperimentError, match="has shape"):
        edited(tmp_path / "runs", edit)
    np.save(tmp_path / "noise.npy", noise.numpy())
    whole = (tmp_path / "noise.npy").read_bytes()
    for data in (whole[:-1], whole + b"x", b"x" * 200):
        (tmp_path / "noise.npy").write_bytes(data)
        with pytest.raises(ExperimentError, match=r"cut short|no \.npy"):
            edited(tmp_path / "runs", edit)
    np.save(tmp_path / "noise.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ExperimentError, match="type object"):
        edited(tmp_path / "runs", edit)
    for header in (b"{'descr': '<f4', (", b"{'descr': (('<f4', (2,)),), 'shape': (1,)}", b"((("):
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        (tmp_path / "noise.npy").write_bytes(start + bytes(2000))
        with pytest.raises(ExperimentError, match=r"no \.npy"):
            edited(tmp_path / "runs", edit)
    (tmp_path / "noise.npy").unlink()
    os.mkfifo(tmp_path / "noise.npy")
    with pytest.raises(ExperimentError, match="is a pipe"):
        edited(tmp_path / "runs", edit)
    (tmp_path / "noise.npy").unlink()
    np.save(tmp_path / "noise.npy", np.asfortranarray(noise.numpy()))
    assert not differing(edited(tmp_path / "runs", edit), run)


def test_several_images_have_each_their_own_donor(tmp_path: Path) -> None:
    edit = {"kind": "head", "layers": ["*"], "heads": [0], "donor": {"seed": 20}}
    both = edited(tmp_path, edit, images=2, scheduler="DDIM")
    assert not verify(both, model=pipeline()).failed
    noise = edited(tmp_path, {"kind": "noise", "seed": 20}, images=2, scheduler="DDIM")
    assert not differing(noise, take(tmp_path, seed=20, images=2, scheduler="DDIM"))


def test_recorded_in_memory_it_is_the_same(tmp_path: Path) -> None:
    edit = {"kind": "mask", "words": ["astronaut"]}
    stored = edited(tmp_path, edit)
    run = record(stored.experiment, pipeline(), progress=False, output=None)
    assert not differing(run, stored)


# --- what must not pass in silence ---


def test_steering_needs_recordings_of_this_model_and_of_the_steps_it_acts_at(
    tmp_path: Path, parents: dict[str, Run]
) -> None:
    activations = ACTIVATIONS["capture"]
    other = take(tmp_path, tiny.pipeline(seed=5), capture=activations)
    few = take(tmp_path, prompt="a cat", capture={**activations, "steps": "0"})
    euler = take(tmp_path, prompt="a cat", scheduler="Euler", steps=5, capture=activations)
    edit = edit_of("steer", parents)
    with pytest.raises(ModelError, match=r"toward: .* recorded with other weights"):
        edited(tmp_path, {**edit, "toward": str(other.path)})
    with pytest.raises(ExperimentError, match=r"toward: .* holds no outputs of step 1"):
        edited(tmp_path, {**edit, "toward": str(few.path)})
    with pytest.raises(ExperimentError, match=r"toward: .* has other noise levels"):
        edited(tmp_path, {**edit, "toward": str(euler.path)})
    assert edited(tmp_path, {**edit, "toward": str(few.path), "steps": "0"}).status == "complete"


def test_a_recording_that_read_its_text_otherwise_donates_latents_alone(tmp_path: Path) -> None:
    # A model of its own: transformers leaves its own hooks where hidden states were asked for.
    skipped = {"run": str(take(tmp_path, tiny.pipeline(), seed=8, clip_skip=1).path)}
    with pytest.raises(ExperimentError, match="differ in clip_skip"):
        edited(tmp_path, {"kind": "output", "modules": ["mid_block"], "donor": skipped})
    assert edited(tmp_path, {"kind": "latents", "donor": skipped}).status == "complete"
    lora = [{"path": str(save_peft(tiny.pipeline(), tmp_path / "ink.safetensors"))}]
    other = {"run": str(take(tmp_path, tiny.pipeline(), seed=8, loras=lora).path)}
    with pytest.raises(ExperimentError, match="differ in loras"):
        edited(tmp_path, {"kind": "output", "modules": ["mid_block"], "donor": other})


@pytest.mark.slow
def test_latents_of_another_donor_than_is_written_are_found_with_the_model(tmp_path: Path) -> None:
    for amount in (1.0, 0.5):
        edit = {"kind": "latents", "donor": {"seed": 9}, "steps": "2", "amount": amount}
        run = edited(tmp_path, edit)
        assert not verify(run, model=pipeline()).failed
        root = run.path / "zarr.json"
        attributes = json.loads(root.read_text())
        attributes["attributes"]["experiment"]["edits"][0]["donor"]["seed"] = 10
        root.write_text(json.dumps(attributes))
        failed = {check.name for check in verify(open_run(run.path), model=pipeline()).failed}
        assert "predictions" in failed


def test_what_a_recording_says_of_its_edits_is_held_against_them(tmp_path: Path) -> None:
    run = edited(tmp_path, {"kind": "remove", "words": ["astronaut"]})
    for name, value in (("parent_identity", "00000000"), ("edited_texts", {"cond": "a cat"})):
        root = run.path / "zarr.json"
        before = root.read_text()
        stored = json.loads(before)
        stored["attributes"][name] = value
        root.write_text(json.dumps(stored))
        failed = {check.name: check.detail for check in verify(open_run(run.path)).failed}
        assert name in failed["schema"]
        root.write_text(before)
    assert not verify(open_run(run.path)).failed
