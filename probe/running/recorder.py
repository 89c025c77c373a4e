"""Record a run or a noising, or go on with a run that was interrupted.

    run = record("experiments/astronaut.yaml")                  # or an Experiment, or a dict of its fields
    run = record(load_noising("experiments/noising.yaml"))      # or a Noising
    run = record(Experiment(prompt="a cat"), pipeline=pipe)     # an in-memory diffusers StableDiffusionPipeline
    run = resume(open_run("latest"))                            # the same bits as if it had never been interrupted
    again = rerun(run)                                          # recorded once more, from its own record

Recording changes nothing: the pictures have the same bits with and without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe.arguments import check_options, told
from probe.diffusion.families import family_of
from probe.diffusion.family import Family
from probe.diffusion.loading import load, pick_device
from probe.diffusion.support import remarks_on_version
from probe.errors import ExperimentError, ModelError, OutOfMemory, ProbeError, RecordingDamaged
from probe.figures import sheets
from probe.figures.noising_sheet import save_sheet
from probe.output import tell
from probe.reading.compare import differing_conditions
from probe.reading.memory import Memory, nowhere
from probe.reading.recording import Run, with_files
from probe.reading.sample import is_copy, place_beside
from probe.running.description import describe
from probe.running.perform import perform
from probe.running.planning import check_size, free_room, plan, recorded_masks, replan, size_text
from probe.running.session import Say
from probe.settings.experiment import Experiment
from probe.settings.fields import from_home, place
from probe.settings.noising import Noising, load_noising, load_recipe
from probe.settings.recipe import Recipe
from probe.stopping import breakable, cleanly
from probe.system import exists
from probe.terminal import shell_path, without_home
from probe.text import first_line, shown
from probe.watching.interface import Plan
from probe.words import read_plainly
from probe.writing.files import storing
from probe.writing.store import MANIFEST, RunWriter

LEVELS = ("step", "timestep", "sigma", "alpha_bar", "latents/scheduler_sigmas")
RECORD_AGAIN = "Record it again: probe rerun."


def record(
    recipe: Recipe | str | Path | Mapping[str, Any],
    pipeline: Any | None = None,
    *,
    max_bytes: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Do what a recipe asks, record it, and return the finished recording. `changes` are fields
    that differ from the recipe's.

    A recipe is an Experiment or a Noising; a file, or a mapping of fields, is read as an
    Experiment. `pipeline` is a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline, or a
    `Family`, to use instead of loading `recipe.model`; it stays on its own device and in its own
    dtype. Progress goes to stderr. Raises ProbeError: a UserError before anything is written, a
    RunFailed after (the recording then opens and holds every committed step).

    With `output=None`, the recording is in memory and no file is written; `run.save(path)` writes
    it down. What a run that ends early had recorded is lost then.
    """
    in_files = changes.get("output", "") is not None
    asked = load_recipe(
        recipe, **(changes if in_files else {**changes, "output": Experiment().output})
    )
    return _carried_out(
        asked,
        pipeline,
        max_bytes=check_options(max_bytes, progress=progress),
        progress=progress,
        in_files=in_files,
    )


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
    """Noise a picture, record what the model says of it, and return the recording: `record` of a
    Noising, with arrays.

    `picture` is a file, or (y, x, rgb) uint8 of a size that the model can work on; `masks` are (y,
    x) by word, of the picture's size. `settings` are fields of `Noising`; `pipeline` is that of
    `record`. Raises as `record` does.
    """
    asked = load_noising({"caption": caption, **settings})
    if not isinstance(picture, str | Path | np.ndarray):
        raise ExperimentError(
            f"picture: a {type(picture).__name__} is neither a file nor an array.",
            "Give a path, or numpy.asarray(picture).",
        )
    most = check_options(max_bytes, progress=progress, sheet=sheet)
    if isinstance(picture, str | Path):
        asked, given = load_noising(asked, picture=str(picture)), None
    else:
        given = picture
    return _carried_out(
        asked, pipeline, given, masks, max_bytes=most, progress=progress, sheet=sheet
    )


