"""The forward process: noise is known, so everything recorded is compared with what it must be."""

from __future__ import annotations

import functools
import itertools
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zarr
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from probe import cli, noising
from probe.diffusion.loading import BUNDLED, load
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, PromptError, RecordingNotFound, TooLarge
from probe.figures.noising_sheet import CELL, GAP, MARGIN, PALE, noising_sheet
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.recorder import record, record_noising, resume
from probe.settings.experiment import load_experiment
from probe.settings.noising import Noising, load_noising
from probe.settings.pictures import read_masks, read_picture
from probe.terminal import guarded
from probe.watching import hooks
from probe.watching.source import psnr
from probe.writing import store
from probe.writing.chunks import StepFiles

ROOT = Path(__file__).parent.parent
CAPTION, TIMESTEPS, NOISES, SEED = "a cat on the hat", (900, 500, 100, 0), 3, 7
LIGHT = {"attention": "off", "text": False, "statistics": False}


def picture() -> np.ndarray:
    y, x = np.mgrid[:32, :32] / 32
    return (np.stack([x, y, (x + y) % 1], axis=-1) * 255).astype(np.uint8)


def masks() -> dict[str, np.ndarray]:
    left = np.zeros((32, 32), bool)
    left[:, :16] = True
    return {"cat": left, "hat": ~left}


@functools.cache
def base(prediction: str = "epsilon") -> Any:
    return tiny.pipeline(prediction)


def take(folder: Path, prediction: str = "epsilon", **changes: Any) -> Run:
    asked = {
        "timesteps": list(TIMESTEPS),
        "noises": NOISES,
        "seed": SEED,
        "output": str(folder),
        **changes,
    }
    return record_noising(
        picture(), CAPTION, masks(), pipeline=base(prediction), progress=False, **asked
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording with everything. Not to be changed."""
    return take(tmp_path_factory.mktemp("made"), capture={"tokens": "all", "dtype": "float32"})


@pytest.fixture(scope="module")
def velocity(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One of a model that predicts velocity. Not to be changed."""
    return take(
        tmp_path_factory.mktemp("velocity"),
        "v_prediction",
        capture={"statistics": False},
        decode=False,
    )


def value(run: Run, path: str) -> torch.Tensor:
    return torch.from_numpy(run.variable(path).values)


# --- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_number_is_what_it_must_be(made: Run, velocity: Run, prediction: str) -> None:
    """Held against the pipeline's own VAE, UNet and scheduler, called by hand."""
    run = made if prediction == "epsilon" else velocity
    pipe = base(prediction)
    model = StableDiffusion.of(pipe).with_scheduler("DDPM", {})
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255 * 2 - 1
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        text = model.encode(model.read(CAPTION)).repeat(NOISES, 1, 1)
    eps = torch.cat(
        [
            torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED + i))
            for i in range(NOISES)
        ]
    )
    assert torch.equal(value(run, "forward/noise"), eps)
    torch.testing.assert_close(
        value(run, "forward/clean"), clean.repeat(NOISES, 1, 1, 1), rtol=1e-5, atol=1e-6
    )
    clean = value(run, "forward/clean")
    assert tuple(run.tree["timestep"].values) == TIMESTEPS and run.status == "complete"
    for index, t in enumerate(TIMESTEPS):
        at = torch.tensor([t] * NOISES)
        x = model.scheduler.add_noise(clean, eps, at)
        with torch.no_grad():
            said = pipe.unet(x, torch.tensor(t), encoder_hidden_states=text).sample
        assert torch.equal(value(run, "latents/latents")[index], x)
        assert torch.equal(value(run, "latents/prediction")[index], said), (
            "recording changes nothing"
        )
        wanted = eps if prediction == "epsilon" else model.scheduler.get_velocity(clean, eps, at)
        loss = ((said - wanted) ** 2).mean(dim=(1, 2, 3))
        torch.testing.assert_close(value(run, "forward/loss")[index], loss, rtol=1e-4, atol=1e-6)
        a = float(model.scheduler.alphas_cumprod[t])
        noise = said if prediction == "epsilon" else a**0.5 * said + (1 - a) ** 0.5 * x
        torch.testing.assert_close(
            value(run, "forward/difference")[index], noise - eps, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            value(run, "forward/noise_loss")[index],
            ((noise - eps) ** 2).mean(dim=(1, 2, 3)),
            rtol=1e-4,
            atol=1e-6,
        )
        torch.testing.assert_close(
            value(run, "forward/denoised")[index],
            (x - (1 - a) ** 0.5 * noise) / a**0.5,
            rtol=1e-3,
            atol=1e-4,
        )
        assert float(run.tree["alpha_bar"][index]) == a
    losses = run.variable("forward/loss").values.astype(np.float64)
    np.testing.assert_allclose(run.variable("forward/loss_mean").values, losses.mean(1))
    np.testing.assert_allclose(
        run.variable("forward/loss_spread").values, np.std(losses, axis=1, ddof=1)
    )
    assert [hooks.count(part) for part in (pipe.unet, pipe.vae, pipe.text_encoder)] == [0, 0, 0]


