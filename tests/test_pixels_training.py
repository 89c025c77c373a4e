"""The trained demonstration: one UNet in four spaces, its schedules, training and scores."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from experiments.emojiworld import world
from experiments.emojiworld.judge import Judge
from experiments.pixels import export, score, train
from experiments.pixels.spaces import (
    LOG_SNR,
    SPACES,
    build_autoencoder,
    build_scheduler,
    build_unet,
    signal_levels,
)
from probe.reading.pixels import trained as trained_scores

GRIDS = [64, 32, 16, 8]


def log_snr(side: int) -> torch.Tensor:
    level = signal_levels(side)
    return (level / (1 - level)).log()


def test_every_schedule_goes_from_one_end_to_the_other() -> None:
    for side in GRIDS:
        ratios = log_snr(side)
        assert (ratios.diff() < 0).all()
        assert ratios[0].item() == pytest.approx(LOG_SNR)
        assert ratios[-1].item() == pytest.approx(-LOG_SNR)


def test_a_schedule_is_the_cosine_one_moved_by_the_grid() -> None:
    """log SNR = shift - 2 log tan(angle): equal steps of the angle, whatever the shift."""
    for side in GRIDS:
        shift = 2 * math.log(16 / side)
        angles = ((shift - log_snr(side)) / 2).exp().atan()
        assert torch.allclose(angles.diff(), angles.diff().mean(), rtol=1e-6)
    finer, coarser = log_snr(64)[1:-1], log_snr(8)[1:-1]
    assert (finer < coarser).all()


def test_the_scheduler_has_these_levels() -> None:
    for side in GRIDS:
        levels = build_scheduler(side).alphas_cumprod.double()
        ratios = (levels / (1 - levels)).log()
        assert (ratios - log_snr(side)).abs().max() < 2e-3  # its betas are float32


def test_it_is_one_unet_in_every_space() -> None:
    with torch.device("meta"):
        shapes = {
            f: {key: value.shape for key, value in build_unet(space).state_dict().items()}
            for f, space in SPACES.items()
        }
    for f, own in shapes.items():
        differ = {key for key in own if own[key] != shapes[1][key]}
        assert differ <= {"conv_in.weight", "conv_out.weight", "conv_out.bias"}
        assert (f == 1) == (not differ)
        assert sum(shape.numel() for shape in own.values()) < 4e6


@pytest.mark.slow
def test_a_training_step_costs_three_calls() -> None:
    """Forwards once and backwards twice, but for what needs no gradient: the input, the text."""
    flops = {f: train.denoiser_flops(SPACES[f]) for f in (1, 4, 8)}
    for call, step in (flops[1], flops[8]):
        assert 2.7 * call * train.BATCH < step < 3 * call * train.BATCH
    small, large = (flops[f][0] for f in (4, 1))
    assert 15 < large / small < 17  # sixteen times the places; its attention is on coarse grids


def options_of(folder: Path, *more: str) -> argparse.Namespace:
    wanted = ["--folder", str(folder), "--scenes", "40", "--device", "cpu", *more]
    options = train.arguments().parse_args(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    return options


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the script writes for f = 8, of 20 steps."""
    folder = tmp_path_factory.mktemp("pixels")
    few = ["--autoencoder-steps", "5", "--rate-steps", "1", "--most-steps", "20", "--only", "8"]
    train.main(["--folder", str(folder), "--scenes", "40", "--device", "cpu", *few])
    return folder


@pytest.mark.slow
def test_the_script_notes_what_each_stage_took(trained: Path) -> None:
    noted = train.notes(trained)
    assert {"autoencoder-f8", "latents-f8", "rate-f8", "denoiser-f8-seed0-20"} == set(noted)
    assert noted["rate-f8"]["rate"] in train.RATES and len(noted["rate-f8"]["errors"]) == 3
    assert noted["denoiser-f8-seed0-20"]["seconds"] > 0
    kept = load_file(trained / "denoiser-f8-seed0-20.safetensors")
    assert kept.keys() == build_unet(SPACES[8]).state_dict().keys()


