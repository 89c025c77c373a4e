"""How far apart two runs are in numbers: latents, predictions, pictures, words, heads, modules.

    steps_apart(run, parent)        # (step): root mean square differences
    pictures_apart(run, parent)     # (image): l2, psnr, ssim
    words_apart(run, parent)        # (word): how much of each word's mean map moved

Steps are compared where both runs have one noise level. What was not recorded is said by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from probe.analysis.pictures import WINDOW, psnr, ssim
from probe.errors import ExperimentError, RecordingNotFound
from probe.reading.distances import latents_of, matched, parting
from probe.reading.recording import Run

PARTED = 0.5  # the share of their greatest distance at which two runs are said to have parted

# --- latents and predictions ----------------------------------------------------------------------


def _levels(run: Run, parent: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of two runs that have one noise level, by position among their steps."""
    sigma, other = (r.variable("sigma").values[r.steps] for r in (run, parent))
    at = matched(sigma, other)
    there = np.flatnonzero(at >= 0)
    return there, at[there]


def _rms(difference: np.ndarray) -> np.ndarray:
    """*Shape:* (step, image, channel, y, x) -> (step)."""
    axes = tuple(range(1, difference.ndim))
    return np.asarray(np.sqrt(np.mean(np.square(difference, dtype=np.float64), axis=axes)))


def steps_apart(run: Run, parent: Run) -> xr.Dataset:
    """Return root mean square differences by step, over all images; see `Pair.steps`.

    They are NaN at noise levels that the parent has not. Raise ExperimentError for latents of two
    sizes.
    """
    mine, theirs = _levels(run, parent)
    found: dict[str, Any] = {}

    def add(name: str, one: np.ndarray, two: np.ndarray) -> None:
        if one.shape[1:] != two.shape[1:]:
            sizes = [" x ".join(map(str, values.shape[1:])) for values in (one, two)]
            raise ExperimentError(
                f"The latents of {run.name} are {sizes[0]}, those of {parent.name} {sizes[1]}.",
                "Compare runs of one size and one family of models.",
            )
        apart = np.full(len(run.steps), np.nan)
        apart[mine] = _rms(one[mine] - two[theirs])
        found[name] = ("step", apart)

    add("latents", latents_of(run), latents_of(parent))
    add("denoised", latents_of(run, "denoised"), latents_of(parent, "denoised"))
    branches: list[str | None] = [None]
    if run.attributes.is_guided and parent.attributes.is_guided:
        branches += ["cond", "uncond"]
    for branch in branches:
        name = "prediction" if branch is None else f"prediction_{branch}"
        one, two = (r.prediction(branch).astype("float32").values for r in (run, parent))
        add(name, one, two)
    coords = {"step": run.steps, "sigma": ("step", run.variable("sigma").values[run.steps])}
    return xr.Dataset(found, coords=coords)


def first_difference(run: Run, parent: Run) -> int | None:
    """Return the first step of `run` whose latents are not those of the parent, bit for bit."""
    mine, theirs = _levels(run, parent)
    one, two = run.latents.values[mine], parent.latents.values[theirs]
    if one.shape != two.shape:
        return int(run.steps[0])
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    differs = np.flatnonzero(~same.reshape(len(mine), -1).all(axis=1))
    return int(run.steps[mine[differs[0]]]) if len(differs) else None


def parts_at(far: xr.DataArray) -> int | None:
    """Return the first step at which two runs are more than half of their greatest distance apart.

    It is None if they never differ. *Shape:* (step).
    """
    greatest = float(far.max()) if np.isfinite(far.values).any() else 0.0
    return parting(far, PARTED * greatest) if greatest else None


# --- pictures -------------------------------------------------------------------------------------


def pictures_apart(run: Run, parent: Run) -> xr.Dataset:
    """Return `l2`, `psnr` and `ssim` of the final latents and pictures. *Shape:* each (image).

    Raise RecordingNotFound if one of them is not complete. `ssim` is NaN of pictures smaller than
    its window.
    """
    for one in (run, parent):
        if one.status != "complete":
            raise RecordingNotFound(
                f"{one.name} is {one.status}: it has no final picture.",
                "Go on with it: probe run --resume RUN.",
            )
    final = [one.variable("latents/final_latents").astype("float64") for one in (run, parent)]
    pictures = [one.images.load() for one in (run, parent)]
    if any(dict(two[0].sizes) != dict(two[1].sizes) for two in (final, pictures)):
        raise ExperimentError(
            f"The pictures of {run.name} and {parent.name} are not of one size and number.",
            "Compare runs of one size.",
        )
    gap = (final[0] - final[1].values).values
    axes = tuple(range(1, gap.ndim))
    small = min(pictures[0].sizes["y"], pictures[0].sizes["x"]) < WINDOW
    count = pictures[0].sizes[run.attributes.across]
    return xr.Dataset(
        {
            "l2": ("image", np.sqrt(np.sum(np.square(gap), axis=axes))),
            "psnr": ("image", psnr(*pictures).values),
            "ssim": ("image", np.full(count, np.nan) if small else ssim(*pictures).values),
        },
        coords={"image": np.arange(count)},
    )


# --- words, heads and modules ---------------------------------------------------------------------


