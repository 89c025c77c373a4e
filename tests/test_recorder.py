"""A recording changes nothing, holds what the loop yielded, and survives whatever stops the run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from PIL import Image
from recordings import assert_prefix, assert_same, only
from tiny_runs import (
    FULL,
    OFF,
    PROMPT,
    ask,
    assert_neutral,
    assert_no_hooks,
    at_call,
    bare,
    model_for,
    pipeline,
    take,
    throw,
)
from transformers import CLIPTextModel

from probe.analysis.maps import probabilities, word_maps
from probe.diffusion.loading import load
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, NotFinite, OutOfMemory, StoreError, TooLarge
from probe.proof.verdict import verify
from probe.reading.recording import Run, open_run
from probe.running.planning import Plan, plan
from probe.running.recorder import record
from probe.settings.experiment import load_experiment
from probe.watching import hooks
from probe.writing.store import MANIFEST


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve calls that nothing stopped; the broken runs below ask for the same."""
    return take(tmp_path_factory.mktemp("reference"), steps=12, scheduler="DDIM")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(
        tmp_path_factory.mktemp("full"),
        images=2,
        width=48,
        capture=FULL,
        decode_every=2,
        negative_prompt="scuba diving",
    )


# --- neutrality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capture", [FULL, OFF], ids=["full", "off"])
def test_recording_changes_no_bit(
    capture: dict[str, Any], dtype: torch.dtype, guidance_scale: float, tmp_path: Path
) -> None:
    pipe = pipeline(dtype)
    branches = {"branches": "both" if guidance_scale > 1 else "cond"} if capture is FULL else {}
    changes = {
        "images": 2,
        "width": 48,
        "guidance_scale": guidance_scale,
        "capture": {**capture, **branches},
    }
    before = bare(pipe, ask(tmp_path, **changes))
    run = take(tmp_path, pipe, **changes)
    assert_neutral(run, before)
    assert_no_hooks(pipe)
    assert run.status == "complete" and run.tree["latents/latents"].attrs["recorded_dtype"] == str(
        dtype
    ).removeprefix("torch.")
    pixels, _ = model_for(pipe, run.experiment).decode(before[-1].next_latents)
    assert_same(run.images.values, pixels.numpy(), "pictures")


@pytest.mark.parametrize("scheduler", ["EulerAncestral", "Heun", "DPM++2M"])
def test_recording_changes_no_bit_of_other_schedulers(scheduler: str, tmp_path: Path) -> None:
    changes = {"scheduler": scheduler, "images": 2, "guidance_rescale": 0.3}
    assert_neutral(take(tmp_path, **changes), bare(pipeline(), ask(tmp_path, **changes)))


def test_meta_one_differing_bit_is_noticed(full: Run) -> None:
    steps = bare(pipeline(), full.experiment)
    assert_neutral(full, steps)
    with torch.no_grad():
        steps[1].prediction_cond.view(-1)[:1].nextafter_(torch.tensor(9.0))
    with pytest.raises(AssertionError, match="prediction_cond of step 1"):
        assert_neutral(full, steps)


# --- what stops a run -----------------------------------------------------------------------------

STOPS: dict[str, tuple[str, int, BaseException, type[BaseException], str, int]] = {
    # what: (component, at which of its calls, raised, seen by the caller, status, committed steps)
    "error in the UNet": ("unet", 2, RuntimeError("no"), RuntimeError, "failed", 2),
    "Ctrl-C in the UNet": ("unet", 2, KeyboardInterrupt(), KeyboardInterrupt, "interrupted", 2),
    "exit": ("unet", 2, SystemExit(1), SystemExit, "interrupted", 2),
    "out of memory": ("unet", 7, MemoryError("no"), OutOfMemory, "failed", 7),
    "error at the first step": ("unet", 0, ValueError("no"), ValueError, "failed", 0),
    # the first four calls of the text encoder hold its embeddings against the pipeline's own,
    # before anything is written
    "Ctrl-C in the text encoder": (
        "text_encoder",
        5,
        KeyboardInterrupt(),
        KeyboardInterrupt,
        "interrupted",
        0,
    ),
    # the VAE's first call fits the preview, its second draws the picture
    "error in the last decoding": ("decoder", 1, RuntimeError("no"), RuntimeError, "failed", 12),
}


