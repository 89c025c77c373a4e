"""Recorded attention maps, checked by what must hold of them and by what the hook measured.

    softmax      at each pixel the shares of all tokens sum to one; so does self-attention
    moments      mass and centroid, measured in the hook, are those of the stored map
    sums         time_sum and overview are the sums of the stored maps

No tolerance is guessed. `rounding` says how far a stored value can be from what was rounded, and
every bound follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from probe.analysis.maps import probabilities, resize
from probe.proof.checks import Check, Tally
from probe.reading.recording import Run

ARITHMETIC = 2e-5  # float32 sums of some thousand values, in whatever order a device takes them
BOUND = "times what rounding explains"
ROUNDED = "rounded when stored"


def rounding(stored: np.ndarray) -> np.ndarray:
    """Return how far, at most, each stored probability is from the one that was rounded to it.

    *Shape:* as `stored`, float32.
    """
    if stored.dtype == np.uint8:  # sqrt_u8: the codes next to c begin at c - 1/2 and c + 1/2
        return (stored.astype(np.float32) + np.float32(0.25 + 1e-3)) / 255**2
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return (
            np.spacing(np.abs(stored)).astype(np.float32) / 2
            if stored.dtype == np.float16
            else np.zeros(stored.shape, np.float32)
        )


def label_of(values: xr.DataArray, flat: int) -> str:
    """Return where a value is, by labels: "step 2, token 3, layer mid_block..., head 1".

    `flat` is its index in the flattened array.
    """
    index = np.unravel_index(flat, values.shape)
    labels = dict(zip(values.dims, index, strict=True))
    parts = (
        [f"step {int(values['step'])}"]
        if "step" in values.coords and "step" not in values.dims
        else []
    )
    parts += [
        f"{dim} {values[dim].values[i] if dim in values.coords else i}" for dim, i in labels.items()
    ]
    return ", ".join(parts)


def check_softmax(run: Run) -> Check:
    """Check that attention sums to one: kept tokens and `rest`, or all keys."""
    tally = Tally("softmax", "rows sum to 1", 1.0, (ROUNDED,), unit=BOUND)
    for path, maps, dims in _distributions(run):
        steps = range(maps.sizes["step"]) if "step" in maps.dims else [None]
        for index in steps:
            part = maps if index is None else maps.isel(step=index)
            stored = part.values
            axes = tuple(part.dims.index(dim) for dim in dims)
            bound = rounding(stored).sum(axes) + ARITHMETIC
            sums = probabilities(stored).sum(axes, dtype=np.float64)
            off = np.abs(sums - 1) / bound
            worst = int(np.nanargmax(np.where(np.isnan(off), np.inf, off))) if off.size else 0
            if off.size and not (np.isnan(off).all() and _nan_is_asked_for(run, part)):
                left = part.isel(dict.fromkeys(dims, 0))
                tally.add(float(off.flat[worst]), f"{path}, {label_of(left, worst)}")
    for path in _not_zero(run):
        tally.fail(f"{path} is not zero in a branch that no text encoder read")
    return tally.check()


def _not_zero(run: Run) -> Iterator[str]:
    """Yield values of text encoders that are not zero, in branches that were given zeros."""
    for encoder in (
        run.tree["text"].children
        if "text" in run.tree.children and run.attributes.zeroed_branches
        else ()
    ):
        for name in ("embedding", "hidden", "output", "attention", "pooled"):
            if name in run.tree[f"text/{encoder}"].data_vars:
                values = run.variable(f"text/{encoder}/{name}")
                if values.sel(
                    branch=values["branch"].isin(run.attributes.zeroed_branches)
                ).values.any():
                    yield f"text/{encoder}/{name}"


def _distributions(run: Run) -> Iterator[tuple[str, xr.DataArray, tuple[str, ...]]]:
    """Yield everything that sums to one, and over which dimensions."""
    for grid in run.grids:
        yield f"attention/{grid}", run.attention(grid), ("token",)
    if "self_attention" in run.tree.children:
        flags = run.variable("committed").values.astype(bool)
        wanted = np.isin(np.arange(len(flags)), run.recipe.capture.steps_of(len(flags)))
        for grid in run.tree["self_attention"].children:
            maps = run.variable(f"self_attention/{grid}/self").isel(
                step=np.flatnonzero(flags & wanted)
            )
            yield f"self_attention/{grid}", maps, ("key_y", "key_x")
    if (
        "text" in run.tree.children and run.recipe.capture.text and run.steps.size
    ):  # it is written before the first step
        for encoder in run.tree["text"].children:
            attention = run.variable(f"text/{encoder}/attention")
            read = ~attention["branch"].isin(run.attributes.zeroed_branches)
            yield f"text/{encoder}", attention.sel(branch=read), ("key",)


def _nan_is_asked_for(run: Run, part: xr.DataArray) -> bool:
    """Tell whether NaN in a step's maps is right: on_nan: record writes it down.

    Every map of the step is NaN then, as its latents are.
    """
    if run.recipe.on_nan != "record" or "step" not in part.coords:
        return False
    return bool(
        np.isnan(run.variable("latents/prediction").isel(step=int(part["step"])).values).any()
    )


def check_moments(run: Run) -> Check:
    """Check the hook's own trace of each map.

    A map that was moved, turned or swapped on its way to the disk no longer has it.
    """
    grids = [grid for grid in run.grids if "moments" in run.tree[f"attention/{grid}"].data_vars]
    if not grids:
        return Check(
            "moments",
            "not checked",
            "queries are recorded, maps follow from them"
            if run.grids
            else "no attention maps were recorded",
        )
    tally = Tally(
        "moments",
        "mass and centroid of each map, as measured before storage",
        1.0,
        (ROUNDED,),
        unit=BOUND,
    )
    for grid in grids:
        maps, moments = run.attention(grid), run.variable(f"attention/{grid}/moments")
        for index, step in enumerate(maps["step"].values):
            stored, measured = maps.isel(step=index).load(), moments.sel(step=step).load()
            off = unlike_moments(stored.values, measured.values)
            spoilt = np.expand_dims(
                np.isnan(probabilities(stored.values)).any((-2, -1)), -1
            ) & np.isnan(measured.values)
            off = np.where(
                spoilt & (run.recipe.on_nan == "record"), 0.0, np.where(np.isnan(off), np.inf, off)
            )
            worst = int(off.argmax())
            tally.add(float(off.flat[worst]), f"attention/{grid}, {label_of(measured, worst)}")
            if "head_statistics" in run.tree[f"attention/{grid}"].data_vars:
                heads = run.variable(f"attention/{grid}/head_statistics").sel(step=step).values
                tally.add(
                    _unlike_heads(heads, measured.values),
                    f"attention/{grid}/head_statistics, step {int(step)}",
                )
    return tally.check()


def moments_of(maps: np.ndarray) -> np.ndarray:
    """Return mass (mean) and centroid (y, x from 0 to 1) of maps.

    *Shape:* (..., y, x) -> (..., 3) float64.
    """
    p = maps.astype(np.float64)
    total = p.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        centres = [(p * axis).sum((-2, -1)) / total for axis in _axes(p.shape)]
    return np.stack([total / (p.shape[-2] * p.shape[-1]), *centres], -1)


def head_statistics_of(maps: np.ndarray) -> np.ndarray:
    """Return moments, entropy over space in nats, and the greatest value.

    *Shape:* (..., y, x) -> (..., 5).
    """
    over_space = maps / maps.sum((-2, -1), keepdims=True)
    entropy = -np.where(over_space > 0, over_space * np.log(np.maximum(over_space, 1e-38)), 0).sum(
        (-2, -1)
    )
    return np.concatenate([moments_of(maps), np.stack([entropy, maps.max((-2, -1))], -1)], -1)


def unlike_moments(stored: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return how far moments are from those of stored maps, over what rounding explains.

    *Shape:* (..., y, x), (..., 3) -> (..., 3).

    A map p was stored as p + e with |e| <= r. Its centroid c then moves by at most sum e (y - c) /
    sum p, and that is at most sum r |y - c| / (sum p - sum r).
    """
    p, r = probabilities(stored), rounding(stored).astype(np.float64)
    expected = moments_of(p)
    spread, pixels = r.sum((-2, -1)), p.shape[-2] * p.shape[-1]
    surely: np.ndarray = np.maximum(expected[..., 0] * pixels - spread, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = [spread / pixels + ARITHMETIC * expected[..., 0] + 1e-12]
        for number, axis in enumerate(_axes(p.shape), start=1):
            bounds.append(
                (r * np.abs(axis - expected[..., number, None, None])).sum((-2, -1)) / surely
                + ARITHMETIC
            )
        off: np.ndarray = np.abs(expected - measured) / np.stack(bounds, -1)
    nothing = np.less_equal(surely[..., None], 0) & np.array(
        [False, True, True]
    )  # rounded to nothing: it has no centre
    return np.where(nothing, 0.0, off)


def _axes(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return the centres of pixels along y and along x."""
    return list(np.meshgrid(*((np.arange(n) + 0.5) / n for n in shape[-2:]), indexing="ij"))


def _unlike_heads(heads: np.ndarray, measured: np.ndarray) -> float:
    """Return how far statistics of each head are from the moments of their mean map.

    *Shape:* heads (token, branch, image, layer, head, statistic).
    """
    mass = heads[..., 0].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = [mass.mean(-1), *((mass * heads[..., i]).sum(-1) / mass.sum(-1) for i in (1, 2))]
    off = np.abs(np.stack(expected, -1) - measured[..., 0, :]) / (10 * ARITHMETIC)
    return float(np.max(np.where(np.isnan(off) & np.isnan(measured[..., 0, :]), 0.0, off)))


def check_sums(run: Run) -> Check:
    """Check the sums that a first look reads."""
    if not run.grids or run.status != "complete":
        return Check(
            "sums",
            "not checked",
            f"the run is {run.status}" if run.grids else "no attention maps were recorded",
        )
    tally = Tally(
        "sums", "time_sum and overview are those of the maps", ARITHMETIC, ("float32 arithmetic",)
    )
    maps = {grid: run.attention(grid) for grid in run.grids}
    largest = maps[run.grids[0]]
    size, layers = (
        (largest.sizes["y"], largest.sizes["x"]),
        sum(of_grid.sizes["layer"] for of_grid in maps.values()),
    )
    sums = {
        grid: np.zeros([n for dim, n in of_grid.sizes.items() if dim != "step"], np.float32)
        for grid, of_grid in maps.items()
    }
    stored = run.variable(f"attention/{run.grids[0]}/overview")
    for index, step in enumerate(largest["step"].values):
        overview = np.zeros((largest.sizes["token"], *size), np.float32)
        for grid, of_grid in maps.items():
            part = probabilities(of_grid.isel(step=index).values)
            sums[grid] += part
            overview += resize(part[:, -1].mean(axis=(1, 3)).sum(axis=1), size)
        tally.add(
            relative(overview / layers, stored.sel(step=step).values),
            f"attention/{run.grids[0]}/overview, step {int(step)}",
        )
    for grid, total in sums.items():
        tally.add(
            relative(total, run.variable(f"attention/{grid}/time_sum").values),
            f"attention/{grid}/time_sum",
        )
    return tally.check()


def relative(computed: np.ndarray, recorded: np.ndarray) -> float:
    """Return the greatest difference over the greatest recorded value.

    It is 0 only for the same values, with NaN in the same places.
    """
    if np.array_equal(computed, recorded, equal_nan=True):
        return 0.0
    off, of = unlike(computed, recorded)
    return float(np.abs(off).max() / max(float(np.abs(of).max()), 1e-12))


def apart(computed: np.ndarray, recorded: np.ndarray) -> float:
    """Return the norm of the difference over that of what was recorded.

    It is 0 only for the same values, with NaN in the same places.
    """
    if np.array_equal(computed, recorded, equal_nan=computed.dtype.kind == "f"):
        return 0.0
    off, of = unlike(computed, recorded)
    return float(np.linalg.norm(off) / max(float(np.linalg.norm(of)), 1e-12))


def unlike(computed: np.ndarray, recorded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the differences of two arrays, and the values to measure them by, float64.

    Where both are NaN, or the same infinity, nothing differs. Where only one is, the difference is
    not finite.
    """
    a, b = computed.astype(np.float64), recorded.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, a - b), np.where(np.isfinite(b), b, 0.0)
