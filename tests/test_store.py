"""What a recording survives: readable at every moment, one writer, never overwritten.

It is never called complete when it is not. These are recordings of synthetic numbers, without torch
and without a model: the store knows nothing of either.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from probe.errors import NotFinite, RecordingBusy, RecordingDamaged, RecordingNotFound, StoreError
from probe.format.schema import ArraySpec, spec
from probe.proof.checks import files_of
from probe.reading.finding import find_run
from probe.reading.listing import list_runs
from probe.reading.recording import Run, open_run
from probe.settings.experiment import Experiment
from probe.writing import files
from probe.writing.background import Queue
from probe.writing.digests import DIGESTS
from probe.writing.layout import attributes_in_files, create
from probe.writing.layout import layout as lie
from probe.writing.store import MANIFEST, RunWriter, manifest
from probe.writing.upkeep import clear_orphans

ROOT = Path(__file__).parent.parent
CALLS = 5
ATTRIBUTES: dict[str, Any] = {
    "format_version": 1,
    "created": "2026-01-02T03:04:05.678+00:00",
    "experiment": Experiment().resolved(),
    "environment": {"device": "cpu"},
    "model": {"name": "emojiworld", "dtype": "float32"},
    "scheduler": {"class": "DDIMScheduler", "config": {}},
    "prediction_type": "epsilon",
    "latent_convention": "variance_preserving",
}


def layout(maps: str = "float16") -> list[ArraySpec]:
    """One variable of every type and of every way of being written: at once, a step at a time, at
    the end.
    """
    grid = "attention/4x4"
    return [
        spec("", "step", value=np.arange(CALLS)),
        spec("", "sigma", value=np.linspace(14.6, 0.03, CALLS)),
        spec("", "committed", (CALLS,)),
        spec("latents", "latents", (CALLS, 1, 4, 8, 8), "float32"),
        spec("latents", "final_latents", (1, 4, 8, 8), "float32"),
        spec("images", "final", (1, 6, 9, 3)),
        spec(grid, "branch", value=["cond"]),
        spec(grid, "token", value=np.array([0, 1, -1])),
        spec(grid, "token_text", value=[["<|startoftext|>", "é ☃ \U0001f419", ""]]),
        spec(grid, "cross", (CALLS, 3, 1, 1, 2, 2, 4, 4), maps),
        spec(grid, "moments", (CALLS, 3, 1, 1, 2, 2, 3)),
        spec("cost", "peak_memory", ()),
    ]


def numbers(step: int, maps: str = "float16") -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    cross = draw.random((3, 1, 1, 2, 2, 4, 4))
    return {
        "latents/latents": draw.standard_normal((1, 4, 8, 8)).astype("f4"),
        "attention/4x4/cross": (cross * 255).astype("u1")
        if maps == "uint8"
        else cross.astype(maps),
        "attention/4x4/moments": draw.random((3, 1, 1, 2, 2, 3)).astype("f4"),
    }


def put(writer: RunWriter, step: int, maps: str = "float16") -> None:
    values = numbers(step, maps)
    writer.write_step(step, lambda: values, sum(value.nbytes for value in values.values()))


def recorded(path: Path, steps: int = CALLS, **options: Any) -> Path:
    """A whole recording, or one that ends after some steps."""
    with RunWriter(path, layout(), ATTRIBUTES, **options) as writer:
        for step in range(steps):
            put(writer, step)
        if steps == CALLS:
            writer.complete()
    return path


def check_prefix(path: Path, least: int = 0, maps: str = "float16") -> int:
    """The recording opens, and every committed step holds what was written; returns how many there
    are.
    """
    run = Run(path)
    committed = run.tree["committed"].values
    steps = int(committed.sum())
    assert committed.tolist() == [1] * steps + [0] * (CALLS - steps) and steps >= least
    for step in range(steps):
        for name, value in numbers(step, maps).items():
            np.testing.assert_array_equal(run.tree[name].isel(step=step).values, value)
    return steps


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "probe-writer"]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = writers()
    yield
    assert writers() == before, "a writing thread is left over"


def another_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Python with this module's names, in a process of its own."""
    code = f"from test_store import *\n{textwrap.dedent(script)}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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


