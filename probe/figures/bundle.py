"""What the player draws, as one compact payload: maps as bytes with their range, pictures as WebP
sheets, and numbers.

    payload(run)                          # a whole run: pictures, a map for each word, curves
    channels(run, of="contribution")      # its maps, read in another way
    layers_and_heads(run, 1)              # one word at every step, in every layer and head

A payload is `PRB1`, the length of a JSON header (uint32, little endian), the header, then the parts
that it lists. The dashboard sends payloads, an exported page holds them, and player.js opens them.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import xarray as xr
from PIL import Image

from probe import analysis
from probe.analysis.maps import resize
from probe.arguments import branch_name, one_of, whole_number
from probe.errors import RecordingNotFound
from probe.figures.drawing import HEAT
from probe.reading.recording import Run

Part: TypeAlias = tuple[bytes, dict[str, Any]]  # the bytes, and what the header says of them
Reading = Literal["attention", "contribution", "counterfactual"]
MAGIC = b"PRB1"
COLUMNS = 10  # pictures in a row of a sheet
THUMBNAIL = 16  # the side of a map among layers and heads
KINDS = {"start": ("BOS",), "words": ("words", "other"), "end": ("EOS",), "padding": ("rest",)}
UNITS = {
    "attention": "% of a place's attention",
    "contribution": "attention times |v W_O|, in units of the layers' outputs",
    "counterfactual": "|prediction - prediction without the word|, in units of the prediction",
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
}
PANELS = [
    {
        "part": "latents",
        "title": "Noisy latents going in",
        "note": "4 numbers a square, shown as colour",
    },
    {
        "part": "denoised",
        "title": "Its guess of the clean picture",
        "note": "at this step, after guidance",
    },
    {"part": "maps", "title": "Places that attend", "note": ""},
    {"part": "final", "title": "Finished picture", "note": "after the last step"},
]
NOISED = [
    {"part": "source", "title": "The picture", "note": "what the VAE encoded"},
    {"part": "latents", "title": "With this much noise", "note": "latents that go into the model"},
    {"part": "noise", "title": "The true noise", "note": "the same at every step"},
    {"part": "predicted", "title": "What the model takes for noise", "note": "its prediction"},
    {
        "part": "difference",
        "title": "Where it is wrong",
        "note": "prediction less true noise; grey: right",
    },
    {"part": "denoised", "title": "Its guess of the clean picture", "note": "at this step alone"},
    {"part": "maps", "title": "Places that attend", "note": ""},
    {"part": "decoded", "title": "The guess, decoded by the VAE", "note": "at this step alone"},
]
SNIPPETS = {  # the same array from Python; {step}, {word} and {kind} are filled in by the player
    "attention": "run.word_maps().sel(step={step}).isel(word={word}).mean('AXIS')",
    "contribution": "run.word_maps(of='contribution').sel(step={step}).isel(word={word}, AXIS=0)",
    "counterfactual": "run.counterfactual().sel(step={step}).isel(masked_word={word}, AXIS=0)",
    "kind": "probe.analysis.by_kind(run.token_maps()).sel(step={step}, kind='{kind}').mean('AXIS')",
    "denoised": "run.preview(run.denoised()).sel(step={step}).isel(AXIS=0)",
}


# --- the container -------------------------------------------------------------------------------


def pack(meta: Mapping[str, Any], parts: Mapping[str, Part]) -> bytes:
    """Return a payload. Raise ValueError if a number in `meta` is not finite."""
    at, listed = 0, {}
    for name, (content, about) in parts.items():
        listed[name] = {"at": at, "size": len(content), **about}
        at += len(content)
    text = json.dumps({"meta": meta, "parts": listed}, ensure_ascii=False, allow_nan=False)
    head = text.encode("utf-8", "replace")
    return b"".join(
        [MAGIC, struct.pack("<I", len(head)), head, *(part[0] for part in parts.values())]
    )


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header of a payload, and its parts of numbers, as player.js reads them."""
    (length,) = struct.unpack_from("<I", content, 4)
    head = json.loads(content[8 : 8 + length])
    found = {}
    for name, part in head["parts"].items():
        if part["kind"] == "numbers":
            start = 8 + length + part["at"]
            raw = np.frombuffer(zlib.decompress(content[start : start + part["size"]]), np.uint8)
            scale = np.array(part["high"], np.float32).reshape(part["scales"]) / 255
            found[name] = raw.reshape(part["shape"]) * scale
    return head, found


