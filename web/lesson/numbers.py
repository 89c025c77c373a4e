"""The numbers in the lesson's text, from the models' configs and the project's own tables.

`python docs/make.py` writes them to web/lesson/numbers.json. The text has {names} in their place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeAlias

from experiments.emojiworld.world import SETTINGS, SUBJECTS
from probe.diffusion.family import Family
from probe.diffusion.loading import blueprint
from probe.reading.pixels import counts, paper, trained

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "probe" / "emojiworld"
Numbers: TypeAlias = dict[str, float]


def _shapes(model: Family, prefix: str) -> Numbers:
    """Return what comes out of a model's components, and how large they are."""
    unet, text, vae = model.unet.config, model.text_encoder, model.vae
    side = unet.sample_size
    parts = {"text": text, "unet": model.unet, "vae": vae}
    weights = {name: sum(one.numel() for one in part.parameters()) for name, part in parts.items()}
    layers = [layer for layer in model.attention_layers().values() if layer.kind == "cross"]
    return {
        f"{prefix}tokens": text.config.max_position_embeddings,
        f"{prefix}vocabulary": text.config.vocab_size,
        f"{prefix}width": text.config.hidden_size,
        f"{prefix}channels": unet.in_channels,
        f"{prefix}side": side,
        f"{prefix}picture": side * model.f,
        f"{prefix}cross": len(layers),
        **{f"{prefix}weights_{name}": count for name, count in weights.items()},
    }


def _costs() -> Numbers:
    """Return how many times as much a call costs on pixels: counted, and published."""
    table, published = counts(), paper()
    factors = table.factors("sd14", f=table.own_f["sd14"], size=512)
    timed = [row for row in published.rows if row.of_time]
    return {
        "factor_full": round(factors.full),
        "factor_coarse": round(factors.coarse),
        "factor_convolution": round(factors.convolution),
        "attention_up_to": table.attention_up_to,
        "paper_least": round(factors.paper[0], 1),
        "paper_most": round(factors.paper[1], 1),
        "paper_f": timed[0].f,
    }


def _trained() -> Numbers:
    """Return what the trained demonstration came to, on pixels and on latents of f = 4."""
    shown = trained()
    assert shown is not None
    ends = {run["f"]: run["points"][-1] for run in shown["runs"]}
    coders = {one["f"]: one for one in shown["autoencoders"]}
    pixels, latents = ends[1], ends[4]
    shares = {"pixels": pixels["both"], "latents": latents["both"]}
    return {
        "demo_side": shown["pixels"],
        "demo_f": 4,
        "demo_operations": latents["flops"] / pixels["flops"],
        "demo_operations_all": (latents["flops"] + coders[4]["flops"]) / pixels["flops"],
        "demo_pixels_kid": pixels["kid"][0],
        "demo_latents_kid": latents["kid"][0],
        **{f"demo_{name}": share[0] for name, share in shares.items()},
        **{f"demo_{name}_low": share[1] for name, share in shares.items()},
        **{f"demo_{name}_high": share[2] for name, share in shares.items()},
    }


def numbers() -> Numbers:
    """Return every number of the lesson by name; shares lie between 0 and 1."""
    small = blueprint("emojiworld")
    shapes = _shapes(small, "")
    scheduler = json.loads((MODEL / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    latents = shapes["channels"] * shapes["side"] ** 2
    colours = small.vae.config.out_channels
    pixels = colours * shapes["picture"] ** 2
    found: Numbers = {
        "words": len(json.loads((MODEL / "words.json").read_text("utf-8"))),
        "subjects": len(SUBJECTS),
        "settings": len(SETTINGS),
        "timesteps": scheduler["num_train_timesteps"],
        "colours": colours,
        "f": small.f,
        "latent_values": latents,
        "pixel_values": pixels,
        "fewer": pixels / latents,
        **shapes,
        **_shapes(blueprint("sd14"), "sd_"),
        **_costs(),
        **_trained(),
    }
    return {name: round(value, 4) for name, value in found.items()}
