"""Rehearse a run on the meta device: every shape and FLOP is known before anything is computed.

The skeleton of the model (no weights, no memory) makes one UNet call, one decoding and one text
encoding while every module is watched. From this come the grid of each attention layer, in the
order in which layers run, the shape of each output, the forecast of a recording's size and the cost
of each component.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
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
    """What one call of each component does; `unet` has a batch of `branches` x `images`.

    `outputs` maps "unet.<module path>", "vae.<...>" and "text_encoder.<...>" to output shapes, in
    the order in which modules run. `grids` maps the UNet's cross-attention layers to (y, x),
    `self_grids` its self-attention layers, `heads` both to their number of heads. `flops` counts
    one call of each component, `calls` how often each module runs in it.
    """

    outputs: dict[str, Shape]
    heads: dict[str, int]
    grids: dict[str, tuple[int, int]]
    self_grids: dict[str, tuple[int, int]]
    flops: dict[str, int]
    calls: dict[str, int]

    @property
    def has_vae(self) -> bool:
        """Whether the model has a VAE; one that works on pixels has none."""
        return "vae" in self.flops


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
        rehearsal = _rehearse(model, latent_shape, branches, tokens)
        while len(_REHEARSED) >= REMEMBERED:
            del _REHEARSED[next(iter(_REHEARSED))]
        _REHEARSED[key] = rehearsal
    return _REHEARSED[key]


def tiling(vae: Any) -> dict[str, Any]:
    """Return what is set on a VAE and is not in its config: slicing and tiling."""
    if vae is None:
        return {}
    return {name: value for name, value in vars(vae).items() if name.startswith(("use_", "tile_"))}


def _rehearse(model: Family, latent_shape: Shape, branches: int, tokens: int) -> Rehearsal:
    skeleton = model.skeleton()
    attention = skeleton.attention_layers()
    seen = _Seen()
    batch = (branches * latent_shape[0], *latent_shape[1:])
    parents: list[Watch] = []
    for path, module in skeleton.unet.named_modules():
        inside = [name for name in attention if name.startswith(path + ".")]
        if type(module).__name__ == "Transformer2DModel" and inside:
            parents.append((module, "input", functools.partial(seen.enter, inside)))
    with torch.device("meta"):
        latents = torch.zeros(batch, dtype=model.dtype)
        ids = torch.zeros((1, tokens), dtype=torch.long)
        t = torch.zeros((), dtype=torch.long)
    for name, (encoder, _) in skeleton.text_encoders().items():
        cause = f"{model.name}: its {name} does not run on {tokens} tokens"
        remedy = f"Fetch the model again: the config of its {name} may not be whole."
        with seen.running(name, encoder, cause, remedy):
            encoder(ids)
    size = f"latents of {latent_shape[2]} x {latent_shape[3]}"
    remedy = "Set another height and width, or fetch the model again: its configs may not be whole."
    with seen.running(
        "unet", skeleton.unet, f"{model.name}: its unet does not run on {size}", remedy, parents
    ):
        skeleton.call(latents, t, skeleton.blank(batch[0], tokens))
    if skeleton.vae is not None:
        vae = skeleton.vae
        vars(vae).update(tiling(model.vae))
        cause = f"{model.name}: its vae does not run on {size}"
        with seen.running("vae", vae, cause, remedy):
            vae.decode(latents[: latent_shape[0]], return_dict=False)
    heads = {path: layer.heads for path, layer in attention.items()}
    crossing, own = (
        {path: grid for path, grid in seen.grids.items() if attention[path].kind == kind}
        for kind in ("cross", "self")
    )
    return Rehearsal(seen.outputs, heads, crossing, own, seen.flops, seen.calls)


class _Seen:
    """What hooks saw of a rehearsal so far; its fields are those of `Rehearsal`."""

    def __init__(self) -> None:
        self.outputs: dict[str, Shape] = {}
        self.calls: dict[str, int] = {}
        self.grids: dict[str, tuple[int, int]] = {}
        self.flops: dict[str, int] = {}

    def put_out(self, name: str, output: Any) -> None:
        """Note the output of a module."""
        tensor = first_tensor(output)
        if tensor is not None:
            self.calls[name] = self.calls.get(name, 0) + 1
            self.outputs.setdefault(name, tuple(tensor.shape))

    def enter(self, layers: list[str], tensor: Any) -> None:
        """Note the grid of the attention layers inside a transformer."""
        self.grids.update(dict.fromkeys(layers, (int(tensor.shape[2]), int(tensor.shape[3]))))

    @contextlib.contextmanager
    def running(
        self,
        component: str,
        module: nn.Module,
        cause: str,
        remedy: str,
        extra: Sequence[Watch] = (),
    ) -> Iterator[None]:
        """Watch every module of a component while it runs.

        Raise ModelError, with `cause` and `remedy`, if it fails.
        """
        watches: list[Watch] = [
            (part, "output", functools.partial(self.put_out, f"{component}.{path}"))
            for path, part in module.named_modules()
            if path
        ]
        counter = FlopCounterMode(display=False)
        with Hooks([*watches, *extra]), torch.no_grad(), counter:
            try:
                yield
            except ProbeError:
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as problem:
                why = shorten(printable(first_line(problem)))
                raise ModelError(f"{cause}: {why}", remedy) from problem
        self.flops[component] = int(counter.get_total_flops())


def cross_attention(unet: nn.Module) -> dict[str, Any]:
    """Return the UNet's cross-attention modules by dotted path."""
    return {
        path: module
        for path, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    }


def self_attention(unet: nn.Module) -> dict[str, Any]:
    """Return the UNet's self-attention modules by dotted path."""
    return {
        path: module
        for path, module in unet.named_modules()
        if getattr(module, "is_cross_attention", None) is False
    }


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the first tensor of a module's output; None if there is none."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return first_tensor(output[0]) if output else None
    if hasattr(output, "to_tuple"):
        return first_tensor(output.to_tuple())
    return None
