"""Payloads hold the numbers of a recording, and the player's JavaScript reads what Python wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import take

import probe
from probe.errors import ExperimentError, RecordingNotFound
from probe.figures import channels as figures_channels
from probe.figures.bundle import latent_channel, payload
from probe.figures.channels import KINDS, channels, layers_and_heads, places
from probe.figures.page import asset, script
from probe.figures.payload import numbers, pack, unpack
from probe.reading.recording import Run

ROOT = Path(__file__).resolve().parent.parent
TEST = ROOT / "tests" / "player.test.mjs"
NODE = shutil.which("node")
OWN = {"payload": [], "drawing": ["./payload.js"], "player": ["./drawing.js", "./payload.js"]}
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


@pytest.mark.parametrize("levels", [256, 64])
def test_numbers_are_the_nearest_level_at_every_step(levels: int) -> None:
    values = np.random.default_rng(0).random((7, 3, 4, 5), np.float32)
    values[:, 1] *= 1e-4
    values[:, 2] = 1e-38  # 255 divided by it is more than a float32 holds
    part = numbers(values, apart=[1], levels=levels)
    found = unpack(pack({}, {"maps": part}))[1]["maps"]
    most = values.max(axis=(0, 2, 3))[:, None, None, None]
    off = abs(found - values.transpose(1, 2, 3, 0))
    assert (off <= most * (0.5 / (levels - 1) + 0.5 / 255))[:2].all() and not found[2].any()
    assert part[1]["scales"] == [3, 1, 1, 1]
    assert len(np.unique(found[0])) > levels / 3


def test_maps_read_in_pieces_are_those_read_at_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layers_and_heads(run, 1)
    monkeypatch.setattr(figures_channels, "READ_AT_ONCE", 100_000)
    assert layers_and_heads(run, 1) == whole


def filled(snippet: str, run: Run, **values: object) -> np.ndarray:
    """Return what a snippet gives, with its gaps filled as the player fills them."""
    for name, value in {"mean": "", "kind": "", **values}.items():
        snippet = snippet.replace(f"{{{name}}}", str(value))
    scope: dict[str, object] = {}
    exec(f"import probe\n\nrun = probe.open_run({str(run.path)!r})\ngot = {snippet}", scope)
    got: Any = scope["got"]
    assert got.dims == ("y", "x")
    return np.asarray(got.values)


def close(one: np.ndarray, two: np.ndarray) -> bool:
    return bool(abs(one - two).max() <= two.max() / 100)


def test_snippets_give_the_maps_that_are_shown(run: Run) -> None:
    head, parts = unpack(payload(run))
    snippets, maps = head["meta"]["snippets"], parts["maps"]
    assert close(maps[1, :, :, 7], filled(snippets["word"], run, step=7, word=1))
    assert close(maps[6, :, :, 7], filled(snippets["kind"], run, step=7, kind="rest"))
    span = {"step": "slice(3, 7)", "mean": ".mean('step')"}
    assert close(maps[2, :, :, 3:8].mean(-1), filled(snippets["word"], run, word=2, **span))


@pytest.mark.parametrize(
    ("of", "branch", "per"),
    [
        ("contribution", "cond", "words"),
        ("attention", "uncond", "tokens"),
        ("contribution", "cond", "tokens"),
    ],
)
def test_snippets_of_other_readings(of: Any, branch: str, per: Any, run: Run) -> None:
    head, parts = unpack(channels(run, of, branch, per))
    wanted = filled(head["meta"]["snippets"]["word"], run, step=4, word=1)
    assert close(parts["maps"][1, :, :, 4], wanted)


def test_snippets_of_a_head(run: Run) -> None:
    head, parts = unpack(layers_and_heads(run, 1))
    meta = head["meta"]
    layer = next(i for i, path in enumerate(meta["layers"]) if path.startswith("down"))
    here = {"step": 4, "layer": meta["layers"][layer], "head": 2}
    shown = parts["maps"][layer, 2, :, :, 4]
    wanted = filled(meta["snippets"]["word"], run, word=1, **here)
    assert wanted.shape == shown.shape and abs(shown - wanted).max() <= wanted.max() / 60
    filled(meta["snippets"]["kind"], run, kind="rest", **here)
    layer, head_, share = meta["ranking"][0]
    maps = run.word_maps(layers=meta["layers"][layer], over=()).isel(word=1, image=0, layer=0)
    assert share == pytest.approx(float(maps.isel(head=head_).mean()), rel=1e-3)
    assert len(meta["ranking"]) == 6


def test_tokens_are_channels_too(run: Run) -> None:
    head, parts = unpack(channels(run, per="tokens"))
    labels = [(one["label"], one["kind"]) for one in head["meta"]["channels"]]
    assert labels[0] == ("start", "start") and labels[-1] == ("padding", "padding")
    assert ("astronaut", "word") in labels and ("end", "end") in labels
    assert len(parts["maps"]) == run.attention().sizes["token"]
    heads, _ = unpack(layers_and_heads(run, labels.index(("astronaut", "word")), per="tokens"))
    words, _ = unpack(layers_and_heads(run, 1))
    assert heads["meta"]["shares"] == words["meta"]["shares"]
    with pytest.raises(RecordingNotFound, match="no channel 99"):
        layers_and_heads(run, 99, per="tokens")


def test_one_channel_of_the_latents(run: Run) -> None:
    head, _ = unpack(latent_channel(run, 2))
    values = run.latents.isel(channel=2, image=0).values
    assert f"{abs(values).max():.3g}" in head["meta"]["note"]
    assert head["parts"]["latents"]["shape"] == [20, 16, 16, 3]
    with pytest.raises(RecordingNotFound, match="no channel 4"):
        latent_channel(run, 4)


@pytest.fixture(scope="module")
def looking(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording of a tiny model with self-attention."""
    capture = {"self_attention": ["*"], "steps": "0,2"}
    return take(tmp_path_factory.mktemp("looking"), steps=3, capture=capture)


