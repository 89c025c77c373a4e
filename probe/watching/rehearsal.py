"""A run rehearsed on the meta device: every shape and the FLOPs of each component, before anything
is computed.

The skeleton of the model (no weights, no memory) makes one UNet call, one decoding and one text
encoding while every module is watched. From this come the grid of each attention layer, in the
order in which layers run, the shape of each output, the forecast of a recording's size and the cost
of each component.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from probe.diffusion.family import Family
from probe.errors import ModelError, ProbeError
from probe.text import first_line, printable, shorten
from probe.watching.conditions import refuse_unwatchable
from probe.watching.hooks import Hooks, Watch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rehearsal:
    """What one call of each component does, `unet` for a batch of `branches` x `images`.

    `outputs` maps "unet.<module path>", "vae.<...>" and "text_encoder.<...>" to output shapes, in
    the order in which modules run; `grids` maps the UNet's cross-attention layers to (y, x),
    `self_grids` its self-attention layers, `heads` both to their number of heads; `flops` counts
    one call of each component, and `calls` how often each module runs in it.
    """

    outputs: dict[str, Shape]
    heads: dict[str, int]
    grids: dict[str, tuple[int, int]]
    self_grids: dict[str, tuple[int, int]]
    flops: dict[str, int]
    calls: dict[str, int]


REMEMBERED = 8  # rehearsals, each of some hundred names and shapes
_REHEARSED: dict[Any, Rehearsal] = {}


def rehearse(model: Family, latent_shape: Shape, branches: int, tokens: int) -> Rehearsal:
    """Run the skeleton of `model` once. `latent_shape` is (image, channel, y, x).

    A skeleton is made of configs alone, so what it did is remembered for the next run of the same
    model and sizes. Raise ModelError if hooks would not see what the model does.
    """
    refuse_unwatchable(model)
    parts = tuple(
        (name, type(module), repr(module.config)) for name, module in model.components().items()
    )
    key = (parts, model.dtype, repr(tiling(model.vae)), latent_shape, branches, tokens)
    if key not in _REHEARSED:
        made = _rehearse(model, latent_shape, branches, tokens)
        while len(_REHEARSED) >= REMEMBERED:
            del _REHEARSED[next(iter(_REHEARSED))]
        _REHEARSED[key] = made
    return _REHEARSED[key]


def tiling(vae: Any) -> dict[str, Any]:
    """What is set on a VAE and not in its config: slicing and tiling."""
    return (
        {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}
        if vae is not None
        else {}
    )


def _rehearse(model: Family, latent_shape: Shape, branches: int, tokens: int) -> Rehearsal:
    skeleton = model.skeleton()
    encoders = skeleton.text_encoders()
    outputs: dict[str, Shape] = {}
    calls: dict[str, int] = {}
    grids: dict[str, tuple[int, int]] = {}
    flops: dict[str, int] = {}
    attention = skeleton.attention_layers()
    batch = (branches * latent_shape[0], *latent_shape[1:])

    def seen(name: str) -> Callable[[Any], None]:
        def note(output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                calls[name] = calls.get(name, 0) + 1
                outputs.setdefault(name, tuple(tensor.shape))

        return note

    def entered(layers: list[str]) -> Callable[[Any], None]:
        def note(tensor: Any) -> None:
            grids.update(dict.fromkeys(layers, (int(tensor.shape[2]), int(tensor.shape[3]))))

        return note

    def watch(component: str, module: nn.Module) -> list[Watch]:
        return [
            (part, "output", seen(f"{component}.{path}"))
            for path, part in module.named_modules()
            if path
        ]

    def run(component: str, module: nn.Module, call: Callable[[], Any], extra: list[Watch]) -> None:
        with (
            Hooks([*watch(component, module), *extra]),
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            try:
                call()
            except ProbeError:
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as problem:
                why = shorten(printable(first_line(problem)))
                if component in encoders:
                    cause = f"{model.name}: its {component} does not run on {tokens} tokens: {why}"
                    raise ModelError(
                        cause,
                        f"Fetch the model again: the config of its {component} may not be whole.",
                    ) from problem
                cause = (
                    f"{model.name}: its {component} does not run on latents of {latent_shape[2]} x "
                    f"{latent_shape[3]}: {why}"
                )
                raise ModelError(
                    cause,
                    "Set another height and width, or fetch the model again: its configs may not "
                    "be whole.",
                ) from problem
        flops[component] = int(counter.get_total_flops())

    parents: list[Watch] = []
    for path, module in skeleton.unet.named_modules():
        inside = [name for name in attention if name.startswith(path + ".")]
        if type(module).__name__ == "Transformer2DModel" and inside:
            parents.append((module, "input", entered(inside)))
    with torch.device("meta"):
        latents = torch.zeros(batch, dtype=model.dtype)
        ids = torch.zeros((1, tokens), dtype=torch.long)
        t = torch.zeros((), dtype=torch.long)
    for name, (encoder, _) in encoders.items():
        run(name, encoder, functools.partial(encoder, ids), [])
    run(
        "unet",
        skeleton.unet,
        lambda: skeleton.call(latents, t, skeleton.blank(batch[0], tokens)),
        parents,
    )
    if skeleton.vae is not None:
        vae = skeleton.vae
        vars(vae).update(tiling(model.vae))
        run("vae", vae, lambda: vae.decode(latents[: latent_shape[0]], return_dict=False), [])
    heads = {path: layer.heads for path, layer in attention.items()}
    crossing, own = (
        {path: grid for path, grid in grids.items() if attention[path].kind == kind}
        for kind in ("cross", "self")
    )
    return Rehearsal(outputs, heads, crossing, own, flops, calls)


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """The UNet's cross-attention modules by dotted path."""
    return {
        path: module
        for path, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    }


def self_attention(unet: nn.Module) -> dict[str, Any]:
    """The UNet's self-attention modules by dotted path."""
    return {
        path: module
        for path, module in unet.named_modules()
        if getattr(module, "is_cross_attention", None) is False
    }


def first_tensor(output: Any) -> torch.Tensor | None:
    """The tensor that a module returns, or the first of the several it returns; None when there is
    none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return first_tensor(output[0]) if output else None
    if hasattr(output, "to_tuple"):
        return first_tensor(output.to_tuple())
    return None
