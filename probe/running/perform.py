"""One run, from the prompt to the last sum: the one place where the loop, the captures and the store meet.

The loop owns the clock: hooks fill a tray, which is emptied after each `Step` and handed to the writing thread.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from probe.analysis.maps import maps_of, probabilities, resize
from probe.diffusion.family import TEXT, Arguments, Conditioning, Predictions
from probe.diffusion.models import StableDiffusion, count_not_finite, to_uint8
from probe.diffusion.sampling import Step, arranged, denoise
from probe.errors import NotFinite, RecordingDamaged, StoreError
from probe.experiment import Experiment
from probe.reading.listing import root_attributes
from probe.running.forward import Noised, begin, memory_formats, note_memory_formats
from probe.running.planning import ENCODER, Plan, grid_group
from probe.store import RunWriter
from probe.watching.capture import AttentionCapture, OutputCapture, TextCapture, hooked
from probe.watching.clock import Clock
from probe.watching.counterfactual import embeddings_without, word_changes
from probe.watching.modes import QueryCapture, SelfCapture, SummaryCapture, TextSide

Say = Callable[[str], None]
AT_ONCE = 2**25  # bytes of the overview that are in memory together
SAMPLING = "steps guidance_scale guidance_rescale eta seed images height width".split()  # of an experiment, what the loop wants to know


def perform(model: StableDiffusion, run: Plan, writer: RunWriter, say: Say, progress: bool, forward: Noised | None = None) -> None:
    """Do what a plan says, and write it down; steps that `writer` has already are replayed, not predicted again.

    With `forward`, nothing is denoised: the model is asked about noised latents, and its answers are measured.
    """
    asked, clock = run.experiment, Clock(model.device)
    clock.reset_memory()
    with clock.measure("text_encoder"):
        conditioning = _read_prompts(model, run, writer)
    slope, bias = fit_preview(model)
    writer.write("preview/latent_to_rgb", slope)
    writer.write("preview/bias", bias)

    attention = _attention_capture(model, run)
    selves = SelfCapture(model.unet, run.selves, asked.images, run.called, run.branches, asked.capture.dtype)
    text_side = TextSide(model.unet, list(run.layers), run.kept, asked.images, run.called, run.branches)
    outputs = OutputCapture("unet", model.unet, run.statistics["unet"], run.activations)
    decoded_in_float32, spoilt = False, Counter[str]()
    clean: torch.Tensor | None
    if forward is not None:
        clean, steps = forward.clean, forward.steps(conditioning, run.schedule)
    else:
        how: dict[str, Any] = {name: getattr(asked, name) for name in SAMPLING}
        start = begin(model, asked, writer)
        clean, steps = None if start is None else start.clean, denoise(model, conditioning, **how, known=_recorded(writer, run, model), start=start)
    masked = embeddings_without(model, run.prompts["cond"], run.words) if run.words else None
    watching, begun = (attention, text_side, selves, outputs, clock), writer.committed
    final: torch.Tensor | None = None
    with (
        hooked(attention, text_side, selves, outputs),
        clock.watching(model.unet),
        tqdm(total=run.calls, desc="Predicting" if forward else "Denoising", unit="step", disable=not progress) as bar,
    ):
        for index in range(run.calls):
            attention.resting = selves.resting = outputs.resting = index not in run.recorded
            text_side.resting = index != begun
            if index < begun:
                step = next(steps)
                _check_replay(step, run, writer)
            else:
                with clock.step():
                    step = next(steps)
                    if index == begun:
                        _write_text_side(text_side, run, writer)
                    if index == 0:
                        note_memory_formats(clean, step.prediction, writer)
                    extra = forward.measures(step) if forward else {}
                    if masked is not None and index in run.recorded:
                        with _resting(*watching):
                            extra["counterfactual/change"] = word_changes(model, step, masked)
                    writer.write_step(index, *_gather(step, run, attention, selves, outputs, extra))
            final = step.next_latents
            if index in run.decoded:
                with clock.measure("vae"):
                    shown, again = model.pixels(step.denoised.to(model.dtype))
                if torch.isfinite(step.denoised).all():
                    spoilt["decoded/picture"] += count_not_finite(f"The VAE's picture at step {index}", shown, asked.on_nan)
                writer.write("decoded/picture", to_uint8(shown).numpy(), at=run.decoded.index(index))
                decoded_in_float32 |= again
            bar.set_postfix(sigma=f"{step.sigma:.2f}", refresh=False)
            bar.update()
    assert final is not None
    writer.flush()
    check_finite("final_latents", run.calls - 1, _numpy(final), asked, final.dtype)
    writer.write("latents/final_latents", _numpy(final))

    say("Decoding the picture ...")
    inside = OutputCapture("vae", model.vae or torch.nn.Module(), run.statistics["vae"], run.activations, replace=True)
    with hooked(inside), clock.measure("vae"):
        shown, again = model.pixels(final)
    spoilt["images/final"] = count_not_finite("The VAE's picture", shown, asked.on_nan)
    writer.write("images/final", to_uint8(shown).numpy())
    if spoilt := +spoilt:  # those above 0
        writer.annotate(decoded_not_finite=spoilt)
        say(f"The VAE made {spoilt.total()} values that are not finite: they are 0 in the pictures.")
    statistics, activations = inside.take()
    if statistics is not None:
        writer.write("vae/statistics", _numpy(statistics))
    for path, value in activations.items():
        writer.write(f"{path.replace('.', '/', 1)}/activation", _numpy(value))
    if decoded_in_float32 or again:
        writer.annotate(decoded_in_float32=True)
        say("The VAE overflowed in float16: decoded again in float32.")
    say("Summing up the attention maps ...")
    _summarise(run, writer)
    unet, whole, seconds, memory = clock.read()
    writer.write("cost/unet_seconds", [math.nan] * begun + unet)
    writer.write("cost/step_seconds", [math.nan] * begun + whole)
    writer.write("cost/seconds", [seconds.get(part, 0.0) for part in run.rehearsal.flops])
    writer.write("cost/peak_memory", memory)


def _recorded(writer: RunWriter, run: Plan, model: StableDiffusion) -> Iterator[Predictions]:
    """The predictions of the steps that were committed before."""
    how = memory_formats(root_attributes(writer.path))["prediction"]

    def read(name: str, index: int) -> torch.Tensor:
        value = torch.from_numpy(_read_step(writer, run, f"latents/{name}", index))
        return arranged(value.to(model.device, model.dtype), how)

    for index in range(writer.committed):
        branches = {branch: read(f"prediction_{branch}", index) for branch in run.called}
        yield Predictions(branches, read("prediction", index))


def _read_step(writer: RunWriter, run: Plan, path: str, index: int) -> np.ndarray:
    """One committed step of a variable. Raises RecordingDamaged where its file is gone: zarr then reads NaN."""
    value = writer.read(path, at=index)
    if run.experiment.on_nan == "stop" and value.dtype.kind == "f" and np.isnan(value).all():
        raise RecordingDamaged(f"{path} of step {index} is not there any more.", "Record it again: probe rerun.")
    return value


def _check_replay(step: Step, run: Plan, writer: RunWriter) -> None:
    recorded, replayed = _read_step(writer, run, "latents/latents", step.index), _numpy(step.latents)
    if not np.array_equal(recorded, replayed, equal_nan=True):
        off = float(np.nan_to_num(np.abs(recorded.astype(np.float64) - replayed), nan=np.inf).max())
        raise StoreError(
            f"The latents of step {step.index} come out otherwise than they were recorded (by up to {off:.2g}).",
            "It was begun under other versions or on another device: resume it there, or record it again with probe rerun.",
        )


def _read_prompts(model: StableDiffusion, run: Plan, writer: RunWriter) -> Conditioning:
    arguments: dict[str, Arguments] = {}
    inside: dict[str, dict[str, torch.Tensor]] = {}
    wholes: dict[str, dict[str, torch.Tensor]] = {}
    capture = TextCapture(model.text_encoder, run.activations)
    text = run.experiment.capture.text
    with hooked(capture if text else capture.outputs):
        for branch in sorted(run.called):  # the prompt first, then the negative prompt, each alone, as diffusers does
            capture.mask = model.text_mask(run.prompts[branch])
            arguments[branch] = model.encode_prompt({ENCODER: run.prompts[branch]})
            count_not_finite("text_encoder: its output", arguments[branch][TEXT], run.experiment.on_nan)
            inside[branch] = capture.take() if text else {}
            wholes[branch] = capture.outputs.take()[1]
    if text:
        axis = {"hidden": 1, "attention": 1}
        for name in ("embedding", "hidden", "output", "attention"):
            stacked = torch.stack([inside[branch][name] for branch in run.called], dim=axis.get(name, 0))
            writer.write(f"text/{ENCODER}/{name}", _numpy(stacked))
    for path in wholes["cond"]:
        stacked = torch.cat([wholes[branch][path] for branch in run.called])
        writer.write(f"{path.replace('.', '/', 1)}/activation", _numpy(stacked))
    return Conditioning(arguments, {branch: {ENCODER: run.prompts[branch]} for branch in run.called})


@contextlib.contextmanager
def _resting(*watching: Any) -> Iterator[None]:
    """While this lasts, calls of the UNet are nobody's business."""
    before = [part.resting for part in watching]
    for part in watching:
        part.resting = True
    try:
        yield
    finally:
        for part, was in zip(watching, before, strict=True):
            part.resting = was