def test_derived_on_reading_is_what_was_recorded(made: Run) -> None:
    np.testing.assert_allclose(
        made.denoised().values, made.variable("forward/denoised").values, rtol=1e-5, atol=1e-5
    )
    difference = made.eps() - made.variable("forward/noise")
    np.testing.assert_allclose(
        difference.transpose(*made.latents.dims).values,
        made.variable("forward/difference").values,
        rtol=1e-5,
        atol=1e-5,
    )


def test_attention_is_that_of_the_layer(made: Run) -> None:
    """diffusers' own `get_attention_scores`, on what the layer was given, at each timestep."""
    pipe = base()
    model = StableDiffusion.of(pipe)
    path = str(made.attention("8x8").layer.values[0])
    module = pipe.unet.get_submodule(path)
    text = model.encode(model.read(CAPTION)).repeat(NOISES, 1, 1)
    for index, t in enumerate(TIMESTEPS):
        seen: list[torch.Tensor] = []
        with hooks.Hooks([(module, "input", seen.append)]), torch.no_grad():
            pipe.unet(
                value(made, "latents/latents")[index], torch.tensor(t), encoder_hidden_states=text
            )
            query, key = (
                module.head_to_batch_dim(part) for part in (module.to_q(seen[0]), module.to_k(text))
            )
            scores = module.get_attention_scores(query, key).unflatten(0, (NOISES, module.heads))
        maps = (
            made.attention("8x8")
            .isel(step=index, branch=0, layer=0)
            .transpose("draw", "head", "y", "x", "token")
            .values
        )
        np.testing.assert_allclose(maps.reshape(scores.shape), scores.numpy(), atol=1e-6)


def test_picture_masks_and_the_round_trip(made: Run) -> None:
    assert made.source is not None and np.array_equal(made.source.values, picture())
    for word, mask in masks().items():
        assert np.array_equal(made.variable("source/mask").sel(masked=word).values, mask)
    pipe = base()
    with torch.no_grad():
        decoded = pipe.vae.decode(
            value(made, "forward/clean")[:1] / pipe.vae.config.scaling_factor
        ).sample
    trip = pipe.image_processor.numpy_to_pil(pipe.image_processor.postprocess(decoded, "np"))[0]
    assert np.array_equal(made.images.values[0], np.asarray(trip))
    error = np.mean((np.asarray(trip, float) - picture()) ** 2)
    assert float(made.variable("source/psnr")) == pytest.approx(
        20 * np.log10(255) - 10 * np.log10(error)
    )
    assert made.variable("decoded/picture").sizes["decoded_step"] == len(TIMESTEPS)


@given(st.integers(1, 254), st.integers(-1, 1))
def test_psnr_on_known_answers(level: int, off: int) -> None:
    flat = np.full((4, 4, 3), level, np.uint8)
    assert psnr(flat, flat + np.int8(off).astype(np.uint8)) == (
        float("inf") if off == 0 else pytest.approx(48.1308, abs=1e-4)
    )


def test_a_draw_is_the_same_however_many_are_drawn_and_wherever(tmp_path: Path, made: Run) -> None:
    one = take(tmp_path, noises=1, seed=SEED + 1, timesteps=[500], capture=LIGHT)
    assert np.array_equal(
        one.variable("forward/noise").values[0], made.variable("forward/noise").values[1]
    )
    assert np.array_equal(one.latents.values[0, 0], made.latents.values[1, 1])
    assert (
        np.isnan(one.variable("forward/loss_spread").values).all()
        and np.isfinite(one.variable("forward/loss_mean").values).all()
    )


def test_anyone_can_read_it(made: Run) -> None:
    """Stock xarray, no warning; the noise levels beside the losses."""
    tree = xr.open_datatree(made.path, engine="zarr")
    assert tree["forward/loss"].dims == ("step", "draw") and tree["forward/loss"].shape == (4, 3)
    assert dict(tree["forward"].dataset["difference"].sizes) == {
        "step": 4,
        "draw": 3,
        "channel": 4,
        "y": 8,
        "x": 8,
    }
    assert (made.path / store.MANIFEST).is_file()
    assert "noised at 4 timesteps, 3 draws of noise, seed 7" in repr(
        made
    ) and "guidance" not in repr(made)
    with Image.open(made.path / "contact-sheet.png") as sheet:
        assert json.loads(sheet.text["noising"]) == made.attributes["noising"]  # type: ignore[attr-defined]
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000
    assert load_noising(made.attributes["noising"]).timesteps == TIMESTEPS


