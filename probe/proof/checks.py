"""What a check of a recording finds, and the checks of its files and flags.

They need neither torch nor the model.

    manifest     all files are there, none is new; digests and the checksums of chunks hold
    digests      each committed step has the digest that was written with it
    committed    every step is there, or those up to an interruption
    picture      the pictures for people show the recorded pixels

A check returns one `Check`. Its verdict is "exact", "within tolerance" (with the reason), "failed"
(with the place) or "not checked" (and why). `Tally` makes one of many comparisons.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr
from PIL import Image

from probe.reading.files import (
    DRAWN,
    LARGE,
    entry_is_link,
    is_hole,
    no_longer,
    opened,
    read_file,
    read_json,
    refuse,
    refuse_link,
)
from probe.reading.lazy import in_files
from probe.reading.limits import takes_no_room
from probe.reading.recording import Run
from probe.reading.untrusted import MAX_DEPTH, Stored, nodes_of, read_root
from probe.settings.edits import other_text_steps
from probe.settings.experiment import Experiment
from probe.system import exists
from probe.text import printable
from probe.writing.digests import DIGESTS, EMPTY, marks, of_a_step, read_lines, seal_holds, step_of
from probe.writing.digests import digest as digest_of
from probe.writing.store import MANIFEST, is_hashed

# Bytes: of a manifest, 150,000 files; of digests, 20,000 lines.
MAX_MANIFEST, MAX_DIGESTS = 16 * 2**20, 2 * 2**20
# Bytes: of the text in a picture; of all pictures together.
MAX_SAID, MAX_PICTURES = 2**20, 256 * 2**20

# Whatever a damaged file makes of itself, also inside a scheduler with settings that make no sense.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
)

Verdict = Literal["exact", "within tolerance", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One finding: what was found and where. A tolerance names the reasons it is granted for."""

    name: str
    verdict: Verdict
    detail: str
    because: tuple[str, ...] = ()


@dataclass
class Tally:
    """Many comparisons of one check, as one verdict.

    It is exact if none is off. Otherwise it tells how far the worst is off, and where the first is.
    `allowed` is granted only for a reason in `because`; without one, only the same bits pass.
    """

    name: str
    what: str
    allowed: float = 0.0
    because: tuple[str, ...] = ()
    unit: str = "of its greatest value"
    nothing: str = "nothing of this was recorded"
    worst: float = 0.0
    where: str = ""
    first: str = ""
    count: int = 0
    _failed: list[str] = field(default_factory=list)

    def add(self, off: float, where: str) -> None:
        """Count one comparison that is `off` by so much. NaN is worse than anything."""
        self.count += 1
        off = float("inf") if np.isnan(off) else off
        if off > (self.allowed if self.because else 0.0):
            self.first = self.first or where
        if off > self.worst:
            self.worst, self.where = off, where

    def fail(self, what: str) -> None:
        """Count something that no tolerance covers."""
        self._failed.append(what)

    def check(self) -> Check:
        """Return the verdict, with where the worst is."""
        if self._failed:
            more = f" (and {len(self._failed) - 1} more)" if self._failed[1:] else ""
            return Check(self.name, "failed", f"{self.what}: {self._failed[0]}{more}")
        if not self.count:
            return Check(self.name, "not checked", self.nothing)
        if self.worst == 0:
            return Check(self.name, "exact", f"{self.what}: the same at all {self.count} places")
        if self.because and self.worst <= self.allowed:
            detail = (
                f"{self.what}: within {self.worst:.2g} {self.unit} ({self.where}); "
                f"{self.allowed:.2g} is allowed"
            )
            return Check(self.name, "within tolerance", detail, self.because)
        detail = f"{self.what}: off by {self.worst:.2g} {self.unit} at {self.where}"
        if self.first != self.where:
            detail += f"; first at {self.first}"
        if self.because:
            detail += f"; {self.allowed:.2g} is allowed"
        return Check(self.name, "failed", detail, self.because)


# --- files and flags ------------------------------------------------------------------------------


