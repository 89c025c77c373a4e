"""Text is read as the pipeline reads it, and every word that a recording names is found again."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from probe.analysis.maps import phrase, word_maps
from probe.cli import dispatch
from probe.diffusion.prompts import BYTES, Prompt, read_prompt
from probe.diffusion.sd import StableDiffusion
from probe.errors import CaptureError, ExperimentError, ModelError, PromptError
from probe.proof.verdict import verify
from probe.reading.recording import Run
from probe.running.ask import read_out
from probe.running.planning import plan
from probe.running.recorder import record, rerun, resume
from probe.settings.experiment import load_experiment
from probe.watching.counterfactual import chosen_words
from probe.watching.interface import hooked
from probe.watching.text_encoder import TextEncoder
from probe.words import STUMP, alike, occurrences, other_syntax, spelt, word_spans

QUERIES = {"attention": "queries", "branches": "both", "dtype": "float32"}
SMALL = {"steps": 2, "guidance_scale": 5.0, "device": "cpu"}
NAMASTE = "\u0928\u092e\u0938\u094d\u0924\u0947"
ASTRONAUT = "\U0001f469\u200d\U0001f680"  # woman, joiner, rocket


def take(folder: Path, pipeline: Any, prompt: str, **fields: Any) -> Run:
    return record(
        {"prompt": prompt, "output": str(folder / "runs"), **SMALL, **fields},
        pipeline=pipeline,
        progress=False,
    )


def toys() -> StableDiffusionPipeline:
    """A pipeline with three words of textual inversion, one of them of four vectors, one without
    letters.
    """
    torch.manual_seed(1)
    made = tiny.pipeline()
    made.tokenizer = tiny.tokenizer.__wrapped__()  # one of its own: words are added to it
    made.load_textual_inversion({"bad_quality": torch.randn(4, 16)})
    made.load_textual_inversion({"<cat-toy>": torch.randn(1, 16)})
    made.load_textual_inversion({"***": torch.randn(2, 16)})
    return made


def of_bytes(prefix: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer with every byte in its vocabulary, whose tokens have the space
    before them, and a token of two emoji.
    """
    vocabulary = {piece: i for i, piece in enumerate([*BYTES, "<s>", "</s>"])}
    pieces = ["\u00f0", "\u0141", "\u013a", "\u0124"]  # the bytes of U+1F602, as they are shown
    wholes = ["".join(pieces[: n + 1]) for n in range(4)]
    merges = [*zip(wholes, pieces[1:], strict=False), (wholes[3], wholes[3])]
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=200,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {
    "clip": tiny.tokenizer(),
    "bytes": of_bytes(False),
    "bytes with spaces": of_bytes(True),
}


def maps_of(prompt: Prompt) -> Any:
    """Random maps of a prompt's tokens, labelled as a recording's."""
    import xarray as xr

    values = np.random.default_rng(0).random((len(prompt.tokens), 2, 2)).astype(np.float32)
    words = [prompt.words[of] if of >= 0 else "" for of in prompt.word_of]
    coords = {
        "word": ("token", np.array(words, object)),
        "word_index": ("token", np.array(prompt.word_of)),
    }
    return xr.DataArray(values, dims=("token", "y", "x"), coords=coords)


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{NAMASTE} hat", [NAMASTE, "hat"]),
        ("\u0130stanbul caf\u00e9 cafe\u0301", ["\u0130stanbul", "caf\u00e9", "cafe\u0301"]),
        ("a 'cat' and cats' hats", ["a", "cat", "and", "cats", "hats"]),
        ("don't don\u2019t rock'n'roll", ["don't", "don\u2019t", "rock'n'roll"]),
        ("half-open a_b (cat:1.2), [hat]", ["half", "open", "a", "b", "cat", "1", "2", "hat"]),
        (f"cat\U0001f431\U0001f436 {ASTRONAUT}", ["cat", "\U0001f431", "\U0001f436", ASTRONAUT]),
        (
            "\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 1\ufe0f\u20e3 "
            "#\ufe0f\u20e3",
            None,
        ),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u05e9\u05dc\u05d5\u05dd", None),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8 \ud55c\uad6d", None),
        ("\u732b\u5750\u5728", ["\u732b\u5750\u5728"]),
        (
            "\U00010400\U00010428 \U0001fae8 \ue000",
            None,
        ),  # astral letters; an emoji newer than this Python; private use
        ("astro\u00adnaut scuba\u200bdiving", ["astro\u00adnaut", "scuba", "diving"]),
        ("\u0301 !?- \u2026", []),
    ],
)
def test_what_is_a_word(text: str, words: list[str] | None) -> None:
    found = [text[start:end] for start, end in word_spans(text)]
    if words is None:  # each is one, whatever it is made of; of flags there are two side by side
        words = [
            part
            for whole in text.split()
            for part in ([whole[:2], whole[2:]] if whole[0] == "\U0001f1e9" else [whole])
        ]
    assert found == words
    for word in found:
        assert occurrences(word, found), "a word is found as it is typed"


