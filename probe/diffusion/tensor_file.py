"""A file of tensors that a recipe names, such as a LoRA: checked, and read once.

    file = read_tensors("loras", "~/loras/ink.safetensors")
    file.tensors, file.digest, file.metadata

Somebody else's file is untrusted input. Only safetensors are read: its header must account for
every byte before a tensor is decoded. The digest is that of the bytes that were decoded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from probe.diffusion.model_files import FLOATS, ModelFolder, header
from probe.errors import ModelError
from probe.settings.fields import expand_home
from probe.text import first_line, shorten, shown

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MOST_BYTES = 4 << 30
AGAIN = "Fetch the file again."
CONVERT = (
    "Convert it once where you trust it: safetensors.torch.save_file(torch.load(FILE, "
    'weights_only=True), "FILE.safetensors").'
)


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds. `digest` is its SHA-256, 16 hex characters.

    `name` is what errors call it: the recipe's field, and the path as it was written.
    """

    name: str
    digest: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def refuse(self, cause: str, remedy: str = AGAIN) -> ModelError:
        """Return the error for this file."""
        return ModelError(f"{self.name}: {cause}", remedy)


def read_tensors(field: str, text: str) -> TensorFile:
    """Return what the file at a path holds, which a recipe's `field` names.

    Raise ModelError for a file that is missing or pickled, that is no safetensors file or is too
    large, and for numbers that are not finite.
    """
    import safetensors.torch

    name, path = f"{field}: {shorten(text, 200)}", expand_home(text)
    _refuse_others(name, text)
    path = path.resolve()
    folder = ModelFolder(path.parent, name, AGAIN)
    for key, weight in header(folder, path.name).items():
        if weight.dtype not in FLOATS:
            raise folder.refuse(
                f"{shown(key)} is of type {weight.dtype}, and only F32, F16, BF16 and F64 are "
                "supported.",
                "Use the file as it was before it was quantized.",
            )
    content = folder.read(path.name, MOST_BYTES)
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as problem:
        raise folder.refuse(f"it could not be read ({shorten(first_line(problem))}).") from problem
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise folder.refuse(f"{shown(key)} holds values that are not finite.")
    length = int.from_bytes(content[:8], "little")
    metadata = folder.parsed(path.name, content[8 : 8 + length]).get("__metadata__", {})
    digest = hashlib.sha256(content).hexdigest()[:16]
    return TensorFile(name, digest, tensors, metadata)


def _refuse_others(name: str, text: str) -> None:
    """Raise ModelError for what is no safetensors file by its name or kind."""
    path = expand_home(text)
    try:
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as problem:
        why = (problem.strerror if isinstance(problem, OSError) else None) or "an impossible name"
        raise ModelError(
            f"{name}: it cannot be looked up ({why}).", "Check the path and its permissions."
        ) from problem
    if not there:
        raise ModelError(
            f"{name}: there is no such file.",
            "Check the path, from the folder you are in; a file that was moved has to come back.",
        )
    if folder:
        raise ModelError(f"{name}: this is a folder.", "Name the .safetensors file in it.")
    if path.suffix in PICKLED:
        raise ModelError(f"{name}: this file is pickled, and can run code when read.", CONVERT)
