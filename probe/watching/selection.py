"""Which layers, modules and tokens a request selects."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from probe.diffusion.family import Family
from probe.errors import ExperimentError
from probe.format.schema import near
from probe.watching.rehearsal import Rehearsal

STATISTIC_CLASSES = frozenset(
    "ResnetBlock2D Transformer2DModel UNetMidBlock2D UNetMidBlock2DCrossAttn DownBlock2D "
    "CrossAttnDownBlock2D UpBlock2D CrossAttnUpBlock2D UpDecoderBlock2D".split()
)


def attention_layers(
    layers: dict[str, tuple[int, int]],
    patterns: Sequence[str],
    field: str = "capture.layers",
    kind: str = "cross-attention",
) -> dict[str, tuple[int, int]]:
    """Return those of `layers` (paths and grids) that `patterns` select.

    Raise ExperimentError, which calls the field `field`, for a pattern that selects nothing.
    """
    chosen: dict[str, tuple[int, int]] = {}
    grids = {path: f"{y}x{x}" for path, (y, x) in layers.items()}
    for pattern in patterns:
        selected = [
            path for path, grid in grids.items() if grid == pattern or fnmatchcase(path, pattern)
        ]
        if not selected:
            options = [
                *dict.fromkeys([*grids.values(), *(f"{path.split('.')[0]}.*" for path in grids)]),
                *grids,
            ]
            raise ExperimentError(
                f"{field}: {pattern!r} matches no {kind} layer.", near(pattern, options)
            )
        chosen.update({path: layers[path] for path in selected})
    return {path: grid for path, grid in layers.items() if path in chosen}


def activation_paths(
    rehearsal: Rehearsal, patterns: Sequence[str], field: str = "capture.activations"
) -> list[str]:
    """Return the modules that `patterns` select ("unet.mid_block", "vae.decoder.*", ...).

    Raise ExperimentError, which calls the field `field`, for a pattern that selects none, or only
    modules that run many times.
    """
    chosen: dict[str, None] = {}
    for pattern in patterns:
        matching = [path for path in rehearsal.outputs if fnmatchcase(path, pattern)]
        once = [path for path in matching if rehearsal.calls[path] == 1]
        if not once:
            if matching:
                raise ExperimentError(
                    f"{field}: {matching[0]} runs {rehearsal.calls[matching[0]]} times a call.",
                    "Name the modules around it.",
                )
            absent = pattern.startswith("vae") and not rehearsal.has_vae
            why = ": this model has no VAE" if absent else ""
            raise ExperimentError(
                f"{field}: {pattern!r} matches no module{why}.",
                near(pattern, list(rehearsal.outputs)),
            )
        chosen.update(dict.fromkeys(once))
    return list(chosen)


def statistic_paths(model: Family, component: str, rehearsal: Rehearsal) -> list[str]:
    """Return blocks, resnets and transformers of a component that run once a call, in order."""
    module = getattr(model, component)
    kinds = {f"{component}.{path}": type(part).__name__ for path, part in module.named_modules()}
    return [
        path
        for path in rehearsal.outputs
        if kinds.get(path) in STATISTIC_CLASSES and rehearsal.calls[path] == 1
    ]
