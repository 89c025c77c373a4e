"""python -m probe.noising FILE.yaml: noise a real picture, and record what the model makes of it.

This is the forward process. A picture is encoded and mixed with known noise at chosen timesteps.
The UNet predicts the noise each time. Recorded for each timestep are the noised latents, the
prediction, its difference from the true noise, the denoised latents, the loss over several draws of
noise, and the cross-attention. The noising is a YAML file (see experiments/noising.yaml). Every
field can be overridden on the command line:

    python -m probe.noising experiments/noising.yaml
    python -m probe.noising experiments/noising.yaml --timesteps 100,500,900 --noises 16
    python -m probe.noising --picture my.jpg --caption "A cat on the moon" --dry-run

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
from probe.run import add_limits, add_talk, say_forecast, say_where
from probe.settings.noising import Noising, load_noising
from probe.terminal import Parser, add_fields, before_torch, described, guarded, overrides

if TYPE_CHECKING:
    from probe.reading.recording import Run


def parser(prog: str = "python -m probe.noising") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog=prog, description=described(__doc__, "python -m probe.noising", prog))
    parser.add_argument(
        "noising",
        nargs="?",
        type=Path,
        help="a YAML file; without one, --picture FILE and the defaults",
    )
    add_limits(parser)
    add_talk(parser)
    add_fields(parser, Noising)
    return parser


def main(arguments: list[str], prog: str = "python -m probe.noising") -> int:
    """Record the noising that the command line asks for. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    noising = load_noising(options.noising or Noising())
    if changes := overrides(options, Noising):
        noising = load_noising(noising, **changes)
    before_torch(options.quiet)
    if options.dry_run:
        return say_forecast(noising, options.max_bytes)
    from probe.running.recorder import record

    run = record(noising, max_bytes=options.max_bytes, progress=not options.quiet)
    if not options.quiet:
        say("", *losses(run))
    return say_where(run, options.quiet)


def losses(run: Run) -> list[str]:
    """Return a noising's losses as the lines of a table, and how well the VAE kept its picture.

    A model of pixels has no VAE, and keeps all of it.
    """
    root, forward = run.tree.to_dataset(), run.tree["forward"].dataset
    columns = ["timestep", "sigma", "loss", "spread"]
    values = [
        root["timestep"].values,
        root["sigma"].values,
        forward["loss_mean"].values,
        forward["loss_spread"].values,
    ]
    shown = 4 if run.noising.noises > 1 else 3  # one draw of noise has no spread
    table = [
        (f"{t:.0f}", f"{sigma:.3g}", f"{mean:.4f}", f"{spread:.4f}")[:shown]
        for t, sigma, mean, spread in zip(*values, strict=True)
    ]
    round_trip = f"The VAE's round trip: {float(run.variable('source/psnr')):.1f} dB"
    if run.attributes.model.on_pixels:
        round_trip = "The model works on pixels: no VAE changed the picture."
    return [*rows(table, columns[:shown]), "", round_trip]


if __name__ == "__main__":
    guarded(main)
