"""What a run will record, settled before its first step: every variable with its shape, and so the forecast of its size.

A plan needs the model's configs only; `probe run --dry-run` makes one without weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe.diffusion.models import StableDiffusion
from probe.diffusion.prompts import Prompt
from probe.diffusion.sampling import Schedule, first_call, fresh, set_steps
from probe.diffusion.schedule_check import held_schedule, remarks, unclipped_note
from probe.errors import ExperimentError, TooLarge
from probe.experiment import Experiment
from probe.files import check_place
from probe.schema import BRANCHES, HEAD_STATISTICS, MOMENTS, STATISTICS, Array, array
from probe.source import read_picture
from probe.store import room
from probe.strict_yaml import first_line
from probe.watching.counterfactual import chosen_words
from probe.watching.rehearsal import Rehearsal, rehearse
from probe.watching.selection import Kept, activation_paths, attention_layers, statistic_paths
from probe.words import RULES

ENCODER = "text_encoder"


@dataclass(frozen=True)
class Plan:
    """A run about to happen. `called` are the branches the UNet computes, `branches` those whose attention is kept."""

    experiment: Experiment
    prompts: dict[str, Prompt]
    schedule: Schedule
    rehearsal: Rehearsal
    latent_shape: tuple[int, int, int, int]
    called: tuple[str, ...]
    branches: tuple[str, ...]
    kept: Kept
    layers: dict[str, tuple[int, int]]
    selves: dict[str, tuple[int, int]]
    words: dict[str, list[int]]
    statistics: dict[str, list[str]]
    activations: list[str]
    recorded: tuple[int, ...]
    decoded: tuple[int, ...]
    arrays: tuple[Array, ...]
    remarks: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def grids(self) -> dict[tuple[int, int], list[str]]:
        """Cross-attention layers of each grid, the largest grid first."""
        return _by_grid(self.layers)

    @property
    def self_grids(self) -> dict[tuple[int, int], list[str]]:
        """Self-attention layers of each grid, the largest grid first."""
        return _by_grid(self.selves)

    def forecast(self) -> dict[str, int]:
        """Bytes of every variable, uncompressed, as it will be written; chunks of steps not asked for take none."""
        share = len(self.recorded) / self.calls
        partial = ("cross", "moments", "head_statistics", "query", "self", "change", "statistics", "activation")
        return {a.path: round(a.nbytes * (share if a.variable.name in partial and a.dims[0] == "step" else 1)) for a in self.arrays}

    def check_size(self, limit: int | None, free: int | None) -> None:
        """Raises TooLarge when the recording would not fit; `free` is None where nobody knows the room."""
        sizes = self.forecast()
        largest = max(sizes.items(), key=lambda item: item[1])
        whole, on_disk = sum(sizes.values()), room(self.arrays, sizes)
        for total, most, what in ((whole, limit, "--max-bytes"), (on_disk, free, "the room on the disk")):
            if most is not None and total > most:
                raise TooLarge(
                    f"The recording would take {size_text(total)}, more than {what}: {size_text(most)}.",
                    f"Most of it is {largest[0]} ({size_text(largest[1])}): capture fewer layers, steps or tokens, or set capture.dtype: sqrt_u8.",
                )


def _by_grid(layers: dict[str, tuple[int, int]]) -> dict[tuple[int, int], list[str]]:
    return {grid: [path for path, at in layers.items() if at == grid] for grid in sorted(set(layers.values()), reverse=True)}


def free_room(folder: Path) -> int | None:
    """Bytes free where `folder` is or will be; None where the disk does not say. Raises as `check_place` does."""
    folder = check_place(folder)
    try:
        found = shutil.disk_usage(folder)
    except OSError:  # some mounts have no answer
        return None
    return found.free if found.total else None


def grid_group(grid: tuple[int, int]) -> str:
    return f"attention/{grid[0]}x{grid[1]}"


def size_text(n: float) -> str:
    """Bytes for people: 4.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def plan(
    model: StableDiffusion, experiment: Experiment, picture: np.ndarray | None = None, schedule: Schedule | None = None, rules: int = RULES
) -> Plan:
    """Settle what a run of `experiment` on `model` records. Raises ExperimentError or PromptError if it cannot be.

    A recording's `picture` is taken instead of reading `experiment.image`; `rules` read its text. Without a `schedule`, it is the
    scheduler's, held against what that does.
    """
    capture = experiment.capture
    called = BRANCHES if experiment.guidance_scale > 1.0 else ("cond",)
    prompts = {b: model.read(experiment.prompt if b == "cond" else experiment.negative_prompt, experiment.over_long, rules) for b in called}
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
    model.check_reading({branch: {ENCODER: prompt} for branch, prompt in prompts.items()})
    layers = attention_layers(rehearsal.grids, capture.layers) if capture.attention != "off" else {}
    selves = attention_layers(rehearsal.self_grids, capture.self_attention, "self_attention")
    kept = Kept(tokens - 1 if capture.tokens == "all" or capture.attention == "queries" else max(prompts[b].end for b in branches), tokens)
    statistics = {part: statistic_paths(model, part, rehearsal) if capture.statistics and getattr(model, part) else [] for part in ("unet", "vae")}
    activations = activation_paths(rehearsal, capture.activations)
    settled = Plan(
        experiment=experiment,
        prompts=prompts,
        schedule=schedule,
        rehearsal=rehearsal,
        latent_shape=latent_shape,
        called=called,
        branches=branches,
        kept=kept,
        layers=layers,
        selves=selves,
        words=chosen_words(prompts["cond"], capture.counterfactual),
        statistics=statistics,
        activations=activations,
        recorded=capture.steps_of(calls),
        decoded=tuple(sorted({*range(0, calls, experiment.decode_every), calls - 1})) if experiment.decode_every else (),
        arrays=(),
        remarks=remarks(model, schedule, begin),
    )
    arrays = (*_latents(model, settled, picture), *_text(model, settled), *_attention(settled), *_outputs(model, settled), *_cost(settled))
    return Plan(**{**settled.__dict__, "arrays": arrays})


