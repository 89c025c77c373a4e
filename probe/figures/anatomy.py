"""The parts of Stable Diffusion with one run's own numbers: what each takes, gives, weighs, costs.

    parts(run)        # text encoders, UNet, VAE: shapes, sizes, shares of time and FLOPs
    blocks(run)       # the UNet's blocks in the order in which they run, each with its grid

`None` stands for what was not recorded. Nothing here is HTML: see `probe.figures.anatomy_page`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from probe import analysis
from probe.reading.recording import Run
from probe.reading.sample import called

BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d{1,3})|mid_block")
MOST_BLOCKS = 24
ENCODERS = ("text_encoder", "text_encoder_2")
Grid = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A component of the model, and what it cost. `calls` is how often it ran."""

    name: str
    calls: int | None
    parameters: int | None
    weight_bytes: int | None
    seconds: float | None
    time_share: float | None
    flops: int | None
    flops_share: float | None


@dataclass(frozen=True)
class Block:
    """A block of the UNet: where it stands, its grid, how many layers of each kind it has."""

    path: str
    name: str
    grid: Grid | None
    resnets: int
    attentions: int
    heads: int | None
    measured: bool


@dataclass(frozen=True)
class Token:
    """A position of the prompt: its text, its number in the vocabulary, and what it is."""

    text: str
    number: int
    kind: str

    @property
    def label(self) -> str:
        """Return the text, or what the mark at the start or the end is called."""
        return {"BOS": "start", "EOS": "end"}.get(self.kind, self.text)


def holds(run: Run, *paths: str) -> bool:
    """Return whether a recording has all of these variables: "latents/latents"."""
    for path in paths:
        group, _, name = path.rpartition("/")
        if f"/{group}" not in run.tree.groups or name not in run.tree[group].data_vars:
            return False
    return True


# --- sizes ---------------------------------------------------------------------------------------


def latent_shape(run: Run) -> tuple[int, int, int] | None:
    """Return (channel, y, x) of a latent."""
    if not holds(run, "latents/latents"):
        return None
    channel, y, x = run.variable("latents/latents").shape[-3:]
    return channel, y, x


def picture_shape(run: Run) -> tuple[int, int, int] | None:
    """Return (rgb, y, x) of the picture."""
    if not holds(run, "images/final"):
        return None
    y, x, rgb = run.variable("images/final").shape[-3:]
    return rgb, y, x


def encoders(run: Run) -> list[str]:
    """Return the text encoders whose text was recorded."""
    needed = ("token_id", "output", "attention")
    return [name for name in ENCODERS if holds(run, *(f"text/{name}/{v}" for v in needed))]


def embedding_shape(run: Run, encoder: str) -> tuple[int, int]:
    """Return (token, feature) of what a text encoder gives."""
    token, feature = run.variable(f"text/{encoder}/output").shape[-2:]
    return token, feature


def tokens(run: Run, encoder: str = "text_encoder", branch: str = "cond") -> list[Token]:
    """Return the tokens of a branch up to the first end of text; after it comes padding."""
    if encoder not in encoders(run):
        return []
    labels = run.variable(f"text/{encoder}/token_id")
    if branch not in labels["branch"].values:
        return []
    labels = labels.sel(branch=branch)
    kinds = analysis.token_kinds(labels).values
    rows = zip(labels["token_text"].values, labels.values, kinds, strict=True)
    return [
        Token(str(text), int(number), str(kind)) for text, number, kind in rows if kind != "rest"
    ]


# --- what it cost --------------------------------------------------------------------------------


def decodings(run: Run) -> int | None:
    """Return how many decodings the VAE's time covers, or None where that is not known.

    The last one paints the picture, the others are for people who watch.
    """
    recipe = run.recipe
    if run.status != "complete" or run.attributes.resumed or recipe.capture.counterfactual:
        return None
    shown = run.tree["decoded"].sizes["decoded_step"] if "decoded" in run.tree.children else 0
    return 1 + shown


