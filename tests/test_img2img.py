"""Image to image: the bits of diffusers' own pipeline, recorded like any other run, and resumed."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from probe.diffusion import parts
from probe.diffusion.loading import load
from probe.diffusion.parts import posterior
from probe.diffusion.sampling import denoise
from probe.diffusion.schedule import Schedule, first_call
from probe.diffusion.sd import StableDiffusion
from probe.errors import ExperimentError, StoreError
from probe.proof.verdict import verify
from probe.reading.compare import compare
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.recorder import record, record_noising, rerun, resume
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import SCHEDULERS
from probe.settings.pictures import read_picture
from probe.watching.source import Source

# Building a pipeline around a scheduler whose class clips by default; the pipeline turns that off,
# and so do we.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)The configuration file of this scheduler.*clip_sample:FutureWarning"
)

PROMPT, SEED, STEPS = "a cat on the hat", 3, 5
LIGHT = {"attention": "off", "text": False, "statistics": False}
# Every scheduler once; guidance on and off, one image and two, and strengths from one step to all
# of them.
CASES = [
    (name, strength, guidance, images)
    for (name, strength), (guidance, images) in zip(
        zip(SCHEDULERS, itertools.cycle((0.2, 0.5, 0.8, 1.0))),
        itertools.cycle(((7.5, 2), (1.0, 1), (3.0, 1), (1.0, 2), (7.5, 1))),
    )
]


@functools.cache
def base(prediction: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    return tiny.pipeline(prediction)


def photograph(height: int = 32, width: int = 32) -> np.ndarray:
    """A picture with edges, a slope and noise in it."""
    y, x = np.mgrid[:height, :width] / 32
    soft = np.stack([x, y, (x + y) % 1], axis=-1) * 200
    return (
        (soft + np.random.default_rng(0).integers(0, 55, soft.shape)).clip(0, 255).astype(np.uint8)
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photograph.png"
    Image.fromarray(photograph()).save(path)
    return path


def ask(folder: Path, image: Path | None, **changes: Any) -> Experiment:
    asked = {
        "prompt": PROMPT,
        "seed": SEED,
        "steps": STEPS,
        "output": str(folder / "runs"),
        "image": image and str(image),
        "capture": LIGHT,
    }
    return load_experiment({**asked, **changes})


class Memory:
    """What a capture's `begin` wants of a recording: the picture, and room for what it draws."""

    committed = 0

    def annotate(self, **_: Any) -> None:
        pass

    def read(self, _: str) -> np.ndarray:
        return photograph()

    def write(self, path: str, value: np.ndarray) -> None:
        setattr(self, path.rpartition("/")[2], value)


def begin(model: StableDiffusion, asked: Experiment) -> Any:
    """Where a run begins, without recording it."""
    source = next(capture for capture in plan(model, asked).captures if isinstance(capture, Source))
    source.begin(Memory())  # type: ignore[arg-type]
    return source.start