def numpy_dtype(dtype: torch.dtype) -> str:
    """The type in which a tensor is stored; bfloat16, which numpy lacks, as float32, exactly."""
    return "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def _latents(model: StableDiffusion, run: Plan, picture: np.ndarray | None) -> list[Array]:
    shape, dtype = run.latent_shape, numpy_dtype(model.dtype)
    note = {"recorded_dtype": str(model.dtype).removeprefix("torch.")}
    names = ["latents", *(f"prediction_{branch}" for branch in run.called), "prediction"]
    pixels = (shape[0], shape[2] * model.f, shape[3] * model.f, 3)
    scheduler = fresh(model.scheduler)
    set_steps(scheduler, run.experiment.steps)
    table = np.array([float(s) for s in getattr(scheduler, "sigmas", run.schedule.sigmas)])
    arrays = [
        array("", "step", value=np.arange(run.calls)),
        array("", "timestep", value=np.array(run.schedule.timesteps)),
        array("", "sigma", value=np.array(run.schedule.sigmas)),
        array("", "alpha_bar", value=np.array(run.schedule.alpha_bars)),
        array("", "committed", (run.calls,)),
        *(array("latents", name, (run.calls, *shape), dtype, **note) for name in names),
        array("latents", "final_latents", shape, dtype, **note),
        array("latents", "scheduler_sigmas", value=table),
        array("images", "final", pixels),
        array("preview", "latent_to_rgb", (shape[1], 3)),
        array("preview", "bias", (3,)),
    ]
    if picture is not None:
        arrays += [array("source", "picture", value=picture), *(array("forward", name, shape, dtype, **note) for name in ("clean", "noise"))]
    if run.decoded:
        frames = array("decoded", "picture", (len(run.decoded), *pixels), **unclipped_note(model.scheduler))
        arrays += [array("decoded", "decoded_step", value=np.array(run.decoded)), frames]
    return arrays


def _labels(group: str, run: Plan, branches: Sequence[str], positions: Sequence[int]) -> list[Array]:
    """The coordinates branch, token, token_text, word and word_index of a group."""

    def rows(of: Any, rest: Any) -> list[list[Any]]:
        return [[rest if p < 0 else of(run.prompts[b], p) for p in positions] for b in branches]

    def word(prompt: Prompt, position: int) -> str:
        return prompt.words[prompt.word_of[position]] if prompt.word_of[position] >= 0 else ""

    return [
        array(group, "branch", value=list(branches)),
        array(group, "token", value=np.array(positions)),
        array(group, "token_text", value=rows(lambda prompt, p: prompt.tokens[p], "rest")),
        array(group, "word", value=rows(word, "")),
        array(group, "word_index", value=np.array(rows(lambda prompt, p: prompt.word_of[p], -1))),
    ]


def _text(model: StableDiffusion, run: Plan) -> list[Array]:
    if not run.experiment.capture.text:
        return []
    group, dtype, config = f"text/{ENCODER}", numpy_dtype(model.dtype), model.text_encoder.config
    tokens, layers, branches = run.kept.tokens, int(config.num_hidden_layers), len(run.called)
    state = (branches, tokens, int(config.hidden_size))
    return [
        *_labels(group, run, run.called, range(tokens)),
        array(group, "token_id", value=np.stack([run.prompts[b].ids[0].numpy() for b in run.called])),
        array(group, "embedding", state, dtype),
        array(group, "hidden", (layers, *state), dtype),
        array(group, "output", state, dtype),
        array(group, "attention", (layers, branches, int(config.num_attention_heads), tokens, tokens)),
    ]


