"""python -m probe.cost FILE.yaml: what a model costs on pixels and on latents, layer by layer.

Parameters, floating-point operations, activations and attention matrices of the text encoder, the
denoiser, the VAE and a whole run are counted from configs alone: no weights, no download, no GPU.
At f = 1 the same network works on pixels. The settings are a YAML file (see
experiments/cost-sd14.yaml), and every field can be overridden on the command line:

    python -m probe.cost experiments/cost-sd14.yaml
    python -m probe.cost --model sdxl --sizes 1024 --f 1,8
    python -m probe.cost --model ./my-model --layers --f 8
    python -m probe.cost --model small --sizes 128 --measure

With --measure the denoiser runs as well, with random weights, each call in a process of its own:
time (processor time, or device events on CUDA) and peak memory. What would not fit into memory, or
would take longer than --most-seconds, is extrapolated by a law a + b N + c N^2 in the number of
places N, and labelled so.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import ExperimentError, StoreError
from probe.output import rows, say, tell
from probe.reading.pixels import KINDS, WHY_THEY_DIFFER, Count, Counts, Data, Measured, paper
from probe.settings.cost import Cost, load_cost
from probe.settings.strict_yaml import read_yaml
from probe.terminal import Parser, before_torch, described, guarded, without_home

if TYPE_CHECKING:
    from probe.watching.counting import Entry

G = 1e9
NUMBERS = ("steps", "guidance", "batch", "attention_up_to")


def parser(prog: str = "python -m probe.cost") -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = Parser(prog=prog, description=described(__doc__, "python -m probe.cost", prog))
    made.add_argument(
        "settings", nargs="?", type=Path, help="a YAML file; without one, the defaults"
    )
    made.add_argument("--layers", action="store_true", help="list every layer of what is counted")
    made.add_argument(
        "--output", metavar="FILE", type=Path, help="write what was found into a JSON file as well"
    )
    made.add_argument("--quiet", action="store_true", help="no progress")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    timed = made.add_argument_group("measuring")
    timed.add_argument(
        "--measure", action="store_true", help="run the denoiser, and take its time and memory"
    )
    timed.add_argument("--rounds", type=int, default=5, help="how often each call is timed [5]")
    timed.add_argument("--threads", type=int, default=1, help="threads of the processor [1]")
    timed.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where it runs [auto]"
    )
    timed.add_argument(
        "--most-seconds", type=float, default=60.0, help="leave out calls that take longer [60]"
    )
    fields = made.add_argument_group("cost (each overrides the file)")
    for name, field in Cost.model_fields.items():
        default = field.default
        shown = ",".join(map(str, default)) if name == "f" else default
        shown = "512" if name == "sizes" else str(shown).lower()
        fields.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"field {name}",
            metavar=name.upper(),
            help=f"{field.description} [{shown}]",
        )
    return made


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that were given on the command line."""
    changes: dict[str, Any] = {}
    for key, text in vars(options).items():
        if key.startswith("field ") and text is not None:
            name = key.removeprefix("field ")
            number = name in NUMBERS
            changes[name] = read_yaml(f"value: {text}", name)["value"] if number else text
    return changes


