"""probe embed RUN [RUN ...]: maps of where the latents of recordings go, step by step.

probe embed latest                         # one run
probe embed A B C                          # several on one map
probe embed A B C --of denoised            # the expected clean latents instead
probe embed A B C --method pca             # seconds, and UMAP need not be installed

A step of a run has a thousand numbers or more, and a map has two. Each method keeps another part:

pca      the two directions of greatest variance; it is always computed. Beside it stand random
         walks with the same steps: they draw smooth loops too, without any meaning.
umap     near points stay near. Distances, sizes and loops mean nothing, and another seed draws
         another map: so there are three. Needs pip install 'diffusion-probe[umap]'.
aligned  AlignedUMAP: one map of each run, pulled together at the same noise levels, to compare the
         shapes of runs. That two runs are near says nothing. Needs two runs or more.

For each map it is counted how many of the nearest neighbours are still neighbours, beside how many
would be by chance. Everything goes into RUNS/embeddings/NAME.zarr, which the page Trajectories of
probe view shows and xarray.open_zarr opens. The same command writes the same name and the same
numbers.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe import output, stopping
from probe.errors import ExperimentError, ProbeError, UserError
from probe.output import say, tell
from probe.terminal import RECORDING, Parser, add_runs, described, guarded, without_home

if TYPE_CHECKING:
    import xarray as xr

    from probe.reading.recording import Run

OF, METHODS = ("latents", "denoised"), ("pca", "umap", "aligned")
NEEDS_UMAP = METHODS[1:]
INSTALL = "pip install 'diffusion-probe[umap]'"
LIBRARIES = ("diffusion-probe", "numpy", "umap-learn", "scikit-learn", "scipy", "numba")
WALK_SEED = 0
MAX_NAME = 60  # characters of a run's name in the name of an embedding


def whole_numbers(text: str) -> list[int]:
    """Return whole numbers that are separated by commas, for argparse."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) < 2**32 for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is no list of seeds; write 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def parser(prog: str = "probe embed") -> argparse.ArgumentParser:
    made = Parser(prog=prog, description=described(__doc__, "probe embed", prog))
    made.add_argument("names", nargs="+", metavar="RUN", help=RECORDING)
    made.add_argument(
        "--of", choices=OF, default="latents", help="what each step gives to the maps [latents]"
    )
    made.add_argument(
        "--method",
        choices=METHODS,
        action="append",
        help="a method beside pca; may be given twice [all that are installed]",
    )
    made.add_argument(
        "--seeds",
        type=whole_numbers,
        default=[0, 1, 2],
        help="seeds of the maps by UMAP, and of AlignedUMAP [0,1,2]",
    )
    made.add_argument(
        "--neighbours",
        type=int,
        default=15,
        metavar="K",
        help="how many neighbours UMAP keeps, and how many are counted, where there are so many "
        "[15]",
    )
    made.add_argument(
        "--image", type=int, default=0, metavar="I", help="which image of each recording, from 0"
    )
    made.add_argument(
        "--output",
        type=Path,
        metavar="NAME.zarr",
        help="write it there [RUNS/embeddings/NAME.zarr, named after the runs]",
    )
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_runs(made)
    return made


def main(arguments: list[str], prog: str = "probe embed") -> int:
    options = parser(prog).parse_args(arguments)
    if options.output is not None and options.output.suffix != ".zarr":
        raise ExperimentError(
            f"--output: {options.output} has another ending.",
            f"Name a folder like {options.output.with_suffix('.zarr')}",
        )
    if options.neighbours < 2:
        raise ExperimentError(
            f"--neighbours is {options.neighbours}.", "Give a whole number from 2 up."
        )
    from probe.format.schema import counted
    from probe.reading.finding import find_run
    from probe.reading.recording import Run
    from probe.reading.trajectories import trajectories
    from probe.writing.embedding import write_embedding

    paths = dict.fromkeys(find_run(name, options.runs).absolute() for name in options.names)
    runs = [Run(path) for path in paths]
    methods = chosen_methods(options.method, len(runs))
    progress: Callable[[str], None] = (lambda _: None) if options.quiet else tell
    progress(f"Reading the {options.of} of {counted(len(runs), 'run')}")
    points = trajectories(runs, options.of, options.image)
    attributes = described_by(runs, points, options, methods)
    target: Path = options.output or _default_place(Path(options.runs), attributes)
    replacing = _check_output_folder(target)
    values = computed(points, options, methods, progress)
    with stopping.cleanly():
        write_embedding(target, values, attributes, replacing)
    say(f"{without_home(str(target))} ({_size(target) / 1000:.0f} kB)", "", *summary(values))
    return 0


def chosen_methods(asked: list[str] | None, runs: int) -> list[str]:
    """Return the methods that are computed, PCA first.

    Raise UserError if a method was asked for that cannot be.
    """
    installed = importlib.util.find_spec("umap") is not None
    if asked is None:
        if not installed:
            tell("UMAP is not installed, so PCA is computed alone. To have it:", f"  {INSTALL}")
        return [m for m in METHODS if m == "pca" or (installed and (m == "umap" or runs > 1))]
    if not installed and set(asked) & set(NEEDS_UMAP):
        raise UserError("UMAP is not installed.", f"{INSTALL}, or take --method pca.")
    if "aligned" in asked and runs < 2:
        raise ExperimentError(
            "One run alone is aligned with nothing.", "Name two runs or more, or leave aligned out."
        )
    return [method for method in METHODS if method == "pca" or method in asked]


