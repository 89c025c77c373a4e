"""Count what a call costs, layer by layer, from the shapes that hooks see on the meta device.

    model = blueprint("sd14")
    layers = unet_layers(model, (4, 64, 64))
    sum(layer.flops for layer in layers)             # 803,273,326,... of one call with one row

A multiply-add counts as 2. Counted are convolutions, linear layers, and the two products of each
attention layer: queries with keys, and probabilities with values. What is cheap beside these
(norms, activations, sums, softmax) is not counted, as torch's own FlopCounterMode does not.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from probe.diffusion.families import AnyFamily
from probe.diffusion.loading import blueprint
from probe.diffusion.variants import channels_at, coarse, levels, remade, unet_at, vae_at
from probe.errors import ExperimentError, ModelError, ProbeError
from probe.reading.pixels import KINDS, Attention, Component, Count, Counts, Kind
from probe.settings.cost import Cost
from probe.text import first_line, printable, shorten
from probe.watching.hooks import Hooks, Watch
from probe.watching.rehearsal import first_tensor

LayerKind: TypeAlias = Kind | Literal["other"]
NOTHING_NEW = (nn.Dropout, nn.Identity)  # what they put out is what they were given
# The names of queries, keys and heads, in diffusers' attention and in CLIP's.
NAMES = (("to_q", "to_k", "heads"), ("q_proj", "k_proj", "num_heads"))
Shape: TypeAlias = tuple[int, ...]
Way: TypeAlias = Literal["encode", "decode"]


@dataclass(frozen=True)
class LayerCount:
    """One layer in one call. `output` is the shape that it puts out, at its last use.

    `numbers` is how many numbers it puts out, `matrix` how many its attention matrices have. An
    attention layer holds its products alone: its linear layers are listed by themselves.
    """

    path: str
    kind: LayerKind
    parameters: int
    flops: int
    numbers: int
    matrix: int
    output: Shape


def layers_of(module: nn.Module, call: Callable[[], Any]) -> list[LayerCount]:
    """Return every layer of a module that `call` runs, in their order of definition."""
    seen: dict[str, list[Shape]] = {}

    def note(path: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            seen.setdefault(path, []).append(tuple(tensor.shape))

    watches: list[Watch] = [
        (part, "output", functools.partial(note, path)) for path, part in module.named_modules()
    ]
    with Hooks(watches), torch.no_grad():
        call()
    return [
        layer
        for path, part in module.named_modules()
        if (layer := _layer(path, part, seen)) is not None
    ]


def _layer(path: str, part: nn.Module, seen: dict[str, list[Shape]]) -> LayerCount | None:
    """Return what a module costs by itself, without the modules inside it; None for nothing."""
    outputs = seen.get(path, [])
    parameters = sum(weight.numel() for weight in part.parameters(recurse=False))
    leaf = not any(True for _ in part.children())
    numbers = sum(map(math.prod, outputs)) if leaf and not isinstance(part, NOTHING_NEW) else 0
    last = outputs[-1] if outputs else ()
    made = LayerCount(path, "other", parameters, 0, numbers, 0, last)
    if isinstance(part, nn.Conv2d):
        each = part.in_channels // part.groups * math.prod(part.kernel_size)
        return replace(made, kind="convolution", flops=2 * each * numbers)
    if isinstance(part, nn.Linear):
        return replace(made, kind="linear", flops=2 * part.in_features * numbers)
    if outputs and (names := _attention_names(part)):
        matrix, flops = _attention(path, int(getattr(part, names[2])), names, seen)
        crosses = bool(getattr(part, "is_cross_attention", False))
        kind: LayerKind = "cross_attention" if crosses else "self_attention"
        return replace(made, kind=kind, flops=flops, matrix=matrix)
    return made if parameters or numbers else None


def _attention_names(part: nn.Module) -> tuple[str, str, str] | None:
    """Return the names of an attention layer's queries, keys and heads; None for other modules."""
    return next((names for names in NAMES if all(hasattr(part, name) for name in names)), None)


def _attention(
    path: str, heads: int, names: tuple[str, str, str], seen: dict[str, list[Shape]]
) -> tuple[int, int]:
    """Return the numbers in an attention layer's matrices, and the FLOPs of its two products."""
    start = f"{path}." if path else ""
    matrix = flops = 0
    pairs = zip(seen[start + names[0]], seen[start + names[1]], strict=True)
    for (rows, queries, width), (_, keys, _) in pairs:
        matrix += rows * heads * queries * keys
        flops += 2 * 2 * rows * queries * keys * width
    return matrix, flops


