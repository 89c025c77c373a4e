"""What a capture is, and what it is made from.

A capture owns its variables. It says what it adds to a recording, where it looks, and what it makes
of each call of the model. Planning, writing, resuming and verifying use captures through this
interface alone. A new kind of capture is one file with one class, an entry in the schema, one line
in `probe.running.planning.CAPTURES`, and the setting that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from probe.format.schema import FORMAT_VERSION, ArraySpec
from probe.settings.experiment import Experiment
from probe.settings.noising import Noising
from probe.settings.recipe import Recipe
from probe.watching.hooks import Hooks, Watch

if TYPE_CHECKING:
    from probe.diffusion.family import Tokens
    from probe.diffusion.prompts import Prompt
    from probe.diffusion.sampling import Step
    from probe.diffusion.schedule import Schedule
    from probe.watching.rehearsal import Rehearsal

Grid = tuple[int, int]


@dataclass(frozen=True)
class Derived:
    """A value that `make` gives on the host, from tensors that are copied there.

    `whole` tensors are large and belong to the capture alone: each is copied as it is.
    """

    tensors: tuple[torch.Tensor, ...]
    make: Callable[..., np.ndarray]
    whole: bool = False


# What is stored, by the schema's path: "attention/16x16/cross".
Values = dict[str, torch.Tensor | Derived]


class Store(Protocol):
    """Where values go: a recording being written, or one that they are compared with."""

    @property
    def committed(self) -> int:
        """How many steps are recorded already."""

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        """Write a variable, or a part of it."""

    def read(self, path: str, at: Any = ...) -> np.ndarray:
        """Read back what was written."""

    def annotate(self, **attributes: Any) -> None:
        """Set attributes of the recording; a mapping is merged into the one that is there."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The recording's attributes as they are now."""


class Capture(Protocol):
    """One thing that is recorded. A capture defines only those methods that it needs.

    The order of calls: `arrays` when the run is planned; `expect` before each text that is read;
    `begin`; then for each step `expect`, if it `wants` that step the model's call with hooks on
    `watches`, `take` and `seen`; after each step `passed`; last `finish`.
    """

    # the part of the model that it watches: also "vae", "text_encoder", "all", or "" for none
    component: str = "unet"
    calls_model: bool = False  # whether `take` calls the model: nobody watches it then
    finishing: str = ""  # what `finish` does, if it takes a while: "Decoding the picture"

    def arrays(self) -> list[ArraySpec]:
        """Return the variables that it adds, with their sizes."""
        return []

    def watches(self) -> list[Watch]:
        """Return the modules that it looks at."""
        return []

    def wants(self, index: int, first: bool) -> bool:
        """Return whether it looks at a step; `first` is true for the first computed here."""
        return True

    def expect(self, call: int | str) -> None:
        """Note what comes next: the step of that index, or the text of a branch."""

    def begin(self, store: Store) -> None:
        """Write what is known before the first step.

        A resumed run has `store.committed` steps by then.
        """

    def take(self, step: Step) -> Values:
        """Return what one call of the model showed.

        Raise CaptureError if a watched module was not seen once.
        """
        return {}

    def forget(self) -> None:
        """Forget what was seen of a call that was broken off."""

    def seen(self, index: int, values: Values) -> None:
        """See all that a step showed, on the device, before it is copied to the host."""

    def arrived(self, index: int, arrays: Mapping[str, np.ndarray]) -> None:
        """See what is written of a step, on the host and in the writing thread, in turn."""

    def passed(self, step: Step, store: Store) -> None:
        """Write what follows from a step and is no part of it.

        Steps that were recorded before pass too.
        """

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        """Write what follows from the whole run and its final latents.

        Return what people should know of it.
        """
        return []


@dataclass(frozen=True)
class KeptTokens:
    """The token positions whose maps are kept: 0 to `end`. The others are summed as `rest`."""

    end: int
    tokens: int

    @property
    def positions(self) -> tuple[int, ...]:
        """The `token` coordinate: positions, then -1 for `rest`, if there is one."""
        return (*range(self.end + 1), *([-1] if self.end + 1 < self.tokens else []))


@dataclass(frozen=True)
class Rows:
    """Which elements of the model's batch are recorded.

    The batch is (branch, image), the branches in their order.
    """

    computed_branches: tuple[str, ...]
    kept_branches: tuple[str, ...]
    images: int

    @property
    def batch(self) -> int:
        return len(self.computed_branches) * self.images

    def of(self, branch: str) -> list[int]:
        """Return the rows of a branch, one an image."""
        first = self.computed_branches.index(branch) * self.images
        return list(range(first, first + self.images))

    @property
    def kept(self) -> list[int]:
        """All rows that are recorded, by branch, then image."""
        return [row for branch in self.kept_branches for row in self.of(branch)]


