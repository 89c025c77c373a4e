"""Show what `experiments.attention_truth` measured: tables, where attention fails, and a figure.

report(scores)                 # {"scenes": scores, "pictures": scores} as text
section(scores)                # the same for docs/attention-truth.md
draw_figure(scores["scenes"])  # AP and mIoU by noise level; AP of every layer and head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw, ImageFont

from experiments.drawing import Colour
from experiments.emojiworld.judge import table
from probe.analysis.masks import interval
from probe.diffusion.loading import BUNDLED
from probe.figures.drawing import heat

INK, FAINT, RULE, PAPER = (24, 26, 32), (110, 114, 124), (226, 228, 232), (255, 255, 255)
# the bundled model's condition, said beside every figure of it
BOUND = "trained to bind nouns to words"
METHODS = {
    "best heads": "attention, best heads",
    "attention": "attention, all heads",
    "against others": "attention, less the other words'",
    "contribution": "contribution",
    "counterfactual": "counterfactual",
    "random": "random weights",
    "other word": "the other subject's word",
    "Gaussian": "centred Gaussian",
    "uniform": "uniform",
}
KINDS = (("AP", "AP"), ("mIoU", "IoU"))  # a column's title, and the score in it
COLOURS: dict[str, Colour] = {
    "best heads": (178, 24, 43),
    "attention": (33, 102, 172),
    "contribution": (118, 42, 131),
    "counterfactual": (27, 120, 55),
    "Gaussian": (150, 110, 40),
    "random": (140, 144, 154),
}


def labels(scores: xr.Dataset) -> dict[str, str]:
    """Return the maps of the tables in their order, with what they are called.

    First come the ceilings, last what knows nothing.
    """
    names = [str(name) for name in scores["map"].values]
    ceilings = {
        name: f"ceiling: the true mask at {name.split('/')[1]}"
        for name in names
        if name.startswith("ceiling/")
    }
    named = {**METHODS, "best heads": f"attention, best {len(scores.attrs['heads'])} heads"}
    return ceilings | {name: label for name, label in named.items() if name in names}


def groups(scores: xr.Dataset) -> dict[str, xr.Dataset]:
    """Return the scores of pictures with one word of known truth, and of those with more.

    A group without pictures is left out.
    """
    parts = {"one subject": scores["things"] == 1, "two subjects": scores["things"] > 1}
    return {
        name: scores.isel(scene=np.flatnonzero(part.values))
        for name, part in parts.items()
        if part.any()
    }


def cell(values: xr.DataArray) -> str:
    """Return the mean over scenes and its interval: 0.74 (0.72 to 0.76). *Shape:* (scene)."""
    bounds = interval(values)
    mean, low, high = (float(bounds[name]) for name in ("mean", "low", "high"))
    if np.isnan(mean):
        return ""
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def over_steps(scores: xr.Dataset, step: Any = None) -> xr.Dataset:
    """Return the mean over steps, or one step."""
    return scores.mean("step") if step is None else scores.sel(step=step)


def by_method(scores: xr.Dataset, step: Any = None) -> list[dict[str, Any]]:
    """Return a row for each map: AP and mIoU of each group."""
    rows = []
    for name, label in labels(scores).items():
        row = {"map": label}
        for group, part in groups(scores).items():
            values = over_steps(part, step).sel(map=name)
            row |= {f"{title}, {group}": cell(values[kind]) for title, kind in KINDS}
        rows.append(row)
    return rows


def by_step(scores: xr.Dataset, of: str) -> list[dict[str, Any]]:
    """Return a row for each map and a column for each noise level, over all scenes."""
    head, rows = "AP" if of == "AP" else "mIoU", []
    for name, label in labels(scores).items():
        values = scores[of].sel(map=name)
        by_level = {f"t = {t}": cell(values.sel(step=t)) for t in scores["step"].values}
        rows.append({head: label, **by_level})
    return rows


def by_layer(scores: xr.Dataset) -> list[dict[str, Any]]:
    """Return a row for each grid and layer, the mean over heads, over all scenes.

    It has AP at each noise level, then AP and mIoU of all.
    """
    rows = []
    for name in map(str, scores["map"].values):
        kind, _, place = name.partition("/")
        if kind in ("grid", "layer"):
            grid, _, path = place.partition("/")
            values = scores.sel(map=name)
            row = {"layer": short(path) if path else f"all of {grid}", "grid": grid}
            for step in scores["step"].values:
                row[f"AP, t = {step}"] = f"{float(values.AP.sel(step=step).mean()):.2f}"
            rows.append(row | {title: cell(values[kind].mean("step")) for title, kind in KINDS})
    return rows


def short(layer: str) -> str:
    """Return a layer's path without the parts that all paths have."""
    for part in ("attentions.", ".transformer_blocks.0.attn2", "_blocks", "_block"):
        layer = layer.replace(part, "")
    return layer