def theirs(
    asked: Experiment, picture: np.ndarray, prediction: str = "epsilon"
) -> tuple[list[torch.Tensor], np.ndarray]:
    """diffusers' own pipeline: the latents after every call of the scheduler, and the pictures as
    uint8.
    """
    kind, extra = SCHEDULERS[asked.scheduler]
    parts = base(prediction)
    scheduler = getattr(diffusers, kind).from_config(
        parts.scheduler.config, **{**extra, **asked.scheduler_options}
    )
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        parts.vae,
        parts.text_encoder,
        parts.tokenizer,
        parts.unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    kept: list[torch.Tensor] = []

    def keep(
        _: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        kept.append(tensors["latents"])
        return tensors

    drawn = pipeline(
        asked.prompt,
        image=Image.fromarray(picture),
        strength=asked.strength,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance_scale,
        negative_prompt=asked.negative_prompt,
        num_images_per_prompt=asked.images,
        eta=asked.eta,
        generator=[torch.Generator().manual_seed(asked.seed + i) for i in range(asked.images)],
        callback_on_step_end=keep,
        output_type="np",
    )
    return kept, (drawn.images * 255).round().astype(np.uint8)


def assert_equal(run: Run, asked: Experiment, prediction: str = "epsilon") -> None:
    latents, pictures = theirs(asked, photograph(), prediction)
    assert run.status == "complete" and run.tree.sizes["step"] == len(latents)
    ours = [*run.latents.values[1:], run.variable("latents/final_latents").values]
    for index, (mine, wanted) in enumerate(zip(ours, latents, strict=True)):
        assert torch.equal(torch.from_numpy(mine), wanted), (
            f"step {index} is off by {np.abs(mine - wanted.numpy()).max()}"
        )
    assert np.array_equal(run.images.values, pictures)


def assert_the_same_loop(asked: Experiment) -> None:
    """As `assert_equal`, without recording: `begin` and `denoise` alone."""
    model = StableDiffusion.of(base()).with_scheduler(asked.scheduler, {})
    start = begin(model, asked)
    conditioning = model.condition(
        asked.prompt, asked.negative_prompt, guided=asked.guidance_scale > 1
    )
    ours = [
        step.next_latents
        for step in denoise(
            model, conditioning, steps=asked.steps, guidance_scale=asked.guidance_scale, start=start
        )
    ]
    latents, pictures = theirs(asked, photograph())
    assert len(ours) == len(latents) and all(
        torch.equal(mine, wanted) for mine, wanted in zip(ours, latents, strict=True)
    )
    assert np.array_equal(model.decode(ours[-1])[0].numpy(), pictures)


@pytest.mark.parametrize(("scheduler", "strength", "guidance", "images"), CASES)
def test_the_bits_of_diffusers(
    tmp_path: Path, picture: Path, scheduler: str, strength: float, guidance: float, images: int
) -> None:
    asked = ask(
        tmp_path,
        picture,
        scheduler=scheduler,
        strength=strength,
        guidance_scale=guidance,
        images=images,
        negative_prompt="cat",
    )
    assert_the_same_loop(asked)


@pytest.mark.parametrize(
    ("scheduler", "options", "eta", "prediction"),
    [
        ("PNDM", {}, 0.0, "epsilon"),
        ("DDIM", {}, 0.7, "epsilon"),
        ("DDIM", {"timestep_spacing": "trailing"}, 0.0, "v_prediction"),
        ("Euler", {"use_karras_sigmas": True}, 0.0, "v_prediction"),
        (
            "DPM++2M",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            0.0,
            "epsilon",
        ),
    ],
)
def test_recordings_have_the_bits_of_diffusers(
    tmp_path: Path,
    picture: Path,
    scheduler: str,
    options: dict[str, Any],
    eta: float,
    prediction: str,
) -> None:
    asked = ask(
        tmp_path,
        picture,
        scheduler=scheduler,
        scheduler_options=options,
        eta=eta,
        strength=0.6,
        images=2,
        guidance_scale=4.0,
    )
    assert_equal(record(asked, base(prediction), progress=False), asked, prediction)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_bits_of_diffusers_in_every_combination(
    tmp_path: Path, picture: Path, scheduler: str
) -> None:
    for strength, guidance, images in itertools.product((0.2, 0.5, 0.8, 1.0), (7.5, 1.0), (1, 2)):
        assert_the_same_loop(
            ask(
                tmp_path,
                picture,
                scheduler=scheduler,
                strength=strength,
                guidance_scale=guidance,
                images=images,
            )
        )


def test_the_comparison_can_fail(tmp_path: Path, picture: Path) -> None:
    """Another order of the random draws, which is the likeliest slip, gives other bits."""
    asked = ask(tmp_path, picture, scheduler="DDIM")
    model = StableDiffusion.of(base()).with_scheduler("DDIM", {})
    mean, deviation = posterior(model, photograph())
    generator = torch.Generator().manual_seed(SEED)
    eps, sample = (torch.randn(mean.shape, generator=generator) for _ in range(2))
    run = record(asked, base(), progress=False)
    assert not np.array_equal(run.variable("forward/noise").values, eps.numpy())
    assert not np.array_equal(
        run.variable("forward/clean").values,
        (model.scaling_factor * (mean + deviation * sample)).numpy(),
    )


# --- the recording --------------------------------------------------------------------------------


class Elsewhere(StableDiffusion):
    """A family that begins otherwise: its noise is upside down, and its latents come from no
    VAE.
    """

    def begin(
        self, generators: Any, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        return parts.begin(self, generators, height, width).flip(2)

    def encode_picture(self, picture: np.ndarray, generators: Any = ()) -> torch.Tensor:
        shape = self.latent_shape(max(1, len(generators)), *picture.shape[:2])
        return torch.full(shape, 0.25)

    def schedule(
        self, steps: int, height: int | None = None, width: int | None = None, begin: int = 0
    ) -> Schedule:
        assert (height, width) in ((None, None), (32, 32)), (
            "it is asked with the size of the picture"
        )
        return replace(parts.schedule(self, steps, height, width, begin), variance_exploding=False)


def test_the_family_alone_says_where_a_run_begins(tmp_path: Path, picture: Path) -> None:
    own = Elsewhere.of(base())
    generator = torch.Generator().manual_seed(SEED)
    upside_down = torch.randn(
        (1, 4, *np.array(photograph().shape[:2]) // own.f), generator=generator
    ).flip(2)
    text = {
        "prompt": PROMPT,
        "seed": SEED,
        "steps": 2,
        "height": 32,
        "width": 32,
        "output": str(tmp_path),
        "capture": LIGHT,
    }
    from_text = record({**text, "scheduler": "DDIM"}, own, progress=False)
    assert np.array_equal(from_text.latents.values[0], upside_down.numpy())
    from_picture = record(ask(tmp_path, picture, scheduler="DDIM"), own, progress=False)
    assert (from_picture.variable("forward/clean").values == 0.25).all()
    assert np.array_equal(from_picture.variable("forward/noise").values, upside_down.numpy())
    noised = record_noising(
        photograph(),
        PROMPT,
        seed=SEED,
        timesteps="500",
        noises=1,
        pipeline=own,
        output=str(tmp_path),
        sheet=False,
        progress=False,
    )
    assert (noised.variable("forward/clean").values == 0.25).all()
    assert np.array_equal(noised.variable("forward/noise").values, upside_down.numpy())


def test_it_holds_picture_latents_and_noise(tmp_path: Path, picture: Path) -> None:
    asked = ask(
        tmp_path, picture, images=2, strength=0.6, scheduler="Euler", capture={"tokens": "all"}
    )
    run = record(asked, base(), progress=False)
    assert run.source is not None and np.array_equal(run.source.values, photograph())
    clean, eps = (
        torch.from_numpy(run.variable(f"forward/{name}").values) for name in ("clean", "noise")
    )
    model = StableDiffusion.of(base()).with_scheduler("Euler", {})
    for image in range(2):
        generator = torch.Generator().manual_seed(SEED + image)
        mean, deviation = posterior(model, photograph())
        assert torch.equal(
            clean[image],
            model.scaling_factor
            * (mean + deviation * torch.randn(mean.shape, generator=generator))[0],
        )
        assert torch.equal(eps[image], torch.randn(mean.shape, generator=generator)[0])
    sigma = run.tree["sigma"].values[0]
    np.testing.assert_allclose(
        run.latents.values[0], (clean + float(sigma) * eps).numpy(), rtol=1e-6, atol=1e-6
    )
    whole = Schedule.of(model.scheduler, STEPS)
    begin_at = first_call(model.scheduler, STEPS, 0.6)
    assert (
        begin_at == 2
        and tuple(run.tree["timestep"].values) == whole.timesteps[2:]
        and tuple(run.tree["sigma"].values) == whole.sigmas[2:]
    )
    assert run.attention().sizes["step"] == 3
    assert "strength 0.6" in repr(run) and "photograph.png" in repr(run)
    assert run.experiment == load_experiment(asked, model=run.attributes["model"]["name"])


def test_recording_changes_nothing(tmp_path: Path, picture: Path) -> None:
    asked = ask(
        tmp_path,
        picture,
        images=2,
        scheduler="EulerAncestral",
        capture={"branches": "both", "tokens": "all"},
    )
    run = record(asked, base(), progress=False)
    bare = record(
        ask(tmp_path, picture, images=2, scheduler="EulerAncestral"), base(), progress=False
    )
    assert np.array_equal(run.latents.values, bare.latents.values) and np.array_equal(
        run.images.values, bare.images.values
    )


def test_a_run_from_noise_has_no_source(tmp_path: Path) -> None:
    run = record(ask(tmp_path, None), base(), progress=False)
    assert run.source is None and "forward" not in run.tree.children
    assert (
        run.experiment.identity()
        == load_experiment(
            {"prompt": PROMPT, "seed": SEED, "steps": STEPS, "capture": LIGHT},
            model=run.experiment.model,
        ).identity()
    )


def test_what_was_asked_tells_two_strengths_apart(tmp_path: Path, picture: Path) -> None:
    one, other = (ask(tmp_path, picture, strength=strength) for strength in (0.5, 0.6))
    assert one.identity() != other.identity() != ask(tmp_path, None).identity()
    assert (
        ask(tmp_path, None, strength=0.5).identity() == ask(tmp_path, None, strength=0.6).identity()
    )


def test_a_start_can_be_used_twice(tmp_path: Path, picture: Path) -> None:
    """Its generators are not used up by a loop that draws noise of its own."""
    asked = ask(tmp_path, picture, scheduler="EulerAncestral")
    model = StableDiffusion.of(base()).with_scheduler("EulerAncestral", {})
    conditioning = model.condition(PROMPT, guided=False)

    start = begin(model, asked)
    runs = [
        [
            step.next_latents
            for step in denoise(model, conditioning, steps=STEPS, guidance_scale=1, start=start)
        ]
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# --- resumed --------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def interrupted(asked: Experiment, pipe: Any, after: int) -> Run:
    """The recording of a run that ended before its call `after`."""
    calls = itertools.count()

    def count(*_: Any) -> None:
        if next(calls) == after:
            raise Stop

    handle = pipe.unet.register_forward_pre_hook(count)
    try:
        with pytest.raises(Stop):
            record(asked, pipe, progress=False)
    finally:
        handle.remove()
    (path,) = Path(asked.output).glob("*.zarr")
    return Run(path)


@pytest.mark.parametrize("scheduler", ["PNDM", "EulerAncestral", "Heun"])
def test_resumed_to_the_same_bits_without_the_file(
    tmp_path: Path, picture: Path, scheduler: str
) -> None:
    whole = record(
        ask(tmp_path / "whole", picture, scheduler=scheduler, images=2), base(), progress=False
    )
    part = interrupted(
        ask(tmp_path / "part", picture, scheduler=scheduler, images=2), base(), after=2
    )
    assert len(part.steps) == 2 and part.status == "failed"
    picture.unlink()
    run = resume(part, base(), progress=False)
    assert run.status == "complete"
    for name in (
        "latents/latents",
        "latents/prediction",
        "latents/final_latents",
        "images/final",
        "forward/clean",
        "forward/noise",
        "source/picture",
    ):
        assert np.array_equal(run.variable(name).values, whole.variable(name).values), name


@pytest.mark.slow
def test_the_bundled_model_goes_on_from_a_picture_and_is_proven(tmp_path: Path) -> None:
    """Its VAE leaves the latents with the channels last in memory, on which the last bits of every
    convolution depend.
    """
    asked = {
        "prompt": "a cat",
        "image": "experiments/fox-and-penguin.png",
        "strength": 1.0,
        "steps": 3,
        "guidance_rescale": 0.5,
        "decode_every": 2,
    }
    asked["image"] = str(Path(__file__).parent.parent / str(asked["image"]))
    whole = record({**asked, "output": str(tmp_path / "whole")}, progress=False)
    assert whole.attributes["memory_format"] == {"clean": "channels_last"}
    part = interrupted(
        load_experiment({**asked, "output": str(tmp_path / "part")}),
        load("emojiworld").with_scheduler("default", {}),
        after=2,
    )
    found = compare(whole, resume(part, progress=False))
    assert found.same and found.variables > 60, found.differences
    verdicts = {check.name: check.verdict for check in verify(whole, True)}
    assert {
        name: verdicts[name]
        for name in ("guidance", "scheduler", "predictions", "inside", "decode", "encode")
    } == dict.fromkeys(
        ("guidance", "scheduler", "predictions", "inside", "decode", "encode"), "exact"
    )


def test_a_rerun_begins_from_the_recorded_picture(tmp_path: Path, picture: Path) -> None:
    whole = record(ask(tmp_path, picture), base(), progress=False)
    Image.fromarray(photograph()[::-1]).save(picture)
    assert compare(whole, rerun(whole, base(), progress=False)).same, (
        "not from what is in the file now"
    )
    picture.unlink()
    assert compare(whole, rerun(whole, base(), progress=False)).same


def test_resumed_before_its_first_step(tmp_path: Path, picture: Path) -> None:
    whole = record(ask(tmp_path / "whole", picture), base(), progress=False)
    run = resume(
        interrupted(ask(tmp_path / "part", picture), base(), after=0), base(), progress=False
    )
    assert np.array_equal(run.images.values, whole.images.values)


def test_changed_latents_are_not_resumed(tmp_path: Path, picture: Path) -> None:
    part = interrupted(ask(tmp_path, picture), base(), after=2)
    import zarr

    held = zarr.open_array(part.path / "forward" / "clean", mode="r+")
    held[...] = np.asarray(held[...]) * 1.01
    with pytest.raises(StoreError, match="come out otherwise"):
        resume(Run(part.path), base(), progress=False)


# --- bad input ------------------------------------------------------------------------------------


def refused(tmp_path: Path, image: Path, **changes: Any) -> str:
    with pytest.raises(ExperimentError) as error:
        record(ask(tmp_path, image, **changes), base(), progress=False)
    assert not (tmp_path / "runs").exists() and error.value.remedy
    return error.value.cause


def test_refused_before_anything_is_written(tmp_path: Path, picture: Path) -> None:
    assert "does not exist" in refused(tmp_path, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert "not a PNG or JPEG picture" in refused(tmp_path, tmp_path / "text.png")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:200])
    assert "not a PNG or JPEG picture" in refused(tmp_path, tmp_path / "half.png")
    Image.new("RGB", (4, 40)).save(tmp_path / "small.png")
    assert "40 x 4 pixels" in refused(tmp_path, tmp_path / "small.png")
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    assert "9000 x 9000 pixels" in refused(tmp_path, tmp_path / "large.png")
    (tmp_path / "folder.png").mkdir()
    assert refused(tmp_path, tmp_path / "folder.png").endswith(
        "folder.png is a folder, not a file."
    )
    assert refused(tmp_path, picture, strength=0.1).startswith(
        "strength: 0.1 of 5 steps is not one whole step"
    )
    assert "not a multiple of f = 4" in refused(tmp_path, picture, height=30)
    for strength, said in ((1.5, "more than 1"), (-0.1, "less than 0")):
        with pytest.raises(ExperimentError, match=rf"strength: .* is {said}"):
            ask(tmp_path, picture, strength=strength)


# --- any picture is made to fit -------------------------------------------------------------------


def test_a_picture_of_the_size_asked_for_is_taken_as_it_is(picture: Path) -> None:
    assert np.array_equal(read_picture(picture, 32, 32), photograph())


def test_a_larger_one_is_scaled_and_cut_to_its_centre(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200  # the middle third is what is left
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = read_picture(tmp_path / "wide.png", 32, 32)
    assert found.shape == (32, 32, 3) and found.min() > 180 and found[:, 2:-2].min() >= 199


def test_turned_as_the_camera_says_and_laid_over_white(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    lying = np.zeros((16, 32, 3), np.uint8)
    lying[:, :16] = 255
    Image.fromarray(lying).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    found = read_picture(tmp_path / "turned.jpg", 32, 16)
    assert (found[:14] > 240).all() and (found[18:] < 15).all()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 16, 16) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_every_kind_of_pixels_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("kind.jpg" if mode == "CMYK" else "kind.png")
    Image.fromarray(photograph()).convert("L").convert("RGB" if mode == "CMYK" else mode).convert(
        mode
    ).save(path)
    assert read_picture(path, 32, 32).shape == (32, 32, 3)


def test_not_square(tmp_path: Path, picture: Path) -> None:
    run = record(ask(tmp_path, picture, width=48, capture={}), base(), progress=False)
    assert (
        run.images.shape == (1, 32, 48, 3)
        and run.source is not None
        and run.source.shape == (32, 48, 3)
    )
    assert plan(StableDiffusion.of(base()), run.experiment).latent_shape == (1, 4, 8, 12)
