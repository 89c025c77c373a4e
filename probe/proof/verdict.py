"""All checks of a recording and their verdict: `run.verify()`, printed by `probe verify`.

    found = verify(open_run("latest"))      # with model=True, the model is asked again
    found.verdict                           # the worst: "exact", "within tolerance", "failed", ...
    found.failed                            # the checks that failed
    print(found)

A recording is read one step at a time. torch is imported when a check needs it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from probe.arguments import chosen_steps
from probe.errors import ExperimentError, RecordingUnreadable
from probe.proof.checks import (
    DAMAGE,
    Check,
    Verdict,
    check_committed,
    check_digests,
    check_manifest,
    check_picture,
)
from probe.proof.label_checks import check_labels
from probe.proof.map_checks import check_moments, check_softmax, check_sums
from probe.proof.schema_checks import check_schema, only_the_model_knows
from probe.proof.unknown import check_unknown
from probe.reading.choice import Indices
from probe.reading.recording import Run, with_files
from probe.system import reading
from probe.terminal import without_home
from probe.text import first_line, printable

WITH_MODEL = "weights plan text predictions maps attention inside decode encode".split()
Steps = Indices | str
WORST_FIRST: tuple[Verdict, ...] = ("failed", "within tolerance", "exact", "not checked")


@dataclass(frozen=True)
class Verification:
    """What the checks of a recording found. Iterate over its checks, or print it."""

    run: Run
    checks: tuple[Check, ...]
    with_model: bool

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __len__(self) -> int:
        return len(self.checks)

    @property
    def verdict(self) -> Verdict:
        """Return the verdict of all: the worst of them."""
        present = {check.verdict for check in self.checks}
        return next(verdict for verdict in WORST_FIRST if verdict in present)

    @property
    def failed(self) -> tuple[Check, ...]:
        """Return the checks that failed; none in a sound recording."""
        return tuple(check for check in self.checks if check.verdict == "failed")

    def as_json(self) -> dict[str, Any]:
        """Return the findings for a machine."""
        checks = [{**asdict(check), "because": list(check.because)} for check in self.checks]
        of = {"recording": printable(self.run.name), "path": printable(str(self.run.path))}
        return {**of, "status": self.run.status, "verdict": self.verdict, "checks": checks}

    def lines(self, width: int = 10_000) -> list[str]:
        """Return the findings for people: a table, then one line that says it all."""
        lines = [f"{printable(self.run.name)} ({self.run.status})"]
        names = max(len(check.name) for check in self.checks)
        for check in self.checks:
            head = f"  {check.name:{names}}  {check.verdict:16}  "
            room = max(width - len(head), 40)
            because = f" (because: {'; '.join(check.because)})" if check.because else ""
            wrapped = textwrap.wrap(check.detail + because, room, break_on_hyphens=False)
            first, *rest = wrapped or [""]
            lines += [head + first, *(" " * len(head) + line for line in rest)]
        return [*lines, self._last_line()]

    def _last_line(self) -> str:
        if self.failed:
            failed = ", ".join(check.name for check in self.failed)
            return f"FAILED: {len(self.failed)} of {len(self)} checks: {failed}."
        verdicts = [check.verdict for check in self.checks]
        order: tuple[Verdict, ...] = ("exact", "within tolerance", "not checked")
        parts = [f"{verdicts.count(one)} {one}" for one in order if one in verdicts]
        if self.with_model:
            return f"Verified: {', '.join(parts)}."
        asks = "Add --model to let the model predict again"
        unasked = ", ".join(only_the_model_knows(self.run))
        return f"Verified: {', '.join(parts)}. {asks}: only it can check {unasked}."

    def __str__(self) -> str:
        return "\n".join(self.lines())


def verify(run: Run, model: Any = None, steps: Steps | None = None) -> Verification:
    """Make all checks of a recording. All of it is read, one step at a time.

    `model` is a diffusers pipeline, or True to load the recording's own. The model then predicts
    again from the recorded latents of `steps`: indices of model calls, or None for every committed
    one. Raises ExperimentError for a step that was not committed, ModelError if the model cannot be
    had, RecordingUnreadable if the system does not read the recording.
    """
    asked = model is not None and model is not False
    if steps is not None and not asked:
        problem = "steps says at which steps the model is asked, and no model is."
        raise ExperimentError(problem, "Give model=True, or a pipeline; or leave out steps.")
    with reading(with_files(run).path):
        if asked:
            chosen = asked_steps(run, steps)
            family = _model(run, None if model is True else model)
        checks = _without_model(run)
        if asked:
            checks += _ask_again(run, family, chosen)
    shown = [
        replace(
            check,
            detail=printable(without_home(check.detail)),
            because=tuple(map(printable, check.because)),
        )
        for check in checks
    ]
    return Verification(run, tuple(shown), asked)


def asked_steps(run: Run, steps: Steps | None) -> list[int]:
    """Return the committed steps that are asked for: by indices, a mask, a slice or text.

    A slice takes those that were committed. Raises ExperimentError for an index that was not.
    """
    committed = [int(step) for step in run.steps]
    if steps is None:
        return committed
    calls = run.variable("committed").size
    indices = chosen_steps(steps, calls)
    if isinstance(indices, slice):
        return [step for step in range(calls)[indices] if step in committed]
    for step in indices:
        if (step + calls if step < 0 else step) not in committed:
            wrong = f"steps: {step} is not a committed step of {run.name}."
            raise ExperimentError(wrong, f"It has {len(committed)}, from 0.")
    return sorted({step % calls for step in indices})


def _model(run: Run, pipeline: Any) -> Any:
    from probe.proof import repredict

    return repredict.model_of(run, pipeline)


def _without_model(run: Run) -> list[Check]:
    checks: dict[str, Callable[[Run], Check]] = {
        "manifest": check_manifest,
        "digests": check_digests,
        "committed": check_committed,
        "schema": check_schema,
        "labels": check_labels,
        "softmax": check_softmax,
        "moments": check_moments,
        "sums": check_sums,
        "picture": check_picture,
        **{name: _replay(name) for name in ("schedule", "guidance", "scheduler")},
    }
    if (run.path / "source").is_dir():  # a picture that it began from
        checks["forward"] = _replay("forward")
    results = [_guarded(run, name, check) for name, check in checks.items()]
    unknown = _guarded(run, "unknown", check_unknown)
    return results if unknown.verdict == "exact" else [*results, unknown]


def _replay(name: str) -> Callable[[Run], Check]:
    def check(run: Run) -> Check:
        from probe.proof import forward_checks, replay

        checks = {
            "schedule": replay.check_schedule,
            "guidance": replay.check_guidance,
            "scheduler": replay.check_scheduler,
            "forward": forward_checks.check_forward,
        }
        with replay.threads_of(run):
            return checks[name](run)

    return check


def _ask_again(run: Run, model: Any, steps: Sequence[int]) -> list[Check]:
    from probe.proof import repredict

    checks: list[Check] = []
    try:
        with reading(run.path):
            checks.extend(repredict.check_model(run, model, steps))
    except RecordingUnreadable:
        raise
    except DAMAGE as error:
        missing = next(name for name in WITH_MODEL if name not in {check.name for check in checks})
        checks.append(Check(missing, "failed", _told(error, "the model cannot be asked")))
    return checks


def _guarded(run: Run, name: str, check: Callable[[Run], Check]) -> Check:
    try:
        with reading(run.path):
            return check(run)
    except RecordingUnreadable:
        raise
    except ImportError as missing:
        needs = f"needs {missing.name}: pip install 'diffusion-probe[record]'"
        return Check(name, "not checked", needs)
    except DAMAGE as error:
        return Check(name, "failed", _told(error))


def _told(error: Exception, what: str = "cannot be read") -> str:
    return f"{what}: {first_line(error)[:200]}"