@pytest.mark.parametrize("resume", [False, True])
def test_of_all_who_race_for_a_recording_one_wins(tmp_path: Path, resume: bool) -> None:
    """Ten races of four processes, all let go at the same moment: to begin it, or to go on with
    what a dead writer left.
    """
    script = """
        folder, resume, lines = Path(sys.argv[1]), sys.argv[2] == "True", []
        for race in range(10):
            gate, results = os.pipe(), os.pipe()
            children = []
            for runner in range(4):
                if (child := os.fork()) == 0:
                    os.close(gate[1])
                    os.read(gate[0], 1)  # until the gate closes
                    try:
                        RunWriter(folder / f"{race}.zarr", layout(), ATTRIBUTES, resume=resume)
                        os.write(results[1], b"won;")
                        time.sleep(0.1)  # hold it
                    except RecordingBusy:
                        os.write(results[1], b"refused;")
                    except BaseException as error:
                        os.write(results[1], repr(error).encode() + b";")
                    os._exit(0)
                children.append(child)
            os.close(gate[0]), os.close(gate[1]), os.close(results[1])
            for child in children:
                os.waitpid(child, 0)
            with os.fdopen(results[0]) as read:
                lines.append(sorted(read.read().split(";")[:-1]))
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


# --- the queue ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(100, [30] * 40), (100, [250] * 8), (100, [1, 99, 100, 101, 7] * 6), (0, [5] * 10)],
)
def test_the_queue_is_bounded_in_bytes(limit: int, sizes: list[int]) -> None:
    done: list[int] = []
    held: list[int] = []

    def work(item: int) -> None:
        held.append(queue._held)
        time.sleep(0.001)
        done.append(item)

    queue = Queue(work, limit)
    for index, size in enumerate(sizes):
        queue.put(index, size)
        held.append(queue._held)
    queue.join()
    assert done == list(range(len(sizes))) and queue._held == 0
    assert max(held) <= max(limit, *sizes), "never more than the limit, or one item larger than it"
    queue.close()


def test_a_slow_disk_makes_the_producer_wait() -> None:
    release = threading.Event()
    queue = Queue(lambda item: release.wait(10), 100)
    queue.put(1, 60)
    waiting = threading.Thread(target=queue.put, args=(2, 60))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "the second item does not fit beside the first"
    release.set()
    waiting.join(5)
    assert not waiting.is_alive()
    queue.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ValueError("broken"), StoreError), (NotFinite("NaN at step 3", "stop"), NotFinite)],
)
def test_a_producer_that_waits_hears_of_an_error(error: Exception, kind: type[Exception]) -> None:
    release = threading.Event()

    def work(item: int) -> None:
        release.wait(10)
        raise error

    queue = Queue(work, 100)
    queue.put(1, 60)
    heard: list[Exception] = []

    def produce() -> None:
        try:
            queue.put(2, 60)
        except Exception as problem:
            heard.append(problem)

    waiting = threading.Thread(target=produce)
    waiting.start()
    time.sleep(0.05)
    release.set()
    waiting.join(2)
    assert not waiting.is_alive() and [type(problem) for problem in heard] == [kind]
    for call in (queue.join, queue.close, lambda: queue.put(3, 1)):
        with pytest.raises(kind):
            call()
    assert kind is NotFinite or heard[0].__cause__ is error


INTERRUPTED = """
import random, signal, threading
from probe.writing.background import Queue

