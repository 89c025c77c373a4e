"""Whatever happens to a run, it ends in a clear line and a readable beginning.

It is never called complete. It is killed at any moment, interrupted, refused by the disk, out of
memory, given NaN, or watched while it writes. The recorder is the real one, in a process of its own
if that process is to die (tests/doomed.py).
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import doomed
import numpy as np
import pytest
import torch
import xarray as xr
from doomed import Doomed, Ended, Fault, Torn
from recordings import assert_prefix, cut, only
from tiny_runs import ask, assert_no_hooks, at_call, pipeline, throw

from probe.errors import DeviceFailed, NotFinite, OutOfMemory
from probe.proof.checks import variables
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.listing import list_runs
from probe.reading.recording import Run
from probe.running.recorder import record, resume
from probe.watching import hooks
from probe.writing.digests import DIGESTS
from probe.writing.store import MANIFEST
from probe.writing.upkeep import clear_orphans

STEPS = 8
TWO_LINES = r"error: (?P<cause>[^\n]+)\n       (?P<remedy>[^\n]+)\n\Z"


def asked(folder: Path, **changes: Any) -> dict[str, Any]:
    return ask(
        folder, **{"steps": STEPS, "scheduler": "DPM++2M", "durability": "run", **changes}
    ).resolved()


@pytest.fixture(autouse=True, scope="module")
def _started() -> None:
    doomed.start()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happened to."""
    return record(asked(tmp_path_factory.mktemp("whole")), pipeline(), progress=False)


