"""What `experiments.attention_truth` found, for people: tables, a sentence on where attention
fails, and a figure.

told(found, markdown=True)     # {"scenes": scores, "pictures": scores} as text
draw_figure(scores)            # AP and mIoU by noise level; AP of every layer and head
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
COLOURS: dict[str, Colour] = {
    "best heads": (178, 24, 43),
    "attention": (33, 102, 172),
    "contribution": (118, 42, 131),
    "counterfactual": (27, 120, 55),
    "Gaussian": (150, 110, 40),
    "random": (140, 144, 154),
}


def labels(scores: xr.Dataset) -> dict[str, str]:
    """The maps of the tables in their order, with what they are called: first the ceilings, last
    what knows nothing.
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
    """The scores of pictures with one word of known truth, and with more, as far as there are
    any.
    """
    parts = {"one subject": scores["things"] == 1, "two subjects": scores["things"] > 1}
    return {
        name: scores.isel(scene=np.flatnonzero(part.values))
        for name, part in parts.items()
        if part.any()
    }


def cell(values: xr.DataArray) -> str:
    """The mean over scenes and its interval: 0.74 (0.72 to 0.76). *Shape:* (scene)."""
    found = interval(values)
    mean, low, high = (float(found[name]) for name in ("mean", "low", "high"))
    return (
        ""
        if np.isnan(mean)
        else f"{mean:.2f}"
        if np.isnan(low)
        else f"{mean:.2f} ({low:.2f} to {high:.2f})"
    )


def over_steps(scores: xr.Dataset, step: Any = None) -> xr.Dataset:
    """The mean over steps, or one step."""
    return scores.mean("step") if step is None else scores.sel(step=step)


def by_method(scores: xr.Dataset, step: Any = None) -> list[dict[str, Any]]:
    """A row for each map: AP and mIoU of each group."""
    rows = []
    for name, label in labels(scores).items():
        row = {"map": label}
        for group, part in groups(scores).items():
            found = over_steps(part, step).sel(map=name)
            row |= {
                f"{kind}, {group}": cell(found[of]) for kind, of in (("AP", "AP"), ("mIoU", "IoU"))
            }
        rows.append(row)
    return rows


def by_step(scores: xr.Dataset, of: str) -> list[dict[str, Any]]:
    """A row for each map, a column for each noise level, all scenes together."""
    head = "AP" if of == "AP" else "mIoU"
    return [
        {head: label}
        | {
            f"t = {step}": cell(scores[of].sel(map=name, step=step))
            for step in scores["step"].values
        }
        for name, label in labels(scores).items()
    ]


def by_layer(scores: xr.Dataset) -> list[dict[str, Any]]:
    """A row for each grid and layer: AP at each noise level, then mIoU, all scenes together; mean
    over heads.
    """
    rows = []
    for name in map(str, scores["map"].values):
        kind, _, place = name.partition("/")
        if kind in ("grid", "layer"):
            grid, _, path = place.partition("/")
            found = scores.sel(map=name)
            row = {"layer": short(path) if path else f"all of {grid}", "grid": grid}
            row |= {
                f"AP, t = {step}": f"{float(found.AP.sel(step=step).mean()):.2f}"
                for step in scores["step"].values
            }
            rows.append(
                row
                | {
                    head: cell(found[of].mean("step"))
                    for head, of in (("AP", "AP"), ("mIoU", "IoU"))
                }
            )
    return rows


def short(layer: str) -> str:
    """A layer's path without what all of them have."""
    return (
        layer.replace("attentions.", "")
        .replace(".transformer_blocks.0.attn2", "")
        .replace("_blocks", "")
        .replace("_block", "")
    )


def told(found: dict[str, xr.Dataset]) -> str:
    """Everything as text."""
    scores = found["scenes"]
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
    if "pictures" in found:
        parts += [how_drawn(found["pictures"]), table(by_method(found["pictures"], "all"))]
    return "\n\n".join(parts)


