"""Edits are data: strict, told apart by their kind, and a bad one is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from probe.errors import ExperimentError
from probe.settings.edit_sentences import describe_edit
from probe.settings.edits import (
    EDIT_KINDS,
    guidance_by_step,
    mixed,
    without_words,
)
from probe.settings.experiment import Experiment, load_experiment

EACH: dict[str, dict[str, Any]] = {
    "remove": {"words": ["astronaut"]},
    "prompt": {"text": "A fox", "steps": "3:"},
    "embedding": {"words": ["astronaut"], "text": "A fox"},
    "mask": {"words": ["astronaut"]},
    "value": {"words": ["scuba", "diving"], "heads": [0]},
    "reweight": {"words": ["astronaut"], "scale": 2.0},
    "head": {"layers": ["mid_block.*"], "how": "zero"},
    "output": {"modules": ["mid_block"], "donor": {"seed": 3}},
    "skip": {"modules": ["up_blocks.0.resnets.0"], "how": "mean"},
    "map": {"donor": {"prompt": "A fox"}},
    "latents": {"donor": {"seed": 3}, "steps": "1:2"},
    "noise": {"seed": 3, "amount": 0.5},
    "guidance": {"scale": 1, "to": 8},
    "steer": {"modules": ["mid_block"], "toward": "a.zarr", "away": "b.zarr"},
}


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_kind_is_read_told_in_a_sentence_and_comes_back_from_json(kind: str) -> None:
    experiment = load_experiment({"edits": [{"kind": kind, **EACH[kind]}]})
    edit = experiment.edits[0]
    assert type(edit) is EDIT_KINDS[kind]
    assert load_experiment(experiment.resolved()) == experiment
    sentence = describe_edit(edit)
    assert sentence and "{" not in sentence and not sentence.endswith(".")
    assert describe_edit(edit.model_copy(update={"amount": 0.25})) == (
        sentence.removesuffix(", amount 0.5") + ", amount 0.25"
    )
    assert experiment.identity() != experiment.unedited.identity() == Experiment().identity()
    assert experiment.run_name == Experiment().run_name


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"kind": "maks"}, "edits[0]: 'maks' is no kind of edit|Did you mean mask?"),
        ({"words": ["a"]}, "edits[0]: it has no kind|Write kind: one of remove, prompt"),
        ("mask", "edits[0]: this is no edit|Write a mapping"),
        ({"kind": "mask"}, "edits[0].words: it is missing|Which words"),
        ({"kind": "mask", "word": ["a"]}, "edits[0].word: unknown field|Did you mean words?"),
        ({"kind": "mask", "words": "a"}, "edits[0].words: 'a' is not a list|Write a list"),
        ({"kind": "mask", "words": []}, "edits[0].words|"),
        ({"kind": "mask", "words": ["a"], "amount": 1000}, "1000 is more than 100|from -100"),
        ({"kind": "mask", "words": ["a"], "steps": "x"}, "not a choice of steps|Write all"),
        ({"kind": "head", "layers": ["*"], "how": "zro"}, "'zro' is not one of|mean zero?"),
        (
            {"kind": "map", "donor": {"sed": 1}},
            "edits[0].donor.sed: unknown field|Did you mean seed?",
        ),
        ({"kind": "map", "donor": {"run": "r", "seed": 1}}, "a recording has its own|not both"),
        ({"kind": "noise"}, "it names no noise, or two|Write a seed"),
        ({"kind": "noise", "seed": 1, "amount": 2.0}, "amount: 2 cannot be mixed|method: add"),
        ({"kind": "noise", "seed": 1, "steps": "1:"}, "before all steps|Leave them out"),
        ({"kind": "guidance"}, "it changes nothing|Write a scale"),
        (
            {"kind": "guidance", "rescale": 0.5, "amount": -5},
            "less than none|Write 0 to 1",
        ),
        ({"kind": "remove", "words": ["astronat"]}, "'astronat' is not a word|mean astronaut?"),
    ],
)
def test_a_bad_edit_is_refused_with_cause_and_remedy(edit: Any, says: str) -> None:
    with pytest.raises(ExperimentError) as error:
        load_experiment({"edits": [edit]})
    cause, remedy = says.split("|")
    assert cause in error.value.cause and remedy in error.value.remedy


def test_words_are_taken_out_with_the_space_before_them() -> None:
    assert without_words("An astronaut scuba-diving", ["astronaut"]) == "An scuba-diving"
    assert without_words("a fox and a fox", ["fox"]) == "a and a"
    assert without_words("astronaut, diving", ["astronaut"]) == ", diving"
    edited = Experiment(
        edits=load_experiment({"edits": [{"kind": "remove", **EACH["remove"]}]}).edits
    )
    assert edited.texts == {"uncond": "", "cond": "An scuba diving"}
    assert edited.prompt == Experiment().prompt


def test_steps_and_sigmas_choose_together() -> None:
    edits = load_experiment(
        {"edits": [{"kind": "guidance", "scale": 5, "steps": "1:", "sigmas": [8, 1]}]}
    ).edits
    assert edits[0].steps_of([14.0, 8.0, 3.0, 0.5]) == (1, 2)
    with pytest.raises(ExperimentError, match=r'^steps "1:" and sigmas \[8, 1\]: no step of'):
        edits[0].steps_of([14.0, 0.5])
    late = load_experiment({"edits": [{"kind": "guidance", "scale": 5, "steps": "9:"}]}).edits
    with pytest.raises(ExperimentError, match=r'^steps "9:": no step of the run is among'):
        late[0].steps_of([14.0, 0.5])


def test_guidance_by_step_is_a_line_and_exact_at_both_ends() -> None:
    def by_step(**fields: Any) -> list[float]:
        edits = load_experiment({"edits": [{"kind": "guidance", **fields}]}).edits
        return [scale for scale, _ in guidance_by_step(3.3, 0.0, edits, [4.0, 3.0, 2.0])]

    assert by_step(scale=1, to=8.0) == [1, 4.5, 8]
    assert by_step(scale=7.7, amount=0.0) == [3.3, 3.3, 3.3]
    assert by_step(scale=7.7, steps="1") == [3.3, 7.7, 3.3]
    assert mixed(0.1, 0.7, 1) == 0.7 and mixed(0.1, 0.7, 0) == 0.1
