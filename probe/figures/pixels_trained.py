"""The trained demonstration as plotly figures: quality against cost, at 64 pixels, on emoji.

quality(trained, "recognised", "flops", "charged")
said(trained, "recognised", "flops", "charged")     # what may be said of it, in sentences

`trained` is what `probe.reading.pixels.trained` returns. A point is a kept checkpoint of one seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import plotly.graph_objects as go

from probe.figures.pixels_looks import LOOKS, Shown, flops_text, laid_out, line, space_text

SCORE = "python -m experiments.pixels.score"
TRAIN = f"python -m experiments.pixels.train\n{SCORE}"
MISSING = (
    "Nothing is trained yet. From a checkout, this trains one UNet on pixels and on latents of "
    "f = 2, 4 and 8, and scores it; it goes on where it was interrupted:"
)

Trained: TypeAlias = Mapping[str, Any]
Quality = Literal["recognised", "kid"]
Axis = Literal["steps", "pictures", "flops", "seconds"]
Charge = Literal["charged", "amortised", "free"]
QUALITIES: dict[Quality, str] = {
    "recognised": "recognised: subject and setting, %",
    "kid": "KID, less is better",
}
SHORT: dict[Quality, str] = {"recognised": "% recognised", "kid": "KID"}  # room on a narrow page
AXES: dict[Axis, str] = {
    "steps": "training steps",
    "pictures": "pictures seen in training",
    "flops": "FLOPs of training",
    "seconds": "seconds of training",
}
CHARGES: dict[Charge, tuple[str, float]] = {
    "charged": ("autoencoder charged", 1.0),
    "amortised": ("amortised over 10 models", 0.1),
    "free": ("autoencoder free", 0.0),
}
COSTLY: tuple[Axis, ...] = ("flops", "seconds")  # what an autoencoder can be charged in
TO_RANK = 4  # seeds: with fewer the points are shown, and nothing is ranked
# The 97.5th percentile of Student's t by degrees of freedom.
STUDENT = {3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


class Score(NamedTuple):
    """A score and its 95 % interval."""

    value: float
    low: float
    high: float


def score_of(record: Mapping[str, Any], quality: Quality) -> Score:
    """Return a score of a checkpoint or of an autoencoder's round trip: per cent, or KID."""
    name, times = ("both", 100.0) if quality == "recognised" else ("kid", 1.0)
    return Score(*(times * float(value) for value in record[name]))


def factors_of(trained: Trained) -> list[int]:
    """Return the f of which there are denoisers."""
    return sorted({int(run["f"]) for run in trained["runs"]})


def seeds_of(trained: Trained) -> list[int]:
    """Return the seeds that every f was trained with."""
    by_f: dict[int, set[int]] = {}
    for run in trained["runs"]:
        by_f.setdefault(int(run["f"]), set()).add(int(run["seed"]))
    return sorted(set.intersection(*by_f.values())) if by_f else []


def autoencoder_of(trained: Trained, f: int) -> Mapping[str, Any] | None:
    """Return the record of an autoencoder; of f = 1 that of the scenes themselves."""
    return next((one for one in trained["autoencoders"] if one["f"] == f), None)


def cost_of(
    trained: Trained, run: Mapping[str, Any], point: Mapping[str, Any], x: Axis, charge: Charge
) -> float:
    """Return what a checkpoint cost, with the part of its autoencoder that it is charged with."""
    if x == "pictures":
        return float(point["step"] * run["batch"])
    if x == "steps":
        return float(point["step"])
    autoencoder = autoencoder_of(trained, run["f"]) or {}
    return float(point[x]) + CHARGES[charge][1] * float(autoencoder.get(x, 0.0))


# --- quality against cost -------------------------------------------------------------------------


