"""The page shows what Python's player would show of the same numbers, and its YAML is Python's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from probe.diffusion.draws import noise
from probe.editing.noise import mixed_noise, read_noise
from probe.figures.bundle import payload
from probe.figures.channels import layers_and_heads
from probe.figures.payload import unpack
from probe.reading.recording import Run
from probe.settings.edits import Noise
from probe.settings.experiment import load_experiment
from probe.settings.noising import load_noising

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "web_page.test.mjs"
NODE = shutil.which("node")
PARTS = ("latents", "denoised", "cond", "uncond", "prediction")

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs")


@pytest.fixture(scope="module")
def run() -> Run:
    return probe.open_run("sample")


def write(folder: Path, name: str, values: Any) -> None:
    np.asarray(values, np.float32).tofile(folder / f"{name}.f32")


def write_layers(run: Run, folder: Path) -> dict[str, Any]:
    """Write the maps of each layer as (step, head, pixel, token), in the order they run."""
    layers = {}
    for grid in run.grids:
        maps = run.attention(grid).sel(branch="cond").isel(image=0).load()
        for layer in maps["layer"].values:
            layers[str(layer)] = maps.sel(layer=layer).transpose("step", "head", "y", "x", "token")
    parts = ["down", "mid_", "up_b"]
    order = sorted(layers, key=lambda path: ([*parts, path[:4]].index(path[:4]), path))
    shapes = []
    for index, name in enumerate(order):
        maps = layers[name]
        values = maps.values.reshape(*maps.shape[:2], -1, maps.sizes["token"])
        write(folder, f"layer{index}", probe.analysis.probabilities(values))
        shapes.append(values.shape[1:])
    return {"layers": order, "shapes": shapes}


def write_recording(run: Run, folder: Path) -> None:
    """Write a recording as the page's worker would say it, and what Python makes of it."""
    one = {"image": 0}
    latents = {
        "latents": run.latents,
        "denoised": run.denoised(),
        "cond": run.prediction("cond"),
        "uncond": run.prediction("uncond"),
        "prediction": run.prediction(),
    }
    for name in PARTS:
        values = latents[name].isel(one).transpose("step", "channel", "y", "x").load()
        write(folder, name, values.astype("float32"))
    noisy, clean = (latents[name].isel(one).astype("float32").load() for name in PARTS[:2])
    size = clean.std(("channel", "y", "x")) / noisy.std(("channel", "y", "x"))
    write(folder, "latents-rgb", run.preview(noisy * size))
    write(folder, "denoised-rgb", run.preview(clean))
    labels = run.attention(run.grids[0]).sel(branch="cond")
    texts, numbers = labels["token_text"].values.tolist(), labels["word_index"].values.tolist()
    words = [
        {"word": str(word), "tokens": [i for i, number in enumerate(numbers) if number == place]}
        for place, word in enumerate(run.words)
    ]
    begun = {
        "words": words,
        "end": len(texts) - 2,
        "timesteps": run.variable("timestep").values.tolist(),
        "sigmas": run.variable("sigma").values.tolist(),
    }
    preview = {
        "slope": run.variable("preview/latent_to_rgb").values.tolist(),
        "bias": run.variable("preview/bias").values.tolist(),
    }
    write(folder, "final", run.variable("latents/final_latents").isel(one))
    write(folder, "picture", run.images.isel(one))
    asked = run.experiment
    experiment = {
        "prompt": asked.prompt,
        "seed": asked.seed,
        "steps": asked.steps,
        "guidance": asked.guidance_scale,
        "scheduler": "DDIM",
    }
    about = {
        "begun": begun,
        "sigmas": begun["sigmas"],
        "alpha_bars": run.variable("alpha_bar").values.tolist(),
        "created": "2026-01-02T03:04:05.678+00:00",
        "preview": preview,
        "experiment": experiment,
        **write_layers(run, folder),
    }
    for name, content in (("payload", payload(run)), ("heads", layers_and_heads(run, 1))):
        head, parts = unpack(content)
        meta = head["meta"] | {"shape": head["parts"]["maps"]["shape"]}
        (folder / f"{name}.json").write_text(json.dumps(meta), encoding="utf-8")
        write(folder, {"payload": "maps", "heads": "heads"}[name], parts["maps"])
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """Write pictures of many kinds, each named by its size."""
    folder.mkdir()
    for size in ((300, 200), (129, 70_000 // 129)):
        picture, where = Image.new("RGBA", size, (250, 120, 10, 200)), f"{size[0]}x{size[1]}"
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a camera" * 500
        picture.save(folder / f"{where}-.png")
        picture.save(folder / f"{where}-alpha.webp")
        picture.save(folder / f"{where}-lossless.webp", lossless=True)
        opaque = picture.convert("RGB")
        opaque.save(folder / f"{where}-lossy.webp")
        opaque.save(folder / f"{where}-exif.jpg", exif=exif)
        opaque.save(folder / f"{where}-progressive.jpg", progressive=True, comment=b"\xff\xc0" * 50)


def test_the_page_makes_of_a_run_what_python_makes_of_it(run: Run, tmp_path: Path) -> None:
    write_recording(run, tmp_path)
    write_pictures(tmp_path / "pictures")
    environment = os.environ | {"PAYLOADS": str(tmp_path)}
    command = [str(NODE), "--test", str(TEST)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout
    check_recording(run, tmp_path / "page.zarr.zip")
    check_edited(tmp_path / "edited.zarr.zip")


def check_edited(packed: Path) -> None:
    """The page's recording of an edited run has Python's edits, identity and parent."""
    page = probe.open_run(packed)
    value, head, noise = page.experiment.edits
    assert value.kind == "value" and (value.words, value.steps) == (("scuba",), "6:")
    assert head.kind == "head" and (head.heads, head.how, head.steps) == ((3,), "zero", "all")
    assert noise.kind == "noise" and (noise.seed, noise.amount) == (7, 1.0)
    assert page.attributes["identity"] == page.experiment.identity()
    assert page.attributes.parent_identity == page.experiment.unedited.identity()
    verdicts = {check.name: check.verdict for check in page.verify().checks}
    assert [verdicts[name] for name in ("manifest", "digests", "schema")] == ["exact"] * 3


def check_recording(run: Run, packed: Path) -> None:
    """The page's recording of the same run holds the same numbers, and Python proves it."""
    page = probe.open_run(packed)
    assert (page.experiment.prompt, page.status) == (run.experiment.prompt, "complete")
    for path in ("latents/latents", "latents/prediction_uncond", "images/final"):
        assert (page.variable(path).values == run.variable(path).values).all()
    verdicts = {check.name: check.verdict for check in page.verify().checks}
    assert "failed" not in verdicts.values(), page.verify()
    assert [verdicts[name] for name in ("manifest", "digests", "committed")] == ["exact"] * 3
    for name in ("schema", "schedule", "guidance", "scheduler"):
        assert verdicts[name] in ("exact", "within tolerance"), name


def test_python_reads_the_experiment_that_the_page_writes(tmp_path: Path) -> None:
    layer = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    edits = [
        {"kind": "value", "word": "fox", "from": 6},
        {"kind": "head", "layer": layer, "head": 3, "from": 0},
        {"kind": "noise", "seed": 7, "amount": 0.3},
    ]
    fields = {"seed": 4294967295, "guidance": 7.5, "steps": 20, "scheduler": "DPM++2M"}
    start = {"name": "a-fox-1.png", "strength": 0.65}
    asked = {"prompt": 'a "fox": \\ {é} 🦊 # moon', **fields, "edits": edits, "start": start}
    code = (
        "const { yaml } = await import(process.argv[1]);"
        "process.stdout.write(yaml(JSON.parse(process.argv[2])));"
    )
    module = (ROOT / "web" / "experiment.js").as_uri()
    command = [str(NODE), "--input-type=module", "-e", code, module, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "page.yaml").write_bytes(done.stdout)
    read = load_experiment(tmp_path / "page.yaml")
    assert (read.prompt, read.seed, read.steps) == (asked["prompt"], 4294967295, 20)
    assert (read.guidance_scale, read.scheduler, read.dtype) == (7.5, "DPM++2M", "float32")
    assert (str(read.image), read.strength) == ("a-fox-1.png", 0.65)
    value, head, nudge = read.edits
    assert value.kind == "value" and value.words == ("fox",) and value.steps == "6:"
    assert head.kind == "head" and head.layers == (layer,) and head.heads == (3,)
    assert head.how == "zero" and head.steps == "all"
    assert nudge.kind == "noise" and (nudge.seed, nudge.amount) == (7, 0.3)


def test_python_reads_the_noising_that_the_page_writes(tmp_path: Path) -> None:
    asked = {"picture": "a-fox-1.png", "caption": "a fox: #", "timesteps": [999, 50, 0], "seed": 7}
    code = (
        "const { noisingYaml } = await import(process.argv[1]);"
        "process.stdout.write(noisingYaml(JSON.parse(process.argv[2])));"
    )
    module = (ROOT / "web" / "experiment.js").as_uri()
    command = [str(NODE), "--input-type=module", "-e", code, module, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "page.yaml").write_bytes(done.stdout)
    read = load_noising(tmp_path / "page.yaml")
    assert (str(read.picture), read.caption, read.seed) == ("a-fox-1.png", "a fox: #", 7)
    assert (read.timesteps, read.noises, read.model) == ((999, 50, 0), 1, "emojiworld")


def test_python_draws_from_a_noise_that_was_changed_at_some_places(tmp_path: Path) -> None:
    code = (
        "const [, noises, randn, files, file, edit] = process.argv;"
        "const { nudged } = await import(noises);"
        "const { generator } = await import(randn);"
        "const { npy } = await import(files);"
        "const noise = nudged(generator(5).normal(1024), [JSON.parse(edit)]);"
        "(await import('node:fs')).writeFileSync(file, npy(noise, [1, 4, 16, 16]));"
    )
    where = f"{'0' * 20}f00f{'0' * 40}"  # row 5: four places, a gap of eight, four places
    edit = {"seed": 7, "amount": 0.4, "where": where}
    names = ("diffusion/noise.js", "diffusion/randn.js", "npy.js")
    modules = [(ROOT / "web" / name).as_uri() for name in names]
    command = [str(NODE), "--input-type=module", "-e", code, *modules, str(tmp_path / "noise.npy")]
    subprocess.run([*command, json.dumps(edit)], check=True)
    own, other = (noise(seed, (1, 4, 16, 16), torch.float32)[0] for seed in (5, 7))
    mixed = mixed_noise(own, other, Noise(kind="noise", seed=7, amount=0.4))
    expected = own.clone()
    for column in (0, 1, 2, 3, 12, 13, 14, 15):
        expected[..., 5, column] = mixed[..., 5, column]
    read = read_noise(str(tmp_path / "noise.npy"), (1, 4, 16, 16))
    assert abs(read - expected).max() <= 1e-6
    assert ((read != own).any(1) == (expected != own).any(1)).all()


def test_a_picture_holds_its_experiment(tmp_path: Path) -> None:
    picture = np.arange(128 * 128 * 3, dtype=np.uint8).reshape(128, 128, 3)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    text = 'prompt: "a fox"\nseed: 5 # é\n'
    code = (
        "const fs = await import('node:fs');"
        "const { withText } = await import(process.argv[1]);"
        "const [, , file, text] = process.argv;"
        "fs.writeFileSync(file, withText(fs.readFileSync(file), 'experiment', text));"
    )
    module = (ROOT / "web" / "png.js").as_uri()
    command = [str(NODE), "--input-type=module", "-e", code, module]
    subprocess.run([*command, str(tmp_path / "picture.png"), text], check=True)
    with Image.open(tmp_path / "picture.png") as read:
        assert (np.asarray(read) == picture).all()  # with its checksums
        assert read.text == {"experiment": text}  # type: ignore[attr-defined]


def test_the_pages_style_reaches_nothing_of_the_player() -> None:
    """A selector that begins with a bare class of the player's would change the player."""
    figures = ROOT / "probe" / "figures"
    made = "".join((figures / name).read_text("utf-8") for name in ("player.js", "drawing.js"))
    own = {one for text in re.findall(r'make\("\w+", "([^"]+)"', made) for one in text.split()}
    own |= set(re.findall(r"\.([a-z][\w-]*)", plain(figures / "player.css")))
    assert {"curve", "film", "thumb", "chip"} <= own
    sheets = [*(ROOT / "web").glob("*.css"), *(ROOT / "web" / "lesson").glob("*.css")]
    for sheet in sheets:
        for selectors in re.findall(r"([^{}]+)\{", plain(sheet)):
            for selector in selectors.split(","):
                bare = re.match(r"\s*\.([a-z][\w-]*)", selector)
                assert not (bare and bare[1] in own), f"{sheet.name}: {selector.strip()}"


def plain(sheet: Path) -> str:
    """Return a style sheet without its comments."""
    return re.sub(r"/\*.*?\*/", "", sheet.read_text("utf-8"), flags=re.DOTALL)