@pytest.mark.parametrize(
    ("typed", "label"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("CAF\u00c9", "cafe\u0301"),
        ("don't", "Don\u2019t"),
        ("I\u0307STANBUL", "\u0130stanbul"),
        ("\u2764", "\u2764\ufe0f"),
        ("astronaut", "astro\u00adnaut"),
        ("'cat'", "cat"),
        ("\ud55c", "\u1112\u1161\u11ab"),
        ("\u03a3\u03a3", "\u03c3\u03c2"),
    ],
)
def test_a_word_is_the_same_however_it_is_typed(typed: str, label: str) -> None:
    assert occurrences(typed, ["a", label]) == [range(1, 2)] and alike(typed.strip("'")) == alike(
        label
    )
    assert not occurrences("hat", ["a", label])


def test_words_of_older_recordings_are_found() -> None:
    """The first rules split at marks, joined what had no space, and left an apostrophe at the
    end.
    """
    labels = ["\u0928\u092e\u0938", "\u0924", "cat'", "x<cat-toy>", "cats'!"]
    for label in labels:
        assert range(labels.index(label), labels.index(label) + 1) in occurrences(label, labels)
    assert occurrences(NAMASTE, labels) == [range(0, 2)]
    assert occurrences("cat", labels) == occurrences("'cat'", labels) == [range(2, 3)]
    assert occurrences("cat", ["catfish", "cat toy", "scat"]) == [], "no part of a word"


# --- prompts --------------------------------------------------------------------------------------