def rerun(
    run: Run,
    pipeline: Any | None = None,
    *,
    output: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Record a run or a noising again, from its own record: recipe, commit and number format of the
    weights, and picture.

    It is written beside the run, or into the folder `output`. Raises as `record` does.
    """
    asked = load_recipe(
        opened(run).recipe, output=str(output or place_beside(with_files(run).path))
    )
    picture = None if run.source is None else run.source.values
    return _carried_out(
        asked, pipeline, picture, recorded_masks(run), progress=progress, parent=run
    )


def _carried_out(
    asked: Experiment | Noising,
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
    """Record a recipe, `parent`'s as it was recorded; without a `sheet`, no pictures for people are
    drawn.
    """
    room, say = free_room(place(asked.output)) if in_files else None, sayer(progress)
    with out_of_memory(asked):
        model, weights = model_for(asked, pipeline, say, parent), None
        if parent is not None:
            weights = compare_weights(model, parent, say)
            if (
                weights != parent.attributes.model.weights and pipeline is not None
            ):  # then they came from elsewhere
                asked = load_recipe(asked, model=model.name, revision=model.revision, variant=None)
        elif pipeline is not None:
            refuse_unread(asked.variant, asked.revision, model)
            if asked.model not in (Experiment().model, model.name):
                say(
                    f"{asked.model} is not loaded: the pipeline that was given is {model.name}, "
                    "and is recorded as that."
                )
            asked = load_recipe(asked, model=model.name)
        settled = plan(model, asked, picture, masks)
        check_size(settled, max_bytes, room)
        return _record(
            model,
            settled,
            say,
            progress,
            sheet,
            None if parent is None else parent.name,
            weights,
            in_files,
        )


def opened(run: object) -> Run:
    """A recording that is open. Raises ExperimentError for its name."""
    if not isinstance(run, Run):
        raise ExperimentError(
            f"run is {told(run)}, which is no opened recording.",
            'Open it first: probe.open_run("latest").',
        )
    return run


def compare_weights(model: Family, run: Run, say: Say) -> str:
    """The digest of a model's weights; that it is not the one of a recording is said."""
    weights = model.digest()
    if weights != (recorded := run.attributes["model"].get("weights", "unknown")):
        say(
            f"{run.name} was recorded with other weights (digest {recorded}) than {model.name} has "
            f"here ({weights}): what comes will differ."
        )
    return weights


def _record(
    model: Family,
    plan: Plan,
    say: Say,
    progress: bool,
    sheet: bool = True,
    parent: str | None = None,
    weights: str | None = None,
    in_files: bool = True,
) -> Run:
    asked, created = plan.recipe, datetime.now(UTC).isoformat(timespec="milliseconds")
    content = json.dumps([asked.resolved(), created]).encode() + (
        b"" if plan.picture is None else plan.picture.tobytes()
    )
    name = f"{asked.run_name}-{hashlib.sha256(content).hexdigest()[:8]}"
    path = place(asked.output) / f"{name}.zarr"
    attributes = {**describe(model, plan, weights), "created": created, "parent_run": parent}
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
        perform(model, plan, memory, say, progress)
        memory.complete()
        return Run(nowhere(name), memory)
    with cleanly(), RunWriter(path, plan.arrays, attributes, asked.durability) as writer:
        _see_through(path, model, plan, writer, say, progress, sheet)
    return Run(path)


def resume(run: Run, pipeline: Any | None = None, *, progress: bool = True) -> Run:
    """Go on with a recording that was left unfinished, and return it finished, as if it had never
    been interrupted.

    The committed steps are replayed through a fresh scheduler from their recorded predictions,
    without calling the UNet: that gives it back its history and its random numbers. What decides
    bits (device, threads, versions) and is not as it was is said, and written into the attribute
    `resumed`. A complete recording is returned as it is. Raises RecordingBusy if its writer lives,
    ModelError for other weights, RecordingDamaged where its experiment was edited or a value cannot
    be read, StoreError where replaying does not give the recorded latents.
    """
    say = sayer(progress)
    if with_files(opened(run)).status == "complete":
        if (done := len(run.steps)) < (calls := run.variable("committed").size) or not exists(
            run.path / MANIFEST
        ):
            told = (
                f"only {done} of {calls} steps are committed"
                if done < calls
                else f"it has no {MANIFEST}"
            )
            raise RecordingDamaged(
                f"{run.name} says that it is complete, and {told}.", RECORD_AGAIN
            )
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
    asked = run.experiment
    with out_of_memory(asked):
        model = model_for(asked, pipeline, say, run)
        settled = replan(model, run)
        here, there = describe(model, settled), run.attributes
        if here["model"]["dtype"] != (dtype := run.attributes.model.dtype):
            raise ModelError(
                f"{run.name} was begun in {dtype}, and this model is in {here['model']['dtype']}.",
                "Bring the model in that number format, or leave the model out: probe run "
                "--resume loads it so.",
            )
        if here["model"]["weights"] != run.attributes.model.weights:  # every version wrote it
            raise ModelError(
                f"{run.name} was begun with other weights of {model.name}.",
                "Bring those back, or record it again: probe rerun.",
            )
        if (
            here["identity"] != there.get("identity") and here["experiment"] == there["experiment"]
        ):  # else an older version began it, with fewer fields
            raise RecordingDamaged(
                f"The experiment in {run.name} is not the one it was begun with.",
                "Record it again: probe run.",
            )
        changed = differing_conditions(there, here)
        _hold(run, settled, here, bool(changed))
        for remark in remarks_on_version():
            say(remark)
        if changed:
            say(
                "Not as it was when the run began, so the last bits may differ: "
                f"{'; '.join(changed)}"
            )
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        attributes = {
            "resumed": [
                *there.get("resumed", []),
                {"at": now, "environment": here["environment"], "changed": changed},
            ]
        }
        with (
            cleanly(),
            RunWriter(
                run.path, settled.arrays, attributes, asked.durability, resume=True
            ) as writer,
        ):
            say(f"Resuming {run.path}: {writer.committed} of {settled.calls} model calls are there")
            _see_through(run.path, model, settled, writer, say, progress)
    return Run(run.path)


def _hold(run: Run, settled: Plan, here: Mapping[str, Any], changed: bool) -> None:
    """Hold what a recording says of its model and its schedule against what would go on. Raises
    RecordingDamaged, by field.

    Settings that only one version of diffusers has are passed over. Noise levels may differ by
    rounding where conditions `changed`.
    """
    there = run.attributes
    for field, (recorded, asked) in said_of_model(run, here).items():
        if type(recorded) is not type(asked) or recorded != asked:
            told = f"its {field} is {shown(recorded)}, and {shown(asked)} would go on"
            raise RecordingDamaged(f"{run.name}: {told}.", RECORD_AGAIN)
    for a in settled.arrays:
        if a.value is None or a.path not in LEVELS:
            continue
        recorded, asked = run.variable(a.path).values, np.asarray(a.value, a.dtype)
        if recorded.shape != asked.shape or not np.allclose(
            recorded, asked, rtol=1e-4 if changed else 0, atol=0, equal_nan=True
        ):
            raise RecordingDamaged(
                f"{run.name}: its {a.path} is not that of the {there['scheduler']['class']} that "
                "would go on.",
                RECORD_AGAIN,
            )


def said_of_model(run: Run, here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what a recording says of its model, by field, each with what `describe` says of this
    one (`here`).
    """
    there = run.attributes
    pairs = {name: (there[name], here[name]) for name in ("prediction_type", "latent_convention")}
    pairs["scheduler.class"] = there["scheduler"]["class"], here["scheduler"]["class"]
    config, own = there["scheduler"]["config"], here["scheduler"]["config"]
    shared = [key for key in own if key in config and not key.startswith("_")]
    pairs |= {f"scheduler.config.{key}": (config[key], own[key]) for key in shared}
    pairs |= {
        f"model.{key}": (there["model"][key], here["model"][key])
        for key in ("f", "scaling_factor")
        if key in there["model"]
    }
    pairs["model.name"] = from_home(there["model"]["name"]), from_home(run.recipe.model)
    return pairs


def sayer(progress: bool) -> Say:
    """What tells people on stderr how far a run is, or nobody."""
    return (lambda line: tell(without_home(line))) if progress else (lambda _: None)


def model_for(asked: Recipe, pipeline: Any | None, say: Say, recorded: Run | None = None) -> Family:
    """The recipe's model, or that of a `pipeline` in memory, with the recipe's scheduler.

    Of a `recorded` run it is loaded as it was: its commit, where "main" may have moved on, and what
    an "auto" dtype became.
    """
    scheduler, options = asked.sampler
    if pipeline is None:
        say(f"Loading {asked.model} ...")
        where: dict[str, Any] = {
            "revision": asked.revision,
            "variant": asked.variant,
            "dtype": asked.dtype,
            "device": asked.device,
        }
        if recorded is not None:
            there = recorded.attributes.model
            where |= {"revision": there.revision or asked.revision, "dtype": there.dtype}
        model: Family = load(asked.model, **where, scheduler=scheduler, options=options)
    else:
        model = family_of(pipeline, scheduler=scheduler, options=options)
    if pipeline is not None:
        refuse_contradiction(asked.dtype, asked.device, model, recorded)
    return model


def refuse_contradiction(
    dtype: str, device: str, model: Family, recorded: Run | None = None
) -> None:
    """Raise ExperimentError where a pipeline is not in the number format or on the device that is
    asked for, or was.
    """
    own, where = str(model.dtype).removeprefix("torch."), model.device
    wanted = torch.device(where if device == "auto" else device)
    elsewhere = wanted.type != where.type or (
        wanted.index is not None and wanted.index != (where.index or 0)
    )
    for field, value, found, differs in (
        ("dtype", dtype, f"in {own}", dtype not in ("auto", own)),
        ("device", device, f"on {where}", elsewhere),
    ):
        if differs:
            to = f'pipeline.to("{value}")' if field == "device" else f"pipeline.to(torch.{value})"
            instead = (
                f"leave {field} out"
                if recorded is None
                else f'record it anew: probe.record(run.recipe, pipeline, {field}="auto")'
            )
            raise ExperimentError(
                f"{field}: {value} is asked for, and the pipeline is {found}.",
                f"Bring it there, {to}, or {instead}.",
            )


def refuse_unread(variant: str | None, revision: str | None, model: Family) -> None:
    """Raise ExperimentError for fields that say which files to load, where a pipeline in memory has
    its weights already.
    """
    for field, value, own in (("variant", variant, None), ("revision", revision, model.revision)):
        if value not in (None, own):
            raise ExperimentError(
                f"{field}: {shown(value)} says which files to load, and the pipeline has its "
                "weights already.",
                f"Leave {field} out, or leave out the pipeline.",
            )


def _see_through(
    path: Path,
    model: Family,
    plan: Plan,
    writer: RunWriter,
    say: Say,
    progress: bool,
    sheet: bool = True,
) -> None:
    noising = isinstance(plan.recipe, Noising)
    try:
        with breakable():
            perform(model, plan, writer, say, progress)
            if sheet:
                with storing(path):
                    save_sheet(Run(path)) if noising else sheets.save(Run(path))
            writer.complete()
    except BaseException:
        go_on = "" if noising else f"; go on with it: probe run --resume {shell_path(path)}"
        say(f"The run ended early. What it had recorded is in {path}{go_on}")
        raise


@contextlib.contextmanager
def out_of_memory(asked: Recipe) -> Iterator[None]:
    """torch's and numpy's three kinds of running out of memory, as one."""
    try:
        yield
    except ProbeError:
        raise
    except (MemoryError, RuntimeError) as error:
        said = ("not enough memory", "can't allocate", "can't start new thread")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
            words in str(error) for words in said
        ):
            raise OutOfMemory(
                f"Out of memory on {pick_device(asked.device)}: {first_line(error)[:120]}",
                "Fewer images, a smaller height and width, --dtype float16, or fewer "
                "capture.layers.",
            ) from error
        raise
