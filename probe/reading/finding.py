"""Finding a recording by its path, the beginning of its name, "latest" or "sample"."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from probe.errors import RecordingNotFound
from probe.format.schema import near
from probe.reading import archives, sample
from probe.reading.listing import list_runs, recordings_in
from probe.system import exists


def find_run(name: str | Path, runs: str | Path = "runs") -> Path:
    """Return the path of a recording.

    `name` is a path, "latest", the beginning of a name in the folder `runs`, or one of those in the
    package (`sample.NAMES`). A zip file is unpacked, and the path is that of the copy. Raises
    RecordingNotFound, RecordingUnreadable, or RecordingDamaged for a zip file that is not sound.
    """
    path = _as_path(str(name))
    if exists(path / "zarr.json"):
        return path
    if path.name == "zarr.json" and exists(path):
        return path.parent
    if path.suffix == ".zip" and exists(path):
        return archives.unpacked(path, sample.cache_folder())
    inner = path / path.name  # unpacked into a folder of its own name
    if path.suffix == ".zarr" and exists(inner / "zarr.json"):
        return inner
    if str(name) in sample.NAMES:
        return sample.unpacked(str(name))
    if str(name) == "latest":
        rows = list_runs(runs)
        paths = [path for path, attributes in rows if attributes] or [path for path, _ in rows]
    else:
        paths = recordings_in(runs)
    if not paths:
        raise RecordingNotFound(
            f"There is no recording in {runs}.", "Make one: python -m probe.run"
        )
    if str(name) == "latest":
        return paths[0]
    start = str(path.relative_to(runs) if path.is_relative_to(runs) else path)
    matching = sorted(path for path in paths if path.name.startswith(start))
    if len(matching) == 1:
        return matching[0]
    names = sorted(path.name.removesuffix(".zarr") for path in paths)
    if str(name).startswith("sample"):
        names += sample.NAMES
    if not matching:
        raise RecordingNotFound(
            f"No recording in {runs} begins with {str(name)!r}.", near(str(name), names)
        )
    raise RecordingNotFound(
        f"{len(matching)} recordings begin with {str(name)!r}.",
        f"Say more of the name: {', '.join(p.name for p in matching[:4])}.",
    )


def _as_path(name: str) -> Path:
    """Return the path that a text names, also as file:///home/me/x.zarr.

    Raises RecordingNotFound for an address elsewhere.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", name)
    if scheme is None:
        return Path(name)
    address = urllib.parse.urlsplit(name)
    if address.scheme == "file" and address.netloc in ("", "localhost"):
        from urllib.request import url2pathname  # costs 15 ms, and few need it

        return Path(url2pathname(address.path))
    raise RecordingNotFound(
        f"{name!r} is an address, and recordings are read from a disk.",
        "Copy it here, and give the path of the copy.",
    )