# What a capture's `take` gives for a layer, by capture.attention: variables, each with the axis of its layer. Maps come whole.
PARTS = {"maps": {}, "summary": {"cross": 3, "moments": 3, "head_statistics": 3}, "queries": {"query": 2}, "off": {}}


def _attention_capture(model: StableDiffusion, run: Plan) -> AttentionCapture | QueryCapture:
    capture, images = run.experiment.capture, run.experiment.images
    if capture.attention == "queries":
        return QueryCapture(model.unet, run.layers, run.kept, images, run.called, run.branches, capture.dtype)
    kind = SummaryCapture if capture.attention == "summary" else AttentionCapture
    return kind(model.unet, run.layers, run.kept, images, run.called, run.branches, capture.dtype)


def _write_text_side(text_side: TextSide, run: Plan, writer: RunWriter) -> None:
    """What the text offers is the same at every step: it is written at the first."""
    sides = text_side.take()
    for grid, layers in run.grids.items():
        group = grid_group(grid)
        sizes = np.stack([_numpy(sides[path][1]) for path in layers], axis=2)
        if run.experiment.capture.attention == "summary":
            sizes = sizes.mean(axis=-1, keepdims=True)
        writer.write(f"{group}/value_size", sizes)
        if run.experiment.capture.attention == "queries":
            writer.write(f"{group}/key", np.stack([_numpy(sides[path][0]) for path in layers], axis=2))