def parts(run: Run) -> list[Part]:
    """Return the components in the order in which they run."""
    if "cost" not in run.tree.children:
        return []
    cost = run.tree["cost"].dataset
    names = [str(name) for name in cost["component"].values]
    branches = 2 if run.attributes.is_guided else 1
    reads = branches - len(run.attributes.zeroed_branches)
    decoded = decodings(run)
    calls = {
        name: reads if name in ENCODERS else len(run.steps) if name == "unet" else decoded
        for name in names
    }
    seconds = {name: _value(cost, "seconds", row) for row, name in enumerate(names)}
    flops = {name: _whole(cost, "flops", row) for row, name in enumerate(names)}
    work = {
        name: None if flops[name] is None or calls[name] is None else flops[name] * calls[name]  # type: ignore[operator]
        for name in names
    }
    times, works = _shares(seconds), _shares(work)
    return [
        Part(
            name,
            calls[name],
            _whole(cost, "parameters", row),
            _whole(cost, "weight_bytes", row),
            seconds[name],
            times[name],
            flops[name],
            works[name],
        )
        for row, name in enumerate(names)
    ]


def peak_memory(run: Run) -> int | None:
    """Return the greatest memory in bytes, or None: 0 says that the system did not tell."""
    if not holds(run, "cost/peak_memory"):
        return None
    return int(run.variable("cost/peak_memory").values) or None


def unet_share_painted_once(run: Run) -> float | None:
    """Return the UNet's share of time if the VAE had decoded the finished picture alone."""
    by_name = {part.name: part.seconds for part in parts(run)}
    times = decodings(run)
    if times is None or any(by_name.get(name) is None for name in ("unet", "vae")):
        return None
    painted = {**by_name, "vae": by_name["vae"] / times}  # type: ignore[operator]
    return _shares(painted)["unet"]


def _value(cost: Any, name: str, row: int) -> float | None:
    value = float(cost[name].values[row]) if name in cost else math.nan
    return value if math.isfinite(value) and value >= 0 else None


def _whole(cost: Any, name: str, row: int) -> int | None:
    return int(cost[name].values[row]) if name in cost else None