def quality(trained: Trained, y: Quality, x: Axis, charge: Charge) -> Shown:
    """Return quality against cost: a line or points for each f, and each round trip's own score."""
    figure = go.Figure()
    alone = len(trained["seeds"]) == 1
    for run in trained["runs"]:
        figure.add_trace(_curve(trained, run, y, x, charge, alone))
    costs = [
        cost_of(trained, run, point, x, charge)
        for run in trained["runs"]
        for point in run["points"]
    ]
    ends = [min(costs), max(costs)] if costs else [1, 2]
    for f in factors_of(trained):
        autoencoder = autoencoder_of(trained, f)
        if autoencoder is None:
            continue
        score = score_of(autoencoder, y)
        name = "the scenes themselves" if f == 1 else f"round trip alone, f = {f}"
        figure.add_trace(
            go.Scatter(
                x=ends,
                y=[score.value] * 2,
                mode="lines",
                name=name,
                line={"color": LOOKS[f][0], "dash": "dot", "width": 1.5},
                hovertemplate=f"{name}: %{{y:.4g}}<extra></extra>",
            )
        )
    figure.update_xaxes(type="log", title_text=AXES[x], exponentformat="power")
    figure.update_yaxes(title_text=SHORT[y])
    charged = CHARGES[charge][0] if x in COSTLY else "the denoiser's own, without the autoencoder's"
    title = f"{trained['title']}: quality against {AXES[x]}<br>{charged}"
    return Shown("quality", laid_out(figure, title, height=460), _caption(trained, y), TRAIN)


def _curve(
    trained: Trained, run: Mapping[str, Any], y: Quality, x: Axis, charge: Charge, alone: bool
) -> go.Scatter:
    """Return one denoiser's checkpoints. Lines join them if there is one seed; else only points."""
    f, points = int(run["f"]), run["points"]
    scores = [score_of(point, y) for point in points]
    said = [
        f"{space_text(f)}, seed {run['seed']}, {point['step']} steps: {score.value:.3g} "
        f"({score.low:.3g} to {score.high:.3g})"
        for point, score in zip(points, scores, strict=True)
    ]
    xs = [cost_of(trained, run, point, x, charge) for point in points]
    trace = line(xs, [score.value for score in scores], space_text(f), f, "solid", said)
    trace.update(hovertemplate="%{customdata}<extra></extra>", legendgroup=str(f))
    trace.update(showlegend=run["seed"] == trained["seeds"][0])
    if not alone:
        return trace.update(mode="markers")
    above = [score.high - score.value for score in scores]
    below = [score.value - score.low for score in scores]
    return trace.update(error_y={"type": "data", "array": above, "arrayminus": below})


def _caption(trained: Trained, y: Quality) -> str:
    what = (
        "Recognised are pictures in which another network finds the subject and the setting that "
        "were asked for."
        if y == "recognised"
        else "KID says how far the pictures are from fresh scenes, in features of a network that "
        "is not the judge."
    )
    bars = (
        "Bars are 95 % intervals over the pictures of a checkpoint, not over trainings."
        if len(trained["seeds"]) == 1
        else "Each point is one seed; move over it for its 95 % interval over pictures."
    )
    return (
        f"The same UNet, trained on pixels and on latents of f = 2, 4 and 8; {trained['calls']} "
        f"calls draw each picture. {what} {bars} Dotted: what the autoencoder's round trip alone "
        "scores, which no denoiser on its latents is expected to pass."
    )


# --- what may be said of it -----------------------------------------------------------------------


def said(trained: Trained, y: Quality, x: Axis, charge: Charge) -> list[str]:
    """Return what may be said of the seeds, of ceilings and of differences, in sentences."""
    seeds = seeds_of(trained)
    sentences = [_of_seeds(len(seeds))]
    grids = {int(run["f"]): int(run["grid"]) for run in trained["runs"]}
    if 8 in grids:
        sentences.append(
            f"f = 8 leaves {grids[8]} x {grids[8]} latents of a picture of {trained['pixels']} "
            "pixels: little room. In Stable Diffusion it leaves 64 x 64."
        )
    at_ceiling = [f for f in factors_of(trained) if reaches_ceiling(trained, f, y)]
    sentences += [
        f"{space_text(f).capitalize()}: the last score reaches what "
        f"{'the scenes themselves have' if f == 1 else 'the round trip alone has'}. That is a "
        "ceiling; no difference is reported from it."
        for f in at_ceiling
    ]
    if len(seeds) >= TO_RANK:
        for one, two in itertools.combinations(factors_of(trained), 2):
            if one not in at_ceiling and two not in at_ceiling:
                sentences.append(_difference(trained, one, two, y, x, charge))
    return sentences