def main(arguments: list[str], prog: str = "python -m probe.cost") -> int:
    """Count, or measure, what the command line asks for. Return the exit code."""
    options = parser(prog).parse_args(arguments)
    settings = load_cost(options.settings or Cost(), **changes_of(options))
    _check(options)
    before_torch(options.quiet)
    made_by = shlex.join(["python", "-m", "probe.cost", *_reproducible(options, arguments)])
    found = (_measured if options.measure else _counted)(settings, options, made_by)
    if options.output is not None:
        write(options.output, found)
        say("", without_home(str(options.output)))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ExperimentError for options that cannot be followed."""
    if options.rounds < 1 or options.threads < 1 or not options.most_seconds > 0:
        raise ExperimentError(
            "--rounds, --threads and --most-seconds are counted from 1 up.", "Give larger numbers."
        )
    if options.threads > (cores := os.cpu_count() or 1):
        raise ExperimentError(
            f"--threads {options.threads}: this machine has {cores} cores.",
            f"Write a number from 1 to {cores}.",
        )
    if options.layers and options.measure:
        raise ExperimentError(
            "--layers lists counts, and --measure takes times.", "Give one of the two."
        )
    if (output := options.output) is None:
        return
    if not output.absolute().parent.is_dir():
        raise ExperimentError(
            f"--output: the folder of {output} does not exist.", "Make it, or name another."
        )
    if output.exists() and not output.is_file():
        raise ExperimentError(
            f"--output: {output} is no plain file, and would be replaced.", "Name another."
        )


def _counted(settings: Cost, options: argparse.Namespace, made_by: str) -> Data:
    """Count, and print tables. Return the counts."""
    from probe.watching.counting import count_models

    entries: list[Entry] = []
    found = count_models([settings], made_by, _progress(options), entries.append)
    say(*counted_lines(found, settings))
    for count, layers in entries if options.layers else ():
        say("", *layer_lines(count, layers, settings.bytes_per_number))
    return found


def _measured(settings: Cost, options: argparse.Namespace, made_by: str) -> Data:
    """Measure, and print tables. Return the measurements."""
    from probe.watching.timing import measured

    found = measured(
        [settings],
        made_by=made_by,
        rounds=options.rounds,
        threads=options.threads,
        device=options.device,
        most_seconds=options.most_seconds,
        progress=_progress(options),
    )
    say(*measured_lines(found))
    return found


def _progress(options: argparse.Namespace) -> Callable[[str], None]:
    return (lambda _: None) if options.quiet else tell


def _reproducible(options: argparse.Namespace, arguments: list[str]) -> list[str]:
    """Return the arguments without where the result was written, and without a home's name."""
    given = str(options.output)
    left_out = (given, "--output", f"--output={given}")
    kept = arguments if options.output is None else [x for x in arguments if x not in left_out]
    return list(map(without_home, kept))


def write(path: Path, found: Data) -> None:
    """Write counts or measurements as JSON, one row a line. Raise StoreError."""
    from probe.writing.files import replace

    try:
        replace(path, [as_json(found).encode()], sync=False)
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror or error}.", "Name another place."
        ) from error


def as_json(found: Data) -> str:
    """Return what was found as JSON that people can compare line by line."""
    import json

    lines = []
    for name, value in found.model_dump(mode="json", exclude_defaults=True).items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value)
            lines.append(f'"{name}": [\n  {inner}\n ]')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    inner = ",\n ".join(lines)
    return f"{{\n {inner}\n}}\n"


# --- what is printed ------------------------------------------------------------------------------


def counted_lines(counts: Counts, settings: Cost) -> list[str]:
    """Return counts as tables: text, then the denoiser, the VAE and a run at each size."""
    model = settings.model
    lines = [f"{model}: one call with one row; a multiply-add is 2 FLOPs; {settings.dtype}"]
    for row in counts.rows:
        if row.f is None:
            text = f"{row.parameters:,} parameters, {row.total / G:,.1f} GFLOP"
            lines.append(f"{row.component}: {text}, {counts.tokens[model]} tokens")
    for size in settings.sizes:
        lines += ["", f"Pictures of {size[0]} x {size[1]} pixels", ""]
        lines += denoiser_lines(counts, size)
        lines += ["", *factor_lines(counts, model, size)]
        lines += ["", *vae_lines(counts, model, size), "", *run_lines(counts, settings, size)]
    return [*lines, *([""] if len(settings.sizes) > 1 else []), *share_lines(counts, settings)]


