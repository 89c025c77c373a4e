"""What a run will record, settled before its first step: every variable with its shape, and so the forecast of its size.

A plan needs the model's configs only; `probe run --dry-run` makes one without weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from probe.diffusion.family import Family, Tokens
from probe.diffusion.schedule import Schedule, first_call
from probe.diffusion.schedule_check import held_schedule, recorded_schedule, remarks
from probe.diffusion.support import refuse_pictures
from probe.errors import ExperimentError, TooLarge
from probe.experiment import Experiment, load_experiment
from probe.files import check_place
from probe.reading.recording import Run
from probe.schema import BRANCHES
from probe.source import read_picture
from probe.store import room
from probe.strict_yaml import first_line
from probe.watching.cost import Cost
from probe.watching.counterfactual import Counterfactual, chosen_words
from probe.watching.cross_attention import CrossAttention
from probe.watching.decoded import Decoded
from probe.watching.head_summary import HeadSummary
from probe.watching.interface import Capture, Kept, Plan, Rows
from probe.watching.labels import GridLabels
from probe.watching.latents import Latents, Levels
from probe.watching.outputs import TextOutputs, UnetOutputs, VaeOutputs
from probe.watching.queries import Queries
from probe.watching.rehearsal import rehearse
from probe.watching.selection import attention_layers
from probe.watching.self_attention import SelfAttention
from probe.watching.source import Noised, Source
from probe.watching.sums import Sums
from probe.watching.text_encoder import TextEncoder
from probe.watching.text_side import TextSide
from probe.words import RULES


def _always(_: Plan) -> bool:
    return True


def _attends(*modes: str) -> Callable[[Plan], bool]:
    return lambda plan: bool(plan.layers) and plan.experiment.capture.attention in (modes or ("maps", "queries", "summary"))


# Every capture, in the order in which they are asked, and when a run has it.
CAPTURES: tuple[tuple[Callable[..., Capture], Callable[[Plan], bool]], ...] = (
    (Levels, _always),
    (Latents, _always),
    (Source, lambda plan: plan.picture is not None and plan.masks is None),
    (Decoded, _always),
    (Noised, lambda plan: plan.masks is not None),
    (TextEncoder, lambda plan: plan.experiment.capture.text),
    (TextOutputs, lambda plan: bool(plan.experiment.capture.activations)),
    (GridLabels, _attends()),
    (CrossAttention, _attends("maps")),
    (HeadSummary, _attends("summary")),
    (Queries, _attends("queries")),
    (TextSide, _attends()),
    (SelfAttention, lambda plan: bool(plan.self_layers)),
    (UnetOutputs, lambda plan: plan.experiment.capture.statistics or bool(plan.experiment.capture.activations)),
    (VaeOutputs, lambda plan: plan.experiment.capture.statistics or bool(plan.experiment.capture.activations)),
    (Counterfactual, lambda plan: bool(plan.words)),
    (Sums, _attends()),
    (Cost, _always),
)
OF_ENCODERS = (TextEncoder, TextOutputs)  # made with a text encoder's name too


def check_size(plan: Plan, limit: int | None, free: int | None) -> None:
    """Raise TooLarge if the recording would not fit; `free` is None if nobody knows the room."""
    sizes = plan.forecast()
    largest = max(sizes.items(), key=lambda item: item[1])
    whole, on_disk = sum(sizes.values()), room(plan.arrays, sizes)
    elsewhere = "Free some room, or name another disk: --output FOLDER. Or record less: "
    for total, most, what, first in ((whole, limit, "--max-bytes", ""), (on_disk, free, "the room on the disk", elsewhere)):
        if most is not None and total > most:
            raise TooLarge(
                f"The recording would take {size_text(total)}, more than {what}: {size_text(most)}.",
                f"{first}{'most' if first else 'Most'} of it is {largest[0]} ({size_text(largest[1])}): "
                "capture fewer layers, steps or tokens, or set capture.dtype: sqrt_u8.",
            )


def free_room(folder: Path) -> int | None:
    """Bytes free where `folder` is or will be; None where the disk does not say. Raises as `check_place` does."""
    folder = check_place(folder)
    try:
        found = shutil.disk_usage(folder)
    except OSError:  # some mounts have no answer
        return None
    return found.free if found.total else None


def size_text(n: float) -> str:
    """Bytes for people: 4.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def plan(
    model: Family,
    experiment: Experiment,
    picture: np.ndarray | None = None,
    schedule: Schedule | None = None,
    rules: int = RULES,
    masks: dict[str, np.ndarray] | None = None,
) -> Plan:
    """Settle what a run of `experiment` on `model` records. Raises ExperimentError or PromptError if it cannot be.

    A recording's `picture` is taken instead of reading `experiment.image`; `rules` read its text. Without a `schedule`, it is the
    scheduler's, held against what that does. With `masks`, if only {}, it is a noising.
    """
    capture = experiment.capture
    if experiment.image is not None or masks is not None:
        refuse_pictures(model)
    called = BRANCHES if experiment.guidance_scale > 1.0 else ("cond",)
    texts = {"cond": experiment.prompt, "uncond": experiment.negative_prompt}
    read = {branch: model.tokens(texts[branch], experiment.over_long, rules) for branch in called}
    prompts = {branch: next(iter(tokens.values())) for branch, tokens in read.items()}
    branches = tuple(b for b in called if capture.branches in ("both", b))
    if not branches:
        raise ExperimentError(
            f"capture.branches: there is no unconditional branch at guidance_scale {experiment.guidance_scale:g}.",
            "Use a guidance_scale above 1, or capture.branches: cond.",
        )
    latent_shape = model.latent_shape(experiment.images, experiment.height, experiment.width)
    tokens = int(prompts["cond"].ids.shape[1])
    if experiment.image is not None and picture is None:
        picture = read_picture(experiment.image, latent_shape[2] * model.f, latent_shape[3] * model.f)
    begin = 0 if experiment.image is None else first_call(model.scheduler, experiment.steps, experiment.strength)
    schedule = schedule or held_schedule(model, experiment, begin)
    calls = len(schedule.timesteps)
    try:
        rehearsal = rehearse(model, latent_shape, len(called), tokens)
    except RuntimeError as problem:
        y, x = latent_shape[2] * model.f, latent_shape[3] * model.f
        raise ExperimentError(
            f"height, width: {model.name} cannot run on {y} x {x} pixels ({first_line(problem)[:120]}).",
            f"Use multiples of {model.f * 2 ** (len(model.unet.config.down_block_types) - 1)}.",
        ) from problem
    model.check_reading(read)
    layers = attention_layers(rehearsal.grids, capture.layers) if capture.attention != "off" else {}
    selves = attention_layers(rehearsal.self_grids, capture.self_attention, "self_attention")
    kept = Kept(tokens - 1 if capture.tokens == "all" or capture.attention == "queries" else max(prompts[b].end for b in branches), tokens)
    facts = Plan(
        experiment=experiment,
        tokens=read,
        schedule=schedule,
        rehearsal=rehearsal,
        latent_shape=latent_shape,
        rows=Rows(called, branches, latent_shape[0]),
        kept=kept,
        layers=layers,
        self_layers=selves,
        words=chosen_words(prompts["cond"], capture.counterfactual),
        recorded=capture.steps_of(calls),
        decoded=tuple(sorted({*range(0, calls, experiment.decode_every), calls - 1})) if experiment.decode_every else (),
        picture=picture,
        masks=masks,
        zeroed_branches=tuple(branch for branch in called if not model.reads(read[branch], branch)),
        remarks=(*remarks(model, schedule, begin), *_unlike_places(read)),
    )
    return replace(facts, captures=tuple(_captures(model, facts)))


