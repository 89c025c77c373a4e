"""Embeddings that were computed and stored: opened as somebody else's, that is, checked.

embeddings_in("runs")                     # their paths, the newest first
embedding = open_embedding(path)          # an xarray Dataset, in memory
changed_since(embedding, runs)            # which runs are no longer what they were
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from probe.errors import ProbeError, RecordingDamaged, RecordingNotFound
from probe.format.embedding import (
    FOLDER,
    KIND,
    METHODS,
    VARIABLES,
    EmbeddingAttributes,
    problem_of,
    spec,
)
from probe.reading.files import may_be_folder, no_longer, read_file
from probe.reading.lazy import tree_of
from probe.reading.untrusted import MAX_ROOT, read_group
from probe.settings.fields import expand_home
from probe.system import reading
from probe.text import printable
from probe.writing.digests import DIGESTS

AGAIN = "Compute it again: probe embed. Or remove its folder."
MOST = 5 * 10**6  # values of one variable
MAX_DIGESTS = 64 * 2**20  # bytes of a recording's digests.txt


def embeddings_in(folder: str | Path = "runs") -> list[Path]:
    """Return the paths of the embeddings of a folder of recordings, the newest first.

    Links to some elsewhere are followed, as among recordings. Raises RecordingUnreadable if the
    system does not list them.
    """
    inside = Path(folder) / FOLDER
    with reading(inside, "The embeddings in it are"):
        if not inside.is_dir():
            return []
        with os.scandir(inside) as entries:
            there = [
                (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name)
                for entry in entries
                if entry.name.endswith(".zarr") and entry.name[0] != "." and may_be_folder(entry)
            ]
    return [inside / name for _, name in sorted(there, reverse=True)]


def open_embedding(path: str | Path) -> xr.Dataset:
    """Return an embedding, read and checked: maps of the paths of runs.

    *Shape:* `position` (map, point, axis); each map has a `method` and a `seed`, each point a
    `run`, a `step` and a `sigma`. `explained` (component) and `walk_explained` (walk, component)
    are shares of the variance of PCA. `probe.format.embedding` describes all of it.

    Raises RecordingNotFound if there is none, RecordingDamaged if it cannot be trusted.
    """
    path = Path(path)
    try:
        with reading(path):
            root = read_group(path)
            if root["attributes"].get("kind") != KIND:
                raise _refuse(path, "it does not say that it is an embedding")
            if (problem := problem_of(root["attributes"])) is not None:
                raise _refuse(path, problem)
            lazily = tree_of(path, root, spec).to_dataset(inherit=False)
            return _checked(path, lazily)
    except RecordingNotFound as error:
        raise RecordingNotFound(
            f"{printable(str(path))} is not an embedding.", "Compute one: probe embed RUN."
        ) from error
    except RecordingDamaged as error:
        raise RecordingDamaged(error.cause, AGAIN) from error


def described(path: Path) -> EmbeddingAttributes | None:
    """Return what the root file of an embedding says, or None for anything else."""
    with contextlib.suppress(ProbeError):
        attributes = read_group(path)["attributes"]
        if problem_of(attributes) is None:
            return EmbeddingAttributes.model_validate(attributes)
    return None


def attributes_of(embedding: xr.Dataset) -> EmbeddingAttributes:
    """Return the attributes of an embedding, typed."""
    return EmbeddingAttributes.model_validate(embedding.attrs)


def mark_of(recording: Path) -> str:
    """Return a SHA-256 that changes when the values of a recording do.

    It is that of the digests of its steps, or of its root file if it has none, as old ones.
    """
    for name, most in ((DIGESTS, MAX_DIGESTS), ("zarr.json", MAX_ROOT)):
        try:
            raw = read_file(recording, name, no_longer(recording, name, most))
        except FileNotFoundError:
            continue
        return hashlib.sha256(raw).hexdigest()
    raise RecordingNotFound(f"{printable(recording.name)} is gone.", "Take it from a copy.")


def changed_since(embedding: xr.Dataset, recordings: Iterable[Path]) -> list[str]:
    """Return the names of those `recordings` that have changed since an embedding was computed.

    Only these are looked at, wherever the embedding says that its runs were.
    """
    there = {path.absolute() for path in recordings}
    return [
        run.name
        for run in attributes_of(embedding).runs
        if (path := expand_home(run.path)) in there and mark_of(path) != run.mark
    ]


def _checked(path: Path, lazily: xr.Dataset) -> xr.Dataset:
    """Return the variables of the table, read. Raise RecordingDamaged if they do not fit."""
    if missing := [name for name in VARIABLES if name not in lazily.variables]:
        raise _refuse(path, f"{missing[0]} is missing")
    known = lazily.drop_vars([name for name in lazily.variables if name not in VARIABLES])
    if any(variable.size > MOST for variable in known.variables.values()):
        raise _refuse(path, f"it claims more than {MOST} values")
    embedding = known.load()
    attributes = attributes_of(embedding)
    steps = embedding["run"].values.tolist()
    if any(steps.count(run.name) != run.steps for run in attributes.runs) or len(steps) != sum(
        run.steps for run in attributes.runs
    ):
        raise _refuse(path, "its points are not the steps of its runs")
    if embedding.sizes["axis"] != 2 or not set(embedding["method"].values.tolist()) <= {*METHODS}:
        raise _refuse(path, "its maps are none that this version draws")
    for name, variable in embedding.data_vars.items():
        if not np.isfinite(variable.values).all():
            raise _refuse(path, f"{name} is not finite")
    return embedding


def _refuse(path: Path, what: str) -> RecordingDamaged:
    return RecordingDamaged(f"{printable(str(path))} is damaged: {what}.", AGAIN)
