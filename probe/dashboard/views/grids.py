"""Grids: a study's cells as pictures or numbers over two axes, and from there to their runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from PIL import Image, ImageDraw

from probe.dashboard.library import library
from probe.dashboard.views.pick import MOST
from probe.errors import ProbeError
from probe.figures.drawing import font
from probe.figures.grid import CELL, Layout, block_title, labels_of, lay_out, name_of, thumbnail
from probe.figures.grid_page import numbers_of
from probe.figures.grid_plot import heat_map, measures_of
from probe.figures.plots import CONFIG
from probe.format.study import CELLS, STUDY
from probe.reading.sample import called
from probe.reading.study import Cell, Study, open_study, studies_in
from probe.reading.study_dataset import table_of
from probe.text import encodable

PICTURES = "pictures"
SWEEP = "python -m probe.sweep experiments/guidance-grid.yaml"
A_PAGE = 200  # pictures that are sent at once
MANY = 1000  # cells that a list of all names no more
ROW, TALLEST = 116, 640  # pixels of a row of pictures, and of a table


def show() -> None:
    study = _chosen()
    counted = ", ".join(f"{count} {status}" for status, count in study.counts().items())
    st.text(f"{len(study.cells)} cells: {counted}.")
    layout, what = _layout(study)
    if what != PICTURES:
        st.plotly_chart(heat_map(study, layout, what), key="heat", config=CONFIG)
    _table(study, layout, what)
    _picked(study)
    with st.expander("Numbers and code"):
        table = table_of(study)
        st.dataframe(table, key="numbers", hide_index=True)
        st.download_button("Download as CSV", table.to_csv(index=False), "study.csv", key="csv")
        st.code(snippet(study), language=None)


def _chosen() -> Study:
    """Return the study that the reader chose; stop the page, with a word why, if there is none."""
    try:
        paths = {encodable(path.name): path for path in studies_in(library().folder)}
        if not paths:
            st.info("There is no study in this folder yet. This makes one:")
            st.code(SWEEP, language=None)
            st.stop()
        name = _one("Study", list(paths), "study")
        return _opened(paths[name], _state(paths[name]))
    except ProbeError as error:
        st.code(str(error), language=None)
        st.stop()


def _state(path: Path) -> list[int]:
    """Return what changes when a study does, or one of its cells."""
    found = []
    for file in (path / STUDY, path.parent / CELLS):
        try:
            found.append(file.stat().st_mtime_ns)
        except OSError:
            found.append(0)
    return found


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(path: Path, state: list[int]) -> Study:
    del state
    study = open_study(path)
    _ = study.cells, study.dataset
    return study


def _one(
    label: str,
    options: Sequence[str],
    key: str,
    default: int = 0,
    where: Any = st,
    visible: bool = True,
) -> str:
    """Ask for one of some options, kept in the address. Anything else falls to the default."""
    if st.session_state.get(key, options[0]) not in options:
        del st.session_state[key]
    chosen = where.selectbox(
        label,
        options,
        index=default,
        key=key,
        bind="query-params",
        label_visibility="visible" if visible else "collapsed",
    )
    return str(chosen)


# --- which cells ----------------------------------------------------------------------------------


def _layout(study: Study) -> tuple[Layout, str]:
    """Ask for the axes of rows and columns, for a label of every other one, and what is shown."""
    names, free = list(study.axes), lay_out(study)
    options = [*names, "none"]
    left, middle, right = st.columns(3)
    first, second = (len(names) if axis is None else axis for axis in free.axes)
    rows = _one("Rows", options, "rows", first, left)
    others = [name for name in options if name == "none" or name != rows]
    wanted = options[second] if options[second] in others else "none"
    columns = _one("Columns", others, "columns", others.index(wanted), middle)
    what = _one("Show", [PICTURES, *measures_of(study)], "show", 0, right)
    where: dict[str, Any] = {}
    filters = [name for name in names if name not in (rows, columns)]
    places = st.columns(3)
    for number, name in enumerate(filters):
        if len(study.axes[name]) > 1:
            # A widget's label is Markdown, and the name of an axis is somebody's text.
            label = f"Axis {names.index(name) + 1}"
            places[number % 3].text(name)
            key = f"axis_{names.index(name)}"
            where[name] = _one(label, study.axes[name], key, 0, places[number % 3], False)
        else:
            where[name] = study.axes[name][0]
    fixed = {names.index(name): study.axes[name].index(label) for name, label in where.items()}
    down, across = (None if name == "none" else names.index(name) for name in (rows, columns))
    return Layout(down, across, (fixed,), study.shape, fixed), what


def _table(study: Study, layout: Layout, what: str) -> None:
    """Show the cells over rows and columns; those that are selected there are picked."""
    down, across = layout.size
    at_once = max(1, A_PAGE // across)
    pages = -(-down // at_once)
    page = 0
    if pages > 1:
        page = int(_one("Rows from", [str(n * at_once) for n in range(pages)], "from")) // at_once
    rows = range(page * at_once, min(down, (page + 1) * at_once))
    columns = _distinct(labels_of(study, layout.columns))
    values = [
        [
            _value(study, layout.place(layout.blocks[0], row, column), what)
            for column in range(across)
        ]
        for row in rows
    ]
    labels = labels_of(study, layout.rows)
    table = pd.DataFrame(
        values,
        columns=columns,
        index=pd.Index([labels[row] for row in rows], name=name_of(study, layout.rows) or " "),
    )
    drawn = what == PICTURES
    parts = [name_of(study, layout.columns), block_title(study, layout.blocks[0])]
    st.text("Across: " + ", at ".join(filter(None, parts)) if any(parts) else "One cell.")

    def take() -> None:
        cells = st.session_state["cells_table"].selection.cells
        places = [(rows[row], columns.index(column)) for row, column in cells]
        new = [_key(layout.place(layout.blocks[0], *place)) for place in places]
        st.session_state["cells"] = added(st.session_state.get("cells", []), new)

    st.dataframe(
        table,
        key="cells_table",
        width="content",
        height=min(TALLEST, 40 + (ROW if drawn else 36) * len(rows)),
        row_height=ROW if drawn else None,
        column_config=dict.fromkeys(
            columns,
            st.column_config.ImageColumn(width=ROW + 20)
            if drawn
            else st.column_config.NumberColumn(format="%.4g"),
        ),
        selection_mode="multi-cell",
        on_select=take,
    )


def added(before: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return the picked cells after a selection: one cell is added, several take their place."""
    if len(new) != 1:
        return list(new or before)[:MOST]
    return [*(key for key in before if key not in new), *new][-MOST:]


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return labels as names of columns: none is empty."""
    return [label or " " for label in labels]


def _key(index: Sequence[int]) -> str:
    return "-".join(map(str, index)) or "cell"


def _value(study: Study, index: tuple[int, ...], what: str) -> Any:
    """Return what a table shows of a cell: a picture as an address, or a number."""
    cell = study.cells.get(index)
    if what != PICTURES:
        value = numbers_of(cell).get(what) if cell is not None else None
        return value if isinstance(value, int | float) else None
    if cell is None:
        return picture_of("missing")
    return _picture(str(study.path), cell.planned.address, cell.status, study, cell)


@st.cache_data(max_entries=4000, show_spinner=False)
def _picture(path: str, address: str, status: str, _study: Study, _cell: Cell) -> str:
    del path, address, status
    return picture_of(thumbnail(_study, _cell))


def picture_of(picture: Image.Image | str) -> str:
    """Return a picture, or a word in its place, as an address that holds it."""
    if isinstance(picture, str):
        word, picture = picture, Image.new("RGB", (CELL, CELL), (225, 227, 232))
        ImageDraw.Draw(picture).text((10, CELL // 2 - 8), word, (70, 74, 84), font(15))
    webp = io.BytesIO()
    picture.save(webp, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(webp.getvalue()).decode()}"


# --- what was picked ------------------------------------------------------------------------------


def _picked(study: Study) -> None:
    """Show the cells that were picked, and lead to their recordings."""
    by_key = {_key(index): cell for index, cell in study.cells.items()}
    if "cells" in st.session_state:  # they may be another study's
        st.session_state["cells"] = [key for key in st.session_state["cells"] if key in by_key]
    options = list(by_key)
    if len(options) > MANY:
        options = st.session_state.get("cells", [])
    keys = st.multiselect(
        f"Cells: click them in the table, up to {MOST}",
        options,
        key="cells",
        bind="query-params",
        format_func=lambda key: by_key[key].title or key,
        max_selections=MOST,
    )
    cells = [by_key[str(key)] for key in keys]
    if not cells:
        st.text("Pick one cell to replay it, two to compare them.")
        return
    kept = [cell for cell in cells if cell.status == "complete" and cell.run_name]
    runs = [library().add(study.folder / str(cell.run_name)) for cell in kept]
    left, right = st.columns([1, 5])
    label = "Replay" if len(runs) < 2 else "Replay the last"
    if runs and left.button(label, key="to_replay", type="primary"):
        st.switch_page(st.session_state["pages"]["replay"], query_params={"runs": runs[-1:]})
    compared = runs if len(runs) > 1 else with_parent(study, kept)
    label = "Compare" if len(runs) > 1 else "Compare with the run without edits"
    if len(compared) > 1 and right.button(label, key="to_compare"):
        st.switch_page(st.session_state["pages"]["compare"], query_params={"runs": compared})
    for cell in cells:
        if cell.status != "complete":
            st.code(f"{cell.title} is {cell.status}: {cell.cause}\n{cell.remedy}", language=None)
        elif not cell.run_name:
            st.text(f"{cell.title} left no recording to replay.")
    names = list(dict.fromkeys(name for cell in cells for name in numbers_of(cell)))
    table = [
        {"measure": name, **{c.title or "cell": _shown(numbers_of(c).get(name)) for c in cells}}
        for name in names
    ]
    if table:
        st.dataframe(table, key="measures", hide_index=True)


def with_parent(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Return the ids of one cell's recording and of its parent's; none where one is missing."""
    chosen = [*cells, *(study.parent_of(cell) for cell in cells)]
    names = [cell.run_name for cell in chosen if cell is not None]
    if len(names) != 2 or not all(names):
        return []
    return [library().add(study.folder / str(name)) for name in names]


def _shown(value: float | str | None) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)


def snippet(study: Study) -> str:
    """Return the Python that opens a study."""
    return (
        f"import probe\n\nstudy = probe.open_study({called(study.path)!r})\n"
        "study.dataset                 # axes as dimensions, measures as variables\n"
        'study.save("study.csv")'
    )
