"""What is captured equals what diffusers computes: every layer, step, branch, head and image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from recordings import only
from tiny_runs import ask, bare, model_for, pipeline, take
from true_maps import DOWN, EVERYTHING, MIDDLE, Scores, assert_maps, scores

from probe.analysis.maps import probabilities
from probe.diffusion.sampling import denoise
from probe.diffusion.sd import StableDiffusion
from probe.errors import CaptureError, ExperimentError
from probe.reading.recording import Run
from probe.running.planning import plan
from probe.running.session import Session
from probe.settings.experiment import Experiment
from probe.watching import hooks, rehearsal
from probe.watching.hooks import Hooks
from probe.watching.kept import Tray
from probe.watching.measures import statistics_of, to_storage
from probe.watching.outputs import ModuleOutputs, TextOutputs, UnetOutputs, VaeOutputs
from probe.watching.rehearsal import cross_attention, rehearse
from probe.watching.selection import activation_paths, attention_layers

SHAPE = {"images": 2, "width": 48, "steps": 2}


# --- maps -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return take(
        tmp_path_factory.mktemp("everything"),
        **SHAPE,
        capture=EVERYTHING,
        negative_prompt="scuba diving",
    )


@pytest.fixture(scope="module")
def expected(everything: Run) -> Scores:
    return scores(pipeline(), everything.experiment)


def test_maps_are_diffusers_own(everything: Run, expected: Scores) -> None:
    assert_maps(everything, expected, 1e-6)
    layers = [
        layer for grid in everything.grids for layer in everything.attention(grid)["layer"].values
    ]
    assert sorted(layers) == sorted(cross_attention(pipeline().unet)) and len(layers) == 4
    assert everything.attention().sizes == {
        "step": 3,
        "token": 77,
        "branch": 2,
        "image": 2,
        "layer": 3,
        "head": 2,
        "y": 8,
        "x": 12,
    }


@pytest.mark.parametrize(
    ("changes", "capture"),
    [
        ({}, {}),
        ({"guidance_scale": 1.0, "height": 48, "width": 32}, {"branches": "cond", "tokens": "all"}),
        ({}, {"branches": "uncond"}),
        ({"prompt": ""}, {"branches": "cond"}),
        ({"prompt": "cat", "negative_prompt": "a cat on the hat"}, {"branches": "both"}),
        ({"prompt": "cat " * 100, "over_long": "cut"}, {"branches": "both"}),
    ],
    ids=["default", "unguided", "uncond", "empty", "longer negative", "cut"],
)
def test_maps_for_other_requests(
    changes: dict[str, Any], capture: dict[str, Any], tmp_path: Path
) -> None:
    run = take(
        tmp_path,
        **{**SHAPE, **changes},
        capture={"dtype": "float32", "statistics": False, **capture},
    )
    assert_maps(run, scores(pipeline(), run.experiment), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"attention_head_dim": (2, 4), "use_linear_projection": True}),
        (torch.float32, {"upcast_attention": True}),
        (torch.bfloat16, {"upcast_attention": True}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
    ],
    ids=str,
)
def test_maps_of_other_transformers(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    """q and k are widened before they are multiplied, so the maps of a half-precision run are as
    exact as any.
    """
    pipe = tiny.pipeline(**options).to(dtype)
    run = take(tmp_path, pipe, steps=2, capture={**EVERYTHING, "statistics": False})
    assert_maps(run, scores(pipe, run.experiment), 1e-6)
    if "attention_head_dim" in options:
        assert [run.attention(grid).sizes["head"] for grid in run.grids] == [2, 4]


def test_maps_stored_in_float16_are_off_by_half_a_unit_in_the_last_place(tmp_path: Path) -> None:
    """A float16 near p has 11 bits: off by p * 2^-11 at most, which is 2.4e-4 near 1 and below 3e-5
    where p < 1/16.
    """
    run = take(tmp_path, **SHAPE, capture={**EVERYTHING, "dtype": "float16"})
    rows = scores(pipeline(), run.experiment)
    assert_maps(run, rows, 1e-6, relative=2**-11)
    assert_maps(run, rows, 3e-5)


def test_maps_stored_as_sqrt_u8_are_within_4e_3(tmp_path: Path) -> None:
    run = take(tmp_path, **SHAPE, capture={**EVERYTHING, "dtype": "sqrt_u8"})
    assert run.attention().dtype == np.uint8 and "encoding" in run.attention().attrs
    expected = scores(pipeline(), run.experiment)
    with pytest.raises(AssertionError):
        assert_maps(run, expected, 1e-6)
    assert_maps(run, expected, 4e-3)


def test_storage_is_as_exact_as_it_says() -> None:
    p = torch.linspace(0, 1, 100_001)
    for dtype, worst in (("float32", 0.0), ("float16", 2.45e-4), ("sqrt_u8", 4e-3)):
        found = torch.from_numpy(probabilities(to_storage(p, dtype).numpy()))
        assert float((found - p).abs().max()) <= worst
        assert found[0] == 0 and found[-1] == 1
    small = p[p < 1 / 16]
    assert float((to_storage(small, "float16").float() - small).abs().max()) <= 3e-5


def test_kept_tokens_and_rest_sum_to_one(tmp_path: Path) -> None:
    run = take(tmp_path, **SHAPE)
    maps = run.attention()
    assert (
        maps["token"].values.tolist() == [*range(7), -1]
        and maps["token_text"].values[0, -1] == "rest"
    )
    np.testing.assert_allclose(probabilities(maps.values).sum(axis=1), 1, atol=5e-4)


@pytest.mark.parametrize(
    "what", ["grid transposed", "heads", "branches", "images", "tokens", "step", "one value"]
)
def test_meta_a_wrong_map_is_noticed(what: str, everything: Run, expected: Scores) -> None:
    def spoil(rows: torch.Tensor) -> torch.Tensor:
        flips = {"branches": 0, "images": 1, "heads": 2, "tokens": 4}
        if what in flips:
            return rows.flip(flips[what])
        if what == "grid transposed":
            grid = (8, 12) if rows.shape[3] == 96 else (4, 6)
            return rows.unflatten(3, grid).transpose(3, 4).flatten(3, 4)
        if what == "one value":
            rows = rows.clone()
            rows[0, 1, 1, 5, 3] += 3e-6
        return rows

    wrong = [{path: spoil(rows) for path, rows in step.items()} for step in expected]
    with pytest.raises(AssertionError, match=r"attn2, step \d"):
        assert_maps(everything, wrong[::-1] if what == "step" else wrong, 1e-6)


# --- moments, statistics, activations -------------------------------------------------------------


def test_moments_are_the_mass_and_centre_of_each_map(everything: Run) -> None:
    for grid in everything.grids:
        maps = everything.attention(grid).values.astype(np.float64)
        moments = everything.variable(f"attention/{grid}/moments")
        assert moments.dims[-1] == "moment" and moments["moment"].values.tolist() == [
            "mass",
            "centroid_y",
            "centroid_x",
        ]
        y, x = ((np.arange(n) + 0.5) / n for n in maps.shape[-2:])
        mass = maps.mean(axis=(-2, -1))
        total = maps.sum(axis=(-2, -1))
        found = [
            mass,
            (maps.sum(axis=-1) * y).sum(axis=-1) / total,
            (maps.sum(axis=-2) * x).sum(axis=-1) / total,
        ]
        np.testing.assert_allclose(moments.values, np.stack(found, axis=-1), atol=1e-6)
        assert found[1].std() > 1e-4, (
            "every map has its centre in the middle: this could not notice y and x exchanged"
        )


def test_moments_are_taken_before_storage(tmp_path: Path, everything: Run) -> None:
    asked = {"negative_prompt": "scuba diving", "capture": {**EVERYTHING, "dtype": "sqrt_u8"}}
    run = take(tmp_path, **SHAPE, **asked)
    for grid in run.grids:
        name = f"attention/{grid}/moments"
        assert np.array_equal(run.variable(name).values, everything.variable(name).values)


PATTERNS = (
    "unet.mid_block",
    "unet.up_blocks.1.resnets.*",
    "unet.time_embedding",
    "vae.decoder.mid_block",
    "text_encoder.encoder.layers.*",
)


def outputs_of_modules(
    pipe: Any, experiment: Experiment, paths: Iterable[str]
) -> dict[str, list[torch.Tensor]]:
    """Return what each module puts out while the picture is drawn and decoded, call by call."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(path: str) -> Callable[[Any], None]:
        def callback(output: Any) -> None:
            while isinstance(output, tuple):
                output = output[0]
            seen.setdefault(path, []).append(output.detach().clone())

        return callback

    modules = {
        f"{part}.{path}": module
        for part in ("unet", "vae", "text_encoder")
        for path, module in getattr(pipe, part).named_modules()
    }
    with hooks.Hooks([(modules[path], "output", keep(path)) for path in paths]):
        last = bare(pipe, experiment)[-1]
        model_for(pipe, experiment).decode(last.next_latents)
    return seen


