"""A recording's root attributes: what opens, what is refused and how, and what both say of them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from probe.errors import RecordingDamaged
from probe.format.attributes import Attributes, Part, attributes_of, json_schema, problem_of, table
from probe.reading.recording import Run
from probe.reading.untrusted import check_attributes
from probe.testing.synthetic import synthetic_recording


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_recording(tmp_path_factory.mktemp("attributes") / "cat.zarr", unknown=True)


@pytest.fixture
def raw(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["attributes"]
    return found


def test_they_are_typed_and_as_in_the_file(path: Path, raw: dict[str, Any]) -> None:
    found = Run(path).attributes
    assert (found.model.dtype, found["model"]["dtype"]) == ("float32", "float32")
    assert found.scheduler.kind == found["scheduler"]["class"] == "DDIMScheduler"
    assert (found.family, found.guidance_rule, found.format_status) == (
        "sd",
        "classifier_free",
        "draft",
    )
    assert (
        dict(found) == raw and found == raw and list(found) == list(raw) and len(found) == len(raw)
    )
    assert (
        found["of_the_future"] == {"octaves": 3}
        and found.get("nothing", 5) == 5
        and "noising" not in found
    )
    assert found.noising is None and found.experiment.images == 1
    with pytest.raises(ValidationError, match="frozen"):
        found.status = "failed"  # type: ignore[misc]


def test_what_was_asked_is_there_for_each_kind(raw: dict[str, Any]) -> None:
    asked = {
        "caption": "a cat",
        "model": "x",
        "timesteps": [500],
        "noises": 2,
        "seed": 1,
        "later": 3,
    }
    old = {**raw, "noising": asked}
    new = {key: value for key, value in old.items() if key != "experiment"} | {"kind": "noising"}
    for told in (old, new):
        assert problem_of(told) is None
        found = attributes_of(told)
        assert (found.kind, found.across, found.recipe, found.texts["cond"], found.is_guided) == (
            "noising",
            "draw",
            asked,
            "a cat",
            False,
        )
    assert (
        attributes_of(raw).kind == "generation"
        and attributes_of(raw).is_guided
        and attributes_of(raw).across == "image"
    )
    assert problem_of({**raw, "kind": "noising"}) == "its noising is missing"
    assert problem_of({**new, "kind": "generation"}) == "its experiment is missing"
    assert (
        problem_of({**raw, "kind": "dream"})
        == "its kind is not what a recording has there, 'generation' or 'noising'"
    )


WRONG: dict[str, tuple[str, Any, str]] = {
    "a word that is none": (
        "status",
        "perfect",
        "status is not what a recording has there, 'running', 'complete', 'interrupted' or "
        "'failed'",
    ),
    "text for a number": (
        "experiment.steps",
        "4",
        "experiment.steps is not what a recording has there, a valid integer",
    ),
    "truth for a number": ("experiment.seed", True, "experiment.seed is not what"),
    "truth for a version": ("text_rules", True, "text_rules is not what"),
    "a part for a whole": ("experiment.images", 1.5, "experiment.images is not what"),
    "a number without end": (
        "experiment.guidance_scale",
        float("inf"),
        "experiment.guidance_scale is not what",
    ),
    "a number of 4000 digits": ("experiment.seed", 10**4000, "experiment.seed is not what"),
    "text that moves the cursor": (
        "model.name",
        "\x1b[2J",
        "model.name is not what a recording has there",
    ),
    "half a character": ("model.name", "\ud800", "model.name is not what"),
    "text that runs backwards": ("experiment.prompt", "\u202e", "experiment.prompt is not what"),
    "a text without end": ("created", "x" * 20_001, "created is not what"),
    "a list for an object": ("scheduler", [1], "scheduler is not what"),
    "null for a noising": ("noising", None, "noising is not what a recording has there"),
    "a layout that is none": (
        "memory_format",
        {"clean": "round"},
        "memory_format.clean is not what",
    ),
    "a count below one": (
        "decoded_not_finite",
        {"images/final": 0},
        "decoded_not_finite.images/final is not what",
    ),
    "a name that moves the cursor": ("read_as", {"\x1b[2J": "x"}, "is not what"),
    "too many names": ("read_as", {str(i): "x" for i in range(1001)}, "read_as is not what"),
}


def put(raw: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(raw)
    *outer, last = place.split(".")
    inner = changed
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return changed


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_attribute_is_named(what: str, raw: dict[str, Any]) -> None:
    place, value, told = WRONG[what]
    with pytest.raises(RecordingDamaged, match=re.escape(told)) as caught:
        check_attributes(Path("cat.zarr"), changed := put(raw, place, value))
    assert caught.value.remedy and len(caught.value.cause) < 300
    assert caught.value.cause.isprintable(), "the message does not repeat what it refuses"
    with pytest.raises(ValidationError):
        attributes_of(changed)


def required(part: type[Part], above: str = "") -> list[str]:
    found = []
    for name, field in part.model_fields.items():
        if field.is_required():
            place = above + (field.alias or name)
            inner = (
                field.annotation
                if isinstance(field.annotation, type) and issubclass(field.annotation, Part)
                else None
            )
            found += [place, *(required(inner, f"{place}.") if inner else [])]
    return found


@pytest.mark.parametrize("place", required(Attributes))
def test_a_missing_attribute_is_named(place: str, raw: dict[str, Any]) -> None:
    outer, _, last = place.rpartition(".")
    (raw[outer] if outer else raw).pop(last)
    with pytest.raises(RecordingDamaged, match=rf"its {re.escape(place)} is missing"):
        check_attributes(Path("cat.zarr"), raw)


def test_another_format_is_told_before_anything_else(raw: dict[str, Any]) -> None:
    with pytest.raises(
        RecordingDamaged, match="has format 99, this version reads 1 and 2"
    ) as caught:
        check_attributes(Path("cat.zarr"), {"format_version": 99})
    assert caught.value.remedy == "Use the version of probe that wrote it."
    assert problem_of(raw) is None and problem_of({**raw, "format_version": 1}) is None


def test_the_quick_check_accepts_what_the_models_accept(raw: dict[str, Any]) -> None:
    """It is made of the models' schema: every value that one refuses, the other refuses."""
    strange: list[Any] = [
        None,
        True,
        0,
        -1,
        1.5,
        "",
        "x",
        "\x1b",
        [],
        [1],
        {},
        {"x": 1},
        {"x": "y"},
        2**70,
    ]
    both = 0
    for place in [*required(Attributes), *(name for name in Attributes.model_fields)]:
        for value in strange:
            changed = put(raw, place, value)
            try:
                attributes_of(changed)
                fits = True
            except ValidationError:
                fits = False
            assert (problem_of(changed) is None) == fits, (place, value)
            both += fits
    assert both, "nothing was accepted"


def test_checking_is_quick(raw: dict[str, Any]) -> None:
    """A listing checks thousands; 4 us on a quiet machine."""
    assert min(timeit.repeat(lambda: problem_of(raw), number=200, repeat=20)) / 200 < 60e-6


def test_the_json_schema_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "probe.format.attributes"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found == json_schema() and found["type"] == "object"
    assert {"format_version", "status", "model", "scheduler"} <= set(found["required"])
    assert found["anyOf"] == [{"required": ["experiment"]}, {"required": ["kind", "noising"]}]
    assert found["$defs"]["Scheduler"]["required"] == ["class", "config"]


def test_the_table_has_every_attribute() -> None:
    rows = table().splitlines()[2:]
    assert [row for row in rows if "| None |" in row or "|  |" in row] == []
    assert len(rows) == len({row.split("|")[1] for row in rows})
    for name in Attributes.model_fields:
        assert any(row.startswith(f"| `{name}` |") for row in rows), name
