"""What a study's files hold: study.json, and what each finished cell says of itself.

    runs/NAME-HASH.study/study.json     a `StudyFile`: axes, cells, the address of each
    runs/.cells/ADDRESS.json            a `CellRecord`: how it ended, and what was measured
    runs/.cells/ADDRESS.png             its pictures side by side, where its recording is not kept
    runs/SLUG-ADDRESS.zarr              its recording, as any other

The types are strict, and unknown keys are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, StringConstraints

from probe.format.attributes import Part, Text

STUDY, ENDING, CELLS = "study.json", ".study", ".cells"
MOST_CELLS, MOST_AXES = 100_000, 16

Address: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
# A name in the folder of the study: of no other folder, and hidden in none.
RunName: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[^/\\\x00.][^/\\\x00]*\.zarr$", max_length=255)
]
Name: TypeAlias = Annotated[Text, StringConstraints(min_length=1, max_length=200)]
Number: TypeAlias = float | Literal["inf", "-inf"] | None
Measure: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*(:[A-Za-z_][A-Za-z0-9_]*)?$")
]


class AxisFile(Part):
    """An axis of a study, and the axes that move together with it."""

    name: Name = Field(description="the field that varies, dotted where it lies inside another")
    labels: Annotated[list[Text], Field(min_length=1, max_length=MOST_CELLS)] = Field(
        description="what its values are called, each another text"
    )
    values: Annotated[list[Any], Field(max_length=MOST_CELLS)] = Field(
        description="its values, one for each label"
    )
    zipped: Annotated[list[AxisFile], Field(max_length=MOST_AXES)] = Field(
        [], description="axes of the same length that move with it"
    )


class CellFile(Part):
    """A cell of a study: one experiment, and where it lies on the axes."""

    index: Annotated[list[int], Field(max_length=MOST_AXES)] | None = Field(
        None, description="its place on each axis; none of a parent that the grid lacks"
    )
    address: Address = Field(description="hash of all that decides its bits")
    parent: Address | None = Field(None, description="address of the same run without edits")
    run: RunName | None = Field(None, description="name of its recording, if it is kept")
    experiment: dict[str, Any] = Field(description="the experiment, resolved")


class StudyFile(Part):
    """study.json: what a study is made of."""

    format: Literal[1] = Field(description="version of this layout")
    name: Name = Field(description="name of the grid")
    grid: dict[str, Any] = Field({}, description="the grid, as its file might be")
    axes: Annotated[list[AxisFile], Field(max_length=MOST_AXES)] = Field(
        description="the dimensions, in their order"
    )
    cells: Annotated[list[CellFile], Field(max_length=MOST_CELLS)] = Field(
        description="every cell of the grid"
    )
    parents: Annotated[list[CellFile], Field(max_length=MOST_CELLS)] = Field(
        [], description="runs without edits that are in no cell"
    )
    created: Text = Field("", description="when it was planned: ISO 8601, UTC")


class Failure(Part):
    """Why a measure failed."""

    cause: Text


Values: TypeAlias = (
    Number
    | Failure
    | Annotated[list[Number], Field(max_length=10_000)]
    | Annotated[dict[Text, Number], Field(max_length=10_000)]
)


class CellRecord(Part):
    """What a finished cell says of itself."""

    address: Address = Field(description="its own address")
    status: Literal["complete", "failed"] = Field(description="how it ended")
    cause: Text | None = Field(None, description="why it failed")
    remedy: Text | None = Field(None, description="what helps")
    run: RunName | None = Field(None, description="name of its recording, if it is kept")
    seconds: float | None = Field(None, description="how long it took")
    measures: Annotated[dict[Measure, Values], Field(max_length=100)] = Field(
        {}, description="what was measured, by name"
    )
    keep: Text | None = Field(None, description="what it was asked to leave behind")
