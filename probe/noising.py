"""python -m probe.noising FILE.yaml: the forward process. Noise a real picture, and see what the model makes of it.

A picture is encoded, mixed with known noise at chosen timesteps, and the UNet says what of it is noise. Recorded for each
timestep: the noised latents, the prediction, its difference from the true noise, the denoised latents, the loss over
several draws of noise, and the cross-attention. What is asked is a YAML file (see experiments/noising.yaml), and every
field can be overridden on the command line:

    python -m probe.noising experiments/noising.yaml
    python -m probe.noising experiments/noising.yaml --timesteps 100,500,900 --noises 16
    python -m probe.noising experiments/noising.yaml --picture my.jpg --caption "A cat on the moon" --masks "" --dry-run

From Python, with arrays: `record_noising(picture, "a cat", {"cat": mask})`. The recording is read like any other; its
axis `image` counts the draws of noise, and its steps are the timesteps, the noisiest first.
"""

from __future__ import annotations

if __name__ == "__main__":
    from probe import stopping

    stopping.begin()  # before the slow imports

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BeforeValidator, Field

from probe.arguments import check_options
from probe.errors import ExperimentError
from probe.experiment import CaptureOptions, Experiment, load_settings
from probe.experiment import table as fields_table
from probe.fields import Line, Place, Places, Prompt, Revision, Strict, place
from probe.output import rows, say, say_json
from probe.reading.recording import Run
from probe.run import say_where, size, tell_forecast
from probe.source import checked_masks, checked_picture, read_masks, read_picture
from probe.strict_yaml import LARGEST, shown
from probe.terminal import Parser, add_fields, before_torch, described, guarded, overrides
from probe.words import occurrences, read_plainly, word_spans

if TYPE_CHECKING:
    from probe.diffusion.family import Family
    from probe.watching.interface import Plan


def _timesteps(value: object) -> object:
    """A list, a text of numbers ("100,500") or of a range ("100:1000:100"), as a tuple, the noisiest first."""
    found: Any = value
    remedy = "Write whole numbers from 0 up, such as 100,500,900, or a range that rises, such as 100:1000:100."
    if isinstance(value, np.ndarray):
        found = value.tolist()
    elif isinstance(value, int) and not isinstance(value, bool):
        found = [value]
    if isinstance(value, str):
        spaceless = "".join(value.split())
        if bracketed := re.fullmatch(r"\[([0-9,]*)\]", spaceless):  # as YAML writes a list
            spaceless = bracketed[1]
        parts = spaceless.split(":" if ":" in value else ",")
        if not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts) or (":" in value and not 2 <= len(parts) <= 3):
            raise ExperimentError(f"{shown(value)} is no choice of timesteps", remedy)
        numbers = [int(part) for part in parts]
        found = list(range(*numbers) if numbers[2:] != [0] else ()) if ":" in value else numbers
    if not isinstance(found, list | tuple | range) or not found or not all(type(t) is int and 0 <= t < 10**5 for t in found):
        raise ExperimentError(f"{shown(value)} is no choice of timesteps", remedy)
    return tuple(sorted(set(found), reverse=True))


Timesteps: TypeAlias = Annotated[tuple[int, ...], BeforeValidator(_timesteps)]


