"""python -m probe.verify RUN: is a recording what it says it is? With --model, the model is asked again.

From the recording alone:

    manifest, digests                 files, and what was written step by step (probe.proof.checks)
    committed, picture                flags, and the pictures for people (probe.proof.checks)
    schema, labels                    what there is, and what it is called (probe.proof.schema_checks)
    unknown                           what only another version knows, if anything (probe.proof.unknown)
    softmax, moments, sums            attention maps (probe.proof.map_checks)
    schedule, guidance, scheduler     every number that follows from another (probe.proof.replay)
    forward                           what a picture it began from, and noise in it, lead to (probe.proof.forward_checks)

With --model, from its recorded latents (probe.proof.repredict):

    weights, plan, text, predictions, maps, attention, inside, decode, encode

The verdict of each is "exact"; "within tolerance", for a reason that is named, such as another device; or "failed", and
where. What cannot be checked says why. Exit code 1 if anything failed.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probe.errors import ExperimentError, RecordingUnreadable
from probe.output import say, say_json
from probe.proof.checks import DAMAGE, Check, check_committed, check_digests, check_manifest, check_picture
from probe.proof.map_checks import check_moments, check_softmax, check_sums
from probe.proof.schema_checks import check_labels, check_schema, only_the_model_knows
from probe.proof.unknown import check_unknown
from probe.reading.recording import Run, open_run
from probe.strict_yaml import first_line, printable
from probe.system import reading
from probe.terminal import Parser, add_run, before_torch, described, guarded, without_home

WITH_MODEL = "weights plan text predictions maps attention inside decode encode".split()


def verify(run: Run, model: Any = None, steps: Sequence[int] | None = None) -> list[Check]:
    """All checks of a recording. Reads all of it, one step at a time.

    `model` is a diffusers StableDiffusionPipeline, or True to load the experiment's own: then the UNet predicts again from
    the recorded latents of `steps` (indices of model calls; None: every committed one). Raises ExperimentError for a step that
    was not committed, ModelError where the model cannot be had, RecordingUnreadable where the system does not read the recording.
    """
    with reading(run.path):
        return _verify(run, model, steps)


def _verify(run: Run, model: Any, steps: Sequence[int] | None) -> list[Check]:
    found = [
        _guarded(run.path, "manifest", lambda: check_manifest(run)),
        _guarded(run.path, "digests", lambda: check_digests(run)),
        _guarded(run.path, "committed", lambda: check_committed(run)),
        _guarded(run.path, "schema", lambda: check_schema(run)),
        _guarded(run.path, "labels", lambda: check_labels(run)),
        _guarded(run.path, "softmax", lambda: check_softmax(run)),
        _guarded(run.path, "moments", lambda: check_moments(run)),
        _guarded(run.path, "sums", lambda: check_sums(run)),
        _guarded(run.path, "picture", lambda: check_picture(run)),
        *(_guarded(run.path, name, lambda name=name: _replay(name, run)) for name in ("schedule", "guidance", "scheduler")),  # type: ignore[misc]
    ]
    if (run.path / "source").is_dir():  # a picture that it began from
        found.append(_guarded(run.path, "forward", lambda: _replay("forward", run)))
    if (unknown := _guarded(run.path, "unknown", lambda: check_unknown(run))).verdict != "exact":
        found.append(unknown)
    if model is not None and model is not False:
        found += _ask_again(run, None if model is True else model, steps)
    return [replace(check, detail=printable(without_home(check.detail)), because=tuple(map(printable, check.because))) for check in found]


def _replay(name: str, run: Run) -> Check:
    from probe.proof import forward_checks, replay

    checks = {"schedule": replay.check_schedule, "guidance": replay.check_guidance, "scheduler": replay.check_scheduler}
    with replay.threads_of(run):
        return {**checks, "forward": forward_checks.check_forward}[name](run)


def _ask_again(run: Run, pipeline: Any, steps: Sequence[int] | None) -> list[Check]:
    from probe.proof import repredict

    committed = [int(step) for step in run.steps]
    chosen = committed if steps is None else sorted({step % run.tree.sizes["step"] if step < 0 else step for step in steps})
    if unknown := [step for step in chosen if step not in committed]:
        raise ExperimentError(f"steps: {unknown[0]} is not a committed step of {run.name}.", f"It has {len(committed)}, from 0.")
    model = repredict.model_of(run, pipeline)
    found: list[Check] = []
    try:
        with reading(run.path):
            found.extend(repredict.check_model(run, model, chosen))
    except RecordingUnreadable:
        raise
    except DAMAGE as error:
        missing = next(name for name in WITH_MODEL if name not in {check.name for check in found})
        found.append(Check(missing, "failed", _told(error, "the model cannot be asked")))
    return found


def _guarded(path: Path, name: str, check: Callable[[], Check]) -> Check:
    try:
        with reading(path):
            return check()
    except RecordingUnreadable:
        raise
    except ImportError as missing:
        return Check(name, "not checked", f"needs {missing.name}: pip install 'diffusion-probe[record]'")
    except DAMAGE as error:
        return Check(name, "failed", _told(error))


def _told(error: Exception, what: str = "cannot be read") -> str:
    return f"{what}: {first_line(error)[:200]}"


# --- the command -----------------------------------------------------------------------------------------------------


def parser(prog: str = "python -m probe.verify") -> argparse.ArgumentParser:
    made = Parser(prog=prog, description=described(__doc__, "python -m probe.verify", prog))
    add_run(made)
    made.add_argument("--model", action="store_true", help="load the recording's model, and let it predict again from the recorded latents")
    made.add_argument("--steps", default="all", help='with --model, at which steps: all, "start:stop:step", or "0,5,-1" [all]')
    made.add_argument("--json", action="store_true", help="the findings as JSON")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(arguments: list[str], prog: str = "python -m probe.verify") -> int:
    options = parser(prog).parse_args(arguments)
    if options.steps != "all" and not options.model:
        raise ExperimentError("--steps says at which steps the model is asked, and no model is.", "Add --model.")
    run = open_run(options.run, options.runs)
    before_torch(True)
    found = verify(run, model=options.model, steps=_steps(run, options.steps))
    if options.json:
        say_json(as_json(run, found))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000  # in a pipe, a finding is a line
        say(*told(run, found, width, options.model).split("\n"))
    return 1 if any(check.verdict == "failed" for check in found) else 0


def _steps(run: Run, text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    from probe.experiment import load_experiment

    return load_experiment({"capture": {"steps": text}}).capture.steps_of(run.tree.sizes["step"])


def overall(found: Sequence[Check]) -> str:
    """The verdict of all: the worst of them."""
    present = {check.verdict for check in found}
    return next(verdict for verdict in ("failed", "within tolerance", "exact", "not checked") if verdict in present)


def as_json(run: Run, found: Sequence[Check]) -> dict[str, Any]:
    """The findings for a machine."""
    checks = [{"name": c.name, "verdict": c.verdict, "detail": c.detail, "because": list(c.because)} for c in found]
    return {"recording": printable(run.name), "path": printable(str(run.path)), "status": run.status, "verdict": overall(found), "checks": checks}


def told(run: Run, found: Sequence[Check], width: int, with_model: bool) -> str:
    """The findings for people: a table, then one line that says it all."""
    lines = [f"{printable(run.name)} ({run.status})"]
    names = max(len(check.name) for check in found)
    for check in found:
        head = f"  {check.name:{names}}  {check.verdict:16}  "
        room = max(width - len(head), 40)
        detail = check.detail + (f" (because: {'; '.join(check.because)})" if check.because else "")
        first, *rest = textwrap.wrap(detail, room, break_on_hyphens=False) or [""]
        lines += [head + first, *(" " * len(head) + line for line in rest)]
    counts = {
        verdict: [check.name for check in found if check.verdict == verdict] for verdict in ("failed", "exact", "within tolerance", "not checked")
    }
    if counts["failed"]:
        lines.append(f"FAILED: {len(counts['failed'])} of {len(found)} checks: {', '.join(counts['failed'])}.")
    else:
        parts = [f"{len(names)} {verdict}" for verdict, names in counts.items() if names]
        hint = "" if with_model else f" Add --model to let the model predict again: only it can check {', '.join(only_the_model_knows(run))}."
        lines.append(f"Verified: {', '.join(parts)}.{hint}")
    return "\n".join(lines)


if __name__ == "__main__":
    guarded(main)
