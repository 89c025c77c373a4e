"""Ctrl-C at any moment of a command: exit code 130, no traceback, nothing left over, and soon.

Each press goes to a process of its own: while it imports, loads, begins, records, ends. Then the
same again with impatient presses after the first.
"""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from probe import stopping
from probe.diffusion.loading import BUNDLED
from probe.reading.recording import Run

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 10  # seconds; on a machine that does nothing else it is 2
RUN = ("probe.run", "--steps", "40", "--capture.steps", "0:5", "--output", "out")
SCENE = str(ROOT / "experiments" / "fox-and-penguin")
NOISING = (
    "probe.noising",
    "--picture",
    f"{SCENE}.png",
    "--caption",
    "A fox next to a penguin",
    "--masks",
    f"{SCENE}-masks.npz",
    "--output",
    "out",
)

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="SIGINT is sent to a process, which needs POSIX"
)
needs_the_bundled_model = pytest.mark.skipif(
    not (BUNDLED["emojiworld"] / "model_index.json").is_file(),
    reason="probe/emojiworld is not there",
)


def begun(folder: Path, *command: str, wait: str = " argparse") -> subprocess.Popen[bytes]:
    """A command that runs in `folder` and has imported `wait`; argparse comes right after the first
    lines.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    with (folder / "said").open("wb") as said:
        running = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=said,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # tests may run as a background job, where it is ignored
        )
    while wait not in (folder / "said").read_text():
        assert running.poll() is None, f"it ended before {wait}"
        time.sleep(0.005)
    return running


def stopped(running: subprocess.Popen[bytes], folder: Path, again: int = 0) -> float:
    """Press Ctrl-C, and `again` some more; everything that was promised then holds.

    Return how long it took.
    """
    start = time.monotonic()
    for _ in range(again + 1):
        if running.poll() is None:
            running.send_signal(signal.SIGINT)
        time.sleep(0.03 if again else 0)
    code, took = running.wait(timeout=60), time.monotonic() - start
    err = "\n".join(
        line
        for line in (folder / "said").read_text().split("\n")
        if not line.startswith("import time:")
    )
    assert code == 130, (code, err[-2000:])
    assert "Traceback" not in err and err.count("Stopped.") == 1, err[-2000:]
    assert took < LIMIT
    left = [
        path
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.name.endswith((".partial", ".lock", ".tmp"))
    ]
    assert not left
    for path in (folder / "out").glob("*.zarr") if (folder / "out").is_dir() else ():
        made = Run(path)
        assert made.status in ("interrupted", "complete") and made.tree is not None
        assert made.steps.tolist() == list(range(len(made.steps)))
    return took


@pytest.mark.parametrize("again", [0, 4])
@pytest.mark.parametrize(
    "command",
    [("probe.run",), ("probe.noising",), ("probe.verify",), ("probe.cli", "ls"), ("probe", "ls")],
    ids=str,
)
def test_during_the_imports(tmp_path: Path, command: tuple[str, ...], again: int) -> None:
    """Its first line has run as soon as `argparse` is imported."""
    stopped(begun(tmp_path, *command), tmp_path, again)


@needs_the_bundled_model
def test_while_torch_is_imported(tmp_path: Path) -> None:
    stopped(begun(tmp_path, *RUN, wait=" torch._C"), tmp_path)


@needs_the_bundled_model
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "command",
    [RUN, NOISING, ("probe", "verify", "sample"), ("probe", "show", "sample", "--words")],
    ids=["run", "noising", "verify", "show"],
)
def test_at_any_moment(tmp_path: Path, command: tuple[str, ...]) -> None:
    """At 8 moments from the first line to the end of an undisturbed call, each with a folder of its
    own.
    """
    (tmp_path / "whole").mkdir()
    running, start = begun(tmp_path / "whole", *command), time.monotonic()
    assert running.wait(timeout=200) == 0
    whole, dice, times = time.monotonic() - start, random.Random(0), []
    for index in range(8):
        folder = tmp_path / str(index)
        folder.mkdir()
        running = begun(folder, *command)
        time.sleep(whole * (index + dice.random()) / 9)
        if running.poll() is None:
            times.append(stopped(running, folder, again=dice.choice([0, 3])))
    print(f"stopped {len(times)} times, the slowest in {max(times):.2f} s")
    assert len(times) > 3


def test_every_command_begins_with_it() -> None:
    """The first thing that runs in each, before any other import: what comes earlier dies with a
    traceback.
    """
    for name in ("run", "noising", "verify", "cli"):
        body = ast.parse((ROOT / "probe" / f"{name}.py").read_text()).body
        first = next(
            node
            for node in body
            if not isinstance(node, ast.Expr)
            and ast.unparse(node) != "from __future__ import annotations"
        )
        assert (
            ast.unparse(first)
            == "if __name__ == '__main__':\n    from probe import stopping\n    stopping.begin()"
        ), name
    assert 'probe = "probe.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    code = (
        "import os, signal, sys; before = set(sys.modules); import probe.stopping; "
        "print(*set(sys.modules) - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(loaded.stdout.split()) == {"__future__", "probe", "probe.stopping"}, (
        "a press while anything else is imported dies with a traceback"
    )


def in_a_process(
    *arguments: str, press: signal.Handlers = signal.SIG_DFL
) -> subprocess.CompletedProcess[str]:
    """Run Python; `press` is what Ctrl-C does to it at its start."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, press),
    )


