"""A capture: what a word did to the prediction, by the prediction with and without it.

    changes = word_changes(model, step, embeddings)        # (word, image, y, x)

At a recorded step the UNet is called once more on the same latents: with the prompt, and with the
prompt without each word. A word is left out by replacing its tokens with the padding token, so that
the others keep their positions. All are in one batch, so that only the word makes a difference. The
picture being drawn is not touched.

Attention tells where a word was looked at. This tells what it changed: a word may be looked at and
change nothing, or act through other tokens, which read it in the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from probe.diffusion.family import TEXT, Arguments, Family, Tokens, stacked
from probe.diffusion.prompts import Prompt
from probe.diffusion.sampling import Step
from probe.errors import ExperimentError, ModelError
from probe.format.schema import ArraySpec, near, spec
from probe.watching.interface import Capture, Plan, Values
from probe.words import STUMP, alike


class Counterfactual(Capture):
    """|prediction - prediction without a word|: (masked_word, image, y, x) at the recorded steps.

    Each such step calls the UNet once more.
    """

    component, calls_model = "", True

    def __init__(self, model: Family, plan: Plan):
        refuse_unlike(model, plan.tokens["cond"])
        self._model, self._plan = model, plan
        self._arguments: Arguments | None = None

    def arrays(self) -> list[ArraySpec]:
        plan, words = self._plan, list(self._plan.words)
        shape = (plan.calls, len(words), plan.rows.images, *plan.latent_shape[2:])
        return [
            spec("counterfactual", "masked_word", value=words),
            spec("counterfactual", "change", shape),
        ]

    def wants(self, index: int, first: bool) -> bool:
        return index in self._plan.recorded

    def take(self, step: Step) -> Values:
        if self._arguments is None:
            self._arguments = embeddings_without(
                self._model, self._plan.tokens["cond"], self._plan.words
            )
        return {"counterfactual/change": word_changes(self._model, step, self._arguments)}


def chosen_words(prompt: Prompt, wanted: tuple[str, ...]) -> dict[str, list[int]]:
    """Return the token positions of a prompt's words that are wanted, by their text.

    "*" wants every word. A word that is there several times has all its positions. Capital letters
    make no difference, as for the text encoder. Raise ExperimentError for a word that is not in the
    prompt.
    """
    same = alike if prompt.rules > 1 else str.casefold
    first: dict[str, str] = {}
    positions: dict[str, list[int]] = {}
    for position, of in enumerate(prompt.word_of):
        if of >= 0:
            text = first.setdefault(same(prompt.words[of]), prompt.words[of])
            positions.setdefault(text, []).append(position)
    if wanted and not positions:
        raise ExperimentError(
            "capture.counterfactual: the prompt has no words to leave out.",
            "Write a prompt, or leave capture.counterfactual out.",
        )
    chosen: dict[str, list[int]] = {}
    for word in wanted:
        meant = same(word.removesuffix(STUMP))
        texts = [text for text in positions if word == "*" or same(text) == meant]
        if not texts:
            raise ExperimentError(
                f"capture.counterfactual: {word!r} is not a word of {prompt.text!r}.",
                near(word, list(positions)),
            )
        chosen |= {text: positions[text] for text in texts}
    return chosen


def without(prompt: Prompt, positions: list[int], padding: int) -> Prompt:
    """Return the prompt with some of its tokens replaced by the padding token."""
    ids = prompt.ids.clone()
    ids[0, positions] = padding
    return replace(prompt, ids=ids)


def embeddings_without(
    model: Family, tokens: Tokens, words: Mapping[str, list[int]]
) -> dict[str, torch.Tensor]:
    """Return the denoiser's arguments for the prompt, then for the prompt without each word.

    They have 1 + word rows. `words` has positions in the first text encoder's tokens. Every text
    encoder reads the prompt without the word, so that the pooled embedding is without it too.
    """
    first = next(iter(tokens.values()))
    padding = {
        encoder: int(tokenizer.pad_token_id)
        for encoder, (_, tokenizer) in model.text_encoders().items()
    }
    readings = [tokens]
    for positions in words.values():
        masked = {
            name: without(prompt, _places(prompt, first, positions), padding[name])
            for name, prompt in tokens.items()
        }
        readings.append(masked)
    return stacked([model.encode_prompt(reading) for reading in readings])


def _places(prompt: Prompt, first: Prompt, positions: list[int]) -> list[int]:
    """Return where a prompt has the words that are at `positions` of its `first` reading."""
    numbers = {first.word_of[position] for position in positions}
    return [position for position, of in enumerate(prompt.word_of) if of in numbers]


def refuse_unlike(model: Family, tokens: Tokens) -> None:
    """Raise ModelError if leaving a word out would mean different things to the text encoders.

    They may read other words, or one may take padding for the end of the prompt.
    """
    first, *others = tokens.values()
    if any(other.words != first.words for other in others):
        raise ModelError(
            f"{model.name}: capture.counterfactual leaves words out, and its text encoders read "
            f"other words of {first.text[:80]!r}.",
            "Leave capture.counterfactual out, or add the same words to its tokenizers.",
        )
    for name, (encoder, tokenizer) in model.text_encoders().items():
        if hasattr(encoder, "text_projection") and tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ModelError(
                f"{model.name}: capture.counterfactual pads a word out, and {name} would take "
                "that padding for the end of the prompt.",
                "Leave capture.counterfactual out, or set the pad_token of its tokenizer to "
                "another than its eos_token.",
            )


def word_changes(model: Family, step: Step, arguments: Arguments) -> torch.Tensor:
    """Return |prediction(prompt) - prediction(prompt without the word)|, the mean over channels.

    *Shape:* (word, image, y, x) float32. `arguments` are those of `embeddings_without`.
    """
    rows, images = len(arguments[TEXT]), len(step.latents)
    batch = step.model_input.to(model.dtype).repeat(rows, 1, 1, 1)
    t = torch.tensor(step.timestep, device=model.device)
    for_images = {name: value.repeat_interleave(images, dim=0) for name, value in arguments.items()}
    with torch.no_grad():
        predictions = model.call(batch, t, for_images)
    with_word, *without_it = predictions.float().unflatten(0, (rows, images))
    return torch.stack([(with_word - other).abs().mean(dim=1) for other in without_it])