SCRIPTS = [
    st.sampled_from(
        "a cat don't \u2019s half-open (hat:1.2) it's '' 3.5 a_b <|endoftext|>".split()
    ),
    st.sampled_from("\u00df \u1e9e \u0149 \ufb01 \ufdfa \u01f0 \u0345".split()),
    st.sampled_from(
        [
            NAMASTE,
            "\u0915\u094d\u200d\u0937",
            "\u0e20\u0e32\u0e29\u0e32",
            "\u0d2e\u0d32",
            "\u1019\u103c",
            "\u0f56\u0f7c\u0f51",
        ]
    ),
    st.sampled_from(
        [
            "\u05e9\u05c1\u05dc\u05d5\u05dd",
            "\u0645\u06cc\u200c\u062e",
            "\u0627\u0644\u0639\u064e",
            "\u0130stanbul",
            "cafe\u0301",
            "caf\u00e9",
        ]
    ),
    st.sampled_from(
        [
            "\u732b",
            "\ud55c\uad6d",
            "\u1112\u1161\u11ab",
            "\u304c",
            "\u304b\u3099",
            "\U00010400",
            "\U00020000",
            "\U0001d504",
        ]
    ),
    st.sampled_from(
        [
            "\U0001f431",
            ASTRONAUT,
            "\U0001f44d\U0001f3fd",
            "\U0001f1e9\U0001f1ea",
            "1\ufe0f\u20e3",
            "\u2764\ufe0f",
            "\U0001f602\U0001f602",
            "\u00a9",
        ]
    ),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=4),
]
TEXTS = st.lists(
    st.tuples(st.one_of(SCRIPTS), st.sampled_from(["", " ", " ", ", ", "\n", "-"])), max_size=8
).map(lambda parts: "".join(part + between for part, between in parts))


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS)
@example(text="a\u0345 \u0345b")
@example(text="x\x00y \x85")
def test_words_are_their_tokens_and_are_found(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = read_prompt(tokenizer, text, "cut")
    limit = tokenizer.model_max_length
    own = tokenizer(text, padding="max_length", max_length=limit, truncation=True)
    assert prompt.ids[0].tolist() == own.input_ids and prompt.mask[0].tolist() == own.attention_mask
    numbers = [of for of in prompt.word_of if of >= 0]
    assert numbers == sorted(numbers) and set(numbers) == set(range(len(prompt.words))), (
        "every word has tokens, in its order"
    )
    assert prompt.word_of[0] == -1 and set(prompt.word_of[prompt.end :]) <= {-1}
    for token in prompt.tokens:
        token.encode()
    if not prompt.cut:
        joined = "".join(prompt.words)
        assert all(c in joined for start, end in word_spans(text) for c in text[start:end]), (
            "no word is left without its tokens"
        )
    maps = maps_of(prompt)
    for number, word in enumerate(prompt.words):
        found = phrase(word_maps(maps), word)
        at = found["word_index"].values.tolist()
        assert number in at, f"{word!r} is not found"
        np.testing.assert_allclose(
            found.isel(word=at.index(number)),
            maps.isel(token=prompt.spans[number]).sum("token"),
            rtol=1e-6,
        )
        assert prompt.words[number] in chosen_words(prompt, (word,)) or alike(word) in map(
            alike, chosen_words(prompt, (word,))
        )


def test_two_words_in_one_token_are_one_word() -> None:
    prompt = read_prompt(TOKENIZERS["bytes"], "\U0001f602\U0001f602 cat")
    assert (
        prompt.words == ("\U0001f602\U0001f602", "cat")
        and prompt.tokens[1] == "\U0001f602\U0001f602"
    )


def test_a_token_with_its_space_is_trimmed_first() -> None:
    prompt = read_prompt(TOKENIZERS["bytes with spaces"], "a cat on")
    assert prompt.words == ("a", "cat", "on") and prompt.tokens[1] == " "


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\u00e4", ["\\xc3", "\\xa4"]),
        ("\U0001f431", ["\\xf0", "\\x9f", "\\x90", "\\xb1"]),
        ("cat", ["cat"]),
        ("'s", ["'", "s"]),
    ],
)
def test_the_text_of_a_token_is_text(text: str, tokens: list[str]) -> None:
    prompt = read_prompt(tiny.tokenizer(), text)
    assert list(prompt.tokens[1 : prompt.end]) == tokens
    assert read_prompt(TOKENIZERS["bytes"], "\U0001f602").tokens[1] == "\U0001f602", (
        "a whole character in one token is shown"
    )


@pytest.mark.parametrize(
    ("text", "words", "cut"),
    [
        (
            "cat " * 74 + "a\u00e9x",
            "a",
            "\u00e9x",
        ),  # in the middle of a character: what was read of the word is a
        (
            "cat " * 74 + "\U0001f431 x",
            "cat",
            "\U0001f431 x",
        ),  # not one whole character of it was read: no word
    ],
)
def test_cutting_inside_a_character(text: str, words: str, cut: str) -> None:
    prompt = read_prompt(tiny.tokenizer(), text, "cut")
    assert prompt.words[-1] == words and prompt.cut == cut


def test_cutting_between_the_vectors_of_a_word(tmp_path: Path) -> None:
    run = take(
        tmp_path, toys(), "cat " * 72 + "bad_quality", over_long="cut", capture={"branches": "cond"}
    )
    assert run.words[-1] == f"bad_quality{STUMP}" and run.cut() == ("bad_quality_3", "bad_quality")
    with pytest.raises(
        PromptError, match="was cut in its middle: the model read only some of its vectors"
    ):
        run.phrase("bad_quality")


@pytest.mark.parametrize("text", ["a \ud800 cat", "\udfff"])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(PromptError, match="half a character, U\\+D") as caught:
        read_prompt(tiny.tokenizer(), text)
    assert caught.value.remedy == "Delete it, or decode the prompt as UTF-8."


def test_the_bundled_vocabulary_reads_words_by_the_same_rule() -> None:
    model = replace(
        StableDiffusion.of(tiny.pipeline()), name="little", vocabulary=frozenset({"cat", "a", "s"})
    )
    assert model.read("A cat's (CAT:a) cat-cat").words == ("A", "cat's", "CAT", "a", "cat", "cat")
    for text, unknown in (
        ("\u0130stanbul", "'i\u0307stanbul'"),
        (NAMASTE, repr(NAMASTE)),
        ("a \U0001f431", "'\U0001f431'"),
        ("ca\u200dt", repr("ca\u200dt")),
    ):
        with pytest.raises(PromptError) as caught:
            model.read(text)
        assert caught.value.cause == f"little never saw {unknown} in its training."