def _attention(run: Plan) -> list[Array]:
    arrays: list[Array] = []
    mode, storage = run.experiment.capture.attention, run.experiment.capture.dtype
    code = {"encoding": "sqrt_u8: p = (code / 255)^2"} if storage == "sqrt_u8" else {}
    dtype = "uint8" if code else storage
    images, positions = run.latent_shape[0], run.kept.positions
    recorded = np.zeros(run.calls, np.uint8)
    recorded[list(run.recorded)] = 1
    for index, (grid, layers) in enumerate(run.grids.items()):
        group, heads = grid_group(grid), _heads(run, layers, grid)
        rows = (len(run.branches), images, len(layers))
        maps = (len(positions), *rows, 1 if mode == "summary" else heads)
        arrays += [
            *_labels(group, run, run.branches, positions),
            array(group, "layer", value=layers),
            array(group, "recorded", value=recorded),
            array(group, "value_size", (len(run.branches), len(positions), len(layers), maps[-1])),
            array(group, "time_sum", (*maps, *grid)),
        ]
        if mode == "queries":
            features = {run.rehearsal.outputs[f"unet.{path}.to_q"][-1] // heads for path in layers}
            if len(features) > 1:
                raise ExperimentError(
                    f"capture.layers: the layers at {group} differ in their width.", "Choose layers of one kind, or capture.attention: maps."
                )
            width = features.pop()
            exact = "float16" if code else dtype  # a query is no probability: it has a sign and no bound
            arrays += [
                array(group, "query", (run.calls, *rows, heads, width, *grid), exact),
                array(group, "key", (len(run.branches), len(positions), len(layers), heads, width)),
            ]
        else:
            averaged = {"heads": f"mean of {heads}"} if mode == "summary" else {}
            arrays += [
                array(group, "moment", value=list(MOMENTS)),
                array(group, "cross", (run.calls, *maps, *grid), dtype, **code, **averaged),
                array(group, "moments", (run.calls, *maps, len(MOMENTS))),
            ]
        if mode == "summary":
            arrays += [
                array(group, "head_statistic", value=list(HEAD_STATISTICS)),
                array(group, "head_statistics", (run.calls, len(positions), *rows, heads, len(HEAD_STATISTICS))),
            ]
        if index == 0:
            arrays.append(array(group, "overview", (len(positions), run.calls, *grid)))
    if run.words:
        arrays.append(array("counterfactual", "masked_word", value=list(run.words)))
        arrays.append(array("counterfactual", "change", (run.calls, len(run.words), images, *run.latent_shape[2:])))
    for grid, layers in run.self_grids.items():
        group = f"self_{grid_group(grid)}"
        shape = (run.calls, len(run.branches), images, len(layers), _heads(run, layers, grid), *grid, *grid)
        arrays += [
            array(group, "branch", value=list(run.branches)),
            array(group, "layer", value=layers),
            array(group, "self", shape, dtype, **code),
        ]
    return arrays


def _heads(run: Plan, layers: list[str], grid: tuple[int, int]) -> int:
    found = {run.rehearsal.heads[path] for path in layers}
    if len(found) > 1:
        raise ExperimentError(f"capture.layers: the layers at {grid_group(grid)} differ in their number of heads.", "Choose layers of one kind.")
    return found.pop()


def _outputs(model: StableDiffusion, run: Plan) -> list[Array]:
    arrays: list[Array] = []
    images, branches = run.latent_shape[0], len(run.called)
    parts = [part for part in ("unet", ENCODER) if run.statistics.get(part) or any(path.startswith(f"{part}.") for path in run.activations)]
    arrays += [array(part, "branch", value=list(run.called)) for part in parts]
    leads: dict[str, tuple[int, ...]] = {"unet": (run.calls, len(STATISTICS), branches, images), "vae": (len(STATISTICS), images)}
    for part, lead in leads.items():
        if paths := run.statistics[part]:
            names = [path.removeprefix(f"{part}.") for path in paths]
            arrays += [array(part, "module", value=names), array(part, "statistic", value=list(STATISTICS))]
            arrays.append(array(part, "statistics", (*lead, len(paths))))
    for path in run.activations:
        part, module = path.split(".", 1)
        shape = run.rehearsal.outputs[path]
        batch = {"unet": branches * images, "vae": images, ENCODER: 1}[part]
        rows: tuple[int, ...] = {"unet": (run.calls, branches, images), "vae": (images,), ENCODER: (branches,)}[part]
        if shape[0] != batch or not 2 <= len(shape) <= 4:
            raise ExperimentError(f"capture.activations: the output of {path} has shape {shape}, without one row per image.", "Name another module.")
        note = {"recorded_dtype": str(model.dtype).removeprefix("torch.")}
        arrays.append(array(f"{part}/{module}", "activation", (*rows, *shape[1:]), numpy_dtype(model.dtype), **note))
    return arrays


def _cost(run: Plan) -> list[Array]:
    parts = list(run.rehearsal.flops)
    return [
        array("cost", "component", value=parts),
        array("cost", "unet_seconds", (run.calls,)),
        array("cost", "step_seconds", (run.calls,)),
        array("cost", "seconds", (len(parts),)),
        array("cost", "flops", value=np.array(list(run.rehearsal.flops.values()))),
        array("cost", "peak_memory", ()),
    ]
