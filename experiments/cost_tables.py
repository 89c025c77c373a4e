"""Make the tables of pixels against latents that come with the package: probe/pixels/*.json.

python -m experiments.cost_tables             # counts.json: minutes
python -m experiments.cost_tables --measure   # measured.json: half an hour on one core

The dashboard, the pages and the lesson read them with `probe.reading.pixels`.
"""

from __future__ import annotations

import argparse

from probe.cost import measured_lines, write
from probe.output import say, tell
from probe.reading.pixels import FOLDER
from probe.settings.cost import Cost, load_cost

COUNTED: tuple[Cost, ...] = (
    load_cost({"model": "sd14", "sizes": [256, 384, 512, 768, 1024]}),
    load_cost({"model": "sd21", "sizes": [512, 768]}),
    load_cost({"model": "sdxl", "sizes": [512, 1024]}),
    load_cost({"model": "small", "sizes": [128, 512], "f": [1, 2, 4, 8, 16]}),
    load_cost({"model": "emojiworld", "sizes": [64, 128], "f": [1, 2, 4, 8, 16]}),
)
# The networks that a CPU runs. Stable Diffusion's own is timed on latents alone.
MEASURED: tuple[Cost, ...] = (
    load_cost({"model": "emojiworld", "sizes": [128], "f": [1, 2, 4, 8]}),
    load_cost({"model": "small", "sizes": [128], "f": [1, 2, 4, 8]}),
    load_cost({"model": "small", "sizes": [512], "f": [1]}),
    load_cost({"model": "sd14", "sizes": [512], "f": [1, 8, 16, 32]}),
    load_cost({"model": "sd14", "sizes": [768], "f": [8], "attention_up_to": 128}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--measure", action="store_true", help="time calls, and write measured.json"
    )
    parser.add_argument("--most-seconds", type=float, default=45.0, help="of one call [45]")
    options = parser.parse_args()
    made_by = "python -m experiments.cost_tables"
    if options.measure:
        from probe.watching.timing import measured

        times = measured(
            MEASURED,
            made_by=f"{made_by} --measure",
            device="cpu",
            most_seconds=options.most_seconds,
            progress=tell,
        )
        write(FOLDER / "measured.json", times)
        say(*measured_lines(times))
        return
    from probe.watching.counting import count_models

    write(FOLDER / "counts.json", count_models(COUNTED, made_by, tell))


if __name__ == "__main__":
    main()
