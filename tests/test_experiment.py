"""Experiments: what they accept, what they refuse and in which words. Nothing else comes out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from probe.errors import ExperimentError
from probe.settings.capture import CaptureOptions
from probe.settings.experiment import Experiment, load_experiment, parse_experiment
from probe.settings.fields import SCHEDULERS
from probe.settings.grid import load_grid
from probe.settings.strict_yaml import LARGEST, read_yaml

ROOT = Path(__file__).parents[1]
OTHERS = (
    "noising.yaml",
    "cost-sd14.yaml",
)  # tests/test_noising.py and tests/test_cost.py read them
SHIPPED = sorted(path for path in (ROOT / "experiments").glob("*.yaml") if path.name not in OTHERS)
GRIDS = [path for path in SHIPPED if "\naxes:\n" in path.read_text("utf-8")]
FILES = [path for path in SHIPPED if path not in GRIDS]
MODELS = (Experiment, CaptureOptions)

# remedies that several refusals share
WHOLE = "Write a whole number, without quotes or a point."
TEXT = 'Write text, in quotes: "..."'
OPTION = "Write a number, true, false, text or a list of numbers."
CHOICE = 'Write all, a slice such as "0:50:5", or indices such as "0,5,-1".'
GLOB = 'Write dotted paths such as "up_blocks.*", or a grid such as "16x16".'
LINES = "Write one `field: value` a line, and text with : or # in quotes."
HIDDEN = "Delete it: such characters hide what a file says."
ALIAS = "Write the value out, and text with & or * in quotes."
TAG = "Delete the tag, and put text with ! in quotes."


def refusal(text: str) -> tuple[str, str]:
    with pytest.raises(ExperimentError) as caught:
        parse_experiment(text, "x.yaml")
    return caught.value.cause, caught.value.remedy


def test_defaults() -> None:
    experiment = Experiment()
    assert experiment == load_experiment({})
    assert (experiment.model, experiment.scheduler) == ("emojiworld", "default")
    assert (experiment.steps, experiment.guidance_scale) == (50, 3.0)
    assert experiment.prompt == "An astronaut scuba diving"
    assert experiment.run_name == "an-astronaut-scuba-diving"
    assert (experiment.height, experiment.width) == (None, None)
    assert (experiment.images, experiment.seed) == (1, 0)
    assert experiment.capture == CaptureOptions(
        attention="maps", branches="cond", tokens="prompt", layers=("*",), steps="all"
    )


def test_frozen() -> None:
    with pytest.raises(ValidationError):
        Experiment().steps = 3


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_described_in_one_line(model: type[Experiment | CaptureOptions]) -> None:
    for name, field in model.model_fields.items():
        assert re.fullmatch(r"[^\n]+\.", field.description or ""), name


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_the_grids_we_ship_are_valid_and_say_how_they_are_begun(path: Path) -> None:
    assert 1 < load_grid(path, quick=True).count < load_grid(path).count
    assert f"python -m probe.sweep experiments/{path.name} --quick" in path.read_text("utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_we_ship_are_valid_and_round_trip(path: Path) -> None:
    experiment = load_experiment(path)
    assert load_experiment(experiment.resolved()) == experiment
    assert parse_experiment(yaml.safe_dump(experiment.resolved())) == experiment
    assert experiment.prompt == "An astronaut scuba diving"
    assert experiment.capture.branches == "both"


def test_the_files_we_ship_are_there() -> None:
    assert {"astronaut.yaml", "astronaut-sd14.yaml"} <= {path.name for path in FILES}
    assert {"guidance-grid.yaml", "word-ablation.yaml"} <= {path.name for path in GRIDS}


def test_round_trip_of_everything() -> None:
    capture = {
        "layers": ["up_blocks.*", "16x16"],
        "steps": [0, 5, -1],
        "activations": ["unet.mid_block.*"],
        "dtype": "sqrt_u8",
        "text": False,
    }
    options = {
        "beta_end": 0.02,
        "use_karras_sigmas": True,
        "trained_betas": [0.1, 1],
        "algorithm_type": "dpmsolver++",
        "solver_order": 3,
    }
    experiment = load_experiment(
        {
            "name": "all",
            "seed": LARGEST,
            "scheduler_options": options,
            "capture": capture,
            "prompt": "ein Astronaut, 宇航员 🧑‍🚀",
        }
    )
    again = parse_experiment(yaml.safe_dump(experiment.resolved(), allow_unicode=True))
    assert again == experiment
    assert again.identity() == experiment.identity()
    assert experiment.capture.steps == "0,5,-1"
    assert experiment.resolved()["scheduler_options"] == options
    assert {key: type(value) for key, value in again.scheduler_options.items()} == {
        "beta_end": float,
        "use_karras_sigmas": bool,
        "trained_betas": tuple,
        "algorithm_type": str,
        "solver_order": int,
    }


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        # fields and values
        ("stepss: 5", "stepss: unknown field", "Did you mean steps?"),
        ("tokens: all", "tokens: unknown field", "Did you mean capture.tokens?"),
        ("capture:\n  layer: ['*']", "capture.layer: unknown field",
            "Did you mean capture.layers?"),
        ("capture: {dtypes: x}", "capture.dtypes: unknown field", "Did you mean capture.dtype?"),
        ("num_inference_steps: 5", "num_inference_steps: unknown field", "Did you mean steps?"),
        ("zzz: 5", "zzz: unknown field",
            f"The fields here are {', '.join(Experiment.model_fields)}."),
        ("capture: {zzz: 5}", "capture.zzz: unknown field",
            f"The fields here are {', '.join(CaptureOptions.model_fields)}."),
        ("steps: 0\nimages: 0", "images: 0 is less than 1 (and 1 more)",
            "Write a number from 1 to 64."),
        ("images: 0\nstepss: 5\neta: 2", "stepss: unknown field (and 2 more)",
            "Did you mean steps?"),
        ("steps: 1001", "steps: 1001 is more than 1000", "Write a number from 1 to 1000."),
        ("seed: -1", "seed: -1 is less than 0", f"Write a number from 0 to {LARGEST}."),
        ("seed: " + "9" * 30, f"seed: {'9' * 30} is more than {LARGEST}",
            f"Write a number from 0 to {LARGEST}."),
        ("height: 4", "height: 4 is less than 8", "Write a number from 8 to 4096."),
        ("guidance_scale: -0.5", "guidance_scale: -0.5 is less than 0.0",
            "Write a number from 0 to 1000."),
        ("steps: yes", "steps: 'yes' is not a whole number", WHOLE),
        ("steps: 010", "steps: '010' is not a whole number", WHOLE),
        ("steps: true", "steps: True is not a whole number", WHOLE),
        ("steps: 5.0", "steps: 5.0 is not a whole number", WHOLE),
        ("eta: true", "eta: True is not a number", "Write a number, without quotes."),
        ("eta: '1'", "eta: '1' is not a number", "Write a number, without quotes."),
        ("eta: .nan", "eta: nan is not finite", "Write a finite number."),
        ("guidance_scale: 1e999", "guidance_scale: inf is not finite", "Write a finite number."),
        ("capture: {text: yes}", "capture.text: 'yes' is not true or false",
            "Write true or false."),
        ("capture: {text: 1}", "capture.text: 1 is not true or false", "Write true or false."),
        ("prompt: 2024", "prompt: 2024 is not text", TEXT),
        ("prompt:", "prompt: None is not text", TEXT),
        ("capture:", "capture: None is not a mapping", "Write its fields below it, or delete it."),
        ("scheduler_options: [1]", "scheduler_options: [1] is not a mapping",
            "Write names and values below it, or delete it."),
        ("prompt: " + "x" * 10_001, f"prompt: '{'x' * 56}... is too long",
            "At most 10000 fit here."),
        ("name: Big Name", "name: 'Big Name' does not fit",
            "Name of the recording: up to 60 of a-z, 0-9 and -; empty: made of the text."),
        ("device: gpu", "device: 'gpu' does not fit",
            "Where the model runs: auto, cpu, cuda, cuda:N or mps."),
        ("output: ''", "output: the text is empty", "Write something, or leave the field out."),
        ("dtype: float_16", "dtype: 'float_16' is not one of auto, float32, float16, bfloat16",
            "Did you mean float16?"),
        ("durability: x", "durability: 'x' is not one of step, run, none", "Write one of them."),
        ("revision: fp16", "revision: 'fp16' is not a revision any more",
            "Write variant: fp16 instead."),
        ("scheduler: ddim", "scheduler: 'ddim' is not a scheduler", "Did you mean DDIM?"),
        ("scheduler: dpm++ 2m", "scheduler: 'dpm++ 2m' is not a scheduler",
            "Did you mean DPM++2M?"),
        ("scheduler: HeunDiscreteScheduler",
            "scheduler: 'HeunDiscreteScheduler' is not a scheduler", "Did you mean Heun?"),
        ("scheduler: zzz", "scheduler: 'zzz' is not a scheduler",
            f"Write default, {', '.join(SCHEDULERS)}."),
        ("scheduler_options: {a: null}", "scheduler_options.a: None is not an option's value",
            OPTION),
        ("scheduler_options: {a: .inf}", "scheduler_options.a: inf is not an option's value",
            OPTION),
        ("capture: {layers: up}", "capture.layers: 'up' is not a list", 'Write a list: ["..."]'),
        ("capture: {layers: [a b]}", "capture.layers[0]: 'a b' is not a glob of layers", GLOB),
        ("capture: {steps: 0:9:0}", "capture.steps: '0:9:0' is not a choice of steps", CHOICE),
        ("capture: {steps: [1, true]}", "capture.steps: [1, True] is not text", TEXT),
        # YAML
        ("steps: 5\nseed: 1\nsteps: 6", "line 3: steps is written twice", "Keep one of the two."),
        ("capture:\n  text: true\n  text: false", "line 3: text is written twice",
            "Keep one of the two."),
        ("name: &a x", "line 1: anchors (&) and aliases (*) are not read here", ALIAS),
        ("name: *a", "line 1: anchors (&) and aliases (*) are not read here", ALIAS),
        ("&a name: x", "line 1: anchors (&) and aliases (*) are not read here", ALIAS),
        ("<<: {steps: 5}", "line 1: merge keys (<<) are not read here", "Write the fields out."),
        ("seed: 1\nname: !!str x", "line 2: tags (!) are not read here", TAG),
        ("name: !!python/object/apply:os.getcwd []", "line 1: tags (!) are not read here", TAG),
        ("[" * 9999, "line 1: nested more than 20 deep", "An experiment is at most 3 deep."),
        ("{a: " * 9999, "line 1: nested more than 20 deep", "An experiment is at most 3 deep."),
        ("? [a]\n: b", "line 1: a field's name must be plain text",
            "Write one `field: value` a line."),
        ("seed: " + "9" * 5000, "line 1: a number of 5000 characters",
            f"No number here is larger than {LARGEST}."),
        ("steps: 5\n---\nsteps: 6", "line 2: a second document begins",
            "Keep one experiment a file: delete the --- line."),
        ("- steps", "line 1: ['steps'] is not a mapping", "Write one `field: value` a line."),
        ("", "this file is empty",
            "Write `field: value` lines, such as prompt: An astronaut scuba diving."),
        ("# nothing", "this file is empty",
            "Write `field: value` lines, such as prompt: An astronaut scuba diving."),
        ("steps: 5\nprompt: a: b", "line 2: not YAML (mapping values are not allowed here)", LINES),
        ('prompt: "\\Uffffffff"', "not YAML (a character that cannot be read)", LINES),
        ("%YAML " + "9" * 5000 + ".1\n---\nx: 1", "not YAML (a character that cannot be read)",
            LINES),
        ("x: " + "x" * 70_000, "longer than 64 KB",
            "An experiment is a short text: is this the right file?"),
        ("seed: 1\nprompt: a\0", "line 2: the character U+0000 is not allowed", HIDDEN),
        ("prompt: a\u202eb", "line 1: the character U+202E is not allowed", HIDDEN),
        ("prompt: a\ud800", "line 1: the character U+D800 is not allowed", HIDDEN),
        ('prompt: "\\u202e"', "line 1: the character U+202E is not allowed", HIDDEN),
        ('prompt: "\\ud800"', "line 1: the character U+D800 is not allowed", HIDDEN),
        ('"\\e": 1', "line 1: the character U+001B is not allowed", HIDDEN),
    ],
    ids=lambda text: text[:24].encode("ascii", "backslashreplace").decode(),
)  # fmt: skip
def test_refusals(text: str, cause: str, remedy: str) -> None:
    assert refusal(text) == (f"x.yaml: {cause}", remedy)


def test_scalars_are_what_they_look_like() -> None:
    text = (
        "a: 1e-3\nb: -12\nc: yes\nd: 010\ne: 0x1F\nf: 1_000\ng: 1:30\nh: ~\ni: true\nj: '5'\n"
        "k: 2024-01-01\nl: .5\nm: off\nn: +3\no: 1e3\np: 0\nq: ٣"
    )
    assert list(read_yaml(text, "x").values()) == [
        0.001, -12, "yes", "010", "0x1F", "1_000", "1:30", None, True, "5",
        "2024-01-01", 0.5, "off", 3, 1000.0, 0, "٣",
    ]  # fmt: skip


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "astronaut.yaml").write_text("\ufeffsteps: 5\r\nprompt: a cat\r\n", "utf-8")
    (folder / "latin.yaml").write_bytes(b"prompt: \xe9")
    (folder / "long.yaml").write_bytes(b"# " + "é".encode() * 40_000)

    def failure(path: str | Path) -> tuple[str, str]:
        with pytest.raises(ExperimentError) as caught:
            load_experiment(path)
        return caught.value.cause, caught.value.remedy

    assert load_experiment("experiments/astronaut.yaml").prompt == "a cat"
    for name in ("experiments/astronot.yaml", "astronaut", "nowhere/astronaut.yaml"):
        assert failure(name) == (
            f"{name}: this file does not exist",
            "Did you mean experiments/astronaut.yaml?",
        )
    there = "There is experiments/astronaut.yaml, experiments/latin.yaml, experiments/long.yaml."
    assert failure("zzzzzz.yaml") == ("zzzzzz.yaml: this file does not exist", there)
    assert failure(Path("experiments/latin.yaml")) == (
        "experiments/latin.yaml: byte 8 is not UTF-8 text",
        "Save the file as UTF-8.",
    )
    assert failure("experiments/long.yaml")[0] == "experiments/long.yaml: longer than 64 KB"
    assert failure("experiments") == (
        "experiments: cannot be read (Is a directory)",
        "Name a YAML file that you may read.",
    )
    assert failure("a\0b") == (
        "a?b: cannot be read (embedded null byte)",
        "Name a YAML file that you may read.",
    )


def test_overrides_dotted_and_nested() -> None:
    base = load_experiment({"steps": 9, "capture": {"text": False}, "scheduler_options": {"a": 1}})
    changed = load_experiment(
        base,
        steps=5,
        capture={"dtype": "sqrt_u8"},
        **{"capture.branches": "both", "scheduler_options.b.c": 2},
    )
    assert (changed.steps, changed.capture.text) == (5, False)
    assert (changed.capture.dtype, changed.capture.branches) == ("sqrt_u8", "both")
    assert changed.scheduler_options == {"a": 1, "b.c": 2}
    assert base.scheduler_options == {"a": 1}
    assert load_experiment(base, scheduler_options={}).scheduler_options == {}
    assert load_experiment(base, capture=CaptureOptions()).capture.text
    mixed = load_experiment({"capture": CaptureOptions(text=False), "capture.dtype": "float32"})
    assert mixed.capture.text is False
    assert load_experiment(base) is base


@pytest.mark.parametrize(
    ("source", "overrides", "cause"),
    [
        ({}, {"steps": 0}, "steps: 0 is less than 1"),
        ({}, {"capture.dtypes": 1}, "capture.dtypes: unknown field"),
        ({}, {"steps.a": 1}, "steps: {'a': 1} is not a whole number"),
        ({"capture": 5}, {"capture.text": True}, "experiment: capture: 5 is not a mapping"),
        ({1: 2}, {}, "1: this is not a field's name"),
        ({"\ud800": 2}, {}, "'\\ud800': this is not a field's name"),
        ({"prompt": "a\ud800"}, {}, "experiment: prompt: the character U+D800 is not allowed"),
        ({"seed": 10**5000}, {}, f"experiment: seed: this int is more than {LARGEST}"),
        ({"eta": 10**5000}, {}, "experiment: eta: this int is not a number"),
        (
            {"scheduler_options": {"a": 2**64}},
            {},
            f"experiment: scheduler_options.a: {2**64} is not an option's value",
        ),
    ],
)
def test_mappings_and_overrides_that_make_no_sense(
    source: dict[str, Any], overrides: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(source, **overrides)
    assert caught.value.cause == cause
    assert "\n" not in caught.value.remedy


def test_a_validation_error_does_not_print_its_input() -> None:
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate({"steps": "x" * 1000})
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "calls", "indices"),
    [
        ("all", 3, (0, 1, 2)),
        ("0:50:20", 50, (0, 20, 40)),
        ("::-1", 3, (0, 1, 2)),
        ("-2:", 5, (3, 4)),
        (":99", 2, (0, 1)),
        (":", 1, (0,)),
        ("0, 5, -1", 10, (0, 5, 9)),
        ("3,-1,3", 4, (3,)),
        (7, 8, (7,)),
        ([2, 0, -8], 8, (0, 2)),
    ],
)  # fmt: skip
def test_steps_of(steps: Any, calls: int, indices: tuple[int, ...]) -> None:
    assert load_experiment({"capture": {"steps": steps}}).capture.steps_of(calls) == indices


@pytest.mark.parametrize(
    ("steps", "cause"),
    [
        ("0,8", "8 is not a step of this run"),
        ("-9", "-9 is not a step of this run"),
        ("5:2", "'5:2' chooses no step of this run"),
        ("8:", "'8:' chooses no step of this run"),
    ],
)  # fmt: skip
def test_steps_of_out_of_range(steps: str, cause: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        CaptureOptions(steps=steps).steps_of(8)
    assert caught.value.cause == f"capture.steps: {cause}"
    assert (
        caught.value.remedy
        == "This run calls its model 8 times: write indices from 0 to 7, or from -8 to -1."
    )


@pytest.mark.parametrize(
    "steps",
    [
        "",
        "1 2",
        "1,,2",
        "1:2:3:4",
        "0:5:00",
        "::" + "9" * 5000,
        "9" * 9,
        "ALL",
        [],
        [1.0],
        1.0,
        10**9,
        None,
        {},
    ],
)
def test_steps_that_are_not_a_choice(steps: Any) -> None:
    with pytest.raises(ExperimentError, match=r"capture\.steps: "):
        load_experiment({"capture": {"steps": steps}})


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("Café, au lait!", "cafe-au-lait"),
        ("宇航员", "run"),
        ("", "run"),
        ("a photograph of an astronaut riding a horse", "a-photograph-of-an-astronaut-riding-a"),
        ("x" * 99, "x" * 40),
        ("../../etc/passwd", "etc-passwd"),
    ],
)  # fmt: skip
def test_run_name(prompt: str, slug: str) -> None:
    assert Experiment(prompt=prompt).run_name == slug
    assert Experiment(prompt=prompt, name="mine").run_name == "mine"


def test_identity_is_of_what_was_asked() -> None:
    base = Experiment()
    assert len(base.identity()) == 8
    assert set(base.identity()) <= set("0123456789abcdef")
    assert (
        base.identity() == load_experiment(base, name="x", output="y", durability="none").identity()
    )
    assert (
        load_experiment(base, guidance_scale=5).identity()
        == load_experiment(base, guidance_scale=5.0).identity()
    )
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"prompt": "a cat"},
        {"capture.text": False},
        {"scheduler_options.a": 1},
        {"steps": 51},
    ]
    assert len(
        {base.identity(), *(load_experiment(base, **other).identity() for other in others)}
    ) == 1 + len(others)


def test_scheduler_names_are_diffusers_classes() -> None:
    import diffusers

    for kind, extra in SCHEDULERS.values():
        scheduler = getattr(diffusers, kind)
        assert set(extra) <= set(scheduler._get_init_keys(scheduler))


def test_import_is_light() -> None:
    code = (
        "import sys, probe.settings.experiment; print(*{'torch', 'numpy', 'diffusers', 'tyro', "
        "'xarray'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == ""
    )


SHIPPED = [path.read_text("utf-8") for path in FILES]
SNIPPETS = [
    "\n",
    ": ",
    "- ",
    "&a ",
    "*a",
    "!x ",
    "<<: ",
    "{",
    "]",
    "'",
    '"',
    "\\u0000",
    "9" * 50,
    "\t",
    "--- ",
    "|\n ",
    "? ",
    "\ud800",
]
FRAGMENT = st.sampled_from(SNIPPETS) | st.text(st.characters(), max_size=8)
KEYS = st.sampled_from(
    [*Experiment.model_fields, *CaptureOptions.model_fields, "capture.steps", "capture.layers"]
) | st.text(st.characters(), max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.binary(max_size=3)
    | st.builds(lambda: 10**5000)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(FRAGMENT) + text[start + draw(st.integers(0, 20)) :]
    return text


def only_experiment_errors(source: Any) -> None:
    try:
        experiment = (
            parse_experiment(source) if isinstance(source, str) else load_experiment(source)
        )
    except ExperimentError as error:
        problem = error
    else:
        assert load_experiment(experiment.resolved()) == experiment
        assert len(experiment.identity()) == 8
        return
    assert problem.cause
    assert len(problem.cause) < 400
    assert (problem.cause + problem.remedy).isprintable()


@settings(max_examples=200, deadline=None)
@given(mutated() | st.lists(FRAGMENT).map("".join))
def test_no_text_raises_anything_else(text: str) -> None:
    only_experiment_errors(text)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_no_mapping_raises_anything_else(source: dict[str, Any]) -> None:
    only_experiment_errors(source)
