"""Which of the recorded maps are read: layers by pattern; steps, heads and images by index.

What was not recorded is an error that names the setting. It is never left out in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from probe.arguments import chosen, chosen_steps, in_words
from probe.errors import ExperimentError, RecordingNotFound
from probe.format.schema import near

MAPS = "attention maps"
Indices = slice | int | Sequence[int] | np.ndarray


def chosen_layers(
    name: str, recorded: dict[str, list[str]], patterns: Sequence[str]
) -> dict[str, list[str]]:
    """Return the layers that globs and grids select, by grid, of those `recorded`.

    `name` is that of the recording. Raises RecordingNotFound for a pattern that matches nothing.
    """
    every = [path for paths in recorded.values() for path in paths]
    selected: set[str] = set()
    for pattern in patterns:
        matching = recorded.get(pattern) or [path for path in every if fnmatchcase(path, pattern)]
        if not matching:
            blocks = dict.fromkeys(f"{path.split('.')[0]}.*" for path in every)
            raise RecordingNotFound(
                f"{pattern!r} matches no layer whose attention {name} has.",
                near(pattern, [*recorded, *blocks, *every]),
            )
        selected.update(matching)
    kept = {grid: [path for path in paths if path in selected] for grid, paths in recorded.items()}
    return {grid: paths for grid, paths in kept.items() if paths}


def chosen_positions(
    name: str,
    recorded: list[int],
    steps: Indices | str,
    calls: int,
    what: str = MAPS,
) -> list[int]:
    """Return where the chosen steps are among those `recorded`; `calls` is the number of all.

    `what` was recorded of them: the text of an error says so.

    A slice takes those that are there. Raises RecordingNotFound if none is, or if a step that was
    named is missing.
    """
    indices = chosen_steps(steps, calls)
    if isinstance(indices, slice):
        wanted = list(range(calls)[indices])
    else:
        wanted = [step + calls if step < 0 else step for step in indices]
    absent = [step for step in wanted if step not in recorded]
    see = "; see capture.steps" if what == MAPS else ""
    remedy = f"It has steps {_as_text(recorded)}{see}."
    if absent and not isinstance(indices, slice):
        named = absent[0] if absent[0] >= 0 else absent[0] - calls
        raise RecordingNotFound(f"{name} has no {what} of step {named}.", remedy)
    if recorded and not set(recorded) & set(wanted):
        raise RecordingNotFound(f"{name} has {what} of none of these steps.", remedy)
    return [recorded.index(step) for step in wanted if step in recorded]


def several(dim: str, given: Indices, size: int) -> list[int]:
    """Return the chosen heads, images or tokens as a list; it may hold some that are not there.

    Raises ExperimentError for an empty choice.
    """
    setting = f"{dim}s" if dim in ("head", "token") else "images"
    indices = chosen(setting, given, size)
    found = [*range(size)[indices]] if isinstance(indices, slice) else indices
    if not found:
        raise nothing_chosen(setting, given)
    return found


def check_there(problem: str, grid: str, dim: str, indices: list[int], size: int) -> None:
    """Raise RecordingNotFound, which begins with `problem`, for an index of nothing recorded."""
    if wrong := [index for index in indices if not 0 <= index < size]:
        raise RecordingNotFound(
            f"{problem} {wrong[0]} at {grid}.", f"It has {dim}s 0 to {size - 1}."
        )


def nothing_chosen(setting: str, given: object) -> ExperimentError:
    """Return the error for a choice that leaves nothing."""
    return ExperimentError(
        f"{setting} is {in_words(given)}: there is nothing to take the mean of.",
        f"Leave {setting} out for all of them.",
    )


def slice_of(indices: np.ndarray) -> np.ndarray | slice:
    """Return indices as a slice where each follows the one before.

    Zarr reads a slice in a third of the time.
    """
    consecutive = indices.size and bool((np.diff(indices) == 1).all())
    return slice(int(indices[0]), int(indices[-1]) + 1) if consecutive else indices


def _as_text(steps: list[int]) -> str:
    if steps and steps == list(range(steps[0], steps[-1] + 1)):
        return f"{steps[0]} to {steps[-1]}"
    return ", ".join(map(str, steps[:12])) + (", ..." if len(steps) > 12 else "") or "none"
