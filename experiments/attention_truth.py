"""Measure how good attention maps are: word maps against true masks, by noise, layer and head.

    # the bundled model on 200 fresh scenes, and on 64 generated pictures
    python -m experiments.attention_truth
    # docs/attention-truth.md and its figure
    python -m experiments.attention_truth --markdown --figure experiments/attention_truth.png
    # any Stable Diffusion 1.x or 2.x, your own pictures
    python -m experiments.attention_truth --model DIRECTORY --folder PICTURES

Scenes with known masks are encoded and noised to each timestep with known noise. The UNet is called
once for each. The map of each subject's word is scored against its mask: by average precision (AP),
which needs no threshold, and by IoU. Beside it stand maps that know nothing (uniform, a centred
Gaussian, the other subject's word, a UNet with random weights), one that knows everything (the true
mask at the grid of the maps), and other ways to ask the same model (contribution, counterfactual, a
word's map less that of the others).

There are three sets of pictures, with none in common. One ranks the heads. One chooses how many of
them to use, and each map's threshold. Only the third is scored. Intervals are 95%, from resampling
pictures. All results are of one checkpoint: they say how results vary with pictures, not with
training. The bundled model was trained to bind nouns to words (half of its last training hid start,
end and padding tokens): do not expect its figures of a model that was not. Half of the scenes have
one subject, half have two. Training used none of their seeds (see SEEDS).

Generated pictures (DDIM, 30 steps, guidance 3) have no masks. Their truth is what a small segmenter
sees. It is trained first (about 5 minutes; experiments/emojiworld/segmenter.py), and its own mIoU
is printed.

A folder for --folder holds, for each picture:
    NAME.png (or .jpg)    the picture; it and its masks are scaled and cut to the model's size
    NAME.txt              its caption, one line: "a cat on a mat"
    NAME.WORD.png         a mask, white where WORD is; one for each word or phrase to be scored

A third of the pictures (drawn with --seed) ranks heads, a third chooses thresholds, a third is
scored. Give at least 30 to learn something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from PIL import Image
from tqdm import tqdm

from experiments.attention_truth_report import as_text, draw_figure, section
from experiments.emojiworld import segmenter as segmenting
from experiments.emojiworld import world
from experiments.emojiworld.report import Asked, asked_for
from experiments.truth_maps import (
    Shown,
    best_levels,
    best_of,
    candidates,
    level_scores,
    look,
    of_scenes,
    places_of,
    precision,
    random_weights,
    recorded,
    scored,
)
from probe.diffusion.loading import load
from probe.diffusion.prompts import Prompt
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError
from probe.running.recorder import record
from probe.settings.pictures import read_masks, read_picture
from probe.terminal import Parser, guarded

TIMESTEPS = (100, 300, 500, 700, 900)
# Training draws scenes 0 to 39,999.
SEEDS = {"ranking": 50_000_000, "choosing": 51_000_000, "scored": 52_000_000}
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # how many of the best heads are tried
STEPS, GUIDANCE = 30, 3.0

# A picture, its maps (map, step, word, y, x), and their truth (word, y, x).
Mapped = tuple[Shown, xr.DataArray, xr.DataArray]

# --- pictures with truth --------------------------------------------------------------------------


def scenes(model: StableDiffusion, count: int, first: int) -> list[Shown]:
    """Return fresh scenes at the model's size, half with one subject and half with two.

    Seeds begin at `first`. Masks are those of the subjects.
    """
    _, _, *latents = model.latent_shape(1)
    size = (model.f * latents[1], model.f * latents[0])
    by_subjects: dict[int, list[Shown]] = {1: [], 2: []}
    wanted = {1: count - count // 2, 2: count // 2}
    seed = first
    while any(len(by_subjects[n]) < wanted[n] for n in by_subjects):
        scene = world.draw_scene(seed)
        n = len(scene.subjects)
        if len(by_subjects[n]) < wanted[n]:
            picture = Image.fromarray(scene.image).resize(size, Image.Resampling.LANCZOS)
            masks = {
                name: Image.fromarray(scene.masks[name]).resize(size, Image.Resampling.NEAREST)
                for name in scene.subjects
            }
            arrays = {name: np.asarray(mask) for name, mask in masks.items()}
            by_subjects[n].append(Shown(str(seed), np.asarray(picture), scene.caption, arrays))
        seed += 1
    return by_subjects[1] + by_subjects[2]


def read_folder(folder: Path, model: StableDiffusion) -> list[Shown]:
    """Read the pictures of a folder with captions and masks, each scaled to the model's size.

    Raise ExperimentError or PromptError.
    """
    _, _, *latents = model.latent_shape(1)
    height, width = (model.f * side for side in latents)
    if not folder.is_dir():
        raise ExperimentError(
            f"folder: {folder} is no folder.",
            "Name one with NAME.png, NAME.txt and NAME.WORD.png; --help describes it.",
        )
    files = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg")),
        key=lambda file: (file.stem, file.suffix),
    )
    pictures = [file for file in files if "." not in file.stem]
    _refuse_names(files, pictures)
    shown = []
    for file in pictures:
        caption = _caption(file)
        masks = _masks(file, files, model.read(caption), caption)
        inside = {
            word: read_masks([mask], height, width, "folder")[mask.stem].astype(bool)
            for word, mask in masks.items()
        }
        shown.append(Shown(file.stem, read_picture(file, height, width, "folder"), caption, inside))
    if len(shown) < 6:
        raise ExperimentError(
            f"folder: {folder} has {len(shown)} pictures.",
            "At least 6 are needed: a third each to rank heads, to choose, to score.",
        )
    return shown


def _refuse_names(files: Sequence[Path], pictures: Sequence[Path]) -> None:
    """Raise ExperimentError for masks without a picture, masks as JPEG, and names given twice."""
    names = {picture.stem for picture in pictures}
    if lonely := [file.name for file in files if file.stem.split(".")[0] not in names]:
        raise ExperimentError(
            f"folder: {lonely[0]} is a mask of no picture.",
            "A picture's name has no dot: NAME.png, and NAME.WORD.png for its masks.",
        )
    masks = [file for file in files if "." in file.stem]
    if blurred := [mask.name for mask in masks if mask.suffix.lower() != ".png"]:
        raise ExperimentError(
            f"folder: {blurred[0]} is a mask as JPEG, which blurs its edge.",
            "Save it as PNG: NAME.WORD.png.",
        )
    neighbours = itertools.pairwise(files)
    if twice := [second.name for first, second in neighbours if first.stem == second.stem]:
        raise ExperimentError(
            f"folder: {twice[0]} is there under another suffix too.", "Leave one of the two files."
        )


def _caption(picture: Path) -> str:
    """Read a picture's caption from the text beside it. Raise ExperimentError if there is none."""
    text = picture.with_suffix(".txt")
    if not text.is_file():
        raise ExperimentError(
            f"folder: {picture.name} has no caption.",
            f"Write what it shows into {text.name}, in one line.",
        )
    return " ".join(text.read_text(encoding="utf-8", errors="replace").split())


