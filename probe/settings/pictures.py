"""Make pictures and masks from outside fit for a model: read, checked, scaled and cut.

    read_picture("cat.jpg", 512, 512)          # (y, x, rgb) uint8
    read_masks(("masks.npz",), ...)            # {"cat": (y, x) uint8, ...}

The rule is the same for a picture and its masks. Both are turned as the camera says, transparency
is laid over white, and they are scaled until they just cover the size and cut to the centre. A
picture that has the size already is taken as it is, pixel for pixel.
"""

from __future__ import annotations

import io
import os
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageOps, UnidentifiedImageError

from probe.errors import ExperimentError, ProbeError
from probe.reading.archives import Zip
from probe.reading.files import open_plain
from probe.settings.fields import expand_home
from probe.text import first_line, printable

FORMATS = ("PNG", "JPEG")
LEAST, MOST = 8, 2**26  # pixels a side, pixels in all: 64 million
MOST_MASKS, MOST_LISTED, MOST_BYTES = (
    1000,
    2**20,
    2**30,
)  # of one .npz: masks; bytes of its list of them, of all of them unpacked
HEADER = 1000  # bytes of what an .npz says of one mask: numpy writes 118


def read_picture(path: str | Path, height: int, width: int, field: str = "image") -> np.ndarray:
    """Return a PNG or JPEG file as (y, x, rgb) uint8 of that size.

    Raise ExperimentError, which names `field`.
    """
    upright = _read(path, field)
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return np.asarray(_fitted(upright.convert("RGB"), height, width, Image.Resampling.LANCZOS))


def read_masks(
    paths: Sequence[str | Path], height: int, width: int, field: str = "masks"
) -> dict[str, np.ndarray]:
    """Return masks by their words, (y, x) uint8, 1 inside.

    They are every array of an .npz file by its name, or a .png by the file's name. Inside is what
    is not 0 in an array, and what is brighter than half in a .png. Raise ExperimentError, which
    names `field`; also for a mask with nothing inside.
    """
    found: dict[str, np.ndarray] = {}
    for path in map(Path, paths):
        where = printable(str(path))
        if path.suffix == ".npz":
            masks: Iterable[tuple[str, str, Image.Image]] = (
                (word, f"{word!r} in {where}", Image.fromarray(mask))
                for word, mask in _arrays(path)
            )
        else:
            masks = [
                (path.stem, where, _read(path, field).convert("L").point(lambda grey: grey > 127))
            ]
        for word, told, mask in masks:
            found[word] = np.asarray(_fitted(mask, height, width, Image.Resampling.NEAREST))
            if not found[word].any():
                remedy = (
                    "A mask is white (255; in an array not 0) where its word is, and what is "
                    "outside the model's size is cut off."
                )
                raise ExperimentError(f"{field}: {told} has nothing inside.", remedy)
    return found


def checked_picture(picture: np.ndarray, multiple: int) -> np.ndarray:
    """Return an array that is taken as it is.

    Raise ExperimentError if it is not (y, x, rgb) uint8 with sides that the model can work on.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ExperimentError(
            f"picture: {picture.dtype} of shape {picture.shape} is not (y, x, rgb) uint8.",
            "Give RGB pixels, 0 to 255.",
        )
    if min(picture.shape[:2]) < LEAST or any(side % multiple for side in picture.shape[:2]):
        raise ExperimentError(
            f"picture: {picture.shape[0]} x {picture.shape[1]} pixels; both sides must be "
            f"multiples of {multiple} for this model.",
            "Scale or cut it, or give a file: that is made to fit.",
        )
    return picture


def checked_masks(
    masks: Mapping[str, np.ndarray], height: int, width: int
) -> dict[str, np.ndarray]:
    """Return masks that are taken as they are, as uint8, 1 inside.

    Raise ExperimentError for another size than the picture's, for a mask with nothing inside, and
    for what is no mask by word.
    """
    if not isinstance(masks, Mapping):
        raise ExperimentError(
            f"masks: a {type(masks).__name__} is not masks by word.",
            'Give each mask with its word: {"cat": mask}.',
        )
    held: dict[str, np.ndarray] = {}
    for word, mask in masks.items():
        if not isinstance(word, str) or not word.strip():
            raise ExperimentError(
                f"masks: {word!r} is not a word.",
                'Give each mask with its word, as text: {"cat": mask}.',
            )
        if not hasattr(mask, "__array__"):
            raise ExperimentError(
                f"masks: that of {word!r} is a {type(mask).__name__}, not an array.",
                "Give a (y, x) array of truth values.",
            )
        array = np.asarray(mask)
        if array.shape != (height, width):
            raise ExperimentError(
                f"masks: that of {word!r} has shape {array.shape}, the picture is {height} x "
                f"{width} pixels.",
                "Scale or cut it as the picture.",
            )
        if array.dtype.kind not in "bui":
            raise ExperimentError(
                f"masks: that of {word!r} is {array.dtype}.",
                "A mask is of truth values or whole numbers: write mask > 0.5.",
            )
        held[word] = (array != 0).astype(np.uint8)
        if not held[word].any():
            raise ExperimentError(
                f"masks: that of {word!r} has nothing inside.",
                "Leave it out, or give one that is not 0 where its word is.",
            )
    return held


def _read(path: str | Path, field: str) -> Image.Image:
    """Return the picture in a file, upright. Raise ExperimentError."""
    where, sizes = (
        printable(str(path)),
        f"At least {LEAST} a side and at most {MOST:,} in all can be used.",
    )
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            _opened(path, field, "PNG or JPEG") as file,
            Image.open(file, formats=FORMATS) as opened,
        ):
            if min(opened.size) < LEAST or opened.width * opened.height > MOST:
                raise ExperimentError(
                    f"{field}: {where} is {opened.height} x {opened.width} pixels.", sizes
                )
            return _in_8_bits(ImageOps.exif_transpose(opened))
    except (
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ):  # Pillow's own limit, from 89 million on, comes before ours
        raise ExperimentError(f"{field}: {where} has more than {MOST:,} pixels.", sizes) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as problem:
        if isinstance(problem, ExperimentError):
            raise
        if (
            isinstance(problem, OSError) and problem.errno
        ):  # the system's word, not the picture's fault
            raise _unread(field, where, problem) from None
        raise ExperimentError(
            f"{field}: {where} is not a PNG or JPEG picture that can be read.", "Save it as one."
        ) from None


def _unread(field: str, where: str, problem: OSError) -> ExperimentError:
    return ExperimentError(
        f"{field}: {where} cannot be read: {os.strerror(problem.errno or 0)}.",
        "Name a file that you may read.",
    )


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Return greys of 16 bits as greys of 8, with the grey that is transparent, if there is one.

    Pillow's `convert` would cut them off at 255.
    """
    if not picture.mode.startswith("I"):
        return picture
    greys = np.asarray(picture)
    made = Image.fromarray((greys / 257).round().astype(np.uint8))
    if "transparency" in picture.info:
        made.putalpha(
            Image.fromarray(
                np.where(greys == picture.info["transparency"], 0, 255).astype(np.uint8)
            )
        )
    return made