def numbers(values: np.ndarray, apart: Sequence[int] = (), levels: int = 256) -> Part:
    """Return numbers (step, ...) from 0 up as bytes (..., step): byte / 255 of the greatest value.

    Each index along the axes `apart` has a greatest value of its own. Fewer `levels` take less
    room. Steps come last: what changes little lies side by side, and takes half of the room.
    """
    values = np.nan_to_num(np.asarray(values, np.float32), nan=0, posinf=0, neginf=0).clip(min=0)
    values, apart = np.moveaxis(values, 0, -1), [axis - 1 for axis in apart]
    over = tuple(axis for axis in range(values.ndim) if axis not in apart)
    high = values.max(axis=over, keepdims=True, initial=0)
    shares = np.divide(values, high, out=np.zeros_like(values), where=high > 0)
    codes = (shares * (levels - 1)).round() * (255 / (levels - 1))
    about = {
        "kind": "numbers",
        "shape": list(values.shape),
        "scales": list(high.shape),
        "high": [float(f"{one:.6g}") for one in high.ravel()],
    }
    return zlib.compress(codes.round().astype(np.uint8).tobytes(), 9), about


def pictures(rgb: np.ndarray, lossless: bool = True) -> Part:
    """Return pictures (frame, y, x, rgb) uint8 as one sheet, `COLUMNS` in a row."""
    count, height, width, _ = rgb.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * columns, height, width, 3), np.uint8)
    sheet[:count] = rgb
    grid = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    made = io.BytesIO()
    picture = Image.fromarray(grid.reshape(rows * height, columns * width, 3))
    picture.save(made, "WEBP", lossless=lossless, quality=80, method=0 if lossless else 2)
    return made.getvalue(), {"kind": "sheet", "shape": list(rgb.shape), "columns": columns}


# --- a run ---------------------------------------------------------------------------------------


def payload(run: Run, image: int = 0) -> bytes:
    """Return all that the player shows of a run before something else is asked.

    `image` counts the pictures of a generation, or the draws of noise of a noising. Raise
    RecordingDamaged, RecordingUnreadable, or RecordingNotFound if there is no such image.
    """
    whole_number("image", image, 0)
    axis = axis_of(run)
    if image >= (count := pictures_of(run)):
        raise RecordingNotFound(f"{run.name} has no {axis} {image}.", f"It has 0 to {count - 1}.")
    steps = run.steps
    opened = f"import probe\n\nrun = probe.open_run({str(run.path)!r})\n"
    meta: dict[str, Any] = {
        "name": run.name,
        "kind": run.kind,
        "prompt": prompt_of(run),
        "facts": facts(run),
        "status": run.status,
        "calls": int(run.variable("committed").size),
        "steps": steps.tolist(),
        "sigma": _finite(run.variable("sigma").values[steps]),
        "timestep": _finite(run.variable("timestep").values[steps]),
        "colours": HEAT.astype(int).tolist(),
        "panels": PANELS if run.kind == "generation" else NOISED,
        "readings": readings(run),
        "snippets": {name: opened + line.replace("AXIS", axis) for name, line in SNIPPETS.items()},
        "missing": {},
    }
    meta["curves"] = _curves(run, image) if len(steps) and "latents" in run.tree.children else {}
    parts = _seen(run, image, meta)
    if run.grids and len(steps):
        about, maps = _overview(run)
        meta.update(about)
        parts["maps"] = maps
    else:
        meta["missing"]["maps"] = "Record with capture.attention: maps."
    return pack(meta, parts)