def check_manifest(run: Run) -> Check:
    """Check the digests of files, and the checksum of every chunk."""
    if not exists(run.path / MANIFEST):
        detail = (
            f"the run is {run.status}: its manifest is written at the end; the checksums of "
            f"{read_all(run)} variables hold"
        )
        return Check("manifest", "not checked" if run.status != "complete" else "failed", detail)
    if (status := run.attributes["status"]) in (
        "failed",
        "interrupted",
    ):  # a writer that ends so takes the manifest away
        return Check(
            "manifest", "failed", f"there is one, as a complete run has; the status is {status}"
        )
    written, present = read_json(run.path, MANIFEST, MAX_MANIFEST), files_of(run.path)
    if not isinstance(written, dict):
        raise refuse(run.path, f"{MANIFEST} is not a list of files")
    missing, new = sorted(written.keys() - present), sorted(present - written.keys())
    wrong = [name for name in sorted(present - set(new)) if digest(run, name) != written[name]]
    for problem, names in (("changed", wrong), ("missing", missing), ("new", new)):
        if names:
            return Check("manifest", "failed", f"{len(names)} files {problem}: {names[0]}")
    return Check(
        "manifest",
        "exact",
        f"{len(written)} files have the digests they were written with, {read_all(run)} variables "
        "their checksums",
    )


def files_of(path: Path) -> set[str]:
    """Return the files that the manifest of a recording has to list, by relative path.

    Raises RecordingDamaged for a link, a pipe or a device.
    """
    files, folders, roomless = set(), [""], 0
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}".strip("/")
                if entry_is_link(entry):
                    raise refuse_link(path, name)
                if entry.is_dir(follow_symlinks=False) and name.count("/") < MAX_DEPTH:
                    folders.append(name)
                elif not entry.is_file(follow_symlinks=False):
                    raise refuse(path, f"{printable(name)} is a pipe or a device, or too deep")
                elif is_hashed(name):
                    files.add(name)
                    about = entry.stat(follow_symlinks=False)
                    roomless += about.st_size if takes_no_room(path / name, about) else 0
                    if roomless > LARGE:
                        raise refuse(
                            path,
                            f"{printable(name)} is a hole, or shares its bytes",
                            "Copy it with cp -r, and read the copy.",
                        )
    return files


def digest(run: Run, name: str) -> str:
    """Return the SHA-256 of one file, as `probe.writing.store.manifest` takes it.

    Raises RecordingDamaged for a hole.
    """
    if name == "zarr.json":  # what is written at the very end is left out
        root = read_root(run.path)
        root["attributes"].pop("status", None)
        return hashlib.sha256(json.dumps(root, sort_keys=True).encode()).hexdigest()

    def check(found: os.stat_result) -> None:
        if is_hole(found):
            raise refuse(run.path, f"{printable(name)} is a hole of {found.st_size} bytes")

    with opened(run.path, name, check) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_all(run: Run) -> int:
    """Decode every chunk of every variable, and return how many variables there are.

    Decoding checks the checksums; ValueError says which is wrong. Steps that are not committed are
    left out: a killed writer may have left half a chunk there.
    """
    count = 0
    for path, variable in variables(run):
        count += 1
        try:
            for index in (
                in_files(run.path, path, variable, run.steps)
                if "step" in variable.dims and variable.ndim > 1
                else [None]
            ):
                _ = (variable if index is None else variable.isel(step=index)).values
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: {error}") from error
    return count


def variables(run: Run) -> Iterator[tuple[str, xr.Variable]]:
    """Yield every variable and coordinate of a recording by its path, "latents/prediction"."""
    for node in run.tree.subtree:
        for name, variable in node.to_dataset(inherit=False).variables.items():
            yield f"{node.path}/{name}".strip("/"), variable