def _opened(path: str | Path, field: str, kinds: str) -> io.BufferedReader:
    """Return a plain file that somebody named.

    Raise ExperimentError for anything else, without waiting for a pipe; OSError.
    """
    where = printable(str(path))
    try:
        file = open_plain(expand_home(path))
    except FileNotFoundError:
        raise ExperimentError(
            f"{field}: {where} does not exist.",
            f"Name a {kinds} file; a path is relative to the folder you are in.",
        ) from None
    if isinstance(file, str):
        raise ExperimentError(f"{field}: {where} is {file}, not a file.", f"Name a {kinds} file.")
    return file


def _arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the masks of an .npz file, as uint8.

    What each says of itself is checked before it is unpacked.
    """
    where = printable(str(path))
    try:
        with _opened(path, "masks", ".npz or .png") as file, Zip(file, MOST_LISTED) as held:
            entries = held.infolist()
            size = sum(entry.file_size for entry in entries)
            if not entries:
                raise ExperimentError(
                    f"masks: {where} has no mask in it.",
                    "Save each by its word: numpy.savez(file, cat=mask).",
                )
            if len(entries) > MOST_MASKS or size > MOST_BYTES:
                told = f"{len(entries)} masks of {size} bytes together"
                raise ExperimentError(
                    f"masks: {where} has {told}.",
                    f"At most {MOST_MASKS} of {MOST_BYTES} bytes can be used: save fewer.",
                )
            for entry in entries:
                word = entry.filename.removesuffix(".npy")
                with held.open(entry) as source:
                    yield (
                        word,
                        (_array(source, entry.file_size, f"{word[:60]!r} in {where}") != 0).astype(
                            np.uint8
                        ),
                    )
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,
        OverflowError,
        zipfile.BadZipFile,
        zlib.error,
    ) as problem:
        if isinstance(problem, ProbeError):
            raise
        if isinstance(problem, OSError) and problem.errno:
            raise _unread("masks", where, problem) from None
        raise ExperimentError(
            f"masks: {where} cannot be read ({first_line(problem)[:80]}).",
            "Save it with numpy.savez.",
        ) from None


def _array(source: IO[bytes], size: int, told: str) -> np.ndarray:
    """Return an array of truth values or whole numbers from an .npy file of `size` bytes.

    Raise ExperimentError, ValueError.
    """
    start = io.BytesIO(source.read(HEADER + 12))
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[
            npy.read_magic(start)
        ]
        shape, turned, dtype = read(start, max_header_size=HEADER)
    except (
        ValueError,
        LookupError,
        TypeError,
        SyntaxError,
        RecursionError,
        MemoryError,
        OverflowError,
        tokenize.TokenError,
    ):
        raise ExperimentError(
            f"masks: {told} is not an array that can be read.", "Save it with numpy.savez."
        ) from None
    if len(shape) != 2 or dtype.kind not in "bui" or min(shape) < 1:
        raise ExperimentError(
            f"masks: {told} is {str(dtype)[:60]} of shape {str(shape)[:60]}.",
            "A mask is (y, x), of truth values or whole numbers.",
        )
    if shape[0] * shape[1] > MOST:
        raise ExperimentError(
            f"masks: {told} is {shape[0]} x {shape[1]} pixels.",
            f"At most {MOST:,} in all can be used.",
        )
    wanted = shape[0] * shape[1] * dtype.itemsize
    if size != start.tell() + wanted:
        raise ExperimentError(
            f"masks: {told} is not as long as it says.", "Save it with numpy.savez."
        )
    raw = start.read() + source.read(wanted)  # to its end: then its checksum is looked at
    if len(raw) != wanted or source.read(1):
        raise ExperimentError(
            f"masks: {told} is not as long as it says.", "Save it with numpy.savez."
        )
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if turned else "C")


def _fitted(
    picture: Image.Image, height: int, width: int, resample: Image.Resampling
) -> Image.Image:
    return (
        picture
        if picture.size == (width, height)
        else ImageOps.fit(picture, (width, height), method=resample)
    )