def as_text(results: dict[str, xr.Dataset]) -> str:
    """Return all results as text."""
    scores = results["scenes"]
    parts = [
        f"{how(scores)} The best heads: {best_heads(scores)}.",
        f"Mean over t = {', '.join(map(str, scores['step'].values))}:",
        table(by_method(scores)),
        "By noise level, all pictures:",
        table(by_step(scores, "AP")),
        table(by_step(scores, "IoU")),
        "By grid and layer (mean over heads), all pictures:",
        table(by_layer(scores)),
        failures(scores),
        differences(scores),
    ]
    if (pictures := results.get("pictures")) is not None:
        parts += [how_drawn(pictures), table(by_method(pictures, "all"))]
    return "\n\n".join(parts)


def section(results: dict[str, xr.Dataset]) -> str:
    """Return the part of docs/attention-truth.md between its markers.

    It says what was done, has one table, and says where attention fails.
    """
    scores, pictures = results["scenes"], results.get("pictures")
    parts = groups(scores)
    head = f"map ({BOUND})" if scores.attrs["model"] in BUNDLED else "map"
    rows = []
    for name, label in labels(scores).items():
        row = {head: label}
        for title, kind in KINDS:
            for group, part in parts.items():
                row[f"{title}, {group}"] = cell(over_steps(part)[kind].sel(map=name))
        if pictures is not None:
            known = name in pictures["map"].values
            for title, kind in KINDS:
                value = cell(pictures[kind].sel(map=name, step="all")) if known else ""
                row[f"{title}, generated"] = value
        rows.append(row)
    steps = ", ".join(map(str, scores["step"].values))
    intro = [
        how(scores),
        f"The columns of scenes are means over t = {steps}; in brackets 95% intervals.",
        *([] if pictures is None else [how_drawn(pictures)]),
    ]
    end = f"{differences(scores)} The best heads: {best_heads(scores)}."
    return "\n\n".join([" ".join(intro), table(rows, markdown=True), failures(scores), end])


def model_of(scores: xr.Dataset) -> str:
    """Return the model's name, for the bundled one with how it was trained.

    Its maps are no example of those of other models.
    """
    name = str(scores.attrs["model"])
    return f"{name}, {BOUND}" if name in BUNDLED else name


def how(scores: xr.Dataset) -> str:
    """Return how many pictures did what, as sentences."""
    sets = scores.attrs["sets"]
    return (
        f"{sets['scored']} pictures are scored, with one checkpoint ({model_of(scores)}); "
        f"{sets['ranking']} others ranked the heads, and "
        f"{sets['choosing']} more chose how many to use and each threshold, one for a map and "
        "noise level. Intervals come from resampling pictures."
    )


def how_drawn(pictures: xr.Dataset) -> str:
    """Return how many generated pictures count, and how good their truth is."""
    own = "; ".join(
        f"{what}: {m:.2f} ({low:.2f} to {high:.2f})"
        for what, (m, low, high) in pictures.attrs["segmenter"].items()
    )
    return (
        "Generated pictures (DDIM, 30 steps, guidance 3): means over the recorded steps, for the "
        f"{pictures.sizes['scene']} of {pictures.attrs['drawn']} in which a segmenter sees every "
        "subject. The truth is what it sees; "
        f"its own mIoU on fresh scenes, by number of subjects: {own}."
    )


