"""The recordings in the package: a first look needs neither torch nor a model.

    probe show sample                  # any command that takes a recording takes these names
    probe view sample sample-guidance-8
    run = probe.open_run("sample-noising")

`sample` is the default picture, `sample-guidance-8` the same at guidance 8, and `sample-noising` a
picture at eight noise levels. Each is shipped as a zip file, and unpacked once into the user's
cache folder. All were made by `python -m experiments.emojiworld.sample`.
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

NAMES = ("sample", "sample-guidance-8", "sample-noising")
ARCHIVES = {name: Path(__file__).parent.parent / f"{name}.zip" for name in NAMES}


def unpacked(name: str = "sample") -> Path:
    """Return the path of a recording in the package, one of `NAMES`. Unpack it on first use.

    Raises RecordingNotFound if no folder takes it.
    """
    packed = ARCHIVES[name]
    try:
        content = packed.read_bytes()
        folder = cache_folder() / "diffusion-probe"
        target = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.zarr"
        if not target.exists():
            with (
                into_cache(f"The recording {name}", folder),
                cleanly(),
                tempfile.TemporaryDirectory(dir=folder) as partial,
                zipfile.ZipFile(packed) as archive,
            ):
                archive.extractall(partial)
                try:
                    (Path(partial) / f"{name}.zarr").rename(target)
                except OSError:  # another process was first
                    if not target.exists():
                        raise
        return target
    except RecordingNotFound:
        raise
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        if (trouble := trouble_in(error)) is not None:
            raise unreadable(packed, trouble) from error
        raise RecordingNotFound(
            f"The recording {name} cannot be unpacked: {error}",
            "Set XDG_CACHE_HOME to a folder that can be written.",
        ) from error


def is_copy(path: Path) -> bool:
    """Tell whether a recording lies in the cache folder: one from the package or a zip file."""
    return path.absolute().is_relative_to((cache_folder() / "diffusion-probe").absolute())


def called(path: Path) -> str:
    """Return what opens a recording: the name of one from the package, else its path."""
    name = path.name.removesuffix(".zarr").rpartition("-")[0]
    return name if name in NAMES and is_copy(path) else str(path)


def name_of(path: Path) -> str:
    """Return what people call a recording: like its folder without .zarr.

    One from the package is called by its name there, without the digest of its copy.
    """
    known = called(path)
    return known if known in NAMES else path.name.removesuffix(".zarr")


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


def pack(recording: Path, name: str, archive: Path | None = None) -> None:
    """Zip a finished recording into the package as `name`, or into another file.

    One order and one date for all files: the bytes are the same each time.
    """
    target = archive or ARCHIVES[name]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as zipped:
        for file in sorted(path for path in recording.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{name}.zarr/{file.relative_to(recording).as_posix()}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open("rb") as source, zipped.open(entry, "w") as written:
                shutil.copyfileobj(source, written)
