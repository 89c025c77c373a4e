"""Settle what a run will record before its first step: every variable, its shape and its size.

A plan needs the model's configs only; `probe run --dry-run` makes one without weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from probe.diffusion.embeds import remark, unlabelled
from probe.diffusion.family import Family, Tokens
from probe.diffusion.prompts import Prompt
from probe.diffusion.schedule import Schedule, first_call
from probe.diffusion.schedule_check import held_schedule, recorded_schedule, remarks
from probe.diffusion.support import refuse_pictures
from probe.editing.editing import edited
from probe.errors import ExperimentError, TooLarge
from probe.reading.recording import Run
from probe.settings.experiment import Experiment
from probe.settings.noising import Noising, load_recipe
from probe.settings.pictures import checked_masks, checked_picture, read_masks, read_picture
from probe.settings.recipe import Recipe
from probe.text import first_line
from probe.watching.cost import Cost
from probe.watching.counterfactual import Counterfactual, chosen_words
from probe.watching.cross_attention import CrossAttention
from probe.watching.decoded import Decoded
from probe.watching.head_summary import HeadSummary
from probe.watching.interface import Capture, KeptTokens, Plan, Rows
from probe.watching.labels import GridLabels
from probe.watching.latents import Latents, Levels
from probe.watching.outputs import TextOutputs, UnetOutputs, VaeOutputs
from probe.watching.queries import Queries
from probe.watching.rehearsal import Rehearsal, rehearse
from probe.watching.selection import attention_layers
from probe.watching.self_attention import SelfAttention
from probe.watching.source import Noised, Source
from probe.watching.sums import Sums
from probe.watching.text_encoder import TextEncoder
from probe.watching.text_side import TextSide
from probe.words import RULES, occurrences, word_spans
from probe.writing.files import check_output_folder
from probe.writing.layout import room


def _always(_: Plan) -> bool:
    return True


def _measures_modules(plan: Plan) -> bool:
    return plan.recipe.capture.statistics or bool(plan.recipe.capture.activations)


def _measures_vae(plan: Plan) -> bool:
    return plan.rehearsal.has_vae and _measures_modules(plan)


def _attends(*modes: str) -> Callable[[Plan], bool]:
    return lambda plan: (
        bool(plan.layers)
        and plan.recipe.capture.attention in (modes or ("maps", "queries", "summary"))
    )


# Every capture, in the order in which they are called, and when a run has it.
CAPTURES: tuple[tuple[Callable[..., Capture], Callable[[Plan], bool]], ...] = (
    (Levels, _always),
    (Latents, _always),
    (Source, lambda plan: plan.picture is not None and isinstance(plan.recipe, Experiment)),
    (Decoded, _always),
    (Noised, lambda plan: isinstance(plan.recipe, Noising)),
    (TextEncoder, lambda plan: plan.recipe.capture.text and not plan.recipe.prompt_embeds),
    (
        TextOutputs,
        lambda plan: bool(plan.recipe.capture.activations) and not plan.recipe.prompt_embeds,
    ),
    (GridLabels, _attends()),
    (UnetOutputs, _measures_modules),  # first of those inside the denoiser: it holds the most
    (CrossAttention, _attends("maps")),
    (HeadSummary, _attends("summary")),
    (Queries, _attends("queries")),
    (TextSide, _attends()),
    (SelfAttention, lambda plan: bool(plan.self_layers)),
    (VaeOutputs, _measures_vae),
    (Counterfactual, lambda plan: bool(plan.words)),
    (Sums, _attends()),
    (Cost, _always),
)
OF_ENCODERS: tuple[Callable[..., Capture], ...] = (
    TextEncoder,
    TextOutputs,
)  # one for each text encoder


def check_size(plan: Plan, limit: int | None, free: int | None) -> None:
    """Raise TooLarge if the recording would not fit; `free` is None if nobody knows the room."""
    sizes = plan.forecast()
    largest = max(sizes.items(), key=lambda item: item[1])
    elsewhere = "Free some room, or name another disk: --output FOLDER. Or record less: "
    for total, most, what, first in (
        (sum(sizes.values()), limit, "--max-bytes", ""),
        (room(plan.arrays, sizes), free, "the room on the disk", elsewhere),
    ):
        if most is not None and total > most:
            raise TooLarge(
                f"The recording would take {size_text(total)}, more than {what}: "
                f"{size_text(most)}.",
                f"{first}{'most' if first else 'Most'} of it is {largest[0]} "
                f"({size_text(largest[1])}): "
                "capture fewer layers, steps or tokens, or set capture.dtype: sqrt_u8.",
            )


def free_room(folder: Path) -> int | None:
    """Return the free bytes where `folder` is or will be; None where the disk does not say.

    Raise as `check_output_folder` does.
    """
    folder = check_output_folder(folder)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:  # some mounts have no answer
        return None
    return usage.free if usage.total else None


def size_text(n: float) -> str:
    """Return a number of bytes as people read it: 4.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