def test_a_recipe_of_its_own_is_recorded_as_any_other(tmp_path: Path) -> None:
    """`record` of a Noising and `record_noising` are one path: the same bits, and the same said of
    them.
    """
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    asked = load_noising(
        {
            "caption": CAPTION,
            "timesteps": [500, 100],
            "noises": 2,
            "capture": {"attention": "queries"},
        },
        output=str(tmp_path),
    )
    one = record(
        asked, base(), progress=False, picture=str(tmp_path / "picture.png"), height=32, width=32
    )
    again = {
        name: value
        for name, value in asked.resolved().items()
        if name not in ("picture", "caption", "masks")
    } | {"height": 32, "width": 32}
    other = record_noising(
        tmp_path / "picture.png", CAPTION, pipeline=base(), progress=False, **again
    )
    found = compare(one, other)
    assert found.same and not found.asked and found.variables > 50
    assert (one.kind, one.recipe, one.attributes["kind"]) == ("noising", one.noising, "noising")
    assert (
        "experiment" not in one.attributes
        and one.attributes["identity"] == one.noising.identity() == other.attributes["identity"]
    )
    with pytest.raises(RecordingNotFound, match="is a noising, and has no experiment"):
        _ = one.experiment
    assert one.name.startswith("a-cat-on-the-hat-") and one.noising.picture == str(
        tmp_path / "picture.png"
    )