def computed(
    points: xr.DataArray,
    options: argparse.Namespace,
    methods: list[str],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the variables of an embedding."""
    import numpy as np

    from probe.analysis.trajectories import pca, preservation, random_walks
    from probe.format.embedding import NO_SEED

    components, walks = pca(points), random_walks(points, seed=WALK_SEED)
    two = {"component": slice(2)}
    flat = components["position"].isel(two).rename(component="axis")
    maps = [("pca", NO_SEED, flat), *_umap_maps(points, options, methods, progress)]
    kept = [preservation(points, position, options.neighbours) for _, _, position in maps]
    return {
        **{name: points[name].values for name in ("run", "step", "sigma")},
        "method": [method for method, _, _ in maps],
        "seed": [seed for _, seed, _ in maps],
        "position": np.stack([position.values for _, _, position in maps]),
        **{name: [of_map[name] for of_map in kept] for name in kept[0]},
        "explained": components["explained"].values,
        "walk_explained": walks["explained"].values,
        "walk_position": walks["position"].isel(two).values,
    }


def _umap_maps(
    points: xr.DataArray,
    options: argparse.Namespace,
    methods: list[str],
    progress: Callable[[str], None],
) -> Iterator[tuple[str, int, xr.DataArray]]:
    from probe.analysis.trajectories import aligned_map, umap_library, umap_map

    if len(methods) > 1:
        progress("Importing UMAP, which compiles itself: up to a minute")
        umap_library()
    for method in methods[1:]:
        make = umap_map if method == "umap" else aligned_map
        for index, seed in enumerate(options.seeds):
            progress(f"{method}, seed {seed} ({index + 1} of {len(options.seeds)})")
            yield method, seed, make(points, options.neighbours, seed)


def described_by(
    runs: list[Run], points: xr.DataArray, options: argparse.Namespace, methods: list[str]
) -> dict[str, Any]:
    """Return the attributes of an embedding."""
    from probe.analysis.trajectories import compared_neighbours
    from probe.format.embedding import KIND, VERSION
    from probe.reading.embedding import mark_of
    from probe.reading.trajectories import unique
    from probe.settings.fields import from_home

    names, of_points = unique([run.name for run in runs]), points["run"].values.tolist()
    described = [
        {
            "name": name,
            "path": from_home(str(run.path)),
            "mark": mark_of(run.path),
            "steps": of_points.count(name),
        }
        for name, run in zip(names, runs, strict=True)
    ]
    return {
        "kind": KIND,
        "embedding_version": VERSION,
        "runs": described,
        "of": options.of,
        "image": options.image,
        "features": points.sizes["feature"],
        "methods": methods,
        "seeds": options.seeds,
        "walk_seed": WALK_SEED,
        "neighbours": options.neighbours,
        "compared_neighbours": compared_neighbours(len(of_points), options.neighbours),
        "versions": _versions(methods),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def _versions(methods: list[str]) -> dict[str, str]:
    """Return the versions of the libraries that compute these maps, as far as they say them."""
    import importlib.metadata as metadata

    versions = {}
    for name in LIBRARIES if len(methods) > 1 else LIBRARIES[:2]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _default_place(runs: Path, attributes: dict[str, Any]) -> Path:
    """Return the path of an embedding that is named after its runs and its settings."""
    from probe.format.embedding import FOLDER

    runs_of = [{key: run[key] for key in ("name", "mark", "steps")} for run in attributes["runs"]]
    left_out = ("versions", "created", "runs")
    settings = {key: value for key, value in attributes.items() if key not in left_out}
    digest = hashlib.sha256(json.dumps([runs_of, settings], sort_keys=True).encode()).hexdigest()
    names = [run["name"] for run in attributes["runs"]]
    more = f"-and-{len(names) - 1}-more" if len(names) > 1 else ""
    return runs / FOLDER / f"{names[0][:MAX_NAME]}{more}-{attributes['of']}-{digest[:8]}.zarr"


def _check_output_folder(target: Path) -> bool:
    """Return whether an embedding is at the place of the output, which may then be replaced.

    Raise ExperimentError for a place that nothing can be written to, before anything is computed.
    """
    from probe.reading.embedding import open_embedding
    from probe.writing.files import check_no_link, check_output_folder

    check_output_folder(target.parent)
    check_no_link(target)
    if not os.path.lexists(target):
        return False
    try:
        open_embedding(target)
    except ProbeError as error:
        raise ExperimentError(
            f"{target} exists already, and is no embedding.", "Give another name: --output."
        ) from error
    return True


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def summary(values: dict[str, Any]) -> list[str]:
    """Return what an embedding says, as lines."""
    first, walks = values["explained"][:2].sum(), values["walk_explained"][:, :2].sum(axis=1)
    shares = ("kept", "by_chance", "kept_within", "within_by_chance")
    table = [
        (
            str(method),
            "" if seed < 0 else str(seed),
            *(f"{values[name][place]:.0%}" for name in shares),
            f"{values['trustworthiness'][place]:.3f}",
        )
        for place, (method, seed) in enumerate(zip(values["method"], values["seed"], strict=True))
    ]
    header = (
        "method",
        "seed",
        "neighbours kept",
        "by chance",
        "within a run",
        "by chance",
        "trust",
    )
    return [
        f"PCA: two components explain {first:.1%} of the variance; of random walks with the same "
        f"steps {walks.min():.1%} to {walks.max():.1%}.",
        "",
        *output.rows(table, header),
    ]


if __name__ == "__main__":
    guarded(main)