@dataclass(frozen=True)
class Course:
    """The noise levels of a recipe's steps, and what they begin from.

    `begin` is the scheduler's first call. `size` is (y, x) in pixels, None where the recipe has no
    size.
    """

    schedule: Schedule
    size: tuple[int | None, int | None]
    picture: np.ndarray | None = None
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    begin: int = 0
    remarks: tuple[str, ...] = ()


def plan(
    model: Family,
    recipe: Recipe,
    picture: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    schedule: Schedule | None = None,
    rules: int = RULES,
) -> Plan:
    """Settle what a recipe records of `model`.

    A `picture` and `masks`, (y, x) by word, take the place of the recipe's files. `schedule` and
    `rules` of text are those of a recording. Without a `schedule`, the scheduler's own is proven
    first. Raise ExperimentError or PromptError if the recipe cannot be recorded.
    """
    course = course_of(model, recipe, picture, masks, schedule)
    capture, texts = recipe.capture, recipe.texts
    read = _read(model, recipe, rules)
    prompts = {branch: next(iter(tokens.values())) for branch, tokens in read.items()}
    branches = _kept_branches(recipe)
    latent_shape = model.latent_shape(recipe.count, *course.size)
    calls = len(course.schedule.timesteps)
    kept = _kept_tokens(recipe, [prompts[branch] for branch in branches])
    rehearsal = _rehearsed(model, latent_shape, len(texts), kept.tokens)
    _check_reading(model, read)
    patterns = () if capture.attention == "off" else capture.layers
    every = recipe.decoded_every
    bare = Plan(
        recipe=recipe,
        tokens=read,
        schedule=course.schedule,
        rehearsal=rehearsal,
        latent_shape=latent_shape,
        rows=Rows(tuple(texts), branches, recipe.count),
        kept=kept,
        layers=attention_layers(rehearsal.grids, patterns),
        self_layers=attention_layers(
            rehearsal.self_grids,
            capture.self_attention,
            "capture.self_attention",
            "self-attention",
        ),
        words=chosen_words(prompts["cond"], capture.counterfactual),
        recorded=capture.steps_of(calls),
        decoded=tuple(sorted({*range(0, calls, every), calls - 1})) if every else (),
        picture=course.picture,
        masks=course.masks,
        zeroed_branches=_zeroed(model, read),
        remarks=(
            *remarks(model, course.schedule, course.begin),
            *_unlike_places(read),
            *_given(recipe),
            *course.remarks,
        ),
    )
    if (editing := edited(model, bare)) is not None:
        # A map of another text would be labelled with the words of this one.
        recorded = tuple(step for step in bare.recorded if step not in editing.texts.steps)
        bare = replace(bare, recorded=recorded)
    return replace(bare, captures=tuple(captures_of(model, bare)))


def _read(model: Family, recipe: Recipe, rules: int) -> dict[str, Tokens]:
    """Return each branch's text as tokens; beside embeddings from a file, no text is no tokens."""
    texts, over_long = recipe.texts, recipe.over_long
    read = {branch: model.tokens(text, over_long, rules) for branch, text in texts.items()}
    return read if model.embeds is None else unlabelled(read)


def _check_reading(model: Family, read: Mapping[str, Tokens]) -> None:
    """Compare our reading of texts with the pipeline's, where texts are read."""
    if model.embeds is None:
        model.check_reading(read)


def _zeroed(model: Family, read: Mapping[str, Tokens]) -> tuple[str, ...]:
    """Return the branches that are given zeros: no text encoder reads them."""
    if model.embeds is not None:
        return ()
    return tuple(branch for branch, tokens in read.items() if not model.reads(tokens, branch))


def _kept_branches(recipe: Recipe) -> tuple[str, ...]:
    """Return the branches whose attention is recorded. Raise ExperimentError if there are none."""
    wanted = recipe.capture.branches
    branches = tuple(branch for branch in recipe.texts if wanted in ("both", branch))
    if not branches:
        raise ExperimentError(
            "capture.branches: there is no unconditional branch at guidance_scale "
            f"{recipe.guidance[0]:g}.",
            "Use a guidance_scale above 1, or capture.branches: cond.",
        )
    return branches


def _kept_tokens(recipe: Recipe, prompts: Sequence[Prompt]) -> KeptTokens:
    """Return the tokens whose maps are kept: all, or up to the end of the longest prompt."""
    tokens = int(prompts[0].ids.shape[1])
    everything = recipe.capture.tokens == "all" or recipe.capture.attention == "queries"
    return KeptTokens(tokens - 1 if everything else max(p.end for p in prompts), tokens)


def course_of(
    model: Family,
    recipe: Recipe,
    picture: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    schedule: Schedule | None = None,
) -> Course:
    """Return the noise levels of a recipe, and what it begins from."""
    if isinstance(recipe, Noising):
        return _noising_course(model, recipe, picture, masks)
    assert isinstance(recipe, Experiment)
    if recipe.image is not None:
        refuse_pictures(model)
        if picture is None:
            picture = read_picture(recipe.image, *_pixels(model, recipe))
    begin = (
        0 if recipe.image is None else first_call(model.scheduler, recipe.steps, recipe.strength)
    )
    schedule = schedule or held_schedule(model, recipe, begin)
    return Course(schedule, (recipe.height, recipe.width), picture, begin=begin)


