"""The page Trajectories without a browser: what it computes, shows, and offers as snippets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from views import open_view

from probe import embed
from probe.dashboard import library as libraries
from probe.dashboard.library import Library, configure
from probe.dashboard.views import trajectories as view
from probe.reading.embedding import embeddings_in
from probe.testing.synthetic import synthetic_recording

PAGES = Path(libraries.__file__).with_name("pages.py")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    from probe.dashboard.views import pick

    runs = tmp_path / "runs"
    for seed in (1, 2):
        synthetic_recording(runs / f"cat-{seed}.zarr", steps=7, seed=seed)
    synthetic_recording(runs / "short.zarr", steps=2)
    configure(Library(runs))
    for cache in (pick.rows, view.computed, view.opened):
        cache.clear()  # type: ignore[attr-defined]
    yield runs
    libraries._library.clear()


def page(**query: Any) -> AppTest:
    return open_view("trajectories", **query)


def texts(app: AppTest) -> str:
    return "\n".join(text.value for text in app.text)


def charts(app: AppTest) -> list[Any]:
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def test_it_computes_components_and_teaches_how_to_store_maps(folder: Path) -> None:
    app = page(runs=["cat-1", "cat-2"])
    assert app.multiselect("runs").value == ["cat-1", "cat-2"]
    figure, bars = charts(app)
    names = [trace["name"] for trace in figure["data"] if trace["mode"] == "lines+markers"]
    assert (
        names == ["cat-1", "cat-2"]
        and "% of the variance" in figure["layout"]["xaxis"]["title"]["text"]
    )
    assert len(bars["data"]) == 2
    assert "10 random walks" in texts(app) and "step 2 (3rd of 7)" in texts(app)
    assert app.info[0].value.startswith("UMAP takes a minute")
    assert app.code[-1].value == f"probe embed cat-1 cat-2 --runs {folder}"
    app.radio("of").set_value("denoised").run()
    assert app.code[-1].value == f"probe embed cat-1 cat-2 --of denoised --runs {folder}"
    assert "clean latents that the model expected" in texts(app) and not app.exception


def test_a_legend_has_the_names_that_people_know(folder: Path, tmp_path: Path) -> None:
    """The sample is no sample-b3112ab7; only where two names are equal one gets a number."""
    same = synthetic_recording(tmp_path / "elsewhere" / "cat-1.zarr", steps=7, seed=3)
    library = Library(folder, [str(same)])
    configure(library)
    app = page(runs=["sample", "sample-guidance-8"])
    legend = [trace["name"] for trace in charts(app)[0]["data"] if trace.get("showlegend", True)]
    assert legend == ["sample", "sample-guidance-8"]
    keys = [library.add(path) for path in (same, folder / "cat-1.zarr")]
    legend = [
        trace["name"]
        for trace in charts(page(runs=keys))[0]["data"]
        if trace.get("showlegend", True)
    ]
    assert keys[1] != "cat-1" and legend == ["cat-1", "cat-1 (2)"]


def test_it_is_among_the_pages(folder: Path) -> None:
    app = AppTest.from_file(str(PAGES), default_timeout=60).run()
    assert not app.exception
    assert "trajectories" in app.session_state["pages"]


def test_the_page_imports_neither_torch_nor_umap() -> None:
    code = (
        "import sys; from probe.dashboard.views import trajectories;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'umap', 'sklearn', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_step_and_the_walk_change_what_is_drawn(folder: Path) -> None:
    app = page(runs="cat-1")
    before = charts(app)[0]["data"]
    app.slider("step").set_value(5).run()
    after = charts(app)[0]["data"]
    assert before[0]["x"] == after[0]["x"] and before[3]["x"] != after[3]["x"]
    assert "step 5 (6th of 7)" in texts(app)
    app.toggle("walk").set_value(True).run()
    assert charts(app)[0]["data"][0]["x"] != after[0]["x"]
    assert app.subheader[0].value == "Random walks" and not app.exception


def test_runs_that_have_no_path_say_why(folder: Path) -> None:
    app = page(runs="short")
    assert "a path has 3 or more" in app.code[0].value and not charts(app)
    app.multiselect("runs").set_value(["cat-1"]).run()
    assert len(charts(app)) == 2 and not app.exception


def test_stored_maps_are_shown_with_what_they_keep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probe.embed.importlib.util.find_spec", lambda _: "there")
    monkeypatch.setattr("probe.analysis.trajectories.umap_library", lambda: None)
    for name in ("umap_map", "aligned_map"):
        monkeypatch.setattr(
            f"probe.analysis.trajectories.{name}",
            lambda points, *_: points[:, :2].rename(feature="axis"),
        )
    assert embed.main(["cat-1", "cat-2", "--runs", str(folder), "--quiet"]) == 0
    assert embed.main(["cat-1", "--runs", str(folder), "--method", "pca", "--quiet"]) == 0
    app = page(runs="cat-1", step="3")
    assert len(charts(app)) == 3, "the newest: components alone"
    options = app.selectbox("embedding").options
    app.selectbox("embedding").set_value(options[1]).run()
    assert len(charts(app)) == 2 + 1 + 3 + 3 and not app.exception
    for said in ("Do not read off distances", "Seed 2: ", "for they were pulled", "by chance"):
        assert said in texts(app)
    flat = charts(app)[3]
    assert flat["layout"]["xaxis"]["showticklabels"] is False
    assert [trace["name"] for trace in flat["data"] if trace["mode"] == "lines+markers"] == [
        "cat-1",
        "cat-2",
    ]
    assert len(numbers(flat["data"][3]["x"])) == 1, "the step is marked on stored maps too"
    assert len(app.get("download_button")) == 2


def test_changed_runs_and_damaged_embeddings_are_said(folder: Path) -> None:
    assert embed.main(["cat-1", "--runs", str(folder), "--method", "pca", "--quiet"]) == 0
    with (folder / "cat-1.zarr" / "digests.txt").open("a") as file:
        file.write("one more\n")
    app = page(runs="cat-1")
    assert "have changed" in app.warning[0].value
    assert "cat-1" in [code.value for code in app.code]
    (embeddings_in(folder)[0] / "zarr.json").write_text("{")
    app.run()
    assert any("is not JSON that can be read" in code.value for code in app.code)
    assert len(charts(app)) == 2 and not app.exception


def test_the_snippets_yield_what_is_shown(folder: Path) -> None:
    assert embed.main(["cat-1", "cat-2", "--runs", str(folder), "--method", "pca", "--quiet"]) == 0
    app = page(runs=["cat-1", "cat-2"])
    live, stored = (code.value for code in app.code if "import" in code.value)
    names: dict[str, Any] = {}
    exec(live, names)
    line = charts(app)[0]["data"][0]
    np.testing.assert_allclose(names["parts"]["position"][:7, 0], numbers(line["x"]), rtol=1e-5)
    np.testing.assert_allclose(names["parts"]["explained"], numbers(charts(app)[1]["data"][0]["y"]))
    exec(stored, names)
    np.testing.assert_array_equal(names["maps"][0], names["parts"]["position"][:, :2])
    assert "sample" in view.snippet(view._names(["sample"]), str(folder), "latents")


def numbers(shown: Any) -> np.ndarray:
    """Return what plotly was given, from the form in which it is sent."""
    if isinstance(shown, dict):
        import base64

        return np.frombuffer(base64.b64decode(shown["bdata"]), shown["dtype"])
    return np.array(shown)


def test_shares_are_judged_against_the_walks() -> None:
    walks = np.array([[0.6, 0.1, 0.1], [0.6, 0.2, 0.1]])
    said = [view.reading_of(np.array([first, 0.0, 0.1]), walks) for first in (0.9, 0.75, 0.5)]
    assert "More than any walk" in said[0] and "No more and no less" in said[1]
    assert "Less than any walk" in said[2] and "70.0% to 80.0%" in said[2]