def share_lines(counts: Counts, settings: Cost) -> list[str]:
    """Return which kind of layer has how much of a call, against the size; one size has no table.

    Attention is full.
    """
    table = []
    for f in settings.f:
        for size in settings.sizes if len(settings.sizes) > 1 else ():
            row = counts.of(settings.model, "denoiser", f, size)
            shares = (f"{row.shares[kind]:.1%}" for kind in KINDS)
            table.append((str(f), f"{size[0]}x{size[1]}", *shares, f"{row.total / G:,.1f}"))
    header = ("f", "size", "convolution", "linear", "self", "cross", "GFLOP")
    title = "The denoiser's shares against the size of the picture, full attention"
    return [title, *rows(table, header)] if table else []


def _at(counts: Counts, size: tuple[int, int], component: str) -> list[Count]:
    return [row for row in counts.rows if row.size == size and row.component == component]


def denoiser_lines(counts: Counts, size: tuple[int, int]) -> list[str]:
    """Return what one call of the denoiser costs at each f, and in which kinds of layers."""
    table = []
    for row in _at(counts, size, "denoiser"):
        assert row.shape is not None and row.f is not None
        table.append(
            (
                str(row.f),
                row.attention,
                "x".join(map(str, row.shape)),
                "none" if row.widest is None else "x".join(map(str, row.widest)),
                f"{row.parameters / 1e6:,.1f} M",
                f"{row.total / G:,.1f}",
                *(f"{row.shares[kind]:.1%}" for kind in KINDS),
                f"{row.activation_bytes / 1e6:,.0f} MB",
                f"{row.largest_attention_bytes / 1e6:,.1f} MB",
                f"{row.attention_bytes / 1e6:,.1f} MB",
            )
        )
    header = ("f", "attention", "input", "widest", "parameters", "GFLOP", "convolution", "linear")
    more = ("self", "cross", "activations", "largest matrix", "all matrices")
    note = (
        "  coarse: no attention on grids wider than "
        f"{counts.attention_up_to} x {counts.attention_up_to}. A fused kernel never holds a matrix "
        "of attention whole."
    )
    return ["The denoiser, one call", *rows(table, (*header, *more)), note]


def factor_lines(counts: Counts, model: str, size: tuple[int, int]) -> list[str]:
    """Return what pixels cost beside latents: in no table does one factor stand alone."""
    factors = [row.f for row in _at(counts, size, "denoiser") if row.attention == "full"]
    table = []
    for f in [f for f in factors if f != 1 and f is not None] if 1 in factors else []:
        of = counts.factors(model, f, size)
        published = f"{of.paper[0]:.1f} to {of.paper[1]:.1f} at f = 4"
        values = (of.full, of.coarse, of.convolution)
        table.append((str(f), *(f"{value:,.1f}" for value in values), published))
    if not table:
        return ["Count f = 1 and another f to see what pixels would cost."]
    wide = f"attention up to {counts.attention_up_to}x{counts.attention_up_to}"
    header = ("f", "same network", wide, "convolution alone", "measured in the paper")
    return [
        "How many times as much a call on pixels is (counted; the paper timed)",
        *rows(table, header),
        f"  {WHY_THEY_DIFFER}",
        f"  Paper: {paper().source}.",
    ]


def vae_lines(counts: Counts, model: str, size: tuple[int, int]) -> list[str]:
    """Return what encoding and decoding one picture cost at each f."""
    table = []
    decoders = {row.f: row for row in _at(counts, size, "vae_decode")}
    for encoder in _at(counts, size, "vae_encode"):
        decoder = decoders[encoder.f]
        own = "" if encoder.f == counts.own_f[model] else "derived"
        millions = (encoder.parameters + decoder.parameters) / 1e6
        memory = f"{decoder.activation_bytes / 1e6:,.0f} MB"
        gflop = f"{encoder.total / G:,.1f}", f"{decoder.total / G:,.1f}"
        table.append((str(encoder.f), f"{millions:,.1f} M", *gflop, memory, own))
    if not table:
        return ["On pixels there is no VAE."]
    header = ("f", "parameters", "GFLOP to encode", "GFLOP to decode", "decoder's activations", "")
    note = "  derived: the model's own VAE with levels left out, or its last level repeated."
    return ["The VAE, one picture", *rows(table, header), note]


