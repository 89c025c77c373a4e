"""What a call costs is counted exactly: against published numbers, and against torch's counter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import refused
from torch.utils.flop_counter import FlopCounterMode

from probe import cost
from probe.diffusion.families import AnyFamily
from probe.diffusion.loading import blueprint
from probe.diffusion.sd import StableDiffusion
from probe.diffusion.variants import coarse, remade, unet_at, vae_at
from probe.errors import ExperimentError, ModelError
from probe.reading.pixels import Counts
from probe.settings.cost import Cost, load_cost, table
from probe.watching import hooks
from probe.watching.counting import (
    Counter,
    LayerCount,
    count_models,
    text_layers,
    tokens_of,
    unet_layers,
    vae_layers,
)

# Channels that are no powers of two, other heads on each grid, sides that are not equal.
ODD = {
    "block_out_channels": (24, 40, 56),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (3, 5, 7),
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
Call = Callable[[], Any]


@pytest.fixture(scope="module")
def sd14() -> AnyFamily:
    return blueprint("sd14")


@pytest.fixture(scope="module")
def latents(sd14: AnyFamily) -> list[LayerCount]:
    return unet_layers(sd14, (4, 64, 64))


def gflop(layers: list[LayerCount], *kinds: str) -> float:
    return round(sum(x.flops for x in layers if not kinds or x.kind in kinds) / 1e9, 1)


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def assert_as_the_counter(module: Any, call: Call, layers: list[LayerCount]) -> None:
    """Hold every layer, and the total, against FlopCounterMode."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    theirs = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    names = {
        f"{type(root).__name__}{rest}": path
        for path, _ in module.named_modules()
        for root, rest in _from_each_root(module, path)
    }
    theirs = {names[name]: flops for name, flops in theirs.items() if name in names}
    assert sum(layer.flops for layer in layers) == counter.get_total_flops() > 0
    for layer in layers:
        if layer.path.endswith("quant_conv"):
            continue  # two are called Conv2d there; the total has them
        inside = [other for other in layers if other.path.startswith(f"{layer.path}.")]
        ours = layer.flops + sum(other.flops for other in inside)
        assert theirs.get(layer.path, 0) == ours, layer


def _from_each_root(module: Any, path: str) -> list[tuple[Any, str]]:
    """Return the modules from which the counter may name a path: a VAE is called by its halves."""
    first, _, rest = path.partition(".")
    halves = [(getattr(module, first), f".{rest}" if rest else "")] if path else []
    return [(module, f".{path}" if path else ""), *halves]


def assert_unet(model: AnyFamily, shape: tuple[int, ...]) -> None:
    given = torch.zeros((1, *shape), device="meta")
    t = torch.zeros((), dtype=torch.long, device="meta")
    arguments = model.blank(1, tokens_of(model))
    layers = unet_layers(model, shape)
    assert_as_the_counter(model.unet, lambda: model.call(given, t, arguments), layers)
    assert sum(layer.parameters for layer in layers) == parameters(model.unet)


def test_known_answers_of_sd_1(sd14: AnyFamily, latents: list[LayerCount]) -> None:
    sizes = {name: parameters(part) for name, part in sd14.components().items()}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert gflop(latents) == 803.3
    assert gflop(latents, "convolution") == 443.9  # 444
    assert gflop(latents, "linear") == 233.3
    assert gflop(latents, "self_attention", "cross_attention") == 126.1
    assert gflop(unet_layers(sd14, (4, 512, 512))) == 545_118.4  # 545.1 TFLOP
    decoded = vae_layers(sd14, sd14.vae, (4, 64, 64), "decode")
    encoded = vae_layers(sd14, sd14.vae, (3, 512, 512), "encode")
    assert (gflop(decoded), gflop(encoded)) == (2514.5, 1116.7)
    both = sum(layer.parameters for layer in decoded + encoded)
    assert both == 83_653_863


def test_the_widest_matrix_of_attention(latents: list[LayerCount]) -> None:
    widest = max(latents, key=lambda layer: layer.matrix)
    assert widest.kind == "self_attention" and widest.matrix == 8 * 4096 * 4096
    crossing = [layer.matrix for layer in latents if layer.kind == "cross_attention"]
    assert max(crossing) == 8 * 4096 * 77 and len(crossing) == 16


