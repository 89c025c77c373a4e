"""A recording's root attributes: their names, their types and their meaning.

    attributes = attributes_of(raw)       # raw: the attributes in the root's zarr.json
    attributes.model.dtype                # typed
    attributes["model"]["dtype"]          # as it is in the file, together with everything unknown

Attributes that are not named here are kept: a newer version's, or a user's own notes. `python -m
probe.format.attributes` prints the JSON Schema. `table()` makes the table in docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
)
from pydantic_core import SchemaValidator

from probe.output import say
from probe.text import UNCLEAN, printable, shorten

# Characters that hide what a text says, as pydantic and JSON Schema write them.
# pydantic refuses lone surrogates itself.
_HIDING = "".join(
    c if c == "-" else f"\\u{ord(c):04x}"
    for c in UNCLEAN.pattern[1:-1].replace("\ud800-\udfff", "")
)
Text = Annotated[str, StringConstraints(max_length=20_000, pattern=f"^[^{_HIDING}]*$")]
Number = Annotated[float, Field(gt=-(2.0**64), lt=2.0**64, allow_inf_nan=False)]
Whole = Annotated[int, Field(gt=-(2**64), lt=2**64)]
Count = Annotated[int, Field(gt=0, lt=2**48)]
Texts = Annotated[dict[Text, Text], Field(max_length=1000)]
List = Annotated[list[Any], Field(max_length=100_000)]


# How the digest of a model's weights is computed: docs/format.md.
MIXED, SHA256 = "mixed-rows", "sha256"


class Part(BaseModel):
    """Attributes that belong together. Their types are strict; unknown attributes are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", defer_build=True)


class Experiment(Part):
    """The recipe of a generation: the whole experiment, with every default.

    Readers need these fields. Other fields are not checked when a recording is opened.
    """

    prompt: Text = Field(description="what the picture shows")
    negative_prompt: Text = Field(description="what guidance leads away from")
    model: Text = Field(description="a bundled name, a hub id or a path")
    steps: Whole = Field(
        description="number of inference steps; some schedulers call the model more often"
    )
    seed: Whole = Field(description="seed of image 0; image i has seed + i")
    guidance_scale: Number = Field(description="diffusers' s; no guidance at 1 and below")
    image: Text | None = Field(None, description="file of the picture that it started from")
    strength: Number = Field(1.0, description="share of that picture that noise replaced")
    images: Whole = Field(1, description="number of images")


class Environment(Part):
    """What decides the last bits of all values: versions, threads, the attention backend."""

    device: Text = Field(description="kind of device: cpu, cuda, ...")
    device_name: Text | None = Field(None, description="the device's own name")


class Model(Part):
    """The model that ran."""

    name: Text = Field(description="a bundled name, a hub id or a path")
    dtype: Text = Field(
        description="number format of the weights; bfloat16 is stored as float32, which is exact"
    )
    revision: Text | None = Field(None, description="commit on the hub")
    weights: Text = Field(
        "unknown",
        description="digest of the weights, without LoRAs; it is there when a step is committed",
    )
    weights_digest: Text = Field(
        SHA256,
        description=f"how `weights` was computed: {MIXED}, or {SHA256} as in older recordings",
    )
    files: Texts = Field(
        {}, description="digest of each file that decided bits beside the model's own, by its path"
    )
    f: Whole | None = Field(
        None, description="pixels per latent along one axis; 1 without a VAE: latents are pixels"
    )
    scaling_factor: Number | None = Field(
        None, description="the factor by which the VAE's latents are multiplied"
    )

    @property
    def on_pixels(self) -> bool:
        """Whether it works on pixels: without a VAE, and its latents are the picture."""
        return self.f == 1


class Scheduler(Part):
    """The scheduler that ran."""

    kind: Text = Field(alias="class", description="its class in diffusers")
    config: dict[str, Any] = Field(
        description="its settings; the only attribute that may hold infinity and NaN"
    )


class Noising(Part):
    """The recipe of a noising, with every default.

    It mixes noise into a real picture, and samples nothing.
    """

    caption: Text = Field(description="what the picture shows")
    picture: Text | None = Field(None, description="file of the picture")
    model: Text = Field(description="a bundled name, a hub id or a path")
    timesteps: Annotated[list[Whole], Field(max_length=10_000)] = Field(
        description="the model's t of every call, the noisiest first"
    )
    noises: Whole = Field(description="number of draws of noise")
    seed: Whole = Field(description="seed of draw 0; draw i has seed + i")