def run_lines(counts: Counts, settings: Cost, size: tuple[int, int]) -> list[str]:
    """Return the FLOPs of a whole run at each f, by part."""
    table = []
    for row in _at(counts, size, "denoiser"):
        assert row.f is not None
        run = counts.whole_run(
            settings.model,
            row.f,
            size,
            steps=settings.steps,
            guided=settings.guidance,
            batch=settings.batch,
            attention=row.attention,
        )
        parts = [f"{part / 1e12:,.2f} ({part / run.total:.1%})" for part in run]
        table.append((str(row.f), row.attention, *parts, f"{run.total / 1e12:,.1f}"))
    guided = "with guidance" if settings.guidance else "without guidance"
    title = f"A whole run in TFLOP: {settings.steps} steps, {guided}, batch {settings.batch}"
    return [title, *rows(table, ("f", "attention", "text", "steps", "decode", "in all"))]


def layer_lines(count: Count, layers: Iterable[Any], number: int) -> list[str]:
    """Return every layer of one count as a table."""
    table = [
        (
            layer.path or "(itself)",
            layer.kind,
            f"{layer.parameters:,}",
            f"{layer.flops / G:,.3f}",
            f"{layer.numbers * number / 1e6:,.2f}",
            f"{layer.matrix * number / 1e6:,.2f}",
            "x".join(map(str, layer.output)),
        )
        for layer in layers
    ]
    where = "" if count.f is None else f", f = {count.f}, {count.attention} attention"
    header = ("layer", "kind", "parameters", "GFLOP", "output MB", "matrix MB", "output")
    return [f"{count.component}{where}", *rows(table, header)]


def measured_lines(found: Measured) -> list[str]:
    """Return measurements as a table, and what the laws extrapolate for what was left out."""
    machine = found.machine
    threads = "one thread" if machine.threads == 1 else f"{machine.threads} threads"
    what = f"{machine.clock}, {threads}, {machine.dtype}, torch {machine.torch}, random weights"
    if machine.load:
        what += f", load {machine.load:.1f}"
    table = [
        (
            cell.model,
            str(cell.f),
            f"{cell.size[0]}x{cell.size[1]}",
            cell.attention,
            "x".join(map(str, cell.shape)),
            f"{cell.seconds:.3f} s",
            f"{cell.low:.3f} to {cell.high:.3f}",
            f"{cell.flops / cell.seconds / G:,.0f}",
            f"{cell.call_bytes / 1e6:,.0f} MB",
            "measured here",
        )
        for cell in found.cells
    ]
    for left in found.left_out:
        law, memory = (
            found.law(left.model, quantity, left.attention)
            for quantity in ("seconds", "call_bytes")
        )
        seconds = "" if law is None else f"{law.at(left.places):,.1f} s"
        size = "" if memory is None else f"{memory.at(left.places) / 1e6:,.0f} MB"
        label = "not measured" if law is None else "extrapolated"
        of = (left.model, str(left.f), f"{left.size[0]}x{left.size[1]}", left.attention, "")
        table.append((*of, seconds, "", "", size, f"{label}: {left.why}"))
    header = ("model", "f", "size", "attention", "input", "median", "quartiles")
    lines = [f"{machine.device}: {what}", ""]
    lines += [*rows(table, (*header, "GFLOP/s", "memory", "")), ""]
    for law in found.laws:
        a, b, c = law.coefficients
        places = f"N = {law.least:,} to {law.most:,} places, off by at most {law.worst:.0%}"
        formula = f"{law.quantity} = {a:.3g} + {b:.3g} N + {c:.3g} N^2"
        lines.append(f"{law.model}: {formula}, fitted to {places}")
    return lines


if __name__ == "__main__":
    guarded(main)