def test_torchs_counter_agrees_for_sd_1(sd14: AnyFamily) -> None:
    assert_unet(sd14, (4, 64, 64))
    (layers,) = text_layers(sd14).values()
    ids = torch.zeros((1, 77), dtype=torch.long, device="meta")
    encoder = sd14.text_encoder
    assert_as_the_counter(encoder, lambda: encoder(ids), layers)
    assert sum(layer.parameters for layer in layers) == 123_060_480
    given = torch.zeros((1, 4, 64, 64), device="meta")
    layers = vae_layers(sd14, sd14.vae, (4, 64, 64), "decode")
    assert_as_the_counter(sd14.vae, lambda: sd14.vae.decode(given), layers)


def odd_model() -> AnyFamily:
    return StableDiffusion.of(tiny.pipeline(**ODD)).skeleton()


@pytest.mark.parametrize("shape", [(4, 20, 28), (4, 9, 14)])
def test_torchs_counter_agrees_for_an_odd_network(shape: tuple[int, int, int]) -> None:
    model = odd_model()
    assert_unet(model, shape)
    for way, given in (("encode", (3, 36, 52)), ("decode", (4, 9, 13))):
        pixels = torch.zeros((1, *given), device="meta")
        layers = vae_layers(model, model.vae, given, way)  # type: ignore[arg-type]
        assert_as_the_counter(model.vae, lambda w=way, x=pixels: getattr(model.vae, w)(x), layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unet", "texts"),
    [
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
        ("sd21", 865_910_724, [340_387_840]),
    ],
)
def test_torchs_counter_agrees_for_others(name: str, unet: int, texts: list[int]) -> None:
    model = blueprint(name)
    assert parameters(model.unet) == unet
    counted = [sum(x.parameters for x in layers) for layers in text_layers(model).values()]
    assert counted == texts
    assert_unet(model, (4, 64, 48))