def _masks(picture: Path, files: Sequence[Path], prompt: Prompt, caption: str) -> dict[str, Path]:
    """Return a picture's masks by word. Raise ExperimentError for none, or one of no word."""
    prefix = f"{picture.stem}."
    masks = {file.stem.partition(".")[2]: file for file in files if file.stem.startswith(prefix)}
    if not masks:
        raise ExperimentError(
            f"folder: {picture.name} has no mask.",
            f"Add {picture.stem}.WORD.png for a word of its caption, white where it is.",
        )
    for word, mask in masks.items():
        if not places_of(prompt, word):
            raise ExperimentError(
                f"folder: {mask.name}: {word!r} is not in the caption {caption!r}.",
                "Name the mask by a word of the caption.",
            )
    return masks


def drawn(
    model: StableDiffusion,
    segmenter: segmenting.Segmenter,
    asked: Sequence[Asked],
    steps: int = STEPS,
) -> Iterator[Mapped]:
    """Yield pictures of prompts, each recorded as any run, with what the segmenter sees in them.

    Pictures in which a subject is missing are left out.
    """
    listed = tqdm(asked, desc="generated pictures", unit="picture", mininterval=5)
    for seed, request in enumerate(listed):
        with tempfile.TemporaryDirectory() as folder:
            capture = {
                "counterfactual": list(request.subjects),
                "text": False,
                "statistics": False,
                "dtype": "float32",
                "steps": "::3",
            }
            experiment = {
                "prompt": request.prompt,
                "seed": seed,
                "steps": steps,
                "guidance_scale": GUIDANCE,
                "scheduler": "DDIM",
                "capture": capture,
                "output": folder,
                "durability": "none",
            }
            run = record(experiment, model, progress=False)
            picture = run.images.values[0]
            masks = segmenter.masks(picture, request.subjects)
            if len(masks) == len(request.subjects):
                truth = xr.DataArray(
                    np.stack([*masks.values()]).astype(np.float32),
                    dims=("word", "y", "x"),
                    coords={"word": list(masks)},
                )
                seen = recorded(run, model.read(request.prompt), TIMESTEPS, request.subjects)
                shown = Shown(str(seed), picture, request.prompt, masks)
                yield shown, candidates(seen, truth), truth


