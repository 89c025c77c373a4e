"""Record a run or a noising, or go on with a run that was interrupted.

    run = record("experiments/astronaut.yaml")               # or an Experiment, or its fields
    run = record(load_noising("experiments/noising.yaml"))   # or a Noising
    run = record(Experiment(prompt="a cat"), pipeline=pipe)  # a diffusers pipeline in memory
    run = resume(open_run("latest"))                         # the bits of an uninterrupted run
    again = rerun(run)                                       # recorded once more

Recording changes nothing: the pictures have the same bits with and without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from probe.arguments import check_options, in_words
from probe.diffusion.defaults import plain_defaults
from probe.diffusion.family import Family
from probe.diffusion.loading import pick_device
from probe.diffusion.loras import borrowed
from probe.diffusion.support import remarks_on_version
from probe.diffusion.weights import DigestBeside
from probe.errors import DeviceFailed, ExperimentError, OutOfMemory, ProbeError
from probe.figures import sheets
from probe.figures.noising_sheet import save_sheet
from probe.format.attributes import MIXED
from probe.output import tell
from probe.reading.memory import Memory, nowhere
from probe.reading.recording import Run, with_files
from probe.reading.sample import folder_beside, is_copy
from probe.running.continuing import check_continuable, refuse_gaps
from probe.running.description import describe
from probe.running.model import compare_weights, model_for, refuse_unread
from probe.running.perform import perform
from probe.running.planning import check_size, free_room, plan, recorded_masks, replan, size_text
from probe.running.session import Say
from probe.settings.experiment import Experiment
from probe.settings.fields import expand_home
from probe.settings.noising import Noising, load_noising, load_recipe
from probe.settings.recipe import Recipe
from probe.stopping import breakable, cleanly
from probe.system import A_NEW_PROCESS, LESS_MEMORY, is_device_failure, is_out_of_memory
from probe.terminal import shell_path, without_home
from probe.text import first_line
from probe.watching.interface import Plan
from probe.watching.kept import measures_late
from probe.words import read_plainly
from probe.writing.files import storing
from probe.writing.store import RunWriter


def record(
    recipe: Recipe | str | Path | Mapping[str, Any],
    pipeline: Any | None = None,
    *,
    max_bytes: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Record what a recipe asks for, and return the finished recording.

    A recipe is an Experiment or a Noising; a file, or a mapping of fields, is read as an
    Experiment. `changes` are fields that differ from the recipe's. `pipeline` is a diffusers
    StableDiffusionPipeline or StableDiffusionXLPipeline, or a `Family`. It is used in place of
    `recipe.model`, on its own device and in its own dtype. Progress goes to stderr.

    With `output=None`, here or in a mapping, the recording stays in memory, and `run.save(path)`
    writes it to a folder. If such a run ends early, what it had recorded is lost.

    Raise UserError before anything is written, RunFailed after that. The recording of a failed run
    opens, and holds every committed step.
    """
    if isinstance(recipe, Mapping) and recipe.get("output", "") is None:
        recipe = {name: value for name, value in recipe.items() if name != "output"}
        changes = {"output": None, **changes}
    in_files = changes.get("output", "") is not None
    return _carried_out(
        load_recipe(recipe, **_with_a_folder(changes)),
        pipeline,
        max_bytes=check_options(max_bytes, progress=progress),
        progress=progress,
        in_files=in_files,
    )


@plain_defaults()
def record_as(
    model: Family,
    recipe: Recipe,
    name: str = "",
    *,
    weights: str | None = None,
    in_files: bool = True,
) -> Run:
    """Record a recipe with a model that is loaded already, and return the recording.

    The model may stand for a commit or a variant: the recipe says which, as if it were loaded. The
    recording is called `name`, without its ending; empty: as ever. `weights` is the digest of the
    model's weights, if it is known. Raise as `record` does.
    """
    room, say = free_room(expand_home(recipe.output)) if in_files else None, sayer(False)
    with failures_named(recipe):
        own = model_for(recipe, model, say)
        with _digested(own, weights) as digest:
            planned = plan(own, recipe)
            check_size(planned, None, room)
            return _record(own, planned, say, False, weights=digest, in_files=in_files, name=name)