@pytest.mark.slow
def test_latents_have_mean_0_and_spread_1(trained: Path) -> None:
    saved = torch.load(trained / "latents-f8.pt", weights_only=True)
    assert saved["mean"].mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert saved["mean"].std().item() == pytest.approx(1, abs=1e-4)


def batches_of(folder: Path, f: int) -> train.Batches:
    options = options_of(folder)
    pictures, captions = train.training_set(folder, 40)
    clean: tuple[torch.Tensor, torch.Tensor | None] = pictures, None
    if f > 1:
        vae = build_autoencoder(SPACES[f])
        clean = train.encode(options, SPACES[f], vae, pictures)
    return train.Batches(options, SPACES[f], clean, captions)


@pytest.mark.slow
def test_every_space_is_shown_the_same_at_a_step(trained: Path) -> None:
    on_pixels, on_latents = batches_of(trained, 1), batches_of(trained, 8)
    clean, _, t, text = on_pixels.draw(0, 7)
    of_latents, _, same_t, same_text = on_latents.draw(0, 7)
    assert torch.equal(t, same_t) and torch.equal(text, same_text)
    assert clean.shape == (16, 3, 64, 64) and of_latents.shape == (16, 4, 8, 8)
    assert not torch.equal(t, on_pixels.draw(0, 8)[2])


@pytest.mark.slow
def test_an_interrupted_training_goes_on_as_if_nothing_was(trained: Path, tmp_path: Path) -> None:
    batches = batches_of(trained, 8)
    whole, parts = options_of(tmp_path / "whole"), options_of(tmp_path / "parts")
    once = train.train_denoiser(whole, batches, 3, 1e-3, (4,), "denoiser")
    train.train_denoiser(parts, batches, 3, 1e-3, (2,), "denoiser")
    twice = train.train_denoiser(parts, batches, 3, 1e-3, (2, 4), "denoiser")
    for key, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key]), key
    assert {path.name for path in whole.folder.glob("*.safetensors")} == {"denoiser-4.safetensors"}


@pytest.mark.slow
def test_training_lowers_the_loss(trained: Path) -> None:
    batches = batches_of(trained, 8)
    unet = build_unet(SPACES[8]).eval()
    before = train.checked_loss(unet, batches)
    unet.load_state_dict(load_file(trained / "denoiser-f8-seed0-20.safetensors"))
    assert train.checked_loss(unet, batches) < before


@pytest.mark.slow
def test_on_pixels_the_picture_itself_is_noised(trained: Path) -> None:
    """v is what noise and picture say: a denoiser that says it has no loss."""
    batches = batches_of(trained, 1)
    clean, noise, t, text = (part[:2] for part in batches.draw(0, 0))
    assert clean.min() >= -1 and clean.max() <= 1
    level = batches.levels[t][:, None, None, None]

    class Knowing(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, *_: Any, **text: torch.Tensor) -> Any:
            assert torch.equal(noisy, level.sqrt() * clean + (1 - level).sqrt() * noise)
            v = level.sqrt() * noise - (1 - level).sqrt() * clean
            return argparse.Namespace(sample=v)

    assert train.v_loss(Knowing(), batches.levels, clean, noise, t, text) < 1e-12


