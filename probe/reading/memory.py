"""A recording in memory: written like one on a disk, and read like one.

    memory = Memory(plan.arrays, attributes)      # takes what a `Session` records
    run = Run(nowhere("cat"), memory)             # every reading function works on it
    run.save("runs/cat.zarr")                     # the same values in files, which verify

It has the methods of `RunWriter` that a session calls, and keeps the order of the calls. `save`
repeats them on a `RunWriter`, so that the recording on the disk has the same digests.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from probe.format.schema import ArraySpec
from probe.reading.lazy import dataset
from probe.reading.shards import TEXT
from probe.writing.layout import attributes_in_files, fill_value
from probe.writing.store import RunWriter, merged

OF_THE_WRITER = ("status", "writer", "digests")


class Memory:
    """The arrays of a recording, and its attributes.

    `specs` are all variables that it will ever have.
    """

    def __init__(self, specs: Sequence[ArraySpec], attributes: Mapping[str, Any]):
        self.specs = tuple(specs)
        self._attributes: dict[str, Any] = {**attributes, "status": "running"}
        self._arrays = {spec.path: _empty(spec) for spec in self.specs}
        self._in_steps: set[str] = set()
        # What is not of a step, in the order of its writing.
        self._once: dict[str, tuple[str, Any]] = {}

    # --- a session writes ---

    @property
    def committed(self) -> int:
        """Return how many steps, from the first, are there."""
        return int(np.cumprod(self._arrays["committed"]).sum())

    @property
    def attributes(self) -> dict[str, Any]:
        """Return the recording's attributes as they are now, as JSON gives them back."""
        attributes: dict[str, Any] = json.loads(json.dumps(self._attributes))
        return attributes

    def annotate(self, **attributes: Any) -> None:
        """Set attributes. A mapping is merged into the one that is there."""
        self._attributes = merged(self._attributes, attributes)

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        """Write a variable, or a part of it."""
        self._arrays[path][at] = value
        self._once[f"{path}[{at}]"] = path, at

    def read(self, path: str, at: Any = ...) -> np.ndarray:
        """Return a copy of what was written."""
        return np.array(self._arrays[path][at])

    def write_step(self, step: int, values: Callable[[], Mapping[str, np.ndarray]], _: int) -> None:
        """Write one step: `values()` gives its variables by path."""
        for path, value in values().items():
            self._arrays[path][step] = value
            self._in_steps.add(path)
        self._arrays["committed"][step] = 1

    def flush(self) -> None:
        """Do nothing: what is written is there."""

    def complete(self) -> None:
        """Declare the recording complete."""
        self.annotate(status="complete")

    # --- a run reads ---

    def tree(self) -> xr.DataTree:
        """Return everything as a labelled tree, like that of files.

        Each value that is read is a copy.
        """
        groups: dict[str, dict[str, xr.Variable]] = {"": {}}
        for spec, attributes in attributes_in_files(self.specs):
            parts = spec.group.split("/") if spec.group else []
            for depth in range(len(parts)):
                groups.setdefault("/".join(parts[: depth + 1]), {})
            stored = self._arrays[spec.path]
            labels = spec.dims == (spec.variable.name,)
            values: Any = stored if labels else indexing.LazilyIndexedArray(Copied(stored))
            as_json = json.loads(json.dumps(attributes))
            groups[spec.group][spec.variable.name] = xr.Variable(spec.dims, values, as_json)
        datasets = {
            f"/{group}": dataset(inside, {} if group else self.attributes)
            for group, inside in groups.items()
        }
        return xr.DataTree.from_dict(datasets)

    # --- to the disk ---

    def save(self, path: Path, durability: str, draw: Callable[[Path], object]) -> None:
        """Write it as a recording. `draw` adds the pictures for people.

        Raises RecordingBusy, StoreError.
        """
        attributes = {
            name: value for name, value in self.attributes.items() if name not in OF_THE_WRITER
        }
        with RunWriter(path, self.specs, attributes, durability) as writer:
            for step in np.flatnonzero(self._arrays["committed"]):
                values = {name: self._arrays[name][step] for name in sorted(self._in_steps)}
                writer.write_step(
                    int(step),
                    functools.partial(dict, values),
                    sum(value.nbytes for value in values.values()),
                )
            writer.flush()
            for name, at in self._once.values():
                writer.write(name, self._arrays[name][at], at)
            draw(path)
            writer.complete()


class Copied(BackendArray):
    """An array in memory. Each read gives a copy, so that nobody changes the recording."""

    def __init__(self, stored: np.ndarray):
        self._stored, self.shape, self.dtype = stored, stored.shape, stored.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> Any:
        part = self._stored
        for axis in reversed(range(len(key))):  # an index that drops its axis moves none before it
            part = part[(*[slice(None)] * axis, key[axis])]
        return np.array(part)


def nowhere(name: str) -> Path:
    """Return a path at which nothing can be, for a recording that is in no file."""
    return Path(os.devnull) / f"{name}.zarr"


def _empty(spec: ArraySpec) -> np.ndarray:
    if spec.value is not None:
        return np.array(spec.value, TEXT if spec.dtype == "str" else spec.dtype)
    return np.full(spec.shape, fill_value(spec), spec.dtype)