def record_noising(
    picture: str | Path | np.ndarray,
    caption: str = "",
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    pipeline: Any | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
    sheet: bool = True,
    **settings: Any,
) -> Run:
    """Noise a picture, record what the model predicts for it, and return the recording.

    `picture` is a file, or (y, x, rgb) uint8 of a size that the model can work on. `masks` are
    (y, x) by word, of the picture's size. `settings` are fields of `Noising`. `pipeline` and
    `output=None` are those of `record`, and so are the errors raised.
    """
    recipe = load_noising({"caption": caption, **_with_a_folder(settings)})
    if not isinstance(picture, str | Path | np.ndarray):
        raise ExperimentError(
            f"picture: a {type(picture).__name__} is neither a file nor an array.",
            "Give a path, or numpy.asarray(picture).",
        )
    most = check_options(max_bytes, progress=progress, sheet=sheet)
    if isinstance(picture, str | Path):
        recipe, given = load_noising(recipe, picture=str(picture)), None
    else:
        given = picture
    return _carried_out(
        recipe,
        pipeline,
        given,
        masks,
        max_bytes=most,
        progress=progress,
        sheet=sheet,
        in_files=settings.get("output", "") is not None,
    )


def _with_a_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for a recipe: one that stays in memory names the default folder."""
    in_memory = settings.get("output", "") is None
    return {**settings, "output": Experiment().output} if in_memory else dict(settings)


def rerun(
    run: Run,
    pipeline: Any | None = None,
    *,
    output: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Record a run or a noising again: the same recipe, picture, commit and dtype of the weights.

    The new recording lies beside the old one, or in the folder `output`. Raise as `record` does.
    """
    recipe = opened(run).recipe
    recipe = load_recipe(recipe, output=str(output or folder_beside(with_files(run).path)))
    picture = None if run.source is None else run.source.values
    return _carried_out(
        recipe, pipeline, picture, recorded_masks(run), progress=progress, parent=run
    )


@plain_defaults()
def _carried_out(
    recipe: Experiment | Noising,
    pipeline: Any | None,
    picture: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    max_bytes: int | None = None,
    progress: bool = True,
    sheet: bool = True,
    parent: Run | None = None,
    in_files: bool = True,
) -> Run:
    """Record a recipe. With a `parent`, its model is loaded as it was for that recording."""
    room, say = free_room(expand_home(recipe.output)) if in_files else None, sayer(progress)
    with failures_named(recipe), contextlib.ExitStack() as until_done:
        model, weights = model_for(recipe, pipeline, say, parent), None
        until_done.enter_context(borrowed(model))
        if parent is not None:
            weights = compare_weights(model, parent, say)
            elsewhere = weights != parent.attributes.model.weights
            if parent.attributes.model.weights_digest != MIXED:
                weights = None
            if elsewhere and pipeline is not None:
                recipe = load_recipe(
                    recipe, model=model.name, revision=model.revision, variant=None
                )
        elif pipeline is not None:
            refuse_unread(recipe.variant, recipe.revision, model)
            if recipe.model not in (Experiment().model, model.name):
                say(
                    f"{recipe.model} is not loaded: the pipeline that was given is {model.name}, "
                    "and is recorded as that."
                )
            recipe = load_recipe(recipe, model=model.name)
        digest = until_done.enter_context(_digested(model, weights))
        planned = plan(model, recipe, picture, masks)
        check_size(planned, max_bytes, room)
        name = None if parent is None else parent.name
        return _record(model, planned, say, progress, sheet, name, digest, in_files)


def _digested(
    model: Family, weights: str | None
) -> contextlib.AbstractContextManager[str | DigestBeside]:
    """Return a block in which the digest of the weights is known, or computed beside the run."""
    return DigestBeside(model) if weights is None else contextlib.nullcontext(weights)


def opened(run: object) -> Run:
    """Return an opened recording. Raise ExperimentError for anything else, such as its name."""
    if not isinstance(run, Run):
        raise ExperimentError(
            f"run is {in_words(run)}, which is no opened recording.",
            'Open it first: probe.open_run("latest").',
        )
    return run


def _record(
    model: Family,
    plan: Plan,
    say: Say,
    progress: bool,
    sheet: bool = True,
    parent: str | None = None,
    weights: str | DigestBeside = "",
    in_files: bool = True,
    name: str = "",
) -> Run:
    known, later = (weights, None) if isinstance(weights, str) else ("", weights.result)
    recipe, created = plan.recipe, datetime.now(UTC).isoformat(timespec="milliseconds")
    content = json.dumps([recipe.resolved(), created]).encode() + (
        b"" if plan.picture is None else plan.picture.tobytes()
    )
    name = name or f"{recipe.run_name}-{hashlib.sha256(content).hexdigest()[:8]}"
    path = expand_home(recipe.output) / f"{name}.zarr"
    attributes = {**describe(model, plan, known), "created": created, "parent_run": parent}
    if plainly := read_plainly([prompt.text for prompt in plan.prompts.values()]):
        say(plainly)
    where = path if in_files else "memory"
    say(
        f"Recording {plan.calls} model calls to {where} (about "
        f"{size_text(sum(plan.forecast().values()))})"
    )
    for remark in (*remarks_on_version(), *plan.remarks):
        say(remark)
    if not in_files:
        memory = Memory(plan.arrays, attributes)
        perform(model, plan, memory, say, progress, later)
        memory.complete()
        return Run(nowhere(name), memory)
    hashing = measures_late(model.device)  # on a CPU the model needs the time itself
    with (
        cleanly(),
        RunWriter(path, plan.arrays, attributes, recipe.durability, hashing=hashing) as writer,
    ):
        _see_through(path, model, plan, writer, say, progress, sheet, later)
    return Run(path)


