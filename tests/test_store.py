"""What a recording survives: readable at every moment, one writer, never overwritten.

It is never called complete when it is not.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from stored import (
    ATTRIBUTES,
    CALLS,
    another_process,
    check_prefix,
    contents,
    layout,
    numbers,
    put,
    recorded,
)

from probe.errors import RecordingBusy, RecordingDamaged, StoreError
from probe.format.schema import spec
from probe.reading.recording import Run
from probe.writing import files
from probe.writing.store import MANIFEST, RunWriter, manifest

pytestmark = pytest.mark.usefixtures("no_thread_left")


# --- a round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["step", "run", "none"])
@pytest.mark.parametrize("maps", ["float16", "float32", "uint8"])
def test_what_is_written_is_read(tmp_path: Path, maps: str, durability: str) -> None:
    path = tmp_path / "runs" / "a.zarr"
    final, image = (
        np.random.default_rng(9).standard_normal((1, 4, 8, 8)).astype("f4"),
        np.arange(162, dtype="u1").reshape(1, 6, 9, 3),
    )
    with RunWriter(path, layout(maps), ATTRIBUTES, durability) as writer:
        for step in range(CALLS):
            put(writer, step, maps)
        writer.flush()
        writer.write("latents/final_latents", final)
        writer.write("images/final", image[:, :3], at=(slice(None), slice(0, 3)))
        writer.write("images/final", image[:, 3:], at=(slice(None), slice(3, 6)))
        writer.write("cost/peak_memory", 2**40 + 1)
        np.testing.assert_array_equal(
            writer.read("latents/latents", at=2), numbers(2)["latents/latents"]
        )
        writer.complete()
    assert check_prefix(path, maps=maps) == CALLS
    run = Run(path)
    for made in layout(maps):
        found = run.tree[made.path]
        assert (found.dims, found.shape) == (made.dims, made.shape)
        assert (
            found.dtype == (object if made.dtype == "str" else np.dtype(made.dtype))
            or made.dtype == "str"
        )
        assert (
            found.attrs["long_name"] == made.variable.long_name
            and found.attrs["units"] == made.variable.units
        )
        if made.value is not None:
            assert found.values.tolist() == made.value.tolist()
    np.testing.assert_array_equal(run.tree["latents/final_latents"].values, final)
    np.testing.assert_array_equal(run.tree["images/final"].values, image)
    assert int(run.tree["cost/peak_memory"]) == 2**40 + 1
    assert run.attributes["status"] == run.status == "complete"
    assert json.loads((path / MANIFEST).read_text()) == manifest(path)
    assert [file.name for file in path.parent.iterdir()] == ["a.zarr"], (
        "locks and hidden folders are gone"
    )
    with xr.open_datatree(path, engine="zarr", chunks=None) as stock:
        assert stock["latents/latents"].sizes == {
            "step": CALLS,
            "image": 1,
            "channel": 4,
            "y": 8,
            "x": 8,
        }
        assert "sigma" in stock.coords and "token_text" in stock["attention/4x4/cross"].coords


def test_it_can_be_read_at_every_moment(tmp_path: Path) -> None:
    """Stock xarray, warnings being errors: created, after each step, before and after the end."""
    path = tmp_path / "a.zarr"
    with RunWriter(path, layout(), ATTRIBUTES) as writer:
        for step in range(CALLS):
            assert check_prefix(path) == step
            tree = xr.open_datatree(path, engine="zarr", chunks=None)
            assert np.isnan(tree["latents/latents"].values[step:]).all(), (
                "what is not written yet is no number"
            )
            assert Run(path).status == "running" and not (path / MANIFEST).exists()
            put(writer, step)
            writer.flush()
        assert check_prefix(path) == CALLS and Run(path).status == "running"
        writer.complete()
        assert Run(path).status == "complete"
    assert check_prefix(path) == CALLS


def test_a_run_left_early_is_interrupted_and_a_run_that_failed_says_so(tmp_path: Path) -> None:
    for name, error, status in (
        ("stop", KeyboardInterrupt, "interrupted"),
        ("fail", ValueError, "failed"),
    ):
        writer = RunWriter(tmp_path / f"{name}.zarr", layout(), ATTRIBUTES)
        put(writer, 0)
        writer.__exit__(error, error(), None)
        assert (
            Run(tmp_path / f"{name}.zarr").status == status
            and check_prefix(tmp_path / f"{name}.zarr") == 1
        )
    assert Run(recorded(tmp_path / "left.zarr", steps=2)).status == "interrupted"


def test_an_error_of_the_last_step_is_not_lost_when_nobody_waits(tmp_path: Path) -> None:
    def bad() -> Mapping[str, np.ndarray]:
        time.sleep(0.05)
        raise ValueError("no values")

    with (
        pytest.raises(StoreError, match="no values"),
        RunWriter(tmp_path / "a.zarr", layout(), ATTRIBUTES) as writer,
    ):
        writer.write_step(0, bad, 1)
    assert Run(tmp_path / "a.zarr").status == "failed"
    RunWriter(tmp_path / "b.zarr", layout(), ATTRIBUTES).__exit__(None)


# --- one writer -----------------------------------------------------------------------------------


def test_a_second_writer_is_refused_at_once_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with RunWriter(path, layout(), ATTRIBUTES) as writer:
        put(writer, 0)
        writer.flush()
        start = time.monotonic()
        with pytest.raises(RecordingBusy) as caught:
            RunWriter(path, layout(), ATTRIBUTES)
        assert time.monotonic() - start < 0.5
        script = """
            start = time.monotonic()
            try:
                RunWriter(Path(sys.argv[1]), layout(), ATTRIBUTES)
            except RecordingBusy as busy:
                print(json.dumps([busy.cause, busy.remedy, time.monotonic() - start]))
        """
        out, err = another_process(script, path).communicate(timeout=60)
        cause, remedy, seconds = json.loads(out or f'"{err}"')
        assert (
            cause
            == caught.value.cause
            == f"a.zarr is being written by process {os.getpid()} on {socket.gethostname()}."
        )
        assert remedy == "Wait for it, or give the run another name." and seconds < 0.5
        put(writer, 1)
    assert check_prefix(path) == 2


@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_all_who_race_for_a_recording_one_wins(tmp_path: Path, resume: bool) -> None:
    """Ten races of four processes, all let go at the same moment: to begin it, or to go on with
    what a dead writer left.
    """
    script = """
        folder, resume, lines = Path(sys.argv[1]), sys.argv[2] == "True", []
        for race in range(10):
            gate, results, release = os.pipe(), os.pipe(), os.pipe()
            children = []
            for runner in range(4):
                if (child := os.fork()) == 0:
                    os.close(gate[1]), os.close(release[1])
                    os.read(gate[0], 1)  # until the gate closes
                    try:
                        RunWriter(folder / f"{race}.zarr", layout(), ATTRIBUTES, resume=resume)
                        os.write(results[1], b"won;")
                        os.read(release[0], 1)  # hold it until all have tried
                    except RecordingBusy:
                        os.write(results[1], b"refused;")
                    except BaseException as error:
                        os.write(results[1], repr(error).encode() + b";")
                    os._exit(0)
                children.append(child)
            os.close(gate[0]), os.close(gate[1]), os.close(results[1])
            said = b""
            while said.count(b";") < 4 and (more := os.read(results[0], 4096)):
                said += more
            os.close(release[0]), os.close(release[1]), os.close(results[0])
            for child in children:
                os.waitpid(child, 0)
            lines.append(sorted(said.decode().split(";")[:-1]))
        print(json.dumps(lines))
    """
    if resume:
        left = recorded(tmp_path / "left", steps=3)
        for race in range(10):
            shutil.copytree(left, tmp_path / f"{race}.zarr")
            (tmp_path / f".{race}.zarr.lock").write_text("")  # as a killed writer leaves it
    out, err = another_process(script, tmp_path, resume).communicate(timeout=240)
    assert json.loads(out or f'"{err}"') == [["refused", "refused", "refused", "won"]] * 10
    assert all(
        check_prefix(tmp_path / f"{race}.zarr") == (3 if resume else 0) for race in range(10)
    )


def test_kill_minus_9_frees_the_lock_and_leaves_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    script = """
        with RunWriter(Path(sys.argv[1]), layout(), ATTRIBUTES) as writer:
            for step in range(3):
                put(writer, step)
            writer.flush()
            print("ready", flush=True)
            time.sleep(60)
    """
    holder = another_process(script, path)
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    assert Run(path).status == "running"
    with pytest.raises(RecordingBusy, match=f"by process {holder.pid} on"):
        RunWriter(path, layout(), ATTRIBUTES)
    holder.kill()
    holder.communicate()
    assert Run(path).status == "interrupted", "its writer is no more"
    assert check_prefix(path) == 3
    before = contents(path)
    with pytest.raises(RecordingBusy, match="exists already, and a recording is never overwritten"):
        RunWriter(path, layout(), ATTRIBUTES)
    assert contents(path) == before
    path.rename(tmp_path / "b.zarr")
    recorded(path)
    assert check_prefix(path) == CALLS


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.zarr")
    before = contents(tmp_path)
    with pytest.raises(RecordingBusy) as caught:
        RunWriter(path, layout(), ATTRIBUTES)
    assert caught.value.remedy == "Give the run another name, or remove it: probe rm."
    assert {
        name: content for name, content in contents(tmp_path).items() if not name.endswith(".lock")
    } == before


# --- the order of a step --------------------------------------------------------------------------


def test_a_step_is_committed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    real_replace, real_append = files.replace, files.append

    def replacing(file: str | Path, parts: Iterable[bytes | memoryview], sync: bool) -> None:
        whole = [bytes(part) for part in parts]
        order.append((Path(file).parent.name, len(b"".join(whole))))
        real_replace(file, whole, sync)

    def appending(file: Path, content: bytes, sync: bool) -> None:
        order.append((file.name, len(content)))
        real_append(file, content, sync)

    with RunWriter(tmp_path / "a.zarr", layout(), ATTRIBUTES) as writer:
        monkeypatch.setattr(files, "replace", replacing)
        monkeypatch.setattr(files, "append", appending)
        put(writer, 0)
        writer.flush()
    paths = [path for path, _ in order]
    assert paths == ["latents", "cross", "moments", "digests.txt", "committed", "a.zarr"], (
        "last the root: interrupted"
    )
    sizes = [size for _, size in order[:3]]
    assert sizes == sorted(sizes, reverse=True), "the bulk first"


# --- going on -------------------------------------------------------------------------------------


def test_a_writer_that_goes_on_reads_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.zarr", steps=3)
    with RunWriter(path, layout(), {"note": "again"}, resume=True) as writer:
        assert writer.committed == 3 and Run(path).status == "running"
        np.testing.assert_array_equal(
            writer.read("latents/latents", at=1), numbers(1)["latents/latents"]
        )
        for step in range(3, CALLS):
            put(writer, step)
        writer.complete()
    assert (
        check_prefix(path) == CALLS
        and Run(path).status == "complete"
        and Run(path).attributes["note"] == "again"
    )
    whole = recorded(tmp_path / "whole.zarr")
    unlike = {name for name, content in contents(whole).items() if contents(path)[name] != content}
    assert contents(path).keys() == contents(whole).keys() and unlike == {"zarr.json", MANIFEST}, (
        "and in the manifest, that of zarr.json"
    )


@pytest.mark.parametrize("wrong", ["shape", "type"])
def test_a_writer_that_goes_on_with_something_else_is_refused(tmp_path: Path, wrong: str) -> None:
    path = recorded(tmp_path / "a.zarr", steps=3)
    other = (
        layout("float32")
        if wrong == "type"
        else [spec("latents", "latents", (CALLS + 1, 1, 4, 8, 8), "float32")]
    )
    before = contents(path)
    with pytest.raises(RecordingDamaged, match="is not what its experiment asks for"):
        RunWriter(path, other, {}, resume=True)
    assert contents(path) == before and list(tmp_path.iterdir()) == [path]
