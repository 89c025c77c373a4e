"""What lies in a model's folder, checked before a library sees it.

Somebody else's model is untrusted input. Only plain files inside the folder are opened; a hub
snapshot's links into its own repository's blobs count as inside. JSON is read once and within
limits. Weights come from safetensors alone, through indices too. The headers of the weights are
compared with the model that the config describes: every tensor there, no other, every shape right.
Then the tensors are read from the same files: no library chooses others.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from probe.errors import ModelError
from probe.text import first_line, shorten, shown

AGAIN = "Fetch the model again."
COMPLETE = "Is it a diffusers directory (model_index.json, unet/, vae/, ...)?"
COPY = "Copy the model with its files: cp -rL."
CONVERT = (
    "Convert them once where you trust them: "
    "DiffusionPipeline.from_pretrained(...).save_pretrained(folder, safe_serialization=True)."
)
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
MOST_JSON, MOST_INDEX, MOST_HEADER = 1 << 20, 8 << 20, 8 << 20
MOST_TENSORS, MOST_SHARDS = 50_000, 1000
BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 8),
}
FLOATS = ("F64", "F32", "F16", "BF16")
# Keys that mean the same: diffusers renamed the VAE's attention, transformers dropped a wrapper and
# a buffer.
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
WRAPPER, POSITIONS, PROJECTION = "text_model.", "embeddings.position_ids", "text_projection."
TEXT = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Weight:
    """A tensor in a safetensors file, by its header alone. `key` is its name in that file.

    Diffusers' tables for old layouts treat it as a tensor. They ask for some of its rows (queries,
    keys and values that lie in one), for its transpose, or for a convolution of one pixel as a
    matrix.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int] | None = None
    turned: bool = False

    def __getitem__(self, index: Any) -> Weight:
        rows = index[0] if isinstance(index, tuple) else index
        if isinstance(rows, slice) and rows != slice(None):
            start, stop, _ = rows.indices(self.shape[0])
            return replace(self, shape=(max(stop - start, 0), *self.shape[1:]), rows=(start, stop))
        return replace(self, shape=self.shape[:2])

    @property
    def T(self) -> Weight:
        return replace(self, shape=self.shape[::-1], turned=True)

    def clone(self) -> Weight:
        return self

    contiguous = detach = clone

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of the file's tensor that this weight stands for."""
        part = tensor if self.rows is None else tensor[slice(*self.rows)]
        return (part.T if self.turned else part).reshape(self.shape)


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder. `name` is what errors call the model. Every method raises ModelError.

    `again` is the remedy where nothing else helps.
    """

    path: Path
    name: str
    again: str = AGAIN

    def refuse(self, cause: str, remedy: str = "") -> ModelError:
        """Return the error for this model."""
        return ModelError(f"{self.name}: {cause}", remedy or self.again)

    def plain(self, file: str, most: int | None = None) -> Path:
        """Return the path of a plain file inside the folder, of at most `most` bytes."""
        path = self.path / file
        try:
            where, state = path.resolve(), path.stat()
        except (FileNotFoundError, NotADirectoryError) as problem:
            if path.is_symlink():
                raise self.refuse(f"{file} is a link to nothing.") from problem
            raise self.refuse(f"{file} is missing.", COMPLETE) from problem
        except (OSError, RuntimeError, ValueError) as problem:  # a loop of links is a RuntimeError
            raise self._unread(file, problem) from problem
        if not self._inside(where):
            raise self.refuse(f"{file} is a link that leads out of the model's folder.", COPY)
        if not stat.S_ISREG(state.st_mode):
            raise self.refuse(f"{file} is not a plain file.")
        if most is not None and state.st_size > most:
            raise self.refuse(f"{file} has {state.st_size} bytes, and may have {most} at most.")
        return path

    def read(self, file: str, most: int = MOST_JSON) -> bytes:
        """Return the content of a plain file.

        A pipe or a device never blocks, also if it took the file's name a moment ago.
        """
        path = self.plain(file, most)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(path, flags), "rb") as opened:
                if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                    raise self.refuse(f"{file} is not a plain file.")
                content = opened.read(most + 1)
        except OSError as problem:
            raise self._unread(file, problem) from problem
        if len(content) > most:
            raise self.refuse(f"{file} has more than {most} bytes.")
        return content

    def json(self, file: str, most: int = MOST_JSON) -> Any:
        """Return what a JSON file holds.

        It may have no key twice, no NaN or Infinity, no deep nesting and no number of thousands of
        digits.
        """
        return self.parsed(file, self.read(file, most))

    def parsed(self, file: str, content: bytes) -> Any:
        """Return what JSON holds, as `json` does. Errors call it `file`."""
        try:
            return json.loads(content, object_pairs_hook=_once, parse_constant=_no_constant)
        except RecursionError as problem:
            raise self.refuse(f"{file} is nested too deeply to be a model's.") from problem
        except _Odd as problem:
            raise self.refuse(f"{file} {problem}.") from problem
        except ValueError as problem:
            raise self.refuse(f"{file} is not a valid JSON object.") from problem

    def json_object(self, file: str, most: int = MOST_JSON) -> dict[str, Any]:
        """Return the object that a JSON file holds, as `json` does."""
        value = self.json(file, most)
        if not isinstance(value, dict):
            raise self.refuse(f"{file} is not a valid JSON object.")
        return value

    def files(self, folder: str) -> list[str]:
        """Return the names of the entries of a folder inside the model's."""
        path = self.path / folder
        try:
            if not path.is_dir():
                raise self.refuse(f"{folder}/ is missing.", COMPLETE)
            if not self._inside(path.resolve()):
                raise self.refuse(
                    f"{folder}/ is a link that leads out of the model's folder.", COPY
                )
            return sorted(entry.name for entry in path.iterdir())
        except (OSError, RuntimeError) as problem:
            raise self._unread(folder, problem) from problem

    def weights(self, part: str, variant: str | None) -> dict[str, Weight]:
        """Return the tensors of a part by name, from the headers of its files.

        The files are those that diffusers and transformers would choose.
        """
        if variant is not None and not re.fullmatch(r"[\w-]{1,40}", variant):
            raise self.refuse(
                f"{shown(variant)} is not the name of a variant.",
                "Write one such as variant: fp16, or leave variant out.",
            )
        there, suffix = self.files(part), f".{variant}" if variant else ""
        single = f"{STEMS[part]}{suffix}.safetensors"
        ends = dict.fromkeys((f".index{suffix}.json", f"{suffix}.index.json"))
        indices = [f"{STEMS[part]}.safetensors{end}" for end in ends]
        sharded = [self._shards(part, index) for index in indices if index in there]
        if single not in there and not sharded:
            raise self._no_weights(part, variant, there)
        # Where both are there, transformers prefers the one file, and diffusers the index.
        alone = single in there and (part in TEXT or not sharded)
        files = [single] if alone else list(dict.fromkeys(sharded[0].values()))
        weights: dict[str, Weight] = {}
        for file in files:
            for key, weight in header(self, f"{part}/{file}").items():
                if key in weights:
                    other = weights[key].path.name
                    raise self.refuse(f"{part}: {shown(key)} is in {other} and in {file}.")
                weights[key] = weight
        if not alone and (odd := set(weights).symmetric_difference(sharded[0])):
            raise self.refuse(
                f"{part}: the index of the weights and their files do not agree on "
                f"{shown(min(odd))}."
            )
        return weights

    def _shards(self, part: str, index: str) -> dict[str, str]:
        """Return the file of each tensor, as an index names it."""
        listed = self.json_object(f"{part}/{index}", MOST_INDEX).get("weight_map")
        if not isinstance(listed, dict):
            listed = {}
        named = all(isinstance(file, str) for file in listed.values())
        if not named or not 0 < len(listed) <= MOST_TENSORS:
            raise self.refuse(f"{part}/{index} has no weight_map of tensors and their files.")
        for file in dict.fromkeys(listed.values()):
            if not re.fullmatch(r"[\w][\w.-]{0,200}\.safetensors", file):
                raise self.refuse(
                    f"{part}/{index} names {shown(file)}, and only safetensors files of that "
                    "folder are read.",
                    CONVERT,
                )
        if len(set(listed.values())) > MOST_SHARDS:
            raise self.refuse(f"{part}/{index} names more than {MOST_SHARDS} files.")
        return listed

    def _no_weights(self, part: str, variant: str | None, there: list[str]) -> ModelError:
        """Return the error for a part without weights of that variant, by what is `there`."""
        safe = [file for file in there if file.endswith(".safetensors")]
        variants = sorted(
            {shorten(file.split(".")[1].split("-")[0]) for file in safe if file.count(".") > 1}
        )
        plain = [file for file in safe if file.count(".") == 1 and file.startswith(STEMS[part])]
        choices = [f"set variant: {other}" for other in variants if other != variant]
        if plain and (variants or variant is not None):
            choices.append("leave variant out")
        if choices:
            wanted = "without a variant" if variant is None else f"of variant {variant!r}"
            known = ", ".join(variants) or "none"
            remedy = ", or ".join(choices)
            return self.refuse(
                f"{part} has no weights {wanted} (variants there: {known}).",
                f"{remedy[0].upper()}{remedy[1:]}.",
            )
        if safe:
            return self.refuse(
                f"{part} has weights in several files, and no index of them.",
                "Fetch the model again, with its *.index.json files.",
            )
        if any(file.endswith((".bin", ".ckpt", ".pt", ".pth")) for file in there):
            return self.refuse(
                f"{part} has only pickled weights, which can run code when they are read.", CONVERT
            )
        return self.refuse(
            f"{part} has no weights.",
            "Fetch the model whole, or use the bundled one: --model emojiworld.",
        )

    def _inside(self, where: Path) -> bool:
        """Tell whether a resolved path is in the folder.

        A blob of the hub cache's repository that the folder is part of counts as inside.
        """
        own = self.path.resolve()
        repositories = (parent for parent in own.parents if parent.name.startswith("models--"))
        repository = next(repositories, None)
        if repository is not None and where.parent == (repository / "blobs").resolve():
            return True
        return where.is_relative_to(own)

    def _unread(self, file: str, problem: Exception) -> ModelError:
        why = problem.strerror if isinstance(problem, OSError) else None
        return self.refuse(
            f"{file} could not be read: {why or 'a loop of links, or an impossible name'}.",
            "Check the folder, its permissions and its disk.",
        )


