"""The parts of the pipeline with a run's own numbers, and the drawing that is made of them."""

from __future__ import annotations

import base64
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from recordings import recording

import probe
from probe.figures import anatomy
from probe.figures.anatomy_page import Shown, drawing, sentences
from probe.reading.recording import Run
from probe.testing.synthetic import synthetic_recording

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</div><script>alert(1)</script>",
    "'><style>*{display:none}</style>",
    '"><a href="http://evil.invalid">go</a>',
    "![a](http://evil.invalid/p.png) $x^2$ :red[b]",
    "&lt;b&gt; &amp; \u200b",
)


class Page(HTMLParser):
    """What a browser would make of HTML: its tags, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


@pytest.fixture(scope="module")
def sample() -> Run:
    return probe.open_run("sample")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording of format 1, which does not say how large the parts are."""
    folder = tmp_path_factory.mktemp("format-1")
    with zipfile.ZipFile(Path(__file__).parent / "format_1" / "default.zip") as packed:
        packed.extractall(folder)
    return Run(folder / "default.zarr")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("anatomy")
    return Run(synthetic_recording(folder / "one.zarr", prompt="a red cat", size=(8, 12), images=2))


def test_shapes_and_shares_are_those_of_the_run(sample: Run) -> None:
    assert anatomy.latent_shape(sample) == (4, 16, 16)
    assert anatomy.picture_shape(sample) == (3, 128, 128)
    assert anatomy.embedding_shape(sample, "text_encoder") == (77, 128)
    tokens = anatomy.tokens(sample)
    words = ["start", "an", "astronaut", "scuba", "diving", "end"]
    assert [token.label for token in tokens] == words and tokens[2].number == 643
    found = {part.name: part for part in anatomy.parts(sample)}
    assert list(found) == ["text_encoder", "unet", "vae"]
    decoded = 1 + sample.tree["decoded"].sizes["decoded_step"]
    assert [part.calls for part in found.values()] == [2, 20, decoded] and decoded > 2
    sizes = {
        name: sample.variable(f"cost/{name}").values for name in ("parameters", "weight_bytes")
    }
    seconds = sample.variable("cost/seconds").values
    for row, (part, spent) in enumerate(zip(found.values(), seconds, strict=True)):
        assert part.seconds == spent and part.time_share == pytest.approx(spent / seconds.sum())
        assert part.parameters == sizes["parameters"][row] > 1e5
        assert part.weight_bytes == sizes["weight_bytes"][row] == 4 * part.parameters
    once = seconds[1] / (seconds[0] + seconds[1] + seconds[2] / decoded)
    assert anatomy.unet_share_painted_once(sample) == pytest.approx(once)


def test_the_grid_of_a_block_without_attention_follows() -> None:
    names = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block"]
    names += ["up_blocks.0", "up_blocks.1", "up_blocks.2"]
    known = [None, None, (16, 12), (16, 12), (16, 12), None, None]
    grids = dict(zip(names, known, strict=True))
    anatomy._fill(grids, (3, 64, 48))
    assert [grid and grid[0] for grid in grids.values()] == [64, 32, 16, 16, 16, 32, 64]
    assert grids["up_blocks.1"] == (32, 24)
    other = dict(zip(names, known, strict=True))
    anatomy._fill(other, (3, 80, 80))
    assert list(other.values()) == known, "a network that is built otherwise is not guessed at"
    alone = dict(zip(names, known, strict=True))
    anatomy._fill(alone, None)
    assert list(alone.values()) == known
    alone["down_blocks.2"] = None
    anatomy._fill(alone, None)
    assert alone["down_blocks.2"] == (16, 12)


def test_the_unets_blocks_stand_in_order_with_their_grids(sample: Run, synthetic: Run) -> None:
    blocks = anatomy.blocks(sample)
    names = ["down 0", "down 1", "down 2", "mid", "up 0", "up 1", "up 2"]
    sides = [16, 8, 4, 4, 4, 8, 16]
    assert [block.name for block in blocks] == names
    assert [block.grid for block in blocks] == [(side, side) for side in sides]
    assert [block.attentions for block in blocks] == [1, 1, 0, 1, 0, 2, 2]
    assert [block.resnets for block in blocks] == [1, 1, 1, 2, 2, 2, 2]
    assert [block.grid for block in anatomy.blocks(synthetic)] == [(8, 12), (4, 6), (8, 12)]


