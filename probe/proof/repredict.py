"""The model asked again: does it say from the recorded latents what was recorded?

    weights      the digest of this model's weights is the recorded one
    plan         tokens, words, layers, grids, noise levels and shapes are what this model and the experiment lead to
    text         the text encoder's inside and output
    predictions  the UNet's answers to the recorded latents, at each step asked for
    maps         softmax(q k), computed here from what the layers multiply, against the stored maps, queries and moments
    attention    softmax(q k) v through to_out, computed here, against what leaves the layer: maps are what the layer used
    inside       statistics, whole outputs and queries of modules, what tokens write, what each word did
    decode       the VAE's pictures of the recorded latents
    encode       its latents of the picture that a run or a noising began from (probe.proof.forward_checks)

Maps are computed here in a way of their own, not by `probe.watching.capture`, so that a fault of the recorder is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from probe.analysis.maps import probabilities
from probe.diffusion.families import family_of, recordable
from probe.diffusion.family import TEXT, Conditioning, Predictions
from probe.diffusion.loading import load, pick_device
from probe.diffusion.models import StableDiffusion, to_uint8
from probe.diffusion.sampling import Step
from probe.proof.checks import Check, Tally, variables
from probe.proof.forward_checks import check_encoded
from probe.proof.map_checks import BOUND, ROUNDED, apart, head_statistics_of, moments_of, relative, rounding
from probe.proof.replay import Call, numbers, prediction_of, replayed, run_dtype, threads_of
from probe.reading.compare import differing_conditions
from probe.reading.recording import Run
from probe.running.forward import replan
from probe.running.perform import fit_preview
from probe.running.planning import ENCODER, Plan, grid_group
from probe.running.recorder import describe
from probe.watching.capture import OutputCapture, TextCapture, hooked
from probe.watching.counterfactual import embeddings_without, word_changes
from probe.watching.hooks import Watch
from probe.watching.modes import TextSide
from probe.watching.rehearsal import cross_attention, self_attention

# Of the norm of what was recorded, where device, versions or weights differ. CUDA's convolutions round float32 to TF32.
TOLERANCE = {"float32": 2e-2, "float16": 5e-2, "bfloat16": 2e-1}
PICTURE = 2e-2  # mean difference of pixels, of 255
OF_NORM = "of its norm"


def model_of(run: Run, pipeline: Any | None = None) -> StableDiffusion:
    """The model of a recording, loaded where it ran if this machine has such a device, or `pipeline`. Raises ModelError."""
    asked = run.experiment
    if pipeline is None:
        kind = str(run.attributes["environment"]["device"])
        try:
            device = str(pick_device(kind))
        except RuntimeError:  # DeviceError: not here
            device = "cpu"
        revision = run.attributes["model"].get("revision") or asked.revision
        dtype = str(run_dtype(run)).removeprefix("torch.")
        where: dict[str, Any] = {"revision": revision, "variant": asked.variant, "dtype": dtype, "device": device}
        return recordable(load(asked.model, **where, scheduler=asked.scheduler, options=asked.scheduler_options))
    return recordable(family_of(pipeline, scheduler=asked.scheduler, options=asked.scheduler_options))


def check_model(run: Run, model: StableDiffusion, steps: Sequence[int]) -> Iterator[Check]:
    """All checks that need the model, one after the other; the UNet predicts again at `steps`."""
    with threads_of(run):
        weights = model.digest()
        yield check_weights(run.attributes["model"].get("weights"), weights)
        settled = replan(model, run)
        because = tuple(differing_conditions(run.attributes, describe(model, settled, weights)))
        yield check_plan(run, settled, because)
        again = Again(run, model, settled, because)
        yield again.text.check()
        for tally in again.predict(steps):
            yield tally.check()
        yield again.decode().check()
        if run.source is not None:
            yield check_encoded(run, model, TOLERANCE[str(run_dtype(run)).removeprefix("torch.")], because)


def check_weights(recorded: str | None, here: str) -> Check:
    """The digest of every weight and buffer."""
    if recorded is None:
        return Check("weights", "not checked", "it was recorded by a version that took no digest of them")
    if recorded == here:
        return Check("weights", "exact", f"digest {recorded}")
    return Check("weights", "failed", f"recorded with weights of digest {recorded}, these have {here}: bring those back")


def check_plan(run: Run, settled: Plan, because: tuple[str, ...]) -> Check:
    """Every variable against a plan made anew: names, dimensions, types, and the values that are known before the first step."""
    found = dict(variables(run))
    tally = Tally("plan", "tokens, layers, noise levels and shapes follow from model and experiment", 1e-4, because)
    planned = {a.path: a for a in settled.arrays}
    for path in sorted(planned.keys() ^ found.keys()):
        tally.fail(f"{path} is {'missing' if path in planned else 'not in the plan'}")
    for path in sorted(planned.keys() & found.keys()):
        a, variable = planned[path], found[path]
        if (a.dims, a.shape) != (variable.dims, variable.shape):
            tally.fail(f"{path} is {dict(variable.sizes)}, not {dict(zip(a.dims, a.shape, strict=True))}")
        elif path == "cost/flops":  # another version of torch may count otherwise
            if not because:
                tally.add(relative(np.asarray(a.value), variable.values), path)
        elif a.value is not None and a.group != "cost":
            if a.dtype == "str" or np.asarray(a.value).dtype.kind in "iu":
                wrong = np.argwhere(np.asarray(a.value) != variable.values)
                if len(wrong):
                    at = tuple(wrong[0])
                    said = ", ".join(f"{dim} {i}" for dim, i in zip(a.dims, at, strict=True))
                    tally.fail(f"{path} is {variable.values[at]!r}, not {np.asarray(a.value)[at]!r} at {said}")
                tally.add(0.0, path)
            else:
                tally.add(relative(np.asarray(a.value), variable.values), path)
    return tally.check()


class Again:
    """One recording and its model: what the model says now is counted in tallies, one for each check."""

    def __init__(self, run: Run, model: StableDiffusion, settled: Plan, because: tuple[str, ...]):
        self._run, self._model, self._plan, self._because = run, model, settled, because
        self._allowed = TOLERANCE[str(run_dtype(run)).removeprefix("torch.")]
        self._recorded = dict(variables(run))
        self._embeddings: dict[str, torch.Tensor] = {}
        self._inside = self._tally("inside", "statistics, outputs and queries of modules, what tokens write")
        self.text = self._encode()

    def _tally(self, name: str, what: str, factor: float = 1.0) -> Tally:
        return Tally(name, what, factor * self._allowed, self._because, unit=OF_NORM)

    def _compare(self, tally: Tally, path: str, made: np.ndarray, at: Any = None) -> None:
        recorded = self._recorded[path] if at is None else self._recorded[path].isel(step=at)
        tally.add(apart(made.astype(recorded.dtype), recorded.values), path if at is None else f"{path}, step {at}")

    def _encode(self) -> Tally:
        tally = self._tally("text", "the text encoder's inside and output")
        capture, inside = TextCapture(self._model.text_encoder, self._plan.activations), {}
        wholes: dict[str, dict[str, torch.Tensor]] = {}
        text = self._run.experiment.capture.text
        with hooked(capture if text else capture.outputs):
            for branch in sorted(self._plan.called):
                capture.mask = self._model.text_mask(self._plan.prompts[branch])
                self._embeddings[branch] = self._model.encode(self._plan.prompts[branch])
                inside[branch], wholes[branch] = capture.take() if text else {}, capture.outputs.take()[1]
        for name in ("embedding", "hidden", "output", "attention") if text else ():
            stacked = torch.stack([inside[branch][name] for branch in self._plan.called], dim=1 if name in ("hidden", "attention") else 0)
            self._compare(tally, f"text/{ENCODER}/{name}", numbers(stacked))
        for path in wholes["cond"]:
            whole = torch.cat([wholes[branch][path] for branch in self._plan.called])
            self._compare(self._inside, f"{path.replace('.', '/', 1)}/activation", numbers(whole))
        return tally

    def predict(self, steps: Sequence[int]) -> list[Tally]:
        """Predictions, maps, attention and inside, of some steps."""
        run, settled, unet = self._run, self._plan, self._model.unet
        images = run.experiment.images
        predictions = self._tally("predictions", f"the UNet's answers at {len(steps)} steps")
        maps = self._tally("maps", "softmax(q k), computed here", 2.0)
        if not self._because:
            maps.allowed, maps.because, maps.unit = 1.0, (ROUNDED,), BOUND
        if run.experiment.capture.attention == "queries":
            maps.nothing = "queries are recorded, maps follow from them: see inside"
        precision = max(1e-4, 8 * torch.finfo(self._model.dtype).eps)
        attention = Tally("attention", "softmax(q k) v through to_out", precision, ("softmax by hand, in float32",), unit=OF_NORM)
        outputs = OutputCapture("unet", unet, settled.statistics["unet"], settled.activations)
        sides = Sides({path: cross_attention(unet)[path] for path in settled.layers} | {path: self_attention(unet)[path] for path in settled.selves})
        text_side = TextSide(unet, list(settled.layers), settled.kept, images, settled.called, settled.branches)
        told = Conditioning({branch: {TEXT: self._embeddings[branch]} for branch in settled.called}, {})
        predict = self._model.predictor(told, images, run.experiment.guidance_scale, run.experiment.guidance_rescale)
        masked = embeddings_without(self._model, settled.prompts["cond"], settled.words) if settled.words else None
        with hooked(outputs, sides, text_side):
            for call in replayed(run, self._model.device):
                if call.index not in steps or call.model_input is None:
                    continue
                outputs.resting = sides.resting = call.index not in settled.recorded
                text_side.resting = call.index != steps[0]
                with torch.no_grad():
                    said = predict(call.index, call.model_input, call.t)
                for branch, value in said.branches.items():
                    self._compare(predictions, f"latents/prediction_{branch}", numbers(value), call.index)
                self._compare(predictions, "latents/prediction", numbers(said.prediction), call.index)
                if not text_side.resting:
                    self._compare_text_side(text_side)
                if call.index in settled.recorded:
                    self._compare_outputs(outputs, call.index)
                    self._compare_maps(sides, call.index, maps, attention)
                if call.index in settled.recorded and masked is not None:
                    outputs.resting = sides.resting = text_side.resting = True
                    self._compare(self._inside, "counterfactual/change", numbers(word_changes(self._model, self._step(call), masked)), call.index)
        return [predictions, maps, attention, self._inside]

    def _compare_text_side(self, text_side: TextSide) -> None:
        found = text_side.take()
        for grid, layers in self._plan.grids.items():
            group = grid_group(grid)
            sizes = np.stack([numbers(found[path][1]) for path in layers], axis=2)
            if self._run.experiment.capture.attention == "summary":
                sizes = sizes.mean(axis=-1, keepdims=True)
            self._compare(self._inside, f"{group}/value_size", sizes)
            if f"{group}/key" in self._recorded:
                self._compare(self._inside, f"{group}/key", np.stack([numbers(found[path][0]) for path in layers], axis=2))

    def _compare_outputs(self, outputs: OutputCapture, step: int) -> None:
        statistics, wholes = outputs.take()
        rows = (len(self._plan.called), self._run.experiment.images)
        if statistics is not None:
            self._compare(self._inside, "unet/statistics", numbers(statistics.unflatten(1, rows)), step)
        for path, whole in wholes.items():
            self._compare(self._inside, f"{path.replace('.', '/', 1)}/activation", numbers(whole.unflatten(0, rows)), step)

    def _compare_maps(self, sides: Sides, step: int, maps: Tally, attention: Tally) -> None:
        settled = self._plan
        rows = [settled.called.index(b) * settled.latent_shape[0] + i for b in settled.branches for i in range(settled.latent_shape[0])]
        for grid, layers in settled.grids.items():
            for number, path in enumerate(layers):
                shares, query, off = sides.take(path, rows)
                attention.add(off, f"{path}, step {step}")
                self._compare_layer(maps, f"{grid_group(grid)}", number, path, step, self._in_place(shares, grid), self._in_place(query, grid))
        for grid, layers in settled.self_grids.items():
            for number, path in enumerate(layers):
                shares, _, off = sides.take(path, rows)
                attention.add(off, f"{path}, step {step}")
                whole = shares.reshape(-1, settled.latent_shape[0], shares.shape[1], *grid, *grid)  # (branch, image, head, y, x, key_y, key_x)
                self._count(maps, f"self_{grid_group(grid)}/self", number, path, step, whole)

    def _in_place(self, values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """(branch x image, head, pixel, any) -> (any, branch, image, head, y, x)."""
        whole = values.reshape(-1, self._plan.latent_shape[0], values.shape[1], *grid, values.shape[-1])
        return np.moveaxis(whole, -1, 0)

    def _compare_layer(self, maps: Tally, group: str, number: int, path: str, step: int, shares: np.ndarray, query: np.ndarray) -> None:
        kept = self._plan.kept
        if kept.end + 1 < kept.tokens:
            shares = np.concatenate([shares[: kept.end + 1], shares[kept.end + 1 :].sum(0, keepdims=True)])
        mode = self._run.experiment.capture.attention
        if mode == "queries":
            stored = self._recorded[f"{group}/query"].isel(step=step, layer=number).values  # (branch, image, head, key_feature, y, x)
            made = np.moveaxis(query, 0, 3).astype(stored.dtype)
            self._inside.add(apart(made, stored), f"{group}/query, step {step}, {path}")
            return
        if mode == "summary":
            recorded = self._recorded[f"{group}/head_statistics"].isel(step=step, layer=number).values
            maps.add(self._off(head_statistics_of(shares), recorded), f"{group}/head_statistics, step {step}, {path}")
            shares = shares.mean(3, keepdims=True)
        self._count(maps, f"{group}/cross", number, path, step, shares)
        recorded = self._recorded[f"{group}/moments"].isel(step=step, layer=number).values
        maps.add(self._off(moments_of(shares), recorded), f"{group}/moments, step {step}, {path}")

    def _count(self, maps: Tally, path: str, number: int, layer: str, step: int, made: np.ndarray) -> None:
        """One layer's maps. Under the same conditions each value may be off by rounding, else all of them together a little."""
        stored = self._recorded[path].isel(step=step, layer=number)
        p = probabilities(stored.values)
        if self._because:
            maps.add(apart(made, p), f"{path}, step {step}, {layer}")
            return
        off = np.abs(made - p) / (rounding(stored.values) + 2e-4 * made + 1e-7)
        off = np.where(np.isnan(made) & np.isnan(p), 0.0, np.where(np.isnan(off), np.inf, off))
        at = np.unravel_index(int(off.argmax()), off.shape)
        labels = [f"{dim} {i}" for dim, i in zip(stored.dims, at, strict=True)]
        maps.add(float(off[at]), f"{path}, step {step}, {layer}, {', '.join(labels)}")

    def _off(self, made: np.ndarray, recorded: np.ndarray) -> float:
        return apart(made, recorded) if self._because else apart(made, recorded) / 1e-4

    def decode(self) -> Tally:
        """Final picture, pictures on the way, the VAE's statistics, and the preview's linear map."""
        run, model, settled = self._run, self._model, self._plan
        tally = Tally("decode", "pictures, the VAE's inside and the preview's map", PICTURE, self._because, unit="of its range")
        inside = OutputCapture("vae", model.vae or torch.nn.Module(), settled.statistics["vae"], settled.activations, replace=True)
        for call in replayed(run, model.device):
            if call.model_input is None:
                with hooked(inside):
                    pixels, _ = model.pixels(call.latents)
                tally.add(_pixels_apart(to_uint8(pixels).numpy(), run.images.values), "images/final")
                self._count_not_finite(tally, pixels)
                statistics, wholes = inside.take()
                if statistics is not None:
                    self._compare(tally, "vae/statistics", numbers(statistics))
                for path, whole in wholes.items():
                    self._compare(tally, f"{path.replace('.', '/', 1)}/activation", numbers(whole))
            elif call.index in settled.decoded:
                pixels, _ = model.decode(self._step(call).denoised.to(model.dtype))
                stored = run.variable("decoded/picture").isel(decoded_step=settled.decoded.index(call.index)).values
                tally.add(_pixels_apart(pixels.numpy(), stored), f"decoded/picture, step {call.index}")
        slope, bias = fit_preview(model)
        for name, made in (("latent_to_rgb", slope), ("bias", bias)) if len(run.steps) else ():
            self._compare(tally, f"preview/{name}", made)
        return tally

    def _count_not_finite(self, tally: Tally, pixels: torch.Tensor) -> None:
        """What the VAE makes that is no colour is 0 in the picture: the recording has to say so, and how much it is."""
        count = int((~torch.isfinite(pixels)).sum())
        recorded = self._run.attributes.get("decoded_not_finite", {}).get("images/final", 0)
        if count:
            tally.what += f"; {count} values of images/final are not finite, and shown as 0"
        if bool(count) != bool(recorded) or (count != recorded and not self._because):
            tally.fail(f"{count} values of images/final are not finite, the recording says {recorded}")

    def _step(self, call: Call) -> Step:
        schedule = self._plan.schedule
        given = prediction_of(self._run, call.index).to(call.latents.device)
        said = Predictions({"cond": given}, given)
        return Step.of(schedule, call.index, call.latents, said, call.latents, self._model.prediction_type)


