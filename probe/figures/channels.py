"""The maps of a run as channels of the player: one for each word or token, start, end and padding.

channels(run, of="contribution")      # read in another way
channels(run, per="tokens")           # a channel for each token
layers_and_heads(run, 1)              # one channel in every layer and head
places(run, (3, 5), (8, 9))           # where some places of the picture look
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import xarray as xr

from probe import analysis
from probe.analysis.maps import resize
from probe.arguments import branch_name, one_of, whole_number
from probe.errors import ExperimentError, RecordingNotFound
from probe.figures.payload import Part, finite, numbers, pack
from probe.reading.choice import slice_of
from probe.reading.recording import Run

Reading = Literal["attention", "contribution", "counterfactual"]  # of a word
Per = Literal["words", "tokens"]
THUMBNAIL = 16  # the side of a map among layers and heads
READ_AT_ONCE = 16 * 2**20  # bytes of maps
RANKED = 6  # heads that are named
KINDS = {"start": ("BOS",), "words": ("words", "other"), "end": ("EOS",), "padding": ("rest",)}
UNITS = {
    "attention": "% of a place's attention",
    "contribution": "attention times |v W_O|, in units of the layers' outputs",
    "counterfactual": "|prediction - prediction without the word|, in units of the prediction",
    "self-attention": "% of the chosen places' self-attention",
}

NOTES = {  # beside a map, and in a sentence
    "attention": (
        "mean over layers and heads",
        "Where it looked: of each place's attention, the share that this word got.",
    ),
    "contribution": (
        "attention times what is written",
        "What was written there: attention times the size of what the word's tokens write.",
    ),
    "counterfactual": (
        "change of the prediction without it",
        "What the word did: how much the prediction changes there without it.",
    ),
    "self-attention": (
        "mean over layers, heads and the chosen places",
        "Where these places look: click a place, or draw over several.",
    ),
}


def axis_of(run: Run) -> str:
    """Return the dimension along which a run's pictures lie."""
    return "image" if run.kind == "generation" else "draw"


def offers(run: Run) -> dict[str, Any]:
    """Return what else a player may ask of a recording: readings, branches, channels, places."""
    maps, groups = [run.tree[f"attention/{grid}"] for grid in run.grids], run.tree.children
    readings = ["attention"] if maps else []
    if maps and all("head_statistics" not in group.data_vars for group in maps):
        readings.append("contribution")
    readings += ["counterfactual"] * ("counterfactual" in groups)
    readings += ["self-attention"] * ("self_attention" in groups)
    branches = run.attention()["branch"].values.tolist() if maps else []
    latents = run.latents.sizes["channel"] if "latents" in groups else 0
    return {"readings": readings, "branches": branches, "latents": latents}


def overview(run: Run) -> tuple[dict[str, Any], Part]:
    """Return the stored mean over images, layers and heads as channels: one small variable."""
    maps = run.overview()
    group = f"attention/{run.grids[0]}"
    labels = {
        name: ("token", run.variable(f"{group}/{name}").isel(branch=-1).values)
        for name in ("word", "word_index", "token_text")
    }
    branch = str(run.variable(f"{group}/word")["branch"].values[-1])
    return _as_channels(run, maps.assign_coords(labels), branch, "attention", "words", "mean")


def channels(
    run: Run, of: Reading = "attention", branch: str = "cond", per: Per = "words", image: int = 0
) -> bytes:
    """Return a payload with a run's maps: a channel for each word or token, start, end, padding.

    Raise RecordingNotFound, which names the setting, if they were not recorded.
    """
    one_of("of", of, get_args(Reading))
    one_of("per", per, get_args(Per))
    branch_name(branch)
    at = {axis_of(run): whole_number("image", image, 0)}
    if of == "counterfactual":
        change = run.counterfactual()
        _check_image(run, change, image)
        change = change.isel(at).load()
        change = change.isel(step=np.isfinite(change.values).all(axis=(1, 2, 3)))
        about = _about(of, "cond", change["step"].values)
        about["channels"] = [
            {"label": str(w), "kind": "word"} for w in change["masked_word"].values
        ]
        about["snippets"] = {
            "word": "run.counterfactual().sel(step={step}).isel(masked_word={word}, "
            f"{axis_of(run)}={image}){{mean}}"
        }
        return pack(about, {"maps": numbers(change.values)})
    maps = run.token_maps(of=of, branch=branch, images=[image]).isel({axis_of(run): 0})
    about, part = _as_channels(run, maps, branch, of, per, image)
    return pack(about, {"maps": part})


