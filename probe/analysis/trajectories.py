"""Paths of latents over the steps, drawn in two dimensions, and how far such a drawing is true.

    points = probe.trajectories([run, other])      # every step of every run: (point, feature)
    pca(points), random_walks(points)              # how much each component explains, beside chance
    umap_map(points, seed=1), aligned_map(points)  # need pip install 'diffusion-probe[umap]'
    preservation(points, map)                      # how many neighbours are neighbours on the map

A point is one run at one step. Its features are the values of the latents, on one scale for all
schedulers. The coordinate `run` says whose point it is, `sigma` how noisy it is.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from probe.arguments import labelled, whole_number
from probe.errors import ExperimentError, UserError

MOST_SEED = 2**32 - 1  # that umap-learn takes
INSTALL = "pip install 'diffusion-probe[umap]'"
LEAST = 5  # points of a map by UMAP, and of each run's map by AlignedUMAP
MOST = 5000  # points whose distances are compared: two arrays of 200 MB


# --- principal components -------------------------------------------------------------------------


def pca(points: xr.DataArray, components: int = 10) -> xr.Dataset:
    """Return the principal components of points: where each point lies, what each explains.

    *Shape:* (point, feature) -> `position` (point, component), in units of the features, and
    `explained` (component), the share of the variance about the mean of all points.

    There are at most as many components as points less one. Of each, the position of the greatest
    size is positive, so that a map never flips. Source: Hotelling 1933.
    """
    values = _values(points)
    most = min(whole_number("components", components, 1), len(values) - 1)
    position, explained = _components(values.astype(np.float64), most)
    return xr.Dataset(
        {
            "position": (("point", "component"), position.astype(np.float32)),
            "explained": ("component", explained),
        },
        {name: points[name] for name in points.coords if points[name].dims == ("point",)},
    )


def _components(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and shares of the variance, from the products of centred points."""
    centred = values - values.mean(axis=0, dtype=np.float64).astype(values.dtype)
    products = (centred @ centred.T).astype(np.float64)
    variances, vectors = np.linalg.eigh(products)
    variances, vectors = variances[::-1].clip(0), vectors[:, ::-1]
    position = vectors[:, :most] * np.sqrt(variances[:most])
    greatest = position[np.abs(position).argmax(axis=0), np.arange(most)]
    return position * np.where(greatest < 0, -1, 1), variances[:most] / max(
        variances.sum(), np.finfo(float).tiny
    )


def random_walks(
    points: xr.DataArray, components: int = 10, walks: int = 10, seed: int = 0
) -> xr.Dataset:
    """Return the principal components of random walks in the place of the paths.

    *Shape:* (point, feature) -> `explained` (walk, component), and `position` (point, component)
    of the first walk.

    Each walk begins where its run's path begins. It takes as many steps of the same sizes, each
    in a direction drawn at random in as many dimensions. Walk i is drawn with `seed` + i.

    Such walks have no purpose, and still a few components explain most of them, and their maps are
    smooth curves. For one walk of n points with steps of one size in very many dimensions, the
    share of component k is proportional to 1 / (1 - cos(pi k / n)), nearly 6 / (pi k)^2. Its
    position is a cosine of k half turns, so any two components draw a Lissajous curve. Source:
    Antognini and Sohl-Dickstein 2018, arXiv:1806.08805.
    """
    values = _values(points)
    seed, walks = whole_number("seed", seed), whole_number("walks", walks, 1, 1000)
    most = min(whole_number("components", components, 1), len(values) - 1)
    drawn = [_components(_walk(points, values, seed + index), most) for index in range(walks)]
    return xr.Dataset(
        {
            "position": (("point", "component"), drawn[0][0].astype(np.float32)),
            "explained": (("walk", "component"), np.array([explained for _, explained in drawn])),
        },
        attrs={"seed": seed},
    )


def _walk(points: xr.DataArray, values: np.ndarray, seed: int) -> np.ndarray:
    """Return values in which each run's path is a random walk."""
    draw = np.random.default_rng(seed)
    walked = values.copy()
    for rows in _rows_of_runs(points).values():
        sizes = np.linalg.norm(np.diff(values[rows], axis=0), axis=1)
        steps = draw.standard_normal((len(sizes), values.shape[1]), dtype=np.float32)
        steps *= (sizes / np.linalg.norm(steps, axis=1))[:, None]
        walked[rows[1:]] = values[rows[0]] + steps.cumsum(axis=0)
    return walked


# --- UMAP -----------------------------------------------------------------------------------------


