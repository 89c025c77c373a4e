"""Whatever is given, there comes an experiment or an ExperimentError of two lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.errors import ExperimentError
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment, load_experiment, parse_experiment
from probe.settings.noising import load_noising

FIELDS = [
    *Experiment.model_fields,
    *CaptureOptions.model_fields,
    *(f"capture.{name}" for name in CaptureOptions.model_fields),
]
ODD_NAMES = [
    "",
    ".",
    "..",
    "capture.",
    ".capture",
    "capture..text",
    "capture.text.x",
    "scheduler_options.",
    "scheduler_options.a.b",
    "steps.x",
    "a" * 300,
]
ODD = [
    *(
        "",
        " ",
        "~",
        "~/x",
        "~nobody-of-this-name/x",
        "all",
        ":",
        "::",
        "1:2:0",
        "0,5,-1",
        "*",
        "nan",
        "\x00",
        "\u202e",
        "\ud800",
        "x" * 20_000,
    ),
    *(
        0,
        -1,
        2**63,
        10**400,
        True,
        False,
        None,
        float("nan"),
        float("inf"),
        1e308,
        b"x",
        1j,
        Path("x"),
        object(),
        Experiment(),
    ),
]

names = st.one_of(st.sampled_from(FIELDS), st.sampled_from(ODD_NAMES), st.text(max_size=5))
keys = st.one_of(names, st.integers(-2, 2), st.none(), st.booleans(), st.tuples(st.integers()))
leaves: Any = st.one_of(
    st.sampled_from(range(len(ODD))).map(lambda index: ODD[index]),
    st.integers(-5, 100),
    st.text(max_size=8),
    st.floats(),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=6,
)


def only_an_experiment_error(load: Any, *arguments: Any, **overrides: Any) -> None:
    told = ("a cause", "")
    try:
        load(*arguments, **overrides)
    except ExperimentError as error:
        told = error.cause, error.remedy
    assert told[0] and "".join(told).isprintable()


@pytest.mark.parametrize(
    "asked",
    [
        {"capture.": {1: 2}},
        {"capture": {1: 2}},
        {"capture.": {}},
        {"scheduler_options": {1: 2}},
        {"capture": {"text.": 1}},
    ],
)
def test_a_name_that_is_none_is_said_to_be(asked: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError):
        load_experiment(asked)


@pytest.mark.parametrize(
    "value",
    ODD,
    ids=lambda value: (
        f"{type(value).__name__}-{str(value)[:8]!a}"
        if not isinstance(value, int)
        else type(value).__name__
    ),
)
def test_every_field_takes_or_refuses_an_odd_value(value: Any) -> None:
    for name in FIELDS:
        only_an_experiment_error(load_experiment, {name: value})


@settings(max_examples=400)
@given(st.dictionaries(keys, values, max_size=4))
def test_any_mapping(asked: dict[Any, Any]) -> None:
    only_an_experiment_error(load_experiment, asked)
    only_an_experiment_error(load_noising, asked)


@settings(max_examples=200)
@given(st.dictionaries(names, values, max_size=3))
def test_any_override(changes: dict[str, Any]) -> None:
    changes.pop("source", None)
    only_an_experiment_error(load_experiment, Experiment(), **changes)


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [*"{}[]:,-&*!|>'\"#%@`?\n\t ", "- ", ": ", "<<: ", "--- ", "...", *FIELDS]
            ),
            st.text(max_size=3),
        ),
        max_size=12,
    )
)
def test_any_text(parts: list[str]) -> None:
    only_an_experiment_error(parse_experiment, "".join(parts))


@settings(max_examples=60)
@given(st.binary(max_size=40))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    only_an_experiment_error(load_experiment, file)
