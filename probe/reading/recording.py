"""Reading recordings: lazily, labelled, and without torch or the model.

    run = open_run("latest")                 # or a path, or the beginning of a run's name
    run.tree                                 # the whole recording, an xarray DataTree
    run.latents, run.denoised()              # (step, image, channel, y, x), committed steps only
    run.attention("16x16"), run.word_maps()  # where it looked: see `probe.reading.attention`

What is read of latents is in `probe.reading.latents`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.core.treenode import NotFoundInTreeError

from probe.arguments import in_words, text
from probe.errors import ExperimentError, RecordingDamaged, RecordingNotFound
from probe.format.attributes import Attributes, attributes_of
from probe.format.schema import near
from probe.public import warn_renamed
from probe.reading.attention import Attention
from probe.reading.choice import Indices
from probe.reading.edited import additions, edit_sentences, edits_in_short
from probe.reading.files import read_file, refuse
from probe.reading.finding import find_run
from probe.reading.latents import Latents
from probe.reading.lazy import open_tree
from probe.reading.listing import picture_and_sampling, root_attributes, status_of
from probe.reading.sample import name_of
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import expand_home
from probe.settings.noising import Noising, load_noising
from probe.text import encodable, printable
from probe.writing.digests import flags_are_lost
from probe.writing.files import check_output_folder, storing

if TYPE_CHECKING:
    from probe.figures.notebook import Player
    from probe.proof.verdict import Verification
    from probe.reading.compare import Comparison
    from probe.reading.memory import Memory
    from probe.reading.pair import Pair

MAX_PICTURE = 32 * 2**20


@dataclass(frozen=True)
class Run(Attention, Latents):
    """A recording, opened. Nothing is read until it is asked for.

    A property names what a recording holds: `run.latents`, `run.words`, `run.status`. A method
    computes (`run.denoised()`, `run.verify()`), takes a choice (`run.prediction("cond")`), or reads
    what only some recordings have (`run.attention()`, `run.counterfactual()`). None of them changes
    anything.

    Raises RecordingNotFound, RecordingDamaged, or RecordingUnreadable if the system does not read
    it.
    """

    path: Path
    memory: Memory | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ExperimentError(
                f"path is {in_words(self.path)}, which is no path.", "Give the path of a recording."
            )
        object.__setattr__(self, "path", Path(self.path))
        _ = self.attributes

    @functools.cached_property
    def attributes(self) -> Attributes:
        """Return the recording's attributes, typed: `run.attributes.model.dtype`.

        By key they are as in the file: `run.attributes["model"]["dtype"]`.
        """
        return attributes_of(self._root())

    @functools.cached_property
    def tree(self) -> xr.DataTree:
        """Return the whole recording as a lazy tree of labelled arrays.

        It is what stock `xarray.open_datatree(path, engine="zarr")` opens. Raises RecordingDamaged.
        """
        return open_tree(self.path) if self.memory is None else self.memory.tree()

    @functools.cached_property
    def experiment(self) -> Experiment:
        """Return the recipe of a generation.

        Raises RecordingNotFound for a noising, whose recipe is `run.noising`.
        """
        if self.kind != "generation":
            raise RecordingNotFound(
                f"{self.name} is a {self.kind}, and has no experiment.", f"Read run.{self.kind}."
            )
        try:
            return load_experiment(self.attributes["experiment"])
        except ExperimentError as error:
            raise refuse(
                self.path, f"its experiment is none of this version ({error.cause})"
            ) from error

    @functools.cached_property
    def noising(self) -> Noising:
        """Return the recipe of a noising.

        Raises RecordingNotFound for a generation, whose recipe is `run.experiment`.
        """
        if self.kind != "noising":
            raise RecordingNotFound(f"{self.name} is no noising.", "Read run.experiment.")
        try:
            return load_noising(self.attributes["noising"])
        except ExperimentError as error:
            raise refuse(
                self.path, f"its noising is none of this version ({error.cause})"
            ) from error

    @property
    def recipe(self) -> Experiment | Noising:
        """Return the recipe: `experiment` of a generation, `noising` of a noising."""
        return self.noising if self.kind == "noising" else self.experiment

    @property
    def kind(self) -> str:
        """Return what was done: "generation" or "noising"."""
        return self.attributes.kind

    @property
    def name(self) -> str:
        """Return the name: that of the folder, without .zarr; "sample" for the sample."""
        return encodable(name_of(self.path))

    @property
    def status(self) -> str:
        """Return "complete", "interrupted", "failed" or "running".

        A run whose writer died is interrupted.
        """
        return status_of(self._root())

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """Return the indices of the committed steps.

        Raises RecordingDamaged if the file that says which are committed is missing.
        """
        if self.memory is None and flags_are_lost(self.path, self.attributes):
            raise refuse(self.path, "committed/c.0, which says what is committed, is missing")
        return np.flatnonzero(self.variable("committed").values)

    def _root(self) -> dict[str, Any]:
        return root_attributes(self.path) if self.memory is None else self.memory.attributes

    def save(self, path: str | Path) -> Run:
        """Write a recording that is in memory into files, and return the new one.

        The files are those that recording onto the disk would have written. `path` has to end in
        .zarr. Raises ExperimentError, RecordingBusy if something is there already, StoreError.
        """
        from probe.figures.noising_sheet import save_sheet
        from probe.figures.sheets import save
        from probe.stopping import cleanly

        if not isinstance(path, str | os.PathLike) or Path(path).suffix != ".zarr":
            raise ExperimentError(
                f"path is {in_words(path)}, which is no name of a recording.",
                'Let it end in .zarr: run.save("runs/mine.zarr").',
            )
        if self.memory is None:
            raise ExperimentError(
                f"{self.name} is in files already: {self.path}", "Copy that folder."
            )
        target, noising = expand_home(str(path)), self.kind == "noising"
        with cleanly(), storing(target):
            check_output_folder(target.parent)
            self.memory.save(
                target,
                self.recipe.durability,
                lambda new: save_sheet(Run(new)) if noising else save(Run(new)),
            )
        return Run(target)

    def variable(self, path: str) -> xr.DataArray:
        """Return one variable or coordinate, lazily: "latents/latents", "attention/16x16/cross".

        Raises RecordingNotFound.
        """
        group, _, name = text("path", path).rpartition("/")
        try:
            return self.tree[group or "/"].dataset[name]
        except (KeyError, NotFoundInTreeError) as error:
            variables = [
                f"{node.path}/{n}".strip("/")
                for node in self.tree.subtree
                for n in node.dataset.data_vars
            ]
            raise RecordingNotFound(
                f"{self.name} has no variable {in_words(path)[1:-1]}.", near(path, variables)
            ) from error

    # --- pictures ---

    @property
    def images(self) -> xr.DataArray:
        """Return the finished pictures.

        *Shape:* (image, y, x, rgb) uint8. A noising has its round trip through the VAE, (draw, y,
        x, rgb).
        """
        return self.variable("images/final")

    @property
    def source(self) -> xr.DataArray | None:
        """Return the picture that the run began from, or None if it began from noise.

        *Shape:* (y, x, rgb) uint8.
        """
        return self.variable("source/picture") if "source" in self.tree.children else None

    # --- inside ---

    def said(self, *place: str) -> Any:
        """Return an attribute by its names from the outside in.

        Renamed: `run.attributes.model.dtype`.
        """
        warn_renamed(
            "Run.said()",
            'run.attributes.model.dtype, or run.attributes["model"]["dtype"]',
            since="0.1",
        )
        found: Any = self.attributes
        for name in place:
            there = found if isinstance(found, Mapping) else {}
            if text("an attribute's name", name) not in there:
                missing = f"{self.name} has no attribute {in_words('.'.join(map(str, place)))}."
                raise RecordingNotFound(missing, near(name, list(there) or [*self.attributes]))
            found = there[name]
        return found

    # --- is it what it says, and what is another ---

    def verify(self, model: Any = False, steps: Indices | str | None = None) -> Verification:
        """Check the recording against itself, as `probe verify` does.

        With `model`, ask the model again as well: True loads the recording's own, or give a
        diffusers pipeline. `steps` says at which model calls: indices, or text as in capture.steps
        (None: all). Print the result, or ask for its `verdict` and what `failed`. Raises
        ExperimentError, ModelError, RecordingUnreadable.
        """
        from probe.proof.verdict import verify

        return verify(self, model, steps)

    def diff(self, other: Run) -> Comparison:
        """Compare with another recording, bit for bit, as `probe diff` does.

        Recipes, conditions and values are compared. Print the result, or ask whether it is the
        `same`. Raises ExperimentError if `other` is no recording.
        """
        from probe.reading.compare import compare

        if not isinstance(other, Run):
            raise ExperimentError(
                f"other is {in_words(other)}, which is no recording.",
                "Open it first: probe.open_run(path).",
            )
        return compare(self, other)

    def against_parent(self, parent: Run | None = None) -> Pair:
        """Compare an edited run with its parent, as `probe diff --pair` does.

        The parent is the run of the same experiment without edits, found in the folder of this
        one; or give the run to compare with. Print the result: what was asked differently, where
        the two part, and by how much pictures, words, heads and modules changed. Raises
        RecordingNotFound without a parent, ExperimentError if `parent` is no recording.
        """
        from probe.reading.pair import compare_pair

        if not isinstance(parent, Run | None):
            raise ExperimentError(
                f"parent is {in_words(parent)}, which is no recording.",
                "Open it first: probe.open_run(path).",
            )
        return compare_pair(self, parent)

    def player(self, *others: Run, height: int = 900) -> Player:
        """Return a player of this recording, and of up to three others beside it, for a notebook.

        It is the page of `probe export --html`, `height` pixels high. It fetches nothing, and the
        notebook keeps it whole: some 0.4 MB for a run of 20 steps. Raises ExperimentError for what
        is no recording, RecordingDamaged, RecordingUnreadable.
        """
        from probe.figures.notebook import Player

        return Player([self, *others], height)

    def summary(self) -> dict[str, str]:
        """Return the run in a few labelled words."""
        attributes = self.attributes
        model, (picture, sampling) = attributes.model, picture_and_sampling(attributes)
        lines = {
            "prompt": attributes.texts["cond"],
            "negative prompt": attributes.texts["uncond"],
            "model": f"{model.name} ({model.dtype}, {attributes.environment.device})"
            + ", on pixels: without a VAE" * model.on_pixels,
            "picture": picture,
            "sampling": sampling,
            "with": additions(attributes.recipe),
            "edited": edits_in_short(dict(attributes)),
            "edits": "; ".join(edit_sentences(attributes.recipe)),
            "status": f"{self.status}, {len(self.steps)} of {self.variable('committed').size} "
            "model calls",
            "not finite": ", ".join(
                f"{count} values of {name}, shown as 0"
                for name, count in attributes.decoded_not_finite.items()
            ),
            "attention": ", ".join(self.grids) or "none",
            "created": attributes.created,
        }
        return {name: text for name, text in lines.items() if text}

    def __repr__(self) -> str:
        lines = [
            f"  {name:16}{printable(' '.join(text.split()))}"
            for name, text in self.summary().items()
        ]
        return "\n".join([f"<Run {printable(self.name)}>", *lines])

    def _picture(self, found: os.stat_result) -> None:
        if found.st_size > MAX_PICTURE:
            raise refuse(self.path, "its contact sheet is too large")

    def _repr_html_(self) -> str:
        import base64

        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{html.escape(text)}</td></tr>"
            for name, text in self.summary().items()
        )
        picture = ""
        with contextlib.suppress(OSError, RecordingDamaged):  # a picture less, in a notebook
            sheet = read_file(self.path, "contact-sheet.png", self._picture)
            if sheet.startswith(b"\x89PNG\r\n"):
                code = base64.b64encode(sheet).decode()
                picture = (
                    "<img alt='contact sheet' style='max-width:100%' "
                    f"src='data:image/png;base64,{code}'>"
                )
        return f"<b>{html.escape(self.name)}</b><table>{rows}</table>{picture}"


def with_files(run: Run) -> Run:
    """Return a recording that is in files.

    Raises ExperimentError for one that is in memory alone.
    """
    if run.memory is not None:
        cause = f"{run.name} is in memory alone, and this needs its files."
        raise ExperimentError(cause, 'Save it first: run.save("runs/mine.zarr").')
    return run


def open_run(name: str | Path = "latest", runs: str | Path = "runs") -> Run:
    """Open a recording: a path, the beginning of its name in the folder `runs`, or "latest"."""
    return Run(find_run(name, runs))
