"""A recording on disk: written so that it survives anything, read lazily and without torch.

A run is one zarr v3 hierarchy, `<runs>/<name>-<id>.zarr`, that stock `xarray.open_datatree(path, engine="zarr")`
opens while it is being written, after a crash, and when it is complete.

How it is written (`RunWriter`): a lock beside it; everything created and preallocated in a hidden folder, metadata
consolidated once, then renamed into place; at each step first the bulk, then the small arrays, then `committed[step] =
1`, the only truth about what is there; at the end a manifest of every file's digest, then `status = complete`. Steps
go through a background thread whose queue is bounded in bytes; an error in it stops the run with its cause.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from probe.background import Queue
from probe.chunks import StepFiles, checked
from probe.errors import ProbeError, RecordingBusy, RecordingDamaged, RecordingNotFound, StoreError
from probe.schema import Array

MANIFEST = "manifest.json"
QUEUE_BYTES = 48 * 2**20
NOT_HASHED = (".png", ".partial")  # pictures for people, and what a killed writer left


class RunWriter:
    """A recording being written. Use it as a context manager: leaving it without `complete()` marks it interrupted or failed.

    `arrays` are all variables that it will ever have; those with a value are written at once. With `resume`, a recording
    that was left unfinished is taken over where its last committed step ended. Raises RecordingBusy when another writer
    holds the path, StoreError when the disk does not take it.
    """

    def __init__(self, path: Path, arrays: Sequence[Array], attributes: Mapping[str, Any], durability: str = "run", *, resume: bool = False):
        self.path, self._durability = Path(path), durability
        self._lock = filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout as busy:
                raise RecordingBusy(f"{self.path.name} is being written {_owner(self.path)}.", "Wait for it, or give the run another name.") from busy
            try:
                writer = {"pid": os.getpid(), "host": socket.gethostname()}
                if not resume:
                    self._begin(arrays, {**attributes, "status": "running", "writer": writer})
                elif not (self.path / "zarr.json").is_file():
                    raise RecordingNotFound(f"{self.path} is not a recording.", "probe ls lists the recordings there are.")
                self._arrays: dict[str, zarr.Array[Any]] = {a.path: _open(self.path, a) for a in arrays}
                self._steps = {a.path: StepFiles(self.path, self._arrays[a.path]) for a in arrays if a.dims[:1] == ("step",)}
                self._committed = self.read("committed") if "committed" in self._arrays else np.zeros(0, np.uint8)
                if resume:
                    self._take_over(arrays, {**attributes, "status": "running", "writer": writer})
            except BaseException:
                self._unlock()
                raise
        self._queue = Queue(self._write_step, QUEUE_BYTES)
        self._status = "interrupted"

    def _begin(self, arrays: Sequence[Array], attributes: dict[str, Any]) -> None:
        if self.path.exists():
            raise RecordingBusy(
                f"{self.path.name} exists already, and a recording is never overwritten.", "Give the run another name, or remove it: probe rm."
            )
        hidden = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            _create(hidden, arrays, attributes)
            hidden.rename(self.path)
        except BaseException:
            for pause in (0, 0.05):  # zarr's threads may still be writing into it
                time.sleep(pause)
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        if self._durability != "none":
            _sync_directory(self.path.parent)

    def _take_over(self, arrays: Sequence[Array], attributes: dict[str, Any]) -> None:
        """Go on with a recording that its writer left: what is committed stays, everything after it is written anew."""
        for a in arrays:
            there = self._arrays[a.path]
            if there.shape != a.shape or (a.dtype != "str" and there.dtype != np.dtype(a.dtype)):
                raise RecordingDamaged(f"{self.path.name}: {a.path} is not what its experiment asks for.", "Record it again.")
        self._committed[self.committed :] = 0
        for left in [*self.path.rglob("*.partial"), self.path / MANIFEST]:
            left.unlink(missing_ok=True)
        self.annotate(**attributes)

    @property
    def committed(self) -> int:
        """How many steps, from the first, are committed."""
        return int(np.cumprod(self._committed).sum())

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
                with contextlib.suppress(OSError) if kind or late else contextlib.nullcontext():
                    (self.path / MANIFEST).unlink(missing_ok=True)  # only what is complete has one
                    self.annotate(status=self._status)
        finally:
            self._unlock()
        if late and not kind:
            raise late

    def _unlock(self) -> None:
        try:
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink(missing_ok=True)  # before the release: whoever waits for the old file then sees that it is gone
        finally:
            self._lock.release()

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        """Write a variable, or a part of it, now."""
        with storing(self.path):
            self._arrays[path][at] = np.asarray(value)

    def read(self, path: str, at: Any = ...) -> np.ndarray:
        """Read back what was written. Raises RecordingDamaged where it is not what was written any more."""
        try:
            return np.asarray(self._arrays[path][at])
        except (OSError, ValueError, RuntimeError) as error:  # zarr-python and zarrs say it differently
            what = " ".join(str(error).split()) or type(error).__name__
            raise RecordingDamaged(f"{self.path.name}: {path} cannot be read: {what}", "Record it again: probe rerun.") from error

    def write_step(self, step: int, values: Callable[[], Mapping[str, np.ndarray]], nbytes: int) -> None:
        """Queue one step: `values()` gives its variables by path and is called in the writing thread.

        Waits while the queue holds too many bytes. Raises StoreError if an earlier step could not be written.
        """
        self._queue.put((step, values), nbytes)

    def flush(self) -> None:
        """Wait until every queued step is written. Raises StoreError if one could not be."""
        self._queue.join()

    def annotate(self, **attributes: Any) -> None:
        """Set attributes of the recording, all at once, leaving its consolidated metadata in place."""
        with storing(self.path):
            file = self.path / "zarr.json"
            root = json.loads(file.read_text())
            root["attributes"].update(attributes)
            write_atomically(file, json.dumps(root).encode(), self._durability != "none")

    def complete(self) -> None:
        """Flush, write the manifest of every file's digest, and declare the recording complete."""
        self.flush()
        with storing(self.path):
            for left in self.path.rglob("*.partial"):
                left.unlink()
            write_atomically(self.path / MANIFEST, json.dumps(manifest(self.path), indent=0).encode(), self._durability != "none")
            if self._durability != "none":
                for file in self.path.rglob("*"):
                    _sync_file(file)
        self.annotate(status="complete")
        self._status = "complete"

    def _write_step(self, item: tuple[int, Callable[[], Mapping[str, np.ndarray]]]) -> None:
        step, values = item
        with storing(self.path):
            written = values()
            for path in sorted(written, key=lambda p: -written[p].nbytes):  # the bulk first
                self._steps[path].write(step, written[path])
                if self._durability == "step":
                    _sync_file(self._steps[path].file(step))
            self._committed[step] = 1
            write_atomically(self.path / "committed" / "c.0", checked(self._committed.tobytes()), False)
            if self._durability == "step":
                _sync_file(self.path / "committed" / "c.0")