signal.signal(signal.SIGALRM, signal.default_int_handler)
rng = random.Random(0)
for index in range(2000):
    queue = Queue(lambda item: None, 100)
    try:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
        while True:
            queue.put(1, 60)
    except KeyboardInterrupt:
        pass
    closing = threading.Thread(target=queue.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive(), f"round {index}: the queue does not end"
"""


def test_ctrl_c_between_any_two_instructions_leaves_a_queue_that_ends() -> None:
    """In a process of its own, since pytest's limit of time has the timer here."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=200
    )
    assert (ended.returncode, ended.stderr) == (0, "")


KNOWN = [
    spec("", "step", value=np.arange(1)),  # nothing but zeros, zarr's fill value
    spec("", "sigma", value=np.array([14.6])),
    spec("", "timestep", (1,)),
    spec("attention/4x4", "token", value=np.array([0, 1, -1])),
    spec("attention/4x4", "token_text", value=[["<|startoftext|>", "é ☃ \U0001f419", ""]]),
    spec("attention/4x4", "word", value=[["", "", ""]]),
    spec("text/text_encoder", "embedding", None, "float16", np.ones((1, 2, 3)), note="ü"),
    spec("latents", "latents", None, "float32", np.ones((1, 1, 4, 8, 8))),
    spec("attention/4x4", "cross", None, "uint8", np.ones((1, 3, 1, 1, 2, 2, 4, 4))),
    spec("cost", "peak_memory", value=7),
    spec("cost", "flops", (0,)),
]


def test_what_is_created_is_what_zarr_would_create(tmp_path: Path) -> None:
    """Metadata, consolidated too, and what is known from the beginning: byte for byte."""
    arrays = [*BY_STEP, *NOT_BY_STEP]
    for number, specs in enumerate((layout(), KNOWN, arrays)):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"zarr{number}"
        ours.mkdir()
        create(ours, specs, ATTRIBUTES)
        by_zarr(theirs, specs)
        for name in (DIGESTS, "committed/c.0"):  # of our own: zarr writes no file of zeros
            (ours / name).unlink(missing_ok=True)
        assert contents(ours) == contents(theirs) and len(contents(ours)) > len(specs)


def by_zarr(folder: Path, arrays: list[ArraySpec]) -> None:
    """Create a recording with zarr alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        root = zarr.create_group(LocalStore(folder), zarr_format=3, attributes=ATTRIBUTES)
        for a, attributes in attributes_in_files(arrays):
            how = lie(a)
            stored = root.create_array(
                a.path,
                shape=how.shape,
                dtype=how.dtype or str,
                chunks=how.chunks,
                shards=how.shards,
                fill_value=None if how.dtype is None else how.fill_value,
                chunk_key_encoding={"name": "default", "separator": "."},
                compressors=[Crc32cCodec()],
                dimension_names=a.dims,
                attributes=attributes,
            )
            if a.value is not None:
                stored[...] = a.value
        zarr.consolidate_metadata(LocalStore(folder))


BY_STEP = [
    spec("latents", "latents", (6, 1, 4, 8, 8), "float32"),
    spec("latents", "prediction", (6, 1, 4, 8, 8), "float16"),
    spec("attention/4x4", "cross", (6, 3, 1, 1, 2, 2, 4, 4), "float16"),
    spec("attention/4x5", "cross", (6, 3, 1, 1, 2, 2, 4, 5), "float32"),
    spec("attention/4x6", "cross", (6, 3, 1, 1, 2, 2, 4, 6), "uint8"),
    spec("attention/4x4", "moments", (6, 3, 1, 1, 2, 2, 3)),
    spec("forward", "loss_mean", (6,)),
    spec("unet", "statistics", (6, 4, 2, 1, 0)),
]
NOT_BY_STEP = [
    spec("latents", "final_latents", (1, 4, 8, 8), "float32"),
    spec("attention/4x4", "overview", (3, 6, 4, 4)),
    spec("decoded", "picture", (3, 1, 6, 9, 3)),
    spec("cost", "flops", (3,)),
    spec("cost", "peak_memory", ()),
    spec("source", "psnr", ()),
]


def value_of_step(
    step: int, shape: tuple[int, ...], dtype: str, fill: Any, rng: np.random.Generator
) -> np.ndarray:
    """Draw a step's value, with chunks that hold nothing but fill values at some steps."""
    value = np.asarray(rng.integers(1, 250, shape) / 8).astype(dtype)
    if step == 1 and value.ndim:  # one chunk of a shard is nothing but fill values, or almost
        value[..., :1] = fill
        value[:1] = fill
    if step in (2, 5):
        value[...] = fill
    if step == 3 and value.ndim:  # as a view, and of another type
        value = np.moveaxis(np.moveaxis(value, -1, 0).copy(), 0, -1).astype(np.float64)
    return value


