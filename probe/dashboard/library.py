"""The recordings that the dashboard shows, by their names, and the payloads made of them.

An id is the name of a recording in the runs folder, or of one that the command line named: never a
path that a browser sent. Payloads are kept up to a number of bytes, and made anew when a recording
changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probe.errors import RecordingDamaged, RecordingNotFound, RecordingUnreadable
from probe.figures.payload import MAGIC
from probe.reading import sample
from probe.reading.finding import find_run
from probe.reading.listing import Listed, listing, status_of
from probe.reading.recording import Run

ROOM = 256 * 2**20  # bytes of payloads that are kept
State = tuple[int | str, ...]
NAME = r"[\w.-]{1,120}"
OPEN = 16  # recordings that are kept open


class Library:
    """The recordings in a folder, those in the package, and those that were named."""

    def __init__(self, folder: str | Path = "runs", named: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self.named = [find_run(name, folder) for name in named]
        self.samples = {sample.unpacked(name).absolute(): name for name in sample.NAMES}
        self._paths: dict[str, Path] = {}
        self._ids: dict[Path, str] = {}
        self._open: OrderedDict[str, tuple[State, Run]] = OrderedDict()
        self._kept: OrderedDict[Any, tuple[State, bytes]] = OrderedDict()
        self._making: dict[Any, threading.Lock] = {}  # payloads that somebody makes now
        self._lock = threading.Lock()
        for path in [*self.named, *self.samples]:
            self.add(path)

    def add(self, path: Path) -> str:
        """Return the id of a recording, its name, by which it may be asked for from now on."""
        path = Path(path).absolute()
        with self._lock:
            if path in self._ids:
                return self._ids[path]
            name = self.samples.get(path, path.name.removesuffix(".zarr"))
            if not re.fullmatch(NAME, name, re.ASCII) or name in self._paths:
                name = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
            self._paths[name], self._ids[path] = path, name
            return name

    def rows(self) -> list[tuple[str, Listed]]:
        """Return all recordings, the newest first, then those named and those in the package.

        Raise RecordingUnreadable if the system does not list the folder.
        """
        found = listing(self.folder)
        there = {row.path.absolute() for row in found}
        for path in [*self.named, *self.samples]:
            if path.absolute() not in there:
                there.add(path.absolute())
                try:
                    found.append(Listed(path, dict(Run(path).attributes)))
                except (RecordingDamaged, RecordingUnreadable) as error:
                    found.append(Listed(path, None, error))
        return [(self.add(row.path), row) for row in found]

    def run(self, key: str) -> Run:
        """Return a recording, opened once for each state on the disk.

        Raise RecordingNotFound for an unknown id.
        """
        return self._opened(key)[1]

    def has(self, key: str) -> bool:
        """Return whether there is a recording of this id, also one that no list showed yet."""
        if key not in self._paths and re.fullmatch(NAME, key, re.ASCII):
            path = self.folder / f"{key}.zarr"
            if path.is_dir():
                self.add(path)
        return key in self._paths

    def _opened(self, key: str) -> tuple[State, Run]:
        """Return a recording, and a state on the disk: the recording is that old or newer."""
        if not self.has(key):
            raise RecordingNotFound("No recording has this id.", "Pick one from the list of runs.")
        path = self._paths[key]
        state = changed(path)  # before it is opened: what is written meanwhile is another state
        with self._lock:
            if key in self._open and self._open[key][0] == state:
                self._open.move_to_end(key)
                return self._open[key]
        run = Run(path)
        with self._lock:
            self._open[key] = state, run
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
        return state, run

    def payload(
        self, key: str, what: tuple[Any, ...], make: Callable[[Run], bytes]
    ) -> tuple[bytes, str]:
        """Return what `make` makes of a recording, and a tag that changes when it does.

        Whoever asks while it is made waits for it: nothing is made twice. Raise ProbeError.
        """
        state, run = self._opened(key)
        status = status_of(dict(run.attributes))  # a writer may die, and no file tells
        now = (*state, status)
        tag = hashlib.sha256(repr((MAGIC, key, now, what)).encode()).hexdigest()[:24]
        with self._lock:
            making = self._making.setdefault(tag, threading.Lock())
        with making:
            content = self._kept_at(now, key, what)
            try:
                if content is None:
                    content = make(run)
                    self._keep(now, key, what, content)
            finally:
                with self._lock:  # one who waits goes on with this lock, whoever comes makes one
                    self._making.pop(tag, None)
        return content, tag

    def _kept_at(self, now: State, key: str, what: Any) -> bytes | None:
        """Return a payload that was kept, if it was made of this state of the recording."""
        with self._lock:
            state, content = self._kept.get((key, what), (None, None))
            if state != now:
                return None
            self._kept.move_to_end((key, what))
            return content

    def _keep(self, now: State, key: str, what: Any, content: bytes) -> None:
        with self._lock:
            self._kept[key, what] = now, content
            while self._bytes() > ROOM and len(self._kept) > 1:
                self._kept.popitem(last=False)

    def _bytes(self) -> int:
        return sum(len(content) for _, content in self._kept.values())


def changed(path: Path) -> State:
    """Return what changes when a recording does: times, sizes and numbers of two of its files."""
    found: list[int] = []
    for name in ("zarr.json", "committed/c.0"):
        try:
            about = (path / name).stat()
        except OSError:
            found += [0, 0, 0]
        else:
            found += [about.st_mtime_ns, about.st_size, about.st_ino]
    return tuple(found)


_library: list[Library] = []


def configure(library: Library) -> None:
    """Make a library the one that views and routes use."""
    _library[:] = [library]


def library() -> Library:
    """Return the library of this process: by default that of the folder `runs`."""
    if not _library:
        configure(Library())
    return _library[0]
