"""Every function, mode and fallback means over the heads of a layer first, then over layers.

The model's grids differ in their number of heads. All answers are compared with a computation in
float64 that shares no line with the product. If every layer has as many heads, the two ways to
weigh are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
from parity import product
from torch.nn.functional import interpolate

from probe.analysis import combined
from probe.errors import ExperimentError
from probe.proof.map_checks import check_sums
from probe.reading.listing import list_runs
from probe.reading.recording import Run
from probe.running.ask import read_out
from probe.running.recorder import record

HEADS = {"8x8": 2, "4x4": 4, "2x2": 8}
PROMPT, CALLS, STOPPED = "a cat on the hat", 4, 2
MODES: dict[str, dict[str, Any]] = {
    "maps": {"attention": "maps", "dtype": "float32"},
    "maps in bytes": {"attention": "maps", "dtype": "sqrt_u8"},
    "summary": {"attention": "summary", "dtype": "float32"},
    "queries": {"attention": "queries", "dtype": "float32"},
}


def uneven(heads: tuple[int, ...] = (2, 4, 8)) -> Any:
    """Three grids, as many heads as `heads` says, and attention that is far from even: what is
    weighed otherwise differs by far.
    """
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    made = tiny.pipeline(
        attention_head_dim=heads,
        block_out_channels=(16, 32, 32),
        down_block_types=down,
        up_block_types=up,
    )
    with torch.no_grad():
        for path, module in made.unet.named_modules():
            if path.endswith("attn2"):
                module.to_q.weight *= 60
    return made


def take(folder: Path, mode: str, stop: bool = False, pipe: Any = None, **asked: Any) -> Run:
    """One recording in a folder of its own; `stop`: interrupted in the call after STOPPED steps."""
    pipe = pipe or uneven()
    calls = iter(range(CALLS))

    def interrupt(*_: Any) -> None:
        if next(calls) == STOPPED:
            raise KeyboardInterrupt

    capture = {"branches": "both", "text": False, "statistics": False, **MODES[mode]}
    settings = {
        "prompt": PROMPT,
        "steps": CALLS,
        "scheduler": "DDIM",
        "images": 2,
        "capture": capture,
        "output": str(folder),
        **asked,
    }
    if not stop:
        return record(settings, pipe, progress=False)
    pipe.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        record(settings, pipe, progress=False)
    ((path, attributes),) = list_runs(folder)
    assert attributes is not None and attributes["status"] == "interrupted"
    return Run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        (mode, stop): take(folder / f"{mode} {stop}", mode, stop)
        for mode in MODES
        for stop in (False, True)
    }


def layers_of(
    run: Run, layers: str = "", method: str = "bilinear", over_steps: bool = False
) -> dict[str, np.ndarray]:
    """Every layer's maps on the largest grid, from what lies on the disk.

    *Shape:* by path, ([step,] token, branch, image, head, 8, 8) float64.
    """
    tree = xr.open_datatree(run.path, engine="zarr")
    found = {}
    for grid, heads in HEADS.items():
        group = tree[f"attention/{grid}"]
        stored = group["cross"].load()
        maps = (
            stored.astype(float) if stored.dtype.kind == "f" else (stored.astype(float) / 255) ** 2
        )
        for path in maps["layer"].values:
            if not layers or not str(path).startswith("mid"):
                one = maps.sel(layer=path).values
                assert one.shape[4] == heads
                one = one.sum(0) if over_steps else one
                large = interpolate(
                    torch.from_numpy(one).flatten(0, -4), (8, 8), mode=method
                ).reshape(*one.shape[:-2], 8, 8)
                found[str(path)] = large.numpy().clip(0)
    return found


def direct(run: Run) -> np.ndarray:
    """Heads first, then layers. *Shape:* (step, token, branch, image, y, x) float64."""
    return np.mean([one.mean(axis=4) for one in layers_of(run).values()], axis=0)


def words_of(tokens: np.ndarray, axis: int = 1) -> np.ndarray:
    """BOS and five words of one token each, then EOS and rest: the words' maps."""
    return tokens.take(range(1, 6), axis=axis)


@pytest.fixture(scope="module")
def truths(runs: dict[tuple[str, bool], Run]) -> dict[tuple[str, bool], np.ndarray]:
    """From a recording's own maps, or where it holds none of every head, from those of the
    recording in float32, which is exact.
    """
    own = {asked: direct(run) for asked, run in runs.items() if asked[0].startswith("maps")}
    return {
        (mode, stop): own.get((mode, stop), own["maps", False])[: STOPPED if stop else CALLS]
        for mode, stop in runs
    }


