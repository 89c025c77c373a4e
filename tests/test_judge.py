"""The judges of generated pictures: what they learn from and recognise, and the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments.emojiworld import judge as judging
from experiments.emojiworld import world
from experiments.emojiworld.judge import (
    SETTINGS,
    SUBJECTS,
    Answer,
    Judge,
    own_accuracy,
    train,
    vary,
)
from experiments.emojiworld.report import Asked, asked_for, interval, prompts, score
from probe.diffusion.loading import load

ROOT = Path(__file__).resolve().parent.parent


def answer_of(
    *pictures: dict[str, float],
    setting: str | None = "snow",
    sure_of_setting: float = 0.99,
    **places: tuple[float, float],
) -> Answer:
    """An answer with the given probabilities of subjects, one dict a picture, all in one
    setting.
    """
    subjects, settings = (
        torch.full((len(pictures), len(SUBJECTS)), 0.01),
        torch.full((len(pictures), len(SETTINGS)), 0.001),
    )
    where = torch.full((len(pictures), len(SUBJECTS), 2), 0.5)
    settings[:, SETTINGS.index(setting)] = sure_of_setting
    for i, probabilities in enumerate(pictures):
        for name, probability in probabilities.items():
            subjects[i, SUBJECTS.index(name)] = probability
    for name, place in places.items():
        where[:, SUBJECTS.index(name)] = torch.tensor(place)
    return Answer(subjects, settings, where, sure_subject=0.6, sure_setting=0.8)


def test_recognised_is_leading_and_sure() -> None:
    answer = answer_of({"cat": 0.9}, {"cat": 0.9, "dog": 0.95}, {"cat": 0.55}, {"dog": 0.9})
    assert answer.shows([("cat",)] * 4).tolist() == [True, False, False, False]
    assert answer.unsure[0].tolist() == [False, False, True, False]


def test_of_two_subjects_both_have_to_be_there() -> None:
    answer = answer_of(
        {"cat": 0.9, "dog": 0.7}, {"cat": 0.9, "dog": 0.5}, {"cat": 0.9, "fox": 0.8, "dog": 0.7}
    )
    assert answer.shows([("dog", "cat")] * 3).tolist() == [True, False, False]


def test_a_setting_has_to_lead_and_be_sure() -> None:
    asked = ["snow", "moon", None]
    assert answer_of({}, {}, {}).set_in(asked).tolist() == [True, False, False]
    assert answer_of({}, {}, {}, sure_of_setting=0.7).set_in(asked).tolist() == [
        False,
        False,
        False,
    ]
    assert answer_of({}, {}, {}, setting=None).set_in(asked).tolist() == [False, False, True]


def test_relations_are_read_from_places() -> None:
    answer = answer_of({}, {}, {}, cat=(0.5, 0.2), dog=(0.6, 0.8), fox=(0.9, 0.3))
    pairs = [("cat", "dog"), ("dog", "cat"), ("cat", "fox")]
    assert answer.related(pairs, ["above"] * 3).tolist() == [True, False, False]
    assert answer.related(pairs, ["next to"] * 3).tolist() == [False, False, True]


def test_scores_belong_to_their_prompts() -> None:
    asked = [
        Asked("two", ("cat", "dog"), "snow", "above"),
        Asked("two", ("fox", "owl"), "moon", "next to"),
    ]
    both, one = {"cat": 0.9, "dog": 0.9}, {"fox": 0.9}
    scores = score(asked, answer_of(both, one, one, both, cat=(0.5, 0.2), dog=(0.5, 0.8)), images=2)
    assert scores["subject"].tolist() == [[1, 0], [0, 0]]
    assert scores["setting"].tolist() == [[1, 1], [0, 0]]
    assert scores["relation"].isnan().tolist() == [
        [False, True],
        [True, True],
    ]  # asked only where both subjects are there
    assert scores["relation"][0, 0] == 1


def test_intervals_resample_prompts_not_pictures() -> None:
    together = torch.tensor([[1.0] * 8, [0.0] * 8] * 6)  # pictures of a prompt fail together
    apart = torch.tensor([[1.0, 0.0] * 4] * 12)  # every prompt fails half of the time
    mean, low, high = interval(together)
    assert mean == 0.5 and low < 0.3 and high > 0.7
    assert interval(apart) == (0.5, 0.5, 0.5)
    assert interval(together[:, :1].T) == interval(
        together[:, :1]
    )  # of a single prompt, its pictures
    some = together.clone()
    some[:, 4:] = torch.nan
    assert interval(some)[0] == 0.5
    assert (
        interval(torch.full((3, 2), torch.nan))[0] != interval(torch.full((3, 2), torch.nan))[0]
    )  # NaN: never asked


def test_an_interval_of_certainties_is_not_empty() -> None:
    mean, low, high = interval(torch.ones(8, 10))
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(0.631, abs=1e-3)  # exact binomial bound of 8 of 8: 0.025 ** (1 / 8)
    assert interval(torch.zeros(8, 10))[2] == pytest.approx(1 - low)


def test_sealed_pairs_are_asked_for_only_on_request() -> None:
    open_pairs = {
        (subject, one.setting) for one in asked_for(48, sealed=False) for subject in one.subjects
    }
    assert not open_pairs & world.HELD_OUT_SEALED
    assert {
        (one.subjects[0], one.setting)
        for one in asked_for(48, sealed=True)
        if one.group == "left out, sealed"
    } == world.HELD_OUT_SEALED
    sealed_captions = {
        world.caption_of((subject,), setting, None) for subject, setting in world.HELD_OUT_SEALED
    }
    assert not sealed_captions & set(prompts())


def test_what_is_asked_for_is_balanced_and_seen() -> None:
    asked = asked_for(48, sealed=False)
    seen = [one for one in asked if one.group == "seen pairs"]
    two = [one for one in asked if one.group == "two subjects"]
    assert len(seen) == len(two) == 48 == len(set(seen))
    assert all([one.subjects[0] for one in seen].count(subject) == 2 for subject in world.SUBJECTS)
    assert (
        not {(subject, one.setting) for one in [*seen, *two] for subject in one.subjects}
        & world.HELD_OUT
    )
    assert {one.relation for one in two} == set(world.RELATIONS)
    assert asked == asked_for(48, sealed=False)


def test_judges_see_scenes_of_their_own_and_all_pairs() -> None:
    ranges = [range(first, first + 2 * judging.APART) for first in judging.FIRST_SEED.values()]
    assert all(
        a.stop <= b.start
        for a, b in zip(
            ranges, [*ranges[1:], range(judging.TEST_SEED, judging.TEST_SEED + 1)], strict=True
        )
    )
    assert ranges[0].start > 10_000_000 + judging.APART
    data = judging.draw(judging.FIRST_SEED["tuning"], 900, strangers="training", every=8)
    assert (data.subjects[::8] == 0).all()
    shown = {(SUBJECTS[s], SETTINGS[data.settings[i]]) for i, s in data.subjects.nonzero().tolist()}
    assert len(shown & world.HELD_OUT) > 8
    met, new = (set(emoji.split()) for emoji in judging.STRANGERS.values())
    assert not met & new and not (met | new) & set(world.SUBJECTS.values())


@pytest.mark.slow
def test_round_trips_come_first_and_stay_recognisable() -> None:
    plain = judging.draw(7, 80).pictures.float()
    through = judging.draw(
        7, 80, trips=50, model=load("emojiworld", dtype="float32", device="cpu")
    ).pictures.float()
    changed = (plain - through).abs().mean(dim=(1, 2, 3))
    assert (changed[:50] > 0).all() and (changed[50:] == 0).all()
    assert changed.max() < 40


def test_pictures_vary_by_chance_alone() -> None:
    pictures = judging.draw(0, 4).pictures
    first, again, other = (
        vary(pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 3, 64, 64) and first.abs().max() <= 1


def test_the_judges_differ_and_vote_by_place() -> None:
    tuning, report = (Judge(name).eval() for name in judging.FIRST_SEED)
    pictures = judging.draw(0, 3).pictures
    for one in (tuning, report):
        answer = one.judge(pictures)
        assert answer.subjects.shape == (3, 24) and answer.places.shape == (3, 24, 2)
        assert torch.allclose(answer.settings.sum(dim=1), torch.ones(3))
        assert ((answer.places > 0) & (answer.places < 1)).all()
    assert {type(part) for part in tuning.modules()} != {type(part) for part in report.modules()}


def test_places_follow_the_votes() -> None:
    class Voter(Judge):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            votes = torch.full((1, len(SUBJECTS) + len(SETTINGS), 8, 8), -5.0)
            votes[0, 2, 1, 6] = 9.0  # row 1, column 6
            return votes

    one = Voter("tuning").eval()
    assert one.judge(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).places[
        0, 2
    ].tolist() == pytest.approx([6.5 / 8, 1.5 / 8], abs=1e-3)


def test_a_missing_judge_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "SHIPPED", tmp_path)
    with pytest.raises(SystemExit, match=r"experiments\.emojiworld\.judge --only report"):
        judging.load_judge("report", tmp_path)


@pytest.mark.slow
def test_a_judge_learns_and_comes_back_the_same(tmp_path: Path) -> None:
    model = load("emojiworld", dtype="float32", device="cpu")
    made = train("tuning", model, scenes=1000, steps=250, folder=tmp_path)
    again = judging.load_judge("tuning", tmp_path)
    pictures = judging.draw(judging.TEST_SEED, 100).pictures
    assert torch.equal(made.judge(pictures).subjects, again.judge(pictures).subjects)
    resumed = train(
        "tuning", model, scenes=1000, steps=250, folder=tmp_path
    )  # nothing is left to do
    assert torch.equal(resumed.judge(pictures).subjects, made.judge(pictures).subjects)
    scenes, *_ = own_accuracy(made, model, 100)
    assert scenes["setting"].float().mean() > 0.8  # chance: one in nine
    truth, said = judging.draw(judging.TEST_SEED, 100).subjects, made.judge(pictures).subjects
    assert said[truth == 1].mean() > 3 * said[truth == 0].mean()


@pytest.mark.slow
def test_the_report_runs_whole(tmp_path: Path) -> None:
    torch.save(Judge("tuning").state_dict(), tmp_path / "tuning-judge.pt")
    sizes = "--scenes 4 --pairs 2 --seeds 1 --steps 2 --training-scenes 20".split()
    judges = ["--judge", "tuning", "--judges", str(tmp_path)]
    pages = ["--sheet", str(tmp_path / "sheet.png"), "--nearest", str(tmp_path / "nearest.png")]
    report = [sys.executable, "-m", "experiments.emojiworld.report", "--markdown"]
    command = [*report, *sizes, *judges, *pages]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "| tuning | seen pairs" in done.stdout
        and "left out, development" in done.stdout
        and "sealed" not in done.stdout
    )
    for name, width in (("sheet.png", 8 * world.SIZE), ("nearest.png", 2 * world.SIZE + 4)):
        with Image.open(tmp_path / name) as page:
            assert page.width == width
