"""What people do to a model before they use it: adapters, processors, slicing, off-loading."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional

from probe.watching.rehearsal import cross_attention

TOKENS = 77


def lora(pipe: Any) -> None:
    torch.manual_seed(5)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False)
    )


def two_loras(pipe: Any) -> None:
    for name, seed in (("one", 5), ("other", 6)):
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config` attribute"
            )  # two adapters are meant here
            pipe.unet.add_adapter(
                peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), name
            )
    pipe.unet.set_adapters(["one", "other"], [0.7, -0.5])


def merged_lora(pipe: Any) -> None:
    lora(pipe)
    pipe.unet.fuse_lora()


def model_offload(pipe: Any) -> None:
    for part in ("text_encoder", "unet", "vae"):
        accelerate.cpu_offload_with_hook(getattr(pipe, part), execution_device=torch.device("cpu"))


def normed_text(pipe: Any) -> None:
    """Cross-attention that normalises the text first: to_k sees it normalised."""
    torch.manual_seed(5)
    for module in cross_attention(pipe.unet).values():
        module.norm_cross = torch.nn.LayerNorm(16)
        torch.nn.init.normal_(module.norm_cross.weight)


class Own:
    """A processor that nobody knows, and that does what the usual one does."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            side.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for side in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        found = self.multiply(query, key, value).transpose(1, 2).flatten(2)
        out: torch.Tensor = attn.to_out[1](attn.to_out[0](found))
        return out

    def multiply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value)


def everywhere(processor: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda pipe: pipe.unet.set_attn_processor(processor())


class Swapped(AttnProcessor):
    """Prompt-to-prompt's way: two tokens exchange their attention, after the softmax."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(side)
            for side in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        shares = attn.get_attention_scores(query, key)
        shares[..., [1, 5]] = shares[..., [5, 1]]
        out: torch.Tensor = attn.to_out[0](attn.batch_to_head_dim(shares @ value))
        return out


class Merging(torch.nn.Module):
    """Token merging in front of to_q: half of the pixels, each standing for two."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden.unflatten(1, (-1, 2)).mean(2))
        return found


def merging(pipe: Any) -> None:
    """Token merging: half of the pixels attend, and each result is used twice."""
    for module in cross_attention(pipe.unet).values():
        module.to_q = Merging(module.to_q)
        module.to_out[0] = torch.nn.Sequential(torch.nn.Upsample(scale_factor=1), module.to_out[0])
    pipe.unet.set_attn_processor(Merged())


class Merged(Own):
    def multiply(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        found = functional.scaled_dot_product_attention(query, key, value)
        return found.repeat_interleave(2, dim=2) if key.shape[2] == TOKENS else found


WORKS: dict[str, Callable[[Any], None]] = {
    "lora": lora,
    "two loras": two_loras,
    "merged lora": merged_lora,
    "sliced attention": lambda pipe: pipe.enable_attention_slicing(1),
    "sliced into many heads": lambda pipe: pipe.enable_attention_slicing("auto"),
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
    "channels last": lambda pipe: [
        part.to(memory_format=torch.channels_last) for part in (pipe.unet, pipe.vae)
    ],
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "plain processor": everywhere(AttnProcessor),
    "unknown processor": everywhere(Own),
    "gradient checkpointing": lambda pipe: (
        pipe.unet.enable_gradient_checkpointing(),
        pipe.unet.train(),
    ),
    "model offload": model_offload,
    "normed text": normed_text,
}
OTHER_MAPS = {"lora", "two loras", "merged lora", "normed text"}