def _about(of: str, branch: str, steps: np.ndarray) -> dict[str, Any]:
    """Return what a player is told of every kind of maps."""
    note, sentence = NOTES[of]
    said = {"unit": UNITS[of], "note": note, "about": sentence, "of": of, "branch": branch}
    return {**said, "map_steps": steps.tolist()}


def _as_channels(
    run: Run, maps: xr.DataArray, branch: str, of: str, per: str, image: int | str
) -> tuple[dict[str, Any], Part]:
    """Return maps (step, token, y, x) as one for each word or token, then start, end, padding."""
    kinds = analysis.token_kinds(maps).values
    values = maps.transpose("step", "token", "y", "x").values
    ends = [] if per == "tokens" else ["start", "end", "padding"]
    if per == "tokens":
        listed = _token_channels(maps)
        groups = [np.array([index]) for index in range(maps.sizes["token"])]
    else:
        cut, split = run.cut(branch)
        words = analysis.word_maps(maps.isel(step=slice(0, 1)), cut=cut, split=split)  # labels
        listed = [{"label": str(word), "kind": "word"} for word in words["word"].values]
        numbered = maps["word_index"].values
        groups = [np.flatnonzero(numbered == place) for place in words["word_index"].values]
    listed += [{"label": name, "kind": name} for name in ends]
    groups += [np.flatnonzero(np.isin(kinds, KINDS[name])) for name in ends]
    every = np.empty((len(values), len(groups), *values.shape[2:]), np.float32)
    for place, tokens in enumerate(groups):
        _sum_of(values, tokens, every[:, place])
    about = _about(of, branch, maps["step"].values) | {"channels": listed, "per": per}
    about["snippets"] = _snippets(run, of, branch, per, image)
    if of == "attention":  # of all that is looked at, whatever the word
        means = values.mean(axis=(2, 3))
        about["shares"] = {
            name: finite(means[:, np.isin(kinds, parts)].sum(axis=1))
            for name, parts in KINDS.items()
        }
    return about, numbers(every, apart=[1])


def _sum_of(values: np.ndarray, tokens: np.ndarray, out: np.ndarray) -> None:
    """Write the sum of some tokens' maps (step, token, y, x) into `out` (step, y, x)."""
    out[...] = values[:, tokens[0]] if len(tokens) else 0
    for token in tokens[1:]:
        out += values[:, token]


def _token_channels(maps: xr.DataArray) -> list[dict[str, str]]:
    """Return a channel's label and kind for each token."""
    names = {"BOS": "start", "EOS": "end", "rest": "padding"}
    listed = []
    for kind, text, place in zip(
        analysis.token_kinds(maps).values,
        maps["token_text"].values,
        maps["token"].values,
        strict=True,
    ):
        name = names.get(str(kind), "word")
        own = str(text).removesuffix("</w>")
        numbered = f"padding {place}" if name == "padding" and place >= 0 else name
        listed.append({"label": own if name == "word" else numbered, "kind": name})
    return listed


def _snippets(
    run: Run, of: str, branch: str, per: str, image: int | str, layer: bool = False
) -> dict[str, str]:
    """Return the Python that gives a channel's map, of all layers or of one layer and head.

    The player fills in {step}, {mean}, {word}, {kind}, {layer} and {head}.
    """
    axis = axis_of(run)
    options = [f"of={of!r}"] * (of != "attention") + [f"branch={branch!r}"] * (branch != "cond")
    options += ["layers='{layer}', over=()"] * layer
    given = ", ".join(options)
    end = f".mean({axis!r})" if image == "mean" else f".isel({axis}={image})"
    end += ".isel(layer=0, head={head})" * layer + "{mean}"
    if per == "tokens":
        return {"word": f"run.token_maps({given}).sel(step={{step}}).isel(token={{word}}){end}"}
    sums = f"probe.analysis.by_kind(run.token_maps({given}))"
    return {
        "word": f"run.word_maps({given}).sel(step={{step}}).isel(word={{word}}){end}",
        "kind": f"{sums}.sel(step={{step}}, kind='{{kind}}'){end}",
    }


