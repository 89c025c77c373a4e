"""A study as one dense dataset, and as a table in a file: .zarr, .csv, .parquet.

dataset_of(study)          # axes as dimensions, labels as coordinates, NaN where there is none
table_of(study)            # pandas: a row for each cell
"""

from __future__ import annotations

import io
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from probe.errors import ExperimentError, RecordingDamaged
from probe.format.study import AxisFile, Failure
from probe.reading.study import AGAIN, Study
from probe.settings.fields import expand_home
from probe.text import printable
from probe.writing import files

if TYPE_CHECKING:
    import pandas as pd

MOST_VALUES = 20_000_000  # of one measure
OWN = ("status", "cause", "seconds", "run")
BY_LABEL = {"word_change": "word"}  # the dimension of a measure by label
ENDINGS = (".zarr", ".csv", ".parquet")


def dataset_of(study: Study) -> xr.Dataset:
    """Return a study as one dense dataset; see `Study.dataset`. Raise RecordingDamaged."""
    dims, shape = tuple(study.axes), study.shape
    taken = {one.name for axis in study.file.axes for one in (axis, *axis.zipped)}
    if reserved := sorted(taken & {*OWN, "step", *BY_LABEL.values()}):
        raise _refuse(study, f"{printable(reserved[0])} is the name of an axis")
    coords: dict[str, Any] = {}
    for axis in study.file.axes:
        coords[axis.name] = _coordinate(axis)
        coords |= {one.name: (axis.name, _coordinate(one)) for one in axis.zipped}
    status = np.full(shape, "missing", dtype=object)
    cause, run = (np.full(shape, "", dtype=object) for _ in range(2))
    seconds = np.full(shape, np.nan)
    for index, cell in study.cells.items():
        status[index], run[index] = cell.status, cell.run_name or ""
        failures = [
            f"{name}: {value.cause}"
            for name, value in (cell.record.measures if cell.record else {}).items()
            if isinstance(value, Failure)
        ]
        cause[index] = "; ".join([cell.cause] * bool(cell.cause) + failures)
        if cell.record is not None and cell.record.seconds is not None:
            seconds[index] = cell.record.seconds
    texts = {"status": status, "cause": cause, "run": run}
    variables: dict[str, Any] = {name: (dims, array.astype(str)) for name, array in texts.items()}
    variables["seconds"] = (dims, seconds)
    dataset = xr.Dataset(variables, coords, {"study": study.name, "created": study.file.created})
    for name, array in _measures(study, taken):
        dataset[name] = array
    return dataset


def _coordinate(axis: AxisFile) -> np.ndarray:
    """Return numbers where all values of an axis are numbers, else labels."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values):
        numbers = np.array(axis.values)
        if numbers.dtype.kind in "if":
            return numbers
    return np.array(axis.labels, dtype=str)


def _measures(study: Study, taken: set[str]) -> Iterator[tuple[str, xr.DataArray]]:
    """Yield each measure with its dimensions. One that is named like an axis is left out."""
    values: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, cell in study.cells.items():
        for name, value in (cell.record.measures if cell.record else {}).items():
            values.setdefault(name, {})[index] = value
    for name, by_cell in values.items():
        if name in taken or name in OWN:
            raise _refuse(study, f"{name} is the name of a measure")
        yield name, _dense(study, name, by_cell)


def _dense(study: Study, name: str, by_cell: Mapping[tuple[int, ...], Any]) -> xr.DataArray:
    """Return one measure of every cell. The first value decides which dimensions it has."""
    dims, shape = tuple(study.axes), study.shape
    real = [value for value in by_cell.values() if not isinstance(value, Failure | None)]
    lists = [value for value in real if isinstance(value, list)]
    labels = list(dict.fromkeys(key for value in real if isinstance(value, dict) for key in value))
    coords: dict[str, Any] = {}
    if not lists and not labels:
        array = np.full(shape, np.nan)
        for index, value in by_cell.items():
            array[index] = _number(value)
        return xr.DataArray(array, dims=dims)
    if lists:
        dim = "step" if name == "l2_by_step" else f"{name}_index"
        labels = list(range(max(map(len, lists))))
    else:
        dim = BY_LABEL.get(name, f"{name}_label")
        coords[dim] = np.array(labels, dtype=str)
    if math.prod(shape) * len(labels) > MOST_VALUES:
        raise _refuse(study, f"{name} has more than {MOST_VALUES} values")
    column = {label: at for at, label in enumerate(labels)}
    array = np.full((*shape, len(labels)), np.nan)
    for index, value in by_cell.items():
        pairs = enumerate(value) if isinstance(value, list) else _items(value)
        for label, number in pairs:
            if label in column:
                array[(*index, column[label])] = _number(number)
    return xr.DataArray(array, dims=(*dims, dim), coords=coords)


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else ()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float | str) else np.nan


def table_of(study: Study) -> pd.DataFrame:
    """Return a row for each cell: its labels, status, and one column for each number.

    A measure by label or step has a column for each: `word_change[cat]`.
    """
    import pandas as pd

    dataset = study.dataset
    rows = []
    for index, cell in study.cells.items():
        at = dict(zip(study.axes, index, strict=True))
        row: dict[str, Any] = {
            name: dataset[name].isel(at).item()
            if name not in at
            else dataset[name].values[at[name]]
            for name in cell.labels
        }
        for name in (*OWN, *(n for n in dataset.data_vars if n not in OWN)):
            values = dataset[name].values[index]
            if values.ndim == 0:
                row[str(name)] = values.item()
                continue
            dim = str(dataset[name].dims[-1])
            labels = dataset[dim].values if dim in dataset.coords else range(len(values))
            row |= {f"{name}[{label}]": float(v) for label, v in zip(labels, values, strict=True)}
        rows.append(row)
    return pd.DataFrame(rows)


def save(study: Study, path: str | Path) -> Path:
    """Write a study's dataset; see `Study.save`."""
    target = expand_home(str(path))
    if target.suffix not in ENDINGS:
        raise ExperimentError(
            f"{target} has another ending.", f"Let it end in {', '.join(ENDINGS)}."
        )
    with files.storing(target):
        if target.suffix == ".zarr":
            _save_zarr(study, target)
        elif target.suffix == ".csv":
            content = table_of(study).to_csv(index=False).encode()
            files.replace(target, [content], False)
        else:
            files.replace(target, [_parquet(study)], False)
    return target


def _parquet(study: Study) -> bytes:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExperimentError(
            "A .parquet file needs pyarrow.",
            "pip install 'diffusion-probe[export]', or write .csv.",
        ) from error
    content = io.BytesIO()
    table_of(study).to_parquet(content, index=False)
    return content.getvalue()


def _save_zarr(study: Study, target: Path) -> None:
    """Write a zarr store whole: under another name, then moved into its place.

    It is of zarr's format 2, whose type for text is settled.
    """
    if os.path.lexists(target):
        raise ExperimentError(f"{target} exists already.", "Give another name, or remove it.")
    names = {name: str(name).replace(":", ".") for name in study.dataset.data_vars}
    hidden = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{files.PARTIAL}")
    try:
        study.dataset.rename(names).to_zarr(hidden, zarr_format=2, consolidated=True)
        hidden.rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _refuse(study: Study, what: str) -> RecordingDamaged:
    return RecordingDamaged(f"{printable(str(study.path))} is damaged: {what}.", AGAIN)
