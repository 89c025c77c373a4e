"""Getting a scheduler: a model's own where it is supported, or another made from its betas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probe.diffusion.model_configs import betas, scheduler_config, scheduler_sizes
from probe.diffusion.support import SUPPORTED
from probe.errors import ExperimentError, ModelError
from probe.settings.fields import SCHEDULERS
from probe.text import first_line, shown

# What StableDiffusionPipeline forces on every scheduler it is given: x0 in latent space has no
# reason to lie in [-1, 1].
FORCED = {"clip_sample": False, "steps_offset": 1}
# What diffusers' schedulers raise for a config that they refuse. NotImplementedError is a
# RuntimeError.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
NEEDED = ("betas", "set_timesteps", "scale_model_input", "add_noise", "step")
TIMESTEPS = 1000  # of training, where a scheduler's settings do not say: as diffusers has it
ANOTHER = "Name another: --scheduler DDIM."
SD = "beta_start 0.00085 and beta_end 0.012 of Stable Diffusion"
BETAS = "scheduler_options: {beta_start: 0.00085, beta_end: 0.012, beta_schedule: scaled_linear}"


def class_name(entry: Any) -> str | None:
    """Return the name of a scheduler's class, from an entry of model_index.json; None for others.

    Such an entry is ["diffusers", name].
    """
    pair = (
        isinstance(entry, list)
        and len(entry) == 2
        and entry[0] == "diffusers"
        and isinstance(entry[1], str)
    )
    return entry[1] if pair and entry[1].endswith("Scheduler") else None


def is_supported(entry: Any) -> bool:
    """Return whether an entry of model_index.json names a scheduler that we can make."""
    return class_name(entry) in {kind for kind, _ in SCHEDULERS.values()}


def own_scheduler(
    model: str, entry: Any, config: Mapping[str, Any], forced: Mapping[str, Any] = FORCED
) -> Any:
    """Make the scheduler that a model's folder names, as its pipeline would.

    `forced` are the settings that the pipeline forces on it. Raise ModelError if it is not
    supported.
    """
    import diffusers

    name = class_name(entry)
    kind = getattr(diffusers, name, None) if name else None
    if not isinstance(kind, type):
        label = entry[-1] if isinstance(entry, list) and entry else entry or None
        raise ModelError(
            f"{model}: its scheduler {shown(str(label))} is not one of diffusers'.", ANOTHER
        )
    if not issubclass(kind, diffusers.SchedulerMixin):  # a stand-in: it needs another package
        raise unsupported(model, kind.__name__)
    check_settings(f"{model}: scheduler/scheduler_config.json", config)
    try:
        scheduler = kind.from_config(dict(config))
    except REFUSALS as problem:
        raise ModelError(
            f"{model}: {kind.__name__} refuses its config: {_line(problem)}", ANOTHER
        ) from problem
    settings = {key: value for key, value in forced.items() if key in scheduler.config}
    scheduler.register_to_config(**settings)
    return scheduler


def check_own(model: str, scheduler: Any) -> None:
    """Raise ModelError for a scheduler that is not supported, and for one without betas."""
    if scheduler is None:
        raise ModelError(f"{model}: it has no scheduler.", ANOTHER)
    name = type(scheduler).__name__
    if (
        "Inverse" in name
        or not all(hasattr(scheduler, need) for need in NEEDED)
        or "prediction_type" not in scheduler.config
    ):
        raise unsupported(model, name)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"{model}: prediction type {scheduler.config.prediction_type!r} is not supported yet.",
            SUPPORTED,
        )
    scheduler_sizes(f"{model}: {name}", scheduler.config, lambda cause: ModelError(cause, ANOTHER))
    betas(
        f"{model}: {name}",
        scheduler.config,
        None,
        lambda cause: ModelError(cause, f"Make the scheduler with betas between 0 and 1, as {SD}."),
    )


def unsupported(model: str, kind: str) -> ModelError:
    return ModelError(f"{model}: its scheduler {kind} is not supported.", ANOTHER)


def check_settings(where: str, config: Mapping[str, Any]) -> None:
    scheduler_config(
        where,
        {"num_train_timesteps": TIMESTEPS, **config},
        lambda cause: ModelError(cause, "Fetch the model again, or correct that file."),
    )


def another_scheduler(
    model: str,
    name: str,
    own: Mapping[str, Any],
    own_kind: type[Any] | str,
    options: Mapping[str, Any],
    forced: Mapping[str, Any],
) -> Any:
    """Make the scheduler `name` from a model's own settings plus `options`.

    `default` is one of the model's own class. `forced` are the settings that the model's pipeline
    forces on any scheduler. Raise ExperimentError for options that the scheduler does not have or
    refuses, ModelError where no betas are known.
    """
    import diffusers

    own_name = own_kind if isinstance(own_kind, str) else own_kind.__name__
    kind, extra = (own_name, {}) if name == "default" else SCHEDULERS[name]
    scheduler_class = getattr(diffusers, kind)
    known = set(scheduler_class._get_init_keys(scheduler_class)) - {"self", "kwargs"}
    _check_options(kind, known, own, options)
    if not (_says_betas(own) or _says_betas(options)):
        raise ModelError(
            f"{model}: its scheduler {own_name} does not say with which betas the model was "
            "trained.",
            "Name a scheduler, and in the experiment's file the betas. Of Stable Diffusion they "
            f"are {BETAS}.",
        )
    # As diffusers' `from_config`: another class gets what was set here, but not this class's own
    # defaults.
    another = name != "default"
    drop = set(own.get("_use_default_values", ())) if another else set()
    config = {key: value for key, value in own.items() if key in known - drop}
    set_by_pipeline = {key: value for key, value in forced.items() if key in known and another}
    try:
        return scheduler_class.from_config({**config, **set_by_pipeline, **extra, **options})
    except Exception as problem:  # whatever diffusers raises of an option of the wrong kind
        remedy = ANOTHER
        if options:
            remedy = f"Change or leave out of scheduler_options: {', '.join(options)}."
        raise ExperimentError(
            f"scheduler: {kind} refuses these options: {_line(problem)}", remedy
        ) from problem


def _says_betas(config: Mapping[str, Any]) -> bool:
    return "beta_start" in config or config.get("trained_betas") is not None


def _check_options(
    kind: str, known: set[str], own: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise ExperimentError for options that a class of schedulers lacks, and for wrong values."""
    if unknown := sorted(set(options) - known):
        raise ExperimentError(
            f"scheduler_options: {kind} has no option {unknown[0]!r}.",
            f"It has: {', '.join(sorted(known))}.",
        )
    scheduler_config(
        "scheduler_options",
        options,
        lambda cause: ExperimentError(cause, "Write a value that fits, or leave it out."),
    )
    if options.get("trained_betas") is not None or "num_train_timesteps" in options:
        both = {"num_train_timesteps": TIMESTEPS, **own, **options}
        betas(
            "scheduler_options",
            both,
            both["num_train_timesteps"],
            lambda cause: ExperimentError(cause, "Give both, so that they fit."),
        )


def _line(problem: Exception) -> str:
    return first_line(problem)[:300]