@pytest.fixture(scope="module")
def unharmed(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same in a process of its own, with every operation on its files."""
    folder = tmp_path_factory.mktemp("unharmed")
    for _ in range(2):  # the first is slower: it starts the process from which all are forked
        begin = time.monotonic()
        with Doomed(asked(folder)) as child:
            ended = child.end()
        ended.seconds = time.monotonic() - begin
    assert ended.code == 0 and ended.acknowledged == STEPS, ended.said
    for path in visible(folder):
        assert compare(whole, Run(path)).same
    return ended


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.zarr") if not path.name.startswith("."))


def assert_readable(path: Path, whole: Run, least: int = 0) -> int:
    """Stock xarray opens it, warnings being errors; every committed step holds the bits of the
    whole run. How many there are.
    """
    tree = xr.open_datatree(
        path, engine="zarr", chunks=None
    ).load()  # all of it, the step that was being written too
    committed = tree["committed"].values.tolist()
    done = sum(committed)
    assert committed == [1] * done + [0] * (len(committed) - done) and done >= least
    for name, variable in variables(whole):
        group, _, last = name.rpartition("/")
        found = tree[group or "/"].to_dataset(inherit=False).variables[last]
        if variable.dims[:1] == ("step",) and variable.ndim > 1:
            np.testing.assert_array_equal(
                found.isel(step=slice(done)).values, variable.isel(step=slice(done)).values, name
            )
        else:
            _ = found.values
    return done


# --- kill -9 --------------------------------------------------------------------------------------


def kills(
    number: int, unharmed: Ended, rng: random.Random
) -> Iterator[tuple[str, Fault | Torn | None, tuple[str, int] | None, float]]:
    """Ways to die: what it is, the fault, and, for a kill from outside, the report that it waits
    for and the seconds until then.

    A fifth each: at any moment of the whole life; at any operation on files; at an operation within
    the steps; from outside while a step is being written or just after; and inside the write of a
    chunk, where the system itself ends the process.
    """
    operations = unharmed.operations
    within = [at for at, (steps, _) in enumerate(operations, 1) if 0 < steps < STEPS]
    parts = [what for steps, what in operations if steps == 1 and what.startswith("write ")]
    for index in range(number):
        match index % 5:
            case 0:
                yield "any moment", None, None, rng.uniform(0, unharmed.seconds)
            case 1:
                at = rng.randint(1, len(operations))
                yield "any operation", Fault("kill", at), None, 0
            case 2:
                yield "an operation of a step", Fault("kill", rng.choice(within)), None, 0
            case 3:
                report = rng.choice(("begun", "acknowledged")), rng.randint(1, STEPS - 3)
                yield "a step, from outside", None, report, rng.uniform(0, 0.01)
            case _:
                step, part = rng.randint(1, STEPS - 1), rng.randrange(len(parts))
                yield "inside a chunk", Torn(step, part, rng.randint(1, 100)), None, 0


def killed(
    recipe: dict[str, Any], fault: Fault | Torn | None, report: tuple[str, int] | None, delay: float
) -> Ended:
    """Record until the fault, or until `delay` seconds after `report`."""
    with Doomed(recipe, fault) as child:
        if fault is None:
            if report is not None:
                child.wait_for(*report)
            time.sleep(delay)
            child.signal(signal.SIGKILL)
        return child.end()


def failures(run: Run) -> list[str]:
    """Return the names of the checks that a recording fails."""
    return [check.name for check in verify(run) if check.verdict == "failed"]


@pytest.mark.parametrize(
    "number", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_kill_minus_9_at_any_moment(
    number: int, whole: Run, unharmed: Ended, tmp_path: Path
) -> None:
    """No recording is unreadable, no acknowledged step is lost, and what is resumed has the bits of
    the run nobody killed.
    """
    between = torn = created = resumed = 0
    rng = random.Random(number)
    for index, (kind, fault, report, delay) in enumerate(kills(number, unharmed, rng)):
        folder = tmp_path / str(index)
        recipe = asked(folder, durability=rng.choice(("none", "run", "step")))
        ended = killed(recipe, fault, report, delay)
        what = f"{kind}, {fault or report} {delay}"
        # How many operations there are differs with the durability and with the order of threads:
        # the last may never come.
        too_late = isinstance(fault, Fault) and len(ended.operations) < fault.at
        codes = {-signal.SIGKILL, -signal.SIGXFSZ, *([0] if too_late or index % 5 == 0 else [])}
        assert ended.code in codes, (what, ended.said)
        recordings = visible(folder)
        assert len(recordings) <= 1 and (recordings or not ended.acknowledged), what
        created += len(recordings)
        for path in recordings:
            done = assert_readable(path, whole, ended.acknowledged)
            run = Run(path)
            complete = run.attributes["status"] == "complete"
            assert run.status == ("complete" if complete else "interrupted"), what
            assert not complete or (done == STEPS and not failures(run)), what
            between += 0 < done < STEPS
            if isinstance(fault, Torn):
                sizes = [file.stat().st_size for file in path.rglob("*.partial")]
                torn += sum(size <= fault.size for size in sizes) == 1
            assert index % 8 or not failures(run), what
            if index % 4 == 0 and not complete:
                again = resume(run, pipeline(), progress=False)
                comparison = compare(whole, again)
                assert again.status == "complete", what
                assert comparison.same, (what, comparison.differences)
                resumed += 1
        clear_orphans(folder)
        assert sorted(folder.glob("*")) == recordings, f"{what}: something is left"
    print(
        f"{number} kills: {created} left a recording, {between} between first and last step, "
        f"{torn} inside a chunk, {resumed} resumed"
    )
    assert between >= number / 2 and torn >= number / 10 and resumed >= number / 8


def test_killed_before_its_text_was_written(whole: Run, tmp_path: Path) -> None:
    """A child that dies before the first step may leave a text that is not there, and nothing of it
    was promised.
    """
    run = cut(whole, tmp_path, 0)
    for name in ("embedding", "hidden", "output", "attention"):
        for file in (run.path / "text/text_encoder" / name).glob("c*"):
            file.unlink()
    lines = (
        (run.path / DIGESTS).read_text().splitlines(keepends=True)
    )  # a line comes after what it is of
    written_at_once = [
        line
        for line in lines
        if not re.search(
            r" (text/text_encoder/(embedding|hidden|output|attention)|preview/.*)$", line
        )
    ]
    (run.path / DIGESTS).write_text("".join(written_at_once))
    assert not run.steps.size and not [
        check for check in verify(Run(run.path)) if check.verdict == "failed"
    ]


def test_what_a_kill_leaves_is_what_the_tests_of_resuming_cut(whole: Run, tmp_path: Path) -> None:
    """A child is killed while the third step waits to be predicted: the same files, with the same
    bytes.
    """
    with Doomed(asked(tmp_path / "killed"), pause=0.5) as child:
        assert child.wait_for("acknowledged", 2)
        child.signal(signal.SIGKILL)
        child.end()
    (killed,) = visible(tmp_path / "killed")
    made = cut(whole, tmp_path, 3).path
    left, expected = (
        {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
        for path in (killed, made)
    )
    assert left.keys() == expected.keys()
    unlike = {name for name in left if left[name].read_bytes() != expected[name].read_bytes()}
    assert "zarr.json" in unlike, "who wrote it, when, and where to"
    assert all("/cross/" in name for name in unlike - {"zarr.json"}), (
        "in a shard the tokens lie as the writer's threads met"
    )
    assert compare(Run(killed), Run(made)).same


# --- the disk -------------------------------------------------------------------------------------

# Of the lock the run is complete by then; of a folder another thread may have made the same a
# moment ago.
HARMLESS = r"os\.remove /\.[^/]*\.lock|os\.mkdir .*"


def assert_refused(ended: Ended, folder: Path, whole: Run, what: str, cause: str) -> None:
    """One line of cause and one of remedy, a readable prefix, and never complete."""
    assert ended.code == 1, (what, ended.code, ended.said)
    assert "Traceback" not in ended.said
    told = re.search(TWO_LINES, ended.said)
    assert (
        told
        and f"could not be written: {cause}." in told["cause"]
        and told["remedy"].startswith(("Free some room", "Check the disk"))
    ), (
        what,
        ended.said,
    )
    for path in visible(folder):
        assert_readable(path, whole, ended.acknowledged)
        assert Run(path).status in ("failed", "interrupted"), what


def refuse(number: int, whole: Run, folder: Path, forever: bool, **changes: Any) -> str:
    """A child whose `number`th operation on files fails; returns what that was."""
    with Doomed(
        asked(folder, durability="none", **changes),
        Fault(("ENOSPC", "EIO")[number % 2], number, forever),
    ) as child:
        ended = child.end()
    # a life has some operations more or fewer, as its threads meet: the last of this one came
    # before
    if not ended.marks:
        assert ended.code == 0 and number > 1, "nothing was refused"
        return refuse(number - 1, whole, folder.with_name(f"{folder.name}-"), forever, **changes)
    what = f"{number}: {ended.marks[0]}"
    if ended.code == 0:
        assert re.fullmatch(HARMLESS, ended.marks[0]), what
        assert [Run(path).status for path in visible(folder)] == ["complete"], what
    else:
        cause = ("No space left on device", "Input/output error")[number % 2]
        assert_refused(ended, folder, whole, what, cause)
    return ended.marks[0]


@pytest.mark.slow
def test_a_disk_that_refuses_an_operation(whole: Run, unharmed: Ended, tmp_path: Path) -> None:
    """Moments of the whole life, the last ones among them; from then on, or only once."""
    rng, last = random.Random(1), len(unharmed.operations)
    ends = [at for at, (steps, _) in enumerate(unharmed.operations, 1) if steps == STEPS]
    steps = [at for at, (steps, _) in enumerate(unharmed.operations, 1) if 0 < steps < STEPS]
    chosen = [
        *rng.sample(range(1, steps[0]), 3),
        *rng.sample(steps, 3),
        *rng.sample(ends, 3),
        *range(last - 3, last + 1),
    ]
    for number in chosen:
        refuse(number, whole, tmp_path / str(number), forever=bool(rng.randrange(2)))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_disk_that_refuses_any_operation_of_a_run_of_five_steps(tmp_path: Path) -> None:
    """Every one of them: by turns only once, and from then on."""
    few: dict[str, Any] = {
        "steps": 5,
        "scheduler": "DDIM",
        "capture": {"layers": ("4x4",), "text": False, "statistics": False},
    }
    with Doomed(asked(tmp_path / "whole", durability="none", **few)) as child:
        ended = child.end()
    whole = only(tmp_path / "whole")
    for number in range(1, len(ended.operations) + 1):
        refuse(number, whole, tmp_path / str(number), forever=number // 2 % 2 == 1, **few)
    print(f"{len(ended.operations)} operations refused")


@pytest.mark.parametrize("part", [0, 1, 4, 7])
def test_a_file_that_may_not_grow(part: int, whole: Run, tmp_path: Path) -> None:
    """The system refuses the rest of a chunk, and the Rust writer of bulk gets to feel it."""
    with Doomed(asked(tmp_path), Torn(3, part, 70, survive=True)) as child:
        ended = child.end()
    assert_refused(ended, tmp_path, whole, str(part), "File too large")
    assert (
        only(tmp_path).steps.tolist() == [0, 1, 2]
        and only(tmp_path).attributes["status"] == "running"
    ), "not even the status fits"


@pytest.mark.parametrize("share", [0.2, 0.75, 0.9, 0.99])
def test_a_disk_that_is_really_full(
    share: float, whole: Run, unharmed: Ended, tmp_path: Path
) -> None:
    """A file system of its own with too little room: refused at the beginning or, where that does
    not see it, in the steps or at the end.
    """
    needed = sum(
        -(-file.stat().st_size // 4096) * 4096 for file in whole.path.rglob("*") if file.is_file()
    )
    folder = tmp_path / "disk"
    with Doomed(
        asked(folder), room=int(needed * share) // 4096 * 4096, unseen=share >= 0.5
    ) as child:
        ended = child.end()
    if ended.code == 99:
        pytest.skip(f"this system lets nobody mount a file system ({ended.said.strip()})")
    if share < 0.5:  # the forecast sees that before anything is written
        assert (
            ended.code == 2
            and "more than the room on the disk" in ended.said
            and visible(tmp_path / "disk-seen") == []
        )
        return
    assert_refused(ended, tmp_path / "disk-seen", whole, str(share), "No space left on device")


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [10, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])]
)
def test_ctrl_c_at_any_moment(number: int, whole: Run, unharmed: Ended, tmp_path: Path) -> None:
    """At random operations on files, and from outside in the middle of steps: soon over, exit code
    130, and it opens.
    """
    rng, slowest, opened = random.Random(number), 0.0, 0
    for index in range(number):
        folder = tmp_path / str(index)
        fault = (
            Fault("interrupt", rng.randint(1, len(unharmed.operations) - 1))
            if index % 2 == 0
            else None
        )
        with Doomed(asked(folder), fault) as child:
            if fault is None:
                child.wait_for(rng.choice(("begun", "acknowledged")), rng.randrange(STEPS - 2))
                time.sleep(rng.uniform(0, 0.02))
                child.signal(signal.SIGINT)
            ended = child.end()
        assert (
            ended.code == 130
            and ended.said.endswith("\nStopped.\n")
            and "Traceback" not in ended.said
        ), (index, ended.code, ended.said)
        slowest = max(slowest, ended.seconds)
        for path in visible(folder):
            done = assert_readable(path, whole, ended.acknowledged)
            run = Run(path)
            if (
                fault and run.status == "complete"
            ):  # all that was left to do was to take the lock away
                assert done == STEPS and re.fullmatch(
                    HARMLESS, ended.operations[fault.at - 1][1]
                ), (index, ended.operations[fault.at - 1])
                assert compare(whole, run).same and clear_orphans(folder)
                continue
            assert run.status == "interrupted", (index, run.status)
            assert f"go on with it: probe run --resume {path}" in ended.said or not len(run.steps)
            opened += 1
        left = (
            [path.name for path in folder.iterdir() if path not in visible(folder)]
            if folder.exists()
            else []
        )
        assert not left, left
    print(
        f"{number} times Ctrl-C: at most {slowest:.2f} s to the end, {opened} had begun a recording"
    )
    assert slowest <= 2 and opened >= number / 2


# --- out of memory, and values that are not finite ------------------------------------------------

HUNGER: dict[str, Callable[[], object]] = {
    "torch's allocator of the CPU": lambda: torch.empty(2**50),
    "torch's error on a GPU": throw(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")
    ),
    "numpy's": lambda: np.empty(2**50),
}


@pytest.mark.parametrize("what", HUNGER)
def test_out_of_memory_in_a_step(what: str, whole: Run, tmp_path: Path) -> None:
    pipe = pipeline()
    with (
        hooks.Hooks([(pipe.unet, "input", at_call(3, HUNGER[what]))]),
        pytest.raises(OutOfMemory) as caught,
    ):
        record(asked(tmp_path), pipe, progress=False)
    assert (
        caught.value.cause.startswith(("Out of memory on cpu: ", "Out of memory on cuda: "))
        and "\n" not in caught.value.cause
        and "Fewer images" in caught.value.remedy
    )
    assert_no_hooks(pipe)
    assert only(tmp_path).status == "failed" and not (only(tmp_path).path / MANIFEST).exists()
    assert_prefix(only(tmp_path), whole, 3)


DEVICE = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("where", ["in a step", "while a step is brought to the host"])
def test_a_gpu_that_fails(
    where: str, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, step: int, *_: Any) -> None:
        if step == 2:
            raise RuntimeError(f"{DEVICE}\nCUDA kernel errors might be reported elsewhere")

    pipe, watched = pipeline(), hooks.Hooks([])
    if where == "in a step":
        watched = hooks.Hooks([(pipe.unet, "input", at_call(2, lambda: fails("", 2)))])
    else:
        monkeypatch.setattr("probe.running.session.check_finite", fails)
    with watched, pytest.raises(DeviceFailed) as caught:
        record(asked(tmp_path), pipe, progress=False)
    assert caught.value.cause == f"The device failed: {DEVICE}"
    assert "in a new process" in caught.value.remedy and "--graphs off" in caught.value.remedy
    assert only(tmp_path).status == "failed"
    assert_prefix(only(tmp_path), whole, 2)


def test_out_of_memory_while_a_step_is_written(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(name: str, step: int, *_: Any) -> None:
        if step == 2:
            np.empty(2**50)

    monkeypatch.setattr("probe.running.session.check_finite", hungry)
    with pytest.raises(OutOfMemory, match="Out of memory while a step was being written"):
        record(asked(tmp_path), pipeline(), progress=False)
    assert only(tmp_path).status == "failed"
    assert_prefix(only(tmp_path), whole, 2)


@pytest.mark.parametrize("step", range(STEPS))
def test_nan_at_any_step(step: int, whole: Run, tmp_path: Path) -> None:
    pipe = pipeline()
    bias = pipe.unet.conv_out.bias
    healthy = bias.data.clone()
    try:
        with (
            hooks.Hooks(
                [(pipe.unet, "input", at_call(step, lambda: bias.data.fill_(float("nan"))))]
            ),
            pytest.raises(NotFinite) as caught,
        ):
            record(asked(tmp_path, capture={"text": False}), pipe, progress=False)
    finally:
        bias.data.copy_(healthy)
    assert (
        caught.value.cause == f"prediction_uncond holds NaN at step {step}."
        and "on_nan: record" in caught.value.remedy
    )
    run = only(tmp_path)
    assert run.status == "failed" and not (run.path / MANIFEST).exists()
    assert_prefix(run, whole, step)


# --- somebody who watches -------------------------------------------------------------------------


def test_a_reader_that_polls_sees_only_what_stays(whole: Run, tmp_path: Path) -> None:
    """While it is being written: no error, steps only ever added, and each value the final one."""
    seen: list[int] = []
    folder = tmp_path / "runs"
    with Doomed(asked(folder), pause=0.3) as child:
        while child.alive():
            for path, attributes in list_runs(folder):
                assert attributes is not None and attributes["status"] in ("running", "complete")
                seen.append(assert_readable(path, whole))
                run = Run(path)
                assert len(run.steps) >= seen[-1] and run.name in repr(run)
                if len(run.steps):
                    overview, final = run.overview(), whole.overview()
                    np.testing.assert_allclose(
                        overview.values,
                        final.isel(step=slice(overview.sizes["step"])).values,
                        atol=1e-5,
                    )
                    np.testing.assert_array_equal(
                        run.denoised().values,
                        whole.denoised().isel(step=slice(len(run.steps))).values,
                    )
        ended = child.end()
    assert ended.code == 0, ended.said
    assert seen == sorted(seen) and len(set(seen)) >= 3, seen
    assert compare(whole, only(folder)).same
