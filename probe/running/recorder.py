"""Record a run, or go on with one that was interrupted.

    run = record("experiments/astronaut.yaml")                  # or an Experiment, or a dict of its fields
    run = record(Experiment(prompt="a cat"), pipeline=pipe)     # an in-memory diffusers StableDiffusionPipeline
    run = resume(open_run("latest"))                            # the same bits as if it had never been interrupted
    again = rerun(run)                                          # recorded once more, from its own record

Recording changes nothing: the pictures have the same bits with and without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe import pictures
from probe.arguments import check_options, told
from probe.conversions import clipping, clipping_text
from probe.diffusion.families import family_of
from probe.diffusion.family import Family
from probe.diffusion.loading import load, pick_device
from probe.diffusion.support import remarks_on_version
from probe.errors import ExperimentError, ModelError, OutOfMemory, ProbeError, RecordingDamaged
from probe.experiment import Experiment, load_experiment
from probe.fields import from_home, place
from probe.files import storing
from probe.output import tell
from probe.reading.compare import differing_conditions
from probe.reading.memory import Memory, nowhere
from probe.reading.recording import Run, with_files
from probe.reading.sample import is_copy, place_beside
from probe.running.perform import perform
from probe.running.planning import check_size, free_room, plan, replan, size_text
from probe.running.session import Say
from probe.schema import FORMAT_STATUS, FORMAT_VERSION
from probe.stopping import breakable, cleanly
from probe.store import MANIFEST, RunWriter
from probe.strict_yaml import first_line, shown
from probe.system import exists
from probe.terminal import shell_path, without_home
from probe.watching.interface import Plan
from probe.words import RULES, read_plainly

LEVELS = ("step", "timestep", "sigma", "alpha_bar", "latents/scheduler_sigmas")
RECORD_AGAIN = "Record it again: probe rerun."


def record(
    experiment: Experiment | str | Path | Mapping[str, Any],
    pipeline: Any | None = None,
    *,
    max_bytes: int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Run an experiment, record it, and return the finished recording. `changes` are fields that differ from the experiment's.

    `pipeline` is a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline, or a `Family`, to use instead of loading
    `experiment.model`; it stays on its own device and in its own dtype. Progress goes to stderr. Raises ProbeError: a UserError
    before anything is written, a RunFailed after (the recording then opens and holds every committed step).

    With `output=None`, the recording is in memory and no file is written; `run.save(path)` writes it down. What a run that ends
    early had recorded is lost then.
    """
    in_files = changes.get("output", "") is not None
    asked = load_experiment(experiment, **(changes if in_files else {**changes, "output": Experiment().output}))
    max_bytes = check_options(max_bytes, progress=progress)
    room, say = free_room(place(asked.output)) if in_files else None, sayer(progress)
    with out_of_memory(asked):
        model = model_for(asked, pipeline, say)
        if pipeline is not None:
            refuse_unread(asked.variant, asked.revision, model)
            if asked.model not in (Experiment().model, model.name):
                say(f"{asked.model} is not loaded: the pipeline that was given is {model.name}, and is recorded as that.")
            asked = load_experiment(asked, model=model.name)
        settled = plan(model, asked)
        check_size(settled, max_bytes, room)
        return _record(model, settled, say, progress, in_files=in_files)


def rerun(run: Run, pipeline: Any | None = None, *, output: str | Path | None = None, progress: bool = True) -> Run:
    """Record a run again, from its own record: experiment, commit and number format of the weights, and picture.

    It is written beside the run, or into the folder `output`. Raises as `record` does. A noising has its own: `probe.noising.rerun_noising`.
    """
    asked = load_experiment(opened(run).experiment, output=str(output or place_beside(with_files(run).path)))
    room, say = free_room(place(asked.output)), sayer(progress)
    with out_of_memory(asked):
        model = model_for(asked, pipeline, say, run)
        weights = compare_weights(model, run, say)
        if weights != run.attributes.model.weights and pipeline is not None:  # then they came from elsewhere
            asked = load_experiment(asked, model=model.name, revision=model.revision, variant=None)
        settled = plan(model, asked, None if run.source is None else run.source.values)
        check_size(settled, None, room)
        return _record(model, settled, say, progress, run.name, weights)


