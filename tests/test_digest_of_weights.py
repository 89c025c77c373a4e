"""The digest of a model's weights: what changes it, what does not, and that no run waits for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from recordings import with_its_digests
from tiny_runs import ask, at_call, pipeline, take, throw

from probe.diffusion import weights
from probe.diffusion.families import family_of
from probe.diffusion.weights import DigestBeside, mixed
from probe.errors import ModelError
from probe.format.attributes import MIXED, SHA256
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.recorder import record, rerun, resume
from probe.watching.hooks import Hooks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]
Tensors = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.float16) -> Tensors:
    """Values of a type: some rows, part of a row, one word, less than a word, none."""
    made = torch.Generator().manual_seed(1)
    shapes = {"a": (70, 24, 3, 3), "b": (1000,), "c": (4,), "d": (3,), "e": (), "f": (0, 2)}
    return {
        name: torch.randint(-50, 50, shape, generator=made).to(dtype)
        for name, shape in shapes.items()
    }


def as_written_down(given: Tensors) -> str:
    """The same by numpy, from the words of docs/format.md."""
    keys = np.frombuffer(hashlib.shake_256(b"weights").digest(8192), "<u8")
    head, sums = b"", b""
    for name in sorted(given):
        tensor = given[name]
        head += f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 8192), "<u8").reshape(-1, 1024) ^ keys
        words = words ^ (words >> np.uint64(32))
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            words = words * np.uint64(factor)
            words = words ^ (words >> np.uint64(32))
        sums += words.sum(axis=1, dtype=np.uint64).astype("<u8").tobytes()
    return hashlib.sha256(head + sums).hexdigest()[:16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_the_document_says(dtype: torch.dtype) -> None:
    assert mixed(tensors(dtype)) == as_written_down(tensors(dtype))


def test_a_gpus_way_gives_the_same_on_a_cpu() -> None:
    drawn = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (5, weights.WORDS))
    drawn[0, :4] = 0, -1, -(2**63), 2**63 - 1
    rows = torch.from_numpy(drawn)
    by_torch = weights._by_torch(8, torch.device("cpu"))
    assert torch.equal(by_torch(rows), weights._by_numpy(8)(rows))
    assert torch.equal(rows, torch.from_numpy(drawn)), "what is summed stays as it is"


def test_it_stays_what_it_is() -> None:
    """A recording says it; a later version computes it again."""
    assert mixed({"a": torch.arange(2000)}) == "9a302e21a8c851ed"


def test_it_does_not_depend_on_order_layout_or_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    wanted = mixed(given)
    assert mixed(dict(reversed(given.items()))) == wanted
    last = given | {"a": given["a"].to(memory_format=torch.channels_last)}
    assert not last["a"].is_contiguous() and mixed(last) == wanted
    shifted = {
        name: torch.cat([torch.zeros(1).half(), tensor.reshape(-1)])[1:].view(tensor.shape)
        for name, tensor in given.items()
    }
    assert shifted["a"].storage_offset() == 1 and mixed(shifted) == wanted
    monkeypatch.setattr(weights, "COPIED", 700)
    monkeypatch.setattr(weights, "AT_ONCE", {"cpu": 3})
    assert mixed(given) == mixed(last) == mixed(shifted) == wanted


def test_a_single_bit_changes_it() -> None:
    given = tensors()
    wanted, flat = mixed(given), given["a"].view(torch.int16).view(-1)
    drawn = np.random.default_rng(0)
    for place in {0, len(flat) - 1, *drawn.integers(0, len(flat), 30).tolist()}:
        for bit in (0, 7, 14, 15):
            flat[place] ^= 1 << bit if bit < 15 else -(1 << 15)
            assert mixed(given) != wanted, f"bit {bit} of value {place}"
            flat[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert mixed(given) == wanted


@pytest.mark.parametrize("apart", [1, 4, 512, 4096, 9000])
def test_two_values_that_change_places_change_it(apart: int) -> None:
    """Also where they differ in one bit alone: the sign."""
    for one, other in ((1.0, -1.0), (0.0, 1.0), (2.0, 2.002)):
        for place in range(8):
            values = torch.zeros(20_000, dtype=torch.float16)
            values[place], values[place + apart] = one, other
            before = mixed({"a": values})
            values[place], values[place + apart] = other, one
            assert mixed({"a": values}) != before, (one, other, place)


CHANGES: dict[str, Callable[[Tensors], Tensors]] = {
    "two tensors change places": lambda t: t | {"c": t["x"], "x": t["c"]},
    "another type of the same bits": lambda t: t | {"a": t["a"].view(torch.bfloat16)},
    "another type of the same values": lambda t: t | {"a": t["a"].float()},
    "another shape": lambda t: t | {"a": t["a"].view(24, 70, 3, 3)},
    "another name": lambda t: {f"{name}2" if name == "b" else name: t[name] for name in t},
    "one tensor less": lambda t: {name: t[name] for name in t if name != "f"},
    "a zero more": lambda t: t | {"d": torch.cat([t["d"], torch.zeros(1).half()])},
    "two rows change places": lambda t: t | {"a": t["a"].roll(1, 0)},
    "transposed": lambda t: t | {"a": t["a"].transpose(2, 3).contiguous()},
}


@pytest.mark.parametrize("what", CHANGES)
def test_it_changes(what: str) -> None:
    given = tensors() | {"x": torch.ones(4).half()}
    assert mixed(CHANGES[what](given)) != mixed(given)


# --- beside a run ---------------------------------------------------------------------------------


def slow(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any]) -> None:
    """The digest takes as long as `wait`."""
    own = weights.mixed

    def waiting(*given: Any) -> str:
        wait()
        return own(*given)

    monkeypatch.setattr(weights, "mixed", waiting)


def said(path: Path) -> dict[str, Any]:
    model: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]["model"]
    return model


@pytest.mark.parametrize("in_files", [True, False])
def test_a_recording_says_it_and_by_what(tmp_path: Path, in_files: bool) -> None:
    run = record(ask(tmp_path, steps=2), pipeline(), progress=False) if in_files else None
    run = run or record(ask(tmp_path, steps=2), pipeline(), progress=False, output=None)
    assert run.attributes.model.weights == family_of(pipeline()).digest()
    assert run.attributes.model.weights_digest == MIXED
    assert not [thread for thread in threading.enumerate() if thread.name == "probe-digest"]


def test_no_step_is_committed_without_it_and_the_model_is_called_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, called, committed = tiny.pipeline(), threading.Event(), list[bool]()

    def wait() -> None:
        assert called.wait(60), "the model waits for the digest"
        (path,) = tmp_path.glob("*.zarr")
        committed.append(any((path / "committed" / "c.0").read_bytes()[:-4]))
        assert "weights" not in said(path)

    slow(monkeypatch, wait)
    with Hooks([(pipe.unet, "input", at_call(2, called.set))]):
        run = take(tmp_path, pipe)
    monkeypatch.undo()
    assert committed == [False] and run.status == "complete"
    assert run.attributes.model.weights == family_of(pipe).digest()
    assert not verify(run, pipe).failed


@pytest.mark.slow
def test_a_run_that_ended_before_it_was_known_is_resumed(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    whole = take(tmp_path / "whole", pipe)
    with (
        pytest.raises(KeyboardInterrupt),
        Hooks([(pipe.unet, "input", at_call(0, throw(KeyboardInterrupt())))]),
    ):
        take(tmp_path, pipe)
    (path,) = tmp_path.glob("*.zarr")
    assert "weights" not in said(path) and not len(Run(path).steps)
    finished = resume(Run(path), pipe, progress=False)
    assert finished.attributes.model.weights == whole.attributes.model.weights
    assert compare(whole, finished).same and not verify(finished, pipe).failed


def test_its_error_stops_the_run_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("a device is lost")

    slow(monkeypatch, broken)
    with pytest.raises(ModelError, match="could not be computed: a device is lost"):
        take(tmp_path)
    (path,) = tmp_path.glob("*.zarr")
    assert Run(path).status == "failed" and not len(Run(path).steps)
    with pytest.raises(ModelError, match="could not be computed: a device is lost"):
        record(ask(tmp_path), pipeline(), progress=False, output=None)


def test_a_block_that_ends_early_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, ended = weights._rows, threading.Event()

    def endless(*given: Any) -> Any:
        for portion in rows(*given):
            while not ended.wait(0.01):
                yield portion

    monkeypatch.setattr(weights, "_rows", endless)
    with pytest.raises(KeyError), DigestBeside(family_of(pipeline())):
        raise KeyError
    assert not ended.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "probe-digest"]


# --- recordings with another algorithm ------------------------------------------------------------


def as_before(path: Path, digest: str) -> Run:
    """A recording as it was written when the digest of weights was a SHA-256."""
    root = json.loads((path / "zarr.json").read_text())
    model = root["attributes"]["model"]
    model["weights"] = digest
    del model["weights_digest"]
    (path / "zarr.json").write_text(json.dumps(root))
    return Run(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("whole"))


def test_an_older_recording_is_verified_by_its_own(whole: Run, tmp_path: Path) -> None:
    digest = family_of(pipeline()).digest(SHA256)
    path = tmp_path / "old.zarr"
    shutil.copytree(whole.path, path)
    old = as_before(path, digest)
    with_its_digests(path)
    assert old.attributes.model.weights_digest == SHA256
    found = {check.name: check for check in verify(old, pipeline())}
    assert found["weights"].verdict == "exact" and digest in found["weights"].detail
    assert "failed" not in {check.verdict for check in found.values()}
    wrong = as_before(Path(shutil.copytree(whole.path, tmp_path / "wrong.zarr")), "0" * 16)
    with_its_digests(wrong.path)
    assert [check.name for check in verify(wrong, pipeline()) if check.verdict == "failed"] == [
        "weights"
    ]


def test_an_older_run_goes_on_by_its_own(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    with (
        pytest.raises(KeyboardInterrupt),
        Hooks([(pipe.unet, "input", at_call(3, throw(KeyboardInterrupt())))]),
    ):
        take(tmp_path, pipe)
    (path,) = tmp_path.glob("*.zarr")
    digest = family_of(pipe).digest(SHA256)
    with pytest.raises(ModelError, match="other weights"):
        resume(as_before(path, "0" * 16), pipe, progress=False)
    old = json.loads((path / "zarr.json").read_text())
    old["attributes"]["model"]["weights"] = digest
    (path / "zarr.json").write_text(json.dumps(old))
    finished = resume(Run(path), pipe, progress=False)
    assert finished.attributes.model.weights == digest
    assert finished.attributes.model.weights_digest == SHA256
    assert not verify(finished, pipe).failed


def test_an_older_run_again_has_the_new_one(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(whole.path, tmp_path / "old.zarr"))
    old = as_before(path, family_of(pipeline()).digest(SHA256))
    again = rerun(old, pipeline(), output=tmp_path)
    assert "other weights" not in capsys.readouterr().err
    assert again.attributes.model.weights == family_of(pipeline()).digest()
    assert again.attributes.model.weights_digest == MIXED
    said = compare(old, again)
    assert not said.differences
    assert said.conditions == ["weights: digests by two algorithms, which cannot be compared"]


def test_an_algorithm_of_a_newer_version_is_named(whole: Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(whole.path, tmp_path / "new.zarr"))
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["model"]["weights_digest"] = "of tomorrow"
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ModelError, match="'of tomorrow', is not known here"):
        rerun(Run(path), pipeline(), output=tmp_path, progress=False)
    with_its_digests(path)
    found = {check.name: check for check in verify(Run(path), pipeline())}
    assert found["weights"].verdict == "not checked" and "of tomorrow" in found["weights"].detail
    assert "of tomorrow" in found["unknown"].detail
    assert "failed" not in {check.verdict for check in found.values()}
