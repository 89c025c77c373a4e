"""One recording in progress, whoever runs the loop.

    with Session(model, plan, store) as session:
        conditioning = session.begin()
        for index in range(plan.calls):
            with session.watching(index):
                step = ...                    # one call of the model, as a `Step`
            session.record(step)
        session.finish(final_latents)

Hooks are on only while they are wanted, and off after the `with` block, whatever happened. The
session knows captures and a store, and nothing of the loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from probe.diffusion.family import TEXT, Arguments, Conditioning, Family
from probe.diffusion.parts import count_not_finite
from probe.diffusion.sampling import Step
from probe.editing.editing import Editing
from probe.errors import NotFinite, StoreError
from probe.running.graphs import Graphs
from probe.running.transfer import Transfer
from probe.settings.recipe import Recipe
from probe.watching.hooks import Hooks
from probe.watching.interface import Capture, Plan, Store, Values, as_numpy, hooked
from probe.watching.source import note_memory_format
from probe.watching.sums import read_step

Say = Callable[[str], None]


class StepStore(Store, Protocol):
    """A store that takes whole steps, later and in another thread."""

    def write_step(
        self, step: int, values: Callable[[], Mapping[str, np.ndarray]], nbytes: int
    ) -> None:
        """Write a step's variables, which `values()` gives."""

    def flush(self) -> None:
        """Wait until every step is written."""


