"""The schema says what a recording holds, and a recording with everything on holds exactly that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray as xr
import zarr

from probe.format import dimensions, schema
from probe.format.attributes import Attributes
from probe.format.schema import spec
from probe.format.variables import SCHEMA, Variable
from probe.proof.unknown import check_unknown
from probe.reading.recording import Run
from probe.running.recorder import record, record_noising

ACTIVATIONS = [
    "unet.mid_block",
    "unet.time_embedding",
    "vae.decoder.mid_block",
    "text_encoder.encoder.layers.0",
    "text_encoder.*embeddings",
]
EVERYTHING: dict[str, Any] = {
    "prompt": "An astronaut scuba diving, an astronaut",
    "negative_prompt": "a cat",
    "steps": 3,
    "images": 2,
    "height": 40,
    "width": 24,
    "decode_every": 2,
    "capture": {
        "branches": "both",
        "activations": ACTIVATIONS,
        "self_attention": ["*"],
        "counterfactual": ["*"],
    },
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A recording with everything on, of a picture that is not square, two images of it, on two
    grids.
    """
    output = str(tmp_path_factory.mktemp("runs"))
    return record({**EVERYTHING, "output": output}, pipeline=tiny.pipeline(), progress=False)


def variable_of(group: str, name: str) -> Variable:
    """The entry of the schema for a variable of a recording: found by hand, not by the code under
    test.
    """
    first, _, rest = group.partition("/")
    patterns = {
        "text": "text/{encoder}",
        "attention": "attention/{grid}",
        "self_attention": "self_attention/{grid}",
    }
    wanted = group if not rest else patterns.get(first, f"{first}/{{module}}")
    found = [v for v in SCHEMA if (v.group, v.name) == (wanted, name)]
    assert len(found) == 1, f"{group}/{name} is in the schema {len(found)} times"
    return found[0]


def variables(run: Run) -> dict[tuple[str, str], xr.DataArray]:
    return {
        (node.path.strip("/"), str(name)): node.to_dataset(inherit=False)[name]
        for node in run.tree.subtree
        for name in node.to_dataset(inherit=False).variables
    }


def dtype_of(found: xr.DataArray) -> str:
    return "str" if found.dtype.kind in "OTU" else str(found.dtype)


def test_everything_that_is_recorded_is_in_the_schema(full: Run) -> None:
    for (group, name), found in variables(full).items():
        known = variable_of(group, name)
        if known.dims[-1:] == ("...",):
            assert (
                found.dims[: len(known.dims) - 1] == known.dims[:-1]
                and found.ndim > len(known.dims) - 1
            ), (group, name)
        else:
            assert found.dims == known.dims, (group, name)
        wanted = {"run": "float32", "map": "float16", "any": "float32"}.get(
            known.dtype, known.dtype
        )
        assert dtype_of(found) == wanted, (group, name)
        assert (found.attrs["long_name"], found.attrs["units"]) == (known.long_name, known.units), (
            group,
            name,
        )
        is_coordinate = name in full.tree[f"/{group}"].to_dataset(inherit=False).coords
        assert is_coordinate == known.coordinate, (
            f"{group}/{name}: a coordinate in one of schema and recording only"
        )


@pytest.fixture(scope="module")
def modes(full: Run) -> list[Run]:
    """The same in the other ways of recording attention, a noising, and a model of two text
    encoders.
    """
    asked = {**EVERYTHING, "output": str(full.path.parent)}
    made = [
        record({**asked, "capture": {"attention": mode}}, pipeline=tiny.pipeline(), progress=False)
        for mode in ("queries", "summary")
    ]
    picture, mask = (
        np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8),
        np.arange(32)[:, None] > np.arange(32),
    )
    noised = record_noising(
        picture,
        "a cat",
        {"cat": mask},
        pipeline=tiny.pipeline(),
        progress=False,
        timesteps=[500, 100],
        output=asked["output"],
    )
    encoder = {"activations": ["text_encoder_2.text_projection"], "statistics": False}
    two_encoders = record(
        {**asked, "steps": 1, "decode_every": 0, "capture": encoder},
        pipeline=tiny.xl_pipeline(),
        progress=False,
    )
    return [*made, noised, two_encoders]


def test_everything_in_the_schema_is_recorded(full: Run, modes: list[Run]) -> None:
    made = {variable_of(group, name) for run in (full, *modes) for group, name in variables(run)}
    assert [f"{v.group}/{v.name}" for v in SCHEMA if v not in made] == []


