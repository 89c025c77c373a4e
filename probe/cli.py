"""probe: see inside Stable Diffusion.

    probe run EXPERIMENT.yaml     record a run (the same as python -m probe.run)
    probe noising NOISING.yaml    noise a real picture, and record what the model makes of it
    probe sweep GRID.yaml         run a grid of experiments, and only what is missing of it
    probe cost COST.yaml          count what a model costs on pixels and on latents, or measure it
    probe ls                      list recordings
    probe show [RUN]              show what a recording holds, and where its pictures are
    probe view [RUN ...]          look at recordings in a browser, on this machine alone
    probe web [FOLDER]            serve the page in which the bundled model draws by itself
    probe export RUN --html FILE  write a recording as a page that plays by itself, or an animation
    probe embed RUN [RUN ...]     map where the latents go, step by step: PCA, UMAP
    probe ask RUN WORD            show where the picture would have looked at any word
    probe verify [RUN]            check a recording against itself
    probe rerun [RUN]             record the same again, and say what differs
    probe diff A B                say what differs between two recordings
    probe diff --pair RUN         say where an edited run parts from its parent, and by how much
    probe upgrade [RUN]           copy a recording of an older format into the newest
    probe rm RUN ...              remove recordings
    probe gc                      remove what killed writers left behind

RUN is a path, the beginning of a name, latest, or one of those that come with probe: sample,
sample-guidance-8 (the same at guidance 8) and sample-noising. `probe VERB --help` tells more,
`probe --version` prints the version. Exit codes: 0 done, 1 failed or something differs, 2 a
request that cannot be met, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import contextlib
import importlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe import output, stopping
from probe.errors import (
    ExperimentError,
    ProbeError,
    RecordingDamaged,
    RecordingLinked,
    RecordingNotFound,
    RecordingUnreadable,
    StoreError,
)
from probe.output import rows, say
from probe.system import FULL
from probe.terminal import (
    RECORDING,
    Parser,
    add_folder,
    add_run,
    add_runs,
    add_save,
    before_torch,
    fail,
    folder,
    guarded,
    without_home,
)
from probe.text import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

    from probe.reading.recording import Run


def _door(module: str, *called: str) -> Callable[[list[str]], int]:
    """Return a command that is a module of its own, imported when it is called.

    Its help calls it by the name `called`.
    """
    return lambda arguments: int(importlib.import_module(module).main(arguments, *called))


def ask(arguments: list[str]) -> int:
    """Show where the picture would have looked at any word.

    It is read out of a recording made with capture.attention: queries. The word did not influence
    the picture. The text encoder and the layers' key projections run, the UNet does not.
    """
    import numpy as np

    from probe.figures.word_sheet import ask_name, ask_sheet
    from probe.reading.recording import open_run

    parser = Parser(prog="probe ask", description=ask.__doc__)
    parser.add_argument("run", help=RECORDING)
    parser.add_argument("word", help="a word or a phrase")
    parser.add_argument(
        "--context", help='the sentence that is read, which has to contain the word ["a WORD"]'
    )
    add_runs(parser)
    add_save(parser)
    options = parser.parse_args(arguments)
    run = open_run(options.run, options.runs)
    before_torch(True)
    from probe.running.ask import read_out

    maps = read_out(run, options.word, options.context)
    picture = _keep(lambda: ask_sheet(run, maps), run, ask_name(maps), options.save, maps.attrs)
    say(f"{options.word!r}, read in {maps.attrs['context']!r} ({maps.attrs['read_out']})", "")
    table = []
    for steps in np.array_split(np.arange(maps.sizes["step"]), 3):
        if len(steps):
            third = maps.isel(step=steps)
            mean, sigma = third.mean("step"), third["sigma"].values
            y, x = np.unravel_index(int(mean.values.argmax()), mean.shape)
            levels = f"{sigma.max():.2f} to {sigma.min():.2f}"
            shares = f"{float(third.mean()):.2%}", f"{float(mean.max()):.2%}"
            table.append((levels, *shares, f"({y}, {x})"))
    say(*rows(table, ("sigma", "mean share", "greatest", "at (y, x)")), "", str(picture))
    return 0


def rerun(arguments: list[str]) -> int:
    """Record a run again from its own record, and compare the two.

    Exit code 0: the same bits; 1: something differs.
    """
    from probe.diff import say_difference
    from probe.reading.compare import compare
    from probe.reading.recording import open_run

    parser = Parser(prog="probe rerun", description=rerun.__doc__)
    add_run(parser)
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=folder,
        help="write the new recording there [beside the old one]",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    before = open_run(options.run, options.runs)
    before_torch(options.quiet)
    from probe.running.recorder import rerun as record_again

    after = record_again(before, output=options.output, progress=not options.quiet)
    say(f"Recorded {without_home(str(after.path))}")
    return say_difference(compare(before, after), before.name, after.name)


def gc(arguments: list[str]) -> int:
    """Remove what killed writers left behind: half-made folders, lock files, parts of files.

    Recordings stay, and so do embeddings.
    """
    parser = Parser(prog="probe gc", description=gc.__doc__)
    add_folder(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    options = parser.parse_args(arguments)
    options.runs = options.folder or options.runs
    from probe.format.embedding import FOLDER
    from probe.format.study import CELLS
    from probe.writing.upkeep import clear_orphans

    with stopping.cleanly():
        orphans = [
            orphan
            for place in ("", FOLDER, CELLS)
            for orphan in clear_orphans(Path(options.runs) / place, options.dry_run)
        ]
    say(*map(str, orphans))
    done = "Would remove" if options.dry_run else "Removed"
    if orphans:
        say(f"{done} {len(orphans)} left by writers that died.")
    else:
        say(f"Nothing to remove in {options.runs}.")
    return 0


def _keep(
    draw: Callable[[], Image],
    run: Run,
    name: str,
    save: Path | None,
    notes: dict[str, Any] | None = None,
) -> Path:
    """Draw a picture, and write it into the recording, or to the path that `save` names."""
    from probe.figures.sheets import keep
    from probe.writing.files import elsewhere

    target = run.path / name if save is None else save
    if save is not None and save.is_dir():
        target = target / name
    if target.suffix.lower() != ".png":
        raise ExperimentError(
            f"--save: {target} is no PNG file.",
            f"Name one: --save {shlex.quote(str(target.with_suffix('.png')))}",
        )
    picture = draw()
    try:
        with stopping.cleanly():
            return keep(picture, run, name, target, notes)
    except OSError as error:
        reason = error.strerror or str(error)
        example = f"--save {elsewhere(name)}"
        if error.errno in FULL:
            another = "Free some room there, or name another disk"
            remedy = f"{another}: {example}" if save is None else f"{another}."
        elif save is None:
            remedy = f"Name another place: {example}"
        else:
            remedy = f"Name a folder that exists and can be written: {example}"
        raise StoreError(f"{target} could not be written: {reason}.", remedy) from error


def ls(arguments: list[str]) -> int:
    """List recordings, the newest first."""
    from probe.reading import sample
    from probe.reading.listing import listing

    parser = Parser(prog="probe ls", description=ls.__doc__)
    add_folder(parser)
    options = parser.parse_args(arguments)
    recordings = listing(where := options.folder or options.runs)
    packaged = f"With probe come: {', '.join(sample.NAMES)}."
    if not recordings:
        say(f"No recording in {where} yet. Make one: python -m probe.run", packaged)
        return 0
    table, troubles = [], []
    parents = {
        str(row.attributes.get("identity")): row.path.name.removesuffix(".zarr")
        for row in reversed(recordings)
        if row.attributes is not None
    }
    for row in recordings:
        if row.attributes is None:
            cells = _of_an_embedding(row.path) or (_trouble(row.error), "", "", "", "")
            if cells[0] != "embedding" and row.error is not None and cells[0] != "damaged":
                troubles.append(f"{row.error.cause} {row.error.remedy}")
        else:
            cells = _in_short(row.attributes, parents)
        table.append((row.path.name.removesuffix(".zarr"), *cells))
    say(*rows(table, ("recording", "status", "model", "sampling", "prompt", "created (UTC)")))
    if troubles:
        say("", *map(without_home, troubles))
    say("", packaged)
    return 0


def _trouble(error: ProbeError | None) -> str:
    """Return what is wrong with a recording, in one word."""
    if isinstance(error, RecordingUnreadable):
        return "unreadable"
    return "links" if isinstance(error, RecordingLinked) else "damaged"


def _of_an_embedding(path: Path) -> tuple[str, str, str, str, str] | None:
    """Return what the list shows of an embedding, or None for anything else."""
    from probe.format.schema import counted
    from probe.reading.embedding import described

    if (maps := described(path)) is None:
        return None
    methods = ", ".join(shorten(method, 20) for method in maps.methods[:3])
    about = f"{methods}: {maps.of} of {counted(len(maps.runs), 'run')}"
    return "embedding", "", about, "", maps.created[:16].replace("T", " ")


def _in_short(
    attributes: Mapping[str, Any], parents: Mapping[str, str]
) -> tuple[str, str, str, str, str]:
    """Return a recording's status, model, sampling, prompt and time, as the list shows them.

    `parents` are names of recordings by identity: an edited one says whose child it is.
    """
    from probe.format.attributes import kind_of
    from probe.format.schema import counted
    from probe.reading.edited import additions, edits_in_short

    if kind_of(attributes) == "noising":
        recipe = attributes["noising"]
        prompt = recipe["caption"]
        sampling = f"noised at {counted(len(recipe['timesteps']), 'timestep')}"
    else:
        recipe = attributes["experiment"]
        prompt = recipe["prompt"]
        sampling = f"{counted(recipe['steps'], 'step')}, guidance {recipe['guidance_scale']:g}"
    model, prompt = (shorten(" ".join(text.split()), 40) for text in (recipe["model"], prompt))
    parent = parents.get(str(attributes.get("parent_identity")), "")
    edits = edits_in_short(attributes, parent)
    said = [sampling, f"seed {recipe['seed']}", additions(recipe), edits]
    sampling = ", ".join(part for part in said if part)
    created = attributes.get("created", "")[:16].replace("T", " ")
    return attributes["status"], model, sampling, prompt, created


def show(arguments: list[str]) -> int:
    """Show what a recording holds: variables, what each part of the model cost, and pictures."""
    from probe.reading.recording import open_run

    parser = Parser(prog="probe show", description=show.__doc__)
    add_run(parser)
    parser.add_argument(
        "--words",
        action="store_true",
        help="draw where the picture looked at each word and what was written there, by noise "
        "level, into words.png",
    )
    add_save(parser)
    options = parser.parse_args(arguments)
    if options.save and not options.words:
        raise ExperimentError(
            "--save says where the sheet of words goes, and no sheet is asked for.", "Add --words."
        )
    run = open_run(options.run, options.runs)
    if options.words:
        from probe.figures.word_sheet import word_sheet

        say(str(_keep(lambda: word_sheet(run), run, "words.png", options.save)))
        if not run.words:
            say("The prompt has no words: there is no map to draw.")
        return 0
    say(*f"{run!r}".split("\n"), *_parent_line(run), "")
    table = []
    for group in run.tree.subtree:
        for name, variable in group.to_dataset(inherit=False).data_vars.items():
            path = f"{group.path.rstrip('/')}/{name}"
            shape = " x ".join(f"{dim} {size}" for dim, size in variable.sizes.items())
            what = str(variable.attrs.get("long_name", ""))
            table.append((path, str(variable.dtype), shape, what))
    say(*rows(table, ("variable", "type", "shape", "what it is")), "")
    cost = run.tree["cost"].dataset if "cost" in run.tree.children else {}
    timed = all(name in cost for name in ("component", "seconds", "flops", "peak_memory"))
    if run.status == "complete" and timed and cost["seconds"].notnull().all():
        say(*_cost_table(cost), "")
    say(*map(str, sorted(run.path.glob("*.png"))))
    return 0


def _parent_line(run: Run) -> list[str]:
    """Return the line that names the parent of an edited run; none of another run."""
    from probe.reading.edited import edits_in
    from probe.reading.pair import find_parent

    if not edits_in(run.attributes.recipe):
        return []
    try:
        return [f"  {'parent':16}{find_parent(run).name}"]
    except ProbeError:
        return [f"  {'parent':16}not in this folder"]


def _cost_table(cost: Any) -> list[str]:
    """Return the costs of a recording as lines.

    Recordings of format 1 do not say how large a component is.
    """
    table = []
    for part in cost["component"].values:
        of_part = cost.sel(component=part)
        row = [
            str(part),
            f"{float(of_part['seconds']):.2f} s",
            f"{int(of_part['flops']) / 1e9:.2f} GFLOP a call",
        ]
        if "parameters" in cost and "weight_bytes" in cost:
            sizes = int(of_part["parameters"]) / 1e6, int(of_part["weight_bytes"]) / 1e6
            row += [f"{sizes[0]:.1f} M parameters", f"{sizes[1]:.1f} MB of weights"]
        table.append(tuple(row))
    if memory := int(cost["peak_memory"]):  # 0: the system did not say
        table.append(("peak memory", f"{memory / 1e6:.0f} MB", *[""] * (len(table[0]) - 2)))
    return rows(table, ("component", "in all", *[""] * (len(table[0]) - 2)))


def rm(arguments: list[str]) -> int:
    """Remove recordings.

    It asks first, unless --yes is given. A recording that is being written is never removed.
    """
    from probe.reading.finding import find_run
    from probe.reading.listing import recordings_in
    from probe.reading.recording import Run
    from probe.reading.sample import is_copy
    from probe.writing.files import check_no_link
    from probe.writing.upkeep import check_removable, held, remove

    parser = Parser(prog="probe rm", description=rm.__doc__)
    parser.add_argument("run", nargs="+", help="paths, or the beginnings of names")
    add_runs(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    named = [find_run(name, options.runs) for name in options.run]
    paths: list[Path] = list({path.absolute(): path for path in named}.values())
    for path in paths:
        if is_copy(path):
            raise ExperimentError(
                f"{path.name} is read from a copy, and no recording of yours.",
                "Remove a zip file yourself: nothing else holds it.",
            )
        check_no_link(path)
        try:
            Run(path)
        except (RecordingDamaged, RecordingNotFound):
            # A damaged recording may go, somebody else's data may not.
            here = {listed.absolute() for listed in recordings_in(options.runs)}
            if path.absolute() not in here:
                raise
    with stopping.cleanly(), contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(held(path))
            check_removable(path)
        say(*map(str, paths))
        if not options.yes:
            with stopping.breakable():
                answer = output.ask(f"Remove {'these' if len(paths) > 1 else 'this'}? [y/N] ")
            if answer is None:
                fail(
                    "Nothing was removed: there is nobody to ask.",
                    "Give --yes to remove without asking.",
                )
                return 2
            if answer.strip().lower() not in ("y", "yes"):
                say("Nothing was removed.")
                return 0
        for path in paths:
            with stopping.breakable():
                pass  # between two recordings is a good moment to stop
            remove(path)
    say(f"Removed {len(paths)}.")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    **{
        verb: _door(f"probe.{verb}", f"probe {verb}")
        for verb in ("run", "noising", "sweep", "cost", "view", "web", "export", "embed", "verify")
    },
    "ls": ls,
    "show": show,
    "ask": ask,
    "rerun": rerun,
    "diff": _door("probe.diff", "probe diff"),
    "upgrade": _door("probe.upgrade"),
    "rm": rm,
    "gc": gc,
}


def dispatch(arguments: list[str]) -> int:
    """Run the command that the first argument names. Return its exit code."""
    if arguments and arguments[0] in ("--version", "-V", "version"):
        say(_version())
        return 0
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(*(__doc__ or "").rstrip("\n").split("\n"))
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        from probe.format.schema import near

        fail(f"There is no verb {verb!r}.", near(verb, list(VERBS)))
        return 2
    return VERBS[verb](rest)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    from probe.format.schema import FORMAT_STATUS, FORMAT_VERSION, FORMATS_READ

    try:
        own = version("diffusion-probe")
    except PackageNotFoundError:  # a checkout that was not installed
        own = "(not installed)"
    read = " and ".join(map(str, FORMATS_READ))
    status = "" if FORMAT_STATUS == "final" else f" ({FORMAT_STATUS})"
    return (
        f"probe {own}, which writes recordings of format {FORMAT_VERSION}{status} and reads {read}"
    )


def main() -> None:
    stopping.begin()
    guarded(dispatch)


if __name__ == "__main__":
    main()
