"""Record: ask a bundled model for a picture, and watch it being drawn."""

from __future__ import annotations

from typing import Literal

import streamlit as st

from probe.dashboard.player import player
from probe.dashboard.recorder import (
    Recorder,
    allowed,
    as_yaml,
    bounds,
    command,
    missing,
    unknown,
    vocabulary,
)
from probe.errors import ExperimentError, RecordingBusy
from probe.settings.bundled import models_there
from probe.settings.experiment import Experiment, load_experiment
from probe.settings.fields import SCHEDULERS

EXAMPLE = 'python -m probe.run --prompt "An astronaut scuba diving" --seed 5 --steps 30'
PROMPT, SEED, GUIDANCE, STEPS = "An astronaut scuba diving", 5, 3.0, 30  # what the form begins with
MODELS = "The two small ones are one UNet, trained on pixels and on latents, at 64 pixels."
JAVASCRIPT = 2**53 - 1  # the greatest whole number of a browser


def show() -> None:
    recorder = allowed()
    if recorder is None:
        st.info("To record on this page, start the dashboard with:")
        st.code("probe view --allow-record", language=None)
        st.text("The same from a shell, for any model and every setting:")
        st.code(EXAMPLE, language=None)
        return
    if lacking := missing():
        st.info(f"Recording needs {lacking}, which is not installed. This installs it:")
        st.code("pip install 'diffusion-probe[record]'", language=None)
        return
    form, same = st.columns([3, 2], gap="large")
    with form:
        asked, wrong = _fields()
        _progress(recorder, asked, wrong)
    with same:
        st.text("The words that the bundled model knows:")
        st.code(" ".join(vocabulary(_model())), language=None, wrap_lines=True)
        if asked is not None:
            st.text("The same from a shell, and as a file for python -m probe.run FILE:")
            st.code(command(asked, recorder.folder), language=None, wrap_lines=True)
            st.code(as_yaml(asked), language=None, wrap_lines=True)
    job = recorder.job()
    if job is not None and job.run:
        player([job.run], key="recorded")


def _fields() -> tuple[Experiment | None, str]:
    bind: Literal["query-params"] = "query-params"
    prompt = st.text_area("Prompt", PROMPT, key="prompt", height=80, bind=bind)
    there = models_there()
    if len(there) > 1:
        st.selectbox("Model", there, key="model", bind=bind, help=MODELS)
    label = "Negative prompt: what to steer away from"
    negative = st.text_input(label, key="negative", bind=bind)
    one, two, three, four = st.columns(4)
    least, most = bounds("seed")
    most = min(most, JAVASCRIPT)
    seed = one.number_input("Seed", int(least), int(most), SEED, key="seed", bind=bind)
    least, most = map(float, bounds("guidance_scale"))
    label = "Guidance scale"
    guidance = two.number_input(label, least, most, GUIDANCE, 0.5, key="guidance", bind=bind)
    least, most = bounds("steps")
    steps = three.number_input("Steps", int(least), int(most), STEPS, key="steps", bind=bind)
    names = ["default", *SCHEDULERS]
    scheduler = four.selectbox("Scheduler", names, key="scheduler", bind=bind)
    given = {
        "prompt": prompt,
        "model": _model(),
        "negative_prompt": negative,
        "seed": int(seed),
        "guidance_scale": round(float(guidance), 3),
        "steps": int(steps),
        "scheduler": scheduler,
    }
    try:
        asked = load_experiment(given)
    except ExperimentError as error:
        return None, str(error)
    if strange := unknown(f"{prompt} {negative}", _model()):
        return None, f"The bundled model never saw {', '.join(map(repr, strange))}."
    return asked, ""


def _model() -> str:
    """Return the bundled model that was chosen, if there is a choice."""
    return str(st.session_state.get("model", "emojiworld"))


@st.fragment(run_every=1.0)
def _waiting(recorder: Recorder, shown: tuple[str, str]) -> None:
    """Show that it goes on, and a button that stops it; run the page again when that changes."""
    job = recorder.job()
    assert job is not None
    if (job.state, job.run) != shown:
        st.rerun()
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Stop", key="stop"):
            recorder.stop()
        what = "Recording" if job.run else "Loading the model"
        st.text(f"{what}: {job.seconds:.0f} s")


def _progress(recorder: Recorder, asked: Experiment | None, wrong: str) -> None:
    """Show the button that begins, and what became of the last recording."""
    job = recorder.job()
    busy = job is not None and not job.ended
    if wrong:
        st.code(wrong, language=None, wrap_lines=True)
    if not busy and st.button("Record", key="begin", type="primary", disabled=asked is None):
        assert asked is not None
        try:
            recorder.begin(asked)
        except (RecordingBusy, OSError) as error:  # another page was faster
            st.code(str(error), language=None)
            return
        st.rerun()
    if job is None:
        return
    if busy:
        _waiting(recorder, (job.state, job.run))
    elif job.state == "failed":
        st.text("It ended with an error:")
        st.code("\n".join(job.said[-12:]) or "It said nothing.", language=None, wrap_lines=True)
    elif job.state == "stopped":
        st.text("Stopped." if job.run else "Stopped before the recording began.")
    elif job.state == "done":
        st.text(f"Recorded {job.run} in {job.seconds:.0f} s.")
        if st.button("Look at it alone", key="alone"):
            st.switch_page(st.session_state["pages"]["replay"], query_params={"runs": [job.run]})
