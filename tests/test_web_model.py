"""The page's graphs compute what torch computes, from the bundled model's own files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from probe.diffusion.draws import noise
from probe.diffusion.guidance import guide
from probe.diffusion.loading import BUNDLED, load
from probe.diffusion.parts import posterior
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.watching.decoded import fit_preview
from probe.watching.hooks import Hooks, editing_hooks

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = ROOT / "web" / "model"
MANIFEST = json.loads((GRAPHS / "manifest.json").read_text(encoding="utf-8"))
EXPORT = "the model's weights changed: export the graphs again, python web/export.py"
PROMPT = "a fox on the moon"
Arrays = Mapping[str, np.ndarray]


class Part:
    """One graph, opened on the model's files."""

    def __init__(self, name: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        folder = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder, str(BUNDLED["emojiworld"]))
        content = (GRAPHS / f"{name}.onnx").read_bytes()
        self.session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    loaded = load("emojiworld", dtype="float32", device="cpu")
    assert isinstance(loaded, StableDiffusion)
    return loaded


@pytest.fixture(scope="module")
def unet() -> Part:
    return Part("unet")


@pytest.fixture(scope="module")
def text(model: StableDiffusion) -> torch.Tensor:
    """What the UNet is told of an empty prompt and of PROMPT. *Shape:* (2, 77, 128)."""
    conditioning = model.condition(PROMPT)
    uncond = conditioning.uncond_embedding
    assert uncond is not None
    return torch.cat([uncond, conditioning.cond_embedding])


def close(got: np.ndarray, wanted: torch.Tensor | np.ndarray, off: float = 1e-5) -> bool:
    assert got.shape == tuple(wanted.shape)
    return bool(abs(got - np.asarray(wanted)).max() <= off)


def ones(rows: int) -> np.ndarray:
    layers, *shape = MANIFEST["shapes"]["value_scale"]
    return np.ones((layers, rows, *shape), np.float32)


def call(unet: Part, latents: np.ndarray, t: int, text: Any, scale: Any = None) -> Arrays:
    rows = len(text)
    return unet(
        latents=np.concatenate([latents] * rows),
        timestep=np.array([t]),
        text=np.asarray(text),
        value_scale=ones(rows) if scale is None else scale,
    )


def exported_from(name: str, weights: bytes) -> bool:
    return hashlib.sha256(weights).hexdigest() == MANIFEST["graphs"][name]["sha256"]


@pytest.mark.parametrize("name", MANIFEST["graphs"])
def test_the_graphs_are_of_these_weights(name: str) -> None:
    weights = (BUNDLED["emojiworld"] / MANIFEST["graphs"][name]["weights"]).read_bytes()
    assert exported_from(name, weights), EXPORT
    assert not exported_from(name, weights[:-2] + np.float16(3).tobytes())


def test_latents_are_shown_in_the_colours_of_a_recording(model: StableDiffusion) -> None:
    slope, bias = fit_preview(model)
    assert close(np.array(MANIFEST["preview"]["slope"]), slope), EXPORT
    assert close(np.array(MANIFEST["preview"]["bias"]), bias), EXPORT


def test_the_pages_recordings_are_of_this_model(model: StableDiffusion) -> None:
    recording = json.loads((GRAPHS / "recording.json").read_text(encoding="utf-8"))
    assert recording["attributes"]["model"]["name"] == "emojiworld"
    assert recording["attributes"]["model"]["weights"] == model.digest(), EXPORT


def test_the_graphs_are_small_and_say_nothing_of_a_machine() -> None:
    content = b"".join(path.read_bytes() for path in sorted(GRAPHS.glob("*.onnx")))
    assert len(list(GRAPHS.glob("*.onnx"))) == len(MANIFEST["graphs"]) == 4
    assert len(content) < 300_000
    printed = b"\n".join(re.findall(rb"[ -~]{4,}", content)).decode()
    located = {entry["weights"] for entry in MANIFEST["graphs"].values()}
    assert set(re.findall(r"\w+/\w+\.safetensors", printed)) == located
    for place in located:
        printed = printed.replace(place, "")
    assert not re.findall(r".*(?:\.py\b|site-packages|/\w+/|:\\).*", printed)


