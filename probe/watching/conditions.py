"""Refuse by name whatever would be recorded wrongly in silence.

    refuse_unwatchable(model)    before a run: a compiled, off-loaded or wrapped model
    ProcessorWitness(...)        at every step: a layer whose processor is not known

Hooks see what `to_q` and `to_k` put out. diffusers' own processors multiply just that, also with
LoRA, slicing, FreeU or another memory format. Any other processor may mask, merge, rescale or edit
in between: the witness proves its maps at every step, or the run stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from probe.errors import CaptureError, ModelError
from probe.watching.hooks import Watch

# Of diffusers.models.attention_processor: each computes softmax(scale q k^T) v of what to_q, to_k
# and to_v put out.
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
METHODS = ("forward", "decode", "encode")
NOT_FINITE = "computes what is not finite: its weights are not, or its number format is too small."
FINITE = "Fetch the model again, or try --dtype float32."


def refuse_unwatchable(model: Any) -> None:
    """Raise ModelError for a part whose hooks would stay silent or whose weights are elsewhere."""
    for part, root in model.components().items():
        for path, module in root.named_modules():
            name = f"{part}.{path}" if path else part
            if _is_compiled(module):
                raise ModelError(
                    f"{name} is compiled (torch.compile), and hooks on compiled modules stay "
                    "silent or change the result.",
                    f"Record the plain model: pipeline.{part}._orig_mod, or the pipeline as it "
                    "was before compiling.",
                )
            for hook in _accelerate_hooks(module):
                target = getattr(hook, "execution_device", None)
                first = next(module.parameters(), None)
                elsewhere = False
                if target is not None and first is not None:
                    elsewhere = torch.device(target) != first.device
                if getattr(hook, "offload", False) or elsewhere:
                    raise ModelError(
                        f"{name} is off-loaded: accelerate moves its weights to {target} for each "
                        "call.",
                        "Call pipeline.remove_all_hooks(), then pipeline.to(device), if the model "
                        "fits there.",
                    )
            if wrappers := list(getattr(vars(module).get("_diffusers_hook"), "hooks", ())):
                raise ModelError(
                    f"{name} is wrapped by diffusers' {wrappers[0]} hook, which is not supported.",
                    "Load the pipeline without it.",
                )


def _is_compiled(module: Any) -> bool:
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(hasattr(vars(module).get(name), "_torchdynamo_orig_callable") for name in METHODS)


def _accelerate_hooks(module: Any) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    yield from getattr(hook, "hooks", [] if hook is None else [hook])


def is_plain(module: Any) -> bool:
    """Return whether a layer is known to compute softmax(scale q k^T) v of its projections.

    These are what its to_q, to_k and to_v put out.
    """
    kind = type(module.processor)
    if kind.__module__ != "diffusers.models.attention_processor" or kind.__name__ not in PLAIN:
        return False
    if {"forward", "get_attention_scores"} & vars(module).keys():
        return False
    # AttnProcessor2_0 lets torch choose the scale, and never looks at `module.scale`.
    return kind.__name__ != "AttnProcessor2_0" or math.isclose(
        module.scale, (module.inner_dim / module.heads) ** -0.5, rel_tol=1e-6
    )


class ProcessorWitness:
    """Proof, at each call, that layers with an unknown processor attend as their maps say.

    softmax(scale q k^T) v of what to_q, to_k and to_v put out is compared with what enters
    `to_out`, in the rows (batch elements) that are recorded. They may differ by rounding: in norm,
    by `max(1e-3, eps / 2)` of softmax(scale q k^T) |v|, with eps of the run's dtype. Layers with a
    known processor cost nothing. Raise CaptureError if they differ.
    """

    def __init__(self, layers: Mapping[str, Any], rows: Sequence[int]):
        self._layers = {path: module for path, module in layers.items() if not is_plain(module)}
        self._rows = list(rows)
        self._parts: dict[str, dict[str, torch.Tensor]] = {path: {} for path in self._layers}
        self._proven: set[str] = set()

    def watches(self) -> list[Watch]:
        watches: list[Watch] = []
        for path, module in self._layers.items():
            watches += [
                (getattr(module, name), "output", self._keep(path, name))
                for name in ("to_q", "to_k", "to_v")
            ]
            watches.append((module.to_out[0], "input", self._prove(path, module)))
        return watches

    def take(self) -> None:
        """Raise CaptureError if a layer was not proven in the last call of the model."""
        unproven = [path for path in self._layers if path not in self._proven]
        self._proven.clear()
        if unproven:
            self._refuse(unproven[0], "it could not be checked")

    def _keep(self, path: str, name: str) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            self._parts[path][name] = (
                output.detach()[self._rows]
                .unflatten(-1, (self._layers[path].heads, -1))
                .transpose(1, 2)
                .float()
            )

        return hook

    def _prove(self, path: str, module: Any) -> Callable[[Any], None]:
        def hook(output: torch.Tensor) -> None:
            parts, self._parts[path] = self._parts[path], {}
            if len(parts) < 3:
                return
            with torch.no_grad():
                shares = (parts["to_q"] @ parts["to_k"].transpose(-1, -2) * module.scale).softmax(
                    -1
                )
                expected, size = (
                    (shares @ value).transpose(1, 2).flatten(2)
                    for value in (parts["to_v"], parts["to_v"].abs())
                )
                if output.shape[1:] != expected.shape[1:]:
                    self._refuse(
                        path,
                        f"it puts out {tuple(output.shape[1:])} where {tuple(expected.shape[1:])} "
                        "was expected",
                    )
                off = float((output.detach()[self._rows].float() - expected).norm() / size.norm())
            if not off <= max(1e-3, torch.finfo(output.dtype).eps / 2):
                self._refuse(path, f"its output is off by {off:.1%}")
            self._proven.add(path)

        return hook

    def _refuse(self, path: str, why: str) -> None:
        raise CaptureError(
            f"{path} does not compute softmax(q k^T) v "
            f"({type(self._layers[path].processor).__name__}: {why}), so its maps would be wrong.",
            "Call pipeline.unet.set_default_attn_processor(), or leave the layer out of "
            "capture.layers.",
        )
