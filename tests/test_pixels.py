"""A model of pixels is a model like any other, without a VAE: its latents are its picture."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from recordings import assert_same, cut
from tiny_runs import FULL, OFF, assert_neutral, bare, take
from views import open_view

from probe.dashboard import recorder
from probe.dashboard.library import Library, configure
from probe.dashboard.recorder import Recorder, allow, vocabulary
from probe.diffusion.loading import load
from probe.diffusion.parts import to_uint8
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, ModelError
from probe.figures.anatomy_page import drawing, sentences
from probe.figures.bundle import latent_channel, payload
from probe.figures.page import page
from probe.noising import losses
from probe.proof.verdict import verify
from probe.reading.distances import distance
from probe.reading.recording import Run
from probe.running.recorder import record_noising, rerun, resume
from probe.settings.bundled import BUNDLED, models_there, words_of

PROMPT = "a cat on the hat"
EVERYTHING: dict[str, Any] = {
    **FULL,
    "activations": ("unet.mid_block", "text_encoder.encoder.layers.0"),
    "self_attention": ("*",),
    "counterfactual": ("cat",),
}


@functools.cache
def pixels() -> Any:
    return tiny.pixel_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of pixels as a diffusers directory. Not to be changed: take a copy."""
    path = tmp_path_factory.mktemp("pixels") / "model"
    pixels().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording of it with everything on. Not to be changed."""
    where = tmp_path_factory.mktemp("full")
    return take(where, pixels(), guidance_scale=3.0, decode_every=1, capture=EVERYTHING)


def picture(side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


# --- the model ------------------------------------------------------------------------------------


def test_it_is_loaded_from_a_folder_without_a_vae(folder: Path) -> None:
    assert not (folder / "vae").exists()
    for weights in (True, False):
        model = load(str(folder), device="cpu", weights=weights)
        assert model.vae is None and (model.f, model.scaling_factor) == (1, 1.0)
        assert model.latent_shape(2, 24, 32) == (2, 3, 24, 32)
        assert list(model.components()) == ["unet", "text_encoder"]
        assert len(model.scheduler.config.trained_betas) == 1000


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["default", "DPM++2M", "Euler"])
def test_the_bits_are_those_of_diffusers(folder: Path, guidance: float, scheduler: str) -> None:
    """Its pipeline draws without a VAE if it is asked for latents."""
    model = load(str(folder), device="cpu").with_scheduler(scheduler, {})
    pipeline = pixels().from_pipe(pixels(), scheduler=model.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    conditioning = model.condition(PROMPT, "", guided=guidance > 1)
    *_, last = denoise(model, conditioning, steps=4, guidance_scale=guidance, seed=5)
    assert torch.equal(last.next_latents, theirs)


def test_a_latent_model_without_its_vae_is_refused() -> None:
    for made in (tiny.pipeline(), tiny.xl_pipeline()):
        made.vae = None
        with pytest.raises(ModelError, match="the pipeline has no vae"):
            take(Path("runs"), made)


def test_a_vae_that_compresses_nothing_is_refused() -> None:
    """f = 1 in a recording means pixels."""
    made = pixels().from_pipe(pixels())
    made.vae = tiny.autoencoder(blocks=1, channels=3)
    with pytest.raises(ModelError, match="compresses nothing") as refused:
        StableDiffusion.of(made)
    assert refused.value.remedy == "Use a VAE of two blocks or more, or a model without one."


# --- its recordings -------------------------------------------------------------------------------


def test_recording_changes_no_bit(full: Run) -> None:
    assert_neutral(full, bare(pixels(), full.experiment))


def test_its_latents_are_its_picture(full: Run) -> None:
    final = full.variable("latents/final_latents")
    assert_same(full.images.values, to_uint8(torch.from_numpy(final.values)).numpy(), "picture")
    assert_same(full.preview(final).values, full.images.values, "the preview")
    denoised = torch.from_numpy(full.denoised().values[:, 0])
    decoded = full.variable("decoded/picture").isel(image=0).values
    assert_same(decoded, to_uint8(denoised).numpy(), "the predicted pictures")


def test_it_says_that_it_is_of_pixels(full: Run) -> None:
    assert full.attributes.model.f == 1 and full.attributes.family == "sd"
    assert "vae" not in full.tree.children
    assert list(full.tree["cost"]["component"].values) == ["text_encoder", "unet"]


def test_every_check_proves_it(full: Run) -> None:
    checks = {check.name: check.verdict for check in verify(full, pixels()).checks}
    assert set(checks.values()) <= {"exact", "within tolerance"}
    assert {"schema", "scheduler", "predictions", "decode", "inside"} <= checks.keys()


def test_the_inside_of_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"'vae\.decoder\.\*' .*: this model has no VAE"):
        take(tmp_path, pixels(), capture={"activations": ["vae.decoder.*"]})
    assert not list(tmp_path.iterdir())


def test_it_goes_on_and_is_recorded_again_to_the_same_bits(tmp_path: Path) -> None:
    whole = take(tmp_path / "whole", pixels(), guidance_scale=3.0)
    begun = cut(whole, tmp_path / "cut", 2)
    gone_on = resume(begun, pixels(), progress=False)
    again = rerun(whole, pixels(), output=tmp_path / "again", progress=False)
    assert gone_on.diff(whole).same and again.diff(whole).same


def test_it_begins_from_a_picture(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "from.png")
    run = take(tmp_path, pixels(), image=str(tmp_path / "from.png"), strength=0.5, capture=OFF)
    assert_same(run.source.values, picture(), "the pixels that it began from")
    assert verify(run, pixels()).verdict != "failed"


def test_noise_is_put_into_pixels(tmp_path: Path) -> None:
    run = record_noising(
        picture(),
        "a cat",
        pipeline=pixels(),
        timesteps=(900, 100),
        output=str(tmp_path),
        progress=False,
    )
    assert_same(run.images.values[0], picture(), "the picture, which no VAE changed")
    assert verify(run, pixels()).verdict != "failed"


@pytest.mark.parametrize(
    "edit",
    [
        {"kind": "mask", "words": ["cat"]},
        {"kind": "output", "modules": ["unet.mid_block"], "how": "zero"},
        {"kind": "latents", "steps": "1:", "donor": {"seed": 9}},
    ],
    ids=lambda edit: edit["kind"],
)
def test_it_is_edited(tmp_path: Path, edit: dict[str, Any]) -> None:
    settings = {"guidance_scale": 3.0, "steps": 2, "capture": OFF}
    parent = take(tmp_path, pixels(), **settings)
    run = take(tmp_path, pixels(), **settings, edits=[edit])
    assert verify(run, pixels()).verdict != "failed"
    assert run.against_parent().parent == parent.name


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emojiworld-pixels", "emojiworld-latents"])
def test_a_model_that_ships_is_found_by_its_name(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUNDLED, name, folder)
    assert load(name, device="cpu").name == name and name in models_there()
    monkeypatch.setitem(BUNDLED, name, tmp_path)
    assert name not in models_there()
    with pytest.raises(ModelError) as absent:
        load(name)
    assert absent.value.cause.endswith(f"its folder probe/{name} is not there.")
    assert "python -m experiments.pixels.export" in absent.value.remedy


def test_the_page_record_offers_what_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "words.json").write_text('["cat", "hat"]')
    monkeypatch.setitem(BUNDLED, "emojiworld-pixels", tmp_path / "model")
    monkeypatch.setitem(BUNDLED, "emojiworld-latents", tmp_path)
    vocabulary.cache_clear()
    allow(Recorder(tmp_path))
    try:
        app = open_view("record", model="emojiworld-pixels", prompt="cat hat")
        assert app.selectbox("model").options == ["emojiworld", "emojiworld-pixels"]
        assert any('model: "emojiworld-pixels"' in code.value for code in app.code)
        assert not app.button("begin").disabled
        app.text_area("prompt").input("dog").run()
        assert any("never saw 'dog'" in code.value for code in app.code)
    finally:
        recorder._recorder.clear()
        vocabulary.cache_clear()


@pytest.mark.parametrize("name", list(BUNDLED))
def test_each_bundled_model_is_what_its_name_says(name: str) -> None:
    assert name in models_there()
    model = load(name, weights=False)
    assert model.f == {"emojiworld": 8, "emojiworld-pixels": 1, "emojiworld-latents": 4}[name]
    assert model.vocabulary == set(words_of(name))
    _, channels, y, x = model.latent_shape(1)
    assert channels == (3 if model.f == 1 else 4)
    assert (y * model.f, x * model.f) == ((128, 128) if name == "emojiworld" else (64, 64))


# --- how it is shown ------------------------------------------------------------------------------


def meta_of(run: Run) -> dict[str, Any]:
    """The header of what the player is given of a run."""
    content = payload(run)
    length = int.from_bytes(content[4:8], "little")
    return json.loads(content[8 : 8 + length])["meta"]


def open_page(view: str, *runs: Run) -> Any:
    """A page of the dashboard that shows these runs."""
    for run in runs:
        target = runs[0].path.parent / run.path.name
        if not target.exists():
            shutil.copytree(run.path, target)
    configure(Library(runs[0].path.parent))
    return open_view(view, runs=[run.name for run in runs])


def test_the_player_names_pixels_and_their_colours(full: Run, tmp_path: Path) -> None:
    meta = meta_of(full)
    notes = {panel["part"]: (panel["title"], panel["note"]) for panel in meta["panels"]}
    assert notes["latents"] == ("Noisy picture going in", "3 numbers a pixel, shown as colour")
    assert meta["latent_names"] == ["red", "green", "blue"] and "(on pixels)" in meta["facts"]
    assert "decoded_steps" not in meta, "the guess is a picture already"
    assert b"green, from -" in latent_channel(full, 1)
    other = meta_of(take(tmp_path, tiny.pipeline(), steps=2, capture=OFF))
    notes = {panel["part"]: panel["note"] for panel in other["panels"]}
    assert notes["latents"] == "4 numbers a square, shown as colour"
    assert other["latent_names"] == [f"channel {number}" for number in range(4)]


def test_the_anatomy_has_no_decoder(full: Run) -> None:
    drawn = drawing(full)
    assert "No VAE" in drawn and "VAE decoder" not in drawn and "works on pixels" in drawn
    assert "no decoder: what the last step leaves is the picture" in drawn
    said = " ".join(sentences(full))
    assert "all 3 x 16 x 16 = 768 numbers of the picture" in said and "Why latents" not in said


def test_a_summary_and_the_dashboard_say_so(full: Run) -> None:
    assert full.summary()["model"].endswith(", on pixels: without a VAE")
    app = open_page("anatomy", full)
    assert any("it has no VAE" in text.value for text in app.text)
    app = open_page("guidance", full)
    assert any("Each pixel is a square of" in part.proto.body for part in app.get("html"))


def test_a_noising_shows_no_round_trip(tmp_path: Path) -> None:
    run = record_noising(
        picture(),
        "a cat",
        pipeline=pixels(),
        timesteps=(500,),
        output=str(tmp_path),
        progress=False,
    )
    assert losses(run)[-1] == "The model works on pixels: no VAE changed the picture."
    parts = [panel["part"] for panel in meta_of(run)["panels"]]
    assert "source" in parts and "decoded" not in parts
    assert (run.path / "contact-sheet.png").is_file()


def test_it_is_replayed_beside_a_latent_run_by_noise_level(full: Run, tmp_path: Path) -> None:
    """Other grids, other channels, another schedule: only sigma is common."""
    other = take(tmp_path, tiny.pipeline(), guidance_scale=3.0)
    assert "on pixels" in page([full, other])
    assert not full.diff(other).same
    with pytest.raises(ExperimentError, match=r"3 x 16 x 16, those of .* 4 x 8 x 8"):
        distance(full, other)
    app = open_page("compare", full, other)
    assert any("3 x 16 x 16" in text.value for text in app.text)