def section(found: dict[str, xr.Dataset]) -> str:
    """The part of docs/attention-truth.md between its markers: what was done, one table, and where
    attention fails.
    """
    scores, pictures = found["scenes"], found.get("pictures")
    parts = groups(scores)
    head = f"map ({BOUND})" if scores.attrs["model"] in BUNDLED else "map"
    rows = []
    for name, label in labels(scores).items():
        row = {head: label} | {
            f"AP, {group}": cell(over_steps(part).AP.sel(map=name)) for group, part in parts.items()
        }
        row |= {
            f"mIoU, {group}": cell(over_steps(part).IoU.sel(map=name))
            for group, part in parts.items()
        }
        if pictures is not None:
            there = name in pictures["map"].values
            row |= {
                f"{kind}, generated": cell(pictures[of].sel(map=name, step="all")) if there else ""
                for kind, of in (("AP", "AP"), ("mIoU", "IoU"))
            }
        rows.append(row)
    steps = ", ".join(map(str, scores["step"].values))
    told_of = [
        how(scores),
        f"The columns of scenes are means over t = {steps}; in brackets 95% intervals.",
    ]
    told_of += [] if pictures is None else [how_drawn(pictures)]
    return "\n\n".join(
        [
            " ".join(told_of),
            table(rows, markdown=True),
            failures(scores),
            f"{differences(scores)} The best heads: {best_heads(scores)}.",
        ]
    )


def asked(scores: xr.Dataset) -> str:
    """The model's name; of the bundled one also how it was trained, as its maps are no example of
    what others have.
    """
    name = str(scores.attrs["model"])
    return f"{name}, {BOUND}" if name in BUNDLED else name


def how(scores: xr.Dataset) -> str:
    """How many pictures did what."""
    sets = scores.attrs["sets"]
    return (
        f"{sets['scored']} pictures are scored, with one checkpoint ({asked(scores)}); "
        f"{sets['ranking']} others ranked the heads, and "
        f"{sets['choosing']} more chose how many to use and each threshold, one for a map and "
        "noise level. Intervals come from resampling pictures."
    )


def how_drawn(pictures: xr.Dataset) -> str:
    """How many generated pictures count, and what their truth is worth."""
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
    """How much higher the AP of all heads is than that of other maps, on the same pictures, mean
    over steps.
    """
    names = {
        "best heads": "the best heads",
        "contribution": "contribution",
        "counterfactual": "the counterfactual map",
        "Gaussian": "a centred Gaussian",
    }
    said = []
    for name, label in names.items():
        if name in scores["map"].values:
            found = interval(
                (scores.AP.sel(map="attention") - scores.AP.sel(map=name)).mean("step")
            )
            said.append(
                f"{label} {float(found['mean']):+.3f} ({float(found.low):+.3f} to "
                f"{float(found.high):+.3f})"
            )
    return f"AP of all heads less that of another map, on the same pictures: {', '.join(said)}."


def best_heads(scores: xr.Dataset) -> str:
    """Their names: up.1.1 head 3, ..."""
    return ", ".join(
        f"{short(path)} head {head}"
        for _, _, path, head in (name.split("/") for name in scores.attrs["heads"])
    )


def failures(scores: xr.Dataset) -> str:
    """Where attention is not a good segmenter, with the numbers."""
    first, last = (
        scores["step"].values[i]
        for i in (int(np.argmin(scores["step"].values)), int(np.argmax(scores["step"].values)))
    )

    def mean(name: str, of: str = "IoU", step: Any = None, part: xr.Dataset = scores) -> float:
        return float(over_steps(part, step)[of].sel(map=name).mean())

    names = [str(name) for name in scores["map"].values]
    layers = sorted(
        (name for name in names if name.startswith("layer/")), key=lambda name: mean(name, "AP")
    )
    ceiling = next(name for name in names if name.startswith("ceiling/"))
    said = [
        f"at high noise (all heads: mIoU {mean('attention', step=last):.2f} at t = {last}, "
        f"{mean('attention', step=first):.2f} at t = {first}; "
        f"a centred Gaussian has {mean('Gaussian'):.2f}, the true mask at {ceiling.split('/')[1]} "
        f"{mean(ceiling):.2f})",
        f"in the wrong layer ({short(layers[0].split('/')[2])}: AP {mean(layers[0], 'AP'):.2f}, "
        f"{short(layers[-1].split('/')[2])}: {mean(layers[-1], 'AP'):.2f}; uniform: "
        f"{mean('uniform', 'AP'):.2f})",
    ]
    parts = groups(scores)
    if len(parts) == 2:
        one, two = parts["one subject"], parts["two subjects"]
        said.append(
            f"and with two subjects (mIoU {mean('attention', part=two):.2f}, "
            f"{mean('attention', part=one):.2f} with one; "
            f"at t = {last} {mean('attention', step=last, part=two):.2f}, the other subject's word "
            f"{mean('other word', step=last, part=two):.2f})"
        )
    return f"Where attention is not a good segmenter: {'; '.join(said)}."


