"""Make every map that could say where a word is in a picture, and score each.

`experiments.attention_truth` measures with these functions.

    seen = look(model, shown, timesteps, seed=0)            # noise the picture, capture the maps
    maps = candidates(seen, truth)                          # (map, step, word, y, x), on one grid
    levels = best_levels([level_scores(maps, truth), ...])  # from pictures that are not scored
    scored(maps, truth, levels)                             # AP and IoU of each map

Maps and truth meet on a grid of `SIDE` x `SIDE` cells. A cell is inside if the mask covers at least
half of it. Maps are brought to the grid bilinearly, as `probe.analysis` does it. A threshold is a
level of the map scaled from 0 to 1, so that one level fits pictures of all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import xarray as xr

from probe.analysis.averages import combined
from probe.analysis.heads import contribution
from probe.analysis.maps import FUNCTION_WORDS, against_others, normalised, on_grid, word_maps
from probe.analysis.masks import average_precision, iou, threshold
from probe.diffusion.family import Conditioning
from probe.diffusion.prompts import Prompt
from probe.diffusion.sampling import Step
from probe.diffusion.schedule import Schedule
from probe.diffusion.sd import StableDiffusion
from probe.reading.recording import Run
from probe.running.perform import ask_noised
from probe.settings.experiment import Experiment
from probe.watching.counterfactual import embeddings_without, word_changes
from probe.watching.cross_attention import CrossAttention
from probe.watching.interface import KeptTokens, Plan, Rows, grid_group, hooked
from probe.watching.rehearsal import rehearse
from probe.watching.source import noised
from probe.watching.text_side import TextSide
from probe.words import runs

Scores = TypeVar("Scores", xr.DataArray, xr.Dataset)
SIDE = 64
LEVELS = np.linspace(0, 0.95, 20)


@dataclass(frozen=True)
class Shown:
    """A picture whose truth is known: (y, x, rgb) uint8, its caption, and masks of some words.

    A mask is (y, x) bool. Its word is one of the caption.
    """

    name: str
    picture: np.ndarray
    caption: str
    masks: dict[str, np.ndarray]

    def truth(self) -> xr.DataArray:
        """Return which share of each of `SIDE` x `SIDE` cells is inside. *Shape:* (word, y, x)."""
        masks = xr.DataArray(
            np.stack([*self.masks.values()]).astype(np.float32),
            dims=("word", "y", "x"),
            coords={"word": list(self.masks)},
        )
        return on_grid(masks, (SIDE, SIDE), "area")


@dataclass(frozen=True)
class Seen:
    """Where a model looked, for each grid.

    `grids` are maps (step, token, layer, head, y, x). `sizes` (token, layer, head) say how large
    what a token writes is. `change` (step, word, y, x) is the counterfactual map of each word.
    """

    prompt: Prompt
    grids: list[xr.DataArray]
    sizes: list[xr.DataArray]
    change: xr.DataArray | None = None


def places_of(prompt: Prompt, word: str) -> list[int]:
    """Return the token positions of a word or phrase, each time the prompt has it.

    Case does not count. Return an empty list if the prompt does not have it.
    """
    wanted, words = word.casefold().split(), [text.casefold() for text in prompt.words]
    return [
        position
        for start in runs(wanted, words)
        for index in range(start, start + len(wanted))
        for position in prompt.spans[index]
    ]


# --- asking the model -----------------------------------------------------------------------------


def look(
    model: StableDiffusion,
    shown: Shown,
    timesteps: Sequence[int],
    seed: int = 0,
    counterfactual: bool = True,
) -> Seen:
    """Noise a picture to each timestep, and capture where the UNet looks at each caption token.

    The noise is the same at every timestep. `model` has a scheduler that keeps variance one (DDPM,
    as for `probe.noising`). Nothing is written to disk.
    """
    conditioning = model.condition(shown.caption, guided=False)
    schedule = Schedule.at(model.scheduler, timesteps)
    clean, eps = noised(model, shown.picture, 1, seed)
    plan = _plan(model, shown.caption, conditioning, schedule, clean)
    attention, text, sizes = CrossAttention(model, plan), TextSide(model, plan), {}
    steps, maps = [], []
    loop = ask_noised(model, conditioning, schedule, clean, eps)
    for index in range(plan.calls):
        # What tokens write is the same at every step: it is read at the first.
        with hooked(attention, *([] if index else [text])):
            step = next(loop)
        maps.append(attention.take(step))
        sizes = sizes or text.take(step)
        steps.append(step)
    change = _changes(model, shown, conditioning, steps) if counterfactual else None
    grids, written = [], []
    for grid, paths in plan.grids.items():
        group = grid_group(grid)
        coords = {"step": list(timesteps), "token": list(plan.kept.positions), "layer": paths}
        values = np.stack([step[f"{group}/cross"][:, 0, 0].cpu().numpy() for step in maps])
        dims = ("step", "token", "layer", "head", "y", "x")
        grids.append(xr.DataArray(values, dims=dims, coords=coords))
        of_tokens = sizes[f"{group}/value_size"][0].cpu().numpy()
        coords = {"token": coords["token"], "layer": paths}
        written.append(xr.DataArray(of_tokens, dims=("token", "layer", "head"), coords=coords))
    if change is not None:
        change = change.assign_coords(step=list(timesteps))
    return Seen(conditioning.cond, grids, written, change)


def _plan(
    model: StableDiffusion,
    caption: str,
    conditioning: Conditioning,
    schedule: Schedule,
    clean: torch.Tensor,
) -> Plan:
    """Plan the capture of every cross-attention layer at every timestep, for one image."""
    prompt = conditioning.cond
    tokens = int(prompt.ids.shape[1])
    rehearsal = rehearse(model, tuple(clean.shape), 1, tokens)
    return Plan(
        recipe=Experiment(prompt=caption, guidance_scale=1.0, capture={"dtype": "float32"}),
        tokens=conditioning.tokens,
        schedule=schedule,
        rehearsal=rehearsal,
        latent_shape=(1, *clean.shape[1:]),
        rows=Rows(("cond",), ("cond",), 1),
        kept=KeptTokens(prompt.end, tokens),
        layers=rehearsal.grids,
        self_layers={},
        words={},
        recorded=tuple(range(len(schedule.timesteps))),
        decoded=(),
    )


def _changes(
    model: StableDiffusion, shown: Shown, conditioning: Conditioning, steps: Sequence[Step]
) -> xr.DataArray:
    """Return what each word changes in the prediction. *Shape:* (step, word, y, x)."""
    places = {word: places_of(conditioning.cond, word) for word in shown.masks}
    embeddings = embeddings_without(model, conditioning.tokens["cond"], places)
    changes = [word_changes(model, step, embeddings)[:, 0].cpu().numpy() for step in steps]
    return xr.DataArray(
        np.stack(changes), dims=("step", "word", "y", "x"), coords={"word": list(shown.masks)}
    )


def recorded(run: Run, prompt: Prompt, timesteps: Sequence[int], words: Sequence[str]) -> Seen:
    """Return what was seen in a recorded run, at its recorded steps nearest to some timesteps.

    The last step is "all": the mean over all recorded ones.
    """
    steps = run.attention(run.grids[0])["step"].values
    at = run.variable("timestep").sel(step=steps).values
    near = [int(np.abs(at - t).argmin()) for t in timesteps]

    def few(maps: xr.DataArray) -> xr.DataArray:
        along = [name for name, value in maps.coords.items() if "step" in value.dims]
        every = maps.sel(step=steps).drop_vars(along)
        parts = [every.isel(step=near), every.mean("step").expand_dims("step")]
        both = xr.concat(parts, "step", coords="minimal", compat="override")
        return both.assign_coords(step=[*map(str, timesteps), "all"])

    grids, sizes, change = [], [], None
    for grid in run.grids:
        maps = run.attention(grid).sel(branch="cond").isel(image=0)
        grids.append(few(maps.astype(np.float32).load()))
        sizes.append(run.variable(f"attention/{grid}/value_size").sel(branch="cond").load())
    if "counterfactual" in run.tree.children:
        change = few(run.variable("counterfactual/change").isel(image=0).load())
        change = change.rename(masked_word="word").sel(word=list(words))
    return Seen(prompt, grids, sizes, change)


# --- every map ------------------------------------------------------------------------------------


def candidates(seen: Seen, truth: xr.DataArray, random: Seen | None = None) -> xr.DataArray:
    """Return every map of each word whose truth is known, on the grid of the truth.

    By name: `attention` (mean over layers and heads), `grid/GRID`, `layer/GRID/PATH` and
    `head/GRID/PATH/N`; `against others`, `contribution`, `counterfactual`; what knows nothing:
    `random` (a UNet with random weights), `Gaussian`, `uniform`, and, of two words, `other word`;
    and what knows all: `ceiling/...`, the true mask at each grid of the UNet. What does not exist
    is left out. *Shape:* truth (word, y, x) -> (map, step, word, y, x).
    """
    side = (truth.sizes["y"], truth.sizes["x"])
    things = [str(word) for word in truth["word"].values]
    merged = [_merged(maps, seen.prompt, things) for maps in seen.grids]
    own = [_first(maps, things) for maps in merged]
    attention = combined(own, grid=side)
    maps_of = {"attention": attention, **_parts(own, side)}
    if merged[0].sizes["word"] > 1:
        maps_of["against others"] = _first(against_others(combined(merged, grid=side)), things)
    sized = [contribution(maps, sizes) for maps, sizes in zip(seen.grids, seen.sizes, strict=True)]
    written = [_first(_merged(maps, seen.prompt, things), things) for maps in sized]
    maps_of["contribution"] = combined(written, grid=side)
    if seen.change is not None:
        maps_of["counterfactual"] = on_grid(seen.change.sel(word=things), side)
    if len(things) > 1:
        maps_of["other word"] = attention.roll(word=1)
    if random is not None:
        blind = [_first(_merged(maps, seen.prompt, things), things) for maps in random.grids]
        maps_of["random"] = combined(blind, grid=side)
    y, x = np.meshgrid(*((np.arange(n) + 0.5) / n - 0.5 for n in side), indexing="ij")
    centred = xr.DataArray(np.exp(-8 * (y**2 + x**2)), dims=("y", "x"))
    maps_of["Gaussian"] = xr.zeros_like(attention) + centred
    maps_of["uniform"] = xr.ones_like(attention)
    for maps in own:
        grid = (maps.sizes["y"], maps.sizes["x"])
        coarse = on_grid(on_grid(truth.drop_vars("word"), grid, "area"), side)
        maps_of[f"ceiling/{grid[0]}x{grid[1]}"] = xr.zeros_like(attention) + coarse
    rows = [maps.transpose("step", "word", "y", "x").values for maps in maps_of.values()]
    coords = {"map": list(maps_of), "step": attention["step"].values, "word": things}
    return xr.DataArray(
        np.stack(rows).astype(np.float32), dims=("map", "step", "word", "y", "x"), coords=coords
    )


def _first(maps: xr.DataArray, things: Sequence[str]) -> xr.DataArray:
    """Return the maps of the words whose truth is known: they come first."""
    return maps.isel(word=slice(len(things)))


def _parts(grids: Sequence[xr.DataArray], side: tuple[int, int]) -> dict[str, xr.DataArray]:
    """Return the maps of each grid, layer and head alone, by name."""
    parts: dict[str, xr.DataArray] = {}
    for maps in grids:
        grid = f"{maps.sizes['y']}x{maps.sizes['x']}"
        parts[f"grid/{grid}"] = combined(maps, grid=side)
        single = on_grid(maps, side)
        for layer in single["layer"].values:
            heads = single.sel(layer=layer, drop=True)
            parts[f"layer/{grid}/{layer}"] = heads.mean("head")
            for head in range(heads.sizes["head"]):
                parts[f"head/{grid}/{layer}/{head}"] = heads.isel(head=head)
    return parts


def _merged(maps: xr.DataArray, prompt: Prompt, things: Sequence[str]) -> xr.DataArray:
    """Return the maps of some words or phrases, then those of the other content words.

    *Shape:* (step, token, ...) -> (step, word, ...).
    """
    number: dict[int, int] = {}
    texts: list[str] = []
    for thing in things:
        number |= dict.fromkeys(places_of(prompt, thing), len(texts))
        texts.append(thing)
    for index, positions in prompt.spans.items():
        is_function = prompt.words[index].casefold() in FUNCTION_WORDS
        if not is_function and not set(positions) & set(number):
            number |= dict.fromkeys(positions, len(texts))
            texts.append(prompt.words[index])
    numbers = np.array([number.get(int(token), -1) for token in maps["token"].values])
    return word_maps(maps, np.array([texts[n] if n >= 0 else "" for n in numbers]), numbers)


def best_of(maps: xr.DataArray, heads: Sequence[str], name: str) -> xr.DataArray:
    """Return the mean map of some heads, as one more map.

    *Shape:* (map, step, word, y, x) -> (1, step, word, y, x).
    """
    return maps.sel(map=list(heads)).mean("map").expand_dims(map=[name])


# --- scores ---------------------------------------------------------------------------------------


def precision(maps: xr.DataArray, truth: xr.DataArray) -> xr.DataArray:
    """Return the AP of each map, the mean over words.

    *Shape:* (map, step, word, y, x), (word, y, x) -> (map, step).
    """
    return average_precision(maps, truth >= 0.5).mean("word")


def level_scores(maps: xr.DataArray, truth: xr.DataArray) -> xr.DataArray:
    """Return IoU at each of `LEVELS`, the mean over words.

    *Shape:* as `precision` -> (level, map, step).
    """
    scaled, inside = normalised(maps, "min-max"), truth >= 0.5
    return xr.concat(
        [iou(threshold(scaled, level), inside).mean("word") for level in LEVELS],
        xr.Variable("level", LEVELS),
    )


def best_levels(scores: Sequence[xr.DataArray]) -> xr.DataArray:
    """Return the level with the best mean IoU over some pictures, for each map and step.

    *Shape:* each (level, map, step) -> (map, step).
    """
    return of_scenes(scores).mean("scene").idxmax("level")


def of_scenes(parts: Sequence[Scores]) -> Scores:
    """Return what was computed for each picture, put together along `scene`.

    It is NaN for a map that a picture does not have, such as that of the other of two words.
    """
    names = list(dict.fromkeys(str(name) for part in parts for name in part["map"].values))
    return xr.concat([part.reindex(map=names) for part in parts], "scene")


def scored(maps: xr.DataArray, truth: xr.DataArray, levels: xr.DataArray) -> xr.Dataset:
    """Return AP, and IoU at levels that were chosen elsewhere, the means over words.

    *Shape:* as `precision` -> each (map, step).
    """
    inside = truth >= 0.5
    masks = threshold(normalised(maps, "min-max"), levels.sel(map=maps["map"], step=maps["step"]))
    parts = {"AP": average_precision(maps, inside), "IoU": iou(masks, inside)}
    return xr.Dataset({name: part.mean("word") for name, part in parts.items()})


def random_weights(model: StableDiffusion, seed: int = 0) -> StableDiffusion:
    """Return the same model with a UNet whose weights were drawn and never trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = type(model.unet).from_config(model.unet.config)
    return replace(model, unet=torch.nn.Module.to(unet, model.device, model.dtype).eval())
