"""Payloads hold the numbers of a recording, and the player reads in JavaScript what Python
wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import probe
from probe.errors import ExperimentError, RecordingNotFound
from probe.figures.bundle import KINDS, channels, layers_and_heads, numbers, pack, payload, unpack
from probe.reading.recording import Run

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "player.test.mjs"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs node: apt install nodejs")


@pytest.fixture(scope="module")
def run() -> Run:
    return probe.open_run("sample")


def node(**environment: str) -> str:
    assert NODE is not None
    done = subprocess.run(
        [NODE, "--test", str(TEST)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_node
@pytest.mark.parametrize("what", ["run", "heads"])
def test_the_player_reads_the_numbers_that_python_wrote(
    what: str, run: Run, tmp_path: Path
) -> None:
    if what == "run":
        content = pack(*_numbers_alone(payload(run)))
    else:
        content = layers_and_heads(run, 1)
    head, found = unpack(content)
    maps = found["maps"]
    picked = (
        [(0, 0, 0), (19, 1, 0), (7, 2, 3)]
        if what == "heads"
        else [(0, 0, 0), (19, 6, 0), (7, 1, 0)]
    )
    rows = []
    for step, first, second in picked:
        one = maps[first, second, :, :, step] if what == "heads" else maps[first, :, :, step]
        rows.append(
            {
                "step": step,
                "first": first,
                "second": second,
                "shape": one.shape,
                "values": one.ravel().tolist(),
            }
        )
    (tmp_path / "payload").write_bytes(content)
    (tmp_path / "expected").write_text(json.dumps({"meta": head["meta"], "maps": rows}))
    told = node(PAYLOAD=str(tmp_path / "payload"), EXPECTED=str(tmp_path / "expected"))
    assert "# fail 0" in told and "# skipped 0" in told


def _numbers_alone(
    content: bytes,
) -> tuple[dict[str, object], dict[str, tuple[bytes, dict[str, object]]]]:
    """Return a payload without pictures, which only a browser opens."""
    head, _ = unpack(content)
    start = 8 + int.from_bytes(content[4:8], "little")
    parts = {}
    for name, about in head["parts"].items():
        if about["kind"] == "numbers":
            raw = content[start + about.pop("at") :][: about.pop("size")]
            parts[name] = (raw, about)
    return head["meta"], parts


def test_a_payload_holds_the_overview_by_word_and_kind(run: Run) -> None:
    head, found = unpack(payload(run))
    meta = head["meta"]
    labels = [(one["label"], one["kind"]) for one in meta["channels"]]
    assert labels == [(word, "word") for word in ("An", "astronaut", "scuba", "diving")] + [
        (kind, kind) for kind in ("start", "end", "padding")
    ]
    words = run.word_maps().mean("image").transpose("word", "y", "x", "step").values
    step = words.max(axis=(1, 2, 3), keepdims=True) / 255
    assert (
        abs(found["maps"][:4] - words) <= step * 0.51 + 2e-3 * words.max()
    ).all()  # the overview is a float16 mean
    mass = run.mass().mean("image")
    for kind, parts in KINDS.items():
        np.testing.assert_allclose(
            meta["shares"][kind], mass.sel(kind=list(parts)).sum("kind"), atol=2e-3
        )
    assert meta["steps"] == list(range(20)) and meta["calls"] == 20 and meta["missing"] == {}
    np.testing.assert_allclose(meta["sigma"], run.variable("sigma").values, rtol=1e-5)


def test_one_word_in_every_layer_and_head(run: Run) -> None:
    head, found = unpack(layers_and_heads(run, 1))
    layers = head["meta"]["layers"]
    assert [path[:4] for path in layers] == ["down"] * 2 + ["mid_"] + ["up_b"] * 4
    wanted = run.word_maps(layers="16x16", over=()).isel(word=1, image=0)
    for layer in wanted["layer"].values:
        maps = wanted.sel(layer=layer).transpose("head", "y", "x", "step").values
        got = found["maps"][layers.index(str(layer))]
        assert (abs(got - maps) <= maps.max(axis=(1, 2, 3), keepdims=True) / 95 + 1e-6).all()


@pytest.mark.parametrize(("of", "branch"), [("attention", "uncond"), ("contribution", "cond")])
def test_other_readings(of: str, branch: str, run: Run) -> None:
    head, found = unpack(channels(run, of, branch))
    words = run.word_maps(of=of, branch=branch).isel(image=0)
    count = words.sizes["word"]
    wanted = words.transpose("word", "y", "x", "step").values
    assert [one["kind"] for one in head["meta"]["channels"][count:]] == ["start", "end", "padding"]
    assert (abs(found["maps"][:count] - wanted) <= wanted.max(initial=0) / 250).all()


def test_what_is_not_there_is_refused_by_name(run: Run) -> None:
    with pytest.raises(RecordingNotFound, match="no channel 7"):
        layers_and_heads(run, 7)
    with pytest.raises(RecordingNotFound, match="no image 1"):
        payload(run, image=1)
    with pytest.raises(RecordingNotFound, match="counterfactual"):
        channels(run, "counterfactual")
    with pytest.raises(ExperimentError):
        channels(run, "looking")


def test_numbers_keep_what_is_not_finite_out() -> None:
    content, about = numbers(np.array([[[np.nan, np.inf, -1, 0.5]]], np.float32))
    _, found = unpack(pack({}, {"maps": (content, about)}))
    np.testing.assert_array_equal(found["maps"].ravel(), [0, 0, 0, 0.5])
    with pytest.raises(ValueError, match="JSON"):
        pack({"sigma": float("nan")}, {})


def test_snippets_give_the_arrays_that_are_shown(run: Run) -> None:
    head, found = unpack(payload(run))
    snippets = head["meta"]["snippets"]
    for name, values in (
        ("attention", {"step": "7", "word": "1", "kind": ""}),
        ("kind", {"step": "7", "word": "6", "kind": "rest"}),
    ):
        code = snippets[name]
        for key, value in values.items():
            code = code.replace("{" + key + "}", value)
        *before, last = code.strip().split("\n")
        scope: dict[str, object] = {}
        exec("\n".join(before), scope)
        got = eval(last, scope)
        shown = found["maps"][int(values["word"]), :, :, 7]
        assert got.dims == ("y", "x") and abs(got.values - shown).max() <= shown.max() / 100


def test_the_player_is_one_small_module() -> None:
    text = (ROOT / "probe" / "figures" / "player.js").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 900
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "eval(",
        "http:",
        "https:",
        "import ",
    ):
        assert word not in text, word