def umap_map(points: xr.DataArray, neighbours: int = 15, seed: int = 0) -> xr.DataArray:
    """Return a map by UMAP, which keeps near points near.

    *Shape:* (point, feature) -> (point, axis), without a unit. Distances between groups, sizes of
    groups and loops on it mean nothing. `neighbours` are at most half of the other points.

    It begins with random places, so the same seed draws the same map, and another seed shows all
    that is arbitrary. UMAP's own beginning, spectral, is not the same again where groups are far
    apart: there scipy draws without a seed.

    Raises UserError where umap-learn is not installed, ExperimentError for fewer than 5 points.
    Source: McInnes, Healy and Melville 2018, arXiv:1802.03426.
    """
    values = _enough(_values(points))
    near = compared_neighbours(len(values), whole_number("neighbours", neighbours, 2))
    seed = whole_number("seed", seed, most=MOST_SEED)
    with _quiet(), threads_kept():
        umap = umap_library()
        # umap-learn counts each point among its own neighbours
        layout = umap.UMAP(n_neighbors=near + 1, random_state=seed, n_jobs=1, init="random")
        return _map(points, layout.fit_transform(values))


def aligned_map(points: xr.DataArray, neighbours: int = 15, seed: int = 0) -> xr.DataArray:
    """Return a map by AlignedUMAP: one of each run, with the same noise levels in the same place.

    *Shape:* (point, feature) -> (point, axis), without a unit. Each run is laid out by its own
    neighbours alone: at most half of its other steps, or more where a path would fall to pieces,
    whose places would not be the same again. Then the steps of each two runs that follow
    each other are pulled together where their noise levels are the nearest. So the shapes of paths
    may be compared. That two paths are near says nothing, for they were pulled.

    Raises what `umap_map` raises, also for fewer than two runs. Source: `AlignedUMAP` of
    umap-learn; for measurements over time Dadu et al. 2023, doi:10.1016/j.patter.2023.100741.
    """
    values, runs = _values(points), list(_rows_of_runs(points).values())
    if len(runs) < 2:
        raise ExperimentError("One run alone is aligned with nothing.", "Give two runs or more.")
    for rows in runs:
        _enough(values[rows])
    least = min(len(rows) for rows in runs)
    near = compared_neighbours(least, whole_number("neighbours", neighbours, 2))
    near = max(_in_one_piece(values[rows], near) for rows in runs)
    relations = [
        _same_level(points["sigma"].values[one], points["sigma"].values[other])
        for one, other in itertools.pairwise(runs)
    ]
    seed = whole_number("seed", seed, most=MOST_SEED)
    with _quiet(), threads_kept():
        umap = umap_library()  # it draws by the second of these seeds alone
        layout = umap.AlignedUMAP(n_neighbors=near + 1, random_state=seed, transform_seed=seed)
        layout.fit([values[rows] for rows in runs], relations=relations)
    position = np.empty((len(values), 2), np.float32)
    for rows, of_run in zip(runs, layout.embeddings_, strict=True):
        position[rows] = of_run
    return _map(points, position)


