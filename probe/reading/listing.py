"""The recordings in a folder, thousands of them in a second.

    list_runs("runs")      # [(path, attributes), ...], the newest first
    listing("runs")        # the same, with the reason if a recording cannot be read

Of each recording only the attributes are read, at the head of its root file. Those of a large
folder are kept in the user's cache folder, by name, size, times and file number. Nothing depends on
this index. A file with another size or time is read again, and each row is checked like a root
file.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from probe.errors import (
    ExperimentError,
    ProbeError,
    RecordingDamaged,
    RecordingLinked,
    RecordingNotFound,
    RecordingUnreadable,
)
from probe.format.attributes import Attributes
from probe.format.schema import counted
from probe.reading.files import (
    GUARDED,
    MAX_PARTS,
    NO_LINK,
    NO_WAIT,
    READ,
    may_be_folder,
    no_longer,
    opened,
    refuse,
)
from probe.reading.sample import cache_folder
from probe.reading.untrusted import MAX_ROOT, check_attributes, read_root
from probe.system import lives, reading
from probe.text import printable
from probe.writing.files import replace

MANY = 200  # recordings for which an index is kept
MAX_ROW, MAX_INDEX = 2**16, 2**28  # bytes of a row in it, and of all
JUST_NOW = 2 * 10**9  # ns: a file that was written again so soon may have the same time
HEAD = re.compile(rb'\s*\{\s*"attributes"\s*:\s*')
NEXT = re.compile(rb',\s*"zarr_format"\s*:\s*3\s*,')
TAIL = re.compile(rb'"group"\s*\}\s*\Z')


class Listed(NamedTuple):
    """A recording in a folder: its attributes, or why it has none to show."""

    path: Path
    attributes: dict[str, Any] | None
    error: RecordingDamaged | RecordingUnreadable | None = None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Switch off Python's search for reference cycles: a listing makes none.

    The search would take a quarter of the time.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@_uncollected()
def list_runs(folder: str | Path = "runs") -> list[tuple[Path, dict[str, Any] | None]]:
    """Return every recording in a folder with its attributes, the newest first.

    The attributes are None if they cannot be read; `listing` says why.
    """
    return [(row.path, row.attributes) for row in listing(folder)]


@_uncollected()
def listing(folder: str | Path = "runs") -> list[Listed]:
    """Return every recording in a folder, the newest first.

    Raises RecordingUnreadable if the system does not list the folder.
    """
    paths = recordings_in(folder)
    index = _Index(Path(folder)) if len(paths) >= MANY else None
    known = [None] * len(paths) if index is None else index.find(paths)
    rows = [_listed(path, attributes, index) for path, attributes in zip(paths, known, strict=True)]
    if index is not None:
        index.keep()
    return sorted(rows, key=lambda row: (row.attributes or {}).get("created", ""), reverse=True)


def recordings_in(folder: str | Path) -> list[Path]:
    """Return the paths of what should be recordings in a folder, links to them included.

    Raises RecordingUnreadable if the system does not list it.
    """
    if not isinstance(folder, str | os.PathLike):
        raise ExperimentError(
            f"runs: a {type(folder).__name__} is no folder.", 'Give the path of a folder: "runs".'
        )
    with reading(folder, "The recordings in it are"):
        if not Path(folder).is_dir():
            return []
        with os.scandir(folder) as entries:
            names = {
                entry.name
                for entry in entries
                if entry.name.endswith(".zarr") and entry.name[0] != "." and may_be_folder(entry)
            }
        return [path for path in Path(folder).iterdir() if path.name in names]


def _listed(path: Path, known: Any, index: _Index | None) -> Listed:
    try:
        attributes = _quickly(path, known, index)
        if attributes is None:
            attributes = root_attributes(path)
    except RecordingNotFound:
        return Listed(path, None, _missing(path))
    except (RecordingDamaged, RecordingUnreadable) as error:
        return Listed(path, None, error)
    if attributes["status"] == "running":
        attributes = {**attributes, "status": status_of(attributes)}
    return Listed(path, attributes)


def _missing(path: Path) -> RecordingDamaged:
    """Return the error for what is called a recording and has no root file."""
    if not path.is_symlink() or path.exists():
        return refuse(path, "its zarr.json is missing")
    return RecordingLinked(
        f"{printable(str(path))} is a link to what is not there.",
        "Mount the disk where it is, or remove the link.",
    )


def root_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a recording, from its root file alone.

    Raises RecordingNotFound or RecordingDamaged.
    """
    attributes: dict[str, Any] = read_root(Path(path))["attributes"]
    return attributes


def picture_and_sampling(attributes: Attributes) -> tuple[str, str]:
    """Return the picture that a recording began from ("" if none), and how it was sampled."""
    if attributes.kind == "noising" and (noising := attributes.noising) is not None:
        often = (
            f"{counted(len(noising.timesteps), 'timestep')}, {counted(noising.noises, 'draw')} of "
            "noise"
        )
        return noising.picture or "", f"no sampling: noised at {often}, seed {noising.seed}"
    experiment = attributes.experiment
    assert experiment is not None
    guidance = f", guidance {experiment.guidance_scale:g}" if experiment.guidance_scale > 1 else ""
    strength = f", strength {experiment.strength:g}" if experiment.image else ""
    return (
        experiment.image or "",
        f"{attributes.scheduler.kind}, {counted(experiment.steps, 'step')}{guidance}, seed "
        f"{experiment.seed}{strength}",
    )


