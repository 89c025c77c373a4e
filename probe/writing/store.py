"""A recording on disk: written so that it survives anything, read lazily and without torch.

A run is one zarr v3 hierarchy, `<runs>/<name>-<id>.zarr`, that stock `xarray.open_datatree(path,
engine="zarr")` opens while it is being written, after a crash, and when it is complete.

How it is written (`RunWriter`): a lock beside it; everything created and preallocated in a hidden
folder, metadata consolidated once, then renamed into place; at each step first the bulk, then the
small arrays, then the step's digest, then `committed[step] = 1`, the only truth about what is
there; at the end a manifest of every file's digest, then `status = complete`. Every file is written
whole under another name and moved into its place (`probe.writing.files`). Steps go through a
background thread whose queue is bounded in bytes; an error in it stops the run with its cause.

What has reached the disk, and stays after a power cut: with durability "step" everything of a step,
before its flag, and its flag, before the step counts as written; with "run" everything, before the
status says complete; with "none" nothing for sure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from probe.errors import ProbeError, RecordingBusy, RecordingDamaged, RecordingNotFound
from probe.format.schema import ArraySpec
from probe.reading.files import DRAWN
from probe.system import trouble_in, unreadable
from probe.writing import files
from probe.writing.background import Queue
from probe.writing.chunks import StepFiles, checked
from probe.writing.digests import (
    DIGESTS,
    Ledger,
    flags_are_lost,
    marks,
    of_a_step,
    read_lines,
    step_of,
)
from probe.writing.files import storing
from probe.writing.layout import create, layout, open_array
from probe.writing.locks import Lock

MANIFEST = "manifest.json"
QUEUE_BYTES = 48 * 2**20
PICTURES = "decoded/picture["  # rows of it stay until they are drawn again, and so do their lines
PATIENCE = 20.0  # seconds for a killed writer to die: it frees its memory first, and its lock last
LEFT = ".partial"  # how the name of what a killed writer left ends


class RunWriter:
    """A recording in the course of being written; use it as a context manager.

    Leaving it without `complete()` marks the recording interrupted or failed.

    `arrays` are all variables that it will ever have; those with a value are written at once. With
    `resume`, an unfinished recording is taken over where its last committed step ended. With
    `hashing`, files are hashed for the manifest while they are written, in place of at the end.
    Raise RecordingBusy if another writer holds the path, StoreError if the disk does not take it.
    """

    def __init__(
        self,
        path: Path,
        arrays: Sequence[ArraySpec],
        attributes: Mapping[str, Any],
        durability: str = "run",
        *,
        resume: bool = False,
        hashing: bool = False,
    ):
        self.path = Path(path)
        self._hashes: dict[str, str] | None = {} if hashing else None
        self._at_end, self._at_once = durability != "none", durability == "step"
        self._lock = Lock(self.path)
        self._annotating = threading.Lock()  # the writing thread sets attributes too
        with storing(self.path):
            files.make_folders(self.path.parent, self._at_end)
            self._lock.acquire(
                "Wait for it, or give the run another name.", PATIENCE if resume else 0
            )
            try:
                writer = {"pid": os.getpid(), "host": socket.gethostname()}
                attributes = {**attributes, "status": "running", "writer": writer}
                if resume:
                    self._check_own()
                else:
                    self._begin(arrays, attributes)
                self._specs = {a.path: a for a in arrays}
                self._arrays: dict[str, zarr.Array[Any]] = {}  # those that were read
                self._files = {
                    a.path: StepFiles(
                        self.path,
                        self._array(a.path) if resume else layout(a),
                        self._at_once,
                        hashes=self._hashes,
                    )
                    for a in arrays
                    if a.dtype != "str"
                }
                entries = files.entries(self.path)
                inside = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
                self._folders = [str(self.path), *inside]
                self._committed = self._flags(resume)
                self._ledger: Ledger | None = None if resume else Ledger(self.path)
                if resume:
                    self._take_over(arrays, attributes)
            except BaseException:
                self._lock.release()
                raise
        self._queue = Queue(self._write_step, QUEUE_BYTES)
        self._status = "interrupted"

    def _flags(self, resume: bool) -> np.ndarray:
        """Return which steps are committed."""
        if "committed" not in self._specs:
            return np.zeros(0, np.uint8)
        if resume:
            return self.read("committed")
        spec = self._specs["committed"]
        return np.array(np.zeros(spec.shape) if spec.value is None else spec.value, np.uint8)

    def _begin(self, arrays: Sequence[ArraySpec], attributes: dict[str, Any]) -> None:
        if os.path.lexists(self.path):
            raise RecordingBusy(
                f"{self.path.name} exists already, and a recording is never overwritten.",
                "Give the run another name, or remove it: probe rm.",
            )
        hidden = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}{files.PARTIAL}")
        try:
            hidden.mkdir()
            create(hidden, arrays, {**attributes, "digests": DIGESTS})
            if self._at_once:
                files.sync_all(hidden)
            hidden.rename(self.path)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        if self._at_end:
            files.sync_folder(self.path.parent)

    def _check_own(self) -> None:
        """Look at a recording before it is taken over.

        Nothing is written into one that shares a file with anybody.
        """
        files.check_no_link(self.path)
        if not (self.path / "zarr.json").is_file():
            raise RecordingNotFound(
                f"{self.path} is not a recording.", "probe ls lists the recordings there are."
            )
        files.check_own(self.path)

    def _take_over(self, arrays: Sequence[ArraySpec], attributes: dict[str, Any]) -> None:
        """Go on with a recording that its writer left.

        What is committed stays. Everything after it is written anew.
        """
        for a in arrays:
            there = self._array(a.path)
            if there.shape != a.shape or (a.dtype != "str" and there.dtype != np.dtype(a.dtype)):
                raise RecordingDamaged(
                    f"{self.path.name}: {a.path} is not what its experiment asks for.",
                    "Record it again.",
                )
        lines = self._lines()
        for left in [*files.partials(self.path), self.path / MANIFEST]:
            files.remove(left, self._at_once)
        if lines is not None:
            labels = {a.path for a in arrays if a.value is not None}
            held = range(self.committed)
            kept = {
                what: digest
                for what, digest in lines.items()
                if what in labels or what.startswith(PICTURES) or step_of(what) in held
            }
            files.replace(
                self.path / DIGESTS,
                [f"{digest} {what}\n".encode() for what, digest in kept.items()],
                self._at_once,
            )
            self._ledger = Ledger(self.path, kept)
        if self._committed[self.committed :].any():
            self._committed[self.committed :] = 0
            self._flag()
        if self._at_once:  # its first writer may not have been so careful
            files.sync_all(self.path)
        self.annotate(**attributes)

    def _lines(self) -> dict[str, str] | None:
        """Return the digests so far, or None if an older version began it and kept none.

        Raise RecordingDamaged.
        """
        attributes = json.loads((self.path / "zarr.json").read_text())["attributes"]
        try:
            if flags_are_lost(self.path, attributes):
                raise ValueError("committed/c.0, which says what is committed, is missing")
            if "digests" not in attributes:
                return None
            if not (self.path / DIGESTS).exists():
                raise ValueError(f"{DIGESTS} is missing")
            lines = read_lines((self.path / DIGESTS).read_bytes())
            if lost := [step for step in range(self.committed) if f"step {step}" not in lines]:
                raise ValueError(f"{DIGESTS} has no line of step {lost[0]}")
            return lines
        except ValueError as error:
            raise RecordingDamaged(
                f"{self.path.name} is damaged: {error}.", "Record it again: probe rerun."
            ) from error

    @property
    def committed(self) -> int:
        """Return how many steps, from the first, are committed."""
        return int(np.cumprod(self._committed).sum())

    @property
    def attributes(self) -> dict[str, Any]:
        """Return the recording's attributes as they are now."""
        with storing(self.path):
            root: dict[str, dict[str, Any]] = json.loads((self.path / "zarr.json").read_text())
            return root["attributes"]

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self._status != "complete":
            self._status = "failed"
        late: ProbeError | None = None
        try:
            try:
                self._queue.close()
            except ProbeError as error:
                self._status, late = "failed", error
            if self._status != "complete":
                with (
                    contextlib.suppress(OSError, ProbeError)
                    if kind or late
                    else contextlib.nullcontext()
                ):
                    files.check_folders(self.path, self._folders)
                    files.remove(self.path / MANIFEST, False)  # only what is complete has one
                    self.annotate(status=self._status)
        finally:
            self._lock.release()
        if late and not kind:
            raise late

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        """Write a variable, or a part of it, now."""
        with storing(self.path):
            files.check_folders(self.path, self._folders)
            own, what = self._files[path], path if at is ... else f"{path}[{at}]"
            if self._ledger:
                self._ledger.take_back(path)
                self._ledger.take_back(what)
            if at is ...:
                marked = own.write_all(value)
            elif isinstance(at, int) and own.by_step:
                marked = own.write(at, np.asarray(value))
            else:
                whole = np.array(self.read(path))
                whole[at] = value
                own.write_all(whole)
                marked = marks(whole[at], None, own.fill) if isinstance(at, int) else b""
            if self._ledger and (at is ... or isinstance(at, int)):
                self._ledger.add(what, {path: marked})

    def read(self, path: str, at: Any = ...) -> np.ndarray:
        """Return what was written. Raise RecordingDamaged if it is something else by now.

        Raise RecordingUnreadable if the system does not read it.
        """
        try:
            return np.asarray(self._array(path)[at])
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # zarr-python and zarrs say it differently
            if (trouble := trouble_in(error)) is not None:
                raise unreadable(self.path, trouble) from error
            what = " ".join(str(error).split()) or type(error).__name__
            raise RecordingDamaged(
                f"{self.path.name}: {path} cannot be read: {what}", "Record it again: probe rerun."
            ) from error

    def _array(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            self._arrays[path] = open_array(self.path, self._specs[path])
        return self._arrays[path]

    def write_step(
        self, step: int, values: Callable[[], Mapping[str, np.ndarray]], nbytes: int
    ) -> None:
        """Queue one step. Wait while the queue holds too many bytes.

        `values()` returns its variables by path, and is called in the writing thread. Raise
        StoreError if an earlier step could not be written.
        """
        self._queue.put((step, values), nbytes)

    def flush(self) -> None:
        """Wait until every queued step is written. Raise StoreError if one could not be."""
        self._queue.join()

    def annotate(self, **attributes: Any) -> None:
        """Set attributes of the recording, all at once. Its consolidated metadata stays as it is.

        A mapping is merged into the one that is there.
        """
        with storing(self.path), self._annotating:
            files.check_folders(self.path, [str(self.path)])
            file = self.path / "zarr.json"
            root = json.loads(file.read_text())
            root["attributes"] = merged(root["attributes"], attributes)
            files.replace(file, [json.dumps(root).encode()], self._at_end)

    def complete(self) -> None:
        """Flush, write the manifest of every file's digest, and declare the recording complete."""
        self.flush()
        with storing(self.path):
            files.check_folders(self.path, self._folders)
            for left in files.partials(self.path):
                files.remove(left, False)
            if self._at_end:
                files.sync_all(self.path)
            files.replace(
                self.path / MANIFEST,
                [json.dumps(manifest(self.path, self._hashes or {}), indent=0).encode()],
                self._at_end,
            )
        self.annotate(status="complete")
        self._status = "complete"

    def _write_step(self, item: tuple[int, Callable[[], Mapping[str, np.ndarray]]]) -> None:
        step, values = item
        with storing(self.path):
            written = values()
            files.check_folders(
                self.path, self._folders
            )  # at each step: somebody may put a link in a folder's place
            bulk_first = sorted(written, key=lambda p: -written[p].nbytes)
            marked = {path: self._files[path].write(step, written[path]) for path in bulk_first}
            if self._ledger:
                own = [path for path in marked if of_a_step(path, ("step",))]
                self._ledger.add(
                    f"step {step}", {path: marked[path] for path in own}, self._at_once
                )
            self._committed[step] = 1
            self._flag()

    def _flag(self) -> None:
        if self._hashes:
            self._hashes.pop("committed/c.0", None)
        files.replace(
            self.path / "committed" / "c.0", [checked(self._committed.tobytes())], self._at_once
        )


# --- files ----------------------------------------------------------------------------------------


def manifest(path: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the SHA-256 of every file of a recording, by relative path.

    `known` are those that were taken while the files were written. The root's attributes that
    change at the end are left out.
    """
    digests, taken, start = {}, known or {}, len(str(path)) + 1
    names = [entry.path[start:] for entry in files.entries(path) if entry.is_file()]
    for name in sorted((name.replace(os.sep, "/") for name in names), key=lambda n: n.split("/")):
        if name in taken:
            digests[name] = taken[name]
        elif is_hashed(name):
            content = (path / name).read_bytes()
            if name == "zarr.json":
                root = json.loads(content)
                root["attributes"].pop("status", None)
                content = json.dumps(root, sort_keys=True).encode()
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def is_hashed(name: str) -> bool:
    """Return whether the manifest has a digest of a file.

    It has none of itself, of pictures for people, and of what a killed writer left.
    """
    return name != MANIFEST and not name.endswith(LEFT) and not DRAWN.fullmatch(name)


def merged(there: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes with others set; a mapping is merged into the one that is there."""
    together = dict(there)
    for name, value in attributes.items():
        both = isinstance(value, Mapping) and isinstance(together.get(name), dict)
        together[name] = {**together[name], **value} if both else value
    return together