def four_numbers(output: torch.Tensor) -> torch.Tensor:
    """Return mean, std, min and max of each image of a batch."""
    flat = output.double().flatten(1)
    return torch.stack([flat.mean(1), flat.std(1, correction=0), flat.amin(1), flat.amax(1)])


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_statistics_and_activations_are_those_of_the_modules_outputs(
    guidance_scale: float, tmp_path: Path
) -> None:
    pipe = pipeline()
    run = take(tmp_path, **SHAPE, guidance_scale=guidance_scale, capture={"activations": PATTERNS})
    outputs = [
        capture._outputs
        for capture in plan(model_for(pipe, run.experiment), run.experiment).captures
        if isinstance(capture, UnetOutputs | VaeOutputs | TextOutputs)
    ]
    measured = [path for own in outputs for path in own.statistics]
    kept = [path for own in outputs for path in own.whole]
    seen = outputs_of_modules(pipe, run.experiment, dict.fromkeys([*measured, *kept]))
    branches = 2 if guidance_scale > 1 else 1
    for part, least in (("unet", 10), ("vae", 5)):
        paths = [path for path in measured if path.startswith(f"{part}.")]
        assert len(paths) > least
        statistics = run.variable(f"{part}/statistics")
        assert statistics["statistic"].values.tolist() == ["mean", "std", "min", "max"]
        assert statistics["module"].values.tolist() == [p.removeprefix(f"{part}.") for p in paths]
        for number, path in enumerate(paths):
            stored = statistics.values[..., number]
            for step, output in enumerate(seen[path]):
                expected = four_numbers(output)
                if part == "unet":
                    expected = expected.unflatten(1, (branches, 2))
                np.testing.assert_allclose(
                    stored[step] if part == "unet" else stored,
                    expected.numpy(),
                    rtol=1e-5,
                    atol=1e-5,
                    err_msg=path,
                )
    for path in kept:
        part, module = path.split(".", 1)
        if part == "unet":
            expected = torch.stack([one.unflatten(0, (branches, 2)) for one in seen[path]])
        elif part == "vae":
            expected = seen[path][0]
        else:  # encoded as cond, uncond, after both were held against the pipeline's own reading
            expected = torch.cat(seen[path][: -branches - 1 : -1])
        stored = run.variable(f"{part}/{module}/activation").values
        assert np.array_equal(stored, expected.numpy()), path