class Sides:
    """What attention layers multiply, and what leaves them. `take` gives a layer's softmax(q k) and how far its output is from it."""

    def __init__(self, layers: dict[str, Any]):
        self._layers = layers
        self._seen: dict[str, dict[str, torch.Tensor]] = {path: {} for path in layers}
        self.resting = False

    def watches(self) -> list[Watch]:
        parts = {path: {"q": m.to_q, "k": m.to_k, "v": m.to_v, "out": m.to_out[0]} for path, m in self._layers.items()}
        return [(part, "output", self._keep(path, name)) for path, named in parts.items() for name, part in named.items()]

    def _keep(self, path: str, name: str) -> Any:
        def hook(output: torch.Tensor) -> None:
            if not self.resting:
                self._seen[path][name] = output.detach()

        return hook

    def take(self, path: str, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
        """softmax(q k) (row, head, pixel, key) float32, q (row, head, pixel, feature), and softmax(q k) v against the output."""
        module, seen = self._layers[path], self._seen[path]
        with torch.no_grad():
            q, k, v = (seen[name][rows].unflatten(-1, (module.heads, -1)).transpose(1, 2).float() for name in "qkv")
            shares = (q @ k.transpose(-1, -2) * module.scale).softmax(-1)
            mixed = (shares @ v).transpose(1, 2).flatten(2).to(seen["out"].dtype)
            made = module.to_out[0].forward(mixed)  # not a call: that would be seen by the hooks
        off = apart(numbers(made), numbers(seen["out"][rows]))
        return numbers(shares), numbers(q), off


def _pixels_apart(found: np.ndarray, recorded: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - recorded).mean() / 255)
