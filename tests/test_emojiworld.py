"""The bundled model and its world: exact masks, left-out pairs, one token a word, training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.emojiworld import world
from experiments.emojiworld.train import Trainer, generator
from probe.diffusion.loading import BUNDLED, load
from probe.diffusion.sampling import denoise
from probe.errors import PromptError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.draw_scene(seed) for seed in range(1500)]


def test_a_seed_is_a_scene() -> None:
    first, again, other = world.draw_scene(5), world.draw_scene(5), world.draw_scene(6)
    assert np.array_equal(first.image, again.image)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


def test_masks_cover_a_scene_once(scenes: list[world.Scene]) -> None:
    for scene in scenes[:300]:
        claimed = np.sum(list(scene.masks.values()), axis=0)
        assert claimed.max() <= 1, scene.caption
        if scene.setting:
            assert claimed.min() == 1, scene.caption
        assert set(scene.masks) == {*scene.subjects, *([scene.setting] if scene.setting else [])}
        assert all(scene.masks[subject].sum() > 200 for subject in scene.subjects), scene.caption


def test_a_mask_is_where_its_subject_is() -> None:
    """Pixels outside every subject's mask do not change when the subject does, except for the edge
    of its glyph.
    """
    cat, dog = (world.draw_scene(3, (subject,), "snow") for subject in ("cat", "dog"))
    differs = (cat.image != dog.image).any(axis=-1)
    inside = cat.masks["cat"] | dog.masks["dog"]
    assert differs[inside].mean() > 0.9
    assert (differs & ~inside).sum() < 0.1 * inside.sum()


def test_left_out_pairs_are_never_drawn(scenes: list[world.Scene]) -> None:
    drawn = {
        (subject, scene.setting) for scene in scenes for subject in scene.subjects if scene.setting
    }
    assert not drawn & world.HELD_OUT
    assert ("astronaut", "scuba diving") in world.HELD_OUT_DEVELOPMENT
    assert not world.HELD_OUT_DEVELOPMENT & world.HELD_OUT_SEALED
    for subject, setting in world.HELD_OUT:  # both halves of a left-out pair are known
        assert any(pair[0] == subject for pair in drawn)
        assert any(pair[1] == setting for pair in drawn)
    assert len(drawn) > 0.9 * (len(world.SUBJECTS) * len(world.SETTINGS) - len(world.HELD_OUT))


def test_a_left_out_pair_has_to_be_allowed() -> None:
    with pytest.raises(ValueError, match="held out"):
        world.draw_scene(0, ("astronaut",), "scuba diving")
    assert world.draw_scene(
        0, ("astronaut",), "scuba diving", allow_held_out=True
    ).caption.endswith("an astronaut scuba diving")


@pytest.mark.parametrize(
    ("subjects", "setting", "relation"),
    [
        (("cow",), "snow", None),
        (("cat",), "sea", None),
        (("cat", "dog"), "snow", None),
        (("cat",), None, "above"),
    ],
)
def test_nonsense_is_refused(
    subjects: tuple[str, ...], setting: str | None, relation: str | None
) -> None:
    with pytest.raises(ValueError, match=r"unknown nouns|relation"):
        world.draw_scene(0, subjects, setting, relation)


def test_captions_use_the_vocabulary(scenes: list[world.Scene]) -> None:
    used = {word for scene in scenes for word in scene.caption.split()}
    assert used <= set(world.vocabulary())


# --- the bundled model ----------------------------------------------------------------------------


def test_the_bundled_model_is_small_and_safe() -> None:
    files = [file for file in BUNDLED["emojiworld"].rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md"}
    card = (BUNDLED["emojiworld"] / "README.md").read_text()
    assert all(f"{subject} x {setting}" in card for subject, setting in world.HELD_OUT)


def test_every_word_is_one_token_and_unknown_words_fall_to_pieces() -> None:
    model = load("emojiworld")
    assert model.vocabulary == frozenset(world.vocabulary())
    for word in world.vocabulary():
        assert len(model.tokenizer(word).input_ids) == 3, word
    pieces = model.tokenizer("zebra \u00f1 \U0001f992").input_ids
    assert len(pieces) > 8
    assert max(pieces) < model.text_encoder.config.vocab_size
    with pytest.raises(PromptError, match="zebra") as refused:
        model.condition("A zebra on the moon")
    assert "astronaut" in refused.value.remedy


def test_it_is_an_ordinary_stable_diffusion() -> None:
    model = load("emojiworld")
    assert model.f == 8
    assert model.latent_shape(1) == (1, 4, 16, 16)
    assert model.prediction_type == "epsilon"
    assert model.scheduler.config.beta_schedule == "scaled_linear"
    assert model.condition("a cat").cond_embedding.shape == (1, 77, 128)


def test_the_prompt_decides_the_picture() -> None:
    """Under water and on the moon, the same noise becomes a bluer and a darker picture."""
    model = load("emojiworld")

    def draw(prompt: str) -> torch.Tensor:
        *_, last = denoise(model, model.condition(prompt), steps=12, guidance_scale=5, seed=3)
        return model.decode(last.next_latents)[0][0].float().mean(dim=(0, 1))

    sea, moon = draw("an octopus scuba diving"), draw("an octopus on the moon")
    assert sea[2] > sea[0] + 30, f"mean colour under water: {sea.tolist()}"
    assert moon.mean() < sea.mean() + 10, f"on the moon {moon.tolist()}, under water {sea.tolist()}"


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def modules() -> torch.nn.ModuleDict:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"line": torch.nn.Linear(3, 2)})

    def trainer(folder: str) -> Trainer:
        (tmp_path / folder).mkdir(exist_ok=True)
        return Trainer("line", modules(), steps=6, rate=0.1, folder=tmp_path / folder, ema=0.9)

    def train(made: Trainer, stop_at: int | None = None) -> Trainer:
        def loss_of(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return (
                made.modules["line"](torch.randn(4, 3, generator=generator(0, step)))
                .square()
                .mean()
            )

        made.run(loss_of, every=2)
        return made

    whole = train(trainer("whole")).averaged()
    with pytest.raises(KeyboardInterrupt):
        train(trainer("parts"), stop_at=5)
    resumed = trainer("parts")
    assert resumed.step == 4
    parts = train(resumed).averaged()
    assert all(
        torch.equal(value, parts.state_dict()[key]) for key, value in whole.state_dict().items()
    )
    assert not torch.equal(whole["line"].weight, modules()["line"].weight)


def run_training(folder: Path, *options: str) -> None:
    sizes = [
        "--scenes",
        "40",
        "--vae-steps",
        "2",
        "--unet-steps",
        "2",
        "--refine-steps",
        "2",
        "--decoder-steps",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "experiments.emojiworld.train",
        "--folder",
        str(folder),
        "--device",
        "cpu",
        *sizes,
        *options,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_training_script_makes_a_model_that_records_and_can_be_refined(tmp_path: Path) -> None:
    run_training(tmp_path / "first")
    first = tmp_path / "first/model"
    model = load(str(first))
    assert model.latent_shape(1) == (1, 4, 16, 16)
    assert (
        sum(1 for _ in denoise(model, model.condition("an astronaut scuba diving"), steps=3)) == 3
    )
    assert set(load_file(first / "unet/diffusion_pytorch_model.safetensors")) == set(
        model.unet.state_dict()
    )

    run_training(tmp_path / "second", "--start", str(first))
    refined = load(str(tmp_path / "second/model"))
    assert refined.scaling_factor == model.scaling_factor
    before, after = model.vae.state_dict(), refined.vae.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert (
        changed <= {"decoder", "post_quant_conv"} and "decoder" in changed
    )  # the latents stay what they were
    assert not torch.equal(model.unet.conv_in.weight, refined.unet.conv_in.weight)


@pytest.mark.slow
def test_the_tokenizer_is_the_same_each_time(tmp_path: Path) -> None:
    """In another process too, where Python's hashes differ."""
    code = (
        "import sys; from pathlib import Path; from experiments.emojiworld.train import "
        "build_tokenizer; build_tokenizer(Path(sys.argv[1]))"
    )
    for name in "ab":
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "a/vocab.json").read_bytes() == (tmp_path / "b/vocab.json").read_bytes()
    assert (tmp_path / "a/merges.txt").read_bytes() == (tmp_path / "b/merges.txt").read_bytes()
