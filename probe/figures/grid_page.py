"""A study as one page: `probe export STUDY --html FILE`. It fetches nothing, and opens from a disk.

The page has a small picture of each cell, and every number. Its reader chooses the axes of rows and
columns, a label of each other axis, and pictures or a measure. Rows are drawn when they come into
view.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from typing import Any

from PIL import Image

from probe.errors import ExperimentError
from probe.figures.drawing import HEAT
from probe.figures.grid import CELL, Layout, block_title, labels_of, name_of, thumbnail
from probe.figures.page import STYLE, asset, head
from probe.format.study import Failure
from probe.reading.study import Cell, Study
from probe.text import encodable

MOST_PICTURES = 5000  # of one page
QUALITY = 80


def grid_page(study: Study, layout: Layout, width: int = CELL) -> str:
    """Return a page with the cells of a study that a layout shows.

    Raise ExperimentError for too many pictures.
    """
    if layout.pictures > MOST_PICTURES:
        raise ExperimentError(
            f"{layout.pictures} pictures are too many for one page; {MOST_PICTURES} is the most.",
            "Show fewer: --where AXIS=LABEL.",
        )
    fixed = {axis: at for axis, at in layout.fixed.items() if study.shape[axis] > 1}
    kept = fixed.items()
    shown = [c for index, c in study.cells.items() if all(index[a] == at for a, at in kept)]
    axes = [axis for axis in range(len(study.shape)) if axis not in fixed]
    described, pictures = [], []
    for number, cell in enumerate(shown):
        picture = thumbnail(study, cell, width)
        described.append(_described(cell, number, axes, picture))
        if isinstance(picture, Image.Image):
            pictures.append(_held(number, picture))
    data = {
        "axes": [{"name": name_of(study, a), "labels": labels_of(study, a)} for a in axes],
        "rows": -1 if layout.rows is None else axes.index(layout.rows),
        "columns": -1 if layout.columns is None else axes.index(layout.columns),
        "cells": described,
        "measures": list(dict.fromkeys(name for cell in described for name in cell["measures"])),
        "heat": HEAT.tolist(),
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    counted = ", ".join(f"{count} {status}" for status, count in study.counts().items())
    parts = [counted, block_title(study, fixed), study.file.created[:10]]
    facts = html.escape("  ·  ".join(filter(None, parts)))
    name = html.escape(encodable(study.name))
    code = asset("grid.js").replace("</", "<\\/")
    return f"""{head(name, STYLE + asset("grid.css"))}
<body>
<main>
<h1>{name}</h1>
<p class="facts">{facts}</p>
<div class="controls" id="controls"></div>
<div class="scroll" tabindex="0" role="region" aria-label="Cells"><table>
<thead id="head"></thead><tbody id="body"></tbody></table></div>
<div id="detail" aria-live="polite">Click a cell to read its settings and numbers.</div>
<h2>Numbers</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Numbers"><table class="numbers">
<thead id="names"></thead><tbody id="numbers"></tbody></table></div>
</main>
<script type="application/json" id="study">{text}</script>
{"".join(pictures)}<script type="module">
{code}</script>
</body>
</html>
"""


def _described(
    cell: Cell, number: int, axes: list[int], picture: Image.Image | str
) -> dict[str, Any]:
    """Return what a page says of a cell."""
    there = picture if isinstance(picture, Image.Image) else None
    return {
        "number": number,
        "place": [cell.index[axis] for axis in axes],
        "title": cell.title,
        "status": cell.status,
        "cause": cell.cause,
        "run": cell.run_name or "",
        "measures": numbers_of(cell),
        "empty": "" if isinstance(picture, Image.Image) else picture,
        "width": there.width if there else 0,
        "height": there.height if there else 0,
    }


def numbers_of(cell: Cell) -> dict[str, float | str]:
    """Return the measures of a cell that are one number, those by label each by itself.

    A measure that failed is its cause. What is infinite is text.
    """
    found: dict[str, float | str] = {}
    for name, value in (cell.record.measures if cell.record else {}).items():
        if isinstance(value, Failure):
            found[name] = value.cause
        elif isinstance(value, dict):
            found |= {f"{name}[{label}]": one for label, one in value.items() if one is not None}
        elif isinstance(value, int | float | str) and not (
            isinstance(value, float) and not math.isfinite(value)
        ):
            found[name] = value
    return found


def _held(number: int, picture: Image.Image) -> str:
    """Return a picture as an element that a page holds and no browser runs."""
    webp = io.BytesIO()
    picture.save(webp, "WEBP", quality=QUALITY)
    text = base64.b64encode(webp.getvalue()).decode()
    return f'<script type="application/octet-stream" id="picture{number}">{text}</script>\n'