# --- the figure -----------------------------------------------------------------------------------


def draw_figure(scores: xr.Dataset) -> Image.Image:
    """AP and mIoU by noise level with 95% bands, and AP of each layer and head.

    Drawn at double size and reduced.
    """
    layers = [
        str(name).removeprefix("layer/")
        for name in scores["map"].values
        if str(name).startswith("layer/")
    ]
    page = Image.new("RGB", (2400, max(1080, 420 + 84 * len(layers))), PAPER)
    draw = ImageDraw.Draw(page)
    sets = scores.attrs["sets"]
    write(
        draw,
        (48, 28),
        "How good are attention maps? A word's map against the true mask of its subject",
        44,
    )
    note = (
        f"{asked(scores)}; {sets['scored']} scenes that chose nothing; bands: 95%, from resampling "
        "scenes"
    )
    write(draw, (48, 90), note, 28, FAINT)
    shown = [name for name in COLOURS if name in scores["map"].values]
    ceiling = next(str(name) for name in scores["map"].values if str(name).startswith("ceiling/"))
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
    return page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).quantize(
        200, dither=Image.Dither.NONE
    )


def lines(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], label: str, values: xr.DataArray
) -> None:
    """Means over scenes against the timestep, with bands. *Shape:* (scene, map, step)."""
    left, top, right, bottom = box
    steps = np.sort(values["step"].values.astype(float))
    found = interval(values.sortby("step"))
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
            of, colour = found.sel(map=name), COLOURS.get(str(name), INK)
            low, mean, high = (
                [at(*point) for point in zip(steps, of[kind].values, strict=True)]
                for kind in ("low", "mean", "high")
            )
            if part == "band" and np.isfinite(of["low"].values).all():
                draw.polygon(
                    [*low, *reversed(high)], tuple(round(255 - (255 - c) * 0.2) for c in colour)
                )
            elif part == "line":
                draw.line(mean, colour, 6 if str(name) in COLOURS else 4, joint="curve")


def heat_map(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], scores: xr.Dataset, layers: Sequence[str]
) -> None:
    """AP of each layer and head, mean over scenes and steps, with its number."""
    mean = scores.AP.mean(("scene", "step"))
    names = [str(name) for name in mean["map"].values]
    heads = max(sum(name.startswith(f"head/{layer}/") for name in names) for layer in layers)
    wide = min(100, 480 // (heads + 1))
    left, top = at
    write(draw, (left - 340, top - 56), "AP of each head, mean over timesteps", 28)
    for column in range(heads + 1):
        x = left + column * wide + (24 if column == heads else 0)
        write(
            draw,
            (x + wide / 2, top + 30),
            "all" if column == heads else f"{column}",
            24,
            FAINT,
            "md",
        )
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
            draw.rectangle(
                (x, y, x + wide - 5, y + 78), tuple(int(c) for c in heat(np.array(value)))
            )
            if wide >= 60:
                write(
                    draw,
                    (x + wide / 2 - 2, y + 40),
                    f"{value:.2f}",
                    24,
                    INK if value > 0.55 else PAPER,
                    "mm",
                )
    y = top + 44 + len(layers) * 84 + 14
    for i in range(240):
        draw.line(
            [(left + i, y), (left + i, y + 16)], tuple(int(c) for c in heat(np.array(i / 239)))
        )
    write(draw, (left, y + 22), "AP 0", 22, FAINT)
    write(draw, (left + 240, y + 22), "1", 22, FAINT, "ra")


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: Colour = INK,
    anchor: str = "la",
) -> None:
    draw.text(at, text, fill, font=ImageFont.load_default(size), anchor=anchor)