class CudaGraphs(Part):
    """Only of a run on CUDA whose calls of the denoiser may be replayed as CUDA graphs."""

    replayed: Whole = Field(
        description="number of calls that were; their bits are those of eager calls"
    )
    refusal: Text | None = Field(None, description="why no more were")


class Upgraded(Part):
    """Only in a copy that `probe upgrade` made of a recording of an older format."""

    at: Text = Field(description="when it was copied: ISO 8601, UTC")
    from_format: Annotated[int, Field(ge=0, lt=2**64)] = Field(
        description="the format of the older recording"
    )


Requested = TypeVar("Requested", Experiment, Noising)


def _not_null(requested: Requested | None) -> Requested:
    """Raise ValueError for null: the attribute is left out where it says nothing."""
    if requested is None:
        raise ValueError("null asks for nothing")
    return requested


class Attributes(Mapping[str, Any], Part):
    """The root attributes of a recording: typed by name, and by key as they are in the file."""

    model_config = ConfigDict(
        defer_build=False,  # its parts are built within it
        json_schema_extra={
            "anyOf": [{"required": ["experiment"]}, {"required": ["kind", "noising"]}]
        },
    )

    format_version: Annotated[int, Field(ge=0, lt=2**64)] = Field(
        description="version of this format"
    )
    format_status: Text = Field("final", description="`draft` while this version may still change")
    status: Literal["running", "complete", "interrupted", "failed"] = Field(
        description="as its writer left it; a writer that was killed leaves `running`"
    )
    created: Text = Field(description="when it was begun: ISO 8601, UTC")
    kind: Literal["generation", "noising"] = Field(
        "generation",
        description="what was done; in format 1 the attribute `noising` says it",
    )
    experiment: Annotated[Experiment | None, AfterValidator(_not_null)] = None
    noising: Annotated[Noising | None, AfterValidator(_not_null)] = None
    environment: Environment
    model: Model
    scheduler: Scheduler
    prediction_type: Literal["epsilon", "v_prediction"] = Field(
        description="what the model predicts"
    )
    latent_convention: Literal["variance_preserving", "variance_exploding"] = Field(
        description="scale of the latents: divide exploding ones by sqrt(1 + sigma^2)"
    )
    family: Text = Field(
        "sd", description="the model's family: which parts it has, and how they are called"
    )
    guidance_rule: Text | None = Field(
        None, description="how branches become the prediction: `none` or `classifier_free`"
    )
    identity: Text | None = Field(
        None, description="hash of the experiment: equal for equal questions"
    )
    parent_run: Text | None = Field(None, description="name of the recording that it was made from")
    parent_identity: Text | None = Field(
        None, description="of an edited run: the identity of the same experiment without edits"
    )
    edited_texts: Texts = Field(
        {}, description="by branch: the text that was read, where an edit gives the run another one"
    )
    text_rules: Annotated[int, Field(ge=1, le=2)] = Field(
        1, description="version of the rules that split a text into words"
    )
    read_as: Texts = Field(
        {}, description="by branch: the prompt as the tokenizer got it, where that differs"
    )
    cut_from_prompt: Texts = Field(
        {}, description="by branch: the end of the prompt that did not fit"
    )
    zeroed_branches: Annotated[list[Text], Field(max_length=2)] = Field(
        [],
        description="branches that no text encoder read: the model was given zeros, as /text has",
    )
    decoded_not_finite: Annotated[dict[Text, Count], Field(max_length=1000)] = Field(
        {}, description="by variable: how many values were not finite and are stored as 0"
    )
    memory_format: Annotated[
        dict[Text, Literal["contiguous", "channels_last"]], Field(max_length=1000)
    ] = Field({}, description="by tensor: its layout in memory, where that decides bits")
    cuda_graphs: CudaGraphs | None = None
    resumed: List = Field([], description="one entry for each time that it was resumed")
    upgraded: Upgraded | None = None

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def recorded_format(self) -> int:
        """Return the format of the first recording: an upgraded copy has its variables."""
        return self.format_version if self.upgraded is None else self.upgraded.from_format

    @property
    def across(self) -> str:
        """Return the dimension along which pictures lie, or draws of noise."""
        return "draw" if self.kind == "noising" else "image"

    @property
    def recipe(self) -> dict[str, Any]:
        """Return the whole recipe, as it is in the file."""
        recipe: dict[str, Any] = self._raw["noising" if self.kind == "noising" else "experiment"]
        return recipe

    @property
    def texts(self) -> dict[str, str]:
        """Return the text of every branch, as it was typed or made by an edit of the whole run."""
        if self.kind == "noising":
            return {"cond": self.recipe["caption"], "uncond": ""}
        typed = {"cond": self.recipe["prompt"], "uncond": self.recipe["negative_prompt"]}
        return {**typed, **self.edited_texts}

    @property
    def is_guided(self) -> bool:
        """Return whether the model also predicted the unconditional branch."""
        return (
            self.kind == "generation"
            and self.experiment is not None
            and self.experiment.guidance_scale > 1
        )

    def __getitem__(self, name: str) -> Any:
        return self._raw[name]

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # keys, as in a mapping
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


