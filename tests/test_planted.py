"""Each fault planted in the recorder is caught by a check that is named here.

Files, checksums and manifest agree with the fault. A plant changes what a step hands to the writer,
what a label is made from, or what a hook computes, while a run is recorded. The run is recorded to
its end, then verified with the model. The second column of `PLANTS` says which checks of the
recording alone fail, the third which checks that ask the model. Where the second is empty, only the
model can know. The last tests plant nothing, and nothing may fail.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import take

from probe.format.schema import ArraySpec
from probe.proof.verdict import WITH_MODEL, verify
from probe.reading.recording import Run
from probe.settings.fields import SCHEDULERS
from probe.watching import cross_attention
from probe.watching.interface import Plan, Rows
from probe.writing.store import RunWriter

Values = dict[str, np.ndarray]
Plant = Callable[[pytest.MonkeyPatch], None]
GRIDS = ("8x8", "4x4")


@functools.cache
def sharp(prediction: str = "epsilon") -> Any:
    """A random model whose heads look at different tokens and places: maps that are not nearly
    uniform, and unlike each other.
    """
    pipe = tiny.pipeline(prediction)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, module in pipe.unet.named_modules():
            if path.endswith("attn2"):
                for part in (module.to_q, module.to_k):
                    part.weight.copy_(torch.randn(part.weight.shape, generator=generator))
    return pipe


def record(folder: Path, **changes: Any) -> Run:
    changes.setdefault("capture", {"branches": "both"})
    return take(
        folder,
        sharp(),
        **{
            "scheduler": "DDIM",
            "steps": 3,
            "images": 2,
            "negative_prompt": "scuba diving",
            **changes,
        },
    )


# --- ways to plant --------------------------------------------------------------------------------


def in_steps(change: Callable[[int, Values, Values], None]) -> Plant:
    """Change what each step writes: `change(step, values, values of the step before)`, in place."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real, before = RunWriter.write_step, {}

        def write_step(
            own: RunWriter, step: int, values: Callable[[], Values], nbytes: int
        ) -> None:
            def changed() -> Values:
                made = dict(values())
                untouched = {name: value.copy() for name, value in made.items()}
                change(step, made, before or untouched)
                before.update(untouched)
                return made

            real(own, step, changed, nbytes)

        patch.setattr(RunWriter, "write_step", write_step)

    return plant


