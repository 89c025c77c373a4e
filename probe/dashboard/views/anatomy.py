"""Anatomy: the parts of Stable Diffusion, drawn with the numbers of one run."""

from __future__ import annotations

from importlib import resources
from typing import Any

import streamlit as st

from probe.dashboard.library import library
from probe.dashboard.views.pick import pick
from probe.dashboard.views.replay import RECORD
from probe.errors import ProbeError
from probe.figures import anatomy as figures
from probe.figures.anatomy_page import Shown, drawing, sentences
from probe.figures.plots import CONFIG, curves, profile, square_map
from probe.reading.recording import Run

LESSON = (
    "Stable Diffusion has three parts: the first reads the prompt, the second makes latents in "
    "many steps, the third paints the picture from them, once, at the end. "
    "These are the parts with the numbers of this run. Press a block of the UNet for what it gives "
    "over the steps, or a layer of the text encoder for its attention."
)
NOISINGS = (
    "Noisings are not offered here: their noise levels are tried one by one, no scheduler takes "
    "part, and no picture is painted. The page How diffusion works shows them."
)
CAUSAL = (
    "Each row adds up to 1, padding left out. Right of the diagonal all is 0: a token sees itself "
    "and what stands before it, so the last ones know of the whole prompt."
)
MEAN = "mean of all heads"
_component = st.components.v2.component(
    "probe_picks", js=resources.files("probe.dashboard").joinpath("picks.js").read_text("utf-8")
)


def show() -> None:
    st.text(LESSON)
    (key,) = pick(most=1, record=RECORD)
    try:
        run = library().run(key)
        body(run, key)
    except ProbeError as error:
        st.code(str(error), language=None)
    st.text(NOISINGS)


def body(run: Run, key: str) -> None:
    place = st.container()
    pressed(run)
    st.text("\n".join(sentences(run)))
    module, branch, image = _block(run)
    _vae(run, image)
    text = _text(run)
    place.html(drawing(run, Shown(module, branch, image, text)))
    with st.expander("The numbers, and the Python that yields them", key="python"):
        if module and len(run.steps):
            table = figures.csv_of(run, module, branch, image)
            st.download_button(
                "Statistics as CSV", table, f"{key}-block.csv", "text/csv", key="csv"
            )
        for code in figures.snippets(run, module, branch, image, text).values():
            st.code(code, language=None)


def pressed(run: Run) -> None:
    """Choose in the boxes below what was pressed in the drawing, if this run has it."""
    told: Any = _component(key="picks", height=1, on_picked_change=lambda: None).picked
    match told:
        case ["block", str(module)] if module in _modules(run):
            st.session_state["block"] = module
        case ["layer", str(words)]:
            encoder, _, number = words.partition(" ")
            if encoder in _encoders(run) and number in map(str, range(_layers(run, encoder))):
                st.session_state["text_layer"] = f"layer {number}"
                if len(_encoders(run)) > 1:
                    st.session_state["encoder"] = encoder


def _modules(run: Run) -> list[str]:
    if not figures.holds(run, "unet/statistics"):
        return []
    return [str(name) for name in run.tree["unet"].dataset["module"].values]


def _encoders(run: Run) -> list[str]:
    return [name for name in figures.encoders(run) if figures.tokens(run, name)]


def _layers(run: Run, encoder: str) -> int:
    return int(run.variable(f"text/{encoder}/attention").sizes["text_layer"])


def _block(run: Run) -> tuple[str, str, int]:
    """Show one block of the UNet over the steps, and return which, of which branch and image."""
    st.subheader("Inside the UNet")
    if not figures.holds(run, "unet/statistics"):
        st.info("The outputs of its blocks were not recorded. The setting is capture.statistics:")
        st.code(f"{RECORD} --capture.statistics true", language=None)
        return "", "", 0
    unet = run.tree["unet"].dataset
    modules, branches = _modules(run), [str(name) for name in unet["branch"].values]
    left, middle, right = st.columns([3, 1, 1])
    modules.sort(key=lambda module: module != "mid_block")  # what a press sets has no other default
    module = left.selectbox("Block", modules, key="block", bind="query-params")
    branch = middle.selectbox(
        "Branch", branches, len(branches) - 1, key="branch", bind="query-params"
    )
    image, last = 0, unet.sizes["image"] - 1
    if last:
        image = int(right.number_input("Image", 0, last, key="image", bind="query-params"))
    if not len(run.steps):
        st.info("No step of this run is written yet.")
        return module, branch, image
    steps, calls = run.steps.tolist(), run.variable("committed").size
    values = figures.statistics(run, module, branch, image)
    over, ends = st.columns(2)
    over.plotly_chart(
        curves(
            steps,
            {"mean": values["mean"]},
            "Its output: mean and spread",
            "output",
            None,
            calls,
            values["std"],
        ),
        key="mean",
        config=CONFIG,
    )
    extremes = {"greatest": values["max"], "least": values["min"]}
    ends.plotly_chart(
        curves(steps, extremes, "Its greatest and least value", "output", None, calls),
        key="extremes",
        config=CONFIG,
    )
    return module, branch, image


def _vae(run: Run, image: int) -> None:
    if run.attributes.model.on_pixels:
        st.text("This model works on pixels: it has no VAE, so there is no inside of one.")
        return
    st.subheader("Inside the VAE decoder")
    if not figures.holds(run, "vae/statistics"):
        st.info("The outputs of its blocks were not recorded. The setting is capture.statistics.")
        return
    if run.status != "complete":
        st.info("The VAE paints after the last step, and then its blocks are measured.")
        return
    statistics = run.variable("vae/statistics").isel(image=image).load()
    names = [str(name).removeprefix("decoder.") for name in statistics["module"].values]
    mean, std = (statistics.sel(statistic=name).values for name in ("mean", "std"))
    title = "Output of each block, as it painted:<br>mean and standard deviation"
    st.plotly_chart(profile(names, mean, std, title, "output"), key="vae", config=CONFIG)


def _text(run: Run) -> tuple[str, int, int | None] | None:
    """Show one layer of a text encoder, and return which encoder, layer and head."""
    st.subheader("Inside the text encoder")
    there = _encoders(run)
    if not there:
        st.info("What the text encoder did was not recorded. The setting is capture.text:")
        st.code(f"{RECORD} --capture.text true", language=None)
        return None
    left, middle, right = st.columns([1, 1, 1])
    encoder = there[0]
    if len(there) > 1:
        encoder = right.selectbox("Text encoder", there, key="encoder", bind="query-params")
    sizes = run.variable(f"text/{encoder}/attention").sizes
    layers = [f"layer {number}" for number in range(_layers(run, encoder))]
    heads = [MEAN, *(f"head {number}" for number in range(sizes["text_head"]))]
    layer = left.selectbox("Layer", layers, key="text_layer", bind="query-params")
    head = middle.selectbox("Head", heads, key="text_head", bind="query-params")
    number = None if head == MEAN else heads.index(head) - 1
    values, texts = figures.text_attention(run, encoder, layers.index(layer), number)
    labels = [f"{place} {text}" for place, text in enumerate(texts)]
    title = "How much a token (row) attends to itself<br>and to those before it (column)"
    chart = square_map(values, labels, labels, title, "share of the row's attention")
    shown, words = st.columns([2, 1])
    shown.plotly_chart(chart, key="text_map", config=CONFIG)
    words.text(CAUSAL)
    return encoder, layers.index(layer), number