@pytest.mark.parametrize("slow", ["threading", "contextlib", "typing", "traceback"])
def test_a_press_while_the_first_imports_run(slow: str) -> None:
    """A module that is imported early presses Ctrl-C: the command stops without a traceback."""
    code = f"""
import os, signal, sys
class Presses:
    def find_spec(self, name, *_):
        if name == {slow!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Presses())
sys.modules.pop({slow!r}, None)
sys.argv = ["probe", "ls"]
from probe.__main__ import main
main()
"""
    done = in_a_process("-S", "-c", code)
    assert (done.returncode, done.stderr.strip()) == (130, "Stopped.")


# --- the same in small: blocks that end in order --------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from probe import stopping
from probe.stopping import breakable, cleanly
stopping.begin()
def press(): os.kill(os.getpid(), signal.SIGINT)
def say(word): print(word, end=" ", flush=True)
try:
    {body}
except KeyboardInterrupt:
    say("interrupted")
    stopping.end(130)
say("end")
"""


def small(body: str) -> tuple[int, str, str]:
    code = SCRIPT.format(body=body.replace("\n", "\n    "))
    done = in_a_process("-c", code)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


ORDERED = "ended in order interrupted"
NOTHING_BEGUN = """
press()
say("never")
"""
ALL_ENDED = """
with cleanly(): pass
press()
say("never")
"""
ONCE = """
with cleanly():
    press()
    say("ended in order")
"""
THREE_TIMES = """
with cleanly():
    press(); press(); press()
    say("ended in order")
"""
BREAKABLE = """
with cleanly():
    with breakable():
        press()
        say("never")
"""
BEFORE_BREAKABLE = """
with cleanly():
    press()
    say("waits")
    with breakable():
        say("never")
"""
AGAIN_WHILE_IT_ENDS = """
with cleanly():
    try:
        with breakable(): press()
    finally:
        press()
        say("ended in order")
"""
NESTED = """
with cleanly():
    with breakable():
        with cleanly():
            press()
            say("inner")
        say("never")
"""
BESIDE_AN_ERROR = """
with cleanly():
    try:
        press()
        raise OSError("so")
    finally:
        say("ended in order")
"""
CASES = [
    (NOTHING_BEGUN, ""),  # it stops at once
    (ALL_ENDED, ""),
    (ONCE, ORDERED),
    (THREE_TIMES, ORDERED),
    (BREAKABLE, "interrupted"),
    (BEFORE_BREAKABLE, "waits interrupted"),
    (AGAIN_WHILE_IT_ENDS, ORDERED),
    (NESTED, "inner interrupted"),
    (BESIDE_AN_ERROR, ORDERED),
]


@pytest.mark.parametrize(("body", "said"), CASES, ids=range(len(CASES)))
def test_a_press_waits_for_what_must_end_in_order(body: str, said: str) -> None:
    code, out, err = small(body)
    assert (code, out) == (130, said) and "Traceback" not in err
    assert err == ("" if said else "Stopped.")


def test_who_cannot_end_in_order_ends_at_the_limit() -> None:
    code, out, err = small(
        "stopping.LIMIT = 0.2\nwith cleanly():\n    press()\n    time.sleep(20)\n    say('never')"
    )
    assert (code, out, err) == (130, "", "Stopped.")


def test_where_it_is_ignored_it_stays_ignored() -> None:
    code = (
        "import os, signal; from probe import stopping; stopping.begin(); os.kill(os.getpid(), "
        "signal.SIGINT); print('went on')"
    )
    done = in_a_process("-c", code, press=signal.SIG_IGN)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_notebook_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping.cleanly(), stopping.breakable():
        assert signal.getsignal(signal.SIGINT) is before


def test_tasks_too(tmp_path: Path) -> None:
    """While it works, and while it starts."""
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "x").write_text("")
    script = f"""
import runpy, sys
sys.argv = ["tasks.py", "check"]
import subprocess, os, signal
real = os.environ.get
def pressed(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)
os.environ.get = pressed
runpy.run_path({str(ROOT / "tasks.py")!r}, run_name="__main__")
"""
    done = in_a_process("-c", script)
    assert (done.returncode, done.stderr) == (130, "Stopped.\nCall it again to go on.\n")
