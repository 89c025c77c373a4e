"""The dimensions of a recording, how its groups relate, and the names that are reserved.

`probe.format.schema` says what each variable is. This module says what holds between them; `broken`
yields what does not hold. `python docs/make.py` writes its tables into docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np

from probe.format.schema import PICTURE, REST
from probe.format.variables import SCHEMA

DIMENSIONS: dict[str, str] = {
    "step": "model calls, in the order of the loop; equally many in every group",
    "image": "pictures drawn together",
    "draw": "draws of noise: a noising has it instead of `image`. Format 1 called it `image`",
    "channel": "channels of the latents, or of a module's output",
    "y": "rows from the top: of latents, of pixels or of an attention grid, each in its own group",
    "x": "columns from the left, as y",
    "rgb": "red, green, blue",
    "branch": "what the model was called with: uncond, cond; only those that were kept",
    "token": "token positions that were kept one by one, then the sums of the others",
    "feature": "features of an embedding or of a module's output",
    "pooled_feature": "features of a pooled embedding",
    "position": "positions in a sequence, of a module's output",
    "layer": "attention modules of one grid, in the order in which they run",
    "head": "heads of an attention layer; of length 1 where only their mean was kept",
    "each_head": "all heads, where `head` holds their mean",
    "moment": "mass, centroid_y, centroid_x",
    "head_statistic": "mass, centroid_y, centroid_x, entropy, greatest",
    "key_feature": "features of a head's query and key",
    "key_y": "rows of the pixel that is looked at",
    "key_x": "columns of the pixel that is looked at",
    "text_layer": "layers of the text encoder, first to last",
    "text_head": "heads of the text encoder",
    "key": "token position that is looked at, in the text encoder",
    "masked": "masks that were given for the picture",
    "masked_word": "words without which the model predicted again",
    "decoded_step": "steps whose denoised latents were decoded",
    "sigma_index": "entries of the scheduler's own table of sigmas",
    "module": "modules of the model, in the order in which they run",
    "statistic": "mean, std, min, max",
    "component": "parts of the model: text encoders, denoiser, vae",
}


@dataclass(frozen=True)
class Relation:
    """What holds between two groups, in every recording that has both. A `*` stands for any name.

    "sizes": `of` has the sizes of `to` along `names`. "f times": those times the attribute model.f.
    "among": `to` has every label that `of` has; labels below 0 are sums, and pass. "apart": no
    label is in two groups.
    """

    of: str
    how: Literal["sizes", "f times", "among", "apart"]
    to: str
    names: tuple[str, ...]
    meaning: str


_YX = ("y", "x")
RELATIONS: tuple[Relation, ...] = (
    Relation("images", "f times", "latents", _YX, "a latent stands for f x f pixels"),
    Relation(
        "decoded",
        "sizes",
        "images",
        ("image", "draw", *_YX),
        "pictures of some steps are as large as the last",
    ),
    Relation("source", "sizes", "images", _YX, "the picture that it started from, as encoded"),
    Relation(
        "forward",
        "sizes",
        "latents",
        ("image", "draw", "channel", *_YX),
        "noise and clean latents are as large as the latents",
    ),
    Relation(
        "preview",
        "sizes",
        "latents",
        ("channel",),
        "the preview maps each channel of the latents to colour",
    ),
    Relation(
        "counterfactual",
        "sizes",
        "latents",
        ("image", "draw", *_YX),
        "what a word changed, at each latent",
    ),
    Relation("attention/*", "sizes", "latents", ("image", "draw"), "maps of every image, or draw"),
    Relation(
        "attention/*",
        "among",
        "text/*",
        ("branch", "token"),
        "a map's token is one of the text encoder's",
    ),
    Relation("attention/*", "apart", "attention/*", ("layer",), "a layer works on one grid"),
    Relation(
        "self_attention/*", "sizes", "latents", ("image", "draw"), "maps of every image, or draw"
    ),
    Relation(
        "self_attention/*", "apart", "self_attention/*", ("layer",), "a layer works on one grid"
    ),
)


@dataclass(frozen=True)
class Reserved:
    """A name whose meaning is fixed before anything is recorded under it."""

    kind: Literal["token", "coordinate", "variable", "dimension", "attribute"]
    name: str
    where: str
    meaning: str


RESERVED: tuple[Reserved, ...] = (
    Reserved(
        "token",
        str(REST),
        "/attention/{grid}/token",
        "`rest`: the sum of all text tokens that are not kept one by one",
    ),
    Reserved(
        "token",
        str(PICTURE),
        "/attention/{grid}/token",
        "`picture`: under joint attention, the sum of all picture tokens; with it, rows sum to 1",
    ),
    Reserved(
        "coordinate",
        "token_encoder",
        "/attention/{grid} (token)",
        "the text encoder of the token, where several are joined along the tokens",
    ),
    Reserved(
        "dimension", "stream", "/unet and its groups", "a joint block's outputs: picture, text"
    ),
    Reserved("attribute", "family", "root", "the model's family: which parts it has"),
    Reserved(
        "attribute",
        "guidance_rule",
        "root",
        "how branches become the prediction; with an unknown rule, read `prediction` as it is",
    ),
)

FAMILIES: dict[str, str] = {
    "sd": "Stable Diffusion 1.x and 2.x",
    "sdxl": "Stable Diffusion XL, with SDXL-Turbo and SSD-1B",
}
# By family: its text encoders, and those whose pooled embedding the model is given.
TEXT_ENCODERS: dict[str, tuple[str, ...]] = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
}
POOLED: dict[str, tuple[str, ...]] = {"sd": (), "sdxl": ("text_encoder_2",)}
# Families that may be given zeros for an empty negative prompt.
ZEROED = ("sdxl",)
GUIDANCE_RULES: dict[str, str] = {
    "none": "one branch: the prediction is prediction_cond",
    "classifier_free": "uncond + guidance_scale (cond - uncond), then rescaled by guidance_rescale",
}

Sizes = Mapping[str, Mapping[str, int]]  # by group, by dimension
Labels = Mapping[str, Mapping[str, Any]]  # by group, by name of the coordinate


def broken(sizes: Sizes, labels: Labels, f: int) -> Iterator[str]:
    """Yield every relation that does not hold, as a sentence."""
    for relation in RELATIONS:
        for of in _matching(relation.of, sizes):
            for to in _matching(relation.to, sizes):
                if relation.how == "apart":
                    yield from _shared(relation, of, to, labels) if of < to else ()
                elif relation.how == "among":
                    yield from _strays(relation, of, to, labels)
                else:
                    yield from _unlike(
                        relation, of, to, sizes, f if relation.how == "f times" else 1
                    )


def _matching(pattern: str, groups: Sizes) -> list[str]:
    return [
        group
        for group in groups
        if fnmatchcase(group, pattern) and group.count("/") == pattern.count("/")
    ]


def _unlike(relation: Relation, of: str, to: str, sizes: Sizes, times: int) -> Iterator[str]:
    for name in relation.names:
        here, there = sizes[of].get(name), sizes[to].get(name)
        if here is not None and there is not None and here != times * there:
            yield f"/{of} has {here} along {name}, /{to} has {there}, and {relation.meaning}"


def _strays(relation: Relation, of: str, to: str, labels: Labels) -> Iterator[str]:
    for name in relation.names:
        if name in labels[of] and name in labels[to]:
            here, known = np.asarray(labels[of][name]), set(np.asarray(labels[to][name]).tolist())
            strays = [label for label in here.tolist() if label not in known]
            if here.dtype.kind == "i":
                strays = [label for label in strays if label >= 0]
            if strays:
                yield (
                    f"/{of}/{name} holds {strays[0]!r}, which /{to}/{name} does not: "
                    f"{relation.meaning}"
                )


def _shared(relation: Relation, of: str, to: str, labels: Labels) -> Iterator[str]:
    for name in relation.names:
        here, there = (np.asarray(labels[group].get(name, [])).tolist() for group in (of, to))
        if both := set(here) & set(there):
            yield f"/{of}/{name} and /{to}/{name} both hold {min(both)!r}: {relation.meaning}"


# --- tables ---------------------------------------------------------------------------------------


def schema_table() -> str:
    """Return the schema as a Markdown table."""
    rows = []
    for v in SCHEMA:
        path = f"/{v.group}/{v.name}".replace("//", "/")
        since = f" (since format {v.since})" if v.since > 1 else ""
        cells = (f"`{path}`", ", ".join(v.dims), v.dtype, v.units, v.long_name + since)
        rows.append(f"| {' | '.join(cells)} |")
    head = ["| variable | dimensions | type | unit | what it is |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def dimensions_table() -> str:
    """Return the dimensions as a Markdown table."""
    return "\n".join(
        [
            "| dimension | what it counts |",
            "|---|---|",
            *(f"| `{name}` | {text} |" for name, text in DIMENSIONS.items()),
        ]
    )


def relations_table() -> str:
    """Return the relations between groups as a Markdown table."""
    phrases = {
        "sizes": "has the {} of",
        "f times": "has f times the {} of",
        "among": "has each {} from",
        "apart": "shares no {} with another",
    }
    rows = [
        f"| `/{r.of}` | {phrases[r.how].format(', '.join(r.names))} | `/{r.to}` | {r.meaning} |"
        for r in RELATIONS
    ]
    return "\n".join(["| group | relation | group | why |", "|---|---|---|---|", *rows])


def reserved_table() -> str:
    """Return the reserved names as a Markdown table."""
    rows = [f"| {r.kind} | `{r.name}` | {r.where} | {r.meaning} |" for r in RESERVED]
    return "\n".join(["| kind | name | where | meaning |", "|---|---|---|---|", *rows])


def families_table() -> str:
    """Return the families of models as a Markdown table."""
    return "\n".join(
        [
            "| `family` | models |",
            "|---|---|",
            *(f"| `{name}` | {text} |" for name, text in FAMILIES.items()),
        ]
    )


def guidance_table() -> str:
    """Return the rules of guidance as a Markdown table."""
    return "\n".join(
        [
            "| `guidance_rule` | the prediction |",
            "|---|---|",
            *(f"| `{name}` | {text} |" for name, text in GUIDANCE_RULES.items()),
        ]
    )
