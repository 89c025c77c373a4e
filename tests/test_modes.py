"""Queries, summary and self-attention against maps: the same numbers, other bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from altered import Own, Swapped, merging
from tiny_runs import ask, assert_neutral, bare, pipeline, take
from true_maps import EVERYTHING

from probe.analysis.maps import maps_of
from probe.errors import CaptureError, ExperimentError, TooLarge
from probe.reading.recording import Run
from probe.running.recorder import record
from probe.watching.rehearsal import cross_attention
from probe.watching.text_side import written_sizes


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(tmp_path_factory.mktemp("maps"), capture=EVERYTHING, images=2)


def mode(folder: Path, name: str, **capture: Any) -> Run:
    return take(folder, capture={**EVERYTHING, "attention": name, **capture}, images=2)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 1e-6), ("float16", 2e-3), ("sqrt_u8", 2e-3)]
)
def test_queries_give_every_map(dtype: str, error: float, maps: Run, tmp_path: Path) -> None:
    run = mode(tmp_path, "queries", dtype=dtype, tokens="prompt")
    for grid in maps.grids:
        found, expected = run.attention(grid), maps.attention(grid)
        assert found.dims == expected.dims and found.shape == expected.shape
        assert float(np.abs(found.values - expected.values).max()) <= error
        assert found.coords.keys() == expected.coords.keys()
        assert all(found.coords[name].equals(expected.coords[name]) for name in expected.coords)
    np.testing.assert_allclose(run.overview().values, maps.overview().values, atol=error)
    np.testing.assert_allclose(run.word_overview().values, maps.word_overview().values, atol=error)


def test_recomputed_maps_can_be_addressed_as_recorded_ones(maps: Run, tmp_path: Path) -> None:
    run = mode(tmp_path, "queries")
    found, expected = run.attention(), maps.attention()
    for index in (
        {"step": 2},
        {"token": 3, "branch": 1},
        {"step": slice(1, 3), "token": [5, 0], "y": slice(0, 8, 2)},
        {"head": [1], "x": -1, "image": 0, "layer": 0},
        {"step": slice(0, 0)},
    ):
        np.testing.assert_allclose(found.isel(index).values, expected.isel(index).values, atol=1e-6)
    np.testing.assert_allclose(
        found.sel(token=4, branch="cond").mean("head").values,
        expected.sel(token=4, branch="cond").mean("head").values,
        atol=1e-6,
    )


def test_a_summary_is_the_mean_of_the_heads_and_what_each_did(maps: Run, tmp_path: Path) -> None:
    run = mode(tmp_path, "summary")
    for grid in maps.grids:
        whole = maps.attention(grid)
        np.testing.assert_allclose(
            run.attention(grid).values, whole.mean("head", keepdims=True).values, atol=1e-6
        )
        found = run.variable(f"attention/{grid}/head_statistics")
        moments = maps.variable(f"attention/{grid}/moments")
        np.testing.assert_allclose(
            found.sel(head_statistic=["mass", "centroid_y", "centroid_x"]).values,
            moments.values,
            atol=1e-6,
        )
        np.testing.assert_allclose(
            found.sel(head_statistic="greatest").values, whole.max(("y", "x")).values, atol=1e-6
        )
        shares = (whole / whole.sum(("y", "x"))).values
        np.testing.assert_allclose(
            found.sel(head_statistic="entropy").values,
            -(shares * np.log(shares)).sum((-1, -2)),
            atol=1e-4,
        )
    np.testing.assert_allclose(run.overview().values, maps.overview().values, atol=1e-6)


@pytest.mark.parametrize("name", ["queries", "summary"])
def test_no_mode_changes_a_bit(name: str, tmp_path: Path) -> None:
    asked = ask(tmp_path, capture={**EVERYTHING, "attention": name, "self_attention": ("*",)})
    steps = bare(pipeline(), asked)
    assert_neutral(record(asked, pipeline(), progress=False), steps)


@pytest.mark.parametrize("name", ["queries", "summary", "maps"])
def test_the_forecast_of_each_mode_is_what_is_written(name: str, tmp_path: Path) -> None:
    from probe.diffusion.sd import StableDiffusion
    from probe.running.planning import plan

    asked = ask(
        tmp_path,
        capture={**EVERYTHING, "attention": name, "self_attention": ("*",), "steps": "0,2"},
    )
    forecast = plan(StableDiffusion.of(pipeline()), asked).forecast()
    run = record(asked, pipeline(), progress=False)
    for path in ("query", "key", "cross", "moments", "head_statistics", "value_size"):
        for grid in run.grids:
            if f"attention/{grid}/{path}" in forecast:
                written = sum(
                    f.stat().st_size for f in (run.path / "attention" / grid / path).glob("c*")
                )
                overhead = 24 * 77 * 2  # a checksum and an index entry of each token, at 2 steps
                assert written == pytest.approx(
                    forecast[f"attention/{grid}/{path}"], rel=0.02, abs=overhead
                ), path


def test_self_attention_is_a_softmax_over_places(tmp_path: Path) -> None:
    asked = ask(
        tmp_path, capture={"self_attention": ("*",), "dtype": "float32", "branches": "both"}
    )
    run = record(asked, pipeline(), progress=False)
    unet = pipeline().unet
    seen: dict[str, list[torch.Tensor]] = {}
    selves = {
        path: part
        for path, part in unet.named_modules()
        if getattr(part, "is_cross_attention", None) is False
    }
    from probe.watching.hooks import Hooks

    with Hooks(
        [
            (part, "input", lambda value, path=path: seen.setdefault(path, []).append(value))
            for path, part in selves.items()
        ]
    ):
        bare(pipeline(), asked)
    checked = 0
    for grid in run.tree["self_attention"].children:
        found = run.variable(f"self_attention/{grid}/self")
        np.testing.assert_allclose(found.sum(("key_y", "key_x")).values, 1, atol=1e-5)
        for path in found["layer"].values:
            part = selves[str(path)]
            with torch.no_grad():  # diffusers' own scores
                q, k = (
                    part.head_to_batch_dim(side(seen[str(path)][1]))
                    for side in (part.to_q, part.to_k)
                )
                scores = part.get_attention_scores(q, k).unflatten(0, (2, part.heads))
            np.testing.assert_allclose(
                found.sel(layer=path).isel(step=1, image=0).values.reshape(scores.shape),
                scores.numpy(),
                atol=1e-6,
            )
            checked += 1
    assert checked == len(selves)


@pytest.mark.parametrize(
    "capture",
    [{"attention": "queries"}, {"attention": "off", "self_attention": ["4x4"]}],
    ids=["queries", "self"],
)
@pytest.mark.parametrize("processor", [Swapped, Own], ids=["foreign", "own, but the same"])
def test_an_unknown_processor_is_proven_in_every_mode(
    capture: dict[str, Any], processor: Any, tmp_path: Path
) -> None:
    """One that edits the attention is refused by name; one that computes the same is recorded."""
    pipe = tiny.pipeline()
    pipe.unet.set_attn_processor(processor())
    if processor is Swapped:
        with pytest.raises(CaptureError, match="does not compute softmax"):
            take(tmp_path, pipe, steps=1, capture=capture)
    else:
        run = take(tmp_path, pipe, steps=1, capture=capture)
        assert_neutral(run, bare(pipe, run.experiment))


def test_merged_queries_are_refused(tmp_path: Path) -> None:
    """Each of them would stand for two pixels."""
    pipe = tiny.pipeline()
    merging(pipe)
    with pytest.raises(CaptureError, match=r"multiplies .* queries with"):
        take(tmp_path, pipe, steps=1, capture={"attention": "queries"})


def test_self_attention_is_refused_where_it_would_be_too_large(tmp_path: Path) -> None:
    asked = ask(tmp_path, capture={"self_attention": ("8x8",)})
    with pytest.raises(TooLarge, match="self_attention/8x8/self"):
        record(asked, pipeline(), progress=False, max_bytes=300_000)
    with pytest.raises(
        ExperimentError,
        match=r"capture\.self_attention: 'down\.\*' matches no self-attention layer",
    ):
        record(ask(tmp_path, capture={"self_attention": ("down.*",)}), pipeline(), progress=False)


def test_value_size_is_what_a_token_writes(tmp_path: Path) -> None:
    """For one head and token: attention 1 to that token and 0 elsewhere, through the layer's own
    output matrix.
    """
    run = take(tmp_path, capture={"branches": "both", "tokens": "all"})
    text = torch.from_numpy(np.array(run.variable("text/text_encoder/output").values))
    for grid in run.grids:
        sizes = run.variable(f"attention/{grid}/value_size")
        for path in sizes["layer"].values:
            module = cross_attention(pipeline().unet)[str(path)]
            with torch.no_grad():
                value = module.to_v(text)
                width = value.shape[-1] // module.heads
                for head in range(module.heads):
                    alone = torch.zeros_like(value)
                    alone[..., head * width : (head + 1) * width] = value[
                        ..., head * width : (head + 1) * width
                    ]
                    written = torch.nn.functional.linear(alone, module.to_out[0].weight).norm(
                        dim=-1
                    )
                    np.testing.assert_allclose(
                        sizes.sel(layer=path).isel(head=head).values, written.numpy(), rtol=1e-4
                    )


def test_value_size_of_rest_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    every = take(tmp_path, capture={"tokens": "all"}).variable
    few = take(tmp_path, capture={"tokens": "prompt"}).variable
    grid = "8x8"
    end = few(f"attention/{grid}/value_size").sizes["token"] - 1
    np.testing.assert_allclose(
        few(f"attention/{grid}/value_size").sel(token=-1).values,
        every(f"attention/{grid}/value_size").isel(token=slice(end, None)).mean("token").values,
        rtol=1e-5,
    )


def test_an_adapter_on_the_output_matrix_is_seen() -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear):
            super().__init__()
            self.base, self.extra = (
                base,
                torch.nn.Linear(base.in_features, base.out_features, bias=False),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.extra(x)

    module = next(iter(cross_attention(tiny.pipeline().unet).values()))
    value = torch.randn(1, 5, module.to_v.out_features, generator=torch.Generator().manual_seed(0))
    plain = written_sizes(value, module)
    adapted = Adapted(module.to_out[0])
    module.to_out[0] = adapted
    with torch.no_grad():
        changed = written_sizes(value, module)
        merged = torch.nn.Linear(adapted.base.in_features, adapted.base.out_features)
        merged.weight.copy_(adapted.base.weight + adapted.extra.weight)
        module.to_out[0] = merged
        assert torch.allclose(changed, written_sizes(value, module), rtol=1e-4)
    assert not torch.allclose(changed, plain, rtol=1e-2)


def test_maps_of_is_a_softmax() -> None:
    rng = np.random.default_rng(0)
    query, key = (
        rng.standard_normal((1, 1, 2, 3, 4, 5, 6)).astype("f4") * 9,
        rng.standard_normal((1, 7, 2, 3, 4)).astype("f4") * 9,
    )
    found = maps_of(query, key)
    logits = np.einsum("bilhfyx,btlhf->tbilhyx", query.astype("f8"), key.astype("f8"))
    expected = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