class Noising(Strict):
    """What is asked of the forward process: the picture, its caption, and where and how often it is noised."""

    name: str = Field(default="", pattern=r"^[a-z0-9-]{0,60}$", description="Name of the recording: a-z, 0-9 and -; empty: made from the caption.")
    model: Place = Field(
        default="emojiworld", description="The model: emojiworld (bundled), a Hugging Face id, a diffusers directory, or one .safetensors file."
    )
    revision: Revision = Field(default=None, description="Commit, tag or branch of a Hugging Face model; none: its main branch.")
    variant: Line | None = Field(default=None, description="Which of a model's weight files, such as fp16; none: the plain ones.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Number format: float32, float16 or bfloat16; auto: float16 on CUDA, float32 elsewhere."
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="Where the model runs: auto, cpu, cuda, cuda:N or mps."
    )
    picture: Place | None = Field(
        default=None, description="The picture, a PNG or JPEG file: scaled to cover the size, cut to its centre; a path from the folder you are in."
    )
    caption: Prompt = Field(default="", description="What is in the picture, which the UNet reads; empty: it is told nothing.")
    over_long: Literal["error", "cut"] = Field(
        default="error", description="A caption with more tokens than the model reads: error, or cut what does not fit."
    )
    masks: Places = Field(
        default=(),
        max_length=100,
        description="Where things are, kept beside the picture: .npz files (arrays by word) or .png files (named by word).",
    )
    height: int | None = Field(default=None, ge=8, le=4096, description="Height in pixels to which the picture is brought; none: the model's own.")
    width: int | None = Field(default=None, ge=8, le=4096, description="Width in pixels to which the picture is brought; none: the model's own.")
    timesteps: Timesteps = Field(
        default=tuple(range(950, 0, -100)),
        max_length=1000,
        description='How much noise, by the model\'s t: a list in any order, or a range "50:1000:100"; 0 is the least.',
    )
    noises: int = Field(default=4, ge=1, le=64, description="How many draws of noise; the loss has a mean and a spread over them.")
    seed: int = Field(
        default=0, ge=0, le=LARGEST, description="Seed of the first draw; the next has the next seed. Every timestep gets the same noise."
    )
    decode: bool = Field(default=True, description="Decode what the model takes for the clean picture, at every timestep.")
    capture: CaptureOptions = Field(default_factory=CaptureOptions, description="What else is recorded.")
    on_nan: Literal["stop", "record"] = Field(
        default="stop", description="When a prediction or a pixel is not finite: stop, or record it (a pixel as 0)."
    )
    durability: Literal["step", "run", "none"] = Field(
        default="run",
        description="What stays after a power cut: step, every timestep once it is written; run, a complete recording; none, what the system likes.",
    )
    output: Place = Field(default="runs", description="Folder that recordings are written to.")

    def experiment(self, height: int, width: int) -> Experiment:
        """The same as an `Experiment`, for all who read recordings: its steps are the timesteps, its images the draws of noise."""
        same = "name model revision variant dtype device over_long seed on_nan durability output capture".split()
        return Experiment(
            **{name: getattr(self, name) for name in same},
            prompt=self.caption,
            height=height,
            width=width,
            images=self.noises,
            scheduler="DDPM",
            steps=len(self.timesteps),
            guidance_scale=1.0,
            decode_every=1 if self.decode else 0,
        )


def load_noising(source: str | Path | Mapping[str, Any] | Noising, **changes: Any) -> Noising:
    """The settings in a YAML file or mapping, with changes on top, as `load_experiment` does it. Raises ExperimentError."""
    return load_settings(Noising, source, "noising", **changes)


def record_noising(
    picture: str | Path | np.ndarray,
    caption: str = "",
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    pipeline: Any | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
    sheet: bool = True,
    **settings: Any,
) -> Run:
    """Noise a picture, record what the model says of it, and return the recording.

    `picture` is a file, or (y, x, rgb) uint8 of a size that the model can work on; `masks` are (y, x) by word, of the picture's
    size. `settings` are fields of `Noising`; `pipeline` is a diffusers pipeline, or a `Family`, to use instead of loading
    a model. Raises ProbeError: a UserError before anything is written, a RunFailed after.
    """
    asked = load_noising({"caption": caption, **settings})
    if not isinstance(picture, str | Path | np.ndarray):
        raise ExperimentError(f"picture: a {type(picture).__name__} is neither a file nor an array.", "Give a path, or numpy.asarray(picture).")
    max_bytes = check_options(max_bytes, progress=progress, sheet=sheet)
    if not isinstance(picture, np.ndarray):
        return perform_noising(load_noising(asked, picture=str(picture)), None, masks, pipeline, max_bytes, progress, sheet)
    return perform_noising(asked, picture, masks, pipeline, max_bytes, progress, sheet)