def axis_of(run: Run) -> str:
    """Return the dimension along which a run's pictures lie."""
    return "image" if run.kind == "generation" else "draw"


def pictures_of(run: Run) -> int:
    """Return how many pictures, or draws of noise, a run has."""
    return run.experiment.images if run.kind == "generation" else run.noising.noises


def prompt_of(run: Run) -> str:
    """Return what the model read: the prompt of a generation, or the caption of a noising."""
    return run.experiment.prompt if run.kind == "generation" else run.noising.caption


def facts(run: Run) -> str:
    """Return in a line how a run was made."""
    told, recipe = run.attributes, run.recipe
    if run.kind == "noising":
        return (
            f"{told.model.name}, noised at {len(run.noising.timesteps)} timesteps, seed "
            f"{recipe.seed}"
        )
    asked = run.experiment
    guidance = f"guidance {asked.guidance_scale:g}" if asked.guidance_scale > 1 else "no guidance"
    kind = told.scheduler.kind.removesuffix("Scheduler")
    return f"{told.model.name}, {kind}, {asked.steps} steps, {guidance}, seed {asked.seed}"


def _seen(run: Run, image: int, meta: dict[str, Any]) -> dict[str, Part]:
    """Return the pictures of a run, and say in `meta` which are missing and what records them."""
    parts: dict[str, Part] = {}
    missing, groups = meta["missing"], run.tree.children
    one = {axis_of(run): image}
    if "latents" in groups and len(run.steps):
        if "preview" in groups and np.isfinite(run.variable("preview/latent_to_rgb").values).all():
            parts |= _previews(run, one)
        else:
            missing["latents"] = missing["denoised"] = (
                "Its model came without a preview of latents."
            )
    if "decoded" in groups:
        decoded = run.variable("decoded/picture").isel(one)
        there = np.isin(decoded["decoded_step"].values, run.steps)
        if there.any():
            meta["decoded_steps"] = decoded["decoded_step"].values[there].tolist()
            parts["decoded"] = pictures(decoded.values[there], lossless=False)
    if run.source is not None:
        parts["source"] = pictures(run.source.values[None], lossless=False)
    if "images" in groups and run.status == "complete":
        parts["final"] = pictures(run.images.isel(one).values[None], lossless=False)
    else:
        missing["final"] = "The picture is painted after the last step."
    return parts


def _previews(run: Run, one: dict[str, int]) -> dict[str, Part]:
    """Return latents as small pictures. Noise is shown as colourful as the clean latents are."""
    noisy = run.latents.isel(one).astype("float32").load()
    clean = run.denoised().isel(one).load()
    spread = ("channel", "y", "x")
    size = clean.std(spread) / noisy.std(spread)
    shown = {"latents": noisy * size.fillna(1), "denoised": clean}
    found = {name: pictures(run.preview(values).values) for name, values in shown.items()}
    if run.kind == "noising":
        forward = run.tree["forward"].dataset.isel(one)
        noises = {
            "noise": forward["noise"].expand_dims("step"),
            "difference": forward["difference"].isel(step=run.steps),
            "predicted": run.eps().isel(one),
        }
        slope = run.variable("preview/latent_to_rgb").load() * float(clean.std())
        for name, values in noises.items():
            colour = (
                xr.dot(values.astype("float32").load(), slope, dim="channel") + 0.5
            )  # 0 is grey
            bytes_ = (colour.fillna(0).clip(0, 1) * 255).round().astype("uint8")
            found[name] = pictures(bytes_.transpose("step", "y", "x", "rgb").values)
    return found


