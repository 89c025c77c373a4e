"""The cells of a study as labelled grids of pictures: rows, columns, and blocks of other labels.

    layout = lay_out(study, rows="guidance_scale", columns="seed")
    sheet(study, layout).save("grid.png")

An axis that is neither row nor column has a block of its own for each of its labels (X/Y/Z), unless
`where` fixes it. A cell without a picture says why it has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from probe.errors import ExperimentError, ProbeError
from probe.figures.drawing import FAINT, GAP, INK, MARGIN, PAPER, fit, font, shorten
from probe.format.schema import near
from probe.reading.study import Cell, Index, Study

CELL = 128  # pixels of a picture's width
MOST_PICTURES = 2500  # of one sheet
EMPTY = (225, 227, 232)
LABEL, TITLE = 14, 18  # sizes of letters
LETTERS = 60  # of a label beside a row


@dataclass(frozen=True)
class Layout:
    """Which axis runs down, which across, and which labels are shown of the others.

    `blocks` are the places on the other axes, by axis number, one block for each. `fixed` are the
    axes of which one label was chosen.
    """

    rows: int | None
    columns: int | None
    blocks: tuple[dict[int, int], ...]
    shape: tuple[int, ...]
    fixed: dict[int, int]

    def place(self, block: Mapping[int, int], row: int, column: int) -> Index:
        """Return the place of a cell on the axes of the study."""
        at = {**block}
        if self.rows is not None:
            at[self.rows] = row
        if self.columns is not None:
            at[self.columns] = column
        return tuple(at[axis] for axis in range(len(self.shape)))

    @property
    def size(self) -> tuple[int, int]:
        """Return how many rows and columns a block has."""
        down, across = (1 if axis is None else self.shape[axis] for axis in self.axes)
        return down, across

    @property
    def axes(self) -> tuple[int | None, int | None]:
        """Return the numbers of the axes of rows and columns; None where there is no such axis."""
        return self.rows, self.columns

    @property
    def pictures(self) -> int:
        """Return how many cells are shown."""
        down, across = self.size
        return down * across * len(self.blocks)


def lay_out(
    study: Study,
    rows: str | None = None,
    columns: str | None = None,
    where: Mapping[str, Any] | None = None,
) -> Layout:
    """Return a layout of a study's cells.

    By default the last axis with several labels runs across, and the one before it down. `where`
    fixes other axes by label or value. Raise ExperimentError for what is no axis or label.
    """
    names = list(study.axes)
    fixed: dict[int, int] = {}
    for name, wanted in (where or {}).items():
        axis, at = study.position(name, wanted)
        fixed[axis] = at
    for wished in (rows, columns):
        if wished is not None and wished not in names:
            raise ExperimentError(f"{study.name} has no axis {wished!r}.", near(wished, names))
    if rows is not None and rows == columns:
        raise ExperimentError(f"{rows} cannot be rows and columns.", "Choose two axes.")
    wide = [axis for axis, length in enumerate(study.shape) if length > 1 and axis not in fixed]
    chosen = {name: names.index(name) for name in (rows, columns) if name is not None}
    if clash := [name for name, axis in chosen.items() if axis in fixed]:
        raise ExperimentError(
            f"{clash[0]} is fixed to one label, and is to be a whole axis.",
            "Leave one of them out.",
        )
    across = chosen.get(columns or "")
    down = chosen.get(rows or "")
    free = [axis for axis in wide if axis not in (across, down)]
    if across is None and free:
        across = free.pop()
    if down is None and free:
        down = free.pop()
    left = [axis for axis in range(len(names)) if axis not in (across, down)]
    choices = [[fixed[axis]] if axis in fixed else range(study.shape[axis]) for axis in left]
    blocks = tuple(dict(zip(left, at, strict=True)) for at in itertools.product(*choices))
    return Layout(down, across, blocks, study.shape, fixed)


def labels_of(study: Study, axis: int | None) -> list[str]:
    """Return the labels of an axis, with those of the axes that move with it; [""] of no axis."""
    if axis is None:
        return [""]
    file = study.file.axes[axis]
    return [
        " · ".join(each) for each in zip(*(a.labels for a in (file, *file.zipped)), strict=True)
    ]


def name_of(study: Study, axis: int | None) -> str:
    """Return the name of an axis, with those that move with it; "" of no axis."""
    if axis is None:
        return ""
    file = study.file.axes[axis]
    return " · ".join(one.name for one in (file, *file.zipped))


def block_title(study: Study, block: Mapping[int, int]) -> str:
    """Return what a block shows of the other axes: seed=0, steps=20."""
    return ", ".join(
        f"{name_of(study, axis)}={labels_of(study, axis)[at]}"
        for axis, at in block.items()
        if study.shape[axis] > 1
    )


def thumbnail(study: Study, cell: Cell, width: int = CELL) -> Image.Image | str:
    """Return a cell's picture at a width in pixels, or in words why it has none."""
    try:
        picture = study.picture(cell)
    except ProbeError:
        return "unreadable"
    if picture is not None:
        return fit(Image.fromarray(picture), width)
    return cell.status if cell.status != "complete" else "not kept"