def opened(run: object) -> Run:
    """A recording that is open. Raises ExperimentError for its name."""
    if not isinstance(run, Run):
        raise ExperimentError(f"run is {told(run)}, which is no opened recording.", 'Open it first: probe.open_run("latest").')
    return run


def compare_weights(model: Family, run: Run, say: Say) -> str:
    """The digest of a model's weights; that it is not the one of a recording is said."""
    weights = model.digest()
    if weights != (recorded := run.attributes["model"].get("weights", "unknown")):
        say(f"{run.name} was recorded with other weights (digest {recorded}) than {model.name} has here ({weights}): what comes will differ.")
    return weights


def _record(
    model: Family,
    run: Plan,
    say: Say,
    progress: bool,
    parent: str | None = None,
    weights: str | None = None,
    in_files: bool = True,
) -> Run:
    asked, created = run.experiment, datetime.now(UTC).isoformat(timespec="milliseconds")
    key = hashlib.sha256(json.dumps([asked.resolved(), created]).encode()).hexdigest()[:8]
    name = f"{asked.run_name}-{key}"
    path = place(asked.output) / f"{name}.zarr"
    attributes = {**describe(model, run, weights), "created": created, "parent_run": parent}
    if plainly := read_plainly([prompt.text for prompt in run.prompts.values()]):
        say(plainly)
    where = path if in_files else "memory"
    say(f"Recording {run.calls} model calls to {where} (about {size_text(sum(run.forecast().values()))})")
    for remark in (*remarks_on_version(), *run.remarks):
        say(remark)
    if not in_files:
        memory = Memory(run.arrays, attributes)
        perform(model, run, memory, say, progress)
        memory.complete()
        return Run(nowhere(name), memory)
    with cleanly(), RunWriter(path, run.arrays, attributes, asked.durability) as writer:
        _see_through(path, model, run, writer, say, progress)
    return Run(path)


def resume(run: Run, pipeline: Any | None = None, *, progress: bool = True) -> Run:
    """Go on with a recording that was left unfinished, and return it finished, as if it had never been interrupted.

    The committed steps are replayed through a fresh scheduler from their recorded predictions, without calling the UNet:
    that gives it back its history and its random numbers. What decides bits (device, threads, versions) and is not as it
    was is said, and written into the attribute `resumed`. A complete recording is returned as it is. Raises RecordingBusy
    if its writer lives, ModelError for other weights, RecordingDamaged where its experiment was edited or a value cannot be
    read, StoreError where replaying does not give the recorded latents.
    """
    say = sayer(progress)
    if with_files(opened(run)).status == "complete":
        if (done := len(run.steps)) < (calls := run.variable("committed").size) or not exists(run.path / MANIFEST):
            told = f"only {done} of {calls} steps are committed" if done < calls else f"it has no {MANIFEST}"
            raise RecordingDamaged(f"{run.name} says that it is complete, and {told}.", RECORD_AGAIN)
        say(f"{run.name} is complete already.")
        return run
    if is_copy(run.path):
        raise ExperimentError(f"{run.name} is read from a copy of a zip file, and nothing is added to that.", "Unpack it, and resume the folder.")
    if "noising" in run.attributes:
        raise ExperimentError(f"{run.name} is a noising, and those are not resumed: each is short.", f"Record it again: probe rerun {run.name}.")
    asked = run.experiment
    with out_of_memory(asked):
        model = model_for(asked, pipeline, say, run)
        settled = replan(model, run)
        here, there = describe(model, settled), run.attributes
        if here["model"]["dtype"] != (dtype := run.attributes.model.dtype):
            raise ModelError(
                f"{run.name} was begun in {dtype}, and this model is in {here['model']['dtype']}.",
                "Bring the model in that number format, or leave the model out: probe run --resume loads it so.",
            )
        if here["model"]["weights"] != run.attributes.model.weights:  # every version wrote it
            raise ModelError(f"{run.name} was begun with other weights of {model.name}.", "Bring those back, or record it again: probe rerun.")
        if (
            here["identity"] != there.get("identity") and here["experiment"] == there["experiment"]
        ):  # else an older version began it, with fewer fields
            raise RecordingDamaged(f"The experiment in {run.name} is not the one it was begun with.", "Record it again: probe run.")
        changed = differing_conditions(there, here)
        _hold(run, settled, here, bool(changed))
        for remark in remarks_on_version():
            say(remark)
        if changed:
            say(f"Not as it was when the run began, so the last bits may differ: {'; '.join(changed)}")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        attributes = {"resumed": [*there.get("resumed", []), {"at": now, "environment": here["environment"], "changed": changed}]}
        with cleanly(), RunWriter(run.path, settled.arrays, attributes, asked.durability, resume=True) as writer:
            say(f"Resuming {run.path}: {writer.committed} of {settled.calls} model calls are there")
            _see_through(run.path, model, settled, writer, say, progress)
    return Run(run.path)


