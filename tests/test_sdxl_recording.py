"""A recording of Stable Diffusion XL changes no bit, holds what was computed, and verifies.

It goes on after an interruption.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from parity import PROMPT
from PIL import Image
from recordings import with_its_digests
from tiny_xl import (
    ENCODERS,
    SMALL,
    ask,
    assert_neutral,
    base,
    cut_short,
    failed,
    model_of,
    ours,
    peer_of,
    take,
    theirs,
)

from probe.diffusion.sdxl import StableDiffusionXL
from probe.errors import ModelError
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.recorder import record, record_noising, rerun, resume
from probe.settings.fields import SCHEDULERS
from probe.watching import hooks

# A scheduler whose class clips by default: this pipeline says so and leaves it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning"
)


def test_recording_changes_no_bit(full_xl: Run) -> None:
    model = StableDiffusionXL.of(base())
    how = {
        "images": 2,
        "height": 32,
        "width": 48,
        "guidance_scale": full_xl.experiment.guidance_scale,
    }
    assert_neutral(full_xl, ours(model, **how), model)
    latents, pictures = theirs(base(), **how)
    assert np.array_equal(full_xl.variable("latents/final_latents").values, latents.numpy())
    assert np.array_equal(full_xl.variable("images/final").values, pictures)


def test_what_a_recording_says_of_its_model(full_xl: Run) -> None:
    assert (full_xl.attributes.family, full_xl.attributes.guidance_rule) == (
        "sdxl",
        "classifier_free",
    )
    assert full_xl.attributes["decoded_in_float32"] is False
    assert list(full_xl.variable("cost/component").values) == [*ENCODERS, "unet", "vae"]
    assert (full_xl.variable("cost/seconds").values > 0).all()
    assert full_xl.variable("text_encoder_2/text_projection/activation").dims == (
        "branch",
        "feature",
    )


@pytest.mark.parametrize("negative", ["", "cat"])
def test_the_inside_of_each_text_encoder_is_its_own(negative: str, tmp_path: Path) -> None:
    model = StableDiffusionXL.of(base())
    model.condition(PROMPT)  # transformers leaves hooks of its own, which collect hidden states
    before = [hooks.count(encoder) for encoder, _ in model.text_encoders().values()]
    run = take(tmp_path, steps=1, negative_prompt=negative, capture=SMALL)
    assert [hooks.count(encoder) for encoder, _ in model.text_encoders().values()] == before
    assert run.attributes.zeroed_branches == ([] if negative else ["uncond"])
    for name, tokenizer in zip(ENCODERS, (base().tokenizer, base().tokenizer_2), strict=True):
        encoder = copy.deepcopy(getattr(base(), name))
        encoder.set_attn_implementation("eager")
        for branch, text in (("cond", PROMPT), ("uncond", negative)):
            ids = tokenizer(
                text, padding="max_length", max_length=77, return_tensors="pt"
            ).input_ids
            found = run.tree[f"text/{name}"].dataset.sel(branch=branch)
            assert list(found["token_id"].values) == ids[0].tolist()
            with torch.no_grad():
                said = encoder(ids, output_hidden_states=True, output_attentions=True)
            expected = {
                "embedding": said.hidden_states[0],
                "hidden": torch.stack(said.hidden_states[1:]),
                "output": said.last_hidden_state,
                "attention": torch.stack(said.attentions),
                **({"pooled": said.text_embeds} if name == "text_encoder_2" else {}),
            }
            assert set(found.data_vars) == {"token_id", *expected}
            for what, value in expected.items():
                rows = (
                    value[:, 0] if value.ndim > 3 and what in ("hidden", "attention") else value[0]
                )
                wanted = rows.numpy() if text else np.zeros_like(rows.numpy())
                np.testing.assert_allclose(
                    found[what].values, wanted, atol=6e-4 if what == "attention" else 2e-6
                )
    if negative:
        assert_zeros_are_not_claimed(run)


def assert_zeros_are_not_claimed(run: Run) -> None:
    """Zeros may stand for an empty negative prompt alone."""
    root = json.loads((run.path / "zarr.json").read_text())
    root["attributes"]["zeroed_branches"] = ["uncond"]
    (run.path / "zarr.json").write_text(json.dumps(root))
    found = failed(Run(with_its_digests(run.path)))
    assert (
        "only an empty negative prompt of SDXL may be zeros" in found["schema"]
        and "is not zero in a branch" in found["softmax"]
    )


def test_what_the_unet_is_told_is_in_the_recording(full_xl: Run) -> None:
    """The last but one state of both encoders, side by side, and the pooled embedding of the
    second.
    """
    told = StableDiffusionXL.of(base()).condition(PROMPT).arguments
    for branch in ("cond", "uncond"):
        states = [
            full_xl.variable(f"text/{name}/hidden").sel(branch=branch).values[-2]
            for name in ENCODERS
        ]
        assert np.array_equal(
            np.concatenate(states, axis=-1), told[branch]["encoder_hidden_states"][0].numpy()
        )
        assert np.array_equal(
            full_xl.variable("text/text_encoder_2/pooled").sel(branch=branch).values,
            told[branch]["text_embeds"][0].numpy(),
        )


def test_it_is_verified_with_and_without_the_model(full_xl: Run) -> None:
    found = {check.name: check.verdict for check in verify(full_xl, base())}
    assert "failed" not in found.values() and failed(full_xl) == {}
    assert (
        found["text"]
        == found["predictions"]
        == found["inside"]
        == found["plan"]
        == found["weights"]
        == "exact"
    )


CHANGES: tuple[tuple[str, Any, Any, set[str]], ...] = (
    ("text/text_encoder_2/pooled", (1, 0), 0.5, {"text"}),
    ("text/text_encoder_2/pooled", (0, 0), 0.5, {"text", "softmax"}),
    ("text/text_encoder/hidden", (1, 0, 2, 3), 1.0, {"text", "softmax"}),
    ("text/text_encoder_2/word_index", (1, 2), 0, {"labels", "plan"}),
    ("text/text_encoder_2/token_id", (1, 2), 3, {"plan"}),
)
WITHOUT_THE_MODEL = {"labels", "softmax"}


@pytest.mark.parametrize(
    ("path", "at", "value", "names"),
    [change for change in CHANGES if change[3] & WITHOUT_THE_MODEL][1:],
)
def test_what_is_changed_in_an_encoder_is_noticed_without_the_model(
    path: str, at: Any, value: Any, names: set[str], full_xl: Run, tmp_path: Path
) -> None:
    shutil.copytree(full_xl.path, tmp_path / "copy.zarr")
    zarr.open_group(tmp_path / "copy.zarr", mode="r+", use_consolidated=False)[path][at] = value
    assert failed(Run(with_its_digests(tmp_path / "copy.zarr"))).keys() == names & WITHOUT_THE_MODEL


@pytest.mark.slow
@pytest.mark.parametrize(("path", "at", "value", "names"), CHANGES)
def test_what_is_changed_in_an_encoder_is_noticed_with_the_model(
    path: str, at: Any, value: Any, names: set[str], full_xl: Run, tmp_path: Path
) -> None:
    shutil.copytree(full_xl.path, tmp_path / "copy.zarr")
    zarr.open_group(tmp_path / "copy.zarr", mode="r+", use_consolidated=False)[path][at] = value
    assert names <= failed(Run(with_its_digests(tmp_path / "copy.zarr")), base()).keys()


@pytest.mark.slow
def test_another_second_text_encoder_is_noticed(full_xl: Run) -> None:
    other = copy.deepcopy(base())
    other.text_encoder_2.text_projection.weight.data *= 1.5
    assert {"weights", "text", "predictions"} <= failed(full_xl, other).keys()


def test_a_recording_that_was_interrupted_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    how = {"scheduler": "EulerAncestral", "images": 2, "capture": {"statistics": False}}
    cut = cut_short(tmp_path / "cut", base(), 2, **how)
    assert failed(cut) == {}
    assert compare(take(tmp_path / "whole", **how), resume(cut, base(), progress=False)).same


@pytest.mark.slow
@pytest.mark.parametrize("shape", tiny.XL_UNETS)
def test_every_shape_is_recorded_resumed_and_recorded_again(shape: str, tmp_path: Path) -> None:
    pipeline, how = base(shape), {"guidance_scale": 0.0 if shape == "turbo" else 3.0, "images": 2}
    whole = take(tmp_path / "whole", pipeline, **how)
    resumed = resume(cut_short(tmp_path / "cut", pipeline, 2, **how), pipeline, progress=False)
    assert (
        compare(whole, resumed).same and compare(whole, rerun(whole, pipeline, progress=False)).same
    )
    assert failed(whole, pipeline) == failed(resumed, pipeline) == {}
    model = StableDiffusionXL.of(pipeline)
    assert_neutral(whole, ours(model, images=2, guidance_scale=how["guidance_scale"]), model)


@pytest.mark.slow
def test_a_config_that_asks_for_a_mask_is_passed_over_as_by_the_pipeline(tmp_path: Path) -> None:
    pipeline = copy.deepcopy(base())
    pipeline.text_encoder.config.use_attention_mask = True
    run = take(tmp_path, pipeline, steps=1, capture=SMALL)
    assert (
        run.status == "complete"
        and np.isfinite(run.variable("text/text_encoder/attention").values).all()
    )


@pytest.mark.parametrize("upcast", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_that_the_vae_ran_in_float32_is_told(
    upcast: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = tiny.xl_pipeline().to(dtype=torch.float16)
    pipeline.vae.register_to_config(force_upcast=upcast)
    asked = ask(
        tmp_path,
        steps=1,
        decode_every=1,
        capture={**SMALL, "text": False, "activations": ["vae.decoder.conv_out"]},
    )
    run = record(asked, pipeline)
    assert (
        run.attributes["decoded_in_float32"] is upcast
        and "overflowed" not in capsys.readouterr().err
    )
    inside = run.variable("vae/decoder.conv_out/activation")
    assert (str(inside.dtype), inside.attrs["recorded_dtype"]) == (
        ("float32",) * 2 if upcast else ("float16",) * 2
    )
    assert pipeline.vae.dtype == torch.float16 and failed(run) == {}
    if not upcast:
        assert failed(run, pipeline) == {}


def test_a_picture_to_begin_from_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "cat.png")
    for call in (
        lambda: take(tmp_path / "runs", image=str(tmp_path / "cat.png")),
        lambda: record_noising(
            np.zeros((32, 32, 3), np.uint8),
            PROMPT,
            pipeline=base(),
            progress=False,
            output=str(tmp_path / "runs"),
        ),
    ):
        with pytest.raises(
            ModelError, match="a Stable Diffusion XL model does not begin from a picture here yet"
        ):
            call()
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_is_recorded_resumed_and_verified(name: str, tmp_path: Path) -> None:
    """With and without guidance, not square, one image and two, of each shape."""
    for number, (guidance, size, images, shape) in enumerate(
        itertools.product((5.0, 1.0), ((32, 32), (32, 48)), (1, 2), tiny.XL_UNETS)
    ):
        how = {"guidance_scale": guidance, "height": size[0], "width": size[1], "images": images}
        pipeline, model = peer_of(shape, name), model_of(shape, name)
        branches = "both" if guidance > 1 else "cond"
        run = take(
            tmp_path / f"{number}", pipeline, scheduler=name, **how, capture={"branches": branches}
        )
        assert_neutral(run, ours(model, **how), model)
        latents, pictures = theirs(pipeline, **how)
        assert np.array_equal(run.variable("latents/final_latents").values, latents.numpy())
        assert np.array_equal(run.variable("images/final").values, pictures)
        cut = cut_short(
            tmp_path / f"{number}-cut",
            pipeline,
            1,
            scheduler=name,
            **how,
            capture={"branches": branches},
        )
        assert compare(run, resume(cut, pipeline, progress=False)).same
        assert failed(run, pipeline) == {}
