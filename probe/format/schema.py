"""What a recording holds: the only place where groups, names, dimensions, types and units are
written.

`SCHEMA` lists every variable; a group in braces stands for several ("attention/{grid}":
attention/16x16, ...).

Sizes that differ have names that differ, or live in groups of their own, because a DataTree refuses
a child whose dimension disagrees with its parent's. That is why maps are grouped by grid and no `y`
or `x` is at the root.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

FORMAT_VERSION = 2  # what is written
FORMAT_STATUS = "draft"  # "final" once this version is frozen
FORMATS_READ = (1, 2)
BRANCHES = ("uncond", "cond")
STATISTICS = ("mean", "std", "min", "max")
MOMENTS = ("mass", "centroid_y", "centroid_x")
HEAD_STATISTICS = (*MOMENTS, "entropy", "greatest")
REST = -1  # the token coordinate of the sum of all tokens that are not kept one by one
PICTURE = (
    -2
)  # reserved: under joint attention, the token coordinate of the sum of all picture tokens


@dataclass(frozen=True)
class Asked:
    """What decides which variables a recording has: its recipe, and whether its model has a VAE."""

    recipe: Any
    vae: bool
    pooled: bool = (
        False  # of a text encoder's group: whether the model is given its pooled embedding
    )


def _always(_: Asked) -> bool:
    return True


def _never(_: Asked) -> bool:
    return False


@dataclass(frozen=True)
class Variable:
    """One kind of variable. `dtype` "run" is the run's own, "map" that of capture.dtype, "any" that
    of the output.

    `chunked` names the dimensions along which each entry is a chunk of its own, beside the step;
    `recorded_only` says that only the steps chosen by capture.steps are written; `when` says
    whether a recording has to have it. In the groups of grids, `first_grid` variables are in that
    of the largest grid alone. `since` is the first format that has it: a recording of an older one
    need not have it.
    """

    group: str
    name: str
    dims: tuple[str, ...]
    dtype: str
    long_name: str
    units: str = "1"
    coordinate: bool = False
    when: Callable[[Asked], bool] = _always
    chunked: tuple[str, ...] = ()
    recorded_only: bool = False
    first_grid: bool = False
    since: int = 1

    @property
    def per_step(self) -> bool:
        """Whether one chunk is written at each step."""
        return self.dims[:1] == ("step",) and len(self.dims) > 1


def _coordinate(
    group: str, name: str, dims: tuple[str, ...], dtype: str, long_name: str, units: str = "1"
) -> Variable:
    return Variable(group, name, dims, dtype, long_name, units, coordinate=True)


def _part(
    when: Callable[[Asked], bool], *variables: Variable, recorded_only: bool = False
) -> Iterator[Variable]:
    """Variables that a recording has under one condition; of those of a step, `recorded_only` ones
    at chosen steps alone.
    """
    for variable in variables:
        yield replace(variable, when=when, recorded_only=recorded_only and variable.per_step)


def _guided(asked: Asked) -> bool:
    return bool(asked.recipe.guidance[0] > 1)


def _from_picture(asked: Asked) -> bool:
    return _noising(asked) or asked.recipe.image is not None


def _noising(asked: Asked) -> bool:
    return bool(asked.recipe.kind == "noising")


def _attention(*modes: str) -> Callable[[Asked], bool]:
    return lambda asked: asked.recipe.capture.attention in (modes or ("maps", "queries", "summary"))


def _pooled(asked: Asked) -> bool:
    return asked.pooled and bool(asked.recipe.capture.text)


def _statistics(asked: Asked) -> bool:
    return bool(asked.recipe.capture.statistics)


# Of a noising, `draw` stands for `image` everywhere: `Array.across`.
_LATENT = ("step", "image", "channel", "y", "x")
_MAP = ("branch", "image", "layer", "head", "y", "x")
SCHEMA: tuple[Variable, ...] = (
    _coordinate("", "step", ("step",), "int64", "index of the model call"),
    _coordinate("", "timestep", ("step",), "float64", "the model's t"),
    _coordinate("", "sigma", ("step",), "float64", "noise level sqrt((1 - alpha_bar) / alpha_bar)"),
    _coordinate(
        "", "alpha_bar", ("step",), "float64", "signal fraction, cumulative product of 1 - beta"
    ),
    Variable("", "committed", ("step",), "uint8", "1 when everything of this step is written"),
    Variable(
        "latents",
        "latents",
        _LATENT,
        "run",
        "latents that went into the call, in the scheduler's convention",
    ),
    Variable(
        "latents",
        "prediction_uncond",
        _LATENT,
        "run",
        "the model's output, unconditional branch",
        when=_guided,
    ),
    Variable(
        "latents", "prediction_cond", _LATENT, "run", "the model's output, conditional branch"
    ),
    Variable(
        "latents", "prediction", _LATENT, "run", "what the scheduler got: guided and rescaled"
    ),
    Variable(
        "latents",
        "final_latents",
        _LATENT[1:],
        "run",
        "latents after the last step, which the VAE decodes",
    ),
    Variable(
        "latents",
        "scheduler_sigmas",
        ("sigma_index",),
        "float64",
        "the scheduler's whole sigma table",
    ),
    Variable("images", "final", ("image", "y", "x", "rgb"), "uint8", "the finished pictures"),
    *_part(
        _from_picture,
        Variable(
            "source",
            "picture",
            ("y", "x", "rgb"),
            "uint8",
            "the picture that it began from, as the VAE got it",
        ),
    ),
    *_part(
        _never,
        _coordinate("source", "masked", ("masked",), "str", "what each mask shows, by its word"),
        Variable(
            "source",
            "mask",
            ("masked", "y", "x"),
            "uint8",
            "1 where it is in the picture, given from outside",
        ),
    ),
    *_part(
        _noising,
        Variable(
            "source",
            "psnr",
            (),
            "float64",
            "of the picture after the VAE's round trip, images/final",
            "dB",
        ),
    ),
    *_part(
        _from_picture,
        Variable(
            "forward",
            "clean",
            _LATENT[1:],
            "run",
            "latents of the picture: a sample of the VAE's posterior, in a noising its mean",
        ),
        Variable(
            "forward",
            "noise",
            _LATENT[1:],
            "run",
            "the true noise: what was mixed into them, at every step the same",
        ),
    ),
    *_part(
        _noising,
        Variable("forward", "denoised", _LATENT, "float32", "the predicted clean latents"),
        Variable("forward", "difference", _LATENT, "float32", "predicted noise less true noise"),
        Variable(
            "forward",
            "loss",
            ("step", "image"),
            "float32",
            "mean square of prediction less target, the noise or (v-prediction) the velocity",
        ),
        Variable(
            "forward", "noise_loss", ("step", "image"), "float32", "mean square of the difference"
        ),
        Variable(
            "forward", "loss_mean", ("step",), "float64", "of the loss, over the draws of noise"
        ),
        Variable(
            "forward",
            "loss_spread",
            ("step",),
            "float64",
            "its standard deviation over them (n - 1); NaN of one draw",
        ),
    ),
    *_part(
        lambda asked: bool(asked.recipe.decoded_every),
        _coordinate(
            "decoded",
            "decoded_step",
            ("decoded_step",),
            "int64",
            "index of the model call that was decoded",
        ),
        Variable(
            "decoded",
            "picture",
            ("decoded_step", "image", "y", "x", "rgb"),
            "uint8",
            "the denoised latents of some steps, decoded",
        ),
    ),
    Variable(
        "preview",
        "latent_to_rgb",
        ("channel", "rgb"),
        "float32",
        "linear map from denoised latents to colour in 0..1",
    ),
    Variable("preview", "bias", ("rgb",), "float32", "constant of that map"),
    *_part(
        lambda asked: bool(asked.recipe.capture.text),
        _coordinate("text/{encoder}", "branch", ("branch",), "str", "which prompt: uncond or cond"),
        _coordinate("text/{encoder}", "token", ("token",), "int64", "position in the 77 tokens"),
        _coordinate(
            "text/{encoder}",
            "token_text",
            ("branch", "token"),
            "str",
            "the token as text; what is only part of a character as its bytes, \\xf0",
        ),
        _coordinate(
            "text/{encoder}",
            "word",
            ("branch", "token"),
            "str",
            "the word that the token belongs to",
        ),
        _coordinate(
            "text/{encoder}",
            "word_index",
            ("branch", "token"),
            "int64",
            "number of that word in the prompt, -1 for none",
        ),
        Variable("text/{encoder}", "token_id", ("branch", "token"), "int64", "token ids"),
        Variable(
            "text/{encoder}",
            "embedding",
            ("branch", "token", "feature"),
            "run",
            "token plus position embedding",
        ),
        Variable(
            "text/{encoder}",
            "hidden",
            ("text_layer", "branch", "token", "feature"),
            "run",
            "output of each layer (SDXL: the last but one is used)",
        ),
        Variable(
            "text/{encoder}",
            "output",
            ("branch", "token", "feature"),
            "run",
            "after the last norm: what the UNet is given, but for SDXL",
        ),
        Variable(
            "text/{encoder}",
            "attention",
            ("text_layer", "branch", "text_head", "token", "key"),
            "float16",
            "self-attention: token at key",
        ),
    ),
    Variable(
        "text/{encoder}",
        "pooled",
        ("branch", "pooled_feature"),
        "run",
        "pooled embedding, which the UNet is given beside the tokens",
        when=_pooled,
    ),
    *_part(
        _attention(),
        _coordinate(
            "attention/{grid}", "branch", ("branch",), "str", "which prompt: uncond or cond"
        ),
        _coordinate(
            "attention/{grid}",
            "token",
            ("token",),
            "int64",
            "token position; -1 is `rest`, the sum of all others",
        ),
        _coordinate(
            "attention/{grid}",
            "token_text",
            ("branch", "token"),
            "str",
            "the token as text; what is only part of a character as its bytes, \\xf0",
        ),
        _coordinate(
            "attention/{grid}",
            "word",
            ("branch", "token"),
            "str",
            "the word that the token belongs to",
        ),
        _coordinate(
            "attention/{grid}",
            "word_index",
            ("branch", "token"),
            "int64",
            "number of that word in the prompt, -1 for none",
        ),
        _coordinate(
            "attention/{grid}",
            "layer",
            ("layer",),
            "str",
            "dotted path of the cross-attention module",
        ),
    ),
    *_part(
        _attention("maps", "summary"),
        _coordinate(
            "attention/{grid}", "moment", ("moment",), "str", "mass, centroid_y, centroid_x"
        ),
        Variable(
            "attention/{grid}",
            "cross",
            ("step", "token", *_MAP),
            "map",
            "cross-attention: of a pixel's attention, the share of a token",
            chunked=("token",),
        ),
        Variable(
            "attention/{grid}",
            "moments",
            ("step", "token", *_MAP[:4], "moment"),
            "float32",
            "mean and centre (in 0..1) of each map, before storage",
        ),
        recorded_only=True,
    ),
    *_part(
        _attention("summary"),
        _coordinate(
            "attention/{grid}",
            "head_statistic",
            ("head_statistic",),
            "str",
            "mass, centroid_y, centroid_x, entropy over space in nats, greatest",
        ),
        Variable(
            "attention/{grid}",
            "head_statistics",
            ("step", "token", *_MAP[:3], "each_head", "head_statistic"),
            "float32",
            "of each head's map, where `cross` is their mean (capture.attention: summary)",
        ),
        recorded_only=True,
    ),
    *_part(
        _attention("queries"),
        Variable(
            "attention/{grid}",
            "query",
            ("step", *_MAP[:4], "key_feature", "y", "x"),
            "map",
            "image side of attention: with `key`, every map (capture.attention: queries)",
        ),
        Variable(
            "attention/{grid}",
            "key",
            ("branch", "token", "layer", "head", "key_feature"),
            "float32",
            "text side of attention, over sqrt(key_feature)",
        ),
        recorded_only=True,
    ),
    *_part(
        _attention(),
        Variable(
            "attention/{grid}",
            "recorded",
            ("step",),
            "uint8",
            "1 where maps were asked for at this step",
        ),
        Variable(
            "attention/{grid}",
            "value_size",
            ("branch", "token", "layer", "head"),
            "float32",
            "length of what a token writes, v W_O; of rest, the mean",
        ),
        Variable(
            "attention/{grid}",
            "overview",
            ("token", "step", "y", "x"),
            "float32",
            "maps of the last branch: mean over images and the heads of each layer, then over the "
            "layers of all grids",
            chunked=("token",),
            first_grid=True,
        ),
        Variable(
            "attention/{grid}",
            "time_sum",
            ("token", *_MAP),
            "float32",
            "sum of the maps over the recorded steps",
            chunked=("token",),
        ),
    ),
    *_part(
        lambda asked: bool(asked.recipe.capture.counterfactual),
        _coordinate(
            "counterfactual",
            "masked_word",
            ("masked_word",),
            "str",
            "the word without which the UNet predicted again",
        ),
        Variable(
            "counterfactual",
            "change",
            ("step", "masked_word", "image", "y", "x"),
            "float32",
            "absolute difference of prediction and prediction without the word, mean over channels",
        ),
        recorded_only=True,
    ),
    *_part(
        lambda asked: bool(asked.recipe.capture.self_attention),
        _coordinate(
            "self_attention/{grid}", "branch", ("branch",), "str", "which prompt: uncond or cond"
        ),
        _coordinate(
            "self_attention/{grid}",
            "layer",
            ("layer",),
            "str",
            "dotted path of the self-attention module",
        ),
        Variable(
            "self_attention/{grid}",
            "self",
            ("step", *_MAP, "key_y", "key_x"),
            "map",
            "self-attention: of the place (y, x), the share of (key_y, key_x)",
        ),
        recorded_only=True,
    ),
    *_part(
        _statistics,
        _coordinate("unet", "branch", ("branch",), "str", "which prompt: uncond or cond"),
        _coordinate("unet", "module", ("module",), "str", "dotted path of the module"),
        _coordinate("unet", "statistic", ("statistic",), "str", "mean, std, min, max"),
        Variable(
            "unet",
            "statistics",
            ("step", "statistic", "branch", "image", "module"),
            "float32",
            "of the module's whole output",
        ),
        recorded_only=True,
    ),
    *_part(
        lambda asked: asked.vae and _statistics(asked),
        _coordinate("vae", "module", ("module",), "str", "dotted path of the module"),
        _coordinate("vae", "statistic", ("statistic",), "str", "mean, std, min, max"),
        Variable(
            "vae",
            "statistics",
            ("statistic", "image", "module"),
            "float32",
            "of the module's whole output, final decoding",
        ),
    ),
    *_part(
        _never,
        Variable(
            "unet/{module}",
            "activation",
            ("step", "branch", "image", "..."),
            "any",
            "the module's whole output",
        ),
        recorded_only=True,
    ),
    *_part(
        _never,
        Variable(
            "vae/{module}",
            "activation",
            ("image", "..."),
            "any",
            "the module's whole output, final decoding",
        ),
        _coordinate("text_encoder", "branch", ("branch",), "str", "which prompt: uncond or cond"),
        Variable(
            "text_encoder/{module}",
            "activation",
            ("branch", "..."),
            "any",
            "the module's whole output",
        ),
        _coordinate("text_encoder_2", "branch", ("branch",), "str", "which prompt: uncond or cond"),
        Variable(
            "text_encoder_2/{module}",
            "activation",
            ("branch", "..."),
            "any",
            "the module's whole output",
        ),
    ),
    _coordinate("cost", "component", ("component",), "str", "text encoders, unet, vae"),
    Variable("cost", "unet_seconds", ("step",), "float64", "time of the UNet's forward pass", "s"),
    Variable(
        "cost",
        "step_seconds",
        ("step",),
        "float64",
        "wall time of the whole step, scheduler and capture included",
        "s",
    ),
    Variable(
        "cost",
        "seconds",
        ("component",),
        "float64",
        "time of the component over the whole run",
        "s",
    ),
    Variable(
        "cost",
        "flops",
        ("component",),
        "int64",
        "floating point operations of one call, counted on the meta device",
        "FLOP",
    ),
    Variable(
        "cost",
        "parameters",
        ("component",),
        "int64",
        "number of parameters of the whole component",
        since=2,
    ),
    Variable(
        "cost",
        "weight_bytes",
        ("component",),
        "int64",
        "bytes of these parameters in memory, in the number formats in which they ran; buffers "
        "are not counted",
        "byte",
        since=2,
    ),
    Variable(
        "cost",
        "peak_memory",
        (),
        "int64",
        "greatest memory of the device (CUDA) or the process (CPU)",
        "byte",
    ),
)
_BY_NAME = {(variable.group, variable.name): variable for variable in SCHEMA}
_TAIL = {3: ("channel", "y", "x"), 2: ("position", "feature"), 1: ("feature",)}


@dataclass(frozen=True)
class Array:
    """A variable of one recording: its place, sizes and type, and its content where that is known
    from the start.
    """

    group: str
    variable: Variable
    shape: tuple[int, ...]
    dtype: str
    value: Any = None
    attributes: dict[str, Any] = field(default_factory=dict)
    across: str = "image"  # what lies along this dimension: pictures, or `draw`, draws of noise

    @property
    def path(self) -> str:
        return f"{self.group}/{self.variable.name}".lstrip("/")

    @property
    def dims(self) -> tuple[str, ...]:
        dims = tuple(self.across if dim == "image" else dim for dim in self.variable.dims)
        return (
            dims if dims[-1:] != ("...",) else (*dims[:-1], *_TAIL[len(self.shape) - len(dims) + 1])
        )

    @property
    def nbytes(self) -> int:
        import numpy as np  # slow: `probe --version` reads this module for one number

        if self.dtype == "str":
            return sum(len(str(text).encode()) + 4 for text in np.asarray(self.value).ravel())
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def per_step(self) -> bool:
        """Whether one chunk is written at each step."""
        return self.variable.per_step


def array(
    group: str,
    name: str,
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    value: Any = None,
    **attributes: Any,
) -> Array:
    """The schema's variable `name` in the recording's `group` ("attention/16x16"), sized by `shape`
    or by its `value`.

    Raises KeyError for a variable that the schema does not have.
    """
    import numpy as np

    variable = _find(group, name)
    if value is not None:
        value = np.asarray(value, dtype=object if variable.dtype == "str" else None)
    kind = dtype or variable.dtype
    return Array(
        group, variable, tuple(value.shape if shape is None else shape), kind, value, attributes
    )


def _find(group: str, name: str) -> Variable:
    first = group.split("/")[0]
    for pattern in (
        group,
        *(
            p
            for p in dict.fromkeys(v.group for v in SCHEMA)
            if "{" in p and p.split("/")[0] == first
        ),
    ):
        if (pattern, name) in _BY_NAME:
            return _BY_NAME[pattern, name]
    raise KeyError(f"the schema has no variable {name!r} in group {group!r}")


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 step", "30 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def near(wrong: str, options: Sequence[str]) -> str:
    """A remedy that names the options nearest to a wrong name."""
    found = difflib.get_close_matches(wrong, options, n=3, cutoff=0.4)
    return (
        f"Did you mean {' or '.join(found)}?"
        if found
        else f"There are: {', '.join(options[:12])}{', ...' if len(options) > 12 else ''}."
    )