def _gather(
    step: Step,
    run: Plan,
    attention: AttentionCapture | QueryCapture,
    selves: SelfCapture,
    outputs: OutputCapture,
    extra: dict[str, torch.Tensor],
) -> tuple[Callable[[], dict[str, np.ndarray]], int]:
    """What one step recorded, on its way to the host, as a function that the writing thread calls."""
    tensors: dict[str, torch.Tensor] = {"latents/latents": step.latents, "latents/prediction": step.prediction}
    tensors |= {f"latents/prediction_{branch}": said for branch, said in step.branches.items()}
    for name, tensor in list(tensors.items()):
        tensors[name] = tensor.clone()  # the caller may change what the loop yielded
    tensors.update(extra)
    parts = PARTS[run.experiment.capture.attention]
    apart, together = attention.take(), attention.take_whole()
    for grid, (cross, moments) in together.items():
        tensors[f"{grid_group(grid)}/cross"], tensors[f"{grid_group(grid)}/moments"] = cross.unflatten(-1, grid), moments
    for path, found in apart.items() if not together else ():
        tensors.update({f"{part} {path}": tensor for part, tensor in zip(parts, found, strict=True)})
    own = selves.take()
    tensors.update({f"self {path}": tensor for path, tensor in own.items()})
    statistics, activations = outputs.take()
    rows = (len(run.called), run.latent_shape[0])
    if statistics is not None:
        tensors["unet/statistics"] = statistics.unflatten(1, rows)
    for path, whole in activations.items():
        tensors[f"{path.replace('.', '/', 1)}/activation"] = whole.unflatten(0, rows)
    host = _to_host(tensors)

    def values() -> dict[str, np.ndarray]:
        ready = host()
        written = {name: value for name, value in ready.items() if " " not in name}
        for grid, layers in run.grids.items() if apart and not together else ():
            for part, axis in parts.items():
                stacked = np.stack([ready[f"{part} {path}"] for path in layers], axis=axis)
                on_grid = part in ("cross", "query")
                written[f"{grid_group(grid)}/{part}"] = stacked.reshape(*stacked.shape[:-1], *grid) if on_grid else stacked
        for grid, layers in run.self_grids.items() if own else ():
            stacked = np.stack([ready[f"self {path}"] for path in layers], axis=2)
            written[f"self_{grid_group(grid)}/self"] = stacked.reshape(*stacked.shape[:-2], *grid, *grid)
        for name in ("latents", *(f"prediction_{branch}" for branch in run.called), "prediction"):
            check_finite(name, step.index, written[f"latents/{name}"], run.experiment, step.latents.dtype)
        return written

    return values, sum(tensor.nbytes for tensor in tensors.values())


