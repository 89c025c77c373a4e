"""The table of variables: every array that a recording may hold, with dimensions, type and units.

`SCHEMA` is the table. A group in braces stands for several: "attention/{grid}" is attention/16x16
and its neighbours. `probe.format.schema` looks variables up in it and gives them sizes.

Sizes that differ have names that differ, or live in groups of their own: a DataTree refuses a child
whose dimension disagrees with its parent's. So maps are grouped by grid, and the root has no `y`
and no `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Request:
    """What decides which variables a recording has: its recipe and the parts of its model."""

    recipe: Any
    vae: bool
    pooled: bool = False  # whether the model is given this text encoder's pooled embedding


def _always(_: Request) -> bool:
    return True


@dataclass(frozen=True)
class Variable:
    """One kind of variable: a row of the table.

    * `dtype`: a type of numpy, "str", or where the type comes from. "run" is the recording's own
      type, "map" is that of `capture.dtype`, "any" is that of the recorded output.
    * `chunked`: dimensions, beside the step, along which every entry is a chunk of its own.
    * `recorded_only`: only the steps that `capture.steps` chooses are written.
    * `when`: the condition under which a recording has to have it.
    * `first_grid`: among the groups of grids, only the largest grid's has it.
    * `since`: the first format that has it. Recordings of older formats may lack it.
    """

    group: str
    name: str
    dims: tuple[str, ...]
    dtype: str
    long_name: str
    units: str = "1"
    coordinate: bool = False
    when: Callable[[Request], bool] = _always
    chunked: tuple[str, ...] = ()
    recorded_only: bool = False
    first_grid: bool = False
    since: int = 1

    @property
    def per_step(self) -> bool:
        """Whether each step writes one chunk."""
        return self.dims[:1] == ("step",) and len(self.dims) > 1


def _never(_: Request) -> bool:
    return False


def _guided(request: Request) -> bool:
    return bool(request.recipe.guidance[0] > 1)


def _noising(request: Request) -> bool:
    return bool(request.recipe.kind == "noising")


def _from_picture(request: Request) -> bool:
    return _noising(request) or request.recipe.image is not None


def _decoded(request: Request) -> bool:
    return bool(request.recipe.decoded_every)


def _text(request: Request) -> bool:
    return bool(request.recipe.capture.text) and request.recipe.prompt_embeds is None


def _pooled(request: Request) -> bool:
    return request.pooled and _text(request)


def _attention(*modes: str) -> Callable[[Request], bool]:
    chosen = modes or ("maps", "queries", "summary")
    return lambda request: request.recipe.capture.attention in chosen


def _counterfactual(request: Request) -> bool:
    return bool(request.recipe.capture.counterfactual)


def _self_attention(request: Request) -> bool:
    return bool(request.recipe.capture.self_attention)


def _statistics(request: Request) -> bool:
    return bool(request.recipe.capture.statistics)


def _vae_statistics(request: Request) -> bool:
    return request.vae and _statistics(request)


def _var(
    name: str, dims: str, dtype: str, long_name: str, units: str = "1", **more: Any
) -> Variable:
    """Return a variable whose group is not said yet; `dims` are written with spaces between."""
    return Variable("", name, tuple(dims.split()), dtype, long_name, units, **more)


def _coord(name: str, dims: str, dtype: str, long_name: str) -> Variable:
    return _var(name, dims, dtype, long_name, coordinate=True)


def _output(dims: str, more: str = "") -> Variable:
    return _var("activation", dims, "any", "the module's whole output" + more)


def _group(
    group: str,
    *variables: Variable,
    when: Callable[[Request], bool] = _always,
    recorded_only: bool = False,
) -> Iterator[Variable]:
    """Yield variables of one group, under one condition; a variable's own condition goes first.

    With `recorded_only`, those written at each step are written at chosen steps alone.
    """
    for variable in variables:
        own = when if variable.when is _always else variable.when
        chosen = recorded_only and variable.per_step
        yield replace(variable, group=group, when=own, recorded_only=chosen)


# In a noising, `draw` stands for `image` everywhere: `ArraySpec.across`.
_FINAL = "image channel y x"
_LATENT = f"step {_FINAL}"
# Labels that several groups share.
_BRANCH = _coord("branch", "branch", "str", "which prompt: uncond or cond")
_SPELLING = (
    _coord(
        "token_text",
        "branch token",
        "str",
        "the token as text; what is only part of a character as its bytes, \\xf0",
    ),
    _coord("word", "branch token", "str", "the word that the token belongs to"),
    _coord("word_index", "branch token", "int64", "number of that word in the prompt, -1 for none"),
)
_STATISTICS_OF = (
    _coord("module", "module", "str", "dotted path of the module"),
    _coord("statistic", "statistic", "str", "mean, std, min, max"),
)

SCHEMA: tuple[Variable, ...] = (
    *_group(
        "",
        _coord("step", "step", "int64", "index of the model call"),
        _coord("timestep", "step", "float64", "the model's t"),
        _coord("sigma", "step", "float64", "noise level sqrt((1 - alpha_bar) / alpha_bar)"),
        _coord("alpha_bar", "step", "float64", "signal fraction, cumulative product of 1 - beta"),
        _var("committed", "step", "uint8", "1 when everything of this step is written"),
    ),
    *_group(
        "latents",
        _var(
            "latents",
            _LATENT,
            "run",
            "latents that went into the call, in the scheduler's convention",
        ),
        _var(
            "prediction_uncond",
            _LATENT,
            "run",
            "the model's output, unconditional branch",
            when=_guided,
        ),
        _var("prediction_cond", _LATENT, "run", "the model's output, conditional branch"),
        _var("prediction", _LATENT, "run", "what the scheduler got: guided and rescaled"),
        _var(
            "final_latents",
            _FINAL,
            "run",
            "latents after the last step, which the VAE decodes; at f = 1 the pixels, -1 to 1",
        ),
        _var("scheduler_sigmas", "sigma_index", "float64", "the scheduler's whole sigma table"),
    ),
    *_group("images", _var("final", "image y x rgb", "uint8", "the finished pictures")),
    *_group(
        "source",
        _var("picture", "y x rgb", "uint8", "the picture that it began from, as the VAE got it"),
        when=_from_picture,
    ),
    *_group(
        "source",
        _coord("masked", "masked", "str", "what each mask shows, by its word"),
        _var("mask", "masked y x", "uint8", "1 where it is in the picture, given from outside"),
        when=_never,
    ),
    *_group(
        "source",
        _var(
            "psnr", "", "float64", "of the picture after the VAE's round trip, images/final", "dB"
        ),
        when=_noising,
    ),
    *_group(
        "forward",
        _var(
            "clean",
            _FINAL,
            "run",
            "latents of the picture: a sample of the VAE's posterior, in a noising its mean",
        ),
        _var(
            "noise",
            _FINAL,
            "run",
            "the true noise: what was mixed into them, at every step the same",
        ),
        when=_from_picture,
    ),
    *_group(
        "forward",
        _var("denoised", _LATENT, "float32", "the predicted clean latents"),
        _var("difference", _LATENT, "float32", "predicted noise less true noise"),
        _var(
            "loss",
            "step image",
            "float32",
            "mean square of prediction less target, the noise or (v-prediction) the velocity",
        ),
        _var("noise_loss", "step image", "float32", "mean square of the difference"),
        _var("loss_mean", "step", "float64", "of the loss, over the draws of noise"),
        _var(
            "loss_spread",
            "step",
            "float64",
            "its standard deviation over them (n - 1); NaN of one draw",
        ),
        when=_noising,
    ),
    *_group(
        "decoded",
        _coord("decoded_step", "decoded_step", "int64", "index of the model call that was decoded"),
        _var(
            "picture",
            "decoded_step image y x rgb",
            "uint8",
            "the denoised latents of some steps, decoded",
        ),
        when=_decoded,
    ),
    *_group(
        "preview",
        _var(
            "latent_to_rgb",
            "channel rgb",
            "float32",
            "linear map from denoised latents to colour in 0..1",
        ),
        _var("bias", "rgb", "float32", "constant of that map"),
    ),
    *_group(
        "text/{encoder}",
        _BRANCH,
        _coord("token", "token", "int64", "position in the 77 tokens"),
        *_SPELLING,
        _var("token_id", "branch token", "int64", "token ids"),
        _var("embedding", "branch token feature", "run", "token plus position embedding"),
        _var(
            "hidden",
            "text_layer branch token feature",
            "run",
            "output of each layer (SDXL: the last but one is used, clip_skip before it)",
        ),
        _var(
            "output",
            "branch token feature",
            "run",
            "after the last norm: what the UNet is given, also with clip_skip, but for SDXL",
        ),
        _var(
            "attention",
            "text_layer branch text_head token key",
            "float16",
            "self-attention: token at key",
        ),
        _var(
            "pooled",
            "branch pooled_feature",
            "run",
            "pooled embedding, which the UNet is given beside the tokens",
            when=_pooled,
        ),
        when=_text,
    ),
    *_group(
        "attention/{grid}",
        _BRANCH,
        _coord("token", "token", "int64", "token position; -1 is `rest`, the sum of all others"),
        *_SPELLING,
        _coord("layer", "layer", "str", "dotted path of the cross-attention module"),
        when=_attention(),
    ),
    *_group(
        "attention/{grid}",
        _coord("moment", "moment", "str", "mass, centroid_y, centroid_x"),
        _var(
            "cross",
            "step token branch image layer head y x",
            "map",
            "cross-attention: of a pixel's attention, the share of a token",
            chunked=("token",),
        ),
        _var(
            "moments",
            "step token branch image layer head moment",
            "float32",
            "mean and centre (in 0..1) of each map, before storage",
        ),
        when=_attention("maps", "summary"),
        recorded_only=True,
    ),
    *_group(
        "attention/{grid}",
        _coord(
            "head_statistic",
            "head_statistic",
            "str",
            "mass, centroid_y, centroid_x, entropy over space in nats, greatest",
        ),
        _var(
            "head_statistics",
            "step token branch image layer each_head head_statistic",
            "float32",
            "of each head's map, where `cross` is their mean (capture.attention: summary)",
        ),
        when=_attention("summary"),
        recorded_only=True,
    ),
    *_group(
        "attention/{grid}",
        _var(
            "query",
            "step branch image layer head key_feature y x",
            "map",
            "image side of attention: with `key`, every map (capture.attention: queries)",
        ),
        _var(
            "key",
            "branch token layer head key_feature",
            "float32",
            "text side of attention, over sqrt(key_feature)",
        ),
        when=_attention("queries"),
        recorded_only=True,
    ),
    *_group(
        "attention/{grid}",
        _var("recorded", "step", "uint8", "1 where maps were asked for at this step"),
        _var(
            "value_size",
            "branch token layer head",
            "float32",
            "length of what a token writes, v W_O; of rest, the mean",
        ),
        _var(
            "overview",
            "token step y x",
            "float32",
            "maps of the last branch: mean over images and the heads of each layer, then over the "
            "layers of all grids",
            chunked=("token",),
            first_grid=True,
        ),
        _var(
            "time_sum",
            "token branch image layer head y x",
            "float32",
            "sum of the maps over the recorded steps",
            chunked=("token",),
        ),
        when=_attention(),
    ),
    *_group(
        "counterfactual",
        _coord(
            "masked_word", "masked_word", "str", "the word without which the UNet predicted again"
        ),
        _var(
            "change",
            "step masked_word image y x",
            "float32",
            "absolute difference of prediction and prediction without the word, mean over channels",
        ),
        when=_counterfactual,
        recorded_only=True,
    ),
    *_group(
        "self_attention/{grid}",
        _BRANCH,
        _coord("layer", "layer", "str", "dotted path of the self-attention module"),
        _var(
            "self",
            "step branch image layer head y x key_y key_x",
            "map",
            "self-attention: of the place (y, x), the share of (key_y, key_x)",
        ),
        when=_self_attention,
        recorded_only=True,
    ),
    *_group(
        "unet",
        _BRANCH,
        *_STATISTICS_OF,
        _var(
            "statistics",
            "step statistic branch image module",
            "float32",
            "of the module's whole output",
        ),
        when=_statistics,
        recorded_only=True,
    ),
    *_group(
        "vae",
        *_STATISTICS_OF,
        _var(
            "statistics",
            "statistic image module",
            "float32",
            "of the module's whole output, final decoding",
        ),
        when=_vae_statistics,
    ),
    *_group("unet/{module}", _output("step branch image ..."), when=_never, recorded_only=True),
    *_group("vae/{module}", _output("image ...", ", final decoding"), when=_never),
    *_group("text_encoder", _BRANCH, when=_never),
    *_group("text_encoder/{module}", _output("branch ..."), when=_never),
    *_group("text_encoder_2", _BRANCH, when=_never),
    *_group("text_encoder_2/{module}", _output("branch ..."), when=_never),
    *_group(
        "cost",
        _coord("component", "component", "str", "text encoders, unet, vae"),
        _var("unet_seconds", "step", "float64", "time of the UNet's forward pass", "s"),
        _var(
            "step_seconds",
            "step",
            "float64",
            "wall time of the whole step, scheduler and capture included",
            "s",
        ),
        _var("seconds", "component", "float64", "time of the component over the whole run", "s"),
        _var(
            "flops",
            "component",
            "int64",
            "floating point operations of one call, counted on the meta device",
            "FLOP",
        ),
        _var(
            "parameters",
            "component",
            "int64",
            "number of parameters of the whole component",
            since=2,
        ),
        _var(
            "weight_bytes",
            "component",
            "int64",
            "bytes of these parameters in memory, in the number formats in which they ran; buffers"
            " are not counted",
            "byte",
            since=2,
        ),
        _var(
            "peak_memory",
            "",
            "int64",
            "greatest memory of the device (CUDA) or the process (CPU)",
            "byte",
        ),
    ),
)