@pytest.mark.parametrize("what", STOPS)
def test_whatever_stops_a_run_its_prefix_is_kept(what: str, reference: Run, tmp_path: Path) -> None:
    component, call, raised, seen, status, committed = STOPS[what]
    pipe = pipeline()
    module = pipe.vae.decoder if component == "decoder" else getattr(pipe, component)
    asked = ask(tmp_path, steps=12, scheduler="DDIM")
    with hooks.Hooks([(module, "input", at_call(call, throw(raised)))]):
        with pytest.raises(seen):
            record(asked, pipe, progress=False)
        assert (
            sum(hooks.count(part) for part in (pipe.unet, pipe.vae, pipe.text_encoder)) == 1
        )  # ours
    assert_no_hooks(pipe)
    run = only(tmp_path)
    assert run.status == status == open_run("latest", tmp_path).status
    assert_prefix(run, reference, committed)
    assert not (run.path / MANIFEST).exists()
    assert_neutral(reference, bare(pipe, asked))


def test_a_misspelled_layer_writes_nothing_and_leaves_no_hook(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="matches no cross-attention layer"):
        take(tmp_path / "runs", capture={"layers": ("up_blcks.*",)})
    assert_no_hooks(pipeline())
    assert not list(tmp_path.iterdir())


def test_an_unwritable_step_stops_the_run_with_its_cause(reference: Run, tmp_path: Path) -> None:
    """The disk fails in the writing thread: a directory lies where a chunk belongs."""
    pipe = pipeline()

    def spoil() -> None:
        (path,) = tmp_path.glob("*.zarr")
        (path / "latents" / "prediction" / "c.5.0.0.0.0").mkdir()

    with hooks.Hooks([(pipe.unet, "input", at_call(1, spoil))]), pytest.raises(StoreError):
        take(tmp_path, steps=12, scheduler="DDIM")
    run = only(tmp_path)
    assert run.status == "failed"
    (
        run.path / "latents" / "prediction" / "c.5.0.0.0.0"
    ).rmdir()  # what is no file is refused by readers
    assert_prefix(run, reference, 5)
    assert_no_hooks(pipe)


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["default", "Euler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_read_is_what_the_loop_yielded(
    prediction: str, scheduler: str, tmp_path: Path
) -> None:
    pipe = pipeline(prediction=prediction)
    run = take(tmp_path, pipe, scheduler=scheduler, images=2, capture=OFF)
    assert run.attributes["prediction_type"] == prediction
    assert run.attributes["latent_convention"] == (
        "variance_exploding" if scheduler == "Euler" else "variance_preserving"
    )
    steps = bare(pipe, run.experiment)
    assert len(steps) == run.latents.sizes["step"] == (5 if scheduler == "default" else 4)
    eps, v, denoised = run.eps(), run.v(), run.denoised()
    assert [
        tuple(map(float, row))
        for row in zip(
            *(run.variable(name).values for name in ("timestep", "sigma", "alpha_bar")), strict=True
        )
    ] == [(step.timestep, step.sigma, step.alpha_bar) for step in steps]
    for index, step in enumerate(steps):
        assert_same(run.latents.values[index], step.latents.numpy(), "latents")
        for branch, tensor in (
            (None, step.prediction),
            ("cond", step.prediction_cond),
            ("uncond", step.prediction_uncond),
        ):
            assert_same(
                run.prediction(branch).values[index], tensor.numpy(), f"prediction {branch}"
            )
        for read, own in ((eps, step.eps), (v, step.v), (denoised, step.denoised)):
            assert read.dims == run.latents.dims and read.dtype == np.float32
            np.testing.assert_allclose(
                read.values[index], own.numpy(), rtol=1e-5, atol=1e-5 * float(own.abs().max())
            )