# --- the study ------------------------------------------------------------------------------------


def looked(
    model: StableDiffusion,
    shown: Sequence[Shown],
    timesteps: Sequence[int],
    label: str,
    everything: bool = True,
    seed: int = 0,
) -> Iterator[Mapped]:
    """Yield each picture with its maps and their truth.

    Without `everything`, the counterfactual and random weights, which take time, are left out.
    """
    untrained = random_weights(model, seed) if everything else None
    for index, picture in enumerate(tqdm(shown, desc=label, unit="picture", mininterval=5)):
        seen = look(model, picture, timesteps, seed + index, counterfactual=everything)
        blind = None
        if untrained:
            blind = look(untrained, picture, timesteps, seed + index, counterfactual=False)
        truth = picture.truth()
        yield picture, candidates(seen, truth, blind), truth


def ranked(pictures: Iterable[Mapped]) -> list[str]:
    """Return the heads by their AP, the mean over pictures and steps, the best first."""
    scores = [
        precision(maps.sel(map=[n for n in maps["map"].values if n.startswith("head/")]), truth)
        for _, maps, truth in pictures
    ]
    mean = of_scenes(scores).mean(("scene", "step"))
    return [str(name) for name in mean["map"].values[np.argsort(-mean.values, kind="stable")]]


def chosen(
    pictures: Iterable[Mapped], heads: Sequence[str], counts: Sequence[int]
) -> tuple[list[str], xr.DataArray]:
    """Return the best heads, as many as make the best mean map by AP, and every map's best level.

    *Shape:* the levels (map, step).
    """
    counts = [n for n in counts if n <= len(heads)]
    precisions, levels = [], []
    for _, maps, truth in pictures:
        tried = xr.concat([best_of(maps, heads[:n], f"best/{n}") for n in counts], "map")
        precisions.append(precision(tried, truth).mean("step"))
        levels.append(level_scores(xr.concat([maps, tried], "map"), truth))
    count = counts[int(np.argmax(of_scenes(precisions).mean("scene").values))]
    level_of = best_levels(levels)
    names = [name for name in level_of["map"].values if not name.startswith("best/")]
    best = level_of.sel(map=[f"best/{count}"]).assign_coords(map=["best heads"])
    return list(heads[:count]), xr.concat([level_of.sel(map=names), best], "map")


