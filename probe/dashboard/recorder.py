"""Recording from the dashboard: `probe.run` in a process of its own, one at a time.

    recorder = Recorder("runs")
    recorder.begin(load_experiment({"prompt": "A cat on the moon"}))
    recorder.job()       # what it says, and which recording it writes
    recorder.stop()      # Ctrl-C for that process: an interrupted recording, to be resumed

No shell reads what was typed: it is one argument of the process. This process never imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any, Literal

from probe.errors import RecordingBusy
from probe.settings.bundled import words_of
from probe.settings.experiment import Experiment
from probe.words import APOSTROPHES, word_spans

FIELDS = ("prompt", "model", "negative_prompt", "seed", "guidance_scale", "steps", "scheduler")
NAMED = re.compile(r"^Recording \d+ model calls to .*?([a-z0-9-]+)\.zarr \(about")
LINES = 40  # of what the process says, kept
PATIENCE = 8.0  # seconds that a process has to end in order when the server ends
State = Literal["loading", "recording", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Job:
    """One recording that was begun here."""

    state: State
    run: str  # the name of its recording; "" until there is one
    said: tuple[str, ...]  # the last lines that the process printed
    seconds: float

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "failed")


class Recorder:
    """Writes recordings into a folder, one at a time."""

    def __init__(
        self, folder: str | Path, program: Sequence[str] = (sys.executable, "-m", "probe.run")
    ) -> None:
        self.folder = Path(folder)
        self._program = tuple(program)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        self._run, self._began, self._ended, self._stopped = "", 0.0, 0.0, False

    def begin(self, experiment: Experiment) -> None:
        """Start to record. Raise RecordingBusy if a recording is being made already, OSError."""
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                raise RecordingBusy("A recording is being made already.", "Wait for it or stop it.")
            self._lines.clear()
            self._run, self._began, self._ended, self._stopped = "", time.monotonic(), 0.0, False
            own_group: dict[str, Any] = {"start_new_session": True}
            if sys.platform == "win32":
                own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            self._child = subprocess.Popen(
                [*self._program, *options(experiment, self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"},
                **own_group,
            )
        threading.Thread(target=self._listen, args=(self._child,), daemon=True).start()

    def _listen(self, child: subprocess.Popen[str]) -> None:
        """Keep what a process prints, until it ends."""
        assert child.stdout is not None
        with child.stdout:
            for line in child.stdout:
                if not line.strip():
                    continue
                self._lines.append(line.rstrip())
                if named := NAMED.match(line):
                    self._run = named[1]
        child.wait()
        self._ended = time.monotonic()

    def job(self) -> Job | None:
        """Return the recording that was begun last, or None."""
        child = self._child
        if child is None:
            return None
        code, until = child.poll(), self._ended or time.monotonic()
        # It says its name shortly before it is there.
        run = self._run if (self.folder / f"{self._run}.zarr" / "zarr.json").exists() else ""
        state: State = "recording" if run else "loading"
        if code is not None:
            state = "done" if code == 0 else "stopped" if self._stopped else "failed"
        return Job(state, run, tuple(self._lines), until - self._began)

    def stop(self) -> None:
        """Press Ctrl-C for the process. What it has recorded stays, and can be resumed."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        self._stopped = True
        with suppress(ProcessLookupError):
            if sys.platform == "win32":
                child.send_signal(signal.CTRL_BREAK_EVENT)
            else:
                os.killpg(child.pid, signal.SIGINT)

    def end(self, patience: float = PATIENCE) -> None:
        """Stop the process and wait for it; kill it if it does not end in time."""
        self.stop()
        if self._child is None:
            return
        try:
            self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


# --- what is asked -------------------------------------------------------------------------------


def chosen(experiment: Experiment) -> dict[str, Any]:
    """Return the settings of the form that are not the default, and always the prompt."""
    defaults = Experiment()
    return {
        name: getattr(experiment, name)
        for name in FIELDS
        if name == "prompt" or getattr(experiment, name) != getattr(defaults, name)
    }


def options(experiment: Experiment, folder: Path) -> list[str]:
    """Return an experiment as options of `probe.run`."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in chosen(experiment).items()]
    return [*given, *([] if str(folder) == "runs" else [f"--output={folder}"])]


def command(experiment: Experiment, folder: Path) -> str:
    """Return the same as a line for a shell."""
    return shlex.join(["python", "-m", "probe.run", *options(experiment, folder)])


def as_yaml(experiment: Experiment) -> str:
    """Return the same as a file for `probe.run`."""
    rows = chosen(experiment).items()
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in rows)


def bounds(field: str) -> tuple[float, float]:
    """Return the least and the greatest value of a setting."""
    about = Experiment.model_fields[field].metadata
    (least,) = (item.ge for item in about if hasattr(item, "ge"))
    (greatest,) = (item.le for item in about if hasattr(item, "le"))
    return least, greatest


vocabulary = cache(words_of)  # the words that a bundled model knows, by its name


def unknown(text: str, model: str = "emojiworld") -> list[str]:
    """Return the words of a text that a bundled model does not know, each once."""
    words = [text[start:end].lower() for start, end in word_spans(text)]
    parts = [part for word in words for part in re.split(f"[{APOSTROPHES}]", word)]
    return [word for word in dict.fromkeys(parts) if word not in vocabulary(model)]


def missing() -> str:
    """Return the name of a package that recording needs and that is not here, or "" ."""
    needed = ("torch", "diffusers", "transformers")
    return next((name for name in needed if util.find_spec(name) is None), "")


# --- of this process -----------------------------------------------------------------------------

_recorder: list[Recorder] = []


def allow(recorder: Recorder) -> None:
    """Let the page Record use a recorder."""
    _recorder[:] = [recorder]


def allowed() -> Recorder | None:
    """Return the recorder of this process, or None if `probe view` was not asked for one."""
    return _recorder[0] if _recorder else None


@asynccontextmanager
async def ending(_: object) -> AsyncIterator[None]:
    """End the process that records, before the server ends."""
    try:
        yield
    finally:
        if (recorder := allowed()) is not None:
            recorder.end()
