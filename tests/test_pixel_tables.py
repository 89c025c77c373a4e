"""The tables of pixels against latents that ship: what they hold, and that they are still true."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import probe
from probe.analysis.fits import fit_law
from probe.errors import RecordingNotFound, UserError
from probe.reading import pixels
from probe.reading.pixels import FOLDER, KINDS, WHY_THEY_DIFFER, counts, paper, shares_of, trained
from probe.testing.synthetic import synthetic_recording


def test_counts_of_sd_1() -> None:
    latents = counts().of("sd14", "denoiser", 8, 512)
    assert latents.parameters == 859_520_964 and round(latents.total / 1e9, 1) == 803.3
    assert round(counts().of("sd14", "vae_decode", 8, 512).total / 1e9, 1) == 2514.5
    assert round(counts().of("sd14", "vae_encode", 8, 512).total / 1e9, 1) == 1116.7
    assert counts().of("sd14", "text_encoder").parameters == 123_060_480
    assert latents.largest_attention_bytes == 8 * 4096 * 4096 * counts().bytes_per_number
    assert latents.widest == (64, 64) and latents.shape == (4, 64, 64)
    assert math.isclose(sum(latents.shares.values()), 1) and tuple(latents.shares) == KINDS


def test_679_never_stands_alone() -> None:
    of = counts().factors("sd14", 8, 512)
    assert [round(value) for value in of[:3]] == [679, 34, 64]
    assert [round(value, 1) for value in of.paper] == [2.7, 4.9]
    assert "f = 4" in WHY_THEY_DIFFER and WHY_THEY_DIFFER.count(". ") == 0, "one sentence"


def test_the_paper_agrees_with_itself() -> None:
    for row in paper().rows:
        if row.pixels is not None and row.latents is not None:
            high, low = max(row.pixels, row.latents), min(row.pixels, row.latents)
            assert row.times == round(high / low, 2), row.name
            assert (row.latents > row.pixels) == (row.better == "higher"), row.name
    assert [row.gap for row in paper().rows if row.f == 8] == [38.0]
    assert "2112.10752" in paper().source


def test_every_model_has_every_part_at_every_size() -> None:
    table = counts()
    for model in table.models:
        for size in table.sizes(model):
            assert 1 in table.factors_of(model) and table.own_f[model] in table.factors_of(model)
            for f in table.factors_of(model):
                assert table.has(model, f, size)
                parts = table.whole_run(model, f, size, steps=20)
                assert parts.total == parts.text + parts.steps + parts.decode
                assert (parts.decode == 0) == (f == 1)
                narrow = table.of(model, "denoiser", f, size, "coarse")
                assert narrow.total <= table.of(model, "denoiser", f, size).total


def test_a_whole_run_adds_up() -> None:
    run = counts().whole_run("sd14", 8, 512, steps=50, guided=True, batch=2)
    one = counts().of("sd14", "denoiser", 8, 512).total
    assert run.steps == one * 50 * 2 * 2
    assert run.text == 2 * counts().of("sd14", "text_encoder").total
    assert run.decode == 2 * counts().of("sd14", "vae_decode", 8, 512).total


def test_what_was_not_counted_is_said() -> None:
    with pytest.raises(RecordingNotFound, match="no count of sd14, denoiser, f = 8, 500 x 500"):
        counts().of("sd14", "denoiser", 8, 500)


def test_the_bundled_model_costs_what_a_recording_says() -> None:
    recorded = probe.open_run("sample").tree["cost"].dataset
    flops = dict(zip(recorded["component"].values, recorded["flops"].values, strict=True))
    table = counts()
    size = table.of("emojiworld", "denoiser", 8, 128)
    assert int(flops["vae"]) == table.of("emojiworld", "vae_decode", 8, 128).total
    assert int(flops["text_encoder"]) == table.of("emojiworld", "text_encoder").total
    assert int(flops["unet"]) == 2 * size.total, "with guidance a call has two rows"


def test_shares_of_a_recording() -> None:
    run = probe.open_run("sample")
    shares = shares_of(run)
    assert list(shares) == ["text", "steps", "decode"]
    cost = run.tree["cost"].dataset
    assert np.isclose(shares["steps"], float(cost["unet_seconds"].sum()))
    decodings = run.tree["decoded"].sizes["decoded_step"] + 1
    assert np.isclose(shares["decode"] * decodings, float(cost["seconds"].sel(component="vae")))
    assert shares["steps"] > shares["decode"] > 0 < shares["text"]


def test_times_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    whole = probe.open_run(synthetic_recording(tmp_path / "whole.zarr"))
    assert sum(shares_of(whole).values()) > 0
    half = synthetic_recording(tmp_path / "half.zarr", status="interrupted")
    with pytest.raises(UserError, match="is not complete: its times are not whole"):
        shares_of(probe.open_run(half))


def test_the_tables_are_small_and_read_once() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.glob("*.json")}
    assert {"counts.json", "paper.json"} <= set(sizes)
    assert max(size for name, size in sizes.items() if name != "trained.json") < 150_000
    assert counts() is counts() and paper() is paper()


def test_what_was_not_trained_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pixels, "FOLDER", tmp_path)
    assert trained() is None
    (tmp_path / "trained.json").write_text('{"runs": []}')
    assert trained() == {"runs": []}


@pytest.mark.slow
def test_the_counts_that_ship_are_those_of_a_fresh_count() -> None:
    from probe.settings.cost import load_cost
    from probe.watching.counting import count_models

    table = counts()
    for model in table.models:
        size = table.sizes(model)[0]
        factors = [1, table.own_f[model]]
        settings = load_cost({"model": model, "sizes": [size], "f": factors})
        for row in count_models([settings], "test").rows:
            assert row == table.of(row.model, row.component, row.f, row.size, row.attention)


def test_a_law_is_found_again() -> None:
    places = [16, 64, 256, 1024]
    law, worst = fit_law(places, [3 + 0.5 * n + 0.001 * n**2 for n in places])
    np.testing.assert_allclose(law, (3, 0.5, 0.001), rtol=1e-6)
    assert worst < 1e-9
    law, worst = fit_law(places, [2.0 * n for n in places])
    np.testing.assert_allclose(law, (0, 2, 0), atol=1e-6)


def test_no_part_of_a_law_is_negative() -> None:
    falling, worst = fit_law([10, 20, 30, 40], [4.0, 3.0, 2.0, 1.0])
    assert min(falling) >= 0 and worst > 0.1
    for few in ([1, 2, 3], [1, 2, 3, 3]):
        with pytest.raises(ValueError, match="four different"):
            fit_law(few, [1.0] * len(few))