@dataclass(frozen=True)
class Plan:
    """A run about to happen: what decides its shapes, and the captures that record it.

    `tokens` are each branch's text, by text encoder. `layers` and `self_layers` are the recorded
    attention layers with their grids (y, x), in running order. `recorded` are the steps at which
    they are read, `decoded` those whose latents are decoded. `picture` is what the run begins from,
    (y, x, rgb) uint8; a noising may have `masks`, (y, x) uint8 by word. `words` are those to leave
    out for the counterfactual, with their token positions. No text encoder reads the texts of
    `zeroed_branches`: the denoiser gets zeros. `format_version` is that of the recording.
    """

    recipe: Recipe
    tokens: dict[str, Tokens]
    schedule: Schedule
    rehearsal: Rehearsal
    latent_shape: tuple[int, int, int, int]
    rows: Rows
    kept: KeptTokens
    layers: dict[str, Grid]
    self_layers: dict[str, Grid]
    words: dict[str, list[int]]
    recorded: tuple[int, ...]
    decoded: tuple[int, ...]
    picture: np.ndarray | None = None
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    zeroed_branches: tuple[str, ...] = ()
    captures: tuple[Capture, ...] = field(default=(), repr=False)
    format_version: int = FORMAT_VERSION
    remarks: tuple[str, ...] = ()

    @property
    def prompts(self) -> dict[str, Prompt]:
        """Each branch's text as the first text encoder reads it."""
        return {branch: next(iter(tokens.values())) for branch, tokens in self.tokens.items()}

    @property
    def experiment(self) -> Experiment:
        """The recipe of a generation. Raise TypeError for any other plan."""
        if not isinstance(self.recipe, Experiment):
            raise TypeError(f"a {self.recipe.kind} has no experiment")
        return self.recipe

    @property
    def noising(self) -> Noising:
        """The recipe of a noising. Raise TypeError for any other plan."""
        if not isinstance(self.recipe, Noising):
            raise TypeError(f"a {self.recipe.kind} is no noising")
        return self.recipe

    @property
    def calls(self) -> int:
        """How many model calls the run makes."""
        return len(self.schedule.timesteps)

    @property
    def computed_branches(self) -> tuple[str, ...]:
        """The branches that the denoiser computes."""
        return self.rows.computed_branches

    @property
    def kept_branches(self) -> tuple[str, ...]:
        """The branches whose attention is recorded."""
        return self.rows.kept_branches

    @property
    def grids(self) -> dict[Grid, list[str]]:
        """Cross-attention layers of each grid, the largest grid first."""
        return by_grid(self.layers)

    @property
    def self_grids(self) -> dict[Grid, list[str]]:
        """Self-attention layers of each grid, the largest grid first."""
        return by_grid(self.self_layers)

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """Every variable of the recording that its format has."""
        across = self.recipe.across
        specs = (
            replace(spec, across=across) for capture in self.captures for spec in capture.arrays()
        )
        return tuple(spec for spec in specs if spec.variable.since <= self.format_version)

    def forecast(self) -> dict[str, int]:
        """Return the bytes of every variable, uncompressed; steps that are not recorded count 0."""
        share = len(self.recorded) / self.calls
        return {
            a.path: round(a.nbytes * (share if a.variable.recorded_only else 1))
            for a in self.arrays
        }


def by_grid(layers: dict[str, Grid]) -> dict[Grid, list[str]]:
    """Return the layers of each grid, the largest grid first."""
    grids = sorted(set(layers.values()), reverse=True)
    return {grid: [path for path, own in layers.items() if own == grid] for grid in grids}


def grid_group(grid: Grid) -> str:
    """Return the group of a grid's cross-attention: attention/16x16."""
    return f"attention/{grid[0]}x{grid[1]}"


def hooked(*captures: Capture) -> Hooks:
    """Return all hooks of some captures; they are on while the `with` block lasts."""
    return Hooks(watch for capture in captures for watch in capture.watches())


def numpy_dtype(dtype: torch.dtype) -> str:
    """Return the type in which a tensor is stored: bfloat16, which numpy lacks, as float32."""
    return "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as it is stored."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def dtype_note(dtype: torch.dtype) -> dict[str, str]:
    """Return the attribute that names the type in which a variable was computed."""
    return {"recorded_dtype": str(dtype).removeprefix("torch.")}