def _curves(run: Run, image: int) -> dict[str, Any]:
    """Return numbers for each step, with a title and a note: loss, guidance, the prediction's
    size.
    """
    axes = ("channel", "y", "x")
    one = {axis_of(run): image}
    found = {}
    if run.kind == "noising":
        forward = run.tree["forward"].dataset.isel(step=run.steps)
        draws = (
            "mean and spread over the draws of noise; the less noise, the harder to tell from "
            "detail"
        )
        found["loss"] = {
            "title": "Loss: how wrong the model is about the noise",
            "note": f"mean square of prediction less target, {draws}",
            "values": _finite(forward["loss_mean"].values),
            "spread": _finite(forward["loss_spread"].values),
        }
    if {"prediction_cond", "prediction_uncond"} <= set(run.tree["latents"].data_vars):
        cond, uncond = (
            run.prediction(branch).isel(one).astype("float32") for branch in ("cond", "uncond")
        )
        found["guidance"] = {
            "title": "What the prompt changes in the prediction",
            "note": "root mean square of prediction with the prompt less prediction without it",
            "values": _finite((((cond - uncond) ** 2).mean(axes) ** 0.5).values),
        }
    chosen = run.prediction().isel(one).astype("float32")
    found["prediction"] = {
        "title": "Size of the prediction",
        "note": "root mean square of what the scheduler gets",
        "values": _finite(((chosen**2).mean(axes) ** 0.5).values),
    }
    return found


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.astype(float)]


def readings(run: Run) -> list[str]:
    """Return in which other ways this recording's maps can be read."""
    found = []
    if run.grids and all(
        "head_statistics" not in run.tree[f"attention/{grid}"].data_vars for grid in run.grids
    ):
        found.append("contribution")
    return found + ["counterfactual"] * ("counterfactual" in run.tree.children)


# --- maps ----------------------------------------------------------------------------------------


def _overview(run: Run) -> tuple[dict[str, Any], Part]:
    """Return the stored mean over images, layers and heads as channels: reads one small
    variable.
    """
    maps = run.overview()
    group = f"attention/{run.grids[0]}"
    labels = {
        name: ("token", run.variable(f"{group}/{name}").isel(branch=-1).values)
        for name in ("word", "word_index", "token_text")
    }
    branch = str(run.variable(f"{group}/word")["branch"].values[-1])
    return _as_channels(run, maps.assign_coords(labels), branch, "attention")


def channels(run: Run, of: Reading = "attention", branch: str = "cond", image: int = 0) -> bytes:
    """Return a payload with a run's maps read in another way: a map for each word, start, end and
    padding.

    Raise RecordingNotFound, which names the setting, if they were not recorded.
    """
    one_of("of", of, get_args(Reading))
    if of == "counterfactual":
        change = run.counterfactual().isel({axis_of(run): whole_number("image", image, 0)}).load()
        change = change.isel(step=np.isfinite(change.values).all(axis=(1, 2, 3)))
        words = [str(word) for word in change["masked_word"].values]
        about = {
            "channels": [{"label": word, "kind": "word"} for word in words],
            "unit": UNITS[of],
            "note": NOTES[of][0],
            "about": NOTES[of][1],
            "map_steps": change["step"].values.tolist(),
            "of": of,
            "branch": "cond",
        }
        return pack(about, {"maps": numbers(change.values)})
    branch_name(branch)
    maps = run.token_maps(of=of, branch=branch, images=[image]).isel({axis_of(run): 0})
    about, part = _as_channels(run, maps, branch, of)
    return pack(about, {"maps": part})