@contextlib.contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch its number of threads back, if it is in use: numba sets another for all.

    The bits of a run that is recorded afterwards depend on it.
    """
    torch = sys.modules.get("torch")
    threads = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if torch is not None:
            torch.set_num_threads(threads)


def umap_library() -> Any:
    """Return the module umap, which takes 5 to 30 seconds to import.

    Raises UserError where it is not installed.
    """
    try:
        return importlib.import_module("umap")
    except ImportError as error:
        raise UserError("UMAP is not installed.", INSTALL) from error


def _quiet() -> Any:
    """Return a context in which UMAP's own warnings are not heard.

    They are of its import, and of few points that are all near each other: `preservation` measures
    what comes of that.
    """
    return warnings.catch_warnings(action="ignore")


def _in_one_piece(values: np.ndarray, near: int) -> int:
    """Return the least number of neighbours, from `near` up, whose graph hangs together."""
    order = _by_distance(values.astype(np.float64))
    for count in range(near, len(values)):
        linked = np.eye(len(values), dtype=bool)
        np.put_along_axis(linked, order[:, :count], True, axis=1)
        linked |= linked.T
        reached = linked[0]
        while (further := linked[reached].any(axis=0)).sum() > reached.sum():
            reached = further
        if reached.all():
            return count
    return len(values) - 1


def _same_level(sigma: np.ndarray, other: np.ndarray) -> dict[int, int]:
    """Return pairs of steps of two runs with the nearest noise levels, each step once at most.

    The arctangent of sigma is the angle between picture and noise, and finite at any level.
    """
    apart = np.abs(np.arctan(sigma)[:, None] - np.arctan(other)[None])
    pairs: dict[int, int] = {}
    for step, nearest in enumerate(apart.argmin(axis=1)):
        if apart[:, nearest].argmin() == step:
            pairs[step] = int(nearest)
    return pairs


def _map(points: xr.DataArray, position: np.ndarray) -> xr.DataArray:
    along = {name: points[name] for name in points.coords if points[name].dims == ("point",)}
    return xr.DataArray(np.asarray(position, np.float32), along, ("point", "axis"), "position")


def _enough(values: np.ndarray) -> np.ndarray:
    if len(values) < LEAST:
        raise ExperimentError(
            f"{len(values)} points are too few for a map by UMAP.",
            f"Give {LEAST} steps of each run or more, or take --method pca.",
        )
    return values


# --- what a map keeps -----------------------------------------------------------------------------


def preservation(
    points: xr.DataArray, position: xr.DataArray, neighbours: int = 15
) -> dict[str, float]:
    """Return how well the neighbours on a map are the true ones.

    *Shape:* (point, feature) and (point, axis) -> `kept`, `by_chance`, `trustworthiness`, and
    `kept_within` and `within_by_chance`, which compare each run's steps with each other alone.

    `kept` is the mean share of a point's k nearest that are among its k nearest on the map. A map
    without any sense keeps the share `by_chance`. `trustworthiness` is 1 if no point that is far
    away comes among the k nearest on the map. k is `neighbours`, and at most half of the other
    points. Distances are Euclidean. Source: Venna and Kaski 2001; the same number as
    scikit-learn's `trustworthiness`.
    """
    values, flat = _values(points), labelled("position", position, "point", "axis")
    layout = flat.transpose("point", "axis").values
    if len(layout) != len(values):
        raise ExperimentError(
            f"The map has {len(layout)} points, and there are {len(values)}.",
            "Give a map of these points.",
        )
    if len(values) > MOST:
        raise ExperimentError(
            f"Neighbours of {len(values)} points are not compared.", f"Give {MOST} at most."
        )
    whole_number("neighbours", neighbours, 1)
    kept, chance, trust = _kept(values, layout, neighbours)
    within = [
        _kept(values[rows], layout[rows], neighbours)[:2]
        for rows in _rows_of_runs(points).values()
        if len(rows) > 2
    ]
    own, own_chance = np.mean(within or [(kept, chance)], axis=0)
    return {
        "kept": kept,
        "by_chance": chance,
        "trustworthiness": trust,
        "kept_within": float(own),
        "within_by_chance": float(own_chance),
    }


def _kept(values: np.ndarray, layout: np.ndarray, neighbours: int) -> tuple[float, float, float]:
    """Return the share of neighbours that a map keeps, that by chance, and its trustworthiness."""
    count = len(values)
    near = compared_neighbours(count, neighbours)
    true, drawn = (_by_distance(one.astype(np.float64)) for one in (values, layout))
    rank = np.empty((count, count), int)  # of the others, by true distance: the nearest is 1
    np.put_along_axis(rank, true, np.arange(1, count), axis=1)
    ranks = np.take_along_axis(rank, drawn[:, :near], axis=1)
    penalty = (ranks - near).clip(0).sum() * 2 / (count * near * (2 * count - 3 * near - 1))
    return float((ranks <= near).mean()), near / (count - 1), float(1 - penalty)


def compared_neighbours(points: int, neighbours: int) -> int:
    """Return how many neighbours are compared: at most half of the other points.

    With more, a map without sense would keep most of them.
    """
    return min(neighbours, max(1, (points - 1) // 2))


def _by_distance(values: np.ndarray) -> np.ndarray:
    """Return of each point the others, the nearest first. *Shape:* (point, feature) -> (p, p-1)."""
    centred = values - values.mean(axis=0)
    squares = (centred**2).sum(axis=1)
    apart = squares[:, None] + squares[None] - 2 * (centred @ centred.T)
    np.fill_diagonal(apart, -np.inf)
    return np.argsort(apart, axis=1, kind="stable")[:, 1:]


# --- points ---------------------------------------------------------------------------------------


def _values(points: xr.DataArray) -> np.ndarray:
    """Return finite numbers (point, feature). Raise ExperimentError."""
    values = labelled("points", points, "point", "feature").transpose("point", "feature").values
    if len(values) < 3:
        raise ExperimentError(
            f"{len(values)} points make no path.", "Give runs of three steps or more."
        )
    if not np.isfinite(values).all():
        raise ExperimentError("points has values that are not finite.", "Leave these steps out.")
    return values.astype(np.float32, copy=False)


def _rows_of_runs(points: xr.DataArray) -> dict[Any, np.ndarray]:
    """Return the rows of each run, in the order of the points."""
    if "run" not in points.coords:
        raise ExperimentError(
            "points does not say which run each point is of.",
            "Give what probe.trajectories returns.",
        )
    runs = points["run"].values
    return {name: np.flatnonzero(runs == name) for name in dict.fromkeys(runs.tolist())}


def paths(points: xr.DataArray | xr.Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each run's name and the rows of its points, in the order of its steps."""
    for name, rows in _rows_of_runs(points).items():  # type: ignore[arg-type]
        yield str(name), rows[np.argsort(points["step"].values[rows], kind="stable")]
