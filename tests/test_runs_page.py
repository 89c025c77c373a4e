"""The page Runs says which command made a run, and that command asks for the same settings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from probe import noising, run
from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.views.runs import _row, made_by
from probe.reading.listing import Listed
from probe.reading.recording import Run
from probe.reading.sample import unpacked
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.noising import Noising, load_noising
from probe.terminal import overrides
from probe.testing.synthetic import synthetic_recording

ASKED: list[dict[str, Any]] = [
    {},
    {"prompt": "a cat: 'red' # 4 $HOME\n", "seed": 5, "guidance_scale": 7.5, "steps": 30},
    {"negative_prompt": "--steps", "image": "a picture.png", "height": 64, "name": "mine"},
    {"capture": {"text": False, "layers": ["mid*", "up*"], "dtype": "float16"}},
]


def listed(**attributes: Any) -> Listed:
    return Listed(Path("a folder/one.zarr"), attributes, None)


@pytest.mark.parametrize("asked", ASKED)
def test_the_command_asks_for_the_same_experiment(asked: dict[str, Any]) -> None:
    experiment = load_experiment(asked)
    python, option, module, *given = shlex.split(
        made_by(listed(experiment=experiment.model_dump(mode="json")))
    )
    assert (python, option, module) == ("python", "-m", "probe.run")
    changes = overrides(run.parser().parse_args(given))
    assert load_experiment(Experiment(), **changes) == experiment


def test_the_command_of_a_noising_asks_for_the_same() -> None:
    asked = load_noising(
        {"picture": "a.png", "caption": "a fox", "timesteps": [500, 50], "decode": False}
    )
    start = shlex.split(made_by(listed(noising=asked.model_dump(mode="json"))))
    assert start[:3] == ["python", "-m", "probe.noising"]
    changes = overrides(noising.parser().parse_args(start[3:]), Noising)
    assert load_noising(Noising(), **changes) == asked


@pytest.mark.parametrize(
    "experiment",
    [
        {"scheduler_options": {"use_karras_sigmas": True}, "scheduler": "Euler"},
        {"capture": {"layers": ["a,b"]}},
        {"steps": "<b>many</b>"},
        {"no_such": 1},
    ],
)
def test_what_is_no_option_gives_no_command(experiment: dict[str, Any]) -> None:
    assert made_by(listed(experiment=experiment)) == "" and made_by(listed()) == ""


def test_the_table_calls_a_recording_as_people_do() -> None:
    path = unpacked("sample-guidance-8")
    assert _row(Listed(path, dict(Run(path).attributes)))["name"] == "sample-guidance-8"
    assert _row(listed())["name"] == "one"


def test_both_commands_are_shown_as_code(tmp_path: Path) -> None:
    path = synthetic_recording(tmp_path / "one.zarr", prompt="**a** <b>cat</b>", seed=7)
    configure(Library(tmp_path))
    script = (
        "from probe.dashboard.views import pick, runs;"
        "runs.origin(next(row for key, row in pick.recordings() if key == 'one'))"
    )
    try:
        app = AppTest.from_string(script, default_timeout=30).run()
    finally:
        libraries._library.clear()
    made, again = (element.value for element in app.code)
    assert not app.exception and "'--prompt=**a** <b>cat</b>'" in made and "--seed=7" in made
    assert shlex.split(again) == ["python", "-m", "probe", "rerun", str(path)]