def layers_and_heads(
    run: Run, channel: int, branch: str = "cond", per: Per = "words", image: int = 0
) -> bytes:
    """Return a payload with one channel of the maps in every layer and head, each 16 x 16.

    *Shape:* (step, layer, head, y, x), layers in the order of the network. The header has each
    layer's share of attention at every step, and the heads that give most, as (layer, head, share).
    Raise RecordingNotFound if there is no such channel.
    """
    branch_name(branch)
    one_of("per", per, get_args(Per))
    if not run.grids:
        raise RecordingNotFound(
            f"{run.name} has no attention maps.", "Record with capture.attention: maps."
        )
    layers: dict[str, np.ndarray] = {}
    shares: dict[str, np.ndarray] = {}  # (step, head)
    steps: list[int] = []
    for grid in run.grids:
        maps = run.attention(grid)
        if branch not in maps["branch"].values:
            raise RecordingNotFound(
                f"{run.name} has no attention of the {branch} branch.",
                "Record with capture.branches: both.",
            )
        maps = maps.sel(branch=branch)
        _check_image(run, maps, image)
        at = _tokens_of(run, maps, channel, per)
        small, means = _in_steps(maps.isel({"token": slice_of(at), axis_of(run): image}))
        steps = maps["step"].values.tolist()
        for index, layer in enumerate(maps["layer"].values):
            layers[str(layer)] = small[:, index]
            shares[str(layer)] = means[:, index]
    parts = ["down", "mid_", "up_b"]
    order = sorted(layers, key=lambda path: ([*parts, path[:4]].index(path[:4]), path))
    heads = max(part.shape[1] for part in layers.values())
    shown = np.zeros((len(steps), len(order), heads, THUMBNAIL, THUMBNAIL), np.float32)
    for index, path in enumerate(order):
        shown[:, index, : layers[path].shape[1]] = layers[path]
    meta = {
        "channel": channel,
        "layers": order,
        "heads": [layers[path].shape[1] for path in order],
        "shares": [finite(shares[path].mean(axis=1)) for path in order],
        "snippets": _snippets(run, "attention", branch, per, image, layer=True),
        "ranking": _ranking([shares[path].mean(axis=0) for path in order]),
        "map_steps": steps,
        "branch": branch,
    }
    return pack(meta, {"maps": numbers(shown, apart=[1, 2], levels=64)})