def check_finite(name: str, step: int, value: np.ndarray, asked: Experiment, dtype: torch.dtype) -> None:
    """Raises NotFinite for a NaN or an infinity, unless they are to be recorded; `dtype` is the run's."""
    if asked.on_nan == "stop" and not np.isfinite(value).all():
        tries = ["--dtype float32"] * (dtype != torch.float32) + ["a smaller guidance_scale"] * (asked.guidance_scale > 1)
        remedy = f"Try {' or '.join(tries) or 'another model'}; on_nan: record writes such values down instead of stopping."
        raise NotFinite(f"{name} holds {'NaN' if np.isnan(value).any() else 'infinity'} at step {step}.", remedy)


def _summarise(run: Plan, writer: RunWriter) -> None:
    """Fill the sums that a first look at a recording reads: `time_sum` of each grid, and the `overview`."""
    if not run.grids:
        return
    largest = next(iter(run.grids))
    shapes = {a.path: a.shape for a in run.arrays}
    sums = {grid: np.zeros(shapes[f"{grid_group(grid)}/time_sum"], np.float32) for grid in run.grids}
    together = max(1, AT_ONCE // (4 * len(run.kept.positions) * math.prod(largest)))  # a token's steps are one file: few writes of many
    for first in range(0, len(run.recorded), together):
        steps = list(run.recorded[first : first + together])
        overview = np.zeros((len(run.kept.positions), len(steps), *largest), np.float32)
        for place, index in enumerate(steps):
            for grid in run.grids:
                maps = _maps_at(writer, run, grid, index)
                sums[grid] += maps
                overview[:, place] += resize(maps[:, -1].mean(axis=(1, 3)).sum(axis=1), largest)  # the last branch: cond where it was kept
        writer.write(f"{grid_group(largest)}/overview", overview / len(run.layers), at=(slice(None), steps))
    for grid, total in sums.items():
        writer.write(f"{grid_group(grid)}/time_sum", total)


def _maps_at(writer: RunWriter, run: Plan, grid: tuple[int, int], index: int) -> np.ndarray:
    group = grid_group(grid)
    if run.experiment.capture.attention == "queries":
        return maps_of(_read_step(writer, run, f"{group}/query", index), writer.read(f"{group}/key"))
    return probabilities(_read_step(writer, run, f"{group}/cross", index))


def fit_preview(model: StableDiffusion) -> tuple[np.ndarray, np.ndarray]:
    """The linear map from denoised latents to colour that fits this VAE best: (channel, rgb) and (rgb), colour in 0..1.

    Fitted by least squares on decoded smooth noise, as latent previews do with constants measured for one model.
    """
    channels = int(model.unet.config.in_channels)
    if model.vae is None:
        return np.full((channels, 3), 0.5, np.float32) * np.eye(channels, 3, dtype=np.float32), np.full(3, 0.5, np.float32)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((3, channels, 4, 4), generator=generator)
    latents = 1.2 * torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    pixels, _ = model.decode(latents.to(model.device, model.dtype))
    colour = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float() / 255, model.f)
    x = latents.permute(0, 2, 3, 1).reshape(-1, channels)
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    solution = torch.linalg.lstsq(design, colour.permute(0, 2, 3, 1).reshape(-1, 3).double()).solution.float().numpy()
    return solution[:-1], solution[-1]


# --- small parts -----------------------------------------------------------------------------------------------------


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_host(tensors: dict[str, torch.Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Start copying to the host without waiting; the returned function waits and gives numpy arrays."""
    event = None
    if any(tensor.is_cuda for tensor in tensors.values()):
        pinned = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            pinned[name].copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        tensors = pinned

    def arrays() -> dict[str, np.ndarray]:
        if event is not None:
            event.synchronize()
        return {name: _numpy(tensor) for name, tensor in tensors.items()}

    return arrays