def _hold(run: Run, settled: Plan, here: Mapping[str, Any], changed: bool) -> None:
    """Hold what a recording says of its model and its schedule against what would go on. Raises RecordingDamaged, by field.

    Settings that only one version of diffusers has are passed over. Noise levels may differ by rounding where conditions `changed`.
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
        if recorded.shape != asked.shape or not np.allclose(recorded, asked, rtol=1e-4 if changed else 0, atol=0, equal_nan=True):
            raise RecordingDamaged(f"{run.name}: its {a.path} is not that of the {there['scheduler']['class']} that would go on.", RECORD_AGAIN)


def said_of_model(run: Run, here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what a recording says of its model, by field, each with what `describe` says of this one (`here`)."""
    there = run.attributes
    pairs = {name: (there[name], here[name]) for name in ("prediction_type", "latent_convention")}
    pairs["scheduler.class"] = there["scheduler"]["class"], here["scheduler"]["class"]
    config, own = there["scheduler"]["config"], here["scheduler"]["config"]
    shared = [key for key in own if key in config and not key.startswith("_")]
    pairs |= {f"scheduler.config.{key}": (config[key], own[key]) for key in shared}
    pairs |= {f"model.{key}": (there["model"][key], here["model"][key]) for key in ("f", "scaling_factor") if key in there["model"]}
    pairs["model.name"] = from_home(there["model"]["name"]), from_home(run.experiment.model)
    return pairs


def sayer(progress: bool) -> Say:
    """What tells people on stderr how far a run is, or nobody."""
    return (lambda line: tell(without_home(line))) if progress else (lambda _: None)


def model_for(asked: Experiment, pipeline: Any | None, say: Say, recorded: Run | None = None) -> Family:
    """The experiment's model, or that of a `pipeline` in memory, with the experiment's scheduler.

    Of a `recorded` run it is loaded as it was: its commit, where "main" may have moved on, and what an "auto" dtype became.
    """
    if pipeline is None:
        say(f"Loading {asked.model} ...")
        where: dict[str, Any] = {"revision": asked.revision, "variant": asked.variant, "dtype": asked.dtype, "device": asked.device}
        if recorded is not None:
            there = recorded.attributes.model
            where |= {"revision": there.revision or asked.revision, "dtype": there.dtype}
        model: Family = load(asked.model, **where, scheduler=asked.scheduler, options=asked.scheduler_options)
    else:
        model = family_of(pipeline, scheduler=asked.scheduler, options=asked.scheduler_options)
    if pipeline is not None:
        refuse_contradiction(asked.dtype, asked.device, model, recorded)
    return model


def refuse_contradiction(dtype: str, device: str, model: Family, recorded: Run | None = None) -> None:
    """Raise ExperimentError where a pipeline is not in the number format or on the device that is asked for, or was."""
    own, where = str(model.dtype).removeprefix("torch."), model.device
    wanted = torch.device(where if device == "auto" else device)
    elsewhere = wanted.type != where.type or (wanted.index is not None and wanted.index != (where.index or 0))
    for field, value, found, differs in (
        ("dtype", dtype, f"in {own}", dtype not in ("auto", own)),
        ("device", device, f"on {where}", elsewhere),
    ):
        if differs:
            to = f'pipeline.to("{value}")' if field == "device" else f"pipeline.to(torch.{value})"
            instead = f"leave {field} out" if recorded is None else f'record it anew: probe.record(run.experiment, pipeline, {field}="auto")'
            raise ExperimentError(f"{field}: {value} is asked for, and the pipeline is {found}.", f"Bring it there, {to}, or {instead}.")