def chunk_files(root: Path) -> dict[str, bytes]:
    files = [file for file in root.rglob("c*") if file.is_file()]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files}


def test_what_is_written_are_the_bytes_that_zarr_would_write(tmp_path: Path) -> None:
    """As chunks and as shards, of every type, with values that are nothing but fill, here and there
    or all over; whole and in part.
    """
    rng = np.random.default_rng(3)
    arrays = [*BY_STEP, *NOT_BY_STEP]
    both = (RunWriter(tmp_path / name, arrays, ATTRIBUTES) for name in ("ours.zarr", "zarr"))
    with next(both) as ours, next(both) as theirs:
        stock = zarr.open_group(theirs.path, mode="r+")
        for a in BY_STEP:
            for step in range(6):
                fill = stock[a.path].fill_value
                value = value_of_step(step, a.shape[1:], a.dtype, fill, rng)
                if step == 5:  # after a first writer, who was killed
                    ours._files[a.path].write(step, np.ones_like(value))
                ours._files[a.path].write(step, value)
                stock[a.path][step] = value
        for a in NOT_BY_STEP:
            value = np.asarray(rng.integers(1, 250, a.shape)).astype(a.dtype)
            parts = {"overview": (slice(None), 2), "picture": 1, "flops": slice(1, 3)}
            for at in (..., parts.get(a.variable.name, ...)):
                ours.write(a.path, value[at], at)
                stock[a.path][at] = value[at]
                value = value + (0 if a.variable.name == "overview" else 1)
        for path in ("decoded/picture", "cost/flops", "attention/4x4/overview"):  # nothing again
            ours.write(path, stock[path].fill_value)
            stock[path][...] = stock[path].fill_value
            ours.write(path, 7, at=0)
            stock[path][0] = 7
        expected = chunk_files(theirs.path)
        assert chunk_files(ours.path) == expected and len(expected) == 29


# --- a disk that does not take it -----------------------------------------------------------------


