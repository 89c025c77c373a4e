"""Labels of tokens and words follow from the typed prompt.

Otherwise `probe verify` does not call them exact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import zarr
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from probe.proof.checks import Check
from probe.proof.label_checks import _is_written_out, check_labels
from probe.reading.recording import Run
from probe.running.recorder import record

ASKED: dict[str, Any] = {
    "prompt": "An astronaut scuba diving",
    "negative_prompt": "a hat",
    "steps": 1,
    "capture": {"branches": "both"},
}


def toys() -> StableDiffusionPipeline:
    """A pipeline with two words of textual inversion, of three vectors and of one."""
    torch.manual_seed(1)
    made = tiny.pipeline()
    made.tokenizer = tiny.tokenizer.__wrapped__()  # one of its own: words are added to it
    made.load_textual_inversion({"<toy>": torch.randn(3, 16)})
    made.load_textual_inversion({"<one>": torch.randn(1, 16)})
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(
        {**ASKED, "output": str(tmp_path_factory.mktemp("plain"))}, tiny.pipeline(), progress=False
    ).path


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = {
        **ASKED,
        "prompt": "a <toy> and x<toy>s",
        "output": str(tmp_path_factory.mktemp("inverted")),
    }
    return record(asked, toys(), progress=False).path


def edited(
    source: Path,
    folder: Path,
    attributes: Callable[[dict[str, Any]], Any] | None = None,
    texts: dict[str, str] | None = None,
) -> Check:
    """What is said of the labels of a copy with other attributes, and with other texts of tokens
    and words, the same in every group.
    """
    path = Path(shutil.copytree(source, folder / source.name))
    if attributes is not None:
        root = json.loads((path / "zarr.json").read_text())
        attributes(root["attributes"])
        (path / "zarr.json").write_text(json.dumps(root))
    for name in ("token_text", "word") if texts else ():
        for file in path.rglob(f"{name}/zarr.json"):
            array: Any = zarr.open_array(
                path, path=file.parent.relative_to(path).as_posix(), mode="r+"
            )
            values = array[...]
            array[...] = np.vectorize(
                lambda text: (texts or {}).get(str(text), str(text)), otypes=[object]
            )(values)
    return check_labels(Run(path))


def test_an_untouched_recording_is_exact(plain: Path, inverted: Path) -> None:
    assert (check_labels(Run(plain)).verdict, check_labels(Run(inverted)).verdict) == (
        "exact",
        "exact",
    )
    assert Run(inverted).read_as() == "a <toy> <toy>_1 <toy>_2 and x<toy> <toy>_1 <toy>_2s"


def asks(prompt: str, **attributes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(there: dict[str, Any]) -> None:
        there["experiment"]["prompt"] = prompt
        there.update(attributes)

    return edit


TYPED = "An astronaut scuba diving"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another prompt, read as the old one": (
        asks("A dog on the moon", read_as={"cond": TYPED}),
        "read_as",
    ),
    "an empty one": (asks("", read_as={"cond": TYPED}), "read_as"),
    "one that begins alike": (asks("An astronaut", read_as={"cond": TYPED}), "read_as"),
    "read as it is typed": (asks(TYPED, read_as={"cond": TYPED}), "read_as"),
    "another negative prompt": (
        lambda it: (
            it["experiment"].update(negative_prompt="ugly"),
            it.update(read_as={"uncond": "a hat"}),
        ),
        "read_as",
    ),
    "of no branch": (asks(TYPED, read_as={"x": TYPED}), "read_as"),
    "a longer prompt, cut by other text": (
        lambda it: (
            it["experiment"].update(prompt=f"{TYPED} naked", over_long="cut"),
            it.update(cut_from_prompt={"cond": "XXXXXX"}),
        ),
        "cut_from_prompt",
    ),
    "a longer prompt, cut where there is room": (
        lambda it: (
            it["experiment"].update(prompt=f"{TYPED} naked", over_long="cut"),
            it.update(cut_from_prompt={"cond": " naked"}),
        ),
        "there is room",
    ),
    "cut, which is an error": (
        asks(f"{TYPED} naked", cut_from_prompt={"cond": " naked"}),
        "cut_from_prompt",
    ),
    "nothing that was cut": (asks(TYPED, cut_from_prompt={"cond": ""}), "cut_from_prompt"),
}


@pytest.mark.parametrize("what", EDITS)
def test_attributes_that_do_not_follow_from_the_prompt_fail(
    what: str, plain: Path, tmp_path: Path
) -> None:
    edit, told = EDITS[what]
    check = edited(plain, tmp_path, edit)
    assert check.verdict == "failed" and told in check.detail


@pytest.mark.parametrize(
    "prompt",
    [
        "a <toy>",
        "a <toy> and <toy>",
        "a <toy> <toy>_1 <toy>_2 and x<toy>s",
        "a hat and x<toy>s",
        "a <toy> and <toy>s",
    ],
)
def test_a_word_of_several_vectors_is_what_was_typed(
    prompt: str, inverted: Path, tmp_path: Path
) -> None:
    assert edited(inverted, tmp_path, asks(prompt)).verdict == "failed"


WORD = st.sampled_from(
    ["<toy>", "<one>", "toy", "a", "<toy>_1", "<toy> <toy>_1", "x<toy>y", ",", "_1", "hat_1"]
)


@given(st.lists(WORD, max_size=8).map(" ".join))
def test_what_the_pipeline_makes_of_a_prompt_follows_from_it(prompt: str) -> None:
    """The same as diffusers' own rule, for every prompt."""
    pipe = PIPE[0] if PIPE else PIPE.append(toys()) or PIPE[0]  # type: ignore[func-returns-value]
    read = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    assert read == prompt or _is_written_out(prompt, read)
    assert not _is_written_out(f"{prompt} hat", read) and not _is_written_out(
        prompt, f"{read} hat hat_2"
    )


PIPE: list[StableDiffusionPipeline] = []
WORDS = {"astronaut": "elephant", "scuba": "tuba"}
TEXTS: dict[str, tuple[dict[str, str], str]] = {
    "the end": ({"<|endoftext|>": "</s>"}, "not checked"),
    "the start": ({"<|startoftext|>": "<s>"}, "not checked"),
    "words": (WORDS, "failed"),
    "the end and words": ({"<|endoftext|>": "</s>", **WORDS}, "failed"),
    "the end, and two words swapped": (
        {"<|endoftext|>": "</s>", "scuba": "diving", "diving": "scuba"},
        "failed",
    ),
    "the start and a word in other letters": (
        {"<|startoftext|>": "<s>", "scuba": "SCUBA"},
        "failed",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_labels_that_cannot_be_held_against_the_prompt_are_never_exact(
    what: str, plain: Path, tmp_path: Path
) -> None:
    texts, verdict = TEXTS[what]
    check = edited(plain, tmp_path, texts=texts)
    assert check.verdict == verdict and (
        verdict == "failed" or "only the model can say" in check.detail
    )


def test_a_word_that_its_tokens_do_not_spell_fails_also_without_an_end(
    plain: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(plain, tmp_path / plain.name))
    for file in path.rglob("token_text/zarr.json"):
        array: Any = zarr.open_array(path, path=file.parent.relative_to(path).as_posix(), mode="r+")
        values = array[...]
        array[...] = np.vectorize(
            lambda text: {"<|endoftext|>": "</s>", "scuba": "tuba"}.get(str(text), str(text)),
            otypes=[object],
        )(values)
    check = check_labels(Run(path))
    assert check.verdict == "failed" and "its tokens spell 'tuba'" in check.detail