def test_each_branch_has_its_own_derived_quantities(full: Run) -> None:
    a = full.variable("alpha_bar")
    for branch in ("cond", "uncond", None):
        mixed = a**0.5 * full.denoised(branch) + (1 - a) ** 0.5 * full.eps(branch)
        np.testing.assert_allclose(
            mixed.transpose(*full.latents.dims).values, full.latents.values, rtol=1e-4, atol=1e-4
        )
    assert not np.array_equal(full.eps("cond").values, full.eps("uncond").values)


def test_an_experiment_comes_back_as_it_was_asked(full: Run) -> None:
    asked = ask(
        full.path.parent,
        images=2,
        width=48,
        capture=FULL,
        decode_every=2,
        negative_prompt="scuba diving",
    )
    asked = load_experiment(
        asked, model=full.attributes["model"]["name"]
    )  # the pipeline that was passed
    assert full.experiment == asked and full.attributes["identity"] == asked.identity()


def test_without_guidance_there_is_no_uncond_prediction(tmp_path: Path) -> None:
    run = take(tmp_path, guidance_scale=1.0, capture=OFF)
    assert "prediction_uncond" not in run.tree["latents"].data_vars
    assert_same(run.prediction().values, run.prediction("cond").values, "prediction")
    with pytest.raises(FileNotFoundError, match="without guidance"):
        run.prediction("uncond")


# --- text -----------------------------------------------------------------------------------------