class Disk:
    """Counts what is asked of the disk, and refuses from the Nth time on, or the Nth time only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.at, self.forever, self.number = 0, 0, False, errno.ENOSPC
        self._lock = threading.Lock()
        real_write = files.replace

        def write(*arguments: Any) -> None:
            self.operation()
            real_write(*arguments)

        monkeypatch.setattr(files, "replace", write)

    def operation(self) -> None:
        with self._lock:
            self.count += 1
            refuse = self.at and (self.count == self.at or (self.forever and self.count > self.at))
        if refuse:
            raise OSError(self.number, os.strerror(self.number))

    def break_at(self, at: int, forever: bool, number: int = errno.ENOSPC) -> None:
        self.count, self.at, self.forever, self.number = 0, at, forever, number


@pytest.mark.parametrize("forever", [False, True])
def test_an_error_of_any_operation_ends_in_a_store_error_and_a_readable_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forever: bool
) -> None:
    disk = Disk(monkeypatch)
    recorded(tmp_path / "whole.zarr", durability="none")
    operations = disk.count
    assert operations > 5 * 4 + 20
    for at in range(1, operations + 1, 3 if forever else 1):
        path = tmp_path / f"{at}.zarr"
        disk.break_at(at, forever)
        with pytest.raises(StoreError) as caught:
            recorded(path, durability="none")
        assert (
            caught.value.cause == f"{path} could not be written: No space left on device."
            and "Free some room" in caught.value.remedy
        )
        disk.break_at(0, False)
        if path.exists():
            check_prefix(path)
            kept = Run(path).attributes["status"]
            assert kept == "failed" or (forever and kept == "running"), at
        assert not [file for file in tmp_path.iterdir() if file.name.endswith(".partial")], at
        assert not writers()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_the_remedy_fits_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    disk = Disk(monkeypatch)
    disk.break_at(15, True, number)
    with pytest.raises(StoreError) as caught:
        recorded(tmp_path / "a.zarr")
    assert os.strerror(number) in caught.value.cause
    remedies = {errno.EIO: "Check the disk", errno.EDQUOT: "Free some room"}
    assert caught.value.remedy.startswith(remedies.get(number, "Name another folder: --output ")), (
        "nothing is there yet"
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        RunWriter(tmp_path / "file" / "a.zarr", layout(), ATTRIBUTES)
    assert not writers()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Not a stand-in: the system refuses every file beyond 20 kB, and the Rust writer of bulk gets
    to feel it.
    """
    script = """
        import resource
        arrays = [
            spec("", "step", value=np.arange(3)),
            spec("", "committed", (3,)),
            spec("latents", "latents", (3, 1, 4, 64, 64), "float32"),
        ]
        try:
            with RunWriter(Path(sys.argv[1]), arrays, ATTRIBUTES) as writer:
                value = {"latents/latents": np.ones((1, 4, 64, 64), "f4")}
                writer.write_step(0, lambda: value, 1)
                writer.flush()
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                writer.write_step(1, lambda: value, 1)
                writer.complete()
        except StoreError as error:
            print(json.dumps([error.cause, error.remedy]))
    """
    path = tmp_path / "a.zarr"
    out, err = another_process(script, path).communicate(timeout=60)
    cause, remedy = json.loads(out or f'"{err}"')
    assert cause == f"{path} could not be written: File too large." and remedy.startswith(
        "Free some room"
    )
    run = Run(path)
    assert run.status == "failed" and run.steps.tolist() == [0] and (run.latents == 1).all()


# --- what the manifest sees -----------------------------------------------------------------------


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


# --- what dead writers left -----------------------------------------------------------------------


def test_orphans_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    """Names with dots, brackets and `.zarr` in them are names like others."""
    names = ("a-11111111.zarr", "b.zarr-22222222.zarr", "c [1]-33333333.zarr")
    script = """
        folder = Path(sys.argv[1])
        writers = [RunWriter(folder / name, layout(), ATTRIBUTES) for name in sys.argv[2:]]
        for writer in writers:
            put(writer, 0)
            writer.flush()
        print("ready", flush=True)
        time.sleep(60)
    """
    holder = another_process(script, tmp_path, *names)
    assert holder.stdout and holder.stdout.readline() == "ready\n"
    left = []
    for name in names:
        (tmp_path / f".{name}.0123abcd.partial" / "latents").mkdir(parents=True)
        (tmp_path / name / "latents" / "c.0123.partial").write_text("")
        left += [
            tmp_path / f".{name}.0123abcd.partial",
            tmp_path / name / "latents" / "c.0123.partial",
            tmp_path / f".{name}.lock",
        ]
    for file in ("note.txt", ".hidden", ".not-ours.lock", "part.partial"):
        (tmp_path / file).write_text("somebody else's")
    recorded(tmp_path / "d-44444444.zarr")
    alone = (
        tmp_path / ".e-55555555.zarr.89abcdef.partial"
    )  # of one that was killed before it had a name
    alone.mkdir()

    everything = contents(tmp_path)
    assert (
        clear_orphans(tmp_path, dry_run=True) == [alone]
        and contents(tmp_path) == everything
        and alone.exists()
    )
    assert (
        clear_orphans(tmp_path) == [alone]
        and contents(tmp_path) == everything
        and not alone.exists()
    )

    holder.kill()
    holder.communicate()
    assert (
        sorted(clear_orphans(tmp_path, dry_run=True)) == sorted(left)
        and contents(tmp_path) == everything
    )
    assert sorted(clear_orphans(tmp_path)) == sorted(left) and not any(
        path.exists() for path in left
    )
    gone = {str(path.relative_to(tmp_path)) for path in left}
    assert contents(tmp_path) == {
        name: content for name, content in everything.items() if name not in gone
    }
    assert clear_orphans(tmp_path) == clear_orphans(tmp_path / "nowhere") == []
    assert all(check_prefix(tmp_path / name) == 1 for name in names)


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


