"""Small recordings made without torch and without a model, for the tests of readers and dashboards.

    path = synthetic_recording(folder / "cat.zarr", prompt="a red cat", images=2, size=(8, 12))

Each word is a blob that moves into its place. Maps, moments, sums, labels, digests and the manifest
hold. No model drew it and no scheduler ran, so `probe verify` fails "schedule" and "scheduler".
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from probe.analysis.maps import resize
from probe.figures.sheets import save
from probe.format.schema import (
    BRANCHES,
    FORMAT_STATUS,
    FORMAT_VERSION,
    MOMENTS,
    REST,
    STATISTICS,
    ArraySpec,
    spec,
)
from probe.format.variables import Variable
from probe.proof.map_checks import moments_of
from probe.public import warn_renamed
from probe.reading.recording import Run
from probe.settings.experiment import Experiment, load_experiment
from probe.writing import files
from probe.writing.store import RunWriter

F = 8  # pixels per latent
POSITIONS = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
)
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn2"
HEADS, FEATURES = 2, 6
NOT_PROVEN = ("schedule", "scheduler")  # checks that need a real scheduler


def synthetic_recording(
    path: Path,
    *,
    prompt: str = "a red cat",
    negative_prompt: str = "",
    steps: int = 4,
    images: int = 1,
    size: tuple[int, int] = (8, 8),
    guidance_scale: float = 3.0,
    status: str = "complete",
    unknown: bool = False,
    pictures: bool = False,
    seed: int = 0,
) -> Path:
    """Write a recording and return its path. `size` is that of the latents, (y, x), both even.

    With `status` "interrupted", "failed" or "running" the second half of the steps is missing.
    `unknown` adds a group and an attribute that no version knows, `pictures` the pictures for
    people. The same arguments give the same values.
    """
    seeing = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
    }
    sizes = {"steps": steps, "images": images, "height": F * size[0], "width": F * size[1]}
    rest = {"seed": seed, "decode_every": 1, "capture": {"branches": "both"}, "durability": "none"}
    experiment = load_experiment(seeing | sizes | rest)
    synthetic = _Synthetic(experiment, size)
    arrays = [*synthetic.arrays(), *(_mystery() if unknown else ())]
    attributes = synthetic.attributes()
    if unknown:
        attributes["of_the_future"] = {"octaves": 3}
    committed = steps if status == "complete" else max(1, steps // 2)
    stop = RuntimeError("as asked")
    with contextlib.suppress(RuntimeError), RunWriter(path, arrays, attributes, "none") as writer:
        for step in range(committed):
            values = synthetic.step(step)
            writer.write_step(step, lambda values=values: values, 1)  # type: ignore[misc]
        writer.flush()
        for step in range(committed):
            writer.write("decoded/picture", synthetic.pictures[step], step)
        if status == "complete":
            for name, value in synthetic.sums().items():
                writer.write(name, value)
            if pictures:
                save(Run(path))
            writer.complete()
        elif status == "failed":
            raise stop
    if status == "running":
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"]["status"] = "running"
        files.replace(path / "zarr.json", [json.dumps(root).encode()], sync=False)
    return path


def _mystery() -> Iterator[ArraySpec]:
    variable = Variable("future", "mystery", ("octave",), "float32", "what nobody knows yet")
    yield ArraySpec("future", variable, (3,), "float32", np.arange(3, dtype=np.float32))


@dataclass(frozen=True)
class _Synthetic:
    """The values of a recording."""

    asked: Experiment
    size: tuple[int, int]

    @cached_property
    def draw(self) -> np.random.Generator:
        return np.random.default_rng(self.asked.seed)

    @cached_property
    def branches(self) -> tuple[str, ...]:
        return BRANCHES if self.asked.guidance_scale > 1 else ("cond",)

    @cached_property
    def words(self) -> list[str]:
        return self.asked.prompt.split()

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return np.linspace(0.02, 0.98, self.asked.steps)

    @cached_property
    def grids(self) -> dict[str, tuple[tuple[int, int], tuple[str, ...]]]:
        """Grid and layers of each attention group, the finest first."""
        half = (self.size[0] // 2, self.size[1] // 2)
        return {
            f"attention/{self.size[0]}x{self.size[1]}": (self.size, LAYERS),
            f"attention/{half[0]}x{half[1]}": (half, (MIDDLE,)),
        }

    # --- latents ---

    @cached_property
    def blobs(self) -> np.ndarray:
        """Return one blob a word in its place. *Shape:* (word, y, x)."""
        y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in self.size), indexing="ij")
        centres = self.draw.random((len(self.words), 2, 1, 1))
        blobs: np.ndarray = np.exp(-8 * ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2))
        return blobs

    @cached_property
    def clean(self) -> np.ndarray:
        """Return the clean latents. *Shape:* (image, channel, y, x)."""
        weights = self.draw.standard_normal((self.asked.images, 4, max(1, len(self.words))))
        blobs = self.blobs if len(self.words) else np.zeros((1, *self.size))
        return np.asarray(np.einsum("icw,wyx->icyx", weights, blobs), np.float32)

    @cached_property
    def noise(self) -> np.ndarray:
        return self.draw.standard_normal(self.clean.shape).astype(np.float32)

    @cached_property
    def pictures(self) -> np.ndarray:
        """Return pictures that appear out of the noise. *Shape:* (step, image, y, x, rgb)."""
        signal = np.sqrt(self.alpha_bar)[:, None, None, None, None]
        mixed = signal * self.clean + np.sqrt(1 - signal**2) * self.noise
        colour = (np.moveaxis(mixed[:, :, :3], 2, -1) * 0.2 + 0.5).clip(0, 1) * 255
        return np.asarray(colour.round(), np.uint8).repeat(F, 2).repeat(F, 3)

    def latents(self, step: int) -> dict[str, np.ndarray]:
        a = self.alpha_bar[step]
        cond = self.noise + np.float32(0.01) * self.clean
        values = {
            "latents": (np.sqrt(a) * self.clean + np.sqrt(1 - a) * self.noise).astype(np.float32),
            "prediction_cond": cond,
            "prediction": cond,
        }
        if len(self.branches) > 1:
            uncond = self.noise
            scale = np.float32(self.asked.guidance_scale)
            values |= {"prediction_uncond": uncond, "prediction": uncond + scale * (cond - uncond)}
        return {f"latents/{name}": value for name, value in values.items()}

    # --- attention ---

    def maps(self, step: int, grid: tuple[int, int], layers: int) -> np.ndarray:
        """Return the shares of BOS, words, EOS and the rest.

        *Shape:* (token, branch, image, layer, head, y, x).
        """
        words = resize(self.blobs, grid) if len(self.words) else np.zeros((0, *grid))
        flat = np.full((1, *grid), 0.5)
        scores = np.concatenate([flat, words * (1 + step), flat, 0 * flat])
        bends = 1 + np.arange(layers)[:, None] * 0.3 + np.arange(HEADS)[None] * 0.2
        shape = (len(scores), len(self.branches), self.asked.images, layers, HEADS, *grid)
        spread = scores[:, None, None, None, None] * bends[None, None, None, :, :, None, None]
        shares = np.exp(np.broadcast_to(spread, shape))
        return np.asarray(shares / shares.sum(0), np.float32)

    def step(self, step: int) -> dict[str, np.ndarray]:
        """Return what is written at a step, by path."""
        values = self.latents(step)
        for group, (grid, layers) in self.grids.items():
            maps = self.maps(step, grid, len(layers))
            values[f"{group}/cross"] = maps.astype(np.float16)
            values[f"{group}/moments"] = moments_of(maps).astype(np.float32)
        modules = len(self.modules)
        statistics = np.ones((4, len(self.branches), self.asked.images, modules), np.float32)
        values["unet/statistics"] = statistics * (step + 1)
        return values

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return ("down_blocks.0", "mid_block", "up_blocks.1")

    def sums(self) -> dict[str, np.ndarray]:
        """Return what is written at the end, by path."""
        steps = range(self.asked.steps)
        found: dict[str, np.ndarray] = {}
        layers = sum(len(names) for _, names in self.grids.values())
        overview = []
        stored = [self.step(step) for step in steps]
        for group in self.grids:
            every = [values[f"{group}/cross"].astype(np.float32) for values in stored]
            found[f"{group}/time_sum"] = np.asarray(np.sum(every, 0, dtype=np.float32))
        for values in stored:
            parts = [
                values[f"{g}/cross"].astype(np.float32)[:, -1].mean((1, 3)).sum(1)
                for g in self.grids
            ]
            overview.append(np.sum([resize(part, self.size) for part in parts], 0) / layers)
        found[f"{next(iter(self.grids))}/overview"] = np.stack(overview, 1).astype(np.float32)
        seconds = np.full(self.asked.steps, 0.1)
        found |= {"cost/unet_seconds": seconds, "cost/step_seconds": seconds * 1.5}
        found["cost/seconds"] = np.array([0.1, seconds.sum(), 0.2])
        found["cost/peak_memory"] = np.array(10**8)
        found["latents/final_latents"] = self.clean
        found["images/final"] = self.pictures[-1]
        found["vae/statistics"] = np.ones((4, self.asked.images, 2), np.float32)
        return found

    # --- what there is ---

    def attributes(self) -> dict[str, Any]:
        guided = len(self.branches) > 1
        return {
            "format_version": FORMAT_VERSION,
            "format_status": FORMAT_STATUS,
            "family": "sd",
            "guidance_rule": "classifier_free" if guided else "none",
            "created": f"2026-01-02T03:04:{self.asked.seed % 60:02}.000+00:00",
            "parent_run": None,
            "experiment": self.asked.resolved(),
            "identity": self.asked.identity(),
            "environment": {"device": "cpu", "device_name": "no device", "threads": 1},
            "model": {
                "name": "synthetic",
                "revision": None,
                "dtype": "float32",
                "weights": "none",
                "f": F,
            },
            "scheduler": {"class": "DDIMScheduler", "config": {"num_train_timesteps": 1000}},
            "prediction_type": "epsilon",
            "latent_convention": "variance_preserving",
            "text_rules": 2,
            "read_as": {},
            "cut_from_prompt": {},
        }

    def arrays(self) -> list[ArraySpec]:
        return [*self._loop(), *self._text(), *self._attention(), *self._inside()]

    def _loop(self) -> Iterator[ArraySpec]:
        steps, images = self.asked.steps, self.asked.images
        yield spec("", "step", value=np.arange(steps))
        yield spec("", "timestep", value=np.linspace(980, 20, steps).round())
        yield spec("", "sigma", value=np.sqrt((1 - self.alpha_bar) / self.alpha_bar))
        yield spec("", "alpha_bar", value=self.alpha_bar)
        yield spec("", "committed", (steps,))
        latents = (images, 4, *self.size)
        dtype = {"recorded_dtype": "float32"}
        for path in self.latents(0):
            yield spec("latents", path.partition("/")[2], (steps, *latents), "float32", **dtype)
        yield spec("latents", "final_latents", latents, "float32", **dtype)
        yield spec("latents", "scheduler_sigmas", value=np.linspace(7, 0, steps + 1))
        picture = (images, F * self.size[0], F * self.size[1], 3)
        yield spec("images", "final", picture)
        yield spec("decoded", "decoded_step", value=np.arange(steps))
        yield spec("decoded", "picture", (steps, *picture))
        slope = np.eye(4, 3, dtype=np.float32) * np.float32(0.2)
        yield spec("preview", "latent_to_rgb", value=slope)
        yield spec("preview", "bias", value=np.full(3, 0.5, np.float32))

    def _labels(self, group: str, kept: Sequence[int]) -> Iterator[ArraySpec]:
        """Yield branches, tokens and words, of the positions that are kept."""
        rows = {
            branch: [_label(self._prompt(branch), position) for position in kept]
            for branch in self.branches
        }
        yield spec(group, "branch", value=list(self.branches))
        yield spec(group, "token", value=np.array(kept))
        for column, name in enumerate(("token_text", "word", "word_index")):
            value = [[row[column] for row in rows[branch]] for branch in self.branches]
            yield spec(group, name, value=np.array(value) if name == "word_index" else value)

    def _prompt(self, branch: str) -> list[str]:
        return self.words if branch == "cond" else self.asked.negative_prompt.split()

    def _text(self) -> Iterator[ArraySpec]:
        group, branches = "text/text_encoder", len(self.branches)
        yield from self._labels(group, range(POSITIONS))
        ids = np.arange(branches * POSITIONS).reshape(branches, POSITIONS)
        yield spec(group, "token_id", value=ids)
        values = self.draw.standard_normal((3, branches, POSITIONS, FEATURES)).astype(np.float32)
        for name, value in (
            ("embedding", values[0]),
            ("hidden", values[1:]),
            ("output", values[-1]),
        ):
            yield spec(group, name, dtype="float32", value=value, recorded_dtype="float32")
        causal = np.tri(POSITIONS) / np.arange(1, POSITIONS + 1)[:, None]
        shape = (2, branches, HEADS, POSITIONS, POSITIONS)
        yield spec(group, "attention", value=np.broadcast_to(causal, shape).astype(np.float16))

    def _attention(self) -> Iterator[ArraySpec]:
        kept = [*range(len(self.words) + 2), REST]
        steps = self.asked.steps
        for number, (group, (grid, layers)) in enumerate(self.grids.items()):
            yield from self._labels(group, kept)
            yield spec(group, "layer", value=list(layers))
            yield spec(group, "moment", value=list(MOMENTS))
            yield spec(group, "recorded", value=np.ones(steps, np.uint8))
            part = (len(kept), len(self.branches), self.asked.images, len(layers), HEADS)
            yield spec(group, "cross", (steps, *part, *grid), "float16")
            yield spec(group, "moments", (steps, *part, len(MOMENTS)))
            lengths = self.draw.random((len(self.branches), len(kept), len(layers), HEADS))
            yield spec(group, "value_size", value=lengths.astype(np.float32))
            yield spec(group, "time_sum", (*part, *grid))
            if number == 0:
                yield spec(group, "overview", (len(kept), steps, *grid))

    def _inside(self) -> Iterator[ArraySpec]:
        steps, images = self.asked.steps, self.asked.images
        yield spec("unet", "branch", value=list(self.branches))
        yield spec("unet", "module", value=list(self.modules))
        yield spec("unet", "statistic", value=list(STATISTICS))
        shape = (steps, 4, len(self.branches), images, len(self.modules))
        yield spec("unet", "statistics", shape)
        yield spec("vae", "module", value=["decoder.mid_block", "decoder.up_blocks.0"])
        yield spec("vae", "statistic", value=list(STATISTICS))
        yield spec("vae", "statistics", (4, images, 2))
        yield spec("cost", "component", value=["text_encoder", "unet", "vae"])
        yield spec("cost", "flops", value=np.array([10**6, 10**8, 10**7]))
        parameters = np.array([10**5, 10**6, 10**5])
        yield spec("cost", "parameters", value=parameters)
        yield spec("cost", "weight_bytes", value=4 * parameters)
        yield spec("cost", "unet_seconds", (steps,))
        yield spec("cost", "step_seconds", (steps,))
        yield spec("cost", "seconds", (3,))
        yield spec("cost", "peak_memory", ())


def _label(words: Sequence[str], position: int) -> tuple[str, str, int]:
    """Return text, word and number of the word of a token: each word is one token."""
    if position == REST:
        return "rest", "", -1
    if position == 0:
        return BOS, "", -1
    if position <= len(words):
        return words[position - 1], words[position - 1], position - 1
    return EOS, "", -1


def __getattr__(name: str) -> Any:
    if name == "synthetic":
        old, new = f"{__name__}.synthetic", "probe.testing.synthetic_recording"
        warn_renamed(old, new, since="0.1")
        return synthetic_recording
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
