"""python -m probe.noising FILE.yaml: the forward process. Noise a real picture, and see what the
model makes of it.

A picture is encoded, mixed with known noise at chosen timesteps, and the UNet says what of it is
noise. Recorded for each timestep: the noised latents, the prediction, its difference from the true
noise, the denoised latents, the loss over several draws of noise, and the cross-attention. What is
asked is a YAML file (see experiments/noising.yaml), and every field can be overridden on the
command line:

    python -m probe.noising experiments/noising.yaml python -m probe.noising
    experiments/noising.yaml --timesteps 100,500,900 --noises 16 python -m probe.noising
    experiments/noising.yaml --picture my.jpg --caption "A cat on the moon" --masks "" --dry-run

From Python: `probe.record(load_noising(FILE))`, or, with arrays, `probe.record_noising(picture, "a
cat", {"cat": mask})`. The recording is read like any other. Along its dimension `draw` lie the
draws of noise; its steps are the timesteps, the noisiest first.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from probe.output import rows, say
from probe.run import add_limits, forecast, say_where
from probe.settings.noising import Noising, load_noising
from probe.terminal import Parser, add_fields, before_torch, described, guarded, overrides

if TYPE_CHECKING:
    from probe.reading.recording import Run


def parser(prog: str = "python -m probe.noising") -> argparse.ArgumentParser:
    made = Parser(prog=prog, description=described(__doc__, "python -m probe.noising", prog))
    made.add_argument(
        "noising",
        nargs="?",
        type=Path,
        help="a YAML file; without one, --picture FILE and the defaults",
    )
    add_limits(made)
    made.add_argument("--quiet", action="store_true", help="print nothing but the recording's path")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_fields(made, Noising)
    return made


def main(arguments: list[str], prog: str = "python -m probe.noising") -> int:
    options = parser(prog).parse_args(arguments)
    asked = load_noising(options.noising or Noising())
    if changes := overrides(options, Noising):
        asked = load_noising(asked, **changes)
    before_torch(options.quiet)
    if options.dry_run:
        return forecast(asked, options.max_bytes)
    from probe.running.recorder import record

    run = record(asked, max_bytes=options.max_bytes, progress=not options.quiet)
    if not options.quiet:
        say("", *told_losses(run))
    return say_where(run, options.quiet)


def told_losses(run: Run) -> list[str]:
    """The losses as a table, and the VAE's round trip."""
    root, forward = run.tree.to_dataset(), run.tree["forward"].dataset
    columns = ("timestep", "sigma", "loss", "spread")[
        : 4 if run.noising.noises > 1 else 3
    ]  # one draw of noise has no spread
    lines = [
        (f"{t:.0f}", f"{sigma:.3g}", f"{mean:.4f}", f"{spread:.4f}")[: len(columns)]
        for t, sigma, mean, spread in zip(
            root["timestep"].values,
            root["sigma"].values,
            forward["loss_mean"].values,
            forward["loss_spread"].values,
            strict=True,
        )
    ]
    trip = float(run.variable("source/psnr"))
    return [*rows(lines, columns), "", f"The VAE's round trip: {trip:.1f} dB"]


if __name__ == "__main__":
    guarded(main)