# --- finding recordings ---------------------------------------------------------------------------


def fake(path: Path, **attributes: Any) -> Path:
    """The root file of a recording, without the recording."""
    path.mkdir(parents=True)
    about = {**ATTRIBUTES, "status": "complete", **attributes}
    (path / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": about})
    )
    return path


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no root file": lambda file: file.unlink(),
    "nothing in it": lambda file: file.write_text(""),
    "half of it": lambda file: file.write_text(file.read_text()[:100]),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda file: file.write_text("[]"),
    "nested without end": lambda file: file.write_text("[" * 100_000),
    "no attributes": lambda file: file.write_text('{"zarr_format": 3, "node_type": "group"}'),
    "another format": lambda file: file.write_text(
        file.read_text().replace('"format_version": 1', '"format_version": 99')
    ),
    "no experiment": lambda file: file.write_text(
        file.read_text().replace('"experiment": {', '"experiment": 3, "other": {')
    ),
    "an empty experiment": lambda file: file.write_text(
        file.read_text().replace('"experiment": {', '"experiment": {}, "other": {')
    ),
    "a prompt that is a number": lambda file: file.write_text(
        file.read_text().replace('"prompt": "', '"prompt": 3, "_": "')
    ),
    "created that is a number": lambda file: file.write_text(
        file.read_text().replace('"created": "', '"created": 3, "_": "')
    ),
    "a status that is a list": lambda file: file.write_text(
        file.read_text().replace('"status": "', '"status": [], "_": "')
    ),
    "zarr 2": lambda file: file.write_text(
        file.read_text().replace('"zarr_format": 3', '"zarr_format": 2')
    ),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_is_a_row_and_hides_no_other(tmp_path: Path, damage: str) -> None:
    good, bad = fake(tmp_path / "good.zarr"), fake(tmp_path / "bad.zarr")
    DAMAGES[damage](bad / "zarr.json")
    rows = list_runs(tmp_path)
    assert [(path, attributes is None) for path, attributes in rows] == [(good, False), (bad, True)]
    with pytest.raises((RecordingDamaged, RecordingNotFound)) as caught:
        Run(bad)
    assert caught.value.remedy and "\n" not in caught.value.cause


@pytest.mark.parametrize(
    "writer",
    [
        {},
        {"pid": 1},
        {"pid": "x", "host": socket.gethostname()},
        {"pid": None, "host": socket.gethostname()},
        7,
        None,
    ],
)
def test_a_writer_that_makes_no_sense_is_not_asked(tmp_path: Path, writer: Any) -> None:
    fake(tmp_path / "a.zarr", status="running", writer=writer)
    fake(tmp_path / "b.zarr", status="running", writer={"pid": 2**70, "host": socket.gethostname()})
    assert {attributes and attributes["status"] for _, attributes in list_runs(tmp_path)} <= {
        "running",
        "interrupted",
        None,
    }