def perform_noising(
    asked: Noising,
    picture: np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    pipeline: Any | None = None,
    max_bytes: int | None = None,
    progress: bool = True,
    sheet: bool = True,
    parent: str | None = None,
) -> Run:
    """As `record_noising`, with everything asked in one `Noising`; an array takes the place of its `picture`."""
    from probe.diffusion.support import remarks_on_version
    from probe.files import storing
    from probe.noising_sheet import save_sheet
    from probe.running.perform import perform
    from probe.running.planning import check_size, free_room, size_text
    from probe.running.recorder import describe, out_of_memory, refuse_contradiction, refuse_unread, sayer
    from probe.stopping import breakable, cleanly
    from probe.store import RunWriter

    room, say = free_room(place(asked.output)), sayer(progress)
    with out_of_memory(asked.experiment(8, 8)):
        if pipeline is None:
            say(f"Loading {asked.model} ...")
        model = _model(asked, pipeline)
        if pipeline is not None and parent is None:  # what is recorded again was held against it before
            refuse_contradiction(asked.dtype, asked.device, model)
            refuse_unread(asked.variant, asked.revision, model)
        asked = load_noising(asked, model=model.name)
        run, pixels = plan_noising(model, asked, picture, masks)
        check_size(run, max_bytes, room)
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = asked.model_dump(mode="json")
        key = hashlib.sha256(json.dumps([told, created]).encode() + pixels.tobytes()).hexdigest()[:8]
        path = place(asked.output) / f"{run.experiment.run_name}-{key}.zarr"
        attributes = {**describe(model, run), "created": created, "parent_run": parent, "noising": told}
        if plainly := read_plainly([asked.caption]):
            say(plainly)
        say(f"Recording {run.calls} timestep{'s' if run.calls > 1 else ''} to {path} (about {size_text(sum(run.forecast().values()))})")
        for remark in (*remarks_on_version(), *run.remarks, *_masks_of_no_word(run, asked.caption)):
            say(remark)
        with cleanly(), RunWriter(path, run.arrays, attributes, asked.durability) as writer:
            try:
                with breakable():
                    perform(model, run, writer, say, progress)
                    if sheet:
                        with storing(path):
                            save_sheet(Run(path))
                    writer.complete()
            except BaseException:
                say(f"It ended early. What was recorded is in {path}")
                raise
    return Run(path)


def rerun_noising(run: Run, pipeline: Any | None = None, *, output: str | Path | None = None, progress: bool = True) -> Run:
    """Noise a picture again, from its recording alone, beside it or into the folder `output`. Raises as `record_noising`."""
    from probe.reading.sample import place_beside
    from probe.running.planning import free_room, recorded_masks
    from probe.running.recorder import compare_weights, model_for, opened, sayer

    asked = load_noising(opened(run).attributes["noising"], output=str(output or place_beside(run.path)))
    free_room(place(asked.output))  # before the model is loaded
    model = model_for(run.experiment, pipeline, sayer(progress), run)
    if compare_weights(model, run, sayer(progress)) != run.attributes.model.weights and pipeline is not None:
        asked = load_noising(asked, model=model.name, revision=model.revision, variant=None)
    picture = None if run.source is None else run.source.values
    return perform_noising(asked, picture, recorded_masks(run), model, progress=progress, parent=run.name)