def test_a_noising_in_memory_is_the_one_in_files(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    asked = load_noising(
        {"caption": CAPTION, "timesteps": [500], "noises": 2, "height": 32, "width": 32},
        output=str(tmp_path),
    )
    one = record(asked, base(), progress=False, picture=str(tmp_path / "picture.png"))
    other = record(one.noising, base(), progress=False, output=None).save(tmp_path / "saved.zarr")
    assert (
        compare(one, other).same
        and other.latents.dims[1] == "draw"
        and (other.path / "contact-sheet.png").is_file()
    )
    third = record_noising(
        picture(),
        CAPTION,
        pipeline=base(),
        timesteps=[500],
        noises=2,
        height=32,
        width=32,
        output=None,
        progress=False,
    )
    assert not third.path.exists()
    np.testing.assert_array_equal(third.latents.values, one.latents.values)


def test_draws_are_chosen_as_images_are(made: Run) -> None:
    maps = made.token_maps(images=[2])
    assert maps.dims == ("step", "token", "draw", "y", "x") and maps.sizes["draw"] == 1
    mean = made.token_maps().mean("draw")
    for dim in ("image", "draw"):
        np.testing.assert_allclose(
            made.token_maps(over=("layer", "head", dim)).values, mean.values, atol=1e-6
        )
    with pytest.raises(RecordingNotFound, match="has no draw 3"):
        made.token_maps(images=3)


def test_other_captures_and_number_formats(tmp_path: Path) -> None:
    queries = take(
        tmp_path,
        timesteps=[500],
        capture={"attention": "queries", "counterfactual": ["cat"], "self_attention": ["4x4"]},
    )
    assert queries.attention().sizes["token"] == 77 and queries.attention().sizes["draw"] == NOISES
    assert (
        queries.attention().isel(draw=1, step=0).values.any()
        and queries.variable("counterfactual/change").sizes["masked_word"] == 1
    )
    half = record_noising(
        picture(),
        "",
        pipeline=tiny.pipeline().to(torch.bfloat16),
        progress=False,
        timesteps=[500],
        output=str(tmp_path),
        decode=False,
    )
    assert (
        half.attributes["model"]["dtype"] == "bfloat16"
        and np.isfinite(half.variable("forward/loss").values).all()
    )
    assert "decoded" not in half.tree.children and not [
        c for c in verify(half) if c.verdict == "failed"
    ]


# --- verify ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_verified_with_and_without_the_model(made: Run, velocity: Run, prediction: str) -> None:
    run = made if prediction == "epsilon" else velocity
    found = {check.name: check for check in verify(run, base(prediction))}
    assert not [check for check in found.values() if check.verdict == "failed"]
    exact = (
        "manifest committed schema labels schedule guidance scheduler weights plan text "
        "predictions decode encode"
    )
    assert {name: found[name].verdict for name in exact.split()} == dict.fromkeys(
        exact.split(), "exact"
    )
    assert (
        found["forward"].verdict in ("exact", "within tolerance")
        and "not there" in found["picture"].detail
    )


PLANTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "another noise": ("forward/noise", lambda v: v[::-1], "forward"),
    "other clean latents": ("forward/clean", lambda v: v * 1.01, "scheduler"),
    "a noised latent": (
        "latents/latents",
        lambda v: np.where(np.arange(len(v))[:, None, None, None, None] == 2, v * 1.001, v),
        "scheduler",
    ),
    "a prediction": ("latents/prediction_cond", lambda v: v * 1.001, "guidance"),
    "a difference": ("forward/difference", lambda v: -v, "forward"),
    "denoised latents": ("forward/denoised", lambda v: v[:, ::-1], "forward"),
    "a loss": ("forward/loss", lambda v: v * 1.01, "forward"),
    "a mean": ("forward/loss_mean", lambda v: v[::-1], "forward"),
    "a spread of n": (
        "forward/loss_spread",
        lambda v: v * ((NOISES - 1) / NOISES) ** 0.5,
        "forward",
    ),
    "a round trip": ("source/psnr", lambda v: v + 1, "forward"),
    "another picture": ("source/picture", lambda v: v[::-1], "forward"),
    "a timestep": ("timestep", lambda v: v + 1, "schedule"),
    "a noise level": ("alpha_bar", lambda v: v * 0.9, "schedule"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording for planting faults: each is taken out again."""
    return take(tmp_path_factory.mktemp("small"), capture=LIGHT)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_faults_are_found(small: Run, plant: str) -> None:
    path, change, check = PLANTS[plant]
    held = zarr.open_array(small.path / path, mode="r+")
    before = np.asarray(held[...])
    try:
        held[...] = change(before).astype(before.dtype)
        found = {c.name: c.verdict for c in verify(Run(small.path))}
    finally:
        held[...] = before
    assert found[check] == "failed"
    if plant == "a timestep":
        # once is enough: with the fault taken out again, nothing fails but the manifest, whose
        # files were rewritten
        assert (
            "failed"
            not in {
                c.name: c.verdict for c in verify(Run(small.path)) if c.name != "manifest"
            }.values()
        )


def test_image_to_image_is_verified_too(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    asked = {
        "prompt": CAPTION,
        "image": str(tmp_path / "picture.png"),
        "strength": 0.5,
        "steps": 4,
        "images": 2,
        "scheduler": "EulerAncestral",
    }
    run = record(
        {**asked, "output": str(tmp_path / "runs"), "capture": LIGHT}, base(), progress=False
    )
    (tmp_path / "picture.png").unlink()
    found = {check.name: check for check in verify(run, base())}
    assert not [check for check in found.values() if check.verdict == "failed"]
    assert all(
        found[name].verdict == "exact"
        for name in "schema schedule scheduler forward plan predictions decode encode".split()
    )
    for path, check in (("forward/noise", "forward"), ("forward/clean", "scheduler")):
        held = zarr.open_array(run.path / path, mode="r+")
        before = np.asarray(held[...])
        held[...] = before[::-1]
        assert {c.name: c.verdict for c in verify(Run(run.path))}[check] == "failed"
        held[...] = before


# --- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "step"])
def test_stopped_on_the_way_it_opens_and_is_not_resumed(tmp_path: Path, durability: str) -> None:
    pipe, calls = tiny.pipeline(), itertools.count()

    def stop(*_: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    pipe.unet.register_forward_pre_hook(stop)
    asked = {
        "timesteps": list(TIMESTEPS),
        "noises": 2,
        "output": str(tmp_path),
        "capture": LIGHT,
        "durability": durability,
    }
    with pytest.raises(KeyboardInterrupt):
        record_noising(picture(), CAPTION, pipeline=pipe, progress=False, **asked)
    (path,) = tmp_path.glob("*.zarr")
    run = Run(path)
    assert (
        run.status == "interrupted"
        and list(run.steps) == [0, 1]
        and run.denoised().sizes["step"] == 2
    )
    loss = run.variable("forward/loss").values.astype(np.float64)
    for name, wanted in (("mean", loss.mean(axis=1)), ("spread", loss.std(axis=1, ddof=1))):
        found = run.variable(f"forward/loss_{name}").values
        np.testing.assert_allclose(found, wanted)
        assert np.isfinite(found[:2]).all() and np.isnan(found[2:]).all(), (
            "every committed step has its own"
        )
        held = zarr.open_group(path, mode="r+")[f"forward/loss_{name}"]
        assert StepFiles(path, held).file(1).is_file(), (
            "which is what goes to the disk with the step"
        )
    assert not [check for check in verify(run) if check.verdict == "failed"]
    with pytest.raises(ExperimentError, match="is a noising, and those are not resumed"):
        resume(run, pipe, progress=False)
    held = zarr.open_group(path, mode="r+")["forward/loss_mean"]
    held[1] = held[1] * 1.01
    assert [check.name for check in verify(Run(path)) if check.verdict == "failed"] == [
        "digests",
        "forward",
    ]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timesteps": [1000]}, "timesteps: 1000 is beyond the timesteps of"),
        ({"timesteps": []}, "timesteps: .* is no choice of timesteps"),
        ({"timesteps": [-1]}, "timesteps: .* is no choice of timesteps"),
        ({"timesteps": "5:1:1"}, "timesteps: .* is no choice of timesteps"),
        ({"timesteps": "1:9:0"}, "timesteps: .* is no choice of timesteps"),
        ({"timesteps": [1.5]}, "timesteps: .* is no choice of timesteps"),
        ({"timestep": [5]}, "timestep: unknown field"),
        ({"noises": 0}, "noises: 0 is less than 1"),
        ({"steps": 5}, "steps: unknown field"),
        ({"capture": {"branches": "uncond"}}, "a noising has no unconditional branch"),
        (
            {"capture": {"layers": ["9x9"]}},
            "capture.layers: '9x9' matches no cross-attention layer",
        ),
    ],
)
def test_refused_in_words(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError, match=said) as error:
        take(tmp_path, **changes)
    assert error.value.remedy and not list(tmp_path.iterdir())


def test_pictures_and_masks_of_the_wrong_shape(tmp_path: Path) -> None:
    def refused(pixels: np.ndarray, said: str, shown: dict[str, np.ndarray] | None = None) -> None:
        with pytest.raises(ExperimentError, match=said):
            record_noising(
                pixels, CAPTION, shown, pipeline=base(), progress=False, output=str(tmp_path)
            )

    refused(picture()[:, :30], "32 x 30 pixels; both sides must be multiples of 8")
    refused(picture()[..., 0], "is not \\(y, x, rgb\\) uint8")
    refused(picture() / 255, "is not \\(y, x, rgb\\) uint8")
    refused(picture(), "that of 'cat' has shape \\(16, 16\\)", {"cat": np.ones((16, 16))})
    with pytest.raises(PromptError, match="tokens, 77 is the most"):
        record_noising(
            picture(), "cat " * 80, pipeline=base(), progress=False, output=str(tmp_path)
        )
    with pytest.raises(TooLarge):
        record_noising(
            picture(),
            CAPTION,
            pipeline=base(),
            progress=False,
            output=str(tmp_path),
            max_bytes=1000,
        )
    assert not list(tmp_path.iterdir())


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_timesteps_in_any_order_are_the_noisiest_first(found: list[int]) -> None:
    wanted = tuple(sorted(set(found), reverse=True))
    assert (
        load_noising({"timesteps": found}).timesteps
        == wanted
        == load_noising({"timesteps": ",".join(map(str, found))}).timesteps
    )
    assert (
        load_noising(load_noising({"timesteps": found}).model_dump(mode="json")).timesteps == wanted
    )


def test_a_range_of_timesteps() -> None:
    assert load_noising({"timesteps": "100:400:100"}).timesteps == (300, 200, 100)
    assert load_noising({"timesteps": "0:3"}).timesteps == (2, 1, 0)


# --- the sheet ------------------------------------------------------------------------------------


def written_on(run: Run) -> tuple[np.ndarray, list[str]]:
    """The sheet's pixels, and all that is written on it, in its order."""
    real, said = ImageDraw.ImageDraw.text, []

    def text(
        draw: ImageDraw.ImageDraw, at: tuple[float, float], words: str, *rest: Any, **more: Any
    ) -> None:
        said.append(words)
        real(draw, at, words, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", text)
        return np.asarray(noising_sheet(run)), said


def sheet_of(
    folder: Path, timesteps: list[int], noises: int, shown: int, pipeline: Any = None
) -> tuple[np.ndarray, list[str], Run]:
    """One with that many masks, each a stripe of its own."""
    stripes = {f"w{i}": np.arange(32)[:, None].repeat(32, 1) // 2 == i for i in range(shown)}
    asked = {"timesteps": timesteps, "noises": noises, "output": str(folder), "capture": LIGHT}
    run = record_noising(
        picture(), CAPTION, stripes, pipeline=pipeline or base(), progress=False, **asked
    )
    return *written_on(run), run


@pytest.mark.parametrize(
    ("timesteps", "shown", "left"),
    [(1, 4, ""), (3, 6, "2 more masks, without room here: w4, w5"), (10, 9, "1 more mask, ")],
)
def test_masks_have_the_whole_width_of_the_sheet(
    tmp_path: Path, timesteps: int, shown: int, left: str
) -> None:
    sheet, said, _ = sheet_of(tmp_path, list(range(0, 100 * timesteps, 100)), 1, shown)
    room = max(timesteps, 6) - 2
    assert [words for words in said if words.startswith("mask: ")] == [
        f"mask: w{i}" for i in range(min(shown, room))
    ]
    told = [words for words in said if "without room" in words]
    assert len(told) == bool(left) and all(words.startswith(left) for words in told)
    top = MARGIN + 64
    for index in range(min(shown, room)):
        x = MARGIN + (2 + index) * (CELL + GAP)
        assert (
            sheet[top + int(CELL * (2 * index + 1) / 32), x + CELL // 2].min()
            > 200
            > sheet[top + CELL - 4, x + CELL // 2].min()
        )


@pytest.mark.parametrize("noises", [1, 3])
@pytest.mark.parametrize("timesteps", [[500], [501, 500], [0]])
def test_losses_can_be_read_however_few_there_are(
    tmp_path: Path, timesteps: list[int], noises: int
) -> None:
    sheet, said, run = sheet_of(tmp_path, timesteps, noises, 0)
    heading = next(index for index, words in enumerate(said) if words.startswith("Loss:"))
    mean, spread = (run.variable(f"forward/loss_{name}").values for name in ("mean", "spread"))
    ticks = [float(words) for words in said[heading + 1 : heading + 4]]
    assert ticks == sorted(ticks) and ticks[0] < mean.min() <= mean.max() < ticks[2], (
        "numbers on either side of every loss"
    )
    assert ("band" in said[heading]) == ("spread" in said[heading]) == (noises > 1)
    count = len(timesteps)
    assert any(
        words.startswith(
            f"{run.attributes['model']['name']}   the forward process at {count} "
            f"timestep{'s' * (count > 1)}   "
        )
        for words in said
    )
    if count == 1:
        assert said[heading + 4] == (
            f"{mean[0]:.3g} \u00b1 {spread[0]:.2g}" if noises > 1 else f"{mean[0]:.3g}"
        )
        assert ((sheet == PALE).all(axis=-1).sum() > 100) == (noises > 1), (
            "the spread is a band of one timestep too"
        )
    assert ("spread" in noising.losses(run)[0]) == (noises > 1)


@pytest.mark.parametrize("decode", [True, False])
def test_what_is_not_defined_is_said_and_not_shown_black(tmp_path: Path, decode: bool) -> None:
    """Where nothing is left of the picture (alpha_bar 0), predicted noise says nothing of what is
    clean.
    """
    pipe = tiny.pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    asked = {"timesteps": [999, 500], "output": str(tmp_path), "capture": LIGHT, "decode": decode}
    run = record_noising(picture(), CAPTION, pipeline=pipe, progress=False, **asked)
    assert (
        run.tree["alpha_bar"].values[0] == 0
        and not np.isfinite(run.variable("forward/denoised").values[0]).all()
    )
    sheet, said = written_on(run)
    assert said.count("not defined") == 1
    top = MARGIN + 64 + CELL + 40 + 3 * (CELL + 46) + 22  # the last row of pictures
    empty, full = (
        sheet[top + 1 : top + CELL - 1, x + 1 : x + CELL - 1] for x in (MARGIN, MARGIN + CELL + GAP)
    )
    assert (empty == 255).mean() > 0.8 and (full == 255).mean() < 0.5


# --- files and the command ------------------------------------------------------------------------


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1" if "DISABLE" in name else "error")

    def called(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            guarded(main, [str(a) for a in arguments])
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return called


def write_recipe(folder: Path) -> Path:
    """Write a model, a picture twice as wide as high, two masks, and the YAML that names them."""
    tiny.pipeline().save_pretrained(folder / "model")
    margin = np.zeros((64, 32, 3), np.uint8)
    wide = np.concatenate([margin, picture().repeat(2, 0).repeat(2, 1), margin], axis=1)
    Image.fromarray(wide.astype(np.uint8)).save(folder / "wide.png")
    cat = np.zeros((64, 128), np.uint8)
    cat[:, 32:64] = 1
    np.savez(folder / "masks.npz", cat=cat)
    Image.fromarray((1 - cat) * 255).save(folder / "hat.png")
    (folder / "asked.yaml").write_text(
        f"""
model: {folder}/model
picture: {folder}/wide.png
caption: {CAPTION}
masks: [{folder}/masks.npz, {folder}/hat.png]
timesteps: [100, 900]
noises: 2
output: {folder}/runs
"""
    )
    return folder / "asked.yaml"


def test_from_a_file_on_the_command_line(tmp_path: Path, call: Command) -> None:
    recipe = write_recipe(tmp_path)
    options = ("--capture.attention", "off", "--timesteps", "900,500")
    code, out, err = call(noising.main, recipe, *options, "--dry-run")
    assert code == 0 and "/forward/difference" in out and '"timesteps": [' in out, err
    assert not (tmp_path / "runs").exists()
    code, out, err = call(noising.main, recipe, *options)
    assert code == 0 and "Predicting" in err and "round trip" in out, err
    assert re.search(r"^Check .*probe verify", out, re.MULTILINE)
    (path,) = (tmp_path / "runs").glob("*.zarr")
    run = Run(path)
    assert tuple(run.tree["timestep"].values) == (900, 500)
    assert run.attributes["noising"]["picture"] == f"{tmp_path}/wide.png"
    difference = np.abs(run.variable("source/picture").values.astype(int) - picture())
    assert difference.mean() < 12, "scaled to half, cut to its centre"
    shown = run.variable("source/mask")
    for name in ("cat", "hat"):
        assert np.array_equal(shown.sel(masked=name).values, masks()[name])
    code, out, _ = call(cli.dispatch, "ls", tmp_path / "runs")
    assert code == 0 and "noised at 2 timesteps, seed 0" in out
    code, out, _ = call(cli.dispatch, "show", path)
    assert code == 0 and "/forward/loss_mean" in out and "contact-sheet.png" in out
    for file in ("wide.png", "masks.npz", "hat.png"):
        (tmp_path / file).unlink()
    code, out, err = call(cli.dispatch, "rerun", path)
    assert code == 0 and "the same bits in all" in out, err
    (again,) = (Run(other) for other in (tmp_path / "runs").glob("*.zarr") if other != path)
    assert again.attributes["parent_run"] == run.name
    assert again.attributes["noising"] == run.attributes["noising"]
    changed = json.loads((path / "zarr.json").read_text())
    changed["attributes"]["status"] = "interrupted"
    (path / "zarr.json").write_text(json.dumps(changed))
    code, out, err = call(cli.dispatch, "run", "--resume", path)
    assert code == 2 and "those are not resumed" in err


def test_greys_of_16_bits_are_those_of_8(tmp_path: Path) -> None:
    """For pictures and masks alike, and with the one grey that a PNG may call transparent."""
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(greys.astype(np.uint16) * 257).save(tmp_path / "cat.png")
    with Image.open(tmp_path / "cat.png") as saved:
        assert saved.mode == "I;16"
    assert np.array_equal(
        read_picture(tmp_path / "cat.png", 16, 16), greys[..., None].repeat(3, axis=-1)
    )
    assert np.array_equal(read_masks([tmp_path / "cat.png"], 16, 16)["cat"], greys > 127)
    plain = (tmp_path / "cat.png").read_bytes()
    key = b"tRNS" + (40 * 257).to_bytes(2, "big")
    before = plain.index(b"IDAT") - 4
    (tmp_path / "clear.png").write_bytes(
        plain[:before]
        + (2).to_bytes(4, "big")
        + key
        + zlib.crc32(key).to_bytes(4, "big")
        + plain[before:]
    )
    assert np.array_equal(
        read_picture(tmp_path / "clear.png", 16, 16)[..., 0], np.where(greys == 40, 255, greys)
    )


def test_a_mask_with_nothing_inside_is_refused(tmp_path: Path) -> None:
    """A .png of 0 and 1, which looks black, an array of zeros, and what lies where the picture is
    cut off.
    """
    edge = np.zeros((16, 48), np.uint8)
    edge[:, :16] = 255
    Image.fromarray(edge).save(tmp_path / "edge.png")
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "faint.png")
    np.savez(tmp_path / "masks.npz", cat=np.eye(16, dtype=np.uint8), hat=np.zeros((16, 16), bool))
    for name, told in (
        ("edge.png", "edge.png"),
        ("faint.png", "faint.png"),
        ("masks.npz", "'hat' in .*masks.npz"),
    ):
        with pytest.raises(ExperimentError, match=f"masks: .*{told} has nothing inside") as error:
            read_masks([tmp_path / name], 16, 16)
        assert "white (255" in error.value.remedy


@pytest.mark.parametrize(("height", "width"), [(9000, 7500), (9000, 12000), (20000, 20000)])
def test_a_picture_too_large_to_use_is_told_so(tmp_path: Path, height: int, width: int) -> None:
    """Whether our limit is passed, or one of the two of Pillow.

    Only the first bytes are read: the rest of the file is not there.
    """
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    ended = b"IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    parts = (
        (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + bytes(4) + ended
    )
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    with pytest.raises(
        ExperimentError, match=r"large.png (is 9000 x 7500|has more than 67,108,864) pixels"
    ) as error:
        read_picture(tmp_path / "large.png", 32, 32)
    assert error.value.remedy == "At least 8 a side and at most 67,108,864 in all can be used."


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ((), "picture: there is none."),
        (("--picture", "none.png"), "picture: none.png does not exist."),
        (("--picture", ROOT / "README.md"), "is not a PNG or JPEG picture that can be read."),
        (
            ("--picture", ROOT / "experiments/astronaut.png", "--masks", "none.npz"),
            "masks: none.npz does not exist.",
        ),
        (
            ("--picture", ROOT / "experiments/astronaut.png", "--masks", ROOT / "README.md"),
            "is not a PNG or JPEG picture that can be read.",
        ),
        (
            ("--picture", ROOT / "experiments/astronaut.png", "--caption", "A blackbird"),
            "never saw 'blackbird'",
        ),
        (
            ("--picture", ROOT / "experiments/astronaut.png", "--height", "100"),
            "height: 100 is not a multiple of f = 8",
        ),
        (("--timestep", "5"), "unrecognized arguments: --timestep"),
        ((ROOT / "experiments/astronaut.yaml",), "unknown field"),
        (("none.yaml",), "this file does not exist"),
    ],
)
@pytest.mark.skipif(
    not (BUNDLED["emojiworld"] / "model_index.json").is_file(),
    reason="probe/emojiworld is not there",
)
def test_mistakes_are_one_line_of_cause_and_one_of_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Command,
    options: tuple[object, ...],
    cause: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(noising.main, *options, "--dry-run")
    assert code == 2 and out == "" and "Traceback" not in err
    first, second = err.strip().splitlines()[-2:]
    assert first.startswith("error: ") and cause in first and second.startswith("       ")


def test_help_tells_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        noising.parser().parse_args(["--help"])
    out = capsys.readouterr().out
    for name in Noising.model_fields:
        assert name in ("capture", "loras") or f"--{name.replace('_', '-')} " in out, name
    assert "--capture.attention" in out and "experiments/noising.yaml" in out


def test_a_noising_given_to_probe_run_is_told_where_it_belongs() -> None:
    with pytest.raises(ExperimentError, match="this is a noising, not an experiment") as error:
        load_experiment(ROOT / "experiments/noising.yaml")
    assert error.value.remedy == "Run it with python -m probe.noising FILE."


def test_the_example_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = load_noising("experiments/noising.yaml")
    assert asked.noises > 1 and asked.timesteps[0] == 999
    written = {
        line.split(":")[0].strip()
        for line in Path("experiments/noising.yaml").read_text().splitlines()
        if line and line[0].isalpha()
    }
    assert (
        {"picture", "caption", "masks", "timesteps", "noises", "seed"}
        <= written
        <= set(Noising.model_fields)
    )
    run = plan(load(asked.model, weights=False).with_scheduler("DDPM", {}), asked)
    assert (
        run.picture is not None
        and run.picture.shape == (128, 128, 3)
        and set(run.masks) == {"fox", "penguin", "forest"}
    )


@pytest.mark.slow
def test_the_model_finds_noise_better_with_the_true_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the less noise there is, the nearer its guess at the clean latents."""
    monkeypatch.chdir(ROOT)
    true = load_noising(
        "experiments/noising.yaml",
        output=str(tmp_path),
        timesteps=[900, 600, 200],
        noises=4,
        decode=False,
        capture=LIGHT,
    )
    false = load_noising(true, caption="A robot next to a pizza in the city")
    runs = [record(asked, progress=False) for asked in (true, false)]
    losses = [run.variable("forward/loss_mean").sel(step=slice(0, 1)).values for run in runs]
    assert (losses[0] < losses[1]).all()
    off = (
        ((runs[0].denoised() - runs[0].variable("forward/clean")) ** 2)
        .mean(("draw", "channel", "y", "x"))
        .values
    )
    assert (np.diff(off) < 0).all()
    assert float(runs[0].variable("source/psnr")) > 20
