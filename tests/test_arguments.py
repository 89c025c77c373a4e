"""A wrong argument raises an error of ours: never a raw TypeError, never another number.

Every argument of the reading API is tried with values that people pass by mistake, on one
recording.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import xarray as xr

from probe import analysis, noising
from probe.errors import (
    ExperimentError,
    ProbeError,
    PromptError,
    RecordingNotFound,
    UserError,
)
from probe.proof.verdict import asked_steps
from probe.reading.choice import slice_of
from probe.reading.listing import list_runs
from probe.reading.recording import Run, open_run
from probe.reading.trajectories import trajectories
from probe.running.recorder import record, record_noising, rerun, resume
from probe.settings.experiment import load_experiment
from probe.settings.noising import Noising, load_noising
from probe.terminal import overrides

STEPS = 4  # PNDM calls the model once more
ODD: list[Any] = [
    *(
        5,
        -99,
        0.5,
        float("nan"),
        True,
        None,
        "x",
        "",
        "a\nb",
        b"cat",
        [0],
        [0.5],
        [True],
        [None],
        ["x"],
        [[0]],
        [],
        (),
        {},
        {"a": 1},
        set(),
    ),
    *(
        slice("a"),
        slice(0, 1, 0),
        object(),
        lambda: 1,
        range(3),
        np.float64(1),
        np.True_,
        np.array(1.0),
        np.array(2),
        np.array([0.5]),
    ),
    *(
        np.zeros((2, 2)),
        np.array(["x"]),
        np.zeros(3, bool),
        xr.DataArray(1),
        xr.DataArray([1.0, 2.0], dims="x"),
        xr.Dataset(),
        10**30,
        1j,
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    asked = {
        "prompt": "a cat and a hat",
        "steps": STEPS,
        "output": str(tmp_path_factory.mktemp("runs")),
        "capture": {"branches": "both"},
    }
    return record(asked, pipeline=tiny.pipeline(), progress=False)


def assert_ours(what: str, call: Callable[[], object]) -> bool:
    """Whether it was refused, which has to be with cause and remedy."""
    try:
        call()
    except ProbeError as error:
        if not (error.cause and error.remedy) or "\n" in error.cause + error.remedy:
            pytest.fail(f"{what}: {error}")
        return True
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__}: {error}")
    return False


def same(a: xr.DataArray, b: xr.DataArray) -> bool:
    return bool(a.equals(b))


METHODS: dict[str, dict[str, Any]] = {  # the arguments without which a method cannot be called
    "attention": {},
    "contribution": {},
    "tokens": {},
    "cut": {},
    "read_as": {},
    "token_maps": {},
    "word_maps": {},
    "phrase": {"text": "cat"},
    "against_others": {},
    "mass": {},
    "variable": {"path": "sigma"},
    "prediction": {},
    "eps": {},
    "v": {},
    "denoised": {},
    "preview": {},
    "verify": {},
    "diff": {},
    "save": {},
    "player": {},
}
CHOICES = ("of", "branch", "steps", "layers", "heads", "images", "over", "grid", "method", "weigh")


def arguments() -> Iterator[tuple[str, str]]:
    for name in METHODS:
        for argument, parameter in inspect.signature(getattr(Run, name)).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                yield from ((name, choice) for choice in CHOICES)
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                yield name, f"*{argument}"
            elif argument != "self":
                yield name, argument


# tests/test_memory.py gives odd paths to `save`, tests/test_pair.py odd parents
ELSEWHERE = {"said", "save", "against_parent"}


def test_every_public_method_with_arguments_is_here() -> None:
    taking = {
        name
        for name, method in inspect.getmembers(Run, inspect.isfunction)
        if name[0] != "_" and len(inspect.signature(method).parameters) > 1
    }
    assert taking == {*METHODS, *ELSEWHERE}


@pytest.mark.parametrize(("method", "argument"), list(arguments()))
def test_an_odd_value_is_an_answer_or_an_error_of_ours(
    run: Run, method: str, argument: str
) -> None:
    calls = [
        functools.partial(getattr(run, method), value)
        if argument[0] == "*"
        else functools.partial(getattr(run, method), **{**METHODS[method], argument: value})
        for value in ODD
    ]
    refused = [
        assert_ours(f"{method}({argument}={value!r})", call)
        for value, call in zip(ODD, calls, strict=True)
    ]
    assert sum(refused) > len(ODD) / 2


def test_odd_steps_are_refused_before_the_model_is_asked(run: Run) -> None:
    refused = [
        assert_ours(f"steps={value!r}", lambda value=value: asked_steps(run, value))
        for value in ODD
    ]
    assert sum(refused) > len(ODD) / 2
    calls = run.variable("committed").size
    assert asked_steps(run, [0, -1]) == asked_steps(run, "0,-1") == [0, calls - 1] and asked_steps(
        run, slice(3, 99)
    ) == [3, 4]
    with pytest.raises(ExperimentError, match="steps: 9 is not a committed step"):
        asked_steps(run, [9])


NO_INDICES: list[Any] = [
    [0.5],
    [True],
    True,
    1.0,
    [None],
    np.array([0.5]),
    np.array([1.0]),
    np.array([[0]]),
    [np.True_],
    np.True_,
    np.array([True] * 9),
]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((setting, value) for setting in ("steps", "heads", "images") for value in NO_INDICES),
        ("heads", "0"),
        ("images", "0"),
    ],
)
def test_what_is_no_index_is_never_read_as_one(run: Run, setting: str, value: Any) -> None:
    for read in (
        run.token_maps,
        run.word_maps,
        run.mass,
        run.against_others,
        lambda **choice: run.phrase("cat", **choice),
    ):
        with pytest.raises(ExperimentError, match=setting) as error:
            read(**{setting: value})
        assert error.value.remedy


def test_masks_slices_and_text_choose_what_they_say(run: Run) -> None:
    calls = len(run.steps)
    mask = np.arange(calls) % 2 == 0
    assert same(run.word_maps(steps=mask), run.word_maps(steps=np.flatnonzero(mask)))
    assert same(
        run.word_maps(steps=xr.DataArray(mask, dims="step")), run.word_maps(steps=[0, 2, 4])
    )
    heads = run.attention().sizes["head"]
    assert same(run.word_maps(heads=np.arange(heads) == 1), run.word_maps(heads=1))
    assert same(run.word_maps(heads=slice(0, 1)), run.word_maps(heads=np.int64(0)))
    assert same(run.word_maps(images=np.array([True])), run.word_maps())
    assert same(run.word_maps(steps="0:2"), run.word_maps(steps=slice(0, 2)))
    assert same(run.word_maps(steps="all"), run.word_maps())
    assert same(run.word_maps(steps="0,-1"), run.word_maps(steps=[0, -1]))
    assert same(run.word_maps(over="layer"), run.word_maps(over=["layer"]))
    with pytest.raises(ExperimentError, match=f"Give one truth value for each of the {calls}"):
        run.word_maps(steps=mask[:-1])


def test_indices_in_disorder_are_no_slice(run: Run) -> None:
    """[0, 0, 2] was read as 0 to 2, and [0, 2, 1, 3] as 0 to 3."""
    assert isinstance(slice_of(np.array([0, 0, 2])), np.ndarray) and isinstance(
        slice_of(np.array([0, 2, 1, 3])), np.ndarray
    )
    assert slice_of(np.array([2, 3, 4])) == slice(2, 5)
    assert list(run.token_maps(steps=[0, 2, 1, 3])["step"].values) == [0, 2, 1, 3]
    every = run.token_maps()
    assert np.array_equal(run.token_maps(steps=[0, 0, 2]).values, every.values[[0, 0, 2]])


@pytest.mark.parametrize("branch", ["x", 5, "", [0], "Cond"])
def test_a_branch_is_named_as_a_branch(run: Run, branch: Any) -> None:
    for read in (
        run.prediction,
        run.eps,
        run.v,
        run.denoised,
        run.tokens,
        run.cut,
        run.read_as,
        lambda b: run.word_maps(branch=b),
    ):
        with pytest.raises(ExperimentError, match="There is no branch") as error:
            read(branch)
        assert isinstance(error.value, ValueError) and "cond" in error.value.remedy
    with pytest.raises(
        ExperimentError, match=r"branch may be None \(what the scheduler got\), 'cond' or 'uncond'"
    ):
        run.prediction("x")


def test_an_attribute_that_is_not_there_is_not_damage(run: Run, tmp_path: Path) -> None:
    for place in (
        ("x",),
        ("noising",),
        ("model", "x"),
        ("created", "2"),
        ("scheduler", "class", "x"),
    ):
        with (
            pytest.warns(DeprecationWarning, match="renamed"),
            pytest.raises(RecordingNotFound, match="has no attribute") as error,
        ):
            run.said(*place)
        assert "damaged" not in str(error.value) and "remove" not in str(error.value)
    with pytest.warns(DeprecationWarning, match="renamed"), pytest.raises(ExperimentError):
        run.said(5)  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match="no path"):
        Run(5)  # type: ignore[arg-type]


def test_what_is_said_of_some(run: Run) -> None:
    for call, said in (
        (lambda: run.attention(8), "Give one of: "),  # type: ignore[arg-type]
        (lambda: run.phrase(["cat"]), "text is ['cat'], which is no text."),  # type: ignore[arg-type]
        (lambda: run.word_maps(bands=-1), "Give a number of bands from 1"),
        (lambda: run.word_maps(bands=False), "Give a number of bands from 1"),
        (lambda: run.word_maps(bands=[0, 0]), "at least two edges that rise"),
        (lambda: run.word_maps(grid=(0, 4)), "Give (y, x)"),
        (lambda: run.word_maps(steps="x"), "is not a choice of steps"),
    ):
        with pytest.raises(ExperimentError) as error:
            call()
        assert said in str(error.value)
    with pytest.raises(PromptError):
        run.phrase("")


# --- analysis -------------------------------------------------------------------------------------


# functions whose `maps` are those of tokens
OF_TOKENS = ("combined", "by_sigma", "token_kinds", "word_maps", "head_statistics")
# optional arguments that are checked, beside all that are not optional
CHECKED = (
    *("bands", "over", "seed", "level", "merge", "method", "weigh"),
    *("resamples", "classes", "pool", "least", "sigma", "kinds", "guidance_rescale"),
)


UMAPS = ("umap_map", "aligned_map")  # which compile themselves
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in UMAPS else name
    for name in analysis.__all__
]


@pytest.mark.parametrize("name", NAMES)
def test_analysis_of_what_is_no_array(run: Run, name: str) -> None:
    """In place of each argument, the others being right."""
    maps = run.attention().sel(branch="cond")
    words = analysis.word_maps(maps.mean(("layer", "head")))
    masks = words > 0
    scores = xr.DataArray(np.arange(12.0).reshape(4, 3), dims=("scene", "head"))
    good: dict[str, Any] = {
        "maps": maps if name in OF_TOKENS else words,
        "words": words,
        "masks": masks,
        "truth": masks,
        "values": maps,
        "scores": scores,
        "stored": maps.values,
        "text": "cat",
        "at": 0.5,
        "grid": (4, 4),
        "how": "cosine" if name == "overlap" else "none",
        "sizes": None,
        "uncond": run.latents,
        "cond": run.prediction("cond"),
        "prediction": run.prediction(),
        "one": run.images,
        "two": run.images,
        "guidance_scale": 3.0,
        "points": trajectories([run]),
        "position": analysis.pca(trajectories([run]))["position"].rename(component="axis"),
    }
    if name == "contribution":
        good["maps"] = run.attention()
        good["sizes"] = run.variable(f"attention/{run.grids[0]}/value_size")
    function: Callable[..., Any] = getattr(analysis, name)
    parameters = inspect.signature(function).parameters
    right = {
        key: good[key]
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    if name == "by_sigma":
        right["sigma"] = run.variable("sigma")
    # one run is aligned with nothing, and umap-learn need not be there
    with contextlib.suppress(*((UserError,) if name in UMAPS else ())):
        function(**right)
    for key in (key for key in parameters if key in (*right, *CHECKED)):
        for value in ODD:
            call = functools.partial(function, **{**right, key: value})
            assert_ours(f"{name}({key}={value!r})", call)


@pytest.mark.parametrize("make", [analysis.umap_map, analysis.aligned_map])
def test_a_seed_that_umap_cannot_take_is_refused_before_umap_is_needed(
    make: Callable[..., Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    points = trajectories([run, run])
    with pytest.raises(ExperimentError, match="seed is 4294967296"):
        make(points, seed=2**32)
    with pytest.raises(UserError, match="UMAP is not installed"):
        make(points, seed=2**32 - 1)


def test_average_precision_takes_a_plain_mask(run: Run) -> None:
    maps = run.phrase("cat", over=("step", "layer", "head"))
    mask = np.zeros((maps.sizes["y"], maps.sizes["x"]), bool)
    mask[1:3, 2:] = True
    found = analysis.average_precision(maps, mask)
    assert same(found, analysis.average_precision(maps, xr.DataArray(mask, dims=("y", "x"))))
    assert same(
        analysis.iou(maps > 0.1, mask),
        analysis.iou(maps > 0.1, xr.DataArray(mask, dims=("y", "x"))),
    )
    for wrong, said in (
        (mask[1:], "an array of shape"),
        (mask.astype(int), "mask > 0"),
        (mask.tolist(), "is no mask"),
        (None, "is no mask"),
    ):
        with pytest.raises(ExperimentError) as error:
            analysis.average_precision(maps, wrong)  # type: ignore[arg-type]
        assert said in str(error.value)
    for scores in ([found, found], "x", found):
        with pytest.raises(ExperimentError, match=r'xarray.concat\(\[...\], dim="scene"\)'):
            analysis.ranked_heads(scores)  # type: ignore[arg-type]


# --- what is asked --------------------------------------------------------------------------------


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    asked = load_experiment(
        {
            "steps": np.int64(3),
            "capture": {"steps": [np.int32(0), np.uint8(2)]},
            "scheduler_options": {"x": np.int16(4)},
        }
    )
    assert asked == load_experiment(
        {"steps": 3, "capture": {"steps": [0, 2]}, "scheduler_options": {"x": 4}}
    )
    assert type(asked.steps) is int and load_experiment(asked, seed=np.uint64(7)).seed == 7
    assert (
        load_noising({"timesteps": [np.int64(5), np.int32(9)]}).timesteps
        == (9, 5)
        == load_noising({"timesteps": np.array([5, 9])}).timesteps
    )
    assert load_noising({"timesteps": range(100, 400, 100)}).timesteps == (
        300,
        200,
        100,
    ) and load_noising({"timesteps": 500}).timesteps == (500,)
    for wrong in (True, np.True_, np.float64(3), 3.0, "3", np.array([3])):
        with pytest.raises(ExperimentError, match=r"steps: .* is not a whole number"):
            load_experiment({"steps": wrong})
    for some in ([True], [np.True_], [5.0], np.array([5.0]), np.array([True])):
        with pytest.raises(ExperimentError, match="is no choice of timesteps"):
            load_noising({"timesteps": some})


@pytest.mark.parametrize(
    "text", ["[900, 500, 100]", "[100,500,900]", "100,500,900", "900, 500, 100", "100:901:400"]
)
def test_timesteps_are_written_on_the_command_line_as_in_yaml(text: str, tmp_path: Path) -> None:
    options = noising.parser().parse_args(["--timesteps", text])
    assert load_noising({}, **overrides(options, Noising)).timesteps == (900, 500, 100)
    (tmp_path / "x.yaml").write_text(f"timesteps: {text}\n")
    assert load_noising(tmp_path / "x.yaml").timesteps == (900, 500, 100)


@pytest.mark.parametrize("text", ["900:100:-100", "x", "[1:5]", "[]", "[100", "1,,2"])
def test_the_remedy_for_timesteps_is_what_both_accept(text: str) -> None:
    with pytest.raises(ExperimentError, match="is no choice of timesteps") as error:
        load_noising({"timesteps": text})
    for example in ("100,500,900", "100:1000:100"):
        assert example in error.value.remedy and load_noising({"timesteps": example})


def test_a_line_says_which_character_is_wrong() -> None:
    with pytest.raises(ExperimentError, match=r"output: .* has a newline \(U\+000A\)") as error:
        load_experiment({"output": "a\nb"})
    assert error.value.remedy == "Delete the newline."
    with pytest.raises(ExperimentError, match=r"has a tab \(U\+0009\)"):
        load_experiment({"model": "a\tb"})
    with pytest.raises(ExperimentError, match="output: the text is empty"):
        load_experiment({"output": ""})
    assert load_experiment({"output": "a'\"b"}).output == "a'\"b"


def test_lcm_says_how_many_steps_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="its original_inference_steps are 50") as error:
        record(
            {"steps": 51, "scheduler": "LCM", "output": str(tmp_path)},
            pipeline=tiny.pipeline(),
            progress=False,
        )
    assert "original_inference_steps: 51" in error.value.remedy
    asked = {
        "prompt": "a cat",
        "steps": 51,
        "scheduler": "LCM",
        "scheduler_options": {"original_inference_steps": 51},
        "output": str(tmp_path),
    }
    with pytest.raises(ProbeError, match="more than --max-bytes"):  # the remedy gets further
        record(asked, pipeline=tiny.pipeline(), progress=False, max_bytes=1)


@pytest.mark.parametrize(
    "options",
    [
        {"max_bytes": "1"},
        {"max_bytes": True},
        {"max_bytes": -1},
        {"max_bytes": 1.5},
        {"progress": "no"},
    ],
)
def test_the_options_of_record(tmp_path: Path, options: dict[str, Any]) -> None:
    for call in (
        lambda: record({"output": str(tmp_path)}, **options),
        lambda: record_noising("x.png", output=str(tmp_path), **options),
    ):
        with pytest.raises(ExperimentError, match=next(iter(options))):
            call()


PICTURE = np.zeros((32, 32, 3), np.uint8)
MASK = np.eye(32, dtype=bool)


@pytest.mark.parametrize(
    ("picture", "masks", "said"),
    [
        (PICTURE, [MASK], 'Give each mask with its word: {"cat": mask}.'),
        (PICTURE, {5: MASK}, "5 is not a word"),
        (PICTURE, {" ": MASK}, "is not a word"),
        (PICTURE, {"cat": MASK & False}, "that of 'cat' has nothing inside"),
        (PICTURE, {"cat": MASK.tolist()}, "is a list, not an array"),
        (PICTURE, {"cat": None}, "is a NoneType, not an array"),
        (PICTURE, {"cat": MASK * 0.5}, "write mask > 0.5"),
        (PICTURE, {"cat": MASK[None]}, "has shape (1, 32, 32)"),
        (PICTURE.tolist(), None, "picture: a list is neither a file nor an array"),
        (None, None, "picture: a NoneType is neither a file nor an array"),
    ],
)
def test_pictures_and_masks_of_a_noising(
    tmp_path: Path, picture: Any, masks: Any, said: str
) -> None:
    with pytest.raises(ExperimentError) as error:
        record_noising(
            picture, "a cat", masks, output=str(tmp_path), pipeline=tiny.pipeline(), progress=False
        )
    assert said in str(error.value) and error.value.remedy and not list(tmp_path.iterdir())


def test_a_mask_of_a_word_that_is_not_in_the_caption_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "noises": 1,
        "timesteps": [500],
        "output": str(tmp_path),
        "pipeline": tiny.pipeline(),
        "sheet": False,
    }
    record_noising(
        PICTURE, "a Cat, a hat", {"cat": MASK, "dog": MASK, "scuba diving": MASK}, **settings
    )
    assert "Masks of what is not in the caption: dog, scuba diving." in capsys.readouterr().err
    record_noising(PICTURE, "a cat, a hat", {"cat": MASK}, **settings)
    assert "not in the caption" not in capsys.readouterr().err


def test_what_is_no_recording_and_no_folder(tmp_path: Path) -> None:
    for again in (resume, rerun, rerun):
        with pytest.raises(ExperimentError, match="Open it first"):
            again("latest")  # type: ignore[arg-type]
    for calls in (lambda: open_run("latest", 5), lambda: open_run("x", None), lambda: list_runs(5)):  # type: ignore[arg-type]
        with pytest.raises(ExperimentError, match="is no folder"):
            calls()