def _of_seeds(count: int) -> str:
    if count == 1:
        return "One seed: how much another training would differ is not known."
    if count < TO_RANK:
        return f"{count} seeds: each is a point, and with so few nothing is ranked."
    return (
        f"{count} seeds: differences are paired by seed, at the greatest cost that all reached; "
        "the interval is 95 %, over trainings."
    )


def reaches_ceiling(trained: Trained, f: int, y: Quality) -> bool:
    """Tell whether the last score of an f, of any seed, is not told apart from its round trip's."""
    autoencoder = autoencoder_of(trained, f)
    if autoencoder is None:
        return False
    ceiling = score_of(autoencoder, y)
    last = [score_of(run["points"][-1], y) for run in trained["runs"] if run["f"] == f]
    if y == "recognised":
        return any(score.high >= ceiling.low for score in last)
    return any(score.low <= ceiling.high for score in last)


def common_cost(trained: Trained, x: Axis, charge: Charge) -> float:
    """Return the greatest cost that every denoiser reached."""
    return min(cost_of(trained, run, run["points"][-1], x, charge) for run in trained["runs"])


def score_at(
    trained: Trained, run: Mapping[str, Any], y: Quality, x: Axis, charge: Charge, cost: float
) -> float | None:
    """Return a denoiser's score at a cost, between checkpoints on a line over log cost.

    None if its first checkpoint cost more.
    """
    costs = [cost_of(trained, run, point, x, charge) for point in run["points"]]
    if cost < costs[0] * (1 - 1e-9):
        return None
    values = [score_of(point, y).value for point in run["points"]]
    return float(np.interp(math.log(cost), np.log(costs), values))


def paired_difference(
    trained: Trained, one: int, two: int, y: Quality, x: Axis, charge: Charge
) -> Score | None:
    """Return the mean of f = two less f = one over seeds at equal cost, and its 95 % interval.

    Student's t over the differences of the same seeds. None without at least four of them.
    """
    cost = common_cost(trained, x, charge)
    values: dict[tuple[int, int], float | None] = {
        (run["f"], run["seed"]): score_at(trained, run, y, x, charge, cost)
        for run in trained["runs"]
    }
    pairs = [(values[two, seed], values[one, seed]) for seed in seeds_of(trained)]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if len(differences) < TO_RANK:
        return None
    mean = float(np.mean(differences))
    free = len(differences) - 1
    half = STUDENT.get(free, 1.96 + 2.6 / free) * float(np.std(differences, ddof=1))
    half /= math.sqrt(len(differences))
    return Score(mean, mean - half, mean + half)


def _difference(trained: Trained, one: int, two: int, y: Quality, x: Axis, charge: Charge) -> str:
    pair = f"f = {two} less f = {one}"
    found = paired_difference(trained, one, two, y, x, charge)
    if found is None:
        return f"{pair}: not all of them reached the same cost."
    unit = "points" if y == "recognised" else "of KID"
    better, worse = (two, one) if (found.value > 0) == (y == "recognised") else (one, two)
    verdict = (
        f"f = {better} is better than f = {worse}"
        if found.low > 0 or found.high < 0
        else "not told apart"
    )
    return f"{pair}: {found.value:+.3g} {unit} ({found.low:+.3g} to {found.high:+.3g}), {verdict}."


# --- distances against the number of pictures, rate and distortion --------------------------------


