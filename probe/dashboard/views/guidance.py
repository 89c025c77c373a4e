"""Guidance: what the prompt changes at each step, and what the step would say at other scales."""

from __future__ import annotations

import streamlit as st

from probe.dashboard.library import library
from probe.dashboard.views.pick import pick
from probe.dashboard.views.replay import RECORD
from probe.errors import ProbeError
from probe.figures import guidance as figures
from probe.figures.plots import CONFIG, curves, step_text
from probe.reading.recording import Run

LESSON = (
    "At every step the model predicts twice: with the prompt (cond) and without it (uncond). "
    "Guidance goes from the second through the first and beyond: "
    "uncond + scale x (cond - uncond). Both were recorded, so every scale can be tried here."
)
CURVES = {
    "What the prompt changes: |cond - uncond|": (["difference"], "root mean square"),
    "Do cond and uncond agree? 1: same direction": (["cosine"], "cosine of cond and uncond"),
    "Size of the predictions": (["cond", "uncond", "guided"], "root mean square"),
}


def show() -> None:
    st.text(LESSON)
    (key,) = pick(most=1, record=RECORD)
    try:
        run = library().run(key)
        if absent := figures.missing(run):
            st.info(absent.cause)
            st.code(absent.remedy, language=None)
            return
        explore(run, key)
    except ProbeError as error:
        st.code(str(error), language=None)


@st.fragment
def explore(run: Run, key: str) -> None:
    steps, calls = run.steps.tolist(), run.variable("committed").size
    recorded = float(run.recipe.guidance[0])
    left, right, other = st.columns([3, 3, 1])
    step = steps[0]
    if len(steps) > 1:
        middle = steps[len(steps) // 3]
        step = left.slider("Step", steps[0], steps[-1], middle, key="step", bind="query-params")
        step = min(steps, key=lambda there: abs(there - step))
    scale = right.slider(
        "Guidance scale",
        0.0,
        figures.MOST,
        min(recorded, figures.MOST),
        0.1,
        key="scale_at",
        bind="query-params",
    )
    image = 0
    if last := run.latents.sizes["image"] - 1:
        image = int(other.number_input("Image", 0, last, key="image", bind="query-params"))
    sigma = float(run.variable("sigma").values[step])
    rescale = run.recipe.guidance[1]
    also = f" Rescaled by {rescale:g}, as recorded." if rescale else ""
    st.text(f"{step_text(step, calls)}, sigma {sigma:.3g}. {figures.NOTE}{also}")
    _pictures(run, key, step, scale, image)
    values = figures.curves_of(run, image)
    for column, (title, (names, unit)) in zip(st.columns(3), CURVES.items(), strict=True):
        lines = {name: values[name].values for name in names}
        figure = curves(steps, lines, title, unit, step, calls)
        column.plotly_chart(figure, key=f"curve_{names[0]}", config=CONFIG)
    with st.expander("The numbers, and the Python that yields them", key="numbers"):
        st.download_button(
            "Curves as CSV", figures.csv_of(values), f"{key}-guidance.csv", "text/csv", key="csv"
        )
        st.dataframe(figures.table(values), key="table", hide_index=True)
        for name, code in figures.snippets(run, step, scale, image).items():
            st.text({"curves": "The curves:", "picture": "The large picture:"}[name])
            st.code(code, language=None)


def _pictures(run: Run, key: str, step: int, scale: float, image: int) -> None:
    if not figures.has_preview(run):
        st.info("Its model came without a preview of latents, so they cannot be shown as colour.")
        return
    if step in run.undefined_steps:
        st.info("At this step there is no signal: predicted noise says nothing of the picture.")
        return
    of = "pixel" if run.attributes.model.on_pixels else "latent"
    recorded, strip = float(run.recipe.guidance[0]), figures.scales_of(run)
    pictures = figures.estimates(run, step, [scale, *strip], image)
    large, small = st.columns([1, 3.2])
    large.html(figures.strip(pictures[:1], [scale], recorded, figures.LARGE, of))
    large.download_button(
        "Picture as PNG", figures.png(pictures[0]), f"{key}-step-{step}.png", "image/png", key="png"
    )
    small.html(figures.strip(pictures[1:], strip, recorded, of=of))
