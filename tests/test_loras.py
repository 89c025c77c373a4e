"""LoRAs: the bits of diffusers' own pipeline with them, none at scale 0, and none left behind."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import tiny
import tiny_runs
import tiny_xl
import torch
from lora_files import save_kohya, save_peft
from parity import assert_bits
from recordings import cut
from safetensors.torch import load_file, save_file

from probe import cli
from probe.diffusion.families import family_of
from probe.diffusion.preparing import prepared
from probe.errors import ExperimentError, ModelError
from probe.figures.bundle import facts
from probe.proof.verdict import verify
from probe.reading.edited import additions
from probe.reading.recording import Run
from probe.run import say_forecast
from probe.running.ask import ask
from probe.running.recorder import record, rerun, resume
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import Lora

MODELS = {"sd": tiny.pipeline, "sdxl": tiny_xl.base.__wrapped__}
OFTEN = ["sd", pytest.param("sdxl", marks=pytest.mark.slow)]
FORMATS = {"peft": save_peft, "kohya": save_kohya}


def made(family: str) -> Any:
    return MODELS[family]()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A LoRA of each format for each family; alphas that are not the rank."""
    folder = tmp_path_factory.mktemp("loras")
    return {
        (family, name): save(
            made(family), folder / f"{family}-{name}.safetensors", alpha=3.0, seed=number
        )
        for family in MODELS
        for number, (name, save) in enumerate(FORMATS.items())
    }


