"""An embedding, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors import ExperimentError
from probe.format.embedding import specs
from probe.writing import files
from probe.writing.files import storing
from probe.writing.layout import create
from probe.writing.upkeep import held


def write_embedding(
    path: Path, values: Mapping[str, Any], attributes: Mapping[str, Any], replacing: bool = False
) -> None:
    """Write an embedding to a path that ends in .zarr.

    `values` are those of `probe.format.embedding.VARIABLES`. It is made in a hidden folder, and
    moved to its place. With `replacing`, an embedding that is there goes, and only then: a kill at
    that moment leaves neither. Raises ExperimentError if something is there and not to be replaced,
    RecordingBusy, StoreError.
    """
    with storing(path):
        files.make_folders(path.parent, False)
        with held(path):
            if os.path.lexists(path) and not replacing:
                raise ExperimentError(f"{path} exists already.", "Give another name: --output.")
            hidden, aside = (
                path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{files.PARTIAL}")
                for _ in range(2)
            )
            try:
                hidden.mkdir()
                create(hidden, specs(values), dict(attributes))
                if os.path.lexists(path):
                    path.rename(aside)
                hidden.rename(path)
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
                shutil.rmtree(aside, ignore_errors=True)