def status_of(attributes: dict[str, Any]) -> str:
    """Return the status that a recording gives, or "interrupted" if its writer died."""
    status, writer = str(attributes["status"]), attributes.get("writer")
    if (
        status == "running"
        and isinstance(writer, dict)
        and writer.get("host") == socket.gethostname()
    ):
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            return status if lives(int(writer["pid"])) else "interrupted"
    return status


# --- the head of a file ---------------------------------------------------------------------------


def _quickly(path: Path, attributes: Any, index: _Index | None) -> dict[str, Any] | None:
    """Check what the index or the head of the root file says.

    Return None if only the whole file can tell. The rest of the file is checked when the recording
    is opened.
    """
    try:
        if attributes is None:
            found, text = _head(path)
            attributes = from_json(text, allow_inf_nan=False)
            if index is not None:
                index.add(path.name, found, text)
        if not isinstance(attributes, dict):
            return None
        check_attributes(path, attributes)
    except (OSError, ValueError):  # whoever reads the whole file says what is wrong
        return None
    return attributes


def _head(path: Path) -> tuple[os.stat_result, bytes]:
    """Return the root file's status and its attributes.

    Raises OSError or ValueError if it is laid out in another way than zarr's.
    """
    if GUARDED:
        descriptor = os.open(f"{path}/zarr.json", READ | NO_LINK | NO_WAIT)
        try:
            found = os.fstat(descriptor)
            raw = (
                os.read(descriptor, found.st_size)
                if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_ROOT
                else b""
            )
        finally:
            os.close(descriptor)
    else:
        with opened(path, "zarr.json", no_longer(path, "zarr.json", MAX_ROOT)) as plain:
            found, raw = os.fstat(plain.fileno()), plain.read()
    head = HEAD.match(raw)
    if head is None or len(raw) != found.st_size or TAIL.search(raw, max(0, len(raw) - 40)) is None:
        raise ValueError
    start = head.end()
    end = raw.rfind(b",", start, raw.find(b'"zarr_format"', start))
    # A second "attributes" would count for a JSON parser. Those of a recording name its format, in
    # plain letters or escaped.
    if (
        NEXT.match(raw, end) is None
        or raw.find(b"format_version", end) >= 0
        or _is_escaped(raw, end)
    ):
        raise ValueError
    if end - start > MAX_PARTS or (not raw.isascii() and not raw.decode()):
        raise ValueError
    return found, raw[start:end]


def _is_escaped(text: bytes, at: int) -> bool:
    """Tell whether a letter is written by its number from `at` on.

    Looking for one character is several times as fast as for two.
    """
    while (at := text.find(b"\\", at)) >= 0:
        if text[at + 1 : at + 2] == b"u":
            return True
        at += 2
    return False


# --- what was read before -------------------------------------------------------------------------


class _Index:
    """What was read of a folder's root files.

    A line is a file's mark, a tab, and the recording's attributes.
    """

    def __init__(self, folder: Path):
        self._now, self._new = time.time_ns(), False
        self._rows: dict[bytes | None, bytes] = {}  # attributes by mark
        self._kept: dict[bytes | None, bytes] = {}
        self._file: Path | None = None
        # There may be none, or it cannot be read, or there is no folder for one.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            name = f"listing-{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]}.txt"
            self._file = cache_folder() / "diffusion-probe" / name
            with opened(
                self._file.parent, name, no_longer(self._file.parent, name, MAX_INDEX)
            ) as lines:
                split = (line.partition(b"\t") for line in lines if len(line) <= MAX_ROW)
                self._rows = {mark: text for mark, tab, text in split if tab}

    def find(self, paths: list[Path]) -> list[Any]:
        """Return the attributes that each root file had when it was as it is now, or None.

        Doing one kind of work at a time is the quickest.
        """
        marks = _marks(paths)
        self._kept = {mark: self._rows[mark] for mark in marks if mark in self._rows}
        return [_parsed(self._kept[mark]) if mark in self._kept else None for mark in marks]

    def add(self, name: str, found: os.stat_result, text: bytes) -> None:
        """Keep what was read, unless the file is so new that it could change unnoticed."""
        mark = _mark(name, found)
        is_old = self._now - max(found.st_mtime_ns, found.st_ctime_ns) >= JUST_NOW
        if is_old and len(mark) + len(text) + 2 <= MAX_ROW:
            self._kept[mark] = text.replace(b"\n", b" ") + b"\n"
            self._new = True

    def keep(self) -> None:
        """Write what is worth keeping, if anything is new.

        If that fails, the next listing reads everything again.
        """
        if self._file is None or not (self._new or len(self._kept) < len(self._rows)):
            return
        with contextlib.suppress(OSError, ProbeError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                part for mark, text in self._kept.items() for part in (mark or b"", b"\t", text)
            ]
            replace(self._file, rows, sync=False)


def _mark(name: str, found: os.stat_result) -> bytes:
    return (
        f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino} {name!a}".encode()
    )


def _marks(paths: list[Path]) -> list[bytes | None]:
    """Return the marks of the root files of recordings in one folder; None where one is missing."""
    try:  # from its folder a file is found in half the time
        folder = os.open(paths[0].parent, READ) if os.stat in os.supports_dir_fd else None
    except OSError:
        folder = None
    if folder is None:
        return [_mark_of(path, f"{path}/zarr.json") for path in paths]
    try:
        return [_mark_of(path, f"{path.name}/zarr.json", folder) for path in paths]
    finally:
        os.close(folder)


def _mark_of(path: Path, file: str, folder: int | None = None) -> bytes | None:
    try:
        return _mark(path.name, os.stat(file, dir_fd=folder, follow_symlinks=False))
    except (OSError, ValueError):
        return None


def _parsed(text: bytes) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