class _Odd(Exception):
    """Something that JSON allows and no model's file has."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Odd(f"says {shown(twice)} twice")
    return values


def _no_constant(word: str) -> Any:
    raise _Odd(f"holds {word}, which is no number")


def header(folder: ModelFolder, file: str) -> dict[str, Weight]:
    """Return the tensors of a safetensors file by name, from its header alone.

    The header must account for every byte. Raise ModelError.
    """
    path = folder.plain(file)
    size = path.stat().st_size
    broken = folder.refuse(f"{file} is not a safetensors file, or is cut short.")
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            raise broken
        listed = folder.parsed(file, opened.read(length))
    if not isinstance(listed, dict):
        raise broken
    listed.pop("__metadata__", None)
    if len(listed) > MOST_TENSORS:
        raise folder.refuse(f"{file} holds {len(listed)} tensors, and {MOST_TENSORS} is the most.")
    weights, total = {}, 0
    for key, entry in listed.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, dtype = entry.get("shape"), str(entry.get("dtype"))
        sides: list[Any] = shape if isinstance(shape, list) else [None]
        if dtype not in BITS or not all(type(n) is int and 0 <= n < 2**48 for n in sides):
            raise folder.refuse(
                f"{file}: what it says of {shown(key)} is not what safetensors files say."
            )
        weights[key] = Weight(path, key, tuple(sides), dtype)
        total += math.prod(sides) * BITS[dtype] // 8
    if total != size - 8 - length:
        raise broken
    return weights


def fit(
    folder: ModelFolder, part: str, weights: Mapping[str, Weight], skeleton: torch.nn.Module
) -> dict[str, Weight]:
    """Return the weight for each name in the model's state dict.

    Raise ModelError for a weight that is missing, is not the model's, or has another shape.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    wrapped = WRAPPER if any(key.startswith(WRAPPER) for key in expected) else ""
    fitted: dict[str, Weight] = {}
    for key, weight in weights.items():
        name = _renamed(part, key, wrapped)
        if part in TEXT and name.removeprefix(WRAPPER) == POSITIONS and name not in expected:
            continue
        if name in fitted:
            raise folder.refuse(
                f"{part}: {shown(key)} and {shown(fitted[name].key)} are the same tensor, written "
                "twice."
            )
        fitted[name] = weight
    config = f"{part}/config.json"
    remedy = f"Fetch the model again, and check that {config} is that of these weights."
    if missing := [key for key in expected if key not in fitted]:
        tensor = f"{missing[0]} {_shape(expected[missing[0]])}"
        raise folder.refuse(f"{part}: {tensor} is not in its weights{_more(missing)}.", remedy)
    if over := [key for key in fitted if key not in expected]:
        tensor = f"{shown(fitted[over[0]].key)} {_shape(fitted[over[0]].shape)}"
        raise folder.refuse(
            f"{part}: its weights hold {tensor}, which has no place in the model{_more(over)}.",
            remedy,
        )
    if odd := [key for key in expected if fitted[key].shape != expected[key]]:
        shape, wanted = _shape(fitted[odd[0]].shape), _shape(expected[odd[0]])
        raise folder.refuse(
            f"{part}: {odd[0]} has shape {shape}, and {config} makes it {wanted}{_more(odd)}.",
            remedy,
        )
    if odd := [key for key in fitted if fitted[key].dtype not in FLOATS]:
        raise folder.refuse(
            f"{part}: {odd[0]} is of type {shown(fitted[odd[0]].dtype)}, and only F32, F16, BF16 "
            f"and F64 are supported{_more(odd)}.",
            "Use the model's weights before they were quantized.",
        )
    return fitted