def test_statistics_of_a_constant_and_of_large_half_precision_values() -> None:
    mean, std, low, high = statistics_of(torch.full((2, 3, 4), 6e4, dtype=torch.float16))
    assert mean.tolist() == low.tolist() == high.tolist() == [
        6e4 - 6e4 % 32
    ] * 2 and std.tolist() == [0, 0]


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (("*",), 4),
        (("up_blocks.*",), 2),
        (("8x8",), 3),
        (("4x4", "down_*"), 2),
        (("4x4", "mid_block*"), 1),
        ((DOWN,), 1),
    ],
    ids=str,
)
def test_layers_are_chosen_by_glob_or_grid(
    patterns: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    asked = ask(tmp_path, capture={"layers": patterns})
    settled = plan(StableDiffusion.of(pipeline()), asked)
    assert len(settled.layers) == count
    order = [
        DOWN,
        MIDDLE,
        *(f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)),
    ]
    assert list(settled.layers) == [path for path in order if path in settled.layers]  # as they run


def test_only_the_chosen_layers_are_recorded(tmp_path: Path) -> None:
    run = take(tmp_path, **SHAPE, capture={**EVERYTHING, "layers": ("mid_block.*",)})
    assert run.grids == ["4x6"] and run.attention()["layer"].values.tolist() == [MIDDLE]
    assert_maps(run, scores(pipeline(), run.experiment), 1e-6)
    assert run.overview().sizes == {"step": 3, "token": 77, "y": 4, "x": 6}