def in_arrays(name: str, change: Callable[[str, np.ndarray], np.ndarray]) -> Plant:
    """Change a label as it is planned: `change(group, value)`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = Plan.arrays.func

        def planted(spec: ArraySpec) -> ArraySpec:
            kind = object if spec.variable.dtype == "str" else None
            changes = spec.variable.name == name
            return (
                dataclasses.replace(
                    spec, value=change(spec.group, np.array(spec.value, dtype=kind))
                )
                if changes
                else spec
            )

        patch.setattr(
            Plan, "arrays", property(lambda own: tuple(planted(spec) for spec in real(own)))
        )

    return plant


def in_maps(
    change: Callable[[np.ndarray], np.ndarray],
    moments: Callable[[np.ndarray], np.ndarray] = lambda m: m,
) -> Plant:
    """Change the stored maps (token, branch, image, layer, head, y, x) and, if it is given, the
    moments (..., moment) with them.
    """

    def each(step: int, values: Values, before: Values) -> None:
        for grid in GRIDS:
            values[f"attention/{grid}/cross"] = np.ascontiguousarray(
                change(values[f"attention/{grid}/cross"])
            )
            values[f"attention/{grid}/moments"] = np.ascontiguousarray(
                moments(values[f"attention/{grid}/moments"])
            )

    return in_steps(each)


def flipped(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    return functools.partial(np.flip, axis=axis)


def of_the_step_before(*names: str) -> Plant:
    def change(step: int, values: Values, before: Values) -> None:
        for name in values:
            if any(part in name for part in names):
                values[name] = before[name]

    return in_steps(change)


def at_step_1(change: Callable[[Values, Values], None]) -> Plant:
    return in_steps(lambda step, values, before: change(values, before) if step == 1 else None)


def swap(values: Values, one: str, other: str) -> None:
    values[one], values[other] = values[other], values[one]


def one_ulp(values: Values, name: str, where: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    values[name] = values[name].copy()
    values[name][where] = np.nextafter(values[name][where], np.float32(np.inf))


def transposed(maps: np.ndarray) -> np.ndarray:
    return np.swapaxes(maps, -1, -2)


def exchanged(
    group: str,
    value: np.ndarray,
    one: tuple[Any, ...] = (..., 2),
    other: tuple[Any, ...] = (..., 5),
) -> np.ndarray:
    """Two tokens' labels in each other's place."""
    value = value.copy()
    value[one], value[other] = value[other].copy(), value[one].copy()
    return value


def only(prefix: str) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda group, value: exchanged(group, value) if group.startswith(prefix) else value


def another_formula(patch: pytest.MonkeyPatch) -> None:
    """A hook that takes the scale of another layer width: maps and moments agree, and are wrong."""
    real = cross_attention.attention_maps
    patch.setattr(
        cross_attention, "attention_maps", lambda q, k, scale, *rest: real(q, k, 2 * scale, *rest)
    )


def another_branch(patch: pytest.MonkeyPatch) -> None:
    """Captures that take the rows of the other branch: maps, moments and what tokens write are all
    the other's.
    """
    real, other = Rows.of, {"cond": "uncond", "uncond": "cond"}
    patch.setattr(Rows, "of", lambda own, branch: real(own, other[branch]))


ATTENTION, LATENTS = ("/cross", "/moments"), ("latents/",)
NAMES = ("latents/prediction_uncond", "latents/prediction_cond")

Expected = tuple[Plant, set[str], set[str]]

# what: (plant, the checks that fail without the model, those that fail in addition with it)
PROMISED: dict[str, Expected] = {
    "step axis shifted": (
        of_the_step_before("/"),
        {"scheduler"},
        {"predictions", "maps", "inside"},
    ),
    "branches swapped, predictions": (
        in_steps(lambda step, values, before: swap(values, *NAMES)),
        {"guidance"},
        {"predictions"},
    ),
    "map transposed": (in_maps(transposed), {"moments"}, {"maps", "inside"}),
    "heads permuted, maps": (in_maps(flipped(4)), {"moments"}, {"maps", "inside"}),
    "heads permuted, maps and moments": (
        in_maps(flipped(4), flipped(4)),
        set(),
        {"maps", "inside"},
    ),
    "layers permuted, maps": (in_maps(flipped(3)), {"moments"}, {"maps", "inside"}),
    "token label wrong, everywhere": (in_arrays("token_text", exchanged), {"labels"}, {"plan"}),
    "one latent off by one ulp": (
        at_step_1(lambda values, before: one_ulp(values, "latents/latents")),
        {"scheduler"},
        {"predictions", "inside"},
    ),
    "a prediction of the wrong step": (
        at_step_1(
            lambda values, before: values.update(
                {name: before[name] for name in (*NAMES, "latents/prediction")}
            )
        ),
        {"scheduler"},
        {"predictions"},
    ),
}
MORE: dict[str, Expected] = {
    "step axis shifted, maps": (of_the_step_before("/cross"), {"moments"}, {"maps", "inside"}),
    "step axis shifted, maps and moments": (
        of_the_step_before(*ATTENTION),
        set(),
        {"maps", "inside"},
    ),
    "branches swapped, maps": (in_maps(flipped(1)), {"moments"}, {"maps", "inside"}),
    "branches swapped, maps and moments": (
        in_maps(flipped(1), flipped(1)),
        set(),
        {"maps", "inside"},
    ),
    "map and moments transposed": (
        in_maps(transposed, lambda m: m[..., [0, 2, 1]]),
        set(),
        {"maps", "inside"},
    ),
    "layers permuted, maps and moments": (
        in_maps(flipped(3), flipped(3)),
        set(),
        {"maps", "inside"},
    ),
    "layers permuted, labels": (
        in_arrays("layer", lambda group, value: value[::-1]),
        {"labels"},
        {"plan"},
    ),
    "token label wrong, attention": (
        in_arrays("token_text", only("attention")),
        {"labels"},
        {"plan"},
    ),
    "a branch's prediction of the wrong step": (
        at_step_1(lambda values, before: values.update({NAMES[1]: before[NAMES[1]]})),
        {"guidance"},
        {"predictions"},
    ),
    "step axis shifted, latents": (
        of_the_step_before(*LATENTS),
        {"scheduler"},
        {"predictions", "maps", "inside"},
    ),
    "step axis shifted, statistics": (of_the_step_before("unet/statistics"), set(), {"inside"}),
    "branches swapped, in the hooks": (another_branch, set(), {"maps", "inside"}),
    "branches swapped, labels": (
        in_arrays("branch", lambda group, value: value[::-1]),
        {"labels"},
        {"plan"},
    ),
    "token label wrong, text": (in_arrays("token_text", only("text")), {"labels"}, {"plan"}),
    "word label wrong, everywhere": (in_arrays("word", exchanged), {"labels"}, {"plan"}),
    "word number wrong, everywhere": (in_arrays("word_index", exchanged), {"labels"}, {"plan"}),
    "token id wrong": (in_arrays("token_id", exchanged), set(), {"plan"}),
    "the scheduler's input off by a little": (
        at_step_1(
            lambda values, before: values.update(
                {"latents/prediction": values["latents/prediction"] * np.float32(1.0001)}
            )
        ),
        {"guidance", "scheduler"},
        {"predictions"},
    ),
    "images swapped, maps": (in_maps(flipped(2)), {"moments"}, {"maps", "inside"}),
    "images swapped, latents and predictions": (
        in_steps(
            lambda step, values, before: values.update(
                {n: v[::-1].copy() for n, v in values.items() if n.startswith(LATENTS)}
            )
        ),
        {"scheduler"},
        {"maps", "inside"},
    ),
    "tokens shifted, maps": (
        in_maps(lambda maps: np.roll(maps, 1, axis=0)),
        {"moments"},
        {"maps", "inside"},
    ),
    "a head lost": (
        in_maps(
            lambda maps: np.concatenate([maps[..., :1, :, :], 0 * maps[..., 1:, :, :]], axis=4)
        ),
        {"softmax", "moments"},
        {"maps", "inside"},
    ),
    "a hook with another scale": (another_formula, set(), {"maps", "inside"}),
    "sigmas of other steps": (
        in_arrays("sigma", lambda group, value: value[::-1].astype(float)),
        {"schedule"},
        {"plan"},
    ),
    "recorded steps mislabelled": (
        in_arrays("recorded", lambda group, value: np.append(value[:-1], 0)),
        {"committed", "sums"},
        {"plan"},
    ),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("what", [*PROMISED, *map(slow, MORE)])
def test_what_is_planted_in_the_recorder_is_caught_by_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, alone, asked = {**PROMISED, **MORE}[what]
    with monkeypatch.context() as patch:
        plant(patch)
        run = record(tmp_path)
    found = {check.name: check.verdict for check in verify(run, sharp())}
    assert found["manifest"] == "exact", "the plant is consistent on disk"
    failed = {name for name, verdict in found.items() if verdict == "failed"}
    assert (failed - set(WITH_MODEL), failed & set(WITH_MODEL)) == (alone, asked)


def test_the_finding_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step_1(lambda values, before: one_ulp(values, "latents/latents"))(patch)
        in_arrays("token_text", only("attention/4x4"))(patch)
        run = record(tmp_path, capture={})
    found = {check.name: check.detail for check in verify(run)}
    assert found["scheduler"].endswith(
        "at step 2, image 1, channel 2, y 3, x 4; first at step 1, image 1, channel 2, y 3, x 4"
    )
    assert (
        "attention/4x4: token 2 of cond is 'hat' in the word 'cat', in text/text_encoder 'cat' in "
        "'cat'" in found["labels"]
    )


# --- without a plant, nothing fails ---------------------------------------------------------------

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SOUND: list[dict[str, Any]] = [
    {
        "width": 48,
        "guidance_rescale": 0.4,
        "decode_every": 2,
        "capture": {"branches": "both", "dtype": "sqrt_u8", "self_attention": ("*",)},
    },
    {
        "scheduler": "EulerAncestral",
        "guidance_scale": 1.0,
        "negative_prompt": "",
        "capture": {"attention": "summary", "counterfactual": ("cat",)},
    },
]
ALSO: list[dict[str, Any]] = [
    {
        "scheduler": "DPM++2M",
        "kind": "bfloat16",
        "images": 1,
        "capture": {"attention": "queries", "steps": "0,2"},
    },
    {
        "scheduler": "DPM++2M",
        "scheduler_options": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    },
    *({"scheduler": name, "seed": 9} for name in SCHEDULERS),
    {
        "scheduler": "DDIM",
        "eta": 0.7,
        "prediction": "v_prediction",
        "height": 48,
        "capture": {"branches": "uncond", "dtype": "float32"},
    },
    {
        "scheduler": "PNDM",
        "kind": "float16",
        "capture": {"tokens": "all", "branches": "both", "dtype": "float32"},
    },
    {
        "scheduler": "Heun",
        "kind": "float16",
        "prediction": "v_prediction",
        "capture": {"attention": "off"},
    },
    {"prompt": "don't, café 日本 ❤ A  Cat's 42", "negative_prompt": "a " * 90, "over_long": "cut"},
    {
        "prompt": "",
        "negative_prompt": "",
        "capture": {"attention": "summary", "layers": ("4x4",), "dtype": "sqrt_u8"},
    },
]


@pytest.mark.parametrize(
    "changes",
    [*SOUND, *map(slow, ALSO)],
    ids=lambda changes: "-".join(map(str, changes.values()))[:40],
)
def test_meta_without_a_plant_nothing_fails(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = dict(changes)
    prediction, kind = changes.pop("prediction", "epsilon"), changes.pop("kind", None)
    pipe = copy.deepcopy(sharp(prediction)).to(HALF[kind]) if kind else sharp(prediction)
    run = take(
        tmp_path,
        pipe,
        **{
            "scheduler": "default",
            "steps": 5,
            "images": 2,
            "negative_prompt": "scuba diving",
            **changes,
        },
    )
    found = verify(run, pipe)
    assert [check for check in found if check.verdict == "failed"] == []
    assert {check.name for check in found if check.because} <= {
        "softmax",
        "moments",
        "sums",
        "maps",
        "attention",
    }, "all else is exact"