def check_committed(run: Run) -> Check:
    """Check the flags of steps, and of the steps at which maps were recorded."""
    calls, done = run.tree.sizes["step"], len(run.steps)
    flags = run.variable("committed").values
    if not np.isin(flags, (0, 1)).all():
        return Check(
            "committed",
            "failed",
            f"committed is {flags.max()} at step {int(flags.argmax())}, and a flag is 0 or 1",
        )
    if not np.array_equal(run.steps, np.arange(done)):
        return Check(
            "committed",
            "failed",
            f"steps {', '.join(map(str, run.steps[:8]))}: one before the last is missing",
        )
    if run.status == "complete" and done < calls:
        return Check("committed", "failed", f"{done} of {calls} steps; the run is complete")
    expected = np.isin(np.arange(calls), _steps_with_maps(run, calls)).astype(np.uint8)
    for grid in run.grids:
        if not np.array_equal(run.variable(f"attention/{grid}/recorded").values, expected):
            return Check(
                "committed",
                "failed",
                f"attention/{grid}/recorded is not capture.steps: {run.recipe.capture.steps}",
            )
    return Check(
        "committed",
        "exact",
        f"all {calls} steps"
        if done == calls
        else f"{done} of {calls} steps; the run is {run.status}",
    )


def _steps_with_maps(run: Run, calls: int) -> list[int]:
    """Return the steps at which attention is recorded: not where another text was read."""
    recipe, others = run.recipe, set[int]()
    if isinstance(recipe, Experiment) and recipe.edits:
        wanted = recipe.capture.branches
        branches = [branch for branch in recipe.texts if wanted in ("both", branch)]
        others = other_text_steps(recipe.edits, branches, run.variable("sigma").values.tolist())
    return [step for step in recipe.capture.steps_of(calls) if step not in others]


def check_digests(run: Run) -> Check:
    """Check what was written, step by step, against the lines that its writer added.

    They prove a recording that has no manifest yet.
    """
    if "digests" not in run.attributes:
        return Check(
            "digests", "not checked", "an older version wrote it, which kept no digests of steps"
        )
    steps = [int(step) for step in run.steps]  # first: a living writer adds the line, then the flag

    if not exists(run.path / DIGESTS):
        return Check("digests", "failed", f"{DIGESTS} is missing")
    lines = read_lines(read_file(run.path, DIGESTS, no_longer(run.path, DIGESTS, MAX_DIGESTS)))
    if lost := [step for step in steps if f"step {step}" not in lines]:
        return Check("digests", "failed", f"{DIGESTS} has no line of step {lost[0]}")
    arrays = nodes_of(run.path, read_root(run.path))[1]
    written = sorted((step, what) for what in lines if (step := step_of(what)) is not None)
    if written[len(steps) + 1 :] and run.status != "running":
        return Check(
            "digests",
            "failed",
            f"{written[-1][1]} was written, and {written[-2][1]} is not committed",
        )
    proved = [
        *(f"step {step}" for step in steps),
        *(what for what in lines if step_of(what) is None),
    ]
    for what in proved:
        if digest_now(run, arrays, what) != lines[what]:
            return Check("digests", "failed", f"{what} is not what was written")
    if run.status != "running" and (planted := _never_written(run, arrays, lines, len(steps))):
        return Check("digests", "failed", planted)
    return Check(
        "digests",
        "exact",
        f"{len(steps)} steps and {len(proved) - len(steps)} other parts are what was written",
    )


def _never_written(
    run: Run, arrays: Mapping[str, Stored], lines: Mapping[str, str], done: int
) -> str:
    """Return what holds values and has no line; "" if all is as a writer leaves it.

    A writer that was killed may have been at the step after the last committed, and at one picture.
    """
    for path, stored in arrays.items():
        if of_a_step(path, stored.dims) and stored.chunks == (1, *stored.shape[1:]):
            variable = run.variable(path).variable
            for step in in_files(run.path, path, variable, range(done + 1, stored.shape[0])):
                if _marks(run, stored, step).strip(EMPTY):
                    return f"{path} has values at step {step}, and {done} steps were written"
    pictures = arrays.get("decoded/picture")
    rows = range(pictures.shape[0]) if pictures is not None else ()
    bare = [row for row in rows if f"decoded/picture[{row}]" not in lines]
    killed = run.attributes["status"] in ("running", "failed")
    for row in bare[1 if killed else 0 :]:
        if pictures is not None and _marks(run, pictures, row).strip(EMPTY):
            return f"decoded/picture has values in row {row}, which was not written"
    return ""


