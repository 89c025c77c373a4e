"""The model asked again: does it say from the recorded latents what was recorded?

    weights      the digest of this model's weights is the recorded one
    plan         tokens, layers, noise levels and shapes follow from model and experiment
    text         the inside and output of the text encoder
    predictions  the UNet's answers to the recorded latents
    maps         softmax(q k), computed here, against the stored maps, queries and moments
    attention    softmax(q k) v through to_out, computed here, against the layer's output
    inside       statistics, outputs and queries of modules; what tokens write, what words did
    decode       the VAE's pictures of the recorded latents
    encode       the VAE's latents of the picture that a run or a noising began from

Maps are computed by `probe.proof.attention_witness` and not by `probe.watching`: a fault of the
recorder is not repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from probe.analysis.maps import probabilities
from probe.diffusion.defaults import plain_defaults
from probe.diffusion.families import family_of
from probe.diffusion.family import Family, Predictions
from probe.diffusion.loading import load, pick_device
from probe.diffusion.loras import borrowed
from probe.diffusion.preparing import prepared
from probe.diffusion.sampling import Step
from probe.editing.editing import Editing, edited
from probe.format.attributes import MIXED, SHA256
from probe.proof.attention_witness import AttentionWitness
from probe.proof.checks import Check, Tally, variables
from probe.proof.compared_store import ComparedStore
from probe.proof.map_checks import (
    BOUND,
    ROUNDED,
    apart,
    head_statistics_of,
    moments_of,
    relative,
    rounding,
)
from probe.proof.replay import Call, numbers, prediction_of, replayed, run_dtype, threads_of
from probe.reading.compare import changed_files, differing_conditions
from probe.reading.recording import Run
from probe.running.continuing import said_of_model
from probe.running.description import describe
from probe.running.planning import replan
from probe.running.session import Session
from probe.text import shown
from probe.watching.cost import Cost
from probe.watching.hooks import Hooks
from probe.watching.interface import Plan, grid_group
from probe.watching.rehearsal import cross_attention, self_attention
from probe.watching.sums import Sums

# Of the norm of what was recorded, where device, versions or weights differ. CUDA's convolutions
# round float32 to TF32.
TOLERANCE = {"float32": 2e-2, "float16": 5e-2, "bfloat16": 2e-1}
# The same of what the UNet says between two CPUs, where 7e-6 was measured. A wrong edit may differ
# by 1e-2.
BETWEEN_CPUS = 2e-3
PICTURE = 2e-2  # mean difference of pixels, of 255
OF_NORM = "of its norm"


@plain_defaults()
def model_of(run: Run, pipeline: Any | None = None) -> Family:
    """Return the model of a recording, or `pipeline` as such a model.

    It is loaded onto the kind of device that it ran on, if there is one. Raises ModelError.
    """
    recipe, (scheduler, options) = run.recipe, run.recipe.sampler
    if pipeline is None:
        kind = str(run.attributes["environment"]["device"])
        try:
            device = str(pick_device(kind))
        except RuntimeError:  # DeviceError: not here
            device = "cpu"
        revision = run.attributes["model"].get("revision") or recipe.revision
        dtype = str(run_dtype(run)).removeprefix("torch.")
        where: dict[str, Any] = {
            "revision": revision,
            "variant": recipe.variant,
            "dtype": dtype,
            "device": device,
        }
        loaded = load(recipe.model, **where, scheduler=scheduler, options=options)
        return prepared(loaded, recipe)
    return prepared(family_of(pipeline, scheduler=scheduler, options=options), recipe)


def check_model(run: Run, model: Family, steps: Sequence[int]) -> Iterator[Check]:
    """Yield all checks that need the model. The UNet predicts again at `steps`."""
    with threads_of(run), borrowed(model):
        how = run.attributes.model.weights_digest
        own = how if how in (MIXED, SHA256) else MIXED
        weights = model.digest(own)
        recorded = run.attributes["model"].get("weights")
        checked = check_weights(recorded, weights) if own == how else _unknown_digest(how)
        yield _check_files(run, model, checked)
        plan = replan(model, run, on_nan="record")  # whatever is not finite is compared
        here = describe(model, plan, weights, own)
        because = tuple(differing_conditions(run.attributes, here))
        yield check_plan(run, plan, because, _unlike_attributes(run, model, here, because))
        yield from ModelCheck(run, model, plan, because).checks(steps)


def check_weights(recorded: str | None, here: str) -> Check:
    """Compare the digest of every weight and buffer."""
    if recorded is None:
        return Check(
            "weights", "not checked", "it has no digest of them: none was taken, or not in time"
        )
    if recorded == here:
        return Check("weights", "exact", f"digest {recorded}")
    return Check(
        "weights",
        "failed",
        f"recorded with weights of digest {recorded}, these have {here}: bring those back",
    )


def _unknown_digest(how: str) -> Check:
    return Check(
        "weights", "not checked", f"its digest is by {shown(how)}, which a newer version knows"
    )


def _check_files(run: Run, model: Family, weights: Check) -> Check:
    """Return the check of the weights, with that of the files beside them: LoRAs."""
    changed = changed_files(run.attributes, {"model": {"files": dict(model.files)}})
    if not changed or weights.verdict == "failed":
        return weights
    return Check(
        "weights",
        "failed",
        f"{changed[0]} is not the file that it was recorded with: bring that back",
    )


def _unlike_attributes(
    run: Run, model: Family, here: Mapping[str, Any], because: tuple[str, ...]
) -> Iterator[str]:
    """Yield the attributes that this model or the experiment would give another value."""
    attributes = run.attributes
    pairs = said_of_model(run, here)
    pairs |= {
        name: (getattr(attributes, name), here[name]) for name in ("read_as", "cut_from_prompt")
    }
    pairs |= {
        name: (attributes[name], here.get(name))
        for name in ("scheduler_clips", "denoised_not_defined")
        if name in attributes
    }
    if (
        model.pipeline is None
    ):  # else nobody knows where it came from, and how it attends is its owner's choice
        pairs["model.revision"] = attributes.model.revision, model.revision
        if len(because) == 1 and because[0].startswith(name := "attention_backend"):
            pairs[f"environment.{name}"] = (
                attributes["environment"].get(name),
                here["environment"][name],
            )
    for field, (recorded, expected) in pairs.items():
        if isinstance(recorded, float) and not np.isfinite(recorded):
            recorded = str(recorded)  # as newer versions write it
        if recorded != expected:
            yield f"{field} is {shown(recorded)}, not {shown(expected)}"


def check_plan(
    run: Run, plan: Plan, because: tuple[str, ...], problems: Iterable[str] = ()
) -> Check:
    """Compare every variable with a new plan: names, dimensions, types.

    Values that are known before the first step are compared too.
    """
    recorded = dict(variables(run))
    tally = Tally(
        "plan",
        "tokens, layers, noise levels and shapes follow from model and experiment",
        1e-4,
        because,
    )
    for problem in problems:
        tally.fail(problem)
    planned = {spec.path: spec for spec in plan.arrays}
    for path in sorted(planned.keys() ^ recorded.keys()):
        tally.fail(f"{path} is {'missing' if path in planned else 'not in the plan'}")
    for path in sorted(planned.keys() & recorded.keys()):
        spec, variable = planned[path], recorded[path]
        if (spec.dims, spec.shape) != (variable.dims, variable.shape):
            sizes = dict(zip(spec.dims, spec.shape, strict=True))
            tally.fail(f"{path} is {dict(variable.sizes)}, not {sizes}")
        elif path == "cost/flops":  # another version of torch may count otherwise
            if not because:
                tally.add(relative(np.asarray(spec.value), variable.values), path)
        elif spec.value is not None:
            if spec.dtype == "str" or np.asarray(spec.value).dtype.kind in "iu":
                wrong = np.argwhere(np.asarray(spec.value) != variable.values)
                if len(wrong):
                    at = tuple(wrong[0])
                    labels = ", ".join(f"{dim} {i}" for dim, i in zip(spec.dims, at, strict=True))
                    tally.fail(
                        f"{path} is {variable.values[at]!r}, not {np.asarray(spec.value)[at]!r} at "
                        f"{labels}"
                    )
                tally.add(0.0, path)
            else:
                tally.add(relative(np.asarray(spec.value), variable.values), path)
    return tally.check()


class ModelCheck:
    """A recording made once more from its recorded latents, into a store that compares.

    There is one tally for each check.
    """

    def __init__(self, run: Run, model: Family, plan: Plan, because: tuple[str, ...]):
        # Sums have a witness of their own in `map_checks`, and times are never the same.
        captures = tuple(
            capture for capture in plan.captures if not isinstance(capture, Sums | Cost)
        )
        self._run, self._model, self._because = run, model, because
        self._plan = replace(plan, captures=captures)
        self._allowed = TOLERANCE[str(run_dtype(run)).removeprefix("torch.")]
        self._recorded = dict(variables(run))
        self.text = self._tally("text", "the inside and output of each text encoder")
        self.predictions = self._tally("predictions", "the UNet's answers")
        cpus = run.attributes["environment"]["device"] == model.device.type == "cpu"
        if cpus and model.dtype == torch.float32:
            self.predictions.allowed = BETWEEN_CPUS
        self.maps = self._tally("maps", "softmax(q k), computed here", 2.0)
        precision = max(1e-4, 8 * torch.finfo(model.dtype).eps)
        self.attention = Tally(
            "attention",
            "softmax(q k) v through to_out",
            precision,
            ("softmax by hand, in float32",),
            unit=OF_NORM,
        )
        on_pixels = run.attributes.model.on_pixels
        self.inside = self._tally(
            "inside", "statistics, outputs and queries of modules, what tokens write"
        )
        self.decode = Tally(
            "decode",
            "pictures" + ", the VAE's inside" * (not on_pixels) + " and the preview's map",
            PICTURE,
            because,
            unit="of its range",
        )
        encoded = "the picture as pixels" if on_pixels else "the VAE's latents of the picture"
        self.encode = Tally("encode", encoded, self._allowed, because)
        if not because:
            self.maps.allowed, self.maps.because, self.maps.unit = 1.0, (ROUNDED,), BOUND
        if run.recipe.capture.attention == "queries":
            self.maps.nothing = "queries are recorded, maps follow from them: see inside"
        self._edited: dict[str, set[int]] = {}
        self._store = ComparedStore(run, self._recorded, self._tally_of)

    def _tally(self, name: str, what: str, factor: float = 1.0) -> Tally:
        return Tally(name, what, factor * self._allowed, self._because, unit=OF_NORM)

    def _tally_of(self, path: str) -> Tally | None:
        """Return the check of a variable; None for what follows without the model."""
        group = path.partition("/")[0]
        if path in ("latents/latents", "latents/final_latents", "source/psnr"):
            return None
        if path in ("forward/clean", "forward/noise"):
            return self.encode
        of_group = {
            "text": self.text,
            "latents": self.predictions,
            **dict.fromkeys(("images", "decoded", "preview", "vae"), self.decode),
        }
        return of_group.get(group, self.inside)

    def checks(self, steps: Sequence[int]) -> Iterator[Check]:
        """Yield all checks of what the model says. The UNet predicts again at `steps`."""
        run, plan, unet = self._run, self._plan, self._model.unet
        layers = {path: cross_attention(unet)[path] for path in plan.layers} | {
            path: self_attention(unet)[path] for path in plan.self_layers
        }
        witness, self.predictions.what = (
            AttentionWitness(layers),
            f"the UNet's answers at {len(steps)} step{'s' * (len(steps) != 1)}",
        )
        with Session(self._model, plan, self._store) as session:
            conditioning, editing = session.begin(), edited(self._model, plan)
            session.first = steps[0] if steps else -1
            yield self.text.check()
            guidance = run.recipe.guidance
            predict = self._model.predictor(conditioning, plan.rows.images, *guidance)
            if editing is not None:
                editing.bind(conditioning)
                predict, self._edited = editing.predict, editing.edited_layers
            for call in replayed(run, self._model.device):
                if call.model_input is None:
                    session.finish(call.latents)
                elif call.index in steps:
                    recorded = call.index in plan.recorded
                    if editing is not None:
                        session.prepare(editing, call.index)
                        self._compare_entered(editing, call)
                    with (
                        session.watching(call.index),
                        Hooks(witness.watches() if recorded else ()),
                        torch.no_grad(),
                    ):
                        predictions = predict(call.index, call.model_input, call.t)
                    session.record(self._step(call, predictions))
                    if recorded:
                        self._compare_maps(witness, call.index)
                else:
                    session.replay(self._step(call))
        self._count_not_finite()
        if self._edited:
            self.attention.what += f", but of {len(self._edited)} layers that are edited"
        yield from (
            tally.check()
            for tally in (self.predictions, self.maps, self.attention, self.inside, self.decode)
        )
        if run.source is not None:
            yield self.encode.check()

    def _compare_entered(self, editing: Editing, call: Call) -> None:
        """Compare the latents that a donor gave with those that it gives now."""
        if call.made is not None:
            entered = numbers(editing.enter(call.index, call.made))
            off = relative(entered, numbers(call.latents))
            self.predictions.add(off, f"the donor's latents, step {call.index}")

    def _compare_maps(self, witness: AttentionWitness, step: int) -> None:
        plan, maps, attention = self._plan, self.maps, self.attention
        rows = plan.rows.kept
        for grid, layers in plan.grids.items():
            for number, path in enumerate(layers):
                shares, query, off = witness.take(path, rows)
                if step not in self._edited.get(path, ()):
                    attention.add(off, f"{path}, step {step}")
                self._compare_layer(
                    maps,
                    f"{grid_group(grid)}",
                    number,
                    path,
                    step,
                    self._in_place(shares, grid),
                    self._in_place(query, grid),
                )
        for grid, layers in plan.self_grids.items():
            for number, path in enumerate(layers):
                shares, _, off = witness.take(path, rows)
                if step not in self._edited.get(path, ()):
                    attention.add(off, f"{path}, step {step}")
                by_key = shares.reshape(
                    -1, plan.latent_shape[0], shares.shape[1], *grid, *grid
                )  # (branch, image, head, y, x, key_y, key_x)
                self._count(maps, f"self_{grid_group(grid)}/self", number, path, step, by_key)

    def _in_place(self, values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Return (branch x image, head, pixel, any) as (any, branch, image, head, y, x)."""
        unfolded = values.reshape(
            -1, self._plan.latent_shape[0], values.shape[1], *grid, values.shape[-1]
        )
        return np.moveaxis(unfolded, -1, 0)

    def _compare_layer(
        self,
        maps: Tally,
        group: str,
        number: int,
        path: str,
        step: int,
        shares: np.ndarray,
        query: np.ndarray,
    ) -> None:
        kept = self._plan.kept
        if kept.end + 1 < kept.tokens:
            shares = np.concatenate(
                [shares[: kept.end + 1], shares[kept.end + 1 :].sum(0, keepdims=True)]
            )
        mode = self._run.recipe.capture.attention
        if mode == "queries":
            stored = (
                self._recorded[f"{group}/query"].isel(step=step, layer=number).values
            )  # (branch, image, head, key_feature, y, x)
            computed = np.moveaxis(query, 0, 3).astype(stored.dtype)
            self.inside.add(apart(computed, stored), f"{group}/query, step {step}, {path}")
            return
        if mode == "summary":
            recorded = (
                self._recorded[f"{group}/head_statistics"].isel(step=step, layer=number).values
            )
            maps.add(
                self._off(head_statistics_of(shares), recorded),
                f"{group}/head_statistics, step {step}, {path}",
            )
            shares = shares.mean(3, keepdims=True)
        self._count(maps, f"{group}/cross", number, path, step, shares)
        recorded = self._recorded[f"{group}/moments"].isel(step=step, layer=number).values
        maps.add(self._off(moments_of(shares), recorded), f"{group}/moments, step {step}, {path}")

    def _count(
        self, maps: Tally, path: str, number: int, layer: str, step: int, computed: np.ndarray
    ) -> None:
        """Compare one layer's maps.

        Under the same conditions each value may be off by rounding. Otherwise all of them together
        may be off a little.
        """
        stored = self._recorded[path].isel(step=step, layer=number)
        p = probabilities(stored.values)
        if self._because:
            maps.add(apart(computed, p), f"{path}, step {step}, {layer}")
            return
        off = np.abs(computed - p) / (rounding(stored.values) + 2e-4 * computed + 1e-7)
        off = np.where(np.isnan(computed) & np.isnan(p), 0.0, np.where(np.isnan(off), np.inf, off))
        at = np.unravel_index(int(off.argmax()), off.shape)
        labels = [f"{dim} {i}" for dim, i in zip(stored.dims, at, strict=True)]
        maps.add(float(off[at]), f"{path}, step {step}, {layer}, {', '.join(labels)}")

    def _off(self, computed: np.ndarray, recorded: np.ndarray) -> float:
        return apart(computed, recorded) if self._because else apart(computed, recorded) / 1e-4

    def _count_not_finite(self) -> None:
        """Check what the recording says of pixels that are not finite.

        They are 0 in the picture. The recording has to say so, and how many there are.
        """
        count = self._store.annotations.get("decoded_not_finite", {}).get("images/final", 0)
        recorded = self._run.attributes.get("decoded_not_finite", {}).get("images/final", 0)
        if self._run.status != "complete":
            return
        if count:
            self.decode.what += f"; {count} values of images/final are not finite, and shown as 0"
        overflows, recorded_so = (
            "decoded_in_float32" in self._store.annotations,
            bool(self._run.attributes.get("decoded_in_float32", False)),
        )
        if overflows != recorded_so and not self._because:
            self.decode.fail(
                f"decoded_in_float32 is {recorded_so}, and the VAE "
                f"{'overflows' if overflows else 'does not overflow'} in float16"
            )
        if bool(count) != bool(recorded) or (count != recorded and not self._because):
            self.decode.fail(
                f"{count} values of images/final are not finite, the recording says {recorded}"
            )

    def _step(self, call: Call, predictions: Predictions | None = None) -> Step:
        """Return a step from its recorded latents, with `said` or the recorded prediction."""
        if predictions is None:
            given = prediction_of(self._run, call.index).to(call.latents.device)
            predictions = Predictions({"cond": given}, given)
        return Step.of(
            self._plan.schedule,
            call.index,
            call.latents,
            predictions,
            call.latents,
            self._model.prediction_type,
        )