def _renamed(part: str, key: str, wrapped: str) -> str:
    if part in TEXT:
        return key if key.startswith(PROJECTION) else wrapped + key.removeprefix(WRAPPER)
    old = OLD_ATTENTION.fullmatch(key) if part == "vae" else None
    return f"{old[1]}.{ATTENTION[old[2]]}.{old[3]}" if old else key


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _more(keys: list[str]) -> str:
    return f", and {len(keys) - 1} more like it" if len(keys) > 1 else ""


def fill(
    folder: ModelFolder,
    part: str,
    skeleton: torch.nn.Module,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Give a model on the meta device its weights, copied from their files. Return it.

    Raise ModelError if any tensor would be left without a value.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in dict.fromkeys(weight.path for weight in weights.values()):
            with safe_open(path, "pt") as opened:
                tensors |= {
                    name: w.of(opened.get_tensor(w.key)).to(device, dtype, copy=True)
                    for name, w in weights.items()
                    if w.path == path
                }
    except (SafetensorError, OSError) as problem:
        raise folder.refuse(
            f"{part}: the weights could not be read ({shorten(first_line(problem))})."
        ) from problem
    skeleton.load_state_dict(tensors, strict=True, assign=True)
    for owner in skeleton.modules():
        # A buffer of the text encoder, which is in no file.
        if "position_ids" in dict(owner.named_buffers(recurse=False)):
            owner.position_ids = torch.arange(len(owner.position_ids[0]), device=device)[None]  # type: ignore[index]
    held = [
        tensor
        for owner in skeleton.modules()
        for tensor in (*owner.parameters(False), *owner.buffers(False), *vars(owner).values())
    ]
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in held):
        raise folder.refuse(
            f"{part}: a part of it has its values neither from its weights nor from us.",
            "This kind of model is not supported.",
        )
    return skeleton.eval()