def test_every_variable_is_written_where_the_run_is_complete(full: Run) -> None:
    """No NaN is left in anything, and no number is missing: what is declared is filled."""
    for (group, name), found in variables(full).items():
        if found.dtype.kind == "f":
            assert np.isfinite(found.values).all(), f"{group}/{name}"
        if found.dtype.kind == "u" and name in ("committed", "recorded"):
            assert (found.values == 1).all()


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32")]
)
@pytest.mark.parametrize(("maps", "kind"), [("float32", "float32"), ("sqrt_u8", "uint8")])
def test_types_that_the_run_decides(
    tmp_path: Path, dtype: str, stored: str, maps: str, kind: str
) -> None:
    asked = {
        "prompt": "a cat",
        "steps": 1,
        "guidance_scale": 1,
        "output": str(tmp_path),
        "capture": {"dtype": maps, "activations": ["unet.mid_block"]},
    }
    run = record(asked, pipeline=tiny.pipeline().to(getattr(torch, dtype)), progress=False)
    assert run.attributes["model"]["dtype"] == dtype
    for (group, name), found in variables(run).items():
        wanted = {"run": stored, "any": stored, "map": kind}.get(variable_of(group, name).dtype)
        assert wanted is None or str(found.dtype) == wanted, (group, name)
    assert run.latents.attrs["recorded_dtype"] == dtype
    assert ("encoding" in run.attention().attrs) == (maps == "sqrt_u8")


def test_stored_types_and_chunks(full: Run) -> None:
    """One file a step, and inside it one token a chunk: what a viewer reads is what it asked
    for.
    """
    root = zarr.open_group(full.path, mode="r")
    assert root.metadata.zarr_format == 3
    cross = root["attention/10x6/cross"]
    assert isinstance(cross, zarr.Array)
    assert cross.shards == (1, *cross.shape[1:]) and cross.chunks == (1, 1, *cross.shape[2:])
    latents = root["latents/latents"]
    assert isinstance(latents, zarr.Array) and latents.chunks == (1, *latents.shape[1:])
    for _, member in root.members(max_depth=None):
        if isinstance(member, zarr.Array) and member.metadata.dimension_names is not None:
            assert len(member.metadata.dimension_names) == member.ndim
            checked = "crc32c" in str(member.metadata).lower()
            assert checked or member.dtype.kind in "TOU", f"{member.path} has no checksum"


def test_the_table_has_a_row_for_every_variable() -> None:
    lines = dimensions.schema_table().splitlines()
    assert len(lines) == len(SCHEMA) + 2 and len({line.count("|") for line in lines}) == 1
    for v, line in zip(SCHEMA, lines[2:], strict=True):
        assert (
            line.startswith(f"| `/{v.group}/{v.name}` |" if v.group else f"| `/{v.name}` |")
            and v.long_name in line
        )


# --- dimensions, relations, reserved names --------------------------------------------------------


def test_every_dimension_is_described_and_used() -> None:
    used = {dim for v in SCHEMA for dim in v.dims} - {"..."} | {
        "position",
        "draw",
    }  # of a module's output; of a noising, for `image`
    reserved = {r.name for r in dimensions.RESERVED if r.kind == "dimension"}
    assert used - dimensions.DIMENSIONS.keys() - reserved == set()
    assert dimensions.DIMENSIONS.keys() <= used


def test_what_is_reserved_is_free_or_is_used_as_it_says() -> None:
    for r in dimensions.RESERVED:
        for v in SCHEMA:
            if r.kind in ("coordinate", "variable") and v.name == r.name:
                assert f"/{v.group} ({', '.join(v.dims)})" == r.where, r
    tokens = [r.name for r in dimensions.RESERVED if r.kind == "token"]
    assert tokens == [str(schema.REST), str(schema.PICTURE)] == ["-1", "-2"]
    names = set(Attributes.model_fields)
    assert {r.name for r in dimensions.RESERVED if r.kind == "attribute"} <= names


