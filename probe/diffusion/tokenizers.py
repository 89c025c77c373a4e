"""Make a model's tokenizer from its checked files; the library opens no others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from probe.diffusion.model_configs import CLASSES
from probe.diffusion.model_files import ModelFolder
from probe.text import first_line, printable, shorten, shown

MOST, MOST_ADDED = 16 << 20, 10_000
WHOLE_MODEL = "Is it a whole diffusers directory?"
# Settings that a CLIP tokenizer has. Others are not for it, or decide which code runs and which
# files are opened.
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
SETTINGS: dict[str, type] = {
    **dict.fromkeys(("added_tokens_decoder",), dict),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), list),
    **dict.fromkeys(
        (
            "add_prefix_space",
            "do_lower_case",
            "clean_up_tokenization_spaces",
            "split_special_tokens",
        ),
        bool,
    ),
    **dict.fromkeys(("errors", "padding_side", "truncation_side"), str),
}
FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
KINDS = {
    "vocab_file": "vocab.json",
    "merges_file": "merges.txt",
    "tokenizer_file": "tokenizer.json",
    "added_tokens_file": "added_tokens.json",
    "special_tokens_map_file": "special_tokens_map.json",
}
LONGEST = 10**9  # transformers writes 1e30 where it does not know how long a prompt may be


def read_tokenizer(
    folder: ModelFolder,
    index: Mapping[str, Any],
    encoder: Mapping[str, Any],
    inside: str | None = None,
    part: str = "tokenizer",
) -> Any:
    """Make the tokenizer of a model's folder.

    Without a length of its own it has that of the text encoder's config. Raise ModelError if its
    files are missing, too large, not plain, or make no CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    inside = part if inside is None else inside
    there = folder.files(inside)
    entry = index.get(part, [None, "CLIPTokenizer"])
    if not (isinstance(entry, list) and entry and entry[-1] in CLASSES["tokenizer"]):
        raise folder.refuse(
            f"its {part} is {shown(entry)}, which is not supported.", "A CLIPTokenizer is."
        )
    if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= set(there):
        raise folder.refuse(
            f"{inside}/ has neither tokenizer.json, nor vocab.json and merges.txt.",
            "Fetch the model again, whole.",
        )
    config = "tokenizer_config.json"
    written = folder.json_object(f"{inside}/{config}") if config in there else {}
    settings = _settings(folder, f"{inside}/{config}", written)
    own_length = int(encoder.get("max_position_embeddings") or 77)
    settings["model_max_length"] = _length(folder, f"{inside}/{config}", written) or own_length
    _check_files(folder, inside, there)
    files = {
        kind: str(folder.path / inside / file) if file in there else None
        for kind, file in KINDS.items()
    }
    try:
        # What `from_pretrained` does once it has chosen the files and read the settings, and these
        # are our choice.
        tokenizer = CLIPTokenizer._from_pretrained(
            files, str(folder.path / inside), settings, local_files_only=True, _is_local=True
        )
        largest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as problem:
        raise _no_tokenizer(folder, part, problem) from problem
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":  # of the tokenizers library, in Rust
            raise
        raise _no_tokenizer(folder, part, problem) from problem
    if largest >= (known := int(encoder.get("vocab_size") or 49408)):
        raise folder.refuse(
            f"{part}/ has a token number {largest}, and the text encoder knows {known}.",
            "Bring the two that belong together.",
        )
    return tokenizer


def _settings(folder: ModelFolder, where: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a CLIP tokenizer has. Raise ModelError for a wrong type."""
    settings = {key: value for key, value in written.items() if key in TOKENS or key in SETTINGS}
    for key, value in settings.items():
        if key in TOKENS:
            kinds: tuple[type, ...] = (str, dict)
        else:
            kinds = (SETTINGS[key], dict) if key.endswith("tokens") else (SETTINGS[key],)
        if value is not None and not isinstance(value, kinds):
            raise folder.refuse(f"{where}: {key} is {shown(value)}, which it cannot be.")
    return settings


def _length(folder: ModelFolder, where: str, written: Mapping[str, Any]) -> int | None:
    """Return the most tokens of a prompt, None if unknown. Raise ModelError for no number."""
    length = written.get("model_max_length")
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 1:
        raise folder.refuse(f"{where}: model_max_length is {shown(length)}, which it cannot be.")
    return int(length) if length < LONGEST else None


def _check_files(folder: ModelFolder, inside: str, there: Collection[str]) -> None:
    """Raise ModelError for files that are too large, not plain, or add too many tokens."""
    for file in [file for file in FILES if file in there]:
        content = folder.json_object(f"{inside}/{file}", MOST)
        added: Any = ()
        if file == "tokenizer.json":
            added = content.get("added_tokens", ())
        elif file == "added_tokens.json":
            added = content
        if not isinstance(added, list | tuple | dict) or len(added) > MOST_ADDED:
            raise folder.refuse(f"{inside}/{file}: it adds no list of at most {MOST_ADDED} tokens.")
    if "merges.txt" in there:
        folder.plain(f"{inside}/merges.txt", MOST)


def _no_tokenizer(folder: ModelFolder, part: str, problem: BaseException) -> Exception:
    why = shorten(printable(first_line(problem)))
    return folder.refuse(f"{part}/ holds no CLIP tokenizer: {why}", WHOLE_MODEL)