def test_torchs_counter_does_not_see_fused_attention_on_a_cpu() -> None:
    """On meta tensors attention falls into its products; a CPU runs one fused kernel instead."""
    query = torch.zeros(1, 2, 64, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    with FlopCounterMode(display=False) as real:
        attend(query, query, query)
    with FlopCounterMode(display=False) as meta:
        attend(*[query.to("meta")] * 3)
    assert real.get_total_flops() == 0
    assert meta.get_total_flops() == 2 * 2 * 2 * 64 * 64 * 8


def test_everything_grows_with_the_rows_but_parameters() -> None:
    model = odd_model()
    one, three = unet_layers(model, (4, 8, 12)), unet_layers(model, (4, 8, 12), rows=3)
    for a, b in zip(one, three, strict=True):
        assert (b.path, b.kind, b.parameters) == (a.path, a.kind, a.parameters)
        assert (b.flops, b.numbers, b.matrix) == (3 * a.flops, 3 * a.numbers, 3 * a.matrix)


def test_counting_leaves_no_hook(sd14: AnyFamily, latents: list[LayerCount]) -> None:
    assert latents and hooks.count(sd14.unet) == hooks.count(sd14.vae) == 0


def test_the_same_network_on_pixels(sd14: AnyFamily, latents: list[LayerCount]) -> None:
    changes = unet_at(sd14.unet, 1)
    pixels = unet_layers(replace(sd14, unet=remade(sd14.unet, changes)), (3, 512, 512))
    changes |= coarse(sd14.unet, (512, 512), 64)
    cheap = unet_layers(replace(sd14, unet=remade(sd14.unet, changes)), (3, 512, 512))
    here = gflop(latents)
    assert round(gflop(pixels) / here) == 679
    assert round(gflop(cheap) / here) == 34
    assert round(gflop(pixels, "convolution") / gflop(latents, "convolution")) == 64
    attended = {x.output[1] for x in cheap if x.kind == "self_attention"}
    assert attended == {64 * 64}, "the middle alone attends"
    assert coarse(sd14.unet, (64, 64), 64) == {}
    assert coarse(sd14.unet, (1024, 1024), 64)["mid_block_type"] == "UNetMidBlock2D"


def test_a_vae_of_another_f(sd14: AnyFamily) -> None:
    assert vae_at(sd14.vae, 8) == {}
    for f, channels in ((2, (128, 256)), (16, (128, 256, 512, 512, 512))):
        vae = remade(sd14.vae, vae_at(sd14.vae, f))
        assert tuple(vae.config.block_out_channels) == channels
        with torch.no_grad():
            mean = vae.encode(torch.zeros((1, 3, 64, 96), device="meta")).latent_dist.mean
        assert tuple(mean.shape) == (1, 4, 64 // f, 96 // f)


def test_a_count_by_hand() -> None:
    """The finest layers of an odd network, each multiplied out."""
    model = odd_model()
    by_path = {layer.path: layer for layer in unet_layers(model, (4, 8, 12))}
    assert by_path["conv_in"].flops == 2 * (8 * 12) * 24 * 4 * 9
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    tokens = tokens_of(model)
    assert by_path[f"{block}.attn1"].flops == 2 * 2 * 96 * 96 * 24
    assert by_path[f"{block}.attn1"].matrix == 3 * 96 * 96
    assert by_path[f"{block}.attn2"].flops == 2 * 2 * 96 * tokens * 24
    assert by_path[f"{block}.attn2.to_k"].flops == 2 * tokens * 16 * 24
    assert by_path["conv_in"].numbers == 24 * 96


# --- the command ----------------------------------------------------------------------------------

SMALL = ("--model", "emojiworld", "--sizes", "64", "--f", "1,8", "--quiet")


def test_the_command_prints_tables_and_writes_json(call: Any, tmp_path: Path) -> None:
    code, out, err = call(cost.main, *SMALL, "--output", tmp_path / "cost.json")
    assert (code, err) == (0, "")
    assert "The denoiser, one call" in out and "GFLOP to decode" in out and "A whole run" in out
    beside = out[out.index("How many times") :].splitlines()[1]
    for column in ("same network", "attention up to 64x64", "convolution alone", "in the paper"):
        assert column in beside
    assert "2.7 to 4.9 at f = 4" in out and "attends on its widest grids" in out
    counts = Counts.model_validate_json((tmp_path / "cost.json").read_bytes())
    assert counts.of("emojiworld", "denoiser", 8, 64).parameters == 8_788_228
    assert str(tmp_path) not in counts.made_by and "--sizes 64" in counts.made_by
    assert json.loads((tmp_path / "cost.json").read_text())["own_f"] == {"emojiworld": 8}


def test_layers_are_listed(call: Any) -> None:
    code, out, _ = call(cost.main, *SMALL[:4], "--f", "8", "--quiet", "--layers")
    assert code == 0
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1" in out
    assert "vae_decode, f = 8, full attention" in out
    assert "Count f = 1 and another f" in out, "one f alone has nothing to stand beside"


def test_a_local_folder_is_counted_without_weights(tmp_path: Path) -> None:
    pipe = tiny.pipeline(**ODD)
    pipe.save_pretrained(tmp_path / "odd")
    for weights in (tmp_path / "odd").rglob("*.safetensors"):
        weights.unlink()
    model = blueprint(str(tmp_path / "odd"))
    assert {name: parameters(part) for name, part in model.components().items()} == {
        name: parameters(getattr(pipe, name)) for name in ("unet", "vae", "text_encoder")
    }
    settings = load_cost({"model": str(tmp_path / "odd"), "sizes": ["32x48"], "f": [1, 4]})
    counts = count_models([settings], "test")
    assert counts.own_f == {settings.model: 4}
    assert counts.of(settings.model, "denoiser", 4, (32, 48)).shape == (4, 8, 12)


def test_a_model_of_pixels_has_no_vae(tmp_path: Path) -> None:
    tiny.pixel_pipeline().save_pretrained(tmp_path / "pixels")
    model = blueprint(str(tmp_path / "pixels"))
    assert (model.vae, model.f) == (None, 1)
    settings = load_cost({"model": str(tmp_path / "pixels"), "sizes": [16], "f": [1]})
    counts = count_models([settings], "test")
    assert [row.component for row in counts.rows] == ["text_encoder", "denoiser"]
    assert counts.whole_run(settings.model, 1, 16).decode == 0
    assert "On pixels there is no VAE." in cost.counted_lines(counts, settings)


def test_latents_of_a_model_of_pixels_are_refused(call: Any) -> None:
    got = refused(call, "--model", "emojiworld-pixels", "--sizes", "64", "--quiet", main=cost.main)
    assert got[0] == "f: emojiworld-pixels has no VAE, of which one with f = 2 could be derived"
    assert got[1] == "It works on pixels: take f: [1]."


def test_a_config_that_makes_no_call_is_refused(call: Any, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    tiny.pipeline().save_pretrained(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["cross_attention_dim"] = [1] * len(config["block_out_channels"])
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    got = refused(call, "--model", folder, "--sizes", "32", "--f", "1", main=cost.main)
    assert ": its unet does not run at this size: " in got[0]


def test_what_stands_in_the_place_of_the_output_is_left_alone(call: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        got = refused(call, *SMALL, "--output", place, main=cost.main)
        assert got[0] == f"--output: {place} is no plain file, and would be replaced."
    assert (tmp_path / "pipe").is_fifo()


def test_the_name_of_a_home_is_not_written(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.pixel_pipeline().save_pretrained(tmp_path / "mine")
    file = tmp_path / "cost.json"
    code, out, _ = call(
        *(cost.main, "--model", tmp_path / "mine", "--sizes", "16"),
        *("--f", "1", "--output", file, "--quiet"),
    )
    assert code == 0 and out.startswith("~/mine: one call")
    assert str(tmp_path) not in file.read_text() and "~/mine" in file.read_text()


def test_shares_stand_against_the_size(call: Any) -> None:
    code, out, _ = call(cost.main, *SMALL[:2], "--sizes", "64,128", "--f", "8", "--quiet")
    assert code == 0
    table = out[out.index("The denoiser's shares against the size") :].splitlines()
    assert [line.split()[:2] for line in table[2:4]] == [["8", "64x64"], ["8", "128x128"]]


def test_the_file_that_ships_is_read() -> None:
    file = Path(__file__).parent.parent / "experiments" / "cost-sd14.yaml"
    assert load_cost(file) == Cost()
    assert set(Cost.model_fields) == load_cost(file).model_fields_set
    assert table().count("\n") == len(Cost.model_fields) + 1


WRONG: list[tuple[tuple[str, ...], str, str]] = [
    (
        ("--sizes", "100", "--f", "1,8"),
        "sizes: 100 x 100 pixels are no whole number of latents at f = 8",
        "Take 96x96, or leave 8 out of f.",
    ),
    (
        ("--model", "sd14", "--sizes", "64", "--f", "1,32"),
        "sizes: 64 x 64 pixels are 2 x 2 latents at f = 32, and the coarsest grid of sd14 would "
        "have less than one place",
        "Take 256 pixels or more a side, or leave 32 out of f.",
    ),
    (("--sizes", "0"), "sizes: '0' is no size", "Write sides in pixels"),
    (("--sizes", "9999"), "sizes: '9999' is larger than 4096 pixels", "Write sides in pixels"),
    (("--f", "3"), "f: '3' is no f of an autoencoder here", "Write some of 1, 2, 4, 8, 16, 32"),
    (
        ("--model", "sd15"),
        "model: 'sd15' is no config that is known, and no local diffusers folder.",
        "Did you mean sd14?",
    ),
    (("--steps", "0"), "steps: 0 is less than 1", "Write a number from 1 to 1000."),
    (("--dtype", "int8"), "dtype: 'int8' is not one of float16, bfloat16, float32", "Write one"),
    (("--rounds", "0"), "--rounds, --threads and --most-seconds are counted from 1 up.", "Give"),
    (("--output", "none/such.json"), "--output: the folder of none/such.json", "Make it"),
    (("--threads", "9999999"), "--threads 9999999: this machine has ", "Write a number from 1"),
    (("--layers", "--measure"), "--layers lists counts, and --measure takes times.", "Give one"),
]


@pytest.mark.parametrize(("arguments", "cause", "remedy"), WRONG)
def test_what_is_wrong_is_refused(
    call: Any, arguments: tuple[str, ...], cause: str, remedy: str
) -> None:
    got = refused(call, *arguments, "--quiet", main=cost.main)
    assert got[0].startswith(cause) and got[1].startswith(remedy)


def test_an_unknown_field_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "cost.yaml").write_text("model: sd14\nsize: 512\n")
    with pytest.raises(ExperimentError, match="size: unknown field") as caught:
        load_cost(tmp_path / "cost.yaml")
    assert caught.value.remedy == "Did you mean sizes?"


def test_a_tiny_vae_has_one_f() -> None:
    import diffusers

    with torch.device("meta"):
        vae = diffusers.AutoencoderTiny()
    with pytest.raises(ModelError, match="AutoencoderTiny, of which none with f = 2"):
        vae_at(vae, 2)


def test_sizes_may_be_written_in_many_ways() -> None:
    for written in ([512, "256x384"], ["512", [256, 384]], "512,256x384", "512, 256 x 384"):
        assert load_cost({"sizes": written}).sizes == ((512, 512), (256, 384)), written
    assert load_cost({"f": "8,1"}).f == (1, 8)


def test_each_count_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_cost({"model": "emojiworld", "sizes": [64, 64, 128], "f": [8, 16]})
    counter = Counter(blueprint("emojiworld"), settings)
    assert settings.sizes == ((64, 64), (128, 128))
    entries = counter.entries()
    one = next(layers for count, layers in entries if count.f == 8 and count.size == (64, 64))
    other = next(layers for count, layers in entries if count.f == 16 and count.size == (128, 128))
    assert one is other, "both are 8 x 8 latents"
