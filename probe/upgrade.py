"""probe upgrade RUN: copy a recording of an older format into a new one in the newest.

The old recording is verified first, and only read. The copy lies beside it under a name of its own,
names the old one as its parent, and has the same values, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from probe.errors import ExperimentError, RecordingBusy, RecordingDamaged, TooLarge
from probe.format.schema import FORMAT_STATUS, FORMAT_VERSION
from probe.output import say, tell
from probe.proof.checks import MAX_MANIFEST, MAX_PICTURES, files_of
from probe.proof.verdict import verify
from probe.reading.files import is_hole, no_longer, opened, read_file, read_json, refuse
from probe.reading.recording import Run, open_run, with_files
from probe.reading.sample import folder_beside
from probe.reading.untrusted import read_root
from probe.stopping import breakable, cleanly
from probe.terminal import Parser, add_run, before_torch, folder, without_home
from probe.writing import files
from probe.writing.digests import seal_holds
from probe.writing.files import check_output_folder, storing
from probe.writing.locks import Lock
from probe.writing.store import MANIFEST

BLOCK = 2**20


def upgrade(run: Run, output: str | Path | None = None, *, progress: bool = True) -> Run:
    """Copy a recording into one of the newest format, and return the copy.

    It is written beside the recording, or into the folder `output`. A recording of the newest
    format is returned as it is. Raise ExperimentError for one that is not complete,
    RecordingDamaged for one that does not verify, RecordingBusy if its copy is there already,
    TooLarge, StoreError.
    """
    step = _steps(progress)
    run = with_files(run)
    if run.attributes.format_version == FORMAT_VERSION:
        step(f"{run.name} has format {FORMAT_VERSION} already.")
        return run
    if run.status != "complete":
        cause = f"{run.name} is {run.status}, and only a complete recording can be upgraded."
        if run.status == "interrupted":
            raise ExperimentError(cause, "Finish it first: probe run --resume.")
        raise ExperimentError(cause, "Record it again: probe rerun.")
    step(f"Verifying {run.name} ...")
    for check in verify(run):
        if check.verdict == "failed":
            cause = f"{run.name} does not verify: {check.name}: {check.detail}."
            raise RecordingDamaged(cause, "Take it from a copy, or record it again: probe rerun.")
    target = check_target(run, Path(output) if output is not None else folder_beside(run.path))
    _copy(run, target, step)
    return Run(target)


def check_target(run: Run, where: Path) -> Path:
    """Return the path of the copy. It is named after the recording's content: each has one copy.

    Raise TooLarge if the disk has no room for it.
    """
    manifest = json.dumps(read_json(run.path, MANIFEST, MAX_MANIFEST), sort_keys=True)
    key = hashlib.sha256(f"{FORMAT_VERSION}\n{manifest}".encode()).hexdigest()[:8]
    target = where / f"{run.recipe.run_name}-{key}.zarr"
    room = shutil.disk_usage(check_output_folder(where)).free
    size = sum((run.path / name).stat().st_size for name in files_of(run.path))
    if size > room:
        cause = f"{run.name} has {size / 1e6:.0f} MB, and {room / 1e6:.0f} MB are free in {where}."
        raise TooLarge(cause, "Free some room, or name another disk: --output FOLDER.")
    return target


def _copy(run: Run, target: Path, step: Callable[[str], None]) -> None:
    with storing(target), cleanly():
        files.make_folders(target.parent, True)
        lock = Lock(target)
        lock.acquire()
        try:
            if os.path.lexists(target):
                cause = f"{run.name} was upgraded before: {target}."
                remedy = "Read that one. To make it anew, remove it first: probe rm."
                raise RecordingBusy(cause, remedy)
            hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{files.PARTIAL}")
            try:
                hidden.mkdir()
                _fill(run, hidden, step)
                files.sync_all(hidden)
                hidden.rename(target)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            files.sync_folder(target.parent)
        finally:
            lock.release()


def _fill(run: Run, hidden: Path, step: Callable[[str], None]) -> None:
    """Copy every file, compare each with the manifest, and write new attributes and manifest."""
    written = read_json(run.path, MANIFEST, MAX_MANIFEST)
    names = sorted(written.keys() - {"zarr.json"})
    for number, name in enumerate(names, 1):
        with breakable():
            pass  # between two files is a good moment to stop
        copy = hidden / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if _copied(run.path, name, copy) != written[name]:
            raise refuse(run.path, f"{name} changed while it was copied")
        if run.kind == "noising" and copy.name == "zarr.json":
            copy.write_text(json.dumps(draws_named(json.loads(copy.read_bytes()))))
            written[name] = hashlib.sha256(copy.read_bytes()).hexdigest()
        if number % 1000 == 0:
            step(f"Copied {number} of {len(names)} files")
    for png in sorted(path.name for path in run.path.glob("*.png")):
        content = read_file(run.path, png, no_longer(run.path, png, MAX_PICTURES))
        if "digests" in run.attributes and not seal_holds(content):
            raise refuse(run.path, f"{png} changed while it was copied")
        (hidden / png).write_bytes(content)
    root = read_root(run.path)
    root["attributes"] = upgraded(run, root["attributes"])
    if run.kind == "noising":
        root = draws_named(root)
    (hidden / "zarr.json").write_text(json.dumps(root))
    root["attributes"].pop("status")
    own = hashlib.sha256(json.dumps(root, sort_keys=True).encode()).hexdigest()
    (hidden / MANIFEST).write_text(json.dumps({**written, "zarr.json": own}, indent=0))


def upgraded(run: Run, attributes: dict[str, Any]) -> dict[str, Any]:
    """Return attributes in the newest format. What this version does not know stays as it is."""
    guided = run.attributes.is_guided
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    kept = dict(attributes)
    if run.kind == "noising":
        # Format 1 wrote a noising as an experiment too, and took the identity from that.
        kept.pop("experiment", None)
        kept["identity"] = run.recipe.identity()
    return {
        **kept,
        "kind": run.kind,
        "format_version": FORMAT_VERSION,
        "format_status": FORMAT_STATUS,
        "family": attributes.get("family", "sd"),
        "guidance_rule": attributes.get("guidance_rule", "classifier_free" if guided else "none"),
        "parent_run": run.name,
        "upgraded": {"at": now, "from_format": run.attributes.format_version},
    }


def draws_named(node: dict[str, Any]) -> dict[str, Any]:
    """Return a zarr.json with the dimension `draw` where format 1 has `image`.

    It is renamed in the node itself and in all nodes that it lists.
    """
    renamed = dict(node)
    if dims := node.get("dimension_names"):
        renamed["dimension_names"] = ["draw" if dim == "image" else dim for dim in dims]
    if block := node.get("consolidated_metadata"):
        nodes = {name: draws_named(inner) for name, inner in block["metadata"].items()}
        renamed["consolidated_metadata"] = {**block, "metadata": nodes}
    return renamed


def _copied(recording: Path, name: str, copy: Path) -> str:
    """Copy one file and return the SHA-256 of its content."""

    def check(file: os.stat_result) -> None:
        if is_hole(file):
            raise refuse(recording, f"{name} is a hole of {file.st_size} bytes")

    digest = hashlib.sha256()
    with opened(recording, name, check) as source, copy.open("xb") as target:
        for block in _blocks(source.read):
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(BLOCK):
        yield block


def _steps(progress: bool) -> Callable[[str], None]:
    return (lambda line: tell(without_home(line))) if progress else (lambda _: None)


# --- the command ----------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Copy a recording of an older format into a new one in the newest.

    The recording is verified first, and only read. The new recording names it as its parent. A
    recording that does not verify is refused.
    """
    parser = Parser(prog="probe upgrade", description=main.__doc__)
    add_run(parser)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=folder,
        help="write the new recording there [beside the old one]",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    before_torch(options.quiet)
    run = open_run(options.run, options.runs)
    copy = upgrade(run, options.output, progress=not options.quiet)
    if copy is not run:
        say(f"Upgraded to {without_home(str(copy.path))}")
    return 0
