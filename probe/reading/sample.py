"""The sample recording in the package: a first look needs neither torch nor a model.

    probe show sample                  # any command that takes a recording takes this name
    run = probe.open_run("sample")

It is shipped as one zip file, and unpacked once into the user's cache folder. It was made by
`python -m experiments.emojiworld.sample`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

from probe.errors import RecordingNotFound
from probe.reading.archives import into_cache
from probe.settings.fields import home
from probe.stopping import cleanly
from probe.system import may_change, trouble_in, unreadable

ARCHIVE = Path(__file__).parent.parent / "sample.zip"
NAME = "sample"


def unpacked() -> Path:
    """Return the path of the sample recording. Unpack it on first use.

    Raises RecordingNotFound if no folder takes it.
    """
    try:
        content = ARCHIVE.read_bytes()
        folder = cache_folder() / "diffusion-probe"
        target = folder / f"{NAME}-{hashlib.sha256(content).hexdigest()[:8]}.zarr"
        if not target.exists():
            with (
                into_cache("The sample recording", folder),
                cleanly(),
                tempfile.TemporaryDirectory(dir=folder) as partial,
                zipfile.ZipFile(ARCHIVE) as archive,
            ):
                archive.extractall(partial)
                try:
                    (Path(partial) / f"{NAME}.zarr").rename(target)
                except OSError:  # another process was first
                    if not target.exists():
                        raise
        return target
    except RecordingNotFound:
        raise
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        if (trouble := trouble_in(error)) is not None:
            raise unreadable(ARCHIVE, trouble) from error
        raise RecordingNotFound(
            f"The sample recording cannot be unpacked: {error}",
            "Set XDG_CACHE_HOME to a folder that can be written.",
        ) from error


def is_copy(path: Path) -> bool:
    """Tell whether a recording lies in the cache folder: the sample, or one from a zip file."""
    return path.absolute().is_relative_to((cache_folder() / "diffusion-probe").absolute())


def folder_beside(path: Path) -> Path:
    """Return the folder for what is made from a recording: its own.

    It is `runs` for a copy in the cache folder.
    """
    return Path("runs") if is_copy(path) else path.parent


def cache_folder() -> Path:
    """Return the user's folder for what can be made again.

    If no home can be written, as in some containers, it is one of this account's own among
    temporary files. Raises OSError if that one belongs to somebody else.
    """
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    if (own := home()) is not None and _takes_files(own / ".cache" / "diffusion-probe"):
        return own / ".cache"
    account = os.geteuid() if hasattr(os, "geteuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"probe-cache-{account}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "geteuid") and found.st_uid != os.geteuid()):
        raise OSError(f"{folder} belongs to somebody else")
    return folder


def _takes_files(folder: Path) -> bool:
    """Tell whether a folder can be written, or made."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return may_change(folder)


def pack(recording: Path, archive: Path = ARCHIVE) -> None:
    """Zip a finished recording into the package.

    One order and one date for all files: the bytes are the same each time.
    """
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for file in sorted(path for path in recording.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{NAME}.zarr/{file.relative_to(recording).as_posix()}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open("rb") as source, zipped.open(entry, "w") as target:
                shutil.copyfileobj(source, target)