def test_the_text_group_equals_transformers(full: Run) -> None:
    group, encoder = (
        full.tree["text/text_encoder"],
        copy.deepcopy(pipeline().text_encoder),
    )  # transformers leaves its own hooks in it
    eager = CLIPTextModel._from_config(
        copy.deepcopy(encoder.config), attn_implementation="eager"
    )  # it changes the config it is given
    eager.load_state_dict(encoder.state_dict())
    for index, text in enumerate(("scuba diving", PROMPT)):  # uncond, cond
        ids = tiny.tokenizer()(text, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            plain = encoder(ids, output_hidden_states=True)
            slow = eager(ids, output_hidden_states=True, output_attentions=True)
        branch = group.to_dataset().isel(branch=index)
        assert_same(branch["token_id"].values, ids[0].numpy(), "token_id")
        assert_same(branch["output"].values, plain.last_hidden_state[0].numpy(), "output")
        assert_same(branch["embedding"].values, plain.hidden_states[0][0].numpy(), "embedding")
        layers = len(encoder.encoder.layers)
        assert (
            branch["hidden"].sizes["text_layer"]
            == branch["attention"].sizes["text_layer"]
            == layers
            == len(slow.attentions)
        )
        assert_same(branch["hidden"].values[0], plain.hidden_states[1][0].numpy(), "hidden")
        np.testing.assert_allclose(
            branch["output"].values, slow.last_hidden_state[0].numpy(), atol=1e-5
        )
        last = (
            encoder.final_layer_norm(torch.from_numpy(branch["hidden"].values[-1])).detach().numpy()
        )
        np.testing.assert_allclose(last, branch["output"].values, atol=1e-5)
        for layer in range(layers):
            np.testing.assert_allclose(
                branch["attention"].values[layer], slow.attentions[layer][0].numpy(), atol=1e-3
            )
            assert (
                branch["attention"].values[layer][:, *np.triu_indices(77, 1)] == 0
            ).all()  # nobody looks ahead


def test_tokens_carry_their_words(tmp_path: Path) -> None:
    run = take(tmp_path, prompt="a cat, astronaut on THE qat", negative_prompt="hat", steps=1)
    cond, uncond = (
        run.tree["text/text_encoder"].to_dataset().sel(branch=branch)
        for branch in ("cond", "uncond")
    )
    texts = [
        "<|startoftext|>",
        "a",
        "cat",
        ",",
        "astronaut",
        "on",
        "the",
        "q",
        "a",
        "t",
        "<|endoftext|>",
    ]
    assert list(cond["token_text"].values[:11]) == texts
    assert list(cond["word"].values[:12]) == [
        "",
        "a",
        "cat",
        "",
        "astronaut",
        "on",
        "THE",
        "qat",
        "qat",
        "qat",
        "",
        "",
    ]
    assert list(cond["word_index"].values[:12]) == [-1, 0, 1, -1, 2, 3, 4, 5, 5, 5, -1, -1]
    assert list(uncond["word"].values[:3]) == ["", "hat", ""] and list(
        uncond["token"].values
    ) == list(range(77))
    maps = run.attention()
    assert list(maps["branch"].values) == ["cond"] and list(maps["token"].values) == [
        *range(11),
        -1,
    ]
    assert list(maps["token_text"].sel(branch="cond").values) == [*texts, "rest"]
    assert list(maps["word"].sel(branch="cond").values[-5:]) == ["qat", "qat", "qat", "", ""]
    assert run.tokens()[:11] == texts and run.tokens("uncond")[1] == "hat"
    assert list(run.words) == ["a", "cat", "astronaut", "on", "THE", "qat"]


def test_both_branches_keep_as_many_tokens_as_the_longer_prompt(full: Run) -> None:
    asked = ask(
        full.path.parent,
        prompt="cat",
        negative_prompt="a cat on the hat",
        capture={"branches": "both"},
    )
    kept = plan(model_for(pipeline(), asked), asked).kept
    assert kept.positions == (*range(7), -1)


# --- stock xarray ---------------------------------------------------------------------------------

READER = """
import json, sys, warnings
warnings.simplefilter("error")
import xarray
tree = xarray.open_datatree(sys.argv[1], engine="zarr")
committed = tree["committed"].values.tolist()
done = sum(committed)
found = {"committed": committed, "status": tree.attrs["status"], "groups": sorted(tree.groups)}
found["latents"] = tree["latents/latents"].values[:done].ravel().tolist()
for node in tree.subtree:
    node.to_dataset().load()
assert not {"torch", "diffusers", "transformers", "probe"} & set(sys.modules)
print(json.dumps(found))
"""


def read_elsewhere(path: Path) -> dict[str, Any]:
    """What a fresh process with nothing but xarray finds, with every warning an error."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_read(found: dict[str, Any], whole: Run) -> None:
    steps = sum(found["committed"])
    assert found["committed"] == [1] * steps + [0] * (len(found["committed"]) - steps)
    assert found["latents"] == whole.tree["latents/latents"].values[:steps].ravel().tolist()


def test_stock_xarray_reads_a_complete_run(full: Run) -> None:
    found = read_elsewhere(full.path)
    assert found["status"] == "complete" and all(found["committed"])
    assert_read(found, full)
    assert {
        "/attention/8x12",
        "/attention/4x6",
        "/unet/mid_block",
        "/vae/decoder.mid_block",
        "/cost",
        "/preview",
    } <= set(found["groups"])


def test_stock_xarray_reads_a_run_that_is_being_written(reference: Run, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []

    def look() -> None:
        (path,) = tmp_path.glob("*.zarr")
        until = time.monotonic() + 60
        while len(Run(path).steps) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert Run(path).status == "running"
        assert_prefix(Run(path), reference, 3)
        found.append(read_elsewhere(path))

    pipe = pipeline()
    with hooks.Hooks([(pipe.unet, "input", at_call(3, look))]):
        take(tmp_path, steps=12, scheduler="DDIM")
    assert found[0]["status"] == "running" and sum(found[0]["committed"]) == 3
    assert_read(found[0], reference)
    assert only(tmp_path).status == "complete"


# --- forecast -------------------------------------------------------------------------------------


def held(run: Run, settled: Plan) -> dict[str, int]:
    """Bytes of the values that the recording holds, by variable: steps that are NaN throughout were
    not recorded.
    """
    sizes = {}
    for a in settled.arrays:
        values = run.tree[a.path].values
        if a.dtype == "str":
            sizes[a.path] = sum(len(str(text).encode()) + 4 for text in values.ravel())
        else:
            empty = (
                [bool(np.isnan(row).all()) for row in values]
                if a.per_step and values.dtype.kind == "f"
                else []
            )
            sizes[a.path] = values.nbytes - sum(empty) * (
                values.nbytes // len(values) if empty else 0
            )
    return sizes


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, "all"), (torch.bfloat16, "::3")], ids=str
)
def test_the_forecast_is_what_was_written(dtype: torch.dtype, steps: str, tmp_path: Path) -> None:
    changes = {"images": 2, "width": 48, "decode_every": 2, "capture": {**FULL, "steps": steps}}
    run = take(tmp_path, pipeline(dtype), **changes)
    settled = plan(model_for(pipeline(dtype), run.experiment), run.experiment)
    forecast, found = settled.forecast(), held(run, settled)
    assert sum(forecast.values()) == pytest.approx(sum(found.values()), rel=0.02)
    wrong = {
        a.path: (forecast[a.path], found[a.path])
        for a in settled.arrays
        if a.dtype != "str" and forecast[a.path] != found[a.path]
    }
    assert not wrong
    variables = {
        f"{node.path}/{name}".strip("/")
        for node in run.tree.subtree
        for name in node.to_dataset(inherit=False).variables
    }
    assert variables == {a.path for a in settled.arrays}
    for a in settled.arrays:
        assert run.tree[a.path].dims == a.dims and run.tree[a.path].shape == a.shape


def test_a_recording_that_is_too_large_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    asked = ask(tmp_path / "runs", capture=FULL)
    size = sum(plan(model_for(pipeline(), asked), asked).forecast().values())
    with pytest.raises(
        TooLarge, match=r"more than --max-bytes.*\nMost of it is attention/8x8/cross"
    ) as caught:
        record(asked, pipeline(), max_bytes=size - 1, progress=False)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())
    assert record(asked, pipeline(), max_bytes=size, progress=False).status == "complete"


def test_a_plan_needs_no_weights(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    asked = ask(tmp_path / "runs", images=2, width=48, capture=FULL, decode_every=1)
    plans = [
        plan(load(str(tmp_path), device="cpu", weights=weights), asked) for weights in (True, False)
    ]
    with_weights, without = (
        [(a.path, a.shape, a.dtype, a.dims, a.nbytes) for a in p.arrays] for p in plans
    )
    assert with_weights == without
    assert (
        plans[0].rehearsal
        == plans[1].rehearsal
        == plan(StableDiffusion.of(pipeline()), asked).rehearsal
    )


# --- values that are not finite -------------------------------------------------------------------


@pytest.fixture
def breaking() -> Iterator[Any]:
    """A pipeline whose UNet gives NaN from step 3 on."""
    pipe = tiny.pipeline()

    def spoil() -> None:
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("nan"))

    with hooks.Hooks([(pipe.unet, "input", at_call(3, spoil))]):
        yield pipe


def test_nan_may_be_recorded(breaking: Any, reference: Run, tmp_path: Path) -> None:
    run = take(tmp_path, breaking, steps=12, scheduler="DDIM", on_nan="record")
    assert run.status == "complete" and len(run.steps) == 12
    finite = np.isfinite(run.prediction().values).all(axis=(1, 2, 3, 4))
    assert list(finite) == [True] * 3 + [False] * 9
    assert_same(run.latents.values[:4], reference.latents.values[:4], "latents")
    assert np.isnan(run.tree["latents/final_latents"].values).all()
    assert {"picture.png", "contact-sheet.png"} <= {file.name for file in run.path.iterdir()}


def test_infinity_stops_the_run_even_at_its_last_step(tmp_path: Path) -> None:
    pipe = tiny.pipeline()

    def spoil() -> None:
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("inf"))

    with (
        hooks.Hooks([(pipe.unet, "input", at_call(3, spoil))]),
        pytest.raises(NotFinite, match="prediction_uncond holds infinity at step 3"),
    ):
        take(tmp_path, pipe, steps=4, scheduler="DDIM")
    assert only(tmp_path).status == "failed"


def test_a_vae_that_overflows_is_run_again_in_float32(tmp_path: Path) -> None:
    pipe = tiny.pipeline().to(torch.float16)
    plain = take(tmp_path / "plain", pipe, decode_every=2)
    assert plain.attributes["decoded_in_float32"] is False
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(2e4)
    weights = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    run = take(tmp_path / "overflow", pipe, decode_every=2)
    assert run.attributes["decoded_in_float32"] is True and run.status == "complete"
    assert run.images.values.std() > 1 and run.tree["decoded/picture"].values.std() > 1, (
        "the picture is black"
    )
    assert all(torch.equal(value, weights[name]) for name, value in pipe.vae.state_dict().items())
    assert_same(run.latents.values, plain.latents.values, "latents")  # float16 throughout
    assert run.latents.dtype == np.float16 and np.isfinite(run.tree["vae/statistics"].values).all()


# --- pictures and words ---------------------------------------------------------------------------


def test_pictures_carry_their_experiment_and_are_not_in_the_manifest(
    full: Run, reference: Run
) -> None:
    manifest = json.loads((full.path / MANIFEST).read_text())
    assert "zarr.json" in manifest and not [name for name in manifest if name.endswith(".png")]
    assert {file.name for file in full.path.glob("*.png")} == {
        "picture-0.png",
        "picture-1.png",
        "contact-sheet.png",
    }
    assert {file.name for file in reference.path.glob("*.png")} == {
        "picture.png",
        "contact-sheet.png",
    }
    for run in (full, reference):
        for file in run.path.glob("*.png"):
            with Image.open(file) as picture:
                assert load_experiment(json.loads(picture.text["experiment"])) == run.experiment
                assert picture.text["Software"] == "probe"
    for index in range(2):
        with Image.open(full.path / f"picture-{index}.png") as picture:
            assert_same(np.asarray(picture), full.images.values[index], "picture")


@pytest.mark.parametrize(
    "prompt", ["", "!? ...", "<b>a cat</b> & <script>alert(1)</script>", "猫 ÿ 🐈"]
)
def test_any_prompt_can_be_recorded_and_shown(prompt: str, tmp_path: Path) -> None:
    run = take(tmp_path, prompt=prompt, steps=2)
    assert run.status == "complete" and run.experiment.prompt == prompt
    if not any(letter.isalnum() for letter in prompt):
        assert run.word_overview().sizes["word"] == 0 and run.words == ()
    assert (run.path / "contact-sheet.png").is_file()
    page = run._repr_html_()
    assert "<script" not in page and "<b>a cat" not in page and "data:image/png;base64," in page
    assert "&lt;script&gt;" in page or "<" not in prompt
    assert run.name in repr(run) and "3 of 3 model calls" in repr(run)


def test_a_name_is_escaped_too(full: Run, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.zarr"
    path.symlink_to(full.path)
    assert "<img src=x" not in Run(path)._repr_html_()


def test_decoded_pictures_are_those_of_the_models_own_decoding(full: Run) -> None:
    steps, model = bare(pipeline(), full.experiment), model_for(pipeline(), full.experiment)
    decoded = full.tree["decoded"].to_dataset()
    assert list(decoded["decoded_step"].values) == [0, 2, 4]
    for index in (0, 2, 4):
        assert_same(
            decoded["picture"].sel(decoded_step=index).values,
            model.decode(steps[index].denoised)[0].numpy(),
            f"picture {index}",
        )


def test_previews_have_the_colours_of_the_latents(full: Run) -> None:
    preview = full.preview()
    assert preview.dims == ("step", "image", "y", "x", "rgb") and preview.dtype == np.uint8
    slope, bias = full.tree["preview/latent_to_rgb"].values, full.tree["preview/bias"].values
    expected = np.einsum("sicyx,cr->siyxr", full.denoised().values, slope) + bias
    assert np.abs(preview.values - np.round(expected.clip(0, 1) * 255)).max() <= 1


def test_with_everything_off_there_are_latents_and_pictures(tmp_path: Path) -> None:
    run = take(tmp_path, capture=OFF)
    assert set(run.tree.children) == {"latents", "images", "preview", "cost"}
    assert (
        run.grids == []
        and (run.path / "contact-sheet.png").is_file()
        and "attention       none" in repr(run)
    )
    assert {check.verdict for check in verify(run)} == {"exact", "not checked"}
    with pytest.raises(FileNotFoundError, match="no attention maps"):
        run.attention()


# --- some steps only, and sums --------------------------------------------------------------------


def test_unrecorded_steps_are_nan_and_flagged(tmp_path: Path, full: Run) -> None:
    changes = {"images": 2, "width": 48, "negative_prompt": "scuba diving"}
    run = take(tmp_path, **changes, capture={**FULL, "steps": "1,-1"})
    for grid in run.grids:
        group = run.tree[f"attention/{grid}"]
        assert list(group["recorded"].values) == [0, 1, 0, 0, 1]
        for name in ("cross", "moments"):
            assert list(
                np.isnan(group[name].values).all(axis=tuple(range(1, group[name].ndim)))
            ) == [True, False, True, True, False]
        assert list(run.attention(grid).step.values) == [1, 4]
        assert_same(
            run.attention(grid).values, full.attention(grid).sel(step=[1, 4]).values, "maps"
        )
        summed = probabilities(run.attention(grid).values).sum(axis=0)
        np.testing.assert_allclose(group["time_sum"].values, summed, atol=1e-5)
    for name in ("unet/statistics", "unet/mid_block/activation"):
        assert_same(run.tree[name].values[[1, 4]], full.tree[name].values[[1, 4]], name)
        assert np.isnan(run.tree[name].values[[0, 2, 3]]).all()
    assert run.overview().step.values.tolist() == [1, 4]
    np.testing.assert_allclose(
        run.overview().values, full.overview().sel(step=[1, 4]).values, atol=1e-5
    )
    assert_same(run.latents.values, full.latents.values, "latents")


def test_time_sum_is_the_sum_of_the_maps(full: Run) -> None:
    for grid in full.grids:
        summed = probabilities(full.attention(grid).values).sum(axis=0)
        np.testing.assert_allclose(
            full.tree[f"attention/{grid}/time_sum"].values, summed, atol=1e-5
        )


def test_the_overview_is_the_mean_of_the_maps(full: Run) -> None:
    """On a grid of its own: layers are weighted alike, and a coarse one is stretched by torch's
    interpolation.
    """
    total = np.zeros((5, 77, 8, 12), np.float32)
    for grid in full.grids:
        maps = (
            torch.from_numpy(probabilities(full.attention(grid).sel(branch="cond").values))
            .mean(dim=(2, 4))
            .sum(dim=2)
        )
        total += torch.nn.functional.interpolate(maps, size=(8, 12), mode="bilinear").numpy()
    assert full.grids == ["8x12", "4x6"]
    np.testing.assert_allclose(full.overview().values, total / 4, atol=1e-5)
    np.testing.assert_allclose(full.overview().sum("token").values, 1, atol=1e-3)


def test_an_unfinished_run_computes_what_a_finished_one_stores(
    reference: Run, tmp_path: Path
) -> None:
    pipe = pipeline()
    with (
        hooks.Hooks([(pipe.unet, "input", at_call(5, throw(KeyboardInterrupt())))]),
        pytest.raises(KeyboardInterrupt),
    ):
        take(tmp_path, steps=12, scheduler="DDIM")
    run = only(tmp_path)
    finished = reference.overview().isel(step=slice(0, 5))
    assert run.overview().dims == finished.dims
    np.testing.assert_allclose(run.overview().values, finished.values, atol=1e-5)
    labels = reference.tree[f"attention/{reference.grids[0]}"].to_dataset().isel(branch=-1)
    words = word_maps(finished.mean("step"), labels["word"].values, labels["word_index"].values)
    assert words["word"].values.tolist() == list(run.words) == PROMPT.split()
    np.testing.assert_allclose(run.word_overview().values, words.values, atol=1e-5)


# --- the rest -------------------------------------------------------------------------------------


def test_cost_is_measured(full: Run) -> None:
    cost = full.tree["cost"].to_dataset()
    assert (
        (cost["flops"].values > 0).all()
        and (cost["seconds"].values > 0).all()
        and int(cost["peak_memory"]) > 1e7
    )
    assert (cost["step_seconds"].values >= cost["unet_seconds"].values).all() and (
        cost["unet_seconds"].values > 0
    ).all()
    assert float(cost["seconds"].sel(component="unet")) == pytest.approx(
        float(cost["unet_seconds"].sum())
    )


def test_parameters_and_weight_bytes_are_those_in_memory(full: Run) -> None:
    pipe, cost = pipeline(), full.tree["cost"].to_dataset()
    for component in ("text_encoder", "unet", "vae"):
        weights = list(getattr(pipe, component).parameters())
        assert int(cost["parameters"].sel(component=component)) == sum(p.numel() for p in weights)
        assert int(cost["weight_bytes"].sel(component=component)) == sum(p.nbytes for p in weights)


def test_a_shared_parameter_counts_once_in_each_component(tmp_path: Path) -> None:
    pipe = tiny.pipeline().to(torch.bfloat16)
    buffers = sum(b.numel() for b in pipe.text_encoder.buffers())
    own = sum(p.numel() for p in pipe.unet.parameters())
    pipe.unet.conv_out.bias = pipe.vae.post_quant_conv.bias  # shared between two components
    pipe.unet.conv_in.bias = pipe.unet.conv_norm_out.bias  # and within one
    arrays = {a.path: a.value for a in plan(StableDiffusion.of(pipe), ask(tmp_path)).arrays}
    order = list(arrays["cost/component"])
    counts = dict(zip(order, arrays["cost/parameters"].tolist(), strict=True))
    nbytes = dict(zip(order, arrays["cost/weight_bytes"].tolist(), strict=True))
    assert counts["unet"] == own - pipe.unet.conv_norm_out.bias.numel()
    assert counts["vae"] == sum(p.numel() for p in pipe.vae.parameters())
    assert nbytes == {part: 2 * count for part, count in counts.items()}
    text_bytes = sum(p.nbytes for p in pipe.text_encoder.parameters())
    assert buffers and nbytes["text_encoder"] == text_bytes, "buffers do not count"


def test_the_bundled_model_counts_as_its_weights_file_does(tmp_path: Path) -> None:
    model = load("emojiworld")
    made = plan(
        model, load_experiment({"model": "emojiworld", "steps": 2, "output": str(tmp_path)})
    )
    arrays = {a.path: a.value for a in made.arrays}
    found = dict(zip(arrays["cost/component"], arrays["cost/parameters"].tolist(), strict=True))
    assert found == {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.components().items()
    }
    assert min(found.values()) > 10_000


def test_two_runs_of_one_experiment_are_two_recordings(tmp_path: Path) -> None:
    first, second = take(tmp_path, steps=1, capture=OFF), take(tmp_path, steps=1, capture=OFF)
    assert (
        first.path != second.path and first.attributes["identity"] == second.attributes["identity"]
    )
    xr.testing.assert_identical(first.latents.drop_attrs(), second.latents.drop_attrs())


@pytest.mark.parametrize("durability", ["step", "run"])
def test_durability_changes_no_value(durability: str, reference: Run, tmp_path: Path) -> None:
    run = take(tmp_path, steps=12, scheduler="DDIM", durability=durability)
    assert run.status == "complete"
    assert_prefix(run, reference, 12)


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(ask(tmp_path, steps=1, capture=OFF), pipeline())
    said = capsys.readouterr()
    assert not said.out and "Recording 1 model calls to" in said.err and "Denoising" in said.err
    take(tmp_path, steps=1, capture=OFF)
    assert capsys.readouterr() == ("", "")
