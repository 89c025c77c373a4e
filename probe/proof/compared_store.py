"""A store that compares what it is given with what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from probe.proof.checks import DAMAGE, Tally
from probe.proof.map_checks import apart
from probe.reading.recording import Run
from probe.text import first_line

PATCH = 16  # pixels along a patch


class ComparedStore:
    """A store that writes nothing. It compares each value with the recorded one.

    Each is counted in the tally of its variable.
    """

    committed = 0

    def __init__(
        self, run: Run, recorded: Mapping[str, xr.Variable], tally_of: Callable[[str], Tally | None]
    ):
        self._run, self._recorded, self._tally_of = run, recorded, tally_of
        self.annotations: dict[str, Any] = {}

    @property
    def attributes(self) -> Mapping[str, Any]:
        return self._run.attributes

    def annotate(self, **attributes: Any) -> None:
        self.annotations.update(attributes)

    def read(self, path: str, at: Any = ...) -> np.ndarray:
        return np.asarray(
            self._recorded[path].values if at is ... else self._recorded[path][at].values
        )

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        tally = self._tally_of(path)
        if tally is None or (path.startswith("preview/") and not len(self._run.steps)):
            return
        try:
            stored = self.read(path, at)
        except DAMAGE as error:
            tally.fail(f"{path} cannot be read: {first_line(error)[:200]}")
            return
        computed, where = (
            np.asarray(value),
            path if at is ... else f"{path}, step {self._step_of(path, at)}",
        )
        if computed.shape != stored.shape:
            tally.fail(f"{where} is {stored.shape}, not {computed.shape}")
        elif stored.dtype == np.uint8 and path.rpartition("/")[2] in ("final", "picture"):
            tally.add(_pixels_apart(computed, stored), where)
        else:
            tally.add(apart(computed.astype(stored.dtype), stored), where)

    def write_step(self, step: int, values: Callable[[], Mapping[str, np.ndarray]], _: int) -> None:
        for path, value in values().items():
            self.write(path, value, step)

    def flush(self) -> None:
        pass

    def _step_of(self, path: str, at: int) -> int:
        return int(self._recorded["decoded/decoded_step"][at]) if path == "decoded/picture" else at


def _pixels_apart(computed: np.ndarray, recorded: np.ndarray) -> float:
    """Return how far pictures are apart, as a share of their range.

    *Shape:* both (image, y, x, rgb) uint8.

    It is the mean over a picture, or an eighth of that over its worst patch of `PATCH` x `PATCH`
    pixels if that is more: a spot that was painted over does not vanish in the mean.
    """
    off = np.abs(computed.astype(np.float32) - recorded).mean(axis=-1) / 255
    (images, y, x), pad = off.shape, [(0, 0), *((0, -side % PATCH) for side in off.shape[1:])]
    patches = np.pad(off, pad).reshape(images, -(-y // PATCH), PATCH, -(-x // PATCH), PATCH)
    return float(max(off.mean(), patches.mean(axis=(2, 4)).max() / 8))