class Session:
    """A recording of `plan` into `store`.

    Pass steps that the store has already to `replay`, all others to `record`. `weights` gives the
    digest of the weights, if the store's attributes have none: no step is committed before.
    """

    def __init__(
        self,
        model: Family,
        plan: Plan,
        store: StepStore,
        say: Say = lambda _: None,
        weights: Callable[[], str] | None = None,
    ):
        self._weights = weights
        self._model, self._plan, self._store, self._say = model, plan, store, say
        self._dims = {spec.path: spec.dims for spec in plan.arrays}
        self._hooks, self._hooked = Hooks(()), tuple[Capture, ...]()
        self._wanted: list[Capture] = []
        self._transfer = Transfer()
        self.first = store.committed  # the first step that is recorded here
        self._graphs = Graphs(model, plan, self.first)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hook(())
        self._graphs.close()

    def begin(self) -> Conditioning:
        """Read the prompts, one branch a call, and write what is known before the first step."""
        plan, arguments = self._plan, dict[str, Arguments]()
        readers = [
            capture
            for capture in plan.captures
            if capture.component in (*self._model.text_encoders(), "all")
        ]
        self._hook(readers)
        # The prompt first, then the negative prompt, as diffusers does.
        for branch in sorted(plan.computed_branches):
            for capture in readers if branch not in plan.zeroed_branches else ():
                capture.expect(branch)
            given = self._model.embeds
            arguments[branch] = (
                self._model.encode_prompt(plan.tokens[branch], branch)
                if given is None
                else given[branch]
            )
            count_not_finite(
                "text_encoder: its output", arguments[branch][TEXT], plan.recipe.on_nan
            )
        self._hook(())
        for capture in plan.captures:
            capture.begin(self._store)
        return Conditioning(arguments, plan.tokens)

    def prepare(self, editing: Editing, index: int) -> None:
        """Let edits get ready for a step, unwatched: a donor calls the model for itself."""
        if editing.asks_donors(index, index < self.first):
            self._hook(())
            editing.prepare(index)

    @contextlib.contextmanager
    def watching(self, index: int) -> Iterator[None]:
        """Watch the call of the model that makes step `index`, in the `with` block."""
        self._wanted = [
            capture for capture in self._plan.captures if capture.wants(index, index == self.first)
        ]
        watching = [capture for capture in self._wanted if capture.component in ("unet", "all")]
        for capture in watching:
            capture.expect(index)
        self._graphs.expect(index)
        self._hook(watching)
        yield

    def call(
        self, model_input: torch.Tensor, t: torch.Tensor, arguments: Arguments
    ) -> torch.Tensor:
        """Call the denoiser for the step that is watched. It takes what `Family.call` takes."""
        return self._graphs.call(model_input, t, arguments)

    def record(self, step: Step) -> None:
        """Record the step that was watched.

        Raise CaptureError if a module was not seen once, NotFinite, StoreError.
        """
        values: Values = {}
        for capture in self._wanted:
            if capture.calls_model:
                self._hook(())
            values |= self._graphs.take(capture, step)
        if self._graphs.due:
            self._hook(())
            self._graphs.settle(step)
        for capture in self._plan.captures:
            capture.seen(step.index, values)
        if step.index == 0:
            note_memory_format("prediction", step.prediction, self._store)
        dtype = step.latents.dtype
        host, nbytes = self._transfer.start(values)

        def ready() -> dict[str, np.ndarray]:
            arrays, recipe = host(), self._plan.recipe
            for path in arrays:
                if path.startswith("latents/"):
                    name = path.removeprefix("latents/")
                    check_finite(name, step.index, arrays[path], recipe, dtype)
            for path in [path for path in arrays if self._dims[path][:1] != ("step",)]:
                self._store.write(path, arrays.pop(path))
            for capture in self._plan.captures:
                capture.arrived(step.index, arrays)
            if self._weights is not None:
                self._store.annotate(model={"weights": self._weights()})
                self._weights = None
            return arrays

        self._store.write_step(step.index, ready, nbytes)
        for capture in self._plan.captures:
            capture.passed(step, self._store)

    def replay(self, step: Step) -> None:
        """Pass a step that is recorded already.

        Raise StoreError if its latents differ from the recorded ones.
        """
        stop = self._plan.recipe.on_nan == "stop"
        recorded = read_step(self._store, "latents/latents", step.index, stop)
        replayed = as_numpy(step.latents)
        if not np.array_equal(recorded, replayed, equal_nan=True):
            difference = np.abs(recorded.astype(np.float64) - replayed)
            off = float(np.nan_to_num(difference, nan=np.inf).max())
            raise StoreError(
                f"The latents of step {step.index} come out otherwise than they were recorded (by "
                f"up to {off:.2g}).",
                "It was begun under other versions, on another device or another processor: resume "
                "it there, or record it again with probe rerun.",
            )
        self._hook([capture for capture in self._plan.captures if capture.component == "all"])
        for capture in self._plan.captures:
            capture.passed(step, self._store)

    def finish(self, latents: torch.Tensor) -> None:
        """Write what follows from the whole run: the picture, the VAE's inside, sums, cost.

        Raise NotFinite, StoreError.
        """
        self._store.flush()
        self._graphs.close()  # what they hold is wanted for the picture
        check_finite(
            "final_latents",
            self._plan.calls - 1,
            as_numpy(latents),
            self._plan.recipe,
            latents.dtype,
        )
        self._hook(
            [capture for capture in self._plan.captures if capture.component in ("vae", "all")]
        )
        if self._graphs.considered:
            self._note_graphs()
        for capture in self._plan.captures:
            if capture.finishing:
                self._say(f"{capture.finishing} ...")
            for line in capture.finish(latents, self._store):
                self._say(line)
        self._hook(())

    def _note_graphs(self) -> None:
        """Write down how many calls were replayed and why no more; tell people of the latter."""
        why = self._graphs.refusal
        self._store.annotate(
            cuda_graphs={"replayed": self._graphs.replayed, **({"refusal": why} if why else {})}
        )
        if why:
            self._say(f"Ran without CUDA graphs: {why}.")

    def _hook(self, captures: Sequence[Capture]) -> None:
        """Have the hooks of these captures on, and no others."""
        if tuple(captures) == self._hooked:
            return
        self._hooks.__exit__(None, None, None)
        self._hooks, self._hooked = hooked(*captures), tuple(captures)
        self._hooks.__enter__()


def check_finite(
    name: str, step: int, value: np.ndarray, recipe: Recipe, dtype: torch.dtype
) -> None:
    """Raise NotFinite for NaN or infinity, unless the recipe records them. `dtype` is the run's."""
    if recipe.on_nan == "stop" and not np.isfinite(value).all():
        tries = ["--dtype float32"] * (dtype != torch.float32)
        tries += ["a smaller guidance_scale"] * (recipe.guidance[0] > 1)
        raise NotFinite(
            f"{name} holds {'NaN' if np.isnan(value).any() else 'infinity'} at step {step}.",
            f"Try {' or '.join(tries) or 'another model'}; on_nan: record writes such values down "
            "instead of stopping.",
        )