def words_apart(run: Run, parent: Run) -> xr.Dataset:
    """Return how each word's map changed: of the words that both prompts have, in their order.

    *Shape:* `change`, `mass`, `parent_mass`, each (word). A map is the mean over steps, layers and
    heads. `change` is the sum of absolute differences over the sum of the parent's map, the mean
    over images: 0 the same, 1 as much as all of it. Raise RecordingNotFound without maps.
    """
    maps = [one.word_maps(over=("step", "layer", "head")).load() for one in (run, parent)]
    places = [_words_of(one) for one in maps]
    shared = [word for word in places[0] if word in places[1]]
    if maps[0].sizes["y"] != maps[1].sizes["y"] or maps[0].sizes["x"] != maps[1].sizes["x"]:
        raise ExperimentError("the maps have two sizes.", "Compare runs of one size.")
    mine, theirs = (
        one.isel(word=[place[word] for word in shared]).transpose("word", ..., "y", "x").values
        for one, place in zip(maps, places, strict=True)
    )
    moved = np.abs(mine - theirs).sum((-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        change = (moved / theirs.sum((-2, -1))).mean(axis=1)
    values = {
        "change": change,
        "parent_mass": theirs.mean(axis=(1, 2, 3)),
        "mass": mine.mean(axis=(1, 2, 3)),
    }
    # Plain text, and of a word that is there twice its number as well.
    labels = [word if number == 0 else f"{word} ({number + 1})" for word, number in shared]
    return xr.Dataset({name: ("word", value) for name, value in values.items()}, {"word": labels})


def _words_of(maps: xr.DataArray) -> dict[tuple[str, int], int]:
    """Return the position of each word, by the word and how often it was there before."""
    found: dict[tuple[str, int], int] = {}
    for position, word in enumerate(maps["word"].values.tolist()):
        before = sum(other == word for other, _ in found)
        found[word, before] = position
    return found


def heads_apart(run: Run, parent: Run) -> xr.DataArray:
    """Return how much each head shares its attention out otherwise.

    *Shape:* (head), labelled `LAYER head N`. It is the total variation between the shares that a
    head gives to the tokens of the prompt, the mean over steps and images: 0 the same, 1 all of it
    elsewhere. Raise RecordingNotFound without moments of heads.
    """
    found: list[float] = []
    labels: list[str] = []
    for grid in run.grids:
        mass, other = (_masses(one, grid) for one in (run, parent))
        if mass is None or other is None:
            continue
        if mass.sizes["token"] != other.sizes["token"]:
            raise RecordingNotFound(
                f"the prompts have {mass.sizes['token']} and {other.sizes['token']} tokens.",
                "Compare runs of one prompt.",
            )
        shared: dict[str, list[Any]] = {
            dim: [label for label in mass[dim].values.tolist() if label in other[dim].values]
            for dim in ("step", "layer")
        }
        gap = np.abs(mass.sel(shared).values - other.sel(shared).values)
        # (step, token, image, layer, head): half of the sum over tokens
        variation = (gap.sum(axis=1) / 2).mean(axis=(0, 1))
        for layer, row in zip(shared["layer"], variation, strict=True):
            labels += [f"{layer} head {head}" for head in range(len(row))]
            found += row.tolist()
    if not found:
        raise RecordingNotFound(
            "no moments of heads are in both.", "Record with capture.attention: maps or summary."
        )
    return xr.DataArray(found, dims="head", coords={"head": labels}, name="change")


def _masses(run: Run, grid: str) -> xr.DataArray | None:
    """Return each token's share of attention, or None where no moments were recorded.

    *Shape:* (step, token, image, layer, head), of the prompt's branch.
    """
    group = f"attention/{grid}"
    there = run.tree[group].data_vars if grid in run.grids else {}
    kinds = {"head_statistics": "head_statistic", "moments": "moment"}
    name = next((name for name in kinds if name in there), None)
    if name is None:
        return None
    recorded = np.flatnonzero(run.variable(f"{group}/recorded").values)
    values = run.variable(f"{group}/{name}").isel(step=np.intersect1d(recorded, run.steps))
    mass = values.sel({"branch": "cond", kinds[name]: "mass"}).load()
    order = ["step", "token", run.attributes.across, "layer"]
    (head,) = (dim for dim in mass.dims if dim not in order)
    return mass.transpose(*order, head)


def modules_apart(run: Run, parent: Run) -> xr.DataArray:
    """Return how much the spread of each module's output changed, relative to the parent's.

    *Shape:* (module): |std - parent's std| / parent's std, the mean over steps, branches and
    images. Raise RecordingNotFound without statistics.
    """
    arrays = []
    for one in (run, parent):
        if "unet" not in one.tree.children or "statistics" not in one.tree["unet"].data_vars:
            raise RecordingNotFound(
                f"{one.name} has no statistics of modules.", "Record with capture.statistics."
            )
        values = one.variable("unet/statistics").isel(step=one.steps)
        arrays.append(values.sel(statistic="std").load())
    shared, steps, branches = (
        [label for label in arrays[0][dim].values if label in arrays[1][dim].values]
        for dim in ("module", "step", "branch")
    )
    chosen = {"module": shared, "step": steps, "branch": branches}
    mine, theirs = (
        array.sel(chosen).transpose("module", ...).astype("float64") for array in arrays
    )
    relative = np.abs(mine - theirs.values) / np.abs(theirs.values).clip(1e-30)
    change = relative.mean([dim for dim in relative.dims if dim != "module"])
    return xr.DataArray(change.values, dims="module", coords={"module": shared}, name="change")