WAYS: dict[str, tuple[Callable[[Run], xr.DataArray], Callable[[np.ndarray], np.ndarray]]] = {
    "combined": (
        lambda run: combined([run.attention(grid) for grid in run.grids]),
        lambda tokens: tokens,
    ),
    "token maps": (lambda run: run.token_maps(), lambda tokens: tokens[:, :, 1]),
    "the other branch": (
        lambda run: run.token_maps(branch="uncond"),
        lambda tokens: tokens[:, :, 0],
    ),
    "over steps too": (
        lambda run: run.token_maps(over=("step", "layer", "head")),
        lambda tokens: tokens[:, :, 1].mean(0),
    ),
    "over images too": (
        lambda run: run.token_maps(over=("layer", "head", "image")),
        lambda tokens: tokens[:, :, 1].mean(2),
    ),
    "one image": (lambda run: run.token_maps(images=1), lambda tokens: tokens[:, :, 1, 1:]),
    "overview": (lambda run: run.overview(), lambda tokens: tokens[:, :, 1].mean(2)),
    "words": (
        lambda run: run.word_overview(),
        lambda tokens: words_of(tokens[:, :, 1].mean((0, 2)), 0),
    ),
    "word maps": (lambda run: run.word_maps(), lambda tokens: words_of(tokens[:, :, 1])),
    "a noise level": (
        lambda run: run.word_maps(bands=1),
        lambda tokens: words_of(tokens[:, :, 1]).mean(0, keepdims=True),
    ),
    "a phrase": (
        lambda run: run.phrase("the hat"),
        lambda tokens: tokens[:, 4:6, 1].sum(1, keepdims=True),
    ),
    "against others": (
        lambda run: run.against_others(),  # of the content words, cat and hat
        lambda tokens: np.stack(
            [tokens[:, 2, 1] - tokens[:, 5, 1], tokens[:, 5, 1] - tokens[:, 2, 1]], 1
        ),
    ),
    "mass": (
        lambda run: run.mass().sel(kind=["BOS", "words", "EOS", "rest"]),
        lambda tokens: np.stack(
            [part.sum(1).mean((-2, -1)) for part in np.split(tokens[:, :, 1], [1, 6, 7], axis=1)], 1
        ),
    ),
}


@pytest.mark.parametrize(("way", "mode", "stop"), product(tuple(WAYS), tuple(MODES), (False, True)))
def test_there_is_one_mean_over_layers_and_heads(
    way: str,
    mode: str,
    stop: bool,
    runs: dict[tuple[str, bool], Run],
    truths: dict[tuple[str, bool], np.ndarray],
) -> None:
    ask, expect = WAYS[way]
    run, tokens = runs[mode, stop], truths[mode, stop]
    found = ask(run).values
    if found.shape != expect(tokens).shape:
        found = folded(found)
    np.testing.assert_allclose(found, expect(tokens), rtol=0, atol=4e-6)


def folded(values: np.ndarray) -> np.ndarray:
    """Maps of all 77 tokens with the padding as one.

    *Shape:* (token, ...) or (step, token, ...).
    """
    axis = values.shape.index(77)
    return np.concatenate(
        [
            values.take(range(7), axis=axis),
            values.take(range(7, 77), axis=axis).sum(axis=axis, keepdims=True),
        ],
        axis=axis,
    )


@pytest.mark.parametrize("mode", MODES)
def test_verify_holds_the_overview_to_the_same_mean(
    mode: str, runs: dict[tuple[str, bool], Run]
) -> None:
    found = check_sums(runs[mode, False])
    assert found.verdict != "failed" and "overview" in found.detail, found


def test_a_word_that_is_asked_later_has_the_map_that_was_recorded(
    runs: dict[tuple[str, bool], Run],
) -> None:
    for stop in (False, True):
        run = runs["queries", stop]
        found = read_out(run, "hat", PROMPT, uneven())
        np.testing.assert_allclose(
            found.values, run.phrase("hat").isel(word=0).mean("image").values, rtol=0, atol=4e-6
        )


def test_where_all_layers_have_as_many_heads_both_ways_to_weigh_are_one(tmp_path: Path) -> None:
    run = take(tmp_path, "maps", pipe=uneven((2, 2, 2)))
    for over in (("layer", "head"), ("step", "layer", "head"), ("image", "layer", "head")):
        xr.testing.assert_identical(
            run.token_maps(over=over), run.token_maps(over=over, weigh="heads")
        )
    assert run.token_maps(over=("step", "layer", "head")).attrs["terms"] == CALLS * 7 * 2


# --- sums -----------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parent.parent / "docs" / "attention.md"
EVERY = ("step", "layer", "head")
MAPS = CALLS * (3 * 2 + 3 * 4 + 1 * 8)  # steps, and on each grid layers times heads


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_of_all_maps_is_the_same_in_every_mode(
    mode: str, runs: dict[tuple[str, bool], Run]
) -> None:
    run, one = (
        runs[mode, False],
        runs["maps", False] if mode != "maps in bytes" else runs[mode, False],
    )
    wanted = sum(maps.sum(axis=(0, 4))[:, 1] for maps in layers_of(one).values())
    found = run.token_maps(over=EVERY, weigh="heads")
    assert found.attrs["terms"] == MAPS
    total = (found * found.attrs["terms"]).values
    np.testing.assert_allclose(
        folded(total) if mode == "queries" else total, wanted, rtol=0, atol=4e-6 * MAPS
    )
    alike = run.token_maps(over=EVERY)
    assert "terms" not in alike.attrs, "no multiple of this mean is the sum"
    assert abs(alike - found).max() > 1e-2, "or this model could not tell them apart"
    assert run.word_maps(over=EVERY, weigh="heads").attrs["terms"] == MAPS


