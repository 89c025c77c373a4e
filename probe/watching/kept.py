"""Keep what modules put out until the model has answered, and measure it then.

A GPU waits for launches: hooks that measure at once add hundreds of small ones to a call. There
hooks only keep references. What is changed in place later is copied, in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from probe.errors import CaptureError

SHARED = "A module that is shared or re-entered cannot be recorded: leave it out."
HIDDEN = (
    "Fused QKV projections, a compiled UNet or a replaced module hide it: undo that, or leave it "
    "out of capture.layers."
)

# Kinds of devices where a launch costs more than what it computes. A skeleton, on the meta device,
# stands for a model on one of them.
LAUNCH_BOUND = ("cuda", "meta")


def measures_late(device: torch.device) -> bool:
    """Return whether outputs on a device are measured after the call, all together."""
    return device.type in LAUNCH_BOUND


class Tray:
    """Values that hooks put down, by name.

    `take` empties it and insists on exactly one value for every name.
    """

    def __init__(self, names: Sequence[str], replace: bool = False):
        self._names, self._replace = tuple(names), replace
        self._values: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        if name in self._values and not self._replace:
            raise CaptureError(f"{name} fired twice in one step.", SHARED)
        self._values[name] = value

    def forget(self) -> None:
        """Forget what was put."""
        self._values = {}

    def take(self) -> dict[str, Any]:
        values, self._values = self._values, {}
        for name in self._names:
            if name not in values:
                raise CaptureError(f"{name} fired 0 times in a step.", HIDDEN)
        return values


class _Output(NamedTuple):
    tensor: torch.Tensor | None
    version: int
    copy: torch.Tensor | None


class Kept:
    """Outputs of modules by name, each as it was when it was put.

    The first call copies every output, and learns which are changed in place afterwards. Later
    calls copy only those. `take` gives references for all others.
    """

    def __init__(self, names: Sequence[str]):
        self._tray = Tray(names)
        self._changed: set[str] | None = None

    def put(self, name: str, output: torch.Tensor) -> None:
        """Keep an output. Raise CaptureError if there is one of this name already."""
        counted = not output.is_inference()  # torch counts no changes of such tensors
        copies = self._changed is None or name in self._changed or not counted
        holds = counted and (self._changed is None or name not in self._changed)
        with torch.no_grad():
            copy = output.detach().clone() if copies else None
        version = output._version if counted else 0
        self._tray.put(name, _Output(output.detach() if holds else None, version, copy))

    def forget(self) -> None:
        """Forget what was put."""
        self._tray.forget()

    def take(self) -> dict[str, Any]:
        """Return every output as it was, and forget them.

        Raise CaptureError if one is missing, or was changed in place after the first call alone.
        """
        taken: dict[str, Any] = {}
        changed = set(self._changed or ())
        for name, (tensor, version, copy) in self._tray.take().items():
            if tensor is not None and tensor._version == version:
                taken[name] = tensor
                continue
            if copy is None:
                raise CaptureError(
                    f"{name}: its output was changed in place, and was not in the first call.",
                    "Make that change from the first step on, or leave the module out.",
                )
            taken[name] = copy
            changed.add(name)
        self._changed = changed
        return taken