def scores_of(pictures: Iterable[Mapped], heads: Sequence[str], levels: xr.DataArray) -> xr.Dataset:
    """Return AP and IoU of every map of every picture, (scene, map, step).

    `things` (scene) counts the words that have a truth.
    """
    parts, names, things, captions = [], [], [], []
    for shown, maps, truth in pictures:
        every = xr.concat([maps, best_of(maps, heads, "best heads")], "map")
        known = [name for name in every["map"].values if name in levels["map"].values]
        parts.append(scored(every.sel(map=known), truth, levels))
        names.append(shown.name)
        things.append(len(shown.masks))
        captions.append(shown.caption)
    if not parts:
        raise ExperimentError(
            "Nothing is left to score: in no picture was every subject found.",
            "Draw more: --pictures 64.",
        )
    return of_scenes(parts).assign_coords(
        scene=names, things=("scene", things), caption=("scene", captions)
    )


def study(
    model: StableDiffusion, sets: dict[str, list[Shown]], timesteps: Sequence[int], seed: int = 0
) -> xr.Dataset:
    """Rank heads on the first set, choose their number and all levels on the second.

    Return the scores of the third, as `scores_of` does, with what was chosen.
    """
    model = model.with_scheduler("DDPM", {})
    ranking = looked(model, sets["ranking"], timesteps, "ranking heads", False, seed)
    heads = ranked(ranking)
    label = "choosing thresholds"
    choosing = looked(model, sets["choosing"], timesteps, label, seed=seed + 1_000_000)
    best, levels = chosen(choosing, heads, COUNTS)
    scoring = looked(model, sets["scored"], timesteps, "scoring", seed=seed + 2_000_000)
    scores = scores_of(scoring, best, levels)
    sizes = {name: len(shown) for name, shown in sets.items()}
    return scores.assign(level=levels.sel(map=scores["map"])).assign_attrs(
        heads=best, ranking=heads, sets=sizes, model=model.name, seed=seed
    )


def split(shown: list[Shown], seed: int) -> dict[str, list[Shown]]:
    """Return a folder's pictures as three sets of a third each."""
    order = [shown[i] for i in np.random.default_rng(seed).permutation(len(shown))]
    third = len(shown) // 3
    return {
        "ranking": order[:third],
        "choosing": order[third : 2 * third],
        "scored": order[2 * third :],
    }