def parts(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    nodes = {node.path.strip("/"): node.to_dataset(inherit=False) for node in run.tree.subtree}
    sizes = {group: dict(data.sizes) for group, data in nodes.items()}
    return sizes, {
        group: {name: c.values for name, c in data.coords.items()} for group, data in nodes.items()
    }


def test_new_recordings_say_their_format_family_and_rule(full: Run, modes: list[Run]) -> None:
    for run in (full, *modes):
        found = run.attributes
        assert (found.format_version, found.format_status, found.family) == (
            2,
            "draft",
            "sdxl" if run is modes[-1] else "sd",
        )
        assert found.guidance_rule == ("none" if "noising" in found else "classifier_free")
        assert check_unknown(run).verdict == "exact", "every attribute that is written is known"


def test_the_relations_hold_in_what_is_recorded(full: Run, modes: list[Run]) -> None:
    for run in (full, *modes):
        assert list(dimensions.broken(*parts(run), run.attributes.model.f or 1)) == []


def test_a_relation_that_does_not_hold_is_named(full: Run) -> None:
    told = []
    for change in (
        lambda sizes, labels: sizes["images"].update(y=3),
        lambda sizes, labels: sizes["decoded"].update(x=3),
        lambda sizes, labels: sizes["preview"].update(channel=3),
        lambda sizes, labels: labels["text/text_encoder"].update(branch=["cond"]),
        lambda sizes, labels: labels["attention/10x6"].update(token=[0, 78, -1]),
        lambda sizes, labels: labels["attention/10x6"].update(
            layer=labels["attention/5x3"]["layer"]
        ),
    ):
        sizes, labels = parts(full)
        change(sizes, labels)
        told += [next(iter(dimensions.broken(sizes, labels, full.attributes.model.f or 1)))]
    assert [line.split(" ")[0] for line in told] == [
        "/images",
        "/decoded",
        "/preview",
        "/attention/10x6/branch",
        "/attention/10x6/token",
        "/attention/10x6/layer",
    ]


# --- what any schema must keep --------------------------------------------------------------------


def test_names_are_said_once() -> None:
    names = [(v.group, v.name) for v in SCHEMA]
    assert len(names) == len(set(names))
    for v in SCHEMA:
        assert v.long_name and v.units and v.name.islower() and len(set(v.dims)) == len(v.dims)


def test_no_name_clashes_with_a_dimension() -> None:
    """xarray turns a variable named like a dimension into its index: only coordinates of that
    dimension alone may be.
    """
    for group in {v.group for v in SCHEMA}:
        ancestors = {group, "", group.split("/")[0]}
        dims = {d for v in SCHEMA if v.group in ancestors for d in v.dims}
        for v in SCHEMA:
            if v.group == group and v.name in dims:
                assert v.coordinate and v.dims == (v.name,), (
                    f"{group}/{v.name} is named like a dimension"
                )


def test_a_coordinate_means_the_same_wherever_it_is() -> None:
    for name in {v.name for v in SCHEMA if v.coordinate}:
        assert (
            len({(v.dims, v.dtype, v.units) for v in SCHEMA if v.coordinate and v.name == name})
            == 1
        ), name


def test_sizes_that_differ_do_not_meet(full: Run) -> None:
    """A dimension has one size from a group up to the root: otherwise the tree does not open."""
    for node in full.tree.subtree:
        for above in node.parents:
            shared = set(node.to_dataset(inherit=False).sizes) & set(
                above.to_dataset(inherit=False).sizes
            )
            assert all(node.sizes[d] == above.sizes[d] for d in shared)


@pytest.mark.parametrize(
    ("group", "name"),
    [("latents", "latentz"), ("nowhere", "latents"), ("", "latents"), ("attention/8x8", "final")],
)
def test_a_variable_that_the_schema_lacks(group: str, name: str) -> None:
    with pytest.raises(KeyError, match="the schema has no variable"):
        spec(group, name, (1,))


def test_arrays_know_their_place_and_size() -> None:
    cross = spec("attention/8x8", "cross", (5, 3, 1, 1, 2, 2, 8, 8), "float16")
    assert (
        cross.path == "attention/8x8/cross"
        and cross.nbytes == 5 * 3 * 4 * 64 * 2
        and cross.per_step
    )
    assert (
        not spec("", "sigma", value=np.zeros(5)).per_step
        and spec("", "sigma", value=np.zeros(5)).path == "sigma"
    )
    assert spec("unet/mid_block", "activation", (5, 2, 1, 32, 4, 4), "float32").dims == (
        "step",
        "branch",
        "image",
        "channel",
        "y",
        "x",
    )
    assert spec("unet/time", "activation", (5, 2, 1, 64), "float32").dims == (
        "step",
        "branch",
        "image",
        "feature",
    )
    assert spec("text_encoder/layer", "activation", (2, 77, 16), "float32").dims == (
        "branch",
        "position",
        "feature",
    )


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [("16x61", "Did you mean 16x16?"), ("quite else", "There are: 16x16, 8x8.")],
)
def test_near_names(wrong: str, remedy: str) -> None:
    assert schema.near(wrong, ["16x16", "8x8"]) == remedy