def daams(pipe: Any, layer: Callable[[str], bool]) -> np.ndarray:
    """DAAM's global map of each word (castorini/daam, trace.py), read in the attention processors
    of diffusers' own pipeline.

    Of each head the prompt's maps, summed over steps; bicubic to the size of the latents, clipped;
    the mean over layers and heads. *Shape:* (word, y, x).
    """
    sums: dict[str, torch.Tensor] = {}

    class Traced:
        def __init__(self, path: str):
            self.path = path

        def __call__(
            self,
            attention: Any,
            x: torch.Tensor,
            encoder_hidden_states: Any = None,
            attention_mask: Any = None,
        ) -> torch.Tensor:
            context = x if encoder_hidden_states is None else encoder_hidden_states
            sides = ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
            query, key, value = (attention.head_to_batch_dim(side(of)) for side, of in sides)
            shares = attention.get_attention_scores(query, key, attention_mask)
            if context.shape[1] == 77 and layer(self.path):
                prompts = shares.unflatten(0, (2, attention.heads))[1]
                sums[self.path] = sums.get(self.path, 0) + prompts
            return attention.to_out[0](attention.batch_to_head_dim(shares @ value))

    pipe.unet.set_attn_processor({name: Traced(name) for name in pipe.unet.attn_processors})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pipe(
            PROMPT,
            num_inference_steps=CALLS,
            guidance_scale=3,
            generator=generator,
            output_type="latent",
        )
    merged = []
    for maps in sums.values():  # (head, pixel, token)
        side = int(maps.shape[1] ** 0.5)
        heads = maps.transpose(1, 2).unflatten(-1, (side, side))
        merged += [
            interpolate(head[:, None], size=(8, 8), mode="bicubic").clamp(min=0)[:, 0]
            for head in heads
        ]
    return torch.stack(merged).mean(0)[1:6].numpy()


DAAM = {
    "layers": ("down_blocks.*", "up_blocks.*"),
    "over": EVERY,
    "method": "bicubic",
    "weigh": "heads",
    "merge": "mean",
}


@pytest.mark.parametrize("heads", [(2, 4, 8), (2, 2, 2)], ids=["unlike heads", "as many heads"])
def test_the_documented_call_is_daams_global_map(heads: tuple[int, ...], tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    documented = r"^# DAAM's global map.*\nrun\.word_maps\(((?:.*\n)*?.*?)\)$"
    (call,) = re.findall(documented, PAGE.read_text(), re.M)
    assert eval(f"dict({call})") == DAAM
    pipe = uneven(heads)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    wanted = daams(pipe, lambda path: path.startswith(("down", "up")))
    for mode in ("queries", "maps")[
        len(set(heads)) == 1 :
    ]:  # a summary is clipped only after the mean over heads
        run = take(tmp_path / mode, mode, pipe=uneven(heads), images=1, guidance_scale=3)
        found = run.word_maps(**DAAM).isel(image=0).values * CALLS
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * wanted.max())
    every = run.word_maps(**{**DAAM, "layers": "*"}).isel(image=0).values * CALLS
    assert abs(every - wanted).max() > 2e-2 * wanted.max(), (
        "the mid block is not DAAM's, and would be seen"
    )
    if len(set(heads)) > 1:
        alike = run.word_maps(**{**DAAM, "weigh": "layers"}).isel(image=0).values * CALLS
        assert abs(alike - wanted).max() > 2e-2 * wanted.max(), (
            "every layer alike is not DAAM's, and would be seen"
        )


# --- what cannot be one ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "cause", "remedy"),
    [
        (
            {"over": ("layer",)},
            "These grids have different numbers of heads.",
            'Choose one grid, choose heads, or add "head" to over.',
        ),
        (
            {"over": ("head",)},
            "These maps are of several grids, which have different layers.",
            'Choose one grid, or add "layer" to over.',
        ),
        ({"weigh": "head"}, "weigh is 'head', which is no choice.", "Choose from: layers, heads."),
    ],
    ids=["heads", "layers", "weights"],
)
def test_what_does_not_belong_together_is_refused(
    choice: dict[str, Any], cause: str, remedy: str, runs: dict[tuple[str, bool], Run]
) -> None:
    with pytest.raises(ExperimentError) as caught:
        runs["maps", False].token_maps(**choice)
    assert (caught.value.cause, caught.value.remedy) == (cause, remedy)


def test_the_remedies_help(runs: dict[tuple[str, bool], Run]) -> None:
    run = runs["maps", False]
    assert run.token_maps(over=("layer",), layers="4x4").sizes["head"] == 4
    assert run.token_maps(over=("layer",), heads=[0, 1]).sizes["head"] == 2
    assert run.token_maps(over=("head",), layers="8x8").sizes["layer"] == 3