def test_a_running_one_whose_writer_died_is_interrupted(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    dead = fake(tmp_path / "dead.zarr", status="running", writer={"pid": gone.pid, "host": host})
    alive = fake(
        tmp_path / "alive.zarr", status="running", writer={"pid": os.getpid(), "host": host}
    )
    away = fake(
        tmp_path / "away.zarr",
        status="running",
        writer={"pid": gone.pid, "host": "another-machine"},
    )
    statuses = {
        path: attributes["status"] for path, attributes in list_runs(tmp_path) if attributes
    }
    assert statuses == {dead: "interrupted", alive: "running", away: "running"}


def test_listing_many_is_fast_and_newest_first(tmp_path: Path) -> None:
    for index in range(200):
        fake(
            tmp_path / f"run-{index:03}.zarr",
            created=f"2026-01-01T00:{index // 60:02}:{index % 60:02}.000+00:00",
            consolidated={"x": "y" * 20_000},
        )
    (tmp_path / "run-100.zarr" / "zarr.json").write_text("{")
    fake(tmp_path / ".hidden.zarr.partial")
    fake(tmp_path / ".hidden.zarr")
    fake(tmp_path / "something-else")
    (tmp_path / "file.zarr").write_text("")
    start = time.perf_counter()
    rows = list_runs(tmp_path)
    seconds = time.perf_counter() - start
    assert (
        len(rows) == 200
        and rows[0][0].name == "run-199.zarr"
        and rows[-1] == (tmp_path / "run-100.zarr", None)
    )
    assert seconds < 0.5, f"{seconds:.2f} s"
    print(f"200 recordings listed in {seconds:.3f} s")


def test_a_run_is_found_by_its_path_the_beginning_of_its_name_or_as_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fake(tmp_path / "runs" / "cat-11111111.zarr", created="2026-01-01")
    new = fake(tmp_path / "runs" / "cat-22222222.zarr", created="2026-01-03")
    dog = fake(tmp_path / "runs" / "dog-33333333.zarr", created="2026-01-02")
    runs = tmp_path / "runs"
    assert find_run("latest", runs) == new
    for name in (
        old,
        str(old),
        f"{old}/",
        "cat-1",
        "cat-11111111",
        "cat-11111111.zarr",
        f"{runs}/cat-1",
    ):
        assert find_run(name, runs) == old, name
    assert find_run("d", str(runs)) == dog
    monkeypatch.chdir(tmp_path)
    assert (
        find_run("runs/cat-1", "runs")
        == find_run("runs/cat-1", "runs/")
        == Path("runs/cat-11111111.zarr")
    )
    assert open_run("d").name == "dog-33333333"
    with pytest.raises(RecordingNotFound) as caught:
        find_run("cat", runs)
    assert caught.value.cause == "2 recordings begin with 'cat'."
    assert "cat-11111111" in caught.value.remedy and "cat-22222222" in caught.value.remedy
    with pytest.raises(RecordingNotFound) as caught:
        find_run("dgo-33333333", runs)
    assert (
        "begins with 'dgo-33333333'" in caught.value.cause
        and "Did you mean dog-33333333" in caught.value.remedy
    )
    for folder in (tmp_path / "nothing", tmp_path / "runs" / "cat-11111111.zarr" / "zarr.json"):
        with pytest.raises(RecordingNotFound) as caught:
            find_run("latest", folder)
        assert (
            "There is no recording in" in caught.value.cause and "probe.run" in caught.value.remedy
        )


def test_no_name_is_no_choice(tmp_path: Path) -> None:
    """An empty variable of a shell must not choose what `probe rm` removes."""
    fake(tmp_path / "only-11111111.zarr")
    for name in ("", " "):
        with pytest.raises(RecordingNotFound):
            find_run(name, tmp_path)


def test_the_latest_is_one_that_can_be_read(tmp_path: Path) -> None:
    good, bad = fake(tmp_path / "good.zarr"), fake(tmp_path / "bad.zarr")
    (bad / "zarr.json").write_text("{")
    assert find_run("latest", tmp_path) == good