def plan_noising(
    model: Family, asked: Noising, picture: np.ndarray | None = None, masks: Mapping[str, np.ndarray] | None = None
) -> tuple[Plan, np.ndarray]:
    """What a noising will record, and the picture, (y, x, rgb) uint8. Raises ExperimentError or PromptError if it cannot be."""
    from probe.diffusion.schedule import Schedule
    from probe.running.planning import plan

    most = int(model.scheduler.config.num_train_timesteps) - 1
    if asked.timesteps[0] > most:
        raise ExperimentError(f"timesteps: {asked.timesteps[0]} is beyond the timesteps of {model.name}.", f"It knows 0 to {most}.")
    if asked.capture.branches == "uncond":
        raise ExperimentError("capture.branches: a noising has no unconditional branch.", "Leave the caption empty instead.")
    if picture is not None:
        picture = checked_picture(picture, model.f * 2 ** (len(model.unet.config.down_block_types) - 1))
        height, width = picture.shape[:2]
    else:
        if asked.picture is None:
            raise ExperimentError("picture: there is none.", "Name a PNG or JPEG file: --picture FILE.")
        _, _, *latents = model.latent_shape(1, asked.height, asked.width)
        height, width = (model.f * side for side in latents)
        picture = read_picture(asked.picture, height, width, "picture")
    held = read_masks(asked.masks, height, width) if masks is None else checked_masks(masks, height, width)
    schedule = Schedule.at(model.scheduler, asked.timesteps)
    return plan(model, asked.experiment(height, width), picture, schedule, masks=dict(held)), picture


def _masks_of_no_word(run: Plan, caption: str) -> list[str]:
    """What to say of masks whose words the caption does not have: one line, or none."""
    words = [caption[start:end] for start, end in word_spans(caption)]
    masked = next((a.value for a in run.arrays if a.path == "source/masked"), ())
    absent = [str(word) for word in masked if not occurrences(str(word), words)]
    return [f"Masks of what is not in the caption: {', '.join(absent)}. They are kept beside the picture."] if absent else []


def _model(asked: Noising, pipeline: Any | None, weights: bool = True) -> Family:
    from probe.diffusion.families import family_of
    from probe.diffusion.loading import load

    kind = "DDPM"  # the one that keeps variance one and has every schedule: the model's own betas
    if pipeline is not None:
        return family_of(pipeline, scheduler=kind)
    where: dict[str, Any] = {"revision": asked.revision, "variant": asked.variant, "dtype": asked.dtype, "device": asked.device}
    return load(asked.model, **where, weights=weights, scheduler=kind)


def table() -> str:
    """Every field as a Markdown table. `python -c "from probe import noising; print(noising.table())"` prints it."""
    return fields_table(Noising)


# --- the command -----------------------------------------------------------------------------------------------------


def parser(prog: str = "python -m probe.noising") -> argparse.ArgumentParser:
    made = Parser(prog=prog, description=described(__doc__, "python -m probe.noising", prog))
    made.add_argument("noising", nargs="?", type=Path, help="a YAML file; without one, --picture FILE and the defaults")
    made.add_argument("--dry-run", action="store_true", help="show what would be recorded, and how large it would be, without weights or work")
    made.add_argument("--max-bytes", type=size, metavar="SIZE", help="refuse to begin a recording larger than this (bytes, or 300MB, 2GB)")
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
        run, _ = plan_noising(_model(asked, None, weights=False), asked)
        say_json(asked.model_dump(mode="json"))
        return tell_forecast(run, options.max_bytes)
    run_made = perform_noising(asked, max_bytes=options.max_bytes, progress=not options.quiet)
    if not options.quiet:
        say("", *told_losses(run_made))
    return say_where(run_made, options.quiet)


def told_losses(run: Run) -> list[str]:
    """The losses as a table, and the VAE's round trip."""
    root, forward = run.tree.to_dataset(), run.tree["forward"].dataset
    columns = ("timestep", "sigma", "loss", "spread")[: 4 if run.experiment.images > 1 else 3]  # one draw of noise has no spread
    lines = [
        (f"{t:.0f}", f"{sigma:.3g}", f"{mean:.4f}", f"{spread:.4f}")[: len(columns)]
        for t, sigma, mean, spread in zip(
            root["timestep"].values, root["sigma"].values, forward["loss_mean"].values, forward["loss_spread"].values, strict=True
        )
    ]
    trip = float(run.variable("source/psnr"))
    return [*rows(lines, columns), "", f"The VAE's round trip: {trip:.1f} dB"]


if __name__ == "__main__":
    guarded(main)