@pytest.mark.parametrize(
    ("pattern", "remedy"),
    [
        ("mid_blck.*", "Did you mean mid_block"),
        ("up_block.*", "Did you mean up_blocks"),
        ("16x16", "There are: 8x8, 4x4, down_blocks"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_with_near_names(pattern: str, remedy: str) -> None:
    rehearsal = rehearse(StableDiffusion.of(pipeline()), (1, 4, 8, 8), 2, 77)
    with pytest.raises(ExperimentError) as caught:
        attention_layers(rehearsal.grids, [pattern])
    assert (
        f"capture.layers: '{pattern}' matches no" in caught.value.cause
        and caught.value.remedy.startswith(remedy)
    )


def test_a_module_that_is_not_there_or_runs_twice_is_refused() -> None:
    rehearsal = rehearse(StableDiffusion.of(pipeline()), (1, 4, 8, 8), 2, 77)
    with pytest.raises(ExperimentError, match=r"Did you mean unet\.mid_block"):
        activation_paths(rehearsal, ["unet.mid_blok"])
    twice = [path for path, calls in rehearsal.calls.items() if calls == 2]
    assert twice
    with pytest.raises(ExperimentError, match="runs 2 times a call"):
        activation_paths(rehearsal, [twice[0]])


# --- hooks that fire 0 or 2 times -----------------------------------------------------------------


class Silent:
    """Multiplies with the layer's weights without calling its modules, as a fused kernel does."""

    def __init__(self, silent: str):
        self.silent = silent

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        assert encoder_hidden_states is not None
        linear = torch.nn.functional.linear
        query = (
            linear(hidden_states, attn.to_q.weight)
            if "q" in self.silent
            else attn.to_q(hidden_states)
        )
        key = (
            linear(encoder_hidden_states, attn.to_k.weight)
            if "k" in self.silent
            else attn.to_k(encoder_hidden_states)
        )
        query, key, value = (
            attn.head_to_batch_dim(tensor)
            for tensor in (query, key, attn.to_v(encoder_hidden_states))
        )
        out: torch.Tensor = attn.to_out[0](
            attn.batch_to_head_dim(attn.get_attention_scores(query, key) @ value)
        )
        return out


class Twice(AttnProcessor2_0):
    """Calls some of the layer's modules once more."""

    def __init__(self, again: str):
        super().__init__()
        self.again = again

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **named: Any,
    ) -> torch.Tensor:
        for name, given in (("q", hidden_states), ("k", encoder_hidden_states)):
            if name in self.again:
                getattr(attn, f"to_{name}")(given)
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **named)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Silent("qk"), rf"{MIDDLE} fired 0 times in a step"),
        (Silent("q"), rf"^{MIDDLE}\.to_q fired 0 times in a step"),
        (Silent("k"), rf"{MIDDLE} fired 0 times in a step"),
        (Twice("qk"), rf"^{MIDDLE} fired twice in one step"),
        (Twice("q"), rf"^{MIDDLE}\.to_q fired twice in one step"),
    ],
    ids=["nothing fires", "only k fires", "only q fires", "both fire twice", "q fires twice"],
)
def test_a_layer_that_fires_0_or_2_times_stops_the_run(
    processor: Any, message: str, tmp_path: Path
) -> None:
    pipe = tiny.pipeline()
    cross_attention(pipe.unet)[MIDDLE].set_processor(processor)
    with pytest.raises(CaptureError, match=message) as caught:
        take(tmp_path, pipe)
    assert caught.value.exit_code == 1
    assert any(word in str(caught.value) for word in ("leave it out", "is it fused?"))
    assert only(tmp_path).status == "failed" and len(only(tmp_path).steps) == 0
    assert hooks.count(pipe.unet) == 0


