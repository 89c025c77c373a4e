"""What the player draws of a run at first: pictures, a map for each word, curves and notes.

    payload(run)                          # a whole run
    latent_channel(run, 2)                # one channel of its latents, signed

`probe.figures.channels` makes what is asked for later.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from probe.arguments import whole_number
from probe.errors import RecordingNotFound
from probe.figures.channels import axis_of, offers, overview
from probe.figures.drawing import HEAT
from probe.figures.following import following
from probe.figures.payload import Part, finite, pack, pictures
from probe.reading.edited import additions, edit_sentences, edits_in_short
from probe.reading.recording import Run
from probe.reading.sample import called

PANELS = {  # of a generation: title, and what is said below it
    "latents": ("Noisy latents going in", "{channels} numbers a square, shown as colour"),
    "denoised": ("Its guess of the clean picture", "at this step, after guidance"),
    "maps": ("Places that attend", ""),
    "final": ("Finished picture", "after the last step"),
}
NOISED = {  # of a noising
    "source": ("The picture", "what the VAE encoded"),
    "latents": ("With this much noise", "latents that go into the model"),
    "noise": ("The true noise", "the same at every step"),
    "predicted": ("What the model takes for noise", "its prediction"),
    "difference": ("Where it is wrong", "prediction less true noise; grey: right"),
    "denoised": ("Its guess of the clean picture", "at this step alone"),
    "maps": ("Places that attend", ""),
    "decoded": ("The guess, decoded by the VAE", "at this step alone"),
}
ON_PIXELS = {  # what is said otherwise of a model that works on pixels, by kind of recording
    "generation": {"latents": ("Noisy picture going in", "3 numbers a pixel, shown as colour")},
    "noising": {
        "source": ("The picture", "as the model gets it: no VAE"),
        "latents": ("With this much noise", "what goes into the model"),
    },
}
EXACT = 64  # the longest side of a picture that is kept without loss
RGB = ("red", "green", "blue")  # the channels of such a model
LESS, EVEN, MORE = (33, 102, 172), (247, 247, 247), (179, 88, 6)  # colours of a signed number


def payload(run: Run, image: int = 0) -> bytes:
    """Return all that the player shows of a run before something else is asked.

    `image` counts the pictures of a generation, or the draws of noise of a noising. Raise
    RecordingDamaged, RecordingUnreadable, or RecordingNotFound if there is no such image.
    """
    whole_number("image", image, 0)
    axis = axis_of(run)
    if image >= (count := pictures_of(run)):
        raise RecordingNotFound(f"{run.name} has no {axis} {image}.", f"It has 0 to {count - 1}.")
    steps = run.steps
    shown = f"run.preview(run.denoised()).sel(step={{step}}).isel({axis}={image}){{mean}}"
    meta: dict[str, Any] = {
        "name": run.name if called(run.path) == str(run.path) else called(run.path),
        "kind": run.kind,
        "prompt": prompt_of(run),
        "facts": facts(run),
        "status": run.status,
        "following": following(run),
        "calls": int(run.variable("committed").size),
        "steps": steps.tolist(),
        "sigma": finite(run.variable("sigma").values[steps]),
        "timestep": finite(run.variable("timestep").values[steps]),
        "colours": HEAT.astype(int).tolist(),
        "panels": _panels(run),
        "latent_names": _latent_names(run),
        "offers": offers(run),
        "opened": f"import probe\n\nrun = probe.open_run({called(run.path)!r})\n",
        "snippets": {"picture": shown},
        "missing": {},
    }
    meta["curves"] = _curves(run, image) if len(steps) and "latents" in run.tree.children else {}
    parts = _seen(run, image, meta)
    if run.grids and len(steps):
        about, parts["maps"] = overview(run)
        about["snippets"] |= meta["snippets"]
        meta.update(about)
    else:
        meta["missing"]["maps"] = "Attention was not recorded. Record with capture.attention: maps."
    if run.kind == "noising":  # a lesson: only what is there
        meta["panels"] = [panel for panel in meta["panels"] if panel["part"] in parts]
    return pack(meta, parts)


def _panels(run: Run) -> list[dict[str, str]]:
    """Return part, title and note of each picture that stands side by side."""
    panels = PANELS if run.kind == "generation" else NOISED
    if run.attributes.model.on_pixels:
        panels = panels | ON_PIXELS[run.kind]
    channels = len(_latent_names(run)) or "Some"
    return [
        {"part": part, "title": title, "note": note.format(channels=channels)}
        for part, (title, note) in panels.items()
    ]


def _latent_names(run: Run) -> list[str]:
    """Return a name for each channel of the latents; of pixels they are colours."""
    channels = run.latents.sizes["channel"] if "latents" in run.tree.children else 0
    if run.attributes.model.on_pixels and channels == len(RGB):
        return list(RGB)
    return [f"channel {number}" for number in range(channels)]


def pictures_of(run: Run) -> int:
    """Return how many pictures, or draws of noise, a run has."""
    return run.experiment.images if run.kind == "generation" else run.noising.noises


def prompt_of(run: Run) -> str:
    """Return what the model read: the prompt of a generation, or the caption of a noising."""
    return run.experiment.prompt if run.kind == "generation" else run.noising.caption


def facts(run: Run) -> str:
    """Return in a line how a run was made."""
    model, seed = run.attributes.model.name, run.recipe.seed
    model += " (on pixels)" * run.attributes.model.on_pixels
    if run.kind == "noising":
        return f"{model}, noised at {len(run.noising.timesteps)} timesteps, seed {seed}"
    experiment = run.experiment
    scale = experiment.guidance_scale
    guidance = f"guidance {scale:g}" if scale > 1 else "no guidance"
    scheduler = run.attributes.scheduler.kind.removesuffix("Scheduler")
    edits = edits_in_short(dict(run.attributes))
    edited = f", {edits}: {'; '.join(edit_sentences(run.attributes.recipe))}" if edits else ""
    added = additions(run.attributes.recipe)
    edited = f"{', ' * bool(added)}{added}{edited}"
    return f"{model}, {scheduler}, {experiment.steps} steps, {guidance}, seed {seed}{edited}"


def _seen(run: Run, image: int, meta: dict[str, Any]) -> dict[str, Part]:
    """Return the pictures of a run, and say in `meta` which are missing and what records them."""
    parts: dict[str, Part] = {}
    missing, groups = meta["missing"], run.tree.children
    one = {axis_of(run): image}
    if "latents" in groups and len(run.steps):
        if "preview" in groups and np.isfinite(run.variable("preview/latent_to_rgb").values).all():
            parts |= _previews(run, one)
        else:
            missing["latents"] = missing["denoised"] = (
                "Not recorded. Its model came without a preview of latents."
            )
    if "decoded" in groups and not run.attributes.model.on_pixels:  # of pixels it is `denoised`
        decoded = run.variable("decoded/picture").isel(one)
        there = np.isin(decoded["decoded_step"].values, run.steps)
        if there.any():
            meta["decoded_steps"] = decoded["decoded_step"].values[there].tolist()
            parts["decoded"] = pictures(decoded.values[there], lossless=False)
    if run.source is not None:
        parts["source"] = _painted(run.source.values)
    if "images" in groups and run.status == "complete":
        parts["final"] = _painted(run.images.isel(one).values)
    else:
        missing["final"] = "Not yet: the picture is painted after the last step."
    return parts


def _painted(picture: np.ndarray) -> Part:
    """Return a picture (y, x, rgb) uint8 as it is sent: a small one without loss."""
    return pictures(picture[None], lossless=max(picture.shape[:2]) <= EXACT)


def _previews(run: Run, one: dict[str, int]) -> dict[str, Part]:
    """Return latents as small pictures. Noise is shown as colourful as the clean latents are."""
    noisy = run.latents.isel(one).astype("float32").load()
    clean = run.denoised().isel(one).load()
    spread = ("channel", "y", "x")
    size = clean.std(spread) / noisy.std(spread)
    shown = {"latents": noisy * size.fillna(1), "denoised": clean}
    found = {name: pictures(run.preview(values).values) for name, values in shown.items()}
    if run.kind == "noising":
        forward = run.tree["forward"].dataset.isel(one)
        noises = {
            "noise": forward["noise"].expand_dims("step"),
            "difference": forward["difference"].isel(step=run.steps),
            "predicted": run.eps().isel(one),
        }
        slope = run.variable("preview/latent_to_rgb").load() * float(clean.std())
        for name, values in noises.items():
            colour = xr.dot(values.astype("float32").load(), slope, dim="channel")
            colour = ((colour + 0.5).fillna(0).clip(0, 1) * 255).round()  # 0 is grey
            shown_ = colour.astype("uint8").transpose("step", "y", "x", "rgb")
            found[name] = pictures(shown_.values)
    return found


def _curves(run: Run, image: int) -> dict[str, Any]:
    """Return numbers for each step, with a title and a note."""
    axes = ("channel", "y", "x")
    one = {axis_of(run): image}
    found = {}
    if run.kind == "noising":
        forward = run.tree["forward"].dataset.isel(step=run.steps)
        found["loss"] = {
            "title": "Loss: how wrong the model is about the noise",
            "note": "mean square of prediction less target, mean and spread over the draws of "
            "noise; the less noise, the harder to tell from detail",
            "values": finite(forward["loss_mean"].values),
            "spread": finite(forward["loss_spread"].values),
        }
    if {"prediction_cond", "prediction_uncond"} <= set(run.tree["latents"].data_vars):
        cond, uncond = (
            run.prediction(branch).isel(one).astype("float32") for branch in ("cond", "uncond")
        )
        found["guidance"] = {
            "title": "What the prompt changes in the prediction",
            "note": "root mean square of prediction with the prompt less prediction without it",
            "values": finite((((cond - uncond) ** 2).mean(axes) ** 0.5).values),
        }
    chosen = run.prediction().isel(one).astype("float32")
    found["prediction"] = {
        "title": "Size of the prediction",
        "note": "root mean square of what the scheduler gets",
        "values": finite(((chosen**2).mean(axes) ** 0.5).values),
    }
    return found


def latent_channel(run: Run, channel: int, image: int = 0) -> bytes:
    """Return a payload with one channel of the noisy latents as pictures, signed around 0.

    Blue is less than 0 and orange more; the header says how far the colours reach. Raise
    RecordingNotFound if there is no such channel, image, or no latents.
    """
    whole_number("channel", channel, 0)
    whole_number("image", image, 0)
    if "latents" not in run.tree.children or image >= pictures_of(run):
        raise RecordingNotFound(f"{run.name} has no such latents.", "Record with latents.")
    latents = run.latents
    if channel >= latents.sizes["channel"]:
        count = latents.sizes["channel"]
        raise RecordingNotFound(f"{run.name} has no channel {channel}.", f"It has {count}.")
    values = latents.isel({axis_of(run): image, "channel": channel}).astype("float32")
    shown = np.nan_to_num(values.transpose("step", "y", "x").values, posinf=0, neginf=0)
    reach = float(np.abs(shown).max(initial=0))
    share = shown[..., None] / (reach or 1)
    ends = np.where(share < 0, np.array(LESS, np.float32), np.array(MORE, np.float32))
    colours = np.array(EVEN, np.float32) * (1 - np.abs(share)) + ends * np.abs(share)
    note = f"{_latent_names(run)[channel]}, from -{reach:.3g} (blue) to {reach:.3g} (orange)"
    return pack({"note": note}, {"latents": pictures(colours.round().astype(np.uint8))})