def _as_channels(run: Run, maps: xr.DataArray, branch: str, of: str) -> tuple[dict[str, Any], Part]:
    """Return maps (step, token, y, x) as one for each word, then for start, end and padding."""
    cut, split = run.cut(branch)
    words = analysis.word_maps(maps, cut=cut, split=split)
    kinds = analysis.by_kind(maps).transpose("kind", "step", "y", "x")
    spots = {name: kinds.sel(kind=list(parts)).sum("kind").values for name, parts in KINDS.items()}
    listed = [{"label": str(word), "kind": "word"} for word in words["word"].values]
    listed += [{"label": name, "kind": name} for name in ("start", "end", "padding")]
    values = np.concatenate(
        [
            words.transpose("step", "word", "y", "x").values,
            np.stack([spots[name] for name in ("start", "end", "padding")], axis=1),
        ],
        axis=1,
    )
    about: dict[str, Any] = {
        "channels": listed,
        "unit": UNITS[of],
        "note": NOTES[of][0],
        "about": NOTES[of][1],
        "map_steps": maps["step"].values.tolist(),
        "of": of,
        "branch": branch,
    }
    if of == "attention":  # of all that is looked at, whatever the word
        about["shares"] = {name: _finite(spot.mean(axis=(1, 2))) for name, spot in spots.items()}
    return about, numbers(values, apart=[1])


def layers_and_heads(run: Run, channel: int, branch: str = "cond", image: int = 0) -> bytes:
    """Return a payload with one channel of the maps in every layer and head, each brought to 16 x
    16.

    *Shape:* (step, layer, head, y, x), layers in the order of the network. Raise RecordingNotFound
    if there is no such channel.
    """
    branch_name(branch)
    layers: dict[str, np.ndarray] = {}
    shares: dict[str, list[float | None]] = {}
    steps: list[int] = []
    for grid in run.grids:
        maps = run.attention(grid)
        if branch not in maps["branch"].values:
            raise RecordingNotFound(
                f"{run.name} has no attention of the {branch} branch.",
                "Record with capture.branches: both.",
            )
        maps = maps.sel(branch=branch)
        at = _tokens_of(run, maps, channel)
        values = analysis.probabilities(maps.isel({"token": at, axis_of(run): image}).values).sum(
            axis=1
        )
        small = _thumbnails(values)
        steps = maps["step"].values.tolist()
        for index, layer in enumerate(maps["layer"].values):
            layers[str(layer)] = small[:, index]
            shares[str(layer)] = _finite(values[:, index].mean(axis=(0, 2, 3)))
    order = sorted(layers, key=lambda path: (["down", "mid_", "up_b"].index(path[:4]), path))
    heads = max(part.shape[1] for part in layers.values())
    shown = np.zeros((len(steps), len(order), heads, THUMBNAIL, THUMBNAIL), np.float32)
    for index, path in enumerate(order):
        shown[:, index, : layers[path].shape[1]] = layers[path]
    meta = {
        "channel": channel,
        "layers": order,
        "heads": [layers[path].shape[1] for path in order],
        "shares": [shares[path] for path in order],
        "map_steps": steps,
        "branch": branch,
    }
    return pack(meta, {"maps": numbers(shown, apart=[1, 2], levels=64)})


def _tokens_of(run: Run, maps: xr.DataArray, channel: int) -> np.ndarray:
    """Return where a channel's tokens lie: a word's, or those of start, end or padding."""
    kinds = analysis.token_kinds(maps).values
    words = [n for n in dict.fromkeys(maps["word_index"].values.tolist()) if n >= 0]
    if 0 <= channel < len(words):
        return np.flatnonzero(maps["word_index"].values == words[channel])
    if 0 <= (place := channel - len(words)) < 3:
        return np.flatnonzero(np.isin(kinds, KINDS[("start", "end", "padding")[place]]))
    raise RecordingNotFound(
        f"{run.name} has no channel {channel}.", f"It has 0 to {len(words) + 2}."
    )


def _thumbnails(values: np.ndarray) -> np.ndarray:
    """Return maps (..., y, x) brought to a square of `THUMBNAIL`: means over what a place covers,
    else repeated.
    """
    height, width = values.shape[-2:]
    if height <= THUMBNAIL and width <= THUMBNAIL:
        rows, columns = (np.arange(THUMBNAIL) * size // THUMBNAIL for size in (height, width))
        return values[..., rows[:, None], columns]
    return resize(values, (THUMBNAIL, THUMBNAIL), "area")
