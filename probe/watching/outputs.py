"""Record outputs of modules, whole or as statistics, of denoiser, VAE and text encoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from probe.diffusion.family import Family
from probe.errors import ExperimentError
from probe.format.schema import STATISTICS, ArraySpec, spec
from probe.watching.hooks import Watch
from probe.watching.interface import (
    Capture,
    Derived,
    Plan,
    Store,
    Values,
    as_numpy,
    dtype_note,
    numpy_dtype,
)
from probe.watching.kept import Kept, Tray, measures_late
from probe.watching.measures import statistics_of
from probe.watching.rehearsal import first_tensor
from probe.watching.selection import activation_paths, statistic_paths
from probe.watching.together import statistics_together


class ModuleOutputs:
    """Outputs of modules of one component, read by hooks.

    `take` gives statistics, (statistic, batch, module) float32 or None, and whole outputs by path,
    (batch, ...). With `late`, outputs are kept until then, and `kept` is called in its place.
    """

    def __init__(
        self,
        component: str,
        module: nn.Module,
        statistics: Sequence[str],
        whole: Sequence[str],
        replace: bool = False,
        late: bool = False,
    ):
        self._modules = {f"{component}.{path}": part for path, part in module.named_modules()}
        self.statistics = list(statistics)
        self.whole = [path for path in whole if path in self._modules]
        self._numbers, self._wholes = Tray(self.statistics, replace), Tray(self.whole, replace)
        self._kept = (Kept(self.statistics), Kept(self.whole)) if late else None

    def watches(self) -> list[Watch]:
        watches: list[Watch] = []
        for paths, callback in ((self.statistics, self._measure), (self.whole, self._keep)):
            watches += [
                (self._modules[path], "output", functools.partial(callback, path)) for path in paths
            ]
        return watches

    def take(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        numbers, whole = self._numbers.take(), self._wholes.take()
        stacked = (
            torch.stack([numbers[path] for path in self.statistics], dim=-1)
            if self.statistics
            else None
        )
        return stacked, whole

    def forget(self) -> None:
        """Forget what was seen of a call that was broken off."""
        for tray in (self._numbers, self._wholes, *(self._kept or ())):
            tray.forget()

    @torch.no_grad()
    def kept(self, rows: tuple[int, ...]) -> tuple[Derived | None, dict[str, torch.Tensor]]:
        """Return statistics, (statistic, *rows, module), and whole outputs, which were kept."""
        assert self._kept is not None
        outputs, whole = (kept.take() for kept in self._kept)
        ordered = [outputs[path] for path in self.statistics]
        return statistics_together(ordered, rows) if ordered else None, whole

    @torch.no_grad()
    def _measure(self, path: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        if self._kept is not None:
            self._kept[0].put(path, tensor)
        else:
            self._numbers.put(path, statistics_of(tensor))

    def _keep(self, path: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        if self._kept is not None:
            self._kept[1].put(path, tensor)
        else:
            self._wholes.put(path, tensor.detach().clone())


def variable_of(path: str) -> str:
    """Return the variable of a module's output: "unet.mid_block" -> "unet/mid_block/activation"."""
    return f"{path.replace('.', '/', 1)}/activation"


class UnetOutputs(Capture):
    """Statistics and whole outputs of the denoiser's modules at each step, by branch and image."""

    component = "unet"

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._dtype, self._late = plan, model.dtype, measures_late(model.device)
        self._outputs = outputs_of(model, plan, self.component, late=self._late)

    def arrays(self) -> list[ArraySpec]:
        rows = (len(self._plan.computed_branches), self._plan.rows.images)
        return _arrays(
            self._plan, self._outputs, self.component, (self._plan.calls,), rows, self._dtype
        )

    def watches(self) -> list[Watch]:
        return self._outputs.watches()

    def wants(self, index: int, first: bool) -> bool:
        return index in self._plan.recorded

    def forget(self) -> None:
        self._outputs.forget()

    def take(self, step: Any) -> Values:
        rows = (len(self._plan.computed_branches), self._plan.rows.images)
        values: Values = {}
        if self._late:
            derived, wholes = self._outputs.kept(rows)
            values |= {} if derived is None else {"unet/statistics": derived}
        else:
            statistics, wholes = self._outputs.take()
            if statistics is not None:
                values["unet/statistics"] = statistics.unflatten(1, rows)
        return values | {variable_of(path): v.unflatten(0, rows) for path, v in wholes.items()}