def test_what_costs_were_not_recorded_is_none(tmp_path: Path) -> None:
    half = Run(synthetic_recording(tmp_path / "half.zarr", status="interrupted"))
    found = {part.name: part for part in anatomy.parts(half)}
    assert found["unet"].seconds is None and found["unet"].time_share is None
    assert found["unet"].parameters == 10**6 and found["unet"].flops == 10**8
    assert anatomy.decodings(half) is None and anatomy.unet_share_painted_once(half) is None
    assert "not recorded" in drawing(half) and not any("Time:" in one for one in sentences(half))


def test_sentences_say_the_numbers(sample: Run) -> None:
    text = " ".join(sentences(sample))
    assert "6 tokens" in text and "77 vectors of 128 numbers" in text
    assert "4 x 16 x 16 = 1,024" in text and "3 x 128 x 128 = 49,152" in text
    assert "48 times fewer" in text
    share = {part.name: part for part in anatomy.parts(sample)}["unet"].time_share
    assert share is not None and f"{share:.0%} was the UNet's" in text
    memory = int(sample.variable("cost/peak_memory").values)
    assert "decoded 6 times, 5 of them" in text and f"{memory / 1e6:.0f} MB" in text


def test_format_1_does_not_say_how_large_the_parts_are(first: Run) -> None:
    assert all(part.parameters is None is part.weight_bytes for part in anatomy.parts(first))
    page = Page(drawing(first))
    assert page.text.count("not recorded") == 6, "parameters and weights of three parts"
    assert anatomy.unet_share_painted_once(first) and sentences(first)


def test_the_drawing_shows_the_numbers_and_outlines_one_block(sample: Run, synthetic: Run) -> None:
    page = Page(drawing(sample, Shown("down_blocks.1.resnets.0")))
    for said in ("An astronaut scuba diving", "DDIMScheduler", "77 x 128, float32", "8 x 8"):
        assert said in page.text, said
    assert "not recorded" not in page.text and "8,788,228" in page.text
    chosen = [about for _, about in page.tags if "chosen" in str(about.get("class"))]
    assert [str(about["title"]).split(",")[0] for about in chosen] == ["down_blocks.1"]
    assert "1,000,000" in Page(drawing(synthetic)).text and "4 MB" in Page(drawing(synthetic)).text
    rows = {
        str(about["title"]).split(",")[0]: int(found[1])
        for _, about in page.tags
        if (found := re.match(r"grid-row:(\d)", str(about.get("style")))) and "title" in about
    }
    assert rows["down_blocks.0"] < rows["down_blocks.1"] < rows["mid_block"] > rows["up_blocks.1"]
    assert rows["up_blocks.2"] == rows["down_blocks.0"]


def test_blocks_and_layers_are_buttons_that_say_what_they_are(sample: Run, tmp_path: Path) -> None:
    shown = Shown("up_blocks.1", "cond", 0, ("text_encoder", 2, None))
    page = Page(drawing(sample, shown))
    buttons = [about for tag, about in page.tags if tag == "button"]
    picks = {(about["data-pick"], about["data-value"]): about["aria-pressed"] for about in buttons}
    blocks = {("block", block.path) for block in anatomy.blocks(sample) if block.measured}
    layers = {("layer", f"text_encoder {number}") for number in range(3)}
    assert set(picks) == blocks | layers and len(blocks) == 7
    pressed = {pick for pick, is_pressed in picks.items() if is_pressed == "true"}
    assert pressed == {("block", "up_blocks.1"), ("layer", "text_encoder 2")}
    little = Page(drawing(Run(recording(tmp_path / "little.zarr"))))
    assert not [tag for tag, _ in little.tags if tag == "button"], "nothing to see behind them"


