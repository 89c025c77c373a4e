"""Export the bundled model for the page: graphs alone, which read the model's own safetensors.

    pip install onnx onnxscript
    python web/export.py

Four graphs and `manifest.json` are written to web/model: text encoder, UNet, VAE decoder and VAE
encoder. The manifest has the linear map by which latents are shown as small pictures.

A graph has no weights. It says where each one lies in the model's files, in float16, and computes
in float32. So they must be exported again when the model was trained again: the manifest holds the
digests of the files, and tests/test_web_model.py compares them.

The UNet also puts out the attention of each cross-attention layer, after its softmax. Its input
`value_scale` multiplies what a head reads from a token: 1 changes nothing, 0 switches it off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

import probe
from probe.diffusion.loading import load
from probe.settings.experiment import load_experiment
from probe.watching.decoded import fit_preview

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "probe" / "emojiworld"
OUTPUT = ROOT / "web" / "model"
SMALL = 32  # values of a constant that is no weight: the frequencies of the timestep's embedding
OPSET = 18
SCHEDULERS = ("DDIM", "Euler", "EulerAncestral", "DPM++2M", "PNDM")
EDITS = (  # a page's, each of which gets Python's defaults
    {"kind": "value", "words": ["fox"]},
    {"kind": "head", "layers": ["*"], "heads": [0]},
    {"kind": "noise", "seed": 0, "amount": 1.0},
)
STEPS = 7  # of the recordings that the template is made of
CONSTANTS = (
    "cost/component",
    "cost/flops",
    "cost/parameters",
    "cost/weight_bytes",
    "preview/latent_to_rgb",
    "preview/bias",
)  # variables whose values are the model's


class CrossAttention:
    """Attention by hand, in place of a layer's processor: keeps what the softmax gives."""

    def __init__(self, layer: int, unet: UNet):
        self.layer, self.unet = layer, unet

    def __call__(
        self,
        attention: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        sides = (hidden_states, encoder_hidden_states, encoder_hidden_states)
        parts = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = (
            part(side).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part, side in zip(parts, sides, strict=True)
        )
        shares = ((query * attention.scale) @ key.transpose(-1, -2)).softmax(-1)
        self.unet.maps.append(shares)
        read = shares @ (value * self.unet.value_scale[self.layer].unsqueeze(-1))
        mixed: torch.Tensor = attention.to_out[0](read.transpose(1, 2).flatten(2))
        return mixed


class UNet(torch.nn.Module):
    """The UNet with its cross-attention: `eps`, then a map of each layer in the order they run."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet
        self.maps: list[torch.Tensor] = []
        self.value_scale = torch.empty(0)
        self.layers = cross_attention_layers(unet)
        for index, name in enumerate(self.layers):
            unet.get_submodule(name).set_processor(CrossAttention(index, self))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        value_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """*Shape:* latents (row, 4, y, x), text (row, 77, 128), value_scale (layer, row, head, 77);
        maps (row, head, pixel, 77).
        """
        self.maps.clear()
        self.value_scale = value_scale
        eps = self.unet(latents, timestep, text, return_dict=False)[0]
        return (eps, *self.maps)


def cross_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Return the paths of the cross-attention layers, in the order they run."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(names, key=lambda name: order[name.split(".")[0]])


class TextEncoder(torch.nn.Module):
    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """*Shape:* (row, 77) to (row, 77, 128)."""
        hidden: torch.Tensor = self.encoder(ids)[0]
        return hidden


class Decoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """*Shape:* (row, 4, y, x) to pixels from -1 to 1, (row, 3, 8 y, 8 x)."""
        scaled = latents / self.vae.config.scaling_factor
        pixels: torch.Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return pixels


class Encoder(torch.nn.Module):
    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of the latents of pixels, in the scale of the UNet."""
        posterior = self.vae.encode(pixels).latent_dist
        factor = self.vae.config.scaling_factor
        return posterior.mean * factor, posterior.std * factor


@dataclass(frozen=True)
class Part:
    """One graph: a module, examples of its inputs, its outputs, and where its weights lie."""

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    outputs: Sequence[str]
    weights: str


def parts(folder: Path = MODEL) -> dict[str, Part]:
    """Load the model in float32, as the graphs compute it."""
    kind = {"torch_dtype": torch.float32}
    unet = UNet(UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **kind))
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **kind)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    ids = torch.full((2, 77), text.config.eos_token_id)
    latents, embedding = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128)
    scale = torch.ones(len(unet.layers), 2, 4, 77)
    step = {"latents": latents, "timestep": torch.tensor([900]), "text": embedding}
    vae_file, pixels = "vae/diffusion_pytorch_model.safetensors", torch.randn(2, 3, 128, 128)
    return {
        "text": Part(TextEncoder(text), {"ids": ids}, ["text"], "text_encoder/model.safetensors"),
        "unet": Part(
            unet,
            {**step, "value_scale": scale},
            ["eps", *unet.layers],
            "unet/diffusion_pytorch_model.safetensors",
        ),
        "decoder": Part(Decoder(vae), {"latents": latents}, ["pixels"], vae_file),
        "encoder": Part(Encoder(vae), {"pixels": pixels}, ["mean", "deviation"], vae_file),
    }