def differences(scores: xr.Dataset) -> str:
    """Return how much higher the AP of all heads is than that of other maps on the same pictures.

    It is the mean over steps.
    """
    names = {
        "best heads": "the best heads",
        "contribution": "contribution",
        "counterfactual": "the counterfactual map",
        "Gaussian": "a centred Gaussian",
    }
    parts = []
    for name, label in names.items():
        if name in scores["map"].values:
            difference = scores.AP.sel(map="attention") - scores.AP.sel(map=name)
            bounds = interval(difference.mean("step"))
            mean, low, high = (float(bounds[part]) for part in ("mean", "low", "high"))
            parts.append(f"{label} {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    return f"AP of all heads less that of another map, on the same pictures: {', '.join(parts)}."


def best_heads(scores: xr.Dataset) -> str:
    """Return the names of the best heads: up.1.1 head 3, ..."""
    paths = [name.split("/")[2:] for name in scores.attrs["heads"]]
    return ", ".join(f"{short(path)} head {head}" for path, head in paths)


def failures(scores: xr.Dataset) -> str:
    """Return where attention is not a good segmenter, with the numbers."""
    steps = scores["step"].values
    first, last = steps[int(np.argmin(steps))], steps[int(np.argmax(steps))]

    def mean(name: str, of: str = "IoU", step: Any = None, part: xr.Dataset = scores) -> float:
        return float(over_steps(part, step)[of].sel(map=name).mean())

    names = [str(name) for name in scores["map"].values]
    layers = [name for name in names if name.startswith("layer/")]
    layers.sort(key=lambda name: mean(name, "AP"))
    ceiling = next(name for name in names if name.startswith("ceiling/"))
    parts = [
        f"at high noise (all heads: mIoU {mean('attention', step=last):.2f} at t = {last}, "
        f"{mean('attention', step=first):.2f} at t = {first}; "
        f"a centred Gaussian has {mean('Gaussian'):.2f}, the true mask at {ceiling.split('/')[1]} "
        f"{mean(ceiling):.2f})",
        f"in the wrong layer ({short(layers[0].split('/')[2])}: AP {mean(layers[0], 'AP'):.2f}, "
        f"{short(layers[-1].split('/')[2])}: {mean(layers[-1], 'AP'):.2f}; uniform: "
        f"{mean('uniform', 'AP'):.2f})",
    ]
    by_subjects = groups(scores)
    if len(by_subjects) == 2:
        one, two = by_subjects["one subject"], by_subjects["two subjects"]
        parts.append(
            f"and with two subjects (mIoU {mean('attention', part=two):.2f}, "
            f"{mean('attention', part=one):.2f} with one; "
            f"at t = {last} {mean('attention', step=last, part=two):.2f}, the other subject's word "
            f"{mean('other word', step=last, part=two):.2f})"
        )
    return f"Where attention is not a good segmenter: {'; '.join(parts)}."


# --- the figure -----------------------------------------------------------------------------------


def draw_figure(scores: xr.Dataset) -> Image.Image:
    """Return a figure: AP and mIoU by noise level with 95% bands, and AP of each layer and head.

    It is drawn at double size and reduced.
    """
    names = [str(name) for name in scores["map"].values]
    layers = [name.removeprefix("layer/") for name in names if name.startswith("layer/")]
    page = Image.new("RGB", (2400, max(1080, 420 + 84 * len(layers))), PAPER)
    draw = ImageDraw.Draw(page)
    sets = scores.attrs["sets"]
    title = "How good are attention maps? A word's map against the true mask of its subject"
    write(draw, (48, 28), title, 44)
    note = f"{model_of(scores)}; {sets['scored']} scenes that chose nothing"
    write(draw, (48, 90), f"{note}; bands: 95%, from resampling scenes", 28, FAINT)
    shown = [name for name in COLOURS if name in names]
    ceiling = next(name for name in names if name.startswith("ceiling/"))
    for box, of, label in (
        ((120, 230, 700, 860), "AP", "average precision (AP)"),
        ((830, 230, 1410, 860), "IoU", "mIoU, thresholds from other scenes"),
    ):
        lines(draw, box, label, scores[of].sel(map=[ceiling, *shown]))
    x, y = 120, 960
    for name in [ceiling, *shown]:
        label = labels(scores)[name].replace("ceiling: ", "")
        colour = COLOURS.get(name, INK)
        draw.line([(x, y + 16), (x + 44, y + 16)], colour, 6)
        write(draw, (x + 56, y), label, 26, colour)
        x += 110 + round(draw.textlength(label, font=ImageFont.load_default(26)))
        if x > 1180:
            x, y = 120, y + 44
    heat_map(draw, (1790, 230), scores, layers)
    small = page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS)
    return small.quantize(200, dither=Image.Dither.NONE)