@pytest.mark.slow
def test_what_is_exported_draws_what_was_scored(trained: Path, tmp_path: Path) -> None:
    """The centre and scale of the latents lie in the VAE: decoding does not change."""
    export.export(trained, SPACES[8], 0, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(tmp_path / "model", subfolder="vae", dtype=torch.float32)
    vae.float()
    latents = torch.randn(2, *SPACES[8].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
    pictures = score.Painter(trained, SPACES[8], "cpu").paint(latents).float()
    assert (pixels.clamp(-1, 1) * 127.5 + 127.5 - pictures).abs().max() < 2  # it is half precision
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    assert torch.equal(scheduler.alphas_cumprod, build_scheduler(8).alphas_cumprod)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet")
    assert unet.config.sample_size == 8
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_kid_is_the_unbiased_mmd() -> None:
    random = np.random.default_rng(0)
    drawn, true = random.normal(size=(7, 5)), random.normal(1, 1, (9, 5))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 5 + 1) ** 3)

    own = [kernel(a, b) for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j]
    theirs = [kernel(a, b) for i, a in enumerate(true) for j, b in enumerate(true) if i != j]
    cross = [kernel(a, b) for a in drawn for b in true]
    expected = np.mean(own) + np.mean(theirs) - 2 * np.mean(cross)
    value, low, high = score.kid(torch.from_numpy(drawn), torch.from_numpy(true))
    assert value == pytest.approx(expected) and low < value < high


def test_kid_of_one_distribution_is_about_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    same = [torch.randn(300, 8, generator=random, dtype=torch.float64) for _ in range(2)]
    value, low, high = score.kid(*same)
    assert low < 0 < high and abs(value) < 0.05
    assert score.kid(same[0], same[1] + 1)[1] > 1


def test_the_frechet_distance_of_known_gaussians() -> None:
    random = torch.Generator().manual_seed(0)
    one = torch.randn(200_000, 3, generator=random, dtype=torch.float64)
    two = 2 * torch.randn(200_000, 3, generator=random, dtype=torch.float64) + 1
    assert score.frechet(one, two) == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.02)


def test_training_leaves_pairs_out() -> None:
    assert set(score.ASKED[: score.PICTURES]) & world.HELD_OUT  # it is asked for them
    scenes = [train.drawn(seed) for seed in range(200)]
    assert not {(*scene.subjects, scene.setting) for scene in scenes} & world.HELD_OUT
    assert {len(scene.subjects) for scene in scenes} == {1}


def test_the_networks_that_score_ship_and_know_fresh_scenes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is said of pictures stands on these two: one recognises, the other gives features."""
    monkeypatch.setattr(score, "FRESH", 192)  # enough to tell scenes from noise
    scorer = score.Scorer(Path("nowhere"))
    scenes, pairs = score.fresh_scenes(70_000_000, 96)
    found = scorer.score(scenes, pairs)
    _, low, high = found["kid"]
    assert found["both"][0] > 0.95 and low < 0 < high
    assert isinstance(scorer.eye, Judge) and scorer.eye.name != scorer.recogniser.name
    noise = torch.randint(0, 256, scenes.shape, dtype=torch.uint8)
    worse = scorer.score(noise, pairs)
    assert worse["both"][0] < 0.05 and worse["kid"][1] > high


def test_the_scores_that_ship_are_of_this_training() -> None:
    """Their costs follow from the networks as they are built here, and from their steps."""
    found = trained_scores()
    assert found is not None and found["title"] == "At 64 pixels, emoji"
    assert found["calls"] == 2 * score.CALLS and found["guidance_scale"] == score.GUIDANCE
    for run in found["runs"]:
        space = SPACES[run["f"]]
        assert (run["channels"], run["grid"]) == space.shape[:2]
        assert run["attention_grids"] == space.attention_grids
        assert run["learning_rate"] in train.RATES
        steps = [point["step"] for point in run["points"]]
        assert tuple(steps) == space.steps[: len(steps)]
        assert all(p["flops"] == p["step"] * run["training_step_flops"] for p in run["points"])
        assert np.all(np.diff([point["seconds"] for point in run["points"]]) > 0)
        assert all(point["pictures"] == score.PICTURES for point in run["points"])
    last = found["runs"][-1]
    assert train.denoiser_flops(SPACES[last["f"]]) == (
        last["call_flops"],
        last["training_step_flops"],
    )