def _captures(model: Family, facts: Plan) -> Iterator[Capture]:
    """The captures that a run has; one for each text encoder of those of `OF_ENCODERS`."""
    for kind, when in CAPTURES:
        if when(facts):
            more = model.text_encoders() if kind in OF_ENCODERS else (None,)
            yield from (kind(model, facts) if encoder is None else kind(model, facts, encoder) for encoder in more)


def _unlike_places(read: Mapping[str, Tokens]) -> tuple[str, ...]:
    """What to say of tokenizers that put the words of a text in different places: one line, or none."""
    for first, *others in (list(tokens.values()) for tokens in read.values()):
        if any(other.word_of != first.word_of for other in others):
            return (f"The text encoders read {first.text[:80]!r} in different places; maps are labelled as the first one reads it.",)
    return ()


def replan(model: Family, run: Run, **changes: Any) -> Plan:
    """The plan by which a recording was made, of whatever kind, with the picture and the masks that it holds.

    `changes` are fields of the experiment that differ.
    """
    experiment = load_experiment(run.experiment, **changes)
    picture = None if run.source is None else run.source.values
    rules = int(run.attributes.get("text_rules", 1))
    if picture is None or "noising" not in run.attributes:
        made = plan(model, experiment, picture, recorded_schedule(model, experiment), rules)
    else:
        schedule = Schedule.at(model.scheduler, run.attributes["noising"]["timesteps"])
        made = plan(model, experiment, picture, schedule, rules, recorded_masks(run))
    return replace(made, format_version=run.attributes.recorded_format)


def recorded_masks(run: Run) -> dict[str, np.ndarray]:
    """The masks that a noising holds, (y, x) uint8 by word."""
    if run.source is None or "mask" not in run.tree["source"].dataset:
        return {}
    return {str(mask["masked"].item()): mask.values for mask in run.variable("source/mask")}
