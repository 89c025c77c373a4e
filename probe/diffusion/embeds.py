"""Text embeddings from a file, in place of what the text encoders make of a prompt.

    embeds, digest = read_embeds(model, "prompt.safetensors", ("uncond", "cond"))
    embeds["cond"]["encoder_hidden_states"]            # (1, token, feature)

The file has the arguments of diffusers' pipelines as its keys: `prompt_embeds` and
`negative_prompt_embeds`; for Stable Diffusion XL `pooled_prompt_embeds` and
`negative_pooled_prompt_embeds` too. The text encoders read nothing then. A prompt that is written
beside them labels their places with its words; nothing proves that it is theirs. Without one the
places have no words (`unlabelled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from probe.diffusion.family import TEXT, UNCOND, Arguments, Family, Tokens
from probe.diffusion.prompts import Prompt
from probe.diffusion.tensor_file import read_tensors
from probe.text import shown

FIELD = "prompt_embeds"
REMEDY = "Save what pipeline.encode_prompt returns for this model, by diffusers' names."


def read_embeds(
    model: Family, path: str, branches: Sequence[str]
) -> tuple[dict[str, Arguments], str]:
    """Return the denoiser's arguments of each branch, one row each, and the digest of the file.

    Raise ModelError for a file that is not safe to read, lacks a branch, or fits another model.
    """
    file = read_tensors(FIELD, path)
    tokens = next(tokenizer.model_max_length for _, tokenizer in model.text_encoders().values())
    wanted = {name: tuple(value.shape) for name, value in model.blank(1, tokens).items()}
    known = {_key(branch, name) for branch in ("cond", UNCOND) for name in wanted}
    if odd := [key for key in file.tensors if key not in known]:
        raise file.refuse(
            f"it holds {shown(odd[0])}; the keys for this model are {', '.join(sorted(known))}.",
            REMEDY,
        )
    for branch in branches:
        for name, shape in wanted.items():
            key = _key(branch, name)
            if key not in file.tensors:
                without = ", or set guidance_scale: 1" if branch == UNCOND else ""
                raise file.refuse(f"it has no {key}.", f"{REMEDY[:-1]}{without}.")
            if (own := tuple(file.tensors[key].shape)) != shape:
                raise file.refuse(
                    f"its {key} has shape {own}, and {model.name} takes {shape}.", REMEDY
                )
    embeds: dict[str, Arguments] = {
        branch: {
            name: file.tensors[_key(branch, name)].to(model.device, model.dtype) for name in wanted
        }
        for branch in branches
    }
    return embeds, file.digest


def _key(branch: str, name: str) -> str:
    """Return the key of a branch's argument in the file, as diffusers calls it."""
    own = FIELD if name == TEXT else f"pooled_{FIELD}"
    return f"negative_{own}" if branch == UNCOND else own


def unlabelled(read: Mapping[str, Tokens]) -> dict[str, Tokens]:
    """Return the texts of branches, those that are empty without tokens and words.

    An empty text is then none, and no text encoder read it.
    """
    return {
        branch: tokens
        if next(iter(tokens.values())).text
        else {encoder: _unlabelled(prompt) for encoder, prompt in tokens.items()}
        for branch, tokens in read.items()
    }


def _unlabelled(prompt: Prompt) -> Prompt:
    count = len(prompt.tokens)
    return replace(prompt, ids=torch.zeros_like(prompt.ids), tokens=("",) * count, end=count - 1)


def remark(path: str, texts: Mapping[str, str]) -> str:
    """Return what people should know of a run with embeddings from a file."""
    labelled = "has no prompt, so its places have no words."
    if texts["cond"]:
        labelled = "is labelled with the words of the prompt; nothing proves that they are its own."
    return f"No text encoder reads the prompt: what the UNet is told is {path}. It {labelled}"