@plain_defaults()
def resume(run: Run, pipeline: Any | None = None, *, progress: bool = True) -> Run:
    """Finish a recording that was interrupted, and return it: the bits of an uninterrupted run.

    The committed steps are replayed through a fresh scheduler from their recorded predictions,
    without the UNet. That gives the scheduler its history and its random numbers back. If device,
    threads or versions differ from before, that is said, and written into the attribute `resumed`.
    A complete recording is returned as it is.

    Raise RecordingBusy while another process writes it. Raise ModelError for other weights. Raise
    RecordingDamaged if its experiment was edited or a value cannot be read. Raise StoreError if
    replaying does not give the recorded latents.
    """
    say = sayer(progress)
    if with_files(opened(run)).status == "complete":
        refuse_gaps(run)
        say(f"{run.name} is complete already.")
        return run
    if is_copy(run.path):
        raise ExperimentError(
            f"{run.name} is read from a copy of a zip file, and nothing is added to that.",
            "Unpack it, and resume the folder.",
        )
    if run.kind == "noising":
        raise ExperimentError(
            f"{run.name} is a noising, and those are not resumed: each is short.",
            f"Record it again: probe rerun {run.name}.",
        )
    experiment = run.experiment
    with failures_named(experiment), contextlib.ExitStack() as until_done:
        model = model_for(experiment, pipeline, say, run)
        until_done.enter_context(borrowed(model))
        planned = replan(model, run)
        here = describe(model, planned, how=run.attributes.model.weights_digest)
        changed = check_continuable(run, model, planned, here)
        for remark in remarks_on_version():
            say(remark)
        if changed:
            say(
                "Not as it was when the run began, so the last bits may differ: "
                f"{'; '.join(changed)}"
            )
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        resumption = {"at": now, "environment": here["environment"], "changed": changed}
        attributes = {
            "resumed": [*run.attributes.get("resumed", []), resumption],
            "model": {"weights": here["model"]["weights"]},
        }
        durability = experiment.durability
        with (
            cleanly(),
            RunWriter(run.path, planned.arrays, attributes, durability, resume=True) as writer,
        ):
            say(f"Resuming {run.path}: {writer.committed} of {planned.calls} model calls are there")
            _see_through(run.path, model, planned, writer, say, progress)
    return Run(run.path)


def sayer(progress: bool) -> Say:
    """Return a function that tells people on stderr how far a run is, or tells nobody."""
    return (lambda line: tell(without_home(line))) if progress else (lambda _: None)


def _see_through(
    path: Path,
    model: Family,
    plan: Plan,
    writer: RunWriter,
    say: Say,
    progress: bool,
    sheet: bool = True,
    weights: Callable[[], str] | None = None,
) -> None:
    noising = isinstance(plan.recipe, Noising)
    try:
        with breakable():
            perform(model, plan, writer, say, progress, weights)
            if sheet:
                with storing(path):
                    save_sheet(Run(path)) if noising else sheets.save(Run(path))
            writer.complete()
    except BaseException:
        go_on = "" if noising else f"; go on with it: probe run --resume {shell_path(path)}"
        say(f"The run ended early. What it had recorded is in {path}{go_on}")
        raise


@contextlib.contextmanager
def failures_named(recipe: Recipe) -> Iterator[None]:
    """Raise OutOfMemory for each of the ways in which torch and numpy run out of memory.

    Raise DeviceFailed for a GPU that fails.
    """
    try:
        yield
    except ProbeError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"Out of memory on {pick_device(recipe.device)}: {first_line(error)[:120]}",
                LESS_MEMORY,
            ) from error
        if is_device_failure(error):
            what = f"The device failed: {first_line(error)[:200]}"
            raise DeviceFailed(what, A_NEW_PROCESS) from error
        raise