def _noising_course(
    model: Family,
    noising: Noising,
    picture: np.ndarray | None,
    masks: Mapping[str, np.ndarray] | None,
) -> Course:
    refuse_pictures(model)
    most = int(model.scheduler.config.num_train_timesteps) - 1
    if noising.timesteps[0] > most:
        raise ExperimentError(
            f"timesteps: {noising.timesteps[0]} is beyond the timesteps of {model.name}.",
            f"It knows 0 to {most}.",
        )
    if noising.capture.branches == "uncond":
        raise ExperimentError(
            "capture.branches: a noising has no unconditional branch.",
            "Leave the caption empty instead.",
        )
    if picture is not None:
        picture = checked_picture(picture, _multiple(model))
    elif noising.picture is None:
        raise ExperimentError("picture: there is none.", "Name a PNG or JPEG file: --picture FILE.")
    else:
        picture = read_picture(noising.picture, *_pixels(model, noising), "picture")
    size = int(picture.shape[0]), int(picture.shape[1])
    held = read_masks(noising.masks, *size) if masks is None else checked_masks(masks, *size)
    schedule = Schedule.at(model.scheduler, noising.timesteps)
    return Course(
        schedule, size, picture, dict(held), remarks=_masks_of_no_word(held, noising.caption)
    )


def _pixels(model: Family, recipe: Recipe) -> tuple[int, int]:
    """Return the height and width that a model draws, in pixels."""
    _, _, y, x = model.latent_shape(1, recipe.height, recipe.width)
    return y * model.f, x * model.f


def _multiple(model: Family) -> int:
    """Return the number that height and width of a picture must be multiples of."""
    return int(model.f * 2 ** (len(model.unet.config.down_block_types) - 1))


def _rehearsed(
    model: Family, latent_shape: tuple[int, int, int, int], branches: int, tokens: int
) -> Rehearsal:
    """Rehearse one call. Raise ExperimentError for a size that the model cannot run on."""
    try:
        return rehearse(model, latent_shape, branches, tokens)
    except RuntimeError as problem:
        y, x = latent_shape[2] * model.f, latent_shape[3] * model.f
        raise ExperimentError(
            f"height, width: {model.name} cannot run on {y} x {x} pixels "
            f"({first_line(problem)[:120]}).",
            f"Use multiples of {_multiple(model)}.",
        ) from problem


def _masks_of_no_word(masks: Mapping[str, np.ndarray], caption: str) -> tuple[str, ...]:
    """Return a remark on masks whose words are not in the caption: one line, or none."""
    words = [caption[start:end] for start, end in word_spans(caption)]
    absent = [word for word in masks if not occurrences(word, words)]
    if not absent:
        return ()
    return (
        f"Masks of what is not in the caption: {', '.join(absent)}. They are kept beside the "
        "picture.",
    )


def captures_of(model: Family, plan: Plan) -> Iterator[Capture]:
    """Make the captures that a plan needs."""
    for kind, needed in CAPTURES:
        if not needed(plan):
            continue
        if kind in OF_ENCODERS:
            yield from (kind(model, plan, encoder) for encoder in model.text_encoders())
        else:
            yield kind(model, plan)


def _unlike_places(read: Mapping[str, Tokens]) -> tuple[str, ...]:
    """Return a remark on tokenizers that give a word different tokens: one line, or none."""
    for first, *others in (list(tokens.values()) for tokens in read.values()):
        if any(other.word_of != first.word_of for other in others):
            return (
                f"The text encoders read {first.text[:80]!r} in different places; maps are "
                "labelled as the first one reads it.",
            )
    return ()


def _given(recipe: Recipe) -> tuple[str, ...]:
    """Return a remark on embeddings from a file: one line, or none."""
    path = recipe.prompt_embeds
    return () if path is None else (remark(path, recipe.texts),)


def replan(model: Family, run: Run, **changes: Any) -> Plan:
    """Return the plan by which a recording was made.

    Picture and masks are those that the recording holds. `changes` are fields of the recipe that
    differ.
    """
    recipe = load_recipe(run.recipe, **changes)
    picture, masks = None if run.source is None else run.source.values, recorded_masks(run)
    schedule = recorded_schedule(model, recipe) if isinstance(recipe, Experiment) else None
    rules = run.attributes.text_rules
    planned = plan(model, recipe, picture, masks, schedule=schedule, rules=rules)
    return replace(planned, format_version=run.attributes.recorded_format)


def recorded_masks(run: Run) -> dict[str, np.ndarray]:
    """Return the masks that a noising holds, by word. *Shape:* each (y, x) uint8."""
    if run.source is None or "mask" not in run.tree["source"].dataset:
        return {}
    return {str(mask["masked"].item()): mask.values for mask in run.variable("source/mask")}