def study_pictures(model: StableDiffusion, heads: list[str], count: int) -> xr.Dataset:
    """Return the scores of generated pictures against a segmenter.

    A quarter as many more are drawn to choose the levels. Heads are those that scenes chose.
    """
    segmenter = segmenting.train(model)
    own = {
        f"{label}, {n}": [float(of[k]) for k in ("mean", "low", "high")]
        for (label, n), of in segmenting.own_scores(segmenter, model, 300).items()
    }
    few, half = max(2, count // 8), count // 2
    listed = asked_for(few + half, sealed=False)
    first: list[Asked] = []
    others: list[Asked] = []
    for group in ("seen pairs", "two subjects"):
        requests = [request for request in listed if request.group == group]
        first, others = first + requests[:few], others + requests[few:]
    _, levels = chosen(drawn(model, segmenter, first), heads, [len(heads)])
    scores = scores_of(drawn(model, segmenter, others), heads, levels)
    return scores.assign(level=levels.sel(map=scores["map"])).assign_attrs(
        heads=heads, drawn=2 * half, segmenter=own, model=model.name
    )


# --- the command ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.attention_truth", description=__doc__)
    models = "emojiworld (bundled), a Hugging Face id, or a local diffusers directory [emojiworld]"
    parser.add_argument("--model", default="emojiworld", help=models)
    parser.add_argument(
        "--scenes",
        type=int,
        default=200,
        metavar="N",
        help="scenes that are scored; half as many more rank heads and choose [200]",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="pictures, captions and masks of your own, in place of scenes and generated pictures",
    )
    parser.add_argument(
        "--timesteps",
        default=",".join(map(str, TIMESTEPS)),
        metavar="T,T",
        help="how much noise, by the model's t [%(default)s]",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=64,
        metavar="N",
        help="generated pictures that are scored; 0: none [64]",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the noise, the random weights, and how a folder is split [0]",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "float16", "bfloat16"],
        help="number format of the model [auto]",
    )
    parser.add_argument(
        "--device", default="auto", help="where the model runs: auto, cpu, cuda [auto]"
    )
    parser.add_argument(
        "--scores",
        type=Path,
        help="a JSON file for all scores; what it holds already is not measured again",
    )
    parser.add_argument("--figure", type=Path, help="draw the figure into this PNG")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the section of docs/attention-truth.md, one table in Markdown, in place of "
        "all tables",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def measured(options: argparse.Namespace) -> dict[str, xr.Dataset]:
    """Return the scores that the options ask for: `scenes`, and `pictures` of the bundled world.

    Scores that `options.scores` holds already are read from there. Raise ExperimentError.
    """
    words = options.timesteps.split(",")
    if not all(word.isascii() and word.isdigit() for word in words) or len(set(words)) < len(words):
        raise ExperimentError(
            f"timesteps: {options.timesteps!r} is no list of timesteps.",
            "Write whole numbers, each once: 100,500,900.",
        )
    timesteps = [int(word) for word in words]
    if options.folder is None and options.scenes < 4:
        raise ExperimentError(
            f"scenes: {options.scenes} are too few.", "At least 4 can be scored: --scenes 200."
        )
    scores = kept_in(options.scores)
    wanted = ["scenes", *(["pictures"] if options.folder is None and options.pictures else [])]
    if not set(wanted) - set(scores):
        return scores
    model = load(options.model, dtype=options.dtype, device=options.device)
    most = int(model.scheduler.config.num_train_timesteps) - 1
    if max(timesteps) > most:
        raise ExperimentError(
            f"timesteps: {max(timesteps)} is beyond the timesteps of {model.name}.",
            f"It knows 0 to {most}.",
        )
    _, _, *latents = model.latent_shape(1)
    if "pictures" in wanted and any(model.f * side != world.SIZE for side in latents):
        size = " x ".join(str(model.f * side) for side in latents)
        cause = (
            f"pictures: the segmenter knows pictures of {world.SIZE} x {world.SIZE} pixels, and "
            f"{model.name} draws {size}."
        )
        raise ExperimentError(cause, "Leave them out: --pictures 0.")
    if "scenes" not in scores:
        if options.folder is not None:
            sets = split(read_folder(options.folder, model), options.seed)
        else:
            counts = {
                "ranking": max(2, options.scenes // 5),
                "choosing": max(2, 3 * options.scenes // 10),
                "scored": options.scenes,
            }
            sets = {name: scenes(model, n, SEEDS[name]) for name, n in counts.items()}
        scores["scenes"] = study(model, sets, timesteps, options.seed)
        keep(scores, options.scores)
    if "pictures" in wanted and "pictures" not in scores:
        heads = list(scores["scenes"].attrs["heads"])
        scores["pictures"] = study_pictures(model, heads, options.pictures)
        keep(scores, options.scores)
    return scores


def kept_in(file: Path | None) -> dict[str, xr.Dataset]:
    """Return the scores in a file that `keep` wrote; none if there is no file.

    Raise ExperimentError for any other file.
    """
    if file is None or not file.exists():
        return {}
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
        return {name: xr.Dataset.from_dict(scores) for name, scores in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ExperimentError(
            f"scores: {file} does not hold scores of this program.",
            "Name another file, or delete it.",
        ) from problem


def keep(scores: dict[str, xr.Dataset], file: Path | None) -> None:
    """Write scores into a file, if one is named."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        listed = {name: dataset.to_dict() for name, dataset in scores.items()}
        file.write_text(json.dumps(listed), encoding="utf-8")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    scores = measured(options)
    print(section(scores) if options.markdown else as_text(scores))
    if options.figure is not None:
        draw_figure(scores["scenes"]).save(options.figure, optimize=True)
    return 0


if __name__ == "__main__":
    guarded(main)
