"""Stable Diffusion drawn with one run's own numbers, as HTML, and the same numbers in sentences.

    drawing(run, Shown("mid_block", "cond"))    # the whole pipeline, left to right; one block shown
    sentences(run)                # the three parts, the sizes and the shares, said

Everything that is drawn goes through `_said`, which escapes it: a prompt is somebody's text. Blocks
of the UNet and layers of text encoders are buttons with `data-pick` and `data-value`: the page that
shows the drawing says what a press does.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probe.figures import anatomy
from probe.figures.anatomy import Block, Part
from probe.figures.drawing import heat
from probe.figures.guidance import has_preview, png
from probe.figures.page import asset
from probe.format.schema import counted
from probe.reading.recording import Run

ABSENT = "not recorded"
LONGEST = 300  # characters of a prompt
MOST_TOKENS = 40
ON_LATENTS = "A latent is a small grid with a few numbers a place, which stands for the picture."
ON_PIXELS = "Each pixel is three numbers: red, green and blue, from -1 to 1."
NO_VAE = (
    "This model works on the picture's own pixels (f = 1). It has nothing to decode: -1 becomes "
    "black, 1 becomes full colour."
)
SIDE = 112  # pixels of the small pictures
STYLE = f"<style>{asset('anatomy.css')}</style>"


@dataclass(frozen=True)
class Shown:
    """What was chosen to be looked at: a module of the UNet, and a layer of a text encoder."""

    module: str = ""
    branch: str = ""
    image: int = 0
    text: tuple[str, int, int | None] | None = None  # encoder, layer, head (None: their mean)


def drawing(run: Run, shown: Shown = Shown()) -> str:
    """Return the pipeline as HTML, from prompt to picture, and small pictures of what is shown."""
    found = {part.name: part for part in anatomy.parts(run)}
    calls, on_pixels = len(run.steps), run.attributes.model.on_pixels
    last = ("Image decoder", "paints the picture, once, at the end")
    if on_pixels:
        last = ("Picture", "no decoder: what the last step leaves is the picture")
    columns = [
        ("Text understander", "reads the prompt, once", _text(run, found, shown), ""),
        (
            "Image-information creator",
            f"works on {'pixels' if on_pixels else 'latents'}, {counted(calls, 'step')}",
            _creator(run, found, shown),
            "wide",
        ),
        (*last, _decoder(run, found), ""),
    ]
    sections = "".join(
        f"<section class='part{number} {width}'><h2>{number}. {title}</h2>"
        f"<p class='sub'>{sub}</p>{inside}</section>"
        for number, (title, sub, inside, width) in enumerate(columns, 1)
    )
    return f"{STYLE}<div class='anatomy'><div class='flow'>{sections}</div></div>"


def sentences(run: Run) -> list[str]:
    """Return what the numbers of this run say: sizes, and shares of time and of FLOPs."""
    said = []
    tokens = anatomy.tokens(run)
    if tokens:
        positions, features = anatomy.embedding_shape(run, "text_encoder")
        said.append(
            f"Text: the prompt became {counted(len(tokens), 'token')}, start and end among them, "
            f"and padding fills the rest of {positions} positions. The UNet reads {positions} "
            f"vectors of {features} numbers."
        )
    latent, picture = anatomy.latent_shape(run), anatomy.picture_shape(run)
    if latent and picture and run.attributes.model.on_pixels:
        said.append(
            f"No latents: this model has no VAE. Every step works on all {_shape(picture)} = "
            f"{math.prod(picture):,} numbers of the picture."
        )
    elif latent and picture:
        few, many = math.prod(latent), math.prod(picture)
        said.append(
            f"Why latents: a latent has {_shape(latent)} = {few:,} numbers, the picture "
            f"{_shape(picture)} = {many:,}. All steps work on {many / few:.3g} times fewer numbers."
        )
    found = {part.name: part for part in anatomy.parts(run)}
    unet = found.get("unet")
    if unet is not None and unet.time_share is not None and unet.seconds is not None:
        each = f"{_unit(unet.seconds / max(1, unet.calls or 1), 's')} a call"
        said.append(
            f"Time: of the {sum(part.seconds or 0 for part in found.values()):.3g} s that the "
            f"parts took, {unet.time_share:.0%} was the UNet's, {each}.{_without(run)}"
        )
    if unet is not None and unet.flops_share is not None and unet.flops:
        said.append(
            f"Work: one call of the UNet takes {_unit(unet.flops, 'FLOP')}, floating point "
            f"operations. Of those of the whole run {unet.flops_share:.0%} were the UNet's."
        )
    if memory := anatomy.peak_memory(run):
        where = "process" if run.attributes.environment.device == "cpu" else "device"
        said.append(f"Memory: the {where} had {_unit(memory, 'B')} in use at its peak.")
    return said


def _without(run: Run) -> str:
    """Return what the share would be without the decodings that people watched."""
    share, times = anatomy.unet_share_painted_once(run), anatomy.decodings(run)
    if share is None or times is None or times < 2:
        return ""
    return (
        f" The VAE decoded {times} times, {times - 1} of them to show pictures on the way; with "
        f"the last one alone the UNet's share is {share:.0%}."
    )


# --- the three sections --------------------------------------------------------------------------


def _text(run: Run, found: Mapping[str, Part], shown: Shown) -> str:
    prompt = run.attributes.texts["cond"]
    short = prompt if len(prompt) <= LONGEST else prompt[: LONGEST - 1] + "\u2026"
    cards = [_card("Prompt", f"<p class='quote'>{_said(short) or '(empty)'}</p>", "")]
    cards.append(
        _card(
            "Tokens",
            _chips(run),
            "A token is a word or a piece of one. The model knows each by its number.",
        )
    )
    names = dict.fromkeys([*(anatomy.encoders(run) or ["text_encoder"]), *found])
    cards += [
        _encoder(run, name, found.get(name), shown) for name in names if name in anatomy.ENCODERS
    ]
    rows = {
        f"from {name}" if len(anatomy.encoders(run)) > 1 else "shape": (
            f"{_shape(anatomy.embedding_shape(run, name))}, {_dtype(run)}"
        )
        for name in anatomy.encoders(run)
    }
    explained = "An embedding is a token's meaning in its sentence, as a row of numbers."
    cards.append(_card("Embeddings", _table(rows or {"shape": None}), explained))
    return "".join(cards)


def _encoder(run: Run, name: str, part: Part | None, shown: Shown) -> str:
    rows: dict[str, str | None] = {}
    inside = ""
    if name in anatomy.encoders(run):
        layers, heads = run.variable(f"text/{name}/attention").isel(branch=0).shape[:2]
        rows["built of"] = f"{counted(layers, 'layer')} of {counted(heads, 'head')}"
        if anatomy.tokens(run, name):
            inside = _layers(run, name, layers, shown)
    title = "Text encoder" if name == "text_encoder" else "Second text encoder"
    explained = "Each token takes up what stands before it."
    return _card(title, inside + _table(rows | _costs(part)), explained)


def _layers(run: Run, encoder: str, count: int, shown: Shown) -> str:
    """Return a button for each layer of a text encoder, and the attention of the one shown."""
    chosen = shown.text if shown.text and shown.text[0] == encoder else None
    buttons = [
        f"<button type='button' class='chip' data-pick='layer' data-value='{encoder} {number}' "
        f"aria-label='layer {number}' aria-pressed='{_pressed(chosen, number)}'>{number}</button>"
        for number in range(count)
    ]
    group = f"<div class='chips' role='group' aria-label='Layers'>Layers: {''.join(buttons)}</div>"
    if chosen is None:
        return group
    _, layer, head = chosen
    values, _ = anatomy.text_attention(run, encoder, layer, head)
    heads = "mean of all heads" if head is None else f"head {head}"
    caption = f"layer {layer}, {heads}: how much each token (row) attends to those before it"
    return group + _figure(heat(values / max(float(values.max()), 1e-9)), caption)


def _pressed(chosen: tuple[str, int, int | None] | None, layer: int) -> str:
    return "true" if chosen is not None and chosen[1] == layer else "false"


def _chips(run: Run) -> str:
    tokens = anatomy.tokens(run)
    if not tokens:
        return f"<p class='absent'>{ABSENT}: record with capture.text: true</p>"
    positions = anatomy.embedding_shape(run, "text_encoder")[0]
    chips = [
        f"<span class='chip'>{_said(token.label)} <small>{token.number}</small></span>"
        for token in tokens[:MOST_TOKENS]
    ]
    if more := positions - len(chips):
        kind = "of padding" if len(tokens) <= MOST_TOKENS else "more, padding included"
        chips.append(f"<span class='chip'>and {more} {kind}</span>")
    return f"<div class='chips'>{''.join(chips)}</div>"


def _creator(run: Run, found: Mapping[str, Part], shown: Shown) -> str:
    latent, on_pixels = anatomy.latent_shape(run), run.attributes.model.on_pixels
    of = "pixels" if on_pixels else "latents"
    rows: dict[str, str | None] = {
        "takes": None if latent is None else f"{of} {_shape(latent)}, t, embeddings",
        "gives": None if latent is None else f"{_predicts(run)}, {_shape(latent)}, {_dtype(run)}",
    }
    unet = _card(
        "UNet",
        _u(anatomy.blocks(run), shown.module)
        + _curve(run, shown)
        + _table(rows | _costs(found.get("unet"))),
        f"It looks at the noisy {of}, coarser and coarser and back, and says how much of them "
        f"is noise. {ON_PIXELS if on_pixels else ON_LATENTS}",
    )
    sigma = run.variable("sigma").values
    steps = {
        "class": _said(run.attributes.scheduler.kind),
        "steps": f"{len(run.steps)} of {run.variable('committed').size}",
        "noise level": f"sigma {sigma[0]:.3g} to {sigma[-1]:.3g}" if sigma.size else None,
        "parameters": "none: it computes, and learns nothing",
    }
    scheduler = _card(
        "Scheduler",
        _table(steps),
        "It takes a part of the predicted noise away. What is left goes into the UNet again: "
        f"\u21bb {len(run.steps)} times in this run.",
    )
    return unet + scheduler + _pictures(run)


def _predicts(run: Run) -> str:
    return "noise" if run.attributes.prediction_type == "epsilon" else "velocity"


def _u(blocks: list[Block], chosen: str) -> str:
    """Return the blocks as a U: each stands as deep as its grid is coarse."""
    if not blocks:
        return (
            f"<p class='absent'>Blocks {ABSENT}: record with capture.statistics: true, or "
            "capture.attention: maps</p>"
        )
    sizes = sorted({block.grid for block in blocks if block.grid}, key=lambda g: -math.prod(g))
    finest = max((size[1] for size in sizes), default=1)
    cells = []
    for column, block in enumerate(blocks, 1):
        row = sizes.index(block.grid) + 1 if block.grid else len(sizes) + 1
        grid = f"{block.grid[0]} x {block.grid[1]}" if block.grid else "?"
        width = 100 * block.grid[1] / finest if block.grid else 0
        inside = [counted(block.resnets, "ResNet")] if block.resnets else []
        inside += [f"{counted(block.attentions, 'attention')}"] if block.attentions else []
        is_chosen = bool(chosen) and f"{chosen}.".startswith(f"{block.path}.")
        kind, press = "div", ""
        if block.measured:
            pressed = "true" if is_chosen else "false"
            kind = "button"
            press = (
                f"type='button' data-pick='block' data-value='{_said(block.path)}' "
                f"aria-pressed='{pressed}' "
            )
        cells.append(
            f"<{kind} class='block{' chosen' * is_chosen}' {press}"
            f"style='grid-row:{row};grid-column:{column}' "
            f"title='{_said(', '.join([block.path, *inside]))}'><b>{_said(block.name)}</b><br>"
            f"{grid}<br><span class='more'>{'<br>'.join(inside) or '&nbsp;'}</span>"
            f"<i style='width:{width:.0f}%'></i></{kind}>"
        )
    cells += _skips(blocks, sizes)
    columns = f"repeat({len(blocks)},minmax(0,1fr))"
    return (
        f"<div class='u' style='grid-template-columns:{columns}'>{''.join(cells)}</div>"
        "<p>Each block stands as deep as its grid is coarse; the bar is its grid's width. Dashed: "
        "what the way down hands over to the way up.</p>"
    )


def _curve(run: Run, shown: Shown) -> str:
    """Return the output of one module over the steps as a small picture: mean and spread."""
    if not (shown.module and shown.branch and len(run.steps)):
        return ""
    values = anatomy.statistics(run, shown.module, shown.branch, shown.image)
    mean, std = (np.asarray(values[name], np.float64) for name in ("mean", "std"))
    there = np.isfinite(mean + std)
    if there.sum() < 2:
        return ""
    steps, mean, std = run.steps[there], mean[there], std[there]
    low, high = float((mean - std).min()), float((mean + std).max())
    x = 300 * (steps - steps[0]) / (steps[-1] - steps[0])

    def corners(values: np.ndarray) -> list[str]:
        y = 60 - 60 * (values - low) / max(high - low, 1e-12)
        return [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]

    band = " ".join([*corners(mean + std), *corners(mean - std)[::-1]])
    picture = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 300 60' preserveAspectRatio='none'>"
        f"<polygon points='{band}' fill='#808080' fill-opacity='.35'/>"
        f"<polyline points='{' '.join(corners(mean))}' fill='none' stroke='#e69f00' "
        "stroke-width='2' vector-effect='non-scaling-stroke'/></svg>"
    )
    caption = (
        f"Output of {shown.module}, {shown.branch}, from step {steps[0]} to {steps[-1]}: its mean, "
        f"in a band of one standard deviation, which goes from {low:.3g} to {high:.3g}"
    )
    code = base64.b64encode(picture.encode()).decode()
    return (
        f"<figure class='curve'><img alt='{_said(caption)}' src='data:image/svg+xml;base64,{code}'>"
        f"<figcaption>{_said(caption)}</figcaption></figure>"
    )


def _skips(blocks: list[Block], sizes: list[anatomy.Grid]) -> list[str]:
    """Return a line for each pair of blocks, down and up, that have the same grid."""
    lines = []
    for row, size in enumerate(sizes, 1):
        down = [n for n, b in enumerate(blocks, 1) if b.grid == size and b.name[:4] == "down"]
        up = [n for n, b in enumerate(blocks, 1) if b.grid == size and b.name[:2] == "up"]
        if down and up and up[0] - down[-1] > 1:
            between = {b.grid for b in blocks[down[-1] : up[0] - 1]}
            if size not in between:
                lines.append(
                    f"<div class='skip' style='grid-row:{row};"
                    f"grid-column:{down[-1] + 1}/{up[0]}'></div>"
                )
    return lines


def _decoder(run: Run, found: Mapping[str, Part]) -> str:
    picture, vae = anatomy.picture_shape(run), _vae(run, found.get("vae"))
    if picture is None or run.status != "complete":
        return vae + _card("Picture", f"<p class='absent'>{ABSENT} yet</p>", "")
    painted = run.images.isel(image=0).values
    shown = _figure(painted, "The finished picture", smooth=True)
    table = _table({"shape": f"{_shape(picture)}, uint8", "images": str(len(run.images))})
    return vae + _card("Picture", shown + table, "")


def _vae(run: Run, part: Part | None) -> str:
    """Return what is said of the VAE; of a model without one, that there is none."""
    if run.attributes.model.on_pixels:
        return _card("No VAE", "", NO_VAE)
    latent, picture = anatomy.latent_shape(run), anatomy.picture_shape(run)
    rows: dict[str, str | None] = {
        "takes": None if latent is None else f"latents {_shape(latent)}",
        "gives": None if picture is None else f"pixels {_shape(picture)}",
    }
    began = (
        "This run began from noise, so its encoder was not asked."
        if run.source is None
        else "Its encoder made latents of the picture that this run began from."
    )
    return _card(
        "VAE decoder",
        _table(rows | _costs(part)),
        "The VAE was trained to squeeze pictures into latents and to paint them again. "
        f"Parameters are those of both halves. {began}",
    )


def _pictures(run: Run) -> str:
    """Return the first and the last latents as colour; of a model on pixels, the pixels."""
    if not has_preview(run) or not len(run.steps) or not anatomy.latent_shape(run):
        return ""
    first = run.latents.isel(step=0, image=0).astype("float32").load()
    of = "pixels" if run.attributes.model.on_pixels else "latents"
    coloured = run.preview(first / max(float(first.std()), 1e-6)).values
    figures = [_figure(coloured, f"First {of}")]
    if run.status == "complete" and anatomy.holds(run, "latents/final_latents"):
        last = run.variable("latents/final_latents").isel(image=0)
        figures.append(_figure(run.preview(last).values, f"Last {of}"))
    side = max(1, SIDE // max(first.shape[-2:]))
    note = f"As colour, each {of[:-1]} a square of {side} x {side} pixels."
    return _card(of.capitalize(), f"<div class='pictures'>{''.join(figures)}</div>", note)


# --- small pieces --------------------------------------------------------------------------------


def _said(text: object) -> str:
    return html.escape(str(text), quote=True)


def _card(title: str, inside: str, explained: str) -> str:
    words = f"<p>{explained}</p>" if explained else ""
    return f"<div class='part'><h3>{title}</h3>{words}{inside}</div>"


def _table(rows: Mapping[str, str | None]) -> str:
    lines = [
        f"<tr><th>{_said(name)}</th><td>{value or f'<span class=absent>{ABSENT}</span>'}</td></tr>"
        for name, value in rows.items()
    ]
    return f"<table>{''.join(lines)}</table>"


def _costs(part: Part | None) -> dict[str, str | None]:
    """Return rows of what a part weighs and costs."""
    if part is None:
        return dict.fromkeys(("parameters", "weights", "time", "work"))
    often = counted(part.calls, "call") if part.calls else "an unknown number of calls"
    time = work = None
    if part.seconds is not None:
        time = f"{_unit(part.seconds, 's')} in {often}{_bar(part.time_share, 'of the time')}"
    if part.flops is not None:
        work = f"{_unit(part.flops, 'FLOP')} a call{_bar(part.flops_share, 'of the work')}"
    return {
        "parameters": None if part.parameters is None else f"{part.parameters:,}",
        "weights": None if part.weight_bytes is None else _unit(part.weight_bytes, "B"),
        "time": time,
        "work": work,
    }


def _bar(share: float | None, of: str) -> str:
    if share is None:
        return ""
    return f", {share:.1%} {of}<div class='bar'><i style='width:{100 * share:.1f}%'></i></div>"


def _figure(picture: np.ndarray, caption: str, smooth: bool = False) -> str:
    """Return a picture (y, x, rgb) uint8 with its caption; latents keep their squares."""
    height, width = picture.shape[:2]
    times = SIDE / max(height, width) if smooth else max(1, SIDE // max(height, width))
    kept = "" if smooth else "image-rendering:pixelated;"
    code = base64.b64encode(png(picture)).decode()
    return (
        f"<figure><img alt='{_said(caption)}' src='data:image/png;base64,{code}' "
        f"style='{kept}width:{width * times:.0f}px;height:{height * times:.0f}px;display:block'>"
        f"<figcaption>{_said(caption)}</figcaption></figure>"
    )


def _dtype(run: Run) -> str:
    return _said(run.attributes.model.dtype)


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _unit(value: float, unit: str) -> str:
    """Return a number with three digits and the prefix that suits it: 1.95 GFLOP, 46 ms."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        if value >= factor and (unit != "s" or factor == 1):
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{1000 * value:.3g} m{unit}" if unit == "s" else f"{value:.3g} {unit}"