def _shares(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return each value's share of their sum: None for all if one is missing."""
    known = [value for value in values.values() if value is not None]
    total = sum(known)
    if len(known) < len(values) or total <= 0:
        return dict.fromkeys(values)
    return {name: (value or 0.0) / total for name, value in values.items()}


# --- the UNet ------------------------------------------------------------------------------------


def blocks(run: Run) -> list[Block]:
    """Return the UNet's blocks, from the recorded attention layers and statistics.

    A grid is that of the block's attention layers. Without any, it follows from the latents' grid:
    each block on the way down halves it, and each on the way up doubles it again. So the UNets of
    diffusers are built.
    """
    modules = _modules(run)
    layers = _attention_layers(run)
    paths = {match[0] for path in [*modules, *layers] if (match := BLOCK.match(path))}
    ordered = sorted(paths, key=_place)[:MOST_BLOCKS]
    grids: dict[str, Grid | None] = dict.fromkeys(ordered)
    for path, (grid, _) in layers.items():
        if (match := BLOCK.match(path)) and match[0] in grids:
            grids[match[0]] = grid
    _fill(grids, latent_shape(run))
    return [_block(path, grids[path], modules, layers) for path in ordered]


def _block(
    path: str, grid: Grid | None, modules: list[str], layers: dict[str, tuple[Grid, int]]
) -> Block:
    inside = [name for name in modules if name.startswith(f"{path}.")]
    crossing = [name for name in layers if name.startswith(f"{path}.")]
    return Block(
        path,
        path.replace("_blocks.", " ").replace("_block", ""),
        grid,
        sum(".resnets." in name for name in inside),
        sum(".attentions." in name for name in inside) or len(crossing),
        max((layers[name][1] for name in crossing), default=None),
        path in modules,
    )


def _place(path: str) -> tuple[int, int]:
    kind, _, number = path.partition(".")
    return ("down_blocks", "mid_block", "up_blocks").index(kind), int(number or 0)


def _fill(grids: dict[str, Grid | None], latent: tuple[int, int, int] | None) -> None:
    """Give each block without attention the grid that follows, if those that are known agree."""
    last = max((_place(path)[1] for path in grids), default=0)
    depths = {
        path: _place(path)[1] if path.startswith("down") else last - _place(path)[1]
        for path in grids
        if path != "mid_block"
    }
    depths |= {path: last for path in grids if path == "mid_block"}
    if latent is None:
        same = {depths[path]: grid for path, grid in grids.items() if grid is not None}
        following = {path: same.get(depth) for path, depth in depths.items()}
    else:
        y, x = latent[1:]
        following = {
            path: (math.ceil(y / 2**depth), math.ceil(x / 2**depth))
            for path, depth in depths.items()
        }
    if all(grid in (None, following[path]) for path, grid in grids.items()):
        grids |= following


def _modules(run: Run) -> list[str]:
    if "unet" not in run.tree.children or "module" not in run.tree["unet"].coords:
        return []
    return [str(path) for path in run.variable("unet/module").values]


def _attention_layers(run: Run) -> dict[str, tuple[Grid, int]]:
    """Return grid and heads of each recorded cross-attention layer."""
    found = {}
    for name in run.grids:
        y, _, x = name.partition("x")
        group = run.tree[f"attention/{name}"]
        sizes = group.sizes
        heads = sizes.get("each_head", sizes.get("head", 1))
        for path in group.dataset["layer"].values:
            found[str(path)] = ((int(y), int(x)), int(heads))
    return found


# --- what was measured inside --------------------------------------------------------------------


def statistics(run: Run, module: str, branch: str, image: int = 0) -> dict[str, np.ndarray]:
    """Return mean, std, min and max of a module's output. *Shape:* each (step)."""
    chosen = run.variable("unet/statistics").isel(step=run.steps, image=image)
    values = chosen.sel(branch=branch, module=module).load()
    return {str(name): values.sel(statistic=name).values for name in values["statistic"].values}


def csv_of(run: Run, module: str, branch: str, image: int = 0) -> str:
    """Return statistics of a module as comma-separated values, one line a step."""
    values = statistics(run, module, branch, image)
    rows = zip(run.steps.tolist(), *values.values(), strict=True)
    lines = [",".join(["step", *values])]
    lines += [",".join(f"{value:.9g}" for value in row) for row in rows]
    return "\n".join(lines) + "\n"


def text_attention(
    run: Run, encoder: str, layer: int, head: int | None, branch: str = "cond"
) -> tuple[np.ndarray, list[str]]:
    """Return how much each token attends to each, without padding, and the tokens' texts.

    *Shape:* (token, key) float32. `head` None is the mean of all heads.
    """
    texts = [token.label for token in tokens(run, encoder, branch)]
    some = slice(len(texts))
    chosen = run.variable(f"text/{encoder}/attention").isel(text_layer=layer, token=some, key=some)
    values = chosen.sel(branch=branch).astype("float32")
    values = values.mean("text_head") if head is None else values.isel(text_head=head)
    return values.transpose("token", "key").values, texts


def snippets(
    run: Run, module: str, branch: str, image: int, text: tuple[str, int, int | None] | None
) -> dict[str, str]:
    """Return Python that yields the arrays shown: `statistics` and `attention`."""
    opened = f"import probe\n\nrun = probe.open_run({called(run.path)!r})\n"
    found = {}
    if module:
        found["statistics"] = (
            f"{opened}values = run.variable('unet/statistics').isel(step=run.steps, image={image})"
            f".sel(branch={branch!r}, module={module!r})\n"
        )
    if text is not None:
        encoder, layer, head = text
        count = len(tokens(run, encoder))
        heads = ".mean('text_head')" if head is None else f".isel(text_head={head})"
        found["attention"] = (
            f"{opened}attention = run.variable('text/{encoder}/attention').sel(branch='cond')\n"
            f"attention = attention.isel(text_layer={layer}, token=slice({count}), "
            f"key=slice({count})).astype('float32'){heads}\n"
        )
    return found
