"""Where an edit acts in one run: its steps, rows, tokens, layers, heads and modules.

Everything is known from the plan, before anything runs. What matches nothing raises an
ExperimentError that names the edit and what it sought.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from probe.diffusion.family import Family
from probe.diffusion.prompts import Prompt
from probe.errors import ExperimentError, ProbeError
from probe.settings.edits import Edit
from probe.watching.conditions import is_plain
from probe.watching.interface import Plan
from probe.watching.projections import refuse_unreadable
from probe.watching.selection import activation_paths, attention_layers
from probe.words import occurrences

# A head of a layer, by the layer's dotted path.
HeadsOf = dict[str, tuple[int, ...]]
MOST_NAMED = 24  # words of a prompt in a remedy


@contextlib.contextmanager
def naming(number: int, edit: Edit) -> Iterator[None]:
    """Have errors say which edit they are about: `edits[0] (mask)`."""
    try:
        yield
    except ProbeError as problem:
        kind = str(getattr(edit, "kind", "edit"))
        if problem.cause.startswith("edits["):
            raise
        cause = f"edits[{number}] ({kind}): {problem.cause}"
        raise type(problem)(cause, problem.remedy) from None


def rows_of(plan: Plan, branch: str) -> list[int]:
    """Return the rows of the model's batch that a branch has; `both`: of every branch computed."""
    if branch == "both":
        return list(range(plan.rows.batch))
    if branch not in plan.computed_branches:
        scale = plan.recipe.guidance[0]
        raise ExperimentError(
            f"branch: there is no {branch} branch at guidance_scale {scale:g}.",
            "Use a guidance_scale above 1, or branch: cond.",
        )
    return plan.rows.of(branch)


def tokens_of(prompt: Prompt, words: Sequence[str]) -> list[int]:
    """Return the places of some words' tokens in a prompt, as the model reads it."""
    wanted: set[int] = set()
    for word in words:
        places = occurrences(word, prompt.words)
        if not places:
            raise ExperimentError(
                f"words: {word!r} is not a word of {prompt.text!r}, the text that is read here.",
                _words_there(prompt),
            )
        wanted.update(number for place in places for number in place)
    return [position for position, of in enumerate(prompt.word_of) if of in wanted]


def _words_there(prompt: Prompt) -> str:
    """Return a remedy that names the words of a prompt."""
    if not prompt.words:
        return "This prompt has no words."
    more = ", ..." if len(prompt.words) > MOST_NAMED else ""
    return f"There are: {', '.join(prompt.words[:MOST_NAMED])}{more}."


def heads_of(
    model: Family, plan: Plan, kind: str, patterns: Sequence[str], heads: Sequence[int]
) -> HeadsOf:
    """Return the heads of each attention layer of a kind, cross or self, that are meant.

    Layers that cannot be edited exactly are refused.
    """
    grids = plan.rehearsal.grids if kind == "cross" else plan.rehearsal.self_grids
    layers, modules = model.attention_layers(), HeadsOf()
    for path in attention_layers(grids, patterns, "layers", f"{kind}-attention"):
        count = layers[path].heads
        if outside := [head for head in heads if head >= count]:
            raise ExperimentError(
                f"heads: {path} has no head {outside[0]}.",
                f"It has {count}: 0 to {count - 1}.",
            )
        module = layers[path].module
        refuse_unreadable(path, module)
        if not is_plain(module):
            raise ExperimentError(
                f"layers: {path} has a {type(module.processor).__name__}, whose insides are not "
                "known.",
                "Call pipeline.unet.set_default_attn_processor(), or leave the layer out.",
            )
        modules[path] = tuple(dict.fromkeys(heads)) or tuple(range(count))
    return modules


def modules_of(plan: Plan, patterns: Sequence[str]) -> list[str]:
    """Return the paths of the UNet's modules that are meant, each of which runs once a call."""
    wanted = [f"unet.{pattern.removeprefix('unet.')}" for pattern in patterns]
    paths = [
        path.removeprefix("unet.") for path in activation_paths(plan.rehearsal, wanted, "modules")
    ]
    for path in paths:
        shape = plan.rehearsal.outputs[f"unet.{path}"]
        if shape[0] != plan.rows.batch:
            raise ExperimentError(
                f"modules: the output of {path} has shape {shape}, without one row per image.",
                "Name another module.",
            )
    return paths


def skips_of(unet: Any, outputs: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the channels of each skip connection, by the resnet of the up blocks that takes it.

    A UNet gives its up blocks what came out of `conv_in` and of every layer and downsampler of its
    down blocks, the last first. A resnet takes them behind its own input's channels.
    """
    channels = [outputs["unet.conv_in"][1]]
    for number, block in enumerate(unet.down_blocks):
        layers = range(len(block.resnets))
        channels += [outputs[f"unet.down_blocks.{number}.resnets.{n}"][1] for n in layers]
        if getattr(block, "downsamplers", None):
            channels.append(outputs[f"unet.down_blocks.{number}.downsamplers.0"][1])
    return {
        f"up_blocks.{number}.resnets.{layer}": channels.pop()
        for number, block in enumerate(unet.up_blocks)
        for layer in range(len(block.resnets))
    }


def chosen_skips(model: Family, plan: Plan, patterns: Sequence[str]) -> dict[str, int]:
    """Return the skip connections that are meant, with their channels."""
    skips = skips_of(model.unet, plan.rehearsal.outputs)
    grids = dict.fromkeys(skips, (0, 0))
    chosen = attention_layers(grids, patterns, "modules", "skip: a resnet of the up blocks")
    return {path: skips[path] for path in chosen}
