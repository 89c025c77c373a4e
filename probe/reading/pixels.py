"""Read what is known of pixel space against latent space: counted, measured, trained, published.

    counts().of("sd14", "denoiser", f=8, size=512).total         # FLOPs of one call
    counts().factors("sd14", f=8, size=512)                      # what pixels would cost instead
    measured().cells, measured().laws                            # on one machine, and fitted to it
    paper().rows                                                 # Rombach et al. 2022
    trained()                                                    # None before anything is trained

The tables were made once, by `python -m probe.cost`, and come with the package. No torch is needed.
A size is (height, width) in pixels; one number stands for a square. `f` is the VAE's factor: pixels
per latent along one side. At f = 1 the same network works on pixels, and has no VAE.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict

from probe.errors import RecordingNotFound, UserError

if TYPE_CHECKING:
    from probe.reading.recording import Run

FOLDER = Path(__file__).parent.parent / "pixels"
Attention: TypeAlias = Literal["full", "coarse"]
Component: TypeAlias = Literal[
    "text_encoder", "text_encoder_2", "denoiser", "vae_encode", "vae_decode"
]
Kind: TypeAlias = Literal["convolution", "linear", "self_attention", "cross_attention"]
Source: TypeAlias = Literal["paper", "counted", "measured here", "extrapolated"]
KINDS: tuple[Kind, ...] = ("convolution", "linear", "self_attention", "cross_attention")
Size: TypeAlias = int | tuple[int, int]

WHY_THEY_DIFFER = (
    "The same network attends on its widest grids, where attention grows with the square of the "
    "places; a network for pixels can attend on coarse grids alone, convolution grows with the "
    "places themselves, and the paper timed other networks at f = 4, decoder and everything else "
    "that takes time included."
)


class Data(BaseModel):
    """What one of the tables holds: no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Count(Data):
    """One call of one component with one row: no guidance, one image.

    With more rows all but `parameters` grow in proportion. `flops` counts a multiply-add as 2.
    `shape` is (channel, y, x) of the latents, of the pixels at f = 1, and None for text. Bytes
    are those of `Counts.bytes_per_number`. `activation_bytes` adds the outputs of all layers.
    `attention_bytes` adds all attention matrices, heads x queries x keys. A fused kernel never
    holds them whole. `widest` is the widest grid with self-attention, (y, x).
    """

    model: str
    component: Component
    f: int | None = None
    size: tuple[int, int] | None = None
    attention: Attention = "full"
    shape: tuple[int, int, int] | None = None
    parameters: int
    flops: dict[Kind, int]
    activation_bytes: int
    attention_bytes: int
    largest_attention_bytes: int
    widest: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Return the FLOPs of the call."""
        return sum(self.flops.values())

    @property
    def shares(self) -> dict[Kind, float]:
        """Return what part of the FLOPs each kind of layer has."""
        return {kind: self.flops[kind] / self.total for kind in KINDS}


class WholeRun(NamedTuple):
    """FLOPs of drawing a batch of pictures, by part."""

    text: int
    steps: int
    decode: int

    @property
    def total(self) -> int:
        return sum(self)


class Factors(NamedTuple):
    """How many times the FLOPs of a call at f a call on pixels has.

    `full` is the same network. `coarse` is one that attends on coarse grids alone, on pixels and
    on latents. `convolution` counts that kind alone. `paper` is the least and the most that the
    paper measured, at f = 4, of time.
    """

    full: float
    coarse: float
    convolution: float
    paper: tuple[float, float]


class Counts(Data):
    """What calls cost by count; `attention_up_to` is the widest side that coarse attention has.

    `own_f` is the factor of each model's own VAE. Those of other factors are derived from it.
    """

    made_by: str
    torch: str
    diffusers: str
    bytes_per_number: int
    attention_up_to: int
    tokens: dict[str, int]
    own_f: dict[str, int]
    rows: tuple[Count, ...]

    @property
    def models(self) -> list[str]:
        return list(self.own_f)

    def sizes(self, model: str) -> list[tuple[int, int]]:
        """Return the sizes in pixels that were counted of a model, the smallest first."""
        own = {row.size for row in self.rows if row.model == model and row.size is not None}
        return sorted(own, key=lambda size: (size[0] * size[1], size))

    def factors_of(self, model: str) -> list[int]:
        """Return the f that were counted of a model."""
        return sorted({row.f for row in self.rows if row.model == model and row.f is not None})

    def of(
        self,
        model: str,
        component: Component,
        f: int | None = None,
        size: Size | None = None,
        attention: Attention = "full",
    ) -> Count:
        """Return one count. Raise RecordingNotFound if it was not made.

        Where no grid is too wide for coarse attention, it is the full one.
        """
        wanted = _pair(size)
        for kind in (attention, "full"):
            for row in self.rows:
                same = row.model == model and row.component == component and row.attention == kind
                if same and (row.f, row.size) in ((f, wanted), (None, None)):
                    return row
        where = "" if wanted is None else f", f = {f}, {wanted[0]} x {wanted[1]}"
        raise RecordingNotFound(
            f"There is no count of {model}, {component}{where}.",
            "Count it: python -m probe.cost experiments/cost-sd14.yaml, with other values.",
        )

    def has(self, model: str, f: int, size: Size) -> bool:
        """Tell whether a model was counted at this f and size."""
        wanted = _pair(size)
        return any((row.model, row.f, row.size) == (model, f, wanted) for row in self.rows)

    def whole_run(
        self,
        model: str,
        f: int,
        size: Size,
        *,
        steps: int = 50,
        guided: bool = True,
        batch: int = 1,
        attention: Attention = "full",
    ) -> WholeRun:
        """Return the FLOPs of a whole run: text once, the denoiser at each step, decoding once."""
        branches = 2 if guided else 1
        text = sum(
            row.total
            for row in self.rows
            if row.model == model and row.component in ("text_encoder", "text_encoder_2")
        )
        step = self.of(model, "denoiser", f, size, attention).total
        decode = 0 if f == 1 else self.of(model, "vae_decode", f, size).total
        return WholeRun(text * branches, step * steps * branches * batch, decode * batch)

    def factors(self, model: str, f: int, size: Size) -> Factors:
        """Return what a call on pixels costs beside a call at `f`."""
        here = self.of(model, "denoiser", f, size)
        pixels = self.of(model, "denoiser", 1, size)
        coarse = [self.of(model, "denoiser", space, size, "coarse").total for space in (1, f)]
        return Factors(
            pixels.total / here.total,
            coarse[0] / coarse[1],
            pixels.flops["convolution"] / here.flops["convolution"],
            paper().speed_up,
        )


class Machine(Data):
    """What the measurements ran on. `clock` says which time was taken.

    `load` is how many processes wanted a processor when they began: other work lengthens processor
    time a little, as it takes caches and memory. It is 0 if unknown.
    """

    device: str
    threads: int
    torch: str
    diffusers: str
    dtype: str
    clock: Literal["processor time", "device events"]
    load: float = 0.0


class Cell(Data):
    """One measured call of a denoiser with random weights, in a process of its own.

    `seconds` is the median of `rounds`; `low` and `high` are the quartiles. `peak_bytes` is the
    most that the process held, `call_bytes` what the call added to it. Both are 0 if unknown.
    """

    model: str
    f: int
    size: tuple[int, int]
    attention: Attention
    shape: tuple[int, int, int]
    flops: int
    rounds: int
    seconds: float
    low: float
    high: float
    peak_bytes: int
    call_bytes: int

    @property
    def places(self) -> int:
        """Return how many places the grid has on which the network begins."""
        return self.shape[1] * self.shape[2]


class Law(Data):
    """a + b N + c N^2 in the number of places N, fitted to the measured cells of a network.

    Beyond `most` places, and below `least`, it is an extrapolation.
    """

    model: str
    attention: Attention
    quantity: Literal["seconds", "call_bytes"]
    coefficients: tuple[float, float, float]
    least: int
    most: int
    worst: float

    def at(self, places: float) -> float:
        """Return what the law gives for a number of places."""
        a, b, c = self.coefficients
        return a + b * places + c * places**2

    def source(self, places: float) -> Source:
        """Return the label of what the law gives: it was measured nearby, or is extrapolated."""
        return "measured here" if self.least <= places <= self.most else "extrapolated"


class LeftOut(Data):
    """A call that was not measured, and why."""

    model: str
    f: int
    size: tuple[int, int]
    attention: Attention
    places: int
    why: str


class Measured(Data):
    """Time and memory of calls on one machine, and the laws fitted to them."""

    made_by: str
    machine: Machine
    cells: tuple[Cell, ...]
    laws: tuple[Law, ...]
    left_out: tuple[LeftOut, ...] = ()

    def cell(self, model: str, f: int, size: Size, attention: Attention = "full") -> Cell | None:
        """Return a measured call, or None if it was not measured.

        Where no grid is too wide for coarse attention, it is the full one.
        """
        for kind in (attention, "full"):
            for cell in self.cells:
                if (cell.model, cell.f, cell.size, cell.attention) == (model, f, _pair(size), kind):
                    return cell
        return None

    def factor(
        self, model: str, f: int, size: Size, attention: Attention = "full"
    ) -> tuple[float, Source] | None:
        """Return how many times as long a call on pixels takes as one at f, and its label.

        A full call on pixels that was not measured is extrapolated. None if neither is known.
        """
        here, pixels = self.cell(model, f, size), self.cell(model, 1, size, attention)
        if here is None:
            return None
        if pixels is not None:
            return pixels.seconds / here.seconds, "measured here"
        law, sides = self.law(model, attention=attention), _pair(size)
        if law is None or sides is None:
            return None
        places = sides[0] * sides[1]
        return law.at(places) / here.seconds, law.source(places)

    def law(
        self, model: str, quantity: str = "seconds", attention: Attention = "full"
    ) -> Law | None:
        """Return the law of a network, or None if too few of its cells were measured."""
        wanted = (model, quantity, attention)
        return next((x for x in self.laws if (x.model, x.quantity, x.attention) == wanted), None)


class PaperRow(Data):
    """One published comparison; `times` says by what factor latents are better."""

    name: str
    what: str
    unit: str
    where: str
    f: int
    size: int | None
    pixels: float | None
    latents: float | None
    times: float | None
    gap: float | None
    better: Literal["higher", "lower"]
    of_time: bool


class Paper(Data):
    """What Rombach et al. 2022 published of pixels against latents."""

    source: str
    note: str
    pixel_model: str
    latent_model: str
    rows: tuple[PaperRow, ...]

    @property
    def speed_up(self) -> tuple[float, float]:
        """Return the least and the most by which latents were faster."""
        times = [row.times for row in self.rows if row.of_time and row.times is not None]
        return min(times), max(times)


def counts() -> Counts:
    """Return what calls of SD 1.x, SD 2.1, SDXL and the bundled model cost by count."""
    return _counts()


def measured() -> Measured:
    """Return what calls took on one machine."""
    return _measured()


def paper() -> Paper:
    """Return the comparison that was published."""
    return _paper()


def trained() -> Mapping[str, Any] | None:
    """Return what the demonstration trained, or None if nothing was."""
    path = FOLDER / "trained.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


@functools.cache
def _counts() -> Counts:
    return Counts.model_validate_json((FOLDER / "counts.json").read_bytes())


@functools.cache
def _measured() -> Measured:
    return Measured.model_validate_json((FOLDER / "measured.json").read_bytes())


@functools.cache
def _paper() -> Paper:
    return Paper.model_validate_json((FOLDER / "paper.json").read_bytes())


def shares_of(run: Run) -> dict[str, float]:
    """Return the seconds of a recording's text encoders, its denoiser and one decoding.

    A recording may decode several steps: `decode` is the mean of one. Steps that another process
    computed are given the mean of the others. Raise RecordingNotFound if /cost lacks the times.
    """
    cost = run.tree["cost"].dataset if "cost" in run.tree.children else {}
    if not all(name in cost for name in ("component", "seconds", "unet_seconds")):
        raise RecordingNotFound(
            f"{run.name} does not say how long its parts took.",
            "Name another recording: sample has them.",
        )
    seconds = dict(zip(map(str, cost["component"].values), cost["seconds"].values, strict=True))
    steps = cost["unet_seconds"].values
    if run.status != "complete" or not np.isfinite(steps).any():
        raise UserError(
            f"{run.name} is not complete: its times are not whole.", "Name another recording."
        )
    decoded = run.tree["decoded"].sizes["decoded_step"] if "decoded" in run.tree.children else 0
    text = sum(value for name, value in seconds.items() if name.startswith("text_encoder"))
    parts = {"text": float(text), "steps": float(np.nanmean(steps) * len(steps))}
    if "vae" in seconds:
        parts["decode"] = float(seconds["vae"] / (decoded + 1))
    return parts


def _pair(size: Size | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size