def exported(part: Part) -> Any:
    """Export a part by torch, with any number of rows."""
    rows = torch.export.Dim("rows", min=1, max=16)
    axis = {"timestep": None, "value_scale": {1: rows}}
    program = torch.onnx.export(
        part.module.eval(),
        tuple(part.inputs.values()),
        input_names=list(part.inputs),
        output_names=list(part.outputs),
        dynamic_shapes=tuple(axis.get(name, {0: rows}) for name in part.inputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def tensors_of(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield name, offset in the file and bytes of each float16 tensor of a safetensors file."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__" and entry["dtype"] == "F16":
            first, last = (start + offset for offset in entry["data_offsets"])
            yield name, first, content[first:last]


def point_to_weights(model: Any, file: str, folder: Path = MODEL) -> None:
    """Replace a graph's weights by offsets into a file of the model.

    Raise ValueError for a weight that is not there.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    places = {content: (name, first) for name, first, content in tensors_of(folder / file)}
    graph, kept, nodes = model.graph, {}, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)  # exact: the weights are stored so
        turned = half.tobytes() not in places and half.ndim == 2  # a linear layer's, transposed
        content = (np.ascontiguousarray(half.T) if turned else half).tobytes()
        if values.dtype != np.float32 or content not in places:
            if values.dtype == np.float32 and values.size > SMALL:
                raise ValueError(f"{tensor.name}: no such weight in {file}")
            kept[tensor.name] = tensor
            continue
        name, first = places[content]
        stored = TensorProto(
            name=f"{name} {'turned' if turned else list(half.shape)}",
            data_type=TensorProto.FLOAT16,
            dims=half.shape[::-1] if turned else half.shape,
            data_location=TensorProto.EXTERNAL,
        )
        where = {"location": file, "offset": str(first), "length": str(len(content))}
        for key, value in where.items():
            stored.external_data.add(key=key, value=value)
        kept[stored.name] = stored
        wide = tensor.name + " wide" if turned else tensor.name
        nodes.append(helper.make_node("Cast", [stored.name], [wide], to=TensorProto.FLOAT))
        if turned:
            nodes.append(helper.make_node("Transpose", [wide], [tensor.name], perm=[1, 0]))
    own = [*nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept.values())
    graph.node.extend(own)


def forget_origin(model: Any) -> None:
    """Take out what the exporter says of the machine: names of files, lines of code, shapes."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.doc_string = graph.doc_string = ""
    for thing in [*graph.node, *graph.input, *graph.output, *graph.initializer, *model.functions]:
        del thing.metadata_props[:]
        thing.doc_string = ""


def shape_of(name: str, example: torch.Tensor) -> list[int]:
    """Return the shape of an input without its rows."""
    return [size for axis, size in enumerate(example.shape) if axis != (name == "value_scale")]


def preview() -> dict[str, Any]:
    """Return the linear map from latents to colours from 0 to 1, as a recording has it."""
    slope, bias = fit_preview(load("emojiworld", dtype="float32", device="cpu"))
    return {"slope": slope.tolist(), "bias": bias.tolist()}


def template() -> dict[str, Any]:
    """Return what recordings of the page have in common: attributes, variables, constants.

    They are those of tiny recordings: one of each scheduler, and one without guidance.
    """
    model = load("emojiworld", dtype="float32", device="cpu")
    capture = {"attention": "off", "text": False, "statistics": False}
    asked = {"model": "emojiworld", "dtype": "float32", "prompt": "PROMPT", "capture": capture}
    asked |= {"seed": 5, "steps": STEPS, "guidance_scale": 3.0}
    made: dict[str, Any] = {"schedulers": {}, "conventions": {}, "ends": {}, "constants": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, scale in [*((name, 3.0) for name in SCHEDULERS), ("DDIM", 1.0)]:
            recipe = asked | {"scheduler": name, "guidance_scale": scale, "prompt": "a fox"}
            run = probe.record(recipe, model, output=folder, progress=False)
            root = json.loads((run.path / "zarr.json").read_text(encoding="utf-8"))
            metadata = root["consolidated_metadata"]["metadata"]
            if scale == 1:
                made["unguided"] = sorted(metadata)
                continue
            made["schedulers"][name] = root["attributes"]["scheduler"]
            made["conventions"][name] = root["attributes"]["latent_convention"]
            table, calls = (
                metadata[path]["shape"][0] for path in ("latents/scheduler_sigmas", "step")
            )
            made["ends"][name] = table - calls  # 1: its table of sigmas ends with 0
            made["metadata"], made["attributes"] = metadata, root["attributes"]
            for path in CONSTANTS:
                (chunk,) = (run.path / path).glob("c*")
                made["constants"][path] = base64.b64encode(chunk.read_bytes()).decode()
    experiment = load_experiment(asked)
    fields = experiment.resolved()
    relevant = {name: fields[name] for name in fields if name not in experiment.not_asked}
    made["identity"] = json.dumps(relevant, sort_keys=True, separators=(",", ":"))
    made["attributes"] |= {"experiment": fields}
    edited = load_experiment(asked | {"edits": list(EDITS)}).resolved()["edits"]
    made["edits"] = {edit["kind"]: edit for edit in edited}
    for name in ("identity", "created", "writer", "environment", "status"):
        del made["attributes"][name]
    return made


def main() -> int:
    torch.manual_seed(0)
    OUTPUT.mkdir(exist_ok=True)
    manifest: dict[str, Any] = {"layers": [], "shapes": {}, "graphs": {}, "preview": preview()}
    for name, part in parts().items():
        model = exported(part)
        point_to_weights(model, part.weights)
        forget_origin(model)
        content = model.SerializeToString(deterministic=True)
        (OUTPUT / f"{name}.onnx").write_bytes(content)
        digest = hashlib.sha256((MODEL / part.weights).read_bytes()).hexdigest()
        manifest["shapes"] |= {key: shape_of(key, example) for key, example in part.inputs.items()}
        manifest["graphs"][name] = {"weights": part.weights, "sha256": digest}
        if isinstance(part.module, UNet):
            manifest["layers"] = part.module.layers
        print(f"{name}: {len(content):,} bytes, {len(model.graph.node)} nodes")
    recording = json.dumps(template(), indent=1, sort_keys=True) + "\n"
    (OUTPUT / "recording.json").write_text(recording, encoding="utf-8")
    text = json.dumps(manifest, indent=1) + "\n"
    (OUTPUT / "manifest.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
