"""An edited run beside its parent: where they part, and by how much pictures, words and layers do.

    pair = compare_pair(run)              # with the parent that lies in the folder of the run
    pair.steps["latents"]                 # (step): how far the latents are apart
    pair.words["change"]                  # (word): how much of each word's map moved
    print(pair)

The parent of a run is the run of the same experiment without its edits. Two runs are compared at
the noise levels of the first. Nothing here needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probe.errors import ProbeError, RecordingNotFound
from probe.output import rows
from probe.reading.apart import (
    PARTED,
    first_difference,
    heads_apart,
    modules_apart,
    parts_at,
    pictures_apart,
    steps_apart,
    words_apart,
)
from probe.reading.compare import (
    comparable_weights,
    differing_conditions,
    differing_settings,
)
from probe.reading.listing import Listed, listing
from probe.reading.recording import Run
from probe.text import shorten

MOST_ROWS = 12  # of one table of the text


@dataclass(frozen=True)
class Pair:
    """An edited run and its parent, compared.

    `asked` names the settings that differ, the edits first. `conditions` are those of
    `probe.diff`.

    `steps` is (step): root mean square differences of `latents`, of the predicted clean ones
    (`denoised`), and of the model's output (`prediction`, and by branch), with the label `sigma`.

    `pictures` is (image): `l2` of the final latents, `psnr` in dB and `ssim` of the pictures.

    `words` is (word): `change`, the share of a word's mean map that moved, and its `mass` before
    (`parent_mass`) and after. `heads` is (head_at): how much each head shares its attention out
    otherwise, from 0 to 1. `modules` is (module): how much the spread of a module's output changed,
    relative to the parent's. A part that was not recorded is None, and `left_out` says why.
    """

    run: str
    parent: str
    asked: list[str]
    conditions: list[str]
    steps: xr.Dataset
    differs_at: int | None
    parts_at: int | None
    pictures: xr.Dataset
    words: xr.Dataset | None
    heads: xr.DataArray | None
    modules: xr.DataArray | None
    left_out: list[str]

    @property
    def same(self) -> bool:
        """Tell whether latents and pictures are the same at every step."""
        return self.differs_at is None and not float(self.pictures["l2"].fillna(0).max())

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the comparison for people."""
        lines = [f"{self.run}  and its parent  {self.parent}"]
        for title, parts in (("asked", self.asked), ("conditions", self.conditions)):
            lines += [
                f"  {title:11} {'the same' if not parts else parts[0]}",
                *(f"              {part}" for part in parts[1:]),
            ]
        lines.append(f"  they part   {self._parting()}")
        for image, values in enumerate(_rows_of(self.pictures)):
            of = f"image {image}" if self.pictures.sizes["image"] > 1 else "the picture"
            psnr = "the same" if values["psnr"] == math.inf else f"{values['psnr']:.1f} dB"
            lines.append(
                f"  {of:11} PSNR {psnr}, SSIM {values['ssim']:.3f}, final latents "
                f"{values['l2']:.3g} apart (l2)"
            )
        for table in self._tables():
            lines += ["", *table]
        return lines + ["", *self.left_out] * bool(self.left_out)

    def _parting(self) -> str:
        if self.differs_at is None:
            return "never: the latents of every step are the same"
        sigmas = self.steps["sigma"]
        text = f"differ from step {self.differs_at} (sigma {float(sigmas[self._row()]):.3g}) on"
        if self.parts_at is not None:
            sigma = float(sigmas.sel(step=self.parts_at))
            half = f"{PARTED:.0%} of the greatest distance"
            text += f"; {half} is passed at step {self.parts_at} (sigma {sigma:.3g})"
        return text

    def _row(self) -> int:
        return int(np.flatnonzero(self.steps["step"].values == self.differs_at)[0])

    def _tables(self) -> Iterator[list[str]]:
        names = [str(name) for name in self.steps.data_vars]
        found = _rows_of(self.steps)
        yield rows(
            [
                (str(step), f"{float(sigma):.3g}", *(f"{values[name]:.3g}" for name in names))
                for step, sigma, values in zip(
                    self.steps["step"].values, self.steps["sigma"].values, found, strict=True
                )
            ],
            ("step", "sigma", *names),
        )
        if self.words is not None and self.words.sizes["word"]:
            words = [
                (
                    shorten(str(word), 40),
                    f"{values['change']:.2%}",
                    f"{values['parent_mass']:.2%}",
                    f"{values['mass']:.2%}",
                )
                for word, values in zip(
                    self.words["word"].values, _rows_of(self.words), strict=True
                )
            ]
            yield rows(words, ("word", "of its map moved", "its share before", "and after"))
        for array, name in ((self.heads, "head"), (self.modules, "module")):
            if array is not None and array.size:
                greatest = np.argsort(-array.fillna(-1).values, kind="stable")[:MOST_ROWS]
                table = [
                    (str(array[array.dims[0]].values[at]), f"{float(array[at]):.3g}")
                    for at in greatest
                ]
                more = array.size - len(table)
                title = f"{name} (the {len(table)} that changed most)" if more else name
                yield rows(table, (title, "change"))

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON. A number that is not finite is null."""
        parts = {"words": self.words, "heads": self.heads, "modules": self.modules}
        found: dict[str, Any] = {
            "run": self.run,
            "parent": self.parent,
            "same": self.same,
            "asked": self.asked,
            "conditions": self.conditions,
            "differs_at": self.differs_at,
            "parts_at": self.parts_at,
            "steps": _columns(self.steps),
            "pictures": _columns(self.pictures),
        }
        for name, part in parts.items():
            dataset = part.to_dataset(name="change") if isinstance(part, xr.DataArray) else part
            found[name] = None if dataset is None else _columns(dataset)
        return {**found, "left_out": self.left_out}


def find_parent(run: Run) -> Run:
    """Return the parent of an edited run: it lies in the same folder.

    Raise RecordingNotFound if the run is not edited, or its parent is not there.
    """
    said = dict(run.attributes)
    identity = said.get("parent_identity")
    if not isinstance(identity, str):
        raise RecordingNotFound(
            f"{run.name} has no parent: it was recorded without edits.",
            "Name the run to compare it with as well.",
        )

    def fits(row: Listed) -> bool:
        there = row.attributes or {}
        return (
            there.get("identity") == identity
            and there.get("status") == "complete"
            and (
                there["model"].get("weights") == said["model"].get("weights")
                or not comparable_weights(there, said)
            )
        )

    rows_there = [row for row in listing(run.path.parent) if fits(row)]
    named = [row for row in rows_there if row.path.stem == said.get("parent_run")]
    if not rows_there:
        raise RecordingNotFound(
            f"The parent of {run.name} is not in its folder: no complete run there has the "
            f"identity {shorten(identity, 40)}.",
            "Record it there: probe run EXPERIMENT.yaml --unedited. Or name another run.",
        )
    return Run((named or rows_there)[0].path)


def compare_pair(run: Run, parent: Run | None = None) -> Pair:
    """Compare an edited run with its parent, or with the run that is given in its place.

    Raise RecordingNotFound without a parent, ExperimentError for latents of two sizes.
    """
    parent = find_parent(run) if parent is None else parent
    steps = steps_apart(run, parent)
    found: dict[str, Any] = {}
    left_out: list[str] = []
    parts = {"words": words_apart, "heads": heads_apart, "modules": modules_apart}
    for name, measured in parts.items():
        try:
            found[name] = measured(run, parent)
        except ProbeError as error:
            found[name] = None
            left_out.append(f"The {name} are not compared: {error.cause}")
    return Pair(
        run.name,
        parent.name,
        differing_settings(run, parent),
        differing_conditions(run.attributes, parent.attributes),
        steps,
        first_difference(run, parent),
        parts_at(steps["latents"]),
        pictures_apart(run, parent),
        **found,
        left_out=left_out,
    )


# --- as rows --------------------------------------------------------------------------------------


def _rows_of(dataset: xr.Dataset) -> list[dict[str, float]]:
    """Return a dataset of one dimension as rows of numbers."""
    columns = {str(name): array.values.tolist() for name, array in dataset.data_vars.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(dataset: xr.Dataset) -> dict[str, list[Any]]:
    """Return a dataset of one dimension as columns of plain JSON."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {
        str(name): [plain(value) for value in array.values.tolist()]
        for name, array in {**dataset.coords, **dataset.data_vars}.items()
    }
