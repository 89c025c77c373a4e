"""The measure of attention maps: known answers, our own recordings, sets that share nothing.

Bad input is refused in plain words.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from PIL import Image

from experiments import attention_truth as truth_of
from experiments.attention_truth import (
    SEEDS,
    Mapped,
    chosen,
    drawn,
    main,
    ranked,
    read_folder,
    scenes,
    scores_of,
    split,
    study,
)
from experiments.attention_truth_report import BOUND, as_text, by_method, draw_figure, section
from experiments.emojiworld import judge, report, segmenter, world
from experiments.emojiworld.report import Asked
from experiments.truth_maps import (
    LEVELS,
    SIDE,
    Seen,
    Shown,
    best_levels,
    candidates,
    level_scores,
    look,
    places_of,
    precision,
    random_weights,
    recorded,
    scored,
)
from probe.analysis.masks import interval
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.running.recorder import record, record_noising
from probe.terminal import guarded

ROOT = Path(__file__).resolve().parent.parent
TIMESTEPS = (100, 900)
CAPTION = "a cat and a hat"


@functools.cache
def model() -> StableDiffusion:
    return StableDiffusion.of(tiny.pipeline()).with_scheduler("DDPM", {})


def shown(seed: int = 0, caption: str = CAPTION, words: tuple[str, ...] = ("cat", "hat")) -> Shown:
    """A random picture of 32 x 32 pixels, and for each word a block of its own."""
    random = np.random.default_rng(seed)
    masks = {}
    for index, word in enumerate(words):
        masks[word] = np.zeros((32, 32), bool)
        y, x = random.integers(0, 20, 2)
        masks[word][y : y + 12, x // 2 + 16 * index : x // 2 + 16 * index + 6] = True
    return Shown(str(seed), random.integers(0, 256, (32, 32, 3)).astype(np.uint8), caption, masks)


def planted(one: Shown, grid: int = 8, wrong: tuple[int, ...] = ()) -> Seen:
    """Maps that are the true masks at a grid, in every layer and head but for the heads `wrong`,
    which show noise.
    """
    prompt = model().read(one.caption)
    positions = [*range(prompt.end + 1), -1]
    random = np.random.default_rng(int(one.name))
    values = np.full((len(TIMESTEPS), len(positions), 2, 3, grid, grid), 0.01, np.float32)
    for word, mask in one.masks.items():
        small = mask.reshape(grid, 32 // grid, grid, 32 // grid).mean(axis=(1, 3))
        places = places_of(prompt, word)
        for place in places:
            values[:, place] = small / len(places)
    for head in wrong:
        values[:, :, :, head] = random.random(values[:, :, :, head].shape)
    coords = {"step": list(TIMESTEPS), "token": positions, "layer": ["a", "b"]}
    maps = xr.DataArray(values, dims=("step", "token", "layer", "head", "y", "x"), coords=coords)
    sizes = xr.DataArray(
        np.full((len(positions), 2, 3), 2.0, np.float32),
        dims=("token", "layer", "head"),
        coords={"token": positions, "layer": ["a", "b"]},
    )
    return Seen(prompt, [maps], [sizes])


def found(
    count: int, first: int = 0, wrong: tuple[int, ...] = (), words: tuple[str, ...] = ("cat", "hat")
) -> list[Mapped]:
    listed = [shown(first + i, words=words) for i in range(count)]
    return [
        (one, candidates(planted(one, wrong=wrong), one.truth()), one.truth()) for one in listed
    ]


# --- known answers --------------------------------------------------------------------------------


def test_a_perfect_map_reaches_the_ceiling_and_an_even_one_is_chance() -> None:
    ((one, maps, truth),) = found(1)
    levels = best_levels([level_scores(maps, truth)])
    scores = scored(maps, truth, levels)
    for name in ("attention", "grid/8x8", "layer/8x8/b", "head/8x8/a/2", "contribution"):
        for kind in ("AP", "IoU"):
            np.testing.assert_allclose(
                scores[kind].sel(map=name), scores[kind].sel(map="ceiling/8x8"), atol=1e-5
            )
    assert (scores.AP.sel(map="ceiling/8x8") > 0.8).all() and (
        scores.AP.sel(map="ceiling/8x8") < 1
    ).all()
    share = np.mean([mask.mean() for mask in one.masks.values()])
    assert np.allclose(scores.AP.sel(map="uniform"), share) and np.allclose(
        scores.IoU.sel(map="uniform"), share
    )
    assert (scores.AP.sel(map="other word") < scores.AP.sel(map="attention")).all()


def test_the_other_word_is_the_map_of_the_other_word() -> None:
    ((_, maps, _),) = found(1)
    np.testing.assert_array_equal(
        maps.sel(map="other word", word="cat"), maps.sel(map="attention", word="hat")
    )
    ((_, alone, _),) = found(1, words=("hat",))
    assert (
        "other word" not in alone["map"].values and "against others" in alone["map"].values
    )  # "cat" is another word, of unknown truth


def test_words_and_phrases_are_found_by_their_tokens() -> None:
    prompt = model().read("A cat in the hat, the cat scuba diving on hats")
    texts = {
        word: [prompt.tokens[place] for place in places_of(prompt, word)]
        for word in ("cat", "Scuba diving", "hat", "dog", "diving on cat", "")
    }
    assert (
        texts["cat"] == ["cat", "cat"]
        and texts["hat"] == ["hat"]
        and texts["Scuba diving"] == ["scuba", "diving"]
    )
    assert texts["dog"] == texts["diving on cat"] == texts[""] == []


def test_the_best_level_is_the_one_with_the_best_mean() -> None:
    names = {"map": ["m"], "step": [1], "level": LEVELS}
    one, two = (
        xr.DataArray(np.zeros((len(LEVELS), 1, 1)), dims=("level", "map", "step"), coords=names)
        for _ in range(2)
    )
    one[4], two[7], one[9], two[9] = 0.8, 0.8, 0.5, 0.5
    assert float(best_levels([one, two]).item()) == LEVELS[9]


def test_the_good_heads_are_ranked_first_and_used_alone() -> None:
    order = ranked(found(4, wrong=(0, 2)))
    assert set(order[:2]) == {"head/8x8/a/1", "head/8x8/b/1"} and len(order) == 6
    heads, levels = chosen(found(4, 10, wrong=(0, 2)), order, (2, 3, 6))
    assert heads == order[:2]
    scores = scores_of(found(4, 20, wrong=(0, 2)), heads, levels)
    np.testing.assert_allclose(
        scores.AP.sel(map="best heads"), scores.AP.sel(map="ceiling/8x8"), atol=1e-5
    )
    assert (scores.AP.sel(map="best heads") > scores.AP.sel(map="attention")).all()


def test_truth_is_the_share_of_each_place() -> None:
    mask = np.zeros((128, 128), bool)
    mask[10:21, :64] = True
    truth = Shown("", np.zeros((128, 128, 3), np.uint8), "", {"cat": mask}).truth()
    assert (
        truth.shape == (1, SIDE, SIDE)
        and float(truth[0, 10, 31]) == 0.5
        and float(truth[0, 9, 31]) == 1
        and float(truth[0, 9, 32]) == 0
    )


# --- the model is asked as the product asks it ----------------------------------------------------


def test_what_is_looked_at_is_what_a_noising_records(tmp_path: Path) -> None:
    one = shown()
    capture = {
        "dtype": "float32",
        "counterfactual": ["cat", "hat"],
        "text": False,
        "statistics": False,
    }
    asked = {
        "timesteps": list(TIMESTEPS),
        "noises": 1,
        "seed": 3,
        "capture": capture,
        "output": str(tmp_path),
    }
    run = record_noising(
        one.picture,
        one.caption,
        pipeline=tiny.pipeline(),
        progress=False,
        sheet=False,
        decode=False,
        **asked,
    )
    seen = look(model(), one, run.variable("timestep").values.astype(int).tolist(), seed=3)
    for grid, maps, sizes in zip(run.grids, seen.grids, seen.sizes, strict=True):
        there = run.attention(grid).sel(branch="cond").isel(draw=0)
        np.testing.assert_array_equal(there.transpose(*maps.dims).values, maps.values)
        assert list(there["layer"].values) == list(maps["layer"].values)
        np.testing.assert_array_equal(
            run.variable(f"attention/{grid}/value_size").sel(branch="cond").transpose(*sizes.dims),
            sizes,
        )
    assert seen.change is not None
    np.testing.assert_array_equal(
        run.variable("counterfactual/change").isel(draw=0).values, seen.change.values
    )


def test_a_recorded_run_gives_its_nearest_steps_and_their_mean(tmp_path: Path) -> None:
    capture = {"dtype": "float32", "counterfactual": ["cat"]}
    run = record(
        {
            "prompt": CAPTION,
            "steps": 6,
            "scheduler": "DDIM",
            "output": str(tmp_path),
            "capture": capture,
        },
        tiny.pipeline(),
        progress=False,
    )
    seen = recorded(run, model().read(CAPTION), TIMESTEPS, ["cat"])
    whole = run.attention(run.grids[0]).sel(branch="cond").isel(image=0)
    near = [int(np.abs(run.variable("timestep").values - t).argmin()) for t in TIMESTEPS]
    np.testing.assert_array_equal(seen.grids[0].sel(step="900"), whole.isel(step=near[1]))
    np.testing.assert_allclose(seen.grids[0].sel(step="all"), whole.mean("step"), rtol=1e-6)
    maps = candidates(seen, shown(words=("cat",)).truth())
    assert list(maps["step"].values) == ["100", "900", "all"] and np.isfinite(maps.values).all()


def test_random_weights_are_others_of_the_same_shape_and_leave_chance_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    blind = random_weights(model(), seed=1)
    assert torch.equal(torch.rand(3), expected)
    one, two = model().unet.state_dict(), blind.unet.state_dict()
    assert (
        one.keys() == two.keys()
        and not torch.equal(one["conv_in.weight"], two["conv_in.weight"])
        and blind.vae is model().vae
    )
    again = random_weights(model(), seed=1).unet.state_dict()
    assert all(torch.equal(two[name], again[name]) for name in two)


# --- sets that share nothing ----------------------------------------------------------------------


def test_the_sets_have_scenes_of_their_own() -> None:
    sets = {name: scenes(model(), 5, first) for name, first in SEEDS.items()}
    seeds = [int(one.name) for part in sets.values() for one in part]
    assert len(set(seeds)) == 15 and min(seeds) >= 40_000  # training draws 0 to 39,999
    assert [len(one.masks) for one in sets["scored"]] == [1, 1, 1, 2, 2]
    assert all(
        one.picture.shape == (32, 32, 3) and mask.shape == (32, 32)
        for part in sets.values()
        for one in part
        for mask in one.masks.values()
    )
    others = [
        report.FIRST_FRESH_SEED,
        *judge.FIRST_SEED.values(),
        judge.TEST_SEED,
        segmenter.FIRST_SEED,
        segmenter.TEST_SEED,
        *SEEDS.values(),
    ]
    apart = np.diff(sorted(others))
    assert apart.min() >= 1_000_000


@pytest.mark.slow
def test_thresholds_do_not_see_what_is_scored() -> None:
    sets = {
        "ranking": [shown(0)],
        "choosing": [shown(2)],
        "scored": [shown(4), shown(5), shown(6, words=("hat",))],
    }
    before = study(model(), sets, TIMESTEPS)
    moved = [
        replace(one, masks={word: np.roll(mask, 9, axis=1) for word, mask in one.masks.items()})
        for one in sets["scored"]
    ]
    after = study(model(), {**sets, "scored": moved}, TIMESTEPS)
    assert before.attrs["heads"] == after.attrs["heads"] and before.level.identical(after.level)
    assert not before.AP.sel(map="attention").identical(after.AP.sel(map="attention"))
    tuned = [
        replace(one, masks={word: np.roll(mask, 9, axis=1) for word, mask in one.masks.items()})
        for one in sets["choosing"]
    ]
    other = study(model(), {**sets, "choosing": tuned}, TIMESTEPS)
    assert not before.level.identical(other.level)  # the set that chooses does choose
    assert before.AP.sel(map="attention").identical(
        other.AP.sel(map="attention")
    )  # which AP knows nothing of
    assert np.isnan(before.AP.sel(map="other word", scene="6")).all() and before[
        "things"
    ].values.tolist() == [2, 2, 1]
    assert {"random", "counterfactual", "against others"} <= set(before["map"].values)
    text = as_text({"scenes": before})
    assert (
        "3 pictures are scored, with one checkpoint" in text
        and "Where attention is not a good segmenter: at high noise" in text
    )
    rows = {row["map"]: row for row in by_method(before)}
    assert (
        rows["the other subject's word"]["AP, one subject"] == ""
        and rows["uniform"]["AP, two subjects"] != ""
    )
    expected = interval(before.AP.sel(map="attention").mean("step")[:2])
    mean, low, high = (float(expected[name]) for name in ("mean", "low", "high"))
    assert (
        rows["attention, all heads"]["AP, two subjects"] == f"{mean:.2f} ({low:.2f} to {high:.2f})"
    )
    figure = draw_figure(before)
    assert figure.size[0] == 1200 and len(figure.getcolors()) > 10


def test_a_folder_is_split_into_thirds_that_share_nothing() -> None:
    sets = split([shown(i) for i in range(10)], seed=3)
    names = {name: {one.name for one in part} for name, part in sets.items()}
    assert [len(part) for part in names.values()] == [3, 3, 4] and len(
        set.union(*names.values())
    ) == 10
    assert {
        name: [one.name for one in part]
        for name, part in split([shown(i) for i in range(10)], seed=4).items()
    } != names


# --- pictures of one's own ------------------------------------------------------------------------


def fill(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for index in range(count):
        one = shown(index)
        Image.fromarray(one.picture).save(folder / f"p{index}.png")
        (folder / f"p{index}.txt").write_text(f"{one.caption}\n")
        for word, mask in one.masks.items():
            Image.fromarray((mask * 255).astype(np.uint8)).save(folder / f"p{index}.{word}.png")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".PNG"])
def test_a_folder_is_read_as_it_lies(tmp_path: Path, suffix: str) -> None:
    for file in fill(tmp_path / "own").glob("p?*.png"):
        file.rename(file.with_suffix(suffix))
    read = read_folder(tmp_path / "own", model())
    assert [one.name for one in read] == [f"p{i}" for i in range(6)]
    for index, one in enumerate(read):
        expected = shown(index)
        assert one.caption == CAPTION and one.masks.keys() == expected.masks.keys()
        assert np.array_equal(one.picture, expected.picture) and all(
            np.array_equal(one.masks[word], expected.masks[word]) for word in one.masks
        )


@pytest.mark.slow
def test_the_command_measures_a_folder_with_any_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    tiny.pipeline().save_pretrained(tmp_path / "model")
    given = [
        "--folder",
        str(fill(tmp_path / "own")),
        "--model",
        str(tmp_path / "model"),
        "--timesteps",
        "100,900",
        "--markdown",
    ]
    given += ["--scores", str(tmp_path / "scores.json"), "--figure", str(tmp_path / "figure.png")]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "| map " in said and "2 pictures are scored" in said and "the true mask at 8x8" in said
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size[0] == 1200
    assert main(given) == 0  # from the scores that were kept: no picture is looked at again
    again = capsys.readouterr()
    assert again.out == said and "scoring" not in again.err


def wrong(folder: Path, kind: str) -> None:
    """Make one thing wrong in a folder."""
    white = Image.new("L", (32, 32), 255)
    actions: dict[str, Callable[[], Any]] = {
        "no caption": (folder / "p3.txt").unlink,
        "no mask": lambda: [(folder / f"p3.{word}.png").unlink() for word in ("cat", "hat")],
        "another word": lambda: white.save(folder / "p3.dog.png"),
        "empty mask": lambda: Image.new("L", (32, 32)).save(folder / "p3.cat.png"),
        "mask as JPEG": lambda: white.save(folder / "p3.dog.jpg"),
        "picture twice": lambda: white.save(folder / "p3.jpg"),
        "mask alone": lambda: white.save(folder / "q.cat.png"),
        "no picture": lambda: (folder / "p3.png").write_bytes(b"not a picture"),
        "too few": lambda: [file.unlink() for file in folder.glob("p3*")],
    }
    actions[kind]()


@pytest.mark.parametrize(
    ("kind", "cause", "remedy"),
    [
        ("no caption", "p3.png has no caption", "p3.txt"),
        ("no mask", "p3.png has no mask", "p3.WORD.png"),
        (
            "another word",
            "p3.dog.png: 'dog' is not in the caption 'a cat and a hat'",
            "a word of the caption",
        ),
        (
            "empty mask",
            "p3.cat.png has nothing inside",
            "white (255; in an array not 0) where its word is",
        ),
        ("mask as JPEG", "p3.dog.jpg is a mask as JPEG", "Save it as PNG"),
        ("picture twice", "p3.png is there under another suffix too", "Leave one of the two"),
        ("mask alone", "q.cat.png is a mask of no picture", "no dot"),
        ("no picture", "p3.png is not a PNG or JPEG picture", "Save it as one"),
        ("too few", "has 5 pictures", "At least 6"),
    ],
)
def test_what_is_wrong_in_a_folder_is_said_in_two_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, cause: str, remedy: str
) -> None:
    wrong(fill(tmp_path / "own"), kind)
    tiny.pipeline().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert_refused(
        ["--folder", tmp_path / "own", "--model", tmp_path / "model"], cause, remedy, capsys
    )


@pytest.mark.parametrize(
    ("given", "cause", "remedy"),
    [
        (["--folder", "nowhere"], "nowhere is no folder", "--help"),
        (["--timesteps", "100,x"], "'100,x' is no list of timesteps", "100,500,900"),
        (["--timesteps", "100,1000"], "1000 is beyond the timesteps", "0 to 999"),
        (["--scenes", "2"], "2 are too few", "--scenes 200"),
        (["--scense", "2"], "unrecognized arguments", "--scenes"),
    ],
)
def test_options_that_make_no_sense_are_said_in_two_lines(
    capsys: pytest.CaptureFixture[str], given: list[str], cause: str, remedy: str
) -> None:
    assert_refused(given, cause, remedy, capsys)


def test_other_files_of_scores_and_models_of_other_sizes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.json").write_text("[1, 2]")
    assert_refused(
        ["--scores", tmp_path / "scores.json"], "does not hold scores", "Name another file", capsys
    )
    tiny.pipeline().save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert_refused(
        ["--model", tmp_path / "model"],
        "knows pictures of 128 x 128 pixels",
        "--pictures 0",
        capsys,
    )


def assert_refused(
    given: list[Any], cause: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        guarded(main, [str(word) for word in given])
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "Loading" not in line and line.strip()
    ]
    assert ended.value.code == 2 and len(lines) == 2, lines
    assert lines[0].startswith("error: ") and cause in lines[0] and remedy in lines[1]


def test_help_teaches() -> None:
    said = truth_of.parser().format_help()
    assert all(
        word in said
        for word in (
            "NAME.WORD.png",
            "one checkpoint",
            "--markdown",
            "--model DIRECTORY --folder PICTURES",
            "none in common",
        )
    )


# --- the segmenter --------------------------------------------------------------------------------


def test_the_segmenter_learns_from_the_masks_of_scenes() -> None:
    scene = next(one for one in map(world.draw_scene, range(100)) if len(one.subjects) == 2)
    classes = segmenter.classes_of(scene).numpy()
    for name in scene.subjects:
        number = judge.SUBJECTS.index(name) + 1
        share = scene.masks[name].reshape(64, 2, 64, 2).mean(axis=(1, 3))
        assert (share[classes == number] >= 0.5).all() and (classes[share > 0.5] == number).all()
    assert set(np.unique(classes)) == {
        0,
        *(judge.SUBJECTS.index(name) + 1 for name in scene.subjects),
    }


def sees_only(subject: str) -> segmenter.Segmenter:
    """A segmenter whose weights make it see one subject everywhere."""
    made = segmenter.Segmenter().eval()
    with torch.no_grad():
        made.vote.weight.zero_()
        made.vote.bias.zero_()
        made.vote.bias[judge.SUBJECTS.index(subject) + 1] = 1
    return made


@pytest.mark.slow
def test_of_generated_pictures_those_count_in_which_every_subject_is_seen() -> None:
    asked = [
        Asked("", ("cat",), "snow"),
        Asked("", ("cat", "owl"), "snow", "above"),
        Asked("", ("owl",), "snow"),
    ]
    pictures = [
        *drawn(load("emojiworld", dtype="float32", device="cpu"), sees_only("cat"), asked, steps=4)
    ]
    ((one, maps, truth),) = pictures
    assert (
        one.caption == "a cat in the snow" and truth.shape == (1, SIDE, SIDE) and bool(truth.all())
    )
    assert (
        list(maps["step"].values) == [*map(str, truth_of.TIMESTEPS), "all"]
        and "counterfactual" in maps["map"].values
    )
    assert np.allclose(precision(maps, truth), 1)  # where all is true, every map is right


@pytest.mark.slow
def test_the_segmenter_trains_and_is_taken_from_its_folder_afterwards(tmp_path: Path) -> None:
    bundled = load("emojiworld", dtype="float32", device="cpu")
    made = segmenter.train(bundled, scenes=24, steps=2, folder=tmp_path)
    again = segmenter.train(bundled, scenes=24, steps=2, folder=tmp_path)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items()
    )
    own = segmenter.own_scores(sees_only("cat"), bundled, 12)
    assert all(0 <= float(one["mean"]) < 0.2 for one in own.values()) and set(own) == {
        (k, n) for k in ("scenes", "VAE round trips") for n in (1, 2)
    }


@pytest.mark.slow
def test_a_short_training_finds_subjects_in_scenes_and_in_round_trips(tmp_path: Path) -> None:
    bundled = load("emojiworld", dtype="float32", device="cpu")
    own = segmenter.own_scores(
        segmenter.train(bundled, scenes=400, steps=200, folder=tmp_path), bundled, 30
    )
    assert all(float(one["mean"]) > 0.25 for one in own.values())


# --- said with its condition ----------------------------------------------------------------------


def test_figures_of_the_bundled_model_stand_beside_how_it_was_trained() -> None:
    sets = {
        "ranking": [shown(0)],
        "choosing": [shown(2)],
        "scored": [shown(4), shown(6, words=("hat",))],
    }
    own = study(model(), sets, TIMESTEPS)
    bundled = own.assign_attrs(model="emojiworld")
    for tell in (as_text, section):
        assert BOUND in tell({"scenes": bundled}) and BOUND not in tell({"scenes": own}), (
            "another model was not trained like this"
        )
    assert f"| map ({BOUND}) |" in section({"scenes": bundled})
    assert "accuracy" not in as_text({"scenes": own}) + section({"scenes": own}), (
        "an empty mask has a high one"
    )
    ink = [
        (np.asarray(draw_figure(one).convert("L"))[40:66] < 200).sum()
        for one in (own.assign_attrs(model="another"), bundled)
    ]
    assert ink[1] > 1.3 * ink[0], "it is below the figure's title"


def test_the_readme_and_the_card_say_it_where_they_show_maps() -> None:
    readme, card, page = (
        " ".join((ROOT / path).read_text().replace("**", "").split())
        for path in ("README.md", "probe/emojiworld/README.md", "docs/attention-truth.md")
    )
    top, short = (
        readme.split("## Start")[0],
        readme.split("## How good are attention maps?")[1].split("## ")[0],
    )
    assert BOUND in card[:200] and BOUND in top
    assert short.count(BOUND) >= 2, "before the table and in its head"
    assert page.count(BOUND) >= 4, (
        "below the picture, before the table, in its first sentence and its head"
    )
    (picture,) = re.findall(r"!\[([^\]]*)\]\(../experiments/attention_truth.png\)", page)
    assert BOUND in picture
    for table in (part.split("<!-- attention_truth -->")[1] for part in (readme, page)):
        assert f"({BOUND}) |" in table and "accuracy" not in table