class VaeOutputs(Capture):
    """Statistics and whole outputs of the VAE's modules, when it decodes the final latents."""

    component = "vae"

    def __init__(self, model: Family, plan: Plan):
        self._plan, self._dtype = plan, model.decoding_dtype
        # A VAE that overflows in float16 decodes again in float32.
        self._outputs = outputs_of(model, plan, self.component, replace=True)

    def arrays(self) -> list[ArraySpec]:
        return _arrays(
            self._plan, self._outputs, self.component, (), (self._plan.rows.images,), self._dtype
        )

    def watches(self) -> list[Watch]:
        return self._outputs.watches()

    def finish(self, latents: torch.Tensor, store: Store) -> list[str]:
        statistics, wholes = self._outputs.take()
        if statistics is not None:
            store.write("vae/statistics", as_numpy(statistics))
        for path, whole in wholes.items():
            store.write(variable_of(path), as_numpy(whole))
        return []


class TextOutputs(Capture):
    """Whole outputs of the text encoder's modules, for each branch."""

    def __init__(self, model: Family, plan: Plan, component: str = "text_encoder"):
        self.component, self._plan, self._dtype = component, plan, model.dtype
        self._outputs = outputs_of(model, plan, component)
        self._branch, self._seen = "", dict[str, dict[str, torch.Tensor]]()

    def arrays(self) -> list[ArraySpec]:
        return _arrays(
            self._plan,
            self._outputs,
            self.component,
            (),
            (len(self._plan.computed_branches),),
            self._dtype,
        )

    def watches(self) -> list[Watch]:
        return self._outputs.watches()

    def expect(self, call: int | str) -> None:
        self._flush()
        self._branch = str(call)

    def begin(self, store: Store) -> None:
        self._flush()
        for path in self._outputs.whole:
            # Zeros are for a branch that no text encoder reads.
            nothing = torch.zeros_like(self._seen["cond"][path])
            rows = [
                self._seen[branch][path] if branch in self._seen else nothing
                for branch in self._plan.computed_branches
            ]
            store.write(variable_of(path), as_numpy(torch.cat(rows)))

    def _flush(self) -> None:
        """Put aside what was seen of the branch before."""
        if self._branch:
            self._seen[self._branch] = self._outputs.take()[1]
        self._branch = ""


def outputs_of(
    model: Family, plan: Plan, component: str, *, replace: bool = False, late: bool = False
) -> ModuleOutputs:
    """Return the outputs of a component's modules that the experiment asks for."""
    module, capture = model.components().get(component, nn.Module()), plan.recipe.capture
    statistics = (
        statistic_paths(model, component, plan.rehearsal)
        if capture.statistics and component in ("unet", "vae")
        else []
    )
    return ModuleOutputs(
        component,
        module,
        statistics,
        activation_paths(plan.rehearsal, capture.activations),
        replace,
        late,
    )


def _arrays(
    plan: Plan,
    outputs: ModuleOutputs,
    component: str,
    lead: tuple[int, ...],
    rows: tuple[int, ...],
    dtype: torch.dtype,
) -> list[ArraySpec]:
    specs = list[ArraySpec]()
    if component != "vae" and (outputs.statistics or outputs.whole):
        specs.append(spec(component, "branch", value=list(plan.computed_branches)))
    if outputs.statistics:
        names = [path.removeprefix(f"{component}.") for path in outputs.statistics]
        specs += [
            spec(component, "module", value=names),
            spec(component, "statistic", value=list(STATISTICS)),
        ]
        specs.append(spec(component, "statistics", (*lead, len(STATISTICS), *rows, len(names))))
    for path in outputs.whole:
        shape = plan.rehearsal.outputs[path]
        batch = 1 if component.startswith("text_encoder") else int(torch.Size(rows).numel())
        if shape[0] != batch or not 2 <= len(shape) <= 4:
            raise ExperimentError(
                f"capture.activations: the output of {path} has shape {shape}, without one row "
                "per image.",
                "Name another module.",
            )
        group = variable_of(path).rpartition("/")[0]
        specs.append(
            spec(
                group,
                "activation",
                (*lead, *rows, *shape[1:]),
                numpy_dtype(dtype),
                **dtype_note(dtype),
            )
        )
    return specs