def test_text_encoder(model: StableDiffusion, text: torch.Tensor) -> None:
    ids = torch.cat([model.read("").ids, model.read(PROMPT).ids]).numpy()
    encoder = Part("text")
    assert close(encoder(ids=ids)["text"], text)
    assert close(encoder(ids=ids[1:])["text"], text[1:])


def attention_of(model: StableDiffusion, seen: dict[str, torch.Tensor], path: str) -> np.ndarray:
    """Softmax by hand, of what a layer multiplied. *Shape:* (row, head, pixel, token)."""
    module = model.attention_layers()[path].module
    query, key = (
        seen[f"{path}.{side}"].unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for side in ("to_q", "to_k")
    )
    maps: np.ndarray = ((query @ key.transpose(-1, -2)) * module.scale).softmax(-1).numpy()
    return maps


@pytest.mark.parametrize("t", [1, 500, 958])
def test_unet_and_its_attention(
    t: int, model: StableDiffusion, unet: Part, text: torch.Tensor
) -> None:
    latents, _ = noise(t, (1, 4, 16, 16), torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda value: seen.update({name: value})

    layers = [path for path, layer in model.attention_layers().items() if layer.kind == "cross"]
    assert set(MANIFEST["layers"]) == set(layers) and len(MANIFEST["layers"]) == 7
    watches: list[Any] = [
        (getattr(model.attention_layers()[path].module, side), "output", keep(f"{path}.{side}"))
        for path in layers
        for side in ("to_q", "to_k")
    ]
    with torch.no_grad(), Hooks(watches):
        eps = model.unet(torch.cat([latents] * 2), t, text, return_dict=False)[0]
    outputs = call(unet, latents.numpy(), t, text)
    assert list(outputs) == ["eps", *MANIFEST["layers"]]
    assert close(outputs["eps"], eps)
    for path in layers:
        assert close(outputs[path], attention_of(model, seen, path)), path
    alone = call(unet, latents.numpy(), t, text[1:])
    assert close(alone["eps"], eps[1:])


def test_values_are_scaled_as_our_edits_scale_them(
    model: StableDiffusion, unet: Part, text: torch.Tensor
) -> None:
    latents, _ = noise(1, (1, 4, 16, 16), torch.float32)
    scale = ones(2)
    layer, head, token = 2, 1, 2
    scale[layer, 1, head, token] = 0
    scale[5, :, 3] = 0.5
    modules = [model.attention_layers()[path].module for path in MANIFEST["layers"]]

    def scaled(index: int) -> Any:
        def change(value: torch.Tensor) -> torch.Tensor:
            wide = value.unflatten(-1, (modules[index].heads, -1))
            factor = torch.from_numpy(scale[index]).transpose(1, 2).unsqueeze(-1)
            return (wide * factor).flatten(2)

        return change

    changes = [(one.to_v, "output", scaled(index)) for index, one in enumerate(modules)]
    with torch.no_grad(), editing_hooks(changes):
        eps = model.unet(torch.cat([latents] * 2), 700, text, return_dict=False)[0]
    assert close(call(unet, latents.numpy(), 700, text, scale)["eps"], eps)
    assert not close(call(unet, latents.numpy(), 700, text)["eps"], eps, 1e-3)


def test_decoder_and_encoder(model: StableDiffusion) -> None:
    latents, _ = noise(2, (2, 4, 16, 16), torch.float32)
    pixels, _ = model.pixels(latents)
    assert close(Part("decoder")(latents=latents.numpy())["pixels"], pixels)
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    mean, deviation = posterior(model, picture)
    given = 2 * (picture.astype(np.float32) / 255).transpose(2, 0, 1)[None] - 1
    encoded = Part("encoder")(pixels=given)
    assert close(encoded["mean"], mean * model.scaling_factor)
    assert close(encoded["deviation"], deviation * model.scaling_factor)


def test_final_latents_of_a_run(model: StableDiffusion, unet: Part, text: torch.Tensor) -> None:
    """Both follow their own predictions: what is off is carried from step to step."""
    conditioning = model.condition(PROMPT)
    steps = list(denoise(model, conditioning, steps=8, guidance_scale=5.0, seed=3))
    scheduler = model.scheduled(8)
    latents = steps[0].latents
    for t in scheduler.timesteps:
        eps = torch.from_numpy(call(unet, latents.numpy(), int(t), text)["eps"])
        guided = guide(eps[:1], eps[1:], 5.0)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    assert close(latents.numpy(), steps[-1].next_latents)