def kind_of(raw: Mapping[str, Any]) -> str:
    """Return what was done: "generation" or "noising".

    In format 1 a noising is known only by the attribute of that name.
    """
    return str(raw.get("kind", "noising" if "noising" in raw else "generation"))


def attributes_of(raw: dict[str, Any]) -> Attributes:
    """Return typed attributes. Raise pydantic's ValidationError."""
    attributes = Attributes.model_validate({"kind": kind_of(raw), **raw})
    attributes._raw = raw
    return attributes


def _as_dicts(schema: Any) -> Any:
    """Return a model's core schema with a plain dict in place of every model.

    It accepts the same values. A check takes 4 us instead of 12, which counts in a list of
    thousands.
    """
    if schema["type"] == "model":
        return _as_dicts(schema["schema"])
    if schema["type"] != "model-fields":
        return {**schema, "schema": _as_dicts(schema["schema"])} if "schema" in schema else schema
    fields = {}
    for name, field in schema["fields"].items():
        optional = field["schema"]["type"] == "default"
        inner = field["schema"]["schema"] if optional else field["schema"]
        entry = {"type": "typed-dict-field", "schema": _as_dicts(inner), "required": not optional}
        fields[field.get("validation_alias", name)] = entry
    return {
        "type": "typed-dict",
        "fields": fields,
        "extra_behavior": "ignore",
        "config": {"strict": True},
    }


_CHECK = SchemaValidator(_as_dicts(Attributes.__pydantic_core_schema__))


def problem_of(raw: object) -> str | None:
    """Return what is wrong with a recording's attributes, as the end of a sentence, or None."""
    try:
        _CHECK.validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"] if part != "[key]")
        path = shorten(printable(path))
        if first["type"] == "missing":
            return f"its {path} is missing"
        expected = first["msg"].removeprefix("Input should be ")
        expected = "" if expected == first["msg"] else f", {expected}"
        return f"its {path} is not what a recording has there{expected}"
    assert isinstance(raw, dict)
    recipe = "noising" if kind_of(raw) == "noising" else "experiment"
    return None if recipe in raw else f"its {recipe} is missing"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the attributes."""
    return Attributes.model_json_schema(by_alias=True)


def table() -> str:
    """Return the attributes as a Markdown table."""
    return "\n".join(["| attribute | type | what it is |", "|---|---|---|", *_rows(Attributes, "")])


def _rows(part: type[Part], above: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        path = f"{above}{field.alias or name}"
        needed = "" if field.is_required() else ", optional"
        types = (field.annotation, *get_args(field.annotation))
        parts = [kind for kind in types if isinstance(kind, type) and issubclass(kind, Part)]
        if parts:
            what = " ".join((parts[0].__doc__ or "").split())
            yield f"| `{path}` | object{needed} | {what} |"
            yield from _rows(parts[0], f"{path}.")
        else:
            kind = _kind(part, field.alias or name)
            yield f"| `{path}` | {kind}{needed} | {field.description} |"


def _kind(part: type[Part], name: str) -> str:
    """Return the type of an attribute, in JSON's words."""
    schema = part.model_json_schema(by_alias=True)["properties"][name]
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
    if "enum" in choices[0]:
        return " or ".join(f"`{value}`" for value in choices[0]["enum"])
    return str(choices[0]["type"])


if __name__ == "__main__":
    say(*json.dumps(json_schema(), indent=2).split("\n"))