def test_a_small_curve_is_that_of_the_statistics(sample: Run) -> None:
    module, branch = "down_blocks.0", "uncond"
    page = Page(drawing(sample, Shown(module, branch)))
    (alt, source) = next(
        (str(about["alt"]), str(about["src"]))
        for tag, about in page.tags
        if tag == "img" and "svg" in str(about["src"])
    )
    assert alt.startswith("Output of down_blocks.0, uncond, from step 0 to 19")
    svg = base64.b64decode(source.partition(",")[2]).decode()
    found = re.search("<polyline points='([^']*)'", svg)
    assert found
    line = np.array([corner.split(",") for corner in found[1].split()], np.float64)
    values = anatomy.statistics(sample, module, branch)
    low = (values["mean"] - values["std"]).min()
    high = (values["mean"] + values["std"]).max()
    np.testing.assert_allclose(line[:, 0], np.arange(20) * 300 / 19, atol=0.06)
    drawn = low + (60 - line[:, 1]) / 60 * (high - low)
    np.testing.assert_allclose(drawn, values["mean"], atol=(high - low) / 500)
    assert f"{low:.3g} to {high:.3g}" in alt


@pytest.mark.parametrize("prompt", HOSTILE)
def test_somebodys_text_stays_text(prompt: str, sample: Run, tmp_path: Path) -> None:
    run = Run(synthetic_recording(tmp_path / "hostile.zarr", prompt=prompt))
    own = {tag for tag, _ in Page(drawing(sample)).tags}
    page = Page(drawing(run))
    assert {tag for tag, _ in page.tags} <= own and prompt in page.text
    for tag, about in page.tags:
        assert not any(name.startswith("on") for name in about), tag
        assert tag != "img" or str(about["src"]).startswith("data:image/png;base64,")


def test_a_recording_of_little_says_what_records_the_rest(tmp_path: Path) -> None:
    run = Run(recording(tmp_path / "little.zarr"))
    page = Page(drawing(run))
    assert "record with capture.text: true" in page.text and not anatomy.tokens(run)
    assert len(anatomy.blocks(run)) == 2 and sentences(run)


def test_what_is_plotted_is_what_the_snippets_yield(sample: Run) -> None:
    module, branch = "down_blocks.0.attentions.0", "uncond"
    codes = anatomy.snippets(sample, module, branch, 0, ("text_encoder", 1, 2))
    shown = anatomy.statistics(sample, module, branch)
    found: dict[str, object] = {}
    exec(codes["statistics"], found)
    values = found["values"]
    for name, curve in shown.items():
        assert np.array_equal(values.sel(statistic=name).values, curve)  # type: ignore[attr-defined]
    lines = anatomy.csv_of(sample, module, branch).splitlines()
    assert lines[0] == "step,mean,std,min,max" and len(lines) == 21
    row = [float(value) for value in lines[8].split(",")]
    assert row == pytest.approx([7, *(float(curve[7]) for curve in shown.values())], rel=1e-6)
    exec(codes["attention"], found)
    attention, texts = anatomy.text_attention(sample, "text_encoder", 1, 2)
    assert np.array_equal(found["attention"].values, attention)  # type: ignore[attr-defined]
    assert attention.shape == (len(texts), len(texts)) == (6, 6)
    assert np.allclose(attention.sum(1), 1, atol=2e-3) and not np.triu(attention, 1).any()
    mean, _ = anatomy.text_attention(sample, "text_encoder", 1, None)
    code = anatomy.snippets(sample, "", "", 0, ("text_encoder", 1, None))
    assert list(code) == ["attention"]
    exec(code["attention"], found)
    assert np.array_equal(found["attention"].values, mean)  # type: ignore[attr-defined]


def test_two_text_encoders_stand_side_by_side(full_xl: Run) -> None:
    assert anatomy.encoders(full_xl) == ["text_encoder", "text_encoder_2"]
    page = Page(drawing(full_xl))
    for name in anatomy.encoders(full_xl):
        token, feature = anatomy.embedding_shape(full_xl, name)
        assert f"from {name}" in page.text and f"{token} x {feature}" in page.text
    assert "Second text encoder" in page.text and sentences(full_xl)
    calls = {part.name: part.calls for part in anatomy.parts(full_xl)}
    zeroed = len(full_xl.attributes.zeroed_branches)
    assert calls["text_encoder"] == calls["text_encoder_2"] == 2 - zeroed
    assert all(block.grid for block in anatomy.blocks(full_xl))
