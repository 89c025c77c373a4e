"""A mistake in a file or on the command line ends in a line of cause and one of remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Command, needs_the_bundled_model, refused

from probe.diffusion.loading import BUNDLED

pytestmark = pytest.mark.usefixtures("own_folder")

TINY = "<the saved tiny model>"


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("stepss: 20\n", "stepss: unknown field", "Did you mean steps?"),
        (
            "capture:\n  layer: [a]\n",
            "capture.layer: unknown field",
            "Did you mean capture.layers?",
        ),
        ("steps: many\n", "steps: 'many' is not a whole number", "Write a whole number"),
        ("steps: 1.5\n", "steps: 1.5 is not a whole number", "Write a whole number"),
        ("seed: yes\n", "seed: 'yes' is not a whole number", "Write a whole number"),
        ("guidance_scale: [7]\n", "guidance_scale: [7] is not a number", "Write a number"),
        ("seed: 1\nseed: 2\n", "line 2: seed is written twice", "Keep one of the two."),
        ("prompt: a cat\n  bad: [\n", "line 2: not YAML", "Write one `field: value` a line"),
        ("scheduler: Eular\n", "'Eular' is not a scheduler", "Did you mean Euler?"),
        ("", "this file is empty", "Write `field: value` lines"),
    ],
)
def test_mistakes_in_a_file(
    call: Command, tmp_path: Path, text: str, cause: str, remedy: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    found = refused(call, file, "--dry-run")
    assert "mine.yaml" in found[0] and cause in found[0] and remedy in found[1]


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (["nothing.yaml"], "nothing.yaml: this file does not exist", "Check the path."),
        (["--steps", "many"], "steps: 'many' is not a whole number", "Write a whole number"),
        (["--steps", "0"], "steps: 0 is less than 1", "Write a number from 1 to 1000."),
        (
            ["--capture.text", "perhaps"],
            "capture.text: 'perhaps' is not true or false",
            "Write true or false.",
        ),
        (
            ["--capture.dtype", "float61"],
            "'float61' is not one of float16, float32, sqrt_u8",
            "Did you mean float16?",
        ),
        (["--seed", "a: b"], "command line: line 1: not YAML", "Write"),
        (["--seed"], "--seed: expected one argument", "--help"),
        (["one.yaml", "two.yaml"], "unrecognized arguments: two.yaml", "--help"),
        (
            ["--model", "nowhere/nothing"],
            "model: nowhere/nothing is not on this machine",
            "use the bundled model: --model emojiworld",
        ),
        (["--model", "./nowhere"], "model: './nowhere' is no directory", "Bundled: emojiworld,"),
        (
            [TINY, "--height", "30"],
            "height: 30 is not a multiple of f = 4",
            "Use height: 28 or 32.",
        ),
        (
            [TINY, "--width", "1001"],
            "width: 1001 is not a multiple of f = 4",
            "Use width: 1000 or 1004.",
        ),
        (
            [TINY, "--prompt", "a cat " * 60],
            "The prompt has 122 tokens, 77 is the most",
            "Shorten it, or set over_long: cut.",
        ),
        (
            [TINY, "--capture.layers", "16x16"],
            "capture.layers: '16x16' matches no cross-attention layer.",
            "8x8",
        ),
        (
            [TINY, "--capture.layers", "up_block.*"],
            "capture.layers: 'up_block.*' matches no cross-attention layer.",
            "up_blocks",
        ),
        (
            [TINY, "--capture.activations", "unet.midblock"],
            "capture.activations: 'unet.midblock' matches no module.",
            "unet.mid_block",
        ),
        (
            [TINY, "--capture.steps", "99"],
            "capture.steps: 99 is not a step of this run",
            "write indices from 0 to 50",
        ),
        (
            [TINY, "--capture.branches", "uncond", "--guidance-scale", "1"],
            "there is no unconditional branch",
            "Use a guidance_scale above 1",
        ),
        ([TINY, "--variant", "fp16"], "no weights of variant 'fp16'", "Leave variant out."),
        (
            [TINY, "--output", "file"],
            "file is a file, not a folder",
            "Name a folder: --output runs.",
        ),
        (
            [TINY, "--output", "file/below/it"],
            "file is a file, not a folder",
            "Name a folder: --output runs.",
        ),
    ],
)
def test_mistakes_on_the_command_line(
    call: Command, model: Path, tmp_path: Path, arguments: list[str], cause: str, remedy: str
) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    given = [
        word
        for argument in arguments
        for word in (
            ["--model", str(model), "--prompt", "a cat"] if argument == TINY else [argument]
        )
    ]
    found = refused(call, *given)
    assert cause in found[0] and remedy in found[1]
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_an_option_that_the_scheduler_lacks(call: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        f"model: {model}\nprompt: a cat\nscheduler: DDIM\nscheduler_options: {{karras: true}}\n"
    )
    cause, remedy = refused(call, file)
    assert (
        cause == "scheduler_options: DDIMScheduler has no option 'karras'."
        and "It has: beta_end" in remedy
    )


def test_only_pickled_weights(call: Command, model: Path) -> None:
    for file in model.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    cause, remedy = refused(call, "--model", model, "--prompt", "a cat")
    assert (
        "has only pickled weights, which can run code when they are read" in cause
        and "safe_serialization=True" in remedy
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_machine_without_cuda(call: Command, model: Path) -> None:
    cause, remedy = refused(call, "--model", model, "--device", "cuda")
    assert (
        cause == "device: cuda is not on this machine (0 CUDA devices)."
        and "--device cpu" in remedy
    )


@needs_the_bundled_model
def test_words_that_the_bundled_model_never_saw(call: Command) -> None:
    cause, remedy = refused(call, "--prompt", "A zebra and an astronaut, reading")
    assert cause == "emojiworld never saw 'zebra', 'reading' in its training."
    words = json.loads((BUNDLED["emojiworld"] / "words.json").read_text())
    assert "astronaut" in words and f"Its words: {' '.join(sorted(words))}." in remedy
    assert refused(call, "--negative-prompt", "ugly")[0].startswith("emojiworld never saw 'ugly'")