# --- the parts of a model -------------------------------------------------------------------------


def text_layers(model: AnyFamily) -> dict[str, list[LayerCount]]:
    """Return the layers of each text encoder, by name, for one text of the longest kind."""
    counted = {}
    for name, (encoder, _) in model.text_encoders().items():
        ids = torch.zeros((1, _tokens(encoder)), dtype=torch.long, device="meta")
        counted[name] = _checked(model, name, encoder, functools.partial(encoder, ids))
    return counted


def tokens_of(model: AnyFamily) -> int:
    """Return how many tokens a text has."""
    encoder, _ = next(iter(model.text_encoders().values()))
    return _tokens(encoder)


def _tokens(encoder: Any) -> int:
    return int(encoder.config.max_position_embeddings)


def unet_layers(model: AnyFamily, shape: Sequence[int], rows: int = 1) -> list[LayerCount]:
    """Return the layers of the denoiser for an input of (channel, y, x)."""
    latents = torch.zeros((rows, *shape), dtype=model.dtype, device="meta")
    t = torch.zeros((), dtype=torch.long, device="meta")
    tokens = tokens_of(model)

    def call() -> Any:
        return model.call(latents, t, model.blank(rows, tokens))

    return _checked(model, "unet", model.unet, call)


def vae_layers(model: AnyFamily, vae: Any, shape: Sequence[int], way: Way) -> list[LayerCount]:
    """Return the layers of the VAE's encoder or decoder, for pixels or latents of this shape.

    Convolutions between it and the latents belong to it.
    """
    given = torch.zeros((1, *shape), dtype=model.dtype, device="meta")
    call = getattr(vae, way)
    layers = _checked(model, "vae", vae, lambda: call(given, return_dict=False))
    return [layer for layer in layers if layer.output]


def _checked(
    model: AnyFamily, part: str, module: nn.Module, call: Callable[[], Any]
) -> list[LayerCount]:
    """Return the layers that a call runs. Raise ModelError if it does not run at this size."""
    try:
        return layers_of(module, call)
    except ProbeError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as problem:
        why = shorten(printable(first_line(problem)))
        raise ModelError(
            f"{model.name}: its {part} does not run at this size: {why}",
            "Take other sizes, or fetch the model again: its configs may not be whole.",
        ) from problem


# --- the table ------------------------------------------------------------------------------------


Entry: TypeAlias = tuple[Count, list[LayerCount]]


def count_models(
    asked: Sequence[Cost],
    made_by: str,
    progress: Callable[[str], None] = lambda _: None,
    note: Callable[[Entry], None] = lambda _: None,
) -> Counts:
    """Return the counts that several settings ask for, which share a number format.

    `note` is given each count beside its layers.
    """
    import diffusers

    rows: list[Count] = []
    tokens: dict[str, int] = {}
    factors: dict[str, int] = {}
    for settings in asked:
        counter = Counter(blueprint(settings.model), settings)
        for entry in counter.entries(progress):
            rows.append(entry[0])
            note(entry)
        tokens[settings.model] = tokens_of(counter.model)
        factors[settings.model] = counter.model.f
    return Counts(
        made_by=made_by,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        bytes_per_number=asked[0].bytes_per_number,
        attention_up_to=asked[0].attention_up_to,
        tokens=tokens,
        own_f=factors,
        rows=tuple(rows),
    )


