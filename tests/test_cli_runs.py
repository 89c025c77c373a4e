"""A run says where things are, and one that fails or is stopped keeps what was recorded."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import BLOCK, ROOT, Command, needs_the_bundled_model, process, refused

from probe import cli, run
from probe.reading.listing import list_runs
from probe.reading.recording import Run, open_run
from probe.run import say_where
from probe.running import recorder
from probe.terminal import without_home
from probe.writing.chunks import StepFiles

pytestmark = pytest.mark.usefixtures("own_folder")


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_says_where_things_are(call: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "cat.yaml"
    file.write_text(f"model: {model}\nprompt: a cat\nsteps: 2\noutput: {tmp_path / 'out'}\n")
    code, out, err = call(run.main, file, "--seed", 7)
    assert code == 0 and "Traceback" not in err
    (path,) = (tmp_path / "out").iterdir()
    made = Run(path)
    assert (
        made.experiment.seed == 7
        and made.experiment.prompt == "a cat"
        and made.status == "complete"
    )
    for part in (
        f"Recording  {path}",
        "Pictures   contact-sheet.png, picture.png",
        f"probe show {made.name}",
        f"probe verify {made.name}",
    ):
        assert part in out
    assert "Recording 3 model calls to" in err and "Denoising" in err
    code, out, err = call(run.main, file, "--quiet")
    assert (
        code == 0 and "Denoising" not in err and Path(out.strip()).is_dir() and out.count("\n") == 1
    )
    assert len(list((tmp_path / "out").iterdir())) == 2, "nothing is overwritten"


def test_an_edited_run_and_its_parent_are_recorded_and_compared(
    call: Command, model: Path, tmp_path: Path
) -> None:
    edits = "edits: [{kind: mask, words: [cat]}]"
    (tmp_path / "cat.yaml").write_text(f"model: {model}\nprompt: a cat\nsteps: 2\n{edits}\n")
    code, out, _ = call(run.main, "cat.yaml")
    edited = open_run("latest")
    assert code == 0 and f"diff --pair {edited.name}  # its parent: probe run --unedited" in out
    remedy = refused(call, "diff", "--pair", edited.name, main=cli.dispatch)[1]
    assert remedy.startswith("Record it there: probe run EXPERIMENT.yaml --unedited.")
    code, out, _ = call(run.main, "cat.yaml", "--unedited")
    assert code == 0 and "Compare" not in out
    assert edited.against_parent().parent == open_run("latest").name
    assert call(cli.dispatch, "diff", "--pair", edited.name)[0] == 1


@pytest.mark.parametrize("on_path", [True, False])
def test_what_is_said_to_be_called_is_there(
    on_path: bool, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Whoever only ran tasks.py has no `probe` on PATH."""
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("probe", "python"):
        (venv / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(venv / "bin" / "python"))
    monkeypatch.setenv("PATH", str(venv / "bin") if on_path else str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = open_run("latest", "runs")
    say_where(made, quiet=False)
    out = capsys.readouterr().out
    probe, python = (
        ("probe", "python")
        if on_path
        else ("'my venv/bin/python' -m probe", "'my venv/bin/python'")
    )
    assert (
        f"\nLook       {probe} show {made.name}\nCheck      {probe} verify {made.name}\nRead       "
        f"{python} -c " in out
    )
    monkeypatch.chdir(tmp_path / "runs")
    say_where(Run(tmp_path / made.path), quiet=False)
    assert on_path or f"Look       '{venv}/bin/python' -m probe show" in capsys.readouterr().out


@pytest.mark.slow
def test_no_path_of_a_home_is_in_a_log(
    call: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in it begin with ~, as in the recording, and a shell takes them as they are printed."""
    home = tmp_path / "somebody"
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(model, home / "model")
    (tmp_path / "somebody-else").mkdir()
    options = [
        "--model",
        home / "model",
        "--prompt",
        "a cat",
        "--steps",
        1,
        "--output",
        home / "my" / "runs",
    ]
    code, out, err = call(run.main, *options)
    (path,) = (home / "my" / "runs").iterdir()
    assert (
        code == 0
        and str(home) not in out + err
        and f"~/my/runs/{path.name}" in out
        and f"~/my/runs/{path.name}" in err
    )
    hint = re.search(r"^Read +\S*python\S* (-c .*)$", out, re.MULTILINE)
    assert hint
    read = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} {hint[1]}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert read.returncode == 0 and "latents" in read.stdout, read.stderr
    hint = re.search(r"^Check .*probe verify (.*)$", out, re.MULTILINE)
    assert hint and call(cli.dispatch, "verify", *hint[1].replace("~", str(home)).split())[0] == 0
    (path / "zarr.json").write_text("{")
    assert "~/my/runs" in refused(call, "show", path, main=cli.dispatch)[0]
    code, out, err = call(run.main, *options, "--quiet")
    assert code == 0 and str(home) not in err and Path(out.strip()).is_dir(), (
        "a program reads it: no shell would find ~ in it"
    )
    for text in (f"in {home}-else/x", f"/mnt{home}/x", str(home.parent)):
        assert without_home(text) == text
    for text in (f"{home}/x", f"'{home}/x'", f"a\n{home}/x", f"--runs={home}/x"):
        assert without_home(text) == text.replace(str(home), "~")


@pytest.mark.slow
def test_the_same_from_a_shell(model: Path, tmp_path: Path) -> None:
    running = process(
        "probe.cli",
        "run",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--steps",
        1,
        "--output",
        tmp_path / "out",
        "--quiet",
    )
    out, err = running.communicate(timeout=120)
    assert running.returncode == 0, err
    assert Run(Path(out.strip())).status == "complete"
    assert err == "", "with --quiet not even the libraries talk"


# --- runs that fail -------------------------------------------------------------------------------


def test_nan_ends_a_run_and_what_came_before_is_kept(call: Command, tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    pipeline.unet.conv_out.weight.data[0, 0, 0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "model")
    cause, remedy = refused(
        call, "--model", tmp_path / "model", "--prompt", "a cat", "--output", "out", code=1
    )
    assert re.fullmatch(r"\w+ holds NaN at step 0\.", cause) and remedy.startswith(
        "Try a smaller guidance_scale; "
    )
    (path,) = Path("out").iterdir()
    assert Run(path).status == "failed" and Run(path).steps.size == 0


def test_a_full_disk_ends_a_run_and_what_came_before_is_kept(
    call: Command, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = StepFiles.write, 0

    def write(own: Any, at: Any, value: Any) -> bytes:
        nonlocal count
        count += own.path == "latents/latents"
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(own, at, value)

    monkeypatch.setattr(StepFiles, "write", write)
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat", "--output", "out", code=1)
    assert cause.endswith("could not be written: No space left on device.") and remedy.startswith(
        "Free some room"
    )
    monkeypatch.undo()
    (path,) = (model.parent / "out").iterdir()
    assert (
        Run(path).status == "failed"
        and Run(path).steps.tolist() == [0, 1, 2, 3]
        and np.isfinite(Run(path).latents).all()
    )


@pytest.mark.parametrize(
    "message",
    [
        "not enough memory: you tried to allocate 9 bytes",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_out_of_memory(
    call: Command, model: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def decode(*_: object) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr("probe.diffusion.sd.StableDiffusion.decode", decode)
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat", code=1)
    assert (
        cause.startswith(("Out of memory on cpu:", "Out of memory on cuda:"))
        and "Fewer images" in remedy
    )


def test_a_fault_of_our_own_is_one_line_and_a_hint(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(recorder, "record", broken)
    cause, remedy = refused(call, code=1)
    assert (
        cause == "ZeroDivisionError: division by zero"
        and "fault of probe itself: run again with --debug" in remedy
    )
    code, _, err = call(run.main, "--debug")
    assert (
        code == 1
        and err.startswith("Traceback")
        and "in broken" in err
        and re.search(BLOCK + r"\Z", err)
    )


def test_debug_shows_the_traceback_of_a_mistake(call: Command) -> None:
    code, _, err = call(run.main, "--steps", "0", "--debug")
    assert (
        code == 2
        and err.startswith("Traceback")
        and "in load_experiment" in err
        and re.search(BLOCK + r"\Z", err)
    )


# --- Ctrl-C ---------------------------------------------------------------------------------------


def interruptible() -> None:
    """What a shell does for its foreground job: tests may run as a background job, where SIGINT is
    ignored.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def after_three_steps(running: subprocess.Popen[str], folder: Path) -> Path:
    """Wait until a process has recorded three steps; returns the recording."""
    deadline = time.monotonic() + 90
    while True:
        for path in folder.glob("[!.]*.zarr"):
            if Run(path).steps.size >= 3:
                return path
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.05)


@pytest.mark.slow  # test_smoke stops a run, too, and test_faults stops one at any moment
@needs_the_bundled_model
@pytest.mark.parametrize("durability", ["run", "step"])
def test_ctrl_c_in_the_middle_keeps_what_was_recorded(tmp_path: Path, durability: str) -> None:
    arguments = [
        "--steps",
        900,
        "--output",
        tmp_path / "out",
        "--durability",
        durability,
        "--capture.steps",
        "0:5",
    ]
    running = process("probe.run", *arguments, preexec_fn=interruptible)
    path = after_three_steps(running, tmp_path / "out")
    assert Run(path).status == "running"
    start = time.monotonic()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130 and time.monotonic() - start < 10, (
        "it went on with its 900 steps"
    )
    assert (
        "Traceback" not in err and err.endswith("\nStopped.\n") and str(path) in err and out == ""
    )
    made = Run(path)
    assert made.status == made.attributes["status"] == "interrupted"
    assert made.steps.tolist() == list(range(len(made.steps))) and 3 <= made.steps.size < 900
    assert (
        np.isfinite(made.latents.values).all()
        and np.isfinite(made.denoised().values).all()
        and made.attention().sizes["step"] == min(5, made.steps.size)
    )
    assert [file.name for file in (tmp_path / "out").iterdir()] == [path.name], "no lock is left"


@needs_the_bundled_model
@pytest.mark.slow
def test_ctrl_c_pressed_again_and_again(tmp_path: Path) -> None:
    """No traceback of how Python ends, and the recording is there."""
    running = process(
        "probe.run",
        "--steps",
        900,
        "--output",
        tmp_path / "out",
        "--capture.steps",
        "0:5",
        preexec_fn=interruptible,
    )
    path, deadline = after_three_steps(running, tmp_path / "out"), time.monotonic() + 30
    while running.poll() is None:
        assert time.monotonic() < deadline
        running.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = running.communicate()
    assert (
        running.returncode == 130 and "Traceback" not in err and err.count("\nStopped.\n") == 1
    ), err
    assert Run(path).status == "interrupted" and Run(path).steps.size >= 3


def test_ctrl_c_before_anything_was_written(model: Path, tmp_path: Path) -> None:
    running = process(
        "probe.run",
        "--model",
        model,
        "--prompt",
        "a cat",
        "--output",
        tmp_path / "out",
        preexec_fn=interruptible,
    )
    assert running.stderr and running.stderr.readline().startswith("Loading")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "Traceback" not in err and "Stopped." in err
    assert all(Run(path).status == "interrupted" for path, _ in list_runs(tmp_path / "out"))


def test_a_second_ctrl_c_with_debug_shows_where_it_was(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "record", stopped)
    code, out, err = call(run.main)
    assert (code, out, err) == (130, "", "\nStopped.\n")
    code, _, err = call(run.main, "--debug")
    assert code == 130 and "in stopped" in err