def lines(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], label: str, values: xr.DataArray
) -> None:
    """Draw means over scenes against the timestep, with bands. *Shape:* (scene, map, step)."""
    left, top, right, bottom = box
    steps = np.sort(values["step"].values.astype(float))
    bounds = interval(values.sortby("step"))
    span = max(float(steps[-1] - steps[0]), 1.0)

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * (step - steps[0]) / span, bottom - (bottom - top) * value

    write(draw, (left, top - 56), label, 28)
    for tick in np.linspace(0, 1, 6):
        draw.line([at(steps[0], tick), at(steps[-1], tick)], RULE, 2)
        write(draw, (left - 14, at(steps[0], tick)[1]), f"{tick:.1f}", 24, FAINT, "rm")
    for step in steps:
        draw.line([(at(step, 0)[0], bottom), (at(step, 0)[0], bottom + 12)], FAINT, 2)
        write(draw, (at(step, 0)[0], bottom + 18), f"{step:g}", 24, FAINT, "ma")
    write(draw, (right, bottom + 52), "timestep t: more noise to the right", 24, FAINT, "ra")
    for part in ("band", "line"):
        for name in values["map"].values:
            line, colour = bounds.sel(map=name), COLOURS.get(str(name), INK)
            low, mean, high = (
                [at(*point) for point in zip(steps, line[kind].values, strict=True)]
                for kind in ("low", "mean", "high")
            )
            if part == "band" and np.isfinite(line["low"].values).all():
                pale = tuple(round(255 - (255 - c) * 0.2) for c in colour)
                draw.polygon([*low, *reversed(high)], pale)
            elif part == "line":
                draw.line(mean, colour, 6 if str(name) in COLOURS else 4, joint="curve")


def heat_map(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], scores: xr.Dataset, layers: Sequence[str]
) -> None:
    """Draw the AP of each layer and head, the mean over scenes and steps, with its number."""
    mean = scores.AP.mean(("scene", "step"))
    names = [str(name) for name in mean["map"].values]
    heads = max(sum(name.startswith(f"head/{layer}/") for name in names) for layer in layers)
    wide = min(100, 480 // (heads + 1))
    left, top = at
    write(draw, (left - 340, top - 56), "AP of each head, mean over timesteps", 28)
    for column in range(heads + 1):
        x = left + column * wide + (24 if column == heads else 0)
        head = "all" if column == heads else f"{column}"
        write(draw, (x + wide / 2, top + 30), head, 24, FAINT, "md")
    write(draw, (left - 20, top + 30), "head", 24, FAINT, "rd")
    for row, layer in enumerate(layers):
        y = top + 44 + row * 84
        write(draw, (left - 20, y + 26), short(layer.split("/")[1]), 24, INK, "rm")
        write(draw, (left - 20, y + 56), layer.split("/")[0], 22, FAINT, "rm")
        for column in range(heads + 1):
            name = f"layer/{layer}" if column == heads else f"head/{layer}/{column}"
            if name not in names:
                continue
            x = left + column * wide + (24 if column == heads else 0)
            value = float(mean.sel(map=name))
            draw.rectangle((x, y, x + wide - 5, y + 78), colour_of(value))
            if wide >= 60:
                ink = INK if value > 0.55 else PAPER
                write(draw, (x + wide / 2 - 2, y + 40), f"{value:.2f}", 24, ink, "mm")
    y = top + 44 + len(layers) * 84 + 14
    for i in range(240):
        draw.line([(left + i, y), (left + i, y + 16)], colour_of(i / 239))
    write(draw, (left, y + 22), "AP 0", 22, FAINT)
    write(draw, (left + 240, y + 22), "1", 22, FAINT, "ra")


def colour_of(value: float) -> tuple[int, ...]:
    """Return the colour of a number from 0 to 1."""
    return tuple(int(c) for c in heat(np.array(value)))


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: Colour = INK,
    anchor: str = "la",
) -> None:
    draw.text(at, text, fill, font=ImageFont.load_default(size), anchor=anchor)
