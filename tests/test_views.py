"""The pages Guidance and Anatomy without a browser: every widget moved once, every empty state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import recording
from streamlit.testing.v1 import AppTest
from views import open_view

import probe
from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.figures import anatomy, guidance
from probe.testing.synthetic import synthetic_recording


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    runs.mkdir()
    synthetic_recording(runs / "pair.zarr", prompt="a red cat", images=2, guidance_scale=7.3)
    synthetic_recording(runs / "bare.zarr", prompt="a red cat", guidance_scale=1.0)
    synthetic_recording(runs / "half.zarr", prompt="a red cat", status="interrupted", steps=2)
    recording(runs / "little.zarr")
    return runs


@pytest.fixture(autouse=True)
def library(folder: Path) -> Iterator[Library]:
    library = Library(folder)
    configure(library)
    yield library
    libraries._library.clear()


def page(name: str, run: str, **query: Any) -> AppTest:
    return open_view(name, runs=run, **query)


def texts(app: AppTest) -> str:
    return "\n".join([*(text.value for text in app.text), *(info.value for info in app.info)])


def lines(app: AppTest, key: str) -> list[dict[str, Any]]:
    """Return the traces of the plotly figure whose key ends so."""
    for chart in app.get("plotly_chart"):
        if key in chart.proto.id:
            traces: list[dict[str, Any]] = json.loads(chart.proto.spec)["data"]
            return traces
    raise AssertionError(f"no figure {key}")


def drawn(app: AppTest) -> str:
    return "".join(element.proto.body for element in app.get("html"))


# --- guidance ------------------------------------------------------------------------------------


def test_guidance_opens_at_a_third_and_at_the_recorded_scale() -> None:
    app = page("guidance", "sample")
    assert app.slider("step").value == 6 and app.slider("scale_at").value == 3
    assert "step 6 (7th of 20), sigma 2.76" in texts(app) and guidance.NOTE in texts(app)
    assert "scale 3, as recorded" in drawn(app) and "scale 12" in drawn(app)
    run = probe.open_run("sample")
    shown = guidance.curves_of(run)
    for name in ("difference", "cosine", "cond"):
        trace = lines(app, f"curve_{name}")[0]
        assert np.allclose(trace["y"], shown[name].values) and trace["name"] == name
    assert [trace["name"] for trace in lines(app, "curve_cond")] == ["cond", "uncond", "guided"]
    assert len(app.dataframe[0].value) == 20


def test_every_widget_of_guidance_moves_what_is_shown() -> None:
    app = page("guidance", "pair")
    before = drawn(app)
    app.slider("step").set_value(0).run()
    assert "step 0 (1st of 4)" in texts(app) and drawn(app) != before
    before = drawn(app)
    app.slider("scale_at").set_value(12.5).run()
    assert "scale 12.5" in drawn(app) and drawn(app) != before
    assert any("guidance_scale=12.5, steps=0" in code.value for code in app.code)
    before = drawn(app)
    app.number_input("image").set_value(1).run()
    assert drawn(app) != before and any("image=1" in code.value for code in app.code)
    app.multiselect("runs").set_value(["sample"]).run()
    assert not app.exception and "of 20)" in texts(app)
    app.multiselect("runs").set_value(["half"]).run()
    assert not app.exception and "step 0 (1st of 2)" in texts(app)


@pytest.mark.parametrize("value", ["-1", "1e9", "NaN", "<img src=x>", "x" * 5000])
def test_hostile_addresses_fall_to_the_default(value: str) -> None:
    app = page("guidance", "sample", step=value, scale_at=value, image=value)
    assert app.slider("step").value == 6 and app.slider("scale_at").value == 3
    app = page("anatomy", "sample", block=value, branch=value, text_layer=value, text_head=value)
    assert app.selectbox("block").value == "mid_block" and app.selectbox("branch").value == "cond"


def test_an_address_restores_guidance() -> None:
    app = page("guidance", "sample", step="4", scale_at="8")
    assert app.slider("step").value == 4 and app.slider("scale_at").value == 8
    assert "step 4 (5th of 20)" in texts(app)


def test_without_both_branches_guidance_names_the_setting() -> None:
    app = page("guidance", "bare")
    assert "guidance_scale" in texts(app) and not app.slider
    assert "--guidance-scale 3" in app.code[0].value
    assert "latents/prediction_uncond" in texts(page("guidance", "little"))


# --- anatomy -------------------------------------------------------------------------------------


def test_anatomy_draws_the_run_and_says_its_numbers() -> None:
    app = page("anatomy", "sample")
    assert "48 times fewer" in texts(app) and "was the UNet's" in texts(app)
    assert "An astronaut scuba diving" in drawn(app) and "class='u'" in drawn(app)
    assert app.selectbox("block").value == "mid_block"
    values = anatomy.statistics(probe.open_run("sample"), "mid_block", "cond")
    assert np.allclose(lines(app, "mean")[1]["y"], values["mean"])
    assert np.allclose(lines(app, "extremes")[0]["y"], values["max"])
    assert len(lines(app, "vae")[0]["y"]) == 15
    assert lines(app, "text_map")[0]["type"] == "heatmap"


def test_every_widget_of_anatomy_moves_what_is_shown() -> None:
    app = page("anatomy", "sample")
    run = probe.open_run("sample")
    app.selectbox("block").set_value("down_blocks.1.resnets.0").run()
    values = anatomy.statistics(run, "down_blocks.1.resnets.0", "cond")
    assert np.allclose(lines(app, "mean")[1]["y"], values["mean"])
    assert "class='block chosen'" in drawn(app) and "Output of down_blocks.1.resnets.0" in drawn(
        app
    )
    app.selectbox("branch").set_value("uncond").run()
    values = anatomy.statistics(run, "down_blocks.1.resnets.0", "uncond")
    assert np.allclose(lines(app, "mean")[1]["y"], values["mean"])
    for key, value, layer, head in (
        ("text_layer", "layer 2", 2, None),
        ("text_head", "head 1", 2, 1),
    ):
        app.selectbox(key).set_value(value).run()
        attention, _ = anatomy.text_attention(run, "text_encoder", layer, head)
        (heat,) = lines(app, "text_map")
        assert heat["zmax"] == pytest.approx(float(attention.max()))
    assert any("isel(text_head=1)" in code.value for code in app.code) and not app.exception
    app.multiselect("runs").set_value(["pair"]).run()
    app.number_input("image").set_value(1).run()
    assert any("image=1" in code.value for code in app.code) and not app.exception


def press(app: AppTest, *picked: str) -> None:
    """Press a button of the drawing, as the browser tells it."""
    app.session_state["picks"] = {"picked": list(picked)}
    app.run()
    assert not app.exception


def test_a_press_in_the_drawing_shows_that_block_or_layer() -> None:
    app = page("anatomy", "sample")
    run = probe.open_run("sample")
    press(app, "block", "up_blocks.1")
    assert app.selectbox("block").value == "up_blocks.1"
    values = anatomy.statistics(run, "up_blocks.1", "cond")
    assert np.allclose(lines(app, "mean")[1]["y"], values["mean"])
    assert "Output of up_blocks.1, cond" in drawn(app)
    press(app, "layer", "text_encoder 2")
    attention, _ = anatomy.text_attention(run, "text_encoder", 2, None)
    assert app.selectbox("text_layer").value == "layer 2" and "layer 2, mean" in drawn(app)
    assert lines(app, "text_map")[0]["zmax"] == pytest.approx(float(attention.max()))
    assert app.selectbox("block").value == "up_blocks.1", "the other choice stays"
    app.selectbox("block").set_value("mid_block").run()
    assert app.selectbox("block").value == "mid_block", "a press counts once"


def test_a_press_on_what_is_not_there_changes_nothing() -> None:
    app = page("anatomy", "sample")
    before = drawn(app)
    for picked in (
        ("block", "<img src=x>"),
        ("layer", "text_encoder 99"),
        ("layer", "text_encoder -1"),
        ("layer", "nobody 0"),
        ("layer", "text_encoder 1 1"),
        ("shell", "ls"),
        ("block",),
    ):
        press(app, *picked)
        assert drawn(app) == before, picked


@pytest.mark.parametrize("name", ["anatomy", "guidance", "trajectories", "replay", "compare"])
def test_a_noising_that_a_link_brought_is_said_to_belong_elsewhere(name: str) -> None:
    said = texts(page(name, "sample-noising"))
    assert "A noising, so not shown here: sample-noising." in said
    of_its_own = texts(page(name, "sample"))
    assert "not shown here" not in of_its_own
    assert ("Noisings are not offered here" in of_its_own) == (name == "anatomy")


def test_a_run_on_the_page_of_noisings_is_said_to_belong_elsewhere() -> None:
    assert "No noising, so not shown here: sample." in texts(page("learn", "sample"))
    assert "not shown here" not in texts(page("learn", "sample-noising"))


def test_anatomy_of_little_says_which_settings_record_the_rest() -> None:
    said = texts(page("anatomy", "little"))
    assert "capture.statistics" in said and "capture.text" in said
    half = texts(page("anatomy", "half"))
    assert "after the last step" in half and "Time:" not in half


@pytest.mark.parametrize("name", ["guidance", "anatomy"])
def test_a_recording_damaged_since_it_was_listed_says_why(name: str, folder: Path) -> None:
    app = page(name, "pair")
    (folder / "pair.zarr" / "zarr.json").write_text("{")
    app.run()
    assert not app.exception and "damaged" in "".join(code.value for code in app.code)


def test_both_pages_stand_in_the_bar() -> None:
    app = AppTest.from_file(
        libraries.__file__.replace("library.py", "pages.py"), default_timeout=60
    )
    app.run()
    pages = app.session_state["pages"]
    assert {"guidance", "anatomy"} <= set(pages)