class Counter:
    """Counts of one model, each made once."""

    def __init__(self, model: AnyFamily, settings: Cost):
        self.model, self._settings = model, settings
        self._made: dict[Any, Any] = {}

    def entries(self, progress: Callable[[str], None] = lambda _: None) -> list[Entry]:
        """Return every count that the settings ask for, beside the layers that it adds up.

        Text comes first, then each size at each f.
        """
        places = list(itertools.product(self._settings.sizes, self._settings.f))
        for size, f in places:
            self.shape(f, size)  # refused before anything is counted
        entries = [
            self._entry(component, layers)
            for component, layers in self._once("text", lambda: text_layers(self.model)).items()
        ]
        for size, f in places:
            progress(f"{self._settings.model} at {size[0]} x {size[1]} pixels, f = {f}")
            entries += self.at(f, size)
        return entries

    def at(self, f: int, size: tuple[int, int]) -> list[Entry]:
        """Return denoiser, encoder and decoder at an f and a size in pixels."""
        shape = self.shape(f, size)
        place: dict[str, Any] = {"f": f, "size": size, "shape": shape}
        entries = [self._entry("denoiser", self.unet(f, shape), **place)]
        if self.is_wide(shape):
            layers = self.unet(f, shape, "coarse")
            entries.append(self._entry("denoiser", layers, attention="coarse", **place))
        if f == 1 or self.model.vae is None:
            return entries
        vae = self._once(("vae", f), lambda: self._vae(f))
        ways: tuple[tuple[Way, Shape], ...] = (("encode", (3, *size)), ("decode", shape))
        for way, given in ways:
            layers = self._once(
                (way, f, given), functools.partial(vae_layers, self.model, vae, given, way)
            )
            entries.append(self._entry(f"vae_{way}", layers, **place))
        return entries

    def shape(self, f: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (channel, y, x) of what the denoiser reads.

        Raise ExperimentError for a grid that is too small, or latents without a VAE.
        """
        if f != 1 and self.model.vae is None:
            raise ExperimentError(
                f"f: {self.model.name} has no VAE, of which one with f = {f} could be derived",
                "It works on pixels: take f: [1].",
            )
        y, x = size[0] // f, size[1] // f
        least = 2 ** (levels(self.model.unet) - 1)
        if min(y, x) < least:
            raise ExperimentError(
                f"sizes: {size[0]} x {size[1]} pixels are {y} x {x} latents at f = {f}, and the "
                f"coarsest grid of {self.model.name} would have less than one place",
                f"Take {least * f} pixels or more a side, or leave {f} out of f.",
            )
        return channels_at(self.model.unet, f), y, x

    def is_wide(self, shape: Sequence[int]) -> bool:
        """Tell whether coarse attention leaves out any layer at this input."""
        return bool(self._coarse(shape))

    def _coarse(self, shape: Sequence[int]) -> dict[str, Any]:
        grid = (shape[1], shape[2])
        return coarse(self.model.unet, grid, self._settings.attention_up_to)

    def unet(
        self, f: int, shape: tuple[int, int, int], attention: Attention = "full"
    ) -> list[LayerCount]:
        """Return the denoiser's layers for an input of this shape."""
        changes = unet_at(self.model.unet, f)
        changes |= self._coarse(shape) if attention == "coarse" else {}

        def count() -> list[LayerCount]:
            return unet_layers(replace(self.model, unet=remade(self.model.unet, changes)), shape)

        layers: list[LayerCount] = self._once(("unet", shape, attention), count)
        return layers

    def _vae(self, f: int) -> Any:
        changes = vae_at(self.model.vae, f)
        return remade(self.model.vae, changes) if changes else self.model.vae

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _entry(self, component: str, layers: list[LayerCount], **place: Any) -> Entry:
        return counted(self._settings, component, layers, **place), layers


def counted(settings: Cost, component: str, layers: list[LayerCount], **place: Any) -> Count:
    """Return layers added up."""
    flops: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for layer in layers:
        if layer.kind != "other":
            flops[layer.kind] += layer.flops
    number = settings.bytes_per_number
    matrices = [layer.matrix for layer in layers]
    kind: Component = component  # type: ignore[assignment]
    return Count(
        model=settings.model,
        component=kind,
        parameters=sum(layer.parameters for layer in layers),
        flops=flops,
        activation_bytes=number * sum(layer.numbers for layer in layers),
        attention_bytes=number * sum(matrices),
        largest_attention_bytes=number * max(matrices, default=0),
        widest=_widest(layers, place.get("shape")) if component == "denoiser" else None,
        **place,
    )


def _widest(layers: list[LayerCount], shape: tuple[int, int, int] | None) -> tuple[int, int] | None:
    """Return the widest grid on which self-attention runs, from the number of its places."""
    places = [layer.output[1] for layer in layers if layer.kind == "self_attention"]
    if not places or shape is None:
        return None
    grid = shape[1:]
    while math.prod(grid) > max(places):
        grid = (math.ceil(grid[0] / 2), math.ceil(grid[1] / 2))
    return grid