def digest_now(run: Run, arrays: Mapping[str, Stored], what: str) -> str:
    """Return the digest that a line would have if it was written now; "" for what is missing."""
    if (step := step_of(what)) is not None:
        return digest_of(
            {
                path: _marks(run, stored, step)
                for path, stored in arrays.items()
                if of_a_step(path, stored.dims)
            }
        )
    name, _, index = what.removesuffix("]").partition("[")
    if name not in arrays or (
        index
        and not (
            re.fullmatch(r"0|[1-9][0-9]{0,8}", index) and int(index) < (*arrays[name].shape, 0)[0]
        )
    ):
        return ""
    return digest_of({name: _marks(run, arrays[name], int(index) if index else None)})


def _marks(run: Run, stored: Stored, index: int | None) -> bytes:
    """Return what a digest takes of a variable, or of one entry along its first dimension."""
    variable, chunk = run.variable(stored.path).variable, stored.inner or stored.chunks
    if index is None:
        return marks(variable.values, chunk, stored.fill)
    if variable.ndim == 1:
        return marks(variable.values[index : index + 1], (1,), stored.fill)
    return marks(
        variable[index].values, chunk[1:] if stored.dims[0] == "step" else None, stored.fill
    )


def check_picture(run: Run) -> Check:
    """Check that the PNGs show what was recorded, and that no byte of them has changed."""
    names = sorted(path.name for path in run.path.iterdir() if DRAWN.fullmatch(path.name))
    finals = [name for name in names if name.startswith("picture")]
    sealed = [] if "digests" not in run.attributes else names
    room = MAX_PICTURES
    for name in sealed:
        png = read_file(run.path, name, no_longer(run.path, name, room))
        room -= len(png)
        if not seal_holds(png):
            return Check("picture", "failed", f"{name} is not as it was written")
    if run.status != "complete":
        seals = f"{', '.join(sealed)}: every byte as it was written; " if sealed else ""
        return Check("picture", "not checked", f"{seals}the run is {run.status}")
    pixels = run.images.values
    expected = (
        ["picture.png"]
        if len(pixels) == 1
        else [f"picture-{index}.png" for index in range(len(pixels))]
    )
    pictures = [
        (name, shown) for name, shown in zip(expected, pixels, strict=True) if name in finals
    ]
    if not pictures:
        return Check("picture", "not checked", f"{expected[0]} is not there")
    for name, pixel in pictures:
        shown, experiment = _shown(run, name, pixel)
        if not np.array_equal(shown, pixel):
            return Check("picture", "failed", f"{name} does not show images/final")
        if json.loads(experiment) != run.attributes.recipe:
            return Check(
                "picture", "failed", f"{name} was made from another experiment than the recording's"
            )
    seals = f"; every byte as it was written: {', '.join(sealed)}" if sealed else ""
    return Check(
        "picture",
        "exact",
        f"{', '.join(name for name, _ in pictures)}: as images/final, of this experiment{seals}",
    )


def _shown(run: Run, name: str, expected: np.ndarray) -> tuple[np.ndarray, str]:
    """Return what a PNG shows, and the recipe in it.

    A picture of another size than expected is not decoded.
    """
    path, recipe = run.path, "noising" if run.kind == "noising" else "experiment"
    raw = read_file(path, name, no_longer(path, name, 2 * expected.nbytes + MAX_SAID))
    bomb = Image.DecompressionBombWarning
    try:
        with (
            warnings.catch_warnings(action="error", category=bomb),
            Image.open(io.BytesIO(raw), formats=("PNG",)) as picture,
        ):
            if (picture.height, picture.width, len(picture.getbands())) != expected.shape:
                return np.zeros(0), "null"
            return np.asarray(picture), str(picture.info.get(recipe, "null"))
    except (
        OSError,
        SyntaxError,
        zlib.error,
        struct.error,
        Image.DecompressionBombError,
        bomb,
    ) as error:
        raise refuse(path, f"{name} is no picture that can be read") from error