# --- as the pipeline reads ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a pipeline with textual inversion, saved beside it without that."""
    folder = tmp_path_factory.mktemp("inverted")
    tiny.pipeline().save_pretrained(folder / "plain")
    pipe = toys()
    pipe.config._name_or_path = str(folder / "plain")
    pipe.register_to_config(_name_or_path=str(folder / "plain"))
    words = "a <cat-toy>hat *** in a hat"
    return take(folder, pipe, words, negative_prompt="bad_quality, a hat", capture=QUERIES)


def test_textual_inversion_is_read_with_all_its_vectors(inverted: Run) -> None:
    pipe = toys()
    cond, uncond = pipe.encode_prompt(
        "a <cat-toy>hat *** in a hat", "cpu", 1, True, "bad_quality, a hat"
    )
    recorded = inverted.variable("text/text_encoder/output")
    for branch, embedding in (("cond", cond), ("uncond", uncond)):
        np.testing.assert_array_equal(
            recorded.sel(branch=branch).values, embedding[0].detach().numpy()
        )
    drawn = pipe(
        "a <cat-toy>hat *** in a hat",
        negative_prompt="bad_quality, a hat",
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    np.testing.assert_array_equal(inverted.variable("latents/final_latents").values, drawn.numpy())
    assert (
        inverted.read_as("uncond") == "bad_quality bad_quality_1 bad_quality_2 bad_quality_3, a hat"
    )


def test_a_word_of_several_vectors_is_one_word(inverted: Run) -> None:
    negative = inverted.word_maps(branch="uncond")
    assert negative["word"].values.tolist() == ["bad_quality", "a", "hat"]
    tokens = inverted.token_maps(branch="uncond")
    np.testing.assert_allclose(
        inverted.phrase("bad_quality", branch="uncond").isel(word=0),
        tokens.isel(token=slice(1, 5)).sum("token"),
        rtol=1e-5,
    )
    assert list(inverted.words) == ["a", "<cat-toy>", "hat", "***", "in", "a", "hat"]
    pipe = toys()
    for word in ["a", "<cat-toy>", "***", "hat"]:
        assert inverted.phrase(word).sizes["word"] >= 1
        assert read_out(inverted, word, pipeline=pipe).sizes["step"] == len(inverted.steps)
        assert chosen_words(StableDiffusion.of(pipe).read("a <cat-toy>hat *** in a hat"), (word,))
    assert inverted.phrase("a <cat-toy> hat").sizes["word"] == 1


def test_such_a_recording_is_proven_and_missed_where_the_inversion_is_missing(
    inverted: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {
        check.name: check.detail
        for check in verify(inverted, model=toys())
        if check.verdict == "failed"
    } == {}
    failed = {
        check.name: check.detail
        for check in verify(inverted, model=True)
        if check.verdict == "failed"
    }
    assert "weights" in failed and "bring those back" in failed["weights"], (
        "from the name alone it is another model"
    )
    capsys.readouterr()
    again = rerun(inverted, progress=True)
    assert "other weights" in capsys.readouterr().err
    assert again.attributes["model"]["weights"] != inverted.attributes["model"]["weights"]


def test_a_saved_model_with_textual_inversion_is_read_as_the_pipeline_reads_it(
    tmp_path: Path,
) -> None:
    toys().save_pretrained(tmp_path / "model")
    run = record(
        {
            "prompt": "bad_quality hat",
            "model": str(tmp_path / "model"),
            "output": str(tmp_path / "runs"),
            **SMALL,
        },
        progress=False,
    )
    own = StableDiffusionPipeline.from_pretrained(
        tmp_path / "model",
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    cond, _ = own.encode_prompt("bad_quality hat", "cpu", 1, False)
    np.testing.assert_array_equal(
        run.variable("text/text_encoder/output").sel(branch="cond").values, cond[0].detach().numpy()
    )
    assert {
        check.name: check.detail for check in verify(run, model=True) if check.verdict == "failed"
    } == {}


class Shouting(StableDiffusionPipeline):
    def encode_prompt(self, prompt: Any, *rest: Any, **named: Any) -> Any:
        return super().encode_prompt(prompt.upper(), *rest, **named)


def test_a_pipeline_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    Shouting.__name__ = "StableDiffusionPipeline"
    pipe.__class__ = Shouting
    with pytest.raises(ModelError, match="encode_prompt was replaced"):
        StableDiffusion.of(pipe)
    pipe = tiny.pipeline()
    pipe.encode_prompt = lambda *given, **named: StableDiffusionPipeline.encode_prompt(
        pipe, *given, **named
    )
    with pytest.raises(ModelError, match="encode_prompt was replaced"):
        take(tmp_path, pipe, "a cat")
    assert not (tmp_path / "runs").exists()


class Sneaky(type(tiny.tokenizer())):  # type: ignore[misc]
    """A tokenizer that reads a prompt otherwise, but not when asked where its tokens are."""

    def __call__(self, text: Any, *rest: Any, **named: Any) -> Any:
        return super().__call__(
            text if named.get("return_offsets_mapping") else [f"{one} hat" for one in text],
            *rest,
            **named,
        )


def test_whatever_else_makes_another_embedding_is_seen_before_anything_is_written(
    tmp_path: Path,
) -> None:
    pipe = tiny.pipeline()
    pipe.tokenizer = tiny.tokenizer.__wrapped__()
    pipe.tokenizer.__class__ = Sneaky
    with pytest.raises(ModelError, match="another embedding of the negative prompt"):
        take(tmp_path, pipe, "a cat", negative_prompt="hat")
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_that_knows_more_than_the_text_encoder(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.tokenizer = tiny.tokenizer.__wrapped__()
    pipe.tokenizer.add_tokens(["<x>"])
    with pytest.raises(
        ModelError, match="the token '<x>', and its text encoder no embedding of it"
    ) as caught:
        take(tmp_path, pipe, "a <x>")
    assert "load_textual_inversion" in caught.value.remedy


def test_looking_at_the_pipelines_own_embedding_changes_nothing(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    before = torch.get_rng_state()
    plan(StableDiffusion.of(pipe), take(tmp_path, pipe, "a cat").experiment)
    assert torch.equal(before, torch.get_rng_state())


# --- the text encoder's attention -----------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_the_text_encoders_attention_is_its_own(tmp_path: Path, masked: bool) -> None:
    pipe = tiny.pipeline()
    pipe.text_encoder.config.use_attention_mask = masked
    run = take(tmp_path, pipe, "a cat on the hat", negative_prompt="dog")
    recorded = run.variable("text/text_encoder/attention")
    pipe.text_encoder.set_attn_implementation("eager")
    for branch, text in (("cond", "a cat on the hat"), ("uncond", "dog")):
        given = pipe.tokenizer(
            text, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        mask = given.attention_mask if masked else None
        with torch.no_grad():
            own = pipe.text_encoder(
                given.input_ids, attention_mask=mask, output_attentions=True
            ).attentions
        for layer, attention in enumerate(own):
            np.testing.assert_allclose(
                recorded.isel(text_layer=layer).sel(branch=branch).values,
                attention[0].numpy(),
                atol=6e-4,
            )
    pipe.text_encoder.set_attn_implementation("sdpa")
    assert {
        check.name: check.detail for check in verify(run, model=pipe) if check.verdict == "failed"
    } == {}


def test_a_text_encoder_that_attends_otherwise_is_refused() -> None:
    pipe = tiny.pipeline()
    model = StableDiffusion.of(pipe)
    pipe.text_encoder.config.use_attention_mask = True
    settled = plan(model, load_experiment({"prompt": "a cat"}))
    capture = next(
        capture for capture in settled.captures if isinstance(capture, TextEncoder)
    )  # which is not told of the mask
    with hooked(capture), pytest.raises(CaptureError, match="layer 0 does not attend"):
        model.encode(model.read("a cat"))


# --- what other programs read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a (cat:1.2), [hat] BREAK an AND <lora:x:1>",
            ["(cat:1.2)", "[hat]", "BREAK", "AND", "<lora:x:1>"],
        ),
        (
            "((cat)) {hat|dog} cat++ cat::2 a hat --ar 16:9",
            ["((cat))", "{hat|dog}", "cat++", "cat::2", "--ar"],
        ),
        ("A CAT AND A HAT", []),
        ("a cat (in a hat) and a dog, 5+ hats, half-open; half--open", []),
    ],
)
def test_other_programs_syntax_is_named(text: str, found: list[str]) -> None:
    assert other_syntax(text) == found


def test_it_is_said_once_and_the_text_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "model")
    asked = [
        "--model",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
        "--steps",
        "1",
    ]
    asked += ["--prompt", "(cat:1.2) BREAK (cat:1.2)", "--negative-prompt", "[hat]"]
    assert dispatch(["run", *asked]) == 0
    said = capsys.readouterr().err
    line = "Read as plain text, as diffusers reads it: [hat], (cat:1.2), BREAK."
    assert said.count("Read as plain text") == said.count(line) == 1
    (path,) = (tmp_path / "runs").glob("*.zarr")
    assert (
        json.loads((path / "zarr.json").read_text())["attributes"]["experiment"]["prompt"]
        == "(cat:1.2) BREAK (cat:1.2)"
    )
    assert list(Run(path).words) == ["cat", "1", "2", "BREAK", "cat", "1", "2"]
    assert dispatch(["run", *asked, "--dry-run"]) == 0
    assert capsys.readouterr().err.count(line) == 1


def test_a_picture_of_several_has_the_next_seed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        dispatch(["run", "--help"])
    assert "seed + i" in " ".join(capsys.readouterr().out.split())


# --- recordings -----------------------------------------------------------------------------------


def test_words_in_many_scripts_are_recorded_shown_and_proven(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = f"\u0130stanbul \U0001f431 cafe\u0301 caf\u00e9 {NAMASTE} don\u2019t 'cat'"
    pipe = tiny.pipeline()
    run = take(tmp_path, pipe, prompt, capture={**QUERIES, "counterfactual": ["*"]})
    words = list(run.words)
    assert words == run.word_overview()["word"].values.tolist()
    assert words == [
        "\u0130stanbul",
        "\U0001f431",
        "cafe\u0301",
        "caf\u00e9",
        NAMASTE,
        "don\u2019t",
        "cat",
    ]
    assert run.phrase("caf\u00e9").sizes["word"] == run.phrase("cafe\u0301").sizes["word"] == 2
    for word in words:
        assert (
            run.phrase(word).sizes["word"] >= 1
            and read_out(run, word, pipeline=pipe).sizes["step"] == 3
        )
    assert run.counterfactual().sizes["masked_word"] == 6, (
        "composed and decomposed are one word to the text encoder"
    )
    assert {
        check.name: check.detail for check in verify(run, model=pipe) if check.verdict == "failed"
    } == {}
    assert dispatch(["show", str(run.path), "--words"]) == 0
    with pytest.raises(ExperimentError, match="is not in"):
        read_out(run, "dog", "a cat", pipe)


def test_a_stump_is_found_as_it_is_called(tmp_path: Path) -> None:
    run = take(tmp_path, tiny.pipeline(), "cat " * 73 + "zebra", over_long="cut")
    assert (
        run.words[-1] == run.word_maps()["word"].values[-1] == f"ze{STUMP}"
        and run.phrase(f"ze{STUMP}").sizes["word"] == 1
    )
    for text in ("ze", "zebra"):
        with pytest.raises(PromptError, match="was cut in its middle"):
            run.phrase(text)


def test_a_recording_by_the_first_rules_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens and words are read again by the rules that made them, when it is proven and when
    it is resumed.
    """
    import probe.running.description as description
    import probe.running.planning as planning

    with monkeypatch.context() as first:
        first.setattr(planning.plan, "__kwdefaults__", {"schedule": None, "rules": 1})
        first.setattr(description, "RULES", 1)
        run = take(
            tmp_path,
            tiny.pipeline(),
            f"{NAMASTE} \u00e4 'cat' \U0001f431",
            capture={"counterfactual": ["*"]},
        )
    assert list(run.words) == ["\u0928\u092e\u0938", "\u0924", "\u00e4", "cat'"]
    assert {
        check.name: check.detail
        for check in verify(run, model=tiny.pipeline())
        if check.verdict == "failed"
    } == {}
    for word in ("\u0928\u092e\u0938", "\u0924", NAMASTE, "\u00e4", "cat", "cat'"):
        assert run.phrase(word).sizes["word"] == 1
    assert "\u00c3" in run.tokens() and resume(run, progress=False) is run


def test_alike_is_the_same_the_second_time() -> None:
    for text in ("\u0130", "\u01f0", "J\u030c", "\u0345", "\ufb03", "\u1e9e", "\u2126", "\u00c5"):
        assert alike(alike(text)) == alike(text) == alike(unicodedata.normalize("NFD", text))
    assert spelt("") == [] == spelt(" -' ")