def test_where_places_look(looking: Run) -> None:
    group = max(looking.tree["self_attention"].children, key=lambda name: int(name.split("x")[0]))
    stored = looking.variable(f"self_attention/{group}/self").load()
    head, parts = unpack(places(looking, (1, 2), (0, 0)))
    meta = head["meta"]
    assert meta["map_steps"] == [0, 2] and meta["channels"][0]["label"] == "rows 1 to 2, column 0"
    wanted = stored.sel(branch="cond").isel(image=0, y=slice(1, 3), x=slice(0, 1), step=[0, 2])
    wanted = wanted.astype("float32").mean(["layer", "head", "y", "x"]).values
    assert abs(parts["maps"][0].transpose(2, 0, 1) - wanted).max() <= wanted.max() / 200
    snippet = meta["snippets"]["word"] + ".rename(key_y='y', key_x='x')"
    got = filled(snippet, looking, step=2)
    assert close(parts["maps"][0, :, :, 1], got)
    with pytest.raises(ExperimentError, match="rows 0 to 99 are not in the grid"):
        places(looking, (0, 99), (0, 0))
    with pytest.raises(RecordingNotFound, match="uncond"):
        places(looking, (0, 0), (0, 0), branch="uncond")


def test_without_self_attention_the_setting_is_named(run: Run) -> None:
    with pytest.raises(RecordingNotFound, match=r"capture\.self_attention"):
        places(run, (0, 0), (0, 0))


@pytest.mark.parametrize("name", ["payload", "drawing", "player"])
def test_the_player_is_small_and_asks_nobody(name: str) -> None:
    text = asset(f"{name}.js")
    assert len(text.splitlines()) <= 900
    assert re.findall(r'^import .* from "([^"]*)"', text, re.M) == sorted(set(OWN[name]))
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "http:", "https:"):
        assert word not in text, word
    assert "import " not in re.sub(r"^import .*$", "", text, flags=re.M)


@needs_node
def test_the_players_files_are_one_module(tmp_path: Path) -> None:
    (tmp_path / "one.mjs").write_text(script())
    done = subprocess.run([str(NODE), "--check", tmp_path / "one.mjs"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "\nimport " not in script() and "export function mount(" in script()