def test_a_run_that_leaves_such_a_layer_out_goes_through(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    cross_attention(pipe.unet)[MIDDLE].set_processor(Twice("qk"))
    assert (
        take(tmp_path, pipe, steps=1, capture={"layers": ("down_blocks.*", "up_blocks.*")}).status
        == "complete"
    )


def test_a_silent_processor_is_neutral_enough_to_be_a_fair_test() -> None:
    asked, pipe = ask(Path()), tiny.pipeline()
    plain = bare(pipe, asked)[-1].next_latents
    cross_attention(pipe.unet)[MIDDLE].set_processor(Silent("qk"))
    torch.testing.assert_close(bare(pipe, asked)[-1].next_latents, plain, rtol=1e-3, atol=1e-3)


def test_fused_projections_are_refused_by_name(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(CaptureError, match=rf"^{DOWN} has fused QKV projections") as caught:
        take(tmp_path, pipe)
    assert "unfuse_qkv_projections" in caught.value.remedy
    pipe.unfuse_qkv_projections(vae=False)
    assert take(tmp_path / "unfused", pipe, steps=1).status == "complete"


def test_a_shared_module_that_runs_twice_is_refused() -> None:
    """Two places of one UNet that are the same module: its output is two values, not one."""
    pipe = tiny.pipeline()
    outputs = ModuleOutputs("unet", pipe.unet, ["unet.mid_block.resnets.0"], [])
    resnet, inputs = pipe.unet.mid_block.resnets[0], (torch.zeros(1, 32, 4, 4), torch.zeros(1, 64))
    with Hooks(outputs.watches()), torch.no_grad():
        resnet(*inputs)
        with pytest.raises(CaptureError, match=r"unet\.mid_block\.resnets\.0 fired twice"):
            resnet(*inputs)


def test_a_tray_wants_each_name_once() -> None:
    tray = Tray(["a", "b"])
    tray.put("a", 1)
    with pytest.raises(CaptureError, match="a fired twice"):
        tray.put("a", 2)
    with pytest.raises(CaptureError, match="b fired 0 times"):
        tray.take()
    tray.put("a", 3)
    tray.put("b", 4)
    assert tray.take() == {"a": 3, "b": 4}


def test_hooks_are_on_only_while_they_are_wanted() -> None:
    """At a step that is not recorded no capture has a hook on the attention layers, and the
    recorded step is read once.
    """
    pipe, asked = pipeline(), ask(Path(), steps=3, capture={"steps": "1"})
    model = StableDiffusion.of(pipe).with_scheduler(asked.scheduler, {})
    settled = plan(model, asked)
    on, taken = [], []
    with Session(model, settled, Taken(taken)) as session:
        conditioning = session.begin()
        steps = denoise(model, conditioning, steps=3, guidance_scale=asked.guidance_scale)
        for index in range(settled.calls):
            with session.watching(index):
                on.append(
                    sum(
                        hooks.count(module)
                        for path, module in pipe.unet.named_modules()
                        if path.endswith("attn2.to_q")
                    )
                )
                step = next(steps)
            session.record(step)
    others = [0] * (settled.calls - 2)
    assert on == [0, len(settled.layers), *others], "a hook is on where it is not wanted"
    assert [any("/cross" in name for name in names) for names in taken] == [
        False,
        True,
        *map(bool, others),
    ]
    assert hooks.count(pipe.unet) == hooks.count(pipe.text_encoder) == 0


def test_a_rehearsal_is_remembered_for_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.pipeline()
    model, made = StableDiffusion.of(pipe), list[tuple[Any, ...]]()
    real = rehearsal._rehearse
    monkeypatch.setattr(rehearsal, "_REHEARSED", {})
    monkeypatch.setattr(
        rehearsal, "_rehearse", lambda *arguments: (made.append(arguments), real(*arguments))[1]
    )
    first = rehearse(model, (1, 4, 8, 8), 2, 77)
    assert rehearse(StableDiffusion.of(tiny.pipeline(seed=1)), (1, 4, 8, 8), 2, 77) is first, (
        "of the same configs"
    )
    for shape, branches, tokens in (
        ((2, 4, 8, 8), 2, 77),
        ((1, 4, 8, 6), 2, 77),
        ((1, 4, 8, 8), 1, 77),
        ((1, 4, 8, 8), 2, 40),
    ):
        assert rehearse(model, shape, branches, tokens) != first
    pipe.vae.enable_slicing()
    rehearse(model, (1, 4, 8, 8), 2, 77)
    rehearse(StableDiffusion.of(tiny.pipeline().to(torch.bfloat16)), (1, 4, 8, 8), 2, 77)
    rehearse(StableDiffusion.of(tiny.pipeline(attention_head_dim=4)), (1, 4, 8, 8), 2, 77)
    assert len(made) == len(rehearsal._REHEARSED) == 8 == rehearsal.REMEMBERED
    rehearse(model, (3, 4, 8, 8), 2, 77)
    assert len(rehearsal._REHEARSED) == 8 and all(
        known is not first for known in rehearsal._REHEARSED.values()
    ), "the oldest one goes"


class Taken:
    """A store that keeps the names of what each step wrote."""

    committed, attributes = 0, {}  # type: ignore[var-annotated]

    def __init__(self, names: list[list[str]]):
        self._names = names

    def write(self, path: str, value: Any, at: Any = ...) -> None:
        pass

    def read(self, path: str, at: Any = ...) -> Any:
        raise AssertionError(f"{path} is not read before the end")

    def annotate(self, **attributes: Any) -> None:
        pass

    def write_step(self, step: int, values: Any, nbytes: int) -> None:
        self._names.append(list(values()))

    def flush(self) -> None:
        pass