def by_count(trained: Trained, what: Literal["fd", "kid"]) -> Shown:
    """Return FD or KID against the number of pictures that it was computed from."""
    figure = go.Figure()
    rows = [(run["points"][-1], int(run["f"]), "solid", "") for run in trained["runs"]]
    rows += [(one, int(one["f"]), "dot", "round trip, ") for one in trained["autoencoders"]]
    for record, f, dash, before in rows:
        found = record.get("by_count")
        if not found:
            continue
        counts, values = found["count"], [float(value) for value in found[what]]
        name = "the scenes themselves" if before and f == 1 else before + space_text(f)
        texts = [
            f"{name}, {count} pictures: {value:.4g}"
            for count, value in zip(counts, values, strict=True)
        ]
        trace = line(counts, values, name, f, dash, texts)
        figure.add_trace(trace.update(hovertemplate="%{customdata}<extra></extra>"))
    unit = "FD" if what == "fd" else QUALITIES["kid"]
    figure.update_xaxes(type="log", title_text="pictures", tickvals=[48, 96, 192, 384, 768])
    figure.update_yaxes(title_text=unit)
    caption = (
        "The Frechet distance (FD) falls with the number of pictures, also of the scenes "
        "themselves: two numbers of different counts cannot be held against each other."
        if what == "fd"
        else "KID is unbiased: with more pictures it does not fall, it only becomes surer. Near "
        "zero it may also lie below."
    )
    title = f"{trained['title']}: {'FD' if what == 'fd' else 'KID'} by the number of pictures"
    return Shown(f"by_count_{what}", laid_out(figure, title), caption, SCORE)


def distortion(trained: Trained, what: Literal["psnr", "ssim"]) -> Shown:
    """Return what a round trip through each autoencoder keeps, of scenes and of photographs."""
    figure = go.Figure()
    coders = sorted(
        (one for one in trained["autoencoders"] if "scenes" in one), key=lambda one: one["f"]
    )
    looks = (("scenes", 4, "solid"), ("photographs", 1, "dash"))
    for name, look, dash in looks:
        values = [float(one[name][what]) for one in coders]
        texts = [
            f"f = {one['f']}, {name}: {value:.4g}"
            for one, value in zip(coders, values, strict=True)
        ]
        factors = [int(one["f"]) for one in coders]
        trace = line(factors, values, name, look, dash, texts)
        figure.add_trace(trace.update(hovertemplate="%{customdata}<extra></extra>"))
    ticks = [int(one["f"]) for one in coders]
    figure.update_xaxes(
        type="log",
        title_text="f: pixels per latent along one side",
        tickvals=ticks,
        ticktext=[f"{f}<br>{_rate(trained, f)}" for f in ticks],
    )
    figure.update_yaxes(title_text="PSNR in dB, median" if what == "psnr" else "SSIM, median")
    caption = (
        "Pictures went through encoder and decoder and are held against themselves. Below each f "
        "stands by how much its latents are fewer numbers than the pixels. The scenes are fresh; "
        "photographs are nothing that an autoencoder of emoji was trained on."
    )
    title = f"{trained['title']}: what a round trip keeps"
    return Shown(f"distortion_{what}", laid_out(figure, title), caption, SCORE)


def _rate(trained: Trained, f: int) -> str:
    """Return how many times fewer numbers the latents of an f have than the picture."""
    run = next((run for run in trained["runs"] if run["f"] == f), None)
    channels = int(run["channels"]) if run else 4
    return f"{3 * f * f / channels:.3g} x fewer"


def trained_rows(trained: Trained) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a table: what was trained of each f, and what it costs."""
    heads = [
        "f",
        "grid",
        "attends on",
        "parameters",
        "learning rate",
        "calls a picture",
        "FLOPs of a call",
        "last step",
        "seconds of training",
        "seconds a picture",
        "autoencoder: parameters",
        "autoencoder: seconds",
    ]
    rows = []
    for run in trained["runs"]:
        if run["seed"] != trained["seeds"][0]:
            continue
        last, coder = run["points"][-1], autoencoder_of(trained, run["f"]) or {}
        rows.append(
            [
                str(run["f"]),
                f"{run['channels']} x {run['grid']} x {run['grid']}",
                ", ".join(f"{side} x {side}" for side in _listed(run["attention_grids"])),
                f"{run['parameters']:,}",
                f"{run['learning_rate']:g}",
                str(trained["calls"]),
                flops_text(run["call_flops"]),
                f"{last['step']:,}",
                f"{last['seconds']:,.0f}",
                f"{last['sampling_seconds']:.3g}",
                f"{coder['parameters']:,}" if "parameters" in coder else "none",
                f"{coder['seconds']:,.0f}" if "seconds" in coder else "none",
            ]
        )
    return heads, rows


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