def theirs(pipe: Any, loras: list[Lora]) -> tuple[torch.Tensor, np.ndarray]:
    names = [f"lora{number}" for number in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        pipe.load_lora_weights(lora.path, adapter_name=name)
    pipe.set_adapters(names, [lora.scale for lora in loras])
    return parity.theirs(pipe, steps=3, guidance_scale=4.0)


def ours(model: Any, *loras: Lora) -> list[Any]:
    model = prepared(model, Experiment(loras=loras))
    return parity.ours(model, guidance_scale=4.0, steps=3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    ("family", "name", "scale"),
    [  # a scale is one number in what is added: all of them for one model and format
        case
        if case[2] == -1.5 or case[:2] == ("sd", "peft")
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(MODELS, FORMATS, (1.0, 0.6, -1.5))
    ],
)
def test_a_lora_gives_the_bits_of_the_pipeline(
    family: str, name: str, scale: float, files: dict[tuple[str, str], Path]
) -> None:
    lora = Lora(path=str(files[family, name]), scale=scale)
    model = family_of(made(family))
    steps = ours(model, lora)
    assert_bits(model, steps, *theirs(made(family), [lora]))
    assert not torch.equal(steps[-1].next_latents, ours(model)[-1].next_latents)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", MODELS)
def test_a_lora_of_scale_0_adds_nothing(
    family: str, name: str, files: dict[tuple[str, str], Path]
) -> None:
    model = family_of(made(family))
    plain = ours(model)
    none = ours(model, Lora(path=str(files[family, name]), scale=0.0))
    assert [key for key in model.unet.state_dict() if ".lora_" in key], "it went another way"
    for one, other in zip(plain, none, strict=True):
        assert torch.equal(one.prediction, other.prediction)
        assert torch.equal(one.next_latents, other.next_latents)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("family", OFTEN)
def test_several_loras_act_together_and_are_switched_on_one_model(
    family: str, files: dict[tuple[str, str], Path]
) -> None:
    one, other = (Lora(path=str(files[family, name]), scale=0.5) for name in FORMATS)
    model = family_of(made(family))
    before = {part: dict(module.named_modules()) for part, module in model.components().items()}
    plain, digest = ours(model), model.digest()
    asked: list[list[Lora]] = [
        [one],
        [other],
        [one, other],
        [],
        [other, one],
        [other.model_copy(update={"scale": 2.0})],
    ]
    for loras in asked:
        steps = ours(model, *loras)
        assert prepared(model, Experiment(loras=tuple(loras))).digest() == digest
        if not loras:
            assert torch.equal(steps[-1].next_latents, plain[-1].next_latents)
            continue
        drawn, _ = theirs(made(family), loras)
        assert torch.equal(steps[-1].next_latents, drawn), loras
    assert torch.equal(ours(model)[-1].next_latents, plain[-1].next_latents)
    for part, module in model.components().items():
        assert dict(module.named_modules()) == before[part], "a module is not the model's own"
        assert all(weight.requires_grad for weight in module.parameters())
        assert not getattr(module, "peft_config", None)


def test_scales_are_switched_without_reading_the_layers_again(
    files: dict[tuple[str, str], Path],
) -> None:
    model = family_of(made("sd"))
    path = str(files["sd", "peft"])
    layer = prepared(model, Experiment(loras=(Lora(path=path),))).unet.mid_block.attentions[0]
    there = layer.transformer_blocks[0].attn2.to_q
    model = prepared(model, Experiment(loras=(Lora(path=path, scale=0.25),)))
    assert layer.transformer_blocks[0].attn2.to_q is there
    assert set(there.scaling.values()) == {0.25 * 3.0 / 2}
    assert list(model.files) == [path]


# --- recordings -----------------------------------------------------------------------------------


def take(folder: Path, pipe: Any, *loras: Lora, **changes: Any) -> Run:
    asked = tiny_runs.ask(
        folder, loras=[lora.model_dump() for lora in loras], guidance_scale=4.0, **changes
    )
    return record(asked, pipe, progress=False)


@pytest.mark.parametrize("family", OFTEN)
def test_what_is_recorded_is_what_the_pipeline_with_the_lora_does(
    family: str, files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    lora = Lora(path=str(files[family, "peft"]), scale=0.7)
    everything = {"branches": "both", "tokens": "all", "self_attention": ("4x4",)}
    pipe, plain = made(family), made(family)
    pipe.load_lora_weights(lora.path, adapter_name="own")
    pipe.set_adapters(["own"], [lora.scale])
    wanted = take(tmp_path / "theirs", pipe, capture=everything)
    run = take(tmp_path / "ours", plain, lora, capture=everything)
    apart = [difference.variable for difference in run.diff(wanted).differences]
    assert apart == [], "maps, text, outputs and latents"
    assert run.attributes.model.weights == family_of(made(family)).digest()
    assert run.attributes.model.weights != wanted.attributes.model.weights
    assert list(run.attributes.model.files) == [lora.path]
    assert not [key for key in plain.unet.state_dict() if "lora" in key], "it is its owner's"
    checks = verify(run, plain)
    assert not checks.failed, str(checks)
    assert run.diff(rerun(run, plain, progress=False)).same
    assert not [key for key in plain.text_encoder.state_dict() if "lora" in key]


def test_a_run_of_scale_0_is_a_run_without(
    files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    run = take(tmp_path / "none", tiny.pipeline())
    zero = take(tmp_path / "zero", tiny.pipeline(), Lora(path=str(files["sd", "peft"]), scale=0.0))
    comparison = run.diff(zero)
    assert comparison.same, str(comparison)
    assert run.recipe.identity() != zero.recipe.identity()


def test_an_interrupted_run_goes_on_with_its_lora(
    files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    pipe, lora = tiny.pipeline(), Lora(path=str(files["sd", "kohya"]))
    whole = take(tmp_path / "whole", pipe, lora)
    finished = resume(cut(whole, tmp_path / "cut", 2), pipe, progress=False)
    assert finished.status == "complete" and finished.diff(whole).same


def test_a_file_that_changed_or_is_gone_is_named(
    files: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, path = tiny.pipeline(), tmp_path / "ink.safetensors"
    shutil.copy(files["sd", "peft"], path)
    run = take(tmp_path / "runs", pipe, Lora(path=str(path)), capture={"attention": "queries"})
    ended = cut(run, tmp_path / "cut", 2)
    ask(run, "a cat", pipe)
    shutil.copy(files["sd", "kohya"], path)
    (failed,) = [check for check in verify(run, pipe).checks if check.name == "weights"]
    assert failed.verdict == "failed"
    assert failed.detail == f"{path} is not the file that it was recorded with: bring that back"
    with pytest.raises(ModelError, match=f"was begun with another {path}"):
        resume(ended, pipe, progress=False)
    with pytest.raises(ModelError, match="or other LoRAs"):
        ask(run, "a cat", pipe)
    rerun(run, pipe, output=tmp_path / "again", progress=True)
    assert f"was recorded with another {path} than is there now" in capsys.readouterr().err
    path.unlink()
    for act in (verify, rerun):
        with pytest.raises(ModelError, match="there is no such file") as gone:
            act(run, pipe)
        assert gone.value.cause.startswith("loras: ") and "has to come back" in gone.value.remedy
    assert not verify(run).failed, "without the model no file is needed"


def test_a_forecast_needs_no_weights_and_checks_the_file(
    files: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    asked = tiny_runs.ask(tmp_path, model=str(tmp_path / "model"))
    path = str(files["sd", "kohya"])
    assert say_forecast(load_experiment(asked, loras=[{"path": path}]), None) == 0
    assert path in capsys.readouterr().out
    with pytest.raises(ModelError, match="of no part of this model"):
        say_forecast(load_experiment(asked, loras=[{"path": str(files["sdxl", "kohya"])}]), None)
    run = record(load_experiment(asked, loras=[{"path": path}]), progress=False)
    assert not verify(run, True).failed


# --- files that do not fit ------------------------------------------------------------------------


def altered(source: Path, path: Path, change: Any, header: dict[str, str] | None = None) -> str:
    tensors = load_file(source)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, header)
    return str(path)


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(key for key in tensors if key.endswith(end))


def renamed(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    for key in [key for key in tensors if one in key]:
        tensors[key.replace(one, other)] = tensors.pop(key)


CHANGES: dict[str, tuple[Any, str]] = {
    "another width": (
        lambda t: t.update({first(t, "attn2.to_k.lora_A.weight"): torch.zeros(2, 40)}),
        r"its lora_A of unet\..*attn2\.to_k has shape \(2, 40\), and this model's layer takes",
    ),
    "another layer": (
        lambda t: renamed(t, "to_q.", "to_z."),
        r"it changes unet\..*to_z, which this model does not have",
    ),
    "half of it": (lambda t: t.pop(first(t, "to_q.lora_A.weight")), "only a part of what changes"),
    "not finite": (
        lambda t: t.update({first(t, "to_q.lora_A.weight"): torch.full((2, 16), torch.nan)}),
        "holds values that are not finite",
    ),
    "a part that is not there": (
        lambda t: t.update({"transformer.to_q.lora_A.weight": torch.zeros(2, 2)}),
        "which is of no part of this model",
    ),
    "a LoHa": (lambda t: t.update({"unet.a.hada_w1_a": torch.zeros(2)}), "it is a LoHa"),
    "a DoRA": (
        lambda t: t.update({"unet.a.lora_magnitude_vector": torch.zeros(2)}),
        "it is a DoRA",
    ),
    "weights": (
        lambda t: (t.clear(), t.update({"unet.conv_in.weight": torch.zeros(2, 2)})),
        "which is no LoRA's|no LoRA that diffusers reads",
    ),
    "nothing": (lambda t: t.clear(), "it holds no tensors"),
    "whole numbers": (
        lambda t: t.update({"a": torch.zeros(2, dtype=torch.int64)}),
        "is of type I64",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_lora_that_does_not_fit_is_refused_before_anything_changes(
    name: str, files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    change, cause = CHANGES[name]
    path = altered(files["sd", "peft"], tmp_path / "odd.safetensors", change)
    model = family_of(tiny.pipeline())
    before = dict(model.unet.named_modules())
    with pytest.raises(ModelError, match=cause) as refused:
        prepared(model, Experiment(loras=(Lora(path=path),)))
    assert refused.value.cause.startswith("loras: ") and refused.value.remedy
    assert dict(model.unet.named_modules()) == before


def test_a_lora_of_another_family_is_refused(files: dict[tuple[str, str], Path]) -> None:
    for own, other in (("sd", "sdxl"), ("sdxl", "sd")):
        for name in FORMATS:
            with pytest.raises(ModelError, match="loras: ") as refused:
                prepared(
                    family_of(made(own)), Experiment(loras=(Lora(path=str(files[other, name])),))
                )
            assert "LoRA" in refused.value.remedy


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    pickled, text = tmp_path / "lora.bin", tmp_path / "lora.safetensors"
    torch.save({"a": torch.zeros(2)}, pickled)
    text.write_bytes(b"no tensors at all")
    model = family_of(tiny.pipeline())
    for path, cause in (
        (pickled, "pickled, and can run code"),
        (text, "is not a safetensors file, or is cut short"),
        (tmp_path, "this is a folder"),
        (tmp_path / "nowhere.safetensors", "there is no such file"),
        (tmp_path / ("a" * 5000), "cannot be looked up"),
    ):
        with pytest.raises(ModelError, match=cause) as refused:
            prepared(model, load_experiment({"loras": [{"path": str(path)[:999]}]}))
        assert refused.value.remedy


HEADERS = [
    "[]",
    "{",
    "[" * 100_000,
    '{"unet.r": -1}',
    '{"unet.lora_alpha": "3"}',
    '{"unet.rank_pattern": {"(a+)+$": 2}}',
    '{"unet.use_dora": true}',
    '{"unet.modules_to_save": ["conv_in"]}',
]


@pytest.mark.parametrize("said", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_diffusers_would_not_write_is_refused(
    said: str, files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    path = altered(
        files["sd", "peft"],
        tmp_path / "odd.safetensors",
        lambda _: None,
        {"lora_adapter_metadata": said},
    )
    with pytest.raises(ModelError, match="its header"):
        prepared(family_of(tiny.pipeline()), Experiment(loras=(Lora(path=path),)))


def test_a_header_cannot_have_a_module_imported(
    files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    said = {"unet.r": 2, "unet.lora_alpha": 3.0, "unet.lora_dropout": 0.9}
    said |= {"unet.megatron_config": {"a": 1}, "unet.megatron_core": "antigravity"}
    said |= {f"text_encoder.{name}": value for name, value in (("r", 2), ("lora_alpha", 3.0))}
    path = altered(
        files["sd", "peft"],
        tmp_path / "odd.safetensors",
        lambda _: None,
        {"lora_adapter_metadata": json.dumps(said)},
    )
    model = family_of(tiny.pipeline())
    plain = ours(model, Lora(path=str(files["sd", "peft"])))
    assert torch.equal(ours(model, Lora(path=path))[-1].next_latents, plain[-1].next_latents)
    assert "antigravity" not in sys.modules


def test_a_pipeline_with_loras_of_its_own_is_not_given_more(
    files: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    pipe, path = tiny.pipeline(), str(files["sd", "peft"])
    pipe.load_lora_weights(path, adapter_name="own")
    with pytest.raises(ModelError, match="has LoRAs of its own already"):
        take(tmp_path, pipe, Lora(path=path))
    take(tmp_path, pipe, steps=1)
    assert "own" in pipe.unet.peft_config, "its own stay"


WRONG = {
    "loras[0]: this is no LoRA": ["ink.safetensors"],
    "loras[0].path: it is missing": [{"scale": 1.0}],
    "loras[0].weight: unknown field": [{"path": "a", "weight": 1.0}],
    "loras[1].scale: 1000.0 is more than 100.0": [{"path": "a"}, {"path": "a", "scale": 1000.0}],
    "loras[0].scale: 'much' is not a number": [{"path": "a", "scale": "much"}],
    "loras: 'ink.safetensors' is not a list": "ink.safetensors",
}


@pytest.mark.parametrize("cause", WRONG)
def test_settings_that_do_not_fit_are_named(cause: str) -> None:
    with pytest.raises(ExperimentError) as refused:
        load_experiment({"loras": WRONG[cause]})
    assert refused.value.cause.endswith(cause) and refused.value.remedy


def test_they_count_in_the_identity_where_they_are_set() -> None:
    plain, one = Experiment(), Experiment(loras=(Lora(path="a", scale=0.0),))
    assert load_experiment(plain, loras=[]).identity() == plain.identity() != one.identity()
    assert load_experiment(one.resolved()) == one


def test_what_is_added_is_said_wherever_a_run_is_named(
    files: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = Lora(path=str(files["sd", "peft"]), scale=0.5)
    run = take(tmp_path, tiny.pipeline(), lora, clip_skip=1, steps=1)
    said = "LoRA sd-peft at 0.5, clip_skip 1"
    assert run.summary()["with"] == said == additions(run.attributes.recipe)
    assert said in facts(run)
    assert cli.ls([str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    odd = {"loras": ["x", {"path": None}], "clip_skip": "\n", "prompt_embeds": ["\x1b[2J"]}
    assert additions(odd).isprintable() and additions({}) == ""
