"""The container of what the player draws: maps as bytes with their range, pictures, numbers.

A payload is `PRB2`, the length of a JSON header (uint32, little endian), the header, then the parts
that it lists. Pictures are WebP sheets. The dashboard sends payloads, an exported page holds them,
and payload.js opens them.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

Part: TypeAlias = tuple[bytes, dict[str, Any]]  # the bytes, and what the header says of them
MAGIC = b"PRB2"  # another number at every change: browsers keep what an older version made
FAINT = 1e-30  # where nothing is greater, all is 0
COLUMNS = 10  # pictures in a row of a sheet


def pack(meta: Mapping[str, Any], parts: Mapping[str, Part]) -> bytes:
    """Return a payload. Raise ValueError if a number in `meta` is not finite."""
    at, listed = 0, {}
    for name, (content, about) in parts.items():
        listed[name] = {"at": at, "size": len(content), **about}
        at += len(content)
    text = json.dumps({"meta": meta, "parts": listed}, ensure_ascii=False, allow_nan=False)
    head = text.encode("utf-8", "replace")
    return b"".join(
        [MAGIC, struct.pack("<I", len(head)), head, *(part[0] for part in parts.values())]
    )


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header of a payload, and its parts of numbers, as player.js reads them."""
    (length,) = struct.unpack_from("<I", content, 4)
    head = json.loads(content[8 : 8 + length])
    found = {}
    for name, part in head["parts"].items():
        if part["kind"] == "numbers":
            start = 8 + length + part["at"]
            raw = np.frombuffer(zlib.decompress(content[start : start + part["size"]]), np.uint8)
            codes = raw.reshape(part["shape"]).cumsum(axis=-1, dtype=np.uint8)
            scale = np.array(part["high"], np.float32).reshape(part["scales"]) / 255
            found[name] = codes * scale
    return head, found


def numbers(values: np.ndarray, apart: Sequence[int] = (), levels: int = 256) -> Part:
    """Return numbers (step, ...) from 0 up as bytes (..., step), each byte / 255 of the greatest.

    Each index along the axes `apart`, never the first, has a greatest value of its own. Fewer
    `levels` take less room. Each byte is stored as its difference, modulo 256, from the one of the
    step before: what changes little compresses well, and fast.
    """
    values = np.fmax(np.asarray(values, np.float32), 0)  # NaN becomes 0
    over = tuple(axis for axis in range(values.ndim) if axis not in apart)
    high = values.max(axis=over, keepdims=True, initial=0)
    if not np.isfinite(high).all():
        values[np.isinf(values)] = 0
        high = values.max(axis=over, keepdims=True, initial=0)
    values *= np.divide(levels - 1, high, out=np.zeros_like(high), where=high > FAINT)
    values += 0.5
    if levels < 256:
        values = np.floor(values, out=values) * np.float32(255 / (levels - 1)) + np.float32(0.5)
    codes = values.astype(np.uint8)  # rounded: what is behind the point is cut off
    codes[1:] -= codes[:-1].copy()
    steps_last = np.moveaxis(codes, 0, -1)
    about = {
        "kind": "numbers",
        "shape": list(steps_last.shape),
        "scales": [*high.shape[1:], 1],
        "high": [float(f"{one:.6g}") for one in high.ravel()],
    }
    # Of 256 levels, runs alone are looked for: a sixth of the time, and a few percent more room.
    how = (1, zlib.Z_RLE) if levels == 256 else (6, zlib.Z_FILTERED)
    deflate = zlib.compressobj(how[0], strategy=how[1])
    return deflate.compress(np.ascontiguousarray(steps_last).data) + deflate.flush(), about


def pictures(rgb: np.ndarray, lossless: bool = True) -> Part:
    """Return pictures (frame, y, x, rgb) uint8 as one sheet, `COLUMNS` in a row."""
    count, height, width, _ = rgb.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = rgb
    grid = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    made = io.BytesIO()
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, 3))
    picture.save(made, "WEBP", lossless=lossless, quality=80, method=0 if lossless else 2)
    return made.getvalue(), {"kind": "sheet", "shape": list(rgb.shape), "columns": columns}


def finite(values: np.ndarray) -> list[float | None]:
    """Return numbers for a header, in six digits; None for one that is not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.astype(float)]