def refuse_unread(variant: str | None, revision: str | None, model: Family) -> None:
    """Raise ExperimentError for fields that say which files to load, where a pipeline in memory has its weights already."""
    for field, value, own in (("variant", variant, None), ("revision", revision, model.revision)):
        if value not in (None, own):
            raise ExperimentError(
                f"{field}: {shown(value)} says which files to load, and the pipeline has its weights already.",
                f"Leave {field} out, or leave out the pipeline.",
            )


def _see_through(path: Path, model: Family, run: Plan, writer: RunWriter, say: Say, progress: bool) -> None:
    try:
        with breakable():
            perform(model, run, writer, say, progress)
            with storing(path):
                pictures.save(Run(path))
            writer.complete()
    except BaseException:
        say(f"The run ended early. What it had recorded is in {path}; go on with it: probe run --resume {shell_path(path)}")
        raise


def describe(model: Family, run: Plan, weights: str | None = None) -> dict[str, Any]:
    """The recording's attributes: what was asked, of which model (`weights`: its digest, if it is known), and where it ran."""
    import diffusers
    import transformers

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "format_version": FORMAT_VERSION,
        "format_status": FORMAT_STATUS,
        "family": model.family,
        "guidance_rule": model.guidance_rule(run.experiment.guidance_scale),
        "experiment": run.experiment.resolved(),
        "identity": run.experiment.identity(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(terse=True),
            "device": device.type,
            "device_name": name,
            "threads": torch.get_num_threads(),
            "attention_backend": type(next(iter(model.unet.attn_processors.values()))).__name__,
            "branches_batched": True,
        },
        "model": {
            "name": model.name,
            "revision": model.revision,
            "f": model.f,
            "scaling_factor": model.scaling_factor,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": weights or model.digest(),
        },
        "scheduler": {"class": type(model.scheduler).__name__, "config": scheduler_config(model.scheduler)},
        "prediction_type": model.prediction_type,
        "latent_convention": "variance_exploding" if run.schedule.variance_exploding else "variance_preserving",
        "text_rules": RULES,
        "read_as": {branch: prompt.read_as for branch, prompt in run.prompts.items() if prompt.read_as != prompt.text},
        **_of_denoised(model, run),
        "cut_from_prompt": {branch: prompt.cut for branch, prompt in run.prompts.items() if prompt.cut},
        **({"zeroed_branches": list(run.zeroed_branches)} if run.zeroed_branches else {}),
        "decoded_in_float32": model.decoding_dtype == torch.float32 != model.dtype,
    }


def _of_denoised(model: Family, run: Plan) -> dict[str, Any]:
    """Where denoised is not what the scheduler goes on with, and where it is not defined; nothing, in most runs."""
    how = clipping(type(model.scheduler).__name__, model.scheduler.config)
    undefined = list(run.schedule.undefined(model.prediction_type))
    found: dict[str, Any] = {} if how is None else {"scheduler_clips": clipping_text(how)}
    return {**found, **({"denoised_not_defined": undefined} if undefined else {})}


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's settings. JSON has no infinity, which DPMSolverMultistepScheduler's are not without: as text, "-inf"."""
    found: dict[str, Any] = json.loads(scheduler.to_json_string(), parse_constant=lambda word: str(float(word)))
    return found


@contextlib.contextmanager
def out_of_memory(asked: Experiment) -> Iterator[None]:
    """torch's and numpy's three kinds of running out of memory, as one."""
    try:
        yield
    except ProbeError:
        raise
    except (MemoryError, RuntimeError) as error:
        said = ("not enough memory", "can't allocate", "can't start new thread")
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in said):
            raise OutOfMemory(
                f"Out of memory on {pick_device(asked.device)}: {first_line(error)[:120]}",
                "Fewer images, a smaller height and width, --dtype float16, or fewer capture.layers.",
            ) from error
        raise