# --- files -----------------------------------------------------------------------------------------------------------


def manifest(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a recording, by relative path. The root's attributes that change at the end are left out."""
    digests = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and file.suffix not in NOT_HASHED and name != MANIFEST:
            content = file.read_bytes()
            if name == "zarr.json":
                root = json.loads(content)
                root["attributes"].pop("status", None)
                content = json.dumps(root, sort_keys=True).encode()
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def write_atomically(file: Path, content: bytes, sync: bool = True) -> None:
    """Replace a file in one move, so that a reader sees the old content or the new, never a part."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as handle:
            handle.write(content)
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _create(folder: Path, arrays: Sequence[Array], attributes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")  # a draft of the v3 specification; xarray reads it
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")  # variable-length text
        root = zarr.create_group(LocalStore(folder), zarr_format=3, attributes=attributes)
        coordinates: dict[str, list[Array]] = {}
        for a in arrays:
            if a.variable.coordinate and a.dims != (a.variable.name,):
                coordinates.setdefault(a.group, []).append(a)
        for a in arrays:
            beside = [c.variable.name for c in coordinates.get(a.group, []) if set(c.dims) <= set(a.dims)]
            attached = {"coordinates": " ".join(beside)} if beside and not a.variable.coordinate else {}
            described: dict[str, Any] = {"long_name": a.variable.long_name, "units": a.variable.units, **a.attributes, **attached}
            made = root.create_array(a.path, **_layout(a), dimension_names=a.dims, attributes=described)
            if a.value is not None:
                made[...] = a.value
        zarr.consolidate_metadata(LocalStore(folder))


def _layout(a: Array) -> dict[str, Any]:
    """Type, chunks and checksums of a variable: one file a step, with maps one token a chunk inside it.

    Lossless compression gains little on noise and probabilities and costs more than it saves; a checksum catches
    what a disk gets wrong.
    """
    keys = {"name": "default", "separator": "."}  # flat names: nested directories double the cost of a write
    if a.dtype == "str":
        whole = tuple(max(1, n) for n in a.shape)
        return {"shape": a.shape, "dtype": str, "chunks": whole, "chunk_key_encoding": keys, "compressors": [Crc32cCodec()]}
    dtype = np.dtype(a.dtype)
    chunks = tuple(max(1, n) for n in ((1, *a.shape[1:]) if a.per_step else a.shape))
    layout: dict[str, Any] = {"shape": a.shape, "dtype": dtype, "chunks": chunks, "chunk_key_encoding": keys, "compressors": [Crc32cCodec()]}
    if a.variable.name == "cross":
        layout |= {"shards": chunks, "chunks": (1, 1, *chunks[2:])}
    if a.variable.name in ("overview", "time_sum"):
        layout["chunks"] = (1, *chunks[1:])
    if a.value is None and not a.variable.coordinate:
        layout["fill_value"] = float("nan") if dtype.kind == "f" else 0
    return layout


def _open(path: Path, a: Array) -> Any:
    """The array for writing: parts of bulk through the Rust codecs, `committed` and scalars through zarr-python's atomic store."""
    pipeline = "zarrs.ZarrsCodecPipeline" if a.per_step else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    with zarr.config.set({"codec_pipeline.path": pipeline}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        return zarr.open_array(LocalStore(path), path=a.path, mode="r+")


def _owner(path: Path) -> str:
    try:
        writer = json.loads((path / "zarr.json").read_text())["attributes"]["writer"]
        return f"by process {int(writer['pid'])} on {writer['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by another process"


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn the disk's errors into ours."""
    try:
        yield
    except ProbeError:
        raise
    except (OSError, RuntimeError) as error:
        number = error.errno if isinstance(error, OSError) else _rust_error_number(error)
        if number is None and isinstance(error, RuntimeError):
            raise
        reason = os.strerror(number) if number else str(error) or type(error).__name__
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some room, or record less (probe run --dry-run shows what takes how much)." if full else "Check the disk and its permissions."
        raise StoreError(f"{path} could not be written: {reason}.", remedy) from error


def _rust_error_number(error: RuntimeError) -> int | None:
    """zarrs raises the disk's errors as RuntimeError("No space left on device (os error 28)")."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _sync_file(file: Path) -> None:
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # a chunk that holds only fill values has no file
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_sync_directory = _sync_file