def sheet(study: Study, layout: Layout, width: int = CELL) -> Image.Image:
    """Return all pictures of a layout on one sheet, with labels.

    Raise ExperimentError for too many pictures.
    """
    if layout.pictures > MOST_PICTURES:
        raise ExperimentError(
            f"{layout.pictures} pictures are too many for one sheet; {MOST_PICTURES} is the most.",
            "Show fewer: --where AXIS=LABEL, or write a page: --html FILE.",
        )
    down, across = layout.size
    pictures = {
        index: thumbnail(study, study.cells[index], width) if index in study.cells else "missing"
        for _, _, _, index in _places(layout)
    }
    height = max(
        (one.height for one in pictures.values() if isinstance(one, Image.Image)), default=width
    )
    unedited = _unedited(study, layout, width)
    rows, columns = (labels_of(study, axis) for axis in layout.axes)
    rows, columns = ([shorten(label, LETTERS) for label in labels] for labels in (rows, columns))
    letters = font(LABEL)
    left = MARGIN + max(
        int(letters.getlength(label)) for label in [*rows, name_of(study, layout.rows)]
    )
    left += GAP * any(rows)
    first = left  # of the column that shows the unedited runs
    left += (width + GAP + MARGIN) * bool(unedited)
    block_height = TITLE + 3 * GAP + 2 * LABEL + down * (height + GAP)
    right = left + across * (width + GAP) + MARGIN
    page = Image.new("RGB", (right, MARGIN * 3 + block_height * len(layout.blocks)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN // 2), shorten(study.name, LETTERS), INK, font(TITLE))
    for number, block in enumerate(layout.blocks):
        top = MARGIN * 2 + number * block_height
        _block(draw, study, layout, block, (left, top), (width, height), rows, columns)
        begin = top + TITLE + 3 * GAP + 2 * LABEL
        if unedited:
            draw.text((first, begin - LABEL - 3 * GAP // 2), "unedited", INK, letters)
        for row, column in itertools.product(range(down), range(-bool(unedited), across)):
            at = (
                (first if column < 0 else left + column * (width + GAP)),
                begin + row * (height + GAP),
            )
            picture = (
                unedited.get((number, row), "several")
                if column < 0
                else pictures[layout.place(block, row, column)]
            )
            if isinstance(picture, Image.Image):
                page.paste(picture, at)
            else:
                draw.rectangle((*at, at[0] + width, at[1] + height), EMPTY)
                draw.text((at[0] + 8, at[1] + 8), picture, FAINT, letters)
    return page


def _unedited(study: Study, layout: Layout, width: int) -> dict[tuple[int, int], Any]:
    """Return by block and row the unedited run that all cells of the row are compared with.

    Only runs that are in no cell are shown: the others have a place of their own.
    """
    found: dict[tuple[int, int], Any] = {}
    down, across = layout.size
    for number, block in enumerate(layout.blocks):
        for row in range(down):
            places = [layout.place(block, row, column) for column in range(across)]
            parents = [study.parent_outside(index) for index in places if index in study.planned]
            addresses = {None if one is None else one.planned.address for one in parents}
            if len(addresses) == 1 and (parent := parents[0]) is not None:
                found[number, row] = thumbnail(study, parent, width)
    return found


def _block(
    draw: ImageDraw.ImageDraw,
    study: Study,
    layout: Layout,
    block: Mapping[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    rows: list[str],
    columns: list[str],
) -> None:
    """Draw the letters of a block: its title, its axes and their labels."""
    (left, top), (width, height), letters = corner, size, font(LABEL)
    title = shorten(block_title(study, block), 3 * LETTERS)
    draw.text((MARGIN, top), title, INK, font(TITLE))
    head = top + TITLE + GAP
    draw.text((left, head), shorten(name_of(study, layout.columns), LETTERS), FAINT, letters)
    draw.text(
        (MARGIN, head + LABEL + GAP // 2), shorten(name_of(study, layout.rows), 40), FAINT, letters
    )
    fits = max(3, width // 8)
    for column, label in enumerate(columns):
        at = left + column * (width + GAP), head + LABEL + GAP // 2
        draw.text(at, shorten(label, fits), INK, letters)
    for row, label in enumerate(rows):
        middle = head + 2 * GAP + 2 * LABEL + row * (height + GAP) + height // 2 - LABEL
        draw.text((MARGIN, middle), label, INK, letters)


def _places(layout: Layout) -> Iterator[tuple[Mapping[int, int], int, int, Index]]:
    """Yield each shown cell: its block, row, column and place."""
    down, across = layout.size
    for block in layout.blocks:
        for row, column in itertools.product(range(down), range(across)):
            yield block, row, column, layout.place(block, row, column)