def _in_steps(maps: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of some tokens' maps, as thumbnails and as means over places.

    *Shape:* (step, token, layer, head, y, x) -> (step, layer, head, y, x) and (step, layer, head).
    What is read and computed at once is small: memory that is used again costs half of the time.
    """
    small, means = [], []
    at_once = max(1, int(READ_AT_ONCE // max(1, maps.nbytes / max(1, maps.sizes["step"]))))
    for first in range(0, maps.sizes["step"], at_once):
        for step in maps.isel(step=slice(first, first + at_once)).values:
            values = analysis.probabilities(step[0])
            for token in step[1:]:
                values += analysis.probabilities(token)
            small.append(_thumbnails(values))
            means.append(values.mean(axis=(2, 3)))
    return np.stack(small), np.stack(means)


def _ranking(shares: list[np.ndarray]) -> list[tuple[int, int, float]]:
    """Return the heads with the greatest share, as (layer, head, share), the greatest first."""
    every = [
        (layer, head, float(f"{share:.4g}"))
        for layer, heads in enumerate(shares)
        for head, share in enumerate(heads)
        if np.isfinite(share)
    ]
    return sorted(every, key=lambda row: -row[2])[:RANKED]


def _check_image(run: Run, maps: xr.DataArray, image: int) -> None:
    """Refuse an image, or a draw of noise, that maps do not have. Raise RecordingNotFound."""
    axis = axis_of(run)
    if image >= (count := maps.sizes[axis]):
        raise RecordingNotFound(f"{run.name} has no {axis} {image}.", f"It has 0 to {count - 1}.")


def _tokens_of(run: Run, maps: xr.DataArray, channel: int, per: str) -> np.ndarray:
    """Return where a channel's tokens lie: a word's, one token, or those of start, end, padding."""
    kinds = analysis.token_kinds(maps).values
    words = [n for n in dict.fromkeys(maps["word_index"].values.tolist()) if n >= 0]
    count = maps.sizes["token"] if per == "tokens" else len(words) + 3
    if not 0 <= channel < count:
        raise RecordingNotFound(
            f"{run.name} has no channel {channel}.", f"It has 0 to {count - 1}."
        )
    if per == "tokens":
        return np.array([channel])
    if channel < len(words):
        return np.flatnonzero(maps["word_index"].values == words[channel])
    return np.flatnonzero(np.isin(kinds, KINDS[("start", "end", "padding")[channel - len(words)]]))


def places(
    run: Run,
    rows: tuple[int, int],
    columns: tuple[int, int],
    branch: str = "cond",
    image: int = 0,
) -> bytes:
    """Return a payload with where some places look: the mean of their self-attention.

    `rows` and `columns` are the first and the last of the places, on the largest grid recorded. The
    mean is over these places, layers and heads of that grid. Raise RecordingNotFound if
    self-attention was not recorded, ExperimentError for places outside the grid.
    """
    branch_name(branch)
    if "self_attention" not in run.tree.children:
        raise RecordingNotFound(
            f"{run.name} has no self-attention.", "Record with capture.self_attention: a layer."
        )
    grids = sorted(run.tree["self_attention"].children, key=lambda name: -int(name.split("x")[0]))
    maps = run.variable(f"self_attention/{grids[0]}/self")
    height, width = maps.sizes["y"], maps.sizes["x"]
    for name, (first, last), size in (("rows", rows, height), ("columns", columns, width)):
        if not 0 <= first <= last < size:
            raise ExperimentError(
                f"{name} {first} to {last} are not in the grid.", f"0 to {size - 1}."
            )
    if branch not in maps["branch"].values:
        raise RecordingNotFound(
            f"{run.name} has no self-attention of the {branch} branch.",
            "Record with capture.branches: both.",
        )
    _check_image(run, maps, image)
    here = {"y": slice(rows[0], rows[1] + 1), "x": slice(columns[0], columns[1] + 1)}
    values = maps.sel(branch=branch).isel({"step": run.steps, axis_of(run): image, **here}).load()
    shares = analysis.probabilities(values.transpose("step", "key_y", "key_x", ...).values)
    mean = shares.reshape(*shares.shape[:3], -1).mean(axis=-1, dtype=np.float32)
    recorded = mean.sum(axis=(1, 2)) > 0.5  # shares sum to 1; where none were recorded, to 0 or NaN
    about, mean = _about("self-attention", branch, run.steps[recorded]), mean[recorded]
    spot = f"{_range('row', rows)}, {_range('column', columns)}"
    about["channels"] = [{"label": spot, "kind": "place"}]
    spots = f"y=slice({rows[0]}, {rows[1] + 1}), x=slice({columns[0]}, {columns[1] + 1})"
    about["snippets"] = {
        "word": f"run.variable('self_attention/{grids[0]}/self')"
        f".sel(step={{step}}, branch={branch!r}).isel({axis_of(run)}={image}, {spots})"
        ".mean(['layer', 'head', 'y', 'x']){mean}"
    }
    return pack(about, {"maps": numbers(mean[:, None])})


def _range(name: str, ends: tuple[int, int]) -> str:
    return f"{name} {ends[0]}" if ends[0] == ends[1] else f"{name}s {ends[0]} to {ends[1]}"


def _thumbnails(values: np.ndarray) -> np.ndarray:
    """Return maps (..., y, x) brought to a square of `THUMBNAIL`.

    Larger ones become means, smaller ones are repeated.
    """
    height, width = values.shape[-2:]
    if height <= THUMBNAIL and width <= THUMBNAIL:
        rows, columns = (np.arange(THUMBNAIL) * size // THUMBNAIL for size in (height, width))
        return values[..., rows[:, None], columns]
    return resize(values, (THUMBNAIL, THUMBNAIL), "area")
